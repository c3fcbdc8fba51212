//! Mirrors data packs into a store, tries them on a shadow database, serves them on the LAN.

use std::process::ExitCode;

fn main() -> ExitCode {
    store_relay::cli::main()
}

//! Brings a register's SQLite database up to date and reports.

use std::process::ExitCode;

fn main() -> ExitCode {
    pos_agent::cli::main()
}

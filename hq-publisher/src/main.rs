//! The command `hq-publisher`.

use clap::Parser;
use hq_publisher::cli::Cli;
use std::process::ExitCode;

/// An eighth of a heartbeat's time was malloc's: thousands a second, taken apart by one thread and kept by another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    proto::cli::start(&cli.common);
    hq_publisher::commands::main(&cli).into()
}

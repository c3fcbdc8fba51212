//! The command `hq-publisher`.

use clap::Parser;
use hq_publisher::cli::Cli;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    proto::cli::start(&cli.common);
    hq_publisher::commands::main(&cli).into()
}

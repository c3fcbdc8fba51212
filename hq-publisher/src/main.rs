//! The command `hq-publisher`.

use clap::Parser;
use hq_publisher::cli::Cli;

fn main() {
    let cli = Cli::parse();
    proto::cli::start(&cli.common);
}

//! Speed and memory of Tillcast, each figure against a named peer in the same run. `tests/bench/run` builds, runs and
//! prints the lines of RESULTS.md.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a bench is test code: a failure stops it, and files and clocks are its own"
)]

mod apply;
mod bytes;
mod data;
mod measure;
mod readers;

use clap::Parser;
use measure::Line;

/// Runs benches and prints Markdown.
#[derive(Debug, Parser)]
struct Options {
    /// Which benches; all where none is named.
    names: Vec<String>,
    /// Rows of the item table.
    #[arg(long, default_value_t = 300_000)]
    rows: u64,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

type Bench = fn(&Options) -> Vec<Line>;

const BENCHES: [(&str, Bench); 4] =
    [("full", apply::full), ("delta", apply::delta), ("bytes", bytes::bytes), ("readers", readers::readers)];

fn main() {
    let options = Options::parse();
    if let Some(unknown) = options.names.iter().find(|n| BENCHES.iter().all(|(name, _)| name != n)) {
        let known: Vec<&str> = BENCHES.iter().map(|(n, _)| *n).collect();
        eprintln!("there is no bench {unknown}; there are {}", known.join(", "));
        std::process::exit(2);
    }
    println!("| what | target | min / median / max | | behind it |\n| --- | --- | --- | --- | --- |");
    for (name, bench) in BENCHES {
        if options.names.is_empty() || options.names.iter().any(|n| n == name) {
            let start = std::time::Instant::now();
            bench(&options).iter().for_each(|line| println!("{line}"));
            eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        }
    }
}

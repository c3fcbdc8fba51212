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
mod latency;
mod measure;
mod memory;
mod publish;
mod readers;
mod real;
mod serve;
mod stage;

use clap::Parser;
use measure::Results;

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
    /// Publishes of each latency series.
    #[arg(long, default_value_t = 20)]
    publishes: usize,
    /// Also measure memory with ten times the rows (minutes, and some GB of disk).
    #[arg(long)]
    large: bool,
}

type Bench = fn(&Options, &mut Results);

const BENCHES: [(&str, Bench); 9] = [
    ("full", apply::full),
    ("delta", apply::delta),
    ("publish", publish::publish),
    ("bytes", bytes::bytes),
    ("serve", serve::serve),
    ("latency", latency::latency),
    ("readers", readers::readers),
    ("memory", memory::memory),
    ("real", real::real),
];

fn main() {
    let options = Options::parse();
    if let Some(unknown) = options.names.iter().find(|n| BENCHES.iter().all(|(name, _)| name != n)) {
        let known: Vec<&str> = BENCHES.iter().map(|(n, _)| *n).collect();
        eprintln!("there is no bench {unknown}; there are {}", known.join(", "));
        std::process::exit(2);
    }
    let mut results = Results::default();
    println!("| what | target | min / median / max | | behind it |\n| --- | --- | --- | --- | --- |");
    for (name, bench) in BENCHES {
        if options.names.is_empty() || options.names.iter().any(|n| n == name) {
            let start = std::time::Instant::now();
            bench(&options, &mut results);
            eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        }
    }
    results.tables.iter().for_each(|table| println!("\n{table}"));
    eprintln!("{} targets missed", results.missed);
}

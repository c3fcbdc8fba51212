//! Speed and memory of Tillcast, each figure against a named peer in the same run. `tests/bench/run` builds, runs and
//! prints the lines of RESULTS.md.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a bench is test code: a failure stops it, and files and clocks are its own"
)]

mod apply;
mod back;
mod baseline;
mod bytes;
mod client;
mod crowd;
mod data;
mod fleet;
mod isolation;
mod latency;
mod measure;
mod memory;
mod opening;
mod peers;
mod plot;
mod publish;
mod readers;
mod real;
mod scale;
mod serve;
mod stage;
mod syncthing;

use clap::Parser;
use measure::Results;
use std::path::PathBuf;

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
    /// Also measure memory with ten times the rows, and registers for a whole day (a quarter of an hour, and some GB of disk).
    #[arg(long)]
    large: bool,
    /// Draw an SVG a bench into this directory.
    #[arg(long)]
    plots: Option<PathBuf>,
    /// Write the ratios of this run into a file, to compare later runs with.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Exit with 1 where a ratio is more than 10% worse than in this file, in its best run too.
    #[arg(long)]
    against: Option<PathBuf>,
}

type Bench = fn(&Options, &mut Results);

const BENCHES: [(&str, Bench); 17] = [
    ("full", apply::full),
    ("delta", apply::delta),
    ("publish", publish::publish),
    ("bytes", bytes::bytes),
    ("serve", serve::serve),
    ("latency", latency::latency),
    ("readers", readers::readers),
    ("memory", memory::memory),
    ("real", real::real),
    ("scale", scale::scale),
    ("fleet", fleet::fleet),
    ("tills", crowd::tills),
    ("crowd", crowd::crowd),
    ("isolation", isolation::isolation),
    ("opening", opening::opening),
    ("back", back::back),
    ("peers", peers::peers),
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
            results.bench = name;
            bench(&options, &mut results);
            eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        }
    }
    results.tables.iter().for_each(|table| println!("\n{table}"));
    results.missed().for_each(|l| eprintln!("missed: {}", l.what));
    if let Some(dir) = &options.plots {
        plot::draw(dir, &results);
    }
    if let Some(file) = &options.save {
        baseline::save(file, &results);
    }
    if let Some(file) = &options.against {
        let worse = baseline::worse(file, &results, options.names.is_empty());
        worse.iter().for_each(|w| eprintln!("worse: {w}"));
        // Milliseconds and MiB are the machine's as well: they are told, and ratios judged.
        if !worse.is_empty() || results.missed().any(|l| l.unit == "×") {
            std::process::exit(1);
        }
    }
}

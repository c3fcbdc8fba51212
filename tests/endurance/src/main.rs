//! `tests/endurance/run` builds and calls this.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use clap::Parser;
use std::path::PathBuf;
use tillcast_endurance::{Options, live};

/// Lives days of a chain in minutes and tells what grew.
#[derive(Parser)]
struct Arguments {
    /// Days.
    #[arg(long, default_value_t = 24)]
    days: u64,
    /// Seconds that a day takes.
    #[arg(long, default_value_t = 30.0)]
    day_seconds: f64,
    /// The seed of all chances.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// With the sample, though there is real data.
    #[arg(long)]
    sample: bool,
    /// Where to draw.
    #[arg(long)]
    plot: Option<PathBuf>,
}

fn main() {
    let a = Arguments::parse();
    let report = live(&Options { days: a.days, day: a.day_seconds, seed: a.seed, sample: a.sample });
    println!("{report}");
    if let Some(path) = a.plot {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &report.svg).unwrap();
    }
    assert!(report.growing().is_empty(), "without bound: {:?}", report.growing());
    assert!(report.failures.is_empty(), "publishes failed: {:?}", report.failures);
    println!("nothing grew and no publish failed, with {} as master data", report.data);
}

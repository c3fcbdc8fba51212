//! `tests/proof/run`: explores what power cuts, I/O errors and kills may do to the real binaries, and counts.

use clap::{Args, Parser, Subcommand};
use std::process::ExitCode;
use tillcast_proof::{ioerrors, kills, powercut};

/// Proof by exploration.
#[derive(Debug, Parser)]
struct Line {
    #[command(subcommand)]
    what: What,
}

/// How any of them searches.
#[derive(Debug, Args)]
struct Search {
    /// The seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only these scenes.
    #[arg(long = "scene")]
    scenes: Vec<String>,
    /// Workers at once.
    #[arg(long, default_value_t = 2)]
    workers: usize,
}

#[derive(Debug, Subcommand)]
enum What {
    /// States that a power cut may leave, at every point of what the binaries write.
    Powercut {
        /// Different states to check.
        #[arg(long, default_value_t = 20_000)]
        states: usize,
        #[command(flatten)]
        search: Search,
        /// States that the real binaries are run on.
        #[arg(long, default_value_t = 200)]
        recover: usize,
    },
    /// Errors of each system call, once and for good.
    Ioerrors {
        /// Runs, drawn by the seed; 0: all.
        #[arg(long, default_value_t = 1000)]
        runs: usize,
        #[command(flatten)]
        search: Search,
        /// Only cases that begin like this, as a report names them (`pwrite64:error=EIO:when=7`), with all that they say.
        #[arg(long)]
        only: Option<String>,
    },
    /// SIGKILL at each system call, at two of them one after the other, and at any moment.
    Kills {
        /// Calls to die at, drawn by the seed; 0: all.
        #[arg(long, default_value_t = 500)]
        runs: usize,
        /// Pairs of calls.
        #[arg(long, default_value_t = 500)]
        pairs: usize,
        /// Moments.
        #[arg(long, default_value_t = 500)]
        moments: usize,
        #[command(flatten)]
        search: Search,
    },
}

fn main() -> ExitCode {
    let (violations, shortfall) = match Line::parse().what {
        What::Powercut { states, search: Search { seed, scenes, workers }, recover } => {
            let all = scenes.is_empty();
            let options = powercut::Options { states, seed, scenes, workers, recover, verbose: true, deaf: None };
            let report = powercut::run(&options);
            println!("| scene | calls | prefixes with something not synced | states |\n| --- | --- | --- | --- |");
            for (name, (calls, dirty, states)) in &report.scenes {
                println!("| {name} | {calls} | {dirty} | {states} |");
            }
            println!(
                "\n{} different states of {} drawn (seed {seed}), {} databases opened, {} promises told, {} states recovered by the binaries, {} broken, {:.0} s",
                report.states,
                report.drawn,
                report.opened,
                report.told,
                report.recovered,
                report.violations.len(),
                report.seconds
            );
            (report.violations.len(), report.shortfall(states).filter(|_| all))
        }
        What::Ioerrors { runs, search: Search { seed, scenes, workers }, only } => {
            let all = scenes.is_empty() && only.is_none();
            let options = ioerrors::Options { runs, seed, scenes, workers, verbose: true, only };
            let report = ioerrors::run(&options);
            println!("{report}");
            (report.violations.len(), report.shortfall().filter(|_| all))
        }
        What::Kills { runs, pairs, moments, search: Search { seed, scenes, workers } } => {
            let all = scenes.is_empty();
            let options = kills::Options { runs, pairs, moments, seed, scenes, workers, verbose: true };
            let report = kills::run(&options);
            println!("{report}");
            (report.violations.len(), report.shortfall().filter(|_| all))
        }
    };
    if let Some(why) = &shortfall {
        eprintln!("this proves too little: {why}");
    }
    ExitCode::from(u8::from(violations > 0 || shortfall.is_some()))
}

//! `tests/sim/run`: runs seeds, for as long as it is told.

use clap::Parser;
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tillcast_sim::{Failure, Outcome, run_seed};
use tillcast_tests::process::with_disks;

/// Runs the simulation. Exits with 1 when a seed found something.
#[derive(Debug, Parser)]
struct Options {
    /// One seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Seeds, `A..B`.
    #[arg(long, default_value = "0..200")]
    seeds: String,
    /// Goes on with further seeds for so many hours.
    #[arg(long)]
    hours: Option<f64>,
    /// Runs each seed twice and compares.
    #[arg(long)]
    twice: bool,
    /// Stops after so many finds.
    #[arg(long, default_value_t = 10)]
    finds: usize,
    /// Says everything as it happens.
    #[arg(short, long)]
    verbose: bool,
    /// Where the machines' directories are; best in memory.
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Runs where it may mount small disks already.
    #[arg(long, hide = true)]
    with_disks: bool,
}

#[allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "test code")]
fn main() -> ExitCode {
    let o = Options::parse();
    if !o.with_disks {
        let mut again = with_disks();
        again.arg(std::env::current_exe().unwrap()).args(std::env::args_os().skip(1)).arg("--with-disks");
        panic!("{again:?}: {}", again.exec());
    }
    let memory = PathBuf::from("/dev/shm");
    let below = o.scratch.clone().unwrap_or(if memory.is_dir() { memory } else { std::env::temp_dir() });
    let dir = tempfile::Builder::new().prefix("tillcast-sim-").tempdir_in(below).unwrap();
    let (mut next, mut end) = match o.seed {
        Some(seed) => (seed, seed + 1),
        None => {
            let (a, b) = o.seeds.split_once("..").unwrap_or(("0", &o.seeds));
            (a.parse().unwrap(), b.parse().unwrap())
        }
    };
    let (begun, mut told) = (Instant::now(), Instant::now());
    let until = o.hours.map(|h| begun + Duration::from_secs_f64(h * 3600.0));
    if until.is_some() {
        end = u64::MAX;
    }
    let (mut seeds, mut events, mut checks, mut simulated) = (0u64, 0, 0, 0u64);
    let (mut calmed, mut cycles) = (Vec::new(), Vec::new());
    let mut troubles: BTreeMap<String, u64> = BTreeMap::new();
    let mut finds = Vec::new();
    let summary = |seeds: u64, events: u64, checks: u64, simulated: u64, finds: usize| {
        let took = begun.elapsed().as_secs_f64();
        println!(
            "{seeds} seeds in {took:.0} s ({:.0} ms a seed), {:.1} simulated days ({:.0} times real time), {events} events, {checks} looks, {finds} finds",
            took * 1000.0 / seeds.max(1) as f64,
            simulated as f64 / 86_400_000.0,
            simulated as f64 / 1000.0 / took,
        );
    };
    while next < end && until.is_none_or(|u| Instant::now() < u) && finds.len() < o.finds {
        let seed = next;
        next += 1;
        let mut result = run_seed(seed, dir.path(), o.verbose);
        if o.twice {
            let end = |r: &Result<Outcome, Failure>| r.as_ref().map(|o| o.hash.clone()).map_err(|f| f.what.clone());
            let (first, second) = (end(&result), end(&run_seed(seed, dir.path(), false)));
            if first != second {
                let what = format!("the second run of the seed went another way: {first:?}, then {second:?}");
                result = Err(Failure { seed, what, last: Vec::new() });
            }
        }
        seeds += 1;
        match result {
            Ok(ran) => {
                events += ran.events;
                checks += ran.checks;
                simulated += ran.simulated;
                calmed.extend(ran.calmed);
                cycles.push(ran.cycles);
                ran.troubles.into_iter().for_each(|(kind, n)| *troubles.entry(kind).or_default() += n);
                if o.seed.is_some() {
                    println!("seed {seed}: {} events, hash {}", ran.events, ran.hash);
                }
            }
            Err(f) => {
                println!("\nseed {} found: {}", f.seed, f.what);
                if !o.verbose {
                    f.last.iter().for_each(|line| println!("    {line}"));
                    println!("again: tests/sim/run --seed {} -v\n", f.seed);
                }
                finds.push(f.seed);
            }
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            summary(seeds, events, checks, simulated, finds.len());
        }
    }
    summary(seeds, events, checks, simulated, finds.len());
    for (of, all) in [("after the last trouble, without a publish", calmed), ("of what is published in calm", cycles)] {
        let (n, most) = (all.len(), all.iter().max().copied().unwrap_or(0));
        let average = all.iter().sum::<u64>() as f64 / n.max(1) as f64;
        println!("cycles to convergence {of}: {average:.2} on average, {most} at most, in {n} seeds");
    }
    let all: Vec<String> = troubles.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    println!("troubles: {}", all.join(", "));
    if finds.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

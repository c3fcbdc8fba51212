//! Some hundred seeds in each run of the tests, seeds that once found something, and the same seed twice.
//! `tests/sim/run` goes on from there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tillcast_sim::{Outcome, run_seed};

/// In memory where that can be: a seed syncs a thousand times. All seeds of a process share it, and one in memory is
/// gone with the machine if the process dies.
static SCRATCH: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let below = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("tillcast-sim-").tempdir_in(below).unwrap()
});

#[track_caller]
fn run(seed: u64) -> Outcome {
    run_seed(seed, SCRATCH.path(), false).unwrap_or_else(|f| {
        panic!("seed {}: {}\n{}\nagain: tests/sim/run --seed {} -v", f.seed, f.what, f.last.join("\n"), f.seed)
    })
}

fn run_all(seeds: Range<u64>) {
    let met = seeds.map(|seed| run(seed).troubles.values().sum::<u64>()).sum::<u64>();
    assert!(met > 100, "only {met} troubles were met");
}

#[test]
fn the_first_seeds() {
    run_all(0..75);
}

#[test]
fn the_next_seeds() {
    run_all(75..150);
}

#[test]
fn the_third_seeds() {
    run_all(150..225);
}

#[test]
fn a_seed_goes_the_same_way_each_time() {
    for seed in 300..310 {
        let (one, two) = (run(seed), run(seed));
        assert_eq!((one.hash, one.events), (two.hash, two.events), "seed {seed}");
    }
}

/// Odd seeds that found something and lie beyond the ranges above. (The troubles of a seed change with the simulation:
/// what each found has a test beside the code.)
#[test]
fn seeds_that_found_something() {
    // A pack was given up and gone round while headquarters was out of reach: nobody was told. 54 and 69 too.
    run(1030);
}

#[test]
#[ignore = "an hour of seeds"]
fn an_hour_of_seeds() {
    let begun = Instant::now();
    for seed in 1_000_000.. {
        if begun.elapsed() > Duration::from_secs(3600) {
            println!("{} seeds", seed - 1_000_000);
            return;
        }
        run(seed);
    }
}

//! A sample of the kills that `tests/proof/run kills --runs 0 --pairs 20000 --moments 100000` gives.
#![cfg(unix)]

use tillcast_proof::kills::{Options, run};

fn kill(runs: usize, pairs: usize, moments: usize, seed: u64) {
    let options = Options { runs, pairs, moments, seed, scenes: Vec::new(), workers: 2, verbose: false };
    let report = run(&options);
    println!("{report}");
    assert!(report.violations.is_empty(), "{} kills break a promise, they are above", report.violations.len());
    assert_eq!(report.shortfall(), None, "{report}");
}

#[test]
fn no_kill_at_a_system_call_loses_or_damages_anything() {
    kill(50, 30, 40, 7);
}

#[test]
#[ignore = "five thousand kills take some minutes"]
fn no_kill_of_many_loses_or_damages_anything() {
    kill(0, 1_000, 1_000, 8);
}

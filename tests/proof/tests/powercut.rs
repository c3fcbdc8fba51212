//! A sample of the states that a power cut may leave: some thousands of the million that `tests/proof/run powercut`
//! looks at.
#![cfg(unix)]

use tillcast_proof::powercut::{Options, run};

fn explore(states: usize, seed: u64, recover: usize, scenes: &[&str]) {
    let scenes = scenes.iter().map(|s| (*s).to_owned()).collect();
    let report = run(&Options { states, seed, scenes, workers: 2, recover, verbose: false });
    assert!(report.violations.is_empty(), "{} states break a promise, the first ones are above", report.violations.len());
    assert!(report.states >= states * 9 / 10, "only {} states were found", report.states);
    assert!(report.told > report.scenes.len() && report.recovered > 0, "{report:?}");
}

#[test]
fn no_power_cut_loses_or_damages_anything() {
    explore(6_000, 7, 12, &[]);
}

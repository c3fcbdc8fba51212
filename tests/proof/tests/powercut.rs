//! A sample of the states that a power cut may leave: some thousands of the million that `tests/proof/run powercut`
//! looks at.
#![cfg(unix)]

use tillcast_proof::powercut::{Deaf, Options, run};

fn options(states: usize, seed: u64, recover: usize) -> Options {
    Options { states, seed, scenes: Vec::new(), workers: 2, recover, verbose: false, deaf: None }
}

fn explore(states: usize, seed: u64, recover: usize) {
    let report = run(&options(states, seed, recover));
    assert!(
        report.violations.is_empty(),
        "{} states break a promise, the first ones are above",
        report.violations.len()
    );
    assert_eq!(report.shortfall(states), None);
    assert!(report.told > report.scenes.len() && report.recovered > 0, "{report:?}");
}

#[test]
fn no_power_cut_loses_or_damages_anything() {
    explore(6_000, 7, 12);
}

#[test]
#[ignore = "two hundred thousand states take some minutes"]
fn no_power_cut_of_many_loses_or_damages_anything() {
    explore(200_000, 8, 200);
}

#[test]
fn a_disk_that_does_not_sync_is_found_out() {
    for (deaf, scenes) in [
        (
            Deaf::Files,
            ["publish-delta", "relay-delta", "register-delta", "import", "hq-serves", "hq-refuses", "hq-rotates"]
                .as_slice(),
        ),
        (Deaf::Directories, ["publish-delta", "relay-first", "import", "publish-first", "hq-rotates"].as_slice()),
    ] {
        for scene in scenes {
            let scenes = vec![(*scene).to_owned()];
            let report = run(&Options { scenes, deaf: Some(deaf), ..options(2_000, 3, 0) });
            assert!(!report.violations.is_empty(), "{scene} does not miss its syncs of {deaf:?}");
        }
    }
}

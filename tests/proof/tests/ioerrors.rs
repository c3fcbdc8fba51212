//! A sample of the errors that system calls may return: `tests/proof/run ioerrors --runs 0` takes all of them.
#![cfg(unix)]

use tillcast_proof::ioerrors::{Ending, Options, Report, run};

fn fail(runs: usize, seed: u64, scenes: &[&str], only: Option<&str>) -> Report {
    let scenes = scenes.iter().map(|s| (*s).to_owned()).collect();
    let report = run(&Options { runs, seed, scenes, workers: 2, verbose: false, only: only.map(str::to_owned) });
    assert!(report.violations.is_empty(), "{} runs break a promise, they are above", report.violations.len());
    assert!(report.count(Ending::Failed) > 0, "{report}");
    report
}

#[test]
fn no_error_of_a_system_call_is_silent_or_does_damage() {
    fail(70, 7, &[], None);
}

#[test]
#[ignore = "two thousand runs take some minutes"]
fn no_error_of_many_is_silent_or_does_damage() {
    fail(2_000, 8, &[], None);
}

/// `PRAGMA journal_mode = WAL` answers before its commit: a sync that failed there left the register's database in the
/// mode that loses what was committed.
#[test]
fn a_sync_that_fails_while_a_database_is_made_is_heard() {
    fail(0, 1, &["register-first"], Some("fsync:error=EIO:when="));
}

/// SQLite calls a database malformed when a read of it fails. The shadow was thrown away for it.
#[test]
fn a_read_that_fails_once_costs_no_database() {
    let report = fail(0, 1, &["relay-delta"], Some("pread64:error=EIO:when=1"));
    assert!(report.count(Ending::Warned) > 0, "{report}");
}

/// SQLite ignores a failed sync of the directory that names its WAL: an enrolment was told as done, and a power cut
/// took it back.
#[test]
fn a_sync_of_the_directory_that_fails_is_heard() {
    fail(0, 1, &["enrol-relay"], Some("fsync:error=EIO:when="));
}

/// Who wrote half of a page or of a pack and goes on has written all of it; who cannot go on says so.
#[test]
fn a_write_that_ends_short_is_gone_on_with_or_told() {
    let report = fail(40, 1, &["relay-delta", "register-delta", "publish-delta"], Some("short:when="));
    assert!(report.count(Ending::Absorbed) > 0, "{report}");
}

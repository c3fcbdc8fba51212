//! The cases of TUF's conformance suite, and ours beside them: what a device believes of what a server says. Each drives
//! the client as it ships (`follow`, `trust`, `fetch`, `device.db` on disk) against a headquarters and a server that do
//! as the case says. docs/FAILURES.md has the table of which case is which.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

mod client;
mod repo;

mod basic;
mod download;
mod expiration;
mod graphs;
mod keys;
mod ours;
mod rollback;
mod rotations;

use client::{Client, Outcome, list_refused, trust_refused};
use repo::{Answer, DAY, Repo, Server, key, list_name, publisher, roots, t0, trust_name};

use std::collections::BTreeSet;
use std::path::Path;

/// The test functions of github.com/theupdateframework/tuf-conformance, by their files.
const THEIRS: [(&str, &[&str]); 10] = [
    (
        "basic",
        &[
            "test_basic_refresh_requests",
            "test_basic_refresh_trusted_data",
            "test_implicit_refresh",
            "test_invalid_initial_root",
            "test_unsigned_initial_root",
            "test_unsigned_metadata",
            "test_url_and_metadata_version_mismatch",
            "test_timestamp_content_changes",
            "test_basic_metadata_hash_support",
            "test_targets_hash_mismatch",
            "test_snapshot_hash_mismatch",
            "test_metadata_bytes_match",
            "test_custom_fields",
            "test_deprecated_keyid_hash_algorithms",
            "test_snapshot_404",
            "test_targets_404",
            "test_timestamp_404",
            "test_incorrect_metadata_type",
            "test_faketime",
        ],
    ),
    (
        "expiration",
        &[
            "test_root_expired",
            "test_timestamp_expired",
            "test_snapshot_expired",
            "test_targets_expired",
            "test_expired_local_root",
            "test_expired_local_timestamp",
        ],
    ),
    (
        "file_download",
        &[
            "test_client_downloads_expected_file",
            "test_client_downloads_expected_file_in_sub_dir",
            "test_repository_substitutes_target_file",
            "test_multiple_changes_to_target",
            "test_download_with_hash_algorithms",
            "test_download_with_unknown_hash_algorithm",
            "test_artifact_cache",
        ],
    ),
    (
        "keys",
        &[
            "test_snapshot_does_not_meet_threshold",
            "test_snapshot_has_too_few_keys",
            "test_duplicate_keys",
            "test_duplicate_sig_keyids",
            "test_keytype_and_scheme",
            "test_invalid_sig_in_valid_metadata",
        ],
    ),
    ("quoting_issues", &["test_unusual_role_name"]),
    (
        "repository_simulator",
        &["test_repo_initialzation_unittest", "test_basic_metadata_hash_support_unittest", "test_update_timestamp"],
    ),
    (
        "rollback",
        &[
            "test_new_timestamp_version_rollback",
            "test_snapshot_rollback",
            "test_targets_role_removal",
            "test_targets_fast_forward_recovery",
            "test_new_snapshot_fast_forward_recovery",
            "test_new_timestamp_fast_forward_recovery",
            "test_targets_rollback",
        ],
    ),
    ("static_repositories", &["test_static_repository"]),
    (
        "updater_delegation_graphs",
        &[
            "test_graph_traversal",
            "test_targetfile_search",
            "test_cached_role_is_verified_against_current_delegator",
            "test_delegation_not_in_snapshot",
        ],
    ),
    ("updater_key_rotations", &["test_root_rotation", "test_non_root_rotations"]),
];

/// What stands between backticks in a cell.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_case_of_theirs_has_its_row_and_every_row_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let doc = std::fs::read_to_string(root.join("../docs/FAILURES.md")).unwrap();
    let section = doc.split("\n## ").find(|s| s.starts_with("The cases of TUF's conformance suite")).unwrap();
    let rows: Vec<Vec<&str>> =
        section.lines().filter(|l| l.starts_with("| ") && l.contains('`')).map(|l| l.split('|').collect()).collect();
    let there = THEIRS.iter().flat_map(|(_, cases)| cases.iter().copied());
    let listed: Vec<&str> = rows.iter().flat_map(|r| quoted(r[1])).filter(|c| c.starts_with("test_")).collect();
    assert_eq!(listed.len(), 56, "a case is listed twice, or not at all");
    assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), there.collect());
    let sources: String = std::fs::read_dir(root.join("tests/conformance"))
        .unwrap()
        .map(|e| std::fs::read_to_string(e.unwrap().path()).unwrap())
        .collect();
    for row in &rows {
        let tests: Vec<&str> = quoted(row[3]).collect();
        assert!(!tests.is_empty(), "no test: {row:?}");
        for test in tests {
            assert!(sources.contains(&format!("fn {test}(")), "{test} is not there");
        }
    }
}

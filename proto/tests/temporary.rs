//! Where SQLite sorts: in a process of its own, since that is one place for all of a process.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "test code")]

use proto::replica::sqlite::open_private;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// The directories of SQLite's temporary files that are open now.
fn temporary() -> impl Iterator<Item = PathBuf> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let names = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let of_sqlite = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("etilqs_"));
    names.filter(of_sqlite).map(|p| p.parent().unwrap().to_owned())
}

#[test]
fn an_index_is_sorted_beside_its_database() {
    let dir = tempfile::tempdir().unwrap();
    let db = open_private(&dir.path().join("a.db")).unwrap();
    db.execute_batch(
        "CREATE TABLE t (a TEXT);
         WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)
         INSERT INTO t SELECT hex(i * 7919) || 'the rest of a key that is as long as keys are here' FROM n;",
    )
    .unwrap();
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let at = seen.clone();
    let look = move || {
        at.lock().unwrap().extend(temporary());
        false
    };
    db.progress_handler(50_000, Some(look)).unwrap();
    db.execute_batch("CREATE INDEX ti ON t (a)").unwrap();
    assert_eq!(*seen.lock().unwrap(), BTreeSet::from([dir.path().to_owned()]));
}

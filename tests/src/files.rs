//! What lies in directories and databases, to compare before and after.

use crate::forge;
use rusqlite::types::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Every file below a directory by its relative path, with the SHA-256 of its bytes; empty where there is none.
pub fn tree(dir: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    walk(dir, "", &mut found);
    found
}

fn walk(dir: &Path, prefix: &str, found: &mut BTreeMap<String, String>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), &format!("{name}/"), found);
        } else if let Ok(bytes) = std::fs::read(entry.path()) {
            found.insert(name, forge::sha256(&bytes));
        }
    }
}

/// Copies all that lies in a directory into another, with modes and times.
#[track_caller]
pub fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    let mut cp = std::process::Command::new("cp");
    crate::process::succeed(cp.arg("-a").arg(from.join(".")).arg(to));
}

/// All rows of all tables of a SQLite database, as text.
#[track_caller]
pub fn rows(path: &Path) -> BTreeMap<String, Vec<String>> {
    let db = crate::digest::open_read_only(path);
    let mut names = db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table'").unwrap();
    let names: Vec<String> = names.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    let all = |table: &str| {
        let mut select = db.prepare(&format!("SELECT * FROM \"{table}\"")).unwrap();
        let columns = select.column_count();
        let row = |r: &rusqlite::Row<'_>| (0..columns).map(|i| r.get::<_, Value>(i)).collect::<Result<Vec<_>, _>>();
        let mut rows: Vec<String> = select.query_map([], row).unwrap().map(|r| format!("{:?}", r.unwrap())).collect();
        rows.sort();
        rows
    };
    names.iter().map(|t| (t.clone(), all(t))).collect()
}

/// A program that `sh` runs. A child writes it: a process that another thread starts meanwhile would hold it open for
/// writing, and what somebody writes in is not run (`ETXTBSY`).
pub fn script(path: &Path, text: &str) {
    let write = "{ echo '#!/bin/sh'; cat; } >\"$1\" && chmod 755 \"$1\"";
    let mut sh = Command::new("sh").args(["-c", write, "sh"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
    sh.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(sh.wait().unwrap().success(), "{}", path.display());
}

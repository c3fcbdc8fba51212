//! What 1% of changed rows weighs: our pack, against rsync and xdelta3 on the database file that changed.

use crate::Options;
use crate::apply::next_delta;
use crate::data::{Catalog, DDL, INDEX, Packer, update};
use crate::measure::{Line, Results, Spread, Target};
use rusqlite::Connection;
use std::path::Path;
use std::process::Command;
use tillcast_tests::process::succeed;

/// The pack, `rsync -z`, `xdelta3 -9`.
pub fn bytes(options: &Options, results: &mut Results) {
    let dir = tillcast_tests::temp_dir("bench");
    let mut catalog = Catalog::new(options.rows);
    let mut packer = Packer::new(dir.path());
    packer.full(&catalog);
    // Headquarters' file: an ordinary database, closed, with nothing beside it.
    let (old, new) = (dir.path().join("old.db"), dir.path().join("new.db"));
    let db = Connection::open(&old).unwrap();
    db.execute_batch(DDL).unwrap();
    catalog.fill(&db);
    db.execute_batch(INDEX).unwrap();
    drop(db);
    std::fs::copy(&old, &new).unwrap();

    let (pack, changes) = next_delta(&mut catalog, &mut packer, options.rows / 100);
    update(&Connection::open(&new).unwrap(), &changes);
    let pack = pack.entry.bytes as f64;
    let rsync = rsync(&old, &new);
    let xdelta = xdelta(&old, &new);
    let line = |what: &str, target, peer: f64| Line {
        what: format!("pack of {} changed rows, {what} on the database file", changes.len()),
        target: Target::AtMost(target),
        figure: Spread::of([pack / peer]),
        unit: "×",
        behind: format!("{pack} bytes against {peer} bytes"),
    };
    results.line(line("`rsync -z`", 0.01, rsync));
    results.line(line("`xdelta3 -9`", 1.0, xdelta));
}

/// The bytes that rsync's sender sends to bring an old copy up to date.
fn rsync(old: &Path, new: &Path) -> f64 {
    let there = old.with_file_name("there.db");
    std::fs::copy(old, &there).unwrap();
    let mut rsync = Command::new("rsync");
    let text =
        succeed(rsync.args(["-z", "--no-whole-file", "--ignore-times", "--inplace", "--stats"]).args([new, &there]));
    assert!(std::fs::read(&there).unwrap() == std::fs::read(new).unwrap(), "rsync carries the file over");
    let sent = text.lines().find_map(|l| l.strip_prefix("Total bytes sent: ")).unwrap_or_else(|| panic!("{text}"));
    sent.replace(',', "").trim().parse().unwrap()
}

fn xdelta(old: &Path, new: &Path) -> f64 {
    let out = old.with_file_name("delta.xd3");
    // The window holds the whole file: as good as it gets.
    let window = std::fs::metadata(old).unwrap().len().next_power_of_two().to_string();
    let mut xdelta = Command::new("xdelta3");
    succeed(xdelta.args(["-9", "-f", "-e", "-B", &window, "-s"]).args([old, new, &out]));
    std::fs::metadata(&out).unwrap().len() as f64
}

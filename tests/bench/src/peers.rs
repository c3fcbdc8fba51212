//! Other ways to bring rows or files to a store, where they can be compared: casync's chunks, syncthing's folders, and
//! PostgreSQL's logical replication to a second server.

use crate::Options;
use crate::apply::next_delta;
use crate::data::{Catalog, DDL, INDEX, Packer, update};
use crate::latency::to_the_last;
use crate::measure::{Line, Results, Spread, Target};
use crate::syncthing::Pair;
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tillcast_tests::process::succeed;
use tillcast_tests::{Postgres, files, until};

/// Bytes against casync and syncthing; the way of one change against syncthing and logical replication.
pub fn peers(options: &Options, results: &mut Results) {
    casync(options, results);
    // A tenth of the rows, 1% changed, one register, no delay on the line: from the commit to the last row there.
    let rows = options.rows / 10;
    let ours = to_the_last(rows, rows / 100, 1, 0, options.publishes);
    syncthing(options, results, ours);
    logical_replication(options, results, ours);
}

fn way(rows: u64, peer: &str, ours: Spread, theirs: Spread, but: &str) -> Line {
    Line {
        what: format!("commit to one register, {rows} rows, {} changed, {peer}", rows / 100),
        target: Target::None,
        figure: Spread::of([ours.min / theirs.max, ours.median / theirs.median, ours.max / theirs.min]),
        unit: "×",
        behind: format!("{ours:.0} ms against {theirs:.0} ms ({but})"),
    }
}

/// What casync must fetch to bring an old database file up to date: the chunks that are new, and the index.
fn casync(options: &Options, results: &mut Results) {
    let dir = tillcast_tests::temp_dir("bench");
    let mut catalog = Catalog::new(options.rows);
    let mut packer = Packer::new(dir.path());
    packer.full(&catalog);
    let file = database(dir.path(), &catalog);
    let store = dir.path().join("chunks.castr");
    let make = |index: &Path| {
        succeed(Command::new("casync").arg("make").arg("--store").arg(&store).arg(index).arg(&file));
        std::fs::metadata(index).unwrap().len()
    };
    make(&dir.path().join("old.caibx"));
    let before = size(&store);
    let (pack, changes) = next_delta(&mut catalog, &mut packer, options.rows / 100);
    update(&Connection::open(&file).unwrap(), &changes);
    let index = make(&dir.path().join("new.caibx"));
    let (ours, peer) = (pack.entry.bytes as f64, (size(&store) - before + index) as f64);
    results.line(Line {
        what: format!("pack of {} changed rows, casync on the database file", changes.len()),
        target: Target::None,
        figure: Spread::of([ours / peer]),
        unit: "×",
        behind: format!("{ours} bytes against {peer} bytes of new chunks and index"),
    });
}

/// The items as a database file, for those who carry files.
fn database(dir: &Path, catalog: &Catalog) -> PathBuf {
    let file = dir.join("file.db");
    let db = Connection::open(&file).unwrap();
    db.execute_batch(DDL).unwrap();
    catalog.fill(&db);
    db.execute_batch(INDEX).unwrap();
    file
}

fn size(dir: &Path) -> u64 {
    files::tree(dir).keys().map(|name| std::fs::metadata(dir.join(name)).unwrap().len()).sum()
}

/// From the end of a database file to its arrival, whole, in the other node's folder.
fn syncthing(options: &Options, results: &mut Results, ours: Spread) {
    let rows = options.rows / 10;
    let dir = tillcast_tests::temp_dir("bench");
    let mut catalog = Catalog::new(rows);
    let mut packer = Packer::new(dir.path());
    packer.full(&catalog);
    let file = database(dir.path(), &catalog);
    let pair = Pair::start();
    let carry = |n: usize| {
        let next = pair.from.file(".next");
        std::fs::copy(&file, &next).unwrap();
        let (wanted, before) = (std::fs::read(&next).unwrap(), pair.received());
        let start = Instant::now();
        pair.from.put(&next, "file.db");
        let there = || std::fs::read(pair.to.file("file.db")).is_ok_and(|found| found == wanted);
        until(Duration::from_secs(120), &format!("file {n} arrives"), there);
        (start.elapsed().as_secs_f64() * 1000.0, (pair.received() - before) as f64)
    };
    carry(0);
    let mut packs = Vec::new();
    let runs: Vec<(f64, f64)> = (1..=options.publishes)
        .map(|n| {
            let (pack, changes) = next_delta(&mut catalog, &mut packer, rows / 100);
            packs.push(pack.entry.bytes as f64);
            update(&Connection::open(&file).unwrap(), &changes);
            carry(n)
        })
        .collect();
    let (pack, bytes) = (Spread::of(packs), Spread::of(runs.iter().map(|r| r.1)));
    results.line(Line {
        what: format!("pack of {} changed rows of {rows}, syncthing's bytes for the database file", rows / 100),
        target: Target::None,
        figure: Spread::of([pack.min / bytes.max, pack.median / bytes.median, pack.max / bytes.min]),
        unit: "×",
        behind: format!("{pack:.0} bytes against {bytes:.0} bytes received"),
    });
    let theirs = Spread::of(runs.iter().map(|r| r.0));
    results.line(way(
        rows,
        "syncthing told at once of a whole new file",
        ours,
        theirs,
        "a file: no rows, no transaction, no proof",
    ));
}

fn logical_replication(options: &Options, results: &mut Results, ours: Spread) {
    let rows = options.rows / 10;
    let (source, copy) = (Postgres::start(), Postgres::start());
    let table = "CREATE TABLE item (sku text PRIMARY KEY, name text NOT NULL, cents bigint NOT NULL)";
    source.sql(
        "src",
        &format!("{table}; INSERT INTO item SELECT 'S' || i, 'item number ' || i, i FROM generate_series(1, {rows}) i; CREATE PUBLICATION p FOR TABLE item"),
    );
    copy.sql("src", table);
    // Not in a transaction of its own, so not by `sql`.
    copy.command("src", &format!("CREATE SUBSCRIPTION s CONNECTION '{}' PUBLICATION p", source.url("src")));
    let count = |wanted: &str| copy.sql("src", wanted).trim().parse::<u64>().unwrap_or(0);
    until(Duration::from_secs(120), "the subscriber has all rows", || count("SELECT count(*) FROM item") == rows);
    let runs = (0..options.publishes).map(|n| {
        source.sql(
            "src",
            &format!(
                "UPDATE item SET cents = -{n} - 1 WHERE sku IN (SELECT 'S' || i FROM generate_series(1, {}) i)",
                rows / 100
            ),
        );
        let committed = Instant::now();
        let all = format!("SELECT count(*) FROM item WHERE cents = -{n} - 1");
        until(Duration::from_secs(60), "the subscriber follows", || count(&all) == rows / 100);
        committed.elapsed().as_secs_f64() * 1000.0
    });
    let theirs = Spread::of(runs);
    let but = "a server for a copy, a slot held open for each register, no proof of content";
    results.line(way(rows, "PostgreSQL's logical replication", ours, theirs, but));
}

//! Other ways to bring rows or files to a store, where they can be compared: casync's chunks, and PostgreSQL's logical
//! replication to a second server.

use crate::Options;
use crate::apply::next_delta;
use crate::data::{Catalog, DDL, INDEX, Packer, update};
use crate::latency::to_the_last;
use crate::measure::{Line, Results, Spread, Target};
use rusqlite::Connection;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tillcast_tests::process::succeed;
use tillcast_tests::{Postgres, files, until};

/// Bytes against casync; the way of one change against logical replication.
pub fn peers(options: &Options, results: &mut Results) {
    casync(options, results);
    logical_replication(options, results);
}

/// What casync must fetch to bring an old database file up to date: the chunks that are new, and the index.
fn casync(options: &Options, results: &mut Results) {
    let dir = tillcast_tests::temp_dir("bench");
    let mut catalog = Catalog::new(options.rows);
    let mut packer = Packer::new(dir.path());
    packer.full(&catalog);
    let file = dir.path().join("file.db");
    let db = Connection::open(&file).unwrap();
    db.execute_batch(DDL).unwrap();
    catalog.fill(&db);
    db.execute_batch(INDEX).unwrap();
    drop(db);
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

fn size(dir: &Path) -> u64 {
    files::tree(dir).keys().map(|name| std::fs::metadata(dir.join(name)).unwrap().len()).sum()
}

/// A tenth of the rows, 1% changed, one subscriber, no delay on the line: from the commit to the last row there.
fn logical_replication(options: &Options, results: &mut Results) {
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
    let peer = Spread::of(runs);
    let ours = to_the_last(rows, rows / 100, 1, 0, options.publishes);
    results.line(Line {
        what: format!("commit to one register, {rows} rows, {} changed, PostgreSQL's logical replication", rows / 100),
        target: Target::None,
        figure: Spread::of([ours.min / peer.max, ours.median / peer.median, ours.max / peer.min]),
        unit: "×",
        behind: format!("{ours:.0} ms against {peer:.0} ms (a server for a copy, a slot held open for each register, no proof of content)"),
    });
}

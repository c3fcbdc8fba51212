//! A publish, from the source to the manifest in the bucket, against the barest way to know what changed: read by sqlx,
//! load and compare by rusqlite.

use crate::Options;
use crate::data::{DDL, INDEX, INSERT, update};
use crate::measure::{Line, Results, Target, time_all};
use crate::stage::Stage;
use proto::replica::sqlite::open_private;
use rusqlite::Connection;
use sqlx::ConnectOptions as _;
use sqlx::Row as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use std::cmp::Ordering;
use std::path::Path;

/// The first full, and deltas of 1%.
pub fn publish(options: &Options, results: &mut Results) {
    let mut stage = Stage::new(options.rows, 1, |b| b);
    let published = stage.site.dir().join("bare-published.db");
    let copy = open_private(&published).unwrap();
    copy.execute_batch(&format!("{DDL} {INDEX}")).unwrap();

    let first = stage.publish(&[]);
    let (rows, bare_first) = time_all(|| bare(&stage.source_path(), &copy, &published));
    assert_eq!(rows, options.rows);
    stage.catalog.fill(&copy);

    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..options.runs.max(5) {
        let changes = stage.change(options.rows / 100);
        ours.push(stage.publish(&[]));
        let (rows, took) = time_all(|| bare(&stage.source_path(), &copy, &published));
        assert_eq!(rows, changes.len() as u64, "the bare loop finds the same changes");
        peer.push(took);
        update(&copy, &changes);
    }
    let rows = options.rows;
    results.line(Line::ratio(
        &format!("publish {rows} rows, 1% changed, bare read + load + diff"),
        Target::AtMost(3.0),
        &ours,
        &peer,
    ));
    results.line(Line::ratio(
        &format!("first publish (a full) of {rows} rows, the same peer"),
        Target::None,
        &[first],
        &[bare_first],
    ));
}

/// Reads all rows, loads them into a scratch file, and counts those that differ from what was published.
fn bare(source: &Path, published: &Connection, beside: &Path) -> u64 {
    let scratch_path = beside.with_file_name("bare-scratch.db");
    let _ = std::fs::remove_file(&scratch_path);
    let scratch = Connection::open(&scratch_path).unwrap();
    scratch
        .execute_batch(&format!(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -49152; BEGIN; {DDL}"
        ))
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(load(source, &scratch));
    differences(&scratch, published)
}

async fn load(source: &Path, scratch: &Connection) {
    use futures_util::TryStreamExt as _;
    let options = SqliteConnectOptions::new().filename(source).read_only(true);
    let mut db = options.connect().await.unwrap();
    let mut insert = scratch.prepare(INSERT).unwrap();
    let sql = format!("SELECT {} FROM item", crate::data::COLUMNS);
    let mut rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch(&mut db);
    while let Some(r) = rows.try_next().await.unwrap() {
        let text = |i| -> &str { r.get_unchecked(i) };
        let int = |r: &SqliteRow, i: usize| -> i64 { r.get_unchecked(i) };
        insert
            .execute(rusqlite::params![
                text(0),
                text(1),
                text(2),
                r.get_unchecked::<Option<&str>, _>(3),
                int(&r, 4),
                int(&r, 5),
                text(6),
                r.get_unchecked::<Option<f64>, _>(7),
                int(&r, 8),
                int(&r, 9),
                int(&r, 10),
                text(11)
            ])
            .unwrap();
    }
}

/// A merge of two scans in the order of the keys.
fn differences(new: &Connection, old: &Connection) -> u64 {
    let sql = format!("SELECT {} FROM item ORDER BY sku", crate::data::COLUMNS);
    let (mut new, mut old) = (new.prepare(&sql).unwrap(), old.prepare(&sql).unwrap());
    let (mut new, mut old) = (new.query([]).unwrap(), old.query([]).unwrap());
    let (mut n, mut o) = (new.next().unwrap(), old.next().unwrap());
    let mut count = 0;
    loop {
        let order = match (n, o) {
            (None, None) => return count,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(n), Some(o)) => {
                let order = n.get_ref_unwrap(0).as_str().unwrap().cmp(o.get_ref_unwrap(0).as_str().unwrap());
                let same = order == Ordering::Equal && (1..12).all(|i| n.get_ref_unwrap(i) == o.get_ref_unwrap(i));
                count += u64::from(order != Ordering::Equal || !same);
                order
            }
        };
        if n.is_none() != o.is_none() {
            count += 1;
        }
        if order != Ordering::Greater {
            n = new.next().unwrap();
        }
        if order != Ordering::Less {
            o = old.next().unwrap();
        }
    }
}

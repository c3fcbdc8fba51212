//! A register applies packs: against the `sqlite3` program reading SQL, and against the barest loop of rusqlite.

use crate::Options;
use crate::data::{COLUMNS, Catalog, Change, DDL, INDEX, INSERT, Pack, Packer, instance, now, update};
use crate::measure::{Line, Results, Target, Took, time, time_all};
use flate2::bufread::GzDecoder;
use proto::limits::Limits;
use proto::replica::sqlite::{Checkpoint, checkpoint, open_private};
use proto::replica::{Job, Replica};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// A full: gunzip to commit, into an empty file.
pub fn full(options: &Options, results: &mut Results) {
    let dir = tillcast_tests::temp_dir("bench");
    let catalog = Catalog::new(options.rows);
    let pack = Packer::new(dir.path()).full(&catalog);
    let script = dir.path().join("rows.sql");
    write_script(&catalog, &script);

    let (mut ours, mut bare, mut cli) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..options.runs {
        let file = |name: &str| dir.path().join(format!("{name}-{run}.db"));
        ours.push(apply_full(&pack, &file("ours")));
        bare.push(bare_full(&pack, &file("bare")));
        cli.push(read_script(&script, &file("cli")));
        for name in ["ours", "bare", "cli"] {
            drop_database(&file(name));
        }
    }
    let rows = options.rows;
    results.line(Line::ratio(&format!("full of {rows} rows, `sqlite3` reads SQL"), Target::AtMost(0.25), &ours, &cli));
    results.line(Line::ratio(&format!("full of {rows} rows, bare rusqlite loop"), Target::AtMost(1.3), &ours, &bare));
}

/// A delta of 1%, durable; the checkpoint is not counted on either side.
pub fn delta(options: &Options, results: &mut Results) {
    let dir = tillcast_tests::temp_dir("bench");
    let mut catalog = Catalog::new(options.rows);
    let mut packer = Packer::new(dir.path());
    let full = packer.full(&catalog);
    let (ours_path, bare_path) = (dir.path().join("ours.db"), dir.path().join("bare.db"));
    apply(&mut open(&ours_path), &full);
    let db = open_private(&bare_path).unwrap();
    db.execute_batch(DDL).unwrap();
    catalog.fill(&db);
    db.execute_batch(INDEX).unwrap();
    checkpoint(&db, Checkpoint::Truncate).unwrap();
    drop(db);
    open(&ours_path).checkpoint(Checkpoint::Truncate).unwrap();

    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..options.runs * 4 {
        let (pack, changes) = next_delta(&mut catalog, &mut packer, options.rows / 100);
        // One connection at a time: this build of SQLite shares one pool of pages between all of a process, and the
        // one that was there first starves the other.
        let mut replica = open(&ours_path);
        ours.push(time_all(|| apply(&mut replica, &pack)).1);
        replica.checkpoint(Checkpoint::Truncate).unwrap();
        drop(replica);
        let db = open_private(&bare_path).unwrap();
        bare.push(time_all(|| update(&db, &changes)).1);
        checkpoint(&db, Checkpoint::Truncate).unwrap();
    }
    let what = format!("delta of {} changed rows, bare rusqlite loop over rows in memory", options.rows / 100);
    results.line(Line::ratio(&what, Target::AtMost(1.6), &ours, &bare));
}

/// Changes the catalog and packs that.
pub fn next_delta(catalog: &mut Catalog, packer: &mut Packer, rows: u64) -> (Pack, Vec<Change>) {
    // The rows as they were: made from a twin, since a change overwrites them.
    let before = catalog.clone();
    let changes = catalog.change(rows);
    let old: Vec<_> = changes.iter().map(|c| before.item(c.row)).collect();
    (packer.delta(&old, &changes), changes)
}

/// Applies one pack up to its durable commit, without the checkpoint that follows in an agent.
fn apply(replica: &mut Replica, pack: &Pack) {
    let job = Job { instance: &instance(), epoch: 1, packs: &[pack.file()], now: now(), prove: false, listed: None };
    replica.apply_uncommitted(&job).unwrap();
    replica.commit().unwrap();
}

fn open(path: &Path) -> Replica {
    Replica::open(path, &Limits::default()).unwrap()
}

fn apply_full(pack: &Pack, path: &Path) -> Took {
    let mut replica = open(path);
    time_all(|| apply(&mut replica, pack)).1
}

/// A row as a program that knows the table would read it.
type Row<'a> =
    (Text<'a>, Text<'a>, Text<'a>, Option<Text<'a>>, i64, i64, Text<'a>, Option<f64>, i64, i64, i64, Text<'a>);

/// Borrowed where it has no escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl rusqlite::ToSql for Text<'_> {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

/// Gunzip, parse, a prepared insert, the index afterwards, one durable transaction: and nothing else.
fn bare_full(pack: &Pack, path: &Path) -> Took {
    let db = open_private(path).unwrap();
    let load = || {
        let mut lines = BufReader::with_capacity(
            64 << 10,
            GzDecoder::new(BufReader::with_capacity(64 << 10, File::open(&pack.path).unwrap())),
        );
        db.execute_batch(&format!("BEGIN IMMEDIATE; {DDL}")).unwrap();
        let mut insert = db.prepare(INSERT).unwrap();
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).unwrap() > 0 {
            if line[0] == b'[' {
                let r: Row<'_> = serde_json::from_slice(&line).unwrap();
                let values: [&dyn rusqlite::ToSql; 12] =
                    [&r.0, &r.1, &r.2, &r.3, &r.4, &r.5, &r.6, &r.7, &r.8, &r.9, &r.10, &r.11];
                insert.execute(values).unwrap();
            }
            line.clear();
        }
        db.execute_batch(&format!("{INDEX} COMMIT")).unwrap();
    };
    time_all(load).1
}

/// The rows as `sqlite3 .dump` writes them: an INSERT a row, one transaction, the index last.
fn write_script(catalog: &Catalog, path: &Path) {
    use proto::value::Value;
    let mut out = BufWriter::new(File::create(path).unwrap());
    writeln!(out, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;").unwrap();
    writeln!(out, ".dbconfig no_ckpt_on_close on\nBEGIN;\n{DDL}").unwrap();
    for i in 0..catalog.rows() {
        let fields = catalog.item(i).map(|v| match v {
            Value::Null => "NULL".to_owned(),
            Value::Int(n) => n.to_string(),
            Value::Real(r) => format!("{r:?}"),
            Value::Text(t) => format!("'{}'", t.replace('\'', "''")),
            Value::Blob(_) => unreachable!("items have no blobs"),
        });
        writeln!(out, "INSERT INTO item VALUES({});", fields.join(",")).unwrap();
    }
    writeln!(out, "{INDEX}COMMIT;").unwrap();
    out.flush().unwrap();
}

fn read_script(script: &Path, path: &Path) -> Took {
    let mut sqlite3 = Command::new("sqlite3");
    sqlite3.arg(path).stdin(File::open(script).unwrap()).stdout(Stdio::null());
    let (status, took) = time(|| sqlite3.status().unwrap());
    assert!(status.success(), "sqlite3 reads the script: {status}");
    let db = rusqlite::Connection::open(path).unwrap();
    let last: String =
        db.query_row(&format!("SELECT {COLUMNS} FROM item ORDER BY sku DESC LIMIT 1"), [], |r| r.get(0)).unwrap();
    assert!(!last.is_empty());
    took
}

fn drop_database(path: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
    }
}

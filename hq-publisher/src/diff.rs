//! What changed between the published rows and the new ones: a merge of two scans in key order.
//!
//! Compares stored values by their bytes (a type or a letter's case is a change), never by text.
//! Memory does not grow with the tables: rows of a delta are spooled to a scratch file. Power may
//! go at any time: nothing here is needed again.

use crate::scratch::order;
use proto::digest::{RowHasher, StateDigest};
use proto::ids::{ColumnName, TableName};
use proto::pack::{Op, PackWriter, RowCounts};
use proto::schema::Table;
use proto::value::{Value, write_row};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row};
use serde::Serialize;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Sets of changed columns told apart in one table; rows beyond them carry all columns.
const COLUMN_SETS: usize = 64;

/// Bytes of a section kept in memory.
const CHUNK: usize = 64 << 10;

/// Comparing failed: the disk, never a row.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// Reading rows. A damaged replica shows here.
    #[error("comparing table {table}: {source}")]
    Sqlite {
        /// The table.
        table: TableName,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The spool.
    #[error("the spool {path}: {source}")]
    Spool {
        /// Its file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What happened to one table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TableChange {
    /// Rows published before.
    pub before: u64,
    /// Rows now.
    pub after: u64,
    /// Keys that are gone.
    pub gone: u64,
    /// Rows in the delta by operation (a row whose UNIQUE column changes is a delete and an insert).
    pub rows: RowCounts,
}

/// What happened to all tables of an instance.
#[derive(Debug, Default)]
pub struct Diff {
    /// By table.
    pub tables: BTreeMap<TableName, TableChange>,
    /// The state digests of the new rows.
    pub digests: BTreeMap<TableName, StateDigest>,
}

impl Diff {
    /// Whether any row differs.
    pub fn is_empty(&self) -> bool {
        self.tables.values().all(|t| t.rows.total() == 0)
    }
}

/// The rows of a delta on their way, by section.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    file: Option<File>,
    end: u64,
    sections: Vec<Section>,
}

#[derive(Debug)]
struct Section {
    table: TableName,
    op: Op,
    columns: Vec<ColumnName>,
    buffer: Vec<u8>,
    /// Where its rows lie in the file: offset and length.
    chunks: Vec<(u64, usize)>,
}

impl Drop for Spool {
    fn drop(&mut self) {
        if self.file.take().is_some()
            && let Err(e) = proto::shelf::remove(&self.path)
        {
            tracing::debug!(path = %self.path.display(), error = %e, "a spool stays for now");
        }
    }
}

impl Spool {
    /// An empty spool; its file is made when it is needed.
    pub fn new(path: &Path) -> Self {
        Spool { path: path.to_owned(), file: None, end: 0, sections: Vec::new() }
    }

    fn section(&mut self, table: &Table, op: Op, columns: impl Iterator<Item = usize>) -> usize {
        let columns = columns.map(|c| table.columns[c].name.clone()).collect();
        self.sections.push(Section { table: table.name.clone(), op, columns, buffer: Vec::new(), chunks: Vec::new() });
        self.sections.len() - 1
    }

    fn row(&mut self, section: usize, row: &[Value<'_>]) -> io::Result<()> {
        let s = &mut self.sections[section];
        write_row(row, &mut s.buffer)?;
        if s.buffer.len() < CHUNK {
            return Ok(());
        }
        if self.file.is_none() {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&self.path)?;
            self.file = Some(file);
        }
        if let Some(file) = &mut self.file {
            file.write_all(&s.buffer)?;
        }
        s.chunks.push((self.end, s.buffer.len()));
        self.end += s.buffer.len() as u64;
        s.buffer.clear();
        Ok(())
    }

    /// Writes the sections into a pack: deletes of all tables, then updates, then inserts.
    pub fn write<W: Write>(&mut self, pack: &mut PackWriter<W>) -> io::Result<()> {
        let mut chunk = Vec::new();
        for op in [Op::Delete, Op::Update, Op::Insert] {
            for s in self.sections.iter().filter(|s| s.op == op && !(s.buffer.is_empty() && s.chunks.is_empty())) {
                pack.section(&s.table, op, &s.columns)?;
                for (at, length) in &s.chunks {
                    let Some(file) = &mut self.file else { continue };
                    chunk.resize(*length, 0);
                    file.seek(SeekFrom::Start(*at))?;
                    file.read_exact(&mut chunk)?;
                    raw_rows(pack, &chunk)?;
                }
                raw_rows(pack, &s.buffer)?;
            }
        }
        Ok(())
    }
}

fn raw_rows<W: Write>(pack: &mut PackWriter<W>, lines: &[u8]) -> io::Result<()> {
    lines.split_inclusive(|b| *b == b'\n').try_for_each(|line| pack.raw_row(line))
}

/// Compares one table. `old` holds it under the same contract (migrated, if need be); `None`: it
/// was not there.
pub fn compare(
    old: Option<&Connection>,
    new: &Connection,
    table: &Table,
    spool: &mut Spool,
    diff: &mut Diff,
) -> Result<(), DiffError> {
    let mut merge = Merge::new(table, spool);
    merge.run(old, new).map_err(|e| match e {
        MergeError::Sqlite(source) => DiffError::Sqlite { table: table.name.clone(), source },
        MergeError::Spool(source) => DiffError::Spool { path: merge.spool.path.display().to_string(), source },
    })?;
    let (change, digest) = (std::mem::take(&mut merge.change), merge.digest);
    diff.tables.insert(table.name.clone(), change);
    diff.digests.insert(table.name.clone(), digest);
    Ok(())
}

enum MergeError {
    Sqlite(rusqlite::Error),
    Spool(io::Error),
}
impl From<rusqlite::Error> for MergeError {
    fn from(e: rusqlite::Error) -> Self {
        MergeError::Sqlite(e)
    }
}
impl From<io::Error> for MergeError {
    fn from(e: io::Error) -> Self {
        MergeError::Spool(e)
    }
}

/// A scan of all columns in key order.
fn scan(table: &Table) -> String {
    format!("SELECT {} FROM {} ORDER BY {}", table.column_list(), table.quoted(), table.key_list())
}

struct Merge<'a> {
    table: &'a Table,
    spool: &'a mut Spool,
    hasher: RowHasher,
    change: TableChange,
    digest: StateDigest,
    deletes: Option<usize>,
    inserts: Option<usize>,
    updates: BTreeMap<Vec<usize>, usize>,
    /// The update section of all columns.
    whole: Option<usize>,
}

impl<'a> Merge<'a> {
    fn new(table: &'a Table, spool: &'a mut Spool) -> Self {
        Merge {
            table,
            spool,
            hasher: RowHasher::default(),
            change: TableChange::default(),
            digest: StateDigest::default(),
            deletes: None,
            inserts: None,
            updates: BTreeMap::new(),
            whole: None,
        }
    }

    fn run(&mut self, old: Option<&Connection>, new: &Connection) -> Result<(), MergeError> {
        let sql = scan(self.table);
        let mut old = old.map(|db| db.prepare(&sql)).transpose()?;
        let mut new = new.prepare(&sql)?;
        let mut olds = old.as_mut().map(|s| s.query([])).transpose()?;
        let mut news = new.query([])?;
        let mut b = news.next()?;
        let Some(olds) = olds.as_mut() else {
            while let Some(row) = b {
                self.inserted(row)?;
                b = news.next()?;
            }
            return Ok(());
        };
        let mut a = olds.next()?;
        loop {
            let which = match (a, b) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(a), Some(b)) => self.order(a, b)?,
            };
            if let Some(a) = a.filter(|_| which != Ordering::Greater) {
                self.change.before += 1;
                match b.filter(|_| which == Ordering::Equal) {
                    Some(b) => self.both(a, b)?,
                    None => self.deleted(a)?,
                }
            }
            if let Some(b) = b.filter(|_| which == Ordering::Greater) {
                self.inserted(b)?;
            }
            if which != Ordering::Greater {
                a = olds.next()?;
            }
            if which != Ordering::Less {
                b = news.next()?;
            }
        }
    }

    fn order(&self, a: &Row<'_>, b: &Row<'_>) -> rusqlite::Result<Ordering> {
        for k in &self.table.key {
            let o = order(a.get_ref(*k)?, b.get_ref(*k)?);
            if o != Ordering::Equal {
                return Ok(o);
            }
        }
        Ok(Ordering::Equal)
    }

    /// Counts a new row into the digest; gives its values.
    fn count<'r>(&mut self, row: &'r Row<'_>) -> rusqlite::Result<Vec<Value<'r>>> {
        let values = values(row, 0..self.table.columns.len())?;
        self.digest.add(self.hasher.hash(&values));
        self.change.after += 1;
        Ok(values)
    }

    fn both(&mut self, a: &Row<'_>, b: &Row<'_>) -> Result<(), MergeError> {
        let values = self.count(b)?;
        let mut changed: Vec<usize> = Vec::new();
        for (i, new) in values.iter().enumerate() {
            if !same(a.get_ref(i)?, new) {
                changed.push(i);
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        // Two rows may swap a UNIQUE value: only deletes before inserts can do that.
        if changed.iter().any(|c| self.table.unique.contains(c)) {
            self.delete(a)?;
            return self.insert(&values);
        }
        let section = self.update_section(changed.clone());
        let columns = if Some(section) == self.whole { self.data_columns() } else { changed };
        let row: Vec<Value<'_>> = self.table.key.iter().chain(&columns).map(|c| values[*c].clone()).collect();
        self.change.rows.count(Op::Update);
        Ok(self.spool.row(section, &row)?)
    }

    /// All columns but the key's.
    fn data_columns(&self) -> Vec<usize> {
        (0..self.table.columns.len()).filter(|c| !self.table.key.contains(c)).collect()
    }

    fn update_section(&mut self, changed: Vec<usize>) -> usize {
        if let Some(section) = self.updates.get(&changed) {
            return *section;
        }
        let table = self.table;
        let key = table.key.iter().copied();
        if self.updates.len() < COLUMN_SETS {
            let section = self.spool.section(table, Op::Update, key.chain(changed.iter().copied()));
            self.updates.insert(changed, section);
            return section;
        }
        if let Some(section) = self.whole {
            return section;
        }
        let all = self.data_columns();
        let section = self.spool.section(table, Op::Update, key.chain(all));
        self.whole = Some(section);
        section
    }

    fn deleted(&mut self, a: &Row<'_>) -> Result<(), MergeError> {
        self.change.gone += 1;
        self.delete(a)
    }

    fn delete(&mut self, a: &Row<'_>) -> Result<(), MergeError> {
        let table = self.table;
        let section = match self.deletes {
            Some(section) => section,
            None => *self.deletes.insert(self.spool.section(table, Op::Delete, table.key.iter().copied())),
        };
        self.change.rows.count(Op::Delete);
        Ok(self.spool.row(section, &values(a, table.key.iter().copied())?)?)
    }

    fn inserted(&mut self, b: &Row<'_>) -> Result<(), MergeError> {
        let values = self.count(b)?;
        self.insert(&values)
    }

    fn insert(&mut self, values: &[Value<'_>]) -> Result<(), MergeError> {
        let table = self.table;
        let section = match self.inserts {
            Some(section) => section,
            None => *self.inserts.insert(self.spool.section(table, Op::Insert, 0..table.columns.len())),
        };
        self.change.rows.count(Op::Insert);
        Ok(self.spool.row(section, values)?)
    }
}

/// Whether a published value is the new one to the byte; a change of type is a change.
fn same(old: ValueRef<'_>, new: &Value<'_>) -> bool {
    match (old, new) {
        (ValueRef::Null, Value::Null) => true,
        (ValueRef::Integer(a), Value::Int(b)) => a == *b,
        (ValueRef::Real(a), Value::Real(b)) => a.to_bits() == b.to_bits(),
        (ValueRef::Text(a), Value::Text(b)) => a == b.as_bytes(),
        (ValueRef::Blob(a), Value::Blob(b)) => a == b.as_ref(),
        _ => false,
    }
}

/// Values of a row, borrowed from it.
fn values<'r>(row: &'r Row<'_>, columns: impl ExactSizeIterator<Item = usize>) -> rusqlite::Result<Vec<Value<'r>>> {
    let mut out = Vec::with_capacity(columns.len());
    for c in columns {
        out.push(Value::from(row.get_ref(c)?));
    }
    Ok(out)
}

/// Writes all rows of a table into a full pack, in key order; their count and digest.
pub fn write_all<W: Write>(
    db: &Connection,
    table: &Table,
    pack: &mut PackWriter<W>,
) -> Result<(u64, StateDigest), DiffError> {
    let failed = |source| DiffError::Sqlite { table: table.name.clone(), source };
    let spool = |source| DiffError::Spool { path: "of the pack".into(), source };
    let columns: Vec<ColumnName> = table.columns.iter().map(|c| c.name.clone()).collect();
    let mut statement = db.prepare(&scan(table)).map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    let (mut count, mut digest, mut hasher) = (0, StateDigest::default(), RowHasher::default());
    while let Some(row) = rows.next().map_err(failed)? {
        if count == 0 {
            pack.section(&table.name, Op::Insert, &columns).map_err(spool)?;
        }
        let values = values(row, 0..columns.len()).map_err(failed)?;
        digest.add(hasher.hash(&values));
        pack.row(&values).map_err(spool)?;
        count += 1;
    }
    Ok((count, digest))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "test files")]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use crate::source::{Faults, RowSink};
    use proptest::prelude::*;
    use proto::ids::{Instance, Version};
    use proto::layout::PackKind;
    use proto::limits::Limits;
    use proto::manifest::PackEntry;
    use proto::pack::{FORMAT, Header, SchemaPart, table_heads};
    use proto::replica::{Job, PackFile, Replica};
    use proto::schema::Contract;
    use proto::value::OwnedValue;

    const DDL: &str = "
        CREATE TABLE item (sku TEXT NOT NULL PRIMARY KEY, plu INTEGER UNIQUE, name TEXT, cents INTEGER, weight REAL, pic BLOB) STRICT;
        CREATE TABLE link (a INTEGER NOT NULL, b TEXT NOT NULL, n INTEGER, PRIMARY KEY (a, b)) STRICT, WITHOUT ROWID;
        CREATE INDEX item_name ON item (name);";

    type Rows = BTreeMap<Vec<u8>, Vec<OwnedValue>>;

    struct Bench {
        dir: tempfile::TempDir,
        contract: Contract,
        instance: Instance,
    }

    impl Bench {
        fn new(ddl: &str) -> Self {
            let contract = Contract::parse(ddl, &Limits::default()).unwrap();
            Bench { dir: tempfile::tempdir().unwrap(), contract, instance: "catalog@all".parse().unwrap() }
        }
        fn scratch(&self, tables: &[(&str, &Rows)]) -> Scratch {
            let scratch = Scratch::create(&self.dir.path().join("scratch.db"), &self.contract).unwrap();
            let mut faults = Faults::telling(5);
            for (name, rows) in tables {
                let table = self.contract.table(&name.parse().unwrap()).unwrap();
                let mut loader = scratch.loader(table, &Limits::default(), &mut faults).unwrap();
                rows.values().for_each(|r| loader.row(r, None).unwrap());
            }
            assert!(faults.is_empty(), "{faults:?}");
            scratch.finish().unwrap();
            scratch
        }
        fn pack(
            &self,
            version: u64,
            base: Option<u64>,
            body: impl FnOnce(&mut PackWriter<File>) -> BTreeMap<TableName, StateDigest>,
        ) -> (PackEntry, PathBuf) {
            let v = |n: u64| Version::try_from(n).unwrap();
            let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
            let header = Header {
                format: FORMAT,
                stream: self.instance.stream.clone(),
                audience: self.instance.audience.clone(),
                version: v(version),
                base: base.map(v),
                kind,
                schema: SchemaPart {
                    number: 1,
                    ddl: self.contract.ddl.clone(),
                    sha256: self.contract.sha256,
                    migrate: vec![],
                },
                created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
                source: "test".into(),
                tables: table_heads(&self.contract),
            };
            let path = self.dir.path().join(format!("{version}.{kind}.pack"));
            let mut w = PackWriter::new(File::create(&path).unwrap(), &header, 6).unwrap();
            let digests = body(&mut w);
            let (_, written) = w.finish(&digests).unwrap();
            let entry = PackEntry {
                version: v(version),
                kind,
                base: base.map(v),
                bytes: written.bytes,
                unpacked: written.unpacked,
                sha256: written.sha256,
            };
            (entry, path)
        }
        fn full(&self, version: u64, scratch: &Scratch) -> (PackEntry, PathBuf) {
            self.pack(version, None, |w| {
                let all = |t: &Table| (t.name.clone(), write_all(scratch.connection(), t, w).unwrap().1);
                self.contract.tables.iter().map(all).collect()
            })
        }
        fn delta(&self, version: u64, base: u64, old: &Replica, new: &Scratch) -> ((PackEntry, PathBuf), Diff) {
            let mut diff = Diff::default();
            let mut spool = Spool::new(&self.dir.path().join("spool"));
            for t in &self.contract.tables {
                compare(Some(old.connection()), new.connection(), t, &mut spool, &mut diff).unwrap();
            }
            let pack = self.pack(version, Some(base), |w| {
                spool.write(w).unwrap();
                diff.digests.clone()
            });
            (pack, diff)
        }
        fn apply(&self, replica: &mut Replica, pack: &(PackEntry, PathBuf)) -> BTreeMap<TableName, StateDigest> {
            let packs = [PackFile { path: &pack.1, entry: &pack.0 }];
            let now = "2026-01-01T00:00:00Z".parse().unwrap();
            replica
                .apply(&Job { instance: &self.instance, epoch: 1, packs: &packs, now, prove: false, listed: None })
                .unwrap();
            let checks = replica.verify(&self.instance.stream).unwrap();
            assert!(checks.iter().all(proto::replica::TableCheck::is_right), "{checks:?}");
            replica.held(&self.instance.stream).unwrap().unwrap().digests
        }
        fn replica(&self, name: &str) -> Replica {
            Replica::open(&self.dir.path().join(name), &Limits::default()).unwrap()
        }
    }

    fn text() -> impl Strategy<Value = OwnedValue> {
        prop_oneof![Just("a"), Just("A"), Just("1"), Just("ä\"\n\\"), Just("")].prop_map(|t| Value::Text(t.into()))
    }
    fn or_null(s: impl Strategy<Value = OwnedValue>) -> impl Strategy<Value = OwnedValue> {
        prop_oneof![1 => Just(Value::Null), 4 => s]
    }

    prop_compose! {
        fn item()(key in 0u8..12, plu in proptest::option::of(0i64..8), name in or_null(text()), cents in or_null((0i64..3).prop_map(Value::Int)),
            weight in or_null(prop_oneof![Just(0.0), Just(1.5), Just(1e300)].prop_map(Value::Real)), pic in or_null(proptest::collection::vec(any::<u8>(), 0..3).prop_map(|b| Value::Blob(b.into())))
        ) -> Vec<OwnedValue> {
            // Keys whose order by bytes differs from that by number or letter.
            let sku = ["1", "10", "2", "A", "a", "aa", "b", "Z", "ä", "é", "~", "_"][key as usize];
            vec![Value::Text(sku.into()), plu.map_or(Value::Null, Value::Int), name, cents, weight, pic]
        }
    }
    prop_compose! {
        fn link()(a in -2i64..3, b in text(), n in or_null((0i64..2).prop_map(Value::Int))) -> Vec<OwnedValue> { vec![Value::Int(a), b, n] }
    }

    /// Rows by key; a second row with a PLU that is taken gets none.
    fn by_key(rows: Vec<Vec<OwnedValue>>, key: usize, unique: Option<usize>) -> Rows {
        let mut out = Rows::new();
        for mut row in rows {
            let mut k = Vec::new();
            row[..key].iter().for_each(|v| v.canonical(&mut k));
            if let Some(u) = unique
                && row[u] != Value::Null
                && out.iter().any(|(other, r)| *other != k && r[u] == row[u])
            {
                row[u] = Value::Null;
            }
            out.insert(k, row);
        }
        out
    }

    prop_compose! {
        fn content()(items in proptest::collection::vec(item(), 0..14), links in proptest::collection::vec(link(), 0..8)) -> (Rows, Rows) {
            (by_key(items, 1, Some(1)), by_key(links, 2, None))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
        /// Whatever changed, the delta leads a second replica to what a full of the new rows gives.
        #[test]
        fn a_delta_leads_where_a_full_leads(before in content(), after in content()) {
            let bench = Bench::new(DDL);
            let first = bench.full(1, &bench.scratch(&[("item", &before.0), ("link", &before.1)]));
            let mut hq = bench.replica("hq.db");
            let mut register = bench.replica("register.db");
            bench.apply(&mut hq, &first);
            bench.apply(&mut register, &first);
            let new = bench.scratch(&[("item", &after.0), ("link", &after.1)]);
            let (delta, diff) = bench.delta(2, 1, &hq, &new);
            let full = bench.full(2, &new);
            prop_assert_eq!(diff.is_empty(), before == after);
            let by_delta = bench.apply(&mut register, &delta);
            prop_assert_eq!(&by_delta, &diff.digests);
            prop_assert_eq!(by_delta, bench.apply(&mut bench.replica("fresh.db"), &full));
        }
    }

    fn rows(list: &[(&str, i64, i64)]) -> Rows {
        by_key(
            list.iter()
                .map(|(sku, plu, cents)| {
                    vec![
                        Value::Text((*sku).to_owned().into()),
                        Value::Int(*plu),
                        Value::Null,
                        Value::Int(*cents),
                        Value::Null,
                        Value::Null,
                    ]
                })
                .collect(),
            1,
            None,
        )
    }

    #[test]
    fn only_changed_columns_travel_and_unique_values_may_swap() {
        let bench = Bench::new(DDL);
        let old = rows(&[("a", 1, 10), ("b", 2, 20), ("c", 3, 30), ("d", 4, 40)]);
        let mut hq = bench.replica("hq.db");
        bench.apply(&mut hq, &bench.full(1, &bench.scratch(&[("item", &old)])));
        let new = rows(&[("a", 2, 10), ("b", 1, 20), ("c", 3, 31), ("e", 5, 50)]);
        let (delta, diff) = bench.delta(2, 1, &hq, &bench.scratch(&[("item", &new)]));
        let item = &diff.tables[&"item".parse::<TableName>().unwrap()];
        assert_eq!(item.rows, RowCounts { delete: 3, update: 1, insert: 3 });
        assert_eq!((item.before, item.after, item.gone), (4, 4, 1));
        let mut unpacked = String::new();
        flate2::read::GzDecoder::new(File::open(&delta.1).unwrap()).read_to_string(&mut unpacked).unwrap();
        assert!(unpacked.contains(r#"{"table":"item","op":"update","columns":["sku","cents"]}"#), "{unpacked}");
        assert!(unpacked.contains(r#"["c",31]"#));
        bench.apply(&mut hq, &delta);
    }

    #[test]
    fn who_holds_a_value_under_a_partial_unique_index_may_change() {
        let bench = Bench::new(
            "CREATE TABLE item (sku TEXT PRIMARY KEY, plu INTEGER, cents INTEGER) STRICT;
             CREATE UNIQUE INDEX item_plu ON item (plu) WHERE cents > 0;",
        );
        let rows = |rows: &[(&'static str, i64, i64)]| {
            let row = |(sku, plu, c): &(&'static str, i64, i64)| {
                vec![Value::Text((*sku).into()), Value::Int(*plu), Value::Int(*c)]
            };
            by_key(rows.iter().map(row).collect(), 1, None)
        };
        let mut hq = bench.replica("hq.db");
        let old = rows(&[("a", 7, 0), ("b", 7, 5)]);
        bench.apply(&mut hq, &bench.full(1, &bench.scratch(&[("item", &old)])));
        // `a` takes 7 over from `b`, and comes before it.
        let new = rows(&[("a", 7, 5), ("b", 7, 0)]);
        let (delta, _) = bench.delta(2, 1, &hq, &bench.scratch(&[("item", &new)]));
        bench.apply(&mut hq, &delta);
    }

    #[test]
    fn beyond_64_sets_of_columns_rows_carry_all() {
        let columns: Vec<String> = (0..8).map(|n| format!("c{n} INTEGER")).collect();
        let bench = Bench::new(&format!("CREATE TABLE wide (id INTEGER PRIMARY KEY, {}) STRICT;", columns.join(", ")));
        let table = |changed: bool| -> Rows {
            let row = |id: i64| {
                let bits = (0..8).map(|c| Value::Int(if changed && id >> c & 1 == 1 { 1 } else { 0 }));
                std::iter::once(Value::Int(id)).chain(bits).collect()
            };
            by_key((0..256).map(row).collect(), 1, None)
        };
        let mut hq = bench.replica("hq.db");
        bench.apply(&mut hq, &bench.full(1, &bench.scratch(&[("wide", &table(false))])));
        let (delta, diff) = bench.delta(2, 1, &hq, &bench.scratch(&[("wide", &table(true))]));
        assert_eq!(diff.tables.values().next().unwrap().rows.update, 255);
        let mut unpacked = String::new();
        flate2::read::GzDecoder::new(File::open(&delta.1).unwrap()).read_to_string(&mut unpacked).unwrap();
        assert_eq!(unpacked.matches("\"op\":\"update\"").count(), 65);
        bench.apply(&mut hq, &delta);
    }

    #[test]
    fn a_spool_that_does_not_fit_into_memory_comes_back_whole() {
        let bench = Bench::new(DDL);
        let long = "x".repeat(3000);
        let many = |suffix: &str| -> Rows {
            let row = |n: i64| {
                vec![
                    Value::Text(format!("{n:04}").into()),
                    Value::Int(n),
                    Value::Text(format!("{long}{suffix}").into()),
                    Value::Null,
                    Value::Null,
                    Value::Null,
                ]
            };
            by_key((0..200).map(row).collect(), 1, None)
        };
        let mut hq = bench.replica("hq.db");
        bench.apply(&mut hq, &bench.full(1, &bench.scratch(&[("item", &many(""))])));
        let new = bench.scratch(&[("item", &many("y"))]);
        let (delta, _) = bench.delta(2, 1, &hq, &new);
        bench.apply(&mut hq, &delta);
        assert!(!bench.dir.path().join("spool").exists(), "the spool is tidied away");
    }
}

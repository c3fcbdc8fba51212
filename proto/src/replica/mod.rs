//! A replica: a SQLite database that holds streams at versions. HQ's published state, the relay's
//! shadow and the register's data are replicas, and this one room applies packs to all of them.
//!
//! A stream's version is a row in the same transaction as its rows (rule D1): after a power cut
//! the file holds one whole version, the old or the new. It never asks for more than the pack,
//! and never writes a row that its digest does not account for.

mod ahead;
mod apply;
pub mod sqlite;

pub use apply::{Applied, ApplyError, Job, PackFile};

use crate::clock::Timestamp;
use crate::digest::{RowHasher, Sha256, StateDigest};
use crate::failpoint;
use crate::ids::{Audience, Instance, StreamName, TableName, Version};
use crate::layout::PackKind;
use crate::limits::Limits;
use crate::manifest::{Listed, Manifest, StreamEntry};
use crate::retry::Verdict;
use crate::schema::{Contract, SchemaError, Table};
#[cfg(test)]
use crate::shelf;
use crate::value::Value;
use rusqlite::{Connection, Row, Statement};
use sqlite::{Checkpoint, SqliteError};
use std::borrow::Borrow;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The replica's own tables; they are what makes a file one.
const OURS: [&str; 3] = ["tillcast_stream", "tillcast_table", "tillcast_pack"];

/// Makes those that are not there.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS tillcast_stream (
        stream TEXT PRIMARY KEY, audience TEXT NOT NULL, version INTEGER NOT NULL, epoch INTEGER NOT NULL,
        schema INTEGER NOT NULL, schema_sha256 TEXT NOT NULL, ddl TEXT NOT NULL,
        digest TEXT NOT NULL, applied_at TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS tillcast_table (name TEXT PRIMARY KEY, stream TEXT NOT NULL, digest TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS tillcast_pack (
        stream TEXT NOT NULL, audience TEXT NOT NULL, version INTEGER NOT NULL, kind TEXT NOT NULL,
        sha256 TEXT NOT NULL, applied_at TEXT NOT NULL,
        PRIMARY KEY (stream, audience, version, kind)) STRICT, WITHOUT ROWID;";

/// The shape of our tables that this build knows.
const SHAPE: i64 = 1;

/// One stream as a replica holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// For whom.
    pub audience: Audience,
    /// The version.
    pub version: Version,
    /// The trust epoch that the version is counted in.
    pub epoch: u64,
    /// The contract's number.
    pub schema: u64,
    /// The contract's text.
    pub ddl: String,
    /// The state digest of each table, as applied (not recomputed).
    pub digests: BTreeMap<TableName, StateDigest>,
    /// When it was applied, UTC by this machine's clock.
    pub applied_at: Timestamp,
}

impl Held {
    /// The version, if it counts for this instance and epoch: what deltas may build on.
    pub fn version_of(&self, instance: &Instance, epoch: u64) -> Option<Version> {
        (self.audience == instance.audience && self.epoch == epoch).then_some(self.version)
    }

    /// Where this is the listed version by its number only: what has other rows than the signed list says, for people.
    /// Somebody else published that number, or a hand altered what is noted here.
    pub fn differs_from(&self, instance: &Instance, epoch: u64, entry: &StreamEntry) -> Option<String> {
        if self.version_of(instance, epoch) != Some(entry.version) {
            return None;
        }
        // A list that does not tell of a table contradicts nothing.
        let line = |(table, listed): (&TableName, &StateDigest)| {
            let held = self.digests.get(table).filter(|held| *held != listed)?;
            Some(format!("table {table}: {held} here, {listed} listed"))
        };
        let lines: Vec<String> = entry.digests.iter().filter_map(line).collect();
        let text =
            || format!("version {} is held with other rows than the list says ({})", self.version, lines.join("; "));
        (!lines.is_empty()).then(text)
    }
}

/// One table, recomputed from its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableCheck {
    /// The table.
    pub table: TableName,
    /// The digest that came with the version.
    pub stored: StateDigest,
    /// The digest of the rows as they are; none when the table cannot be read.
    pub found: Option<StateDigest>,
    /// Rows read.
    pub rows: u64,
}

impl TableCheck {
    /// Whether the rows are those of the version.
    pub fn is_right(&self) -> bool {
        self.found == Some(self.stored)
    }
}

/// Why a stream's rows were not checked.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The contract that they came under, which was taken then, is refused by this build or its limits: that says nothing
    /// of the rows.
    #[error(
        "stream {stream}: its rows cannot be checked here, for its contract is refused ({why}): raise [limits], or update this program"
    )]
    Contract {
        /// The stream.
        stream: StreamName,
        /// Why it is refused.
        why: SchemaError,
    },
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
}

/// Whether another listed stream holds a table that this one gets, and is to lose it by a pack of its own, which comes first.
pub fn is_in_the_way(listed: &Listed, stream: &StreamName, held: &BTreeMap<StreamName, Held>) -> bool {
    !in_the_way(listed, stream, held).is_empty()
}

/// The listed streams that hold a table which this one gets and they are to lose.
fn in_the_way<'h>(listed: &Listed, stream: &StreamName, held: &'h BTreeMap<StreamName, Held>) -> Vec<&'h StreamName> {
    let Some(Some(gets)) = listed.get(stream) else { return Vec::new() };
    let loses = |other: &StreamName, h: &Held| {
        let Some(Some(keeps)) = listed.get(other) else { return false };
        h.digests.keys().any(|t| gets.contains(t) && !keeps.contains(t))
    };
    held.iter().filter(|(other, h)| *other != stream && loses(other, h)).map(|(other, _)| other).collect()
}

/// Whether a stream waits for another to lose a table, or for one that waits for that one.
fn waits_for(listed: &Listed, held: &BTreeMap<StreamName, Held>, stream: &StreamName, other: &StreamName) -> bool {
    leads(stream, other, |at| in_the_way(listed, at, held))
}

/// The streams that a stream requires at versions which are not held, with those versions. Not those that wait for it
/// themselves, to lose a table or by what they require: it would be for ever.
pub fn lacking<'m>(
    manifest: &'m Manifest,
    stream: &StreamName,
    held: &BTreeMap<StreamName, Held>,
) -> BTreeMap<&'m StreamName, Version> {
    let of = |i: &Instance| held.get(&i.stream)?.version_of(i, manifest.epoch);
    let mut lacking = manifest.lacking(stream, of);
    if !lacking.is_empty() {
        let listed = manifest.tables();
        let before = |at: &StreamName| {
            let required = manifest.lacking(at, of).into_keys();
            required.chain(in_the_way(&listed, at, held)).cloned().collect::<Vec<_>>()
        };
        lacking.retain(|required, _| !leads((*required).clone(), stream, |at| before(at)));
    }
    lacking
}

/// Whether a way from one stream to those before it, and to those before them, comes to another.
fn leads<S: Borrow<StreamName> + Ord + Clone>(
    from: S,
    to: &StreamName,
    before: impl Fn(&StreamName) -> Vec<S>,
) -> bool {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(at) = next.pop() {
        let before = before(at.borrow());
        if before.iter().any(|s| s.borrow() == to) {
            return true;
        }
        next.extend(before.into_iter().filter(|s| seen.insert(s.clone())));
    }
    false
}

/// The digest of a whole stream: the first 16 bytes of SHA-256 over a line `TABLE DIGEST` for each
/// table in order of name; 32 hex digits.
pub fn stream_digest(digests: &BTreeMap<TableName, StateDigest>) -> String {
    let lines: String = digests.iter().map(|(t, d)| format!("{t} {d}\n")).collect();
    Sha256::of(lines.as_bytes()).to_string()[..32].to_owned()
}

/// An open replica. One process writes it, through one of these.
#[derive(Debug)]
pub struct Replica {
    db: Connection,
    path: PathBuf,
    limits: Limits,
    /// Bytes of the log when the transaction began.
    logged_before: Cell<u64>,
    /// What a test wants the disk to be, and how often it was looked at.
    #[cfg(test)]
    pretended: Cell<Option<shelf::Space>>,
    #[cfg(test)]
    looks: Cell<usize>,
}

impl Replica {
    fn of(db: Connection, path: &Path, limits: &Limits) -> Replica {
        Replica {
            db,
            path: path.to_owned(),
            limits: limits.clone(),
            logged_before: Cell::default(),
            #[cfg(test)]
            pretended: Cell::default(),
            #[cfg(test)]
            looks: Cell::default(),
        }
    }

    /// Opens a replica for writing; makes an empty one where there is none, also beside somebody else's tables.
    pub fn open(path: &Path, limits: &Limits) -> Result<Replica, SqliteError> {
        let replica = Replica::of(sqlite::open_private(path)?, path, limits);
        if replica.sql("reading sqlite_schema", missing)?.len() == OURS.len() {
            failpoint::inside("empty");
            replica.sql("making the replica", |db| {
                let is_empty = "SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema)";
                // Builds up to 0.1 know their file by it; in somebody else's it is not ours to set.
                let number = if db.query_row(is_empty, [], |r| r.get(0))? { "PRAGMA user_version = 1;" } else { "" };
                db.execute_batch(&format!("BEGIN IMMEDIATE; {TABLES} {number} COMMIT;"))
            })?;
            failpoint::inside("made");
            replica.checkpoint(Checkpoint::Truncate)?;
        }
        let found = replica.sql("reading the shape of our tables", shape)?;
        sqlite::refuse_shape(path, found, SHAPE)?;
        Ok(replica)
    }

    /// Opens a replica that another process writes, for reading.
    pub fn open_read_only(path: &Path, limits: &Limits) -> Result<Replica, SqliteError> {
        Ok(Replica::of(sqlite::open_read_only(path)?, path, limits))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The connection, for reading rows.
    pub fn connection(&self) -> &Connection {
        &self.db
    }

    /// One stream, if it is held.
    pub fn held(&self, stream: &StreamName) -> Result<Option<Held>, SqliteError> {
        Ok(self.read_held(Some(stream))?.pop_first().map(|(_, h)| h))
    }

    /// All streams held.
    pub fn all_held(&self) -> Result<BTreeMap<StreamName, Held>, SqliteError> {
        self.read_held(None)
    }

    fn read_held(&self, stream: Option<&StreamName>) -> Result<BTreeMap<StreamName, Held>, SqliteError> {
        self.sql("reading tillcast_stream", |db| {
            let mut held = BTreeMap::new();
            let list = db.prepare_cached(
                "SELECT stream, audience, version, epoch, schema, ddl, applied_at FROM tillcast_stream WHERE ?1 IS NULL OR stream = ?1",
            );
            let mut streams = match list {
                // Another process is about to make it.
                Err(e)
                    if sqlite::is_misfit(&e)
                        && db.is_readonly(rusqlite::MAIN_DB)?
                        && missing(db)?.len() == OURS.len() =>
                {
                    return Ok(held);
                }
                list => list?,
            };
            let mut tables = db.prepare_cached(TABLES_OF)?;
            let mut rows = streams.query([stream.map(|s| s.as_str())])?;
            while let Some(r) = rows.next()? {
                let (name, h) = held_of(r, &mut tables)?;
                held.insert(name, h);
            }
            Ok(held)
        })
    }

    /// Forgets the streams whose rows of ours cannot be read, and says what was wrong with them; of one whose name is what
    /// cannot be read, and of all where a table of ours is gone, there is none. Their own tables stay to be read, until a
    /// full takes their place.
    pub fn forget_unreadable(&mut self) -> Result<Vec<(Option<StreamName>, String)>, SqliteError> {
        self.begin()?;
        let forgotten = self.sql("forgetting what cannot be read", |db| {
            let gone = missing(db)?;
            if !gone.is_empty() {
                db.execute_batch(TABLES)?;
            }
            if gone.contains(&"tillcast_table") {
                // No digest is left to prove them by.
                db.execute("DELETE FROM tillcast_stream", [])?;
            }
            for table in ["tillcast_stream", "tillcast_table"] {
                let found: String = db.query_row(&format!("PRAGMA integrity_check({table})"), [], |r| r.get(0))?;
                if found != "ok" {
                    let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_CORRUPT);
                    return Err(rusqlite::Error::SqliteFailure(code, Some(found)));
                }
            }
            let mut streams = db.prepare(
                "SELECT stream, audience, version, epoch, schema, ddl, applied_at, rowid FROM tillcast_stream",
            )?;
            let mut tables = db.prepare(TABLES_OF)?;
            let mut lost: Vec<(i64, Option<StreamName>, String)> = Vec::new();
            let mut rows = streams.query([])?;
            while let Some(r) = rows.next()? {
                match held_of(r, &mut tables) {
                    Ok(_) => {}
                    Err(e) if sqlite::is_bad_value(&e) => {
                        lost.push((r.get(7)?, parsed(r, 0).ok(), e.to_string()));
                    }
                    Err(e) => return Err(e),
                }
            }
            for (row, ..) in &lost {
                let name = "(SELECT stream FROM tillcast_stream WHERE rowid = ?1)";
                db.execute(&format!("DELETE FROM tillcast_table WHERE stream = {name}"), [row])?;
                db.execute("DELETE FROM tillcast_stream WHERE rowid = ?1", [row])?;
            }
            let gone = gone.into_iter().map(|table| (None, format!("table {table} was gone")));
            Ok(gone.chain(lost.into_iter().map(|(_, stream, why)| (stream, why))).collect())
        });
        self.end(forgotten)
    }

    /// All packs that were proved here (applied, with their digests right), of whatever instance.
    pub fn all_proofs(&self) -> Result<Vec<(Instance, Version, PackKind, Sha256)>, SqliteError> {
        self.picked_proofs(|instance| instance.map(Some))
    }

    /// Those of the instances that are wanted: what cannot be read of others is in nobody's way.
    pub fn proofs_of(
        &self,
        is_wanted: impl Fn(&Instance) -> bool,
    ) -> Result<Vec<(Instance, Version, PackKind, Sha256)>, SqliteError> {
        self.picked_proofs(|instance| Ok(instance.ok().filter(&is_wanted)))
    }

    fn picked_proofs(
        &self,
        pick: impl Fn(rusqlite::Result<Instance>) -> rusqlite::Result<Option<Instance>>,
    ) -> Result<Vec<(Instance, Version, PackKind, Sha256)>, SqliteError> {
        self.sql("reading tillcast_pack", |db| {
            let mut list = db.prepare("SELECT stream, audience, version, kind, sha256 FROM tillcast_pack")?;
            let instance =
                |r: &Row<'_>| Ok(Instance { stream: parsed(r, 0)?, audience: parsed(r, 1)? }) as rusqlite::Result<_>;
            let proof = |r: &Row<'_>| {
                let Some(instance) = pick(instance(r))? else { return Ok(None) };
                let version = Version::try_from(r.get::<_, i64>(2)?).map_err(|e| conversion(2, e))?;
                let kind = if r.get_ref(3)?.as_str()? == "full" { PackKind::Full } else { PackKind::Delta };
                Ok(Some((instance, version, kind, parsed(r, 4)?)))
            };
            list.query_map([], proof)?.filter_map(Result::transpose).collect()
        })
    }

    /// Records that a pack was proved elsewhere by the same code (a full below the version held,
    /// tried in a scratch replica).
    pub fn add_proof(
        &self,
        instance: &Instance,
        proof: (Version, PackKind, Sha256),
        now: Timestamp,
    ) -> Result<(), SqliteError> {
        self.sql("writing tillcast_pack", |db| apply::write_proof(db, instance, proof, now))
    }

    /// Forgets the proofs of packs that `keep` does not want.
    pub fn forget_proofs(&self, keep: impl Fn(&Instance, Version, PackKind) -> bool) -> Result<(), SqliteError> {
        let proofs = self.all_proofs()?;
        self.sql("pruning tillcast_pack", |db| {
            for (instance, version, kind, _) in proofs {
                if !keep(&instance, version, kind) {
                    db.execute(
                        "DELETE FROM tillcast_pack WHERE stream = ?1 AND audience = ?2 AND version = ?3 AND kind = ?4",
                        (instance.stream.as_str(), instance.audience.to_string(), version.as_i64(), kind.to_string()),
                    )?;
                }
            }
            Ok(())
        })
    }

    /// Recomputes the digests of a stream's tables from their rows. A table that is gone, altered or
    /// damaged is wrong, not an error.
    pub fn verify(&self, stream: &StreamName) -> Result<Vec<TableCheck>, VerifyError> {
        // One read transaction, so that a writer's commit does not fall between two tables.
        self.sql("BEGIN", |db| db.execute_batch("BEGIN"))?;
        let checks = self.verify_in_transaction(stream);
        self.sql("COMMIT", |db| db.execute_batch("COMMIT"))?;
        checks
    }

    fn verify_in_transaction(&self, stream: &StreamName) -> Result<Vec<TableCheck>, VerifyError> {
        let Some(held) = self.held(stream)? else { return Ok(Vec::new()) };
        let contract = match Contract::parse(&held.ddl, &self.limits) {
            Ok(contract) => Some(contract),
            Err(why) if self.is_as_it_came(stream, &held.ddl)? => {
                return Err(VerifyError::Contract { stream: stream.clone(), why });
            }
            // Altered by hand or by rot: nothing under it is proved.
            Err(_) => None,
        };
        let check = |(table, stored): (&TableName, &StateDigest)| {
            let definition = contract.as_ref().and_then(|c| c.table(table));
            // A scan does not see an index that leads astray: the next update would miss its row, and a reader too.
            let sound = |t: &Table| Ok(if is_sound(&self.db, t)? { Some(table_digest(&self.db, t)?) } else { None });
            let found = definition.map(sound).transpose().map(Option::flatten);
            match found {
                Ok(found) => Ok(TableCheck {
                    table: table.clone(),
                    stored: *stored,
                    found: found.map(|f| f.0),
                    rows: found.map_or(0, |f| f.1),
                }),
                Err(e) if sqlite::is_misfit(&e) || sqlite::verdict(&e) == Verdict::Rebuild => {
                    Ok(TableCheck { table: table.clone(), stored: *stored, found: None, rows: 0 })
                }
                Err(e) => Err(SqliteError::new(format!("reading table {table}"), e)),
            }
        };
        let mut checks = held.digests.iter().map(check).collect::<Result<Vec<_>, _>>()?;
        // A table whose digest is lost proves nothing.
        let tables = contract.iter().flat_map(|c| c.tables.iter().map(|t| &t.name));
        let lost = tables.filter(|t| !held.digests.contains_key(*t));
        checks.extend(lost.map(|t| TableCheck {
            table: t.clone(),
            stored: StateDigest::default(),
            found: None,
            rows: 0,
        }));
        Ok(checks)
    }

    /// Whether a contract's text is the one that came with the version.
    fn is_as_it_came(&self, stream: &StreamName, ddl: &str) -> Result<bool, SqliteError> {
        let sql = "SELECT schema_sha256 FROM tillcast_stream WHERE stream = ?1";
        let noted: String =
            self.sql("reading tillcast_stream", |db| db.query_row(sql, [stream.as_str()], |r| r.get(0)))?;
        Ok(noted == Sha256::of(ddl.as_bytes()).to_string())
    }

    /// Drops the streams that are not wanted any more, with their tables.
    pub fn drop_streams_except(&mut self, wanted: &[StreamName]) -> Result<Vec<StreamName>, SqliteError> {
        let gone: Vec<_> = self.all_held()?.into_iter().filter(|(s, _)| !wanted.contains(s)).collect();
        for (stream, held) in &gone {
            self.begin()?;
            let dropped = self.sql("dropping a stream", |db| apply::drop_stream(db, stream, held.digests.keys()));
            self.end(dropped)?;
        }
        Ok(gone.into_iter().map(|(s, _)| s).collect())
    }

    /// What is held counts in no trust epoch any more (they begin at 1): each stream comes anew, and its rows are read
    /// until then. How many streams that are.
    pub fn disown(&self) -> Result<usize, SqliteError> {
        self.sql("disowning what is held", |db| db.execute("UPDATE tillcast_stream SET epoch = 0", []))
    }

    /// Brings the WAL home.
    pub fn checkpoint(&self, how: Checkpoint) -> Result<(), SqliteError> {
        sqlite::checkpoint(&self.db, how)
    }

    /// Begins a transaction. Foreign keys are checked at its end by one scan, at every tier and in every pack alike:
    /// SQLite's own check refuses some new columns, and reads the whole child for each row that goes from a parent.
    pub(crate) fn begin(&self) -> Result<(), SqliteError> {
        self.logged_before.set(sqlite::log_bytes(&self.path));
        self.sql("BEGIN", |db| db.execute_batch("PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE;"))
    }

    /// Commits the open transaction.
    pub fn commit(&mut self) -> Result<(), SqliteError> {
        self.sql("COMMIT", |db| db.execute_batch("COMMIT"))
    }

    /// Rolls the open transaction back, if there is one.
    pub fn rollback(&mut self) {
        if !self.db.is_autocommit()
            && let Err(e) = self.db.execute_batch("ROLLBACK")
        {
            tracing::warn!(path = %self.path.display(), error = %e, "ROLLBACK failed; SQLite has rolled back by itself");
        }
    }

    /// Commits after success, rolls back after failure.
    fn end<T>(&mut self, result: Result<T, SqliteError>) -> Result<T, SqliteError> {
        let result = result.and_then(|v| self.commit().map(|()| v));
        self.rollback();
        result
    }

    fn sql<T>(&self, what: &str, f: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, SqliteError> {
        f(&self.db).map_err(|e| SqliteError::new(format!("{}: {what}", self.path.display()), e))
    }
}

/// Which of our tables are not there.
fn missing(db: &Connection) -> rusqlite::Result<Vec<&'static str>> {
    let mut is_there =
        db.prepare("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1 COLLATE NOCASE)")?;
    let mut missing = Vec::new();
    for table in OURS {
        if !is_there.query_row([table], |r| r.get::<_, bool>(0))? {
            missing.push(table);
        }
    }
    Ok(missing)
}

/// The shape that our tables are at. A build that changes it notes so in a table of its own: `user_version` is the POS
/// application's as well.
fn shape(db: &Connection) -> rusqlite::Result<i64> {
    let is_noted = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'tillcast_shape')";
    if db.query_row(is_noted, [], |r| r.get(0))? {
        return db.query_row("SELECT coalesce(max(shape), 1) FROM tillcast_shape", [], |r| r.get(0));
    }
    Ok(1)
}

/// A stream's tables.
const TABLES_OF: &str = "SELECT name, digest FROM tillcast_table WHERE stream = ?1";

/// A row of `tillcast_stream`, with its rows of `tillcast_table`.
fn held_of(r: &Row<'_>, tables: &mut Statement<'_>) -> rusqlite::Result<(StreamName, Held)> {
    let name: StreamName = parsed(r, 0)?;
    let mut digests = BTreeMap::new();
    let mut list = tables.query([name.as_str()])?;
    while let Some(t) = list.next()? {
        digests.insert(parsed(t, 0)?, parsed(t, 1)?);
    }
    let version = Version::try_from(r.get::<_, i64>(2)?).map_err(|e| conversion(2, e))?;
    let held = Held {
        audience: parsed(r, 1)?,
        version,
        epoch: r.get::<_, i64>(3)? as u64,
        schema: r.get::<_, i64>(4)? as u64,
        ddl: r.get(5)?,
        digests,
        applied_at: parsed(r, 6)?,
    };
    Ok((name, held))
}

/// A column as a parsed type.
fn parsed<T: std::str::FromStr>(r: &Row<'_>, i: usize) -> rusqlite::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text = r.get_ref(i)?.as_str()?;
    text.parse().map_err(|e| conversion(i, e))
}

fn conversion(i: usize, e: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(i, rusqlite::types::Type::Text, Box::new(e))
}

/// A table's state digest by a scan, and its rows.
pub fn table_digest(db: &Connection, table: &Table) -> rusqlite::Result<(StateDigest, u64)> {
    let mut statement = db.prepare(&format!("SELECT {} FROM {}", table.column_list(), table.quoted()))?;
    let mut rows = statement.query([])?;
    let (mut digest, mut count, mut hasher) = (StateDigest::default(), 0, RowHasher::default());
    let mut row: Vec<Value<'_>> = Vec::with_capacity(table.columns.len());
    while let Some(r) = rows.next()? {
        row = read_values(r, table.columns.len(), row)?;
        digest.add(hasher.hash(&row));
        row = recycle(row);
        count += 1;
    }
    Ok((digest, count))
}

/// Whether a table and its indexes agree. Where an index of somebody else's asks for a collation or function that this
/// program does not have, SQLite looks at none of them, which says nothing of the rows: a scan alone proves them then.
fn is_sound(db: &Connection, table: &Table) -> rusqlite::Result<bool> {
    let look = format!("PRAGMA integrity_check({})", table.quoted());
    match db.query_row(&look, [], |r| r.get::<_, String>(0)) {
        Err(e) if sqlite::is_misfit(&e) && !apply::strange_indexes(db, table)?.is_empty() => Ok(true),
        verdict => Ok(verdict? == "ok"),
    }
}

/// The first `n` columns of a row, borrowed from it, in a vector used before.
fn read_values<'r>(r: &'r Row<'_>, n: usize, used: Vec<Value<'_>>) -> rusqlite::Result<Vec<Value<'r>>> {
    let mut row = recycle(used);
    for i in 0..n {
        row.push(r.get_ref(i)?.into());
    }
    Ok(row)
}

/// The vector's memory without its values, for values of another lifetime.
fn recycle<'b>(mut row: Vec<Value<'_>>) -> Vec<Value<'b>> {
    row.clear();
    // Collecting in place keeps the allocation; nothing is left to map.
    row.into_iter().map(|v| v.into_owned()).collect()
}

#[cfg(test)]
mod tests;

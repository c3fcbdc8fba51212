//! Applying packs: strict operations inside one transaction with the version, proved by digests
//! before it commits. What the pack says must be exactly true of the rows that are here.

use super::ahead::{self, Block, Said};
use super::sqlite::{self, Checkpoint, SqliteError};
use super::{Held, Replica, read_values, stream_digest, table_digest, waits_for};
use crate::clock::Timestamp;
use crate::digest::{RowHash, RowHasher, Sha256, StateDigest};
use crate::failpoint;
use crate::ids::{ColumnName, Instance, StreamName, TableName, Version};
use crate::layout::PackKind;
use crate::manifest::{Listed, PackEntry};
use crate::pack::{Op, PackError, PackReader, RowCounts, Section, Trailer};
use crate::retry::Verdict;
use crate::schema::{self, Contract, NotAdditive, SchemaError, Table};
use crate::shelf;
use crate::value::{self, Value};
use rusqlite::{Connection, OptionalExtension, Statement};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc::Receiver;

/// A pack's file, and what the manifest says it is.
#[derive(Debug, Clone, Copy)]
pub struct PackFile<'a> {
    /// The file.
    pub path: &'a Path,
    /// The manifest's entry.
    pub entry: &'a PackEntry,
}

/// Packs to apply, in order.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// The stream@audience.
    pub instance: &'a Instance,
    /// The trust epoch that the versions are counted in.
    pub epoch: u64,
    /// The packs: each builds on the one before, the first on what is held or on nothing.
    pub packs: &'a [PackFile<'a>],
    /// This machine's clock, for `applied_at`.
    pub now: Timestamp,
    /// Whether to keep a row that tells that each pack was proved (the relay's shadow does).
    pub prove: bool,
    /// What the manifest lists, where readers are served: a table that goes over to another stream stays to be read until
    /// that stream's pack makes it anew. None: each table goes with its stream.
    pub listed: Option<&'a Listed>,
}

/// What was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// The version now held.
    pub version: Version,
    /// Rows changed by operation.
    pub rows: RowCounts,
    /// Transactions committed.
    pub transactions: usize,
}

/// Why packs were not applied. The transaction was rolled back: the version before is whole.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The pack itself.
    #[error("{pack}: {source}")]
    Pack {
        /// Which pack.
        pack: String,
        /// What is wrong with it.
        source: PackError,
    },
    /// A row that does not fit what is here.
    #[error("{pack}: line {line}: table {table}, {op} of {key}: {reason}")]
    Row {
        /// Which pack.
        pack: String,
        /// The line in the pack.
        line: u64,
        /// The table.
        table: TableName,
        /// The operation.
        op: Op,
        /// The row's key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// Rows that are not those of the version.
    #[error("{pack}: table {table} has digest {found} after the pack, it should have {wanted}")]
    Digest {
        /// Which pack.
        pack: String,
        /// The table.
        table: TableName,
        /// The pack's digest.
        wanted: String,
        /// The rows' digest.
        found: StateDigest,
    },
    /// A delta that starts elsewhere.
    #[error("{pack}: it starts from version {base}, here is {held}")]
    WrongBase {
        /// Which pack.
        pack: String,
        /// The pack's base.
        base: String,
        /// What is held.
        held: String,
    },
    /// A change of contract that cannot be taken by a delta.
    #[error("{pack}: contract: {reason}")]
    Schema {
        /// Which pack.
        pack: String,
        /// Why.
        reason: String,
    },
    /// A table that another stream holds.
    #[error("{pack}: table {table} is held by stream {holder}, which is listed")]
    Elsewhere {
        /// Which pack.
        pack: String,
        /// The table.
        table: TableName,
        /// Who holds it.
        holder: StreamName,
        /// Whether the list gives it to one of the two only: a pack of the holder's own gives it up, or this one is of
        /// before. That says nothing about the pack.
        is_to_go: bool,
    },
    /// References that lead nowhere.
    #[error(
        "{pack}: {count} rows of table {table} refer to rows that are not there, the first with rowid or key {row}"
    )]
    ForeignKey {
        /// Which pack.
        pack: String,
        /// The table.
        table: String,
        /// How many rows.
        count: usize,
        /// The first of them.
        row: String,
    },
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
}

impl ApplyError {
    /// What to do about it. `Quarantine` says that pack and replica do not fit: whoever applied
    /// asks [`Replica::verify`] first whose fault it is.
    pub fn verdict(&self) -> Verdict {
        match self {
            ApplyError::Pack { source: PackError::Io(_), .. } => Verdict::Retry,
            ApplyError::Sqlite(e) => e.verdict(),
            _ => Verdict::Quarantine,
        }
    }

    /// A stable name of the reason, for reason files, logs and JSON.
    pub fn code(&self) -> &'static str {
        match self {
            ApplyError::Pack { source, .. } => source.code(),
            ApplyError::Row { .. } => "ROW",
            ApplyError::Digest { .. } => "DIGEST",
            ApplyError::WrongBase { .. } => "WRONG_BASE",
            ApplyError::Schema { .. } | ApplyError::Elsewhere { .. } => "BAD_SCHEMA",
            ApplyError::ForeignKey { .. } => "FOREIGN_KEY",
            ApplyError::Sqlite(e) if e.is_disk_full() => "DISK_FULL",
            ApplyError::Sqlite(_) => "SQLITE",
        }
    }

    /// Whether another stream is to give up a table first: the same again, when that is done.
    pub fn waits(&self) -> bool {
        matches!(self, ApplyError::Elsewhere { is_to_go: true, .. })
    }

    /// Whether an index that is not the contract's may be why: it refuses a row that is right, or asks for a collation or
    /// function of somebody else's, so that no statement on its table can be made.
    fn may_be_for_an_index(&self) -> bool {
        matches!(self, ApplyError::Row { .. } | ApplyError::Schema { .. })
            || matches!(self, ApplyError::Sqlite(e) if sqlite::is_misfit(e.inner()))
    }

    /// Whether the rows that are here had a part in it, so that a drift may be the cause.
    pub fn may_be_drift(&self) -> bool {
        matches!(self, ApplyError::Row { .. } | ApplyError::Digest { .. } | ApplyError::ForeignKey { .. })
            || matches!(self, ApplyError::Sqlite(e) if e.verdict() == Verdict::Quarantine)
    }
}

impl Replica {
    /// Applies packs. Each delta is one transaction; a full and the deltas after it, up to at
    /// least the version that readers saw before, are one, so that no reader sees an older
    /// version; a change of audience or epoch is one altogether. After an error what was
    /// committed before stands: ask [`Replica::held`].
    pub fn apply(&mut self, job: &Job<'_>) -> Result<Applied, ApplyError> {
        self.apply_and_tell(job, &mut |_| {})
    }

    /// The same; `begins` hears of each pack before anything of it is read, so that it is known over which one a process
    /// died.
    pub fn apply_and_tell(&mut self, job: &Job<'_>, begins: &mut dyn FnMut(&PackEntry)) -> Result<Applied, ApplyError> {
        let held = self.held(&job.instance.stream)?;
        let mut applied = Applied {
            version: held.as_ref().map_or(Version::FIRST, |h| h.version),
            rows: RowCounts::default(),
            transactions: 0,
        };
        for group in groups(job, held.as_ref()) {
            let is_delta = group.first().is_some_and(|p| p.entry.kind == PackKind::Delta);
            let rows = match self.apply_committed(job, group, &[], begins) {
                // What others have put on our tables may be why; on those of a full there is nothing.
                Err(e) if is_delta && e.may_be_for_an_index() => {
                    let strange = self.strange_indexes(&job.instance.stream)?;
                    if strange.is_empty() {
                        return Err(e);
                    }
                    self.apply_committed(job, group, &strange, begins)?
                }
                done => done?,
            };
            failpoint::inside("committed");
            applied.rows.delete += rows.delete;
            applied.rows.update += rows.update;
            applied.rows.insert += rows.insert;
            applied.transactions += 1;
            applied.version = group.last().map_or(applied.version, |p| p.entry.version);
            self.checkpoint(Checkpoint::Passive)?;
        }
        Ok(applied)
    }

    /// Applies without these indexes, which stay if that fails.
    fn apply_committed(
        &mut self,
        job: &Job<'_>,
        group: &[PackFile<'_>],
        strange: &[String],
        begins: &mut dyn FnMut(&PackEntry),
    ) -> Result<RowCounts, ApplyError> {
        self.begin()?;
        failpoint::inside("begun");
        let drop_all = |db: &Connection| strange.iter().try_for_each(|index| drop_named(db, "INDEX", index));
        let dropped = self.sql("dropping indexes that no contract has", drop_all).map_err(ApplyError::from);
        let result = dropped.and_then(|()| self.apply_group(job, group, begins)).and_then(|rows| {
            failpoint::inside("uncommitted");
            self.commit()?;
            Ok(rows)
        });
        self.rollback();
        if result.is_ok() {
            for index in strange {
                tracing::warn!(
                    database = %self.path.display(), %index, stream = %job.instance,
                    "an index that is not the contract's is gone: a pack could not be applied beside it. Keep indexes of your own off these tables"
                );
            }
        }
        result
    }

    /// The indexes on a stream's tables that may stand in a pack's way.
    fn strange_indexes(&self, stream: &StreamName) -> Result<Vec<String>, SqliteError> {
        let Some(held) = self.held(stream)? else { return Ok(Vec::new()) };
        let Ok(contract) = Contract::parse(&held.ddl, &self.limits) else { return Ok(Vec::new()) };
        self.sql("looking for indexes that no contract has", |db| {
            let mut strange = Vec::new();
            for table in &contract.tables {
                strange.extend(strange_indexes(db, table)?);
            }
            Ok(strange)
        })
    }

    /// Applies packs in a transaction that stays open: HQ's validation, held until the manifests
    /// are signed. Ends by [`Replica::commit`] or [`Replica::rollback`]; after an error it has
    /// been rolled back.
    pub fn apply_uncommitted(&mut self, job: &Job<'_>) -> Result<RowCounts, ApplyError> {
        self.begin()?;
        let result = self.apply_group(job, job.packs, &mut |_| {});
        if result.is_err() {
            self.rollback();
        }
        result
    }

    /// Begins a transaction and migrates a stream within it, to compare rows under the new
    /// contract; the caller rolls back. An error names the statement.
    pub fn preview_migration(&mut self, statements: &[String]) -> Result<(), SqliteError> {
        self.begin()?;
        let run = |s: &String| {
            schema::run_guarded(&self.db, std::slice::from_ref(s), true).map_err(|e| SqliteError::new(s.as_str(), e))
        };
        let result = statements.iter().try_for_each(run);
        if result.is_err() {
            self.rollback();
        }
        result
    }

    fn apply_group(
        &mut self,
        job: &Job<'_>,
        packs: &[PackFile<'_>],
        begins: &mut dyn FnMut(&PackEntry),
    ) -> Result<RowCounts, ApplyError> {
        let mut rows = RowCounts::default();
        let mut touched = Touched::default();
        for pack in packs {
            begins(pack.entry);
            let counts = self.apply_pack(job, pack, &mut touched)?;
            rows.delete += counts.delete;
            rows.update += counts.update;
            rows.insert += counts.insert;
        }
        if let Some(e) = self.broken_reference(job, packs, &touched)? {
            return Err(e);
        }
        // All of it lies in the log before the last look.
        self.sql("writing the log", Connection::cache_flush)?;
        self.leaves_room(packs.iter().map(|p| p.entry.unpacked).fold(0, u64::saturating_add))?;
        Ok(rows)
    }

    /// Ends where the disk would be full: the log stays until what it adds to the database is brought home, so that both
    /// would take all room for good, and whatever else writes on that disk would fail. How much is left for that goes by
    /// the packs' text, or by what came of it in the log, if that is more.
    fn leaves_room(&self, unpacked: u64) -> Result<(), SqliteError> {
        self.takes_more(unpacked, |_, _, _| Ok(0))
    }

    /// The same, before an index is made: it is sorted in a file beside the database before it lies in the log, and nobody can
    /// look in between.
    fn has_room_to_index(&self, contract: &Contract, statement: &str) -> Result<(), SqliteError> {
        let of = |t: &&Table| t.indexes.iter().any(|(_, sql)| schema::sql::same(sql, statement));
        let Some(table) = contract.tables.iter().find(of) else { return Ok(()) };
        self.takes_more(0, |db, length, free| {
            // An index is seldom longer than all tables: only where that is too much the rows are asked.
            if free / 4 > length {
                return Ok(0);
            }
            let kept = table.kept_by(statement);
            let lengths: Vec<String> = kept.iter().map(|c| format!("coalesce(octet_length(\"{c}\"), 0)")).collect();
            let (lengths, beside) = (lengths.join(" + "), kept.len() + 8);
            let rows = format!("SELECT coalesce(sum({lengths} + {beside}), 0) FROM {}", table.quoted());
            let bytes: i64 = db.query_row(&rows, [], |r| r.get(0))?;
            Ok(u64::try_from(bytes).unwrap_or(0).saturating_mul(2))
        })
    }

    /// Looks at the disk; `more` says, by the database's length and what is free, what else is to be written before the next
    /// look.
    fn takes_more(
        &self,
        unpacked: u64,
        more: impl FnOnce(&Connection, u64, u64) -> rusqlite::Result<u64>,
    ) -> Result<(), SqliteError> {
        let (Ok(space), Ok(file)) = (self.space(), std::fs::metadata(&self.path)) else {
            return Ok(());
        };
        let logged = sqlite::log_bytes(&self.path).saturating_sub(self.logged_before.get());
        self.sql("looking at the disk", |db| {
            let length = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size";
            let length: i64 = db.prepare_cached(length)?.query_row([], |r| r.get(0))?;
            let length = u64::try_from(length).unwrap_or(0);
            let home = length.saturating_sub(file.len());
            let full = |why| {
                let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_FULL);
                let why = format!("{why} to bring the log home and to leave some for others");
                rusqlite::Error::SqliteFailure(code, Some(why))
            };
            space.takes(home.saturating_add(more(db, length, space.free)?), unpacked.max(logged)).map_err(full)
        })
    }

    fn space(&self) -> Result<shelf::Space, shelf::ShelfError> {
        #[cfg(test)]
        if let Some(space) = self.pretended.get() {
            self.looks.set(self.looks.get() + 1);
            return Ok(space);
        }
        shelf::free_space(&self.path)
    }

    /// Looks through the tables whose references these packs can have broken.
    fn broken_reference(
        &self,
        job: &Job<'_>,
        packs: &[PackFile<'_>],
        touched: &Touched,
    ) -> Result<Option<ApplyError>, SqliteError> {
        let Some(held) = self.held(&job.instance.stream)? else { return Ok(None) };
        let pack = packs.last().map_or(String::new(), |p| name(job, p));
        self.sql("PRAGMA foreign_key_check", |db| {
            for table in held.digests.keys() {
                if !touched.may_break(db, table)? {
                    continue;
                }
                let mut check = db.prepare(&format!("PRAGMA foreign_key_check(\"{table}\")"))?;
                let rows: Vec<Option<i64>> = check.query_map([], |r| r.get(1))?.collect::<Result<_, _>>()?;
                if let Some(first) = rows.first() {
                    let row = first.map_or("unknown".into(), |id| id.to_string());
                    let (table, count) = (table.to_string(), rows.len());
                    return Ok(Some(ApplyError::ForeignKey { pack, table, count, row }));
                }
            }
            Ok(None)
        })
    }

    /// One pack within the open transaction, as docs/FORMAT.md, "Applying", tells.
    fn apply_pack(
        &mut self,
        job: &Job<'_>,
        pack: &PackFile<'_>,
        touched: &mut Touched,
    ) -> Result<RowCounts, ApplyError> {
        let pack_name = name(job, pack);
        let refuse = |source| ApplyError::Pack { pack: pack_name.clone(), source };
        // 1. Is it the pack that its name says, and does it start from what is here?
        let file = shelf::open_regular(pack.path).map_err(|e| refuse(PackError::Io(std::io::Error::other(e))))?;
        let reader = PackReader::new(file, job.instance, pack.entry, &self.limits).map_err(refuse)?;
        let held = self.held(&job.instance.stream)?;
        let header = reader.header().clone();
        let contract = reader.contract().clone();
        // 2. The tables: made anew by a full, migrated by a delta whose contract has changed.
        let digests = match (header.kind, &held) {
            (PackKind::Full, _) => self.make_tables(job, &contract, held.as_ref(), &pack_name)?,
            (PackKind::Delta, Some(h)) if h.version_of(job.instance, job.epoch) == header.base => {
                let digests = self.migrate(job, h, &header.schema, &contract, &pack_name, touched)?;
                self.remake_indexes(job, &contract, &pack_name)?;
                digests
            }
            (PackKind::Delta, _) => {
                let base = header.base.map_or("none".into(), |b| b.to_string());
                let held =
                    held.map_or("nothing".into(), |h| format!("{} of {} in epoch {}", h.version, h.audience, h.epoch));
                return Err(ApplyError::WrongBase { pack: pack_name, base, held });
            }
        };
        // 3. The rows, counted into the digests.
        // 4. The proof: every table has the digest that HQ's had, and the file is the listed one.
        let (unpacked, hasher) = (pack.entry.unpacked, RowHasher::default());
        let mut work =
            Work { replica: self, unpacked, pack: &pack_name, contract: &contract, digests, hasher, touched };
        let trailer = std::thread::scope(|scope| {
            let heard = ahead::read_ahead(scope, reader).map_err(refuse)?;
            let trailer = work.rows(&heard)?;
            prove(&pack_name, &contract, &work.digests, &trailer)?;
            work.hear(&heard)?;
            Ok::<_, ApplyError>(trailer)
        })?;
        let digests = work.digests;
        if header.kind == PackKind::Full {
            let indexes: Vec<String> =
                contract.tables.iter().flat_map(|t| t.indexes.iter().map(|(_, sql)| sql.clone())).collect();
            self.guarded("making the indexes (they are sorted in its directory)", &indexes, &contract, &pack_name)?;
        }
        // 5. The version, in the same transaction.
        self.sql("writing the version", |db| {
            write_held(db, job, &header, &digests)?;
            if job.prove {
                write_proof(db, job.instance, (pack.entry.version, pack.entry.kind, pack.entry.sha256), job.now)?;
            }
            Ok(())
        })?;
        Ok(trailer.rows)
    }

    fn make_tables(
        &self,
        job: &Job<'_>,
        contract: &Contract,
        held: Option<&Held>,
        pack: &str,
    ) -> Result<Digests, ApplyError> {
        // Whom this one stands in the way of counts, too.
        let all = self.all_held()?;
        if let Some(h) = held {
            self.sql("dropping the old tables", |db| let_go(db, job, &job.instance.stream, h, contract))?;
        }
        self.make_way(job, &all, (contract, None), pack)?;
        let tables: Vec<String> = contract.tables.iter().map(|t| t.create.clone()).collect();
        self.guarded("making the tables", &tables, contract, pack)?;
        Ok(contract.tables.iter().map(|t| (t.name.clone(), StateDigest::default())).collect())
    }

    /// Takes away what has the names of tables about to be made: what no stream holds (a rest of one whose version was lost,
    /// or that stayed to be read), and what a stream holds that is listed no more, which is forgotten. One that is listed
    /// gives a table up by a pack of its own, unless that waits for this one, or it is of an earlier epoch. An index that has
    /// the name of one about to be made goes whoever's it is: no row and no digest depends on it, and two streams that
    /// swapped names would wait for ever.
    fn make_way(
        &self,
        job: &Job<'_>,
        held: &BTreeMap<StreamName, Held>,
        (contract, old): (&Contract, Option<&Contract>),
        pack: &str,
    ) -> Result<(), ApplyError> {
        let make_room = |holder: &StreamName, table: &TableName| {
            let Some(h) = held.get(holder) else { return Ok(()) };
            let Some(listed) = job.listed else { return Ok(()) };
            let own = &job.instance.stream;
            let lists = |s: &StreamName| listed.get(s).is_some_and(|tables| may_have(tables, table));
            // Of one whose entry cannot be read nobody knows: it keeps what it holds, and that is not this pack's fault.
            let is_unread = listed.get(holder).is_some_and(Option::is_none);
            let is_to_go = is_unread || !(lists(holder) && lists(own));
            let gives_way = !listed.contains_key(holder) || h.epoch < job.epoch && !is_unread;
            if gives_way || !lists(holder) && waits_for(listed, held, holder, own) {
                tracing::info!(%holder, to = %job.instance, %table, "its tables go over");
                return self.sql("forgetting a stream", |db| let_go(db, job, holder, h, contract)).map_err(Into::into);
            }
            let (pack, table, holder) = (pack.to_owned(), table.clone(), holder.clone());
            Err(ApplyError::Elsewhere { pack, table, holder, is_to_go })
        };
        for table in contract.tables.iter().filter(|t| old.is_none_or(|o| o.table(&t.name).is_none())) {
            let holds = |(stream, h): &(&StreamName, &Held)| {
                **stream != job.instance.stream && h.digests.contains_key(&table.name)
            };
            match held.iter().find(holds) {
                Some((holder, _)) => make_room(holder, &table.name)?,
                None => {
                    if is_strange(&self.db, table) {
                        tracing::warn!(
                            database = %self.path.display(), table = %table.name, stream = %job.instance,
                            "a table that no stream holds had rows: the contract's takes its place. Keep tables of your own in another file"
                        );
                    }
                    self.sql("dropping what no stream holds", |db| drop_table(db, &table.name))?;
                }
            }
        }
        let Some(listed) = job.listed else { return Ok(()) };
        let indexes = |contract: &Contract| -> BTreeSet<String> {
            contract.tables.iter().flat_map(|t| t.indexes.iter().map(|(name, _)| folded(name))).collect()
        };
        for index in indexes(contract).difference(&old.map(indexes).unwrap_or_default()) {
            // Whose it is gives the name up, too: a full of its own makes its table anew.
            self.free_index_name(job, index)?;
        }
        // What stayed to be read, and nobody is to have any more.
        self.sql("dropping what nobody lists", |db| {
            for table in stayed(db)?.iter().filter(|t| !listed.values().any(|tables| may_have(tables, t))) {
                drop_table(db, table)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Takes away the index or view that has the name of an index about to be made. A table of somebody else's is left to
    /// them: for an index no rows are thrown away, and the pack is not to blame.
    fn free_index_name(&self, job: &Job<'_>, index: &str) -> Result<(), SqliteError> {
        let found = self.sql("reading sqlite_schema", |db| named(db, index))?;
        let Some((kind, table, is_ours)) = found else { return Ok(()) };
        if kind == "table" && !is_ours {
            let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_PERM);
            let why = "no stream holds the table that has its name: rename it, or keep it in another file".to_owned();
            let what = format!("{}: making index {index} of {}", self.path.display(), job.instance);
            return Err(SqliteError::new(what, rusqlite::Error::SqliteFailure(code, Some(why))));
        }
        if kind == "table" {
            return Ok(());
        }
        if !is_ours {
            tracing::warn!(
                database = %self.path.display(), %index, %kind, %table, stream = %job.instance,
                "what no stream holds goes: the contract has an index of its name. Keep tables of your own in another file"
            );
        }
        self.sql("dropping what has an index's name", |db| drop_named(db, &kind, index))
    }

    /// Migrates first, then sums anew the tables that the migration changed, by a scan.
    fn migrate(
        &self,
        job: &Job<'_>,
        held: &Held,
        new: &crate::pack::SchemaPart,
        contract: &Contract,
        pack: &str,
        touched: &mut Touched,
    ) -> Result<Digests, ApplyError> {
        let mut digests = held.digests.clone();
        let refuse = |reason: String| ApplyError::Schema { pack: pack.to_owned(), reason };
        if held.ddl == new.ddl && new.migrate.is_empty() {
            return Ok(digests);
        }
        let old = Contract::parse(&held.ddl, &self.limits).map_err(|e: SchemaError| refuse(e.to_string()))?;
        let statements = contract.additive_since(&old).map_err(|e: NotAdditive| refuse(e.to_string()))?;
        if !schema::is_same_migration(&statements, &new.migrate) {
            return Err(refuse("its migration statements do not follow from the two contracts".into()));
        }
        self.make_way(job, &self.all_held()?, (contract, Some(&old)), pack)?;
        self.guarded("migrating", &statements, contract, pack)?;
        for table in &contract.tables {
            let changed = old.table(&table.name).is_none_or(|o| o.columns.len() != table.columns.len());
            if changed {
                let (digest, _) = self.sql("summing a table anew", |db| table_digest(db, table))?;
                digests.insert(table.name.clone(), digest);
                // A new column's DEFAULT may refer.
                touched.grown.insert(folded(table.name.as_str()));
            }
        }
        Ok(digests)
    }

    /// Makes again the indexes of a contract whose names another stream had taken and gave back, or that a hand dropped.
    fn remake_indexes(&self, job: &Job<'_>, contract: &Contract, pack: &str) -> Result<(), ApplyError> {
        let gone = |db: &Connection| -> rusqlite::Result<(Vec<String>, Vec<String>)> {
            let mut there = db.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'index' AND name = ?1 COLLATE NOCASE)",
            )?;
            let mut gone = (Vec::new(), Vec::new());
            for (index, sql) in contract.tables.iter().flat_map(|t| &t.indexes) {
                if !there.query_row([index.as_str()], |r| r.get::<_, bool>(0))? {
                    gone.0.push(index.clone());
                    gone.1.push(sql.clone());
                }
            }
            Ok(gone)
        };
        let (names, gone) = self.sql("reading sqlite_schema", gone)?;
        names.iter().try_for_each(|index| self.free_index_name(job, index))?;
        self.guarded("making indexes again", &gone, contract, pack)
    }

    fn guarded(&self, what: &str, statements: &[String], contract: &Contract, pack: &str) -> Result<(), ApplyError> {
        for statement in statements {
            self.has_room_to_index(contract, statement)?;
            self.sql(what, |db| schema::run_guarded(db, std::slice::from_ref(statement), true)).map_err(|e| {
                if e.is_refused() {
                    return ApplyError::Schema { pack: pack.to_owned(), reason: e.to_string() };
                }
                e.into()
            })?;
            // An index may be as long as its table.
            self.sql("writing the log", Connection::cache_flush)?;
            self.leaves_room(0)?;
        }
        Ok(())
    }
}

type Digests = BTreeMap<TableName, StateDigest>;

/// What packs did to tables, as far as references can be broken by it; names as SQLite compares them.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Tables with new rows, or a new column.
    pub(super) grown: BTreeSet<String>,
    /// Tables that rows went from.
    pub(super) shrunk: BTreeSet<String>,
    /// Tables and columns that got other values.
    pub(super) updated: BTreeSet<(String, String)>,
}

fn folded(name: &str) -> String {
    name.to_ascii_lowercase()
}

impl Touched {
    fn note(&mut self, section: &Section, table: &Table) {
        let name = folded(table.name.as_str());
        match section.op {
            Op::Insert => drop(self.grown.insert(name)),
            Op::Delete => drop(self.shrunk.insert(name)),
            Op::Update => {
                // The key only says which row.
                let is_key = |c: &&ColumnName| table.key.iter().any(|k| table.columns[*k].name == **c);
                let others = section.columns.iter().filter(|c| !is_key(c));
                self.updated.extend(others.map(|c| (name.clone(), folded(c.as_str()))));
            }
        }
    }

    /// Whether a row of this table may refer to nothing now, if none did before: a scan of it costs minutes where the
    /// disk is slow.
    pub(super) fn may_break(&self, db: &Connection, child: &TableName) -> rusqlite::Result<bool> {
        let mut keys = db.prepare_cached("SELECT \"table\", \"from\", \"to\" FROM pragma_foreign_key_list(?1)")?;
        let mut keys = keys.query([child.as_str()])?;
        let name = folded(child.as_str());
        while let Some(key) = keys.next()? {
            let (parent, from): (String, String) =
                (folded(&key.get::<_, String>(0)?), folded(&key.get::<_, String>(1)?));
            // None: the parent's key.
            let to: Option<String> = key.get(2)?;
            let is_left = to.is_some_and(|to| self.updated.contains(&(parent.clone(), folded(&to))));
            let refers_anew = self.updated.contains(&(name.clone(), from));
            if self.grown.contains(&name) || self.shrunk.contains(&parent) || refers_anew || is_left {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Which packs share a transaction.
fn groups<'a>(job: &Job<'a>, held: Option<&Held>) -> Vec<&'a [PackFile<'a>]> {
    let mut out = Vec::new();
    let mut rest = job.packs;
    // What readers saw: a version of this instance, or (after a change of audience or epoch) one
    // that only the end of the chain may replace.
    let seen = held.map(|h| h.version_of(job.instance, job.epoch).unwrap_or(Version::MAX));
    while let Some(first) = rest.first() {
        let mut n = 1;
        if first.entry.kind == PackKind::Full
            && let Some(seen) = seen
        {
            while n < rest.len() && rest[n - 1].entry.version < seen {
                n += 1;
            }
        }
        let (group, after) = rest.split_at(n);
        out.push(group);
        rest = after;
    }
    out
}

fn name(job: &Job<'_>, pack: &PackFile<'_>) -> String {
    pack.entry.name(job.instance).to_string()
}

/// The state of one pack being applied.
struct Work<'a> {
    replica: &'a Replica,
    /// Bytes of the pack as text.
    unpacked: u64,
    pack: &'a str,
    contract: &'a Contract,
    digests: Digests,
    hasher: RowHasher,
    touched: &'a mut Touched,
}

impl Work<'_> {
    fn hear(&self, heard: &Receiver<Said>) -> Result<Block, ApplyError> {
        // A thread that says nothing more has panicked, which ends this one, too.
        let said = heard.recv().unwrap_or_else(|e| Err(PackError::Io(std::io::Error::other(e))));
        said.map_err(|source| ApplyError::Pack { pack: self.pack.to_owned(), source })
    }

    fn rows(&mut self, heard: &Receiver<Said>) -> Result<Trailer, ApplyError> {
        let mut writer: Option<SectionWriter<'_>> = None;
        let (pack, db, contract) = (self.pack, &self.replica.db, self.contract);
        loop {
            match self.hear(heard)? {
                Block::Section(section) => {
                    if let Some(done) = writer.take() {
                        self.digests.insert(done.table.name.clone(), done.digest);
                    }
                    let table = contract.table(&section.table).ok_or_else(|| ApplyError::Schema {
                        pack: pack.to_owned(),
                        reason: format!("table {} is not in the contract", section.table),
                    })?;
                    self.touched.note(&section, table);
                    let digest = self.digests.get(&table.name).copied().unwrap_or_default();
                    let new = SectionWriter::new(db, table, &section, digest)
                        .map_err(|e| SqliteError::new(format!("{pack}: table {}", table.name), e))?;
                    writer = Some(new);
                }
                Block::Rows(rows) => {
                    // The reader gives no row before a section.
                    let Some(w) = writer.as_mut() else { continue };
                    for (line, row, hash) in rows.iter() {
                        w.write(row, hash, &mut self.hasher).map_err(|e| e.at(pack, line, w.table, w.op))?;
                    }
                    self.replica.leaves_room(self.unpacked)?;
                }
                Block::End(trailer) => {
                    if let Some(done) = writer.take() {
                        self.digests.insert(done.table.name.clone(), done.digest);
                    }
                    return Ok(trailer);
                }
                Block::Listed => {}
            }
        }
    }
}

/// A row that failed, before it is known where it stood.
enum RowFault {
    /// The line was not handed over as a row of these columns.
    Line,
    /// The row does not fit what is here.
    Row { key: String, reason: String },
    /// SQLite failed for a reason of its own.
    Sqlite(rusqlite::Error),
}

impl RowFault {
    fn at(self, pack: &str, line: u64, table: &Table, op: Op) -> ApplyError {
        match self {
            RowFault::Line => ApplyError::Pack {
                pack: pack.to_owned(),
                source: PackError::Line { line, reason: format!("table {}: not a row of it", table.name) },
            },
            RowFault::Row { key, reason } => {
                ApplyError::Row { pack: pack.to_owned(), line, table: table.name.clone(), op, key, reason }
            }
            RowFault::Sqlite(e) => SqliteError::new(format!("{pack}: line {line}: table {}", table.name), e).into(),
        }
    }
}

/// Writes the rows of one section and keeps the table's digest in step.
struct SectionWriter<'a> {
    table: &'a Table,
    op: Op,
    /// Values of a row.
    columns: usize,
    /// Which value of a row is the key's n-th.
    key: Vec<usize>,
    /// For an update: which value of a row replaces the table's n-th column.
    changed: Vec<Option<usize>>,
    /// Finds the row that is there.
    find: Option<Statement<'a>>,
    write: Statement<'a>,
    digest: StateDigest,
}

impl<'a> SectionWriter<'a> {
    fn new(db: &'a Connection, table: &'a Table, section: &Section, digest: StateDigest) -> rusqlite::Result<Self> {
        let columns: Vec<usize> = section.columns.iter().filter_map(|c| table.column(c.as_str())).collect();
        let key: Vec<usize> = table.key.iter().filter_map(|k| columns.iter().position(|c| c == k)).collect();
        let name = |c: usize| &table.columns[c].name;
        // Values are bound by their place in the row: ?1 is the first.
        let place = |n: usize| format!("?{}", n + 1);
        let conditions: Vec<String> =
            table.key.iter().zip(&key).map(|(k, n)| format!("\"{}\" = {}", name(*k), place(*n))).collect();
        let condition = conditions.join(" AND ");
        let quoted = table.quoted();
        let sql = match section.op {
            Op::Insert => {
                let places: Vec<String> = (0..columns.len()).map(place).collect();
                format!("INSERT INTO {quoted} ({}) VALUES ({})", table.column_list(), places.join(", "))
            }
            Op::Delete => format!("DELETE FROM {quoted} WHERE {condition}"),
            Op::Update => {
                let sets: Vec<String> = columns
                    .iter()
                    .enumerate()
                    .filter(|(n, _)| !key.contains(n))
                    .map(|(n, c)| format!("\"{}\" = {}", name(*c), place(n)))
                    .collect();
                format!("UPDATE {quoted} SET {} WHERE {condition}", sets.join(", "))
            }
        };
        let find = match section.op {
            Op::Insert => None,
            _ => Some(db.prepare(&format!("SELECT {} FROM {quoted} WHERE {condition}", table.column_list()))?),
        };
        let changed = (0..table.columns.len()).map(|c| columns.iter().position(|x| *x == c)).collect();
        let (op, columns, write) = (section.op, columns.len(), db.prepare(&sql)?);
        Ok(SectionWriter { table, op, columns, key, changed, find, write, digest })
    }

    /// Writes a row of the section, from its canonical form; `hash` is that of an inserted row.
    fn write(&mut self, row: &[u8], hash: RowHash, hasher: &mut RowHasher) -> Result<(), RowFault> {
        let row = value::from_canonical(row, self.columns).ok_or(RowFault::Line)?;
        // SQLite would give a NULL in an INTEGER PRIMARY KEY a number of its own choice.
        if self.key.iter().any(|k| row[*k] == Value::Null) {
            return Err(self.fault(&row, "a key with NULL"));
        }
        match self.op {
            Op::Insert => {
                self.execute(&row)?;
                self.digest.add(hash);
            }
            Op::Delete => {
                let (old, _) = self.find_old(&row, hasher)?;
                self.execute(&row)?;
                self.digest.subtract(old);
            }
            Op::Update => {
                let (old, new) = self.find_old(&row, hasher)?;
                self.execute(&row)?;
                self.digest.subtract(old);
                self.digest.add(new);
            }
        }
        Ok(())
    }

    /// The hash of the row that is there, and of what an update makes of it.
    fn find_old(&mut self, row: &[Value<'_>], hasher: &mut RowHasher) -> Result<(RowHash, RowHash), RowFault> {
        let (table, key) = (self.table, &self.key);
        let missing = || RowFault::Row { key: key_text(table, key, row), reason: "there is no such row".into() };
        let Some(find) = self.find.as_mut() else { return Err(missing()) };
        for k in &self.key {
            find.raw_bind_parameter(k + 1, &row[*k]).map_err(RowFault::Sqlite)?;
        }
        let mut rows = find.raw_query();
        let Some(found) = rows.next().map_err(RowFault::Sqlite)? else { return Err(missing()) };
        let columns = table.columns.len();
        let old = read_values(found, columns, Vec::with_capacity(columns)).map_err(RowFault::Sqlite)?;
        let before = hasher.hash(&old);
        let after = hasher.hash(old.iter().zip(&self.changed).map(|(o, c)| c.map_or(o, |n| &row[n])));
        Ok((before, after))
    }

    fn execute(&mut self, row: &[Value<'_>]) -> Result<(), RowFault> {
        for (n, v) in row.iter().enumerate() {
            self.write.raw_bind_parameter(n + 1, v).map_err(RowFault::Sqlite)?;
        }
        match self.write.raw_execute() {
            Ok(1) => Ok(()),
            Ok(n) => Err(self.fault(row, &format!("{n} rows were changed instead of one"))),
            Err(e) if sqlite::verdict(&e) == Verdict::Quarantine || sqlite::is_refused_value(&e) => {
                Err(self.fault(row, &e.to_string()))
            }
            Err(e) => Err(RowFault::Sqlite(e)),
        }
    }

    fn fault(&self, row: &[Value<'_>], reason: &str) -> RowFault {
        RowFault::Row { key: key_text(self.table, &self.key, row), reason: reason.to_owned() }
    }
}

/// A row's key for people: `sku="0042", zone="east"`.
fn key_text(table: &Table, key: &[usize], row: &[Value<'_>]) -> String {
    let parts = table.key.iter().zip(key).map(|(k, n)| format!("{}={}", table.columns[*k].name, row[*n].for_people()));
    parts.collect::<Vec<_>>().join(", ")
}

fn prove(pack: &str, contract: &Contract, found: &Digests, trailer: &Trailer) -> Result<(), ApplyError> {
    let error = |table: &TableName, wanted: String, found: StateDigest| {
        Err(ApplyError::Digest { pack: pack.to_owned(), table: table.clone(), wanted, found })
    };
    for t in &contract.tables {
        let digest = found.get(&t.name).copied().unwrap_or_default();
        match trailer.digests.get(&t.name) {
            Some(wanted) if *wanted == digest => {}
            Some(wanted) => return error(&t.name, wanted.to_string(), digest),
            None => return error(&t.name, "none in the trailer".into(), digest),
        }
    }
    Ok(())
}

fn write_held(db: &Connection, job: &Job<'_>, header: &crate::pack::Header, digests: &Digests) -> rusqlite::Result<()> {
    let stream = job.instance.stream.as_str();
    db.prepare_cached(
        "INSERT INTO tillcast_stream (stream, audience, version, epoch, schema, schema_sha256, ddl, digest, applied_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (stream) DO UPDATE SET audience = ?2, version = ?3, epoch = ?4, schema = ?5, schema_sha256 = ?6,
             ddl = ?7, digest = ?8, applied_at = ?9",
    )?
    .execute((
        stream,
        job.instance.audience.to_string(),
        header.version.as_i64(),
        job.epoch as i64,
        header.schema.number as i64,
        header.schema.sha256.to_string(),
        &header.schema.ddl,
        stream_digest(digests),
        job.now.to_string(),
    ))?;
    let mut write = db.prepare_cached(
        "INSERT INTO tillcast_table (name, stream, digest) VALUES (?1, ?2, ?3)
         ON CONFLICT (name) DO UPDATE SET digest = ?3 WHERE stream = ?2",
    )?;
    for (table, digest) in digests {
        write.execute((table.as_str(), stream, digest.to_string()))?;
    }
    Ok(())
}

pub(super) fn write_proof(
    db: &Connection,
    instance: &Instance,
    proof: (Version, PackKind, Sha256),
    now: Timestamp,
) -> rusqlite::Result<()> {
    let (version, kind, sha256) = proof;
    db.prepare_cached(
        "INSERT INTO tillcast_pack (stream, audience, version, kind, sha256, applied_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT DO UPDATE SET sha256 = ?5, applied_at = ?6",
    )?
    .execute((
        instance.stream.as_str(),
        instance.audience.to_string(),
        version.as_i64(),
        kind.to_string(),
        sha256.to_string(),
        now.to_string(),
    ))?;
    Ok(())
}

/// Whether a table that its stream lets go is to stay until another stream makes it anew.
fn stays(job: &Job<'_>, table: &TableName, coming: &Contract) -> bool {
    let elsewhere = |(stream, tables): (&StreamName, &Option<BTreeSet<TableName>>)| {
        *stream != job.instance.stream && may_have(tables, table)
    };
    coming.table(table).is_none() && job.listed.is_some_and(|l| l.iter().any(elsewhere))
}

/// Whether a table is, or may be, one of a listed stream.
fn may_have(tables: &Option<BTreeSet<TableName>>, table: &TableName) -> bool {
    tables.as_ref().is_none_or(|t| t.contains(table))
}

/// Forgets a stream. Its tables are dropped, but those that another stream is yet to make: they stay to be read, noted as
/// nobody's.
fn let_go(db: &Connection, job: &Job<'_>, stream: &StreamName, held: &Held, coming: &Contract) -> rusqlite::Result<()> {
    let (stay, go): (Vec<_>, Vec<_>) = held.digests.keys().partition(|t| stays(job, t, coming));
    for table in stay {
        db.execute("UPDATE tillcast_table SET stream = ?2 WHERE name = ?1", [table.as_str(), NOBODY])?;
    }
    drop_stream(db, stream, go.into_iter())
}

/// Whose tables are that stayed to be read.
const NOBODY: &str = "";

/// The tables that stayed to be read. A row whose name is none goes: it would be in the way of every full.
fn stayed(db: &Connection) -> rusqlite::Result<Vec<TableName>> {
    let mut list = db.prepare("SELECT name, rowid FROM tillcast_table WHERE stream = ?1")?;
    let mut rows = list.query([NOBODY])?;
    let (mut names, mut rotten) = (Vec::new(), Vec::<i64>::new());
    while let Some(r) = rows.next()? {
        match super::parsed(r, 0) {
            Ok(name) => names.push(name),
            Err(e) => {
                tracing::warn!(error = %e, "the name of a table that stayed to be read is forgotten");
                rotten.push(r.get(1)?);
            }
        }
    }
    drop(rows);
    for row in rotten {
        db.execute("DELETE FROM tillcast_table WHERE rowid = ?1", [row])?;
    }
    Ok(names)
}

/// What has a name that an index is to get: its kind, its table, and whether that is one of ours.
fn named(db: &Connection, index: &str) -> rusqlite::Result<Option<(String, String, bool)>> {
    let found = "SELECT type, tbl_name, EXISTS (SELECT 1 FROM tillcast_table WHERE name = tbl_name COLLATE NOCASE)
                 FROM sqlite_schema WHERE type IN ('index', 'view', 'table') AND name = ?1 COLLATE NOCASE";
    db.query_row(found, [index], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?))).optional()
}

/// Drops a stream's tables and its rows in ours.
pub(super) fn drop_stream<'t>(
    db: &Connection,
    stream: &StreamName,
    tables: impl Iterator<Item = &'t TableName>,
) -> rusqlite::Result<()> {
    for table in tables {
        drop_table(db, table)?;
    }
    db.execute("DELETE FROM tillcast_table WHERE stream = ?1", [stream.as_str()])?;
    db.execute("DELETE FROM tillcast_stream WHERE stream = ?1", [stream.as_str()])?;
    Ok(())
}

/// The indexes on a table that its contract does not have and that may refuse rows that are right, or cannot be written
/// here: those that are unique, partial, of an expression, or of a collation that is not SQLite's own.
pub(super) fn strange_indexes(db: &Connection, table: &Table) -> rusqlite::Result<Vec<String>> {
    let mut on = db.prepare(
        "SELECT name FROM pragma_index_list(?1) AS i WHERE origin = 'c' AND (\"unique\" OR partial
         OR EXISTS (SELECT 1 FROM pragma_index_xinfo(i.name)
                    WHERE cid = -2 OR upper(coll) NOT IN ('BINARY', 'NOCASE', 'RTRIM')))",
    )?;
    let found: Vec<String> = on.query_map([table.name.as_str()], |r| r.get(0))?.collect::<Result<_, _>>()?;
    let is_ours = |index: &String| table.indexes.iter().any(|(name, _)| folded(name) == folded(index));
    Ok(found.into_iter().filter(|i| !is_ours(i)).collect())
}

/// Whether what has a table's name, and is about to go, has rows that we know nothing of: no note, and not the columns
/// either, as a rest of a stream that was forgotten, or a table that stayed to be read, has. A look that fails stops nothing.
fn is_strange(db: &Connection, coming: &Table) -> bool {
    let look = || -> rusqlite::Result<bool> {
        let mut columns = db.prepare("SELECT name FROM pragma_table_info(?1) ORDER BY cid")?;
        let columns: Vec<String> =
            columns.query_map([coming.name.as_str()], |r| r.get(0))?.collect::<Result<_, _>>()?;
        let is_ours = columns.iter().zip(&coming.columns).all(|(found, ours)| found == ours.name.as_str());
        let noted = "SELECT EXISTS (SELECT 1 FROM tillcast_table WHERE name = ?1)";
        if is_ours || db.query_row(noted, [coming.name.as_str()], |r| r.get(0))? {
            return Ok(false);
        }
        db.query_row(&format!("SELECT EXISTS (SELECT 1 FROM {})", coming.quoted()), [], |r| r.get(0))
    };
    look().unwrap_or(false)
}

/// Drops what has a name, of whatever kind SQLite calls it.
fn drop_named(db: &Connection, kind: &str, name: &str) -> rusqlite::Result<()> {
    db.execute_batch(&format!("DROP {kind} IF EXISTS \"{}\"", name.replace('"', "\"\"")))
}

/// Drops a table, or what else has its name and keeps it from being made, if it is there, and its row in ours.
fn drop_table(db: &Connection, table: &TableName) -> rusqlite::Result<()> {
    let kind = "SELECT type FROM sqlite_schema WHERE name = ?1 COLLATE NOCASE AND type IN ('table', 'view', 'index')";
    let kind: Option<String> = db.query_row(kind, [table.as_str()], |r| r.get(0)).optional()?;
    if let Some(kind) = kind {
        if kind != "table" {
            tracing::warn!(%table, %kind, "it has the name of a contract's table: the table takes its place");
        }
        drop_named(db, &kind, table.as_str())?;
    }
    db.execute("DELETE FROM tillcast_table WHERE name = ?1", [table.as_str()])?;
    Ok(())
}

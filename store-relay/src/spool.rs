//! `relay.db`: what must survive a restart beside the shadow: the latest heartbeat of each register, the
//! capped event log, failed tries, and since when an object is no longer listed or missing. One connection, one
//! process. Every call is one durable transaction: at success it survives a power cut, before that
//! nothing of it happened. A damaged file is set aside and begun anew: what it held comes again.

use crate::tries::Attempts;
use proto::clock::Timestamp;
use proto::failpoint;
use proto::ids::{DeviceId, RegisterId, StreamName};
use proto::layout::{ObjectName, PackName};
use proto::replica::sqlite::{self, Checkpoint, SqliteError};
use proto::retry::Verdict;
use proto::shelf::{self, ShelfError};
use proto::wire::Fault;
use rusqlite::{Connection, Row};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The file's name in the data directory.
pub const FILE: &str = "relay.db";

/// The spool failed.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// Setting a damaged file aside.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// A sync failed: it is not tried again.
    #[error("{FILE}: a sync failed before")]
    Halted,
}

impl SpoolError {
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        match self {
            SpoolError::Sqlite(e) => e.verdict(),
            SpoolError::Shelf(e) => e.verdict(),
            SpoolError::Halted => Verdict::Halt,
        }
    }
    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            SpoolError::Sqlite(e) => e.is_disk_full(),
            SpoolError::Shelf(e) => e.is_disk_full(),
            SpoolError::Halted => false,
        }
    }
    /// Whether the file as it is can be of no use: a later build wrote it, or a row that no read can make sense of.
    fn is_useless(&self) -> bool {
        matches!(self, SpoolError::Sqlite(e) if e.is_newer() || e.is_unreadable())
    }
}

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS beat (
        register TEXT PRIMARY KEY, key TEXT NOT NULL, seq INTEGER NOT NULL, heard_at TEXT NOT NULL,
        envelope TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS event (
        id INTEGER PRIMARY KEY, at TEXT NOT NULL, code TEXT NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS attempt (pack TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS drift (stream TEXT PRIMARY KEY, since TEXT NOT NULL, text TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS over (id INTEGER PRIMARY KEY, fault TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS refusal (source TEXT PRIMARY KEY, fault TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS address (id INTEGER PRIMARY KEY, ip TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE IF NOT EXISTS moment (
        of TEXT NOT NULL, name TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (of, name)) STRICT;
    CREATE TABLE IF NOT EXISTS unlisted (object TEXT PRIMARY KEY, since TEXT NOT NULL) STRICT;";

/// Addresses kept: more than a store has registers.
const ADDRESSES: u32 = 512;

/// The latest heartbeat of a register, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptBeat {
    /// Who sent it.
    pub register: RegisterId,
    /// The key that it is signed by (64 hex digits): a new one starts its sequence anew.
    pub key: String,
    /// Its sequence number.
    pub seq: u64,
    /// When it was heard, by this machine's clock.
    pub heard_at: Timestamp,
    /// The signed envelope as JSON.
    pub envelope: String,
}

/// Something that happened, for whoever asks later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, UTC by this machine's clock.
    pub at: Timestamp,
    /// A stable name.
    pub code: String,
    /// The stream, pack, register or source that it concerns; may be empty.
    pub subject: String,
    /// For people.
    pub text: String,
}

/// The open spool.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    db: Mutex<Connection>,
    /// Heartbeats that came while others were written.
    waiting: Mutex<Vec<Arc<Waiting>>>,
    events: u32,
    lost: Option<String>,
    /// Whether a sync failed: nothing is written any more.
    halted: AtomicBool,
    /// Whether it was begun anew by this process: not twice, the disk may be dying.
    renewed: AtomicBool,
}

#[derive(Debug)]
struct Waiting {
    beat: KeptBeat,
    kept: AtomicBool,
}

impl Spool {
    /// Opens the spool, and keeps at most `events` entries in its log.
    pub fn open(dir: &Path, events: u32) -> Result<Spool, SpoolError> {
        let path = dir.join(FILE);
        match Spool::open_whole(&path, events) {
            Err(e) if e.verdict() == Verdict::Rebuild && !sqlite::is_damaged(&path) => {
                tracing::warn!(error = %e, "relay.db could not be read; it can at a second look");
                Spool::open_whole(&path, events)
            }
            Err(e) if e.verdict() == Verdict::Rebuild || e.is_useless() => {
                tracing::error!(error = %e, "relay.db cannot be used; it is set aside and begun anew");
                set_aside(&path)?;
                Ok(Spool { lost: Some(e.to_string()), ..Spool::open_whole(&path, events)? })
            }
            opened => opened,
        }
    }

    /// Opens the file, and sees whether all that is ever asked of it can be read.
    fn open_whole(path: &Path, events: u32) -> Result<Spool, SpoolError> {
        let spool = Spool::around(path, open_file(path)?, events);
        spool.beats()?;
        spool.addresses()?;
        spool.attempts()?;
        spool.drifts()?;
        spool.over()?;
        spool.refusals()?;
        spool.all_unlisted()?;
        spool.all_moments()?;
        spool.events(events)?;
        Ok(spool)
    }

    fn around(path: &Path, db: Connection, events: u32) -> Spool {
        let (db, waiting) = (Mutex::new(db), Mutex::default());
        let (halted, renewed) = (AtomicBool::new(false), AtomicBool::new(false));
        Spool { path: path.to_owned(), db, waiting, events, lost: None, halted, renewed }
    }

    /// The spool of a relay that another process works on: to be read alone. One that its first command has not made yet is
    /// empty.
    pub fn open_read_only(dir: &Path) -> Result<Spool, SpoolError> {
        let path = dir.join(FILE);
        if path.exists() {
            let spool = Spool::around(&path, sqlite::open_read_only(&path)?, 0);
            if spool.is_made()? {
                return Ok(spool);
            }
        }
        let none = Connection::open_in_memory().and_then(|db| db.execute_batch(SCHEMA).map(|()| db));
        Ok(Spool::around(&path, none.map_err(|e| SqliteError::new("a place for nothing", e))?, 0))
    }

    /// Whether its last table is there.
    fn is_made(&self) -> Result<bool, SpoolError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'unlisted')";
        let made = self.db().query_row(sql, [], |r| r.get(0));
        Ok(made.map_err(|e| SqliteError::new(format!("reading {}", self.path.display()), e))?)
    }

    /// Why it was begun anew, if it was.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// A write met damage: the file is opened anew, and set aside if it is damaged indeed. What was in it comes again. Once a
    /// process, unless that failed; whether what it held is gone, if it was done.
    pub fn begin_anew(&self, why: &SpoolError) -> Result<Option<bool>, SpoolError> {
        let is_lost = why.verdict() == Verdict::Rebuild || why.is_useless();
        if !is_lost || self.renewed.swap(true, Ordering::Relaxed) {
            return Ok(None);
        }
        let begun = self.open_anew(why);
        if begun.is_err() {
            self.renewed.store(false, Ordering::Relaxed);
        }
        begun.map(Some)
    }

    fn open_anew(&self, why: &SpoolError) -> Result<bool, SpoolError> {
        let mut db = self.db();
        // It waits since a call before this one: what is wrong there is not the file's.
        let waits = db.path().is_none_or(str::is_empty);
        // The last to close a database takes the log of that name along: not the next one's.
        *db = Connection::open_in_memory().map_err(|e| SqliteError::new("a place to wait", e))?;
        if (why.is_useless() && !waits) || sqlite::is_damaged(&self.path) {
            set_aside(&self.path)?;
        }
        let lost = !self.path.exists();
        *db = open_file(&self.path)?;
        Ok(lost)
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Arc<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a heartbeat in place of the register's last. Those that come while others are written are written together,
    /// in their order: thirty registers that report at once wait for two syncs, not for thirty. Where together they
    /// cannot be kept, each is tried by itself, unless a sync failed.
    pub fn keep_beat(&self, beat: KeptBeat) -> Result<(), SpoolError> {
        let mine = Arc::new(Waiting { beat, kept: AtomicBool::new(false) });
        self.waiting().push(Arc::clone(&mine));
        let mut db = self.db();
        // Whoever wrote meanwhile took ours along.
        if mine.kept.load(Ordering::Acquire) {
            return Ok(());
        }
        let together = std::mem::take(&mut *self.waiting());
        if together.len() > 1 {
            match self.write_beats(&mut db, &together) {
                Ok(()) => together.iter().for_each(|w| w.kept.store(true, Ordering::Release)),
                Err(e) if e.verdict() == Verdict::Halt => return Err(e),
                Err(_) => {}
            }
            // Unless a group with ours failed before.
            if mine.kept.load(Ordering::Acquire) {
                return Ok(());
            }
        }
        self.write_beats(&mut db, &[mine])
    }

    /// The latest heartbeat of each register.
    pub fn beats(&self) -> Result<Vec<KeptBeat>, SpoolError> {
        self.read("reading heartbeats", "SELECT register, key, seq, heard_at, envelope FROM beat", |r| {
            Ok(KeptBeat {
                register: parsed(r, 0)?,
                key: r.get(1)?,
                seq: u64::try_from(r.get::<_, i64>(2)?).unwrap_or_default(),
                heard_at: parsed(r, 3)?,
                envelope: r.get(4)?,
            })
        })
    }

    /// Forgets a register that the manifest lists no more.
    pub fn forget_beat(&self, device: &DeviceId) -> Result<(), SpoolError> {
        self.write("forgetting a register", failpoint::name("spool.forget-beat"), |db| {
            db.execute("DELETE FROM beat WHERE register = ?1", [device.as_str()])
        })
    }

    /// Keeps an address that registers report from: a flood must not lock them out after a restart. The oldest go.
    pub fn keep_address(&self, ip: IpAddr) -> Result<(), SpoolError> {
        self.write("keeping an address", failpoint::name("spool.address"), |db| {
            db.execute("INSERT OR REPLACE INTO address (ip) VALUES (?1)", [ip.to_string()])?;
            db.execute(
                "DELETE FROM address WHERE id <= (SELECT id FROM address ORDER BY id DESC LIMIT 1 OFFSET ?1)",
                [ADDRESSES],
            )
        })
    }

    /// The addresses that registers reported from.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, SpoolError> {
        self.read("reading addresses", "SELECT ip FROM address", |r| parsed(r, 0))
    }

    /// Adds to the log; the oldest entries go.
    pub fn log(&self, event: &Event) -> Result<(), SpoolError> {
        self.write("writing the log", failpoint::name("spool.event"), |db| {
            db.prepare_cached("INSERT INTO event (at, code, subject, text) VALUES (?1, ?2, ?3, ?4)")?.execute((
                event.at.to_string(),
                &event.code,
                &event.subject,
                &event.text,
            ))?;
            let oldest = db.last_insert_rowid() - i64::from(self.events);
            db.prepare_cached("DELETE FROM event WHERE id <= ?1")?.execute([oldest])
        })
    }

    /// The newest entries of the log, newest first.
    pub fn events(&self, count: u32) -> Result<Vec<Event>, SpoolError> {
        let sql = format!("SELECT at, code, subject, text FROM event ORDER BY id DESC LIMIT {count}");
        self.read("reading the log", &sql, |r| {
            Ok(Event { at: parsed(r, 0)?, code: r.get(1)?, subject: r.get(2)?, text: r.get(3)? })
        })
    }

    /// The packs that failed.
    pub fn attempts(&self) -> Result<BTreeMap<PackName, Attempts>, SpoolError> {
        let rows = self.read("reading tries", "SELECT pack, record FROM attempt", |r| {
            let record = serde_json::from_str(r.get_ref(1)?.as_str()?).map_err(|e| conversion(1, e))?;
            Ok((parsed(r, 0)?, record))
        })?;
        Ok(rows.into_iter().collect())
    }

    /// Records a pack's failure.
    pub fn put_attempts(&self, pack: &PackName, attempts: &Attempts) -> Result<(), SpoolError> {
        // Plain fields: writing them as JSON cannot fail.
        let record = serde_json::to_string(attempts).unwrap_or_default();
        self.write("recording a try", failpoint::name("spool.try"), |db| {
            db.execute("INSERT OR REPLACE INTO attempt VALUES (?1, ?2)", (pack.to_string(), record))
        })
    }

    /// Forgets a pack's failures.
    pub fn forget_attempts(&self, pack: &PackName) -> Result<(), SpoolError> {
        self.write("forgetting tries", failpoint::name("spool.forgive"), |db| {
            db.execute("DELETE FROM attempt WHERE pack = ?1", [pack.to_string()])
        })
    }

    /// The streams whose shadow rows were found wrong, since when, and what was found.
    pub fn drifts(&self) -> Result<BTreeMap<StreamName, (Timestamp, String)>, SpoolError> {
        let sql = "SELECT stream, since, text FROM drift";
        let rows = self.read("reading drifts", sql, |r| Ok((parsed(r, 0)?, (parsed(r, 1)?, r.get(2)?))))?;
        Ok(rows.into_iter().collect())
    }

    /// Latches a drift until a full has healed it.
    pub fn latch_drift(&self, stream: &StreamName, since: Timestamp, text: &str) -> Result<(), SpoolError> {
        self.write("latching a drift", failpoint::name("spool.drift"), |db| {
            db.execute("INSERT OR IGNORE INTO drift VALUES (?1, ?2, ?3)", (stream.as_str(), since.to_string(), text))
        })
    }

    /// The drift is healed.
    pub fn clear_drift(&self, stream: &StreamName) -> Result<(), SpoolError> {
        self.write("clearing a drift", failpoint::name("spool.healed"), |db| {
            db.execute("DELETE FROM drift WHERE stream = ?1", [stream.as_str()])
        })
    }

    /// What is over and headquarters has not heard of, oldest first.
    pub fn over(&self) -> Result<Vec<Fault>, SpoolError> {
        self.read("reading what is over", "SELECT fault FROM over ORDER BY id", |r| {
            serde_json::from_str(r.get_ref(0)?.as_str()?).map_err(|e| conversion(0, e))
        })
    }

    /// Keeps what is over until headquarters has heard of it.
    pub fn keep_over(&self, faults: &[Fault]) -> Result<(), SpoolError> {
        self.write("keeping what is over", failpoint::name("spool.over"), |db| {
            db.execute("DELETE FROM over", [])?;
            let mut insert = db.prepare_cached("INSERT INTO over (fault) VALUES (?1)")?;
            // Plain fields: writing them as JSON cannot fail.
            faults.iter().map(|f| insert.execute([serde_json::to_string(f).unwrap_or_default()])).sum()
        })
    }

    /// What sources hold that was refused, by source.
    pub fn refusals(&self) -> Result<Vec<(String, Fault)>, SpoolError> {
        self.read("reading refusals", "SELECT source, fault FROM refusal", |r| {
            Ok((r.get(0)?, serde_json::from_str(r.get_ref(1)?.as_str()?).map_err(|e| conversion(1, e))?))
        })
    }

    /// Keeps a refusal until the source has something better.
    pub fn keep_refusal(&self, source: &str, fault: &Fault) -> Result<(), SpoolError> {
        // Plain fields: writing them as JSON cannot fail.
        let text = serde_json::to_string(fault).unwrap_or_default();
        self.write("keeping a refusal", failpoint::name("spool.refuse"), |db| {
            db.execute("INSERT OR REPLACE INTO refusal VALUES (?1, ?2)", (source, text))
        })
    }

    /// The source has something better.
    pub fn forget_refusal(&self, source: &str) -> Result<(), SpoolError> {
        self.write("forgetting a refusal", failpoint::name("spool.accept"), |db| {
            db.execute("DELETE FROM refusal WHERE source = ?1", [source])
        })
    }

    /// Takes down which objects are not listed now; gives since when each has not been.
    pub fn unlisted(
        &self,
        objects: &[ObjectName],
        now: Timestamp,
    ) -> Result<BTreeMap<ObjectName, Timestamp>, SpoolError> {
        let known = self.all_unlisted()?;
        let since: BTreeMap<ObjectName, Timestamp> =
            objects.iter().map(|o| (o.clone(), known.get(o).copied().unwrap_or(now))).collect();
        if since != known {
            self.write("writing unlisted objects", failpoint::name("spool.unlisted"), |db| {
                db.execute("DELETE FROM unlisted", [])?;
                let mut insert = db.prepare("INSERT INTO unlisted VALUES (?1, ?2)")?;
                for (object, since) in &since {
                    insert.execute((object.to_string(), since.to_string()))?;
                }
                Ok(0)
            })?;
        }
        Ok(since)
    }

    fn all_unlisted(&self) -> Result<BTreeMap<ObjectName, Timestamp>, SpoolError> {
        let rows = self.read("reading unlisted objects", "SELECT object, since FROM unlisted", |r| {
            Ok((parsed::<ObjectName>(r, 0)?, parsed::<Timestamp>(r, 1)?))
        })?;
        Ok(rows.into_iter().collect())
    }

    /// Moments of one kind, by what each is of: since when a pack is missing, when a stream's rows were read last.
    pub fn moments(&self, of: &str) -> Result<BTreeMap<String, Timestamp>, SpoolError> {
        let all = self.all_moments()?.into_iter();
        Ok(all.filter(|(kind, _, _)| kind == of).map(|(_, name, at)| (name, at)).collect())
    }

    fn all_moments(&self) -> Result<Vec<(String, String, Timestamp)>, SpoolError> {
        let sql = "SELECT of, name, at FROM moment";
        self.read("reading moments", sql, |r| Ok((r.get(0)?, r.get(1)?, parsed(r, 2)?)))
    }

    /// Keeps a moment, in place of the one before.
    pub fn keep_moment(&self, of: &str, name: &str, at: Timestamp) -> Result<(), SpoolError> {
        self.write("keeping a moment", failpoint::name("spool.moment"), |db| {
            db.execute("INSERT OR REPLACE INTO moment VALUES (?1, ?2, ?3)", (of, name, at.to_string()))
        })
    }

    /// Forgets a moment.
    pub fn forget_moment(&self, of: &str, name: &str) -> Result<(), SpoolError> {
        self.write("forgetting a moment", failpoint::name("spool.forget-moment"), |db| {
            db.execute("DELETE FROM moment WHERE of = ?1 AND name = ?2", (of, name))
        })
    }

    /// Brings the WAL home.
    pub fn checkpoint(&self, how: Checkpoint) -> Result<(), SpoolError> {
        let db = self.db();
        self.unless_halted(|| Ok(sqlite::checkpoint(&db, how)?))
    }

    /// Does what syncs, unless a sync failed before.
    fn unless_halted(&self, f: impl FnOnce() -> Result<(), SpoolError>) -> Result<(), SpoolError> {
        if self.halted.load(Ordering::Acquire) {
            return Err(SpoolError::Halted);
        }
        let done = f();
        if done.as_ref().is_err_and(|e| e.verdict() == Verdict::Halt) {
            self.halted.store(true, Ordering::Release);
        }
        done
    }

    fn write(
        &self,
        what: &str,
        step: &'static str,
        f: impl FnOnce(&Connection) -> rusqlite::Result<usize>,
    ) -> Result<(), SpoolError> {
        let mut db = self.db();
        self.unless_halted(|| write(&mut db, what, step, f))
    }

    fn write_beats(&self, db: &mut Connection, beats: &[Arc<Waiting>]) -> Result<(), SpoolError> {
        let insert_all = |db: &Connection| {
            let mut insert = db.prepare_cached("INSERT OR REPLACE INTO beat VALUES (?1, ?2, ?3, ?4, ?5)")?;
            let seq = |beat: &KeptBeat| i64::try_from(beat.seq).unwrap_or(i64::MAX);
            let mut keep = |b: &KeptBeat| {
                insert.execute((b.register.as_str(), &b.key, seq(b), b.heard_at.to_string(), &b.envelope))
            };
            beats.iter().map(|w| keep(&w.beat)).sum()
        };
        self.unless_halted(|| write(db, "keeping heartbeats", failpoint::name("spool.beat"), insert_all))
    }

    fn read<T>(
        &self,
        what: &str,
        sql: &str,
        row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, SpoolError> {
        let db = self.db();
        let rows = || -> rusqlite::Result<Vec<T>> { db.prepare_cached(sql)?.query_map([], row)?.collect() };
        rows().map_err(|e| SqliteError::new(format!("{FILE}: {what}"), e).into())
    }
}

fn write(
    db: &mut Connection,
    what: &str,
    step: &'static str,
    f: impl FnOnce(&Connection) -> rusqlite::Result<usize>,
) -> Result<(), SpoolError> {
    let error = |e| SqliteError::new(format!("{FILE}: {what}"), e);
    let tx = db.transaction().map_err(error)?;
    f(&tx).map_err(error)?;
    failpoint::step(step, || tx.commit()).map_err(error)?;
    // Small and often: the WAL would grow without end otherwise.
    sqlite::checkpoint(db, Checkpoint::Passive)?;
    Ok(())
}

fn open_file(path: &Path) -> Result<Connection, SpoolError> {
    let db = sqlite::open_private(path)?;
    sqlite::refuse_newer(&db, path, 0)?;
    db.execute_batch(SCHEMA).map_err(|e| SqliteError::new(format!("opening {}", path.display()), e))?;
    Ok(db)
}

/// Moves a damaged database out of the way, to be looked at later; an older one of its kind goes.
pub fn set_aside(path: &Path) -> Result<(), ShelfError> {
    for suffix in ["-wal", "-shm", ""] {
        let (mut from, mut to) = (path.as_os_str().to_owned(), path.as_os_str().to_owned());
        from.push(suffix);
        to.push(format!(".damaged{suffix}"));
        let (from, to) = (Path::new(&from), Path::new(&to));
        if from.is_file() {
            shelf::promote(from, to)?;
        } else {
            shelf::remove(to)?;
        }
    }
    Ok(())
}

fn parsed<T: FromStr>(r: &Row<'_>, i: usize) -> rusqlite::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    r.get_ref(i)?.as_str()?.parse().map_err(|e| conversion(i, e))
}

fn conversion(i: usize, e: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(i, rusqlite::types::Type::Text, Box::new(e))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    fn t(s: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + s).unwrap()
    }

    fn beat(register: &str, seq: u64) -> KeptBeat {
        KeptBeat { register: register.parse().unwrap(), key: "ab".into(), seq, heard_at: t(0), envelope: "{}".into() }
    }

    #[test]
    fn what_was_kept_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let beat = |seq| beat("0421-03", seq);
        let (stream, object): (StreamName, ObjectName) = ("price".parse().unwrap(), "trust.json".parse().unwrap());
        {
            let spool = Spool::open(dir.path(), 10).unwrap();
            spool.keep_beat(beat(1)).unwrap();
            spool.keep_beat(beat(2)).unwrap();
            spool.latch_drift(&stream, t(1), "table price").unwrap();
            spool.latch_drift(&stream, t(9), "again").unwrap();
            spool.unlisted(std::slice::from_ref(&object), t(2)).unwrap();
        }
        let spool = Spool::open(dir.path(), 10).unwrap();
        assert_eq!(spool.beats().unwrap(), [beat(2)]);
        assert_eq!(spool.drifts().unwrap()[&stream], (t(1), "table price".into()));
        assert_eq!(spool.unlisted(std::slice::from_ref(&object), t(50)).unwrap()[&object], t(2));
        assert!(spool.unlisted(&[], t(60)).unwrap().is_empty());
        assert_eq!(spool.unlisted(std::slice::from_ref(&object), t(70)).unwrap()[&object], t(70));
    }

    #[test]
    fn heartbeats_that_come_together_are_written_together() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), 10).unwrap();
        let beat = |n, envelope: &str| KeptBeat { envelope: envelope.into(), ..beat(&format!("0421-{n}"), n) };
        let commits = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let counted = Arc::clone(&commits);
        let count = move || counted.fetch_add(1, Ordering::Relaxed) == u32::MAX;
        spool.db().commit_hook(Some(count)).unwrap();
        let all = |refused: bool| {
            std::thread::scope(|threads| {
                let busy = spool.db();
                let keep = |n| spool.keep_beat(beat(n, if refused && n == 7 { "never" } else { "{}" }));
                let posts: Vec<_> = (1..=30).map(|n| threads.spawn(move || keep(n))).collect();
                while spool.waiting().len() < 30 {
                    std::thread::yield_now();
                }
                drop(busy);
                posts.into_iter().map(|p| p.join().unwrap().is_ok()).collect::<Vec<_>>()
            })
        };
        assert_eq!(all(false), [true; 30]);
        assert_eq!((commits.load(Ordering::Relaxed), spool.beats().unwrap().len()), (1, 30));
        // One that cannot be kept spoils no other's.
        spool
            .db()
            .execute_batch(
                "DELETE FROM beat; CREATE TEMP TRIGGER never BEFORE INSERT ON beat WHEN new.envelope = 'never'
                 BEGIN SELECT RAISE(ABORT, 'on purpose'); END;",
            )
            .unwrap();
        assert_eq!(all(true).iter().filter(|kept| **kept).count(), 29);
        assert_eq!(spool.beats().unwrap().len(), 29);
    }

    #[test]
    fn a_spool_that_is_emptied_or_bent_while_it_is_open_is_begun_anew_once() {
        for bent in [&b""[..], &[b'x'; 20_000]] {
            let dir = tempfile::tempdir().unwrap();
            let spool = Spool::open(dir.path(), 10).unwrap();
            let beat = |n| beat(&format!("0421-{n}"), n);
            for round in 1..=2 {
                spool.keep_beat(beat(1)).unwrap();
                std::fs::write(dir.path().join(FILE), bent).unwrap();
                // What SQLite has in memory hides it for a while.
                spool.db().release_memory().unwrap();
                let error = (2..9).find_map(|n| spool.keep_beat(beat(n)).err()).unwrap();
                let begun = spool.begin_anew(&error).unwrap();
                assert_eq!(begun.is_some(), round == 1, "{error}");
                // The log of one that was emptied may have all of it.
                assert!(begun.is_none_or(|lost| lost == spool.beats().unwrap().is_empty()), "{error}");
            }
            drop(spool);
            assert!(Spool::open(dir.path(), 10).is_ok());
        }
    }

    #[test]
    fn a_spool_that_cannot_be_begun_anew_is_tried_again_and_one_that_is_sound_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (file, aside) = (dir.path().join(FILE), dir.path().join("relay.db.damaged"));
        let spool = Spool::open(dir.path(), 10).unwrap();
        let beat = beat("0421-03", 1);
        spool.keep_beat(beat.clone()).unwrap();
        spool.checkpoint(Checkpoint::Truncate).unwrap();
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
        let corrupt = SqliteError::new("a test", rusqlite::Error::SqliteFailure(code, None)).into();
        let sound = std::fs::read(&file).unwrap();
        std::fs::write(&file, [b'x'; 20_000]).unwrap();
        std::fs::create_dir(&aside).unwrap();
        assert!(spool.begin_anew(&corrupt).is_err(), "it cannot be set aside");
        let error = spool.keep_beat(beat.clone()).unwrap_err();
        assert!(spool.begin_anew(&error).is_err(), "nor now");
        // What lies there is right again: the place to wait said nothing of it.
        std::fs::write(&file, sound).unwrap();
        let error = spool.keep_beat(beat.clone()).unwrap_err();
        assert_eq!(spool.begin_anew(&error).unwrap(), Some(false));
        assert_eq!(spool.beats().unwrap(), [beat]);
        assert_eq!(spool.begin_anew(&corrupt).unwrap(), None, "once");
    }

    #[test]
    fn addresses_are_kept_and_capped() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), 3).unwrap();
        let ip = |n: u32| IpAddr::from(n.to_be_bytes());
        for n in (0..600).chain([200]) {
            spool.keep_address(ip(n)).unwrap();
        }
        let kept = Spool::open(dir.path(), 3).unwrap().addresses().unwrap();
        assert_eq!(kept.len(), 512);
        assert!(kept.contains(&ip(599)) && kept.contains(&ip(200)) && !kept.contains(&ip(5)));
    }

    #[test]
    fn the_log_is_capped_and_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), 3).unwrap();
        for n in 0..10 {
            spool.log(&Event { at: t(n), code: "X".into(), subject: String::new(), text: n.to_string() }).unwrap();
        }
        let texts: Vec<String> = spool.events(100).unwrap().into_iter().map(|e| e.text).collect();
        assert_eq!(texts, ["9", "8", "7"]);
    }

    /// Each table, its row damaged, and pages far from the first.
    #[test]
    fn a_spool_with_a_row_or_a_page_that_cannot_be_read_is_set_aside() {
        let many = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500)
            INSERT INTO event (at, code, subject, text)
            SELECT '2026-01-01T00:00:00Z', 'X', '', hex(zeroblob(150)) FROM n";
        for sql in [
            "INSERT INTO beat VALUES ('no id!', 'ab', 1, '2026-01-01T00:00:00Z', '{}')",
            "INSERT INTO beat VALUES ('0421-03', 'ab', 1, 'yesterday', '{}')",
            "INSERT INTO event (at, code, subject, text) VALUES ('?', 'X', '', '')",
            "INSERT INTO attempt VALUES ('price@all/0000000001.full.pack', '{]')",
            "INSERT INTO drift VALUES ('price', '?', '')",
            "INSERT INTO over (fault) VALUES ('?')",
            "INSERT INTO refusal VALUES ('x', '?')",
            "INSERT INTO address (ip) VALUES ('300.1.1.1')",
            "INSERT INTO unlisted VALUES ('?', '?')",
            "",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(FILE);
            let spool = Spool::open(dir.path(), 1000).unwrap();
            spool.db().execute_batch(many).unwrap();
            spool.db().execute_batch(sql).unwrap();
            spool.checkpoint(Checkpoint::Truncate).unwrap();
            drop(spool);
            if sql.is_empty() {
                let mut bytes = std::fs::read(&path).unwrap();
                assert!(bytes.len() > 100_000);
                bytes[60_000..80_000].fill(0x55);
                std::fs::write(&path, bytes).unwrap();
            }
            let spool = Spool::open(dir.path(), 1000).unwrap();
            assert!(spool.lost().is_some() && spool.events(9).unwrap().is_empty(), "{sql}");
            assert!(dir.path().join("relay.db.damaged").is_file(), "{sql}");
            drop(spool);
            assert!(Spool::open(dir.path(), 1000).unwrap().lost().is_none(), "{sql}");
        }
    }

    #[test]
    fn a_sync_that_failed_is_not_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), 3).unwrap();
        sqlite::assert_settings(&spool.db());
        let commits = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let counted = Arc::clone(&commits);
        spool.db().commit_hook(Some(move || counted.fetch_add(1, Ordering::Relaxed) == u32::MAX)).unwrap();
        let failed = rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR_FSYNC), None);
        let first = spool.write("a test", failpoint::name("spool.event"), |_| Err(failed)).unwrap_err();
        assert_eq!(first.verdict(), Verdict::Halt);
        let beat = beat("0421-03", 1);
        assert_eq!(spool.keep_beat(beat).unwrap_err().verdict(), Verdict::Halt);
        assert_eq!(spool.checkpoint(Checkpoint::Passive).unwrap_err().verdict(), Verdict::Halt);
        assert_eq!(commits.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_damaged_spool_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join(FILE),
            "rubbish, and more of it than a header of SQLite has bytes, which are a hundred, so this goes on",
        )
        .unwrap();
        let spool = Spool::open(dir.path(), 3).unwrap();
        assert!(spool.beats().unwrap().is_empty());
        assert!(dir.path().join("relay.db.damaged").is_file());
    }
}

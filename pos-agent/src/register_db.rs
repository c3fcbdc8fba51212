//! The register's database, `store.db`: the one file that the POS application reads.
//!
//! Owns the only writing connection and the file's size (checkpoints, room on the disk). Never
//! changes a row but through a proved pack. If the power goes, the file holds the version before or
//! the version after, whole: version and rows commit together.

use crate::plan::At;
use proto::clock::Timestamp;
use proto::failpoint;
use proto::ids::{Instance, StreamName};
use proto::limits::Limits;
use proto::manifest::{Manifest, PackEntry};
pub use proto::replica::sqlite::log_path;
use proto::replica::sqlite::{self, Checkpoint, SqliteError};
use proto::replica::{Applied, ApplyError, Held, Job, PackFile, Replica, TableCheck, VerifyError};
use proto::retry::Verdict;
use proto::shelf::{self, ShelfError};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The file's name, as faults name it.
pub const STORE_DB: &str = "store.db";

/// What a fault about its log or the log's index is about.
pub const STORE_LOG: &str = "store.db-wal";

/// What a second look at a file found that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Healed {
    /// Nothing.
    Sound,
    /// Rows of ours, now gone: of which stream, if that could be read, and why.
    Forgot(Vec<(Option<StreamName>, String)>),
    /// It must be begun anew.
    Lost,
}

/// The streams held, by name.
pub type AllHeld = BTreeMap<StreamName, Held>;

/// The database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// The file could not be moved aside.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// Rows whose contract is refused here were not checked; the text says why.
    #[error("{0}")]
    NotChecked(String),
    /// The work was cut off (a panic, the end of the process).
    #[error("work on the database was cut off: {0}")]
    Cut(String),
    /// Nothing may be written by a connection whose files lie there no more.
    #[error("{} was replaced or deleted below the agent", .0.display())]
    Swapped(PathBuf),
}

impl DbError {
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        match self {
            DbError::Sqlite(e) => e.verdict(),
            DbError::Shelf(e) => e.verdict(),
            DbError::NotChecked(_) | DbError::Cut(_) | DbError::Swapped(_) => Verdict::Retry,
        }
    }
    /// Whether what is in the file cannot be understood.
    pub fn is_unreadable(&self) -> bool {
        matches!(self, DbError::Sqlite(e) if e.is_unreadable())
    }
    /// Whether another program holds the file.
    pub fn is_busy(&self) -> bool {
        matches!(self, DbError::Sqlite(e) if e.is_busy())
    }
    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            DbError::Sqlite(e) => e.is_disk_full(),
            DbError::Shelf(e) => e.is_disk_full(),
            DbError::NotChecked(_) | DbError::Cut(_) | DbError::Swapped(_) => false,
        }
    }
}

impl From<VerifyError> for DbError {
    fn from(e: VerifyError) -> DbError {
        match e {
            VerifyError::Sqlite(e) => e.into(),
            VerifyError::Contract { .. } => DbError::NotChecked(e.to_string()),
        }
    }
}

/// The database, open; clones share the connection.
#[derive(Debug, Clone)]
pub struct RegisterDb {
    path: PathBuf,
    limits: Limits,
    open: Arc<Mutex<Open>>,
    /// All work is done and ends as if the disk had failed to sync.
    #[cfg(test)]
    pub sync_fails: Arc<std::sync::atomic::AtomicBool>,
}

/// The connection. Two of one process are never open on one path: the locks on SQLite's index (-shm) are the
/// process's, and whichever is closed first lets go of the other's (<https://sqlite.org/howtocorrupt.html>, 2.2).
#[derive(Debug, Default)]
struct Open {
    replica: Option<Replica>,
    /// Device and inode of the file, its log and the log's index: what was swapped below us must not be written any more.
    files: [Option<(u64, u64)>; 3],
    /// Log or index were deleted or replaced, and what the file holds was not compared with its rows since.
    lost_log: bool,
    /// Which of the three files was found so, until somebody asked.
    untold: Option<PathBuf>,
    /// Had by each connection that reads beside this one: while there is one, SQLite gives the next of this process the same
    /// index, also of a log that is gone.
    scans: Arc<()>,
}

impl Open {
    /// The connection; opens the file if there is none, and makes it if it is not there.
    fn replica(&mut self, path: &Path, limits: &Limits) -> Result<&mut Replica, DbError> {
        let replica = match self.replica.take() {
            Some(replica) => replica,
            // A log written by the index of another one is no log.
            None if Arc::strong_count(&self.scans) > 1 => return Err(DbError::Swapped(path.to_owned())),
            None => {
                if is_gone(path) {
                    // They would be taken for the new one's.
                    remove_log(path)?;
                }
                let replica = failpoint::step("agent.open", || Replica::open(path, limits))?;
                self.files = files(path).map(|f| std::fs::metadata(f).ok().map(identity));
                replica
            }
        };
        Ok(self.replica.insert(replica))
    }

    /// Which of the open files lies there no more. Of one that cannot be looked at now nobody knows.
    fn swapped(&self, path: &Path) -> Option<PathBuf> {
        self.replica.as_ref()?;
        let is_another = |(file, known): &(PathBuf, Option<(u64, u64)>)| match std::fs::metadata(file) {
            Ok(m) => *known != Some(identity(m)),
            Err(e) => e.kind() == std::io::ErrorKind::NotFound,
        };
        files(path).into_iter().zip(self.files).find(is_another).map(|(file, _)| file)
    }
}

/// The file, its log and the log's index.
fn files(database: &Path) -> [PathBuf; 3] {
    [database.to_owned(), log_path(database), beside(database, "-shm")]
}

fn identity(m: std::fs::Metadata) -> (u64, u64) {
    (m.dev(), m.ino())
}

/// Whether the file is certainly not there. Of one that cannot be looked at now the log holds what was committed last.
fn is_gone(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

impl RegisterDb {
    /// Opens the file; makes an empty one where there is none.
    pub fn open(path: &Path, limits: &Limits) -> Result<RegisterDb, DbError> {
        let mut open = Open::default();
        open.replica(path, limits)?;
        Ok(RegisterDb {
            path: path.to_owned(),
            limits: limits.clone(),
            open: Arc::new(Mutex::new(open)),
            #[cfg(test)]
            sync_fails: Arc::default(),
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    async fn work<T, E>(&self, work: impl FnOnce(&mut Replica) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let db = self.clone();
        let work = move || {
            let mut open = db.lock();
            // Readers that came later see nothing of an old log, and what it brought home would change below them.
            if let Some(file) = open.swapped(&db.path) {
                return Err(DbError::Swapped(file).into());
            }
            work(open.replica(&db.path, &db.limits)?)
        };
        let done = tokio::task::spawn_blocking(work).await;
        #[cfg(test)]
        self.synced()?;
        done.unwrap_or_else(|e| Err(DbError::Cut(e.to_string()).into()))
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the file, its log or the log's index lie there no more.
    pub fn is_swapped(&self) -> bool {
        self.lock().swapped(&self.path).is_some()
    }

    /// Whether the log was lost, and the rows were not asked since.
    pub fn lost_log(&self) -> bool {
        self.lock().lost_log
    }

    /// Which of file, log and index was found deleted or replaced since this was last asked.
    pub fn take_lost(&self) -> Option<PathBuf> {
        self.lock().untold.take()
    }

    /// All rows were asked what the lost log has left of them.
    pub fn log_made_good(&self) {
        self.lock().lost_log = false;
    }

    /// The versions held.
    pub async fn all_held(&self) -> Result<AllHeld, DbError> {
        self.work(|replica| Ok(replica.all_held()?)).await
    }

    /// The versions held, from what lies there now. A file that was removed or replaced by hand is opened anew, and so it is
    /// when its log was: what lies there now is the truth. What was in the old log alone is not brought home, since readers
    /// that came later do not see that log: it comes again by packs. Beside a scan nothing is opened.
    pub async fn look(&self) -> Result<AllHeld, DbError> {
        let db = self.clone();
        let read = move || {
            let mut open = db.lock();
            if let Some(file) = open.swapped(&db.path) {
                tracing::error!(file = %file.display(), "it was deleted or replaced while the agent runs: opening what is there now. Stop the agent before, and leave store.db-wal and store.db-shm to it");
                open.lost_log |= file != db.path;
                open.replica = None;
                open.untold = Some(file);
            }
            Ok(open.replica(&db.path, &db.limits)?.all_held()?)
        };
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(DbError::Cut(e.to_string())))
    }

    /// Whether an error that called the file damaged, or its rows unreadable, is right at a second look: damage, or a
    /// table of ours that is gone. Of a sound file only those streams are forgotten whose rows of ours cannot be read;
    /// what was wrong with them.
    pub fn heal(&self) -> Result<Healed, DbError> {
        // A second connection would read the new log by the old index, which the first or a scan has in use.
        let open = self.lock();
        let is_scanned = Arc::strong_count(&open.scans) > 1;
        if open.swapped(&self.path).is_some() || (open.replica.is_none() && is_scanned) {
            return Ok(Healed::Sound);
        }
        drop(open);
        if sqlite::is_damaged(&self.path) {
            return Ok(Healed::Lost);
        }
        match self.lock().replica(&self.path, &self.limits)?.forget_unreadable() {
            Ok(forgotten) if forgotten.is_empty() => Ok(Healed::Sound),
            Ok(forgotten) => Ok(Healed::Forgot(forgotten)),
            Err(e) if e.is_unreadable() || e.verdict() == Verdict::Rebuild => Ok(Healed::Lost),
            Err(e) => Err(e.into()),
        }
    }

    /// Lets a damaged file go that was moved aside: room for the one that takes its place.
    pub fn forget_damaged(&self) -> Result<(), ShelfError> {
        forget_damaged(&self.path)
    }

    /// Moves the damaged file aside and begins an empty one. A POS application that has the old file
    /// open goes on reading what it can of it until it opens the new one. `moved` is called between the two.
    pub fn begin_anew(&self, moved: impl FnOnce()) -> Result<(), DbError> {
        let mut open = self.lock();
        open.replica = None;
        move_aside(&self.path)?;
        moved();
        // Who still reads the old file has an index that the new one has nothing of.
        open.scans = Arc::default();
        open.replica(&self.path, &self.limits).map(drop)
    }

    /// No version held counts any more. Of how many streams.
    pub fn disown(&self) -> Result<usize, DbError> {
        let mut open = self.lock();
        let replica = open.replica(&self.path, &self.limits)?;
        Ok(replica.disown()?)
    }

    /// Applies the packs of one transaction, proved by their digests before it commits.
    pub async fn apply(
        &self,
        instance: &Instance,
        manifest: &Manifest,
        packs: Vec<(PathBuf, PackEntry)>,
        now: Timestamp,
    ) -> Result<Applied, ApplyFailure> {
        let (instance, epoch) = (instance.clone(), manifest.epoch);
        let listed = manifest.tables();
        self.work(move |replica| {
            // What a panic left open; nothing otherwise.
            replica.rollback();
            let packs: Vec<PackFile<'_>> = packs.iter().map(|(path, entry)| PackFile { path, entry }).collect();
            let job = Job { instance: &instance, epoch, packs: &packs, now, prove: false, listed: Some(&listed) };
            failpoint::step("agent.apply", || replica.apply(&job)).map_err(ApplyFailure::Apply)
        })
        .await
    }

    /// Recomputes a stream's digests from its rows, on a connection of its own.
    pub async fn verify(&self, stream: &StreamName) -> Result<Vec<TableCheck>, DbError> {
        let stream = stream.clone();
        self.scan(move |path, limits| Ok(Replica::open_read_only(path, limits)?.verify(&stream)?)).await
    }

    /// Reads on a connection of its own, which is closed when this ends; not where the file or its log is another one now.
    pub(crate) async fn scan<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Path, &Limits) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, DbError> {
        let db = self.clone();
        let read = move || {
            let open = db.lock();
            if open.replica.is_none() || open.swapped(&db.path).is_some() {
                return Err(DbError::Swapped(db.path.clone()));
            }
            let _scan = Arc::clone(&open.scans);
            drop(open);
            read(&db.path, &db.limits)
        };
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(DbError::Cut(e.to_string())))
    }

    /// Bytes of the log (-wal) on the disk.
    pub fn log_bytes(&self) -> u64 {
        sqlite::log_bytes(&self.path)
    }

    /// Cuts the log (-wal) to nothing if no reader needs it; waits for nobody. Whether it is cut.
    pub async fn truncate_log(&self) -> Result<bool, DbError> {
        let log = log_path(&self.path);
        self.work(move |replica| {
            let db = replica.connection();
            let wait = |d| db.busy_timeout(d).map_err(|e| SqliteError::new("busy_timeout", e));
            wait(Duration::ZERO)?;
            let outcome = failpoint::step("agent.truncate", || replica.checkpoint(Checkpoint::Truncate));
            wait(BUSY)?;
            outcome?;
            Ok(std::fs::metadata(&log).is_ok_and(|m| m.len() == 0))
        })
        .await
    }
}

#[cfg(test)]
impl RegisterDb {
    /// What SQLite says when the disk fails to sync, if it is to.
    fn synced(&self) -> Result<(), DbError> {
        if !self.sync_fails.load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(());
        }
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR_FSYNC);
        Err(SqliteError::new("checkpoint", rusqlite::Error::SqliteFailure(code, None)).into())
    }

    /// Lets SQLite say that the disk is full at so many pages.
    pub async fn limit_pages(&self, pages: i64) {
        let done: Result<(), DbError> = self
            .work(move |r| {
                let set = r.connection().pragma_update(None, "max_page_count", pages);
                set.map_err(|e| SqliteError::new("max_page_count", e).into())
            })
            .await;
        done.unwrap();
    }
}

/// Moves a damaged database out of the way, and what is committed in its log alone with it, under the name at which SQLite
/// looks for it. One that was moved there before goes.
pub(crate) fn move_aside(database: &Path) -> Result<(), ShelfError> {
    let (log, aside) = (log_path(database), damaged(database));
    // Else the log of the one before would be read over this one. A log without its database is that of this one: the
    // power went before the database was moved.
    if aside.symlink_metadata().is_ok() {
        forget_damaged(database)?;
    }
    let has_pages = || std::fs::metadata(&log).is_ok_and(|m| m.len() > 0);
    failpoint::step("agent.aside-wal", || if has_pages() { shelf::promote(&log, &log_path(&aside)) } else { Ok(()) })?;
    failpoint::step("agent.aside", || shelf::promote(database, &aside))?;
    remove_log(database)
}

/// Lets the log of a damaged database go that was not moved after it, for the power went, if the database is sound after all:
/// the next one that is moved aside would be read with it.
pub(crate) fn forget_stray_log(database: &Path) -> Result<(), ShelfError> {
    let (aside, log) = (damaged(database), log_path(&damaged(database)));
    let is_stray = log.exists() && aside.symlink_metadata().is_err() && database.exists();
    // Not where nobody could look: it may have the only copy of what was committed last.
    if is_stray && sqlite::looks_sound(database).is_ok_and(|sound| sound) { shelf::remove(&log) } else { Ok(()) }
}

fn forget_damaged(database: &Path) -> Result<(), ShelfError> {
    let aside = damaged(database);
    shelf::remove(&log_path(&aside))?;
    shelf::remove(&aside)
}

/// The log and its index, of a database that is gone.
fn remove_log(database: &Path) -> Result<(), ShelfError> {
    shelf::remove(&log_path(database))?;
    shelf::remove(&beside(database, "-shm"))
}

/// Where a damaged database lies aside.
pub fn damaged(database: &Path) -> PathBuf {
    beside(database, ".damaged")
}

fn beside(database: &Path, end: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// What `open_private` sets; tests do not wait for it.
const BUSY: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(5) };

/// Packs were not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyFailure {
    /// By the replica.
    #[error(transparent)]
    Apply(ApplyError),
    /// The work was cut off.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What to do after packs were not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// No room.
    MakeRoom,
    /// The same again, later.
    Retry,
    /// Another stream is to give up a table first.
    Wait,
    /// The rows here are not those of the version, or may not be: ask the rows.
    AskRows,
    /// The pack is bad.
    AvoidPack,
    /// The file is damaged.
    Damaged,
    /// Touch nothing.
    Halt,
}

impl ApplyFailure {
    /// What to do.
    pub fn remedy(&self) -> Remedy {
        let e = match self {
            ApplyFailure::Apply(e) => e,
            ApplyFailure::Db(e) if e.verdict() == Verdict::Halt => return Remedy::Halt,
            ApplyFailure::Db(e) if e.is_disk_full() => return Remedy::MakeRoom,
            ApplyFailure::Db(_) => return Remedy::Retry,
        };
        if e.code() == "DISK_FULL" || matches!(e, ApplyError::Sqlite(s) if s.is_disk_full()) {
            return Remedy::MakeRoom;
        }
        match e.verdict() {
            _ if e.waits() => Remedy::Wait,
            Verdict::Quarantine if e.may_be_drift() || e.code() == "BAD_SCHEMA" => Remedy::AskRows,
            Verdict::Quarantine => Remedy::AvoidPack,
            Verdict::Rebuild => Remedy::Damaged,
            Verdict::Halt => Remedy::Halt,
            // A table or column that is gone reads as a failure of the statement.
            Verdict::Retry => match e {
                ApplyError::Sqlite(s) if sqlite::is_misfit(s.inner()) => Remedy::AskRows,
                _ => Remedy::Retry,
            },
        }
    }

    /// Whether another program holds the database.
    pub fn is_busy(&self) -> bool {
        matches!(self, ApplyFailure::Apply(ApplyError::Sqlite(e)) if e.is_busy())
    }

    /// The stable name of the reason.
    pub fn code(&self) -> &'static str {
        match self {
            ApplyFailure::Apply(e) => e.code(),
            ApplyFailure::Db(_) => "CUT",
        }
    }

    /// The pack that failed, as a name; none where SQLite or the disk did.
    pub fn pack(&self) -> Option<&str> {
        match self {
            ApplyFailure::Apply(
                ApplyError::Pack { pack, .. }
                | ApplyError::Row { pack, .. }
                | ApplyError::Digest { pack, .. }
                | ApplyError::WrongBase { pack, .. }
                | ApplyError::Schema { pack, .. }
                | ApplyError::Elsewhere { pack, .. }
                | ApplyError::ForeignKey { pack, .. },
            ) => Some(pack),
            _ => None,
        }
    }
}

/// What `plan` needs of a stream that is held.
pub fn at(held: &Held) -> At {
    At { audience: held.audience.clone(), version: held.version, epoch: held.epoch }
}

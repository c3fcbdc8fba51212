//! Opening and migrating `fleet.db`; transactions on it.

use super::Serials;
use crate::config::Config;
use proto::clock::Timestamp;
use proto::failpoint;
use proto::ids::{BadName, DeviceId, Instance, StoreId, Version};
use proto::replica::sqlite;
use proto::retry::Verdict;
use rusqlite::config::DbConfig;
use rusqlite::{ErrorCode, OpenFlags};
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::{Any, AnyConnection, AnyPool, AssertSqlSafe, Connection, Row, Transaction};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// The ledger failed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The database.
    #[error("the ledger (state.database) failed: {0}")]
    Database(#[source] sqlx::Error),
    /// Its disk is full.
    #[error("the ledger (state.database) has no room: make some on its disk, and run this again")]
    Full(#[source] sqlx::Error),
    /// Its directory.
    #[error("the ledger (state.database): {0}")]
    Shelf(#[from] proto::shelf::ShelfError),
    /// A value that this build did not write.
    #[error("the ledger holds a {what} that cannot be read: {reason}")]
    Damaged {
        /// Which value.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// A database that this build must not use.
    #[error("the ledger (state.database): {0}")]
    Unfit(String),
    /// Somebody else is the publisher now.
    #[error("the publisher's lease was lost: another publisher took over; nothing more is written by this one")]
    LeaseLost,
    /// A number that is not above all before.
    #[error("{instance} has version {max} in the ledger: {version} cannot be taken")]
    VersionTaken {
        /// Whose.
        instance: Instance,
        /// The number asked for.
        version: Version,
        /// The greatest taken.
        max: Version,
    },
    /// A publication that is not where it should be.
    #[error("{instance} {version} is not {wanted} in the ledger")]
    NotInState {
        /// Whose.
        instance: Instance,
        /// Which.
        version: Version,
        /// The state that was expected.
        wanted: &'static str,
    },
    /// A manifest could not be made.
    #[error("the manifest of store {store} cannot be made: {reason}")]
    Manifest {
        /// Whose.
        store: StoreId,
        /// Why not.
        reason: String,
    },
    /// A sync failed before.
    #[error(
        "the ledger (state.database) could not be synced to its disk: nothing more is written; look at the disk and start again"
    )]
    Halted,
    /// Something else that two must not do.
    #[error("{0}")]
    Conflict(String),
}

/// SQLite's number for `synchronous = FULL`.
const FULL_SYNC: i64 = 2;

/// SQLITE_IOERR_FSYNC and SQLITE_IOERR_DIR_FSYNC: the kernel may have dropped the pages, so that another try would succeed
/// without their being on disk.
const SYNC_FAILED: [&str; 2] = ["1034", "1290"];

/// PostgreSQL's disk_full.
const FULL: &str = "53100";

/// SQLITE_CORRUPT, in its kinds, and SQLITE_NOTADB.
const DAMAGED: [i32; 2] = [11, 26];

impl From<sqlx::Error> for LedgerError {
    fn from(e: sqlx::Error) -> Self {
        let code = e.as_database_error().and_then(sqlx::error::DatabaseError::code).unwrap_or_default();
        // PostgreSQL's have five characters.
        let of_sqlite = code.parse::<i32>().ok().filter(|_| code.len() < 5);
        if code == FULL || of_sqlite.is_some_and(sqlite::is_full) {
            LedgerError::Full(e)
        } else if of_sqlite.is_some_and(|n| DAMAGED.contains(&(n & 0xff))) {
            LedgerError::damaged(&e)
        } else {
            LedgerError::Database(e)
        }
    }
}

impl LedgerError {
    /// Of a file that SQLite cannot read right. Once may be a read that failed.
    fn damaged(found: &dyn fmt::Display) -> Self {
        LedgerError::Unfit(format!(
            "{found}: if it says so again, move it away with its -wal and -shm, and publish: it is made anew from the bucket; \
             or put a backup in its place, with neither of them beside it"
        ))
    }

    /// Whether what was to be written is to blame, and not the database, its disk or the way to it: something else may be
    /// written all the same.
    pub fn is_of_values(&self) -> bool {
        let LedgerError::Database(e) = self else { return matches!(self, LedgerError::Damaged { .. }) };
        let code = e.as_database_error().and_then(sqlx::error::DatabaseError::code).unwrap_or_default();
        // PostgreSQL's have five characters: classes of data, of constraints, of limits.
        let of_postgres = code.len() == 5 && ["22", "23", "54"].iter().any(|class| code.starts_with(class));
        of_postgres || code.len() < 5 && code.parse().is_ok_and(|n: i32| OF_VALUES.contains(&(n & 0xff)))
    }
}

/// SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH.
const OF_VALUES: [i32; 3] = [18, 19, 20];

/// A number that changes when a manifest was put, or a device enrolled or revoked: cheap to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change(pub i64);

/// Which database it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One file; writers take turns.
    Sqlite,
    /// A server; several `serve` may use it.
    Postgres,
}

/// The database, open. Clones share it.
#[derive(Debug, Clone)]
pub struct Ledger {
    pool: AnyPool,
    kind: Kind,
    url: Arc<str>,
    /// SQLite has one writer: waiting here is fair, waiting there is polling.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Whether a sync failed.
    pub(super) halted: Arc<watch::Sender<bool>>,
    /// The devices that are not revoked.
    pub(super) enrolled: Kept<[DeviceId]>,
    /// The serials of each store.
    pub(super) serials: Kept<BTreeMap<StoreId, Serials>>,
}

/// What was read last from a table that is asked for every few seconds and changes now and then, with numbers that
/// tell whether it did.
pub(super) struct Kept<T: ?Sized>(Arc<Mutex<Read<T>>>);

type Read<T> = Option<(Vec<i64>, Arc<T>)>;

impl<T: ?Sized> Kept<T> {
    fn read(&self) -> MutexGuard<'_, Read<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// What was read, if the numbers are as they were then.
    pub(super) fn as_of(&self, state: &[i64]) -> Option<Arc<T>> {
        self.read().as_ref().filter(|(of, _)| of == state).map(|(_, what)| Arc::clone(what))
    }
    /// Keeps what was read after the numbers.
    pub(super) fn keep(&self, state: Vec<i64>, what: Arc<T>) -> Arc<T> {
        *self.read() = Some((state, Arc::clone(&what)));
        what
    }
}

impl<T: ?Sized> Default for Kept<T> {
    fn default() -> Self {
        Kept(Arc::default())
    }
}
impl<T: ?Sized> Clone for Kept<T> {
    fn clone(&self) -> Self {
        Kept(Arc::clone(&self.0))
    }
}
impl<T: ?Sized> fmt::Debug for Kept<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept")
    }
}

/// The name of the PostgreSQL channel that tells of puts.
pub(super) const CHANNEL: &str = "tillcast_change";

/// Any number, the same in every process: who writes takes turns on PostgreSQL too.
const WRITE_LOCK: i64 = 0x7469_6c6c;

pub(super) const MIGRATIONS: [&str; 9] = [
    include_str!("0001.sql"),
    include_str!("0002.sql"),
    include_str!("0003.sql"),
    include_str!("0004.sql"),
    include_str!("0005.sql"),
    include_str!("0006.sql"),
    include_str!("0007.sql"),
    include_str!("0008.sql"),
    include_str!("0009.sql"),
];

/// A commit that leaves so many pages in SQLite's log brings it home before it answers: SQLite's own number.
const LOG_PAGES: u64 = 1000;

/// The same beside a [`Ledger::checkpoint`] each second, which a burst of posts outruns.
const LOG_PAGES_OF_SERVICE: u64 = sqlite::WAL_LIMIT / 4096;

pub(super) fn pool_options(kind: Kind, log_pages: u64) -> AnyPoolOptions {
    AnyPoolOptions::new()
        .max_connections(if kind == Kind::Sqlite { 4 } else { 8 })
        .acquire_timeout(Duration::from_secs(60))
        // With either of them sqlx 0.9 starts a task that looks at idle connections, counts them while they are taken and
        // given, and at a wrong moment counts from -1 up: it spins for ever, and the runtime never ends (sqlx #3645).
        .idle_timeout(None)
        .max_lifetime(None)
        .after_connect(move |c, _| {
            Box::pin(async move { if kind == Kind::Sqlite { settle(c, log_pages).await } else { Ok(()) } })
        })
}

impl Ledger {
    /// Opens, creates and migrates the database that the settings name.
    pub async fn open(config: &Config) -> Result<Ledger, LedgerError> {
        Self::open_url(&config.state.database_url()).await
    }

    /// The same for `serve`, which calls [`Ledger::checkpoint`].
    pub async fn open_for_service(config: &Config) -> Result<Ledger, LedgerError> {
        Self::open_with(&config.state.database_url(), LOG_PAGES_OF_SERVICE).await
    }

    /// Opens a database by URL: `sqlite:FILE` or `postgres://…`.
    pub async fn open_url(url: &str) -> Result<Ledger, LedgerError> {
        Self::open_with(url, LOG_PAGES).await
    }

    pub(super) async fn open_with(url: &str, log_pages: u64) -> Result<Ledger, LedgerError> {
        sqlx::any::install_default_drivers();
        let file = proto::config::sqlite_path(url);
        let (kind, full) = match &file {
            Some(file) => (Kind::Sqlite, sqlite_url(file)?),
            None => (Kind::Postgres, url.to_owned()),
        };
        if let Some(file) = &file {
            look_first(file).await?;
            probe(&full).await?;
        }
        let pool = pool_options(kind, log_pages).connect(&full).await?;
        let (enrolled, serials) = (Kept::default(), Kept::default());
        let ledger =
            Ledger { pool, kind, url: url.into(), turn: Arc::default(), halted: Arc::default(), enrolled, serials };
        ledger.migrate().await?;
        if let Some(file) = &file {
            // SQLite ignores a failed sync of the directory that names its WAL.
            proto::shelf::sync_name(file)?;
        }
        Ok(ledger)
    }

    /// Which database it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }
    /// Its URL as it was given, password and all.
    pub(super) fn url(&self) -> &str {
        &self.url
    }
    /// For reading.
    pub(super) fn pool(&self) -> &AnyPool {
        &self.pool
    }

    /// Closes its connections, and waits for that: a SQLite file has no `-wal` then, if nobody else has it open. Not after
    /// a failed sync, which the last one to close would try again.
    pub async fn close(&self) {
        if !*self.halted.borrow() {
            self.pool.close().await;
        }
    }

    /// Brings home SQLite's log while others read and write on, once it is so long that a commit would: whoever posts would
    /// wait for that. What somebody still reads comes with the next one.
    pub async fn checkpoint(&self) -> Result<(), LedgerError> {
        let log = proto::config::sqlite_path(self.url()).map_or(0, |file| sqlite::log_bytes(&file));
        if log < LOG_PAGES * 4096 || *self.halted.borrow() {
            return Ok(());
        }
        let done = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_all(&self.pool).await;
        done.inspect_err(|e| halt_if_unsynced(e, &self.halted))?;
        Ok(())
    }

    /// Begins a transaction that writes; at most one is open.
    pub(super) async fn write(&self) -> Result<Write, LedgerError> {
        let turn = match self.kind {
            Kind::Sqlite => Some(Arc::clone(&self.turn).lock_owned().await),
            Kind::Postgres => None,
        };
        // Asked with the turn: whoever had it may have met the failure.
        if *self.halted.borrow() {
            return Err(LedgerError::Halted);
        }
        let tx = match self.kind {
            Kind::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await?,
            Kind::Postgres => {
                let mut tx = self.pool.begin().await?;
                sqlx::query("SELECT count(*) FROM pg_advisory_xact_lock($1)")
                    .bind(WRITE_LOCK)
                    .execute(&mut *tx)
                    .await?;
                tx
            }
        };
        Ok(Write { tx, _turn: turn, kind: self.kind, halted: Arc::clone(&self.halted) })
    }

    /// Waits until a sync has failed: nothing is written any more.
    pub async fn halted(&self) {
        // The sender lives as long as this.
        let _ = self.halted.subscribe().wait_for(|halted| *halted).await;
    }

    /// Brings the tables to this build's form; a database of a later build is refused.
    async fn migrate(&self) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("CREATE TABLE IF NOT EXISTS migration (number BIGINT PRIMARY KEY)").execute(&mut **w).await?;
        let row = sqlx::query("SELECT COALESCE(MAX(number), 0) FROM migration").fetch_one(&mut **w).await?;
        let done = usize::try_from(row.try_get::<i64, _>(0)?).unwrap_or(usize::MAX);
        if done > MIGRATIONS.len() {
            return Err(LedgerError::Unfit(format!(
                "it was written by a later version of this program (migration {done}, this build knows {}): update it",
                MIGRATIONS.len()
            )));
        }
        for (i, sql) in MIGRATIONS.iter().enumerate().skip(done) {
            for statement in sql.split(";\n").map(str::trim).filter(|s| !s.is_empty()) {
                sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&mut **w).await?;
            }
            let number = i64::try_from(i + 1).unwrap_or(i64::MAX);
            sqlx::query("INSERT INTO migration (number) VALUES ($1)").bind(number).execute(&mut **w).await?;
        }
        failpoint::around("ledger.migrate", w.commit()).await
    }

    /// The number that rises when manifests were put, or devices enrolled or revoked.
    pub async fn change(&self) -> Result<Change, LedgerError> {
        let row = sqlx::query("SELECT n FROM change").fetch_one(&self.pool).await?;
        Ok(Change(row.try_get(0)?))
    }

    /// Waits until the number may have risen, or `poll` has passed: a notification on PostgreSQL, a
    /// wait on SQLite. A lost connection ends the wait early; the caller asks for the number anyway.
    pub async fn await_change(&self, listener: &mut Option<Listener>, poll: Duration) {
        if self.kind == Kind::Sqlite {
            return tokio::time::sleep(poll).await;
        }
        if listener.is_none() {
            *listener = Listener::open(self.url()).await.ok();
            if listener.is_some() {
                // What was put before it listened, the caller finds by asking.
                return;
            }
        }
        // Without a listener the poll is all there is.
        let Some(l) = listener else { return tokio::time::sleep(poll).await };
        let longest = poll.max(Duration::from_secs(30));
        if let Ok(Err(_)) = tokio::time::timeout(longest, l.0.recv()).await {
            *listener = None;
        }
    }
}

/// A connection that hears of puts.
#[derive(Debug)]
pub struct Listener(sqlx::postgres::PgListener);

impl Listener {
    async fn open(url: &str) -> Result<Listener, sqlx::Error> {
        let mut l = sqlx::postgres::PgListener::connect(url).await?;
        l.listen(CHANNEL).await?;
        Ok(Listener(l))
    }
}

/// A transaction that writes. Dropped without [`Write::commit`] it did not happen.
pub(super) struct Write {
    tx: Transaction<'static, Any>,
    _turn: Option<tokio::sync::OwnedMutexGuard<()>>,
    pub(super) kind: Kind,
    halted: Arc<watch::Sender<bool>>,
}

impl Write {
    /// Raises the number of [`Ledger::change`].
    pub(super) async fn count_change(&mut self) -> Result<(), LedgerError> {
        sqlx::query("UPDATE change SET n = n + 1").execute(&mut *self.tx).await?;
        Ok(())
    }
    /// The same, of a device that was enrolled or revoked.
    pub(super) async fn count_enrolment(&mut self, id: &DeviceId) -> Result<(), LedgerError> {
        sqlx::query("UPDATE change SET n = n + 1, devices = devices + 1").execute(&mut *self.tx).await?;
        let noted = sqlx::query("UPDATE device SET changed = (SELECT devices FROM change) WHERE id = $1");
        noted.bind(id.as_str()).execute(&mut *self.tx).await?;
        Ok(())
    }
    pub(super) async fn commit(self) -> Result<(), LedgerError> {
        let Write { tx, halted, _turn, .. } = self;
        Ok(tx.commit().await.inspect_err(|e| halt_if_unsynced(e, &halted))?)
    }
}
impl Deref for Write {
    type Target = Transaction<'static, Any>;
    fn deref(&self) -> &Self::Target {
        &self.tx
    }
}
impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.tx
    }
}

pub(super) fn halt_if_unsynced(e: &sqlx::Error, halted: &watch::Sender<bool>) {
    let code = e.as_database_error().and_then(sqlx::error::DatabaseError::code);
    if code.is_some_and(|code| SYNC_FAILED.contains(&&*code)) {
        tracing::error!("{}", LedgerError::Halted);
        halted.send_replace(true);
    }
}

/// The URL of a SQLite file, its directory made.
fn sqlite_url(path: &Path) -> Result<String, LedgerError> {
    if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
        proto::shelf::create_dir(dir)?;
    }
    let text = path.to_string_lossy();
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-".contains(b);
    let escaped: String = text
        .as_bytes()
        .iter()
        .map(|b| if plain(b) { char::from(*b).to_string() } else { format!("%{b:02X}") })
        .collect();
    Ok(format!("sqlite://{escaped}?mode=rwc"))
}

/// The pool would try a damaged file for a minute, and say no more than that it waited.
async fn probe(url: &str) -> Result<(), LedgerError> {
    let mut c = AnyConnection::connect(url).await?;
    settle(&mut c, LOG_PAGES).await?;
    Ok(c.close().await?)
}

/// A log that a crash left belongs to the file that it was written for. Over a backup that was put in that one's place
/// SQLite lays it all the same, without a word, and what comes of it is a mix of both. A file that was emptied below who
/// has it open would be waited for, a minute, and called locked.
async fn look_first(file: &Path) -> Result<(), LedgerError> {
    let (emptied, damaged) = (file.to_owned(), file.to_owned());
    let is_emptied = move || was_emptied(&emptied);
    // Where a crash left an index, it looks so for a moment while another process makes the file anew.
    if tokio::task::spawn_blocking(is_emptied.clone()).await.unwrap_or(false) {
        tokio::time::sleep(EMPTY).await;
        if tokio::task::spawn_blocking(is_emptied).await.unwrap_or(false) {
            return Err(LedgerError::Unfit(
                "it was emptied while another process has it open: end that one (`hq-publisher serve`), move the file away \
                 with its -wal and -shm, publish, and start it again; the ledger is made anew from the bucket"
                    .into(),
            ));
        }
    }
    // Where it could not be looked at, the opening says why.
    let found = tokio::task::spawn_blocking(move || unsound(&damaged)).await.unwrap_or(None);
    found.map_or(Ok(()), |found| Err(LedgerError::damaged(&found)))
}

/// How long a file without a byte may be one that is being made.
const EMPTY: Duration = Duration::from_secs(2);

/// Whoever makes the file anew has no index of a log beside it yet.
fn was_emptied(file: &Path) -> bool {
    let mut index = file.as_os_str().to_owned();
    index.push("-shm");
    std::fs::metadata(file).is_ok_and(|m| m.len() == 0) && Path::new(&index).exists() && is_in_use(file)
}

/// The longest look at a ledger after a crash.
const LOOK: Duration = Duration::from_secs(60);

/// What is wrong with a file that has a log and that nobody has open; indexes are looked at against their rows, which
/// takes about a second for 500,000, and a minute at most: `serve` must be ready before its unit loses patience. The log is
/// left as it is found: brought home, it could not be taken away any more.
fn unsound(file: &Path) -> Option<String> {
    if sqlite::log_bytes(file) == 0 || is_in_use(file) {
        return None;
    }
    let db = sqlite::open_read_only(file).ok()?;
    let end = tokio::time::Instant::now() + LOOK;
    db.progress_handler(100_000, Some(move || tokio::time::Instant::now() >= end)).ok()?;
    match db.query_row("PRAGMA integrity_check(1)", [], |row| row.get::<_, String>(0)) {
        Ok(found) => (found != "ok").then(|| found.replace('\n', " ")),
        Err(e) => (sqlite::verdict(&e) == Verdict::Rebuild).then(|| e.to_string()),
    }
}

/// Whether some process has the file open: its log is no crash's, and it was looked at when that began.
fn is_in_use(file: &Path) -> bool {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let lock = || -> rusqlite::Result<()> {
        let db = rusqlite::Connection::open_with_flags(file, flags)?;
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        db.busy_timeout(Duration::ZERO)?;
        db.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; ROLLBACK")
    };
    lock().is_err_and(|e| e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy))
}

/// WAL and full syncs, read back: a mode that was not taken loses acknowledged commits.
async fn settle(c: &mut AnyConnection, log_pages: u64) -> Result<(), sqlx::Error> {
    for pragma in ["busy_timeout = 30000", "trusted_schema = OFF", "cell_size_check = ON"] {
        sqlx::query(AssertSqlSafe(format!("PRAGMA {pragma}"))).execute(&mut *c).await?;
    }
    // To its last step: the answer comes before the commit, which may fail.
    let rows = sqlx::query("PRAGMA journal_mode = WAL").fetch_all(&mut *c).await?;
    let mode: String = rows.first().map_or(Ok(String::new()), |row| row.try_get(0))?;
    if mode != "wal" {
        return Err(sqlx::Error::Configuration(format!("journal_mode is `{mode}`, not wal").into()));
    }
    sqlx::query("PRAGMA synchronous = FULL").execute(&mut *c).await?;
    let synchronous: i64 = sqlx::query("PRAGMA synchronous").fetch_one(&mut *c).await?.try_get(0)?;
    if synchronous != FULL_SYNC {
        return Err(sqlx::Error::Configuration(format!("synchronous is {synchronous}, not {FULL_SYNC} (FULL)").into()));
    }
    // After a long reader or a large transaction the log goes back to this.
    let limit = format!("PRAGMA journal_size_limit = {}", sqlite::WAL_LIMIT);
    sqlx::query(AssertSqlSafe(limit)).execute(&mut *c).await?;
    let pages = format!("PRAGMA wal_autocheckpoint = {log_pages}");
    sqlx::query(AssertSqlSafe(pages)).execute(&mut *c).await?;
    Ok(())
}

/// Seconds since 1970, as stored.
pub(super) fn seconds(t: Timestamp) -> i64 {
    t.as_second()
}

/// A number as stored.
pub(super) fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Reads columns by place, with the value's name in errors.
pub(super) trait Columns {
    fn number(&self, i: usize) -> Result<i64, LedgerError>;
    /// All of a row that has nothing else.
    fn numbers(&self) -> Result<Vec<i64>, LedgerError>;
    fn text(&self, i: usize) -> Result<String, LedgerError>;
    fn text_or_null(&self, i: usize) -> Result<Option<String>, LedgerError>;
    fn number_or_null(&self, i: usize) -> Result<Option<i64>, LedgerError>;

    fn unsigned(&self, i: usize) -> Result<u64, LedgerError> {
        Ok(u64::try_from(self.number(i)?).unwrap_or(0))
    }
    fn time(&self, i: usize) -> Result<Timestamp, LedgerError> {
        to_time(self.number(i)?)
    }
    fn time_or_null(&self, i: usize) -> Result<Option<Timestamp>, LedgerError> {
        self.number_or_null(i)?.map(to_time).transpose()
    }
    fn parsed<T: FromStr<Err: std::fmt::Display>>(&self, i: usize, what: &'static str) -> Result<T, LedgerError> {
        parse(&self.text(i)?, what)
    }
    fn json<T: serde::de::DeserializeOwned>(&self, i: usize, what: &'static str) -> Result<T, LedgerError> {
        serde_json::from_str(&self.text(i)?).map_err(|e| LedgerError::Damaged { what, reason: e.to_string() })
    }
    fn version(&self, i: usize) -> Result<Version, LedgerError> {
        let bad = |e: BadName| LedgerError::Damaged { what: "version", reason: e.to_string() };
        Version::try_from(self.number(i)?).map_err(bad)
    }
}

impl Columns for AnyRow {
    fn number(&self, i: usize) -> Result<i64, LedgerError> {
        Ok(self.try_get(i)?)
    }
    fn numbers(&self) -> Result<Vec<i64>, LedgerError> {
        (0..self.len()).map(|i| self.number(i)).collect()
    }
    fn text(&self, i: usize) -> Result<String, LedgerError> {
        Ok(self.try_get(i)?)
    }
    fn text_or_null(&self, i: usize) -> Result<Option<String>, LedgerError> {
        Ok(self.try_get(i)?)
    }
    fn number_or_null(&self, i: usize) -> Result<Option<i64>, LedgerError> {
        Ok(self.try_get(i)?)
    }
}

fn to_time(seconds: i64) -> Result<Timestamp, LedgerError> {
    Timestamp::from_second(seconds).map_err(|e| LedgerError::Damaged { what: "time", reason: e.to_string() })
}

/// Parses a stored name.
pub(super) fn parse<T: FromStr<Err: std::fmt::Display>>(text: &str, what: &'static str) -> Result<T, LedgerError> {
    text.parse().map_err(|e: T::Err| LedgerError::Damaged { what, reason: e.to_string() })
}

/// JSON to store.
pub(super) fn to_json<T: serde::Serialize>(value: &T, what: &'static str) -> Result<String, LedgerError> {
    serde_json::to_string(value).map_err(|e| LedgerError::Damaged { what, reason: e.to_string() })
}

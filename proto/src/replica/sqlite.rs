//! How every SQLite file of ours is opened (reliability rules D2, D7): WAL, synchronous=FULL, own
//! checkpoints, settings read back, nothing of the dangerous side of SQLite switched on.

use crate::retry::Verdict;
use crate::shelf;
use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// SQLite failed at something.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct SqliteError {
    what: String,
    source: rusqlite::Error,
}

impl SqliteError {
    /// An error with the file or action that it happened to.
    pub fn new(what: impl Into<String>, source: rusqlite::Error) -> Self {
        SqliteError { what: what.into(), source }
    }
    /// SQLite's own error.
    pub fn inner(&self) -> &rusqlite::Error {
        &self.source
    }
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        verdict(&self.source)
    }
    /// Whether our own rows cannot be understood: a value that is none of its type, a table of ours that is gone or is
    /// there where it should not be. `quick_check` finds nothing of it, and another try finds the same.
    pub fn is_unreadable(&self) -> bool {
        is_bad_value(&self.source) || is_misfit(&self.source)
    }
    /// Whether a statement of a contract was refused: by the authorizer, by the rows that are here, or by what is here
    /// already or is not.
    pub fn is_refused(&self) -> bool {
        let refused = [ErrorCode::ConstraintViolation, ErrorCode::AuthorizationForStatementDenied];
        self.source.sqlite_error_code().is_some_and(|code| refused.contains(&code)) || is_misfit(&self.source)
    }
    /// Whether another program holds the file.
    pub fn is_busy(&self) -> bool {
        matches!(self.source.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
    }
    /// Whether a later build wrote the file.
    pub fn is_newer(&self) -> bool {
        self.source.sqlite_error_code() == Some(ErrorCode::SchemaChanged)
    }
    /// Whether the disk is full: SQLite says so, or cannot make its index (`-shm`) as long as it must be.
    pub fn is_disk_full(&self) -> bool {
        self.source.sqlite_error().is_some_and(|e| is_full(e.extended_code))
    }
}

/// Whether an extended code of SQLite's means that the disk is full.
pub fn is_full(extended_code: i32) -> bool {
    matches!(extended_code, libsqlite3_sys::SQLITE_FULL | libsqlite3_sys::SQLITE_IOERR_SHMSIZE)
}

/// What to do about an error of SQLite's. A constraint or type error is the caller's to judge: it
/// knows whose rows they were.
pub fn verdict(e: &rusqlite::Error) -> Verdict {
    match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Verdict::Rebuild,
        Some(ErrorCode::SystemIoFailure) if is_failed_sync(e) => Verdict::Halt,
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig) => Verdict::Quarantine,
        _ => Verdict::Retry,
    }
}

/// Whether a statement that was sound failed at a value: a function of a CHECK or index could not take it, such as one of
/// JSON a text that is none.
pub fn is_refused_value(e: &rusqlite::Error) -> bool {
    use libsqlite3_sys::{SQLITE_ERROR, SQLITE_TOOBIG};
    e.sqlite_error().is_some_and(|e| matches!(e.extended_code, SQLITE_ERROR | SQLITE_TOOBIG))
}

/// Whether a file that an error called damaged is so at a second look, by a connection of its own. SQLite says the
/// same of a read that failed (EIO), and that may be over: no database is given up for it.
pub fn is_damaged(path: &Path) -> bool {
    looks_sound(path).map_or_else(|e| e.verdict() == Verdict::Rebuild, |sound| !sound)
}

/// Whether a file is sound, by a connection of its own; an error where it could not be looked at.
pub fn looks_sound(path: &Path) -> Result<bool, SqliteError> {
    let db = open_read_only(path)?;
    let pages: Result<i64, _> = db.query_row("PRAGMA page_count", [], |r| r.get(0));
    // An empty file is a sound database, but not the one that was here.
    if pages.map_err(|e| SqliteError::new("page_count", e))? == 0 {
        return Ok(false);
    }
    let found: Result<String, _> = db.query_row("PRAGMA quick_check(1)", [], |r| r.get(0));
    Ok(found.map_err(|e| SqliteError::new("quick_check", e))? == "ok")
}

/// Whether a value is none of its type.
pub(super) fn is_bad_value(e: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    matches!(e, FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | Utf8Error(..))
}

/// Whether a statement does not fit the tables that are there: one that is missing, a column that
/// is, or one that exists already. rusqlite tells those that have a place in the text apart.
pub fn is_misfit(e: &rusqlite::Error) -> bool {
    matches!(e, rusqlite::Error::SqlInputError { .. }) || e.sqlite_error_code() == Some(ErrorCode::Unknown)
}

/// SQLITE_IOERR_FSYNC and SQLITE_IOERR_DIR_FSYNC: the kernel may have dropped the pages, so that
/// another try would succeed without their being on disk.
fn is_failed_sync(e: &rusqlite::Error) -> bool {
    use libsqlite3_sys::{SQLITE_IOERR_DIR_FSYNC, SQLITE_IOERR_FSYNC};
    e.sqlite_error().is_some_and(|e| [SQLITE_IOERR_FSYNC, SQLITE_IOERR_DIR_FSYNC].contains(&e.extended_code))
}

/// How much of the WAL to bring home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpoint {
    /// What can be moved without waiting for anybody.
    Passive,
    /// All, and cut the WAL to nothing; waits for readers up to the busy timeout.
    Truncate,
}

/// SQLite 3.51.3 is the first release without the WAL-reset fault.
pub const MINIMUM_SQLITE: i32 = 3_051_003;

/// Bytes of a text, blob or row: four times a pack's line. A CHECK that makes longer ones (`printf('%999999999d')`)
/// does not get the machine's memory for it.
const LENGTH: i32 = 64 << 20;

/// WAL bytes that stay allocated after a checkpoint has emptied it.
pub const WAL_LIMIT: u64 = 64 << 20;

/// What is set on every connection that writes, and read back: a build of SQLite may leave one out without a word.
const PRAGMAS: [(&str, i64); 8] = [
    ("synchronous", 2),
    ("wal_autocheckpoint", 0),
    ("foreign_keys", 1),
    ("trusted_schema", 0),
    ("cell_size_check", 1),
    ("mmap_size", 0),
    ("cache_size", -6144),
    ("journal_size_limit", WAL_LIMIT as i64),
];
const SWITCHES: [(DbConfig, bool); 6] = [
    (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false),
    (DbConfig::SQLITE_DBCONFIG_DQS_DML, false),
    (DbConfig::SQLITE_DBCONFIG_DQS_DDL, false),
    // -wal and -shm stay when the last connection closes, for readers that cannot make them.
    (DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true),
];

/// A link could lead to a file that another data directory's lock guards, or to one of the system's.
fn refuse_link(path: &Path) -> Result<(), SqliteError> {
    if !path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return Ok(());
    }
    let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_CANTOPEN);
    let why = "it is a symbolic link: put the file itself there, or let data_dir name where it is".to_owned();
    Err(SqliteError::new(format!("opening {}", path.display()), rusqlite::Error::SqliteFailure(code, Some(why))))
}

/// Opens (or creates) a file that only this process writes.
pub fn open_private(path: &Path) -> Result<Connection, SqliteError> {
    refuse_link(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let error = |e| SqliteError::new(format!("opening {}", path.display()), e);
    let db = Connection::open_with_flags(path, flags).map_err(error)?;
    // SQLite falls back to reading where it may not write, and says so at the first write only.
    if db.is_readonly(rusqlite::MAIN_DB).map_err(error)? {
        let why = "it cannot be written: see to its owner and mode, and those of the files beside it";
        return Err(error(rusqlite::Error::SqliteFailure(
            libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_READONLY),
            Some(why.into()),
        )));
    }
    settings(&db).map_err(error)?;
    sort_beside(&db, path);
    // SQLite ignores a failed sync of the directory that names the WAL, and a rollback journal's end is no more durable
    // than that: commits would be lost, or the whole file (rule D3).
    shelf::sync_name(path).map_err(|e| {
        let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_IOERR_DIR_FSYNC);
        SqliteError::new(e.to_string(), rusqlite::Error::SqliteFailure(code, None))
    })?;
    Ok(db)
}

/// Refuses a file of ours alone that a later build wrote: this one knows its shape up to `known` (`PRAGMA user_version`).
pub fn refuse_newer(db: &Connection, path: &Path, known: i64) -> Result<(), SqliteError> {
    let error = |e| SqliteError::new(path.display().to_string(), e);
    refuse_shape(path, db.pragma_query_value(None, "user_version", |r| r.get(0)).map_err(error)?, known)
}

/// Refuses a shape that only a later build knows.
pub(super) fn refuse_shape(path: &Path, found: i64, known: i64) -> Result<(), SqliteError> {
    if found <= known {
        return Ok(());
    }
    let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_SCHEMA);
    let why = format!("the file has shape {found}, this build knows {known}: update this program");
    Err(SqliteError::new(path.display().to_string(), rusqlite::Error::SqliteFailure(code, Some(why))))
}

/// Opens a file of another process for reading.
pub fn open_read_only(path: &Path) -> Result<Connection, SqliteError> {
    refuse_link(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let error = |e| SqliteError::new(format!("opening {}", path.display()), e);
    let db = Connection::open_with_flags(path, flags).map_err(error)?;
    db.busy_timeout(Duration::from_secs(5)).map_err(error)?;
    db.execute_batch("PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0")
        .map_err(error)?;
    Ok(db)
}

/// Lets the whole process's temporary files, in which SQLite sorts what an index is made of, lie beside the database: there
/// room is looked after, while /var/tmp may be a small one in memory.
pub fn sort_beside(db: &Connection, path: &Path) {
    // SQLite knows names as text, and the working directory as `.`.
    let Some(dir) = path.parent().and_then(Path::to_str).filter(|d| !d.is_empty()) else { return };
    if let Err(e) = db.pragma_update(None, "temp_store_directory", dir) {
        tracing::warn!(%dir, error = %e, "temporary files of SQLite's lie where the system has them");
    }
}

fn settings(db: &Connection) -> rusqlite::Result<()> {
    let wrong = |what: String| {
        Err(rusqlite::Error::SqliteFailure(libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_MISUSE), Some(what)))
    };
    if rusqlite::version_number() < MINIMUM_SQLITE {
        return wrong(format!("SQLite {} is older than 3.51.3, which mends a WAL fault", rusqlite::version()));
    }
    db.busy_timeout(Duration::from_secs(5))?;
    db.set_limit(Limit::SQLITE_LIMIT_LENGTH, LENGTH)?;
    db.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
    for (switch, on) in SWITCHES {
        db.set_db_config(switch, on)?;
    }
    // To its last step: the answer comes before the commit, and a sync that fails there would leave the file in the
    // mode that loses commits.
    let modes: Vec<String> =
        db.prepare("PRAGMA journal_mode = WAL")?.query_map([], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?;
    let mode = modes.join(", ");
    if mode != "wal" {
        return wrong(format!("journal_mode is {mode} where WAL was asked for"));
    }
    for (pragma, wanted) in PRAGMAS {
        db.pragma_update(None, pragma, wanted)?;
    }
    // The first read makes the WAL.
    db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    match is_unlike(db)? {
        Some(what) => wrong(what),
        None => Ok(()),
    }
}

/// The first setting of an open connection that is not what [`open_private`] sets.
fn is_unlike(db: &Connection) -> rusqlite::Result<Option<String>> {
    let mode: String = db.pragma_query_value(None, "journal_mode", |r| r.get(0))?;
    if mode != "wal" {
        return Ok(Some(format!("journal_mode is {mode} where wal was set")));
    }
    for (pragma, wanted) in PRAGMAS {
        let found: i64 = db.pragma_query_value(None, pragma, |r| r.get(0))?;
        if found != wanted {
            return Ok(Some(format!("{pragma} is {found} where {wanted} was set")));
        }
    }
    for (switch, wanted) in SWITCHES {
        if db.db_config(switch)? != wanted {
            return Ok(Some(format!("{switch:?} is {} where {wanted} was set", !wanted)));
        }
    }
    Ok(None)
}

/// The log beside a database.
pub fn log_path(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// Bytes of the log on the disk.
pub fn log_bytes(database: &Path) -> u64 {
    std::fs::metadata(log_path(database)).map_or(0, |m| m.len())
}

/// Brings the WAL home. Busy readers are no error: what is left comes with the next one.
pub fn checkpoint(db: &Connection, how: Checkpoint) -> Result<(), SqliteError> {
    let sql = match how {
        Checkpoint::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
        Checkpoint::Truncate => "PRAGMA wal_checkpoint(TRUNCATE)",
    };
    match db.query_row(sql, [], |_| Ok(())) {
        Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => Ok(()),
        r => r.map_err(|e| SqliteError::new("checkpoint", e)),
    }
}

/// What an open connection is set to, for tests of whoever opened it.
#[cfg(any(test, feature = "testkit"))]
#[allow(clippy::unwrap_used, reason = "test code")]
pub fn assert_settings(db: &Connection) {
    assert_eq!(is_unlike(db).unwrap(), None);
    let limits = [(Limit::SQLITE_LIMIT_LENGTH, LENGTH), (Limit::SQLITE_LIMIT_ATTACHED, 0)];
    limits.into_iter().for_each(|(limit, wanted)| assert_eq!(db.limit(limit).unwrap(), wanted, "{limit:?}"));
    assert_eq!(db.pragma_query_value(None, "busy_timeout", |r| r.get::<_, i64>(0)).unwrap(), 5000);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let open = || open_private(&dir.path().join("a.db")).unwrap();
        assert_settings(&open());
        for (pragma, wanted) in PRAGMAS {
            let db = open();
            db.pragma_update(None, pragma, if wanted == 0 { 1 } else { wanted - 1 }).unwrap();
            assert!(is_unlike(&db).unwrap().is_some_and(|w| w.starts_with(pragma)), "{pragma}");
        }
        for (switch, wanted) in SWITCHES {
            let db = open();
            db.set_db_config(switch, !wanted).unwrap();
            assert!(is_unlike(&db).unwrap().is_some(), "{switch:?}");
        }
    }

    #[test]
    fn only_a_sync_that_failed_halts() {
        let of = |code| verdict(&rusqlite::Error::SqliteFailure(libsqlite3_sys::Error::new(code), None));
        for (code, wanted) in [
            (libsqlite3_sys::SQLITE_IOERR_FSYNC, Verdict::Halt),
            (libsqlite3_sys::SQLITE_IOERR_DIR_FSYNC, Verdict::Halt),
            (libsqlite3_sys::SQLITE_IOERR_READ, Verdict::Retry),
            (libsqlite3_sys::SQLITE_IOERR_WRITE, Verdict::Retry),
            (libsqlite3_sys::SQLITE_BUSY, Verdict::Retry),
            (libsqlite3_sys::SQLITE_CORRUPT, Verdict::Rebuild),
        ] {
            assert_eq!(of(code), wanted, "{code}");
        }
    }

    #[test]
    fn a_log_that_somebody_reads_comes_home_with_the_next_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = open_private(&path).unwrap();
        db.busy_timeout(Duration::ZERO).unwrap();
        db.execute_batch("CREATE TABLE t (n INTEGER) STRICT; INSERT INTO t VALUES (1)").unwrap();
        let reader = open_read_only(&path).unwrap();
        reader.execute_batch("BEGIN; SELECT n FROM t").unwrap();
        db.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        checkpoint(&db, Checkpoint::Truncate).unwrap();
        assert!(log_bytes(&path) > 0);
        reader.execute_batch("ROLLBACK").unwrap();
        checkpoint(&db, Checkpoint::Truncate).unwrap();
        assert_eq!(log_bytes(&path), 0);
    }

    #[test]
    fn a_database_that_is_a_link_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a.db"), dir.path().join("b.db"));
        open_private(&file).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for refused in [open_private(&link), open_read_only(&link)] {
            let e = refused.unwrap_err();
            assert!(e.to_string().contains("symbolic link") && e.verdict() == Verdict::Retry, "{e}");
        }
        // One that leads nowhere would make a file there.
        let (made, nowhere) = (dir.path().join("c.db"), dir.path().join("d.db"));
        std::os::unix::fs::symlink(&made, &nowhere).unwrap();
        assert!(open_private(&nowhere).is_err() && !made.exists());
        // The way to the file may lead over links.
        let way = dir.path().join("way");
        std::os::unix::fs::symlink(dir.path(), &way).unwrap();
        open_private(&way.join("a.db")).unwrap();
    }
}

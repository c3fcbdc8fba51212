//! What an enrolled device must remember: who it is, its key, how far it walked the trust files,
//! the manifest it accepted, and small durable facts. One SQLite file, `device.db`, in the
//! device's data directory, owned by one process.
//!
//! Trust state and manifest change in one durable transaction, after the last check: a power cut
//! leaves the state before or after.

use crate::clock::Timestamp;
use crate::failpoint;
use crate::ids::DeviceId;
use crate::keys::SecretKey;
use crate::limits::Limits;
use crate::manifest::Manifest;
use crate::replica::sqlite::{self, SqliteError};
use crate::retry::Verdict;
use crate::runs::Starts;
use crate::shelf::{self, ShelfError};
use crate::trust::{Accepted, EnrolCode, Refusal, Seen, Trust, TrustState, Verified};
use rusqlite::{Connection, OptionalExtension};
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;

/// The name of the file in the data directory.
pub const FILE: &str = "device.db";

/// A device's memory could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Nobody is enrolled here.
    #[error("{0} holds no enrolment: run `hq-publisher enroll ID` at headquarters and give its code to `enroll` here")]
    NotEnrolled(String),
    /// Somebody else is enrolled here.
    #[error("{dir} is enrolled as {found}, not {wanted}: use another data_dir, or empty this one")]
    OtherDevice {
        /// The data directory.
        dir: String,
        /// Who is enrolled.
        found: DeviceId,
        /// Who should be.
        wanted: DeviceId,
    },
    /// The code was refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// SQLite.
    #[error("{0}")]
    Sqlite(#[from] SqliteError),
    /// The file could not be made.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// A sync failed: it is not tried again.
    #[error("{FILE}: a sync failed before")]
    Halted,
    /// A fact that is not what was written.
    #[error("device.db: {0} is damaged: {1}")]
    Damaged(&'static str, String),
}

impl DeviceError {
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        match self {
            DeviceError::Sqlite(e) => e.verdict(),
            DeviceError::Shelf(e) => e.verdict(),
            DeviceError::Halted => Verdict::Halt,
            _ => Verdict::Retry,
        }
    }
    /// A stable name of the reason, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            DeviceError::NotEnrolled(_) => "NOT_ENROLLED",
            DeviceError::OtherDevice { .. } => "OTHER_DEVICE",
            DeviceError::Refused(refusal) => refusal.code(),
            DeviceError::Halted => "HALTED",
            e if e.is_disk_full() => "DISK_FULL",
            DeviceError::Sqlite(_) | DeviceError::Shelf(_) | DeviceError::Damaged(..) => "MACHINE",
        }
    }
    /// Whether one fact cannot be understood, while the file is sound.
    pub fn is_unreadable(&self) -> bool {
        match self {
            DeviceError::Damaged(..) => true,
            DeviceError::Sqlite(e) => e.is_unreadable(),
            _ => false,
        }
    }
    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            DeviceError::Sqlite(e) => e.is_disk_full(),
            DeviceError::Shelf(e) => e.is_disk_full(),
            _ => false,
        }
    }
}

impl From<rusqlite::Error> for DeviceError {
    fn from(e: rusqlite::Error) -> Self {
        DeviceError::Sqlite(SqliteError::new("device.db", e))
    }
}

/// A device's memory, open.
#[derive(Debug)]
pub struct Device {
    db: Connection,
    id: DeviceId,
    key: SecretKey,
    trust: TrustState,
    seen: Seen,
    manifest: Option<Verified<Manifest>>,
    run: Option<String>,
    starts: Starts,
    /// The sync that failed: nothing is written any more.
    halted: Option<String>,
    /// Why the latest number of a heartbeat could not be written, where no sync failed.
    unkept: Option<String>,
    /// The latest number of a heartbeat that is on no disk, for either.
    spoken: u64,
    /// Facts written since the log was last brought home.
    logged: u64,
}

const STARTS: &str = "starts";

/// The fact that an enrolment pinned other roots than those by which the rows here came, or that nobody knows by which
/// they came: no version held counts any more ([`crate::replica::Replica::disown`]), for another headquarters counts
/// from one, too.
pub const FOREIGN: &str = "foreign";

/// How far heartbeats may be counted on at once: ten a minute for two years.
const SEQ_REACH: u64 = 10_000_000;

/// So many facts are written between two checkpoints: each is a page or two of the log.
const LOGGED: u64 = 64;

const SCHEMA: &str =
    "CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID";

impl Device {
    /// Writes an enrolment. The same device may be enrolled again (a new key); its manifest and
    /// trust are kept when the pinned roots are the same, and they can be read.
    pub fn enrol(dir: &Path, code: &EnrolCode) -> Result<(), DeviceError> {
        let key = code.key()?;
        let file = dir.join(FILE);
        if !file.exists() {
            // It will hold the key: readable by its owner alone, as SQLite makes the files beside it.
            failpoint::step("device.file", || shelf::write_private(&file, b""))?;
        }
        let mut db = sqlite::open_private(&file)?;
        db.execute_batch(SCHEMA)?;
        if let Some(found) = sound::<DeviceId>(&db, "id")?
            && found != code.id
        {
            return Err(DeviceError::OtherDevice { dir: dir.display().to_string(), found, wanted: code.id.clone() });
        }
        let tx = db.transaction()?;
        let pinned = TrustState::pinned(code.roots.clone(), code.trust_version);
        put(&tx, "id", &code.id)?;
        put(&tx, "seed", &key.to_secret_text())?;
        let before = match get(&tx, "roots") {
            // They may be another headquarters'.
            Err(e) if e.is_unreadable() => Some(serde_json::Value::Null),
            read => read?,
        };
        let trust = sound::<TrustState>(&tx, "trust")?;
        // Roots that were rotated, and followed, are still the same headquarters'; an id that rotted says nothing of them.
        let is_followed = || trust.as_ref().is_some_and(|t| t.roots() == &code.roots);
        let is_same = before == serde_json::to_value(&code.roots).ok();
        let is_kept = is_same || is_followed();
        if !is_same {
            put(&tx, "roots", &code.roots)?;
        }
        // What cannot be read would keep the device from starting, however often it is enrolled.
        if !is_kept || trust.is_none() {
            put(&tx, "trust", &pinned)?;
        }
        if !is_kept || sound::<Seen>(&tx, "seen")?.is_none() {
            put(&tx, "seen", &Seen::default())?;
            tx.execute("DELETE FROM fact WHERE name = 'manifest'", [])?;
        }
        if !is_kept || get::<bool>(&tx, FOREIGN).is_err() {
            // Without roots before, a replica may lie beside a file of ours that was lost or removed.
            put(&tx, FOREIGN, &true)?;
            // Bad packs have names that another headquarters gives to good ones.
            tx.execute("DELETE FROM fact WHERE name IN ('avoid', 'relay_word')", [])?;
        }
        failpoint::step("device.enrol", || tx.commit())?;
        sqlite::checkpoint(&db, sqlite::Checkpoint::Truncate)?;
        Ok(())
    }

    /// Opens the memory of the device that a configuration names.
    pub fn open(dir: &Path, wanted: &DeviceId, limits: &Limits) -> Result<Device, DeviceError> {
        let file = dir.join(FILE);
        if !file.exists() {
            return Err(DeviceError::NotEnrolled(dir.display().to_string()));
        }
        let db = sqlite::open_private(&file)?;
        sqlite::refuse_newer(&db, &file, 0)?;
        db.execute_batch(SCHEMA)?;
        let not_enrolled = || DeviceError::NotEnrolled(dir.display().to_string());
        let id: DeviceId = get(&db, "id")?.ok_or_else(not_enrolled)?;
        if &id != wanted {
            return Err(DeviceError::OtherDevice { dir: dir.display().to_string(), found: id, wanted: wanted.clone() });
        }
        let seed: String = get(&db, "seed")?.ok_or_else(not_enrolled)?;
        let key = seed.parse().map_err(|e| DeviceError::Damaged("seed", format!("{e}")))?;
        let trust: TrustState = get(&db, "trust")?.ok_or_else(not_enrolled)?;
        let seen: Seen = get(&db, "seen")?.unwrap_or_default();
        let manifest = get::<String>(&db, "manifest").and_then(|m| Ok(kept_manifest(m, trust.trust(), &seen, limits)?));
        let manifest = manifest.unwrap_or_else(|e| {
            tracing::error!(error = %e, "the kept manifest is damaged; it is fetched anew");
            None
        });
        let starts = get(&db, STARTS).unwrap_or_else(|e| {
            tracing::warn!(error = %e, "earlier starts are forgotten");
            None
        });
        // Without randomness no copy of this device is told from it.
        let run = getrandom::u64().ok().map(|n| format!("{n:016x}"));
        let starts = starts.unwrap_or_default();
        let (halted, unkept, spoken) = (None, None, 0);
        // A process that writes one fact brings home what those before it wrote, too.
        Ok(Device { db, id, key, trust, seen, manifest, run, starts, halted, unkept, spoken, logged: LOGGED })
    }

    /// Who this is.
    pub fn id(&self) -> &DeviceId {
        &self.id
    }
    /// The device's key.
    pub fn key(&self) -> &SecretKey {
        &self.key
    }
    /// How far the trust files were walked.
    pub fn trust(&self) -> &TrustState {
        &self.trust
    }
    /// The greatest serial accepted, and the floor of time.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }
    /// The name of this run, for heartbeats.
    pub fn run(&self) -> Option<&str> {
        self.run.as_deref()
    }
    /// The latest starts of the service.
    pub fn starts(&self) -> &Starts {
        &self.starts
    }
    /// The last manifest accepted.
    pub fn manifest(&self) -> Option<&Verified<Manifest>> {
        self.manifest.as_ref()
    }
    /// The later of the system's clock and the latest signed time.
    pub fn time(&self, clock: Timestamp) -> Timestamp {
        self.seen.time(self.trust.epoch(), clock)
    }

    /// The sync that failed, after which nothing is written.
    pub fn halted(&self) -> Option<&str> {
        self.halted.as_deref()
    }
    /// Why the latest number of a heartbeat is not on the disk, where that is neither full nor given up.
    pub fn unkept(&self) -> Option<&str> {
        self.unkept.as_deref()
    }

    /// Does what syncs, unless a sync failed before: the kernel may have dropped what it was to write, and another sync
    /// would say that it is there.
    fn unless_halted<T>(
        &mut self,
        write: impl FnOnce(&mut Connection) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        if self.halted.is_some() {
            return Err(DeviceError::Halted);
        }
        let done = write(&mut self.db);
        if let Err(e) = &done
            && e.verdict() == Verdict::Halt
        {
            self.halted = Some(e.to_string());
        }
        done
    }

    /// Saves what was checked, in one durable transaction.
    pub fn save(&mut self, trust: &TrustState, accepted: Option<&Accepted>) -> Result<(), DeviceError> {
        self.unless_halted(|db| {
            let tx = db.transaction()?;
            put(&tx, "trust", trust)?;
            if let Some(a) = accepted {
                put(&tx, "seen", &a.seen)?;
                let envelope = String::from_utf8(a.manifest.envelope().to_vec())
                    .map_err(|e| DeviceError::Damaged("manifest", e.to_string()))?;
                put(&tx, "manifest", &envelope)?;
            }
            let name = match accepted {
                Some(_) => failpoint::name("device.manifest"),
                None => failpoint::name("device.trust"),
            };
            failpoint::step(name, || tx.commit())?;
            Ok(sqlite::checkpoint(db, sqlite::Checkpoint::Passive)?)
        })?;
        self.trust = trust.clone();
        if let Some(a) = accepted {
            self.seen = a.seen.clone();
            self.manifest = Some(a.manifest.clone());
        }
        Ok(())
    }

    /// The next sequence number of a heartbeat: durable before it is used, where the file can be written.
    pub fn next_seq(&mut self) -> Result<u64, DeviceError> {
        let next = sound(&self.db, "seq")?.unwrap_or(0).max(self.spoken) + 1;
        self.keep_seq(next)?;
        Ok(next)
    }

    /// The next number is above this one, which somebody above heard of this device: it was set back to an old state. So
    /// far only: nobody is to use the numbers up.
    pub fn go_on_above(&mut self, seq: u64) -> Result<(), DeviceError> {
        let known = sound(&self.db, "seq")?.unwrap_or(0).max(self.spoken);
        if seq <= known || seq - known > SEQ_REACH {
            return Ok(());
        }
        tracing::warn!(known, seq, "heartbeats are counted on from what was heard of this device: it was set back");
        self.keep_seq(seq)
    }

    /// Writes the number of a heartbeat. After a failed sync, or where it cannot be written though there is room, it
    /// counts in memory, for headquarters must hear of that: the next run counts on from what was heard.
    fn keep_seq(&mut self, seq: u64) -> Result<(), DeviceError> {
        if self.halted.is_none() {
            match failpoint::step("device.seq", || self.set_fact("seq", &seq)) {
                Ok(()) => {
                    self.unkept = None;
                    return Ok(());
                }
                Err(e) if self.halted.is_some() || e.is_disk_full() => return Err(e),
                Err(e) => {
                    tracing::warn!(seq, error = %e, "a heartbeat's number cannot be written, it counts in memory");
                    self.unkept = Some(e.to_string());
                }
            }
        }
        self.spoken = seq;
        Ok(())
    }

    /// The service starts, in this boot of the machine. A note that cannot be kept stops nothing.
    pub fn note_start(&mut self, now: Timestamp, boot: &str) {
        self.starts.begin(now, boot);
        failpoint::step("device.start", || self.keep_starts());
    }
    /// The service ends of itself.
    pub fn note_end(&mut self) {
        self.starts.end();
        failpoint::step("device.end", || self.keep_starts());
    }
    fn keep_starts(&mut self) {
        let starts = self.starts.clone();
        if let Err(e) = self.set_fact(STARTS, &starts) {
            tracing::warn!(error = %e, "when this service started or ended was not written down");
        }
    }

    /// Whether the rows here may have come by other roots ([`FOREIGN`]). A note that cannot be read says so: the dear answer, a full
    /// of each stream, is the safe one.
    pub fn is_foreign(&self) -> Result<bool, DeviceError> {
        match self.fact(FOREIGN) {
            Err(e) if e.is_unreadable() => Ok(true),
            read => Ok(read?.unwrap_or(false)),
        }
    }

    /// A small durable fact of this tier's own (a latch, an etag).
    pub fn fact<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, DeviceError> {
        get(&self.db, name)
    }
    /// Writes a fact durably.
    pub fn set_fact<T: Serialize>(&mut self, name: &'static str, value: &T) -> Result<(), DeviceError> {
        // For as long as no manifest comes, nothing else brings the log home. Before the write, which then begins the
        // log anew: after it the next process would know nothing of that, and go on at the log's end.
        let is_due = self.logged >= LOGGED;
        self.logged = if is_due { 1 } else { self.logged + 1 };
        self.unless_halted(|db| {
            if is_due {
                sqlite::checkpoint(db, sqlite::Checkpoint::Passive)?;
            }
            put(db, name, value)
        })
    }

    /// Fails a sync of the file, as a dying disk does.
    #[cfg(any(test, feature = "testkit"))]
    pub fn fail_sync(&mut self) -> DeviceError {
        let failed = || {
            let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_IOERR_FSYNC);
            Err::<(), _>(rusqlite::Error::SqliteFailure(code, None).into())
        };
        self.unless_halted(|_| failed()).err().unwrap_or(DeviceError::Halted)
    }

    /// Lets no write through from now on, as a file system does that went bad, or any again.
    #[cfg(any(test, feature = "testkit"))]
    #[allow(clippy::unwrap_used, reason = "test code")]
    pub fn refuse_writes(&mut self, refuse: bool) {
        self.db.execute_batch(&format!("PRAGMA query_only = {refuse}")).unwrap();
    }
}

/// The manifest as it was accepted, or a refusal: nobody verifies its signature again (the key may be gone), so its
/// bytes must be those of the hash that was remembered with it.
fn kept_manifest(
    kept: Option<String>,
    trust: Option<&Trust>,
    seen: &Seen,
    limits: &Limits,
) -> Result<Option<Verified<Manifest>>, Refusal> {
    kept.map(|m| Verified::accepted_before(m.into_bytes(), trust, seen, limits)).transpose()
}

fn get<T: DeserializeOwned>(db: &Connection, name: &'static str) -> Result<Option<T>, DeviceError> {
    let text: Option<String> =
        db.query_row("SELECT value FROM fact WHERE name = ?1", [name], |r| r.get(0)).optional()?;
    text.map(|t| serde_json::from_str(&t).map_err(|e| DeviceError::Damaged(name, e.to_string()))).transpose()
}

/// The same; one that cannot be read is as none.
fn sound<T: DeserializeOwned>(db: &Connection, name: &'static str) -> Result<Option<T>, DeviceError> {
    match get(db, name) {
        Err(e) if e.is_unreadable() => {
            tracing::warn!(error = %e, "what cannot be read is begun anew");
            Ok(None)
        }
        read => read,
    }
}

fn put<T: Serialize>(db: &Connection, name: &'static str, value: &T) -> Result<(), DeviceError> {
    let text = serde_json::to_string(value).map_err(|e| DeviceError::Damaged(name, e.to_string()))?;
    db.execute("INSERT INTO fact VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = ?2", [name, &text])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::RootKeys;

    fn code() -> EnrolCode {
        let key = |n| SecretKey::from_seed([n; 32]);
        EnrolCode {
            format: 1,
            id: "0421-03".parse().unwrap(),
            seed: key(3).to_secret_text(),
            roots: RootKeys { threshold: 1, keys: vec![key(1).public()] },
            trust_version: 1,
            expires_at: Timestamp::MAX,
        }
    }

    #[test]
    fn what_cannot_be_read_is_begun_anew_when_the_device_is_enrolled_anew() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Device::open(dir.path(), &code().id, &Limits::default());
        // JSON that is cut off, of another type, no text at all.
        for (name, rot) in ["id", "seed", "roots", "trust", "seen", "seq", "manifest", "starts", FOREIGN]
            .into_iter()
            .flat_map(|name| ["'{\"'", "'[7]'", "CAST(x'22ff22' AS TEXT)"].map(|rot| (name, rot)))
        {
            Device::enrol(dir.path(), &code()).unwrap();
            let mut device = open().unwrap();
            device.next_seq().unwrap();
            device.db.execute(&format!("INSERT OR REPLACE INTO fact VALUES ('{name}', {rot})"), []).unwrap();
            drop(device);
            let started = open().is_ok();
            assert_eq!(started, ["roots", "seq", "manifest", "starts", FOREIGN].contains(&name), "{name}, {rot}");
            Device::enrol(dir.path(), &code()).unwrap();
            let mut device = open().unwrap();
            assert_eq!(device.trust(), &TrustState::pinned(code().roots, 1), "{name}, {rot}");
            assert!(device.next_seq().unwrap() > 0, "{name}, {rot}");
        }
        // What can be read is kept.
        let (seq, seen) = (open().unwrap().next_seq().unwrap(), open().unwrap().seen().clone());
        Device::enrol(dir.path(), &code()).unwrap();
        assert_eq!((open().unwrap().next_seq().unwrap(), open().unwrap().seen()), (seq + 1, &seen));
        // An id alone that rotted takes nothing with it; another headquarters takes what the old one's packs were called.
        let names = ["avoid", "relay_word"];
        let mut device = open().unwrap();
        names.iter().for_each(|name| device.set_fact(name, &1).unwrap());
        device.set_fact(FOREIGN, &false).unwrap();
        device.db.execute("UPDATE fact SET value = '{' WHERE name = 'id'", []).unwrap();
        drop(device);
        let facts = || names.map(|name| open().unwrap().fact::<u64>(name).unwrap());
        Device::enrol(dir.path(), &code()).unwrap();
        assert_eq!((facts(), open().unwrap().fact(FOREIGN).unwrap()), ([Some(1), Some(1)], Some(false)));
        let key = SecretKey::from_seed([2; 32]).public();
        let other = EnrolCode { roots: RootKeys { threshold: 1, keys: vec![key] }, ..code() };
        Device::enrol(dir.path(), &other).unwrap();
        assert_eq!((facts(), open().unwrap().fact(FOREIGN).unwrap()), ([None, None], Some(true)));
    }

    #[test]
    fn rows_beside_a_file_that_was_lost_are_nobody_knows_whose() {
        let dir = tempfile::tempdir().unwrap();
        let enrolled = || {
            Device::enrol(dir.path(), &code()).unwrap();
            Device::open(dir.path(), &code().id, &Limits::default()).unwrap()
        };
        let mut device = enrolled();
        assert!(device.is_foreign().unwrap());
        device.set_fact(FOREIGN, &false).unwrap();
        drop(device);
        assert!(!enrolled().is_foreign().unwrap(), "its own headquarters again");
        shelf::remove(&dir.path().join(FILE)).unwrap();
        assert!(enrolled().is_foreign().unwrap());
    }

    #[test]
    fn after_a_failed_sync_nothing_is_written_and_heartbeats_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let code = code();
        Device::enrol(dir.path(), &code).unwrap();
        let open = || Device::open(dir.path(), &code.id, &Limits::default()).unwrap();
        let mut device = open();
        sqlite::assert_settings(&device.db);
        assert_eq!(device.next_seq().unwrap(), 1);
        device.set_fact("latch", &1).unwrap();
        let full = |_: &mut Connection| {
            let code = libsqlite3_sys::Error::new(libsqlite3_sys::SQLITE_FULL);
            Err::<(), DeviceError>(rusqlite::Error::SqliteFailure(code, None).into())
        };
        assert!(device.unless_halted(full).unwrap_err().is_disk_full() && device.halted().is_none());
        assert_eq!(device.fail_sync().verdict(), Verdict::Halt);
        assert!(device.halted().is_some_and(|why| why.starts_with("device.db")));
        assert!(matches!(device.set_fact("latch", &2), Err(DeviceError::Halted)));
        let trust = device.trust().clone();
        assert!(matches!(device.save(&trust, None), Err(DeviceError::Halted)));
        device.note_start(Timestamp::UNIX_EPOCH, "boot");
        assert_eq!((device.next_seq().unwrap(), device.next_seq().unwrap()), (2, 3));
        device.go_on_above(9).unwrap();
        assert_eq!(device.next_seq().unwrap(), 10);
        drop(device);
        let mut device = open();
        assert_eq!(device.fact::<u64>("latch").unwrap(), Some(1));
        assert_eq!(device.starts(), &Starts::default());
        assert_eq!(device.next_seq().unwrap(), 2);
    }

    #[test]
    fn the_log_is_brought_home_while_facts_alone_are_written_also_by_many_processes() {
        let dir = tempfile::tempdir().unwrap();
        Device::enrol(dir.path(), &code()).unwrap();
        let open = || Device::open(dir.path(), &code().id, &Limits::default()).unwrap();
        let log_bytes = || sqlite::log_bytes(&dir.path().join(FILE));
        let mut device = open();
        for n in 0..LOGGED * 8 {
            device.set_fact("faults", &n).unwrap();
        }
        drop(device);
        // A page or two each.
        let most = (LOGGED + 1) * 2 * 4200;
        assert!(log_bytes() <= most, "{}", log_bytes());
        for n in 0..LOGGED * 4 {
            open().set_fact("faults", &n).unwrap();
        }
        assert!(log_bytes() <= most, "{}", log_bytes());
        assert_eq!(open().fact("faults").unwrap(), Some(LOGGED * 4 - 1));
    }

    #[test]
    fn a_number_that_cannot_be_written_counts_in_memory_until_it_can() {
        let dir = tempfile::tempdir().unwrap();
        Device::enrol(dir.path(), &code()).unwrap();
        let open = || Device::open(dir.path(), &code().id, &Limits::default()).unwrap();
        let mut device = open();
        for far in [u64::MAX, SEQ_REACH + 1] {
            device.go_on_above(far).unwrap();
        }
        assert_eq!(device.next_seq().unwrap(), 1, "nobody uses the numbers up");
        device.refuse_writes(true);
        assert_eq!((device.next_seq().unwrap(), device.next_seq().unwrap()), (2, 3));
        assert!(device.unkept().is_some_and(|why| why.starts_with("device.db")) && device.halted().is_none());
        device.go_on_above(7).unwrap();
        device.refuse_writes(false);
        assert_eq!(device.next_seq().unwrap(), 8);
        assert!(device.unkept().is_none());
        drop(device);
        assert_eq!(open().next_seq().unwrap(), 9);
        open().go_on_above(9 + SEQ_REACH).unwrap();
        assert_eq!(open().next_seq().unwrap(), 10 + SEQ_REACH);
    }
}

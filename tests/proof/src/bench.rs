//! Opens databases of a state with SQLite itself, as they would be found after the power came back, and reads what
//! they hold. What was read of the same bytes is not read again.

use crate::disk::{Blob, Image};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OptionalExtension as _};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tillcast_tests::{digest, forge};

/// Table → state digest.
pub type Digests = BTreeMap<String, String>;

/// A stream as a replica holds it: its digests recomputed from the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// `price@zone-east`.
    pub instance: String,
    /// The version in the row.
    pub version: u64,
    /// What the rows come to.
    pub digests: Digests,
}

/// What a database holds.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Replicas: their streams.
    pub streams: Vec<Stream>,
    /// Replicas: packs proved, `price@zone-east/0000000002.delta.pack`, with their hashes.
    pub proofs: BTreeSet<(String, String)>,
    /// Devices: facts by name.
    pub facts: BTreeMap<String, String>,
    /// Relays and the ledger: the sequence number of each device's last heartbeat.
    pub beats: BTreeMap<String, u64>,
    /// Relays: packs that failed, and whether they were given up.
    pub attempts: BTreeMap<String, bool>,
    /// The ledger: serial and envelope of each store's manifest.
    pub stores: BTreeMap<String, (u64, String)>,
    /// The ledger: instance, version, state and list of packs of each publication.
    pub publications: Vec<(String, u64, String, Value)>,
    /// The ledger: devices.
    pub devices: BTreeSet<String>,
    /// The ledger: mails in the outbox, sent or not.
    pub mails: u32,
}

impl Facts {
    /// Serial of the manifest that a device accepted; 0 without.
    pub fn serial(&self) -> u64 {
        let envelope = self.facts.get("manifest").and_then(|text| serde_json::from_str::<String>(text).ok());
        envelope.and_then(|e| forge::payload(e.as_bytes())["serial"].as_u64()).unwrap_or(0)
    }
}

/// A database's path, and the hashes of its file, its log and its journal.
type Key = (String, [u8; 32], [u8; 32], [u8; 32]);

/// One worker's place to open databases, and its memory.
#[derive(Debug)]
pub struct Bench {
    dir: tempfile::TempDir,
    known: HashMap<Key, Result<Arc<Facts>, String>>,
    /// How many databases were opened.
    pub opened: u64,
}

/// A directory in memory, where there is one.
pub fn memory_dir() -> PathBuf {
    let shm = Path::new("/dev/shm");
    let usable = rustix::fs::access(shm, rustix::fs::Access::WRITE_OK).is_ok();
    if usable { shm.to_owned() } else { std::env::temp_dir() }
}

impl Default for Bench {
    fn default() -> Bench {
        let dir = tempfile::Builder::new().prefix("tillcast-proof-").tempdir_in(memory_dir()).unwrap();
        Bench { dir, known: HashMap::new(), opened: 0 }
    }
}

impl Bench {
    /// What the database at `path` holds; none where there is no file.
    pub fn read(&mut self, image: &Image, path: &str) -> Result<Option<Arc<Facts>>, String> {
        let Some(file) = image.get(path) else { return Ok(None) };
        let beside = |suffix: &str| image.get(&format!("{path}{suffix}"));
        let (wal, journal) = (beside("-wal"), beside("-journal"));
        let hash = |b: Option<&Arc<Blob>>| b.map_or([0; 32], |b| b.sha256());
        let key = (path.to_owned(), file.sha256(), hash(wal), hash(journal));
        if let Some(known) = self.known.get(&key) {
            return known.clone().map(Some);
        }
        let facts = self.open(path, file, wal, journal).map(Arc::new);
        if self.known.len() > 20_000 {
            self.known.clear();
        }
        self.known.insert(key, facts.clone());
        facts.map(Some)
    }

    fn open(
        &mut self,
        path: &str,
        file: &Blob,
        wal: Option<&Arc<Blob>>,
        journal: Option<&Arc<Blob>>,
    ) -> Result<Facts, String> {
        self.opened += 1;
        let db = self.dir.path().join("x.db");
        let put = |suffix: &str, blob: Option<&Arc<Blob>>| {
            let name = self.dir.path().join(format!("x.db{suffix}"));
            match blob {
                Some(blob) => std::fs::write(&name, &blob.bytes).unwrap(),
                None => drop(std::fs::remove_file(&name)),
            }
        };
        std::fs::write(&db, &file.bytes).unwrap();
        put("-wal", wal);
        put("-journal", journal);
        put("-shm", None);
        let read = std::panic::catch_unwind(|| facts(&db));
        let read = read.unwrap_or_else(|_| Err("its rows cannot be read".into()));
        read.map_err(|e| format!("{path}: {e}"))
    }
}

fn facts(path: &Path) -> Result<Facts, String> {
    let text = |e: rusqlite::Error| e.to_string();
    let db = Connection::open(path).map_err(text)?;
    // The index lives in memory; nothing is written home when it is closed.
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(text)?;
    db.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = OFF").map_err(text)?;
    let sound: String = db.query_row("PRAGMA integrity_check(1)", [], |r| r.get(0)).map_err(text)?;
    if sound != "ok" {
        return Err(sound);
    }
    let mut tables = BTreeSet::new();
    let mut list = db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table'").map_err(text)?;
    let mut rows = list.query([]).map_err(text)?;
    while let Some(row) = rows.next().map_err(text)? {
        tables.insert(row.get::<_, String>(0).map_err(text)?);
    }
    read_tables(&db, &tables).map_err(text)
}

fn read_tables(db: &Connection, tables: &BTreeSet<String>) -> rusqlite::Result<Facts> {
    let mut facts = Facts::default();
    let has = |name: &str| tables.contains(name);
    if has("tillcast_stream") {
        replica(db, &mut facts)?;
    }
    if has("fact") {
        let mut all = db.prepare("SELECT name, value FROM fact")?;
        facts.facts = all.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?.collect::<Result<_, _>>()?;
    }
    if has("beat") && has("attempt") {
        let mut all = db.prepare("SELECT register, seq FROM beat")?;
        let beat = |r: &rusqlite::Row<'_>| Ok((r.get(0)?, r.get::<_, i64>(1)? as u64));
        facts.beats = all.query_map([], beat)?.collect::<Result<_, _>>()?;
        let mut all = db.prepare("SELECT pack, json_extract(record, '$.in_error') FROM attempt")?;
        facts.attempts = all.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?.collect::<Result<_, _>>()?;
    }
    // The ledger makes all its tables in one transaction.
    if has("publication") {
        let mut all = db.prepare("SELECT id, serial, coalesce(envelope, '') FROM store")?;
        let store = |r: &rusqlite::Row<'_>| Ok((r.get(0)?, (r.get::<_, i64>(1)? as u64, r.get(2)?)));
        facts.stores = all.query_map([], store)?.collect::<Result<_, _>>()?;
        let mut all = db.prepare("SELECT instance, version, state, packs FROM publication")?;
        let publication = |r: &rusqlite::Row<'_>| {
            let packs = serde_json::from_str(&r.get::<_, String>(3)?).unwrap_or(Value::Null);
            Ok((r.get(0)?, r.get::<_, i64>(1)? as u64, r.get(2)?, packs))
        };
        facts.publications = all.query_map([], publication)?.collect::<Result<_, _>>()?;
        let mut all = db.prepare("SELECT id FROM device")?;
        facts.devices = all.query_map([], |r| r.get(0))?.collect::<Result<_, _>>()?;
        facts.mails = db.query_row("SELECT count(*) FROM mail", [], |r| r.get(0))?;
        let mut all = db.prepare("SELECT device, seq FROM beat")?;
        let beat = |r: &rusqlite::Row<'_>| Ok((r.get(0)?, r.get::<_, i64>(1)? as u64));
        facts.beats = all.query_map([], beat)?.collect::<Result<_, _>>()?;
    }
    Ok(facts)
}

fn replica(db: &Connection, facts: &mut Facts) -> rusqlite::Result<()> {
    let mut streams = db.prepare("SELECT stream, audience, version FROM tillcast_stream ORDER BY stream")?;
    let mut tables = db.prepare("SELECT name FROM tillcast_table WHERE stream = ?1")?;
    let mut rows = streams.query([])?;
    while let Some(row) = rows.next()? {
        let (stream, audience, version): (String, String, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let names: Vec<String> = tables.query_map([&stream], |r| r.get(0))?.collect::<Result<_, _>>()?;
        let digests = names.into_iter().map(|t| (t.clone(), digest::of_table(db, &t))).collect();
        facts.streams.push(Stream { instance: format!("{stream}@{audience}"), version: version as u64, digests });
    }
    let strange: Option<String> = db
        .query_row(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'tillcast\\_%' ESCAPE '\\'
             AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT IN (SELECT name FROM tillcast_table)",
            [],
            |r| r.get(0),
        )
        .optional()?;
    if let Some(table) = strange {
        return Err(rusqlite::Error::InvalidColumnName(format!("table {table} belongs to no version")));
    }
    let mut packs = db.prepare("SELECT stream, audience, version, kind, sha256 FROM tillcast_pack")?;
    let pack = |r: &rusqlite::Row<'_>| {
        let (stream, audience, kind): (String, String, String) = (r.get(0)?, r.get(1)?, r.get(3)?);
        Ok((format!("{stream}@{audience}/{:010}.{kind}.pack", r.get::<_, i64>(2)?), r.get(4)?))
    };
    facts.proofs = packs.query_map([], pack)?.collect::<Result<_, _>>()?;
    Ok(())
}

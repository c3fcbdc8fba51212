//! A small headquarters that writes a bucket, a relay that serves it, a register to test.

use crate::agent::{Agent, Observer};
use crate::config::Config;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use proto::clock::{Clock, SystemClock, TestClock, Timestamp, after};
use proto::device::Device;
use proto::digest::{RowHasher, StateDigest};
use proto::http::{Body, Inbound, json, none_match, read_body, text};
use proto::ids::{ColumnName, Instance, StreamName, TableName, Version};
use proto::keys::SecretKey;
use proto::layout::{ObjectName, PackKind};
use proto::limits::Limits;
use proto::manifest::{Manifest, PackEntry, StreamEntry};
use proto::pack::{Header, Op, PackWriter, SchemaPart, table_heads};
use proto::schema::Contract;
use proto::trust::{EnrolCode, PublisherKey, RootKeys, Trust, sign_manifest};
use proto::value::Value;
use proto::wire::{BeatAnswer, Beats, Fault, Heartbeat};
use rusqlite::Connection;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::watch;

pub const STORE: &str = "0421";
pub const REGISTER: &str = "0421-03";

pub type Rows = BTreeMap<i64, i64>;

pub fn v(n: u64) -> Version {
    Version::try_from(n).unwrap()
}
pub fn instance(s: &str) -> Instance {
    s.parse().unwrap()
}
/// The first `n` items, each at `cents`.
pub fn rows(n: i64, cents: i64) -> Rows {
    (1..=n).map(|sku| (sku, cents)).collect()
}
fn key(n: u8) -> SecretKey {
    SecretKey::from_seed([n; 32])
}
pub fn digest(rows: &Rows) -> StateDigest {
    let mut d = StateDigest::default();
    for (sku, cents) in rows {
        d.add(RowHasher::default().hash(&[Value::Int(*sku), Value::Int(*cents)]));
    }
    d
}

/// Headquarters: every stream has one table, of its own name if `tables` does not say otherwise,
/// with `sku` and `cents`.
pub struct Hq {
    pub tables: BTreeMap<&'static str, &'static str>,
    pub dir: TempDir,
    pub epoch: u64,
    pub serial: u64,
    trust_version: u64,
    /// The streams that root keys allow; none: any.
    allowed: BTreeSet<StreamName>,
    pub streams: BTreeMap<StreamName, StreamEntry>,
    states: BTreeMap<(Instance, Version), Rows>,
}

impl Hq {
    pub fn new() -> Hq {
        let mut hq = Hq {
            tables: BTreeMap::new(),
            dir: TempDir::new().unwrap(),
            epoch: 1,
            serial: 0,
            trust_version: 0,
            allowed: BTreeSet::new(),
            streams: BTreeMap::new(),
            states: BTreeMap::new(),
        };
        hq.put_trust();
        hq
    }
    fn roots() -> RootKeys {
        RootKeys { threshold: 1, keys: vec![key(1).public()] }
    }
    fn put_trust(&mut self) {
        self.trust_version += 1;
        let now = SystemClock::default().now();
        let publishers =
            vec![PublisherKey { key: key(2).public(), expires_at: after(now, Duration::from_secs(1 << 25)) }];
        let trust = Trust {
            format: 1,
            version: self.trust_version,
            epoch: self.epoch,
            created_at: now,
            root: Hq::roots(),
            publishers,
            streams: self.allowed.clone(),
        };
        let bytes = trust.sign(&[&key(1)]).unwrap();
        self.put(&ObjectName::Trust, &bytes);
        self.put(&ObjectName::TrustVersion(self.trust_version), &bytes);
    }
    pub fn allow(&mut self, streams: &[&str]) {
        self.allowed = streams.iter().map(|s| s.parse().unwrap()).collect();
        self.put_trust();
    }
    pub fn new_epoch(&mut self) {
        self.epoch += 1;
        self.put_trust();
    }
    pub fn put(&self, name: &ObjectName, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let aside = path.with_extension("aside");
        std::fs::write(&aside, bytes).unwrap();
        std::fs::rename(aside, path).unwrap();
    }
    pub fn path(&self, name: &ObjectName) -> PathBuf {
        self.dir.path().join(name.to_string())
    }
    pub fn url(&self) -> String {
        format!("file://{}", self.dir.path().display())
    }
    pub fn pack_path(&self, i: &str, version: u64, kind: PackKind) -> PathBuf {
        let entry = self.streams[&instance(i).stream].pack(v(version), kind).unwrap();
        self.path(&entry.name(&instance(i)).into())
    }
    pub fn has(&self, i: &str, version: u64, kind: PackKind) -> bool {
        self.streams[&instance(i).stream].pack(v(version), kind).is_some()
    }
    /// Turns a bit of what is published; where it lies, and what it was.
    pub fn bend(&self, i: &str, version: u64, kind: PackKind) -> (PathBuf, Vec<u8>) {
        let path = self.pack_path(i, version, kind);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[40] ^= 1;
        std::fs::write(&path, bad).unwrap();
        (path, good)
    }
    pub fn code(&self) -> EnrolCode {
        EnrolCode {
            format: 1,
            id: REGISTER.parse().unwrap(),
            seed: key(3).to_secret_text(),
            roots: Hq::roots(),
            trust_version: 1,
            expires_at: after(SystemClock::default().now(), Duration::from_secs(3600)),
        }
    }

    pub fn full(&mut self, i: &str, version: u64, rows: &Rows) {
        self.publish(i, version, None, rows, digest(rows));
    }
    /// A delta from the newest version.
    pub fn delta(&mut self, i: &str, version: u64, rows: &Rows) {
        let base = self.streams[&instance(i).stream].version;
        self.publish(i, version, Some(base), rows, digest(rows));
    }
    /// A delta, validly signed, whose trailer does not fit its rows.
    pub fn poisoned_delta(&mut self, i: &str, version: u64, rows: &Rows) {
        let base = self.streams[&instance(i).stream].version;
        self.publish(i, version, Some(base), rows, StateDigest::default());
    }

    /// What the newest version of a stream requires of another.
    pub fn requires(&mut self, stream: &str, of: &str, version: u64) {
        self.streams.get_mut(stream).unwrap().requires = BTreeMap::from([(of.parse().unwrap(), v(version))]);
    }

    fn publish(&mut self, i: &str, version: u64, base: Option<Version>, rows: &Rows, proof: StateDigest) {
        let i = instance(i);
        let table: TableName = self.tables.get(i.stream.as_str()).unwrap_or(&i.stream.as_str()).parse().unwrap();
        let (bytes, entry) =
            pack(&i, &table, (v(version), base), base.map(|b| &self.states[&(i.clone(), b)]), rows, proof);
        self.put(&entry.name(&i).into(), &bytes);
        self.states.insert((i.clone(), v(version)), rows.clone());
        let fresh = StreamEntry {
            audience: i.audience.clone(),
            version: v(version),
            schema: 1,
            digests: BTreeMap::new(),
            packs: Vec::new(),
            requires: BTreeMap::new(),
        };
        let s = self.streams.entry(i.stream.clone()).or_insert_with(|| fresh.clone());
        if s.audience != i.audience {
            *s = fresh;
        }
        s.version = v(version);
        s.digests = BTreeMap::from([(table, digest(rows))]);
        s.packs.push(entry);
        s.packs.sort_by_key(|p| (p.version, p.kind));
    }

    /// Signs and puts the manifest of what was published.
    pub fn sign(&mut self) {
        self.serial += 1;
        let now = SystemClock::default().now();
        let manifest = Manifest {
            format: 1,
            store: STORE.parse().unwrap(),
            serial: self.serial,
            epoch: self.epoch,
            created_at: now,
            expires_at: after(now, Duration::from_secs(30 * 86_400)),
            streams: self.streams.clone(),
            relay: None,
            registers: BTreeMap::from([(REGISTER.parse().unwrap(), key(3).public())]),
            unread: BTreeMap::new(),
        };
        let bytes = sign_manifest(&manifest, &key(2)).unwrap();
        self.put(&ObjectName::Manifest(STORE.parse().unwrap()), &bytes);
    }
}

fn pack(
    i: &Instance,
    table: &TableName,
    (version, base): (Version, Option<Version>),
    from: Option<&Rows>,
    to: &Rows,
    proof: StateDigest,
) -> (Vec<u8>, PackEntry) {
    let ddl = format!("CREATE TABLE {table} (sku INTEGER PRIMARY KEY, cents INTEGER NOT NULL) STRICT;");
    let contract = Contract::parse(&ddl, &Limits::default()).unwrap();
    let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
    let header = Header {
        format: 1,
        stream: i.stream.clone(),
        audience: i.audience.clone(),
        version,
        base,
        kind,
        schema: SchemaPart { number: 1, ddl: ddl.clone(), sha256: contract.sha256, migrate: Vec::new() },
        created_at: Timestamp::UNIX_EPOCH,
        source: "test".into(),
        tables: table_heads(&contract),
    };
    let columns: Vec<ColumnName> = ["sku", "cents"].map(|c| c.parse().unwrap()).to_vec();
    let mut w = PackWriter::new(Vec::new(), &header, 1).unwrap();
    let empty = Rows::new();
    let from = from.unwrap_or(&empty);
    let both = |sku: &i64, cents: &i64| [Value::Int(*sku), Value::Int(*cents)];
    if kind == PackKind::Delta {
        w.section(table, Op::Delete, &columns[..1]).unwrap();
        from.keys().filter(|k| !to.contains_key(k)).for_each(|k| w.row(&[Value::Int(*k)]).unwrap());
        w.section(table, Op::Update, &columns).unwrap();
        to.iter().filter(|(k, c)| from.get(k).is_some_and(|f| f != *c)).for_each(|(k, c)| w.row(&both(k, c)).unwrap());
    }
    w.section(table, Op::Insert, &columns).unwrap();
    to.iter().filter(|(k, _)| !from.contains_key(k)).for_each(|(k, c)| w.row(&both(k, c)).unwrap());
    let (bytes, written) = w.finish(&BTreeMap::from([(table.clone(), proof)])).unwrap();
    let entry =
        PackEntry { version, kind, base, bytes: written.bytes, unpacked: written.unpacked, sha256: written.sha256 };
    (bytes, entry)
}

/// A register's directory and settings.
pub struct Register {
    _dir: TempDir,
    pub config: Config,
    pub clock: Arc<TestClock>,
}

impl Register {
    /// Enrolled at `hq`, reading from `relay`.
    pub fn enrolled(hq: &Hq, relay: &str, fallback: &[String]) -> Register {
        proto::fetch::install_tls();
        let dir = TempDir::new().unwrap();
        let text = format!(
            "register = \"{REGISTER}\"\ndata_dir = \"data\"\nrelay = \"{relay}\"\nfallback = {fallback:?}\n\
             ballast = \"0\"\nlocal_listen = \"127.0.0.1:0\"\nfallback_jitter = \"0s\"\n"
        );
        let file = dir.path().join("agent.toml");
        std::fs::write(&file, text).unwrap();
        let config = Config::load(Some(&file), []).unwrap().value;
        std::fs::create_dir(&config.data_dir).unwrap();
        Device::enrol(&config.data_dir, &hq.code()).unwrap();
        let clock = Arc::new(TestClock::at(&SystemClock::default().now().to_string()));
        Register { _dir: dir, config, clock }
    }
    pub fn open(&self) -> Agent {
        self.watched(None)
    }
    pub fn watched(&self, observer: Option<Observer>) -> Agent {
        Agent::open(self.config.clone(), self.clock.clone(), observer).unwrap()
    }
    /// What the POS application sees.
    pub fn reader(&self) -> Connection {
        read(&self.config.store_db())
    }
    pub fn rows(&self, table: &str) -> Rows {
        rows_of(&self.reader(), table)
    }
    /// Changes rows behind the agent's back.
    pub fn tamper(&self, sql: &str) {
        let db = Connection::open(self.config.store_db()).unwrap();
        db.busy_timeout(Duration::from_secs(5)).unwrap();
        db.execute_batch(sql).unwrap();
    }
    /// Whether the table is there.
    pub fn holds(&self, table: &str) -> bool {
        let db = self.reader();
        db.query_row("SELECT count(*) FROM sqlite_schema WHERE name = ?1", [table], |r| r.get::<_, i64>(0)).unwrap() > 0
    }
    pub fn downloads(&self) -> usize {
        let packs = self.config.data_dir.join("packs");
        let dirs = std::fs::read_dir(packs).unwrap().map(|d| d.unwrap().path());
        dirs.map(|d| std::fs::read_dir(d).unwrap().count()).sum()
    }
}

pub fn read(path: &Path) -> Connection {
    let db = Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    db.busy_timeout(Duration::from_secs(5)).unwrap();
    db
}

pub fn rows_of(db: &Connection, table: &str) -> Rows {
    let mut s = db.prepare(&format!("SELECT sku, cents FROM {table}")).unwrap();
    let rows = s.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

/// One cycle without news.
pub async fn cycle(agent: &Agent) -> crate::pace::End {
    let (_tell, mut news) = watch::channel(0u64);
    agent.cycle(&mut news).await
}

/// One poll of the relay and one cycle.
pub async fn poll_and_cycle(agent: &Agent) -> crate::pace::End {
    agent.upstream.poll_relay(Duration::ZERO).await;
    cycle(agent).await
}

pub fn version(agent: &Agent, i: &str) -> Option<u64> {
    let shown = agent.shown();
    let held = shown.held.get(&instance(i).stream)?;
    (held.audience == instance(i).audience).then(|| held.version.get())
}

/// What a test turns at the relay while it runs.
pub struct Desk {
    pub root: PathBuf,
    /// `/v1/versions`; none: 404, a static server.
    pub versions: watch::Sender<Option<BTreeMap<String, u64>>>,
    pub errors: Mutex<Vec<Fault>>,
    pub silent: std::sync::atomic::AtomicBool,
    /// What some paths are answered with.
    pub refused: Mutex<BTreeMap<String, StatusCode>>,
    pub beats: Mutex<Vec<Heartbeat>>,
    pub answer: Mutex<BeatAnswer>,
    pub asked: Mutex<Vec<String>>,
}

/// A relay on loopback.
pub struct Relay {
    pub url: String,
    pub desk: Arc<Desk>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    pub async fn serving(hq: &Hq) -> Relay {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let desk = Arc::new(Desk {
            root: hq.dir.path().to_owned(),
            versions: watch::channel(None).0,
            errors: Mutex::new(Vec::new()),
            silent: false.into(),
            refused: Mutex::default(),
            beats: Mutex::new(Vec::new()),
            answer: Mutex::new(BeatAnswer {
                passed_on: BTreeMap::new(),
                go_on_above: BTreeMap::new(),
                hq_seen_s: Some(5),
                now: SystemClock::default().now(),
                refused: BTreeMap::new(),
            }),
            asked: Mutex::new(Vec::new()),
        });
        let at = desk.clone();
        let handler = move |request, _peer| answer(at.clone(), request);
        let task = tokio::spawn(proto::http::serve(listener, Default::default(), std::future::pending(), handler));
        Relay { url, desk, task }
    }
    pub fn lists(&self, versions: &[(&str, u64)]) {
        let versions = versions.iter().map(|(i, n)| ((*i).to_owned(), *n)).collect();
        self.desk.versions.send_replace(Some(versions));
    }
    /// Answers a path with a status; none: as before.
    pub fn refuses(&self, path: &str, status: Option<u16>) {
        let mut refused = self.desk.refused.lock().unwrap();
        match status {
            Some(status) => refused.insert(path.to_owned(), StatusCode::from_u16(status).unwrap()),
            None => refused.remove(path),
        };
    }
    pub fn be_silent(&self, silent: bool) {
        self.desk.silent.store(silent, std::sync::atomic::Ordering::Relaxed);
    }
}

async fn answer(desk: Arc<Desk>, request: Request<Inbound>) -> Response<Body> {
    let path = request.uri().path().trim_start_matches('/').to_owned();
    desk.asked.lock().unwrap().push(path.clone());
    if desk.silent.load(std::sync::atomic::Ordering::Relaxed) {
        return text(StatusCode::BAD_GATEWAY, "gone");
    }
    if let Some(status) = desk.refused.lock().unwrap().get(&path) {
        return text(*status, "refused");
    }
    match path.as_str() {
        "v1/versions" => versions(&desk, &request).await,
        "v1/errors" => json(StatusCode::OK, serde_json::to_vec(&*desk.errors.lock().unwrap()).unwrap()),
        "v1/heartbeats" => {
            let beats: Beats = serde_json::from_slice(&read_body(request.into_body(), 1 << 20).await.unwrap()).unwrap();
            for b in beats.beats {
                let envelope = serde_json::to_vec(&b.envelope).unwrap();
                let device = REGISTER.parse().unwrap();
                let beat = Heartbeat::open(&envelope, &device, &key(3).public(), &Limits::default()).unwrap();
                desk.beats.lock().unwrap().push(beat);
            }
            json(StatusCode::OK, serde_json::to_vec(&*desk.answer.lock().unwrap()).unwrap())
        }
        object => match std::fs::read(desk.root.join(object)) {
            Ok(bytes) => {
                let mut r = Response::new(Body::Bytes(Bytes::from(bytes)));
                r.headers_mut().insert("content-type", "application/octet-stream".parse().unwrap());
                r
            }
            Err(_) => text(StatusCode::NOT_FOUND, "not here"),
        },
    }
}

async fn versions(desk: &Desk, request: &Request<Inbound>) -> Response<Body> {
    let mut news = desk.versions.subscribe();
    let query = request.uri().query().unwrap_or("");
    let wait = query.split('&').find_map(|q| q.strip_prefix("wait=")).and_then(|s| s.parse().ok()).unwrap_or(0);
    let until = tokio::time::Instant::now() + Duration::from_secs(wait);
    loop {
        let Some(now) = news.borrow_and_update().clone() else { return text(StatusCode::NOT_FOUND, "static") };
        let body = serde_json::to_vec(&now).unwrap();
        let etag = format!("\"{}\"", &proto::digest::Sha256::of(&body).to_string()[..16]);
        let is_known = none_match(request.headers(), &etag);
        let waited = is_known && tokio::time::timeout_at(until, news.changed()).await.is_ok();
        if !waited {
            let mut r =
                if is_known { proto::http::empty(StatusCode::NOT_MODIFIED) } else { json(StatusCode::OK, body) };
            r.headers_mut().insert("etag", etag.parse().unwrap());
            return r;
        }
    }
}

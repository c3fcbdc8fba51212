//! A headquarters of the tests' own: makes real packs, manifests and trust files in a directory as bucket.
#![allow(clippy::disallowed_methods, dead_code, missing_docs)]

use proto::clock::{Timestamp, after};
use proto::digest::{RowHasher, Sha256, StateDigest};
use proto::http::{Body, HttpLimits, Inbound, text};
use proto::ids::{Audience, Instance, RegisterId, StreamName, TableName, Version};
use proto::keys::{PublicKey, SecretKey};
use proto::layout::{ObjectName, PackKind, PackName};
use proto::limits::Limits;
use proto::manifest::{Manifest, PackEntry, StreamEntry};
use proto::pack::{Header, Op, PackWriter, SchemaPart, table_heads};
use proto::schema::Contract;
use proto::trust::{EnrolCode, PublisherKey, RootKeys, Trust, sign_manifest};
use proto::value::Value;
use std::collections::BTreeMap;
use std::fs;
use std::future::ready;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;

pub const NOW: &str = "2026-11-21T12:00:00Z";

pub fn v(n: u64) -> Version {
    Version::try_from(n).unwrap()
}
pub fn secret(n: u8) -> SecretKey {
    SecretKey::from_seed([n; 32])
}
pub fn now() -> Timestamp {
    NOW.parse().unwrap()
}

type Rows = BTreeMap<i64, String>;

/// What a stream of the test's has published.
pub struct Line {
    audience: Audience,
    rows: Rows,
    pub entries: Vec<PackEntry>,
    version: u64,
}

/// Which packs a publish makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Make {
    Delta,
    Full,
    Both,
}

/// Headquarters and its bucket.
pub struct Hq {
    pub bucket: TempDir,
    pub lines: BTreeMap<StreamName, Line>,
    pub serial: u64,
    pub epoch: u64,
    pub trust_version: u64,
    pub publisher: SecretKey,
    pub registers: BTreeMap<RegisterId, PublicKey>,
    pub created_at: Timestamp,
    /// Whether contracts have an index.
    pub indexed: bool,
}

impl Hq {
    pub fn new() -> Hq {
        proto::fetch::install_tls();
        let mut hq = Hq {
            bucket: TempDir::new().unwrap(),
            lines: BTreeMap::new(),
            serial: 0,
            epoch: 1,
            trust_version: 0,
            publisher: secret(10),
            registers: BTreeMap::new(),
            created_at: now(),
            indexed: false,
        };
        hq.put_trust();
        hq
    }

    fn roots() -> RootKeys {
        RootKeys { threshold: 1, keys: vec![secret(1).public()] }
    }

    /// Publishes the next trust file.
    pub fn put_trust(&mut self) {
        self.trust_version += 1;
        let trust = Trust {
            format: 1,
            version: self.trust_version,
            epoch: self.epoch,
            created_at: self.created_at,
            root: Hq::roots(),
            publishers: vec![PublisherKey {
                key: self.publisher.public(),
                // The binaries go by the system's clock.
                expires_at: after(now(), Duration::from_secs(36_500 * 86_400)),
            }],
            streams: Default::default(),
        };
        let bytes = trust.sign(&[&secret(1)]).unwrap();
        self.put(&ObjectName::Trust, &bytes);
        self.put(&ObjectName::TrustVersion(self.trust_version), &bytes);
    }

    pub fn path(&self, name: &ObjectName) -> PathBuf {
        self.bucket.path().join(name.to_string())
    }
    pub fn put(&self, name: &ObjectName, bytes: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    pub fn url(&self) -> String {
        format!("file://{}", self.bucket.path().display())
    }

    /// Lets the store follow a stream of another audience from now on; published by a full.
    pub fn follow(&mut self, stream: &str, audience: &str) {
        let line = Line { audience: audience.parse().unwrap(), rows: Rows::new(), entries: Vec::new(), version: 0 };
        self.lines.insert(stream.parse().unwrap(), line);
    }

    pub fn instance(&self, stream: &str) -> Instance {
        let (stream, line) = self.lines.get_key_value(stream).unwrap();
        Instance { stream: stream.clone(), audience: line.audience.clone() }
    }

    pub fn pack(&self, stream: &str, version: u64, kind: PackKind) -> PackName {
        PackName { instance: self.instance(stream), version: v(version), kind }
    }

    /// Sets rows (`None` deletes), makes the next version's packs, and does not sign them yet.
    pub fn publish(&mut self, stream: &str, changes: &[(i64, Option<&str>)], make: Make) -> u64 {
        self.publish_with(stream, changes, make, |d| d)
    }

    /// The same with digests bent by `bend`: a pack that is whole, and bad.
    pub fn publish_with(
        &mut self,
        stream: &str,
        changes: &[(i64, Option<&str>)],
        make: Make,
        bend: impl Fn(StateDigest) -> StateDigest,
    ) -> u64 {
        let instance = self.instance(stream);
        let (before, base) = (self.lines[stream].rows.clone(), self.lines[stream].version);
        let mut rows = before.clone();
        for (id, name) in changes {
            match name {
                Some(name) => rows.insert(*id, (*name).to_owned()),
                None => rows.remove(id),
            };
        }
        let version = base + 1;
        let digest = bend(digest(&rows));
        let mut entries = Vec::new();
        if make != Make::Delta {
            entries.push(self.write_pack(&instance, version, None, &Rows::new(), &rows, digest));
        }
        if make != Make::Full {
            entries.push(self.write_pack(&instance, version, Some(base), &before, &rows, digest));
        }
        let line = self.lines.get_mut(stream).unwrap();
        line.entries.extend(entries);
        line.rows = rows;
        line.version = version;
        version
    }

    fn write_pack(
        &self,
        instance: &Instance,
        version: u64,
        base: Option<u64>,
        before: &Rows,
        rows: &Rows,
        digest: StateDigest,
    ) -> PackEntry {
        let ddl = ddl(&instance.stream, self.indexed);
        let contract = Contract::parse(&ddl, &Limits::default()).unwrap();
        let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
        let header = Header {
            format: 1,
            stream: instance.stream.clone(),
            audience: instance.audience.clone(),
            version: v(version),
            base: base.map(v),
            kind,
            schema: SchemaPart { number: 1, ddl, sha256: contract.sha256, migrate: Vec::new() },
            created_at: now(),
            source: "kit".into(),
            tables: table_heads(&contract),
        };
        let mut pack = PackWriter::new(Vec::new(), &header, 6).unwrap();
        let (table, columns) = (table(&instance.stream), ["id".parse().unwrap(), "name".parse().unwrap()]);
        let row = |id: i64, name: &str| [Value::Int(id), Value::Text(name.to_owned().into())];
        let gone: Vec<_> = before.keys().filter(|id| !rows.contains_key(id)).collect();
        if !gone.is_empty() {
            pack.section(&table, Op::Delete, &columns[..1]).unwrap();
            gone.iter().for_each(|id| pack.row(&[Value::Int(**id)]).unwrap());
        }
        let changed: Vec<_> = rows.iter().filter(|(id, n)| before.get(id).is_some_and(|b| b != *n)).collect();
        if !changed.is_empty() {
            pack.section(&table, Op::Update, &columns).unwrap();
            changed.iter().for_each(|(id, n)| pack.row(&row(**id, n)).unwrap());
        }
        let new: Vec<_> = rows.iter().filter(|(id, _)| !before.contains_key(id)).collect();
        if !new.is_empty() {
            pack.section(&table, Op::Insert, &columns).unwrap();
            new.iter().for_each(|(id, n)| pack.row(&row(**id, n)).unwrap());
        }
        let (bytes, written) = pack.finish(&BTreeMap::from([(table, digest)])).unwrap();
        let entry = PackEntry {
            version: v(version),
            kind,
            base: base.map(v),
            bytes: bytes.len() as u64,
            unpacked: written.unpacked,
            sha256: Sha256::of(&bytes),
        };
        self.put(&ObjectName::Pack(entry.name(instance)), &bytes);
        entry
    }

    /// The store's manifest as it would be now.
    pub fn manifest(&self) -> Manifest {
        let entry = |line: &Line, stream: &StreamName| StreamEntry {
            audience: line.audience.clone(),
            version: v(line.version),
            schema: 1,
            digests: BTreeMap::from([(table(stream), digest(&line.rows))]),
            packs: line.entries.clone(),
            requires: BTreeMap::new(),
        };
        Manifest {
            format: 1,
            store: "0421".parse().unwrap(),
            serial: self.serial,
            epoch: self.epoch,
            created_at: self.created_at,
            expires_at: after(self.created_at, Duration::from_secs(30 * 86_400)),
            streams: self.lines.iter().filter(|(_, l)| l.version > 0).map(|(s, l)| (s.clone(), entry(l, s))).collect(),
            relay: Some(secret(21).public()),
            registers: self.registers.clone(),
            unread: BTreeMap::new(),
        }
    }

    /// Signs and puts the next manifest.
    pub fn sign(&mut self) {
        self.serial += 1;
        let bytes = sign_manifest(&self.manifest(), &self.publisher).unwrap();
        self.put(&ObjectName::Manifest("0421".parse().unwrap()), &bytes);
    }

    /// Lists a pack no more.
    pub fn unlist(&mut self, name: &PackName) {
        let line = self.lines.get_mut(name.instance.stream.as_str()).unwrap();
        line.entries.retain(|e| (e.version, e.kind) != (name.version, name.kind));
    }

    /// Flips a bit of a pack in the bucket; the good bytes come back.
    pub fn spoil(&self, name: &PackName) -> Vec<u8> {
        let path = self.path(&name.clone().into());
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::write(path, bad).unwrap();
        good
    }

    /// Serves the bucket as S3 does to whom it does not let list it: what is not there is forbidden.
    pub async fn unlisted(&self) -> Unlisted {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (url, shut) = (format!("http://{}", listener.local_addr().unwrap()), Arc::new(AtomicBool::new(false)));
        let (bucket, is_shut) = (self.bucket.path().to_owned(), Arc::clone(&shut));
        let answer = move |request: http::Request<Inbound>, _| {
            let path = bucket.join(request.uri().path().trim_start_matches('/').replace("%40", "@"));
            let found = (!is_shut.load(Ordering::Relaxed)).then(|| fs::read(path).ok()).flatten();
            let forbidden = || text(http::StatusCode::FORBIDDEN, "AccessDenied");
            ready(found.map_or_else(forbidden, |bytes| http::Response::new(Body::from(bytes))))
        };
        tokio::spawn(proto::http::serve(listener, HttpLimits::default(), std::future::pending(), answer));
        Unlisted { url, shut }
    }

    /// What the stream's table must hold, as a digest.
    pub fn digest(&self, stream: &str) -> StateDigest {
        digest(&self.lines[stream].rows)
    }
}

/// A server of [`Hq::unlisted`]; once it is shut all is forbidden, as to a token that has expired.
pub struct Unlisted {
    pub url: String,
    pub shut: Arc<AtomicBool>,
}

fn table(stream: &StreamName) -> TableName {
    format!("{stream}_row").parse().unwrap()
}
fn ddl(stream: &StreamName, indexed: bool) -> String {
    let table = table(stream);
    let index = if indexed { format!("\nCREATE INDEX {table}_name ON {table} (name);") } else { String::new() };
    format!("CREATE TABLE {table} (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;{index}")
}
fn digest(rows: &Rows) -> StateDigest {
    let mut d = StateDigest::default();
    let mut hasher = RowHasher::default();
    for (id, name) in rows {
        d.add(hasher.hash(&[Value::Int(*id), Value::Text(name.as_str().into())]));
    }
    d
}

/// An enrolment code of the store's relay.
pub fn code() -> EnrolCode {
    EnrolCode {
        format: 1,
        id: "0421".parse().unwrap(),
        seed: secret(21).to_secret_text(),
        roots: Hq::roots(),
        trust_version: 1,
        expires_at: after(now(), Duration::from_secs(86_400)),
    }
}

//! Whole publishes against a directory and a SQLite source, cut at every durable step; a store's
//! replica follows the bucket and must end with the source's rows.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

use super::*;
use crate::cli::RevokeKey;
use crate::enrol::{Desk, EnrolError, TrustReport};
use crate::ledger::{BeatRow, State};
use proto::chain;
use proto::clock::TestClock;
use proto::digest::Sha256;
use proto::dsse;
use proto::layout::{ObjectName, PackKind};
use proto::limits::Limits;
use proto::manifest::Manifest;
use proto::replica::{Job, PackFile, TableCheck};
use rusqlite::Connection;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

mod anew;
mod away;
mod bucket;
mod contracts;
mod fulls;
mod inbox;
mod mistakes;
mod moves;
mod requires;
mod runs;
mod set_back;
mod stores;

const CATALOG: &str = "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL CHECK (length(name) <= 20), plu INTEGER UNIQUE) STRICT;";
const PRICE: &str = "CREATE TABLE price (sku TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT;\nCREATE TABLE deal (id INTEGER PRIMARY KEY, sku TEXT NOT NULL) STRICT;";
const CONFIG: &str = r#"
[source]
url = "sqlite:hq.db"
[objects]
urls = ["file:objects"]
[state]
dir = "state"
[stores]
query = "SELECT id, zone, region FROM store"
[[stream]]
name = "catalog"
audience = "all"
schema = "catalog.sql"
[[stream.table]]
name = "item"
query = "SELECT sku, name, plu FROM item"
[[stream]]
name = "price"
audience = "zone"
schema = "price.sql"
[[stream.table]]
name = "price"
query = "SELECT sku, cents FROM price WHERE zone = :zone"
[[stream.table]]
name = "deal"
query = "SELECT id, sku FROM deal WHERE zone = :zone"
[publish]
lease_wait = "1s"
"#;
const SOURCE: &str = "
    CREATE TABLE store (id TEXT, zone TEXT, region TEXT);
    INSERT INTO store VALUES ('0421', 'east', 'N'), ('0422', 'west', NULL);
    CREATE TABLE item (sku TEXT, name TEXT, plu INTEGER);
    CREATE TABLE price (zone TEXT, sku TEXT, cents INTEGER);
    CREATE TABLE deal (zone TEXT, id INTEGER, sku TEXT);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400) INSERT INTO item SELECT 'sku' || i, 'Item ' || i, i FROM n;
    INSERT INTO price SELECT 'east', sku, plu * 10 FROM item; INSERT INTO price SELECT 'west', sku, plu * 11 FROM item;
    INSERT INTO deal VALUES ('east', 1, 'sku1'), ('west', 1, 'sku2');";
const CHANGE: &str = "
    UPDATE item SET plu = CASE plu WHEN 1 THEN 2 ELSE 1 END WHERE plu IN (1, 2); DELETE FROM item WHERE sku = 'sku9';
    INSERT INTO item VALUES ('new', 'New', 9999); UPDATE price SET cents = cents + 1 WHERE zone = 'east' AND sku LIKE 'sku1%';
    INSERT INTO deal VALUES ('east', 2, 'sku3');";

/// Ends the run at the n-th moment (before or after a step).
struct CutAt {
    left: AtomicUsize,
    cut: Mutex<Option<String>>,
}

impl CutAt {
    fn new(n: usize) -> Self {
        CutAt { left: AtomicUsize::new(n), cut: Mutex::default() }
    }
    fn tick(&self, when: &str, step: &Step) -> Result<(), Aborted> {
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Ok(());
        }
        self.cut.lock().unwrap().get_or_insert(format!("{when} {step:?}"));
        Err(Aborted)
    }
}

impl Steps for CutAt {
    fn before(&self, step: &Step) -> Result<(), Aborted> {
        self.tick("before", step)
    }
    fn after(&self, step: &Step) -> Result<(), Aborted> {
        self.tick("after", step)
    }
}

struct World {
    dir: tempfile::TempDir,
    config: Config,
    clock: Arc<TestClock>,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for e in fs::read_dir(from).unwrap() {
        let e = e.unwrap();
        let target = to.join(e.file_name());
        if e.file_type().unwrap().is_dir() {
            copy(&e.path(), &target)
        } else if !e.file_name().to_string_lossy().starts_with("fleet.db") {
            fs::copy(e.path(), &target).unwrap();
            // A marker stays as old as it is beside its drop.
            let modified = e.metadata().unwrap().modified().unwrap();
            fs::File::options().append(true).open(target).unwrap().set_modified(modified).unwrap();
        }
    }
}

impl World {
    async fn new() -> World {
        Self::with(CONFIG).await
    }
    /// A heartbeat of this moment that says nothing.
    fn word_of(&self, device: &str, seq: u64) -> BeatRow {
        BeatRow {
            device: device.parse().unwrap(),
            seq,
            envelope: String::new(),
            received_at: self.clock.now(),
            last_seen_at: self.clock.now(),
            serial: None,
            complaints: Vec::new(),
            versions: Vec::new(),
            proved_at: None,
        }
    }
    async fn with(config: &str) -> World {
        proto::fetch::install_tls();
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("hq.toml", config);
        put("catalog.sql", CATALOG);
        put("price.sql", PRICE);
        fs::create_dir(dir.path().join("inbox")).unwrap();
        Connection::open(dir.path().join("hq.db")).unwrap().execute_batch(SOURCE).unwrap();
        let world = Self::open(dir, Arc::new(TestClock::at("2026-01-01T00:00:00Z")));
        Desk::open(&world.config, world.clock.as_ref(), false).await.unwrap().init().await.unwrap();
        world
    }
    fn open(dir: tempfile::TempDir, clock: Arc<TestClock>) -> World {
        let config = crate::config::load(Some(&dir.path().join("hq.toml")), []).unwrap().value;
        World { dir, config, clock }
    }
    /// The same world once more, elsewhere. The ledger's connections may still be closing: SQLite copies it.
    fn twin(&self) -> World {
        let dir = tempfile::tempdir().unwrap();
        copy(self.dir.path(), dir.path());
        let ledger = dir.path().join("state/fleet.db");
        let original = Connection::open(self.dir.path().join("state/fleet.db")).unwrap();
        original.execute("VACUUM INTO ?1", [ledger.to_str().unwrap()]).unwrap();
        fs::set_permissions(&ledger, fs::Permissions::from_mode(0o600)).unwrap();
        let [from, to] = [self.dir.path(), dir.path()].map(|d| d.to_str().unwrap());
        let bucket = "UPDATE fact SET value = replace(value, ?1, ?2) WHERE name = 'bucket'";
        Connection::open(&ledger).unwrap().execute(bucket, [from, to]).unwrap();
        Self::open(dir, self.clock.clone())
    }
    /// A new machine: keys and bucket are there.
    fn lose_ledger(&self) {
        let _ = fs::remove_dir_all(self.dir.path().join("state/replicas"));
        for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
            let _ = fs::remove_file(self.dir.path().join("state").join(gone));
        }
    }
    fn back_up(&self) {
        let [ledger, backup] = ["state/fleet.db", "backup.db"].map(|f| self.dir.path().join(f));
        Connection::open(ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    }
    fn restore(&self) {
        for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
            let _ = fs::remove_file(self.dir.path().join("state").join(gone));
        }
        fs::copy(self.dir.path().join("backup.db"), self.dir.path().join("state/fleet.db")).unwrap();
    }
    fn sql(&self, sql: &str) {
        Connection::open(self.dir.path().join("hq.db")).unwrap().execute_batch(sql).unwrap();
    }
    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }
    fn exists(&self, name: &str) -> bool {
        self.dir.path().join(name).exists()
    }
    async fn publish_cut(&self, options: &PublishOptions, steps: &dyn Steps) -> Result<PublishReport, PublishError> {
        let clock: Arc<dyn Clock> = self.clock.clone();
        run(&self.config, options, &clock, &Quiet, steps).await
    }
    async fn publish_as(&self, options: PublishOptions) -> PublishReport {
        self.publish_cut(&options, &Quiet).await.unwrap()
    }
    async fn publish(&self) -> PublishReport {
        self.publish_as(PublishOptions::default()).await
    }
    /// Other buckets are named in the settings; the first of them decides.
    fn name_buckets(&mut self, dirs: &[&str]) {
        let urls: Vec<_> = dirs.iter().map(|d| format!("\"file:{d}\"")).collect();
        set(self, &CONFIG.replace("\"file:objects\"", &urls.join(", ")));
    }
    fn objects(&self) -> BTreeMap<String, Sha256> {
        self.objects_in("objects")
    }
    fn objects_in(&self, bucket: &str) -> BTreeMap<String, Sha256> {
        let mut out = BTreeMap::new();
        let bucket = self.dir.path().join(bucket);
        let mut rooms = vec![bucket.clone()];
        while let Some(room) = rooms.pop() {
            for e in fs::read_dir(&room).into_iter().flatten() {
                let path = e.unwrap().path();
                if path.is_dir() {
                    rooms.push(path);
                } else {
                    let name = path.strip_prefix(&bucket).unwrap().display().to_string();
                    out.insert(name, Sha256::of(&fs::read(&path).unwrap()));
                }
            }
        }
        out
    }
    fn manifest(&self, store: &str) -> Option<Manifest> {
        let bytes = fs::read(self.dir.path().join(format!("objects/stores/{store}/manifest.json"))).ok()?;
        Some(dsse::peek(&bytes, 1 << 20).unwrap())
    }
    /// What a register does: every stream of its manifest, by the cheapest chain from what it has.
    fn follow(&self, store: &str, replica: &mut Replica) -> BTreeMap<Instance, u64> {
        let mut at = BTreeMap::new();
        let Some(m) = self.manifest(store) else { return at };
        for (instance, entry) in m.instances() {
            let held = replica.held(&instance.stream).unwrap();
            let from = held.and_then(|h| h.version_of(&instance, m.epoch));
            let way = chain::cheapest(&entry.packs, from, entry.version, |_| true).expect("a way to the head");
            for p in way {
                let path = self.dir.path().join("objects").join(ObjectName::Pack(p.name(&instance)).to_string());
                let packs = [PackFile { path: &path, entry: p }];
                let job = Job {
                    instance: &instance,
                    epoch: m.epoch,
                    packs: &packs,
                    now: self.clock.now(),
                    prove: false,
                    listed: None,
                };
                replica.apply(&job).unwrap();
            }
            assert_eq!(replica.held(&instance.stream).unwrap().unwrap().digests, entry.digests, "{instance}");
            assert!(replica.verify(&instance.stream).unwrap().iter().all(TableCheck::is_right), "{instance}");
            at.insert(instance, entry.version.get());
        }
        at
    }
    fn register(&self, name: &str) -> Replica {
        Replica::open(&self.dir.path().join(name), &Limits::default()).unwrap()
    }
    /// A register that begins now has the source's rows of its zone.
    fn check(&self, store: &str, zone: &str) {
        let name = format!("fresh-{store}.db");
        rebuild::discard(&self.dir.path().join(&name)).unwrap();
        let mut fresh = self.register(&name);
        self.follow(store, &mut fresh);
        self.check_rows(&fresh, zone);
    }
    fn check_rows(&self, replica: &Replica, zone: &str) {
        let source = Connection::open(self.dir.path().join("hq.db")).unwrap();
        for (query, mine) in [
            (
                "SELECT sku || '|' || name || '|' || coalesce(plu, '') FROM item ORDER BY 1".to_owned(),
                "SELECT sku || '|' || name || '|' || coalesce(plu, '') FROM item ORDER BY 1",
            ),
            (
                format!("SELECT sku || '|' || cents FROM price WHERE zone = '{zone}' ORDER BY 1"),
                "SELECT sku || '|' || cents FROM price ORDER BY 1",
            ),
            (
                format!("SELECT id || '|' || sku FROM deal WHERE zone = '{zone}' ORDER BY 1"),
                "SELECT id || '|' || sku FROM deal ORDER BY 1",
            ),
        ] {
            assert_eq!(rows(&source, &query), rows(replica.connection(), mine));
        }
    }
    fn all_is_well(&self) {
        self.check("0421", "east");
        self.check("0422", "west");
        for room in ["state/scratch", "state/packs"] {
            assert_eq!(fs::read_dir(self.dir.path().join(room)).unwrap().count(), 0, "{room} is tidy");
        }
    }
}

fn rows(db: &Connection, sql: &str) -> Vec<String> {
    db.prepare(sql).unwrap().query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
}
fn outcome(r: &PublishReport, instance: &str) -> Outcome {
    r.instances[&instance.parse::<Instance>().unwrap()].outcome
}
fn options() -> PublishOptions {
    PublishOptions::default()
}

/// Revokes the publisher key that is trusted first.
async fn revoke_key(w: &World, new_epoch: bool) -> Result<TrustReport, EnrolError> {
    let key = crate::keys::Keyring::new(w.config.state.keys()).keys(crate::keys::Role::Publisher).unwrap()[0].public();
    let asked = RevokeKey { key: key.to_string(), new_epoch, root_key: Vec::new(), clock_is_right: false };
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().revoke_key(&asked).await
}

const INBOX: &str = r#"
[source]
url = "inbox:inbox"
[objects]
urls = ["file:objects"]
[state]
dir = "state"
[[stream]]
name = "catalog"
audience = "all"
schema = "catalog.sql"
[[stream]]
name = "price"
audience = "zone"
schema = "price.sql"
"#;

fn drop_file(w: &World, name: &str, text: &str) {
    w.write(&format!("inbox/{name}"), text);
    w.write(&format!("inbox/{name}.ok"), "");
}

/// Both tables of the prices of zone east.
fn drop_prices(w: &World, cents: u64) {
    drop_file(w, "price.zone-east.price.csv", &format!("sku,cents\na,{cents}\nb,200\n"));
    drop_file(w, "price.zone-east.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
}

async fn inbox_world() -> World {
    let w = World::with(INBOX).await;
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n");
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\n");
    for zone in ["east", "west"] {
        drop_file(&w, &format!("price.zone-{zone}.price.csv"), "sku,cents\na,100\nb,200\n");
        drop_file(&w, &format!("price.zone-{zone}.deal.ndjson"), "{\"id\":1,\"sku\":\"a\"}\n");
    }
    w
}

/// Which instances a store's list names.
fn listed(w: &World, store: &str) -> Vec<String> {
    w.manifest(store).unwrap().instances().map(|(i, _)| i.to_string()).collect()
}

fn set(w: &mut World, text: &str) {
    w.write("hq.toml", text);
    w.config = crate::config::load(Some(&w.dir.path().join("hq.toml")), []).unwrap().value;
}

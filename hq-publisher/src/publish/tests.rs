//! Whole publishes against a directory and a SQLite source, cut at every durable step; a store's
//! replica follows the bucket and must end with the source's rows.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

use super::*;
use crate::cli::RevokeKey;
use crate::enrol::{Desk, EnrolError, TrustReport};
use crate::ledger::{Acquired, BeatRow, State};
use crate::manifests::ManifestsError;
use proto::chain;
use proto::clock::TestClock;
use proto::digest::Sha256;
use proto::dsse;
use proto::layout::{ObjectName, PackKind};
use proto::limits::Limits;
use proto::manifest::{Manifest, StreamEntry};
use proto::replica::{Job, PackFile, TableCheck};
use rusqlite::Connection;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

mod away;
mod contracts;
mod requires;

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

#[tokio::test(flavor = "multi_thread")]
async fn publishes_what_changed_and_writes_nothing_else() {
    let w = World::new().await;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed, r.instances.len()), (0, 2, 3), "{:?}", r.lines());
    w.all_is_well();
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let before = w.objects();
    let r = w.publish().await;
    assert!(r.instances.values().all(|i| i.outcome == Outcome::Unchanged), "{:?}", r.lines());
    assert_eq!((r.signed, &w.objects()), (0, &before));
    w.sql(CHANGE);
    let r = w.publish().await;
    assert_eq!(
        [outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")],
        [Outcome::Published, Outcome::Published, Outcome::Unchanged]
    );
    let changed: Vec<_> = w.objects().into_iter().filter(|(n, h)| before.get(n) != Some(h)).map(|(n, _)| n).collect();
    assert_eq!(
        changed,
        [
            "packs/catalog@all/0000000002.delta.pack",
            "packs/price@zone-east/0000000002.delta.pack",
            "stores/0421/manifest.json",
            "stores/0422/manifest.json"
        ]
    );
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_any_step_is_finished_by_the_next_run() {
    let base = World::new().await;
    base.publish().await;
    base.follow("0421", &mut base.register("register.db"));
    base.sql(CHANGE);
    let old = base.objects();
    let mut cuts = Vec::new();
    for n in 0.. {
        let w = base.twin();
        let cut = CutAt::new(n);
        let result = w.publish_cut(&options(), &cut).await;
        let Err(PublishError::Aborted(_)) = result else {
            result.unwrap();
            break;
        };
        let at = cut.cut.lock().unwrap().clone().unwrap();
        // What the bucket says right now is whole: the old or the new.
        let mut early = w.register("early.db");
        w.follow("0421", &mut early);
        // A second cut, soon after, must not matter either.
        let _ = w.publish_cut(&options(), &CutAt::new(n % 7)).await;
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{at}: {:?}", r.lines());
        w.all_is_well();
        let mut register = w.register("register.db");
        w.follow("0421", &mut register);
        w.check_rows(&register, "east");
        w.follow("0421", &mut early);
        w.check_rows(&early, "east");
        let now = w.objects();
        assert!(
            old.iter().filter(|(n, _)| n.starts_with("packs/")).all(|(n, h)| now.get(n) == Some(h)),
            "{at}: packs are for ever"
        );
        for instance in ["catalog@all", "price@zone-east"] {
            let ledger = Ledger::open(&w.config).await.unwrap();
            let instance: Instance = instance.parse().unwrap();
            let head = ledger.head(&instance).await.unwrap().unwrap();
            let (_, held) = rebuild::open(
                &w.config.state.dir.join(format!("replicas/{instance}.db")),
                &instance,
                &Limits::default(),
            )
            .unwrap();
            assert!(rebuild::is_at(held.as_ref(), &instance, &head), "{at}: {instance}");
        }
        cuts.push(at);
    }
    assert!(cuts.len() > 20, "{cuts:#?}");
    for step in ["Reserve", "WritePack", "PutPack", "Packed", "Sign", "CommitReplica", "PutManifests", "Done"] {
        assert!(cuts.iter().any(|c| c.starts_with(&format!("before {step}"))), "no cut before {step}: {cuts:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_stop_their_stream_only() {
    let w = World::new().await;
    w.publish().await;
    w.sql("UPDATE item SET name = 'a name that is far too long' WHERE sku = 'sku7'; UPDATE price SET cents = 5 WHERE sku = 'sku7'");
    let r = w.publish().await;
    assert_eq!(
        (r.exit_code(), outcome(&r, "catalog@all"), outcome(&r, "price@zone-west")),
        (3, Outcome::Refused, Outcome::Published)
    );
    let refused = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!(
        refused.faults,
        [
            "catalog@all: table item, key sku=\"sku7\": column name has 27 characters, the limit is 20: \"a name that is far too long\""
        ]
    );
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // The other zone of a refused stream is held back, and its number burnt.
    w.sql("UPDATE item SET name = 'fine' WHERE sku = 'sku7'; UPDATE price SET cents = cents + 1 WHERE sku = 'sku8'; INSERT INTO price VALUES ('west', 'sku8', 1)");
    let r = w.publish().await;
    assert_eq!(
        [outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")],
        [Outcome::Published, Outcome::HeldBack, Outcome::Refused]
    );
    assert!(r.instances[&"price@zone-west".parse().unwrap()].faults[0].contains("the key is there twice"));
    assert!(!w.objects().keys().any(|n| n.starts_with("packs/price@zone-east/0000000003")), "nothing of it is put");
    w.sql("DELETE FROM price WHERE sku = 'sku8' AND cents = 1");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(r.instances[&"price@zone-east".parse().unwrap()].version.unwrap().get(), 4, "3 is burnt");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_rows_than_readers_take_stop_their_stream_only() {
    let w = World::with(&format!("{CONFIG}\n[limits]\nrows = 450\n")).await;
    w.publish().await;
    w.sql("INSERT INTO item SELECT 'more' || plu, name, plu + 1000 FROM item LIMIT 51; UPDATE price SET cents = 7");
    let r = w.publish().await;
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!((r.exit_code(), item.code), (3, Some("LIMITS")), "{:?}", r.lines());
    assert_eq!(item.reason, "table item: more than limits.rows = 450");
    assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published);
}

/// One mistake at the source is one event, be the zones hundreds.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_many_zones_share_a_mail_and_so_do_their_ends() {
    let w = World::new().await;
    for n in 0..10 {
        w.sql(&format!(
            "INSERT INTO store VALUES ('x{n}', 'z{n}', NULL); INSERT INTO price VALUES ('z{n}', 'sku1', 1);
             INSERT INTO deal VALUES ('z{n}', 1, 'sku1')"
        ));
    }
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap();
    w.sql("UPDATE price SET cents = NULL WHERE sku = 'sku1'");
    for _ in 0..2 {
        let r = w.publish().await;
        assert!((0..10).all(|n| outcome(&r, &format!("price@zone-z{n}")) == Outcome::Refused), "{:?}", r.lines());
        let told = mails().await;
        assert_eq!((told.len(), told[0].subject.as_str()), (1, "[Tillcast] 12 at once: publish refused"));
        let named = |text: &str| told[0].body.contains(text);
        assert!(named("Publishing price@zone-z9 was refused (BAD_ROWS)") && named("sku1"), "{told:?}");
    }
    w.sql("UPDATE price SET cents = 5 WHERE sku = 'sku1'");
    assert_eq!(w.publish().await.exit_code(), 0);
    let told: Vec<String> = mails().await.into_iter().skip(1).map(|m| m.subject).collect();
    assert_eq!(told, ["[Tillcast] Recovered: 12 at once: publish refused"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_table_or_column_is_named_and_others_go_on() {
    let w = World::new().await;
    w.sql("ALTER TABLE deal RENAME TO deals");
    let r = w.publish().await;
    assert_eq!(
        (r.exit_code(), outcome(&r, "catalog@all"), outcome(&r, "price@zone-east")),
        (3, Outcome::Published, Outcome::Refused)
    );
    assert!(r.instances[&"price@zone-east".parse().unwrap()].reason.contains("table deal"), "{:?}", r.lines());
    w.sql("ALTER TABLE deals RENAME TO deal");
    w.write("hq.toml", &CONFIG.replace("SELECT id, sku FROM deal", "SELECT id, sku AS item FROM deal"));
    let w = World::open(w.dir, w.clock);
    let r = w.publish().await;
    let reason = &r.instances[&"price@zone-east".parse().unwrap()].reason;
    assert!(reason.contains("column `item` is not in the contract; column sku is missing"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shrink_guard_holds_until_it_is_told_otherwise() {
    let w = World::new().await;
    w.publish().await;
    w.sql("DELETE FROM item WHERE plu > 299; DELETE FROM deal WHERE zone = 'west'");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 3);
    assert!(
        r.instances[&"catalog@all".parse().unwrap()].reason.contains("101 of 400 rows of table item would go (25%)"),
        "{:?}",
        r.lines()
    );
    assert!(r.instances[&"price@zone-west".parse().unwrap()].reason.contains("table deal would become empty"));
    let r = w.publish_as(PublishOptions { allow_shrink: Some(Some("catalog".parse().unwrap())), ..options() }).await;
    assert_eq!([outcome(&r, "catalog@all"), outcome(&r, "price@zone-west")], [Outcome::Published, Outcome::Refused]);
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    assert_eq!(r.exit_code(), 0);
    w.all_is_well();
    // A list that shrank is held; who was known is published to.
    w.sql(
        "CREATE TABLE spare AS SELECT * FROM store; DELETE FROM store; UPDATE price SET cents = 7 WHERE sku = 'sku3'",
    );
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.stores, outcome(&r, "price@zone-west")), (3, 2, Outcome::Published));
    assert!(r.problems[0].contains("the list of stores would become empty"), "{:?}", r.problems);
    assert!(r.vanished.is_empty() && r.notes.is_empty(), "{:?}", r.lines());
    w.all_is_well();
    w.sql("INSERT INTO store SELECT * FROM spare");
    assert_eq!(w.publish().await.exit_code(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audience_that_nobody_follows_any_more_is_told_once() {
    let w = World::new().await;
    w.publish().await;
    w.sql("UPDATE store SET zone = 'east'");
    let told = "no store follows price@zone-west any more; what was published of it stays";
    let dry = w.publish_as(PublishOptions { dry_run: true, ..options() }).await;
    let r = w.publish().await;
    assert_eq!((&dry.notes, r.exit_code()), (&r.notes, 0));
    assert_eq!(r.notes, [told, "store 0422: price@zone-west → price@zone-east"]);
    assert!(r.lines().contains(&format!("note: {told}")));
    assert!(w.publish().await.notes.is_empty());
}

/// One letter wrong in a zone may name another one.
#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_stores_is_told_by_a_dry_run_too() {
    let w = World::new().await;
    w.sql("INSERT INTO store SELECT 'S' || plu, 'west', NULL FROM item WHERE plu <= 22");
    w.publish().await;
    w.sql("DELETE FROM store WHERE id = '0422'; UPDATE store SET zone = 'east' WHERE id LIKE 'S%' AND id <> 'S9'");
    let gone: [StoreId; 1] = ["0422".parse().unwrap()];
    for dry_run in [true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((r.exit_code(), &r.vanished[..]), (0, &gone[..]), "{:?}", r.lines());
        assert!(r.lines().contains(&"no longer in the list of stores: 0422".into()), "{:?}", r.lines());
        assert_eq!((r.notes.len(), &r.notes[0][..]), (21, "store S1: price@zone-west → price@zone-east"));
        assert_eq!(r.notes[20], "1 more stores and streams go over so");
    }
    let r = w.publish().await;
    assert!(r.vanished.is_empty() && r.notes.is_empty(), "{:?}", r.lines());
    // One that has no rows is not gone over to.
    w.sql("UPDATE store SET zone = 'north' WHERE id = 'S9'");
    for dry_run in [true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((outcome(&r, "price@zone-north"), r.notes.len()), (Outcome::Refused, 0), "{:?}", r.lines());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_comes_back_in_another_case_is_refused() {
    let w = World::new().await;
    w.sql("INSERT INTO store VALUES ('ab', 'east', NULL)");
    w.publish().await;
    w.sql("UPDATE store SET id = 'AB' WHERE id = 'ab'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.stores), (3, 3), "{:?}", r.lines());
    assert!(r.problems[0].contains("store AB differs only in case from ab"), "{:?}", r.problems);
    w.sql("UPDATE store SET id = 'ab' WHERE id = 'AB'");
    assert_eq!(w.publish().await.exit_code(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_store_of_a_database_leaves_the_known_list_and_stops_no_price() {
    let w = World::new().await;
    w.sql("INSERT INTO store VALUES ('0999', 'West', NULL)");
    // Nobody is known yet.
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Source(crate::source_db::SourceError::Stores(_))), "{e}");
    w.sql("DELETE FROM store WHERE id = '0999'");
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap().len();
    let before = mails().await;
    w.sql("INSERT INTO store VALUES ('0999', 'West', NULL), ('0423', 'east', NULL)");
    for (cents, dry_run) in [(7, false), (8, true), (8, false)] {
        w.sql(&format!("UPDATE price SET cents = {cents} WHERE sku = 'sku3'"));
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((r.exit_code(), r.stores), (3, 2), "{:?}", r.lines());
        assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published, "{:?}", r.lines());
        assert!(r.problems[0].contains("store 0999"), "{:?}", r.problems);
        assert!(r.vanished.is_empty() && w.manifest("0423").is_none());
        assert_eq!(mails().await, before + 1, "it is mailed once");
    }
    w.all_is_well();
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0999'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.stores, mails().await), (0, 4, before + 2), "{:?}", r.lines());
    w.check("0999", "west");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_stores_that_cannot_be_read_leaves_the_known_one_and_stops_no_price() {
    let w = World::with(&CONFIG.replace("SELECT id, zone, region FROM store", "SELECT * FROM store")).await;
    let renamed = ["ALTER TABLE store RENAME TO shop", "ALTER TABLE shop RENAME TO store"];
    w.sql(renamed[0]);
    // Nobody is known yet.
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Source(crate::source_db::SourceError::Query { .. })), "{e}");
    w.sql(renamed[1]);
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap().len();
    let of_columns = ["ALTER TABLE store RENAME COLUMN id TO number", "ALTER TABLE store RENAME COLUMN number TO id"];
    for [broken, mended] in [renamed, of_columns] {
        let before = mails().await;
        w.sql(broken);
        for _ in 0..2 {
            w.sql("UPDATE price SET cents = cents + 1 WHERE sku = 'sku3'");
            let r = w.publish().await;
            assert_eq!((r.exit_code(), r.stores), (3, 2), "{broken}: {:?}", r.lines());
            assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published, "{broken}: {:?}", r.lines());
            assert!(r.problems[0].contains("stores.query"), "{:?}", r.problems);
            assert_eq!(mails().await, before + 1, "it is mailed once");
        }
        w.sql(mended);
        assert_eq!((w.publish().await.exit_code(), mails().await), (0, before + 2));
    }
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn few_rows_that_repeat_themselves_are_published() {
    let w = World::with(&CONFIG.replace("SELECT sku, name, plu FROM item", "SELECT sku, name, NULL AS plu FROM item"))
        .await;
    w.write("catalog.sql", "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL, plu INTEGER) STRICT;");
    w.sql("UPDATE item SET name = replace(hex(zeroblob(10000)), '0', 'x')");
    let r = w.publish().await;
    let pack = &r.instances[&"catalog@all".parse().unwrap()].packs[0];
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert!(pack.bytes * 200 < 400 * 20_000, "{pack:?}");
    w.follow("0421", &mut w.register("r.db"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_and_changes_nothing() {
    let w = World::new().await;
    w.publish().await;
    w.sql(CHANGE);
    w.write("price.sql", &PRICE.replace("sku TEXT NOT NULL)", "sku TEXT NOT NULL, note TEXT)"));
    w.write("hq.toml", &CONFIG.replace("SELECT id, sku FROM deal", "SELECT id, sku, NULL AS note FROM deal"));
    let w = World::open(w.dir, w.clock);
    let (objects, replica) = (w.objects(), fs::read(w.dir.path().join("state/replicas/catalog@all.db")).unwrap());
    let r = w.publish_as(PublishOptions { dry_run: true, ..options() }).await;
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    let counts = item.tables["item"].rows;
    assert_eq!((counts.delete, counts.update, counts.insert), (3, 0, 3), "a swap of PLUs, a row gone and a new one");
    assert!(item.packs[0].bytes > 100);
    assert_eq!(outcome(&r, "price@zone-west"), Outcome::Published, "{:?}", r.lines());
    assert_eq!(w.objects(), objects);
    assert_eq!(fs::read(w.dir.path().join("state/replicas/catalog@all.db")).unwrap(), replica);
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert!(ledger.publications(State::Reserved).await.unwrap().is_empty());
    assert_eq!(ledger.max_version(&"catalog@all".parse().unwrap()).await.unwrap().unwrap().get(), 1);
    assert!(w.publish().await.exit_code() == 0);
    // One that fails leaves nothing, and what a dead one left goes.
    fs::create_dir(w.dir.path().join("state/scratch/dry-1")).unwrap();
    w.write("state/scratch/dry-1/catalog@all.db", "left");
    fs::rename(w.dir.path().join("hq.db"), w.dir.path().join("away.db")).unwrap();
    w.publish_cut(&PublishOptions { dry_run: true, ..options() }, &Quiet).await.unwrap_err();
    assert_eq!(fs::read_dir(w.dir.path().join("state/scratch")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn contracts_grow_inside_deltas_and_are_rebuilt_on_demand() {
    let w = World::new().await;
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    w.sql("ALTER TABLE price ADD COLUMN unit TEXT; UPDATE price SET unit = 'kg' WHERE sku = 'sku1'");
    w.write(
        "price.sql",
        &format!(
            "{}\nCREATE INDEX price_cents ON price (cents);",
            PRICE.replace("cents INTEGER NOT NULL)", "cents INTEGER NOT NULL, unit TEXT DEFAULT 'each')")
        ),
    );
    w.write(
        "hq.toml",
        &CONFIG.replace("SELECT sku, cents FROM price", "SELECT sku, cents, coalesce(unit, 'each') AS unit FROM price"),
    );
    let w = World::open(w.dir, w.clock);
    let r = w.publish().await;
    let east = &r.instances[&"price@zone-east".parse().unwrap()];
    assert_eq!(east.plan.as_ref().unwrap().to_string(), "delta: new contract, 1 rows changed");
    w.follow("0421", &mut register);
    assert_eq!(
        rows(register.connection(), "SELECT unit FROM price WHERE sku IN ('sku1', 'sku2') ORDER BY sku"),
        ["kg", "each"]
    );
    let m = w.manifest("0421").unwrap();
    assert_eq!(m.streams["price"].schema, 2);
    // A narrower contract needs the flag, and a full.
    w.write("catalog.sql", &CATALOG.replace("<= 20", "<= 30"));
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.instances[&"catalog@all".parse().unwrap()].code), (3, Some("REBUILD")));
    let r = w.publish_as(PublishOptions { allow_rebuild: true, ..options() }).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(r.instances[&"catalog@all".parse().unwrap()].packs[0].kind, PackKind::Full);
    w.follow("0421", &mut register);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_damaged_and_drifted_replicas_are_made_from_the_bucket() {
    let base = World::new().await;
    base.publish().await;
    base.sql(CHANGE);
    base.publish().await;
    base.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'; UPDATE price SET cents = 1 WHERE sku = 'sku5'");
    for damage in 0..7 {
        let w = base.twin();
        let path = w.dir.path().join("state/replicas/catalog@all.db");
        match damage {
            0 => fs::remove_dir_all(w.dir.path().join("state/replicas")).unwrap(),
            1 => {
                fs::write(&path, b"this is no database at all, but it is long enough to be looked at as one..")
                    .unwrap();
                let _ = fs::remove_file(path.with_extension("db-wal"));
            }
            2 => Connection::open(&path)
                .unwrap()
                .execute_batch(
                    "UPDATE item SET name = 'by hand' WHERE sku = 'sku5'; DELETE FROM item WHERE sku = 'sku6'",
                )
                .unwrap(),
            3 => Connection::open(&path).unwrap().execute_batch("UPDATE tillcast_stream SET version = 1").unwrap(),
            4 => Connection::open(&path).unwrap().execute_batch("DROP TABLE item").unwrap(),
            5 => {
                Connection::open(&path).unwrap().execute_batch("ALTER TABLE item RENAME COLUMN name TO title").unwrap()
            }
            _ => Connection::open(&path).unwrap().execute_batch("DROP TABLE tillcast_table").unwrap(),
        }
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{damage}: {:?}", r.lines());
        let item = &r.instances[&"catalog@all".parse().unwrap()];
        assert_eq!((item.outcome, item.packs.len()), (Outcome::Published, 1), "{damage}: {:?}", r.lines());
        w.all_is_well();
    }
    // A pack that vanished from the bucket: nothing can be rebuilt without saying so.
    let w = base.twin();
    fs::remove_dir_all(w.dir.path().join("state/replicas")).unwrap();
    fs::remove_file(w.dir.path().join("objects/packs/catalog@all/0000000001.full.pack")).unwrap();
    let r = w.publish().await;
    let refused = &r.instances[&"catalog@all".parse().unwrap()];
    assert!(refused.code == Some("REPLICA") && refused.reason.contains("--full"), "{:?}", r.lines());
    assert_eq!(w.publish_as(PublishOptions { full: true, ..options() }).await.exit_code(), 0);
    w.all_is_well();
}

/// It stays listed until the full after the next: that is no fault any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pack_is_no_fault_once_a_full_goes_round_it() {
    let w = World::new().await;
    let full = || PublishOptions { full: true, ..options() };
    let ledger = Ledger::open(&w.config).await.unwrap();
    let verify = async |config: &Config| -> (bool, Vec<String>) {
        let buckets = Buckets::open(config, &ledger).await.unwrap();
        let r = crate::verify::run(config, &ledger, &buckets, |_, _| ()).await.unwrap();
        (r.is_right(), r.lines())
    };
    let lose = |name: &str| fs::remove_file(w.dir.path().join("objects/packs").join(name)).unwrap();
    let says = |lines: &[String], words: &[&str]| lines.iter().any(|l| words.iter().all(|w| l.contains(w)));
    w.publish().await;
    w.sql(CHANGE);
    w.publish().await;
    assert!(verify(&w.config).await.0);
    for (lost, round) in [
        ("catalog@all/0000000002.delta.pack", "0000000003.full.pack"),
        ("catalog@all/0000000003.full.pack", "0000000004.full.pack"),
        ("catalog@all/0000000003.delta.pack", "0000000004.full.pack"),
    ] {
        lose(lost);
        if lost.contains("full") || lost.contains("2.delta") {
            let (is_right, lines) = verify(&w.config).await;
            assert!(!is_right && says(&lines, &[lost, "is missing", "publish --full"]), "{lines:?}");
            assert_eq!(w.publish_as(full()).await.exit_code(), 0);
        }
        let (is_right, lines) = verify(&w.config).await;
        assert!(is_right && says(&lines, &["note", lost, round, "goes round it"]), "{lines:?}");
        w.all_is_well();
    }
    // What no store follows no publish makes anew; of a stream that the settings lost none does.
    w.sql("UPDATE store SET zone = 'east'");
    w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    let west = w.objects().into_keys().rfind(|o| o.starts_with("packs/price@zone-west")).unwrap();
    lose(west.strip_prefix("packs/").unwrap());
    let (is_right, lines) = verify(&w.config).await;
    assert!(is_right && says(&lines, &["note", "zone-west", "no store follows it"]), "{lines:?}");
    let mut config = w.config.clone();
    config.streams.retain(|s| s.name.as_str() != "catalog");
    lose("catalog@all/0000000004.full.pack");
    let (is_right, lines) = verify(&config).await;
    assert!(!is_right && says(&lines, &["0000000004.full.pack", "put its [[stream]] back"]), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_tells_of_all_stores_and_devices_at_once() {
    let w = World::new().await;
    w.publish().await;
    let desk = async || Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    desk().await.enroll(&"0422-01".parse().unwrap()).await.unwrap();
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    desk().await.enroll(&"0421-01".parse().unwrap()).await.unwrap();
    desk().await.revoke(&"0422-01".parse().unwrap()).await.unwrap();
    let serial = w.manifest("0421").unwrap().serial;
    for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(gone));
    }
    fs::copy(&backup, &ledger).unwrap();

    let devices = ["0421-01 was enrolled since", "0422-01 was revoked since"];
    let doctor = async || {
        let checks = crate::doctor::run(&w.config, w.clock.as_ref()).await;
        let check = checks.into_iter().find(|c| c.name == "ledger against bucket").unwrap();
        (check.verdict, check.found)
    };
    let (verdict, found) = doctor().await;
    assert_eq!(verdict, crate::doctor::Verdict::Fail);
    assert!(
        found.contains("the ledger is older than the bucket") && devices.iter().all(|d| found.contains(d)),
        "{found}"
    );
    let ledger = Ledger::open(&w.config).await.unwrap();
    // Who puts by itself tells of it once, and leaves the rest to people.
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let rows = async || ledger.stores().await.unwrap().into_iter().map(|s| s.next_serial).collect::<Vec<_>>();
    let (objects, before) = (w.objects(), rows().await);
    for _ in 0..2 {
        let told = crate::web::ticks::manifests(&serve).await.unwrap_err();
        assert!(told.contains("store 0421"), "{told}");
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
        assert!(w.objects() == objects && rows().await == before);
    }
    w.sql(CHANGE);
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert_eq!(e.exit_code(), 1);
    let mails = ledger.unsent_mails().await.unwrap();
    assert_eq!(mails.len(), 1);
    for text in [&e.to_string(), &mails[0].body] {
        assert!(["store 0421", "store 0422"].iter().chain(&devices).all(|d| text.contains(d)), "{text}");
    }
    assert_eq!(w.manifest("0421").unwrap().serial, serial, "nothing is put over it before it is told");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert!(w.manifest("0421").unwrap().serial > serial);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "one that it is over");
    assert_eq!(doctor().await.0, crate::doctor::Verdict::Pass);
    w.all_is_well();
}

/// A device told of the newer list first, and others sign meanwhile: nobody puts anything over it before it is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_is_told_whatever_devices_say_and_whoever_signs() {
    let w = inbox_world().await;
    w.publish().await;
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,east\n");
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    drop_file(&w, "price.zone-east.deal.ndjson", "{\"id\":2,\"sku\":\"b\"}\n");
    w.publish().await;
    for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(gone));
    }
    fs::copy(&backup, &ledger).unwrap();
    // A device tells of its list before anybody publishes.
    let serial = w.manifest("0421").unwrap().serial;
    let beat = BeatRow { envelope: "{}".into(), serial: Some(serial), ..w.word_of("0421", 1) };
    let ledger = Ledger::open(&w.config).await.unwrap();
    ledger.record_beats(&[beat]).await.unwrap();
    assert_eq!(ledger.store(&"0421".parse().unwrap()).await.unwrap().unwrap().next_serial, serial + 1);

    let checks = crate::doctor::run(&w.config, w.clock.as_ref()).await;
    let check = checks.into_iter().find(|c| c.name == "ledger against bucket").unwrap();
    assert_eq!(check.verdict, crate::doctor::Verdict::Fail, "{check:?}");
    // Who puts by himself signs above by the device's word, and does not put it over what nobody was told of, nor the next.
    let lists =
        || ["0421", "0423"].map(|store| fs::read(w.dir.path().join(format!("objects/stores/{store}/manifest.json"))));
    let lists = || lists().map(Result::unwrap);
    let before = lists();
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let tick = async || {
        w.clock.advance(Duration::from_secs(86_400 * 10));
        ledger.touch(w.clock.now()).await.unwrap();
        crate::web::ticks::manifests(&serve).await.unwrap_err()
    };
    for _ in 0..3 {
        let told = tick().await;
        assert!(told.contains("manifest 2 of store 0421") && lists() == before, "{told}");
    }
    // Nothing is made of what comes before it is told.
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,300\nb,200\n");
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
    assert!(e.contains("manifest 2 of store 0421") && lists() == before, "{e}");
    assert!(w.exists("inbox/price.zone-east.price.csv"));
    // Who puts by himself does not go above it, and goes on with the others.
    for _ in 0..2 {
        w.clock.advance(Duration::from_secs(86_400 * 10));
        ledger.touch(w.clock.now()).await.unwrap();
        crate::web::ticks::manifests(&serve).await.unwrap();
        assert_eq!(lists(), before);
    }
    // The other table's rows would be the backup's.
    let r = w.publish().await;
    assert!(r.exit_code() == 3 && outcome(&r, "price@zone-east") == Outcome::Refused, "{:?}", r.lines());
    let text = &r.instances[&"price@zone-east".parse().unwrap()].reason;
    assert!(text.contains("no drop has come for deal") && text.contains("drop all its files again"), "{text}");
    drop_file(&w, "price.zone-east.deal.ndjson", "{\"id\":2,\"sku\":\"b\"}\n");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    let manifest = w.manifest("0421").unwrap();
    assert!(manifest.streams["price"].version.get() == 3 && manifest.serial > serial, "above the numbers there, too");
    assert!(lists()[1] == before[1], "one that the ledger does not know is left alone");
    // Until it is told of, and then it is overtaken like any other.
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,east\n");
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
    assert!(e.contains("of store 0423") && lists()[1] == before[1], "{e}");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(listed(&w, "0423"), ["catalog@all", "price@zone-east"]);
}

/// A list that no ledger could come to is a thief's: there is no serial above each.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_with_a_serial_out_of_reach_is_not_gone_above() {
    let w = World::new().await;
    w.publish().await;
    let mut list = w.manifest("0421").unwrap();
    list.serial = u64::MAX;
    let keys = crate::keys::Keyring::new(w.config.state.keys()).keys(crate::keys::Role::Publisher).unwrap();
    let path = w.dir.path().join("objects/stores/0421/manifest.json");
    fs::write(&path, proto::trust::sign_manifest(&list, &keys[0].key).unwrap()).unwrap();
    w.sql(CHANGE);
    for _ in 0..3 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
        assert!(e.contains("--new-epoch"), "{e}");
    }
    fs::remove_file(path).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    assert!(w.manifest("0421").unwrap().serial < 9);
    w.all_is_well();
}

/// What its lists said of the zones counts until the source says more.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_with_an_inbox_empties_no_list() {
    let w = inbox_world().await;
    w.publish().await;
    let before = ["0421", "0422"].map(|store| listed(&w, store));
    w.lose_ledger();
    // The source fails first: who puts by himself has nothing to sign by.
    w.write("inbox/stores.csv", "id,zone\n0421,east\n0421,west\n");
    w.write("inbox/stores.csv.ok", "");
    let _ = w.publish_cut(&options(), &Quiet).await;
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    crate::web::ticks::manifests(&serve).await.unwrap();
    assert_eq!(["0421", "0422"].map(|store| listed(&w, store)), before);
    for file in fs::read_dir(w.dir.path().join("inbox")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        fs::remove_file(file).unwrap();
    }
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,300\nb,200\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(["0421", "0422"].map(|store| listed(&w, store)), before);
    let heads = Ledger::open(&w.config).await.unwrap().heads().await.unwrap();
    assert!(heads.values().all(|h| !h.retired), "{heads:?}");
}

/// Devices are enrolled before the first publish: what was put for them then does not hide what was published since.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_before_the_first_publish_signs_no_empty_lists() {
    let w = World::new().await;
    let desk = async || Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    for relay in ["0421", "0422"] {
        desk().await.enroll(&relay.parse().unwrap()).await.unwrap();
    }
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    w.publish().await;
    w.lose_ledger();
    fs::copy(&backup, &ledger).unwrap();

    // The first time it is found as the list is put; after that the serial is above, and it is found all the same.
    let objects = w.objects();
    for why in ["run `publish`", "Run publish first"] {
        let e = desk().await.enroll(&"0421-01".parse().unwrap()).await.unwrap_err().to_string();
        assert!(e.contains(why) && w.objects() == objects, "{e}");
    }
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let e = crate::web::ticks::manifests(&serve).await.unwrap_err();
    assert!(e.contains("Run publish first") && w.objects() == objects, "{e}");
    assert_eq!(w.publish().await.exit_code(), 0);
    desk().await.enroll(&"0421-01".parse().unwrap()).await.unwrap();
    assert_eq!(w.manifest("0421").unwrap().streams.len(), 2);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_goes_on_from_the_bucket() {
    let w = World::new().await;
    w.publish().await;
    w.sql(CHANGE);
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let serial = w.manifest("0421").unwrap().serial;
    for gone in ["state/scratch", "state/packs"] {
        fs::remove_dir_all(w.dir.path().join(gone)).unwrap();
    }
    w.lose_ledger();
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-west")), (0, Outcome::Unchanged), "{:?}", r.lines());
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!((item.version.unwrap().get(), item.packs[0].kind), (3, PackKind::Delta));
    assert!(w.manifest("0421").unwrap().serial > serial);
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
}

/// Packs that are gone from the bucket hold up nobody else on a new machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_goes_on_without_packs_that_are_gone() {
    let base = World::new().await;
    base.publish().await;
    base.sql(CHANGE);
    base.publish().await;
    for gone in [&["price@zone-east"][..], &["price@zone-east", "price@zone-west"]] {
        let w = base.twin();
        w.lose_ledger();
        let packs = w.dir.path().join("objects/packs");
        for instance in gone {
            fs::remove_dir_all(packs.join(instance)).unwrap();
        }
        w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
        let r = w.publish().await;
        // Only new rows mend it: nothing is begun anew below what stores hold.
        for instance in gone {
            let refused = &r.instances[&instance.parse().unwrap()];
            let names_it = refused.reason.contains(&format!("{instance}/0000000001.full.pack"));
            assert!(refused.code == Some("REPLICA") && names_it, "{:?}", r.lines());
        }
        assert_eq!((r.exit_code(), outcome(&r, "catalog@all")), (3, Outcome::Published), "{:?}", r.lines());
        let at = |instance: &str| {
            w.manifest("0421").unwrap().instances().find(|(i, _)| i.to_string() == instance).unwrap().1.version.get()
        };
        assert_eq!((at("catalog@all"), at("price@zone-east")), (3, 2));
        let full = PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() };
        let r = w.publish_as(full).await;
        assert_eq!((r.exit_code(), at("price@zone-east")), (0, 3), "{:?}", r.lines());
        w.all_is_well();
    }
    // One that rotted: known by its older pack.
    let w = base.twin();
    w.lose_ledger();
    w.write("objects/packs/catalog@all/0000000002.delta.pack", "rotten");
    let r = w.publish().await;
    assert_eq!(r.instances[&"catalog@all".parse().unwrap()].code, Some("REPLICA"), "{:?}", r.lines());
    assert_eq!(outcome(&r, "price@zone-west"), Outcome::Unchanged);
    let full = PublishOptions { full: true, stream: Some("catalog".parse().unwrap()), ..options() };
    assert_eq!(w.publish_as(full).await.exit_code(), 0);
    w.all_is_well();
}

/// What a run would end with is left to that: who only looked may be anybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_beside_a_ledger_set_back_says_what_a_run_would_and_changes_nothing() {
    let w = World::new().await;
    w.publish().await;
    w.back_up();
    w.sql(CHANGE);
    w.publish().await;
    w.restore();
    let ledger = Ledger::open(&w.config).await.unwrap();
    let db = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    let replica = || fs::read(w.dir.path().join("state/replicas/catalog@all.db")).unwrap();
    // Each commit of another connection's counts.
    let commits = || db.query_row("PRAGMA data_version", [], |r| r.get::<_, i64>(0)).unwrap();
    let before = (w.objects(), replica(), commits());
    let dry = PublishOptions { dry_run: true, ..options() };
    let first = w.publish_as(dry.clone()).await;
    let [told] = &first.problems[..] else { panic!("{:?}", first.lines()) };
    let stores = ["a publish would end with this: ", "of 2 stores", "0421: 2 for 1", "0422: 2 for 1"];
    assert!(first.exit_code() == 3 && stores.iter().all(|s| told.contains(s)), "{told}");
    assert!((w.objects(), replica(), commits()) == before && ledger.unsent_mails().await.unwrap().is_empty());
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(&e, PublishError::Manifests(ManifestsError::Overtaken(all)) if all.len() == 2), "{e}");
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // From then on a run goes on above.
    let before = (w.objects(), replica(), commits());
    let would = w.publish_as(dry).await;
    assert!((w.objects(), replica(), commits()) == before);
    let r = w.publish().await;
    let said = |r: &PublishReport| {
        let plan = |e: &InstanceReport| e.plan.as_ref().map(ToString::to_string);
        r.instances.iter().map(|(i, e)| (i.to_string(), e.outcome, e.version, plan(e))).collect::<Vec<_>>()
    };
    assert_eq!((said(&would), said(&first), would.exit_code()), (said(&r), said(&r), r.exit_code()));
    assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "{:?}", r.lines());
    w.all_is_well();
}

/// Revokes the publisher key that is trusted first.
async fn revoke_key(w: &World, new_epoch: bool) -> Result<TrustReport, EnrolError> {
    let key = crate::keys::Keyring::new(w.config.state.keys()).keys(crate::keys::Role::Publisher).unwrap()[0].public();
    let asked = RevokeKey { key: key.to_string(), new_epoch, root_key: Vec::new(), clock_is_right: false };
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().revoke_key(&asked).await
}

/// What a key signed is looked at while it is trusted: afterwards nobody could tell any more that the ledger was set back.
#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_let_go_of_before_a_ledger_that_was_set_back_is_told() {
    let base = inbox_world().await;
    base.publish().await;
    let desk = async || Desk::open(&base.config, base.clock.as_ref(), false).await.unwrap();
    let [old, new] = ["0421-01", "0421-02"].map(|id| id.parse().unwrap());
    desk().await.enroll(&old).await.unwrap();
    base.back_up();
    drop_file(&base, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,east\n");
    drop_prices(&base, 300);
    base.publish().await;
    desk().await.enroll(&new).await.unwrap();
    desk().await.revoke(&old).await.unwrap();
    base.restore();
    for new_epoch in [false, true] {
        let w = base.twin();
        let ledger = Ledger::open(&w.config).await.unwrap();
        let trust = async || ledger.trust().await.unwrap().len();
        let mut register = w.register("register.db");
        w.follow("0421", &mut register);
        let (objects, serial) = (w.objects(), w.manifest("0421").unwrap().serial);
        let e = revoke_key(&w, new_epoch).await.unwrap_err();
        let text = e.to_string();
        for what in ["store 0421", "store 0423: 1 for 0", "0421-02 was enrolled since", "0421-01 was revoked since"] {
            assert!(matches!(e, EnrolError::SetBack(_)) && text.contains(what), "{text}");
        }
        assert!(w.objects() == objects && trust().await == 1);
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
        // Again: the key goes at once, and no epoch begins in which registers would go back.
        let waits = async || match revoke_key(&w, new_epoch).await {
            Err(EnrolError::EpochWaits(instance)) => instance.to_string() == "price@zone-east" && new_epoch,
            other => other.unwrap().epoch == 1 && !new_epoch,
        };
        let m = async || (waits().await, trust().await, w.manifest("0421").unwrap());
        let (waits_for, files, list) = m().await;
        assert!(waits_for && files == 2 && list.epoch == 1 && list.serial > serial, "{list:?}");
        let r = w.publish().await;
        let told =
            r.problems.iter().any(|p| p.starts_with("price@zone-east") && p.contains("drop all its files again"));
        assert!(told && r.exit_code() == 3, "{:?}", r.lines());
        assert!(waits().await);
        // New rows go above what is out, and then it begins.
        drop_prices(&w, 300);
        let r = w.publish().await;
        assert_eq!(
            (r.exit_code(), w.manifest("0421").unwrap().streams["price"].version.get()),
            (0, 3),
            "{:?}",
            r.lines()
        );
        assert_eq!(revoke_key(&w, new_epoch).await.unwrap().epoch, 1 + u64::from(new_epoch));
        for _ in 0..2 {
            w.follow("0421", &mut register);
            assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a300", "b200"]);
            assert_eq!(w.publish().await.exit_code(), 0);
        }
    }
}

/// A ledger that knows serials and no versions would sign manifests that empty the stores' lists.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_signs_before_a_new_machine_knows_what_was_published() {
    let w = World::new().await;
    w.publish().await;
    let desk = async || Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let [relay, till, new] = ["0421", "0421-03", "0421-04"].map(|id| id.parse().unwrap());
    for id in [&relay, &till] {
        desk().await.enroll(id).await.unwrap();
    }
    let before = w.objects();
    w.lose_ledger();
    desk().await.init().await.unwrap();
    for _ in 0..2 {
        let e = desk().await.enroll(&new).await.unwrap_err().to_string();
        assert!(e.contains("Run publish first"), "{e}");
        let e = desk().await.revoke(&till).await.unwrap_err().to_string();
        assert!(e.contains("Run publish first"), "{e}");
        let e = desk().await.rotate(&Default::default()).await.unwrap_err().to_string();
        assert!(e.contains("Run publish first"), "{e}");
        for new_epoch in [false, true] {
            let e = revoke_key(&w, new_epoch).await.unwrap_err().to_string();
            assert!(e.contains("Run publish first"), "{new_epoch}: {e}");
        }
    }
    // A publisher that cannot read all it needs leaves nothing half taken over.
    let (pack, aside) = ("objects/packs/price@zone-east/0000000001.full.pack", "objects/aside");
    fs::rename(w.dir.path().join(pack), w.dir.path().join(aside)).unwrap();
    fs::create_dir(w.dir.path().join(pack)).unwrap();
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
    let ledger = desk().await.ledger;
    assert!(ledger.heads().await.unwrap().is_empty() && ledger.devices().await.unwrap().is_empty());
    assert!(ledger.stores().await.unwrap().iter().all(|s| s.next_serial == 1));
    fs::remove_dir(w.dir.path().join(pack)).unwrap();
    fs::rename(w.dir.path().join(aside), w.dir.path().join(pack)).unwrap();
    assert_eq!(w.objects(), before);

    w.publish().await;
    desk().await.enroll(&new).await.unwrap();
    let m = w.manifest("0421").unwrap();
    assert_eq!((m.streams.len(), m.registers.len(), m.relay.is_some()), (2, 2, true));
    w.all_is_well();
}

/// A ledger set back before a rotation, whose trust file rotted: what it does not know may be newer.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_by_a_key_that_cannot_be_followed_are_left() {
    let w = World::new().await;
    w.publish().await;
    let old = w.twin();
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().rotate(&Default::default()).await.unwrap();
    copy(&w.dir.path().join("objects"), &old.dir.path().join("objects"));
    old.write("objects/trust/0000000002.json", "rotten");
    let before = old.objects();
    assert_eq!(old.publish().await.exit_code(), 0);
    assert_eq!(old.objects(), before);
}

/// A manifest of an earlier day that somebody put back, and one that is gone, are put right though nothing changed.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_put_back_or_lost_are_put_right_by_the_next_run() {
    let w = World::new().await;
    w.publish().await;
    let [old, gone] = ["0421", "0422"].map(|s| w.dir.path().join(format!("objects/stores/{s}/manifest.json")));
    let first = fs::read(&old).unwrap();
    w.sql(CHANGE);
    w.publish().await;
    let after = w.objects();
    fs::write(&old, first).unwrap();
    fs::remove_file(&gone).unwrap();
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed, w.objects()), (0, 0, after), "{:?}", r.lines());
}

/// What stands in a store's place takes no manifest; the other stores get theirs, and nothing hides that a ledger was set back.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_manifest_cannot_be_put_holds_up_nobody_else() {
    let w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let room = |store: &str| w.dir.path().join(format!("objects/stores/{store}"));
    let away = |store: &str| w.dir.path().join(format!("away-{store}"));
    let block = |store: &str| {
        fs::rename(room(store), away(store)).unwrap();
        fs::write(room(store), "").unwrap();
    };
    let free = |store: &str| {
        fs::remove_file(room(store)).unwrap();
        fs::rename(away(store), room(store)).unwrap();
    };
    let serials = async || ledger.stores().await.unwrap().iter().map(|s| (s.serial, s.put_serial)).collect::<Vec<_>>();
    block("0421");
    for n in 2..5 {
        w.sql(&format!("UPDATE item SET name = 'Name {n}' WHERE sku = 'sku1'"));
        let r = w.publish().await;
        let told =
            r.problems.iter().filter(|p| p.contains("stores/0421") && p.starts_with("1 stores get nothing")).count();
        assert_eq!((r.exit_code(), told), (3, 1), "{:?}", r.lines());
        assert_eq!(w.manifest("0422").unwrap().serial, n);
        assert_eq!(serials().await, [(2, 1), (n, n)], "nothing is signed that may hide what is there");
        assert!(ledger.publications(State::Signed).await.unwrap().is_empty());
        w.check("0422", "west");
    }
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // That the bucket is ahead for another store is told all the same, before anything is made.
    let mut ahead = w.manifest("0422").unwrap();
    ahead.serial += 5;
    let keys = crate::keys::Keyring::new(w.config.state.keys()).keys(crate::keys::Role::Publisher).unwrap();
    let ahead = proto::trust::sign_manifest(&ahead, &keys[0].key).unwrap();
    fs::write(room("0422").join("manifest.json"), &ahead).unwrap();
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Manifests(ManifestsError::Overtaken(_))), "{e}");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), w.manifest("0422").unwrap().serial), (3, 10), "{:?}", r.lines());
    // Where it is about all of them the run ends.
    block("0422");
    w.sql("UPDATE item SET name = 'Name 9' WHERE sku = 'sku1'");
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(matches!(&e, PublishError::Manifests(e @ ManifestsError::NotPut(_)) if e.stores().len() == 2), "{e}");
    }
    // It is past the commit point.
    let mails = ledger.unsent_mails().await.unwrap();
    let told: Vec<_> = mails.iter().filter(|m| m.body.contains("publish failed")).collect();
    assert!(
        matches!(told[..], [m] if m.body.contains("the next run puts it") && !m.body.contains("Nothing was")),
        "{told:?}"
    );
    free("0421");
    free("0422");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), w.manifest("0421").unwrap().serial), (0, 3), "{:?}", r.lines());
    w.all_is_well();
    let open = ledger.open_episodes(crate::alert::PUBLISH).await.unwrap();
    assert!(open.is_empty(), "{open:?}");
}

/// A list that is longer than `limits.manifest_bytes`, its last one included, is not signed; all others are.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_over_the_limit_holds_up_nobody_else() {
    let mut w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    for n in 1..=30 {
        let key = proto::keys::SecretKey::generate().unwrap().public();
        ledger.enrol(&format!("0421-{n}").parse().unwrap(), &key, w.clock.now()).await.unwrap();
    }
    assert_eq!(w.publish().await.signed, 1);
    let length = fs::metadata(w.dir.path().join("objects/stores/0421/manifest.json")).unwrap().len();
    let row = async |store: &str| ledger.store(&store.parse().unwrap()).await.unwrap().unwrap();
    let own = w.config.limits.manifest_bytes;
    w.config.limits.manifest_bytes = length - 1;
    for n in 2..5 {
        w.sql(&format!("UPDATE item SET name = 'Name {n}' WHERE sku = 'sku1'"));
        let r = w.publish().await;
        let limit = format!("bytes, over limits.manifest_bytes = {} (", length - 1);
        let is_told = |p: &&String| p.starts_with("1 stores get nothing") && p.contains("manifest of store 0421 has ");
        let told = r.problems.iter().filter(|p| is_told(p) && p.contains(&limit)).count();
        assert_eq!((r.exit_code(), r.signed, told), (3, 1, 1), "{:?}", r.lines());
        assert_eq!([w.manifest("0421").unwrap().serial, w.manifest("0422").unwrap().serial], [2, n]);
        w.check("0422", "west");
    }
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // So is who signs because of a list's age.
    for _ in 0..8 {
        w.clock.advance(Duration::from_secs(86_400));
        ledger.touch(w.clock.now()).await.unwrap();
    }
    let signer = Signer::open(&w.config, &ledger, w.clock.as_ref(), false).await.unwrap();
    let due = signer.sign_due(&ledger, w.clock.as_ref()).await.unwrap();
    let failed = due.others.unwrap_err().stores();
    assert_eq!((due.stores, failed), (vec!["0422".parse().unwrap()], BTreeSet::from(["0421".parse().unwrap()])));
    // A key that signed a list which counts is not let go of.
    let rotate = async |finish| {
        let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
        desk.rotate(&crate::cli::Rotate { finish, ..Default::default() }).await
    };
    let e = rotate(false).await.unwrap_err();
    assert!(matches!(&e, EnrolError::Manifests(ManifestsError::NotPut(all)) if all.len() == 1), "{e}");
    let trust = manifests::newest_trust(&ledger, &w.config.limits).await.unwrap().unwrap();
    assert_eq!(trust.publishers.len(), 2);
    assert_eq!([row("0421").await.signer, row("0422").await.signer], [0, 1].map(|n| trust.publishers[n].key.id()));
    // Where it is about all of them the run ends.
    w.config.limits.manifest_bytes = 100;
    w.sql("UPDATE item SET name = 'Name 9' WHERE sku = 'sku1'");
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(matches!(&e, PublishError::Manifests(e @ ManifestsError::NotPut(_)) if e.stores().len() == 2), "{e}");
        assert_eq!((e.exit_code(), crate::code::publish(&e)), (1, "LIMITS"));
    }
    w.config.limits.manifest_bytes = own;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 2), "{:?}", r.lines());
    w.all_is_well();
    let open = ledger.open_episodes(crate::alert::PUBLISH).await.unwrap();
    assert!(open.is_empty(), "{open:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_stay_above_what_the_bucket_has() {
    let w = World::new().await;
    w.publish().await;
    let packs = w.dir.path().join("objects/packs/catalog@all");
    fs::write(packs.join("0000000007.delta.pack"), b"of a run that the ledger forgot").unwrap();
    fs::write(packs.join("9000000000.full.pack"), b"of nobody").unwrap();
    w.sql(CHANGE);
    let r = w.publish().await;
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!((item.version.unwrap().get(), item.packs[0].kind), (8, PackKind::Full), "{:?}", r.lines());
    assert_eq!((r.exit_code(), r.problems.len()), (3, 1), "the foreign one is reported");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_publishers_take_turns_and_the_dead_do_not_block() {
    let mut w = World::new().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    ledger.acquire("another machine, process 1", w.clock.now(), Duration::from_secs(60)).await.unwrap();
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(e.exit_code() == 1 && e.to_string().contains("another machine, process 1"), "{e}");
    w.clock.advance(Duration::from_secs(61));
    w.publish().await;
    // One that goes on for hours does not work: it hangs.
    let Acquired::Lease(hangs) = ledger.acquire("x", w.clock.now(), Duration::from_secs(60)).await.unwrap() else {
        panic!()
    };
    for (minutes, mails) in [(0, 0), (60, 0), (1, 1), (1, 1)] {
        w.clock.advance(Duration::from_secs(minutes * 60));
        ledger.renew(hangs, w.clock.now(), Duration::from_secs(60)).await.unwrap();
        assert!(matches!(w.publish_cut(&options(), &Quiet).await, Err(PublishError::LeaseHeld { .. })));
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), mails);
    }
    ledger.release(hangs).await.unwrap();
    // What `serve` says of publishes ends with one.
    let told = ("No publish goes through", "x");
    mail::publish_notice(&ledger, w.clock.as_ref(), NOT_RUN, Some(told)).await.unwrap();
    assert!(ledger.watched(Duration::from_secs(9)).await.unwrap() >= Some(Duration::from_secs(9)));
    w.publish().await;
    assert!(ledger.open_episodes("").await.unwrap().is_empty());
    assert_eq!(ledger.watched(Duration::ZERO).await.unwrap(), Some(Duration::ZERO));
    // Two at once on one machine: both end well, nothing is published twice.
    w.config.publish.lease_wait = proto::config::HumanDuration(Duration::from_secs(90));
    w.sql(CHANGE);
    let (a, b) = tokio::join!(w.publish(), w.publish());
    assert_eq!((a.exit_code(), b.exit_code()), (0, 0));
    let published = [&a, &b].map(|r| outcome(r, "catalog@all") == Outcome::Published);
    assert_eq!(published.iter().filter(|p| **p).count(), 1);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_publishers_key_is_told_in_time_and_until_another_one_signs() {
    let w = World::new().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let told = async || ledger.open_episodes("").await.unwrap().into_iter().map(|e| e.text).collect::<Vec<_>>();
    let right = PublishOptions { clock_is_right: true, ..options() };
    for (days, expected) in [(699, 0), (2, 1), (1, 1)] {
        w.clock.advance(Duration::from_secs(days * 86_400));
        w.publish_as(right.clone()).await;
        assert_eq!(told().await, vec!["The publisher key ends"; expected], "after {days} days more");
    }
    Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap().rotate(&Default::default()).await.unwrap();
    w.publish().await;
    assert_eq!(told().await, Vec::<String>::new());
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn fulls_come_when_they_are_due_and_old_packs_go() {
    let w = World::with(&CONFIG.replace("lease_wait", "deltas = 2\nkeep = \"1s\"\ndelete_after = \"1s\"\nlease_wait"))
        .await;
    let mut kinds = Vec::new();
    for n in 0..8 {
        w.sql(&format!("UPDATE item SET name = 'v{n}' WHERE sku = 'sku1'"));
        w.clock.advance(Duration::from_secs(5));
        let r = w.publish().await;
        let packs = &r.instances[&"catalog@all".parse().unwrap()].packs;
        kinds.push(
            packs
                .iter()
                .map(|p| &p.kind.to_string()[..1] == "f")
                .fold(packs.len(), |n, full| n * 2 + usize::from(full)),
        );
        w.all_is_well();
    }
    assert_eq!(kinds, [3, 2, 2, 9, 2, 2, 9, 2], "full, d, d, d+full, d, d, d+full, d");
    assert!(!w.exists("objects/packs/catalog@all/0000000001.full.pack"), "two fulls later it is nobody's");
    assert!(w.exists("objects/packs/catalog@all/0000000004.full.pack"));
    // More than a year later what a device might hold is known, and nothing else.
    let ledger = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    let known =
        || rows(&ledger, "SELECT '' || version FROM publication WHERE instance = 'catalog@all' ORDER BY version");
    assert_eq!(known(), ["1", "2", "3", "4", "5", "6", "7", "8"]);
    ledger.execute("UPDATE publication SET signed_s = signed_s - 401 * 86400", []).unwrap();
    for n in 8..11 {
        w.sql(&format!("UPDATE item SET name = 'v{n}' WHERE sku = 'sku1'"));
        w.clock.advance(Duration::from_secs(5));
        assert_eq!(w.publish().await.exit_code(), 0);
    }
    assert_eq!(known(), ["7", "8", "9", "10", "11"]);
    w.all_is_well();
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

/// With an inbox the replica is what a table's rows are kept from, too.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_no_drop_came_for_are_never_kept_from_a_damaged_replica() {
    for (damage, full) in
        [("UPDATE price SET cents = 1", false), ("UPDATE price SET cents = 1", true), ("a page", false)]
    {
        let w = inbox_world().await;
        w.publish().await;
        let file = w.dir.path().join("state/replicas/price@zone-east.db");
        if damage == "a page" {
            let db = Connection::open(&file).unwrap();
            let root: i64 =
                db.query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'price'", [], |r| r.get(0)).unwrap();
            let size: i64 = db.query_row("PRAGMA page_size", [], |r| r.get(0)).unwrap();
            drop(db);
            let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
            file.write_all_at(&[0xEE; 64], ((root - 1) * size).unsigned_abs()).unwrap();
        } else {
            let db = Connection::open(&file).unwrap();
            db.execute_batch(damage).unwrap();
        }
        drop_file(&w, "price.zone-east.deal.ndjson", "{\"id\":2,\"sku\":\"b\"}\n");
        let r = w.publish_as(PublishOptions { full, ..options() }).await;
        assert_eq!(
            (r.exit_code(), outcome(&r, "price@zone-east")),
            (0, Outcome::Published),
            "{damage}: {:?}",
            r.lines()
        );
        let cents: Vec<i64> = {
            let db = Connection::open(&file).unwrap();
            let mut all = db.prepare("SELECT cents FROM price ORDER BY sku").unwrap();
            all.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
        };
        assert_eq!(cents, [100, 200], "{damage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_are_published_moved_and_refused() {
    let w = inbox_world().await;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 2), "{:?}", r.lines());
    let names = |room: &str| {
        let mut names: Vec<String> = fs::read_dir(w.dir.path().join(room))
            .into_iter()
            .flatten()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("inbox"), ["done"]);
    assert_eq!(names("inbox/done").len(), 6);
    // One table of two: the other keeps its rows. A bad drop goes back with its lines.
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,one\nc,A name that is much too long,3\n");
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\n");
    drop_file(&w, "prices.all.x.csv", "a\n");
    let r = w.publish().await;
    assert_eq!(
        [outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")],
        [Outcome::Refused, Outcome::Published, Outcome::Unchanged]
    );
    assert_eq!(r.exit_code(), 3);
    assert_eq!(
        names("inbox/rejected"),
        [
            "catalog.all.item.csv",
            "catalog.all.item.csv.reason.txt",
            "price.zone-north.price.csv",
            "price.zone-north.price.csv.reason.txt",
            "prices.all.x.csv",
            "prices.all.x.csv.reason.txt"
        ]
    );
    let reason = fs::read_to_string(w.dir.path().join("inbox/rejected/catalog.all.item.csv.reason.txt")).unwrap();
    let told = &r.instances[&"catalog@all".parse().unwrap()].reason;
    assert_eq!(told, "2 bad rows in catalog.all.item.csv; nothing of stream catalog is published");
    assert!(
        reason.contains("line 3, key sku=\"b\": column plu is \"one\"")
            && reason.contains("line 4")
            && reason.contains("the limit is 20"),
        "{reason}"
    );
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a101", "b200"]);
    assert_eq!(rows(register.connection(), "SELECT id || sku FROM deal"), ["1a"]);
    // Mailed once each, and not well again before a good drop came.
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(
        ledger.unsent_mails().await.unwrap().len(),
        3,
        "the stream's refusal, and the two drops that fit nowhere"
    );
    w.publish().await;
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 3);
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\n");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(
        ledger.unsent_mails().await.unwrap().len(),
        6,
        "that stream is well, and nothing else came from nowhere"
    );
    // A drop that empties a table is held where it is, until it is told.
    drop_file(&w, "price.zone-east.deal.ndjson", "\n");
    let r = w.publish().await;
    assert_eq!(
        (outcome(&r, "price@zone-east"), names("inbox")),
        (
            Outcome::Refused,
            vec![
                "done".into(),
                "price.zone-east.deal.ndjson".into(),
                "price.zone-east.deal.ndjson.ok".into(),
                "rejected".into()
            ]
        )
    );
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    assert_eq!((outcome(&r, "price@zone-east"), names("inbox").len()), (Outcome::Published, 2));
}

/// Each drop is whole by itself: which comes first is chance.
#[tokio::test(flavor = "multi_thread")]
async fn a_drop_that_refers_to_rows_of_one_that_is_to_come_waits_for_it() {
    let w = inbox_world().await;
    let lines = "CREATE TABLE line (id INTEGER PRIMARY KEY, sku TEXT NOT NULL REFERENCES item (sku)) STRICT;";
    w.write("catalog.sql", &format!("{CATALOG}\n{lines}"));
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n");
    assert_eq!(w.publish().await.exit_code(), 0);
    let ledger = Ledger::open(&w.config).await.unwrap();
    let catalog = |r: &PublishReport| r.instances[&"catalog@all".parse().unwrap()].clone();
    let waits = |r: &PublishReport| {
        let told = catalog(r);
        assert_eq!((r.exit_code(), told.code), (3, Some("BAD_ROWS")), "{:?}", r.lines());
        let stays = "catalog.all.line.csv stays until a right drop of table item comes";
        assert!(told.reason.contains(stays) && told.faults[0].contains("sku=\"c\""), "{:?}", r.lines());
        assert!(w.exists("inbox/catalog.all.line.csv") && w.exists("inbox/catalog.all.line.csv.ok"));
    };
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,c\n");
    for cents in [101, 102] {
        drop_prices(&w, cents);
        let r = w.publish().await;
        waits(&r);
        assert_eq!((r.rejected.len(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "others go on");
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1, "it is mailed once");
    }
    // One whose own rows are bad is not waited for with it.
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,A name that is much too long,3\n");
    let r = w.publish().await;
    waits(&r);
    assert!(w.exists("inbox/rejected/catalog.all.item.csv"));
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,Cake,3\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), catalog(&r).outcome), (0, Outcome::Published), "{:?}", r.lines());
    assert!(!w.exists("inbox/catalog.all.line.csv") && w.exists("inbox/done/catalog.all.line.csv"));
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT id || sku FROM line ORDER BY 1"), ["1a", "2c"]);
    // Where the other is there, nothing is to come.
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,Cake,4\n");
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,d\n");
    let r = w.publish().await;
    assert_eq!((r.rejected.len(), r.rejected[0].name.as_str()), (1, "catalog.all.line.csv"), "{:?}", r.lines());
    // Nor where the row has a fault of its own.
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,d\n2,\nx,a\n");
    fs::remove_file(w.dir.path().join("inbox/catalog.all.item.csv")).unwrap();
    let r = w.publish().await;
    assert_eq!((r.rejected.len(), catalog(&r).bad_rows), (1, 3), "{:?}", r.lines());
    // Nor is it waited for without end: its stream waits with it. It counts from the first word, however old a drop is.
    let subjects =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let in_vain = "[Tillcast] catalog.all.line.csv was rejected".to_owned();
    let recovered = "[Tillcast] Recovered: catalog.all.line.csv was rejected".to_owned();
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,d\n");
    let file = fs::File::options().append(true).open(w.dir.path().join("inbox/catalog.all.line.csv")).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(9 * 3600)).unwrap();
    for (minutes, rejected) in [(0, 0), (30, 0), (29, 0), (1, 1)] {
        w.clock.advance(Duration::from_secs(60 * minutes));
        // Whoever writes it anew begins no new wait.
        if minutes > 1 {
            drop_file(&w, "catalog.all.line.csv", &format!("id,sku\n1,a\n2,d\n{minutes},d\n"));
        }
        let told = subjects().await.len();
        let r = w.publish_as(PublishOptions { clock_is_right: true, ..options() }).await;
        assert_eq!((r.rejected.len(), catalog(&r).code), (rejected, Some("BAD_ROWS")), "{minutes}: {:?}", r.lines());
        assert_eq!(subjects().await.len() - told, rejected, "{minutes}: {:?}", subjects().await);
    }
    assert_eq!(subjects().await.last(), Some(&in_vain));
    assert_eq!(catalog(&w.publish().await).outcome, Outcome::Unchanged, "its stream goes on");
    // What comes without it says nothing of it.
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,Cake,3\nd,Bread,4\n");
    assert_eq!(catalog(&w.publish().await).outcome, Outcome::Published);
    assert!(!subjects().await.contains(&recovered), "{:?}", subjects().await);
    // It is told anew each time it waits.
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,e\n");
    let r = w.publish().await;
    assert_eq!((r.rejected.len(), catalog(&r).code), (0, Some("BAD_ROWS")), "{:?}", r.lines());
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,d\n");
    assert_eq!(catalog(&w.publish().await).outcome, Outcome::Published);
    assert!(subjects().await.contains(&recovered), "{:?}", subjects().await);
}

/// One zone's exporter that leaves a file out holds up no other zone.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_zone_of_which_not_all_drops_came_waits_and_others_go_on() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let subjects =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let waits = "[Tillcast] price@zone-north waits for drops".to_owned();
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,north\n");
    for (minutes, cents, mails) in [(0, 101, vec![]), (59, 102, vec![]), (1, 103, vec![waits.clone()])] {
        w.clock.advance(Duration::from_secs(60 * minutes));
        drop_prices(&w, cents);
        // Each is another file.
        drop_file(&w, "price.zone-north.price.csv", &format!("sku,cents\na,{cents}\n"));
        let r = w.publish_as(PublishOptions { clock_is_right: true, ..options() }).await;
        assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published, "{minutes}: {:?}", r.lines());
        let north = &r.instances[&"price@zone-north".parse().unwrap()];
        assert_eq!((north.outcome, north.code, r.rejected.len()), (Outcome::Waiting, None, 0), "{:?}", r.lines());
        assert!(north.reason.starts_with("no drop has come for table deal yet"), "{}", north.reason);
        assert!(w.exists("inbox/price.zone-north.price.csv"), "it stays");
        assert_eq!((r.exit_code(), subjects().await), (if mails.is_empty() { 0 } else { 3 }, mails), "{minutes}");
    }
    let recovered = "[Tillcast] Recovered: price@zone-north waits for drops".to_owned();
    // A wrong one ends nothing.
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1}\n");
    let r = w.publish().await;
    assert_eq!(outcome(&r, "price@zone-north"), Outcome::Refused, "{:?}", r.lines());
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (3, Outcome::Waiting), "{:?}", r.lines());
    assert!(!subjects().await.contains(&recovered), "{:?}", subjects().await);
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    let told = |subject: &String, all: &[String]| all.iter().filter(|s| *s == subject).count();
    let all = subjects().await;
    assert_eq!((told(&waits, &all), told(&recovered, &all)), (1, 1), "{all:?}");
}

/// An exporter that goes by another list, or a letter wrong in `stores.csv`: its registers have no prices, and look well.
#[tokio::test(flavor = "multi_thread")]
async fn a_zone_of_which_no_drop_comes_is_mailed_where_devices_wait_for_it() {
    let w = inbox_world().await;
    w.publish().await;
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,north\n");
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let an_hour_on = async || {
        w.clock.advance(Duration::from_secs(3600));
        w.publish().await
    };
    let waits = "[Tillcast] price@zone-north waits for drops".to_owned();
    for (has_devices, told) in [(false, &[0, 0][..]), (true, &[0, 1, 1])] {
        if has_devices {
            let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
            desk.enroll(&"0423".parse().unwrap()).await.unwrap();
        }
        for told in told {
            let r = an_hour_on().await;
            // A stream may be meant for some only: that is no run's failure.
            assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Waiting), "{:?}", r.lines());
            assert_eq!(mails().await, vec![waits.clone(); *told]);
        }
    }
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,100\n");
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(mails().await, [waits, "[Tillcast] Recovered: price@zone-north waits for drops".into()]);
}

/// What is left of its last time is as old as that: it is neither sold by nor compared with.
#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_comes_back_waits_for_its_drops_and_others_go_on() {
    let w = inbox_world().await;
    let list = |rest: &str| drop_file(&w, "stores.csv", &format!("id,zone\n0421,east\n0422,west\n{rest}"));
    let follows = |store: &str| w.manifest(store).unwrap().streams.get("price").map(|entry| entry.audience.to_string());
    list("0423,north\n0425,east\n");
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,100\nb,200\n");
    drop_file(&w, "price.zone-north.deal.csv", "id,sku\n");
    assert_eq!(outcome(&w.publish().await, "price@zone-north"), Outcome::Published);
    list("0425,east\n");
    w.publish().await;
    // One is new there, and one goes over to it.
    list("0424,north\n0425,north\n");
    for (cents, lacks) in [(101, "no drop has come for it yet"), (102, "no drop has come for table deal yet")] {
        drop_prices(&w, cents);
        let r = w.publish().await;
        assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
        let north = &r.instances[&"price@zone-north".parse().unwrap()];
        assert_eq!((north.outcome, north.code), (Outcome::Waiting, None), "{:?}", r.lines());
        assert!(north.reason.starts_with(lacks), "{}", north.reason);
        assert_eq!((follows("0424"), follows("0425").as_deref()), (None, Some("zone-east")));
        drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,300\nb,400\n");
    }
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    for store in ["0424", "0425"] {
        assert_eq!(follows(store).as_deref(), Some("zone-north"), "{store}");
    }
}

/// The run that rejects it exits 3 once, and nobody may look at that.
#[tokio::test(flavor = "multi_thread")]
async fn a_drop_with_a_wrong_name_is_mailed_until_drops_come_without_one() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let subjects =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let wrong = ["Stores.csv", "price.zone-North.price.csv", "price.zone-east.price (1).csv"];
    wrong.iter().for_each(|name| drop_file(&w, name, "sku,cents\na,101\nb,200\n"));
    let told: Vec<String> = wrong.iter().map(|n| format!("[Tillcast] {n} in the inbox was rejected")).collect();
    for code in [3, 0] {
        let r = w.publish().await;
        assert_eq!(r.exit_code(), code, "{:?}", r.lines());
        assert_eq!(subjects().await, told);
    }
    let body = &ledger.unsent_mails().await.unwrap()[1].body;
    assert!(body.contains("price.zone-North.price.csv was rejected: ") && body.contains("rejected/"), "{body}");
    // Beside a right one it is as wrong.
    drop_prices(&w, 102);
    drop_file(&w, wrong[1], "sku,cents\n");
    assert_eq!(w.publish().await.exit_code(), 3);
    assert_eq!(subjects().await.len(), 5, "the others are over");
    drop_prices(&w, 103);
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(
        subjects().await.last().unwrap(),
        &format!("[Tillcast] Recovered: {} in the inbox was rejected", wrong[1])
    );
    // An exporter that goes wrong is no flood of mails.
    (0..22).for_each(|n| drop_file(&w, &format!("price.zone-east.price ({n}).csv"), "sku,cents\n"));
    w.publish().await;
    let mails = subjects().await;
    assert_eq!((mails.len(), mails.contains(&"[Tillcast] 2 more files in the inbox were rejected".into())), (27, true));
}

/// It would be waited for without end: it is told by each run, mailed once, and never followed.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_a_drops_name_and_is_no_file_is_told_and_left_alone() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let inbox = |name: &str| w.dir.path().join("inbox").join(name);
    w.write("elsewhere.csv", "sku,cents\na,999\n");
    let link = inbox("price.zone-east.price.csv");
    std::os::unix::fs::symlink("../elsewhere.csv", &link).unwrap();
    w.write("inbox/price.zone-east.price.csv.ok", "");
    fs::create_dir(inbox("stores.csv")).unwrap();
    // A link under another name is nobody's drop.
    std::os::unix::fs::symlink("../elsewhere.csv", inbox("README")).unwrap();
    drop_file(&w, "price.zone-north.deal.ndjson", "\n");
    for dry_run in [false, true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        let (link, dir) =
            ("price.zone-east.price.csv in the inbox is a symbolic link", "stores.csv in the inbox is a directory");
        assert!(r.problems.len() == 2 && r.problems[0].starts_with(link), "{:?}", r.lines());
        assert!(r.problems[1].starts_with(dir), "{:?}", r.lines());
        assert_eq!(r.exit_code(), 3);
        assert_eq!(r.notes.len(), 1, "a drop for who may be in the list waits for it");
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
    }
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && w.exists("elsewhere.csv"));
    fs::remove_file(&link).unwrap();
    fs::remove_dir(inbox("stores.csv")).unwrap();
    fs::remove_file(inbox("price.zone-north.deal.ndjson")).unwrap();
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 4, "one each that it is over");
}

/// Which of them is the newer one only their sender knows: the other would be published by the next run.
#[tokio::test(flavor = "multi_thread")]
async fn two_drops_for_one_table_are_refused_until_one_is_taken_away() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let names = ["price.zone-east.deal.ndjson", "price.zone-east.price.csv", "price.zone-east.price.ndjson"];
    drop_file(&w, names[0], "{\"id\":2,\"sku\":\"a\"}\n");
    drop_file(&w, names[1], "sku,cents\na,101\nb,200\n");
    drop_file(&w, names[2], "{\"sku\":\"a\",\"cents\":99}\n{\"sku\":\"b\",\"cents\":99}\n");
    for (plu, dry_run) in [(11, false), (12, true), (12, false)] {
        drop_file(&w, "catalog.all.item.csv", &format!("sku,name,plu\na,Tea,{plu}\nb,Milk,2\n"));
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        let east = &r.instances[&"price@zone-east".parse().unwrap()];
        assert_eq!((r.exit_code(), east.code), (3, Some("TWO_DROPS")), "{:?}", r.lines());
        assert_eq!(east.reason, format!("{} and {} are for one table: take one away", names[1], names[2]));
        assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "others go on");
        assert!(names.iter().all(|n| w.exists(&format!("inbox/{n}")) && w.exists(&format!("inbox/{n}.ok"))));
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1, "it is mailed once");
    }
    fs::remove_file(w.dir.path().join("inbox").join(names[2])).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a101", "b200"]);
    assert_eq!(rows(register.connection(), "SELECT id || sku FROM deal"), ["2a"]);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "and that it is over");
}

/// Drops a file when all is staged.
struct DropLate<'w>(&'w World, &'static str, &'static str);
impl Steps for DropLate<'_> {
    fn before(&self, step: &Step) -> Result<(), Aborted> {
        if *step == Step::Sign {
            drop_file(self.0, self.1, self.2);
        }
        Ok(())
    }
}

/// Another machine takes the lease, which this one was too slow to renew.
struct Stolen(std::path::PathBuf, fn(&Step) -> bool);
impl Steps for Stolen {
    fn after(&self, step: &Step) -> Result<(), Aborted> {
        if self.1(step) {
            let theirs =
                "UPDATE lease SET token = token + 1, holder = 'another machine, process 1' WHERE name = 'publish'";
            Connection::open(&self.0).unwrap().execute(theirs, []).unwrap();
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_lost_the_lease_puts_nothing_more() {
    let is_pack: fn(&Step) -> bool = |s| matches!(s, Step::WritePack(_));
    for (step, is_it, packs) in [("a pack is made", is_pack, false), ("lists are signed", |s| *s == Step::Sign, true)] {
        let w = World::new().await;
        w.publish().await;
        w.sql("UPDATE price SET cents = cents + 1");
        let before = w.objects();
        let stolen = Stolen(w.dir.path().join("state/fleet.db"), is_it);
        let e = w.publish_cut(&options(), &stolen).await.unwrap_err();
        assert_eq!((e.exit_code(), crate::code::of(&e.into())), (1, "LEASE_LOST"), "{step}");
        let after = w.objects();
        let lists = |o: &BTreeMap<String, Sha256>| -> Vec<_> {
            o.iter().filter(|(name, _)| name.contains("manifest")).map(|(n, s)| (n.clone(), *s)).collect()
        };
        assert_eq!((lists(&after), after.len() > before.len()), (lists(&before), packs), "{step}");
        w.clock.advance(Duration::from_secs(61));
        assert_eq!(w.publish().await.exit_code(), 0, "{step}");
        w.all_is_well();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_of_streams_that_are_not_asked_for_stay_where_they_are() {
    let w = inbox_world().await;
    w.publish().await;
    drop_prices(&w, 101);
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,7\nb,Milk,2\n");
    let r = w.publish_as(PublishOptions { stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east"), r.rejected.len()), (0, Outcome::Published, 0));
    assert!(w.exists("inbox/catalog.all.item.csv") && w.exists("inbox/catalog.all.item.csv.ok"));
    assert!(!w.exists("inbox/price.zone-east.price.csv"));
    assert_eq!(outcome(&w.publish().await, "catalog@all"), Outcome::Published);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_other_drop_comes_while_one_is_published_is_asked_about_by_the_next_run() {
    let w = inbox_world().await;
    w.publish().await;
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    let late = "{\"sku\":\"a\",\"cents\":99}\n{\"sku\":\"b\",\"cents\":99}\n";
    let r = w.publish_cut(&options(), &DropLate(&w, "price.zone-east.price.ndjson", late)).await.unwrap();
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
    assert!(w.exists("inbox/price.zone-east.price.csv"), "the next run finds both");
    let r = w.publish().await;
    assert_eq!(r.instances[&"price@zone-east".parse().unwrap()].code, Some("TWO_DROPS"), "{:?}", r.lines());
    fs::remove_file(w.dir.path().join("inbox/price.zone-east.price.ndjson")).unwrap();
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Unchanged), "{:?}", r.lines());
    assert!(!w.exists("inbox/price.zone-east.price.csv"));
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_for_who_is_not_known_yet_wait_with_the_list() {
    let w = inbox_world().await;
    w.publish().await;
    let north = ["inbox/price.zone-north.price.csv", "inbox/price.zone-north.deal.ndjson"];
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,1\n");
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    // A list that is refused, one that is held: who is in it is not known.
    for (list, code) in [("id,zone\n0421,east\n0422,west\n0423,No rth\n", 3), ("id,zone\n", 3)] {
        drop_file(&w, "stores.csv", list);
        let r = w.publish().await;
        assert_eq!(r.exit_code(), code, "{:?}", r.lines());
        assert!(north.iter().all(|n| w.exists(n) && w.exists(&format!("{n}.ok"))), "{:?}", r.lines());
        assert!(r.notes.iter().any(|n| n.contains("no store has the audience zone-north, and stores.csv waits")));
    }
    // One that is not named so, but meant.
    fs::remove_file(w.dir.path().join("inbox/stores.csv")).unwrap();
    for name in ["Stores.csv", "stores.CSV"] {
        drop_file(&w, name, "id,zone\n0421,east\n0422,west\n0423,north\n");
        let r = w.publish().await;
        assert!(r.exit_code() == 3 && north.iter().all(|n| w.exists(n)), "{name}: {:?}", r.lines());
    }
    fs::remove_file(w.dir.path().join("inbox/stores.CSV")).unwrap();
    let ledger = Ledger::open(&w.config).await.unwrap();
    let subjects = async || -> Vec<String> {
        let mails = ledger.unsent_mails().await.unwrap();
        mails.into_iter().map(|m| m.subject).filter(|s| s.contains("list of stores")).collect()
    };
    let told = [
        "[Tillcast] The list of stores cannot be taken",
        "[Tillcast] Recovered: The list of stores cannot be taken",
        "[Tillcast] publish refused: the list of stores",
    ];
    assert_eq!(subjects().await, told, "one that cannot be taken hides no refusal");
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,north");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    assert!(!w.exists(north[0]) && !w.exists("inbox/stores.csv"));
    assert_eq!(subjects().await.len(), 4, "and that it is over: {:?}", subjects().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_among_drops_reads_them_once_more() {
    let base = inbox_world().await;
    base.publish().await;
    drop_file(&base, "catalog.all.item.csv", "sku,name,plu\na,Tea,2\nb,Milk,1\n");
    drop_file(&base, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    for n in 0.. {
        let w = base.twin();
        let cut = CutAt::new(n);
        match w.publish_cut(&options(), &cut).await {
            Err(PublishError::Aborted(_)) => {}
            other => {
                other.unwrap();
                break;
            }
        }
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{:?}: {:?}", cut.cut, r.lines());
        assert_eq!(w.publish().await.instances.values().filter(|i| i.outcome == Outcome::Published).count(), 0);
        let mut register = w.register("r.db");
        w.follow("0421", &mut register);
        assert_eq!(rows(register.connection(), "SELECT sku || plu FROM item ORDER BY 1"), ["a2", "b1"]);
        assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a101", "b200"]);
        assert!(
            w.exists("inbox/done/catalog.all.item.csv") && !w.exists("inbox/catalog.all.item.csv"),
            "{:?}",
            cut.cut
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_of_configuration_are_found_before_anything_is_touched() {
    let w = World::new().await;
    for (from, to, part) in [
        (
            "WHERE zone = :zone\"\n[[stream.table]]\nname = \"deal\"",
            "WHERE zone = :zoned\"\n[[stream.table]]\nname = \"deal\"",
            "`:zoned` is not known",
        ),
        ("SELECT sku, name, plu FROM item", "SELECT sku, name, plu FROM item WHERE z = :zone", ":zone` has no value"),
        ("name = \"deal\"", "name = \"deals\"", "table deals has a query but is not in"),
        ("catalog.sql", "none.sql", "none.sql"),
        ("catalog.sql", "price.sql", "both make a table"),
        (&CONFIG[CONFIG.find("[[stream]]").unwrap()..], "", "there is no [[stream]]"),
    ] {
        w.write("hq.toml", &CONFIG.replacen(from, to, 1));
        let config = crate::config::load(Some(&w.dir.path().join("hq.toml")), []).unwrap().value;
        let clock: Arc<dyn Clock> = w.clock.clone();
        let e = run(&config, &options(), &clock, &Quiet, &Quiet).await.unwrap_err();
        assert_eq!(e.exit_code(), 2, "{to}: {e}");
        assert!(
            e.to_string().contains(part)
                || part == "both make a table" && e.to_string().contains("has a query but is not in"),
            "{to}: {e}"
        );
    }
    assert!(!w.exists("state/replicas"), "nothing was touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_begins_with_fulls() {
    let w = World::new().await;
    w.publish().await;
    w.sql(CHANGE);
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let key = desk.show().await.unwrap().publishers[0].id.clone();
    let revoke = crate::cli::RevokeKey { key, new_epoch: true, root_key: Vec::new(), clock_is_right: false };
    desk.revoke_key(&revoke).await.unwrap();
    w.follow("0421", &mut register);
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    for report in r.instances.values() {
        let plan = report.plan.as_ref().unwrap();
        assert!(plan.full && !plan.delta && plan.reason.contains("epoch"), "{plan}");
    }
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
    w.sql("UPDATE price SET cents = cents + 1");
    assert_eq!(w.publish().await.instances[&"price@zone-east".parse().unwrap()].packs[0].kind, PackKind::Delta);
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reported_fault_makes_the_next_publish_a_full_once() {
    use proto::wire::{Fault, fault};
    let w = World::new().await;
    w.publish().await;
    w.clock.advance(Duration::from_secs(10));
    let fault = |instance: &str| Fault {
        code: fault::PACK_IN_ERROR.into(),
        instance: Some(instance.parse().unwrap()),
        object: None,
        text: "x".into(),
        since: w.clock.now(),
    };
    let beat = |seq, complaints| BeatRow { complaints, ..w.word_of("0421-03", seq) };
    let ledger = Ledger::open(&w.config).await.unwrap();
    // It heals, or not; its next beat tells of other things.
    ledger.record_beats(&[beat(1, vec![fault("catalog@all"), fault("madeup@all")])]).await.unwrap();
    ledger.record_beats(&[beat(2, Vec::new())]).await.unwrap();
    let known: Vec<_> = ledger.complaints().await.unwrap().into_iter().map(|c| c.fault).collect();
    assert_eq!(known, [fault("catalog@all")]);
    let mut kinds = Vec::new();
    for n in 0..3 {
        w.clock.advance(Duration::from_secs(10));
        // Unchanged at first: what is out is a full, and another one would be a way round it for nobody.
        if n > 0 {
            w.sql(&format!("UPDATE item SET name = 'v{n}' WHERE sku = 'sku1'"));
        }
        kinds.push(w.publish().await.instances[&"catalog@all".parse().unwrap()].plan.clone().unwrap().to_string());
    }
    assert_eq!(
        kinds,
        [
            "nothing: nothing changed",
            "delta and full: 1 rows changed; reported: 0421-03 PACK_IN_ERROR",
            "delta: 1 rows changed"
        ]
    );
}

/// Where no row changes for days, a store behind a pack that is lost or refused would wait for the next one that does.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_device_gets_a_full_though_no_row_changed() {
    use proto::wire::{Fault, fault};
    for w in [World::new().await, inbox_world().await] {
        let ledger = Ledger::open(&w.config).await.unwrap();
        w.publish().await;
        let mut made = Vec::new();
        // What is told before each publish, and how long before. In the end nobody is stuck any more.
        let told = [
            (None, 10),
            (Some(fault::DRIFT), 10),
            (Some(fault::PACK_MISSING), 10),
            (Some(fault::PACK_IN_ERROR), 10),
            (Some(fault::PACK_IN_ERROR), 86_380),
            (None, 10),
        ];
        for (seq, (code, s)) in told.into_iter().enumerate() {
            w.clock.advance(Duration::from_secs(s));
            let fault = |code: &str| Fault {
                code: code.into(),
                instance: Some("catalog@all".parse().unwrap()),
                object: None,
                text: "x".into(),
                since: w.clock.now(),
            };
            let complaints = code.map(fault).into_iter().collect();
            ledger.record_beats(&[BeatRow { complaints, ..w.word_of("0421", seq as u64) }]).await.unwrap();
            w.clock.advance(Duration::from_secs(10));
            if seq == 0 {
                if w.exists("inbox/done") {
                    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,new,2\n");
                } else {
                    w.sql("UPDATE item SET name = 'new' WHERE sku = 'sku1'");
                }
            }
            made.push(w.publish().await.instances[&"catalog@all".parse().unwrap()].packs.len());
        }
        assert_eq!(made, [1, 0, 2, 0, 2, 0], "drift heals itself; a full that is refused is followed by one a day");
    }
}

/// A relay of an older build, or with lower limits, refuses whatever is made: that costs no other store a full each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_refuses_fulls_too_makes_no_more_of_them() {
    use proto::wire::{Fault, fault};
    let w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mut made = Vec::new();
    // What it refuses before each publish: what it could reach of the one before. In the end no row is bad any more.
    let refused = [None, Some("0000000002.delta"), Some("0000000003.full"), None, None, None];
    for (seq, (refused, s)) in refused.into_iter().zip([10, 10, 10, 10, 86_380, 10]).enumerate() {
        w.clock.advance(Duration::from_secs(s));
        let fault = |pack| Fault {
            code: fault::PACK_IN_ERROR.into(),
            instance: Some("catalog@all".parse().unwrap()),
            object: Some(format!("catalog@all/{pack}.pack")),
            text: "BAD_SCHEMA: contract: column item.weight: no such type".into(),
            since: w.clock.now(),
        };
        let complaints = refused.map(fault).into_iter().collect();
        ledger.record_beats(&[BeatRow { complaints, ..w.word_of("0421", seq as u64) }]).await.unwrap();
        w.clock.advance(Duration::from_secs(10));
        w.sql(&format!("UPDATE item SET name = 'v{seq}' WHERE sku = 'sku1'"));
        made.push(w.publish().await.instances[&"catalog@all".parse().unwrap()].packs.len());
    }
    assert_eq!(made, [1, 2, 1, 1, 2, 1], "a full may be a way round the delta, and round that full one a day later");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_gone_is_mailed_once_and_its_return_too() {
    let w = World::new().await;
    w.publish().await;
    let away = |from: &str, to: &str| fs::rename(w.dir.path().join(from), w.dir.path().join(to)).unwrap();
    away("hq.db", "gone.db");
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(e.exit_code() == 1 && e.to_string().contains("hq.db"), "{e}");
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    away("gone.db", "hq.db");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_in_settings_or_contracts_is_mailed_once_and_its_end_too() {
    let mut w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let conflict = PRICE.replace("cents INTEGER NOT NULL", "cents INTEGER NOT NULL ON CONFLICT REPLACE");
    let dry_run = PublishOptions { dry_run: true, ..options() };
    // Who types it reads it: it must not hide the next failure of the timer's run.
    let stream = PublishOptions { stream: Some("prize".parse().unwrap()), ..options() };
    assert_eq!(w.publish_cut(&stream, &Quiet).await.unwrap_err().exit_code(), 2);
    assert!(ledger.unsent_mails().await.unwrap().is_empty());
    let nobody = PublishOptions { allow_shrink: Some(Some("prize".parse().unwrap())), ..options() };
    let mut mails = 0;
    for (contract, settings, option, told) in [
        (&conflict[..], CONFIG, options(), "ON CONFLICT"),
        (PRICE, &CONFIG.replace("name = \"deal\"", "name = \"deals\"")[..], options(), "table deals has a query"),
        (PRICE, CONFIG, nobody, "--allow-shrink prize"),
    ] {
        w.write("price.sql", contract);
        set(&mut w, settings);
        for (n, option) in [&dry_run, &option, &option].into_iter().enumerate() {
            let fails = w.publish_cut(option, &Quiet).await.err().map(|e| e.exit_code());
            assert!(fails == Some(2) || n == 0, "{told}: {fails:?}");
            let written = ledger.unsent_mails().await.unwrap();
            assert_eq!(written.len(), mails + n.min(1), "{told}");
            assert!(n == 0 || written[mails].subject.ends_with("publish failed"), "{written:?}");
            assert!(n == 0 || written[mails].body.contains(told), "{written:?}");
        }
        w.write("price.sql", PRICE);
        set(&mut w, CONFIG);
        w.publish().await;
        mails += 2;
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), mails, "{told}");
    }
}

/// Three days, looked at every 12 hours as the timer does every five minutes; then headquarters is off for as long.
#[tokio::test(flavor = "multi_thread")]
async fn days_without_a_bucket_are_no_leap_of_the_clock_and_days_off_are_told() {
    let w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let away = |from: &str, to: &str| fs::rename(w.dir.path().join(from), w.dir.path().join(to)).unwrap();
    away("objects", "gone");
    w.write("objects", "no directory");
    for _ in 0..6 {
        w.clock.advance(Duration::from_secs(12 * 3600));
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(e.exit_code() == 1 && !e.to_string().contains("clock"), "{e}");
    }
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    fs::remove_file(w.dir.path().join("objects")).unwrap();
    away("gone", "objects");
    w.sql(CHANGE);
    assert_eq!(outcome(&w.publish().await, "catalog@all"), Outcome::Published);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);

    w.clock.advance(Duration::from_secs(3 * 86_400));
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(e.exit_code() == 1 && e.to_string().contains("--clock-is-right"), "{e}");
    let mails = ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 3 && mails[2].body.contains("--clock-is-right"), "{mails:?}");
    w.publish_as(PublishOptions { clock_is_right: true, ..options() }).await;
    w.publish().await;
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 4);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_was_empty_is_followed_once_its_rows_were_compared() {
    let w = World::new().await;
    w.publish().await;
    let follows = || w.manifest("0422").unwrap().streams["price"].audience.to_string();
    let to = |zone: &str| w.sql(&format!("UPDATE store SET zone = '{zone}' WHERE id = '0422'"));
    to("east");
    w.publish().await;
    // Nothing changed meanwhile: it is compared, and followed at once.
    to("west");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Unchanged);
    assert_eq!(follows(), "zone-west");
    to("east");
    w.publish_as(PublishOptions { stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!(follows(), "zone-east");
    // Last season's rows are nobody's, whoever signs.
    w.sql("UPDATE price SET cents = cents + 7 WHERE zone = 'west'; INSERT INTO price VALUES ('west', 'sku8', 1)");
    to("west");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Refused);
    w.publish_as(PublishOptions { stream: Some("catalog".parse().unwrap()), ..options() }).await;
    w.clock.advance(Duration::from_secs(7 * 86_400));
    let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
    desk.enroll(&"0422".parse().unwrap()).await.unwrap();
    assert_eq!(follows(), "zone-east");
    w.sql("DELETE FROM price WHERE sku = 'sku8' AND cents = 1");
    w.publish().await;
    assert_eq!(follows(), "zone-west");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_would_move_to_a_zone_without_its_rows_stays_until_it_is_allowed() {
    let w = World::new().await;
    w.sql(
        "INSERT INTO store VALUES ('0423', 'small', NULL); INSERT INTO deal VALUES ('small', 1, 'sku1');
         INSERT INTO price SELECT 'small', sku, 1 FROM item WHERE plu <= 299;",
    );
    w.publish().await;
    let follows = |store: &str| w.manifest(store).unwrap().streams["price"].audience.to_string();
    let to = |zone: &str| w.sql(&format!("UPDATE store SET zone = {zone} WHERE id = '0422'"));
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap();
    let of = |r: &PublishReport, zone: &str| r.instances[&format!("price@zone-{zone}").parse().unwrap()].clone();
    let price = || Some("price".parse().unwrap());
    // A zone that nobody has, and one with a quarter less.
    for (zone, told, told_mails) in [
        ("norht", "table deal would become empty (it has 1 rows); table price would become empty (it has 400 rows)", 1),
        ("small", "101 of 400 rows of table price would go (25%), 299 would stay", 3),
    ] {
        to(&format!("'{zone}'"));
        let told = format!("store 0422 would follow it in place of price@zone-west: {told}. If that is right");
        for dry_run in [true, false, true, false] {
            w.sql("UPDATE item SET name = name || '.' WHERE sku = 'sku1'");
            let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
            let refused = of(&r, zone);
            assert_eq!((r.exit_code(), refused.code), (3, Some("SHRINK")), "{:?}", r.lines());
            assert!(refused.reason.starts_with(&told), "{}", refused.reason);
            assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "others go on");
        }
        assert_eq!(mails().await.len(), told_mails, "one of the refusal, one of the zone before it");
        // Nobody else moves it.
        w.sql("UPDATE item SET name = name || '.' WHERE sku = 'sku1'");
        w.publish_as(PublishOptions { stream: Some("catalog".parse().unwrap()), ..options() }).await;
        let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
        desk.enroll(&"0422".parse().unwrap()).await.unwrap();
        assert_eq!(follows("0422"), "zone-west");
        w.all_is_well();
    }
    assert!(!w.exists("objects/packs/price@zone-norht"));
    // Mended: nothing was published of its own zone meanwhile, and it goes on.
    to("'west'");
    w.sql("UPDATE price SET cents = cents + 1 WHERE zone = 'west'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), of(&r, "west").packs[0].kind), (0, PackKind::Delta), "{:?}", r.lines());
    assert_eq!(mails().await.len(), 4, "and one that it is over");
    w.all_is_well();
    // Allowed; and what a zone begins with is told, though it is nothing.
    to("'norht'");
    let r = w.publish_as(PublishOptions { allow_shrink: Some(price()), ..options() }).await;
    assert_eq!((r.exit_code(), follows("0422").as_str()), (0, "zone-norht"));
    let line = r.lines().into_iter().find(|l| l.contains("zone-norht")).unwrap();
    assert!(line.contains("; price: 0 deleted, 0 updated, 0 inserted;"), "{line}");
    // The way back is a gain.
    to("'west'");
    assert_eq!((w.publish().await.exit_code(), follows("0422").as_str()), (0, "zone-west"));
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_lost_its_zone_keeps_what_it_has_and_is_mailed() {
    let w = World::new().await;
    w.sql("INSERT INTO store VALUES ('0499', NULL, NULL)");
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert!(ledger.unsent_mails().await.unwrap().is_empty(), "one that never had any is only noted");
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    for _ in 0..2 {
        let r = w.publish().await;
        let told = |n: &String| n.contains("2 stores have no zone") && n.contains("keep what they follow");
        assert!(r.notes.iter().any(told), "{:?}", r.notes);
    }
    assert_eq!(w.manifest("0422").unwrap().streams["price"].audience.to_string(), "zone-west");
    let mails = ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 1 && mails[0].body.contains("0422") && !mails[0].body.contains("0499"), "{mails:?}");
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0422'");
    w.publish().await;
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
    w.all_is_well();
}

/// By a stream that is made by store and asks for the zone: the store before it is not unstaged, that after it not only tried.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_a_zone_that_is_asked_for_keeps_what_it_has_and_stops_no_other() {
    let w = World::with(&CONFIG.replace("audience = \"zone\"", "audience = \"store\"")).await;
    w.sql("INSERT INTO store VALUES ('0423', 'east', NULL)");
    assert_eq!(w.publish().await.exit_code(), 0);
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap().len();
    let version = |store: &str| w.manifest(store).unwrap().streams["price"].version.get();
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    for n in 2..4 {
        w.sql("UPDATE price SET cents = cents + 1 WHERE sku = 'sku1'");
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 3, "{:?}", r.lines());
        for other in ["0421", "0423"] {
            assert_eq!(outcome(&r, &format!("price@store-{other}")), Outcome::Published, "{:?}", r.lines());
            assert_eq!(version(other), n);
        }
        let refused = &r.instances[&"price@store-0422".parse().unwrap()];
        assert_eq!((refused.outcome, refused.code), (Outcome::Refused, Some("NO_ZONE")), "{:?}", r.lines());
        assert_eq!((version("0422"), mails().await), (1, 1), "it keeps what it has, and is mailed once");
    }
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0422'");
    assert_eq!((w.publish().await.exit_code(), version("0422"), mails().await), (0, 2, 2));
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_the_settings_lost_stays_listed_until_it_may_go() {
    let mut w = World::new().await;
    w.publish().await;
    let begin = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    let without = format!("{}{}", &CONFIG[..begin], &CONFIG[CONFIG.find("[publish]").unwrap()..]);
    let set = |w: &mut World, text: &str| {
        w.write("hq.toml", text);
        w.config = crate::config::load(Some(&w.dir.path().join("hq.toml")), []).unwrap().value;
    };
    let lists =
        |w: &World, store: &str| w.manifest(store).unwrap().instances().map(|(i, _)| i.to_string()).collect::<Vec<_>>();
    let told = "stream price is not in the settings";
    let ledger = Ledger::open(&w.config).await.unwrap();
    set(&mut w, &without);
    w.sql(CHANGE);
    w.sql("INSERT INTO store VALUES ('0423', 'east', NULL)");
    for options in [
        PublishOptions { dry_run: true, ..options() },
        options(),
        PublishOptions { allow_shrink: Some(None), ..options() },
    ] {
        let r = w.publish_as(options).await;
        assert!(r.exit_code() == 3 && r.problems.len() == 1 && r.problems[0].starts_with(told), "{:?}", r.lines());
        assert!(r.problems[0].contains("--allow-shrink price"), "{:?}", r.problems);
    }
    // Old stores and new ones, whoever signs.
    Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap().enroll(&"0422-01".parse().unwrap()).await.unwrap();
    for (store, zone) in [("0421", "east"), ("0422", "west"), ("0423", "east")] {
        assert_eq!(lists(&w, store), ["catalog@all".to_owned(), format!("price@zone-{zone}")]);
    }
    let status = crate::status::report(&w.config, &ledger, w.clock.as_ref()).await.unwrap();
    assert!(status.errors.iter().any(|e| e.starts_with(told)), "{:?}", status.errors);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // Put back, it goes on where it was.
    set(&mut w, CONFIG);
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.instances[&"price@zone-east".parse().unwrap()].packs[0].kind), (0, PackKind::Delta));
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
    w.all_is_well();
    // It may go, by its name.
    set(&mut w, &without);
    for (name, dry_run) in [("prize", false), ("prize", true)] {
        let options = PublishOptions { allow_shrink: Some(Some(name.parse().unwrap())), dry_run, ..options() };
        let e = w.publish_cut(&options, &Quiet).await.unwrap_err();
        assert_eq!(e.exit_code(), 2, "{e}");
        assert!(e.to_string().starts_with("--allow-shrink prize: there is no such stream"), "{e}");
    }
    // Whatever fails at the signature, its instances are not retired while lists name them.
    let db = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    db.execute_batch("CREATE TRIGGER no BEFORE UPDATE OF envelope ON store BEGIN SELECT RAISE(ABORT, 'no'); END")
        .unwrap();
    let may_go = PublishOptions { allow_shrink: Some(Some("price".parse().unwrap())), ..options() };
    w.publish_cut(&may_go, &Quiet).await.unwrap_err();
    db.execute_batch("DROP TRIGGER no").unwrap();
    drop(db);
    assert!(ledger.heads().await.unwrap().values().all(|h| !h.retired));
    let r = w.publish_as(PublishOptions { allow_shrink: Some(Some("price".parse().unwrap())), ..options() }).await;
    assert_eq!((r.exit_code(), lists(&w, "0421")), (0, vec!["catalog@all".to_owned()]), "{:?}", r.lines());
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 0), "{:?}", r.lines());
}

/// Which instances a store's list names.
fn listed(w: &World, store: &str) -> Vec<String> {
    w.manifest(store).unwrap().instances().map(|(i, _)| i.to_string()).collect()
}
fn set(w: &mut World, text: &str) {
    w.write("hq.toml", text);
    w.config = crate::config::load(Some(&w.dir.path().join("hq.toml")), []).unwrap().value;
}

/// Whoever looks at the lists, in whatever order: nothing is signed that says the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_with_a_stream_left_out_is_not_signed_anew_by_each_who_looks() {
    let mut w = World::new().await;
    w.publish().await;
    let catalog = CONFIG.find("[[stream]]").unwrap();
    let price = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    set(&mut w, &format!("{}{}", &CONFIG[..catalog], &CONFIG[price..]));
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let serial = w.manifest("0421").unwrap().serial;
    for _ in 0..2 {
        assert_eq!(w.publish().await.exit_code(), 3);
        crate::web::ticks::manifests(&serve).await.unwrap();
        assert_eq!(w.manifest("0421").unwrap().serial, serial);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_stream_goes_store_by_store_as_the_new_one_comes() {
    let mut w = inbox_world().await;
    w.publish().await;
    // One that was started before, and keeps its settings.
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    set(&mut w, &INBOX.replace("name = \"price\"\naudience", "name = \"prices\"\naudience"));
    for (zone, lists) in [
        ("", [["catalog@all", "price@zone-east"], ["catalog@all", "price@zone-west"]]),
        ("east", [["catalog@all", "prices@zone-east"], ["catalog@all", "price@zone-west"]]),
        ("west", [["catalog@all", "prices@zone-east"], ["catalog@all", "prices@zone-west"]]),
    ] {
        if !zone.is_empty() {
            drop_file(&w, &format!("prices.zone-{zone}.price.csv"), "sku,cents\na,300\nb,200\n");
            drop_file(&w, &format!("prices.zone-{zone}.deal.ndjson"), "{\"id\":1,\"sku\":\"a\"}\n");
        }
        for dry_run in [true, false] {
            let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
            if zone == "east" && !dry_run {
                assert!(
                    r.exit_code() == 3 && r.problems[0].contains("1 stores (the first is 0422)"),
                    "{:?}",
                    r.lines()
                );
            } else {
                assert!(r.exit_code() == 0 && r.problems.is_empty(), "{zone} {dry_run}: {:?}", r.lines());
            }
        }
        // Whoever signs.
        for device in ["0421-01", "0422-01"] {
            let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
            desk.enroll(&device.parse().unwrap()).await.unwrap();
        }
        w.clock.advance(Duration::from_secs(86_400 * 9));
        let ledger = Ledger::open(&w.config).await.unwrap();
        ledger.touch(w.clock.now()).await.unwrap();
        let serial = w.manifest("0422").unwrap().serial;
        crate::web::ticks::manifests(&serve).await.unwrap();
        assert!(w.manifest("0422").unwrap().serial > serial, "it is signed anew by its age");
        assert_eq!([listed(&w, "0421"), listed(&w, "0422")], lists, "{zone}");
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    let retired = async || ledger.heads().await.unwrap().into_iter().filter(|(_, h)| h.retired).count();
    assert_eq!(retired().await, 0);
    w.publish().await;
    assert_eq!(retired().await, 2, "nobody lists them any more");
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "that it waits, and that it is over");
    assert_eq!(w.publish().await.signed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_does_not_go_over_to_another_stream_while_its_neighbour_is_nobodys() {
    let mut w = World::new().await;
    w.publish().await;
    let (old, new) = ("name = \"price\"\naudience", "name = \"prices\"\naudience");
    let renamed = CONFIG.replace(old, new);
    let deal = renamed.find("[[stream.table]]\nname = \"deal\"").unwrap();
    let split = format!("{}{}", &renamed[..deal], &renamed[renamed.find("[publish]").unwrap()..]);
    let both = ["catalog@all", "price@zone-east"];
    w.write("price.sql", &PRICE[..PRICE.find('\n').unwrap()]);
    set(&mut w, &split);
    w.sql(CHANGE);
    for dry_run in [true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((r.exit_code(), outcome(&r, "prices@zone-east")), (3, Outcome::Refused), "{:?}", r.lines());
        let text = &r.instances[&"prices@zone-east".parse().unwrap()].reason;
        assert!(text.contains("no stream has deal") && text.contains("--allow-shrink price"), "{text}");
        assert_eq!(listed(&w, "0421"), both);
    }
    // With both, but without its rows.
    w.write("price.sql", PRICE);
    set(&mut w, &renamed);
    w.sql("DELETE FROM price WHERE zone = 'east'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "prices@zone-east")), (3, Outcome::Refused), "{:?}", r.lines());
    let text = &r.instances[&"prices@zone-east".parse().unwrap()].reason;
    assert!(text.contains("in place of price@zone-east") && text.contains("become empty"), "{text}");
    assert_eq!(listed(&w, "0421"), both);
    // Somebody says that it is right.
    let r = w.publish_as(PublishOptions { allow_shrink: Some(Some("prices".parse().unwrap())), ..options() }).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(listed(&w, "0421"), ["catalog@all", "prices@zone-east"]);
}

/// A stream is split in two, and one of them is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_split_stream_goes_when_all_of_its_tables_are_there() {
    let mut w = inbox_world().await;
    w.publish().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("prices.sql", price);
    w.write("deals.sql", deal);
    let stream = |name: &str| format!("[[stream]]\nname = \"{name}\"\naudience = \"zone\"\nschema = \"{name}.sql\"\n");
    let old = INBOX.find("[[stream]]\nname = \"price\"").unwrap();
    set(&mut w, &format!("{}{}{}", &INBOX[..old], stream("prices"), stream("deals")));
    for (file, text, lists) in [
        ("prices.zone-east.price.csv", "sku,cents\na,300\nb,200\n", vec!["catalog@all", "price@zone-east"]),
        (
            "deals.zone-east.deal.ndjson",
            "{\"id\":3,\"sku\":\"b\"}\n",
            vec!["catalog@all", "deals@zone-east", "prices@zone-east"],
        ),
    ] {
        drop_file(&w, file, text);
        let r = w.publish().await;
        assert!(r.exit_code() == 3 && r.problems[0].contains("stores (the first is"), "{:?}", r.lines());
        assert_eq!(listed(&w, "0421"), lists);
        assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"]);
    }
}

/// A stream that is listed takes one of its tables: it waits for the other, for its own must not go.
#[tokio::test(flavor = "multi_thread")]
async fn a_listed_stream_takes_a_table_when_its_neighbour_is_there_for_all() {
    let mut w = inbox_world().await;
    w.publish().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("catalog.sql", &format!("{CATALOG}\n{price}"));
    w.write("deals.sql", deal);
    let old = INBOX.find("[[stream]]\nname = \"price\"").unwrap();
    let deals = "[[stream]]\nname = \"deals\"\naudience = \"zone\"\nschema = \"deals.sql\"\n";
    set(&mut w, &format!("{}{deals}", &INBOX[..old]));
    let item = ("catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\n");
    drop_file(&w, item.0, item.1);
    drop_file(&w, "catalog.all.price.csv", "sku,cents\na,300\nb,200\n");
    for (zone, missing) in [("", "0421"), ("east", "0422")] {
        if !zone.is_empty() {
            drop_file(&w, &format!("deals.zone-{zone}.deal.ndjson"), "{\"id\":3,\"sku\":\"b\"}\n");
        }
        for dry_run in [true, false] {
            let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
            assert!(r.exit_code() > 0 && outcome(&r, "catalog@all") == Outcome::Refused, "{:?}", r.lines());
            let text = &r.instances[&"catalog@all".parse().unwrap()].reason;
            assert!(text.contains(&format!("deal is not published for store {missing} by deals")), "{text}");
        }
        assert_eq!(listed(&w, "0421"), ["catalog@all", "price@zone-east"], "not by two streams");
    }
    // All at once.
    drop_file(&w, "deals.zone-west.deal.ndjson", "{\"id\":3,\"sku\":\"b\"}\n");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    for (store, zone) in [("0421", "east"), ("0422", "west")] {
        assert_eq!(listed(&w, store), ["catalog@all".to_owned(), format!("deals@zone-{zone}")]);
    }
}

/// In each of the two a store would miss the other's table for a moment: they come at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_dissolves_into_two_that_are_listed() {
    let mut w = World::new().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    let (head, rest) = CONFIG.split_at(CONFIG.find("[[stream]]\nname = \"price\"").unwrap());
    let (old, end) = rest.split_at(rest.find("[publish]").unwrap());
    let (old_price, old_deal) = old.split_at(old.rfind("[[stream.table]]").unwrap());
    let old_price = &old_price[old_price.find("[[stream.table]]").unwrap()..];
    let small = |name: &str| {
        format!(
            "[[stream]]\nname = \"{name}s\"\naudience = \"zone\"\nschema = \"{name}s.sql\"\n[[stream.table]]\n\
             name = \"{name}\"\nquery = \"SELECT 1 AS id WHERE :zone <> ''\"\n"
        )
    };
    let schema = |w: &World, name: &str, more: &str| {
        w.write(&format!("{name}s.sql"), &format!("CREATE TABLE {name} (id INTEGER PRIMARY KEY) STRICT;\n{more}"));
    };
    schema(&w, "flag", "");
    schema(&w, "note", "");
    set(&mut w, &format!("{head}{}{}{old}{end}", small("flag"), small("note")));
    assert_eq!(w.publish().await.exit_code(), 0);
    schema(&w, "flag", price);
    schema(&w, "note", deal);
    set(&mut w, &format!("{head}{}{old_price}{}{old_deal}{end}", small("flag"), small("note")));
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(listed(&w, "0421"), ["catalog@all", "flags@zone-east", "notes@zone-east"]);
}

/// A table goes from one stream of the settings to another: no list has it by both, or by none.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_changes_hands_between_streams_of_the_settings_in_one_publish() {
    let mut w = World::new().await;
    w.publish().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("price.sql", price);
    w.write("catalog.sql", &format!("{CATALOG}\n{deal}"));
    let (rest, end) = CONFIG.split_at(CONFIG.find("[publish]").unwrap());
    let (rest, its) = rest.split_at(rest.rfind("[[stream.table]]").unwrap());
    let its = its.replace("WHERE zone = :zone", "WHERE zone = 'east'");
    let (head, old) = rest.split_at(rest.find("[[stream]]\nname = \"price\"").unwrap());
    set(&mut w, &format!("{head}{its}{old}{end}"));
    let tables = |w: &World| {
        let of =
            |(s, e): (&StreamName, &StreamEntry)| (s.to_string(), e.digests.keys().map(ToString::to_string).collect());
        w.manifest("0421").unwrap().streams.iter().map(of).collect::<BTreeMap<String, Vec<String>>>()
    };
    let before = tables(&w);
    let rebuild = || PublishOptions { allow_rebuild: true, ..options() };
    let only = |stream: &str| PublishOptions { stream: Some(stream.parse().unwrap()), ..rebuild() };
    for (what, options, refused, says) in [
        ("price may not be rebuilt", options(), "catalog@all", "gives it up needs --allow-rebuild"),
        ("price alone", only("price"), "price@zone-east", "goes over to stream catalog"),
        ("catalog alone", only("catalog"), "catalog@all", "run without --stream"),
    ] {
        for dry_run in [true, false] {
            let r = w.publish_as(PublishOptions { dry_run, ..options.clone() }).await;
            assert!(r.exit_code() > 0 && outcome(&r, refused) == Outcome::Refused, "{what}: {:?}", r.lines());
            let text = &r.instances[&refused.parse().unwrap()].reason;
            assert!(text.contains(says), "{what}: {text}");
            assert_eq!(tables(&w), before, "{what}");
        }
    }
    // A store without a zone keeps what it has: it would have the table by two streams.
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    let r = w.publish_as(rebuild()).await;
    let text = &r.instances[&"catalog@all".parse().unwrap()].reason;
    assert!(text.contains("by which store 0422 has it") && text.contains("it has no zone"), "{text}");
    assert_eq!(
        (tables(&w), listed(&w, "0422")),
        (before.clone(), vec!["catalog@all".into(), "price@zone-west".into()])
    );
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0422'");
    // Who takes it is refused for his rows: nobody gives it up.
    w.sql("UPDATE deal SET sku = NULL WHERE zone = 'east'");
    let r = w.publish_as(rebuild()).await;
    assert!(r.exit_code() > 0 && outcome(&r, "price@zone-east") == Outcome::Refused, "{:?}", r.lines());
    assert_eq!(tables(&w), before);
    // It would be empty: that is guarded as if it had been deleted.
    w.sql("UPDATE deal SET sku = 'sku1'; UPDATE deal SET zone = 'north' WHERE zone = 'east'");
    let r = w.publish_as(rebuild()).await;
    let text = &r.instances[&"catalog@all".parse().unwrap()].reason;
    assert!(
        r.exit_code() == 1 && text.contains("in place of price@zone-east") && text.contains("become empty"),
        "{text}"
    );
    assert_eq!(tables(&w), before);
    w.sql("UPDATE deal SET zone = 'east' WHERE zone = 'north'");
    let r = w.publish_as(rebuild()).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(tables(&w)["catalog"], ["deal", "item"]);
    assert_eq!(tables(&w)["price"], ["price"]);
    w.all_is_well();
}

/// The whole machine was restored: the rows are those of a version below the one that is out.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_with_its_source_goes_above_what_is_out() {
    let w = World::new().await;
    w.publish().await;
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    let day = "UPDATE price SET cents = cents + 1 WHERE zone = 'east' AND sku = 'sku1'";
    w.sql(day);
    w.publish().await;
    let out = w.manifest("0421").unwrap().streams["price"].version;
    for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(gone));
    }
    fs::copy(&backup, &ledger).unwrap();
    w.sql(&day.replace("cents + 1", "cents - 1"));
    // The backup was taken in the middle of that publish: its number is given up, and is out.
    let taken = "INSERT INTO publication (instance, version, state, epoch, contract, plan, packs, digests, created_s)
        SELECT instance, version + 1, 'reserved', epoch, contract, plan, '[]', '{}', created_s FROM publication
        WHERE instance = 'price@zone-east'";
    Connection::open(&ledger).unwrap().execute(taken, []).unwrap();
    assert_eq!(w.publish_cut(&options(), &Quiet).await.unwrap_err().exit_code(), 1, "it is told of first");
    // Who signs first makes nobody forget it,
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    desk.enroll(&"0421-01".parse().unwrap()).await.unwrap();
    // nor who looks at others.
    let only = PublishOptions { stream: Some("catalog".parse().unwrap()), ..options() };
    assert_eq!(w.publish_as(only).await.exit_code(), 0);
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert!(w.manifest("0421").unwrap().streams["price"].version > out, "{:?}", r.lines());
    assert_eq!(outcome(&r, "price@zone-west"), Outcome::Unchanged);
    w.all_is_well();
    w.check("0421", "east");
}

/// The bucket was restored too: what was out only the devices know.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_set_back_with_its_ledger_is_gone_above_by_what_devices_hold() {
    let w = World::new().await;
    w.publish().await;
    w.sql("UPDATE price SET cents = cents + 1");
    w.publish().await;
    w.clock.advance(Duration::from_secs(1));
    let ledger = Ledger::open(&w.config).await.unwrap();
    let newest = || w.manifest("0421").unwrap().streams["price"].version.get();
    let out = newest() + 6;
    let says = async |register: &str, seq: u64, version: u64| {
        let device: proto::ids::DeviceId = register.parse().unwrap();
        if ledger.device(&device).await.unwrap().is_none() {
            ledger.enrol(&device, &proto::keys::SecretKey::from_seed([7; 32]).public(), w.clock.now()).await.unwrap();
        }
        let versions = vec![("price@zone-east".parse().unwrap(), Version::try_from(version).unwrap())];
        ledger.record_beats(&[BeatRow { versions, ..w.word_of(register, seq) }]).await.unwrap();
    };
    says("0421-01", 1, out).await;
    says("0421-01", 2, out).await;
    says("0421-03", 1, newest() + 2_000_000).await;
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged, "one alone may be broken");
    says("0421-04", 1, out).await;
    ledger.revoke(&"0421-04".parse().unwrap(), w.clock.now()).await.unwrap();
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged, "who was revoked is not believed");
    says("0421-02", 1, out).await;
    let told = ledger.complaints().await.unwrap();
    let told: Vec<_> = told.iter().map(|c| (c.device.as_str(), c.fault.object.as_deref())).collect();
    let out_text = out.to_string();
    let by = ["0421-01", "0421-02", "0421-04"];
    assert_eq!(told, by.map(|device| (device, Some(&*out_text))));
    let r = w.publish().await;
    let plan = r.instances[&"price@zone-east".parse().unwrap()].plan.clone().unwrap().to_string();
    assert_eq!(plan, "full: versions are out that the ledger does not know");
    assert_eq!(newest(), out + 1);
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged, "once");
    w.all_is_well();
    w.check("0421", "east");
}

/// Who publishes first and then moves the ledger away has lists that name the old versions; the packs tell of the newer.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_moved_away_after_it_signed_old_versions_is_behind_still() {
    let w = inbox_world().await;
    w.publish().await;
    w.back_up();
    drop_prices(&w, 200);
    w.publish().await;
    w.restore();
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert_eq!(w.publish().await.exit_code(), 3);
    w.lose_ledger();
    let at = || w.manifest("0421").unwrap().streams["price"].version.get();
    for run in 0..2 {
        let r = w.publish().await;
        let told =
            r.problems.iter().any(|p| p.starts_with("price@zone-east") && p.contains("drop all its files again"));
        assert!(told && r.problems.len() == 1 && r.exit_code() == 3 && at() == 1, "{run}: {:?}", r.lines());
    }
    // The old rows are published where somebody says so,
    let old = w.twin();
    let r = old.publish_as(PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!((r.exit_code(), old.publish().await.exit_code()), (0, 0), "{:?}", r.lines());
    assert_eq!(old.manifest("0421").unwrap().streams["price"].version.get(), 3);
    // and new ones when they have come.
    drop_prices(&w, 200);
    let r = w.publish().await;
    assert_eq!((r.exit_code(), at(), w.publish().await.exit_code()), (0, 3, 0), "{:?}", r.lines());
}

/// A number that was burnt leaves a pack as one does that was out: nobody can tell them apart.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_above_all_lists_makes_a_full_on_a_new_machine_once() {
    let w = World::new().await;
    w.publish().await;
    w.write("objects/packs/price@zone-east/0000000002.delta.pack", "of a run that was cut short");
    w.lose_ledger();
    for (outcomes, version) in [(Outcome::Published, 3), (Outcome::Unchanged, 3)] {
        let r = w.publish().await;
        assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, outcomes), "{:?}", r.lines());
        assert_eq!(outcome(&r, "price@zone-west"), Outcome::Unchanged);
        assert_eq!(w.manifest("0421").unwrap().streams["price"].version.get(), version);
    }
    w.all_is_well();
}

/// What a run puts after the ledger was taken over makes no instance of which the bucket had no newer one seem behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_cut_on_a_new_machine_with_an_inbox_is_finished_by_the_next() {
    let base = inbox_world().await;
    base.publish().await;
    for n in 0.. {
        let w = base.twin();
        w.lose_ledger();
        // One of the stream's two tables.
        drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,200\nb,200\n");
        if w.publish_cut(&options(), &CutAt::new(n)).await.is_ok() {
            break;
        }
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{n}: {:?}", r.lines());
    }
}

/// A store that is missing from the list while a stream is renamed finds its tables when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_away_while_a_stream_was_renamed_keeps_the_old_one_until_the_new_is_there() {
    let mut w = inbox_world().await;
    w.publish().await;
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n");
    w.publish().await;
    set(&mut w, &INBOX.replace("name = \"price\"\naudience", "name = \"prices\"\naudience"));
    drop_file(&w, "prices.zone-east.price.csv", "sku,cents\na,300\nb,200\n");
    drop_file(&w, "prices.zone-east.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    for _ in 0..2 {
        w.publish().await;
    }
    assert_eq!(listed(&w, "0421"), ["catalog@all", "prices@zone-east"]);
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n");
    for _ in 0..2 {
        w.publish().await;
        assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"]);
    }
    drop_file(&w, "prices.zone-west.price.csv", "sku,cents\na,300\nb,200\n");
    drop_file(&w, "prices.zone-west.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    w.publish().await;
    assert_eq!(listed(&w, "0422"), ["catalog@all", "prices@zone-west"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_goes_over_is_guarded_whoever_gets_it() {
    let base = World::new().await;
    base.publish().await;
    let begin = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    let end = CONFIG.find("[publish]").unwrap();
    let price = &CONFIG[begin..end];
    let other = price.replace("WHERE zone = :zone", "WHERE zone = 'none'");
    // To a stream for everybody; into one that is there.
    let moved = other.find("[[stream.table]]").unwrap();
    for (streams, at) in [
        (
            format!(
                "{}{}",
                &CONFIG[..begin],
                other.replacen("\"price\"", "\"prices\"", 1).replace("\"zone\"", "\"all\"")
            ),
            "prices@all",
        ),
        (format!("{}{}", &CONFIG[..begin], &other[moved..]), "catalog@all"),
    ] {
        let mut w = base.twin();
        w.write("catalog.sql", &format!("{CATALOG}\n{PRICE}"));
        if at == "prices@all" {
            w.write("catalog.sql", CATALOG);
        }
        set(&mut w, &format!("{streams}{}", &CONFIG[end..]));
        let r = w.publish().await;
        assert!(r.exit_code() > 0 && outcome(&r, at) == Outcome::Refused, "{at}: {:?}", r.lines());
        let text = &r.instances[&at.parse().unwrap()].reason;
        assert!(text.contains("in place of price@zone-east") && text.contains("become empty"), "{text}");
        assert_eq!(listed(&w, "0421"), ["catalog@all", "price@zone-east"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_is_waited_for_where_a_zone_was_empty() {
    let w = inbox_world().await;
    w.publish().await;
    for zone in ["east", "west", "west"] {
        drop_file(&w, "stores.csv", &format!("id,zone\n0421,east\n0422,{zone}\n"));
        let r = w.publish().await;
        let follows = w.manifest("0422").unwrap().streams["price"].audience.to_string();
        assert_eq!((r.exit_code(), follows.as_str()), (0, "zone-east"), "{:?}", r.lines());
    }
    // One table of two would leave the other as old as it is.
    drop_file(&w, "price.zone-west.price.csv", "sku,cents\na,100\nb,200\n");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Waiting);
    assert_eq!(w.manifest("0422").unwrap().streams["price"].audience.to_string(), "zone-east");
    drop_file(&w, "price.zone-west.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Unchanged);
    assert_eq!(w.manifest("0422").unwrap().streams["price"].audience.to_string(), "zone-west");
}

/// What lists name is never half there: nothing is put to an empty place before somebody says that it is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_lacks_what_lists_name_gets_nothing_until_somebody_says_so() {
    let mut w = World::new().await;
    w.publish().await;
    let (objects, aside) = (w.dir.path().join("objects"), w.dir.path().join("aside"));
    let lacks = |e: PublishError| {
        let text = e.to_string();
        assert!(text.contains("catalog@all") && text.contains("publish --full") && e.exit_code() == 1, "{text}");
    };
    // Its disk is not mounted: neither the bucket as it was nor the empty place gets anything, by whatever command.
    fs::rename(&objects, &aside).unwrap();
    w.sql(CHANGE);
    let dry = PublishOptions { dry_run: true, ..options() };
    lacks(w.publish_cut(&dry, &Quiet).await.unwrap_err());
    assert!(w.publish_as(PublishOptions { full: true, ..dry }).await.exit_code() == 0, "it would be made anew");
    for _ in 0..2 {
        lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    }
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let e = desk.enroll(&"0421-01".parse().unwrap()).await.unwrap_err();
    assert!(e.to_string().contains("is its disk mounted"), "{e}");
    assert!(w.objects().is_empty(), "{:?}", w.objects());
    let mails = desk.ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 1 && mails[0].body.contains("is its disk mounted"), "{mails:?}");
    let _ = fs::remove_dir_all(&objects);
    fs::rename(&aside, &objects).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    w.all_is_well();
    // A half that somebody put there is one still.
    copy(&objects, &aside);
    fs::remove_dir_all(&objects).unwrap();
    lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    let buckets = Buckets::open(&w.config, &desk.ledger).await.unwrap();
    crate::verify::put_back(&w.config, &desk.ledger, &buckets, w.clock.as_ref()).await.unwrap();
    lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    let only = PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() };
    lacks(w.publish_cut(&only, &Quiet).await.unwrap_err());
    // Lost for good.
    let full = PublishOptions { full: true, ..options() };
    assert_eq!(w.publish_as(full).await.exit_code(), 0);
    w.all_is_well();
    assert!(w.exists("objects/trust/0000000001.json") && w.exists("objects/trust.json"));
    assert_eq!(w.publish().await.exit_code(), 0);
    // A new place: as a mirror first; or a copy.
    let before = w.objects();
    w.name_buckets(&["new"]);
    lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    w.name_buckets(&["objects", "new"]);
    w.publish().await;
    w.name_buckets(&["new"]);
    assert_eq!((w.publish().await.exit_code(), w.objects_in("new")), (0, before.clone()));
    copy(&w.dir.path().join("new"), &w.dir.path().join("newer"));
    for gone in ["newer/trust/0000000001.json", "newer/stores/0421/manifest.json"] {
        fs::remove_file(w.dir.path().join(gone)).unwrap();
    }
    w.name_buckets(&["newer"]);
    assert_eq!((w.publish().await.exit_code(), w.objects_in("newer")), (0, before.clone()));
    // The pointer alone went.
    fs::remove_file(w.dir.path().join("newer/trust.json")).unwrap();
    assert_eq!((w.publish().await.exit_code(), w.objects_in("newer")), (0, before));
}

/// `--full` said that the place is right, and made all but what was refused then: that is made by the first run that can.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_bucket_lacks_after_a_full_of_all_is_made_anew_once_its_stream_can_be() {
    let mut w = World::new().await;
    w.publish().await;
    fs::remove_dir_all(w.dir.path().join("objects")).unwrap();
    w.sql("INSERT INTO price VALUES ('east', 'bad', NULL)");
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
    let full = PublishOptions { full: true, ..options() };
    let is_told = |r: &PublishReport| {
        assert_eq!(r.exit_code(), 3, "{:?}", r.lines());
        let text = "lacks packs that stores' lists name, of price@zone-east, price@zone-west";
        assert!(r.problems.iter().any(|p| p.contains(text)), "{:?}", r.lines());
    };
    let r = w.publish_as(full).await;
    assert_eq!([outcome(&r, "catalog@all"), outcome(&r, "price@zone-east")], [Outcome::Published, Outcome::Refused]);
    is_told(&r);
    // It stops no other, and is told meanwhile; also while its stream is not in the settings.
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
    for text in [CONFIG.to_owned(), CONFIG[..CONFIG.find("[[stream]]\nname = \"price\"").unwrap()].to_owned()] {
        set(&mut w, &text);
        is_told(&w.publish().await);
    }
    assert_eq!(w.manifest("0421").unwrap().streams["catalog"].version.get(), 3);
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = ledger.unsent_mails().await.unwrap();
    assert_eq!(mails.iter().filter(|m| m.body.contains("The bucket lacks packs")).count(), 1, "{mails:?}");
    // What it is known to lack is no new doubt, in whatever place.
    fs::remove_file(w.dir.path().join("objects/trust.json")).unwrap();
    is_told(&w.publish().await);
    copy(&w.dir.path().join("objects"), &w.dir.path().join("new"));
    w.name_buckets(&["new"]);
    is_told(&w.publish().await);
    assert!(w.exists("objects/trust.json") && w.exists("new/trust.json"));
    w.name_buckets(&["objects"]);
    is_told(&w.publish().await);
    // With the rows that are published: only a full leads a new register there.
    set(&mut w, CONFIG);
    w.sql("DELETE FROM price WHERE sku = 'bad'");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    w.all_is_well();
    assert_eq!(w.publish().await.signed, 0);
}

/// A ledger of before it was remembered takes the bucket that it finds for the one that it knows.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_ledger_takes_its_bucket_as_known() {
    let mut w = World::new().await;
    w.publish().await;
    let ledger = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    assert_eq!(ledger.execute("DELETE FROM fact WHERE name = 'bucket'", []).unwrap(), 1);
    assert_eq!(w.publish().await.exit_code(), 0);
    w.name_buckets(&["new"]);
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_lags_is_mailed_once_and_its_return_too() {
    let w = World::with(&CONFIG.replace("\"file:objects\"", "\"file:objects\", \"file:mirror\"")).await;
    let mirror = w.dir.path().join("mirror");
    // A file where the mirror's directory should be.
    fs::remove_dir_all(&mirror).unwrap();
    fs::write(&mirror, "").unwrap();
    for _ in 0..2 {
        assert_eq!(w.publish().await.exit_code(), 3);
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 1 && mails[0].body.contains("mirror lags behind"), "{mails:?}");
    fs::remove_file(&mirror).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
}

/// Even by its mark is not even: it was not named for a while, was emptied, or set back.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_missed_something_is_brought_up_whatever_its_mark_says() {
    let mut w = World::new().await;
    let both = ["objects", "mirror"];
    w.name_buckets(&both);
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    // Not named while a pack and keys came.
    w.name_buckets(&["objects"]);
    w.sql(CHANGE);
    w.publish().await;
    let rotate = crate::cli::Rotate::default();
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().rotate(&rotate).await.unwrap();
    w.name_buckets(&both);
    assert_ne!(w.objects_in("mirror"), w.objects());
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(w.objects_in("mirror"), w.objects());
    // First for a while.
    w.name_buckets(&["mirror"]);
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
    w.publish().await;
    w.name_buckets(&["mirror", "objects"]);
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    w.name_buckets(&both);
    w.publish().await;
    // Emptied; and as it was before the last publish.
    let (mirror, backup) = (w.dir.path().join("mirror"), w.dir.path().join("backup"));
    copy(&mirror, &backup);
    fs::remove_dir_all(&mirror).unwrap();
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    w.sql("UPDATE item SET name = 'y' WHERE sku = 'sku5'");
    w.clock.advance(Duration::from_secs(60));
    w.publish().await;
    fs::remove_dir_all(&mirror).unwrap();
    fs::rename(&backup, &mirror).unwrap();
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    // One object alone is found by `verify`.
    fs::remove_file(mirror.join("packs/catalog@all/0000000001.full.pack")).unwrap();
    fs::write(mirror.join("stores/0421/manifest.json"), "{}").unwrap();
    let ledger = Ledger::open(&w.config).await.unwrap();
    let buckets = Buckets::open(&w.config, &ledger).await.unwrap();
    let problems = crate::verify::run(&w.config, &ledger, &buckets, |_, _| {}).await.unwrap().problems;
    assert!(problems.len() == 1 && problems[0].contains("lacks 2 objects or has others, stores/0421"), "{problems:?}");
    crate::verify::put_back(&w.config, &ledger, &buckets, w.clock.as_ref()).await.unwrap();
    assert_eq!(w.objects_in("mirror"), w.objects());
    let report = crate::verify::run(&w.config, &ledger, &buckets, |_, _| {}).await.unwrap();
    assert!(report.is_right(), "{:?}", report.lines());
}

/// Settings may be tried without a mirror: that costs no comparison of all objects later.
#[tokio::test(flavor = "multi_thread")]
async fn who_only_looks_leaves_no_mirror_behind() {
    let mut w = World::new().await;
    w.name_buckets(&["objects", "mirror"]);
    w.publish().await;
    w.name_buckets(&["objects"]);
    w.sql(CHANGE);
    let is_even = || {
        let ledger = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
        ledger.query_row("SELECT even FROM mirror", [], |r| r.get::<_, bool>(0)).unwrap()
    };
    w.publish_as(PublishOptions { dry_run: true, ..options() }).await;
    assert!(is_even());
    w.publish().await;
    assert!(!is_even());
}

#[tokio::test(flavor = "multi_thread")]
async fn more_replicas_than_may_stay_open_are_applied_after_the_signature() {
    let w = World::with(&CONFIG.replace("audience = \"zone\"", "audience = \"store\"")).await;
    let stores: Vec<String> = (0..70).map(|n| format!("('s{n}', 'east', NULL)")).collect();
    w.sql(&format!("INSERT INTO store VALUES {}", stores.join(", ")));
    for change in ["", "UPDATE price SET cents = cents + 1 WHERE sku = 'sku1'"] {
        w.sql(change);
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
        assert_eq!(
            r.instances.values().filter(|i| i.outcome == Outcome::Published).count(),
            72 + usize::from(change.is_empty())
        );
        w.all_is_well();
        w.check("s69", "east");
        for instance in r.instances.keys() {
            let (_, held) = rebuild::open(
                &w.config.state.dir.join(format!("replicas/{instance}.db")),
                instance,
                &Limits::default(),
            )
            .unwrap();
            assert_eq!(held.unwrap().version, r.instances[instance].version.unwrap());
        }
    }
}

/// What is published is signed as it is, whatever limits headquarters has by now; by a new machine, too.
#[tokio::test(flavor = "multi_thread")]
async fn limits_below_what_is_published_stop_its_stream_alone_and_undo_nothing() {
    let mut w = World::new().await;
    w.sql(
        "WITH RECURSIVE n(i) AS (SELECT 1001 UNION ALL SELECT i + 1 FROM n WHERE i < 9000)
         INSERT INTO item SELECT 'sku' || i, hex(randomblob(10)), NULL FROM n",
    );
    w.publish().await;
    set(&mut w, &format!("{CONFIG}\n[limits]\npack_bytes = 65536\n"));
    assert_eq!(w.publish().await.exit_code(), 0, "nothing changed");
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'; UPDATE price SET cents = cents + 1 WHERE zone = 'east'");
    let told = |r: &PublishReport| {
        let catalog = &r.instances[&"catalog@all".parse().unwrap()];
        assert_eq!((r.exit_code(), catalog.code), (3, Some("PACK_LIMITS")), "{:?}", r.lines());
    };
    let versions = || {
        let list = w.manifest("0421").unwrap();
        let devices = (list.relay.is_some(), list.registers.len());
        (list.instances().map(|(i, e)| (i.to_string(), e.version.get())).collect::<Vec<_>>(), devices)
    };
    told(&w.publish().await);
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    for id in ["0421", "0421-01"] {
        desk.enroll(&id.parse().unwrap()).await.unwrap();
    }
    let before = versions();
    assert_eq!(before, (vec![("catalog@all".into(), 1), ("price@zone-east".into(), 2)], (true, 1)));
    w.lose_ledger();
    told(&w.publish().await);
    assert_eq!(versions(), before);
}

/// A new machine reads what is out, whatever its limits: they are for what is published next.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_made_from_packs_that_are_over_lowered_limits() {
    let mut w = World::new().await;
    w.sql(
        "WITH RECURSIVE n(i) AS (SELECT 1001 UNION ALL SELECT i + 1 FROM n WHERE i < 9000)
         INSERT INTO item SELECT 'sku' || i, hex(randomblob(10)), NULL FROM n",
    );
    w.publish().await;
    w.sql("DELETE FROM item WHERE plu IS NULL");
    w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    set(&mut w, &format!("{CONFIG}\n[limits]\nunpacked_bytes = 65536\nrows = 500\n"));
    w.lose_ledger();
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "catalog@all")), (0, Outcome::Unchanged), "{:?}", r.lines());
    w.all_is_well();
    // Rows that come, and those that go, are too many for one pack of readers with these limits: a full has the former
    // alone.
    w.sql("DELETE FROM price WHERE zone = 'west'; INSERT INTO price SELECT 'west', 'new' || plu, 5 FROM item");
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    let price = &r.instances[&"price@zone-west".parse().unwrap()];
    assert_eq!((r.exit_code(), price.outcome), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(price.packs.iter().map(|p| (p.kind, p.rows)).collect::<Vec<_>>(), [(PackKind::Full, 401)]);
    assert!(price.plan.as_ref().unwrap().reason.ends_with("; the delta is over the limits"), "{:?}", price.plan);
    w.all_is_well();
    // Where that is too large as well, the limit is to be raised.
    w.sql(
        "DELETE FROM price WHERE zone = 'west'; INSERT INTO price SELECT 'west', 'more' || plu, 5 FROM item;
         INSERT INTO deal SELECT 'west', plu + 1000, sku FROM item",
    );
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    let told = &r.instances[&"price@zone-west".parse().unwrap()];
    assert_eq!((r.exit_code(), told.code), (3, Some("PACK_LIMITS")), "{:?}", r.lines());
    assert!(told.reason.contains("limits.rows = 500"), "{}", told.reason);
}

/// A newer headquarters published it: an older one on a new machine must not sign lists without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_signs_nothing_where_it_cannot_read_a_stream() {
    use crate::keys::{Keyring, Role};
    let w = World::new().await;
    w.publish().await;
    let path = w.dir.path().join("objects/stores/0421/manifest.json");
    let payload = dsse::peek_payload(&fs::read(&path).unwrap(), 1 << 20).unwrap();
    let mut list: serde_json::Value = serde_json::from_slice(&payload).unwrap();
    list["streams"]["catalog"]["packs"][0]["kind"] = "patch".into();
    let keys = Keyring::new(w.config.state.keys()).keys(Role::Publisher).unwrap();
    let list = serde_json::to_vec(&list).unwrap();
    fs::write(&path, dsse::seal(dsse::PayloadType::Manifest, &list, &[&keys[0].key])).unwrap();
    w.lose_ledger();
    let before = w.objects();
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(e.to_string().contains("lists stream catalog in a way that this build cannot read"), "{e}");
        assert_eq!(w.objects(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_that_nobody_needs_may_rot() {
    let w = World::new().await;
    let keys = w.config.state.keys();
    fs::write(keys.join("publisher-0.key"), "rot").unwrap();
    fs::create_dir(keys.join("publisher-3.key")).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    w.sql("UPDATE price SET cents = cents + 1");
    assert_eq!(w.publish().await.exit_code(), 0);
    // The one that is needed is told of by its own name, not by that it is none.
    fs::write(keys.join("publisher-1.key"), "rot").unwrap();
    fs::remove_file(keys.join("publisher-0.key")).unwrap();
    w.sql("UPDATE price SET cents = cents + 1");
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
    assert!(e.contains("publisher-1.key") && e.contains("no key file"), "{e}");
}

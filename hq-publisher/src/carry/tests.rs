//! From a publish to a folder, and a receipt back; and what `verify` says of it all.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use crate::config::Config;
use crate::enrol::Desk;
use crate::publish::{self, PublishOptions, Quiet};
use crate::{status, verify};
use proto::clock::{TestClock, after, before};
use proto::keys::SecretKey;
use proto::trust::EnrolCode;
use proto::wire::Heartbeat;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

struct World {
    dir: tempfile::TempDir,
    config: Config,
    clock: Arc<TestClock>,
}

impl World {
    async fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("schema")).unwrap();
        fs::write(at("schema/price.sql"), include_bytes!("../init/price.sql")).unwrap();
        fs::write(at("hq.toml"), include_bytes!("../init/hq.toml")).unwrap();
        let db = rusqlite::Connection::open(at("hq.db")).unwrap();
        db.execute_batch(
            "CREATE TABLE store (id TEXT, zone TEXT, region TEXT); INSERT INTO store VALUES ('0421', 'east', 'N');
             CREATE TABLE price (sku TEXT, zone TEXT, price_cents INT, updated TEXT);
             INSERT INTO price VALUES ('a', 'east', 100, NULL), ('b', 'east', 200, '2026');",
        )
        .unwrap();
        let config = crate::config::load(Some(&at("hq.toml")), []).unwrap().value;
        let w = World { dir, config, clock: Arc::new(TestClock::at("2026-01-01T00:00:00Z")) };
        w.desk().await.init().await.unwrap();
        w.publish().await;
        w
    }
    async fn desk(&self) -> Desk<'_> {
        Desk::open(&self.config, self.clock.as_ref(), false).await.unwrap()
    }
    async fn publish(&self) {
        let report = self.try_publish().await;
        assert_eq!(report.exit_code(), 0, "{report:?}");
    }
    async fn try_publish(&self) -> publish::PublishReport {
        let clock: Arc<dyn Clock> = self.clock.clone();
        publish::run(&self.config, &PublishOptions::default(), &clock, &Quiet, &Quiet).await.unwrap()
    }
    /// Enrols the store's relay; its key.
    async fn enrol(&self) -> SecretKey {
        let code = self.desk().await.enroll(&"0421".parse().unwrap()).await.unwrap();
        EnrolCode::from_text(&code.code, self.clock.now()).unwrap().key().unwrap()
    }
    /// What the store's relay says now, with all that is published.
    async fn up_to_date(&self) -> Receipt {
        let price: Instance = "price@zone-east".parse().unwrap();
        let head = self.desk().await.ledger.head(&price).await.unwrap().unwrap();
        Receipt {
            format: 1,
            store: "0421".parse().unwrap(),
            serial: Some(2),
            versions: BTreeMap::from([(price.clone(), head.version)]),
            digests: BTreeMap::from([(price, head.digests)]),
            time: self.clock.now(),
            refusals: Vec::new(),
        }
    }
    /// Reads a receipt back.
    async fn read_back(&self, r: &Receipt, by: &SecretKey) -> ReceiptLine {
        let file = self.dir.path().join("receipt.json");
        fs::write(&file, r.seal(by).unwrap()).unwrap();
        receipt(&self.desk().await.ledger, &file, &self.config.limits, self.clock.as_ref()).await.unwrap()
    }
    /// What whoever looks is told of the store.
    async fn shown(&self) -> Vec<String> {
        let report = status::report(&self.config, &self.desk().await.ledger, self.clock.as_ref()).await.unwrap();
        report.lines().into_iter().filter(|l| l.starts_with("store 0421")).collect()
    }
    fn change(&self, sql: &str) {
        rusqlite::Connection::open(self.dir.path().join("hq.db")).unwrap().execute_batch(sql).unwrap();
    }
    async fn export(&self, to: &str) -> Result<Exported, CarryError> {
        let d = self.desk().await;
        let store = "0421".parse().unwrap();
        export(&d.ledger, &d.buckets, &store, &self.dir.path().join(to), |_, _| ()).await
    }
    async fn verify(&self) -> verify::Report {
        let d = self.desk().await;
        verify::run(&self.config, &d.ledger, &d.buckets, |_, _| ()).await.unwrap()
    }
    fn objects(&self, dir: &str) -> Vec<String> {
        let root = self.dir.path().join(dir);
        let mut rooms = vec![root.clone()];
        let mut found = Vec::new();
        while let Some(room) = rooms.pop() {
            for e in fs::read_dir(room).unwrap().map(|e| e.unwrap().path()) {
                if e.is_dir() {
                    rooms.push(e);
                } else {
                    found.push(e.strip_prefix(&root).unwrap().display().to_string());
                }
            }
        }
        found.sort();
        found
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_the_bucket_as_the_store_sees_it() {
    let w = World::new().await;
    let first = w.export("stick").await.unwrap();
    assert_eq!((first.packs, first.kept), (1, 0));
    assert_eq!(w.objects("stick"), w.objects("objects"));
    w.change("UPDATE price SET price_cents = 101 WHERE sku = 'a'");
    w.publish().await;
    let second = w.export("stick").await.unwrap();
    assert_eq!((second.packs, second.kept, second.serial), (2, 1, first.serial + 1));
    assert_eq!(w.objects("stick"), w.objects("objects"));
    for name in w.objects("objects") {
        let read = |dir: &str| fs::read(w.dir.path().join(dir).join(&name)).unwrap();
        assert_eq!(read("stick"), read("objects"), "{name}");
    }
    let d = w.desk().await;
    let nobody = "0999".parse().unwrap();
    let none = export(&d.ledger, &d.buckets, &nobody, w.dir.path(), |_, _| ()).await;
    assert!(matches!(none, Err(CarryError::NoManifest(_))));
    // A pack that is damaged on the stick is written again; one that is damaged in the bucket is not taken.
    let pack = "packs/price@zone-east/0000000001.full.pack";
    fs::write(w.dir.path().join("stick").join(pack), "x").unwrap();
    assert_eq!(w.export("stick").await.unwrap().kept, 1);
    fs::write(w.dir.path().join("objects").join(pack), "x").unwrap();
    assert_eq!(w.export("stick").await.unwrap().kept, 2);
    let e = w.export("other").await.unwrap_err().to_string();
    assert!(e.contains(pack) && e.contains("verify"), "{e}");
    assert!(!w.objects("other").iter().any(|n| n.ends_with("manifest.json")), "no manifest without its packs");
}

/// A pack that is lost stays listed until the second full after it.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_goes_without_a_lost_pack_that_a_full_goes_round() {
    let w = World::new().await;
    let pack = |name: &str| format!("packs/price@zone-east/{name}.pack");
    let lose = |name: &str| fs::remove_file(w.dir.path().join("objects").join(pack(name))).unwrap();
    w.change("UPDATE price SET price_cents = 101 WHERE sku = 'a'");
    let clock: Arc<dyn Clock> = w.clock.clone();
    let full = PublishOptions { full: true, ..PublishOptions::default() };
    let report = publish::run(&w.config, &full, &clock, &Quiet, &Quiet).await.unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
    w.change("UPDATE price SET price_cents = 102 WHERE sku = 'a'");
    w.publish().await;
    let whole = w.export("whole").await.unwrap();
    lose("0000000001.full");
    fs::write(w.dir.path().join("objects").join(pack("0000000002.delta")), "x").unwrap();
    assert!(w.verify().await.is_right());
    let done = w.export("stick").await.unwrap();
    assert_eq!((whole.left_out, done.left_out, done.packs), (0, 2, whole.packs - 2));
    let wanted: Vec<String> = w
        .objects("whole")
        .into_iter()
        .filter(|n| ![pack("0000000001.full"), pack("0000000002.delta")].contains(n))
        .collect();
    assert_eq!(w.objects("stick"), wanted);
    // What leads on from the full is needed, and that itself.
    for lost in ["0000000003.delta", "0000000002.full"] {
        lose(lost);
        let e = w.export(lost).await.unwrap_err().to_string();
        assert!(e.contains(lost) && e.contains("verify"), "{e}");
        assert!(!w.objects(lost).iter().any(|n| n.ends_with("manifest.json")), "no manifest without its packs");
    }
}

/// A text that is no number, cast to one, is 0.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_contract_takes_no_price_of_zero() {
    let w = World::new().await;
    w.change("UPDATE price SET price_cents = 0 WHERE sku = 'a'");
    let report = w.try_publish().await;
    assert_eq!((report.exit_code(), report.instances.values().next().unwrap().bad_rows), (1, 1), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn receipts_are_verified_recorded_and_compared() {
    let w = World::new().await;
    let (key, good) = (w.enrol().await, w.up_to_date().await);
    let price: Instance = "price@zone-east".parse().unwrap();
    let l = w.read_back(&good, &key).await;
    assert_eq!((l.refused, l.behind.len(), l.differ.len()), (None, 0, 0));
    assert!(w.read_back(&good, &key).await.refused.is_none(), "twice is fine");
    let none = Receipt { versions: BTreeMap::new(), ..good.clone() };
    assert_eq!(w.read_back(&none, &key).await.behind[&price], (None, good.versions[&price]));
    let other = Receipt { digests: BTreeMap::from([(price.clone(), BTreeMap::new())]), ..good.clone() };
    assert_eq!(w.read_back(&other, &key).await.differ, [price]);
    let stranger = SecretKey::from_seed([9; 32]);
    assert!(w.read_back(&good, &stranger).await.refused.is_some());
    let unknown = Receipt { store: "0422".parse().unwrap(), ..good.clone() };
    assert!(w.read_back(&unknown, &key).await.refused.unwrap().contains("no enrolled relay"));
    // Whoever looks knows it by that, as of its time, until another machine is the relay.
    w.clock.advance(MINUTE);
    w.read_back(&Receipt { time: w.clock.now(), ..none }, &key).await;
    assert_eq!(w.shown().await, ["store 0421: behind in price@zone-east (by stick, 2026-01-01T00:01:00Z)"]);
    w.clock.advance(MINUTE);
    w.read_back(&Receipt { time: w.clock.now(), ..good.clone() }, &key).await;
    assert_eq!(w.shown().await, ["store 0421: up to date (by stick, 2026-01-01T00:02:00Z)"]);
    w.desk().await.revoke(&"0421".parse().unwrap()).await.unwrap();
    assert_eq!(w.shown().await, [""; 0]);
    assert!(w.read_back(&good, &key).await.refused.unwrap().contains("revoked"));
}

/// Ten years ahead: what comes when the clock is right again counts, be it a receipt, a heartbeat or a new machine's.
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_by_a_clock_that_was_ahead_gives_way_to_what_comes_later() {
    let w = World::new().await;
    let (key, good) = (w.enrol().await, w.up_to_date().await);
    let none = Receipt { versions: BTreeMap::new(), ..good.clone() };
    let ahead = Receipt { time: after(w.clock.now(), 60 * 24 * 3650 * MINUTE), ..none.clone() };
    w.read_back(&ahead, &key).await;
    assert_eq!(w.shown().await, ["store 0421: behind in price@zone-east (by stick, 2026-01-01T00:00:00Z)"]);
    // As it was written, not as it was read back, where both are of one second.
    w.read_back(&Receipt { time: after(ahead.time, MINUTE), ..good.clone() }, &key).await;
    w.read_back(&Receipt { time: after(ahead.time, MINUTE / 2), ..none.clone() }, &key).await;
    assert_eq!(w.shown().await, ["store 0421: up to date (by stick, 2026-01-01T00:00:00Z)"]);
    w.clock.advance(MINUTE);
    w.read_back(&Receipt { time: w.clock.now(), ..good.clone() }, &key).await;
    assert_eq!(w.shown().await, ["store 0421: up to date (by stick, 2026-01-01T00:01:00Z)"]);
    w.clock.advance(MINUTE);
    w.read_back(&ahead, &key).await;
    assert_eq!(w.shown().await, ["store 0421: up to date (by stick, 2026-01-01T00:01:00Z)"], "replayed");

    w.read_back(&Receipt { time: after(ahead.time, 2 * MINUTE), ..none }, &key).await;
    assert_eq!(w.shown().await, ["store 0421: behind in price@zone-east (by stick, 2026-01-01T00:02:00Z)"]);
    let receipts = Receipts::read(&w.desk().await.ledger, &w.config.limits).await.unwrap();
    let relay: DeviceId = "0421".parse().unwrap();
    let at = |sent_at| DeviceView {
        id: &relay,
        silent_for: None,
        watched_for: MINUTE,
        is_just_back: false,
        stuck_for: None,
        late_for: None,
        is_double: false,
        beat: Some(Arc::new(Heartbeat { sent_at, ..Heartbeat::plain(relay.clone(), 1) })),
    };
    assert!(receipts.newest_word(&at(before(w.clock.now(), MINUTE))).is_some());
    assert!(receipts.newest_word(&at(w.clock.now())).is_none(), "sent since");

    w.clock.advance(MINUTE);
    let new = w.enrol().await;
    assert_eq!(
        w.shown().await,
        ["store 0421: behind in price@zone-east"],
        "another machine, of which nothing is known"
    );
    w.read_back(&Receipt { time: Timestamp::UNIX_EPOCH, ..good }, &new).await;
    assert_eq!(w.shown().await, ["store 0421: up to date (by stick, 1970-01-01T00:00:00Z)"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_drift_damage_and_what_is_missing() {
    let w = World::new().await;
    let r = w.verify().await;
    assert!(r.is_right(), "{r:?}");
    assert_eq!((r.manifests, r.trust_files, r.instances.len()), (1, 2, 1));
    let d = w.desk().await;
    let s = status::report(&w.config, &d.ledger, w.clock.as_ref()).await.unwrap();
    assert_eq!(serde_json::to_value(&s).unwrap()["streams"]["price@zone-east"]["version"], 1);
    assert_eq!(s.trust, Some((1, 1)));
    let s = serde_json::to_value(&s).unwrap();
    let serial = &s["stores"][0]["serial"];
    assert!(serial.as_u64().is_some_and(|n| n > 0), "{s:#}");
    assert_eq!((&s["serial"], &s["network"], &s["debts"]), (serial, &"online".into(), &serde_json::json!([])));
    assert!(s["streams"].is_object() && s["errors"].is_array());

    let replica = w.dir.path().join("state/replicas/price@zone-east.db");
    rusqlite::Connection::open(&replica)
        .unwrap()
        .execute_batch("UPDATE price SET price_cents = 1 WHERE sku = 'a'")
        .unwrap();
    fs::write(w.dir.path().join("objects/packs/price@zone-east/0000000001.full.pack"), "x").unwrap();
    fs::write(w.dir.path().join("objects/stores/0421/manifest.json"), "x").unwrap();
    fs::remove_file(w.dir.path().join("objects/trust/0000000001.json")).unwrap();
    let r = w.verify().await;
    let all = r.lines().join("\n");
    for told in [
        "rows drifted",
        "other content than was put",
        "stores/0421/manifest.json in the bucket is not",
        "trust/0000000001.json is missing",
    ] {
        assert!(all.contains(told), "{told}\n{all}");
    }
    assert!(!r.is_right());
}

//! From a publish to a folder, and a receipt back; and what `verify` says of it all.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use crate::config::Config;
use crate::enrol::Desk;
use crate::publish::{self, PublishOptions, Quiet};
use crate::{status, verify};
use proto::clock::TestClock;
use proto::trust::EnrolCode;
use std::fs;
use std::sync::Arc;

struct World {
    dir: tempfile::TempDir,
    config: Config,
    clock: Arc<dyn Clock>,
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
        let report = publish::run(&self.config, &PublishOptions::default(), &self.clock, &Quiet, &Quiet).await.unwrap();
        assert_eq!(report.exit_code(), 0, "{report:?}");
    }
    fn change(&self, sql: &str) {
        rusqlite::Connection::open(self.dir.path().join("hq.db")).unwrap().execute_batch(sql).unwrap();
    }
    async fn export(&self, to: &str) -> Result<Exported, CarryError> {
        let d = self.desk().await;
        let store = "0421".parse().unwrap();
        export(&d.ledger, &d.buckets, &store, &self.dir.path().join(to), &self.config.limits, |_, _| ()).await
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
    let none = export(&d.ledger, &d.buckets, &nobody, w.dir.path(), &w.config.limits, |_, _| ()).await;
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

/// A text that is no number, cast to one, is 0.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_contract_takes_no_price_of_zero() {
    let w = World::new().await;
    w.change("UPDATE price SET price_cents = 0 WHERE sku = 'a'");
    let report = publish::run(&w.config, &PublishOptions::default(), &w.clock, &Quiet, &Quiet).await.unwrap();
    assert_eq!((report.exit_code(), report.instances.values().next().unwrap().bad_rows), (1, 1), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn receipts_are_verified_recorded_and_compared() {
    let w = World::new().await;
    let code = w.desk().await.enroll(&"0421".parse().unwrap()).await.unwrap();
    let key = EnrolCode::from_text(&code.code, w.clock.now()).unwrap().key().unwrap();
    let price: Instance = "price@zone-east".parse().unwrap();
    let head = w.desk().await.ledger.head(&price).await.unwrap().unwrap();
    let good = Receipt {
        format: 1,
        store: "0421".parse().unwrap(),
        serial: Some(2),
        versions: BTreeMap::from([(price.clone(), head.version)]),
        digests: BTreeMap::from([(price.clone(), head.digests.clone())]),
        time: w.clock.now(),
        refusals: Vec::new(),
    };
    let line = async |r: &Receipt, by: &proto::keys::SecretKey| {
        let file = w.dir.path().join("receipt.json");
        fs::write(&file, r.seal(by).unwrap()).unwrap();
        receipt(&w.desk().await.ledger, &file, &w.config.limits, w.clock.as_ref()).await.unwrap()
    };
    let l = line(&good, &key).await;
    assert_eq!((l.refused, l.behind.len(), l.differ.len()), (None, 0, 0));
    assert!(line(&good, &key).await.refused.is_none(), "twice is fine");
    let none = Receipt { versions: BTreeMap::new(), ..good.clone() };
    assert_eq!(line(&none, &key).await.behind[&price], (None, head.version));
    let other = Receipt { digests: BTreeMap::from([(price.clone(), BTreeMap::new())]), ..good.clone() };
    assert_eq!(line(&other, &key).await.differ, [price]);
    let stranger = proto::keys::SecretKey::from_seed([9; 32]);
    assert!(line(&good, &stranger).await.refused.is_some());
    let unknown = Receipt { store: "0422".parse().unwrap(), ..good.clone() };
    assert!(line(&unknown, &key).await.refused.unwrap().contains("no enrolled relay"));
    // Whoever looks knows it by that, as of its time, until another machine is the relay.
    let shown = async || {
        let report = status::report(&w.config, &w.desk().await.ledger, w.clock.as_ref()).await.unwrap();
        report.lines().into_iter().filter(|l| l.starts_with("store 0421")).collect::<Vec<_>>()
    };
    let later = |s| proto::clock::after(w.clock.now(), std::time::Duration::from_secs(s));
    line(&Receipt { time: later(60), ..none.clone() }, &key).await;
    assert_eq!(shown().await, ["store 0421: behind in price@zone-east (by stick, 2026-01-01T00:01:00Z)"]);
    line(&Receipt { time: later(120), ..good.clone() }, &key).await;
    assert_eq!(shown().await, ["store 0421: up to date (by stick, 2026-01-01T00:02:00Z)"]);
    w.desk().await.revoke(&"0421".parse().unwrap()).await.unwrap();
    assert_eq!(shown().await, [""; 0]);
    assert!(line(&good, &key).await.refused.unwrap().contains("revoked"));
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

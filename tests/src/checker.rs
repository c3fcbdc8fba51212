//! What must hold after whatever happened, looked at from outside: in the bucket, in each replica, in `ok/`, and over
//! time. Written from docs/FORMAT.md; it shares no code with the product.

use crate::{Site, digest, files, forge};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Digests by table.
pub type Digests = BTreeMap<String, String>;

/// What was seen so far, which later looks must not contradict.
#[derive(Debug, Clone, Default)]
pub struct Checker {
    /// The states of the model that may be published: each stream is at one of them.
    models: Vec<Digests>,
    /// Objects that never change, with their hashes.
    fixed: BTreeMap<String, String>,
    /// What packs lead to, by `INSTANCE VERSION`.
    versions: BTreeMap<String, Digests>,
    /// Hashes by which packs were listed in manifests.
    listed: BTreeMap<String, BTreeSet<String>>,
    /// Hashes of packs that a relay's shadow has proved, now or before it was lost.
    proved: BTreeMap<String, BTreeSet<String>>,
    /// The greatest (epoch, serial) of each store's manifest.
    serials: BTreeMap<String, (u64, u64)>,
    /// The greatest (epoch, version) of each stream at each place: manifests, replicas.
    heights: BTreeMap<(String, String), (u64, u64)>,
}

impl Checker {
    /// A state of the source that may be published from now on.
    pub fn allow(&mut self, model: Digests) {
        self.models.push(model);
    }

    /// The whole site, as it lies there.
    #[track_caller]
    pub fn look(&mut self, site: &Site) {
        self.objects(site);
        // A test damaged some by hand, and they are not healed yet.
        let trusted = !site.dir().join("distrust").exists();
        // What a test has signed and everybody must refuse: `INSTANCE VERSION`.
        let evil = std::fs::read_to_string(site.dir().join("refused")).unwrap_or_default();
        for (store, relay) in &site.relays {
            let (shadow, ok) = (relay.dir.join("data/shadow.db"), relay.dir.join("data/ok/packs"));
            if trusted {
                self.replica(&shadow, &format!("relay {store}"), &evil);
            }
            let proved = self.proved.entry(store.clone()).or_default();
            proved.extend(proofs(&shadow));
            if !trusted && proved.is_empty() {
                // It was the shadow that the test damaged: what lies there is believed by its hash.
                proved.extend(files::tree(&ok).into_values());
            }
            self.served(store, &ok, &evil);
        }
        for id in site.registers.keys().filter(|_| trusted) {
            self.register(site, id, &evil);
        }
    }

    /// The bucket alone.
    #[track_caller]
    pub fn objects(&mut self, site: &Site) {
        self.bucket(site);
        site.relays.keys().for_each(|store| self.manifest(site, store));
    }

    /// No name ever gets other bytes; what each pack leads to is remembered.
    #[track_caller]
    fn bucket(&mut self, site: &Site) {
        for (name, hash) in files::tree(&site.bucket()) {
            let fixed = name.ends_with(".pack") || name.starts_with("trust/") && name.ends_with(".json");
            if !fixed || name.split('/').any(|part| part.starts_with('.')) {
                continue;
            }
            let before = self.fixed.insert(name.clone(), hash.clone());
            assert!(before.is_none_or(|b| b == hash), "{name} was written again with other bytes");
            if let Some(pack) = name.strip_prefix("packs/") {
                let (instance, file) = pack.split_once('/').unwrap();
                let lines = forge::unpack(&site.object(&name).unwrap());
                let trailer: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
                let key = format!("{instance} {}", file[..10].parse::<u64>().unwrap());
                self.versions.insert(key, digests(&trailer["digests"]));
            }
        }
    }

    /// Serials and versions never go down, every listed pack is there whole, and what is promised is a state of the
    /// model, each stream one.
    #[track_caller]
    fn manifest(&mut self, site: &Site, store: &str) {
        let Some(envelope) = site.object(&format!("stores/{store}/manifest.json")) else {
            assert!(!self.serials.contains_key(store), "the manifest of {store} is gone");
            return;
        };
        let manifest = forge::payload(&envelope);
        let epoch = manifest["epoch"].as_u64().unwrap();
        let serial = (epoch, manifest["serial"].as_u64().unwrap());
        let before = self.serials.insert(store.into(), serial);
        assert!(before.is_none_or(|b| b <= serial), "{store}: serial {serial:?} after {before:?}");
        for (stream, entry) in manifest["streams"].as_object().unwrap() {
            let instance = format!("{stream}@{}", entry["audience"].as_str().unwrap());
            let version = entry["version"].as_u64().unwrap();
            self.rise(&format!("manifest {store}"), &instance, (epoch, version));
            for pack in entry["packs"].as_array().unwrap() {
                let (version, kind) = (pack["version"].as_u64().unwrap(), pack["kind"].as_str().unwrap());
                let name = format!("{instance}/{version:010}.{kind}.pack");
                let bytes =
                    site.object(&format!("packs/{name}")).unwrap_or_else(|| panic!("{store}: {name} is not there"));
                let hash = forge::sha256(&bytes);
                assert_eq!(pack["sha256"], hash, "{store}: {name} is not what is listed");
                self.listed.entry(name).or_default().insert(hash);
            }
            let promised = digests(&entry["digests"]);
            assert_eq!(self.versions[&format!("{instance} {version}")], promised, "{store}: {instance} {version}");
            self.is_a_model(&promised, &format!("manifest {store}"));
        }
    }

    /// A register's streams never go while they are listed.
    #[track_caller]
    fn register(&mut self, site: &Site, id: &str, evil: &str) {
        let whose = &format!("register {id}");
        let there = self.replica(&site.store_db(id), whose, evil);
        let manifest = site.object(&format!("stores/{}/manifest.json", id.split('-').next().unwrap()));
        let streams = manifest.map(|m| forge::payload(&m)["streams"].clone()).unwrap_or_default();
        let had = self.heights.keys().filter(|(place, _)| place == whose).map(|(_, instance)| instance);
        for instance in had {
            let stream = instance.split('@').next().unwrap();
            let may_go = streams[stream].is_null();
            assert!(there.contains(stream) || may_go, "{whose} had {instance}, and has no {stream} any more");
        }
    }

    /// Each stream is at exactly one published version, and has the rows of it. Which there are.
    #[track_caller]
    fn replica(&mut self, path: &Path, whose: &str, evil: &str) -> BTreeSet<String> {
        if std::fs::metadata(path).map_or(0, |m| m.len()) == 0 {
            return BTreeSet::new();
        }
        let db = digest::open_read_only(path);
        let ok: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(ok, "ok", "{whose}");
        let count = |sql: &str| db.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
        if count("SELECT count(*) FROM sqlite_schema WHERE name = 'tillcast_stream'") == 0 {
            assert_eq!(count("SELECT count(*) FROM sqlite_schema"), 0, "{whose}: tables of nobody");
            return BTreeSet::new();
        }
        let mut rows = db.prepare("SELECT stream, audience, version, epoch FROM tillcast_stream").unwrap();
        let streams: Vec<(String, String, u64, u64)> = rows
            .query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get::<_, i64>(2)? as u64, r.get::<_, i64>(3)? as u64)))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let (mut tables, mut there) = (BTreeSet::new(), BTreeSet::new());
        for (stream, audience, version, epoch) in streams {
            let instance = format!("{stream}@{audience}");
            assert_ne!(format!("{instance} {version}"), evil, "{whose} holds what it must refuse");
            let published = self.versions.get(&format!("{instance} {version}"));
            let published = published.unwrap_or_else(|| panic!("{whose}: {instance} {version} was never published"));
            let held: Digests = published.keys().map(|t| (t.clone(), digest::of_table(&db, t))).collect();
            assert_eq!(&held, published, "{whose}: {instance} {version} has other rows");
            tables.extend(held.into_keys());
            there.insert(stream);
            let signed = self.heights.iter().filter(|((place, i), _)| place.starts_with("manifest") && *i == instance);
            let signed = signed.map(|(_, height)| *height).max();
            assert!(
                signed.is_some_and(|s| s >= (epoch, version)),
                "{whose}: {instance} {version} is beyond {signed:?}"
            );
            self.rise(whose, &instance, (epoch, version));
        }
        let found: BTreeSet<String> = digest::of_database(path).into_keys().collect();
        assert_eq!(found, tables, "{whose}: tables of streams that it does not hold");
        there
    }

    /// Only what a manifest listed, with the hash by which it did, and the shadow has proved.
    #[track_caller]
    fn served(&self, store: &str, ok: &Path, evil: &str) {
        for (name, hash) in files::tree(ok) {
            if !name.split('/').any(|part| part.starts_with('.')) {
                let listed = self.listed.get(&name).is_some_and(|hashes| hashes.contains(&hash));
                assert!(listed, "ok/ holds {name}, which no manifest lists so");
                let proved = self.proved.get(store).is_some_and(|hashes| hashes.contains(&hash));
                assert!(proved, "ok/ holds {name}, which the shadow has not proved");
                let (instance, file) = name.split_once('/').unwrap();
                let version = file[..10].parse::<u64>().unwrap();
                assert_ne!(format!("{instance} {version}"), evil, "ok/ holds what is to be refused");
            }
        }
    }

    #[track_caller]
    fn rise(&mut self, place: &str, instance: &str, height: (u64, u64)) {
        let before = self.heights.insert((place.into(), instance.into()), height);
        assert!(before.is_none_or(|b| b <= height), "{place}: {instance} at {height:?} after {before:?}");
    }

    #[track_caller]
    fn is_a_model(&self, stream: &Digests, whose: &str) {
        let fits = |model: &Digests| stream.iter().all(|(table, digest)| model.get(table) == Some(digest));
        assert!(self.models.iter().any(fits), "{whose}: {stream:?} is no state of the source");
    }
}

/// What a shadow says it has applied and proved.
fn proofs(shadow: &Path) -> BTreeSet<String> {
    if std::fs::metadata(shadow).map_or(0, |m| m.len()) == 0 {
        return BTreeSet::new();
    }
    let db = digest::open_read_only(shadow);
    let Ok(mut packs) = db.prepare("SELECT lower(sha256) FROM tillcast_pack") else { return BTreeSet::new() };
    packs.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
}

fn digests(value: &Value) -> Digests {
    value.as_object().unwrap().iter().map(|(t, d)| (t.clone(), d.as_str().unwrap().to_owned())).collect()
}

/// Files that only somebody at work may have: asides, parts, scratch, packs on their way.
pub fn left_behind(site: &Site) -> Vec<PathBuf> {
    let mut left: Vec<PathBuf> = Vec::new();
    let mut take = |dir: PathBuf, is_left: &dyn Fn(&str) -> bool| {
        left.extend(files::tree(&dir).into_keys().filter(|name| is_left(name)).map(|name| dir.join(name)));
    };
    take(site.dir().into(), &|name| name.rsplit('/').next().is_some_and(|file| file.starts_with(".tmp-")));
    take(site.hq.dir.join("state/packs"), &|_| true);
    take(site.hq.dir.join("state/scratch"), &|_| true);
    for relay in site.relays.values() {
        for room in ["incoming", "ready", "import"] {
            take(relay.dir.join("data").join(room), &|_| true);
        }
        take(relay.dir.join("data"), &|name| name.starts_with("scratch.db"));
    }
    for register in site.registers.values() {
        take(register.dir.join("data/packs"), &|_| true);
    }
    left
}

/// Packs in the bucket that the ledger of headquarters counts on no more.
pub fn unclaimed(site: &Site) -> Vec<String> {
    let db = digest::open_read_only(&site.hq.dir.join("state/fleet.db"));
    let mut rows = db.prepare("SELECT instance, packs FROM publication WHERE state IN ('signed', 'done')").unwrap();
    let known: BTreeSet<String> = rows
        .query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?)))
        .unwrap()
        .map(Result::unwrap)
        .flat_map(|(instance, packs)| {
            let packs: Vec<Value> = serde_json::from_str(&packs).unwrap();
            packs.into_iter().map(move |p| {
                format!("{instance}/{:010}.{}.pack", p["version"].as_u64().unwrap(), p["kind"].as_str().unwrap())
            })
        })
        .collect();
    files::tree(&site.bucket().join("packs"))
        .into_keys()
        .filter(|n| n.ends_with(".pack") && !known.contains(n))
        .collect()
}

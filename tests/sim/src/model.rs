//! What must be true, by a model that shares no code with the product but the form of what devices say: which versions
//! were published with which rows, what each device may hold, and what people must be told.

use crate::disk;
use crate::hq::STREAMS;
use proto::clock::Timestamp;
use proto::wire::Fault;
use rusqlite::Connection;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tillcast_tests::{digest, forge};

/// A version of a stream@audience.
type Version = (String, u64);

/// What is broken; the text is for people.
pub type Checked = Result<(), String>;

/// What was published, seen and told so far.
#[derive(Debug)]
pub struct Model {
    hq: PathBuf,
    /// Numbers taken, and the digest of the source's rows at that moment.
    reserved: BTreeMap<Version, String>,
    /// Those that a manifest in the bucket listed, with their digests.
    published: BTreeMap<Version, String>,
    /// What a version requires, by each list that a store ever had it in, at the head or on the way there.
    required: BTreeMap<(String, Version), BTreeSet<Required>>,
    /// Packs that such a manifest listed: name below `packs/`, hash.
    packs: BTreeMap<String, String>,
    /// Manifests that headquarters never signed, by hash.
    forged: BTreeSet<String>,
    /// Greatest serial of each store.
    serials: BTreeMap<String, u64>,
    /// What headquarters' newest list promises each store: the digest of each instance.
    promises: BTreeMap<String, BTreeMap<String, String>>,
    /// What each device held last: (device, stream@audience, epoch).
    held: BTreeMap<(String, String, u64), u64>,
    /// Streams that each device has held: they never go.
    streams: BTreeMap<String, BTreeSet<String>>,
    /// Files in `ok/` that were looked at: path, length and time.
    looked: BTreeSet<(PathBuf, u64, SystemTime)>,
    /// Streams of a device whose rows somebody changed by hand, until they are right again.
    tampered: BTreeSet<(String, String)>,
    /// Mails read, and how many times each subject is open.
    mails: i64,
    open: BTreeMap<String, bool>,
    /// How often a subject was mailed.
    pub told: BTreeMap<String, u64>,
    /// Subjects of mails since the log last asked.
    pub news: Vec<String>,
    /// Streams of which a relay gave up a pack: somebody must hear of it.
    pub given_up: BTreeSet<String>,
    /// Subjects that devices have given reason for, with the device and since when: each reason is worth one mail.
    complaints: BTreeMap<String, BTreeSet<(String, Timestamp)>>,
    /// What each relay's shadow has proved.
    proofs: BTreeMap<String, BTreeSet<String>>,
    /// Databases as they were when they were looked at last.
    unchanged: BTreeMap<PathBuf, [Option<(u64, SystemTime)>; 2]>,
    /// Files in `ok/` that rot, until they are right again or gone.
    rotten: BTreeSet<PathBuf>,
    /// Checks made.
    pub checks: u64,
}

impl Model {
    /// A model that knows nothing yet.
    pub fn new(hq: &Path) -> Model {
        Model {
            hq: hq.to_owned(),
            reserved: BTreeMap::new(),
            published: BTreeMap::new(),
            required: BTreeMap::new(),
            packs: BTreeMap::new(),
            forged: BTreeSet::new(),
            serials: BTreeMap::new(),
            promises: BTreeMap::new(),
            held: BTreeMap::new(),
            streams: BTreeMap::new(),
            looked: BTreeSet::new(),
            tampered: BTreeSet::new(),
            mails: 0,
            open: BTreeMap::new(),
            told: BTreeMap::new(),
            news: Vec::new(),
            given_up: BTreeSet::new(),
            complaints: BTreeMap::new(),
            proofs: BTreeMap::new(),
            unchanged: BTreeMap::new(),
            rotten: BTreeSet::new(),
            checks: 0,
        }
    }

    /// The digest of the source's rows of an instance, now.
    pub fn source_digest(&self, instance: &str) -> String {
        let db = Connection::open(self.hq.join("source.db")).unwrap();
        let (stream, audience) = instance.split_once('@').unwrap();
        let of = audience.split_once('-').map_or("", |(_, of)| of);
        let sql = match stream {
            "price" => format!("SELECT sku, cents, note FROM price WHERE zone = '{of}'"),
            "promo" => "SELECT * FROM promo".to_owned(),
            "staff" => format!("SELECT badge, rights FROM staff WHERE store = '{of}'"),
            other => panic!("no such stream: {other}"),
        };
        digest::of_query(&db, &sql)
    }

    /// `publish` takes a number.
    pub fn reserved(&mut self, instance: &str, version: u64) {
        let digest = self.source_digest(instance);
        self.reserved.insert((instance.to_owned(), version), digest);
    }

    /// A manifest that headquarters never made is put into the bucket.
    pub fn forged(&mut self, envelope: &[u8]) {
        self.forged.insert(forge::sha256(envelope));
    }

    /// Rows of a device were changed by hand.
    pub fn tampered(&mut self, device: &str, stream: &str) {
        self.tampered.insert((device.to_owned(), stream.to_owned()));
    }

    /// A file that a relay serves rots.
    pub fn rots(&mut self, path: &Path) {
        self.rotten.insert(path.to_owned());
    }

    /// Files that are rotten still.
    pub fn still_rotten(&self) -> Vec<&PathBuf> {
        self.rotten.iter().filter(|p| p.exists()).collect()
    }

    /// The instances that a store should follow, with the digests of the source now.
    pub fn wanted(&self, store: &str) -> BTreeMap<String, String> {
        let db = Connection::open(self.hq.join("source.db")).unwrap();
        let zone: String = db.query_row("SELECT zone FROM store WHERE id = ?1", [store], |r| r.get(0)).unwrap();
        let audience = |kind: &str| match kind {
            "zone" => format!("zone-{zone}"),
            "store" => format!("store-{store}"),
            _ => "all".to_owned(),
        };
        let instances = STREAMS.iter().map(|s| format!("{}@{}", s.name, audience(s.audience)));
        instances.map(|i| (i.clone(), self.source_digest(&i))).collect()
    }

    /// Reads what headquarters published.
    pub fn look_at_bucket(&mut self) -> Checked {
        self.checks += 1;
        for path in disk::files(&self.hq.join("objects/stores")) {
            let envelope = std::fs::read(&path).unwrap();
            if path.file_name().is_none_or(|n| n != "manifest.json") || self.forged.contains(&forge::sha256(&envelope))
            {
                continue;
            }
            let m = forge::payload(&envelope);
            let (store, serial) = (text(&m["store"]), number(&m["serial"]));
            let before = self.serials.insert(store.clone(), serial).unwrap_or(0);
            if serial < before {
                return Err(format!("the manifest of {store} went back from serial {before} to {serial}"));
            }
            let promise = self.promises.entry(store).or_default();
            promise.clear();
            for (stream, entry) in m["streams"].as_object().unwrap() {
                promise.insert(format!("{stream}@{}", text(&entry["audience"])), text(&entry["digests"][stream]));
            }
            for (stream, entry) in m["streams"].as_object().unwrap() {
                self.look_at_entry(stream, entry)?;
            }
            self.look_at_requires(&m)?;
        }
        Ok(())
    }

    /// What is required is listed beside.
    fn look_at_requires(&mut self, list: &Value) -> Checked {
        let streams = &list["streams"];
        for (stream, entry) in streams.as_object().unwrap() {
            let mut requires = Required::new();
            for (of, least) in entry["requires"].as_object().into_iter().flatten() {
                let (there, least) = (&streams[of], number(least));
                if there.is_null() || number(&there["version"]) < least {
                    return Err(format!("{stream} requires {of} {least}, and listed is {}", there["version"]));
                }
                requires.insert(of.clone(), (text(&there["audience"]), least));
            }
            // It counts for each version on the way, too.
            for at in entry["packs"].as_array().into_iter().flatten().chain([entry]) {
                let version = (format!("{stream}@{}", text(&entry["audience"])), number(&at["version"]));
                self.required.entry((text(&list["store"]), version)).or_default().insert(requires.clone());
            }
        }
        Ok(())
    }

    /// A register that takes a version holds what some list of its store requires for it.
    fn has_required(&self, register: &str, version: Version, rows: &[Row]) -> Checked {
        let store = register.split('-').next().unwrap();
        let Some(lists) = self.required.get(&(store.to_owned(), version.clone())) else { return Ok(()) };
        let is_held = |(of, (audience, least)): (&String, &(String, u64))| {
            rows.iter().any(|(stream, at, held, _)| (stream, at) == (of, audience) && held >= least)
        };
        match lists.iter().any(|requires| requires.iter().all(is_held)) {
            true => Ok(()),
            false => Err(format!("{register} took {version:?}, which requires {lists:?}, and holds {rows:?}")),
        }
    }

    /// Whether any version was seen to require another.
    pub fn saw_required(&self) -> bool {
        self.required.values().flatten().any(|requires| !requires.is_empty())
    }

    /// Reads what was exported: what is signed is published, also where its manifest could not be put.
    pub fn look_at_stick(&mut self, stick: &Path) -> Checked {
        for path in disk::files(&stick.join("stores")) {
            let m = forge::payload(&std::fs::read(&path).unwrap());
            for (stream, entry) in m["streams"].as_object().unwrap() {
                self.look_at_entry(stream, entry)?;
            }
            self.look_at_requires(&m)?;
        }
        Ok(())
    }

    fn look_at_entry(&mut self, stream: &str, entry: &Value) -> Checked {
        let instance = format!("{stream}@{}", text(&entry["audience"]));
        let version = (instance.clone(), number(&entry["version"]));
        let digest = text(&entry["digests"][stream]);
        match self.reserved.get(&version) {
            Some(d) if *d == digest => {}
            Some(d) => return Err(format!("{version:?} was published with digest {digest}, its rows have {d}")),
            None => return Err(format!("{version:?} was published, and its number never taken")),
        }
        self.published.insert(version, digest);
        for pack in entry["packs"].as_array().unwrap() {
            // A reader stops at each on its way.
            let on_the_way = (instance.clone(), number(&pack["version"]));
            let Some(digest) = self.reserved.get(&on_the_way) else {
                return Err(format!("a pack of {on_the_way:?} is listed, and its number was never taken"));
            };
            self.published.insert(on_the_way, digest.clone());
            let name = format!("{instance}/{:010}.{}.pack", number(&pack["version"]), text(&pack["kind"]));
            let sha256 = text(&pack["sha256"]);
            let before = self.packs.insert(name.clone(), sha256.clone());
            if before.is_some_and(|b| b != sha256) {
                return Err(format!("{name} was rewritten"));
            }
        }
        Ok(())
    }

    /// Opens a device's database; on a full disk a copy of it, for there may be no room to make its index.
    fn open(&self, file: &Path) -> Connection {
        if !file.with_file_name("filler").exists() {
            return digest::open_read_only(file);
        }
        let copy = self.hq.with_file_name("copy.db");
        for end in ["", "-wal", "-shm"] {
            let [from, to] = [file, &copy].map(|f| format!("{}{end}", f.display()));
            let _ = std::fs::remove_file(&to);
            if end != "-shm" && Path::new(&from).exists() {
                std::fs::copy(from, to).unwrap();
            }
        }
        digest::open_read_only(&copy)
    }

    /// Whether a database was written since the last time, by its file and its log.
    fn is_written(&mut self, file: &Path) -> bool {
        let log = PathBuf::from(format!("{}-wal", file.display()));
        let state = [file, &log].map(|f| f.metadata().ok().map(|m| (m.len(), m.modified().unwrap())));
        self.unchanged.insert(file.to_owned(), state) != Some(state)
    }

    /// A register: one published version a stream, its rows, never an older one than before.
    pub fn look_at_register(&mut self, register: &str, data: &Path) -> Checked {
        self.checks += 1;
        let file = data.join("store.db");
        if !self.is_written(&file) {
            return Ok(());
        }
        let db = file.exists().then(|| self.open(&file));
        let there = self.look_at_rows(register, db.as_ref())?;
        let Some(db) = db else { return Ok(()) };
        for s in STREAMS.iter().filter(|s| !there.contains(s.name)) {
            let sql = "SELECT count(*) FROM sqlite_schema WHERE name = ?1";
            if db.query_row(sql, [s.name], |r| r.get::<_, i64>(0)).unwrap() > 0 {
                return Err(format!("{register} has rows of {} without a version", s.name));
            }
        }
        Ok(())
    }

    /// What a device holds: published versions, none older than before, of all the streams that it ever held.
    fn look_at_rows(&mut self, device: &str, db: Option<&Connection>) -> Result<BTreeSet<String>, String> {
        let rows = db.map_or(Ok(Vec::new()), streams_of);
        let rows = rows.map_err(|e| format!("the database of {device} cannot be read: {e}"))?;
        let mut there = BTreeSet::new();
        for (stream, audience, version, epoch) in &rows {
            let (version, epoch) = (*version, *epoch);
            if !there.insert(stream.clone()) {
                return Err(format!("{device} holds {stream} twice"));
            }
            let instance = format!("{stream}@{audience}");
            let found = digest::of_table(db.unwrap(), stream);
            // Rows that a hand changed are healed, whatever else is there.
            let was_right = !self.tampered.contains(&(device.to_owned(), stream.clone()));
            self.may_hold(device, stream, &instance, version, &found)?;
            let before = self.held.insert((device.to_owned(), instance.clone(), epoch), version);
            if before.is_some_and(|b| b > version) {
                return Err(format!("{device} went back from {instance} {} to {version}", before.unwrap_or(0)));
            }
            // A relay's shadow proves each stream by itself.
            if before != Some(version) && was_right && device.contains('-') {
                self.has_required(device, (instance, version), &rows)?;
            }
        }
        let had = self.streams.entry(device.to_owned()).or_default();
        if let Some(gone) = had.difference(&there).next() {
            return Err(format!("{device} had {gone} and has it no more"));
        }
        had.extend(there.iter().cloned());
        Ok(there)
    }

    /// A relay's shadow is gone: it may begin anew.
    pub fn lost(&mut self, relay: &str) {
        self.held.retain(|(device, ..), _| device != relay);
        self.streams.remove(relay);
    }

    /// Whether these rows are a published version's.
    fn may_hold(&mut self, device: &str, stream: &str, instance: &str, version: u64, found: &str) -> Checked {
        let Some(digest) = self.published.get(&(instance.to_owned(), version)) else {
            return Err(format!("{device} holds {instance} {version}, which was never published"));
        };
        let hand = (device.to_owned(), stream.to_owned());
        if digest == found {
            self.tampered.remove(&hand);
        } else if !self.tampered.contains(&hand) {
            return Err(format!("{device} holds {instance} {version} with digest {found}, published was {digest}"));
        }
        Ok(())
    }

    /// A relay: what it serves was published, and is proved by its shadow, which holds published versions too.
    /// `unproved`: packs that it served when its shadow, with the proofs, was lost.
    pub fn look_at_relay(&mut self, relay: &str, data: &Path, unproved: &mut BTreeSet<String>) -> Checked {
        self.checks += 1;
        let shadow = data.join("shadow.db");
        if self.is_written(&shadow) {
            let mut proofs = BTreeSet::new();
            let db = shadow.exists().then(|| self.open(&shadow));
            self.look_at_rows(relay, db.as_ref())?;
            if let Some(db) = db.filter(is_made) {
                let mut all = db.prepare("SELECT lower(sha256) FROM tillcast_pack").unwrap();
                proofs.extend(all.query_map([], |r| r.get::<_, String>(0)).unwrap().map(Result::unwrap));
            }
            self.proofs.insert(relay.to_owned(), proofs);
        }
        let proofs = self.proofs.get(relay).cloned().unwrap_or_default();
        // What it has proved anew is believed no more without.
        unproved.retain(|name| self.packs.get(name).is_none_or(|sha256| !proofs.contains(sha256)));
        for room in ["ok", "ready"] {
            let root = data.join(room).join("packs");
            for path in disk::files(&root) {
                let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                if name.contains(".tmp-") {
                    continue;
                }
                let listed = self.packs.get(&name).cloned();
                let Some(listed) = listed else {
                    if room == "ok" {
                        return Err(format!("{relay} serves {name}, which was never published"));
                    }
                    continue;
                };
                if room == "ok" && !unproved.contains(&name) && !proofs.contains(&listed) {
                    return Err(format!("{relay} serves {name}, which its shadow has not proved"));
                }
                let meta = path.metadata().unwrap();
                let key = (path.clone(), meta.len(), meta.modified().unwrap());
                if !self.looked.contains(&key) {
                    let found = forge::sha256(&std::fs::read(&path).unwrap());
                    if found != listed && self.rotten.contains(&path) {
                        continue;
                    }
                    self.rotten.remove(&path);
                    if found != listed {
                        return Err(format!("{relay} has {name} in {room}/ with hash {found}, published was {listed}"));
                    }
                    self.looked.insert(key);
                }
            }
        }
        let root = data.join("error/packs");
        for path in disk::files(&root).iter().filter(|p| p.to_string_lossy().ends_with(".reason.json")) {
            let instance = path.strip_prefix(&root).unwrap().components().next().unwrap();
            self.given_up.insert(instance.as_os_str().to_string_lossy().into_owned());
        }
        Ok(())
    }

    /// A device complains: what of it must be told, even if it is mended by then.
    pub fn complains(&mut self, device: &str, faults: &[Fault]) {
        for f in faults {
            let of = f.instance.as_ref().map_or_else(|| device.to_owned(), ToString::to_string);
            let about = match f.code.as_str() {
                "DRIFT" => format!("Rows of {of} differ from what was published"),
                "PACK_MISSING" => format!("A pack of {of} is missing from the bucket"),
                "PACK_IN_ERROR" => format!("A pack of {of} is in error"),
                _ => continue,
            };
            self.complaints.entry(about).or_default().insert((device.to_owned(), f.since));
        }
    }

    /// Nothing that a device said was kept silent, and nothing was told more often than it was said.
    pub fn told_as_said(&self) -> Checked {
        for (about, reasons) in &self.complaints {
            let told = self.told.get(about).copied().unwrap_or(0);
            if told == 0 {
                return Err(format!("“{about}” was never told, though a device said so"));
            }
            if told > reasons.len() as u64 {
                return Err(format!("“{about}” was told {told} times, for {} reasons", reasons.len()));
            }
        }
        Ok(())
    }

    /// What headquarters' newest list promises a store: the digest of each instance.
    pub fn promised(&self, store: &str) -> BTreeMap<String, String> {
        self.promises.get(store).cloned().unwrap_or_default()
    }

    /// A new register can install from what a relay serves: of each stream a full and the deltas up to the version.
    pub fn look_at_chains(&self, relay: &str, data: &Path) -> Checked {
        let ok = data.join("ok");
        let manifest = forge::payload(&std::fs::read(ok.join(format!("stores/{relay}/manifest.json"))).unwrap());
        for (stream, entry) in manifest["streams"].as_object().unwrap() {
            let instance = format!("{stream}@{}", text(&entry["audience"]));
            let version = number(&entry["version"]);
            let is_there = |v: u64, kind: &str| ok.join(format!("packs/{instance}/{v:010}.{kind}.pack")).exists();
            // Numbers are burnt by publishes that were cut: the list says which there are.
            let listed: BTreeSet<u64> =
                entry["packs"].as_array().unwrap().iter().map(|p| number(&p["version"])).collect();
            let leads =
                |full: &u64| is_there(*full, "full") && listed.iter().all(|v| v <= full || is_there(*v, "delta"));
            if !listed.iter().any(leads) {
                return Err(format!("{relay} has no chain that leads a new register to {instance} {version}"));
            }
        }
        Ok(())
    }

    /// What a device holds of each instance.
    pub fn holds(&self, file: &Path) -> BTreeMap<String, (u64, String)> {
        let db = self.open(file);
        let rows = streams_of(&db).unwrap_or_default();
        rows.into_iter().map(|(s, a, v, _)| (format!("{s}@{a}"), (v, digest::of_table(&db, &s)))).collect()
    }

    /// Mails: whatever is wrong is told once, and once that it is over.
    pub fn look_at_mails(&mut self) -> Checked {
        self.checks += 1;
        let db = digest::open_read_only(&self.hq.join("state/fleet.db"));
        let mut statement = db.prepare("SELECT n, subject FROM mail WHERE n > ?1 ORDER BY n").unwrap();
        let rows = statement.query_map([self.mails], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, String>(1)?))).unwrap();
        for row in rows {
            let (n, subject) = row.unwrap();
            self.mails = n;
            self.news.push(subject.clone());
            let subject = subject.trim_start_matches("[Tillcast] ").to_owned();
            let (about, opens) = match subject.strip_prefix("Recovered: ") {
                Some(about) => (about.to_owned(), false),
                None => (subject, true),
            };
            let was = self.open.insert(about.clone(), opens).unwrap_or(false);
            if was == opens {
                let what = if opens { "again while it lasts" } else { "as over and never began" };
                return Err(format!("“{about}” was told {what}"));
            }
            // No seed lasts half an hour.
            if opens && about.starts_with("Register ") && about.ends_with(" is silent") {
                return Err(format!("“{about}” is told too early"));
            }
            if opens {
                *self.told.entry(about).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Whether people know of it and have not heard that it is over.
    pub fn is_open(&self, about: &str) -> bool {
        self.open.get(about).copied().unwrap_or(false)
    }

    /// What people believe to be wrong.
    pub fn all_open(&self) -> Vec<String> {
        self.open.iter().filter(|(_, open)| **open).map(|(about, _)| about.clone()).collect()
    }
}

/// Stream, audience, version, epoch.
/// Whether the database has been made: a crash may come before its tables.
fn is_made(db: &Connection) -> bool {
    let sql = "SELECT count(*) FROM sqlite_schema WHERE name = 'tillcast_stream'";
    db.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap_or(1) > 0
}

/// Of other streams the audience and the least version.
type Required = BTreeMap<String, (String, u64)>;

/// Stream, audience, version, epoch.
type Row = (String, String, u64, u64);

/// Nothing where it has not been made; an error where it cannot be read.
fn streams_of(db: &Connection) -> rusqlite::Result<Vec<Row>> {
    if !is_made(db) {
        return Ok(Vec::new());
    }
    let mut all = db.prepare("SELECT stream, audience, version, epoch FROM tillcast_stream ORDER BY stream")?;
    let number = |r: &rusqlite::Row<'_>, i| r.get::<_, i64>(i).map(|n| n as u64);
    let rows = all.query_map([], |r| Ok((r.get(0)?, r.get(1)?, number(r, 2)?, number(r, 3)?)))?;
    rows.collect()
}

fn text(v: &Value) -> String {
    v.as_str().unwrap_or_default().to_owned()
}
fn number(v: &Value) -> u64 {
    v.as_u64().unwrap_or_default()
}

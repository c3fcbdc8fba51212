//! Judges what lies on a disk: whole versions and nothing else, nothing damaged where finished things lie, and nothing
//! lost that somebody was told.

use crate::bench::{Bench, Digests, Facts};
use crate::disk::{Blob, Image};
use base64::Engine as _;
use ed25519_dalek::{Signature, VerifyingKey};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use tillcast_tests::{Product, forge};

/// The one store of a proof.
pub const STORE: &str = "0421";
/// Its register.
pub const REGISTER: &str = "0421-01";

/// What headquarters ever said, by what the harness knows.
#[derive(Debug, Default)]
pub struct World {
    /// The key that signs trust files.
    pub root: Option<VerifyingKey>,
    /// The keys that ever signed manifests.
    pub publishers: Vec<VerifyingKey>,
    /// Stream → the contents that it ever had in the source.
    pub contents: BTreeMap<String, Vec<Digests>>,
    /// What each version of an instance must hold, as a manifest promised and the source had it.
    pub versions: BTreeMap<(String, u64), Digests>,
    /// The hashes of packs by name, as manifests list them.
    pub packs: BTreeMap<String, String>,
    /// The packs that the newest manifest lists.
    pub listed: BTreeSet<String>,
    /// The newest version of each instance.
    pub head: BTreeMap<String, u64>,
    /// An instance of the register's whose rows were changed by hand, and what they are now.
    pub drifted: Option<(String, Digests)>,
    /// Envelopes whose signature was looked at, with the key that it was held against.
    seals: Mutex<HashMap<Seal, Option<Arc<Value>>>>,
    /// Packs that were read through.
    whole: Mutex<HashMap<[u8; 32], bool>>,
}

/// The hash of an envelope, and a key.
type Seal = ([u8; 32], [u8; 32]);

/// What a signed manifest says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Its number.
    pub serial: u64,
    /// Packs by name with their hashes.
    pub packs: BTreeMap<String, String>,
    /// Versions and digests by instance.
    pub streams: BTreeMap<String, (u64, Digests)>,
    /// The registers' ids.
    pub registers: BTreeSet<String>,
}

/// What somebody was told, so that it must be there whatever happens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owed {
    /// Replicas: at least these versions.
    pub versions: BTreeMap<String, BTreeMap<String, u64>>,
    /// Devices: at least this serial; enrolled if it is listed.
    pub serials: BTreeMap<String, u64>,
    /// Devices: no sequence number is used twice.
    pub seqs: BTreeMap<String, u64>,
    /// Packs that the shadow proved.
    pub proofs: BTreeSet<String>,
    /// Files that must be there, with these bytes.
    pub files: BTreeMap<String, [u8; 32]>,
    /// The ledger: at least this serial, this envelope if it is the same.
    pub ledger: Option<(u64, String)>,
    /// The ledger: mails that were written.
    pub mails: u32,
    /// The ledger: the least number of the relay's last heartbeat.
    pub hq_beats: u64,
    /// The ledger: devices whose codes were given out.
    pub devices: BTreeSet<String>,
    /// The relay: heartbeats it took, by register.
    pub beats: BTreeMap<String, u64>,
    /// Databases that could not be read any more and were set aside: they are made anew from what is served.
    pub set_aside: BTreeSet<String>,
    /// The bucket promises what the source has.
    pub published: bool,
    /// Other places that have the bucket's list: a mirror, a stick that is to be carried.
    pub even: BTreeSet<&'static str>,
    /// The key that signed before is trusted no more.
    pub rotated: bool,
    /// One key is trusted: no run has died since in a rotation of its own.
    pub is_sole: bool,
    /// Rows changed by hand are mended.
    pub healed: bool,
    /// How often something was told.
    pub told: usize,
}

/// `price` of `price@zone-east`.
pub fn stream_of(instance: &str) -> &str {
    instance.split('@').next().unwrap_or_default()
}

const LEDGER: &str = "hq/state/fleet.db";
const BUCKET: &str = "objects/";
/// The bucket's mirror.
pub const MIRROR: &str = "mirror/";
/// A stick.
pub const STICK: &str = "stick/";
/// Where objects lie.
const PLACES: [&str; 3] = [BUCKET, MIRROR, STICK];
const RELAY: &str = "relay-0421/data/";
const AGENT: &str = "register-0421-01/data/";

fn manifest_in(place: &str) -> String {
    format!("{place}stores/{STORE}/manifest.json")
}
/// The manifest in the bucket.
pub fn bucket_manifest() -> String {
    manifest_in(BUCKET)
}
/// The relay's databases: shadow, device, spool.
pub fn relay_db(name: &str) -> String {
    format!("{RELAY}{name}.db")
}
/// The register's databases.
pub fn agent_db(name: &str) -> String {
    format!("{AGENT}{name}.db")
}

type Verdict = Result<(), String>;

impl World {
    /// What an envelope says, if one of the keys has signed it.
    fn open(&self, blob: &Blob, keys: &[VerifyingKey]) -> Option<Arc<Value>> {
        let mut seals = self.seals.lock().unwrap();
        keys.iter().find_map(|key| {
            let known = seals.entry((blob.sha256(), key.to_bytes()));
            known.or_insert_with(|| open(&blob.bytes, key).map(Arc::new)).clone()
        })
    }

    /// What a manifest says, if one of the keys has signed it.
    fn manifest(&self, blob: &Blob, keys: &[VerifyingKey]) -> Option<Manifest> {
        Manifest::of(&*self.open(blob, keys)?)
    }

    /// The keys that the newest trust file of a bucket names.
    fn trusted(&self, image: &Image, bucket: &str) -> Result<Vec<VerifyingKey>, String> {
        let path = format!("{bucket}trust.json");
        let Some(blob) = image.get(&path) else { return Ok(Vec::new()) };
        let trust = self.open(blob, self.root.as_slice()).ok_or_else(|| format!("{path} is damaged"))?;
        Ok(publishers(&trust))
    }

    /// Takes in the keys of all trust files.
    pub fn meet(&mut self, envelopes: &[Vec<u8>]) {
        for envelope in envelopes {
            let trust = self.root.and_then(|root| open(envelope, &root)).expect("a trust file is signed");
            self.publishers.extend(publishers(&trust));
        }
    }
}

/// What an envelope says, if the key has signed it.
fn open(envelope: &[u8], key: &VerifyingKey) -> Option<Value> {
    let outer: Value = serde_json::from_slice(envelope).ok()?;
    let decode = |v: &Value| base64::engine::general_purpose::STANDARD.decode(v.as_str()?).ok();
    let (kind, payload) = (outer["payloadType"].as_str()?, decode(&outer["payload"])?);
    let mut message = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    message.extend(&payload);
    let signature = Signature::from_slice(&decode(&outer["signatures"][0]["sig"])?).ok()?;
    key.verify_strict(&message, &signature).ok()?;
    serde_json::from_slice(&payload).ok()
}

fn publishers(trust: &Value) -> Vec<VerifyingKey> {
    let key = |p: &Value| {
        let bytes = hex::decode(p["key"].as_str()?).ok()?.try_into().ok()?;
        VerifyingKey::from_bytes(&bytes).ok()
    };
    trust["publishers"].as_array().into_iter().flatten().filter_map(key).collect()
}

impl Manifest {
    fn of(body: &Value) -> Option<Manifest> {
        let mut manifest = Manifest { serial: body["serial"].as_u64()?, ..Manifest::default() };
        for (stream, entry) in body["streams"].as_object()? {
            let instance = format!("{stream}@{}", entry["audience"].as_str()?);
            for pack in entry["packs"].as_array()? {
                manifest.packs.insert(pack_name(&instance, pack)?, pack["sha256"].as_str()?.to_owned());
            }
            let digests = serde_json::from_value(entry["digests"].clone()).ok()?;
            manifest.streams.insert(instance, (entry["version"].as_u64()?, digests));
        }
        manifest.registers = body["registers"].as_object()?.keys().cloned().collect();
        Some(manifest)
    }
}

impl World {
    /// Learns what a manifest in the bucket promises; it must be what the source has now.
    #[track_caller]
    pub fn learn(&mut self, envelope: &[u8], now: &Digests) {
        let blob = Blob::new(envelope.to_vec());
        let manifest = self.manifest(&blob, &self.publishers).expect("headquarters' manifest is signed");
        for (instance, (version, digests)) in manifest.streams {
            assert!(
                digests.iter().all(|(t, d)| now.get(t) == Some(d)),
                "{instance} {version} is not what the source has"
            );
            self.contents.entry(stream_of(&instance).to_owned()).or_default().push(digests.clone());
            self.versions.insert((instance.clone(), version), digests);
            self.head.insert(instance, version);
        }
        self.listed = manifest.packs.keys().cloned().collect();
        self.packs.extend(manifest.packs);
    }

    /// Judges a state.
    pub fn check(&self, image: &Image, owed: &Owed, bench: &mut Bench) -> Verdict {
        for (path, hash) in &owed.files {
            if image.get(path).map(|b| b.sha256()) != Some(*hash) {
                return Err(format!("{path} was there whole, and is not any more"));
            }
        }
        self.check_replicas(image, owed, bench)?;
        self.check_places(image, owed)?;
        self.check_hq(image, owed, bench)?;
        self.check_relay(image, owed, bench)?;
        check_devices(image, owed, bench)
    }

    /// Every replica is sound and holds whole versions, none lower than was told.
    fn check_replicas(&self, image: &Image, owed: &Owed, bench: &mut Bench) -> Verdict {
        let is_replica = |p: &String| {
            p.starts_with("hq/state/replicas/") && p.ends_with(".db")
                || *p == relay_db("shadow")
                || *p == agent_db("store")
        };
        let there: BTreeSet<&String> = image.keys().filter(|p| is_replica(p)).chain(owed.versions.keys()).collect();
        for path in there {
            let facts = bench.read(image, path)?;
            for stream in facts.iter().flat_map(|f| &f.streams) {
                self.check_stream(path, stream, owed)?;
            }
            let owed_here = owed.versions.get(path).filter(|_| !owed.set_aside.contains(path));
            for (instance, least) in owed_here.into_iter().flatten() {
                let held = facts.iter().flat_map(|f| &f.streams).find(|s| s.instance == *instance).map(|s| s.version);
                if held.is_none_or(|v| v < *least) {
                    return Err(format!("{path}: {instance} was at {least}, and is at {held:?}"));
                }
            }
        }
        Ok(())
    }

    fn check_stream(&self, path: &str, s: &crate::bench::Stream, owed: &Owed) -> Verdict {
        let known = self.versions.get(&(s.instance.clone(), s.version));
        let by_hand = self.drifted.as_ref().is_some_and(|(i, d)| *i == s.instance && *d == s.digests);
        let drifted = by_hand && path == agent_db("store") && !owed.healed;
        let whole = drifted
            || match known {
                Some(digests) => *digests == s.digests,
                None => self.contents.get(stream_of(&s.instance)).is_some_and(|all| all.contains(&s.digests)),
            };
        if whole {
            Ok(())
        } else {
            Err(format!("{path}: the rows of {} are not those of version {}", s.instance, s.version))
        }
    }

    /// The buckets, and the stick that is carried: each trust file up to the newest is there, the newest trusts who
    /// signed the manifest, and that lists only packs that are there whole.
    fn check_places(&self, image: &Image, owed: &Owed) -> Verdict {
        for place in owed.even.iter().copied() {
            let [theirs, ours] = [place, BUCKET].map(|place| image.get(&manifest_in(place)));
            if ours.is_none() || theirs.map(|b| b.sha256()) != ours.map(|b| b.sha256()) {
                return Err(format!("it ended well, and the list in {place} is not the bucket's"));
            }
        }
        for place in PLACES {
            self.check_chain(image, place)?;
            for (path, blob) in image.range(format!("{place}packs/")..).take_while(|(p, _)| p.starts_with(place)) {
                if path.ends_with(".pack") && !self.is_whole(blob) {
                    return Err(format!("{path} is damaged"));
                }
            }
            let path = manifest_in(place);
            let Some(blob) = image.get(&path) else { continue };
            let trusted = self.trusted(image, place)?;
            let manifest =
                self.manifest(blob, &trusted).ok_or_else(|| format!("{path} is damaged, or nobody trusts its key"))?;
            manifest.packs.iter().try_for_each(|(name, hash)| listed(image, place, name, hash))?;
        }
        Ok(())
    }

    /// A device that missed some trust files asks for each: all that lead to the one that is said to be the newest are
    /// there, as they were signed.
    fn check_chain(&self, image: &Image, place: &str) -> Verdict {
        let Some(newest) = image.get(&format!("{place}trust.json")) else { return Ok(()) };
        let newest = self.open(newest, self.root.as_slice()).ok_or_else(|| format!("{place}trust.json is damaged"))?;
        for version in 1..=newest["version"].as_u64().unwrap_or_default() {
            let path = format!("{place}trust/{version:010}.json");
            let blob = image.get(&path).ok_or_else(|| format!("{path} is not there, and devices ask for it"))?;
            if self.open(blob, self.root.as_slice()).is_none_or(|trust| trust["version"] != version) {
                return Err(format!("{path} is damaged, or another one"));
            }
        }
        Ok(())
    }

    /// Headquarters: the ledger knows at least as much as the bucket.
    fn check_hq(&self, image: &Image, owed: &Owed, bench: &mut Bench) -> Verdict {
        let ledger = bench.read(image, LEDGER)?;
        if let Some(blob) = image.get(&bucket_manifest()) {
            let trusted = self.trusted(image, BUCKET)?;
            let manifest = self.manifest(blob, &trusted).ok_or("the bucket's manifest is damaged")?;
            if owed.rotated && (trusted.is_empty() || trusted.contains(&self.publishers[0])) {
                return Err("the rotation ended well, and the old key is trusted".into());
            }
            if owed.is_sole && trusted.len() != 1 {
                return Err(format!("the rotation ended well, and {} keys are trusted", trusted.len()));
            }
            let known = ledger.as_ref().and_then(|l| l.stores.get(STORE));
            let same = known.is_some_and(|(_, envelope)| envelope.as_bytes() == blob.bytes);
            if known.is_none_or(|(serial, _)| *serial < manifest.serial || *serial == manifest.serial && !same) {
                return Err(format!("serial {} lies in the bucket, and the ledger never signed it", manifest.serial));
            }
            if owed.published {
                let source = manifest.streams.iter().all(|(i, (_, d))| self.contents[stream_of(i)].last() == Some(d));
                let full = manifest.streams.len() == self.contents.len();
                if !source || !full {
                    return Err("publish ended well, and the bucket does not promise what the source has".into());
                }
            }
        } else if owed.published {
            return Err("publish ended well, and there is no manifest".into());
        }
        let Some(ledger) = ledger else {
            let nothing = owed.ledger.is_none() && owed.devices.is_empty() && owed.mails == 0 && owed.hq_beats == 0;
            return if nothing { Ok(()) } else { Err("the ledger is gone".into()) };
        };
        for (instance, version, state, packs) in &ledger.publications {
            for pack in packs.as_array().into_iter().flatten().filter(|_| state != "reserved" && state != "abandoned") {
                let name = pack_name(instance, pack)
                    .ok_or_else(|| format!("{instance} {version}: a strange list of packs"))?;
                listed(image, BUCKET, &name, pack["sha256"].as_str().unwrap_or_default())?;
            }
        }
        if let Some((serial, envelope)) = &owed.ledger {
            let known = ledger.stores.get(STORE).ok_or("the ledger forgot its store")?;
            if known.0 < *serial || known.0 == *serial && known.1 != *envelope {
                return Err(format!("serial {serial} was out, and the ledger signs it again"));
            }
        }
        if ledger.mails < owed.mails {
            return Err(format!("{} mails were written, and {} are there", owed.mails, ledger.mails));
        }
        let kept = ledger.beats.get(STORE).copied().unwrap_or(0);
        if kept < owed.hq_beats {
            return Err(format!("heartbeat {} of {STORE} was taken, and the ledger is at {kept}", owed.hq_beats));
        }
        match owed.devices.iter().find(|d| !ledger.devices.contains(*d)) {
            Some(device) => Err(format!("{device} was given a code, and the ledger does not know it")),
            None => Ok(()),
        }
    }

    /// Whether a pack can be read to its trailer.
    fn is_whole(&self, blob: &Blob) -> bool {
        let mut known = self.whole.lock().unwrap();
        *known.entry(blob.sha256()).or_insert_with(|| {
            let lines = std::panic::catch_unwind(|| forge::unpack(&blob.bytes));
            lines.is_ok_and(|l| l.last().is_some_and(|l| l.starts_with("{\"rows\"")))
        })
    }

    /// The relay's directories: nothing damaged in `ready/` and `ok/`, and proofs for what is served.
    fn check_relay(&self, image: &Image, owed: &Owed, bench: &mut Bench) -> Verdict {
        let aside = |name: &str| owed.set_aside.contains(&relay_db(name));
        let shadow = bench.read(image, &relay_db("shadow"))?.unwrap_or_default();
        let device = bench.read(image, &relay_db("device"))?.unwrap_or_default();
        for (path, blob) in image.range(RELAY.to_owned()..).take_while(|(p, _)| p.starts_with(RELAY)) {
            let inner = &path[RELAY.len()..];
            let Some((room, name)) = inner.split_once('/') else { continue };
            let is_aside = name.rsplit('/').next().is_some_and(|n| n.starts_with(".tmp-"));
            if is_aside || !matches!(room, "ok" | "ready") {
                continue;
            }
            if let Some(pack) = name.strip_prefix("packs/") {
                if self.packs.get(pack) != Some(&blob.hex()) {
                    return Err(format!("{path} is damaged"));
                }
                if room == "ok" && !aside("shadow") && !shadow.proofs.contains(&(pack.to_owned(), blob.hex())) {
                    return Err(format!("{path} is served, and the shadow has no proof of it"));
                }
            } else if name.starts_with("stores/") {
                let manifest = self.manifest(blob, &self.publishers).ok_or_else(|| format!("{path} is damaged"))?;
                if manifest.serial > device.serial() {
                    return Err(format!("{path} is served, and was never accepted"));
                }
            } else {
                // `trust.json` or `trust/N.json`; which numbers there are is for the next start to put in order.
                let trust = self.open(blob, self.root.as_slice());
                let n = name.strip_prefix("trust/").and_then(|n| n.strip_suffix(".json")?.parse::<u64>().ok());
                if trust.is_none_or(|trust| n.is_some_and(|n| trust["version"] != n)) {
                    return Err(format!("{path} is damaged"));
                }
            }
        }
        if let Some(pack) =
            owed.proofs.iter().find(|p| !aside("shadow") && !shadow.proofs.iter().any(|(name, _)| name == *p))
        {
            return Err(format!("{pack} was served, and the shadow has no proof of it"));
        }
        let spool = bench.read(image, &relay_db("relay"))?.unwrap_or_default();
        match owed.beats.iter().find(|(r, seq)| !aside("relay") && spool.beats.get(*r).is_none_or(|kept| kept < seq)) {
            Some((register, seq)) => Err(format!("heartbeat {seq} of {register} was taken, and is lost")),
            None => Ok(()),
        }
    }
}

/// A listed pack is there whole.
fn listed(image: &Image, place: &str, name: &str, hash: &str) -> Verdict {
    let path = format!("{place}packs/{name}");
    match image.get(&path) {
        None => Err(format!("{path} is listed, and is not there")),
        Some(blob) if blob.hex() != hash => Err(format!("{path} is listed, and is damaged")),
        Some(_) => Ok(()),
    }
}

/// Devices: enrolled once is enrolled, and neither serial nor sequence number goes back.
fn check_devices(image: &Image, owed: &Owed, bench: &mut Bench) -> Verdict {
    for path in [relay_db("device"), agent_db("device"), relay_db("relay")] {
        bench.read(image, &path)?;
    }
    for (path, serial) in &owed.serials {
        let device = bench.read(image, path)?.unwrap_or_default();
        if !["id", "seed", "roots", "trust"].iter().all(|f| device.facts.contains_key(*f)) {
            return Err(format!("{path}: the enrolment is lost"));
        }
        if device.serial() < *serial {
            return Err(format!("{path}: serial {serial} was accepted and shown, {} is known", device.serial()));
        }
    }
    for (path, seq) in &owed.seqs {
        let known = bench.read(image, path)?.and_then(|d| d.facts.get("seq")?.parse::<u64>().ok()).unwrap_or(0);
        if known < *seq {
            return Err(format!("{path}: heartbeat {seq} was sent, the next one would be {}", known + 1));
        }
    }
    Ok(())
}

fn pack_name(instance: &str, entry: &Value) -> Option<String> {
    Some(format!("{instance}/{:010}.{}.pack", entry["version"].as_u64()?, entry["kind"].as_str()?))
}

impl Owed {
    /// What a disk owes that was at rest.
    #[track_caller]
    pub fn of(world: &World, image: &Image, bench: &mut Bench) -> Owed {
        let mut owed = Owed::default();
        let mut held = |path: &str| bench.read(image, path).expect("it was sound before");
        for path in [relay_db("shadow"), agent_db("store")] {
            let facts = held(&path).unwrap_or_default();
            owed.keep(&path, &facts);
            // What is listed no more may go to make room.
            let listed = facts.proofs.iter().filter(|(name, _)| world.listed.contains(name));
            owed.proofs.extend(listed.map(|(name, _)| name.clone()));
        }
        for path in [relay_db("device"), agent_db("device")] {
            if let Some(device) = held(&path).filter(|d| d.facts.contains_key("id")) {
                owed.serials.insert(path.clone(), device.serial());
                owed.seqs.extend(device.facts.get("seq").map(|s| (path, s.parse().unwrap())));
            }
        }
        if let Some(ledger) = held(LEDGER) {
            owed.devices.clone_from(&ledger.devices);
            owed.hq_beats = ledger.beats.get(STORE).copied().unwrap_or(0);
            owed.mails = ledger.mails;
        }
        owed.beats.clone_from(&held(&relay_db("relay")).unwrap_or_default().beats);
        if let Some(blob) = image.get(&bucket_manifest()) {
            owed.shown(world, &bucket_manifest(), blob);
        }
        // Packs in error/ and the like may go; what is served or was put may not.
        owed.told = 0;
        owed
    }

    fn keep(&mut self, path: &str, facts: &Facts) {
        let versions = facts.streams.iter().map(|s| (s.instance.clone(), s.version)).collect();
        self.versions.insert(path.to_owned(), versions);
    }

    /// A file got its final name, where others may see it.
    pub fn shown(&mut self, world: &World, path: &str, blob: &Blob) {
        if path == bucket_manifest() {
            let manifest = world.manifest(blob, &world.publishers).expect("what is put is signed");
            self.ledger = Some((manifest.serial, String::from_utf8_lossy(&blob.bytes).into_owned()));
            // Whoever has read it comes for the packs.
            let packs = manifest.packs.iter().map(|(name, hash)| (format!("{BUCKET}packs/{name}"), hash));
            let hash = |h: &String| hex::decode(h).unwrap().try_into().unwrap();
            self.files.extend(packs.map(|(name, h)| (name, hash(h))));
        } else if let Some(pack) = path.strip_prefix(&format!("{RELAY}ok/packs/")) {
            self.proofs.insert(pack.to_owned());
        } else if path == format!("{RELAY}ok/stores/{STORE}/manifest.json") {
            let serial = world.manifest(blob, &world.publishers).expect("what is served is signed").serial;
            self.serials.insert(relay_db("device"), serial);
        } else if path.starts_with("stick/receipts/") && path.ends_with(".json") {
            let versions = &forge::payload(&blob.bytes)["versions"];
            self.at_least(
                &relay_db("shadow"),
                versions.as_object().unwrap().iter().map(|(i, v)| (i.clone(), v.as_u64())),
            );
        } else {
            return;
        }
        self.told += 1;
    }

    /// Bytes went to somebody over the network.
    pub fn said(&mut self, bytes: &[u8], who: Product) {
        let text = String::from_utf8_lossy(bytes);
        if who == Product::Agent {
            let Some(at) = text.find("\"payload\":\"") else { return };
            let payload = text[at + 11..].split('"').next().unwrap_or_default();
            let payload = base64::engine::general_purpose::STANDARD.decode(payload).unwrap();
            let beat: Value = serde_json::from_slice(&payload).unwrap();
            self.seqs.insert(agent_db("device"), beat["seq"].as_u64().unwrap());
            let streams = beat["streams"].as_object().unwrap();
            self.at_least(&agent_db("store"), streams.iter().map(|(i, s)| (i.clone(), s["version"].as_u64())));
        } else if let Some((head, body)) = text.split_once("\r\n\r\n").filter(|(h, _)| h.starts_with("HTTP/1.1 200")) {
            let Ok(Value::Object(body)) = serde_json::from_str(body) else { return };
            if body.contains_key("hq_seen_s") && who == Product::Hq {
                self.hq_beats += 1;
            } else if body.contains_key("hq_seen_s") {
                *self.beats.entry(REGISTER.into()).or_default() += 1;
            } else if body.keys().any(|k| k.contains('@')) && !head.contains("envelope") {
                self.at_least(&relay_db("shadow"), body.iter().map(|(i, v)| (i.clone(), v.as_u64())));
            } else {
                return;
            }
        } else {
            return;
        }
        self.told += 1;
    }

    /// Versions that were told: they may not go down.
    pub fn at_least(&mut self, path: &str, versions: impl Iterator<Item = (String, Option<u64>)>) {
        let known = self.versions.entry(path.to_owned()).or_default();
        for (instance, version) in versions.filter_map(|(i, v)| Some((i, v?))) {
            let least = known.entry(instance).or_default();
            *least = (*least).max(version);
        }
    }

    /// A command that brings this replica to the head ended well.
    pub fn at_head(&mut self, world: &World, path: &str) {
        self.at_least(path, world.head.iter().map(|(i, v)| (i.clone(), Some(*v))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use serde_json::json;

    fn keys() -> [SigningKey; 2] {
        [1, 2].map(forge::strange_key)
    }

    fn world() -> World {
        let [root, publisher] = keys().map(|key| key.verifying_key());
        World { root: Some(root), publishers: vec![publisher], ..World::default() }
    }

    fn sealed(kind: &str, body: &Value, key: &SigningKey) -> Arc<Blob> {
        Blob::new(forge::seal(kind, &serde_json::to_vec(body).unwrap(), &[key]))
    }

    fn trust(version: u64) -> Arc<Blob> {
        let [root, publisher] = keys();
        sealed("trust", &json!({"version": version, "publishers": [{"key": forge::public(&publisher)}]}), &root)
    }

    /// A list of this serial, with the trust files that lead to its key.
    fn fill(image: &mut Image, place: &str, serial: u64) {
        let manifest = json!({"serial": serial, "streams": {}, "registers": {}});
        image.insert(manifest_in(place), sealed("manifest", &manifest, &keys()[1]));
        image.insert(format!("{place}trust.json"), trust(3));
        image.extend((1..=3).map(|n| (format!("{place}trust/{n:010}.json"), trust(n))));
    }

    #[track_caller]
    fn found(world: &World, image: &Image, owed: &Owed, words: &str) {
        let why = world.check_places(image, owed).unwrap_err();
        assert!(why.contains(words), "{why}");
    }

    #[test]
    fn an_older_list_where_a_command_that_ended_well_put_one_is_found() {
        let (world, mut image, mut owed) = (world(), Image::new(), Owed::default());
        fill(&mut image, BUCKET, 7);
        fill(&mut image, STICK, 6);
        assert_eq!(world.check_places(&image, &owed), Ok(()), "before the command has ended it may lie there");
        owed.even.insert(STICK);
        found(&world, &image, &owed, "the list in stick/ is not the bucket's");
        fill(&mut image, STICK, 7);
        assert_eq!(world.check_places(&image, &owed), Ok(()));
        owed.even.insert(MIRROR);
        found(&world, &image, &owed, "the list in mirror/ is not the bucket's");
    }

    #[test]
    fn a_trust_file_that_is_gone_or_another_one_is_found() {
        let (world, owed) = (world(), Owed::default());
        for place in PLACES {
            let mut good = Image::new();
            fill(&mut good, place, 7);
            assert_eq!(world.check_places(&good, &owed), Ok(()));
            for n in 1..=3 {
                let path = format!("{place}trust/{n:010}.json");
                let with = |blob: Arc<Blob>| good.clone().into_iter().chain([(path.clone(), blob)]).collect::<Image>();
                let mut gone = good.clone();
                gone.remove(&path);
                found(&world, &gone, &owed, "is not there");
                found(&world, &with(Blob::new(Vec::new())), &owed, "is damaged");
                found(&world, &with(trust(n + 1)), &owed, "or another one");
            }
        }
    }

    #[test]
    fn a_damaged_trust_file_that_a_relay_serves_is_found() {
        let (world, owed, mut bench) = (world(), Owed::default(), Bench::default());
        let mut image = Image::from([(format!("{RELAY}ok/trust.json"), trust(2))]);
        for (blob, right) in [(trust(2), true), (trust(1), false), (Blob::new(b"{}".to_vec()), false)] {
            image.insert(format!("{RELAY}ok/trust/0000000002.json"), blob);
            assert_eq!(world.check_relay(&image, &owed, &mut bench).is_ok(), right);
        }
    }
}

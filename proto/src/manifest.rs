//! The manifest: what HQ claims to one store. It is signed, small and whole; it names every pack
//! with its length and hash, so that whatever carries the packs need not be trusted.
//!
//! A reader that cannot take one stream's entry keeps what it holds of that stream and goes on with the others; who signs
//! is refused by the same entry.

use crate::clock::Timestamp;
use crate::digest::{Sha256, StateDigest};
use crate::ids::{Audience, DeviceId, Instance, RegisterId, StoreId, StreamName, TableName, Version};
use crate::keys::PublicKey;
use crate::layout::{PackKind, PackName};
use crate::limits::Limits;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, BTreeSet};

/// The manifest format that this build reads and writes.
pub const FORMAT: u32 = 1;

/// The signed list, one a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Whose manifest this is.
    pub store: StoreId,
    /// Rises with every manifest of the store within an epoch.
    pub serial: u64,
    /// The trust epoch that serial and versions are counted in.
    pub epoch: u64,
    /// When it was signed, UTC.
    pub created_at: Timestamp,
    /// After this a new reader refuses it, UTC.
    pub expires_at: Timestamp,
    /// The streams that the store follows.
    pub streams: BTreeMap<StreamName, StreamEntry>,
    /// The relay's public key, once enrolled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<PublicKey>,
    /// The public keys of the store's registers.
    #[serde(default)]
    pub registers: BTreeMap<RegisterId, PublicKey>,
    /// The streams whose entries this reader cannot take, and why; what it holds of them stays. Of what is signed no part.
    #[serde(skip)]
    pub unread: BTreeMap<StreamName, String>,
}

/// One stream in a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEntry {
    /// Which instance the store follows.
    pub audience: Audience,
    /// The newest version.
    pub version: Version,
    /// The contract's number at that version.
    pub schema: u64,
    /// The state digest of each table at that version.
    pub digests: BTreeMap<TableName, StateDigest>,
    /// The packs that lead there, by version; at the same version the full stands first.
    pub packs: Vec<PackEntry>,
    /// Other streams of this list, each with the version that a register must hold before it takes anything of this one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requires: BTreeMap<StreamName, Version>,
}

/// One pack in a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackEntry {
    /// The version that the pack leads to.
    pub version: Version,
    /// Full or delta.
    pub kind: PackKind,
    /// The version that a delta starts from; none in a full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Version>,
    /// Length of the file.
    pub bytes: u64,
    /// Length of its unpacked content.
    pub unpacked: u64,
    /// Hash of the file.
    pub sha256: Sha256,
}

impl PackEntry {
    /// The pack's name within an instance.
    pub fn name(&self, instance: &Instance) -> PackName {
        PackName { instance: instance.clone(), version: self.version, kind: self.kind }
    }
}

/// A manifest whose content breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not the JSON of a manifest.
    #[error("not a manifest: {0}")]
    NotAManifest(String),
    /// A format from the future.
    #[error("the manifest has format {0}; this build reads format {FORMAT}: update this program")]
    UnknownFormat(u32),
    /// An epoch before the first.
    #[error("epoch 0: epochs begin at 1")]
    NoEpoch,
    /// A rule of one stream is broken.
    #[error("stream {stream}: {reason}")]
    Stream {
        /// The stream.
        stream: StreamName,
        /// The rule.
        reason: String,
    },
    /// A register of another store.
    #[error("register {0} is not of store {1}")]
    ForeignRegister(RegisterId, StoreId),
}

/// The tables that each stream of a manifest has at its head; none: its entry cannot be read here, and any table may be its.
pub type Listed = BTreeMap<StreamName, Option<BTreeSet<TableName>>>;

impl Manifest {
    /// The tables of its streams.
    pub fn tables(&self) -> Listed {
        let tables = |e: &StreamEntry| Some(e.digests.keys().cloned().collect());
        let read = self.streams.iter().map(|(stream, e)| (stream.clone(), tables(e)));
        read.chain(self.unread.keys().map(|stream| (stream.clone(), None))).collect()
    }

    /// Whether a stream is listed, be it that its entry cannot be read here.
    pub fn lists_stream(&self, stream: &StreamName) -> bool {
        self.streams.contains_key(stream) || self.unread.contains_key(stream)
    }

    /// The instance of a stream that the store follows.
    pub fn instance(&self, stream: &StreamName) -> Option<Instance> {
        let entry = self.streams.get(stream)?;
        Some(Instance { stream: stream.clone(), audience: entry.audience.clone() })
    }

    /// All instances with their entries.
    pub fn instances(&self) -> impl Iterator<Item = (Instance, &StreamEntry)> {
        self.streams.iter().map(|(stream, e)| (Instance { stream: stream.clone(), audience: e.audience.clone() }, e))
    }

    /// The streams that a stream requires at versions which are not held, with those versions. One whose entry cannot be read
    /// here, or that is not listed at all, is not held.
    pub fn lacking(
        &self,
        stream: &StreamName,
        held: impl Fn(&Instance) -> Option<Version>,
    ) -> BTreeMap<&StreamName, Version> {
        let requires = self.streams.get(stream).into_iter().flat_map(|e| &e.requires);
        let is_there = |of: &StreamName, v: Version| self.instance(of).and_then(|i| held(&i)).is_some_and(|h| h >= v);
        requires.filter(|(of, v)| !is_there(of, **v)).map(|(of, v)| (of, *v)).collect()
    }

    /// Whether it names a pack; of a stream whose entry cannot be read here any may be.
    pub fn lists(&self, pack: &PackName) -> bool {
        let entry = self.streams.get(&pack.instance.stream).filter(|e| e.audience == pack.instance.audience);
        self.unread.contains_key(&pack.instance.stream)
            || entry.is_some_and(|e| e.pack(pack.version, pack.kind).is_some())
    }

    /// The key that headquarters knows a device of the store by.
    pub fn key_of(&self, device: &DeviceId) -> Option<&PublicKey> {
        match device {
            DeviceId::Relay(store) => self.relay.as_ref().filter(|_| store == &self.store),
            DeviceId::Register(register) => self.registers.get(register),
        }
    }

    /// Why headquarters does not hear a device with this key: the manifest that it holds lists another, or none. Also
    /// what to do, for people.
    pub fn disowns(&self, device: &DeviceId, key: &PublicKey) -> Option<String> {
        let why = match self.key_of(device) {
            Some(listed) if listed == key => return None,
            Some(_) => "lists another key than this device's: it was enrolled elsewhere since",
            None => "does not list this device: it was revoked, or not enrolled at headquarters",
        };
        Some(format!(
            "manifest {} {why}. Headquarters refuses its heartbeats: enroll this device anew (if that was done just now: \
             the next manifest will list it)",
            self.serial
        ))
    }

    /// Reads and checks a payload that a signature has been verified on, as headquarters does: each entry must be good.
    pub fn from_payload(payload: &[u8], limits: &Limits) -> Result<Manifest, ManifestError> {
        let mut manifest = Manifest::for_reader(payload, limits)?;
        match manifest.unread.pop_first() {
            Some((stream, reason)) => Err(ManifestError::Stream { stream, reason }),
            None => Ok(manifest),
        }
    }

    /// The same as relays and registers do: entries that are not good here are left unread, and refuse no other.
    pub fn for_reader(payload: &[u8], limits: &Limits) -> Result<Manifest, ManifestError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        #[derive(Deserialize)]
        struct Whole<'p> {
            store: StoreId,
            serial: u64,
            epoch: u64,
            created_at: Timestamp,
            expires_at: Timestamp,
            #[serde(borrow)]
            streams: BTreeMap<StreamName, &'p RawValue>,
            #[serde(default)]
            relay: Option<PublicKey>,
            #[serde(default)]
            registers: BTreeMap<RegisterId, PublicKey>,
        }
        let not = |e: serde_json::Error| ManifestError::NotAManifest(e.to_string());
        // The format is read first: a newer manifest may have another shape altogether.
        let Format { format } = serde_json::from_slice(payload).map_err(not)?;
        if format != FORMAT {
            return Err(ManifestError::UnknownFormat(format));
        }
        let Whole { store, serial, epoch, created_at, expires_at, streams: entries, relay, registers } =
            serde_json::from_slice(payload).map_err(not)?;
        if epoch == 0 {
            return Err(ManifestError::NoEpoch);
        }
        if let Some(r) = registers.keys().find(|r| r.store() != &store) {
            return Err(ManifestError::ForeignRegister(r.clone(), store));
        }
        let (mut streams, mut unread) = (BTreeMap::new(), BTreeMap::new());
        for (stream, entry) in entries {
            match StreamEntry::read(entry, limits) {
                Ok(entry) => drop(streams.insert(stream, entry)),
                Err(reason) => drop(unread.insert(stream, reason)),
            }
        }
        Ok(Manifest { format, store, serial, epoch, created_at, expires_at, streams, relay, registers, unread })
    }

    /// The bytes to sign.
    pub fn to_payload(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }
}

impl StreamEntry {
    /// The entry of a pack.
    pub fn pack(&self, version: Version, kind: PackKind) -> Option<&PackEntry> {
        self.packs.iter().find(|p| p.version == version && p.kind == kind)
    }

    fn read(entry: &RawValue, limits: &Limits) -> Result<StreamEntry, String> {
        let entry: StreamEntry = serde_json::from_str(entry.get()).map_err(|e| e.to_string())?;
        entry.check(limits).map(|()| entry)
    }

    fn check(&self, limits: &Limits) -> Result<(), String> {
        let mut before: Option<(Version, PackKind)> = None;
        for p in &self.packs {
            let what = format!("pack {} {}", p.version, p.kind);
            match (p.kind, p.base) {
                (PackKind::Full, None) => {}
                (PackKind::Delta, Some(base)) if base < p.version => {}
                _ => return Err(format!("{what}: a full has no base, a delta has a lower one")),
            }
            if p.version > self.version {
                return Err(format!("{what} is beyond the stream's version {}", self.version));
            }
            if before.is_some_and(|b| b >= (p.version, p.kind)) {
                return Err(format!("{what} is out of order or listed twice"));
            }
            before = Some((p.version, p.kind));
            if p.bytes > limits.pack_bytes {
                return Err(format!("{what} has {} bytes, over limits.pack_bytes = {}", p.bytes, limits.pack_bytes));
            }
            if !limits.unpacks_within(p.bytes, p.unpacked) {
                return Err(format!(
                    "{what} would unpack {} bytes from {}, over limits.unpacked_bytes = {} or limits.ratio = {}",
                    p.unpacked, p.bytes, limits.unpacked_bytes, limits.ratio
                ));
            }
        }
        if crate::chain::cheapest(&self.packs, None, self.version, |_| true).is_none() {
            return Err(format!("no chain of the listed packs leads to version {}", self.version));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn entry() -> Value {
        let packs = json!([{"version": 1, "kind": "full", "bytes": 9, "unpacked": 9, "sha256": "ab".repeat(32)}]);
        json!({"audience": "all", "version": 1, "schema": 1, "digests": {"t": "0".repeat(32)}, "packs": packs})
    }
    fn list(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut list = json!({
            "format": 1, "store": "0421", "serial": 1, "epoch": 1, "created_at": "2026-01-01T00:00:00Z",
            "expires_at": "2026-01-31T00:00:00Z", "streams": {"catalog": entry(), "price": entry()},
        });
        change(&mut list);
        serde_json::to_vec(&list).unwrap()
    }

    #[test]
    fn an_entry_that_cannot_be_taken_is_left_unread_and_signed_by_nobody() {
        let limits = Limits { pack_bytes: 65_536, ..Limits::default() };
        for (what, change, why) in [
            ("bytes", json!({"packs": [{"bytes": 151_154}]}), "has 151154 bytes, over limits.pack_bytes = 65536"),
            ("unpacked", json!({"packs": [{"unpacked": 1u64 << 40}]}), "over limits.unpacked_bytes"),
            ("kind", json!({"packs": [{"kind": "patch"}]}), "unknown variant `patch`"),
            ("audience", json!({"audience": "region-north"}), "audience"),
            ("a version of later", json!({"version": {"major": 1}}), "invalid type: map"),
            ("no packs", json!({"packs": []}), "no chain of the listed packs leads to version 1"),
        ] {
            let bytes = list(|m| {
                let catalog = &mut m["streams"]["catalog"];
                for (field, value) in change.as_object().unwrap() {
                    match value.as_array().and_then(|packs| packs.first()) {
                        Some(pack) => {
                            pack.as_object().unwrap().iter().for_each(|(k, v)| catalog[field][0][k] = v.clone());
                        }
                        None => catalog[field] = value.clone(),
                    }
                }
            });
            let read = Manifest::for_reader(&bytes, &limits).unwrap();
            assert_eq!(read.streams.keys().map(|s| s.as_str()).collect::<Vec<_>>(), ["price"], "{what}");
            let told = &read.unread["catalog"];
            assert!(told.contains(why), "{what}: {told}");
            let catalog = "catalog".parse().unwrap();
            assert!(!read.lists_stream(&"tax".parse().unwrap()));
            assert!(
                read.lists_stream(&catalog) && read.tables()[&catalog].is_none() && read.instance(&catalog).is_none()
            );
            let e = Manifest::from_payload(&bytes, &limits).unwrap_err();
            assert!(matches!(&e, ManifestError::Stream { stream, .. } if *stream == catalog), "{what}: {e}");
            assert!(!String::from_utf8(read.to_payload().unwrap()).unwrap().contains("unread"));
        }
        let at_the_limit = list(|m| m["streams"]["catalog"]["packs"][0]["bytes"] = json!(65_536));
        assert!(Manifest::from_payload(&at_the_limit, &limits).is_ok());
        let nothing = Manifest::for_reader(&list(|m| m["streams"]["catalog"] = Value::Null), &limits).unwrap();
        assert!(nothing.unread["catalog"].contains("null"));
    }

    #[test]
    fn what_is_about_the_whole_refuses_the_whole() {
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 8] = [
            ("format 2", |m| m["format"] = json!(2)),
            ("not a manifest", |m| m["store"] = json!("a store")),
            ("not a manifest", |m| m["serial"] = json!(-1)),
            ("epochs begin at 1", |m| m["epoch"] = json!(0)),
            ("not a manifest", |m| m["expires_at"] = json!("soon")),
            ("not a manifest", |m| m["relay"] = json!("a key")),
            ("is not of store 0421", |m| m["registers"] = json!({"0815-01": key()})),
            ("not a manifest", |m| m["streams"]["../price"] = entry()),
        ];
        for (why, change) in changes {
            let e = Manifest::for_reader(&list(change), &Limits::default()).unwrap_err().to_string();
            assert!(e.contains(why), "{why}: {e}");
        }
    }

    #[test]
    fn packs_are_listed_by_instance_version_and_kind() {
        let listed = Manifest::for_reader(&list(|_| {}), &Limits::default()).unwrap();
        for (pack, is_listed) in [
            ("price@all/0000000001.full.pack", true),
            ("price@all/0000000001.delta.pack", false),
            ("price@all/0000000002.full.pack", false),
            ("price@zone-east/0000000001.full.pack", false),
            ("promo@all/0000000001.full.pack", false),
        ] {
            assert_eq!(listed.lists(&pack.parse().unwrap()), is_listed, "{pack}");
        }
        let unread = list(|m| m["streams"]["price"]["audience"] = json!("region-north"));
        let unread = Manifest::for_reader(&unread, &Limits::default()).unwrap();
        assert!(unread.lists(&"price@zone-east/0000000009.delta.pack".parse().unwrap()), "any may be");
        assert!(!unread.lists(&"promo@all/0000000001.full.pack".parse().unwrap()));
    }

    #[test]
    fn a_device_is_known_by_its_own_key() {
        let key = |n| crate::keys::SecretKey::from_seed([n; 32]).public();
        let keys = |m: &mut Value| {
            m["relay"] = json!(key(1).to_string());
            m["registers"] = json!({"0421-01": key(2).to_string()});
        };
        let listed = Manifest::for_reader(&list(keys), &Limits::default()).unwrap();
        let plain = Manifest::for_reader(&list(|_| {}), &Limits::default()).unwrap();
        for (device, n) in
            [("0421", Some(1)), ("0421-01", Some(2)), ("0421-02", None), ("0815", None), ("0815-01", None)]
        {
            let device: DeviceId = device.parse().unwrap();
            assert_eq!(listed.key_of(&device), n.map(key).as_ref(), "{device}");
            assert_eq!(plain.key_of(&device), None, "{device}");
            let told = |n| listed.disowns(&device, &key(n)).unwrap_or_default();
            assert_eq!(n.map(told).unwrap_or_default(), "", "{device}");
            let why = if n.is_some() { "lists another key than this device's" } else { "does not list this device" };
            assert!(told(9).starts_with(&format!("manifest 1 {why}")), "{device}: {}", told(9));
        }
    }

    #[test]
    fn what_a_stream_requires_and_is_not_held_is_lacking() {
        let listed = |change: fn(&mut Value)| Manifest::for_reader(&list(change), &Limits::default()).unwrap();
        let requires: fn(&mut Value) = |m| m["streams"]["price"]["requires"] = json!({"catalog": 1, "tax": 3});
        let lacking = |m: &Manifest, stream: &str, held: &[(&str, u64)]| {
            let of = |i: &Instance| {
                held.iter().find(|(name, _)| *name == i.to_string()).map(|(_, v)| (*v).try_into().unwrap())
            };
            let lacking = m.lacking(&stream.parse().unwrap(), of);
            lacking.into_iter().map(|(s, v)| format!("{s} {v}")).collect::<Vec<_>>()
        };
        let m = listed(requires);
        assert_eq!(lacking(&m, "price", &[]), ["catalog 1", "tax 3"]);
        assert_eq!(lacking(&m, "price", &[("catalog@all", 1), ("tax@all", 3)]), ["tax 3"], "not listed");
        assert_eq!(lacking(&m, "price", &[("catalog@zone-east", 1)]), ["catalog 1", "tax 3"], "another instance");
        assert!(lacking(&m, "catalog", &[]).is_empty() && lacking(&m, "tax", &[]).is_empty());
        let m = listed(|m| m["streams"]["price"]["requires"] = json!({"catalog": 2}));
        assert_eq!(lacking(&m, "price", &[("catalog@all", 1)]), ["catalog 2"]);
        assert!(lacking(&m, "price", &[("catalog@all", 3)]).is_empty());
        // As it was signed by who knows nothing of it, and by who has nothing to require.
        assert!(!String::from_utf8(listed(|_| {}).to_payload().unwrap()).unwrap().contains("requires"));
    }

    fn key() -> String {
        crate::keys::SecretKey::from_seed([1; 32]).public().to_string()
    }
}

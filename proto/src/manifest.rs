//! The manifest: what HQ claims to one store. It is signed, small and whole; it names every pack
//! with its length and hash, so that whatever carries the packs need not be trusted.

use crate::clock::Timestamp;
use crate::digest::{Sha256, StateDigest};
use crate::ids::{Audience, DeviceId, Instance, RegisterId, StoreId, StreamName, TableName, Version};
use crate::keys::PublicKey;
use crate::layout::{PackKind, PackName};
use crate::limits::Limits;
use serde::{Deserialize, Serialize};
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

/// The tables that each stream of a manifest has at its head.
pub type Listed = BTreeMap<StreamName, BTreeSet<TableName>>;

impl Manifest {
    /// The tables of its streams.
    pub fn tables(&self) -> Listed {
        let tables = |e: &StreamEntry| e.digests.keys().cloned().collect();
        self.streams.iter().map(|(stream, e)| (stream.clone(), tables(e))).collect()
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

    /// Whether it names a pack.
    pub fn lists(&self, pack: &PackName) -> bool {
        let entry = self.streams.get(&pack.instance.stream).filter(|e| e.audience == pack.instance.audience);
        entry.is_some_and(|e| e.pack(pack.version, pack.kind).is_some())
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

    /// Reads and checks a payload that a signature has been verified on.
    pub fn from_payload(payload: &[u8], limits: &Limits) -> Result<Manifest, ManifestError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let not = |e: serde_json::Error| ManifestError::NotAManifest(e.to_string());
        // The format is read first: a newer manifest may have another shape altogether.
        let Format { format } = serde_json::from_slice(payload).map_err(not)?;
        if format != FORMAT {
            return Err(ManifestError::UnknownFormat(format));
        }
        let manifest: Manifest = serde_json::from_slice(payload).map_err(not)?;
        for (stream, entry) in &manifest.streams {
            entry.check(limits).map_err(|reason| ManifestError::Stream { stream: stream.clone(), reason })?;
        }
        if let Some(r) = manifest.registers.keys().find(|r| r.store() != &manifest.store) {
            return Err(ManifestError::ForeignRegister(r.clone(), manifest.store.clone()));
        }
        Ok(manifest)
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

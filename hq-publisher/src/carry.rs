//! Objects carried by hand: `export` writes a store's, `receipt` reads back what its relay answered.
//!
//! An export is complete or fails: packs and trust files first, the manifest last. What the bucket lost and a newer full
//! goes round is not needed.

use crate::bucket::{BucketError, Buckets, MOST};
use crate::fleet::DeviceView;
use crate::ledger::{Ledger, LedgerError, ReceiptRow};
use proto::clock::{Clock, Timestamp};
use proto::digest::{Sha256, Sha256Stream};
use proto::dsse;
use proto::failpoint;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::layout::{ObjectName, PackKind};
use proto::limits::Limits;
use proto::manifest::{Manifest, PackEntry};
use proto::shelf::{self, ShelfError};
use proto::wire::Receipt;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// An export failed.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The folder.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// Nothing to carry.
    #[error("store {0} has no manifest yet: publish first, or enrol its relay")]
    NoManifest(StoreId),
    /// The ledger's manifest.
    #[error("the manifest of store {0} in the ledger cannot be read: {1}")]
    BadManifest(StoreId, String),
    /// The bucket does not hold what the manifest says.
    #[error("{name} in the bucket is not what the manifest says ({reason}): run `hq-publisher verify`")]
    BadPack {
        /// Which.
        name: String,
        /// How it differs.
        reason: String,
    },
}

/// What an export wrote.
#[derive(Debug, Clone, Serialize)]
pub struct Exported {
    /// The store.
    pub store: StoreId,
    /// Its manifest's serial.
    pub serial: u64,
    /// When that expires.
    pub expires_at: Timestamp,
    /// Packs that are now in the folder.
    pub packs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Packs that were there before.
    pub kept: usize,
    /// Packs that the bucket does not hold as they were put, and that a full in the folder goes round.
    pub left_out: usize,
}

/// Writes a store's objects into a folder; `step` hears of each pack: done, of how many.
pub async fn export(
    ledger: &Ledger,
    buckets: &Buckets,
    store: &StoreId,
    dir: &Path,
    mut step: impl FnMut(usize, usize),
) -> Result<Exported, CarryError> {
    let last = ledger.manifest(store).await?.ok_or_else(|| CarryError::NoManifest(store.clone()))?;
    let (serial, envelope) = (last.serial, last.envelope);
    let manifest: Manifest =
        dsse::peek(envelope.as_bytes(), MOST).map_err(|e| CarryError::BadManifest(store.clone(), e.to_string()))?;
    let mut packs: Vec<(Instance, PackEntry, bool)> = Vec::new();
    for (instance, entry) in manifest.instances() {
        let full = entry.packs.iter().rfind(|p| p.kind == PackKind::Full);
        let is_needless = |p: &PackEntry| full.is_some_and(|full| p != full && p.version <= full.version);
        packs.extend(entry.packs.iter().map(|p| (instance.clone(), p.clone(), is_needless(p))));
    }
    // The fulls that go round others are there before these.
    packs.sort_by_key(|(.., is_needless)| *is_needless);
    let mut done = Exported {
        store: store.clone(),
        serial,
        expires_at: manifest.expires_at,
        packs: 0,
        bytes: 0,
        kept: 0,
        left_out: 0,
    };
    for (n, (instance, entry, is_needless)) in packs.iter().enumerate() {
        step(n, packs.len());
        let was_copied = match export_pack(buckets, instance, entry, dir).await {
            Err(e @ CarryError::BadPack { .. }) if *is_needless => {
                tracing::warn!("{e}; it is left out, for a newer full goes round it");
                done.left_out += 1;
                continue;
            }
            other => other?,
        };
        done.packs += 1;
        done.bytes += entry.bytes;
        done.kept += usize::from(!was_copied);
    }
    step(packs.len(), packs.len());
    let trust = ledger.trust().await?;
    for row in &trust {
        place(dir, &ObjectName::TrustVersion(row.version), row.envelope.as_bytes())?;
    }
    if let Some(newest) = trust.last() {
        place(dir, &ObjectName::Trust, newest.envelope.as_bytes())?;
    }
    place(dir, &ObjectName::Manifest(store.clone()), envelope.as_bytes())?;
    Ok(done)
}

/// Whether the pack was copied (or was there).
async fn export_pack(buckets: &Buckets, i: &Instance, entry: &PackEntry, dir: &Path) -> Result<bool, CarryError> {
    let name = ObjectName::Pack(entry.name(i));
    let to = prepared(dir, &name)?;
    let wanted = (entry.bytes, entry.sha256);
    if hash_of(&to)? == Some(wanted) {
        return Ok(false);
    }
    let bad = |reason: &str| CarryError::BadPack { name: name.to_string(), reason: reason.to_owned() };
    let part = to.with_extension("part");
    let found = buckets.get_to_file(&name, &part).await?.ok_or_else(|| bad("it is missing"))?;
    if found != wanted {
        shelf::remove(&part)?;
        return Err(bad("other bytes"));
    }
    failpoint::step("export.pack", || shelf::promote(&part, &to))?;
    Ok(true)
}

fn prepared(dir: &Path, name: &ObjectName) -> Result<PathBuf, ShelfError> {
    let path = dir.join(name.to_string());
    if let Some(parent) = path.parent() {
        shelf::create_dir(parent)?;
    }
    Ok(path)
}

fn place(dir: &Path, name: &ObjectName, bytes: &[u8]) -> Result<(), ShelfError> {
    let path = prepared(dir, name)?;
    failpoint::step("export.claims", || shelf::write_durable(&path, bytes))
}

fn hash_of(path: &Path) -> Result<Option<(u64, Sha256)>, ShelfError> {
    let mut file = match shelf::open_regular(path) {
        Ok(file) => file,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(e) => return Err(e),
    };
    let (mut length, mut hash, mut chunk) = (0, Sha256Stream::default(), vec![0; 256 << 10]);
    loop {
        // What cannot be read is written again.
        let Ok(n) = file.read(&mut chunk) else { return Ok(None) };
        if n == 0 {
            return Ok(Some((length, hash.finish())));
        }
        length += n as u64;
        hash.update(&chunk[..n]);
    }
}

/// A receipt, read back.
#[derive(Debug, Clone, Serialize)]
pub struct ReceiptLine {
    /// The file.
    pub file: PathBuf,
    /// Why it was not taken; the rest is empty then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// The receipt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Streams that are behind HQ: what the relay has (none: nothing), what HQ has.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub behind: BTreeMap<Instance, (Option<Version>, Version)>,
    /// Streams whose digests differ from HQ's of that version.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differ: Vec<Instance>,
}

/// Verifies a receipt file by the relay's key and records it.
pub async fn receipt(
    ledger: &Ledger,
    file: &Path,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<ReceiptLine, CarryError> {
    let mut line = ReceiptLine {
        file: file.to_owned(),
        refused: None,
        receipt: None,
        behind: BTreeMap::new(),
        differ: Vec::new(),
    };
    match read_receipt(ledger, file, limits).await {
        Ok((receipt, envelope)) => {
            let row =
                ReceiptRow { store: receipt.store.clone(), time: receipt.time, recorded_at: clock.now(), envelope };
            failpoint::around("receipt.record", ledger.add_receipt(&row)).await?;
            compare(ledger, &receipt, &mut line).await?;
            line.receipt = Some(receipt);
        }
        Err(Refused::Because(why)) => line.refused = Some(why),
        Err(Refused::Ledger(e)) => return Err(e.into()),
    }
    Ok(line)
}

enum Refused {
    Because(String),
    Ledger(LedgerError),
}

async fn read_receipt(ledger: &Ledger, file: &Path, limits: &Limits) -> Result<(Receipt, String), Refused> {
    let because = |e: &dyn std::fmt::Display| Refused::Because(e.to_string());
    let bytes = shelf::read_bounded(file, limits.manifest_bytes).map_err(|e| because(&e))?;
    let store = Receipt::claimed_store(&bytes, limits).map_err(|e| because(&e))?;
    let device = ledger.device(&DeviceId::Relay(store.clone())).await.map_err(Refused::Ledger)?;
    let key = match device {
        Some(d) if d.revoked_at.is_none() => d.key,
        Some(_) => return Err(Refused::Because(format!("the relay of store {store} was revoked"))),
        None => return Err(Refused::Because(format!("store {store} has no enrolled relay"))),
    };
    let receipt = Receipt::open(&bytes, &key, limits).map_err(|e| because(&e))?;
    if receipt.store != store {
        return Err(Refused::Because(format!("it is of store {}, signed by {store}", receipt.store)));
    }
    Ok((receipt, String::from_utf8(bytes).map_err(|e| because(&e))?))
}

async fn compare(ledger: &Ledger, receipt: &Receipt, line: &mut ReceiptLine) -> Result<(), CarryError> {
    let Some(last) = ledger.manifest(&receipt.store).await? else { return Ok(()) };
    let Ok(manifest) = dsse::peek::<Manifest>(last.envelope.as_bytes(), u64::MAX) else { return Ok(()) };
    for (instance, entry) in manifest.instances() {
        let theirs = receipt.versions.get(&instance).copied();
        if theirs.is_none_or(|v| v < entry.version) {
            line.behind.insert(instance.clone(), (theirs, entry.version));
        }
    }
    for (instance, digests) in &receipt.digests {
        let Some(version) = receipt.versions.get(instance) else { continue };
        if let Some(p) = ledger.publication(instance, *version).await?
            && &p.digests != digests
        {
            line.differ.push(instance.clone());
        }
    }
    Ok(())
}

/// The last receipts of stores: what is known of those that no heartbeat comes from.
#[derive(Debug, Default)]
pub struct Receipts(BTreeMap<StoreId, Receipt>);

impl Receipts {
    /// Those that were read back.
    pub async fn read(ledger: &Ledger, limits: &Limits) -> Result<Receipts, LedgerError> {
        let read = |row: ReceiptRow| {
            let receipt: Receipt = dsse::peek(row.envelope.as_bytes(), limits.manifest_bytes).ok()?;
            let time = receipt.time.min(row.recorded_at);
            Some(((time, receipt.time, receipt.serial), row.store, Receipt { time, ..receipt }))
        };
        let mut all: Vec<_> = ledger.last_receipts().await?.into_iter().filter_map(read).collect();
        // Several may be of one second.
        all.sort_by_key(|(order, ..)| *order);
        Ok(Receipts(all.into_iter().map(|(_, store, receipt)| (store, receipt)).collect()))
    }

    /// A relay's, where it has sent no heartbeat since.
    pub fn newest_word(&self, device: &DeviceView<'_>) -> Option<&Receipt> {
        let DeviceId::Relay(store) = device.id else { return None };
        self.0.get(store).filter(|r| device.beat.as_ref().is_none_or(|b| b.sent_at < r.time))
    }

    /// What a device holds, by its newest word; none: it never gave one.
    pub fn held<'r>(&'r self, device: &'r DeviceView<'_>) -> Option<BTreeMap<&'r Instance, Option<Version>>> {
        if let Some(receipt) = self.newest_word(device) {
            return Some(receipt.versions.iter().map(|(i, v)| (i, Some(*v))).collect());
        }
        device.beat.as_ref().map(|b| b.streams.iter().map(|(i, r)| (i, r.version)).collect())
    }
}

#[cfg(test)]
mod tests;

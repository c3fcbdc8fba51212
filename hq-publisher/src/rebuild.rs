//! Published replicas from the bucket: the bucket is the truth, what lies in `state.dir` is a copy
//! that can be made again. Also takes over what a lost ledger no longer knows.
//!
//! Owns `state.dir/replicas`. Must never publish. Power may go at any time: a replica holds a whole
//! version or is made again.

use crate::bucket::{BucketError, Buckets};
use crate::ledger::{Head, Ledger, LedgerError, Token};
use proto::chain;
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::dsse;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::layout::{ObjectName, PackName};
use proto::limits::Limits;
use proto::manifest::{Manifest, PackEntry, StreamEntry};
use proto::pack::{PackError, PackReader};
use proto::replica::sqlite::SqliteError;
use proto::replica::{ApplyError, Held, Job, PackFile, Replica};
use proto::retry::Verdict;
use proto::shelf::{self, ShelfError};
use proto::trust::{Refusal, Seen, Trust, TrustState, accept_manifest};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A replica could not be brought to its head.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A file.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// A pack that the head lists is not in the bucket.
    #[error("{0} is listed but not in the bucket")]
    Missing(PackName),
    /// A pack in the bucket is not the one that was put.
    #[error("{name} in the bucket has {found} bytes and other content than was put ({wanted} bytes)")]
    Damaged {
        /// Which.
        name: PackName,
        /// Its length.
        found: u64,
        /// The length that was put.
        wanted: u64,
    },
    /// A pack cannot be read or does not apply.
    #[error("{0}")]
    Pack(String),
    /// The packs do not lead to the head, or lead elsewhere.
    #[error("{instance} cannot be rebuilt to version {version}: {reason}")]
    NoWay {
        /// Which.
        instance: Instance,
        /// The head.
        version: Version,
        /// Why not.
        reason: String,
    },
    /// A manifest in the bucket.
    #[error("the manifest of store {0} in the bucket: {1}")]
    Manifest(StoreId, Refusal),
}

impl RebuildError {
    /// Whether the packs are to blame: only a new full mends that.
    pub fn needs_full(&self) -> bool {
        matches!(
            self,
            RebuildError::Missing(_) | RebuildError::Damaged { .. } | RebuildError::Pack(_) | RebuildError::NoWay { .. }
        )
    }
}

/// What rebuilding works with.
#[derive(Debug, Clone, Copy)]
pub struct Workshop<'a> {
    /// The buckets.
    pub buckets: &'a Buckets,
    /// Bounds of packs.
    pub limits: &'a Limits,
    /// Where packs are fetched to.
    pub packs: &'a Path,
    /// Now.
    pub now: Timestamp,
}

/// The file of an instance's published rows.
pub fn replica_path(replicas: &Path, instance: &Instance) -> PathBuf {
    replicas.join(format!("{instance}.db"))
}

/// Deletes a replica with what SQLite keeps beside it.
pub fn discard(path: &Path) -> Result<(), ShelfError> {
    for end in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        shelf::remove(Path::new(&name))?;
    }
    Ok(())
}

/// Whether a replica holds exactly a head.
pub fn is_at(held: Option<&Held>, instance: &Instance, head: &Head) -> bool {
    held.is_some_and(|h| h.version_of(instance, head.epoch) == Some(head.version) && h.digests == head.digests)
}

/// Opens a replica; one that is no database any more is thrown away and made anew.
pub fn open(path: &Path, instance: &Instance, limits: &Limits) -> Result<(Replica, Option<Held>), RebuildError> {
    let look = || {
        let replica = Replica::open(path, limits)?;
        let held = replica.held(&instance.stream)?;
        Ok::<_, SqliteError>((replica, held))
    };
    match look() {
        Err(e) if e.verdict() == Verdict::Rebuild => {
            tracing::warn!(%instance, error = %e, "the published replica is damaged; it is made anew");
            discard(path)?;
            Ok(look()?)
        }
        other => Ok(other?),
    }
}

/// The published replica at its head: as it lies there, or brought there by the bucket's packs.
/// `anew`: its rows are not to be trusted.
pub async fn published(
    shop: Workshop<'_>,
    path: &Path,
    instance: &Instance,
    head: &Head,
    anew: bool,
) -> Result<Replica, RebuildError> {
    if anew {
        discard(path)?;
    }
    let (replica, held) = tokio::task::block_in_place(|| open(path, instance, shop.limits))?;
    if is_at(held.as_ref(), instance, head) {
        return Ok(replica);
    }
    let from = held.as_ref().and_then(|h| h.version_of(instance, head.epoch)).filter(|v| *v < head.version);
    tracing::info!(%instance, from = from.map(Version::get), to = head.version.get(), "bringing the published replica up from the bucket");
    if held.is_some() && from.is_none() {
        drop(replica);
        discard(path)?;
        return fresh(shop, path, instance, head).await;
    }
    match apply_chain(shop, replica, instance, head, from).await {
        Err(e) if e.needs_full() && from.is_some() => {
            tracing::warn!(%instance, error = %e, "it is rebuilt from the last full");
            discard(path)?;
            fresh(shop, path, instance, head).await
        }
        other => other,
    }
}

async fn fresh(shop: Workshop<'_>, path: &Path, instance: &Instance, head: &Head) -> Result<Replica, RebuildError> {
    let replica = tokio::task::block_in_place(|| Replica::open(path, shop.limits))?;
    apply_chain(shop, replica, instance, head, None).await
}

async fn apply_chain(
    shop: Workshop<'_>,
    mut replica: Replica,
    instance: &Instance,
    head: &Head,
    from: Option<Version>,
) -> Result<Replica, RebuildError> {
    let no_way = |reason: &str| RebuildError::NoWay { instance: instance.clone(), version: head.version, reason: reason.into() };
    let way = chain::cheapest(&head.packs, from, head.version, |_| true).ok_or_else(|| no_way("no packs lead there"))?;
    for entry in way {
        let path = fetch(shop, instance, entry).await?;
        let packs = [PackFile { path: &path, entry }];
        let job = Job { instance, epoch: head.epoch, packs: &packs, now: shop.now, prove: false };
        tokio::task::block_in_place(|| replica.apply(&job)).map_err(|e| match e {
            ApplyError::Sqlite(e) => RebuildError::Sqlite(e),
            other => RebuildError::Pack(other.to_string()),
        })?;
        shelf::remove(&path)?;
    }
    if is_at(replica.held(&instance.stream)?.as_ref(), instance, head) {
        Ok(replica)
    } else {
        Err(no_way("its digests are not the head's"))
    }
}

/// Fetches a pack and proves that it is the one that was put.
async fn fetch(shop: Workshop<'_>, instance: &Instance, entry: &PackEntry) -> Result<PathBuf, RebuildError> {
    let name = entry.name(instance);
    let path = shop.packs.join(format!("{instance}.{}", name.file_name()));
    let got = shop.buckets.get_to_file(&ObjectName::Pack(name.clone()), &path).await?;
    match got {
        None => Err(RebuildError::Missing(name)),
        Some((bytes, sha256)) if (bytes, sha256) == (entry.bytes, entry.sha256) => Ok(path),
        Some((found, _)) => {
            shelf::remove(&path)?;
            Err(RebuildError::Damaged { name, found, wanted: entry.bytes })
        }
    }
}

/// What a lost ledger can learn from the bucket.
#[derive(Debug, Default)]
struct Found {
    heads: BTreeMap<Instance, (u64, Timestamp, StreamEntry)>,
}

/// Takes over heads, serials and devices from the manifests in the bucket, when the ledger knows no
/// head at all: a publisher on a new machine. Gives how many instances were taken over.
pub async fn adopt(shop: Workshop<'_>, ledger: &Ledger, token: Token) -> Result<usize, RebuildError> {
    if !ledger.heads().await?.is_empty() {
        return Ok(0);
    }
    let stores = shop.buckets.list_stores().await?;
    if stores.is_empty() {
        return Ok(0);
    }
    let Some(trust) = walk_trust(ledger, shop.limits).await? else { return Ok(0) };
    let mut found = Found::default();
    for store in stores {
        let name = ObjectName::Manifest(store.clone());
        let Some(envelope) = shop.buckets.get(&name, shop.limits.manifest_bytes).await? else { continue };
        match accepted(&envelope, &store, &trust, shop.limits) {
            Ok(manifest) => take_over(ledger, &manifest, &mut found, shop.now).await?,
            // One that we did not sign proves nothing; the next publish replaces it.
            Err(e) => tracing::warn!(%store, error = %e, "a manifest in the bucket is not ours"),
        }
    }
    let count = found.heads.len();
    for (instance, (epoch, signed_at, entry)) in found.heads {
        adopt_head(shop, ledger, token, &instance, epoch, signed_at, entry).await?;
    }
    Ok(count)
}

/// The trust that our own ledger holds, walked from its first file.
async fn walk_trust(ledger: &Ledger, limits: &Limits) -> Result<Option<TrustState>, RebuildError> {
    let mut state: Option<TrustState> = None;
    for row in ledger.trust().await? {
        let envelope = row.envelope.as_bytes();
        let before = match state.take() {
            Some(state) => state,
            None => match dsse::peek::<Trust>(envelope, limits.trust_bytes) {
                Ok(first) => TrustState::pinned(first.root, row.version),
                Err(_) => return Ok(None),
            },
        };
        match before.step(envelope, limits) {
            Ok(next) => state = Some(next),
            Err(e) => {
                tracing::warn!(version = row.version, error = %e, "a trust file in the ledger does not follow");
                return Ok(None);
            }
        }
    }
    Ok(state)
}

/// A manifest of ours, judged at the time it was signed: it may have expired since.
fn accepted(envelope: &[u8], store: &StoreId, trust: &TrustState, limits: &Limits) -> Result<Manifest, Refusal> {
    #[derive(Deserialize)]
    struct Signed {
        created_at: Timestamp,
    }
    let at: Signed = dsse::peek(envelope, limits.manifest_bytes)?;
    let accepted = accept_manifest(envelope, store, trust, &Seen::default(), at.created_at, limits)?;
    Ok(accepted.manifest.get().clone())
}

async fn take_over(ledger: &Ledger, m: &Manifest, found: &mut Found, now: Timestamp) -> Result<(), RebuildError> {
    ledger.raise_serial(&m.store, m.serial).await?;
    let relay = m.relay.iter().map(|k| (DeviceId::Relay(m.store.clone()), k));
    let registers = m.registers.iter().map(|(id, k)| (DeviceId::Register(id.clone()), k));
    for (id, key) in relay.chain(registers) {
        if ledger.device(&id).await?.is_none() {
            ledger.enrol(&id, key, now).await?;
        }
    }
    for (instance, entry) in m.instances() {
        let newer = found.heads.get(&instance).is_none_or(|(_, _, known)| known.version < entry.version);
        if newer {
            found.heads.insert(instance, (m.epoch, m.created_at, entry.clone()));
        }
    }
    Ok(())
}

async fn adopt_head(
    shop: Workshop<'_>,
    ledger: &Ledger,
    token: Token,
    instance: &Instance,
    epoch: u64,
    signed_at: Timestamp,
    entry: StreamEntry,
) -> Result<(), RebuildError> {
    // The contract's text is in every pack; the smallest one at the head will do.
    let last = entry.packs.iter().filter(|p| p.version == entry.version).min_by_key(|p| p.bytes);
    let Some(last) = last else { return Ok(()) };
    let path = fetch(shop, instance, last).await?;
    let (sha256, ddl) = contract_of(&path, instance, last, shop.limits).map_err(|e| RebuildError::Pack(format!("{}: {e}", last.name(instance))))?;
    shelf::remove(&path)?;
    let head = Head {
        version: entry.version,
        epoch,
        schema: entry.schema,
        digests: entry.digests,
        packs: entry.packs,
        signed_at,
    };
    ledger.adopt(token, instance, &head, (&sha256, &ddl)).await?;
    tracing::info!(%instance, version = head.version.get(), "taken over from the bucket");
    Ok(())
}

fn contract_of(path: &Path, instance: &Instance, entry: &PackEntry, limits: &Limits) -> Result<(Sha256, String), PackError> {
    let file = shelf::open_regular(path).map_err(|e| PackError::Io(std::io::Error::other(e)))?;
    let reader = PackReader::new(file, instance, entry, limits)?;
    Ok((reader.header().schema.sha256, reader.header().schema.ddl.clone()))
}

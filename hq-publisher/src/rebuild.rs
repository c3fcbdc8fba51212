//! Published replicas from the bucket: the bucket is the truth, what lies in `state.dir` is a copy
//! that can be made again. Also takes over what a lost ledger no longer knows.
//!
//! Owns `state.dir/replicas`. Must never publish. Power may go at any time: a replica holds a whole
//! version or is made again.

use crate::bucket::{BucketError, Buckets};
use crate::config::Config;
use crate::ledger::{Adopted, Head, Ledger, LedgerError, Token};
use crate::manifests::{self, ManifestsError};
use proto::chain;
use proto::clock::{Clock, Timestamp};
use proto::digest::Sha256;
use proto::failpoint;
use proto::ids::{Instance, Version};
use proto::layout::{ObjectName, PackName};
use proto::limits::Limits;
use proto::manifest::{PackEntry, StreamEntry};
use proto::pack::{PackError, PackReader, SchemaPart};
use proto::replica::sqlite::SqliteError;
use proto::replica::{ApplyError, Held, Job, PackFile, Replica};
use proto::retry::Verdict;
use proto::shelf::{self, ShelfError};
use std::cmp::Reverse;
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
    /// Manifests and trust files in the bucket.
    #[error(transparent)]
    Manifests(#[from] ManifestsError),
}

impl RebuildError {
    /// Whether the packs are to blame: only a new full mends that.
    pub fn needs_full(&self) -> bool {
        matches!(
            self,
            RebuildError::Missing(_)
                | RebuildError::Damaged { .. }
                | RebuildError::Pack(_)
                | RebuildError::NoWay { .. }
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
        failpoint::step("rebuild.discard", || shelf::remove(Path::new(&name)))?;
    }
    Ok(())
}

/// Whether a replica holds exactly a head.
pub fn is_at(held: Option<&Held>, instance: &Instance, head: &Head) -> bool {
    held.is_some_and(|h| h.version_of(instance, head.epoch) == Some(head.version) && h.digests == head.digests)
}

/// Opens a replica; one that is no database any more, or whose versions cannot be read, is thrown away and made anew.
pub fn open(path: &Path, instance: &Instance, limits: &Limits) -> Result<(Replica, Option<Held>), RebuildError> {
    let look = || {
        let replica = Replica::open(path, limits)?;
        let held = replica.held(&instance.stream)?;
        Ok::<_, SqliteError>((replica, held))
    };
    match look() {
        Err(e) if e.verdict() == Verdict::Rebuild || e.is_unreadable() => {
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
        return apply_chain(shop, path, instance, head, None).await;
    }
    drop(replica);
    match apply_chain(shop, path, instance, head, from).await {
        Err(e) if e.needs_full() && from.is_some() => {
            tracing::warn!(%instance, error = %e, "it is rebuilt from the last full");
            discard(path)?;
            apply_chain(shop, path, instance, head, None).await
        }
        other => other,
    }
}

async fn apply_chain(
    shop: Workshop<'_>,
    path: &Path,
    instance: &Instance,
    head: &Head,
    from: Option<Version>,
) -> Result<Replica, RebuildError> {
    // What is published is taken whatever the bounds are by now; they judge what is made next.
    let mut replica = tokio::task::block_in_place(|| Replica::open(path, &shop.limits.for_published()))?;
    let no_way =
        |reason: &str| RebuildError::NoWay { instance: instance.clone(), version: head.version, reason: reason.into() };
    let way =
        chain::cheapest(&head.packs, from, head.version, |_| true).ok_or_else(|| no_way("no packs lead there"))?;
    for entry in way {
        let path = fetch(shop, instance, entry).await?;
        let packs = [PackFile { path: &path, entry }];
        let job = Job { instance, epoch: head.epoch, packs: &packs, now: shop.now, prove: false, listed: None };
        tokio::task::block_in_place(|| failpoint::step("rebuild.apply", || replica.apply(&job))).map_err(
            |e| match e {
                ApplyError::Sqlite(e) => RebuildError::Sqlite(e),
                other => RebuildError::Pack(other.to_string()),
            },
        )?;
        shelf::remove(&path)?;
    }
    if !is_at(replica.held(&instance.stream)?.as_ref(), instance, head) {
        return Err(no_way("its digests are not the head's"));
    }
    drop(replica);
    Ok(tokio::task::block_in_place(|| Replica::open(path, shop.limits))?)
}

/// Fetches a pack and proves that it is the one that was put.
async fn fetch(shop: Workshop<'_>, instance: &Instance, entry: &PackEntry) -> Result<PathBuf, RebuildError> {
    let name = entry.name(instance);
    let path = shop.packs.join(format!("{instance}.{}", name.file_name()));
    let object = ObjectName::Pack(name.clone());
    let get = shop.buckets.get_to_file(&object, &path);
    let got = failpoint::around("rebuild.fetch", get).await?;
    match got {
        None => Err(RebuildError::Missing(name)),
        Some((bytes, sha256)) if (bytes, sha256) == (entry.bytes, entry.sha256) => Ok(path),
        Some((found, _)) => {
            shelf::remove(&path)?;
            Err(RebuildError::Damaged { name, found, wanted: entry.bytes })
        }
    }
}

/// Takes over what the manifests in the bucket tell, when the ledger knows no head at all: a
/// publisher on a new machine. Gives how many instances were taken over.
pub async fn adopt(
    shop: Workshop<'_>,
    config: &Config,
    ledger: &Ledger,
    token: Token,
    clock: &dyn Clock,
) -> Result<usize, RebuildError> {
    let found = manifests::recover(config, ledger, shop.buckets, clock).await?;
    let mut contracts = BTreeMap::new();
    for (instance, head) in &found.heads {
        if let Some(schema) = contract_of_head(shop, instance, &head.entry).await? {
            contracts.insert((&instance.stream, schema.number), (schema.sha256, schema.ddl));
        }
    }
    let adopted = found.heads.iter().map(|(instance, head)| {
        // Where all packs are gone another zone's tell the stream's contract; else it is one that no text equals, and the
        // stream's next version is a full under a new number. Without a head it would stand below what stores hold.
        let known = contracts.get(&(&instance.stream, head.entry.schema)).cloned();
        let (contract_sha256, ddl) = known.unwrap_or_else(|| (Sha256::of(b""), String::new()));
        Adopted { instance: instance.clone(), head: head.to_head(), contract_sha256, ddl }
    });
    let adopted: Vec<Adopted> = adopted.collect();
    manifests::take_over(ledger, Some(token), &found.stores, &adopted, clock).await?;
    for one in &adopted {
        tracing::info!(instance = %one.instance, version = one.head.version.get(), "taken over from the bucket");
    }
    Ok(adopted.len())
}

/// The contract of a head found in the bucket; none when no pack there tells it.
async fn contract_of_head(
    shop: Workshop<'_>,
    instance: &Instance,
    entry: &StreamEntry,
) -> Result<Option<SchemaPart>, RebuildError> {
    // The contract's text is in every pack; the smallest one at the head will do, else an older one of that contract.
    let mut packs: Vec<&PackEntry> = entry.packs.iter().collect();
    packs.sort_by_key(|p| (Reverse(p.version), p.bytes));
    for pack in packs {
        match contract_in(shop, instance, pack).await {
            Ok(schema) if schema.number == entry.schema => return Ok(Some(schema)),
            Ok(_) => {}
            Err(e) if e.needs_full() => tracing::warn!(%instance, "taking over from the bucket: {e}"),
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// The contract that a pack in the bucket tells.
async fn contract_in(shop: Workshop<'_>, instance: &Instance, pack: &PackEntry) -> Result<SchemaPart, RebuildError> {
    let path = fetch(shop, instance, pack).await?;
    let schema = contract_of(&path, instance, pack, shop.limits)
        .map_err(|e| RebuildError::Pack(format!("{}: {e}", pack.name(instance))));
    shelf::remove(&path)?;
    schema
}

fn contract_of(path: &Path, instance: &Instance, entry: &PackEntry, limits: &Limits) -> Result<SchemaPart, PackError> {
    let file = shelf::open_regular(path).map_err(|e| PackError::Io(std::io::Error::other(e)))?;
    Ok(PackReader::new(file, instance, entry, &limits.for_published())?.header().schema.clone())
}

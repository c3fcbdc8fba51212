//! Where the objects lie: a directory or an S3 bucket, and mirrors of it.
//!
//! Owns create-only puts (the same bytes again are a success, other bytes stop the run), pointers
//! that are overwritten, and what a server does with conditions. Must never decide what is
//! published. A directory's puts are fsynced; if the power goes, an object is there whole or not.
//! A mirror is marked as behind before anything is put, and as even after all of it was.

mod dir;
#[cfg(test)]
mod fake_s3;
mod patience;
mod s3;
#[cfg(test)]
mod tests;

use crate::config::{Config, ObjectsConfig};
use crate::ledger::{Ledger, LedgerError};
use bytes::Bytes;
use dir::Dir;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use proto::digest::Sha256;
use proto::failpoint;
use proto::ids::{Instance, StoreId};
use proto::layout::{ObjectName, PackName};
use proto::limits::Limits;
use proto::shelf::{self, ShelfError};
use s3::S3;
use std::collections::BTreeMap;
use std::future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Mutex, OnceCell};

pub use s3::Conditions;

/// Something to put.
#[derive(Debug, Clone)]
pub enum Content<'a> {
    /// Bytes at hand.
    Bytes(Bytes),
    /// A file, streamed; its length and hash as its writer counted them.
    File {
        /// Where.
        path: &'a Path,
        /// Its length.
        bytes: u64,
        /// Its hash.
        sha256: Sha256,
    },
}

impl Content<'_> {
    fn length(&self) -> u64 {
        match self {
            Content::Bytes(b) => b.len() as u64,
            Content::File { bytes, .. } => *bytes,
        }
    }
    fn sha256(&self) -> Sha256 {
        match self {
            Content::Bytes(b) => Sha256::of(b),
            Content::File { sha256, .. } => *sha256,
        }
    }
}

/// What a create-only put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// Nothing: it was written.
    New,
    /// The same bytes, put before (a lost answer, a run cut short).
    SameThere,
}

/// What became of a pointer that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pointer {
    /// It is there; its ETag, where the bucket gives one.
    Put(Option<String>),
    /// Nothing was put: somebody changed the object since it was seen.
    Changed,
}

/// A bucket failed.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// The name is taken by other bytes.
    #[error("{bucket} already has {name} with other bytes: does somebody else publish to this bucket?")]
    OtherBytesThere {
        /// Which bucket.
        bucket: String,
        /// Which object.
        name: String,
    },
    /// Longer than such an object may be.
    #[error("{name} in {bucket} has more than {max} bytes")]
    TooLong {
        /// Which bucket.
        bucket: String,
        /// Which object.
        name: String,
        /// Bytes that were allowed.
        max: u64,
    },
    /// Anything else.
    #[error("cannot {action} {name} in {bucket}: {reason}")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// Which object or prefix.
        name: String,
        /// Which bucket.
        bucket: String,
        /// What it said.
        reason: String,
    },
    /// A URL or option that cannot work.
    #[error("objects.urls: `{url}`: {reason}")]
    BadUrl {
        /// The URL.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The ledger, which remembers probes and mirrors.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Bytes of a manifest or `trust.json` that headquarters looks at in a bucket, or reads back of its own, whatever the limit
/// for readers is.
pub const MOST: u64 = 64 << 20;

/// Copies to a mirror that fail before the others are left for the next time.
const FAILURES: usize = 10;

/// A copy on its way to a mirror that is so much older than another is nobody's.
const ABANDONED_NS: i128 = 86_400_000_000_000;

/// One bucket.
#[derive(Debug, Clone)]
pub struct Bucket {
    url: Arc<str>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Dir(Dir),
    S3(S3),
}

/// What went wrong inside a bucket, before it is named.
type Inner<T> = Result<T, Trouble>;

#[derive(Debug)]
enum Trouble {
    OtherBytesThere,
    TooLong(u64),
    Failed(String),
}

impl<E: std::error::Error> From<E> for Trouble {
    fn from(e: E) -> Self {
        // The reasons below say more than the first line.
        let mut text = e.to_string();
        let mut at = e.source();
        while let Some(source) = at {
            let more = source.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            at = source.source();
        }
        Trouble::Failed(text)
    }
}

impl Bucket {
    /// Opens a bucket by URL; nothing is asked of it yet.
    pub fn open(url: &str, config: &ObjectsConfig) -> Result<Bucket, BucketError> {
        let bad = |reason: String| BucketError::BadUrl { url: url.to_owned(), reason };
        let kind = if url.starts_with("file:") {
            // Readers take these URLs as the standard says: spaces and the like may be escaped.
            let path = url::Url::parse(url)
                .ok()
                .filter(|u| url.starts_with("file:///") && u.query().is_none() && u.fragment().is_none())
                .and_then(|u| u.to_file_path().ok())
                .ok_or_else(|| bad("write file:///DIR, and %3F, %23 and %25 for ?, # and % in it".to_owned()))?;
            Kind::Dir(Dir::new(path))
        } else {
            Kind::S3(S3::new(url, config).map_err(bad)?)
        };
        Ok(Bucket { url: url.into(), kind })
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What the ledger knows it by: the same URL at another endpoint is another bucket.
    fn key(&self) -> String {
        match &self.kind {
            Kind::S3(s) if !s.endpoint().is_empty() => format!("{} at {}", self.url, s.endpoint()),
            _ => self.url.to_string(),
        }
    }

    fn name<T>(&self, action: &'static str, name: &str, outcome: Inner<T>) -> Result<T, BucketError> {
        outcome.map_err(|e| match e {
            Trouble::OtherBytesThere => {
                BucketError::OtherBytesThere { bucket: self.url.to_string(), name: name.to_owned() }
            }
            Trouble::TooLong(max) => BucketError::TooLong { bucket: self.url.to_string(), name: name.to_owned(), max },
            Trouble::Failed(reason) => {
                let reason = if s3::is_keyless(&reason) { format!("{}: {reason}", s3::KEYLESS) } else { reason };
                BucketError::Failed { action, name: name.to_owned(), bucket: self.url.to_string(), reason }
            }
        })
    }

    async fn put_new(&self, name: &ObjectName, content: &Content<'_>) -> Result<Put, BucketError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(d) => d.put_new(&path, content).await,
            Kind::S3(s) => s.put_new(&path, Some(name), content).await,
        };
        self.name("put", &path, outcome)
    }

    async fn put_pointer(&self, name: &ObjectName, bytes: Bytes, seen: Option<&str>) -> Result<Pointer, BucketError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(d) => d.put_pointer(&path, bytes).await.map(|()| Pointer::Put(None)),
            Kind::S3(s) => s.put_pointer(&path, name, bytes, seen).await,
        };
        self.name("put", &path, outcome)
    }

    /// An object of at most `max` bytes; `None` when there is none.
    pub async fn get(&self, name: &ObjectName, max: u64) -> Result<Option<Bytes>, BucketError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(d) => d.get(&path, max).await,
            Kind::S3(s) => s.get(&path, max).await,
        };
        self.name("get", &path, outcome)
    }

    async fn get_to_file(&self, name: &ObjectName, to: &Path) -> Result<Option<(u64, Sha256)>, BucketError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(d) => d.get_to_file(&path, to).await,
            Kind::S3(s) => s.get_to_file(&path, to).await,
        };
        self.name("get", &path, outcome)
    }

    /// Length and hash of an object, read through; `None` when there is none.
    async fn hash(&self, name: &ObjectName) -> Result<Option<(u64, Sha256)>, BucketError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(d) => d.hash(&path).await,
            Kind::S3(s) => s.hash(&path).await,
        };
        self.name("read", &path, outcome)
    }

    /// All objects under a prefix (`packs/price@all/`, or none for all) of the layout, with lengths.
    async fn list(&self, prefix: &str) -> Result<BTreeMap<ObjectName, u64>, BucketError> {
        let outcome = match &self.kind {
            Kind::Dir(d) => d.list(prefix).await,
            Kind::S3(s) => s.list(prefix).await,
        };
        // Files that are not of the layout are not ours.
        let names = self.name("list", prefix, outcome)?;
        Ok(names.into_iter().filter_map(|(n, bytes)| Some((n.parse().ok()?, bytes))).collect())
    }

    /// The ETags of all objects under a prefix; of a directory's files none.
    async fn etags(&self, prefix: &str) -> Result<BTreeMap<ObjectName, String>, BucketError> {
        let Kind::S3(s) = &self.kind else { return Ok(BTreeMap::new()) };
        let names = self.name("list", prefix, s.etags(prefix).await)?;
        Ok(names.into_iter().filter_map(|(n, etag)| Some((n.parse().ok()?, etag))).collect())
    }

    async fn delete(&self, name: &ObjectName) -> Result<(), BucketError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(d) => d.delete(&path).await,
            Kind::S3(s) => s.delete(&path).await,
        };
        self.name("delete", &path, outcome)
    }

    /// Asks the bucket what it does with conditions on puts, by a small object that is deleted again.
    /// Fails where nothing can be written at all, or the answer is not to be had now.
    pub async fn probe(&self) -> Result<Conditions, BucketError> {
        let outcome = match &self.kind {
            Kind::Dir(d) => d.probe().await,
            Kind::S3(s) => s.probe().await,
        };
        self.name("probe", "", outcome)
    }

    /// Keeps what a probe found for the next runs.
    pub async fn remember(&self, ledger: &Ledger, found: Conditions) -> Result<(), BucketError> {
        Ok(ledger.set_fact(&self.condition_fact(), found.word()).await?)
    }

    fn condition_fact(&self) -> String {
        format!("conditions {}", self.key())
    }

    /// The bucket's clock, where it has one of its own: the `Date` of an answer.
    pub async fn date(&self) -> Option<jiff::Timestamp> {
        match &self.kind {
            Kind::Dir(_) => None,
            Kind::S3(s) => s.date().await,
        }
    }
}

/// The first bucket, which decides, and its mirrors. Clones share what they know.
#[derive(Debug, Clone)]
pub struct Buckets {
    first: Bucket,
    mirrors: Vec<Arc<Mirror>>,
    /// Set once the mirrors that are not named are marked as behind.
    others_left: Arc<OnceCell<()>>,
    ledger: Ledger,
    limits: Limits,
    concurrency: usize,
    /// Where large objects rest on their way to a mirror.
    room: PathBuf,
}

#[derive(Debug)]
struct Mirror {
    bucket: Bucket,
    state: Mutex<MirrorState>,
}

#[derive(Debug, Default)]
struct MirrorState {
    /// The number under which it was marked as behind; none before the first put.
    mark: Option<i64>,
    /// It was even before that: only this run's puts can be missing.
    was_even: bool,
    /// The first failure of this run; after it, nothing more is tried until the repair.
    failed: Option<String>,
}

/// What is still missing in mirrors.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Lag {
    /// A line a mirror that lags: its URL and why.
    pub mirrors: Vec<String>,
}

impl Buckets {
    /// Opens what the settings name. A bucket that was never probed for conditions is probed now, and
    /// the answer kept in the ledger.
    pub async fn open(config: &Config, ledger: &Ledger) -> Result<Buckets, BucketError> {
        let mut all = Vec::new();
        for url in &config.objects.urls {
            let mut bucket = Bucket::open(url, &config.objects)?;
            let fact = bucket.condition_fact();
            if let Kind::S3(s3) = &mut bucket.kind
                && config.objects.s3.conditions.is_none()
            {
                let known = ledger.fact(&fact).await?;
                let probed = match known.as_deref().and_then(Conditions::from_word) {
                    Some(known) => Ok(known),
                    None => {
                        let outcome = s3.probe().await;
                        bucket.name("probe", "", outcome)
                    }
                };
                match probed {
                    Ok(conditions) => {
                        if known.is_none() {
                            bucket.remember(ledger, conditions).await?;
                        }
                        if let Kind::S3(s3) = &mut bucket.kind {
                            s3.set_conditions(conditions);
                        }
                    }
                    // The first must be there; a mirror may be down, and is asked again next time.
                    Err(e) if all.is_empty() => return Err(e),
                    Err(e) => tracing::warn!(mirror = %url, "cannot probe: {e}"),
                }
            }
            all.push(bucket);
        }
        let mut all = all.into_iter();
        let first = all
            .next()
            .ok_or_else(|| BucketError::BadUrl { url: String::new(), reason: "name at least one bucket".into() })?;
        let mirrors = all.map(|bucket| Arc::new(Mirror { bucket, state: Mutex::default() })).collect();
        Ok(Buckets {
            first,
            mirrors,
            others_left: Arc::default(),
            ledger: ledger.clone(),
            limits: config.limits.clone(),
            concurrency: config.objects.concurrency,
            room: config.state.dir.join("mirror"),
        })
    }

    /// What is put now does not go to a mirror that the settings name no more, or as the first: when they name it again,
    /// it lacks that.
    async fn leave_others_behind(&self) -> Result<(), BucketError> {
        let keys: Vec<String> = self.mirrors.iter().map(|m| m.bucket.key()).collect();
        Ok(self.ledger.mirrors_behind_but(&keys).await?)
    }

    /// The URL of the first bucket.
    pub fn first_url(&self) -> &str {
        self.first.url()
    }

    /// What the ledger knows the first bucket by.
    pub fn first_key(&self) -> String {
        self.first.key()
    }

    /// Puts under way at once, as set.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Puts what never changes, if the name is free; into mirrors too (a mirror's failure is
    /// remembered and repaired later).
    pub async fn put_new(&self, name: &ObjectName, content: Content<'_>) -> Result<Put, BucketError> {
        self.mark_mirrors().await?;
        let put = self.first.put_new(name, &content).await?;
        for mirror in &self.mirrors {
            self.attempt(mirror, async |b| b.put_new(name, &content).await.map(|_| ())).await?;
        }
        Ok(put)
    }

    /// Puts what is replaced: `trust.json`; into mirrors too.
    pub async fn put_pointer(&self, name: &ObjectName, bytes: Bytes) -> Result<(), BucketError> {
        self.put_pointer_over(name, bytes, None).await.map(|_| ())
    }

    /// Puts what is replaced: a manifest. `seen` is the ETag that it got when it was put last: where
    /// the first bucket honours conditions, an object that changed since is left alone.
    pub async fn put_pointer_over(
        &self,
        name: &ObjectName,
        bytes: Bytes,
        seen: Option<&str>,
    ) -> Result<Pointer, BucketError> {
        self.mark_mirrors().await?;
        let put = self.first.put_pointer(name, bytes.clone(), seen).await?;
        if put != Pointer::Changed {
            for mirror in &self.mirrors {
                // One that lacks something gets its pointers last, when it has all that they name.
                if mirror.state.lock().await.was_even {
                    self.attempt(mirror, async |b| b.put_pointer(name, bytes.clone(), None).await.map(|_| ())).await?;
                }
            }
        }
        Ok(put)
    }

    /// An object of at most `max` bytes; `None` when there is none. From the first bucket.
    pub async fn get(&self, name: &ObjectName, max: u64) -> Result<Option<Bytes>, BucketError> {
        self.first.get(name, max).await
    }

    /// Copies an object into a file (replaced if there), streamed and synced; its length and hash, or
    /// `None` when there is none.
    pub async fn get_to_file(&self, name: &ObjectName, to: &Path) -> Result<Option<(u64, Sha256)>, BucketError> {
        self.first.get_to_file(name, to).await
    }

    /// Length and hash of an object, read through; `None` when there is none.
    pub async fn hash(&self, name: &ObjectName) -> Result<Option<(u64, Sha256)>, BucketError> {
        self.first.hash(name).await
    }

    /// The packs of an instance with their lengths, in order.
    pub async fn list_packs(&self, instance: &Instance) -> Result<Vec<(PackName, u64)>, BucketError> {
        let names = self.first.list(&format!("packs/{instance}/")).await?;
        Ok(names
            .into_iter()
            .filter_map(|(n, b)| if let ObjectName::Pack(p) = n { Some((p, b)) } else { None })
            .collect())
    }

    /// All objects of the first bucket, with their lengths.
    pub async fn list(&self) -> Result<BTreeMap<ObjectName, u64>, BucketError> {
        self.first.list("").await
    }

    /// The stores that have a manifest.
    pub async fn list_stores(&self) -> Result<Vec<StoreId>, BucketError> {
        let names = self.first.list("stores/").await?;
        Ok(names.into_keys().filter_map(|n| if let ObjectName::Manifest(s) = n { Some(s) } else { None }).collect())
    }

    /// The ETags of the manifests in the first bucket; none where it is a directory.
    pub async fn manifest_etags(&self) -> Result<BTreeMap<ObjectName, String>, BucketError> {
        self.first.etags("stores/").await
    }

    /// Whether the first bucket holds to conditions on puts that replace.
    pub fn honours_conditions(&self) -> bool {
        matches!(&self.first.kind, Kind::S3(s) if s.honours_conditions())
    }

    /// Deletes a pack, in mirrors too; one that is gone is fine. Whether all mirrors did.
    pub async fn delete(&self, name: &ObjectName) -> Result<bool, BucketError> {
        self.mark_mirrors().await?;
        self.first.delete(name).await?;
        let mut everywhere = true;
        for mirror in &self.mirrors {
            everywhere &= self.attempt(mirror, async |b| b.delete(name).await).await?;
        }
        Ok(everywhere)
    }

    /// Marks the mirrors as behind, durably, before the first put of this run. Whoever only looks marks nothing: each
    /// mark costs a comparison of all objects.
    async fn mark_mirrors(&self) -> Result<(), BucketError> {
        self.others_left.get_or_try_init(|| self.leave_others_behind()).await?;
        for mirror in &self.mirrors {
            let mut state = mirror.state.lock().await;
            if state.mark.is_none() {
                let (mark, even) = self.mark_behind(mirror).await?;
                let was_even = even && self.is_as_left(&mirror.bucket).await;
                *state = MirrorState { mark: Some(mark), was_even, failed: None };
            }
        }
        Ok(())
    }

    async fn mark_behind(&self, mirror: &Mirror) -> Result<(i64, bool), BucketError> {
        Ok(failpoint::around("mirror.behind", self.ledger.mirror_behind(&mirror.bucket.key())).await?)
    }

    /// Whether a mirror that was even has, by two looks, what was put last: it may have been emptied or set back, or
    /// its disk not be mounted.
    async fn is_as_left(&self, mirror: &Bucket) -> bool {
        let look = async {
            // As the ledger has it: where the first bucket's is bent, the mirror keeps its own.
            if let Some(trust) = self.ledger.trust().await?.into_iter().rfind(|row| row.put)
                && mirror.get(&ObjectName::Trust, self.limits.trust_bytes).await?.is_none_or(|t| t != trust.envelope)
            {
                return Ok(false);
            }
            let newest = self.ledger.heads().await?.into_iter().max_by_key(|(_, head)| head.signed_at);
            let Some((instance, pack)) = newest.and_then(|(i, head)| Some((i, head.packs.last()?.clone()))) else {
                return Ok(true);
            };
            let theirs = mirror.list(&format!("packs/{instance}/")).await?;
            Ok::<_, BucketError>(theirs.get(&ObjectName::Pack(pack.name(&instance))) == Some(&pack.bytes))
        };
        look.await.unwrap_or_else(|e| {
            tracing::warn!(mirror = mirror.url(), "{e}");
            false
        })
    }

    /// Tries a put or a deletion, and whether it was done; the first failure ends the tries of this run.
    async fn attempt(
        &self,
        mirror: &Mirror,
        put: impl AsyncFnOnce(&Bucket) -> Result<(), BucketError>,
    ) -> Result<bool, BucketError> {
        if mirror.state.lock().await.failed.is_some() {
            return Ok(false);
        }
        let Err(e) = failpoint::around("mirror.put", put(&mirror.bucket)).await else { return Ok(true) };
        tracing::warn!(mirror = mirror.bucket.url(), "{e}");
        let mut state = mirror.state.lock().await;
        if state.failed.is_none() {
            state.failed = Some(e.to_string());
            // Another process may have brought it up since it was marked.
            self.mark_behind(mirror).await?;
        }
        Ok(false)
    }

    /// Brings mirrors up to the first bucket, and marks as even those that are; tells of the others.
    /// Run it after the last put.
    pub async fn repair_mirrors(&self) -> Result<Lag, BucketError> {
        let mut lag = Lag::default();
        // Another process, begun with other settings, may have called one even meanwhile.
        self.leave_others_behind().await?;
        if self.mirrors.is_empty() {
            return Ok(lag);
        }
        self.mark_mirrors().await?;
        for mirror in &self.mirrors {
            let mut state = mirror.state.lock().await;
            let outcome = match (&state.failed, state.was_even) {
                (None, true) => Ok(()),
                (None, false) => {
                    failpoint::around("mirror.copy", self.copy_all(&mirror.bucket)).await.map_err(|e| e.to_string())
                }
                (Some(e), _) => Err(e.clone()),
            };
            match (outcome, state.mark) {
                (Ok(()), Some(mark)) => {
                    failpoint::around("mirror.even", self.ledger.mirror_even(&mirror.bucket.key(), mark)).await?
                }
                (Ok(()), None) => {}
                (Err(e), _) => {
                    lag.mirrors.push(format!("{} lags behind {}: {e}", mirror.bucket.url(), self.first.url()))
                }
            }
            // The next puts begin anew.
            *state = MirrorState::default();
        }
        Ok(lag)
    }

    /// Copies to each mirror what it lacks, be it even by its mark; tells of those that it cannot bring up.
    pub async fn copy_to_mirrors(&self) -> Result<Lag, BucketError> {
        self.mark_mirrors().await?;
        for mirror in &self.mirrors {
            mirror.state.lock().await.was_even = false;
        }
        self.repair_mirrors().await
    }

    /// A line for each mirror that is even by its mark, and lacks something of the first bucket or has it otherwise. Of one
    /// that is behind who puts tells.
    pub async fn compare_mirrors(&self) -> Result<Vec<String>, BucketError> {
        let mut told = Vec::new();
        for mirror in self.mirrors.iter().map(|m| &m.bucket) {
            let mark = self.ledger.mirror_is_even(&mirror.key()).await?;
            if mark.is_none() {
                continue;
            }
            let line = match self.differing(mirror).await {
                Ok(differing) => differing.first().map(|name| {
                    format!(
                        "mirror {}: of {} it lacks {} objects or has others, {name} for one: verify --mend copies them",
                        mirror.url(),
                        self.first.url(),
                        differing.len()
                    )
                }),
                Err(e) => Some(e.to_string()),
            };
            // What was put meanwhile is no fault.
            if self.ledger.mirror_is_even(&mirror.key()).await? == mark {
                told.extend(line);
            }
        }
        Ok(told)
    }

    /// The objects of the first bucket that a mirror lacks or has otherwise: packs and trust files by name and length, others
    /// by their bytes.
    async fn differing(&self, mirror: &Bucket) -> Result<Vec<ObjectName>, BucketError> {
        let (ours, theirs) = (self.first.list("").await?, mirror.list("").await?);
        let theirs = &theirs;
        let looks = stream::iter(ours).map(|(name, bytes)| async move {
            let is_same = match name.is_immutable() {
                true => theirs.get(&name) == Some(&bytes),
                false => self.first.get(&name, MOST).await? == mirror.get(&name, MOST).await?,
            };
            Ok::<_, BucketError>((!is_same).then_some(name))
        });
        looks.buffered(self.concurrency).try_filter_map(|name| future::ready(Ok(name))).try_collect().await
    }

    /// Copies to a mirror what it lacks: packs and trust files by name and length, then the trust that manifests need,
    /// then those. Where one cannot be copied the others are, but nothing that may name it.
    async fn copy_all(&self, mirror: &Bucket) -> Result<(), BucketError> {
        let (ours, theirs) = (self.first.list("").await?, mirror.list("").await?);
        let (fixed, pointers): (Vec<_>, Vec<_>) = ours.into_iter().partition(|(n, _)| n.is_immutable());
        let missing = fixed.into_iter().filter(|(n, bytes)| theirs.get(n) != Some(bytes));
        // No more are begun after some failures; those under way end, and delete their files.
        let (failures, mut first) = (AtomicUsize::new(0), Ok(()));
        let few = stream::iter(missing).take_while(|_| future::ready(failures.load(Ordering::Relaxed) < FAILURES));
        let copies = few.map(|(name, bytes)| async move { self.copy(mirror, &name, bytes).await.err() });
        let mut failed = pin!(copies.buffer_unordered(4).filter_map(future::ready));
        while let Some(e) = failed.next().await {
            tracing::warn!(mirror = mirror.url(), "{e}");
            failures.fetch_add(1, Ordering::Relaxed);
            first = first.and(Err(e));
        }
        first?;
        let (trust, manifests): (Vec<_>, Vec<_>) = pointers.into_iter().partition(|(n, _)| *n == ObjectName::Trust);
        for pointers in [trust, manifests] {
            let copies = stream::iter(pointers).map(|(name, _)| self.copy_pointer(mirror, name));
            copies.buffer_unordered(self.concurrency).try_collect::<()>().await?;
        }
        Ok(())
    }

    async fn copy_pointer(&self, mirror: &Bucket, name: ObjectName) -> Result<(), BucketError> {
        let Some(bytes) = self.first.get(&name, MOST).await? else { return Ok(()) };
        if mirror.get(&name, MOST).await?.as_ref() == Some(&bytes) {
            return Ok(());
        }
        mirror.put_pointer(&name, bytes, None).await.map(|_| ())
    }

    async fn copy(&self, mirror: &Bucket, name: &ObjectName, bytes: u64) -> Result<(), BucketError> {
        if bytes <= s3::SMALL {
            let Some(all) = self.first.get(name, bytes).await? else { return Ok(()) };
            return mirror.put_new(name, &Content::Bytes(all)).await.map(|_| ());
        }
        let failed = |e: ShelfError| BucketError::Failed {
            action: "copy",
            name: name.to_string(),
            bucket: mirror.url().to_owned(),
            reason: e.to_string(),
        };
        shelf::create_dir(&self.room).map_err(failed)?;
        let path = self.room.join(format!("{:016x}", proto::retry::random_unit().to_bits()));
        let copied = match self.first.get_to_file(name, &path).await {
            Ok(Some((bytes, sha256))) => {
                mirror.put_new(name, &Content::File { path: &path, bytes, sha256 }).await.map(|_| ())
            }
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        self.sweep(&path).map_err(failed)?;
        copied
    }

    /// Deletes a copy, and those that a crash left.
    fn sweep(&self, copy: &Path) -> Result<(), ShelfError> {
        let there = shelf::list(&self.room)?;
        let newest = there.iter().map(|e| e.modified_ns).max().unwrap_or_default();
        for old in there.iter().filter(|e| newest - e.modified_ns > ABANDONED_NS) {
            shelf::remove(&old.path)?;
        }
        shelf::remove(copy)
    }
}

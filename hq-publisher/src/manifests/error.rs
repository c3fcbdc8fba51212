//! Why manifests could not be made or put, and what becomes of several such errors.

use super::overtaken::{Overtaken, told};
use super::place;
use crate::bucket::BucketError;
use crate::keys::KeysError;
use crate::ledger::LedgerError;
use crate::some::some;
use proto::clock::Timestamp;
use proto::config::HumanDuration;
use proto::ids::{Instance, StoreId, StreamName};
use std::collections::BTreeSet;
use std::fmt;

/// Manifests could not be made or put.
#[derive(Debug, thiserror::Error)]
pub enum ManifestsError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The clock leapt.
    #[error(
        "the clock says {now}, more than {leap} past the last time in the ledger ({last}): a wrong clock would sign \
         manifests that lock stores out. If the clock is right (nothing ran here for long), run again with --clock-is-right"
    )]
    ClockLeapt {
        /// The clock.
        now: Timestamp,
        /// The ledger's last time.
        last: Timestamp,
        /// publish.clock_leap.
        leap: HumanDuration,
    },
    /// Keys or trust are not there or do not fit.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Another ledger publishes by the same keys; all stores where that was found.
    #[error("{}", told(.0))]
    Overtaken(Vec<Overtaken>),
    /// Manifests of single stores that cannot be signed, or that the bucket does not give or take.
    #[error("{}", not_put(.0))]
    NotPut(Vec<NotPut>),
    /// The bucket knows versions, the ledger none.
    #[error(
        "the manifests in the bucket tell of versions that this ledger does not know, of {0} for one (a new machine, a ledger \
         lost or set back): nothing is signed before it knows them. Run publish first, then this again"
    )]
    NotTakenOver(Instance),
    /// A list of ours names a stream in a way that this build does not know.
    #[error(
        "the manifest of store {store} in the bucket lists stream {stream} in a way that this build cannot read ({reason}), and \
         this ledger does not know it: nothing is signed that would leave it out. Update this program"
    )]
    Unread {
        /// Whose list.
        store: StoreId,
        /// What it lists.
        stream: StreamName,
        /// What is not known.
        reason: String,
    },
    /// The first bucket is another one than before, or was emptied.
    #[error("{}", place::told(.bucket, .lacks))]
    Lacking {
        /// Its URL.
        bucket: String,
        /// The instances of which it lacks packs.
        lacks: Vec<Instance>,
    },
    /// Trust files found in the bucket.
    #[error("the trust files in the bucket cannot be taken over: {0}")]
    Foreign(String),
}

impl ManifestsError {
    /// The stores whose manifests cannot be signed, looked at or put, where it is about nothing else.
    pub fn stores(&self) -> BTreeSet<StoreId> {
        match self {
            ManifestsError::NotPut(all) => all.iter().map(|n| n.store.clone()).collect(),
            _ => BTreeSet::new(),
        }
    }
}

/// A store whose manifest cannot be signed, looked at or put.
#[derive(Debug)]
pub struct NotPut {
    /// Whose.
    pub store: StoreId,
    /// Why.
    pub error: NotPutError,
}

/// What keeps one store's manifest out of the bucket.
#[derive(Debug)]
pub enum NotPutError {
    /// What the bucket said; it names the object.
    Bucket(BucketError),
    /// It would be longer than readers may take.
    TooLong {
        /// Its length.
        bytes: u64,
        /// The limit.
        max: u64,
    },
}

impl fmt::Display for NotPut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            NotPutError::Bucket(e) => e.fmt(f),
            NotPutError::TooLong { bytes, max } => write!(
                f,
                "the next manifest of store {} has {bytes} bytes, over limits.manifest_bytes = {max} (raise it here; readers \
                 take 4 MiB where theirs says nothing else)",
                self.store
            ),
        }
    }
}

impl NotPut {
    /// The error of one store's manifest. What is no object's is about all.
    pub(super) fn of(store: &StoreId, e: ManifestsError) -> ManifestsError {
        match e {
            ManifestsError::Bucket(
                error
                @ (BucketError::Failed { .. } | BucketError::TooLong { .. } | BucketError::OtherBytesThere { .. }),
            ) => ManifestsError::NotPut(vec![NotPut { store: store.clone(), error: NotPutError::Bucket(error) }]),
            e => e,
        }
    }
    /// Whether it would be longer than readers may take.
    pub fn is_too_long(&self) -> bool {
        matches!(self.error, NotPutError::TooLong { .. })
    }
    pub(super) fn too_long(store: &StoreId, bytes: u64, max: u64) -> NotPut {
        NotPut { store: store.clone(), error: NotPutError::TooLong { bytes, max } }
    }
}

fn not_put(all: &[NotPut]) -> String {
    some(all, "; ")
}

/// The error to end with: all stores that were overtaken, else the first that is about all, else all stores that it is about.
pub fn gather(failed: Option<ManifestsError>, e: ManifestsError) -> ManifestsError {
    match (failed, e) {
        (Some(ManifestsError::Overtaken(mut all)), ManifestsError::Overtaken(more)) => {
            all.extend(more);
            ManifestsError::Overtaken(all)
        }
        (Some(other), all @ ManifestsError::Overtaken(_)) | (Some(all @ ManifestsError::Overtaken(_)), other) => {
            tracing::warn!("{other}");
            all
        }
        (Some(ManifestsError::NotPut(mut all)), ManifestsError::NotPut(more)) => {
            all.extend(more);
            ManifestsError::NotPut(all)
        }
        (Some(single @ ManifestsError::NotPut(_)), e) => {
            tracing::warn!("{single}");
            e
        }
        (Some(first), _) => first,
        (None, e) => e,
    }
}

/// The error of both of two steps of which the first does not keep the second from being done.
pub fn both(first: Result<(), ManifestsError>, second: Result<(), ManifestsError>) -> Result<(), ManifestsError> {
    match (first, second) {
        (Err(first), Err(e)) => Err(gather(Some(first), e)),
        (first, second) => first.and(second),
    }
}

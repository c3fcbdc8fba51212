//! Why a run ended as a whole. What stops one stream only is a refusal, in `stage`.

use super::steps::Aborted;
use crate::bucket::BucketError;
use crate::ledger::LedgerError;
use crate::manifests::ManifestsError;
use crate::rebuild::RebuildError;
use crate::scratch::ScratchError;
use crate::source_db::SourceError;
use proto::config::ConfigError;
use proto::replica::sqlite::SqliteError;
use proto::shelf::{LockError, ShelfError};

/// Why `publish` ended as a whole. What was signed before stays and is finished by the next run.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Settings or contracts.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Somebody else publishes.
    #[error("another publisher is at work: {holder} (waited {waited} s, publish.lease_wait)")]
    LeaseHeld {
        /// Who.
        holder: String,
        /// Seconds waited.
        waited: u64,
    },
    /// The lock file.
    #[error(transparent)]
    Lock(LockError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// Manifests.
    #[error(transparent)]
    Manifests(#[from] ManifestsError),
    /// The source as a whole.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A file.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// A scratch database.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// Something else of this machine.
    #[error("{0}")]
    Machine(String),
    /// A test cut the run.
    #[error(transparent)]
    Aborted(#[from] Aborted),
}

impl PublishError {
    /// 2 for settings, else 1.
    pub fn exit_code(&self) -> u8 {
        if crate::code::publish(self) == crate::code::CONFIG { 2 } else { 1 }
    }
}

impl From<RebuildError> for PublishError {
    fn from(e: RebuildError) -> Self {
        match e {
            RebuildError::Bucket(e) => e.into(),
            RebuildError::Ledger(e) => e.into(),
            RebuildError::Manifests(e) => e.into(),
            other => PublishError::Machine(other.to_string()),
        }
    }
}

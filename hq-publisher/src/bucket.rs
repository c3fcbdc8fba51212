//! Where the objects lie: a directory or an S3 bucket, and mirrors of it.
//!
//! Owns create-only puts (the same bytes again are a success, other bytes stop the run), pointers
//! that are overwritten, and what a server does with conditions. Must never decide what is
//! published. A directory's puts are fsynced; if the power goes, an object is there whole or not.

use crate::config::Config;
use crate::ledger::Ledger;
use bytes::Bytes;
use proto::digest::Sha256;
use proto::ids::{Instance, StoreId};
use proto::layout::{ObjectName, PackName};
use std::path::Path;

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

/// What a create-only put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// Nothing: it was written.
    New,
    /// The same bytes, put before (a lost answer, a run cut short).
    SameThere,
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
    /// The ledger, which remembers probes and mirrors' lags.
    #[error(transparent)]
    Ledger(#[from] crate::ledger::LedgerError),
}

/// The first bucket, which decides, and its mirrors.
#[derive(Debug, Clone)]
pub struct Buckets {}

/// What is still missing in mirrors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lag {
    /// A line a mirror that lags: URL, how many objects, why.
    pub mirrors: Vec<String>,
}

impl Buckets {
    /// Opens what the settings name; probes conditions once a bucket and remembers the answer in the
    /// ledger.
    pub async fn open(config: &Config, ledger: &Ledger) -> Result<Buckets, BucketError> {
        let _ = (config, ledger);
        todo!()
    }
    /// Puts what never changes, if the name is free; into mirrors too (a mirror's failure is
    /// remembered and repaired later).
    pub async fn put_new(&self, name: &ObjectName, content: Content<'_>) -> Result<Put, BucketError> {
        let _ = (name, content);
        todo!()
    }
    /// Puts what is replaced: a manifest, `trust.json`; into mirrors too.
    pub async fn put_pointer(&self, name: &ObjectName, bytes: Bytes) -> Result<(), BucketError> {
        let _ = (name, bytes);
        todo!()
    }
    /// An object of at most `max` bytes; `None` when there is none. From the first bucket.
    pub async fn get(&self, name: &ObjectName, max: u64) -> Result<Option<Bytes>, BucketError> {
        let _ = (name, max);
        todo!()
    }
    /// Copies an object into a file, streamed; its length and hash, or `None` when there is none.
    pub async fn get_to_file(&self, name: &ObjectName, to: &Path) -> Result<Option<(u64, Sha256)>, BucketError> {
        let _ = (name, to);
        todo!()
    }
    /// The packs of an instance with their lengths, in order.
    pub async fn list_packs(&self, instance: &Instance) -> Result<Vec<(PackName, u64)>, BucketError> {
        let _ = instance;
        todo!()
    }
    /// The stores that have a manifest.
    pub async fn list_stores(&self) -> Result<Vec<StoreId>, BucketError> {
        todo!()
    }
    /// Deletes a pack, in mirrors too; one that is gone is fine.
    pub async fn delete(&self, name: &ObjectName) -> Result<(), BucketError> {
        let _ = name;
        todo!()
    }
    /// Brings mirrors up to the first bucket; what is left.
    pub async fn repair_mirrors(&self) -> Result<Lag, BucketError> {
        todo!()
    }
}

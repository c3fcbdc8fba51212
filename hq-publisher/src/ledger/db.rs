//! Opening and migrating `fleet.db`; transactions on it.

use crate::config::Config;
use proto::ids::{Instance, Version};

/// The ledger failed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The database.
    #[error("the ledger ({url}) failed: {source}")]
    Database {
        /// Where, without a password.
        url: String,
        /// What it said.
        source: sqlx::Error,
    },
    /// A value that this build did not write.
    #[error("the ledger holds a {what} that cannot be read: {reason}")]
    Damaged {
        /// Which value.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// Somebody else is the publisher now.
    #[error("the publisher's lease was lost: another publisher took over; nothing more is written by this one")]
    LeaseLost,
    /// A number that is not above all before.
    #[error("{instance} has version {max} in the ledger: {version} cannot be taken")]
    VersionTaken {
        /// Whose.
        instance: Instance,
        /// The number asked for.
        version: Version,
        /// The greatest taken.
        max: Version,
    },
    /// A publication that is not where it should be.
    #[error("{instance} {version} is not {wanted} in the ledger")]
    NotInState {
        /// Whose.
        instance: Instance,
        /// Which.
        version: Version,
        /// The state that was expected.
        wanted: &'static str,
    },
    /// A manifest could not be made.
    #[error("the manifest of store {store} cannot be made: {reason}")]
    Manifest {
        /// Whose.
        store: proto::ids::StoreId,
        /// Why not.
        reason: String,
    },
    /// Something else that two must not do.
    #[error("{0}")]
    Conflict(String),
}

/// A number that changes when a manifest was put: cheap to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change(pub i64);

/// The database, open.
#[derive(Debug, Clone)]
pub struct Ledger {}

impl Ledger {
    /// Opens, creates and migrates the database that the settings name.
    pub async fn open(config: &Config) -> Result<Ledger, LedgerError> {
        let _ = config;
        todo!()
    }
    /// The number that rises when manifests were put.
    pub async fn change(&self) -> Result<Change, LedgerError> {
        todo!()
    }
}

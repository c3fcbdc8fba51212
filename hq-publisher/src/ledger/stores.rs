//! Stores, their manifests, and trust files.

use super::{Head, Ledger, LedgerError, Staged, Token};
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::ids::{DeviceId, Instance, StoreId};

pub use crate::source::StoreRow as StoreSeen;
use proto::keys::PublicKey;
use std::collections::BTreeMap;

/// A store as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreRow {
    /// What the source told last.
    pub seen: StoreSeen,
    /// When the source no longer had it; none while it has.
    pub vanished_at: Option<Timestamp>,
    /// Serial of its last manifest; 0 before the first.
    pub serial: u64,
    /// Serial of the last manifest with other content than the one before: what wakes a relay.
    pub content_serial: u64,
    /// The greatest serial that was put; less than `serial`: to be put.
    pub put_serial: u64,
    /// The manifest's trust epoch.
    pub epoch: u64,
    /// The key id of its signer.
    pub signer: String,
    /// Hash of its content without serial, epoch and times.
    pub content: Option<Sha256>,
    /// When it was signed.
    pub signed_at: Option<Timestamp>,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
}

/// What a manifest is made from, handed to the maker within [`Ledger::sign`].
#[derive(Debug)]
pub struct SignStore<'a> {
    /// The store.
    pub row: &'a StoreRow,
    /// The heads of all instances, those just staged included.
    pub heads: &'a BTreeMap<Instance, Head>,
    /// Its devices with their keys, revoked ones left out.
    pub devices: &'a [(DeviceId, PublicKey)],
    /// Its last manifest's envelope.
    pub envelope: Option<&'a str>,
}

/// A manifest to store.
#[derive(Debug, Clone)]
pub struct NewManifest {
    /// One above the row's (or above the greatest seen elsewhere).
    pub serial: u64,
    /// The trust epoch.
    pub epoch: u64,
    /// The signed envelope.
    pub envelope: String,
    /// The key id of its signer.
    pub signer: String,
    /// Hash of its content without serial, epoch and times.
    pub content: Sha256,
    /// When it was signed.
    pub signed_at: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// A trust file as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRow {
    /// Its version.
    pub version: u64,
    /// The signed envelope.
    pub envelope: String,
    /// Whether it is in the bucket.
    pub put: bool,
}

impl Ledger {
    /// Records what the source tells now; gives the stores that vanished by this.
    pub async fn see_stores(&self, stores: &[StoreSeen], now: Timestamp) -> Result<Vec<StoreId>, LedgerError> {
        let _ = (stores, now);
        todo!()
    }
    /// All stores, vanished ones too.
    pub async fn stores(&self) -> Result<Vec<StoreRow>, LedgerError> {
        todo!()
    }
    /// One store.
    pub async fn store(&self, id: &StoreId) -> Result<Option<StoreRow>, LedgerError> {
        let _ = id;
        todo!()
    }
    /// Signs, in one transaction: makes each staged publication its instance's head and stores what
    /// `make` gives for each store (`None`: the last manifest stands). Without a token (`enroll`,
    /// signing anew) nothing may be staged. Its commit is the commit point. Gives the stores signed.
    pub async fn sign(
        &self,
        token: Option<Token>,
        staged: &[Staged],
        only: Option<&StoreId>,
        now: Timestamp,
        make: &mut (dyn FnMut(&SignStore<'_>) -> Result<Option<NewManifest>, String> + Send),
    ) -> Result<Vec<StoreId>, LedgerError> {
        let _ = (token, staged, only, now, make);
        todo!()
    }
    /// Manifests that are signed and not yet put, at most `limit`: store, serial, envelope.
    pub async fn manifests_to_put(&self, limit: usize) -> Result<Vec<(StoreId, u64, String)>, LedgerError> {
        let _ = limit;
        todo!()
    }
    /// A store's last manifest: serial and envelope.
    pub async fn manifest(&self, store: &StoreId) -> Result<Option<(u64, String)>, LedgerError> {
        let _ = store;
        todo!()
    }
    /// Manifests that were put; wakes who waits for them.
    pub async fn manifests_put(&self, put: &[(StoreId, u64)]) -> Result<(), LedgerError> {
        let _ = put;
        todo!()
    }
    /// All trust files, by version.
    pub async fn trust(&self) -> Result<Vec<TrustRow>, LedgerError> {
        todo!()
    }
    /// Stores the next trust file. Fails when that version is there with other bytes.
    pub async fn add_trust(&self, version: u64, envelope: &str, now: Timestamp) -> Result<(), LedgerError> {
        let _ = (version, envelope, now);
        todo!()
    }
    /// A trust file is in the bucket.
    pub async fn trust_put(&self, version: u64) -> Result<(), LedgerError> {
        let _ = version;
        todo!()
    }
}

//! Making, signing and putting manifests.

use crate::bucket::{BucketError, Buckets};
use crate::config::Config;
use crate::ledger::{Ledger, LedgerError, Staged, Token};
use proto::clock::{Clock, Timestamp};
use proto::ids::StoreId;

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
        leap: proto::config::HumanDuration,
    },
    /// Keys or trust are not there or do not fit.
    #[error(transparent)]
    Keys(#[from] crate::keys::KeysError),
}

/// What signs: the publisher's key and the trust it stands in.
#[derive(Debug)]
pub struct Signer {}

impl Signer {
    /// Opens the keyring and the ledger's newest trust; finds the key to sign with. Fails when the
    /// clock has leapt more than `publish.clock_leap` past the ledger, unless `clock_is_right`.
    pub async fn open(
        config: &Config,
        ledger: &Ledger,
        clock: &dyn Clock,
        clock_is_right: bool,
    ) -> Result<Signer, ManifestsError> {
        let _ = (config, ledger, clock, clock_is_right);
        todo!()
    }
    /// The trust epoch that versions are counted in.
    pub fn epoch(&self) -> u64 {
        todo!()
    }
    /// **The commit point of a publish**: makes each staged publication its instance's head, and signs
    /// a manifest for each store whose content changed (or whose manifest is due to be signed anew),
    /// in one transaction. Gives the stores signed.
    pub async fn sign_all(
        &self,
        ledger: &Ledger,
        token: Token,
        staged: &[Staged],
        clock: &dyn Clock,
    ) -> Result<Vec<StoreId>, ManifestsError> {
        let _ = (ledger, token, staged, clock);
        todo!()
    }
    /// Signs one store's manifest (after `enroll` or `revoke`), without the lease.
    pub async fn sign_one(&self, ledger: &Ledger, store: &StoreId, clock: &dyn Clock) -> Result<(), ManifestsError> {
        let _ = (ledger, store, clock);
        todo!()
    }
}

/// Puts trust files and manifests that are signed and not yet in the bucket; how many manifests.
/// Run at the start of a publish (rolls a crashed one forward) and after each signing.
pub async fn put_unfinished(ledger: &Ledger, buckets: &Buckets, token: Option<Token>) -> Result<usize, ManifestsError> {
    let _ = (ledger, buckets, token);
    todo!()
}

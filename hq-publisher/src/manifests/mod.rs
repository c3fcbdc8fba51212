//! Making, signing and putting manifests.
//!
//! Owns what a store's manifest says, when it is signed anew, and the order of puts: trust files,
//! then manifests. Must never sign while the clock cannot be believed. What is signed is in the
//! ledger before it is put: if the power goes, the next run puts it.

mod error;
mod overtaken;
mod place;
mod put;
mod recover;
mod sign;

pub use error::{ManifestsError, NotPut, NotPutError, both, gather};
pub use overtaken::{Overtaken, check_newer, check_overtaken, mail_overtaken, newer_in_bucket, signed_by_us, telling};
pub use place::{check_place, doubt, know_place, still_lacked};
pub use put::{put_again, put_store, put_trust, put_unfinished};
pub use recover::{Followed, Found, FoundHead, check_taken_over, follow_trust, recover, recover_trust, take_over};
pub use sign::{Held, ListedBy, Move, Moves, Signed, Signer, check_clock, ends_soon, followed, lost};

use crate::keys::KeysError;
use crate::ledger::Ledger;
use proto::dsse;
use proto::limits::Limits;
use proto::trust::Trust;

/// The newest trust file of the ledger.
pub async fn newest_trust(ledger: &Ledger, limits: &Limits) -> Result<Option<Trust>, ManifestsError> {
    let Some(row) = ledger.trust().await?.pop() else { return Ok(None) };
    Ok(Some(parse_trust(row.version, &row.envelope, limits)?))
}

fn parse_trust(version: u64, envelope: &str, limits: &Limits) -> Result<Trust, KeysError> {
    dsse::peek(envelope.as_bytes(), limits.trust_bytes)
        .map_err(|e| KeysError::BadTrust { version, reason: e.to_string() })
}

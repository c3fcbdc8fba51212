//! Whether the first bucket is the one that was put to before: another place, one that was emptied, or one whose disk is not
//! mounted must not get lists that name what it lacks.
//!
//! Owns what the ledger remembers of it. The memory is let go of before anything is put to a place that is in doubt, and
//! comes back when a run ends: if the power goes between, the next run doubts again.

use super::ManifestsError;
use crate::bucket::Buckets;
use crate::ledger::{Ledger, LedgerError};
use proto::chain;
use proto::ids::Instance;
use proto::layout::ObjectName;
use proto::limits::Limits;

/// The fact that holds the first bucket that was put to; empty while that is in doubt.
const BUCKET: &str = "bucket";

/// A first bucket that is in doubt.
#[derive(Debug)]
pub struct Doubt {
    /// The instances of which it has no way to their heads.
    pub lacks: Vec<Instance>,
    /// Some trust file is missing.
    is_bare: bool,
}

/// Looks whether the first bucket is another one than before, or lost its `trust.json`; and what it lacks then.
pub async fn doubt(ledger: &Ledger, buckets: &Buckets, limits: &Limits) -> Result<Option<Doubt>, ManifestsError> {
    // A ledger of before it was remembered takes what is there as known.
    let is_other = ledger.fact(BUCKET).await?.is_some_and(|known| known != buckets.first_key());
    let trust: Vec<_> = ledger.trust().await?.into_iter().filter(|row| row.put).collect();
    // One that cannot be read is not gone.
    let is_gone = async || matches!(buckets.get(&ObjectName::Trust, limits.trust_bytes).await, Ok(None));
    if !is_other && (trust.is_empty() || !is_gone().await) {
        return Ok(None);
    }
    let there = buckets.list().await?;
    let mut heads = ledger.heads().await?;
    // The others no store follows.
    heads.retain(|_, head| !head.retired);
    let has_way = |i: &Instance, packs, version| {
        let is_there = |p: &proto::manifest::PackEntry| there.get(&ObjectName::Pack(p.name(i))) == Some(&p.bytes);
        chain::cheapest(packs, None, version, is_there).is_some()
    };
    let lacks =
        heads.iter().filter(|(i, head)| !has_way(i, &head.packs, head.version)).map(|(i, _)| i.clone()).collect();
    let mut files = trust.iter().map(|row| ObjectName::TrustVersion(row.version)).chain([ObjectName::Trust]);
    Ok(Some(Doubt { lacks, is_bare: files.any(|name| !there.contains_key(&name)) }))
}

/// Before anything is put: fails where the first bucket is in doubt and lacks what lists name, unless all of it `is_made_anew`
/// by this run. Where it has all, trust files that are gone are put again, and it is the one that is known from then on.
pub async fn check_place(
    ledger: &Ledger,
    buckets: &Buckets,
    limits: &Limits,
    is_made_anew: bool,
) -> Result<(), ManifestsError> {
    let Some(Doubt { lacks, is_bare }) = doubt(ledger, buckets, limits).await? else { return Ok(()) };
    if !lacks.is_empty() {
        ledger.set_fact(BUCKET, "").await?;
        if !is_made_anew {
            return Err(ManifestsError::Lacking { bucket: buckets.first_url().to_owned(), lacks });
        }
    }
    if is_bare {
        tracing::warn!(bucket = buckets.first_url(), "its trust files are put again");
        ledger.put_trust_again().await?;
    }
    if lacks.is_empty() { Ok(know_place(ledger, buckets).await?) } else { Ok(()) }
}

/// All that lists name was put to the first bucket, or somebody said that it is right.
pub async fn know_place(ledger: &Ledger, buckets: &Buckets) -> Result<(), LedgerError> {
    let key = buckets.first_key();
    if ledger.fact(BUCKET).await?.as_ref() == Some(&key) { Ok(()) } else { ledger.set_fact(BUCKET, &key).await }
}

/// What is said of the instances that a bucket lacks, and what to do.
pub(super) fn told(bucket: &str, lacks: &[Instance]) -> String {
    let named: Vec<String> = lacks.iter().take(super::error::NAMED).map(Instance::to_string).collect();
    let more = lacks.len().saturating_sub(named.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!(
        "{bucket} is another bucket than before, or was emptied: it lacks packs that stores' lists name, of {}{more}. Nothing is \
         put there: is its disk mounted, and are objects.urls and [objects.s3] right? Name a new place as a mirror first, \
         behind the old one, publish, and then make it the first. What is lost for good is made anew by `publish --full`",
        named.join(", ")
    )
}

//! Whether the first bucket is the one that was put to before: another place, one that was emptied, or one whose disk is not
//! mounted must not get lists that name what it lacks.
//!
//! Owns what the ledger remembers of it. The memory is let go of before anything is put to a place that is in doubt, and
//! comes back when a run ends: if the power goes between, the next run doubts again. What a place that somebody called right
//! lacks then is remembered beside it, until it is there.

use super::ManifestsError;
use crate::bucket::Buckets;
use crate::ledger::{Ledger, LedgerError};
use crate::some::some;
use proto::chain;
use proto::ids::Instance;
use proto::layout::ObjectName;
use proto::limits::Limits;
use std::collections::{BTreeMap, BTreeSet};

/// The fact that holds the first bucket that was put to; empty while that is in doubt.
const BUCKET: &str = "bucket";

/// The fact that names the instances of which a known first bucket lacks what lists name.
const LACKS: &str = "bucket lacks";

/// A first bucket that is in doubt.
#[derive(Debug)]
pub struct Doubt {
    /// The instances of which it has no way to their heads, and had before.
    pub lacks: Vec<Instance>,
    /// Those of which it had none before either.
    lacked: Vec<Instance>,
    /// Some trust file is missing.
    is_bare: bool,
}

impl Doubt {
    /// Why nothing is put there; none where it lacks no packs.
    pub fn refusal(&self, buckets: &Buckets) -> Option<ManifestsError> {
        let (bucket, lacks) = (buckets.first_url().to_owned(), self.lacks.clone());
        (!lacks.is_empty()).then_some(ManifestsError::Lacking { bucket, lacks })
    }
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
    let known = known_lacks(ledger).await?;
    let (lacked, lacks) = lacking(ledger, &there).await?.into_iter().partition(|i| known.contains(i));
    let mut files = trust.iter().map(|row| ObjectName::TrustVersion(row.version)).chain([ObjectName::Trust]);
    Ok(Some(Doubt { lacks, lacked, is_bare: files.any(|name| !there.contains_key(&name)) }))
}

/// The instances to whose heads no packs lead that are there.
async fn lacking(ledger: &Ledger, there: &BTreeMap<ObjectName, u64>) -> Result<Vec<Instance>, LedgerError> {
    let mut heads = ledger.heads().await?;
    // The others no store follows.
    heads.retain(|_, head| !head.retired);
    let has_way = |i: &Instance, packs, version| {
        let is_there = |p: &proto::manifest::PackEntry| there.get(&ObjectName::Pack(p.name(i))) == Some(&p.bytes);
        chain::cheapest(packs, None, version, is_there).is_some()
    };
    Ok(heads.iter().filter(|(i, head)| !has_way(i, &head.packs, head.version)).map(|(i, _)| i.clone()).collect())
}

/// Before anything is put: fails where the first bucket is in doubt and lacks what lists name, unless all of it `is_made_anew`
/// by this run. Where it has all, trust files that are gone are put again, and it is the one that is known from then on.
pub async fn check_place(
    ledger: &Ledger,
    buckets: &Buckets,
    limits: &Limits,
    is_made_anew: bool,
) -> Result<(), ManifestsError> {
    let Some(doubt) = doubt(ledger, buckets, limits).await? else { return Ok(()) };
    let refusal = doubt.refusal(buckets);
    let is_known = refusal.is_none();
    if let Some(refusal) = refusal {
        ledger.set_fact(BUCKET, "").await?;
        if !is_made_anew {
            return Err(refusal);
        }
    }
    if doubt.is_bare {
        tracing::warn!(bucket = buckets.first_url(), "its trust files are put again");
        ledger.put_trust_again().await?;
    }
    if is_known { Ok(know(ledger, buckets, &doubt.lacked).await?) } else { Ok(()) }
}

/// At the end of a publish: the first bucket is known from then on, for all that lists name was put there, or somebody said
/// that it is right. Gives the instances of which it lacks that still: their streams were refused, or are not in the settings.
pub async fn know_place(ledger: &Ledger, buckets: &Buckets) -> Result<Vec<Instance>, ManifestsError> {
    let is_in_doubt = ledger.fact(BUCKET).await?.is_some_and(|known| known.is_empty());
    let lacks = match is_in_doubt || !known_lacks(ledger).await?.is_empty() {
        true => lacking(ledger, &buckets.list().await?).await?,
        false => Vec::new(),
    };
    know(ledger, buckets, &lacks).await?;
    Ok(lacks)
}

/// The instances of which a known first bucket lacked what lists name, when a publish ended.
async fn known_lacks(ledger: &Ledger) -> Result<BTreeSet<Instance>, LedgerError> {
    let names = ledger.fact(LACKS).await?.unwrap_or_default();
    Ok(names.split_whitespace().filter_map(|name| name.parse().ok()).collect())
}

/// Those of them that are still not there: only a full makes that whole.
pub async fn still_lacked(ledger: &Ledger, buckets: &Buckets) -> Result<BTreeSet<Instance>, ManifestsError> {
    let mut lacked = known_lacks(ledger).await?;
    if !lacked.is_empty() {
        let lacking = lacking(ledger, &buckets.list().await?).await?;
        lacked.retain(|i| lacking.contains(i));
    }
    Ok(lacked)
}

async fn know(ledger: &Ledger, buckets: &Buckets, lacks: &[Instance]) -> Result<(), LedgerError> {
    let lacks = lacks.iter().map(Instance::to_string).collect::<Vec<_>>().join(" ");
    // What it lacks first: a place that is known is not looked at again.
    for (name, value) in [(LACKS, lacks), (BUCKET, buckets.first_key())] {
        if ledger.fact(name).await?.unwrap_or_default() != value {
            ledger.set_fact(name, &value).await?;
        }
    }
    Ok(())
}

/// What is said of the instances that a bucket lacks, and what to do.
pub(super) fn told(bucket: &str, lacks: &[Instance]) -> String {
    format!(
        "{bucket} is another bucket than before, or was emptied: it lacks packs that stores' lists name, of {}. Nothing is \
         put there: is its disk mounted, and are objects.urls and [objects.s3] right? Name a new place as a mirror first, \
         behind the old one, publish, and then make it the first. What is lost for good is made anew by `publish --full`",
        some(lacks, ", ")
    )
}

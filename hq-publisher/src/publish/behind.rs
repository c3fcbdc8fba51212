//! Instances of which newer versions may be out than the ledger knows: it was set back, or was made anew from the lists of
//! one that was.
//!
//! Owns which they are, until a publish has gone above. Must be looked at before a run puts packs of its own.

use super::PublishError;
use super::stage::FAR_AHEAD;
use crate::bucket::{BucketError, Buckets};
use crate::ledger::{Head, Ledger};
use proto::ids::Instance;
use std::collections::{BTreeMap, BTreeSet};

/// The fact that names those of an earlier look.
const BEHIND: &str = "behind";

/// Those of which the bucket has a pack above the head: of all instances of a ledger that is said to be set back, else of
/// those noted before. Whether a list ever named that pack nobody knows any more: it counts.
pub async fn look(
    ledger: &Ledger,
    buckets: &Buckets,
    heads: &BTreeMap<Instance, Head>,
) -> Result<BTreeSet<Instance>, BucketError> {
    let noted = ledger.fact(BEHIND).await?.and_then(|text| serde_json::from_str(&text).ok());
    let noted: BTreeSet<Instance> = noted.unwrap_or_default();
    let is_set_back = ledger.is_set_back().await?;
    let mut behind = BTreeSet::new();
    for (instance, head) in heads.iter().filter(|(i, _)| is_set_back || noted.contains(i)) {
        let known = head.version.get();
        let above = known.saturating_add(1)..=known.saturating_add(FAR_AHEAD);
        let packs = buckets.list_packs(instance).await?;
        if packs.iter().any(|(pack, _)| above.contains(&pack.version.get())) {
            behind.insert(instance.clone());
        }
    }
    Ok(behind)
}

/// Keeps them in mind.
pub(super) async fn note(ledger: &Ledger, behind: &BTreeSet<Instance>) -> Result<(), PublishError> {
    let text = serde_json::to_string(behind).map_err(|e| PublishError::Machine(e.to_string()))?;
    Ok(ledger.set_fact(BEHIND, &text).await?)
}

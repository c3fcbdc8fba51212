//! Instances of which newer versions may be out than the ledger knows: it was set back, or was made anew from the lists of
//! one that was.
//!
//! Owns which they are, until a publish has gone above. Must be looked at before a run puts packs of its own.

use super::PublishError;
use super::stage::FAR_AHEAD;
use crate::bucket::{BucketError, Buckets};
use crate::ledger::{Complaint, Head, Ledger, VERSION_NOT_OURS, WITNESSES};
use proto::ids::{DeviceId, Instance, Version};
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

/// The versions above the heads that devices hold, enough of them to believe it: where the bucket was set back with the
/// ledger, nobody else knows.
pub(super) fn held_out(
    complaints: &[Complaint],
    enrolled: &[DeviceId],
    heads: &BTreeMap<Instance, Head>,
) -> BTreeMap<Instance, Version> {
    let mut held: BTreeMap<&Instance, Vec<Version>> = BTreeMap::new();
    for Complaint { device, fault } in complaints.iter().filter(|c| c.fault.code == VERSION_NOT_OURS) {
        let version = fault.object.as_deref().and_then(|v| Version::try_from(v.parse::<u64>().ok()?).ok());
        if let (Some(instance), Some(version)) = (&fault.instance, version)
            && enrolled.contains(device)
        {
            held.entry(instance).or_default().push(version);
        }
    }
    let believed = |(instance, mut versions): (&Instance, Vec<Version>)| {
        versions.sort_unstable_by(|a, b| b.cmp(a));
        let version = *versions.get(WITNESSES - 1)?;
        heads.get(instance).is_some_and(|h| h.version < version).then(|| (instance.clone(), version))
    };
    held.into_iter().filter_map(believed).collect()
}

//! What devices report of an instance's packs and no full answers yet.

use crate::ledger::{Complaint, Head, Ledger, LedgerError};
use crate::plan::{Report, full_may_help};
use proto::clock::{Timestamp, since};
use proto::ids::Instance;
use proto::layout::PackKind;
use proto::wire::fault;
use std::collections::BTreeMap;
use std::time::Duration;

/// Whoever refuses a full gets another one for it only after so long: what it cannot take may have left the rows meanwhile.
const NEXT_TRY: Duration = Duration::from_secs(86_400);

/// The faults that devices report and that are younger than the last full, one an instance; of who refuses fulls for what it
/// is itself, only when that one is old.
pub async fn unanswered(
    ledger: &Ledger,
    heads: &BTreeMap<Instance, Head>,
    complaints: &[Complaint],
    now: Timestamp,
) -> Result<BTreeMap<Instance, Report>, LedgerError> {
    let mut by_instance: BTreeMap<&Instance, Vec<&Complaint>> = BTreeMap::new();
    for complaint in complaints {
        if let Some(instance) = &complaint.fault.instance {
            by_instance.entry(instance).or_default().push(complaint);
        }
    }
    let mut reports = BTreeMap::new();
    for (instance, of) in by_instance {
        let Some(head) = heads.get(instance) else { continue };
        let packs = ledger.published(instance).await?;
        let full = packs.iter().rfind(|p| p.entry.kind == PackKind::Full).map(|f| f.signed_at);
        let is_old = full.is_none_or(|full| since(now, full) >= NEXT_TRY);
        let is_open =
            |c: &&Complaint| full.is_none_or(|full| full <= c.fault.since) && (is_old || full_may_help(&c.fault));
        // Drift heals by the full that is out.
        let is_stuck = |c: &Complaint| [fault::PACK_MISSING, fault::PACK_IN_ERROR].contains(&c.fault.code.as_str());
        let worst = of.into_iter().filter(is_open).max_by_key(|c| (is_stuck(c), c.fault.since));
        if let Some(c) = worst {
            // Where the newest version is a full itself, one more is a way round it for nobody, or the bucket lost it.
            let is_way_round = head.deltas_since_full().next().is_some() || is_old;
            let told = format!("{} {}", c.device, c.fault.code);
            reports.insert(instance.clone(), Report { told, is_stuck: is_way_round && is_stuck(c) });
        }
    }
    Ok(reports)
}

//! Drops that wait for others: their rows refer to rows of a table of which no right drop has come, or they are not all
//! that a first version needs.
//!
//! Owns since when that is told of each, from run to run, and the mail where it was in vain. If the power goes, a drop
//! may wait for longer.

use super::feed::Drops;
use super::report::{InstanceReport, Outcome, PublishReport};
use super::{PublishError, Run};
use crate::inbox::{Drop, Inbox, What};
use crate::ledger::{Ledger, LedgerError};
use crate::mail;
use proto::clock::{Timestamp, since};
use proto::ids::{Instance, TableName};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The fact that names the drops that wait.
const WAITS: &str = "waits";

/// How the notices of those begin that waited in vain; instance and table follow.
const IN_VAIN: &str = "drop-rejected ";

/// How the notices of instances begin that lack drops for a first version; the instance follows.
const LACKS: &str = "waits-for-drops ";

/// Drops that wait, by name (however often they are written anew: their stream waits with them), and instances that lack
/// some: since when that is told.
type Told = BTreeMap<String, Timestamp>;

/// What waits.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// As earlier runs told it.
    before: Told,
    /// As this one does.
    now: Mutex<Told>,
    /// What waited in vain: notices with subject and text.
    over: Mutex<BTreeMap<String, (String, String)>>,
    /// The same of what goes on waiting.
    late: Mutex<BTreeMap<String, (String, String)>>,
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waits {
    /// As earlier runs left it.
    pub(super) async fn look(ledger: &Ledger) -> Result<Waits, LedgerError> {
        let before = ledger.fact(WAITS).await?.and_then(|text| serde_json::from_str(&text).ok());
        Ok(Waits { before: before.unwrap_or_default(), ..Waits::default() })
    }

    /// Whether a drop may wait for rows of these tables: for no longer than `longest` after that was first told.
    pub(super) fn may_wait(&self, drop: &Drop, parents: &str, now: Timestamp, longest: Duration) -> bool {
        let Ok(What::Table { instance, table, .. }) = &drop.what else { return false };
        let name = &drop.file.name;
        let told = self.told(name, now);
        let may_wait = since(now, told) < longest;
        if may_wait {
            locked(&self.now).insert(name.clone(), told);
        } else {
            let text = format!(
                "{name} refers to rows of table {parents}, and no right drop of that came within source.wait. It lies \
                 in rejected/: put it into the inbox again when that one is there."
            );
            locked(&self.over).insert(format!("{IN_VAIN}{instance} {table}"), (format!("{name} was rejected"), text));
        }
        may_wait
    }

    /// Whether an instance has waited for drops that its first version lacks, at `now`, for as long as `longest`.
    pub(super) fn is_late(&self, instance: &Instance, reason: &str, now: Timestamp, longest: Duration) -> bool {
        let key = instance.to_string();
        let told = self.told(&key, now);
        locked(&self.now).insert(key, told);
        let is_late = since(now, told) >= longest;
        if is_late {
            let notice = (
                format!("{instance} waits for drops"),
                format!("{reason}, and nothing of it is published until then."),
            );
            locked(&self.late).insert(format!("{LACKS}{instance}"), notice);
        }
        is_late
    }

    /// When it was first told that something waits. The clock may have been ahead.
    fn told(&self, what: &str, now: Timestamp) -> Timestamp {
        self.before.get(what).map_or(now, |told| (*told).min(now))
    }
}

impl Run<'_> {
    /// Tells of what waits for long, until that is out, and of what waited in vain. The latter ends when a drop of its
    /// table is out, or nobody has that table any more: drops of others say nothing of its rows.
    pub(super) async fn tell_waits(
        &self,
        drops: &Drops,
        settled: &[Instance],
        report: &PublishReport,
    ) -> Result<(), PublishError> {
        if self.options.dry_run {
            return Ok(());
        }
        let went_well = report.instances.values().any(InstanceReport::is_well);
        let ends = |of: &str| {
            let (instance, table) = of.split_once(' ').map_or((of, None), |(i, t)| (i, t.parse::<TableName>().ok()));
            let Ok(instance) = instance.parse::<Instance>() else { return true };
            let Some(entry) = report.instances.get(&instance) else {
                return went_well && self.is_asked(&instance.stream);
            };
            let is_out = entry.outcome == Outcome::Published || settled.contains(&instance);
            let came = |table: &TableName| drops.tables.get(&instance).is_some_and(|tables| tables.contains_key(table));
            let is_gone = |table: &TableName| !entry.tables.is_empty() && !entry.tables.contains_key(table);
            is_out && table.is_none_or(|table| came(&table) || is_gone(&table))
        };
        for (begins, told) in [(IN_VAIN, &self.waits.over), (LACKS, &self.waits.late)] {
            let mut told = std::mem::take(&mut *locked(told));
            let open = mail::open_notices(self.ledger, begins).await?;
            for what in open.into_iter().filter(|what| what.strip_prefix(begins).is_some_and(|of| !ends(of))) {
                told.entry(what).or_default();
            }
            mail::publish_notices(self.ledger, self.clock, begins, &told).await?;
        }
        Ok(())
    }

    /// Keeps in mind what waits, for as long as a drop of that name lies there, or the instance is not out; after the
    /// inbox was cleared.
    pub(super) async fn note_waits(&self, inbox: &Inbox, report: &PublishReport) -> Result<(), PublishError> {
        if self.options.dry_run {
            return Ok(());
        }
        let mut all = self.waits.before.clone();
        all.append(&mut locked(&self.waits.now).clone());
        all.retain(|what, _| match what.parse::<Instance>() {
            Ok(instance) => {
                let entry = report.instances.get(&instance);
                entry.map_or(!self.is_asked(&instance.stream), |e| !e.is_well())
            }
            Err(_) => inbox.has(what),
        });
        if all != self.waits.before {
            let text = serde_json::to_string(&all).map_err(|e| PublishError::Machine(e.to_string()))?;
            self.ledger.set_fact(WAITS, &text).await?;
        }
        Ok(())
    }
}

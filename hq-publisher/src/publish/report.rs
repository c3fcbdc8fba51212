//! What a publish did: for people a line an instance, for programs JSON, for scripts an exit code.

use crate::bucket::Lag;
use crate::diff::TableChange;
use crate::plan::Plan;
use crate::some::some;
use proto::ids::{Instance, StoreId, TableName, Version};
use proto::layout::PackKind;
use serde::Serialize;
use std::collections::BTreeMap;

/// How an instance came out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A new version is out (in a dry run: would be).
    Published,
    /// The same of a dry run, as programs are told it.
    WouldBePublished,
    /// Nothing changed.
    #[default]
    Unchanged,
    /// It cannot be published.
    Refused,
    /// It could be, but another instance of its stream is refused, or a stream that it requires.
    HeldBack,
    /// Not all drops of its first version have come yet.
    Waiting,
}

impl Outcome {
    /// For people.
    pub fn word(self, dry_run: bool) -> &'static str {
        match self {
            Outcome::Published if !dry_run => "published",
            Outcome::Published | Outcome::WouldBePublished => "would be published",
            Outcome::Unchanged => "unchanged",
            Outcome::Refused => "REFUSED",
            Outcome::HeldBack => "held back",
            Outcome::Waiting => "waiting",
        }
    }
}

/// A pack that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackReport {
    /// Full or delta.
    pub kind: PackKind,
    /// Its length.
    pub bytes: u64,
    /// Rows in it.
    pub rows: u64,
}

/// One instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct InstanceReport {
    /// How it came out.
    pub outcome: Outcome,
    /// The version that it has now.
    pub version: Option<Version>,
    /// What was planned and why.
    pub plan: Option<Plan>,
    /// A stable name of the reason of a refusal.
    pub code: Option<&'static str>,
    /// The reason, for people.
    pub reason: String,
    /// Rows by table and operation.
    pub tables: BTreeMap<TableName, TableChange>,
    /// The packs.
    pub packs: Vec<PackReport>,
    /// Rows that cannot be published, all counted.
    pub bad_rows: u64,
    /// The first of them.
    pub faults: Vec<String>,
    /// With an inbox: no drop came, so that nothing is better than it was.
    #[serde(skip)]
    pub rested: bool,
    /// In a ledger that was set back: whether no version is out that it does not know.
    #[serde(skip)]
    pub is_newest: bool,
    /// Stores that are to go over to it stay where they are.
    #[serde(skip)]
    pub keeps_away: bool,
}

/// A drop that went to `rejected/` (in a dry run: would go).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rejected {
    /// The file.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What `publish` did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PublishReport {
    /// Nothing was changed, this is what would be.
    pub dry_run: bool,
    /// Each instance that was looked at.
    pub instances: BTreeMap<Instance, InstanceReport>,
    /// Stores that the source has.
    pub stores: usize,
    /// Stores that this run found it to have no longer.
    pub vanished: Vec<StoreId>,
    /// Manifests signed by this run.
    pub signed: usize,
    /// Versions of an earlier run that was cut short, finished by this one.
    pub finished: Vec<String>,
    /// Drops that were refused.
    pub rejected: Vec<Rejected>,
    /// What may be as it should.
    pub notes: Vec<String>,
    /// What else somebody should know and mend.
    pub problems: Vec<String>,
    /// What is missing in mirrors.
    pub lag: Lag,
    /// Packs deleted by age.
    pub deleted: usize,
}

impl PublishReport {
    /// 0 done or nothing to do, 1 all refused, 3 done in part.
    pub fn exit_code(&self) -> u8 {
        let is = |o: &[Outcome]| self.instances.values().any(|i| o.contains(&i.outcome));
        let failed =
            is(&[Outcome::Refused, Outcome::HeldBack]) || !self.rejected.is_empty() || !self.problems.is_empty();
        let went_on = is(&[Outcome::Published, Outcome::Unchanged]);
        match (failed, went_on) {
            (true, false) => 1,
            (true, true) => 3,
            (false, _) if !self.lag.mirrors.is_empty() => 3,
            (false, _) => 0,
        }
    }

    /// As programs are told it: of a dry run nothing is called published.
    pub fn for_programs(mut self) -> Self {
        for entry in self.instances.values_mut().filter(|e| self.dry_run && e.outcome == Outcome::Published) {
            entry.outcome = Outcome::WouldBePublished;
        }
        self
    }

    /// The report for people.
    pub fn lines(&self) -> Vec<String> {
        let mut out: Vec<String> = self.instances.iter().flat_map(|(i, r)| r.lines(i, self.dry_run)).collect();
        out.extend(self.finished.iter().map(|f| format!("finished what an earlier run began: {f}")));
        let rejected = if self.dry_run { "would be rejected:" } else { "rejected" };
        out.extend(self.rejected.iter().map(|r| format!("{rejected} {}: {}", r.name, r.reason)));
        if !self.vanished.is_empty() {
            out.push(format!("no longer in the list of stores: {}", some(&self.vanished, ", ")));
        }
        out.extend(self.notes.iter().map(|n| format!("note: {n}")));
        out.extend(self.problems.iter().map(|p| format!("problem: {p}")));
        out.extend(self.lag.mirrors.iter().map(|l| format!("mirror: {l}")));
        if !self.dry_run {
            out.push(format!("{} stores, {} manifests signed", self.stores, self.signed));
        }
        out
    }
}

impl InstanceReport {
    /// Whether its rows were looked at, and are out.
    pub fn is_well(&self) -> bool {
        matches!(self.outcome, Outcome::Published | Outcome::Unchanged) && !self.rested
    }

    fn lines(&self, instance: &Instance, dry_run: bool) -> Vec<String> {
        let version = self.version.map_or(String::new(), |v| format!(" {v}"));
        let word = self.outcome.word(dry_run);
        let why = match (&self.plan, self.reason.is_empty()) {
            (_, false) => format!(": {}", self.reason),
            (Some(plan), true) if self.outcome == Outcome::Published => format!(" ({plan})"),
            _ => String::new(),
        };
        let mut line = format!("{instance}{version} {word}{why}");
        if matches!(self.outcome, Outcome::Published | Outcome::HeldBack) {
            // An instance that begins empty is worth a look.
            let first = self.plan.as_ref().is_some_and(|p| p.full && !p.delta);
            for (table, t) in self.tables.iter().filter(|(_, t)| first || t.rows.total() > 0) {
                let r = t.rows;
                line.push_str(&format!("; {table}: {} deleted, {} updated, {} inserted", r.delete, r.update, r.insert));
            }
            for p in &self.packs {
                line.push_str(&format!("; {} {} bytes", p.kind, p.bytes));
            }
        }
        let mut out = vec![line];
        out.extend(self.faults.iter().map(|f| format!("  {f}")));
        let untold = self.bad_rows.saturating_sub(self.faults.len() as u64);
        if untold > 0 {
            out.push(format!("  and {untold} more"));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: &[Outcome]) -> PublishReport {
        let mut r = PublishReport::default();
        for (n, outcome) in outcomes.iter().enumerate() {
            let instance = format!("s{n}@all").parse().unwrap();
            r.instances.insert(instance, InstanceReport { outcome: *outcome, ..InstanceReport::default() });
        }
        r
    }

    #[test]
    fn exit_codes_are_the_designs() {
        use Outcome::*;
        for (outcomes, code) in [
            (&[][..], 0),
            (&[Published, Unchanged], 0),
            (&[Waiting], 0),
            (&[Refused], 1),
            (&[Refused, HeldBack], 1),
            (&[HeldBack], 1),
            (&[HeldBack, Unchanged], 3),
            (&[Refused, Unchanged], 3),
            (&[Refused, Published], 3),
        ] {
            assert_eq!(report(outcomes).exit_code(), code, "{outcomes:?}");
        }
        let mut lagging = report(&[Published]);
        lagging.lag.mirrors.push("x".into());
        assert_eq!(lagging.exit_code(), 3);
    }
    #[test]
    fn a_dry_run_is_not_told_as_done() {
        let mut dry = PublishReport { dry_run: true, ..report(&[Outcome::Published, Outcome::Unchanged]) };
        dry.rejected.push(Rejected { name: "x.csv".into(), reason: "no".into() });
        assert_eq!(dry.lines(), ["s0@all would be published", "s1@all unchanged", "would be rejected: x.csv: no"]);
        let json = |r: PublishReport| serde_json::to_value(r.for_programs()).unwrap()["instances"]["s0@all"].clone();
        assert_eq!(json(dry)["outcome"], "would-be-published");
        assert_eq!(json(report(&[Outcome::Published]))["outcome"], "published");
    }
}

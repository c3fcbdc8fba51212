//! One instance, from its source to packs that are proved: everything before the commit point.

use super::contracts::Stream;
use super::feed::{Feed, Kept, ReadError, faults_text};
use super::make::{Digests, MakeError, Making, PACK_LIMITS, too_large};
use super::report::{InstanceReport, Outcome};
use super::steps::{Phase, Step};
use super::{PublishError, Run};
use crate::bucket::Content;
use crate::diff::{Diff, DiffError, Spool, TableChange, compare};
use crate::guard::{self, Bounds};
use crate::inbox::{Drop, What};
use crate::ledger::Head;
use crate::plan::{Facts, plan};
use crate::rebuild::{self, RebuildError};
use crate::scratch::{Missed, Scratch, ScratchError};
use crate::source::Faults;
use proto::ids::{Instance, StreamName, TableName, Version, Zone};
use proto::layout::ObjectName;
use proto::manifest::PackEntry;
use proto::pack::RowCounts;
use proto::replica::{Replica, VerifyError, sqlite};
use proto::retry::Verdict;
use proto::schema::Contract;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What somebody is to do about it.
fn set_back(stream: &StreamName) -> String {
    format!(
        "the ledger was set back, and stores may have a newer version than it knows: drop all its files again. To publish \
         the old rows, run with --full --stream {stream}"
    )
}

/// Objects whose version is further ahead than this are somebody's mistake, not ours.
pub(super) const FAR_AHEAD: u64 = 1_000_000;

/// A version whose packs are made and proved, and lie aside.
pub struct Ready {
    /// Whose.
    pub instance: Instance,
    /// Its number.
    pub version: Version,
    /// The published replica with the version applied and not committed; none when too many are open.
    pub replica: Option<Replica>,
    /// The packs with their files; the first (the delta if there is one) is applied here.
    pub packs: Vec<(PackEntry, PathBuf)>,
    /// The state digests after them.
    pub digests: Digests,
}

/// An instance that cannot be published.
pub struct Refusal {
    /// A stable name.
    pub code: &'static str,
    /// For people.
    pub text: String,
    /// Bad rows.
    pub faults: Faults,
    /// Drops to move to `rejected/`, with the reason for each.
    pub reject: Vec<(Drop, String)>,
}

/// Why staging ended.
pub enum Stop {
    /// This stream is not published; others go on.
    Refused(Box<Refusal>),
    /// The whole run ends.
    Fatal(PublishError),
}

impl<E: Into<PublishError>> From<E> for Stop {
    fn from(e: E) -> Self {
        Stop::Fatal(e.into())
    }
}

pub(super) fn refused(code: &'static str, text: impl Into<String>) -> Stop {
    Stop::Refused(Box::new(Refusal { code, text: text.into(), faults: Faults::default(), reject: Vec::new() }))
}

/// The published rows and what they are published under.
pub(super) struct Published {
    pub(super) replica: Replica,
    contract: Contract,
    ddl_is_same: bool,
}

impl Published {
    /// Brings the published rows to a new contract, in a transaction that the caller rolls back. Gives the statements, or
    /// why only a full can.
    fn migrate(&mut self, stream: &StreamName, new: &Contract) -> Result<Result<Vec<String>, String>, CompareError> {
        let statements = match new.additive_since(&self.contract) {
            Ok(statements) => statements,
            Err(e) => return Ok(Err(e.to_string())),
        };
        match self.replica.preview_migration(&statements) {
            Ok(()) => Ok(Ok(statements)),
            // Readers have the same rows, unless those here drifted.
            Err(e) if e.is_refused() => {
                self.prove(stream)?;
                Ok(Err(format!("the rows that are out do not take {e}")))
            }
            Err(e) => Err(damaged(e.inner(), &e)),
        }
    }

    /// Recomputes its digests.
    fn prove(&self, stream: &StreamName) -> Result<(), CompareError> {
        let checks = self.replica.verify(stream).map_err(|e| match e {
            VerifyError::Sqlite(e) => damaged(e.inner(), &e),
            VerifyError::Contract { .. } => refused("REPLICA", e.to_string()).into(),
        })?;
        match checks.iter().find(|c| !c.is_right()) {
            Some(wrong) => {
                Err(CompareError::Damaged(format!("the rows of table {} are not those published", wrong.table)))
            }
            None => Ok(()),
        }
    }
}

/// How the new rows compare.
pub(super) struct Compared {
    pub(super) diff: Diff,
    pub(super) spool: Spool,
    /// The statements that bring the published contract to the new one.
    pub(super) migrate: Vec<String>,
    /// Why only a full can.
    rebuild: Option<String>,
}

/// Rows that cannot be published: the drops with them are rejected. One that `may_wait`, and whose rows only refer to rows of a
/// table that no drop, or a `wrong` one, came for, stays: that may be on its way, and this one would be lost when it comes.
fn bad_rows(
    instance: &Instance,
    faults: Faults,
    wrong: &BTreeSet<TableName>,
    missed: &Missed,
    drops: &[Drop],
    may_wait: impl Fn(&Drop, &str) -> bool,
) -> Refusal {
    let of_tables = drops.iter().filter_map(|d| match &d.what {
        Ok(What::Table { table, .. }) => Some((table, d)),
        _ => None,
    });
    let drops: BTreeMap<&TableName, &Drop> = of_tables.collect();
    let is_to_come = |t: &TableName| wrong.contains(t) || !drops.contains_key(t);
    let (mut reject, mut text) = (Vec::new(), String::new());
    for (&table, &drop) in drops.iter().filter(|(t, _)| faults.first.iter().any(|f| f.table == ***t)) {
        let parents = missed.get(table).filter(|all| !wrong.contains(table) && all.iter().all(is_to_come));
        let parents = parents.map(|all| all.iter().map(TableName::as_str).collect::<Vec<_>>().join(", "));
        match parents.filter(|parents| may_wait(drop, parents)) {
            Some(parents) => text.push_str(&format!(
                "; {} stays until a right drop of table {parents} comes, or source.wait is over",
                drop.file.name
            )),
            None => reject.push((drop.clone(), faults_text(instance, &faults, table))),
        }
    }
    let files: Vec<&str> = reject.iter().map(|(d, _)| d.file.name.as_str()).collect();
    let files = if files.is_empty() { String::new() } else { format!(" in {}", files.join(", ")) };
    let text = format!("{} bad rows{files}; nothing of stream {} is published{text}", faults.count, instance.stream);
    Refusal { code: "BAD_ROWS", text, faults, reject }
}

/// What to do for an instance.
pub struct Task<'t> {
    /// The stream.
    pub stream: &'t Stream,
    /// The instance.
    pub instance: &'t Instance,
    /// The zone that `:zone` means.
    pub zone: Option<&'t Zone>,
    /// Only find out whether it could be published: its stream is refused already.
    pub only_check: bool,
    /// Keep the transaction on its replica open.
    pub keep_open: bool,
}

impl Run<'_> {
    /// Reads, compares, plans and (if there is something to publish) packs and validates one
    /// instance. Gives what is ready to be put, if anything.
    pub async fn stage(
        &self,
        task: &Task<'_>,
        feed: &mut Feed,
        report: &mut InstanceReport,
    ) -> Result<Option<Ready>, Stop> {
        let (instance, contract) = (task.instance, &task.stream.contract);
        let head = self.heads.get(instance);
        report.version = head.map(|h| h.version);
        let drops = feed.drops_of(instance);
        if self.may_rest(task, feed, head, &drops, report) {
            self.is_newest(instance, head, report).await?;
            return Ok(None);
        }
        for attempt in 0.. {
            // 1. What is published, and the new rows under their contract. With an inbox both are read again where the
            // former was damaged: what no drop came for is kept from it.
            let mut published = self.published(instance, head, contract, attempt > 0).await?;
            self.progress.phase(instance, Phase::Reading);
            let read = self.read(task, feed, published.as_ref(), &drops, report).await;
            // 2. What changed, and whether that may be.
            let compared = read.and_then(|scratch| {
                self.progress.phase(instance, Phase::Comparing);
                let compared = tokio::task::block_in_place(|| self.compare(task, &scratch, published.as_mut()))?;
                Ok((scratch, compared))
            });
            let (scratch, mut compared) = match compared {
                Err(CompareError::Damaged(why)) if attempt == 0 => {
                    tracing::warn!(%instance, why, "the published replica is made anew");
                    continue;
                }
                other => other.map_err(Stop::from)?,
            };
            report.tables = compared.diff.tables.clone();
            report.packs.clear();
            self.guard(task, &compared)?;
            // 3. What to make of it.
            let mut facts = self.facts(task, head, &compared, published.as_ref());
            // A ledger that was set back with its source finds the same rows below a version that is out.
            if plan(&facts).is_nothing() && !self.behind.contains(instance) {
                report.plan = Some(plan(&facts));
                return Ok(None);
            }
            let next = self.next_version(instance, head, &mut facts).await?;
            let is_asked = self.options.full && self.options.stream.is_some();
            if facts.ahead && matches!(feed, Feed::Inbox(_)) && !is_asked {
                self.refuse_old_rows(task, &drops)?;
            }
            let plan = plan(&facts);
            report.plan = Some(plan.clone());
            if plan.is_nothing() {
                return Ok(None);
            }
            if task.only_check {
                report.outcome = Outcome::HeldBack;
                report.reason = "another instance of the stream is refused".into();
                return Ok(None);
            }
            // What is listed stays as it is: who has these limits too would not take the next list of the stream.
            let mut listed = head.into_iter().flat_map(|h| &h.packs);
            if !self.options.full
                && let Some(text) = listed.find_map(|p| too_large(instance, p, &self.config.limits))
            {
                let way = "Or publish --full twice: then it is listed no more";
                return Err(refused(
                    PACK_LIMITS,
                    format!("what is published is over limits that were lowered: {text}. {way}"),
                ));
            }
            // 4. The packs, aside; applied to the published replica: the code that registers run.
            let making = Making { run: self, task, head, version: next, plan: &plan, source: feed.name(self.config) };
            let made = making.make(&scratch, &mut compared, published.take(), report).await;
            let made = match made {
                Err(MakeError::Drift(why)) if attempt == 0 => {
                    tracing::warn!(%instance, why, "the published replica drifted; it is made anew");
                    self.give_up(instance, next).await?;
                    continue;
                }
                Err(MakeError::Drift(why)) => {
                    self.give_up(instance, next).await?;
                    return Err(refused("VALIDATION", format!("the packs do not apply to the published rows: {why}")));
                }
                Err(MakeError::Stop(Stop::Refused(r))) => {
                    self.give_up(instance, next).await?;
                    return Err(Stop::Refused(r));
                }
                Err(MakeError::Stop(fatal)) => return Err(fatal),
                Ok(made) => made,
            };
            report.outcome = Outcome::Published;
            report.version = Some(next);
            return Ok(made);
        }
        Ok(None)
    }

    /// With an inbox: whether there is nothing to read at all, or not yet all that a first version needs, or one of what no
    /// store followed for a while: it would have rows of long ago.
    fn may_rest(
        &self,
        task: &Task<'_>,
        feed: &Feed,
        head: Option<&Head>,
        drops: &[Drop],
        report: &mut InstanceReport,
    ) -> bool {
        let Feed::Inbox(all) = feed else { return false };
        let came = all.tables.get(task.instance);
        let tables = task.stream.contract.tables.iter().map(|t| &t.name);
        let lacking = tables.filter(|t| came.is_none_or(|came| !came.contains_key(*t)));
        let lacking: Vec<&str> = lacking.map(TableName::as_str).collect();
        if head.is_none_or(|h| h.retired) && !lacking.is_empty() && !all.doubles.contains_key(task.instance) {
            (report.outcome, report.rested) = (Outcome::Waiting, true);
            report.reason = match drops.is_empty() {
                true => "no drop has come for it yet".into(),
                false => format!("no drop has come for table {} yet; what came for others stays", lacking.join(", ")),
            };
            let (now, longest) = (self.clock.now(), self.config.source.wait.0);
            // Who has nothing of a stream that others have is behind in nothing, and looks well.
            let is_in_use = self.heads.keys().any(|i| i.stream == task.instance.stream);
            let is_missed = is_in_use && self.awaited.contains(task.instance);
            let is_late =
                (is_missed || !drops.is_empty()) && self.waits.is_late(task.instance, &report.reason, now, longest);
            // A stream may be meant for some only: of whom no drop ever comes a mail tells, and no run fails for it.
            if is_late && !drops.is_empty() {
                self.problem(format!("{}: {}", task.instance, report.reason));
            }
            return true;
        }
        if !drops.is_empty() {
            return false;
        }
        let same = self.contract_is_known(task.instance, head, &task.stream.contract);
        let is_stuck = self.reported.get(task.instance).is_some_and(|r| r.is_stuck);
        let is_wanted = self.options.full || self.lacked.contains(task.instance) || is_stuck;
        report.rested = head.is_none_or(|h| same && !is_wanted && h.epoch == self.epoch);
        report.rested
    }

    /// Of a ledger that was set back, what no drop brings has the backup's rows: stores have newer ones.
    fn refuse_old_rows(&self, task: &Task<'_>, drops: &[Drop]) -> Result<(), Stop> {
        let is_old =
            |t: &TableName| !drops.iter().any(|d| matches!(&d.what, Ok(What::Table { table, .. }) if table == t));
        let old: Vec<&str> =
            task.stream.contract.tables.iter().map(|t| &t.name).filter(|t| is_old(t)).map(TableName::as_str).collect();
        if old.is_empty() || !self.behind.contains(task.instance) {
            return Ok(());
        }
        let text = format!("no drop has come for {}: {}", old.join(", "), set_back(&task.stream.name));
        Err(refused("SET_BACK", text))
    }

    /// Of what nothing is read, in a ledger that was set back: whether a newer version is out, whose rows nobody here has.
    async fn is_newest(
        &self,
        instance: &Instance,
        head: Option<&Head>,
        report: &mut InstanceReport,
    ) -> Result<(), PublishError> {
        if !self.behind.contains(instance) {
            return Ok(());
        }
        let mut facts = Facts::default();
        self.next_version(instance, head, &mut facts).await?;
        report.is_newest = !facts.ahead;
        if facts.ahead {
            self.problem(format!("{instance}: {}", set_back(&instance.stream)));
        }
        Ok(())
    }

    /// Whether the head was published under this very contract.
    fn contract_is_known(&self, instance: &Instance, head: Option<&Head>, contract: &Contract) -> bool {
        let known = self.contract_numbers.get(&instance.stream);
        head.is_some_and(|h| known.is_some_and(|(number, sha256)| *number == h.schema && *sha256 == contract.sha256))
    }

    /// The published replica, at its head.
    async fn published(
        &self,
        instance: &Instance,
        head: Option<&Head>,
        new: &Contract,
        anew: bool,
    ) -> Result<Option<Published>, Stop> {
        let Some(head) = head else { return Ok(None) };
        let replica = match self.replica_at_head(instance, head, new, anew).await {
            Ok(replica) => replica,
            // Only new rows can mend that, and somebody must say so: nothing guards them.
            Err(e) if e.needs_full() && self.options.full => {
                tracing::warn!(%instance, error = %e, "published anew by --full");
                return Ok(None);
            }
            Err(e) if e.needs_full() => {
                return Err(refused(
                    "REPLICA",
                    format!("{e}. To publish it anew from the source, run again with --full"),
                ));
            }
            Err(e) => return Err(PublishError::from(e).into()),
        };
        let held = replica.held(&instance.stream)?;
        let ddl = held.map_or_else(|| new.ddl.clone(), |h| h.ddl);
        let ddl_is_same = ddl == new.ddl;
        let contract = if ddl_is_same {
            new.clone()
        } else {
            Contract::parse(&ddl, &self.config.limits)
                .map_err(|e| refused("REPLICA", format!("the published contract cannot be read: {e}")))?
        };
        Ok(Some(Published { replica, contract, ddl_is_same }))
    }

    /// A dry run leaves the replica alone: it reads it as it lies, or makes one of its own.
    async fn replica_at_head(
        &self,
        instance: &Instance,
        head: &Head,
        new: &Contract,
        anew: bool,
    ) -> Result<Replica, RebuildError> {
        let path = self.replica_path(instance);
        if !self.options.dry_run {
            return rebuild::published(self.workshop(), &path, instance, head, anew).await;
        }
        let same_contract = self.contract_is_known(instance, Some(head), new);
        if !anew
            && same_contract
            && let Some(replica) = super::read_only_at(&path, instance, head, self.config)
        {
            return Ok(replica);
        }
        let path = self.scratch_dir.join(format!("{instance}.published.db"));
        rebuild::published(self.workshop(), &path, instance, head, true).await
    }

    /// Loads the new rows into a scratch database. Bad rows are a refusal.
    async fn read(
        &self,
        task: &Task<'_>,
        feed: &mut Feed,
        published: Option<&Published>,
        drops: &[Drop],
        report: &mut InstanceReport,
    ) -> Result<Scratch, CompareError> {
        let (instance, contract) = (task.instance, &task.stream.contract);
        let path = self.scratch_dir.join(format!("{instance}.db"));
        let scratch = tokio::task::block_in_place(|| Scratch::create(&path, contract))?;
        let mut faults = Faults::telling(self.config.publish.errors_listed);
        // Nothing is kept of what no store wanted for a while: it is as old as that.
        let is_old = self.heads.get(instance).is_some_and(|h| h.retired);
        let published = published.filter(|_| !is_old);
        // What no drop came for goes out again as it is there.
        if let (Feed::Inbox(_), Some(p)) = (&*feed, published)
            && drops.len() < contract.tables.len()
        {
            tokio::task::block_in_place(|| p.prove(&instance.stream))?;
        }
        let kept = published.map(|p| Kept { replica: &p.replica, contract: &p.contract });
        match feed.read(self.config, task, kept, &scratch, &mut faults).await {
            Ok(()) => {}
            Err(ReadError::Scratch(e)) => return Err(e.into()),
            Err(ReadError::Source(code, text)) => return Err(refused(code, text).into()),
            Err(ReadError::Drop(drop, e)) => {
                let text = format!("{}: {e}", drop.file.name);
                let reject = vec![(*drop, e.to_string())];
                return Err(Stop::Refused(Box::new(Refusal { code: "DROP", text, faults, reject })).into());
            }
        }
        let wrong: BTreeSet<TableName> = faults.first.iter().map(|f| f.table.clone()).collect();
        let missed = tokio::task::block_in_place(|| {
            let missed = scratch.check_references(contract, &mut faults)?;
            scratch.finish().map(|()| missed)
        })?;
        if faults.is_empty() {
            return Ok(scratch);
        }
        report.bad_rows = faults.count;
        report.faults = faults.first.iter().map(|f| format!("{instance}: {f}")).collect();
        // Its whole stream waits with it.
        let (now, longest) = (self.clock.now(), self.config.source.wait.0);
        let may_wait = |drop: &Drop, parents: &str| self.waits.may_wait(drop, parents, now, longest);
        Err(Stop::Refused(Box::new(bad_rows(instance, faults, &wrong, &missed, drops, may_wait))).into())
    }

    /// Compares the new rows with the published ones.
    fn compare(
        &self,
        task: &Task<'_>,
        scratch: &Scratch,
        published: Option<&mut Published>,
    ) -> Result<Compared, CompareError> {
        let (instance, contract) = (task.instance, &task.stream.contract);
        let spool = Spool::new(&self.scratch_dir.join(format!("{instance}.spool")));
        let mut compared = Compared { diff: Diff::default(), spool, migrate: Vec::new(), rebuild: None };
        let Some(p) = published else {
            compared.diff = counted(scratch, contract, None)?;
            return Ok(compared);
        };
        if !p.ddl_is_same {
            match p.migrate(&instance.stream, contract)? {
                Ok(statements) => compared.migrate = statements,
                Err(why) if self.options.allow_rebuild => {
                    compared.rebuild = Some(why);
                    compared.diff = counted(scratch, contract, Some(p))?;
                    return Ok(compared);
                }
                Err(why) => {
                    let text = format!("{why}; such a change needs a new full: publish with --allow-rebuild");
                    return Err(CompareError::Stop(refused("REBUILD", text)));
                }
            }
        }
        let result = contract.tables.iter().try_for_each(|table| {
            compare(Some(p.replica.connection()), scratch.connection(), table, &mut compared.spool, &mut compared.diff)
        });
        p.replica.rollback();
        result.map_err(|e| match &e {
            DiffError::Sqlite { source, .. } => damaged(source, &e),
            DiffError::Spool { .. } => CompareError::Stop(Stop::Fatal(PublishError::Machine(e.to_string()))),
        })?;
        Ok(compared)
    }

    /// The shrink guard.
    fn guard(&self, task: &Task<'_>, compared: &Compared) -> Result<(), Stop> {
        if self.may_shrink(&task.stream.name) {
            return Ok(());
        }
        let shrunk = guard::check_tables(&compared.diff.tables, self.bounds());
        if shrunk.is_empty() {
            return Ok(());
        }
        let what: Vec<String> = shrunk.iter().map(ToString::to_string).collect();
        let text = format!("{}. If that is right, run again with --allow-shrink {}", what.join("; "), task.stream.name);
        Err(refused("SHRINK", text))
    }

    /// `publish.shrink_percent` and `publish.shrink_rows`.
    pub fn bounds(&self) -> Bounds {
        Bounds { percent: self.config.publish.shrink_percent, rows: self.config.publish.shrink_rows }
    }

    fn facts(&self, task: &Task<'_>, head: Option<&Head>, c: &Compared, published: Option<&Published>) -> Facts {
        Facts {
            published: published.is_some(),
            changed_rows: c.diff.tables.values().map(|t| t.rows.total()).sum(),
            new_contract: published.is_some_and(|p| !p.ddl_is_same),
            rebuild: c.rebuild.clone(),
            new_epoch: head.is_some_and(|h| h.epoch != self.epoch),
            ahead: false,
            asked: self.options.full,
            lacked: self.lacked.contains(task.instance),
            reported: self.reported.get(task.instance).cloned(),
            deltas: head.map_or(0, |h| h.deltas_since_full().count() as u64),
            delta_bytes: head.map_or(0, |h| h.deltas_since_full().map(|p| p.bytes).sum()),
            full_bytes: head.and_then(|h| h.last_full()).map_or(0, |p| p.bytes),
            most_deltas: self.config.publish.deltas,
        }
    }

    /// 1 + the greatest of the ledger, the head (from manifests), the objects listed and what devices hold.
    async fn next_version(
        &self,
        instance: &Instance,
        head: Option<&Head>,
        facts: &mut Facts,
    ) -> Result<Version, PublishError> {
        let known = self.ledger.max_version(instance).await?.max(head.map(|h| h.version));
        let known = known.map_or(0, Version::get);
        // Whose bucket was set back too, the devices alone know what was out.
        let held = self.held_out.get(instance).map_or(0, |v| v.get());
        let (mut greatest, mut out) = (known.max(held), held);
        for (name, _) in self.buckets.list_packs(instance).await? {
            let version = name.version.get();
            if version > known.saturating_add(FAR_AHEAD) {
                self.problem(format!(
                    "{name} in the bucket is far beyond version {known}: it is not ours and is left out of account"
                ));
            } else {
                greatest = greatest.max(version);
                out = out.max(version);
            }
        }
        // A ledger that was set back may have given up a number that went out: only what it published counts.
        let published = head.filter(|_| self.behind.contains(instance)).map(|h| h.version.get());
        facts.ahead = published.map_or(greatest > known, |p| out > p) && head.is_some();
        Version::try_from(greatest.saturating_add(1)).map_err(|e| PublishError::Machine(format!("{instance}: {e}")))
    }

    /// Puts the packs, each only if its name is free, and records them.
    pub async fn put(&self, one: &Ready) -> Result<(), PublishError> {
        let Some(token) = self.token else { return Ok(()) };
        self.progress.phase(&one.instance, Phase::Putting);
        for (entry, path) in &one.packs {
            let name = entry.name(&one.instance);
            let content = Content::File { path: path.as_path(), bytes: entry.bytes, sha256: entry.sha256 };
            self.step(Step::PutPack(name.clone()), self.buckets.put_new(&ObjectName::Pack(name), content)).await?;
        }
        let entries: Vec<PackEntry> = one.packs.iter().map(|(e, _)| e.clone()).collect();
        let packed = self.ledger.packed(token, &one.instance, one.version, &entries, &one.digests);
        self.step(Step::Packed(one.instance.clone(), one.version), packed).await
    }

    /// Gives up a number that was taken.
    pub async fn give_up(&self, instance: &Instance, version: Version) -> Result<(), PublishError> {
        let Some(token) = self.token else { return Ok(()) };
        let step = Step::Abandon(instance.clone(), version);
        self.step(step, self.ledger.abandon(token, instance, version)).await
    }
}

/// Comparing went wrong.
enum CompareError {
    /// The published replica cannot be read.
    Damaged(String),
    /// Something else.
    Stop(Stop),
}
impl From<CompareError> for Stop {
    fn from(e: CompareError) -> Self {
        match e {
            CompareError::Damaged(why) => refused("REPLICA", format!("the published replica is damaged: {why}")),
            CompareError::Stop(stop) => stop,
        }
    }
}
impl From<Stop> for CompareError {
    fn from(stop: Stop) -> Self {
        CompareError::Stop(stop)
    }
}
impl From<ScratchError> for CompareError {
    fn from(e: ScratchError) -> Self {
        CompareError::Stop(e.into())
    }
}

/// The published replica failed: where a table or column of it is gone, too, it is made anew.
fn damaged(cause: &rusqlite::Error, e: &dyn std::fmt::Display) -> CompareError {
    match sqlite::verdict(cause) {
        Verdict::Rebuild | Verdict::Quarantine => CompareError::Damaged(e.to_string()),
        _ if sqlite::is_misfit(cause) => CompareError::Damaged(e.to_string()),
        _ => CompareError::Stop(Stop::Fatal(PublishError::Machine(e.to_string()))),
    }
}

/// Rows of the scratch database counted, without a comparison: everything is new.
fn counted(scratch: &Scratch, contract: &Contract, published: Option<&Published>) -> Result<Diff, CompareError> {
    let fatal = |e: rusqlite::Error| CompareError::Stop(Stop::Fatal(PublishError::Machine(e.to_string())));
    let count = |db: &rusqlite::Connection, table: &TableName| {
        let sql = format!("SELECT count(*) FROM \"{table}\"");
        db.query_row(&sql, [], |r| r.get::<_, i64>(0)).map(i64::unsigned_abs)
    };
    let mut diff = Diff::default();
    for table in &contract.tables {
        let after = count(scratch.connection(), &table.name).map_err(fatal)?;
        let before = match published {
            Some(p) if p.contract.table(&table.name).is_some() => {
                count(p.replica.connection(), &table.name).map_err(|e| damaged(&e, &e))?
            }
            _ => 0,
        };
        let rows = RowCounts { insert: after, ..RowCounts::default() };
        let change = TableChange { before, after, gone: before.saturating_sub(after), rows };
        diff.tables.insert(table.name.clone(), change);
    }
    Ok(diff)
}

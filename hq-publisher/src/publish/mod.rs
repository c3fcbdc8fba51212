//! The spine of headquarters: from the source to signed manifests in the bucket.
//!
//! Owns the order of durable steps. Must never decide by itself what changed (`diff`), what to make
//! of it (`plan`), whether it may be (`guard`), or how things are kept (`ledger`, `bucket`). If the
//! power goes before the signature, the number is burnt and nothing has happened; after it, the
//! next run finishes.

pub mod behind;
mod commit;
pub mod contracts;
mod dry_room;
mod error;
mod feed;
mod lease;
mod make;
mod moves;
pub mod report;
mod reported;
mod stage;
pub mod steps;
mod stores;
mod tell;
mod waits;

pub use error::PublishError;
pub use lease::{Lease, host};
pub use report::PublishReport;
pub use steps::{Aborted, Phase, Progress, Quiet, Step, Steps};
pub use tell::NOT_RUN;

use crate::bucket::Buckets;
use crate::config::Config;
use crate::hooks::Post;
use crate::ledger::{Complaint, Head, Ledger, LedgerError, Token};
use crate::mail;
use crate::manifests::{self, Move, Signer, telling};
use crate::plan::Report;
use crate::rebuild::{self, Workshop};
use crate::some::some;
use crate::source::StoreRow;
use contracts::{Contracts, Stream, audiences};
use dry_room::DryRoom;
use feed::Feed;
use futures_util::{StreamExt, TryStreamExt};
use proto::clock::{Clock, since};
use proto::config::ConfigError;
use proto::digest::Sha256;
use proto::failpoint;
use proto::ids::{Audience, Instance, StoreId, StreamName, Version, Zone};
use proto::replica::Replica;
use proto::shelf;
use report::{InstanceReport, Outcome};
use stage::{Ready, Stop, Task};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tell::{tell_of_failure, tell_of_run, warn_untold};
use waits::Waits;

/// Transactions on published replicas that are kept open until the signature. Beyond them a
/// replica is rolled back and applied once more after it.
const OPEN_REPLICAS: usize = 64;

/// The refusal of a store without a zone, of a stream whose queries ask for that.
const NO_ZONE: &str = "NO_ZONE";

/// A run that has lasted longer hangs, and somebody should look.
const LONG_RUN: Duration = Duration::from_secs(3600);

/// What `publish` was asked to do.
#[derive(Debug, Clone, Default)]
pub struct PublishOptions {
    /// Only this stream.
    pub stream: Option<StreamName>,
    /// Tell what would change, publish nothing, mail nothing.
    pub dry_run: bool,
    /// Make fulls.
    pub full: bool,
    /// Let tables shrink: `None` no, `Some(None)` any stream, `Some(Some(s))` that stream.
    pub allow_shrink: Option<Option<StreamName>>,
    /// Let a contract change that needs a rebuild by full.
    pub allow_rebuild: bool,
    /// The clock is right though the ledger is old.
    pub clock_is_right: bool,
}

/// Publishes what changed.
pub async fn run(
    config: &Config,
    options: &PublishOptions,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
    steps: &dyn Steps,
) -> Result<PublishReport, PublishError> {
    // 1. Mistakes in settings and contracts, before anything is touched.
    if let Some(s) = options.stream.as_ref().filter(|s| config.stream(s).is_none()) {
        // Nobody's timer: whoever types it reads it.
        return Err(ConfigError(format!("--stream {s}: there is no such stream in the settings")).into());
    }
    let contracts = match contracts::check(config) {
        Ok(contracts) => contracts,
        Err(e) if options.dry_run => return Err(e.into()),
        Err(e) => {
            let e = e.into();
            // A timer reads no exit codes.
            let told = async { tell_of_failure(&Ledger::open(config).await?, clock.as_ref(), &e).await };
            warn_untold(told.await);
            return Err(e);
        }
    };
    let ledger = Ledger::open(config).await?;
    let mut lease = None;
    let work = async {
        if !options.dry_run {
            // Days without a bucket are no leap of the clock.
            manifests::check_clock(config, &ledger, clock.as_ref(), options.clock_is_right).await?;
        }
        let buckets = Buckets::open(config, &ledger).await?;
        // 2. One publisher at a time. A dry run is none.
        if !options.dry_run {
            lease = Some(take_lease(config, &ledger, clock).await?);
        }
        let (clock, ledger, buckets) = (clock.as_ref(), &ledger, &buckets);
        let tools = Tools { config, options, clock, ledger, buckets, progress, steps };
        tools.publish(lease.as_ref().map(Lease::token), &contracts).await
    };
    let result = match work.await {
        Err(PublishError::Manifests(e)) => telling(&ledger, clock.as_ref(), Err(e)).await.map_err(Into::into),
        other => other,
    };
    if !options.dry_run {
        tell_of_run(&ledger, clock.as_ref(), &result).await;
    }
    if let Some(lease) = lease
        && !matches!(result, Err(PublishError::Aborted(_)))
    {
        lease.release().await;
    }
    ledger.close().await;
    result
}

/// The lease; somebody else's is mailed when it is held for so long that he hangs.
async fn take_lease(config: &Config, ledger: &Ledger, clock: &Arc<dyn Clock>) -> Result<Lease, PublishError> {
    let taken = Lease::acquire(config, ledger, clock).await;
    if let Err(e @ PublishError::LeaseHeld { .. }) = &taken
        && ledger.held_since().await?.is_some_and(|t| since(clock.now(), t) > LONG_RUN)
    {
        warn_untold(tell_of_failure(ledger, clock.as_ref(), e).await);
    }
    taken
}

/// What a run works with.
#[derive(Clone, Copy)]
struct Tools<'a> {
    config: &'a Config,
    options: &'a PublishOptions,
    clock: &'a dyn Clock,
    ledger: &'a Ledger,
    buckets: &'a Buckets,
    progress: &'a dyn Progress,
    steps: &'a dyn Steps,
}

impl Tools<'_> {
    /// Under the lease: makes ready, and runs the spine.
    async fn publish(self, token: Option<Token>, contracts: &Contracts) -> Result<PublishReport, PublishError> {
        let state = &self.config.state.dir;
        let (mut scratch, mut packs) = (state.join("scratch"), state.join("packs"));
        for dir in [&scratch, &packs, &state.join("replicas")] {
            shelf::create_dir(dir)?;
        }
        DryRoom::sweep(&scratch)?;
        // A dry run works aside of a run that may be under way.
        let room = if self.options.dry_run { Some(DryRoom::open(&scratch)?) } else { None };
        if let Some(room) = &room {
            (scratch, packs) = (room.dir.clone(), room.dir.clone());
        }
        let all_anew = self.options.full && self.options.stream.is_none();
        // What a lost ledger forgot is in the bucket, the trust to sign by included.
        if let Some(token) = token {
            let limits = &self.config.limits;
            let shop = Workshop { buckets: self.buckets, limits, packs: &packs, now: self.clock.now() };
            self.steps.before(&Step::Adopt)?;
            let adopted = rebuild::adopt(shop, self.config, self.ledger, token, self.clock);
            failpoint::around(Step::Adopt.failpoint(), adopted).await?;
            self.steps.after(&Step::Adopt)?;
            manifests::check_place(self.ledger, self.buckets, limits, all_anew).await?;
        } else if !all_anew {
            let doubt = manifests::doubt(self.ledger, self.buckets, &self.config.limits).await?;
            doubt.and_then(|d| d.refusal(self.buckets)).map_or(Ok(()), Err)?;
        }
        let right = self.options.clock_is_right;
        let mut signer = if self.options.dry_run {
            Signer::for_dry_run(self.config, self.ledger, self.clock, right).await?
        } else {
            let signer = Signer::open(self.config, self.ledger, self.clock, right).await?;
            signer.mail_end(self.config, self.ledger, self.clock).await?;
            signer
        };
        if let Some(Some(stream)) = &self.options.allow_shrink
            && !signer.drop_stream(stream)
            && self.config.stream(stream).is_none()
        {
            let text = format!("--allow-shrink {stream}: there is no such stream in the settings or in manifests");
            return Err(ConfigError(text).into());
        }
        let run = Run {
            config: self.config,
            options: self.options,
            clock: self.clock,
            ledger: self.ledger,
            buckets: self.buckets,
            progress: self.progress,
            steps: self.steps,
            epoch: signer.epoch(),
            signer,
            token,
            heads: BTreeMap::new(),
            contract_numbers: BTreeMap::new(),
            reported: BTreeMap::new(),
            held_out: BTreeMap::new(),
            moves: Vec::new(),
            behind: BTreeSet::new(),
            lacked: BTreeSet::new(),
            splits: BTreeMap::new(),
            awaited: BTreeSet::new(),
            waits: Waits::default(),
            scratch_dir: scratch,
            packs_dir: packs,
            problems: Mutex::default(),
            refused: Mutex::default(),
        };
        run.sweep()?;
        Box::pin(run.publish(contracts)).await
    }
}

/// One run.
struct Run<'a> {
    config: &'a Config,
    options: &'a PublishOptions,
    clock: &'a dyn Clock,
    ledger: &'a Ledger,
    buckets: &'a Buckets,
    signer: Signer,
    epoch: u64,
    token: Option<Token>,
    progress: &'a dyn Progress,
    steps: &'a dyn Steps,
    /// What is published.
    heads: BTreeMap<Instance, Head>,
    /// Each stream's newest contract, where it is today's text: number and hash.
    contract_numbers: BTreeMap<StreamName, (u64, Sha256)>,
    /// Errors and drift that devices report and no full answers.
    reported: BTreeMap<Instance, Report>,
    /// Versions that devices hold and the ledger does not know.
    held_out: BTreeMap<Instance, Version>,
    /// Stores that are to follow other instances than before, by store and stream.
    moves: Vec<Move>,
    /// Instances of which newer versions may be out than the ledger knows.
    behind: BTreeSet<Instance>,
    /// Instances of which the bucket lacks what lists name.
    lacked: BTreeSet<Instance>,
    /// Streams that take over tables of one that the settings lost, while its other tables are nobody's: why not.
    splits: BTreeMap<StreamName, String>,
    /// With an inbox: what stores that have devices are to follow.
    awaited: BTreeSet<Instance>,
    /// Drops that wait for others.
    waits: Waits,
    scratch_dir: PathBuf,
    packs_dir: PathBuf,
    problems: Mutex<Vec<String>>,
    /// Refusals that no mail tells of yet.
    refused: Mutex<Vec<mail::Refused>>,
}

impl Run<'_> {
    /// Deletes what earlier runs left in the scratch rooms. A dry run's goes with it.
    fn sweep(&self) -> Result<(), PublishError> {
        if self.options.dry_run {
            return Ok(());
        }
        for dir in [&self.scratch_dir, &self.packs_dir] {
            for entry in shelf::list(dir)?.iter().filter(|e| !e.is_dir) {
                shelf::remove(&entry.path)?;
            }
        }
        Ok(())
    }

    /// The spine, from step 3 on.
    async fn publish(mut self, contracts: &Contracts) -> Result<PublishReport, PublishError> {
        let mut report = PublishReport { dry_run: self.options.dry_run, ..PublishReport::default() };
        // 3. What an earlier run left.
        let waiting = self.finish_earlier(&mut report).await?;
        self.signer.leave(waiting);
        self.learn(contracts).await?;
        // Prices wait for no mail's sake.
        if let Err(e) = Post::new(self.config) {
            self.problem(format!("no mail leaves: {e}"));
        }
        // 4. One snapshot; the stores, and with them the audiences.
        let mut feed = Feed::open(self.config, self.options, self.clock).await?;
        let stores = self.stores(contracts, &mut feed, &mut report).await?;
        if let Feed::Inbox(drops) = &mut feed {
            report.notes.extend(drops.check(contracts, &stores));
            self.awaited = self.awaited(contracts, &stores).await?;
        }
        self.signer.drop_moved(self.ledger).await?;
        self.splits = self.find_splits(contracts);
        self.moves = self.signer.moves(self.ledger, &stores).await?;
        self.moves.sort_by(|a, b| (&a.store, &a.from.stream).cmp(&(&b.store, &b.from.stream)));
        // 5. Each stream, each audience: up to packs in the bucket.
        let mut ready = Vec::new();
        let mut settled = Vec::new();
        let wanted: Vec<&Stream> = contracts.streams.iter().filter(|s| self.is_asked(&s.name)).collect();
        self.progress.planned(wanted.iter().map(|s| audiences(s.audience, &stores).len()).sum());
        let staged = async {
            for stream in wanted {
                self.stage_stream(contracts, stream, &stores, &mut feed, &mut report, &mut ready, &mut settled).await?;
            }
            let refused = mail::refused_instances(self.ledger, Some(NO_ZONE)).await?;
            // Who is taken back may keep others from coming, and so on.
            loop {
                let before = ready.len();
                self.hold_requirers(contracts, &refused, &mut ready, &mut report).await?;
                self.hold_takers(contracts, &stores, &mut feed, &mut ready, &mut report).await?;
                if ready.len() == before {
                    return Ok::<_, PublishError>(());
                }
            }
        }
        .await;
        // Also of a run that ends here.
        self.tell_refused().await?;
        staged?;
        let drops = feed.close().await;
        self.put_packs(&ready).await?;
        let retired = self.retired_heads(&report).0;
        let gone = |i: &Instance| format!("no store follows {i} any more; what was published of it stays");
        report.notes.extend(retired.iter().map(gone));
        self.note_moves(&mut report);
        // 6. The commit point, and what follows from it.
        if !self.options.dry_run {
            self.sign(ready, &mut report).await?;
            let lacks = manifests::know_place(self.ledger, self.buckets).await?;
            let problem = (!lacks.is_empty()).then(|| {
                let (bucket, named) = (self.buckets.first_url(), some(&lacks, ", "));
                format!(
                    "{bucket} lacks packs that stores' lists name, of {named}: the next publish that does not refuse them makes \
                     a full; until then devices that are new get nothing of them"
                )
            });
            let told = problem.as_deref().map(|text| ("The bucket lacks packs", text));
            mail::publish_notice(self.ledger, self.clock, "bucket", told).await?;
            problem.into_iter().for_each(|text| self.problem(text));
            let before = self.behind.len();
            let is_known = |e: &InstanceReport| e.is_well() || e.is_newest;
            self.behind.retain(|i| !report.instances.get(i).is_some_and(is_known));
            if self.behind.len() < before {
                behind::note(self.ledger, &self.behind).await?;
            }
        }
        self.tell_left_out(contracts, &mut report).await?;
        self.tell_unlisted(&stores, &mut report).await?;
        if let Some(drops) = drops {
            self.tell_waits(&drops, &settled, &report).await?;
            let inbox = drops.inbox.clone();
            self.clear_inbox(drops, &settled, &mut report).await?;
            self.note_waits(&inbox, &report).await?;
        }
        if !self.options.dry_run {
            report.lag = self.buckets.repair_mirrors().await?;
            let lag = report.lag.mirrors.join("\n");
            let problem = (!lag.is_empty()).then_some(("A mirror lags behind", lag.as_str()));
            mail::publish_notice(self.ledger, self.clock, "mirror", problem).await?;
        }
        // 7. What was done.
        self.tell(&mut report).await?;
        Ok(report)
    }

    /// A durable step, watched.
    async fn step<T, E: Into<PublishError>>(
        &self,
        step: Step,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, PublishError> {
        self.steps.before(&step)?;
        let done = failpoint::around(step.failpoint(), work).await.map_err(Into::into)?;
        self.steps.after(&step)?;
        Ok(done)
    }

    /// Asked before each batch of puts.
    async fn still_publisher(&self) -> Result<(), PublishError> {
        match self.token {
            Some(token) if !self.ledger.holds(token).await? => Err(LedgerError::LeaseLost.into()),
            _ => Ok(()),
        }
    }

    /// Whether this run looks at a stream.
    fn is_asked(&self, stream: &StreamName) -> bool {
        self.options.stream.as_ref().is_none_or(|s| s == stream)
    }

    /// Whether somebody said that tables of a stream may shrink.
    fn may_shrink(&self, stream: &StreamName) -> bool {
        self.options.allow_shrink.as_ref().is_some_and(|which| which.as_ref().is_none_or(|s| s == stream))
    }

    fn workshop(&self) -> Workshop<'_> {
        Workshop { buckets: self.buckets, limits: &self.config.limits, packs: &self.packs_dir, now: self.clock.now() }
    }

    fn replicas_dir(&self) -> PathBuf {
        self.config.state.dir.join("replicas")
    }

    fn replica_path(&self, instance: &Instance) -> PathBuf {
        rebuild::replica_path(&self.replicas_dir(), instance)
    }

    /// What the ledger knows: heads, contracts, and what devices complain of.
    async fn learn(&mut self, contracts: &Contracts) -> Result<(), PublishError> {
        self.heads = self.ledger.heads().await?;
        self.waits = Waits::look(self.ledger).await?;
        // Any signature goes above what overtook the ledger, and no store's list tells of it any more.
        let is_set_back = self.ledger.is_set_back().await?;
        self.behind = behind::look(self.ledger, self.buckets, &self.heads).await?;
        if is_set_back && !self.options.dry_run {
            behind::note(self.ledger, &self.behind).await?;
            self.ledger.set_back_is_known().await?;
        }
        self.lacked = manifests::still_lacked(self.ledger, self.buckets).await?;
        for s in &contracts.streams {
            let (number, is_new) = self.ledger.schema_number(&s.name, &s.contract.sha256).await?;
            if !is_new {
                self.contract_numbers.insert(s.name.clone(), (number, s.contract.sha256));
            }
        }
        let complaints = self.ledger.complaints().await?;
        // What a store says that the source has no more makes no full for all others.
        let stores = self.ledger.stores().await?.into_iter().filter(|s| s.vanished_at.is_some());
        let gone: BTreeSet<StoreId> = stores.map(|s| s.seen.id).collect();
        let complaints: Vec<Complaint> = complaints.into_iter().filter(|c| !gone.contains(c.device.store())).collect();
        self.held_out = behind::held_out(&complaints, &self.ledger.enrolled().await?, &self.heads);
        self.behind.extend(self.held_out.keys().cloned());
        self.reported = reported::unanswered(self.ledger, &self.heads, &complaints, self.clock.now()).await?;
        Ok(())
    }

    /// All audiences of one stream. If one is refused, none is published; but a store without a zone, whose rows are not even
    /// asked for, says nothing of those of others.
    #[allow(clippy::too_many_arguments, reason = "the spine's loop, cut in two")]
    async fn stage_stream(
        &self,
        contracts: &Contracts,
        stream: &Stream,
        stores: &[StoreRow],
        feed: &mut Feed,
        report: &mut PublishReport,
        ready: &mut Vec<Ready>,
        settled: &mut Vec<Instance>,
    ) -> Result<(), PublishError> {
        let first = ready.len();
        let mut refused = false;
        for (audience, zone) in audiences(stream.audience, stores) {
            let instance = Instance { stream: stream.name.clone(), audience };
            let mut entry = InstanceReport::default();
            let keep_open = ready.iter().filter(|r| r.replica.is_some()).count() < OPEN_REPLICAS;
            match self.stage_one(stream, &instance, zone.as_ref(), refused, keep_open, feed, &mut entry).await {
                Ok(Some(one)) => ready.push(one),
                Ok(None) if entry.outcome == Outcome::Unchanged => settled.push(instance.clone()),
                Ok(None) => {}
                Err(Stop::Fatal(e)) => return Err(e),
                Err(Stop::Refused(refusal)) => {
                    refused |= refusal.code != NO_ZONE;
                    self.refuse(&instance, *refusal, feed, &mut entry);
                }
            }
            self.progress.finished(&instance, &entry);
            report.instances.insert(instance, entry);
        }
        for (instance, refusal) in self.guard_moves(contracts, stream, stores, !refused, report).await? {
            refused = true;
            self.keep_away(instance, refusal, feed, report);
        }
        if refused {
            for one in ready.drain(first..) {
                self.unstage(one, "another instance of the stream is refused", report).await?;
            }
        }
        Ok(())
    }

    /// Takes back what requires a stream that is refused, or held back itself: its rows were made beside rows that are not
    /// out. A refusal of an earlier run (`refused`) counts until its instance was looked at again, and is well.
    async fn hold_requirers(
        &self,
        contracts: &Contracts,
        refused: &BTreeSet<Instance>,
        ready: &mut Vec<Ready>,
        report: &mut PublishReport,
    ) -> Result<(), PublishError> {
        for stream in &contracts.streams {
            let is_out = |i: &Instance| match report.instances.get(i) {
                Some(e) if e.outcome == Outcome::Refused => e.code != Some(NO_ZONE),
                Some(e) => e.outcome == Outcome::HeldBack || !e.is_well() && refused.contains(i),
                None => refused.contains(i),
            };
            let lacks =
                |of: &&StreamName| report.instances.keys().chain(refused).any(|i| i.stream == **of && is_out(i));
            let Some(lacks) = stream.requires.iter().find(lacks) else { continue };
            let why = format!("stream {lacks}, which it requires, is refused or held back");
            while let Some(n) = ready.iter().position(|r| r.instance.stream == stream.name) {
                self.unstage(ready.remove(n), &why, report).await?;
            }
        }
        Ok(())
    }

    /// Puts the packs of all that is staged.
    async fn put_packs(&self, ready: &[Ready]) -> Result<(), PublishError> {
        if !ready.is_empty() {
            self.still_publisher().await?;
        }
        let puts = futures_util::stream::iter(ready).map(|one| self.put(one));
        puts.buffer_unordered(self.buckets.concurrency()).try_collect::<()>().await
    }

    #[allow(clippy::too_many_arguments, reason = "the loop above, cut in two")]
    async fn stage_one(
        &self,
        stream: &Stream,
        instance: &Instance,
        zone: Option<&Zone>,
        only_check: bool,
        keep_open: bool,
        feed: &mut Feed,
        entry: &mut InstanceReport,
    ) -> Result<Option<Ready>, Stop> {
        let task = Task { stream, instance, zone, only_check, keep_open };
        if let Some(why) = self.signer.trust().denies(&stream.name) {
            let text = format!("{why}; `hq-publisher trust rotate --streams …` with the root key names it, too");
            return Err(stage::refused("NOT_ALLOWED", text));
        }
        if let Some(text) = self.splits.get(&stream.name) {
            return Err(stage::refused("SHRINK", text));
        }
        let asks_zone = stream.queries.values().any(|q| q.asks(crate::source_db::query::Param::Zone));
        if zone.is_none() && asks_zone && matches!(instance.audience, Audience::Store(_)) {
            let text = format!("{} has no zone, and the stream's queries ask for :zone", instance.audience);
            return Err(stage::refused(NO_ZONE, text));
        }
        Box::pin(self.stage(&task, feed, entry)).await
    }

    /// Takes back a version that was staged.
    async fn unstage(&self, one: Ready, why: &str, report: &mut PublishReport) -> Result<(), PublishError> {
        if let Some(mut replica) = one.replica {
            replica.rollback();
        }
        self.give_up(&one.instance, one.version).await?;
        for (_, path) in &one.packs {
            shelf::remove(path)?;
        }
        if let Some(entry) = report.instances.get_mut(&one.instance)
            && entry.outcome != Outcome::Refused
        {
            entry.outcome = Outcome::HeldBack;
            entry.reason = why.to_owned();
            entry.version = self.heads.get(&one.instance).map(|h| h.version);
        }
        Ok(())
    }
}

/// Opens the published replica of an instance for reading, if it is at its head.
fn read_only_at(path: &Path, instance: &Instance, head: &Head, config: &Config) -> Option<Replica> {
    let replica = Replica::open_read_only(path, &config.limits).ok()?;
    let held = replica.held(&instance.stream).ok()?;
    rebuild::is_at(held.as_ref(), instance, head).then_some(replica)
}

#[cfg(test)]
mod tests;

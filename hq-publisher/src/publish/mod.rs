//! The spine of headquarters: from the source to signed manifests in the bucket.
//!
//! Owns the order of durable steps. Must never decide by itself what changed (`diff`), what to make
//! of it (`plan`), whether it may be (`guard`), or how things are kept (`ledger`, `bucket`). If the
//! power goes before the signature, the number is burnt and nothing has happened; after it, the
//! next run finishes.

pub mod behind;
pub mod contracts;
mod error;
mod feed;
mod lease;
mod make;
mod moves;
pub mod report;
mod stage;
pub mod steps;
mod stores;

pub use error::PublishError;
pub use lease::{Lease, host};
pub use report::PublishReport;
pub use steps::{Aborted, Phase, Progress, Quiet, Step, Steps};

use crate::bucket::Buckets;
use crate::config::Config;
use crate::inbox::{Drop, What};
use crate::ledger::{Complaint, Head, Ledger, LedgerError, News, Staged, State, Token};
use crate::mail;
use crate::manifests::{self, Followed, ManifestsError, Move, Moves, Signer, put_unfinished, telling};
use crate::rebuild::{self, Workshop};
use crate::retention::{self, Keep};
use crate::source::StoreRow;
use contracts::{Contracts, Stream, audiences};
use feed::{Drops, Feed};
use futures_util::{StreamExt, TryStreamExt};
use proto::clock::{Clock, Timestamp, since};
use proto::config::ConfigError;
use proto::digest::Sha256;
use proto::failpoint;
use proto::ids::{Audience, Instance, StoreId, StreamName, Version, Zone};
use proto::layout::ObjectName;
use proto::replica::sqlite::Checkpoint;
use proto::replica::{Job, PackFile, Replica};
use proto::shelf::{self, LockFile};
use report::{InstanceReport, Outcome, Rejected};
use stage::{Ready, Refusal, Stop, Task};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Transactions on published replicas that are kept open until the signature. Beyond them a
/// replica is rolled back and applied once more after it.
const OPEN_REPLICAS: usize = 64;

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
    let contracts = match contracts::load(config) {
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

/// A run that ended as a whole (settings, source, bucket or this machine) is mailed once, and once when one
/// went through again. What a refusal of one stream says is mailed where it is refused.
async fn tell_of_run(ledger: &Ledger, clock: &dyn Clock, result: &Result<PublishReport, PublishError>) {
    let told = match result {
        Ok(_) => all_is_well(ledger, clock).await,
        // The former is mailed where it lasts too long.
        Err(PublishError::LeaseHeld { .. } | PublishError::Aborted(_)) => return,
        // Mailed where the manifests are put.
        Err(PublishError::Manifests(ManifestsError::Overtaken(_))) => return,
        Err(e) => tell_of_failure(ledger, clock, e).await,
    };
    warn_untold(told);
}

async fn all_is_well(ledger: &Ledger, clock: &dyn Clock) -> Result<(), LedgerError> {
    ledger.went_through().await?;
    for over in ["run", NOT_RUN] {
        mail::publish_notice(ledger, clock, over, None).await?;
    }
    mail::publish_caught_up(ledger, clock).await
}

async fn tell_of_failure(ledger: &Ledger, clock: &dyn Clock, e: &PublishError) -> Result<(), LedgerError> {
    // Past the commit point it is not undone.
    let is_signed = matches!(e, PublishError::Manifests(ManifestsError::NotPut(_)))
        || !ledger.publications(State::Signed).await?.is_empty();
    let what = match is_signed {
        true => "What is signed waits for that, and the next run puts it.",
        false => "Nothing was published; the next run tries again.",
    };
    let text = format!("{e}\n\n{what}");
    mail::publish_notice(ledger, clock, "run", Some(("publish failed", &text))).await
}

fn warn_untold(told: Result<(), LedgerError>) {
    if let Err(e) = told {
        tracing::warn!(error = %e, "no mail could be written");
    }
}

/// Files in the inbox that are no drops and are mailed one by one; an exporter may write thousands.
const STRAYS: usize = 20;

/// The notice that no run goes through any more; `serve` opens it.
pub const NOT_RUN: &str = "not-run";

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
        // What a lost ledger forgot is in the bucket, the trust to sign by included.
        if let Some(token) = token {
            let limits = &self.config.limits;
            let shop = Workshop { buckets: self.buckets, limits, packs: &packs, now: self.clock.now() };
            self.steps.before(&Step::Adopt)?;
            let adopted = rebuild::adopt(shop, self.config, self.ledger, token, self.clock);
            failpoint::around(Step::Adopt.failpoint(), adopted).await?;
            self.steps.after(&Step::Adopt)?;
        }
        let right = self.options.clock_is_right;
        let mut signer = if self.options.dry_run {
            Signer::for_dry_run(self.config, self.ledger, self.clock, right).await?
        } else {
            Signer::open(self.config, self.ledger, self.clock, right).await?
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
            splits: BTreeMap::new(),
            scratch_dir: scratch,
            packs_dir: packs,
            problems: Mutex::default(),
        };
        run.sweep()?;
        Box::pin(run.publish(contracts)).await
    }
}

/// Where a dry run works; it goes when the run ends, and after its death with the next one.
struct DryRoom {
    dir: PathBuf,
    _lock: LockFile,
}

impl DryRoom {
    fn open(scratch: &Path) -> Result<DryRoom, PublishError> {
        let dir = scratch.join(format!("dry-{}", std::process::id()));
        shelf::create_dir(&dir)?;
        let lock = LockFile::acquire(&dir).map_err(PublishError::Lock)?;
        Ok(DryRoom { dir, _lock: lock })
    }

    /// Deletes those that nobody works in any more.
    fn sweep(scratch: &Path) -> Result<(), PublishError> {
        for room in shelf::list(scratch)?.into_iter().filter(|e| e.is_dir && e.name.starts_with("dry-")) {
            if let Ok(lock) = LockFile::acquire(&room.path) {
                drop(DryRoom { dir: room.path, _lock: lock });
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), shelf::ShelfError> {
        for file in shelf::list(&self.dir)? {
            shelf::remove(&file.path)?;
        }
        shelf::remove_empty_dir(&self.dir)
    }
}

impl std::ops::Drop for DryRoom {
    fn drop(&mut self) {
        if let Err(e) = self.clear() {
            tracing::warn!("{e}");
        }
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
    /// Errors and drift that devices report: since when, and who.
    reported: BTreeMap<Instance, (Timestamp, String)>,
    /// Versions that devices hold and the ledger does not know.
    held_out: BTreeMap<Instance, Version>,
    /// Stores that are to follow other instances than before, by store and stream.
    moves: Vec<Move>,
    /// Instances of which newer versions may be out than the ledger knows.
    behind: BTreeSet<Instance>,
    /// Streams that take over tables of one that the settings lost, while its other tables are nobody's: why not.
    splits: BTreeMap<StreamName, String>,
    scratch_dir: PathBuf,
    packs_dir: PathBuf,
    problems: Mutex<Vec<String>>,
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
        // 4. One snapshot; the stores, and with them the audiences.
        let mut feed = Feed::open(self.config, self.options, self.clock).await?;
        let stores = self.stores(contracts, &mut feed, &mut report).await?;
        if let Feed::Inbox(drops) = &mut feed {
            report.notes.extend(drops.check(contracts, &stores));
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
        for stream in wanted {
            self.stage_stream(contracts, stream, &stores, &mut feed, &mut report, &mut ready, &mut settled).await?;
        }
        self.hold_takers(contracts, &stores, &mut feed, &mut ready, &mut report).await?;
        let drops = feed.close().await;
        self.put_packs(&ready).await?;
        let retired = self.retired_heads(&report).0;
        let gone = |i: &Instance| format!("no store follows {i} any more; what was published of it stays");
        report.notes.extend(retired.iter().map(gone));
        // 6. The commit point, and what follows from it.
        if !self.options.dry_run {
            self.sign(ready, &mut report).await?;
            let before = self.behind.len();
            let is_known = |e: &InstanceReport| e.is_well() || e.is_newest;
            self.behind.retain(|i| !report.instances.get(i).is_some_and(is_known));
            if self.behind.len() < before {
                behind::note(self.ledger, &self.behind).await?;
            }
        }
        self.tell_left_out(contracts, &mut report).await?;
        if let Some(drops) = drops {
            self.clear_inbox(drops, &settled, &mut report).await?;
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

    /// Puts manifests once more that somebody replaced or deleted.
    async fn put_again(&self) -> Result<(), ManifestsError> {
        match manifests::follow_trust(self.config, self.ledger, self.buckets, self.clock).await? {
            Followed::Newest => manifests::put_again(self.ledger, self.buckets, self.token).await,
            Followed::Not(_) => Ok(()),
        }
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

    /// Streams that manifests list and the settings do not name, and stores without the zone that they had: both keep what
    /// they have, and somebody should know. Not told of, where a table is another stream's by the settings, before that is
    /// published: it goes over.
    async fn tell_left_out(&self, contracts: &Contracts, report: &mut PublishReport) -> Result<(), PublishError> {
        let mut told = BTreeMap::new();
        let mut tell = |stream: &StreamName, text: String| {
            self.problem(text.clone());
            told.insert(format!("stream {stream}"), (format!("Stream {stream} is not in the settings"), text));
        };
        let goes_over = |s: &StreamName| self.tables_left(s).iter().any(|t| contracts.stream_of(t).is_some());
        for (stream, _) in self.signer.left_out().filter(|(s, _)| !goes_over(s)) {
            let text = format!(
                "stream {stream} is not in the settings and manifests list it: they go on listing what was published of it. \
                 Put its [[stream]] back, or, if no store is to get it any more, run again with --allow-shrink {stream}"
            );
            tell(stream, text);
        }
        if self.options.dry_run {
            return Ok(());
        }
        for (stream, by) in self.signer.moved(self.ledger).await? {
            if let Some(first) = by.stores.first() {
                let text = format!(
                    "stream {stream} is not in the settings, and other streams have its tables: {} stores (the first is \
                     {first}) list it until all of them are published for them. If they are to get what there is, run \
                     again with --allow-shrink {stream}",
                    by.stores.len()
                );
                tell(&stream, text);
            } else if let Some(first) = by.away.first() {
                report.notes.push(format!(
                    "stream {stream} is kept for stores that the source has no more: {} (the first is {first}). Should they \
                     come back, they go over as the others did",
                    by.away.len()
                ));
            }
        }
        mail::publish_notices(self.ledger, self.clock, "stream ", &told).await?;
        self.tell_lost_zones().await
    }

    /// Told once, however often it is met.
    fn problem(&self, text: String) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        if !problems.contains(&text) {
            tracing::warn!("{text}");
            problems.push(text);
        }
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

    /// Some stores' manifests that the bucket does not take hold up nobody else's; those of all are, `at_end`, the bucket's
    /// failure. Gives what was told.
    async fn bear(&self, put: Result<(), ManifestsError>, at_end: bool) -> Result<Option<String>, ManifestsError> {
        let (failed, e) = match put {
            Err(e @ ManifestsError::NotPut(_)) => (e.stores(), e),
            other => return other.map(|()| None),
        };
        let stores = self.ledger.stores().await?;
        let mut here = stores.iter().filter(|s| s.serial > 0 && s.vanished_at.is_none()).peekable();
        if at_end && here.peek().is_some() && here.all(|s| failed.contains(&s.seen.id)) {
            return Err(e);
        }
        let text = format!("{} stores get nothing new before their manifests can be put: {e}", failed.len());
        self.problem(text.clone());
        Ok(Some(text))
    }

    /// Rolls forward what was signed, gives up what was not. Gives the stores whose manifests cannot be put.
    async fn finish_earlier(&self, report: &mut PublishReport) -> Result<BTreeSet<StoreId>, PublishError> {
        let Some(token) = self.token else { return Ok(BTreeSet::new()) };
        for state in [State::Reserved, State::Packed] {
            for p in self.ledger.publications(state).await? {
                let step = Step::Abandon(p.instance.clone(), p.version);
                self.step(step, self.ledger.abandon(token, &p.instance, p.version)).await?;
            }
        }
        self.still_publisher().await?;
        // That the ledger was set back is told, of all stores at once, before anything is made that would hide it.
        let put = async {
            let put = put_unfinished(self.ledger, self.buckets, Some(token)).await.map(drop);
            let waiting = put.as_ref().err().map_or_else(BTreeSet::new, ManifestsError::stores);
            match (put, self.put_again().await) {
                (Ok(()), Err(e @ (ManifestsError::Bucket(_) | ManifestsError::NotPut(_)))) => {
                    self.problem(format!("a manifest put earlier cannot be looked at: {e}"));
                }
                (put, again) => drop(self.bear(manifests::both(put, again), false).await?),
            }
            Ok::<_, ManifestsError>(waiting)
        };
        let waiting = self.step(Step::PutManifests, put).await?;
        for p in self.ledger.publications(State::Signed).await? {
            if let Some(head) = self.ledger.head(&p.instance).await? {
                let path = self.replica_path(&p.instance);
                match rebuild::published(self.workshop(), &path, &p.instance, &head, false).await {
                    Ok(_) => {}
                    // It is tried again when the instance is looked at, and told there.
                    Err(e) if e.needs_full() => {
                        tracing::warn!(instance = %p.instance, error = %e, "not brought up yet")
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            let step = Step::Done(p.instance.clone(), p.version);
            self.step(step, self.ledger.done(token, &p.instance, p.version)).await?;
            report.finished.push(format!("{} {}", p.instance, p.version));
        }
        Ok(waiting)
    }

    /// What the ledger knows: heads, contracts, and what devices complain of.
    async fn learn(&mut self, contracts: &Contracts) -> Result<(), PublishError> {
        self.heads = self.ledger.heads().await?;
        // Any signature goes above what overtook the ledger, and no store's list tells of it any more.
        let is_set_back = self.ledger.is_set_back().await?;
        self.behind = behind::look(self.ledger, self.buckets, &self.heads).await?;
        if is_set_back && !self.options.dry_run {
            behind::note(self.ledger, &self.behind).await?;
            self.ledger.set_back_is_known().await?;
        }
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
        for Complaint { device, fault } in complaints {
            let Some(instance) = fault.instance else { continue };
            if self.reported.get(&instance).is_none_or(|(known, _)| *known < fault.since) {
                self.reported.insert(instance, (fault.since, format!("{device} {}", fault.code)));
            }
        }
        Ok(())
    }

    /// All audiences of one stream. If one is refused, none is published.
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
                    refused = true;
                    self.refuse(&instance, *refusal, feed, &mut entry).await?;
                }
            }
            self.progress.finished(&instance, &entry);
            report.instances.insert(instance, entry);
        }
        for (instance, refusal) in self.guard_moves(contracts, stream, stores, !refused, report).await? {
            refused = true;
            self.keep_away(instance, refusal, feed, report).await?;
        }
        if refused {
            for one in ready.drain(first..) {
                self.unstage(one, report).await?;
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
        if let Some(text) = self.splits.get(&stream.name) {
            return Err(stage::refused("SHRINK", text));
        }
        let asks_zone = stream.queries.values().any(|q| q.asks(crate::source_db::query::Param::Zone));
        if zone.is_none() && asks_zone && matches!(instance.audience, Audience::Store(_)) {
            let text = format!("{} has no zone, and the stream's queries ask for :zone", instance.audience);
            return Err(Stop::Refused(Box::new(Refusal {
                code: "NO_ZONE",
                text,
                faults: Default::default(),
                reject: Vec::new(),
            })));
        }
        Box::pin(self.stage(&task, feed, entry)).await
    }

    /// Tells of a refusal: in the report, by mail, and to the sender of a drop.
    async fn refuse(
        &self,
        instance: &Instance,
        refusal: Refusal,
        feed: &mut Feed,
        entry: &mut InstanceReport,
    ) -> Result<(), PublishError> {
        entry.outcome = Outcome::Refused;
        entry.code = Some(refusal.code);
        entry.reason.clone_from(&refusal.text);
        let mut text = refusal.text;
        for fault in &refusal.faults.first {
            text.push_str(&format!("\n{instance}: {fault}"));
        }
        if refusal.faults.untold() > 0 {
            text.push_str(&format!("\nand {} more", refusal.faults.untold()));
        }
        tracing::error!(%instance, code = refusal.code, "refused: {text}");
        if let Feed::Inbox(drops) = feed {
            drops.rejected.extend(refusal.reject);
        }
        if !self.options.dry_run {
            mail::publish_refused(self.ledger, self.clock, instance, refusal.code, &text).await?;
        }
        Ok(())
    }

    /// Takes back a version that was staged before another of its stream was refused.
    async fn unstage(&self, one: Ready, report: &mut PublishReport) -> Result<(), PublishError> {
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
            entry.reason = "another instance of the stream is refused".into();
            entry.version = self.heads.get(&one.instance).map(|h| h.version);
        }
        Ok(())
    }

    /// The commit point and what follows from it.
    async fn sign(&self, mut ready: Vec<Ready>, report: &mut PublishReport) -> Result<(), PublishError> {
        let Some(token) = self.token else { return Ok(()) };
        self.progress.signing(ready.len());
        let staged: Vec<Staged> =
            ready.iter().map(|r| Staged { instance: r.instance.clone(), version: r.version }).collect();
        let (unwanted, compared) = self.retired_heads(report);
        let held = self.held(report);
        let news = News { staged: &staged, unwanted: &unwanted, compared: &compared };
        let sign = self.signer.sign_all(self.ledger, token, news, Moves::AllBut(&held), self.clock);
        let signed = self.step(Step::Sign, sign).await?;
        report.signed = signed.len();
        let mut behind = Vec::new();
        for one in &mut ready {
            let step = Step::CommitReplica(one.instance.clone());
            if let Err(e) = self.step(step, async { self.commit_replica(one) }).await {
                if matches!(e, PublishError::Aborted(_)) {
                    return Err(e);
                }
                // It is out already; the next run brings the replica up from the pack.
                self.problem(format!("{}: the published replica could not follow: {e}", one.instance));
                behind.push(one.instance.clone());
            }
        }
        self.still_publisher().await?;
        let put =
            async { self.bear(put_unfinished(self.ledger, self.buckets, Some(token)).await.map(drop), true).await };
        let lacking = self.step(Step::PutManifests, put).await?;
        let problem = lacking.as_deref().map(|text| ("Manifests of some stores cannot be put", text));
        mail::publish_notice(self.ledger, self.clock, "manifests", problem).await?;
        for one in ready {
            if !behind.contains(&one.instance) {
                let step = Step::Done(one.instance.clone(), one.version);
                self.step(step, self.ledger.done(token, &one.instance, one.version)).await?;
            }
            for (_, path) in &one.packs {
                shelf::remove(path)?;
            }
            // What a list says that could not be replaced stays; also of one that was put only now, as it was.
            if lacking.is_none() && !self.signer.leaves_some() {
                report.deleted += self.retain(token, &one.instance).await?;
            }
        }
        self.delete_packs().await
    }

    /// Heads that no store wants any more, and retired ones that one wants again and whose rows are still the source's
    /// (of those with other rows the new version is no retired one). Of a stream that the settings do not name, all when it
    /// may go.
    fn retired_heads(&self, report: &PublishReport) -> (Vec<Instance>, Vec<Instance>) {
        let is_left = |i: &Instance| self.moves.iter().any(|m| &m.from == i && self.stays(&i.stream, report));
        let unwanted = |i: &Instance, h: &Head| {
            let is_gone = match self.config.stream(&i.stream) {
                Some(_) => self.is_asked(&i.stream) && !report.instances.contains_key(i) && !is_left(i),
                None => !self.signer.left_out().any(|(s, _)| s == &i.stream),
            };
            !h.retired && is_gone
        };
        let compared = |i: &Instance, h: &Head| {
            h.retired && report.instances.get(i).is_some_and(|e| e.outcome == Outcome::Unchanged && e.is_well())
        };
        let those = |is: &dyn Fn(&Instance, &Head) -> bool| {
            self.heads.iter().filter(|(i, h)| is(i, h)).map(|(i, _)| i.clone()).collect()
        };
        (those(&unwanted), those(&compared))
    }

    fn commit_replica(&self, one: &mut Ready) -> Result<(), PublishError> {
        tokio::task::block_in_place(|| {
            let mut replica = match one.replica.take() {
                Some(replica) => replica,
                None => {
                    let (mut replica, _) =
                        rebuild::open(&self.replica_path(&one.instance), &one.instance, &self.config.limits)?;
                    let (entry, path) = &one.packs[0];
                    let packs = [PackFile { path, entry }];
                    let job = Job {
                        instance: &one.instance,
                        epoch: self.epoch,
                        packs: &packs,
                        now: self.clock.now(),
                        prove: false,
                        listed: None,
                    };
                    replica.apply_uncommitted(&job).map_err(|e| PublishError::Machine(e.to_string()))?;
                    replica
                }
            };
            failpoint::step("publish.commit", || replica.commit())?;
            Ok(replica.checkpoint(Checkpoint::Truncate)?)
        })
    }

    /// Takes packs that nobody needs any more off the ledger, which notes them to be deleted.
    async fn retain(&self, token: Token, instance: &Instance) -> Result<usize, PublishError> {
        let p = &self.config.publish;
        let keep = Keep { age: p.keep.0, bytes: p.keep_bytes.0, settled: p.delete_after.0 };
        let packs = self.ledger.published(instance).await?;
        let gone: Vec<_> =
            retention::expendable(&packs, keep, self.clock.now()).into_iter().map(|p| p.entry.name(instance)).collect();
        if !gone.is_empty() {
            self.still_publisher().await?;
        }
        for name in &gone {
            self.step(Step::ForgetPack(name.clone()), self.ledger.forget_pack(token, name)).await?;
        }
        Ok(gone.len())
    }

    /// Deletes packs that the ledger gave up or forgot, what earlier runs left undone included. Only below a head
    /// that is out: a ledger from a backup may have given up a number that went out later.
    async fn delete_packs(&self) -> Result<(), PublishError> {
        let names = self.ledger.packs_to_delete().await?;
        if names.is_empty() {
            return Ok(());
        }
        self.still_publisher().await?;
        let heads = self.ledger.heads().await?;
        for name in names.into_iter().filter(|n| heads.get(&n.instance).is_some_and(|h| h.version > n.version)) {
            let delete = async {
                // A mirror that is down is asked again by the next run.
                if self.buckets.delete(&ObjectName::Pack(name.clone())).await? {
                    self.ledger.pack_deleted(&name).await?;
                }
                Ok::<(), PublishError>(())
            };
            self.step(Step::DeletePack(name.clone()), delete).await?;
        }
        Ok(())
    }

    /// Moves drops: published ones to `done/`, refused ones to `rejected/`, held ones stay. A dry run
    /// only tells.
    async fn clear_inbox(
        &self,
        drops: Drops,
        settled: &[Instance],
        report: &mut PublishReport,
    ) -> Result<(), PublishError> {
        for (drop, reason) in &drops.rejected {
            report.rejected.push(Rejected { name: drop.file.name.clone(), reason: reason.clone() });
        }
        for problem in drops.strays.values() {
            self.problem(problem.clone());
        }
        if self.options.dry_run {
            return Ok(());
        }
        let stray = |(name, text): (&String, &String)| {
            (format!("inbox {name}"), (format!("{name} in the inbox is left alone"), text.clone()))
        };
        let mut strays: BTreeMap<String, (String, String)> = drops.strays.iter().take(STRAYS).map(stray).collect();
        if let Some(more @ 1..) = drops.strays.len().checked_sub(STRAYS) {
            let subject = format!("{more} more files in the inbox are left alone");
            strays.insert("inbox …".into(), (subject, "`publish` names them all.".into()));
        }
        mail::publish_notices(self.ledger, self.clock, "inbox ", &strays).await?;
        let published = |i: &Instance| report.instances.get(i).is_some_and(|r| r.outcome == Outcome::Published);
        let rejected: Vec<&str> = drops.rejected.iter().map(|(d, _)| d.file.name.as_str()).collect();
        let tables = drops.tables.iter().filter(|(i, _)| published(i) || settled.contains(i));
        let done: Vec<&Drop> = tables.flat_map(|(_, t)| t.values()).chain(drops.stores.as_ref()).collect();
        for drop in done.into_iter().filter(|d| !rejected.contains(&d.file.name.as_str())) {
            self.step(Step::MoveDrop(drop.file.name.clone()), async { drops.inbox.done(drop) }).await?;
        }
        for (drop, reason) in &drops.rejected {
            self.step(Step::MoveDrop(drop.file.name.clone()), async { drops.inbox.reject(drop, reason) }).await?;
            // A refusal of the instance was mailed already.
            if let Ok(What::Table { instance, .. }) = &drop.what
                && report.instances.get(instance).is_none_or(|r| r.outcome != Outcome::Refused)
            {
                let text = format!("{} was rejected: {reason}", drop.file.name);
                mail::publish_refused(self.ledger, self.clock, instance, "DROP", &text).await?;
            }
        }
        Ok(())
    }

    /// Closes what is well again, and ends the report.
    async fn tell(&self, report: &mut PublishReport) -> Result<(), PublishError> {
        report.problems.append(&mut self.problems.lock().unwrap_or_else(PoisonError::into_inner));
        if self.options.dry_run {
            return Ok(());
        }
        self.sweep()?;
        let rejected =
            |i: &Instance| report.rejected.iter().any(|r| r.name.starts_with(&format!("{}.{}.", i.stream, i.audience)));
        for (instance, entry) in &report.instances {
            if entry.is_well() && !rejected(instance) {
                mail::publish_recovered(self.ledger, self.clock, instance).await?;
            }
        }
        // What is no instance (any more) ends with the next run that went well without it: a drop of an unknown
        // stream or zone that was not sent again, an audience that is gone.
        let went_well = report.instances.values().any(|e| e.is_well());
        for instance in mail::refused_instances(self.ledger).await? {
            if went_well
                && self.is_asked(&instance.stream)
                && !report.instances.contains_key(&instance)
                && !rejected(&instance)
            {
                mail::publish_recovered(self.ledger, self.clock, &instance).await?;
            }
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

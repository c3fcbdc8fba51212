//! The spine: one cycle, which brings every stream as far as it can come now. The loop around it is
//! in `run`, the waiting in `pace`, the choice of packs in `plan`.
//!
//! Owns the order of things; never applies what was not verified, never lets one stream's failure
//! stop another. If the power goes at any line, `store.db` holds whole versions and the next cycle
//! begins from what it says; downloads go on from their length.

use crate::config::Config;
use crate::disk::Room;
use crate::hold::Hold;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::pace::{self, End};
use crate::plan::{self, Next, Standing};
use crate::register_db::{AllHeld, ApplyFailure, RegisterDb, Remedy, at};
use crate::report::Skew;
use crate::tries::Tries;
use crate::upstream::Upstream;
use proto::clock::Clock;
use proto::device::{Device, DeviceError};
use proto::fetch::{BadSource, FetchError, FetchErrorKind};
use proto::follow::{FollowError, lock};
use proto::ids::{Instance, StreamName};
use proto::layout::PackName;
use proto::manifest::{Manifest, PackEntry, StreamEntry};
use proto::replica::sqlite::SqliteError;
use proto::retry::Verdict;
use proto::shelf;
use proto::trust::Verified;
use proto::wire::fault;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// Where a cycle stands; tests stop it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The versions were read from the database.
    Looked,
    /// The manifest was read.
    Learned,
    /// A pack is whole and verified.
    Fetched(PackName),
    /// The transaction that this pack begins is about to run.
    Applying(PackName),
    /// It was committed.
    Applied(PackName),
    /// Applied packs were deleted.
    Cleaned,
}

/// Called at each step; `false` ends the cycle there, as a kill would.
pub type Observer = Arc<dyn Fn(&Step) -> bool + Send + Sync>;

/// Why the agent cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Identity or trust.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another process works here.
    #[error(transparent)]
    Lock(#[from] shelf::LockError),
    /// The data directory.
    #[error(transparent)]
    Shelf(#[from] shelf::ShelfError),
    /// The register's database.
    #[error(
        "{0}; if it is damaged: stop the POS application, move store.db, store.db-wal and store.db-shm away, start again"
    )]
    Database(#[from] SqliteError),
    /// The settings name a source that cannot work.
    #[error(transparent)]
    Source(#[from] BadSource),
    /// A counter's name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl OpenError {
    /// Whether settings or set-up are to be mended by a person.
    pub fn is_set_up(&self) -> bool {
        matches!(
            self,
            OpenError::Source(_) | OpenError::Device(DeviceError::NotEnrolled(_) | DeviceError::OtherDevice { .. })
        )
    }
}

/// What status and heartbeats show of the streams.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// As read from the database after the last change.
    pub held: AllHeld,
    /// Streams that cannot go on now, and why.
    pub waits: BTreeMap<Instance, String>,
}

/// The agent's parts. Shared by its loops.
pub struct Agent {
    /// The settings.
    pub config: Config,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Identity, trust, manifest.
    pub device: Arc<Mutex<Device>>,
    /// The register's database.
    pub db: RegisterDb,
    /// Relay and fallbacks.
    pub upstream: Upstream,
    /// Latches, bad packs, faults.
    pub memory: Memory,
    /// The POS application's hold.
    pub hold: Hold,
    /// The disk.
    pub room: Room,
    /// Counters.
    pub metrics: Metrics,
    /// The clocks' difference, by the last heartbeat.
    pub skew: Skew,
    /// Rung when there is something to do.
    pub wake: Notify,
    /// Rung when there is something to report.
    pub tell: Notify,
    tries: Tries,
    halted: AtomicBool,
    /// The log holds something that a truncation would free.
    log_dirty: AtomicBool,
    /// This cycle met a full disk.
    full: AtomicBool,
    swept_for: Mutex<Option<u64>>,
    shown: Mutex<Shown>,
    observer: Option<Observer>,
    _lock: shelf::LockFile,
}

/// What a cycle aims at.
struct Goal {
    from: pace::From,
    manifest: Verified<Manifest>,
}

/// How one part of a stream's cycle ended.
enum Went<T> {
    /// Well.
    On(T),
    /// Without this pack, which is bad, or missing for now.
    Without(PackName),
    /// It is over for this stream.
    Over(End),
}

impl Agent {
    /// Opens everything below the data directory, which must be enrolled and unused.
    pub fn open(config: Config, clock: Arc<dyn Clock>, observer: Option<Observer>) -> Result<Agent, OpenError> {
        let dir = config.data_dir.clone();
        // A missing directory is a missing enrolment: nothing is made here.
        if !dir.join(proto::device::FILE).exists() {
            return Err(DeviceError::NotEnrolled(dir.display().to_string()).into());
        }
        let lock = shelf::LockFile::acquire(&dir)?;
        shelf::sweep(&dir)?;
        let device = Arc::new(Mutex::new(Device::open(&dir, &config.device(), &config.limits)?));
        let (memory, word) = Memory::load(device.clone())?;
        let room = Room::open(&dir, config.ballast)?;
        let db = RegisterDb::open(&config.store_db(), &config.limits)?;
        shelf::create_dir(&dir.join("packs"))?;
        let upstream = Upstream::new(&config, clock.clone(), word)?;
        // A halt lasts until somebody restarted the service.
        memory.faults(|f| f.mend(fault::HALTED, |_| true));
        let tries = Tries::open(&dir, clock.monotonic());
        Ok(Agent {
            config,
            device,
            db,
            upstream,
            memory,
            room,
            tries,
            clock,
            hold: Hold::default(),
            metrics: Metrics::new()?,
            skew: Skew::default(),
            wake: Notify::new(),
            tell: Notify::new(),
            halted: AtomicBool::new(false),
            log_dirty: AtomicBool::new(true),
            full: AtomicBool::new(false),
            swept_for: Mutex::new(None),
            shown: Mutex::new(Shown::default()),
            observer,
            _lock: lock,
        })
    }

    /// One cycle: as far as every stream can come now. `news` breaks off a download, which goes on
    /// later from where it was: a small change must not wait for a large pack.
    pub async fn cycle(&self, news: &mut watch::Receiver<u64>) -> End {
        news.borrow_and_update();
        if self.halted.load(Ordering::Relaxed) {
            return End::Halted;
        }
        self.full.store(false, Ordering::Relaxed);
        // 1. The versions held, from the database itself.
        let Some(held) = self.look().await else { return self.settle(End::Retry, false).await };
        // 2. What HQ signed, and how far the source in use can bring it.
        let Some(goal) = self.learn().await else { return self.settle(End::Retry, false).await };
        let mut end = End::Done;
        let applied_before = self.metrics.transactions();
        for (instance, entry) in self.in_order(&goal, &held) {
            // 3.-6. Each stream on its own: chain, fetch and verify, apply and prove.
            end = end.or(self.bring(&goal, &instance, entry, news).await);
            if end == End::Again || self.halted.load(Ordering::Relaxed) {
                break;
            }
        }
        // 7. Report, and clean up.
        self.sweep_packs(&goal).await;
        self.settle(end, self.metrics.transactions() > applied_before).await
    }

    /// Step 1.
    async fn look(&self) -> Option<AllHeld> {
        match self.db.all_held().await {
            Ok(held) => {
                self.shown().held = held.clone();
                self.at(Step::Looked).then_some(held)
            }
            Err(e) => {
                self.trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                None
            }
        }
    }

    /// Step 2. None when the source in use does not answer or nothing was ever received.
    async fn learn(&self) -> Option<Goal> {
        let from = self.upstream.read_from();
        let refreshed = self.upstream.refresh(from, &self.device, &self.config.limits).await;
        self.note_sources(&refreshed.problems);
        if refreshed.changed {
            self.tell.notify_one();
        }
        if refreshed.reached == 0 {
            return None;
        }
        let manifest = lock(&self.device).manifest().cloned()?;
        self.memory.prune(&manifest);
        self.shown().waits.retain(|i, _| manifest.instance(&i.stream).as_ref() == Some(i));
        self.at(Step::Learned).then_some(Goal { from, manifest })
    }

    /// The streams, what is nearly there first: a large pack must not hold up a small one. What
    /// killed this process before comes last.
    fn in_order<'g>(&self, goal: &'g Goal, held: &AllHeld) -> Vec<(Instance, &'g StreamEntry)> {
        let deadly = self.tries.last().map(|t| t.pack.instance);
        let bytes = |(instance, entry): &(Instance, &StreamEntry)| {
            let next = self.next(goal, instance, entry, held, &BTreeSet::new());
            let bytes = if let Next::Apply(packs) = next { packs.iter().map(|p| p.bytes).sum() } else { 0 };
            (deadly.as_ref() == Some(instance), bytes)
        };
        let mut streams: Vec<_> = goal.manifest.instances().collect();
        streams.sort_by_cached_key(|s| bytes(s));
        streams
    }

    /// Steps 3 to 6 for one stream, transaction by transaction.
    async fn bring(
        &self,
        goal: &Goal,
        instance: &Instance,
        entry: &StreamEntry,
        news: &mut watch::Receiver<u64>,
    ) -> End {
        let mut without = BTreeSet::new();
        loop {
            // 3. The cheapest chain of packs by bytes, from what the database says.
            let held = self.shown().held.clone();
            let packs = match self.next(goal, instance, entry, &held, &without) {
                Next::Nothing => {
                    self.shown().waits.remove(instance);
                    return End::Done;
                }
                Next::Wait(why) => {
                    self.shown().waits.insert(instance.clone(), why);
                    return if without.is_empty() || self.is_unhurried(goal) { End::Done } else { End::Retry };
                }
                Next::Apply(packs) => packs,
            };
            // 4. Fetch and verify.
            let files = match self.fetch(goal, instance, &packs, news).await {
                Went::On(files) => files,
                Went::Without(pack) => {
                    without.insert(pack);
                    continue;
                }
                Went::Over(end) => return end,
            };
            // 5. and 6. Apply in one transaction with the version, proved before it commits.
            match self.apply(goal, instance, files).await {
                Went::On(()) => {}
                Went::Without(pack) => {
                    without.insert(pack);
                }
                Went::Over(end) => return end,
            }
        }
    }

    fn next<'g>(
        &self,
        goal: &Goal,
        instance: &Instance,
        entry: &'g StreamEntry,
        held: &'g AllHeld,
        without: &BTreeSet<PackName>,
    ) -> Next<'g> {
        let Some(served) = self.upstream.served(goal.from, instance) else {
            return Next::Wait("the relay has not told its versions yet".into());
        };
        let held = held.get(&instance.stream).map(at);
        let drifted = self.memory.drifted(&instance.stream);
        let standing = Standing { held: held.as_ref(), entry, epoch: goal.manifest.epoch, served, drifted };
        let word = (goal.from == pace::From::Fallback).then(|| self.upstream.word());
        let (now, monotonic) = (self.clock.now(), self.clock.monotonic());
        let next = plan::next(standing, |p| {
            let name = p.name(instance);
            !without.contains(&name)
                && !self.memory.avoids(&name, now)
                && !self.tries.must_wait(&name, monotonic)
                && !word.as_ref().is_some_and(|w| w.refuses(instance, p))
        });
        // The borrow of `held` above ends here; the packs are the manifest's.
        match next {
            Next::Nothing => Next::Nothing,
            Next::Wait(why) => Next::Wait(why),
            Next::Apply(packs) => Next::Apply(packs.iter().filter_map(|p| entry.pack(p.version, p.kind)).collect()),
        }
    }

    /// Static sources are looked at in the pace of polls: what is not there yet comes when it comes.
    fn is_unhurried(&self, goal: &Goal) -> bool {
        goal.from == pace::From::Fallback || self.upstream.is_static()
    }

    /// Step 4: the packs of one transaction, whole and verified.
    async fn fetch(
        &self,
        goal: &Goal,
        instance: &Instance,
        packs: &[&PackEntry],
        news: &mut watch::Receiver<u64>,
    ) -> Went<Vec<(PathBuf, PackEntry)>> {
        let parts: Vec<PathBuf> = packs.iter().map(|p| self.part(&p.name(instance))).collect();
        let there = parts.iter().filter_map(|p| std::fs::metadata(p).ok()).map(|m| m.len()).sum();
        if let Err(why) = self.room.fits(packs, there) {
            self.no_room(&why).await;
            return Went::Over(End::DiskFull);
        }
        let mut files = Vec::with_capacity(packs.len());
        for (entry, part) in packs.iter().zip(parts) {
            let name = entry.name(instance);
            if let Some(dir) = part.parent()
                && let Err(e) = shelf::create_dir(dir)
            {
                self.trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                return Went::Over(if e.is_disk_full() { End::DiskFull } else { End::Retry });
            }
            let fetched = tokio::select! {
                biased;
                fetched = self.upstream.fetch_pack(goal.from, &name, entry, &part) => fetched,
                Ok(()) = news.changed() => return Went::Over(End::Again),
            };
            match fetched {
                Ok(()) => {
                    self.metrics.fetched(entry.bytes);
                    self.memory.faults(|f| f.mend(fault::REFUSED, |f| f.object.as_deref() == Some(&name.to_string())));
                    files.push((part, (*entry).clone()));
                }
                Err(errors) => return self.not_fetched(&name, &errors).await,
            }
            if !self.at(Step::Fetched(name)) {
                return Went::Over(End::Done);
            }
        }
        Went::On(files)
    }

    async fn not_fetched<T>(&self, name: &PackName, errors: &[FetchError]) -> Went<T> {
        let text = errors.iter().map(|e| e.to_string()).collect::<Vec<_>>().join("; ");
        let any = |kind| errors.iter().any(|e| e.kind == kind);
        if any(FetchErrorKind::Halt) {
            self.trouble(Verdict::Halt, false, &text);
            return Went::Over(End::Halted);
        }
        if any(FetchErrorKind::Disk) {
            self.no_room(&text).await;
            return Went::Over(End::DiskFull);
        }
        if errors.iter().any(|e| e.verdict() == Verdict::Quarantine) {
            // The source's copy is wrong, not the pack: leave it for now, take another way.
            tracing::warn!(pack = %name, %text, "a pack was refused");
            let (instance, now) = (name.instance.clone(), self.clock.now());
            self.memory.faults(|f| f.raise(fault::REFUSED, Some(&instance), Some(&name.to_string()), &text, now));
            return Went::Without(name.clone());
        }
        if errors.iter().all(FetchError::is_not_found) {
            tracing::debug!(pack = %name, "the pack is not there yet");
            return Went::Without(name.clone());
        }
        tracing::info!(pack = %name, %text, "the pack could not be fetched now");
        Went::Over(End::Retry)
    }

    /// Steps 5 and 6.
    async fn apply(&self, goal: &Goal, instance: &Instance, files: Vec<(PathBuf, PackEntry)>) -> Went<()> {
        let Some(first) = files.first().map(|(_, e)| e.name(instance)) else { return Went::On(()) };
        let turn = match self.hold.enter(|| self.clock.monotonic()).await {
            Ok(turn) => turn,
            Err(until) => return Went::Over(End::Held { until }),
        };
        if !self.at(Step::Applying(first.clone())) {
            return Went::Over(End::Done);
        }
        self.tries.begin(&first);
        let started = self.clock.monotonic();
        let outcome = self.db.apply(instance, goal.manifest.epoch, files.clone(), self.clock.now()).await;
        let took = self.clock.monotonic().saturating_sub(started);
        self.tries.end(&first);
        drop(turn);
        self.log_dirty.store(true, Ordering::Relaxed);
        if let Ok(held) = self.db.all_held().await {
            self.shown().held = held;
        }
        match outcome {
            Ok(applied) => {
                let kind = first.kind.to_string();
                tracing::info!(%instance, version = %applied.version, %kind, rows = ?applied.rows, ms = took.as_millis() as u64, "applied");
                self.metrics.applied(&kind, took);
                self.tell.notify_one();
                if !self.at(Step::Applied(first)) {
                    return Went::Over(End::Done);
                }
                self.after_apply(instance, &files);
                if self.at(Step::Cleaned) { Went::On(()) } else { Went::Over(End::Done) }
            }
            Err(e) => self.not_applied(instance, &first, &e).await,
        }
    }

    /// What an applied pack mends, and its file.
    fn after_apply(&self, instance: &Instance, files: &[(PathBuf, PackEntry)]) {
        let full = files.iter().any(|(_, e)| e.kind == proto::layout::PackKind::Full);
        if full && self.memory.drifted(&instance.stream) {
            self.memory.healed(&instance.stream);
            self.memory.faults(|f| f.mend(fault::DRIFT, |f| f.instance.as_ref() == Some(instance)));
            tracing::info!(%instance, "healed by a full pack");
        }
        for (part, _) in files {
            if let Err(e) = shelf::remove(part) {
                tracing::warn!(error = %e, "an applied pack could not be deleted");
            }
        }
    }

    /// Whose fault was it? The rows here say.
    async fn not_applied(&self, instance: &Instance, first: &PackName, failure: &ApplyFailure) -> Went<()> {
        let text = failure.to_string();
        self.metrics.refused(failure.code());
        match failure.remedy() {
            Remedy::MakeRoom => {
                self.no_room(&text).await;
                Went::Over(End::DiskFull)
            }
            Remedy::Retry => {
                tracing::warn!(%instance, %text, "not applied now");
                Went::Over(End::Retry)
            }
            Remedy::Halt => {
                self.trouble(Verdict::Halt, false, &text);
                Went::Over(End::Halted)
            }
            Remedy::AvoidPack => self.avoid(instance, failure.pack().unwrap_or(&first.to_string()), &text),
            Remedy::AskRows => match self.rows_are_right(&instance.stream).await {
                Some(true) => self.avoid(instance, failure.pack().unwrap_or(&first.to_string()), &text),
                Some(false) => self.drifted(instance, &text),
                None => Went::Over(End::Retry),
            },
            // A full makes the stream's tables anew; what it cannot mend is beyond this program.
            Remedy::Damaged if first.kind == proto::layout::PackKind::Delta => self.drifted(instance, &text),
            Remedy::Damaged => {
                self.trouble(
                    Verdict::Halt,
                    false,
                    &format!("{text}: stop the POS application and this agent, move store.db* away, start both"),
                );
                Went::Over(End::Halted)
            }
        }
    }

    /// Whether the rows of a stream are those of its version; unknown when they cannot be read now.
    async fn rows_are_right(&self, stream: &StreamName) -> Option<bool> {
        match self.db.verify(stream).await {
            Ok(checks) => Some(checks.iter().all(proto::replica::TableCheck::is_right)),
            Err(e) if e.verdict() == Verdict::Rebuild => Some(false),
            Err(e) => {
                tracing::warn!(%stream, error = %e, "the rows could not be checked");
                None
            }
        }
    }

    /// The rows here drifted: heal by a full.
    fn drifted(&self, instance: &Instance, why: &str) -> Went<()> {
        if self.memory.drifted(&instance.stream) {
            // Latched already: a heal is under way and met this error itself.
            return Went::Over(End::Retry);
        }
        tracing::error!(%instance, %why, "the rows are not those of the version; a full pack will heal them");
        match self.latch(instance, why) {
            Ok(()) => Went::On(()),
            Err(e) => {
                self.trouble(Verdict::Retry, false, &e.to_string());
                Went::Over(End::Retry)
            }
        }
    }

    /// Sets the durable latch that the next cycle heals.
    pub fn latch(&self, instance: &Instance, why: &str) -> Result<(), DeviceError> {
        let now = self.clock.now();
        self.memory.latch_drift(&instance.stream, why)?;
        self.memory.faults(|f| f.raise(fault::DRIFT, Some(instance), None, why, now));
        self.metrics.drifted();
        self.tell.notify_one();
        Ok(())
    }

    /// The pack is bad: go on without it, keep selling.
    fn avoid(&self, instance: &Instance, pack: &str, why: &str) -> Went<()> {
        let Ok(name) = pack.parse::<PackName>() else { return Went::Over(End::Retry) };
        tracing::error!(%instance, pack, %why, "the pack is bad; the version before is kept");
        let now = self.clock.now();
        self.memory.avoid(&name, why, now);
        self.memory.faults(|f| f.raise(fault::PACK_IN_ERROR, Some(instance), Some(pack), why, now));
        if let Err(e) = shelf::remove(&self.part(&name)) {
            tracing::warn!(error = %e, "a bad pack could not be deleted");
        }
        self.tell.notify_one();
        Went::Without(name)
    }

    /// No room: let the ballast go, so that SQLite can clean up; the version held stays whole.
    async fn no_room(&self, why: &str) {
        let now = self.clock.now();
        self.memory.faults(|f| f.raise(fault::DISK_FULL, None, None, why, now));
        if !self.full.swap(true, Ordering::Relaxed) {
            tracing::error!(%why, "no room on the disk; the versions held stay");
        }
        self.room.release();
        if let Err(e) = self.db.truncate_log().await {
            tracing::warn!(error = %e, "the log could not be cut");
        }
    }

    /// A failure of the surroundings.
    fn trouble(&self, verdict: Verdict, disk_full: bool, text: &str) {
        let now = self.clock.now();
        if verdict == Verdict::Halt {
            tracing::error!(%text, "halted: the disk or the database cannot be relied on; restart after a look at it");
            self.halted.store(true, Ordering::Relaxed);
            self.memory.faults(|f| f.raise(fault::HALTED, None, None, text, now));
        } else if disk_full {
            self.full.store(true, Ordering::Relaxed);
            self.room.release();
            self.memory.faults(|f| f.raise(fault::DISK_FULL, None, None, text, now));
        } else {
            tracing::warn!(%text, "trying again");
        }
    }

    /// Sources that failed or were refused, as faults that end when they answer again.
    fn note_sources(&self, problems: &[FollowError]) {
        let now = self.clock.now();
        let found: Vec<(&str, String, String)> = problems
            .iter()
            .map(|p| match p {
                FollowError::Fetch(e) => (fault::SOURCE, e.source_url.clone(), e.to_string()),
                FollowError::Refused { source_url, .. } => {
                    (fault::REFUSED, source_url.clone(), format!("{}: {p}", p.code()))
                }
                FollowError::Device(e) => (fault::SOURCE, proto::device::FILE.to_owned(), e.to_string()),
            })
            .collect();
        for p in problems {
            match p {
                FollowError::Device(e) => {
                    let full = matches!(e, DeviceError::Sqlite(e) if e.is_disk_full());
                    self.trouble(p.verdict(), full, &e.to_string());
                }
                p => tracing::info!(code = p.code(), "{p}"),
            }
        }
        self.memory.faults(|f| {
            let mut changed = false;
            for code in [fault::SOURCE, fault::REFUSED] {
                let still =
                    |object: Option<&str>| found.iter().any(|(c, o, _)| *c == code && Some(o.as_str()) == object);
                changed |= f.mend(code, |f| f.instance.is_none() && !still(f.object.as_deref()));
            }
            for (code, object, text) in &found {
                changed |= f.raise(code, None, Some(object), text, now);
            }
            changed
        });
    }

    /// Step 7: what the cycle mended, what it found, and idle work.
    async fn settle(&self, end: End, advanced: bool) -> End {
        let end = if self.halted.load(Ordering::Relaxed) { End::Halted } else { end };
        if !self.full.load(Ordering::Relaxed) && !matches!(end, End::Retry | End::Halted) {
            self.memory.faults(|f| f.mend(fault::DISK_FULL, |_| true));
        }
        self.mend_packs();
        if end == End::Done && !advanced {
            self.room.restore();
            if self.log_dirty.load(Ordering::Relaxed) {
                match self.db.truncate_log().await {
                    Ok(cut) => self.log_dirty.store(!cut, Ordering::Relaxed),
                    Err(e) => tracing::warn!(error = %e, "the log could not be cut"),
                }
            }
        }
        if self.memory.save_faults() {
            self.tell.notify_one();
        }
        end
    }

    /// A bad pack that was left behind, or is listed no more, is a fault no more; one that kills
    /// this process again and again is.
    fn mend_packs(&self) {
        let (held, now) = (self.shown().held.clone(), self.clock.now());
        let avoided = self.memory.avoided();
        let deadly = self.tries.last().filter(|t| t.is_alarming());
        let is_behind = |name: &PackName| {
            held.get(&name.instance.stream)
                .is_some_and(|h| h.audience == name.instance.audience && h.version >= name.version)
        };
        self.memory.faults(|f| {
            let mut changed = f.mend(fault::PACK_IN_ERROR, |f| {
                let name: Option<PackName> = f.object.as_deref().and_then(|o| o.parse().ok());
                let is_deadly = |n: &PackName| deadly.as_ref().is_some_and(|d| &d.pack == n);
                name.is_none_or(|n| is_behind(&n) || !(avoided.contains(&n) || is_deadly(&n)))
            });
            if let Some(t) = &deadly {
                let text =
                    format!("this agent died {} times while applying it; trying again with growing delay", t.deaths);
                changed |= f.raise(fault::PACK_IN_ERROR, Some(&t.pack.instance), Some(&t.pack.to_string()), &text, now);
            }
            changed
        });
    }

    /// Deletes downloads that no plan will want any more, once a manifest.
    async fn sweep_packs(&self, goal: &Goal) {
        let swept = self.swept_for.lock().unwrap_or_else(PoisonError::into_inner).replace(goal.manifest.serial);
        if swept == Some(goal.manifest.serial) {
            return;
        }
        let held = self.shown().held.clone();
        let wanted: BTreeSet<PathBuf> = goal
            .manifest
            .instances()
            .flat_map(|(i, e)| {
                let at = held.get(&i.stream).and_then(|h| h.version_of(&i, goal.manifest.epoch));
                let drifted = self.memory.drifted(&i.stream);
                let ahead = move |p: &&PackEntry| drifted || at.is_none_or(|v| p.version > v);
                e.packs.iter().filter(ahead).map(|p| self.part(&p.name(&i))).collect::<Vec<_>>()
            })
            .collect();
        let root = self.config.data_dir.join("packs");
        let sweep = move || {
            for dir in shelf::list(&root)? {
                for file in if dir.is_dir { shelf::list(&dir.path)? } else { vec![dir.clone()] } {
                    if !wanted.contains(&file.path) && !file.is_dir {
                        shelf::remove(&file.path)?;
                    }
                }
                if dir.is_dir {
                    shelf::remove_empty_dir(&dir.path)?;
                }
            }
            Ok::<(), shelf::ShelfError>(())
        };
        if let Ok(Err(e)) = tokio::task::spawn_blocking(sweep).await {
            tracing::warn!(error = %e, "old downloads could not be deleted");
        }
    }

    /// Where a pack's download lies.
    fn part(&self, name: &PackName) -> PathBuf {
        self.config.data_dir.join("packs").join(name.instance.to_string()).join(name.file_name())
    }

    /// What status and heartbeats show.
    pub fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, step: Step) -> bool {
        self.observer.as_ref().is_none_or(|o| o(&step))
    }
}

//! The spine: one cycle, which brings every stream as far as it can come now. The loop around it is
//! in `run`, the waiting in `pace`, the choice of packs in `plan`.
//!
//! Owns the order of things; never applies what was not verified, never lets one stream's failure
//! stop another. If the power goes at any line, `store.db` holds whole versions and the next cycle
//! begins from what it says; downloads go on from their length.

mod remedy;
mod tidy;

use crate::config::Config;
use crate::hold::Hold;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::pace::{self, End};
use crate::plan::{self, Next, Standing};
use crate::register_db::{
    AllHeld, DbError, Healed, RegisterDb, Remedy, STORE_DB, at, damaged, forget_stray_log, move_aside,
};
use crate::report::Skew;
use crate::tries::Tries;
use crate::upstream::{RelayWord, Upstream};
use proto::clock::{Clock, Timestamp, boot_id};
use proto::device::{Device, DeviceError, FOREIGN};
use proto::disk::{self, DataDisk, Shortages};
use proto::failpoint;
use proto::fetch::BadSource;
use proto::follow::lock;
use proto::ids::{Instance, Version};
use proto::layout::{PackKind, PackName};
use proto::manifest::{Listed, Manifest, PackEntry, StreamEntry};
use proto::replica::{is_in_the_way, lacking, sqlite};
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
    #[error("{0}; {remedy}", remedy = remedy(.0))]
    Database(#[from] DbError),
    /// The settings name a source that cannot work.
    #[error(transparent)]
    Source(#[from] BadSource),
    /// A counter's name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// What to do about a database that cannot be opened.
fn remedy(e: &DbError) -> &'static str {
    if e.is_busy() {
        HELD
    } else {
        "if it is damaged: stop the POS application, move store.db, store.db-wal and store.db-shm away, start again"
    }
}

/// A sound database that another program keeps from us is not to be moved away.
pub const HELD: &str =
    "a program holds it, with locking_mode = EXCLUSIVE or in a transaction that does not end: end it";

impl OpenError {
    /// Whether another program holds the database.
    pub fn is_busy(&self) -> bool {
        matches!(self, OpenError::Database(e) if e.is_busy())
    }

    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            OpenError::Device(e) => e.is_disk_full(),
            OpenError::Database(e) => e.is_disk_full(),
            OpenError::Shelf(e) => e.is_disk_full(),
            _ => false,
        }
    }

    /// Whether settings or set-up are to be mended by a person.
    pub fn is_set_up(&self) -> bool {
        matches!(
            self,
            OpenError::Source(_)
                | OpenError::Device(
                    DeviceError::NotEnrolled(_) | DeviceError::OtherDevice { .. } | DeviceError::Refused(_)
                )
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
    pub disk: DataDisk,
    /// Counters.
    pub metrics: Metrics,
    /// The clocks' difference, by the last heartbeat.
    pub skew: Skew,
    /// Rung when there is something to do.
    pub wake: Notify,
    /// Rung when there is something to report.
    pub tell: Notify,
    /// Counts the relay's news: they break off a cycle's download.
    pub news: watch::Sender<u64>,
    /// Had by the cycle that runs, of the loop or of a command that was handed over.
    turn: tokio::sync::Mutex<()>,
    /// Had by the heartbeat on its way: one overtaken by the next would be refused.
    pub telling: tokio::sync::Mutex<()>,
    tries: Tries,
    halted: AtomicBool,
    /// The log holds something that a truncation would free.
    log_dirty: AtomicBool,
    /// This cycle met a full disk, or the one before did, and this one came to write nothing.
    full: AtomicBool,
    /// It is told that the disk is full, until it is not.
    told_full: AtomicBool,
    /// What was written until there was no room.
    short: Shortages,
    /// What no fallback had right.
    bent: Mutex<remedy::Bent>,
    /// The database was damaged and begun anew by this process: not twice, the disk may be dying.
    rebuilt: AtomicBool,
    /// It is damaged, and could not be moved aside.
    unmoved: AtomicBool,
    /// What the database holds was read.
    looked: AtomicBool,
    /// Had by whoever reads all rows.
    pub verifying: Arc<tokio::sync::Mutex<()>>,
    /// Why the file may be damaged, by a look at all rows; the next cycle judges it.
    doubt: Mutex<Option<String>>,
    swept_for: Mutex<Option<u64>>,
    /// Versions that were found to be held with other rows than the list says: each is healed once, whatever comes of it.
    contradicted: Mutex<BTreeSet<(Instance, Version)>>,
    /// What sources were told of at the last look.
    said: Mutex<BTreeSet<String>>,
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
    /// Without this pack, which no source gives; why.
    Denied(PackName, String),
    /// Without this pack, until another stream has lost a table; which.
    Awaits(PackName, String),
    /// It is over for this stream.
    Over(End),
}

/// Whether a stream waits for another: for one to lose a table that it gets, or for a version that it requires.
fn waits(manifest: &Manifest, listed: &Listed, instance: &Instance, held: &AllHeld) -> bool {
    is_in_the_way(listed, &instance.stream, held) || lacks(manifest, instance, held).is_some()
}

/// What a stream requires of others and is not held, for people.
fn lacks(manifest: &Manifest, instance: &Instance, held: &AllHeld) -> Option<String> {
    let lacking = lacking(manifest, &instance.stream, held);
    let each: Vec<String> = lacking.iter().map(|(stream, version)| format!("version {version} of {stream}")).collect();
    (!each.is_empty())
        .then(|| format!("DEP_MISSING: it requires {}, which this register does not hold yet", each.join(", ")))
}

/// The databases of a data directory, open.
struct Files {
    device: Arc<Mutex<Device>>,
    memory: Memory,
    word: RelayWord,
    db: RegisterDb,
    /// Whether `store.db` was damaged and begun anew.
    is_anew: bool,
}

impl Files {
    fn open(config: &Config, now: Timestamp) -> Result<Files, OpenError> {
        let device = Arc::new(Mutex::new(Device::open(&config.data_dir, &config.device(), &config.limits)?));
        let (memory, word) = Memory::load(device.clone())?;
        // Before the file is moved: what is opened next, also by another try, finds nothing wrong.
        let tell = |damage: &str| {
            memory.faults(|f| remedy::raise_anew(f, STORE_DB, &remedy::begun_anew(damage), now));
            // Without room there is none for a new file either.
            memory.keep_faults().or_else(|e| if e.is_disk_full() { Err(e) } else { remedy::goes_on_without(e) })
        };
        forget_stray_log(&config.store_db())?;
        let (db, mut is_anew) = match RegisterDb::open(&config.store_db(), &config.limits) {
            Err(e) if e.verdict() == Verdict::Rebuild || e.is_unreadable() => {
                let path = config.store_db();
                let is_damaged = sqlite::is_damaged(&path);
                if is_damaged {
                    let (aside, why) = (damaged(&path), e.to_string());
                    tell(&why)?;
                    tracing::error!(code = fault::DRIFT, path = %path.display(), aside = %aside.display(), %why, "the database is damaged: it is moved aside, and a new one begun");
                    move_aside(&path)?;
                }
                (RegisterDb::open(&config.store_db(), &config.limits)?, is_damaged)
            }
            other => (other?, false),
        };
        let is_foreign = lock(&device).is_foreign()?;
        if is_foreign {
            let disowned = match db.disown() {
                // Not to be left for the first look: if that finds the file sound, the old rows would count.
                Err(e) if e.verdict() == Verdict::Rebuild || e.is_unreadable() => {
                    if db.heal()? == Healed::Lost {
                        tell(&e.to_string())?;
                        is_anew = true;
                        db.begin_anew(|| ())?;
                        0
                    } else {
                        db.disown()?
                    }
                }
                done => done?,
            };
            if disowned > 0 {
                tracing::warn!(
                    disowned,
                    "the rows are another headquarters', or nobody knows whose: all streams come anew"
                );
            }
            lock(&device).set_fact(FOREIGN, &false)?;
        }
        Ok(Files { device, memory, word, db, is_anew })
    }
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
        let disk = DataDisk::new(&dir, config.ballast.map(|b| b.0));
        let mut full = None;
        let make_room = |e: &OpenError| {
            full = Some(e.to_string());
            disk.release();
        };
        let files = disk::or_make_room(|| Files::open(&config, clock.now()), OpenError::is_disk_full, make_room)?;
        let Files { device, memory, word, db, is_anew } = files;
        disk.restore();
        shelf::create_dir(&dir.join("packs"))?;
        let upstream = Upstream::new(&config, clock.clone(), word)?;
        // A halt lasts until somebody restarted the service.
        memory.faults(|f| f.mend(fault::HALTED, |_| true));
        let tries = Tries::open(&dir, clock.monotonic(), &boot_id());
        let agent = Agent {
            config,
            device,
            db,
            upstream,
            memory,
            disk,
            tries,
            clock,
            hold: Hold::default(),
            metrics: Metrics::new()?,
            skew: Skew::default(),
            wake: Notify::new(),
            tell: Notify::new(),
            news: watch::Sender::new(0),
            turn: tokio::sync::Mutex::default(),
            telling: tokio::sync::Mutex::default(),
            halted: AtomicBool::new(false),
            log_dirty: AtomicBool::new(true),
            full: AtomicBool::new(false),
            told_full: AtomicBool::new(false),
            short: Shortages::default(),
            bent: Mutex::default(),
            rebuilt: AtomicBool::new(is_anew),
            unmoved: AtomicBool::default(),
            looked: AtomicBool::new(false),
            verifying: Arc::default(),
            doubt: Mutex::default(),
            swept_for: Mutex::new(None),
            contradicted: Mutex::default(),
            said: Mutex::default(),
            shown: Mutex::new(Shown::default()),
            observer,
            _lock: lock,
        };
        if let Some(why) = full {
            agent.out_of_room(&why);
        }
        if is_anew {
            agent.tell.notify_one();
        }
        Ok(agent)
    }

    /// One cycle: as far as every stream can come now. `news` breaks off a download, which goes on
    /// later from where it was: a small change must not wait for a large pack.
    pub async fn cycle(&self, news: &mut watch::Receiver<u64>) -> End {
        let _turn = self.turn.lock().await;
        news.borrow_and_update();
        self.heed_device();
        if self.halted.load(Ordering::Relaxed) {
            return End::Halted;
        }
        let was_full = self.full.swap(false, Ordering::Relaxed);
        // 1. The versions held, from the database itself.
        let held = self.look().await;
        // 2. What HQ signed, and how far the source in use can bring it.
        let goal = if held.is_some() { self.learn().await } else { None };
        let (Some(held), Some(goal)) = (held, goal) else {
            // Nothing was written that would have shown that there is room.
            self.full.fetch_or(was_full, Ordering::Relaxed);
            return self.settle(End::Retry, false).await;
        };
        let applied_before = self.metrics.transactions();
        self.compare(&goal, &held);
        let end = self.bring_all(&goal, &held, news).await;
        // 7. Report, and clean up.
        self.sweep_packs(&goal).await;
        self.settle(end, self.metrics.transactions() > applied_before).await
    }

    /// What is held at the listed version is what is listed; else a full heals it, as after a drift.
    fn compare(&self, goal: &Goal, held: &AllHeld) {
        for (instance, entry) in goal.manifest.instances() {
            let of = held.get(&instance.stream).filter(|_| !self.memory.drifted(&instance.stream));
            let Some(why) = of.and_then(|h| h.differs_from(&instance, goal.manifest.epoch, entry)) else { continue };
            let mut known = self.contradicted.lock().unwrap_or_else(PoisonError::into_inner);
            if known.insert((instance.clone(), entry.version)) {
                self.drifted(&instance, &why);
            }
        }
    }

    /// Steps 3 to 6 for all streams; those that waited for another again, for as long as others move on.
    async fn bring_all(&self, goal: &Goal, held: &AllHeld, news: &mut watch::Receiver<u64>) -> End {
        let mut end = End::Done;
        let (mut turn, listed) = (self.in_order(goal, held), goal.manifest.tables());
        // As many rounds as a chain of streams that wait for one another can be long.
        for _ in 0..=goal.manifest.streams.len() {
            let before = self.metrics.transactions();
            let (mut waiting, mut why) = (Vec::new(), End::Done);
            for (instance, entry) in turn {
                // Each stream on its own: chain, fetch and verify, apply and prove.
                let ended = self.bring(goal, &instance, entry, news).await;
                if ended == End::Again || self.halted.load(Ordering::Relaxed) {
                    return end.or(ended);
                }
                if waits(&goal.manifest, &listed, &instance, &self.shown().held) {
                    why = why.or(ended);
                    waiting.push((instance, entry));
                } else {
                    end = end.or(ended);
                }
            }
            turn = waiting;
            if turn.is_empty() || self.metrics.transactions() == before {
                return end.or(why);
            }
        }
        end.or(End::Retry)
    }

    /// Step 1.
    async fn look(&self) -> Option<AllHeld> {
        // Beside a scan nothing is opened anew.
        let verifying = if self.db.is_swapped() { Some(self.verifying.lock().await) } else { None };
        let held = self.db.look().await;
        drop(verifying);
        if let Some(file) = self.db.take_lost() {
            self.was_deleted_below(&file);
        }
        match held {
            Ok(held) => {
                self.shown().held = held.clone();
                self.looked.store(true, Ordering::Relaxed);
                self.goes_on(None);
                if self.db.lost_log() && self.look_through(&held).await {
                    self.db.log_made_good();
                }
                let doubt = self.doubt().take();
                if let Some(why) = doubt {
                    self.rebuild(&why);
                    return None;
                }
                self.at(Step::Looked).then_some(held)
            }
            Err(e) => {
                if e.verdict() == Verdict::Rebuild || e.is_unreadable() {
                    self.rebuild(&e.to_string());
                } else {
                    self.trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                }
                self.stuck(None, fault::LOCAL_FILES, STORE_DB, &e.to_string());
                None
            }
        }
    }

    /// Step 2. None when the source in use does not answer or nothing was ever received.
    async fn learn(&self) -> Option<Goal> {
        let (from, refreshed) = self.upstream.refresh(&self.device, &self.config.limits).await;
        self.note_sources(&refreshed.problems);
        if refreshed.changed {
            self.tell.notify_one();
        }
        if refreshed.reached == 0 {
            return None;
        }
        let manifest = lock(&self.device).manifest().cloned()?;
        for (stream, why) in manifest.unread.iter().filter(|_| refreshed.changed) {
            tracing::error!(code = fault::STREAM_REFUSED, %stream, %why, "what the manifest lists of it cannot be taken");
        }
        self.memory.prune(&manifest);
        self.bent().prune(&manifest);
        let is_listed = |i: &Instance| manifest.instance(&i.stream).as_ref() == Some(i);
        self.shown().waits.retain(|i, _| is_listed(i));
        self.at(Step::Learned).then_some(Goal { from, manifest })
    }

    /// The streams, what is nearly there first: a large pack must not hold up a small one. What
    /// killed this process before comes last, and before it what waits for another stream.
    fn in_order<'g>(&self, goal: &'g Goal, held: &AllHeld) -> Vec<(Instance, &'g StreamEntry)> {
        let (deadly, listed) = (self.tries.last().map(|t| t.pack.instance), goal.manifest.tables());
        let bytes = |(instance, entry): &(Instance, &StreamEntry)| {
            let next = self.next(goal, instance, entry, held, &BTreeSet::new());
            let bytes = if let Next::Apply(packs) = next { packs.iter().map(|p| p.bytes).sum() } else { 0 };
            (deadly.as_ref() == Some(instance), waits(&goal.manifest, &listed, instance, held), bytes)
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
        let (mut denied, mut awaits) = (None, None);
        loop {
            // 3. The cheapest chain of packs by bytes, from what the database says.
            let held = self.shown().held.clone();
            let packs = match self.next(goal, instance, entry, &held, &without) {
                Next::Nothing => {
                    self.goes_on(Some(instance));
                    return End::Done;
                }
                Next::Wait(why) => {
                    self.goes_on_unless(instance, denied);
                    if let Some(text) = awaits {
                        self.shown().waits.insert(instance.clone(), text);
                    }
                    self.shown()
                        .waits
                        .entry(instance.clone())
                        .and_modify(|w| *w = format!("{why}; {w}"))
                        .or_insert(why);
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
                Went::Denied(pack, why) => {
                    without.insert(pack.clone());
                    denied = Some((pack, why));
                    continue;
                }
                Went::Awaits(..) => return End::Retry,
                Went::Over(end) => return end,
            };
            // 5. and 6. Apply in one transaction with the version, proved before it commits.
            match self.apply(goal, instance, files).await {
                Went::On(()) => self.goes_on(Some(instance)),
                Went::Without(pack) | Went::Denied(pack, _) => {
                    without.insert(pack);
                }
                Went::Awaits(pack, text) => {
                    without.insert(pack);
                    awaits = Some(text);
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
        all: &'g AllHeld,
        without: &BTreeSet<PackName>,
    ) -> Next<'g> {
        let Some(served) = self.upstream.served(goal.from, instance) else {
            let why = self.upstream.silence().map(|e| format!(": {e}")).unwrap_or_default();
            return Next::Wait(format!("the relay has not told its versions yet{why}"));
        };
        let held = all.get(&instance.stream).map(at);
        let drifted = self.memory.drifted(&instance.stream);
        let standing = Standing { held: held.as_ref(), entry, epoch: goal.manifest.epoch, served, drifted };
        let word = (goal.from == pace::From::Fallback).then(|| self.upstream.word());
        let (now, monotonic) = (self.clock.now(), self.clock.monotonic());
        let rests = |name: &PackName| goal.from == pace::From::Fallback && self.bent().rests(name, monotonic);
        let next = plan::next(standing, |p| {
            let name = p.name(instance);
            !without.contains(&name)
                && !self.memory.avoids(&name, now)
                && !self.tries.must_wait(&name, monotonic)
                && !rests(&name)
                && !word.as_ref().is_some_and(|w| w.refuses(instance, p))
        });
        // The borrow of `held` above ends here; the packs are the manifest's.
        match next {
            // Rows that are not those of their version are healed all the same.
            Next::Apply(_) if !drifted && let Some(why) = lacks(&goal.manifest, instance, all) => Next::Wait(why),
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
        let is_held = self.shown().held.contains_key(&instance.stream);
        let now = self.clock.monotonic();
        if let Err(why) = self.short.may_fit(&self.disk, instance, packs, is_held, there, now) {
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
                self.stuck(Some(instance), fault::LOCAL_FILES, &name.to_string(), &e.to_string());
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
                    self.bent().forget(&name);
                    self.memory.faults(|f| f.mend(fault::REFUSED, |f| f.object.as_deref() == Some(&name.to_string())));
                    files.push((part, (*entry).clone()));
                }
                Err(errors) => return self.not_fetched(goal, &name, &errors).await,
            }
            if !self.at(Step::Fetched(name)) {
                return Went::Over(End::Done);
            }
        }
        Went::On(files)
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
        let before = self.disk.beside(self.db.log_bytes());
        let started = self.clock.monotonic();
        let outcome = self.db.apply(instance, &goal.manifest, files.clone(), self.clock.now()).await;
        let took = self.clock.monotonic().saturating_sub(started);
        self.tries.end(&first);
        drop(turn);
        self.log_dirty.store(true, Ordering::Relaxed);
        if let Ok(held) = self.db.all_held().await {
            self.shown().held = held;
        }
        let outcome = match outcome {
            Err(e) if e.remedy() != Remedy::Halt && self.is_committed(goal, instance, &files) => {
                tracing::warn!(%instance, error = %e, "committed, but not tidied up after");
                Ok(None)
            }
            other => other.map(|applied| Some(applied.rows)),
        };
        match outcome {
            Ok(rows) => {
                let (kind, version) = (first.kind.to_string(), files.last().map(|(_, e)| e.version.get()));
                tracing::info!(%instance, version, %kind, rows = rows.map(|r| r.total()), ms = took.as_millis() as u64, "applied");
                self.metrics.applied(&kind, took);
                self.short.had_room(instance);
                self.tell.notify_one();
                if !self.at(Step::Applied(first)) {
                    return Went::Over(End::Done);
                }
                self.after_apply(instance, &files);
                if self.at(Step::Cleaned) { Went::On(()) } else { Went::Over(End::Done) }
            }
            Err(e) => {
                if let Some(before) = before.filter(|_| e.remedy() == Remedy::MakeRoom) {
                    let packs: Vec<&PackEntry> = files.iter().map(|(_, e)| e).collect();
                    let after = self.disk.beside(self.db.log_bytes());
                    self.short.found(instance, &packs, before, after, self.clock.monotonic());
                }
                self.not_applied(instance, &first, &files, &e).await
            }
        }
    }

    /// Whether the last pack is in although its application ended with an error (a checkpoint after
    /// the commit that met a full disk).
    fn is_committed(&self, goal: &Goal, instance: &Instance, files: &[(PathBuf, PackEntry)]) -> bool {
        let shown = self.shown();
        let held = shown.held.get(&instance.stream).and_then(|h| h.version_of(instance, goal.manifest.epoch));
        // A heal ends at the version that was held before: there it says nothing.
        held.is_some() && held == files.last().map(|(_, e)| e.version) && !self.memory.drifted(&instance.stream)
    }

    /// What an applied pack mends, and its file.
    fn after_apply(&self, instance: &Instance, files: &[(PathBuf, PackEntry)]) {
        let full = files.iter().any(|(_, e)| e.kind == PackKind::Full);
        if full && self.memory.drifted(&instance.stream) {
            self.memory.healed(&instance.stream);
            self.memory
                .faults(|f| f.mend(fault::DRIFT, |f| f.instance.as_ref().is_some_and(|i| i.stream == instance.stream)));
            tracing::info!(%instance, "healed by a full pack");
        }
        for (part, _) in files {
            if let Err(e) = failpoint::step("agent.remove-pack", || shelf::remove(part)) {
                tracing::warn!(error = %e, "an applied pack could not be deleted");
            }
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

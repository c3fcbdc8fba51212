//! The spine: what a relay does, once. `mirror_once` reads like ARCHITECTURE.md's way of a price; the loop around it is
//! in `run`. Each step leaves the disk in a state that `Relay::open` understands, so that the power may go
//! between any two.

use crate::beats;
use crate::config::Config;
use crate::debts::Standing;
use crate::hall::{Files, Hall};
use crate::lan::objects::Objects;
use crate::shadow::{Shadow, ShadowError};
use crate::shelves::{Room, Shelves, Truth, is_exhausted};
use crate::spool::{Spool, SpoolError};
use crate::steps::Steps;
use crate::stream::{self, Absent, Outcome, Rot, Supply};
use crate::trial::Runner;
use crate::trust_files::TrustFiles;
use bytes::Bytes;
use futures_util::future::join_all;
use proto::clock::Clock;
use proto::config::ConfigError;
use proto::device::{self, Device, DeviceError};
use proto::disk::{self, Shortages};
use proto::fetch::Source;
use proto::follow::{self, FollowError, Follower, Refreshed};
use proto::ids::{DeviceId, Instance, StreamName, Version};
use proto::layout::{ObjectName, PackName};
use proto::manifest::Manifest;
use proto::retry::Verdict;
use proto::shelf::{LockError, LockFile, ShelfError};
use proto::wire::fault;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Why a relay cannot be opened or go on.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Another process has the data directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Not enrolled, or its memory failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// `relay.db`.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// `shadow.db`.
    #[error(transparent)]
    Shadow(#[from] ShadowError),
    /// Files.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// A setting that only shows here.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl RelayError {
    /// What to do about it.
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            RelayError::Device(e) => e.verdict(),
            RelayError::Spool(e) => e.verdict(),
            RelayError::Shadow(e) => e.verdict(),
            RelayError::Shelf(e) | RelayError::Lock(LockError::Shelf(e)) => e.verdict(),
            _ => Verdict::Retry,
        }
    }
    pub(crate) fn is_disk_full(&self) -> bool {
        match self {
            RelayError::Device(e) => e.is_disk_full(),
            RelayError::Spool(e) => e.is_disk_full(),
            RelayError::Shadow(e) => e.is_disk_full(),
            RelayError::Shelf(e) | RelayError::Lock(LockError::Shelf(e)) => e.is_disk_full(),
            _ => false,
        }
    }
}

/// How a cycle goes about failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// One try of a pack, no waiting: `once`, `import`.
    Once,
    /// Pauses between tries; a loop comes back.
    Service,
}

/// What one cycle brought.
#[derive(Debug, Default)]
pub struct Round {
    /// Sources that answered.
    pub reached: usize,
    /// Sources that failed, or whose objects were refused.
    pub problems: Vec<String>,
    /// How each stream ended.
    pub streams: BTreeMap<StreamName, Outcome>,
}

/// What a pack that no source has is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wanted {
    /// To come to the head.
    Here,
    /// To install a register from nothing.
    ByNew,
}

/// An enrolled relay with its files open.
#[derive(Debug)]
pub struct Relay {
    /// What the rooms share.
    pub hall: Arc<Hall>,
    /// The replica that packs are tried on.
    pub shadow: Arc<Shadow>,
    /// The sources in order.
    pub sources: Vec<Source>,
    /// One a source: a dead one must not hold up the others.
    followers: Vec<tokio::sync::Mutex<Follower>>,
    /// Sources that failed lately, until when they are asked last.
    pub(crate) down: Mutex<BTreeMap<String, Duration>>,
    /// Packs that failed lately, until when they wait.
    pub(crate) pauses: Mutex<BTreeMap<PackName, Duration>>,
    /// Packs whose files the disk gave back otherwise than they came.
    pub(crate) rotted: Mutex<BTreeMap<PackName, Rot>>,
    /// Streams that wait for another to lose a table, and how long each pauses next.
    pub(crate) awaiting: Mutex<BTreeMap<StreamName, Duration>>,
    /// Versions that the shadow was found to hold with other rows than the list says.
    pub(crate) contradicted: Mutex<BTreeSet<(Instance, Version)>>,
    /// Listed packs that no source has, since when.
    pub(crate) absent: Mutex<BTreeMap<(Wanted, PackName), Absent>>,
    /// Packs in `ok/` whose files turned out damaged.
    pub(crate) rotten: tokio::sync::Mutex<mpsc::UnboundedReceiver<PackName>>,
    /// Ends scratch proofs and checks of rows, when there is something better to do.
    pub(crate) spare: Mutex<CancellationToken>,
    /// What had no room in the shadow.
    pub(crate) short: Shortages,
    /// What had no room in the scratch database.
    pub(crate) short_of_proof: Shortages,
    /// Held by whoever closes a gap in the chain in `ok/`: there is one scratch database.
    pub(crate) completing: tokio::sync::Mutex<()>,
    /// When this process opened the directory, by the monotonic clock.
    pub(crate) opened: Duration,
    /// One a stream: the loop and an import must not work on the same.
    pub(crate) locks: Mutex<BTreeMap<StreamName, Arc<tokio::sync::Mutex<()>>>>,
    /// One a pack that is being downloaded.
    pub(crate) fetching: Mutex<BTreeMap<PackName, Arc<tokio::sync::Mutex<()>>>>,
    /// Held by whoever puts a manifest or trust files to work.
    pub(crate) adopting: tokio::sync::Mutex<()>,
    /// The trust files that registers walk.
    pub(crate) trust_files: Mutex<TrustFiles>,
    /// Whether an import is at work on the streams.
    pub(crate) importing: watch::Sender<bool>,
    /// Held by whoever works in `import/`: what lies there is of one folder.
    pub(crate) import_turn: tokio::sync::Mutex<()>,
    /// The folder that is imported now, or was last.
    pub(crate) import_of: watch::Sender<PathBuf>,
    _lock: LockFile,
}

/// What a relay is opened with besides its settings.
#[derive(Debug)]
pub struct Tools {
    /// Who runs trials.
    pub runner: Runner,
    /// Who hears of durable steps.
    pub steps: Steps,
}

impl Relay {
    /// Opens the data directory of an enrolled relay, puts it in order, and fills the hall.
    pub fn open(config: Config, clock: Arc<dyn Clock>, tools: Tools) -> Result<Relay, RelayError> {
        // A missing directory is a missing enrolment: nothing is made here, perhaps by another user than the service's.
        if !config.data_dir.join(proto::device::FILE).exists() {
            return Err(DeviceError::NotEnrolled(config.data_dir.display().to_string()).into());
        }
        let lock = LockFile::acquire(&config.data_dir)?;
        let mut full = None;
        let make_room = |e: &RelayError| {
            full = Some(e.to_string());
            config.disk().release();
        };
        let opened = disk::or_make_room(|| Relay::open_files(&config, &tools), RelayError::is_disk_full, make_room)?;
        let relay = Relay::start(config, clock, lock, opened)?;
        if let Some(why) = full {
            relay.hall.out_of_room(&why);
        }
        Ok(relay)
    }

    fn open_files(config: &Config, tools: &Tools) -> Result<(Files, Shadow, bool), RelayError> {
        let dir = &config.data_dir;
        let mut device = Device::open(dir, &DeviceId::Relay(config.store.clone()), &config.limits)?;
        let shelves = Shelves::open(dir, tools.steps.clone())?;
        let spool = Spool::open(dir, config.events)?;
        let (shadow, lost) = Shadow::open(dir, &config.limits, tools.runner.clone())?;
        if device.is_foreign()? {
            let disowned = shadow.disown().map_err(ShadowError::from)?;
            if disowned > 0 {
                tracing::warn!(
                    disowned,
                    "the shadow's rows are another headquarters', or nobody knows whose: all streams come anew"
                );
            }
            // They would lock registers out, and be taken for ours; these are fetched anew, too.
            shelves.drop_small()?;
            device.set_fact(device::FOREIGN, &false)?;
        }
        Ok((Files { shelves, spool, device }, shadow, lost))
    }

    fn start(
        config: Config,
        clock: Arc<dyn Clock>,
        lock: LockFile,
        (files, shadow, lost): (Files, Shadow, bool),
    ) -> Result<Relay, RelayError> {
        let (sources, opened) = (config.sources()?, clock.monotonic());
        let (tell, rotten) = mpsc::unbounded_channel();
        let objects = Objects::new(config.cache.clone(), tell, Arc::clone(&clock));
        let hall = Arc::new(Hall::new(config, clock, files, objects));
        let followers = sources.iter().map(|s| tokio::sync::Mutex::new(Follower::new(vec![s.clone()]))).collect();
        let relay = Relay {
            hall,
            shadow: Arc::new(shadow),
            sources,
            followers,
            down: Mutex::default(),
            pauses: Mutex::default(),
            rotted: Mutex::default(),
            awaiting: Mutex::default(),
            contradicted: Mutex::default(),
            absent: Mutex::default(),
            rotten: tokio::sync::Mutex::new(rotten),
            spare: Mutex::default(),
            short: Shortages::default(),
            short_of_proof: Shortages::default(),
            completing: tokio::sync::Mutex::default(),
            opened,
            locks: Mutex::default(),
            fetching: Mutex::default(),
            adopting: tokio::sync::Mutex::default(),
            trust_files: Mutex::default(),
            importing: watch::Sender::new(false),
            import_turn: tokio::sync::Mutex::default(),
            import_of: watch::Sender::default(),
            _lock: lock,
        };
        if lost {
            relay.hall.event("SHADOW_LOST", "", "shadow.db was damaged; it is made anew from ok/");
        }
        if let Some(why) = relay.hall.spool.lost() {
            relay.hall.event("SPOOL_LOST", "", &format!("relay.db was begun anew: {why}"));
        }
        relay.where_are_we()?;
        relay.hall.disk.restore();
        Ok(relay)
    }

    /// Step 1 of a cycle, at a start: the directories are made to agree with what the shadow proved.
    fn where_are_we(&self) -> Result<(), RelayError> {
        let hall = &self.hall;
        let manifest = {
            let device = follow::lock(&hall.device);
            device.manifest().map(|m| (Arc::new(m.get().clone()), m.envelope().to_vec()))
        };
        {
            let mut state = hall.state();
            state.attempts = hall.spool.attempts()?;
            state.drifts = hall.spool.drifts()?;
            state.healed = hall.spool.over()?;
            state.adopted = manifest.as_ref().map(|(m, _)| (m.epoch, m.serial));
            state.manifest = manifest.as_ref().map(|(m, _)| Arc::clone(m));
        }
        self.read_shadow()?;
        let truth = self.truth();
        let contents = hall.shelves.reconcile(&truth)?;
        for (name, length) in &contents.ok {
            let sha256 = truth.listed.get(name).map(|e| e.sha256).or_else(|| truth.proofs.get(name).copied());
            self.serve_pack(name, *length, sha256);
        }
        hall.state().ready =
            contents.ready.keys().filter_map(|n| Some((n.clone(), truth.listed.get(n)?.sha256))).collect();
        if let Some((_, envelope)) = manifest {
            self.put_manifest(&envelope)?;
        }
        if let Err(e) = self.order_trust() {
            if is_exhausted(&e.source) {
                return Err(e.into());
            }
            // What could be read is served; the rest comes anew.
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        hall.restore_refusals(&self.sources)?;
        self.restore_absent()?;
        beats::restore(hall)?;
        beats::forget_unlisted(hall);
        hall.publish_versions();
        Ok(())
    }

    fn truth(&self) -> Truth {
        let state = self.hall.state();
        let entries = |(i, e): (Instance, &proto::manifest::StreamEntry)| {
            e.packs.iter().map(|p| (p.name(&i), p.clone())).collect::<Vec<_>>()
        };
        Truth {
            listed: state.instances().flat_map(entries).collect(),
            proofs: state.proofs.clone(),
            attempts: state.attempts.clone(),
        }
    }

    /// Reads what the shadow holds and has proved into the hall.
    pub(crate) fn read_shadow(&self) -> Result<(), ShadowError> {
        let manifest = self.hall.state().manifest.clone();
        let is_listed = |i: &Instance| {
            let of = |m: &Arc<Manifest>| m.unread.contains_key(&i.stream) || m.instance(&i.stream).as_ref() == Some(i);
            manifest.as_ref().is_some_and(of)
        };
        let contents = self.shadow.read(is_listed)?;
        let mut state = self.hall.state();
        state.held = contents.held;
        state.proofs = contents.proofs;
        Ok(())
    }

    /// A pack in `ok/` is served. Without a known hash it is not: nobody could ask for it anyway.
    pub(crate) fn serve_pack(&self, name: &PackName, length: u64, sha256: Option<proto::digest::Sha256>) {
        if let Some(sha256) = sha256 {
            let path = self.hall.shelves.pack(Room::Ok, name);
            self.hall.objects.put_pack(name.clone(), path, length, sha256);
        }
        self.hall.state().ok.insert(name.clone(), sha256);
    }

    fn put_manifest(&self, envelope: &[u8]) -> Result<(), ShelfError> {
        let name = ObjectName::Manifest(self.hall.config.store.clone());
        self.hall.shelves.put_small(&name, envelope)?;
        self.hall.objects.put_small(name, Bytes::copy_from_slice(envelope));
        Ok(())
    }

    /// One cycle: where are we → trust and manifest → each stream on its own → a complete chain → order.
    pub async fn mirror_once(&self, pace: Pace) -> Round {
        let mut round = Round::default();
        // 1. What a crash left of an import is used, like any source.
        self.finish_import().await;
        // 2. Trust walk and manifest: the highest valid serial over all sources.
        for (reached, problems) in join_all((0..self.sources.len()).map(|n| self.refresh(n))).await {
            round.reached += reached;
            round.problems.extend(problems);
        }
        // 3. Each stream: fetch → verify → ready → trial → ok, or error with its reason.
        round.streams = self.bring_all_up(Supply { sources: &self.sources, only: None }, pace).await;
        // 4. A complete chain, full to head, for registers that are new; what nobody wants any more goes.
        if !self.is_halted() {
            self.spare_time().await;
        }
        round
    }

    /// Tells headquarters how it stands, if it is to be told; a report that does not arrive stops nothing.
    pub async fn report_now(&self) {
        let Ok(Some(hq)) = self.hall.config.hq_source() else { return };
        if let Err(e) = crate::report::report_once(&self.hall, &hq).await {
            tracing::warn!(error = %e, "not reported");
        }
    }

    /// Step 3 for all streams, none waiting for another but at the shadow's door.
    pub(crate) async fn bring_all_up(&self, supply: Supply<'_>, pace: Pace) -> BTreeMap<StreamName, Outcome> {
        let streams: Vec<StreamName> = self.streams();
        let mut waiting: Vec<StreamName> = streams.iter().filter(|s| self.is_in_the_way(s)).cloned().collect();
        let outcomes = join_all(streams.iter().map(|s| self.bring_up(s, supply, pace))).await;
        let mut outcomes: BTreeMap<StreamName, Outcome> = streams.into_iter().zip(outcomes).collect();
        // What waited goes on when what it waited for is there.
        while let Some(n) = waiting.iter().position(|s| !self.is_in_the_way(s)) {
            let stream = waiting.swap_remove(n);
            if outcomes.get(&stream) != Some(&Outcome::AtHead) {
                let outcome = self.bring_up(&stream, supply, pace).await;
                outcomes.insert(stream, outcome);
            }
        }
        outcomes
    }

    /// The streams that the manifest lists, those among them whose entries cannot be read here.
    pub fn streams(&self) -> Vec<StreamName> {
        let manifest = self.hall.state().manifest.clone();
        manifest.iter().flat_map(|m| m.streams.keys().chain(m.unread.keys())).cloned().collect()
    }

    /// Step 2 for one source. How many answered (0 or 1), and what was wrong.
    pub async fn refresh(&self, n: usize) -> (usize, Vec<String>) {
        let Some(follower) = self.followers.get(n) else { return (0, Vec::new()) };
        let mut follower = follower.lock().await;
        let hall = &self.hall;
        let hint = hall.state().awaited();
        let refreshed = follower.refresh(&hall.device, &*hall.clock, &hall.config.limits, hint).await;
        drop(follower);
        let source = self.sources.get(n..=n).unwrap_or_default();
        if refreshed.reached > 0 {
            hall.state().source_seen = Some(hall.clock.monotonic());
        }
        self.note_problems(&refreshed, source);
        if let Some(source) = source.first() {
            self.look_at_bad(source).await;
        }
        let mut problems: Vec<String> = refreshed.problems.iter().map(FollowError::to_string).collect();
        problems.extend(self.take_news(&refreshed, source).await);
        (refreshed.reached, problems)
    }

    /// The faults of sources, and of our own memory, are raised or mended.
    pub(crate) fn note_problems(&self, news: &Refreshed, sources: &[Source]) {
        let hall = &self.hall;
        for source in sources {
            let problem = news.problems.iter().find(|p| !matches!(p, FollowError::Device(_)));
            match problem {
                Some(p @ FollowError::Refused { .. }) => {
                    hall.mended(fault::SOURCE, source.url());
                    hall.fault(fault::REFUSED, None, source.url(), format!("{}: {p}", p.code()));
                }
                Some(p) => hall.fault(fault::SOURCE, None, source.url(), p.to_string()),
                None => {
                    hall.mended(fault::SOURCE, source.url());
                    hall.mended(fault::REFUSED, source.url());
                }
            }
        }
        let mut own = news.problems.iter().filter(|p| matches!(p, FollowError::Device(_))).peekable();
        if own.peek().is_none() {
            hall.mended(fault::LOCAL_FILES, device::FILE);
        }
        for problem in own {
            if is_device_full(problem) {
                self.disk_full(&problem.to_string());
            } else {
                hall.own_trouble(problem.verdict(), None, device::FILE, &problem.to_string());
            }
        }
    }

    /// Puts what was accepted to work; the trouble with that, if any.
    pub(crate) async fn take_news(&self, news: &Refreshed, sources: &[Source]) -> Option<String> {
        let manifest = ObjectName::Manifest(self.hall.config.store.clone()).to_string();
        let Err(e) = self.adopt(news, sources).await else {
            self.hall.mended(fault::LOCAL_FILES, &manifest);
            return None;
        };
        if matches!(e, AdoptError::Shadow(_)) && e.verdict() == Verdict::Rebuild {
            self.begin_shadow_anew(&e.to_string()).await;
        } else if e.is_disk_full() {
            self.disk_full(&e.to_string());
        } else {
            self.hall.own_trouble(e.verdict(), None, &manifest, &e.to_string());
        }
        Some(e.to_string())
    }

    /// A shadow that cannot be read at a second look either is set aside, and made anew from what is served; whether
    /// it was.
    pub(crate) async fn begin_shadow_anew(&self, why: &str) -> bool {
        match self.shadow.rebuild().await.and_then(|lost| self.read_shadow().map(|()| lost)) {
            Ok(true) => {
                tracing::error!("the shadow is damaged; it is made anew from ok/: {why}");
                self.hall.event("SHADOW_LOST", "", why);
                return true;
            }
            // A read failed, and does not any more.
            Ok(false) => self.own_trouble(Verdict::Retry, false, why),
            Err(e) => self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string()),
        }
        false
    }

    /// What was accepted goes into `ok/` at once: registers judge it for themselves.
    async fn adopt(&self, news: &Refreshed, sources: &[Source]) -> Result<(), AdoptError> {
        // Two sources may bring news at once; the older must not come last.
        let _one = self.adopting.lock().await;
        let (manifest, envelope, trust) = {
            let device = follow::lock(&self.hall.device);
            let Some(m) = device.manifest() else { return Ok(()) };
            (m.get().clone(), m.envelope().to_vec(), device.trust().version())
        };
        for (n, bytes) in &news.trust {
            self.put_trust(*n, *n == trust, bytes)?;
        }
        let this = Some((manifest.epoch, manifest.serial));
        let is_adopted = self.hall.state().adopted == this;
        let sources = if news.reached > 0 { sources } else { &[] };
        let mut filled = Ok(());
        if !is_adopted || self.lacks_trust(trust, sources) {
            filled = self.fill_trust(sources).await;
        }
        if is_adopted || filled.as_ref().is_err_and(|e| e.verdict() == Verdict::Halt) {
            return Ok(filled?);
        }
        self.put_manifest(&envelope)?;
        tracing::info!(serial = manifest.serial, epoch = manifest.epoch, "manifest accepted");
        self.follow_manifest(manifest).await?;
        // Only now: what failed on the way is done again by the next look.
        self.hall.state().adopted = this;
        // An old trust file that cannot be put in order keeps no list away.
        Ok(filled?)
    }

    /// Makes a new manifest the one that the relay works by.
    async fn follow_manifest(&self, manifest: Manifest) -> Result<(), AdoptError> {
        let hall = &self.hall;
        let before = hall.state().manifest.clone();
        let is_new = |stream: &StreamName, why| before.as_ref().is_none_or(|m| m.unread.get(stream) != Some(why));
        for (stream, why) in manifest.unread.iter().filter(|(s, why)| is_new(s, why)) {
            tracing::error!(code = fault::STREAM_REFUSED, %stream, %why, "what the manifest lists of it cannot be taken");
            hall.event(fault::STREAM_REFUSED, stream.as_str(), why);
        }
        let gone = {
            let mut state = hall.state();
            state.waits.clear();
            let gone = state.held.keys().any(|s| !manifest.lists_stream(s));
            state.manifest = Some(Arc::new(manifest));
            gone
        };
        self.awaiting().clear();
        if gone {
            // Before another stream takes over the names of its tables.
            for stream in self.shadow.forget(&self.streams(), |_| true).await.map_err(ShadowError::from)? {
                hall.event("STREAM_GONE", stream.as_str(), "the manifest lists it no more");
            }
        }
        self.read_shadow()?;
        self.drop_replaced()?;
        beats::forget_unlisted(hall);
        self.forget_unlisted();
        hall.publish_versions();
        hall.report.notify_one();
        Ok(())
    }

    /// A file in `ok/` that is not the one now listed under its name (a new epoch) goes.
    fn drop_replaced(&self) -> Result<(), ShelfError> {
        let listed = self.truth().listed;
        let there = self.hall.state().ok.clone();
        for (name, known) in there {
            let Some(entry) = listed.get(&name) else { continue };
            let sha256 = match known {
                Some(sha256) => Some(sha256),
                None => crate::shelves::hash_if_readable(&self.hall.shelves.pack(Room::Ok, &name))?,
            };
            if sha256 == Some(entry.sha256) {
                self.serve_pack(&name, entry.bytes, sha256);
            } else {
                self.unserve(&name)?;
            }
        }
        Ok(())
    }

    /// Takes a pack out of `ok/`.
    pub(crate) fn unserve(&self, name: &PackName) -> Result<(), ShelfError> {
        self.hall.objects.remove(&name.clone().into());
        self.hall.state().ok.remove(name);
        self.hall.shelves.drop_pack(Room::Ok, name)
    }

    /// Trouble with this machine's own files.
    pub(crate) fn own_trouble(&self, verdict: Verdict, disk_full: bool, text: &str) {
        self.trouble(None, verdict, disk_full, text);
    }

    /// Trouble with this machine's own files, and which stream it is in the way of, if it is but one: no other's success
    /// mends it.
    pub(crate) fn trouble(&self, of: Option<(Wanted, &Instance)>, verdict: Verdict, disk_full: bool, text: &str) {
        if disk_full {
            self.disk_full(text);
        } else {
            let subject = of.map(|(wanted, instance)| stream::subject(wanted, &instance.stream)).unwrap_or_default();
            self.hall.own_trouble(verdict, of.map(|(_, instance)| instance), &subject, text);
        }
    }

    /// Whether a failed sync has stopped all writing.
    pub fn is_halted(&self) -> bool {
        self.hall.state().faults.values().any(|f| f.code == fault::HALTED)
    }

    /// Lets the ballast go, so that the databases can be brought into order, and says so.
    pub(crate) fn disk_full(&self, text: &str) {
        self.make_room();
        self.hall.out_of_room(text);
        for checkpoint in [
            self.shadow.truncate_wal().map_err(|e| e.to_string()),
            self.hall.spool.checkpoint(proto::replica::sqlite::Checkpoint::Truncate).map_err(|e| e.to_string()),
        ] {
            if let Err(e) = checkpoint {
                tracing::warn!("the WAL cannot be brought home yet: {e}");
            }
        }
    }

    /// The instances at their shadow's version whose chain in `ok/` has a gap.
    pub(crate) fn incomplete(&self) -> Vec<Instance> {
        let state = self.hall.state();
        let served: BTreeSet<PackName> = state.ok.keys().cloned().collect();
        let is_incomplete = |(instance, entry): &(Instance, &proto::manifest::StreamEntry)| {
            let (held, drifted) = (state.held_version(instance), state.drifts.contains_key(&instance.stream));
            let attempts = &state.attempts;
            let standing = Standing { instance, entry, held, drifted, served: &served, attempts, waits_for: None };
            held.is_some_and(|v| !standing.is_complete_to(v)) && !drifted
        };
        state.instances().filter(is_incomplete).map(|(i, _)| i).collect()
    }
}

fn is_device_full(e: &FollowError) -> bool {
    matches!(e, FollowError::Device(DeviceError::Sqlite(e)) if e.is_disk_full())
}

/// What can go wrong with a manifest that was accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdoptError {
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    #[error(transparent)]
    Shadow(#[from] ShadowError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

impl AdoptError {
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            AdoptError::Shelf(e) => e.verdict(),
            AdoptError::Shadow(e) => e.verdict(),
            AdoptError::Spool(e) => e.verdict(),
        }
    }
    pub(crate) fn is_disk_full(&self) -> bool {
        match self {
            AdoptError::Shelf(e) => e.is_disk_full(),
            AdoptError::Shadow(e) => e.is_disk_full(),
            AdoptError::Spool(e) => e.is_disk_full(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

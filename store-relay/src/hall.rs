//! What the rooms share: settings, clock, files, and what is known at this moment. Everything in `State` is
//! a copy of what lies on disk or of what was heard; a restart rebuilds it. Never holds the state's lock
//! over a wait or a slow call.

use crate::config::Config;
use crate::debts::Standing;
use crate::lan::objects::Objects;
use crate::metrics::Metrics;
use crate::shelves::Shelves;
use crate::spool::{Event, Spool, SpoolError};
use crate::tries::{self, Attempts, Cause};
use bytes::Bytes;
use proto::clock::{Clock, Timestamp};
use proto::device::Device;
use proto::digest::Sha256;
use proto::disk::DataDisk;
use proto::dsse::Envelope;
use proto::fetch::{Etag, Source};
use proto::follow;
use proto::http::Gate;
use proto::ids::{DeviceId, Instance, RegisterId, StreamName, Version};
use proto::layout::PackName;
use proto::manifest::{Manifest, StreamEntry};
use proto::replica::Held;
use proto::retry::{Budget, Verdict};
use proto::runs::Runs;
use proto::wire::{
    Fault, Heartbeat, Network, Status, StreamReport, StreamState, Versions, brief, fault, unread_debts, unread_faults,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// HQ or a source counts as seen for so long.
const SEEN: Duration = Duration::from_secs(120);

/// The pause between looks at the sources that unknown registers ask for.
const LOOK_PAUSE: Duration = Duration::from_secs(5);
/// Entries of the event log that are shown to whoever asks.
const EVENTS: u32 = 50;
/// Healed drifts kept for the next heartbeat.
const HEALED: usize = 40;

/// A register as last heard.
#[derive(Debug, Clone)]
pub struct Heard {
    /// What it said.
    pub beat: Heartbeat,
    /// As it was signed, to be passed on.
    pub envelope: Envelope,
    /// The key that it was signed by.
    pub key: String,
    /// When, by the monotonic clock; before this process started: less than zero, see `earlier`.
    pub at: Duration,
    /// How long before this process started it was heard.
    pub earlier: Duration,
    /// What became of its heartbeats at HQ.
    pub at_hq: AtHq,
}

/// What HQ answered of a register's heartbeats, as far as this process knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct AtHq {
    /// The greatest number that it has answered, even if by refusing it; 0: none.
    pub sent: u64,
    /// When it answered last, by the monotonic clock.
    pub sent_at: Option<Duration>,
    /// The greatest number that it has; 0: none.
    pub had: u64,
}

impl Heard {
    /// Whether HQ has yet to hear it.
    pub fn is_news(&self) -> bool {
        self.at_hq.sent < self.beat.seq
    }

    /// How long ago.
    pub fn ago(&self, monotonic: Duration) -> Duration {
        monotonic.saturating_sub(self.at).saturating_add(self.earlier)
    }
}

/// Who speaks as a register.
#[derive(Debug)]
pub struct Voice {
    /// The runs of its program.
    pub runs: Runs,
    /// The heartbeats that may still be kept: each is a sync of the disk.
    pub budget: Budget,
    /// The number that headquarters heard of it, where it refused a lower one.
    pub heard_at_hq: u64,
    /// When a second machine was last noticed, by the monotonic clock.
    pub double: Option<Duration>,
}

impl Default for Voice {
    fn default() -> Self {
        // A register sends one a minute, and one for each stream that moves.
        Voice { runs: Runs::default(), budget: Budget::new(64, 2), heard_at_hq: 0, double: None }
    }
}

/// What is known at this moment.
#[derive(Debug, Default)]
pub struct State {
    /// The manifest accepted last.
    pub manifest: Option<Arc<Manifest>>,
    /// Epoch and serial of the manifest that has been put to work in full.
    pub adopted: Option<(u64, u64)>,
    /// What the shadow holds.
    pub held: BTreeMap<StreamName, Held>,
    /// What the shadow proved.
    pub proofs: BTreeMap<PackName, Sha256>,
    /// The packs in `ok/`, and the hash of each where it is known.
    pub ok: BTreeMap<PackName, Option<Sha256>>,
    /// The packs in `ready/`, and the hash that each was verified with.
    pub ready: BTreeMap<PackName, Sha256>,
    /// The packs that failed.
    pub attempts: BTreeMap<PackName, Attempts>,
    /// Streams whose shadow rows were found wrong.
    pub drifts: BTreeMap<StreamName, (Timestamp, String)>,
    /// Drifts that were healed and packs that were good after all, until HQ has heard of them: that may be quicker
    /// than the next heartbeat.
    pub healed: Vec<Fault>,
    /// Why a stream does not go on.
    pub waits: BTreeMap<Instance, String>,
    /// Other faults, by code and subject.
    pub faults: BTreeMap<(String, String), Fault>,
    /// Registers heard.
    pub registers: BTreeMap<RegisterId, Heard>,
    /// Who speaks as each of them.
    pub voices: BTreeMap<RegisterId, Voice>,
    /// Devices whose last heartbeat HQ refused.
    pub refused: BTreeSet<String>,
    /// When HQ was last seen, by the monotonic clock.
    pub hq_seen: Option<Duration>,
    /// When a source last answered.
    pub source_seen: Option<Duration>,
    /// When a full disk was last met, by the monotonic clock.
    pub full_at: Option<Duration>,
    /// The serial that HQ said is there, when it is newer than ours.
    pub hint: Option<u64>,
    /// When an unknown register last made us look.
    pub looked: Option<Duration>,
    /// Seconds that this clock is ahead of HQ's.
    pub skew: Option<i64>,
}

impl State {
    /// The manifest's streams.
    pub fn instances(&self) -> impl Iterator<Item = (Instance, &StreamEntry)> {
        self.manifest.iter().flat_map(|m| m.instances())
    }

    /// The serial that HQ has told of and no source has given yet.
    pub fn awaited(&self) -> Option<u64> {
        self.hint.filter(|h| self.adopted.is_none_or(|(_, serial)| *h > serial))
    }

    /// The version that the shadow holds of an instance, if deltas may build on it.
    pub fn held_version(&self, instance: &Instance) -> Option<Version> {
        let epoch = self.manifest.as_ref()?.epoch;
        self.held.get(&instance.stream)?.version_of(instance, epoch)
    }

    /// Whether what the manifest lists of a stream cannot be read here.
    pub fn is_unread(&self, stream: &StreamName) -> bool {
        self.manifest.as_ref().is_some_and(|m| m.unread.contains_key(stream))
    }

    /// What the shadow holds of such streams.
    fn unread(&self) -> impl Iterator<Item = (Instance, &Held)> {
        let streams = self.manifest.iter().flat_map(|m| m.unread.keys());
        streams.filter_map(|stream| {
            let held = self.held.get(stream)?;
            Some((Instance { stream: stream.clone(), audience: held.audience.clone() }, held))
        })
    }

    /// What is in `ok/` of the manifest's streams: the newest pack of each.
    pub fn versions(&self) -> Versions {
        let newest = |instance: &Instance, head: Version| {
            self.ok.keys().filter(|p| &p.instance == instance && p.version <= head).map(|p| p.version).max()
        };
        let listed = self.instances().map(|(i, e)| (i, Some(e.version)));
        let kept = self.unread().map(|(i, _)| {
            let held = self.held_version(&i);
            (i, held)
        });
        listed.chain(kept).filter_map(|(i, head)| newest(&i, head?).map(|v| (i, v))).collect()
    }

    fn with_standing<T>(&self, mut f: impl FnMut(&Standing<'_>) -> T) -> Vec<T> {
        let served: BTreeSet<PackName> = self.ok.keys().cloned().collect();
        let standing = |(instance, entry): (Instance, &StreamEntry)| {
            f(&Standing {
                instance: &instance,
                entry,
                held: self.held_version(&instance),
                drifted: self.drifts.contains_key(&instance.stream),
                served: &served,
                attempts: &self.attempts,
                waits_for: self.waits.get(&instance).map(String::as_str),
            })
        };
        self.instances().map(standing).collect()
    }

    /// Gaps that wait to be closed.
    pub fn debts(&self) -> Vec<String> {
        let unread = self.manifest.iter().flat_map(|m| unread_debts(m));
        self.with_standing(|s| s.debts()).into_iter().flatten().chain(unread).collect()
    }

    /// What went wrong and has not been mended.
    pub fn all_faults(&self) -> Vec<Fault> {
        let mut faults: Vec<Fault> = self.faults.values().cloned().collect();
        faults.extend(self.manifest.iter().flat_map(|m| unread_faults(m, &self.held)));
        for packs in self.with_standing(|s| s.in_the_way().map(|(n, a)| pack_fault(n, a)).collect::<Vec<_>>()) {
            faults.extend(packs);
        }
        for (stream, (since, text)) in &self.drifts {
            faults.push(Fault {
                code: fault::DRIFT.into(),
                instance: self.manifest.as_ref().and_then(|m| m.instance(stream)),
                object: None,
                text: text.clone(),
                since: *since,
            });
        }
        faults
    }

    /// The listed packs that were given up for what they are. Of one that sources here gave bent another may have the right
    /// bytes, and whoever gets it hashes it.
    pub fn given_up(&self) -> Vec<Fault> {
        self.instances()
            .flat_map(|(i, e)| e.packs.iter().map(move |p| (p.name(&i), p.sha256)))
            .filter_map(|(name, sha256)| {
                let attempts = self.attempts.get(&name).filter(|a| a.in_error && a.sha256 == sha256)?;
                (attempts.cause != Cause::Hash).then(|| pack_fault(name, attempts))
            })
            .collect()
    }

    /// The packs that were given up without headquarters' having heard of it; a way round may be quicker than the
    /// next heartbeat.
    pub fn untold(&self) -> Vec<PackName> {
        self.attempts.iter().filter(|(_, a)| a.in_error && !a.told).take(HEALED).map(|(n, _)| n.clone()).collect()
    }

    /// What a heartbeat tells beside [`State::all_faults`]: what is over and was not told yet.
    pub fn over(&self, open: &[Fault]) -> Vec<Fault> {
        let untold = self.untold().into_iter().filter_map(|n| Some((n.clone(), self.attempts.get(&n)?)));
        let packs = untold.map(|(name, attempts)| pack_fault(name, attempts));
        let is_new = |f: &Fault| !open.iter().any(|o| o.code == f.code && o.object == f.object);
        self.healed.iter().cloned().chain(packs.filter(is_new)).collect()
    }

    fn is_over(&mut self, fault: Fault) {
        self.healed.push(Fault { text: format!("{} (mended)", fault.text), ..fault });
        if self.healed.len() > HEALED {
            self.healed.remove(0);
        }
    }

    /// A pack that failed before is good after all, or is to be tried anew; whether it had failed.
    pub fn forgive(&mut self, name: &PackName) -> bool {
        let Some(attempts) = self.attempts.remove(name) else { return false };
        if attempts.in_error && !attempts.told {
            self.is_over(pack_fault(name.clone(), &attempts));
        }
        true
    }

    /// The streams as reported.
    pub fn streams(&self) -> BTreeMap<Instance, StreamReport> {
        let report = |version: Option<Version>, held: Option<&Held>, state| StreamReport {
            version,
            schema: held.map(|h| h.schema),
            digests: held.map(|h| h.digests.clone()).unwrap_or_default(),
            state,
        };
        let listed = self.with_standing(|s| {
            let held = s.held.and_then(|_| self.held.get(&s.instance.stream));
            let state = if self.drifts.contains_key(&s.instance.stream) {
                StreamState::Drift
            } else if s.held == Some(s.entry.version) {
                StreamState::Ok
            } else if s.in_the_way().next().is_some() {
                StreamState::Error
            } else if s.held.is_none() {
                StreamState::Waiting
            } else {
                StreamState::Behind
            };
            (s.instance.clone(), report(s.held, held, state))
        });
        let kept = self.unread().map(|(instance, held)| {
            let drifted = self.drifts.contains_key(&instance.stream);
            let version = self.held_version(&instance);
            let state = if drifted { StreamState::Drift } else { StreamState::Error };
            (instance, report(version, version.map(|_| held), state))
        });
        listed.into_iter().chain(kept).collect()
    }

    /// Whether every stream of the manifest is served.
    pub fn is_ready(&self) -> Result<(), String> {
        let Some(manifest) = &self.manifest else { return Err("no manifest was accepted yet".into()) };
        let served = self.versions();
        let listed = manifest.instances().map(|(i, _)| i).filter(|i| !served.contains_key(i)).map(|i| i.to_string());
        let unread = manifest.unread.keys().filter(|s| served.keys().all(|i| &i.stream != *s)).map(ToString::to_string);
        let missing: Vec<String> = listed.chain(unread).collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("nothing served yet of {}", missing.join(", "))) }
    }
}

/// The newest entries of an event log, newest last.
pub fn newest_last(spool: &Spool) -> Vec<Event> {
    let mut events = spool.events(EVENTS).unwrap_or_else(|e| {
        tracing::warn!(error = %e, "the event log was not read");
        Vec::new()
    });
    events.reverse();
    events
}

fn pack_fault(name: PackName, attempts: &Attempts) -> Fault {
    Fault {
        code: fault::PACK_IN_ERROR.into(),
        instance: Some(name.instance.clone()),
        object: Some(name.to_string()),
        text: brief(&format!("{}: {}", attempts.code, attempts.reason)).to_owned(),
        since: attempts.since,
    }
}

/// The body of `/v1/versions`.
#[derive(Debug, PartialEq, Eq)]
pub struct Listing {
    /// What it says.
    pub versions: Versions,
    /// As JSON.
    pub body: Bytes,
    /// Its ETag, quotes included.
    pub etag: String,
}

impl Listing {
    fn new(versions: Versions) -> Listing {
        // A map of names and numbers: writing it as JSON cannot fail.
        let body = Bytes::from(serde_json::to_vec(&versions).unwrap_or_default());
        let Etag(etag) = Etag::of(&body);
        Listing { versions, body, etag }
    }
}

/// What the rooms share.
#[derive(Debug)]
pub struct Hall {
    /// Settings.
    pub config: Config,
    /// By whom packs are judged here.
    pub judge: String,
    /// Who this is.
    pub id: DeviceId,
    /// Time.
    pub clock: ClockBox,
    /// Directories.
    pub shelves: Shelves,
    /// `relay.db`.
    pub spool: Spool,
    /// `device.db`.
    pub device: Mutex<Device>,
    /// What is served.
    pub objects: Arc<Objects>,
    /// The disk under `data_dir`.
    pub disk: DataDisk,
    /// Counters.
    pub metrics: Metrics,
    /// Who may connect.
    pub gate: Arc<Gate>,
    /// Look at the sources now.
    pub wake: Notify,
    /// Tell HQ soon.
    pub report: Notify,
    /// One post to HQ at a time: a heartbeat that the next one overtakes would be refused.
    pub telling: tokio::sync::Mutex<()>,
    /// The process is to end.
    pub stop: CancellationToken,
    state: Mutex<State>,
    versions: watch::Sender<Arc<Listing>>,
}

/// A clock that can be shown in a debug text.
#[derive(Clone)]
pub struct ClockBox(pub Arc<dyn Clock>);

impl std::fmt::Debug for ClockBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}
impl std::ops::Deref for ClockBox {
    type Target = dyn Clock;
    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

/// The durable parts of a hall.
#[derive(Debug)]
pub struct Files {
    /// Directories.
    pub shelves: Shelves,
    /// `relay.db`.
    pub spool: Spool,
    /// `device.db`.
    pub device: Device,
}

impl Hall {
    /// A hall around opened files.
    pub fn new(config: Config, clock: Arc<dyn Clock>, files: Files, objects: Arc<Objects>) -> Hall {
        Hall {
            id: files.device.id().clone(),
            clock: ClockBox(clock),
            shelves: files.shelves,
            spool: files.spool,
            device: Mutex::new(files.device),
            objects,
            metrics: Metrics::new(),
            gate: Arc::new(Gate::new(config.http.clone())),
            wake: Notify::new(),
            report: Notify::new(),
            telling: tokio::sync::Mutex::default(),
            stop: CancellationToken::new(),
            state: Mutex::default(),
            versions: watch::Sender::new(Arc::new(Listing::new(Versions::new()))),
            disk: config.disk(),
            judge: tries::judge(&config.limits),
            config,
        }
    }

    /// What is known; hold it briefly.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the LAN what is in `ok/`, if that has changed.
    pub fn publish_versions(&self) {
        let changed = self.versions.send_if_modified(|now| {
            // In here: what was seen earlier must not be sent later.
            let listing = Listing::new(self.state().versions());
            let changed = now.etag != listing.etag;
            if changed {
                *now = Arc::new(listing);
            }
            changed
        });
        if changed {
            self.report.notify_one();
        }
    }

    /// What is in `ok/`, to look at and to wait on.
    pub fn versions(&self) -> watch::Receiver<Arc<Listing>> {
        self.versions.subscribe()
    }

    /// Asks for a look at the sources on a stranger's word: at most once in a while.
    pub fn look_soon(&self) {
        let now = self.clock.monotonic();
        let due = {
            let mut state = self.state();
            let due = state.looked.is_none_or(|at| now.saturating_sub(at) >= LOOK_PAUSE);
            if due {
                state.looked = Some(now);
            }
            due
        };
        if due {
            self.wake.notify_one();
        }
    }

    /// Seconds since HQ was seen.
    pub fn hq_seen_s(&self) -> Option<u64> {
        self.state().hq_seen.map(|at| self.clock.monotonic().saturating_sub(at).as_secs())
    }

    /// The network as seen from here.
    pub fn network(&self) -> Network {
        let now = self.clock.monotonic();
        let state = self.state();
        let fresh = |seen: Option<Duration>, within: Duration| seen.is_some_and(|at| now.saturating_sub(at) <= within);
        // Sources are looked at once a poll.
        let source_seen = fresh(state.source_seen, SEEN.max(self.config.poll.0 * 2));
        match (&self.config.hq, fresh(state.hq_seen, SEEN), source_seen) {
            (_, true, _) | (None, _, true) => Network::Online,
            (Some(_), false, true) => Network::InStore,
            _ => Network::Offline,
        }
    }

    /// The report of `status`.
    pub fn status(&self) -> Status {
        let (hq_seen_s, network, disk) = (self.hq_seen_s(), self.network(), self.disk.space());
        let of_starts = follow::lock(&self.device).starts().faults(self.clock.now());
        let state = self.state();
        Status {
            id: self.id.clone(),
            streams: state.streams(),
            serial: state.manifest.as_ref().map(|m| m.serial),
            network,
            debts: state.debts(),
            errors: state.all_faults().into_iter().chain(of_starts).collect(),
            disk,
            clock_skew_s: state.skew,
            hq_seen_s,
        }
    }

    /// The shadow's rows of a stream are right again; whether they were known to be wrong.
    pub fn drift_healed(&self, stream: &StreamName) -> bool {
        let mut state = self.state();
        let Some((since, text)) = state.drifts.remove(stream) else { return false };
        let instance = state.manifest.as_ref().and_then(|m| m.instance(stream));
        state.is_over(Fault { code: fault::DRIFT.into(), instance, object: None, text, since });
        drop(state);
        self.keep_over();
        true
    }

    /// Writes down what is over and not told: the power may go first.
    pub fn keep_over(&self) {
        let over = self.state().healed.clone();
        if let Err(e) = self.spool.keep_over(&over) {
            tracing::warn!(error = %e, "what is over was not written down");
        }
    }

    /// Takes a fault down, once; it is logged when it is new.
    pub fn fault(&self, code: &str, instance: Option<&Instance>, subject: &str, text: impl Into<String>) {
        self.fault_since(self.clock.now(), code, instance, subject, text);
    }

    /// The same, of what began earlier.
    pub fn fault_since(
        &self,
        began: Timestamp,
        code: &str,
        instance: Option<&Instance>,
        subject: &str,
        text: impl Into<String>,
    ) {
        let text = brief(&text.into()).to_owned();
        let new = {
            let mut state = self.state();
            let key = (code.to_owned(), subject.to_owned());
            let since = state.faults.get(&key).map(|f| f.since);
            let fault = Fault {
                code: code.to_owned(),
                instance: instance.cloned(),
                object: (!subject.is_empty()).then(|| subject.to_owned()),
                text: text.clone(),
                since: since.unwrap_or(began),
            };
            let before = state.faults.insert(key, fault.clone());
            drop(state);
            if code == fault::REFUSED && before.as_ref() != Some(&fault) {
                self.keep(self.spool.keep_refusal(subject, &fault));
            }
            since.is_none()
        };
        if new {
            tracing::error!(code, subject, "{text}");
            self.event(code, subject, &text);
            self.report.notify_one();
        }
    }

    /// Trouble with this machine's own files that is no full disk; under a subject, whose next success mends it.
    pub fn own_trouble(&self, verdict: Verdict, instance: Option<&Instance>, subject: &str, text: &str) {
        if verdict == Verdict::Halt {
            self.fault(fault::HALTED, None, "", format!("{text}; nothing is written until a restart"));
        } else {
            self.fault(fault::LOCAL_FILES, instance, subject, text);
        }
    }

    /// No room on the disk: lets the ballast go, so that the databases can be written again, and says so.
    pub fn out_of_room(&self, text: &str) {
        self.disk.release();
        self.state().full_at = Some(self.clock.monotonic());
        self.fault(fault::DISK_FULL, None, "", text);
    }

    /// Brings back what sources held that was refused: nothing has mended it while this process did not run.
    pub fn restore_refusals(&self, sources: &[Source]) -> Result<(), SpoolError> {
        for (source, fault) in self.spool.refusals()? {
            if sources.iter().any(|s| s.url() == source) {
                self.state().faults.insert((fault::REFUSED.to_owned(), source), fault);
            } else {
                self.spool.forget_refusal(&source)?;
            }
        }
        Ok(())
    }

    /// A note that cannot be kept stops nothing.
    fn keep(&self, kept: Result<(), SpoolError>) {
        if let Err(e) = kept {
            tracing::warn!(error = %e, "a refusal was not written down");
        }
    }

    /// A fault is mended.
    pub fn mended(&self, code: &str, subject: &str) {
        let was = self.state().faults.remove(&(code.to_owned(), subject.to_owned()));
        if let Some(fault) = was {
            if code == fault::REFUSED {
                self.keep(self.spool.forget_refusal(subject));
            }
            if code == fault::PACK_MISSING {
                // Headquarters may not have heard of it yet.
                self.state().is_over(fault);
                self.keep_over();
            }
            tracing::info!(code, subject, "mended");
            self.event("MENDED", subject, code);
            self.report.notify_one();
        }
    }

    /// The newest entries of the event log, newest last. Blocks on the disk, briefly.
    pub fn events(&self) -> Vec<Event> {
        newest_last(&self.spool)
    }

    /// Writes the event log; a log that cannot be written stops nothing.
    pub fn event(&self, code: &str, subject: &str, text: &str) {
        let event =
            Event { at: self.clock.now(), code: code.to_owned(), subject: subject.to_owned(), text: text.to_owned() };
        if let Err(e) = self.spool.log(&event) {
            tracing::warn!(error = %e, "the event log was not written");
        }
    }
}

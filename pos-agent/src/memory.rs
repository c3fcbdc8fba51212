//! What the agent must remember over restarts, in `device.db`: drift latches, packs to avoid, open
//! faults, since when something does not go on, the relay's last word. A latch is durable before it
//! is acted on; the rest is written after the fact, and a power cut only costs another try.

use crate::faults::Faults;
use crate::upstream::RelayWord;
use proto::clock::{Clock, Timestamp, boot_id, since};
use proto::device::{Device, DeviceError};
use proto::failpoint;
use proto::follow::lock;
use proto::ids::{Instance, StreamName};
use proto::layout::PackName;
use proto::manifest::Manifest;
use proto::wire::{Fault, fault};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const DRIFT: &str = "drift";
const AVOID: &str = "avoid";
const FAULTS: &str = "faults";
const HELD_UP: &str = "held_up";
const RELAY: &str = "relay_word";

/// A pack that failed here is tried again after so long, in case the fault was this machine's.
const AVOID_FOR: Duration = Duration::from_secs(3600);

/// What may keep a stream, or all, from going on for minutes; it is over with the next step that goes well.
pub const STUCK: [&str; 4] = [fault::LOG_STUCK, fault::PACK_MISSING, fault::SOURCE, fault::LOCAL_FILES];

/// Why a pack is avoided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Avoided {
    /// The reason, for people.
    pub reason: String,
    /// Since when, UTC by this machine's clock.
    pub since: Timestamp,
    /// The version of this program that failed: another one may read it.
    pub program: String,
}

/// Since when something does not go on.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct HeldUp {
    /// UTC by this machine's clock: over restarts, for `once` alone never lasts until something is told.
    since: Timestamp,
    /// In which run of the machine: whoever held it up ended with that.
    boot: String,
    /// When this process met it first, by the monotonic clock, and how long it had lasted by then.
    #[serde(skip)]
    met: Option<(Duration, Duration)>,
}

#[derive(Debug, Default)]
struct Notes {
    drift: BTreeMap<StreamName, String>,
    avoid: BTreeMap<PackName, Avoided>,
    faults: Faults,
    unsaved: bool,
    /// Streams, or files of ours, by name.
    held_up: BTreeMap<String, HeldUp>,
    held_up_unsaved: bool,
    /// The latches of drift could not be read: only the rows know them.
    lost: bool,
}

/// The memory; shared.
#[derive(Debug)]
pub struct Memory {
    device: Arc<Mutex<Device>>,
    notes: Mutex<Notes>,
}

/// Sets the drift latch of streams while no daemon runs; the next heartbeat tells of it.
pub fn latch_offline(
    device: &mut Device,
    found: &BTreeMap<Instance, String>,
    now: Timestamp,
) -> Result<(), DeviceError> {
    let mut faults: Faults = note(device, FAULTS)?.unwrap_or_default();
    let mut drift: BTreeMap<StreamName, String> = note(device, DRIFT)?.unwrap_or_default();
    for (instance, why) in found {
        faults.raise(fault::DRIFT, Some(instance), None, why, now);
        drift.insert(instance.stream.clone(), why.clone());
    }
    // The latch is last: with it alone nobody would hear of what was healed.
    failpoint::step("agent.found-faults", || device.set_fact(FAULTS, &faults))?;
    failpoint::step("agent.found-drift", || device.set_fact(DRIFT, &drift))
}

/// A note; the default where there is none. None where it cannot be read: it is told, and stops nothing.
fn note<T: DeserializeOwned + Default>(device: &Device, name: &'static str) -> Result<Option<T>, DeviceError> {
    match device.fact(name) {
        Err(e) if e.is_unreadable() => {
            tracing::warn!(note = name, error = %e, "what was noted cannot be read; going on without it");
            Ok(None)
        }
        read => read.map(|r| Some(r.unwrap_or_default())),
    }
}

impl Memory {
    /// Reads what was remembered.
    pub fn load(device: Arc<Mutex<Device>>) -> Result<(Memory, RelayWord), DeviceError> {
        let (notes, word) = {
            let d = lock(&device);
            let drift = note(&d, DRIFT)?;
            let lost = drift.is_none();
            let mut notes = Notes {
                drift: drift.unwrap_or_default(),
                avoid: note(&d, AVOID)?.unwrap_or_default(),
                faults: note(&d, FAULTS)?.unwrap_or_default(),
                unsaved: false,
                held_up: note(&d, HELD_UP)?.unwrap_or_default(),
                held_up_unsaved: false,
                lost,
            };
            // Healed, and the power went before that was written here, too.
            let healed = |f: &Fault| {
                // Of one that was forgotten there is no latch: it is healed when it is held again.
                f.object.is_none() && f.instance.as_ref().is_some_and(|i| !notes.drift.contains_key(&i.stream))
            };
            notes.unsaved = notes.faults.mend(fault::DRIFT, healed);
            let boot = boot_id();
            notes.held_up.retain(|_, h| h.boot == boot);
            (notes, note(&d, RELAY)?.unwrap_or_default())
        };
        Ok((Memory { device, notes: Mutex::new(notes) }, word))
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Latches that a stream's rows are not those of its version; durable when this returns.
    pub fn latch_drift(&self, stream: &StreamName, reason: &str) -> Result<(), DeviceError> {
        let mut notes = self.notes();
        notes.drift.insert(stream.clone(), reason.to_owned());
        failpoint::step("agent.drift", || lock(&self.device).set_fact(DRIFT, &notes.drift))
    }

    /// A full healed a stream. Failing to write it down costs one more heal.
    pub fn healed(&self, stream: &StreamName) {
        let mut notes = self.notes();
        if notes.drift.remove(stream).is_some() {
            self.save_drift(&notes);
        }
    }

    /// Whether the latches could not be read, and the rows have not been checked since.
    pub fn lost_latches(&self) -> bool {
        self.notes().lost
    }

    /// All rows were checked, and what drifted is latched: latches that were lost are known again.
    pub fn checked(&self) {
        let mut notes = self.notes();
        if std::mem::take(&mut notes.lost) {
            self.save_drift(&notes);
        }
    }

    fn save_drift(&self, notes: &Notes) {
        if let Err(e) = failpoint::step("agent.healed", || lock(&self.device).set_fact(DRIFT, &notes.drift)) {
            tracing::warn!(error = %e, "a latch of drift could not be taken off for good");
        }
    }

    /// Whether a stream's rows are known to be wrong.
    pub fn drifted(&self, stream: &StreamName) -> bool {
        self.notes().drift.contains_key(stream)
    }

    /// The streams whose rows are known to be wrong.
    pub fn drifts(&self) -> BTreeMap<StreamName, String> {
        self.notes().drift.clone()
    }

    /// Leaves a pack out from now on.
    pub fn avoid(&self, pack: &PackName, reason: &str, now: Timestamp) {
        let avoided = Avoided { reason: reason.to_owned(), since: now, program: PROGRAM.to_owned() };
        let mut notes = self.notes();
        notes.avoid.insert(pack.clone(), avoided);
        self.save_avoid(&notes);
    }

    /// Whether a pack is to be left out now.
    pub fn avoids(&self, pack: &PackName, now: Timestamp) -> bool {
        // One that was noted by a clock that was ahead is due.
        let is_fresh = |a: &Avoided| a.program == PROGRAM && a.since <= now && since(now, a.since) < AVOID_FOR;
        self.notes().avoid.get(pack).is_some_and(is_fresh)
    }

    /// The packs that failed here, also those that are due to be tried again.
    pub fn avoided(&self) -> BTreeSet<PackName> {
        self.notes().avoid.keys().cloned().collect()
    }

    /// Forgets packs and streams that the manifest does not list any more: nothing else would end what is told of them.
    pub fn prune(&self, manifest: &Manifest) {
        let is_pack_gone = |o: &str| o.parse().is_ok_and(|p: PackName| !manifest.lists(&p));
        let is_stream_gone = |i: &Instance| !manifest.lists_stream(&i.stream);
        let mut notes = self.notes();
        let drifts = notes.drift.len();
        notes.drift.retain(|s, _| manifest.lists_stream(s));
        if notes.drift.len() != drifts {
            self.save_drift(&notes);
        }
        let mut ended = notes.faults.mend(fault::DRIFT, |f| f.instance.as_ref().is_some_and(is_stream_gone));
        ended |= notes.faults.mend(fault::REFUSED, |f| f.object.as_deref().is_some_and(is_pack_gone));
        for code in STUCK {
            ended |= notes
                .faults
                .mend(code, |f| f.instance.as_ref().is_some_and(|i| manifest.instance(&i.stream).as_ref() != Some(i)));
        }
        notes.unsaved |= ended;
        let held_up = notes.held_up.len();
        let is_listed = |i: Instance| manifest.instance(&i.stream).as_ref() == Some(&i);
        notes.held_up.retain(|what, _| what.parse().ok().is_none_or(is_listed));
        notes.held_up_unsaved |= notes.held_up.len() != held_up;
        let before = notes.avoid.len();
        notes.avoid.retain(|p, _| manifest.lists(p));
        if notes.avoid.len() != before {
            self.save_avoid(&notes);
        }
    }

    fn save_avoid(&self, notes: &Notes) {
        if let Err(e) = failpoint::step("agent.avoid", || lock(&self.device).set_fact(AVOID, &notes.avoid)) {
            tracing::warn!(error = %e, "the list of bad packs could not be written");
        }
    }

    /// A stream, or a file of ours, does not go on: how long it has not.
    pub fn held_up(&self, what: &str, clock: &dyn Clock) -> Duration {
        let (now, at) = (clock.now(), clock.monotonic());
        let mut notes = self.notes();
        // One that was noted by a clock that was ahead begins anew.
        if notes.held_up.get(what).is_none_or(|h| h.met.is_none() && h.since > now) {
            notes.held_up.insert(what.to_owned(), HeldUp { since: now, boot: boot_id(), met: None });
            notes.held_up_unsaved = true;
        }
        let met = notes.held_up.get_mut(what).map(|h| *h.met.get_or_insert((at, since(now, h.since))));
        met.map_or(Duration::ZERO, |(first, earlier)| at.saturating_sub(first).saturating_add(earlier))
    }

    /// It goes on.
    pub fn goes_on(&self, what: &str) {
        let mut notes = self.notes();
        notes.held_up_unsaved |= notes.held_up.remove(what).is_some();
    }

    /// Writes down what does not go on, if that changed.
    pub fn save_held_up(&self) {
        let mut notes = self.notes();
        if !notes.held_up_unsaved {
            return;
        }
        match failpoint::step("agent.faults", || lock(&self.device).set_fact(HELD_UP, &notes.held_up)) {
            Ok(()) => notes.held_up_unsaved = false,
            // Until then it lives in memory, as the faults do.
            Err(e) => tracing::debug!(error = %e, "since when something does not go on could not be written"),
        }
    }

    /// Changes the faults; `change` says whether it did.
    pub fn faults(&self, change: impl FnOnce(&mut Faults) -> bool) {
        let mut notes = self.notes();
        notes.unsaved |= change(&mut notes.faults);
    }

    /// The faults as they are.
    pub fn look<T>(&self, look: impl FnOnce(&Faults) -> T) -> T {
        look(&self.notes().faults)
    }

    /// Writes the faults down if they changed; whether they did.
    pub fn save_faults(&self) -> bool {
        let changed = self.notes().unsaved;
        // On a full disk the list lives in memory; it is written when there is room.
        if let Err(e) = self.keep_faults() {
            tracing::debug!(error = %e, "the list of faults could not be written");
        }
        changed
    }

    /// The same, before something is done that nothing else would tell of: durable when this returns.
    pub fn keep_faults(&self) -> Result<(), DeviceError> {
        let mut notes = self.notes();
        if notes.unsaved {
            failpoint::step("agent.faults", || lock(&self.device).set_fact(FAULTS, &notes.faults))?;
            notes.unsaved = false;
        }
        Ok(())
    }

    /// Keeps the relay's last word.
    pub fn keep_relay_word(&self, word: &RelayWord) {
        if let Err(e) = failpoint::step("agent.relay-word", || lock(&self.device).set_fact(RELAY, word)) {
            tracing::warn!(error = %e, "the relay's list of errors could not be written");
        }
    }
}

/// The version of this program.
pub const PROGRAM: &str = env!("CARGO_PKG_VERSION");

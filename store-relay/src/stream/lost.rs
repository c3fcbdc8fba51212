//! What is not there, or not what came: listed packs that no source has, files that rotted.
//!
//! Owns since when a pack is missing, which outlasts the process, and how long one pauses that rots again. Must never
//! tell of a mirror that only lags, nor keep the line busy with what a disk bends each time.

use super::{SOON, subject};
use crate::relay::{Relay, Wanted};
use crate::shelves::Room;
use crate::spool::SpoolError;
use proto::clock::{Timestamp, since};
use proto::ids::StreamName;
use proto::layout::PackName;
use proto::retry::Verdict;
use proto::wire::{Fault, fault};
use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

/// The longest pause of a pack that the disk bends: each time it comes over the line.
const ROTTEN: Duration = Duration::from_secs(600);
/// So long after a pack was lost another loss of it is no bad block that it is written to.
const UNSUSPECTED: Duration = Duration::from_secs(24 * 3600);
/// So many times `tries.missing` is waited for a source that was not heard: it may have what no other has.
const UNHEARD: u32 = 6;

impl Relay {
    fn absent(&self) -> MutexGuard<'_, BTreeMap<(Wanted, PackName), Absent>> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no source has had a listed pack for long.
    pub(super) fn is_missing(&self, wanted: Wanted, name: &PackName) -> bool {
        let (now, limit) = (self.hall.clock.monotonic(), self.hall.config.tries.missing.0);
        self.absent().get(&(wanted, name.clone())).is_some_and(|a| {
            let limit = if a.all_spoke { limit } else { limit.saturating_mul(UNHEARD) };
            now.saturating_sub(a.at) + a.earlier >= limit
        })
    }

    /// Reads what earlier processes missed, and for how long: `once` alone never lasts until something is told.
    pub(crate) fn restore_absent(&self) -> Result<(), SpoolError> {
        let (now, at) = (self.hall.clock.now(), self.hall.clock.monotonic());
        for wanted in [Wanted::Here, Wanted::ByNew] {
            for (name, seen) in self.hall.spool.moments(wanted.kept_as())? {
                let Ok(name) = name.parse() else { continue };
                // Who was heard then nobody knows; the next look says who is.
                let absent = Absent { seen, at, earlier: since(now, seen), all_spoke: true };
                self.absent().insert((wanted, name), absent);
            }
        }
        Ok(())
    }

    /// A source says that it has not got a listed pack, and no other gave it. A mirror may lag; after a while it is told,
    /// a longer one where not all spoke.
    pub(crate) fn note_absent(&self, wanted: Wanted, name: &PackName, all_spoke: bool) {
        let (now, at) = (self.hall.clock.now(), self.hall.clock.monotonic());
        let (is_new, seen) = {
            let mut absent = self.absent();
            let known = absent.contains_key(&(wanted, name.clone()));
            let new = Absent { seen: now, at, earlier: Duration::ZERO, all_spoke };
            let noted = absent.entry((wanted, name.clone())).or_insert(new);
            noted.all_spoke = all_spoke;
            (!known, noted.seen)
        };
        if is_new && let Err(e) = self.hall.spool.keep_moment(wanted.kept_as(), &name.to_string(), now) {
            tracing::warn!(error = %e, "since when a pack is missing was not written down");
        }
        if self.is_missing(wanted, name) {
            let text = format!("the manifest lists {name}, and no source has it");
            self.hall.fault_since(seen, fault::PACK_MISSING, Some(&name.instance), &name.to_string(), text);
        }
    }

    /// A stream that is at its head, or whose chain is complete, misses nothing for that, and nothing is in its way.
    pub(crate) fn none_is_missing(&self, wanted: Wanted, stream: &StreamName) {
        self.end_missing(|of, name| of == wanted && name.instance.stream == *stream);
        self.hall.mended(fault::LOCAL_FILES, &subject(wanted, stream));
    }

    /// Nobody waits for packs that are listed no more, nor for what is in the way of a stream that is not; what drifted of
    /// it is gone.
    pub(crate) fn forget_unlisted(&self) {
        let (listed, streams) = (self.listed(), self.streams());
        self.end_missing(|_, name| !listed.contains(name));
        self.rotted().retain(|name, _| listed.contains(name));
        let gone: Vec<String> = {
            let state = self.hall.state();
            let is_gone = |f: &&Fault| {
                f.code == fault::LOCAL_FILES && f.instance.as_ref().is_some_and(|i| !streams.contains(&i.stream))
            };
            state.faults.values().filter(is_gone).filter_map(|f| f.object.clone()).collect()
        };
        gone.iter().for_each(|subject| self.hall.mended(fault::LOCAL_FILES, subject));
        // Also of one that a shadow begun anew does not hold: no full would come to heal it.
        let drifts: Vec<StreamName> = self.hall.state().drifts.keys().cloned().collect();
        for stream in drifts.iter().filter(|s| !streams.contains(s)) {
            self.end_drift(stream);
        }
    }

    pub(crate) fn end_missing(&self, is_over: impl Fn(Wanted, &PackName) -> bool) {
        let mut found: Vec<(Wanted, PackName)> = Vec::new();
        self.absent().retain(|(of, name), _| {
            let over = is_over(*of, name);
            found.extend(over.then(|| (*of, name.clone())));
            !over
        });
        for (of, pack) in found {
            let name = pack.to_string();
            if let Err(e) = self.hall.spool.forget_moment(of.kept_as(), &name) {
                tracing::warn!(error = %e, "that a pack is missing no more was not written down");
            }
            // The stream itself may miss what new registers do without, and the other way round.
            if !self.absent().keys().any(|(_, missing)| *missing == pack) {
                self.hall.mended(fault::PACK_MISSING, &name);
            }
        }
    }

    /// A file that is not what it was: it goes, and is fetched anew. Whether it was there: a trial, an answer and `verify`
    /// may find the same one so.
    pub(crate) fn throw_away(&self, name: &PackName, text: &str) -> bool {
        let held = || {
            let mut state = self.hall.state();
            let held = [(Room::Ok, state.ok.remove(name).is_some()), (Room::Ready, state.ready.remove(name).is_some())];
            drop(state);
            let rooms: Vec<Room> = held.into_iter().filter_map(|(room, is_there)| is_there.then_some(room)).collect();
            if !rooms.is_empty() {
                self.hall.objects.remove(&name.clone().into());
            }
            rooms
        };
        let (was_there, errors) = self.hall.shelves.drop_held(name, held);
        if !was_there {
            return false;
        }
        tracing::error!(pack = %name, "its file is not what came; it is fetched anew: {text}");
        self.hall.event("BIT_ROT", &name.to_string(), text);
        for e in errors {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        self.hall.publish_versions();
        true
    }

    /// A pack's file is not what it was. It is fetched anew; where that was so the last time, too, it is told, and there is
    /// a pause first: a disk that bends what is written there would keep the line busy day and night.
    pub(crate) fn rots(&self, wanted: Wanted, name: &PackName, text: &str) -> Option<Duration> {
        if !self.throw_away(name, text) {
            return None;
        }
        let now = self.hall.clock.monotonic();
        let pause = {
            let mut rotted = self.rotted();
            rotted.retain(|_, rot| now.saturating_sub(rot.at) < UNSUSPECTED);
            let pause = rotted.get(name).map_or(SOON, |last| (last.pause * 2).min(ROTTEN));
            rotted.insert(name.clone(), Rot { at: now, pause })?.pause
        };
        self.trouble(Some((wanted, &name.instance)), Verdict::Retry, false, text);
        self.pauses().insert(name.clone(), now + pause);
        Some(pause)
    }

    /// One that was found so as it was to be served.
    pub(crate) fn found_rotten(&self, name: &PackName) {
        self.rots(Wanted::ByNew, name, &format!("{name}: its file was not what came when it was to be served"));
    }

    pub(crate) fn rotted(&self) -> MutexGuard<'_, BTreeMap<PackName, Rot>> {
        self.rotted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pack whose file was not what came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rot {
    /// When it was found so last, by the monotonic clock.
    at: Duration,
    /// How long it pauses the next time.
    pause: Duration,
}

/// Since when no source has a listed pack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Absent {
    /// When it was seen first, UTC: over restarts.
    seen: Timestamp,
    /// When this process saw it first, by the monotonic clock.
    at: Duration,
    /// How long it had been so for the processes before this one.
    earlier: Duration,
    /// Whether at the last look all sources said what they have.
    all_spoke: bool,
}

impl Wanted {
    /// What since when it is missing is kept under.
    fn kept_as(self) -> &'static str {
        match self {
            Wanted::Here => "missing",
            Wanted::ByNew => "missing for new registers",
        }
    }
}

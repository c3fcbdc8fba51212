//! Bringing one stream up to what the manifest lists: plan → fetch → trial → `ok/` or `error/`. Knows nothing of
//! other streams, so that none can stop another. Decides by `proto::chain` and `tries`; every move is
//! `shelves`'.
//!
//! Here are the turns and the plan; `fetch` gets packs, `prove` tries and judges them, `lost` knows what is not there.

mod fetch;
mod lost;
mod prove;

use crate::hall::{Hall, State};
use crate::relay::{Pace, Relay, Wanted};
use crate::tries::{self, Attempts, Cause};
pub(crate) use fetch::Missing;
pub(crate) use lost::{Absent, Rot};
use proto::chain;
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::fetch::Source;
use proto::ids::{Instance, StreamName, Version};
use proto::layout::PackName;
use proto::manifest::{PackEntry, StreamEntry};
use proto::shelf::{self, ShelfError};
use proto::wire::{brief, fault};
use serde::Serialize;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// The pause after surroundings failed.
const SOON: Duration = Duration::from_secs(5);
/// The longest pause of a stream that waits for another: each trial costs a process.
const AWAITING: Duration = Duration::from_secs(60);
/// Turns of one call: packs of one stream that are given up in a row, and heals.
const TURNS: usize = 32;

/// Where packs may be got from.
#[derive(Debug, Clone, Copy)]
pub struct Supply<'a> {
    /// The sources in order.
    pub sources: &'a [Source],
    /// They hold these and no others; none: they may hold anything.
    pub only: Option<&'a BTreeSet<PackName>>,
}

impl Supply<'_> {
    /// Whether a priced pack is at hand or may be had here, and was not given up. What lies on a stick was hashed as it
    /// was copied: that a source gave other bytes says nothing about it.
    pub(crate) fn is_usable(
        &self,
        name: &PackName,
        pack: &PackEntry,
        attempts: Option<&Attempts>,
        now: Timestamp,
        hall: &Hall,
    ) -> bool {
        let there = pack.bytes == 0 || self.only.is_none_or(|o| o.contains(name));
        let of_a_source = self.only.is_some() && attempts.is_some_and(|a| a.cause == Cause::Hash);
        there && (of_a_source || tries::usable(attempts, &pack.sha256, now, &hall.config.tries, &hall.judge))
    }
}

/// How a stream ended for now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// At the manifest's version.
    AtHead,
    /// Something failed that may be better after this.
    Again(Duration, String),
    /// There is no way now; a new manifest, or time, may bring one.
    NoWay(String),
    /// Nothing may be written any more.
    Halted,
    /// The process ends.
    Stopped,
}

/// What to do next for a stream.
#[derive(Debug)]
enum Plan {
    /// It is where it should be.
    There,
    /// Apply these.
    Go(Way),
    /// Not before this has passed.
    Wait(Duration, String),
    /// There is no way.
    NoWay(String),
}

/// A chain of packs to take.
#[derive(Debug)]
struct Way {
    instance: Instance,
    epoch: u64,
    packs: Vec<PackEntry>,
    /// Chains that end below this must not be applied: readers saw it.
    least: Option<Version>,
}

/// A pack at hand, and where.
pub(crate) type AtHand = (PathBuf, PackEntry);

impl Relay {
    /// Brings one stream up as far as it goes now.
    pub async fn bring_up(&self, stream: &StreamName, supply: Supply<'_>, pace: Pace) -> Outcome {
        let own = self.stream_lock(stream);
        let _alone = own.lock().await;
        for _ in 0..TURNS {
            if self.is_halted() {
                return Outcome::Halted;
            }
            // 1. The cheapest way by bytes, around what is bad.
            let way = match self.plan(stream, supply) {
                Plan::There => {
                    if let Some(why) = self.contradiction(stream) {
                        self.latch_drift(stream, &why);
                        continue;
                    }
                    self.waits(stream, None);
                    self.none_is_missing(Wanted::Here, stream);
                    return Outcome::AtHead;
                }
                Plan::Wait(pause, why) => {
                    self.waits(stream, Some(&why));
                    return Outcome::Again(pause, why);
                }
                Plan::NoWay(why) => {
                    self.waits(stream, Some(&why));
                    return Outcome::NoWay(why);
                }
                Plan::Go(way) => way,
            };
            // 2. Fetch and verify what is not at hand, if it may have room.
            let (packs, missing) = match self.may_fit(Wanted::Here, &way.instance, &way.packs) {
                Ok(()) => self.gather(&way.instance, &way.packs, supply).await,
                Err(why) => (Vec::new(), Some(Missing::NoRoom(why))),
            };
            let reaches = packs.last().map(|(_, e)| e.version);
            if reaches.is_none_or(|r| way.least.is_some_and(|l| r < l)) {
                match self.not_gathered(&way.instance, missing, supply, pace).await {
                    Some(outcome) => return outcome,
                    None => continue,
                }
            }
            // 3. Trial: the registers' own code, on the shadow.
            let end = self.try_on_shadow(&way, &packs).await;
            // 4. What was proved goes to ok/, what failed is judged.
            if let Some(outcome) = self.settle(stream, &way, &packs, end, pace).await {
                return outcome;
            }
            if missing.is_some()
                && let Some(outcome) = self.not_gathered(&way.instance, missing, supply, pace).await
            {
                return outcome;
            }
        }
        Outcome::Again(SOON, format!("{stream}: {TURNS} turns without an end"))
    }

    /// Why the shadow is at the listed version by its number only; once a version, whatever comes of the heal.
    fn contradiction(&self, stream: &StreamName) -> Option<String> {
        let state = self.hall.state();
        let manifest = state.manifest.as_ref()?;
        let (instance, entry) = (manifest.instance(stream)?, manifest.streams.get(stream)?);
        let why = state.held.get(stream)?.differs_from(&instance, manifest.epoch, entry)?;
        let mut told = self.contradicted.lock().unwrap_or_else(PoisonError::into_inner);
        told.insert((instance, entry.version)).then_some(why)
    }

    fn stream_lock(&self, stream: &StreamName) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(locks.entry(stream.clone()).or_default())
    }

    fn waits(&self, stream: &StreamName, why: Option<&str>) {
        let mut state = self.hall.state();
        let Some(instance) = state.manifest.as_ref().and_then(|m| m.instance(stream)) else { return };
        match why {
            Some(why) => state.waits.insert(instance, why.to_owned()),
            None => state.waits.remove(&instance),
        };
    }

    /// Step 1: pure but for looking at the hall and the clock.
    fn plan(&self, stream: &StreamName, supply: Supply<'_>) -> Plan {
        let now = self.hall.clock.now();
        let state = self.hall.state();
        let Some(manifest) = state.manifest.clone() else { return Plan::NoWay("no manifest yet".into()) };
        if let Some(why) = manifest.unread.get(stream) {
            return Plan::NoWay(format!("what the manifest lists of it cannot be taken here: {why}"));
        }
        let (Some(entry), Some(instance)) = (manifest.streams.get(stream), manifest.instance(stream)) else {
            return Plan::There;
        };
        let held = state.held_version(&instance);
        let drifted = state.drifts.contains_key(stream);
        if held == Some(entry.version) && !drifted {
            return Plan::There;
        }
        // What is at hand costs nothing.
        let priced = self.priced(&instance, entry, &state);
        let usable = |p: &PackEntry| {
            let name = p.name(&instance);
            supply.is_usable(&name, p, state.attempts.get(&name), now, &self.hall)
        };
        let from = held.filter(|_| !drifted);
        // Round what no source has (a stick may), if another way leads on; it is asked for again where none does.
        let missing = |p: &PackEntry| supply.only.is_none() && self.is_missing(Wanted::Here, &p.name(&instance));
        let there = |p: &PackEntry| usable(p) && (p.bytes == 0 || !missing(p));
        let way = chain::furthest(&priced, from, entry.version, there);
        let Some((reached, way)) = way.or_else(|| chain::furthest(&priced, from, entry.version, usable)) else {
            return Plan::NoWay(match from {
                Some(v) => format!("no usable pack leads on from {v}"),
                None => format!("no usable full leads to {}", entry.version),
            });
        };
        let least = held.filter(|_| drifted);
        if least.is_some_and(|l| reached < l) {
            return Plan::NoWay(format!("drifted, and no usable full leads to {}", entry.version));
        }
        let packs: Vec<PackEntry> = way.iter().filter_map(|p| entry.pack(p.version, p.kind).cloned()).collect();
        drop(state);
        // What a stick brought is tried now or never.
        match self.paused(&instance, &packs).filter(|_| supply.only.is_none()) {
            Some(pause) => Plan::Wait(pause, "a pack failed; it is tried again in a moment".into()),
            None => Plan::Go(Way { instance, epoch: manifest.epoch, packs, least }),
        }
    }

    /// The packs that would be got next to bring a stream up, if of those not at hand there were these.
    pub(crate) fn would_get(&self, stream: &StreamName, there: &BTreeSet<PackName>) -> Vec<(PackName, PackEntry)> {
        match self.plan(stream, Supply { sources: &[], only: Some(there) }) {
            Plan::Go(way) => self.not_at_hand(&way.instance, way.packs),
            _ => Vec::new(),
        }
    }

    /// Those of some listed packs that are neither served nor to be tried.
    pub(crate) fn not_at_hand(&self, instance: &Instance, packs: Vec<PackEntry>) -> Vec<(PackName, PackEntry)> {
        let state = self.hall.state();
        let named = packs.into_iter().map(|p| (p.name(instance), p));
        named.filter(|(name, p)| !is_at_hand(&state, name, &p.sha256)).collect()
    }

    /// The listed packs with the bytes that each would cost now.
    pub(crate) fn priced(&self, instance: &Instance, entry: &StreamEntry, state: &State) -> Vec<PackEntry> {
        let price = |p: &PackEntry| {
            let there = is_at_hand(state, &p.name(instance), &p.sha256);
            PackEntry { bytes: if there { 0 } else { p.bytes }, ..p.clone() }
        };
        entry.packs.iter().map(price).collect()
    }

    /// How long some of these packs pause yet.
    pub(crate) fn paused(&self, instance: &Instance, packs: &[PackEntry]) -> Option<Duration> {
        let (pauses, now) = (self.pauses(), self.hall.clock.monotonic());
        let until = packs.iter().filter_map(|p| pauses.get(&p.name(instance))).max()?;
        until.checked_sub(now).filter(|pause| !pause.is_zero())
    }

    fn pauses(&self) -> MutexGuard<'_, BTreeMap<PackName, Duration>> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn awaiting(&self) -> MutexGuard<'_, BTreeMap<StreamName, Duration>> {
        self.awaiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a stream pauses that waits for another to lose a table: ever longer.
    pub(crate) fn pause_awaiting(&self, stream: &StreamName) -> Duration {
        let mut awaiting = self.awaiting();
        let next = awaiting.entry(stream.clone()).or_default();
        let pause = (*next).max(SOON);
        *next = (pause * 2).min(AWAITING);
        pause
    }

    /// A stream moved on: others may have waited for that.
    pub(crate) fn moved_on(&self, stream: &StreamName) {
        let mut awaiting = self.awaiting();
        awaiting.remove(stream);
        awaiting.values_mut().for_each(|pause| *pause = Duration::ZERO);
    }

    /// The streams that waited for another when one moved on; each is named once.
    pub(crate) fn may_go_on(&self) -> Vec<StreamName> {
        let mut awaiting = self.awaiting();
        let over = awaiting.iter_mut().filter(|(_, pause)| pause.is_zero());
        over.map(|(stream, pause)| {
            *pause = SOON;
            stream.clone()
        })
        .collect()
    }

    /// The shadow's rows are wrong: a full is to heal them.
    pub fn latch_drift(&self, stream: &StreamName, text: &str) {
        let (now, text) = (self.hall.clock.now(), brief(text));
        if let Err(e) = self.hall.spool.latch_drift(stream, now, text) {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        // A trial and a check of all rows may find the same.
        match self.hall.state().drifts.entry(stream.clone()) {
            Entry::Vacant(new) => drop(new.insert((now, text.to_owned()))),
            Entry::Occupied(_) => return,
        }
        tracing::error!(%stream, "the shadow has drifted; it is healed by a full: {text}");
        self.hall.event(fault::DRIFT, stream.as_str(), text);
        self.hall.report.notify_one();
    }

    fn healed(&self, stream: &StreamName) {
        if self.end_drift(stream) {
            self.hall.event("HEALED", stream.as_str(), "healed by a full");
            self.hall.report.notify_one();
        }
    }

    /// A drift is over; whether there was one.
    fn end_drift(&self, stream: &StreamName) -> bool {
        let had_drifted = self.hall.drift_healed(stream);
        if had_drifted && let Err(e) = self.hall.spool.clear_drift(stream) {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        had_drifted
    }
}

/// Whether a pack of this hash is served or to be tried.
fn is_at_hand(state: &State, name: &PackName, sha256: &Sha256) -> bool {
    state.ok.get(name) == Some(&Some(*sha256)) || state.ready.get(name) == Some(sha256)
}

/// What trouble with own files is told under, where it is in the way of one stream alone.
pub(crate) fn subject(wanted: Wanted, stream: &StreamName) -> String {
    match wanted {
        Wanted::Here => stream.to_string(),
        Wanted::ByNew => format!("{stream} for new registers"),
    }
}

/// Runs what blocks on the disk off the async threads.
async fn off_thread<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, ShelfError> + Send + 'static,
) -> Result<T, ShelfError> {
    match tokio::task::spawn_blocking(f).await {
        Ok(done) => done,
        // A step observer pulled the plug, or the process ends.
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(e) => {
                Err(ShelfError { action: shelf::Action::Write, path: PathBuf::new(), source: std::io::Error::other(e) })
            }
        },
    }
}

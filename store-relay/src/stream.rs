//! Bringing one stream up to what the manifest lists: plan → fetch → trial → `ok/` or `error/`. Knows nothing of
//! other streams, so that none can stop another. Decides by `proto::chain` and `tries`; every move is
//! `shelves`'.

use crate::hall::{Hall, State};
use crate::relay::{Pace, Relay, Wanted};
use crate::shelves::Room;
use crate::spool::SpoolError;
use crate::trial::{Aim, Trial, TrialEnd};
use crate::tries::{self, Attempts, Cause, Failure};
use proto::chain;
use proto::clock::{Timestamp, since};
use proto::digest::Sha256;
use proto::disk::{Beside, Shortages};
use proto::fetch::{Etag, FetchError, FetchErrorKind, Small, Source, Want};
use proto::ids::{Instance, StreamName, Version};
use proto::layout::{ObjectName, PackName};
use proto::manifest::{PackEntry, StreamEntry};
use proto::replica::{is_in_the_way, sqlite};
use proto::retry::Verdict;
use proto::shelf::{self, ShelfError};
use proto::wire::{Fault, brief, fault};
use serde::Serialize;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// A source that failed is asked last for so long.
const DOWN: Duration = Duration::from_secs(30);
/// The pause after surroundings failed.
const SOON: Duration = Duration::from_secs(5);
/// The longest pause of a stream that waits for another: each trial costs a process.
const AWAITING: Duration = Duration::from_secs(60);
/// What any trial may take, and the unpacked bytes a second of the slowest machine beyond that.
const LEAST_TIME: Duration = Duration::from_secs(30);
const SLOWEST: u64 = 256 << 10;
/// The bytes of the shadow that the slowest disk reads in a second: a pack may want a table read through.
const SLOWEST_READ: u64 = 1 << 20;
/// The longest pause of a pack that the disk bends: each time it comes over the line.
const ROTTEN: Duration = Duration::from_secs(600);
/// So long after a pack was lost another loss of it is no bad block that it is written to.
const UNSUSPECTED: Duration = Duration::from_secs(24 * 3600);
/// Bytes of a bad body that are kept to be looked at.
const EVIDENCE: u64 = 16 << 20;
/// So many times `tries.missing` is waited for a source that was not heard: it may have what no other has.
const UNHEARD: u32 = 6;
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

    fn absent(&self) -> MutexGuard<'_, BTreeMap<(Wanted, PackName), Absent>> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no source has had a listed pack for long.
    fn is_missing(&self, wanted: Wanted, name: &PackName) -> bool {
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

    /// Step 2: the packs in order, as far as they could be got; and what stopped it.
    pub(crate) async fn gather(
        &self,
        instance: &Instance,
        packs: &[PackEntry],
        supply: Supply<'_>,
    ) -> (Vec<AtHand>, Option<Missing>) {
        let mut files = Vec::with_capacity(packs.len());
        for entry in packs {
            let name = entry.name(instance);
            match self.at_hand(&name, entry) {
                Ok(Some(path)) => files.push((path, entry.clone())),
                Ok(None) => match self.fetch_alone(&name, entry, supply).await {
                    Ok(path) => files.push((path, entry.clone())),
                    Err(missing) => return (files, Some(missing)),
                },
                Err(e) => return (files, Some(Missing::Disk(e))),
            }
        }
        (files, None)
    }

    /// Where a pack lies already.
    fn at_hand(&self, name: &PackName, entry: &PackEntry) -> Result<Option<PathBuf>, ShelfError> {
        let (in_ok, in_ready, given_up) = {
            let state = self.hall.state();
            let attempts = state.attempts.get(name).filter(|a| a.in_error && a.sha256 == entry.sha256);
            (
                state.ok.get(name) == Some(&Some(entry.sha256)),
                state.ready.get(name).copied(),
                attempts.is_some_and(|a| a.cause != Cause::Hash),
            )
        };
        let shelves = &self.hall.shelves;
        if in_ok {
            return Ok(Some(shelves.pack(Room::Ok, name)));
        }
        if in_ready.is_some_and(|h| h != entry.sha256) {
            shelves.drop_pack(Room::Ready, name)?;
            self.hall.state().ready.remove(name);
        } else if in_ready.is_some() {
            return Ok(Some(shelves.pack(Room::Ready, name)));
        }
        if given_up && shelves.take_back(name, entry.bytes)? {
            self.hall.state().ready.insert(name.clone(), entry.sha256);
            return Ok(Some(shelves.pack(Room::Ready, name)));
        }
        Ok(None)
    }

    /// One download of a pack at a time: a part has one writer.
    async fn fetch_alone(&self, name: &PackName, entry: &PackEntry, supply: Supply<'_>) -> Result<PathBuf, Missing> {
        let turn = {
            let mut turns = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(name.clone()).or_default())
        };
        let _alone = turn.lock().await;
        match self.at_hand(name, entry) {
            Ok(Some(path)) => Ok(path),
            Ok(None) => self.fetch(name, entry, supply).await,
            Err(e) => Err(Missing::Disk(e)),
        }
    }

    /// Downloads a pack from the first source that has it right; sources that failed lately come last.
    async fn fetch(&self, name: &PackName, entry: &PackEntry, supply: Supply<'_>) -> Result<PathBuf, Missing> {
        let hall = &self.hall;
        let part = hall.shelves.part(name).map_err(Missing::Disk)?;
        let there = std::fs::symlink_metadata(&part).map_or(0, |m| m.len());
        hall.disk.fits(entry.bytes.saturating_sub(there)).map_err(|why| Missing::NoRoom(format!("{name}: {why}")))?;
        let want = Want { bytes: entry.bytes, sha256: entry.sha256 };
        let mut errors = Vec::new();
        let mut importing = self.importing.subscribe();
        let object = ObjectName::Pack(name.clone());
        for source in self.in_order(supply.sources) {
            let mut silent = |_| {};
            let got = tokio::select! {
                got = source.download(&object, &want, &part, &hall.config.rate, &mut silent) => got,
                () = hall.stop.cancelled() => return Err(Missing::Stopped),
                // A stick does not wait for a slow line.
                _ = importing.wait_for(|now| *now), if supply.only.is_none() => return Err(Missing::Import),
            };
            match got {
                Ok(()) => {
                    self.note_source(source.url(), true);
                    hall.metrics.downloaded.inc_by(entry.bytes.saturating_sub(there));
                    return self.whole(name, entry.sha256).await.map_err(Missing::Disk);
                }
                Err(e) => {
                    self.note_source(source.url(), e.verdict() != Verdict::Retry || e.kind == FetchErrorKind::NotFound);
                    errors.push(e);
                }
            }
        }
        Err(Missing::Fetch(name.clone(), entry.clone(), errors))
    }

    /// A verified part goes to `ready/`.
    async fn whole(&self, name: &PackName, sha256: Sha256) -> Result<PathBuf, ShelfError> {
        let (shelves, moved) = (self.hall.shelves.clone(), name.clone());
        off_thread(move || shelves.part_is_whole(&moved)).await?;
        self.hall.state().ready.insert(name.clone(), sha256);
        self.end_missing(|_, had| had == name);
        Ok(self.hall.shelves.pack(Room::Ready, name))
    }

    fn in_order<'s>(&self, sources: &'s [Source]) -> Vec<&'s Source> {
        let now = self.hall.clock.monotonic();
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        let mut order: Vec<&Source> = sources.iter().collect();
        order.sort_by_key(|s| down.get(s.url()).is_some_and(|until| *until > now));
        order
    }

    fn note_source(&self, url: &str, answers: bool) {
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        if answers {
            down.remove(url);
        } else {
            down.insert(url.to_owned(), self.hall.clock.monotonic() + DOWN);
        }
    }

    /// Whether a source has said that it lacks an object. One that gives no lists either refuses us whatever we ask for.
    pub(crate) fn is_lacking(&self, e: &FetchError) -> bool {
        let refuses_us = || self.hall.state().faults.contains_key(&(fault::SOURCE.to_owned(), e.source_url.clone()));
        e.is_not_found() || (e.may_be_absent() && !refuses_us())
    }

    /// Whether each source has said what it has under an object's name. One that has not may have it.
    pub(crate) fn all_spoke(&self, errors: &[FetchError]) -> bool {
        errors.iter().all(|e| e.kind.wrong_body().is_some() || self.is_lacking(e))
    }

    /// What follows when a pack could not be got; `None`: plan again.
    async fn not_gathered(
        &self,
        instance: &Instance,
        missing: Option<Missing>,
        supply: Supply<'_>,
        pace: Pace,
    ) -> Option<Outcome> {
        let (missing, stream) = (missing?, &instance.stream);
        let counted = self.not_had(Wanted::Here, instance, &missing, supply).await;
        let text = match missing {
            Missing::Stopped => return Some(Outcome::Stopped),
            Missing::Import => return Some(Outcome::Again(SOON, "an import goes first".into())),
            Missing::NoRoom(text) => text,
            Missing::Disk(e) => e.to_string(),
            Missing::Fetch(_, _, errors) if errors.iter().any(|e| e.kind == FetchErrorKind::Halt) => {
                return Some(Outcome::Halted);
            }
            Missing::Fetch(name, _, errors) => match counted {
                Some(given_up) => return self.after_a_try(stream, &name, given_up, all_texts(&errors), pace),
                None if errors.is_empty() => format!("{name}: there is no source"),
                None => {
                    if errors.iter().any(|e| self.is_lacking(e)) {
                        self.note_absent(Wanted::Here, &name, self.all_spoke(&errors));
                    }
                    all_texts(&errors)
                }
            },
        };
        self.waits(stream, Some(&text));
        Some(Outcome::Again(SOON, text))
    }

    /// Takes down why a pack could not be got: trouble with own files is told, and a whole body with a wrong hash is a
    /// try per source. Whether the pack was given up; `None`: nothing counted.
    pub(crate) async fn not_had(
        &self,
        wanted: Wanted,
        instance: &Instance,
        missing: &Missing,
        supply: Supply<'_>,
    ) -> Option<bool> {
        let trouble = |verdict, full, text: &str| self.trouble(Some((wanted, instance)), verdict, full, text);
        let (name, entry, errors) = match missing {
            Missing::Stopped | Missing::Import => return None,
            Missing::NoRoom(text) => {
                match wanted {
                    Wanted::Here => trouble(Verdict::Retry, true, text),
                    // A debt: the disk is not full, it only has no room for this.
                    Wanted::ByNew => self.make_room(),
                }
                return None;
            }
            Missing::Disk(e) => {
                trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                return None;
            }
            Missing::Fetch(name, entry, errors) => (name, entry, errors),
        };
        let text = all_texts(errors);
        let any = |kind| errors.iter().any(|e| e.kind == kind);
        if any(FetchErrorKind::Halt) {
            trouble(Verdict::Halt, false, &text);
            return None;
        }
        if any(FetchErrorKind::Disk) {
            // The part itself may be what fills the disk.
            let _ = self.hall.shelves.drop_pack(Room::Incoming, name);
            self.disk_full(&text);
        }
        if any(FetchErrorKind::Local) {
            // A part that cannot be written is begun anew, if the directory lets us.
            let _ = self.hall.shelves.drop_pack(Room::Incoming, name);
            trouble(Verdict::Retry, false, &text);
        }
        let failures: Vec<(&str, &FetchError)> =
            errors.iter().filter_map(|e| Some((e.kind.wrong_body()?, e))).collect();
        let (mut given_up, unheard) = (false, !self.all_spoke(errors));
        for (code, e) in &failures {
            let (code, reason) = ((*code).to_owned(), e.to_string());
            given_up |= self.count(name, entry.sha256, Failure { cause: Cause::Hash, code, reason, unheard });
        }
        if given_up {
            for (_, e) in &failures {
                if let Some(source) = supply.sources.iter().find(|s| s.url() == e.source_url) {
                    self.keep_evidence(name, entry, source).await;
                }
            }
        }
        (!failures.is_empty()).then_some(given_up)
    }

    /// What a source gives instead of a pack is kept beside the reason, if it is no giant, and its ETag, to notice
    /// when it changes.
    async fn keep_evidence(&self, name: &PackName, entry: &PackEntry, source: &Source) {
        let most = entry.bytes.min(EVIDENCE);
        let Ok(Small::Body { bytes, etag }) = source.get_small(&name.clone().into(), None, None, most).await else {
            return;
        };
        if bytes.len() as u64 == entry.bytes && Sha256::of(&bytes) == entry.sha256 {
            return; // It was mended just now.
        }
        let attempts = {
            let mut state = self.hall.state();
            let Some(attempts) = state.attempts.get_mut(name) else { return };
            attempts.etags.extend(etag.map(|e| (source.url().to_owned(), e.0)));
            attempts.clone()
        };
        let kept =
            self.hall.shelves.put_evidence(name, &bytes).and_then(|()| self.hall.shelves.refuse(name, &attempts));
        if let Err(e) = kept {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        // As they are by now: headquarters may have heard of it meanwhile.
        let Some(attempts) = self.hall.state().attempts.get(name).cloned() else { return };
        if let Err(e) = self.hall.spool.put_attempts(name, &attempts) {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
    }

    /// Asks a source whether what it gave instead of a pack has changed; then it is fetched again now.
    pub(crate) async fn look_at_bad(&self, source: &Source) {
        let bad: Vec<(PackName, Etag)> = {
            let state = self.hall.state();
            let known = |(n, a): (&PackName, &Attempts)| Some((n.clone(), Etag(a.etags.get(source.url())?.clone())));
            state.attempts.iter().filter(|(_, a)| a.in_error && a.cause == Cause::Hash).filter_map(known).collect()
        };
        for (name, etag) in bad {
            // No byte of it is wanted: a changed one is "too long".
            let asked = source.get_small(&name.clone().into(), None, Some(&etag), 0).await;
            let changed = match asked {
                Ok(Small::Unchanged) => false,
                Ok(Small::Body { .. }) => true,
                Err(e) => e.kind == FetchErrorKind::TooLong,
            };
            if changed {
                tracing::info!(pack = %name, source = source.url(), "it has changed; it is fetched again");
                if let Some(attempts) = self.hall.state().attempts.get_mut(&name) {
                    attempts.etags.remove(source.url());
                    attempts.last = Timestamp::UNIX_EPOCH;
                }
            }
        }
    }

    /// Step 3.
    async fn try_on_shadow(&self, way: &Way, packs: &[AtHand]) -> TrialEnd {
        let trial = self.trial(&way.instance, way.epoch, Aim::Advance, packs);
        let (started, before) = (self.hall.clock.monotonic(), self.room());
        let end = self.shadow.advance(trial, self.time_for(packs), &self.hall.stop).await;
        self.note_room(Wanted::Here, &way.instance, packs, &end, before);
        let took = self.hall.clock.monotonic().saturating_sub(started);
        tracing::debug!(instance = %way.instance, packs = packs.len(), ?took, ?end, "trial");
        self.hall.metrics.trials.with_label_values(&[end_label(&end)]).inc();
        end
    }

    /// Whether what a chain begins with may have room, as far as can be said before it is fetched and tried; what comes after
    /// it is small beside a full, or begins the next chain.
    pub(crate) fn may_fit(&self, wanted: Wanted, instance: &Instance, packs: &[PackEntry]) -> Result<(), String> {
        let (hall, Some(first)) = (&self.hall, packs.first()) else { return Ok(()) };
        let name = first.name(instance);
        let (is_held, is_there) = {
            let state = hall.state();
            // A scratch database begins with nothing.
            let is_held = wanted == Wanted::Here && state.held.contains_key(&instance.stream);
            (is_held, is_at_hand(&state, &name, &first.sha256))
        };
        let part = hall.shelves.pack(Room::Incoming, &name);
        let there = if is_there { first.bytes } else { std::fs::symlink_metadata(part).map_or(0, |m| m.len()) };
        let now = hall.clock.monotonic();
        let fits = self.short(wanted).may_fit(&hall.disk, instance, &[first], is_held, there, now);
        fits.map_err(|why| format!("{name}: {why}"))
    }

    /// What had no room.
    fn short(&self, wanted: Wanted) -> &Shortages {
        match wanted {
            Wanted::Here => &self.short,
            Wanted::ByNew => &self.short_of_proof,
        }
    }

    /// The room there is, beside the shadow's log.
    pub(crate) fn room(&self) -> Option<Beside> {
        self.hall.disk.beside(sqlite::log_bytes(self.shadow.path()))
    }

    /// Remembers what was tried until there was no room: not again before there may be, for that wears the disk.
    pub(crate) fn note_room(
        &self,
        wanted: Wanted,
        instance: &Instance,
        packs: &[AtHand],
        end: &TrialEnd,
        before: Option<Beside>,
    ) {
        let (short, Some((_, first))) = (self.short(wanted), packs.first()) else { return };
        match (end, before) {
            (TrialEnd::Done, _) => short.had_room(instance),
            (TrialEnd::Surroundings { disk_full: true, .. }, Some(before)) => {
                short.found(instance, &[first], before, self.room(), self.hall.clock.monotonic());
            }
            _ => {}
        }
    }

    /// How long a trial may take: other streams wait at the shadow's door, so that a small pack that hangs must
    /// not have the time of a large one.
    pub(crate) fn time_for(&self, packs: &[AtHand]) -> Duration {
        let unpacked: u64 = packs.iter().map(|(_, e)| e.unpacked).sum();
        let held = std::fs::metadata(self.shadow.path()).map_or(0, |m| m.len());
        let time = LEAST_TIME + Duration::from_secs(unpacked / SLOWEST + held / SLOWEST_READ);
        time.min(self.hall.config.trial.time.0)
    }

    /// A trial of packs at hand.
    pub(crate) fn trial(&self, instance: &Instance, epoch: u64, aim: Aim, packs: &[AtHand]) -> Trial {
        let listed = self.hall.state().manifest.as_ref().map(|m| m.tables()).unwrap_or_default();
        Trial {
            listed,
            parent: i32::try_from(std::process::id()).unwrap_or_default(),
            shadow: self.shadow.path().to_owned(),
            aim,
            memory: self.hall.config.trial.memory.0,
            limits: self.hall.config.limits.clone(),
            instance: instance.clone(),
            epoch,
            now: self.hall.clock.now(),
            packs: packs.to_vec(),
        }
    }

    /// Step 4. `None`: go on with the next turn.
    async fn settle(
        &self,
        stream: &StreamName,
        way: &Way,
        packs: &[AtHand],
        end: TrialEnd,
        pace: Pace,
    ) -> Option<Outcome> {
        let here = Some((Wanted::Here, &way.instance));
        // What the shadow says now is the truth, whatever the child said before it died.
        if let Err(e) = self.read_shadow() {
            let text = e.to_string();
            if e.verdict() == Verdict::Rebuild {
                return if self.begin_shadow_anew(&text).await { None } else { Some(Outcome::Again(SOON, text)) };
            }
            self.trouble(here, e.verdict(), e.is_disk_full(), &text);
            return Some(Outcome::Again(SOON, text));
        }
        if matches!(end, TrialEnd::Done) {
            self.rotted().retain(|name, _| packs.iter().all(|(_, e)| e.name(&way.instance) != *name));
        }
        let passed = self.pass(&way.instance, packs).await;
        if let Err(e) = passed {
            let text = e.to_string();
            self.trouble(here, e.verdict(), e.is_disk_full(), &text);
            return Some(Outcome::Again(SOON, text));
        }
        match end {
            TrialEnd::Done => {
                self.moved_on(stream);
                // A delta heals no rows: a drift that was found meanwhile stays.
                if packs.first().is_some_and(|(_, e)| e.base.is_none()) {
                    self.healed(stream);
                }
                self.hall.mended(fault::LOCAL_FILES, &subject(Wanted::Here, stream));
                None
            }
            TrialEnd::Stopped => Some(Outcome::Stopped),
            TrialEnd::Waits { text } => {
                self.waits(stream, Some(&text));
                Some(Outcome::Again(self.pause_awaiting(stream), text))
            }
            TrialEnd::Refused { .. } | TrialEnd::Died { .. } => {
                let (name, failure) = self.guilty(way, packs, end)?;
                let entry = packs.iter().find(|(_, e)| e.name(&way.instance) == name)?.1.clone();
                let text = format!("{name}: {}", failure.reason);
                let given_up = self.count(&name, entry.sha256, failure);
                self.after_a_try(stream, &name, given_up, text, pace)
            }
            TrialEnd::Rotten { pack, text } => {
                let pause = pack.and_then(|name| self.rots(Wanted::Here, &name, &text))?;
                self.waits(stream, Some(&text));
                Some(Outcome::Again(pause, text))
            }
            TrialEnd::Drifted { text } => {
                self.latch_drift(stream, &text);
                None
            }
            TrialEnd::Surroundings { text, disk_full, .. } => {
                self.trouble(here, Verdict::Retry, disk_full, &text);
                self.waits(stream, Some(&text));
                Some(Outcome::Again(SOON, text))
            }
            TrialEnd::Unsound { text } => {
                if self.begin_shadow_anew(&text).await {
                    None
                } else {
                    self.waits(stream, Some(&text));
                    Some(Outcome::Again(SOON, text))
                }
            }
            TrialEnd::Halted { text } => {
                self.own_trouble(Verdict::Halt, false, &text);
                Some(Outcome::Halted)
            }
        }
    }

    /// Whether a table that the stream gets is held by another one that is yet to lose it.
    pub(crate) fn is_in_the_way(&self, stream: &StreamName) -> bool {
        let state = self.hall.state();
        state.manifest.as_ref().is_some_and(|m| is_in_the_way(&m.tables(), stream, &state.held))
    }

    /// Which pack a failed trial is held against: the named one; of a death the one begun last, of those that are not proved
    /// if there are any.
    fn guilty(&self, way: &Way, packs: &[AtHand], end: TrialEnd) -> Option<(PackName, Failure)> {
        let (named, begun, failure) = match end {
            TrialEnd::Refused { pack, code, text } => {
                (pack, None, Failure { cause: Cause::Content, code, reason: text, unheard: false })
            }
            TrialEnd::Died { pack, how } => {
                let reason = format!("the process that tried it died: {how}");
                (None, pack, Failure { cause: Cause::Crash, code: "CRASH".into(), reason, unheard: false })
            }
            _ => return None,
        };
        let state = self.hall.state();
        let name = |e: &PackEntry| e.name(&way.instance);
        let is_new = |e: &&PackEntry| state.proofs.get(&name(e)) != Some(&e.sha256);
        let entries = || packs.iter().map(|(_, e)| e);
        let begun = entries().find(|e| Some(name(e)) == begun);
        let suspect = begun.filter(is_new).or_else(|| entries().find(is_new)).or(begun).or_else(|| entries().next());
        named.or(suspect.map(name)).map(|name| (name, failure))
    }

    /// A scratch proof that failed: as a trial's failure, without the shadow.
    pub(crate) fn not_proved(&self, instance: &Instance, packs: &[AtHand], end: TrialEnd) {
        match &end {
            TrialEnd::Refused { .. } | TrialEnd::Died { .. } => {
                let way = Way { instance: instance.clone(), epoch: 0, packs: Vec::new(), least: None };
                if let Some((name, failure)) = self.guilty(&way, packs, end)
                    && let Some((_, entry)) = packs.iter().find(|(_, e)| e.name(instance) == name)
                {
                    self.count(&name, entry.sha256, failure);
                }
            }
            // A debt: what was tried in vain has left its room again.
            TrialEnd::Surroundings { disk_full: true, .. } => self.make_room(),
            TrialEnd::Surroundings { text, .. } => {
                self.trouble(Some((Wanted::ByNew, instance)), Verdict::Retry, false, text);
            }
            TrialEnd::Halted { text } => self.own_trouble(Verdict::Halt, false, text),
            end => tracing::warn!(%instance, ?end, "the chain was not proved"),
        }
    }

    /// What follows a counted failure.
    fn after_a_try(
        &self,
        stream: &StreamName,
        name: &PackName,
        given_up: bool,
        text: String,
        pace: Pace,
    ) -> Option<Outcome> {
        if given_up {
            return None; // The next turn goes around it.
        }
        self.waits(stream, Some(&text));
        let pause = self.hall.state().attempts.get(name).map(|a| tries::pause(a, &self.hall.config.tries))?;
        if pace == Pace::Service {
            self.pauses().insert(name.clone(), self.hall.clock.monotonic() + pause);
        }
        Some(Outcome::Again(pause, text))
    }

    /// Counts a failure durably; whether the pack now lies in `error/`.
    fn count(&self, name: &PackName, sha256: Sha256, failure: Failure) -> bool {
        let hall = &self.hall;
        let before = hall.state().attempts.get(name).cloned();
        let was_in_error = before.as_ref().is_some_and(|b| b.in_error && b.sha256 == sha256);
        tracing::warn!(pack = %name, code = failure.code, "{}", failure.reason);
        let attempts =
            tries::count(before.as_ref(), sha256, failure, hall.clock.now(), &hall.config.tries, &hall.judge);
        if let Err(e) = hall.spool.put_attempts(name, &attempts) {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        hall.state().attempts.insert(name.clone(), attempts.clone());
        if attempts.in_error {
            if let Err(e) = hall.shelves.refuse(name, &attempts) {
                self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
            }
            hall.state().ready.remove(name);
            if !was_in_error {
                tracing::error!(pack = %name, code = attempts.code, "given up after {} tries", attempts.tries);
                hall.event(fault::PACK_IN_ERROR, &name.to_string(), &attempts.reason);
                hall.report.notify_one();
            }
        }
        attempts.in_error
    }

    /// What the shadow has proved of these packs goes to `ok/`, and the LAN hears of it.
    pub(crate) async fn pass(&self, instance: &Instance, packs: &[AtHand]) -> Result<(), ShelfError> {
        let hall = &self.hall;
        for (_, entry) in packs {
            let name = entry.name(instance);
            let (proved, there) = {
                let state = hall.state();
                (state.proofs.get(&name) == Some(&entry.sha256), state.ok.get(&name) == Some(&Some(entry.sha256)))
            };
            if !proved {
                continue;
            }
            if !there {
                let (shelves, moved) = (hall.shelves.clone(), name.clone());
                match off_thread(move || shelves.passed(&moved)).await {
                    // Somebody took it away since its trial: it is a loss like any, and its proof stands.
                    Err(e) if e.is_not_found() => {
                        self.rots(Wanted::ByNew, &name, &format!("{name}: its file went after it was proved: {e}"));
                        continue;
                    }
                    passed => passed?,
                }
                hall.state().ready.remove(&name);
                self.serve_pack(&name, entry.bytes, Some(entry.sha256));
                hall.objects.warm(&name).await;
                tracing::info!(pack = %name, "proved and served");
            }
            self.forgive(&name)?;
        }
        hall.publish_versions();
        Ok(())
    }

    /// A pack that failed before is good after all, or is to be tried anew.
    pub(crate) fn forgive(&self, name: &PackName) -> Result<(), ShelfError> {
        let had_failed = self.hall.state().forgive(name);
        if had_failed {
            self.hall.keep_over();
        }
        self.pauses().remove(name);
        if !had_failed {
            return Ok(());
        }
        if let Err(e) = self.hall.spool.forget_attempts(name) {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        self.hall.report.notify_one();
        self.hall.shelves.forgive(name)
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

/// Why a pack is not at hand.
#[derive(Debug)]
pub(crate) enum Missing {
    /// No source gave it.
    Fetch(PackName, PackEntry, Vec<FetchError>),
    /// Our own files.
    Disk(ShelfError),
    /// It would not fit.
    NoRoom(String),
    /// The process ends.
    Stopped,
    /// An import wants the stream.
    Import,
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

fn all_texts(errors: &[FetchError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// How a trial ended, as a metric's label.
fn end_label(end: &TrialEnd) -> &'static str {
    match end {
        TrialEnd::Done => "done",
        TrialEnd::Refused { .. } => "refused",
        TrialEnd::Rotten { .. } => "rotten",
        TrialEnd::Drifted { .. } => "drifted",
        TrialEnd::Surroundings { .. } => "surroundings",
        TrialEnd::Unsound { .. } => "unsound",
        TrialEnd::Halted { .. } => "halted",
        TrialEnd::Died { .. } => "died",
        TrialEnd::Waits { .. } => "waits",
        TrialEnd::Stopped => "stopped",
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

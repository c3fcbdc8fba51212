//! What is done when there is nothing better to do: a complete chain in `ok/` for registers that are new, order, and once
//! a day a look at the shadow's rows. All of it may be broken off at any point and begun again.

use crate::beats;
use crate::relay::{Relay, RelayError, Wanted};
use crate::shelves::Room;
use crate::stream::{Missing, Supply, subject};
use crate::trial::{self, Aim, TrialEnd};
use crate::tries;
use proto::chain;
use proto::clock::since;
use proto::ids::{Instance, StreamName};
use proto::layout::{ObjectName, PackName};
use proto::manifest::PackEntry;
use proto::replica::VerifyError;
use proto::replica::sqlite::Checkpoint;
use proto::retry::Verdict;
use proto::shelf::ShelfError;
use proto::wire::{StreamState, fault};
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Free bytes from which a disk counts as having room.
const ROOM: u64 = 1 << 20;
/// A stream that lacks room tries again within seconds: one that waits for a pack, and met no full disk for so long, does
/// not wait for room.
const ROOM_AGAIN: Duration = Duration::from_secs(60);
/// The first check of rows comes so long after a start: a store that has just come up has better to do.
const FIRST_CHECK: Duration = Duration::from_secs(600);
/// What the times of checks are kept under.
const CHECKED: &str = "rows read";

impl Relay {
    /// Spare-time work, in order of use.
    pub async fn spare_time(&self) {
        let lost = self.fetch_lost().await;
        if self.is_halted() {
            return;
        }
        let incomplete = self.incomplete();
        for stream in self.streams_but(&incomplete) {
            // What is lost is missed by nobody where another chain is complete, but may be in the way still.
            self.end_missing(|of, name| of == Wanted::ByNew && name.instance.stream == stream);
            if lost.iter().all(|i| i.stream != stream) {
                self.hall.mended(fault::LOCAL_FILES, &subject(Wanted::ByNew, &stream));
            }
        }
        for instance in incomplete {
            self.complete(&instance, Supply { sources: &self.sources, only: None }).await;
        }
        if !self.is_halted() {
            self.tidy().await;
        }
    }

    /// Packs that were proved, are still listed, and are gone from `ok/` (rot, a hand): they are fetched again, and
    /// their proof stands. Whose could not be.
    async fn fetch_lost(&self) -> Vec<Instance> {
        let (now, rules) = (self.hall.clock.now(), &self.hall.config.tries);
        let lost: Vec<(Instance, PackEntry)> = {
            let state = self.hall.state();
            let is_lost = |i: &Instance, p: &PackEntry| {
                let name = p.name(i);
                state.proofs.get(&name) == Some(&p.sha256)
                    && !state.ok.contains_key(&name)
                    && tries::usable(state.attempts.get(&name), &p.sha256, now, rules, &self.hall.judge)
            };
            let packs = state.instances().flat_map(|(i, e)| e.packs.iter().map(move |p| (i.clone(), p)));
            packs.filter(|(i, p)| is_lost(i, p)).map(|(i, p)| (i, p.clone())).collect()
        };
        let supply = Supply { sources: &self.sources, only: None };
        let mut still_lost = Vec::new();
        for (instance, pack) in lost {
            if self.is_halted() {
                break;
            }
            let packs = std::slice::from_ref(&pack);
            if self.paused(&instance, packs).is_some() {
                still_lost.push(instance);
                continue;
            }
            let (packs, missing) = self.gather(&instance, packs, supply).await;
            // Its hash was checked as it came; nothing else about it is open.
            let passed = self.pass(&instance, &packs).await;
            let by_new = Some((Wanted::ByNew, &instance));
            match (missing, passed) {
                (None, Ok(())) if self.hall.state().ok.contains_key(&pack.name(&instance)) => continue,
                // Lost again.
                (None, Ok(())) => {}
                (Some(missing), _) => drop(self.not_had(Wanted::ByNew, &instance, &missing, supply).await),
                (None, Err(e)) => self.trouble(by_new, e.verdict(), e.is_disk_full(), &e.to_string()),
            }
            still_lost.push(instance);
        }
        still_lost
    }

    /// Closes a gap in the chain in `ok/`: fetches what is missing, and proves it in a scratch database, which
    /// must end in the shadow's digests. The shadow itself is not touched but for the proofs.
    pub(crate) async fn complete(&self, instance: &Instance, supply: Supply<'_>) {
        let _alone = self.completing.lock().await;
        if !self.incomplete().contains(instance) {
            return;
        }
        // 1. The cheapest chain from nothing to what the shadow holds; what is at hand costs nothing.
        let (mut absent, mut all_spoke, by_new) = (BTreeSet::new(), true, Some((Wanted::ByNew, instance)));
        let (epoch, packs, digests) = loop {
            if self.is_halted() {
                return;
            }
            let Some((epoch, way, digests)) = self.chain_from_nothing(instance, supply, &absent) else {
                absent.iter().for_each(|name| self.note_absent(Wanted::ByNew, name, all_spoke));
                return;
            };
            if supply.only.is_none() && self.paused(instance, &way).is_some() {
                return;
            }
            // What could not be proved for want of room is not fetched: it would come again and again.
            let gathered = match self.may_fit(Wanted::ByNew, instance, &way) {
                Ok(()) => self.gather(instance, &way, supply).await,
                Err(why) => (Vec::new(), Some(Missing::NoRoom(why))),
            };
            match gathered {
                (packs, None) => break (epoch, packs, digests),
                (_, Some(missing)) => {
                    tracing::debug!(%instance, ?missing, "the chain stays incomplete for now");
                    let counted = self.not_had(Wanted::ByNew, instance, &missing, supply).await;
                    match (counted, missing) {
                        // Round what was given up.
                        (Some(true), _) => {}
                        // Round what no source has.
                        (None, Missing::Fetch(name, _, errors)) if errors.iter().any(|e| self.is_lacking(e)) => {
                            all_spoke &= self.all_spoke(&errors);
                            absent.insert(name);
                        }
                        _ => return,
                    }
                }
            }
        };
        // 2. Proved where nobody reads.
        let trial = self.trial(instance, epoch, Aim::Scratch { file: self.shadow.scratch(), digests }, &packs);
        // What a stick brought is proved now or never.
        let stop = if supply.only.is_some() { self.hall.stop.clone() } else { self.spare_token() };
        let before = self.room();
        let end = self.shadow.prove(trial, self.time_for(&packs), &stop).await;
        self.note_room(Wanted::ByNew, instance, &packs, &end, before);
        // 3. Served, or taken down as bad.
        match end {
            TrialEnd::Done => {
                self.rotted().retain(|name, _| packs.iter().all(|(_, e)| e.name(instance) != *name));
                let passed = match self.read_shadow() {
                    Ok(()) => self.pass(instance, &packs).await.map_err(RelayError::from),
                    Err(e) => Err(e.into()),
                };
                if let Err(e) = passed {
                    self.trouble(by_new, e.verdict(), e.is_disk_full(), &e.to_string());
                }
            }
            TrialEnd::Stopped => {}
            TrialEnd::Rotten { pack: Some(name), text } => {
                self.rots(Wanted::ByNew, &name, &text);
            }
            end => self.not_proved(instance, &packs, end),
        }
    }

    /// Once a day (`verify`) the rows of each stream are read against its digests: a bit that flipped in one of them is
    /// found before a delta meets it. News end it between two streams; what was not read is due at the next spare time.
    pub(crate) async fn check_rows(&self) {
        let (hall, every) = (&self.hall, self.hall.config.verify.0);
        if hall.clock.monotonic().saturating_sub(self.opened) < FIRST_CHECK.min(every) {
            return;
        }
        let (stop, now) = (self.spare_token(), hall.clock.now());
        let checked = match hall.spool.moments(CHECKED) {
            Ok(checked) => checked,
            Err(e) => return self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string()),
        };
        let due: Vec<StreamName> = {
            let state = hall.state();
            // A clock that was set back must not postpone for ever.
            let is_due =
                |s: &StreamName| checked.get(s.as_str()).is_none_or(|at| *at > now || since(now, *at) >= every);
            state.held.keys().filter(|s| !state.drifts.contains_key(*s) && is_due(s)).cloned().collect()
        };
        for stream in due {
            if stop.is_cancelled() || self.is_halted() {
                return;
            }
            let (shadow, asked) = (Arc::clone(&self.shadow), stream.clone());
            match tokio::task::spawn_blocking(move || shadow.verify(&asked)).await {
                Ok(Ok(tables)) => {
                    if let Some(text) = trial::drift_text(&stream, &tables) {
                        self.latch_drift(&stream, &text);
                    }
                }
                Ok(Err(VerifyError::Sqlite(e))) if e.verdict() == Verdict::Rebuild => {
                    self.begin_shadow_anew(&e.to_string()).await;
                    return;
                }
                Ok(Err(VerifyError::Sqlite(e))) => self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string()),
                Ok(Err(e @ VerifyError::Contract { .. })) => {
                    tracing::warn!("{e}");
                    hall.event("NOT_CHECKED", stream.as_str(), &e.to_string());
                }
                Err(e) => tracing::warn!(%stream, error = %e, "its rows were not read"),
            }
            if let Err(e) = hall.spool.keep_moment(CHECKED, stream.as_str(), hall.clock.now()) {
                return self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
            }
        }
    }

    /// The token that ends scratch proofs and checks of rows.
    fn spare_token(&self) -> CancellationToken {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        *spare = self.hall.stop.child_token();
        spare.clone()
    }

    /// There is something better to do.
    pub(crate) fn end_spare(&self) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    }

    /// The manifest's streams but those.
    fn streams_but(&self, some: &[Instance]) -> Vec<StreamName> {
        let all = self.hall.state().manifest.iter().flat_map(|m| m.streams.keys().cloned()).collect::<Vec<_>>();
        all.into_iter().filter(|s| some.iter().all(|i| &i.stream != s)).collect()
    }

    /// The packs that would be got next to close the gap in a chain, if of those not at hand there were these.
    pub(crate) fn would_complete(&self, instance: &Instance, there: &BTreeSet<PackName>) -> Vec<(PackName, PackEntry)> {
        let supply = Supply { sources: &[], only: Some(there) };
        let chain = self.chain_from_nothing(instance, supply, &BTreeSet::new());
        chain.map(|(_, packs, _)| self.not_at_hand(instance, packs)).unwrap_or_default()
    }

    /// The cheapest chain of packs that are at hand, or may be had.
    fn chain_from_nothing(
        &self,
        instance: &Instance,
        supply: Supply<'_>,
        without: &BTreeSet<PackName>,
    ) -> Option<(u64, Vec<PackEntry>, crate::trial::Digests)> {
        let now = self.hall.clock.now();
        let state = self.hall.state();
        let manifest = state.manifest.clone()?;
        let entry = manifest.streams.get(&instance.stream).filter(|e| e.audience == instance.audience)?;
        let version = state.held_version(instance)?;
        let digests = state.held.get(&instance.stream)?.digests.clone();
        let usable = |p: &PackEntry| {
            let name = p.name(instance);
            !without.contains(&name) && supply.is_usable(&name, p, state.attempts.get(&name), now, &self.hall)
        };
        let priced = self.priced(instance, entry, &state);
        let way = chain::cheapest(&priced, None, version, usable)?;
        let packs = way.iter().filter_map(|p| entry.pack(p.version, p.kind).cloned()).collect();
        Some((manifest.epoch, packs, digests))
    }

    /// The listed, the recent and the failed stay; the rest goes.
    pub(crate) async fn tidy(&self) {
        beats::forget_doubles(&self.hall);
        match self.try_tidy().await {
            Ok(()) => {
                let held = self.hall.disk.restore();
                self.room_again(held);
            }
            Err(RelayError::Shadow(e)) if e.verdict() == Verdict::Rebuild => {
                self.begin_shadow_anew(&e.to_string()).await;
            }
            Err(e) => self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string()),
        }
    }

    /// A full disk that has room again, for the ballast too, and everything in order on it, is mended. So is trouble that
    /// is in the way of no stream: all that it can be in was just put in order.
    fn room_again(&self, ballast: bool) {
        let (hall, now) = (&self.hall, self.hall.clock.monotonic());
        let none_lacks_room = {
            let state = hall.state();
            let is_long_ago = state.full_at.is_none_or(|at| now.saturating_sub(at) >= ROOM_AGAIN);
            let misses_a_pack = |i: &Instance| {
                state.faults.values().any(|f| f.code == fault::PACK_MISSING && f.instance.as_ref() == Some(i))
            };
            state.streams().iter().all(|(i, s)| match s.state {
                StreamState::Ok => true,
                StreamState::Error => is_long_ago,
                _ => is_long_ago && misses_a_pack(i),
            })
        };
        if ballast && none_lacks_room && hall.disk.space().is_some_and(|d| d.free > ROOM) {
            hall.mended(fault::DISK_FULL, "");
        }
        hall.mended(fault::LOCAL_FILES, "");
    }

    /// Packs in `ok/` that no manifest lists go before their time, when room is short, and parts that nobody wants.
    pub(crate) fn make_room(&self) {
        if self.hall.state().manifest.is_none() {
            return;
        }
        let listed = self.listed();
        let unlisted: Vec<PackName> = self.hall.state().ok.keys().filter(|n| !listed.contains(n)).cloned().collect();
        for name in unlisted {
            tracing::warn!(pack = %name, "removed from ok/: the disk is full and it is no longer listed");
            if let Err(e) = self.unserve(&name) {
                tracing::warn!(error = %e, "it stays");
            }
        }
        if let Err(e) = self.drop_parts() {
            tracing::warn!(error = %e, "parts of downloads stay");
        }
    }

    /// Parts of packs that are listed no more, or came another way, go: a process may run for months.
    fn drop_parts(&self) -> Result<(), ShelfError> {
        // Held to the end: no download begins meanwhile.
        let fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        let listed = self.listed();
        self.hall.shelves.drop_parts(|name| {
            let state = self.hall.state();
            let is_there = state.ok.contains_key(name) || state.ready.contains_key(name);
            fetching.get(name).is_some_and(|turn| Arc::strong_count(turn) > 1)
                || state.is_unread(&name.instance.stream)
                || listed.contains(name) && !is_there
        })
    }

    /// The packs that the manifest lists; of a stream whose entry cannot be read, those that are known here.
    pub(crate) fn listed(&self) -> BTreeSet<PackName> {
        let state = self.hall.state();
        let listed = state.instances().flat_map(|(i, e)| e.packs.iter().map(move |p| p.name(&i)));
        let known = state.ok.keys().chain(state.ready.keys()).chain(state.attempts.keys()).chain(state.proofs.keys());
        let is_unread = |n: &&PackName| state.is_unread(&n.instance.stream);
        listed.chain(known.filter(is_unread).cloned()).collect()
    }

    async fn try_tidy(&self) -> Result<(), RelayError> {
        let hall = &self.hall;
        let now = hall.clock.now();
        if hall.state().manifest.is_none() {
            return Ok(());
        }
        let listed = self.listed();
        // 1. Packs in ok/ that have not been listed for the time of grace.
        let unlisted: Vec<ObjectName> =
            hall.state().ok.keys().filter(|n| !listed.contains(n)).map(|n| n.clone().into()).collect();
        for (object, seen) in hall.spool.unlisted(&unlisted, now)? {
            if let ObjectName::Pack(name) = object
                && since(now, seen) >= hall.config.grace.0
            {
                tracing::info!(pack = %name, "removed from ok/: no longer listed");
                self.unserve(&name)?;
            }
        }
        // 2. What was to be tried and is not wanted any more; failures that nobody asks about. Beside an import or `once`:
        // what is being proved for new registers lies there, and what was just proved, on its way to ok/.
        let proving = self.completing.try_lock();
        // What lies there first: a pack comes only after the list that names it, which may be a newer one than above.
        let ready: Vec<PackName> = hall.state().ready.keys().cloned().collect();
        let (listed, incomplete) = (self.listed(), self.incomplete());
        let stale: Vec<PackName> = {
            let state = hall.state();
            let is_full = state.faults.values().any(|f| f.code == fault::DISK_FULL);
            // Another way was taken past them: whoever needs them will find them listed, not here. New registers need them
            // until another chain is complete; on a full disk they give way.
            let passed = |n: &PackName| {
                state.held_version(&n.instance).is_some_and(|h| n.version <= h)
                    && !state.drifts.contains_key(&n.instance.stream)
                    && state.proofs.get(n) != state.ready.get(n)
                    && (is_full || !incomplete.contains(&n.instance))
            };
            let is_stale = |n: &PackName| proving.is_ok() && (!listed.contains(n) || passed(n));
            ready.into_iter().filter(is_stale).collect()
        };
        for name in stale {
            hall.shelves.drop_pack(Room::Ready, &name)?;
            hall.state().ready.remove(&name);
        }
        drop(proving);
        let old = |a: &tries::Attempts| since(now, a.last) >= hall.config.error_grace.0;
        let forgotten: Vec<PackName> = {
            let state = hall.state();
            state.attempts.iter().filter(|(n, a)| !listed.contains(n) && old(a)).map(|(n, _)| n.clone()).collect()
        };
        for name in forgotten {
            self.forgive(&name)?;
        }
        // 3. Proofs of packs that are neither listed nor there.
        let wanted = || {
            let (streams, listed) = (self.streams(), self.listed());
            let state = hall.state();
            let there: BTreeSet<PackName> = state.ok.keys().chain(state.ready.keys()).cloned().collect();
            (streams, move |n: &PackName| listed.contains(n) || there.contains(n))
        };
        let (_, keep) = wanted();
        let proofs_to_go = hall.state().proofs.keys().any(|n| !keep(n));
        if proofs_to_go {
            self.shadow.forget_unwanted(wanted).await.map_err(crate::shadow::ShadowError::from)?;
            self.read_shadow()?;
        }
        // 4. WALs brought home and cut.
        self.shadow.truncate_wal().map_err(crate::shadow::ShadowError::from)?;
        hall.spool.checkpoint(Checkpoint::Truncate)?;
        // 5. Last, for nothing else waits for it.
        self.drop_parts()?;
        Ok(())
    }
}

//! Steps 3 and 4: the packs of a way are tried on the shadow; what it proved is served, what failed is judged.
//!
//! Owns which pack a failure is held against, and its count. Must never serve what the shadow has no proof of, whatever
//! the child said before it died. If the power goes between proof and `ok/`, the next start makes the directories
//! agree with the proofs.

use super::{AtHand, Outcome, SOON, Way, is_at_hand, off_thread, subject};
use crate::relay::{Pace, Relay, Wanted};
use crate::shelves::Room;
use crate::trial::{Aim, Trial, TrialEnd};
use crate::tries::{self, Cause, Failure};
use proto::digest::Sha256;
use proto::disk::{Beside, Shortages};
use proto::ids::{Instance, StreamName};
use proto::layout::PackName;
use proto::manifest::PackEntry;
use proto::replica::{is_in_the_way, sqlite};
use proto::retry::Verdict;
use proto::shelf::ShelfError;
use proto::wire::fault;
use std::time::Duration;

/// What any trial may take, and the unpacked bytes a second of the slowest machine beyond that.
const LEAST_TIME: Duration = Duration::from_secs(30);
const SLOWEST: u64 = 256 << 10;
/// The bytes of the shadow that the slowest disk reads in a second: a pack may want a table read through.
const SLOWEST_READ: u64 = 1 << 20;

impl Relay {
    /// Step 3.
    pub(super) async fn try_on_shadow(&self, way: &Way, packs: &[AtHand]) -> TrialEnd {
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
    pub(super) async fn settle(
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
    pub(super) fn after_a_try(
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
    pub(super) fn count(&self, name: &PackName, sha256: Sha256, failure: Failure) -> bool {
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

//! Heartbeats: verified, recorded, and held in memory for the alerts and pages of `serve`.
//!
//! Owns the way of a post, from its body to its answer. Must never believe an unsigned word but the age of a beat that a
//! relay passes on. The ledger is written before the answer is given: if the power goes, an answered beat is there.

mod hearing;
mod proof;
mod views;
mod voices;

pub use views::glance;

use crate::config::AlertsConfig;
use crate::fleet::Published;
use crate::ledger::{BeatOutcome, BeatRow, Ledger, LedgerError};
use hearing::{Hearing, Unanswered};
use proof::{Keyring, Opened};
use proto::clock::{Clock, Timestamp, before, since};
use proto::dsse;
use proto::failpoint;
use proto::ids::DeviceId;
use proto::limits::Limits;
use proto::wire::{BeatAnswer, Beats, Heartbeat};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use voices::{Heard, Voices};

/// Beats taken in one request: a store's relay and its registers, many times over.
pub const BEATS: usize = 4096;

/// A relay's word on how long ago it heard a device counts up to this: beyond it, it is nonsense.
const OLDEST: Duration = Duration::from_secs(400 * 86_400);

/// What is known of the fleet's voices.
pub struct Intake {
    ledger: Ledger,
    clock: Arc<dyn Clock>,
    limits: Limits,
    /// A silence as long as this makes a relay's next beat a return.
    store_silent: Duration,
    /// A register that was silent for so long was away.
    register_silent: Duration,
    state: Mutex<State>,
    keyring: Mutex<Keyring>,
    /// Beats to be recorded.
    waiting: Mutex<Vec<Waiting>>,
    /// Held by whoever writes them.
    writing: tokio::sync::Mutex<()>,
}

/// Beats to be recorded, of one request.
struct Waiting {
    rows: Vec<BeatRow>,
    /// What each says, and how long ago it was heard.
    said: Vec<(Heartbeat, Duration)>,
    /// Monotonic time of the request.
    at: Duration,
    /// For what becomes of them; none: they could not be written.
    tell: oneshot::Sender<Option<Vec<BeatOutcome>>>,
}

#[derive(Default)]
struct State {
    heard: Voices,
    published: Arc<Published>,
    /// When the ledger was last read for beats that other processes took.
    read_at: Option<Timestamp>,
    /// Monotonic time of the start, or when headquarters heard again after it was deaf.
    started: Duration,
    hearing: Hearing,
}

/// What became of some beats.
#[derive(Debug)]
pub struct Taken {
    /// The answer.
    pub answer: BeatAnswer,
    /// Whether one was new, and signed by its device: the sender is one, or carries for one.
    pub proved: bool,
}

impl Intake {
    /// Begins with what the ledger holds; silence is judged from now on.
    pub async fn open(
        ledger: Ledger,
        clock: Arc<dyn Clock>,
        limits: Limits,
        alerts: &AlertsConfig,
    ) -> Result<Intake, LedgerError> {
        let state = State { started: clock.monotonic(), ..State::default() };
        let keyring = Mutex::new(Keyring { at: ledger.enrolments().await?, of: BTreeMap::new() });
        let (waiting, writing) = (Mutex::default(), tokio::sync::Mutex::default());
        let (store_silent, register_silent) = (alerts.store_silent.0, alerts.register_silent.0);
        let state = Mutex::new(state);
        let intake = Intake { ledger, clock, limits, store_silent, register_silent, state, keyring, waiting, writing };
        intake.read_ledger().await?;
        Ok(intake)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic while it was held left numbers behind, nothing half-moved.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a device may be silent.
    fn away(&self, id: &DeviceId) -> Duration {
        match id {
            DeviceId::Relay(_) => self.store_silent,
            DeviceId::Register(_) => self.register_silent,
        }
    }

    /// Takes over the beats that other `serve` processes recorded.
    pub async fn read_ledger(&self) -> Result<(), LedgerError> {
        let now = self.clock.now();
        let from = self.state().read_at.map(|t| before(t.min(now), OVERLAP));
        let rows = self.ledger.beats(from).await?;
        let at = self.clock.monotonic();
        let mut state = self.state();
        let is_start = state.read_at.is_none();
        for row in rows {
            // A lower number is news where it came later: the device was enrolled anew.
            let is_known = |h: &Heard| {
                h.beat.seq == row.seq || h.beat.seq > row.seq && since(now, row.received_at) >= at.saturating_sub(h.at)
            };
            if state.heard.get(&row.device).is_some_and(is_known) {
                continue;
            }
            let Ok(beat) = dsse::peek::<Heartbeat>(row.envelope.as_bytes(), self.limits.heartbeat_bytes) else {
                continue;
            };
            let age = since(now, row.last_seen_at);
            self.hear(&mut state, beat, at, age);
            // By another process: of what comes in here it says nothing where that is known.
            if !is_start && matches!(state.hearing, Hearing::Unknown) {
                state.hearing = Hearing::Kept;
            }
        }
        state.read_at = Some(now);
        Ok(())
    }

    /// Verifies and records beats; the answer for whoever sent them.
    pub async fn take(&self, beats: Beats) -> Result<Taken, LedgerError> {
        let (now, at) = (self.clock.now(), self.clock.monotonic());
        let mut post = Unanswered { intake: self, at, is_over: false };
        let mut tries = 0;
        let (numbers, outcomes, mut refused) = loop {
            let opened = self.open_beats(&beats, now, tries).await.inspect_err(|_| self.note_deaf(at))?;
            let Opened { rows, said, refused } = opened;
            let numbers: Vec<(DeviceId, u64)> = rows.iter().map(|r| (r.device.clone(), r.seq)).collect();
            let outcomes = if rows.is_empty() { Vec::new() } else { self.record(rows, said, at).await? };
            if !outcomes.contains(&BeatOutcome::Outdated) {
                break (numbers, outcomes, refused);
            }
            tries += 1;
        };
        post.is_over = true;
        let mut go_on_above = BTreeMap::new();
        for ((device, seq), outcome) in numbers.into_iter().zip(&outcomes) {
            if let BeatOutcome::Older(last) = outcome {
                let what =
                    if seq == *last { "was another heartbeat's".into() } else { format!("is older than {last}") };
                let why = format!("number {seq} {what}: a copy, or a device set back to an old state");
                refused.insert(device.to_string(), why);
                go_on_above.insert(device.to_string(), *last);
            }
        }
        let proved = outcomes.contains(&BeatOutcome::Recorded);
        let passed_on = BTreeMap::new();
        Ok(Taken { answer: BeatAnswer { hq_seen_s: Some(0), now, refused, passed_on, go_on_above }, proved })
    }

    /// Records beats and notes what they say. Those that come while others are written are written together, in their
    /// order: a sync for all of them. Where one cannot be kept, whoever sent it is told so, and nobody else.
    async fn record(
        &self,
        rows: Vec<BeatRow>,
        said: Vec<(Heartbeat, Duration)>,
        at: Duration,
    ) -> Result<Vec<BeatOutcome>, LedgerError> {
        let not_written = || LedgerError::Conflict("the heartbeats were not written".into());
        let (tell, mut told) = oneshot::channel();
        self.waiting().push(Waiting { rows, said, at, tell });
        let _turn = self.writing.lock().await;
        if let Ok(outcomes) = told.try_recv() {
            return outcomes.ok_or_else(not_written);
        }
        let mut together = std::mem::take(&mut *self.waiting());
        let all: Vec<BeatRow> = together.iter_mut().flat_map(|w| std::mem::take(&mut w.rows)).collect();
        let write = async |rows: &[BeatRow]| failpoint::around("intake.record", self.ledger.record_beats(rows)).await;
        let written = write(&all).await;
        match &written {
            Ok(outcomes) if outcomes.iter().any(|o| *o != BeatOutcome::Outdated) => self.note_hearing(),
            // Its rows went with a post before it, whose sender hung up; or nothing was to be kept.
            Ok(_) => {}
            Err(e) if e.is_of_values() => {}
            Err(_) => self.note_deaf(at),
        }
        let (mut from, is_one) = (0, together.len() == 1);
        for Waiting { said, at, tell, .. } in together {
            let its = from..from + said.len();
            from = its.end;
            let outcomes = match &written {
                Ok(outcomes) => Some(outcomes[its].to_vec()),
                Err(e) if e.is_of_values() && !is_one => {
                    let of = all[its.start].device.store();
                    let alone = write(&all[its]).await;
                    if alone.is_ok() {
                        self.note_hearing();
                    }
                    alone.inspect_err(|e| tracing::warn!(store = %of, "heartbeats that cannot be kept: {e}")).ok()
                }
                Err(_) => None,
            };
            self.note(said.into_iter().zip(outcomes.iter().flatten()), at);
            let _ = tell.send(outcomes);
        }
        // Its own are among them.
        match told.try_recv().ok().flatten() {
            Some(outcomes) => Ok(outcomes),
            None => Err(written.err().unwrap_or_else(not_written)),
        }
    }

    /// Takes in what recorded beats say.
    fn note<'o>(&self, said: impl Iterator<Item = ((Heartbeat, Duration), &'o BeatOutcome)>, at: Duration) {
        let mut state = self.state();
        for ((beat, age), outcome) in said {
            match outcome {
                BeatOutcome::Recorded => {
                    self.hear(&mut state, beat, at, age);
                }
                BeatOutcome::Known | BeatOutcome::Older(_) => {
                    if let Some(heard) = state.heard.get_mut(&beat.device) {
                        heard.note_run(&beat, at);
                    }
                }
                BeatOutcome::Outdated => {}
            }
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes of whose heartbeats, by number, there is nothing to tell.
    pub fn note_calm<'a>(&self, calm: impl Iterator<Item = (&'a DeviceId, u64)>) {
        let mut state = self.state();
        for (id, seq) in calm {
            // Another one may have come meanwhile.
            if let Some(heard) = state.heard.get_mut(id).filter(|h| h.beat.seq == seq) {
                heard.is_calm = true;
            }
        }
    }
}

/// Beats that others took are read again for so long: so far apart the clocks of several `serve` may be.
const OVERLAP: Duration = Duration::from_secs(30);

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod years;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

//! Heartbeats: verified, recorded, and held in memory for the alerts and pages of `serve`.
//!
//! Owns how long each device has been silent, by durations that do not follow the wall clock. Must
//! never believe an unsigned word but the age of a beat that a relay passes on. The ledger is written
//! before the answer is given: if the power goes, an answered beat is there.

use crate::config::AlertsConfig;
use crate::fleet::{self, DeviceView, Published, in_lines};
use crate::ledger::{
    BeatOutcome, BeatRow, Complaint, DeviceRow, Enrolments, Ledger, LedgerError, Serials, StoreDevices,
};
use proto::clock::{Clock, Timestamp, before, since};
use proto::dsse;
use proto::failpoint;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::limits::Limits;
use proto::runs::{DOUBLE_TOLD, Runs};
use proto::wire::{self, Beat, BeatAnswer, Beats, Fault, Heartbeat, StreamReport, StreamState, fault};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Beats taken in one request: a store's relay and its registers, many times over.
pub const BEATS: usize = 4096;

/// A relay's word on how long ago it heard a device counts up to this: beyond it, it is nonsense.
const OLDEST: Duration = Duration::from_secs(400 * 86_400);

/// Headquarters that could hear nobody for so long does not take that for their silence: relays wait for up to a minute
/// before they post again.
const DEAF: Duration = Duration::from_secs(60);

/// A post that was taken for so long when its sender hung up was in vain: strangers who hang up at once make nobody deaf.
const HANGS: Duration = Duration::from_secs(10);

/// A line that comes and goes: what is not heard of a register between two outages counts on. After longer ones it has time
/// anew, as in the morning.
const FLAP: Duration = Duration::from_secs(3600);

/// Who was silent for so long, and longer than usual, may have been switched off: in that time it could get nothing.
const OFF: Duration = Duration::from_secs(300);

/// So often a post is proved anew where devices were enrolled or revoked meanwhile.
const TRIES: usize = 3;

/// Faults kept of one beat beyond the next.
const COMPLAINTS: usize = 40;

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

/// The devices of stores that were heard: to read them, and their keys, takes as long as to prove what they say. Whether they
/// are these still, the ledger looks when that is written.
struct Keyring {
    /// The ledger's number at which all were these.
    at: Enrolments,
    of: BTreeMap<StoreId, Arc<[DeviceRow]>>,
}

/// What the beats of one request are proved by.
#[derive(Default)]
struct Proof {
    /// Read for it; none: the store has no devices.
    read: BTreeMap<StoreId, Option<StoreDevices>>,
    /// The ledger's number at which all devices that proved one had these keys.
    at: Option<Enrolments>,
}

impl Proof {
    fn note(&mut self, at: Enrolments) {
        self.at = Some(self.at.map_or(at, |before| before.min(at)));
    }
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

/// What becomes of posts.
#[derive(Default, Clone, Copy)]
enum Hearing {
    /// Nobody posted since the start, or since the last ones that did in vain.
    #[default]
    Unknown,
    /// The last one was kept.
    Kept,
    /// Monotonic times of the first and the last one that could not be kept, since one was.
    InVain(Duration, Duration),
}

/// A post that is being taken. Relays hang up after half a minute: one that a ledger keeps waiting for as long as that ends by
/// being dropped, not by an error.
struct Unanswered<'a> {
    intake: &'a Intake,
    at: Duration,
    is_over: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.is_over && self.intake.clock.monotonic().saturating_sub(self.at) >= HANGS {
            self.intake.note_deaf(self.at);
        }
    }
}

impl State {
    /// Watches anew from here on, where nobody could be heard for long before.
    fn watch_anew(&mut self, from: Duration, deaf_for: Duration) {
        if deaf_for >= DEAF {
            self.started = self.started.max(from);
        }
    }
}

/// Who was heard, by store: it is found once for all its devices.
#[derive(Default)]
struct Voices(BTreeMap<StoreId, OfStore>);

/// Who was heard of one store.
#[derive(Default)]
struct OfStore {
    devices: BTreeMap<DeviceId, Heard>,
    /// The oldest list that one of them holds, where none waited for anything when they were looked at; none: one did, or
    /// one was heard since.
    settled: Option<u64>,
}

impl Voices {
    fn get(&self, id: &DeviceId) -> Option<&Heard> {
        self.0.get(id.store())?.devices.get(id)
    }
    fn get_mut(&mut self, id: &DeviceId) -> Option<&mut Heard> {
        self.0.get_mut(id.store())?.devices.get_mut(id)
    }
}

struct Heard {
    /// Monotonic time of the last word.
    at: Duration,
    /// How old that word was then.
    age: Duration,
    /// From the word before to that one.
    gap: Duration,
    /// Monotonic time since when it is heard again; none while it was never away.
    back: Option<Duration>,
    /// How long its relay was heard since its last word, up to the last time that the relay was back.
    watched: Duration,
    /// Monotonic time since when it holds an older list than it could have, and came no nearer.
    stuck: Option<Duration>,
    /// The streams that do not come to what its list says, though it could: since when, by monotonic time, without a newer
    /// version.
    late: BTreeMap<Instance, Duration>,
    seq: u64,
    /// The list that it holds, by its heartbeat; 0: none.
    serial: u64,
    beat: Arc<Heartbeat>,
    runs: Runs,
    /// Whether there is nothing to tell of its heartbeat, now or later.
    is_calm: bool,
    /// Monotonic time at which a second machine with its key was last noticed.
    double: Option<Duration>,
}

/// What became of some beats.
#[derive(Debug)]
pub struct Taken {
    /// The answer.
    pub answer: BeatAnswer,
    /// Whether one was new, and signed by its device: the sender is one, or carries for one.
    pub proved: bool,
}

/// The beats of one request, looked at.
#[derive(Default)]
struct Opened {
    rows: Vec<BeatRow>,
    /// What each of them says, and how long ago it was heard.
    said: Vec<(Heartbeat, Duration)>,
    refused: BTreeMap<String, String>,
}

/// Faults that a device tells at least once, though they are mended by then.
fn is_told_once(f: &Fault) -> bool {
    [fault::DRIFT, fault::PACK_IN_ERROR, fault::PACK_MISSING].contains(&f.code.as_str())
}

/// A device's clock may run ahead or behind: how long ago a fault began counts, from when the device was heard.
fn complaints(beat: &Heartbeat, heard: Timestamp) -> Vec<Fault> {
    let of = beat.errors.iter().filter(|f| is_told_once(f)).take(COMPLAINTS);
    of.map(|f| Fault { since: before(heard, since(beat.sent_at, f.since)), ..in_lines(f) }).collect()
}

/// The streams of a beat that are not at what its list says, since when: `at`, or since the last beat where none of it came
/// meanwhile. A POS application may hold up what is held, and what is mailed as such is told already.
fn late(beat: &Heartbeat, last: Option<&Heard>, at: Duration) -> BTreeMap<Instance, Duration> {
    let is_told = |i: &Instance| {
        // A pack is of one stream: where none is named, only a later build knows it.
        let of = |f: &Fault| f.instance.as_ref().map_or(!fleet::is_of_pack(&f.code), |of| of == i);
        beat.errors.iter().any(|f| fleet::is_mailed_as_such(&f.code) && of(f))
    };
    let waits = |r: &StreamReport| match r.state {
        StreamState::Behind => true,
        StreamState::Waiting => r.version.is_none(),
        StreamState::Ok | StreamState::Error | StreamState::Drift | StreamState::Unknown => false,
    };
    let since = |(i, r): (&Instance, &StreamReport)| {
        let came = last.is_none_or(|l| l.beat.streams.get(i).is_none_or(|before| before.version < r.version));
        let before = last.and_then(|l| l.late.get(i)).filter(|_| !came);
        (i.clone(), before.copied().unwrap_or(at))
    };
    beat.streams.iter().filter(|(i, r)| waits(r) && !is_told(i)).map(since).collect()
}

impl Heard {
    /// Notes whose run a beat is of, also one whose number is too low: a copy of the machine counts from where it was
    /// copied.
    fn note_run(&mut self, beat: &Heartbeat, at: Duration) {
        if self.runs.hear(beat) {
            self.double = Some(at);
            tracing::warn!(device = %beat.device, "two machines report as it");
        }
    }

    /// Whether nothing was heard since the word that ended its silence.
    fn is_just_back(&self) -> bool {
        self.back == Some(self.at)
    }

    /// Monotonic time at which it said what was heard last.
    fn last_word(&self) -> Duration {
        self.at.saturating_sub(self.age)
    }

    fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.at) + self.age
    }

    /// Whether it may be, or have been, switched off. Some report each ten minutes.
    fn is_off(&self, silence: Duration) -> bool {
        silence >= OFF.max(self.gap * 2)
    }

    /// How long since then it got nothing.
    fn without_since(&self, since: Duration, now: Duration) -> Duration {
        let silence = self.silent_for(now);
        now.saturating_sub(since).saturating_sub(if self.is_off(silence) { silence } else { Duration::ZERO })
    }

    /// Heard again, as it was `age` ago. While it was off it could get nothing: that is none of the time in which it did not.
    fn hear_again(&mut self, at: Duration, age: Duration) {
        let silence = self.silent_for(at);
        let (gap, heard) = (silence.saturating_sub(age), at.saturating_sub(age));
        if self.is_off(silence) {
            for since in self.stuck.iter_mut().chain(self.late.values_mut()) {
                *since = (*since + gap).min(heard).max(*since);
            }
        }
        // Its relay tells of the same word, too, in whole seconds.
        if gap > Duration::from_secs(1) {
            self.gap = gap;
        }
        (self.at, self.age) = (at, age);
    }
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
                h.seq == row.seq || h.seq > row.seq && since(now, row.received_at) >= at.saturating_sub(h.at)
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

    /// Notes a beat that was heard `age` ago.
    fn hear(&self, state: &mut State, mut beat: Heartbeat, at: Duration, age: Duration) {
        let (id, seq) = (beat.device.clone(), beat.seq);
        let OfStore { devices: of_store, settled } = state.heard.0.entry(id.store().clone()).or_default();
        *settled = None;
        let mut last = of_store.remove(&id);
        let was_away = match &last {
            Some(h) => h.silent_for(at) >= self.store_silent,
            // Enrolled anew, with registers that were heard before.
            None => matches!(id, DeviceId::Relay(_)) && !of_store.is_empty(),
        };
        let returns = was_away && age < self.store_silent;
        let back = if returns { Some(at) } else { last.as_ref().and_then(|h| h.back) };
        // From when to when its registers were watched before, and whether that counts on.
        let before = last.as_ref().filter(|_| returns && matches!(id, DeviceId::Relay(_)));
        let before =
            before.map(|h| (h.back.unwrap_or_default().max(state.started), h.last_word(), h.silent_for(at) < FLAP));
        if let Some(h) = &mut last {
            h.hear_again(at, age);
        }
        let serial = beat.serial.unwrap_or(0);
        let stuck = last.as_ref().filter(|h| h.serial >= serial).and_then(|h| h.stuck);
        let late = late(&beat, last.as_ref(), at);
        // A tree of one stream takes as much room as one of eleven.
        let mut said_before = last.iter().chain(of_store.values()).map(|h| &h.beat.streams);
        if let Some(same) = said_before.find(|said| **said == beat.streams) {
            beat.streams = Arc::clone(same);
        }
        let (gap, runs, double) = last.map(|h| (h.gap, h.runs, h.double)).unwrap_or_default();
        // A relay says of each register how long ago it heard it, between that register's beats.
        for (register, ago) in &beat.registers {
            if let Some(h) = of_store.get_mut(&DeviceId::Register(register.clone())) {
                let told = age + Duration::from_secs(*ago).min(OLDEST);
                if told < h.silent_for(at) {
                    h.hear_again(at, told);
                }
            }
        }
        if let Some((from, until, is_flap)) = before {
            for register in of_store.values_mut() {
                let word = register.last_word();
                let earlier = if word < from { register.watched } else { Duration::ZERO };
                let watched = earlier + until.saturating_sub(from.max(word));
                register.watched = if is_flap { watched } else { Duration::ZERO };
            }
        }
        let (is_calm, watched) = (false, Duration::ZERO);
        let beat = Arc::new(beat);
        let mut heard =
            Heard { at, age, gap, back, watched, stuck, late, seq, serial, beat: Arc::clone(&beat), runs, is_calm, double };
        heard.note_run(&beat, at);
        of_store.insert(id, heard);
    }

    /// Notes who holds an older list than it could have: a relay, than its store's with this serial; a register, than its
    /// relay, whose silence its time waits for. Nor is a register late in what its relay has not got itself, whyever.
    pub fn expect(&self, serials: &BTreeMap<StoreId, Serials>) {
        let (now, mut serials) = (self.clock.monotonic(), serials.iter().peekable());
        for (store, OfStore { devices, settled }) in &mut self.state().heard.0 {
            // Both are in the order of the stores, and met in one walk: posts wait meanwhile.
            while serials.next_if(|(s, _)| *s < store).is_some() {}
            let signed = serials.next_if(|(s, _)| *s == store);
            // One that is signed and not in the bucket yet says nothing of who had the one before: with a publish every few
            // minutes it would end what counts for a quarter of an hour.
            let Some(wanted) = signed.map(|(_, s)| s.wake).filter(|w| *w > 0) else { continue };
            if settled.is_some_and(|oldest| oldest >= wanted) {
                continue;
            }
            let relay = devices.iter().find(|(id, _)| matches!(id, DeviceId::Relay(_))).map(|(_, r)| r);
            let at_hand = relay.filter(|r| r.silent_for(now) < self.store_silent).map(|r| r.serial.min(wanted));
            let is_late = devices.values().any(|h| !h.late.is_empty());
            let of_relay = relay.filter(|_| is_late).into_iter().flat_map(|r| r.beat.streams.iter());
            let lacks: BTreeSet<Instance> = of_relay
                .filter(|(_, r)| !matches!(r.state, StreamState::Ok | StreamState::Unknown))
                .map(|(i, _)| i.clone())
                .collect();
            for (id, h) in devices.iter_mut() {
                let (could_have, counts) = match id {
                    DeviceId::Relay(_) => (wanted, true),
                    DeviceId::Register(_) => (at_hand.unwrap_or(wanted), at_hand.is_some()),
                };
                let since = h.stuck.filter(|_| counts).unwrap_or(now);
                h.stuck = (h.serial < could_have).then_some(since);
                let is_register = matches!(id, DeviceId::Register(_));
                let waits = |i: &Instance| !counts || is_register && lacks.contains(i);
                h.late.iter_mut().filter(|(i, _)| waits(i)).for_each(|(_, since)| *since = now);
            }
            let oldest = devices.values().map(|h| h.serial).min();
            *settled = oldest.filter(|oldest| *oldest >= wanted && !is_late);
        }
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

    /// Proves beats: the rows to record, what they say, and whose are refused. After so many tries, because devices were
    /// enrolled or revoked while they waited to be written: at last they are, as they were proved.
    async fn open_beats(&self, beats: &Beats, now: Timestamp, tries: usize) -> Result<Opened, LedgerError> {
        if tries > 0 {
            self.forget_changed().await?;
        }
        let (mut opened, mut proof) = (Opened::default(), Proof::default());
        for (n, beat) in beats.beats.iter().enumerate() {
            match self.open_beat(beat, &mut proof).await? {
                Ok((heartbeat, envelope)) => {
                    let age = Duration::from_secs(beat.seen_s).min(OLDEST);
                    let heard = before(now, age);
                    opened.rows.push(BeatRow {
                        device: heartbeat.device.clone(),
                        seq: heartbeat.seq,
                        envelope,
                        received_at: now,
                        last_seen_at: heard,
                        serial: heartbeat.serial,
                        complaints: complaints(&heartbeat, heard),
                        versions: self.not_known(&heartbeat),
                        proved_at: None,
                    });
                    opened.said.push((heartbeat, age));
                }
                Err((who, why)) => {
                    opened.refused.insert(who.unwrap_or_else(|| wire::nameless(n)), why);
                }
            }
        }
        let proved_at = proof.at.filter(|_| tries < TRIES);
        opened.rows.iter_mut().for_each(|row| row.proved_at = proved_at);
        Ok(opened)
    }

    /// The versions that a beat reports, but for those that are known to be published.
    fn not_known(&self, beat: &Heartbeat) -> Vec<(Instance, Version)> {
        let published = Arc::clone(&self.state().published);
        let is_known =
            |i: &Instance, v: &Version| published.get(i).and_then(|of| of.get(v)).is_some_and(Option::is_some);
        let held = beat.streams.iter().filter_map(|(i, report)| Some((i.clone(), report.version?)));
        held.filter(|(i, v)| !is_known(i, v)).collect()
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

    /// Beats came at this time, and the ledger could not be used.
    fn note_deaf(&self, at: Duration) {
        let (now, mut state) = (self.clock.monotonic(), self.state());
        let first = if let Hearing::InVain(first, _) = state.hearing { first } else { at };
        state.hearing = Hearing::InVain(first, now);
    }

    /// Beats were kept.
    fn note_hearing(&self) {
        let (now, mut state) = (self.clock.monotonic(), self.state());
        if let Hearing::InVain(first, _) = std::mem::replace(&mut state.hearing, Hearing::Kept) {
            state.watch_anew(now, now.saturating_sub(first));
        }
    }

    /// A look at the fleet begins, which can use the ledger, after nobody could look for `blind`: without its ledger, or
    /// while it stood still, headquarters heard nobody, and that is no silence of theirs. For how long posts have come in vain;
    /// none: nobody posted since the start, or since the last ones that did, or one alone did.
    pub fn watch_on(&self, blind: Duration) -> Option<Duration> {
        let (now, mut state) = (self.clock.monotonic(), self.state());
        state.watch_anew(now, blind);
        let (first, last) = match state.hearing {
            Hearing::Unknown => return None,
            Hearing::Kept => return Some(Duration::ZERO),
            Hearing::InVain(first, last) => (first, last),
        };
        state.watch_anew(last, now.saturating_sub(first));
        // Where nobody posts any more, that is their silence again.
        if now.saturating_sub(last) >= self.store_silent.max(2 * DEAF) {
            state.hearing = Hearing::Unknown;
            return None;
        }
        Some(last.saturating_sub(first)).filter(|deaf_for| !deaf_for.is_zero())
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

    /// A beat that is signed by its device's key, with the envelope to keep; or whose it claims to be
    /// and why it is refused.
    #[allow(clippy::type_complexity, reason = "said once, used once")]
    async fn open_beat(
        &self,
        beat: &Beat,
        proof: &mut Proof,
    ) -> Result<Result<(Heartbeat, String), (Option<String>, String)>, LedgerError> {
        let claimed = beat.text(&self.limits).and_then(|envelope| Ok((envelope, beat.claimed_device()?)));
        let (envelope, id) = match claimed {
            Ok(claimed) => claimed,
            Err(e) => return Ok(Err((None, e.to_string()))),
        };
        let open = |of: &[DeviceRow]| match of.iter().find(|d| d.id == id) {
            None => Err(format!("{id} is not enrolled")),
            Some(d) if d.revoked_at.is_some() => Err(format!("{id} was revoked")),
            Some(d) => beat.open(&id, &d.key).map_err(|e| e.to_string()),
        };
        let store = id.store();
        if !proof.read.contains_key(store) {
            let remembered = {
                let keyring = self.keyring();
                keyring.of.get(store).map(|of| (Arc::clone(of), keyring.at))
            };
            if let Some((of_store, at)) = remembered
                && let Ok(heartbeat) = open(&of_store)
            {
                proof.note(at);
                return Ok(Ok((heartbeat, envelope)));
            }
            // Nobody is refused by what is only remembered.
            let of_store = self.ledger.store_devices(store).await?;
            if let Some(StoreDevices { devices, at }) = &of_store {
                proof.note(*at);
                let mut keyring = self.keyring();
                if keyring.at <= *at {
                    keyring.of.insert(store.clone(), Arc::clone(devices));
                }
            }
            proof.read.insert(store.clone(), of_store);
        }
        let opened = open(proof.read.get(store).and_then(Option::as_ref).map_or(&[], |of| &of.devices));
        Ok(opened.map_err(|why| (Some(id.to_string()), why)).map(|heartbeat| (heartbeat, envelope)))
    }

    /// Forgets the devices of stores of which one was enrolled or revoked.
    async fn forget_changed(&self) -> Result<(), LedgerError> {
        let from = self.keyring().at;
        // Those that change after this number are forgotten once more.
        let now = self.ledger.enrolments().await?;
        let changed = self.ledger.enrolled_after(from).await?;
        let mut keyring = self.keyring();
        if now < from {
            // Another ledger has its place: a backup.
            *keyring = Keyring { at: now, of: BTreeMap::new() };
            return Ok(());
        }
        for store in &changed {
            keyring.of.remove(store);
        }
        keyring.at = keyring.at.max(now);
        Ok(())
    }

    fn keyring(&self) -> std::sync::MutexGuard<'_, Keyring> {
        self.keyring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every enrolled device as it is seen now.
    pub fn views<'a>(&self, devices: &'a [DeviceId]) -> Vec<DeviceView<'a>> {
        self.views_with(devices, |_, _, _| true, |_| true)
    }

    /// The same, without devices and heartbeats of which there is nothing to tell: most are heard, say what they said, and
    /// have no complaint.
    pub fn news<'a>(&self, devices: &'a [DeviceId], complaints: &[Complaint]) -> Vec<DeviceView<'a>> {
        let complain: BTreeSet<&DeviceId> = complaints.iter().map(|c| &c.device).collect();
        let says_something = |h: &Heard| !h.is_calm || h.stuck.is_some() || !h.late.is_empty();
        let is_news = |id: &DeviceId, heard: Option<&Heard>, now: Duration| {
            let limit = self.away(id);
            let is_loud =
                |h: &Heard| says_something(h) || h.double.is_some() || h.is_just_back() || h.silent_for(now) >= limit;
            // Of one that was enrolled anew an episode may be open.
            heard.is_none_or(is_loud) || complain.contains(id)
        };
        self.views_with(devices, is_news, says_something)
    }

    fn views_with<'a>(
        &self,
        devices: &'a [DeviceId],
        is_wanted: impl Fn(&DeviceId, Option<&Heard>, Duration) -> bool,
        with_beat: impl Fn(&Heard) -> bool,
    ) -> Vec<DeviceView<'a>> {
        let now = self.clock.monotonic();
        let state = self.state();
        let mut views = Vec::new();
        for of_store in devices.chunk_by(|a, b| a.store() == b.store()) {
            let store = of_store[0].store();
            let voices = state.heard.0.get(store).map(|of| &of.devices);
            let heard = |id: &DeviceId| voices.and_then(|v| v.get(id));
            // A register is watched while its store's relay is heard: not where there is none, or none was heard yet.
            let relay = of_store.iter().find(|id| matches!(id, DeviceId::Relay(_))).and_then(heard);
            views.extend(of_store.iter().filter_map(|id| {
                let heard = heard(id);
                if !is_wanted(id, heard, now) {
                    return None;
                }
                let (watched_from, before) = match id {
                    DeviceId::Relay(_) => (state.started, Duration::ZERO),
                    DeviceId::Register(_) => relay.map_or((now, Duration::ZERO), |r| {
                        // Each return of the relay leaves it some minutes all the same.
                        let most = self.register_silent.saturating_sub(self.store_silent);
                        let before = heard.map_or(Duration::ZERO, |h| h.watched.min(most));
                        (r.back.unwrap_or_default().max(state.started), before)
                    }),
                };
                let without = |since: Option<Duration>| Some(heard?.without_since(since?, now));
                Some(DeviceView {
                    id,
                    silent_for: heard.map(|h| h.silent_for(now)),
                    watched_for: now.saturating_sub(watched_from) + before,
                    is_just_back: heard.is_some_and(Heard::is_just_back),
                    stuck_for: without(heard.and_then(|h| h.stuck)),
                    late_for: without(heard.and_then(|h| h.late.values().min().copied())),
                    is_double: heard.and_then(|h| h.double).is_some_and(|at| now.saturating_sub(at) < DOUBLE_TOLD),
                    beat: heard.filter(|h| with_beat(h)).map(|h| Arc::clone(&h.beat)),
                })
            }));
        }
        views
    }

    /// The digests, as published, of every version that these devices hold.
    pub async fn published(&self, views: &[DeviceView<'_>]) -> Result<Arc<Published>, LedgerError> {
        let known = std::mem::take(&mut self.state().published);
        let found = Arc::new(published(&self.ledger, views, Arc::unwrap_or_clone(known)).await?);
        self.state().published = Arc::clone(&found);
        Ok(found)
    }

    /// Notes of whose heartbeats, by number, there is nothing to tell.
    pub fn note_calm<'a>(&self, calm: impl Iterator<Item = (&'a DeviceId, u64)>) {
        let mut state = self.state();
        for (id, seq) in calm {
            // Another one may have come meanwhile.
            if let Some(heard) = state.heard.get_mut(id).filter(|h| h.seq == seq) {
                heard.is_calm = true;
            }
        }
    }
}

/// Versions whose digests are kept though nobody asked for them lately: as many as a large chain publishes in weeks.
const KNOWN: usize = 20_000;

/// Beats that others took are read again for so long: so far apart the clocks of several `serve` may be.
const OVERLAP: Duration = Duration::from_secs(30);

/// The digests of all versions that devices report, from the ledger where they are not known.
async fn published(ledger: &Ledger, views: &[DeviceView<'_>], known: Published) -> Result<Published, LedgerError> {
    let few = known.values().map(BTreeMap::len).sum::<usize>() < KNOWN;
    let mut published = if few { known } else { Published::new() };
    let beats = || views.iter().filter_map(|v| v.beat.as_ref());
    let is_new_to_us = |b: &Arc<Heartbeat>| {
        let mut all = b.streams.keys().chain(b.errors.iter().filter_map(|f| f.instance.as_ref()));
        all.any(|i| !published.contains_key(i))
    };
    if beats().any(is_new_to_us) {
        for instance in ledger.instances().await? {
            published.entry(instance).or_default();
        }
    }
    // What was above the newest may be published by now.
    for of in published.values_mut() {
        let newest = of.iter().rev().find(|(_, digests)| digests.is_some()).map(|(v, _)| *v);
        of.retain(|v, digests| digests.is_some() || newest.is_some_and(|newest| *v < newest));
    }
    for beat in beats() {
        for (instance, report) in beat.streams.iter() {
            let (Some(version), Some(of)) = (report.version, published.get_mut(instance)) else { continue };
            if let Entry::Vacant(unknown) = of.entry(version) {
                let digests = ledger.publication(instance, version).await?.map(|p| p.digests);
                let is_known = unknown.insert(digests).is_some();
                // One that is above the newest was never published here.
                if !is_known && let Some(head) = ledger.head(instance).await? {
                    of.insert(head.version, Some(head.digests));
                }
            }
        }
    }
    Ok(published)
}

/// The fleet for a command that runs once: silence by the wall clock, watched for ever.
pub async fn glance<'a>(
    ledger: &Ledger,
    devices: &'a [DeviceId],
    now: Timestamp,
    limits: &Limits,
) -> Result<(Vec<DeviceView<'a>>, Published), LedgerError> {
    let mut beats: BTreeMap<DeviceId, BeatRow> =
        ledger.beats(None).await?.into_iter().map(|b| (b.device.clone(), b)).collect();
    let mut views = Vec::new();
    for id in devices {
        let row = beats.remove(id);
        views.push(DeviceView {
            silent_for: row.as_ref().map(|r| since(now, r.last_seen_at)),
            watched_for: Duration::MAX,
            is_just_back: false,
            stuck_for: None,
            late_for: None,
            is_double: false,
            beat: row.and_then(|r| dsse::peek(r.envelope.as_bytes(), limits.heartbeat_bytes).ok()).map(Arc::new),
            id,
        });
    }
    let digests = published(ledger, &views, Published::new()).await?;
    Ok((views, digests))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod years;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fleet::{self, Fleet};
    use proto::clock::TestClock;
    use proto::keys::SecretKey;

    struct World {
        dir: tempfile::TempDir,
        ledger: Ledger,
        clock: Arc<TestClock>,
    }
    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed([n; 32])
    }
    fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }
    fn beat(id: &str, seq: u64, by: &SecretKey, seen_s: u64, registers: &[(&str, u64)]) -> Beat {
        let registers = registers.iter().map(|(r, s)| (r.parse().unwrap(), *s)).collect();
        let heartbeat = Heartbeat { registers, ..Heartbeat::plain(id.parse().unwrap(), seq) };
        Beat { envelope: serde_json::from_slice(&heartbeat.seal(by).unwrap()).unwrap(), seen_s }
    }

    impl World {
        async fn new() -> World {
            let dir = tempfile::tempdir().unwrap();
            let ledger = Ledger::open_url(&format!("sqlite:{}", dir.path().join("f.db").display())).await.unwrap();
            let clock = Arc::new(TestClock::at("2026-01-01T00:00:00Z"));
            for (n, id) in [(1, "1"), (2, "1-1")] {
                ledger.enrol(&id.parse().unwrap(), &key(n).public(), clock.now()).await.unwrap();
            }
            World { dir, ledger, clock }
        }
        async fn intake(&self) -> Intake {
            let alerts = AlertsConfig::default();
            Intake::open(self.ledger.clone(), self.clock.clone(), Limits::default(), &alerts).await.unwrap()
        }
        /// (silent for, watched for) of relay and register, s.
        async fn seen(&self, intake: &Intake) -> Vec<(Option<u64>, u64)> {
            let enrolled = self.ledger.enrolled().await.unwrap();
            let views = intake.views(&enrolled);
            views.iter().map(|v| (v.silent_for.map(|d| d.as_secs()), v.watched_for.as_secs())).collect()
        }
    }
    async fn take(intake: &Intake, beats: Vec<Beat>) -> BTreeMap<String, String> {
        intake.take(Beats { beats }).await.unwrap().answer.refused
    }

    #[tokio::test]
    async fn only_signed_beats_of_enrolled_devices_count() {
        let w = World::new().await;
        let i = w.intake().await;
        let all = vec![
            beat("1", 1, &key(1), 0, &[]),
            beat("1-1", 1, &key(1), 0, &[]),
            beat("1-2", 1, &key(3), 0, &[]),
            Beat {
                envelope: dsse::Envelope { payload: "?".into(), ..beat("1", 2, &key(1), 0, &[]).envelope },
                seen_s: 0,
            },
        ];
        let refused = take(&i, all).await;
        assert_eq!(refused.keys().collect::<Vec<_>>(), ["1-1", "1-2", "beat 3"], "{refused:?}");
        assert!(refused["1-2"].contains("not enrolled"));
        // Again: nothing to say. Older: a copy, or a device set back.
        assert!(take(&i, vec![beat("1", 1, &key(1), 0, &[])]).await.is_empty());
        assert!(take(&i, vec![beat("1", 5, &key(1), 0, &[])]).await.is_empty());
        assert!(take(&i, vec![beat("1", 4, &key(1), 0, &[])]).await["1"].contains("older than 5"));
        let other = resealed(beat("1", 5, &key(1), 0, &[]), &key(1), |b| b.serial = Some(9));
        assert!(take(&i, vec![other]).await["1"].contains("number 5 was another heartbeat's"));
        w.ledger.revoke(&"1".parse().unwrap(), w.clock.now()).await.unwrap();
        assert!(take(&i, vec![beat("1", 6, &key(1), 0, &[])]).await["1"].contains("revoked"));
    }

    #[tokio::test]
    async fn a_device_counts_as_it_is_enrolled_now_whatever_is_remembered_of_it() {
        let w = World::new().await;
        let i = w.intake().await;
        let enrol = async |id: &str, n| {
            w.ledger.enrol(&id.parse().unwrap(), &key(n).public(), w.clock.now()).await.unwrap();
        };
        assert!(take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await.is_empty());
        enrol("1-2", 3).await;
        assert!(take(&i, vec![beat("1-2", 1, &key(3), 0, &[])]).await.is_empty(), "a new one");
        enrol("1-1", 4).await;
        let both = vec![beat("1", 2, &key(1), 0, &[]), beat("1-1", 2, &key(2), 0, &[])];
        assert_eq!(take(&i, both).await.into_keys().collect::<Vec<_>>(), ["1-1"], "by the key of before");
        assert!(take(&i, vec![beat("1-1", 1, &key(4), 0, &[])]).await.is_empty(), "by its new one");
        // Three posts wait to be written together. One is of a store that was never heard, so that its devices are read after
        // the other two were proved; between the two a device of one of them is revoked.
        enrol("2", 5).await;
        assert!(take(&i, vec![beat("1-2", 2, &key(3), 0, &[])]).await.is_empty());
        let i = Arc::new(i);
        let writing = i.writing.lock().await;
        let mut posts = Vec::new();
        for (n, beats) in [
            vec![beat("1", 3, &key(1), 0, &[])],
            vec![beat("1-1", 2, &key(4), 0, &[]), beat("1-2", 3, &key(3), 0, &[])],
            vec![beat("2", 1, &key(5), 0, &[])],
        ]
        .into_iter()
        .enumerate()
        {
            if n == 2 {
                w.ledger.revoke(&"1-1".parse().unwrap(), w.clock.now()).await.unwrap();
            }
            let of = Arc::clone(&i);
            posts.push(tokio::spawn(async move { take(&of, beats).await }));
            while i.waiting().len() <= n {
                tokio::task::yield_now().await;
            }
        }
        let proved_at: Vec<_> = i.waiting().iter().map(|w| w.rows[0].proved_at.unwrap()).collect();
        assert!(proved_at[0] == proved_at[1] && proved_at[1] < proved_at[2], "{proved_at:?}");
        drop(writing);
        let mut refused = Vec::new();
        for post in posts {
            refused.push(post.await.unwrap());
        }
        assert!(refused[0].is_empty() && refused[2].is_empty() && refused[1].len() == 1, "{refused:?}");
        assert!(refused[1]["1-1"].contains("revoked"));
        let now = w.ledger.enrolments().await.unwrap();
        assert_eq!(i.keyring().at, now);
        assert_eq!(i.keyring().of.len(), 2, "who did not change is remembered on");
        let kept: Vec<u64> = w.ledger.beats(None).await.unwrap().iter().map(|b| b.seq).collect();
        assert_eq!(kept, [3, 1, 3, 1]);
    }

    #[tokio::test]
    async fn silence_is_measured_through_relays_restarts_and_leaping_clocks() {
        let w = World::new().await;
        let i = w.intake().await;
        assert_eq!(w.seen(&i).await, [(None, 0), (None, 0)]);
        take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 20, &[])]).await;
        w.clock.advance(s(100));
        assert_eq!(w.seen(&i).await, [(Some(100), 100), (Some(120), 100)]);
        // The same beat again proves nothing; the relay's own word of its register does.
        take(&i, vec![beat("1-1", 1, &key(2), 0, &[])]).await;
        assert_eq!(w.seen(&i).await[1], (Some(120), 100));
        take(&i, vec![beat("1", 2, &key(1), 0, &[("1-1", 7)])]).await;
        assert_eq!(w.seen(&i).await, [(Some(0), 100), (Some(7), 100)]);
        // The wall clock leaps: nobody becomes silent by that.
        w.clock.set("2027-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(w.seen(&i).await, [(Some(0), 100), (Some(7), 100)]);
        // A restart: the silence before it is known, the watch begins anew.
        take(&i, vec![beat("1", 3, &key(1), 0, &[])]).await;
        w.clock.advance(s(50));
        let i = w.intake().await;
        let seen = w.seen(&i).await;
        assert_eq!(seen[0], (Some(50), 0));
    }

    #[tokio::test]
    async fn no_leap_of_the_clock_makes_a_silence() {
        let w = World::new().await;
        let i = w.intake().await;
        let start = w.clock.now().as_second();
        let years = (-56..=50).step_by(5).flat_map(|years| [years, -years / 2]);
        for (n, years) in years.enumerate() {
            w.clock.set(Timestamp::from_second(start + years * 365 * 86_400).unwrap());
            take(&i, vec![beat("1", n as u64 + 1, &key(1), 0, &[])]).await;
            w.clock.advance(s(60));
            assert_eq!(w.seen(&i).await[0].0, Some(60), "{years} years");
        }
    }

    /// A heartbeat with its words changed.
    fn resealed(beat: Beat, by: &SecretKey, change: impl FnOnce(&mut Heartbeat)) -> Beat {
        let bytes = serde_json::to_vec(&beat.envelope).unwrap();
        let mut plain = dsse::peek::<Heartbeat>(&bytes, 1 << 16).unwrap();
        change(&mut plain);
        Beat { envelope: serde_json::from_slice(&plain.seal(by).unwrap()).unwrap(), ..beat }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn posts_that_come_together_are_each_answered() {
        let w = World::new().await;
        let i = Arc::new(w.intake().await);
        let mut posts = tokio::task::JoinSet::new();
        for n in 1..=60 {
            let (i, relay, register) = (i.clone(), beat("1", n, &key(1), 0, &[]), beat("1-1", n, &key(2), 0, &[]));
            posts.spawn(async move { i.take(Beats { beats: vec![relay, register] }).await.unwrap() });
        }
        let answers = posts.join_all().await;
        // Whoever was overtaken is told so, and by which.
        let (taken, older): (Vec<_>, Vec<_>) = answers.iter().partition(|t| t.proved);
        assert!(taken.iter().all(|t| t.answer.refused.is_empty()) && !taken.is_empty());
        assert!(older.iter().all(|t| t.answer.refused.len() == 2 && t.answer.refused["1"].contains("is older than")));
        let kept: Vec<u64> = i.ledger.beats(None).await.unwrap().into_iter().map(|b| b.seq).collect();
        assert_eq!(kept, [60, 60]);
        let heard = |id: &str| i.state().heard.get(&id.parse().unwrap()).unwrap().seq;
        assert_eq!((heard("1"), heard("1-1")), (60, 60), "in the order in which they were written");
    }

    #[tokio::test]
    async fn a_post_that_cannot_be_kept_keeps_nobody_elses_out() {
        let w = World::new().await;
        w.ledger.enrol(&"2".parse().unwrap(), &key(3).public(), w.clock.now()).await.unwrap();
        let db = rusqlite::Connection::open(w.dir.path().join("f.db")).unwrap();
        let no = "CREATE TRIGGER no BEFORE INSERT ON beat WHEN NEW.device = '1-1' BEGIN SELECT RAISE(ABORT, 'no'); END";
        db.execute_batch(no).unwrap();
        let i = Arc::new(w.intake().await);
        let writing = i.writing.lock().await;
        let mut posts = Vec::new();
        for (n, id) in [(1, "1"), (2, "1-1"), (3, "2")] {
            let (i, beats) = (i.clone(), vec![beat(id, 1, &key(n), 0, &[])]);
            posts.push(tokio::spawn(async move { i.take(Beats { beats }).await.is_ok() }));
        }
        while i.waiting().len() < 3 {
            tokio::task::yield_now().await;
        }
        drop(writing);
        let mut kept = Vec::new();
        for post in posts {
            kept.push(post.await.unwrap());
        }
        assert_eq!(kept, [true, false, true]);
        let heard = |id: &str| i.state().heard.get(&id.parse().unwrap()).is_some();
        assert_eq!(["1", "1-1", "2"].map(heard), [true, false, true]);
        let rows = w.ledger.beats(None).await.unwrap();
        assert_eq!(rows.iter().map(|b| b.device.as_str()).collect::<Vec<_>>(), ["1", "2"]);
    }

    #[tokio::test]
    async fn who_was_not_heard_because_the_ledger_was_away_is_watched_anew() {
        let w = World::new().await;
        let i = w.intake().await;
        take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
        assert_eq!(i.watch_on(Duration::ZERO), Some(s(0)));
        assert_eq!(w.intake().await.watch_on(Duration::ZERO), None, "begun anew: nobody knows");
        let db = rusqlite::Connection::open(w.dir.path().join("f.db")).unwrap();
        let rename = |from: &str, to: &str| db.execute_batch(&format!("ALTER TABLE {from} RENAME TO {to}")).unwrap();
        let watched = async || w.seen(&i).await[0].1;
        let mut seq = 1;
        // The first is asked for when a beat of somebody who is not remembered is opened, the others when one is written.
        w.ledger.enrol(&"2".parse().unwrap(), &key(3).public(), w.clock.now()).await.unwrap();
        for table in ["device", "change", "beat"] {
            for (minutes, is_long) in [(1, false), (6, true)] {
                rename(table, "away");
                for minute in 0..minutes {
                    seq += 1;
                    let (id, by) = if table == "device" { ("2", key(3)) } else { ("1-1", key(2)) };
                    let post = Beats { beats: vec![beat(id, seq, &by, 0, &[])] };
                    assert!(i.take(post).await.is_err(), "{table}, {minute}");
                    w.clock.advance(s(59));
                }
                rename("away", table);
                let before = watched().await;
                seq += 1;
                take(&i, vec![beat("1-1", seq, &key(2), 0, &[])]).await;
                assert_eq!(watched().await, if is_long { 0 } else { before }, "{table} away for {minutes} min");
                w.clock.advance(s(9));
                i.watch_on(Duration::ZERO);
                assert_eq!(watched().await, if is_long { 9 } else { before + 9 }, "it hears");
            }
        }
        // Nor is heard who hangs up while the ledger hangs.
        seq += 1;
        let lost = Beats { beats: vec![beat("1-1", seq, &key(2), 0, &[])] };
        let mut post = Box::pin(i.take(lost));
        assert!(futures_util::poll!(&mut post).is_pending());
        w.clock.advance(s(30));
        drop(post);
        w.clock.advance(s(200));
        assert_eq!(i.watch_on(Duration::ZERO), Some(s(30)));
        assert_eq!(watched().await, 200);
        w.clock.advance(s(100));
        assert_eq!(i.watch_on(Duration::ZERO), None, "nobody posts any more");
        // What cannot be kept for what it is makes nobody deaf.
        let no = "CREATE TRIGGER no BEFORE INSERT ON beat BEGIN SELECT RAISE(ABORT, 'no'); END";
        db.execute_batch(no).unwrap();
        let before = watched().await;
        for _ in 0..9 {
            seq += 1;
            assert!(i.take(Beats { beats: vec![beat("1-1", seq, &key(2), 0, &[])] }).await.is_err());
            w.clock.advance(s(59));
            i.watch_on(Duration::ZERO);
        }
        assert_eq!(watched().await, before + 9 * 59);
    }

    #[tokio::test]
    async fn a_complaint_is_kept_without_characters_that_a_ledger_may_refuse() {
        let w = World::new().await;
        let i = w.intake().await;
        let hostile = |text: &str| format!("{text}\u{0}\n{}", "x".repeat(2000));
        let says = |b: &mut Heartbeat| {
            b.errors = [fault::DRIFT, fault::PACK_IN_ERROR, fault::PACK_MISSING]
                .map(|code| {
                    let (code, object, text) = (code.to_owned(), Some(hostile("object")), hostile("text"));
                    Fault { code, instance: None, object, text, since: w.clock.now() }
                })
                .into();
            (b.run, b.program, b.debts) = (Some(hostile("run")), hostile("program"), vec![hostile("debt")]);
        };
        let mut hostile_beat = resealed(beat("1-1", 1, &key(2), 0, &[]), &key(2), says);
        hostile_beat.envelope.signatures[0].keyid = hostile("key");
        assert!(take(&i, vec![hostile_beat]).await.is_empty());
        let kept = w.ledger.complaints().await.unwrap();
        assert_eq!(kept.len(), 3);
        for Complaint { fault: f, .. } in kept {
            let texts = [&f.code, &f.text, f.object.as_ref().unwrap()];
            assert!(texts.iter().all(|t| !t.contains(char::is_control) && t.chars().count() <= 1000), "{f:?}");
        }
        let envelopes = w.ledger.beats(None).await.unwrap();
        assert!(envelopes.iter().all(|b| !b.envelope.contains(char::is_control)));
    }

    #[tokio::test]
    async fn a_second_machine_with_the_same_key_is_noticed_for_an_hour() {
        let w = World::new().await;
        let i = w.intake().await;
        let of = |run: &'static str, seq, sent: i64| {
            resealed(beat("1", seq, &key(1), 0, &[]), &key(1), |b| {
                b.run = Some(run.into());
                b.sent_at = Timestamp::from_second(sent).unwrap();
            })
        };
        let double = || i.views(&["1".parse().unwrap()])[0].is_double;
        // Both count on from where the disk was copied; one is always a little later.
        take(&i, vec![of("a", 1, 10)]).await;
        take(&i, vec![of("b", 1, 11)]).await;
        assert!(!double(), "it may have started anew");
        take(&i, vec![of("a", 2, 70)]).await;
        assert!(double());
        w.clock.advance(s(3599));
        assert!(double());
        w.clock.advance(s(1));
        assert!(!double());
        // Also when what it says is not taken at all.
        take(&i, vec![of("b", 1, 71)]).await;
        assert!(double());
    }

    #[tokio::test]
    async fn who_holds_an_old_list_is_stuck_until_it_comes_nearer() {
        let w = World::new().await;
        let i = w.intake().await;
        let with = |seq, serial| resealed(beat("1", seq, &key(1), 0, &[]), &key(1), |b| b.serial = serial);
        let stuck = |serial: u64| {
            i.expect(&BTreeMap::from([("1".parse().unwrap(), Serials { wake: serial, signed: serial })]));
            i.views(&["1".parse().unwrap()])[0].stuck_for.map(|d| d.as_secs())
        };
        take(&i, vec![with(1, None)]).await;
        assert_eq!(stuck(0), None, "its list is not in the bucket yet");
        assert_eq!(stuck(3), Some(0));
        w.clock.advance(s(9));
        take(&i, vec![with(2, None)]).await;
        assert_eq!(stuck(3), Some(9));
        take(&i, vec![with(3, Some(2))]).await;
        assert_eq!(stuck(3), Some(0), "nearer: it gets something");
        w.clock.advance(s(5));
        assert_eq!(stuck(4), Some(5), "further away: nothing came");
        take(&i, vec![with(4, Some(4))]).await;
        assert_eq!(stuck(4), None);
        // A register has time from when its relay has the list.
        let register = || i.views(&["1-1".parse().unwrap()])[0].stuck_for.map(|d| d.as_secs());
        let of_register = |seq| resealed(beat("1-1", seq, &key(2), 0, &[]), &key(2), |b| b.serial = Some(4));
        take(&i, vec![of_register(1)]).await;
        assert_eq!((stuck(5), register()), (Some(0), None));
        w.clock.advance(s(9));
        assert_eq!((stuck(5), register()), (Some(9), None));
        take(&i, vec![with(5, Some(5))]).await;
        assert_eq!((stuck(5), register()), (None, Some(0)));
        w.clock.advance(s(9));
        assert_eq!((stuck(5), register()), (None, Some(9)));
        // Of a relay that is silent nobody gets anything; from its return on, and the register's, it counts anew.
        w.clock.advance(s(300));
        assert_eq!((stuck(5), register()), (None, Some(0)));
        w.clock.advance(s(9));
        take(&i, vec![with(6, Some(5))]).await;
        assert_eq!((stuck(5), register()), (None, Some(0)), "it may be switched off");
        take(&i, vec![of_register(2)]).await;
        w.clock.advance(s(9));
        assert_eq!((stuck(5), register()), (None, Some(9)));
    }

    /// Its line was cut, or it was switched off: something was published meanwhile, and its first word comes before it has it.
    #[tokio::test]
    async fn what_a_device_could_not_get_while_it_was_silent_is_not_counted() {
        let w = World::new().await;
        let (i, ids) = (w.intake().await, w.ledger.enrolled().await.unwrap());
        let of_relay = |seq, serial, ago| {
            resealed(beat("1", seq, &key(1), 0, &[("1-1", ago)]), &key(1), |b| b.serial = Some(serial))
        };
        let of_register =
            |seq, serial| resealed(beat("1-1", seq, &key(2), 2, &[]), &key(2), |b| b.serial = Some(serial));
        let found = |wake: u64| {
            let serials = BTreeMap::from([("1".parse().unwrap(), Serials { wake, signed: wake })]);
            i.expect(&serials);
            let assessment = fleet::assess(&Fleet {
                devices: &i.views(&ids),
                complaints: &[],
                published: &Published::new(),
                serials: &serials,
                expiring: &[],
                own_disk: None,
                deaf_for: Some(Duration::ZERO),
                alerts: &AlertsConfig::default(),
                now: w.clock.now(),
            });
            assessment.findings.into_keys().collect::<Vec<_>>().join(" ")
        };
        let mut seq = 1;
        take(&i, vec![of_relay(seq, 5, 2), of_register(1, 5)]).await;
        assert_eq!(found(5), "");
        // Its list is published, and three hours pass.
        for _ in 0..36 {
            w.clock.advance(s(300));
            assert_eq!(found(6), "store-silent/1");
        }
        for minute in 0..=15 {
            seq += 1;
            take(&i, vec![of_relay(seq, 5, 2)]).await;
            assert_eq!(found(6), if minute < 15 { "" } else { "store-stuck/1" }, "heard again for {minute} min");
            w.clock.advance(s(60));
        }
        seq += 1;
        take(&i, vec![of_relay(seq, 6, 2)]).await;
        assert_eq!(found(6), "", "its register has time");
        // That is switched off for the night, its relay is not.
        for n in 1..=150 {
            w.clock.advance(s(240));
            seq += 1;
            take(&i, vec![of_relay(seq, 6, 2 + 240 * n)]).await;
            found(6);
        }
        assert_eq!(found(6), "register-silent/1-1");
        for minute in 0..=15 {
            w.clock.advance(s(60));
            seq += 1;
            // Its relay's word of it comes first.
            take(&i, vec![of_relay(seq, 6, 2), of_register(2 + minute, 5)]).await;
            assert_eq!(found(6), if minute < 15 { "" } else { "register-stuck/1-1" }, "on for {minute} min");
        }
        // It comes on, nobody waits for anything, and then an old copy of its disk is put back.
        for minute in 0..=16 {
            w.clock.advance(s(60));
            seq += 1;
            take(&i, vec![of_relay(seq, 6, 2), of_register(18 + minute, if minute == 0 { 6 } else { 5 })]).await;
            assert_eq!(found(6), if minute < 16 { "" } else { "register-stuck/1-1" }, "{minute}");
        }
        // A list comes at closing time, when registers are switched off; they have it when they are switched on again.
        take(&i, vec![of_register(50, 6)]).await;
        for (closed, serial) in [(20, 7), (29, 8)] {
            for minute in 1..=closed {
                w.clock.advance(s(60));
                seq += 1;
                take(&i, vec![of_relay(seq, serial, 2 + 60 * minute)]).await;
                assert_eq!(found(serial), "", "silent for {minute} min");
            }
            let register = 50 + serial * 2;
            take(&i, vec![of_register(register, serial - 1)]).await;
            assert_eq!(found(serial), "", "it is just on");
            w.clock.advance(s(60));
            take(&i, vec![of_register(register + 1, serial)]).await;
            assert_eq!(found(serial), "");
        }
        // It is run each ten minutes from now on, and gets nothing: the first silence may be any.
        w.clock.advance(s(60));
        take(&i, vec![of_register(90, 8)]).await;
        for minute in 1..=40 {
            w.clock.advance(s(60));
            seq += 1;
            let mut beats = vec![of_relay(seq, 9, 2 + 60 * (minute % 10))];
            beats.extend((minute % 10 == 0).then(|| of_register(90 + minute, 8)));
            take(&i, beats).await;
            assert_eq!(found(9), if minute < 25 { "" } else { "register-stuck/1-1" }, "{minute}");
        }
    }

    /// Its list comes, and a pack that it lists does not: a source that answers 500, a web page, nothing.
    #[tokio::test]
    async fn who_has_its_list_and_comes_no_further_in_a_stream_is_late() {
        let w = World::new().await;
        let i = w.intake().await;
        let report = |(stream, version, state): &(&str, u64, StreamState)| {
            let version = Version::try_from(*version).ok();
            (stream.parse().unwrap(), StreamReport { version, schema: None, digests: BTreeMap::new(), state: *state })
        };
        let says = |id: &str, seq, streams: &[(&str, u64, StreamState)], code: Option<&str>| {
            let by = key(if id == "1" { 1 } else { 2 });
            resealed(beat(id, seq, &by, 0, &[]), &by, |b| {
                b.streams = streams.iter().map(report).collect();
                let (since, object) = (b.sent_at, None);
                let of = |code: &str| Fault { code: code.into(), instance: None, object, text: String::new(), since };
                b.errors = code.map(of).into_iter().collect();
            })
        };
        let late = |id: &str| {
            i.expect(&BTreeMap::from([("1".parse().unwrap(), Serials { wake: 0, signed: 3 })]));
            i.expect(&BTreeMap::from([("1".parse().unwrap(), Serials { wake: 3, signed: 3 })]));
            i.views(&[id.parse().unwrap()])[0].late_for.map(|d| d.as_secs())
        };
        use StreamState::{Behind, Error, Ok, Unknown, Waiting};
        let (a, b) = ("a@all", "b@all");
        take(&i, vec![says("1", 1, &[(a, 4, Behind), (b, 7, Behind)], None)]).await;
        assert_eq!(late("1"), Some(0));
        w.clock.advance(s(9));
        // One goes on, the other does not: by each publish of the first nobody would hear of the second.
        take(&i, vec![says("1", 2, &[(a, 4, Behind), (b, 8, Behind)], None)]).await;
        assert_eq!(late("1"), Some(9));
        let of_register = says("1-1", 1, &[(a, 4, Behind), (b, 8, Ok)], None);
        take(&i, vec![of_register]).await;
        w.clock.advance(s(9));
        assert_eq!((late("1"), late("1-1")), (Some(18), Some(0)), "a register has it from its relay");
        take(&i, vec![says("1", 3, &[(a, 5, Ok), (b, 8, Ok)], None)]).await;
        w.clock.advance(s(9));
        assert_eq!((late("1"), late("1-1")), (None, Some(9)));
        // What a relay of a later build says of it is no reason to wait.
        take(&i, vec![says("1", 4, &[(a, 5, Unknown), (b, 8, Ok)], None)]).await;
        w.clock.advance(s(9));
        assert_eq!((late("1"), late("1-1")), (None, Some(18)));
        // A pack in error at the relay is told as that: by none of its registers.
        take(&i, vec![says("1", 5, &[(a, 5, Error), (b, 8, Ok)], None)]).await;
        assert_eq!((late("1"), late("1-1")), (None, Some(0)));
        for (seq, streams, code) in
            [(6, [(a, 5, Waiting), (b, 8, Error)], None), (7, [(a, 5, Behind), (b, 8, Behind)], Some(fault::DISK_FULL))]
        {
            take(&i, vec![says("1", seq, &streams, code)]).await;
            assert_eq!(late("1"), None, "held up by the POS application, or mailed as such: {streams:?}");
        }
        // Of a stream that only a later build knows.
        take(&i, vec![says("1", 8, &[(a, 5, Behind)], Some(fault::PACK_IN_ERROR))]).await;
        assert_eq!(late("1"), Some(0), "that pack is none of these streams'");
        take(&i, vec![says("1", 9, &[(a, 0, Waiting)], None)]).await;
        assert_eq!(late("1"), Some(0), "a new one that gets nothing");
    }

    /// A publish every 300 s, looked at between sign and put, and before any relay has it: a frozen source, a register that
    /// refuses its list, and beside them a store that is always late and gets each list.
    #[tokio::test]
    async fn publishes_in_quick_succession_hide_nobody_who_gets_nothing() {
        let w = World::new().await;
        for (n, id) in [(3, "2"), (4, "2-1"), (5, "3"), (6, "3-1")] {
            w.ledger.enrol(&id.parse().unwrap(), &key(n).public(), w.clock.now()).await.unwrap();
        }
        let i = w.intake().await;
        let holds = |n: u8, id: &str, seq: u64, serial: u64| {
            resealed(beat(id, seq, &key(n), 0, &[]), &key(n), |b| b.serial = Some(serial))
        };
        let (mut seq, ids) = (0, w.ledger.enrolled().await.unwrap());
        for publish in 1..=5 {
            let (new, stores) = (10 + publish, ["1", "2", "3"].map(|id| id.parse::<StoreId>().unwrap()));
            let serials = |wake| stores.iter().map(|s| (s.clone(), Serials { wake, signed: new })).collect();
            for (second, serial_2, serial_3) in [(0, new - 1, new - 2), (60, new, new - 2), (200, new, new - 1)] {
                i.expect(&serials(if second == 0 { 0 } else { new }));
                w.clock.advance(s(if second == 0 { 60 } else { 120 }));
                seq += 1;
                let of_2 = [holds(3, "2", seq, serial_2), holds(4, "2-1", seq, 9)];
                let of_3 = [holds(5, "3", seq, serial_3), holds(6, "3-1", seq, serial_3)];
                let of_1 = [holds(1, "1", seq, 10), holds(2, "1-1", seq, 10)];
                take(&i, of_1.into_iter().chain(of_2).chain(of_3).collect()).await;
                i.expect(&serials(new));
            }
        }
        // The next one is just put.
        let serials = ["1", "2", "3"].map(|id| (id.parse().unwrap(), Serials { wake: 16, signed: 16 })).into();
        i.expect(&serials);
        let (published, alerts) = (Published::new(), AlertsConfig::default());
        let assessment = fleet::assess(&Fleet {
            devices: &i.views(&ids),
            complaints: &[],
            published: &published,
            serials: &serials,
            expiring: &[],
            own_disk: None,
            deaf_for: Some(Duration::ZERO),
            alerts: &alerts,
            now: w.clock.now(),
        });
        assert_eq!(assessment.findings.into_keys().collect::<Vec<_>>(), ["register-stuck/2-1", "store-stuck/1"]);
    }

    #[tokio::test]
    async fn who_has_nothing_to_tell_is_left_out_until_there_is_something() {
        let w = World::new().await;
        let i = w.intake().await;
        let id: DeviceId = "1".parse().unwrap();
        let news = |complaints: &[Complaint]| i.news(std::slice::from_ref(&id), complaints).len();
        assert_eq!(news(&[]), 1, "never heard: not installed yet, or anew");
        take(&i, vec![beat("1", 1, &key(1), 0, &[])]).await;
        assert_eq!(news(&[]), 1);
        i.note_calm([(&id, 1)].into_iter());
        assert_eq!(news(&[]), 0);
        let text = "healed meanwhile".to_owned();
        let fault = Fault { code: fault::DRIFT.into(), instance: None, object: None, text, since: w.clock.now() };
        assert_eq!(news(&[Complaint { device: id.clone(), fault }]), 1);
        w.clock.advance(s(299));
        assert_eq!(news(&[]), 0);
        w.clock.advance(s(1));
        assert_eq!(news(&[]), 1, "silent");
        take(&i, vec![beat("1", 2, &key(1), 0, &[])]).await;
        assert_eq!(news(&[]), 1, "another one");
    }

    #[tokio::test]
    async fn a_fault_that_was_mended_between_two_judgements_is_judged_once() {
        let w = World::new().await;
        let i = w.intake().await;
        let drift = Fault {
            code: fault::DRIFT.into(),
            instance: None,
            object: Some("store.db".into()),
            text: "a row differs (mended)".into(),
            since: Timestamp::UNIX_EPOCH,
        };
        let with =
            |seq, errors: Vec<Fault>| resealed(beat("1-1", seq, &key(2), 0, &[]), &key(2), |b| b.errors = errors);
        let judged = async |i: &Intake| {
            let (ids, complaints) = (["1-1".parse().unwrap()], i.ledger.unjudged().await.unwrap());
            let (published, serials, alerts) = (Published::new(), BTreeMap::new(), AlertsConfig::default());
            let devices = i.news(&ids, &complaints);
            let fleet = Fleet {
                devices: &devices,
                complaints: &complaints,
                published: &published,
                serials: &serials,
                expiring: &[],
                own_disk: None,
                deaf_for: Some(Duration::ZERO),
                alerts: &alerts,
                now: w.clock.now(),
            };
            let told = fleet::assess(&fleet).findings.into_values().map(|f| f.lines.len()).sum::<usize>();
            i.note_calm(fleet::calm(&fleet));
            i.ledger.judged(&complaints).await.unwrap();
            told
        };
        take(&i, vec![with(1, vec![drift.clone()])]).await;
        take(&i, vec![with(2, Vec::new())]).await;
        take(&i, vec![with(3, Vec::new())]).await;
        // `serve` may have died meanwhile.
        let i = w.intake().await;
        assert_eq!((judged(&i).await, judged(&i).await), (1, 0));
        take(&i, vec![with(4, vec![drift.clone()])]).await;
        take(&i, vec![with(5, vec![drift])]).await;
        assert_eq!(judged(&i).await, 1, "the beat's own, once");
    }

    #[tokio::test]
    async fn a_fault_began_as_long_ago_as_the_device_says_whatever_its_clock_shows() {
        let w = World::new().await;
        let i = w.intake().await;
        let time = |t: &str| t.parse::<Timestamp>().unwrap();
        for (n, (sent, began, ago)) in [
            ("1970-01-02T00:01:00Z", "1970-01-02T00:00:00Z", 60 + 20),
            ("2040-01-01T00:00:05Z", "2040-01-01T00:00:00Z", 5 + 20),
            ("2026-01-01T00:00:00Z", "2030-01-01T00:00:00Z", 20),
        ]
        .into_iter()
        .enumerate()
        {
            w.clock.advance(s(3600));
            let told = resealed(beat("1-1", n as u64 + 1, &key(2), 20, &[]), &key(2), |b| {
                b.sent_at = time(sent);
                let (code, text, since) = (fault::PACK_IN_ERROR.to_owned(), "x".to_owned(), time(began));
                b.errors = vec![Fault { code, instance: None, object: None, text, since }];
            });
            take(&i, vec![told]).await;
            let known = w.ledger.complaints().await.unwrap();
            assert_eq!(since(w.clock.now(), known[0].fault.since), s(ago), "{sent}");
        }
    }

    /// Its relay's line is away for six minutes in each twenty-five.
    #[tokio::test]
    async fn a_register_that_is_dead_behind_a_line_that_comes_and_goes_is_told() {
        let w = World::new().await;
        let (i, ids) = (w.intake().await, w.ledger.enrolled().await.unwrap());
        take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
        let (mut seq, mut told) = (1, None);
        for minute in 1..=75 {
            w.clock.advance(s(60));
            // Of the dead one, its relay says when it heard it.
            if minute % 25 < 19 {
                seq += 1;
                take(&i, vec![beat("1", seq, &key(1), 0, &[("1-1", minute * 60)])]).await;
            }
            let assessment = fleet::assess(&Fleet {
                devices: &i.views(&ids),
                complaints: &[],
                published: &Published::new(),
                serials: &BTreeMap::new(),
                expiring: &[],
                own_disk: None,
                deaf_for: Some(Duration::ZERO),
                alerts: &AlertsConfig::default(),
                now: w.clock.now(),
            });
            if assessment.findings.contains_key("register-silent/1-1") {
                told = told.or(Some(minute));
            }
        }
        // 18 minutes, and from the 25th on 12 more.
        assert_eq!(told, Some(37));
        // Whoever was away for hours has time.
        w.clock.advance(s(7200));
        take(&i, vec![beat("1", seq + 1, &key(1), 0, &[])]).await;
        assert_eq!(w.seen(&i).await[1].1, 0);
    }

    #[tokio::test]
    async fn a_store_that_comes_back_gives_its_registers_time() {
        let w = World::new().await;
        let i = w.intake().await;
        take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
        w.clock.advance(s(7200));
        take(&i, vec![beat("1", 2, &key(1), 0, &[])]).await;
        w.clock.advance(s(60));
        assert_eq!(w.seen(&i).await, [(Some(60), 7260), (Some(7260), 60)]);
        // Without a relay of its own nobody could carry its word.
        let ids = w.ledger.enrolled().await.unwrap();
        assert_eq!(i.views(&ids[1..])[0].watched_for, s(0));
        // What another process recorded is taken over.
        let other = w.intake().await;
        take(&other, vec![beat("1-1", 2, &key(2), 3, &[])]).await;
        i.read_ledger().await.unwrap();
        assert_eq!(w.seen(&i).await[1].0, Some(3));
    }
}

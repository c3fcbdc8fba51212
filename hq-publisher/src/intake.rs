//! Heartbeats: verified, recorded, and held in memory for the alerts and pages of `serve`.
//!
//! Owns how long each device has been silent, by durations that do not follow the wall clock. Must
//! never believe an unsigned word but the age of a beat that a relay passes on. The ledger is written
//! before the answer is given: if the power goes, an answered beat is there.

use crate::fleet::{DeviceView, Digests};
use crate::ledger::{BeatOutcome, BeatRow, Complaint, DeviceRow, Ledger, LedgerError};
use proto::clock::{Clock, Timestamp, since};
use proto::dsse;
use proto::failpoint;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::limits::Limits;
use proto::wire::{Beat, BeatAnswer, Beats, Fault, Heartbeat, fault};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Beats taken in one request: a store's relay and its registers, many times over.
pub const BEATS: usize = 4096;

/// A relay's word on how long ago it heard a device counts up to this: beyond it, it is nonsense.
const OLDEST: Duration = Duration::from_secs(400 * 86_400);

/// Faults kept of one beat beyond the next.
const COMPLAINTS: usize = 40;

/// What is known of the fleet's voices.
pub struct Intake {
    ledger: Ledger,
    clock: Arc<dyn Clock>,
    limits: Limits,
    /// A silence as long as this makes a relay's next beat a return.
    store_silent: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    heard: BTreeMap<DeviceId, Heard>,
    published: BTreeMap<(Instance, Version), Option<Digests>>,
    /// When the ledger was last read for beats that other processes took.
    read_at: Option<Timestamp>,
    /// Monotonic time of the start.
    started: Duration,
}

struct Heard {
    /// Monotonic time of the last word.
    at: Duration,
    /// How old that word was then.
    age: Duration,
    /// Monotonic time since when it is heard again; none while it was never away.
    back: Option<Duration>,
    seq: u64,
    beat: Arc<Heartbeat>,
}

/// What became of some beats.
#[derive(Debug)]
pub struct Taken {
    /// The answer.
    pub answer: BeatAnswer,
    /// Whether one was new, and signed by its device: the sender is one, or carries for one.
    pub proved: bool,
}

/// Faults that a device tells at least once, though they are mended by then.
fn is_told_once(f: &Fault) -> bool {
    [fault::DRIFT, fault::PACK_IN_ERROR, fault::PACK_MISSING].contains(&f.code.as_str())
}

/// A device's clock may run ahead: what it tells began before it was heard.
fn complaints(beat: &Heartbeat, heard: Timestamp) -> Vec<Fault> {
    let of = beat.errors.iter().filter(|f| is_told_once(f)).take(COMPLAINTS);
    of.map(|f| Fault { since: f.since.min(heard), ..f.clone() }).collect()
}

/// Adds what was told and not judged yet, though the device tells of it no more: a register heals within the second.
pub fn add_told(views: &mut [DeviceView], complaints: &[Complaint]) {
    for c in complaints {
        let Some(beat) = views.iter_mut().find(|v| v.id == c.device).and_then(|v| v.beat.as_mut()) else { continue };
        if !beat.errors.iter().any(|f| (&f.code, &f.instance) == (&c.fault.code, &c.fault.instance)) {
            Arc::make_mut(beat).errors.push(c.fault.clone());
        }
    }
}

impl Heard {
    fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.at) + self.age
    }
}

impl Intake {
    /// Begins with what the ledger holds; silence is judged from now on.
    pub async fn open(
        ledger: Ledger,
        clock: Arc<dyn Clock>,
        limits: Limits,
        store_silent: Duration,
    ) -> Result<Intake, LedgerError> {
        let state = State { started: clock.monotonic(), ..State::default() };
        let intake = Intake { ledger, clock, limits, store_silent, state: Mutex::new(state) };
        intake.read_ledger().await?;
        Ok(intake)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic while it was held left numbers behind, nothing half-moved.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the beats that other `serve` processes recorded.
    pub async fn read_ledger(&self) -> Result<(), LedgerError> {
        let now = self.clock.now();
        let from = self.state().read_at.map(|t| proto::clock::after(t, Duration::ZERO).min(now));
        // A second of overlap: beats are stamped in whole seconds.
        let from = from.and_then(|t| t.checked_sub(jiff::SignedDuration::from_secs(2)).ok());
        let rows = self.ledger.beats(from).await?;
        let at = self.clock.monotonic();
        let mut state = self.state();
        for row in rows {
            if state.heard.get(&row.device).is_some_and(|h| h.seq >= row.seq) {
                continue;
            }
            let Ok(beat) = dsse::peek::<Heartbeat>(row.envelope.as_bytes(), self.limits.heartbeat_bytes) else {
                continue;
            };
            let age = since(now, row.last_seen_at);
            self.hear(&mut state, row.device, row.seq, Arc::new(beat), at, age);
        }
        state.read_at = Some(now);
        Ok(())
    }

    /// Notes a beat that was heard `age` ago.
    fn hear(&self, state: &mut State, id: DeviceId, seq: u64, beat: Arc<Heartbeat>, at: Duration, age: Duration) {
        let before = state.heard.get(&id);
        let returns = before.is_some_and(|h| h.silent_for(at) >= self.store_silent) && age < self.store_silent;
        let back = if returns { Some(at) } else { before.and_then(|h| h.back) };
        // A relay says of each register how long ago it heard it, between that register's beats.
        for (register, ago) in &beat.registers {
            if let Some(h) = state.heard.get_mut(&DeviceId::Register(register.clone())) {
                let told = age + Duration::from_secs(*ago).min(OLDEST);
                if register.store() == id.store() && told < h.silent_for(at) {
                    (h.at, h.age) = (at, told);
                }
            }
        }
        state.heard.insert(id, Heard { at, age, back, seq, beat });
    }

    /// Verifies and records beats; the answer for whoever sent them.
    pub async fn take(&self, beats: Beats) -> Result<Taken, LedgerError> {
        let (now, at) = (self.clock.now(), self.clock.monotonic());
        let mut refused = BTreeMap::new();
        let mut keys: BTreeMap<StoreId, Vec<DeviceRow>> = BTreeMap::new();
        let (mut rows, mut taken) = (Vec::new(), Vec::new());
        for (n, beat) in beats.beats.iter().enumerate().take(BEATS) {
            match self.open_beat(beat, &mut keys).await? {
                Ok((heartbeat, envelope)) => {
                    let age = Duration::from_secs(beat.seen_s).min(OLDEST);
                    let last_seen_at = now.checked_sub(jiff::SignedDuration::try_from(age).unwrap_or_default());
                    rows.push(BeatRow {
                        device: heartbeat.device.clone(),
                        seq: heartbeat.seq,
                        envelope,
                        received_at: now,
                        last_seen_at: last_seen_at.unwrap_or(now),
                        serial: heartbeat.serial,
                        complaints: complaints(&heartbeat, now),
                    });
                    taken.push((heartbeat, age));
                }
                Err((who, why)) => {
                    refused.insert(who.unwrap_or_else(|| format!("beat {n}")), why);
                }
            }
        }
        let outcomes = match rows.is_empty() {
            true => Vec::new(),
            false => failpoint::around("intake.record", self.ledger.record_beats(&rows)).await?,
        };
        let mut proved = false;
        let mut state = self.state();
        for ((beat, age), outcome) in taken.into_iter().zip(outcomes) {
            match outcome {
                BeatOutcome::Recorded => {
                    proved = true;
                    let (id, seq) = (beat.device.clone(), beat.seq);
                    self.hear(&mut state, id, seq, Arc::new(beat), at, age);
                }
                BeatOutcome::Known => {}
                BeatOutcome::Older(last) => {
                    let why = format!(
                        "number {} is older than {last}: a copy, or a device set back to an old state",
                        beat.seq
                    );
                    refused.insert(beat.device.to_string(), why);
                }
            }
        }
        Ok(Taken { answer: BeatAnswer { hq_seen_s: Some(0), now, refused }, proved })
    }

    /// A beat that is signed by its device's key, with the envelope to keep; or whose it claims to be
    /// and why it is refused.
    #[allow(clippy::type_complexity, reason = "said once, used once")]
    async fn open_beat(
        &self,
        beat: &Beat,
        keys: &mut BTreeMap<StoreId, Vec<DeviceRow>>,
    ) -> Result<Result<(Heartbeat, String), (Option<String>, String)>, LedgerError> {
        let envelope = match serde_json::to_string(&beat.envelope) {
            Ok(envelope) => envelope,
            Err(e) => return Ok(Err((None, e.to_string()))),
        };
        let id = match Heartbeat::claimed_device(envelope.as_bytes(), &self.limits) {
            Ok(id) => id,
            Err(e) => return Ok(Err((None, e.to_string()))),
        };
        if !keys.contains_key(id.store()) {
            keys.insert(id.store().clone(), self.ledger.devices_of(id.store()).await?);
        }
        let device = keys.get(id.store()).and_then(|d| d.iter().find(|d| d.id == id));
        let why = match device {
            None => format!("{id} is not enrolled"),
            Some(d) if d.revoked_at.is_some() => format!("{id} was revoked"),
            Some(d) => match Heartbeat::open(envelope.as_bytes(), &id, &d.key, &self.limits) {
                Ok(heartbeat) => return Ok(Ok((heartbeat, envelope))),
                Err(e) => e.to_string(),
            },
        };
        Ok(Err((Some(id.to_string()), why)))
    }

    /// Every enrolled device as it is seen now.
    pub fn views(&self, devices: &[DeviceId]) -> Vec<DeviceView> {
        let now = self.clock.monotonic();
        let state = self.state();
        let view = |id: &DeviceId| {
            let heard = state.heard.get(id);
            // A register is watched while its store's relay is heard.
            let relay = state.heard.get(&DeviceId::Relay(id.store().clone()));
            let watched_from = relay.and_then(|r| r.back).unwrap_or(state.started).max(state.started);
            let watched_from = if matches!(id, DeviceId::Relay(_)) { state.started } else { watched_from };
            DeviceView {
                id: id.clone(),
                silent_for: heard.map(|h| h.silent_for(now)),
                watched_for: now.saturating_sub(watched_from),
                beat: heard.map(|h| Arc::clone(&h.beat)),
            }
        };
        devices.iter().map(view).collect()
    }

    /// The digests, as published, of every version that devices hold; kept while one holds it.
    pub async fn published(&self, views: &[DeviceView]) -> Result<BTreeMap<(Instance, Version), Digests>, LedgerError> {
        let known = std::mem::take(&mut self.state().published);
        let published = published(&self.ledger, views, known).await?;
        self.state().published.clone_from(&published);
        Ok(published.into_iter().filter_map(|(k, d)| Some((k, d?))).collect())
    }
}

/// The digests of all versions that devices report, from the ledger where they are not known.
async fn published(
    ledger: &Ledger,
    views: &[DeviceView],
    mut known: BTreeMap<(Instance, Version), Option<Digests>>,
) -> Result<BTreeMap<(Instance, Version), Option<Digests>>, LedgerError> {
    let mut published: BTreeMap<(Instance, Version), Option<Digests>> = BTreeMap::new();
    for view in views {
        let Some(beat) = &view.beat else { continue };
        for (instance, report) in &beat.streams {
            let Some(version) = report.version else { continue };
            let key = (instance.clone(), version);
            if published.contains_key(&key) {
                continue;
            }
            let digests = match known.remove(&key) {
                Some(digests) => digests,
                None => ledger.publication(instance, version).await?.map(|p| p.digests),
            };
            published.insert(key, digests);
        }
    }
    Ok(published)
}

/// The fleet for a command that runs once: silence by the wall clock, watched for ever.
pub async fn glance(
    ledger: &Ledger,
    now: Timestamp,
    limits: &Limits,
) -> Result<(Vec<DeviceView>, BTreeMap<(Instance, Version), Digests>), LedgerError> {
    let mut beats: BTreeMap<DeviceId, BeatRow> =
        ledger.beats(None).await?.into_iter().map(|b| (b.device.clone(), b)).collect();
    let mut views = Vec::new();
    for id in ledger.enrolled().await? {
        let row = beats.remove(&id);
        views.push(DeviceView {
            silent_for: row.as_ref().map(|r| since(now, r.last_seen_at)),
            watched_for: Duration::MAX,
            beat: row.and_then(|r| dsse::peek(r.envelope.as_bytes(), limits.heartbeat_bytes).ok()).map(Arc::new),
            id,
        });
    }
    let digests = published(ledger, &views, BTreeMap::new()).await?;
    Ok((views, digests.into_iter().filter_map(|(k, d)| Some((k, d?))).collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testclock::TestClock;
    use proto::keys::SecretKey;
    use proto::wire::Network;

    struct World {
        _dir: tempfile::TempDir,
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
        let heartbeat = Heartbeat {
            format: 1,
            device: id.parse().unwrap(),
            seq,
            sent_at: Timestamp::UNIX_EPOCH,
            program: "x".into(),
            serial: None,
            streams: BTreeMap::new(),
            network: Network::Online,
            errors: Vec::new(),
            debts: Vec::new(),
            disk: None,
            clock_skew_s: None,
            registers: registers.iter().map(|(r, s)| (r.parse().unwrap(), *s)).collect(),
        };
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
            World { _dir: dir, ledger, clock }
        }
        async fn intake(&self) -> Intake {
            Intake::open(self.ledger.clone(), self.clock.clone(), Limits::default(), s(300)).await.unwrap()
        }
        /// (silent for, watched for) of relay and register, s.
        async fn seen(&self, intake: &Intake) -> Vec<(Option<u64>, u64)> {
            let views = intake.views(&self.ledger.enrolled().await.unwrap());
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
        w.ledger.revoke(&"1".parse().unwrap(), w.clock.now()).await.unwrap();
        assert!(take(&i, vec![beat("1", 6, &key(1), 0, &[])]).await["1"].contains("revoked"));
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
        let with = |seq, errors: Vec<Fault>| {
            let Beat { envelope, .. } = beat("1-1", seq, &key(2), 0, &[]);
            let bytes = serde_json::to_vec(&envelope).unwrap();
            let plain = dsse::peek::<Heartbeat>(&bytes, 1 << 16).unwrap();
            let sealed = Heartbeat { errors, ..plain }.seal(&key(2)).unwrap();
            Beat { envelope: serde_json::from_slice(&sealed).unwrap(), seen_s: 0 }
        };
        let judged = async |i: &Intake| {
            let mut views = i.views(&["1-1".parse().unwrap()]);
            let told = i.ledger.unjudged().await.unwrap();
            add_told(&mut views, &told);
            i.ledger.judged(&told).await.unwrap();
            views[0].beat.as_ref().map_or(0, |b| b.errors.len())
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
    async fn a_store_that_comes_back_gives_its_registers_time() {
        let w = World::new().await;
        let i = w.intake().await;
        take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
        w.clock.advance(s(7200));
        take(&i, vec![beat("1", 2, &key(1), 0, &[])]).await;
        w.clock.advance(s(60));
        assert_eq!(w.seen(&i).await, [(Some(60), 7260), (Some(7260), 60)]);
        // What another process recorded is taken over.
        let other = w.intake().await;
        take(&other, vec![beat("1-1", 2, &key(2), 3, &[])]).await;
        i.read_ledger().await.unwrap();
        assert_eq!(w.seen(&i).await[1].0, Some(3));
    }
}

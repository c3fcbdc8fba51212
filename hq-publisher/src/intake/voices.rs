//! Who was heard, when, and saying what.
//!
//! Owns how long each device has been silent, without a newer list, or late. All times are monotonic: no wall clock says
//! that somebody is silent, but of heartbeats that another process took.

use super::{Intake, OLDEST, State};
use crate::fleet;
use crate::ledger::Serials;
use proto::ids::{DeviceId, Instance, StoreId};
use proto::runs::Runs;
use proto::wire::{Fault, Heartbeat, StreamReport, StreamState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// A line that comes and goes: what is not heard of a register between two outages counts on. After longer ones it has time
/// anew, as in the morning.
pub(super) const FLAP: Duration = Duration::from_secs(3600);

/// Who was silent for so long, and longer than usual, may have been switched off: in that time it could get nothing.
const OFF: Duration = Duration::from_secs(300);

/// Who was heard, by store: it is found once for all its devices.
#[derive(Default)]
pub(super) struct Voices(pub(super) BTreeMap<StoreId, OfStore>);

/// Who was heard of one store.
#[derive(Default)]
pub(super) struct OfStore {
    pub(super) devices: BTreeMap<DeviceId, Heard>,
    /// The oldest list that one of them holds, where none waited for anything when they were looked at; none: one did, or
    /// one was heard since.
    settled: Option<u64>,
}

impl Voices {
    pub(super) fn get(&self, id: &DeviceId) -> Option<&Heard> {
        self.0.get(id.store())?.devices.get(id)
    }
    pub(super) fn get_mut(&mut self, id: &DeviceId) -> Option<&mut Heard> {
        self.0.get_mut(id.store())?.devices.get_mut(id)
    }
}

pub(super) struct Heard {
    /// Monotonic time of the last word.
    pub(super) at: Duration,
    /// How old that word was then.
    age: Duration,
    /// From the word before to that one.
    gap: Duration,
    /// Monotonic time since when it is heard again; none while it was never away.
    pub(super) back: Option<Duration>,
    /// How long its relay was heard since its last word, up to the last time that the relay was back.
    pub(super) watched: Duration,
    /// Monotonic time since when it holds an older list than it could have, and came no nearer.
    pub(super) stuck: Option<Duration>,
    /// The streams that do not come to what its list says, though it could: since when, by monotonic time, without a newer
    /// version.
    pub(super) late: BTreeMap<Instance, Duration>,
    /// The list that it holds, by its heartbeat; 0: none.
    serial: u64,
    pub(super) beat: Arc<Heartbeat>,
    runs: Runs,
    /// Whether there is nothing to tell of its heartbeat, now or later.
    pub(super) is_calm: bool,
    /// Monotonic time at which a second machine with its key was last noticed.
    pub(super) double: Option<Duration>,
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
    pub(super) fn note_run(&mut self, beat: &Heartbeat, at: Duration) {
        if self.runs.hear(beat) {
            self.double = Some(at);
            tracing::warn!(device = %beat.device, "two machines report as it");
        }
    }

    /// Whether nothing was heard since the word that ended its silence.
    pub(super) fn is_just_back(&self) -> bool {
        self.back == Some(self.at)
    }

    /// Monotonic time at which it said what was heard last.
    fn last_word(&self) -> Duration {
        self.at.saturating_sub(self.age)
    }

    pub(super) fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.at) + self.age
    }

    /// Whether it may be, or have been, switched off. Some report each ten minutes.
    fn is_off(&self, silence: Duration) -> bool {
        silence >= OFF.max(self.gap * 2)
    }

    /// How long since then it got nothing.
    pub(super) fn without_since(&self, since: Duration, now: Duration) -> Duration {
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
    /// Notes a beat that was heard `age` ago.
    pub(super) fn hear(&self, state: &mut State, mut beat: Heartbeat, at: Duration, age: Duration) {
        let id = beat.device.clone();
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
            Heard { at, age, gap, back, watched, stuck, late, serial, beat: Arc::clone(&beat), runs, is_calm, double };
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
}

//! Heartbeats: signed, numbered, to the relay; and what its answer tells: how long ago HQ was
//! seen, and how far the clocks are apart. A heartbeat never claims what is not committed.

use crate::agent::Agent;
use crate::memory::PROGRAM;
use crate::status::{self, Facts};
use proto::clock::Timestamp;
use proto::device::DeviceError;
use proto::disk;
use proto::dsse::Envelope;
use proto::failpoint;
use proto::fetch::{FetchError, FetchErrorKind};
use proto::follow::lock;
use proto::wire::{Beat, BeatAnswer, Beats, Fault, Heartbeat, Status, fault};
use std::sync::{Mutex, PoisonError};

/// Bytes of an answer.
const ANSWER: u64 = 256 << 10;

/// Why a heartbeat was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// This device's memory failed (its number must be durable).
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The relay did not take it.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The answer is not one, or the heartbeat could not be written.
    #[error("heartbeat: {0}")]
    Json(#[from] serde_json::Error),
    /// The relay refused it.
    #[error("the relay refused this register's heartbeat: {0}")]
    Refused(String),
}

/// What the last answer told about the clocks.
#[derive(Debug, Default)]
pub struct Skew(Mutex<Option<i64>>);

impl Skew {
    /// Seconds that this clock is ahead of the relay's.
    pub fn get(&self) -> Option<i64> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn set(&self, s: i64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(s);
    }
}

/// Seconds that `here` is ahead of `there`.
pub fn skew(here: Timestamp, there: Timestamp) -> i64 {
    here.as_second() - there.as_second()
}

/// The report as it stands; `faults` are those of a status, or those of a heartbeat.
pub fn stand(agent: &Agent, mut faults: Vec<Fault>) -> Status {
    let shown = agent.shown().clone();
    let now = agent.clock.now();
    let (manifest, of_starts) = {
        let device = lock(&agent.device);
        (device.manifest().cloned(), device.starts().faults(now))
    };
    faults.extend(of_starts);
    status::status(Facts {
        id: agent.config.device(),
        held: &shown.held,
        manifest: manifest.as_deref(),
        drifted: status::drifted(&agent.memory),
        waits: &shown.waits,
        on_hold: agent.hold.until(agent.clock.monotonic()).is_some(),
        faults,
        network: agent.upstream.network(),
        disk: agent.disk.space(),
        clock_skew_s: agent.skew.get(),
        hq_seen_s: agent.upstream.hq_seen_s(),
        now,
    })
}

/// The heartbeat that says it.
pub fn heartbeat(status: Status, run: Option<String>, seq: u64, sent_at: Timestamp) -> Heartbeat {
    Heartbeat {
        format: 1,
        device: status.id,
        run,
        seq,
        sent_at,
        program: PROGRAM.to_owned(),
        serial: status.serial,
        streams: status.streams.into(),
        network: status.network,
        errors: status.errors,
        debts: status.debts,
        disk: status.disk,
        clock_skew_s: status.clock_skew_s,
        registers: Default::default(),
    }
}

/// Sends one heartbeat and takes in the answer. Static relays and silent ones take none: `Ok(false)`.
pub async fn send(agent: &Agent) -> Result<bool, ReportError> {
    let is_of_beats = |f: &Fault| f.object.as_deref() == Some(HEARTBEAT);
    if !agent.upstream.takes_heartbeats() {
        if agent.upstream.is_static() {
            // Who takes none refuses none: another stands in the place of the relay that did.
            agent.memory.faults(|f| f.mend(fault::REFUSED, is_of_beats));
            agent.memory.save_faults();
        }
        return Ok(false);
    }
    let _one = agent.telling.lock().await;
    let outcome = post(agent).await;
    agent.heed_device();
    agent.metrics.beat(outcome.is_ok());
    let now = agent.clock.now();
    let source = agent.upstream.relay().url();
    match &outcome {
        Ok(()) => agent.memory.faults(|f| f.mend(fault::REFUSED, is_of_beats)),
        Err(ReportError::Refused(why)) => {
            let text = format!(
                "{source} does not take this register's heartbeats; if it stays so, enrol the register anew ({why})"
            );
            agent.memory.faults(|f| f.raise(fault::REFUSED, None, Some(HEARTBEAT), &text, now));
        }
        Err(_) => {}
    }
    agent.memory.save_faults();
    outcome.map(|()| true)
}

/// The object of a fault about heartbeats.
pub const HEARTBEAT: &str = "heartbeat";

async fn post(agent: &Agent) -> Result<(), ReportError> {
    let take = || {
        let mut device = lock(&agent.device);
        device.next_seq().map(|seq| (seq, device.run().map(str::to_owned), device.key().clone()))
    };
    // A full disk must not make the register silent.
    let (seq, run, key) = disk::or_make_room(take, DeviceError::is_disk_full, |e| agent.out_of_room(&e.to_string()))?;
    agent.heed_device();
    let to_tell = agent.memory.look(|f| f.to_tell());
    let mut beat = heartbeat(stand(agent, to_tell.clone()), run, seq, agent.clock.now());
    beat.fit(&agent.config.limits)?;
    let envelope: Envelope = serde_json::from_slice(&beat.seal(&key)?)?;
    let body = serde_json::to_vec(&Beats { beats: vec![Beat { envelope, seen_s: 0 }] })?;
    let post = agent.upstream.relay().post("v1/heartbeats", "application/json", body.into(), ANSWER);
    let posted = failpoint::around("agent.beat", post).await;
    let answer = match posted {
        Err(e) if e.kind == FetchErrorKind::Unauthorized => return Err(ReportError::Refused(e.detail)),
        other => serde_json::from_slice::<BeatAnswer>(&other?)?,
    };
    agent.upstream.relay_answered();
    agent.skew.set(skew(agent.clock.now(), answer.now));
    agent.upstream.hq_seen(answer.hq_seen_s);
    if let Some(last) = answer.go_on_above.get(agent.config.register.as_str()) {
        lock(&agent.device).go_on_above(*last)?;
    }
    // A post carries one heartbeat: whoever is named, it is this one (of one that cannot be read nobody knows whose it is).
    if let Some(why) = answer.refused.into_values().next() {
        return Err(ReportError::Refused(why));
    }
    let passed_on = answer.passed_on.get(&agent.config.register).copied();
    agent.memory.faults(|f| f.told(&beat.errors, seq, passed_on));
    if agent.memory.look(|f| f.to_tell().len()) < to_tell.len() {
        // What is over is over at headquarters too.
        agent.tell.notify_one();
    }
    Ok(())
}

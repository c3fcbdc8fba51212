//! Heartbeats of registers: verified by the keys in the manifest (an expired one too), kept durably, the latest
//! of each. A register is answered only after its heartbeat is on disk.

use crate::hall::{Hall, Heard};
use crate::spool::{KeptBeat, SpoolError};
use proto::clock::since;
use proto::ids::{DeviceId, RegisterId};
use proto::keys::PublicKey;
use proto::wire::{Beat, Beats, Heartbeat};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Heartbeats in one post: a register sends its own.
pub const BEATS: usize = 16;

/// A stranger's word on how long ago a heartbeat was heard counts up to this: beyond it, it is nonsense.
const OLDEST: Duration = Duration::from_secs(400 * 86_400);

/// What became of some heartbeats.
#[derive(Debug, Default)]
pub struct Taken {
    /// Devices refused, and why.
    pub refused: BTreeMap<String, String>,
    /// Whether one was refused because no key of it is known: the manifest may be newer elsewhere.
    pub unknown: bool,
    /// Whether some could not be kept: try again.
    pub failed: bool,
}

/// Takes heartbeats in that came from an address. Blocks on the disk.
pub fn take(hall: &Hall, beats: &Beats, from: IpAddr) -> Taken {
    let mut taken = Taken::default();
    let mut proved = false;
    for beat in &beats.beats {
        match take_one(hall, beat) {
            Ok(news) => proved |= news,
            Err(Refused::Unknown(who, why)) => {
                taken.unknown = true;
                taken.refused.insert(who, why);
            }
            Err(Refused::Bad(who, why)) => {
                taken.refused.insert(who, why);
            }
            Err(Refused::NotKept(who, e)) => {
                taken.failed = true;
                taken.refused.insert(who, e.to_string());
            }
        }
    }
    // The sender is a register, or carries for one: from here on a flood of strangers cannot keep it out.
    if proved
        && hall.gate.befriend(from)
        && let Err(e) = hall.spool.keep_address(from)
    {
        tracing::warn!(error = %e, "an address was not kept");
    }
    taken
}

enum Refused {
    Unknown(String, String),
    Bad(String, String),
    NotKept(String, SpoolError),
}

/// Whether the heartbeat was new: one that came before (its answer was lost, or somebody copied it) proves
/// nothing, least of all that its register lives.
fn take_one(hall: &Hall, beat: &Beat) -> Result<bool, Refused> {
    let limits = &hall.config.limits;
    // Plain strings: writing them as JSON cannot fail.
    let envelope = serde_json::to_vec(&beat.envelope).unwrap_or_default();
    let claimed = Heartbeat::claimed_device(&envelope, limits)
        .map_err(|e| Refused::Bad("?".into(), format!("not a heartbeat: {e}")))?;
    let who = claimed.to_string();
    // 1. Whose key?
    let DeviceId::Register(register) = claimed.clone() else {
        return Err(Refused::Bad(who, "only registers report here".into()));
    };
    let Some(key) = register_key(hall, &register) else {
        return Err(Refused::Unknown(who, "no key of this register is in the manifest".into()));
    };
    // 2. Signed by it? (The key may have been changed at HQ just now.)
    let heartbeat =
        Heartbeat::open(&envelope, &claimed, &key, limits).map_err(|e| Refused::Unknown(who.clone(), e.to_string()))?;
    // 3. Newer than the last?
    let key = key.to_string();
    let (last, news) = {
        let state = hall.state();
        let last = state.registers.get(&register).filter(|h| h.key == key);
        (last.map(|h| h.beat.seq), last.is_none_or(|h| differs(&h.beat, &heartbeat)))
    };
    if last.is_some_and(|seq| heartbeat.seq < seq) {
        return Err(Refused::Bad(who, format!("heartbeat {} came after {}", heartbeat.seq, last.unwrap_or(0))));
    }
    if last == Some(heartbeat.seq) {
        return Ok(false);
    }
    // 4. Kept before it is answered.
    let seen_before = Duration::from_secs(beat.seen_s).min(OLDEST);
    let kept = KeptBeat {
        register: register.clone(),
        key: key.clone(),
        seq: heartbeat.seq,
        heard_at: hall.clock.now(),
        envelope: String::from_utf8(envelope).unwrap_or_default(),
    };
    let keep = || hall.spool.keep_beat(&kept);
    let in_spite = |e: SpoolError| {
        if !e.is_disk_full() {
            return Err(e);
        }
        hall.out_of_room(&e.to_string());
        keep()
    };
    keep().or_else(in_spite).map_err(|e| Refused::NotKept(who, e))?;
    let heard = Heard {
        beat: heartbeat,
        envelope: beat.envelope.clone(),
        key,
        at: hall.clock.monotonic(),
        earlier: seen_before,
        forwarded: false,
    };
    hall.state().registers.insert(register, heard);
    if news {
        hall.report.notify_one();
    }
    Ok(true)
}

/// Whether a heartbeat says something that HQ should hear at once.
fn differs(before: &Heartbeat, now: &Heartbeat) -> bool {
    before.streams != now.streams || before.errors != now.errors || before.network != now.network
}

fn register_key(hall: &Hall, register: &RegisterId) -> Option<PublicKey> {
    let manifest = hall.state().manifest.as_ref().map(Arc::clone)?;
    manifest.registers.get(register).cloned()
}

/// Brings back what was kept before a restart.
pub fn restore(hall: &Hall) -> Result<(), SpoolError> {
    for ip in hall.spool.addresses()? {
        hall.gate.befriend(ip);
    }
    let (now, monotonic) = (hall.clock.now(), hall.clock.monotonic());
    for kept in hall.spool.beats()? {
        let device = DeviceId::Register(kept.register.clone());
        let (Ok(key), Ok(envelope)) = (kept.key.parse(), serde_json::from_str(&kept.envelope)) else { continue };
        match Heartbeat::open(kept.envelope.as_bytes(), &device, &key, &hall.config.limits) {
            Ok(beat) => {
                let earlier = since(now, kept.heard_at);
                let heard = Heard { beat, envelope, key: kept.key, at: monotonic, earlier, forwarded: false };
                hall.state().registers.insert(kept.register, heard);
            }
            Err(e) => tracing::warn!(register = %kept.register, error = %e, "a kept heartbeat is not used"),
        }
    }
    Ok(())
}

/// Forgets registers that the manifest lists no more: nobody waits for them.
pub fn forget_unlisted(hall: &Hall) {
    let gone: Vec<RegisterId> = {
        let mut state = hall.state();
        let Some(manifest) = state.manifest.clone() else { return };
        let gone: Vec<_> = state.registers.keys().filter(|r| !manifest.registers.contains_key(r)).cloned().collect();
        for register in &gone {
            state.registers.remove(register);
        }
        gone
    };
    for register in gone {
        if let Err(e) = hall.spool.forget_beat(&DeviceId::Register(register)) {
            tracing::warn!(error = %e, "a register that is gone stays in relay.db");
        }
    }
}

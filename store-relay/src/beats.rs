//! Heartbeats of registers: verified by the keys in the manifest (an expired one too), kept durably, the latest
//! of each. A register is answered only after its heartbeat is on disk.

use crate::hall::{AtHq, Hall, Heard, Voice};
use crate::spool::{self, KeptBeat, SpoolError};
use proto::clock::since;
use proto::disk;
use proto::dsse::DsseError;
use proto::ids::{DeviceId, RegisterId};
use proto::keys::PublicKey;
use proto::runs::DOUBLE_TOLD;
use proto::trust::Refusal;
use proto::wire::{self, Beat, Beats, Heartbeat, fault};
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
    /// What HQ has of each register that was heard.
    pub passed_on: BTreeMap<RegisterId, u64>,
    /// Registers that count from below what was heard of them, and that number.
    pub go_on_above: BTreeMap<String, u64>,
    /// Whether one was refused because no key of it is known: the manifest may be newer elsewhere.
    pub unknown: bool,
    /// Whether some could not be kept: try again.
    pub failed: bool,
}

/// Takes heartbeats in that came from an address. Blocks on the disk.
pub fn take(hall: &Hall, beats: &Beats, from: IpAddr) -> Taken {
    let mut taken = Taken::default();
    let mut proved = false;
    for (n, beat) in beats.beats.iter().enumerate() {
        match take_one(hall, beat, n) {
            Ok(took) => {
                proved |= took.is_new;
                hall.metrics.beats.inc_by(took.is_new.into());
                if took.behind > 0 {
                    taken.go_on_above.insert(took.register.to_string(), took.behind);
                }
                taken.passed_on.insert(took.register, took.passed_on);
            }
            Err(Refused::Unknown(who, why)) => {
                taken.unknown = true;
                taken.refused.insert(who, why);
            }
            Err(Refused::Older(who, seq, last)) => {
                taken.go_on_above.insert(who.clone(), last);
                let what = if seq == last { "was another heartbeat's".into() } else { format!("is older than {last}") };
                taken.refused.insert(who, format!("number {seq} {what}"));
            }
            Err(Refused::Bad(who, why)) => {
                taken.refused.insert(who, why);
            }
            Err(Refused::TooMany(who)) => {
                taken.failed = true;
                taken.refused.insert(who, "too many heartbeats: again in a while".into());
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

struct Took {
    register: RegisterId,
    /// One that came before (its answer was lost, or somebody copied it) proves nothing, least of all that its register
    /// lives.
    is_new: bool,
    passed_on: u64,
    /// The number that headquarters heard of it, where that is greater; else 0.
    behind: u64,
}

enum Refused {
    Unknown(String, String),
    Bad(String, String),
    Older(String, u64, u64),
    NotKept(String, SpoolError),
    TooMany(String),
}

/// The `n`-th of a post.
fn take_one(hall: &Hall, beat: &Beat, n: usize) -> Result<Took, Refused> {
    let limits = &hall.config.limits;
    let claimed = beat.text(limits).and_then(|envelope| Ok((envelope, beat.claim()?)));
    let (envelope, claim) = claimed.map_err(|e| Refused::Bad(wire::nameless(n), format!("not a heartbeat: {e}")))?;
    let who = claim.device().to_string();
    // 1. Whose key?
    let DeviceId::Register(register) = claim.device().clone() else {
        return Err(Refused::Bad(who, "only registers report here".into()));
    };
    let Some(key) = register_key(hall, &register) else {
        return Err(Refused::Unknown(who, "no key of this register is in the manifest".into()));
    };
    // 2. Signed by it? (The key may have been changed at HQ just now.)
    let heartbeat = claim.open(&key).map_err(|e| match e {
        Refusal::Envelope(DsseError::NotSigned { .. }) => Refused::Unknown(who.clone(), e.to_string()),
        // By its key, and of a form that only a later build reads: no other list would help.
        _ => Refused::Bad(who.clone(), e.to_string()),
    })?;
    note_run(hall, &register, &heartbeat);
    // 3. Newer than the last?
    let key = key.to_string();
    let (last, same, news, at_hq) = {
        let state = hall.state();
        let last = state.registers.get(&register).filter(|h| h.key == key);
        let news = last.is_none_or(|h| differs(&h.beat, &heartbeat));
        let same = last.is_some_and(|h| h.beat == heartbeat);
        (last.map(|h| h.beat.seq), same, news, last.map_or(AtHq::default(), |h| h.at_hq))
    };
    // Another one by the same number is of a copy, or of a register that was set back: it is not heard, either.
    if let Some(last) = last.filter(|last| heartbeat.seq <= *last && !same) {
        return Err(Refused::Older(who, heartbeat.seq, last));
    }
    // 4. No more often than a disk should bear of one machine.
    let is_new = !same;
    let behind = {
        let mut state = hall.state();
        let voice = state.voices.entry(register.clone()).or_default();
        if is_new && !voice.budget.take(hall.clock.monotonic()) {
            return Err(Refused::TooMany(who));
        }
        if heartbeat.seq < voice.heard_at_hq { voice.heard_at_hq } else { 0 }
    };
    if !is_new {
        return Ok(Took { register, is_new, passed_on: at_hq.had, behind });
    }
    // 5. Kept before it is answered.
    let seen_before = Duration::from_secs(beat.seen_s).min(OLDEST);
    let kept = KeptBeat {
        register: register.clone(),
        key: key.clone(),
        seq: heartbeat.seq,
        heard_at: hall.clock.now(),
        envelope,
    };
    let out_of_room = |e: &SpoolError| hall.out_of_room(&e.to_string());
    let keep = || hall.spool.keep_beat(kept.clone());
    let outcome = disk::or_make_room(keep, SpoolError::is_disk_full, out_of_room).or_else(|e| {
        let Some(lost) = hall.spool.begin_anew(&e)? else { return Err(e) };
        if lost {
            hall.event("SPOOL_LOST", "", &format!("{e}; begun anew"));
        }
        keep()
    });
    if let Err(e) = outcome {
        if !e.is_disk_full() {
            hall.own_trouble(e.verdict(), None, spool::FILE, &e.to_string());
        }
        return Err(Refused::NotKept(who, e));
    }
    hall.mended(fault::LOCAL_FILES, spool::FILE);
    let heard = Heard {
        beat: heartbeat,
        envelope: beat.envelope.clone(),
        key,
        at: hall.clock.monotonic(),
        earlier: seen_before,
        at_hq,
    };
    hall.state().registers.insert(register.clone(), heard);
    if news {
        hall.report.notify_one();
    }
    Ok(Took { register, is_new, passed_on: at_hq.had, behind })
}

/// Whoever else holds the register's key is noticed by its heartbeats, also by those whose number is too low.
fn note_run(hall: &Hall, register: &RegisterId, beat: &Heartbeat) {
    let at = hall.clock.monotonic();
    {
        let mut state = hall.state();
        let voice = state.voices.entry(register.clone()).or_default();
        if !voice.runs.hear(beat) {
            return;
        }
        voice.double = Some(at);
    }
    let text = format!("two machines report as {register}: revoke it at headquarters, then enroll it anew");
    hall.fault(fault::IDENTITY_CLONE, None, register.as_str(), text);
}

/// Ends what was told of second machines that have not been heard for long.
pub fn forget_doubles(hall: &Hall) {
    let now = hall.clock.monotonic();
    let over = |v: &mut Voice| v.double.take_if(|at| now.saturating_sub(*at) >= DOUBLE_TOLD).is_some();
    let over: Vec<RegisterId> =
        hall.state().voices.iter_mut().filter_map(|(r, v)| over(v).then(|| r.clone())).collect();
    for register in over {
        hall.mended(fault::IDENTITY_CLONE, register.as_str());
    }
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
                let heard = Heard { beat, envelope, key: kept.key, at: monotonic, earlier, at_hq: AtHq::default() };
                hall.state().registers.insert(kept.register, heard);
            }
            Err(e) => tracing::warn!(register = %kept.register, error = %e, "a kept heartbeat is not used"),
        }
    }
    Ok(())
}

/// Forgets registers that the manifest lists no more: nobody waits for them, nor for the second of them.
pub fn forget_unlisted(hall: &Hall) {
    let (gone, doubles) = {
        let mut state = hall.state();
        let Some(manifest) = state.manifest.clone() else { return };
        let gone: Vec<_> = state.registers.keys().filter(|r| !manifest.registers.contains_key(r)).cloned().collect();
        for register in &gone {
            state.registers.remove(register);
        }
        state.voices.retain(|r, _| manifest.registers.contains_key(r));
        let is_gone = |(code, subject): &&(String, String)| {
            code == fault::IDENTITY_CLONE && !subject.parse().is_ok_and(|r| manifest.registers.contains_key(&r))
        };
        let doubles: Vec<String> = state.faults.keys().filter(is_gone).map(|(_, subject)| subject.clone()).collect();
        (gone, doubles)
    };
    for register in doubles {
        hall.mended(fault::IDENTITY_CLONE, &register);
    }
    for register in gone {
        if let Err(e) = hall.spool.forget_beat(&DeviceId::Register(register)) {
            tracing::warn!(error = %e, "a register that is gone stays in relay.db");
        }
    }
}

//! Heartbeats are proved by the keys of who is enrolled.
//!
//! Owns which keys are remembered. Must never refuse, or believe, by what is only remembered: the ledger looks once more
//! when what they proved is written.

use super::{Intake, OLDEST};
use crate::fleet::{Published, in_lines};
use crate::ledger::{BeatRow, DeviceRow, Enrolments, LedgerError, StoreDevices};
use proto::clock::{Timestamp, before, since};
use proto::ids::{Instance, StoreId, Version};
use proto::wire::{self, Beat, Beats, Fault, Heartbeat, fault};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// So often a post is proved anew where devices were enrolled or revoked meanwhile.
const TRIES: usize = 3;

/// Faults kept of one beat beyond the next.
const COMPLAINTS: usize = 40;

/// The devices of stores that were heard: to read them, and their keys, takes as long as to prove what they say. Whether they
/// are these still, the ledger looks when that is written.
pub(super) struct Keyring {
    /// The ledger's number at which all were these.
    pub(super) at: Enrolments,
    pub(super) of: BTreeMap<StoreId, Arc<[DeviceRow]>>,
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

/// The beats of one request, looked at.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) rows: Vec<BeatRow>,
    /// What each of them says, and how long ago it was heard.
    pub(super) said: Vec<(Heartbeat, Duration)>,
    pub(super) refused: BTreeMap<String, String>,
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

/// The versions that a beat reports, but for those that are known to be published.
fn not_known(beat: &Heartbeat, published: &Published) -> Vec<(Instance, Version)> {
    let is_known = |i: &Instance, v: &Version| published.get(i).and_then(|of| of.get(v)).is_some_and(Option::is_some);
    let held = beat.streams.iter().filter_map(|(i, report)| Some((i, report.version?)));
    held.filter(|(i, v)| !is_known(i, v)).map(|(i, v)| (i.clone(), v)).collect()
}

impl Intake {
    /// Proves beats: the rows to record, what they say, and whose are refused. After so many tries, because devices were
    /// enrolled or revoked while they waited to be written: at last they are, as they were proved.
    pub(super) async fn open_beats(&self, beats: &Beats, now: Timestamp, tries: usize) -> Result<Opened, LedgerError> {
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
                        versions: Vec::new(),
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
        let published = Arc::clone(&self.state().published);
        for (row, (heartbeat, _)) in opened.rows.iter_mut().zip(&opened.said) {
            row.versions = not_known(heartbeat, &published);
            row.proved_at = proved_at;
        }
        Ok(opened)
    }

    /// A beat that is signed by its device's key, with the envelope to keep; or whose it claims to be
    /// and why it is refused.
    #[allow(clippy::type_complexity, reason = "said once, used once")]
    async fn open_beat(
        &self,
        beat: &Beat,
        proof: &mut Proof,
    ) -> Result<Result<(Heartbeat, String), (Option<String>, String)>, LedgerError> {
        let (envelope, claim) = match beat.text(&self.limits).and_then(|envelope| Ok((envelope, beat.claim()?))) {
            Ok(claimed) => claimed,
            Err(e) => return Ok(Err((None, e.to_string()))),
        };
        let id = claim.device();
        let open = |of: &[DeviceRow]| match of.iter().find(|d| &d.id == id) {
            None => Err(format!("{id} is not enrolled")),
            Some(d) if d.revoked_at.is_some() => Err(format!("{id} was revoked")),
            Some(d) => claim.open(&d.key).map_err(|e| e.to_string()),
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

    pub(super) fn keyring(&self) -> std::sync::MutexGuard<'_, Keyring> {
        self.keyring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

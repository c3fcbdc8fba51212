//! What devices and tiers say to each other. The first byte says what the rest is: `h` a heartbeat's payload, `b` a
//! post of heartbeats, `a` its answer, `r` a receipt's payload, `s` a status, `v` versions.

use crate::signed::{KEYS, with_keys};
use hq_publisher::alert;
use hq_publisher::config::AlertsConfig;
use hq_publisher::fleet::{self, DeviceView, Fleet};
use proto::clock::Timestamp;
use proto::dsse::{self, PayloadType};
use proto::ids::DeviceId;
use proto::limits::Limits;
use proto::wire::{Beat, BeatAnswer, Beats, Heartbeat, Receipt, Status, Versions};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Reads, and reads again what it writes.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(data: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(data).ok()?;
    let written = serde_json::to_vec(&read).unwrap();
    assert_eq!(serde_json::from_slice::<T>(&written).unwrap(), read);
    Some(read)
}

pub fn wire(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind {
        b'h' => heartbeat(rest),
        b'b' => beats(rest),
        b'a' => drop(round_trip::<BeatAnswer>(rest)),
        b'r' => receipt(rest),
        b's' => drop(round_trip::<Status>(rest)),
        b'v' => drop(round_trip::<Versions>(rest)),
        _ => {}
    }
}

fn heartbeat(payload: &[u8]) {
    let limits = Limits { heartbeat_bytes: 8192, ..Limits::default() };
    let payload = &with_keys(payload);
    let envelope = dsse::seal(PayloadType::Heartbeat, payload, &[&KEYS[0]]);
    let (own, other): (DeviceId, DeviceId) = ("0421-03".parse().unwrap(), "0421".parse().unwrap());
    let read = round_trip::<Heartbeat>(payload);
    let on_its_way = Beat { envelope: serde_json::from_slice(&envelope).unwrap(), seen_s: 0 };
    assert_eq!(
        on_its_way.text(&limits).ok().as_deref(),
        std::str::from_utf8(&envelope).ok().filter(|t| t.len() <= 8192)
    );
    if let Ok(claim) = on_its_way.claim() {
        assert!(read.as_ref().is_none_or(|r| &r.device == claim.device()));
    }
    let opened = Heartbeat::open(&envelope, &own, &KEYS[0].public(), &limits);
    let good = read.as_ref().filter(|r| r.device == own && r.format == 1 && envelope.len() <= 8192);
    assert_eq!(opened.as_ref().ok(), good);
    assert!(Heartbeat::open(&envelope, &own, &KEYS[1].public(), &limits).is_err(), "another's key");
    if let Ok(beat) = opened {
        assert!(Heartbeat::open(&envelope, &other, &KEYS[0].public(), &limits).is_err(), "another's name");
        judged(beat);
    }
}

/// Headquarters draws conclusions and writes mails: bounded ones, each finding told once, with no line of the
/// device's own making.
fn judged(beat: Heartbeat) {
    let (now, seconds): (Timestamp, _) = ("2026-01-01T00:00:00Z".parse().unwrap(), Duration::from_secs(1));
    let id = beat.device.clone();
    let view = DeviceView {
        id: &id,
        silent_for: Some(seconds),
        watched_for: seconds,
        is_just_back: false,
        stuck_for: None,
        late_for: None,
        is_double: false,
        beat: Some(Arc::new(beat)),
    };
    let (published, alerts) = (BTreeMap::new(), AlertsConfig::default());
    let fleet = Fleet {
        devices: &[view],
        complaints: &[],
        published: &published,
        serials: &BTreeMap::new(),
        expiring: &[],
        own_disk: None,
        deaf_for: Some(Duration::ZERO),
        alerts: &alerts,
        now,
    };
    let due = alert::due(&fleet::assess(&fleet), &[], now);
    assert!(due.open.is_empty() || fleet::calm(&fleet).next().is_none(), "there is something to tell of it");
    assert!(due.close.is_empty());
    for notice in &due.open {
        assert!(!notice.episodes.is_empty());
        assert!(!notice.subject.contains(['\n', '\r']), "a header of its own: {:?}", notice.subject);
    }
}

fn beats(data: &[u8]) {
    let Ok(beats) = Beats::from_body(data) else { return };
    assert_eq!(Beats::from_body(&serde_json::to_vec(&beats).unwrap()).unwrap(), beats);
    let alone: Vec<_> = beats.beats.iter().map(|b| &b.envelope).collect();
    let of_alone = Beats::from_body(&serde_json::to_vec(&alone).unwrap()).unwrap();
    assert!(of_alone.beats.iter().map(|b| &b.envelope).eq(alone) && of_alone.beats.iter().all(|b| b.seen_s == 0));
    for beat in &beats.beats {
        if let Ok(claim) = beat.claim() {
            assert!(claim.open(&KEYS[3].public()).is_err(), "nobody signed it");
        }
    }
}

fn receipt(payload: &[u8]) {
    let limits = Limits::default();
    let payload = &with_keys(payload);
    let envelope = dsse::seal(PayloadType::Receipt, payload, &[&KEYS[0]]);
    let read = round_trip::<Receipt>(payload);
    let opened = Receipt::open(&envelope, &KEYS[0].public(), &limits);
    assert!(Receipt::open(&envelope, &KEYS[1].public(), &limits).is_err());
    if let Ok(receipt) = opened {
        assert_eq!(Some(&receipt), read.as_ref());
        assert_eq!(receipt.format, 1, "a format from the future is taken for ours");
        assert_eq!(Receipt::claimed_store(&envelope, &limits).unwrap(), receipt.store);
    }
}

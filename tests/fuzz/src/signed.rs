//! Envelopes, trust files, manifests, enrolment codes. In a payload `K0` to `K3` stand for public keys, which the
//! fuzzer could not make up, and payloads are sealed here by keys that the input chooses.

use proto::clock::Timestamp;
use proto::dsse::{self, PayloadType};
use proto::ids::StoreId;
use proto::keys::{PublicKey, SecretKey};
use proto::layout::PackKind;
use proto::limits::Limits;
use proto::manifest::{Manifest, PackEntry, StreamEntry};
use proto::trust::{EnrolCode, Refusal, RootKeys, Seen, Trust, TrustState, accept_manifest};
use proto::{chain, ids::Version};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

const NOW: &str = "2026-01-01T00:00:00Z";

pub(crate) static KEYS: LazyLock<[SecretKey; 4]> =
    LazyLock::new(|| [0, 1, 2, 3].map(|n| SecretKey::from_seed([n + 1; 32])));
static PUBLIC: LazyLock<[PublicKey; 4]> = LazyLock::new(|| KEYS.each_ref().map(SecretKey::public));

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

/// The text with keys in place of their names.
pub(crate) fn with_keys(payload: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(payload);
    let named = PUBLIC
        .iter()
        .enumerate()
        .fold(text.into_owned(), |t, (n, k)| t.replace(&format!("\"K{n}\""), &format!("\"{k}\"")));
    named.into_bytes()
}

/// Payloads that key 0 has signed: nothing else may ever open.
pub const SIGNED: [&[u8]; 3] = [b"{}", br#"{"format":1,"store":"0421"}"#, b"\0\xff not JSON"];

/// A signature cannot be made without the key: what opens is what was signed, as the type it was signed as.
pub fn dsse(data: &[u8]) {
    let types = [PayloadType::Trust, PayloadType::Manifest, PayloadType::Heartbeat, PayloadType::Receipt];
    for (n, payload_type) in types.into_iter().enumerate() {
        let opened = dsse::open(data, payload_type, &PUBLIC[..1], 1, 8192);
        if let Ok(payload) = &opened {
            assert!(data.len() <= 8192 && n == 1 && SIGNED.contains(&&payload[..]), "forged: {payload:?}");
        }
        assert!(dsse::open(data, payload_type, &PUBLIC[1..], 1, 8192).is_err(), "by a key that signed nothing");
        assert!(dsse::open(data, payload_type, &PUBLIC[..1], 2, 8192).is_err(), "one key counts once");
    }
    if let Ok(value) = dsse::peek::<serde_json::Value>(data, 8192) {
        let envelope: dsse::Envelope = serde_json::from_slice(data).unwrap();
        let again = serde_json::to_vec(&envelope).unwrap();
        assert_eq!(dsse::peek::<serde_json::Value>(&again, 1 << 20).unwrap(), value);
    }
}

/// The keys of a mask.
fn signers(mask: u8) -> Vec<&'static SecretKey> {
    KEYS.iter().enumerate().filter(|(n, _)| mask & (1 << n) != 0).map(|(_, k)| k).collect()
}

/// Whether enough distinct keys of a list are in the mask.
fn enough(roots: &RootKeys, mask: u8) -> bool {
    let of: BTreeSet<&[u8; 32]> = roots.keys.iter().map(PublicKey::as_bytes).collect();
    let signed = PUBLIC.iter().enumerate().filter(|(n, k)| mask & (1 << n) != 0 && of.contains(k.as_bytes()));
    signed.count() >= roots.threshold.max(1)
}

/// A walk of trust: each line of the input is a step, its first byte a mask of the keys that sign it.
pub fn trust(data: &[u8]) {
    let limits = Limits { trust_bytes: 4096, trust_steps: 8, ..Limits::default() };
    let pinned = RootKeys { threshold: 1, keys: vec![PUBLIC[0].clone()] };
    let (mut state, mut roots) = (TrustState::pinned(pinned.clone(), 1), pinned);
    for line in data.split(|b| *b == b'\n').take(6) {
        let Some((mask, payload)) = line.split_first() else { continue };
        let payload = with_keys(payload);
        let envelope = dsse::seal(PayloadType::Trust, &payload, &signers(*mask));
        if let Ok(claimed) = TrustState::claimed_version(&envelope, &limits)
            && let Ok(steps) = state.steps_to(claimed, &limits)
        {
            assert!(steps.clone().count() as u64 <= limits.trust_steps, "{steps:?}");
            assert_eq!(steps.is_empty(), claimed <= state.version());
        }
        let Ok(next) = state.step(&envelope, &limits) else { continue };
        let file: Trust = serde_json::from_slice(&payload).unwrap();
        assert_eq!((next.version(), next.trust()), (state.version() + 1, Some(&file)));
        assert!(next.epoch() >= state.epoch() && envelope.len() as u64 <= limits.trust_bytes);
        assert!(enough(&roots, *mask) && enough(&file.root, *mask), "too few signed it");
        assert!(
            file.publisher_keys(now()).all(|k| file.publishers.iter().any(|p| &p.key == k && p.expires_at > now()))
        );
        let kept = serde_json::to_vec(&next).unwrap();
        assert_eq!(serde_json::from_slice::<TrustState>(&kept).unwrap(), next);
        assert!(next.step(&envelope, &limits).is_err(), "the same step twice");
        (state, roots) = (next, file.root);
    }
}

/// A device that trusts key 0, in epoch 1.
static TRUSTING: LazyLock<TrustState> = LazyLock::new(|| {
    let file = br#"{"format":1,"version":1,"epoch":1,"created_at":"2025-12-01T00:00:00Z","root":{"threshold":1,"keys":["K0"]},"publishers":[{"key":"K1","expires_at":"2027-01-01T00:00:00Z"},{"key":"K2","expires_at":"2025-12-31T00:00:00Z"}]}"#;
    let envelope = dsse::seal(PayloadType::Trust, &with_keys(file), &[&KEYS[0]]);
    let pinned = RootKeys { threshold: 1, keys: vec![PUBLIC[0].clone()] };
    TrustState::pinned(pinned, 1).step(&envelope, &Limits::default()).unwrap()
});

/// A manifest's payload, sealed by the publisher's key.
pub fn manifest(data: &[u8]) {
    let limits = Limits { pack_bytes: 1 << 30, ..Limits::default() };
    let payload = with_keys(data);
    let taken = Manifest::for_reader(&payload, &limits);
    if let Ok(taken) = &taken {
        assert!(taken.unread.keys().all(|s| taken.lists_stream(s) && !taken.streams.contains_key(s)));
        assert_eq!(taken.tables().len(), taken.streams.len() + taken.unread.len());
        taken.streams.values().for_each(|s| leads_to_its_version(s, &limits));
    }
    // Headquarters takes what readers take whole.
    let read = Manifest::from_payload(&payload, &limits);
    assert_eq!(read.as_ref().ok(), taken.as_ref().ok().filter(|m| m.unread.is_empty()));
    let Ok(read) = read else { return };
    let written = read.to_payload().unwrap();
    assert_eq!(Manifest::from_payload(&written, &limits).as_ref(), Ok(&read));
    assert!(read.registers.keys().all(|r| r.store() == &read.store));
    judged(&payload, &read, &limits);
}

fn judged(payload: &[u8], read: &Manifest, limits: &Limits) {
    let store: StoreId = "0421".parse().unwrap();
    let accept = |key: &SecretKey, store: &StoreId, seen: &Seen| {
        accept_manifest(&dsse::seal(PayloadType::Manifest, payload, &[key]), store, &TRUSTING, seen, now(), limits)
    };
    for stranger in [&KEYS[0], &KEYS[2], &KEYS[3]] {
        assert!(accept(stranger, &store, &Seen::default()).is_err(), "by no publisher of today");
    }
    let good = read.store == store && read.epoch == 1 && read.expires_at > now();
    let accepted = accept(&KEYS[1], &store, &Seen::default());
    assert_eq!(accepted.is_ok(), good, "{accepted:?}");
    let Ok(accepted) = accepted else { return };
    assert!(!accepted.again && *accepted.manifest == *read);
    // A key that signs a time past its own end has ended by that: only a new epoch forgets the time.
    let again = accept(&KEYS[1], &store, &accepted.seen);
    if read.created_at < TRUSTING.trust().unwrap().publishers[0].expires_at {
        assert!(again.is_ok_and(|a| a.again && a.seen == accepted.seen));
    } else {
        assert_eq!(again.unwrap_err().code(), "KEY_EXPIRED");
    }
    assert!(accept(&KEYS[1], &"0815".parse().unwrap(), &Seen::default()).is_err());
    if let Some(serial) = read.serial.checked_add(1) {
        let newer = Seen { serial, floor: None, ..accepted.seen.clone() };
        assert!(matches!(accept(&KEYS[1], &store, &newer), Err(Refusal::OlderSerial { .. })));
    }
}

/// There is a chain to the version, and the cheapest one found is a chain that costs what it should.
fn leads_to_its_version(stream: &StreamEntry, limits: &Limits) {
    let packs = &stream.packs;
    assert!(packs.iter().all(|p| p.bytes <= limits.pack_bytes && p.unpacked <= limits.unpacked_bytes));
    // Least bytes to each version, by going through all packs until nothing changes.
    let least = |from: Option<Version>| {
        let mut cost: BTreeMap<Option<Version>, u128> = from.map(|f| (Some(f), 0)).into_iter().collect();
        loop {
            let before = cost.clone();
            for p in packs.iter().filter(|p| from.is_none_or(|f| p.version > f)) {
                let base = if p.kind == PackKind::Full { Some(0) } else { cost.get(&p.base).copied() };
                if let Some(base) = base {
                    let sum = base + u128::from(p.bytes);
                    let known = cost.entry(Some(p.version)).or_insert(sum);
                    *known = sum.min(*known);
                }
            }
            if cost == before {
                return cost;
            }
        }
    };
    let starts = std::iter::once(None).chain(packs.iter().take(5).map(|p| Some(p.version)));
    for from in starts {
        let wanted =
            if from == Some(stream.version) { Some(0) } else { least(from).get(&Some(stream.version)).copied() };
        let way = chain::cheapest(packs, from, stream.version, |_| true);
        assert_eq!(way.as_ref().map(|w| w.iter().map(|p| u128::from(p.bytes)).sum()), wanted, "from {from:?}");
        way.into_iter().for_each(|w| is_chain(&w, from, stream.version));
    }
    assert!(least(None).contains_key(&Some(stream.version)));
}

fn is_chain(way: &[&PackEntry], from: Option<Version>, to: Version) {
    let end = way.iter().fold(from, |at, p| {
        assert!(p.kind == PackKind::Full || p.base == at, "{p:?} does not start at {at:?}");
        Some(p.version)
    });
    assert_eq!(end, Some(to));
}

/// Enrolment codes. An input that begins with `{` is put into base64 first.
pub fn code(data: &[u8]) {
    use base64::Engine as _;
    let Ok(text) = std::str::from_utf8(data) else { return };
    let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let text = if text.starts_with('{') { engine.encode(with_keys(data)) } else { text.to_owned() };
    let Ok(code) = EnrolCode::from_text(&text, now()) else { return };
    assert!(code.format == 1 && code.expires_at > now());
    let again = EnrolCode::from_text(&code.to_text().unwrap(), now()).unwrap();
    let all = |c: &EnrolCode| serde_json::to_value(c).unwrap();
    assert_eq!(all(&again), all(&code));
    // What is pinned must be able to check anything at all, and a device must be able to sign.
    assert!(code.key().is_ok(), "a seed that is no key is taken: {}", code.seed);
    let distinct: BTreeSet<&[u8; 32]> = code.roots.keys.iter().map(PublicKey::as_bytes).collect();
    assert!((1..=distinct.len()).contains(&code.roots.threshold), "a threshold that is never met is taken");
    TrustState::pinned(code.roots, code.trust_version);
}

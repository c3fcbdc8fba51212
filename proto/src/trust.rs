//! Who may sign, and what a signature proves. The only maker of [`Verified`].
//!
//! Root keys are pinned when a device is enrolled; from there it walks `trust/N.json` to N+1, each
//! signed by a threshold of the root keys before it (and of its own, when they change). Nothing
//! here writes: the caller saves what a check returns in one durable transaction after the last
//! check, so that a power cut leaves the state before or after.

use crate::clock::Timestamp;
use crate::digest::Sha256;
use crate::dsse::{self, DsseError, PayloadType};
use crate::ids::{BadName, DeviceId, StoreId, StreamName};
use crate::keys::{PublicKey, SecretKey};
use crate::limits::Limits;
use crate::manifest::{Manifest, ManifestError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The trust format that this build reads and writes.
pub const FORMAT: u32 = 1;

/// The offline keys, and how many must sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootKeys {
    /// Signatures by distinct keys that are needed.
    pub threshold: usize,
    /// The keys.
    pub keys: Vec<PublicKey>,
}

impl RootKeys {
    /// Whether so many keys can sign at all, and at least one must.
    fn check(&self) -> Result<(), String> {
        let mut keys: Vec<_> = self.keys.iter().map(PublicKey::as_bytes).collect();
        keys.sort_unstable();
        keys.dedup();
        if (1..=keys.len().min(dsse::MAX_SIGNATURES)).contains(&self.threshold) {
            return Ok(());
        }
        let (wanted, keys, most) = (self.threshold, keys.len(), dsse::MAX_SIGNATURES);
        Err(format!("a threshold of {wanted} with {keys} distinct root keys; {most} signatures are read at most"))
    }
}

/// A key that may sign manifests, until a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublisherKey {
    /// The key.
    pub key: PublicKey,
    /// After this its manifests are refused, UTC.
    pub expires_at: Timestamp,
}

/// The content of `trust.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// [`FORMAT`].
    pub format: u32,
    /// Rises by one with each trust file.
    pub version: u64,
    /// A higher one makes readers forget the serials and versions seen before.
    pub epoch: u64,
    /// When it was signed, UTC.
    pub created_at: Timestamp,
    /// Who signs trust files.
    pub root: RootKeys,
    /// Who signs manifests.
    pub publishers: Vec<PublisherKey>,
    /// The streams that manifests may list; where none are named, any.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub streams: BTreeSet<StreamName>,
}

/// Why something signed was refused. `code()` is for programs and logs, the text for people.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The envelope or its signatures.
    #[error("{0}")]
    Envelope(#[from] DsseError),
    /// The manifest's content.
    #[error("{0}")]
    Manifest(#[from] ManifestError),
    /// The trust file's content.
    #[error("trust file: {0}")]
    Trust(String),
    /// Another store's manifest.
    #[error("the manifest is of store {found}, not {wanted}")]
    OtherStore {
        /// Whose it is.
        found: StoreId,
        /// Whose was asked for.
        wanted: StoreId,
    },
    /// A manifest of another epoch.
    #[error("the manifest is of epoch {found}, trust is at epoch {trusted}")]
    OtherEpoch {
        /// The manifest's.
        found: u64,
        /// The trust file's.
        trusted: u64,
    },
    /// A serial that went back.
    #[error("the manifest has serial {found}, lower than {seen} seen before")]
    OlderSerial {
        /// The manifest's.
        found: u64,
        /// The greatest seen.
        seen: u64,
    },
    /// Two manifests with one serial.
    #[error("the manifest has serial {0} again, with other content")]
    SameSerialOtherBytes(u64),
    /// Too old to be accepted anew.
    #[error("the manifest expired at {expired} (it is {now})")]
    Expired {
        /// Its end.
        expired: Timestamp,
        /// The time it was judged at.
        now: Timestamp,
    },
    /// Signed by a publisher's key that has ended: no forgery.
    #[error(
        "the key {key} that signed the manifest expired at {expired} (it is {now}{})",
        by_floor(.now, .clock)
    )]
    KeyExpired {
        /// The key's id.
        key: String,
        /// Its end.
        expired: Timestamp,
        /// The time it was judged at.
        now: Timestamp,
        /// The system's clock, where that is earlier.
        clock: Timestamp,
    },
    /// A walk of more steps than the limit.
    #[error("trust is {steps} versions ahead, over limits.trust_steps = {limit}")]
    TooManySteps {
        /// Steps to go.
        steps: u64,
        /// The limit.
        limit: u64,
    },
    /// An enrolment code that cannot be used.
    #[error("enrolment code: {0}")]
    Code(String),
}

fn by_floor(now: &Timestamp, clock: &Timestamp) -> &'static str {
    if now > clock { ", by the latest time that was signed" } else { "" }
}

impl Refusal {
    /// A stable name of the reason, for logs, JSON and alerts.
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::Envelope(DsseError::TooLong { .. }) => "TOO_LONG",
            Refusal::Envelope(DsseError::NotAnEnvelope(_)) => "NOT_AN_ENVELOPE",
            Refusal::Envelope(DsseError::OtherType { .. }) => "OTHER_PAYLOAD_TYPE",
            Refusal::Envelope(DsseError::NotSigned { .. }) => "BAD_SIGNATURE",
            Refusal::Manifest(ManifestError::UnknownFormat(_)) => "UNKNOWN_FORMAT",
            Refusal::Manifest(_) => "BAD_MANIFEST",
            Refusal::Trust(_) => "BAD_TRUST",
            Refusal::OtherStore { .. } => "OTHER_STORE",
            Refusal::OtherEpoch { .. } => "OTHER_EPOCH",
            Refusal::OlderSerial { .. } => "OLDER_SERIAL",
            Refusal::SameSerialOtherBytes(_) => "SAME_SERIAL_OTHER_BYTES",
            Refusal::Expired { .. } => "EXPIRED",
            Refusal::KeyExpired { .. } => "KEY_EXPIRED",
            Refusal::TooManySteps { .. } => "TOO_MANY_TRUST_STEPS",
            Refusal::Code(_) => "BAD_CODE",
        }
    }
}

/// Something whose signature and rules were checked, with the envelope it came in. Only this
/// room makes one; the device's own database gives back what was once made here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T> {
    value: T,
    envelope: Vec<u8>,
}

impl<T> Verified<T> {
    /// What was signed.
    pub fn get(&self) -> &T {
        &self.value
    }
    /// The envelope's bytes as they came, to be served on.
    pub fn envelope(&self) -> &[u8] {
        &self.envelope
    }
}

impl<T> std::ops::Deref for Verified<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl Verified<Manifest> {
    /// A manifest that this device accepted before and kept in its own database: its signer may
    /// have been revoked since, but what was accepted may be finished.
    pub(crate) fn accepted_before(
        envelope: Vec<u8>,
        trust: Option<&Trust>,
        seen: &Seen,
        limits: &Limits,
    ) -> Result<Self, Refusal> {
        let payload = dsse::peek_payload(&envelope, limits.manifest_bytes)?;
        if seen.payload != Some(Sha256::of(&payload)) {
            return Err(Refusal::SameSerialOtherBytes(seen.serial));
        }
        let read = Manifest::for_reader(&payload, limits)?;
        let value = match trust {
            Some(trust) => trust.admit(read),
            None => read,
        };
        Ok(Verified { value, envelope })
    }
}

impl Trust {
    fn from_payload(payload: &[u8]) -> Result<Trust, Refusal> {
        let trust: Trust = serde_json::from_slice(payload).map_err(|e| Refusal::Trust(e.to_string()))?;
        if trust.format != FORMAT {
            return Err(Refusal::Trust(format!(
                "format {}; this build reads format {FORMAT}: update this program",
                trust.format
            )));
        }
        if trust.version == 0 || trust.epoch == 0 {
            return Err(Refusal::Trust(format!(
                "version {}, epoch {}: versions and epochs begin at 1",
                trust.version, trust.epoch
            )));
        }
        trust.root.check().map_err(Refusal::Trust)?;
        Ok(trust)
    }

    /// Signs a trust file with root keys; the envelope's bytes.
    pub fn sign(&self, roots: &[&SecretKey]) -> Result<Vec<u8>, Refusal> {
        let payload = serde_json::to_vec(self).map_err(|e| Refusal::Trust(e.to_string()))?;
        Ok(dsse::seal(PayloadType::Trust, &payload, roots))
    }

    /// Why a manifest may not list a stream, if it may not.
    pub fn denies(&self, stream: &StreamName) -> Option<String> {
        let is_denied = !self.streams.is_empty() && !self.streams.contains(stream);
        is_denied.then(|| format!("trust file {} does not name it among the streams that lists may have", self.version))
    }

    /// A manifest as it is to be read: streams that it may not list are left unread, so that what is held of them stays.
    fn admit(&self, mut manifest: Manifest) -> Manifest {
        let denied: Vec<_> = manifest.streams.keys().filter_map(|s| Some((s.clone(), self.denies(s)?))).collect();
        for (stream, why) in denied {
            manifest.streams.remove(&stream);
            manifest.unread.insert(stream, why);
        }
        manifest
    }

    /// The key that may sign at this time, of those in the file.
    pub fn publisher_keys(&self, now: Timestamp) -> impl Iterator<Item = &PublicKey> {
        self.publishers.iter().filter(move |p| now < p.expires_at).map(|p| &p.key)
    }

    /// The key of the file that signed a manifest after its end, if one did.
    fn ended_signer(&self, envelope: &[u8], now: Timestamp, limits: &Limits) -> Option<&PublisherKey> {
        let signed =
            |p: &PublisherKey| dsse::open(envelope, PayloadType::Manifest, [&p.key], 1, limits.manifest_bytes).is_ok();
        self.publishers.iter().find(|p| p.expires_at <= now && signed(p))
    }
}

/// How far a reader has walked: the root keys to check the next file by, and the last file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustState {
    /// Who must sign the next file.
    roots: RootKeys,
    /// The version to read next, less one.
    version: u64,
    /// The last file checked; none right after enrolment.
    trust: Option<Trust>,
}

impl TrustState {
    /// A reader that knows the pinned root keys and where to begin, and nothing else.
    pub fn pinned(roots: RootKeys, first_version: u64) -> Self {
        TrustState { roots, version: first_version.saturating_sub(1), trust: None }
    }
    /// The root keys that sign the next file.
    pub fn roots(&self) -> &RootKeys {
        &self.roots
    }
    /// The version of the last file checked.
    pub fn version(&self) -> u64 {
        self.version
    }
    /// The last file checked.
    pub fn trust(&self) -> Option<&Trust> {
        self.trust.as_ref()
    }
    /// The epoch of the last file checked; 0 before the first.
    pub fn epoch(&self) -> u64 {
        self.trust.as_ref().map_or(0, |t| t.epoch)
    }

    /// The version that a `trust.json` claims, to know how far to walk. Not checked yet: it only
    /// bounds the walk.
    pub fn claimed_version(envelope: &[u8], limits: &Limits) -> Result<u64, Refusal> {
        #[derive(Deserialize)]
        struct Claim {
            version: u64,
        }
        Ok(dsse::peek::<Claim>(envelope, limits.trust_bytes)?.version)
    }

    /// The versions to read, in order, to get to what `trust.json` claims. Empty when it claims
    /// no more than what is known (an older copy, a stale cache).
    pub fn steps_to(&self, claimed: u64, limits: &Limits) -> Result<std::ops::RangeInclusive<u64>, Refusal> {
        let steps = claimed.saturating_sub(self.version);
        if steps > limits.trust_steps {
            return Err(Refusal::TooManySteps { steps, limit: limits.trust_steps });
        }
        Ok(self.version.saturating_add(1)..=claimed)
    }

    /// What trust file `n` says by a threshold of its own root keys: one of a chain whose beginning is not
    /// known here. Whether it leads to the next, [`TrustState::step`] says.
    pub fn of_file(n: u64, envelope: &[u8], limits: &Limits) -> Result<TrustState, Refusal> {
        let trust = Trust::from_payload(&dsse::peek_payload(envelope, limits.trust_bytes)?)?;
        if trust.version != n {
            return Err(Refusal::Trust(format!("version {} under the number {n}", trust.version)));
        }
        TrustState::pinned(trust.root, n).step(envelope, limits)
    }

    /// Takes the next trust file: signed by a threshold of the known root keys and of its own,
    /// version exactly one higher, epoch not lower.
    pub fn step(&self, envelope: &[u8], limits: &Limits) -> Result<TrustState, Refusal> {
        let max = limits.trust_bytes;
        let payload = dsse::open(envelope, PayloadType::Trust, &self.roots.keys, self.roots.threshold, max)?;
        let trust = Trust::from_payload(&payload)?;
        dsse::open(envelope, PayloadType::Trust, &trust.root.keys, trust.root.threshold, max)?;
        if self.version.checked_add(1) != Some(trust.version) {
            return Err(Refusal::Trust(format!("version {} after version {}", trust.version, self.version)));
        }
        if trust.epoch < self.epoch() {
            return Err(Refusal::Trust(format!("epoch {} after epoch {}", trust.epoch, self.epoch())));
        }
        Ok(TrustState { roots: trust.root.clone(), version: trust.version, trust: Some(trust) })
    }
}

/// The greatest serial that a reader accepted, in which epoch, and the time it can rely on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The epoch that the rest belongs to.
    pub epoch: u64,
    /// The greatest serial accepted.
    pub serial: u64,
    /// Hash of that manifest's payload.
    pub payload: Option<Sha256>,
    /// The latest time signed by a publisher key: time is never earlier.
    pub floor: Option<Timestamp>,
}

impl Seen {
    /// What was seen, as it counts in an epoch: a new one forgets all.
    fn in_epoch(&self, epoch: u64) -> Seen {
        if self.epoch == epoch { self.clone() } else { Seen { epoch, ..Seen::default() } }
    }

    /// The later of the system's clock and the latest signed time of the epoch.
    pub fn time(&self, epoch: u64, clock: Timestamp) -> Timestamp {
        self.in_epoch(epoch).floor.map_or(clock, |f| f.max(clock))
    }
}

/// A manifest that passed every check, and what is to be remembered with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The manifest.
    pub manifest: Verified<Manifest>,
    /// What to remember, in the same transaction.
    pub seen: Seen,
    /// Whether it is the one accepted before.
    pub again: bool,
}

/// Checks a manifest for a store, in the order of docs/FORMAT.md: signature, store,
/// epoch, serial, expiry. `clock` is the system's time.
pub fn accept_manifest(
    envelope: &[u8],
    store: &StoreId,
    state: &TrustState,
    seen: &Seen,
    clock: Timestamp,
    limits: &Limits,
) -> Result<Accepted, Refusal> {
    let trust = state.trust().ok_or_else(|| Refusal::Trust("no trust file was read yet".into()))?;
    let now = seen.time(trust.epoch, clock);
    let seen = seen.in_epoch(trust.epoch);
    // 1. Signed by a publisher key of today.
    let opened = dsse::open(envelope, PayloadType::Manifest, trust.publisher_keys(now), 1, limits.manifest_bytes);
    let payload = opened.map_err(|e| match trust.ended_signer(envelope, now, limits) {
        Some(p) => Refusal::KeyExpired { key: p.key.id(), expired: p.expires_at, now, clock },
        None => e.into(),
    })?;
    let manifest = trust.admit(Manifest::for_reader(&payload, limits)?);
    // 2. For this store, in this epoch.
    if &manifest.store != store {
        return Err(Refusal::OtherStore { found: manifest.store, wanted: store.clone() });
    }
    if manifest.epoch != trust.epoch {
        return Err(Refusal::OtherEpoch { found: manifest.epoch, trusted: trust.epoch });
    }
    // 3. Not older than what was seen, nor the same number with other content.
    let hash = Sha256::of(&payload);
    if manifest.serial < seen.serial {
        return Err(Refusal::OlderSerial { found: manifest.serial, seen: seen.serial });
    }
    let again = manifest.serial == seen.serial && seen.payload.is_some();
    if again && seen.payload != Some(hash) {
        return Err(Refusal::SameSerialOtherBytes(manifest.serial));
    }
    // 4. Expiry is judged when a serial is accepted; what was accepted may be finished.
    if !again && manifest.expires_at <= now {
        return Err(Refusal::Expired { expired: manifest.expires_at, now });
    }
    let floor = Some(seen.floor.map_or(manifest.created_at, |f| f.max(manifest.created_at)));
    let seen = Seen { epoch: trust.epoch, serial: manifest.serial, payload: Some(hash), floor };
    Ok(Accepted { manifest: Verified { value: manifest, envelope: envelope.to_vec() }, seen, again })
}

/// Signs a manifest; the envelope's bytes.
pub fn sign_manifest(manifest: &Manifest, key: &SecretKey) -> Result<Vec<u8>, Refusal> {
    let payload = manifest.to_payload().map_err(|e| ManifestError::NotAManifest(e.to_string()))?;
    Ok(dsse::seal(PayloadType::Manifest, &payload, &[key]))
}

/// What a device needs to begin: who it is, whom it trusts, its key. Printed once by HQ.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EnrolCode {
    /// 1.
    pub format: u32,
    /// The device.
    pub id: DeviceId,
    /// The seed of the device's key, 64 hex digits: a secret.
    pub seed: String,
    /// The root keys to pin.
    pub roots: RootKeys,
    /// The trust file to begin at.
    pub trust_version: u64,
    /// After this the code is refused, UTC.
    pub expires_at: Timestamp,
}

impl EnrolCode {
    /// The code as text: base64url of its JSON, without padding.
    pub fn to_text(&self) -> Result<String, Refusal> {
        use base64::Engine as _;
        let json = serde_json::to_vec(self).map_err(|e| Refusal::Code(e.to_string()))?;
        Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json))
    }

    /// Reads a code and refuses one that is of another format or expired.
    pub fn from_text(text: &str, now: Timestamp) -> Result<Self, Refusal> {
        use base64::Engine as _;
        let json = base64::engine::general_purpose::URL_SAFE_NO_PAD
            .decode(text.trim())
            .map_err(|e| Refusal::Code(format!("it was not copied whole: {e}")))?;
        let code: EnrolCode =
            serde_json::from_slice(&json).map_err(|e| Refusal::Code(format!("it was not copied whole: {e}")))?;
        if code.format != 1 {
            return Err(Refusal::Code(format!("format {} is not known: update this program", code.format)));
        }
        code.roots.check().map_err(Refusal::Code)?;
        code.key()?;
        if code.expires_at <= now {
            return Err(Refusal::Code(format!(
                "it expired at {}; make a new one with `hq-publisher enroll {}`",
                code.expires_at, code.id
            )));
        }
        Ok(code)
    }

    /// The device's key.
    pub fn key(&self) -> Result<SecretKey, Refusal> {
        self.seed.parse().map_err(|e: crate::keys::BadKey| Refusal::Code(e.to_string()))
    }
}

impl From<BadName> for Refusal {
    fn from(e: BadName) -> Self {
        Refusal::Code(e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::after;
    use std::collections::BTreeMap;
    use std::time::Duration;

    const DAY: Duration = Duration::from_secs(86_400);

    fn t0() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }
    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed([n; 32])
    }
    fn roots(keys: &[u8], threshold: usize) -> RootKeys {
        RootKeys { threshold, keys: keys.iter().map(|n| key(*n).public()).collect() }
    }
    fn trust(version: u64, epoch: u64, root: RootKeys, publishers: &[u8]) -> Trust {
        let publishers = publishers
            .iter()
            .map(|n| PublisherKey { key: key(*n).public(), expires_at: after(t0(), 365 * DAY) })
            .collect();
        Trust { format: 1, version, epoch, created_at: t0(), root, publishers, streams: BTreeSet::new() }
    }
    fn manifest(serial: u64) -> Manifest {
        Manifest {
            format: 1,
            store: "0421".parse().unwrap(),
            serial,
            epoch: 1,
            created_at: t0(),
            expires_at: after(t0(), 30 * DAY),
            streams: BTreeMap::new(),
            relay: None,
            registers: BTreeMap::new(),
            unread: BTreeMap::new(),
        }
    }
    fn state(t: Trust, signers: &[u8]) -> Result<TrustState, Refusal> {
        let keys: Vec<_> = signers.iter().map(|n| key(*n)).collect();
        let bytes = t.sign(&keys.iter().collect::<Vec<_>>()).unwrap();
        TrustState::pinned(roots(&[1], 1), t.version).step(&bytes, &Limits::default())
    }
    fn walked() -> TrustState {
        state(trust(1, 1, roots(&[1], 1), &[10]), &[1]).unwrap()
    }
    fn accept(m: &Manifest, signer: u8, seen: &Seen, now: Timestamp) -> Result<Accepted, Refusal> {
        let bytes = sign_manifest(m, &key(signer)).unwrap();
        accept_manifest(&bytes, &"0421".parse().unwrap(), &walked(), seen, now, &Limits::default())
    }
    fn code<T: std::fmt::Debug>(r: Result<T, Refusal>) -> &'static str {
        r.unwrap_err().code()
    }

    /// An extra stream, of whoever signs.
    #[test]
    fn a_stream_that_root_keys_did_not_allow_is_left_unread() {
        let entry = || {
            let entry = serde_json::json!({"audience": "all", "version": 1, "schema": 1, "digests": {}, "packs": [
                {"version": 1, "kind": "full", "bytes": 9, "unpacked": 9, "sha256": "ab".repeat(32)}]});
            serde_json::from_value(entry).unwrap()
        };
        let streams = ["extra", "price"].map(|s: &str| (s.parse().unwrap(), entry()));
        let list = Manifest { streams: BTreeMap::from(streams), ..manifest(1) };
        let allowing = |names: &[&str]| {
            let streams = names.iter().map(|s| s.parse().unwrap()).collect();
            let of = Trust { streams, ..trust(1, 1, roots(&[1], 1), &[10]) };
            let bytes = sign_manifest(&list, &key(10)).unwrap();
            let (store, state) = (list.store.clone(), state(of, &[1]).unwrap());
            let accepted = accept_manifest(&bytes, &store, &state, &Seen::default(), t0(), &Limits::default()).unwrap();
            // As it is read again by the next start.
            let seen = &accepted.seen;
            let again = Verified::accepted_before(bytes, state.trust(), seen, &Limits::default()).unwrap();
            assert_eq!(again, accepted.manifest);
            again.value
        };
        assert_eq!(allowing(&[]), list, "where none are named, any may be listed");
        assert_eq!(allowing(&["extra", "price", "tax"]), list);
        let read = allowing(&["price"]);
        assert_eq!(read.streams.keys().map(|s| s.as_str()).collect::<Vec<_>>(), ["price"]);
        let why = "trust file 1 does not name it among the streams that lists may have";
        assert_eq!(read.unread, BTreeMap::from([("extra".parse().unwrap(), why.to_owned())]));
    }

    #[test]
    fn a_threshold_is_one_that_can_be_met() {
        let many: Vec<u8> = (1..=20).collect();
        for (keys, threshold, holds) in [
            (&many[..1], 1, true),
            (&many, 16, true),
            (&many, 0, false),
            (&many[..2], 3, false),
            (&[1, 1], 2, false),
            (&many, 17, false),
        ] {
            assert_eq!(roots(keys, threshold).check().is_ok(), holds, "{threshold} of {}", keys.len());
        }
    }

    #[test]
    fn a_manifest_is_refused_for_each_reason() {
        let none = Seen::default();
        let seen = accept(&manifest(5), 10, &none, t0()).unwrap().seen;
        assert_eq!(code(accept(&manifest(5), 11, &none, t0())), "BAD_SIGNATURE");
        assert_eq!(
            code(accept(&Manifest { store: "0999".parse().unwrap(), ..manifest(5) }, 10, &none, t0())),
            "OTHER_STORE"
        );
        assert_eq!(code(accept(&Manifest { epoch: 2, ..manifest(5) }, 10, &none, t0())), "OTHER_EPOCH");
        assert_eq!(code(accept(&manifest(4), 10, &seen, t0())), "OLDER_SERIAL");
        let other = Manifest { relay: Some(key(3).public()), ..manifest(5) };
        assert_eq!(code(accept(&other, 10, &seen, t0())), "SAME_SERIAL_OTHER_BYTES");
        assert_eq!(code(accept(&manifest(5), 10, &none, after(t0(), 31 * DAY))), "EXPIRED");
        assert_eq!(code(accept(&Manifest { format: 2, ..manifest(5) }, 10, &none, t0())), "UNKNOWN_FORMAT");
        assert!(
            accept(&manifest(5), 10, &seen, after(t0(), 31 * DAY)).unwrap().again,
            "what was accepted may be finished"
        );
        assert_eq!(code(accept(&Manifest { epoch: 0, ..manifest(5) }, 10, &none, t0())), "BAD_MANIFEST");
    }

    #[test]
    fn a_key_that_has_ended_is_told_from_a_forgery() {
        let none = Seen::default();
        let late = after(t0(), 400 * DAY);
        let e = accept(&manifest(5), 10, &none, late).unwrap_err();
        assert_eq!(e.code(), "KEY_EXPIRED");
        let told = e.to_string();
        let id = key(10).public().id();
        assert!(told.contains(&format!("the key {id} that signed the manifest expired at 2027-01-01")), "{told}");
        assert!(told.ends_with("(it is 2027-02-05T00:00:00Z)"), "{told}");
        // A clock that is right, after a manifest that was not.
        let jumped = Seen { epoch: 1, floor: Some(late), ..Seen::default() };
        let told = accept(&manifest(5), 10, &jumped, t0()).unwrap_err().to_string();
        assert!(told.ends_with("(it is 2027-02-05T00:00:00Z, by the latest time that was signed)"), "{told}");
        assert_eq!(code(accept(&manifest(5), 11, &none, late)), "BAD_SIGNATURE");
    }

    #[test]
    fn versions_and_epochs_begin_at_one() {
        for (version, epoch) in [(0, 1), (1, 0), (0, 0)] {
            let e = state(trust(version, epoch, roots(&[1], 1), &[10]), &[1]).unwrap_err();
            assert!(e.code() == "BAD_TRUST" && e.to_string().contains("begin at 1"), "{e}");
        }
    }

    #[test]
    fn time_never_goes_behind_a_signed_time() {
        let seen = accept(&manifest(5), 10, &Seen::default(), t0()).unwrap().seen;
        let old = Manifest { expires_at: t0(), ..manifest(6) };
        assert_eq!(code(accept(&old, 10, &seen, "1970-01-01T00:00:00Z".parse().unwrap())), "EXPIRED");
    }

    #[test]
    fn trust_walks_one_by_one_with_rotation_of_roots() {
        let limits = Limits::default();
        let one = walked();
        let sign = |t: &Trust, by: &[u8]| {
            let keys: Vec<_> = by.iter().map(|n| key(*n)).collect();
            t.sign(&keys.iter().collect::<Vec<_>>()).unwrap()
        };
        let two = trust(2, 1, roots(&[2, 3], 2), &[11]);
        assert_eq!(code(one.step(&sign(&two, &[2, 3]), &limits)), "BAD_SIGNATURE", "not by the old root");
        assert_eq!(code(one.step(&sign(&two, &[1, 2]), &limits)), "BAD_SIGNATURE", "not by enough new roots");
        let at_two = one.step(&sign(&two, &[1, 2, 3]), &limits).unwrap();
        assert_eq!(code(at_two.step(&sign(&two, &[1, 2, 3]), &limits)), "BAD_TRUST", "the same again");
        assert_eq!(code(one.step(&sign(&trust(3, 1, roots(&[1], 1), &[]), &[1]), &limits)), "BAD_TRUST", "a gap");
        let back = trust(3, 0, roots(&[2, 3], 2), &[]);
        assert_eq!(code(at_two.step(&sign(&back, &[2, 3]), &limits)), "BAD_TRUST", "an epoch that falls");
        assert_eq!(one.steps_to(4, &limits).unwrap().collect::<Vec<_>>(), [2, 3, 4]);
        assert!(one.steps_to(0, &limits).unwrap().is_empty());
        assert_eq!(code(one.steps_to(5000, &limits)), "TOO_MANY_TRUST_STEPS");
    }

    #[test]
    fn a_file_in_the_midst_of_a_chain_is_right_by_its_own_roots_and_leads_to_the_next() {
        let limits = Limits::default();
        let sign = |t: &Trust, by: &[u8]| {
            let keys: Vec<_> = by.iter().map(|n| key(*n)).collect();
            t.sign(&keys.iter().collect::<Vec<_>>()).unwrap()
        };
        let two = trust(2, 1, roots(&[2], 1), &[11]);
        let three = sign(&trust(3, 1, roots(&[3], 1), &[12]), &[2, 3]);
        let link = TrustState::of_file(2, &sign(&two, &[1, 2]), &limits).unwrap();
        assert_eq!(link.trust(), Some(&two));
        assert_eq!(link.step(&three, &limits).unwrap(), TrustState::of_file(3, &three, &limits).unwrap());
        assert_eq!(code(TrustState::of_file(2, &sign(&two, &[1]), &limits)), "BAD_SIGNATURE", "not by its own root");
        assert_eq!(code(TrustState::of_file(4, &three, &limits)), "BAD_TRUST", "under another number");
        let one = sign(&trust(1, 1, roots(&[1], 1), &[10]), &[1]);
        assert_eq!(code(TrustState::of_file(0, &one, &limits)), "BAD_TRUST", "files begin at 1");
        assert_eq!(code(TrustState::of_file(2, &three[1..], &limits)), "NOT_AN_ENVELOPE");
        let other = TrustState::of_file(2, &sign(&trust(2, 1, roots(&[66], 1), &[11]), &[66]), &limits).unwrap();
        assert_eq!(code(other.step(&three, &limits)), "BAD_SIGNATURE", "right by itself, and leads nowhere");
    }

    #[test]
    fn a_new_epoch_forgets_a_serial_that_jumped_ahead() {
        let limits = Limits::default();
        let seen = accept(&manifest(u64::MAX), 10, &Seen::default(), t0()).unwrap().seen;
        assert_eq!(code(accept(&manifest(6), 10, &seen, t0())), "OLDER_SERIAL");
        let next = trust(2, 2, roots(&[1], 1), &[12]).sign(&[&key(1)]).unwrap();
        let state = walked().step(&next, &limits).unwrap();
        let bytes = sign_manifest(&Manifest { epoch: 2, ..manifest(6) }, &key(12)).unwrap();
        let store = "0421".parse().unwrap();
        let accepted = accept_manifest(&bytes, &store, &state, &seen, t0(), &limits).unwrap();
        assert_eq!(accepted.seen.serial, 6);
        let stolen = sign_manifest(&Manifest { epoch: 2, ..manifest(7) }, &key(10)).unwrap();
        assert_eq!(code(accept_manifest(&stolen, &store, &state, &seen, t0(), &limits)), "BAD_SIGNATURE");
    }

    #[test]
    fn codes_end_and_half_codes_are_told() {
        let c = EnrolCode {
            format: 1,
            id: "0421-03".parse().unwrap(),
            seed: key(9).to_secret_text(),
            roots: roots(&[1], 1),
            trust_version: 1,
            expires_at: after(t0(), DAY),
        };
        let text = c.to_text().unwrap();
        assert_eq!(EnrolCode::from_text(&text, t0()).unwrap().id, c.id);
        assert!(EnrolCode::from_text(&text[..text.len() - 7], t0()).is_err());
        let e = EnrolCode::from_text(&EnrolCode { format: 2, ..c.clone() }.to_text().unwrap(), t0()).unwrap_err();
        assert!(e.to_string().contains("format 2 is not known"), "{e}");
        assert!(
            EnrolCode::from_text(&text, after(t0(), DAY))
                .unwrap_err()
                .to_string()
                .contains("hq-publisher enroll 0421-03")
        );
    }
}

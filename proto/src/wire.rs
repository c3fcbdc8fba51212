//! What tiers say to each other besides objects: heartbeats, their answers, receipts of imports,
//! the list of versions, and the report of `status --json`.

use crate::clock::Timestamp;
use crate::digest::StateDigest;
use crate::dsse::{self, PayloadType};
use crate::ids::{DeviceId, Instance, RegisterId, StoreId, StreamName, TableName, Version};
use crate::keys::{PublicKey, SecretKey};
use crate::limits::Limits;
use crate::manifest::Manifest;
use crate::replica::Held;
use crate::trust::Refusal;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::sync::Arc;

/// The versions that a relay serves, `{"price@zone-east":57,…}`: the body of `/v1/versions`.
pub type Versions = BTreeMap<Instance, Version>;

/// The same as a reader takes it: without instances of a kind that only later builds know.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct KnownVersions(#[serde(deserialize_with = "known")] pub Versions);

/// A map without the entries whose keys only later builds know: one of them says nothing of the others.
fn known<'de, D, K, V>(from: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: Deserialize<'de>,
{
    struct Known<K, V>(PhantomData<(K, V)>);
    impl<'de, K: FromStr + Ord, V: Deserialize<'de>> Visitor<'de> for Known<K, V> {
        type Value = BTreeMap<K, V>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut known = BTreeMap::new();
            while let Some(key) = map.next_key::<String>()? {
                match key.parse() {
                    Ok(key) => drop(known.insert(key, map.next_value()?)),
                    Err(_) => drop(map.next_value::<IgnoredAny>()?),
                }
            }
            Ok(known)
        }
    }
    from.deserialize_map(Known(PhantomData))
}

/// [`known`], to be shared.
fn shared<'de, D, K, V>(from: D) -> Result<Arc<BTreeMap<K, V>>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: Deserialize<'de>,
{
    known(from).map(Arc::new)
}

/// An instance; none where only later builds know it.
fn known_instance<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Instance>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.and_then(|text| text.parse().ok()))
}

/// How a stream stands on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamState {
    /// At the version that it should be at.
    Ok,
    /// On its way to a newer version.
    Behind,
    /// A pack, or what the manifest lists, was refused; the version before is kept.
    Error,
    /// The rows are not those of the version; a full will heal it.
    Drift,
    /// A sale is open, or nothing was received yet.
    Waiting,
    /// A word of a later build: nothing is decided by it.
    #[serde(other)]
    Unknown,
}

/// One stream in a heartbeat and in `status --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReport {
    /// The version held; none before the first full.
    pub version: Option<Version>,
    /// The contract's number.
    pub schema: Option<u64>,
    /// The state digest of each table.
    pub digests: BTreeMap<TableName, StateDigest>,
    /// How it stands.
    pub state: StreamState,
}

/// Something that went wrong and has not been mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// A stable name: `PACK_IN_ERROR`, `DRIFT`, `DISK_FULL`, `REFUSED`, …
    pub code: String,
    /// The stream@audience that it concerns; none also for one that only later builds know.
    #[serde(default, deserialize_with = "known_instance", skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
    /// The pack, file or source that it concerns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// The reason, for people.
    pub text: String,
    /// Since when, UTC by the device's clock.
    pub since: Timestamp,
}

/// Fault codes that other tiers act on.
pub mod fault {
    /// A pack lies in `error/`.
    pub const PACK_IN_ERROR: &str = "PACK_IN_ERROR";
    /// A pack that the manifest lists is at no source.
    pub const PACK_MISSING: &str = "PACK_MISSING";
    /// Rows differ from the version's digest.
    pub const DRIFT: &str = "DRIFT";
    /// No room on disk.
    pub const DISK_FULL: &str = "DISK_FULL";
    /// Something signed was refused.
    pub const REFUSED: &str = "REFUSED";
    /// What a manifest lists of one stream was refused.
    pub const STREAM_REFUSED: &str = "STREAM_REFUSED";
    /// A source could not be read.
    pub const SOURCE: &str = "SOURCE";
    /// A disk or database that cannot be relied on.
    pub const HALTED: &str = "HALTED";
    /// A device's own files cannot be read or written, for neither a full disk nor a failed sync.
    pub const LOCAL_FILES: &str = "LOCAL_FILES";
    /// The log of the register's database cannot be brought home: a reader holds it.
    pub const LOG_STUCK: &str = "LOG_STUCK";
    /// The machine lost power again and again.
    pub const POWER_UNSTABLE: &str = "POWER_UNSTABLE";
    /// The program died again and again.
    pub const CRASH_LOOP: &str = "CRASH_LOOP";
    /// Two machines report as one device.
    pub const IDENTITY_CLONE: &str = "IDENTITY_CLONE";
}

/// What is told of the streams whose entries in the manifest this device cannot take. Their names are in `object`.
pub fn unread_faults(manifest: &Manifest, held: &BTreeMap<StreamName, Held>) -> Vec<Fault> {
    let fault = |(stream, why): (&StreamName, &String)| Fault {
        code: fault::STREAM_REFUSED.into(),
        instance: held.get(stream).map(|h| Instance { stream: stream.clone(), audience: h.audience.clone() }),
        object: Some(stream.to_string()),
        text: brief(&format!("BAD_MANIFEST: stream {stream}: {why}")).to_owned(),
        since: manifest.created_at,
    };
    manifest.unread.iter().map(fault).collect()
}

/// The same as gaps that wait to be closed.
pub fn unread_debts(manifest: &Manifest) -> impl Iterator<Item = String> {
    let serial = manifest.serial;
    let debt = move |(stream, why): (&StreamName, &String)| {
        format!("{stream}: what manifest {serial} lists cannot be taken here, what is held stays: {}", brief(why))
    };
    manifest.unread.iter().map(debt)
}

/// The network as a device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// HQ was seen within 120 s.
    Online,
    /// The relay answers, HQ has not been seen.
    InStore,
    /// The relay is silent; objects come from the CDN or bucket.
    OnlineRelayDown,
    /// Nothing answers.
    Offline,
    /// A word of a later build: nothing is decided by it.
    #[serde(other)]
    Unknown,
}

/// Room on the disk that holds the device's data, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Free for this program.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// What a register or relay reports, signed by its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// 1.
    pub format: u32,
    /// Who reports.
    pub device: DeviceId,
    /// The run of the program that reports: random, a new one at each start; from older programs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// Rises with each heartbeat of the device, over restarts too.
    pub seq: u64,
    /// The device's clock, UTC.
    pub sent_at: Timestamp,
    /// The program's version.
    pub program: String,
    /// The serial of the manifest held.
    pub serial: Option<u64>,
    /// The streams held, but for those that only later builds know. Most devices of a store say the same of them: who
    /// keeps many heartbeats keeps that once.
    #[serde(deserialize_with = "shared")]
    pub streams: Arc<BTreeMap<Instance, StreamReport>>,
    /// The network as seen.
    pub network: Network,
    /// What went wrong and has not been mended.
    pub errors: Vec<Fault>,
    /// Gaps that wait to be closed, for people.
    #[serde(default)]
    pub debts: Vec<String>,
    /// Room on the disk.
    pub disk: Option<Disk>,
    /// Seconds that the device's clock is ahead of the tier above; negative: behind.
    pub clock_skew_s: Option<i64>,
    /// In a relay's: how many seconds ago each of its registers was heard.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub registers: BTreeMap<RegisterId, u64>,
}

#[cfg(any(test, feature = "testkit"))]
impl Heartbeat {
    /// One that says nothing but whose it is.
    pub fn plain(device: DeviceId, seq: u64) -> Heartbeat {
        Heartbeat {
            format: 1,
            device,
            run: None,
            seq,
            sent_at: Timestamp::UNIX_EPOCH,
            program: "x".into(),
            serial: None,
            streams: Arc::default(),
            network: Network::Online,
            errors: Vec::new(),
            debts: Vec::new(),
            disk: None,
            clock_skew_s: None,
            registers: BTreeMap::new(),
        }
    }
}

impl Heartbeat {
    /// Leaves out what is too much for an envelope of `heartbeat_bytes`, and says how much it was: who has the most to
    /// tell would be the one that nobody hears.
    pub fn fit(&mut self, limits: &Limits) -> Result<(), serde_json::Error> {
        // Base64 makes four bytes of three; the rest is for type, signature and our own words here.
        let most = usize::try_from(limits.heartbeat_bytes.saturating_sub(2048) / 4 * 3).unwrap_or(usize::MAX);
        if length(self)? <= most {
            return Ok(());
        }
        self.errors.sort_by_key(|f| rank(&f.code));
        let faults = keep(&mut self.errors, most / 3)?;
        self.debts.iter_mut().for_each(|d| d.truncate(brief(d).len()));
        let debts = keep(&mut self.debts, most / 8)?;
        if length(self)? > most {
            // Nobody needs the proof of what is well.
            let streams = Arc::make_mut(&mut self.streams).values_mut();
            streams.filter(|s| s.state == StreamState::Ok).for_each(|s| s.digests.clear());
        }
        let (all, of_streams) = (length(self)?, length(&*self.streams)?);
        let mut left_out = 0;
        if all > most {
            let mut streams: Vec<_> = Arc::unwrap_or_clone(std::mem::take(&mut self.streams)).into_iter().collect();
            streams.sort_by_key(|(_, s)| s.state == StreamState::Ok);
            left_out = keep(&mut streams, most.saturating_sub(all - of_streams))?;
            self.streams = Arc::new(streams.into_iter().collect());
        }
        for (n, what) in [(faults, "faults"), (debts, "debts"), (left_out, "streams")] {
            if n > 0 {
                self.debts.push(format!("{n} more {what} are not in this heartbeat: it would be too long"));
            }
        }
        Ok(())
    }

    /// Signs; the envelope's bytes.
    pub fn seal(&self, key: &SecretKey) -> Result<Vec<u8>, serde_json::Error> {
        Ok(dsse::seal(PayloadType::Heartbeat, &serde_json::to_vec(self)?, &[key]))
    }

    /// Verifies by the device's key and reads. The id in the payload must be the key's owner's;
    /// the sequence number is the caller's to compare with the last one.
    pub fn open(envelope: &[u8], device: &DeviceId, key: &PublicKey, limits: &Limits) -> Result<Heartbeat, Refusal> {
        let envelope = dsse::Envelope::from_json(envelope, limits.heartbeat_bytes)?;
        Claim { unproven: envelope.unproven()?, device: device.clone() }.open(key)
    }
}

/// A heartbeat and whose it claims to be, which nobody has checked.
pub struct Claim<'e> {
    unproven: dsse::Unproven<'e>,
    device: DeviceId,
}

impl Claim<'_> {
    /// Who claims to have sent it, to look the key up by.
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Verifies by the device's key and reads: [`Heartbeat::open`].
    pub fn open(&self, key: &PublicKey) -> Result<Heartbeat, Refusal> {
        let payload = self.unproven.open(PayloadType::Heartbeat, [key], 1)?;
        let beat: Heartbeat = serde_json::from_slice(payload)
            .map_err(|e| dsse::DsseError::NotAnEnvelope(format!("not a heartbeat: {e}")))?;
        if beat.device != self.device || beat.format != 1 {
            return Err(dsse::DsseError::NotAnEnvelope(format!(
                "a heartbeat of {} (format {}) signed by the key of {}",
                beat.device, beat.format, self.device
            ))
            .into());
        }
        Ok(beat)
    }
}

/// The body of `POST /v1/heartbeats`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beats {
    /// The heartbeats, the newest of each device.
    pub beats: Vec<Beat>,
}

impl Beats {
    /// Reads a post's body: heartbeats with what is known of their way, or envelopes alone, one or an array of them.
    pub fn from_body(body: &[u8]) -> Result<Beats, serde_json::Error> {
        #[derive(Deserialize)]
        struct Claim {
            #[serde(rename = "payloadType")]
            payload_type: Option<serde::de::IgnoredAny>,
        }
        let alone = |envelopes: Vec<dsse::Envelope>| Beats {
            beats: envelopes.into_iter().map(|envelope| Beat { envelope, seen_s: 0 }).collect(),
        };
        if body.trim_ascii_start().starts_with(b"[") {
            return serde_json::from_slice(body).map(alone);
        }
        match serde_json::from_slice::<Claim>(body)?.payload_type {
            Some(_) => serde_json::from_slice(body).map(|envelope| alone(vec![envelope])),
            None => serde_json::from_slice(body),
        }
    }
}

/// One heartbeat on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// The signed heartbeat.
    pub envelope: dsse::Envelope,
    /// How long ago the tier that passes it on heard it, s.
    #[serde(default)]
    pub seen_s: u64,
}

impl Beat {
    /// The envelope as it is kept and passed on.
    pub fn text(&self, limits: &Limits) -> Result<String, Refusal> {
        let text = serde_json::to_string(&self.envelope).map_err(|e| dsse::DsseError::NotAnEnvelope(e.to_string()))?;
        if text.len() as u64 > limits.heartbeat_bytes {
            return Err(dsse::DsseError::TooLong { limit: limits.heartbeat_bytes }.into());
        }
        Ok(text)
    }

    /// Whose it claims to be.
    pub fn claim(&self) -> Result<Claim<'_>, Refusal> {
        #[derive(Deserialize)]
        struct Device {
            device: DeviceId,
        }
        let unproven = self.envelope.unproven()?;
        let Device { device } = unproven.peek()?;
        Ok(Claim { unproven, device })
    }
}

/// The answer to heartbeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeatAnswer {
    /// How long ago HQ was heard, s: 0 from HQ itself, none if never.
    pub hq_seen_s: Option<u64>,
    /// The answering tier's clock, UTC: for the report of skew only.
    pub now: Timestamp,
    /// Devices whose heartbeats were refused, and why; [`nameless`] where it cannot be read whose it is.
    #[serde(default)]
    pub refused: BTreeMap<String, String>,
    /// From a relay: the greatest number of each asking register's heartbeats that HQ has taken; 0: none yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub passed_on: BTreeMap<RegisterId, u64>,
    /// Of devices that count from below what was heard of them (set back to an old state, or a copy): the number that
    /// they go on above.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub go_on_above: BTreeMap<String, u64>,
}

/// What stands in [`BeatAnswer::refused`] for the `n`-th heartbeat of a post, from 0, if it cannot be read whose it is.
pub fn nameless(n: usize) -> String {
    format!("beat {n}")
}

/// What a heartbeat that is too long tells before other faults.
const FIRST: [&str; 6] =
    [fault::HALTED, fault::DISK_FULL, fault::DRIFT, fault::PACK_IN_ERROR, fault::PACK_MISSING, fault::STREAM_REFUSED];

/// How far back a fault of this code stands where there is no room for all.
pub fn rank(code: &str) -> usize {
    FIRST.iter().position(|first| *first == code).unwrap_or(FIRST.len())
}

/// Bytes of a value as JSON.
fn length(value: &impl Serialize) -> Result<usize, serde_json::Error> {
    serde_json::to_vec(value).map(|json| json.len())
}

/// Keeps as many of a list as there is room for; how many were left out.
fn keep(list: &mut Vec<impl Serialize>, mut room: usize) -> Result<usize, serde_json::Error> {
    let mut kept = 0;
    for item in list.iter() {
        let Some(rest) = room.checked_sub(length(item)? + 1) else { break };
        (room, kept) = (rest, kept + 1);
    }
    let left_out = list.len() - kept;
    list.truncate(kept);
    Ok(left_out)
}

/// Bytes of a text that a fault carries: what a server answers may be a page, and all faults must fit into a heartbeat.
const TEXT: usize = 500;

/// The beginning of a text, as long as a fault's may be.
pub fn brief(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT)]
}

/// A relay's signed answer to an import of hand-carried objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// 1.
    pub format: u32,
    /// The store.
    pub store: StoreId,
    /// The serial of the manifest held after the import.
    pub serial: Option<u64>,
    /// The versions served after the import.
    #[serde(deserialize_with = "known")]
    pub versions: Versions,
    /// The state digests of these versions, by stream and table; a stream that is not proved to be at its version has none.
    #[serde(deserialize_with = "known")]
    pub digests: BTreeMap<Instance, BTreeMap<TableName, StateDigest>>,
    /// When, UTC by the relay's clock.
    pub time: Timestamp,
    /// What was refused: file and reason.
    pub refusals: Vec<String>,
}

impl Receipt {
    /// Signs; the envelope's bytes.
    pub fn seal(&self, key: &SecretKey) -> Result<Vec<u8>, serde_json::Error> {
        Ok(dsse::seal(PayloadType::Receipt, &serde_json::to_vec(self)?, &[key]))
    }
    /// Whose receipt it claims to be, to look the key up by; not checked.
    pub fn claimed_store(envelope: &[u8], limits: &Limits) -> Result<StoreId, Refusal> {
        #[derive(Deserialize)]
        struct Claim {
            store: StoreId,
        }
        Ok(dsse::peek::<Claim>(envelope, limits.manifest_bytes)?.store)
    }
    /// Verifies by the relay's key and reads.
    pub fn open(envelope: &[u8], key: &PublicKey, limits: &Limits) -> Result<Receipt, Refusal> {
        let payload = dsse::open(envelope, PayloadType::Receipt, [key], 1, limits.manifest_bytes)?;
        let receipt: Receipt = serde_json::from_slice(&payload)
            .map_err(|e| dsse::DsseError::NotAnEnvelope(format!("not a receipt: {e}")))?;
        if receipt.format != 1 {
            let why =
                format!("the receipt has format {}; this build reads format 1: update this program", receipt.format);
            return Err(dsse::DsseError::NotAnEnvelope(why).into());
        }
        Ok(receipt)
    }
}

/// The report of `status --json` on a relay or register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Who reports.
    pub id: DeviceId,
    /// The streams held.
    pub streams: BTreeMap<Instance, StreamReport>,
    /// The serial of the manifest held.
    pub serial: Option<u64>,
    /// The network as seen.
    pub network: Network,
    /// Gaps that wait to be closed.
    pub debts: Vec<String>,
    /// What went wrong and has not been mended.
    pub errors: Vec<Fault>,
    /// Room on the disk.
    pub disk: Option<Disk>,
    /// Seconds that the clock is ahead of the tier above.
    pub clock_skew_s: Option<i64>,
    /// Seconds since HQ was heard of.
    pub hq_seen_s: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_post_is_heartbeats_or_envelopes_alone() {
        let key = SecretKey::from_seed([7; 32]);
        let sealed = Heartbeat::plain("0421-03".parse().unwrap(), 1).seal(&key).unwrap();
        let envelope: dsse::Envelope = serde_json::from_slice(&sealed).unwrap();
        let beat = |seen_s| Beat { envelope: envelope.clone(), seen_s };
        let text = String::from_utf8(sealed.clone()).unwrap();
        for (body, beats) in [
            (format!(r#"{{"beats":[{{"envelope":{text},"seen_s":7}}]}}"#), vec![beat(7)]),
            (text.clone(), vec![beat(0)]),
            (format!(" [{text},{text}]"), vec![beat(0), beat(0)]),
            ("[]".to_owned(), Vec::new()),
        ] {
            assert_eq!(Beats::from_body(body.as_bytes()).unwrap(), Beats { beats }, "{body}");
        }
        for body in ["", "{}", "7", "[7]", r#"{"payloadType":"x"}"#, r#"{"beats":7}"#] {
            Beats::from_body(body.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn words_of_later_builds_are_read_over() {
        let (key, limits) = (SecretKey::from_seed([7; 32]), Limits::default());
        let device: DeviceId = "0421-03".parse().unwrap();
        let stream =
            |state: &str| serde_json::json!({"version": 7, "schema": 1, "digests": {}, "state": state, "new": 1});
        let fault = |instance: &str| {
            serde_json::json!({
                "code": "PACK_IN_ERROR", "instance": instance, "text": "x", "since": "2026-01-01T00:00:00Z", "new": [],
            })
        };
        let beat = |streams: serde_json::Value| {
            let mut beat = serde_json::to_value(Heartbeat::plain(device.clone(), 1)).unwrap();
            beat["streams"] = streams;
            beat["network"] = "by-satellite".into();
            beat["errors"] = serde_json::json!([fault("price@all"), fault("staff@region-north")]);
            dsse::seal(PayloadType::Heartbeat, &serde_json::to_vec(&beat).unwrap(), &[&key])
        };
        let streams = serde_json::json!({
            "catalog@all": stream("ok"), "price@all": stream("paused"), "staff@region-north": {"any": ["thing"]},
        });
        let read = Heartbeat::open(&beat(streams), &device, &key.public(), &limits).unwrap();
        let states: Vec<_> = read.streams.iter().map(|(i, r)| (i.to_string(), r.state)).collect();
        assert_eq!(states, [("catalog@all".into(), StreamState::Ok), ("price@all".into(), StreamState::Unknown)]);
        assert_eq!(read.network, Network::Unknown);
        let of: Vec<_> = read.errors.iter().map(|f| f.instance.as_ref().map(Instance::to_string)).collect();
        assert_eq!(of, [Some("price@all".into()), None], "what is wrong is told all the same");
        // Known words are no less strict.
        for bad in [
            serde_json::json!({"price@all": {}}),
            serde_json::json!([]),
            serde_json::json!({"price@all": stream("ok"), "x": 7}),
        ] {
            let is_read = Heartbeat::open(&beat(bad.clone()), &device, &key.public(), &limits).is_ok();
            assert_eq!(is_read, bad.get("x").is_some(), "{bad}");
        }
        let versions = r#"{"price@zone-east":57,"staff@region-north":{"major":1},"catalog@all":3}"#;
        let KnownVersions(versions) = serde_json::from_str(versions).unwrap();
        assert_eq!(serde_json::to_string(&versions).unwrap(), r#"{"catalog@all":3,"price@zone-east":57}"#);
        for bad in [r#"{"price@all":0}"#, r#"{"price@all":"57"}"#, "[]", "7"] {
            serde_json::from_str::<KnownVersions>(bad).unwrap_err();
        }
    }

    #[test]
    fn a_heartbeat_fits_however_much_there_is_to_tell() {
        let (key, limits) = (SecretKey::from_seed([7; 32]), Limits::default());
        let device: DeviceId = "0421-03".parse().unwrap();
        let stream = |n: u64| StreamReport {
            version: Some(Version::try_from(n + 1).unwrap()),
            schema: Some(1),
            digests: (0..3).map(|t| (format!("table_{n}_{t}").parse().unwrap(), StateDigest::default())).collect(),
            state: if n == 700 { StreamState::Drift } else { StreamState::Ok },
        };
        let fault = |code: &str, text: String| Fault {
            code: code.into(),
            instance: None,
            object: None,
            text,
            since: Timestamp::UNIX_EPOCH,
        };
        for (streams, faults, debts) in [(3, 1, 1), (90, 40, 0), (900, 0, 0), (900, 60, 900), (0, 999, 0)] {
            let mut beat = Heartbeat::plain(device.clone(), 1);
            let held = (0..streams).map(|n| (format!("s{n}@all").parse().unwrap(), stream(n)));
            beat.streams = Arc::new(held.collect());
            // Six bytes each as JSON.
            beat.errors = (0..faults).map(|_| fault(fault::SOURCE, "\u{1}".repeat(500))).collect();
            beat.errors.push(fault(fault::HALTED, "a sync failed".into()));
            beat.debts = (0..debts).map(|_| "ä€".repeat(900)).collect();
            let whole = beat.clone();
            beat.fit(&limits).unwrap();
            let sealed = beat.seal(&key).unwrap();
            assert!(sealed.len() as u64 <= limits.heartbeat_bytes, "{}", sealed.len());
            assert_eq!(Heartbeat::open(&sealed, &device, &key.public(), &limits).unwrap(), beat);
            if streams == 3 {
                assert_eq!(beat, whole, "nothing is left out where all fits");
                continue;
            }
            assert_eq!(beat.errors[0].code, fault::HALTED);
            let drift = "s700@all".parse().unwrap();
            assert_eq!(beat.streams.get(&drift), whole.streams.get(&drift), "what is wrong is told first");
            let told = |what: &str| {
                let of =
                    |d: &String| d.strip_suffix(" are not in this heartbeat: it would be too long").map(str::to_owned);
                let mut all = beat.debts.iter().filter_map(of);
                all.find_map(|d| d.strip_suffix(what)?.strip_suffix(" more ")?.parse::<usize>().ok()).unwrap_or(0)
            };
            assert_eq!(beat.streams.len() + told("streams"), whole.streams.len());
            assert_eq!(beat.errors.len() + told("faults"), whole.errors.len());
            let words = beat.debts.iter().filter(|d| d.contains("ä€")).count();
            assert_eq!(words + told("debts"), whole.debts.len());
        }
    }
}

//! How the fleet stands: pure. What devices reported and HQ knows goes in, findings with reasons come
//! out. Asks no clock, no database; who mails what is [`crate::alert`]'s.

use crate::config::AlertsConfig;
use crate::mail::one_line;
use proto::clock::{Timestamp, since};
use proto::digest::StateDigest;
use proto::ids::{DeviceId, Instance, StoreId, TableName, Version};
use proto::wire::{Fault, Heartbeat, StreamState, fault};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// The state digests of one version.
pub type Digests = BTreeMap<TableName, StateDigest>;

/// A device as HQ sees it now.
#[derive(Debug, Clone)]
pub struct DeviceView {
    /// Who.
    pub id: DeviceId,
    /// How long ago it was last heard, by HQ or its relay; none: never.
    pub silent_for: Option<Duration>,
    /// How long HQ could have heard it: since `serve` started, or since its store came back.
    pub watched_for: Duration,
    /// What it last reported.
    pub beat: Option<Arc<Heartbeat>>,
}

/// What [`assess`] looks at.
#[derive(Debug)]
pub struct Fleet<'a> {
    /// The devices that are enrolled and not revoked.
    pub devices: &'a [DeviceView],
    /// The digests of versions that devices hold, as published.
    pub published: &'a BTreeMap<(Instance, Version), Digests>,
    /// Stores whose manifest expires, and when.
    pub expiring: &'a [(StoreId, Timestamp)],
    /// Thresholds.
    pub alerts: &'a AlertsConfig,
    /// Now, for texts and expiry only: silence is measured by durations.
    pub now: Timestamp,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What and where; the key of its episode.
    pub key: String,
    /// One line: what is wrong.
    pub subject: String,
    /// The reasons, a line each.
    pub lines: Vec<String>,
}

/// All findings, by key; and what cannot be judged yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assessment {
    /// What is wrong.
    pub findings: BTreeMap<String, Finding>,
    /// Keys that are neither wrong nor right: HQ has not listened for long enough, or the store
    /// above is silent. An open episode of these stays open.
    pub undecided: BTreeSet<String>,
}

/// Devices listed in one finding; all are counted.
const LISTED: usize = 20;

/// Judges the fleet.
pub fn assess(fleet: &Fleet<'_>) -> Assessment {
    let mut a = Assessment::default();
    let mut reports: BTreeMap<String, (String, Vec<String>)> = BTreeMap::new();
    let silent = silent_stores(fleet, &mut a);
    for d in fleet.devices {
        if let DeviceId::Register(r) = &d.id {
            register_silence(fleet, d, silent.contains(r.store()), &mut a);
        }
        if let Some(beat) = &d.beat {
            for (key, subject, line) in told(&d.id, beat, fleet.published) {
                reports.entry(key).or_insert_with(|| (subject, Vec::new())).1.push(line);
            }
        }
    }
    for (key, (subject, lines)) in reports {
        a.add(key, subject, lines);
    }
    expiring(fleet, &mut a);
    a
}

impl Assessment {
    fn add(&mut self, key: String, subject: String, mut lines: Vec<String>) {
        if lines.len() > LISTED {
            let more = lines.len() - LISTED;
            lines.truncate(LISTED);
            lines.push(format!("… and {more} more"));
        }
        self.findings.insert(key.clone(), Finding { key, subject, lines });
    }
}

/// `5 min`, `2 h`, for people.
pub fn long(d: Duration) -> String {
    match d.as_secs() {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// Stores of whose relay nothing was heard: certain ones become findings; all that are silent as far
/// as is known suppress their registers.
fn silent_stores(fleet: &Fleet<'_>, a: &mut Assessment) -> BTreeSet<StoreId> {
    let limit = fleet.alerts.store_silent.0;
    let mut silent = BTreeSet::new();
    for d in fleet.devices {
        let (DeviceId::Relay(store), Some(silent_for)) = (&d.id, d.silent_for) else { continue };
        if silent_for < limit {
            continue;
        }
        silent.insert(store.clone());
        let key = format!("store-silent/{store}");
        if d.watched_for < limit {
            a.undecided.insert(key);
            continue;
        }
        let reason = format!("nothing was heard of the relay of store {store} for {}", long(silent_for));
        a.add(key, format!("Store {store} is silent"), vec![reason]);
    }
    silent
}

fn register_silence(fleet: &Fleet<'_>, d: &DeviceView, store_is_silent: bool, a: &mut Assessment) {
    let limit = fleet.alerts.register_silent.0;
    // A device that was never heard waits for its installation.
    let Some(silent_for) = d.silent_for.filter(|s| *s >= limit) else { return };
    let key = format!("register-silent/{}", d.id);
    if store_is_silent || d.watched_for < limit {
        a.undecided.insert(key);
        return;
    }
    let reason = format!("nothing was heard of register {} for {}; its store's relay is heard", d.id, long(silent_for));
    a.add(key, format!("Register {} is silent", d.id), vec![reason]);
}

/// What a heartbeat tells of faults: key, subject, line.
fn told<'a>(
    id: &'a DeviceId,
    beat: &'a Heartbeat,
    published: &'a BTreeMap<(Instance, Version), Digests>,
) -> impl Iterator<Item = (String, String, String)> {
    let faults = beat.errors.iter().filter_map(move |f| told_fault(id, f));
    let drifts = beat.streams.iter().filter_map(move |(instance, report)| {
        let differs = report.version.is_some_and(|v| {
            let known = published.get(&(instance.clone(), v));
            known.is_some_and(|k| !report.digests.is_empty() && k != &report.digests)
        });
        if report.state != StreamState::Drift && !differs {
            return None;
        }
        let version = report.version.map_or_else(|| "no version".to_owned(), |v| format!("version {v}"));
        let why =
            if report.state == StreamState::Drift { "says that its rows drifted" } else { "reports other digests" };
        let line = format!("{id} {why} at {version}; a full pack will heal it");
        Some((
            format!("digest-mismatch/{instance}"),
            format!("Rows of {instance} differ from what was published"),
            line,
        ))
    });
    faults.chain(drifts)
}

fn told_fault(id: &DeviceId, f: &Fault) -> Option<(String, String, String)> {
    let of = f.instance.as_ref().map_or_else(|| id.to_string(), ToString::to_string);
    // A device's own words: one line, not a page.
    let object = f.object.as_deref().map(|o| format!(" ({})", one_line(o, 200))).unwrap_or_default();
    let line = format!("{id}, since {}: {}{object}", f.since, one_line(&f.text, 1000));
    match f.code.as_str() {
        fault::PACK_IN_ERROR => Some((format!("pack-in-error/{of}"), format!("A pack of {of} is in error"), line)),
        fault::PACK_MISSING => {
            Some((format!("pack-missing/{of}"), format!("A pack of {of} is missing from the bucket"), line))
        }
        fault::DISK_FULL => Some((format!("disk-full/{id}"), format!("The disk of {id} is full"), line)),
        fault::HALTED => Some((format!("halted/{id}"), format!("{id} stopped: its disk or database is unsound"), line)),
        // Also one that was healed before the heartbeat: the stream's state does not show it any more.
        fault::DRIFT => {
            Some((format!("digest-mismatch/{of}"), format!("Rows of {of} differ from what was published"), line))
        }
        // Refusals and sources are on the pages.
        _ => None,
    }
}

fn expiring(fleet: &Fleet<'_>, a: &mut Assessment) {
    let lines: Vec<String> = fleet
        .expiring
        .iter()
        .map(|(store, at)| {
            let left = since(*at, fleet.now);
            if left.is_zero() {
                format!("store {store}: expired at {at}")
            } else {
                format!("store {store}: in {}, at {at}", long(left))
            }
        })
        .collect();
    if !lines.is_empty() {
        let subject = "Manifests expire and were not signed anew".to_owned();
        a.add("manifest-expires".into(), subject, lines);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proto::wire::{Network, StreamReport};

    const MIN: u64 = 60;

    fn heartbeat(id: &str) -> Heartbeat {
        Heartbeat {
            format: 1,
            device: id.parse().unwrap(),
            seq: 1,
            sent_at: Timestamp::UNIX_EPOCH,
            program: "x".into(),
            serial: None,
            streams: BTreeMap::new(),
            network: Network::Online,
            errors: Vec::new(),
            debts: Vec::new(),
            disk: None,
            clock_skew_s: None,
            registers: BTreeMap::new(),
        }
    }
    /// id, silent for (min), watched for (min)
    fn device(id: &str, silent: Option<u64>, watched: u64) -> DeviceView {
        DeviceView {
            id: id.parse().unwrap(),
            silent_for: silent.map(|m| Duration::from_secs(m * MIN)),
            watched_for: Duration::from_secs(watched * MIN),
            beat: Some(Arc::new(heartbeat(id))),
        }
    }
    fn judge(devices: &[DeviceView]) -> (Vec<String>, Vec<String>) {
        let published = BTreeMap::from([(("price@all".parse().unwrap(), Version::FIRST), digests("0"))]);
        let a = assess(&Fleet {
            devices,
            published: &published,
            expiring: &[],
            alerts: &AlertsConfig::default(),
            now: Timestamp::UNIX_EPOCH,
        });
        (a.findings.into_keys().collect(), a.undecided.into_iter().collect())
    }
    fn digests(of: &str) -> Digests {
        BTreeMap::from([("price".parse().unwrap(), of.repeat(32).parse().unwrap())])
    }

    #[test]
    fn silence() {
        type Case<'a> = (&'a str, &'a [DeviceView], &'a [&'a str], &'a [&'a str]);
        let table: &[Case<'_>] = &[
            ("all is well", &[device("1", Some(4), 99), device("1-1", Some(29), 99)], &[], &[]),
            ("a store at the limit", &[device("1", Some(5), 99)], &["store-silent/1"], &[]),
            (
                "a register at the limit",
                &[device("1", Some(0), 99), device("1-1", Some(30), 99)],
                &["register-silent/1-1"],
                &[],
            ),
            (
                "a silent store speaks for its registers",
                &[device("1", Some(40), 99), device("1-1", Some(40), 99)],
                &["store-silent/1"],
                &["register-silent/1-1"],
            ),
            (
                "not for another store's",
                &[device("1", Some(40), 99), device("2", Some(0), 99), device("2-1", Some(40), 99)],
                &["register-silent/2-1", "store-silent/1"],
                &[],
            ),
            (
                "HQ just started: it cannot know",
                &[device("1", Some(600), 4), device("1-1", Some(600), 4)],
                &[],
                &["register-silent/1-1", "store-silent/1"],
            ),
            (
                "the store just came back: its registers have time",
                &[device("1", Some(0), 99), device("1-1", Some(600), 2)],
                &[],
                &["register-silent/1-1"],
            ),
            ("never heard: not installed yet", &[device("1", None, 99), device("1-1", None, 99)], &[], &[]),
        ];
        for (name, devices, findings, undecided) in table {
            let (f, u) = judge(devices);
            assert_eq!(f, *findings, "{name}");
            assert_eq!(u, *undecided, "{name}: undecided");
        }
    }

    #[test]
    fn what_devices_report() {
        let with = |change: &dyn Fn(&mut Heartbeat)| {
            let mut d = device("1-1", Some(0), 99);
            change(Arc::make_mut(d.beat.as_mut().unwrap()));
            judge(&[d]).0
        };
        let fault = |code: &str, instance: Option<&str>| Fault {
            code: code.into(),
            instance: instance.map(|i| i.parse().unwrap()),
            object: None,
            text: "why".into(),
            since: Timestamp::UNIX_EPOCH,
        };
        let report = |state, of: &str, version| StreamReport {
            version: Version::try_from(version).ok(),
            schema: Some(1),
            digests: digests(of),
            state,
        };
        let stream = |r: StreamReport| BTreeMap::from([("price@all".parse::<Instance>().unwrap(), r)]);
        use StreamState::{Drift, Ok};
        assert_eq!(with(&|b| b.errors = vec![fault("PACK_IN_ERROR", Some("price@all"))]), ["pack-in-error/price@all"]);
        assert_eq!(with(&|b| b.errors = vec![fault("PACK_MISSING", Some("price@all"))]), ["pack-missing/price@all"]);
        assert_eq!(with(&|b| b.errors = vec![fault("DISK_FULL", None)]), ["disk-full/1-1"]);
        assert_eq!(with(&|b| b.errors = vec![fault("HALTED", None)]), ["halted/1-1"]);
        let healed = "healed before it was told";
        assert_eq!(
            with(&|b| b.errors = vec![fault("DRIFT", Some("price@all"))]),
            ["digest-mismatch/price@all"],
            "{healed}"
        );
        assert!(with(&|b| b.errors = vec![fault("SOURCE", None)]).is_empty());
        assert!(with(&|b| b.streams = stream(report(Ok, "0", 1u64))).is_empty());
        assert_eq!(with(&|b| b.streams = stream(report(Ok, "1", 1))), ["digest-mismatch/price@all"]);
        assert!(with(&|b| b.streams = stream(report(Ok, "1", 2))).is_empty(), "a version HQ cannot judge");
        assert_eq!(with(&|b| b.streams = stream(report(Drift, "0", 1))), ["digest-mismatch/price@all"]);
    }

    #[test]
    fn a_thousand_devices_are_one_finding() {
        let devices: Vec<DeviceView> = (0..1000)
            .map(|n| {
                let mut d = device(&format!("s{n}"), Some(0), 99);
                let text = "sha256 differs".to_owned();
                let instance = "price@all".parse().ok();
                let since = Timestamp::UNIX_EPOCH;
                Arc::make_mut(d.beat.as_mut().unwrap()).errors =
                    vec![Fault { code: fault::PACK_IN_ERROR.into(), instance, object: None, text, since }];
                d
            })
            .collect();
        let a = assess(&Fleet {
            devices: &devices,
            published: &BTreeMap::new(),
            expiring: &[("1".parse().unwrap(), Timestamp::UNIX_EPOCH)],
            alerts: &AlertsConfig::default(),
            now: Timestamp::UNIX_EPOCH,
        });
        assert_eq!(a.findings.keys().collect::<Vec<_>>(), ["manifest-expires", "pack-in-error/price@all"]);
        let lines = &a.findings["pack-in-error/price@all"].lines;
        assert_eq!((lines.len(), lines[20].as_str()), (21, "… and 980 more"));
    }
}

//! What is found of devices that are silent, get nothing, or report what is wrong.
#![allow(clippy::unwrap_used)]

use super::*;

const MIN: u64 = 60;

/// id, silent for (min), watched for (min)
fn device(id: &str, silent: Option<u64>, watched: u64) -> DeviceView<'static> {
    DeviceView {
        id: Box::leak(Box::new(id.parse().unwrap())),
        silent_for: silent.map(|m| Duration::from_secs(m * MIN)),
        watched_for: Duration::from_secs(watched * MIN),
        is_just_back: false,
        stuck_for: None,
        late_for: None,
        is_double: false,
        beat: Some(Arc::new(Heartbeat::plain(id.parse().unwrap(), 1))),
    }
}
fn of<T>(devices: &[DeviceView<'_>], look: impl FnOnce(&Fleet<'_>) -> T) -> T {
    let published =
        Published::from([("price@all".parse().unwrap(), BTreeMap::from([(Version::FIRST, Some(digests("0")))]))]);
    look(&Fleet {
        devices,
        complaints: &[],
        published: &published,
        serials: &BTreeMap::from([("1".parse().unwrap(), Serials { wake: 7, signed: 7 })]),
        expiring: &[],
        own_disk: None,
        deaf_for: Some(Duration::ZERO),
        alerts: &AlertsConfig::default(),
        now: Timestamp::UNIX_EPOCH,
    })
}
fn judge(devices: &[DeviceView<'_>]) -> (Vec<String>, Vec<String>) {
    let a = of(devices, assess);
    let kinds = ["register-silent", "register-stuck", "store-silent", "store-stuck", "disk-low"];
    let keys = kinds.iter().flat_map(|kind| devices.iter().map(move |d| format!("{kind}/{}", d.id)));
    let undecided: BTreeSet<String> = keys.filter(|k| a.is_undecided(k)).collect();
    (a.findings.into_keys().collect(), undecided.into_iter().collect())
}
fn digests(of: &str) -> Digests {
    BTreeMap::from([("price".parse().unwrap(), of.repeat(32).parse().unwrap())])
}

#[test]
fn registers_that_are_switched_off_at_night_are_not_silent() {
    let devices = [device("1", Some(0), 999), device("1-1", Some(600), 999)];
    for (now, is_silent) in [("2026-11-30T06:59Z", false), ("2026-11-30T07:29Z", false), ("2026-11-30T07:30Z", true)] {
        let alerts = AlertsConfig {
            register_hours: vec!["Mon-Sat 07:00-20:00".to_owned().try_into().unwrap()],
            ..AlertsConfig::default()
        };
        let found = of(&devices, |fleet| {
            assess(&Fleet { alerts: &alerts, now: now.parse().unwrap(), ..fleet.clone() }).findings
        });
        assert_eq!(found.contains_key("register-silent/1-1"), is_silent, "{now}");
    }
}

#[test]
fn silence() {
    type Case<'a> = (&'a str, &'a [DeviceView<'a>], &'a [&'a str], &'a [&'a str]);
    let table: &[Case<'_>] = &[
        ("all is well", &[device("1", Some(4), 99), device("1-1", Some(29), 99)], &[], &[]),
        (
            "a store that was heard once again",
            &[DeviceView { is_just_back: true, ..device("1", Some(1), 99) }],
            &[],
            &["store-silent/1"],
        ),
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
        (
            "never heard: not installed yet, or enrolled anew",
            &[device("1", None, 99), device("1-1", None, 99)],
            &[],
            &["register-silent/1-1", "store-silent/1"],
        ),
        (
            "a relay that was enrolled anew speaks for its registers",
            &[device("1", None, 99), device("1-1", Some(40), 99)],
            &[],
            &["register-silent/1-1", "store-silent/1"],
        ),
        (
            "a register that was enrolled anew",
            &[device("1", Some(0), 99), device("1-1", None, 99)],
            &[],
            &["register-silent/1-1"],
        ),
    ];
    for (name, devices, findings, undecided) in table {
        let (f, u) = judge(devices);
        assert_eq!(f, *findings, "{name}");
        assert_eq!(u, *undecided, "{name}: undecided");
    }
}

#[test]
fn who_gets_nothing() {
    let stuck = |id: &str, silent: u64, stuck: u64| DeviceView {
        stuck_for: Some(Duration::from_secs(stuck * MIN)),
        ..device(id, Some(silent), 99)
    };
    type Case<'a> = (&'a str, &'a [DeviceView<'a>], &'a [&'a str], &'a [&'a str]);
    let table: &[Case<'_>] = &[
        ("not for long", &[stuck("1", 0, 14)], &[], &["store-stuck/1"]),
        ("a store at the limit", &[stuck("1", 0, 15)], &["store-stuck/1"], &[]),
        (
            "a stuck store speaks for its registers",
            &[stuck("1", 0, 15), stuck("1-1", 0, 15)],
            &["store-stuck/1"],
            &["register-stuck/1-1"],
        ),
        (
            "not before it is certain: the register holds less than it",
            &[stuck("1", 0, 1), stuck("1-1", 0, 15)],
            &["register-stuck/1-1"],
            &["store-stuck/1"],
        ),
        (
            "in one stream of its list",
            &[DeviceView { late_for: Some(Duration::from_secs(60 * MIN)), ..device("1", Some(0), 99) }],
            &["store-stuck/1"],
            &[],
        ),
        (
            "whose pack may be on its way",
            &[DeviceView { late_for: Some(Duration::from_secs(59 * MIN)), ..device("1", Some(0), 99) }],
            &[],
            &["store-stuck/1"],
        ),
        ("a register alone", &[device("1", Some(0), 99), stuck("1-1", 0, 15)], &["register-stuck/1-1"], &[]),
        ("a silent store", &[stuck("1", 9, 15)], &["store-silent/1"], &["store-stuck/1"]),
        (
            "a silent register",
            &[device("1", Some(0), 99), stuck("1-1", 40, 40)],
            &["register-silent/1-1"],
            &["register-stuck/1-1"],
        ),
    ];
    for (name, devices, findings, undecided) in table {
        let (f, u) = judge(devices);
        assert_eq!(f, *findings, "{name}");
        assert_eq!(u, *undecided, "{name}: undecided");
    }
}

fn saying(change: impl FnOnce(&mut Heartbeat)) -> DeviceView<'static> {
    let mut d = device("1-1", Some(0), 99);
    change(Arc::make_mut(d.beat.as_mut().unwrap()));
    d
}
fn fault(code: &str, instance: Option<&str>) -> Fault {
    let instance = instance.map(|i| i.parse().unwrap());
    Fault { code: code.into(), instance, object: None, text: "why".into(), since: Timestamp::UNIX_EPOCH }
}
fn report(state: StreamState, of: &str, version: u64) -> StreamReport {
    StreamReport { version: Version::try_from(version).ok(), schema: Some(1), digests: digests(of), state }
}
fn stream(r: StreamReport) -> Arc<BTreeMap<Instance, StreamReport>> {
    Arc::new(BTreeMap::from([("price@all".parse().unwrap(), r)]))
}

#[test]
fn a_beat_is_calm_when_nothing_can_come_of_it() {
    use StreamState::{Drift, Ok};
    let is_calm = |change: &dyn Fn(&mut Heartbeat)| of(&[saying(change)], |fleet| calm(fleet).count() == 1);
    let disk = |free| Some(Disk { free, total: 100 });
    assert!(is_calm(&|b| b.streams = stream(report(Ok, "0", 1))));
    assert!(is_calm(&|b| (b.serial, b.disk) = (Some(7), disk(18))));
    assert!(!is_calm(&|b| b.disk = disk(17)), "it may have been told of, and is not over");
    assert!(!is_calm(&|b| b.serial = Some(8)));
    assert!(!is_calm(&|b| b.errors = vec![fault("SOURCE", None)]));
    assert!(!is_calm(&|b| b.streams = stream(report(Drift, "0", 1))));
    assert!(!is_calm(&|b| b.streams = stream(report(Ok, "1", 1))));
    assert!(!is_calm(&|b| b.streams = stream(report(Ok, "0", 2))), "not to be judged yet");
}

#[test]
fn what_devices_report() {
    use StreamState::{Drift, Ok};
    let with = |change: &dyn Fn(&mut Heartbeat)| judge(&[saying(change)]).0;
    assert_eq!(with(&|b| b.errors = vec![fault("PACK_IN_ERROR", Some("price@all"))]), ["pack-in-error/price@all"]);
    assert_eq!(with(&|b| b.errors = vec![fault("PACK_MISSING", Some("price@all"))]), ["pack-missing/price@all"]);
    assert_eq!(with(&|b| b.errors = vec![fault("STREAM_REFUSED", Some("price@all"))]), ["stream-refused/price@all"]);
    assert_eq!(with(&|b| b.errors = vec![fault("STREAM_REFUSED", None)]), ["stream-refused/1-1"]);
    assert_eq!(with(&|b| b.errors = vec![fault("DISK_FULL", None)]), ["disk-full/1-1"]);
    assert_eq!(with(&|b| b.errors = vec![fault("HALTED", None)]), ["halted/1-1"]);
    assert_eq!(with(&|b| b.errors = vec![fault("POWER_UNSTABLE", None)]), ["power-unstable/1-1"]);
    assert_eq!(with(&|b| b.errors = vec![fault("CRASH_LOOP", None)]), ["crash-loop/1-1"]);
    assert_eq!(with(&|b| b.errors = vec![fault("LOG_STUCK", None)]), ["log-stuck/1-1"]);
    let double = |of: &str| vec![Fault { object: Some(of.into()), ..fault("IDENTITY_CLONE", None) }];
    assert_eq!(with(&|b| b.errors = double("1-2")), ["identity-clone/1-2"]);
    assert!(with(&|b| b.errors = double("2-2")).is_empty(), "another store's");
    let healed = "healed before it was told";
    assert_eq!(
        with(&|b| b.errors = vec![fault("DRIFT", Some("price@all"))]),
        ["digest-mismatch/price@all"],
        "{healed}"
    );
    let file = Fault { object: Some("store.db".into()), ..fault("DRIFT", None) };
    assert_eq!(with(&|b| b.errors = vec![file.clone()]), [format!("database/1-1/{}", file.since)], "each is told");
    assert!(with(&|b| b.errors = vec![fault("SOURCE", None)]).is_empty());
    assert!(with(&|b| b.serial = Some(7)).is_empty());
    assert_eq!(with(&|b| b.serial = Some(8)), ["list-not-ours/1"]);
    assert!(with(&|b| b.streams = stream(report(Ok, "0", 1))).is_empty());
    assert_eq!(with(&|b| b.streams = stream(report(Ok, "1", 1))), ["digest-mismatch/price@all"]);
    assert!(with(&|b| b.streams = stream(report(Ok, "1", 2))).is_empty(), "a version HQ cannot judge");
    assert_eq!(with(&|b| b.streams = stream(report(Drift, "0", 1))), ["digest-mismatch/price@all"]);
}

#[test]
fn each_mail_of_a_fault_has_its_row_in_the_readme() {
    let (readme, id) = (include_str!("../../../README.md"), "1-1".parse().unwrap());
    let of_streams = ["PACK_IN_ERROR", "PACK_MISSING", "STREAM_REFUSED", "DRIFT"].map(|c| (c, Some("price@all")));
    let of_devices = ["DISK_FULL", "HALTED", "POWER_UNSTABLE", "CRASH_LOOP", "LOG_STUCK"].map(|c| (c, None));
    for (code, instance) in of_streams.into_iter().chain(of_devices) {
        let (_, subject, _) = told_fault(&id, &fault(code, instance)).unwrap();
        let row = format!("*{}*", subject.replace(instance.unwrap_or("1-1"), "…"));
        assert!(readme.contains(&row), "{row}");
    }
}

#[test]
fn a_version_above_the_newest_was_not_published_here() {
    let published = |known: &[u64], unknown: u64| {
        let known = known.iter().map(|v| (Version::try_from(*v).unwrap(), Some(digests("0"))));
        let all = known.chain([(Version::try_from(unknown).unwrap(), None)]).collect();
        Published::from([("price@all".parse().unwrap(), all)])
    };
    let held = saying(|b| b.streams = stream(report(StreamState::Ok, "1", 8)));
    let judged = |published: &Published| {
        of(std::slice::from_ref(&held), |fleet| assess(&Fleet { published, ..fleet.clone() }).findings)
    };
    let found = judged(&published(&[2], 8));
    assert_eq!(found.keys().collect::<Vec<_>>(), ["version-not-ours/price@all"]);
    assert!(
        found["version-not-ours/price@all"].lines[0]
            .contains("1-1 holds version 8, the newest that was published here is 2")
    );
    assert!(judged(&published(&[2, 9], 8)).is_empty(), "an old one that is not known any more");
    assert!(judged(&published(&[], 8)).is_empty(), "the newest was not looked up");
}

#[test]
fn what_a_device_makes_up_is_not_believed() {
    let with = |change: &dyn Fn(&mut Heartbeat)| judge(&[saying(change)]).0;
    let made_up = |n: usize| format!("x{n}@all");
    let faults = |of: &dyn Fn(usize) -> String| (0..1000).map(|n| fault("PACK_IN_ERROR", Some(&of(n)))).collect();
    assert!(with(&|b| b.errors = faults(&made_up)).is_empty());
    assert!(with(&|b| b.errors = faults(&|_| "price@store-2".into())).is_empty(), "another store's");
    let drift = || report(StreamState::Drift, "0", 1);
    assert!(
        with(&|b| b.streams = Arc::new((0..9).map(|n| (made_up(n).parse().unwrap(), drift())).collect())).is_empty()
    );
    assert_eq!(with(&|b| b.errors = faults(&|_| "price@all".into())), ["pack-in-error/price@all"]);
    let complaint = Complaint { device: "1-1".parse().unwrap(), fault: fault("DRIFT", Some("price@store-2")) };
    let before =
        of(&[saying(|_| {})], |fleet| assess(&Fleet { complaints: std::slice::from_ref(&complaint), ..fleet.clone() }));
    assert!(before.findings.is_empty());
    let double = |n: usize| Fault { object: Some(format!("1-{n}")), ..fault("IDENTITY_CLONE", None) };
    assert_eq!(with(&|b| b.errors = (0..1000).map(double).collect()).len(), FAULTS);
}

#[test]
fn a_disk_is_low_below_the_threshold_and_well_above_a_band() {
    let with = |free: u64, full: bool| {
        let mut d = device("1-1", Some(0), 99);
        let beat = Arc::make_mut(d.beat.as_mut().unwrap());
        beat.disk = Some(Disk { free, total: 1000 });
        let code = fault::DISK_FULL.to_owned();
        let since = Timestamp::UNIX_EPOCH;
        beat.errors.extend(full.then(|| Fault { code, instance: None, object: None, text: String::new(), since }));
        judge(&[d])
    };
    let none: Vec<String> = Vec::new();
    let low = || vec!["disk-low/1-1".to_owned()];
    assert_eq!(with(149, false), (low(), none.clone()));
    assert_eq!(with(150, false), (none.clone(), low()));
    assert_eq!(with(179, false), (none.clone(), low()));
    assert_eq!(with(180, false), (none.clone(), none.clone()));
    assert_eq!(with(0, true), (vec!["disk-full/1-1".to_owned()], low()));
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
        complaints: &[],
        published: &BTreeMap::from([("price@all".parse().unwrap(), BTreeMap::new())]),
        serials: &BTreeMap::new(),
        expiring: &[("1".parse().unwrap(), Timestamp::UNIX_EPOCH)],
        own_disk: None,
        deaf_for: Some(Duration::ZERO),
        alerts: &AlertsConfig::default(),
        now: Timestamp::UNIX_EPOCH,
    });
    assert_eq!(a.findings.keys().collect::<Vec<_>>(), ["manifest-expires", "pack-in-error/price@all"]);
    let Finding { lines, stores, .. } = &a.findings["pack-in-error/price@all"];
    assert_eq!((lines.len(), lines[20].as_str(), *stores), (21, "… and 980 more", 1000));
    let of_one: Vec<DeviceView> = ["1", "1-1"]
        .map(|id| {
            let mut d = device(id, Some(0), 99);
            Arc::make_mut(d.beat.as_mut().unwrap()).errors = vec![fault("PACK_IN_ERROR", Some("price@all"))];
            d
        })
        .into();
    let found = of(&of_one, |fleet| assess(fleet).findings);
    assert_eq!((found["pack-in-error/price@all"].lines.len(), found["pack-in-error/price@all"].stores), (2, 1));
}

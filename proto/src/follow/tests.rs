#![allow(clippy::disallowed_methods, reason = "tests write files as they like")]
use super::*;
use crate::clock::{TestClock, Timestamp, after};
use crate::fetch::SourceOptions;
use crate::ids::DeviceId;
use crate::keys::SecretKey;
use crate::manifest::Manifest;
use crate::trust::{EnrolCode, PublisherKey, RootKeys, Trust, sign_manifest};
use std::collections::BTreeMap;
use std::time::Duration;
use tempfile::TempDir;

const T0: &str = "2026-01-01T00:00:00Z";

fn t0() -> Timestamp {
    T0.parse().unwrap()
}
fn key(n: u8) -> SecretKey {
    SecretKey::from_seed([n; 32])
}
fn roots() -> RootKeys {
    RootKeys { threshold: 1, keys: vec![key(1).public()] }
}

/// A bucket in a directory, and a device of store 0421 that was enrolled at trust file 1.
struct Bench {
    bucket: TempDir,
    home: TempDir,
    clock: TestClock,
    limits: Limits,
}

impl Bench {
    fn new() -> Self {
        let bench = Bench {
            bucket: TempDir::new().unwrap(),
            home: TempDir::new().unwrap(),
            clock: TestClock::at(T0),
            limits: Limits::default(),
        };
        let code = EnrolCode {
            format: 1,
            id: "0421".parse().unwrap(),
            seed: key(9).to_secret_text(),
            roots: roots(),
            trust_version: 1,
            expires_at: after(t0(), Duration::from_secs(60)),
        };
        Device::enrol(bench.home.path(), &code).unwrap();
        bench
    }
    fn put(&self, name: &ObjectName, bytes: &[u8]) {
        let path = self.bucket.path().join(name.to_string());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    fn trust(&self, version: u64, publisher: u8) {
        let publishers =
            vec![PublisherKey { key: key(publisher).public(), expires_at: after(t0(), Duration::from_secs(1 << 26)) }];
        let trust = Trust {
            format: 1,
            version,
            epoch: 1,
            created_at: t0(),
            root: roots(),
            publishers,
            streams: Default::default(),
        };
        let bytes = trust.sign(&[&key(1)]).unwrap();
        self.put(&ObjectName::TrustVersion(version), &bytes);
        self.put(&ObjectName::Trust, &bytes);
    }
    fn manifest(&self, serial: u64, publisher: u8) {
        let m = Manifest {
            format: 1,
            store: "0421".parse().unwrap(),
            serial,
            epoch: 1,
            created_at: t0(),
            expires_at: after(t0(), Duration::from_secs(3600)),
            streams: BTreeMap::new(),
            relay: None,
            registers: BTreeMap::new(),
            unread: BTreeMap::new(),
        };
        self.put(&ObjectName::Manifest(m.store.clone()), &sign_manifest(&m, &key(publisher)).unwrap());
    }
    fn device(&self) -> Mutex<Device> {
        let id: DeviceId = "0421".parse().unwrap();
        Mutex::new(Device::open(self.home.path(), &id, &self.limits).unwrap())
    }
    fn follower(&self) -> Follower {
        let url = format!("file://{}", self.bucket.path().display());
        Follower::new(vec![Source::parse(&url, &SourceOptions::default()).unwrap()])
    }
    async fn refresh(&self, follower: &mut Follower, device: &Mutex<Device>) -> Refreshed {
        follower.refresh(device, &self.clock, &self.limits, None).await
    }
}

fn serial(device: &Mutex<Device>) -> Option<u64> {
    lock(device).manifest().map(|m| m.serial)
}

#[tokio::test]
async fn a_device_that_missed_three_rotations_walks_them_and_remembers() {
    let bench = Bench::new();
    for n in 1..=4 {
        bench.trust(n, 10 + n as u8);
    }
    bench.manifest(7, 14);
    let (mut follower, device) = (bench.follower(), bench.device());
    let news = bench.refresh(&mut follower, &device).await;
    assert!(news.changed && news.problems.is_empty(), "{news:?}");
    assert_eq!(news.trust.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(!bench.refresh(&mut follower, &device).await.changed);
    drop(device);
    let again = bench.device();
    assert_eq!((serial(&again), lock(&again).trust().version()), (Some(7), 4));
}

#[tokio::test]
async fn what_is_refused_leaves_the_last_good_one() {
    let bench = Bench::new();
    bench.trust(1, 11);
    bench.manifest(7, 11);
    let (mut follower, device) = (bench.follower(), bench.device());
    bench.refresh(&mut follower, &device).await;
    let code = |r: &Refreshed| r.problems.first().map(|p| p.code());
    bench.manifest(6, 11);
    assert_eq!(code(&bench.refresh(&mut follower, &device).await), Some("OLDER_SERIAL"));
    bench.manifest(8, 99);
    assert_eq!(code(&bench.refresh(&mut follower, &device).await), Some("BAD_SIGNATURE"));
    // A trust file that the pinned root did not sign does not even stay in memory.
    let forged = Trust {
        format: 1,
        version: 2,
        epoch: 9,
        created_at: t0(),
        root: RootKeys { threshold: 1, keys: vec![key(66).public()] },
        publishers: vec![],
        streams: Default::default(),
    };
    let bytes = forged.sign(&[&key(66)]).unwrap();
    bench.put(&ObjectName::TrustVersion(2), &bytes);
    bench.put(&ObjectName::Trust, &bytes);
    assert_eq!(code(&bench.refresh(&mut follower, &device).await), Some("BAD_SIGNATURE"));
    assert_eq!((serial(&device), lock(&device).trust().version()), (Some(7), 1));
}

#[tokio::test]
async fn a_pointer_that_cannot_be_read_is_told_and_stops_no_list_that_known_trust_proves() {
    let bench = Bench::new();
    bench.trust(1, 11);
    bench.manifest(7, 11);
    let (mut follower, device) = (bench.follower(), bench.device());
    bench.refresh(&mut follower, &device).await;
    bench.put(&ObjectName::Trust, b"rot");
    bench.manifest(8, 11);
    for changed in [true, false] {
        let news = bench.refresh(&mut follower, &device).await;
        assert_eq!((news.changed, news.reached, news.problems[0].code()), (changed, 1, "NOT_AN_ENVELOPE"));
        assert_eq!(serial(&device), Some(8));
    }
    // By a key that the next trust file names.
    bench.trust(2, 12);
    bench.put(&ObjectName::Trust, b"rot");
    bench.manifest(9, 12);
    let news = bench.refresh(&mut follower, &device).await;
    assert_eq!((news.problems.len(), news.problems[0].code(), serial(&device)), (1, "NOT_AN_ENVELOPE", Some(8)));
    bench.trust(2, 12);
    let news = bench.refresh(&mut follower, &device).await;
    assert!(news.changed && news.problems.is_empty(), "{news:?}");
    assert_eq!((serial(&device), lock(&device).trust().version()), (Some(9), 2));
}

#[tokio::test]
async fn a_source_that_is_gone_is_a_problem_and_no_change() {
    let bench = Bench::new();
    let (mut follower, device) = (bench.follower(), bench.device());
    let news = bench.refresh(&mut follower, &device).await;
    assert_eq!((news.reached, news.changed, news.problems.len()), (0, false, 1));
    assert_eq!(news.problems[0].verdict(), Verdict::Retry);
}

#[test]
fn the_log_of_a_device_does_not_grow_while_no_manifest_comes() {
    let bench = Bench::new();
    let device = bench.device();
    let log = || std::fs::metadata(bench.home.path().join("device.db-wal")).map_or(0, |m| m.len());
    for n in 1..=1000 {
        assert_eq!(lock(&device).next_seq().unwrap(), n);
        assert!(log() < 512 << 10, "{} bytes after {n}", log());
    }
}

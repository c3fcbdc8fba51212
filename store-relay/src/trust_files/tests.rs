#![allow(clippy::disallowed_methods)]
use super::*;
use crate::control::{Answer, Order, obey};
use crate::kit::{Hq, Make, Store, code, now, secret};
use crate::relay::Pace;
use proto::clock::after;
use proto::device::{self, Device};
use proto::trust::{EnrolCode, PublisherKey, RootKeys, Trust};
use std::fs;
use std::time::Duration;

const HEAD: &str = "trust.json";
const NEWEST: &str = "trust/0000000003.json";
const MIDDLE: &str = "trust/0000000002.json";
const FIRST: &str = "trust/0000000001.json";
const ALL: [&str; 4] = [HEAD, FIRST, MIDDLE, NEWEST];

/// A headquarters with three trust files, and a store that is enrolled there.
fn three() -> (Hq, Store) {
    let mut hq = Hq::new();
    hq.put_trust();
    hq.put_trust();
    hq.follow("price", "zone-east");
    hq.publish("price", &[(1, Some("a"))], Make::Full);
    hq.sign();
    let store = Store::enrolled(&[hq.url()]);
    (hq, store)
}

async fn once(relay: &Relay) {
    relay.mirror_once(Pace::Once).await;
}

/// Which of these are served, and lie in `ok/` as headquarters put them.
fn right<'a>(relay: &Relay, hq: &Hq, names: &[&'a str]) -> Vec<&'a str> {
    let is_right = |name: &&&str| {
        let there = fs::read(relay.hall.config.data_dir.join("ok").join(name)).ok();
        let good = fs::read(hq.bucket.path().join(name)).ok();
        relay.hall.objects.get(&format!("/{name}")).is_some() && there.is_some() && there == good
    };
    names.iter().filter(is_right).copied().collect()
}

/// Nothing of them is served, nor left.
fn is_gone(relay: &Relay, name: &str) -> bool {
    let file = relay.hall.config.data_dir.join("ok").join(name);
    !file.exists() && relay.hall.objects.get(&format!("/{name}")).is_none()
}

fn rotten(relay: &Relay) -> Vec<String> {
    relay.hall.events().into_iter().filter(|e| e.code == "BIT_ROT").map(|e| e.subject).collect()
}

/// A file's bytes, as disks leave them.
fn damaged(good: &[u8]) -> Vec<Vec<u8>> {
    let flip = |field: &str, at: usize| {
        let mut bytes = good.to_vec();
        let begin = bytes.windows(field.len()).position(|w| w == field.as_bytes()).unwrap();
        bytes[begin + at] ^= 1;
        bytes
    };
    let (half, endless) = (good[..good.len() / 2].to_vec(), vec![b' '; 70_000]);
    vec![Vec::new(), half, endless, b"{}".to_vec(), flip("\"payload\":", 40), flip("\"sig\":", 20)]
}

#[tokio::test]
async fn what_rotted_of_the_newest_trust_file_is_written_anew_without_a_source() {
    let (hq, store) = three();
    once(&store.open()).await;
    for name in [NEWEST, HEAD] {
        let file = store.data().join("ok").join(name);
        for (n, bytes) in damaged(&fs::read(&file).unwrap()).into_iter().enumerate() {
            fs::write(&file, bytes).unwrap();
            let relay = store.open();
            assert_eq!(right(&relay, &hq, &ALL), ALL, "{name}, {n}");
            assert_eq!(rotten(&relay).last().unwrap(), name, "{n}");
        }
        fs::remove_file(&file).unwrap();
        let relay = store.open();
        assert_eq!((right(&relay, &hq, &ALL), rotten(&relay).len()), (ALL.to_vec(), if name == HEAD { 12 } else { 6 }));
    }
}

#[tokio::test]
async fn an_older_trust_file_that_rotted_is_served_no_more_until_a_source_has_it() {
    let (hq, store) = three();
    once(&store.open()).await;
    for name in [MIDDLE, FIRST] {
        let file = store.data().join("ok").join(name);
        let rest: Vec<&str> = ALL.into_iter().filter(|other| *other != name).collect();
        for (n, bytes) in damaged(&fs::read(&file).unwrap()).into_iter().enumerate() {
            fs::write(&file, bytes).unwrap();
            let relay = store.open();
            assert!(is_gone(&relay, name), "{name}, {n}");
            assert_eq!(right(&relay, &hq, &ALL), rest, "{name}, {n}");
            assert_eq!(rotten(&relay).last().unwrap(), name, "{n}");
            // No new list is needed for it.
            once(&relay).await;
            assert_eq!(right(&relay, &hq, &ALL), ALL, "{name}, {n}");
        }
    }
}

#[tokio::test]
async fn the_newest_trust_file_comes_anew_where_both_copies_rotted() {
    let (hq, store) = three();
    once(&store.open()).await;
    for name in [HEAD, NEWEST] {
        fs::write(store.data().join("ok").join(name), b"rot").unwrap();
    }
    let relay = store.open();
    assert!(is_gone(&relay, NEWEST));
    assert_eq!(right(&relay, &hq, &ALL), [FIRST, MIDDLE]);
    let head = fs::read(store.data().join("ok").join(HEAD)).unwrap();
    assert_eq!(head, fs::read(hq.bucket.path().join(MIDDLE)).unwrap(), "registers go on, as far as they know");
    assert!(relay.hall.objects.get("/trust.json").is_some());
    once(&relay).await;
    assert_eq!(right(&relay, &hq, &ALL), ALL);
}

async fn verify(relay: &Relay) -> Answer {
    obey(relay, Order::Verify).await
}

#[tokio::test]
async fn verify_finds_trust_files_that_rotted() {
    let (hq, store) = three();
    let relay = store.open();
    once(&relay).await;
    assert_eq!(verify(&relay).await.exit, 0);
    for name in [HEAD, FIRST] {
        fs::write(store.data().join("ok").join(name), b"rot").unwrap();
    }
    let found = verify(&relay).await;
    assert_eq!(found.exit, 1);
    assert_eq!(found.report["rotten"], serde_json::json!([FIRST, HEAD]));
    assert!(found.lines.iter().any(|l| l.starts_with("trust/0000000001.json: its bytes have changed")), "{found:?}");
    assert_eq!(right(&relay, &hq, &ALL), ALL, "what it has in memory is written anew");
    assert_eq!(verify(&relay).await.exit, 0);
    drop(relay);
    // Where no service runs, the start has put them in order before.
    fs::write(store.data().join("ok").join(MIDDLE), b"rot").unwrap();
    let relay = store.open();
    assert_eq!(verify(&relay).await.report["rotten"], serde_json::json!([MIDDLE]));
    once(&relay).await;
    assert_eq!((right(&relay, &hq, &ALL), verify(&relay).await.exit), (ALL.to_vec(), 0));
}

#[tokio::test]
async fn a_running_relay_writes_what_rotted_anew_with_the_next_list() {
    let (mut hq, store) = three();
    let relay = store.open();
    once(&relay).await;
    fs::write(store.data().join("ok").join(FIRST), b"rot").unwrap();
    hq.sign();
    once(&relay).await;
    assert_eq!((right(&relay, &hq, &ALL), rotten(&relay)), (ALL.to_vec(), vec![FIRST.to_owned()]));
}

fn trust(version: u64, root: u8, signers: &[u8]) -> Vec<u8> {
    let forever = after(now(), Duration::from_secs(36_500 * 86_400));
    let trust = Trust {
        format: 1,
        version,
        epoch: 1,
        created_at: now(),
        root: RootKeys { threshold: 1, keys: vec![secret(root).public()] },
        publishers: vec![PublisherKey { key: secret(10).public(), expires_at: forever }],
        streams: Default::default(),
    };
    let keys: Vec<_> = signers.iter().map(|n| secret(*n)).collect();
    trust.sign(&keys.iter().collect::<Vec<_>>()).unwrap()
}

/// A relay that began at the third file gets those before it for registers that began earlier.
#[tokio::test]
async fn a_bent_answer_is_not_taken_for_an_older_trust_file_and_the_good_one_is_when_it_comes() {
    let (hq, store) = three();
    for end in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(store.data().join(format!("{}{end}", device::FILE)));
    }
    Device::enrol(store.data(), &EnrolCode { trust_version: 3, ..code() }).unwrap();
    let middle = ObjectName::TrustVersion(2);
    let good = fs::read(hq.path(&middle)).unwrap();
    hq.put(&middle, &trust(2, 66, &[66]));
    let relay = store.open();
    for _ in 0..2 {
        once(&relay).await;
        assert_eq!(right(&relay, &hq, &ALL), [HEAD, NEWEST]);
        assert!([FIRST, MIDDLE].into_iter().all(|name| is_gone(&relay, name)));
    }
    hq.put(&middle, &good);
    // Not by each look: a bucket may have lost it for good.
    once(&relay).await;
    assert_eq!(right(&relay, &hq, &ALL), [HEAD, NEWEST]);
    store.clock.advance(AGAIN);
    once(&relay).await;
    assert_eq!(right(&relay, &hq, &ALL), ALL);
    assert!(rotten(&relay).is_empty());
}

/// Only what leads to it shows that the old root's signature is gone from a file that is right by the new one.
#[tokio::test]
async fn of_two_trust_files_that_do_not_fit_both_are_asked_for() {
    let (hq, store) = three();
    let four = "trust/0000000004.json";
    let names = [HEAD, FIRST, MIDDLE, NEWEST, four];
    for name in [ObjectName::TrustVersion(4), ObjectName::Trust] {
        hq.put(&name, &trust(4, 2, &[1, 2]));
    }
    let relay = store.open();
    once(&relay).await;
    assert_eq!(right(&relay, &hq, &names), names);
    drop(relay);
    for name in [four, HEAD] {
        fs::write(store.data().join("ok").join(name), trust(4, 2, &[2])).unwrap();
    }
    let relay = store.open();
    assert!(is_gone(&relay, NEWEST));
    assert!(relay.hall.objects.get("/trust.json").is_some(), "registers that are up to date go on");
    once(&relay).await;
    assert_eq!(right(&relay, &hq, &names), names);
    drop(relay);
    // One copy is good, and shows it by the file before it: no source is needed.
    for name in [four, HEAD] {
        fs::write(store.data().join("ok").join(name), trust(4, 2, &[2])).unwrap();
        let relay = store.open();
        assert_eq!(right(&relay, &hq, &names), names, "{name}");
        assert_eq!(rotten(&relay).last().unwrap(), name);
    }
}

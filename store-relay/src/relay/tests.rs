#![allow(clippy::disallowed_methods)]
use super::*;
use crate::kit::{Hq, Make, Store, now, rooms_of, secret, served, state, v};
use crate::steps::Moment;
use crate::trial::{TrialEnd, remove_database};
use proto::digest::StateDigest;
use proto::layout::PackKind::{Delta, Full};
use proto::replica::Replica;
use proto::wire::StreamState;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{OnceLock, Weak};
use tillcast_tests::files;

const HOUR: Duration = Duration::from_secs(3600);

/// A headquarters with two streams at version 1, and a store that reads its bucket.
fn two_streams() -> (Hq, Store) {
    let mut hq = Hq::new();
    hq.follow("price", "zone-east");
    hq.follow("promo", "all");
    hq.publish("price", &[(1, Some("a")), (2, Some("b"))], Make::Full);
    hq.publish("promo", &[(7, Some("x"))], Make::Full);
    hq.sign();
    let store = Store::enrolled(&[hq.url()]);
    (hq, store)
}

fn bent(d: StateDigest) -> StateDigest {
    let mut other = d;
    other.add(proto::digest::RowHasher::default().hash(&[proto::value::Value::Int(0)]));
    other
}

fn shadow_digest(relay: &Relay, stream: &str) -> String {
    let replica = Replica::open_read_only(relay.shadow.path(), &relay.hall.config.limits).unwrap();
    let checks = replica.verify(&stream.parse().unwrap()).unwrap();
    checks[0].found.unwrap().to_string()
}

fn fault_codes(relay: &Relay) -> Vec<String> {
    state(relay).all_faults().into_iter().map(|f| f.code).collect()
}

async fn once(relay: &Relay) -> Round {
    relay.mirror_once(Pace::Once).await
}

#[tokio::test]
async fn packs_come_are_proved_and_served() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    let round = once(&relay).await;
    assert!(round.problems.is_empty() && round.streams.values().all(|o| *o == Outcome::AtHead), "{round:?}");
    hq.publish("price", &[(1, Some("c")), (2, None), (3, Some("d"))], Make::Delta);
    hq.sign();
    once(&relay).await;
    let price = hq.instance("price");
    assert_eq!(served(&relay, &price), Some(2));
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    for (version, kind) in [(1, Full), (2, Delta)] {
        let name = hq.pack("price", version, kind);
        assert_eq!(rooms_of(&relay, &name), ["ok"]);
        assert!(relay.hall.objects.get(&format!("/packs/{name}")).is_some());
    }
    for object in ["trust.json", "trust/0000000001.json", "stores/0421/manifest.json"] {
        assert_eq!(
            fs::read(store.data().join("ok").join(object)).unwrap(),
            fs::read(hq.bucket.path().join(object)).unwrap(),
            "{object}"
        );
    }
    assert!(relay.incomplete().is_empty() && state(&relay).debts().is_empty() && fault_codes(&relay).is_empty());
    assert!(state(&relay).is_ready().is_ok());
    // A restart knows all of it without a source.
    drop(relay);
    fs::remove_dir_all(hq.bucket.path()).unwrap();
    let relay = store.open();
    assert_eq!(served(&relay, &price), Some(2));
    assert!(relay.hall.objects.get("/stores/0421/manifest.json").is_some());
    assert!(relay.hall.objects.get("/trust.json").is_some());
}

#[tokio::test]
async fn three_tries_make_an_error_and_other_streams_go_on() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, bent);
    hq.publish("promo", &[(8, Some("y"))], Make::Delta);
    hq.sign();
    let bad = hq.pack("price", 2, Delta);
    for n in 1..=3 {
        let round = once(&relay).await;
        assert_eq!(served(&relay, &hq.instance("promo")), Some(2), "{n}");
        assert_eq!(served(&relay, &hq.instance("price")), Some(1), "{n}");
        assert_ne!(round.streams["price"], Outcome::AtHead);
        assert_eq!(rooms_of(&relay, &bad), [if n < 3 { "ready" } else { "error" }], "{n}");
    }
    let reason = fs::read_to_string(store.data().join(format!("error/packs/{bad}.reason.json"))).unwrap();
    assert!(reason.contains("DIGEST") && reason.contains("price_row"), "{reason}");
    assert_eq!(fault_codes(&relay), ["PACK_IN_ERROR"]);
    assert_eq!(state(&relay).streams()[&hq.instance("price")].state, StreamState::Error);
    assert!(state(&relay).debts()[0].contains("0000000002.delta.pack is in error/"));
    assert_eq!(state(&relay).given_up().len(), 1);
    // The same after a restart, and content does not mend itself with time.
    drop(relay);
    let relay = store.open();
    store.clock.advance(HOUR * 48);
    once(&relay).await;
    assert_eq!((rooms_of(&relay, &bad), served(&relay, &hq.instance("price"))), (vec!["error"], Some(1)));
}

#[tokio::test]
async fn what_other_limits_or_another_build_refused_is_tried_again() {
    let (hq, mut store) = two_streams();
    store.config.limits.columns = 1;
    let relay = store.open();
    for _ in 0..4 {
        once(&relay).await;
    }
    let full = hq.pack("price", 1, Full);
    assert_eq!((rooms_of(&relay, &full), state(&relay).attempts[&full].tries), (vec!["error"], 3));
    assert!(state(&relay).attempts[&full].reason.contains("limits.columns = 1"));
    drop(relay);
    // The record of an older build: once more, for this one may take it.
    let spool = rusqlite::Connection::open(store.data().join("relay.db")).unwrap();
    spool.execute("UPDATE attempt SET record = json_remove(record, '$.judge')", []).unwrap();
    drop(spool);
    let relay = store.open();
    for _ in 0..2 {
        once(&relay).await;
    }
    assert_eq!((rooms_of(&relay, &full), state(&relay).attempts[&full].tries), (vec!["error"], 4));
    assert_eq!(fault_codes(&relay), ["PACK_IN_ERROR", "PACK_IN_ERROR"]);
    drop(relay);
    store.config.limits.columns = 2;
    let relay = store.open();
    let round = once(&relay).await;
    assert!(round.streams.values().all(|o| *o == Outcome::AtHead), "{round:?}");
    assert_eq!((rooms_of(&relay, &full), served(&relay, &hq.instance("price"))), (vec!["ok"], Some(1)));
    assert!(fault_codes(&relay).is_empty() && state(&relay).attempts.is_empty());
}

#[tokio::test]
async fn the_way_goes_round_a_bad_pack_and_the_debt_closes() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, bent);
    hq.sign();
    for _ in 0..3 {
        once(&relay).await;
    }
    assert_eq!(fault_codes(&relay), ["PACK_IN_ERROR"]);
    // HQ heard of the error: the next publish makes a full, too.
    hq.publish("price", &[(1, Some("good"))], Make::Both);
    hq.publish("price", &[(2, Some("later"))], Make::Delta);
    hq.sign();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(4));
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    assert!(fault_codes(&relay).is_empty() && state(&relay).debts().is_empty(), "{:?}", state(&relay).debts());
    assert_eq!(state(&relay).given_up().len(), 1, "registers are still told");
    // HQ did not hear of it meanwhile: the next heartbeat tells, also after a restart.
    drop(relay);
    let over = state(&store.open()).over(&[]);
    assert_eq!(over.iter().map(|f| f.code.as_str()).collect::<Vec<_>>(), ["PACK_IN_ERROR"]);
}

#[tokio::test]
async fn a_wrong_hash_is_kept_reported_and_fetched_again_hourly_or_when_it_changes() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let name = hq.pack("price", 2, Delta);
    let good = hq.spoil(&name);
    for _ in 0..3 {
        once(&relay).await;
    }
    assert_eq!(fault_codes(&relay), ["PACK_IN_ERROR"]);
    let reason = fs::read_to_string(store.data().join(format!("error/packs/{name}.reason.json"))).unwrap();
    assert!(reason.contains("WRONG_HASH"), "{reason}");
    assert_eq!(rooms_of(&relay, &name), ["error"], "the bad body is kept");
    once(&relay).await;
    assert_eq!(state(&relay).attempts[&name].tries, 3, "not asked for again within the hour");
    store.clock.advance(HOUR);
    once(&relay).await;
    assert_eq!(state(&relay).attempts[&name].tries, 4);
    // Other bytes, still wrong: asked for at once, since the ETag has changed.
    hq.put(&name.clone().into(), &good[1..]);
    once(&relay).await;
    let now = state(&relay).attempts[&name].clone();
    assert_eq!((now.tries, &*now.code), (5, "TOO_SHORT"));
    hq.put(&name.clone().into(), &good);
    once(&relay).await;
    assert_eq!((served(&relay, &hq.instance("price")), rooms_of(&relay, &name)), (Some(2), vec!["ok"]));
    assert!(fault_codes(&relay).is_empty());
}

/// Who has it right is away for as long as the tries of what another gives bent take.
#[tokio::test]
async fn a_pack_that_was_given_up_while_a_source_was_away_is_fetched_again_soon() {
    let (mut hq, _) = two_streams();
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let (mirror, name) = (tempfile::tempdir().unwrap(), hq.pack("price", 2, Delta));
    copy_tree(hq.bucket.path(), mirror.path());
    let copy = mirror.path().join(ObjectName::Pack(name.clone()).to_string());
    let mut bent = fs::read(&copy).unwrap();
    bent[20] ^= 1;
    fs::write(copy, bent).unwrap();
    let store = Store::enrolled(&[format!("file://{}", mirror.path().display()), hq.url()]);
    let relay = store.open();
    let away = hq.bucket.path().with_extension("away");
    fs::rename(hq.bucket.path(), &away).unwrap();
    for _ in 0..3 {
        once(&relay).await;
    }
    assert_eq!((rooms_of(&relay, &name), served(&relay, &hq.instance("price"))), (vec!["error"], Some(1)));
    fs::rename(&away, hq.bucket.path()).unwrap();
    once(&relay).await;
    assert_eq!(state(&relay).attempts[&name].tries, 3, "not without a pause");
    store.clock.advance(HOUR / 60);
    once(&relay).await;
    assert_eq!((rooms_of(&relay, &name), served(&relay, &hq.instance("price"))), (vec!["ok"], Some(2)));
    assert!(fault_codes(&relay).is_empty(), "{:?}", state(&relay).all_faults());
}

#[tokio::test]
async fn a_cut_pack_or_a_dead_source_is_no_try() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let name = hq.pack("price", 2, Delta);
    let path = hq.path(&name.clone().into());
    let good = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    for _ in 0..5 {
        let round = once(&relay).await;
        assert!(matches!(round.streams["price"], Outcome::Again(..)));
    }
    assert!(state(&relay).attempts.is_empty());
    assert!(state(&relay).debts()[0].contains("price@zone-east: at 1, headquarters is at 2"));
    fs::write(&path, good).unwrap();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
}

#[tokio::test]
async fn a_pack_that_no_source_has_is_told_after_a_while_and_gone_round() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    fs::remove_file(hq.path(&hq.pack("price", 2, Delta).into())).unwrap();
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "a mirror may lag");
    store.clock.advance(HOUR / 6);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["PACK_MISSING"]);
    let told = state(&relay).all_faults().remove(0);
    assert_eq!(told.instance, Some(hq.instance("price")));
    assert!(told.text.contains("0000000002.delta.pack"), "{}", told.text);
    assert!(state(&relay).attempts.is_empty(), "it is no bad pack");
    // Headquarters heard of it: a full leads past the gap, though it has more bytes than what is listed before it.
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &many, Make::Both);
    hq.sign();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(3));
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    assert!(fault_codes(&relay).is_empty() && state(&relay).debts().is_empty(), "{:?}", state(&relay).debts());
}

/// As S3 says it where `s3:ListBucket` is not granted, and the CDN before it.
#[tokio::test]
async fn a_pack_that_a_bucket_forbids_is_missing_where_its_lists_are_given() {
    let (mut hq, _) = two_streams();
    let bucket = hq.unlisted().await;
    let store = Store::enrolled(std::slice::from_ref(&bucket.url));
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    fs::remove_file(hq.path(&hq.pack("price", 2, Delta).into())).unwrap();
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "a mirror may lag");
    store.clock.advance(HOUR / 6);
    bucket.shut.store(true, Ordering::Relaxed);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["SOURCE"], "who is let in nowhere knows nothing of packs");
    bucket.shut.store(false, Ordering::Relaxed);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["PACK_MISSING"]);
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &many, Make::Both);
    hq.sign();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(3), "by the full");
    assert!(fault_codes(&relay).is_empty(), "{:?}", state(&relay).all_faults());
}

/// A mirror that lags for good, beside a bucket that is down.
#[tokio::test]
async fn a_pack_is_not_told_as_missing_while_a_source_that_may_have_it_is_away() {
    let (mut hq, _) = two_streams();
    let mirror = tempfile::tempdir().unwrap();
    let store = Store::enrolled(&[format!("file://{}", mirror.path().display()), hq.url()]);
    let relay = store.open();
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    copy_tree(hq.bucket.path(), mirror.path());
    let name = hq.pack("price", 2, Delta);
    fs::remove_file(mirror.path().join(ObjectName::Pack(name.clone()).to_string())).unwrap();
    let away = hq.bucket.path().with_extension("away");
    fs::rename(hq.bucket.path(), &away).unwrap();
    for minutes in [0, 10, 49] {
        store.clock.advance(HOUR / 60 * minutes);
        let round = once(&relay).await;
        assert_eq!(fault_codes(&relay), ["SOURCE"], "{minutes}");
        let Outcome::Again(_, why) = &round.streams["price"] else { panic!("{round:?}") };
        assert!(relay.sources.iter().all(|s| why.contains(s.url())), "{why}");
    }
    // One that never comes back must not keep the full away that leads past the gap.
    store.clock.advance(HOUR / 60);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["PACK_MISSING", "SOURCE"]);
    fs::rename(&away, hq.bucket.path()).unwrap();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    assert!(fault_codes(&relay).is_empty(), "{:?}", state(&relay).all_faults());
}

/// Driven by cron: no process lasts for as long as a pack must be missing before it is told.
#[tokio::test]
async fn how_long_a_pack_is_missing_outlasts_a_process_and_ends_when_it_is_had() {
    let (mut hq, store) = two_streams();
    once(&store.open()).await;
    for name in ["c", "d"] {
        hq.publish("price", &[(1, Some(name))], Make::Delta);
    }
    hq.sign();
    let paths = [2, 3].map(|version| hq.path(&hq.pack("price", version, Delta).into()));
    let good = fs::read(&paths[0]).unwrap();
    paths.iter().for_each(|path| fs::remove_file(path).unwrap());
    let began = store.clock.now();
    for minutes in [0, 5, 4] {
        store.clock.advance(HOUR / 60 * minutes);
        let relay = store.open();
        once(&relay).await;
        assert!(fault_codes(&relay).is_empty(), "a mirror may lag");
    }
    store.clock.advance(HOUR / 60);
    let relay = store.open();
    once(&relay).await;
    let missing = |relay: &Relay| {
        let faults = state(relay).all_faults().into_iter().filter(|f| f.code == fault::PACK_MISSING);
        faults.map(|f| f.object.unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(missing(&relay), [hq.pack("price", 2, Delta).to_string()]);
    assert_eq!(state(&relay).all_faults()[0].since, began, "whichever process tells it");
    // It is there; now the next one is missing, for a moment so far.
    fs::write(&paths[0], good).unwrap();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    assert!(missing(&relay).is_empty());
    // Round it, in another process.
    drop(relay);
    store.clock.advance(HOUR / 6);
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &many, Make::Both);
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(4));
    drop(relay);
    assert!(store.open().absent.lock().unwrap().is_empty(), "it is not remembered for ever");
}

/// The relay follows by deltas; a register that is new needs a full, and the cheapest one is gone from the bucket.
#[tokio::test]
async fn a_lost_full_is_gone_round_for_registers_that_are_new_or_told_of() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &many, Make::Delta);
    hq.sign();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.publish("price", &[(1, Some("d"))], Make::Both);
    hq.unlist(&hq.pack("price", 1, Full));
    hq.sign();
    let fulls = [3, 4].map(|version| hq.path(&hq.pack("price", version, Full).into()));
    let good = fs::read(&fulls[1]).unwrap();
    fulls.iter().for_each(|full| fs::remove_file(full).unwrap());
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(4), "by deltas");
    assert!(fault_codes(&relay).is_empty() && state(&relay).debts().len() == 1, "{:?}", state(&relay).debts());
    store.clock.advance(HOUR / 6);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["PACK_MISSING", "PACK_MISSING"]);
    // Nor is a delta that leads nowhere any more, once there is a way.
    let lost = hq.pack("price", 3, Delta);
    relay.throw_away(&lost, "a test");
    fs::remove_file(hq.path(&lost.into())).unwrap();
    fs::write(&fulls[1], good).unwrap();
    once(&relay).await;
    assert!(state(&relay).debts().is_empty(), "{:?}", state(&relay).debts());
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty());
}

#[tokio::test]
async fn a_drifted_shadow_is_healed_by_a_full_without_a_try() {
    for (tampering, indexed) in [
        ("UPDATE price_row SET name = 'by hand' WHERE id = 2", false),
        ("DROP TABLE price_row", false),
        ("DROP TABLE price_row", true),
        ("ALTER TABLE price_row RENAME COLUMN name TO n", false),
    ] {
        let mut hq = Hq::new();
        hq.indexed = indexed;
        hq.follow("price", "zone-east");
        hq.publish("price", &[(1, Some("a")), (2, Some("b"))], Make::Full);
        hq.sign();
        let store = Store::enrolled(&[hq.url()]);
        let relay = store.open();
        once(&relay).await;
        {
            let db = rusqlite::Connection::open(relay.shadow.path()).unwrap();
            db.execute_batch(tampering).unwrap();
        }
        hq.publish("price", &[(1, Some("c")), (2, None)], Make::Delta);
        hq.sign();
        once(&relay).await;
        assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string(), "{tampering}");
        assert_eq!(served(&relay, &hq.instance("price")), Some(2), "{tampering}");
        assert!(state(&relay).attempts.is_empty() && state(&relay).drifts.is_empty(), "{tampering}");
        let events: Vec<String> = relay.hall.spool.events(10).unwrap().into_iter().map(|e| e.code).collect();
        assert_eq!(events, ["HEALED", "DRIFT"], "{tampering}");
    }
}

#[tokio::test]
async fn a_drift_that_is_found_while_a_delta_is_tried_is_healed_by_a_full_all_the_same() {
    let (mut hq, store) = two_streams();
    once(&store.open()).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let (opened, seen) = (Arc::new(OnceLock::<Weak<Relay>>::new()), AtomicUsize::new(0));
    let at_work = Arc::clone(&opened);
    let steps = Steps::observed(move |step, moment| {
        // The delta is proved, its trial not settled yet.
        if (step, moment) == ("relay.ok", Moment::After) && seen.fetch_add(1, Ordering::SeqCst) == 0 {
            let relay = at_work.get().and_then(Weak::upgrade).unwrap();
            let db = rusqlite::Connection::open(relay.shadow.path()).unwrap();
            db.execute("UPDATE price_row SET name = 'by hand' WHERE id = 2", []).unwrap();
            relay.latch_drift(&"price".parse().unwrap(), "found by the daily check");
        }
    });
    let relay = Arc::new(store.open_with(Runner::Here, steps));
    opened.set(Arc::downgrade(&relay)).unwrap();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    assert!(state(&relay).drifts.is_empty());
    let events: Vec<String> = relay.hall.spool.events(10).unwrap().into_iter().map(|e| e.code).collect();
    assert_eq!(events, ["HEALED", "DRIFT"]);
}

/// What the rows of the old zone are says nothing of the packs of the new one.
#[tokio::test]
async fn a_bad_pack_of_a_new_zone_is_given_up_though_the_old_zones_rows_have_drifted() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    {
        let db = rusqlite::Connection::open(relay.shadow.path()).unwrap();
        db.execute("UPDATE price_row SET name = 'by hand' WHERE id = 2", []).unwrap();
    }
    hq.follow("price", "zone-west");
    hq.publish("price", &[(1, Some("west"))], Make::Full);
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, bent);
    hq.sign();
    for _ in 0..3 {
        once(&relay).await;
    }
    assert_eq!(rooms_of(&relay, &hq.pack("price", 2, Delta)), ["error"]);
    assert_eq!(served(&relay, &hq.instance("price")), Some(1));
    assert_eq!(fault_codes(&relay), ["PACK_IN_ERROR"]);
}

/// Somebody else published that number (a headquarters that was set back): the rows are those of the digest noted here.
#[tokio::test]
async fn other_rows_under_the_listed_version_are_healed_by_a_full() {
    let (hq, store) = two_streams();
    once(&store.open()).await;
    {
        let db = rusqlite::Connection::open(store.data().join("shadow.db")).unwrap();
        db.execute("UPDATE price_row SET name = 'theirs' WHERE id = 2", []).unwrap();
        let other = Replica::open_read_only(&store.data().join("shadow.db"), &store.config.limits).unwrap();
        let found = other.verify(&"price".parse().unwrap()).unwrap()[0].found.unwrap().to_string();
        db.execute("UPDATE tillcast_table SET digest = ?1 WHERE name = 'price_row'", [found]).unwrap();
    }
    let relay = store.open();
    once(&relay).await;
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    assert!(state(&relay).attempts.is_empty() && state(&relay).drifts.is_empty());
    let events = || relay.hall.spool.events(10).unwrap().into_iter().map(|e| e.code).collect::<Vec<_>>();
    assert_eq!(events(), ["HEALED", "DRIFT"]);
    once(&relay).await;
    assert_eq!(events(), ["HEALED", "DRIFT"]);
}

#[tokio::test]
async fn drift_that_verify_finds_is_latched_over_a_restart_and_healed() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    {
        let db = rusqlite::Connection::open(relay.shadow.path()).unwrap();
        db.execute("DELETE FROM price_row WHERE id = 1", []).unwrap();
    }
    let answer = crate::control::obey(&relay, crate::control::Order::Verify).await;
    assert_eq!(answer.exit, 1);
    assert!(answer.lines.iter().any(|l| l.contains("price_row") && l.contains("WRONG")), "{:?}", answer.lines);
    drop(relay);
    let relay = store.open();
    assert_eq!(fault_codes(&relay), ["DRIFT"]);
    assert_eq!(served(&relay, &hq.instance("price")), Some(1), "what is in ok/ is right and goes on being served");
    // The bucket is not needed: the full lies in ok/.
    fs::remove_dir_all(hq.bucket.path().join("packs")).unwrap();
    once(&relay).await;
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    assert!(fault_codes(&relay).is_empty());
    assert_eq!(crate::control::obey(&relay, crate::control::Order::Verify).await.exit, 0);
}

#[tokio::test]
async fn a_drift_that_two_find_is_one() {
    let (_hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let price = "price".parse().unwrap();
    relay.latch_drift(&price, "by a trial");
    relay.latch_drift(&price, "by a check of all rows");
    let told: Vec<String> = relay.hall.events().into_iter().filter(|e| e.code == "DRIFT").map(|e| e.text).collect();
    assert_eq!(told, ["by a trial"]);
    once(&relay).await;
    drop(relay);
    assert!(fault_codes(&store.open()).is_empty(), "nor is it latched any more");
}

/// A stream that drifted wants the full that new registers want.
#[tokio::test]
async fn a_pack_that_two_miss_is_missing_until_both_have_it() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let full = hq.pack("price", 1, Full);
    for _ in 0..2 {
        [Wanted::Here, Wanted::ByNew].into_iter().for_each(|of| relay.note_absent(of, &full, true));
        store.clock.advance(HOUR / 6);
    }
    assert_eq!(fault_codes(&relay), ["PACK_MISSING"]);
    relay.end_missing(|of, _| of == Wanted::ByNew);
    assert_eq!(fault_codes(&relay), ["PACK_MISSING"]);
    relay.end_missing(|of, _| of == Wanted::Here);
    assert!(fault_codes(&relay).is_empty());
}

#[tokio::test]
async fn a_contract_over_lowered_limits_is_no_drift() {
    let (hq, mut store) = two_streams();
    once(&store.open()).await;
    let verify = async |relay: &Relay| crate::control::obey(relay, crate::control::Order::Verify).await;
    let columns = std::mem::replace(&mut store.config.limits.columns, 1);
    let relay = store.open();
    store.clock.advance(HOUR);
    relay.check_rows().await;
    let events: Vec<String> = relay.hall.spool.events(10).unwrap().into_iter().map(|e| e.code).collect();
    assert_eq!(events, ["NOT_CHECKED", "NOT_CHECKED"]);
    let answer = verify(&relay).await;
    assert_eq!((answer.exit, answer.lines.len()), (3, 2), "{answer:?}");
    assert!(answer.lines[0].contains("stream price: its rows cannot be checked here"), "{answer:?}");
    assert!(answer.lines[0].contains("limits.columns = 1"), "{answer:?}");
    assert!(state(&relay).drifts.is_empty() && relay.hall.spool.drifts().unwrap().is_empty());
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "what is held is served");
    drop(relay);
    store.config.limits.columns = columns;
    let relay = store.open();
    assert_eq!(verify(&relay).await.exit, 0);
    assert_eq!(served(&relay, &hq.instance("price")), Some(1));
}

/// No delta met it, and nobody asked.
#[tokio::test]
async fn a_bit_that_flipped_in_a_row_is_found_within_a_day() {
    let (hq, store) = two_streams();
    let minute = HOUR / 60;
    let spoil = |relay: &Relay| {
        let db = rusqlite::Connection::open(relay.shadow.path()).unwrap();
        db.execute("UPDATE price_row SET name = 'by chance' WHERE id = 2", []).unwrap();
    };
    let mut relay = store.open();
    once(&relay).await;
    spoil(&relay);
    relay.check_rows().await;
    assert!(fault_codes(&relay).is_empty(), "the service has just begun");
    store.clock.advance(minute * 10);
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "not by `once`");
    relay.check_rows().await;
    assert_eq!(fault_codes(&relay), ["DRIFT"]);
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty());
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    // Once a day, however often it is started.
    spoil(&relay);
    for later in [minute, HOUR * 23, HOUR - minute * 3] {
        store.clock.advance(later);
        relay.check_rows().await;
        drop(relay);
        relay = store.open();
        store.clock.advance(Duration::from_secs(30));
        assert!(fault_codes(&relay).is_empty(), "{later:?}");
    }
    store.clock.advance(minute * 10);
    relay.check_rows().await;
    assert_eq!(fault_codes(&relay), ["DRIFT"]);
    once(&relay).await;
    let read =
        || relay.hall.spool.moments("rows read").unwrap().values().filter(|at| **at == store.clock.now()).count();
    // News go first; on a busy machine a stream may be read before they come.
    let mut reading;
    loop {
        store.clock.advance(HOUR * 24);
        reading = Box::pin(relay.check_rows());
        if futures_util::poll!(&mut reading).is_ready() {
            continue;
        }
        if read() == 0 {
            break;
        }
        reading.await;
    }
    relay.end_spare();
    reading.await;
    // The one under way may have come to its end.
    assert!(read() < 2, "both streams were read");
}

#[tokio::test]
async fn a_lost_shadow_is_rebuilt_from_what_is_served() {
    for damaged in [false, true] {
        let (mut hq, store) = two_streams();
        hq.publish("price", &[(3, Some("c"))], Make::Delta);
        hq.sign();
        let relay = store.open();
        once(&relay).await;
        let shadow = relay.shadow.path().to_owned();
        drop(relay);
        remove_database(&shadow).unwrap();
        if damaged {
            fs::write(&shadow, vec![0x55; 8192]).unwrap();
        }
        fs::remove_dir_all(hq.bucket.path()).unwrap();
        let verify = async |relay: &Relay| crate::control::obey(relay, crate::control::Order::Verify).await;
        for _ in 0..2 {
            let told = verify(&store.open()).await;
            assert_eq!((told.exit, told.report["lost"].as_array().unwrap().len()), (1, 2), "{:?}", told.lines);
        }
        let relay = store.open();
        assert_eq!(served(&relay, &hq.instance("price")), Some(2), "served all the while");
        once(&relay).await;
        assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
        assert_eq!(state(&relay).held_version(&hq.instance("price")), Some(v(2)));
        assert_eq!(verify(&relay).await.exit, 0);
    }
}

#[tokio::test]
async fn a_rotten_file_is_fetched_anew_and_is_no_try() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let name = hq.pack("price", 1, Full);
    let in_ok = relay.hall.shelves.pack(Room::Ok, &name);
    let shadow = relay.shadow.path().to_owned();
    drop(relay);
    let mut bytes = fs::read(&in_ok).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&in_ok, bytes).unwrap();
    remove_database(&shadow).unwrap();
    hq.publish("promo", &[(9, Some("z"))], Make::Delta);
    hq.sign();
    // With no proof left the file itself must say, and says no.
    let relay = store.open();
    assert_eq!(served(&relay, &hq.instance("price")), None);
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(1));
    assert!(state(&relay).attempts.is_empty());
    // With its proof it is believed, until somebody reads it.
    let mut bytes = fs::read(&in_ok).unwrap();
    bytes[last] ^= 1;
    fs::write(&in_ok, bytes).unwrap();
    let answer = crate::control::obey(&relay, crate::control::Order::Verify).await;
    assert_eq!(answer.exit, 1);
    assert_eq!(served(&relay, &hq.instance("price")), None);
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(1));
}

/// Bends a pack's file as soon as it lies in `ready/`, for as long as this says so: a bad block of the disk.
fn bad_block(store: &Store, name: &PackName) -> (Steps, Arc<AtomicBool>) {
    let is_bad = Arc::new(AtomicBool::new(true));
    let (bad, file) = (Arc::clone(&is_bad), store.data().join("ready/packs").join(name.to_string()));
    let steps = Steps::observed(move |step, moment| {
        if (step, moment) == ("relay.ready", Moment::After) && bad.load(Ordering::SeqCst) && file.is_file() {
            let mut bytes = fs::read(&file).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&file, bytes).unwrap();
        }
    });
    (steps, is_bad)
}

#[tokio::test]
async fn a_pack_that_the_disk_bends_each_time_is_told_and_fetched_ever_later() {
    let (mut hq, store) = two_streams();
    once(&store.open()).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let (name, bytes) = (hq.pack("price", 2, Delta), hq.lines["price"].entries[1].bytes);
    let (steps, is_bad) = bad_block(&store, &name);
    let relay = store.open_with(Runner::Here, steps);
    relay.refresh(0).await;
    let price = "price".parse().unwrap();
    let look = async || {
        let supply = Supply { sources: &relay.sources, only: None };
        let Outcome::Again(pause, _) = relay.bring_up(&price, supply, Pace::Service).await else { return None };
        assert_eq!(fault_codes(&relay), ["LOCAL_FILES"]);
        assert!(rooms_of(&relay, &name).is_empty() && state(&relay).attempts.is_empty());
        Some((pause.as_secs(), relay.hall.metrics.downloaded.get() / bytes))
    };
    assert_eq!(look().await, Some((5, 2)), "once at once: the next place on the disk may be good");
    for (passed, pause, fetched) in [(4, 1, 2), (1, 10, 3), (10, 20, 4), (20, 40, 5)] {
        store.clock.advance(Duration::from_secs(passed));
        assert_eq!(look().await, Some((pause, fetched)), "{passed}");
    }
    for _ in 0..9 {
        store.clock.advance(HOUR);
        look().await;
    }
    store.clock.advance(HOUR);
    assert_eq!(look().await, Some((600, 15)));
    is_bad.store(false, Ordering::SeqCst);
    store.clock.advance(HOUR / 6);
    assert_eq!(look().await, None);
    assert_eq!((served(&relay, &hq.instance("price")), fault_codes(&relay)), (Some(2), Vec::new()));
    assert!(relay.rotted().is_empty());
}

#[tokio::test]
async fn a_full_for_new_registers_that_the_disk_bends_each_time_is_told_and_fetched_ever_later() {
    let (hq, store) = short_of_a_full().await;
    let full = hq.lines["price"].entries.iter().find(|e| e.kind == Full).unwrap();
    let (steps, is_bad) = bad_block(&store, &hq.pack("price", 3, Full));
    let relay = store.open_with(Runner::Here, steps);
    for (passed, fetched) in [(0, 1), (0, 2), (4, 2), (1, 3), (9, 3), (1, 4)] {
        store.clock.advance(Duration::from_secs(passed));
        relay.spare_time().await;
        assert_eq!(relay.hall.metrics.downloaded.get() / full.bytes, fetched, "{passed}");
        assert_eq!(fault_codes(&relay) == ["LOCAL_FILES"], fetched > 1, "{passed}");
    }
    is_bad.store(false, Ordering::SeqCst);
    store.clock.advance(HOUR / 6);
    relay.spare_time().await;
    assert!(relay.incomplete().is_empty() && relay.rotted().is_empty());
    relay.spare_time().await;
    assert!(fault_codes(&relay).is_empty());
}

#[tokio::test]
async fn a_pack_that_is_found_rotten_whenever_it_is_served_is_told_and_fetched_ever_later() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let (price, name) = (hq.instance("price"), hq.pack("price", 1, Full));
    let comes = async |after: u64| {
        store.clock.advance(Duration::from_secs(after));
        relay.spare_time().await;
        let told = fault_codes(&relay);
        relay.spare_time().await;
        (served(&relay, &price).is_some(), told == ["LOCAL_FILES"])
    };
    let found = || relay.found_rotten(&name);
    found();
    assert_eq!(comes(0).await, (true, false), "once may be chance");
    for pause in [5, 10, 20] {
        found();
        assert_eq!((comes(0).await, comes(pause - 1).await), ((false, true), (false, true)));
        assert!(comes(1).await.0 && fault_codes(&relay).is_empty());
    }
}

#[tokio::test]
async fn a_pack_that_two_find_rotten_is_one() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let name = hq.pack("price", 1, Full);
    let price = hq.instance("price");
    let losses = || relay.hall.events().iter().filter(|e| e.code == "BIT_ROT").count();
    relay.found_rotten(&name);
    relay.found_rotten(&name);
    assert_eq!((losses(), fault_codes(&relay).is_empty()), (1, true));
    relay.spare_time().await;
    assert!(served(&relay, &price).is_some());
    // So it is weeks later, for somebody who empties `ok/` again.
    store.clock.advance(HOUR * 25);
    relay.found_rotten(&name);
    assert_eq!((losses(), fault_codes(&relay).is_empty()), (2, true));
    relay.spare_time().await;
    assert!(served(&relay, &price).is_some());
}

#[tokio::test]
async fn a_pack_that_goes_between_its_trial_and_ok_is_fetched_anew() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    drop(relay);
    hq.publish("price", &[(1, Some("b"))], Make::Delta);
    hq.sign();
    let name = hq.pack("price", 2, Delta);
    let (ready, is_there) = (store.data().join("ready/packs").join(name.to_string()), AtomicBool::new(true));
    let steps = Steps::observed(move |step, moment| {
        if (step, moment) == ("relay.ok", Moment::Before) && is_there.swap(false, Ordering::SeqCst) {
            fs::remove_file(&ready).unwrap();
        }
    });
    let relay = store.open_with(Runner::Here, steps);
    once(&relay).await;
    once(&relay).await;
    assert_eq!((served(&relay, &hq.instance("price")), fault_codes(&relay)), (Some(2), Vec::new()));
    assert_eq!(relay.hall.events().iter().filter(|e| e.code == "BIT_ROT").count(), 1);
}

#[tokio::test]
async fn what_a_hand_deleted_from_ok_comes_back() {
    let (mut hq, store) = two_streams();
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("d"))], Make::Delta);
    hq.sign();
    once(&relay).await;
    let price = hq.instance("price");
    drop(relay);
    fs::remove_dir_all(store.data().join("ok/packs")).unwrap();
    let relay = store.open();
    assert_eq!(served(&relay, &price), None);
    once(&relay).await;
    assert_eq!(served(&relay, &price), Some(3));
    assert!(relay.incomplete().is_empty() && relay.hall.objects.cached_bytes() > 0);
}

#[tokio::test]
async fn a_change_of_zone_is_a_full_of_the_other_instance() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let east = hq.instance("price");
    hq.follow("price", "zone-west");
    hq.publish("price", &[(1, Some("west")), (5, Some("w"))], Make::Full);
    hq.sign();
    once(&relay).await;
    assert_eq!((served(&relay, &hq.instance("price")), served(&relay, &east)), (Some(1), None));
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    // The old zone's packs go after the time of grace.
    let old = hq_pack(&east, 1);
    assert_eq!(rooms_of(&relay, &old), ["ok"]);
    store.clock.advance(HOUR * 25);
    once(&relay).await;
    assert_eq!(rooms_of(&relay, &old), [] as [&str; 0]);
}

fn hq_pack(instance: &Instance, version: u64) -> PackName {
    PackName { instance: instance.clone(), version: v(version), kind: Full }
}

#[tokio::test]
async fn a_stream_that_is_listed_no_more_leaves_room_for_others() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.lines.remove("promo");
    hq.sign();
    once(&relay).await;
    assert_eq!(state(&relay).held.keys().map(|s| s.to_string()).collect::<Vec<_>>(), ["price"]);
}

#[tokio::test]
async fn an_entry_that_cannot_be_taken_stops_its_own_stream_alone() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let (price, promo) = (hq.instance("price"), hq.instance("promo"));
    let full = hq.pack("price", 1, Full);
    // Larger than this store takes.
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.publish("promo", &[(8, Some("y"))], Make::Delta);
    hq.lines.get_mut("price").unwrap().entries[1].bytes = 1 << 40;
    hq.sign();
    let answer = crate::control::obey(&relay, crate::control::Order::Once).await;
    assert_eq!(answer.exit, 3, "{answer:?}");
    let is_kept = |relay: &Relay| {
        assert_eq!((served(relay, &price), served(relay, &promo)), (Some(1), Some(2)));
        assert_eq!(rooms_of(relay, &full), ["ok"]);
        assert!(relay.hall.objects.get(&format!("/packs/{full}")).is_some());
        let state = state(relay);
        assert!(state.proofs.contains_key(&full) && state.held.len() == 2 && state.is_ready().is_ok());
        assert_eq!((state.streams()[&price].state, state.streams()[&price].version), (StreamState::Error, Some(v(1))));
        let faults = state.all_faults();
        assert_eq!((faults.len(), faults[0].code.as_str()), (1, fault::STREAM_REFUSED), "{faults:?}");
        assert_eq!(faults[0].instance.as_ref(), Some(&price));
        assert!(faults[0].text.contains("pack 2 delta has 1099511627776 bytes, over limits.pack_bytes"), "{faults:?}");
        assert!(
            state.debts()[0].starts_with("price: what manifest 2 lists cannot be taken here"),
            "{:?}",
            state.debts()
        );
    };
    is_kept(&relay);
    // Not with time, nor for want of room, nor over a restart.
    store.clock.advance(HOUR * 24 * 400);
    relay.tidy().await;
    relay.make_room();
    is_kept(&relay);
    drop(relay);
    let relay = store.open();
    relay.tidy().await;
    is_kept(&relay);
    assert_eq!(relay.trial(&promo, 1, crate::trial::Aim::Advance, &[]).listed[&price.stream], None);
    // One that has nothing of it yet says so.
    let new = Store::enrolled(&[hq.url()]);
    let relay_of_new = new.open();
    once(&relay_of_new).await;
    assert_eq!(served(&relay_of_new, &promo), Some(2));
    assert_eq!(state(&relay_of_new).is_ready().unwrap_err(), "nothing served yet of price");
    assert_eq!(fault_codes(&relay_of_new), [fault::STREAM_REFUSED]);
    // Listed so that it can be taken, it goes on.
    hq.lines.get_mut("price").unwrap().entries.pop();
    hq.publish("price", &[(1, Some("d"))], Make::Full);
    hq.created_at = store.clock.now();
    hq.sign();
    let round = once(&relay).await;
    assert!(round.streams.values().all(|o| *o == Outcome::AtHead), "{round:?}");
    assert_eq!((served(&relay, &price), fault_codes(&relay)), (Some(3), Vec::new()));
}

#[tokio::test]
async fn other_bytes_under_a_served_name_replace_it_in_a_new_epoch() {
    let (mut hq, store) = two_streams();
    hq.publish("price", &[(1, Some("stolen"))], Make::Delta);
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    // The key was stolen: a new epoch, and the numbers begin anew with other bytes.
    hq.publisher = secret(11);
    hq.epoch = 2;
    hq.put_trust();
    hq.follow("price", "zone-east");
    hq.publish("price", &[(1, Some("right")), (2, Some("b"))], Make::Full);
    hq.publish("price", &[(1, Some("right too"))], Make::Delta);
    hq.serial = 0;
    hq.sign();
    once(&relay).await;
    assert_eq!(state(&relay).adopted, Some((2, 1)));
    assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
    for (version, kind) in [(1, Full), (2, Delta)] {
        let name = hq.pack("price", version, kind);
        let in_ok = fs::read(relay.hall.shelves.pack(Room::Ok, &name)).unwrap();
        assert_eq!(in_ok, fs::read(hq.path(&name.into())).unwrap());
    }
    // promo has kept its bytes: nothing was fetched for it but the proof is of this epoch.
    assert_eq!(state(&relay).held_version(&hq.instance("promo")), Some(v(1)));
}

#[tokio::test]
async fn a_complete_chain_is_kept_when_its_full_is_listed_no_more() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("b2"))], Make::Both);
    hq.publish("price", &[(1, Some("b3"))], Make::Delta);
    hq.sign();
    once(&relay).await;
    let newer = hq.pack("price", 2, Full);
    assert_eq!(rooms_of(&relay, &newer), [] as [&str; 0], "its own full is still listed");
    hq.lines.get_mut("price").unwrap().entries.remove(0);
    hq.sign();
    once(&relay).await;
    assert_eq!(rooms_of(&relay, &newer), ["ok"]);
    assert!(state(&relay).proofs.contains_key(&newer) && relay.incomplete().is_empty());
    assert!(!store.data().join("scratch.db").exists());
    // A full that does not lead to the shadow's rows is bad, and the shadow is right.
    let wrong = hq.lines["price"].entries[0].clone();
    drop(relay);
    let relay = store.open();
    assert_eq!(served(&relay, &hq.instance("price")), Some(3));
    assert_eq!(state(&relay).proofs[&newer], wrong.sha256);
}

/// A wrong full is given up on the way to a complete chain as on the way to the head, and the way goes round it.
#[tokio::test]
async fn a_full_of_a_wrong_hash_that_only_new_registers_need_is_given_up_and_told() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("b2"))], Make::Both);
    hq.publish("price", &[(1, Some("b3"))], Make::Delta);
    hq.unlist(&hq.pack("price", 1, Full));
    hq.sign();
    let wrong = hq.pack("price", 2, Full);
    let good = hq.spoil(&wrong);
    for tries in [1, 2, 3, 3, 3] {
        once(&relay).await;
        assert_eq!(served(&relay, &hq.instance("price")), Some(3), "by deltas");
        assert_eq!(state(&relay).attempts[&wrong].tries, tries);
    }
    assert_eq!(rooms_of(&relay, &wrong), ["error"]);
    assert_eq!(state(&relay).over(&[])[0].object, Some(wrong.to_string()), "headquarters hears of it");
    let longer: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &longer, Make::Both);
    hq.sign();
    once(&relay).await;
    assert!(relay.incomplete().is_empty() && !state(&relay).ok.contains_key(&wrong));
    hq.put(&wrong.clone().into(), &good);
    // One that was lost from ok/ is not asked for without end either.
    let lost = hq.pack("promo", 1, Full);
    relay.throw_away(&lost, "a test");
    hq.spoil(&lost);
    // Twice in the first cycle: for itself, and for the chain.
    for tries in [2, 3, 3, 3] {
        once(&relay).await;
        assert_eq!(state(&relay).attempts[&lost].tries, tries);
    }
}

#[tokio::test]
async fn a_fault_ends_with_the_register_or_the_stream_that_it_was_told_of() {
    let (mut hq, store) = two_streams();
    hq.registers.insert("0421-03".parse().unwrap(), secret(33).public());
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    fs::remove_file(hq.path(&hq.pack("price", 2, Delta).into())).unwrap();
    let relay = store.open();
    once(&relay).await;
    store.clock.advance(HOUR / 6);
    once(&relay).await;
    relay.trouble(Some((Wanted::Here, &hq.instance("price"))), Verdict::Retry, false, "disk I/O error");
    relay.hall.fault(fault::IDENTITY_CLONE, None, "0421-03", "two machines");
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["IDENTITY_CLONE", "LOCAL_FILES", "PACK_MISSING"]);
    hq.registers.clear();
    hq.lines.remove("price");
    hq.sign();
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "{:?}", fault_codes(&relay));
    assert!(relay.absent.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_pack_that_the_disk_lost_is_fetched_anew_and_order_elsewhere_mends_no_trouble() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, bent);
    hq.sign();
    once(&relay).await;
    let name = hq.pack("price", 2, Delta);
    let ready = relay.hall.shelves.pack(Room::Ready, &name);
    fs::remove_file(&ready).unwrap();
    once(&relay).await;
    assert!(ready.is_file() && state(&relay).attempts[&name].tries == 2, "it was fetched and tried again");
    // What cannot be opened is no rot: its owner is to see to it, and hears of it until it is over.
    fs::remove_file(&ready).unwrap();
    std::os::unix::fs::symlink("/none", &ready).unwrap();
    for _ in 0..2 {
        once(&relay).await;
        relay.tidy().await;
        assert_eq!(fault_codes(&relay), ["LOCAL_FILES"]);
    }
    let events = relay.hall.spool.events(10).unwrap();
    assert!(events.iter().all(|e| e.code != "MENDED"), "{events:?}");
    fs::remove_file(&ready).unwrap();
    hq.publish("price", &[(1, Some("good"))], Make::Full);
    hq.sign();
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "{:?}", fault_codes(&relay));
}

#[tokio::test]
async fn a_row_that_cannot_be_read_keeps_no_relay_from_its_start() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let shadow = relay.shadow.path().to_owned();
    drop(relay);
    for (file, sql, lost) in [
        (&shadow, "UPDATE tillcast_pack SET sha256 = 'xyz'", "SHADOW_LOST"),
        (&shadow, "UPDATE tillcast_pack SET audience = '?' WHERE stream = 'promo'", "SHADOW_LOST"),
        (&shadow, "UPDATE tillcast_stream SET applied_at = 'soon'", "SHADOW_LOST"),
        (&store.data().join(crate::spool::FILE), "INSERT INTO attempt VALUES ('price', '{]')", "SPOOL_LOST"),
    ] {
        rusqlite::Connection::open(file).unwrap().execute(sql, []).unwrap();
        let relay = store.open();
        let events: Vec<String> = relay.hall.spool.events(9).unwrap().into_iter().map(|e| e.code).collect();
        assert!(events.contains(&lost.to_owned()), "{sql}: {events:?}");
        assert_eq!(served(&relay, &hq.instance("price")), Some(1), "{sql}");
        once(&relay).await;
        assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string(), "{sql}");
    }
}

/// What is noted of a stream that is gone is nobody's while the relay runs.
#[tokio::test]
async fn a_proof_of_nobodys_that_cannot_be_read_stops_no_stream() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    rusqlite::Connection::open(relay.shadow.path())
        .unwrap()
        .execute("INSERT INTO tillcast_pack VALUES ('gone', '?', 1, 'full', 'xyz', 'soon')", [])
        .unwrap();
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    once(&relay).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
}

#[tokio::test]
async fn nothing_of_another_headquarters_is_served_but_packs() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    drop(relay);
    let small = ["trust.json", "trust/0000000001.json", "stores/0421/manifest.json"];
    let there = || small.map(|name| store.data().join("ok").join(name).exists());
    assert_eq!(there(), [true; 3]);
    let ours = crate::kit::code();
    let other = proto::trust::RootKeys { threshold: 1, keys: vec![secret(77).public()] };
    proto::device::Device::enrol(store.data(), &proto::trust::EnrolCode { roots: other, ..ours.clone() }).unwrap();
    let relay = store.open();
    assert_eq!(there(), [false; 3]);
    assert!(small.iter().all(|name| relay.hall.objects.get(&format!("/{name}")).is_none()));
    let full = hq.pack("price", 1, Full);
    assert_eq!(rooms_of(&relay, &full), ["ok"]);
    drop(relay);
    // Back again, and all is fetched; so it is when the note of it cannot be read.
    proto::device::Device::enrol(store.data(), &ours).unwrap();
    for note in [None, Some("{")] {
        if let Some(note) = note {
            let db = rusqlite::Connection::open(store.data().join(proto::device::FILE)).unwrap();
            db.execute("UPDATE fact SET value = ?1 WHERE name = ?2", [note, device::FOREIGN]).unwrap();
        }
        let relay = store.open();
        assert!(!there()[0]);
        once(&relay).await;
        assert_eq!((there(), served(&relay, &hq.instance("price"))), ([true; 3], Some(1)), "{note:?}");
        assert!(small.iter().all(|name| relay.hall.objects.get(&format!("/{name}")).is_some()), "{note:?}");
        assert!(fault_codes(&relay).is_empty(), "{note:?}");
    }
}

#[tokio::test]
async fn a_shadow_beside_a_lost_device_file_counts_no_more() {
    let (mut hq, mut store) = two_streams();
    hq.publish("price", &[(3, Some("c"))], Make::Delta);
    hq.sign();
    once(&store.open()).await;
    for end in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(store.data().join(format!("{}{end}", proto::device::FILE)));
    }
    // Another headquarters, which has not come to that version yet.
    let mut other = Hq::new();
    other.follow("price", "zone-east");
    other.publish("price", &[(1, Some("theirs"))], Make::Full);
    other.sign();
    store.config.sources = vec![other.url()];
    proto::device::Device::enrol(store.data(), &crate::kit::code()).unwrap();
    let relay = store.open();
    once(&relay).await;
    assert_eq!(served(&relay, &other.instance("price")), Some(1));
    assert_eq!(shadow_digest(&relay, "price"), other.digest("price").to_string());
    assert!(fault_codes(&relay).is_empty());
}

/// Drifted, and the shadow lost, before the stream was retired: nothing is left that a full could heal.
#[tokio::test]
async fn a_drift_ends_with_its_stream_also_where_the_shadow_holds_it_no_more() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    relay.latch_drift(&"price".parse().unwrap(), "a row differs");
    let shadow = relay.shadow.path().to_owned();
    drop(relay);
    remove_database(&shadow).unwrap();
    hq.lines.remove("price");
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty(), "{:?}", fault_codes(&relay));
    assert_eq!(state(&relay).healed.len(), 1, "headquarters hears of it");
    drop(relay);
    assert!(fault_codes(&store.open()).is_empty());
}

/// The room is back, and a stream waits for a pack that only headquarters can make.
#[tokio::test]
async fn a_full_disk_is_over_for_a_stream_that_waits_for_something_else() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    fs::remove_file(hq.path(&hq.pack("price", 2, Delta).into())).unwrap();
    once(&relay).await;
    relay.hall.out_of_room("no room");
    let minute = HOUR / 60;
    store.clock.advance(minute);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["DISK_FULL"], "it may be room that it waits for");
    store.clock.advance(minute * 10);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["PACK_MISSING"]);
    relay.hall.out_of_room("no room");
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["DISK_FULL", "PACK_MISSING"], "it was met just now");
    store.clock.advance(minute);
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["PACK_MISSING"]);
}

#[tokio::test]
async fn a_second_machine_is_forgotten_though_nobody_is_reported_to() {
    let (mut hq, store) = two_streams();
    let register: proto::ids::RegisterId = "0421-03".parse().unwrap();
    hq.registers.insert(register.clone(), secret(33).public());
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    relay.hall.fault(fault::IDENTITY_CLONE, None, register.as_str(), "two machines");
    state(&relay).voices.entry(register).or_default().double = Some(store.clock.monotonic());
    store.clock.advance(HOUR - Duration::from_secs(1));
    once(&relay).await;
    assert_eq!(fault_codes(&relay), ["IDENTITY_CLONE"]);
    store.clock.advance(Duration::from_secs(1));
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty());
}

#[tokio::test]
async fn a_stream_that_waits_for_another_pauses_ever_longer_until_one_moves_on() {
    let (_hq, store) = two_streams();
    let relay = store.open();
    let [price, promo] = ["price", "promo"].map(|s| s.parse::<StreamName>().unwrap());
    let pauses = |n| (0..n).map(|_| relay.pause_awaiting(&price).as_secs()).collect::<Vec<_>>();
    assert_eq!((pauses(6), relay.may_go_on()), (vec![5, 10, 20, 40, 60, 60], vec![]));
    relay.moved_on(&promo);
    assert_eq!((relay.may_go_on(), relay.may_go_on()), (vec![price.clone()], vec![]));
    assert_eq!(pauses(2), [5, 10]);
    relay.moved_on(&price);
    assert!(relay.may_go_on().is_empty());
}

#[tokio::test]
async fn a_stream_that_was_let_go_between_plan_and_trial_is_no_try() {
    let (mut hq, store) = two_streams();
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let relay = store.open();
    let (name, manifest) = (hq.pack("price", 2, Delta), hq.manifest());
    let entry = manifest.streams[&name.instance.stream].pack(v(2), Delta).unwrap().clone();
    let packs = [(hq.path(&name.clone().into()), entry)];
    let trial = relay.trial(&name.instance, manifest.epoch, crate::trial::Aim::Advance, &packs);
    let end = crate::trial::run(&trial);
    assert!(matches!(&end, crate::trial::TrialEnd::Waits { .. }), "{end:?}");
}

/// The relay follows by deltas; the full that new registers want has no room: a debt, on a disk that is not full.
#[tokio::test]
async fn a_full_for_new_registers_that_has_no_room_fills_no_disk() {
    let (mut hq, mut store) = two_streams();
    store.config.limits.pack_bytes = u64::MAX;
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.unlist(&hq.pack("price", 1, Full));
    let line = hq.lines.get_mut("price").unwrap();
    line.entries.iter_mut().filter(|e| e.kind == Full).for_each(|e| e.bytes = 1 << 50);
    hq.sign();
    for _ in 0..2 {
        once(&relay).await;
        assert_eq!(served(&relay, &hq.instance("price")), Some(2), "by a delta");
        assert!(fault_codes(&relay).is_empty() && state(&relay).debts().len() == 1, "{:?}", state(&relay).debts());
    }
    // Nor does a proof that it has no room for: it has left its room again.
    let no_room = TrialEnd::Surroundings { code: "SQLITE".into(), text: "full".into(), disk_full: true };
    relay.not_proved(&hq.instance("price"), &[], no_room);
    let events = relay.hall.spool.events(10).unwrap();
    assert!(events.iter().all(|e| e.code != "DISK_FULL"), "{events:?}");
}

/// A store that came to its head by deltas: the one full that registers could install from is not there yet.
async fn short_of_a_full() -> (Hq, Store) {
    let (mut hq, store) = two_streams();
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &many, Make::Delta);
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.unlist(&hq.pack("price", 1, Full));
    hq.sign();
    relay.refresh(0).await;
    let (price, supply) = ("price".parse().unwrap(), Supply { sources: &relay.sources, only: None });
    assert_eq!(relay.bring_up(&price, supply, Pace::Once).await, Outcome::AtHead);
    assert_eq!(relay.incomplete(), [hq.instance("price")]);
    drop(relay);
    (hq, store)
}

/// A child that says this of each job; how often it was asked: `tried`.
fn child(store: &Store, script: &str) -> Runner {
    let [child, tried] = ["child", "tried"].map(|name| store.dir.path().join(name));
    files::script(&child, &format!("read -r job\necho >>'{}'\n{script}\n", tried.display()));
    Runner::Child(child)
}

fn tried(store: &Store) -> usize {
    fs::read_to_string(store.dir.path().join("tried")).map_or(0, |text| text.lines().count())
}

/// What a child says that wrote until the disk had no room.
fn no_room() -> String {
    let end = TrialEnd::Surroundings { code: "SQLITE".into(), text: "full".into(), disk_full: true };
    format!("echo '{}'", serde_json::to_string(&end).unwrap())
}

/// Each spare time fetched it, wrote its rows until the disk was full, and threw it away.
#[tokio::test]
async fn a_full_for_new_registers_without_room_to_prove_it_is_not_fetched_again_and_again() {
    let (hq, store) = short_of_a_full().await;
    let full = hq.lines["price"].entries.iter().find(|e| e.kind == Full).unwrap();
    let relay = store.open_with(child(&store, &no_room()), Steps::default());
    let disk_with = |free| relay.hall.disk.pretend(proto::shelf::Space { free, total: free });
    // Its file has room, and its rows once.
    disk_with(full.bytes + full.unpacked * 3 / 2);
    for _ in 0..3 {
        relay.spare_time().await;
        assert_eq!((relay.hall.metrics.downloaded.get(), tried(&store)), (0, 0));
    }
    // What rows really take shows while they are written.
    let (room, more) = (1 << 30, full.unpacked / 16);
    for (free, passed, n) in [
        (room, 0, 1),
        (room, 30, 1),
        (room - more, 30, 1),
        (room + more / 2, 30, 1),
        (room + more + full.bytes, 30, 2),
        (room + more + full.bytes, 3570, 2),
        (room + more + full.bytes, 30, 3),
    ] {
        disk_with(free);
        store.clock.advance(Duration::from_secs(passed));
        relay.spare_time().await;
        assert_eq!(tried(&store), n, "{free} free, {passed} s later");
        assert!(n > 1 || relay.hall.metrics.downloaded.get() == full.bytes, "{free} free, {passed} s later");
        assert!(fault_codes(&relay).is_empty() && state(&relay).debts().len() == 1, "{:?}", state(&relay).debts());
    }
    // A restart knows nothing of it.
    drop(relay);
    let relay = store.open();
    relay.spare_time().await;
    assert!(state(&relay).debts().is_empty(), "{:?}", state(&relay).debts());
}

/// News end a proof that has begun: the whole pack was thrown away, and came over the line again.
#[tokio::test]
async fn a_full_whose_proof_was_broken_off_is_not_fetched_anew() {
    let (hq, store) = short_of_a_full().await;
    let full = hq.lines["price"].entries.iter().find(|e| e.kind == Full).unwrap();
    let name = hq.pack("price", 3, Full);
    let scratch = ["scratch.db", "scratch.db-wal"].map(|file| store.data().join(file));
    let leaves = scratch.each_ref().map(|file| format!("echo x >'{}'; ", file.display())).concat();
    let relay = store.open_with(child(&store, &format!("{leaves}kill -TERM $$")), Steps::default());
    for n in 1..=3 {
        relay.spare_time().await;
        assert_eq!((tried(&store), rooms_of(&relay, &name)), (n, vec!["ready"]));
        assert!(scratch.iter().all(|file| !file.exists()), "its room is wanted for the next proof");
    }
    assert_eq!(relay.hall.metrics.downloaded.get(), full.bytes);
    fs::remove_file(hq.path(&name.clone().into())).unwrap();
    drop(relay);
    let relay = store.open();
    relay.spare_time().await;
    assert_eq!(rooms_of(&relay, &name), ["ok"]);
}

/// What the store itself wants goes first.
#[tokio::test]
async fn on_a_full_disk_what_only_new_registers_wait_for_gives_way() {
    let (hq, store) = short_of_a_full().await;
    let name = hq.pack("price", 3, Full);
    let relay = store.open_with(child(&store, "kill -TERM $$"), Steps::default());
    relay.spare_time().await;
    assert_eq!(rooms_of(&relay, &name), ["ready"]);
    relay.hall.out_of_room("no room");
    relay.tidy().await;
    assert!(rooms_of(&relay, &name).is_empty());
}

/// Each look, every 5 s, wrote it until the disk was full.
#[tokio::test]
async fn a_pack_that_had_no_room_in_the_shadow_is_not_written_by_each_look() {
    let (mut hq, store) = two_streams();
    once(&store.open()).await;
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a delta long"))).collect();
    hq.publish("price", &many, Make::Delta);
    hq.sign();
    let delta = hq.lines["price"].entries[1].clone();
    let relay = store.open_with(child(&store, &no_room()), Steps::default());
    let disk_with = |free| relay.hall.disk.pretend(proto::shelf::Space { free, total: free });
    // Not even fetched.
    disk_with(delta.unpacked);
    let round = once(&relay).await;
    assert!(matches!(&round.streams["price"], Outcome::Again(_, why) if why.contains("are needed")), "{round:?}");
    assert_eq!((relay.hall.metrics.downloaded.get(), tried(&store)), (0, 0));
    let (room, more) = (1 << 30, delta.unpacked / 16);
    for (free, passed, n) in [
        (room, 0, 1),
        (room, 5, 1),
        (room - more, 5, 1),
        (room + more / 2, 5, 1),
        (room + more, 5, 2),
        (room + more, 3595, 2),
        (room + more, 5, 3),
    ] {
        disk_with(free);
        store.clock.advance(Duration::from_secs(passed));
        once(&relay).await;
        assert_eq!(tried(&store), n, "{free} free, {passed} s later");
        assert_eq!(fault_codes(&relay), ["DISK_FULL"]);
        assert_eq!(served(&relay, &hq.instance("price")), Some(1));
    }
    assert_eq!(relay.hall.metrics.downloaded.get(), delta.bytes);
    // Another pack, and a restart, know nothing of it.
    hq.publish("price", &[(1, Some("c"))], Make::Full);
    hq.unlist(&hq.pack("price", 2, Delta));
    hq.sign();
    once(&relay).await;
    assert_eq!(tried(&store), 4);
    drop(relay);
    let relay = store.open();
    once(&relay).await;
    assert_eq!((served(&relay, &hq.instance("price")), fault_codes(&relay)), (Some(3), Vec::new()));
}

#[tokio::test]
async fn nothing_is_done_in_spare_time_after_a_failed_sync() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("promo", &[(8, Some("y"))], Make::Both);
    hq.publish("promo", &[(8, Some("z"))], Make::Delta);
    hq.unlist(&hq.pack("promo", 1, Full));
    hq.sign();
    let (lost, wanted) = (hq.pack("price", 1, Full), hq.pack("promo", 2, Full));
    let promo: StreamName = "promo".parse().unwrap();
    relay.refresh(0).await;
    relay.bring_up(&promo, Supply { sources: &relay.sources, only: None }, Pace::Once).await;
    relay.throw_away(&lost, "a test");
    relay.trouble(None, Verdict::Halt, false, "SQLITE_IOERR_FSYNC");
    relay.spare_time().await;
    relay.complete(&hq.instance("promo"), Supply { sources: &relay.sources, only: None }).await;
    assert_eq!((rooms_of(&relay, &lost), rooms_of(&relay, &wanted)), (vec![], vec![]));
    relay.hall.mended(fault::HALTED, "");
    relay.spare_time().await;
    assert_eq!((rooms_of(&relay, &lost), rooms_of(&relay, &wanted)), (vec!["ok"], vec!["ok"]));
}

/// A pack may want a table of the shadow read through, on a disk that is slow.
#[tokio::test]
async fn a_trial_has_time_for_the_database_that_is_held() {
    let (_hq, store) = two_streams();
    let relay = store.open();
    let before = relay.time_for(&[]);
    let shadow = fs::OpenOptions::new().write(true).open(relay.shadow.path()).unwrap();
    shadow.set_len(300 << 20).unwrap();
    assert!(relay.time_for(&[]) >= before + Duration::from_secs(290));
}

#[tokio::test]
async fn what_tidying_cannot_do_is_told_until_it_can() {
    let (_hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let db = rusqlite::Connection::open(store.data().join(crate::spool::FILE)).unwrap();
    db.execute_batch("ALTER TABLE unlisted RENAME TO elsewhere").unwrap();
    relay.tidy().await;
    assert_eq!(fault_codes(&relay), ["LOCAL_FILES"]);
    db.execute_batch("ALTER TABLE elsewhere RENAME TO unlisted").unwrap();
    relay.tidy().await;
    assert!(fault_codes(&relay).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_listing_sent_last_is_the_newest() {
    let (hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    for n in 0..3000 {
        std::thread::scope(|threads| {
            for stream in ["price", "promo"] {
                let (hall, name) = (&relay.hall, hq.pack(stream, 1, Full));
                threads.spawn(move || {
                    match n % 2 {
                        0 => hall.state().ok.remove(&name),
                        _ => hall.state().ok.insert(name, None),
                    };
                    hall.publish_versions();
                });
            }
        });
        let (sent, now) = (relay.hall.versions().borrow().versions.clone(), state(&relay).versions());
        assert_eq!(sent, now, "{n}");
    }
}

/// A long import has the directory, and no socket.
#[tokio::test]
async fn how_a_relay_stands_can_be_read_beside_a_command_at_work() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, bent);
    hq.sign();
    for _ in 0..3 {
        once(&relay).await;
    }
    let read = crate::control::status_of_files(&store.config, &*store.clock).unwrap();
    let asked = crate::control::obey(&relay, crate::control::Order::Status).await;
    assert_eq!((read.exit, read.report["network"].as_str()), (0, Some("offline")));
    for member in ["id", "serial", "streams", "errors", "events"] {
        assert_eq!(read.report[member], asked.report[member], "{member}");
    }
    assert!(read.report["debts"][0].as_str().unwrap().contains("0000000002.delta.pack is in error/"));
    assert_eq!(read.report["errors"][0]["code"], "PACK_IN_ERROR");
}

/// An import, or `once`, is at work beside the loop's spare time; a stick's pack is nowhere else.
#[tokio::test]
async fn order_takes_nothing_away_that_is_being_proved_or_was_just_proved() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let name = hq.pack("price", 1, Full);
    let ready = relay.hall.shelves.pack(Room::Ready, &name);
    fs::create_dir_all(ready.parent().unwrap()).unwrap();
    fs::rename(relay.hall.shelves.pack(Room::Ok, &name), &ready).unwrap();
    let sha256 = state(&relay).proofs[&name];
    state(&relay).ok.remove(&name);
    state(&relay).ready.insert(name.clone(), sha256);
    relay.tidy().await;
    assert_eq!(rooms_of(&relay, &name), ["ready"], "proved, on its way to ok/");
    state(&relay).proofs.remove(&name);
    let proving = relay.completing.lock().await;
    relay.tidy().await;
    assert_eq!(rooms_of(&relay, &name), ["ready"], "being proved");
    drop(proving);
    relay.tidy().await;
    assert_eq!(rooms_of(&relay, &name), ["ready"], "new registers have nothing else");
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.sign();
    let (price, supply) = ("price".parse().unwrap(), Supply { sources: &relay.sources, only: None });
    relay.refresh(0).await;
    assert_eq!(relay.bring_up(&price, supply, Pace::Once).await, Outcome::AtHead);
    state(&relay).proofs.remove(&name);
    let newer = hq.pack("price", 2, Full);
    state(&relay).ok.insert(newer, None);
    relay.tidy().await;
    assert!(rooms_of(&relay, &name).is_empty(), "another way was taken");
}

/// The line was cut, and another full was there when it was back.
#[tokio::test]
async fn a_part_of_what_is_listed_no_more_goes_while_the_relay_runs() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.sign();
    let full = hq.pack("price", 2, Full);
    let begin = || fs::write(relay.hall.shelves.part(&full).unwrap(), b"the first bytes").unwrap();
    begin();
    once(&relay).await;
    relay.make_room();
    assert_eq!(rooms_of(&relay, &full), ["incoming"], "it may go on");
    hq.publish("price", &[(1, Some("d"))], Make::Both);
    hq.unlist(&full);
    hq.sign();
    let turn = Arc::default();
    relay.fetching.lock().unwrap().insert(full.clone(), Arc::clone(&turn));
    relay.refresh(0).await;
    relay.tidy().await;
    relay.make_room();
    assert_eq!(rooms_of(&relay, &full), ["incoming"], "it is being written");
    drop(turn);
    relay.tidy().await;
    assert!(rooms_of(&relay, &full).is_empty());
    begin();
    relay.make_room();
    assert!(rooms_of(&relay, &full).is_empty());
    assert!(fault_codes(&relay).is_empty());
}

/// A trial of a newer list holds the shadow while order waits for it.
#[tokio::test]
async fn order_forgets_no_proof_of_a_list_that_came_while_it_waited() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    let (gone, new) = (hq_pack(&hq.instance("price"), 9), hq.pack("price", 2, Delta));
    let sha256 = proto::digest::Sha256::of(b"gone");
    state(&relay).proofs.insert(gone, sha256);
    let alone = relay.shadow.alone().await;
    let trial = async {
        hq.publish("price", &[(1, Some("c"))], Make::Delta);
        hq.sign();
        assert_eq!(relay.refresh(0).await, (1, Vec::new()));
        let shadow = Replica::open(relay.shadow.path(), &relay.hall.config.limits).unwrap();
        shadow.add_proof(&new.instance, (new.version, new.kind, sha256), now()).unwrap();
        drop(alone);
    };
    tokio::join!(relay.tidy(), trial);
    assert_eq!(state(&relay).proofs.get(&new), Some(&sha256));
}

#[tokio::test]
async fn a_list_of_nothing_is_no_failure() {
    let mut hq = Hq::new();
    hq.sign();
    let store = Store::enrolled(&[hq.url()]);
    let relay = store.open();
    let order = || crate::control::obey(&relay, crate::control::Order::Once);
    let answer = order().await;
    assert_eq!(answer.exit, 0, "{:?}", answer.report);
    fs::remove_dir_all(hq.bucket.path()).unwrap();
    assert_eq!(order().await.exit, 1);
    let none = Store::enrolled(&[Hq::new().url()]).open();
    assert_eq!(crate::control::obey(&none, crate::control::Order::Once).await.exit, 1);
}

#[tokio::test]
async fn refused_manifests_leave_the_last_good_one() {
    let (mut hq, store) = two_streams();
    hq.sign();
    let relay = store.open();
    once(&relay).await;
    let name = ObjectName::Manifest("0421".parse().unwrap());
    let good = fs::read(hq.path(&name)).unwrap();
    let sign = |hq: &Hq, change: &dyn Fn(&mut Manifest), key: u8| {
        let mut manifest = hq.manifest();
        manifest.serial += 5;
        change(&mut manifest);
        proto::trust::sign_manifest(&manifest, &secret(key)).unwrap()
    };
    let day = Duration::from_secs(86_400);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("BAD_SIGNATURE", sign(&hq, &|_| {}, 66)),
        ("OTHER_STORE", sign(&hq, &|m| (m.store, m.registers) = ("0999".parse().unwrap(), BTreeMap::new()), 10)),
        ("OLDER_SERIAL", sign(&hq, &|m| m.serial = 1, 10)),
        ("SAME_SERIAL_OTHER_BYTES", sign(&hq, &|m| (m.serial, m.created_at) = (2, now() - day), 10)),
        ("EXPIRED", sign(&hq, &|m| m.expires_at = now() - day, 10)),
        ("UNKNOWN_FORMAT", sign(&hq, &|m| m.format = 9, 10)),
        ("NOT_AN_ENVELOPE", b"<html>Welcome to the hotel</html>".to_vec()),
        ("SOURCE", vec![b'x'; 5 << 20]),
    ];
    for (code, bytes) in cases {
        hq.put(&name, &bytes);
        let round = once(&relay).await;
        assert_eq!(round.problems.len(), 1, "{code}");
        let texts: Vec<String> = state(&relay).all_faults().into_iter().map(|f| f.code + ": " + &f.text).collect();
        assert!(texts.iter().any(|t| t.contains(code)), "{code}: {texts:?}");
        assert_eq!(state(&relay).adopted, Some((1, 2)), "{code}");
        assert_eq!(fs::read(store.data().join("ok").join(name.to_string())).unwrap(), good, "{code}");
    }
    hq.sign();
    once(&relay).await;
    assert!(fault_codes(&relay).is_empty());
}

#[tokio::test]
async fn what_crashes_is_given_up_and_tried_again_ever_later() {
    let (hq, store) = two_streams();
    let child = store.dir.path().join("child");
    files::script(&child, "kill -9 $$");
    let relay = store.open_with(Runner::Child(child), Steps::default());
    let name = hq.pack("price", 1, Full);
    for _ in 0..3 {
        once(&relay).await;
    }
    assert_eq!(rooms_of(&relay, &name), ["error"]);
    assert_eq!(state(&relay).attempts[&name].code, "CRASH");
    for (wait, tries) in [(59, 3), (1, 4), (119, 4), (1, 5)] {
        store.clock.advance(Duration::from_secs(wait));
        once(&relay).await;
        assert_eq!(state(&relay).attempts[&name].tries, tries);
        assert_eq!(rooms_of(&relay, &name), ["error"]);
    }
    // The cause is gone (more memory, a mended program).
    drop(relay);
    let relay = store.open();
    store.clock.advance(HOUR);
    once(&relay).await;
    assert_eq!((rooms_of(&relay, &name), served(&relay, &hq.instance("price"))), (vec!["ok"], Some(1)));
    assert!(state(&relay).attempts.is_empty());
}

/// After a change of zone, in a new epoch and over rows of another headquarters a full and its deltas are one transaction.
#[tokio::test]
async fn of_a_chain_in_one_transaction_the_pack_that_kills_is_given_up_and_those_before_it_are_served() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.follow("price", "zone-west");
    hq.publish("price", &[(1, Some("a"))], Make::Full);
    hq.publish("price", &[(1, Some("b"))], Make::Delta);
    hq.publish("price", &[(1, Some("deadly"))], Make::Delta);
    hq.sign();
    let west = hq.instance("price");
    let names = [(1, Full), (2, Delta), (3, Delta)].map(|(version, kind)| hq.pack("price", version, kind));
    let packs: Vec<_> = hq.lines["price"].entries.iter().map(|e| (hq.path(&e.name(&west).into()), e.clone())).collect();
    // A scratch, so that nothing of them is proved yet.
    let scratch = crate::trial::Aim::Scratch { file: store.dir.path().join("x.db"), digests: BTreeMap::new() };
    let mut begun = Vec::new();
    crate::trial::run_and_tell(&relay.trial(&west, 1, scratch, &packs), &mut |pack| begun.push(pack.clone()));
    assert_eq!(begun, names);
    drop(relay);
    let child = store.dir.path().join("child");
    let script = format!(
        "read -r job\ncase \"$job\" in *0000000003.delta.pack*)\n{}kill -9 $$;; esac\necho '{}'\n",
        names.clone().map(|n| format!("echo '{{\"begins\":\"{n}\"}}'\n")).concat(),
        r#"{"end":"waits","text":"for another stream"}"#,
    );
    files::script(&child, &script);
    let relay = store.open_with(Runner::Child(child), Steps::default());
    for tries in 1..=3 {
        once(&relay).await;
        assert_eq!(state(&relay).attempts.keys().collect::<Vec<_>>(), [&names[2]]);
        assert_eq!((served(&relay, &west), state(&relay).attempts[&names[2]].tries), (None, tries));
    }
    assert_eq!((rooms_of(&relay, &names[2]), fault_codes(&relay)), (vec!["error"], vec!["PACK_IN_ERROR".to_owned()]));
    drop(relay);
    let relay = store.open();
    once(&relay).await;
    assert_eq!((served(&relay, &west), state(&relay).held_version(&west)), (Some(2), Some(v(2))));
}

#[tokio::test]
async fn the_pauses_between_tries_are_kept_in_service() {
    let (mut hq, store) = two_streams();
    let relay = store.open();
    once(&relay).await;
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, bent);
    hq.sign();
    for (pause, tries) in [(0, 1), (0, 1), (1000, 2), (4000, 2), (1000, 3)] {
        store.clock.advance(Duration::from_millis(pause));
        relay.mirror_once(Pace::Service).await;
        assert_eq!(state(&relay).attempts[&hq.pack("price", 2, Delta)].tries, tries, "{pause}");
    }
}

/// Pulls the plug before and after each durable step of a cycle, starts again, and looks.
#[tokio::test]
async fn a_power_cut_at_any_step_is_put_right_by_the_next_cycle() {
    let mut cut = 0;
    loop {
        let (mut hq, store) = two_streams();
        {
            let relay = store.open();
            once(&relay).await;
        }
        hq.publish("price", &[(1, Some("c"))], Make::Both);
        hq.publish_with("promo", &[(7, Some("poison"))], Make::Delta, bent);
        hq.sign();
        let seen = AtomicUsize::new(0);
        let steps = Steps::observed(move |_, _: Moment| {
            assert!(seen.fetch_add(1, Ordering::SeqCst) != cut, "power cut");
        });
        let relay = Arc::new(store.open_with(Runner::Here, steps));
        let work = Arc::clone(&relay);
        let ended = tokio::spawn(async move {
            for _ in 0..3 {
                once(&work).await;
            }
        })
        .await;
        drop(relay);
        let relay = store.open_after_cut().await;
        assert!(served(&relay, &hq.instance("price")).is_some_and(|v| v == 1 || v == 2));
        assert_eq!(served(&relay, &hq.instance("promo")), Some(1));
        for _ in 0..3 {
            once(&relay).await;
        }
        assert_eq!(served(&relay, &hq.instance("price")), Some(2), "cut at {cut}");
        assert_eq!(shadow_digest(&relay, "price"), hq.digest("price").to_string());
        assert_eq!(rooms_of(&relay, &hq.pack("promo", 2, Delta)), ["error"], "cut at {cut}");
        assert_eq!(rooms_of(&relay, &hq.pack("price", 2, Delta)), ["ok"], "cut at {cut}");
        if ended.is_ok() {
            break;
        }
        cut += 1;
    }
    assert!(cut > 8, "only {cut} steps were seen");
}

#[tokio::test]
async fn the_highest_valid_serial_wins_over_dead_and_lagging_sources() {
    let (mut hq, _) = two_streams();
    let lagging = tempfile::tempdir().unwrap();
    copy_tree(hq.bucket.path(), lagging.path());
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let file = |p: &std::path::Path| format!("file://{}", p.display());
    let dead = lagging.path().join("none");
    let store = Store::enrolled(&[file(&dead), file(lagging.path()), hq.url()]);
    let relay = store.open();
    let round = once(&relay).await;
    assert_eq!((served(&relay, &hq.instance("price")), round.reached), (Some(2), 2));
    assert!(fault_codes(&relay).contains(&"SOURCE".to_owned()));
}

pub(crate) fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

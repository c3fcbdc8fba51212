//! The shadow: drift and its heal, rows of our own that cannot be read, loss.

use super::*;
use std::sync::{OnceLock, Weak};

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

//! Sources: which is believed, what none has, and since when.

use super::*;

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

/// Whichever of its sources lags, and whether it hears that one first or alone.
#[tokio::test]
async fn a_new_machine_takes_the_newest_list_and_never_goes_back() {
    let (mut hq, _) = two_streams();
    let lagging = tempfile::tempdir().unwrap();
    copy_tree(hq.bucket.path(), lagging.path());
    hq.publish("price", &[(1, Some("c"))], Make::Delta);
    hq.sign();
    let (old, new) = (format!("file://{}", lagging.path().display()), hq.url());
    let (here, away) = (hq.bucket.path().to_owned(), lagging.path().join("away"));
    let at = |relay: &Relay| {
        let serial = state(relay).manifest.as_ref().unwrap().serial;
        (serial, served(relay, &hq.instance("price")), relay.hall.status().serial)
    };
    for (sources, lags_alone) in [(&[&old, &new], false), (&[&new, &old], false), (&[&old, &new], true)] {
        let store = Store::enrolled(&sources.map(String::clone));
        let relay = store.open();
        if lags_alone {
            fs::rename(&here, &away).unwrap();
            once(&relay).await;
            assert_eq!(at(&relay), (1, Some(1), Some(1)));
            fs::rename(&away, &here).unwrap();
        }
        let newest = (2, Some(2), Some(2));
        once(&relay).await;
        assert_eq!(at(&relay), newest, "{sources:?}");
        fs::rename(&here, &away).unwrap();
        once(&relay).await;
        assert_eq!(at(&relay), newest, "{sources:?}");
        drop(relay);
        let relay = store.open();
        once(&relay).await;
        assert_eq!(at(&relay), newest, "{sources:?}");
        fs::rename(&away, &here).unwrap();
    }
}

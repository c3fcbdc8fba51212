//! Packs that are refused, kill who tries them, or have other bytes: tries, giving up, the way round.

use super::*;
use proto::wire::StreamState;

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

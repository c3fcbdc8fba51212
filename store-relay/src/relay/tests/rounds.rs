//! What a round brings, and what goes again: lists that change, order in the directories, who asks meanwhile.

use super::*;
use serde_json::{Value, json};

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

/// Its first command has the lock before it has made its files.
#[tokio::test]
async fn a_relay_that_took_nothing_yet_says_so_beside_its_first_command() {
    let (_hq, store) = two_streams();
    let read = || crate::control::status_of_files(&store.config, &*store.clock).unwrap();
    let none = json!({});
    for made in ["", "relay.db", "shadow.db"] {
        if !made.is_empty() {
            fs::File::create_new(store.data().join(made)).unwrap();
        }
        let read = read();
        assert_eq!((read.exit, &read.report["serial"], &read.report["streams"]), (0, &Value::Null, &none), "{made}");
        assert_eq!([&read.report["errors"], &read.report["events"]], [&json!([]), &json!([])], "{made}");
    }
    once(&store.open()).await;
    assert_eq!((read().report["serial"].as_u64(), read().report["streams"].as_object().unwrap().len()), (Some(1), 2));
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

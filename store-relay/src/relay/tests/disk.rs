//! What becomes of files: rot, loss, a disk without room, a power cut.

use super::*;
use crate::trial::TrialEnd;
use std::sync::atomic::AtomicBool;

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

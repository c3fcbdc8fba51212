//! Disks that fail to sync, servers that give nothing right, and faults whose cause is gone.

use super::*;
use crate::pace::From;
use crate::tries::Tries;
use crate::upstream::Heard;
use proto::clock::boot_id;
use proto::wire::StreamState;

#[tokio::test]
async fn a_failed_sync_halts_wherever_it_is_met() {
    // Idle work; after a commit; when there is no room.
    for place in ["idle", "apply", "no room"] {
        let mut hq = usual();
        let mut r = Register::enrolled(&hq, &hq.url(), &[]);
        (r.config.limits.unpacked_bytes, r.config.limits.ratio) = (u64::MAX, u64::MAX);
        let agent = r.open();
        poll_and_cycle(&agent).await;
        if place != "idle" {
            hq.delta(PRICE, 51, &rows(100, 51));
        }
        if place == "no room" {
            hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs[1].unpacked = 1 << 50;
        }
        hq.sign();
        agent.db.sync_fails.store(true, Ordering::Relaxed);
        assert_eq!(cycle(&agent).await, End::Halted, "{place}");
        assert!(codes(&agent).contains(&fault::HALTED.to_owned()), "{place}: {:?}", codes(&agent));
        agent.db.sync_fails.store(false, Ordering::Relaxed);
        assert_eq!(cycle(&agent).await, End::Halted, "{place}: not tried again");
    }
}

/// A register that looks at its relay, and at headquarters where that one fails.
async fn with_a_fallback() -> (Hq, Relay, Register) {
    let hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 50), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[hq.url()]);
    (hq, relay, r)
}

#[tokio::test]
async fn a_relay_that_gives_objects_but_no_versions_is_left() {
    let (mut hq, relay, r) = with_a_fallback().await;
    let agent = r.open();
    poll_and_cycle(&agent).await;
    relay.refuses("v1/versions", Some(500));
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    for _ in 0..13 {
        r.clock.advance(10 * S);
        assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Silence(_)));
        cycle(&agent).await;
    }
    assert_eq!((agent.upstream.read_from(), version(&agent, PRICE)), (From::Fallback, Some(51)));
    relay.refuses("v1/versions", None);
    poll_and_cycle(&agent).await;
    assert_eq!(agent.upstream.read_from(), From::Relay);
}

/// A bucket's copy rotted, or a cache holds half of it, and the relay is down.
#[tokio::test]
async fn a_pack_that_no_fallback_has_right_is_fetched_ever_later() {
    let (mut hq, relay, r) = with_a_fallback().await;
    let agent = r.open();
    poll_and_cycle(&agent).await;
    relay.be_silent(true);
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.delta("promo@all", 8, &rows(11, 8));
    hq.sign();
    let (path, good) = hq.bend(PRICE, 51, PackKind::Delta);
    let part = r.config.data_dir.join("packs").join(PRICE);
    let look = async |after: u64| {
        r.clock.advance(Duration::from_secs(after));
        let _ = std::fs::remove_dir_all(&part);
        agent.upstream.poll_relay(Duration::ZERO).await;
        cycle(&agent).await;
        // What was fetched of it leaves its directory.
        part.exists()
    };
    // With a new list what lies there is swept.
    look(600).await;
    let fetched = [look(59).await, look(1).await, look(119).await, look(1).await, look(239).await];
    assert_eq!(fetched, [false, true, false, true, false]);
    assert_eq!((agent.upstream.read_from(), version(&agent, "promo@all")), (From::Fallback, Some(8)), "others go on");
    assert_eq!((version(&agent, PRICE), codes(&agent)), (Some(50), vec![fault::REFUSED.to_owned()]));
    std::fs::write(&path, &good).unwrap();
    assert!(look(1).await);
    assert_eq!(version(&agent, PRICE), Some(51));
}

#[tokio::test]
async fn faults_of_what_is_listed_no_more_end() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    // A pack that is wrong at its source, and then the store changes its zone.
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    hq.bend(PRICE, 51, PackKind::Delta);
    cycle(&agent).await;
    assert_eq!(codes(&agent), [fault::REFUSED]);
    hq.full("price@zone-west", 3, &rows(80, 300));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(codes(&agent), [""; 0]);
    // A stream that drifted, and then is published no more.
    r.tamper("UPDATE promo SET cents = 5");
    agent.verify().await.unwrap();
    assert_eq!(codes(&agent), [fault::DRIFT]);
    hq.streams.remove(&instance("promo@all").stream);
    hq.sign();
    cycle(&agent).await;
    assert!(codes(&agent).is_empty() && agent.memory.drifts().is_empty(), "{:?}", codes(&agent));
    agent.verify().await.unwrap();
    assert_eq!(codes(&agent), [""; 0], "nor is it told anew");
}

#[tokio::test]
async fn an_entry_that_cannot_be_taken_stops_its_own_stream_alone() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    // Known of the stream before: that a pack of it is bad, and that its rows drifted.
    let bad = format!("{PRICE}/0000000052.delta.pack").parse().unwrap();
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.delta(PRICE, 52, &rows(100, 52));
    agent.memory.avoid(&bad, "bad", r.clock.now());
    r.tamper("UPDATE price SET cents = 5 WHERE sku = 1");
    agent.verify().await.unwrap();
    hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs[1].unpacked = 1 << 50;
    hq.delta("promo@all", 8, &rows(10, 2));
    hq.sign();
    assert_eq!(run::once(&agent).await, Exit::Partly);
    let is_kept = |agent: &Agent| {
        let shown = report::stand(agent, agent.memory.look(|f| f.open()));
        let told: Vec<_> = shown.errors.iter().map(|f| (f.code.as_str(), f.instance.clone())).collect();
        assert_eq!(told, [(fault::DRIFT, Some(instance(PRICE))), (fault::STREAM_REFUSED, Some(instance(PRICE)))]);
        assert!(shown.errors[1].text.contains("BAD_MANIFEST: stream price: pack 51 delta would unpack"), "{shown:?}");
        let debts = shown.debts.join("\n");
        assert!(debts.starts_with("price: what manifest 2 lists cannot be taken here"), "{debts}");
        assert_eq!((version(agent, PRICE), version(agent, "promo@all")), (Some(50), Some(8)));
        assert!(agent.memory.avoided().contains(&bad) && agent.memory.drifts().len() == 1);
    };
    is_kept(&agent);
    assert_eq!((r.rows("price").len(), r.rows("promo")), (100, rows(10, 2)));
    // The same after a restart, from what is kept.
    drop(agent);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    is_kept(&agent);
    // Without the drift the stream itself says that something is wrong.
    agent.memory.healed(&instance(PRICE).stream);
    agent.memory.faults(|f| f.mend(fault::DRIFT, |_| true));
    let state = |agent: &Agent| report::stand(agent, Vec::new()).streams[&instance(PRICE)].state;
    assert_eq!(state(&agent), StreamState::Error);
    // A list that can be taken: it goes on.
    hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs.truncate(1);
    hq.full(PRICE, 53, &rows(100, 53));
    hq.sign();
    poll_and_cycle(&agent).await;
    assert_eq!((state(&agent), r.rows("price")), (StreamState::Ok, rows(100, 53)));
    assert_eq!(run::once(&agent).await, Exit::Done);
    assert!(agent.memory.avoided().is_empty() && debts(&agent).is_empty(), "{}", debts(&agent));
}

#[tokio::test]
async fn refused_heartbeats_keep_their_beginning() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    let began = r.clock.now();
    agent.memory.faults(|f| f.raise(fault::REFUSED, None, Some(report::HEARTBEAT), "unknown", began));
    r.clock.advance(60 * S);
    poll_and_cycle(&agent).await;
    assert_eq!(agent.memory.look(|f| f.open())[0].since, began);
    // A static server in the relay's place.
    assert!(!report::send(&agent).await.unwrap());
    assert_eq!(codes(&agent), [""; 0]);
}

#[tokio::test]
async fn a_pack_that_a_wrong_clock_blamed_is_tried_again() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let (agent, now) = (r.open(), r.clock.now());
    let name = format!("{PRICE}/0000000050.full.pack").parse().unwrap();
    agent.memory.avoid(&name, "bad", after(now, 86_400 * 365 * S));
    assert!(!agent.memory.avoids(&name, now));
    agent.memory.avoid(&name, "bad", now);
    assert!(agent.memory.avoids(&name, after(now, 3599 * S)) && !agent.memory.avoids(&name, after(now, 3600 * S)));
}

#[tokio::test]
async fn a_failed_sync_of_the_devices_own_file_halts_and_is_told() {
    let hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 50), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[]);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    report::send(&agent).await.unwrap();
    let kept = lock(&agent.device).fact::<u64>("seq").unwrap();
    // Whatever was to be written: most of those who write only warn of it.
    lock(&agent.device).fail_sync();
    report::send(&agent).await.unwrap();
    let told = relay.desk.beats.lock().unwrap().last().unwrap().clone();
    assert_eq!((told.seq, told.errors[0].code.as_str()), (2, fault::HALTED));
    assert_eq!(cycle(&agent).await, End::Halted);
    assert!(agent.latch(&instance(PRICE), "a row differs").is_err(), "nothing is said to be kept that is not");
    assert_eq!(lock(&agent.device).fact::<u64>("seq").unwrap(), kept);
    drop(agent);
    // In the middle of a cycle it ends as one.
    let agent = r.watched(Some(std::sync::Arc::new(|_| true)));
    poll_and_cycle(&agent).await;
    lock(&agent.device).fail_sync();
    assert_eq!(agent.settle(End::Done, false).await, End::Halted);
    assert_eq!(codes(&agent), [fault::HALTED]);
}

#[tokio::test]
async fn a_lock_that_cannot_be_opened_is_not_told_as_another_command() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    std::fs::create_dir(r.config.data_dir.join("lock")).unwrap();
    let failed = cli::once(r.config.clone(), r.clock.clone(), true).await.unwrap_err();
    assert_eq!(cli::code_of(&failed), "MACHINE", "{failed}");
}

#[tokio::test]
async fn a_number_that_cannot_be_written_is_told_by_the_heartbeat_that_has_it() {
    let hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 50), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[]);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    for (seq, refuse) in [(1, false), (2, true), (3, true), (4, false)] {
        lock(&agent.device).refuse_writes(refuse);
        report::send(&agent).await.unwrap();
        let told = relay.desk.beats.lock().unwrap().last().unwrap().clone();
        let told_codes: Vec<&str> = told.errors.iter().map(|f| f.code.as_str()).collect();
        assert_eq!((told.seq, told_codes), (seq, vec![fault::LOCAL_FILES; usize::from(refuse)]));
    }
    assert_eq!(codes(&agent), [""; 0]);
}

#[tokio::test]
async fn a_stream_that_was_forgotten_is_told_until_it_is_held_again() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    // Price is stuck meanwhile: its pack is nowhere.
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    std::fs::remove_file(hq.pack_path(PRICE, 51, PackKind::Delta)).unwrap();
    r.tamper("UPDATE tillcast_stream SET applied_at = 'yesterday' WHERE stream = 'promo'");
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Retry);
    let drifts = |agent: &Agent| {
        let open = agent.memory.look(|f| f.open());
        open.into_iter().filter(|f| f.code == fault::DRIFT).map(|f| (f.instance, f.object)).collect::<Vec<_>>()
    };
    let forgotten = [(Some(instance("promo@all")), Some("store.db".to_owned()))];
    assert_eq!(drifts(&agent), forgotten);
    drop(agent);
    let agent = r.open();
    assert_eq!(drifts(&agent), forgotten, "a restart heals nothing");
    poll_and_cycle(&agent).await;
    assert_eq!((version(&agent, "promo@all"), version(&agent, PRICE)), (Some(7), Some(50)));
    assert_eq!(drifts(&agent), []);
    assert!(agent.memory.look(|f| f.to_tell()).iter().any(|f| f.code == fault::DRIFT), "headquarters hears of it");
}

#[tokio::test]
async fn a_deadly_pack_that_was_passed_is_told_once_and_forgotten() {
    for unlisted in [false, true] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        hq.delta(PRICE, 51, &rows(100, 51));
        let deadly = format!("{PRICE}/0000000051.delta.pack");
        if unlisted {
            hq.streams.remove(&instance(PRICE).stream);
        } else {
            hq.full(PRICE, 51, &rows(100, 51));
        }
        hq.sign();
        for _ in 0..5 {
            Tries::open(&r.config.data_dir, Duration::ZERO, &boot_id()).begin(&deadly.parse().unwrap());
        }
        let agent = r.open();
        let told = || agent.memory.look(|f| f.to_tell().into_iter().map(|f| (f.object, f.since)).collect::<Vec<_>>());
        let has_a_word = || agent.memory.look(|f| f.to_tell().iter().all(|f| f.text.starts_with("CRASH: ")));
        let began = r.clock.now();
        for _ in 0..3 {
            assert_eq!(poll_and_cycle(&agent).await, End::Done, "{unlisted}");
            assert!(has_a_word());
            assert_eq!((codes(&agent), told()), (vec![], vec![(Some(deadly.clone()), began)]), "{unlisted}");
            r.clock.advance(S);
        }
        assert_eq!(version(&agent, PRICE), Some(if unlisted { 50 } else { 51 }));
        drop(agent);
        assert_eq!(Tries::open(&r.config.data_dir, Duration::ZERO, &boot_id()).last(), None, "{unlisted}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_full_of_a_stream_that_drifted_is_told_until_it_is_healed() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    r.tamper("UPDATE price SET cents = 1 WHERE sku = 5");
    agent.verify().await.unwrap();
    hq.bend(PRICE, 50, PackKind::Full);
    let began = r.clock.now();
    let wrong = |agent: &Agent| {
        let open = agent.memory.look(|f| f.open());
        open.into_iter().filter(|f| f.code != fault::DRIFT).map(|f| (f.code, f.since)).collect::<Vec<_>>()
    };
    for _ in 0..3 {
        cycle(&agent).await;
        assert_eq!(wrong(&agent), [(fault::REFUSED.to_owned(), began)]);
        r.clock.advance(S);
    }
    // The same of one that only its application shows to be bad.
    let name = format!("{PRICE}/0000000050.full.pack");
    let pack = name.parse().unwrap();
    agent.memory.avoid(&pack, "bad", began);
    agent.memory.faults(|f| f.raise(fault::PACK_IN_ERROR, Some(&instance(PRICE)), Some(&name), "bad", began));
    cycle(&agent).await;
    assert_eq!(wrong(&agent).len(), 2);
    hq.full(PRICE, 51, &rows(100, 51));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((r.rows("price"), codes(&agent)), (rows(100, 51), vec![]));
}

//! Cycles against a directory, which is a static source.

use super::kit::*;
use crate::agent::Step;
use crate::memory;
use crate::pace::End;
use crate::report;
use crate::verify;
use proto::clock::{Clock as _, SystemClock, Timestamp};
use proto::device::Device;
use proto::layout::PackKind;
use proto::limits::Limits;
use proto::wire::{Network, StreamState, fault};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn codes(agent: &crate::agent::Agent) -> Vec<String> {
    agent.memory.look(|f| f.open().into_iter().map(|f| f.code).collect())
}

/// Two streams at their first fulls.
fn usual() -> Hq {
    let mut hq = Hq::new();
    hq.full("price@zone-east", 50, &rows(100, 100));
    hq.full("promo@all", 7, &rows(10, 1));
    hq.sign();
    hq
}

#[tokio::test]
async fn install_then_deltas_and_the_digests_are_the_signed_ones() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-east"), version(&agent, "promo@all")), (Some(50), Some(7)));
    let mut after = rows(100, 100);
    after.insert(5, 999);
    after.remove(&6);
    after.insert(500, 1);
    hq.delta("price@zone-east", 51, &after);
    hq.delta("price@zone-east", 53, &rows(99, 98));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(99, 98));
    assert_eq!(r.downloads(), 0, "packs are deleted after being applied");
    let status = report::stand(&agent, Vec::new());
    let price = &status.streams[&instance("price@zone-east")];
    assert_eq!((price.version, price.state), (Some(v(53)), StreamState::Ok));
    assert_eq!(price.digests, hq.streams[&instance("price@all").stream].digests);
    assert_eq!((status.serial, status.network), (Some(2), Network::InStore));
    assert_eq!(agent.metrics.transactions(), 4);
    assert_eq!(cycle(&agent).await, End::Done, "and again: nothing to do");
    assert_eq!(agent.metrics.transactions(), 4);
    assert!(!verify::check(agent.db.path(), &Limits::default()).unwrap().drift);
}

#[tokio::test]
async fn a_kill_at_any_step_leaves_a_whole_version_and_the_next_start_finishes() {
    let count = Arc::new(AtomicUsize::new(0));
    let mut stop_at = 0;
    loop {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        hq.delta("price@zone-east", 51, &rows(100, 101));
        hq.full("price@zone-east", 52, &rows(100, 102));
        hq.delta("promo@all", 8, &rows(12, 2));
        hq.sign();
        count.store(0, Ordering::Relaxed);
        let (counter, stop) = (count.clone(), stop_at);
        let observer = Arc::new(move |_: &Step| counter.fetch_add(1, Ordering::Relaxed) < stop);
        poll_and_cycle(&r.watched(Some(observer))).await;
        let reached_the_end = count.load(Ordering::Relaxed) <= stop_at;
        let seen = r.rows("price");
        assert!((100..=102).any(|c| seen == rows(100, c)), "a mixture after step {stop_at}");
        let agent = r.open();
        poll_and_cycle(&agent).await;
        assert_eq!(r.rows("price"), rows(100, 102));
        assert_eq!(r.rows("promo"), rows(12, 2));
        assert_eq!(r.downloads(), 0);
        if reached_the_end {
            break;
        }
        stop_at += 1;
    }
    assert!(stop_at > 8, "{stop_at} steps");
}

#[tokio::test]
async fn drift_is_found_at_the_next_touching_delta_and_healed_by_a_full_and_told() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    for (n, tampering) in [
        "UPDATE price SET cents = 1 WHERE sku = 5",
        "DELETE FROM price WHERE sku = 5",
        "DROP TABLE price",
        "ALTER TABLE price RENAME COLUMN cents TO c",
        "CREATE INDEX mine ON price (cents); DELETE FROM price",
    ]
    .into_iter()
    .enumerate()
    {
        r.tamper(tampering);
        let mut next = rows(100, 100);
        next.insert(5, 700 + n as i64);
        hq.delta("price@zone-east", 51 + n as u64, &next);
        hq.sign();
        assert_eq!(cycle(&agent).await, End::Done, "{tampering}");
        assert_eq!(r.rows("price"), next, "{tampering}");
        assert!(agent.memory.drifts().is_empty());
        assert!(codes(&agent).is_empty(), "healed: {:?}", codes(&agent));
        let told = agent.memory.look(|f| f.to_tell());
        assert_eq!(told[0].code, fault::DRIFT, "HQ hears of it all the same");
        assert_eq!(version(&agent, "promo@all"), Some(7));
    }
}

#[tokio::test]
async fn verify_latches_drift_and_the_next_cycle_heals_at_the_same_version() {
    let mut hq = usual();
    hq.delta("price@zone-east", 51, &rows(100, 101));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    r.tamper("DELETE FROM price WHERE sku = 9");
    let found = verify::check(&r.config.store_db(), &Limits::default()).unwrap();
    assert!(found.drift);
    assert!(found.text().contains("DRIFT: the 99 rows of table price have digest"), "{}", found.text());
    {
        let mut device = Device::open(&r.config.data_dir, &r.config.device(), &Limits::default()).unwrap();
        memory::latch_offline(&mut device, &found.drifted(), Timestamp::UNIX_EPOCH).unwrap();
    }
    let agent = r.open();
    agent.upstream.poll_relay(Duration::ZERO).await;
    // The only full is older than what readers saw: it comes with the delta, in one transaction.
    let before = agent.metrics.transactions();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(agent.metrics.transactions(), before + 1);
    assert_eq!(r.rows("price"), rows(100, 101));
    assert!(!verify::check(&r.config.store_db(), &Limits::default()).unwrap().drift);
    let told = agent.memory.look(|f| f.to_tell());
    assert!(told.iter().any(|f| f.code == fault::DRIFT), "headquarters hears of it though it is healed");
    drop(agent);
    assert!(r.open().memory.drifts().is_empty(), "the latch is off for good");
    // The power went when the latch was off and the fault not yet written as mended.
    {
        let mut device = Device::open(&r.config.data_dir, &r.config.device(), &Limits::default()).unwrap();
        memory::latch_offline(&mut device, &found.drifted(), Timestamp::UNIX_EPOCH).unwrap();
        device.set_fact("drift", &BTreeMap::<String, String>::new()).unwrap();
    }
    assert!(codes(&r.open()).is_empty());
}

/// Somebody else published that number (a headquarters that was set back): the rows are those of the digest noted here.
#[tokio::test]
async fn other_rows_under_the_listed_version_are_healed_by_a_full() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let listed = r.rows("price");
    let mut other = listed.clone();
    other.insert(5, 1);
    r.tamper(&format!(
        "UPDATE price SET cents = 1 WHERE sku = 5; UPDATE tillcast_table SET digest = '{}' WHERE name = 'price'",
        digest(&other)
    ));
    assert!(!verify::check(&r.config.store_db(), &Limits::default()).unwrap().drift, "in itself it is sound");
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), listed);
    assert!(agent.memory.drifts().is_empty() && codes(&agent).is_empty());
    let told = agent.memory.look(|f| f.to_tell());
    assert!(told[0].code == fault::DRIFT && told[0].text.contains("table price"), "{told:?}");
    let transactions = agent.metrics.transactions();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(agent.metrics.transactions(), transactions);
}

#[tokio::test]
async fn a_bad_pack_is_avoided_and_reported_while_other_streams_go_on_and_a_way_round_is_taken() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    hq.poisoned_delta("price@zone-east", 51, &rows(100, 666));
    hq.delta("promo@all", 8, &rows(10, 2));
    hq.sign();
    let agent = r.open();
    poll_and_cycle(&agent).await;
    assert_eq!((version(&agent, "price@zone-east"), version(&agent, "promo@all")), (Some(50), Some(8)));
    assert_eq!(r.rows("price"), rows(100, 100), "still selling at the old prices");
    assert_eq!(codes(&agent), [fault::PACK_IN_ERROR]);
    let status = report::stand(&agent, agent.memory.look(|f| f.open()));
    assert_eq!(status.streams[&instance("price@zone-east")].state, StreamState::Error);
    assert_eq!(status.errors[0].object.as_deref(), Some("price@zone-east/0000000051.delta.pack"));
    drop(agent);
    // Over a restart it stays avoided; a full later leads past it.
    hq.full("price@zone-east", 52, &rows(100, 102));
    hq.sign();
    let agent = r.open();
    let before = agent.metrics.transactions();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(agent.metrics.transactions(), before + 1, "the bad pack was not tried again");
    assert_eq!(r.rows("price"), rows(100, 102));
    assert!(codes(&agent).is_empty());
    assert_eq!(agent.memory.look(|f| f.to_tell())[0].code, fault::PACK_IN_ERROR);
}

#[tokio::test]
async fn a_corrupt_file_at_the_source_is_refused_and_its_way_round_taken_at_once() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.delta("price@zone-east", 51, &rows(100, 101));
    hq.full("price@zone-east", 51, &rows(100, 101));
    hq.delta("promo@all", 8, &rows(11, 8));
    hq.sign();
    for (i, n) in [("price@zone-east", 51), ("promo@all", 8)] {
        let path = hq.pack_path(i, n, PackKind::Delta);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), Some(51), "by the full");
    assert_eq!((version(&agent, "promo@all"), r.rows("promo")), (Some(7), rows(10, 1)));
    assert!(codes(&agent).contains(&fault::REFUSED.to_owned()));
    // Put right at the source: taken, and the fault ends.
    let at = hq.pack_path("promo@all", 8, PackKind::Delta);
    let mut again = usual();
    again.delta("promo@all", 8, &rows(11, 8));
    std::fs::copy(again.pack_path("promo@all", 8, PackKind::Delta), at).unwrap();
    cycle(&agent).await;
    assert_eq!(version(&agent, "promo@all"), Some(8));
    assert!(!codes(&agent).contains(&fault::REFUSED.to_owned()), "{:?}", codes(&agent));
}

#[tokio::test]
async fn what_is_not_there_yet_is_waited_for_as_far_as_a_way_leads() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.delta("price@zone-east", 51, &rows(100, 101));
    hq.delta("price@zone-east", 52, &rows(100, 102));
    hq.sign();
    let late = hq.pack_path("price@zone-east", 52, PackKind::Delta);
    let hidden = late.with_extension("hidden");
    std::fs::rename(&late, &hidden).unwrap();
    assert_eq!(cycle(&agent).await, End::Done, "no hurry at a static source");
    assert_eq!(version(&agent, "price@zone-east"), Some(51));
    let status = report::stand(&agent, Vec::new());
    assert!(status.debts[0].starts_with("price@zone-east: no usable pack leads from version 51"), "{:?}", status.debts);
    std::fs::rename(&hidden, &late).unwrap();
    cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), Some(52));
    assert!(report::stand(&agent, Vec::new()).debts.is_empty());
}

#[tokio::test]
async fn a_zone_switch_and_a_new_epoch_are_one_transaction_each() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.full("price@zone-west", 3, &rows(80, 300));
    hq.delta("price@zone-west", 4, &rows(80, 301));
    hq.sign();
    let before = agent.metrics.transactions();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-west"), agent.metrics.transactions()), (Some(4), before + 1));
    assert_eq!(r.rows("price"), rows(80, 301));
    // A stolen key jumped ahead; the new epoch leads back to low numbers.
    hq.new_epoch();
    hq.serial = 0;
    hq.streams.clear();
    hq.full("price@zone-west", 2, &rows(80, 400));
    hq.full("promo@all", 1, &rows(3, 3));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-west"), version(&agent, "promo@all")), (Some(2), Some(1)));
    assert_eq!(r.rows("price"), rows(80, 400));
}

/// Whoever has the publisher's key brings no new streams here.
#[tokio::test]
async fn a_stream_that_root_keys_did_not_allow_is_left_alone_and_told() {
    let mut hq = usual();
    hq.allow(&["price", "promo"]);
    hq.full("extra@all", 1, &rows(5, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let told = |agent: &_| {
        let versions = ["price@zone-east", "promo@all", "extra@all"].map(|i| version(agent, i));
        assert_eq!(versions, [Some(50), Some(7), None]);
        let status = report::stand(agent, Vec::new());
        let [error] = &status.errors[..] else { panic!("{:?}", status.errors) };
        assert_eq!((error.code.as_str(), error.object.as_deref()), (fault::STREAM_REFUSED, Some("extra")));
        assert!(error.text.contains("trust file 2 does not name it"), "{}", error.text);
    };
    let agent = r.open();
    poll_and_cycle(&agent).await;
    told(&agent);
    drop(agent);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    told(&agent);
    hq.allow(&[]);
    hq.sign();
    cycle(&agent).await;
    assert_eq!(version(&agent, "extra@all"), Some(1));
    assert!(report::stand(&agent, Vec::new()).errors.is_empty());
}

/// Mix and match: a version is taken with what it was made with, or not yet. Others go on.
#[tokio::test]
async fn a_stream_waits_for_the_versions_that_it_requires() {
    let mut hq = usual();
    hq.full("tax@all", 3, &rows(5, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let versions = |agent: &_| ["price@zone-east", "promo@all", "tax@all"].map(|i| version(agent, i));
    assert_eq!(versions(&agent), [Some(50), Some(7), Some(3)]);

    // Tax comes after price in the alphabet, and is larger.
    hq.delta("price@zone-east", 51, &rows(101, 100));
    hq.delta("promo@all", 8, &rows(11, 1));
    hq.poisoned_delta("tax@all", 4, &rows(500, 2));
    hq.requires("price", "tax", 4);
    hq.sign();
    cycle(&agent).await;
    assert_eq!(versions(&agent), [Some(50), Some(8), Some(3)], "what tax has is refused, and price waits for it");
    let status = report::stand(&agent, Vec::new());
    let why = "price@zone-east: DEP_MISSING: it requires version 4 of tax, which this register does not hold yet";
    assert!(status.debts.iter().any(|d| d == why), "{:?}", status.debts);
    assert_eq!(status.streams[&instance("price@zone-east")].state, StreamState::Behind);
    assert_eq!(codes(&agent), [fault::PACK_IN_ERROR], "one fault is told once");

    hq.full("tax@all", 5, &rows(500, 3));
    hq.sign();
    cycle(&agent).await;
    assert_eq!(versions(&agent), [Some(51), Some(8), Some(5)], "both in one cycle, what is required first");
    assert!(report::stand(&agent, Vec::new()).debts.is_empty());

    // Rows that are not those of their version are worse than old ones of another stream.
    hq.requires("price", "tax", 6);
    hq.full("price@zone-east", 52, &rows(101, 100));
    hq.sign();
    cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), Some(51));
    agent.memory.latch_drift(&instance("price@zone-east").stream, "a hand").unwrap();
    cycle(&agent).await;
    assert_eq!((version(&agent, "price@zone-east"), r.rows("price")), (Some(52), rows(101, 100)));
}

/// Each requires the next; the one that all wait for comes last by its name and its size.
#[tokio::test]
async fn a_chain_of_streams_that_require_each_other_comes_in_one_cycle_or_stays() {
    let mut hq = Hq::new();
    let chain = ["a@all", "b@all", "c@all"];
    let require = |hq: &mut Hq, version| {
        hq.requires("a", "b", version);
        hq.requires("b", "c", version);
        hq.sign();
    };
    for (i, n) in chain.into_iter().zip([5, 50, 500]) {
        hq.full(i, 1, &rows(n, 1));
    }
    require(&mut hq, 1);
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let applied = Arc::new(Mutex::new(Vec::new()));
    let log = applied.clone();
    let agent = r.watched(Some(Arc::new(move |step: &Step| {
        if let Step::Applied(pack) = step {
            log.lock().unwrap().push(pack.to_string());
        }
        true
    })));
    let taken = || std::mem::take(&mut *applied.lock().unwrap());
    let versions = || chain.map(|i| version(&agent, i));
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(taken(), ["c", "b", "a"].map(|s| format!("{s}@all/0000000001.full.pack")));

    hq.delta("a@all", 2, &rows(5, 2));
    hq.delta("b@all", 2, &rows(50, 2));
    hq.poisoned_delta("c@all", 2, &rows(500, 2));
    require(&mut hq, 2);
    for _ in 0..2 {
        cycle(&agent).await;
        assert_eq!((versions(), taken()), ([Some(1); 3], Vec::new()));
        assert_eq!(["a", "b", "c"].map(|t| r.rows(t)), [5, 50, 500].map(|n| rows(n, 1)));
        let debts = report::stand(&agent, Vec::new()).debts;
        for (of, required) in [("a", "b"), ("b", "c")] {
            let why = format!("{of}@all: DEP_MISSING: it requires version 2 of {required}, which this");
            assert!(debts.iter().any(|d| d.starts_with(&why)), "{debts:?}");
        }
        assert_eq!(codes(&agent), [fault::PACK_IN_ERROR], "one fault is told once");
    }

    hq.full("c@all", 3, &rows(500, 3));
    require(&mut hq, 2);
    assert_eq!(cycle(&agent).await, End::Done);
    let came = ["c@all/0000000003.full.pack", "b@all/0000000002.delta.pack", "a@all/0000000002.delta.pack"];
    assert_eq!((versions(), taken()), ([Some(2), Some(2), Some(3)], came.map(str::to_owned).to_vec()));
    assert!(report::stand(&agent, Vec::new()).debts.is_empty());
}

#[tokio::test]
async fn a_stream_that_is_listed_no_more_is_kept_until_its_table_is_in_the_way() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.streams.remove(&instance("price@all").stream);
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(100, 100), "selling goes on");
    let status = report::stand(&agent, Vec::new());
    assert!(status.debts[0].contains("the manifest lists it no more"), "{:?}", status.debts);
    // The stream was renamed: its table belongs to another one now.
    hq.tables.insert("tariff", "price");
    hq.full("tariff@all", 1, &rows(5, 5));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(5, 5));
    assert!(report::stand(&agent, Vec::new()).debts.is_empty());
    assert!(codes(&agent).is_empty());
}

#[tokio::test]
async fn a_table_moves_between_streams_whatever_the_order() {
    let mut hq = usual();
    hq.tables.insert("a", "moved");
    hq.full("a@all", 1, &rows(9, 9));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.tables.insert("a", "other");
    hq.full("a@all", 2, &rows(2000, 1)); // more bytes: it comes after the stream that gets the table
    hq.tables.insert("price", "moved");
    hq.full("price@zone-east", 60, &rows(7, 7));
    hq.sign();
    cycle(&agent).await;
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((r.rows("moved"), r.rows("other")), (rows(7, 7), rows(2000, 1)));
    assert!(codes(&agent).is_empty(), "{:?}", codes(&agent));
}

#[tokio::test]
async fn tables_that_move_along_a_chain_of_streams_come_in_one_cycle() {
    let mut hq = Hq::new();
    let chain = ["x", "y", "z"];
    for (stream, table) in chain.into_iter().zip(["one", "two", "three"]) {
        hq.tables.insert(stream, table);
        hq.full(&format!("{stream}@all"), 1, &rows(9, 1));
    }
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    // z gets what y loses, and y what x loses; the one with the fewest bytes waits for both.
    for (n, (stream, table)) in [3000, 2000, 2].into_iter().zip(chain.into_iter().zip(["zero", "one", "two"])) {
        hq.tables.insert(stream, table);
        hq.full(&format!("{stream}@all"), 2, &rows(n, 2));
    }
    hq.sign();
    let late = hq.pack_path("x@all", 2, PackKind::Full);
    let away = late.with_extension("away");
    std::fs::rename(&late, &away).unwrap();
    cycle(&agent).await;
    let held = ["x@all", "y@all", "z@all"].map(|i| version(&agent, i));
    assert_eq!(held, [Some(1), Some(1), Some(1)]);
    let waits = agent.shown().waits[&instance("z@all")].clone();
    assert!(waits.contains("table two is held by stream y"), "{waits}");
    std::fs::rename(&away, &late).unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((r.rows("zero"), r.rows("one"), r.rows("two")), (rows(3000, 2), rows(2000, 2), rows(2, 2)));
    assert!(codes(&agent).is_empty() && agent.shown().waits.is_empty(), "{:?}", codes(&agent));
}

/// The stream that gives a table away requires the one that gets it, which waits for that.
#[tokio::test]
async fn what_waits_for_a_stream_is_not_waited_for_by_it() {
    let mut hq = Hq::new();
    hq.tables.insert("price", "codes");
    hq.full("price@all", 1, &rows(9, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.tables = BTreeMap::from([("tax", "codes")]);
    hq.full("price@all", 2, &rows(9, 2));
    hq.full("tax@all", 1, &rows(5, 1));
    hq.requires("price", "tax", 1);
    hq.sign();
    cycle(&agent).await;
    assert_eq!(["price@all", "tax@all"].map(|i| version(&agent, i)), [Some(2), Some(1)]);
    assert_eq!((r.rows("price"), r.rows("codes")), (rows(9, 2), rows(5, 1)));
}

#[tokio::test]
async fn a_version_of_another_epoch_is_past_no_pack() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.new_epoch();
    hq.serial = 0;
    hq.streams.clear();
    hq.full("price@zone-east", 2, &rows(80, 400));
    hq.full("promo@all", 1, &rows(3, 3));
    hq.sign();
    let (path, good) = hq.bend("price@zone-east", 2, PackKind::Full);
    for _ in 0..2 {
        cycle(&agent).await;
        assert_eq!((codes(&agent), version(&agent, "price@zone-east")), (vec![fault::REFUSED.to_owned()], Some(50)));
    }
    std::fs::write(&path, &good).unwrap();
    cycle(&agent).await;
    assert_eq!((codes(&agent), version(&agent, "price@zone-east")), (vec![], Some(2)));
}

#[tokio::test]
async fn a_hold_lets_packs_come_but_not_in() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.delta("price@zone-east", 51, &rows(100, 101));
    hq.sign();
    agent.hold.place(Duration::ZERO, Duration::from_secs(60));
    assert_eq!(cycle(&agent).await, End::Held { until: Duration::from_secs(60) });
    assert_eq!((r.rows("price"), r.downloads()), (rows(100, 100), 1));
    let status = report::stand(&agent, Vec::new());
    assert_eq!(status.streams[&instance("price@zone-east")].state, StreamState::Waiting);
    r.clock.advance(Duration::from_secs(61));
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((r.rows("price"), r.downloads()), (rows(100, 101), 0));
}

#[tokio::test]
async fn downloads_resume_after_a_kill_and_useless_ones_are_swept() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    hq.full("price@zone-east", 60, &(1..5000).map(|n| (n, n * 7919)).collect());
    hq.sign();
    let whole = std::fs::read(hq.pack_path("price@zone-east", 60, PackKind::Full)).unwrap();
    let folder = r.config.data_dir.join("packs/price@zone-east");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("0000000060.full.pack"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(folder.join("0000000050.full.pack"), b"old").unwrap();
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-east"), r.downloads()), (Some(60), 0));
}

#[tokio::test]
async fn a_lost_or_replaced_database_is_installed_anew() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    for end in ["", "-wal", "-shm"] {
        std::fs::remove_file(r.config.data_dir.join(format!("store.db{end}"))).unwrap();
    }
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(100, 100));
}

#[tokio::test]
async fn a_damaged_database_is_begun_anew_and_told() {
    let mut hq = usual();
    hq.full("price@zone-east", 51, &rows(5000, 51));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    cycle(&agent).await;
    drop(agent);
    // The header: found when it is opened.
    let path = r.config.store_db();
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[..100].fill(7);
    std::fs::write(&path, bad).unwrap();
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(5000, 51));
    assert_eq!(agent.memory.look(|f| f.to_tell())[0].code, fault::DRIFT);
    cycle(&agent).await;
    drop(agent);
    // Pages of a table: found by the delta that touches them.
    let mut bad = std::fs::read(&path).unwrap();
    let half = bad.len() / 2;
    bad[half..].fill(7);
    std::fs::write(&path, bad).unwrap();
    hq.delta("price@zone-east", 52, &rows(5000, 52));
    hq.sign();
    let agent = r.open();
    for _ in 0..3 {
        poll_and_cycle(&agent).await;
    }
    assert_eq!(r.rows("price"), rows(5000, 52));
    assert!(codes(&agent).is_empty(), "{:?}", codes(&agent));
    assert!(!verify::check(&path, &Limits::default()).unwrap().drift);
}

#[tokio::test]
async fn hostile_manifests_are_refused_and_the_last_good_one_stays() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let name = proto::layout::ObjectName::Manifest(STORE.parse().unwrap());
    let good = std::fs::read(hq.path(&name)).unwrap();
    let mut bent = good.clone();
    bent[good.len() / 2] ^= 1;
    for (bad, code) in
        [(bent, "BAD_SIGNATURE"), (b"<html>".to_vec(), "NOT_AN_ENVELOPE"), (vec![b' '; 5 << 20], "SOURCE")]
    {
        hq.put(&name, &bad);
        cycle(&agent).await;
        let faults = agent.memory.look(|f| f.open());
        assert!(faults.iter().any(|f| f.text.contains(code) || f.code == code), "{code}: {faults:?}");
        assert_eq!(report::stand(&agent, Vec::new()).serial, Some(1));
        assert_eq!(r.rows("price"), rows(100, 100));
    }
    hq.serial = 0;
    hq.full("price@zone-east", 51, &rows(100, 1));
    hq.sign();
    cycle(&agent).await;
    assert!(agent.memory.look(|f| f.open())[0].text.contains("SAME_SERIAL_OTHER_BYTES"));
    hq.serial = 1;
    hq.sign();
    cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), Some(51));
    assert!(codes(&agent).is_empty());
}

/// From 56 years behind to 50 ahead, twenty each. The clock leaps in the middle of a cycle, is as wrong at the next start,
/// and is set right.
#[tokio::test]
async fn forty_wrong_clocks_lock_nobody_out() {
    const HOUR: i64 = 3600;
    const DAY: i64 = 24 * HOUR;
    const SKEWS: [i64; 20] = [
        1,
        59,
        600,
        HOUR,
        2 * HOUR,
        25 * HOUR,
        7 * DAY,
        20 * DAY,
        29 * DAY,
        31 * DAY,
        60 * DAY,
        180 * DAY,
        366 * DAY,
        1_000 * DAY,
        5 * 365 * DAY,
        10 * 365 * DAY,
        20 * 365 * DAY,
        30 * 365 * DAY,
        40 * 365 * DAY,
        50 * 365 * DAY,
    ];
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    let behind = SKEWS.iter().map(|s| if *s == 50 * 365 * DAY { -56 * 365 * DAY } else { -s });
    for (n, skew) in behind.chain(SKEWS).enumerate() {
        let (old, new) = (rows(100, 499 + n as i64), rows(100, 500 + n as i64));
        let old = if n == 0 { rows(100, 100) } else { old };
        hq.delta("price@zone-east", 51 + n as u64, &new);
        hq.sign();
        let right = SystemClock::default().now();
        let wrong = Timestamp::from_second(right.as_second() + skew).unwrap();
        let clock = r.clock.clone();
        let leap = Arc::new(move |_: &Step| {
            clock.set(wrong);
            true
        });
        poll_and_cycle(&r.watched(Some(leap))).await;
        assert!([&old, &new].contains(&&r.rows("price")), "{skew} s: a mixture");
        r.clock.set(wrong);
        poll_and_cycle(&r.open()).await;
        let seen = r.rows("price");
        // A list that is out of date by this clock may be refused as long as the clock says so; none is for a clock
        // that is behind: signed times are not in the future.
        assert!(seen == new || skew > 29 * DAY && seen == old, "{skew} s");
        r.clock.set(right);
        let agent = r.open();
        poll_and_cycle(&agent).await;
        assert_eq!(r.rows("price"), new, "{skew} s, and the clock is right again");
        assert_eq!(codes(&agent), [""; 0], "{skew} s");
    }
}

/// The POS application's view: every read is one whole version, and none waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pos_that_reads_all_the_while_sees_whole_versions_only_and_never_waits() {
    let mut hq = usual();
    hq.full("price@zone-east", 51, &rows(3000, 51));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let stop = Arc::new(AtomicBool::new(false));
    let (over, path) = (stop.clone(), r.config.store_db());
    let pos = std::thread::spawn(move || {
        let db = read(&path);
        // Who would have to wait for somebody is refused.
        db.busy_timeout(Duration::ZERO).unwrap();
        let (mut seen, mut worst) = (BTreeSet::new(), Duration::ZERO);
        while !over.load(Ordering::Relaxed) {
            let asked = Instant::now();
            db.execute_batch("BEGIN").unwrap();
            let said: i64 =
                db.query_row("SELECT version FROM tillcast_stream WHERE stream = 'price'", [], |r| r.get(0)).unwrap();
            let (n, least, most): (i64, i64, i64) = db
                .query_row("SELECT count(*), min(cents), max(cents) FROM price", [], |r| {
                    Ok((r.get(0)?, r.get(1)?, r.get(2)?))
                })
                .unwrap();
            db.execute_batch("COMMIT").unwrap();
            worst = worst.max(asked.elapsed());
            assert_eq!((n, least, most), (3000, said, said), "a mixture of versions");
            seen.insert(said);
        }
        (seen, worst)
    });
    for n in 52..72 {
        let next = rows(3000, n as i64);
        if n % 5 == 0 {
            hq.full("price@zone-east", n, &next);
        } else {
            hq.delta("price@zone-east", n, &next);
        }
        hq.sign();
        assert_eq!(cycle(&agent).await, End::Done);
        cycle(&agent).await; // idle: the log is cut under the reader
    }
    stop.store(true, Ordering::Relaxed);
    let (seen, worst) = pos.join().unwrap();
    assert!(seen.len() > 3, "{seen:?}");
    // The figure itself is for a release build (tests/bench).
    assert!(worst < Duration::from_secs(30), "{worst:?}");
}

#[tokio::test]
async fn a_reader_that_holds_the_log_for_minutes_is_told_of() {
    let mut hq = usual();
    let mut r = Register::enrolled(&hq, &hq.url(), &[]);
    r.config.log_alarm = proto::config::HumanBytes(16 << 10);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let pos = r.reader();
    pos.execute_batch("BEGIN; SELECT count(*) FROM price").unwrap();
    hq.full("price@zone-east", 60, &rows(3000, 60));
    hq.sign();
    for (pass, told) in [(0, false), (200, false), (101, true)] {
        r.clock.advance(Duration::from_secs(pass));
        assert_eq!(cycle(&agent).await, End::Done, "updates go on");
        assert_eq!(codes(&agent) == [fault::LOG_STUCK], told, "{pass}: {:?}", codes(&agent));
    }
    pos.execute_batch("COMMIT").unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert!(codes(&agent).is_empty());
    // One that comes and goes is no fault, however long the log is in between.
    let pos = r.reader();
    for n in 61..66 {
        pos.execute_batch("BEGIN; SELECT count(*) FROM price").unwrap();
        hq.full("price@zone-east", n, &rows(3000, n as i64));
        hq.sign();
        r.clock.advance(Duration::from_secs(200));
        cycle(&agent).await;
        pos.execute_batch("COMMIT").unwrap();
        cycle(&agent).await;
        assert!(codes(&agent).is_empty(), "{n}");
    }
}

#[tokio::test]
async fn a_full_disk_keeps_the_old_version_whole_and_is_recovered_from() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.full("price@zone-east", 60, &(1..20_000).map(|n| (n, n * 7919)).collect());
    hq.delta("promo@all", 8, &rows(10, 2));
    hq.sign();
    // SQLite says SQLITE_FULL at this size, as it does on a full disk.
    agent.db.limit_pages(40).await;
    assert_eq!(cycle(&agent).await, End::DiskFull);
    assert_eq!((r.rows("price"), codes(&agent)), (rows(100, 100), vec![fault::DISK_FULL.to_owned()]));
    assert_eq!(version(&agent, "promo@all"), Some(8), "what fits goes in");
    assert_eq!(cycle(&agent).await, End::DiskFull);
    agent.db.limit_pages(1 << 20).await;
    // What is free says nothing of it.
    r.clock.advance(Duration::from_secs(3600));
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-east"), codes(&agent)), (Some(60), vec![]));
}

#[tokio::test]
async fn a_full_disk_is_over_though_a_stream_waits_for_something_else_and_not_by_a_cycle_that_reached_nobody() {
    let mut hq = usual();
    let mut r = Register::enrolled(&hq, &hq.url(), &[]);
    r.config.ballast = Some(proto::config::HumanBytes(1 << 20));
    let has_ballast = || r.config.data_dir.join("ballast").exists();
    let agent = r.open();
    poll_and_cycle(&agent).await;
    assert!(has_ballast());
    hq.full("price@zone-east", 60, &(1..20_000).map(|n| (n, n * 7919)).collect());
    hq.sign();
    agent.db.limit_pages(40).await;
    assert_eq!(cycle(&agent).await, End::DiskFull);
    let full = vec![fault::DISK_FULL.to_owned()];
    assert_eq!((codes(&agent), has_ballast()), (full.clone(), false));
    // The sources are gone for two looks.
    let (bucket, away) = (hq.dir.path().to_owned(), hq.dir.path().with_extension("away"));
    std::fs::rename(&bucket, &away).unwrap();
    for _ in 0..2 {
        assert_eq!(cycle(&agent).await, End::Retry);
        assert!(codes(&agent).contains(&full[0]) && !has_ballast(), "{:?}", codes(&agent));
    }
    std::fs::rename(&away, &bucket).unwrap();
    // There is room, and a program is stopped while it writes.
    agent.db.limit_pages(1 << 20).await;
    r.clock.advance(Duration::from_secs(3600));
    let other = rusqlite::Connection::open(r.config.store_db()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(cycle(&agent).await, End::Retry);
    assert_eq!((codes(&agent), has_ballast()), (vec![], true));
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(version(&agent, "price@zone-east"), Some(60));
}

#[tokio::test]
async fn a_pack_that_has_room_goes_in_and_one_that_has_none_is_not_written_by_each_cycle() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let tries = Arc::new(AtomicUsize::new(0));
    let count = tries.clone();
    let agent = r.watched(Some(Arc::new(move |step: &Step| {
        count.fetch_add(usize::from(matches!(step, Step::Applying(_))), Ordering::Relaxed);
        true
    })));
    poll_and_cycle(&agent).await;
    let items = |n: i64| (1..n).map(|sku| (sku, sku * 7919)).collect::<Rows>();
    hq.full("extra@all", 1, &items(20_000));
    hq.sign();
    let newest = |hq: &Hq| hq.streams[&instance("extra@all").stream].packs.last().unwrap().clone();
    // What is to stay free for others is a fiftieth of the disk.
    let disk_with = |free| agent.disk.pretend(proto::shelf::Space { free, total: free });
    let pack = newest(&hq);
    disk_with(pack.unpacked * 22 / 10 + pack.bytes);
    assert_eq!(cycle(&agent).await, End::Done, "measured: 2.1 times, of rows that are new here and have no index");
    assert_eq!((version(&agent, "extra@all"), codes(&agent)), (Some(1), vec![]));
    hq.full("extra@all", 2, &items(60_000));
    hq.sign();
    let (pack, room) = (newest(&hq), 1 << 30);
    // SQLite says SQLITE_FULL, whatever is pretended.
    agent.db.limit_pages(40).await;
    let more = pack.unpacked / 16;
    let tried = tries.load(Ordering::Relaxed);
    for (free, passed, n) in [
        (room, 0, 1),
        (room, 10, 1),
        (room - more, 10, 1),
        (room + more / 2, 10, 1),
        (room + more + 1, 10, 2),
        (room + more + 1, 3590, 2),
        (room + more + 1, 10, 3),
    ] {
        disk_with(free);
        r.clock.advance(Duration::from_secs(passed));
        assert_eq!(cycle(&agent).await, End::DiskFull);
        assert_eq!(tries.load(Ordering::Relaxed) - tried, n, "{free} free, {passed} s later");
        assert_eq!(codes(&agent), [fault::DISK_FULL]);
    }
    // Another pack, and a restart, know nothing of it.
    hq.full("extra@all", 3, &items(50_000));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::DiskFull);
    assert_eq!(tries.load(Ordering::Relaxed) - tried, 4);
    drop(agent);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "extra@all"), codes(&agent)), (Some(3), vec![]));
}

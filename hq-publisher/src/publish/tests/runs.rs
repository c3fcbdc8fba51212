//! What a run writes, where it may be cut, who runs beside it, and what ends it whole.

use super::*;
use crate::ledger::Acquired;

#[tokio::test(flavor = "multi_thread")]
async fn publishes_what_changed_and_writes_nothing_else() {
    let w = World::new().await;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed, r.instances.len()), (0, 2, 3), "{:?}", r.lines());
    w.all_is_well();
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let before = w.objects();
    let r = w.publish().await;
    assert!(r.instances.values().all(|i| i.outcome == Outcome::Unchanged), "{:?}", r.lines());
    assert_eq!((r.signed, &w.objects()), (0, &before));
    w.sql(CHANGE);
    let r = w.publish().await;
    assert_eq!(
        [outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")],
        [Outcome::Published, Outcome::Published, Outcome::Unchanged]
    );
    let changed: Vec<_> = w.objects().into_iter().filter(|(n, h)| before.get(n) != Some(h)).map(|(n, _)| n).collect();
    assert_eq!(
        changed,
        [
            "packs/catalog@all/0000000002.delta.pack",
            "packs/price@zone-east/0000000002.delta.pack",
            "stores/0421/manifest.json",
            "stores/0422/manifest.json"
        ]
    );
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_any_step_is_finished_by_the_next_run() {
    let base = World::new().await;
    base.publish().await;
    base.follow("0421", &mut base.register("register.db"));
    base.sql(CHANGE);
    let old = base.objects();
    let mut cuts = Vec::new();
    for n in 0.. {
        let w = base.twin();
        let cut = CutAt::new(n);
        let result = w.publish_cut(&options(), &cut).await;
        let Err(PublishError::Aborted(_)) = result else {
            result.unwrap();
            break;
        };
        let at = cut.cut.lock().unwrap().clone().unwrap();
        // What the bucket says right now is whole: the old or the new.
        let mut early = w.register("early.db");
        w.follow("0421", &mut early);
        // A second cut, soon after, must not matter either.
        let _ = w.publish_cut(&options(), &CutAt::new(n % 7)).await;
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{at}: {:?}", r.lines());
        w.all_is_well();
        let mut register = w.register("register.db");
        w.follow("0421", &mut register);
        w.check_rows(&register, "east");
        w.follow("0421", &mut early);
        w.check_rows(&early, "east");
        let now = w.objects();
        assert!(
            old.iter().filter(|(n, _)| n.starts_with("packs/")).all(|(n, h)| now.get(n) == Some(h)),
            "{at}: packs are for ever"
        );
        for instance in ["catalog@all", "price@zone-east"] {
            let ledger = Ledger::open(&w.config).await.unwrap();
            let instance: Instance = instance.parse().unwrap();
            let head = ledger.head(&instance).await.unwrap().unwrap();
            let (_, held) = rebuild::open(
                &w.config.state.dir.join(format!("replicas/{instance}.db")),
                &instance,
                &Limits::default(),
            )
            .unwrap();
            assert!(rebuild::is_at(held.as_ref(), &instance, &head), "{at}: {instance}");
        }
        cuts.push(at);
    }
    assert!(cuts.len() > 20, "{cuts:#?}");
    for step in ["Reserve", "WritePack", "PutPack", "Packed", "Sign", "CommitReplica", "PutManifests", "Done"] {
        assert!(cuts.iter().any(|c| c.starts_with(&format!("before {step}"))), "no cut before {step}: {cuts:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn few_rows_that_repeat_themselves_are_published() {
    let w = World::with(&CONFIG.replace("SELECT sku, name, plu FROM item", "SELECT sku, name, NULL AS plu FROM item"))
        .await;
    w.write("catalog.sql", "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL, plu INTEGER) STRICT;");
    w.sql("UPDATE item SET name = replace(hex(zeroblob(10000)), '0', 'x')");
    let r = w.publish().await;
    let pack = &r.instances[&"catalog@all".parse().unwrap()].packs[0];
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert!(pack.bytes * 200 < 400 * 20_000, "{pack:?}");
    w.follow("0421", &mut w.register("r.db"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_and_changes_nothing() {
    let w = World::new().await;
    w.publish().await;
    w.sql(CHANGE);
    w.write("price.sql", &PRICE.replace("sku TEXT NOT NULL)", "sku TEXT NOT NULL, note TEXT)"));
    w.write("hq.toml", &CONFIG.replace("SELECT id, sku FROM deal", "SELECT id, sku, NULL AS note FROM deal"));
    let w = World::open(w.dir, w.clock);
    let (objects, replica) = (w.objects(), fs::read(w.dir.path().join("state/replicas/catalog@all.db")).unwrap());
    let r = w.publish_as(PublishOptions { dry_run: true, ..options() }).await;
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    let counts = item.tables["item"].rows;
    assert_eq!((counts.delete, counts.update, counts.insert), (3, 0, 3), "a swap of PLUs, a row gone and a new one");
    assert!(item.packs[0].bytes > 100);
    assert_eq!(outcome(&r, "price@zone-west"), Outcome::Published, "{:?}", r.lines());
    assert_eq!(w.objects(), objects);
    assert_eq!(fs::read(w.dir.path().join("state/replicas/catalog@all.db")).unwrap(), replica);
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert!(ledger.publications(State::Reserved).await.unwrap().is_empty());
    assert_eq!(ledger.max_version(&"catalog@all".parse().unwrap()).await.unwrap().unwrap().get(), 1);
    assert!(w.publish().await.exit_code() == 0);
    // One that fails leaves nothing, and what a dead one left goes.
    fs::create_dir(w.dir.path().join("state/scratch/dry-1")).unwrap();
    w.write("state/scratch/dry-1/catalog@all.db", "left");
    fs::rename(w.dir.path().join("hq.db"), w.dir.path().join("away.db")).unwrap();
    w.publish_cut(&PublishOptions { dry_run: true, ..options() }, &Quiet).await.unwrap_err();
    assert_eq!(fs::read_dir(w.dir.path().join("state/scratch")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_publishers_take_turns_and_the_dead_do_not_block() {
    let mut w = World::new().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    ledger.acquire("another machine, process 1", w.clock.now(), Duration::from_secs(60)).await.unwrap();
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(e.exit_code() == 1 && e.to_string().contains("another machine, process 1"), "{e}");
    w.clock.advance(Duration::from_secs(61));
    w.publish().await;
    // One that goes on for hours does not work: it hangs.
    let Acquired::Lease(hangs) = ledger.acquire("x", w.clock.now(), Duration::from_secs(60)).await.unwrap() else {
        panic!()
    };
    for (minutes, mails) in [(0, 0), (60, 0), (1, 1), (1, 1)] {
        w.clock.advance(Duration::from_secs(minutes * 60));
        ledger.renew(hangs, w.clock.now(), Duration::from_secs(60)).await.unwrap();
        assert!(matches!(w.publish_cut(&options(), &Quiet).await, Err(PublishError::LeaseHeld { .. })));
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), mails);
    }
    ledger.release(hangs).await.unwrap();
    // What `serve` says of publishes ends with one.
    let told = ("No publish goes through", "x");
    mail::publish_notice(&ledger, w.clock.as_ref(), NOT_RUN, Some(told)).await.unwrap();
    assert!(ledger.watched(Duration::from_secs(9)).await.unwrap() >= Some(Duration::from_secs(9)));
    w.publish().await;
    assert!(ledger.open_episodes("").await.unwrap().is_empty());
    assert_eq!(ledger.watched(Duration::ZERO).await.unwrap(), Some(Duration::ZERO));
    // Two at once on one machine: both end well, nothing is published twice.
    w.config.publish.lease_wait = proto::config::HumanDuration(Duration::from_secs(90));
    w.sql(CHANGE);
    let (a, b) = tokio::join!(w.publish(), w.publish());
    assert_eq!((a.exit_code(), b.exit_code()), (0, 0));
    let published = [&a, &b].map(|r| outcome(r, "catalog@all") == Outcome::Published);
    assert_eq!(published.iter().filter(|p| **p).count(), 1);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_publishers_key_is_told_in_time_and_until_another_one_signs() {
    let w = World::new().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let told = async || ledger.open_episodes("").await.unwrap().into_iter().map(|e| e.text).collect::<Vec<_>>();
    let right = PublishOptions { clock_is_right: true, ..options() };
    for (days, expected) in [(699, 0), (2, 1), (1, 1)] {
        w.clock.advance(Duration::from_secs(days * 86_400));
        w.publish_as(right.clone()).await;
        assert_eq!(told().await, vec!["The publisher key ends"; expected], "after {days} days more");
    }
    Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap().rotate(&Default::default()).await.unwrap();
    w.publish().await;
    assert_eq!(told().await, Vec::<String>::new());
    w.all_is_well();
}

/// Another machine takes the lease, which this one was too slow to renew.
struct Stolen(std::path::PathBuf, fn(&Step) -> bool);
impl Steps for Stolen {
    fn after(&self, step: &Step) -> Result<(), Aborted> {
        if self.1(step) {
            let theirs =
                "UPDATE lease SET token = token + 1, holder = 'another machine, process 1' WHERE name = 'publish'";
            Connection::open(&self.0).unwrap().execute(theirs, []).unwrap();
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_lost_the_lease_puts_nothing_more() {
    let is_pack: fn(&Step) -> bool = |s| matches!(s, Step::WritePack(_));
    for (step, is_it, packs) in [("a pack is made", is_pack, false), ("lists are signed", |s| *s == Step::Sign, true)] {
        let w = World::new().await;
        w.publish().await;
        w.sql("UPDATE price SET cents = cents + 1");
        let before = w.objects();
        let stolen = Stolen(w.dir.path().join("state/fleet.db"), is_it);
        let e = w.publish_cut(&options(), &stolen).await.unwrap_err();
        assert_eq!((e.exit_code(), crate::code::of(&e.into())), (1, "LEASE_LOST"), "{step}");
        let after = w.objects();
        let lists = |o: &BTreeMap<String, Sha256>| -> Vec<_> {
            o.iter().filter(|(name, _)| name.contains("manifest")).map(|(n, s)| (n.clone(), *s)).collect()
        };
        assert_eq!((lists(&after), after.len() > before.len()), (lists(&before), packs), "{step}");
        w.clock.advance(Duration::from_secs(61));
        assert_eq!(w.publish().await.exit_code(), 0, "{step}");
        w.all_is_well();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_gone_is_mailed_once_and_its_return_too() {
    let w = World::new().await;
    w.publish().await;
    let away = |from: &str, to: &str| fs::rename(w.dir.path().join(from), w.dir.path().join(to)).unwrap();
    away("hq.db", "gone.db");
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(e.exit_code() == 1 && e.to_string().contains("hq.db"), "{e}");
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    away("gone.db", "hq.db");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
}

/// Three days, looked at every 12 hours as the timer does every five minutes; then headquarters is off for as long.
#[tokio::test(flavor = "multi_thread")]
async fn days_without_a_bucket_are_no_leap_of_the_clock_and_days_off_are_told() {
    let w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let away = |from: &str, to: &str| fs::rename(w.dir.path().join(from), w.dir.path().join(to)).unwrap();
    away("objects", "gone");
    w.write("objects", "no directory");
    for _ in 0..6 {
        w.clock.advance(Duration::from_secs(12 * 3600));
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(e.exit_code() == 1 && !e.to_string().contains("clock"), "{e}");
    }
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    fs::remove_file(w.dir.path().join("objects")).unwrap();
    away("gone", "objects");
    w.sql(CHANGE);
    assert_eq!(outcome(&w.publish().await, "catalog@all"), Outcome::Published);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);

    w.clock.advance(Duration::from_secs(3 * 86_400));
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(e.exit_code() == 1 && e.to_string().contains("--clock-is-right"), "{e}");
    let mails = ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 3 && mails[2].body.contains("--clock-is-right"), "{mails:?}");
    w.publish_as(PublishOptions { clock_is_right: true, ..options() }).await;
    w.publish().await;
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 4);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_replicas_than_may_stay_open_are_applied_after_the_signature() {
    let w = World::with(&CONFIG.replace("audience = \"zone\"", "audience = \"store\"")).await;
    let stores: Vec<String> = (0..70).map(|n| format!("('s{n}', 'east', NULL)")).collect();
    w.sql(&format!("INSERT INTO store VALUES {}", stores.join(", ")));
    for change in ["", "UPDATE price SET cents = cents + 1 WHERE sku = 'sku1'"] {
        w.sql(change);
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
        assert_eq!(
            r.instances.values().filter(|i| i.outcome == Outcome::Published).count(),
            72 + usize::from(change.is_empty())
        );
        w.all_is_well();
        w.check("s69", "east");
        for instance in r.instances.keys() {
            let (_, held) = rebuild::open(
                &w.config.state.dir.join(format!("replicas/{instance}.db")),
                instance,
                &Limits::default(),
            )
            .unwrap();
            assert_eq!(held.unwrap().version, r.instances[instance].version.unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_that_nobody_needs_may_rot() {
    let w = World::new().await;
    let keys = w.config.state.keys();
    fs::write(keys.join("publisher-0.key"), "rot").unwrap();
    fs::create_dir(keys.join("publisher-3.key")).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    w.sql("UPDATE price SET cents = cents + 1");
    assert_eq!(w.publish().await.exit_code(), 0);
    // The one that is needed is told of by its own name, not by that it is none.
    fs::write(keys.join("publisher-1.key"), "rot").unwrap();
    fs::remove_file(keys.join("publisher-0.key")).unwrap();
    w.sql("UPDATE price SET cents = cents + 1");
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
    assert!(e.contains("publisher-1.key") && e.contains("no key file"), "{e}");
}

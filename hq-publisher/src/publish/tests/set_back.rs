//! A ledger that was set back: it is told before anything is put over what is out, and gone above.

use super::*;
use crate::manifests::ManifestsError;

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_tells_of_all_stores_and_devices_at_once() {
    let w = World::new().await;
    w.publish().await;
    let desk = async || Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    desk().await.enroll(&"0422-01".parse().unwrap()).await.unwrap();
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    desk().await.enroll(&"0421-01".parse().unwrap()).await.unwrap();
    desk().await.revoke(&"0422-01".parse().unwrap()).await.unwrap();
    let serial = w.manifest("0421").unwrap().serial;
    for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(gone));
    }
    fs::copy(&backup, &ledger).unwrap();

    let devices = ["0421-01 was enrolled since", "0422-01 was revoked since"];
    let doctor = async || {
        let checks = crate::doctor::run(&w.config, w.clock.as_ref()).await;
        let check = checks.into_iter().find(|c| c.name == "ledger against bucket").unwrap();
        (check.verdict, check.found)
    };
    let (verdict, found) = doctor().await;
    assert_eq!(verdict, crate::doctor::Verdict::Fail);
    assert!(
        found.contains("the ledger is older than the bucket") && devices.iter().all(|d| found.contains(d)),
        "{found}"
    );
    let ledger = Ledger::open(&w.config).await.unwrap();
    // Who puts by itself tells of it once, and leaves the rest to people.
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let rows = async || ledger.stores().await.unwrap().into_iter().map(|s| s.next_serial).collect::<Vec<_>>();
    let (objects, before) = (w.objects(), rows().await);
    for _ in 0..2 {
        let told = crate::web::ticks::manifests(&serve).await.unwrap_err();
        assert!(told.contains("store 0421"), "{told}");
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
        assert!(w.objects() == objects && rows().await == before);
    }
    w.sql(CHANGE);
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert_eq!(e.exit_code(), 1);
    let mails = ledger.unsent_mails().await.unwrap();
    assert_eq!(mails.len(), 1);
    for text in [&e.to_string(), &mails[0].body] {
        assert!(["store 0421", "store 0422"].iter().chain(&devices).all(|d| text.contains(d)), "{text}");
    }
    assert_eq!(w.manifest("0421").unwrap().serial, serial, "nothing is put over it before it is told");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert!(w.manifest("0421").unwrap().serial > serial);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "one that it is over");
    assert_eq!(doctor().await.0, crate::doctor::Verdict::Pass);
    w.all_is_well();
}

/// A device told of the newer list first, and others sign meanwhile: nobody puts anything over it before it is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_is_told_whatever_devices_say_and_whoever_signs() {
    let w = inbox_world().await;
    w.publish().await;
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,east\n");
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    drop_file(&w, "price.zone-east.deal.ndjson", "{\"id\":2,\"sku\":\"b\"}\n");
    w.publish().await;
    for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(gone));
    }
    fs::copy(&backup, &ledger).unwrap();
    // A device tells of its list before anybody publishes.
    let serial = w.manifest("0421").unwrap().serial;
    let beat = BeatRow { envelope: "{}".into(), serial: Some(serial), ..w.word_of("0421", 1) };
    let ledger = Ledger::open(&w.config).await.unwrap();
    ledger.record_beats(&[beat]).await.unwrap();
    assert_eq!(ledger.store(&"0421".parse().unwrap()).await.unwrap().unwrap().next_serial, serial + 1);

    let checks = crate::doctor::run(&w.config, w.clock.as_ref()).await;
    let check = checks.into_iter().find(|c| c.name == "ledger against bucket").unwrap();
    assert_eq!(check.verdict, crate::doctor::Verdict::Fail, "{check:?}");
    // Who puts by himself signs above by the device's word, and does not put it over what nobody was told of, nor the next.
    let lists =
        || ["0421", "0423"].map(|store| fs::read(w.dir.path().join(format!("objects/stores/{store}/manifest.json"))));
    let lists = || lists().map(Result::unwrap);
    let before = lists();
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let tick = async || {
        w.clock.advance(Duration::from_secs(86_400 * 10));
        ledger.touch(w.clock.now()).await.unwrap();
        crate::web::ticks::manifests(&serve).await.unwrap_err()
    };
    for _ in 0..3 {
        let told = tick().await;
        assert!(told.contains("manifest 2 of store 0421") && lists() == before, "{told}");
    }
    // Nothing is made of what comes before it is told.
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,300\nb,200\n");
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
    assert!(e.contains("manifest 2 of store 0421") && lists() == before, "{e}");
    assert!(w.exists("inbox/price.zone-east.price.csv"));
    // Who puts by himself does not go above it, and goes on with the others.
    for _ in 0..2 {
        w.clock.advance(Duration::from_secs(86_400 * 10));
        ledger.touch(w.clock.now()).await.unwrap();
        crate::web::ticks::manifests(&serve).await.unwrap();
        assert_eq!(lists(), before);
    }
    // The other table's rows would be the backup's.
    let r = w.publish().await;
    assert!(r.exit_code() == 3 && outcome(&r, "price@zone-east") == Outcome::Refused, "{:?}", r.lines());
    let text = &r.instances[&"price@zone-east".parse().unwrap()].reason;
    assert!(text.contains("no drop has come for deal") && text.contains("drop all its files again"), "{text}");
    drop_file(&w, "price.zone-east.deal.ndjson", "{\"id\":2,\"sku\":\"b\"}\n");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    let manifest = w.manifest("0421").unwrap();
    assert!(manifest.streams["price"].version.get() == 3 && manifest.serial > serial, "above the numbers there, too");
    assert!(lists()[1] == before[1], "one that the ledger does not know is left alone");
    // Until it is told of, and then it is overtaken like any other.
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,east\n");
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
    assert!(e.contains("of store 0423") && lists()[1] == before[1], "{e}");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(listed(&w, "0423"), ["catalog@all", "price@zone-east"]);
}

/// A list that no ledger could come to is a thief's: there is no serial above each.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_with_a_serial_out_of_reach_is_not_gone_above() {
    let w = World::new().await;
    w.publish().await;
    let mut list = w.manifest("0421").unwrap();
    list.serial = u64::MAX;
    let keys = crate::keys::Keyring::new(w.config.state.keys()).keys(crate::keys::Role::Publisher).unwrap();
    let path = w.dir.path().join("objects/stores/0421/manifest.json");
    fs::write(&path, proto::trust::sign_manifest(&list, &keys[0].key).unwrap()).unwrap();
    w.sql(CHANGE);
    for _ in 0..3 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err().to_string();
        assert!(e.contains("--new-epoch"), "{e}");
    }
    fs::remove_file(path).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    assert!(w.manifest("0421").unwrap().serial < 9);
    w.all_is_well();
}

/// Devices are enrolled before the first publish: what was put for them then does not hide what was published since.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_before_the_first_publish_signs_no_empty_lists() {
    let w = World::new().await;
    let desk = async || Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    for relay in ["0421", "0422"] {
        desk().await.enroll(&relay.parse().unwrap()).await.unwrap();
    }
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    w.publish().await;
    w.lose_ledger();
    fs::copy(&backup, &ledger).unwrap();

    // The first time it is found as the list is put; after that the serial is above, and it is found all the same.
    let objects = w.objects();
    for why in ["run `publish`", "Run publish first"] {
        let e = desk().await.enroll(&"0421-01".parse().unwrap()).await.unwrap_err().to_string();
        assert!(e.contains(why) && w.objects() == objects, "{e}");
    }
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let e = crate::web::ticks::manifests(&serve).await.unwrap_err();
    assert!(e.contains("Run publish first") && w.objects() == objects, "{e}");
    assert_eq!(w.publish().await.exit_code(), 0);
    desk().await.enroll(&"0421-01".parse().unwrap()).await.unwrap();
    assert_eq!(w.manifest("0421").unwrap().streams.len(), 2);
    w.all_is_well();
}

/// What a key signed is looked at while it is trusted: afterwards nobody could tell any more that the ledger was set back.
#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_let_go_of_before_a_ledger_that_was_set_back_is_told() {
    let base = inbox_world().await;
    base.publish().await;
    let desk = async || Desk::open(&base.config, base.clock.as_ref(), false).await.unwrap();
    let [old, new] = ["0421-01", "0421-02"].map(|id| id.parse().unwrap());
    desk().await.enroll(&old).await.unwrap();
    base.back_up();
    drop_file(&base, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,east\n");
    drop_prices(&base, 300);
    base.publish().await;
    desk().await.enroll(&new).await.unwrap();
    desk().await.revoke(&old).await.unwrap();
    base.restore();
    for new_epoch in [false, true] {
        let w = base.twin();
        let ledger = Ledger::open(&w.config).await.unwrap();
        let trust = async || ledger.trust().await.unwrap().len();
        let mut register = w.register("register.db");
        w.follow("0421", &mut register);
        let (objects, serial) = (w.objects(), w.manifest("0421").unwrap().serial);
        let e = revoke_key(&w, new_epoch).await.unwrap_err();
        let text = e.to_string();
        for what in ["store 0421", "store 0423: 1 for 0", "0421-02 was enrolled since", "0421-01 was revoked since"] {
            assert!(matches!(e, EnrolError::SetBack(_)) && text.contains(what), "{text}");
        }
        assert!(w.objects() == objects && trust().await == 1);
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
        // Again: the key goes at once, and no epoch begins in which registers would go back.
        let waits = async || match revoke_key(&w, new_epoch).await {
            Err(EnrolError::EpochWaits(instance)) => instance.to_string() == "price@zone-east" && new_epoch,
            other => other.unwrap().epoch == 1 && !new_epoch,
        };
        let m = async || (waits().await, trust().await, w.manifest("0421").unwrap());
        let (waits_for, files, list) = m().await;
        assert!(waits_for && files == 2 && list.epoch == 1 && list.serial > serial, "{list:?}");
        let r = w.publish().await;
        let told =
            r.problems.iter().any(|p| p.starts_with("price@zone-east") && p.contains("drop all its files again"));
        assert!(told && r.exit_code() == 3, "{:?}", r.lines());
        assert!(waits().await);
        // New rows go above what is out, and then it begins.
        drop_prices(&w, 300);
        let r = w.publish().await;
        assert_eq!(
            (r.exit_code(), w.manifest("0421").unwrap().streams["price"].version.get()),
            (0, 3),
            "{:?}",
            r.lines()
        );
        assert_eq!(revoke_key(&w, new_epoch).await.unwrap().epoch, 1 + u64::from(new_epoch));
        for _ in 0..2 {
            w.follow("0421", &mut register);
            assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a300", "b200"]);
            assert_eq!(w.publish().await.exit_code(), 0);
        }
    }
}

/// A ledger set back before a rotation, whose trust file rotted: what it does not know may be newer.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_by_a_key_that_cannot_be_followed_are_left() {
    let w = World::new().await;
    w.publish().await;
    let old = w.twin();
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().rotate(&Default::default()).await.unwrap();
    copy(&w.dir.path().join("objects"), &old.dir.path().join("objects"));
    old.write("objects/trust/0000000002.json", "rotten");
    let before = old.objects();
    assert_eq!(old.publish().await.exit_code(), 0);
    assert_eq!(old.objects(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_stay_above_what_the_bucket_has() {
    let w = World::new().await;
    w.publish().await;
    let packs = w.dir.path().join("objects/packs/catalog@all");
    fs::write(packs.join("0000000007.delta.pack"), b"of a run that the ledger forgot").unwrap();
    fs::write(packs.join("9000000000.full.pack"), b"of nobody").unwrap();
    w.sql(CHANGE);
    let r = w.publish().await;
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!((item.version.unwrap().get(), item.packs[0].kind), (8, PackKind::Full), "{:?}", r.lines());
    assert_eq!((r.exit_code(), r.problems.len()), (3, 1), "the foreign one is reported");
    w.all_is_well();
}

/// The whole machine was restored: the rows are those of a version below the one that is out.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_set_back_with_its_source_goes_above_what_is_out() {
    let w = World::new().await;
    w.publish().await;
    let (ledger, backup) = (w.dir.path().join("state/fleet.db"), w.dir.path().join("backup.db"));
    Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    let day = "UPDATE price SET cents = cents + 1 WHERE zone = 'east' AND sku = 'sku1'";
    w.sql(day);
    w.publish().await;
    let out = w.manifest("0421").unwrap().streams["price"].version;
    for gone in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(gone));
    }
    fs::copy(&backup, &ledger).unwrap();
    w.sql(&day.replace("cents + 1", "cents - 1"));
    // The backup was taken in the middle of that publish: its number is given up, and is out.
    let taken = "INSERT INTO publication (instance, version, state, epoch, contract, plan, packs, digests, created_s)
        SELECT instance, version + 1, 'reserved', epoch, contract, plan, '[]', '{}', created_s FROM publication
        WHERE instance = 'price@zone-east'";
    Connection::open(&ledger).unwrap().execute(taken, []).unwrap();
    assert_eq!(w.publish_cut(&options(), &Quiet).await.unwrap_err().exit_code(), 1, "it is told of first");
    // Who signs first makes nobody forget it,
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    desk.enroll(&"0421-01".parse().unwrap()).await.unwrap();
    // nor who looks at others.
    let only = PublishOptions { stream: Some("catalog".parse().unwrap()), ..options() };
    assert_eq!(w.publish_as(only).await.exit_code(), 0);
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert!(w.manifest("0421").unwrap().streams["price"].version > out, "{:?}", r.lines());
    assert_eq!(outcome(&r, "price@zone-west"), Outcome::Unchanged);
    w.all_is_well();
    w.check("0421", "east");
}

/// The bucket was restored too: what was out only the devices know.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_set_back_with_its_ledger_is_gone_above_by_what_devices_hold() {
    let w = World::new().await;
    w.publish().await;
    w.sql("UPDATE price SET cents = cents + 1");
    w.publish().await;
    w.clock.advance(Duration::from_secs(1));
    let ledger = Ledger::open(&w.config).await.unwrap();
    let newest = || w.manifest("0421").unwrap().streams["price"].version.get();
    let out = newest() + 6;
    let says = async |register: &str, seq: u64, version: u64| {
        let device: proto::ids::DeviceId = register.parse().unwrap();
        if ledger.device(&device).await.unwrap().is_none() {
            ledger.enrol(&device, &proto::keys::SecretKey::from_seed([7; 32]).public(), w.clock.now()).await.unwrap();
        }
        let versions = vec![("price@zone-east".parse().unwrap(), Version::try_from(version).unwrap())];
        ledger.record_beats(&[BeatRow { versions, ..w.word_of(register, seq) }]).await.unwrap();
    };
    says("0421-01", 1, out).await;
    says("0421-01", 2, out).await;
    says("0421-03", 1, newest() + 2_000_000).await;
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged, "one alone may be broken");
    says("0421-04", 1, out).await;
    ledger.revoke(&"0421-04".parse().unwrap(), w.clock.now()).await.unwrap();
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged, "who was revoked is not believed");
    says("0421-02", 1, out).await;
    let told = ledger.complaints().await.unwrap();
    let told: Vec<_> = told.iter().map(|c| (c.device.as_str(), c.fault.object.as_deref())).collect();
    let out_text = out.to_string();
    let by = ["0421-01", "0421-02", "0421-04"];
    assert_eq!(told, by.map(|device| (device, Some(&*out_text))));
    let r = w.publish().await;
    let plan = r.instances[&"price@zone-east".parse().unwrap()].plan.clone().unwrap().to_string();
    assert_eq!(plan, "full: versions are out that the ledger does not know");
    assert_eq!(newest(), out + 1);
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged, "once");
    w.all_is_well();
    w.check("0421", "east");
}

/// Who publishes first and then moves the ledger away has lists that name the old versions; the packs tell of the newer.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_moved_away_after_it_signed_old_versions_is_behind_still() {
    let w = inbox_world().await;
    w.publish().await;
    w.back_up();
    drop_prices(&w, 200);
    w.publish().await;
    w.restore();
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert_eq!(w.publish().await.exit_code(), 3);
    w.lose_ledger();
    let at = || w.manifest("0421").unwrap().streams["price"].version.get();
    for run in 0..2 {
        let r = w.publish().await;
        let told =
            r.problems.iter().any(|p| p.starts_with("price@zone-east") && p.contains("drop all its files again"));
        assert!(told && r.problems.len() == 1 && r.exit_code() == 3 && at() == 1, "{run}: {:?}", r.lines());
    }
    // The old rows are published where somebody says so,
    let old = w.twin();
    let r = old.publish_as(PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!((r.exit_code(), old.publish().await.exit_code()), (0, 0), "{:?}", r.lines());
    assert_eq!(old.manifest("0421").unwrap().streams["price"].version.get(), 3);
    // and new ones when they have come.
    drop_prices(&w, 200);
    let r = w.publish().await;
    assert_eq!((r.exit_code(), at(), w.publish().await.exit_code()), (0, 3, 0), "{:?}", r.lines());
}

/// What a run would end with is left to that: who only looked may be anybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_beside_a_ledger_set_back_says_what_a_run_would_and_changes_nothing() {
    let w = World::new().await;
    w.publish().await;
    w.back_up();
    w.sql(CHANGE);
    w.publish().await;
    w.restore();
    let ledger = Ledger::open(&w.config).await.unwrap();
    let db = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    let replica = || fs::read(w.dir.path().join("state/replicas/catalog@all.db")).unwrap();
    // Each commit of another connection's counts.
    let commits = || db.query_row("PRAGMA data_version", [], |r| r.get::<_, i64>(0)).unwrap();
    let before = (w.objects(), replica(), commits());
    let dry = PublishOptions { dry_run: true, ..options() };
    let first = w.publish_as(dry.clone()).await;
    let [told] = &first.problems[..] else { panic!("{:?}", first.lines()) };
    let stores =
        ["the ledger is older than the bucket", "store 0421 is 2 there and 1 here", "store 0422 is 2 there and 1 here"];
    assert!(first.exit_code() == 3 && stores.iter().all(|s| told.contains(s)), "{told}");
    assert!((w.objects(), replica(), commits()) == before && ledger.unsent_mails().await.unwrap().is_empty());
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(&e, PublishError::Manifests(ManifestsError::Overtaken(all)) if all.len() == 2), "{e}");
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // From then on a run goes on above.
    let before = (w.objects(), replica(), commits());
    let would = w.publish_as(dry).await;
    assert!((w.objects(), replica(), commits()) == before);
    let r = w.publish().await;
    let said = |r: &PublishReport| {
        let plan = |e: &InstanceReport| e.plan.as_ref().map(ToString::to_string);
        r.instances.iter().map(|(i, e)| (i.to_string(), e.outcome, e.version, plan(e))).collect::<Vec<_>>()
    };
    assert_eq!((said(&would), said(&first), would.exit_code()), (said(&r), said(&r), r.exit_code()));
    assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "{:?}", r.lines());
    w.all_is_well();
}

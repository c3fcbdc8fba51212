//! The bucket and its mirrors: objects that are put back, lost, or cannot be put.

use super::*;
use crate::manifests::ManifestsError;

/// A manifest of an earlier day that somebody put back, and one that is gone, are put right though nothing changed.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_put_back_or_lost_are_put_right_by_the_next_run() {
    let w = World::new().await;
    w.publish().await;
    let [old, gone] = ["0421", "0422"].map(|s| w.dir.path().join(format!("objects/stores/{s}/manifest.json")));
    let first = fs::read(&old).unwrap();
    w.sql(CHANGE);
    w.publish().await;
    let after = w.objects();
    fs::write(&old, first).unwrap();
    fs::remove_file(&gone).unwrap();
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed, w.objects()), (0, 0, after), "{:?}", r.lines());
}

/// What stands in a store's place takes no manifest; the other stores get theirs, and nothing hides that a ledger was set back.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_manifest_cannot_be_put_holds_up_nobody_else() {
    let w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let room = |store: &str| w.dir.path().join(format!("objects/stores/{store}"));
    let away = |store: &str| w.dir.path().join(format!("away-{store}"));
    let block = |store: &str| {
        fs::rename(room(store), away(store)).unwrap();
        fs::write(room(store), "").unwrap();
    };
    let free = |store: &str| {
        fs::remove_file(room(store)).unwrap();
        fs::rename(away(store), room(store)).unwrap();
    };
    let serials = async || ledger.stores().await.unwrap().iter().map(|s| (s.serial, s.put_serial)).collect::<Vec<_>>();
    block("0421");
    for n in 2..5 {
        w.sql(&format!("UPDATE item SET name = 'Name {n}' WHERE sku = 'sku1'"));
        let r = w.publish().await;
        let told =
            r.problems.iter().filter(|p| p.contains("stores/0421") && p.starts_with("1 stores get nothing")).count();
        assert_eq!((r.exit_code(), told), (3, 1), "{:?}", r.lines());
        assert_eq!(w.manifest("0422").unwrap().serial, n);
        assert_eq!(serials().await, [(2, 1), (n, n)], "nothing is signed that may hide what is there");
        assert!(ledger.publications(State::Signed).await.unwrap().is_empty());
        w.check("0422", "west");
    }
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // That the bucket is ahead for another store is told all the same, before anything is made.
    let mut ahead = w.manifest("0422").unwrap();
    ahead.serial += 5;
    let keys = crate::keys::Keyring::new(w.config.state.keys()).keys(crate::keys::Role::Publisher).unwrap();
    let ahead = proto::trust::sign_manifest(&ahead, &keys[0].key).unwrap();
    fs::write(room("0422").join("manifest.json"), &ahead).unwrap();
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Manifests(ManifestsError::Overtaken(_))), "{e}");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), w.manifest("0422").unwrap().serial), (3, 10), "{:?}", r.lines());
    // Where it is about all of them the run ends.
    block("0422");
    w.sql("UPDATE item SET name = 'Name 9' WHERE sku = 'sku1'");
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(matches!(&e, PublishError::Manifests(e @ ManifestsError::NotPut(_)) if e.stores().len() == 2), "{e}");
    }
    // It is past the commit point.
    let mails = ledger.unsent_mails().await.unwrap();
    let told: Vec<_> = mails.iter().filter(|m| m.body.contains("publish failed")).collect();
    assert!(
        matches!(told[..], [m] if m.body.contains("the next run puts it") && !m.body.contains("Nothing was")),
        "{told:?}"
    );
    free("0421");
    free("0422");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), w.manifest("0421").unwrap().serial), (0, 3), "{:?}", r.lines());
    w.all_is_well();
    let open = ledger.open_episodes(crate::alert::PUBLISH).await.unwrap();
    assert!(open.is_empty(), "{open:?}");
}

/// A list that is longer than `limits.manifest_bytes`, its last one included, is not signed; all others are.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_over_the_limit_holds_up_nobody_else() {
    let mut w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    for n in 1..=30 {
        let key = proto::keys::SecretKey::generate().unwrap().public();
        ledger.enrol(&format!("0421-{n}").parse().unwrap(), &key, w.clock.now()).await.unwrap();
    }
    assert_eq!(w.publish().await.signed, 1);
    let length = fs::metadata(w.dir.path().join("objects/stores/0421/manifest.json")).unwrap().len();
    let row = async |store: &str| ledger.store(&store.parse().unwrap()).await.unwrap().unwrap();
    let own = w.config.limits.manifest_bytes;
    w.config.limits.manifest_bytes = length - 1;
    for n in 2..5 {
        w.sql(&format!("UPDATE item SET name = 'Name {n}' WHERE sku = 'sku1'"));
        let r = w.publish().await;
        let limit = format!("bytes, over limits.manifest_bytes = {} (", length - 1);
        let is_told = |p: &&String| p.starts_with("1 stores get nothing") && p.contains("manifest of store 0421 has ");
        let told = r.problems.iter().filter(|p| is_told(p) && p.contains(&limit)).count();
        assert_eq!((r.exit_code(), r.signed, told), (3, 1, 1), "{:?}", r.lines());
        assert_eq!([w.manifest("0421").unwrap().serial, w.manifest("0422").unwrap().serial], [2, n]);
        w.check("0422", "west");
    }
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // So is who signs because of a list's age.
    for _ in 0..8 {
        w.clock.advance(Duration::from_secs(86_400));
        ledger.touch(w.clock.now()).await.unwrap();
    }
    let signer = Signer::open(&w.config, &ledger, w.clock.as_ref(), false).await.unwrap();
    let due = signer.sign_due(&ledger, w.clock.as_ref()).await.unwrap();
    let failed = due.others.unwrap_err().stores();
    assert_eq!((due.stores, failed), (vec!["0422".parse().unwrap()], BTreeSet::from(["0421".parse().unwrap()])));
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let e = desk.enroll(&"0421-31".parse().unwrap()).await.unwrap_err();
    assert!(crate::code::of(&e.into()) == "LIMITS", "and who enrols is told");
    // A key that signed a list which counts is not let go of.
    let rotate = async |finish| {
        let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
        desk.rotate(&crate::cli::Rotate { finish, ..Default::default() }).await
    };
    let e = rotate(false).await.unwrap_err();
    assert!(matches!(&e, EnrolError::Manifests(ManifestsError::NotPut(all)) if all.len() == 1), "{e}");
    let trust = manifests::newest_trust(&ledger, &w.config.limits).await.unwrap().unwrap();
    assert_eq!(trust.publishers.len(), 2);
    assert_eq!([row("0421").await.signer, row("0422").await.signer], [0, 1].map(|n| trust.publishers[n].key.id()));
    // Where it is about all of them the run ends.
    w.config.limits.manifest_bytes = 100;
    w.sql("UPDATE item SET name = 'Name 9' WHERE sku = 'sku1'");
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(matches!(&e, PublishError::Manifests(e @ ManifestsError::NotPut(_)) if e.stores().len() == 2), "{e}");
        assert_eq!((e.exit_code(), crate::code::publish(&e)), (1, "LIMITS"));
        let mails = ledger.unsent_mails().await.unwrap();
        let failed = mails.iter().filter(|m| m.subject.contains("publish failed")).collect::<Vec<_>>();
        assert!(failed.len() == 1 && failed[0].body.contains("the first run after it lists it"), "{failed:?}");
    }
    w.config.limits.manifest_bytes = own;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 2), "{:?}", r.lines());
    w.all_is_well();
    let open = ledger.open_episodes(crate::alert::PUBLISH).await.unwrap();
    assert!(open.is_empty(), "{open:?}");
}

/// What lists name is never half there: nothing is put to an empty place before somebody says that it is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_lacks_what_lists_name_gets_nothing_until_somebody_says_so() {
    let mut w = World::new().await;
    w.publish().await;
    let (objects, aside) = (w.dir.path().join("objects"), w.dir.path().join("aside"));
    let lacks = |e: PublishError| {
        let text = e.to_string();
        assert!(text.contains("catalog@all") && text.contains("publish --full") && e.exit_code() == 1, "{text}");
    };
    // Its disk is not mounted: neither the bucket as it was nor the empty place gets anything, by whatever command.
    fs::rename(&objects, &aside).unwrap();
    w.sql(CHANGE);
    let dry = PublishOptions { dry_run: true, ..options() };
    lacks(w.publish_cut(&dry, &Quiet).await.unwrap_err());
    assert!(w.publish_as(PublishOptions { full: true, ..dry }).await.exit_code() == 0, "it would be made anew");
    for _ in 0..2 {
        lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    }
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let e = desk.enroll(&"0421-01".parse().unwrap()).await.unwrap_err();
    assert!(e.to_string().contains("is its disk mounted"), "{e}");
    assert!(w.objects().is_empty(), "{:?}", w.objects());
    let mails = desk.ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 1 && mails[0].body.contains("is its disk mounted"), "{mails:?}");
    let _ = fs::remove_dir_all(&objects);
    fs::rename(&aside, &objects).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    w.all_is_well();
    // A half that somebody put there is one still.
    copy(&objects, &aside);
    fs::remove_dir_all(&objects).unwrap();
    lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    let buckets = Buckets::open(&w.config, &desk.ledger).await.unwrap();
    crate::verify::put_back(&w.config, &desk.ledger, &buckets, w.clock.as_ref()).await.unwrap();
    lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    let only = PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() };
    lacks(w.publish_cut(&only, &Quiet).await.unwrap_err());
    // Lost for good.
    let full = PublishOptions { full: true, ..options() };
    assert_eq!(w.publish_as(full).await.exit_code(), 0);
    w.all_is_well();
    assert!(w.exists("objects/trust/0000000001.json") && w.exists("objects/trust.json"));
    assert_eq!(w.publish().await.exit_code(), 0);
    // A new place: as a mirror first; or a copy.
    let before = w.objects();
    w.name_buckets(&["new"]);
    lacks(w.publish_cut(&options(), &Quiet).await.unwrap_err());
    w.name_buckets(&["objects", "new"]);
    w.publish().await;
    w.name_buckets(&["new"]);
    assert_eq!((w.publish().await.exit_code(), w.objects_in("new")), (0, before.clone()));
    copy(&w.dir.path().join("new"), &w.dir.path().join("newer"));
    for gone in ["newer/trust/0000000001.json", "newer/stores/0421/manifest.json"] {
        fs::remove_file(w.dir.path().join(gone)).unwrap();
    }
    w.name_buckets(&["newer"]);
    assert_eq!((w.publish().await.exit_code(), w.objects_in("newer")), (0, before.clone()));
    // The pointer alone went.
    fs::remove_file(w.dir.path().join("newer/trust.json")).unwrap();
    assert_eq!((w.publish().await.exit_code(), w.objects_in("newer")), (0, before));
}

/// `--full` said that the place is right, and made all but what was refused then: that is made by the first run that can.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_bucket_lacks_after_a_full_of_all_is_made_anew_once_its_stream_can_be() {
    let mut w = World::new().await;
    w.publish().await;
    fs::remove_dir_all(w.dir.path().join("objects")).unwrap();
    w.sql("INSERT INTO price VALUES ('east', 'bad', NULL)");
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
    let full = PublishOptions { full: true, ..options() };
    let is_told = |r: &PublishReport| {
        assert_eq!(r.exit_code(), 3, "{:?}", r.lines());
        let text = "lacks packs that stores' lists name, of price@zone-east, price@zone-west";
        assert!(r.problems.iter().any(|p| p.contains(text)), "{:?}", r.lines());
    };
    let r = w.publish_as(full).await;
    assert_eq!([outcome(&r, "catalog@all"), outcome(&r, "price@zone-east")], [Outcome::Published, Outcome::Refused]);
    is_told(&r);
    // It stops no other, and is told meanwhile; also while its stream is not in the settings.
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
    for text in [CONFIG.to_owned(), CONFIG[..CONFIG.find("[[stream]]\nname = \"price\"").unwrap()].to_owned()] {
        set(&mut w, &text);
        is_told(&w.publish().await);
    }
    assert_eq!(w.manifest("0421").unwrap().streams["catalog"].version.get(), 3);
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = ledger.unsent_mails().await.unwrap();
    assert_eq!(mails.iter().filter(|m| m.body.contains("The bucket lacks packs")).count(), 1, "{mails:?}");
    // What it is known to lack is no new doubt, in whatever place.
    fs::remove_file(w.dir.path().join("objects/trust.json")).unwrap();
    is_told(&w.publish().await);
    copy(&w.dir.path().join("objects"), &w.dir.path().join("new"));
    w.name_buckets(&["new"]);
    is_told(&w.publish().await);
    assert!(w.exists("objects/trust.json") && w.exists("new/trust.json"));
    w.name_buckets(&["objects"]);
    is_told(&w.publish().await);
    // With the rows that are published: only a full leads a new register there.
    set(&mut w, CONFIG);
    w.sql("DELETE FROM price WHERE sku = 'bad'");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    w.all_is_well();
    assert_eq!(w.publish().await.signed, 0);
}

/// A ledger of before it was remembered takes the bucket that it finds for the one that it knows.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_ledger_takes_its_bucket_as_known() {
    let mut w = World::new().await;
    w.publish().await;
    let ledger = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    assert_eq!(ledger.execute("DELETE FROM fact WHERE name = 'bucket'", []).unwrap(), 1);
    assert_eq!(w.publish().await.exit_code(), 0);
    w.name_buckets(&["new"]);
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_lags_is_mailed_once_and_its_return_too() {
    let w = World::with(&CONFIG.replace("\"file:objects\"", "\"file:objects\", \"file:mirror\"")).await;
    let mirror = w.dir.path().join("mirror");
    // A file where the mirror's directory should be.
    fs::remove_dir_all(&mirror).unwrap();
    fs::write(&mirror, "").unwrap();
    for _ in 0..2 {
        assert_eq!(w.publish().await.exit_code(), 3);
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 1 && mails[0].body.contains("mirror lags behind"), "{mails:?}");
    fs::remove_file(&mirror).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
}

/// Even by its mark is not even: it was not named for a while, was emptied, or set back.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_missed_something_is_brought_up_whatever_its_mark_says() {
    let mut w = World::new().await;
    let both = ["objects", "mirror"];
    w.name_buckets(&both);
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    // Not named while a pack and keys came.
    w.name_buckets(&["objects"]);
    w.sql(CHANGE);
    w.publish().await;
    let rotate = crate::cli::Rotate::default();
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().rotate(&rotate).await.unwrap();
    w.name_buckets(&both);
    assert_ne!(w.objects_in("mirror"), w.objects());
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(w.objects_in("mirror"), w.objects());
    // First for a while.
    w.name_buckets(&["mirror"]);
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
    w.publish().await;
    w.name_buckets(&["mirror", "objects"]);
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    w.name_buckets(&both);
    w.publish().await;
    // Emptied; and as it was before the last publish.
    let (mirror, backup) = (w.dir.path().join("mirror"), w.dir.path().join("backup"));
    copy(&mirror, &backup);
    fs::remove_dir_all(&mirror).unwrap();
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    w.sql("UPDATE item SET name = 'y' WHERE sku = 'sku5'");
    w.clock.advance(Duration::from_secs(60));
    w.publish().await;
    fs::remove_dir_all(&mirror).unwrap();
    fs::rename(&backup, &mirror).unwrap();
    w.publish().await;
    assert_eq!(w.objects_in("mirror"), w.objects());
    // One object alone is found by `verify`.
    fs::remove_file(mirror.join("packs/catalog@all/0000000001.full.pack")).unwrap();
    fs::write(mirror.join("stores/0421/manifest.json"), "{}").unwrap();
    let ledger = Ledger::open(&w.config).await.unwrap();
    let buckets = Buckets::open(&w.config, &ledger).await.unwrap();
    let problems = crate::verify::run(&w.config, &ledger, &buckets, |_, _| {}).await.unwrap().problems;
    assert!(problems.len() == 1 && problems[0].contains("lacks 2 objects or has others, stores/0421"), "{problems:?}");
    crate::verify::put_back(&w.config, &ledger, &buckets, w.clock.as_ref()).await.unwrap();
    assert_eq!(w.objects_in("mirror"), w.objects());
    let report = crate::verify::run(&w.config, &ledger, &buckets, |_, _| {}).await.unwrap();
    assert!(report.is_right(), "{:?}", report.lines());
}

/// Settings may be tried without a mirror: that costs no comparison of all objects later.
#[tokio::test(flavor = "multi_thread")]
async fn who_only_looks_leaves_no_mirror_behind() {
    let mut w = World::new().await;
    w.name_buckets(&["objects", "mirror"]);
    w.publish().await;
    w.name_buckets(&["objects"]);
    w.sql(CHANGE);
    let is_even = || {
        let ledger = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
        ledger.query_row("SELECT even FROM mirror", [], |r| r.get::<_, bool>(0)).unwrap()
    };
    w.publish_as(PublishOptions { dry_run: true, ..options() }).await;
    assert!(is_even());
    w.publish().await;
    assert!(!is_even());
}

//! When a full is made: as it is due, in a new epoch, for devices that are stuck, round a pack that is lost.

use super::*;

/// It stays listed until the full after the next: that is no fault any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pack_is_no_fault_once_a_full_goes_round_it() {
    let w = World::new().await;
    let full = || PublishOptions { full: true, ..options() };
    let ledger = Ledger::open(&w.config).await.unwrap();
    let verify = async |config: &Config| -> (bool, Vec<String>) {
        let buckets = Buckets::open(config, &ledger).await.unwrap();
        let r = crate::verify::run(config, &ledger, &buckets, |_, _| ()).await.unwrap();
        (r.is_right(), r.lines())
    };
    let lose = |name: &str| fs::remove_file(w.dir.path().join("objects/packs").join(name)).unwrap();
    let says = |lines: &[String], words: &[&str]| lines.iter().any(|l| words.iter().all(|w| l.contains(w)));
    w.publish().await;
    w.sql(CHANGE);
    w.publish().await;
    assert!(verify(&w.config).await.0);
    for (lost, round) in [
        ("catalog@all/0000000002.delta.pack", "0000000003.full.pack"),
        ("catalog@all/0000000003.full.pack", "0000000004.full.pack"),
        ("catalog@all/0000000003.delta.pack", "0000000004.full.pack"),
    ] {
        lose(lost);
        if lost.contains("full") || lost.contains("2.delta") {
            let (is_right, lines) = verify(&w.config).await;
            assert!(!is_right && says(&lines, &[lost, "is missing", "publish --full"]), "{lines:?}");
            assert_eq!(w.publish_as(full()).await.exit_code(), 0);
        }
        let (is_right, lines) = verify(&w.config).await;
        assert!(is_right && says(&lines, &["note", lost, round, "goes round it"]), "{lines:?}");
        w.all_is_well();
    }
    // What no store follows no publish makes anew; of a stream that the settings lost none does.
    w.sql("UPDATE store SET zone = 'east'");
    w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    let west = w.objects().into_keys().rfind(|o| o.starts_with("packs/price@zone-west")).unwrap();
    lose(west.strip_prefix("packs/").unwrap());
    let (is_right, lines) = verify(&w.config).await;
    assert!(is_right && says(&lines, &["note", "zone-west", "no store follows it"]), "{lines:?}");
    let mut config = w.config.clone();
    config.streams.retain(|s| s.name.as_str() != "catalog");
    lose("catalog@all/0000000004.full.pack");
    let (is_right, lines) = verify(&config).await;
    assert!(!is_right && says(&lines, &["0000000004.full.pack", "put its [[stream]] back"]), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fulls_come_when_they_are_due_and_old_packs_go() {
    let w = World::with(&CONFIG.replace("lease_wait", "deltas = 2\nkeep = \"1s\"\ndelete_after = \"1s\"\nlease_wait"))
        .await;
    let mut kinds = Vec::new();
    for n in 0..8 {
        w.sql(&format!("UPDATE item SET name = 'v{n}' WHERE sku = 'sku1'"));
        w.clock.advance(Duration::from_secs(5));
        let r = w.publish().await;
        let packs = &r.instances[&"catalog@all".parse().unwrap()].packs;
        kinds.push(
            packs
                .iter()
                .map(|p| &p.kind.to_string()[..1] == "f")
                .fold(packs.len(), |n, full| n * 2 + usize::from(full)),
        );
        w.all_is_well();
    }
    assert_eq!(kinds, [3, 2, 2, 9, 2, 2, 9, 2], "full, d, d, d+full, d, d, d+full, d");
    assert!(!w.exists("objects/packs/catalog@all/0000000001.full.pack"), "two fulls later it is nobody's");
    assert!(w.exists("objects/packs/catalog@all/0000000004.full.pack"));
    // More than a year later what a device might hold is known, and nothing else.
    let ledger = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    let known =
        || rows(&ledger, "SELECT '' || version FROM publication WHERE instance = 'catalog@all' ORDER BY version");
    assert_eq!(known(), ["1", "2", "3", "4", "5", "6", "7", "8"]);
    ledger.execute("UPDATE publication SET signed_s = signed_s - 401 * 86400", []).unwrap();
    for n in 8..11 {
        w.sql(&format!("UPDATE item SET name = 'v{n}' WHERE sku = 'sku1'"));
        w.clock.advance(Duration::from_secs(5));
        assert_eq!(w.publish().await.exit_code(), 0);
    }
    assert_eq!(known(), ["7", "8", "9", "10", "11"]);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_begins_with_fulls() {
    let w = World::new().await;
    w.publish().await;
    w.sql(CHANGE);
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let key = desk.show().await.unwrap().publishers[0].id.clone();
    let revoke = crate::cli::RevokeKey { key, new_epoch: true, root_key: Vec::new(), clock_is_right: false };
    desk.revoke_key(&revoke).await.unwrap();
    w.follow("0421", &mut register);
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    for report in r.instances.values() {
        let plan = report.plan.as_ref().unwrap();
        assert!(plan.full && !plan.delta && plan.reason.contains("epoch"), "{plan}");
    }
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
    w.sql("UPDATE price SET cents = cents + 1");
    assert_eq!(w.publish().await.instances[&"price@zone-east".parse().unwrap()].packs[0].kind, PackKind::Delta);
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reported_fault_makes_the_next_publish_a_full_once() {
    use proto::wire::{Fault, fault};
    let w = World::new().await;
    w.publish().await;
    w.clock.advance(Duration::from_secs(10));
    let fault = |instance: &str| Fault {
        code: fault::PACK_IN_ERROR.into(),
        instance: Some(instance.parse().unwrap()),
        object: None,
        text: "x".into(),
        since: w.clock.now(),
    };
    let beat = |seq, complaints| BeatRow { complaints, ..w.word_of("0421-03", seq) };
    let ledger = Ledger::open(&w.config).await.unwrap();
    // It heals, or not; its next beat tells of other things.
    ledger.record_beats(&[beat(1, vec![fault("catalog@all"), fault("madeup@all")])]).await.unwrap();
    ledger.record_beats(&[beat(2, Vec::new())]).await.unwrap();
    let known: Vec<_> = ledger.complaints().await.unwrap().into_iter().map(|c| c.fault).collect();
    assert_eq!(known, [fault("catalog@all")]);
    let mut kinds = Vec::new();
    for n in 0..3 {
        w.clock.advance(Duration::from_secs(10));
        // Unchanged at first: what is out is a full, and another one would be a way round it for nobody.
        if n > 0 {
            w.sql(&format!("UPDATE item SET name = 'v{n}' WHERE sku = 'sku1'"));
        }
        kinds.push(w.publish().await.instances[&"catalog@all".parse().unwrap()].plan.clone().unwrap().to_string());
    }
    assert_eq!(
        kinds,
        [
            "nothing: nothing changed",
            "delta and full: 1 rows changed; reported: 0421-03 PACK_IN_ERROR",
            "delta: 1 rows changed"
        ]
    );
}

/// Where no row changes for days, a store behind a pack that is lost or refused would wait for the next one that does.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_device_gets_a_full_though_no_row_changed() {
    use proto::wire::{Fault, fault};
    for w in [World::new().await, inbox_world().await] {
        let ledger = Ledger::open(&w.config).await.unwrap();
        w.publish().await;
        let mut made = Vec::new();
        // What is told before each publish, and how long before. In the end nobody is stuck any more.
        let told = [
            (None, 10),
            (Some(fault::DRIFT), 10),
            (Some(fault::PACK_MISSING), 10),
            (Some(fault::PACK_IN_ERROR), 10),
            (Some(fault::PACK_IN_ERROR), 86_380),
            (None, 10),
        ];
        for (seq, (code, s)) in told.into_iter().enumerate() {
            w.clock.advance(Duration::from_secs(s));
            let fault = |code: &str| Fault {
                code: code.into(),
                instance: Some("catalog@all".parse().unwrap()),
                object: None,
                text: "x".into(),
                since: w.clock.now(),
            };
            let complaints = code.map(fault).into_iter().collect();
            ledger.record_beats(&[BeatRow { complaints, ..w.word_of("0421", seq as u64) }]).await.unwrap();
            w.clock.advance(Duration::from_secs(10));
            if seq == 0 {
                if w.exists("inbox/done") {
                    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,new,2\n");
                } else {
                    w.sql("UPDATE item SET name = 'new' WHERE sku = 'sku1'");
                }
            }
            made.push(w.publish().await.instances[&"catalog@all".parse().unwrap()].packs.len());
        }
        assert_eq!(made, [1, 0, 2, 0, 2, 0], "drift heals itself; a full that is refused is followed by one a day");
    }
}

/// A relay of an older build, or with lower limits, refuses whatever is made: that costs no other store a full each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_refuses_fulls_too_makes_no_more_of_them() {
    use proto::wire::{Fault, fault};
    let w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mut made = Vec::new();
    // What it refuses before each publish: what it could reach of the one before. In the end no row is bad any more.
    let refused = [None, Some("0000000002.delta"), Some("0000000003.full"), None, None, None];
    for (seq, (refused, s)) in refused.into_iter().zip([10, 10, 10, 10, 86_380, 10]).enumerate() {
        w.clock.advance(Duration::from_secs(s));
        let fault = |pack| Fault {
            code: fault::PACK_IN_ERROR.into(),
            instance: Some("catalog@all".parse().unwrap()),
            object: Some(format!("catalog@all/{pack}.pack")),
            text: "BAD_SCHEMA: contract: column item.weight: no such type".into(),
            since: w.clock.now(),
        };
        let complaints = refused.map(fault).into_iter().collect();
        ledger.record_beats(&[BeatRow { complaints, ..w.word_of("0421", seq as u64) }]).await.unwrap();
        w.clock.advance(Duration::from_secs(10));
        w.sql(&format!("UPDATE item SET name = 'v{seq}' WHERE sku = 'sku1'"));
        made.push(w.publish().await.instances[&"catalog@all".parse().unwrap()].packs.len());
    }
    assert_eq!(made, [1, 2, 1, 1, 2, 1], "a full may be a way round the delta, and round that full one a day later");
}

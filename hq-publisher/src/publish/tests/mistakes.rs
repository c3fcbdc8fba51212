//! Mistakes at the source and in settings: of rows, queries, contracts and limits.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_stop_their_stream_only() {
    let w = World::new().await;
    w.publish().await;
    w.sql("UPDATE item SET name = 'a name that is far too long' WHERE sku = 'sku7'; UPDATE price SET cents = 5 WHERE sku = 'sku7'");
    let r = w.publish().await;
    assert_eq!(
        (r.exit_code(), outcome(&r, "catalog@all"), outcome(&r, "price@zone-west")),
        (3, Outcome::Refused, Outcome::Published)
    );
    let refused = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!(
        refused.faults,
        [
            "catalog@all: table item, key sku=\"sku7\": column name has 27 characters, the limit is 20: \"a name that is far too long\""
        ]
    );
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // The other zone of a refused stream is held back, and its number burnt.
    w.sql("UPDATE item SET name = 'fine' WHERE sku = 'sku7'; UPDATE price SET cents = cents + 1 WHERE sku = 'sku8'; INSERT INTO price VALUES ('west', 'sku8', 1)");
    let r = w.publish().await;
    assert_eq!(
        [outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")],
        [Outcome::Published, Outcome::HeldBack, Outcome::Refused]
    );
    assert!(r.instances[&"price@zone-west".parse().unwrap()].faults[0].contains("the key is there twice"));
    assert!(!w.objects().keys().any(|n| n.starts_with("packs/price@zone-east/0000000003")), "nothing of it is put");
    w.sql("DELETE FROM price WHERE sku = 'sku8' AND cents = 1");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(r.instances[&"price@zone-east".parse().unwrap()].version.unwrap().get(), 4, "3 is burnt");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_rows_than_readers_take_stop_their_stream_only() {
    let w = World::with(&format!("{CONFIG}\n[limits]\nrows = 450\n")).await;
    w.publish().await;
    w.sql("INSERT INTO item SELECT 'more' || plu, name, plu + 1000 FROM item LIMIT 51; UPDATE price SET cents = 7");
    let r = w.publish().await;
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!((r.exit_code(), item.code), (3, Some("LIMITS")), "{:?}", r.lines());
    assert_eq!(item.reason, "table item: more than limits.rows = 450");
    assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published);
}

/// One mistake at the source is one event, be the zones hundreds.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_many_zones_share_a_mail_and_so_do_their_ends() {
    let w = World::new().await;
    for n in 0..10 {
        w.sql(&format!(
            "INSERT INTO store VALUES ('x{n}', 'z{n}', NULL); INSERT INTO price VALUES ('z{n}', 'sku1', 1);
             INSERT INTO deal VALUES ('z{n}', 1, 'sku1')"
        ));
    }
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap();
    w.sql("UPDATE price SET cents = NULL WHERE sku = 'sku1'");
    for _ in 0..2 {
        let r = w.publish().await;
        assert!((0..10).all(|n| outcome(&r, &format!("price@zone-z{n}")) == Outcome::Refused), "{:?}", r.lines());
        let told = mails().await;
        assert_eq!((told.len(), told[0].subject.as_str()), (1, "[Tillcast] 12 at once: publish refused"));
        let named = |text: &str| told[0].body.contains(text);
        assert!(named("Publishing price@zone-z9 was refused (BAD_ROWS)") && named("sku1"), "{told:?}");
    }
    w.sql("UPDATE price SET cents = 5 WHERE sku = 'sku1'");
    assert_eq!(w.publish().await.exit_code(), 0);
    let told: Vec<String> = mails().await.into_iter().skip(1).map(|m| m.subject).collect();
    assert_eq!(told, ["[Tillcast] Recovered: 12 at once: publish refused"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_table_or_column_is_named_and_others_go_on() {
    let w = World::new().await;
    w.sql("ALTER TABLE deal RENAME TO deals");
    let r = w.publish().await;
    assert_eq!(
        (r.exit_code(), outcome(&r, "catalog@all"), outcome(&r, "price@zone-east")),
        (3, Outcome::Published, Outcome::Refused)
    );
    assert!(r.instances[&"price@zone-east".parse().unwrap()].reason.contains("table deal"), "{:?}", r.lines());
    w.sql("ALTER TABLE deals RENAME TO deal");
    w.write("hq.toml", &CONFIG.replace("SELECT id, sku FROM deal", "SELECT id, sku AS item FROM deal"));
    let w = World::open(w.dir, w.clock);
    let r = w.publish().await;
    let reason = &r.instances[&"price@zone-east".parse().unwrap()].reason;
    assert!(reason.contains("column `item` is not in the contract; column sku is missing"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shrink_guard_holds_until_it_is_told_otherwise() {
    let w = World::new().await;
    w.publish().await;
    w.sql("DELETE FROM item WHERE plu > 299; DELETE FROM deal WHERE zone = 'west'");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 3);
    assert!(
        r.instances[&"catalog@all".parse().unwrap()].reason.contains("101 of 400 rows of table item would go (25%)"),
        "{:?}",
        r.lines()
    );
    assert!(r.instances[&"price@zone-west".parse().unwrap()].reason.contains("table deal would become empty"));
    let r = w.publish_as(PublishOptions { allow_shrink: Some(Some("catalog".parse().unwrap())), ..options() }).await;
    assert_eq!([outcome(&r, "catalog@all"), outcome(&r, "price@zone-west")], [Outcome::Published, Outcome::Refused]);
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    assert_eq!(r.exit_code(), 0);
    w.all_is_well();
    // A list that shrank is held; who was known is published to.
    w.sql(
        "CREATE TABLE spare AS SELECT * FROM store; DELETE FROM store; UPDATE price SET cents = 7 WHERE sku = 'sku3'",
    );
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.stores, outcome(&r, "price@zone-west")), (3, 2, Outcome::Published));
    assert!(r.problems[0].contains("the list of stores would become empty"), "{:?}", r.problems);
    assert!(r.vanished.is_empty() && r.notes.is_empty(), "{:?}", r.lines());
    w.all_is_well();
    w.sql("INSERT INTO store SELECT * FROM spare");
    assert_eq!(w.publish().await.exit_code(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_of_configuration_are_found_before_anything_is_touched() {
    let w = World::new().await;
    for (from, to, part) in [
        (
            "WHERE zone = :zone\"\n[[stream.table]]\nname = \"deal\"",
            "WHERE zone = :zoned\"\n[[stream.table]]\nname = \"deal\"",
            "`:zoned` is not known",
        ),
        ("SELECT sku, name, plu FROM item", "SELECT sku, name, plu FROM item WHERE z = :zone", ":zone` has no value"),
        ("name = \"deal\"", "name = \"deals\"", "table deals has a query but is not in"),
        ("catalog.sql", "none.sql", "none.sql"),
        ("catalog.sql", "price.sql", "both make a table"),
        (&CONFIG[CONFIG.find("[[stream]]").unwrap()..], "", "there is no [[stream]]"),
    ] {
        w.write("hq.toml", &CONFIG.replacen(from, to, 1));
        let config = crate::config::load(Some(&w.dir.path().join("hq.toml")), []).unwrap().value;
        let clock: Arc<dyn Clock> = w.clock.clone();
        let e = run(&config, &options(), &clock, &Quiet, &Quiet).await.unwrap_err();
        assert_eq!(e.exit_code(), 2, "{to}: {e}");
        assert!(
            e.to_string().contains(part)
                || part == "both make a table" && e.to_string().contains("has a query but is not in"),
            "{to}: {e}"
        );
    }
    assert!(!w.exists("state/replicas"), "nothing was touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_in_settings_or_contracts_is_mailed_once_and_its_end_too() {
    let mut w = World::new().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let conflict = PRICE.replace("cents INTEGER NOT NULL", "cents INTEGER NOT NULL ON CONFLICT REPLACE");
    let dry_run = PublishOptions { dry_run: true, ..options() };
    // Who types it reads it: it must not hide the next failure of the timer's run.
    let stream = PublishOptions { stream: Some("prize".parse().unwrap()), ..options() };
    assert_eq!(w.publish_cut(&stream, &Quiet).await.unwrap_err().exit_code(), 2);
    assert!(ledger.unsent_mails().await.unwrap().is_empty());
    let nobody = PublishOptions { allow_shrink: Some(Some("prize".parse().unwrap())), ..options() };
    let mut mails = 0;
    for (contract, settings, option, told) in [
        (&conflict[..], CONFIG, options(), "ON CONFLICT"),
        (PRICE, &CONFIG.replace("name = \"deal\"", "name = \"deals\"")[..], options(), "table deals has a query"),
        (PRICE, CONFIG, nobody, "--allow-shrink prize"),
    ] {
        w.write("price.sql", contract);
        set(&mut w, settings);
        for (n, option) in [&dry_run, &option, &option].into_iter().enumerate() {
            let fails = w.publish_cut(option, &Quiet).await.err().map(|e| e.exit_code());
            assert!(fails == Some(2) || n == 0, "{told}: {fails:?}");
            let written = ledger.unsent_mails().await.unwrap();
            assert_eq!(written.len(), mails + n.min(1), "{told}");
            assert!(n == 0 || written[mails].subject.ends_with("publish failed"), "{written:?}");
            assert!(n == 0 || written[mails].body.contains(told), "{written:?}");
        }
        w.write("price.sql", PRICE);
        set(&mut w, CONFIG);
        w.publish().await;
        mails += 2;
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), mails, "{told}");
    }
}

/// What is published is signed as it is, whatever limits headquarters has by now; by a new machine, too.
#[tokio::test(flavor = "multi_thread")]
async fn limits_below_what_is_published_stop_its_stream_alone_and_undo_nothing() {
    let mut w = World::new().await;
    w.sql(
        "WITH RECURSIVE n(i) AS (SELECT 1001 UNION ALL SELECT i + 1 FROM n WHERE i < 9000)
         INSERT INTO item SELECT 'sku' || i, hex(randomblob(10)), NULL FROM n",
    );
    w.publish().await;
    set(&mut w, &format!("{CONFIG}\n[limits]\npack_bytes = 65536\n"));
    assert_eq!(w.publish().await.exit_code(), 0, "nothing changed");
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'; UPDATE price SET cents = cents + 1 WHERE zone = 'east'");
    let told = |r: &PublishReport| {
        let catalog = &r.instances[&"catalog@all".parse().unwrap()];
        assert_eq!((r.exit_code(), catalog.code), (3, Some("PACK_LIMITS")), "{:?}", r.lines());
    };
    let versions = || {
        let list = w.manifest("0421").unwrap();
        let devices = (list.relay.is_some(), list.registers.len());
        (list.instances().map(|(i, e)| (i.to_string(), e.version.get())).collect::<Vec<_>>(), devices)
    };
    told(&w.publish().await);
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    for id in ["0421", "0421-01"] {
        desk.enroll(&id.parse().unwrap()).await.unwrap();
    }
    let before = versions();
    assert_eq!(before, (vec![("catalog@all".into(), 1), ("price@zone-east".into(), 2)], (true, 1)));
    w.lose_ledger();
    told(&w.publish().await);
    assert_eq!(versions(), before);
}

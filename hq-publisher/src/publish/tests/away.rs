//! Stores that vanish from the source and come back, while streams are renamed, split and lose tables.

use super::*;

/// Settings with another name for stream `price`.
fn named(config: &str, stream: &str) -> String {
    config.replace("name = \"price\"\naudience", &format!("name = \"{stream}\"\naudience"))
}
/// Table `deal` is dropped.
fn drop_deal(w: &World) {
    w.write("price.sql", PRICE.split_once('\n').unwrap().0);
}
fn rebuild() -> PublishOptions {
    PublishOptions { allow_rebuild: true, ..options() }
}
fn allow_shrink(stream: &str) -> PublishOptions {
    PublishOptions { allow_shrink: Some(Some(stream.parse().unwrap())), ..options() }
}
/// With an inbox: rows of a zone, for each of these tables.
fn drop_zone(w: &World, stream: &str, zone: &str, tables: &[&str]) {
    for table in tables {
        match *table {
            "price" => drop_file(w, &format!("{stream}.zone-{zone}.price.csv"), "sku,cents\na,300\nb,200\n"),
            _ => drop_file(w, &format!("{stream}.zone-{zone}.deal.ndjson"), "{\"id\":1,\"sku\":\"a\"}\n"),
        }
    }
}
fn drop_stores(w: &World, rows: &str) {
    drop_file(w, "stores.csv", &format!("id,zone\n{rows}"));
}
/// What a publish says of a stream that is waited for.
fn waits(r: &PublishReport, stream: &str, store: &str) -> bool {
    let (begin, who) = (format!("stream {stream} is not in the settings"), format!("(the first is {store})"));
    r.problems.iter().any(|p| p.starts_with(&begin) && p.contains(&who))
}

/// Its zone is nobody else's, and is empty while it is away.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_for_a_closed_store_holds_up_nobody_and_reaches_no_new_store() {
    for at_once in [true, false] {
        let mut w = World::new().await;
        w.sql(
            "INSERT INTO store VALUES ('0533', 'south', NULL); INSERT INTO deal VALUES ('south', 1, 'sku1');
             INSERT INTO price SELECT 'south', sku, 5 FROM item;",
        );
        w.publish().await;
        w.sql("DELETE FROM store WHERE id = '0533'");
        if !at_once {
            w.publish().await;
        }
        let renamed = named(CONFIG, "prices");
        set(&mut w, &renamed);
        let r = w.publish().await;
        assert!(r.exit_code() == 0 && r.notes.iter().any(|n| n.contains("0533")), "{:?}", r.lines());
        w.publish().await;
        // One of its tables is dropped, and a store opens.
        drop_deal(&w);
        let deal = renamed.rfind("[[stream.table]]").unwrap();
        set(&mut w, &format!("{}{}", &renamed[..deal], &renamed[renamed.find("[publish]").unwrap()..]));
        w.sql(CHANGE);
        w.sql("INSERT INTO store VALUES ('0700', 'east', NULL)");
        for (dry_run, changed) in [(true, 2), (false, 2), (false, 0)] {
            let r = w.publish_as(PublishOptions { dry_run, ..rebuild() }).await;
            let published =
                r.instances.iter().filter(|(i, e)| i.stream.as_str() == "prices" && e.outcome == Outcome::Published);
            assert_eq!((r.exit_code(), published.count()), (0, changed), "{:?}", r.lines());
        }
        for store in ["0421", "0700"] {
            assert_eq!(listed(&w, store), ["catalog@all", "prices@zone-east"]);
        }
        // It has what it had, and comes over when it is back; nobody waits for it.
        assert_eq!(listed(&w, "0533"), ["catalog@all", "price@zone-south"]);
        w.sql(
            "INSERT INTO store VALUES ('0533', 'south', NULL); UPDATE price SET cents = cents + 1 WHERE zone = 'east'",
        );
        let r = w.publish().await;
        assert_eq!((r.exit_code(), outcome(&r, "prices@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
        assert_eq!(listed(&w, "0533"), ["catalog@all", "prices@zone-south"]);
        assert_eq!(w.publish().await.signed, 0);
    }
}

/// Its registers sell on by what they have, and all looks well there.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_left_the_list_with_devices_is_told_until_it_is_back_or_they_are_revoked() {
    let w = World::new().await;
    w.publish().await;
    let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
    let relay: proto::ids::DeviceId = "0422".parse().unwrap();
    desk.enroll(&relay).await.unwrap();
    let subjects =
        async || -> Vec<String> { desk.ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let told = |r: &PublishReport| r.notes.iter().any(|n| n.contains("devices are enrolled there: 0422."));
    let mut mails = Vec::new();
    for back in [true, false] {
        w.sql("DELETE FROM store WHERE id = '0422'");
        mails.push("[Tillcast] Store 0422 is no longer in the list".to_owned());
        for _ in 0..2 {
            let r = w.publish().await;
            assert!(r.exit_code() == 0 && told(&r), "{:?}", r.lines());
            assert_eq!(subjects().await, mails, "it is mailed once");
        }
        let status = crate::status::report(&w.config, &desk.ledger, w.clock.as_ref()).await.unwrap().lines();
        assert!(status.contains(&"no longer in the list, and devices are enrolled there: 0422".into()), "{status:?}");
        match back {
            true => w.sql("INSERT INTO store VALUES ('0422', 'west', NULL)"),
            false => desk.revoke(&relay).await.unwrap(),
        }
        mails.push("[Tillcast] Recovered: Store 0422 is no longer in the list".to_owned());
        let r = w.publish().await;
        assert!(!told(&r), "{:?}", r.lines());
        assert_eq!(subjects().await, mails);
    }
    // Nobody waits for prices where no device is.
    assert_eq!(w.publish().await.notes, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_comes_back_sells_by_what_it_has_until_the_new_stream_is_there() {
    let mut w = inbox_world().await;
    w.publish().await;
    drop_stores(&w, "0421,east\n");
    w.publish().await;
    set(&mut w, &named(INBOX, "prices"));
    drop_zone(&w, "prices", "east", &["price", "deal"]);
    for _ in 0..2 {
        assert_eq!(w.publish().await.exit_code(), 0);
    }
    drop_deal(&w);
    assert_eq!(w.publish_as(rebuild()).await.exit_code(), 0);
    drop_stores(&w, "0421,east\n0422,west\n");
    for cents in [7, 8] {
        drop_file(&w, "prices.zone-east.price.csv", &format!("sku,cents\na,{cents}\nb,200\n"));
        let r = w.publish().await;
        assert_eq!(outcome(&r, "prices@zone-east"), Outcome::Published, "nobody waits for it: {:?}", r.lines());
        assert!(r.exit_code() == 3 && waits(&r, "price", "0422"), "{:?}", r.lines());
        // Whoever signs.
        let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
        desk.enroll(&"0422-01".parse().unwrap()).await.unwrap();
        assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"]);
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // Somebody says that it is not to have it any more.
    let ended = w.twin();
    assert_eq!(ended.publish_as(allow_shrink("price")).await.exit_code(), 0);
    assert_eq!(listed(&ended, "0422"), ["catalog@all"]);
    // What nobody has any more is not waited for.
    drop_zone(&w, "prices", "west", &["price"]);
    let r = w.publish().await;
    assert_eq!((r.exit_code(), listed(&w, "0422")), (0, vec!["catalog@all".into(), "prices@zone-west".into()]));
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "that it is over");
}

/// Each comes over from what it has, and the rows of neither are there at first.
#[tokio::test(flavor = "multi_thread")]
async fn two_stores_come_back_from_two_renames() {
    let mut w = World::new().await;
    w.sql(
        "INSERT INTO store VALUES ('0533', 'south', NULL); INSERT INTO deal VALUES ('south', 1, 'sku1');
         INSERT INTO price SELECT 'south', sku, 5 FROM item;",
    );
    w.publish().await;
    for (gone, stream) in [("0533", "prices"), ("0422", "tariff")] {
        w.sql(&format!("DELETE FROM store WHERE id = '{gone}'"));
        set(&mut w, &named(CONFIG, stream));
        for _ in 0..2 {
            assert_eq!(w.publish().await.exit_code(), 0);
        }
    }
    w.sql("INSERT INTO store VALUES ('0422', 'west', NULL), ('0533', 'south', NULL)");
    w.sql("INSERT INTO price VALUES ('south', 'bad', NULL)");
    for _ in 0..2 {
        let r = w.publish().await;
        assert_eq!(outcome(&r, "tariff@zone-south"), Outcome::Refused, "{:?}", r.lines());
        assert!(waits(&r, "price", "0533") && waits(&r, "prices", "0422"), "{:?}", r.lines());
        assert_eq!(listed(&w, "0533"), ["catalog@all", "price@zone-south"]);
        assert_eq!(listed(&w, "0422"), ["catalog@all", "prices@zone-west"]);
    }
    // Rows that are few are guarded as those of who was there all the time.
    w.sql("DELETE FROM price WHERE zone = 'south' AND (cents IS NULL OR sku > 'sku2')");
    let r = w.publish().await;
    let text = &r.instances[&"tariff@zone-south".parse().unwrap()].reason;
    assert!(text.contains("in place of price@zone-south"), "{:?}", r.lines());
    assert_eq!(listed(&w, "0533"), ["catalog@all", "price@zone-south"]);
    let r = w.publish_as(allow_shrink("tariff")).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    for (store, zone) in [("0421", "east"), ("0422", "west"), ("0533", "south")] {
        assert_eq!(listed(&w, store), ["catalog@all".to_owned(), format!("tariff@zone-{zone}")]);
    }
    w.all_is_well();
}

/// It has one table by two streams until the rest of the old one is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_comes_back_keeps_what_was_split_into_a_stream_that_it_has() {
    for publishes in 1..3 {
        let mut w = inbox_world().await;
        w.publish().await;
        drop_stores(&w, "0421,east\n");
        w.publish().await;
        let (price, deal) = PRICE.split_once('\n').unwrap();
        w.write("catalog.sql", &format!("{CATALOG}\n{price}"));
        w.write("deals.sql", deal);
        let old = INBOX.find("[[stream]]\nname = \"price\"").unwrap();
        let deals = "[[stream]]\nname = \"deals\"\naudience = \"zone\"\nschema = \"deals.sql\"\n";
        set(&mut w, &format!("{}{deals}", &INBOX[..old]));
        drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\n");
        drop_file(&w, "catalog.all.price.csv", "sku,cents\na,300\nb,200\n");
        drop_zone(&w, "deals", "east", &["deal"]);
        for _ in 0..publishes {
            let r = w.publish().await;
            assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
        }
        assert_eq!(listed(&w, "0421"), ["catalog@all", "deals@zone-east"]);
        drop_stores(&w, "0421,east\n0422,west\n");
        for cents in [7, 8] {
            drop_file(&w, "catalog.all.price.csv", &format!("sku,cents\na,{cents}\nb,200\n"));
            let r = w.publish().await;
            assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "{:?}", r.lines());
            assert!(waits(&r, "price", "0422"), "{:?}", r.lines());
            assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"], "{publishes}");
        }
        drop_zone(&w, "deals", "west", &["deal"]);
        assert_eq!(w.publish().await.exit_code(), 0);
        assert_eq!(listed(&w, "0422"), ["catalog@all", "deals@zone-west"]);
    }
}

/// Some wait for the new stream: who has it goes on, and who is new gets what his neighbours have.
#[tokio::test(flavor = "multi_thread")]
async fn while_some_stores_wait_for_a_renamed_stream_others_go_on() {
    let mut w = inbox_world().await;
    w.publish().await;
    set(&mut w, &named(INBOX, "prices"));
    drop_zone(&w, "prices", "east", &["price", "deal"]);
    w.publish().await;
    // A zone that is new.
    drop_stores(&w, "0421,east\n0422,west\n0800,north\n");
    drop_zone(&w, "prices", "north", &["price", "deal"]);
    drop_file(&w, "prices.zone-east.price.csv", "sku,cents\na,7\nb,200\n");
    let r = w.publish().await;
    for zone in ["east", "north"] {
        assert_eq!(outcome(&r, &format!("prices@zone-{zone}")), Outcome::Published, "{:?}", r.lines());
    }
    assert_eq!(listed(&w, "0800"), ["catalog@all", "prices@zone-north"]);
    assert!(waits(&r, "price", "0422"), "{:?}", r.lines());
    // A table that is dropped where it went over long ago.
    drop_deal(&w);
    drop_stores(&w, "0421,east\n0422,west\n0700,east\n0701,west\n0800,north\n");
    let r = w.publish_as(rebuild()).await;
    assert_eq!(outcome(&r, "prices@zone-east"), Outcome::Published, "{:?}", r.lines());
    assert!(waits(&r, "price", "0422"), "{:?}", r.lines());
    for (store, instance) in [("0700", "prices@zone-east"), ("0422", "price@zone-west"), ("0701", "price@zone-west")] {
        assert_eq!(listed(&w, store), ["catalog@all", instance], "{store}");
    }
    // Who waits would lose it: somebody says that it may go.
    drop_zone(&w, "prices", "west", &["price"]);
    let r = w.publish().await;
    assert!(outcome(&r, "prices@zone-west") == Outcome::Published && waits(&r, "price", "0422"), "{:?}", r.lines());
    assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"]);
    assert_eq!(w.publish_as(allow_shrink("price")).await.exit_code(), 0);
    for store in ["0422", "0701"] {
        assert_eq!(listed(&w, store), ["catalog@all", "prices@zone-west"]);
    }
}

/// It alone had the stream, and vanishes as the settings lose that.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_closed_stores_alone_list_gives_its_tables_to_another() {
    let mut w = World::new().await;
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    w.publish().await;
    w.sql("DELETE FROM store WHERE id = '0421'");
    let begin = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    let price = &CONFIG[begin..CONFIG.find("[publish]").unwrap()];
    let tables: Vec<usize> = price.match_indices("[[stream.table]]").map(|(at, _)| at).collect();
    let price = price[tables[0]..tables[1]].replace(":zone", "'east'");
    w.write("catalog.sql", &format!("{CATALOG}\n{}", PRICE.split_once('\n').unwrap().0));
    set(&mut w, &format!("{}{price}", &CONFIG[..begin]));
    for _ in 0..2 {
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    }
    assert_eq!(listed(&w, "0421"), ["catalog@all", "price@zone-east"]);
    w.sql("INSERT INTO store VALUES ('0421', 'east', NULL)");
    assert_eq!((w.publish().await.exit_code(), listed(&w, "0421")), (0, vec!["catalog@all".to_owned()]));
}

/// A store that is missing from the list while a stream is renamed finds its tables when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_away_while_a_stream_was_renamed_keeps_the_old_one_until_the_new_is_there() {
    let mut w = inbox_world().await;
    w.publish().await;
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n");
    w.publish().await;
    set(&mut w, &INBOX.replace("name = \"price\"\naudience", "name = \"prices\"\naudience"));
    drop_file(&w, "prices.zone-east.price.csv", "sku,cents\na,300\nb,200\n");
    drop_file(&w, "prices.zone-east.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    for _ in 0..2 {
        w.publish().await;
    }
    assert_eq!(listed(&w, "0421"), ["catalog@all", "prices@zone-east"]);
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n");
    for _ in 0..2 {
        w.publish().await;
        assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"]);
    }
    drop_file(&w, "prices.zone-west.price.csv", "sku,cents\na,300\nb,200\n");
    drop_file(&w, "prices.zone-west.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    w.publish().await;
    assert_eq!(listed(&w, "0422"), ["catalog@all", "prices@zone-west"]);
}

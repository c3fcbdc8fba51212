//! The list of stores and their zones: who comes, goes, moves, or has no zone.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_audience_that_nobody_follows_any_more_is_told_once() {
    let w = World::new().await;
    w.publish().await;
    w.sql("UPDATE store SET zone = 'east'");
    let told = "no store follows price@zone-west any more; what was published of it stays";
    let dry = w.publish_as(PublishOptions { dry_run: true, ..options() }).await;
    let r = w.publish().await;
    assert_eq!((&dry.notes, r.exit_code()), (&r.notes, 0));
    assert_eq!(r.notes, [told, "store 0422: price@zone-west → price@zone-east"]);
    assert!(r.lines().contains(&format!("note: {told}")));
    assert!(w.publish().await.notes.is_empty());
}

/// One letter wrong in a zone may name another one.
#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_stores_is_told_by_a_dry_run_too() {
    let w = World::new().await;
    w.sql("INSERT INTO store SELECT 'S' || plu, 'west', NULL FROM item WHERE plu <= 22");
    w.publish().await;
    w.sql("DELETE FROM store WHERE id = '0422'; UPDATE store SET zone = 'east' WHERE id LIKE 'S%' AND id <> 'S9'");
    let gone: [StoreId; 1] = ["0422".parse().unwrap()];
    for dry_run in [true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((r.exit_code(), &r.vanished[..]), (0, &gone[..]), "{:?}", r.lines());
        assert!(r.lines().contains(&"no longer in the list of stores: 0422".into()), "{:?}", r.lines());
        assert_eq!((r.notes.len(), &r.notes[0][..]), (21, "store S1: price@zone-west → price@zone-east"));
        assert_eq!(r.notes[20], "1 more stores and streams go over so");
    }
    let r = w.publish().await;
    assert!(r.vanished.is_empty() && r.notes.is_empty(), "{:?}", r.lines());
    // One that has no rows is not gone over to.
    w.sql("UPDATE store SET zone = 'north' WHERE id = 'S9'");
    for dry_run in [true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((outcome(&r, "price@zone-north"), r.notes.len()), (Outcome::Refused, 0), "{:?}", r.lines());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_comes_back_in_another_case_is_refused() {
    let w = World::new().await;
    w.sql("INSERT INTO store VALUES ('ab', 'east', NULL)");
    w.publish().await;
    w.sql("UPDATE store SET id = 'AB' WHERE id = 'ab'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.stores), (3, 3), "{:?}", r.lines());
    assert!(r.problems[0].contains("store AB differs only in case from ab"), "{:?}", r.problems);
    w.sql("UPDATE store SET id = 'ab' WHERE id = 'AB'");
    assert_eq!(w.publish().await.exit_code(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_store_of_a_database_leaves_the_known_list_and_stops_no_price() {
    let w = World::new().await;
    w.sql("INSERT INTO store VALUES ('0999', 'West', NULL)");
    // Nobody is known yet.
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Source(crate::source_db::SourceError::Stores(_))), "{e}");
    w.sql("DELETE FROM store WHERE id = '0999'");
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap().len();
    let before = mails().await;
    w.sql("INSERT INTO store VALUES ('0999', 'West', NULL), ('0423', 'east', NULL)");
    for (cents, dry_run) in [(7, false), (8, true), (8, false)] {
        w.sql(&format!("UPDATE price SET cents = {cents} WHERE sku = 'sku3'"));
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((r.exit_code(), r.stores), (3, 2), "{:?}", r.lines());
        assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published, "{:?}", r.lines());
        assert!(r.problems[0].contains("store 0999"), "{:?}", r.problems);
        assert!(r.vanished.is_empty() && w.manifest("0423").is_none());
        assert_eq!(mails().await, before + 1, "it is mailed once");
    }
    w.all_is_well();
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0999'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.stores, mails().await), (0, 4, before + 2), "{:?}", r.lines());
    w.check("0999", "west");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_stores_that_cannot_be_read_leaves_the_known_one_and_stops_no_price() {
    let w = World::with(&CONFIG.replace("SELECT id, zone, region FROM store", "SELECT * FROM store")).await;
    let renamed = ["ALTER TABLE store RENAME TO shop", "ALTER TABLE shop RENAME TO store"];
    w.sql(renamed[0]);
    // Nobody is known yet.
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Source(crate::source_db::SourceError::Query { .. })), "{e}");
    w.sql(renamed[1]);
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap().len();
    let of_columns = ["ALTER TABLE store RENAME COLUMN id TO number", "ALTER TABLE store RENAME COLUMN number TO id"];
    for [broken, mended] in [renamed, of_columns] {
        let before = mails().await;
        w.sql(broken);
        for _ in 0..2 {
            w.sql("UPDATE price SET cents = cents + 1 WHERE sku = 'sku3'");
            let r = w.publish().await;
            assert_eq!((r.exit_code(), r.stores), (3, 2), "{broken}: {:?}", r.lines());
            assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published, "{broken}: {:?}", r.lines());
            assert!(r.problems[0].contains("stores.query"), "{:?}", r.problems);
            assert_eq!(mails().await, before + 1, "it is mailed once");
        }
        w.sql(mended);
        assert_eq!((w.publish().await.exit_code(), mails().await), (0, before + 2));
    }
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_was_empty_is_followed_once_its_rows_were_compared() {
    let w = World::new().await;
    w.publish().await;
    let follows = || w.manifest("0422").unwrap().streams["price"].audience.to_string();
    let to = |zone: &str| w.sql(&format!("UPDATE store SET zone = '{zone}' WHERE id = '0422'"));
    to("east");
    w.publish().await;
    // Nothing changed meanwhile: it is compared, and followed at once.
    to("west");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Unchanged);
    assert_eq!(follows(), "zone-west");
    to("east");
    w.publish_as(PublishOptions { stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!(follows(), "zone-east");
    // Last season's rows are nobody's, whoever signs.
    w.sql("UPDATE price SET cents = cents + 7 WHERE zone = 'west'; INSERT INTO price VALUES ('west', 'sku8', 1)");
    to("west");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Refused);
    w.publish_as(PublishOptions { stream: Some("catalog".parse().unwrap()), ..options() }).await;
    w.clock.advance(Duration::from_secs(7 * 86_400));
    let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
    desk.enroll(&"0422".parse().unwrap()).await.unwrap();
    assert_eq!(follows(), "zone-east");
    w.sql("DELETE FROM price WHERE sku = 'sku8' AND cents = 1");
    w.publish().await;
    assert_eq!(follows(), "zone-west");
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_would_move_to_a_zone_without_its_rows_stays_until_it_is_allowed() {
    let w = World::new().await;
    w.sql(
        "INSERT INTO store VALUES ('0423', 'small', NULL); INSERT INTO deal VALUES ('small', 1, 'sku1');
         INSERT INTO price SELECT 'small', sku, 1 FROM item WHERE plu <= 299;",
    );
    w.publish().await;
    let follows = |store: &str| w.manifest(store).unwrap().streams["price"].audience.to_string();
    let to = |zone: &str| w.sql(&format!("UPDATE store SET zone = {zone} WHERE id = '0422'"));
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap();
    let of = |r: &PublishReport, zone: &str| r.instances[&format!("price@zone-{zone}").parse().unwrap()].clone();
    let price = || Some("price".parse().unwrap());
    // A zone that nobody has, and one with a quarter less.
    for (zone, told, told_mails) in [
        ("norht", "table deal would become empty (it has 1 rows); table price would become empty (it has 400 rows)", 1),
        ("small", "101 of 400 rows of table price would go (25%), 299 would stay", 3),
    ] {
        to(&format!("'{zone}'"));
        let told = format!("store 0422 would follow it in place of price@zone-west: {told}. If that is right");
        for dry_run in [true, false, true, false] {
            w.sql("UPDATE item SET name = name || '.' WHERE sku = 'sku1'");
            let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
            let refused = of(&r, zone);
            assert_eq!((r.exit_code(), refused.code), (3, Some("SHRINK")), "{:?}", r.lines());
            assert!(refused.reason.starts_with(&told), "{}", refused.reason);
            assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "others go on");
        }
        assert_eq!(mails().await.len(), told_mails, "one of the refusal, one of the zone before it");
        // Nobody else moves it.
        w.sql("UPDATE item SET name = name || '.' WHERE sku = 'sku1'");
        w.publish_as(PublishOptions { stream: Some("catalog".parse().unwrap()), ..options() }).await;
        let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
        desk.enroll(&"0422".parse().unwrap()).await.unwrap();
        assert_eq!(follows("0422"), "zone-west");
        w.all_is_well();
    }
    assert!(!w.exists("objects/packs/price@zone-norht"));
    // Mended: nothing was published of its own zone meanwhile, and it goes on.
    to("'west'");
    w.sql("UPDATE price SET cents = cents + 1 WHERE zone = 'west'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), of(&r, "west").packs[0].kind), (0, PackKind::Delta), "{:?}", r.lines());
    assert_eq!(mails().await.len(), 4, "and one that it is over");
    w.all_is_well();
    // Allowed; and what a zone begins with is told, though it is nothing.
    to("'norht'");
    let r = w.publish_as(PublishOptions { allow_shrink: Some(price()), ..options() }).await;
    assert_eq!((r.exit_code(), follows("0422").as_str()), (0, "zone-norht"));
    let line = r.lines().into_iter().find(|l| l.contains("zone-norht")).unwrap();
    assert!(line.contains("; price: 0 deleted, 0 updated, 0 inserted;"), "{line}");
    // The way back is a gain.
    to("'west'");
    assert_eq!((w.publish().await.exit_code(), follows("0422").as_str()), (0, "zone-west"));
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_lost_its_zone_keeps_what_it_has_and_is_mailed() {
    let w = World::new().await;
    w.sql("INSERT INTO store VALUES ('0499', NULL, NULL)");
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert!(ledger.unsent_mails().await.unwrap().is_empty(), "one that never had any is only noted");
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    for _ in 0..2 {
        let r = w.publish().await;
        let told = |n: &String| n.contains("2 stores have no zone") && n.contains("keep what they follow");
        assert!(r.notes.iter().any(told), "{:?}", r.notes);
    }
    assert_eq!(w.manifest("0422").unwrap().streams["price"].audience.to_string(), "zone-west");
    let mails = ledger.unsent_mails().await.unwrap();
    assert!(mails.len() == 1 && mails[0].body.contains("0422") && !mails[0].body.contains("0499"), "{mails:?}");
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0422'");
    w.publish().await;
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
    w.all_is_well();
}

/// By a stream that is made by store and asks for the zone: the store before it is not unstaged, that after it not only tried.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_a_zone_that_is_asked_for_keeps_what_it_has_and_stops_no_other() {
    let w = World::with(&CONFIG.replace("audience = \"zone\"", "audience = \"store\"")).await;
    w.sql("INSERT INTO store VALUES ('0423', 'east', NULL)");
    assert_eq!(w.publish().await.exit_code(), 0);
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails = async || ledger.unsent_mails().await.unwrap().len();
    let version = |store: &str| w.manifest(store).unwrap().streams["price"].version.get();
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    for n in 2..4 {
        w.sql("UPDATE price SET cents = cents + 1 WHERE sku = 'sku1'");
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 3, "{:?}", r.lines());
        for other in ["0421", "0423"] {
            assert_eq!(outcome(&r, &format!("price@store-{other}")), Outcome::Published, "{:?}", r.lines());
            assert_eq!(version(other), n);
        }
        let refused = &r.instances[&"price@store-0422".parse().unwrap()];
        assert_eq!((refused.outcome, refused.code), (Outcome::Refused, Some("NO_ZONE")), "{:?}", r.lines());
        assert_eq!((version("0422"), mails().await), (1, 1), "it keeps what it has, and is mailed once");
    }
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0422'");
    assert_eq!((w.publish().await.exit_code(), version("0422"), mails().await), (0, 2, 2));
    w.all_is_well();
}

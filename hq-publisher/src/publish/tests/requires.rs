//! Streams whose rows refer to those of others: each version says with which of theirs it was made.

use super::*;

/// `price` is named first, and requires `catalog`.
fn settings() -> String {
    let (before, streams) = CONFIG.split_once("[[stream]]\n").unwrap();
    let (catalog, price) = streams.split_once("[[stream]]\n").unwrap();
    let (price, after) = price.split_once("[publish]").unwrap();
    let price = price.replace("audience", "requires = [\"catalog\"]\naudience");
    format!("{before}[[stream]]\n{price}[[stream]]\n{catalog}[publish]{after}")
}
/// The versions of both in a store's list, and what price requires.
fn listed(w: &World, store: &str) -> (u64, u64, Option<u64>) {
    let m = w.manifest(store).unwrap();
    let of = |s: &str| &m.streams[&s.parse::<StreamName>().unwrap()];
    assert!(of("catalog").requires.is_empty());
    let requires: Vec<u64> = of("price").requires.values().map(|v| v.get()).collect();
    assert!(requires.len() <= 1);
    (of("catalog").version.get(), of("price").version.get(), requires.first().copied())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_requires_what_was_the_newest_when_it_was_made() {
    let mut w = World::with(&settings()).await;
    w.publish().await;
    assert_eq!(listed(&w, "0421"), (1, 1, Some(1)));
    // Both in one run, in the east.
    w.sql(CHANGE);
    w.publish().await;
    assert_eq!((listed(&w, "0421"), listed(&w, "0422")), ((2, 2, Some(2)), (2, 1, Some(1))));
    // Nothing of price is new: it was made with what it was made with.
    w.sql("UPDATE item SET name = 'Tea' WHERE sku = 'sku4'");
    w.publish().await;
    assert_eq!((listed(&w, "0421"), listed(&w, "0422")), ((3, 2, Some(2)), (3, 1, Some(1))));
    w.sql("UPDATE price SET cents = 3 WHERE sku = 'sku4'");
    w.publish().await;
    assert_eq!((listed(&w, "0421"), listed(&w, "0422")), ((3, 3, Some(3)), (3, 2, Some(3))));
    let before = w.manifest("0421").unwrap().streams;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 0), "{:?}", r.lines());
    // A ledger made anew from the bucket knows it still.
    w.lose_ledger();
    w.publish().await;
    assert_eq!(w.manifest("0421").unwrap().streams, before);
    w.all_is_well();
    // It is let go of by a version.
    set(&mut w, CONFIG);
    assert_eq!((w.publish().await.signed, listed(&w, "0421")), (0, (3, 3, Some(3))));
    w.publish_as(PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!(listed(&w, "0421"), (3, 4, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_requires_a_refused_stream_is_held_back_with_it() {
    let w = World::with(&settings()).await;
    w.publish().await;
    w.sql("UPDATE item SET name = 'a name that is far too long' WHERE sku = 'sku7'; UPDATE price SET cents = 5 WHERE zone = 'east'");
    let r = w.publish().await;
    assert_eq!(
        (r.exit_code(), outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")),
        (3, Outcome::Refused, Outcome::HeldBack, Outcome::Unchanged)
    );
    let east = &r.instances[&"price@zone-east".parse().unwrap()];
    assert_eq!(east.reason, "stream catalog, which it requires, is refused or held back");
    assert_eq!(listed(&w, "0421"), (1, 1, Some(1)));
    w.sql("UPDATE item SET name = 'fine' WHERE sku = 'sku7'");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(listed(&w, "0421"), (2, 3, Some(2)), "2 is burnt");
    w.all_is_well();
}

/// `offers` requires `price`, which requires `catalog`.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_holds_back_a_whole_chain() {
    let mut w = World::new().await;
    w.write("offers.sql", "CREATE TABLE offer (sku TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT;");
    let offers = "[[stream]]\nname = \"offers\"\nrequires = [\"price\"]\naudience = \"all\"\nschema = \"offers.sql\"\n[[stream.table]]\nname = \"offer\"\nquery = \"SELECT sku, cents FROM price WHERE zone = 'west'\"\n";
    set(&mut w, &settings().replacen("[[stream]]", &format!("{offers}[[stream]]"), 1));
    assert_eq!(w.publish().await.exit_code(), 0);
    w.sql("UPDATE item SET name = 'a name that is far too long' WHERE sku = 'sku7'; UPDATE price SET cents = 5 WHERE sku = 'sku7'");
    let all = ["catalog@all", "price@zone-east", "price@zone-west", "offers@all"];
    let r = w.publish().await;
    assert_eq!(
        all.map(|i| outcome(&r, i)),
        [Outcome::Refused, Outcome::HeldBack, Outcome::HeldBack, Outcome::HeldBack],
        "{:?}",
        r.lines()
    );
    let last = &r.instances[&"offers@all".parse().unwrap()];
    assert_eq!(last.reason, "stream price, which it requires, is refused or held back");
    w.sql("UPDATE item SET name = 'fine' WHERE sku = 'sku7'");
    let r = w.publish().await;
    assert_eq!(all.map(|i| outcome(&r, i)), [Outcome::Published; 4], "{:?}", r.lines());
    let m = w.manifest("0422").unwrap();
    let [price, offers] = ["price", "offers"].map(|s| &m.streams[&s.parse::<StreamName>().unwrap()]);
    assert_eq!(offers.requires.values().collect::<Vec<_>>(), [&price.version]);
    w.all_is_well();
}

/// A stream that is taken back after all were staged, for its partner in a table that goes over does not come.
#[tokio::test(flavor = "multi_thread")]
async fn what_requires_a_stream_that_is_taken_back_is_taken_back_too() {
    let offers = "[[stream]]\nname = \"offers\"\nrequires = [\"catalog\"]\naudience = \"all\"\nschema = \"offers.sql\"\n[[stream.table]]\nname = \"offer\"\nquery = \"SELECT sku, cents FROM price WHERE zone = 'west'\"\n[publish]";
    let mut w = World::new().await;
    w.write("offers.sql", "CREATE TABLE offer (sku TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT;");
    let before = CONFIG.replace("[publish]", offers);
    set(&mut w, &before);
    assert_eq!(w.publish().await.exit_code(), 0);
    // Table `deal` goes from price to catalog.
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("price.sql", price);
    w.write("catalog.sql", &format!("{CATALOG}\n{deal}"));
    let moved = "[[stream.table]]\nname = \"deal\"\nquery = \"SELECT id, sku FROM deal WHERE zone = :zone\"\n";
    assert!(before.contains(moved));
    let deal = moved.replace(":zone", "'east'");
    let after = before.replace(moved, "").replacen(
        "[[stream]]\nname = \"price\"",
        &format!("{deal}[[stream]]\nname = \"price\""),
        1,
    );
    set(&mut w, &after);
    w.sql("UPDATE price SET cents = cents + 1 WHERE zone = 'west'; UPDATE price SET cents = NULL WHERE zone = 'east' AND sku = 'sku1'");
    let r = w.publish_as(PublishOptions { allow_rebuild: true, ..options() }).await;
    let all = ["price@zone-east", "price@zone-west", "catalog@all", "offers@all"].map(|i| outcome(&r, i));
    assert_eq!(all, [Outcome::Refused, Outcome::HeldBack, Outcome::Refused, Outcome::HeldBack], "{:?}", r.lines());
    w.sql("UPDATE price SET cents = 7 WHERE cents IS NULL");
    let r = w.publish_as(PublishOptions { allow_rebuild: true, ..options() }).await;
    assert!(r.instances.values().all(|i| i.outcome == Outcome::Published), "{:?}", r.lines());
    let m = w.manifest("0421").unwrap();
    let [catalog, offers] = ["catalog", "offers"].map(|s| &m.streams[&s.parse::<StreamName>().unwrap()]);
    assert_eq!(offers.requires.values().collect::<Vec<_>>(), [&catalog.version]);
}

/// With an inbox the refused drop is gone, and what was made beside it waits in its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_holds_until_what_is_required_is_well_again() {
    let mut w = inbox_world().await;
    let text = fs::read_to_string(w.dir.path().join("hq.toml")).unwrap();
    set(&mut w, &text.replace("name = \"price\"\naudience", "name = \"price\"\nrequires = [\"catalog\"]\naudience"));
    w.publish().await;
    assert_eq!(outcome(&w.publish().await, "price@zone-east"), Outcome::Unchanged);
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,a name that is far too long,1\n");
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,123\n");
    let only_price = || PublishOptions { stream: Some("price".parse().unwrap()), ..options() };
    for options in [options(), options(), only_price()] {
        let r = w.publish_as(options).await;
        assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (3, Outcome::HeldBack), "{:?}", r.lines());
        assert!(w.exists("inbox/price.zone-east.price.csv"));
    }
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,7\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(
        listed(&w, "0421"),
        (2, r.instances[&"price@zone-east".parse().unwrap()].version.unwrap().get(), Some(2))
    );
}

#[test]
fn what_is_required_must_be_a_stream_and_come_first() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("catalog.sql"), CATALOG).unwrap();
    fs::write(dir.path().join("price.sql"), PRICE).unwrap();
    let told = |settings: &str| {
        fs::write(dir.path().join("hq.toml"), settings).unwrap();
        let config = crate::config::load(Some(&dir.path().join("hq.toml")), []).unwrap().value;
        super::super::contracts::load(&config)
            .map(|c| c.streams.into_iter().map(|s| s.name.to_string()).collect::<Vec<_>>())
    };
    assert_eq!(told(&settings()).unwrap(), ["catalog", "price"]);
    let e = told(&settings().replace("[\"catalog\"]", "[\"tax\"]")).unwrap_err().to_string();
    assert_eq!(e, "stream price: requires = tax: there is no such [[stream]]");
    for ring in [
        settings().replace("\"catalog\"\naudience", "\"catalog\"\nrequires = [\"price\"]\naudience"),
        settings().replace("[\"catalog\"]", "[\"price\"]"),
    ] {
        let e = told(&ring).unwrap_err().to_string();
        assert!(e.contains("requires goes in a ring: none could come first"), "{e}");
    }
}

/// The root keys' word stands above that of whoever publishes.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_root_keys_did_not_allow_is_not_published() {
    let mut w = World::new().await;
    w.publish().await;
    let rotate = async |w: &World, streams: &[&str], any_stream| {
        let streams = streams.iter().map(|s| s.parse().unwrap()).collect();
        let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
        desk.rotate(&crate::cli::Rotate { streams, any_stream, ..Default::default() }).await
    };
    let e = rotate(&w, &["catalog"], false).await.unwrap_err().to_string();
    assert!(e.contains("--streams leaves out price"), "{e}");
    let report = rotate(&w, &["catalog", "price"], false).await.unwrap();
    assert_eq!(report.streams.iter().map(|s| s.as_str()).collect::<Vec<_>>(), ["catalog", "price"]);
    let tax = "[[stream]]\nname = \"tax\"\naudience = \"all\"\nschema = \"tax.sql\"\n[[stream.table]]\nname = \"rate\"\nquery = \"SELECT 1 AS id\"\n[publish]";
    w.write("tax.sql", "CREATE TABLE rate (id INTEGER PRIMARY KEY) STRICT;");
    set(&mut w, &CONFIG.replace("[publish]", tax));
    let r = w.publish().await;
    let refused = &r.instances[&"tax@all".parse().unwrap()];
    assert_eq!((r.exit_code(), refused.code), (3, Some("NOT_ALLOWED")), "{:?}", r.lines());
    assert!(refused.reason.contains("does not name it among the streams that lists may have"), "{}", refused.reason);
    assert_eq!(outcome(&r, "catalog@all"), Outcome::Unchanged);
    // A rotation that says nothing of them leaves them as they are.
    let report = rotate(&w, &[], false).await.unwrap();
    assert_eq!((report.version, report.streams.len()), (5, 2));
    assert!(rotate(&w, &[], true).await.unwrap().streams.is_empty());
    assert_eq!((w.publish().await.exit_code(), w.manifest("0421").unwrap().streams.len()), (0, 3));
    // Told when a rotation begins, not in its middle.
    let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    desk.rotate(&crate::cli::Rotate { keep_old: true, ..Default::default() }).await.unwrap();
    for (streams, any_stream) in [(&["catalog", "price", "tax"][..], false), (&[], true)] {
        let e = rotate(&w, streams, any_stream).await.unwrap_err().to_string();
        assert!(e.contains("a rotation is under way"), "{e}");
    }
}

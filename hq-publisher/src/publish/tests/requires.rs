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
    let w = World::with(&settings()).await;
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
    assert_eq!(east.reason, "stream catalog, which it requires, is refused");
    assert_eq!(listed(&w, "0421"), (1, 1, Some(1)));
    w.sql("UPDATE item SET name = 'fine' WHERE sku = 'sku7'");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(listed(&w, "0421"), (2, 2, Some(2)));
    w.all_is_well();
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
}

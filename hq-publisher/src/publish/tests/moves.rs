//! Streams that leave the settings or get another name, and tables that go from one to another.

use super::*;
use proto::manifest::StreamEntry;

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_the_settings_lost_stays_listed_until_it_may_go() {
    let mut w = World::new().await;
    w.publish().await;
    let begin = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    let without = format!("{}{}", &CONFIG[..begin], &CONFIG[CONFIG.find("[publish]").unwrap()..]);
    let set = |w: &mut World, text: &str| {
        w.write("hq.toml", text);
        w.config = crate::config::load(Some(&w.dir.path().join("hq.toml")), []).unwrap().value;
    };
    let lists =
        |w: &World, store: &str| w.manifest(store).unwrap().instances().map(|(i, _)| i.to_string()).collect::<Vec<_>>();
    let told = "stream price is not in the settings";
    let ledger = Ledger::open(&w.config).await.unwrap();
    set(&mut w, &without);
    w.sql(CHANGE);
    w.sql("INSERT INTO store VALUES ('0423', 'east', NULL)");
    for options in [
        PublishOptions { dry_run: true, ..options() },
        options(),
        PublishOptions { allow_shrink: Some(None), ..options() },
    ] {
        let r = w.publish_as(options).await;
        assert!(r.exit_code() == 3 && r.problems.len() == 1 && r.problems[0].starts_with(told), "{:?}", r.lines());
        assert!(r.problems[0].contains("--allow-shrink price"), "{:?}", r.problems);
    }
    // Old stores and new ones, whoever signs.
    Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap().enroll(&"0422-01".parse().unwrap()).await.unwrap();
    for (store, zone) in [("0421", "east"), ("0422", "west"), ("0423", "east")] {
        assert_eq!(lists(&w, store), ["catalog@all".to_owned(), format!("price@zone-{zone}")]);
    }
    let status = crate::status::report(&w.config, &ledger, w.clock.as_ref()).await.unwrap();
    assert!(status.errors.iter().any(|e| e.starts_with(told)), "{:?}", status.errors);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1);
    // Put back, it goes on where it was.
    set(&mut w, CONFIG);
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.instances[&"price@zone-east".parse().unwrap()].packs[0].kind), (0, PackKind::Delta));
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
    w.all_is_well();
    // It may go, by its name.
    set(&mut w, &without);
    for (name, dry_run) in [("prize", false), ("prize", true)] {
        let options = PublishOptions { allow_shrink: Some(Some(name.parse().unwrap())), dry_run, ..options() };
        let e = w.publish_cut(&options, &Quiet).await.unwrap_err();
        assert_eq!(e.exit_code(), 2, "{e}");
        assert!(e.to_string().starts_with("--allow-shrink prize: there is no such stream"), "{e}");
    }
    // Whatever fails at the signature, its instances are not retired while lists name them.
    let db = Connection::open(w.dir.path().join("state/fleet.db")).unwrap();
    db.execute_batch("CREATE TRIGGER no BEFORE UPDATE OF envelope ON store BEGIN SELECT RAISE(ABORT, 'no'); END")
        .unwrap();
    let may_go = PublishOptions { allow_shrink: Some(Some("price".parse().unwrap())), ..options() };
    w.publish_cut(&may_go, &Quiet).await.unwrap_err();
    db.execute_batch("DROP TRIGGER no").unwrap();
    drop(db);
    assert!(ledger.heads().await.unwrap().values().all(|h| !h.retired));
    let r = w.publish_as(PublishOptions { allow_shrink: Some(Some("price".parse().unwrap())), ..options() }).await;
    assert_eq!((r.exit_code(), lists(&w, "0421")), (0, vec!["catalog@all".to_owned()]), "{:?}", r.lines());
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 0), "{:?}", r.lines());
}

/// Whoever looks at the lists, in whatever order: nothing is signed that says the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_with_a_stream_left_out_is_not_signed_anew_by_each_who_looks() {
    let mut w = World::new().await;
    w.publish().await;
    let catalog = CONFIG.find("[[stream]]").unwrap();
    let price = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    set(&mut w, &format!("{}{}", &CONFIG[..catalog], &CONFIG[price..]));
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    let serial = w.manifest("0421").unwrap().serial;
    for _ in 0..2 {
        assert_eq!(w.publish().await.exit_code(), 3);
        crate::web::ticks::manifests(&serve).await.unwrap();
        assert_eq!(w.manifest("0421").unwrap().serial, serial);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_stream_goes_store_by_store_as_the_new_one_comes() {
    let mut w = inbox_world().await;
    w.publish().await;
    // One that was started before, and keeps its settings.
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    set(&mut w, &INBOX.replace("name = \"price\"\naudience", "name = \"prices\"\naudience"));
    for (zone, lists) in [
        ("", [["catalog@all", "price@zone-east"], ["catalog@all", "price@zone-west"]]),
        ("east", [["catalog@all", "prices@zone-east"], ["catalog@all", "price@zone-west"]]),
        ("west", [["catalog@all", "prices@zone-east"], ["catalog@all", "prices@zone-west"]]),
    ] {
        if !zone.is_empty() {
            drop_file(&w, &format!("prices.zone-{zone}.price.csv"), "sku,cents\na,300\nb,200\n");
            drop_file(&w, &format!("prices.zone-{zone}.deal.ndjson"), "{\"id\":1,\"sku\":\"a\"}\n");
        }
        for dry_run in [true, false] {
            let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
            if zone == "east" && !dry_run {
                assert!(
                    r.exit_code() == 3 && r.problems[0].contains("1 stores (the first is 0422)"),
                    "{:?}",
                    r.lines()
                );
            } else {
                assert!(r.exit_code() == 0 && r.problems.is_empty(), "{zone} {dry_run}: {:?}", r.lines());
            }
        }
        // Whoever signs.
        for device in ["0421-01", "0422-01"] {
            let desk = Desk::open(&w.config, w.clock.as_ref(), true).await.unwrap();
            desk.enroll(&device.parse().unwrap()).await.unwrap();
        }
        w.clock.advance(Duration::from_secs(86_400 * 9));
        let ledger = Ledger::open(&w.config).await.unwrap();
        ledger.touch(w.clock.now()).await.unwrap();
        let serial = w.manifest("0422").unwrap().serial;
        crate::web::ticks::manifests(&serve).await.unwrap();
        assert!(w.manifest("0422").unwrap().serial > serial, "it is signed anew by its age");
        assert_eq!([listed(&w, "0421"), listed(&w, "0422")], lists, "{zone}");
    }
    let ledger = Ledger::open(&w.config).await.unwrap();
    let retired = async || ledger.heads().await.unwrap().into_iter().filter(|(_, h)| h.retired).count();
    assert_eq!(retired().await, 0);
    w.publish().await;
    assert_eq!(retired().await, 2, "nobody lists them any more");
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "that it waits, and that it is over");
    assert_eq!(w.publish().await.signed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_does_not_go_over_to_another_stream_while_its_neighbour_is_nobodys() {
    let mut w = World::new().await;
    w.publish().await;
    let (old, new) = ("name = \"price\"\naudience", "name = \"prices\"\naudience");
    let renamed = CONFIG.replace(old, new);
    let deal = renamed.find("[[stream.table]]\nname = \"deal\"").unwrap();
    let split = format!("{}{}", &renamed[..deal], &renamed[renamed.find("[publish]").unwrap()..]);
    let both = ["catalog@all", "price@zone-east"];
    w.write("price.sql", &PRICE[..PRICE.find('\n').unwrap()]);
    set(&mut w, &split);
    w.sql(CHANGE);
    for dry_run in [true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        assert_eq!((r.exit_code(), outcome(&r, "prices@zone-east")), (3, Outcome::Refused), "{:?}", r.lines());
        let text = &r.instances[&"prices@zone-east".parse().unwrap()].reason;
        assert!(text.contains("no stream has deal") && text.contains("--allow-shrink price"), "{text}");
        assert_eq!(listed(&w, "0421"), both);
    }
    // With both, but without its rows.
    w.write("price.sql", PRICE);
    set(&mut w, &renamed);
    w.sql("DELETE FROM price WHERE zone = 'east'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "prices@zone-east")), (3, Outcome::Refused), "{:?}", r.lines());
    let text = &r.instances[&"prices@zone-east".parse().unwrap()].reason;
    assert!(text.contains("in place of price@zone-east") && text.contains("become empty"), "{text}");
    assert_eq!(listed(&w, "0421"), both);
    // Somebody says that it is right.
    let r = w.publish_as(PublishOptions { allow_shrink: Some(Some("prices".parse().unwrap())), ..options() }).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(listed(&w, "0421"), ["catalog@all", "prices@zone-east"]);
}

/// A stream is split in two, and one of them is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_split_stream_goes_when_all_of_its_tables_are_there() {
    let mut w = inbox_world().await;
    w.publish().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("prices.sql", price);
    w.write("deals.sql", deal);
    let stream = |name: &str| format!("[[stream]]\nname = \"{name}\"\naudience = \"zone\"\nschema = \"{name}.sql\"\n");
    let old = INBOX.find("[[stream]]\nname = \"price\"").unwrap();
    set(&mut w, &format!("{}{}{}", &INBOX[..old], stream("prices"), stream("deals")));
    for (file, text, lists) in [
        ("prices.zone-east.price.csv", "sku,cents\na,300\nb,200\n", vec!["catalog@all", "price@zone-east"]),
        (
            "deals.zone-east.deal.ndjson",
            "{\"id\":3,\"sku\":\"b\"}\n",
            vec!["catalog@all", "deals@zone-east", "prices@zone-east"],
        ),
    ] {
        drop_file(&w, file, text);
        let r = w.publish().await;
        assert!(r.exit_code() == 3 && r.problems[0].contains("stores (the first is"), "{:?}", r.lines());
        assert_eq!(listed(&w, "0421"), lists);
        assert_eq!(listed(&w, "0422"), ["catalog@all", "price@zone-west"]);
    }
}

/// A stream that is listed takes one of its tables: it waits for the other, for its own must not go.
#[tokio::test(flavor = "multi_thread")]
async fn a_listed_stream_takes_a_table_when_its_neighbour_is_there_for_all() {
    let mut w = inbox_world().await;
    w.publish().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("catalog.sql", &format!("{CATALOG}\n{price}"));
    w.write("deals.sql", deal);
    let old = INBOX.find("[[stream]]\nname = \"price\"").unwrap();
    let deals = "[[stream]]\nname = \"deals\"\naudience = \"zone\"\nschema = \"deals.sql\"\n";
    set(&mut w, &format!("{}{deals}", &INBOX[..old]));
    let item = ("catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\n");
    drop_file(&w, item.0, item.1);
    drop_file(&w, "catalog.all.price.csv", "sku,cents\na,300\nb,200\n");
    for (zone, missing) in [("", "0421"), ("east", "0422")] {
        if !zone.is_empty() {
            drop_file(&w, &format!("deals.zone-{zone}.deal.ndjson"), "{\"id\":3,\"sku\":\"b\"}\n");
        }
        for dry_run in [true, false] {
            let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
            assert!(r.exit_code() > 0 && outcome(&r, "catalog@all") == Outcome::Refused, "{:?}", r.lines());
            let text = &r.instances[&"catalog@all".parse().unwrap()].reason;
            assert!(text.contains(&format!("deal is not published for store {missing} by deals")), "{text}");
        }
        assert_eq!(listed(&w, "0421"), ["catalog@all", "price@zone-east"], "not by two streams");
    }
    // All at once.
    drop_file(&w, "deals.zone-west.deal.ndjson", "{\"id\":3,\"sku\":\"b\"}\n");
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    for (store, zone) in [("0421", "east"), ("0422", "west")] {
        assert_eq!(listed(&w, store), ["catalog@all".to_owned(), format!("deals@zone-{zone}")]);
    }
}

/// In each of the two a store would miss the other's table for a moment: they come at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_dissolves_into_two_that_are_listed() {
    let mut w = World::new().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    let (head, rest) = CONFIG.split_at(CONFIG.find("[[stream]]\nname = \"price\"").unwrap());
    let (old, end) = rest.split_at(rest.find("[publish]").unwrap());
    let (old_price, old_deal) = old.split_at(old.rfind("[[stream.table]]").unwrap());
    let old_price = &old_price[old_price.find("[[stream.table]]").unwrap()..];
    let small = |name: &str| {
        format!(
            "[[stream]]\nname = \"{name}s\"\naudience = \"zone\"\nschema = \"{name}s.sql\"\n[[stream.table]]\n\
             name = \"{name}\"\nquery = \"SELECT 1 AS id WHERE :zone <> ''\"\n"
        )
    };
    let schema = |w: &World, name: &str, more: &str| {
        w.write(&format!("{name}s.sql"), &format!("CREATE TABLE {name} (id INTEGER PRIMARY KEY) STRICT;\n{more}"));
    };
    schema(&w, "flag", "");
    schema(&w, "note", "");
    set(&mut w, &format!("{head}{}{}{old}{end}", small("flag"), small("note")));
    assert_eq!(w.publish().await.exit_code(), 0);
    schema(&w, "flag", price);
    schema(&w, "note", deal);
    set(&mut w, &format!("{head}{}{old_price}{}{old_deal}{end}", small("flag"), small("note")));
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(listed(&w, "0421"), ["catalog@all", "flags@zone-east", "notes@zone-east"]);
}

/// A table goes from one stream of the settings to another: no list has it by both, or by none.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_changes_hands_between_streams_of_the_settings_in_one_publish() {
    let mut w = World::new().await;
    w.publish().await;
    let (price, deal) = PRICE.split_once('\n').unwrap();
    w.write("price.sql", price);
    w.write("catalog.sql", &format!("{CATALOG}\n{deal}"));
    let (rest, end) = CONFIG.split_at(CONFIG.find("[publish]").unwrap());
    let (rest, its) = rest.split_at(rest.rfind("[[stream.table]]").unwrap());
    let its = its.replace("WHERE zone = :zone", "WHERE zone = 'east'");
    let (head, old) = rest.split_at(rest.find("[[stream]]\nname = \"price\"").unwrap());
    set(&mut w, &format!("{head}{its}{old}{end}"));
    let tables = |w: &World| {
        let of =
            |(s, e): (&StreamName, &StreamEntry)| (s.to_string(), e.digests.keys().map(ToString::to_string).collect());
        w.manifest("0421").unwrap().streams.iter().map(of).collect::<BTreeMap<String, Vec<String>>>()
    };
    let before = tables(&w);
    let rebuild = || PublishOptions { allow_rebuild: true, ..options() };
    let only = |stream: &str| PublishOptions { stream: Some(stream.parse().unwrap()), ..rebuild() };
    for (what, options, refused, says) in [
        ("price may not be rebuilt", options(), "catalog@all", "gives it up needs --allow-rebuild"),
        ("price alone", only("price"), "price@zone-east", "goes over to stream catalog"),
        ("catalog alone", only("catalog"), "catalog@all", "run without --stream"),
    ] {
        for dry_run in [true, false] {
            let r = w.publish_as(PublishOptions { dry_run, ..options.clone() }).await;
            assert!(r.exit_code() > 0 && outcome(&r, refused) == Outcome::Refused, "{what}: {:?}", r.lines());
            let text = &r.instances[&refused.parse().unwrap()].reason;
            assert!(text.contains(says), "{what}: {text}");
            assert_eq!(tables(&w), before, "{what}");
        }
    }
    // A store without a zone keeps what it has: it would have the table by two streams.
    w.sql("UPDATE store SET zone = NULL WHERE id = '0422'");
    let r = w.publish_as(rebuild()).await;
    let text = &r.instances[&"catalog@all".parse().unwrap()].reason;
    assert!(text.contains("by which store 0422 has it") && text.contains("it has no zone"), "{text}");
    assert_eq!(
        (tables(&w), listed(&w, "0422")),
        (before.clone(), vec!["catalog@all".into(), "price@zone-west".into()])
    );
    w.sql("UPDATE store SET zone = 'west' WHERE id = '0422'");
    // Who takes it is refused for his rows: nobody gives it up.
    w.sql("UPDATE deal SET sku = NULL WHERE zone = 'east'");
    let r = w.publish_as(rebuild()).await;
    assert!(r.exit_code() > 0 && outcome(&r, "price@zone-east") == Outcome::Refused, "{:?}", r.lines());
    assert_eq!(tables(&w), before);
    // It would be empty: that is guarded as if it had been deleted.
    w.sql("UPDATE deal SET sku = 'sku1'; UPDATE deal SET zone = 'north' WHERE zone = 'east'");
    let r = w.publish_as(rebuild()).await;
    let text = &r.instances[&"catalog@all".parse().unwrap()].reason;
    assert!(
        r.exit_code() == 1 && text.contains("in place of price@zone-east") && text.contains("become empty"),
        "{text}"
    );
    assert_eq!(tables(&w), before);
    w.sql("UPDATE deal SET zone = 'east' WHERE zone = 'north'");
    let r = w.publish_as(rebuild()).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(tables(&w)["catalog"], ["deal", "item"]);
    assert_eq!(tables(&w)["price"], ["price"]);
    w.all_is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_goes_over_is_guarded_whoever_gets_it() {
    let base = World::new().await;
    base.publish().await;
    let begin = CONFIG.find("[[stream]]\nname = \"price\"").unwrap();
    let end = CONFIG.find("[publish]").unwrap();
    let price = &CONFIG[begin..end];
    let other = price.replace("WHERE zone = :zone", "WHERE zone = 'none'");
    // To a stream for everybody; into one that is there.
    let moved = other.find("[[stream.table]]").unwrap();
    for (streams, at) in [
        (
            format!(
                "{}{}",
                &CONFIG[..begin],
                other.replacen("\"price\"", "\"prices\"", 1).replace("\"zone\"", "\"all\"")
            ),
            "prices@all",
        ),
        (format!("{}{}", &CONFIG[..begin], &other[moved..]), "catalog@all"),
    ] {
        let mut w = base.twin();
        w.write("catalog.sql", &format!("{CATALOG}\n{PRICE}"));
        if at == "prices@all" {
            w.write("catalog.sql", CATALOG);
        }
        set(&mut w, &format!("{streams}{}", &CONFIG[end..]));
        let r = w.publish().await;
        assert!(r.exit_code() > 0 && outcome(&r, at) == Outcome::Refused, "{at}: {:?}", r.lines());
        let text = &r.instances[&at.parse().unwrap()].reason;
        assert!(text.contains("in place of price@zone-east") && text.contains("become empty"), "{text}");
        assert_eq!(listed(&w, "0421"), ["catalog@all", "price@zone-east"]);
    }
}

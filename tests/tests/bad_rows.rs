//! Rows and settings that must never reach a register: refused at headquarters with the row named, while other
//! streams go on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::collections::BTreeMap;
use tillcast_tests::{Output, PATIENCE, Site, Smtp, digest, files, forge};

/// Both stores' versions of all streams, and the manifests' serials.
fn versions(site: &Site) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for store in site.relays.keys() {
        for stream in ["catalog", "price", "promo", "staff"] {
            all.insert(format!("{store} {stream}"), site.version(store, stream));
        }
    }
    all
}

/// Breaks a stream by SQL, and changes another's rows: the first is refused with these words and stays as it is, the
/// second goes out. Then mends it.
#[track_caller]
fn refused(site: &Site, stream: &str, breaks: &str, words: &[&str], mends: &str) -> Output {
    let other = if stream == "price" { "staff" } else { "price" };
    let before = versions(site);
    site.sql(breaks);
    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000003'; UPDATE staff SET name = name || '.' WHERE id = 3");
    let out = site.hq.run(&["publish"]).code(3).says(words);
    for (name, version) in versions(site) {
        let was = before[&name];
        if name.ends_with(stream) {
            assert_eq!(version, was, "{name} is not published: {}", out.text());
        } else if name.ends_with(other) {
            assert!(version > was, "{name} goes on: {}", out.text());
        }
    }
    site.sql(mends);
    site.publish();
    out
}

/// What the published rows of the model would be, with nothing bad in them.
#[track_caller]
fn arrives(site: &Site) {
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn a_bad_row_stops_its_stream_and_is_named() {
    let site = Site::builder().stores(&[("0421", "east"), ("0815", "west")]).registers(1).build();
    site.publish();
    let long = "x".repeat(150);
    let words =
        ["catalog@all", "table item", "sku=\"SKU0000011\"", "column name", "150 characters", "the limit is 100"];
    refused(
        &site,
        "catalog",
        &format!("UPDATE item SET name = '{long}' WHERE sku = 'SKU0000011'"),
        &words,
        "UPDATE item SET name = 'well' WHERE sku = 'SKU0000011'",
    );
    let words = ["catalog@all", "table item", "sku=\"SKU0000012\"", "column department", "\"abc\"", "INTEGER"];
    refused(
        &site,
        "catalog",
        "UPDATE item SET department = 'abc' WHERE sku = 'SKU0000012'",
        &words,
        "UPDATE item SET department = 3 WHERE sku = 'SKU0000012'",
    );
    let words = ["price@zone-west", "table price", "sku=\"SKU0000007\"", "column price_cents", "NULL", "NOT NULL"];
    refused(
        &site,
        "price",
        "UPDATE price SET price_cents = NULL WHERE sku = 'SKU0000007' AND zone = 'west'",
        &words,
        "UPDATE price SET price_cents = 7 WHERE sku = 'SKU0000007' AND zone = 'west'",
    );
    let words = ["promo@zone-east", "table promo", "key id=4", "column percent", "95", "BETWEEN 1 AND 90"];
    refused(
        &site,
        "promo",
        "UPDATE promo SET percent = 95 WHERE id = 4 AND zone = 'east'",
        &words,
        "UPDATE promo SET percent = 9 WHERE id = 4 AND zone = 'east'",
    );
    let words = ["staff@store-0815", "table staff", "key id=2", "column role", "\"boss\"", "'cashier', 'manager'"];
    refused(
        &site,
        "staff",
        "UPDATE staff SET role = 'boss' WHERE id = 2 AND store = '0815'",
        &words,
        "UPDATE staff SET role = 'manager' WHERE id = 2 AND store = '0815'",
    );
    arrives(&site);
}

#[test]
fn a_duplicate_key_a_missing_table_and_an_unknown_column_stop_their_stream() {
    let site = Site::builder().registers(1).build();
    site.publish();
    let words = ["catalog@all", "table item", "sku=\"SKU0000005\"", "twice"];
    refused(
        &site,
        "catalog",
        "ALTER TABLE item RENAME TO keyed; CREATE TABLE item AS SELECT * FROM keyed;
         INSERT INTO item SELECT * FROM keyed WHERE sku = 'SKU0000005'",
        &words,
        "DROP TABLE item; ALTER TABLE keyed RENAME TO item",
    );
    refused(
        &site,
        "promo",
        "ALTER TABLE promo RENAME TO gone",
        &["promo@zone-east", "table promo", "no such table"],
        "ALTER TABLE gone RENAME TO promo",
    );
    refused(
        &site,
        "staff",
        "ALTER TABLE staff RENAME COLUMN role TO job",
        &["staff@store-0421", "table staff", "role"],
        "ALTER TABLE staff RENAME COLUMN job TO role",
    );
    arrives(&site);
}

#[test]
fn a_query_with_a_column_that_the_contract_does_not_know_stops_its_stream() {
    let mut site = Site::builder().registers(1).build();
    site.publish();
    let before = versions(&site);
    let streams = site.hq.streams().to_owned();
    site.hq.set_streams(&streams.replace("id, sku, percent FROM promo", "id, sku, percent, zone AS area FROM promo"));
    site.sql("UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000003'; UPDATE promo SET percent = 2 WHERE id = 1");
    site.hq.run(&["publish"]).code(3).says(&["promo@zone-east", "table promo", "area"]);
    let after = versions(&site);
    assert_eq!(after["0421 promo"], before["0421 promo"]);
    assert!(after["0421 price"] > before["0421 price"]);
    site.hq.set_streams(&streams);
    site.publish();
    arrives(&site);
}

#[test]
fn all_bad_rows_are_counted_the_first_twenty_listed_one_mail_sent_and_one_when_it_is_well() {
    let smtp = Smtp::start();
    let site = Site::builder().registers(1).mail(&smtp).build();
    site.publish();
    assert_eq!(smtp.mails().len(), 0);
    site.sql(&format!("UPDATE item SET name = '{}' WHERE sku < 'SKU0000033'", "Ü".repeat(101)));
    site.sql("UPDATE staff SET role = 'manager' WHERE id = 1");
    let out = site.hq.run(&["publish", "--json"]).code(3);
    let refused = &out.json()["instances"]["catalog@all"];
    assert_eq!((refused["outcome"].as_str(), refused["bad_rows"].as_u64()), (Some("refused"), Some(33)), "{refused:#}");
    assert_eq!(refused["faults"].as_array().unwrap().len(), 20);
    for fault in refused["faults"].as_array().unwrap() {
        let fault = fault.as_str().unwrap();
        assert!(fault.contains("101 characters, the limit is 100") && fault.len() < 600, "{fault}");
    }
    let text = site.hq.run(&["publish"]).code(3).says(&["33 bad rows", "and 13 more"]).text();
    assert_eq!(text.matches("key sku=\"SKU").count() % 20, 0, "{text}");

    let mail = smtp.wait_for(PATIENCE, &["catalog"]);
    for word in ["catalog@all", "table item", "SKU0000000", "column name", "101 characters", "limit is 100", "13 more"]
    {
        assert!(mail.text.contains(word), "{word} in {}", mail.text);
    }
    assert_eq!(smtp.mails().len(), 1, "one mail an episode");
    site.sql("UPDATE item SET name = 'well' WHERE sku < 'SKU0000033'");
    site.publish();
    smtp.wait_count(PATIENCE, 2);
    arrives(&site);
}

#[test]
fn a_store_whose_zone_is_mistyped_keeps_its_prices_until_it_is_allowed() {
    let site = Site::small();
    site.publish();
    site.bring_down();
    let to = |zone: &str| site.sql(&format!("UPDATE store SET zone = '{zone}' WHERE id = '0421'"));
    let prices = || site.read("0421-01", "SELECT count(*) FROM price").unwrap();
    to("aest");
    let told =
        ["price@zone-aest", "store 0421 would follow it in place of price@zone-east", "table price would become empty"];
    site.hq.run(&["publish", "--dry-run"]).code(3).says(&told);
    site.hq.run(&["publish"]).code(3).says(&told);
    site.bring_down();
    assert_eq!(prices(), "200");
    to("east");
    site.publish();
    site.bring_down();
    site.assert_all_proven();
    to("aest");
    site.hq.run(&["publish", "--allow-shrink"]).ok();
    site.bring_down();
    assert_eq!(prices(), "0");
}

#[test]
fn a_source_that_shrank_is_refused_with_the_counts_until_it_is_allowed() {
    let site = Site::builder().registers(1).build();
    site.publish();
    let before = versions(&site);
    site.sql("DELETE FROM item WHERE sku >= 'SKU0000080'; UPDATE price SET price_cents = 5 WHERE sku = 'SKU0000001'");
    let counts = ["120 of 200 rows", "table item", "80 would stay", "--allow-shrink catalog"];
    site.hq.run(&["publish"]).code(3).says(&counts);
    site.hq.run(&["publish", "--allow-shrink", "price"]).code(3).says(&counts);
    let after = versions(&site);
    assert_eq!(after["0421 catalog"], before["0421 catalog"]);
    assert!(after["0421 price"] > before["0421 price"], "others go on");
    site.hq.run(&["publish", "--allow-shrink", "catalog"]).ok();
    arrives(&site);

    // Emptied: refused however few rows there were. 100 rows or 20% less: not.
    site.sql("DELETE FROM promo WHERE zone = 'west'");
    site.hq.run(&["publish"]).code(3).says(&["promo@zone-west", "would become empty", "20 rows"]);
    site.hq.run(&["publish", "--allow-shrink"]).ok();
    site.sql("DELETE FROM price WHERE sku >= 'SKU0000100'");
    site.publish();
    arrives(&site);
}

#[test]
fn the_list_of_stores_is_guarded_too() {
    let site = Site::builder().registers(1).build();
    site.publish();
    let before = files::tree(&site.bucket());
    site.sql("DELETE FROM store");
    site.hq.run(&["publish"]).code(3).says(&["list of stores", "would become empty", "--allow-shrink"]);
    assert_eq!(files::tree(&site.bucket()), before);
    // Who is known goes on getting what changes.
    site.sql("UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000003'");
    site.hq.run(&["publish"]).code(3).says(&["list of stores", "price@zone-east 2 published"]);
    site.sql("INSERT INTO store VALUES ('0421', 'east', 'north'), ('0815', 'west', 'north')");
    site.publish();
    arrives(&site);
}

/// The contract of a stream, rewritten.
fn change_contract(site: &Site, stream: &str, from: &str, to: &str) {
    let path = site.hq.dir.join(format!("schema/{stream}.sql"));
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(&path, text.replace(from, to)).unwrap();
}

/// The expected digests, but `table`'s by this query.
fn expected_with(site: &Site, store: &str, table: &str, sql: &str) -> BTreeMap<String, String> {
    let mut expected = site.expected(store);
    expected.insert(table.into(), digest::of_query(&site.model(), sql));
    expected
}

#[test]
fn an_additive_change_travels_in_a_delta_to_the_registers() {
    let mut site = Site::builder().registers(1).build();
    site.publish();
    site.bring_down();
    change_contract(
        &site,
        "promo",
        "90)\n) STRICT;",
        "90),\n    label TEXT NOT NULL DEFAULT 'promo'\n) STRICT;\nCREATE INDEX promo_sku ON promo (sku);",
    );
    let streams = site
        .hq
        .streams()
        .replace("percent FROM promo", "percent, CASE WHEN id % 2 THEN 'promo' ELSE sku END AS label FROM promo");
    site.hq.set_streams(&streams);
    site.publish();
    let (name, pack) = site.head_pack("0421", "promo");
    assert!(name.ends_with(".delta.pack") && forge::unpack(&pack)[0].contains("ALTER TABLE"), "{name}");
    site.bring_down();
    for (store, zone) in [("0421", "east"), ("0815", "west")] {
        let sql = format!(
            "SELECT id, sku, percent, CASE WHEN id % 2 THEN 'promo' ELSE sku END FROM promo WHERE zone = '{zone}'"
        );
        let expected = expected_with(&site, store, "promo", &sql);
        assert_eq!(site.promised(store), expected);
        assert_eq!(site.relay(store).digests(), expected);
        let register = format!("{store}-01");
        assert_eq!(digest::of_database(&site.store_db(&register)), expected);
        assert_eq!(site.register(&register).digests(), expected);
        let index = "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'promo_sku'";
        assert_eq!(site.read(&register, index).as_deref(), Some("1"));
    }
}

#[test]
fn a_change_that_needs_a_rebuild_waits_for_the_flag() {
    let mut site = Site::builder().registers(1).build();
    site.publish();
    site.bring_down();
    let before = versions(&site);
    change_contract(&site, "staff", "length(name) <= 60", "length(name) <= 30");
    change_contract(&site, "promo", "    sku TEXT NOT NULL,\n", "");
    site.hq.set_streams(&site.hq.streams().replace("id, sku, percent FROM promo", "id, percent FROM promo"));
    site.sql("UPDATE price SET price_cents = 8 WHERE sku = 'SKU0000001'");
    site.hq.run(&["publish"]).code(3).says(&["promo@zone-east", "staff@store-0421", "--allow-rebuild"]);
    let after = versions(&site);
    assert_eq!((after["0421 promo"], after["0421 staff"]), (before["0421 promo"], before["0421 staff"]));
    assert!(after["0421 price"] > before["0421 price"]);
    site.hq.run(&["publish", "--allow-rebuild"]).ok();
    assert!(site.head_pack("0421", "promo").0.ends_with(".full.pack"));
    site.bring_down();
    let expected = expected_with(&site, "0421", "promo", "SELECT id, percent FROM promo WHERE zone = 'east'");
    assert_eq!(digest::of_database(&site.store_db("0421-01")), expected);
    assert_eq!(site.relay("0421").digests(), expected);
}

/// All that a dry run or a refused start must leave as it is.
fn everything(site: &Site) -> BTreeMap<String, String> {
    let state = site.hq.dir.join("state");
    let ledger = files::rows(&state.join("fleet.db")).into_iter();
    let mut all: BTreeMap<String, String> = ledger.map(|(t, rows)| (format!("ledger {t}"), rows.join("\n"))).collect();
    for place in [
        site.bucket(),
        site.inbox(),
        state.join("replicas"),
        state.join("packs"),
        state.join("scratch"),
        state.join("keys"),
    ] {
        all.extend(files::tree(&place).into_iter().map(|(file, sum)| (format!("{} {file}", place.display()), sum)));
    }
    // SQLite may make a file for readers beside a database; rows are in the others.
    all.retain(|name, _| !name.ends_with("-shm"));
    all
}

/// Panics with what differs.
#[track_caller]
fn assert_untouched(site: &Site, before: &BTreeMap<String, String>) {
    assert_same(before, &everything(site));
}

/// As [`everything`], but for what people are told.
fn all_but_mail(site: &Site) -> BTreeMap<String, String> {
    let mut all = everything(site);
    all.retain(|name, _| !["ledger episode", "ledger mail"].contains(&name.as_str()));
    all
}

#[track_caller]
fn assert_same(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) {
    let differs = |name: &&String| before.get(*name) != now.get(*name);
    let names: Vec<&String> = before.keys().chain(now.keys()).filter(differs).collect();
    let texts: Vec<_> = names.iter().map(|n| (n, before.get(*n), now.get(*n))).collect();
    assert!(names.is_empty(), "touched: {texts:?}");
}

#[test]
fn a_dry_run_tells_what_would_change_and_changes_nothing() {
    let smtp = Smtp::start();
    let site = Site::builder().registers(1).mail(&smtp).build();
    site.publish();
    site.sql(
        "UPDATE price SET price_cents = price_cents + 1 WHERE sku < 'SKU0000010' AND zone = 'east';
         DELETE FROM promo WHERE id = 3 AND zone = 'east'; INSERT INTO item VALUES ('NEW1', 'new', 7, 1.25, NULL);
         UPDATE staff SET role = 'boss' WHERE id = 1 AND store = '0421'",
    );
    let before = everything(&site);
    let out = site.hq.run(&["publish", "--dry-run", "--json"]).code(3).json();
    assert_eq!(out["dry_run"], true);
    let rows = |i: &str, table: &str| out["instances"][i]["tables"][table]["rows"].clone();
    assert_eq!(rows("price@zone-east", "price")["update"], 10, "{out:#}");
    assert_eq!(rows("promo@zone-east", "promo")["delete"], 1);
    assert_eq!(rows("catalog@all", "item")["insert"], 1);
    assert!(out["instances"]["price@zone-east"]["packs"][0]["bytes"].as_u64().unwrap() > 100);
    assert_eq!(out["instances"]["price@zone-west"]["outcome"], "unchanged");
    assert_eq!(out["instances"]["staff@store-0421"]["outcome"], "refused");
    site.hq.run(&["publish", "--dry-run"]).code(3).says(&["would be published", "10 updated", "bytes", "boss"]);
    assert_untouched(&site, &before);
    assert_eq!(smtp.mails().len(), 0);
    // What it told is what comes.
    let done = site.hq.run(&["publish", "--json"]).code(3).json();
    let [told, came] = [&out, &done].map(|r| &r["instances"]["price@zone-east"]["packs"][0]);
    assert_eq!([&told["kind"], &told["rows"]], [&came["kind"], &came["rows"]]);
    // Its header says when it was made.
    let [told, came] = [told, came].map(|pack| pack["bytes"].as_i64().unwrap());
    assert!((told - came).abs() < 16, "{told}, {came}");
}

#[test]
fn a_dry_run_leaves_a_migration_and_an_inbox_alone() {
    let site = Site::builder().source(tillcast_tests::site::Source::Inbox).registers(1).build();
    site.sql("UPDATE price SET price_cents = 9 WHERE sku = 'SKU0000004'");
    site.drop_all();
    std::fs::write(site.inbox().join("price.zone-north.price.csv"), "sku,price_cents,updated\n").unwrap();
    change_contract(&site, "promo", "90)\n)", "90),\n    label TEXT\n)");
    let before = everything(&site);
    site.hq.run(&["publish", "--dry-run"]);
    assert_untouched(&site, &before);
}

#[test]
fn mistakes_of_configuration_are_found_before_anything_is_touched() {
    let mut site = Site::builder().registers(1).build();
    site.publish();
    site.sql("UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000003'");
    let before = all_but_mail(&site);
    let good = site.hq.streams().to_owned();
    let refused = |site: &Site, words: &[&str]| {
        site.hq.run(&["publish"]).code(2).says(words);
        site.hq.run(&["check-config"]).code(2).says(words);
        assert_same(&before, &all_but_mail(site));
    };
    for (key, value, words) in [
        ("publish.deltaz", "3", &["deltaz", "deltas"][..]),
        ("publish.deltas", "'many'", &["publish.deltas"]),
        ("sorce.url", "'x'", &["sorce", "source"]),
        ("publish.lease", "'soon'", &["publish.lease"]),
    ] {
        site.hq.set(key, value);
        refused(&site, words);
        site.hq.unset(key);
    }
    let evil = "price; DROP TABLE item";
    for (from, to, words) in [
        ("name = 'price'\naudience", format!("name = '{evil}'\naudience"), &[evil][..]),
        ("name = 'price'\naudience", "name = '../price'\naudience".into(), &["../price"]),
        ("name = 'price'\naudience", "name = 'Price'\naudience".into(), &["Price"]),
        ("name = 'price'\naudience", "name = 'staff'\naudience".into(), &["staff"]),
        ("name = 'price'\nquery", "name = 'price) --'\nquery".into(), &["price) --"]),
        ("name = 'price'\nquery", "name = 'prices'\nquery".into(), &["prices", "price"]),
        ("audience = 'zone'", "audience = 'zones'".into(), &["zones"]),
        ("FROM price WHERE zone = :zone", "FROM price WHERE zone = :shop".into(), &["price", ":shop"]),
        ("FROM price WHERE zone = :zone", "FROM price WHERE zone = :store".into(), &["price", ":store"]),
        ("schema/price.sql", "schema/prices.sql".into(), &["price", "schema/prices.sql"]),
        ("audience = 'all'", "audience = 'all'\nqueri = 'x'".into(), &["queri"]),
    ] {
        assert!(good.contains(from), "{from}");
        site.hq.set_streams(&good.replace(from, &to));
        refused(&site, words);
    }
    site.hq.set_streams(&good);
    for (from, to, words) in [
        ("price_cents INTEGER", "price_cents ANY", &["price", "ANY"][..]),
        ("STRICT;", "STRICT; CREATE INDEX item_department ON price (sku);", &["item_department"]),
        ("STRICT", "", &["STRICT"]),
        ("sku TEXT NOT NULL PRIMARY KEY", "sku TEXT NOT NULL PRIMARY KEY COLLATE NOCASE", &["price"]),
        ("STRICT;", "STRICT; CREATE TRIGGER t AFTER INSERT ON price BEGIN SELECT 1; END;", &["price"]),
        ("STRICT;", "STRICT; ATTACH 'x' AS y;", &["price"]),
        ("updated TEXT", "\"up dated\" TEXT", &["up dated"]),
    ] {
        change_contract(&site, "price", from, to);
        refused(&site, words);
        std::fs::write(site.hq.dir.join("schema/price.sql"), tillcast_tests::site::DDL[1].1).unwrap();
    }
    site.hq.run_env(&["publish"], &[("TILLCAST__PUBLISH__DELTAZ", "3")]).code(2).says(&["DELTAZ"]);
    site.hq.run(&["publish", "--stream", "prise"]).code(2).says(&["prise"]);
    site.hq.run(&["publish", "--stream", "../x"]).code(2);
    site.hq.run(&["enroll", "04'21"]).code(2);
    assert_same(&before, &all_but_mail(&site));
    site.publish();
}

#[test]
fn a_source_whose_names_play_tricks_is_refused_where_it_is_read() {
    let site = Site::builder().registers(1).build();
    site.publish();
    let before = files::tree(&site.bucket());
    for (id, zone) in
        [("../../etc", "east"), ("0421; --", "east"), ("CON", "east"), ("0999", "ea/st"), ("0999", "East; x")]
    {
        site.sql(&format!("INSERT INTO store VALUES ('{id}', '{zone}', '')"));
        site.hq.run(&["publish"]).code(3).says(&["stores", if id == "0999" { zone } else { id }]);
        assert_eq!(files::tree(&site.bucket()), before, "{id} {zone}");
        site.sql("DELETE FROM store WHERE region = ''");
    }
    site.sql("INSERT INTO store VALUES ('a1', 'east', ''), ('A1', 'east', '')");
    site.hq.run(&["publish"]).code(3).says(&["a1", "A1"]);
    site.sql("DELETE FROM store WHERE region = ''");
    site.publish();
}

//! Contracts that change under rows that are out: one stream's trouble is no other's.

use super::*;

fn rebuild() -> PublishOptions {
    PublishOptions { allow_rebuild: true, ..options() }
}
fn told<'r>(r: &'r PublishReport, instance: &str) -> &'r InstanceReport {
    &r.instances[&instance.parse::<Instance>().unwrap()]
}

#[tokio::test(flavor = "multi_thread")]
async fn published_rows_that_a_new_contract_does_not_take_stop_their_stream_until_they_are_dropped() {
    let w = inbox_world().await;
    w.publish().await;
    for (n, (old, new, table, why)) in [
        ("sku TEXT NOT NULL)", "item TEXT NOT NULL)", "deal", "column sku is gone and item is new"),
        ("id INTEGER PRIMARY KEY, ", "id INTEGER, n INTEGER PRIMARY KEY, ", "deal", "column n of the key is new"),
        ("cents INTEGER NOT NULL", "cents INTEGER NOT NULL CHECK (cents < 200)", "price", "key sku=\"b\": CHECK"),
        ("cents INTEGER NOT NULL", "cents INTEGER NOT NULL CHECK (json_valid(cents, 0))", "price", "key sku=\"a\": "),
        ("cents INTEGER NOT NULL", "cents INTEGER NOT NULL, vat INTEGER NOT NULL", "price", "NOT NULL constraint"),
        ("cents INTEGER NOT NULL", "cents TEXT NOT NULL", "price", "column cents is 100, the contract has TEXT"),
    ]
    .into_iter()
    .enumerate()
    {
        w.write("price.sql", &PRICE.replace(old, new));
        for (allow_rebuild, plu) in [(false, n * 2 + 10), (true, n * 2 + 11)] {
            drop_file(&w, "catalog.all.item.csv", &format!("sku,name,plu\na,Tea,{plu}\nb,Milk,2\n"));
            let r = w.publish_as(PublishOptions { allow_rebuild, ..options() }).await;
            let east = told(&r, "price@zone-east");
            assert_eq!((r.exit_code(), east.code), (3, Some("MISSING_TABLE")), "{new}: {:?}", r.lines());
            let begins =
                format!("no drop has come for table {table}, and its published rows do not fit the contract (");
            assert!(east.reason.starts_with(&begins) && east.reason.contains(why), "{new}: {}", east.reason);
            assert_eq!(outcome(&r, "catalog@all"), Outcome::Published);
            assert!(!w.exists("inbox/catalog.all.item.csv"), "others are moved");
        }
    }
    // What the contract only drops is left out of the rows that are kept; the other table comes with its own.
    w.write("price.sql", &PRICE.replace(", sku TEXT NOT NULL", "").replace("cents INTEGER", "vat INTEGER"));
    for zone in ["east", "west"] {
        drop_file(&w, &format!("price.zone-{zone}.price.csv"), "sku,vat\na,7\nb,19\n");
    }
    let r = w.publish().await;
    assert_eq!((r.exit_code(), told(&r, "price@zone-east").code), (3, Some("REBUILD")), "{:?}", r.lines());
    let r = w.publish_as(rebuild()).await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-west")), (0, Outcome::Published), "{:?}", r.lines());
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT sku || vat FROM price ORDER BY 1"), ["a7", "b19"]);
    assert_eq!(rows(register.connection(), "SELECT id || '' FROM deal"), ["1"]);
}

/// A CAST would make 12 of '12,99'.
#[tokio::test(flavor = "multi_thread")]
async fn the_sample_chain_publishes_no_price_that_is_no_number() {
    let dir = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/sample"), dir.path());
    let source =
        "CREATE TABLE store (id TEXT, zone TEXT, region TEXT); INSERT INTO store VALUES ('0421', 'east', 'coast');
        CREATE TABLE item (sku TEXT, barcode TEXT, name TEXT, department TEXT, vat TEXT);
        INSERT INTO item VALUES ('100000', '2000000000138', 'Croissant', 'Bakery', '7');
        CREATE TABLE promo (id TEXT, sku TEXT, percent TEXT, starts TEXT, ends TEXT);
        INSERT INTO promo VALUES ('1', '100000', '50', '2026-01-05', '2026-01-18');
        CREATE TABLE price (zone TEXT, sku TEXT, cents TEXT, updated TEXT);
        INSERT INTO price VALUES ('east', '100000', '1859', '2026-01-05'), ('east', '100001', '319', '2026-01-05');";
    Connection::open(dir.path().join("hq.db")).unwrap().execute_batch(source).unwrap();
    let w = World::open(dir, Arc::new(TestClock::at("2026-01-01T00:00:00Z")));
    Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap().init().await.unwrap();
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    for (cents, is) in
        [("12,99", "the text \"12,99\""), ("", "the text \"\""), ("12.5", "the text \"12.5\""), ("0", "CHECK")]
    {
        w.sql(&format!("UPDATE price SET cents = '{cents}' WHERE sku = '100001'"));
        let r = w.publish().await;
        let price = told(&r, "price@zone-east");
        assert_eq!((r.exit_code(), price.code, price.bad_rows), (3, Some("BAD_ROWS"), 1), "{cents}: {:?}", r.lines());
        assert!(price.faults[0].contains("100001") && price.faults[0].contains(is), "{cents}: {:?}", price.faults);
    }
}

/// An index is no part of its table's own statement.
#[tokio::test(flavor = "multi_thread")]
async fn published_rows_that_a_new_index_does_not_take_are_to_be_dropped() {
    let w = inbox_world().await;
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,100\nb,100\n");
    w.publish().await;
    w.write("price.sql", &format!("{PRICE}\nCREATE UNIQUE INDEX once ON price (cents);"));
    let r = w.publish_as(rebuild()).await;
    let east = told(&r, "price@zone-east");
    assert_eq!((r.exit_code(), east.code), (3, Some("MISSING_TABLE")), "{:?}", r.lines());
    assert!(east.reason.contains("table price") && east.reason.contains("UNIQUE"), "{}", east.reason);
}

/// What is additive by its words need not be by the rows that are out: readers would refuse the delta.
#[tokio::test(flavor = "multi_thread")]
async fn an_addition_that_the_published_rows_do_not_take_needs_a_full_and_stops_no_other_stream() {
    let w = World::new().await;
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let vat = "cents INTEGER NOT NULL, vat INTEGER NOT NULL DEFAULT 0 CHECK (vat > 0))";
    w.write("price.sql", &PRICE.replace("cents INTEGER NOT NULL)", vat));
    w.write("hq.toml", &CONFIG.replace("SELECT sku, cents FROM price", "SELECT sku, cents, 7 AS vat FROM price"));
    let w = World::open(w.dir, w.clock);
    w.sql("UPDATE item SET name = 'Item 1' WHERE sku = 'sku2'");
    let r = w.publish_as(PublishOptions { full: true, ..options() }).await;
    let east = told(&r, "price@zone-east");
    assert_eq!((r.exit_code(), east.code), (3, Some("REBUILD")), "{:?}", r.lines());
    for part in ["ADD COLUMN vat", "CHECK constraint failed", "publish with --allow-rebuild"] {
        assert!(east.reason.contains(part), "{}", east.reason);
    }
    assert_eq!(outcome(&r, "catalog@all"), Outcome::Published);
    let r = w.publish_as(rebuild()).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(told(&r, "price@zone-east").packs.iter().map(|p| p.kind).collect::<Vec<_>>(), [PackKind::Full]);
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT DISTINCT vat || '' FROM price"), ["7"]);
    // The source is clean again, and is to stay so; what is out has two.
    w.write("catalog.sql", &format!("{CATALOG}\nCREATE UNIQUE INDEX item_name ON item (name);"));
    w.sql("UPDATE item SET name = 'Item 2' WHERE sku = 'sku2'; UPDATE price SET cents = 5 WHERE sku = 'sku2'");
    let r = w.publish().await;
    let item = told(&r, "catalog@all");
    assert_eq!((r.exit_code(), item.code), (3, Some("REBUILD")), "{:?}", r.lines());
    assert!(item.reason.contains("UNIQUE constraint failed: item.name"), "{}", item.reason);
    assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published);
    let r = w.publish_as(rebuild()).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
}

/// Whose fault it is, the contract's or the replica's, its digests tell.
#[tokio::test(flavor = "multi_thread")]
async fn an_addition_that_only_a_drifted_replica_refuses_travels_in_a_delta() {
    let w = World::new().await;
    w.publish().await;
    let replica = Connection::open(w.dir.path().join("state/replicas/catalog@all.db")).unwrap();
    replica.execute_batch("UPDATE item SET name = 'Item 1' WHERE sku = 'sku2'").unwrap();
    drop(replica);
    w.write("catalog.sql", &format!("{CATALOG}\nCREATE UNIQUE INDEX item_name ON item (name);"));
    let r = w.publish().await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(told(&r, "catalog@all").packs[0].kind, PackKind::Delta);
    w.all_is_well();
}

/// SQLite takes it and can check no row by it: each publish of all streams would end at that.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_key_that_does_not_fit_is_found_before_anything_is_touched() {
    let w = World::new().await;
    w.write(
        "catalog.sql",
        &format!("{CATALOG}\nCREATE TABLE c (name TEXT PRIMARY KEY REFERENCES item (name)) STRICT;"),
    );
    let e = crate::publish::contracts::load(&w.config).unwrap_err().to_string();
    assert!(e.contains("catalog.sql: table c: foreign key mismatch"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_in_double_quotes_is_found_before_anything_is_touched() {
    let w = World::new().await;
    w.publish().await;
    w.write("catalog.sql", &CATALOG.replace("UNIQUE)", "UNIQUE, kind TEXT CHECK (kind IN (\"a\", \"b\")))"));
    w.write("hq.toml", &CONFIG.replace("SELECT sku, name, plu", "SELECT sku, name, plu, 'a' AS kind"));
    let w = World::open(w.dir, w.clock);
    let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
    assert!(matches!(e, PublishError::Config(_)) && e.to_string().contains("no such column: \"a\""), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn contracts_grow_inside_deltas_and_are_rebuilt_on_demand() {
    let w = World::new().await;
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    w.sql("ALTER TABLE price ADD COLUMN unit TEXT; UPDATE price SET unit = 'kg' WHERE sku = 'sku1'");
    w.write(
        "price.sql",
        &format!(
            "{}\nCREATE INDEX price_cents ON price (cents);",
            PRICE.replace("cents INTEGER NOT NULL)", "cents INTEGER NOT NULL, unit TEXT DEFAULT 'each')")
        ),
    );
    w.write(
        "hq.toml",
        &CONFIG.replace("SELECT sku, cents FROM price", "SELECT sku, cents, coalesce(unit, 'each') AS unit FROM price"),
    );
    let w = World::open(w.dir, w.clock);
    let r = w.publish().await;
    let east = &r.instances[&"price@zone-east".parse().unwrap()];
    assert_eq!(east.plan.as_ref().unwrap().to_string(), "delta: new contract, 1 rows changed");
    w.follow("0421", &mut register);
    assert_eq!(
        rows(register.connection(), "SELECT unit FROM price WHERE sku IN ('sku1', 'sku2') ORDER BY sku"),
        ["kg", "each"]
    );
    let m = w.manifest("0421").unwrap();
    assert_eq!(m.streams["price"].schema, 2);
    // A narrower contract needs the flag, and a full.
    w.write("catalog.sql", &CATALOG.replace("<= 20", "<= 30"));
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.instances[&"catalog@all".parse().unwrap()].code), (3, Some("REBUILD")));
    let r = w.publish_as(PublishOptions { allow_rebuild: true, ..options() }).await;
    assert_eq!(r.exit_code(), 0, "{:?}", r.lines());
    assert_eq!(r.instances[&"catalog@all".parse().unwrap()].packs[0].kind, PackKind::Full);
    w.follow("0421", &mut register);
    w.all_is_well();
}

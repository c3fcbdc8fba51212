//! Tables that go over from one stream to another, from headquarters to the register's file: readers have each table at
//! every moment, whatever comes late.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use tillcast_tests::{Site, digest};

const STORE: &str = "0421";
const REGISTER: &str = "0421-01";

/// The `[[stream]]` part with other streams in place of the catalog's.
fn with(site: &Site, others: &str) -> String {
    let streams = site.hq.streams();
    let catalog = streams.find("[[stream]]\nname = 'catalog'").unwrap();
    let end = streams.find("[[stream]]\nname = 'price'").unwrap();
    format!("{}{others}{}", &streams[..catalog], &streams[end..])
}

/// A stream of the tables, by the catalog's queries and contract.
fn stream(site: &Site, name: &str, tables: &[&str]) -> String {
    let schema = std::fs::read_to_string(site.hq.dir.join("schema/catalog.sql")).unwrap();
    let (item, barcode) = schema.split_at(schema.find("CREATE TABLE barcode").unwrap());
    let ddl: String = tables.iter().map(|t| if *t == "item" { item } else { barcode }).collect();
    std::fs::write(site.hq.dir.join(format!("schema/{name}.sql")), ddl).unwrap();
    let mut toml = format!("[[stream]]\nname = '{name}'\naudience = 'all'\nschema = 'schema/{name}.sql'\n");
    for table in tables {
        let columns = if *table == "item" { "sku, name, department, weight, note" } else { "code, sku" };
        toml += &format!("[[stream.table]]\nname = '{table}'\nquery = \"SELECT {columns} FROM {table}\"\n");
    }
    toml
}

fn site() -> Site {
    let site = Site::builder().stores(&[(STORE, "east")]).registers(1).items(200).build();
    site.publish();
    site.bring_down();
    site
}

/// What the register's file holds, by table.
fn held(site: &Site) -> BTreeMap<String, String> {
    digest::of_database(&site.store_db(REGISTER))
}

/// Takes a stream's head pack out of the bucket; gives where it lay and where it lies now.
fn hide(site: &Site, stream: &str) -> (PathBuf, PathBuf) {
    let (name, _) = site.head_pack(STORE, stream);
    let path = site.bucket().join(&name);
    let aside = site.dir().join("hidden.pack");
    std::fs::rename(&path, &aside).unwrap();
    (path, aside)
}

fn come_back((path, aside): (PathBuf, PathBuf)) {
    std::fs::rename(aside, path).unwrap();
}

/// A new row and another price of a word in each table of the catalog.
fn change(site: &Site) {
    site.sql(
        "UPDATE item SET name = 'changed' WHERE sku = 'SKU0000003'; INSERT INTO barcode VALUES ('999', 'SKU0000003')",
    );
}

#[test]
fn a_split_stream_is_read_on_until_each_part_is_there() {
    for late in ["goods", "codes"] {
        let mut site = site();
        let old = held(&site);
        let parts = stream(&site, "codes", &["barcode"]) + &stream(&site, "goods", &["item"]);
        site.hq.set_streams(&with(&site, &parts));
        change(&site);
        site.publish();
        let pack = hide(&site, late);
        for _ in 0..2 {
            site.relay(STORE).run(&["once"]).code(3);
            site.register(REGISTER).run(&["once"]);
            let (waits, came) = if late == "goods" { ("item", "barcode") } else { ("barcode", "item") };
            let now = held(&site);
            assert_eq!(now[waits], old[waits], "{late} is not there: its table is read on");
            assert_ne!(now[came], old[came], "{late}");
            // What is read on is no stream's for now, and nobody calls that damage.
            site.register(REGISTER).run(&["verify"]).ok();
        }
        come_back(pack);
        site.bring_down();
        assert_eq!(held(&site), site.expected(STORE));
        site.register(REGISTER).run(&["verify"]).ok();
        let index = "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'item_department'";
        assert_eq!(site.read(REGISTER, index).as_deref(), Some("1"));
    }
}

#[test]
fn a_table_changes_hands_whichever_pack_comes_late() {
    for late in ["catalog", "promo"] {
        let mut site = site();
        let old = held(&site);
        // Barcodes go from the catalog to the promotions: a full there, a small delta here.
        let catalog = stream(&site, "catalog", &["item"]);
        let streams = with(&site, &catalog);
        let promo = "[[stream.table]]\nname = 'promo'";
        let barcode = "[[stream.table]]\nname = 'barcode'\nquery = \"SELECT code, sku FROM barcode\"\n";
        site.hq.set_streams(&streams.replacen(promo, &format!("{barcode}{promo}"), 1));
        let path = site.hq.dir.join("schema/promo.sql");
        let ddl = std::fs::read_to_string(&path).unwrap();
        let table = "CREATE TABLE barcode (\n    code TEXT NOT NULL PRIMARY KEY,\n    sku TEXT NOT NULL\n) STRICT;\n";
        std::fs::write(&path, ddl + table).unwrap();
        change(&site);
        site.hq.run(&["publish"]).code(3).says(&["promo@zone-east", "--allow-rebuild"]);
        site.hq.run(&["publish", "--allow-rebuild"]).ok();
        let pack = hide(&site, late);
        // Three tries would make it bad.
        for _ in 0..4 {
            site.relay(STORE).run(&["once"]).code(3);
            site.register(REGISTER).run(&["once"]);
            assert_eq!(held(&site)["barcode"], old["barcode"], "{late}");
        }
        come_back(pack);
        site.bring_down();
        assert_eq!(held(&site), site.expected(STORE), "{late}");
        for node in [site.relay(STORE), site.register(REGISTER)] {
            assert!(!node.run(&["status"]).text().contains("PACK_IN_ERROR"));
        }
    }
}

#[test]
fn two_streams_exchange_their_tables() {
    let mut site = site();
    let parts = stream(&site, "codes", &["barcode"]) + &stream(&site, "goods", &["item"]);
    site.hq.set_streams(&with(&site, &parts));
    site.publish();
    site.bring_down();
    let old = held(&site);
    let streams = site.hq.streams().to_owned();
    let begin = streams.find("[[stream]]\nname = 'codes'").unwrap();
    let end = streams.find("[[stream]]\nname = 'price'").unwrap();
    let parts = stream(&site, "codes", &["item"]) + &stream(&site, "goods", &["barcode"]);
    site.hq.set_streams(&format!("{}{parts}{}", &streams[..begin], &streams[end..]));
    change(&site);
    site.hq.run(&["publish", "--allow-rebuild"]).ok();
    let pack = hide(&site, "goods");
    site.relay(STORE).run(&["once"]).code(3);
    site.register(REGISTER).run(&["once"]);
    let now = held(&site);
    assert_eq!(now["barcode"], old["barcode"], "read on");
    assert_ne!(now["item"], old["item"], "neither waits for the other");
    come_back(pack);
    site.bring_down();
    assert_eq!(held(&site), site.expected(STORE));
    assert_eq!(site.relay(STORE).digests(), site.expected(STORE));
    for node in [site.relay(STORE), site.register(REGISTER)] {
        node.run(&["verify"]).ok();
    }
}

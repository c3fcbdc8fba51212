//! docs/FORMAT.md lets a stranger write a reader: one in Python, of which nothing knows the product, verifies and
//! applies what headquarters published.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use tillcast_tests::{Site, digest, forge, process, repository, temp_dir, tools};

/// The reader's command on a site's bucket.
fn reader(site: &Site, store: &str, out: &Path) -> Command {
    let mut c = Command::new(tools().join("venv/bin/python"));
    c.arg(repository().join("tests/python/read_pack.py")).arg(site.bucket()).arg(store).arg(out);
    c.arg(forge::public(&site.signing_key("root")));
    c
}

fn read(site: &Site, store: &str) -> BTreeMap<String, String> {
    let dir = temp_dir("reader");
    let out = dir.path().join("out.db");
    let report: Value = serde_json::from_str(&process::succeed(&mut reader(site, store, &out))).unwrap();
    assert_eq!(report["serial"], site.manifest(store)["serial"]);
    digest::of_database(&out)
}

fn refuses(site: &Site, reason: &str) {
    let dir = temp_dir("reader");
    let out = reader(site, "0421", &dir.path().join("out.db")).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && text.contains(reason), "{text}");
}

#[test]
fn python_reads_fulls_deltas_and_a_migration() {
    let mut site = Site::small();
    site.publish();
    assert_eq!(read(&site, "0421"), site.expected("0421"));

    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku < 'SKU0000020'");
    site.sql("DELETE FROM item WHERE sku = 'SKU0000007'; UPDATE item SET name = 'Ünïcode \u{2028} \"x\"', weight = NULL WHERE sku = 'SKU0000008'");
    site.sql("INSERT INTO item VALUES ('NEW1', 'a new one', 3, 0.1, NULL); INSERT INTO staff VALUES ('0421', 9007199254740993, 'big', 'cashier')");
    site.publish();
    assert_eq!(site.manifest("0421")["streams"]["price"]["packs"].as_array().unwrap().len(), 2, "a full and a delta");
    for store in ["0421", "0815"] {
        assert_eq!(read(&site, store), site.expected(store));
    }

    let contract = site.hq.dir.join("schema/promo.sql");
    let ddl = std::fs::read_to_string(&contract)
        .unwrap()
        .replace("90)\n)", "90),\n    label TEXT NOT NULL DEFAULT 'promo'\n)");
    std::fs::write(&contract, ddl).unwrap();
    site.hq.set_streams(
        &site
            .hq
            .streams()
            .replace("percent FROM promo", "percent, CASE WHEN id % 2 THEN 'promo' ELSE sku END AS label FROM promo"),
    );
    site.publish();
    let (name, pack) = site.head_pack("0421", "promo");
    assert!(name.ends_with(".delta.pack") && forge::unpack(&pack)[0].contains("ALTER TABLE"), "{name}");
    let label = "SELECT id, sku, percent, CASE WHEN id % 2 THEN 'promo' ELSE sku END FROM promo WHERE zone = 'east'";
    assert_eq!(read(&site, "0421")["promo"], digest::of_query(&site.model(), label));
}

#[test]
fn python_refuses_what_was_not_signed_or_not_listed() {
    let site = Site::small();
    site.publish();
    let (name, pack) = site.head_pack("0421", "price");
    let mut bent = pack.clone();
    bent[pack.len() / 2] ^= 1;
    site.put_object(&name, &bent);
    refuses(&site, "not the listed pack");
    site.put_object(&name, &pack);
    read(&site, "0421");

    // A pack that lies about its rows, in a manifest that is well signed.
    let mut lines = forge::unpack(&pack);
    let header = lines[0].replace("\"version\":1", "\"version\":2");
    lines[0] = header;
    let row = lines.iter().position(|l| l.starts_with('[')).unwrap();
    lines[row] = lines[row].replace("\"SKU", "\"XKU");
    site.publish_forged("0421", "price", &forge::pack(&lines));
    refuses(&site, "the trailer says");

    let manifest = serde_json::to_vec(&site.manifest("0421")).unwrap();
    site.put_object("stores/0421/manifest.json", &forge::seal("manifest", &manifest, &[&forge::strange_key(1)]));
    refuses(&site, "needed signatures are good");
}

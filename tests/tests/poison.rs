//! Poisoned packs, listed in well signed manifests: refused by relay and register each for itself, kept in `error/`
//! with the reason, nothing of them applied; other streams go on, and the next publish finds the way round.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use tillcast_tests::{Nginx, Site, digest, forge};

/// One store whose one register reads the bucket from a static server: nobody looked at the packs before it.
struct Victims {
    site: Site,
    _bucket: Nginx,
}

impl Victims {
    fn new() -> Victims {
        let mut site = Site::builder().stores(&[("0421", "east"), ("0815", "west")]).registers(1).items(60).build();
        site.publish();
        let bucket = Nginx::serve(&site.bucket());
        let register = site.registers.get_mut("0421-01").unwrap();
        register.set_text("relay", &bucket.url());
        register.set("fallback", "[]");
        site.relay("0421").run(&["once"]).ok();
        site.register("0421-01").run(&["once"]).ok();
        site.assert_promised("0421-01");
        Victims { site, _bucket: bucket }
    }
}

trait Promise {
    fn assert_promised(&self, register: &str);
}
impl Promise for Site {
    /// The register's rows are those of the model.
    fn assert_promised(&self, register: &str) {
        assert_eq!(digest::of_database(&self.store_db(register)), self.expected(&register[..4]), "{register}");
    }
}

/// A delta in the making: good until somebody spoils it.
struct Pack {
    header: Value,
    lines: Vec<String>,
    trailer: Value,
}

impl Pack {
    /// The delta that gives one item another price, as headquarters would have made it.
    fn good(site: &Site) -> Pack {
        let (_, head) = site.head_pack("0421", "price");
        let mut header: Value = serde_json::from_str(&forge::unpack(&head)[0]).unwrap();
        let version = site.version("0421", "price");
        header["base"] = version.into();
        header["version"] = (version + 1).into();
        header["kind"] = "delta".into();
        let lines = vec![
            json!({"table": "price", "op": "update", "columns": ["sku", "price_cents"]}).to_string(),
            json!(["SKU0000001", 4242]).to_string(),
        ];
        let sql = "SELECT sku, CASE sku WHEN 'SKU0000001' THEN 4242 ELSE price_cents END, updated FROM price WHERE zone = 'east'";
        let trailer = json!({"rows": {"delete": 0, "update": 1, "insert": 0},
            "digests": {"price": digest::of_query(&site.model(), sql)}});
        Pack { header, lines, trailer }
    }

    fn all_lines(&self) -> Vec<String> {
        // A trailer begins with its rows.
        let trailer = format!("{{\"rows\":{},\"digests\":{}}}", self.trailer["rows"], self.trailer["digests"]);
        [vec![self.header.to_string()], self.lines.clone(), vec![trailer]].concat()
    }

    fn bytes(&self) -> Vec<u8> {
        forge::pack(&self.all_lines())
    }

    /// What a manifest would list of the good pack.
    fn entry(&self) -> Value {
        forge::entry(&self.bytes())
    }

    /// Another DDL under its right hash.
    fn with_ddl(mut self, ddl: &str) -> Pack {
        self.header["schema"]["ddl"] = ddl.into();
        self.header["schema"]["sha256"] = forge::sha256(ddl.as_bytes()).into();
        if let Some(tables) = forge::tables(ddl) {
            self.header["tables"] = tables;
        }
        self
    }
}

/// Puts the object, and lists it as `entry` says.
fn list(site: &Site, pack: &Pack, bytes: &[u8], entry: Value) {
    site.list_pack("0421", "price", bytes, entry, &pack.trailer.to_string());
}

/// `entry` of other bytes: their true length and hash.
fn of_bytes(mut entry: Value, bytes: &[u8]) -> Value {
    entry["bytes"] = bytes.len().into();
    entry["sha256"] = forge::sha256(bytes).into();
    entry
}

/// Spoils a delta that `spoil` puts into the bucket and lists; then asserts what must follow. `codes`: one of them is
/// the relay's reason.
#[track_caller]
fn refused(v: &Victims, what: &str, codes: &[&str], spoil: impl FnOnce(&Site, Pack)) {
    let site = &v.site;
    let old = site.expected("0421")["price"].clone();
    let was = site.version("0421", "price");
    // Another stream has news in the same manifest.
    site.sql("UPDATE staff SET name = name || '.' WHERE id = 3 AND store = '0421'");
    site.publish();
    spoil(site, Pack::good(site));

    let relay = site.relay("0421");
    let mut told = String::new();
    for _ in 0..3 {
        told += &relay.run(&["once"]).code(3).text();
    }
    let wanted = site.expected("0421");
    let status = relay.status();
    let price = &status["streams"]["price@zone-east"];
    assert_eq!(
        (&price["version"], &price["digests"]["price"]),
        (&was.into(), &old.clone().into()),
        "{what}: {status:#}"
    );
    let staff = &status["streams"]["staff@store-0421"]["digests"]["staff"];
    assert_eq!(staff, &wanted["staff"], "{what}: other streams go on");
    let name = format!("price@zone-east/{:010}.delta.pack", was + 1);
    let reason = relay.dir.join(format!("data/error/packs/{name}.reason.json"));
    let text = std::fs::read_to_string(&reason).unwrap_or_else(|e| panic!("{what}: {}: {e}: {told}", reason.display()));
    let reason: Value = serde_json::from_str(&text).unwrap();
    let code = reason["code"].as_str().unwrap_or_else(|| panic!("{what}: no code in {reason:#}"));
    assert!(codes.contains(&code), "{what}: {reason:#}");
    // Of what is longer than it may be, no end is known.
    let kept = relay.dir.join("data/error/packs").join(&name).exists();
    assert!(kept || code == "TOO_LONG", "{what}: kept to be looked at");
    assert!(!relay.dir.join("data/ok/packs").join(&name).exists(), "{what}: never served");
    let errors = status["errors"].to_string();
    assert!(errors.contains("PACK_IN_ERROR") && errors.contains(&name), "{what}: {errors}");
    relay.run(&["verify"]).ok();

    let register = site.register("0421-01");
    // Where several streams move, a contract that does not fit may have to wait for another's table to go: the
    // second cycle knows.
    register.run(&["once"]).code(3);
    let out = register.run(&["once", "--json"]);
    assert_eq!(out.code, Some(3), "{what}: {}", out.text());
    let errors = out.json()["errors"].to_string();
    assert!(errors.contains("price@zone-east"), "{what}: the register says so: {errors}");
    let rows = digest::of_database(&site.store_db("0421-01"));
    assert_eq!(rows["price"], old, "{what}: nothing is applied");
    assert_eq!(rows["staff"], wanted["staff"], "{what}: other streams go on");

    heal(site);
    assert!(site.version("0421", "price") > was + 1, "{what}: the number is taken");
    relay.run(&["once"]).ok();
    register.run(&["once"]).ok();
    assert_eq!(relay.digests(), site.expected("0421"), "{what}");
    site.assert_promised("0421-01");
}

/// What headquarters says next. The forger took the serial of it: it stops, and goes on above that when run again.
fn heal(site: &Site) {
    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000009'");
    site.hq.run(&["publish"]).code(1).says(&["signed by our key"]);
    site.publish();
}

#[test]
fn the_forged_delta_is_good_unless_it_is_spoilt() {
    let v = Victims::new();
    let pack = Pack::good(&v.site);
    list(&v.site, &pack, &pack.bytes(), pack.entry());
    v.site.relay("0421").run(&["once"]).ok();
    v.site.register("0421-01").run(&["once"]).ok();
    let price = "SELECT price_cents FROM price WHERE sku = 'SKU0000001'";
    assert_eq!(v.site.read("0421-01", price).as_deref(), Some("4242"));
    assert_eq!(v.site.relay("0421").digests()["price"], pack.trailer["digests"]["price"].as_str().unwrap());
}

#[test]
fn files_that_are_not_the_listed_ones() {
    let v = Victims::new();
    refused(&v, "truncated", &["TOO_SHORT", "WRONG_HASH"], |site, pack| {
        let bytes = pack.bytes();
        list(site, &pack, &bytes[..bytes.len() / 2], pack.entry());
    });
    refused(&v, "a bit flipped", &["WRONG_HASH"], |site, pack| {
        let mut bytes = pack.bytes();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        list(site, &pack, &bytes, pack.entry());
    });
    refused(&v, "longer than declared", &["TOO_LONG"], |site, pack| {
        let bytes = [pack.bytes(), b"more".to_vec()].concat();
        list(site, &pack, &bytes, pack.entry());
    });
    refused(&v, "wrong length declared", &["TOO_SHORT", "WRONG_HASH"], |site, pack| {
        let mut entry = pack.entry();
        entry["bytes"] = (entry["bytes"].as_u64().unwrap() + 7).into();
        entry["sha256"] = forge::sha256(b"another").into();
        list(site, &pack, &pack.bytes(), entry);
    });
    refused(&v, "empty", &["TOO_SHORT", "WRONG_HASH"], |site, pack| list(site, &pack, b"", pack.entry()));
}

#[test]
fn streams_of_bytes_that_are_no_whole_pack() {
    let v = Victims::new();
    refused(&v, "gzip cut off", &["NOT_GZIP", "TRUNCATED"], |site, pack| {
        let whole = pack.bytes();
        let bytes = &whole[..whole.len() - 20];
        list(site, &pack, bytes, of_bytes(pack.entry(), bytes));
    });
    refused(&v, "no gzip", &["NOT_GZIP"], |site, pack| {
        let bytes = pack.all_lines().join("\n").into_bytes();
        list(site, &pack, &bytes, of_bytes(pack.entry(), &bytes));
    });
    // A bit of the checksum at the end: what a bit of the rows becomes is chance (each is tried in proto's pack tests).
    refused(&v, "a bit flipped and listed", &["NOT_GZIP"], |site, pack| {
        let mut bytes = pack.bytes();
        let checksum = bytes.len() - 8;
        bytes[checksum] ^= 1;
        list(site, &pack, &bytes, of_bytes(pack.entry(), &bytes));
    });
    refused(&v, "no trailer", &["TRUNCATED"], |site, pack| {
        let mut lines = pack.all_lines();
        lines.pop();
        let bytes = forge::pack(&lines);
        list(site, &pack, &bytes, forge::entry(&bytes));
    });
    refused(&v, "garbage after the end", &["TRAILING_GARBAGE"], |site, pack| {
        let bytes = [pack.bytes(), b"garbage".to_vec()].concat();
        list(site, &pack, &bytes, of_bytes(pack.entry(), &bytes));
    });
    refused(&v, "a second gzip member", &["TRAILING_GARBAGE", "TOO_MUCH"], |site, pack| {
        let bytes = [pack.bytes(), forge::pack(&["[\"SKU0000002\",1]"])].concat();
        list(site, &pack, &bytes, of_bytes(pack.entry(), &bytes));
    });
    refused(&v, "lines after the trailer", &["TRAILING_GARBAGE"], |site, pack| {
        let mut lines = pack.all_lines();
        lines.push("[\"SKU0000002\",1]".into());
        let bytes = forge::pack(&lines);
        list(site, &pack, &bytes, forge::entry(&bytes));
    });
    refused(&v, "more unpacked than declared", &["TOO_MUCH"], |site, pack| {
        let mut entry = pack.entry();
        entry["unpacked"] = (entry["unpacked"].as_u64().unwrap() - 1).into();
        list(site, &pack, &pack.bytes(), entry);
    });
    refused(&v, "a gzip bomb that lies", &["TOO_MUCH"], |site, mut pack| {
        let unpacked = pack.entry()["unpacked"].clone();
        pack.lines[1] = format!("[\"SKU0000001\",{}4242]", " ".repeat(64 << 20));
        let bytes = pack.bytes();
        let mut entry = forge::entry(&bytes);
        entry["unpacked"] = unpacked;
        list(site, &pack, &bytes, entry);
    });
}

#[test]
fn packs_that_are_not_what_their_place_says() {
    let v = Victims::new();
    let listed_as_good = |site: &Site, pack: &Pack, entry: Value| {
        let bytes = pack.bytes();
        let mut entry = of_bytes(entry, &bytes);
        entry["unpacked"] = forge::entry(&bytes)["unpacked"].clone();
        list(site, pack, &bytes, entry);
    };
    for (what, codes, field, value) in [
        ("wrong base", &["OTHER_PACK"][..], "base", json!(999)),
        ("wrong version", &["OTHER_PACK"], "version", json!(999)),
        ("other audience", &["OTHER_PACK"], "audience", json!("zone-west")),
        ("other stream", &["OTHER_PACK"], "stream", json!("staff")),
        ("unknown format", &["UNKNOWN_FORMAT"], "format", json!(2)),
        ("a path in the stream", &["BAD_LINE"], "stream", json!("../../etc")),
        ("SQL in the audience", &["BAD_LINE"], "audience", json!("zone-east'; DROP TABLE price; --")),
        ("a negative version", &["BAD_LINE"], "version", json!(-1)),
        ("a kind that is none", &["BAD_LINE"], "kind", json!("patch")),
    ] {
        refused(&v, what, codes, |site, mut pack| {
            let entry = pack.entry();
            pack.header[field] = value;
            listed_as_good(site, &pack, entry);
        });
    }
}

#[test]
fn hostile_contracts() {
    let v = Victims::new();
    let real: Value = Pack::good(&v.site).header["tables"].clone();
    assert_eq!(forge::tables(tillcast_tests::site::DDL[1].1), Some(real), "headers are forged as they should be");
    let good = "CREATE TABLE price (\n    sku TEXT NOT NULL PRIMARY KEY,\n    price_cents INTEGER NOT NULL CHECK (price_cents BETWEEN 0 AND 9999999),\n    updated TEXT NOT NULL\n) STRICT;\n";
    let codes = ["BAD_SCHEMA"];
    for ddl in [
        format!("{good}CREATE TRIGGER t AFTER INSERT ON price BEGIN DELETE FROM item; END;"),
        format!("{good}ATTACH DATABASE '/tmp/tillcast-poison.db' AS x;"),
        format!("{good}PRAGMA journal_mode = DELETE;"),
        format!("{good}CREATE VIEW v AS SELECT * FROM staff;"),
        format!("{good}DROP TABLE item;"),
        format!("{good}CREATE VIRTUAL TABLE f USING fts5(x);"),
        format!("{good}CREATE TABLE tillcast_stream (a INTEGER PRIMARY KEY) STRICT;"),
        format!("{good}CREATE TABLE item (a INTEGER PRIMARY KEY) STRICT;"),
        format!("{good}CREATE TABLE \"x\"\"; DROP TABLE item; --\" (a INTEGER PRIMARY KEY) STRICT;"),
        format!("{good}CREATE INDEX i ON staff (name);"),
        good.replace("BETWEEN 0 AND 9999999", "= load_extension('/tmp/x.so')"),
        good.replace("BETWEEN 0 AND 9999999", "> (SELECT count(*) FROM staff)"),
        good.replace("BETWEEN 0 AND 9999999", "> random()"),
        "CREATE TABLE price AS SELECT * FROM staff;".into(),
        String::new(),
    ] {
        refused(&v, &ddl, &codes, |site, pack| {
            let pack = pack.with_ddl(&ddl);
            let bytes = pack.bytes();
            list(site, &pack, &bytes, forge::entry(&bytes));
        });
    }
    for migrate in
        ["ATTACH DATABASE '/tmp/tillcast-poison.db' AS x", "DELETE FROM staff", "ALTER TABLE price ADD COLUMN x TEXT"]
    {
        refused(&v, migrate, &codes, |site, mut pack| {
            pack.header["schema"]["migrate"] = json!([migrate]);
            let bytes = pack.bytes();
            list(site, &pack, &bytes, forge::entry(&bytes));
        });
    }
    assert!(!std::path::Path::new("/tmp/tillcast-poison.db").exists());
}

#[test]
fn rows_that_do_not_fit() {
    let v = Victims::new();
    let section = |op: &str, columns: &[&str]| json!({"table": "price", "op": op, "columns": columns}).to_string();
    let all = ["sku", "price_cents", "updated"];
    let cases: BTreeMap<&str, (Vec<String>, [u64; 3])> = BTreeMap::from([
        ("a row that is not there", (vec![section("update", &all[..2]), json!(["NONE", 1]).to_string()], [0, 1, 0])),
        ("deletes one that is not there", (vec![section("delete", &all[..1]), json!(["NONE"]).to_string()], [1, 0, 0])),
        ("a row that is there", (vec![section("insert", &all), json!(["SKU0000001", 1, "x"]).to_string()], [0, 0, 1])),
        ("breaks a CHECK", (vec![section("update", &all[..2]), json!(["SKU0000001", -1]).to_string()], [0, 1, 0])),
        ("another type", (vec![section("update", &all[..2]), json!(["SKU0000001", "1"]).to_string()], [0, 1, 0])),
        ("NULL", (vec![section("update", &all[..2]), json!(["SKU0000001", null]).to_string()], [0, 1, 0])),
        ("too few values", (vec![section("update", &all[..2]), json!(["SKU0000001"]).to_string()], [0, 1, 0])),
        ("too many values", (vec![section("update", &all[..2]), json!(["SKU0000001", 1, 2]).to_string()], [0, 1, 0])),
        ("nested", (vec![section("update", &all[..2]), json!(["SKU0000001", [[[[1]]]]]).to_string()], [0, 1, 0])),
        ("no section", (vec![json!(["SKU0000001", 1]).to_string()], [0, 1, 0])),
        ("other counts", (vec![section("update", &all[..2]), json!(["SKU0000001", 4242]).to_string()], [0, 2, 0])),
        ("another digest", (vec![section("update", &all[..2]), json!(["SKU0000001", 4241]).to_string()], [0, 1, 0])),
        (
            "another stream's table",
            (vec![section("update", &all[..2]).replace("price\"", "staff\""), json!([1, 1]).to_string()], [0, 1, 0]),
        ),
        (
            "SQL in the table",
            (
                vec![json!({"table": "price\"; DROP TABLE item; --", "op": "delete", "columns": ["sku"]}).to_string()],
                [0; 3],
            ),
        ),
        (
            "SQL in a column",
            (
                vec![section("update", &["sku", "price_cents\" = 1; --"]), json!(["SKU0000001", 1]).to_string()],
                [0, 1, 0],
            ),
        ),
    ]);
    for (what, (lines, [delete, update, insert])) in cases {
        refused(&v, what, &["BAD_LINE", "BAD_ROW", "ROW", "DIGEST", "BAD_DIGEST"], |site, mut pack| {
            pack.lines.clone_from(&lines);
            pack.trailer["rows"] = json!({"delete": delete, "update": update, "insert": insert});
            let bytes = pack.bytes();
            list(site, &pack, &bytes, forge::entry(&bytes));
        });
    }
}

#[test]
fn a_manifest_whose_list_is_hostile_is_refused_as_a_whole_and_the_last_one_stays() {
    let v = Victims::new();
    let site = &v.site;
    let before = site.object("stores/0421/manifest.json").unwrap();
    let expected = site.expected("0421");
    let price = |m: &mut Value| m["streams"]["price"].take();
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 2] =
        [("an unknown format", |m| m["format"] = 2.into()), ("a negative serial", |m| m["serial"] = (-1).into())];
    let hostile_stream = |m: &mut Value| {
        let entry = price(m);
        m["streams"].as_object_mut().unwrap().remove("price");
        m["streams"]["price'; --"] = entry;
    };
    let all = changes.iter().map(|(what, change)| (*what, Box::new(change) as Box<dyn Fn(&mut Value)>));
    for (what, change) in all.chain([("SQL in a stream", Box::new(hostile_stream) as Box<dyn Fn(&mut Value)>)]) {
        site.resign("0421", &change);
        let relay = site.relay("0421");
        let out = relay.run(&["once", "--json"]);
        assert_ne!(out.code, Some(0), "{what}: {}", out.text());
        assert!(out.json()["status"]["errors"].to_string().contains("REFUSED"), "{what}: {}", out.text());
        let register = site.register("0421-01");
        assert_ne!(register.run(&["once"]).code, Some(0), "{what}");
        assert!(register.status()["errors"].to_string().contains("REFUSED"), "{what}: {:#}", register.status());
        assert_eq!(relay.digests(), expected, "{what}");
        assert_eq!(digest::of_database(&site.store_db("0421-01")), expected, "{what}");
        site.put_object("stores/0421/manifest.json", &before);
    }
    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000009'");
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    site.register("0421-01").run(&["once"]).ok();
    assert_eq!(site.relay("0421").digests(), site.expected("0421"));
    site.assert_promised("0421-01");
}

#[test]
fn a_hostile_entry_of_a_list_stops_its_own_stream_alone() {
    let v = Victims::new();
    let site = &v.site;
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 6] = [
        ("an honest gzip bomb", |p| p["packs"][0]["unpacked"] = (1u64 << 34).into()),
        ("a pack beyond the version", |p| p["packs"][0]["version"] = 99.into()),
        ("no way to the version", |p| p["version"] = 99.into()),
        ("a negative length", |p| p["packs"][0]["bytes"] = (-1).into()),
        ("a path in the audience", |p| p["audience"] = "../../etc".into()),
        ("no entry at all", |p| *p = Value::Null),
    ];
    for (what, change) in changes {
        let good = site.manifest("0421")["streams"]["price"].clone();
        let expected = site.expected("0421");
        site.resign("0421", |m| change(&mut m["streams"]["price"]));
        for node in [site.relay("0421"), site.register("0421-01")] {
            node.run(&["once"]).code(3);
            let status = node.status();
            assert_eq!(status["errors"][0]["code"], "STREAM_REFUSED", "{what}: {status:#}");
            assert_eq!(status["streams"]["price@zone-east"]["state"], "error", "{what}: {status:#}");
            assert_eq!(status["serial"], site.manifest("0421")["serial"], "{what}");
        }
        assert_eq!(site.relay("0421").digests(), expected, "{what}");
        assert_eq!(digest::of_database(&site.store_db("0421-01")), expected, "{what}");
        site.resign("0421", |m| m["streams"]["price"] = good);
        for node in [site.relay("0421"), site.register("0421-01")] {
            node.run(&["once"]).ok();
            assert_eq!(node.status()["errors"], json!([]), "{what}");
        }
    }
}

//! Rows that somebody changed or lost by hand: found at the next touching delta and by `verify`, told, healed by a
//! full.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use rusqlite::Connection;
use serde_json::json;
use std::path::{Path, PathBuf};
use tillcast_tests::{PATIENCE, Site, digest, until};

fn site() -> Site {
    let site = Site::builder().stores(&[("0421", "east"), ("0815", "west")]).registers(1).items(60).build();
    site.publish();
    site.bring_down();
    site.assert_all_proven();
    site
}

/// What no program of ours does: writes into a replica.
fn by_hand(database: &Path, sql: &str) {
    let db = Connection::open(database).unwrap();
    db.busy_timeout(PATIENCE).unwrap();
    assert!(db.execute(sql, []).unwrap() > 0, "{sql}");
}

fn shadow(site: &Site) -> PathBuf {
    site.relay("0421").dir.join("data/shadow.db")
}

const DAMAGE: [(&str, &str); 4] = [
    ("changed", "UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000005'"),
    ("lost", "DELETE FROM price WHERE sku = 'SKU0000005'"),
    ("added", "INSERT INTO price VALUES ('SKU0000005x', 5, 'x')"),
    ("retyped", "UPDATE price SET updated = updated || ' ' WHERE sku = 'SKU0000005'"),
];

/// A change of the row that was damaged, or of one beside it.
fn touch(site: &Site, what: &str) {
    let sku = if what == "added" { "SKU0000005x" } else { "SKU0000005" };
    if what == "added" {
        site.sql(&format!("INSERT INTO price VALUES ('east', '{sku}', 7, 'y')"));
    } else {
        site.sql(&format!("UPDATE price SET price_cents = price_cents + 1, updated = 'now' WHERE sku = '{sku}'"));
    }
    site.publish();
}

#[test]
fn a_register_finds_drift_at_the_next_touching_delta_and_heals_by_a_full() {
    let site = site();
    for (what, sql) in DAMAGE {
        by_hand(&site.store_db("0421-01"), sql);
        touch(&site, what);
        site.relay("0421").run(&["once"]).ok();
        let out = site.with_relays(|| site.register("0421-01").run(&["once"]));
        assert!(out.text().contains("heal") || out.text().contains("drift"), "{what}: it says so: {}", out.text());
        site.with_relays(|| site.register("0421-01").run(&["once"])).ok();
        site.assert_proven("0421");
        site.register("0421-01").run(&["verify"]).ok();
        site.sql("DELETE FROM price WHERE sku = 'SKU0000005x'");
        site.publish();
        site.bring_down();
        site.assert_proven("0421");
    }
}

#[test]
fn verify_finds_drift_from_the_rows_and_the_next_cycle_heals_it() {
    let site = site();
    for (what, sql) in DAMAGE {
        by_hand(&site.store_db("0421-01"), sql);
        let out = site.register("0421-01").run(&["verify", "--json"]).code(1);
        assert!(out.text().contains("price"), "{what}: {}", out.text());
        let status = site.register("0421-01").status();
        assert_eq!(status["streams"]["price@zone-east"]["state"], "drift", "{what}: {status:#}");
        assert!(status["errors"].to_string().contains("DRIFT"), "{what}: {status:#}");
        assert_eq!(status["streams"]["staff@store-0421"]["state"], "ok", "{what}: {status:#}");
        // Nothing was published; the full is at the relay.
        site.with_relays(|| site.register("0421-01").run(&["once"]));
        site.register("0421-01").run(&["verify"]).ok();
        site.assert_proven("0421");
        assert_eq!(site.register("0421-01").status()["streams"]["price@zone-east"]["state"], "ok", "{what}");
    }
}

#[test]
fn a_delta_elsewhere_in_the_table_finds_drift_by_verify_only_and_loses_nothing() {
    let site = site();
    by_hand(&site.store_db("0421-01"), DAMAGE[0].1);
    site.sql("UPDATE price SET price_cents = 77 WHERE sku = 'SKU0000009'; UPDATE staff SET name = 'x' WHERE id = 1");
    site.publish();
    site.bring_down();
    site.register("0421-01").run(&["verify"]).code(1);
    site.with_relays(|| site.register("0421-01").run(&["once"]));
    site.register("0421-01").run(&["verify"]).ok();
    site.assert_all_proven();
}

#[test]
fn a_running_register_heals_what_verify_finds() {
    let site = site();
    let relay = site.relay("0421").start_ready();
    let register = site.register("0421-01").start_ready();
    until(PATIENCE, "the rows were checked", || site.register("0421-01").has_checked_rows());
    by_hand(&site.store_db("0421-01"), DAMAGE[1].1);
    site.register("0421-01").run(&["verify"]).code(1);
    until(PATIENCE, "the row is back", || {
        site.try_read("0421-01", "SELECT count(*) FROM price").ok().flatten().as_deref() == Some("60")
    });
    until(PATIENCE, "verify is content", || site.register("0421-01").run(&["verify"]).code == Some(0));
    site.assert_proven("0421");
    [register, relay].into_iter().for_each(tillcast_tests::Daemon::term);
}

#[test]
fn the_relays_shadow_finds_drift_too_and_blames_no_pack() {
    let site = site();
    let relay = site.relay("0421");
    for (what, sql) in DAMAGE {
        by_hand(&shadow(&site), sql);
        touch(&site, what);
        relay.run(&["once"]);
        relay.run(&["once"]).ok();
        let status = relay.status();
        assert!(!status["errors"].to_string().contains("PACK_IN_ERROR"), "{what}: {status:#}");
        assert_eq!(relay.digests(), site.expected("0421"), "{what}");
        relay.run(&["verify"]).ok();
        site.sql("DELETE FROM price WHERE sku = 'SKU0000005x'");
        site.publish();
        relay.run(&["once"]).ok();
    }
    // By verify alone.
    by_hand(&shadow(&site), DAMAGE[1].1);
    relay.run(&["verify"]).code(1).says(&["price"]);
    relay.run(&["once"]);
    relay.run(&["verify"]).ok();
    site.bring_down();
    site.assert_proven("0421");
}

/// 1 for what is not what was published, 3 for what nobody can say that of; programs are told which.
#[test]
fn verify_ends_by_what_it_found() {
    let mut site = site();
    site.hq.run(&["verify"]).ok();
    let (pack, bytes) = site.head_pack("0421", "price");
    std::fs::remove_file(site.bucket().join(&pack)).unwrap();
    site.hq.run(&["verify"]).code(1).says(&["price@zone-east 1: WRONG", &pack, "is missing in the bucket"]);
    let problems = |site: &Site| {
        let told = site.hq.run(&["verify", "--json"]).code(1).json();
        assert_eq!(told["instances"]["catalog@all"]["problems"], json!([]), "{told:#}");
        told["instances"]["price@zone-east"]["problems"].to_string()
    };
    assert!(problems(&site).contains(&format!("{pack} is missing in the bucket")), "{}", problems(&site));
    site.put_object(&pack, &bytes);
    site.hq.run(&["verify"]).ok();
    by_hand(&site.hq.dir.join("state/replicas/price@zone-east.db"), DAMAGE[0].1);
    assert!(problems(&site).contains("table price: its rows drifted"), "{}", problems(&site));
    // Contracts of two tables are over the limits now.
    let register = site.registers.get_mut("0421-01").unwrap();
    register.set("limits.tables", "1");
    register.run(&["verify"]).code(3).says(&["catalog@all", "NOT CHECKED", "limits.tables"]);
    let told = register.run(&["verify", "--json"]).code(3).json();
    let (price, catalog) = (&told["streams"]["price@zone-east"], &told["streams"]["catalog@all"]);
    assert!(told["drift"] == false && price["ok"] == true && catalog["ok"] == false, "{told:#}");
    assert!(catalog["unread"].as_str().is_some_and(|why| why.contains("limits.tables")), "{told:#}");
    // What is wrong elsewhere is worse.
    by_hand(&site.store_db("0421-01"), DAMAGE[0].1);
    let told = site.register("0421-01").run(&["verify", "--json"]).code(1).json();
    assert!(told["drift"] == true && told["streams"]["price@zone-east"]["ok"] == false, "{told:#}");
}

#[test]
fn drift_is_told_to_headquarters_which_publishes_a_full() {
    let site = Site::builder().registers(1).items(60).hq_service().build();
    site.publish();
    site.bring_down();
    let hq = site.hq.start_ready();
    let relay = site.relay("0421").start_ready();
    let register = site.register("0421-01").start_ready();
    until(PATIENCE, "the rows were checked", || site.register("0421-01").has_checked_rows());
    by_hand(&site.store_db("0421-01"), DAMAGE[0].1);
    site.register("0421-01").run(&["verify"]).code(1);
    until(PATIENCE, "the next publish of the stream is a full", || {
        site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000009'");
        site.publish();
        let manifest = site.manifest("0421");
        let packs = manifest["streams"]["price"]["packs"].as_array().unwrap();
        packs.iter().any(|p| p["kind"] == "full" && p["version"].as_u64() > Some(1))
    });
    until(PATIENCE, "the register is right", || {
        digest::of_database(&site.store_db("0421-01")) == site.expected("0421")
    });
    [register, relay, hq].into_iter().for_each(tillcast_tests::Daemon::term);
}

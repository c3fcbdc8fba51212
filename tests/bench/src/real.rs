//! Real data through all tiers: rows, bytes, times; and the digest, which must be that of a script that knows the
//! source file alone.

use crate::Options;
use crate::measure::Results;
use std::fmt::Write as _;
use std::time::Instant;
use tillcast_tests::real_data::{self, PRICE_STORES, PROMOS, SNAPSHOTS};
use tillcast_tests::{Site, digest};

/// The item master's snapshots, a promotion stream's days, four stores' price lists.
pub fn real(_: &Options, results: &mut Results) {
    let Some(data) = real_data::folder() else {
        results.table("Real data: none (TILLCAST_TEST_DATA names its folder), nothing measured.".into());
        return;
    };
    let mut table = String::from(
        "| real data | rows | pack | bytes | a row | publish | relay | register | digest everywhere |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let site = real_data::items_and_promotions();
    for (n, name) in PROMOS.iter().enumerate() {
        real_data::load_promos(&site, &data, name);
        step(
            &site,
            &format!("il-promos {name}"),
            &[("0204", "promo", "promotion", real_data::promo_digest(&data, n + 1))],
            &mut table,
        );
    }
    for name in SNAPSHOTS {
        real_data::load_snapshot(&site, &data, name);
        step(
            &site,
            &format!("off-products {name}"),
            &[("0204", "catalog", "product", real_data::snapshot_digest(&data, name))],
            &mut table,
        );
    }
    let site = real_data::shelf_prices(&data);
    let stores: Vec<_> =
        PRICE_STORES.iter().map(|s| (*s, "price", "shelf_price", real_data::price_digest(&data, s))).collect();
    step(&site, "konzum-hr", &stores, &mut table);
    results.table(table);
}

/// Publishes, brings it down tier by tier, and proves it: store, stream, table and digest each.
fn step(site: &Site, what: &str, wanted: &[(&str, &str, &str, String)], table: &mut String) {
    let seconds = |f: &dyn Fn()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let published = seconds(&|| drop(site.publish()));
    for (n, (store, stream, name, wanted)) in wanted.iter().enumerate() {
        let relayed = seconds(&|| drop(site.relay(store).run(&["once"]).ok()));
        let register = format!("{store}-01");
        let daemon = site.relay(store).start_ready();
        let applied = seconds(&|| drop(site.register(&register).run(&["once"]).ok()));
        daemon.term();
        let rows = digest::of_database(&site.store_db(&register))[*name].clone();
        let all = [
            &site.promised(store)[*name],
            &site.relay(store).digests()[*name],
            &site.register(&register).digests()[*name],
            &rows,
        ]
        .map(String::clone);
        assert!(all.iter().all(|d| d == wanted), "{what} at {store}: {all:?}, the script says {wanted}");
        let count = site.read(&register, &format!("SELECT count(*) FROM {name}")).unwrap();
        let (pack, bytes) = site.head_pack(store, stream);
        let kind = if pack.ends_with("full.pack") { "full" } else { "delta" };
        let changed = changed_rows(&bytes);
        let publish = if n == 0 { format!("{published:.2} s") } else { "the same run".into() };
        let each = bytes.len() as f64 / changed as f64;
        let store = if wanted.is_empty() || what != "konzum-hr" { String::new() } else { format!(" {store}") };
        let bytes = bytes.len();
        writeln!(table, "| {what}{store} | {count} | {kind} of {changed} | {bytes} | {each:.1} | {publish} | {relayed:.2} s | {applied:.2} s | `{}…` |", &all[0][..12]).unwrap();
    }
}

/// The rows that a pack's trailer counts.
fn changed_rows(pack: &[u8]) -> u64 {
    let lines = tillcast_tests::forge::unpack(pack);
    let trailer: serde_json::Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    trailer["rows"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum()
}

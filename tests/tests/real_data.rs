//! Real item masters, promotions and price lists, as a chain would publish them: after each step headquarters, relay
//! and register have the digest that a script computes from the source file alone. Says so where the data is absent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::path::PathBuf;
use tillcast_tests::real_data::{self, PRICE_STORES, PROMOS, SNAPSHOTS};
use tillcast_tests::{Site, digest};

fn data() -> Option<PathBuf> {
    let found = real_data::folder();
    if found.is_none() {
        eprintln!("SKIPPED: no real data (TILLCAST_TEST_DATA names its folder)");
    }
    found
}

/// One digest at all tiers: promised by the manifest, reported by relay and register, and of the register's rows.
#[track_caller]
fn proven(site: &Site, store: &str, table: &str, wanted: &str) {
    let register = format!("{store}-01");
    let rows = digest::of_database(&site.store_db(&register))[table].clone();
    let found = [
        site.promised(store)[table].clone(),
        site.relay(store).digests()[table].clone(),
        site.register(&register).digests()[table].clone(),
        rows,
    ];
    assert_eq!(found, [wanted, wanted, wanted, wanted], "store {store}, table {table}");
}

#[test]
fn three_item_masters_and_five_days_of_promotions() {
    let Some(data) = data() else { return };
    let site = real_data::items_and_promotions();
    for (n, promos) in PROMOS.iter().enumerate() {
        real_data::load_promos(&site, &data, promos);
        if let Some(snapshot) = SNAPSHOTS.get(n) {
            real_data::load_snapshot(&site, &data, snapshot);
        }
        site.publish();
        site.bring_down();
        proven(&site, "0204", "promotion", &real_data::promo_digest(&data, n + 1));
        if let Some(snapshot) = SNAPSHOTS.get(n) {
            proven(&site, "0204", "product", &real_data::snapshot_digest(&data, snapshot));
        }
    }
    // A week apart is a delta's work, a year apart too: no full was needed but the first.
    assert_eq!(site.version("0204", "catalog"), 3);
    assert_eq!(site.version("0204", "promo"), 5);
}

#[test]
fn four_stores_with_prices_of_their_own() {
    let Some(data) = data() else { return };
    let site = real_data::shelf_prices(&data);
    site.publish();
    site.bring_down();
    for store in PRICE_STORES {
        proven(&site, store, "shelf_price", &real_data::price_digest(&data, store));
    }
}

//! Real retail data, beside the repository: how each set is mapped to a stream, and its digest from the files alone.
//!
//! The mapping is what a user would write: the source keeps the files' rows as they are (all text), the queries of
//! hq.toml decide. Item master: a barcode that stands there twice counts once, the row read last wins. Prices: cents
//! from a decimal text, rounded (one has three decimals); an empty price is NULL, the special price stands in its own
//! column. Promotions: the four columns that tell them apart are the key; amounts stay text (some are masked as `*`).

use crate::site::Site;
use crate::{process, repository, tools};
use rusqlite::{Connection, params_from_iter};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the data sets: `TILLCAST_TEST_DATA` (none where it is empty), or `shared/data` beside the repository, if
/// it is there.
#[track_caller]
pub fn folder() -> Option<PathBuf> {
    named(std::env::var_os("TILLCAST_TEST_DATA"))
}

/// Who names a folder wants it read: one that is not there is no reason to go without.
#[track_caller]
fn named(folder: Option<OsString>) -> Option<PathBuf> {
    let Some(folder) = folder.map(PathBuf::from) else {
        return Some(repository().parent()?.join("shared/data")).filter(|folder| folder.is_dir());
    };
    let is_none = folder.as_os_str().is_empty();
    assert!(is_none || folder.is_dir(), "TILLCAST_TEST_DATA: there is no folder {}", folder.display());
    (!is_none).then_some(folder)
}

/// The stores whose price lists there are.
pub const PRICE_STORES: [&str; 4] = ["0204", "0530", "0901", "1601"];

/// The item master's snapshots, in order of time.
pub const SNAPSHOTS: [&str; 3] = ["products-2018-06-24.csv", "products-2018-07-01.csv", "products-2019-06-14.csv"];

/// The promotions' base and its deltas, in order of time.
pub const PROMOS: [&str; 5] = [
    "base-2026-08-16.csv",
    "delta-2026-08-17.csv",
    "delta-2026-08-18.csv",
    "delta-2026-08-19.csv",
    "delta-2026-08-20.csv",
];

/// The item master as a stream for all.
pub const ITEM_DDL: &str = "CREATE TABLE product (
    barcode TEXT PRIMARY KEY CHECK (length(barcode) <= 45),
    name TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    is_healthy INTEGER NOT NULL CHECK (is_healthy IN (0, 1))
) STRICT;
CREATE INDEX product_name ON product (name);
";
const ITEM_STREAM: &str = r#"
[[stream]]
name = "catalog"
audience = "all"
schema = "schema/catalog.sql"
[[stream.table]]
name = "product"
query = """SELECT barcode, name, CAST(is_healthy AS INTEGER) AS is_healthy FROM off_product
           WHERE rowid IN (SELECT max(rowid) FROM off_product GROUP BY barcode)"""
"#;

/// Promotions as a stream for all.
pub const PROMO_DDL: &str = "CREATE TABLE promotion (
    chain_id TEXT NOT NULL, store_id TEXT NOT NULL, barcode TEXT NOT NULL, promo_id TEXT NOT NULL,
    description TEXT NOT NULL CHECK (length(description) <= 60), valid_to TEXT NOT NULL, min_qty TEXT,
    promo_price TEXT, discount_rate TEXT, club INTEGER, coupon INTEGER, reward_type TEXT,
    PRIMARY KEY (chain_id, store_id, barcode, promo_id)
) STRICT, WITHOUT ROWID;
";
const PROMO_STREAM: &str = r#"
[[stream]]
name = "promo"
audience = "all"
schema = "schema/promo.sql"
[[stream.table]]
name = "promotion"
query = """SELECT chain_id, store_id, barcode, promo_id, description, valid_to, nullif(min_qty, '') AS min_qty,
           nullif(promo_price, '') AS promo_price, nullif(discount_rate, '') AS discount_rate,
           CAST(nullif(club, '') AS INTEGER) AS club, CAST(nullif(coupon, '') AS INTEGER) AS coupon,
           nullif(reward_type, '') AS reward_type FROM il_promo"""
"#;

/// One chain's price lists as a stream by store.
pub const PRICE_DDL: &str = "CREATE TABLE shelf_price (
    product_id TEXT PRIMARY KEY CHECK (length(product_id) <= 20),
    product TEXT NOT NULL CHECK (length(product) <= 100),
    barcode TEXT CHECK (length(barcode) <= 20),
    cents INTEGER CHECK (cents >= 0),
    special_cents INTEGER CHECK (special_cents >= 0)
) STRICT;
";
const PRICE_STREAM: &str = r#"
[[stream]]
name = "price"
audience = "store"
schema = "schema/price.sql"
[[stream.table]]
name = "shelf_price"
query = """SELECT product_id, product, nullif(barcode, '') AS barcode,
           CAST(round(nullif(price, '') * 100) AS INTEGER) AS cents,
           CAST(round(nullif(special_price, '') * 100) AS INTEGER) AS special_cents
           FROM konzum WHERE store = :store"""
"#;

/// A chain of one store whose streams are the item master and the promotions; nothing is loaded yet.
pub fn items_and_promotions() -> Site {
    let mut site = Site::builder().stores(&[("0204", "hr")]).registers(1).build();
    site.hq.set_streams("");
    add_items_and_promotions(&mut site);
    site
}

/// Puts both in place of the sample's `catalog` and `promo` in a site; nothing is loaded yet.
pub fn add_items_and_promotions(site: &mut Site) {
    let stays = |s: &&str| !s.is_empty() && !s.contains("name = 'catalog'") && !s.contains("name = 'promo'");
    let others: String =
        site.hq.streams().split("[[stream]]\n").filter(stays).map(|s| format!("[[stream]]\n{s}")).collect();
    site.hq.set_streams(&format!("{others}{ITEM_STREAM}{PROMO_STREAM}"));
    contract(site, "catalog", ITEM_DDL);
    contract(site, "promo", PROMO_DDL);
    site.sql("CREATE TABLE off_product (barcode TEXT, name TEXT, is_healthy TEXT)");
    let columns = "chain_id,store_id,barcode,promo_id,description,valid_to,min_qty,promo_price,discount_rate,club,coupon,reward_type";
    site.sql(&format!("CREATE TABLE il_promo ({columns}, PRIMARY KEY (chain_id, store_id, barcode, promo_id))"));
}

/// A chain of four stores with their own price lists, loaded.
pub fn shelf_prices(data: &Path) -> Site {
    let stores = PRICE_STORES.map(|s| (s, "hr"));
    let mut site = Site::builder().stores(&stores).registers(1).build();
    site.hq.set_streams(PRICE_STREAM);
    contract(&site, "price", PRICE_DDL);
    site.sql(
        "CREATE TABLE konzum (store TEXT, product_id TEXT, product TEXT, barcode TEXT, price TEXT, special_price TEXT)",
    );
    let mut db = source(&site);
    let tx = db.transaction().unwrap();
    for store in PRICE_STORES {
        let mut insert = tx.prepare("INSERT INTO konzum VALUES (?, ?, ?, ?, ?, ?)").unwrap();
        for row in rows(&price_file(data, store), &["ProductId", "Product", "Barcode", "Price", "SpecialPrice"]) {
            insert.execute(params_from_iter(std::iter::once(store.to_owned()).chain(row))).unwrap();
        }
    }
    tx.commit().unwrap();
    site
}

/// Puts a snapshot of the item master in place of what the source has.
pub fn load_snapshot(site: &Site, data: &Path, name: &str) {
    let mut db = source(site);
    let tx = db.transaction().unwrap();
    tx.execute("DELETE FROM off_product", []).unwrap();
    let mut insert = tx.prepare("INSERT INTO off_product VALUES (?, ?, ?)").unwrap();
    for row in rows(&data.join("off-products").join(name), &["barcode", "name", "is_healthy"]) {
        insert.execute(params_from_iter(row)).unwrap();
    }
    drop(insert);
    tx.commit().unwrap();
}

/// Applies the promotions' base or one delta to the source.
pub fn load_promos(site: &Site, data: &Path, name: &str) {
    const COLUMNS: [&str; 12] = [
        "chain_id",
        "store_id",
        "barcode",
        "promo_id",
        "description",
        "valid_to",
        "min_qty",
        "promo_price",
        "discount_rate",
        "club",
        "coupon",
        "reward_type",
    ];
    let mut db = source(site);
    let tx = db.transaction().unwrap();
    let file = data.join("il-promos").join(name);
    let deletes = "DELETE FROM il_promo WHERE chain_id = ? AND store_id = ? AND barcode = ? AND promo_id = ?";
    let mut delete = tx.prepare(deletes).unwrap();
    let mut put = tx.prepare("INSERT OR REPLACE INTO il_promo VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)").unwrap();
    let ops: Vec<String> =
        if name.starts_with("delta") { rows(&file, &["op"]).into_iter().flatten().collect() } else { Vec::new() };
    for (n, row) in rows(&file, &COLUMNS).into_iter().enumerate() {
        if ops.get(n).is_some_and(|op| op == "D") {
            assert_eq!(delete.execute(params_from_iter(&row[..4])).unwrap(), 1, "{name}: row {n}");
        } else {
            put.execute(params_from_iter(row)).unwrap();
        }
    }
    drop((delete, put));
    tx.commit().unwrap();
}

/// The digest of the item master by `tests/python/digest.py`, from a snapshot's file alone.
pub fn snapshot_digest(data: &Path, name: &str) -> String {
    let file = data.join("off-products").join(name);
    script(&["--key", "barcode", "barcode:text,name:text,is_healthy:integer"], &[file])
}

/// The digest of the promotions after the first `n` files.
pub fn promo_digest(data: &Path, n: usize) -> String {
    let columns = "chain_id:text,store_id:text,barcode:text,promo_id:text,description:text,valid_to:text,min_qty:text?,promo_price:text?,discount_rate:text?,club:integer?,coupon:integer?,reward_type:text?";
    let files: Vec<PathBuf> = PROMOS[..n].iter().map(|f| data.join("il-promos").join(f)).collect();
    script(&["--key", "chain_id,store_id,barcode,promo_id", columns], &files)
}

/// The digest of a store's price list.
pub fn price_digest(data: &Path, store: &str) -> String {
    let columns = "ProductId:text,Product:text,Barcode:text?,Price:cents?,SpecialPrice:cents?";
    script(&["--key", "ProductId", columns], &[price_file(data, store)])
}

/// The file of a store's price list.
pub fn price_file(data: &Path, store: &str) -> PathBuf {
    data.join("konzum-hr").join(format!("{store}-2025-07-03.csv"))
}

fn script(arguments: &[&str], files: &[PathBuf]) -> String {
    let mut c = Command::new(tools().join("venv/bin/python"));
    c.arg(repository().join("tests/python/digest.py")).args(arguments).args(files);
    let answer: serde_json::Value = serde_json::from_str(&process::succeed(&mut c)).unwrap();
    answer["digest"].as_str().unwrap().to_owned()
}

fn contract(site: &Site, stream: &str, ddl: &str) {
    std::fs::write(site.hq.dir.join(format!("schema/{stream}.sql")), ddl).unwrap();
}

fn source(site: &Site) -> Connection {
    Connection::open(site.hq.dir.join("source.db")).unwrap()
}

fn rows(file: &Path, columns: &[&str]) -> Vec<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().flexible(false).from_path(file).unwrap();
    let header = reader.headers().unwrap().clone();
    let places: Vec<usize> = columns
        .iter()
        .map(|c| {
            header
                .iter()
                .position(|h| h.trim_start_matches('\u{feff}') == *c)
                .unwrap_or_else(|| panic!("{}: no column {c}", file.display()))
        })
        .collect();
    reader.records().map(|r| r.unwrap()).map(|r| places.iter().map(|p| r[*p].to_owned()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_named_is_taken_and_an_empty_name_is_none() {
        assert_eq!(named(Some("/".into())), Some("/".into()));
        assert_eq!(named(Some(OsString::new())), None);
    }

    #[test]
    #[should_panic(expected = "there is no folder /nonexistent/data")]
    fn a_folder_that_is_named_and_not_there_is_told() {
        named(Some("/nonexistent/data".into()));
    }
}

//! The sample: a few hundred items with barcodes, prices by zone, promotions by zone, staff by store. One script
//! that SQLite, PostgreSQL and MariaDB read alike.

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use std::fmt::Write as _;
use std::path::Path;

/// The contracts: stream and DDL.
pub const DDL: [(&str, &str); 4] = [
    (
        "catalog",
        "CREATE TABLE item (
    sku TEXT NOT NULL PRIMARY KEY CHECK (length(sku) <= 20),
    name TEXT NOT NULL CHECK (length(name) <= 100),
    department INTEGER NOT NULL CHECK (department BETWEEN 1 AND 99),
    weight REAL,
    note TEXT
) STRICT;
CREATE INDEX item_department ON item (department);
CREATE TABLE barcode (
    code TEXT NOT NULL PRIMARY KEY CHECK (length(code) <= 14),
    sku TEXT NOT NULL
) STRICT;
",
    ),
    (
        "price",
        "CREATE TABLE price (
    sku TEXT NOT NULL PRIMARY KEY,
    price_cents INTEGER NOT NULL CHECK (price_cents BETWEEN 0 AND 9999999),
    updated TEXT NOT NULL
) STRICT;
",
    ),
    (
        "promo",
        "CREATE TABLE promo (
    id INTEGER NOT NULL PRIMARY KEY,
    sku TEXT NOT NULL,
    percent INTEGER NOT NULL CHECK (percent BETWEEN 1 AND 90)
) STRICT;
",
    ),
    (
        "staff",
        "CREATE TABLE staff (
    id INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL CHECK (length(name) <= 60),
    role TEXT NOT NULL CHECK (role IN ('cashier', 'manager'))
) STRICT;
",
    ),
];

/// Stream, audience, table and query of each table. The queries name the columns in the contract's order.
const TABLES: [(&str, &str, &str, &str); 5] = [
    ("catalog", "all", "item", "SELECT sku, name, department, weight, note FROM item"),
    ("catalog", "all", "barcode", "SELECT code, sku FROM barcode"),
    ("price", "zone", "price", "SELECT sku, price_cents, updated FROM price WHERE zone = :zone"),
    ("promo", "zone", "promo", "SELECT id, sku, percent FROM promo WHERE zone = :zone"),
    ("staff", "store", "staff", "SELECT id, name, role FROM staff WHERE store = :store"),
];

/// Each table with the query of its rows.
pub fn model_tables() -> impl Iterator<Item = (&'static str, &'static str)> {
    TABLES.iter().map(|(_, _, table, sql)| (*table, *sql))
}

/// The `[[stream]]` part of hq.toml.
pub(super) fn streams(inbox: bool) -> String {
    let mut toml = String::new();
    for (stream, _) in DDL {
        let audience = TABLES.iter().find(|t| t.0 == stream).unwrap().1;
        write!(toml, "[[stream]]\nname = '{stream}'\naudience = '{audience}'\nschema = 'schema/{stream}.sql'\n")
            .unwrap();
        for (_, _, table, query) in TABLES.iter().filter(|t| t.0 == stream && !inbox) {
            write!(toml, "[[stream.table]]\nname = '{table}'\nquery = \"{query}\"\n").unwrap();
        }
    }
    toml
}

/// The source's tables and rows. The source allows more than the contracts do, as sources will.
pub fn sample_sql(stores: &[(String, String)], items: usize) -> String {
    let mut sql = String::from(
        "CREATE TABLE store (id VARCHAR(32) PRIMARY KEY, zone VARCHAR(32), region VARCHAR(32));
         CREATE TABLE item (sku VARCHAR(40) PRIMARY KEY, name VARCHAR(400), department BIGINT, weight DOUBLE PRECISION, note VARCHAR(400));
         CREATE TABLE barcode (code VARCHAR(40) PRIMARY KEY, sku VARCHAR(40));
         CREATE TABLE price (zone VARCHAR(32), sku VARCHAR(40), price_cents BIGINT, updated VARCHAR(40), PRIMARY KEY (zone, sku));
         CREATE TABLE promo (zone VARCHAR(32), id BIGINT, sku VARCHAR(40), percent BIGINT, PRIMARY KEY (zone, id));
         CREATE TABLE staff (store VARCHAR(32), id BIGINT, name VARCHAR(400), role VARCHAR(40), PRIMARY KEY (store, id));\n",
    );
    let mut zones: Vec<&str> = stores.iter().map(|(_, z)| z.as_str()).collect();
    zones.sort_unstable();
    zones.dedup();
    let mut insert = |table: &str, rows: Vec<String>| {
        for batch in rows.chunks(500) {
            writeln!(sql, "INSERT INTO {table} VALUES {};", batch.join(",")).unwrap();
        }
    };
    insert("store", stores.iter().map(|(s, z)| format!("('{s}', '{z}', 'north')")).collect());
    insert("item", (0..items).map(item).collect());
    insert(
        "barcode",
        (0..items).map(|i| format!("('{:013}', '{}')", 4_000_000_000_000u64 + i as u64 * 17, sku(i))).collect(),
    );
    for (z, zone) in zones.iter().enumerate() {
        let price = |i: usize| 99 + (i as u64 * 7919 + z as u64 * 31) % 20_000;
        let row = |i: usize| format!("('{zone}', '{}', {}, '2026-01-01T00:00:00Z')", sku(i), price(i));
        insert("price", (0..items).map(row).collect());
        insert(
            "promo",
            (0..items / 10).map(|i| format!("('{zone}', {i}, '{}', {})", sku(i * 10), 5 + (i + z) % 50)).collect(),
        );
    }
    for (store, _) in stores {
        let name = |n: usize| ["Ada Öztürk", "Łukasz Nowak", "Mary O''Brien", "李 娜"][n % 4];
        let row =
            |n: usize| format!("('{store}', {n}, '{}', '{}')", name(n), if n == 0 { "manager" } else { "cashier" });
        insert("staff", (0..6).map(row).collect());
    }
    sql
}

fn sku(i: usize) -> String {
    format!("SKU{i:07}")
}

fn item(i: usize) -> String {
    let weight = if i.is_multiple_of(5) { "NULL".to_owned() } else { format!("{}", (i % 977) as f64 / 8.0) };
    // Text that tells encodings, quoting and NULL from '' apart.
    let note = match i % 4 {
        0 => "NULL",
        1 => "''",
        2 => "'5\" pipe, 2nd choice; 100 %'",
        _ => "'größe 7 ½ 東京'",
    };
    format!("('{}', 'Item {i} of the sample', {}, {weight}, {note})", sku(i), 1 + i % 40)
}

/// Writes the whole model as CSV drops; see [`super::Site::drop_all`].
pub(super) fn drop_all(model: &Connection, inbox: &Path) {
    write_csv(model, "SELECT id, zone, region FROM store ORDER BY id", &inbox.join("stores.csv"));
    let list = |sql: &str| -> Vec<String> {
        model.prepare(sql).unwrap().query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
    };
    for (stream, audience, table, query) in TABLES {
        let (mark, values) = match audience {
            "all" => ("", vec![String::new()]),
            "zone" => (":zone", list("SELECT DISTINCT zone FROM store ORDER BY zone")),
            _ => (":store", list("SELECT id FROM store ORDER BY id")),
        };
        for value in values {
            let audience = if value.is_empty() { audience.to_owned() } else { format!("{audience}-{value}") };
            let name = format!("{stream}.{audience}.{table}.csv");
            let sql = if mark.is_empty() { query.to_owned() } else { query.replace(mark, &format!("'{value}'")) };
            write_csv(model, &sql, &inbox.join(&name));
            std::fs::write(inbox.join(format!("{name}.ok")), b"").unwrap();
        }
    }
}

/// Quotes whatever is not plain. NULL is an empty field.
fn write_csv(db: &Connection, sql: &str, path: &Path) {
    let mut statement = db.prepare(sql).unwrap();
    let columns: Vec<String> = statement.column_names().iter().map(|c| (*c).to_owned()).collect();
    let mut out = columns.join(",") + "\r\n";
    let mut rows = statement.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let fields = (0..columns.len()).map(|i| match row.get_ref(i).unwrap() {
            ValueRef::Null => String::new(),
            ValueRef::Integer(n) => n.to_string(),
            ValueRef::Real(r) => format!("{r:?}"),
            ValueRef::Text(t) => quoted(std::str::from_utf8(t).unwrap()),
            ValueRef::Blob(_) => panic!("the sample has no blobs"),
        });
        out += &(fields.collect::<Vec<_>>().join(",") + "\r\n");
    }
    std::fs::write(path, out).unwrap();
}

fn quoted(text: &str) -> String {
    let plain = !text.is_empty() && !text.contains([',', '"', '\n', '\r', ' ']);
    if plain { text.to_owned() } else { format!("\"{}\"", text.replace('"', "\"\"")) }
}

//! A chain of 5,000 stores in 50 zones: what a publish costs where one zone changes, and where all do; and what a new
//! register costs headquarters.

use crate::Options;
use crate::measure::{Line, Results, Spread, Target, Took, time, time_all};
use crate::stage::STORE;
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use tillcast_tests::Site;

const STORES: u32 = 5_000;
const ZONES: u32 = 50;
const ITEMS: u32 = 2_000;

const STREAMS: &str = "
[[stream]]
name = 'catalog'
audience = 'all'
schema = 'schema/catalog.sql'
[[stream.table]]
name = 'item'
query = 'SELECT sku, name FROM item'
[[stream]]
name = 'price'
audience = 'zone'
schema = 'schema/price.sql'
[[stream.table]]
name = 'price'
query = 'SELECT sku, cents FROM price WHERE zone = :zone'
";

/// Every case against the barest way to write the same objects: one after another, synced and renamed.
pub fn scale(options: &Options, results: &mut Results) {
    let mut site = Site::builder().stores(&[(STORE, "z00")]).registers(0).items(1).build();
    let (source, _) = chain(&mut site, STORES);
    let publish = || time_all(|| site.hq.run(&["publish"]).ok()).1;
    let cases: [(&str, &str, usize); 5] = [
        ("the first", "", 1),
        ("nothing changed", "", options.runs),
        ("one zone changed", "UPDATE price SET cents = cents + 1 WHERE zone = 'z07' AND sku < 'S00020'", options.runs),
        ("all zones changed", "UPDATE price SET cents = cents + 1 WHERE sku < 'S00020'", options.runs),
        ("the catalog of all changed", "UPDATE item SET name = name || '!' WHERE sku < 'S00020'", options.runs),
    ];
    for (what, change, runs) in cases {
        let (mut ours, mut bare, mut objects) = (Vec::new(), Vec::new(), 0);
        for _ in 0..runs {
            source.execute_batch(change).unwrap();
            let before = stamps(&site.bucket());
            ours.push(publish());
            let mut written = stamps(&site.bucket());
            written.retain(|name, stamp| before.get(name) != Some(stamp));
            objects = written.len();
            bare.push(write_bare(&site, written.keys()));
        }
        let what = format!("publish to {STORES} stores in {ZONES} zones, {what}");
        let line = if objects == 0 {
            let behind = format!("0 objects written; processor {:.2} s", Spread::cpu(&ours));
            Line { what, target: Target::None, figure: Spread::wall(&ours), unit: "s", behind }
        } else {
            let ratio = Line::ratio(&format!("{what}, writing the same objects barely"), Target::None, &ours, &bare);
            Line { behind: format!("{objects} objects written; {}", ratio.behind), ..ratio }
        };
        results.line(line);
    }
    new_register(&site, results);
}

/// Stores in zones, with prices: the source, and how many zones.
pub fn chain(site: &mut Site, stores: u32) -> (Connection, u32) {
    let item = "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL) STRICT;";
    let price = "CREATE TABLE price (sku TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT;";
    std::fs::write(site.hq.dir.join("schema/catalog.sql"), item).unwrap();
    std::fs::write(site.hq.dir.join("schema/price.sql"), price).unwrap();
    site.hq.set_text("source.url", "sqlite:chain.db");
    site.hq.set_streams(STREAMS);
    let source = Connection::open(site.hq.dir.join("chain.db")).unwrap();
    source
        .execute_batch(&format!(
            "CREATE TABLE store (id TEXT PRIMARY KEY, zone TEXT NOT NULL, region TEXT);
             CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL);
             CREATE TABLE price (zone TEXT, sku TEXT, cents INTEGER NOT NULL, PRIMARY KEY (zone, sku)) WITHOUT ROWID;
             WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT {stores})
             INSERT INTO store SELECT printf('%04d', i), printf('z%02d', i % {ZONES}), 'north' FROM n;
             WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT {ITEMS})
             INSERT INTO item SELECT printf('S%05d', i), printf('item number %d', i) FROM n;
             WITH RECURSIVE z(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM z LIMIT {ZONES})
             INSERT INTO price SELECT printf('z%02d', i), sku, 100 + abs(random() % 10000) FROM z, item;"
        ))
        .unwrap();
    (source, ZONES)
}

/// Length and time of writing of every object.
fn stamps(bucket: &Path) -> BTreeMap<String, (u64, std::time::SystemTime)> {
    let mut found = BTreeMap::new();
    let mut rooms = vec![bucket.to_owned()];
    while let Some(room) = rooms.pop() {
        for entry in std::fs::read_dir(&room).into_iter().flatten().flatten() {
            let meta = entry.metadata().unwrap();
            if meta.is_dir() {
                rooms.push(entry.path());
            } else {
                let name = entry.path().strip_prefix(bucket).unwrap().to_str().unwrap().to_owned();
                found.insert(name, (meta.len(), meta.modified().unwrap()));
            }
        }
    }
    found
}

/// Reads the objects, and writes each aside, syncs it and gives it its name.
fn write_bare<'n>(site: &Site, names: impl Iterator<Item = &'n String>) -> Took {
    let dir = tillcast_tests::temp_dir("bare");
    let objects: Vec<Vec<u8>> = names.map(|n| std::fs::read(site.bucket().join(n)).unwrap()).collect();
    let write = || {
        for (n, bytes) in objects.iter().enumerate() {
            let aside = dir.path().join("aside");
            let mut file = std::fs::File::create(&aside).unwrap();
            file.write_all(bytes).unwrap();
            file.sync_all().unwrap();
            std::fs::rename(&aside, dir.path().join(n.to_string())).unwrap();
            std::fs::File::open(dir.path()).unwrap().sync_all().unwrap();
        }
    };
    time(write).1
}

/// A register more: no pack and no other new object; its store's manifest names it.
fn new_register(site: &Site, results: &mut Results) {
    let before = stamps(&site.bucket());
    let (_, took) = time(|| site.hq.run(&["enroll", &format!("{STORE}-77")]).ok());
    let after = stamps(&site.bucket());
    let new = after.keys().filter(|name| !before.contains_key(*name)).count();
    let again: Vec<&str> =
        after.iter().filter(|(n, s)| before.get(*n).is_some_and(|b| b != *s)).map(|(n, _)| n.as_str()).collect();
    results.line(Line {
        what: format!("new objects that a new register costs headquarters, {STORES} stores"),
        target: Target::AtMost(0.0),
        figure: Spread::of([new as f64]),
        unit: "objects",
        behind: format!("written again: {}; its code takes {:.2} s", again.join(", "), took.wall.as_secs_f64()),
    });
}

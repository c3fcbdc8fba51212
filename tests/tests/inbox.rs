//! File drops: what is odd but right is read right; what is wrong goes to `rejected/` with line number and reason;
//! never is half a file published.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::path::PathBuf;
use tillcast_tests::site::Source;
use tillcast_tests::{Output, Site, digest, files};

/// A site with the sample dropped and published; its drops are cleared away.
fn site() -> Site {
    let site = Site::builder().source(Source::Inbox).registers(1).hq("source.rest", "'200ms'").build();
    std::fs::remove_dir_all(site.inbox().join("done")).unwrap();
    site
}

fn drop_bytes(site: &Site, name: &str, bytes: &[u8]) {
    std::fs::write(site.inbox().join(name), bytes).unwrap();
}

/// Drops a file with its `.ok`.
fn drop_whole(site: &Site, name: &str, text: &str) {
    drop_bytes(site, name, text.as_bytes());
    drop_bytes(site, &format!("{name}.ok"), b"");
}

fn room(site: &Site, room: &str, name: &str) -> PathBuf {
    site.inbox().join(room).join(name)
}

/// Publishes a drop that is wrong: it lies in `rejected/` with these words beside it, its stream stays as it is, and
/// another stream's drop goes out.
#[track_caller]
fn rejected(site: &Site, name: &str, bytes: &[u8], words: &[&str]) -> Output {
    let stream = name.split('.').next().unwrap();
    let before = |s: &str| site.manifest("0421")["streams"].get(s).map(|s| s["version"].clone());
    let (was, staff) = (before(stream), site.version("0421", "staff"));
    drop_bytes(site, name, bytes);
    let clerk = format!("Clerk {staff}");
    site.sql(&format!(
        "DELETE FROM staff WHERE store = '0421'; INSERT INTO staff VALUES ('0421', 2, '{clerk}', 'cashier')"
    ));
    drop_whole(site, "staff.store-0421.staff.csv", &format!("id,name,role\n2,{clerk},cashier\n"));
    let out = site.hq.run(&["publish"]).code(3).says(words);
    assert_eq!(before(stream), was, "{name}: nothing of it is published: {}", out.text());
    assert!(site.version("0421", "staff") > staff, "another stream goes on: {}", out.text());
    assert!(!site.inbox().join(name).exists() && !room(site, "done", name).exists(), "{name} is out of the way");
    assert_eq!(std::fs::read(room(site, "rejected", name)).unwrap(), bytes, "{name} is kept as it came");
    let reason = std::fs::read_to_string(room(site, "rejected", &format!("{name}.reason.txt"))).unwrap();
    for word in words {
        assert!(reason.contains(word), "{name}: the reason does not say {word:?}: {reason}");
    }
    out
}

const PROMO: &str = "promo.zone-east.promo.csv";

#[test]
fn odd_files_are_read_right() {
    let site = site();
    // BOM, CRLF, columns in another order, quotes, a newline and a comma in a field, a quoted number, no last CRLF.
    let text = "\u{feff}name,sku,weight,department,note\r\n\
                \"a \"\"quoted\"\" name\",K1,1.5,7,\"two\nlines\"\r\n\
                \"comma, here\",K2,,\"8\",\"crlf\r\ninside\"\r\n\
                größe 東京,K3,-0.25,9,\r\n\
                \" spaces stay \",K4,2e3,10,\"\"";
    drop_whole(&site, "catalog.all.item.csv", text);
    site.sql(
        "DELETE FROM item;
         INSERT INTO item VALUES ('K1', 'a \"quoted\" name', 7, 1.5, 'two' || char(10) || 'lines'),
            ('K2', 'comma, here', 8, NULL, 'crlf' || char(13) || char(10) || 'inside'),
            ('K3', 'größe 東京', 9, -0.25, NULL), ('K4', ' spaces stay ', 10, 2000.0, NULL)",
    );
    site.hq.run(&["publish", "--allow-shrink"]).ok();
    // The same by NDJSON, and what a CSV cannot say: '' beside NULL.
    let ndjson = "{\"sku\":\"K5\",\"name\":\"ü \\u2028 \\\"x\\\"\",\"department\":3,\"weight\":0.1,\"note\":\"\"}\r\n\n\
                  {\"department\":4,\"name\":\"\",\"sku\":\"K6\",\"note\":null}\n\
                  {\"sku\":\"K7\",\"name\":\"last\",\"department\":5,\"weight\":7,\"note\":\"no break after me\"}";
    drop_whole(&site, "catalog.all.item.ndjson", ndjson);
    site.sql(
        "DELETE FROM item;
         INSERT INTO item VALUES ('K5', 'ü ' || char(8232) || ' \"x\"', 3, 0.1, ''), ('K6', '', 4, NULL, NULL),
            ('K7', 'last', 5, 7.0, 'no break after me')",
    );
    site.publish();
    site.bring_down();
    site.assert_all_proven();
    assert!(
        room(&site, "done", "catalog.all.item.csv").exists() && room(&site, "done", "catalog.all.item.ndjson").exists()
    );
    let left: Vec<String> = files::tree(&site.inbox()).into_keys().filter(|f| !f.starts_with("done/")).collect();
    assert!(left.is_empty(), "drops and markers are cleared: {left:?}");
}

#[test]
fn wrong_files_are_rejected_with_line_and_reason() {
    let site = site();
    let east = |tail: &str| format!("id,sku,percent\n0,SKU0000000,5\n{tail}");
    rejected(&site, PROMO, east("1,SKU1\n2,SKU2,9\n").as_bytes(), &["line 3", "2 fields", "header has 3"]);
    rejected(&site, PROMO, east("1,SKU1,9,extra\n").as_bytes(), &["line 3", "4 fields"]);
    rejected(
        &site,
        PROMO,
        &[east("1,").as_bytes(), b"\xff\xfeSKU", b",9\n"].concat(),
        &["line 3", "column sku", "UTF-8"],
    );
    rejected(&site, PROMO, b"", &["line 1", "empty"]);
    rejected(&site, PROMO, b"id,sku\n1,SKU1\n", &["line 1", "percent"]);
    rejected(&site, PROMO, b"id,sku,percent,colour\n1,SKU1,9,red\n", &["line 1", "colour"]);
    rejected(&site, PROMO, b"id,sku,percent,sku\n1,SKU1,9,x\n", &["line 1", "sku"]);
    rejected(&site, PROMO, east("1,SKU1,95\n").as_bytes(), &["line 3", "key id=1", "column percent", "95", "90"]);
    rejected(&site, PROMO, east("0,SKU1,9\n").as_bytes(), &["line 3", "key id=0", "twice"]);
    rejected(&site, PROMO, east("1,SKU1,\n").as_bytes(), &["line 3", "key id=1", "column percent", "empty"]);
    rejected(&site, PROMO, east("01,SKU1,9\n").as_bytes(), &["line 3", "column id", "leading zero"]);
    rejected(&site, PROMO, east("1,\"SKU\"1,9\n").as_bytes(), &["line 3", "closing quote"]);
    rejected(&site, PROMO, east("1,SKU\r1,9\n").as_bytes(), &["line 3", "carriage return"]);
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn half_written_files_are_never_taken_for_whole_ones() {
    let site = site();
    let east = |tail: &str| format!("id,sku,percent\n0,SKU0000000,5\n{tail}");
    rejected(&site, PROMO, east("1,SKU0000010,1").as_bytes(), &["line 3", "half-written"]);
    rejected(&site, PROMO, east("1,\"SKU00000\n2,x,9\n").as_bytes(), &["line 3", "half-written"]);
    rejected(&site, PROMO, east("1,SKU0000010,1\r").as_bytes(), &["line 3", "half-written"]);
    rejected(&site, PROMO, b"id,sku,perc", &["line 1", "half-written"]);
    let ndjson = "promo.zone-east.promo.ndjson";
    let line = "{\"id\":0,\"sku\":\"SKU0000000\",\"percent\":5}\n";
    rejected(&site, ndjson, format!("{line}{{\"id\":1,\"sku\":\"SKU00").as_bytes(), &["line 2", "JSON"]);
    rejected(&site, ndjson, format!("{line}[1,2,3]\n").as_bytes(), &["line 2", "object"]);
    rejected(
        &site,
        ndjson,
        format!("{line}{{\"id\":1,\"sku\":\"x\",\"percent\":5,\"colour\":1}}\n").as_bytes(),
        &["line 2", "colour"],
    );
    rejected(
        &site,
        ndjson,
        format!("{line}{{\"id\":1,\"sku\":\"x\",\"percent\":\"5\",\"id\":2}}\n").as_bytes(),
        &["line 2", "twice"],
    );
    rejected(
        &site,
        ndjson,
        format!("{line}{{\"id\":1,\"sku\":7,\"percent\":5}}\n").as_bytes(),
        &["line 2", "column sku"],
    );
    rejected(&site, ndjson, b"", &["line 1", "empty"]);
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn a_file_that_grows_is_left_until_it_rests() {
    let mut site = site();
    // Longer than a busy machine keeps the writer from writing.
    site.hq.set_text("source.rest", "10s");
    let path = site.inbox().join("promo.zone-east.promo.csv");
    std::fs::write(&path, "id,sku,percent\n").unwrap();
    let before = site.version("0421", "promo");
    let grows = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::Write as _;
            let mut file = std::fs::File::options().append(true).open(&path).unwrap();
            let mut n = 0;
            while grows.load(std::sync::atomic::Ordering::Relaxed) {
                writeln!(file, "{n},SKU0000000,5").unwrap();
                n += 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        site.publish();
        grows.store(false, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(site.version("0421", "promo"), before);
    assert!(path.exists());
    // It rests now.
    site.hq.run(&["publish"]).ok();
    assert_eq!(site.version("0421", "promo"), before + 1);
    assert!(!path.exists());
}

#[test]
fn a_marker_says_that_a_file_is_whole_at_once() {
    let mut site = site();
    // Long enough that only the marker can have done it.
    site.hq.set_text("source.rest", "10m");
    drop_whole(&site, PROMO, "id,sku,percent\n0,SKU0000000,5\n1,SKU0000010,1");
    site.publish();
    let promised = site.promised("0421")["promo"].clone();
    let db = rusqlite::Connection::open_in_memory().unwrap();
    assert_eq!(promised, digest::of_query(&db, "VALUES (0, 'SKU0000000', 5), (1, 'SKU0000010', 1)"));
    assert!(!site.inbox().join(format!("{PROMO}.ok")).exists(), "the marker must not vouch for the next file");
}

#[test]
fn a_drop_held_by_the_shrink_guard_stays_where_it_is() {
    let site = Site::builder().source(Source::Inbox).registers(1).items(400).build();
    let before = files::tree(&site.bucket());
    let name = "price.zone-west.price.csv";
    drop_whole(&site, name, "sku,price_cents,updated\nSKU0000001,100,2026-01-01T00:00:00Z\n");
    for _ in 0..2 {
        site.hq.run(&["publish"]).code(3).says(&["399 of 400 rows", "table price", "--allow-shrink price"]);
        assert!(site.inbox().join(name).exists() && site.inbox().join(format!("{name}.ok")).exists(), "held");
        assert!(!room(&site, "rejected", name).exists());
    }
    assert_eq!(files::tree(&site.bucket()), before);
    site.hq.run(&["publish", "--allow-shrink", "price"]).ok();
    assert!(room(&site, "done", name).exists());
    let db = rusqlite::Connection::open_in_memory().unwrap();
    let one = "VALUES ('SKU0000001', 100, '2026-01-01T00:00:00Z')";
    assert_eq!(site.promised("0815")["price"], digest::of_query(&db, one));
}

#[test]
fn names_that_are_no_drops_are_rejected_or_left_alone() {
    let site = site();
    let header = b"sku,price_cents,updated\n";
    for (name, words) in [
        ("prise.zone-east.price.csv", &["prise"][..]),
        ("price.zone-north.price.csv", &["zone-north"]),
        ("price.all.price.csv", &["zone-NAME"]),
        ("price.zone-east.prices.csv", &["prices"]),
        ("price.zone-east.csv", &["STREAM.AUDIENCE.TABLE"]),
        ("price.zone-east';--.price.csv", &["zone"]),
        ("Price.zone-east.price.csv", &["Price"]),
    ] {
        drop_bytes(&site, name, header);
        let code = site.hq.run(&["publish"]).says(words).code;
        assert_ne!(code, Some(0), "{name}");
        assert!(room(&site, "rejected", name).exists(), "{name}");
        assert!(room(&site, "rejected", &format!("{name}.reason.txt")).exists(), "{name}");
    }
    for name in [".price.zone-east.price.csv", "price.zone-east.price.csv.tmp", "README"] {
        drop_bytes(&site, name, header);
    }
    std::fs::create_dir(site.inbox().join("price.zone-west.price.csv")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", site.inbox().join("promo.zone-east.promo.csv")).unwrap();
    let before = site.promised("0421");
    site.hq.run(&["publish"]);
    for name in [".price.zone-east.price.csv", "price.zone-east.price.csv.tmp", "README"] {
        assert!(site.inbox().join(name).exists(), "{name}");
    }
    assert_eq!(site.promised("0421"), before);
}

#[test]
fn a_wrong_list_of_stores_is_rejected_and_the_known_one_stays() {
    let site = site();
    for (text, words) in [
        ("id,zone,region\n0421,east,north\n../x,east,north\n", &["../x"][..]),
        ("id,zone,region\n0421,east\n", &["line 2"]),
        ("zone,region\neast,north\n", &["line 1", "id"]),
        ("id,zone,region\n0421,east,north\n0421,west,north\n", &["0421"]),
    ] {
        drop_whole(&site, "stores.csv", text);
        site.hq.run(&["publish"]).code(3).says(words);
        let reason = std::fs::read_to_string(room(&site, "rejected", "stores.csv.reason.txt")).unwrap();
        assert!(words.iter().all(|w| reason.contains(w)), "{reason}");
    }
    site.sql("UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000003'");
    site.drop_all();
    site.publish();
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn drops_that_are_ready_together_make_one_version() {
    let site = site();
    let before = site.version("0421", "catalog");
    site.sql(
        "INSERT INTO item VALUES ('NEW1', 'new', 7, 1.25, NULL); INSERT INTO barcode VALUES ('4999999999999', 'NEW1')",
    );
    site.drop_all();
    site.publish();
    assert_eq!(site.version("0421", "catalog"), before + 1);
    // One table alone: the other keeps its rows.
    drop_whole(&site, "catalog.all.barcode.csv", "code,sku\n1,SKU0000000\n");
    site.hq.run(&["publish", "--allow-shrink"]).ok();
    site.sql("DELETE FROM barcode; INSERT INTO barcode VALUES ('1', 'SKU0000000')");
    site.bring_down();
    site.assert_all_proven();
}

//! Contracts in packs that are signed as they should be, by a publisher's key in wrong hands. `poison.rs` has more.

use super::*;
use std::time::{Duration, Instant};
use tillcast_tests::{Nginx, PATIENCE, files, until};

const GOOD: &str = tillcast_tests::site::DDL[1].1;

/// The lines of a full of a stream's first rows, at this version.
fn lines_of(site: &Site, stream: &str, version: u64) -> Vec<String> {
    let entry = site.manifest("0421")["streams"][stream].clone();
    let (audience, first) = (entry["audience"].as_str().unwrap(), entry["packs"][0]["version"].as_u64().unwrap());
    let mut lines = forge::unpack(&site.object(&format!("packs/{stream}@{audience}/{first:010}.full.pack")).unwrap());
    let mut header: Value = serde_json::from_str(&lines[0]).unwrap();
    header["version"] = version.into();
    lines[0] = header.to_string();
    lines
}

/// A full of all prices under another contract, in fine order otherwise.
fn full(site: &Site, version: u64, ddl: &str) -> Vec<u8> {
    forge::pack(&under(lines_of(site, "price", version), ddl))
}

fn under(mut lines: Vec<String>, ddl: &str) -> Vec<String> {
    let mut header: Value = serde_json::from_str(&lines[0]).unwrap();
    header["schema"]["number"] = 99.into();
    header["schema"]["ddl"] = ddl.into();
    header["schema"]["sha256"] = forge::sha256(ddl.as_bytes()).into();
    lines[0] = header.to_string();
    lines
}

/// One store whose one register reads the bucket itself: nobody looked at the packs before it.
struct Victims {
    site: Site,
    _bucket: Nginx,
}

impl Victims {
    fn new() -> Victims {
        let mut site = small().relay("tries.limit", "1").relay("trial.time", "'4s'").build();
        site.publish();
        let bucket = Nginx::serve(&site.bucket());
        let register = site.registers.get_mut("0421-01").unwrap();
        register.set_text("relay", &bucket.url());
        register.set("fallback", "[]");
        site.relay("0421").run(&["once"]).ok();
        site.register("0421-01").run(&["once"]).ok();
        Victims { site, _bucket: bucket }
    }

    /// Headquarters finds that somebody signs in its name, goes on above that, and its next publish heals all.
    fn heal(&self) {
        let site = &self.site;
        site.sql("UPDATE price SET price_cents = 12 WHERE sku = 'SKU0000003'");
        site.hq.run(&["publish"]).code(1).says(&["signed by our key"]);
        site.publish();
        for node in [site.relay("0421"), site.register("0421-01")] {
            until(PATIENCE, "healed", || node.run(&["once"]).code == Some(0));
        }
        assert_eq!(site.relay("0421").digests(), site.expected("0421"));
        assert_eq!(rows(site, "0421-01"), site.expected("0421"));
    }
}

fn with(more: &str) -> String {
    format!("{GOOD}{more}")
}

fn check(check: &str) -> String {
    GOOD.replace("price_cents BETWEEN 0 AND 9999999", check)
}

fn column(more: &str) -> String {
    GOOD.replace("updated TEXT NOT NULL", &format!("updated TEXT NOT NULL, {more}"))
}

fn many(n: usize, f: &dyn Fn(usize) -> String) -> String {
    (0..n).map(f).collect()
}

/// What would do more than hold rows.
fn evil() -> Vec<(&'static str, String)> {
    vec![
        ("a stored generated column", column("x TEXT AS (hex(zeroblob(9))) STORED")),
        ("a generated column", column("x TEXT AS (sku)")),
        ("a DEFAULT that is computed", column("x TEXT DEFAULT (printf('%99999999d', 1))")),
        ("a DEFAULT of the moment", column("x TEXT DEFAULT CURRENT_TIMESTAMP")),
        (
            "a foreign key that cascades",
            with("CREATE TABLE e (a TEXT PRIMARY KEY REFERENCES price (sku) ON DELETE CASCADE) STRICT;"),
        ),
        ("a foreign key to another's table", with("CREATE TABLE e (a TEXT PRIMARY KEY REFERENCES staff (id)) STRICT;")),
        (
            "a table that recurses",
            with("CREATE TABLE e AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n;"),
        ),
        (
            "a select that recurses",
            with("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n;"),
        ),
        (
            "a view that recurses",
            with("CREATE VIEW e AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n;"),
        ),
        ("a CHECK that is deep", check(&format!("{}1{}", "(1 + ".repeat(5000), ")".repeat(5000)))),
        ("a CHECK that is long", check(&format!("1{}", " AND 1".repeat(40_000)))),
        ("a CHECK by load_extension", check("load_extension('x') IS NULL")),
        ("a CHECK that reads a file", check("readfile('/etc/passwd') IS NULL")),
        ("a CHECK by chance", check("abs(random()) > 0")),
        ("an index by chance", with("CREATE INDEX e ON price (random());")),
        ("65 tables", with(&many(65, &|n| format!("CREATE TABLE e{n} (a TEXT PRIMARY KEY) STRICT;")))),
        ("257 columns", column(many(257, &|n| format!("c{n} TEXT,")).trim_end_matches(','))),
        ("more DDL than may be", with(&format!("-- {}", "x".repeat(300_000)))),
        ("a temporary table", with("CREATE TEMP TABLE price (a TEXT PRIMARY KEY) STRICT;")),
        ("a table of another schema", with("CREATE TABLE temp.e (a TEXT PRIMARY KEY) STRICT;")),
        ("a name with a line end", with("CREATE TABLE \"e\n\" (a TEXT PRIMARY KEY) STRICT;")),
        ("SQLite's own table", with("CREATE TABLE sqlite_evil (a TEXT PRIMARY KEY) STRICT;")),
        ("a transaction's end", with("COMMIT;")),
        ("VACUUM INTO", with("VACUUM INTO '/tmp/tillcast-evil.db';")),
        ("a schema rewritten", with("PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = '';")),
        ("rows", with("INSERT INTO price VALUES ('EVIL', 1, 'x');")),
        ("rtree", with("CREATE VIRTUAL TABLE e USING rtree(a, b, c);")),
        ("dbstat", with("CREATE VIRTUAL TABLE e USING dbstat(main);")),
        ("a NUL", with("\0CREATE TABLE e (a TEXT PRIMARY KEY) STRICT;")),
        ("another's table taken", GOOD.replace("TABLE price", "TABLE staff")),
    ]
}

#[test]
fn contracts_that_would_do_more_than_hold_rows() {
    let v = Victims::new();
    let site = &v.site;
    let (good, before) = (site.expected("0421"), files::rows(&site.store_db("0421-01")));
    let all = evil();
    let count = all.len();
    for (n, (what, ddl)) in all.into_iter().enumerate() {
        site.publish_forged("0421", "price", &full(site, 2 + n as u64, &ddl));
        let relay = site.relay("0421").run(&["once", "--json"]).code(3);
        no_panic(&relay.text());
        let errors = site.relay("0421").status()["errors"].to_string();
        assert!(errors.contains("price@zone-east"), "{what}: {errors}");
        let begun = Instant::now();
        let register = site.register("0421-01").run(&["once", "--json"]).code(3);
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
        no_panic(&register.text());
        assert!(register.json()["errors"].to_string().contains("price@zone-east"), "{what}: {}", register.text());
        let mut now = files::rows(&site.store_db("0421-01"));
        now.retain(|table, _| before.contains_key(table) || !table.starts_with("sqlite_"));
        assert_eq!(now, before, "{what}: tables, rows and versions are untouched");
        assert_eq!(site.relay("0421").digests()["price"], good["price"], "{what}");
    }
    assert!(count > 28 && !std::path::Path::new("/tmp/tillcast-evil.db").exists());
    v.heal();
}

/// These may pass, since they hold in SQLite's own way: what is too large is NULL. They get no memory for it.
#[test]
fn contracts_that_would_take_the_memory() {
    let v = Victims::new();
    let site = &v.site;
    let good = site.expected("0421");
    let tail = ", 'a', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa')".repeat(40);
    let grows = format!("{}'a'{tail} <> ''", "replace(".repeat(40));
    let giants = [
        ("a CHECK that takes memory", check("length(printf('%999999999d', price_cents)) > 0")),
        ("a CHECK that grows", check(&grows)),
        ("an index of a giant", with("CREATE INDEX e ON price (printf('%999999999d', price_cents));")),
    ];
    for (n, (what, ddl)) in giants.into_iter().enumerate() {
        site.publish_forged("0421", "price", &full(site, 2 + n as u64, &ddl));
        for node in [site.relay("0421"), site.register("0421-01")] {
            let cycle = node.spawn(&["once"], &[]);
            let peak = peak_while(&cycle);
            no_panic(&cycle.finish(PATIENCE).text());
            assert!(peak < 250 << 10, "{}, {what}: {peak} KiB", node.id);
        }
        assert_eq!(rows(site, "0421-01"), good, "{what}");
    }
    v.heal();
}

/// 1,029 bytes from each: the most that gzip can. Inside it may be another.
#[test]
fn bombs_are_stopped_where_they_were_declared_to_end() {
    let v = Victims::new();
    let site = &v.site;
    let good = site.expected("0421");
    let zeros = {
        use std::io::Write as _;
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        let chunk = vec![0u8; 1 << 20];
        (0..300).for_each(|_| gzip.write_all(&chunk).unwrap());
        gzip.finish().unwrap()
    };
    assert!((300usize << 20) / zeros.len() > 1000);
    let line = |text: String| {
        let mut lines = forge::unpack(&full(site, 9, GOOD));
        lines.insert(1, text);
        forge::pack(&lines)
    };
    let nested = forge::pack(&[String::from_utf8_lossy(&zeros[..1000]).into_owned()]);
    let mut header = forge::unpack(&full(site, 9, GOOD));
    let wide: String = (0..400_000).map(|n| format!("\"k{n}\":[],")).collect();
    header[0] = header[0].replacen('{', &format!("{{{wide}"), 1);
    let bombs = [
        ("zeros", zeros.clone()),
        ("a bomb in a bomb", nested),
        ("a deep row", line("[".repeat(2_000_000))),
        ("a deep section", line(format!("{{\"table\":{}", "[".repeat(2_000_000)))),
        ("a number of a million digits", line(format!("[{}]", "9".repeat(1_000_000)))),
        ("an exponent past all reals", line("[1e999999999,1,\"x\"]".into())),
        ("a text of 15 MiB", line(format!("[\"{}\",1,\"x\"]", "x".repeat(15 << 20)))),
        ("a million values", line(format!("[{}1]", "1,".repeat(1_000_000)))),
        ("400,000 keys in the header", forge::pack(&header)),
        ("keys twice", line("{\"table\":\"price\",\"table\":\"item\",\"op\":\"insert\",\"columns\":[]}".into())),
    ];
    for (n, (what, bytes)) in bombs.into_iter().enumerate() {
        // The version is in the list; what is in the header comes second.
        let version = 2 + n as u64;
        let unpacked = (bytes.len() as u64 * 200).min(64 << 20);
        let entry = json!({"version": version, "kind": "full", "bytes": bytes.len(), "unpacked": unpacked, "sha256": forge::sha256(&bytes)});
        site.list_pack("0421", "price", &bytes, entry, "{}");
        let begun = Instant::now();
        for node in [site.relay("0421"), site.register("0421-01")] {
            let cycle = node.spawn(&["once", "--json"], &[]);
            let peak = peak_while(&cycle);
            let out = cycle.finish(PATIENCE);
            no_panic(&out.text());
            let out = out.code(3);
            let errors = node.status()["errors"].to_string() + &out.text();
            assert!(errors.contains("price@zone-east"), "{}, {what}: {errors}", node.id);
            assert!(peak < 180 << 10, "{}, {what}: {peak} KiB", node.id);
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
        assert_eq!(rows(site, "0421-01"), good, "{what}");
    }
    v.heal();
}

/// The greatest resident memory of a command and its children until it ends, in KiB.
fn peak_while(cycle: &tillcast_tests::bins::Running) -> u64 {
    let pid = cycle.process.pid();
    let mut peak = 0;
    loop {
        let group: Vec<u32> = children(pid);
        let now = group.iter().filter_map(|p| high_water(*p)).max();
        peak = peak.max(now.unwrap_or(0));
        if high_water(pid).is_none() {
            return peak;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let texts = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    let mut all = vec![pid];
    all.extend(texts.flat_map(|t| t.split_whitespace().filter_map(|p| p.parse::<u32>().ok()).collect::<Vec<_>>()));
    all
}

/// None when the process has ended (a zombie has no memory).
fn high_water(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").trim().parse().ok()
}

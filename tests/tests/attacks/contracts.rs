//! Contracts in packs that are signed as they should be, by a publisher's key in wrong hands. `poison.rs` has more.

use super::*;
use std::time::{Duration, Instant};
use tillcast_tests::site::Node;
use tillcast_tests::{Nginx, PATIENCE, Watch, files, until};

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
    // Nothing but the contract itself is to be wrong.
    if let Some(tables) = forge::tables(ddl) {
        header["tables"] = tables;
    }
    if ddl.contains("TABLE staff") {
        lines.iter_mut().skip(1).for_each(|line| *line = line.replace("\"price\"", "\"staff\""));
    }
    lines[0] = header.to_string();
    lines
}

/// One store whose one register reads the bucket itself: nobody looked at the packs before it.
struct Victims {
    site: Site,
    watch: Watch,
    _bucket: Nginx,
}

impl Victims {
    fn new() -> Victims {
        let (mut watch, site) = Watch::over(small());
        let mut site = site.relay("tries.limit", "1").relay("trial.time", "'60s'").build();
        site.publish();
        watch.start(&site);
        let bucket = Nginx::serve(&site.bucket());
        let register = site.registers.get_mut("0421-01").unwrap();
        register.set_text("relay", &bucket.url());
        register.set("fallback", "[]");
        site.relay("0421").run(&["once"]).ok();
        site.register("0421-01").run(&["once"]).ok();
        Victims { site, watch, _bucket: bucket }
    }

    /// What headquarters mails: the pack with its reason, and that somebody signs in its name.
    #[track_caller]
    fn are_mailed(&self, reason: &str) {
        let once = || drop(self.site.relay("0421").run(&["once"]));
        let told = self.watch.tells("A pack of price@zone-east is in error", once);
        assert!(told.contains(reason), "{reason} is not in:\n{told}");
        self.watch.tells("Store 0421 holds a list that headquarters did not sign", once);
    }

    /// Headquarters finds that somebody signs in its name and says so; its next publish goes above that and heals all.
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
        self.watch.is_calm(|| drop(site.relay("0421").run(&["once"])));
    }
}

/// The name of a full of the prices.
fn full_of(version: u64) -> String {
    format!("price@zone-east/{version:010}.full.pack")
}

/// What a node says of a pack.
#[track_caller]
fn fault_of(node: &Node, pack: &str) -> String {
    let status = node.status();
    let fault = status["errors"].as_array().unwrap().iter().find(|e| e["object"] == pack);
    fault.unwrap_or_else(|| panic!("{} says nothing of {pack}: {status:#}", node.id))["text"]
        .as_str()
        .unwrap()
        .to_owned()
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
            "a foreign key to what is not unique",
            with("CREATE TABLE e (a INTEGER PRIMARY KEY REFERENCES price (price_cents)) STRICT;"),
        ),
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
        let pack = full_of(2 + n as u64);
        for node in [site.relay("0421"), site.register("0421-01")] {
            let begun = Instant::now();
            no_panic(&node.run(&["once"]).code(3).text());
            assert!(begun.elapsed() < PATIENCE, "{}, {what}: {:?}", node.id, begun.elapsed());
            let fault = fault_of(node, &pack);
            assert!(fault.starts_with("BAD_SCHEMA: "), "{}, {what}: {fault}", node.id);
        }
        let mut now = files::rows(&site.store_db("0421-01"));
        now.retain(|table, _| before.contains_key(table) || !table.starts_with("sqlite_"));
        assert_eq!(now, before, "{what}: tables, rows and versions are untouched");
        assert_eq!(site.relay("0421").digests()["price"], good["price"], "{what}");
    }
    v.are_mailed("BAD_SCHEMA: ");
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

/// Good packs that are measured.
const CALM: u64 = 5;

/// Bytes of a pack of a version.
type Bomb<'a> = &'a dyn Fn(u64) -> Vec<u8>;

/// 1,029 bytes from each: the most that gzip can. Inside it may be another. What they cost is measured against a good pack.
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
    // After its section's line, where rows stand, or in its place.
    let line = |version, at, text: String| {
        let mut lines = forge::unpack(&full(site, version, GOOD));
        lines.insert(at, text);
        forge::pack(&lines)
    };
    let (section, row) = (1, 2);
    let nested = forge::pack(&[String::from_utf8_lossy(&zeros[..1000]).into_owned()]);
    let wide: String = (0..400_000).map(|n| format!("\"k{n}\":[],")).collect();
    let bombs: [(&str, &str, Bomb<'_>); 11] = [
        ("zeros", "BAD_LINE", &|_| zeros.clone()),
        ("zeros in a row", "TOO_MUCH", &|v| line(v, row, format!("[\"{}", "0".repeat(100 << 20)))),
        ("a bomb in a bomb", "BAD_LINE", &|_| nested.clone()),
        ("a deep row", "BAD_LINE", &|v| line(v, row, "[".repeat(2_000_000))),
        ("a deep section", "BAD_LINE", &|v| line(v, section, format!("{{\"table\":{}", "[".repeat(2_000_000)))),
        ("a number of a million digits", "BAD_LINE", &|v| line(v, row, format!("[{}]", "9".repeat(1_000_000)))),
        ("an exponent past all reals", "BAD_LINE", &|v| line(v, row, "[\"e\",1e999999999,\"x\"]".into())),
        ("a text of 17 MiB", "TOO_MUCH", &|v| line(v, row, format!("[\"{}\",1,\"x\"]", "x".repeat(17 << 20)))),
        ("a million values", "BAD_LINE", &|v| line(v, row, format!("[\"a\",1,\"x\"{}]", ",1".repeat(1_000_000)))),
        ("400,000 keys in the header, unpacked to less than was declared", "NOT_LISTED", &|v| {
            let mut lines = forge::unpack(&full(site, v, GOOD));
            lines[0] = lines[0].replacen('{', &format!("{{{wide}"), 1);
            forge::pack(&lines)
        }),
        ("keys twice", "BAD_LINE", &|v| {
            line(v, section, "{\"table\":\"price\",\"table\":\"item\",\"op\":\"insert\",\"columns\":[]}".into())
        }),
    ];
    let peak_of = |node: &Node| {
        let cycle = node.spawn(&["once", "--json"], &[]);
        (peak_while(&cycle), cycle.finish(PATIENCE))
    };
    // The greatest of some: a look may miss the top.
    let mut calm = [0; 2];
    for version in 2..2 + CALM {
        site.publish_forged("0421", "price", &full(site, version, GOOD));
        let peaks = [site.relay("0421"), site.register("0421-01")].map(|node| peak_of(node).0);
        calm = [0, 1].map(|n: usize| calm[n].max(peaks[n]));
    }
    for (n, (what, code, make)) in bombs.into_iter().enumerate() {
        let version = 2 + CALM + n as u64;
        let bytes = make(version);
        let unpacked = (bytes.len() as u64 * 200).min(64 << 20);
        let entry = json!({"version": version, "kind": "full", "bytes": bytes.len(), "unpacked": unpacked, "sha256": forge::sha256(&bytes)});
        site.list_pack("0421", "price", &bytes, entry, "{}");
        let begun = Instant::now();
        for (node, calm) in [site.relay("0421"), site.register("0421-01")].into_iter().zip(calm) {
            let (peak, out) = peak_of(node);
            no_panic(&out.text());
            out.code(3);
            let fault = fault_of(node, &full_of(version));
            assert!(fault.starts_with(code), "{}, {what}: {fault}", node.id);
            // A line may have 16 MiB, one that is none is not read to its end.
            let more = if what == "zeros in a row" { 18 << 10 } else { 8 << 10 };
            assert!(peak < calm + more, "{}, {what}: {peak} KiB, a good pack {calm} KiB", node.id);
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
        assert_eq!(rows(site, "0421-01"), good, "{what}");
    }
    v.are_mailed("BAD_LINE: ");
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

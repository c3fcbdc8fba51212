//! The network breaks at every place: registers go on with what they have, take another way, and catch up with the
//! fewest bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tillcast_tests::{Daemon, Net, Nginx, PATIENCE, Proxy, Site, digest, http, quiet_port, temp_dir, until};

fn dead() -> Net {
    Net { refuse: true, ..Net::default() }
}

/// One store's site: bucket, a CDN before it, and breakable lines: CDN to relay, CDN to registers, relay to registers.
struct Lines {
    site: Site,
    cdn: Nginx,
    to_relay: Proxy,
    past_relay: Proxy,
    lan: Proxy,
}

impl Lines {
    fn new(site: Site) -> Lines {
        site.publish();
        let cdn = Nginx::serve(&site.bucket());
        let (to_relay, past_relay) = (Proxy::to(&cdn.url()), Proxy::to(&cdn.url()));
        let lan = Proxy::to(&site.relay("0421").url());
        let mut lines = Lines { site, cdn, to_relay, past_relay, lan };
        let url = format!("['{}']", lines.to_relay.url());
        lines.site.relays.get_mut("0421").unwrap().set("sources", &url);
        for register in lines.site.registers.values_mut() {
            register.set_text("relay", &lines.lan.url());
            register.set("fallback", &format!("['{}']", lines.past_relay.url()));
        }
        lines
    }

    /// Publishes a price of one item, in cents.
    fn price(&self, cents: u64) {
        self.site.sql(&format!("UPDATE price SET price_cents = {cents} WHERE sku = 'SKU0000005'"));
        self.site.publish();
    }

    fn has(&self, register: &str, cents: u64) -> bool {
        let sql = "SELECT price_cents FROM price WHERE sku = 'SKU0000005'";
        self.site.try_read(register, sql).ok().flatten() == Some(cents.to_string())
    }

    fn arrives(&self, cents: u64) {
        for (id, _) in self.site.registers_of("0421") {
            until(PATIENCE, &format!("{cents} arrives at {id}"), || self.has(id, cents));
        }
    }

    fn network(&self, register: &str) -> String {
        self.site.register(register).status()["network"].as_str().unwrap().to_owned()
    }

    /// The packs that were asked for since `from` requests, in order.
    fn packs_since(&self, from: usize) -> Vec<String> {
        let paths = self.cdn.requests().into_iter().skip(from).filter_map(|l| l.split(' ').nth(1).map(str::to_owned));
        paths.filter(|p| p.starts_with("/packs/")).collect()
    }
}

fn one_store() -> tillcast_tests::site::Builder {
    Site::builder().stores(&[("0421", "east")])
}

#[test]
fn a_silent_relay_is_left_for_the_bucket_and_taken_back() {
    // As the relay's silence, a single answer's is shortened: 30 s by default, a quarter of the other.
    let lines = Lines::new(
        one_store().registers(1).agent("source_options.read_timeout", "'2s'").agent("relay_silent", "'8s'").build(),
    );
    let relay = lines.site.relay("0421").start_ready();
    let register = lines.site.register("0421-01").start_ready();
    lines.price(1001);
    lines.arrives(1001);
    until(PATIENCE, "it is in the store", || lines.network("0421-01") == "in-store");
    assert_eq!(lines.past_relay.connections(), 0, "while the relay answers, nobody else is asked");

    // The relay's machine dies, and the store's own line with it; the register has another way out.
    lines.lan.set(dead());
    lines.to_relay.set(dead());
    lines.price(1002);
    lines.arrives(1002);
    until(PATIENCE, "it knows that the relay is down", || lines.network("0421-01") == "online-relay-down");
    assert_eq!(lines.site.register("0421-01").status()["streams"]["price@zone-east"]["state"], "ok");

    // The relay is back, without its line: the register, which is ahead, stays there.
    lines.lan.mend();
    until(PATIENCE, "it is back at the relay", || lines.network("0421-01") == "in-store");
    assert!(lines.has("0421-01", 1002));
    assert_eq!(lines.site.relay("0421").version("price@zone-east"), Some(2));
    assert_eq!(lines.site.register("0421-01").version("price@zone-east"), Some(3));

    // And with it: all goes by the relay again.
    lines.to_relay.mend();
    until(PATIENCE, "the relay catches up", || lines.site.relay("0421").version("price@zone-east") == Some(3));
    let past = lines.past_relay.bytes_down();
    lines.price(1003);
    lines.arrives(1003);
    assert_eq!(lines.past_relay.bytes_down(), past, "nothing went past the relay");
    lines.site.assert_proven("0421");

    // A relay that takes connections and says nothing is as dead.
    lines.lan.set(Net { blackhole: true, ..Net::default() });
    lines.price(1004);
    lines.arrives(1004);
    lines.lan.mend();
    until(PATIENCE, "it is back at the relay", || lines.network("0421-01") == "in-store");
    [register, relay].into_iter().for_each(Daemon::term);
}

#[test]
fn who_sees_whom_is_in_the_status() {
    // A relay on a busy machine is not a silent one.
    let lines = Lines::new(one_store().hq_service().registers(1).agent("relay_silent", "'8s'").build());
    let relay = lines.site.relay("0421").start_ready();
    let register = lines.site.register("0421-01").start_ready();
    let is = |state: &str| until(PATIENCE, state, || lines.network("0421-01") == state);
    let store_is = |state: &str| until(PATIENCE, state, || lines.site.relay("0421").status()["network"] == state);
    // Headquarters is not there yet: data flows all the same.
    is("in-store");
    store_is("in-store");
    lines.price(1001);
    lines.arrives(1001);
    let mut hq = lines.site.hq.start_ready();
    is("online");
    store_is("online");
    // It dies: what is in the bucket still arrives, found by polling, and the status tells since when it is gone.
    hq.kill9();
    lines.price(1002);
    lines.arrives(1002);
    let seen = || lines.site.register("0421-01").status()["hq_seen_s"].as_u64();
    until(PATIENCE, "it tells how long headquarters was not seen", || seen().is_some_and(|s| s >= 3));
    // The relay dies too, then everything.
    lines.lan.set(dead());
    is("online-relay-down");
    lines.past_relay.set(dead());
    is("offline");
    assert!(lines.has("0421-01", 1002), "the register goes on selling");
    // All come back; headquarters is heard of within a heartbeat.
    lines.lan.mend();
    lines.past_relay.mend();
    let hq = lines.site.hq.start_ready();
    is("online");
    lines.price(1003);
    lines.arrives(1003);
    until(PATIENCE, "no fault is left", || lines.site.register("0421-01").status()["errors"] == json!([]));
    [register, relay, hq].into_iter().for_each(Daemon::term);
}

#[test]
fn after_days_of_silence_only_what_is_missing_is_fetched_once() {
    let lines = Lines::new(one_store().items(3000).registers(3).agent("relay_silent", "'8s'").build());
    let site = &lines.site;
    site.relay("0421").run(&["once"]).ok();
    let once = |id: &str, code: i32| drop(site.register(id).run(&["once"]).code(code));
    site.with_relays(|| ["0421-01", "0421-02"].map(|id| once(id, 0)));

    // Everything is dead while headquarters publishes on.
    for line in [&lines.to_relay, &lines.past_relay, &lines.lan] {
        line.set(dead());
    }
    for n in 1..=5 {
        site.sql(&format!("UPDATE item SET department = 90 WHERE sku = 'SKU000000{n}'"));
        lines.price(2000 + n);
    }
    site.relay("0421").run(&["once"]).code(1);
    site.with_relays(|| {
        once("0421-01", 1);
        assert!(!lines.has("0421-01", 2005) && site.read("0421-01", "SELECT count(*) FROM item").unwrap() == "3000");
        // The store's LAN comes back first: a register that is new installs with the WAN down.
        lines.lan.mend();
        once("0421-03", 0);
        assert_eq!(site.read("0421-03", "SELECT count(*) FROM item").unwrap(), "3000");
    });

    // The line is back: the relay fetches each missing delta once, and no full.
    let mut wanted: Vec<String> = ["catalog@all", "price@zone-east"]
        .iter()
        .flat_map(|s| (2..=6).map(move |n| format!("/packs/{s}/{n:010}.delta.pack")))
        .collect();
    wanted.sort();
    let sorted = |mut packs: Vec<String>| {
        packs.sort();
        packs
    };
    let before = lines.cdn.requests().len();
    lines.to_relay.mend();
    site.relay("0421").run(&["once"]).ok();
    // The server writes its log after it has answered.
    let fetched = |before| {
        until(PATIENCE, "the log has all", || lines.packs_since(before).len() >= wanted.len());
        sorted(lines.packs_since(before))
    };
    assert_eq!(fetched(before), wanted);
    // So do registers, by the relay and past it.
    let full: u64 = site.manifest("0421")["streams"]["catalog"]["packs"][0]["bytes"].as_u64().unwrap();
    site.with_relays(|| {
        let before = lines.lan.bytes_down();
        once("0421-01", 0);
        let took = lines.lan.bytes_down() - before;
        assert!(took < full / 2, "{took} bytes, where a full is {full}");
        lines.lan.set(dead());
        lines.past_relay.mend();
        let before = lines.cdn.requests().len();
        once("0421-02", 0);
        assert_eq!(fetched(before), wanted);
        lines.lan.mend();
        once("0421-03", 0);
    });
    site.assert_proven("0421");
    // And once there, nothing is fetched again.
    let before = lines.cdn.requests().len();
    site.relay("0421").run(&["once"]).ok();
    assert_eq!(lines.packs_since(before), Vec::<String>::new());
}

/// A change of many rows that hardly shrink when packed; the bytes of its delta.
fn large_change(site: &Site) -> u64 {
    let rows = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 4999)
        INSERT INTO item SELECT printf('BIG%07d', i), hex(randomblob(40)), 1 + i % 90, NULL, hex(randomblob(60)) FROM n";
    site.model().execute_batch(rows).unwrap();
    site.publish();
    let (name, pack) = site.head_pack("0421", "catalog");
    assert!(name.ends_with(".delta.pack") && pack.len() > 400_000, "{name}: {}", pack.len());
    pack.len() as u64
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_was() {
    let lines = Lines::new(one_store().registers(1).build());
    let site = &lines.site;
    site.relay("0421").run(&["once"]).ok();
    let size = large_change(site);
    let (before, asked) = (lines.to_relay.bytes_down(), lines.cdn.requests().len());
    lines.to_relay.set(Net { cut_after: Some(90_000), ..Net::default() });
    let mut cuts = 0;
    while site.relay("0421").run(&["once"]).code != Some(0) {
        cuts += 1;
        assert!(cuts < 40, "it does not get on");
    }
    lines.to_relay.mend();
    let requests: Vec<String> = lines.cdn.requests().into_iter().skip(asked).collect();
    let of_pack: Vec<&String> = requests.iter().filter(|l| l.contains(".delta.pack")).collect();
    let resumed =
        of_pack.iter().filter(|l| l.split(' ').nth(4).is_some_and(|range| range.starts_with("bytes="))).count();
    assert!(of_pack.len() >= 5 && resumed + 1 >= of_pack.len(), "{of_pack:#?}");
    // What came down, less the small objects and all heads.
    let bodies = |l: &String| l.split(' ').nth(3).unwrap().parse::<u64>().unwrap();
    let small: u64 = requests.iter().filter(|l| !l.contains(".delta.pack")).map(bodies).sum();
    let came = lines.to_relay.bytes_down() - before;
    let most = size + size / 20 + small + 600 * requests.len() as u64;
    assert!(came >= size && came <= most, "{came} bytes came for {size} (at most {most}):\n{requests:#?}");

    // A register that is killed on the way goes on, too.
    site.with_relays(|| {
        let register = site.register("0421-01");
        lines.lan.set(Net { rate: Some(100_000), ..Net::default() });
        let before = lines.lan.bytes_down();
        let full: u64 = site.manifest("0421")["streams"]
            .as_object()
            .unwrap()
            .values()
            .map(|s| s["packs"][0]["bytes"].as_u64().unwrap())
            .sum();
        let mut cycle = register.spawn(&["once"], &[]);
        until(PATIENCE, "half of it is there", || lines.lan.bytes_down() - before > full + size / 2);
        cycle.process.kill9();
        lines.lan.mend();
        register.run(&["once"]).ok();
        let came = lines.lan.bytes_down() - before;
        let small = 2 * serde_json::to_vec(&site.manifest("0421")).unwrap().len() as u64 * 2 + 16_000;
        // Four fulls and one delta were wanted; 64 KiB may have been on their way into the killed process.
        let most = full + size + size / 20 + small + 65_536;
        assert!(came <= most, "{came} bytes came for {full} and {size} (at most {most})");
    });
    site.assert_proven("0421");
}

/// A bit flips on the line once: the download is refused, and taken from there again without a fault of the pack.
#[test]
fn bytes_bent_on_the_line_are_never_applied() {
    let lines = Lines::new(one_store().registers(1).build());
    let site = &lines.site;
    site.relay("0421").run(&["once"]).ok();
    large_change(site);
    lines.to_relay.set(Net { corrupt_at: Some(200_000), ..Net::default() });
    let once = site.relay("0421").run(&["once"]);
    assert_ne!(once.code, Some(0), "{}", once.text());
    assert_eq!(site.relay("0421").version("catalog@all"), Some(1), "the version before is served");
    lines.to_relay.mend();
    site.relay("0421").run(&["once"]).ok();
    site.with_relays(|| site.register("0421-01").run(&["once"]).ok());
    site.assert_proven("0421");
}

#[test]
fn a_hold_keeps_the_rows_until_it_ends() {
    let lines = Lines::new(one_store().registers(1).build());
    let relay = lines.site.relay("0421").start_ready();
    let register = lines.site.register("0421-01").start_ready();
    lines.price(3000);
    lines.arrives(3000);
    let api = format!("{}/v1/hold", lines.site.register("0421-01").url());
    let hold = |seconds: u64| {
        let body = json!({ "seconds": seconds }).to_string();
        http::post(&api, "application/json", body.as_bytes()).expect_status(200).json()
    };
    let waits = || lines.site.register("0421-01").status()["streams"]["price@zone-east"]["state"] == "waiting";

    // A sale is open: the new version is fetched, and waits.
    let answer = hold(600);
    assert_eq!(answer["settled"], true);
    assert!(answer["held_s"].as_u64().unwrap() > 590);
    lines.price(3001);
    let is_served = || {
        let [served, held] =
            [lines.site.relay("0421"), lines.site.register("0421-01")].map(|n| n.version("price@zone-east"));
        served > held
    };
    until(PATIENCE, "it is served, and waits", || is_served() && waits());
    // It asks again and again meanwhile, and still applies nothing.
    let polls = lines.lan.bytes_up();
    until(PATIENCE, "some more looks", || lines.lan.bytes_up() > polls + 2000);
    assert!(lines.has("0421-01", 3000));
    assert_eq!(http::delete(&api).expect_status(200).json()["held_s"], 0);
    lines.arrives(3001);

    // Nobody ends it: it ends by itself, not before.
    let (begun, seconds) = (Instant::now(), 4);
    hold(seconds);
    lines.price(3002);
    lines.arrives(3002);
    assert!(
        begun.elapsed() >= Duration::from_millis(seconds * 1000 - 200),
        "applied under the hold: {:?}",
        begun.elapsed()
    );

    // At most 15 minutes, whatever is asked; nonsense is refused; a dead agent holds nothing.
    assert!(hold(1_000_000)["held_s"].as_u64().unwrap() <= 900);
    for bad in ["{\"seconds\":0}", "{\"seconds\":-1}", "{}", "x"] {
        http::post(&api, "application/json", bad.as_bytes()).expect_status(400);
    }
    lines.price(3003);
    until(PATIENCE, "it knows of the new version", waits);
    drop(register);
    let register = lines.site.register("0421-01").start_ready();
    lines.arrives(3003);
    [register, relay].into_iter().for_each(Daemon::term);
}

/// What the POS application sees in one read: the least and the greatest price, how many, and the version.
fn look(db: &rusqlite::Connection) -> rusqlite::Result<(i64, i64, i64, i64)> {
    let sql = "SELECT min(price_cents), max(price_cents), count(*),
        (SELECT version FROM tillcast_stream WHERE stream = 'price') FROM price";
    db.query_row(sql, [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?)))
}

#[test]
fn a_pos_application_reads_whole_versions_all_the_while() {
    const ITEMS: i64 = 2000;
    let site = one_store().registers(1).items(2000).hq_service().build();
    let set_all = |cents: i64| site.sql(&format!("UPDATE price SET price_cents = {cents}"));
    set_all(1000);
    site.publish();
    let hq = site.hq.start_ready();
    let relay = site.relay("0421").start_ready();
    let mut register = Some(site.register("0421-01").start_ready());
    let db = site.store_db("0421-01");
    until(PATIENCE, "the first install", || {
        site.try_read("0421-01", "SELECT count(*) FROM price").is_ok_and(|c| c == Some(ITEMS.to_string()))
    });

    let stop = AtomicBool::new(false);
    let (reads, longest, seen) = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let pos = digest::open_read_only(&db);
            // Who would have to wait for somebody is refused.
            pos.busy_timeout(Duration::ZERO).unwrap();
            let (mut reads, mut longest, mut seen) = (0u64, Duration::ZERO, Vec::new());
            let mut last = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let (least, greatest, rows, version) = look(&pos).expect("the POS application is never refused");
                longest = longest.max(begun.elapsed());
                assert_eq!((least, rows), (greatest, ITEMS), "a half version at {version}");
                assert!((version, least) >= last, "back from {last:?} to {version}, {least}");
                if (version, least) != last {
                    seen.push(least);
                    last = (version, least);
                }
                reads += 1;
            }
            (reads, longest, seen)
        });
        // Deltas, fulls, and an agent that is killed at whatever it does.
        for n in 1..=8i64 {
            set_all(1000 + n);
            site.hq.run(if n % 3 == 0 { &["publish", "--full"] } else { &["publish"] }).ok();
            if n % 4 == 0 {
                register.take().unwrap().kill9();
                register = Some(site.register("0421-01").start_ready());
            }
            if n % 2 == 0 {
                until(PATIENCE, "the version arrives", || {
                    reader.is_finished()
                        || site.read("0421-01", "SELECT max(price_cents) FROM price") == Some((1000 + n).to_string())
                });
            }
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(reads > 100 && seen.len() >= 4 && seen.is_sorted(), "{reads} reads, {seen:?}");
    assert!(longest < Duration::from_secs(30), "one read took {longest:?}");
    site.assert_proven("0421");
    let rows: Value = site.register("0421-01").json(&["verify"]);
    assert_eq!(rows["drift"], false);
    [register.unwrap(), relay, hq].into_iter().for_each(Daemon::term);
}

/// Copies a directory with all below it, over what is there.
fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn of_several_sources_each_gives_what_it_has_right() {
    let mut site = one_store().registers(1).build();
    site.publish();
    let mirror = temp_dir("mirror");
    copy_tree(&site.bucket(), mirror.path());
    let change = |site: &Site, cents: u64| {
        site.sql(&format!("UPDATE price SET price_cents = {cents} WHERE sku = 'SKU0000005'"));
        site.publish();
    };
    // The first is dead, the second a copy of yesterday, the third is right.
    change(&site, 1001);
    let nobody = format!("http://127.0.0.1:{}", quiet_port());
    let sources = format!("['{nobody}', 'file://{}', 'file://{}']", mirror.path().display(), site.bucket().display());
    site.relays.get_mut("0421").unwrap().set("sources", &sources);
    site.relay("0421").run(&["once"]).code(3).says(&[&nobody]);
    assert_eq!(site.relay("0421").version("price@zone-east"), Some(2));
    // The copy caught up, but for one pack, which is damaged there: it is taken elsewhere, and is no pack in error.
    change(&site, 1002);
    copy_tree(&site.bucket(), mirror.path());
    let (name, mut pack) = site.head_pack("0421", "price");
    pack[20] ^= 1;
    fs::write(mirror.path().join(&name), &pack).unwrap();
    let report = site.relay("0421").run(&["once", "--json"]).code(3).json();
    assert!(!report["status"]["errors"].to_string().contains("PACK_IN_ERROR"), "{report:#}");
    assert_eq!(site.relay("0421").version("price@zone-east"), Some(3));
    site.with_relays(|| drop(site.register("0421-01").run(&["once"]).ok()));
    site.assert_proven("0421");
}

/// Whoever stands between without a certificate that is trusted, or with one of another name, is not listened to.
#[test]
fn a_source_is_only_read_over_tls_by_a_certificate_that_holds() {
    let mut site = one_store().registers(1).build();
    site.publish();
    let right = Nginx::tls(&site.bucket(), "IP:127.0.0.1");
    let other = Nginx::tls(&site.bucket(), "DNS:hq.example.com");
    let cases = [(&right, None), (&other, Some(&other)), (&right, Some(&other)), (&right, Some(&right))];
    for (n, (server, trusted)) in cases.into_iter().enumerate() {
        let relay = site.relays.get_mut("0421").unwrap();
        relay.set("sources", &format!("[\"{}\"]", server.tls_url()));
        match trusted {
            Some(of) => relay.set_text("source.ca_file", of.ca().to_str().unwrap()),
            None => relay.unset("source.ca_file"),
        }
        let served = site.relay("0421").dir.join("data/ok/packs");
        if n < 3 {
            site.relay("0421").run(&["once"]).code(1).says(&["SOURCE", "certificate"]);
            assert!(is_empty(&served), "{n}: it took something");
            assert!(server.requests().is_empty(), "{n}: it asked for something");
        } else {
            site.relay("0421").run(&["once"]).ok();
            assert!(!is_empty(&served));
        }
    }
    site.with_relays(|| site.register("0421-01").run(&["once"]).ok());
    site.assert_proven("0421");
}

/// Whether no pack lies there.
fn is_empty(dir: &Path) -> bool {
    tillcast_tests::files::tree(dir).is_empty()
}

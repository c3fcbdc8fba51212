//! Machines on the store's LAN: a relay that is none and answers first, registers that are none, and copied words.

use super::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tillcast_tests::{Asked, Daemon, Liar, PATIENCE, Say, Smtp, Watch, http, until};

/// One register that takes a liar for its relay, while the store's own serves on.
struct Lan {
    site: Site,
    liar: Liar,
    relay: Daemon,
}

impl Lan {
    fn new(site: Builder) -> Lan {
        let mut site = site.build();
        site.publish();
        let relay = site.relay("0421").start_ready();
        let url = site.relay("0421").url();
        let liar = Liar::start(move |_| Say::As(url.clone()));
        let register = site.registers.get_mut("0421-01").unwrap();
        register.set_text("relay", &liar.url());
        register.set("fallback", "[]");
        until(PATIENCE, "the relay serves", || site.relay("0421").digests() == site.expected("0421"));
        site.register("0421-01").run(&["once"]).ok();
        assert_eq!(rows(&site, "0421-01"), site.expected("0421"));
        Lan { site, liar, relay }
    }

    fn relay_has(&self) {
        let head = self.site.version("0421", "price");
        let relay = self.site.relay("0421");
        until(PATIENCE, "the relay follows", || relay.version("price@zone-east") == Some(head));
    }

    /// What the liar says to paths with this part; else it passes on.
    fn lie(&self, part: &'static str, say: Say) {
        let url = self.site.relay("0421").url();
        self.liar.now(move |a| if a.target.contains(part) { say.clone() } else { Say::As(url.clone()) });
    }

    fn honest(&self) {
        let url = self.site.relay("0421").url();
        self.liar.now(move |_| Say::As(url.clone()));
    }
}

/// What comes of a lie.
enum Comes {
    /// The newest version all the same.
    New,
    /// Nothing: the exit of `once`, and what it says.
    Nothing(i32, &'static str),
}
use Comes::{New, Nothing};

/// Name, path, answer and end of each.
fn lies() -> Vec<(&'static str, &'static str, Say, Comes)> {
    let deep = "[".repeat(200_000);
    let keys: String = (0..60_000).map(|n| format!("\"price@zone-a{n}\":1,")).collect();
    let answer = |seen: &str, now: &str| format!("{{\"hq_seen_s\":{seen},\"now\":\"{now}\",\"refused\":{{}}}}");
    let errors = json!([
        {"code": "PACK_IN_ERROR", "object": "../../../etc/passwd", "text": "x", "since": "2026-01-01T00:00:00Z"},
        {"code": "PACK_IN_ERROR", "object": "price@zone-east/0000000002.delta.pack", "text": "x", "since": "2026-01-01T00:00:00Z"}
    ]);
    let location = |to: &str| Say::Whole(302, format!("location: {to}\r\n"), Vec::new());
    let v = "/v1/versions";
    let untold = |why| Nothing(1, why);
    vec![
        ("versions far ahead", v, Say::ok("{\"price@zone-east\":9223372036854775807,\"evil@all\":3}"), New),
        ("versions behind", v, Say::ok("{\"price@zone-east\":1}"), Nothing(0, "")),
        ("no versions", v, Say::ok("{}"), Nothing(3, "the relay does not serve it yet")),
        (
            "numbers past all types",
            v,
            Say::ok(format!("{{\"price@zone-east\":1{}}}", "0".repeat(5000))),
            untold("not a list of versions"),
        ),
        ("names with paths", v, Say::ok("{\"../../x@all\":1}"), Nothing(3, "the relay does not serve it yet")),
        ("a JSON bomb, deep", v, Say::ok(deep.clone()), untold("not a list of versions")),
        (
            "a JSON bomb, wide",
            v,
            Say::ok(format!("{{{keys}\"price@zone-east\":1}}")),
            untold("more than 1048576 bytes"),
        ),
        (
            "the same key again and again",
            v,
            Say::ok(format!("{{{}\"price@zone-east\":1}}", "\"price@zone-east\":7,".repeat(9000))),
            Nothing(0, ""),
        ),
        ("more than a poll may bring", v, Say::ok(vec![b' '; 2 << 20]), untold("more than 1048576 bytes")),
        ("no end", v, Say::Endless(false), untold("more than 1048576 bytes")),
        (
            "a web page",
            v,
            Say::Whole(200, "content-type: text/html\r\n".into(), b"<html>log in</html>".to_vec()),
            untold("captive portal"),
        ),
        ("another page", v, location("http://127.0.0.1:1/v1/versions"), untold("Connection refused")),
        ("a file", v, location("file:///etc/passwd"), untold("302 Found")),
        ("another scheme", v, location("https://127.0.0.1:1/"), untold("redirects to another scheme")),
        ("itself for ever", v, location("/v1/versions"), untold("redirects more than 5 times")),
        (
            "come back in 500 years",
            v,
            Say::Whole(503, "retry-after: 18446744073709551615\r\n".into(), Vec::new()),
            Nothing(1, "asks to be left alone"),
        ),
        ("500", "/", Say::Whole(500, String::new(), b"evil".to_vec()), Nothing(1, "the server answers 500")),
        ("401", "/", Say::Whole(401, String::new(), b"evil".to_vec()), Nothing(1, "the server answers 401")),
        ("silence", "/", Say::Nothing, Nothing(1, "no answer within 2 s")),
        (
            "a manifest of nobody",
            "manifest.json",
            Say::ok("{\"payloadType\":\"x\",\"payload\":\"e30=\",\"signatures\":[]}"),
            Nothing(3, "OTHER_PAYLOAD_TYPE"),
        ),
        ("a deep manifest", "manifest.json", Say::ok(deep), Nothing(3, "NOT_AN_ENVELOPE")),
        ("errors with paths, and the good pack given up", "/v1/errors", Say::ok(errors.to_string()), New),
        (
            "headquarters was never seen",
            "/v1/heartbeats",
            Say::ok(answer("18446744073709551615", "2026-01-01T00:00:00Z")),
            New,
        ),
        ("a clock at the end of time", "/v1/heartbeats", Say::ok(answer("0", "9999-12-30T22:00:00Z")), New),
        ("a clock before all time", "/v1/heartbeats", Say::ok(answer("0", "-009999-01-02T01:59:59Z")), New),
        (
            "a drip of versions",
            v,
            Say::Drip(b"{".to_vec(), Duration::from_millis(200)),
            untold("slower than 1024 bytes/s"),
        ),
    ]
}

#[test]
fn a_rogue_relay_delays_and_alters_nothing() {
    let (mut watch, site) = Watch::over(small());
    let lan = Lan::new(site.relay("heartbeat", "'1s'"));
    let site = &lan.site;
    watch.start(site);
    for (what, part, say, comes) in lies() {
        let before = rows(site, "0421-01");
        news(site);
        lan.relay_has();
        // Who is honest has all the time that it needs.
        let short = [("TILLCAST__SOURCE_OPTIONS__READ_TIMEOUT", "2s")];
        let env: &[_] = if matches!(say, Say::Nothing | Say::Drip(..)) { &short } else { &[] };
        lan.lie(part, say);
        let begun = Instant::now();
        let out = site.register("0421-01").run_env(&["once", "--json"], env);
        no_panic(&out.text());
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
        let (exit, told, held) = match comes {
            New => (0, "", site.expected("0421")),
            Nothing(exit, told) => (exit, told, before),
        };
        assert_eq!(out.code, Some(exit), "{what}: {}", out.text());
        assert!(out.text().contains(told), "{what}: {}", out.text());
        assert_eq!(rows(site, "0421-01"), held, "{what}");
        lan.honest();
        site.register("0421-01").run(&["once"]).ok();
        assert_eq!(rows(site, "0421-01"), site.expected("0421"), "{what}: good news arrive afterwards");
    }
    // One that goes on for long is told: the register's heartbeats say what it holds.
    lan.lie("manifest.json", Say::Whole(404, String::new(), Vec::new()));
    news(site);
    lan.relay_has();
    let once = || drop(site.register("0421-01").run(&["once"]));
    watch.tells("Register 0421-01 does not get what is published", once);
    lan.honest();
    watch.is_calm(once);
    lan.relay.term();
}

/// Ever new lists, at once: the register neither spins nor wears out its disk.
#[test]
fn a_relay_that_always_has_news_is_not_asked_without_pause() {
    let lan = Lan::new(small());
    let n = Arc::new(AtomicU64::new(1));
    let url = lan.site.relay("0421").url();
    lan.liar.now(move |a: &Asked| {
        let n = n.fetch_add(1, Ordering::Relaxed);
        let etag = format!("etag: \"{n}\"\r\n");
        match a.target.as_str() {
            t if t.starts_with("/v1/versions") => {
                Say::Whole(200, etag, format!("{{\"price@zone-east\":1,\"evil@all\":{n}}}").into())
            }
            t if t.starts_with("/v1/errors") => {
                let object = format!("price@zone-east/{n:010}.full.pack");
                Say::ok(
                    json!([{"code": "PACK_IN_ERROR", "object": object, "text": "x", "since": "2026-01-01T00:00:00Z"}])
                        .to_string(),
                )
            }
            _ => Say::As(url.clone()),
        }
    });
    let asked = || lan.liar.asked().iter().filter(|a| a.target.starts_with("/v1/versions")).count();
    let before = asked();
    let register = lan.site.register("0421-01").start_ready();
    until(PATIENCE, "it asks", || asked() > before + 2);
    let (begun, from) = (Instant::now(), asked());
    until(PATIENCE, "some time goes by", || begun.elapsed() >= Duration::from_secs(4));
    let (polls, most) = (asked() - from, 8 + begun.elapsed().as_secs() * 2 + 4);
    assert!(polls as u64 <= most, "{polls} polls, at most {most}");
    lan.honest();
    news(&lan.site);
    until(PATIENCE, "good news arrive", || rows(&lan.site, "0421-01") == lan.site.expected("0421"));
    register.term();
    lan.relay.term();
}

/// The rogue relay swallows heartbeats and says thanks; then it plays the last one to the real relay again and
/// again, so that nobody misses the register.
#[test]
fn copied_heartbeats_keep_no_dead_register_alive() {
    let smtp = Smtp::start();
    let site = small().registers(2).mail(&smtp).hq_service();
    let site = site.hq("serve.alert_tick", "'200ms'").hq("alerts.register_silent", "'6s'");
    let lan = Lan::new(site);
    let hq = lan.site.hq.start_ready();
    let relay_url = lan.site.relay("0421").url();
    let copied: Arc<Mutex<Vec<u8>>> = Arc::default();
    let (copy, url) = (copied.clone(), relay_url.clone());
    lan.liar.now(move |a| {
        if a.method == "POST" {
            *copy.lock().unwrap() = a.body.clone();
        }
        Say::As(url.clone())
    });
    let register = lan.site.register("0421-01").start_ready();
    let heard = || {
        let status = lan.site.hq.status();
        let device = status["devices"].as_array().unwrap().iter().find(|d| d["id"] == "0421-01").cloned();
        device.and_then(|d| d["heard_s"].as_u64())
    };
    until(PATIENCE, "headquarters hears it", || heard().is_some());
    until(PATIENCE, "a copy", || !copied.lock().unwrap().is_empty());
    drop(register);
    // The last one: its number is the one that the relay knows.
    let copied = copied.lock().unwrap().clone();
    let replay = |change: &dyn Fn(&mut Value)| {
        let mut beats: Value = serde_json::from_slice(&copied).unwrap();
        change(&mut beats["beats"][0]);
        let reply =
            http::post(&format!("{relay_url}/v1/heartbeats"), "application/json", &serde_json::to_vec(&beats).unwrap());
        assert_eq!(reply.status, 200, "{}", reply.text());
    };
    let silent = "[Tillcast] Register 0421-01 is silent";
    until(PATIENCE, "headquarters misses the register all the same", || {
        replay(&|_| {});
        smtp.mails().iter().any(|m| m.subject == silent)
    });
    // An age that nobody signed, and that no clock can hold.
    replay(&|b| b["seen_s"] = u64::MAX.into());
    let begun = Instant::now();
    until(PATIENCE, "some time goes by", || begun.elapsed() >= Duration::from_secs(2));
    assert_eq!(http::get(&relay_url).status, 200);
    // Its own name on another's word, another's word under its name, a word that is nobody's.
    let key = taken_key(&lan.site, "0421-02");
    let serial = lan.site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay knows the key", || lan.site.relay("0421").status()["serial"] == serial);
    let says = |beat: Value| http::post(&format!("{relay_url}/v1/heartbeats"), "application/json", &post(&[beat]));
    assert_eq!(says(beat("0421-02", 1, &key, json!([]))).status, 200);
    for evil in [
        beat("0421-01", 1 << 40, &key, json!([])),
        beat("0421-02", 1 << 40, &forge::strange_key(3), json!([])),
        beat("0421-77", 1, &key, json!([])),
    ] {
        assert_eq!(says(evil).status, 401);
    }
    assert!(says(beat("0421", 1, &key, json!([]))).text().contains("only registers"));
    // The relay is well, and so is whoever comes back.
    assert_eq!(http::get(&relay_url).status, 200);
    assert!(lan.site.relay("0421").status()["errors"].as_array().unwrap().is_empty());
    assert_eq!(rows(&lan.site, "0421-01"), lan.site.expected("0421"), "who is dead keeps its rows");
    let register = lan.site.register("0421-01").start_ready();
    until(PATIENCE, "it is heard again", || {
        smtp.mails().iter().any(|m| m.subject.contains("Recovered: Register 0421-01"))
    });
    news(&lan.site);
    until(PATIENCE, "good news arrive", || rows(&lan.site, "0421-01") == lan.site.expected("0421"));
    [register, lan.relay, hq].into_iter().for_each(Daemon::term);
}

/// Bodies that are no heartbeats, so many in one post, and so long a text.
#[track_caller]
fn bombs_are_refused(url: &str, many: usize, long: usize) {
    let many = vec![beat("0421-x1", 1, &forge::strange_key(9), json!([])); many];
    let deep = format!("{{\"beats\":{}1{}}}", "[".repeat(400_000), "]".repeat(400_000));
    let wide: String = (0..50_000).map(|n| format!("\"k{n}\":{n},")).collect();
    for (what, status, body) in [
        ("too many", 413, post(&many)),
        ("deep", 400, deep.into_bytes()),
        ("wide", 400, format!("{{{wide}\"x\":1}}").into_bytes()),
        (
            "a number past all types",
            400,
            format!("{{\"beats\":[{{\"seen_s\":1{}}}]}}", "0".repeat(100_000)).into_bytes(),
        ),
        ("a long text", 413, vec![b'"'; long]),
        ("bytes", 400, (0..=255u8).cycle().take(10_000).collect()),
        ("nothing", 400, Vec::new()),
    ] {
        // What is too long may be cut before it was sent.
        match http::try_request("POST", url, &[("content-type", "application/json")], &body) {
            Ok(reply) => assert_eq!(reply.status, status, "{what}: {}", reply.text()),
            Err(e) => assert_eq!(status, 413, "{what}: {e}"),
        }
    }
}

/// `serve` refuses the same bodies, takes nobody's word, and hears who is somebody.
#[test]
fn bombs_and_strangers_keep_headquarters_from_nothing() {
    let lan = Lan::new(small().hq_service());
    let mut hq = lan.site.hq.start_ready();
    let url = format!("{}/v1/heartbeats", lan.site.hq.url());
    bombs_are_refused(&url, 4097, 5 << 20);
    let stranger = beat("0421-x1", 1, &forge::strange_key(9), json!([]));
    for _ in 0..20 {
        let reply = http::post(&url, "application/json", &post(std::slice::from_ref(&stranger))).expect_status(200);
        assert_eq!(reply.json()["refused"].as_object().map(serde_json::Map::len), Some(1), "{}", reply.text());
    }
    assert!(hq.peak_memory_kib() < 200 << 10, "{} KiB", hq.peak_memory_kib());
    hq.wait_until("it lives", || http::try_get(&lan.site.hq.url()).is_some_and(|r| r.status == 200));
    no_panic(&hq.process.log_text());
    until(PATIENCE, "the store is heard", || {
        let status = lan.site.hq.status();
        let mut devices = status["devices"].as_array().unwrap().iter();
        devices.any(|d| d["id"] == "0421" && d["heard_s"].is_u64())
    });
    news(&lan.site);
    lan.relay_has();
    lan.site.register("0421-01").run(&["once"]).ok();
    assert_eq!(rows(&lan.site, "0421-01"), lan.site.expected("0421"), "good news arrive");
    [lan.relay, hq].into_iter().for_each(Daemon::term);
}

/// Unknown registers, floods of them, and bodies that are bombs: refused, and the bucket is not asked more often.
#[test]
fn floods_of_unknown_heartbeats_cost_little() {
    let mut lan = Lan::new(small().relay("poll", "'60s'").relay("http.per_ip", "64"));
    let bucket = tillcast_tests::Nginx::serve(&lan.site.bucket());
    let relay = lan.site.relays.get_mut("0421").unwrap();
    relay.set("sources", &format!("['{}']", bucket.url()));
    lan.relay.term();
    let mut relay = lan.site.relay("0421").start_ready();
    let url = format!("{}/v1/heartbeats", lan.site.relay("0421").url());
    until(PATIENCE, "its first look is over", || bucket.requests().iter().any(|r| r.contains("manifest.json")));
    let (looks, begun) = (bucket.requests().len(), Instant::now());
    let strange = forge::strange_key(9);
    for n in 0..150 {
        let beats: Vec<Value> = (0..16).map(|i| beat(&format!("0421-x{i}"), n, &strange, json!([]))).collect();
        assert_eq!(http::post(&url, "application/json", &post(&beats)).status, 401);
    }
    let most = 2 + begun.elapsed().as_secs() / 5 * 2 + 2;
    let looked = bucket.requests().len() - looks;
    assert!(looked as u64 <= most, "{looked} requests to the bucket, at most {most}");
    bombs_are_refused(&url, 17, 3 << 20);
    assert!(relay.peak_memory_kib() < 200 << 10, "{} KiB", relay.peak_memory_kib());
    relay.wait_until("it lives", || http::try_get(&lan.site.relay("0421").url()).is_some());
    no_panic(&relay.process.log_text());
    news(&lan.site);
    // An unknown register makes it look: this is how a new one is known within seconds.
    until(PATIENCE, "good news arrive", || {
        http::post(&url, "application/json", &post(&[beat("0421-x1", 1, &strange, json!([]))]));
        lan.site.relay("0421").digests() == lan.site.expected("0421")
    });
    lan.site.register("0421-01").run(&["once"]).ok();
    assert_eq!(rows(&lan.site, "0421-01"), lan.site.expected("0421"));
    relay.term();
}

//! HTTP as no browser speaks it: requests that two readers would understand differently, and paths that lead out.

use super::*;
use std::time::Duration;
use tillcast_tests::liar::talk;
use tillcast_tests::{PATIENCE, http, until};

/// What is a second request, and answered, if the first was understood wrongly.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";

fn corpus() -> Vec<(&'static str, Vec<u8>)> {
    let post = |headers: &str, body: &str| format!("POST /v1/heartbeats HTTP/1.1\r\nhost: x\r\n{headers}\r\n{body}");
    let s = SMUGGLED;
    let n = s.len();
    let texts = vec![
        ("length and chunks", post("content-length: 4\r\ntransfer-encoding: chunked\r\n", &format!("0\r\n\r\n{s}"))),
        ("chunks and length", post("transfer-encoding: chunked\r\ncontent-length: 4\r\n", &format!("0\r\n\r\n{s}"))),
        ("two lengths", post(&format!("content-length: 0\r\ncontent-length: {n}\r\n"), s)),
        ("a list of lengths", post(&format!("content-length: 0, {n}\r\n"), s)),
        ("a signed length", post("content-length: +0\r\n", s)),
        ("a negative length", post("content-length: -1\r\n", s)),
        ("a length in hex", post("content-length: 0x0\r\n", s)),
        ("a length past all types", post("content-length: 18446744073709551616\r\n", s)),
        ("a blank before the colon", post("content-length : 0\r\n", s)),
        ("a folded header", post("content-length:\r\n 0\r\n", s)),
        ("chunks with a tab", post("transfer-encoding:\tchunked\r\n", &format!("0\r\n\r\n{s}"))),
        ("chunks, and what is none", post("transfer-encoding: chunked, identity\r\n", &format!("0\r\n\r\n{s}"))),
        ("chunks in another word", post("transfer-encoding: xchunked\r\n", &format!("0\r\n\r\n{s}"))),
        (
            "chunks twice",
            post("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", &format!("0\r\n\r\n{s}")),
        ),
        ("a chunk past all types", post("transfer-encoding: chunked\r\n", &format!("ffffffffffffffff1\r\n{s}"))),
        ("a negative chunk", post("transfer-encoding: chunked\r\n", &format!("-1\r\n{s}"))),
        (
            "an endless chunk extension",
            post("transfer-encoding: chunked\r\n", &format!("0;{}\r\n\r\n{s}", "x".repeat(100_000))),
        ),
        ("a chunk with a bare LF", post("transfer-encoding: chunked\r\n", &format!("0\n\n{s}"))),
        (
            "a body on a GET",
            format!("GET /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{s}"),
        ),
        ("a NUL in a header", post("x: a\0b\r\n", "")),
        ("a CR in a header", post("x: a\rcontent-length: 0\r\n", "")),
        ("a NUL in the path", "GET /nothing\0 HTTP/1.1\r\nhost: x\r\n\r\n".into()),
        ("a blank in the path", "GET /nothing x HTTP/1.1\r\nhost: x\r\n\r\n".into()),
        ("no version", "GET /nothing\r\n\r\n".into()),
        ("HTTP/0.9", "GET /nothing HTTP/0.9\r\n\r\n".into()),
        ("HTTP/2 without asking", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
        ("TLS", "\x16\x03\x01\x02\0\x01\0\x01\u{fc}\x03\x03".into()),
        ("a proxy's CONNECT", "CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1:22\r\n\r\n".into()),
        ("a proxy's GET", "GET http://127.0.0.1:22/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".into()),
        ("TRACE", "TRACE / HTTP/1.1\r\nhost: x\r\ncookie: secret\r\nconnection: close\r\n\r\n".into()),
        ("an upgrade", "GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: h2c\r\n\r\n".into()),
        ("a long name", post(&format!("{}: 1\r\n", "a".repeat(70_000)), "")),
        ("a long value", post(&format!("x: {}\r\n", "a".repeat(1 << 20)), "")),
        ("ten thousand headers", post(&"x: y\r\n".repeat(10_000), "")),
        ("a long path", format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(100_000))),
        ("a long method", format!("{} / HTTP/1.1\r\nhost: x\r\n\r\n", "A".repeat(100_000))),
        ("blank lines without end", "\r\n".repeat(50_000)),
        ("bare LFs", format!("GET /nothing HTTP/1.1\nhost: x\ncontent-length: {n}\n\n{s}")),
    ];
    let mut all: Vec<(&str, Vec<u8>)> = texts.into_iter().map(|(what, text)| (what, text.into_bytes())).collect();
    all.push((
        "bytes that are no UTF-8",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: \xff\r\nx: \x80\r\nconnection: close\r\n\r\n".to_vec(),
    ));
    all.push(("noise", (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()));
    all
}

#[test]
fn nothing_is_smuggled_behind_a_request() {
    let site = small().hq("serve.http.head_timeout", "'1s'").relay("http.head_timeout", "'1s'");
    let site = site
        .hq("serve.http.body_timeout", "'1s'")
        .relay("http.body_timeout", "'1s'")
        .agent("http.head_timeout", "'1s'")
        .build();
    site.publish();
    let mut daemons = [site.hq.start_ready(), site.relay("0421").start_ready(), site.register("0421-01").start_ready()];
    let nodes = [&site.hq, site.relay("0421"), site.register("0421-01")];
    for (node, daemon) in nodes.iter().zip(&mut daemons) {
        let address = node.url().replace("http://", "");
        for (what, bytes) in corpus() {
            let answer = talk(&address, &bytes, Duration::from_secs(10));
            // The first request may be answered; what rides on it must not be.
            assert!(answer.matches("HTTP/1.1 ").count() <= 1, "{}: {what}: {answer}", node.id);
            assert!(!answer.contains("secret"), "{}: {what}: {answer}", node.id);
            assert!(answer.len() < 20_000, "{}: {what}: {} bytes come back", node.id, answer.len());
        }
        daemon.wait_until("it is well", || {
            http::try_get(&format!("{}/healthz", node.url())).is_some_and(|r| r.status == 200)
        });
        no_panic(&daemon.process.log_text());
        assert!(daemon.peak_memory_kib() < 200 << 10, "{} KiB", daemon.peak_memory_kib());
    }
    news(&site);
    until(PATIENCE, "good news arrive", || rows(&site, "0421-01") == site.expected("0421"));
    daemons.into_iter().for_each(tillcast_tests::Daemon::term);
}

#[test]
fn no_path_leads_out() {
    let site = small().build();
    site.publish();
    let daemons = [site.hq.start_ready(), site.relay("0421").start_ready(), site.register("0421-01").start_ready()];
    let nodes = [&site.hq, site.relay("0421"), site.register("0421-01")];
    let canary = "canary-of-the-test";
    for dir in
        [site.hq.dir.join("state"), site.relay("0421").dir.join("data"), site.register("0421-01").dir.join("data")]
    {
        std::fs::write(dir.join("canary"), canary).unwrap();
        std::fs::write(dir.parent().unwrap().join("canary"), canary).unwrap();
    }
    let ok = site.relay("0421").dir.join("data/ok");
    std::fs::write(ok.join("canary"), canary).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", ok.join("passwd")).unwrap();
    let data = site.relay("0421").dir.join("data").display().to_string();
    let ups = [
        "..",
        "%2e%2e",
        "%2E%2E",
        ".%2e",
        "%2e.",
        "..%2f",
        "%252e%252e",
        "..;",
        "..%5c",
        "..\\",
        "%c0%ae%c0%ae",
        "%e0%80%ae%e0%80%ae",
        "..%00",
        "....//",
        "%u002e%u002e",
    ];
    let mut paths: Vec<String> = ups
        .iter()
        .flat_map(|up| {
            ["canary", "data/canary", "state/canary", "etc/passwd", "device.db"].into_iter().flat_map(move |file| {
                (1..=3).flat_map(move |n| {
                    let steps = vec![*up; n].join("/");
                    ["", "/packs", "/packs/price@zone-east", "/stores/0421", "/trust"]
                        .map(|base| format!("{base}/{steps}/{file}"))
                })
            })
        })
        .collect();
    let more = [
        "/canary",
        "/passwd",
        "/ok/canary",
        "//etc/passwd",
        "/./canary",
        "/packs/./../canary",
        "/packs//price@zone-east/0000000001.full.pack",
        "\\..\\canary",
        "/C:\\windows\\win.ini",
        "/file:///etc/passwd",
        "/stores/CON/manifest.json",
        "/stores/../stores/0421/manifest.json",
        "/trust/0000000001.json/../../canary",
        "/packs/price@zone-east/0000000001.full.pack%00.txt",
        "/v1/../canary",
        "/style.css/../canary",
        "/?file=../canary",
        "/metrics/../canary",
    ];
    paths.extend(more.map(str::to_owned));
    paths.push(format!("/{data}/canary"));
    paths.push(format!("/{}", "../".repeat(5000)));
    paths.push(format!("/packs/{}", "a/".repeat(5000)));
    let count = paths.len();
    for node in nodes {
        let address = node.url().replace("http://", "");
        for path in &paths {
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            let answer = talk(&address, request.as_bytes(), Duration::from_secs(10));
            assert!(!answer.contains(canary) && !answer.contains("root:"), "{}: {path}: {answer}", node.id);
            let status = answer.split(' ').nth(1).unwrap_or("closed");
            let page = path == "/?file=../canary";
            assert!(["400", "404", "414", "431", "closed"].contains(&status) || page, "{}: {path}: {answer}", node.id);
        }
    }
    assert!(count > 1000, "{count} paths");
    daemons.into_iter().for_each(tillcast_tests::Daemon::term);
}

//! Texts from outside, where people read them: pages, mails, logs. And secrets, where nobody may.

use super::*;
use base64::engine::general_purpose::STANDARD;
use std::path::Path;
use tillcast_tests::{Daemon, Liar, PATIENCE, Say, Smtp, files, http, until, until_some};

const SCRIPT: &str = "<script>alert(1)</script>";

/// Texts that break out of where they are put.
fn payloads() -> Vec<String> {
    let mut all: Vec<String> = [
        SCRIPT,
        "\"><img src=x onerror=alert(1)>",
        "'><svg/onload=alert(1)>",
        "</td></tr></table><iframe src=javascript:alert(1)>",
        "</style><script>alert(1)</script>",
        "</title><script>alert(1)</script>",
        "<!--",
        "]]>",
        "&lt;script&gt;",
        "{{7*7}}",
        "${7*7}",
        "<a href='javascript:alert(1)'>x</a>",
        "\u{202e}txet desrever",
        "\u{0}\u{1b}[2J\u{7}",
    ]
    .map(str::to_owned)
    .to_vec();
    all.push("<b>".repeat(2500));
    all
}

fn fault(text: &str) -> Value {
    json!([{"code": "PACK_IN_ERROR", "instance": "price@zone-east", "object": text, "text": text, "since": "2026-01-01T00:00:00Z"},
        {"code": text, "text": text, "since": "2026-01-01T00:00:00Z"}])
}

#[track_caller]
fn is_harmless(url: &str, what: &str) -> String {
    let reply = http::get(url);
    let page = reply.text();
    let policy = reply.header("content-security-policy");
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{url}: {policy}");
    assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("script-src"), "{url}: {policy}");
    assert_eq!(reply.header("x-content-type-options"), "nosniff", "{url}");
    for tag in ["<script", "<img", "<svg", "<iframe", "<b><b>", "<!--", "javascript:alert(1)>", "<a href='j"] {
        assert!(!page.contains(tag), "{url}, {what}: {tag} in {page:.3000}");
    }
    assert!(page.len() < 100_000, "{url}, {what}: {} bytes", page.len());
    page
}

#[test]
fn pages_escape_what_devices_and_the_source_say() {
    let mut site = small().hq_service().build();
    for (n, evil) in payloads().iter().enumerate().filter(|(_, p)| p.len() < 200 && !p.contains('\0')) {
        let quoted = evil.replace('\'', "''");
        site.sql(&format!("INSERT INTO store VALUES ('X{n}', 'east', '{quoted}')"));
    }
    site.publish();
    let key = taken_key(&site, "0421-01");
    let hq = site.hq.start_ready();
    let relay = site.relay("0421").start_ready();
    let serial = site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay knows the key", || site.relay("0421").status()["serial"] == serial);
    let mut seq = 1000;
    for evil in payloads() {
        seq += 1;
        let body = post(&[beat("0421-01", seq, &key, fault(&evil))]);
        for to in [site.relay("0421").url(), site.hq.url()] {
            let reply = http::post(&format!("{to}/v1/heartbeats"), "application/json", &body);
            assert_eq!((reply.status, &reply.json()["refused"]), (200, &json!({})), "{}", reply.text());
        }
        let page = is_harmless(&site.hq.url(), &evil);
        is_harmless(&site.relay("0421").url(), &evil);
        assert!(page.contains("PACK_IN_ERROR"), "it is told all the same: {page}");
    }
    let page = is_harmless(&site.hq.url(), "regions");
    assert!(page.contains("&lt;script&gt;alert(1)"), "the region is there as text: {page:.3000}");
    // What somebody searches for comes back in a form: its value is a text too.
    site.sql("INSERT INTO store SELECT 'Y' || id, zone, '' FROM store; INSERT INTO store SELECT 'Z' || id, zone, '' FROM store");
    site.publish();
    for q in [
        "%22%3E%3Cscript%3Ealert(1)%3C/script%3E",
        "%22+autofocus+onfocus%3Dalert(1)+x%3D%22",
        "%00",
        "%ff%fe",
        "a%0d%0aset-cookie:x=1",
    ] {
        let reply = http::get(&format!("{}/?q={q}", site.hq.url()));
        assert!(reply.status == 200 && reply.header("set-cookie").is_empty(), "{q}: {}", reply.text());
        assert!(!reply.text().contains("<script") && !reply.text().contains("\" autofocus"), "{q}: {}", reply.text());
    }
    // Store ids and zones that are markup never come so far.
    for bad in ["('<b>', 'east', '')", "('0999', '<b>', '')"] {
        site.sql(&format!("INSERT INTO store VALUES {bad}"));
        site.hq.run(&["publish"]).code(3);
        site.sql("DELETE FROM store WHERE id = '<b>' OR zone = '<b>'");
    }
    // The register itself is well.
    site.enroll("0421-01");
    site.publish();
    let serial = site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay follows", || site.relay("0421").status()["serial"] == serial);
    site.register("0421-01").run(&["once"]).ok();
    assert_eq!(rows(&site, "0421-01"), site.expected("0421"));
    [relay, hq].into_iter().for_each(Daemon::term);
}

#[test]
fn no_text_becomes_a_header_or_a_line_of_a_mail() {
    let smtp = Smtp::start();
    let site = small().mail(&smtp).hq("serve.alert_tick", "'200ms'").build();
    site.publish();
    let key = taken_key(&site, "0421-01");
    let hq = site.hq.start_ready();
    let evil = [
        "x\r\nBcc: evil@example.com\r\n\r\nforged",
        "x\n.\nMAIL FROM:<evil@example.com>\n",
        "\u{0}\u{b}\u{c}\u{85}\u{2028}Bcc: evil@example.com\u{2029}",
        "=?utf-8?q?Bcc=3A_evil=40example=2Ecom?=",
        &"Ü".repeat(3000),
        &"a".repeat(8000),
        "[Tillcast] Recovered: nothing is wrong\n\n\nOver, after 999 d",
    ];
    for (n, text) in evil.iter().enumerate() {
        let seq = 2 * n as u64 + 1;
        let says = |seq, errors| {
            let body = post(&[beat("0421-01", seq, &key, errors)]);
            let reply = http::post(&format!("{}/v1/heartbeats", site.hq.url()), "application/json", &body);
            assert_eq!((reply.status, &reply.json()["refused"]), (200, &json!({})), "{}", reply.text());
        };
        says(seq, fault(text));
        until(PATIENCE, "the mail comes", || smtp.mails().len() > 2 * n);
        says(seq + 1, json!([]));
        until(PATIENCE, "so does its end", || smtp.mails().len() > 2 * n + 1);
    }
    // By rows of the source: a key with line ends, in a stream that is refused.
    site.sql("INSERT INTO item VALUES ('x' || char(13, 10) || 'Bcc: evil@example.com', 'n', 1000, NULL, NULL)");
    site.hq.run(&["publish"]).code(3);
    until(PATIENCE, "the refusal is mailed", || smtp.mails().iter().any(|m| m.subject.contains("catalog@all")));
    let mails = smtp.mails();
    assert_eq!(mails.len(), 2 * evil.len() + 1);
    for mail in &mails {
        assert_eq!(
            (mail.to.as_slice(), mail.from.as_str()),
            (&["it@example.com".to_owned()][..], "tillcast@example.com")
        );
        for forbidden in ["bcc", "cc", "reply-to", "sender"] {
            assert!(!mail.headers.contains_key(forbidden), "{:?}", mail.headers);
        }
        assert!(mail.subject.starts_with("[Tillcast] ") && mail.subject.len() < 300, "{}", mail.subject);
        assert!(mail.text.len() < 70_000);
        for line in mail.text.lines() {
            let forged =
                ["Bcc:", "MAIL FROM", "forged", "Over, after 999 d", "[Tillcast]"].iter().any(|f| line.starts_with(f));
            assert!(!forged, "{line:?} in {:.2000}", mail.text);
        }
    }
    // Mail is still sent, and rows too.
    site.sql("DELETE FROM item WHERE department = 1000");
    news(&site);
    hq.term();
}

/// What servers and rows say begins no line of a log, and steers no terminal.
#[test]
fn logs_and_reports_are_our_own_lines() {
    let mut site = small().build();
    site.publish();
    let forged = "x\\n2026-11-22T00:00:00Z ERROR forged\\u001b[2J\\u0007\\r";
    let body = format!("{{\"{forged}@all\":1}}");
    let liar = Liar::start(move |a| match a.target.as_str() {
        t if t.starts_with("/v1/versions") => Say::ok(body.clone()),
        t if t.starts_with("/v1/heartbeats") => Say::ok(format!(
            "{{\"hq_seen_s\":1,\"now\":\"2026-01-01T00:00:00Z\",\"refused\":{{\"0421-01\":\"{forged}\"}}}}"
        )),
        _ => Say::Whole(500, "content-type: text/plain\r\n".into(), "a\n2026-11-22T00:00:00Z ERROR forged".into()),
    });
    let register = site.registers.get_mut("0421-01").unwrap();
    register.set_text("relay", &liar.url());
    let manifest = format!(
        "{{\"payloadType\":\"{forged}\",\"payload\":\"\",\"signatures\":[{{\"keyid\":\"{forged}\",\"sig\":\"\"}}]}}"
    );
    let bucket = Liar::start(move |_| Say::ok(manifest.clone()));
    register.set("fallback", &format!("['{}']", bucket.url()));
    site.relays.get_mut("0421").unwrap().set("sources", &format!("['{}']", bucket.url()));
    site.sql("INSERT INTO item VALUES ('k' || char(10) || '2026-11-22T00:00:00Z ERROR forged' || char(27) || '[2J', 'n', 1000, NULL, NULL)");
    site.sql("INSERT INTO store VALUES ('9' || char(10) || 'ERROR forged', 'east', '')");
    let mut told = vec![site.hq.run(&["publish"])];
    site.sql("DELETE FROM store WHERE id LIKE '9%'");
    told.push(site.hq.run(&["publish"]));
    for level in ["info", "trace"] {
        for node in [site.relay("0421"), site.register("0421-01")] {
            told.push(node.run(&["--log-level", level, "once"]));
            told.push(node.run(&["status"]));
        }
    }
    for out in told {
        no_panic(&out.text());
        let own =
            |line: &str| !line.starts_with("2026-11-22T00:00:00Z ERROR forged") && !line.starts_with("ERROR forged");
        assert!(out.stderr.lines().all(own), "{}: {}", out.line, out.stderr);
        let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
        assert!(!out.text().chars().any(steers), "{}: {:?}", out.line, out.text());
    }
}

/// A whole run, at the most talkative level: every secret is searched for in every output, log, object and answer.
#[test]
fn secrets_are_nowhere_but_in_their_files() {
    let smtp = Smtp::with(tillcast_tests::servers::SmtpOptions {
        auth: Some("till:mail-canary-5316".into()),
        ..Default::default()
    });
    let token = "token-canary-7302";
    let site = small()
        .hq_service()
        .mail(&smtp)
        .relay("source.token", &format!("'{token}'"))
        .agent("source_options.token", &format!("'{token}'"));
    let url = smtp.url().replace("smtp://", "smtp://till:mail-canary-5316@");
    let site = site.hq("mail.smtp", &format!("'{url}'")).hq("serve.alert_tick", "'200ms'").build();
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for id in ["0421", "0421-01"] {
        let code = site.hq.json(&["enroll", id])["code"].as_str().unwrap().to_owned();
        seeds.push(key_of_code(&code).to_bytes().to_vec());
        let node = if id.contains('-') { site.register(id) } else { site.relay(id) };
        node.run(&["--log-level", "trace", "enroll", &code]).ok();
    }
    for kind in ["root", "publisher"] {
        seeds.push(site.signing_key(kind).to_bytes().to_vec());
    }
    let secrets: Vec<Vec<u8>> = seeds
        .iter()
        .flat_map(|seed| {
            let text = hex::encode(seed);
            let base64 = STANDARD.encode(seed).trim_end_matches('=').to_owned();
            [
                seed.clone(),
                text.clone().into_bytes(),
                text.to_uppercase().into_bytes(),
                base64.into_bytes(),
                URL_SAFE_NO_PAD.encode(seed).into_bytes(),
            ]
        })
        .chain([token, "mail-canary-5316"].map(|t| t.as_bytes().to_vec()))
        .collect();
    let mut told: Vec<(String, Vec<u8>)> = Vec::new();
    let mut tell = |what: &str, out: tillcast_tests::Output| told.push((what.to_owned(), out.text().into_bytes()));
    for args in [&["publish"][..], &["doctor"], &["status"], &["check-config"], &["trust", "show"], &["verify"]] {
        tell(&format!("hq {args:?}"), site.hq.run(&[&["--log-level", "trace"], args].concat()));
    }
    let trace = [("TILLCAST_LOG", "trace")];
    let daemons =
        [site.hq.start_env(&trace), site.relay("0421").start_env(&trace), site.register("0421-01").start_env(&trace)];
    let version = || site.register("0421-01").version("price@zone-east");
    until(PATIENCE, "the first install", || version().is_some());
    site.sql("UPDATE item SET department = 1000 WHERE sku = 'SKU0000001'");
    tell("a refused publish", site.hq.run(&["--log-level", "trace", "publish"]).code(3));
    site.sql("UPDATE item SET department = 1 WHERE sku = 'SKU0000001'");
    news(&site);
    until(PATIENCE, "the news", || rows(&site, "0421-01") == site.expected("0421"));
    for node in [site.relay("0421"), site.register("0421-01")] {
        for args in [&["status"][..], &["doctor"], &["check-config"], &["verify"], &["enroll", "nonsense"]] {
            tell(&format!("{} {args:?}", node.id), node.run(&[&["--log-level", "trace"], args].concat()));
        }
    }
    until_some(PATIENCE, "a mail", || smtp.mails().into_iter().next());
    for mail in smtp.mails() {
        told.push(("a mail".into(), mail.text.into_bytes()));
    }
    for node in [&site.hq, site.relay("0421"), site.register("0421-01")] {
        for path in ["/", "/metrics", "/v1/status", "/v1/versions", "/v1/errors"] {
            told.push((format!("{} {path}", node.id), http::get(&format!("{}{path}", node.url())).body));
        }
    }
    for daemon in daemons {
        let log = daemon.process.log().to_owned();
        daemon.term();
        let text = std::fs::read(&log).unwrap();
        assert!(text.len() > 1000, "{} says nothing", log.display());
        told.push((log.display().to_string(), text));
    }
    for dir in [site.bucket(), site.relay("0421").dir.join("data/ok"), site.hq.dir.join("state/packs")] {
        told.extend(files::tree(&dir).into_keys().map(|f| (f.clone(), std::fs::read(dir.join(f)).unwrap())));
    }
    assert!(told.len() > 40, "{}", told.len());
    for (what, bytes) in &told {
        for secret in &secrets {
            let found = bytes.windows(secret.len()).any(|w| w == secret);
            assert!(!found, "{what} tells {}", String::from_utf8_lossy(secret));
        }
    }
    // The search can find: the files that hold secrets do, and are nobody else's to read.
    for (file, secret) in
        [(site.hq.dir.join("state/keys"), &seeds[2]), (site.relay("0421").dir.join("data"), &seeds[0])]
    {
        let held = holds(&file, secret);
        assert!(!held.is_empty(), "{}", file.display());
        for path in held {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
        }
    }
}

/// The files below that hold a seed, raw or in hex.
fn holds(dir: &Path, seed: &[u8]) -> Vec<std::path::PathBuf> {
    let text = hex::encode(seed).into_bytes();
    let all = files::tree(dir).into_keys().map(|f| dir.join(f));
    all.filter(|f| {
        let bytes = std::fs::read(f).unwrap_or_default();
        bytes.windows(64).any(|w| w == text) || bytes.windows(32).any(|w| w == seed)
    })
    .collect()
}

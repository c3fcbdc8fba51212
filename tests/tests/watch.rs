//! What is told of machines that are ill, and that the telling itself is watched: power, crashes, copies, disks; a
//! webhook where mail does not go, a sign of life, a mail that says that mails arrive.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::SigningKey;
use rusqlite::Connection;
use serde_json::{Value, json};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tillcast_tests::site::{Builder, Node};
use tillcast_tests::{Daemon, Liar, PATIENCE, Postgres, Say, Site, Smtp, forge, http, quiet_port, until};

fn watchful(smtp: &Smtp) -> Builder {
    let site = Site::builder().stores(&[("0421", "east")]).registers(1).mail(smtp).hq_service();
    site.hq("serve.alert_tick", "'200ms'").relay("heartbeat", "'1s'").agent("heartbeat", "'1s'")
}

#[track_caller]
fn mailed(smtp: &Smtp, subject: &str) -> String {
    let subject = format!("[Tillcast] {subject}");
    until(PATIENCE, &subject, || smtp.mails().iter().any(|m| m.subject == subject));
    smtp.mails().into_iter().find(|m| m.subject == subject).unwrap().text
}

/// As though the machine had been switched off and on since the service was last begun.
fn new_boot(node: &Node, n: usize) {
    let db = Connection::open(node.dir.join("data/device.db")).unwrap();
    let starts: String = db.query_row("SELECT value FROM fact WHERE name = 'starts'", [], |r| r.get(0)).unwrap();
    let mut starts: Value = serde_json::from_str(&starts).unwrap();
    let last = starts["latest"].as_array_mut().unwrap().last_mut().unwrap();
    last["boot"] = format!("another boot {n}").into();
    db.execute("UPDATE fact SET value = ?1 WHERE name = 'starts'", [starts.to_string()]).unwrap();
}

#[test]
fn of_two_services_on_one_ledger_one_mails_and_the_other_goes_on() {
    let (postgres, smtp) = (Postgres::start(), Smtp::start());
    let site = watchful(&smtp).stores(&[("0421", "east"), ("0815", "east")]).registers(0).relay("poll", "'1h'");
    let site = site.hq("state.database", &format!("'{}'", postgres.create_database("ledger")));
    let site = site.hq("alerts.store_silent", "'15s'").build();
    site.publish();
    // The first to look is the judge; the other hears the relay, and wakes it.
    let mut judge = site.hq.start_ready();
    let at = format!("127.0.0.1:{}", quiet_port());
    let other = site.hq.start_env(&[("TILLCAST__SERVE__LISTEN", &at)]);
    until(PATIENCE, "the other answers", || http::try_get(&format!("http://{at}/healthz")).is_some());
    let [mut relay, mut silent] =
        ["0421", "0815"].map(|id| site.relay(id).start_env(&[("TILLCAST__HQ", &format!("http://{at}"))]));
    until(PATIENCE, "the judge knows of it", || {
        let metrics = http::get(&format!("{}/metrics", site.hq.url())).text();
        metrics.contains(r#"tillcast_devices{role="relay",state="heard"} 2"#)
    });
    silent.kill9();
    let of = |subject: &str| smtp.mails().iter().filter(|m| m.subject.contains(subject)).count();
    mailed(&smtp, "Store 0815 is silent");
    assert_eq!(of("0421"), 0, "what the other heard is no silence");
    site.sql("UPDATE price SET price_cents = 1234 WHERE sku = 'SKU0000005'");
    site.publish();
    until(PATIENCE, "the relay is woken", || {
        site.relay("0421").version("price@zone-east") == Some(site.version("0421", "price"))
    });
    judge.kill9();
    relay.kill9();
    mailed(&smtp, "Store 0421 is silent");
    // Whoever judges next finds that it is told.
    let holder = || postgres.sql("ledger", "SELECT holder FROM lease WHERE name = 'judge'").trim().to_owned();
    let before = holder();
    let again = site.hq.start_ready();
    other.term();
    until(PATIENCE, "it judges", || holder() != before);
    // Each look is in the ledger; after two more it has looked.
    let until_s = || postgres.sql("ledger", "SELECT until_s FROM lease WHERE name = 'judge'");
    for _ in 0..2 {
        let last = until_s();
        until(PATIENCE, "it looks", || until_s() != last);
    }
    again.term();
    assert_eq!((of("Store 0421 is silent"), of("Store 0815 is silent")), (1, 1));
}

#[test]
fn crashes_in_a_row_and_power_that_fails_are_mailed() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).build();
    site.publish();
    let hq = site.hq.start_ready();
    let (relay, register) = (site.relay("0421"), site.register("0421-01"));
    for n in 0..5 {
        let mut daemon = relay.start_ready();
        daemon.kill9();
        if n < 3 {
            let mut daemon = register.start_ready();
            daemon.kill9();
            new_boot(register, n);
        }
    }
    // Who ends by the rules does not count.
    (0..3).for_each(|_| register.start_ready().term());
    let daemons = [relay, register].map(Node::start_ready);
    let crashes = mailed(&smtp, "The program of 0421 dies again and again");
    assert!(crashes.contains("5 times") && crashes.contains("see its log"), "{crashes}");
    let cuts = mailed(&smtp, "The power of 0421-01 fails again and again");
    assert!(cuts.contains("cut 3 times"), "{cuts}");
    let codes =
        |n: &Node| n.status()["errors"].as_array().unwrap().iter().map(|e| e["code"].clone()).collect::<Vec<_>>();
    until(PATIENCE, "each tells its own, and nothing else", || {
        (codes(relay), codes(register)) == (vec![json!("CRASH_LOOP")], vec![json!("POWER_UNSTABLE")])
    });
    until(PATIENCE, "both sell by the newest rows", || site.relay("0421").digests() == site.expected("0421"));
    assert_eq!(smtp.mails().len(), 2, "{:?}", smtp.mails());
    daemons.into_iter().chain([hq]).for_each(Daemon::term);
}

/// A disk that was copied, and both machines switched on: each heartbeat is well signed.
#[test]
fn a_copied_register_and_a_copied_relay_are_told_as_such() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).build();
    site.publish();
    let hq = site.hq.start_ready();
    let mut daemons = Vec::new();
    let mut twice = |node: &Node, listen: &str| {
        let copy = node.dir.join("copy");
        let copied = Command::new("cp").arg("-a").arg(node.dir.join("data")).arg(&copy).status().unwrap();
        assert!(copied.success());
        daemons.push(node.start_ready());
        let at = format!("127.0.0.1:{}", quiet_port());
        daemons.push(node.start_env(&[("TILLCAST__DATA_DIR", copy.to_str().unwrap()), (listen, &at)]));
    };
    site.bring_down();
    twice(site.relay("0421"), "TILLCAST__LISTEN");
    twice(site.register("0421-01"), "TILLCAST__LOCAL_LISTEN");
    for id in ["0421", "0421-01"] {
        let told = mailed(&smtp, &format!("Two machines report as {id}"));
        assert!(told.contains("revoke"), "{told}");
    }
    daemons.into_iter().for_each(Daemon::term);
    hq.term();
}

#[test]
fn a_disk_that_is_nearly_full_is_mailed_before_it_is() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).hq("alerts.disk_low_percent", "10").build();
    site.publish();
    let code = site.hq.json(&["enroll", "0421-02"])["code"].as_str().unwrap().to_owned();
    let code: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(code).unwrap()).unwrap();
    let key = SigningKey::from_bytes(&hex::decode(code["seed"].as_str().unwrap()).unwrap().try_into().unwrap());
    let hq = site.hq.start_ready();
    let says = |seq: u64, free: u64| {
        let beat = json!({"format": 1, "device": "0421-02", "seq": seq, "sent_at": "2026-01-01T00:00:00Z",
            "program": "x", "serial": 1, "streams": {}, "network": "online", "errors": [], "debts": [],
            "disk": {"free": free << 20, "total": 1000 << 20}, "clock_skew_s": null});
        let envelope = forge::seal("heartbeat", beat.to_string().as_bytes(), &[&key]);
        let envelope: Value = serde_json::from_slice(&envelope).unwrap();
        let body = json!({"beats": [{"envelope": envelope, "seen_s": 0}]}).to_string();
        let url = format!("{}/v1/heartbeats", site.hq.url());
        assert_eq!(http::post(&url, "application/json", body.as_bytes()).status, 200);
    };
    says(1, 99);
    let told = mailed(&smtp, "The disk of 0421-02 is nearly full");
    assert!(told.contains("99 MiB of 1000 MiB") && told.contains("disk_low_percent"), "{told}");
    says(2, 120);
    says(3, 500);
    mailed(&smtp, "Recovered: The disk of 0421-02 is nearly full");
    // The disk of the machine that runs this test may be nearly full, too.
    let of_device = smtp.mails().into_iter().filter(|m| m.subject.contains("0421-02")).count();
    assert_eq!(of_device, 2, "a little room more ends nothing");
    hq.term();
}

#[test]
fn what_the_mail_server_does_not_take_the_webhook_is_told_once() {
    let mut smtp = Smtp::start();
    let hook = Liar::start(|_| Say::Whole(503, String::new(), Vec::new()));
    let mut site = Site::builder().mail(&smtp).hq_service().hq("alerts.webhook_after", "'1s'").build();
    site.hq.set_text("alerts.webhook", &format!("{}/secret-path?token=t0ken", hook.url()));
    site.publish();
    smtp.stop();
    site.sql("UPDATE item SET name = hex(zeroblob(60)) WHERE sku = 'SKU0000003'");
    let said = site.hq.run(&["publish"]).code(3).text();
    assert!(
        said.contains("mails wait in the outbox") && !said.contains("t0ken") && !said.contains("secret-path"),
        "{said}"
    );
    assert!(!site.hq.run(&["check-config", "--json"]).text().contains("t0ken"));
    let hq = site.hq.start_ready();
    until(PATIENCE, "the webhook is tried", || !hook.asked().is_empty());
    let is_told = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&is_told);
    hook.now(move |_| {
        tell.store(true, Ordering::Relaxed);
        Say::ok("ok")
    });
    until(PATIENCE, "and told", || is_told.load(Ordering::Relaxed));
    let told = hook.asked().pop().unwrap();
    let body: Value = serde_json::from_slice(&told.body).unwrap();
    let subject = "[Tillcast] Publishing catalog@all was refused (BAD_ROWS)";
    assert_eq!((told.method.as_str(), told.target.as_str()), ("POST", "/secret-path?token=t0ken"));
    assert_eq!(
        (body["subject"].as_str(), body["text"].as_str().map(|t| t.starts_with(subject))),
        (Some(subject), Some(true))
    );
    // The server comes back: the mail arrives too, and the webhook hears nothing twice.
    let times = hook.asked().len();
    smtp.restart();
    until(PATIENCE * 2, "the mail arrives", || smtp.mails().iter().any(|m| m.subject == subject));
    assert!(smtp.mails()[0].message_id.contains(body["id"].as_str().unwrap()), "by the same id");
    hq.term();
    assert_eq!(hook.asked().len(), times);
}

#[test]
fn without_a_mail_server_the_webhook_gets_all() {
    let hook = Liar::start(|_| Say::ok("ok"));
    let mut site = Site::small();
    site.hq.set_text("alerts.webhook", &hook.url());
    site.publish();
    site.sql("UPDATE item SET name = hex(zeroblob(60)) WHERE sku = 'SKU0000003'");
    (0..2).for_each(|_| drop(site.hq.run(&["publish"]).code(3)));
    assert_eq!(hook.asked().len(), 1);
    assert!(String::from_utf8_lossy(&hook.asked()[0].body).contains("SKU0000003"));
    assert_eq!(site.hq.status()["outbox"], json!([]));
    site.hq.set_text("alerts.webhook", "ftp://x");
    site.hq.run(&["check-config"]).code(2).says(&["alerts.webhook", "https://"]);
}

#[test]
fn a_watcher_hears_signs_of_life_until_the_service_dies_and_a_mail_says_that_mails_arrive() {
    let smtp = Smtp::start();
    let watcher = Liar::start(|_| Say::ok("ok"));
    let mut site = watchful(&smtp).hq("alerts.ping_every", "'1s'").hq("alerts.self_test", "'7d'").build();
    site.hq.set_text("alerts.ping", &format!("{}/ping/4711", watcher.url()));
    let mut hq = site.hq.start_ready();
    until(PATIENCE, "signs of life", || watcher.asked().len() > 2);
    assert!(watcher.asked().iter().all(|a| a.method == "GET" && a.target == "/ping/4711"));
    assert!(mailed(&smtp, "Alerts arrive").contains("7 days"));
    hq.kill9();
    let last = watcher.asked().len();
    let hq = site.hq.start_ready();
    until(PATIENCE, "it lives again", || watcher.asked().len() > last + 2);
    assert_eq!(smtp.mails().len(), 1, "not with every start");
    hq.term();
}

/// A disk image from last week: what a device holds heals by itself; its heartbeats count on from what was heard of it.
#[test]
fn devices_set_back_to_an_old_state_are_heard_again_at_once() {
    let site = Site::builder().stores(&[("0421", "east")]).registers(1).hq_service();
    let site = site.relay("heartbeat", "'1s'").build();
    site.publish();
    let hq = site.hq.start_ready();
    let ledger = tillcast_tests::digest::open_read_only(&site.hq.dir.join("state/fleet.db"));
    let heard = |id: &str| -> i64 {
        ledger.query_row("SELECT seq FROM beat WHERE device = ?1", [id], |r| r.get(0)).unwrap_or(0)
    };
    site.bring_down();
    let set_back = |node: &Node, old: bool| {
        let (data, kept) = (node.dir.join("data"), node.dir.join("kept"));
        if old {
            std::fs::remove_dir_all(&data).unwrap();
            std::fs::rename(&kept, &data).unwrap();
        } else {
            assert!(Command::new("cp").arg("-a").arg(&data).arg(&kept).status().unwrap().success());
        }
    };
    for (id, node) in [("0421-01", site.register("0421-01")), ("0421", site.relay("0421"))] {
        set_back(node, false);
        let relay = (id != "0421").then(|| site.relay("0421").start_ready());
        // Half a week of heartbeats.
        let db = Connection::open(node.dir.join("data/device.db")).unwrap();
        db.execute("UPDATE fact SET value = '5000' WHERE name = 'seq'", []).unwrap();
        drop(db);
        until(PATIENCE, "its heartbeats are heard", || {
            node.run(&["once"]);
            heard(id) > 5000
        });
        let before = heard(id);
        set_back(node, true);
        site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000003'");
        site.publish();
        until(PATIENCE, "it is heard above what was heard before", || {
            node.run(&["once"]);
            heard(id) > before
        });
        relay.into_iter().for_each(Daemon::term);
    }
    site.bring_down();
    site.assert_all_proven();
    hq.term();
}

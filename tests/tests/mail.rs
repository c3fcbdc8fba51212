//! Whom it concerns is told: one mail when something begins, one when it is over, through real SMTP.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use rusqlite::Connection;
use serde_json::json;
use tillcast_tests::servers::{Mail, SmtpOptions};
use tillcast_tests::site::Builder;
use tillcast_tests::{Daemon, PATIENCE, Site, Smtp, files, until};

/// A site whose headquarters judges several times a second.
fn watchful(smtp: &Smtp) -> Builder {
    Site::builder().mail(smtp).hq_service().hq("serve.alert_tick", "'200ms'")
}

/// Makes one item that the contract of `catalog` refuses, or mends it.
fn bad_item(site: &Site, bad: bool) {
    let name = if bad { "x".repeat(101) } else { "right".into() };
    site.sql(&format!("UPDATE item SET name = '{name}' WHERE sku = 'SKU0000007'"));
}

/// Makes one promotion that the contract of `promo` refuses.
fn bad_promo(site: &Site) {
    site.sql("UPDATE promo SET percent = 99 WHERE id = 2 AND zone = 'east'");
}

/// The subjects so far, sorted, without the mark in front.
fn subjects(smtp: &Smtp) -> Vec<String> {
    let mut all: Vec<String> = smtp.mails().iter().map(|m| m.subject.replace("[Tillcast] ", "")).collect();
    all.sort();
    all
}

fn wait_for(smtp: &Smtp, subject: &str) -> Mail {
    let subject = format!("[Tillcast] {subject}");
    until(PATIENCE, &subject, || smtp.mails().iter().any(|m| m.subject == subject));
    smtp.mails().into_iter().find(|m| m.subject == subject).unwrap()
}

#[test]
fn a_refused_publish_is_one_mail_and_its_end_another() {
    let smtp = Smtp::start();
    let site = Site::builder().mail(&smtp).build();
    site.publish();
    bad_item(&site, true);
    site.sql("UPDATE price SET price_cents = 77 WHERE sku = 'SKU0000007' AND zone = 'east'");
    site.hq.run(&["publish", "--dry-run"]).says(&["SKU0000007", "catalog@all"]);
    assert_eq!(smtp.mails().len(), 0, "a dry run mails nothing");

    let refused = "Publishing catalog@all was refused (BAD_ROWS)";
    for _ in 0..3 {
        site.hq.run(&["publish"]).code(3);
    }
    assert_eq!(subjects(&smtp), [refused]);
    let mail = &smtp.mails()[0];
    assert_eq!((mail.from.as_str(), mail.to.as_slice()), ("tillcast@example.com", &["it@example.com".to_owned()][..]));
    for word in ["item", "name", "SKU0000007", "101", "100"] {
        assert!(mail.text.contains(word), "{word} is not in:\n{}", mail.text);
    }
    // Another reason is another mail; the first one is not said again.
    site.sql("DELETE FROM promo WHERE zone = 'east'");
    site.hq.run(&["publish"]).code(3);
    let shrunk = "Publishing promo@zone-east was refused (SHRINK)";
    assert_eq!(subjects(&smtp), [refused, shrunk]);

    bad_item(&site, false);
    site.hq.run(&["publish", "--dry-run"]);
    assert_eq!(smtp.mails().len(), 2, "nor does it mail an end");
    site.hq.run(&["publish", "--allow-shrink", "promo"]).ok();
    site.publish();
    assert_eq!(subjects(&smtp), [refused, shrunk, &format!("Recovered: {refused}"), &format!("Recovered: {shrunk}")]);
    let mut ids: Vec<String> = smtp.mails().into_iter().map(|m| m.message_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4);
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn tls_a_login_and_an_authority_of_ones_own() {
    let smtp = Smtp::with(SmtpOptions { starttls: true, auth: Some("hq:secret".into()), ..SmtpOptions::default() });
    let mut site = Site::builder().mail(&smtp).build();
    let url = smtp.url().replace("smtp://", "smtp://hq:secret@") + "?tls=required";
    site.hq.set_text("mail.smtp", &url);
    site.publish();
    // An authority that nobody vouches for: nothing is sent, and it is said why.
    bad_item(&site, true);
    site.hq.run(&["publish"]).code(3).says(&["mails wait in the outbox"]);
    assert_eq!(smtp.mails().len(), 0);
    let outbox = site.hq.status()["outbox"].clone();
    assert_eq!(outbox.as_array().unwrap().len(), 1, "{outbox:#}");
    assert!(outbox[0]["last_error"].as_str().unwrap().to_lowercase().contains("certificate"), "{outbox:#}");
    assert!(!outbox.to_string().contains("secret"));

    site.hq.set_text("mail.ca_file", smtp.ca().to_str().unwrap());
    bad_promo(&site);
    site.hq.run(&["publish"]).code(3);
    wait_for(&smtp, "Publishing promo@zone-east was refused (BAD_ROWS)");
    assert_eq!(smtp.mails().len(), 2, "the one that waited goes first");
    assert!(smtp.mails().iter().all(|m| m.tls && m.authenticated));

    // A wrong password is said as such, and never shown.
    site.hq.set_text("mail.smtp", &url.replace("secret", "wr0ng"));
    site.sql(
        "UPDATE promo SET percent = 10 WHERE id = 2; UPDATE staff SET role = 'boss' WHERE id = 1 AND store = '0421'",
    );
    let said = site.hq.run(&["publish"]).code(3).text();
    assert!(said.contains("mails wait in the outbox") && !said.contains("wr0ng"), "{said}");
    assert_eq!(smtp.mails().len(), 2);
}

#[test]
fn a_dead_mail_server_delays_a_mail_and_loses_none() {
    let mut smtp = Smtp::start();
    let site = Site::builder().mail(&smtp).build();
    site.publish();
    smtp.stop();
    bad_item(&site, true);
    site.hq.run(&["publish"]).code(3).says(&["mails wait in the outbox"]);
    let outbox = || site.hq.status()["outbox"].as_array().unwrap().clone();
    let waiting = outbox();
    assert_eq!(waiting.len(), 1);
    // serve takes over, is killed, and begins again; the server comes back in between.
    let mut hq = site.hq.start_ready();
    hq.kill9();
    // It may have claimed the mail, which keeps it for minutes.
    let ledger = rusqlite::Connection::open(site.hq.dir.join("state/fleet.db")).unwrap();
    ledger.execute("UPDATE mail SET claimed_s = 0, next_s = 0", []).unwrap();
    smtp.restart();
    // Two of them, behind a balancer: a mail is one's.
    let hq = site.hq.start_ready();
    let other =
        site.hq.start_env(&[("TILLCAST__SERVE__LISTEN", &format!("127.0.0.1:{}", tillcast_tests::quiet_port()))]);
    until(PATIENCE, "the mail arrives", || !smtp.mails().is_empty());
    until(PATIENCE, "and leaves the outbox", || outbox().is_empty());
    let mail = &smtp.mails()[0];
    assert!(mail.message_id.contains(waiting[0]["id"].as_str().unwrap()), "the Message-ID stays");
    // What comes next comes after it: the first one was sent once.
    bad_item(&site, false);
    site.publish();
    let refused = "Publishing catalog@all was refused (BAD_ROWS)";
    wait_for(&smtp, &format!("Recovered: {refused}"));
    assert_eq!(subjects(&smtp), [refused, &format!("Recovered: {refused}")]);
    [hq, other].into_iter().for_each(Daemon::term);
}

/// A drop for a stream or zone that is not there: no later state of it can be well, so the next drops without it end
/// its episode.
#[test]
fn a_drop_of_nowhere_is_one_mail_and_the_next_drops_without_it_end_it() {
    let smtp = Smtp::start();
    let site = Site::builder().mail(&smtp).source(tillcast_tests::site::Source::Inbox).build();
    let drop = |name: &str| {
        std::fs::write(site.inbox().join(name), "sku,price_cents,updated\nA,1,x\n").unwrap();
        std::fs::write(site.inbox().join(format!("{name}.ok")), "").unwrap();
    };
    let nowhere = ["price.zone-north.price.csv", "prise.zone-east.prise.csv"];
    let subjects_of = |before: &str| {
        ["price@zone-north", "prise@zone-east"].map(|i| format!("{before}Publishing {i} was refused (DROP)"))
    };
    for _ in 0..2 {
        nowhere.iter().for_each(|name| drop(name));
        site.hq.run(&["publish"]).code(3).says(&nowhere);
        // No drops: nothing is better than it was.
        site.hq.run(&["publish"]).ok();
    }
    assert_eq!(subjects(&smtp), subjects_of(""));
    site.sql("UPDATE price SET price_cents = 3 WHERE sku = 'SKU0000001'");
    site.drop_all();
    drop(nowhere[0]);
    site.hq.run(&["publish"]).code(3);
    let [north, prise] = subjects_of("Recovered: ");
    assert_eq!(subjects(&smtp)[2..], *std::slice::from_ref(&prise), "only what was not sent again");
    site.drop_all();
    site.publish();
    assert_eq!(subjects(&smtp)[2..], [north, prise]);
}

#[test]
fn who_falls_silent_is_told_once_and_a_silent_store_speaks_for_its_registers() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).hq("alerts.store_silent", "'10s'").hq("alerts.register_silent", "'25s'").build();
    site.publish();
    let hq = site.hq.start_ready();
    let start =
        |id: &str| if id.contains('-') { site.register(id).start_ready() } else { site.relay(id).start_ready() };
    let heard = |id: &str| {
        let status = site.hq.status();
        let device = status["devices"].as_array().unwrap().iter().find(|d| d["id"] == id).cloned();
        device.unwrap()["heard_s"].as_u64()
    };
    let relays = ["0421", "0815"].map(start);
    let registers = ["0421-01", "0421-02", "0815-01", "0815-02"].map(start);
    until(PATIENCE, "all are heard", || {
        ["0421", "0815", "0421-01", "0421-02", "0815-01", "0815-02"].iter().all(|id| heard(id).is_some())
    });

    // One register of one store loses its power; of the other store the relay and both registers.
    let [mut relay, other_relay] = relays;
    let [mut a, mut b, mut c, d] = registers;
    for dead in [&mut relay, &mut a, &mut b, &mut c] {
        dead.kill9();
    }
    let (store, register) = ("Store 0421 is silent", "Register 0815-01 is silent");
    wait_for(&smtp, store);
    wait_for(&smtp, register);
    until(PATIENCE, "the registers below the silent store are silent for long", || {
        ["0421-01", "0421-02"].iter().all(|id| heard(id).is_some_and(|s| s >= 32))
    });
    assert_eq!(subjects(&smtp), [register, store]);

    // The relay last: from when it is heard, its registers have not long to be.
    let back = ["0421-01", "0421-02", "0815-01", "0421"].map(start);
    wait_for(&smtp, &format!("Recovered: {store}"));
    wait_for(&smtp, &format!("Recovered: {register}"));
    until(PATIENCE, "all are heard again", || ["0421-01", "0421-02"].iter().all(|id| heard(id).is_some_and(|s| s < 3)));
    assert_eq!(subjects(&smtp), [&format!("Recovered: {register}"), &format!("Recovered: {store}"), register, store]);
    let rest = [other_relay, d, hq];
    back.into_iter().chain(rest).for_each(Daemon::term);
}

#[test]
fn a_pack_in_error_is_one_mail_and_the_next_full_ends_it() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).build();
    site.publish();
    let hq = site.hq.start_ready();
    site.bring_down();
    site.sql(
        "UPDATE promo SET percent = percent % 80 + 1; UPDATE price SET price_cents = 4242 WHERE sku = 'SKU0000003'",
    );
    site.publish();
    let (name, mut pack) = site.head_pack("0421", "promo");
    let middle = pack.len() / 2;
    pack[middle] ^= 0x10;
    site.put_object(&name, &pack);
    for _ in 0..3 {
        site.relay("0421").run(&["once"]).code(3);
    }
    let error = "A pack of promo@zone-east is in error";
    let mail = wait_for(&smtp, error);
    for word in ["0421", name.rsplit('/').next().unwrap(), "SHA-256"] {
        assert!(mail.text.contains(word), "{word} is not in:\n{}", mail.text);
    }
    let shelf = site.relay("0421").dir.join("data/error").join(name.strip_prefix("packs/").unwrap());
    let shelf = if shelf.exists() { shelf } else { site.relay("0421").dir.join("data/error").join(&name) };
    assert!(
        shelf.exists()
            && shelf.with_file_name(format!("{}.reason.json", shelf.file_name().unwrap().to_str().unwrap())).exists()
    );

    // Said again by each heartbeat, mailed once; the other streams of the store and the other store go on.
    site.relay("0421").run(&["once"]).code(3);
    site.relay("0815").run(&["once"]).ok();
    site.with_relays(|| site.register("0421-01").run(&["once"]));
    assert_eq!(site.read("0421-01", "SELECT price_cents FROM price WHERE sku = 'SKU0000003'").as_deref(), Some("4242"));

    // Headquarters was told, so that the next version has a way round.
    site.sql("UPDATE promo SET percent = percent % 80 + 1");
    site.publish().says(&["promo@zone-east", "full"]);
    site.bring_down();
    site.assert_all_proven();
    wait_for(&smtp, &format!("Recovered: {error}"));
    assert_eq!(subjects(&smtp), [error, &format!("Recovered: {error}")]);
    assert_eq!(site.relay("0421").status()["errors"], json!([]));
    hq.term();
}

/// An old list for ever, a list that is gone, one that is refused: the stores are heard, and get nothing.
#[test]
fn a_store_that_gets_nothing_is_one_mail_with_its_reason_and_one_when_it_does() {
    let smtp = Smtp::start();
    // Time enough for registers on a busy machine to get it after their relays.
    let site = watchful(&smtp).hq("alerts.stuck", "'40s'").build();
    let list = |store: &str| format!("stores/{store}/manifest.json");
    site.publish();
    let hq = site.hq.start_ready();
    site.bring_down();
    let frozen = site.object(&list("0421")).unwrap();
    site.sql("UPDATE promo SET percent = percent % 80 + 1");
    site.publish();
    let good = ["0421", "0815"].map(|store| site.object(&list(store)).unwrap());
    site.put_object(&list("0421"), &frozen);
    std::fs::remove_file(site.bucket().join(list("0815"))).unwrap();
    site.relay("0421").run(&["once"]).ok();
    site.relay("0815").run(&["once"]);
    let stuck = |store: &str| format!("Store {store} does not get what is published");
    wait_for(&smtp, &stuck("0421"));
    let gone = wait_for(&smtp, &stuck("0815"));
    assert!(gone.text.contains("manifest.json"), "the relay's own reason:\n{}", gone.text);

    // Another reason is no other event.
    site.put_object(&list("0421"), &[&b"{}"[..], &good[1]].concat());
    site.relay("0421").run(&["once"]);
    for (store, bytes) in ["0421", "0815"].iter().zip(good) {
        site.put_object(&list(store), &bytes);
    }
    site.bring_down();
    for store in ["0421", "0815"] {
        wait_for(&smtp, &format!("Recovered: {}", stuck(store)));
    }
    let mut all = subjects(&smtp);
    all.sort();
    let recovered = ["0421", "0815"].map(|s| format!("Recovered: {}", stuck(s)));
    assert_eq!(all, [recovered, ["0421", "0815"].map(stuck)].concat());
    hq.term();
}

/// A list that is older than what was accepted, and one of another store, well signed: refused, and the mail says why.
#[test]
fn a_store_whose_list_is_refused_is_mailed_with_the_reason() {
    let smtp = Smtp::start();
    let mut site = watchful(&smtp).registers(0).hq("alerts.stuck", "'1s'").build();
    // What the stores read is a copy of the bucket.
    let copy = tillcast_tests::temp_dir("copy");
    for relay in site.relays.values_mut() {
        relay.set("sources", &format!("['file://{}']", copy.path().display()));
    }
    let list = |store: &str| format!("stores/{store}/manifest.json");
    let publish = || {
        site.sql("UPDATE promo SET percent = percent % 80 + 1");
        site.publish();
    };
    publish();
    let hq = site.hq.start_ready();
    let older = site.object(&list("0815")).unwrap();
    publish();
    files::copy_all(&site.bucket(), copy.path());
    let once = |code: &[i32]| {
        for store in ["0421", "0815"] {
            let out = site.relay(store).run(&["once"]);
            assert!(out.code.is_some_and(|c| code.contains(&c)), "{store}: {}", out.text());
        }
    };
    once(&[0]);
    // Headquarters hears what they refuse before there is something that they lack.
    std::fs::write(copy.path().join(list("0421")), site.object(&list("0815")).unwrap()).unwrap();
    std::fs::write(copy.path().join(list("0815")), older).unwrap();
    once(&[1, 3]);
    publish();
    let stuck = |store: &str| format!("Store {store} does not get what is published");
    for (store, reason) in [("0421", "OTHER_STORE"), ("0815", "OLDER_SERIAL")] {
        let mail = wait_for(&smtp, &stuck(store));
        assert!(mail.text.contains(reason), "{reason} is not in:\n{}", mail.text);
    }
    files::copy_all(&site.bucket(), copy.path());
    once(&[0]);
    let recovered = |store: &str| format!("Recovered: {}", stuck(store));
    for store in ["0421", "0815"] {
        wait_for(&smtp, &recovered(store));
    }
    assert_eq!(subjects(&smtp), [["0421", "0815"].map(recovered), ["0421", "0815"].map(stuck)].concat());
    assert_eq!(site.relay("0421").digests(), site.expected("0421"));
    hq.term();
}

#[test]
fn a_pack_gone_from_the_bucket_is_one_mail_and_the_next_full_ends_it() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).relay("tries.missing", "'0s'").build();
    site.publish();
    let hq = site.hq.start_ready();
    site.bring_down();
    site.sql("UPDATE promo SET percent = percent % 80 + 1");
    site.publish();
    let (name, _) = site.head_pack("0421", "promo");
    std::fs::remove_file(site.bucket().join(&name)).unwrap();
    site.relay("0421").run(&["once"]).code(3);
    let missing = "A pack of promo@zone-east is missing from the bucket";
    let mail = wait_for(&smtp, missing);
    for word in ["0421", name.rsplit('/').next().unwrap()] {
        assert!(mail.text.contains(word), "{word} is not in:\n{}", mail.text);
    }
    site.relay("0421").run(&["once"]).code(3);
    site.sql("UPDATE promo SET percent = percent % 80 + 1");
    site.publish().says(&["promo@zone-east", "full"]);
    site.bring_down();
    site.assert_all_proven();
    wait_for(&smtp, &format!("Recovered: {missing}"));
    assert_eq!(subjects(&smtp), [missing, &format!("Recovered: {missing}")]);
    hq.term();
}

#[test]
fn rows_changed_by_hand_are_one_mail_though_healed_at_once() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).build();
    site.publish();
    let hq = site.hq.start_ready();
    let relay = site.relay("0421").start_ready();
    let register = site.register("0421-01").start_ready();
    let price = || site.try_read("0421-01", "SELECT price_cents FROM price WHERE sku = 'SKU0000002'").ok().flatten();
    until(PATIENCE, "the first install", || {
        price().is_some() && site.register("0421-01").digests() == site.expected("0421")
    });
    let right = price();
    until(PATIENCE, "the rows were checked", || site.register("0421-01").has_checked_rows());

    let by_hand = Connection::open(site.store_db("0421-01")).unwrap();
    by_hand.busy_timeout(PATIENCE).unwrap();
    by_hand
        .execute_batch(
            "UPDATE price SET price_cents = 1 WHERE sku = 'SKU0000002'; DELETE FROM price WHERE sku = 'SKU0000004'",
        )
        .unwrap();
    drop(by_hand);
    site.register("0421-01").run(&["verify"]).code(1).says(&["price@zone-east", "DRIFT"]);
    until(PATIENCE, "a full heals it", || price() == right);
    let mismatch = "Rows of price@zone-east differ from what was published";
    let mail = wait_for(&smtp, mismatch);
    assert!(mail.text.contains("0421-01"), "{}", mail.text);
    wait_for(&smtp, &format!("Recovered: {mismatch}"));
    assert_eq!(subjects(&smtp), [&format!("Recovered: {mismatch}"), mismatch]);
    site.register("0421-01").run(&["verify"]).ok();
    site.relay("0815").run(&["once"]).ok();
    site.register("0421-02").run(&["once"]).ok();
    site.assert_proven("0421");
    [register, relay, hq].into_iter().for_each(Daemon::term);
}

#[test]
fn a_shadow_changed_by_hand_is_one_mail_though_healed_at_once() {
    let smtp = Smtp::start();
    let site = watchful(&smtp).build();
    site.publish();
    let hq = site.hq.start_ready();
    site.bring_down();
    let by_hand = Connection::open(site.relay("0421").dir.join("data/shadow.db")).unwrap();
    by_hand.execute_batch("DELETE FROM price WHERE sku = 'SKU0000004'").unwrap();
    drop(by_hand);
    site.relay("0421").run(&["verify"]).code(1).says(&["price.price", "WRONG"]);
    // The cycle that heals it is the one that reports.
    site.relay("0421").run(&["once"]).ok();
    let mismatch = "Rows of price@zone-east differ from what was published";
    assert!(wait_for(&smtp, mismatch).text.contains("0421"));
    site.relay("0421").run(&["once"]).ok();
    wait_for(&smtp, &format!("Recovered: {mismatch}"));
    assert_eq!(subjects(&smtp), [&format!("Recovered: {mismatch}"), mismatch]);
    site.relay("0421").run(&["verify"]).ok();
    site.assert_all_proven();
    hq.term();
}

//! Who may sign: keys change, are revoked and stolen; what was not signed for this store now is refused with its
//! reason, and the last good manifest stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};
use std::path::PathBuf;
use tillcast_tests::{Nginx, PATIENCE, Site, Watch, digest, forge, http, until, until_some};

const MANIFEST: &str = "stores/0421/manifest.json";

/// A row that is another one after each call.
fn change(site: &Site) {
    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000001'");
}

/// A key file of headquarters by its number.
fn numbered(site: &Site, name: &str) -> SigningKey {
    forge::key_file(&site.hq.dir.join("state/keys").join(format!("{name}.key")))
}

/// A manifest of 0421 with the next serial, signed by whatever key.
fn signed_by(site: &Site, key: &SigningKey) -> Vec<u8> {
    let mut manifest = site.manifest("0421");
    manifest["serial"] = (manifest["serial"].as_u64().unwrap() + 1).into();
    forge::seal("manifest", &serde_json::to_vec(&manifest).unwrap(), &[key])
}

/// The refusals that a cycle of the relay and of a register that reads the bucket itself report.
fn refusals(site: &Site) -> [String; 2] {
    let [relay, register] = [site.relay("0421"), site.register("0421-01")].map(|node| {
        let cycle = node.run(&["once", "--json"]);
        // 1 where not even the envelope could be read.
        assert!(matches!(cycle.code, Some(1 | 3)), "{}", cycle.text());
        cycle.json()
    });
    [&relay["status"], &register].map(|status| {
        let errors = status["errors"].as_array().unwrap();
        errors.iter().map(|e| format!("{} {}\n", e["code"].as_str().unwrap(), e["text"].as_str().unwrap())).collect()
    })
}

#[test]
fn a_store_that_slept_through_three_rotations_walks_to_the_newest_key() {
    let site = Site::small();
    site.publish();
    site.bring_down();
    for n in 1..=3u64 {
        site.hq.run(&["trust", "rotate"]).ok();
        change(&site);
        site.publish();
        // The other store is awake, and one rotation behind at most.
        site.relay("0815").run(&["once"]).ok();
        assert_eq!(site.hq.json(&["trust", "show"])["version"], 1 + 2 * n);
    }
    site.bring_down();
    site.assert_all_proven();

    // The relay serves each step of the walk: a register that it never met before walks them too.
    let site = {
        let mut site = site;
        site.enroll("0421-02");
        site
    };
    site.bring_down();
    site.assert_all_proven();

    // What the first key signs is nobody's word any more.
    let good = site.object(MANIFEST).unwrap();
    site.put_object(MANIFEST, &signed_by(&site, &numbered(&site, "publisher-1")));
    assert!(refusals(&site).iter().all(|r| r.contains("BAD_SIGNATURE")));
    site.put_object(MANIFEST, &good);
    site.bring_down();
}

#[test]
fn a_rotation_that_waits_between_its_steps_trusts_both_keys() {
    let site = Site::small();
    site.publish();
    site.hq.run(&["trust", "rotate", "--keep-old"]).ok();
    assert_eq!(site.hq.json(&["trust", "show"])["publishers"].as_array().unwrap().len(), 2);
    site.bring_down();
    // Between the steps the old key is still good.
    site.put_object(MANIFEST, &signed_by(&site, &numbered(&site, "publisher-1")));
    site.relay("0421").run(&["once"]).ok();
    // Once that key is let go of nobody could tell whose list that is: it is told first.
    site.hq.run(&["trust", "rotate", "--finish"]).code(1).says(&["no key was changed yet", "store 0421"]);
    assert_eq!(site.hq.json(&["trust", "show"])["publishers"].as_array().unwrap().len(), 2);
    site.hq.run(&["trust", "rotate", "--finish"]).ok();
    assert_eq!(site.hq.json(&["trust", "show"])["publishers"].as_array().unwrap().len(), 1);

    // The root key lies where it should: elsewhere. Without it nothing is changed.
    let safe = site.dir().join("safe.key");
    std::fs::rename(site.hq.dir.join("state/keys/root-1.key"), &safe).unwrap();
    let version = site.hq.json(&["trust", "show"])["version"].clone();
    site.hq.run(&["trust", "rotate"]).code(1).says(&["--root-key"]);
    assert_eq!(site.hq.json(&["trust", "show"])["version"], version);
    let rotated = site.hq.run(&["trust", "rotate", "--root-key", safe.to_str().unwrap()]).ok();
    rotated.says(&["publisher key: ", "No backup made so far has it"]);
    // The old key's manifest had headquarters' next serial.
    change(&site);
    site.publish();
    change(&site);
    site.publish();
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn the_root_key_is_replaced_and_devices_follow() {
    let mut site = Site::small();
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    let told = site.hq.json(&["trust", "rotate", "--root"]);
    let roots = site.hq.json(&["trust", "show"])["root"].clone();
    assert_eq!(roots.as_array().unwrap().len(), 1, "the old root is out");
    let new = std::path::Path::new(told["new_root"].as_str().unwrap());
    assert_eq!(roots[0]["public_key"], forge::public(&forge::key_file(new)));

    // The new root alone signs from here on; one store follows from before, one begins after.
    std::fs::remove_file(site.hq.dir.join("state/keys/root-1.key")).unwrap();
    site.hq.run(&["trust", "rotate"]).ok();
    site.enroll("0815");
    change(&site);
    site.publish();
    site.bring_down();
    site.assert_all_proven();

    // A trust file of a stranger's root moves nobody.
    let before = site.object("trust.json").unwrap();
    let mut trust = forge::payload(&before);
    let version = trust["version"].as_u64().unwrap() + 1;
    trust["version"] = version.into();
    trust["publishers"] = json!([{"key": forge::public(&forge::strange_key(7)), "expires_at": "2099-01-01T00:00:00Z"}]);
    let forged = forge::seal("trust", &serde_json::to_vec(&trust).unwrap(), &[&forge::strange_key(8)]);
    site.put_object("trust.json", &forged);
    site.put_object(&format!("trust/{version:010}.json"), &forged);
    let good = site.object(MANIFEST).unwrap();
    site.put_object(MANIFEST, &signed_by(&site, &forge::strange_key(7)));
    assert!(refusals(&site).iter().all(|r| r.contains("BAD_SIGNATURE")), "{:?}", refusals(&site));
    site.put_object("trust.json", &before);
    std::fs::remove_file(site.bucket().join(format!("trust/{version:010}.json"))).unwrap();
    site.put_object(MANIFEST, &good);
    site.bring_down();
    site.assert_all_proven();
}

/// A register's key, from a new enrolment of it.
fn enrolled_key(site: &Site, register: &str) -> SigningKey {
    let code = site.hq.json(&["enroll", register])["code"].as_str().unwrap().to_owned();
    site.register(register).run(&["enroll", &code]).ok();
    let code: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(code).unwrap()).unwrap();
    SigningKey::from_bytes(&hex::decode(code["seed"].as_str().unwrap()).unwrap().try_into().unwrap())
}

/// The status of a heartbeat's post, and why it was refused.
fn beat(url: &str, register: &str, seq: u64, key: &SigningKey) -> (u16, String) {
    let beat = json!({"format": 1, "device": register, "seq": seq, "sent_at": "2026-01-01T00:00:00Z", "program": "x",
        "serial": 1, "streams": {}, "network": "online", "errors": [], "debts": [], "disk": null, "clock_skew_s": null});
    let envelope: Value =
        serde_json::from_slice(&forge::seal("heartbeat", &serde_json::to_vec(&beat).unwrap(), &[key])).unwrap();
    let body = serde_json::to_vec(&json!({"beats": [{"envelope": envelope, "seen_s": 0}]})).unwrap();
    let reply = http::post(&format!("{url}/v1/heartbeats"), "application/json", &body);
    (reply.status, reply.text())
}

#[test]
fn a_revoked_register_is_heard_no_more() {
    let site = Site::builder().hq_service().build();
    let key = enrolled_key(&site, "0421-02");
    site.publish();
    site.bring_down();
    let hq = site.hq.start_ready();
    let relay = site.relay("0421").start_ready();
    let (relay_url, hq_url) = (site.relay("0421").url(), site.hq.url());
    assert_eq!(beat(&relay_url, "0421-02", 100, &key).0, 200);
    assert_eq!(beat(&relay_url, "0421-02", 101, &forge::strange_key(5)).0, 401, "another's signature");
    assert_eq!(beat(&relay_url, "0421-09", 1, &key).0, 401, "nobody's name");

    assert!(site.manifest("0421")["registers"]["0421-02"].is_string());
    site.hq.run(&["revoke", "0421-02"]).ok();
    assert!(site.manifest("0421")["registers"]["0421-02"].is_null(), "left out of the manifest");
    assert!(site.manifest("0421")["registers"]["0421-01"].is_string());
    let serial = site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay has the manifest without it", || site.relay("0421").status()["serial"] == serial);
    assert_eq!(beat(&relay_url, "0421-02", 102, &key).0, 401);
    let (_, answer) = beat(&hq_url, "0421-02", 103, &key);
    assert!(answer.contains("revoked"), "{answer}");

    // The register goes on selling, and says what is the matter; the other one is well.
    let register = site.register("0421-02").run(&["once", "--json"]).ok().json();
    assert!(
        register["errors"].as_array().unwrap().iter().any(|e| e["code"] == "REFUSED" && e["object"] == "heartbeat"),
        "{register:#}"
    );
    let well = site.register("0421-01").run(&["once", "--json"]).ok().json();
    assert_eq!(well["errors"], json!([]));

    // Enrolled anew it is welcome.
    let key = enrolled_key(&site, "0421-02");
    let serial = site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay has its new key", || site.relay("0421").status()["serial"] == serial);
    assert_eq!(beat(&relay_url, "0421-02", 1, &key).0, 200, "a new key begins its own count");
    [relay, hq].into_iter().for_each(tillcast_tests::Daemon::term);
}

#[test]
fn a_revoked_relay_is_refused_by_headquarters() {
    let site = Site::builder().hq_service().build();
    site.publish();
    let hq = site.hq.start_ready();
    site.relay("0421").run(&["once"]).ok();
    let heard = |id: &str| {
        site.hq.status()["devices"].as_array().unwrap().iter().any(|d| d["id"] == id && d["heard_s"].is_u64())
    };
    assert!(heard("0421"));
    site.hq.run(&["revoke", "0421"]).ok();
    assert!(site.manifest("0421")["relay"].is_null());
    site.relay("0421").run(&["once"]).says(&["was revoked"]);
    assert!(!heard("0421"), "a revoked device is not listed as one that is heard");
    hq.term();
}

#[test]
fn a_revoked_publisher_key_signs_nothing() {
    let site = Site::small();
    site.publish();
    site.bring_down();
    let stolen = numbered(&site, "publisher-1");
    let id = site.hq.json(&["trust", "show"])["publishers"][0]["id"].as_str().unwrap().to_owned();
    site.hq.run(&["trust", "revoke", "0000000000000000"]).code(1).says(&[&id]);
    site.hq.run(&["trust", "revoke", &id]).ok();
    site.bring_down();
    let good = site.object(MANIFEST).unwrap();
    let serial = site.manifest("0421")["serial"].clone();
    site.put_object(MANIFEST, &signed_by(&site, &stolen));
    assert!(refusals(&site).iter().all(|r| r.contains("BAD_SIGNATURE")));
    assert_eq!(site.relay("0421").status()["serial"], serial, "the last good one stays");
    site.put_object(MANIFEST, &good);
    change(&site);
    site.publish();
    site.bring_down();
    site.assert_all_proven();
}

/// A full pack of prices that says 1 cent for everything, at a version far ahead.
fn stolen_prices(site: &Site, version: u64) -> Vec<u8> {
    let (_, pack) = site.head_pack("0421", "price");
    let mut lines = forge::unpack(&pack);
    let header: Value = serde_json::from_str(&lines[0]).unwrap();
    let was = format!("\"version\":{}", header["version"]);
    lines[0] = lines[0].replacen(&was, &format!("\"version\":{version}"), 1);
    let db = rusqlite::Connection::open_in_memory().unwrap();
    db.execute_batch("CREATE TABLE price (sku TEXT, price_cents INTEGER, updated TEXT)").unwrap();
    for line in lines.iter_mut().filter(|l| l.starts_with('[')) {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row[1] = 1.into();
        db.execute("INSERT INTO price VALUES (?1, 1, ?2)", (row[0].as_str().unwrap(), row[2].as_str().unwrap()))
            .unwrap();
        *line = row.to_string();
    }
    let last = lines.len() - 1;
    let trailer: Value = serde_json::from_str(&lines[last]).unwrap();
    let was = trailer["digests"]["price"].as_str().unwrap();
    lines[last] = lines[last].replace(was, &digest::of_table(&db, "price"));
    forge::pack(&lines)
}

#[test]
fn a_new_epoch_brings_stores_back_after_a_stolen_key_jumped_ahead() {
    const FAR: u64 = 1 << 40;
    let (mut watch, site) = Watch::over(Site::builder());
    let site = site.build();
    watch.start(&site);
    site.publish();
    site.bring_down();

    // The thief has the publisher's key and the bucket: a serial and a version that headquarters never reaches.
    let pack = stolen_prices(&site, FAR);
    site.put_object(&format!("packs/price@zone-east/{FAR:010}.full.pack"), &pack);
    let trailer: Value = serde_json::from_str(forge::unpack(&pack).last().unwrap()).unwrap();
    let mut manifest = site.manifest("0421");
    manifest["serial"] = (1u64 << 62).into();
    // A time far ahead, too: devices take it for the least that it can be, by which every key has expired.
    manifest["created_at"] = "2090-01-01T00:00:00Z".into();
    manifest["expires_at"] = "2099-01-01T00:00:00Z".into();
    let price = &mut manifest["streams"]["price"];
    price["version"] = FAR.into();
    price["packs"].as_array_mut().unwrap().push(forge::entry(&pack));
    price["digests"] = trailer["digests"].clone();
    let key = site.signing_key("publisher");
    let forged = forge::seal("manifest", &serde_json::to_vec(&manifest).unwrap(), &[&key]);
    site.put_object(MANIFEST, &forged);
    site.bring_down();
    let cheap = "SELECT count(*) FROM price WHERE price_cents = 1";
    assert_ne!(site.read("0421-01", cheap).unwrap(), "0", "a stolen key is believed: that is why it is to be revoked");
    assert_eq!(site.relay("0421").version("price@zone-east"), Some(FAR));

    let id = site.hq.json(&["trust", "show"])["publishers"][0]["id"].as_str().unwrap().to_owned();
    // Headquarters heard of that serial by the heartbeats; it does not count from there.
    until(PATIENCE, "headquarters heard", || {
        site.hq.status()["devices"].to_string().contains(&(1u64 << 62).to_string())
    });
    let told = watch.tells("Store 0421 holds a list that headquarters did not sign", || ());
    assert!(told.contains("--new-epoch"), "what to do: {told}");
    site.hq.run(&["trust", "revoke", &id, "--new-epoch"]).ok();
    site.hq.run(&["publish"]).code(3).says(&[&FAR.to_string(), "it is not ours"]);
    std::fs::remove_file(site.bucket().join(format!("packs/price@zone-east/{FAR:010}.full.pack"))).unwrap();
    assert_eq!(site.manifest("0421")["epoch"], 2);
    assert!(site.manifest("0421")["serial"].as_u64().unwrap() < 1 << 62);
    site.bring_down();
    site.assert_all_proven();
    assert_eq!(site.read("0421-01", cheap).unwrap(), "0");

    // The thief's manifest again, also one for the new epoch: refused. And headquarters goes on as ever.
    let good = site.object(MANIFEST).unwrap();
    manifest["epoch"] = 2.into();
    let again = forge::seal("manifest", &serde_json::to_vec(&manifest).unwrap(), &[&key]);
    for bad in [forged, again] {
        site.put_object(MANIFEST, &bad);
        assert!(refusals(&site).iter().all(|r| r.contains("BAD_SIGNATURE")));
    }
    site.put_object(MANIFEST, &good);
    change(&site);
    site.publish();
    site.bring_down();
    site.assert_all_proven();
    watch.is_calm(|| site.bring_down());
}

#[test]
fn manifests_that_are_not_to_be_believed_are_refused_with_their_reason_and_the_last_good_one_stays() {
    let mut site = Site::small();
    site.publish();
    site.bring_down();
    let older = site.object(MANIFEST).unwrap();
    change(&site);
    site.publish();
    site.bring_down();
    let good = site.object(MANIFEST).unwrap();
    let serial = site.manifest("0421")["serial"].clone();
    // This register reads the bucket itself: its relay's address leads nowhere.
    site.registers
        .get_mut("0421-01")
        .unwrap()
        .set_text("relay", &format!("http://127.0.0.1:{}", tillcast_tests::quiet_port()));

    let key = site.signing_key("publisher");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut manifest = site.manifest("0421");
        manifest["serial"] = (manifest["serial"].as_u64().unwrap() + 1).into();
        change(&mut manifest);
        forge::seal("manifest", &serde_json::to_vec(&manifest).unwrap(), &[&key])
    };
    let mut bent = good.clone();
    let at = bent.windows(9).position(|w| w == b"\"payload\"").unwrap() + 40;
    bent[at] = if bent[at] == b'A' { b'B' } else { b'A' };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("OTHER_STORE", site.object("stores/0815/manifest.json").unwrap()),
        ("OLDER_SERIAL", older),
        (
            "SAME_SERIAL_OTHER_BYTES",
            with(&|m| {
                m["serial"] = serial.clone();
                m["created_at"] = "2020-01-01T00:00:00Z".into();
            }),
        ),
        ("EXPIRED", with(&|m| m["expires_at"] = "2020-01-01T00:00:00Z".into())),
        ("BAD_SIGNATURE", signed_by(&site, &forge::strange_key(3))),
        ("BAD_SIGNATURE", bent),
        ("OTHER_EPOCH", with(&|m| m["epoch"] = 9.into())),
        ("UNKNOWN_FORMAT", with(&|m| m["format"] = 2.into())),
        ("BAD_MANIFEST", with(&|m| m["streams"]["../x"] = m["streams"]["price"].clone())),
        ("BAD_MANIFEST", with(&|m| m["epoch"] = 0.into())),
        ("NOT_AN_ENVELOPE", b"<html>please log in</html>".to_vec()),
        ("NOT_AN_ENVELOPE", Vec::new()),
        ("OTHER_PAYLOAD_TYPE", {
            let manifest = serde_json::to_vec(&site.manifest("0421")).unwrap();
            forge::seal("heartbeat", &manifest, &[&key])
        }),
        // Not even read to its end: the limit is 4 MiB.
        ("more than 4194304 bytes", vec![b' '; 5 << 20]),
    ];
    for (reason, envelope) in cases {
        site.put_object(MANIFEST, &envelope);
        for (who, told) in ["relay", "register"].iter().zip(refusals(&site)) {
            assert!(told.contains(reason), "{who}, {reason}: {told}");
            assert!(told.starts_with("REFUSED ") || reason.contains(' '), "{who}, {reason}: {told}");
        }
        for node in [site.relay("0421"), site.register("0421-01")] {
            let status = node.status();
            assert_eq!(status["serial"], serial, "{reason}: the last good one stays");
            // Also to whoever asks later.
            let told = status["errors"].to_string();
            assert!(told.contains("REFUSED") && told.contains(reason) || reason.contains(' '), "{reason}: {told}");
        }
    }
    site.put_object(MANIFEST, &good);
    for node in [site.relay("0421"), site.register("0421-01")] {
        node.run(&["once"]).ok();
        assert_eq!(node.status()["errors"], json!([]), "mended");
    }
    site.assert_proven("0421");
    change(&site);
    site.publish();
    site.bring_down();
    site.assert_proven("0421");
}

/// The environment in which a program's clock is off by this much (`-5h`, `+3d`), its durations right.
fn clock_off(by: &str) -> Vec<(String, String)> {
    let libs = ["x86_64-linux-gnu", "aarch64-linux-gnu"]
        .map(|a| PathBuf::from(format!("/usr/lib/{a}/faketime/libfaketimeMT.so.1")));
    let lib = libs.iter().find(|l| l.exists()).expect("libfaketime is missing: run tests/run --setup");
    let pairs = [
        ("LD_PRELOAD", lib.to_str().unwrap()),
        ("FAKETIME", by),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ];
    pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec()
}

#[test]
fn enrolment_codes_that_are_old_torn_or_for_others_are_refused() {
    let mut site = Site::small();
    site.publish();
    for id in ["0421", "0421-01"] {
        let code = site.hq.json(&["enroll", id])["code"].as_str().unwrap().to_owned();
        let node =
            if id.contains('-') { site.registers.get_mut(id).unwrap() } else { site.relays.get_mut(id).unwrap() };
        std::fs::remove_dir_all(node.dir.join("data")).unwrap();
        for (torn, word) in
            [(&code[..code.len() / 2], "not copied whole"), (&code[1..], "not copied whole"), ("", "not copied whole")]
        {
            node.run(&["enroll", torn]).code(2).says(&[word]);
        }
        let later = clock_off("+8d");
        let later: Vec<(&str, &str)> = later.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        node.run_env(&["enroll", &code], &later).code(2).says(&["expired at", &format!("hq-publisher enroll {id}")]);
        // Nobody was enrolled by all that.
        node.run(&["once"]).says(&["holds no enrolment"]);
        // With a space and a newline from the clipboard it is good.
        node.run(&["enroll", &format!(" {code}\n")]).ok();
        // From standard input too: it stands in no history then.
        let (file, log) = (node.dir.join("code"), node.dir.join("enroll.log"));
        std::fs::write(&file, format!("{code}\n")).unwrap();
        let mut command = std::process::Command::new(node.product.path());
        command.args(["enroll", "-"]).current_dir(&node.dir).stdin(std::fs::File::open(&file).unwrap());
        let done = command.stdout(std::fs::File::create(&log).unwrap()).status().unwrap();
        assert!(done.success(), "{done}: {}", std::fs::read_to_string(&log).unwrap());
    }
    let code = site.hq.json(&["enroll", "0421-02"])["code"].as_str().unwrap().to_owned();
    site.register("0421-01").run(&["enroll", &code]).code(2).says(&["0421-02", "0421-01"]);
    site.hq.run(&["enroll", "0999"]).code(1).says(&["0999", "not known"]);
    for id in ["../x", "0421-01-02", "", "CON"] {
        site.hq.run(&["enroll", id]).code(2);
    }
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn registers_whose_clocks_are_hours_off_work_and_say_so() {
    let mut site = Site::builder().hq_service().build();
    site.registers.get_mut("0421-01").unwrap().env = clock_off("-5h");
    site.registers.get_mut("0421-02").unwrap().env = clock_off("+7h");
    site.publish();
    let hq = site.hq.start_ready();
    let relay = site.relay("0421").start_ready();
    let registers: Vec<_> = site.registers_of("0421").map(|(_, r)| r.start_ready()).collect();
    let price = |id: &str| site.try_read(id, "SELECT price_cents FROM price WHERE sku = 'SKU0000005'").ok().flatten();
    site.sql("UPDATE price SET price_cents = 4321 WHERE sku = 'SKU0000005'");
    site.publish();
    for (id, hours) in [("0421-01", -5), ("0421-02", 7)] {
        until(PATIENCE, "the price arrives", || price(id).as_deref() == Some("4321"));
        let close = |s: i64| (s - hours * 3600).abs() < 60;
        until(PATIENCE, "its status tells the skew", || {
            site.register(id).status()["clock_skew_s"].as_i64().is_some_and(close)
        });
        let told = until_some(PATIENCE, "headquarters hears of it", || {
            let status = site.hq.status();
            let device = status["devices"].as_array().unwrap().iter().find(|d| d["id"] == id).cloned();
            device.filter(|d| d["clock_skew_s"].is_i64())
        });
        assert!(close(told["clock_skew_s"].as_i64().unwrap()), "{told:#}");
        assert!(told["heard_s"].as_u64().unwrap() < 60, "silence is measured by headquarters' clock: {told:#}");
        until(PATIENCE, "nothing is wrong", || site.register(id).status()["errors"] == json!([]));
    }
    // A relay's clock may be wrong as well.
    site.relays.get_mut("0815").unwrap().env = clock_off("-26h");
    let status = site.relay("0815").run(&["once", "--json"]).ok().json()["status"].clone();
    assert!((status["clock_skew_s"].as_i64().unwrap() + 26 * 3600).abs() < 60, "{status:#}");
    site.assert_proven("0421");
    [registers, vec![relay, hq]].into_iter().flatten().for_each(tillcast_tests::Daemon::term);
}

/// A machine without a clock that outlives the power: certificates are judged by it, what is signed is not.
#[test]
fn at_a_clock_before_all_certificates_tls_waits_and_other_ways_go_on() {
    let mut site = Site::small();
    site.publish();
    let server = Nginx::tls(&site.bucket(), "IP:127.0.0.1");
    let relay = site.relays.get_mut("0421").unwrap();
    relay.set_text("source.ca_file", server.ca().to_str().unwrap());
    relay.set("sources", &format!("['{}']", server.tls_url()));
    relay.env = clock_off("-20000d");
    relay.run(&["once"]).code(1).says(&["SOURCE", "certificate"]);
    relay.set("sources", &format!("['{}', '{}']", server.tls_url(), server.url()));
    relay.run(&["once"]).code(3).says(&["SOURCE", "certificate"]);
    let held = relay.version("price@zone-east");
    assert!(held.is_some(), "plain HTTP goes on");
    // The clock is put right.
    relay.env.clear();
    relay.set("sources", &format!("['{}']", server.tls_url()));
    change(&site);
    site.publish();
    let relay = site.relay("0421");
    relay.run(&["once"]).ok();
    assert!(relay.version("price@zone-east") > held);
    site.bring_down();
    site.assert_proven("0421");
}

#[test]
fn a_headquarters_restored_from_a_backup_goes_on_above_what_it_forgot() {
    let site = Site::small();
    site.publish();
    site.bring_down();
    let (state, backup) = (site.hq.dir.join("state"), tillcast_tests::temp_dir("backup"));
    let files = || {
        let all = std::fs::read_dir(&state).unwrap().flatten().map(|e| e.path());
        all.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("fleet.db")).collect::<Vec<_>>()
    };
    for file in files() {
        std::fs::copy(&file, backup.path().join(file.file_name().unwrap())).unwrap();
    }
    for _ in 0..2 {
        change(&site);
        site.publish();
    }
    site.bring_down();
    let (serial, version) = (site.manifest("0421")["serial"].as_u64().unwrap(), site.version("0421", "price"));

    files().iter().for_each(|f| std::fs::remove_file(f).unwrap());
    for file in std::fs::read_dir(backup.path()).unwrap().flatten() {
        std::fs::copy(file.path(), state.join(file.file_name())).unwrap();
    }
    change(&site);
    // The first run may find out, and the second mend it; no third is needed.
    let first = site.hq.run(&["publish"]);
    site.hq.run(&["publish"]).ok();
    assert!(site.manifest("0421")["serial"].as_u64().unwrap() > serial, "{}", first.text());
    assert!(site.version("0421", "price") > version, "{}", first.text());
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn a_lost_publisher_key_is_replaced_by_the_root_key_on_a_new_machine() {
    let site = Site::small();
    site.publish();
    change(&site);
    site.publish();
    site.bring_down();
    let (serial, version) = (site.manifest("0421")["serial"].as_u64().unwrap(), site.version("0421", "price"));
    // The machine is gone with the publisher key and the ledger.
    let state = site.hq.dir.join("state");
    let safe = site.dir().join("safe.key");
    std::fs::copy(state.join("keys/root-1.key"), &safe).unwrap();
    let lost = numbered(&site, "publisher-1");
    std::fs::remove_dir_all(&state).unwrap();
    for command in ["init", "publish"] {
        site.hq.run(&[command]).code(1).says(&["trust rotate --root-key"]);
    }
    let root = safe.to_str().unwrap();
    site.hq.run(&["trust", "rotate", "--root-key", root]).ok().says(&["next: run `hq-publisher publish` now"]);
    assert_eq!(site.hq.json(&["trust", "show"])["publishers"].as_array().unwrap().len(), 2);
    change(&site);
    site.publish();
    assert!(site.manifest("0421")["serial"].as_u64().unwrap() > serial);
    assert_eq!(site.version("0421", "price"), version + 1, "it goes on by a delta where the lost one ended");
    site.bring_down();
    site.assert_all_proven();

    site.hq.run(&["trust", "rotate", "--finish", "--root-key", root]).ok();
    assert_eq!(site.hq.json(&["trust", "show"])["publishers"].as_array().unwrap().len(), 1);
    site.bring_down();
    let good = site.object(MANIFEST).unwrap();
    site.put_object(MANIFEST, &signed_by(&site, &lost));
    assert!(refusals(&site).iter().all(|r| r.contains("BAD_SIGNATURE")), "whoever finds the lost key signs nothing");
    site.put_object(MANIFEST, &good);
    change(&site);
    site.publish();
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn what_was_accepted_outlives_its_manifest_and_new_ones_must_be_fresh() {
    let mut site = Site::small();
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    let relay = site.relay("0421").start_ready();
    site.register("0421-01").run(&["once"]).ok();
    relay.term();

    // Forty days later headquarters is still silent; manifests live for thirty.
    for node in site.relays.values_mut().chain(site.registers.values_mut()) {
        node.env = clock_off("+40d");
    }
    site.with_relays(|| {
        let register = site.register("0421-01").run(&["once", "--json"]).ok().json();
        assert_eq!(register["errors"], json!([]), "its heartbeat is taken, its rows stay");
        assert!(register["debts"].to_string().contains("expired"), "{register:#}");
        // One that never had it does not begin with it.
        let new = site.register("0421-02").run(&["once", "--json"]).code(1).json();
        assert!(new["errors"].to_string().contains("EXPIRED"), "{new:#}");
    });
    assert!(site.relay("0815").run(&["once"]).code(1).text().contains("expired"));

    // A clock that leaps so far is asked about; then all is signed anew.
    site.hq.env.extend(clock_off("+40d"));
    site.hq.run(&["publish"]).code(1).says(&["--clock-is-right"]);
    site.hq.run(&["publish", "--clock-is-right"]).ok();
    site.bring_down();
    site.assert_all_proven();
    assert_eq!(site.register("0421-01").status()["debts"], json!([]));
}

/// The roots are lost, or a pilot becomes the real thing: another headquarters counts versions from one again.
#[test]
fn under_another_headquarters_what_was_held_counts_no_more_and_is_read_until_its_own_comes() {
    let mut site = Site::builder().stores(&[("0421", "east")]).registers(1).build();
    site.publish();
    for _ in 0..3 {
        change(&site);
        site.publish();
    }
    site.bring_down();
    let old = digest::of_database(&site.store_db("0421-01"));
    for gone in ["hq/state", "objects"] {
        std::fs::remove_dir_all(site.dir().join(gone)).unwrap();
    }
    site.hq.run(&["init"]).ok();
    // One stream has less versions than were held, the other as many.
    site.sql("UPDATE price SET price_cents = 7; UPDATE item SET name = 'other'");
    ["0421", "0421-01"].iter().for_each(|id| site.enroll(id));
    assert_eq!(digest::of_database(&site.store_db("0421-01")), old, "selling goes on");
    site.publish();
    site.bring_down();
    assert_eq!(digest::of_database(&site.store_db("0421-01")), site.expected("0421"));
    assert_eq!(site.relay("0421").digests(), site.expected("0421"));
    let held = site.register("0421-01").version("price@zone-east");
    assert_eq!(held, Some(1));
}

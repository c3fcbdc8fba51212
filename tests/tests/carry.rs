//! Objects carried by hand: headquarters exports, a relay without any network imports, its signed receipt goes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tillcast_tests::{Daemon, PATIENCE, Site, temp_dir, until};

/// A site whose stores are reached by nobody, and a stick with what store 0421 should have.
fn island() -> (Site, TempDir) {
    let mut site = Site::small();
    for relay in site.relays.values_mut() {
        // One source refuses, one is gone.
        let dead = format!("['http://127.0.0.1:{}', 'file:///nonexistent/bucket']", tillcast_tests::quiet_port());
        relay.set("sources", &dead);
    }
    for register in site.registers.values_mut() {
        register.set("fallback", "[]");
    }
    site.publish();
    let stick = temp_dir("stick");
    export(&site, stick.path());
    (site, stick)
}

fn export(site: &Site, to: &Path) -> Value {
    site.hq.json(&["export", "--store", "0421", to.to_str().unwrap()])
}

fn change(site: &Site) {
    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku < 'SKU0000005'; DELETE FROM promo WHERE id = 4");
    site.publish();
}

/// Imports; the report of `--json`.
fn import(site: &Site, stick: &Path, code: i32) -> Value {
    site.relay("0421").run(&["import", stick.to_str().unwrap(), "--json"]).code(code).json()
}

/// Reads receipts at headquarters; what `receipt --json` says of the only one.
fn read_back(site: &Site, report: &Value, code: i32) -> Value {
    let file = report["receipt_file"].as_str().unwrap();
    let lines = site.hq.run(&["receipt", file, "--json"]).code(code).json();
    assert_eq!(lines.as_array().unwrap().len(), 1);
    lines[0].clone()
}

fn registers_follow(site: &Site) {
    let relay = site.relay("0421").start_ready();
    for (_, register) in site.registers_of("0421") {
        register.run(&["once"]).ok();
    }
    relay.term();
    site.assert_proven("0421");
}

/// The packs below a folder.
fn packs(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(packs(&path));
        } else if path.extension().is_some_and(|e| e == "pack") {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_stick_brings_an_island_up_and_its_receipt_proves_it() {
    let (site, stick) = island();
    site.relay("0421").run(&["once"]).code(1);
    let done = import(&site, stick.path(), 0);
    assert_eq!((&done["already_here"], &done["refused"]), (&json!(false), &json!(false)));
    assert!(done["receipt_file"].as_str().unwrap().starts_with(stick.path().join("receipts").to_str().unwrap()));
    registers_follow(&site);

    let line = read_back(&site, &done, 0);
    assert_eq!(line["receipt"]["serial"], site.manifest("0421")["serial"]);
    assert_eq!(line["receipt"]["digests"]["price@zone-east"]["price"], site.expected("0421")["price"]);
    assert!(line["behind"].is_null() && line["differ"].is_null() && line["refused"].is_null(), "{line:#}");

    // The next trip brings the changes alone, and the receipt of the first one tells that it is behind now.
    change(&site);
    assert!(read_back(&site, &done, 0)["behind"]["price@zone-east"].is_array());
    let exported = export(&site, stick.path());
    assert!(exported["kept"].as_u64().unwrap() > 0, "packs that are on the stick stay: {exported}");
    let done = import(&site, stick.path(), 0);
    let taken: Vec<&str> = done["taken"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(taken.iter().filter(|t| t.ends_with(".delta.pack")).count(), 2, "{taken:?}");
    assert_eq!(taken.iter().filter(|t| t.ends_with(".full.pack")).count(), 0, "{taken:?}");
    registers_follow(&site);
}

#[test]
fn what_is_there_already_is_welcome() {
    let (mut site, stick) = island();
    import(&site, stick.path(), 0);
    // Repeated.
    let again = import(&site, stick.path(), 0);
    assert_eq!(again["already_here"], json!(true));
    site.relay("0421").run(&["import", stick.path().to_str().unwrap()]).ok().says(&["already here", "receipt"]);
    assert!(read_back(&site, &again, 0)["refused"].is_null());

    // The network brought it: an equal stick, then an older one.
    change(&site);
    let newer = temp_dir("stick");
    export(&site, newer.path());
    let bucket = format!("['file://{}']", site.bucket().display());
    site.relays.get_mut("0421").unwrap().set("sources", &bucket);
    site.relay("0421").run(&["once"]).ok();
    for stick in [&newer, &stick] {
        let done = import(&site, stick.path(), 0);
        assert_eq!((&done["already_here"], &done["refused"]), (&json!(true), &json!(false)), "{done:#}");
        assert_eq!(done["receipt"]["serial"], site.manifest("0421")["serial"], "what is held, not what was carried");
    }
    registers_follow(&site);
}

#[test]
fn links_and_ways_out_of_the_folder_are_refused() {
    let (site, stick) = island();
    // The only price pack is a link, even to the right bytes; promo's folder is one; staff's is a device's way out.
    let [price] = packs(&stick.path().join("packs/price@zone-east")).try_into().unwrap();
    let elsewhere = temp_dir("elsewhere");
    fs::rename(&price, elsewhere.path().join("price")).unwrap();
    symlink(elsewhere.path().join("price"), &price).unwrap();
    let promo = stick.path().join("packs/promo@zone-east");
    fs::rename(&promo, elsewhere.path().join("promo")).unwrap();
    symlink("../../../../../../../../../../".to_owned() + elsewhere.path().join("promo").to_str().unwrap(), &promo)
        .unwrap();
    let [staff] = packs(&stick.path().join("packs/staff@store-0421")).try_into().unwrap();
    let staff_bytes = fs::read(&staff).unwrap();
    fs::remove_file(&staff).unwrap();
    symlink("/dev/zero", &staff).unwrap();
    // Names that are nobody's are not looked at.
    fs::create_dir_all(stick.path().join("packs/..price@zone-east")).unwrap();
    fs::write(stick.path().join("autorun.inf"), "x").unwrap();

    let done = import(&site, stick.path(), 3);
    let refusals = done["receipt"]["refusals"].as_array().unwrap();
    for name in ["price@zone-east", "promo@zone-east", "staff@store-0421"] {
        let refused =
            refusals.iter().any(|r| r.as_str().unwrap().contains(name) && r.as_str().unwrap().contains("link"));
        assert!(refused, "{name}: {refusals:#?}");
    }
    assert_eq!(done["receipt"]["versions"], json!({"catalog@all": 1}), "the rest is in");
    assert!(!site.relay("0421").dir.join("data/import/autorun.inf").exists());

    // A receipts folder that leads elsewhere is not written through.
    fs::remove_dir_all(stick.path().join("receipts")).unwrap();
    let outside = temp_dir("outside");
    symlink(outside.path(), stick.path().join("receipts")).unwrap();
    for link in [&price, &promo, &staff] {
        fs::remove_file(link).unwrap();
    }
    fs::rename(elsewhere.path().join("price"), &price).unwrap();
    fs::rename(elsewhere.path().join("promo"), &promo).unwrap();
    fs::write(&staff, staff_bytes).unwrap();
    let done = import(&site, stick.path(), 0);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(done["receipt_file"].as_str().unwrap().contains("data/receipts/"), "{done:#}");
    assert!(read_back(&site, &done, 0)["behind"].is_null());
    registers_follow(&site);

    // A manifest that is a link is no manifest.
    change(&site);
    let stick = temp_dir("stick");
    export(&site, stick.path());
    let manifest = stick.path().join("stores/0421/manifest.json");
    fs::rename(&manifest, elsewhere.path().join("m")).unwrap();
    symlink(elsewhere.path().join("m"), &manifest).unwrap();
    let refused = site.relay("0421").run(&["import", stick.path().to_str().unwrap()]);
    assert_ne!(refused.code, Some(0), "{}", refused.text());
    assert!(refused.text().contains("link"), "{}", refused.text());
    assert_eq!(site.relay("0421").version("price@zone-east"), Some(1));
}

#[test]
fn damage_on_the_stick_is_named_and_the_rest_is_imported() {
    let (site, stick) = island();
    let [price] = packs(&stick.path().join("packs/price@zone-east")).try_into().unwrap();
    let right = fs::read(&price).unwrap();
    let flipped = {
        let mut bytes = right.clone();
        bytes[100] ^= 1;
        bytes
    };
    for (wrong, word) in
        [(flipped, "SHA-256"), (right[..right.len() / 2].to_vec(), "bytes"), ([&right[..], b"x"].concat(), "longer")]
    {
        fs::write(&price, wrong).unwrap();
        let done = import(&site, stick.path(), 3);
        let refusals = done["receipt"]["refusals"].to_string();
        assert!(refusals.contains("price@zone-east") && refusals.contains(word), "{word}: {refusals}");
        assert!(done["behind"]["price"].is_string());
        let served = done["receipt"]["versions"].as_object().unwrap();
        assert_eq!(served.keys().collect::<Vec<_>>(), ["catalog@all", "promo@zone-east", "staff@store-0421"]);
        let line = read_back(&site, &done, 0);
        assert_eq!(line["behind"]["price@zone-east"], json!([null, 1]), "headquarters sees what is missing");
        assert!(line["receipt"]["refusals"].to_string().contains(word));
    }
    // It says nothing about the pack: the same from a good stick is taken.
    fs::write(&price, right).unwrap();
    import(&site, stick.path(), 0);
    registers_follow(&site);

    // Another store's stick, an empty folder, none at all, and a manifest that was changed.
    let other = temp_dir("stick");
    site.hq.run(&["export", "--store", "0815", other.path().to_str().unwrap()]).ok();
    let to = |dir: &Path| site.relay("0421").run(&["import", dir.to_str().unwrap()]);
    to(other.path()).code(1).says(&["stores/0421/manifest.json"]);
    fs::create_dir_all(other.path().join("stores/0421")).unwrap();
    fs::copy(other.path().join("stores/0815/manifest.json"), other.path().join("stores/0421/manifest.json")).unwrap();
    to(other.path()).code(1).says(&["OTHER_STORE"]);
    to(temp_dir("empty").path()).code(1);
    to(Path::new("/nonexistent")).code(1).says(&["/nonexistent"]);
    site.hq.run(&["export", "--store", "0999", other.path().to_str().unwrap()]).code(1).says(&["0999"]);
    site.assert_proven("0421");
}

#[test]
fn a_receipt_that_was_changed_is_refused() {
    let (mut site, stick) = island();
    let done = import(&site, stick.path(), 0);
    let file = PathBuf::from(done["receipt_file"].as_str().unwrap());
    let good = fs::read(&file).unwrap();
    let mut payload = tillcast_tests::forge::payload(&good);
    payload["serial"] = 999.into();
    let forged = tillcast_tests::forge::seal(
        "receipt",
        &serde_json::to_vec(&payload).unwrap(),
        &[&tillcast_tests::forge::strange_key(4)],
    );
    fs::write(&file, forged).unwrap();
    assert!(read_back(&site, &done, 1)["refused"].as_str().unwrap().contains("signature"));
    fs::write(&file, &good[..good.len() / 2]).unwrap();
    assert!(read_back(&site, &done, 1)["refused"].is_string());
    // One good, one bad: done in part.
    let copy = stick.path().join("copy.json");
    fs::write(&copy, &good).unwrap();
    site.hq.run(&["receipt", copy.to_str().unwrap(), file.to_str().unwrap()]).code(3);
    // A relay that was replaced since: its old key's word is refused.
    site.enroll("0421");
    site.hq.run(&["receipt", copy.to_str().unwrap()]).code(1);
}

#[test]
fn a_stick_that_cannot_be_written_is_answered_in_the_data_directory() {
    let (site, stick) = island();
    // Root writes through any permission: a file where the folder should be refuses everybody.
    fs::write(stick.path().join("receipts"), "").unwrap();
    let done = import(&site, stick.path(), 0);
    let file = PathBuf::from(done["receipt_file"].as_str().unwrap());
    assert!(file.starts_with(site.relay("0421").dir.join("data/receipts")), "{}", file.display());
    assert!(read_back(&site, &done, 0)["behind"].is_null());
    registers_follow(&site);
}

#[test]
fn a_running_relay_takes_an_import_over_and_its_registers_wake() {
    let (site, stick) = island();
    let relay = site.relay("0421").start_ready();
    let register = site.register("0421-01").start_ready();
    // Handed over by the command line, while the daemon has the directory.
    let done = import(&site, stick.path(), 0);
    assert!(!done["taken"].as_array().unwrap().is_empty());
    let price = || site.try_read("0421-01", "SELECT price_cents FROM price WHERE sku = 'SKU0000002'").ok().flatten();
    until(PATIENCE, "the first install reaches the register", || price().is_some());

    site.sql("UPDATE price SET price_cents = 3131 WHERE sku = 'SKU0000002'");
    site.publish();
    export(&site, stick.path());
    let done = import(&site, stick.path(), 0);
    assert!(read_back(&site, &done, 0)["behind"].is_null());
    until(PATIENCE, "the change reaches the register", || price().as_deref() == Some("3131"));
    // A damaged one, from the same stick, does not upset it.
    change(&site);
    export(&site, stick.path());
    let newest = packs(&stick.path().join("packs/price@zone-east")).into_iter().max().unwrap();
    fs::write(&newest, "no pack").unwrap();
    let done = import(&site, stick.path(), 3);
    assert!(done["receipt"]["refusals"].to_string().contains("price@zone-east"));
    export(&site, stick.path());
    import(&site, stick.path(), 0);
    until(PATIENCE, "all is there", || site.register("0421-01").digests() == site.expected("0421"));
    site.register("0421-02").run(&["once"]).ok();
    site.assert_proven("0421");
    [register, relay].into_iter().for_each(Daemon::term);
}

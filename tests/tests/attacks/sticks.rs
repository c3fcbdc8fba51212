//! A stick that somebody prepared. Links and damage are in `carry.rs`.

use super::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tempfile::TempDir;
use tillcast_tests::{PATIENCE, temp_dir};

/// A store that nobody reaches.
fn island() -> Site {
    let mut site = small().build();
    site.relays.get_mut("0421").unwrap().set("sources", "['file:///nonexistent/bucket']");
    site.registers.get_mut("0421-01").unwrap().set("fallback", "[]");
    site.publish();
    site
}

fn stick(site: &Site) -> TempDir {
    let dir = temp_dir("stick");
    site.hq.json(&["export", "--store", "0421", dir.path().to_str().unwrap()]);
    dir
}

fn import(site: &Site, stick: &Path) -> tillcast_tests::Output {
    let begun = Instant::now();
    let out = site.relay("0421").run(&["import", stick.to_str().unwrap(), "--json"]);
    assert!(begun.elapsed() < PATIENCE, "{:?}: {}", begun.elapsed(), out.text());
    no_panic(&out.text());
    out
}

fn packs(stick: &Path, instance: &str) -> Vec<PathBuf> {
    fs::read_dir(stick.join("packs").join(instance)).unwrap().map(|e| e.unwrap().path()).collect()
}

/// Puts something in a file's place, if it can.
type Make = fn(&Path) -> bool;
/// The same, of this test's own things.
type Lay<'a> = &'a dyn Fn(&Path);

/// Makes a pipe or a device; devices need root.
fn node(path: &Path, kind: &[&str]) -> bool {
    let _ = fs::remove_file(path);
    let mut make = Command::new("mknod");
    make.arg(path).args(kind);
    let out = make.output().unwrap();
    assert!(out.status.success() || kind.len() > 1, "{out:?}");
    out.status.success()
}

#[track_caller]
fn good_news(site: &Site) {
    news(site);
    import(site, stick(site).path()).ok();
    let relay = site.relay("0421").start_ready();
    site.register("0421-01").run(&["once"]).ok();
    relay.term();
    site.assert_proven("0421");
}

#[test]
fn pipes_devices_folders_and_holes_are_no_objects() {
    let site = island();
    let mut made = 0;
    let kinds: [(&str, Make); 7] = [
        ("a pipe", |p| node(p, &["p"])),
        ("/dev/zero", |p| node(p, &["c", "1", "5"])),
        ("/dev/random", |p| node(p, &["c", "1", "8"])),
        ("a disk", |p| node(p, &["b", "7", "0"])),
        ("a folder", |p| {
            fs::remove_file(p).unwrap();
            fs::create_dir(p).is_ok()
        }),
        ("a terabyte of holes", |p| fs::File::create(p).unwrap().set_len(1 << 40).is_ok()),
        ("a socket", |p| {
            fs::remove_file(p).unwrap();
            std::os::unix::net::UnixListener::bind(p).is_ok()
        }),
    ];
    for (what, make) in kinds {
        news(&site);
        for name in ["stores/0421/manifest.json", "trust.json", "trust/0000000001.json"] {
            let stick = stick(&site);
            if !make(&stick.path().join(name)) {
                assert!(!rustix::process::geteuid().is_root(), "{what} cannot be made");
                continue;
            }
            let out = import(&site, stick.path());
            made += 1;
            // An old trust file is not needed any more; without a manifest or the head of trust nothing is taken.
            let needed = name != "trust/0000000001.json";
            assert!(!needed || matches!(out.code, Some(1 | 3)), "{what} as {name}: {}", out.text());
            let told = ["not a regular file", "it is a", "longer than", "NOT_AN_ENVELOPE"];
            assert!(!needed || told.iter().any(|t| out.text().contains(t)), "{what} as {name}: {}", out.text());
        }
        news(&site);
        let stick = stick(&site);
        if packs(stick.path(), "price@zone-east").iter().all(|p| make(p)) {
            let out = import(&site, stick.path()).code(3).json();
            let refusals = out["receipt"]["refusals"].to_string();
            assert!(refusals.contains("price@zone-east"), "{what}: {refusals}");
            let served = &out["receipt"]["versions"];
            assert_eq!(served["catalog@all"], 1, "{what}: the rest is in: {out:#}");
        }
        good_news(&site);
    }
    assert!(made >= 12, "{made} kinds of objects were tried");
}

/// Ten thousand files, the longest names, the deepest folders, a file name of every byte: none is looked at.
#[test]
fn a_crowd_of_files_is_not_looked_at() {
    let site = island();
    let stick = stick(&site);
    let root = stick.path();
    for n in 0..10_000u64 {
        let room = ["packs/price@zone-east", "trust", "stores/0421", "receipts"][(n % 4) as usize];
        fs::create_dir_all(root.join(room)).unwrap();
        fs::write(root.join(room).join(format!("{:010}.full.pack", 100 + n)), "x").unwrap();
    }
    let mut deep = root.to_owned();
    for _ in 0..300 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(root.join("packs").join("x".repeat(255)), "x").unwrap();
    for byte in (1..=255u8).filter(|b| *b != b'/') {
        use std::os::unix::ffi::OsStrExt as _;
        let name = [b"packs/evil".as_slice(), &[byte]].concat();
        fs::write(root.join(std::ffi::OsStr::from_bytes(&name)), "x").unwrap();
    }
    let done = import(&site, root).ok().json();
    assert!(done["taken"].as_array().unwrap().len() < 12, "{done:#}");
    let data = site.relay("0421").dir.join("data");
    assert!(tillcast_tests::files::tree(&data).len() < 60, "nothing else was copied");
    good_news(&site);
}

/// Where the receipt is to be written, something lies that leads elsewhere.
#[test]
fn a_receipt_is_written_through_nothing() {
    let site = island();
    let outside = temp_dir("outside");
    let victim = outside.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let name = format!("0421-{:010}.receipt.json", site.manifest("0421")["serial"].as_u64().unwrap());
    let ways: [(&str, Lay<'_>); 3] = [
        ("a symbolic link", &|p| std::os::unix::fs::symlink(&victim, p).unwrap()),
        ("a hard link", &|p| fs::hard_link(&victim, p).unwrap_or_else(|e| panic!("{e}: {}", p.display()))),
        ("a pipe", &|p| assert!(node(p, &["p"]))),
    ];
    for (what, make) in ways {
        let stick = stick(&site);
        fs::create_dir_all(stick.path().join("receipts")).unwrap();
        make(&stick.path().join("receipts").join(&name));
        let done = import(&site, stick.path()).ok().json();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious", "{what}");
        site.hq.run(&["receipt", done["receipt_file"].as_str().unwrap()]).ok();
    }
    good_news(&site);
}

/// An old receipt, another store's, one through a pipe or a link: told for what it is, and nobody believes that the
/// store is where it is not.
#[test]
fn replayed_receipts_move_nothing() {
    let site = island();
    let first = stick(&site);
    let old = import(&site, first.path()).ok().json();
    let file = old["receipt_file"].as_str().unwrap().to_owned();
    site.hq.run(&["receipt", &file]).ok();
    let known = || {
        let store = site.hq.json(&["status"])["stores"][0].clone();
        assert!(store["by_stick"].is_string(), "{store:#}");
        (store["by_stick"].clone(), store["behind"].clone())
    };
    news(&site);
    assert_eq!(known().1, json!(["price@zone-east"]));
    let second = stick(&site);
    let new = import(&site, second.path()).ok().json();
    site.hq.run(&["receipt", new["receipt_file"].as_str().unwrap()]).ok();
    let right = known();
    assert_eq!(right.1, json!([]));
    for _ in 0..2 {
        let line = site.hq.json(&["receipt", &file])[0].clone();
        assert!(line["behind"]["price@zone-east"].is_array(), "an old one is told as such: {line:#}");
        assert_eq!(known(), right);
    }
    let mut other = forge::payload(&fs::read(&file).unwrap());
    let dir = temp_dir("receipts");
    let relay = taken_key(&site, "0421");
    for (what, change) in [("store", json!("0815")), ("serial", json!(-1)), ("time", json!("9999-99-99"))] {
        let was = other[what].take();
        other[what] = change;
        let path = dir.path().join(what);
        fs::write(&path, forge::seal("receipt", &serde_json::to_vec(&other).unwrap(), &[&relay])).unwrap();
        site.hq.run(&["receipt", path.to_str().unwrap()]).code(1);
        other[what] = was;
    }
    let (pipe, link) = (dir.path().join("pipe"), dir.path().join("link"));
    node(&pipe, &["p"]);
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for path in [pipe.to_str().unwrap(), link.to_str().unwrap(), "/dev/zero", "/"] {
        no_panic(&site.hq.run(&["receipt", path]).code(1).text());
    }
    good_news(&site);
}

//! Full disks: the old version stays whole and served, the fault has a name, and it ends by itself when there is room.
//!
//! The small disk is a tmpfs in a mount namespace of its own: as root, or where users may have namespaces. The
//! commands run inside, driven by a script that leaves its answers outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tillcast_tests::site::{Node, digests_of};
use tillcast_tests::{PATIENCE, Product, Site, digest, process, temp_dir, until};

/// A site whose price stream is to grow by two megabytes that do not compress.
fn site() -> Site {
    let site = Site::builder().stores(&[("0421", "east")]).registers(1).items(300).build();
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    site
}

fn grow(site: &Site) {
    let mut seed = 7u64;
    let mut noise = |n: usize| -> String {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + (seed >> 60) as u8)
        };
        (0..n).map(|_| next()).collect()
    };
    for i in 0..300 {
        site.sql(&format!("UPDATE item SET note = '{}' WHERE sku = 'SKU{i:07}'", noise(20_000)));
    }
    site.sql("UPDATE staff SET name = 'after' WHERE id = 1");
}

/// Runs the script in a namespace where `data` of the device is on a disk of so many megabytes; `r ARGS` is the
/// device's command, `ask N ARGS` writes its output to OUT/N.json and its exit code to OUT/N.exit.
fn on_a_small_disk(dir: &Path, product: Product, megabytes: u32, out: &Path, script: &str) {
    let text = format!(
        "set -eu; cd {dir}; mv data enrolled; mkdir data; mount -t tmpfs -o size={megabytes}m none data
         cp -a enrolled/. data/
         r() {{ {bin} \"$@\"; }}
         ask() {{ n=$1; shift; code=0; r \"$@\" --json >{out}/$n.json 2>>{out}/log || code=$?; echo $code >{out}/$n.exit; }}
         fill() {{ dd if=/dev/zero of=data/filler bs=64k 2>/dev/null || true; }}
         {script}
         cp -a data/. {out}/",
        dir = dir.display(),
        bin = product.path().display(),
        out = out.display(),
    );
    let done = process::with_disks().args(["sh", "-c", &text]).output().unwrap();
    let log = std::fs::read_to_string(out.join("log")).unwrap_or_default();
    assert!(done.status.success(), "{done:?}\n{log}");
}

/// Exit code and answer.
fn answer(out: &Path, n: &str) -> (i32, Value) {
    let read = |end: &str| std::fs::read_to_string(out.join(format!("{n}.{end}"))).unwrap();
    (read("exit").trim().parse().unwrap(), serde_json::from_str(&read("json")).unwrap_or(Value::Null))
}

#[test]
fn a_relay_on_a_full_disk_keeps_serving_and_recovers() {
    let site = site();
    let relay = site.relay("0421");
    let old = site.expected("0421");
    let out = temp_dir("out");
    grow(&site);
    site.publish();
    let url = relay.url();
    let script = format!(
        "fill
         ask full once; ask status status
         {bin} run >>{out}/log 2>&1 & pid=$!
         for i in $(seq 900); do curl -fsS {url}/v1/versions >{out}/versions.json 2>/dev/null && break; sleep 0.1; done
         for i in $(seq 900); do curl -fsS {url}/packs/catalog@all/0000000001.full.pack -o {out}/served && break; sleep 0.1; done
         kill $pid; wait $pid || true
         ask verify verify
         rm data/filler
         ask again once; ask after verify",
        bin = Product::Relay.path().display(),
        out = out.path().display()
    );
    on_a_small_disk(&relay.dir, Product::Relay, 40, out.path(), &script);
    let (code, full) = answer(out.path(), "full");
    assert_ne!(code, 0, "{full:#}");
    let (_, status) = answer(out.path(), "status");
    assert_eq!(status["streams"]["catalog@all"]["version"], 1, "{status:#}");
    assert_eq!(status["streams"]["catalog@all"]["digests"]["item"], old["item"].as_str());
    let errors = full.to_string();
    assert!(errors.contains("DISK_FULL") && !errors.contains("PACK_IN_ERROR"), "{full:#}");
    let versions: Value = serde_json::from_slice(&std::fs::read(out.path().join("versions.json")).unwrap()).unwrap();
    assert_eq!(versions["catalog@all"], 1, "still served: {versions}");
    let served = std::fs::read(out.path().join("served")).unwrap();
    assert_eq!(served, site.object("packs/catalog@all/0000000001.full.pack").unwrap());
    assert_eq!(answer(out.path(), "verify").0, 0, "what is held is whole");
    let (code, again) = answer(out.path(), "again");
    assert_eq!(code, 0, "{again:#}");
    assert!(!again["status"]["errors"].to_string().contains("DISK_FULL"), "{again:#}");
    assert_eq!(answer(out.path(), "after").0, 0);
    assert_eq!(digest::of_database(&out.path().join("shadow.db")), site.expected("0421"));
}

#[test]
fn a_register_on_a_full_disk_keeps_selling_and_recovers() {
    let site = site();
    let old = site.expected("0421");
    let relay = site.relay("0421").start_ready();
    site.register("0421-01").run(&["once"]).ok();
    assert_eq!(digest::of_database(&site.store_db("0421-01")), old);
    relay.term();
    grow(&site);
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    let relay = site.relay("0421").start_ready();
    let out = temp_dir("out");
    // Read as a POS application does, while there is no room at all.
    let script = format!(
        "fill
         ask full once; ask status status; ask verify verify
         sqlite3 -readonly data/store.db 'SELECT count(*) FROM item' >{out}/count
         truncate -s -3M data/filler
         ask some once; ask some_verify verify
         rm data/filler
         ask again once; ask after verify",
        out = out.path().display()
    );
    on_a_small_disk(&site.register("0421-01").dir, Product::Agent, 40, out.path(), &script);
    for n in ["full", "some"] {
        let (code, full) = answer(out.path(), n);
        assert_ne!(code, 0, "{n}: {full:#}");
        let errors = full["errors"].to_string();
        assert!(errors.contains("DISK_FULL") && !errors.contains("PACK_IN_ERROR"), "{n}: {full:#}");
        assert_eq!(full["streams"]["catalog@all"]["version"], 1, "{n}: {full:#}");
        assert_eq!(full["streams"]["catalog@all"]["digests"]["item"], old["item"].as_str(), "{n}");
    }
    assert_eq!(answer(out.path(), "verify").0, 0, "the rows are those of the old version");
    assert_eq!(answer(out.path(), "some_verify").0, 0);
    assert_eq!(std::fs::read_to_string(out.path().join("count")).unwrap().trim(), "300");
    let (code, again) = answer(out.path(), "again");
    assert_eq!(code, 0, "{again:#}");
    assert!(!again["errors"].to_string().contains("DISK_FULL"), "{again:#}");
    assert_eq!(answer(out.path(), "after").0, 0);
    assert_eq!(digest::of_database(&out.path().join("store.db")), site.expected("0421"));
    relay.term();
}

/// The POS application keeps its sales on the same disk.
#[test]
fn a_first_install_leaves_room_for_the_sales_beside_it() {
    let sizes = [10, 14, 18, 22, 26, 80];
    let site = Site::builder().stores(&[("0421", "east")]).registers(sizes.len()).items(60_000).build();
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    let relay = site.relay("0421").start_ready();
    let mut ends = Vec::new();
    for (n, megabytes) in sizes.into_iter().enumerate() {
        let out = temp_dir("out");
        let script = format!(
            "ask first once
             stat -f -c '%a %S' data >{out}/free
             sqlite3 data/sales.db 'CREATE TABLE sale (n); INSERT INTO sale VALUES (1)'
             mount -o remount,size=400m none data
             ask again once; ask after verify",
            out = out.path().display()
        );
        let register = site.register(&format!("0421-{:02}", n + 1));
        on_a_small_disk(&register.dir, Product::Agent, megabytes, out.path(), &script);
        let free = std::fs::read_to_string(out.path().join("free")).unwrap();
        let free: u64 = free.split_whitespace().map(|n| n.parse::<u64>().unwrap()).product();
        assert!(free >= (u64::from(megabytes) << 20) / 50, "{megabytes} MB: {free} bytes are free");
        let (code, first) = answer(out.path(), "first");
        let errors = first["errors"].to_string();
        assert_eq!(code != 0, errors.contains("DISK_FULL"), "{megabytes} MB: {first:#}");
        assert_eq!((answer(out.path(), "again").0, answer(out.path(), "after").0), (0, 0), "{megabytes} MB");
        ends.push(code == 0);
    }
    assert_eq!((ends[0], ends[sizes.len() - 1]), (false, true), "the sizes are from too small to enough: {ends:?}");
    relay.term();
}

/// After a power cut SQLite's indexes and logs are to be made anew, and there is no room for them.
fn starts_full(dir: &Path, product: Product) {
    let out = temp_dir("out");
    let script = "ask first once; test -e data/ballast
         rm -f data/*-shm; fill
         ask full once; test ! -e data/ballast; ask status status
         rm data/filler
         ask again once; test -e data/ballast";
    on_a_small_disk(dir, product, 20, out.path(), script);
    let is_full = |n: &str| answer(out.path(), n).1.to_string().contains("DISK_FULL");
    let said = ["first", "full", "again"].map(is_full);
    assert_eq!(said, [false, true, false], "{}", std::fs::read_to_string(out.path().join("log")).unwrap());
    let (_, status) = answer(out.path(), "status");
    assert_eq!(status["streams"]["price@zone-east"]["version"], 1, "{status:#}");
}

#[test]
fn a_start_on_a_full_disk_lets_the_ballast_go_and_says_so_until_it_is_back() {
    let builder = Site::builder().stores(&[("0421", "east")]).registers(1).items(300);
    let site = builder.relay("ballast", "'1MiB'").agent("ballast", "'1MiB'").build();
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    let relay = site.relay("0421").start_ready();
    site.register("0421-01").run(&["once"]).ok();
    starts_full(&site.register("0421-01").dir, Product::Agent);
    relay.term();
    starts_full(&site.relay("0421").dir, Product::Relay);
}

/// A disk that the system has made read-only after an error: what is held is read on, and nothing is said to be done.
#[test]
fn a_disk_that_turned_read_only_loses_nothing_and_says_so() {
    let site = Site::builder().stores(&[("0421", "east")]).registers(1).items(300).build();
    site.publish();
    site.relay("0421").run(&["once"]).ok();
    let old = site.expected("0421");
    let relay = site.relay("0421").start_ready();
    site.register("0421-01").run(&["once"]).ok();
    site.sql("UPDATE price SET price_cents = 4711 WHERE sku = 'SKU0000003'");
    site.publish();
    let script = |out: &Path| {
        format!(
            "ask status status
             mount -o remount,ro none data
             ask ro once; ask ro_status status
             sqlite3 -readonly 'file:data/store.db?immutable=1' 'SELECT count(*) FROM item' >{out}/count 2>/dev/null || true
             mount -o remount,rw none data
             ask again once; ask after verify",
            out = out.display()
        )
    };
    let check = |dir: &Path, product: Product, database: &str| {
        let out = temp_dir("out");
        on_a_small_disk(dir, product, 40, out.path(), &script(out.path()));
        let log = std::fs::read_to_string(out.path().join("log")).unwrap();
        let (code, said) = answer(out.path(), "ro");
        assert_ne!(code, 0, "{said:#}");
        let said = said.to_string() + &log;
        assert!(said.contains("readonly database") || said.contains("Read-only file system"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(answer(out.path(), "again").0, 0, "{log}");
        assert_eq!(answer(out.path(), "after").0, 0);
        assert_eq!(digest::of_database(&out.path().join(database)), site.expected("0421"));
        std::fs::read_to_string(out.path().join("count")).unwrap()
    };
    until(PATIENCE, "the relay has the news", || site.relay("0421").digests() == site.expected("0421"));
    assert_ne!(old, site.expected("0421"));
    let count = check(&site.register("0421-01").dir, Product::Agent, "store.db");
    assert_eq!(count.trim(), "300", "who sells by it reads on");
    relay.term();
    site.sql("UPDATE price SET price_cents = 4712 WHERE sku = 'SKU0000003'");
    site.publish();
    check(&site.relay("0421").dir, Product::Relay, "shadow.db");
}

/// Kilobytes from one size of a disk to the next.
const STEP: u32 = 64;

/// The command on disks that have room for so many steps beyond what is there, then with room enough. For each size: the
/// exit codes of the command, of `verify` after it, of both again when there is room, and the last `status`.
fn on_disks_of(sizes: &[u32], node: &Node, room: &str, command: &str, beside: &Path) -> Vec<([i32; 4], Value)> {
    let out = temp_dir("out");
    let list = sizes.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let script = format!(
        "set -eu; cd {dir}; mv {room} before; mkdir {room}; used=$(du -sk before | cut -f1); cp -a {beside} {beside}.before
         r() {{ code=0; {bin} \"$@\" --json >{out}/last 2>>{out}/log || code=$?; printf '%s ' $code; }}
         for n in {list}; do
             rm -rf {beside}; cp -a {beside}.before {beside}
             mount -t tmpfs -o size=$((used + 128 + n * {STEP}))k none {room}
             cp -a before/. {room}/
             {{ r {command}; r verify
               mount -o remount,size=400m none {room}
               r {command}; r verify; r status; }} >{out}/$n.codes
             mv {out}/last {out}/$n.json
             umount {room}
         done
         rmdir {room}; mv before {room}; rm -rf {beside}; mv {beside}.before {beside}",
        dir = node.dir.display(),
        bin = node.product.path().display(),
        beside = beside.display(),
        out = out.path().display(),
    );
    let done = process::with_disks().args(["sh", "-c", &script]).output().unwrap();
    let log = std::fs::read_to_string(out.path().join("log")).unwrap_or_default();
    assert!(done.status.success(), "{done:?}\n{log}");
    assert!(!log.contains("panicked"), "{log}");
    let read = |n: &u32| {
        let codes = std::fs::read_to_string(out.path().join(format!("{n}.codes"))).unwrap();
        let codes: Vec<i32> = codes.split_whitespace().map(|c| c.parse().unwrap()).collect();
        let status = std::fs::read_to_string(out.path().join(format!("{n}.json"))).unwrap();
        (codes[..4].try_into().unwrap(), serde_json::from_str(&status).unwrap())
    };
    sizes.iter().map(read).collect()
}

/// On each size of disk: what is held is whole, and when there is room all is done. On the smallest it is not done before,
/// on the largest it is.
fn recover_on_disks_of(sizes: &[u32]) {
    let site = site();
    let relay = site.relay("0421").start_ready();
    site.register("0421-01").run(&["once"]).ok();
    relay.term();
    grow(&site);
    let nowhere = temp_dir("nowhere");
    let nothing = nowhere.path().join("nothing");
    std::fs::create_dir(&nothing).unwrap();
    let judge = |who: &str, found: Vec<([i32; 4], Value)>, is_device: bool| {
        let done: Vec<bool> = found.iter().map(|(codes, _)| codes[0] == 0).collect();
        for (n, (codes, status)) in sizes.iter().zip(&found) {
            assert_eq!(codes[2..], [0, 0], "{who}, {n} steps: {codes:?} {status:#}");
            // Headquarters' ledger may lack the room that a look at it takes.
            if is_device {
                assert_eq!(codes[1], 0, "{who}, {n} steps: {codes:?} {status:#}");
                let streams = status["streams"].as_object().unwrap();
                let held: BTreeMap<String, String> = streams.values().flat_map(digests_of).collect();
                assert_eq!(held, site.expected("0421"), "{who}, {n} steps");
            }
        }
        assert_eq!((done[0], done[done.len() - 1]), (false, true), "{who}: the sizes are from too small to enough");
    };
    judge("headquarters", on_disks_of(sizes, &site.hq, "state", "publish", &site.bucket()), false);
    site.publish();
    judge("relay", on_disks_of(sizes, site.relay("0421"), "data", "once", &nothing), true);
    site.relay("0421").run(&["once"]).ok();
    let relay = site.relay("0421").start_ready();
    judge("register", on_disks_of(sizes, site.register("0421-01"), "data", "once", &nothing), true);
    relay.term();
}

#[test]
fn on_a_disk_of_any_size_what_is_held_is_whole_and_the_rest_follows() {
    recover_on_disks_of(&[0, 13, 37, 64, 111, 255, 511]);
}

#[test]
#[ignore = "256 sizes for each program take minutes"]
fn on_disks_of_256_sizes_what_is_held_is_whole_and_the_rest_follows() {
    recover_on_disks_of(&(0..512).step_by(2).collect::<Vec<_>>());
}

//! kill -9 at any moment of publish, mirror and apply: afterwards there is exactly the old or the new version, and the
//! next run finishes by itself. Moments are drawn from a seed; half of them are exact system calls (by strace).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use rusqlite::Connection;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tillcast_tests::site::Node;
use tillcast_tests::{Dice, Nginx, PATIENCE, Site, digest, files, process, until};

/// Rounds of a test, and how many kills must meet the process alive. Rounds are added until they have, up to a bound.
const ROUNDS: usize = 25;
const MET: usize = ROUNDS / 3;
const MOST: usize = 4 * ROUNDS;

/// Digests by table.
type Digests = BTreeMap<String, String>;

/// System calls that change what is on the disk, and about how many of each one thread makes.
const CALLS: [(&str, u64); 6] = [
    ("pwrite64", 30),
    ("fsync", 4),
    ("fdatasync", 3),
    ("rename,renameat,renameat2,linkat", 3),
    ("unlink,unlinkat", 2),
    ("ftruncate", 2),
];

/// Who kills, and how often it met the process alive.
struct Killer {
    dice: Dice,
    /// How long a whole run takes on this machine now: moments are drawn below it.
    whole: Duration,
    met: usize,
}

impl Killer {
    /// Measures one whole run of a command that has something to do.
    #[track_caller]
    fn measured(seed: u64, node: &Node, args: &[&str]) -> Killer {
        let begun = Instant::now();
        node.run(args).ok();
        Killer { dice: Dice::new(seed), whole: begun.elapsed(), met: 0 }
    }

    /// Whether round `n` is to be run.
    fn goes_on(&self, n: usize) -> bool {
        n < ROUNDS || (self.met < MET && n < MOST)
    }

    /// Runs a command to its end, or to its death: by the clock, or at a system call.
    fn kill(&mut self, node: &Node, args: &[&str]) {
        // A daemon whose call never comes would never end.
        let alive = if self.dice.below(2) == 0 || args == ["run"] {
            self.by_clock(node, args)
        } else {
            self.at_call(node, args)
        };
        self.met += usize::from(alive);
    }

    fn by_clock(&mut self, node: &Node, args: &[&str]) -> bool {
        let moment = Duration::from_micros(self.dice.below(self.whole.as_micros() as u64));
        let mut running = node.spawn(args, &[]);
        std::thread::sleep(moment);
        let alive = running.process.is_running();
        running.process.kill9();
        if !alive {
            // It was over sooner than the run that was measured.
            self.whole = moment.max(Duration::from_millis(1));
        }
        alive
    }

    fn at_call(&mut self, node: &Node, args: &[&str]) -> bool {
        let (calls, most) = *self.dice.pick(&CALLS);
        let mut strace = process::command(&process::program("strace"), None, "KILL");
        strace.args(["-f", "-qq", "-e", "signal=none", "-o", "/dev/null"]);
        let inject = format!("inject={calls}:signal=SIGKILL:when={}", 1 + self.dice.below(most));
        strace.args(["-e", &format!("trace={calls}"), "-e", &inject]);
        strace.arg(node.product.path()).args(args).current_dir(&node.dir).env("NO_COLOR", "1");
        let out = strace.output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(!text.contains("ptrace") && !text.contains("strace:"), "strace cannot trace here: {text}");
        out.status.code().is_none_or(|code| code == 137)
    }

    #[track_caller]
    fn assert_met(&self) {
        assert!(self.met >= MET, "only {} kills met it alive", self.met);
    }
}

/// Changes some rows of two streams; every fifth time those of all.
fn change(site: &Site, n: usize) {
    let sku = format!("SKU{:07}", n % 40);
    site.sql(&format!(
        "UPDATE price SET price_cents = {n} + 1000 WHERE sku = '{sku}'; UPDATE staff SET name = 'v{n}' WHERE id = 2"
    ));
    if n.is_multiple_of(5) {
        site.sql(&format!(
            "DELETE FROM promo WHERE id = {n} / 5 % 3; INSERT INTO item VALUES ('N{n}', 'new', 3, 0.5, NULL)"
        ));
    }
}

/// Every table is as before or as after; tables of one stream together.
#[track_caller]
fn assert_old_or_new(found: &Digests, old: &Digests, new: &Digests, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), new.keys().collect::<Vec<_>>(), "{what}");
    for (table, digest) in found {
        assert!([&old[table], &new[table]].contains(&digest), "{what}: {table} is neither the old nor the new version");
    }
    let catalog = |d: &Digests| (d["item"].clone(), d["barcode"].clone());
    assert!([catalog(old), catalog(new)].contains(&catalog(found)), "{what}: half of the catalog");
}

/// The promise of every store's manifest, with every listed pack there whole.
#[track_caller]
fn promises(site: &Site) -> BTreeMap<String, Digests> {
    let stores = site.relays.keys();
    let check = |store: &String| {
        for (stream, entry) in site.manifest(store)["streams"].as_object().unwrap() {
            for pack in entry["packs"].as_array().unwrap() {
                let (version, kind) = (pack["version"].as_u64().unwrap(), pack["kind"].as_str().unwrap());
                let name = format!("packs/{stream}@{}/{version:010}.{kind}.pack", entry["audience"].as_str().unwrap());
                let bytes = site.object(&name).unwrap_or_else(|| panic!("{store} lists {name}, which is not there"));
                assert_eq!(pack["sha256"], tillcast_tests::forge::sha256(&bytes), "{store}: {name}");
            }
        }
        (store.clone(), site.promised(store))
    };
    stores.map(check).collect()
}

/// A name in the bucket never gets other bytes, a store's serial never goes down.
#[derive(Default)]
struct Memory {
    packs: BTreeMap<String, String>,
    serials: BTreeMap<String, u64>,
}

impl Memory {
    #[track_caller]
    fn look(&mut self, site: &Site) {
        for (name, hash) in files::tree(&site.bucket().join("packs")) {
            // A file under way is no object yet.
            if name.ends_with(".pack") {
                assert_eq!(self.packs.entry(name.clone()).or_insert(hash.clone()), &hash, "{name} was written again");
            }
        }
        for store in site.relays.keys() {
            let serial = site.manifest(store)["serial"].as_u64().unwrap();
            let before = self.serials.insert(store.clone(), serial).unwrap_or(0);
            assert!(serial >= before, "{store}: serial {serial} after {before}");
        }
    }
}

#[test]
fn publish() {
    let site = Site::builder().stores(&[("0421", "east"), ("0815", "west")]).registers(0).items(40).build();
    site.publish();
    change(&site, 0);
    let (mut killer, mut memory, mut n) = (Killer::measured(1, &site.hq, &["publish"]), Memory::default(), 0);
    let expected = |site: &Site| -> BTreeMap<String, Digests> {
        site.relays.keys().map(|s| (s.clone(), site.expected(s))).collect()
    };
    while killer.goes_on(n) {
        n += 1;
        let old = expected(&site);
        change(&site, n);
        let new = expected(&site);
        killer.kill(&site.hq, &["publish"]);
        memory.look(&site);
        for (store, found) in promises(&site) {
            assert_old_or_new(&found, &old[&store], &new[&store], &format!("round {n}, {store}"));
        }
        site.publish();
        memory.look(&site);
        assert_eq!(promises(&site), new, "round {n}: it finishes by itself");
    }
    killer.assert_met();
    site.hq.run(&["verify"]).ok();
    for relay in site.relays.values() {
        relay.run(&["once"]).ok();
        assert_eq!(relay.digests(), site.expected(&relay.id));
    }
    let left: Vec<String> =
        ["packs", "scratch"].iter().flat_map(|d| files::tree(&site.hq.dir.join("state").join(d)).into_keys()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Each round: news, a kill, a look, a run to the end, a proof. `database` is the device's replica.
fn device(site: &Site, node: &Node, database: &Path, seed: u64, serve: &[&str]) {
    change(site, 0);
    site.publish();
    let (mut killer, mut n) = (Killer::measured(seed, node, &["once"]), 0);
    while killer.goes_on(n) {
        n += 1;
        let old = site.expected("0421");
        change(site, n);
        site.publish();
        let new = site.expected("0421");
        let args = if n % 3 == 0 { serve } else { &["once"] };
        killer.kill(node, args);
        assert_old_or_new(&digest::of_database(database), &old, &new, &format!("round {n}"));
        // A killed child of a relay that lives is a failed try: the next run goes on from there.
        until(PATIENCE, "it finishes by itself", || {
            node.run(&["once"]);
            digest::of_database(database) == new
        });
        assert_eq!(node.digests(), new, "round {n}");
    }
    killer.assert_met();
    node.run(&["once"]).ok();
    node.run(&["verify"]).ok();
    let status = node.status();
    let mut faults = status["errors"].as_array().unwrap().iter();
    assert!(faults.all(|f| f["code"] == "CRASH_LOOP"), "no kill is a fault but for their number: {status:#}");
}

#[test]
fn mirror_and_trial() {
    let site = Site::builder().stores(&[("0421", "east")]).registers(0).items(40).build();
    site.publish();
    let relay = site.relay("0421");
    relay.run(&["once"]).ok();
    device(&site, relay, &relay.dir.join("data/shadow.db"), 2, &["run"]);
    let ok = files::tree(&relay.dir.join("data/ok/packs"));
    let bucket = files::tree(&site.bucket().join("packs"));
    for (name, hash) in &ok {
        assert_eq!(bucket.get(name), Some(hash), "{name} is served otherwise than it was made");
    }
    for room in ["incoming", "ready", "error"] {
        let left = files::tree(&relay.dir.join("data").join(room));
        assert!(left.is_empty(), "{room}: {left:?}");
    }
}

#[test]
fn apply() {
    let mut site = Site::builder().stores(&[("0421", "east")]).registers(1).items(40).build();
    site.publish();
    let bucket = Nginx::serve(&site.bucket());
    let register = site.registers.get_mut("0421-01").unwrap();
    register.set_text("relay", &bucket.url());
    register.set("fallback", "[]");
    let register = site.register("0421-01");
    register.run(&["once"]).ok();
    device(&site, register, &site.store_db("0421-01"), 3, &["run"]);
}

#[test]
fn the_first_install() {
    let mut site = Site::builder().stores(&[("0421", "east")]).registers(1).items(400).build();
    site.publish();
    let bucket = Nginx::serve(&site.bucket());
    let register = site.registers.get_mut("0421-01").unwrap();
    register.set_text("relay", &bucket.url());
    for node in [site.register("0421-01"), site.relay("0421")] {
        // Nothing was measured: what is installed once is installed.
        let mut killer = Killer { dice: Dice::new(4), whole: Duration::from_millis(120), met: 0 };
        for _ in 0..5 {
            killer.kill(node, &["once"]);
        }
        until(PATIENCE, "it is installed", || node.run(&["once"]).code == Some(0));
        assert_eq!(node.digests(), site.expected("0421"));
        node.run(&["verify"]).ok();
    }
}

#[test]
fn two_publishers_at_once_are_harmless() {
    let site = Site::builder().stores(&[("0421", "east")]).registers(0).items(40).build();
    site.publish();
    let mut memory = Memory::default();
    for n in 0..4 {
        change(&site, n);
        let both = [site.hq.spawn(&["publish"], &[]), site.hq.spawn(&["publish"], &[])];
        for one in both {
            one.finish(PATIENCE).ok();
        }
        memory.look(&site);
        assert_eq!(promises(&site)["0421"], site.expected("0421"));
    }
    // With four versions taken for four changes: the second one found nothing to do.
    assert_eq!(site.version("0421", "price"), 5);
}

fn ledger(site: &Site) -> Connection {
    let db = Connection::open(site.hq.dir.join("state/fleet.db")).unwrap();
    db.busy_timeout(PATIENCE).unwrap();
    db
}

/// A publish stopped in its tracks while it has the lease.
fn frozen(site: &Site) -> tillcast_tests::bins::Running {
    let mut running = site.hq.spawn(&["publish"], &[]);
    let leased = "SELECT count(*) FROM lease WHERE until_s > 0";
    let db = ledger(site);
    until(PATIENCE, "the publisher has the lease", || {
        assert!(running.process.is_running(), "it was too quick to be frozen");
        db.query_row(leased, [], |r| r.get::<_, i64>(0)).unwrap() == 1
    });
    // Not in the middle of a write: the test itself has something to write.
    db.busy_timeout(Duration::from_millis(20)).unwrap();
    until(PATIENCE, "it is frozen between two writes", || {
        assert!(running.process.is_running(), "it was too quick to be frozen");
        running.process.freeze();
        let free = db.execute_batch("BEGIN IMMEDIATE; ROLLBACK").is_ok();
        if !free {
            running.process.thaw();
        }
        free
    });
    running
}

#[test]
fn a_second_publisher_waits_and_names_the_holder() {
    let mut site = Site::builder().stores(&[("0421", "east")]).registers(0).items(20_000).build();
    site.publish();
    site.hq.set_text("publish.lease_wait", "1s");
    site.sql("UPDATE item SET note = 'x'");
    let first = frozen(&site);
    let pid = first.process.pid().to_string();
    site.hq.run(&["publish"]).code(1).says(&["another publisher", &format!("process {pid}")]);
    first.process.thaw();
    first.finish(Duration::from_secs(60)).ok();
    assert_eq!(promises(&site)["0421"], site.expected("0421"));

    // Another machine's: no lock file tells of it.
    let now = "CAST(strftime('%s', 'now') AS INTEGER)";
    ledger(&site)
        .execute_batch(&format!("UPDATE lease SET holder = 'elsewhere:/srv, process 7', until_s = {now} + 60"))
        .unwrap();
    site.hq.run(&["publish"]).code(1).says(&["another publisher", "elsewhere:/srv, process 7"]);
    ledger(&site).execute_batch(&format!("UPDATE lease SET until_s = {now} - 1")).unwrap();
    site.publish();
}

#[test]
fn a_run_that_lost_its_lease_signs_nothing() {
    let site = Site::builder().stores(&[("0421", "east")]).registers(0).items(20_000).build();
    site.publish();
    let old = site.object("stores/0421/manifest.json").unwrap();
    site.sql("UPDATE item SET note = 'x'");
    let first = frozen(&site);
    // Its lease runs out while the machine sleeps; another publisher takes over, and is done.
    ledger(&site)
        .execute_batch("UPDATE lease SET holder = 'elsewhere:/srv, process 7', token = token + 1, until_s = 0")
        .unwrap();
    first.process.thaw();
    first.finish(Duration::from_secs(60)).code(1).says(&["lease"]);
    assert_eq!(site.object("stores/0421/manifest.json").unwrap(), old);
    site.publish();
    assert_eq!(promises(&site)["0421"], site.expected("0421"));
    site.relay("0421").run(&["once"]).ok();
    assert_eq!(site.relay("0421").digests(), site.expected("0421"));
}

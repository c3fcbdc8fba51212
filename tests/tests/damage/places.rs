//! Where damage is done: the prepared sites that cells copy, the files that are damaged, and how.

use crate::table::Cell;
use rusqlite::Connection;
use rustix::fs::{CWD, RenameFlags};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use tillcast_tests::{Site, digest, files, forge};

/// Digests by table.
pub type Digests = BTreeMap<String, String>;

/// What cells begin from: copies of one site at different times.
pub struct Prepared {
    /// The first version everywhere: what is rolled back to.
    pub first: Site,
    /// The second version everywhere, nothing on the way.
    pub second: Site,
    /// The third version in the bucket, by a new publisher key, with two more trust files.
    pub third: Site,
    /// As `second`; the relay has the third manifest, and the price pack is not to be had.
    pub waiting: Site,
    /// As `second`; a bad price pack, well listed, lies in the relay's `error/`.
    pub refused: Site,
    /// The third version everywhere but at the register, whose second is in its log alone: it was killed as it committed.
    /// The relay was stopped before it cut its logs.
    pub logged: Site,
    /// The same with the first version and the second in place of the second and third.
    pub logged_before: Site,
    /// The rows of store 0421 at each version.
    pub rows: [Digests; 3],
}

/// Where the delta of the third version lies below a layout's root.
pub const NEW_PACK: &str = "packs/price@zone-east/0000000003.delta.pack";
const MANIFEST: &str = "stores/0421/manifest.json";

/// Made once, as long as any test needs it.
pub fn prepared() -> Arc<Prepared> {
    static MADE: Mutex<Weak<Prepared>> = Mutex::new(Weak::new());
    let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    made.upgrade().unwrap_or_else(|| {
        let new = Arc::new(prepare());
        *made = Arc::downgrade(&new);
        new
    })
}

fn prepare() -> Prepared {
    let mut builder = Site::builder().stores(&[("0421", "east"), ("0815", "west")]).registers(1).items(60);
    for key in ["poll", "heartbeat"] {
        builder = builder.relay(key, "'300ms'");
    }
    // Every pack is served from the disk: none hides in memory. A busy machine's relay is not taken for a dead one.
    let site = builder.relay("cache.object", "1").agent("relay_silent", "'5s'").build();
    let publish = |n: usize| {
        site.sql(&format!("UPDATE price SET price_cents = price_cents + {n} WHERE sku < 'SKU0000020'"));
        site.publish();
    };
    let settled = || {
        // The second round applies nothing and cuts the logs.
        site.bring_down();
        site.bring_down();
        (site.copy(), site.expected("0421"))
    };
    publish(1);
    let (first, rows_1) = settled();
    publish(2);
    let logged_before = logged(&site);
    let (second, rows_2) = settled();
    site.hq.run(&["trust", "rotate"]).ok();
    publish(3);
    let third = site.copy();
    let logged = logged(&site);
    let waiting = second.copy();
    news(&waiting, &third);
    fs::remove_file(waiting.bucket().join(NEW_PACK)).unwrap();
    waiting.relay("0421").run(&["once"]).code(3);
    let refused = second.copy();
    refused.publish_forged("0421", "price", &bad_pack(&refused));
    for _ in 0..3 {
        refused.relay("0421").run(&["once"]).code(3);
    }
    let rows = [rows_1, rows_2, site.expected("0421")];
    Prepared { rows, first, second, third, waiting, refused, logged, logged_before }
}

/// A copy in which what was published last is in the logs: the relays were killed before they cut theirs, the registers
/// between a commit and its way home.
fn logged(site: &Site) -> Site {
    let logged = site.copy();
    for relay in logged.relays.values() {
        let killed = relay.run_env(&["once"], &[("TILLCAST_FAILPOINT", "shadow.truncate.before")]);
        assert_eq!(killed.code, None, "{}", killed.text());
    }
    // Relays that serve cut their logs when they have nothing else to do.
    let other = logged.copy();
    other.with_relays(|| {
        for register in other.registers.values() {
            let killed = register.run_env(&["once"], &[("TILLCAST_FAILPOINT", "agent.apply.committed")]);
            assert_eq!(killed.code, None, "{}", killed.text());
        }
    });
    for (id, register) in &logged.registers {
        let data = register.dir.join("data");
        fs::remove_dir_all(&data).unwrap();
        files::copy_all(&other.register(id).dir.join("data"), &data);
    }
    logged
}

/// A delta of the third version that updates a row which is not there.
fn bad_pack(site: &Site) -> Vec<u8> {
    let (_, head) = site.head_pack("0421", "price");
    let mut header: Value = serde_json::from_str(&forge::unpack(&head)[0]).unwrap();
    (header["base"], header["version"]) = (2.into(), 3.into());
    let section = json!({"table": "price", "op": "update", "columns": ["sku", "price_cents"]});
    let trailer =
        r#"{"rows":{"delete":0,"update":1,"insert":0},"digests":{"price":"00000000000000000000000000000000"}}"#;
    forge::pack(&[header.to_string(), section.to_string(), json!(["NONE", 1]).to_string(), trailer.to_owned()])
}

/// What headquarters publishes next reaches the bucket.
pub fn news(site: &Site, third: &Site) {
    let aside = site.dir().join("objects.new");
    files::copy_all(&third.bucket(), &aside);
    bring(site, third, &aside);
}

/// The same, damaged before anybody sees it.
pub fn damaged_news(site: &Site, third: &Site, damage: impl FnOnce(&Site)) {
    let (other, aside) = (third.copy(), site.dir().join("objects.new"));
    damage(&other);
    fs::rename(other.bucket(), &aside).unwrap();
    bring(site, third, &aside);
}

/// Headquarters as it is at the third version, with this bucket.
fn bring(site: &Site, third: &Site, bucket: &Path) {
    let state = site.hq.dir.join("state");
    fs::remove_dir_all(&state).unwrap();
    files::copy_all(&third.hq.dir.join("state"), &state);
    fs::copy(third.hq.dir.join("source.db"), site.hq.dir.join("source.db")).unwrap();
    let old = site.dir().join("objects.old");
    let _ = fs::remove_dir_all(&old);
    // In one step: whoever reads meanwhile sees the bucket before or after.
    rustix::fs::renameat_with(CWD, bucket, CWD, site.bucket(), RenameFlags::EXCHANGE).unwrap();
    fs::rename(bucket, old).unwrap();
}

/// What kind of file it is: where bits are flipped, and what a version of the future is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A signed envelope of this payload.
    Envelope(&'static str),
    /// A pack.
    Pack,
    /// Plain JSON.
    Json,
    /// A SQLite database.
    Database,
    /// Its log, or the log's index.
    Log,
    /// A key file of headquarters.
    Key,
    /// A directory of the relay as a whole.
    Directory,
}

/// When and where the damage meets the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In the bucket, as it comes with the news.
    Bucket,
    /// On a device that is up to date; the news come after.
    Device,
    /// On a device whose last version is in its log.
    Logged,
    /// In a directory of the relay, where a crash left the pack that it had just got.
    Left,
    /// In `error/`.
    Refused,
    /// In `import/`, where a crash left what was copied from a stick.
    Import,
    /// On a stick: the receipt that the import wrote.
    Receipt,
    /// At headquarters, before it publishes.
    Headquarters,
}

/// A file to be damaged.
pub struct Target {
    /// As the table calls it.
    pub name: &'static str,
    pub kind: Kind,
    pub stage: Stage,
    /// Below the site's directory.
    path: &'static str,
    /// Whose bytes it gets by `swap`.
    sibling: &'static str,
    /// Where its second copy lies.
    twin: &'static str,
    /// What a person does when it does not heal by itself, what is tried first in front.
    pub remedies: &'static [&'static str],
}

const REPUT: &[&str] = &["`publish`", "`verify --mend`", "`publish --full`"];
/// What files of the wrong owner or mode need.
pub const RIGHTS: &str = "owner and mode put right, and a restart";

pub const TARGETS: [Target; 30] = [
    target(
        "trust.json",
        Kind::Envelope("trust"),
        Stage::Bucket,
        "objects/trust.json",
        "objects/stores/0421/manifest.json",
        "objects/trust/0000000009.json",
        REPUT,
    ),
    target(
        "trust file",
        Kind::Envelope("trust"),
        Stage::Bucket,
        "objects/trust/0000000003.json",
        "objects/trust/0000000002.json",
        "objects/trust/0000000009.json",
        REPUT,
    ),
    target(
        "manifest",
        Kind::Envelope("manifest"),
        Stage::Bucket,
        "objects/stores/0421/manifest.json",
        "objects/stores/0815/manifest.json",
        "objects/stores/0999/manifest.json",
        REPUT,
    ),
    target(
        "pack",
        Kind::Pack,
        Stage::Bucket,
        "objects/packs/price@zone-east/0000000003.delta.pack",
        "objects/packs/price@zone-east/0000000001.full.pack",
        "objects/packs/price@zone-east/0000000009.delta.pack",
        REPUT,
    ),
    target(
        "served manifest",
        Kind::Envelope("manifest"),
        Stage::Device,
        "relay-0421/data/ok/stores/0421/manifest.json",
        "objects/stores/0815/manifest.json",
        "relay-0421/data/ok/stores/0999/manifest.json",
        &[RIGHTS],
    ),
    target(
        "served trust.json",
        Kind::Envelope("trust"),
        Stage::Device,
        "relay-0421/data/ok/trust.json",
        "objects/stores/0421/manifest.json",
        "relay-0421/data/ok/trust/0000000009.json",
        &[RIGHTS],
    ),
    target(
        "served trust file",
        Kind::Envelope("trust"),
        Stage::Device,
        "relay-0421/data/ok/trust/0000000001.json",
        "objects/stores/0421/manifest.json",
        "relay-0421/data/ok/trust/0000000009.json",
        &[RIGHTS],
    ),
    target(
        "incoming/",
        Kind::Pack,
        Stage::Left,
        "relay-0421/data/incoming/packs/price@zone-east/0000000003.delta.pack.part",
        "objects/packs/price@zone-east/0000000001.full.pack",
        "relay-0421/data/incoming/packs/price@zone-east/0000000009.delta.pack.part",
        &[RIGHTS],
    ),
    target(
        "ready/",
        Kind::Pack,
        Stage::Left,
        "relay-0421/data/ready/packs/price@zone-east/0000000003.delta.pack",
        "objects/packs/price@zone-east/0000000001.full.pack",
        "relay-0421/data/ready/packs/price@zone-east/0000000009.delta.pack",
        &[RIGHTS],
    ),
    target(
        "ok/",
        Kind::Pack,
        Stage::Device,
        "relay-0421/data/ok/packs/price@zone-east/0000000001.full.pack",
        "objects/packs/price@zone-east/0000000002.delta.pack",
        "relay-0421/data/ok/packs/price@zone-east/0000000009.delta.pack",
        &[RIGHTS],
    ),
    target(
        "error/",
        Kind::Pack,
        Stage::Refused,
        "relay-0421/data/error/packs/price@zone-east/0000000003.delta.pack",
        "objects/packs/price@zone-east/0000000001.full.pack",
        "relay-0421/data/error/packs/price@zone-east/0000000009.delta.pack",
        &["the next publish", RIGHTS],
    ),
    target(
        "reason file",
        Kind::Json,
        Stage::Refused,
        "relay-0421/data/error/packs/price@zone-east/0000000003.delta.pack.reason.json",
        "objects/stores/0815/manifest.json",
        "relay-0421/data/error/packs/price@zone-east/0000000009.delta.pack.reason.json",
        &["the next publish", RIGHTS],
    ),
    target(
        "import/",
        Kind::Pack,
        Stage::Import,
        "relay-0421/data/import/packs/price@zone-east/0000000003.delta.pack",
        "objects/packs/price@zone-east/0000000001.full.pack",
        "relay-0421/data/import/packs/price@zone-east/0000000009.delta.pack",
        &["`store-relay import` again", RIGHTS],
    ),
    target(
        "receipt",
        Kind::Envelope("receipt"),
        Stage::Receipt,
        "stick/receipts/0421.receipt.json",
        "objects/stores/0815/manifest.json",
        "stick/receipts/0999.receipt.json",
        &["`store-relay import` again"],
    ),
    target(
        "incoming/ as a whole",
        Kind::Directory,
        Stage::Device,
        "relay-0421/data/incoming",
        "relay-0421/data/ready",
        "",
        &[RIGHTS],
    ),
    target(
        "ready/ as a whole",
        Kind::Directory,
        Stage::Device,
        "relay-0421/data/ready",
        "relay-0421/data/ok",
        "",
        &[RIGHTS],
    ),
    target(
        "ok/ as a whole",
        Kind::Directory,
        Stage::Device,
        "relay-0421/data/ok",
        "relay-0421/data/error",
        "",
        &[RIGHTS],
    ),
    target(
        "error/ as a whole",
        Kind::Directory,
        Stage::Refused,
        "relay-0421/data/error",
        "relay-0421/data/import",
        "",
        &["the next publish", RIGHTS],
    ),
    target(
        "import/ as a whole",
        Kind::Directory,
        Stage::Device,
        "relay-0421/data/import",
        "relay-0421/data/incoming",
        "",
        &[RIGHTS],
    ),
    target(
        "shadow.db",
        Kind::Database,
        Stage::Device,
        "relay-0421/data/shadow.db",
        "relay-0815/data/shadow.db",
        "relay-0421/data/shadow.db.damaged",
        &["`store-relay verify`", RIGHTS, "the file moved away, and a restart"],
    ),
    target(
        "shadow.db's log",
        Kind::Log,
        Stage::Logged,
        "relay-0421/data/shadow.db-wal",
        "relay-0815/data/shadow.db-wal",
        "relay-0421/data/shadow.db-wal.old",
        &["`store-relay verify`", RIGHTS, "the file moved away, and a restart"],
    ),
    target(
        "relay.db",
        Kind::Database,
        Stage::Device,
        "relay-0421/data/relay.db",
        "relay-0815/data/relay.db",
        "relay-0421/data/relay.db.damaged",
        &[RIGHTS, "the file moved away, and a restart"],
    ),
    target(
        "relay's device.db",
        Kind::Database,
        Stage::Device,
        "relay-0421/data/device.db",
        "relay-0815/data/device.db",
        "relay-0421/data/device.db.damaged",
        &[RIGHTS, "the relay enrolled anew"],
    ),
    target(
        "store.db",
        Kind::Database,
        Stage::Device,
        "register-0421-01/data/store.db",
        "register-0815-01/data/store.db",
        "register-0421-01/data/store.db.damaged",
        &["`pos-agent verify`", RIGHTS, "the file moved away, and a restart"],
    ),
    target(
        "store.db's log",
        Kind::Log,
        Stage::Logged,
        "register-0421-01/data/store.db-wal",
        "register-0815-01/data/store.db-wal",
        "register-0421-01/data/store.db-wal.old",
        &["`pos-agent verify`", RIGHTS, "the file moved away, and a restart"],
    ),
    target(
        "store.db's log's index",
        Kind::Log,
        Stage::Logged,
        "register-0421-01/data/store.db-shm",
        "register-0815-01/data/store.db-shm",
        "register-0421-01/data/store.db-shm.old",
        &["`pos-agent verify`", RIGHTS, "the file moved away, and a restart"],
    ),
    target(
        "register's device.db",
        Kind::Database,
        Stage::Device,
        "register-0421-01/data/device.db",
        "register-0815-01/data/device.db",
        "register-0421-01/data/device.db.damaged",
        &[RIGHTS, "the register enrolled anew"],
    ),
    target(
        "published replica",
        Kind::Database,
        Stage::Headquarters,
        "hq/state/replicas/price@zone-east.db",
        "hq/state/replicas/price@zone-west.db",
        "hq/state/replicas/price@zone-north.db",
        &[RIGHTS, "the file moved away, and `publish`"],
    ),
    target(
        "fleet.db",
        Kind::Database,
        Stage::Headquarters,
        "hq/state/fleet.db",
        "hq/state/replicas/price@zone-east.db",
        "hq/state/fleet.db.damaged",
        &[RIGHTS, "the file moved away, and `publish`"],
    ),
    target(
        "publisher key",
        Kind::Key,
        Stage::Headquarters,
        "hq/state/keys/publisher-1.key",
        "hq/state/keys/root-1.key",
        "hq/state/keys/publisher-2.key",
        &[RIGHTS, "the key file put back, and `publish`"],
    ),
];

const fn target(
    name: &'static str,
    kind: Kind,
    stage: Stage,
    path: &'static str,
    sibling: &'static str,
    twin: &'static str,
    remedies: &'static [&'static str],
) -> Target {
    Target { name, kind, stage, path, sibling, twin, remedies }
}

/// The faults of a kind of file, in the table's order.
pub fn faults(kind: Kind) -> Vec<&'static str> {
    let flips: &[&str] = match kind {
        Kind::Envelope(_) => &["flip payload", "flip signature"],
        Kind::Pack => &["flip header", "flip schema", "flip rows", "flip trailer"],
        Kind::Json | Kind::Key => &["flip"],
        Kind::Database => &["flip header", "flip schema", "flip row", "flip index", "flip end"],
        Kind::Log => &["flip header", "flip frame", "flip end"],
        Kind::Directory => return vec!["delete", "swap", "roll back", "wrong owner", "read-only"],
    };
    let rest = ["swap", "duplicate", "roll back", "future version", "wrong owner", "read-only"];
    [&["truncate", "empty", "delete"], flips, &rest].concat()
}

impl Target {
    /// The file.
    pub fn file(&self, site: &Site) -> PathBuf {
        site.dir().join(self.path)
    }

    /// Whether it is the register's (else the relay's, the bucket's or headquarters').
    pub fn is_registers(&self) -> bool {
        self.path.starts_with("register-")
    }

    /// The site that the cell begins from, with the file where it is to be damaged.
    pub fn site(&self, p: &Prepared) -> Site {
        let mut site = match self.stage {
            Stage::Left => p.waiting.copy(),
            Stage::Refused => p.refused.copy(),
            Stage::Logged => p.logged.copy(),
            _ => p.second.copy(),
        };
        let put = |from: PathBuf, to: PathBuf| {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(from, to).unwrap();
        };
        match self.stage {
            // Else the register would take the bad pack from the bucket, and judge it for itself.
            Stage::Refused => site.registers.get_mut("0421-01").unwrap().set("fallback", "[]"),
            Stage::Left => put(p.third.bucket().join(NEW_PACK), self.file(&site)),
            Stage::Import => {
                let import = site.relay("0421").dir.join("data/import");
                for name in ["trust.json", "trust/0000000001.json", "trust/0000000002.json", "trust/0000000003.json"] {
                    put(p.third.bucket().join(name), import.join(name));
                }
                for name in [MANIFEST, NEW_PACK] {
                    put(p.third.bucket().join(name), import.join(name));
                }
                // A store that nothing but sticks reaches.
                site.relays.get_mut("0421").unwrap().set("sources", "[]");
                site.registers.get_mut("0421-01").unwrap().set("fallback", "[]");
            }
            _ => {}
        }
        site
    }

    /// Does the damage.
    pub fn damage(&self, site: &Site, p: &Prepared, cell: &Cell) {
        let file = self.file(site);
        if self.kind == Kind::Database && (!cell.running || cell.fault == "flip index") {
            settle(&file);
        }
        if self.kind == Kind::Directory {
            return self.damage_directory(&file, site, p, cell.fault);
        }
        let bytes = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        match cell.fault {
            "truncate" => cut(&file, bytes.len() as u64 / 2),
            "empty" => cut(&file, 0),
            "delete" => self.remove(&file, cell),
            "swap" => self.replace(&file, &fs::read(site.dir().join(self.sibling)).unwrap(), cell),
            "duplicate" => {
                let twin = site.dir().join(self.twin);
                fs::create_dir_all(twin.parent().unwrap()).unwrap();
                fs::write(twin, &bytes).unwrap();
            }
            "roll back" => {
                let before = if self.stage == Stage::Logged { &p.logged_before } else { &p.first };
                self.replace(&file, &fs::read(self.file(before)).unwrap(), cell);
            }
            "future version" => self.of_the_future(&file, site),
            "wrong owner" => give_away(&file),
            "read-only" => fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap(),
            "flip schema" if self.kind == Kind::Database => flip_a_bit(&file, start_of_a_table(&bytes)),
            "flip index" => flip_a_bit(&file, end_of_an_index(&file, &bytes)),
            flip => flip_a_bit(&file, self.region(&bytes, flip)),
        }
    }

    fn damage_directory(&self, dir: &Path, site: &Site, p: &Prepared, fault: &str) {
        let sibling = site.dir().join(self.sibling);
        match fault {
            "delete" => fs::remove_dir_all(dir).unwrap(),
            "swap" => {
                let aside = beside(dir, ".aside");
                fs::rename(dir, &aside).unwrap();
                fs::rename(&sibling, dir).unwrap();
                fs::rename(aside, sibling).unwrap();
            }
            "roll back" => {
                fs::remove_dir_all(dir).unwrap();
                files::copy_all(&self.file(&p.first), dir);
            }
            "wrong owner" => give_away(dir),
            _ => fs::set_permissions(dir, fs::Permissions::from_mode(0o555)).unwrap(),
        }
    }

    /// The byte of a region.
    fn region(&self, bytes: &[u8], flip: &str) -> usize {
        let n = bytes.len();
        let find = |what: &[u8]| bytes.windows(what.len()).position(|w| w == what);
        match (self.kind, flip) {
            (Kind::Envelope(_), "flip payload") => find(b"\"payload\"").unwrap() + 60,
            (Kind::Envelope(_), _) => find(b"\"sig\"").unwrap() + 20,
            // gzip's own header, then about where the contract, the rows and the last line are packed.
            (Kind::Pack, "flip header") => 1,
            (Kind::Pack, "flip schema") => n / 4,
            (Kind::Pack, "flip rows") => n * 3 / 4,
            (Kind::Pack, _) => n - 10,
            (Kind::Database, "flip header") => 3,
            (Kind::Database, "flip row") => {
                // A device's manifest, or a price's date: SQLite does not mind.
                let text = find(b"\"payload\":").map(|at| at + 400);
                text.or(find(b"2026-01-01T00").map(|at| at + 3)).unwrap_or(n / 2)
            }
            // The log's salt.
            (Kind::Log, "flip header") => 17,
            (Kind::Database, _) | (Kind::Log, "flip end") => n - 5,
            // A digit that stays one: of another key, not of no key.
            (Kind::Key, _) => bytes.iter().position(|b| !b"af".contains(b)).unwrap(),
            _ => n / 2,
        }
    }

    fn remove(&self, file: &Path, cell: &Cell) {
        fs::remove_file(file).unwrap();
        self.remove_log(file, cell);
    }

    /// A database goes with its log and index, where nothing has them open.
    fn remove_log(&self, file: &Path, cell: &Cell) {
        if self.kind == Kind::Database && !cell.running {
            for end in ["-wal", "-shm"] {
                let _ = fs::remove_file(beside(file, end));
            }
        }
    }

    /// As a restore does it: another file under the name, which is never without one.
    fn replace(&self, file: &Path, bytes: &[u8], cell: &Cell) {
        let aside = beside(file, ".aside");
        fs::write(&aside, bytes).unwrap();
        self.remove_log(file, cell);
        fs::rename(aside, file).unwrap();
    }

    fn of_the_future(&self, file: &Path, site: &Site) {
        match self.kind {
            Kind::Envelope(kind) => {
                let mut payload = forge::payload(&fs::read(file).unwrap());
                payload["format"] = 2.into();
                if kind == "manifest" {
                    payload["serial"] = (payload["serial"].as_u64().unwrap() + 1).into();
                }
                let key = match kind {
                    "receipt" => relay_key(site),
                    "trust" => site.signing_key("root"),
                    _ => site.signing_key("publisher"),
                };
                fs::write(file, forge::seal(kind, &serde_json::to_vec(&payload).unwrap(), &[&key])).unwrap();
            }
            Kind::Pack => {
                let mut lines = forge::unpack(&fs::read(file).unwrap());
                lines[0] = lines[0].replacen("\"format\":1", "\"format\":2", 1);
                let pack = forge::pack(&lines);
                // Well listed: else it is but another swap.
                let mut manifest = site.manifest("0421");
                let packs = manifest["streams"]["price"]["packs"].as_array_mut().unwrap();
                *packs.iter_mut().find(|p| p["version"] == 3).unwrap() = forge::entry(&pack);
                let manifest = serde_json::to_vec(&manifest).unwrap();
                site.put_object(MANIFEST, &forge::seal("manifest", &manifest, &[&site.signing_key("publisher")]));
                fs::write(file, pack).unwrap();
            }
            Kind::Database => {
                let db = Connection::open(file).unwrap();
                if db.execute("INSERT INTO migration (number) VALUES (9999)", []).is_err() {
                    let shape = "CREATE TABLE tillcast_shape (shape INTEGER); INSERT INTO tillcast_shape VALUES (99)";
                    let is_replica = db.prepare("SELECT 1 FROM tillcast_stream").is_ok();
                    db.execute_batch(if is_replica { shape } else { "PRAGMA user_version = 99" }).unwrap();
                }
                drop(db);
                settle(file);
            }
            Kind::Json | Kind::Directory | Kind::Log | Kind::Key => unreachable!(),
        }
    }
}

/// Where the text of a table begins, without which SQLite can read nothing; texts of old tables lie about, too.
fn start_of_a_table(bytes: &[u8]) -> usize {
    let text = b"CREATE TABLE";
    let is_read = |at: usize| {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, bytes).unwrap();
        flip_a_bit(file.path(), at);
        let db = digest::open_read_only(file.path());
        db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())).is_err()
    };
    let mut texts = bytes.windows(text.len()).enumerate().filter(|(_, w)| w == text).map(|(at, _)| at);
    texts.find(|at| is_read(*at)).unwrap()
}

/// The last byte of a leaf of an index (of a table without one, of the table): what its first entry ends with, which says
/// of what row it is.
fn end_of_an_index(file: &Path, bytes: &[u8]) -> usize {
    let indexes = "SELECT rootpage FROM sqlite_schema WHERE rootpage > 0 ORDER BY type <> 'index', tbl_name <> 'price'";
    let root: u32 = digest::open_read_only(file).query_row(indexes, [], |r| r.get(0)).unwrap();
    let number = |at: usize| bytes[at..at + 4].iter().fold(0, |n, b| n << 8 | usize::from(*b));
    let size = usize::from(bytes[16]) << 8 | usize::from(bytes[17]);
    let mut page = root as usize;
    // The inner pages of an index begin with 2, of a table with 5; both name their last child there.
    while matches!(bytes[(page - 1) * size], 2 | 5) {
        page = number((page - 1) * size + 8);
    }
    page * size - 1
}

/// To a user who lets nobody in.
fn give_away(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
}

/// The key of store 0421's relay.
fn relay_key(site: &Site) -> ed25519_dalek::SigningKey {
    let db = digest::open_read_only(&site.relay("0421").dir.join("data/device.db"));
    let seed: String = db.query_row("SELECT value FROM fact WHERE name = 'seed'", [], |r| r.get(0)).unwrap();
    let seed = hex::decode(seed.trim_matches('"')).unwrap();
    ed25519_dalek::SigningKey::from_bytes(&seed.try_into().unwrap())
}

/// A path with something at its end.
pub fn beside(file: &Path, end: &str) -> PathBuf {
    PathBuf::from(format!("{}{end}", file.display()))
}

/// Brings a database's log home, so that the file itself is what counts.
pub fn settle(file: &Path) {
    let db = Connection::open(file).unwrap();
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
}

fn cut(file: &Path, length: u64) {
    fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length).unwrap();
}

/// In place, as the disk would.
fn flip_a_bit(file: &Path, at: usize) {
    let byte = fs::read(file).unwrap()[at] ^ 1;
    let mut file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.seek(SeekFrom::Start(at as u64)).unwrap();
    file.write_all(&[byte]).unwrap();
}

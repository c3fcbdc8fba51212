//! Headquarters: the source database, `publish`, and the judging half of `serve`, driven by hand.

use crate::clock::Machine;
use crate::disk::SmallDisk;
use crate::model::Model;
use crate::net::{Answer, Question};
use hq_publisher::bucket::Buckets;
use hq_publisher::carry;
use hq_publisher::cli::{RevokeKey, Rotate};
use hq_publisher::config::Config;
use hq_publisher::enrol::{Desk, EnrolError};
use hq_publisher::ledger::Ledger;
use hq_publisher::publish::{self, Aborted, PublishError, PublishOptions, PublishReport, Quiet, Step, Steps};
use hq_publisher::web::{App, ticks};
use http_body_util::BodyExt as _;
use proto::clock::Clock;
use proto::ids::DeviceId;
use proto::keys::SecretKey;
use proto::trust::{EnrolCode, RootKeys};
use rusqlite::Connection;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tillcast_tests::Dice;
use tokio::sync::watch;
use tower::ServiceExt as _;

/// The zones of the chain.
pub const ZONES: [&str; 2] = ["east", "west"];

/// A stream of the chain: its one table has the stream's name.
#[derive(Debug)]
pub struct StreamKind {
    /// Its name, and its table's.
    pub name: &'static str,
    /// `all`, `zone` or `store`.
    pub audience: &'static str,
    ddl: &'static str,
    query: &'static str,
}

/// The streams of the chain.
pub const STREAMS: [StreamKind; 3] = [
    StreamKind {
        name: "price",
        audience: "zone",
        ddl: "CREATE TABLE price (sku TEXT PRIMARY KEY CHECK (length(sku) <= 12), cents INTEGER NOT NULL CHECK (cents > 0), note TEXT) STRICT;",
        query: "SELECT sku, cents, note FROM price WHERE zone = :zone",
    },
    StreamKind {
        name: "promo",
        audience: "all",
        ddl: "CREATE TABLE promo (id INTEGER PRIMARY KEY, share REAL NOT NULL CHECK (share BETWEEN 0 AND 1), text TEXT) STRICT;",
        query: "SELECT id, share, text FROM promo",
    },
    StreamKind {
        name: "staff",
        audience: "store",
        ddl: "CREATE TABLE staff (badge TEXT PRIMARY KEY, rights INTEGER NOT NULL CHECK (rights >= 0)) STRICT;",
        query: "SELECT badge, rights FROM staff WHERE store = :store",
    },
];

const SOURCE: &str = "
    CREATE TABLE store (id TEXT PRIMARY KEY, zone TEXT NOT NULL, region TEXT);
    CREATE TABLE price (zone TEXT, sku TEXT, cents INTEGER, note TEXT, PRIMARY KEY (zone, sku));
    CREATE TABLE promo (id INTEGER PRIMARY KEY, share REAL, text TEXT);
    CREATE TABLE staff (store TEXT, badge TEXT, rights INTEGER, PRIMARY KEY (store, badge));";

/// Headquarters.
pub struct Hq {
    /// Where it lies.
    pub dir: PathBuf,
    disk: SmallDisk,
    /// The disk is full but for so many pages while the next publish runs.
    pub room: Option<u64>,
    /// Its clock.
    pub clock: Arc<Machine>,
    /// The settings.
    pub config: Config,
    /// `serve`, while it runs.
    pub app: Option<Arc<App>>,
    stop: Option<watch::Sender<bool>>,
    /// The bad row that lies in the source, if one does: its stream.
    pub bad: Option<&'static str>,
    /// The publisher key, as a thief would have it.
    pub publisher: ed25519_dalek::SigningKey,
    root: SecretKey,
    counter: i64,
    /// The publisher key that is in a thief's hands, until its epoch is over.
    pub stolen: Option<String>,
    columns: u32,
}

/// Cuts a run at a step, and tells the model of the numbers taken.
struct Cutter {
    left: Mutex<Option<u64>>,
    model: Arc<Mutex<Model>>,
}

impl Cutter {
    fn count(&self) -> Result<(), Aborted> {
        let mut left = self.left.lock().unwrap();
        match left.as_mut() {
            Some(0) => Err(Aborted),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Steps for Cutter {
    fn before(&self, step: &Step) -> Result<(), Aborted> {
        if let Step::Reserve(instance, version) = step {
            self.model.lock().unwrap().reserved(&instance.to_string(), version.get());
        }
        self.count()
    }
    fn after(&self, _: &Step) -> Result<(), Aborted> {
        self.count()
    }
}

/// How a publish ended.
#[derive(Debug)]
pub enum Published {
    /// By itself.
    Ended(Box<PublishReport>),
    /// It failed as a whole.
    Failed(PublishError),
    /// The plug was pulled.
    Cut,
}

impl Hq {
    /// Sets up a chain of so many stores with so many registers each; gives the codes of all devices.
    pub async fn new(
        dir: &Path,
        clock: Arc<Machine>,
        stores: usize,
        registers: usize,
        dice: &mut Dice,
    ) -> (Hq, Vec<EnrolCode>) {
        let disk = SmallDisk::mount(dir);
        fs::create_dir_all(dir.join("state/keys")).unwrap();
        let source = Connection::open(dir.join("source.db")).unwrap();
        source.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF").unwrap();
        source.execute_batch(SOURCE).unwrap();
        let (root, publisher) = (dice.key(), dice.key());
        fs::write(dir.join("state/keys/root-1.key"), hex::encode(root)).unwrap();
        fs::write(dir.join("state/keys/publisher-1.key"), hex::encode(publisher)).unwrap();
        let file = dir.join("hq.toml");
        fs::write(&file, settings(dir, 0)).unwrap();
        let config = hq_publisher::config::load(Some(&file), []).unwrap().value;
        let mut hq = Hq {
            dir: dir.to_owned(),
            disk,
            room: None,
            clock,
            config,
            app: None,
            stop: None,
            bad: None,
            publisher: ed25519_dalek::SigningKey::from_bytes(&publisher),
            root: SecretKey::from_seed(root),
            counter: 0,
            stolen: None,
            columns: 0,
        };
        for n in 0..stores {
            let zone = ZONES[dice.index(2)];
            source.execute("INSERT INTO store VALUES (?1, ?2, NULL)", (store_id(n), zone)).unwrap();
        }
        for _ in 0..dice.between(6, 20) {
            hq.change(dice, stores);
        }
        let codes = hq.enrol(stores, registers, dice).await;
        (hq, codes)
    }

    async fn enrol(&self, stores: usize, registers: usize, dice: &mut Dice) -> Vec<EnrolCode> {
        let ledger = Ledger::open(&self.config).await.unwrap();
        let buckets = Buckets::open(&self.config, &ledger).await.unwrap();
        let desk =
            Desk { config: &self.config, ledger: ledger.clone(), buckets, clock: &*self.clock, clock_is_right: false };
        desk.init().await.unwrap();
        let now = self.clock.now();
        let mut codes = Vec::new();
        for n in 0..stores {
            let names = std::iter::once(store_id(n)).chain((0..registers).map(|r| register_id(n, r)));
            for name in names {
                let id: DeviceId = name.parse().unwrap();
                let key = SecretKey::from_seed(dice.key());
                // As `enroll` does, but with a key that the seed gave.
                ledger.enrol(&id, &key.public(), now).await.unwrap();
                codes.push(EnrolCode {
                    format: 1,
                    id,
                    seed: key.to_secret_text(),
                    roots: RootKeys { threshold: 1, keys: vec![self.root.public()] },
                    trust_version: 1,
                    expires_at: proto::clock::after(now, Duration::from_secs(86_400)),
                });
            }
        }
        codes
    }

    /// Where the objects lie.
    pub fn bucket(&self) -> PathBuf {
        self.dir.join("objects")
    }

    /// The source, open.
    pub fn source(&self) -> Connection {
        Connection::open(self.dir.join("source.db")).unwrap()
    }

    /// A clerk changes something.
    pub fn change(&mut self, dice: &mut Dice, stores: usize) -> &'static str {
        self.counter += 1;
        let (n, db) = (self.counter, self.source());
        let note = if dice.percent(30) { None } else { Some(format!("n{}", dice.below(1000))) };
        match dice.below(9) {
            0..5 => {
                let (zone, sku) = (*dice.pick(&ZONES), format!("s{}", dice.below(9)));
                let sql = "INSERT INTO price VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET cents = ?3, note = ?4";
                db.execute(sql, (zone, sku, n, note)).unwrap();
                "price"
            }
            5 => {
                let sql = "DELETE FROM price WHERE zone = ?1 AND sku = ?2 AND (SELECT count(*) FROM price p WHERE p.zone = ?1) > 2";
                db.execute(sql, (*dice.pick(&ZONES), format!("s{}", dice.below(9)))).unwrap();
                "price"
            }
            6 | 7 => {
                let sql = "INSERT INTO promo (id, share, text) VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET share = ?2, text = ?3";
                db.execute(sql, (dice.below(5) as i64, dice.unit(), note)).unwrap();
                "promo"
            }
            _ => {
                let sql = "INSERT INTO staff VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET rights = ?3";
                db.execute(sql, (store_id(dice.index(stores)), format!("b{}", dice.below(4)), n)).unwrap();
                "staff"
            }
        }
    }

    /// A row of every stream, zone and store changes.
    pub fn change_all(&mut self, stores: usize) {
        self.counter += 1;
        let (n, db) = (self.counter, self.source());
        for zone in ZONES {
            db.execute("INSERT OR REPLACE INTO price VALUES (?1, 'last', ?2, NULL)", (zone, n)).unwrap();
        }
        db.execute("INSERT OR REPLACE INTO promo (id, share, text) VALUES (7, 0.5, ?1)", [format!("n{n}")]).unwrap();
        for store in 0..stores {
            db.execute("INSERT OR REPLACE INTO staff VALUES (?1, 'last', ?2)", (store_id(store), n)).unwrap();
        }
    }

    /// A clerk writes a row that the contract refuses.
    pub fn spoil_row(&mut self, dice: &mut Dice) -> &'static str {
        let db = self.source();
        let (stream, sql) = *dice.pick(&[
            ("price", "INSERT OR REPLACE INTO price VALUES ('east', 'bad', -1, NULL)"),
            ("price", "INSERT OR REPLACE INTO price VALUES ('west', 'a sku that is too long', 5, NULL)"),
            ("promo", "INSERT OR REPLACE INTO promo (id, share, text) VALUES (99, 1.5, NULL)"),
        ]);
        db.execute(sql, []).unwrap();
        self.bad = Some(stream);
        stream
    }

    /// … and takes it back.
    pub fn mend_row(&mut self) {
        self.source()
            .execute_batch("DELETE FROM price WHERE cents < 0 OR length(sku) > 12; DELETE FROM promo WHERE id = 99;")
            .unwrap();
        self.bad = None;
    }

    /// The key that signs next lies in its file before it is asked for, so that the seed decides it.
    fn next_key(&mut self, dice: &mut Dice) {
        let keys = self.dir.join("state/keys");
        let of = |name: &str| name.strip_prefix("publisher-")?.strip_suffix(".key")?.parse::<u32>().ok();
        let names = fs::read_dir(&keys).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
        let last = names.filter_map(|n| of(&n)).max().unwrap();
        let key = dice.key();
        fs::write(keys.join(format!("publisher-{}.key", last + 1)), hex::encode(key)).unwrap();
        self.publisher = ed25519_dalek::SigningKey::from_bytes(&key);
    }

    /// `trust rotate`.
    pub async fn rotate(&mut self, dice: &mut Dice) -> Result<u64, String> {
        self.next_key(dice);
        let desk = Desk::open(&self.config, &*self.clock, true).await.unwrap();
        desk.rotate(&Rotate::default()).await.map(|t| t.version).map_err(|e| e.to_string())
    }

    /// The publisher key in use.
    pub async fn key_in_use(&self) -> Result<String, String> {
        let desk = Desk::open(&self.config, &*self.clock, true).await.unwrap();
        Ok(desk.show().await.map_err(|e| e.to_string())?.publishers.pop().unwrap().public_key)
    }

    /// `trust revoke --new-epoch` of the stolen key, once more where it stops to tell of the thief's lists. None where the
    /// epoch waits for a publish.
    pub async fn revoke(&mut self, dice: &mut Dice) -> Result<Option<u64>, String> {
        let Some(key) = self.stolen.clone() else { return Ok(None) };
        if key == self.key_in_use().await? {
            self.next_key(dice);
        }
        let desk = Desk::open(&self.config, &*self.clock, true).await.unwrap();
        let asked = RevokeKey { key, new_epoch: true, root_key: Vec::new(), clock_is_right: true };
        let mut revoked = desk.revoke_key(&asked).await;
        if matches!(revoked, Err(EnrolError::SetBack(_))) {
            revoked = desk.revoke_key(&asked).await;
        }
        match revoked {
            Ok(report) => {
                self.stolen = None;
                Ok(Some(report.version))
            }
            Err(EnrolError::EpochWaits(_)) => Ok(None),
            Err(e) => Err(e.to_string()),
        }
    }

    /// The promotions get a column more: in the source, in the query and in the contract.
    pub fn add_column(&mut self) -> u32 {
        self.columns += 1;
        let sql = format!("ALTER TABLE promo ADD COLUMN extra{} TEXT; UPDATE promo SET extra{0} = 'new'", self.columns);
        self.source().execute_batch(&sql).unwrap();
        let file = self.dir.join("hq.toml");
        fs::write(&file, settings(&self.dir, self.columns)).unwrap();
        self.config = hq_publisher::config::load(Some(&file), []).unwrap().value;
        self.columns
    }

    /// Runs `publish`, up to a step if it is to be cut.
    pub async fn publish(
        &mut self,
        options: &PublishOptions,
        cut: Option<u64>,
        model: &Arc<Mutex<Model>>,
    ) -> Published {
        if let Some(pages) = self.room {
            self.settle().await;
            self.disk.fill(pages);
        }
        let steps = Cutter { left: Mutex::new(cut), model: Arc::clone(model) };
        let clock: Arc<dyn Clock> = self.clock.clone();
        let published = publish::run(&self.config, options, &clock, &Quiet, &steps).await;
        if self.room.take().is_some() {
            self.disk.empty();
        }
        match published {
            Ok(report) => Published::Ended(Box::new(report)),
            Err(PublishError::Aborted(_)) => Published::Cut,
            Err(e) => Published::Failed(e),
        }
    }

    /// Waits until a ledger that was let go is closed: its connections end in threads of their own, and the last one takes
    /// the log home. What room there is would be chance.
    async fn settle(&self) {
        let ledger = self.config.state.dir.join("fleet.db");
        let is_it = |fd: fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|file| file == ledger);
        let is_open = || fs::read_dir("/proc/self/fd").unwrap().flatten().any(is_it);
        let until = Instant::now() + Duration::from_secs(120);
        while self.app.is_none() && is_open() && Instant::now() < until {
            tokio::task::yield_now().await;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Writes a store's objects onto a stick.
    pub async fn export(&self, store: &str, stick: &Path) -> bool {
        let ledger = Ledger::open(&self.config).await.unwrap();
        let buckets = Buckets::open(&self.config, &ledger).await.unwrap();
        let store = store.parse().unwrap();
        carry::export(&ledger, &buckets, &store, stick, |_, _| {}).await.is_ok()
    }

    /// Starts `serve`, or starts it again.
    pub async fn serve(&mut self) {
        self.stop_serving();
        let (stop, stopping) = watch::channel(false);
        self.app = Some(App::open(&self.config, self.clock.clone(), stopping).await.unwrap());
        self.stop = Some(stop);
    }

    /// Kills `serve`.
    pub fn stop_serving(&mut self) {
        (self.app, self.stop) = (None, None);
    }

    /// One look at the fleet, and at the manifests if wanted.
    pub async fn judge(&self, manifests: bool) -> Result<(), String> {
        let Some(app) = &self.app else { return Ok(()) };
        if manifests {
            // Overtaken, or a clock that leapt: tried again by the next tick.
            let _ = ticks::manifests(app).await;
        }
        ticks::alerts(app).await
    }

    /// Answers a relay.
    pub async fn answer(&self, question: &Question) -> Answer {
        let Some(app) = &self.app else { return Answer::new(502, "nobody listens") };
        if question.path.starts_with("/v1/wake") {
            let _ = ticks::wake(app, None).await;
        }
        // A simulated wait takes no time: whoever waits comes again.
        let path = question.path.replace("wait=30", "wait=0");
        let mut request = http::Request::builder().method(question.method.clone()).uri(path);
        for (name, value) in &question.headers {
            request = request.header(name, value);
        }
        let request = request.body(axum::body::Body::from(question.body.clone())).unwrap();
        let response = app.router().oneshot(request).await.unwrap();
        let mut answer = Answer::new(response.status().as_u16(), "");
        for (name, value) in response.headers() {
            answer = answer.with(name.as_str(), value.to_str().unwrap_or_default());
        }
        answer.body = response.into_body().collect().await.unwrap().to_bytes();
        answer
    }
}

/// A store's id.
pub fn store_id(n: usize) -> String {
    format!("{:04}", 421 + n)
}

/// A register's id.
pub fn register_id(store: usize, n: usize) -> String {
    format!("{}-{:02}", store_id(store), n + 1)
}

fn settings(dir: &Path, columns: u32) -> String {
    let mut text = "[source]\nurl = \"sqlite:source.db\"\n[objects]\nurls = [\"file:objects\"]\nconcurrency = 1\n[state]\ndir = \"state\"\n\
         [stores]\nquery = \"SELECT id, zone, region FROM store\"\n\
         [alerts]\ndisk_low_percent = 0\n[publish]\ndeltas = 3\nkeep = \"20m\"\ndelete_after = \"10m\"\nlevel = 1\nresign_after = \"12h\"\n"
        .to_owned();
    for s in &STREAMS {
        // Its rows say shares of prices.
        let requires = if s.name == "promo" { "requires = [\"price\"]\n" } else { "" };
        let (mut ddl, mut query) = (s.ddl.to_owned(), s.query.to_owned());
        for n in (1..=columns).filter(|_| s.name == "promo") {
            ddl = ddl.replace(") STRICT;", &format!(", extra{n} TEXT) STRICT;"));
            query = query.replace(" FROM promo", &format!(", extra{n} FROM promo"));
        }
        fs::write(dir.join(format!("{}.sql", s.name)), ddl).unwrap();
        let _ = write!(
            text,
            "[[stream]]\nname = \"{0}\"\naudience = \"{1}\"\nschema = \"{0}.sql\"\n{requires}[[stream.table]]\nname = \"{0}\"\nquery = \"{2}\"\n",
            s.name, s.audience, query
        );
    }
    text
}

//! The days: what happens, what is looked at meanwhile, what must hold at the end.

use crate::chain::Chain;
use crate::plot;
use crate::watch::{Course, Figure, Samples, Watch};
use rusqlite::Connection;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tillcast_tests::bins::Running;
use tillcast_tests::{Daemon, Dice, Net, Product, checker, digest, real_data, until};

/// How long, how fast, which chances.
#[derive(Debug, Clone)]
pub struct Options {
    /// Days of the chain.
    pub days: u64,
    /// Seconds of a day.
    pub day: f64,
    /// The seed of all chances.
    pub seed: u64,
    /// Leave the real data alone.
    pub sample: bool,
}

/// What happened.
#[derive(Debug, Default)]
pub struct Report {
    /// Days lived, and seconds each took.
    pub days: (u64, f64),
    /// The master data: real, or the sample.
    pub data: String,
    /// Publishes that ended well, that were killed, that failed.
    pub publishes: [u64; 3],
    /// What failed publishes said.
    pub failures: BTreeSet<String>,
    /// Kills by process.
    pub kills: BTreeMap<String, u64>,
    /// Seconds without WAN by store.
    pub dark: BTreeMap<String, f64>,
    /// Looks at a register's rows.
    pub looks: u64,
    /// Mails, and how many of them left after the mail server came back.
    pub mails: usize,
    /// Versions of the streams at the end.
    pub versions: BTreeMap<String, u64>,
    /// How each figure went.
    pub courses: Vec<(Figure, String, Course)>,
    /// The plot.
    pub svg: String,
}

/// One daemon, up or down.
struct Proc {
    name: String,
    node: usize,
    daemon: Option<Daemon>,
    /// When it is killed, or comes back, in days.
    next: f64,
}

/// A store's line.
struct Line {
    store: &'static str,
    down: bool,
    until: f64,
    since: f64,
}

/// Digests by store and table that the source ever had.
type History = BTreeMap<(String, String), BTreeSet<String>>;

struct Life {
    options: Options,
    chain: Chain,
    dice: Dice,
    watch: Watch,
    start: Instant,
    procs: Vec<Proc>,
    lines: Vec<Line>,
    publish: Option<(Running, Option<Instant>)>,
    history: History,
    seen: BTreeMap<(String, String), i64>,
    report: Report,
}

/// Publishes a day.
const PUBLISHES: u64 = 3;

/// Lives the days; panics where something does not hold.
pub fn live(options: &Options) -> Report {
    let mut life = Life::begin(options);
    let (mut step, mut looked) = (0, Instant::now());
    let end = options.days as f64;
    while life.now() < end {
        let now = life.now();
        life.kill_and_restart(now);
        life.break_and_mend(now);
        life.mail_server(now);
        life.attend_publish();
        if life.publish.is_none() && now * PUBLISHES as f64 >= step as f64 {
            life.change(step);
            life.start_publish();
            step += 1;
        }
        if looked.elapsed() > Duration::from_millis(500) {
            life.look();
            looked = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    life.finish()
}

/// Killed by nobody: in them one sees what grows over the weeks.
fn is_spared(name: &str) -> bool {
    name == "relay 0815" || name == "register 0815-02"
}

impl Life {
    fn begin(options: &Options) -> Life {
        let chain = Chain::build(options.day, options.sample);
        let site = &chain.site;
        let mut directories: Vec<(String, PathBuf)> =
            vec![("headquarters".into(), site.hq.dir.join("state")), ("bucket".into(), site.bucket())];
        let mut procs = Vec::new();
        for (n, node) in chain.nodes().into_iter().enumerate() {
            let name = match node.product {
                Product::Hq => "headquarters".to_owned(),
                Product::Relay => format!("relay {}", node.id),
                Product::Agent => format!("register {}", node.id),
            };
            if node.product != Product::Hq {
                directories.push((name.clone(), node.dir.join("data")));
            }
            procs.push(Proc { name, node: n, daemon: None, next: 0.0 });
        }
        let lines = Chain::stores().map(|store| Line { store, down: true, until: 0.0, since: 0.0 }).collect();
        let watch = Watch::start(directories, Duration::from_secs_f64((options.day / 12.0).clamp(0.5, 5.0)));
        let data = if chain.data.is_some() { "the real data" } else { "the sample" };
        let report = Report { days: (options.days, options.day), data: data.into(), ..Report::default() };
        Life {
            options: options.clone(),
            dice: Dice::new(options.seed),
            watch,
            start: Instant::now(),
            procs,
            lines,
            publish: None,
            history: History::new(),
            seen: BTreeMap::new(),
            report,
            chain,
        }
    }

    /// Days since the beginning.
    fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64() / self.options.day
    }

    fn kill_and_restart(&mut self, now: f64) {
        let nodes = self.chain.nodes();
        for proc in &mut self.procs {
            if let Some(daemon) = &mut proc.daemon {
                let log = || tillcast_tests::process::tail(&nodes[proc.node].log(), 20);
                assert!(daemon.process.is_running(), "{} ended by itself; its log ends:\n{}", proc.name, log());
                if now < proc.next {
                    continue;
                }
                daemon.kill9();
                proc.daemon = None;
                self.watch.is_gone(&proc.name);
                *self.report.kills.entry(proc.name.clone()).or_default() += 1;
                proc.next = now + self.dice.stretch(0.0, 0.2);
            } else if now >= proc.next {
                let daemon = nodes[proc.node].start();
                self.watch.runs(&proc.name, daemon.process.pid());
                proc.daemon = Some(daemon);
                let calm =
                    is_spared(&proc.name) || (proc.name == "headquarters" && now > self.options.days as f64 / 2.0);
                proc.next = if calm { f64::MAX } else { now + self.dice.stretch(0.3, 1.7) };
            }
        }
    }

    /// 30% of the time each store is without WAN: refused, or silent.
    fn break_and_mend(&mut self, now: f64) {
        for line in &mut self.lines {
            if now < line.until {
                continue;
            }
            if line.down {
                *self.report.dark.entry(line.store.into()).or_default() += (now - line.since) * self.options.day;
            }
            line.down = !line.down;
            line.since = now;
            let (from, to) = if line.down { (0.05, 0.25) } else { (0.1, 0.6) };
            line.until = now + self.dice.stretch(from, to);
            let net = match (line.down, self.dice.below(2)) {
                (false, _) => Net::default(),
                (true, 0) => Net { refuse: true, ..Net::default() },
                (true, _) => Net { blackhole: true, ..Net::default() },
            };
            self.chain.set_wan(line.store, &net);
        }
    }

    /// Down for the whole of one day, a third into the run.
    fn mail_server(&mut self, now: f64) {
        let from = (self.options.days / 3).max(1) as f64;
        let down = self.chain.smtp.is_stopped();
        if !down && now >= from && now < from + 1.0 {
            self.chain.smtp.stop();
        } else if down && now >= from + 1.0 {
            self.chain.smtp.restart();
        }
    }

    /// Changes prices; at the beginning of a day loads its promotions, of a week its items.
    fn change(&mut self, step: u64) {
        let (day, morning) = (step / PUBLISHES, step.is_multiple_of(PUBLISHES));
        let site = &self.chain.site;
        match self.chain.data.clone() {
            Some(data) if morning => {
                let file = real_data::PROMOS[(day % 5) as usize];
                if file.starts_with("base") {
                    site.sql("DELETE FROM il_promo");
                }
                real_data::load_promos(site, &data, file);
                if day.is_multiple_of(7) {
                    let n = (day / 7) as usize % real_data::SNAPSHOTS.len();
                    real_data::load_snapshot(site, &data, real_data::SNAPSHOTS[n]);
                    // A tenth of it: every publish reads it all.
                    site.sql("DELETE FROM off_product WHERE substr(barcode, -1) <> '7'");
                }
            }
            None if morning => site.sql(&format!(
                "UPDATE item SET note = 'day {day}' WHERE department % 7 = {day} % 7; DELETE FROM promo WHERE id = 1000 + {day} - 9; \
                 INSERT INTO promo SELECT zone, 1000 + {day}, 'SKU0000001', 10 FROM store"
            )),
            _ => {}
        }
        let first = self.dice.below(280);
        let cents = 100 + self.dice.below(9000);
        site.sql(&format!(
            "UPDATE price SET price_cents = {cents} + rowid % 100 WHERE sku BETWEEN 'SKU{first:07}' AND 'SKU{:07}'; \
             UPDATE staff SET name = 'step {step}' WHERE id = {}",
            first + 20,
            step % 6
        ));
        for store in Chain::stores() {
            for (table, digest) in self.chain.expected(store) {
                self.history.entry((store.into(), table)).or_default().insert(digest);
            }
        }
    }

    /// Now and then a publish is killed on its way.
    fn start_publish(&mut self) {
        let running = self.chain.site.hq.spawn(&["publish", "--allow-shrink"], &[]);
        let killed = self.dice.below(6) == 0;
        let after = Duration::from_millis(self.dice.below(3000));
        self.publish = Some((running, killed.then(|| Instant::now() + after)));
    }

    fn attend_publish(&mut self) {
        let Some((mut running, kill)) = self.publish.take() else { return };
        if running.process.is_running() {
            if kill.is_some_and(|at| Instant::now() >= at) {
                running.process.kill9();
                self.report.publishes[1] += 1;
            } else {
                self.publish = Some((running, kill));
            }
            return;
        }
        let output = running.finish(Duration::from_secs(5));
        if output.code == Some(0) {
            self.report.publishes[0] += 1;
        } else {
            self.report.publishes[2] += 1;
            self.report.failures.insert(format!("{:?}: {}", output.code, output.stderr.trim()));
        }
    }

    /// One register's rows: each table as it once was at the source, versions never lower than before.
    fn look(&mut self) {
        let registers: Vec<&String> = self.chain.site.registers.keys().collect();
        let id = registers[self.report.looks as usize % registers.len()].clone();
        self.report.looks += 1;
        let all = self.report.looks.is_multiple_of(20);
        let path = self.chain.site.store_db(&id);
        if !path.exists() {
            return;
        }
        let db = digest::open_read_only(&path);
        // One snapshot, as a sale has it. Before the first install there is nothing to see.
        if db.execute_batch("BEGIN").is_err() || db.prepare("SELECT 1 FROM tillcast_stream").is_err() {
            return;
        }
        let store = id.split('-').next().unwrap();
        for (stream, version, tables) in held(&db) {
            let before = self.seen.insert((id.clone(), stream.clone()), version).unwrap_or(0);
            assert!(version >= before, "{id}: {stream} went back from {before} to {version}");
            for table in tables.iter().filter(|t| all || ["price", "staff"].contains(&t.as_str())) {
                let found = digest::of_table(&db, table);
                let known = &self.history[&(store.to_owned(), table.clone())];
                assert!(known.contains(&found), "{id}: rows of {table} that no source ever had");
            }
        }
    }

    /// Faults end; everything must come to rest at what the source has.
    fn finish(mut self) -> Report {
        let now = self.now();
        for line in &self.lines {
            if line.down {
                *self.report.dark.entry(line.store.into()).or_default() += (now - line.since) * self.options.day;
            }
            self.chain.set_wan(line.store, &Net::default());
        }
        if self.chain.smtp.is_stopped() {
            self.chain.smtp.restart();
        }
        self.procs.iter_mut().for_each(|p| p.next = if p.daemon.is_some() { f64::MAX } else { 0.0 });
        self.kill_and_restart(f64::MAX / 2.0);
        while self.publish.is_some() {
            self.attend_publish();
        }
        self.chain.site.hq.run(&["publish"]).ok();
        self.comes_to_rest();
        let Life { chain, watch, procs, mut report, options, .. } = self;
        let samples = watch.samples();
        for proc in procs {
            proc.daemon.unwrap().term();
        }
        assert_eq!(checker::unclaimed(&chain.site), Vec::<String>::new(), "packs that nobody counts on");
        assert_eq!(checker::left_behind(&chain.site), Vec::<PathBuf>::new(), "left by who was killed");
        report.mails = chain.smtp.mails().len();
        let streams = chain.site.manifest("0421")["streams"].as_object().unwrap().clone();
        report.versions = streams.iter().map(|(s, e)| (s.clone(), e["version"].as_u64().unwrap())).collect();
        report.take(&samples, options.day);
        report
    }

    /// Manifest, relay and registers of every store hold the source's digests; nothing is reported wrong; every mail
    /// is out.
    fn comes_to_rest(&self) {
        let site = &self.chain.site;
        let patience = Duration::from_secs(120);
        for store in Chain::stores() {
            let expected = self.chain.expected(store);
            assert_eq!(site.promised(store), expected, "the manifest of {store}");
            until(patience, &format!("the relay of {store} is even"), || site.relay(store).digests() == expected);
            for (id, register) in site.registers_of(store) {
                until(patience, &format!("{id} is even"), || {
                    site.store_db(id).exists() && digest::of_database(&site.store_db(id)) == expected
                });
                until(patience, &format!("{id} says so"), || register.digests() == expected);
            }
        }
        for node in site.relays.values().chain(site.registers.values()) {
            // It was killed again and again, and says so for an hour.
            let errors = || -> Vec<serde_json::Value> {
                let errors = node.status()["errors"].as_array().cloned().unwrap_or_default();
                errors.into_iter().filter(|e| e["code"] != "CRASH_LOOP").collect()
            };
            until(patience, &format!("{} has no fault: {:#?}", node.id, errors()), || errors().is_empty());
        }
        let ledger = Connection::open(site.hq.dir.join("state/fleet.db")).unwrap();
        ledger.busy_timeout(patience).unwrap();
        let count = |sql: &str| ledger.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
        until(patience, "every episode is over", || {
            count("SELECT count(*) FROM episode WHERE closed_s IS NULL AND key NOT LIKE 'crash-loop/%'") == 0
        });
        // After an outage they wait for up to 15 minutes.
        until(Duration::from_secs(960), "every mail is out", || {
            count("SELECT count(*) FROM mail WHERE sent_s IS NULL") == 0
        });
    }
}

/// The streams that a register holds: name, version, tables.
fn held(db: &Connection) -> Vec<(String, i64, Vec<String>)> {
    let mut streams = db.prepare("SELECT stream, version FROM tillcast_stream").unwrap();
    let rows = streams.query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, i64>(1)?))).unwrap();
    let rows: Vec<(String, i64)> = rows.map(Result::unwrap).collect();
    let tables = |stream: &String| -> Vec<String> {
        let mut names = db.prepare("SELECT name FROM tillcast_table WHERE stream = ?1").unwrap();
        names.query_map([stream], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
    };
    rows.into_iter().map(|(s, v)| (s.clone(), v, tables(&s))).collect()
}

impl Report {
    fn take(&mut self, samples: &Samples, day: f64) {
        self.svg = plot::svg(samples, day);
        self.courses = samples.iter().map(|((f, name), s)| (*f, name.clone(), Course::of(s))).collect();
    }

    /// What grew without bound.
    pub fn growing(&self) -> Vec<String> {
        let grew = self.courses.iter().filter(|(figure, _, course)| course.grows(*figure));
        grew.map(|(f, name, c)| format!("{name}: {}: {:.1} then {:.1}", f.title(), c.middle, c.last)).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, day) = self.days;
        let total = days as f64 * day;
        let [good, killed, failed] = self.publishes;
        writeln!(f, "{days} days of {day} s each, master data: {}", self.data)?;
        writeln!(f, "publishes: {good} well, {killed} killed, {failed} failed; versions {:?}", self.versions)?;
        self.failures.iter().try_for_each(|text| writeln!(f, "  failed with {text}"))?;
        writeln!(f, "kills: {:?}, {} in all", self.kills, self.kills.values().sum::<u64>())?;
        for (store, dark) in &self.dark {
            writeln!(f, "store {store}: {:.0}% of the time without WAN", dark / total * 100.0)?;
        }
        writeln!(f, "looks at a register's rows: {}; mails: {}", self.looks, self.mails)?;
        writeln!(f, "\n| what | of | middle third | last third | most |\n| --- | --- | --- | --- | --- |")?;
        for (figure, name, c) in &self.courses {
            let mark = if c.grows(*figure) { " **grows**" } else { "" };
            writeln!(f, "| {} | {name} | {:.1} | {:.1}{mark} | {:.1} |", figure.title(), c.middle, c.last, c.most)?;
        }
        Ok(())
    }
}

//! From a commit in headquarters' database to the last of 30 registers, over a line of 50 ms.

use crate::Options;
use crate::data::Change;
use crate::measure::{Line, Results, Spread, Target};
use crate::stage::{STORE, Stage};
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tillcast_tests::{Daemon, Net, Nginx, Proxy, digest};

const REGISTERS: usize = 30;

/// 30,000 rows with 1% changed; then `--rows` with 100 rows and with 1%.
pub fn latency(options: &Options, results: &mut Results) {
    series(options, results, options.rows / 10, &[(options.rows / 1000, 1500.0)]);
    series(options, results, options.rows, &[(100, 2500.0), (options.rows / 100, 4000.0)]);
}

fn series(options: &Options, results: &mut Results, rows: u64, cases: &[(u64, f64)]) {
    let mut running = Running::start(rows, REGISTERS, 50);
    for (changed, target) in cases {
        running.publish(*changed);
        let runs: Vec<Marks> = (0..options.publishes).map(|_| running.publish(*changed)).collect();
        let all = |f: fn(&Marks) -> f64| Spread::of(runs.iter().map(f));
        let figure = all(|m| m.last);
        let behind = format!(
            "worst {:.0} ms of {} publishes; the publisher ends after {:.0} ms, the relay has the pack after {:.0}, the first register after {:.0}",
            figure.max,
            runs.len(),
            all(|m| m.published),
            all(|m| m.relayed),
            all(|m| m.first)
        );
        let what = format!("commit to the last of {REGISTERS} registers, {rows} rows, {changed} changed");
        results.line(Line { what, target: Target::WorstAtMost(*target), figure, unit: "ms", behind });
    }
    running.end();
}

/// Milliseconds from the commit to the last of some registers, for a few publishes.
pub fn to_the_last(rows: u64, changed: u64, registers: usize, round_trip_ms: u64, publishes: usize) -> Spread {
    let mut running = Running::start(rows, registers, round_trip_ms);
    running.publish(changed);
    let figure = Spread::of((0..publishes).map(|_| running.publish(changed).last));
    running.end();
    figure
}

/// Milliseconds from the commit.
#[derive(Debug, Clone, Copy)]
struct Marks {
    published: f64,
    relayed: f64,
    first: f64,
    last: f64,
}

struct Running {
    stage: Stage,
    daemons: Vec<Daemon>,
    registers: Vec<Connection>,
    _bucket: Nginx,
    _wan: [Proxy; 2],
}

impl Running {
    /// Everything runs and holds the first version.
    fn start(rows: u64, registers: usize, round_trip_ms: u64) -> Running {
        let mut stage = Stage::new(rows, registers, |b| b.hq_service().relay("http.per_ip", "512"));
        stage.publish(&[]);
        let bucket = Nginx::with(&stage.site.bucket(), "access_log off;");
        let wan = [Proxy::to(&bucket.url()), Proxy::to(&stage.site.hq.url())];
        wan.iter().for_each(|p| p.set(Net::round_trip(round_trip_ms)));
        let relay = stage.site.relays.get_mut(STORE).unwrap();
        relay.set("sources", &format!("[\"{}\"]", wan[0].url()));
        relay.set_text("hq", &wan[1].url());
        relay.run(&["once"]).ok();

        let site = &stage.site;
        let mut daemons = vec![site.hq.start_ready(), site.relay(STORE).start_ready()];
        let ids: Vec<String> = site.registers.keys().cloned().collect();
        // One register installs; the others get its file, to spare the machine 29 installs.
        site.register(&ids[0]).run(&["once"]).ok();
        for id in &ids[1..] {
            for suffix in ["", "-wal", "-shm"] {
                let file = |id: &str| PathBuf::from(format!("{}{suffix}", site.store_db(id).display()));
                std::fs::copy(file(&ids[0]), file(id)).unwrap();
            }
        }
        daemons.extend(ids.iter().map(|id| site.register(id).start_ready()));
        let registers = ids.iter().map(|id| digest::open_read_only(&site.store_db(id))).collect();
        Running { stage, daemons, registers, _bucket: bucket, _wan: wan }
    }

    /// Changes rows, publishes at once, and watches all tiers.
    fn publish(&mut self, rows: u64) -> Marks {
        // What the last publish left to do is done, as it is in a shop.
        std::thread::sleep(Duration::from_millis(700));
        let ok = self.stage.site.relay(STORE).dir.join("data/ok/packs/catalog@all");
        let packs = count(&ok);
        let changes = self.stage.change(rows);
        let committed = Instant::now();
        let since = || committed.elapsed().as_secs_f64() * 1000.0;
        let mut publisher = self.stage.publisher(&[]);
        let publisher = std::thread::spawn(move || (publisher.status().unwrap(), Instant::now()));
        let mut marks = Marks { published: 0.0, relayed: 0.0, first: 0.0, last: 0.0 };
        let mut waiting: Vec<&Connection> = self.registers.iter().collect();
        let last = changes.last().unwrap();
        while !waiting.is_empty() {
            assert!(committed.elapsed() < Duration::from_secs(60), "{} registers wait for {last:?}", waiting.len());
            if marks.relayed == 0.0 && count(&ok) > packs {
                marks.relayed = since();
            }
            waiting.retain(|db| !has(db, last));
            if marks.first == 0.0 && waiting.len() < self.registers.len() {
                marks.first = since();
            }
            marks.last = since();
            std::thread::sleep(Duration::from_millis(4));
        }
        let (status, ended) = publisher.join().unwrap();
        self.stage.assert_published(status);
        marks.published = (ended - committed).as_secs_f64() * 1000.0;
        marks
    }

    fn end(self) {
        self.daemons.into_iter().rev().for_each(Daemon::term);
    }
}

fn has(db: &Connection, change: &Change) -> bool {
    let mut price = db.prepare_cached("SELECT price_cents, updated FROM item WHERE sku = ?1").unwrap();
    price
        .query_row([&change.sku], |r| {
            Ok(r.get::<_, i64>(0)? == change.price && r.get::<_, String>(1)? == change.updated)
        })
        .unwrap()
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).map(Iterator::count).unwrap_or(0)
}

//! A POS application that looks up items all the while a full goes in: its longest wait.

use crate::Options;
use crate::data::{Catalog, Packer, instance, mix, now, sku};
use crate::measure::{Line, Results, Spread, Target};
use proto::limits::Limits;
use proto::replica::{Job, Replica};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A full over a full, with its checkpoint, as an agent does it.
pub fn readers(options: &Options, results: &mut Results) {
    let dir = tillcast_tests::temp_dir("bench");
    let mut catalog = Catalog::new(options.rows);
    let mut packer = Packer::new(dir.path());
    let path = dir.path().join("store.db");
    let mut replica = Replica::open(&path, &Limits::default()).unwrap();
    let mut apply = |catalog: &Catalog| {
        let pack = packer.full(catalog);
        let job =
            Job { instance: &instance(), epoch: 1, packs: &[pack.file()], now: now(), prove: false, listed: None };
        let start = Instant::now();
        replica.apply(&job).unwrap();
        start.elapsed()
    };
    apply(&catalog);
    let (mut longest, mut counts, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.runs {
        catalog.change(options.rows / 100);
        let (stop, ready) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|s| {
            let pos = s.spawn(|| look_up(&path, options.rows, &stop, &ready));
            while !ready.load(Relaxed) {
                std::thread::yield_now();
            }
            seconds.push(apply(&catalog).as_secs_f64());
            stop.store(true, Relaxed);
            let (worst, count) = pos.join().unwrap();
            longest.push(worst.as_secs_f64() * 1000.0);
            counts.push(count);
        });
    }
    let behind = format!(
        "{} look-ups in all, while fulls took {:.1} s each with a reader beside them",
        counts.iter().sum::<u64>(),
        Spread::of(seconds)
    );
    let what = format!("longest read of a POS application while a full of {} rows goes in", options.rows);
    results.line(Line { what, target: Target::WorstAtMost(50.0), figure: Spread::of(longest), unit: "ms", behind });
}

/// Scans by article number, by barcode, and a page of a list, until told to stop; the longest and how many.
fn look_up(path: &Path, rows: u64, stop: &AtomicBool, ready: &AtomicBool) -> (Duration, u64) {
    let db = tillcast_tests::digest::open_read_only(path);
    let (mut worst, mut count) = (Duration::ZERO, 0u64);
    let mut text = |sql: &str, key: &str| {
        let start = Instant::now();
        let mut statement = db.prepare_cached(sql).unwrap();
        let found: Vec<(String, String)> =
            statement.query_map([key], |r| Ok((r.get(0)?, r.get(1)?))).unwrap().map(Result::unwrap).collect();
        assert!(!found.is_empty(), "{sql}: {key}: a reader sees whole versions only");
        let took = start.elapsed();
        worst = worst.max(took);
        count += 1;
        ready.store(true, Relaxed);
        found.into_iter().next().unwrap().1
    };
    let mut i = 0;
    while !stop.load(Relaxed) {
        i += 1;
        let key = sku(mix(i) % rows);
        let ean = text("SELECT sku, ean, name, price_cents FROM item WHERE sku = ?1", &key);
        text("SELECT sku, name, price_cents FROM item WHERE ean = ?1", &ean);
        text("SELECT sku, name, price_cents FROM item WHERE sku >= ?1 ORDER BY sku LIMIT 20", &key);
        // As scanners do: not all of a core.
        std::thread::sleep(Duration::from_micros(200));
    }
    (worst, count)
}

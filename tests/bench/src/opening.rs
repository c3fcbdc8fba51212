//! Opening time: 40 registers of a store pull a full at once, from the relay and from nginx over the same files.

use crate::Options;
use crate::measure::{Line, Results, Spread, Target, cpu_of};
use crate::stage::{STORE, Stage};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tillcast_tests::Nginx;

const REGISTERS: usize = 40;

/// The time to the last of them, and what the relay spends.
pub fn opening(options: &Options, results: &mut Results) {
    let rows = options.rows / 10;
    let mut stage = Stage::new(rows, REGISTERS, |b| b.relay("http.per_ip", "512").agent("fallback", "[]"));
    stage.publish(&[]);
    stage.site.relay(STORE).run(&["once"]).ok();
    let fresh: Vec<(PathBuf, PathBuf)> = stage
        .site
        .registers
        .values()
        .map(|r| (r.dir.join("data"), r.dir.join("data-as-enrolled")))
        .inspect(|(data, kept)| copy(data, kept))
        .collect();
    let ok = stage.site.relay(STORE).dir.join("data/ok");
    let relay_url = stage.site.relay(STORE).url();

    let (mut ours, mut peer, mut cpu, mut memory) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..options.runs.min(3) {
        let relay = stage.site.relay(STORE).start_ready();
        let before = cpu_of(relay.process.pid());
        ours.push(pull(&mut stage, &fresh, &relay_url));
        cpu.push((cpu_of(relay.process.pid()) - before).as_secs_f64());
        memory = memory.max(relay.peak_memory_kib());
        relay.term();
        let nginx = Nginx::with(&ok, "access_log off;");
        peer.push(pull(&mut stage, &fresh, &nginx.url()));
    }
    let seconds = |runs: &[Duration]| Spread::of(runs.iter().map(Duration::as_secs_f64));
    let behind = format!(
        "{:.2} s against {:.2} s to the last; the relay spends {:.2} s of processor and has {:.0} MiB at its peak",
        seconds(&ours),
        seconds(&peer),
        Spread::of(cpu),
        memory as f64 / 1024.0
    );
    results.line(Line {
        what: format!("{REGISTERS} registers pull a full of {rows} rows at once, nginx serving the same agents"),
        target: Target::None,
        figure: Spread::of(ours.iter().zip(&peer).map(|(o, p)| o.as_secs_f64() / p.as_secs_f64())),
        unit: "×",
        behind,
    });
}

/// All registers, as newly enrolled, at once; the time until the last has it.
fn pull(stage: &mut Stage, fresh: &[(PathBuf, PathBuf)], relay: &str) -> Duration {
    for (data, kept) in fresh {
        std::fs::remove_dir_all(data).unwrap();
        copy(kept, data);
    }
    stage.site.registers.values_mut().for_each(|r| r.set_text("relay", relay));
    let start = Instant::now();
    let running: Vec<_> = stage.site.registers.values().map(|r| r.spawn(&["once"], &[])).collect();
    running.into_iter().for_each(|r| drop(r.finish(Duration::from_secs(600)).ok()));
    let took = start.elapsed();
    let rows: u64 = stage.site.read(&format!("{STORE}-40"), "SELECT count(*) FROM item").unwrap().parse().unwrap();
    assert_eq!(rows, stage.catalog.rows(), "the last register has all rows");
    took
}

/// A directory with what is in it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

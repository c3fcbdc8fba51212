//! Peak resident memory of each program on the benches' data, and with ten times the rows; and how soon a relay that was
//! killed serves all of it again.

use crate::Options;
use crate::measure::{Line, Results, Spread, Target};
use crate::stage::{STORE, Stage};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tillcast_tests::{Daemon, http, until};

/// On `--rows`; with `--large` on ten times as many too, where 1.25 of the same is allowed.
pub fn memory(options: &Options, results: &mut Results) {
    measure(options.rows, 1.0, results);
    if options.large {
        measure(options.rows * 10, 1.25, results);
    }
}

/// First install, a delta, a full over it: by everybody.
fn measure(rows: u64, allowance: f64, results: &mut Results) {
    let mut stage = Stage::new(rows, 2, |b| b.hq_service());
    let peaks = Peaks::default();
    let mut back = Vec::new();
    peaks.watch(|| {
        stage.publish(&[]);
        let site = &stage.site;
        let mut daemons: Vec<_> = [site.hq.start_ready(), site.relay(STORE).start_ready()]
            .into_iter()
            .chain(site.registers.values().map(|r| r.start_ready()))
            .collect();
        for full in [false, false, true] {
            let before = stage.site.version(STORE, "catalog");
            stage.change(rows / 100);
            stage.publish(if full { &["--full"] } else { &[] });
            let wanted = before + 1;
            for id in stage.site.registers.keys() {
                until(Duration::from_secs(600), "the register follows", || {
                    let version =
                        stage.site.try_read(id, "SELECT version FROM tillcast_stream WHERE stream = 'catalog'");
                    version.ok().flatten().and_then(|v| v.parse::<u64>().ok()).is_some_and(|v| v >= wanted)
                });
            }
        }
        back.extend((0..3).map(|_| serves_again(&stage, &mut daemons[1])));
        daemons.into_iter().rev().for_each(Daemon::term);
    });
    results.line(Line {
        what: format!("a relay that was killed serves {rows} rows again after"),
        target: Target::WorstAtMost(10.0),
        figure: Spread::of(back),
        unit: "s",
        behind: "from its start until it lists the newest version".into(),
    });
    let peaks = peaks.0.into_inner().unwrap();
    let peak =
        |name: &str| *peaks.get(name).unwrap_or_else(|| panic!("{name} was not seen: {peaks:?}")) as f64 / 1024.0;
    let relay = (peak("store-relay run"), peak("store-relay trial"));
    for (who, limit, mib, behind) in [
        ("relay", 64.0, relay.0, String::new()),
        ("relay with a trial running", 128.0, relay.0 + relay.1, format!("the trial alone {:.0} MiB", relay.1)),
        ("agent", 48.0, peak("pos-agent run"), String::new()),
        ("publisher", 256.0, peak("hq-publisher publish"), format!("`serve` {:.0} MiB", peak("hq-publisher serve"))),
    ] {
        let what = format!("peak memory of the {who}, {rows} rows");
        results.line(Line {
            what,
            target: Target::AtMost(limit * allowance),
            figure: Spread::of([mib]),
            unit: "MiB",
            behind,
        });
    }
}

/// Kills the relay; seconds from its next start until it lists the newest version.
fn serves_again(stage: &Stage, relay: &mut Daemon) -> f64 {
    relay.kill9();
    let start = Instant::now();
    let node = stage.site.relay(STORE);
    *relay = node.start_ready();
    let newest = stage.site.version(STORE, "catalog");
    until(Duration::from_secs(120), "the relay serves again", || {
        let versions = http::try_get(&format!("{}/v1/versions", node.url())).map(|r| r.json());
        versions.is_some_and(|v| v["catalog@all"] == newest)
    });
    start.elapsed().as_secs_f64()
}

/// The highest VmHWM seen, in KiB, by program and command.
#[derive(Debug, Default)]
struct Peaks(Mutex<BTreeMap<String, u64>>);

impl Peaks {
    /// Looks at all processes of the product while `f` runs.
    fn watch(&self, f: impl FnOnce()) {
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Relaxed) {
                    self.look();
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            done.store(true, Relaxed);
            if let Err(panic) = ended {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn look(&self) {
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let dir = process.path();
            let read = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
            let line = read("cmdline");
            let mut words = line.split('\0');
            let program = words.next().and_then(|p| p.rsplit('/').next()).unwrap_or_default();
            if !["hq-publisher", "store-relay", "pos-agent"].contains(&program) {
                continue;
            }
            let command = words.find(|w| ["publish", "serve", "run", "trial"].contains(w)).unwrap_or_default();
            let status = read("status");
            let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
            let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            let mut peaks = self.0.lock().unwrap();
            let most = peaks.entry(format!("{program} {command}")).or_default();
            *most = kib.max(*most);
        }
    }
}

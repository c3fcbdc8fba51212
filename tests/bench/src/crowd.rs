//! What a store asks of its relay: two hundred registers for a day, pressed together; and thirty while slow connections come
//! by the thousand, from one address and from many. How long they wait for answers, and what the relay needs.

use crate::Options;
use crate::fleet::{Streams, beat, enrol, quantile};
use crate::measure::{Line, Results, Spread, Target, cpu_of};
use crate::stage::STORE;
use proto::wire::Beats;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tillcast_tests::flood::{self, Crowd, Flood};
use tillcast_tests::{PATIENCE, Site, until};

const REGISTERS: usize = 30;
/// Rounds of requests of each register.
const ROUNDS: u64 = 20;
/// Registers of the largest store.
const TILLS: usize = 200;
/// Rounds of a day: each polls every 10 s, which are a tenth of one here.
const DAY: u64 = 8640;
/// Memory is looked at so often.
const PARTS: u64 = 8;

/// A crowd from one address, one from 250, and nobody.
pub fn crowd(options: &Options, results: &mut Results) {
    let builder = Site::builder().stores(&[(STORE, "east")]).registers(0).items(2000);
    // As it is by itself.
    let site = builder.relay("http.per_ip", "32").build();
    enrol(&site, (0..REGISTERS).map(register));
    site.publish();
    site.relay(STORE).run(&["once"]).ok();
    let pack = format!("/packs/catalog@all/{:010}.full.pack", 1);
    let gets = ["/v1/versions".to_owned(), format!("/stores/{STORE}/manifest.json"), pack.clone()];
    let load = Load { registers: REGISTERS, rounds: ROUNDS, gets: gets.into(), beat: 5 };
    let seq = AtomicU64::new(1);
    // (attempts, addresses, the longest wait of 99%, ms, and MiB of the relay)
    for (attempts, addresses, longest, most) in
        [(0, 1, None, None), (9_000, 1, Some(15.0), Some(32.0)), (8_000, 250, Some(50.0), None)]
    {
        let relay = site.relay(STORE).start_ready();
        let to: SocketAddr = site.relay(STORE).url().trim_start_matches("http://").parse().unwrap();
        // Everybody was there before, as in a store.
        work(to, &Load { rounds: 1, ..load.clone() }, &seq);
        let crowd = Crowd { connections: attempts, addresses, pause: Duration::from_secs(1), large: pack.clone() };
        let flood = Flood::begin(&crowd, to);
        let held = addresses.min(attempts) as u64 * 10;
        until(PATIENCE, "the flood stands", || flood.held() >= held);
        let (mut waits, mut all) = (Vec::new(), Vec::new());
        let (cpu, start) = (cpu_of(relay.process.pid()), Instant::now());
        for _ in 0..options.runs {
            let took = work(to, &load, &seq);
            waits.push(quantile(&took, 0.99));
            all.extend(took);
        }
        let cores = (cpu_of(relay.process.pid()) - cpu).as_secs_f64() / start.elapsed().as_secs_f64();
        let mib = relay.peak_memory_kib() as f64 / 1024.0;
        let of = match attempts {
            0 => "nobody else there".to_owned(),
            _ => format!(
                "{attempts} slow connections tried at a time from {addresses} address{}",
                if addresses > 1 { "es" } else { "" }
            ),
        };
        results.line(Line {
            what: format!("99% of the requests of {REGISTERS} registers, {of}, are answered in"),
            target: longest.map_or(Target::None, Target::AtMost),
            figure: Spread::of(waits),
            unit: "ms",
            behind: format!(
                "{0} of {0} requests, half in {1:.1} ms, the slowest in {2:.0} ms; the relay spends {cores:.2} of a core",
                all.len(),
                quantile(&all, 0.5),
                quantile(&all, 1.0)
            ),
        });
        results.line(Line {
            what: format!("peak memory of the relay, {of}"),
            target: most.map_or(Target::None, Target::AtMost),
            figure: Spread::of([mib]),
            unit: "MiB",
            behind: String::new(),
        });
        drop(flood);
        relay.term();
    }
}

/// The largest store's registers, for an eighth of a day; with `--large` for a whole one.
pub fn tills(options: &Options, results: &mut Results) {
    let site = Site::builder().stores(&[(STORE, "east")]).registers(0).items(2000).build();
    enrol(&site, (0..TILLS).map(register));
    site.publish();
    let relay = site.relay(STORE).start_ready();
    let to: SocketAddr = site.relay(STORE).url().trim_start_matches("http://").parse().unwrap();
    let rounds = if options.large { DAY / PARTS } else { DAY / PARTS / PARTS };
    // A heartbeat a minute.
    let load = Load { registers: TILLS, rounds, gets: ["/v1/versions".to_owned()].into(), beat: 6 };
    let seq = AtomicU64::new(1);
    work(to, &Load { rounds: 6, ..load.clone() }, &seq);
    let (cpu, start) = (cpu_of(relay.process.pid()), Instant::now());
    let (mut waits, mut memory, mut requests) = (Vec::new(), Vec::new(), 0);
    for _ in 0..PARTS {
        let took = work(to, &load, &seq);
        waits.push(quantile(&took, 0.99));
        requests += took.len();
        memory.push(relay.memory_kib() as f64 / 1024.0);
    }
    let took = start.elapsed();
    let cores = (cpu_of(relay.process.pid()) - cpu).as_secs_f64() / took.as_secs_f64();
    let what = format!("{TILLS} registers, the polls and heartbeats of {} h", 24 * rounds * PARTS / DAY);
    results.line(Line {
        what: format!("{what}: 99% of the requests are answered in"),
        target: Target::AtMost(50.0),
        figure: Spread::of(waits),
        unit: "ms",
        behind: format!(
            "eighths of {requests} requests in {:.0} s, all answered; the relay spends {cores:.2} of a core",
            took.as_secs_f64()
        ),
    });
    results.line(Line {
        what: format!("memory of the relay, {what}"),
        target: Target::WorstAtMost(64.0),
        figure: Spread::of(memory.iter().copied()),
        unit: "MiB",
        behind: format!(
            "after each eighth: {}",
            memory.iter().map(|m| format!("{m:.1}")).collect::<Vec<_>>().join(", ")
        ),
    });
    relay.term();
}

fn register(n: usize) -> String {
    format!("{STORE}-t{n}")
}

/// What each register does in a round: these requests, and in one of so many rounds it posts a heartbeat (a relay keeps
/// two a second of each).
#[derive(Clone)]
struct Load {
    registers: usize,
    rounds: u64,
    gets: Arc<[String]>,
    beat: u64,
}

/// All registers at once; milliseconds to each answer.
fn work(to: SocketAddr, load: &Load, seq: &AtomicU64) -> Vec<f64> {
    let first = seq.fetch_add(load.rounds, Relaxed);
    let (gets, each) = (load.gets.clone(), load.beat);
    let requests = move |n: usize, round: u64| {
        let post = || {
            let beats = vec![beat(&register(n), (first + round, None), &Streams::default(), std::iter::empty())];
            flood::post("/v1/heartbeats", &serde_json::to_vec(&Beats { beats }).unwrap())
        };
        gets.iter().map(|path| flood::get(path)).chain(round.is_multiple_of(each).then(post)).collect()
    };
    let took = flood::devices_work(load.registers, to, (load.rounds, Duration::from_secs(60)), requests);
    took.into_iter().map(|t| t.as_secs_f64() * 1000.0).collect()
}

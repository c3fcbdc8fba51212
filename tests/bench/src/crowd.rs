//! Slow connections by the thousand, from one address and from many, while thirty registers of a store work: how long
//! they wait for answers, and what the relay needs.

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
/// A heartbeat is posted in one of so many: a relay keeps two a second of each.
const BEAT: u64 = 5;

/// A crowd from one address, one from 250, and nobody.
pub fn crowd(options: &Options, results: &mut Results) {
    let builder = Site::builder().stores(&[(STORE, "east")]).registers(0).items(2000);
    // As it is by itself.
    let site = builder.relay("http.per_ip", "32").build();
    enrol(&site, (0..REGISTERS).map(register));
    site.publish();
    site.relay(STORE).run(&["once"]).ok();
    let pack = format!("/packs/catalog@all/{:010}.full.pack", 1);
    let seq = Arc::new(AtomicU64::new(1));
    // (attempts, addresses, the longest wait of 99%, ms, and MiB of the relay)
    for (attempts, addresses, longest, most) in
        [(0, 1, None, None), (9_000, 1, Some(15.0), Some(32.0)), (8_000, 250, Some(50.0), None)]
    {
        let relay = site.relay(STORE).start_ready();
        let to: SocketAddr = site.relay(STORE).url().trim_start_matches("http://").parse().unwrap();
        // Everybody was there before, as in a store.
        work(to, 1, &pack, &seq);
        let crowd = Crowd { connections: attempts, addresses, pause: Duration::from_secs(1), large: pack.clone() };
        let flood = Flood::begin(&crowd, to);
        let held = addresses.min(attempts) as u64 * 10;
        until(PATIENCE, "the flood stands", || flood.held() >= held);
        let (mut waits, mut all) = (Vec::new(), Vec::new());
        let (cpu, start) = (cpu_of(relay.process.pid()), Instant::now());
        for _ in 0..options.runs {
            let took = work(to, ROUNDS, &pack, &seq);
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

fn register(n: usize) -> String {
    format!("{STORE}-t{n}")
}

/// Each register asks for versions, the manifest, a pack, and posts heartbeats; milliseconds to each answer.
fn work(to: SocketAddr, rounds: u64, pack: &str, seq: &Arc<AtomicU64>) -> Vec<f64> {
    let (pack, first) = (pack.to_owned(), seq.fetch_add(rounds, Relaxed));
    let requests = move |n: usize, round: u64| {
        let post = || {
            let beats = vec![beat(&register(n), (first + round, None), &Streams::new(), std::iter::empty())];
            flood::post("/v1/heartbeats", &serde_json::to_vec(&Beats { beats }).unwrap())
        };
        let manifest = format!("/stores/{STORE}/manifest.json");
        let gets = ["/v1/versions", &manifest, &pack].map(flood::get);
        gets.into_iter().chain(round.is_multiple_of(BEAT).then(post)).collect()
    };
    let took = flood::devices_work(REGISTERS, to, (rounds, Duration::from_secs(60)), requests);
    took.into_iter().map(|t| t.as_secs_f64() * 1000.0).collect()
}

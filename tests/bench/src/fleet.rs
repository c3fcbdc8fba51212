//! 10,000 stores of ten registers: their relays post all heartbeats once a minute, at ten times that pace, at it, and at ten
//! times again; then all fall silent at once. What `serve` needs for it, and the mails that come of it.

use crate::Options;
use crate::client::Client;
use crate::measure::{Line, Results, Spread, Target, cpu_of};
use crate::scale::chain;
use crate::stage::STORE;
use proto::clock::{Clock as _, SystemClock};
use proto::dsse::Envelope;
use proto::ids::Instance;
use proto::keys::SecretKey;
use proto::wire::{Beat, Beats, Disk, Heartbeat, Network, StreamReport};
use rusqlite::{Connection, params};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tillcast_tests::{Site, Smtp, until};

const STORES: u32 = 10_000;
const REGISTERS: u32 = 10;
/// Each store's relay posts so often.
const PACE: Duration = Duration::from_secs(60);
/// Connections that the posts come over.
const LINES: usize = 64;
/// `serve` looks at the fleet so often, as it does by itself.
const TICK: Duration = Duration::from_secs(5);

/// What a device holds.
pub type Streams = Arc<BTreeMap<Instance, StreamReport>>;

/// Ten times as many posts as usual, as many as usual, ten times as many again, then none.
pub fn fleet(_: &Options, results: &mut Results) {
    let smtp = Smtp::start();
    let mut site = Site::builder()
        .stores(&[(STORE, "z00")])
        .registers(0)
        .items(1)
        .hq_service()
        .mail(&smtp)
        .hq("serve.alert_tick", "\"5s\"")
        .hq("alerts.store_silent", "\"90s\"")
        .build();
    let zones = chain(&mut site, STORES).1;
    enrol(&site, (0..STORES).flat_map(devices));
    site.hq.run(&["publish"]).ok();
    let streams: Vec<Streams> = (0..zones).map(|zone| held(&site, zone)).collect();
    let serials: Vec<Option<u64>> = (0..STORES).map(|s| site.manifest(&store(s))["serial"].as_u64()).collect();
    let hq = site.hq.start_ready();
    let address: SocketAddr = site.hq.url().trim_start_matches("http://").parse().unwrap();
    let what = format!("heartbeats of {STORES} stores with {REGISTERS} registers each");

    let a_second = f64::from(STORES) / PACE.as_secs_f64();
    // All at once: those of whom a ledger has heard nothing yet, and those that `serve` knows.
    for (seq, how, rate) in [
        (1, "ten times as fast as they come, none heard before", a_second * 10.0),
        (2, "as they come", a_second),
        (3, "ten times as fast as they come", a_second * 10.0),
    ] {
        let posts: Vec<Vec<u8>> =
            (0..STORES).map(|s| post(s, seq, serials[s as usize], &streams[(s % zones) as usize])).collect();
        let (cpu, start) = (cpu_of(hq.process.pid()), Instant::now());
        let took = load(address, &posts, rate);
        let cores = (cpu_of(hq.process.pid()) - cpu).as_secs_f64() / start.elapsed().as_secs_f64();
        let slices: Vec<f64> = took.chunks(took.len().div_ceil(5)).map(|slice| quantile(slice, 0.99)).collect();
        results.line(Line {
            what: format!("{what}, {how}: 99% of posts are answered in"),
            target: Target::AtMost(50.0),
            figure: Spread::of(slices),
            unit: "ms",
            behind: format!(
                "fifths of {} posts, {:.0} a second; half in {:.1} ms, the slowest in {:.0} ms; {cores:.2} of a core, {} MiB at the peak",
                took.len(),
                rate,
                quantile(&took, 0.5),
                quantile(&took, 1.0),
                hq.peak_memory_kib() / 1024
            ),
        });
    }
    silence(&site, &smtp, hq.process.pid(), results);
    hq.term();
}

/// All are silent: what each look costs, and the mails until everyone is told of.
fn silence(site: &Site, smtp: &Smtp, pid: u32, results: &mut Results) {
    let ledger = tillcast_tests::digest::open_read_only(&site.hq.dir.join("state/fleet.db"));
    let open = || -> u32 {
        ledger.query_row("SELECT count(*) FROM episode WHERE closed_s IS NULL", [], |r| r.get(0)).unwrap()
    };
    let looks = (0..4).map(|_| {
        let before = cpu_of(pid);
        std::thread::sleep(TICK);
        (cpu_of(pid) - before).as_secs_f64() * 1000.0
    });
    results.line(Line {
        what: format!("a look at {STORES} stores with {REGISTERS} registers each, processor"),
        target: Target::AtMost(200.0),
        figure: Spread::of(looks),
        unit: "ms",
        behind: format!("every {} s; all that `serve` does meanwhile is in it", TICK.as_secs()),
    });
    until(Duration::from_secs(240), "all stores are told of", || open() >= STORES);
    let unsent =
        || -> u32 { ledger.query_row("SELECT count(*) FROM mail WHERE sent_s IS NULL", [], |r| r.get(0)).unwrap() };
    until(Duration::from_secs(60), "the mails are out", || unsent() == 0);
    let mails = smtp.mails().len();
    results.line(Line {
        what: format!("mails when {STORES} stores fall silent within a minute"),
        target: Target::AtMost(20.0),
        figure: Spread::of([mails as f64]),
        unit: "mails",
        behind: format!("{} episodes", open()),
    });
}

/// The value that this share of them does not exceed.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

fn store(n: u32) -> String {
    format!("{n:04}")
}

/// A store's devices, its relay first.
fn devices(n: u32) -> impl Iterator<Item = String> {
    std::iter::once(store(n)).chain((1..=REGISTERS).map(move |r| format!("{}-{r:02}", store(n))))
}

fn key(device: &str) -> SecretKey {
    let mut seed = [7; 32];
    seed[..device.len()].copy_from_slice(device.as_bytes());
    SecretKey::from_seed(seed)
}

/// As `enroll` would, all at once.
pub fn enrol(site: &Site, devices: impl Iterator<Item = String>) {
    let mut ledger = Connection::open(site.hq.dir.join("state/fleet.db")).unwrap();
    let tx = ledger.transaction().unwrap();
    for device in devices {
        let store = device.split('-').next().unwrap();
        tx.execute(
            "INSERT OR REPLACE INTO device (id, store, public_key, enrolled_s) VALUES (?1, ?2, ?3, 0)",
            params![device, store, key(&device).public().to_string()],
        )
        .unwrap();
    }
    tx.commit().unwrap();
}

/// What a device of a zone holds when it is where it should be.
fn held(site: &Site, zone: u32) -> Streams {
    let manifest = site.manifest(&store(zone));
    let streams = manifest["streams"].as_object().unwrap().iter();
    let report = |(name, e): (&String, &serde_json::Value)| {
        let report = serde_json::json!({
            "version": e["version"], "schema": e["schema"], "digests": e["digests"], "state": "ok"
        });
        let instance = format!("{name}@{}", e["audience"].as_str().unwrap());
        (instance.parse().unwrap(), serde_json::from_value(report).unwrap())
    };
    Arc::new(streams.map(report).collect())
}

/// A heartbeat, signed; a relay says of its registers that they were there.
pub fn beat(
    device: &str,
    (seq, serial): (u64, Option<u64>),
    streams: &Streams,
    registers: impl Iterator<Item = String>,
) -> Beat {
    let heartbeat = Heartbeat {
        format: 1,
        device: device.parse().unwrap(),
        run: None,
        seq,
        sent_at: SystemClock::default().now(),
        program: "pos-agent 0.1.0".into(),
        serial,
        streams: Arc::clone(streams),
        network: Network::Online,
        errors: Vec::new(),
        debts: Vec::new(),
        disk: Some(Disk { free: 40 << 30, total: 64 << 30 }),
        clock_skew_s: Some(0),
        registers: registers.map(|r| (r.parse().unwrap(), 3)).collect(),
    };
    let envelope: Envelope = serde_json::from_slice(&heartbeat.seal(&key(device)).unwrap()).unwrap();
    Beat { envelope, seen_s: 1 }
}

/// The request of a store's relay: its own heartbeat, and one of each register.
fn post(n: u32, seq: u64, serial: Option<u64>, streams: &Streams) -> Vec<u8> {
    let beat = |device: String| match device.contains('-') {
        true => beat(&device, (seq, serial), streams, std::iter::empty()),
        false => beat(&device, (seq, serial), streams, devices(n).skip(1)),
    };
    let body = serde_json::to_vec(&Beats { beats: devices(n).map(beat).collect() }).unwrap();
    let head = format!(
        "POST /v1/heartbeats HTTP/1.1\r\nHost: hq\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body].concat()
}

/// Sends each post when it is due, on the first line that is free; milliseconds from then to the whole answer.
fn load(address: SocketAddr, posts: &[Vec<u8>], a_second: f64) -> Vec<f64> {
    let (next, took) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..LINES {
            scope.spawn(|| {
                let mut client = Client::connect(address);
                let mut own = Vec::new();
                loop {
                    let n = next.fetch_add(1, Relaxed);
                    let Some(post) = posts.get(n) else { break };
                    let due = start + Duration::from_secs_f64(n as f64 / a_second);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    client.ask(post);
                    own.push((n, due.elapsed().as_secs_f64() * 1000.0));
                }
                took.lock().unwrap().extend(own);
            });
        }
    });
    let mut took: Vec<(usize, f64)> = took.into_inner().unwrap();
    took.sort_by_key(|(n, _)| *n);
    took.into_iter().map(|(_, ms)| ms).collect()
}

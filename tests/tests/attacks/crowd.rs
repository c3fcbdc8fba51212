//! A thousand hostile connections, while thirty registers work.

use super::*;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tillcast_tests::flood::{self, Crowd, Flood, get};
use tillcast_tests::{Daemon, PATIENCE, http, until};

const HOSTILE: usize = 1000;
const REGISTERS: usize = 30;
/// The longest that a register may wait for an answer: generous, for a machine that does other work too.
const LONGEST: Duration = Duration::from_secs(90);

/// All registers ask their requests in turn for some rounds; how many answers, and the slowest.
fn registers_work(
    to: SocketAddr,
    rounds: u64,
    requests: impl Fn(usize, u64) -> Vec<Vec<u8>> + Send + Sync + 'static,
) -> (usize, Duration) {
    let took = flood::devices_work(REGISTERS, to, (rounds, LONGEST), requests);
    (took.len(), took.into_iter().max().unwrap())
}

fn begin(to: SocketAddr, large: &str) -> Flood {
    let crowd = Crowd { connections: HOSTILE, addresses: 40, pause: Duration::ZERO, large: large.to_owned() };
    let flood = Flood::begin(&crowd, to);
    until(PATIENCE, "the flood stands", || flood.held() > 300);
    flood
}

fn address(node: &tillcast_tests::site::Node) -> SocketAddr {
    node.url().replace("http://", "").parse().unwrap()
}

#[track_caller]
fn bounded(daemon: &Daemon) -> u64 {
    let peak = daemon.peak_memory_kib();
    assert!(peak < 160 << 10, "{peak} KiB");
    no_panic(&daemon.process.log_text());
    peak >> 10
}

#[test]
fn thirty_registers_are_served_through_a_thousand_slow_connections() {
    let site = small().registers(2).items(2000).hq_service().relay("http.per_ip", "32");
    let site = site.build();
    let keys: Vec<SigningKey> = (0..REGISTERS).map(|n| taken_key(&site, &format!("0421-t{n}"))).collect();
    site.publish();
    let (hq, relay) = (site.hq.start_ready(), site.relay("0421").start_ready());
    let agents: Vec<Daemon> = site.registers.values().map(|r| r.start_ready()).collect();
    let follows = |node: &tillcast_tests::site::Node| node.digests() == site.expected("0421");
    until(PATIENCE, "all are up", || follows(site.relay("0421")) && site.registers.values().all(follows));
    let serial = site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay knows all registers", || site.relay("0421").status()["serial"] == serial);

    let full = format!("/packs/catalog@all/{:010}.full.pack", 1);
    let (to_relay, to_hq) = (address(site.relay("0421")), address(&site.hq));
    let errors = json!([]);
    let signed = move |n: usize, seq: u64| {
        let beat = beat(&format!("0421-t{n}"), seq, &keys[n], errors.clone());
        flood::post("/v1/heartbeats", &post(std::slice::from_ref(&beat)))
    };
    let signed = Arc::new(signed);
    // Everybody was there before the flood, as in a store.
    for (to, seq) in [(to_relay, 1), (to_hq, 2)] {
        let signed = signed.clone();
        registers_work(to, 1, move |n, _| vec![signed(n, seq)]);
    }

    let flood = begin(to_relay, &full);
    let (beats, pack) = (signed.clone(), full.clone());
    let (answered, slowest) = registers_work(to_relay, 15, move |n, round| {
        vec![get("/v1/versions"), get("/stores/0421/manifest.json"), get(&pack), beats(n, 10 + round)]
    });
    assert_eq!(answered, REGISTERS * 15 * 4);
    news(&site);
    until(PATIENCE, "news reach real registers through the flood", || {
        site.registers.keys().all(|id| rows(&site, id) == site.expected("0421"))
    });
    // Restarted in the flood, the relay still knows its registers from strangers.
    let lines = relay.process.log_text().matches("too many connections").count();
    assert!((1..=20).contains(&lines), "told, and not for each: {lines}");
    let first = bounded(&relay);
    drop(relay);
    let relay = site.relay("0421").start_ready();
    let beats = signed.clone();
    let (again, slow) = registers_work(to_relay, 4, move |n, round| vec![get("/v1/versions"), beats(n, 50 + round)]);
    let refused = figure(to_relay, "tillcast_relay_connections_refused");
    assert!(refused > 100, "{refused} connections were refused");
    println!(
        "relay: {answered} answers, slowest {slowest:?}, {first} MiB; restarted: {again}, {slow:?}, {refused} refused, {} MiB",
        bounded(&relay)
    );
    drop(flood);

    let flood = begin(to_hq, "/");
    let (answered, slowest) = registers_work(to_hq, 15, move |n, round| {
        vec![get("/v1/wake?store=0421&wait=0"), get("/healthz"), signed(n, 100 + round)]
    });
    assert_eq!(answered, REGISTERS * 15 * 3);
    news(&site);
    until(PATIENCE, "news arrive", || site.registers.keys().all(|id| rows(&site, id) == site.expected("0421")));
    println!("serve: {answered} answers, slowest {slowest:?}, {} MiB", bounded(&hq));
    drop(flood);
    until(PATIENCE, "after the flood a stranger is served", || {
        http::try_get(&site.hq.url()).is_some_and(|r| r.status == 200)
    });
    site.assert_proven("0421");
    agents.into_iter().chain([relay, hq]).for_each(Daemon::term);
}

/// A figure of the relay's, asked by a register: strangers may have to wait.
fn figure(to: SocketAddr, name: &str) -> u64 {
    let text = flood::text(0, to, "/metrics");
    let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.trim().parse().unwrap()
}

/// Files run out before places do: what is open goes on, health answers as soon as somebody lets go, and nothing is lost.
#[test]
fn a_program_that_may_open_no_more_files_works_on() {
    let site = small().hq_service().relay("heartbeat", "'1s'").build();
    site.publish();
    let (hq, relay) = (site.hq.start_ready(), site.relay("0421").start_ready());
    until(PATIENCE, "headquarters hears the relay", || site.hq.status()["devices"][0]["heard_s"].is_u64());
    let open = |d: &Daemon| std::fs::read_dir(format!("/proc/{}/fd", d.process.pid())).unwrap().count() as u64;
    until(PATIENCE, "all it works with is open", || site.relay("0421").digests() == site.expected("0421"));
    for daemon in [&hq, &relay] {
        // Enough for its own work, a trial's pipes among it.
        let few = Some((0..10).map(|_| open(daemon)).max().unwrap() + 24);
        let pid = rustix::process::Pid::from_raw(daemon.process.pid() as i32);
        let limit = rustix::process::Rlimit { current: few, maximum: few };
        rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
    }
    let to = |url: String| url.trim_start_matches("http://").parse::<SocketAddr>().unwrap();
    for (daemon, url) in [(&hq, site.hq.url()), (&relay, site.relay("0421").url())] {
        let crowd: Vec<_> = (0..64).filter_map(|_| std::net::TcpStream::connect(to(url.clone())).ok()).collect();
        until(PATIENCE, "it has run out of files", || daemon.process.log_text().contains("cannot accept connections"));
        drop(crowd);
        until(PATIENCE, "health answers", || http::try_get(&format!("{url}/healthz")).is_some_and(|r| r.status == 200));
    }
    news(&site);
    until(PATIENCE, "good news arrive", || site.relay("0421").digests() == site.expected("0421"));
    for daemon in [hq, relay] {
        no_panic(&daemon.process.log_text());
        daemon.term();
    }
}

//! A thousand hostile connections, while thirty registers work.

use super::*;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tillcast_tests::{Daemon, PATIENCE, http, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;

const HOSTILE: usize = 1000;
const REGISTERS: usize = 30;
/// The longest that a register may wait for an answer: generous, for a machine that does other work too.
const LONGEST: Duration = Duration::from_secs(90);

/// Connects from one of loopback's addresses.
async fn connect(from: [u8; 4], to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(from)), 0))?;
    socket.connect(to).await
}

/// Keeps one connection busy for as long as it is let, and comes back.
async fn hostile(n: usize, to: SocketAddr, large: String, stop: Arc<AtomicBool>, held: Arc<AtomicU64>) {
    let from = [127, 66, 0, (n % 40) as u8 + 1];
    while !stop.load(Relaxed) {
        let Ok(mut s) = connect(from, to).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        held.fetch_add(1, Relaxed);
        let first: String = match n % 5 {
            0 => String::new(),
            1 => "GET / HTTP/1.1\r\nhost: x\r\nx-drip: ".into(),
            2 => "POST /v1/heartbeats HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n{".into(),
            3 => format!("GET {large} HTTP/1.1\r\nhost: x\r\n\r\n").repeat(20),
            _ => "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n".into(),
        };
        let _ = s.write_all(first.as_bytes()).await;
        // What it gets it does not read, but for the idle one's.
        let mut buffer = [0; 256];
        for _ in 0..600 {
            if stop.load(Relaxed) {
                break;
            }
            let gone = match n % 5 {
                0 | 4 => {
                    let read = tokio::time::timeout(Duration::from_millis(100), s.read(&mut buffer)).await;
                    matches!(read, Ok(Ok(0) | Err(_)))
                }
                3 => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    // A connection that was cut says so when written to.
                    s.write_all(b"G").await.is_err()
                }
                _ => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    s.write_all(b"a").await.is_err()
                }
            };
            if gone {
                break;
            }
        }
        held.fetch_sub(1, Relaxed);
    }
}

/// One request of a register, from its own address; how long it took.
async fn ask(n: usize, to: SocketAddr, request: &[u8]) -> Result<Duration, String> {
    let begun = Instant::now();
    let talk = async {
        let mut s = connect([127, 77, 0, n as u8 + 1], to).await?;
        s.write_all(request).await?;
        let mut all = Vec::new();
        s.read_to_end(&mut all).await?;
        Ok::<_, std::io::Error>(all)
    };
    match tokio::time::timeout(LONGEST, talk).await {
        // 304 ends a wait.
        Ok(Ok(all)) if [&b"HTTP/1.1 200"[..], b"HTTP/1.1 304"].iter().any(|s| all.starts_with(s)) => {
            Ok(begun.elapsed())
        }
        Ok(Ok(all)) => Err(format!("answered {:.200}", String::from_utf8_lossy(&all))),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("not within {LONGEST:?}")),
    }
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").into_bytes()
}

fn post_beat(beat: &Value) -> Vec<u8> {
    let body = post(std::slice::from_ref(beat));
    let head = format!(
        "POST /v1/heartbeats HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body].concat()
}

/// All registers ask their requests in turn for some rounds; the slowest answer.
fn registers_work(
    runtime: &Runtime,
    to: SocketAddr,
    rounds: u64,
    request: impl Fn(usize, u64) -> Vec<Vec<u8>> + Send + Sync + 'static,
) -> (usize, Duration) {
    let request = Arc::new(request);
    let tasks: Vec<_> = (0..REGISTERS)
        .map(|n| {
            let request = request.clone();
            runtime.spawn(async move {
                let (mut answered, mut slowest) = (0, Duration::ZERO);
                for round in 0..rounds {
                    for (i, bytes) in request(n, round).into_iter().enumerate() {
                        let took = ask(n, to, &bytes)
                            .await
                            .unwrap_or_else(|e| panic!("register {n}, round {round}, request {i}: {e}"));
                        slowest = slowest.max(took);
                        answered += 1;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                (answered, slowest)
            })
        })
        .collect();
    let all: Vec<(usize, Duration)> = tasks.into_iter().map(|t| runtime.block_on(t).unwrap()).collect();
    (all.iter().map(|a| a.0).sum(), all.iter().map(|a| a.1).max().unwrap())
}

/// Many systems give a program 1,024 files, and more if it asks.
fn room_for_sockets() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|n| n < 4096) {
        let current = now.maximum.map_or(4096, |most| most.min(4096));
        setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: now.maximum }).unwrap();
    }
}

struct Flood {
    stop: Arc<AtomicBool>,
    held: Arc<AtomicU64>,
}

impl Flood {
    fn begin(runtime: &Runtime, to: SocketAddr, large: &str) -> Flood {
        let flood = Flood { stop: Arc::default(), held: Arc::default() };
        for n in 0..HOSTILE {
            runtime.spawn(hostile(n, to, large.to_owned(), flood.stop.clone(), flood.held.clone()));
        }
        until(PATIENCE, "the flood stands", || flood.held.load(Relaxed) > 300);
        flood
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
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
    room_for_sockets();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (hq, relay) = (site.hq.start_ready(), site.relay("0421").start_ready());
    let agents: Vec<Daemon> = site.registers.values().map(|r| r.start_ready()).collect();
    let follows = |node: &tillcast_tests::site::Node| node.digests() == site.expected("0421");
    until(PATIENCE, "all are up", || follows(site.relay("0421")) && site.registers.values().all(follows));
    let serial = site.manifest("0421")["serial"].clone();
    until(PATIENCE, "the relay knows all registers", || site.relay("0421").status()["serial"] == serial);

    let full = format!("/packs/catalog@all/{:010}.full.pack", 1);
    let (to_relay, to_hq) = (address(site.relay("0421")), address(&site.hq));
    let errors = json!([]);
    let signed = move |n: usize, seq: u64| post_beat(&beat(&format!("0421-t{n}"), seq, &keys[n], errors.clone()));
    let signed = Arc::new(signed);
    // Everybody was there before the flood, as in a store.
    for (to, seq) in [(to_relay, 1), (to_hq, 2)] {
        let signed = signed.clone();
        registers_work(&runtime, to, 1, move |n, _| vec![signed(n, seq)]);
    }

    let flood = Flood::begin(&runtime, to_relay, &full);
    let (beats, pack) = (signed.clone(), full.clone());
    let (answered, slowest) = registers_work(&runtime, to_relay, 15, move |n, round| {
        vec![get("/v1/versions"), get("/stores/0421/manifest.json"), get(&pack), beats(n, 10 + round)]
    });
    assert_eq!(answered, REGISTERS * 15 * 4);
    news(&site);
    until(PATIENCE, "news reach real registers through the flood", || {
        site.registers.keys().all(|id| rows(&site, id) == site.expected("0421"))
    });
    // Restarted in the flood, the relay still knows its registers from strangers.
    let lines = relay.process.log_text().matches("too many connections").count();
    assert!((1..=6).contains(&lines), "told, and not for each: {lines}");
    let first = bounded(&relay);
    drop(relay);
    let relay = site.relay("0421").start_ready();
    let beats = signed.clone();
    let (again, slow) =
        registers_work(&runtime, to_relay, 4, move |n, round| vec![get("/v1/versions"), beats(n, 50 + round)]);
    let refused = figure(&runtime, to_relay, "tillcast_relay_connections_refused");
    assert!(refused > 100, "{refused} connections were refused");
    println!(
        "relay: {answered} answers, slowest {slowest:?}, {first} MiB; restarted: {again}, {slow:?}, {refused} refused, {} MiB",
        bounded(&relay)
    );
    drop(flood);

    let flood = Flood::begin(&runtime, to_hq, "/");
    let (answered, slowest) = registers_work(&runtime, to_hq, 15, move |n, round| {
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
fn figure(runtime: &Runtime, to: SocketAddr, name: &str) -> u64 {
    let text = runtime.block_on(async {
        let mut s = connect([127, 77, 0, 1], to).await.unwrap();
        s.write_all(&get("/metrics")).await.unwrap();
        let mut all = String::new();
        s.read_to_string(&mut all).await.unwrap();
        all
    });
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
    for daemon in [&hq, &relay] {
        // Enough for its own work, a trial's pipes among it.
        let few = Some(open(daemon) + 24);
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

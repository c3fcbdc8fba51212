//! Hostile connections that are held as long as they are let, and the requests that honest devices make meanwhile.

use crate::RUNTIME;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// Who floods.
#[derive(Debug, Clone)]
pub struct Crowd {
    /// Connections tried at the same time.
    pub connections: usize,
    /// Addresses of loopback that they come from.
    pub addresses: usize,
    /// What one does between being cut off and coming back.
    pub pause: Duration,
    /// The path of something large.
    pub large: String,
}

/// A flood; it ends when this is dropped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    held: Arc<AtomicU64>,
}

impl Flood {
    /// Lets the crowd go at a server.
    pub fn begin(crowd: &Crowd, to: SocketAddr) -> Flood {
        room_for_sockets(crowd.connections as u64 + 1024);
        let flood = Flood { stop: Arc::default(), held: Arc::default() };
        for n in 0..crowd.connections {
            RUNTIME.spawn(hostile(n, to, crowd.clone(), flood.stop.clone(), flood.held.clone()));
        }
        flood
    }

    /// Connections that are open now.
    pub fn held(&self) -> u64 {
        self.held.load(Relaxed)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// Connects from one of loopback's addresses.
async fn connect(from: [u8; 4], to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(from)), 0))?;
    socket.connect(to).await
}

/// Keeps one connection busy for as long as it is let, and comes back.
async fn hostile(n: usize, to: SocketAddr, crowd: Crowd, stop: Arc<AtomicBool>, held: Arc<AtomicU64>) {
    let address = n % crowd.addresses;
    let from = [127, 66, (address / 200) as u8, (address % 200) as u8 + 1];
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
            3 => format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", crowd.large).repeat(20),
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
        drop(s);
        tokio::time::sleep(crowd.pause).await;
    }
}

/// Many systems give a program 1,024 files, and more if it asks.
fn room_for_sockets(wanted: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|n| n < wanted) {
        let current = now.maximum.map_or(wanted, |most| most.min(wanted));
        setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: now.maximum }).unwrap();
    }
}

/// One request of a device from its own address, on a connection of its own; how long it took.
async fn ask(n: usize, to: SocketAddr, request: &[u8], longest: Duration) -> Result<Duration, String> {
    let begun = Instant::now();
    let talk = async {
        let mut s = connect([127, 77, 0, n as u8 + 1], to).await?;
        s.write_all(request).await?;
        let mut all = Vec::new();
        s.read_to_end(&mut all).await?;
        Ok::<_, io::Error>(all)
    };
    match tokio::time::timeout(longest, talk).await {
        // 304 ends a wait.
        Ok(Ok(all)) if [&b"HTTP/1.1 200"[..], b"HTTP/1.1 304"].iter().any(|s| all.starts_with(s)) => {
            Ok(begun.elapsed())
        }
        Ok(Ok(all)) => Err(format!("answered {:.200}", String::from_utf8_lossy(&all))),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("not within {longest:?}")),
    }
}

/// A request that ends its connection.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").into_bytes()
}

/// As [`get`], with a body of JSON.
pub fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// So many devices, each from its own address, send their requests in turn for some rounds; how long each answer took.
/// Panics when one is refused, or not there within `longest`.
#[track_caller]
pub fn devices_work(
    devices: usize,
    to: SocketAddr,
    (rounds, longest): (u64, Duration),
    requests: impl Fn(usize, u64) -> Vec<Vec<u8>> + Send + Sync + 'static,
) -> Vec<Duration> {
    let requests = Arc::new(requests);
    let work = |n: usize| {
        let requests = requests.clone();
        RUNTIME.spawn(async move {
            let mut took = Vec::new();
            for round in 0..rounds {
                for (i, bytes) in requests(n, round).into_iter().enumerate() {
                    let answer = ask(n, to, &bytes, longest).await;
                    took.push(answer.unwrap_or_else(|e| panic!("device {n}, round {round}, request {i}: {e}")));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            took
        })
    };
    let tasks: Vec<_> = (0..devices).map(work).collect();
    tasks.into_iter().flat_map(|t| RUNTIME.block_on(t).unwrap()).collect()
}

/// What a device is answered.
pub fn text(n: usize, to: SocketAddr, path: &str) -> String {
    RUNTIME.block_on(async {
        let mut s = connect([127, 77, 0, n as u8 + 1], to).await.unwrap();
        s.write_all(&get(path)).await.unwrap();
        let mut all = String::new();
        s.read_to_string(&mut all).await.unwrap();
        all
    })
}

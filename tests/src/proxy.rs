//! A TCP proxy whose network a test breaks and mends while it runs.

use crate::RUNTIME;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// What the network does. The default carries everything at once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Net {
    /// Added to each round trip, half a direction; bytes under way overlap, as on a real line.
    pub round_trip: Duration,
    /// Bytes a second towards the client, shared by nobody (a connection each).
    pub rate: Option<u64>,
    /// A connection is reset after this many bytes towards the client.
    pub cut_after: Option<u64>,
    /// The byte at this offset of each connection, towards the client, comes with a bit flipped.
    pub corrupt_at: Option<u64>,
    /// New connections are reset, and those that are open.
    pub refuse: bool,
    /// Connections are taken and stay open, but no byte passes, either way.
    pub blackhole: bool,
}

impl Net {
    /// A network with this round trip time.
    pub fn round_trip(ms: u64) -> Net {
        Net { round_trip: Duration::from_millis(ms), ..Net::default() }
    }
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    down: AtomicU64,
    up: AtomicU64,
}

/// A proxy in front of one address; gone on drop, with its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    net: watch::Sender<Net>,
    /// Counted up to reset what is open.
    resets: watch::Sender<u64>,
    counters: Arc<Counters>,
    task: AbortHandle,
}

impl Proxy {
    /// Starts a proxy to `HOST:PORT` (a URL's scheme and path are left out).
    pub fn to(target: &str) -> Proxy {
        let bare = target.split_once("://").map_or(target, |(_, rest)| rest);
        let target = bare.split('/').next().unwrap().to_socket_addrs().unwrap().next().unwrap();
        let listener = RUNTIME.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (net, seen) = watch::channel(Net::default());
        let (resets, reset) = watch::channel(0);
        let counters = Arc::new(Counters::default());
        let task = RUNTIME.spawn(accept(listener, target, seen, reset, counters.clone())).abort_handle();
        Proxy { address, net, resets, counters, task }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Changes the network, for open connections too.
    pub fn set(&self, net: Net) {
        self.net.send_replace(net);
    }

    /// Mends everything.
    pub fn mend(&self) {
        self.set(Net::default());
    }

    /// Resets the connections that are open now.
    pub fn reset_connections(&self) {
        self.resets.send_modify(|n| *n += 1);
    }

    /// Connections taken so far.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Relaxed)
    }

    /// Bytes carried to clients so far.
    pub fn bytes_down(&self) -> u64 {
        self.counters.down.load(Relaxed)
    }

    /// Bytes carried from clients so far.
    pub fn bytes_up(&self) -> u64 {
        self.counters.up.load(Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        // The senders go with self: each connection sees that, and ends.
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    net: watch::Receiver<Net>,
    reset: watch::Receiver<u64>,
    counters: Arc<Counters>,
) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        counters.connections.fetch_add(1, Relaxed);
        if net.borrow().refuse {
            let _ = client.set_zero_linger();
            continue;
        }
        tokio::spawn(carry(client, target, net.clone(), reset.clone(), counters.clone()));
    }
}

/// Carries one connection until either side ends it, or the test does.
async fn carry(
    mut client: TcpStream,
    target: SocketAddr,
    mut net: watch::Receiver<Net>,
    mut reset: watch::Receiver<u64>,
    counters: Arc<Counters>,
) {
    let _ = client.set_nodelay(true);
    // The handshake costs a round trip as well, half of it before the other side hears of it.
    let latency = net.borrow().round_trip;
    tokio::time::sleep(latency).await;
    let Ok(mut server) = TcpStream::connect(target).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = server.set_nodelay(true);
    reset.mark_unchanged();
    let ended: io::Result<()> = {
        let (client_in, client_out) = client.split();
        let (server_in, server_out) = server.split();
        let up = pump(client_in, server_out, net.clone(), &counters.up, Way::Up);
        let down = pump(server_in, client_out, net.clone(), &counters.down, Way::Down);
        tokio::select! {
            r = async { tokio::try_join!(up, down) } => r.map(drop),
            _ = reset.changed() => Err(io::ErrorKind::ConnectionReset.into()),
            _ = net.wait_for(|n| n.refuse) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    };
    if ended.is_err() {
        // What breaks, breaks with a reset, not with a clean end that looks like a short body.
        let _ = client.set_zero_linger();
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Up,
    Down,
}

/// One direction: a reader that stamps what it read with the time it is due, a writer that waits for that.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut net: watch::Receiver<Net>,
    counter: &AtomicU64,
    way: Way,
) -> io::Result<()> {
    let (queue, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    let reader_net = net.clone();
    let read = async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let n = from.read(&mut buffer).await?;
            let at = Instant::now() + reader_net.borrow().round_trip / 2;
            // An empty chunk is the end of the stream: it is delayed like the rest.
            if queue.send((at, buffer[..n].to_vec())).await.is_err() || n == 0 {
                return Ok(());
            }
        }
    };
    let write = async move {
        let mut passed = 0u64;
        while let Some((at, mut chunk)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            if net.wait_for(|n| !n.blackhole).await.is_err() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if chunk.is_empty() {
                return to.shutdown().await;
            }
            let now = net.borrow().clone();
            let mut cut = false;
            if way == Way::Down {
                cut = damage(&now, passed, &mut chunk);
            }
            // Before whoever gets it may look.
            counter.fetch_add(chunk.len() as u64, Relaxed);
            to.write_all(&chunk).await?;
            passed += chunk.len() as u64;
            if cut {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if let (Way::Down, Some(rate)) = (way, now.rate) {
                tokio::time::sleep(Duration::from_secs_f64(chunk.len() as f64 / rate as f64)).await;
            }
        }
        Ok(())
    };
    tokio::try_join!(read, write).map(drop)
}

/// Flips and cuts what `net` says, in a chunk that begins `passed` bytes into its connection; true: cut here.
fn damage(net: &Net, passed: u64, chunk: &mut Vec<u8>) -> bool {
    let inside = |at: u64, chunk: &[u8]| at.checked_sub(passed).filter(|i| *i < chunk.len() as u64).map(|i| i as usize);
    if let Some(i) = net.corrupt_at.and_then(|at| inside(at, chunk)) {
        chunk[i] ^= 1;
    }
    match net.cut_after {
        Some(at) if passed + chunk.len() as u64 >= at => {
            chunk.truncate(at.saturating_sub(passed) as usize);
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Nginx, PATIENCE, http, temp_dir, until};
    use std::time::Instant;

    #[test]
    fn each_fault_is_seen_by_the_client_and_mended() {
        let root = temp_dir("root");
        let body: Vec<u8> = (0..2_000_000u32).map(|i| i as u8).collect();
        std::fs::write(root.path().join("f"), &body).unwrap();
        let nginx = Nginx::serve(root.path());
        let proxy = Proxy::to(&nginx.url());
        let url = format!("{}/f", proxy.url());
        let try_get = || http::try_get_within(&url, PATIENCE);

        assert_eq!(try_get().unwrap().body, body);
        assert!(proxy.bytes_down() > 2_000_000 && proxy.bytes_up() > 10);

        proxy.reset_connections();
        proxy.set(Net { corrupt_at: Some(100_000), ..Net::default() });
        let spoilt = try_get().unwrap().body;
        assert_eq!(spoilt.iter().zip(&body).filter(|(a, b)| a != b).count(), 1);

        proxy.reset_connections();
        proxy.set(Net { cut_after: Some(50_000), ..Net::default() });
        assert!(try_get().is_err());

        proxy.set(Net { refuse: true, ..Net::default() });
        assert!(try_get().is_err());

        proxy.set(Net { blackhole: true, ..Net::default() });
        let start = Instant::now();
        let limit = Duration::from_secs(2);
        assert!(http::try_get_within(&url, limit).is_err() && start.elapsed() >= limit);

        proxy.set(Net::round_trip(1000));
        let start = Instant::now();
        assert_eq!(try_get().unwrap().body, body);
        assert!(start.elapsed() >= Duration::from_millis(1950), "connect and request cost a round trip each");
        // One after the other, 122 or more of them would take a minute.
        assert!(start.elapsed() < Duration::from_secs(30), "chunks overlap: {:?}", start.elapsed());

        proxy.mend();
        until(PATIENCE, "it carries again", || try_get().is_ok_and(|r| r.body == body));
    }
}

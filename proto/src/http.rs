//! The HTTP server's loop, hardened against slow and greedy clients, and what its handlers share.
//!
//! Owns connections: how many, from where, for how long. A silent or trickling client is cut within
//! seconds, one that does not read too; panics end in 500; an order to stop lets requests in work
//! finish for a while. HTTP/1.1 only: sniffing for HTTP/2 comes before any timeout. Never routes:
//! handlers do. Nothing here outlives the power.

mod body;
mod gate;
mod guard;
mod object;

use crate::config::HumanDuration;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gate::Slot;
use guard::Guarded;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue, TRANSFER_ENCODING};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioTimer;
use hyper_util::service::TowerToHyperService;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use body::{Body, BodyError, FileBody, Inbound, read_body};
pub use gate::Gate;
pub use object::{RangeAsked, Served, answer_object, empty, json, none_match, range_asked, text};

/// Bounds on clients. A `[http]` table in each tier's file sets them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpLimits {
    /// Connections at once. 512.
    pub connections: usize,
    /// Connections at once from one address (IPv6: one /64). 32; behind a reverse proxy, as many as
    /// `connections`.
    pub per_ip: usize,
    /// Of the connections, how many only known addresses get, where the tier knows any. 170.
    pub reserved: usize,
    /// Connections that the kernel holds until we take them; beyond these it drops attempts, which come again after a
    /// second. 4096, and never more than `net.core.somaxconn`.
    pub backlog: u32,
    /// From connecting, or the last answer, to the end of a request's head. 5 s; more than the 3 s for which clients
    /// of ours keep a connection without work.
    pub head_timeout: HumanDuration,
    /// Bytes of a request's head. 16 KiB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub head_bytes: usize,
    /// Headers of a request. 64.
    pub headers: usize,
    /// From a request's head to the end of its body. 10 s.
    pub body_timeout: HumanDuration,
    /// From a request's head to its answer's head. 90 s: longer than any long poll.
    pub answer_timeout: HumanDuration,
    /// A connection as old as this is closed with its next answer: its place goes round. 60 s.
    pub life: HumanDuration,
    /// A client may keep us waiting to send for so long; then it must have taken `stall_bytes`. 10 s.
    pub stall: HumanDuration,
    /// 10 KiB: with 10 s of `stall`, 1 KiB/s. What is taken is seen in steps of up to 80 KiB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub stall_bytes: u64,
    /// After the order to stop, requests in work may finish for so long. 5 s.
    pub drain: HumanDuration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        let s = |n| HumanDuration(Duration::from_secs(n));
        HttpLimits {
            connections: 512,
            per_ip: 32,
            reserved: 170,
            backlog: 4096,
            head_timeout: s(5),
            head_bytes: 16 << 10,
            headers: 64,
            body_timeout: s(10),
            answer_timeout: s(90),
            life: s(60),
            stall: s(10),
            stall_bytes: 10 << 10,
            drain: s(5),
        }
    }
}

impl HttpLimits {
    /// Refuses what would serve nobody; `table` is the name of their table.
    pub fn check(&self, table: &str) -> Result<(), String> {
        let counts = [("connections", self.connections, 1), ("per_ip", self.per_ip, 1), ("headers", self.headers, 8)];
        let counts = counts.into_iter().chain([("head_bytes", self.head_bytes, 1024)]);
        for (name, value, least) in counts {
            if value < least {
                return Err(format!("{table}.{name} = {value}: at least {least}"));
            }
        }
        if self.backlog == 0 {
            return Err(format!("{table}.backlog = 0: at least 1"));
        }
        let least = HumanDuration(Duration::from_millis(100));
        for (name, value) in [
            ("head_timeout", self.head_timeout),
            ("body_timeout", self.body_timeout),
            ("answer_timeout", self.answer_timeout),
            ("life", self.life),
            ("stall", self.stall),
        ] {
            if value < least {
                return Err(format!("{table}.{name} = \"{value}\": at least {least}"));
            }
        }
        Ok(())
    }
}

/// Listens at an address. In a tokio runtime.
pub fn listen(address: SocketAddr, limits: &HttpLimits) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for what its last connections left behind.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    // tokio's own `bind` asks for 128: a flood fills that between two looks of ours.
    socket.listen(limits.backlog)
}

/// Serves until `shutdown` is ready, then drains. `handler` is called for each request with the
/// client's address; its panics are answered 500.
pub async fn serve<H, F, B>(
    listener: TcpListener,
    limits: HttpLimits,
    shutdown: impl Future<Output = ()> + Send,
    handler: H,
) where
    H: Fn(Request<Inbound>, SocketAddr) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let limits = HttpLimits { reserved: 0, ..limits };
    serve_gated(listener, Arc::new(Gate::new(limits)), shutdown, handler).await;
}

/// The same at a gate that knows addresses and counts; the caller keeps a clone.
pub async fn serve_gated<H, F, B>(
    listener: TcpListener,
    gate: Arc<Gate>,
    shutdown: impl Future<Output = ()> + Send,
    handler: H,
) where
    H: Fn(Request<Inbound>, SocketAddr) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (stop, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut crowd = Crowd::default();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            // Ended ones are reaped; without any this branch rests.
            Some(_) = connections.join_next() => {}
            accepted = accept(&listener) => {
                let Some((stream, peer)) = accepted else { continue };
                // A refused client's connection closes here.
                let Some(slot) = gate.admit(peer.ip()) else {
                    crowd.tell(&gate, peer);
                    continue;
                };
                connections.spawn(connection(stream, peer, slot, stopped.clone(), handler.clone()));
            }
        }
    }
    drop(listener);
    drop(stop);
    let drain = gate.limits().drain.0;
    if tokio::time::timeout(drain, async { while connections.join_next().await.is_some() {} }).await.is_err() {
        tracing::debug!(cut = connections.len(), "connections cut at the end of the drain");
    }
    connections.shutdown().await;
}

/// Tells of refused connections, at most once a minute: a flood must not fill the log too.
#[derive(Default)]
struct Crowd {
    told: Option<Instant>,
}

impl Crowd {
    fn tell(&mut self, gate: &Gate, peer: SocketAddr) {
        if self.told.is_none_or(|at| at.elapsed() >= Duration::from_secs(60)) {
            self.told = Some(Instant::now());
            let (open, refused) = (gate.open(), gate.refused());
            tracing::warn!(from = %peer.ip(), open, refused, "too many connections; this one was refused");
        }
    }
}

/// How long is waited before connections are asked for again that the system refuses: out of files, it would at once.
const REFUSED_PAUSE: Duration = Duration::from_millis(200);

/// The next connection; none when it broke before we had it. Out of files, or refused by the system, it waits a little.
async fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(e) => {
            if !matches!(Errno::from_io_error(&e), Some(Errno::CONNABORTED | Errno::CONNRESET | Errno::INTR)) {
                tracing::warn!("cannot accept connections for now: {e}");
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
            None
        }
    }
}

async fn connection<H, F, B>(
    stream: TcpStream,
    peer: SocketAddr,
    slot: Slot,
    mut stopped: watch::Receiver<()>,
    handler: H,
) where
    H: Fn(Request<Inbound>, SocketAddr) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let limits = slot.limits();
    // Long polls answer in small pieces.
    let _ = stream.set_nodelay(true);
    let (body_timeout, answer_timeout, slow) = (limits.body_timeout.0, limits.answer_timeout.0, slot.slow());
    let (born, life) = (Instant::now(), limits.life.0);
    let service = service_fn(move |request: Request<Incoming>| {
        let chunked = request.headers().contains_key(TRANSFER_ENCODING);
        let is_slow = slow.contains(&request.uri().path());
        let request = request.map(|body| Inbound::new(body, body_timeout));
        let answer = (!chunked).then(|| catch_unwind(AssertUnwindSafe(|| handler(request, peer))));
        async move {
            // All our clients know their bodies' lengths; what is told in chunks is where smuggling begins.
            let Some(answer) = answer else { return Ok(no_length()) };
            let Ok(answer) = answer else { return Ok(panicked()) };
            let answer = AssertUnwindSafe(answer).catch_unwind();
            let answered = if is_slow { Ok(answer.await) } else { tokio::time::timeout(answer_timeout, answer).await };
            let mut response = match answered {
                Ok(Ok(response)) => response.map(Either::Right),
                Ok(Err(_)) => panicked(),
                Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "it took too long").map(Either::Left),
            };
            if born.elapsed() >= life {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let io = Guarded::new(stream, limits.stall.0, limits.stall_bytes);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout.0)
        .max_headers(limits.headers)
        .max_header_size(limits.head_bytes)
        .max_buf_size(limits.head_bytes.max(64 << 10))
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = outcome {
        tracing::trace!(%peer, "connection ended: {e}");
    }
}

fn no_length<B>() -> Response<Either<Body, B>> {
    let mut response = text(StatusCode::LENGTH_REQUIRED, "a body needs a Content-Length, and no Transfer-Encoding");
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response.map(Either::Left)
}

fn panicked<B>() -> Response<Either<Body, B>> {
    tracing::error!("a request's handler panicked");
    text(StatusCode::INTERNAL_SERVER_ERROR, "internal error").map(Either::Left)
}

/// Drives a tower service, such as axum's `Router`, by this loop: `serve(…, from_tower(router))`.
/// The client's address is in the request's extensions as `Peer`.
pub fn from_tower<S, B>(
    service: S,
) -> impl Fn(Request<Inbound>, SocketAddr) -> BoxFuture<'static, Response<B>> + Clone + Send + 'static
where
    TowerToHyperService<S>: Service<Request<Inbound>, Response = Response<B>, Error = Infallible>,
    <TowerToHyperService<S> as Service<Request<Inbound>>>::Future: Send + 'static,
    S: Clone + Send + 'static,
{
    let service = TowerToHyperService::new(service);
    move |mut request, peer| {
        request.extensions_mut().insert(Peer(peer));
        let answer = service.call(request);
        Box::pin(async move {
            match answer.await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        })
    }
}

/// The client's address, for handlers behind `from_tower`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

#[cfg(test)]
mod tests;

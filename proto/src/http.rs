//! The HTTP server's loop, hardened against slow and greedy clients.

use crate::config::HumanDuration;
use bytes::Bytes;
use hyper::{Request, Response, StatusCode};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::net::SocketAddr;
use std::time::Duration;

/// Bounds on clients. A `[http]` table in each tier's file sets them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpLimits {
    /// Connections at once. 512.
    pub connections: usize,
    /// Connections at once from one address (IPv6: one /64). 32.
    pub per_ip: usize,
    /// From connecting, or the last answer, to the end of a request's head. 5 s.
    pub head_timeout: HumanDuration,
    /// Bytes of a request's head. 16 KiB.
    pub head_bytes: usize,
    /// Headers of a request. 64.
    pub headers: usize,
    /// From a request's head to the end of its body. 10 s.
    pub body_timeout: HumanDuration,
    /// From a request's head to its answer's head. 90 s: longer than any long poll.
    pub answer_timeout: HumanDuration,
    /// Waiting for a client to read counts up to this, then it must have taken `stall_bytes`. 10 s.
    pub stall: HumanDuration,
    /// 10 KiB: with 10 s of `stall`, 1 KiB/s.
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
            head_timeout: s(5),
            head_bytes: 16 << 10,
            headers: 64,
            body_timeout: s(10),
            answer_timeout: s(90),
            stall: s(10),
            stall_bytes: 10 << 10,
            drain: s(5),
        }
    }
}

/// A request's body; reading fails when it takes longer than `body_timeout`.
#[derive(Debug)]
pub struct Inbound {}

/// An answer's body.
#[derive(Debug, Default)]
pub enum Body {
    /// None.
    #[default]
    Empty,
    /// From memory.
    Bytes(Bytes),
    /// From a file, a chunk at a time.
    File(FileBody),
}

/// Part of a file, read in chunks of 128 KiB off the async threads.
#[derive(Debug)]
pub struct FileBody {}

impl FileBody {
    /// `length` bytes from `start`; a file that ends earlier cuts the connection.
    pub fn new(file: File, start: u64, length: u64) -> Self {
        let _ = (file, start, length);
        todo!()
    }
}

/// Serves until `shutdown` is ready, then drains. `handler` is called for each request with the
/// client's address; its panics are answered 500.
pub async fn serve<H, F, B>(
    listener: tokio::net::TcpListener,
    limits: HttpLimits,
    shutdown: impl Future<Output = ()> + Send,
    handler: H,
) where
    H: Fn(Request<Inbound>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let _ = (listener, limits, shutdown, handler);
    todo!()
}

/// Why a request's body could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// More than the limit.
    #[error("the body has more than {0} bytes")]
    TooLong(u64),
    /// Slower than `body_timeout`.
    #[error("the body took too long")]
    TooSlow,
    /// The client went away.
    #[error("the body was cut off")]
    Cut,
}

impl BodyError {
    /// 413, 408 or 400.
    pub fn status(&self) -> StatusCode {
        match self {
            BodyError::TooLong(_) => StatusCode::PAYLOAD_TOO_LARGE,
            BodyError::TooSlow => StatusCode::REQUEST_TIMEOUT,
            BodyError::Cut => StatusCode::BAD_REQUEST,
        }
    }
}

/// Reads a request's body, up to `max` bytes, within its `body_timeout`.
pub async fn read_body(body: Inbound, max: u64) -> Result<Bytes, BodyError> {
    let _ = (body, max);
    todo!()
}

/// What a Range header asks of an object of known length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeAsked {
    /// All of it: no header, or one to be ignored (malformed, several ranges, other units).
    Whole,
    /// These bytes.
    Part {
        /// The first.
        start: u64,
        /// How many; at least one.
        length: u64,
    },
    /// 416.
    Unsatisfiable,
}

/// Reads `Range` and `If-Range` for an object of `length` bytes with the strong ETag `etag`.
pub fn range_asked(headers: &hyper::HeaderMap, length: u64, etag: &str) -> RangeAsked {
    let _ = (headers, length, etag);
    todo!()
}

/// Whether `If-None-Match` names `etag` (quotes included) or is `*`: answer 304.
pub fn none_match(headers: &hyper::HeaderMap, etag: &str) -> bool {
    let _ = (headers, etag);
    todo!()
}

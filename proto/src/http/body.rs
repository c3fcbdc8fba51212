//! Bodies: what comes in, within a time; what goes out, from memory or a file.

use bytes::{Bytes, BytesMut};
use http_body_util::{Either, Full};
use hyper::StatusCode;
use hyper::body::{Frame, Incoming, SizeHint};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep};

/// A request's body; reading fails when it takes longer than `body_timeout`.
#[derive(Debug)]
pub struct Inbound {
    body: Either<Incoming, Full<Bytes>>,
    /// None for a request without a body.
    deadline: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Inbound {
    pub(super) fn new(body: Incoming, timeout: Duration) -> Self {
        let deadline = (!hyper::body::Body::is_end_stream(&body)).then(|| Instant::now() + timeout);
        Inbound { body: Either::Left(body), deadline, timer: None }
    }
}

/// A body that is here already: of a request that came by no connection.
impl From<Bytes> for Inbound {
    fn from(bytes: Bytes) -> Self {
        Inbound { body: Either::Right(bytes.into()), deadline: None, timer: None }
    }
}

impl hyper::body::Body for Inbound {
    type Data = Bytes;
    type Error = BodyError;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame.map(|f| f.map_err(|_| BodyError::Cut)));
        }
        let Some(deadline) = self.deadline else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Some(Err(BodyError::TooSlow)))
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
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
pub async fn read_body(mut body: Inbound, max: u64) -> Result<Bytes, BodyError> {
    use http_body_util::BodyExt;
    let too_long = BodyError::TooLong(max);
    if hyper::body::Body::size_hint(&body).lower() > max {
        return Err(too_long);
    }
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if all.len() as u64 + data.len() as u64 > max {
            return Err(too_long);
        }
        if all.is_empty() && hyper::body::Body::is_end_stream(&body) {
            return Ok(data);
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

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

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Self {
        Body::Bytes(bytes.into())
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Body::Empty => Poll::Ready(None),
            Body::Bytes(b) => {
                let bytes = std::mem::take(b);
                *self = Body::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Body::File(f) => f.poll_chunk(cx).map(|c| c.map(|c| c.map(Frame::data))),
        }
    }
    fn is_end_stream(&self) -> bool {
        self.size_hint().upper() == Some(0)
    }
    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Body::Empty => 0,
            Body::Bytes(b) => b.len() as u64,
            Body::File(f) => f.left,
        })
    }
}

/// What is read at once, and held in memory for each client.
const CHUNK: u64 = 128 << 10;

/// Part of a file, read in chunks of 128 KiB off the async threads.
#[derive(Debug)]
pub struct FileBody {
    file: Arc<File>,
    at: u64,
    left: u64,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
}

impl FileBody {
    /// `length` bytes from `start`; a file that ends earlier cuts the connection.
    pub fn new(file: File, start: u64, length: u64) -> Self {
        FileBody { file: Arc::new(file), at: start, left: length, reading: None }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let (file, at, n) = (&self.file, self.at, self.left.min(CHUNK));
        let reading = self.reading.get_or_insert_with(|| {
            let file = file.clone();
            tokio::task::spawn_blocking(move || {
                let mut chunk = vec![0; usize::try_from(n).unwrap_or(0)];
                file.read_exact_at(&mut chunk, at)?;
                Ok(chunk.into())
            })
        });
        let outcome = ready!(Pin::new(reading).poll(cx));
        self.reading = None;
        let outcome = outcome.unwrap_or_else(|e| Err(io::Error::other(e)));
        match &outcome {
            Ok(chunk) => {
                self.at += chunk.len() as u64;
                self.left -= chunk.len() as u64;
            }
            // No second error.
            Err(_) => self.left = 0,
        }
        Poll::Ready(Some(outcome))
    }
}

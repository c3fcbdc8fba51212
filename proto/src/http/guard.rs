//! A connection that ends when its client does not read.

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

/// What the kernel takes before it sends the rest. The default of megabytes lets us write again when a third of them is read:
/// who reads fifty KiB a second looked like one who stands still. With it the steps are at most 80 KiB (a segment of
/// 64 KiB, and this).
const UNSENT: u32 = 16 << 10;

/// Counts the time for which the client's side keeps us from writing. When that comes to `limit`,
/// it must have taken `bytes` meanwhile, or it is cut. Costs nothing while writes go through.
pub(super) struct Guarded {
    io: TokioIo<TcpStream>,
    limit: Duration,
    bytes: u64,
    waiting: Option<Waiting>,
}

struct Waiting {
    /// Since when we wait; none while writes go through again.
    since: Option<Instant>,
    before: Duration,
    taken: u64,
    timer: Pin<Box<Sleep>>,
}

impl Guarded {
    pub(super) fn new(stream: TcpStream, limit: Duration, bytes: u64) -> Self {
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        Guarded { io: TokioIo::new(stream), limit, bytes, waiting: None }
    }

    /// What came of a write, or the end.
    fn judge(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match outcome {
            Poll::Ready(Ok(n)) => {
                if let Some(w) = &mut self.waiting {
                    w.taken += n as u64;
                    if let Some(since) = w.since.take() {
                        w.before += since.elapsed();
                    }
                    if w.before >= self.limit {
                        if w.taken < self.bytes {
                            return Poll::Ready(Err(stalled()));
                        }
                        self.waiting = None;
                    }
                }
                Poll::Ready(Ok(n))
            }
            Poll::Pending => {
                let (now, limit) = (Instant::now(), self.limit);
                let w = self.waiting.get_or_insert_with(|| Waiting {
                    since: None,
                    before: Duration::ZERO,
                    taken: 0,
                    timer: Box::pin(tokio::time::sleep_until(now + limit)),
                });
                if w.since.is_none() {
                    w.since = Some(now);
                    w.timer.as_mut().reset(now + limit.saturating_sub(w.before));
                }
                ready!(w.timer.as_mut().poll(cx));
                if w.taken < self.bytes {
                    return Poll::Ready(Err(stalled()));
                }
                // Slow, but fast enough: a new count.
                (w.since, w.before, w.taken) = (Some(now), Duration::ZERO, 0);
                w.timer.as_mut().reset(now + limit);
                let _ = w.timer.as_mut().poll(cx);
                Poll::Pending
            }
            error => error,
        }
    }
}

fn stalled() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the client does not read")
}

impl Read for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.io).poll_write(cx, buf);
        self.judge(cx, outcome)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.judge(cx, outcome)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

//! What a hostile server may answer to `fetch`. The input's first line says what is asked (`get`, `poll`, `post`, or
//! `download` with the bytes that are there already); then an answer each, between lines `---`: status, headers, an empty
//! line, body. The last one is given again and again.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use proto::clock::{Clock, Timestamp};
use proto::digest::Sha256;
use proto::fetch::{Etag, FetchError, FetchErrorKind, Polled, RateFloor, Small, Source, SourceOptions, Want, Wire};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// What the manifest says of the pack.
const CONTENT: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
/// Bytes that a small object may have.
const MOST: u64 = 48;
/// An error names what a server said, and is a line of a log.
const LONGEST_ERROR: usize = 4096;

#[derive(Debug)]
struct Server {
    answers: Vec<Answer>,
    asked: AtomicUsize,
    /// Each request's Range, to be held against what was there.
    from: AtomicU64,
}

#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn read(text: &[u8]) -> Option<Answer> {
        let end = text.windows(2).position(|w| w == b"\n\n").unwrap_or(text.len());
        let mut lines = std::str::from_utf8(&text[..end]).ok()?.lines();
        let status = lines.next()?.parse().ok()?;
        let headers = lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
        Some(Answer { status, headers, body: text.get(end + 2..).unwrap_or_default().to_vec() })
    }

    fn arrive(&self) -> Result<reqwest::Response, String> {
        let mut response = http::Response::builder().status(self.status);
        for (name, value) in &self.headers {
            response = response.header(name, value);
        }
        // In pieces, as it would come.
        let pieces: Vec<Result<Vec<u8>, std::io::Error>> = self.body.chunks(7).map(|c| Ok(c.to_vec())).collect();
        let body = match self.body.len() % 2 {
            0 => reqwest::Body::from(self.body.clone()),
            _ => reqwest::Body::wrap_stream(futures_util::stream::iter(pieces)),
        };
        response.body(body).map(Into::into).map_err(|e| e.to_string())
    }
}

impl Wire for Server {
    fn ask(&self, request: reqwest::Request) -> BoxFuture<'static, Result<reqwest::Response, String>> {
        let n = self.asked.fetch_add(1, Relaxed);
        let range = request.headers().get(http::header::RANGE).map(|r| r.to_str().unwrap().to_owned());
        let from = range.map_or(0, |r| r.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap());
        self.from.store(from, Relaxed);
        let answer = self.answers.get(n).or(self.answers.last()).map_or(Err("nobody is there".into()), Answer::arrive);
        std::future::ready(answer).boxed()
    }
}

/// A clock that is turned by hand.
#[derive(Debug, Default)]
struct Hand(AtomicU64);

impl Clock for Hand {
    fn now(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }
    fn monotonic(&self) -> Duration {
        Duration::from_secs(self.0.load(Relaxed))
    }
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    static DIR: tempfile::TempDir = crate::scratch_dir();
}

pub fn answers(data: &[u8]) {
    let first = data.split(|b| *b == b'\n').next().unwrap_or_default();
    let Ok(what) = std::str::from_utf8(first) else { return };
    let rest = data.get(first.len() + 1..).unwrap_or_default();
    let answers: Vec<Answer> = split(rest).into_iter().filter_map(Answer::read).collect();
    let server = Arc::new(Server { answers, asked: AtomicUsize::new(0), from: AtomicU64::new(0) });
    let clock = Arc::new(Hand::default());
    let options = SourceOptions { wire: Some(server.clone()), clock: Some(clock.clone()), ..SourceOptions::default() };
    let source = Source::parse("http://127.0.0.1:9/base", &options).unwrap();
    let part = DIR.with(|dir| dir.path().join("a.part"));
    RUNTIME.with(|runtime| {
        let Some(Err(e)) = runtime.block_on(ask(what, &source, &server, &part)) else { return };
        assert!(e.to_string().len() < LONGEST_ERROR, "{e}");
        // Whatever it asks for, it is not left alone for longer than the setting says.
        if let FetchErrorKind::Status { retry_after, .. } = e.kind {
            let before = server.asked.load(Relaxed);
            let again = || runtime.block_on(ask("get", &source, &server, &part));
            let _ = again();
            assert_eq!(server.asked.load(Relaxed) == before, retry_after.is_some_and(|d| !d.is_zero()), "{e}");
            clock.0.store(options.retry_after.0.as_secs(), Relaxed);
            let before = server.asked.load(Relaxed);
            let _ = again();
            assert!(server.asked.load(Relaxed) > before, "{e}");
        }
    });
}

fn split(mut rest: &[u8]) -> Vec<&[u8]> {
    const MARK: &[u8] = b"\n---\n";
    let mut all = Vec::new();
    while let Some(at) = rest.windows(MARK.len()).position(|w| w == MARK) {
        all.push(&rest[..at]);
        rest = &rest[at + MARK.len()..];
    }
    all.push(rest);
    all
}

/// Asks once; what came is checked. Nothing where the input asks nothing.
async fn ask(what: &str, source: &Source, server: &Server, part: &Path) -> Option<Result<(), FetchError>> {
    let known = Etag("\"known\"".into());
    let last = || server.answers.get(server.asked.load(Relaxed) - 1).or(server.answers.last()).unwrap();
    let is_whole = |bytes: &[u8], max: u64| {
        assert!(bytes.len() as u64 <= max && bytes == last().body, "other bytes than were sent");
        assert!((200..300).contains(&last().status), "status {}", last().status);
    };
    let outcome = match what.split_once(' ').unwrap_or((what, "")) {
        ("get", _) => {
            let got = source.get_small(&"trust.json".parse().unwrap(), Some(7), Some(&known), MOST).await;
            got.map(|small| match small {
                Small::Body { bytes, .. } => is_whole(&bytes, MOST),
                Small::Unchanged => assert_eq!(last().status, 304),
            })
        }
        ("poll", _) => source.versions_poll(3, Some(&known)).await.map(|polled| match polled {
            Polled::Body { bytes, .. } => is_whole(&bytes, 1 << 20),
            Polled::Unchanged => assert!(matches!(last().status, 204 | 304)),
            Polled::NoSuchPage => assert!(matches!(last().status, 404 | 405)),
        }),
        ("post", _) => {
            source.post("v1/heartbeats", "application/json", "{}".into(), MOST).await.map(|b| is_whole(&b, MOST))
        }
        ("download", there) => {
            let there: usize = there.parse().ok().filter(|n| *n <= CONTENT.len() + 3)?;
            // A byte that is wrong, where it is more than there should be.
            let mut before = CONTENT.to_vec();
            before.extend(b"???");
            std::fs::write(part, &before[..there]).unwrap();
            let want = Want { bytes: CONTENT.len() as u64, sha256: Sha256::of(CONTENT) };
            let name = "packs/price@all/0000000001.full.pack".parse().unwrap();
            let outcome = source.download(&name, &want, part, &RateFloor::default(), &mut |_| {}).await;
            let now = std::fs::read(part).unwrap_or_default();
            match &outcome {
                Ok(()) => assert_eq!(now, CONTENT),
                Err(_) => assert!(now.len() <= CONTENT.len(), "a part of {} bytes stays", now.len()),
            }
            assert!(server.from.load(Relaxed) < CONTENT.len() as u64, "no byte is asked for that is not wanted");
            outcome
        }
        _ => return None,
    };
    Some(outcome)
}

//! One contract for all sources, and the ways in which servers and networks break it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use super::*;
use object_store::aws::AmazonS3Builder;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const PACK: &str = "packs/price@all/0000000001.full.pack";

fn pack() -> ObjectName {
    PACK.parse().unwrap()
}
fn bytes(n: usize) -> Vec<u8> {
    let mut x = 1u32;
    (0..n)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect()
}
fn want(of: &[u8]) -> Want {
    Want { bytes: of.len() as u64, sha256: Sha256::of(of) }
}

/// A request as the test server saw it.
#[derive(Debug, Clone)]
struct Asked {
    method: String,
    target: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Asked {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
    fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What the test server does after its head: pieces, with waits between them.
enum Then {
    Send(Vec<u8>),
    Wait(u64),
}

fn reply(status: &str, headers: &[(&str, String)], body: &[u8]) -> Vec<Then> {
    let mut all = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
    for (name, value) in headers {
        all += &format!("{name}: {value}\r\n");
    }
    let mut all = (all + "\r\n").into_bytes();
    all.extend_from_slice(body);
    vec![Then::Send(all)]
}
fn whole(status: &str, body: &[u8]) -> Vec<Then> {
    reply(status, &[("content-length", body.len().to_string())], body)
}

/// A server that answers as `answer` says, and keeps what it was asked.
struct Server {
    address: std::net::SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    async fn start(answer: impl Fn(&Asked) -> Vec<Then> + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), asked.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, log) = (answer.clone(), log.clone());
                tokio::spawn(async move { answer_one(stream, &*answer, &log).await });
            }
        });
        Server { address, asked }
    }
    fn url(&self) -> String {
        format!("http://{}/base", self.address)
    }
    fn source(&self) -> Source {
        self.impatient(30_000)
    }
    /// One that waits for so many milliseconds.
    fn impatient(&self, read_timeout: u64) -> Source {
        let read_timeout = HumanDuration(Duration::from_millis(read_timeout));
        Source::parse(&self.url(), &SourceOptions { read_timeout, ..Default::default() }).unwrap()
    }
    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer_one(
    mut stream: TcpStream,
    answer: &(dyn Fn(&Asked) -> Vec<Then> + Send + Sync),
    log: &Mutex<Vec<Asked>>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(b) => head.push(b),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next().unwrap().split(' ');
    let headers = lines.filter_map(|l| l.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned()));
    let mut asked = Asked {
        method: first.next().unwrap().to_owned(),
        target: first.next().unwrap().to_owned(),
        headers: headers.collect(),
        body: Vec::new(),
    };
    let length = asked.header("content-length").map_or(0, |n| n.parse().unwrap());
    asked.body = vec![0; length];
    stream.read_exact(&mut asked.body).await.unwrap();
    let then = answer(&asked);
    log.lock().unwrap().push(asked);
    for step in then {
        match step {
            Then::Send(bytes) => {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Then::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        }
    }
    let _ = stream.shutdown().await;
}

/// Answers like nginx or S3: Range, ETag, If-None-Match.
fn well(objects: &Mutex<BTreeMap<String, Vec<u8>>>, asked: &Asked) -> Vec<Then> {
    let path = asked.target.split('?').next().unwrap().trim_start_matches("/base/").trim_start_matches("/bucket/base/");
    let path = path.replace("%40", "@");
    let objects = objects.lock().unwrap();
    let Some(body) = objects.get(&path) else { return whole("404 Not Found", b"no") };
    let etag = format!("\"{}\"", Sha256::of(body));
    let common = [("etag", etag.clone()), ("last-modified", "Sat, 21 Nov 2026 10:00:00 GMT".to_owned())];
    if asked.header("if-none-match") == Some(&etag) {
        return reply("304 Not Modified", &common, b"");
    }
    let (status, body, range) = match asked.range_start() {
        Some(n) if n >= body.len() => ("416 Range Not Satisfiable", &b""[..], Some(format!("bytes */{}", body.len()))),
        Some(n) => ("206 Partial Content", &body[n..], Some(format!("bytes {n}-{}/{}", body.len() - 1, body.len()))),
        None => ("200 OK", &body[..], None),
    };
    let mut headers = common.to_vec();
    headers.push(("content-length", body.len().to_string()));
    headers.extend(range.map(|r| ("content-range", r)));
    if asked.method == "HEAD" {
        headers.retain(|(k, _)| *k != "content-length");
        headers.push(("content-length", objects[&path].len().to_string()));
        return reply("200 OK", &headers, b"");
    }
    reply(status, &headers, body)
}

type Put = Box<dyn Fn(&str, &[u8])>;

/// A kind of source, and a way to put objects into it.
struct Bench {
    kind: &'static str,
    source: Source,
    put: Put,
    _dir: Option<TempDir>,
}

async fn benches() -> Vec<Bench> {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    let url = url::Url::from_file_path(&root).unwrap();
    let file = Bench {
        kind: "file",
        source: Source::parse(url.as_str(), &SourceOptions::default()).unwrap(),
        put: Box::new(move |name, bytes| {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }),
        _dir: Some(dir),
    };
    let mut all = vec![file];
    for kind in ["http", "s3"] {
        let objects = Arc::new(Mutex::new(BTreeMap::new()));
        let held = objects.clone();
        let server = Server::start(move |asked| well(&held, asked)).await;
        let source = if kind == "http" {
            server.source()
        } else {
            let keys =
                AmazonS3Builder::new().with_access_key_id("k").with_secret_access_key("s").with_region("us-east-1");
            let s3 = S3Options { endpoint: Some(format!("http://{}", server.address)), ..Default::default() };
            let options = SourceOptions { s3, ..Default::default() };
            let url = "s3://bucket/base";
            let bucket = bucket::Bucket::build(keys, &url::Url::parse(url).unwrap(), &options).unwrap();
            Source { url: url.into(), kind: Kind::Bucket(bucket) }
        };
        let put = Box::new(move |name: &str, bytes: &[u8]| {
            objects.lock().unwrap().insert(name.to_owned(), bytes.to_vec());
        });
        all.push(Bench { kind, source, put, _dir: None });
    }
    all
}

#[tokio::test]
async fn small_objects_from_every_source() {
    for Bench { kind, source, put, _dir } in benches().await {
        let name: ObjectName = "stores/0421/manifest.json".parse().unwrap();
        let e = source.get_small(&name, None, None, 100).await.unwrap_err();
        assert!(e.is_not_found() && e.verdict() == Verdict::Retry, "{kind}: {e:?}");
        assert!(e.to_string().contains("stores/0421/manifest.json") && e.to_string().contains(source.url()), "{e}");

        put("stores/0421/manifest.json", b"{\"a\":1}");
        let got = source.get_small(&name, Some(7), None, 7).await.unwrap();
        let Small::Body { bytes, etag } = got else { panic!("{kind}: {got:?}") };
        assert_eq!(&bytes[..], b"{\"a\":1}", "{kind}");
        assert!(etag.is_some(), "{kind}");
        assert_eq!(source.get_small(&name, None, etag.as_ref(), 7).await.unwrap(), Small::Unchanged, "{kind}");

        put("stores/0421/manifest.json", b"{\"a\":22}");
        let got = source.get_small(&name, None, etag.as_ref(), 100).await.unwrap();
        assert!(matches!(got, Small::Body { bytes, .. } if &bytes[..] == b"{\"a\":22}"), "{kind}");
        let e = source.get_small(&name, None, None, 7).await.unwrap_err();
        assert_eq!(e.kind, FetchErrorKind::TooLong, "{kind}");
    }
}

/// Downloads into `part`, which holds `held` before; what was heard last and the outcome.
async fn download(source: &Source, want: &Want, part: &Path, held: Option<&[u8]>) -> (u64, Result<(), FetchError>) {
    if let Some(held) = held {
        std::fs::write(part, held).unwrap();
    }
    let mut heard = 0;
    let outcome = source.download(&pack(), want, part, &RateFloor::default(), &mut |n| heard = n).await;
    (heard, outcome)
}

#[tokio::test]
async fn packs_from_every_source_fresh_and_resumed() {
    let body = bytes(700_000);
    let want = want(&body);
    let flipped: Vec<u8> = body[..1000].iter().map(|b| b ^ 1).collect();
    let longer = [&body[..], b"x"].concat();
    for Bench { kind, source, put, _dir } in benches().await {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("x.part");
        let (_, outcome) = download(&source, &want, &part, None).await;
        assert_eq!(outcome.unwrap_err().kind, FetchErrorKind::NotFound, "{kind}");
        put(PACK, &body);
        // Fresh; cut short; whole; whole but wrong; a bit wrong; too long.
        let parts = [
            None,
            Some(&body[..300_000]),
            Some(&body[..]),
            Some(&bytes(700_001)[1..]),
            Some(&flipped[..]),
            Some(&longer[..]),
        ];
        for held in parts {
            let _ = std::fs::remove_file(&part);
            let (heard, outcome) = download(&source, &want, &part, held).await;
            assert_eq!(outcome, Ok(()), "{kind} {:?}", held.map(<[u8]>::len));
            assert!(std::fs::read(&part).unwrap() == body, "{kind}");
            assert!(heard == want.bytes || held.is_some_and(|h| h == body), "{kind}");
        }
    }
}

#[tokio::test]
async fn other_objects_than_wanted_are_refused_by_every_source() {
    let body = bytes(300_000);
    let want = want(&body);
    let mut flipped = body.clone();
    flipped[299_999] ^= 0x80;
    let longer = [&body[..], b"trailing"].concat();
    let cases = [
        (&flipped[..], FetchErrorKind::WrongHash),
        (&longer[..], FetchErrorKind::TooLong),
        (&body[..200_000], FetchErrorKind::TooShort),
        (&b""[..], FetchErrorKind::TooShort),
    ];
    for Bench { kind, source, put, _dir } in benches().await {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("x.part");
        for (there, expected) in &cases {
            put(PACK, there);
            for held in [None, Some(&body[..100_000]), Some(&body[..250_000])] {
                let (_, outcome) = download(&source, &want, &part, held).await;
                let e = outcome.unwrap_err();
                assert_eq!(e.kind, *expected, "{kind} {:?}: {e}", held.map(<[u8]>::len));
                assert_eq!(e.verdict(), Verdict::Quarantine);
                assert!(!part.exists(), "{kind} {expected:?}: the bad part stays");
            }
        }
    }
}

#[tokio::test]
async fn links_and_fifos_in_a_directory_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(outside.path().join("price@all")).unwrap();
    std::fs::write(outside.path().join("price@all/0000000001.full.pack"), b"secret").unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("packs")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("price@all/0000000001.full.pack"), dir.path().join("trust.json"))
        .unwrap();
    let source = Source::parse(&format!("file://{}", dir.path().display()), &SourceOptions::default()).unwrap();
    for name in [pack(), ObjectName::Trust] {
        let e = source.get_small(&name, None, None, 100).await.unwrap_err();
        assert!(e.kind == FetchErrorKind::Network && e.detail.contains("link"), "{e:?}");
    }
    std::fs::create_dir_all(dir.path().join("trust")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("trust/0000000001.json"), rustix::fs::Mode::RWXU).unwrap();
    assert!(source.get_small(&ObjectName::TrustVersion(1), None, None, 100).await.is_err());
    // A stick that is not mounted is no 404.
    let gone = Source::parse("file:///no/such/stick", &SourceOptions::default()).unwrap();
    assert_eq!(gone.get_small(&ObjectName::Trust, None, None, 9).await.unwrap_err().kind, FetchErrorKind::Network);
}

/// As on a network share whose server died: what reads there does not come back.
#[tokio::test]
async fn a_directory_that_hangs_is_not_waited_for_and_costs_one_thread() {
    let (dir, body) = (tempfile::tempdir().unwrap(), bytes(5000));
    let path = dir.path().join(PACK);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, &body).unwrap();
    let options = SourceOptions { read_timeout: HumanDuration(Duration::from_millis(200)), ..Default::default() };
    let source = Source::parse(&format!("file://{}", dir.path().display()), &options).unwrap();
    let Kind::Dir(mut share) = source.kind.clone() else { panic!("{source:?}") };
    let (server, dead) = std::sync::mpsc::channel::<()>();
    let hangs = share.read(move |_| {
        let _ = dead.recv();
        Ok(())
    });
    let others = Arc::new(AtomicUsize::new(0));
    let count = others.clone();
    let waits = share.read(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    // The second waits for its turn, and no longer than the first for its answer.
    let (first, second) = tokio::join!(hangs, waits);
    for e in [first.unwrap_err(), second.unwrap_err()] {
        assert_eq!(e.kind, FetchErrorKind::Network, "{e:?}");
    }
    let part = dir.path().join("x.part");
    let e = source.get_small(&pack(), None, None, 9000).await.unwrap_err();
    assert_eq!((e.kind, e.verdict()), (FetchErrorKind::Network, Verdict::Retry), "{e}");
    let e = download(&source, &want(&body), &part, None).await.1.unwrap_err();
    assert_eq!((e.kind, e.verdict()), (FetchErrorKind::Network, Verdict::Retry), "{e}");
    assert_eq!(others.load(Ordering::Relaxed), 0, "nothing else hangs there");
    // The server is back.
    drop(server);
    drop(share.turn.lock().await);
    share.read_timeout = Duration::from_secs(600);
    assert!(matches!(share.get_small(PACK.into(), None, 9000).await, Ok(Small::Body { .. })));
}

#[tokio::test]
async fn a_connection_cut_again_and_again_wastes_nothing() {
    let body = bytes(900_000);
    let held = body.clone();
    let server = Server::start(move |asked| {
        let from = asked.range_start().unwrap_or(0);
        let status = if from == 0 { "200 OK" } else { "206 Partial Content" };
        let total = held.len();
        let range = format!("bytes {from}-{}/{total}", total - 1);
        let end = (from + 100_000).min(total);
        reply(status, &[("content-length", (total - from).to_string()), ("content-range", range)], &held[from..end])
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("x.part");
    let (source, want) = (server.source(), want(&body));
    for n in 1..9 {
        let (_, outcome) = download(&source, &want, &part, None).await;
        let e = outcome.unwrap_err();
        assert_eq!((e.kind, e.verdict()), (FetchErrorKind::NotWhole, Verdict::Retry), "{e}");
        assert_eq!(std::fs::metadata(&part).unwrap().len(), n * 100_000);
    }
    assert_eq!(download(&source, &want, &part, None).await.1, Ok(()));
    assert_eq!(server.asked().len(), 9);
    assert!(std::fs::read(&part).unwrap() == body);
}

#[tokio::test]
async fn bad_servers_are_told_from_bad_packs() {
    let html = b"<html><body>Please log in</body></html>".to_vec();
    let moved = [("location", "ftp://elsewhere/".to_owned()), ("content-length", "0".to_owned())];
    let to_tls = [("location", "https://127.0.0.1:1/".to_owned()), ("content-length", "0".to_owned())];
    let wait = [("retry-after", "17".to_owned()), ("content-length", "0".to_owned())];
    let body = bytes(5000);
    let chunked = [("transfer-encoding", "chunked".to_owned())];
    let chunked_too = chunked.clone();
    let elsewhere = [("content-range", "bytes 7-4999/5000".to_owned()), ("content-length", "4993".to_owned())];
    let silent =
        || vec![Then::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n0123456789".to_vec()), Then::Wait(3000)];
    type Answer = Box<dyn Fn() -> Vec<Then> + Send + Sync>;
    let cases: Vec<(&str, Answer, FetchErrorKind)> = vec![
        (
            "typed html",
            Box::new({
                let h = html.clone();
                move || {
                    reply(
                        "200 OK",
                        &[("content-type", "text/html; charset=utf-8".into()), ("content-length", h.len().to_string())],
                        &h,
                    )
                }
            }),
            FetchErrorKind::NotAnObject,
        ),
        (
            "html of the right length",
            Box::new(move || {
                let mut b = html.clone();
                b.resize(5000, b' ');
                whole("200 OK", &b)
            }),
            FetchErrorKind::NotAnObject,
        ),
        ("401", Box::new(|| whole("401 Unauthorized", b"")), FetchErrorKind::Unauthorized),
        ("403", Box::new(|| whole("403 Forbidden", b"")), FetchErrorKind::Unauthorized),
        ("410", Box::new(|| whole("410 Gone", b"")), FetchErrorKind::NotFound),
        (
            "503",
            Box::new(move || reply("503 Busy", &wait, b"")),
            FetchErrorKind::Status { code: 503, retry_after: Some(Duration::from_secs(17)) },
        ),
        (
            "304 unasked",
            Box::new(|| reply("304 Not Modified", &[], b"")),
            FetchErrorKind::Status { code: 304, retry_after: None },
        ),
        ("another scheme", Box::new(move || reply("302 Found", &moved, b"")), FetchErrorKind::Network),
        ("tls elsewhere", Box::new(move || reply("302 Found", &to_tls, b"")), FetchErrorKind::Network),
        ("no HTTP", Box::new(|| vec![Then::Send(b"SSH-2.0-OpenSSH\r\n".to_vec())]), FetchErrorKind::Network),
        ("nothing", Box::new(Vec::new), FetchErrorKind::Network),
        ("silence before the head", Box::new(|| vec![Then::Wait(3000)]), FetchErrorKind::Network),
        ("silence in the body", Box::new(silent), FetchErrorKind::Network),
        (
            "short, chunked",
            Box::new(move || reply("200 OK", &chunked, b"5\r\nhello\r\n0\r\n\r\n")),
            FetchErrorKind::NotWhole,
        ),
        ("empty, chunked", Box::new(move || reply("200 OK", &chunked_too, b"0\r\n\r\n")), FetchErrorKind::NotWhole),
        (
            "empty, to its end",
            Box::new(|| vec![Then::Send(b"HTTP/1.0 200 OK\r\n\r\n".to_vec())]),
            FetchErrorKind::NotWhole,
        ),
        (
            "a range not asked for",
            Box::new(move || reply("206 Partial Content", &elsewhere, &body[7..])),
            FetchErrorKind::NotWhole,
        ),
    ];
    for (what, answer, expected) in cases {
        let server = Server::start(move |_| answer()).await;
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("x.part");
        let wanted = want(&bytes(5000));
        let source = if what.starts_with("silence") { server.impatient(1_500) } else { server.source() };
        let (_, outcome) = download(&source, &wanted, &part, None).await;
        let e = outcome.unwrap_err();
        assert_eq!((e.kind, e.verdict()), (expected, Verdict::Retry), "{what}: {e}");
        if what == "silence in the body" {
            assert_eq!(std::fs::read(&part).unwrap(), b"0123456789", "what came is kept");
        } else if expected == FetchErrorKind::NotAnObject {
            assert_eq!(std::fs::metadata(&part).unwrap().len(), 0, "no page in the part");
        }
        if what.starts_with("empty") {
            let half = &bytes(5000)[..1700];
            std::fs::write(&part, half).unwrap();
            let (_, outcome) = download(&server.source(), &wanted, &part, None).await;
            assert_eq!(outcome.unwrap_err().kind, expected, "{what}");
            assert_eq!(std::fs::read(&part).unwrap(), half, "{what}: what came before is kept");
        }
    }
}

/// The port is taken, and not listened at.
#[tokio::test]
async fn nobody_there_is_the_network() {
    let taken = tokio::net::TcpSocket::new_v4().unwrap();
    taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = taken.local_addr().unwrap().port();
    let dead = Source::parse(&format!("http://127.0.0.1:{port}"), &SourceOptions::default()).unwrap();
    assert_eq!(dead.get_small(&ObjectName::Trust, None, None, 9).await.unwrap_err().kind, FetchErrorKind::Network);
}

/// A server that takes a login page for a pack: typed as one, with a length of its own.
#[tokio::test]
async fn a_login_page_under_a_packs_name_is_no_pack_and_takes_no_part_away() {
    let wanted = want(&bytes(5000));
    for page in ["<html><body>Please log in</body></html>", "\u{feff}\n <body>", &format!("<!doctype html>{:6000}", "")]
    {
        for there in [0, 1700] {
            let answer = page.as_bytes().to_vec();
            let server = Server::start(move |_| {
                let typed = [
                    ("content-type", "application/octet-stream".to_owned()),
                    ("content-length", answer.len().to_string()),
                ];
                reply("200 OK", &typed, &answer)
            })
            .await;
            let dir = tempfile::tempdir().unwrap();
            let part = dir.path().join("x.part");
            let held = &bytes(5000)[..there];
            let (_, outcome) = download(&server.source(), &wanted, &part, Some(held)).await;
            assert_eq!(outcome.unwrap_err().kind, FetchErrorKind::NotAnObject, "{page}");
            assert_eq!(std::fs::read(&part).unwrap(), held, "{page}");
        }
    }
}

#[tokio::test]
async fn a_server_without_ranges_sends_all_anew() {
    let body = bytes(400_000);
    let held = body.clone();
    let server = Server::start(move |_| whole("200 OK", &held)).await;
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("x.part");
    let (_, outcome) = download(&server.source(), &want(&body), &part, Some(&body[..100_000])).await;
    assert_eq!(outcome, Ok(()));
    assert!(std::fs::read(&part).unwrap() == body);
}

#[tokio::test]
async fn a_refused_range_of_a_right_object_starts_over() {
    let body = bytes(4000);
    let held = body.clone();
    let server = Server::start(move |asked| match asked.range_start() {
        Some(_) => whole("416 Range Not Satisfiable", b""),
        None => whole("200 OK", &held),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("x.part");
    assert_eq!(download(&server.source(), &want(&body), &part, Some(&body[..1000])).await.1, Ok(()));
}

/// As a cache does that mixes up ranges, or leaves out of which bytes they are: the same range would be answered so for ever.
#[tokio::test]
async fn a_range_from_elsewhere_is_asked_for_from_the_first_byte() {
    let body = bytes(4000);
    for answered in [Some("bytes 7-3999/4000"), Some("bytes 2000-3999/4000"), Some("items"), None] {
        let held = body.clone();
        let server = Server::start(move |asked| match asked.range_start() {
            Some(_) => {
                let range = answered.map(|r| ("content-range", r.to_owned()));
                let headers: Vec<_> = [("content-length", "2000".to_owned())].into_iter().chain(range).collect();
                reply("206 Partial Content", &headers, &held[2000..])
            }
            None => whole("200 OK", &held),
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("x.part");
        let (_, outcome) = download(&server.source(), &want(&body), &part, Some(&body[..1000])).await;
        assert_eq!(outcome, Ok(()), "{answered:?}");
        assert_eq!(server.asked().len(), 2, "{answered:?}");
        assert!(std::fs::read(&part).unwrap() == body, "{answered:?}");
    }
}

#[test]
fn a_file_that_is_not_what_was_wanted_is_told_from_one_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, body) = (dir.path().join("x.pack"), bytes(300_000));
    let mut bent = body.clone();
    bent[299_999] ^= 1;
    for (there, expected) in [(&body[..], true), (&bent, false), (&body[..299_999], false), (b"", false)] {
        std::fs::write(&file, there).unwrap();
        assert_eq!(is_as_wanted(&file, &want(&body)).unwrap(), expected);
    }
    is_as_wanted(&dir.path().join("none.pack"), &want(&body)).unwrap_err();
}

#[tokio::test]
async fn endless_bodies_are_read_no_further_than_wanted() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let server = Server::start(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        let mut then = reply("200 OK", &[("transfer-encoding", "chunked".into())], b"");
        then.extend((0..200).map(|_| Then::Send([&b"10000\r\n"[..], &[b'x'; 65_536], b"\r\n"].concat())));
        then
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("x.part");
    let (heard, outcome) = download(&server.source(), &want(&bytes(100_000)), &part, None).await;
    assert_eq!(outcome.unwrap_err().kind, FetchErrorKind::TooLong);
    assert!(heard <= 100_000 && !part.exists());
    let e = server.source().get_small(&ObjectName::Trust, None, None, 100_000).await.unwrap_err();
    assert_eq!(e.kind, FetchErrorKind::TooLong);
}

#[tokio::test]
async fn a_drip_is_given_up_and_its_bytes_kept() {
    let server = Server::start(|_| {
        let mut then = reply("200 OK", &[("content-length", "5000".into())], b"");
        then.extend((0..100).flat_map(|_| [Then::Send(b"x".to_vec()), Then::Wait(50)]));
        then
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("x.part");
    let rules = RateFloor { bytes_per_second: 1024, window: HumanDuration(Duration::from_millis(600)) };
    let e = server.source().download(&pack(), &want(&bytes(5000)), &part, &rules, &mut |_| {}).await.unwrap_err();
    assert_eq!((e.kind, e.verdict()), (FetchErrorKind::Slow, Verdict::Retry), "{e}");
    let kept = std::fs::metadata(&part).unwrap().len();
    assert!((1..60).contains(&kept), "{kept}");
}

/// Whoever downloads is dropped by news, however little came since the last.
#[tokio::test]
async fn what_comes_slowly_is_on_the_disk_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("x.part");
    let mut work = Work::open(part.clone(), want(&bytes(5000))).await.unwrap();
    let written = || std::fs::read(&part).unwrap().len();
    for (ms, there) in [(0, 0), (500, 0), (999, 0), (1_000, 4), (1_100, 4), (2_099, 4), (2_100, 7), (9_000, 7)] {
        work.take(b"x", Duration::from_millis(ms)).await.unwrap();
        assert_eq!(written(), there, "{ms}");
    }
    // At once, if there is much of it.
    work.take(&[b'x'; BUFFER], Duration::from_millis(9_001)).await.unwrap();
    assert_eq!(written(), 8 + BUFFER);
    drop(work);
    assert_eq!(Work::open(part.clone(), want(&bytes(BUFFER + 10))).await.unwrap().length, 8 + BUFFER as u64);
}

/// One source that drips a manifest must not hold up those after it, for weeks at 4 MiB and a byte a second.
#[tokio::test]
async fn a_small_object_that_drips_is_given_up() {
    let server = Server::start(|_| {
        let mut drip = reply("200 OK", &[("content-length", "100000".into())], b"{");
        drip.extend((0..6000).flat_map(|_| [Then::Wait(50), Then::Send(b" ".to_vec())]));
        drip
    })
    .await;
    let source = server.impatient(3_000);
    let begun = std::time::Instant::now();
    let (small, versions, post) = tokio::join!(
        source.get_small(&ObjectName::Trust, None, None, 1 << 20),
        source.versions_poll(0, None),
        source.post("v1/heartbeats", "application/json", Bytes::new(), 1 << 20)
    );
    for slow in [small.unwrap_err(), versions.unwrap_err(), post.unwrap_err()] {
        assert_eq!(slow.kind, FetchErrorKind::Slow, "{slow}");
    }
    assert!(begun.elapsed() < Duration::from_secs(90), "{:?}", begun.elapsed());
}

/// Seconds, a time by the server's own clock, and one that nobody would wait for: each is kept, up to the limit.
#[tokio::test]
async fn a_server_that_asks_to_be_left_alone_is() {
    let date = || ("date", "Sat, 21 Nov 2026 10:00:00 GMT".to_owned());
    let cases = [
        (vec![("retry-after", "17".to_owned())], "503 Busy", 17),
        (vec![date(), ("retry-after", "Sat, 21 Nov 2026 10:00:20 GMT".into())], "429 Too Many", 20),
        (vec![("retry-after", u64::MAX.to_string())], "503 Busy", 30),
        (vec![("retry-after", "soon".into())], "503 Busy", 0),
        (vec![("retry-after", "17".into())], "500 Broken", 0),
    ];
    for (headers, status, seconds) in cases {
        let answer: Vec<_> = headers.iter().cloned().chain([("content-length", "0".to_owned())]).collect();
        let server = Server::start(move |_| reply(status, &answer, b"")).await;
        let clock = Arc::new(crate::clock::TestClock::at("1999-12-31T00:00:00Z"));
        let s = Duration::from_secs;
        let options =
            SourceOptions { clock: Some(clock.clone()), retry_after: HumanDuration(s(30)), ..Default::default() };
        let source = Source::parse(&server.url(), &options).unwrap();
        let asked = async || {
            let before = server.asked().len();
            let e = source.clone().get_small(&ObjectName::Trust, None, None, 100).await.unwrap_err();
            assert!(matches!(e.kind, FetchErrorKind::Status { .. }), "{e}");
            (server.asked().len() - before, e)
        };
        let (times, answered) = asked().await;
        assert_eq!(times, 1, "{headers:?}");
        if seconds > 0 {
            clock.advance(s(seconds - 1));
            let (times, left_alone) = asked().await;
            assert_eq!(times, 0, "{headers:?}");
            let code = status[..3].parse().unwrap();
            assert_eq!(left_alone.kind, FetchErrorKind::Status { code, retry_after: Some(s(1)) });
            assert_eq!(left_alone.detail, answered.detail, "whoever writes it down writes it once");
            let post = source.post("v1/heartbeats", "application/json", Bytes::new(), 100).await.unwrap_err();
            assert!(post.to_string().contains("asks to be left alone"), "{post}");
            clock.advance(s(1));
        }
        assert_eq!(asked().await.0, 1, "{headers:?}");
    }
}

#[tokio::test]
async fn the_serial_the_token_and_the_poll_reach_the_server() {
    let server = Server::start(|asked| match asked.target.as_str() {
        "/base/v1/versions?wait=0" if asked.header("if-none-match") == Some("\"7\"") => {
            reply("304 Not Modified", &[], b"")
        }
        "/base/v1/versions?wait=0" => {
            reply("200 OK", &[("etag", "\"7\"".into()), ("content-length", "2".into())], b"{}")
        }
        "/base/v1/wake?store=0421&wait=0" => whole("404 Not Found", b""),
        "/base/v1/heartbeats" => whole("200 OK", &asked.body),
        _ => whole("200 OK", b"{}"),
    })
    .await;
    let options = SourceOptions { token: Some(Secret::new("abc")), ..Default::default() };
    let source = Source::parse(&format!("{}/", server.url()), &options).unwrap();
    source.get_small(&ObjectName::Trust, Some(12), None, 9).await.unwrap();
    let Polled::Body { bytes, etag } = source.versions_poll(0, None).await.unwrap() else { panic!() };
    assert_eq!((&bytes[..], etag.as_ref()), (&b"{}"[..], Some(&Etag("\"7\"".into()))));
    assert_eq!(source.versions_poll(0, etag.as_ref()).await.unwrap(), Polled::Unchanged);
    assert_eq!(source.long_poll("v1/wake", &[("store", "0421")], 0, None).await.unwrap(), Polled::NoSuchPage);
    let answer = source.post("v1/heartbeats", "application/json", Bytes::from_static(b"[1]"), 100).await.unwrap();
    assert_eq!(&answer[..], b"[1]");
    assert_eq!(
        source.post("v1/heartbeats", "application/json", Bytes::from_static(b"[1]"), 2).await.unwrap_err().kind,
        FetchErrorKind::TooLong
    );
    let asked = server.asked();
    assert_eq!(asked[0].target, "/base/trust.json?serial=12");
    assert!(asked.iter().all(|a| a.header("authorization") == Some("Bearer abc")));
    assert!(!format!("{source:?}").contains("abc"));
}

#[tokio::test]
async fn trouble_with_our_own_files_is_not_the_packs_fault() {
    let body = bytes(5000);
    let held = body.clone();
    let server = Server::start(move |_| whole("200 OK", &held)).await;
    let (_, outcome) = download(&server.source(), &want(&body), Path::new("/dev/full"), None).await;
    // Not even opened: parts are regular files.
    let e = outcome.unwrap_err();
    assert_eq!((e.kind, e.verdict()), (FetchErrorKind::Local, Verdict::Retry), "{e}");
}

#[test]
fn urls_that_cannot_work_are_refused_without_telling_secrets() {
    for (url, expected) in [
        ("file:objects", "absolute"),
        ("file://host/objects", "absolute"),
        ("objects", "file:///dir"),
        ("ftp://host/x", "unknown"),
        ("s3:///prefix", "s3://bucket/prefix"),
    ] {
        let e = Source::parse(url, &SourceOptions::default()).unwrap_err().to_string();
        assert!(e.contains(expected), "{url}: {e}");
    }
    let e = Source::parse("ftp://user:hunter2@host/x?sig=hunter2", &SourceOptions::default()).unwrap_err().to_string();
    assert!(!e.contains("hunter2") && e.contains("host/x"), "{e}");
    let s = Source::parse("http://user:hunter2@host/x?sig=hunter2", &SourceOptions::default()).unwrap();
    assert_eq!(s.url(), "http://host/x");
    let options = SourceOptions { ca_file: Some("/no/such.pem".into()), ..Default::default() };
    assert!(Source::parse("https://host/", &options).unwrap_err().to_string().contains("/no/such.pem"));
}

#[test]
fn a_body_that_was_bent_does_not_fit_its_etag() {
    let body = b"{\"price@zone-west\":2}";
    let etag = Etag::of(body);
    assert!(etag.fits(body) && !etag.fits(b"{\"price@zone-wesu\":2}"));
    // Of other servers nothing is known.
    for other in ["\"67e5f1a2-1b\"", "W/\"abc\"", "\"1\""] {
        assert!(Etag(other.into()).fits(body), "{other}");
    }
}

/// A source of the bucket that a server on this machine plays.
fn bucket_at(server: &Server) -> Source {
    let keys = AmazonS3Builder::new().with_access_key_id("k").with_secret_access_key("s").with_region("us-east-1");
    let s3 = S3Options { endpoint: Some(format!("http://{}", server.address)), ..Default::default() };
    let url = "s3://bucket/base";
    let options = SourceOptions { s3, ..Default::default() };
    let bucket = bucket::Bucket::build(keys, &url::Url::parse(url).unwrap(), &options).unwrap();
    Source { url: url.into(), kind: Kind::Bucket(bucket) }
}

#[tokio::test]
async fn a_page_without_end_that_a_bucket_answers_with_is_told_in_brief() {
    let server = Server::start(|_| {
        let page = "€ no entry ".repeat(4000);
        let mut then = reply("403 Forbidden", &[("content-length", (1u64 << 40).to_string())], page.as_bytes());
        then.push(Then::Wait(60_000));
        then
    })
    .await;
    let source = bucket_at(&server);
    let got = source.get_small(&ObjectName::Trust, None, None, 1 << 20);
    // After 30 s without a byte it would be given up.
    let e = tokio::time::timeout(Duration::from_secs(25), got).await.expect("it is not read to its end").unwrap_err();
    assert_eq!(e.kind, FetchErrorKind::Unauthorized, "{e}");
    assert!((400..=500).contains(&e.detail.len()), "{}", e.detail.len());
}

/// A download waits for it, and the stream with it.
#[tokio::test]
async fn an_error_that_a_bucket_drips_is_told_as_far_as_it_came() {
    let server = Server::start(|_| {
        let mut then = reply("403 Forbidden", &[("content-length", "16000".into())], b"no entry ");
        then.extend((0..600).flat_map(|_| [Then::Wait(100), Then::Send(b".".to_vec())]));
        then
    })
    .await;
    let source = bucket_at(&server);
    let dir = tempfile::tempdir().unwrap();
    let (wanted, part) = (want(&bytes(5000)), dir.path().join("x.part"));
    let got = download(&source, &wanted, &part, None);
    let (_, got) = tokio::time::timeout(Duration::from_secs(30), got).await.expect("it is not waited for");
    let e = got.unwrap_err();
    assert_eq!(e.kind, FetchErrorKind::Unauthorized, "{e}");
    assert!(e.detail.contains("no entry"), "{e}");
}

#[test]
fn only_whole_bodies_with_a_wrong_hash_or_length_say_something_about_the_object() {
    use FetchErrorKind::*;
    assert_eq!(
        [WrongHash, TooLong, TooShort].map(FetchErrorKind::wrong_body),
        [Some("WRONG_HASH"), Some("TOO_LONG"), Some("TOO_SHORT")]
    );
    let status = Status { code: 503, retry_after: None };
    for kind in [NotFound, Unauthorized, Network, status, NotWhole, NotAnObject, Slow, Disk, Local, Halt] {
        assert_eq!(kind.wrong_body(), None, "{kind:?}");
    }
}

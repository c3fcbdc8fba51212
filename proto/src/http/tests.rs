//! The loop against clients that behave, and many that do not.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use super::*;
use hyper::header::{HeaderValue, IF_NONE_MATCH};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

fn ms(n: u64) -> HumanDuration {
    HumanDuration(Duration::from_millis(n))
}

/// What a loaded machine may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lets the server go on until it holds.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::task::yield_now().await;
    }
}

fn quick() -> HttpLimits {
    HttpLimits {
        head_timeout: ms(300),
        body_timeout: ms(400),
        answer_timeout: ms(1500),
        stall: ms(400),
        drain: ms(400),
        ..HttpLimits::default()
    }
}

const OBJECT: &[u8] = b"0123456789";

async fn handler(request: Request<Inbound>, peer: SocketAddr) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match parts.uri.path() {
        "/echo" => match read_body(body, 100).await {
            Ok(bytes) => json(StatusCode::OK, bytes),
            Err(e) => text(e.status(), &e.to_string()),
        },
        "/peer" => text(StatusCode::OK, &peer.ip().to_string()),
        "/slow" => {
            tokio::time::sleep(Duration::from_millis(200)).await;
            text(StatusCode::OK, "done")
        }
        "/never" => std::future::pending().await,
        "/panic" => panic!("on purpose"),
        "/big" => Response::new(vec![b'x'; 64 << 20].into()),
        "/object" => {
            let of = Served {
                content_type: HeaderValue::from_static("application/gzip"),
                cache_control: HeaderValue::from_static("public, max-age=31536000, immutable"),
                etag: HeaderValue::from_static("\"e\""),
                length: 10,
            };
            answer_object(&parts.headers, &of, |start, n| OBJECT[start as usize..(start + n) as usize].into())
        }
        _ => empty(StatusCode::NOT_FOUND),
    }
}

struct Running {
    address: SocketAddr,
    gate: Arc<Gate>,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

async fn start(limits: HttpLimits) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let gate = Arc::new(Gate::new(limits).with_slow(&["/slow"]));
    let shutdown = async move { drop(stopped.await) };
    let task = tokio::spawn(serve_gated(listener, gate.clone(), shutdown, handler));
    Running { address, gate, stop: Some(stop), task }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }
    /// Sends, half-closes nothing, and reads to the end.
    async fn talk(&self, request: &str) -> String {
        let mut s = self.connect().await;
        s.write_all(request.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        let _ = s.read_to_end(&mut all).await;
        String::from_utf8_lossy(&all).into_owned()
    }
    async fn get(&self, path: &str) -> String {
        self.talk(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }
}

/// How long the server leaves a connection open, in ms.
async fn until_closed(mut s: TcpStream) -> u128 {
    let start = Instant::now();
    let mut sink = vec![0; 1 << 16];
    while let Ok(Ok(1..)) = tokio::time::timeout(PATIENCE, s.read(&mut sink)).await {}
    start.elapsed().as_millis()
}

#[tokio::test]
async fn requests_are_answered_and_connections_kept() {
    let server = start(quick()).await;
    assert!(server.get("/peer").await.ends_with("127.0.0.1\n"));
    assert!(server.get("/nothing").await.starts_with("HTTP/1.1 404"));
    // Three on one connection, the first two pipelined.
    let mut s = server.connect().await;
    let echo = |body: &str| format!("POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    s.write_all((echo("one") + &echo("two")).as_bytes()).await.unwrap();
    let mut seen = String::new();
    while !seen.contains("two") {
        let mut buf = [0; 1024];
        let n = s.read(&mut buf).await.unwrap();
        assert!(n > 0, "closed after {seen:?}");
        seen += std::str::from_utf8(&buf[..n]).unwrap();
    }
    assert!(seen.contains("one"));
    s.write_all(echo("three").as_bytes()).await.unwrap();
    let mut buf = [0; 1024];
    let n = s.read(&mut buf).await.unwrap();
    assert!(buf[..n].ends_with(b"three"));
    // Bodies in chunks are not read.
    let chunked = "POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    assert!(server.talk(chunked).await.starts_with("HTTP/1.1 411"), "our clients know their bodies' lengths");
}

/// One that asks often enough is never silent: it gives its place back all the same, with an answer and not between two.
#[tokio::test]
async fn a_connection_that_is_old_is_closed_with_its_next_answer() {
    const ASK: &str = "GET /peer HTTP/1.1\r\nhost: x\r\n\r\n";
    for (life, answers) in [(ms(60_000), 2), (ms(0), 1)] {
        let server = start(HttpLimits { life, ..quick() }).await;
        let seen = server.talk(&ASK.repeat(2)).await;
        let said = (seen.matches("127.0.0.1\n").count(), seen.contains("connection: close"));
        assert_eq!(said, (answers, answers == 1), "{life}: {seen}");
    }
}

#[tokio::test]
async fn objects_are_answered_by_etag_and_range() {
    let server = start(quick()).await;
    let ask = |method: &str, header: &str| {
        format!("{method} /object HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n")
    };
    let whole = server.talk(&ask("GET", "")).await;
    assert!(whole.starts_with("HTTP/1.1 200") && whole.ends_with("\r\n\r\n0123456789"), "{whole}");
    assert!(
        whole.contains("etag: \"e\"") && whole.contains("accept-ranges: bytes") && whole.contains("immutable"),
        "{whole}"
    );
    let head = server.talk(&ask("HEAD", "")).await;
    assert!(head.contains("content-length: 10") && head.ends_with("\r\n\r\n"), "{head}");
    let part = server.talk(&ask("GET", "range: bytes=3-\r\n")).await;
    assert!(
        part.starts_with("HTTP/1.1 206")
            && part.contains("content-range: bytes 3-9/10")
            && part.ends_with("\r\n\r\n3456789"),
        "{part}"
    );
    let past = server.talk(&ask("GET", "range: bytes=10-\r\n")).await;
    assert!(past.starts_with("HTTP/1.1 416") && past.contains("content-range: bytes */10"), "{past}");
    let same = server.talk(&ask("GET", &format!("{IF_NONE_MATCH}: \"e\"\r\n"))).await;
    assert!(same.starts_with("HTTP/1.1 304") && same.contains("etag: \"e\"") && same.ends_with("\r\n\r\n"), "{same}");
}

#[tokio::test]
async fn slow_clients_are_cut() {
    let server = start(quick()).await;
    let begin = |text: &'static str| async {
        let mut s = server.connect().await;
        s.write_all(text.as_bytes()).await.unwrap();
        s
    };
    // Silent; a head begun; a body stalled.
    for (text, least) in [
        ("", 250),
        ("GET / HTTP/1.1\r\nhost: x\r\n", 250),
        ("POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nabc", 350),
    ] {
        let open = until_closed(begin(text).await).await;
        assert!((least..PATIENCE.as_millis()).contains(&open), "{text:?}: {open} ms");
    }
    // Idle after an answer.
    let open = until_closed(begin("GET /peer HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
    assert!((250..PATIENCE.as_millis()).contains(&open), "{open} ms");
    // Tricklers, of heads and of bodies.
    for text in ["GET / HTTP/1.1\r\nx: ", "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n"] {
        let (mut read, mut write) = begin(text).await.into_split();
        let drip = tokio::spawn(async move {
            while write.write_all(b"a").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
        });
        let start = Instant::now();
        let mut sink = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, read.read_to_end(&mut sink)).await;
        assert!(start.elapsed() < PATIENCE, "{text:?}: {:?}", start.elapsed());
        drip.abort();
    }
    assert_eq!(server.gate.open(), 0);
}

#[tokio::test]
async fn clients_that_do_not_read_are_cut_and_slow_readers_are_not() {
    let server = start(HttpLimits { stall_bytes: 1 << 20, ..quick() }).await;
    let mut s = server.connect().await;
    s.write_all(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let begun = Instant::now();
    until("it is taken", || server.gate.open() > 0).await;
    while server.gate.open() > 0 {
        assert!(begun.elapsed() < PATIENCE, "still open");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(begun.elapsed() > Duration::from_millis(350), "{:?}", begun.elapsed());
    drop(s);
    // 8 MiB/s is slower than the server, and far above a floor of 0.1 MiB/s, on a busy machine too.
    let server = start(HttpLimits { stall_bytes: 1 << 20, stall: ms(10_000), ..quick() }).await;
    let mut s = server.connect().await;
    s.write_all(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let (mut total, mut buf) = (0, vec![0; 1 << 20]);
    loop {
        let n = s.read(&mut buf).await.unwrap();
        if n == 0 {
            break;
        }
        total += n;
        if total < 16 << 20 {
            tokio::time::sleep(Duration::from_secs_f64(n as f64 / f64::from(8 << 20))).await;
        }
    }
    assert!(total > 64 << 20);
}

/// The kernel takes megabytes before it lets us wait, and takes more only when a third of them is read: a client at fifty
/// times the floor may look like one that stands still.
#[tokio::test]
async fn a_slow_reader_is_not_cut_for_what_the_kernel_holds() {
    let server = start(HttpLimits { stall: ms(1000), ..quick() }).await;
    let mut s = server.connect().await;
    s.write_all(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let (mut total, mut buf) = (0, vec![0; 16 << 10]);
    while total < 12 << 20 {
        let n = s.read(&mut buf).await.unwrap();
        assert!(n > 0, "cut after {total}");
        total += n;
        tokio::time::sleep(Duration::from_secs_f64(n as f64 / f64::from(512 << 10))).await;
    }
}

#[tokio::test]
async fn heads_that_are_too_large_or_ambiguous_are_refused() {
    let server = start(quick()).await;
    let large = server.talk(&format!("GET / HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n", "x".repeat(20_000))).await;
    assert!(large.starts_with("HTTP/1.1 431") || large.is_empty(), "{large}");
    let many = server.talk(&format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(70))).await;
    assert!(many.starts_with("HTTP/1.1 431"), "{many}");
    // Nothing is smuggled behind: the connection ends.
    let both = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 60\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /peer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answers = server.talk(both).await;
    assert!(answers.starts_with("HTTP/1.1 411") && answers.contains("connection: close"), "{answers}");
    assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
    let twice = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd";
    assert!(server.talk(twice).await.starts_with("HTTP/1.1 400"));
    assert!(
        server.talk("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.starts_with("HTTP/1.1 400") || server.gate.open() == 0
    );
    let long =
        server.talk(&format!("POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 101\r\n\r\n{}", "x".repeat(101))).await;
    assert!(long.starts_with("HTTP/1.1 413"), "{long}");
}

#[tokio::test]
async fn a_panic_is_a_500_and_no_end() {
    let server = start(quick()).await;
    assert!(server.get("/panic").await.starts_with("HTTP/1.1 500"));
    assert!(server.get("/peer").await.starts_with("HTTP/1.1 200"));
    // Before the handler's first await too.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let at_once = |_: Request<Inbound>, _: SocketAddr| -> std::future::Ready<Response<Body>> { panic!("on purpose") };
    tokio::spawn(serve(listener, quick(), std::future::pending(), at_once));
    let mut s = TcpStream::connect(address).await.unwrap();
    s.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    s.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_a_503() {
    let server = start(quick()).await;
    assert!(server.get("/never").await.starts_with("HTTP/1.1 503"));
}

#[tokio::test]
async fn one_address_gets_no_more_than_its_share() {
    let server = start(HttpLimits { per_ip: 3, head_timeout: ms(120_000), ..quick() }).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(server.connect().await);
    }
    until("three are taken", || server.gate.open() == 3).await;
    assert_eq!(server.get("/peer").await, "", "the fourth is closed");
    assert_eq!(server.gate.refused(), 1);
    held.pop();
    until("one has gone", || server.gate.open() == 2).await;
    assert!(server.get("/peer").await.starts_with("HTTP/1.1 200"));
}

/// Connects from one of loopback's many addresses.
async fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((std::net::IpAddr::from(from), 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

#[tokio::test]
async fn floods_do_not_keep_a_till_from_being_served() {
    let limits = HttpLimits { connections: 64, per_ip: 4, reserved: 16, head_timeout: ms(120_000), ..quick() };
    let server = start(limits).await;
    let till = [127, 9, 9, 9];
    server.gate.befriend(till.into());
    let mut hostile = Vec::new();
    // One address with many connections, then many addresses.
    for n in 0..200u8 {
        hostile.push(connect_from([127, 1, 0, 1], server.address).await);
        hostile.push(connect_from([127, 2, 0, n], server.address).await);
    }
    until("all have come", || server.gate.open() + server.gate.refused() as usize == 400).await;
    assert_eq!(server.gate.open(), 48);
    for _ in 0..20 {
        let mut s = connect_from(till, server.address).await;
        s.write_all(b"GET /peer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        s.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("127.9.9.9\n"), "{answer}");
    }
}

#[tokio::test]
async fn an_order_to_stop_lets_requests_finish_for_a_while() {
    // Nothing but the order ends what waits.
    let limits = HttpLimits { head_timeout: ms(120_000), answer_timeout: ms(120_000), drain: ms(1_000), ..quick() };
    let mut server = start(limits).await;
    let _idle = server.connect().await;
    let (mut slow, mut never) = (server.connect().await, server.connect().await);
    slow.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    never.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until("three are taken", || server.gate.open() == 3).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let start = Instant::now();
    server.stop.take().unwrap().send(()).unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("done\n") && answer.contains("connection: close"), "{answer}");
    server.task.await.unwrap();
    let took = start.elapsed();
    assert!((Duration::from_millis(950)..PATIENCE).contains(&took), "{took:?}");
    assert!(TcpStream::connect(server.address).await.is_err(), "nobody listens");
    assert_eq!(server.gate.open(), 0);
}

#[tokio::test]
async fn files_are_streamed_and_a_cut_file_cuts_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pack");
    let content: Vec<u8> = (0..1_000_003u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let from_file = move |_: Request<Inbound>, _: SocketAddr| {
        // The second time the file is shorter than announced.
        let extra = calls.fetch_add(1, Ordering::Relaxed) as u64 * 10;
        let body = FileBody::new(std::fs::File::open(&path).unwrap(), 3, 1_000_000 + extra);
        std::future::ready(Response::new(Body::File(body)))
    };
    tokio::spawn(serve(listener, quick(), std::future::pending(), from_file));
    for whole in [true, false] {
        let mut s = TcpStream::connect(address).await.unwrap();
        s.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut all = Vec::new();
        let _ = s.read_to_end(&mut all).await;
        let start = all.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        assert_eq!(all[start..] == content[3..], whole);
        assert!(whole || all.len() - start < 1_000_010);
    }
}

#[tokio::test]
async fn tower_services_ride_on_the_loop() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = tower::service_fn(|request: Request<Inbound>| async move {
        let peer = request.extensions().get::<Peer>().copied();
        let seen = peer.map(|p| p.0.ip().to_string()).unwrap_or_default();
        let body = read_body(request.into_body(), 10).await.unwrap();
        Ok::<_, Infallible>(Response::new(http_body_util::Full::new(Bytes::from([seen.as_bytes(), &body].concat()))))
    });
    tokio::spawn(serve(listener, quick(), std::future::pending(), from_tower(service)));
    let mut s = TcpStream::connect(address).await.unwrap();
    s.write_all(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi").await.unwrap();
    let mut answer = String::new();
    s.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("127.0.0.1hi"), "{answer}");
}

#[tokio::test]
async fn what_takes_as_long_as_it_takes_is_answered_all_the_same() {
    let server = start(HttpLimits { answer_timeout: ms(20), ..quick() }).await;
    assert!(server.get("/never").await.starts_with("HTTP/1.1 503"));
    assert!(server.get("/slow").await.ends_with("done\n"));
}

#[test]
fn bounds_that_would_serve_nobody_are_refused() {
    HttpLimits::default().check("http").unwrap();
    for (limits, told) in [
        (HttpLimits { connections: 0, ..quick() }, "http.connections = 0: at least 1"),
        (HttpLimits { per_ip: 0, ..quick() }, "http.per_ip = 0: at least 1"),
        (HttpLimits { head_timeout: ms(0), ..quick() }, "http.head_timeout = \"0s\": at least 100ms"),
    ] {
        assert_eq!(limits.check("http").unwrap_err(), told);
    }
}

#[tokio::test]
async fn a_listener_that_the_system_refuses_waits_before_it_asks_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // One that is shut for reading accepts nothing, and says so at once.
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Read).unwrap();
    let begun = Instant::now();
    assert!(accept(&listener).await.is_none());
    assert!(begun.elapsed() >= REFUSED_PAUSE);
}

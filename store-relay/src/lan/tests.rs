#![allow(clippy::disallowed_methods)]
use super::*;
use crate::config::TryRules;
use crate::kit::{Hq, Make, Store, secret, state};
use crate::relay::{Pace, Relay};
use crate::tries::{self, Cause, Failure};
use proto::clock::Timestamp;
use proto::ids::DeviceId;
use proto::layout::{ObjectName, PackKind};
use proto::wire::{Beat, Fault, Heartbeat, Network};
use std::net::SocketAddr;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// An answer as it came over the wire.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|l| {
            let (n, v) = l.split_once(": ")?;
            n.eq_ignore_ascii_case(name).then_some(v)
        })
    }
}

async fn raw(address: SocketAddr, request: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: all[end + 4..].to_vec() }
}

async fn get(address: SocketAddr, path: &str, headers: &str) -> Answer {
    raw(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n"), b"").await
}

/// A relay with one served stream, listening.
struct Scene {
    hq: Hq,
    store: Store,
    relay: Arc<Relay>,
    address: SocketAddr,
}

impl Scene {
    async fn new() -> Scene {
        let mut hq = Hq::new();
        hq.follow("price", "zone-east");
        hq.publish("price", &[(1, Some("a")), (2, Some("b"))], Make::Full);
        hq.registers.insert("0421-03".parse().unwrap(), secret(33).public());
        hq.sign();
        let store = Store::enrolled(&[hq.url()]);
        let relay = Arc::new(store.open());
        relay.mirror_once(Pace::Once).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let hall = Arc::clone(&relay.hall);
        let stop = hall.stop.clone().cancelled_owned();
        let limits = hall.config.http.clone();
        tokio::spawn(proto::http::serve(listener, limits, stop, move |r, from| {
            answer(Arc::clone(&hall), r, from.ip())
        }));
        Scene { hq, store, relay, address }
    }
    async fn get(&self, path: &str, headers: &str) -> Answer {
        get(self.address, path, headers).await
    }
    async fn post(&self, body: &[u8]) -> (u16, BeatAnswer) {
        let head = format!(
            "POST /v1/heartbeats HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = raw(self.address, &head, body).await;
        (answer.status, serde_json::from_slice(&answer.body).unwrap())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.relay.hall.stop.cancel();
    }
}

fn beat(register: &str, key: u8, seq: u64) -> Vec<u8> {
    saying(register, key, seq, |_| {})
}

fn saying(register: &str, key: u8, seq: u64, change: impl FnOnce(&mut Heartbeat)) -> Vec<u8> {
    let mut beat = Heartbeat {
        format: 1,
        device: register.parse::<DeviceId>().unwrap(),
        run: None,
        seq,
        sent_at: Timestamp::from_second(1_800_000_000).unwrap(),
        program: "pos-agent test".into(),
        serial: Some(1),
        streams: Default::default(),
        network: Network::InStore,
        errors: Vec::new(),
        debts: Vec::new(),
        disk: None,
        clock_skew_s: None,
        registers: Default::default(),
    };
    change(&mut beat);
    let envelope = serde_json::from_slice(&beat.seal(&secret(key)).unwrap()).unwrap();
    serde_json::to_vec(&Beats { beats: vec![Beat { envelope, seen_s: 0 }] }).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_come_whole_in_part_or_not_again() {
    let scene = Scene::new().await;
    let name = ObjectName::Pack(scene.hq.pack("price", 1, PackKind::Full));
    let file = std::fs::read(scene.hq.path(&name)).unwrap();
    let path = format!("/{name}");
    for _ in 0..2 {
        let whole = scene.get(&path, "").await;
        assert_eq!((whole.status, &whole.body), (200, &file));
        assert!(whole.header("cache-control").unwrap().contains("immutable"));
        assert_eq!(whole.header("content-type"), Some("application/gzip"));
    }
    let etag = scene.get(&path, "").await.header("etag").unwrap().to_owned();
    let part = scene.get(&path, "range: bytes=10-\r\n").await;
    assert_eq!((part.status, &part.body[..]), (206, &file[10..]));
    assert_eq!(part.header("content-range").unwrap(), format!("bytes 10-{}/{}", file.len() - 1, file.len()));
    let same = scene.get(&path, &format!("range: bytes=0-4\r\nif-range: {etag}\r\n")).await;
    assert_eq!((same.status, &same.body[..]), (206, &file[..5]));
    let other = scene.get(&path, "range: bytes=0-4\r\nif-range: \"other\"\r\n").await;
    assert_eq!((other.status, other.body.len()), (200, file.len()));
    assert_eq!(scene.get(&path, &format!("range: bytes={}-\r\n", file.len())).await.status, 416);
    let again = scene.get(&path, &format!("if-none-match: {etag}\r\n")).await;
    assert_eq!((again.status, again.body.len()), (304, 0));
    let head = raw(scene.address, &format!("HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"), b"").await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("content-length").unwrap(), file.len().to_string());
    let manifest = scene.get("/stores/0421/manifest.json?serial=7", "").await;
    assert_eq!(manifest.status, 200);
    assert!(manifest.header("cache-control").unwrap().contains("max-age=10"));
    assert_eq!(scene.get("/trust.json", "").await.status, 200);
    assert_eq!(scene.get("/trust/0000000001.json", "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_url_leads_out_of_ok() {
    let scene = Scene::new().await;
    std::fs::write(scene.store.data().join("ok/secret.txt"), "x").unwrap();
    // Written as nginx and CDNs read it, too; once.
    let pack = "/packs/price%40zone-east/0000000001%2Efull.pack";
    assert_eq!(scene.get(pack, "").await.status, 200);
    for path in [
        "/packs/price%2540zone-east/0000000001.full.pack",
        "/packs/price%4zone-east/0000000001.full.pack",
        "/packs/price%",
        "/packs/price%+40zone-east/0000000001.full.pack",
        "/%ff",
        "/secret.txt",
        "/../device.db",
        "/ok/trust.json",
        "/packs/../../device.db",
        "/packs/%2e%2e/%2e%2e/device.db",
        "/packs/price@zone-east/../../../device.db",
        "/packs//price@zone-east/0000000001.full.pack",
        "/stores/0421/manifest.json/",
        "/stores/0999/manifest.json",
        "//trust.json",
        "/packs/price@zone-east/0000000001.full.pack%00",
    ] {
        assert_eq!(scene.get(path, "").await.status, 404, "{path}");
    }
    let put = raw(
        scene.address,
        "PUT /trust.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 1\r\n\r\n",
        b"x",
    )
    .await;
    assert_eq!(put.status, 405);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_poll_answers_at_once_on_news_and_304_at_the_end() {
    let mut scene = Scene::new().await;
    let first = scene.get("/v1/versions", "").await;
    assert_eq!(first.body, b"{\"price@zone-east\":1}");
    let etag = first.header("etag").unwrap().to_owned();
    let known = format!("if-none-match: {etag}\r\n");
    assert_eq!(scene.get("/v1/versions", &known).await.status, 304);
    let started = Instant::now();
    assert_eq!(scene.get("/v1/versions?wait=1", &known).await.status, 304);
    assert!(started.elapsed() >= Duration::from_secs(1));
    // News while three wait.
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let (address, known) = (scene.address, known.clone());
            tokio::spawn(async move { get(address, "/v1/versions?wait=60", &known).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    scene.hq.publish("price", &[(1, Some("c"))], Make::Delta);
    scene.hq.sign();
    let started = Instant::now();
    scene.relay.mirror_once(Pace::Once).await;
    for waiter in waiting {
        let answer = waiter.await.unwrap();
        assert_eq!((answer.status, &answer.body[..]), (200, &b"{\"price@zone-east\":2}"[..]));
        assert_ne!(answer.header("etag"), Some(&*etag));
    }
    assert!(started.elapsed() < Duration::from_secs(55));
    // An ending service lets nobody hang.
    let known = format!("if-none-match: {}\r\n", scene.get("/v1/versions", "").await.header("etag").unwrap());
    let (address, polls) = (scene.address, || scene.relay.hall.metrics.polls.get());
    let before = polls();
    let last = tokio::spawn(async move { get(address, "/v1/versions?wait=30", &known).await });
    while polls() == before {
        assert!(!last.is_finished(), "it is asked, or fails");
        tokio::task::yield_now().await;
    }
    scene.relay.hall.stop.cancel();
    assert_eq!(last.await.unwrap().status, 304);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_register_that_has_gone_mad_is_put_off_until_it_has_calmed_down() {
    let scene = Scene::new().await;
    let taken = async |from: u64| {
        let mut taken = 0;
        for seq in from..from + 100 {
            taken += u32::from(scene.post(&beat("0421-03", 33, seq)).await.0 == 200);
        }
        taken
    };
    assert_eq!(taken(1_000).await, 64);
    assert_eq!(scene.post(&beat("0421-03", 33, 2_000)).await.0, 503);
    scene.store.clock.advance(Duration::from_secs(5));
    assert_eq!(taken(3_000).await, 10);
    assert_eq!(scene.relay.hall.spool.beats().unwrap()[0].seq, 3_009);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_are_verified_kept_and_answered() {
    let scene = Scene::new().await;
    let (status, answer) = scene.post(&beat("0421-03", 33, 5)).await;
    assert_eq!((status, answer.refused.len(), answer.hq_seen_s), (200, 0, None));
    assert_eq!(scene.relay.hall.spool.beats().unwrap()[0].seq, 5);
    // One that was copied proves nothing: its register may be dead meanwhile. An older one is refused.
    scene.store.clock.advance(Duration::from_secs(100));
    assert_eq!(scene.post(&beat("0421-03", 33, 5)).await.0, 200);
    let ago = |scene: &Scene| {
        let now = scene.relay.hall.clock.monotonic();
        state(&scene.relay).registers.values().next().unwrap().ago(now).as_secs()
    };
    assert_eq!(ago(&scene), 100);
    let (status, answer) = scene.post(&beat("0421-03", 33, 4)).await;
    assert_eq!((status, answer.refused.contains_key("0421-03")), (200, true));
    assert_eq!(answer.go_on_above["0421-03"], 5, "it was set back: it is to count on from there");
    let (status, answer) = scene.post(&saying("0421-03", 33, 5, |b| b.serial = Some(2))).await;
    assert_eq!((status, answer.go_on_above.get("0421-03")), (200, Some(&5)), "another one by the same number");
    assert_eq!(answer.refused["0421-03"], "number 5 was another heartbeat's");
    // By its key, and of a later build: it is told so, and no other list is asked for.
    let (status, answer) = scene.post(&saying("0421-03", 33, 6, |b| b.format = 2)).await;
    assert_eq!((status, answer.refused.contains_key("0421-03")), (200, true));
    // Not its key; nobody's key; the relay's own id.
    for (who, key) in [("0421-03", 34), ("0421-09", 33)] {
        let (status, answer) = scene.post(&beat(who, key, 9)).await;
        assert_eq!((status, answer.refused.contains_key(who)), (401, true), "{who}");
    }
    assert!(scene.post(&beat("0421", 21, 9)).await.1.refused.contains_key("0421"));
    assert_eq!(state(&scene.relay).registers.len(), 1);
    // How long ago it was heard is nobody's signed word: nonsense is bounded, and breaks nothing.
    let mut old: serde_json::Value = serde_json::from_slice(&beat("0421-03", 33, 6)).unwrap();
    old["beats"][0]["seen_s"] = u64::MAX.into();
    assert_eq!(scene.post(&serde_json::to_vec(&old).unwrap()).await.0, 200);
    assert_eq!(ago(&scene), 400 * 86_400);
    assert_eq!(scene.get("/", "").await.status, 200);
    // Envelopes alone are taken, too.
    let next: Beats = serde_json::from_slice(&beat("0421-03", 33, 8)).unwrap();
    let alone = serde_json::to_vec(&next.beats[0].envelope).unwrap();
    let (status, answer) = scene.post(&alone).await;
    assert_eq!((status, answer.passed_on.len(), answer.refused.len()), (200, 1, 0));
    let many: Beats = serde_json::from_slice(&beat("0421-03", 33, 7)).unwrap();
    let many = serde_json::to_vec(&Beats { beats: vec![many.beats[0].clone(); 17] }).unwrap();
    let head = format!(
        "POST /v1/heartbeats HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        many.len()
    );
    assert_eq!(raw(scene.address, &head, &many).await.status, 413);
    // An unknown register made the relay ask for the manifest anew.
    let woken = tokio::time::timeout(Duration::from_secs(1), scene.relay.hall.wake.notified()).await;
    assert!(woken.is_ok());
    let bad = raw(
        scene.address,
        "POST /v1/heartbeats HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n",
        b"{]",
    )
    .await;
    assert_eq!(bad.status, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_cannot_be_kept_is_told_until_one_can() {
    let scene = Scene::new().await;
    let open = || rusqlite::Connection::open(scene.store.data().join(crate::spool::FILE)).unwrap();
    // Once a process the file is begun anew.
    open().execute_batch("ALTER TABLE beat RENAME TO elsewhere").unwrap();
    assert_eq!(scene.post(&beat("0421-03", 33, 4)).await.0, 200);
    assert_eq!(scene.relay.hall.spool.events(1).unwrap()[0].code, "SPOOL_LOST");
    let db = open();
    db.execute_batch("ALTER TABLE beat RENAME TO elsewhere").unwrap();
    assert_eq!(scene.post(&beat("0421-03", 33, 5)).await.0, 503);
    let faults = || state(&scene.relay).faults.values().map(|f| (f.code.clone(), f.object.clone())).collect::<Vec<_>>();
    assert_eq!(faults(), [("LOCAL_FILES".to_owned(), Some("relay.db".to_owned()))]);
    db.execute_batch("ALTER TABLE elsewhere RENAME TO beat").unwrap();
    assert_eq!(scene.post(&beat("0421-03", 33, 5)).await.0, 200);
    assert!(faults().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_register_that_was_enrolled_anew_begins_its_numbers_anew() {
    let mut scene = Scene::new().await;
    scene.post(&beat("0421-03", 33, 500)).await;
    scene.hq.registers.insert("0421-03".parse().unwrap(), secret(35).public());
    scene.hq.sign();
    assert_eq!(scene.post(&beat("0421-03", 35, 1)).await.0, 401);
    scene.relay.mirror_once(Pace::Once).await;
    assert_eq!(scene.post(&beat("0421-03", 35, 1)).await.0, 200);
    assert_eq!(scene.post(&beat("0421-03", 33, 501)).await.0, 401, "the old key is no longer listed");
    // An expired manifest still authenticates.
    scene.store.clock.advance(Duration::from_secs(60 * 86_400));
    assert_eq!(scene.post(&beat("0421-03", 35, 2)).await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_figures_and_the_page_say_how_it_stands() {
    let scene = Scene::new().await;
    scene.post(&beat("0421-03", 33, 5)).await;
    // Neither the same again, nor a stranger's, nor none is one more.
    for body in [beat("0421-03", 33, 5), beat("0421-09", 33, 9), b"{\"beats\":[]}".to_vec()] {
        scene.post(&body).await;
    }
    assert_eq!(scene.get("/healthz", "").await.status, 200);
    assert_eq!(scene.get("/readyz", "").await.status, 200);
    let figures = String::from_utf8(scene.get("/metrics", "").await.body).unwrap();
    for line in [
        "tillcast_relay_version{stream=\"price@zone-east\"} 1",
        "tillcast_relay_register_seen_seconds{register=\"0421-03\"} 0",
        "tillcast_relay_heartbeats_total 1",
    ] {
        assert!(figures.contains(line), "{line}\n{figures}");
    }
    let answer = scene.get("/", "").await;
    assert!(answer.header("content-security-policy").unwrap().starts_with("default-src 'none'; style-src 'self'"));
    assert_eq!(scene.get("/style.css", "").await.header("content-type"), Some("text/css; charset=utf-8"));
    let page = String::from_utf8(answer.body).unwrap();
    for words in ["Store 0421", "All data is up to date", "0421-03", "just now", "data comes from answers"] {
        assert!(page.contains(words), "{words}\n{page}");
    }
    assert!(
        !page.contains("Headquarters is connected") && !page.contains("What happened"),
        "nobody knows, nothing did"
    );
    assert_eq!(scene.get("/v1/errors", "").await.body, b"[]");
    scene.relay.hall.fault(fault::HALTED, None, "", "fsync failed <b>");
    assert_eq!(scene.get("/healthz", "").await.status, 503);
    let page = String::from_utf8(scene.get("/", "").await.body).unwrap();
    assert!(page.contains("fsync failed &lt;b&gt;") && page.contains("needs attention"));
}

/// A register keeps this word while its relay is silent, and reads a bucket that may have the right bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_sources_gave_bent_is_not_told_to_registers_as_given_up() {
    let scene = Scene::new().await;
    let (name, hall) = (scene.hq.pack("price", 1, PackKind::Full), &scene.relay.hall);
    let sha256 = scene.hq.lines["price"].entries[0].sha256;
    let rules = TryRules { limit: 1, ..TryRules::default() };
    for (cause, told) in [(Cause::Hash, 0), (Cause::Content, 1), (Cause::Crash, 1)] {
        let failure = Failure { cause, code: "X".into(), reason: "because".into(), unheard: false };
        let attempts = tries::count(None, sha256, failure, hall.clock.now(), &rules, &hall.judge);
        state(&scene.relay).attempts.insert(name.clone(), attempts);
        let faults: Vec<Fault> = serde_json::from_slice(&scene.get("/v1/errors", "").await.body).unwrap();
        assert_eq!(faults.len(), told, "{cause:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_event_log_is_shown_newest_last() {
    let scene = Scene::new().await;
    for n in 0..60 {
        scene.relay.hall.event("BIT_ROT", &format!("pack {n}"), "found <b> by a test");
    }
    let status = crate::control::obey(&scene.relay, crate::control::Order::Status).await.report;
    let events = status["events"].as_array().unwrap();
    assert_eq!((events.len(), &events[49]["subject"], &events[49]["code"]), (50, &"pack 59".into(), &"BIT_ROT".into()));
    assert_eq!(events[0]["subject"], "pack 10");
    assert_eq!(status["id"], "0421");
    let page = String::from_utf8(scene.get("/", "").await.body).unwrap();
    assert!(page.find("pack 10").unwrap() < page.find("pack 59").unwrap() && !page.contains("pack 9<"));
    assert!(page.contains("found &lt;b&gt; by a test") && page.contains("2026-11-21 12:00:00Z"), "{page}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headquarters_is_seen_for_two_minutes_and_sources_for_two_polls() {
    let mut store = Store::enrolled(&[]);
    store.config.hq = Some("http://127.0.0.1:9".into());
    store.config.poll.0 = Duration::from_secs(600);
    let relay = store.open();
    let seen = || {
        let now = relay.hall.clock.monotonic();
        let mut state = state(&relay);
        (state.hq_seen, state.source_seen) = (Some(now), Some(now));
    };
    seen();
    for (later, network) in
        [(120, Network::Online), (1, Network::InStore), (1079, Network::InStore), (1, Network::Offline)]
    {
        store.clock.advance(Duration::from_secs(later));
        assert_eq!(relay.hall.network(), network, "{later}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_relay_is_alive_and_not_ready() {
    let store = Store::enrolled(&[]);
    let relay = store.open();
    assert!(relay.hall.state().is_ready().unwrap_err().contains("no manifest"));
    assert!(page::page(&relay.hall).contains("No data was received yet"));
}

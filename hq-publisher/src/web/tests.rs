#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use crate::config::{AudienceKind, StreamConfig};
use crate::ledger::{
    Acquired, Adopted, Head, Made, NewManifest, News, ReceiptRow, SignStore, StoreSeen, TakenOver, WasPut, Which,
};
use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use proto::clock::TestClock;
use proto::digest::Sha256;
use proto::dsse::Envelope;
use proto::keys::SecretKey;
use proto::wire::{Beat, BeatAnswer, Fault, Heartbeat, Receipt, StreamReport, StreamState, fault};
use std::collections::{BTreeMap, BTreeSet};
use tillcast_tests::{PATIENCE, until};
use tower::ServiceExt;

struct World {
    _dir: tempfile::TempDir,
    app: Arc<App>,
    clock: Arc<TestClock>,
    stop: watch::Sender<bool>,
}

impl World {
    async fn new() -> World {
        World::on("sqlite:state/fleet.db").await
    }
    async fn on(database: &str) -> World {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hq.toml");
        // Whether the disk of this machine is nearly full is no matter of these tests.
        let text = format!(
            "[source]\nurl = \"sqlite:hq.db\"\n[objects]\nurls = [\"file:objects\"]\n[state]\ndir = \"state\"\n\
             database = \"{database}\"\n[stores]\nquery = \"SELECT 1\"\n[alerts]\ndisk_low_percent = 0\n"
        );
        std::fs::write(&file, text).unwrap();
        let config = crate::config::load(Some(&file), []).unwrap().value;
        let clock = Arc::new(TestClock::at("2026-01-01T00:00:00Z"));
        let (stop, stopping) = watch::channel(false);
        let app = App::open(&config, clock.clone(), stopping).await.unwrap();
        let east = StoreSeen {
            id: "1".parse().unwrap(),
            zone: Some("east".parse().unwrap()),
            region: Some("<b>North</b>".into()),
        };
        app.ledger.see_stores(&[east], clock.now()).await.unwrap();
        for (n, id) in [(1, "1"), (2, "1-1")] {
            app.ledger.enrol(&id.parse().unwrap(), &key(n).public(), clock.now()).await.unwrap();
        }
        app.wakes.refresh(&app.ledger).await.unwrap();
        World { _dir: dir, app, clock, stop }
    }

    async fn ask(&self, request: Request<Body>) -> (StatusCode, HeaderMap, String) {
        let response = self.app.router().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        (head.status, head.headers, String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap())
    }
    async fn get(&self, path: &str) -> (StatusCode, String) {
        let (status, _, body) = self.ask(Request::get(path).body(Body::empty()).unwrap()).await;
        (status, body)
    }
    async fn post(&self, beat: &Heartbeat, by: &SecretKey) -> (StatusCode, String) {
        let envelope: Envelope = serde_json::from_slice(&beat.seal(by).unwrap()).unwrap();
        let body = serde_json::to_vec(&Beats { beats: vec![Beat { envelope, seen_s: 0 }] }).unwrap();
        let (status, _, text) = self.ask(Request::post("/v1/heartbeats").body(body.into()).unwrap()).await;
        (status, text)
    }
    async fn beat(&self, beat: &Heartbeat, by: &SecretKey) -> BeatAnswer {
        let (status, text) = self.post(beat, by).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_str(&text).unwrap()
    }
    /// An instance that is published.
    async fn adopt(&self, instance: &str) {
        let acquired = self.app.ledger.acquire("test", self.clock.now(), Duration::from_secs(60)).await.unwrap();
        let Acquired::Lease(token) = acquired else { panic!() };
        let head = Head {
            version: proto::ids::Version::FIRST,
            epoch: 1,
            schema: 1,
            digests: BTreeMap::new(),
            packs: Vec::new(),
            requires: BTreeMap::new(),
            signed_at: self.clock.now(),
            retired: false,
        };
        let (instance, contract_sha256) = (instance.parse().unwrap(), Sha256::of(b"ddl"));
        let found = Adopted { instance, head, contract_sha256, ddl: "ddl".into() };
        self.app.ledger.adopt(Some(token), &TakenOver::default(), &[found], self.clock.now()).await.unwrap();
    }
    /// Signs and puts a manifest with other content.
    async fn publish(&self) -> u64 {
        let id: StoreId = "1".parse().unwrap();
        let mut make = |s: &SignStore<'_>| {
            Ok(Made::New(NewManifest {
                serial: s.row.next_serial,
                epoch: 1,
                envelope: "{}".into(),
                signer: "k".into(),
                content: Sha256::of(&s.row.next_serial.to_be_bytes()),
                signed_at: self.clock.now(),
                expires_at: self.clock.now(),
            }))
        };
        self.app.ledger.sign(None, News::default(), Which::Only(&id), 9, self.clock.now(), &mut make).await.unwrap();
        let serial = self.app.ledger.store(&id).await.unwrap().unwrap().serial;
        self.app.ledger.manifests_put(&[WasPut { store: id, serial, etag: None }]).await.unwrap();
        serial
    }
    async fn subjects(&self) -> Vec<String> {
        self.app.ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect()
    }
}

fn key(n: u8) -> SecretKey {
    SecretKey::from_seed([n; 32])
}
fn heartbeat(id: &str, seq: u64) -> Heartbeat {
    Heartbeat::plain(id.parse().unwrap(), seq)
}
fn wake_request(known: Option<&str>, wait: u64) -> Request<Body> {
    let mut r = Request::get(format!("/v1/wake?store=1&wait={wait}"));
    if let Some(known) = known {
        r = r.header(IF_NONE_MATCH, known);
    }
    r.body(Body::empty()).unwrap()
}

#[tokio::test]
async fn a_relay_is_woken_by_its_next_manifest() {
    let w = World::new().await;
    assert_eq!(w.ask(wake_request(None, 0)).await.0, StatusCode::NOT_MODIFIED, "nothing is there yet");
    let one = w.publish().await;
    ticks::wake(&w.app, None).await.unwrap();
    let (status, headers, body) = w.ask(wake_request(None, 30)).await;
    assert_eq!(
        (status, body.as_str(), &headers[ETAG]),
        (StatusCode::OK, "{\"serial\":1}", &HeaderValue::from_static("\"1\""))
    );
    assert_eq!(one, 1);
    assert_eq!(w.ask(wake_request(Some("\"1\""), 0)).await.0, StatusCode::NOT_MODIFIED);

    let app = Arc::clone(&w.app);
    let waiting =
        tokio::spawn(async move { app.router().oneshot(wake_request(Some("\"1\""), 30)).await.unwrap().status() });
    while w.app.metrics.waiting.get() == 0 {
        tokio::task::yield_now().await;
    }
    w.publish().await;
    ticks::wake(&w.app, None).await.unwrap();
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);
    // One who has a manifest that was only signed anew, or more, waits on.
    assert_eq!(w.ask(wake_request(Some("W/\"7\""), 0)).await.0, StatusCode::NOT_MODIFIED);
    assert_eq!(w.get("/v1/wake?store=9").await.0, StatusCode::NOT_FOUND);
    assert_eq!(w.get("/v1/wake?store=../x").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(w.get("/v1/wake").await.0, StatusCode::BAD_REQUEST);
    // Stopping ends waits at once.
    w.stop.send(true).unwrap();
    assert_eq!(w.ask(wake_request(Some("\"2\""), 30)).await.0, StatusCode::NOT_MODIFIED);
}

#[tokio::test]
async fn silence_is_mailed_once_and_its_end_too() {
    let w = World::new().await;
    let s = Duration::from_secs;
    assert!(w.beat(&heartbeat("1", 1), &key(1)).await.refused.is_empty());
    assert!(w.beat(&heartbeat("1-1", 1), &key(2)).await.refused.is_empty());
    for (pass, mails) in [(299, 0), (1, 1), (3600, 1)] {
        w.clock.advance(s(pass));
        ticks::alerts(&w.app).await.unwrap();
        assert_eq!(w.subjects().await.len(), mails, "after {pass} s more");
    }
    assert_eq!(w.subjects().await, ["[Tillcast] Store 1 is silent"]);
    w.beat(&heartbeat("1", 2), &key(1)).await;
    ticks::alerts(&w.app).await.unwrap();
    assert_eq!(w.subjects().await.len(), 1, "one word ends nothing: {:?}", w.subjects().await);
    // The relay is there, the register is not.
    for n in 3..33 {
        w.clock.advance(s(60));
        w.beat(&heartbeat("1", n), &key(1)).await;
        ticks::alerts(&w.app).await.unwrap();
    }
    assert_eq!(
        w.subjects().await[1..],
        ["[Tillcast] Recovered: Store 1 is silent", "[Tillcast] Register 1-1 is silent"]
    );
    w.beat(&heartbeat("1-1", 2), &key(2)).await;
    ticks::alerts(&w.app).await.unwrap();
    assert_eq!(w.subjects().await[3], "[Tillcast] Recovered: Register 1-1 is silent");
}

/// For an hour two `serve` had no ledger, or stood still with their machines. The one that judged goes, right after it.
#[tokio::test]
async fn who_takes_over_from_the_judge_calls_nobody_silent_that_nobody_could_hear() {
    let postgres = tillcast_tests::Postgres::start();
    let w = World::on(&postgres.url("src")).await;
    let mut config = w.app.config.clone();
    config.serve.listen.set_port(config.serve.listen.port() + 1);
    let other = App::open(&config, w.clock.clone(), w.app.stopping.clone()).await.unwrap();
    let tick = config.serve.alert_tick.0;
    w.beat(&heartbeat("1", 1), &key(1)).await;
    w.beat(&heartbeat("1-1", 1), &key(2)).await;
    for pass in [tick, Duration::from_secs(3600)] {
        w.clock.advance(pass);
        ticks::alerts(&w.app).await.unwrap();
        ticks::alerts(&other).await.unwrap();
    }
    let mut passed = Duration::ZERO;
    let holder = async || postgres.sql("src", "SELECT holder FROM lease WHERE name = 'judge'");
    let first = holder().await;
    while holder().await == first {
        (passed, _) = (passed + tick, w.clock.advance(tick));
        ticks::alerts(&other).await.unwrap();
    }
    assert_eq!(w.subjects().await, <[&str; 0]>::default(), "after {passed:?}");
    // From then on it is silence.
    while passed < Duration::from_secs(300) {
        (passed, _) = (passed + tick, w.clock.advance(tick));
        ticks::alerts(&other).await.unwrap();
    }
    assert_eq!(w.subjects().await, ["[Tillcast] Store 1 is silent"]);
}

/// What posts leave in SQLite's log, which none of them waits for.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_log_of_the_ledger_is_brought_home_by_itself() {
    let w = World::new().await;
    let file = w._dir.path().join("state/fleet.db");
    let bytes = || std::fs::metadata(&file).unwrap().len();
    let before = bytes();
    for n in 0..200 {
        w.app.ledger.set_fact(&format!("f{n}"), &"x".repeat(30_000)).await.unwrap();
    }
    assert_eq!(bytes(), before, "6 MB are in the log alone");
    let mut loops = JoinSet::new();
    start_loops(&w.app, &mut loops);
    until(PATIENCE, "the log is brought home", || bytes() > before + (5 << 20));
    w.stop.send(true).unwrap();
    while loops.join_next().await.is_some() {}
}

/// Its new machine is there tomorrow; `serve` is started anew meanwhile.
#[tokio::test]
async fn a_device_that_is_enrolled_anew_is_back_when_it_is_heard() {
    let mut w = World::new().await;
    let minute = async |w: &World| {
        w.clock.advance(Duration::from_secs(60));
        ticks::alerts(&w.app).await.unwrap();
    };
    w.beat(&heartbeat("1", 1), &key(1)).await;
    w.beat(&heartbeat("1-1", 1), &key(2)).await;
    for _ in 0..5 {
        minute(&w).await;
    }
    let silent = "[Tillcast] Store 1 is silent";
    assert_eq!(w.subjects().await, [silent]);
    w.app.ledger.enrol(&"1".parse().unwrap(), &key(3).public(), w.clock.now()).await.unwrap();
    let (stop, stopping) = watch::channel(false);
    w.app = App::open(&w.app.config, w.clock.clone(), stopping).await.unwrap();
    w.stop = stop;
    for _ in 0..40 {
        minute(&w).await;
    }
    assert_eq!(w.subjects().await, [silent], "nobody was heard");
    // Now it is there, and its register has time.
    for seq in 1..30 {
        w.beat(&heartbeat("1", seq), &key(3)).await;
        minute(&w).await;
    }
    assert_eq!(w.subjects().await, [silent, "[Tillcast] Recovered: Store 1 is silent"]);
    w.beat(&heartbeat("1", 30), &key(3)).await;
    minute(&w).await;
    assert_eq!(w.subjects().await[2..], ["[Tillcast] Register 1-1 is silent"]);
    // Nor is that over by a new code for it, or because its relay is revoked.
    w.app.ledger.enrol(&"1-1".parse().unwrap(), &key(4).public(), w.clock.now()).await.unwrap();
    let (stop, stopping) = watch::channel(false);
    w.app = App::open(&w.app.config, w.clock.clone(), stopping).await.unwrap();
    w.stop = stop;
    w.app.ledger.revoke(&"1".parse().unwrap(), w.clock.now()).await.unwrap();
    for _ in 0..40 {
        minute(&w).await;
    }
    assert_eq!(w.subjects().await.len(), 3, "{:?}", w.subjects().await);
}

/// PostgreSQL is started anew, the ledger's disk is full, or the process stands still: the stores are heard by nobody, and
/// come again within the next minutes.
#[tokio::test]
async fn nobody_is_silent_because_headquarters_did_not_hear() {
    for (table, looks) in [("change", true), ("beat", true), ("beat", false)] {
        let w = World::new().await;
        let minute = || w.clock.advance(Duration::from_secs(60));
        for seq in 1..4 {
            w.beat(&heartbeat("1", seq), &key(1)).await;
            ticks::alerts(&w.app).await.unwrap();
            minute();
        }
        let db = rusqlite::Connection::open(w.app.config.state.dir.join("fleet.db")).unwrap();
        db.execute_batch(&format!("ALTER TABLE {table} RENAME TO away")).unwrap();
        for seq in 4..12 {
            if looks {
                assert_eq!(w.post(&heartbeat("1", seq), &key(1)).await.0, StatusCode::SERVICE_UNAVAILABLE);
                // It may be able to read.
                let _ = ticks::alerts(&w.app).await;
            }
            minute();
        }
        db.execute_batch(&format!("ALTER TABLE away RENAME TO {table}")).unwrap();
        let of_stores = async || -> Vec<String> {
            w.subjects().await.into_iter().filter(|s| !s.contains("Headquarters can keep no heartbeats")).collect()
        };
        for later in 0..4 {
            ticks::alerts(&w.app).await.unwrap();
            assert!(of_stores().await.is_empty(), "{table}, {looks}, {later} min later");
            minute();
        }
        // By the second it could be heard for long enough.
        for _ in 0..2 {
            ticks::alerts(&w.app).await.unwrap();
            minute();
        }
        assert_eq!(of_stores().await, ["[Tillcast] Store 1 is silent"], "{table}, {looks}");
        // One more in vain, when nobody has posted for long, ends nothing.
        if looks {
            db.execute_batch(&format!("ALTER TABLE {table} RENAME TO away")).unwrap();
            assert_eq!(w.post(&heartbeat("1", 12), &key(1)).await.0, StatusCode::SERVICE_UNAVAILABLE);
            db.execute_batch(&format!("ALTER TABLE away RENAME TO {table}")).unwrap();
            w.clock.advance(Duration::from_secs(9));
            ticks::alerts(&w.app).await.unwrap();
        }
        // That posts came for minutes and could not be kept is told for itself, and over when one is kept.
        let told = ["", "Recovered: "].map(|begin| format!("[Tillcast] {begin}Headquarters can keep no heartbeats"));
        for kept in [0, 1] {
            let mut own = w.subjects().await;
            own.retain(|s| s.contains("Headquarters"));
            assert_eq!(own, if looks { told[..=kept].to_vec() } else { vec![] }, "{table}, {kept}");
            w.beat(&heartbeat("1", 12 + kept as u64), &key(1)).await;
            ticks::alerts(&w.app).await.unwrap();
        }
    }
}

#[tokio::test]
async fn faults_are_mailed_and_shown() {
    let w = World::new().await;
    let mut beat = heartbeat("1", 1);
    beat.errors = vec![Fault {
        code: fault::PACK_IN_ERROR.into(),
        instance: "price@zone-east".parse().ok(),
        object: Some("0000000007.delta.pack".into()),
        text: "<script>alert(1)</script>".into(),
        since: jiff::Timestamp::UNIX_EPOCH,
    }];
    w.adopt("price@zone-east").await;
    let report = StreamReport { version: None, schema: None, digests: BTreeMap::new(), state: StreamState::Drift };
    Arc::make_mut(&mut beat.streams).insert("price@zone-east".parse().unwrap(), report);
    w.beat(&beat, &key(1)).await;
    ticks::alerts(&w.app).await.unwrap();
    ticks::alerts(&w.app).await.unwrap();
    let mails = w.app.ledger.unsent_mails().await.unwrap();
    assert_eq!(mails.len(), 2);
    assert!(mails.iter().any(|m| m.body.contains("0000000007.delta.pack")), "{mails:?}");

    let (status, headers, page) = w.ask(Request::get("/").body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::OK);
    assert!(headers[CONTENT_TYPE].to_str().unwrap().starts_with("text/html"));
    assert!(page.contains("PACK_IN_ERROR") && page.contains("&lt;script&gt;") && !page.contains("<script>"));
    assert!(page.contains("&lt;b&gt;North") && page.contains("A pack of price@zone-east is in error"));
    let (status, metrics) = w.get("/metrics").await;
    assert_eq!(status, StatusCode::OK);
    for line in [
        "tillcast_episodes_open 2",
        "tillcast_mails_waiting 2",
        "tillcast_heartbeats_total 1",
        "tillcast_devices{role=\"relay\",state=\"heard\"} 1",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    // No [mail] in the settings: nothing piles up.
    w.clock.advance(Duration::from_secs(3600));
    ticks::mails(&w.app).await.unwrap();
    assert!(w.subjects().await.is_empty());
}

/// A clock that nobody can ask any more, from some moment on.
#[derive(Debug)]
struct Broken(TestClock, AtomicBool);
impl Clock for Broken {
    fn now(&self) -> Timestamp {
        assert!(!self.1.load(Ordering::Relaxed), "a defect");
        self.0.now()
    }
    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }
}

#[tokio::test]
async fn a_loop_that_dies_ends_the_service() {
    let w = World::new().await;
    let mut config = w.app.config.clone();
    config.serve.listen = ([127, 0, 0, 1], 0).into();
    let clock = Arc::new(Broken(TestClock::at("2026-01-01T00:00:00Z"), AtomicBool::default()));
    // It serves by now; nobody stops it.
    let shutdown = async {
        clock.1.store(true, Ordering::Relaxed);
        std::future::pending().await
    };
    let served = serve(&config, clock.clone(), shutdown);
    let ended = tokio::time::timeout(Duration::from_secs(60), served).await.unwrap();
    assert!(matches!(&ended, Err(ServeError::Loop(e)) if e.is_panic()), "{ended:?}");
}

/// Every hour for days, while nothing else looks at the clock: no bucket is there.
#[tokio::test]
async fn the_time_is_noted_without_a_bucket_and_not_by_a_clock_that_leapt() {
    let w = World::new().await;
    let noted = async || w.app.ledger.latest_time().await.unwrap();
    for _ in 0..72 {
        ticks::time(&w.app).await.unwrap();
        assert_eq!(noted().await, Some(w.clock.now()));
        w.clock.advance(Duration::from_secs(3600));
    }
    ticks::time(&w.app).await.unwrap();
    let right = w.clock.now();
    for hours in [5, 72] {
        w.clock.set(proto::clock::after(right, Duration::from_secs(hours * 3600)));
        assert!(ticks::time(&w.app).await.unwrap_err().contains("--clock-is-right"));
        assert_eq!(noted().await, Some(right), "{hours} hours");
    }
    w.clock.set(right);
    w.clock.advance(Duration::from_secs(600));
    ticks::time(&w.app).await.unwrap();
    assert_eq!(noted().await, Some(w.clock.now()));
}

#[tokio::test]
async fn who_publishes_no_more_is_told_of_once_and_not_for_what_nobody_watched() {
    let mut w = World::new().await;
    let hours = async |w: &World, n: u64| {
        for _ in 0..n {
            w.clock.advance(Duration::from_secs(3600));
            ticks::publishes(&w.app).await.unwrap();
        }
    };
    hours(&w, 100).await;
    assert!(w.subjects().await.is_empty(), "nobody has published yet");
    w.app.ledger.went_through().await.unwrap();
    hours(&w, 95).await;
    w.app.ledger.went_through().await.unwrap();
    hours(&w, 20).await;
    // Off for a weekend: what was watched before counts on.
    w.clock.advance(Duration::from_secs(60 * 3600));
    let (stop, stopping) = watch::channel(false);
    w.app = App::open(&w.app.config, w.clock.clone(), stopping).await.unwrap();
    w.stop = stop;
    ticks::publishes(&w.app).await.unwrap();
    hours(&w, 15).await;
    assert!(w.subjects().await.is_empty());
    hours(&w, 90).await;
    assert_eq!(w.subjects().await, ["[Tillcast] No publish goes through"]);
    let mails = w.app.ledger.unsent_mails().await.unwrap();
    assert!(mails[0].body.contains("for 4 days") && mails[0].body.contains("alerts.no_publish"), "{mails:?}");
}

#[tokio::test]
async fn a_store_that_lives_on_sticks_is_shown_by_its_last_receipt() {
    let w = World::new().await;
    w.adopt("price@all").await;
    let receipt = Receipt {
        format: 1,
        store: "1".parse().unwrap(),
        serial: Some(1),
        versions: BTreeMap::from([("price@all".parse().unwrap(), proto::ids::Version::FIRST)]),
        digests: BTreeMap::new(),
        time: w.clock.now(),
        refusals: Vec::new(),
    };
    let (time, envelope) = (receipt.time, String::from_utf8(receipt.seal(&key(1)).unwrap()).unwrap());
    let row = ReceiptRow { store: receipt.store, time, recorded_at: time, envelope };
    assert!(!w.get("/").await.1.contains("by stick"));
    w.app.ledger.add_receipt(&row).await.unwrap();
    let told = ["by stick 2026-01-01T00:00:00Z", "price@all <b>1</b>"];
    let (_, page) = w.get("/").await;
    assert!(told.iter().all(|t| page.contains(t)), "{page}");
    // What it says itself later is newer.
    w.clock.advance(Duration::from_secs(60));
    let beat = Heartbeat { sent_at: w.clock.now(), ..heartbeat("1", 1) };
    w.beat(&beat, &key(1)).await;
    let (_, page) = w.get("/").await;
    assert!(!told.iter().any(|t| page.contains(t)), "{page}");
}

/// One that never got a new stream, or that of its new zone, names nothing of it.
#[tokio::test]
async fn who_never_got_a_stream_is_counted_as_behind() {
    let mut w = World::new().await;
    let mut config = w.app.config.clone();
    let (name, schema) = ("price".parse().unwrap(), "price.sql".into());
    config.streams.push(StreamConfig {
        name,
        audience: AudienceKind::Zone,
        schema,
        requires: BTreeSet::new(),
        tables: Vec::new(),
    });
    let (stop, stopping) = watch::channel(false);
    w.app = App::open(&config, w.clock.clone(), stopping).await.unwrap();
    w.stop = stop;
    w.adopt("price@zone-east").await;
    let behind = async || {
        let (_, text) = w.get("/metrics").await;
        let line = text.lines().find(|l| l.starts_with("tillcast_devices_behind{")).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(behind().await, "0", "nobody was heard");
    w.beat(&heartbeat("1", 1), &key(1)).await;
    w.beat(&heartbeat("1-1", 1), &key(2)).await;
    assert_eq!(behind().await, "2");
    let mut beat = heartbeat("1", 2);
    let version = Some(proto::ids::Version::FIRST);
    let report = StreamReport { version, schema: None, digests: BTreeMap::new(), state: StreamState::Ok };
    Arc::make_mut(&mut beat.streams).insert("price@zone-east".parse().unwrap(), report);
    w.beat(&beat, &key(1)).await;
    assert_eq!(behind().await, "1");
}

#[tokio::test]
async fn odd_requests() {
    let w = World::new().await;
    assert_eq!(w.get("/healthz").await.0, StatusCode::OK);
    assert_eq!(w.get("/readyz").await.0, StatusCode::OK);
    assert_eq!(w.get("/style.css").await.0, StatusCode::OK);
    assert_eq!(w.get("/nothing").await.0, StatusCode::NOT_FOUND);
    let post = async |body: Vec<u8>| w.ask(Request::post("/v1/heartbeats").body(body.into()).unwrap()).await.0;
    assert_eq!(post(b"x".to_vec()).await, StatusCode::BAD_REQUEST);
    let alone = heartbeat("1", 1).seal(&key(1)).unwrap();
    assert_eq!(post(alone.clone()).await, StatusCode::OK, "an envelope alone is read, if nobody knows it");
    assert_eq!(post([b"[", &alone[..], b"]"].concat()).await, StatusCode::OK);
    let envelope: serde_json::Value = serde_json::from_slice(&alone).unwrap();
    let many = serde_json::to_vec(&vec![envelope; crate::intake::BEATS + 1]).unwrap();
    assert_eq!(post(many).await, StatusCode::PAYLOAD_TOO_LARGE, "none is left out unsaid");
    assert_eq!(post(vec![b' '; 5 << 20]).await, StatusCode::PAYLOAD_TOO_LARGE);
    // Nothing to keep before `init`.
    ticks::manifests(&w.app).await.unwrap();
}

/// Whoever waits for a sign of life hears nothing of a `serve` that lives and judges nobody.
#[tokio::test]
async fn no_sign_of_life_is_given_while_nobody_judges() {
    let w = World::new().await;
    ticks::alerts(&w.app).await.unwrap();
    let patience = w.app.config.serve.alert_tick.0 * 3 + Duration::from_secs(60);
    for (wait, is_given) in [(patience, true), (Duration::from_secs(1), false), (Duration::from_secs(3600), false)] {
        w.clock.advance(wait);
        assert_eq!(ticks::ping(&w.app).await.is_ok(), is_given, "{wait:?} later");
    }
    ticks::alerts(&w.app).await.unwrap();
    ticks::ping(&w.app).await.unwrap();
}

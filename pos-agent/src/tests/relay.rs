//! The relay: long poll, silence, fallback, return; heartbeats; the loopback API; the loops.

use super::kit::*;
use crate::agent::Step;
use crate::cli;
use crate::local_api::HoldAnswer;
use crate::pace::{End, From};
use crate::report;
use crate::run;
use crate::tries::Tries;
use crate::upstream::Heard;
use proto::cli::Exit;
use proto::clock::{Clock as _, SystemClock, boot_id};
use proto::fetch::{Polled, Source, SourceOptions};
use proto::wire::{Fault, Network, Status, StreamState, fault};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tillcast_tests::PATIENCE;
use tokio::net::TcpListener;

const S: Duration = Duration::from_secs(1);

/// Headquarters with `price` at 50 and 51, its relay with 50.
async fn store() -> (Hq, Relay, Register) {
    let mut hq = Hq::new();
    hq.full("price@zone-east", 50, &rows(100, 50));
    hq.delta("price@zone-east", 51, &rows(100, 51));
    hq.sign();
    let (relay, register) = store_of(&hq).await;
    (hq, relay, register)
}

/// Its relay with `price` at 50, and a register.
async fn store_of(hq: &Hq) -> (Relay, Register) {
    let relay = Relay::serving(hq).await;
    relay.lists(&[("price@zone-east", 50)]);
    let register = Register::enrolled(hq, &relay.url, &[hq.url()]);
    (relay, register)
}

#[tokio::test]
async fn the_target_is_the_lesser_of_relay_and_manifest_and_an_advance_stays() {
    let (_hq, relay, r) = store().await;
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(version(&agent, "price@zone-east"), Some(50));
    relay.lists(&[("price@zone-east", 99)]);
    poll_and_cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), Some(51), "not beyond what is signed");
    relay.lists(&[("price@zone-east", 50)]);
    poll_and_cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), Some(51), "ahead of its relay: it stays");
    assert_eq!(report::stand(&agent, Vec::new()).streams[&instance("price@zone-east")].state, StreamState::Ok);
}

#[tokio::test]
async fn a_stream_of_a_later_build_in_a_relays_list_stops_no_other() {
    let (_hq, relay, r) = store().await;
    relay.lists(&[("price@zone-east", 51), ("staff@region-north", 3)]);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-east"), agent.upstream.silence()), (Some(51), None));
    assert!(agent.upstream.takes_heartbeats());
}

#[tokio::test]
async fn a_relay_that_lists_nothing_yet_is_waited_for() {
    let (_hq, relay, r) = store().await;
    relay.lists(&[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    assert_eq!(version(&agent, "price@zone-east"), None);
    let status = report::stand(&agent, Vec::new());
    assert_eq!(status.streams[&instance("price@zone-east")].state, StreamState::Waiting);
    assert!(status.debts[0].contains("the relay does not serve it yet"));
}

#[tokio::test]
async fn after_two_silent_minutes_the_fallback_is_read_without_what_the_relay_refused_and_then_it_comes_back() {
    let (mut hq, relay, r) = store().await;
    relay.desk.errors.lock().unwrap().push(Fault {
        code: fault::PACK_IN_ERROR.into(),
        instance: Some(instance("price@zone-east")),
        object: Some("price@zone-east/0000000051.delta.pack".into()),
        text: "trial failed".into(),
        since: proto::clock::Timestamp::UNIX_EPOCH,
    });
    let agent = r.open();
    poll_and_cycle(&agent).await;
    assert!(agent.upstream.ask_errors().await);
    agent.memory.keep_relay_word(&agent.upstream.word());
    relay.be_silent(true);
    assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Silence(_)));
    r.clock.advance(119 * S);
    assert_eq!(agent.upstream.read_from(), From::Relay);
    assert_eq!(cycle(&agent).await, End::Retry, "not yet");
    r.clock.advance(S);
    assert_eq!(agent.upstream.read_from(), From::Fallback);
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(version(&agent, "price@zone-east"), Some(50), "51 was refused by the relay");
    r.clock.advance(S);
    assert_eq!(agent.upstream.network(), Network::OnlineRelayDown);
    hq.full("price@zone-east", 52, &rows(100, 52));
    hq.sign();
    drop(agent);
    // What the relay refused stays refused over a restart.
    let agent = r.open();
    r.clock.advance(120 * S);
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(version(&agent, "price@zone-east"), Some(52), "the way round");
    // The relay is back, behind: the register stays where it is.
    relay.be_silent(false);
    assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::News));
    assert_eq!(agent.upstream.read_from(), From::Relay);
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, "price@zone-east"), agent.upstream.network()), (Some(52), Network::InStore));
}

/// Which packs it got past is in its versions: a restart must not lead back behind them.
#[tokio::test]
async fn what_the_relay_serves_now_is_kept_beside_what_it_refused() {
    let (mut hq, relay, r) = store().await;
    relay.desk.errors.lock().unwrap().push(Fault {
        code: fault::PACK_IN_ERROR.into(),
        instance: Some(instance("price@zone-east")),
        object: Some("price@zone-east/0000000051.full.pack".into()),
        text: "trial failed".into(),
        since: proto::clock::Timestamp::UNIX_EPOCH,
    });
    let agent = r.open();
    run::once(&agent).await;
    relay.lists(&[("price@zone-east", 51)]);
    run::once(&agent).await;
    drop(agent);
    relay.be_silent(true);
    let agent = r.open();
    assert_eq!(agent.upstream.word().versions[&instance("price@zone-east")], v(51));
    let delta = hq.streams[&instance("price@zone-east").stream].pack(v(51), proto::layout::PackKind::Delta).cloned();
    assert!(!agent.upstream.word().refuses(&instance("price@zone-east"), &delta.unwrap()));
    hq.delta("price@zone-east", 52, &rows(100, 52));
    hq.sign();
    assert_eq!(run::once(&agent).await, Exit::Done);
    assert_eq!(version(&agent, "price@zone-east"), Some(52), "from the fallback");
}

#[tokio::test]
async fn a_page_that_is_gone_for_a_moment_makes_no_static_server_of_a_relay() {
    let (_hq, relay, r) = store().await;
    let agent = r.open();
    poll_and_cycle(&agent).await;
    for status in [404, 405] {
        relay.refuses("v1/versions", Some(status));
        assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Static), "{status}");
        assert!(!report::send(&agent).await.unwrap(), "{status}");
        relay.refuses("v1/versions", None);
        assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Same), "{status}");
        assert!(!agent.upstream.is_static() && report::send(&agent).await.unwrap(), "{status}");
    }
}

/// Once an hour, by cron: each process dies over the same pack, at once.
#[tokio::test]
async fn a_single_cycle_tries_a_deadly_pack_when_all_else_is_brought_and_told() {
    let (mut hq, relay, r) = store().await;
    assert_eq!(run::once(&r.open()).await, Exit::Done);
    hq.full("promo@all", 7, &rows(10, 1));
    hq.sign();
    relay.lists(&[("price@zone-east", 51), ("promo@all", 7)]);
    let deadly = "price@zone-east/0000000051.delta.pack";
    for _ in 0..5 {
        Tries::open(&r.config.data_dir, Duration::ZERO, &boot_id()).begin(&deadly.parse().unwrap());
    }
    let order = Arc::new(Mutex::new(Vec::new()));
    let (seen, desk) = (order.clone(), relay.desk.clone());
    let agent = r.watched(Some(Arc::new(move |step: &Step| {
        if let Step::Applying(pack) = step {
            seen.lock().unwrap().push((pack.to_string(), desk.beats.lock().unwrap().len()));
        }
        true
    })));
    assert_eq!(run::once(&agent).await, Exit::Done);
    let expected = [("promo@all/0000000007.full.pack".to_owned(), 1), (deadly.to_owned(), 2)];
    assert_eq!(*order.lock().unwrap(), expected, "with so many heartbeats before it");
    let beats = relay.desk.beats.lock().unwrap().clone();
    let told = |n: usize| beats[n].errors.iter().map(|f| (f.code.as_str(), f.object.as_deref())).collect::<Vec<_>>();
    assert_eq!(told(1), [(fault::PACK_IN_ERROR, Some(deadly))]);
    assert_eq!(r.rows("price"), rows(100, 51), "it killed nobody this time");
    assert!(agent.memory.look(|f| f.open()).is_empty());
}

#[tokio::test]
async fn everything_dead_for_days_is_offline_and_then_caught_up_with() {
    let (mut hq, relay, r) = store().await;
    let mut r = r;
    r.config.fallback = vec!["http://127.0.0.1:9".into()];
    let agent = r.open();
    poll_and_cycle(&agent).await;
    relay.be_silent(true);
    r.clock.advance(86_400 * 3 * S);
    assert_eq!(cycle(&agent).await, End::Retry);
    assert_eq!(agent.upstream.network(), Network::Offline);
    assert_eq!(r.rows("price"), rows(100, 50), "selling goes on");
    for n in 52..60 {
        hq.delta("price@zone-east", n, &rows(100, n as i64));
    }
    hq.sign();
    relay.be_silent(false);
    relay.lists(&[("price@zone-east", 59)]);
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(100, 59));
}

#[tokio::test]
async fn a_static_server_is_known_by_its_404_and_a_relay_by_its_answer() {
    let (_hq, relay, r) = store().await;
    relay.desk.versions.send_replace(None);
    let agent = r.open();
    assert!(matches!(agent.upstream.poll_relay(30 * S).await, Heard::Static));
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(version(&agent, "price@zone-east"), Some(51), "as far as the manifest says");
    assert!(!report::send(&agent).await.unwrap(), "no heartbeats to a static server");
    relay.lists(&[("price@zone-east", 51)]);
    assert!(matches!(agent.upstream.poll_relay(30 * S).await, Heard::News));
    assert!(!agent.upstream.is_static());
}

#[tokio::test]
async fn a_static_server_without_the_manifest_is_left_like_a_silent_one() {
    let (hq, relay, r) = store().await;
    relay.desk.versions.send_replace(None);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let empty = Hq::new();
    let (manifest, hidden) = (hq.dir.path().join("stores"), empty.dir.path().join("stores"));
    std::fs::rename(&manifest, &hidden).unwrap();
    assert_eq!(poll_and_cycle(&agent).await, End::Retry);
    for _ in 0..13 {
        r.clock.advance(10 * S);
        agent.upstream.poll_relay(30 * S).await;
    }
    assert_eq!(agent.upstream.read_from(), From::Fallback);
    poll_and_cycle(&agent).await;
    assert_eq!(agent.upstream.read_from(), From::Fallback, "not back yet");
    std::fs::rename(&hidden, &manifest).unwrap();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(agent.upstream.read_from(), From::Relay);
}

/// Neither takes heartbeats, and a directory no polls.
#[tokio::test]
async fn a_static_server_or_a_directory_that_was_gone_for_long_is_taken_back() {
    for is_directory in [false, true] {
        let (mut hq, relay, mut r) = store().await;
        relay.desk.versions.send_replace(None);
        let dir = tempfile::tempdir().unwrap();
        let (mount, away) = (dir.path().join("mount"), dir.path().join("away"));
        std::os::unix::fs::symlink(hq.dir.path(), &mount).unwrap();
        if is_directory {
            r.config.relay = format!("file://{}", mount.display());
        }
        let agent = r.open();
        assert_eq!(poll_and_cycle(&agent).await, End::Done);
        relay.be_silent(true);
        std::fs::rename(&mount, &away).unwrap();
        for _ in 0..13 {
            r.clock.advance(10 * S);
            poll_and_cycle(&agent).await;
        }
        hq.delta("price@zone-east", 52, &rows(100, 52));
        hq.sign();
        assert_eq!(poll_and_cycle(&agent).await, End::Done, "{is_directory}");
        let reads = || (agent.upstream.read_from(), agent.upstream.network());
        assert_eq!(reads(), (From::Fallback, Network::OnlineRelayDown), "{is_directory}");
        assert_eq!(version(&agent, "price@zone-east"), Some(52), "{is_directory}");
        relay.be_silent(false);
        std::fs::rename(&away, &mount).unwrap();
        assert_eq!(poll_and_cycle(&agent).await, End::Done, "{is_directory}");
        assert_eq!(reads(), (From::Relay, Network::InStore), "{is_directory}");
    }
}

#[tokio::test]
async fn a_relay_that_serves_nothing_and_has_no_list_for_the_store_is_left_until_it_has_one() {
    let (_hq, relay, r) = store().await;
    relay.lists(&[]);
    relay.refuses("stores/0421/manifest.json", Some(404));
    let agent = r.open();
    for _ in 0..13 {
        poll_and_cycle(&agent).await;
        assert!(report::send(&agent).await.unwrap(), "it takes heartbeats");
        r.clock.advance(10 * S);
    }
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((agent.upstream.read_from(), version(&agent, "price@zone-east")), (From::Fallback, Some(51)));
    assert!(report::send(&agent).await.unwrap(), "still");
    relay.refuses("stores/0421/manifest.json", None);
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(agent.upstream.read_from(), From::Relay);
}

#[tokio::test]
async fn a_single_cycle_does_not_wait_for_a_silence_to_last() {
    let (_hq, relay, r) = store().await;
    relay.be_silent(true);
    let agent = r.open();
    assert_eq!(run::once(&agent).await, proto::cli::Exit::Done);
    assert_eq!((version(&agent, "price@zone-east"), agent.upstream.network()), (Some(51), Network::OnlineRelayDown));
    drop(agent);
    let mut alone = r;
    alone.config.fallback.clear();
    assert_eq!(run::once(&alone.open()).await, proto::cli::Exit::Failed);
    relay.be_silent(false);
    let agent = alone.open();
    assert_eq!(run::once(&agent).await, proto::cli::Exit::Done);
    assert_eq!(relay.desk.beats.lock().unwrap().len(), 1);
    relay.be_silent(true);
    alone.clock.advance(S);
    assert_eq!(run::once_beside(&agent).await, Exit::Failed, "that it answered before says nothing");
}

#[tokio::test]
async fn a_long_poll_ends_with_news_or_with_its_time() {
    let (_hq, relay, r) = store().await;
    let agent = r.open();
    assert!(matches!(agent.upstream.poll_relay(30 * S).await, Heard::News), "the first is answered at once");
    assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Same));
    let asked = Instant::now();
    let (heard, ()) = tokio::join!(agent.upstream.poll_relay(30 * S), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        relay.lists(&[("price@zone-east", 51)]);
    });
    assert!(matches!(heard, Heard::News));
    assert!(asked.elapsed() < 20 * S, "{:?}", asked.elapsed());
    relay.be_silent(true);
    assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Silence(_)));
}

#[tokio::test]
async fn heartbeats_are_signed_numbered_over_restarts_and_bring_hq_and_the_skew() {
    let (_hq, relay, r) = store().await;
    {
        let agent = r.open();
        poll_and_cycle(&agent).await;
        r.clock.advance(7200 * S);
        assert!(report::send(&agent).await.unwrap());
        assert_eq!(agent.upstream.network(), Network::Online);
        let skew = agent.skew.get().unwrap();
        assert!((7195..7500).contains(&skew), "{skew}");
        report::send(&agent).await.unwrap();
    }
    let agent = r.open();
    agent.upstream.poll_relay(Duration::ZERO).await;
    cycle(&agent).await;
    relay.desk.answer.lock().unwrap().hq_seen_s = Some(300);
    report::send(&agent).await.unwrap();
    assert_eq!((agent.upstream.network(), agent.upstream.hq_seen_s()), (Network::InStore, Some(300)));
    let beats = relay.desk.beats.lock().unwrap().clone();
    assert_eq!(beats.iter().map(|b| b.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(beats[0].streams[&instance("price@zone-east")].version, Some(v(50)));
    assert!((7195..7500).contains(&beats[1].clock_skew_s.unwrap()));
    relay.desk.answer.lock().unwrap().refused.insert(REGISTER.into(), "revoked".into());
    assert!(report::send(&agent).await.is_err());
    assert_eq!(agent.memory.look(|f| f.open())[0].code, fault::REFUSED);
}

/// The loops, in real time.
struct Running {
    agent: Arc<crate::agent::Agent>,
    api: Source,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn start(r: &Register, relay_silent: Duration) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api =
            Source::parse(&format!("http://{}", listener.local_addr().unwrap()), &SourceOptions::default()).unwrap();
        let mut config = r.config.clone();
        config.relay_silent.0 = relay_silent;
        config.poll.0 = S;
        let clock = Arc::new(SystemClock::default());
        let agent = Arc::new(crate::agent::Agent::open(config, clock, None).unwrap());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let shutdown = async move {
            let _ = stopped.await;
        };
        let task = tokio::spawn(run::run(agent.clone(), listener, shutdown));
        Running { agent, api, stop: Some(stop), task }
    }
    async fn status(&self) -> Status {
        match self.api.long_poll("v1/status", &[], 0, None).await {
            Ok(Polled::Body { bytes, .. }) => serde_json::from_slice(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let began = Instant::now();
        loop {
            let s = self.status().await;
            if is_so(&s) {
                return s;
            }
            assert!(began.elapsed() < PATIENCE, "{what}: {s:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        tokio::time::timeout(PATIENCE, &mut self.task).await.expect("it stops").unwrap();
    }
}

fn at(n: u64) -> impl Fn(&Status) -> bool {
    move |s| s.streams.get(&instance("price@zone-east")).is_some_and(|p| p.version == Some(v(n)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn news_at_the_relay_are_rows_at_the_register_within_a_moment() {
    let (mut hq, relay, r) = store().await;
    let agent = Running::start(&r, 120 * S).await;
    agent.until("installed", at(50)).await;
    agent.until("reported", |s| s.network == Network::Online).await;
    let pos = r.reader();
    for n in 51..61u64 {
        if n > 51 {
            hq.delta("price@zone-east", n, &rows(100, n as i64));
        }
        hq.sign();
        // Let the register settle into its long poll.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let told = Instant::now();
        relay.lists(&[("price@zone-east", n)]);
        while rows_of(&pos, "price")[&1] != n as i64 {
            assert!(told.elapsed() < PATIENCE, "version {n}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_daemon_leaves_a_dead_relay_and_comes_back() {
    let mut hq = Hq::new();
    hq.full("price@zone-east", 50, &rows(100, 50));
    hq.sign();
    let (relay, r) = store_of(&hq).await;
    let agent = Running::start(&r, 2 * S).await;
    agent.until("installed", at(50)).await;
    relay.be_silent(true);
    // Not before: on a busy machine the relay may be silent for too long at the start already.
    hq.delta("price@zone-east", 51, &rows(100, 51));
    hq.sign();
    agent.until("read from the fallback", at(51)).await;
    agent.until("says so", |s| s.network == Network::OnlineRelayDown).await;
    relay.be_silent(false);
    agent.until("back", |s| s.network == Network::Online).await;
    hq.delta("price@zone-east", 52, &rows(100, 52));
    hq.sign();
    relay.lists(&[("price@zone-east", 52)]);
    agent.until("by the relay again", at(52)).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loopback_api_holds_verifies_and_keeps_web_pages_out() {
    let (_hq, relay, r) = store().await;
    let agent = Running::start(&r, 120 * S).await;
    agent.until("installed", at(50)).await;
    let post = async |body: &'static str| agent.api.post("v1/hold", "application/json", body.into(), 4096).await;
    let held: HoldAnswer = serde_json::from_slice(&post("{\"seconds\":100000}").await.unwrap()).unwrap();
    assert_eq!(held, HoldAnswer { held_s: 900, settled: true });
    assert!(post("{\"seconds\":0}").await.is_err());
    assert!(post("{}").await.is_err());
    relay.lists(&[("price@zone-east", 51)]);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(r.rows("price"), rows(100, 50), "a sale is open");
    let http = reqwest::Client::new();
    let base = agent.api.url().trim_end_matches('/').to_owned();
    let steered =
        http.post(format!("{base}/v1/hold")).header("origin", "http://evil.example").body("{\"seconds\":9}").send();
    assert_eq!(steered.await.unwrap().status(), 403);
    let ended = http.delete(format!("{base}/v1/hold")).send().await.unwrap();
    assert_eq!(ended.text().await.unwrap(), "{\"held_s\":0,\"settled\":true}");
    agent.until("applied at once", at(51)).await;
    r.tamper("UPDATE price SET cents = 0 WHERE sku = 1");
    let turn = agent.agent.verifying.clone().lock_owned().await;
    let verify = http.post(format!("{base}/v1/verify"));
    assert_eq!(verify.send().await.unwrap().status(), 429, "one scan at a time");
    drop(turn);
    let found = agent.api.post("v1/verify", "application/json", "".into(), 1 << 20).await.unwrap();
    let found: crate::verify::Report = serde_json::from_slice(&found).unwrap();
    assert!(found.drift);
    let began = Instant::now();
    while r.rows("price") != rows(100, 51) {
        assert!(began.elapsed() < PATIENCE, "not healed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(http.get(format!("{base}/healthz")).send().await.unwrap().status(), 200);
    let metrics = http.get(format!("{base}/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("tillcast_agent_stream_version{stream=\"price@zone-east\"} 51"), "{metrics}");
    assert!(metrics.contains("tillcast_agent_drifts_total 1"), "{metrics}");
    assert_eq!(http.put(format!("{base}/v1/hold")).send().await.unwrap().status(), 405);
    agent.stop().await;
}

#[tokio::test]
async fn a_heartbeat_that_the_relay_cannot_read_was_not_heard() {
    let (_hq, relay, r) = store().await;
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let price = instance("price@zone-east");
    agent.memory.faults(|f| f.raise(fault::DRIFT, Some(&price), None, "a row differs", r.clock.now()));
    agent.memory.faults(|f| f.mend(fault::DRIFT, |_| true));
    relay.desk.answer.lock().unwrap().refused.insert("?".into(), "it is too long".into());
    assert!(report::send(&agent).await.is_err());
    let refused = agent.memory.look(|f| f.open());
    assert!(refused[0].code == fault::REFUSED && refused[0].text.contains("it is too long"), "{refused:?}");
    assert!(agent.memory.look(|f| f.to_tell()).iter().any(|f| f.code == fault::DRIFT), "it is still to be told");
    relay.desk.answer.lock().unwrap().refused.clear();
    report::send(&agent).await.unwrap();
    assert!(agent.memory.look(|f| f.to_tell()).is_empty());
}

fn address(api: &Source) -> std::net::SocketAddr {
    api.url().trim_start_matches("http://").trim_end_matches('/').parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_is_done_by_the_agent_that_runs() {
    let (mut hq, relay, r) = store().await;
    let agent = Running::start(&r, 120 * S).await;
    agent.until("installed", at(50)).await;
    let clock = Arc::new(SystemClock::default());
    let once = async |config: &crate::config::Config| cli::once(config.clone(), clock.clone(), true).await;
    // Held by another program than an agent.
    let held = once(&r.config).await.unwrap_err();
    assert!(held.to_string().contains("in use by process") && cli::code_of(&held) == "LOCKED", "{held}");
    let config = crate::config::Config { local_listen: address(&agent.api), ..r.config.clone() };
    relay.lists(&[("price@zone-east", 51)]);
    assert_eq!(once(&config).await.unwrap(), Exit::Done);
    assert_eq!(r.rows("price"), rows(100, 51));
    let told = relay.desk.beats.lock().unwrap().last().unwrap().clone();
    assert_eq!(told.streams[&instance("price@zone-east")].version, Some(v(51)), "and was told");
    hq.poisoned_delta("price@zone-east", 52, &rows(100, 52));
    hq.sign();
    relay.lists(&[("price@zone-east", 52)]);
    assert_eq!(once(&config).await.unwrap(), Exit::Partly);
    agent.stop().await;
}

#[tokio::test]
async fn verify_waits_for_the_agent_that_is_at_it_already() {
    let (_hq, _relay, r) = store().await;
    let status = serde_json::to_vec(&crate::status::from_files(&r.config, &*r.clock).unwrap()).unwrap();
    let report = serde_json::to_vec(&crate::verify::Report { drift: true, ..Default::default() }).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let at = asked.clone();
    let handler = move |request: http::Request<proto::http::Inbound>, _| {
        let is_busy = request.uri().path() == "/v1/verify" && at.fetch_add(1, Ordering::Relaxed) == 0;
        let body = if request.uri().path() == "/v1/verify" { report.clone() } else { status.clone() };
        async move {
            match is_busy {
                true => proto::http::text(http::StatusCode::TOO_MANY_REQUESTS, "being verified"),
                false => proto::http::json(http::StatusCode::OK, body),
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = crate::config::Config { local_listen: listener.local_addr().unwrap(), ..r.config.clone() };
    let server = tokio::spawn(proto::http::serve(listener, Default::default(), std::future::pending(), handler));
    assert_eq!(cli::verify_rows(&config, &*r.clock, true).await.unwrap(), Exit::Failed, "drift was found");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    server.abort();
}

#[tokio::test]
async fn a_directory_of_another_register_is_a_mistake_of_set_up() {
    let (hq, _relay, mut r) = store().await;
    let no_drift = cli::verify_rows(&r.config, &*r.clock, true).await.unwrap();
    assert_eq!(no_drift, Exit::Done);
    r.config.register = "0421-04".parse().unwrap();
    let other = cli::verify_rows(&r.config, &*r.clock, true).await.unwrap_err();
    assert_eq!(cli::exit_of(&other), Exit::Usage, "{other}");
    let mut code = hq.code();
    code.id = r.config.device();
    let other = cli::enroll(&r.config, &code.to_text().unwrap(), &*r.clock, true).unwrap_err();
    assert_eq!(cli::exit_of(&other), Exit::Usage, "{other}");
    r.config.data_dir.push("nothing");
    let nobody = cli::verify_rows(&r.config, &*r.clock, true).await.unwrap_err();
    assert_eq!(cli::exit_of(&nobody), Exit::Usage, "{nobody}");
}

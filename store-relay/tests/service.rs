//! The real binary: commands, the service with a headquarters that wakes it, kills, imports by hand-over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[path = "../src/kit/hq.rs"]
mod hq;

use hq::{Hq, Make, code};
use proto::clock::{Clock, SystemClock};
use proto::layout::PackKind;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tillcast_tests::quiet_port;

struct Store {
    dir: TempDir,
    port: u16,
}

/// A code that the binary takes, whose clock is the system's.
fn fresh_code() -> String {
    let mut code = code();
    code.expires_at = proto::clock::after(SystemClock::default().now(), Duration::from_secs(3600));
    code.to_text().unwrap()
}

impl Store {
    fn new(sources: &[String], more: &str) -> Store {
        let dir = TempDir::new().unwrap();
        let port = quiet_port();
        let text = format!(
            "store = \"0421\"\ndata_dir = \"data\"\nlisten = \"127.0.0.1:{port}\"\nballast = \"0\"\nsources = {}\n{more}\n",
            serde_json::to_string(sources).unwrap()
        );
        fs::write(dir.path().join("relay.toml"), text).unwrap();
        Store { dir, port }
    }
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_store-relay"));
        command.args(args).arg("--config").arg(self.dir.path().join("relay.toml")).stdin(Stdio::null());
        command
    }
    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }
    fn json(&self, args: &[&str]) -> (i32, Value) {
        let output = self.run(&[args, &["--json"]].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        let json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text} {output:?}"));
        (output.status.code().unwrap(), json)
    }
    fn enrolled(self, hq: &Hq) -> Store {
        let output = self.run(&["enroll", &fresh_code()]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(hq.trust_version, 1);
        self
    }
    fn daemon(&self) -> Daemon {
        let child = self.command(&["run"]).stderr(Stdio::inherit()).spawn().unwrap();
        let daemon = Daemon(child);
        until("the relay listens", || TcpStream::connect(("127.0.0.1", self.port)).is_ok());
        daemon
    }
    fn get(&self, path: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n").unwrap();
        let mut all = String::new();
        let _ = stream.read_to_string(&mut all);
        all
    }
    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal).unwrap();
    }
    fn end(mut self, signal: rustix::process::Signal) -> Option<i32> {
        self.signal(signal);
        self.0.wait().unwrap().code()
    }
}
impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(90), "{what}: not within 90 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn published() -> Hq {
    let mut hq = Hq::new();
    hq.created_at = SystemClock::default().now();
    hq.follow("price", "zone-east");
    let rows: Vec<(i64, String)> = (0..500).map(|n| (n, format!("item {n}"))).collect();
    let rows: Vec<(i64, Option<&str>)> = rows.iter().map(|(n, s)| (*n, Some(s.as_str()))).collect();
    hq.publish("price", &rows, Make::Full);
    hq.follow("promo", "all");
    hq.publish("promo", &[(1, Some("x"))], Make::Full);
    hq.sign();
    hq
}

#[test]
fn commands_end_as_the_design_says() {
    let mut hq = published();
    let store = Store::new(&[hq.url()], "");
    assert_eq!(store.run(&["check-config"]).status.code(), Some(0));
    let output = store.run(&["once"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("enroll"), "{output:?}");
    let store = store.enrolled(&hq);
    let (exit, report) = store.json(&["once"]);
    assert_eq!((exit, &report["versions"]["price@zone-east"]), (0, &Value::from(1)), "{report}");
    let (exit, status) = store.json(&["status"]);
    assert_eq!((exit, &status["streams"]["promo@all"]["state"]), (0, &Value::from("ok")));
    assert_eq!(status["serial"], 1);
    assert_eq!(store.json(&["verify"]).0, 0);
    // One stream in error, the other done.
    hq.publish_with("price", &[(1, Some("poison"))], Make::Delta, |_| Default::default());
    hq.publish("promo", &[(2, Some("y"))], Make::Delta);
    hq.sign();
    for _ in 0..3 {
        assert_eq!(store.json(&["once"]).0, 3);
    }
    let (_, status) = store.json(&["status"]);
    assert_eq!(status["errors"][0]["code"], "PACK_IN_ERROR", "{status}");
    assert_eq!(status["streams"]["promo@all"]["version"], 2);
    let name = hq.pack("price", 2, PackKind::Delta).to_string();
    assert_eq!(store.run(&["retry", &name]).status.code(), Some(0));
    let again = store.run(&["retry", &name]);
    assert_eq!((again.status.code(), again.stdout.is_empty()), (Some(1), true), "{again:?}");
    assert!(String::from_utf8_lossy(&again.stderr).contains("error: "), "{again:?}");
    assert_eq!(store.json(&["retry", &name]).1["code"], "FAILED");
    assert_eq!(store.run(&["retry", "../../etc/passwd"]).status.code(), Some(2));
    assert_eq!(store.run(&["nonsense"]).status.code(), Some(2));
    // All sources dead.
    fs::remove_dir_all(hq.bucket.path()).unwrap();
    assert_eq!(store.json(&["once"]).0, 1);
    fs::write(store.dir.path().join("relay.toml"), "store = \"0421\"\ndata_dri = \"x\"\n").unwrap();
    let output = store.run(&["status"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("data_dir"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(!store.run(&["completions", shell]).stdout.is_empty());
    }
    assert!(!store.run(&["man"]).stdout.is_empty());
}

#[test]
fn beside_a_command_at_work_status_answers_and_others_name_it() {
    let hq = published();
    let store = Store::new(&[hq.url()], "").enrolled(&hq);
    // As while the code is taken: nothing else is made yet.
    let lock = proto::shelf::LockFile::acquire(&store.data()).unwrap();
    let (exit, status) = store.json(&["status"]);
    assert_eq!((exit, &status["serial"]), (0, &Value::Null), "{status}");
    drop(lock);
    assert_eq!(store.json(&["once"]).0, 0);
    let lock = proto::shelf::LockFile::acquire(&store.dir.path().join("data")).unwrap();
    let begun = Instant::now();
    let (exit, told) = store.json(&["once"]);
    assert_eq!((exit, &told["code"]), (1, &Value::from("LOCKED")), "{told}");
    assert!(told["error"].as_str().unwrap().contains(&format!("process {}", std::process::id())), "{told}");
    assert!(begun.elapsed() >= Duration::from_secs(5), "it waits for a command that ends");
    let (exit, status) = store.json(&["status"]);
    assert_eq!((exit, &status["network"]), (0, &Value::from("offline")), "{status}");
    drop(lock);
    assert_eq!(store.json(&["once"]).0, 0);
}

#[test]
fn check_config_shows_no_password_of_a_url() {
    let url = "http://till:canary@127.0.0.1:9";
    let store = Store::new(&[format!("{url}/mirror")], &format!("hq = \"{url}/hq\""));
    for args in [&["check-config"][..], &["check-config", "--json"]] {
        let output = store.run(args);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(["/mirror", "/hq"].iter().all(|path| said.contains(&format!("http://127.0.0.1:9{path}"))), "{said}");
        assert!(output.status.success() && !format!("{output:?}{said}").contains("canary"), "{said}");
    }
}

/// A headquarters that answers wake-ups when told, and takes heartbeats.
struct Service {
    port: u16,
    wake: mpsc::Sender<()>,
    beats: mpsc::Receiver<Value>,
}

fn service() -> Service {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (wake, woken) = mpsc::channel::<()>();
    let (tell, beats) = mpsc::channel();
    let woken = std::sync::Arc::new(std::sync::Mutex::new(woken));
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(1));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (tell, woken, count) = (tell.clone(), woken.clone(), count.clone());
            std::thread::spawn(move || serve_hq(stream.unwrap(), &tell, &woken, &count));
        }
    });
    Service { port, wake, beats }
}

fn serve_hq(
    mut stream: TcpStream,
    tell: &mpsc::Sender<Value>,
    woken: &std::sync::Mutex<mpsc::Receiver<()>>,
    count: &std::sync::atomic::AtomicUsize,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let (mut head, mut length, mut known) = (String::new(), 0, false);
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
                break;
            }
            let lower = line.to_lowercase();
            length = lower.strip_prefix("content-length: ").map_or(length, |v| v.trim().parse().unwrap());
            known |= lower.starts_with("if-none-match");
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let answer = if head.starts_with("POST") {
            let _ = tell.send(serde_json::from_slice(&body).unwrap());
            serde_json::json!({ "hq_seen_s": 0, "now": SystemClock::default().now() }).to_string()
        } else {
            if known && woken.lock().unwrap().recv_timeout(Duration::from_secs(20)).is_err() {
                return;
            }
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            "{}".to_owned()
        };
        let n = count.load(std::sync::atomic::Ordering::SeqCst);
        let _ = write!(stream, "HTTP/1.1 200 OK\r\netag: \"{n}\"\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
    }
}

#[test]
fn a_wake_brings_a_version_within_moments_and_term_ends_in_0() {
    let mut hq = published();
    let service = service();
    let more = format!("hq = \"http://127.0.0.1:{}\"\npoll = \"1h\"\n", service.port);
    let store = Store::new(&[hq.url()], &more).enrolled(&hq);
    let daemon = store.daemon();
    until("the first versions", || store.get("/v1/versions", "").contains("\"price@zone-east\":1,\"promo@all\":1"));
    let mut times = Vec::new();
    for version in 2..=6 {
        hq.publish("price", &[(version, Some("changed"))], Make::Delta);
        hq.sign();
        let start = Instant::now();
        service.wake.send(()).unwrap();
        let news = format!("\"price@zone-east\":{version}");
        until("the next version", || store.get("/v1/versions", "").contains(&news));
        times.push(start.elapsed());
    }
    times.sort();
    eprintln!("wake to served: {times:?}");
    // Without a wake it would be an hour.
    assert!(times[2] < Duration::from_secs(30), "{times:?}");
    // Headquarters hears of it.
    until("the heartbeat", || {
        let Ok(post) = service.beats.try_recv() else { return false };
        let payload = post["beats"][0]["envelope"]["payload"].as_str().unwrap();
        use base64::Engine as _;
        let beat: Value =
            serde_json::from_slice(&base64::engine::general_purpose::STANDARD.decode(payload).unwrap()).unwrap();
        beat["streams"]["price@zone-east"]["version"] == 6
    });
    // Other commands hand over to the one that runs.
    let (exit, status) = store.json(&["status"]);
    assert_eq!((exit, &status["network"]), (0, &Value::from("online")), "{status}");
    assert!(status["hq_seen_s"].as_u64().is_some_and(|s| s < 60), "{status}");
    assert_eq!(store.json(&["verify"]).1["right"], true);
    assert_eq!(store.json(&["once"]).0, 0);
    assert_eq!(store.run(&["run"]).status.code(), Some(1), "two on one directory");
    assert_eq!(store.run(&["enroll", &fresh_code()]).status.code(), Some(1));
    assert_eq!(daemon.end(rustix::process::Signal::TERM), Some(0));
}

#[test]
fn an_import_is_handed_over_and_answered() {
    let mut hq = published();
    let store = Store::new(&["http://127.0.0.1:9".to_owned()], "poll = \"1s\"").enrolled(&hq);
    let _daemon = store.daemon();
    hq.publish("price", &[(1, Some("by stick"))], Make::Delta);
    hq.sign();
    let dir = hq.bucket.path().to_str().unwrap().to_owned();
    let (exit, report) = store.json(&["import", &dir]);
    assert_eq!(exit, 0, "{report}");
    assert_eq!(report["receipt"]["versions"]["price@zone-east"], 2);
    assert!(hq.bucket.path().join("receipts/0421-0000000002.receipt.json").is_file());
    assert!(store.get("/v1/versions", "").contains("\"price@zone-east\":2"));
    let (exit, report) = store.json(&["import", &dir]);
    assert_eq!((exit, &report["already_here"]), (0, &Value::from(true)));
    assert_eq!(store.run(&["import", "/nonexistent"]).status.code(), Some(1));
}

/// A value of 14 MiB: within the limits of packs, but several copies of it are not within 32 MiB.
fn long_value() -> String {
    let mut seed = 1u64;
    std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'a' + (seed >> 60) as u8)
    })
    .take(14 << 20)
    .collect()
}

/// A full of another zone and the deltas behind it are one transaction.
#[test]
fn a_pack_that_eats_memory_after_a_change_of_zone_costs_nothing_that_comes_before_it() {
    let mut hq = published();
    let store = Store::new(&[hq.url()], "[trial]\nmemory = \"32MiB\"\n").enrolled(&hq);
    assert_eq!(store.json(&["once"]).0, 0);
    hq.follow("promo", "zone-west");
    hq.publish("promo", &[(1, Some("west"))], Make::Full);
    hq.publish("promo", &[(1, Some("best"))], Make::Delta);
    hq.publish("promo", &[(2, Some(&long_value()))], Make::Delta);
    hq.sign();
    for _ in 0..3 {
        assert_eq!(store.json(&["once"]).0, 3);
    }
    let (_, status) = store.json(&["status"]);
    assert_eq!(status["streams"]["promo@zone-west"]["version"], 2, "{status}");
    let errors: Vec<_> = status["errors"].as_array().unwrap().iter().map(|e| &e["object"]).collect();
    assert_eq!(errors, [&hq.pack("promo", 3, PackKind::Delta).to_string()], "{status}");
}

#[test]
fn a_pack_that_eats_memory_or_time_takes_only_its_try() {
    let mut hq = published();
    let limit = |memory: &str, time: &str| format!("[trial]\nmemory = \"{memory}\"\ntime = \"{time}\"\n");
    let store = Store::new(&[hq.url()], &limit("32MiB", "5m")).enrolled(&hq);
    assert_eq!(store.json(&["once"]).0, 0);
    hq.publish("promo", &[(2, Some(&long_value()))], Make::Delta);
    hq.publish("price", &[(2, Some("small"))], Make::Delta);
    hq.sign();
    for _ in 0..3 {
        assert_eq!(store.json(&["once"]).0, 3);
    }
    let (_, status) = store.json(&["status"]);
    assert_eq!(
        (&status["streams"]["price@zone-east"]["version"], &status["errors"][0]["code"]),
        (&2.into(), &"PACK_IN_ERROR".into()),
        "{status}"
    );
    assert!(status["errors"][0]["text"].as_str().unwrap().starts_with("CRASH"), "{status}");
    // With enough of it the pack is good; the pause after a crash is waived by hand.
    let more = fs::read_to_string(store.dir.path().join("relay.toml")).unwrap().replace("32MiB", "512MiB");
    fs::write(store.dir.path().join("relay.toml"), more).unwrap();
    assert_eq!(store.run(&["retry", &hq.pack("promo", 2, PackKind::Delta).to_string()]).status.code(), Some(0));
    let (exit, report) = store.json(&["once"]);
    assert_eq!((exit, &report["versions"]["promo@all"]), (0, &2.into()), "{report}");
}

/// On a small disk, with no room at all, then with room for the pack but not for its rows: the old version stays whole and served, the fault is named, and it ends when there is room.
#[test]
fn a_full_disk_keeps_the_old_version_and_recovers_by_itself() {
    let probe = Command::new("unshare").args(["-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !probe.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: this machine lets nobody mount a small disk (unshare -Urm)");
        return;
    }
    let mut hq = published();
    let store = Store::new(&[hq.url()], "").enrolled(&hq);
    fs::rename(store.data(), store.dir.path().join("enrolled")).unwrap();
    let (later, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut seed = 1u64;
    let mut noise = |n: usize| -> String {
        std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + (seed >> 60) as u8)
        })
        .take(n)
        .collect()
    };
    let rows: Vec<(i64, String)> = (0..200).map(|n| (n, noise(20_000))).collect();
    let rows: Vec<(i64, Option<&str>)> = rows.iter().map(|(n, s)| (*n, Some(s.as_str()))).collect();
    let before = TempDir::new().unwrap();
    copy(hq.bucket.path(), before.path());
    hq.publish("price", &rows, Make::Delta);
    hq.sign();
    copy(hq.bucket.path(), later.path());
    let script = format!(
        "set -e; cd {dir}; mkdir data; mount -t tmpfs -o size=24m none data; cp -a enrolled/. data/
         r() {{ {bin} \"$@\" --config {dir}/relay.toml --json; }}
         rm -rf {bucket}; cp -a {before} {bucket}; r once >{out}/1
         head -c 24m /dev/zero >data/filler 2>/dev/null || true
         rm -rf {bucket}; cp -a {later} {bucket}
         for n in 2 3; do r once >{out}/$n || echo $? >{out}/$n.exit; done
         truncate -s -3M data/filler
         for n in 4 5; do r once >{out}/$n || echo $? >{out}/$n.exit; done
         r status >{out}/6; r verify >{out}/7
         rm data/filler; r once >{out}/8",
        dir = store.dir.path().display(),
        bin = env!("CARGO_BIN_EXE_store-relay"),
        bucket = hq.bucket.path().display(),
        before = before.path().display(),
        later = later.path().display(),
        out = out.path().display(),
    );
    let done = Command::new("unshare").args(["-Urm", "sh", "-c", &script]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let read = |n: u8| -> Value {
        serde_json::from_str(&fs::read_to_string(out.path().join(n.to_string())).unwrap()).unwrap()
    };
    assert_eq!(read(1)["versions"]["price@zone-east"], 1);
    for n in 2..=5 {
        assert_eq!(read(n)["versions"]["price@zone-east"], 1, "{}", read(n));
        // Not even the manifest can be kept, or one stream is behind.
        let exit = fs::read_to_string(out.path().join(format!("{n}.exit"))).unwrap();
        assert_eq!(exit.trim(), if n <= 3 { "1" } else { "3" });
        let errors = read(n)["status"]["errors"].to_string();
        assert!(errors.contains("DISK_FULL") && !errors.contains("PACK_IN_ERROR"), "{errors}");
    }
    assert_eq!(read(6)["streams"]["price@zone-east"]["version"], 1);
    assert_eq!(read(7)["right"], true);
    assert_eq!(read(8)["versions"]["price@zone-east"], 2, "{}", read(8));
    assert_eq!(read(8)["status"]["errors"].as_array().unwrap().len(), 0, "{}", read(8));
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    let copied = Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Kills the service at moments all over its work; whatever it was at, the end is right.
#[test]
fn kills_at_any_moment_lose_nothing() {
    let mut hq = published();
    let store = Store::new(&[hq.url()], "poll = \"50ms\"").enrolled(&hq);
    for n in 0..25u64 {
        let daemon = store.command(&["run"]).stderr(Stdio::null()).spawn().map(Daemon).unwrap();
        hq.publish(
            "price",
            &[(i64::try_from(n).unwrap(), Some("changed"))],
            if n % 3 == 0 { Make::Both } else { Make::Delta },
        );
        hq.sign();
        std::thread::sleep(Duration::from_millis(5 + n * 13 % 170));
        daemon.end(rustix::process::Signal::KILL);
        until("no trial outlives its relay", || !children_of_init_named_trial());
    }
    assert_eq!(store.json(&["once"]).0, 0);
    let (exit, report) = store.json(&["verify"]);
    assert_eq!((exit, &report["right"]), (0, &Value::from(true)), "{report}");
    let (_, status) = store.json(&["status"]);
    let head = &status["streams"]["price@zone-east"];
    assert_eq!(head["version"], 26);
    assert_eq!(head["digests"]["price_row"], hq.digest("price").to_string());
    let mut faults = status["errors"].as_array().unwrap().iter();
    assert!(faults.all(|f| f["code"] == "CRASH_LOOP"), "no kill is a try: {status}");
    let left: Vec<_> = walk(&store.data().join("ready")).chain(walk(&store.data().join("incoming"))).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn walk(dir: &std::path::Path) -> Box<dyn Iterator<Item = PathBuf>> {
    let entries: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    Box::new(entries.into_iter().flat_map(|p| if p.is_dir() { walk(&p) } else { Box::new(std::iter::once(p)) }))
}

/// Whether a trial of this test's store runs on without its parent.
fn children_of_init_named_trial() -> bool {
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|p| {
        let line = fs::read(p.path().join("cmdline")).unwrap_or_default();
        let stat = fs::read_to_string(p.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|s| s.split(' ').nth(1).map(str::to_owned));
        line.starts_with(b"store-relay\0trial") && parent.as_deref() == Some("1")
    })
}

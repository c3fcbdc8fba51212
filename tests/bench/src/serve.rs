//! The relay on the LAN, against nginx with sendfile on the same files: 30 clients that keep their connections.

use crate::Options;
use crate::client::Client;
use crate::measure::{Line, Results, Spread, Target, cpu_of};
use crate::stage::{STORE, Stage};
use std::net::SocketAddr;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tillcast_tests::{Nginx, http};

const CLIENTS: usize = 30;
const SPELL: Duration = Duration::from_secs(2);
/// Rows whose full weighs about 120 KB.
const ROWS: u64 = 3_200;

/// Packs, and version polls.
pub fn serve(options: &Options, results: &mut Results) {
    let stage = Stage::new(ROWS, 1, |b| b.relay("http.per_ip", "512"));
    stage.publish(&[]);
    let site = &stage.site;
    site.relay(STORE).run(&["once"]).ok();
    let relay = site.relay(STORE).start_ready();
    let ok = site.relay(STORE).dir.join("data/ok");
    let pack = "packs/catalog@all/0000000001.full.pack";
    // The file that a static server would have: the relay's own answer.
    let versions = http::get(&format!("{}/v1/versions", site.relay(STORE).url())).expect_status(200).body;
    let root = tillcast_tests::temp_dir("root");
    std::fs::create_dir_all(root.path().join("packs/catalog@all")).unwrap();
    std::fs::copy(ok.join(pack), root.path().join(pack)).unwrap();
    std::fs::write(root.path().join("versions"), &versions).unwrap();
    let nginx = Nginx::with(root.path(), "access_log off;");

    let pack_bytes = std::fs::metadata(ok.join(pack)).unwrap().len();
    let address = |url: String| url.trim_start_matches("http://").parse::<SocketAddr>().unwrap();
    let (ours, peer) = (address(site.relay(STORE).url()), address(nginx.url()));
    let pid = relay.process.pid();
    let cases = [
        (
            format!("packs of {ROWS} rows to {CLIENTS} clients, nginx with sendfile"),
            format!("/{pack}"),
            format!("/{pack}"),
            pack_bytes,
            0.7,
        ),
        (
            format!("version polls ({} bytes) of {CLIENTS} clients, nginx", versions.len()),
            "/v1/versions".into(),
            "/versions".into(),
            versions.len() as u64,
            0.9,
        ),
    ];
    for (what, our_path, peer_path, bytes, target) in cases {
        let (mut us, mut them, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.runs {
            let before = cpu_of(pid);
            us.push(load(ours, &our_path, bytes));
            cpu.push((cpu_of(pid) - before).as_secs_f64() * 1e6 / (us[us.len() - 1] * SPELL.as_secs_f64()));
            them.push(load(peer, &peer_path, bytes));
        }
        let figure = Spread::of(us.iter().zip(&them).map(|(a, b)| a / b));
        let behind = format!(
            "{:.0} requests/s against {:.0}; the relay spends {:.0} µs of processor on each",
            Spread::of(us),
            Spread::of(them),
            Spread::of(cpu)
        );
        results.line(Line { what, target: Target::AtLeast(target), figure, unit: "×", behind });
    }
    relay.term();
}

/// Requests a second.
fn load(address: SocketAddr, path: &str, bytes: u64) -> f64 {
    let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\n\r\n").into_bytes();
    let (stop, answers, start) = (AtomicBool::new(false), AtomicU64::new(0), Barrier::new(CLIENTS + 1));
    std::thread::scope(|s| {
        for _ in 0..CLIENTS {
            s.spawn(|| {
                let mut client = Client::connect(address);
                let mut ask = || assert_eq!(client.ask(&request), bytes, "the body's length");
                ask();
                start.wait();
                let mut count = 0;
                while !stop.load(Relaxed) {
                    ask();
                    count += 1;
                }
                answers.fetch_add(count, Relaxed);
            });
        }
        start.wait();
        let began = Instant::now();
        std::thread::sleep(SPELL);
        stop.store(true, Relaxed);
        began.elapsed()
    });
    answers.load(Relaxed) as f64 / SPELL.as_secs_f64()
}

//! A store that comes back after 30 days of daily changes, against installing it anew: bytes over the WAN, and time.

use crate::Options;
use crate::measure::{Line, Results, Spread, Target};
use crate::opening::copy;
use crate::stage::{STORE, Stage};
use std::time::Instant;
use tillcast_tests::Nginx;

const DAYS: usize = 30;

/// The relay's download and trial, and a register's apply.
pub fn back(options: &Options, results: &mut Results) {
    let mut stage = Stage::new(options.rows, 1, |b| b.agent("fallback", "[]"));
    let bucket = Nginx::serve(&stage.site.bucket());
    stage.site.relays.get_mut(STORE).unwrap().set("sources", &format!("[\"{}\"]", bucket.url()));
    let id = format!("{STORE}-01");
    let rooms = [stage.site.relay(STORE).dir.join("data"), stage.site.register(&id).dir.join("data")];
    rooms.iter().for_each(|room| copy(room, &room.with_extension("enrolled")));
    stage.publish(&[]);
    catch_up(&stage, &bucket);
    for _ in 0..DAYS {
        stage.change(options.rows / 100);
        stage.publish(&[]);
    }
    let returned = catch_up(&stage, &bucket);
    for room in &rooms {
        std::fs::remove_dir_all(room).unwrap();
        copy(&room.with_extension("enrolled"), room);
    }
    let installed = catch_up(&stage, &bucket);
    let line = |what: &str, ours: f64, peer: f64, behind: String| Line {
        what: format!("a store back after {DAYS} days of 1% of {} rows, {what} of installing it anew", options.rows),
        target: Target::AtMost(1.0),
        figure: Spread::of([ours / peer]),
        unit: "×",
        behind,
    };
    let (r, i) = (&returned, &installed);
    results.line(line("bytes", r.bytes, i.bytes, format!("{} bytes against {}", r.bytes, i.bytes)));
    let told = format!(
        "relay {:.2} s and register {:.2} s, against {:.2} s and {:.2} s",
        r.relay, r.register, i.relay, i.register
    );
    results.line(line("time", r.relay + r.register, i.relay + i.register, told));
}

struct CaughtUp {
    bytes: f64,
    relay: f64,
    register: f64,
}

fn catch_up(stage: &Stage, bucket: &Nginx) -> CaughtUp {
    let sent = || -> f64 { bucket.requests().iter().filter_map(|l| l.split(' ').nth(3)?.parse::<f64>().ok()).sum() };
    let seconds = |f: &dyn Fn()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let before = sent();
    let relay = seconds(&|| drop(stage.site.relay(STORE).run(&["once"]).ok()));
    // nginx writes its log after the answer: it has, once the count rests over a request of our own.
    tillcast_tests::http::get(&format!("{}/trust.json", bucket.url())).expect_status(200);
    let daemon = stage.site.relay(STORE).start_ready();
    let register = seconds(&|| drop(stage.site.register(&format!("{STORE}-01")).run(&["once"]).ok()));
    daemon.term();
    let version = stage.site.read(&format!("{STORE}-01"), "SELECT version FROM tillcast_stream").unwrap();
    assert_eq!(version, stage.site.version(STORE, "catalog").to_string());
    CaughtUp { bytes: sent() - before, relay, register }
}

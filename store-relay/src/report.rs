//! Heartbeats to headquarters: the relay's own, and the latest of each register that headquarters has not heard. What
//! is not answered is sent again; headquarters keeps the newest by sequence number, so that nothing is
//! counted twice.

use crate::beats;
use crate::hall::Hall;
use bytes::Bytes;
use proto::device::DeviceError;
use proto::disk;
use proto::dsse::Envelope;
use proto::failpoint;
use proto::fetch::{FetchError, Source};
use proto::follow;
use proto::ids::RegisterId;
use proto::layout::PackName;
use proto::retry::{Backoff, Verdict, random_unit};
use proto::wire::{self, Beat, BeatAnswer, Beats, Fault, Heartbeat, fault};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Heartbeats of registers in one post: 16 of at most 64 KiB are 1 MiB.
const BATCH: usize = 14;
/// Bytes of an answer.
const MAX_ANSWER: u64 = 256 << 10;
/// The least pause between posts, so that many changes make one.
const GATHER: Duration = Duration::from_millis(300);
const BACKOFF: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(60));

/// Why a report did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The way to headquarters.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// This device's own memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What was said or answered.
    #[error("a heartbeat cannot be written or its answer not read: {0}")]
    Json(#[from] serde_json::Error),
    /// Headquarters does not take it.
    #[error("headquarters refuses this relay's heartbeat: {0}")]
    Refused(String),
}

/// The relay's heartbeat of this moment, signed, and the faults that it carries. Takes a sequence number durably.
pub fn own_beat(hall: &Hall) -> Result<(Envelope, Vec<Fault>), ReportError> {
    let seq = next_seq(hall)?;
    heed_device(hall);
    beats::forget_doubles(hall);
    let mut status = hall.status();
    let over = hall.state().over(&status.errors);
    status.errors.extend(over);
    let (registers, now) = (registers_heard(hall), hall.clock.now());
    let device = follow::lock(&hall.device);
    let mut beat = Heartbeat {
        format: 1,
        device: status.id,
        run: device.run().map(str::to_owned),
        seq,
        sent_at: now,
        program: concat!("store-relay ", env!("CARGO_PKG_VERSION")).to_owned(),
        serial: status.serial,
        streams: status.streams.into(),
        network: status.network,
        errors: status.errors,
        debts: status.debts,
        disk: status.disk,
        clock_skew_s: status.clock_skew_s,
        registers,
    };
    beat.fit(&hall.config.limits)?;
    let envelope = serde_json::from_slice(&beat.seal(device.key())?)?;
    Ok((envelope, beat.errors))
}

/// The object of a fault about heartbeats.
const HEARTBEAT: &str = "heartbeat";

/// A failed sync of `device.db` halts like any other, whoever met it; a number that is not written is told by the
/// heartbeat that has it.
fn heed_device(hall: &Hall) {
    let (failed, unkept) = {
        let device = follow::lock(&hall.device);
        (device.halted().map(str::to_owned), device.unkept().map(str::to_owned))
    };
    match unkept {
        Some(why) => hall.own_trouble(Verdict::Retry, None, HEARTBEAT, &why),
        None => hall.mended(fault::LOCAL_FILES, HEARTBEAT),
    }
    if let Some(why) = failed.filter(|_| !hall.state().faults.values().any(|f| f.code == fault::HALTED)) {
        hall.own_trouble(Verdict::Halt, None, "", &why);
    }
}

/// The number of the next heartbeat; a full disk must not make the store silent.
fn next_seq(hall: &Hall) -> Result<u64, DeviceError> {
    let take = || follow::lock(&hall.device).next_seq();
    disk::or_make_room(take, DeviceError::is_disk_full, |e| hall.out_of_room(&e.to_string()))
}

/// Headquarters has heard of these faults.
fn was_told(hall: &Hall, heard: &[Fault]) {
    let is_heard = |name: &PackName| {
        let object = name.to_string();
        heard.iter().any(|f| f.code == fault::PACK_IN_ERROR && f.object.as_deref() == Some(&*object))
    };
    let (is_over, told) = {
        let mut state = hall.state();
        let healed = state.healed.len();
        state.healed.retain(|f| !heard.contains(f));
        let mut told = Vec::new();
        for name in state.untold().into_iter().filter(is_heard) {
            if let Some(attempts) = state.attempts.get_mut(&name) {
                attempts.told = true;
                told.push((name, attempts.clone()));
            }
        }
        (state.healed.len() < healed, told)
    };
    if is_over {
        hall.keep_over();
    }
    for (name, attempts) in told {
        // If the power goes first, it is told once more.
        if let Err(e) = hall.spool.put_attempts(&name, &attempts) {
            tracing::warn!(error = %e, "that headquarters heard of it was not written down");
        }
    }
}

fn registers_heard(hall: &Hall) -> std::collections::BTreeMap<RegisterId, u64> {
    let now = hall.clock.monotonic();
    hall.state().registers.iter().map(|(r, h)| (r.clone(), h.ago(now).as_secs())).collect()
}

/// Reports once: own heartbeat, and what headquarters has not heard of registers.
pub async fn report_once(hall: &Hall, hq: &Source) -> Result<(), ReportError> {
    let _one = hall.telling.lock().await;
    let mut refused = None;
    loop {
        let (beats, told, sent) = next_post(hall)?;
        let more = sent.len() == BATCH;
        let body = Bytes::from(serde_json::to_vec(&beats)?);
        let started = hall.clock.monotonic();
        let post = hq.post("v1/heartbeats", "application/json", body, MAX_ANSWER);
        let answer = failpoint::around("relay.report", post).await?;
        let answer: BeatAnswer = serde_json::from_slice(&answer)?;
        note_answer(hall, &answer, &sent, started);
        if let Some(last) = answer.go_on_above.get(hall.id.as_str()) {
            follow::lock(&hall.device).go_on_above(*last)?;
        }
        // The relay's own is the first of a post.
        let own = answer.refused.get(hall.id.as_str()).or_else(|| answer.refused.get(&wire::nameless(0)));
        match own.or_else(|| answer.refused.values().next().filter(|_| sent.is_empty())) {
            Some(why) => refused = Some(ReportError::Refused(why.clone())),
            // Those that the beat carried for certain; what was added meanwhile is told by the next.
            None => was_told(hall, &told),
        }
        // A relay that is refused carries for its registers all the same.
        if !more {
            return refused.map_or(Ok(()), Err);
        }
    }
}

/// The registers' heartbeats in a post, by sequence number.
type Sent = Vec<(RegisterId, u64)>;

fn next_post(hall: &Hall) -> Result<(Beats, Vec<Fault>, Sent), ReportError> {
    let (envelope, told) = own_beat(hall)?;
    let mut beats = vec![Beat { envelope, seen_s: 0 }];
    let (state, now) = (hall.state(), hall.clock.monotonic());
    let mut sent = Vec::new();
    // Who waits longest goes first: where posts fail, the next begin with others.
    let mut news: Vec<_> = state.registers.iter().filter(|(_, h)| h.is_news()).collect();
    news.sort_by_key(|(_, h)| h.at_hq.sent_at);
    for (register, heard) in news.into_iter().take(BATCH) {
        beats.push(Beat { envelope: heard.envelope.clone(), seen_s: heard.ago(now).as_secs() });
        sent.push((register.clone(), heard.beat.seq));
    }
    Ok((Beats { beats }, told, sent))
}

fn note_answer(hall: &Hall, answer: &BeatAnswer, sent: &Sent, started: Duration) {
    let (now, wall) = (hall.clock.monotonic(), hall.clock.now());
    let mut state = hall.state();
    state.hq_seen = Some(now);
    // The answer was written about half the way back ago.
    let half = i64::try_from((now.saturating_sub(started) / 2).as_secs()).unwrap_or(0);
    state.skew = Some(wall.as_second() - answer.now.as_second() - half);
    for (n, (register, seq)) in sent.iter().enumerate() {
        // The relay's own is the first of a post.
        let is_refused =
            [register.to_string(), wire::nameless(n + 1)].iter().any(|who| answer.refused.contains_key(who));
        // A newer one may have come meanwhile; a refused one is not sent again and again, nor is it there.
        if let Some(heard) = state.registers.get_mut(register).filter(|h| h.beat.seq >= *seq) {
            let at_hq = &mut heard.at_hq;
            at_hq.sent = at_hq.sent.max(*seq);
            at_hq.sent_at = Some(now);
            if !is_refused {
                at_hq.had = at_hq.had.max(*seq);
            }
        }
    }
    for (device, last) in &answer.go_on_above {
        if let Ok(register) = device.parse::<RegisterId>() {
            state.voices.entry(register).or_default().heard_at_hq = *last;
        }
    }
    for (device, why) in refused_anew(&mut state.refused, &answer.refused, sent, hall.id.as_str()) {
        tracing::warn!(
            device,
            why,
            "headquarters refuses its heartbeats; if it was revoked or enrolled elsewhere, enroll it anew"
        );
    }
}

/// The devices that headquarters begins to refuse. Which it refuses is known until it takes a heartbeat of theirs: one
/// line an episode, not one a heartbeat.
fn refused_anew<'a>(
    known: &mut BTreeSet<String>,
    refused: &'a BTreeMap<String, String>,
    sent: &Sent,
    own: &str,
) -> Vec<(&'a str, &'a str)> {
    let was_sent = |d: &str| d == own || d == wire::nameless(0) || sent.iter().any(|(r, _)| r.as_str() == d);
    known.retain(|d| refused.contains_key(d) || !was_sent(d));
    let news = refused.iter().filter(|(d, _)| known.insert((*d).clone()));
    news.map(|(d, why)| (d.as_str(), why.as_str())).collect()
}

/// Reports at every interval and soon after a change, until the process ends.
pub async fn run(hall: Arc<Hall>, hq: Source) {
    let mut failures = 0;
    loop {
        let wait = match report_once(&hall, &hq).await {
            Ok(()) => {
                if failures > 0 {
                    tracing::info!("reported again");
                }
                failures = 0;
                hall.config.heartbeat.0
            }
            Err(e) => {
                if failures == 0 {
                    tracing::warn!(error = %e, "not reported; it is tried again");
                }
                failures += 1;
                BACKOFF.delay(failures, random_unit()).max(GATHER).min(hall.config.heartbeat.0)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = hall.report.notified(), if failures == 0 => tokio::time::sleep(GATHER).await,
            () = hall.stop.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::{Hq, Store, now, secret};
    use crate::relay::{Pace, Relay};
    use crate::tries::{Attempts, Cause};
    use proto::digest::Sha256;
    use proto::fetch::SourceOptions;
    use proto::http::{Inbound, json};
    use proto::ids::DeviceId;
    use proto::wire::Network;

    #[test]
    fn a_device_that_is_refused_is_told_once_an_episode() {
        let mut known = BTreeSet::new();
        let sent: Sent = vec![("0421-03".parse().unwrap(), 7)];
        let mut told = |of: &[&str], sent: &Sent| {
            let refused = of.iter().map(|d| ((*d).to_owned(), "it was revoked".to_owned())).collect();
            refused_anew(&mut known, &refused, sent, "0421").len()
        };
        assert_eq!(told(&["0421", "0421-03"], &sent), 2);
        assert_eq!(told(&["0421", "0421-03"], &sent), 0);
        // A post without the register says nothing of it.
        assert_eq!(told(&["0421"], &Vec::new()), 0);
        assert_eq!(told(&["0421-03"], &sent), 0);
        assert_eq!(told(&["0421"], &sent), 1, "it was heard meanwhile");
        assert_eq!(told(&["0421-03"], &sent), 1);
    }

    #[test]
    fn a_failed_sync_of_the_devices_own_file_halts_and_is_told() {
        let hq = Hq::new();
        let relay = Store::enrolled(&[hq.url()]).open();
        assert!(!relay.is_halted());
        follow::lock(&relay.hall.device).fail_sync();
        let (envelope, _) = own_beat(&relay.hall).unwrap();
        let beat: Heartbeat = proto::dsse::peek(&serde_json::to_vec(&envelope).unwrap(), 64 << 10).unwrap();
        assert!(relay.is_halted() && beat.errors.iter().any(|f| f.code == fault::HALTED), "{beat:?}");
    }

    #[test]
    fn a_number_that_cannot_be_written_is_told_by_the_heartbeat_that_has_it() {
        let hq = Hq::new();
        let store = Store::enrolled(&[hq.url()]);
        let relay = store.open();
        for (seq, refuse) in [(1, false), (2, true), (3, true), (4, false)] {
            follow::lock(&relay.hall.device).refuse_writes(refuse);
            let (envelope, _) = own_beat(&relay.hall).unwrap();
            let beat: Heartbeat = proto::dsse::peek(&serde_json::to_vec(&envelope).unwrap(), 64 << 10).unwrap();
            assert_eq!((beat.seq, beat.errors.iter().any(|f| f.code == fault::LOCAL_FILES)), (seq, refuse));
        }
    }

    #[test]
    fn what_had_no_room_in_a_heartbeat_is_told_by_a_later_one() {
        let hq = Hq::new();
        let mut store = Store::enrolled(&[hq.url()]);
        store.config.limits.heartbeat_bytes = 4 << 10;
        let relay = store.open();
        let names: Vec<PackName> =
            (1..=20).map(|n| format!("price@zone-a/{n:010}.full.pack").parse().unwrap()).collect();
        for name in &names {
            let attempts = Attempts {
                sha256: Sha256::of(b"bad"),
                tries: 3,
                cause: Cause::Hash,
                code: "HASH".into(),
                reason: "x".repeat(100),
                since: now(),
                last: now(),
                in_error: true,
                unheard: false,
                judge: String::new(),
                told: false,
                etags: BTreeMap::new(),
            };
            relay.hall.state().attempts.insert(name.clone(), attempts);
        }
        let mut left = names.len();
        for beat in 1.. {
            let (_, told) = own_beat(&relay.hall).unwrap();
            assert!(!told.is_empty() && told.len() < names.len(), "{told:?}");
            was_told(&relay.hall, &told);
            left -= told.len();
            assert_eq!(relay.hall.state().untold().len(), left, "heartbeat {beat}");
            if left == 0 {
                return;
            }
        }
    }

    /// A headquarters that refuses these.
    async fn refusing(who: &[&str]) -> (Source, tokio::task::JoinHandle<()>) {
        answering(who, BTreeMap::new()).await
    }

    async fn answering(who: &[&str], go_on_above: BTreeMap<String, u64>) -> (Source, tokio::task::JoinHandle<()>) {
        let answer = BeatAnswer {
            hq_seen_s: Some(0),
            now: now(),
            refused: who.iter().map(|who| ((*who).to_owned(), "too long".to_owned())).collect(),
            passed_on: BTreeMap::new(),
            go_on_above,
        };
        let body = serde_json::to_vec(&answer).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let handler = move |_: http::Request<Inbound>, _| {
            let body = body.clone();
            async move { json(http::StatusCode::OK, body) }
        };
        let serve = proto::http::serve(listener, Default::default(), std::future::pending(), handler);
        (Source::parse(&url, &SourceOptions::default()).unwrap(), tokio::spawn(serve))
    }

    #[tokio::test]
    async fn a_heartbeat_that_headquarters_cannot_read_was_not_heard() {
        let hq = Hq::new();
        let relay = Store::enrolled(&[hq.url()]).open();
        let nameless = wire::nameless(0);
        for (who, heard) in [(&[nameless.as_str()][..], false), (&["?"], false), (&[], true)] {
            let (source, server) = refusing(who).await;
            let reported = report_once(&relay.hall, &source).await;
            assert_eq!(reported.is_ok(), heard, "{who:?}: {reported:?}");
            server.abort();
        }
    }

    /// A store whose registers have all said something.
    async fn with_registers(n: usize) -> (Store, Relay, Vec<RegisterId>) {
        let mut hq = Hq::new();
        let registers: Vec<RegisterId> = (1..=n).map(|n| format!("0421-{n:02}").parse().unwrap()).collect();
        hq.registers.extend(registers.iter().map(|r| (r.clone(), secret(33).public())));
        hq.sign();
        let store = Store::enrolled(&[hq.url()]);
        let relay = store.open();
        relay.mirror_once(Pace::Once).await;
        registers.iter().for_each(|r| say(&relay, r, 1));
        (store, relay, registers)
    }

    fn say(relay: &Relay, register: &RegisterId, seq: u64) {
        let taken = said(relay, register, seq);
        assert!(taken.refused.is_empty(), "{taken:?}");
    }

    fn said(relay: &Relay, register: &RegisterId, seq: u64) -> beats::Taken {
        let beat = Heartbeat {
            format: 1,
            device: DeviceId::Register(register.clone()),
            run: None,
            seq,
            sent_at: now(),
            program: "pos-agent test".into(),
            serial: None,
            streams: Default::default(),
            network: Network::InStore,
            errors: Vec::new(),
            debts: Vec::new(),
            disk: None,
            clock_skew_s: None,
            registers: Default::default(),
        };
        let envelope = serde_json::from_slice(&beat.seal(&secret(33)).unwrap()).unwrap();
        beats::take(&relay.hall, &Beats { beats: vec![Beat { envelope, seen_s: 0 }] }, [127, 0, 0, 1].into())
    }

    /// The relay is new, and the register was set back: only headquarters knows.
    #[tokio::test]
    async fn a_register_that_headquarters_heard_above_is_told_so() {
        let (_store, relay, registers) = with_registers(1).await;
        let above = BTreeMap::from([(registers[0].to_string(), 5000)]);
        let (source, _server) = answering(&[registers[0].as_str()], above.clone()).await;
        report_once(&relay.hall, &source).await.unwrap();
        assert_eq!(said(&relay, &registers[0], 2).go_on_above, above);
        assert!(said(&relay, &registers[0], 5001).go_on_above.is_empty());
    }

    #[test]
    fn heartbeats_of_a_register_that_cannot_be_read_are_told_by_their_place() {
        let hq = Hq::new();
        let store = Store::enrolled(&[hq.url()]);
        let relay = store.open();
        let unread = || Beat { envelope: own_beat(&relay.hall).unwrap().0, seen_s: 0 };
        let mut beats = Beats { beats: vec![unread(), unread(), unread()] };
        beats.beats.iter_mut().step_by(2).for_each(|b| b.envelope.payload = "?".into());
        let taken = beats::take(&relay.hall, &beats, [127, 0, 0, 1].into());
        let own = relay.hall.id.to_string();
        assert_eq!(taken.refused.into_keys().collect::<Vec<_>>(), [own, wire::nameless(0), wire::nameless(2)]);
    }

    #[tokio::test]
    async fn a_relay_that_is_refused_reports_all_its_registers_and_whoever_waits_longest_first() {
        let (store, relay, registers) = with_registers(BATCH + 3).await;
        let (source, _server) = refusing(&["0421"]).await;
        let reported = report_once(&relay.hall, &source).await;
        assert!(matches!(reported, Err(ReportError::Refused(_))), "{reported:?}");
        assert!(relay.hall.state().registers.values().all(|h| h.at_hq.had == 1));
        store.clock.advance(Duration::from_secs(60));
        registers[..BATCH].iter().for_each(|r| say(&relay, r, 2));
        report_once(&relay.hall, &source).await.unwrap_err();
        registers.iter().for_each(|r| say(&relay, r, 3));
        let (_, _, next) = next_post(&relay.hall).unwrap();
        assert_eq!(
            next[..4].iter().map(|(r, _)| r).collect::<Vec<_>>(),
            [&registers[BATCH], &registers[BATCH + 1], &registers[BATCH + 2], &registers[0]]
        );
    }

    #[tokio::test]
    async fn a_registers_heartbeat_that_headquarters_refuses_is_not_sent_again_and_not_passed_on() {
        let (_store, relay, registers) = with_registers(3).await;
        let (source, server) = refusing(&[registers[0].as_str(), &wire::nameless(2)]).await;
        report_once(&relay.hall, &source).await.unwrap();
        server.abort();
        let of = |r: &RegisterId| {
            let state = relay.hall.state();
            (state.registers[r].is_news(), state.registers[r].at_hq.had)
        };
        assert_eq!([0, 1, 2].map(|n| of(&registers[n])), [(false, 0), (false, 0), (false, 1)]);
        let (source, _server) = refusing(&[]).await;
        say(&relay, &registers[0], 2);
        assert_eq!(of(&registers[0]), (true, 0));
        report_once(&relay.hall, &source).await.unwrap();
        assert_eq!(of(&registers[0]), (false, 2));
    }
}

//! The way of a post, silence and what is late, of a relay and its register.

use super::*;
use crate::fleet::{self, Fleet};
use crate::ledger::{Complaint, Serials};
use proto::clock::TestClock;
use proto::ids::{StoreId, Version};
use proto::keys::SecretKey;
use proto::wire::{Beat, Fault, StreamReport, StreamState, fault};

struct World {
    dir: tempfile::TempDir,
    ledger: Ledger,
    clock: Arc<TestClock>,
}
fn key(n: u8) -> SecretKey {
    SecretKey::from_seed([n; 32])
}
fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}
fn beat(id: &str, seq: u64, by: &SecretKey, seen_s: u64, registers: &[(&str, u64)]) -> Beat {
    let registers = registers.iter().map(|(r, s)| (r.parse().unwrap(), *s)).collect();
    let heartbeat = Heartbeat { registers, ..Heartbeat::plain(id.parse().unwrap(), seq) };
    Beat { envelope: serde_json::from_slice(&heartbeat.seal(by).unwrap()).unwrap(), seen_s }
}

impl World {
    async fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_url(&format!("sqlite:{}", dir.path().join("f.db").display())).await.unwrap();
        let clock = Arc::new(TestClock::at("2026-01-01T00:00:00Z"));
        for (n, id) in [(1, "1"), (2, "1-1")] {
            ledger.enrol(&id.parse().unwrap(), &key(n).public(), clock.now()).await.unwrap();
        }
        World { dir, ledger, clock }
    }
    async fn intake(&self) -> Intake {
        let alerts = AlertsConfig::default();
        Intake::open(self.ledger.clone(), self.clock.clone(), Limits::default(), &alerts).await.unwrap()
    }
    /// (silent for, watched for) of relay and register, s.
    async fn seen(&self, intake: &Intake) -> Vec<(Option<u64>, u64)> {
        let enrolled = self.ledger.enrolled().await.unwrap();
        let views = intake.views(&enrolled);
        views.iter().map(|v| (v.silent_for.map(|d| d.as_secs()), v.watched_for.as_secs())).collect()
    }
}
async fn take(intake: &Intake, beats: Vec<Beat>) -> BTreeMap<String, String> {
    intake.take(Beats { beats }).await.unwrap().answer.refused
}

#[tokio::test]
async fn only_signed_beats_of_enrolled_devices_count() {
    let w = World::new().await;
    let i = w.intake().await;
    let all = vec![
        beat("1", 1, &key(1), 0, &[]),
        beat("1-1", 1, &key(1), 0, &[]),
        beat("1-2", 1, &key(3), 0, &[]),
        Beat { envelope: dsse::Envelope { payload: "?".into(), ..beat("1", 2, &key(1), 0, &[]).envelope }, seen_s: 0 },
    ];
    let refused = take(&i, all).await;
    assert_eq!(refused.keys().collect::<Vec<_>>(), ["1-1", "1-2", "beat 3"], "{refused:?}");
    assert!(refused["1-2"].contains("not enrolled"));
    // Again: nothing to say. Older: a copy, or a device set back.
    assert!(take(&i, vec![beat("1", 1, &key(1), 0, &[])]).await.is_empty());
    assert!(take(&i, vec![beat("1", 5, &key(1), 0, &[])]).await.is_empty());
    assert!(take(&i, vec![beat("1", 4, &key(1), 0, &[])]).await["1"].contains("older than 5"));
    let other = resealed(beat("1", 5, &key(1), 0, &[]), &key(1), |b| b.serial = Some(9));
    assert!(take(&i, vec![other]).await["1"].contains("number 5 was another heartbeat's"));
    w.ledger.revoke(&"1".parse().unwrap(), w.clock.now()).await.unwrap();
    assert!(take(&i, vec![beat("1", 6, &key(1), 0, &[])]).await["1"].contains("revoked"));
}

#[tokio::test]
async fn a_device_counts_as_it_is_enrolled_now_whatever_is_remembered_of_it() {
    let w = World::new().await;
    let i = w.intake().await;
    let enrol = async |id: &str, n| {
        w.ledger.enrol(&id.parse().unwrap(), &key(n).public(), w.clock.now()).await.unwrap();
    };
    assert!(take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await.is_empty());
    enrol("1-2", 3).await;
    assert!(take(&i, vec![beat("1-2", 1, &key(3), 0, &[])]).await.is_empty(), "a new one");
    enrol("1-1", 4).await;
    let both = vec![beat("1", 2, &key(1), 0, &[]), beat("1-1", 2, &key(2), 0, &[])];
    assert_eq!(take(&i, both).await.into_keys().collect::<Vec<_>>(), ["1-1"], "by the key of before");
    assert!(take(&i, vec![beat("1-1", 1, &key(4), 0, &[])]).await.is_empty(), "by its new one");
    // Three posts wait to be written together. One is of a store that was never heard, so that its devices are read after
    // the other two were proved; between the two a device of one of them is revoked.
    enrol("2", 5).await;
    assert!(take(&i, vec![beat("1-2", 2, &key(3), 0, &[])]).await.is_empty());
    let i = Arc::new(i);
    let writing = i.writing.lock().await;
    let mut posts = Vec::new();
    for (n, beats) in [
        vec![beat("1", 3, &key(1), 0, &[])],
        vec![beat("1-1", 2, &key(4), 0, &[]), beat("1-2", 3, &key(3), 0, &[])],
        vec![beat("2", 1, &key(5), 0, &[])],
    ]
    .into_iter()
    .enumerate()
    {
        if n == 2 {
            w.ledger.revoke(&"1-1".parse().unwrap(), w.clock.now()).await.unwrap();
        }
        let of = Arc::clone(&i);
        posts.push(tokio::spawn(async move { take(&of, beats).await }));
        while i.waiting().len() <= n {
            tokio::task::yield_now().await;
        }
    }
    let proved_at: Vec<_> = i.waiting().iter().map(|w| w.rows[0].proved_at.unwrap()).collect();
    assert!(proved_at[0] == proved_at[1] && proved_at[1] < proved_at[2], "{proved_at:?}");
    drop(writing);
    let mut refused = Vec::new();
    for post in posts {
        refused.push(post.await.unwrap());
    }
    assert!(refused[0].is_empty() && refused[2].is_empty() && refused[1].len() == 1, "{refused:?}");
    assert!(refused[1]["1-1"].contains("revoked"));
    let now = w.ledger.enrolments().await.unwrap();
    assert_eq!(i.keyring().at, now);
    assert_eq!(i.keyring().of.len(), 2, "who did not change is remembered on");
    let kept: Vec<u64> = w.ledger.beats(None).await.unwrap().iter().map(|b| b.seq).collect();
    assert_eq!(kept, [3, 1, 3, 1]);
}

#[tokio::test]
async fn silence_is_measured_through_relays_restarts_and_leaping_clocks() {
    let w = World::new().await;
    let i = w.intake().await;
    assert_eq!(w.seen(&i).await, [(None, 0), (None, 0)]);
    take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 20, &[])]).await;
    w.clock.advance(s(100));
    assert_eq!(w.seen(&i).await, [(Some(100), 100), (Some(120), 100)]);
    // The same beat again proves nothing; the relay's own word of its register does.
    take(&i, vec![beat("1-1", 1, &key(2), 0, &[])]).await;
    assert_eq!(w.seen(&i).await[1], (Some(120), 100));
    take(&i, vec![beat("1", 2, &key(1), 0, &[("1-1", 7)])]).await;
    assert_eq!(w.seen(&i).await, [(Some(0), 100), (Some(7), 100)]);
    // The wall clock leaps: nobody becomes silent by that.
    w.clock.set("2027-01-01T00:00:00Z".parse().unwrap());
    assert_eq!(w.seen(&i).await, [(Some(0), 100), (Some(7), 100)]);
    // A restart: the silence before it is known, the watch begins anew.
    take(&i, vec![beat("1", 3, &key(1), 0, &[])]).await;
    w.clock.advance(s(50));
    let i = w.intake().await;
    let seen = w.seen(&i).await;
    assert_eq!(seen[0], (Some(50), 0));
}

#[tokio::test]
async fn no_leap_of_the_clock_makes_a_silence() {
    let w = World::new().await;
    let i = w.intake().await;
    let start = w.clock.now().as_second();
    let years = (-56..=50).step_by(5).flat_map(|years| [years, -years / 2]);
    for (n, years) in years.enumerate() {
        w.clock.set(Timestamp::from_second(start + years * 365 * 86_400).unwrap());
        take(&i, vec![beat("1", n as u64 + 1, &key(1), 0, &[])]).await;
        w.clock.advance(s(60));
        assert_eq!(w.seen(&i).await[0].0, Some(60), "{years} years");
    }
}

/// A heartbeat with its words changed.
fn resealed(beat: Beat, by: &SecretKey, change: impl FnOnce(&mut Heartbeat)) -> Beat {
    let bytes = serde_json::to_vec(&beat.envelope).unwrap();
    let mut plain = dsse::peek::<Heartbeat>(&bytes, 1 << 16).unwrap();
    change(&mut plain);
    Beat { envelope: serde_json::from_slice(&plain.seal(by).unwrap()).unwrap(), ..beat }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn posts_that_come_together_are_each_answered() {
    let w = World::new().await;
    let i = Arc::new(w.intake().await);
    let mut posts = tokio::task::JoinSet::new();
    for n in 1..=60 {
        let (i, relay, register) = (i.clone(), beat("1", n, &key(1), 0, &[]), beat("1-1", n, &key(2), 0, &[]));
        posts.spawn(async move { i.take(Beats { beats: vec![relay, register] }).await.unwrap() });
    }
    let answers = posts.join_all().await;
    // Whoever was overtaken is told so, and by which.
    let (taken, older): (Vec<_>, Vec<_>) = answers.iter().partition(|t| t.proved);
    assert!(taken.iter().all(|t| t.answer.refused.is_empty()) && !taken.is_empty());
    assert!(older.iter().all(|t| t.answer.refused.len() == 2 && t.answer.refused["1"].contains("is older than")));
    let kept: Vec<u64> = i.ledger.beats(None).await.unwrap().into_iter().map(|b| b.seq).collect();
    assert_eq!(kept, [60, 60]);
    let heard = |id: &str| i.state().heard.get(&id.parse().unwrap()).unwrap().beat.seq;
    assert_eq!((heard("1"), heard("1-1")), (60, 60), "in the order in which they were written");
}

#[tokio::test]
async fn a_post_that_cannot_be_kept_keeps_nobody_elses_out() {
    let w = World::new().await;
    w.ledger.enrol(&"2".parse().unwrap(), &key(3).public(), w.clock.now()).await.unwrap();
    let db = rusqlite::Connection::open(w.dir.path().join("f.db")).unwrap();
    let no = "CREATE TRIGGER no BEFORE INSERT ON beat WHEN NEW.device = '1-1' BEGIN SELECT RAISE(ABORT, 'no'); END";
    db.execute_batch(no).unwrap();
    let i = Arc::new(w.intake().await);
    let writing = i.writing.lock().await;
    let mut posts = Vec::new();
    for (n, id) in [(1, "1"), (2, "1-1"), (3, "2")] {
        let (i, beats) = (i.clone(), vec![beat(id, 1, &key(n), 0, &[])]);
        posts.push(tokio::spawn(async move { i.take(Beats { beats }).await.is_ok() }));
    }
    while i.waiting().len() < 3 {
        tokio::task::yield_now().await;
    }
    drop(writing);
    let mut kept = Vec::new();
    for post in posts {
        kept.push(post.await.unwrap());
    }
    assert_eq!(kept, [true, false, true]);
    let heard = |id: &str| i.state().heard.get(&id.parse().unwrap()).is_some();
    assert_eq!(["1", "1-1", "2"].map(heard), [true, false, true]);
    let rows = w.ledger.beats(None).await.unwrap();
    assert_eq!(rows.iter().map(|b| b.device.as_str()).collect::<Vec<_>>(), ["1", "2"]);
}

#[tokio::test]
async fn who_was_not_heard_because_the_ledger_was_away_is_watched_anew() {
    let w = World::new().await;
    let i = w.intake().await;
    take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
    assert_eq!(i.watch_on(Duration::ZERO), Some(s(0)));
    assert_eq!(w.intake().await.watch_on(Duration::ZERO), None, "begun anew: nobody knows");
    let db = rusqlite::Connection::open(w.dir.path().join("f.db")).unwrap();
    let rename = |from: &str, to: &str| db.execute_batch(&format!("ALTER TABLE {from} RENAME TO {to}")).unwrap();
    let watched = async || w.seen(&i).await[0].1;
    let mut seq = 1;
    // The first is asked for when a beat of somebody who is not remembered is opened, the others when one is written.
    w.ledger.enrol(&"2".parse().unwrap(), &key(3).public(), w.clock.now()).await.unwrap();
    for table in ["device", "change", "beat"] {
        for (minutes, is_long) in [(1, false), (6, true)] {
            rename(table, "away");
            for minute in 0..minutes {
                seq += 1;
                let (id, by) = if table == "device" { ("2", key(3)) } else { ("1-1", key(2)) };
                let post = Beats { beats: vec![beat(id, seq, &by, 0, &[])] };
                assert!(i.take(post).await.is_err(), "{table}, {minute}");
                w.clock.advance(s(59));
            }
            rename("away", table);
            let before = watched().await;
            seq += 1;
            take(&i, vec![beat("1-1", seq, &key(2), 0, &[])]).await;
            assert_eq!(watched().await, if is_long { 0 } else { before }, "{table} away for {minutes} min");
            w.clock.advance(s(9));
            i.watch_on(Duration::ZERO);
            assert_eq!(watched().await, if is_long { 9 } else { before + 9 }, "it hears");
        }
    }
    // Nor is heard who hangs up while the ledger hangs.
    seq += 1;
    let lost = Beats { beats: vec![beat("1-1", seq, &key(2), 0, &[])] };
    let mut post = Box::pin(i.take(lost));
    assert!(futures_util::poll!(&mut post).is_pending());
    w.clock.advance(s(30));
    drop(post);
    w.clock.advance(s(200));
    assert_eq!(i.watch_on(Duration::ZERO), Some(s(30)));
    assert_eq!(watched().await, 200);
    w.clock.advance(s(100));
    assert_eq!(i.watch_on(Duration::ZERO), None, "nobody posts any more");
    // What cannot be kept for what it is makes nobody deaf.
    let no = "CREATE TRIGGER no BEFORE INSERT ON beat BEGIN SELECT RAISE(ABORT, 'no'); END";
    db.execute_batch(no).unwrap();
    let before = watched().await;
    for _ in 0..9 {
        seq += 1;
        assert!(i.take(Beats { beats: vec![beat("1-1", seq, &key(2), 0, &[])] }).await.is_err());
        w.clock.advance(s(59));
        i.watch_on(Duration::ZERO);
    }
    assert_eq!(watched().await, before + 9 * 59);
}

#[tokio::test]
async fn a_complaint_is_kept_without_characters_that_a_ledger_may_refuse() {
    let w = World::new().await;
    let i = w.intake().await;
    let hostile = |text: &str| format!("{text}\u{0}\n{}", "x".repeat(2000));
    let says = |b: &mut Heartbeat| {
        b.errors = [fault::DRIFT, fault::PACK_IN_ERROR, fault::PACK_MISSING]
            .map(|code| {
                let (code, object, text) = (code.to_owned(), Some(hostile("object")), hostile("text"));
                Fault { code, instance: None, object, text, since: w.clock.now() }
            })
            .into();
        (b.run, b.program, b.debts) = (Some(hostile("run")), hostile("program"), vec![hostile("debt")]);
    };
    let mut hostile_beat = resealed(beat("1-1", 1, &key(2), 0, &[]), &key(2), says);
    hostile_beat.envelope.signatures[0].keyid = hostile("key");
    assert!(take(&i, vec![hostile_beat]).await.is_empty());
    let kept = w.ledger.complaints().await.unwrap();
    assert_eq!(kept.len(), 3);
    for Complaint { fault: f, .. } in kept {
        let texts = [&f.code, &f.text, f.object.as_ref().unwrap()];
        assert!(texts.iter().all(|t| !t.contains(char::is_control) && t.chars().count() <= 1000), "{f:?}");
    }
    let envelopes = w.ledger.beats(None).await.unwrap();
    assert!(envelopes.iter().all(|b| !b.envelope.contains(char::is_control)));
}

#[tokio::test]
async fn a_second_machine_with_the_same_key_is_noticed_for_an_hour() {
    let w = World::new().await;
    let i = w.intake().await;
    let of = |run: &'static str, seq, sent: i64| {
        resealed(beat("1", seq, &key(1), 0, &[]), &key(1), |b| {
            b.run = Some(run.into());
            b.sent_at = Timestamp::from_second(sent).unwrap();
        })
    };
    let double = || i.views(&["1".parse().unwrap()])[0].is_double;
    // Both count on from where the disk was copied; one is always a little later.
    take(&i, vec![of("a", 1, 10)]).await;
    take(&i, vec![of("b", 1, 11)]).await;
    assert!(!double(), "it may have started anew");
    take(&i, vec![of("a", 2, 70)]).await;
    assert!(double());
    w.clock.advance(s(3599));
    assert!(double());
    w.clock.advance(s(1));
    assert!(!double());
    // Also when what it says is not taken at all.
    take(&i, vec![of("b", 1, 71)]).await;
    assert!(double());
}

#[tokio::test]
async fn who_holds_an_old_list_is_stuck_until_it_comes_nearer() {
    let w = World::new().await;
    let i = w.intake().await;
    let with = |seq, serial| resealed(beat("1", seq, &key(1), 0, &[]), &key(1), |b| b.serial = serial);
    let stuck = |serial: u64| {
        i.expect(&BTreeMap::from([("1".parse().unwrap(), Serials { wake: serial, signed: serial })]));
        i.views(&["1".parse().unwrap()])[0].stuck_for.map(|d| d.as_secs())
    };
    take(&i, vec![with(1, None)]).await;
    assert_eq!(stuck(0), None, "its list is not in the bucket yet");
    assert_eq!(stuck(3), Some(0));
    w.clock.advance(s(9));
    take(&i, vec![with(2, None)]).await;
    assert_eq!(stuck(3), Some(9));
    take(&i, vec![with(3, Some(2))]).await;
    assert_eq!(stuck(3), Some(0), "nearer: it gets something");
    w.clock.advance(s(5));
    assert_eq!(stuck(4), Some(5), "further away: nothing came");
    take(&i, vec![with(4, Some(4))]).await;
    assert_eq!(stuck(4), None);
    // A register has time from when its relay has the list.
    let register = || i.views(&["1-1".parse().unwrap()])[0].stuck_for.map(|d| d.as_secs());
    let of_register = |seq| resealed(beat("1-1", seq, &key(2), 0, &[]), &key(2), |b| b.serial = Some(4));
    take(&i, vec![of_register(1)]).await;
    assert_eq!((stuck(5), register()), (Some(0), None));
    w.clock.advance(s(9));
    assert_eq!((stuck(5), register()), (Some(9), None));
    take(&i, vec![with(5, Some(5))]).await;
    assert_eq!((stuck(5), register()), (None, Some(0)));
    w.clock.advance(s(9));
    assert_eq!((stuck(5), register()), (None, Some(9)));
    // Of a relay that is silent nobody gets anything; from its return on, and the register's, it counts anew.
    w.clock.advance(s(300));
    assert_eq!((stuck(5), register()), (None, Some(0)));
    w.clock.advance(s(9));
    take(&i, vec![with(6, Some(5))]).await;
    assert_eq!((stuck(5), register()), (None, Some(0)), "it may be switched off");
    take(&i, vec![of_register(2)]).await;
    w.clock.advance(s(9));
    assert_eq!((stuck(5), register()), (None, Some(9)));
}

/// Its line was cut, or it was switched off: something was published meanwhile, and its first word comes before it has it.
#[tokio::test]
async fn what_a_device_could_not_get_while_it_was_silent_is_not_counted() {
    let w = World::new().await;
    let (i, ids) = (w.intake().await, w.ledger.enrolled().await.unwrap());
    let of_relay =
        |seq, serial, ago| resealed(beat("1", seq, &key(1), 0, &[("1-1", ago)]), &key(1), |b| b.serial = Some(serial));
    let of_register = |seq, serial| resealed(beat("1-1", seq, &key(2), 2, &[]), &key(2), |b| b.serial = Some(serial));
    let found = |wake: u64| {
        let serials = BTreeMap::from([("1".parse().unwrap(), Serials { wake, signed: wake })]);
        i.expect(&serials);
        let assessment = fleet::assess(&Fleet {
            devices: &i.views(&ids),
            complaints: &[],
            published: &Published::new(),
            serials: &serials,
            expiring: &[],
            own_disk: None,
            deaf_for: Some(Duration::ZERO),
            alerts: &AlertsConfig::default(),
            now: w.clock.now(),
        });
        assessment.findings.into_keys().collect::<Vec<_>>().join(" ")
    };
    let mut seq = 1;
    take(&i, vec![of_relay(seq, 5, 2), of_register(1, 5)]).await;
    assert_eq!(found(5), "");
    // Its list is published, and three hours pass.
    for _ in 0..36 {
        w.clock.advance(s(300));
        assert_eq!(found(6), "store-silent/1");
    }
    for minute in 0..=15 {
        seq += 1;
        take(&i, vec![of_relay(seq, 5, 2)]).await;
        assert_eq!(found(6), if minute < 15 { "" } else { "store-stuck/1" }, "heard again for {minute} min");
        w.clock.advance(s(60));
    }
    seq += 1;
    take(&i, vec![of_relay(seq, 6, 2)]).await;
    assert_eq!(found(6), "", "its register has time");
    // That is switched off for the night, its relay is not.
    for n in 1..=150 {
        w.clock.advance(s(240));
        seq += 1;
        take(&i, vec![of_relay(seq, 6, 2 + 240 * n)]).await;
        found(6);
    }
    assert_eq!(found(6), "register-silent/1-1");
    for minute in 0..=15 {
        w.clock.advance(s(60));
        seq += 1;
        // Its relay's word of it comes first.
        take(&i, vec![of_relay(seq, 6, 2), of_register(2 + minute, 5)]).await;
        assert_eq!(found(6), if minute < 15 { "" } else { "register-stuck/1-1" }, "on for {minute} min");
    }
    // It comes on, nobody waits for anything, and then an old copy of its disk is put back.
    for minute in 0..=16 {
        w.clock.advance(s(60));
        seq += 1;
        take(&i, vec![of_relay(seq, 6, 2), of_register(18 + minute, if minute == 0 { 6 } else { 5 })]).await;
        assert_eq!(found(6), if minute < 16 { "" } else { "register-stuck/1-1" }, "{minute}");
    }
    // A list comes at closing time, when registers are switched off; they have it when they are switched on again.
    take(&i, vec![of_register(50, 6)]).await;
    for (closed, serial) in [(20, 7), (29, 8)] {
        for minute in 1..=closed {
            w.clock.advance(s(60));
            seq += 1;
            take(&i, vec![of_relay(seq, serial, 2 + 60 * minute)]).await;
            assert_eq!(found(serial), "", "silent for {minute} min");
        }
        let register = 50 + serial * 2;
        take(&i, vec![of_register(register, serial - 1)]).await;
        assert_eq!(found(serial), "", "it is just on");
        w.clock.advance(s(60));
        take(&i, vec![of_register(register + 1, serial)]).await;
        assert_eq!(found(serial), "");
    }
    // It is run each ten minutes from now on, and gets nothing: the first silence may be any.
    w.clock.advance(s(60));
    take(&i, vec![of_register(90, 8)]).await;
    for minute in 1..=40 {
        w.clock.advance(s(60));
        seq += 1;
        let mut beats = vec![of_relay(seq, 9, 2 + 60 * (minute % 10))];
        beats.extend((minute % 10 == 0).then(|| of_register(90 + minute, 8)));
        take(&i, beats).await;
        assert_eq!(found(9), if minute < 25 { "" } else { "register-stuck/1-1" }, "{minute}");
    }
}

/// Its list comes, and a pack that it lists does not: a source that answers 500, a web page, nothing.
#[tokio::test]
async fn who_has_its_list_and_comes_no_further_in_a_stream_is_late() {
    let w = World::new().await;
    let i = w.intake().await;
    let report = |(stream, version, state): &(&str, u64, StreamState)| {
        let version = Version::try_from(*version).ok();
        (stream.parse().unwrap(), StreamReport { version, schema: None, digests: BTreeMap::new(), state: *state })
    };
    let says = |id: &str, seq, streams: &[(&str, u64, StreamState)], code: Option<&str>| {
        let by = key(if id == "1" { 1 } else { 2 });
        resealed(beat(id, seq, &by, 0, &[]), &by, |b| {
            b.streams = Arc::new(streams.iter().map(report).collect());
            let (since, object) = (b.sent_at, None);
            let of = |code: &str| Fault { code: code.into(), instance: None, object, text: String::new(), since };
            b.errors = code.map(of).into_iter().collect();
        })
    };
    let late = |id: &str| {
        i.expect(&BTreeMap::from([("1".parse().unwrap(), Serials { wake: 0, signed: 3 })]));
        i.expect(&BTreeMap::from([("1".parse().unwrap(), Serials { wake: 3, signed: 3 })]));
        i.views(&[id.parse().unwrap()])[0].late_for.map(|d| d.as_secs())
    };
    use StreamState::{Behind, Error, Ok, Unknown, Waiting};
    let (a, b) = ("a@all", "b@all");
    take(&i, vec![says("1", 1, &[(a, 4, Behind), (b, 7, Behind)], None)]).await;
    assert_eq!(late("1"), Some(0));
    w.clock.advance(s(9));
    // One goes on, the other does not: by each publish of the first nobody would hear of the second.
    take(&i, vec![says("1", 2, &[(a, 4, Behind), (b, 8, Behind)], None)]).await;
    assert_eq!(late("1"), Some(9));
    let of_register = says("1-1", 1, &[(a, 4, Behind), (b, 8, Ok)], None);
    take(&i, vec![of_register]).await;
    w.clock.advance(s(9));
    assert_eq!((late("1"), late("1-1")), (Some(18), Some(0)), "a register has it from its relay");
    take(&i, vec![says("1", 3, &[(a, 5, Ok), (b, 8, Ok)], None)]).await;
    w.clock.advance(s(9));
    assert_eq!((late("1"), late("1-1")), (None, Some(9)));
    // What a relay of a later build says of it is no reason to wait.
    take(&i, vec![says("1", 4, &[(a, 5, Unknown), (b, 8, Ok)], None)]).await;
    w.clock.advance(s(9));
    assert_eq!((late("1"), late("1-1")), (None, Some(18)));
    // A pack in error at the relay is told as that: by none of its registers.
    take(&i, vec![says("1", 5, &[(a, 5, Error), (b, 8, Ok)], None)]).await;
    assert_eq!((late("1"), late("1-1")), (None, Some(0)));
    for (seq, streams, code) in
        [(6, [(a, 5, Waiting), (b, 8, Error)], None), (7, [(a, 5, Behind), (b, 8, Behind)], Some(fault::DISK_FULL))]
    {
        take(&i, vec![says("1", seq, &streams, code)]).await;
        assert_eq!(late("1"), None, "held up by the POS application, or mailed as such: {streams:?}");
    }
    // Of a stream that only a later build knows.
    take(&i, vec![says("1", 8, &[(a, 5, Behind)], Some(fault::PACK_IN_ERROR))]).await;
    assert_eq!(late("1"), Some(0), "that pack is none of these streams'");
    take(&i, vec![says("1", 9, &[(a, 0, Waiting)], None)]).await;
    assert_eq!(late("1"), Some(0), "a new one that gets nothing");
}

/// A publish every 300 s, looked at between sign and put, and before any relay has it: a frozen source, a register that
/// refuses its list, and beside them a store that is always late and gets each list.
#[tokio::test]
async fn publishes_in_quick_succession_hide_nobody_who_gets_nothing() {
    let w = World::new().await;
    for (n, id) in [(3, "2"), (4, "2-1"), (5, "3"), (6, "3-1")] {
        w.ledger.enrol(&id.parse().unwrap(), &key(n).public(), w.clock.now()).await.unwrap();
    }
    let i = w.intake().await;
    let holds = |n: u8, id: &str, seq: u64, serial: u64| {
        resealed(beat(id, seq, &key(n), 0, &[]), &key(n), |b| b.serial = Some(serial))
    };
    let (mut seq, ids) = (0, w.ledger.enrolled().await.unwrap());
    for publish in 1..=5 {
        let (new, stores) = (10 + publish, ["1", "2", "3"].map(|id| id.parse::<StoreId>().unwrap()));
        let serials = |wake| stores.iter().map(|s| (s.clone(), Serials { wake, signed: new })).collect();
        for (second, serial_2, serial_3) in [(0, new - 1, new - 2), (60, new, new - 2), (200, new, new - 1)] {
            i.expect(&serials(if second == 0 { 0 } else { new }));
            w.clock.advance(s(if second == 0 { 60 } else { 120 }));
            seq += 1;
            let of_2 = [holds(3, "2", seq, serial_2), holds(4, "2-1", seq, 9)];
            let of_3 = [holds(5, "3", seq, serial_3), holds(6, "3-1", seq, serial_3)];
            let of_1 = [holds(1, "1", seq, 10), holds(2, "1-1", seq, 10)];
            take(&i, of_1.into_iter().chain(of_2).chain(of_3).collect()).await;
            i.expect(&serials(new));
        }
    }
    // The next one is just put.
    let serials = ["1", "2", "3"].map(|id| (id.parse().unwrap(), Serials { wake: 16, signed: 16 })).into();
    i.expect(&serials);
    let (published, alerts) = (Published::new(), AlertsConfig::default());
    let assessment = fleet::assess(&Fleet {
        devices: &i.views(&ids),
        complaints: &[],
        published: &published,
        serials: &serials,
        expiring: &[],
        own_disk: None,
        deaf_for: Some(Duration::ZERO),
        alerts: &alerts,
        now: w.clock.now(),
    });
    assert_eq!(assessment.findings.into_keys().collect::<Vec<_>>(), ["register-stuck/2-1", "store-stuck/1"]);
}

#[tokio::test]
async fn what_devices_of_a_store_say_alike_of_their_streams_is_kept_once() {
    let w = World::new().await;
    let i = w.intake().await;
    let holds = async |id: &str, by: u8, seq, version: u64| {
        let report = StreamReport {
            version: Version::try_from(version).ok(),
            schema: None,
            digests: BTreeMap::new(),
            state: StreamState::Ok,
        };
        let streams = BTreeMap::from([("price@all".parse().unwrap(), report)]);
        let beat = resealed(beat(id, seq, &key(by), 0, &[]), &key(by), |b| b.streams = Arc::new(streams));
        assert!(take(&i, vec![beat]).await.is_empty());
    };
    let is_once = || {
        let of = |id: &str| Arc::clone(&i.state().heard.get(&id.parse().unwrap()).unwrap().beat.streams);
        Arc::ptr_eq(&of("1"), &of("1-1"))
    };
    holds("1", 1, 1, 1).await;
    holds("1-1", 2, 1, 1).await;
    assert!(is_once());
    holds("1", 1, 2, 2).await;
    assert!(!is_once(), "the relay is ahead");
    holds("1-1", 2, 2, 2).await;
    assert!(is_once());
}

#[tokio::test]
async fn who_has_nothing_to_tell_is_left_out_until_there_is_something() {
    let w = World::new().await;
    let i = w.intake().await;
    let id: DeviceId = "1".parse().unwrap();
    let news = |complaints: &[Complaint]| i.news(std::slice::from_ref(&id), complaints).len();
    assert_eq!(news(&[]), 1, "never heard: not installed yet, or anew");
    take(&i, vec![beat("1", 1, &key(1), 0, &[])]).await;
    assert_eq!(news(&[]), 1);
    i.note_calm([(&id, 1)].into_iter());
    assert_eq!(news(&[]), 0);
    let text = "healed meanwhile".to_owned();
    let fault = Fault { code: fault::DRIFT.into(), instance: None, object: None, text, since: w.clock.now() };
    assert_eq!(news(&[Complaint { device: id.clone(), fault }]), 1);
    w.clock.advance(s(299));
    assert_eq!(news(&[]), 0);
    w.clock.advance(s(1));
    assert_eq!(news(&[]), 1, "silent");
    take(&i, vec![beat("1", 2, &key(1), 0, &[])]).await;
    assert_eq!(news(&[]), 1, "another one");
}

#[tokio::test]
async fn a_fault_that_was_mended_between_two_judgements_is_judged_once() {
    let w = World::new().await;
    let i = w.intake().await;
    let drift = Fault {
        code: fault::DRIFT.into(),
        instance: None,
        object: Some("store.db".into()),
        text: "a row differs (mended)".into(),
        since: Timestamp::UNIX_EPOCH,
    };
    let with = |seq, errors: Vec<Fault>| resealed(beat("1-1", seq, &key(2), 0, &[]), &key(2), |b| b.errors = errors);
    let judged = async |i: &Intake| {
        let (ids, complaints) = (["1-1".parse().unwrap()], i.ledger.unjudged().await.unwrap());
        let (published, serials, alerts) = (Published::new(), BTreeMap::new(), AlertsConfig::default());
        let devices = i.news(&ids, &complaints);
        let fleet = Fleet {
            devices: &devices,
            complaints: &complaints,
            published: &published,
            serials: &serials,
            expiring: &[],
            own_disk: None,
            deaf_for: Some(Duration::ZERO),
            alerts: &alerts,
            now: w.clock.now(),
        };
        let told = fleet::assess(&fleet).findings.into_values().map(|f| f.lines.len()).sum::<usize>();
        i.note_calm(fleet::calm(&fleet));
        i.ledger.judged(&complaints).await.unwrap();
        told
    };
    take(&i, vec![with(1, vec![drift.clone()])]).await;
    take(&i, vec![with(2, Vec::new())]).await;
    take(&i, vec![with(3, Vec::new())]).await;
    // `serve` may have died meanwhile.
    let i = w.intake().await;
    assert_eq!((judged(&i).await, judged(&i).await), (1, 0));
    take(&i, vec![with(4, vec![drift.clone()])]).await;
    take(&i, vec![with(5, vec![drift])]).await;
    assert_eq!(judged(&i).await, 1, "the beat's own, once");
}

#[tokio::test]
async fn a_fault_began_as_long_ago_as_the_device_says_whatever_its_clock_shows() {
    let w = World::new().await;
    let i = w.intake().await;
    let time = |t: &str| t.parse::<Timestamp>().unwrap();
    for (n, (sent, began, ago)) in [
        ("1970-01-02T00:01:00Z", "1970-01-02T00:00:00Z", 60 + 20),
        ("2040-01-01T00:00:05Z", "2040-01-01T00:00:00Z", 5 + 20),
        ("2026-01-01T00:00:00Z", "2030-01-01T00:00:00Z", 20),
    ]
    .into_iter()
    .enumerate()
    {
        w.clock.advance(s(3600));
        let told = resealed(beat("1-1", n as u64 + 1, &key(2), 20, &[]), &key(2), |b| {
            b.sent_at = time(sent);
            let (code, text, since) = (fault::PACK_IN_ERROR.to_owned(), "x".to_owned(), time(began));
            b.errors = vec![Fault { code, instance: None, object: None, text, since }];
        });
        take(&i, vec![told]).await;
        let known = w.ledger.complaints().await.unwrap();
        assert_eq!(since(w.clock.now(), known[0].fault.since), s(ago), "{sent}");
    }
}

/// Its relay's line is away for six minutes in each twenty-five.
#[tokio::test]
async fn a_register_that_is_dead_behind_a_line_that_comes_and_goes_is_told() {
    let w = World::new().await;
    let (i, ids) = (w.intake().await, w.ledger.enrolled().await.unwrap());
    take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
    let (mut seq, mut told) = (1, None);
    for minute in 1..=75 {
        w.clock.advance(s(60));
        // Of the dead one, its relay says when it heard it.
        if minute % 25 < 19 {
            seq += 1;
            take(&i, vec![beat("1", seq, &key(1), 0, &[("1-1", minute * 60)])]).await;
        }
        let assessment = fleet::assess(&Fleet {
            devices: &i.views(&ids),
            complaints: &[],
            published: &Published::new(),
            serials: &BTreeMap::new(),
            expiring: &[],
            own_disk: None,
            deaf_for: Some(Duration::ZERO),
            alerts: &AlertsConfig::default(),
            now: w.clock.now(),
        });
        if assessment.findings.contains_key("register-silent/1-1") {
            told = told.or(Some(minute));
        }
    }
    // 18 minutes, and from the 25th on 12 more.
    assert_eq!(told, Some(37));
    // Whoever was away for hours has time.
    w.clock.advance(s(7200));
    take(&i, vec![beat("1", seq + 1, &key(1), 0, &[])]).await;
    assert_eq!(w.seen(&i).await[1].1, 0);
}

#[tokio::test]
async fn a_store_that_comes_back_gives_its_registers_time() {
    let w = World::new().await;
    let i = w.intake().await;
    take(&i, vec![beat("1", 1, &key(1), 0, &[]), beat("1-1", 1, &key(2), 0, &[])]).await;
    w.clock.advance(s(7200));
    take(&i, vec![beat("1", 2, &key(1), 0, &[])]).await;
    w.clock.advance(s(60));
    assert_eq!(w.seen(&i).await, [(Some(60), 7260), (Some(7260), 60)]);
    // Without a relay of its own nobody could carry its word.
    let ids = w.ledger.enrolled().await.unwrap();
    assert_eq!(i.views(&ids[1..])[0].watched_for, s(0));
    // What another process recorded is taken over.
    let other = w.intake().await;
    take(&other, vec![beat("1-1", 2, &key(2), 3, &[])]).await;
    i.read_ledger().await.unwrap();
    assert_eq!(w.seen(&i).await[1].0, Some(3));
}

//! What TUF's suite leaves out: servers without an end, power and kill, epochs, stores, clocks, several sources.

use super::repo::Gate;
use super::*;
use proto::clock::after;
use proto::config::HumanDuration;
use proto::device::Device;
use proto::failpoint;
use proto::fetch::{FetchErrorKind, RateFloor, Source};
use proto::follow::{Follower, lock};
use proto::layout::ObjectName;
use proto::trust::accept_manifest;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// The objects that a device with an older list and older trust reads, and their limits.
fn all_objects(client: &Client) -> [(ObjectName, u64); 3] {
    let limits = &client.limits;
    [(list_name(), limits.manifest_bytes), (ObjectName::Trust, limits.trust_bytes), (trust_name(2), limits.trust_bytes)]
}

/// A device at trust file 1; headquarters has gone on to trust file 2.
async fn one_behind() -> (Repo, Client) {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.rotate(12);
    (repo, client)
}

#[tokio::test]
async fn an_object_without_end_is_read_to_its_limit() {
    let (mut repo, client) = one_behind().await;
    for (name, limit) in all_objects(&client) {
        let good = repo.object(&name).to_vec();
        repo.server.say(&name, Answer::Endless(good.clone()));
        let failed = Outcome::Failed(name.to_string(), FetchErrorKind::TooLong);
        assert_eq!(client.refresh(&repo).await, failed, "{name}");
        let given = repo.server.given();
        assert!(given > limit && given < limit + (64 << 10), "{name}: {given} bytes were taken");
        // With a length it is not begun; at the limit it is read.
        let padded = |to: u64| [&good[..], &vec![b' '; to as usize - good.len()]].concat();
        repo.server.put(&name, &padded(limit + 1));
        assert_eq!(client.refresh(&repo).await, failed, "{name}");
        assert_eq!(client.kept(), (1, Some(1)), "{name}");
        repo.restore();
    }
    for (name, limit) in all_objects(&client) {
        let good = repo.object(&name);
        repo.server.put(&name, &[good, &vec![b' '; limit as usize - good.len()]].concat());
    }
    client.takes("at the limit", &repo).await;
    client.recovers("the next", &mut repo).await;
}

#[tokio::test]
async fn a_pack_without_end_is_read_to_the_listed_length() {
    let mut repo = Repo::new();
    let rows = vec![b'r'; 100_000];
    let name = repo.add_pack("price@zone-east", None, 1, &rows);
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("the list", &repo).await;
    for begin in [&rows[..], b""] {
        repo.server.say(&name.clone().into(), Answer::Endless(begin.to_vec()));
        assert_eq!(client.download(&repo, &name).await, Err(FetchErrorKind::TooLong));
        assert!(repo.server.given() < 200_000);
        assert!(!client.part(&name).exists());
    }
    client.recovers("an end", &mut repo).await;
    assert_eq!(client.download(&repo, &name).await.unwrap(), rows);
}

async fn given_up(n: usize, answer: Answer, kind: FetchErrorKind) {
    let (mut repo, mut client) = one_behind().await;
    client.options.read_timeout = HumanDuration(Duration::from_secs(1));
    let (name, _) = all_objects(&client)[n].clone();
    repo.server.say(&name, answer.clone());
    let outcome = client.refresh(&repo).await;
    assert_eq!(outcome, Outcome::Failed(name.to_string(), kind), "{answer:?}");
    assert_eq!(client.kept(), (1, Some(1)), "{name}, {answer:?}");
    client.recovers("it speaks", &mut repo).await;
}

#[tokio::test]
async fn a_server_that_says_nothing_or_too_little_is_given_up() {
    let cases = (0..3).flat_map(|n| {
        [
            given_up(n, Answer::Silence, FetchErrorKind::Network),
            given_up(n, Answer::HeadOnly, FetchErrorKind::Network),
            given_up(n, Answer::Drip, FetchErrorKind::Slow),
        ]
    });
    futures_util::future::join_all(cases).await;
}

#[tokio::test]
async fn a_pack_that_comes_too_slowly_keeps_its_bytes_and_goes_on_from_them() {
    let mut repo = Repo::new();
    let rows: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    let name = repo.add_pack("price@zone-east", None, 1, &rows);
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("the list", &repo).await;
    // Nothing is as fast as that: given up at the second piece.
    let floor = RateFloor { bytes_per_second: 1 << 60, window: HumanDuration(Duration::from_nanos(1)) };
    repo.server.say(&name.clone().into(), Answer::Pieces(rows.clone(), 100_000));
    assert_eq!(client.download_by(&repo, &name, &floor).await, Err(FetchErrorKind::Slow));
    assert_eq!(std::fs::read(client.part(&name)).unwrap(), rows[..200_000]);
    client.recovers("fast enough", &mut repo).await;
    repo.server.asked();
    assert!(client.download(&repo, &name).await.unwrap() == rows);
    assert_eq!(repo.server.asked_packs(), ["1.full.pack bytes=200000-"]);
}

/// What the victim reads: its device's home, the bucket, the point at which it dies.
const VICTIM: &str = "TILLCAST_CONFORMANCE_VICTIM";

#[tokio::test]
#[ignore = "run by the case that kills it"]
async fn the_victim_of_a_kill() {
    let Ok(order) = std::env::var(VICTIM) else { return };
    let [home, bucket, point] = *order.split('\n').collect::<Vec<_>>() else { panic!("{order}") };
    failpoint::arm(Some(point.to_owned()), None);
    let limits = Default::default();
    let device = Device::open(Path::new(home), &"0421".parse().unwrap(), &limits).unwrap().into();
    let source = Source::parse(&format!("file://{bucket}"), &Default::default()).unwrap();
    let clock = proto::clock::TestClock::at(&t0().to_string());
    let news = Follower::new(vec![source]).refresh(&device, &clock, &limits, None).await;
    panic!("it lived: {news:?}");
}

#[tokio::test]
async fn killed_while_saving_it_starts_with_what_was_before_or_after() {
    for (point, kept) in [
        ("device.trust.before", (1, Some(1))),
        ("device.trust.after", (2, Some(1))),
        ("device.manifest.before", (2, Some(1))),
        ("device.manifest.after", (2, Some(2))),
    ] {
        let (mut repo, client) = one_behind().await;
        let bucket = tempfile::tempdir().unwrap();
        repo.write_to(bucket.path());
        let order = [client.home.path().to_str().unwrap(), bucket.path().to_str().unwrap(), point].join("\n");
        let victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "ours::the_victim_of_a_kill", "--ignored"])
            .env(VICTIM, order)
            .output()
            .unwrap();
        assert_eq!(victim.status.signal(), Some(9), "{point}: {victim:?}");
        assert_eq!(client.kept(), kept, "{point}");
        client.recovers(point, &mut repo).await;
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// The log of the database holds the one transaction that saves trust, list and memory; the power goes while it is
/// written: what follows is missing, or is what was there before.
#[tokio::test]
async fn a_power_cut_while_saving_leaves_what_was_before_or_after() {
    let (mut repo, client) = one_behind().await;
    let before = tempfile::tempdir().unwrap();
    copy(client.home.path(), before.path());
    let log = |dir: &Path| -> PathBuf { dir.join("device.db-wal") };
    let old = std::fs::read(log(before.path())).unwrap();
    let device = client.device();
    let new = {
        let mut d = lock(&device);
        let trust = d.trust().step(repo.object(&trust_name(2)), &client.limits).unwrap();
        let store = d.id().store().clone();
        let list = repo.object(&list_name());
        let accepted = accept_manifest(list, &store, &trust, d.seen(), t0(), &client.limits).unwrap();
        d.save(&trust, Some(&accepted)).unwrap();
        std::fs::read(log(client.home.path())).unwrap()
    };
    drop(device);
    let mut after_all = 0;
    for cut in (0..new.len()).step_by(512).chain([1, 31, 33, new.len()]) {
        for rest in [&[][..], old.get(cut..).unwrap_or_default()] {
            let torn = Client::at(tempfile::tempdir().unwrap());
            copy(before.path(), torn.home.path());
            let _ = std::fs::remove_file(torn.home.path().join("device.db-shm"));
            std::fs::write(log(torn.home.path()), [&new[..cut], rest].concat()).unwrap();
            let kept = torn.kept();
            assert!([(1, Some(1)), (2, Some(2))].contains(&kept), "cut at {cut}: {kept:?}");
            after_all += usize::from(kept.0 == 2);
            if cut % 4096 == 0 {
                assert!(matches!(torn.refresh(&repo).await, Outcome::News | Outcome::Same), "cut at {cut}");
                assert_eq!(torn.kept(), (2, Some(2)), "cut at {cut}");
            }
        }
    }
    assert!(after_all >= 2, "whole, it is there");
    client.recovers("the power is back", &mut repo).await;
}

#[tokio::test]
async fn a_kept_list_that_was_bent_is_not_believed_and_fetched_anew() {
    let (repo, client) = one_behind().await;
    client.takes("second", &repo).await;
    let bent = |sql: &str| {
        let db = rusqlite::Connection::open(client.home.path().join("device.db")).unwrap();
        assert_eq!(db.execute(sql, []).unwrap(), 1);
    };
    // A list that its publisher did sign, but not the one that was accepted; then none at all.
    let other = repo.list_by(&[12], |m| m.relay = Some(key(3).public()));
    let text = serde_json::to_string(&String::from_utf8(other).unwrap()).unwrap().replace('\'', "''");
    for value in [text.as_str(), "\"{}\"", "", "17"] {
        bent(&format!("UPDATE fact SET value = '{value}' WHERE name = 'manifest'"));
        assert!(lock(&client.device()).manifest().is_none(), "{value}");
        assert_eq!(lock(&client.device()).seen().serial, 2, "what was seen is not forgotten: {value}");
        let first = Repo::new();
        repo.forge_list(first.object(&list_name()));
        assert_eq!(client.refresh(&repo).await, list_refused("BAD_SIGNATURE"), "{value}");
        repo.forge_list(&repo.list_by(&[12], |m| m.serial = 1));
        assert_eq!(client.refresh(&repo).await, list_refused("OLDER_SERIAL"), "{value}");
        repo.restore();
        client.takes(value, &repo).await;
    }
}

#[tokio::test]
async fn an_epoch_never_falls_and_a_list_is_of_the_epoch_of_today() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    repo.put_trust(|t| t.epoch = 3);
    repo.put_list(|m| m.epoch = 3);
    client.takes("epoch 3", &repo).await;
    for epoch in [0, 2] {
        repo.forge_trust(&repo.trust_by(&[1], |t| t.epoch = epoch));
        let kept = client.kept();
        client.refuses("trust", &mut repo, trust_refused(3, "BAD_TRUST"), kept).await;
    }
    for (epoch, code) in [(0, "BAD_MANIFEST"), (2, "OTHER_EPOCH"), (4, "OTHER_EPOCH"), (u64::MAX, "OTHER_EPOCH")] {
        repo.forge_list(&repo.list_by(&[11], |m| m.epoch = epoch));
        let kept = client.kept();
        client.refuses("list", &mut repo, list_refused(code), kept).await;
    }
    // The first is 1: 0 is of what nobody signed.
    let mut repo = Repo::new();
    repo.trust.version = 0;
    repo.put_trust(|t| t.epoch = 0);
    repo.put_list(|m| m.epoch = 0);
    let client = Client::of(&repo);
    assert_eq!(client.refresh(&repo).await, trust_refused(1, "BAD_TRUST"));
    assert_eq!(client.kept(), (0, None));
}

#[tokio::test]
async fn a_list_of_another_store_is_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    for store in ["0815", "04210", "421"] {
        repo.forge_list(&repo.list_by(&[11], |m| m.store = store.parse().unwrap()));
        let kept = client.kept();
        client.refuses(store, &mut repo, list_refused("OTHER_STORE"), kept).await;
    }
}

#[tokio::test]
async fn a_walk_of_more_steps_than_the_limit_is_not_begun() {
    let mut repo = Repo::new();
    let mut client = Client::of(&repo);
    client.takes("first", &repo).await;
    let too_many = || Outcome::Refused(ObjectName::Trust, "TOO_MANY_TRUST_STEPS");
    for claimed in [1026, u64::MAX] {
        repo.server.put(&ObjectName::Trust, &repo.trust_by(&[], |t| t.version = claimed));
        repo.server.asked();
        assert_eq!(client.refresh(&repo).await, too_many());
        assert_eq!(repo.server.asked(), ["stores/0421/manifest.json", "trust.json"]);
        let kept = client.kept();
        client.refuses(&claimed.to_string(), &mut repo, too_many(), kept).await;
    }
    client.limits.trust_steps = 4;
    (0..5).for_each(|_| repo.put_trust(|_| ()));
    repo.put_list(|_| ());
    assert_eq!(client.refresh(&repo).await, too_many());
    client.limits.trust_steps = 5;
    client.takes("as many as the limit", &repo).await;
}

#[tokio::test]
async fn a_clock_that_is_wrong_locks_nobody_out() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    for (clock, first) in [
        ("1970-01-01T00:00:00Z", Outcome::News),
        ("2025-12-31T23:59:59Z", Outcome::News),
        ("2026-01-30T23:59:59Z", Outcome::News),
        ("2026-01-31T00:00:00Z", list_refused("EXPIRED")),
        // By then the key has ended, too.
        ("2027-01-01T00:00:00Z", list_refused("KEY_EXPIRED")),
        ("2076-01-01T00:00:00Z", list_refused("KEY_EXPIRED")),
    ] {
        repo.put_list(|_| ());
        client.clock.set(clock.parse().unwrap());
        assert_eq!(client.refresh(&repo).await, first, "{clock}");
        // Put right, it goes on: no time but a signed one is remembered.
        client.clock.set(t0());
        assert_eq!(lock(&client.device()).seen().floor, Some(t0()), "{clock}");
        let now = if first == Outcome::News { Outcome::Same } else { Outcome::News };
        assert_eq!(client.refresh(&repo).await, now, "{clock}");
        assert_eq!(client.kept(), (1, Some(repo.list.serial)), "{clock}");
    }
}

#[tokio::test]
async fn time_is_never_earlier_than_what_was_signed_last() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    repo.now = after(t0(), 10 * DAY);
    repo.put_list(|_| ());
    client.takes("ten days later", &repo).await;
    client.clock.set("1970-01-01T00:00:00Z".parse().unwrap());
    let end = repo.now;
    repo.put_list(|m| m.expires_at = end);
    client.refuses("it has ended by then", &mut repo, list_refused("EXPIRED"), (1, Some(2))).await;
    repo.put_trust(|t| t.publishers[0].expires_at = end);
    repo.put_list(|_| ());
    assert_eq!(client.refresh(&repo).await, list_refused("KEY_EXPIRED"), "and so has its key");
    repo.rotate(12);
    client.takes("by a new key", &repo).await;
}

#[tokio::test]
async fn of_several_sources_the_highest_good_list_is_taken() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    let [stale, evil, gone, good] = [(); 4].map(|()| std::sync::Arc::<Server>::default());
    let show = |server: &Server, repo: &Repo| {
        for name in [list_name(), ObjectName::Trust, trust_name(1)] {
            server.put(&name, repo.object(&name));
        }
    };
    show(&stale, &repo);
    repo.put_list(|_| ());
    show(&good, &repo);
    show(&evil, &repo);
    evil.put(&list_name(), &repo.list_by(&[66], |m| m.serial = 9));
    let mut follower = client.follower(&[&stale, &evil, &gone, &good]);
    let news = follower.refresh(&client.device(), &client.clock, &client.limits, None).await;
    let codes: Vec<_> = news.problems.iter().map(|p| p.code()).collect();
    assert_eq!((news.changed, news.reached, codes), (true, 3, vec!["BAD_SIGNATURE", "SOURCE"]));
    assert_eq!(client.kept(), (1, Some(2)));
    // In whatever order they are asked: the stale one is older now.
    let mut follower = client.follower(&[&good, &stale]);
    let news = follower.refresh(&client.device(), &client.clock, &client.limits, None).await;
    let codes: Vec<_> = news.problems.iter().map(|p| p.code()).collect();
    assert_eq!((news.changed, codes), (false, vec!["OLDER_SERIAL"]));
    assert_eq!(client.kept(), (1, Some(2)));
}

#[tokio::test]
async fn enrolled_anew_it_keeps_what_it_knows_unless_the_roots_are_others() {
    let (repo, client) = one_behind().await;
    client.takes("second", &repo).await;
    Device::enrol(client.home.path(), &client.code(repo.trust.root.clone())).unwrap();
    assert_eq!(client.kept(), (2, Some(2)));
    repo.forge_list(&repo.list_by(&[12], |m| m.serial = 1));
    assert_eq!(client.refresh(&repo).await, list_refused("OLDER_SERIAL"));
    Device::enrol(client.home.path(), &client.code(roots(1, &[66]))).unwrap();
    assert_eq!(client.kept(), (0, None));
    repo.restore();
    assert_eq!(client.refresh(&repo).await, trust_refused(1, "BAD_SIGNATURE"));
    Device::enrol(client.home.path(), &client.code(repo.trust.root.clone())).unwrap();
    client.takes("by the right roots", &repo).await;
}

/// Two sources are read at once, as a relay does. The one that answers last began with what was known at first, and is
/// in the hands of whoever has the key that was revoked meanwhile.
#[tokio::test]
async fn a_slower_source_with_older_trust_takes_nobody_back() {
    for epoch in [1, 2] {
        let mut repo = Repo::new();
        let client = Client::of(&repo);
        client.takes("first", &repo).await;
        let slow = std::sync::Arc::<Server>::default();
        let gate = std::sync::Arc::<Gate>::default();
        slow.say(&ObjectName::Trust, Answer::Gated(gate.clone(), repo.object(&ObjectName::Trust).to_vec()));
        slow.put(&list_name(), &repo.list_by(&[11], |m| m.serial = 1 << 40));
        repo.signer = 12;
        repo.put_trust(|t| (t.epoch, t.publishers) = (epoch, vec![publisher(12)]));
        repo.put_list(|m| m.epoch = epoch);
        let device = client.device();
        let (mut by_slow, mut by_good) = (client.follower(&[&slow]), client.follower(&[&repo.server]));
        let good = async {
            gate.asked.notified().await;
            let outcome = client.look(&mut by_good, &device).await;
            gate.open.notify_one();
            outcome
        };
        let (of_slow, of_good) = tokio::join!(client.look(&mut by_slow, &device), good);
        assert_eq!((of_slow, of_good), (list_refused("BAD_SIGNATURE"), Outcome::News), "epoch {epoch}");
        drop(device);
        assert_eq!(client.kept(), (2, Some(2)), "epoch {epoch}");
        client.recovers("the next", &mut repo).await;
    }
}

/// The second trust file revokes a key, the third is none: what was revoked stays so, also by another source.
#[tokio::test]
async fn a_walk_that_breaks_off_keeps_what_it_has_walked() {
    let (mut repo, client) = one_behind().await;
    let stale = Repo::new();
    let broken = [
        (Answer::Bytes(repo.trust_by(&[66], |_| ())), trust_refused(3, "BAD_SIGNATURE")),
        (Answer::Bytes(Vec::new()), trust_refused(3, "NOT_AN_ENVELOPE")),
        (Answer::Endless(Vec::new()), Outcome::Failed(trust_name(3).to_string(), FetchErrorKind::TooLong)),
    ];
    for (answer, outcome) in broken {
        repo.server.put(&ObjectName::Trust, &repo.trust_by(&[66], |_| ()));
        repo.server.say(&trust_name(3), answer);
        assert_eq!(client.refresh(&repo).await, outcome);
        assert_eq!(client.kept(), (2, Some(1)), "{outcome:?}");
        stale.forge_list(&stale.list_by(&[11], |m| m.serial = 9));
        assert_eq!(client.refresh(&stale).await, list_refused("BAD_SIGNATURE"), "{outcome:?}");
        assert_eq!(client.kept(), (2, Some(1)), "{outcome:?}");
    }
    client.recovers("the next", &mut repo).await;
}

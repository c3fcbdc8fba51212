//! Readers are asked: what a walk of the bucket's trust files accepts is what counts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

use super::*;
use crate::cli::{RevokeKey, Rotate};
use crate::ledger::BeatRow;
use proto::clock::TestClock;
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::trust::{Accepted, Refusal, Seen, TrustState, accept_manifest};
use std::fs;
use std::time::Duration;

struct World {
    dir: tempfile::TempDir,
    config: Config,
    clock: TestClock,
}

impl World {
    async fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("hq.toml"),
            "[source]\nurl = \"sqlite:hq.db\"\n[objects]\nurls = [\"file:objects\"]\n[state]\ndir = \"state\"\n\
             [stores]\nquery = \"SELECT id, zone, region FROM store\"\n",
        )
        .unwrap();
        let db = rusqlite::Connection::open(dir.path().join("hq.db")).unwrap();
        db.execute_batch(
            "CREATE TABLE store (id TEXT, zone TEXT, region TEXT); INSERT INTO store VALUES ('0421', 'east', NULL);",
        )
        .unwrap();
        let config = crate::config::load(Some(&dir.path().join("hq.toml")), []).unwrap().value;
        World { dir, config, clock: TestClock::at("2026-01-01T00:00:00Z") }
    }
    async fn desk(&self) -> Desk<'_> {
        Desk::open(&self.config, &self.clock, false).await.unwrap()
    }
    fn ledger_files(&self) -> [std::path::PathBuf; 3] {
        ["fleet.db", "fleet.db-wal", "fleet.db-shm"].map(|f| self.dir.path().join("state").join(f))
    }
    fn back_up(&self) {
        let backup = self.dir.path().join("backup.db");
        let ledger = rusqlite::Connection::open(&self.ledger_files()[0]).unwrap();
        ledger.execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    }
    fn restore(&self) {
        self.ledger_files().iter().for_each(|f| drop(fs::remove_file(f)));
        fs::copy(self.dir.path().join("backup.db"), &self.ledger_files()[0]).unwrap();
    }
    fn object(&self, name: &ObjectName) -> Vec<u8> {
        fs::read(self.dir.path().join("objects").join(name.to_string())).unwrap()
    }
    fn code(&self, text: &str) -> EnrolCode {
        EnrolCode::from_text(text, self.clock.now()).unwrap()
    }
    /// Walks from a state to the newest trust file.
    fn walk(&self, mut state: TrustState) -> Result<TrustState, Refusal> {
        let limits = Limits::default();
        let claimed = TrustState::claimed_version(&self.object(&ObjectName::Trust), &limits).unwrap();
        for n in state.steps_to(claimed, &limits)? {
            state = state.step(&self.object(&ObjectName::TrustVersion(n)), &limits)?;
        }
        Ok(state)
    }
    fn accept(&self, state: &TrustState, seen: &Seen) -> Result<Accepted, Refusal> {
        let store = "0421".parse().unwrap();
        let bytes = self.object(&ObjectName::Manifest("0421".parse().unwrap()));
        accept_manifest(&bytes, &store, state, seen, self.clock.now(), &Limits::default())
    }
    fn publisher(&self, n: u64) -> SecretKey {
        keys::read(&self.dir.path().join(format!("state/keys/publisher-{n}.key"))).unwrap()
    }
}

fn day(n: u64) -> Duration {
    Duration::from_secs(n * 86_400)
}
fn id(s: &str) -> DeviceId {
    s.parse().unwrap()
}

#[tokio::test]
async fn init_enrol_revoke() {
    let w = World::new().await;
    assert!(matches!(w.desk().await.enroll(&id("0421")).await, Err(EnrolError::Manifests(_))), "no trust yet");
    assert_eq!(w.desk().await.init().await.unwrap().outcome, "made");
    let again = w.desk().await.init().await.unwrap();
    assert_eq!((again.outcome, again.root_keys.len(), again.publisher_keys.len()), ("found", 1, 1));
    assert!(matches!(w.desk().await.enroll(&id("0999")).await, Err(EnrolError::UnknownStore(_))));

    // Before the first publish: the store is looked up in the source.
    let relay = w.desk().await.enroll(&id("0421")).await.unwrap();
    let register = w.desk().await.enroll(&id("0421-03")).await.unwrap();
    let code = w.code(&register.code);
    let state = w.walk(TrustState::pinned(code.roots.clone(), code.trust_version)).unwrap();
    let m = w.accept(&state, &Seen::default()).unwrap();
    assert_eq!(m.manifest.relay, Some(w.code(&relay.code).key().unwrap().public()));
    assert_eq!(m.manifest.registers.values().collect::<Vec<_>>(), [&code.key().unwrap().public()]);
    assert!(m.manifest.streams.is_empty());

    w.desk().await.revoke(&id("0421-03")).await.unwrap();
    let m = w.accept(&state, &m.seen).unwrap();
    assert!(m.manifest.registers.is_empty() && m.manifest.relay.is_some());
    w.desk().await.revoke(&id("0421-03")).await.expect("again is fine");
    assert!(matches!(w.desk().await.revoke(&id("0421-09")).await, Err(EnrolError::NotEnrolled(_))));
}

#[tokio::test]
async fn who_enrolls_a_device_that_is_heard_is_told_so() {
    let w = World::new().await;
    let desk = w.desk().await;
    desk.init().await.unwrap();
    let register = id("0421-03");
    assert_eq!(desk.enroll(&register).await.unwrap().last_heard_at, None);
    let at = w.clock.now();
    let beat = BeatRow {
        device: register.clone(),
        seq: 1,
        envelope: "{}".into(),
        received_at: at,
        last_seen_at: at,
        serial: None,
        complaints: Vec::new(),
        versions: Vec::new(),
        proved_at: None,
    };
    desk.ledger.record_beats(std::slice::from_ref(&beat)).await.unwrap();
    assert_eq!(desk.enroll(&register).await.unwrap().last_heard_at, Some(at));
    assert_eq!(desk.enroll(&register).await.unwrap().last_heard_at, None, "not with the key that it has now");
    // Of one that is revoked nothing is cut off.
    desk.ledger.record_beats(&[beat]).await.unwrap();
    desk.revoke(&register).await.unwrap();
    assert_eq!(desk.enroll(&register).await.unwrap().last_heard_at, None);
}

#[tokio::test]
async fn ids_that_differ_only_in_case_are_refused() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.enroll(&id("0421-AB")).await.unwrap();
    let e = w.desk().await.enroll(&id("0421-ab")).await.unwrap_err();
    assert_eq!(
        e.to_string(),
        "0421-ab differs only in case from 0421-AB, which is enrolled: write it 0421-AB, or revoke that first"
    );
    w.desk().await.enroll(&id("0421-AB")).await.expect("anew is fine");
    w.desk().await.revoke(&id("0421-AB")).await.unwrap();
    w.desk().await.enroll(&id("0421-ab")).await.unwrap();
    // A store that the source has in another case than the ledger.
    let source = rusqlite::Connection::open(w.dir.path().join("hq.db")).unwrap();
    source.execute_batch("INSERT INTO store VALUES ('xy', NULL, NULL)").unwrap();
    w.desk().await.enroll(&id("xy")).await.unwrap();
    source.execute_batch("UPDATE store SET id = 'XY' WHERE id = 'xy'").unwrap();
    let e = w.desk().await.enroll(&id("XY")).await.unwrap_err();
    assert!(matches!(e, EnrolError::Stores(_)) && e.to_string().contains("XY differs only in case from xy"), "{e}");
}

#[tokio::test]
async fn three_rotations_pass_over_a_store_that_is_away() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421")).await.unwrap().code);
    let away = TrustState::pinned(code.roots, code.trust_version);
    let first = w.accept(&w.walk(away.clone()).unwrap(), &Seen::default()).unwrap();

    for n in 0..3 {
        w.clock.advance(Duration::from_secs(3600));
        let report = w.desk().await.rotate(&Rotate { root: n == 1, ..Rotate::default() }).await.unwrap();
        assert_eq!((report.publishers.len(), report.manifests_signed), (1, Some(1)));
    }
    let state = w.walk(away).unwrap();
    assert_eq!(state.version(), 7);
    assert_eq!(state.trust().unwrap().publishers[0].key, w.publisher(4).public());
    let m = w.accept(&state, &first.seen).unwrap();
    assert!(m.seen.serial > first.seen.serial);
    // The root was replaced too: the old file no longer signs.
    let old = Rotate { root_key: vec![w.dir.path().join("state/keys/root-1.key")], ..Rotate::default() };
    assert!(matches!(w.desk().await.rotate(&old).await, Err(EnrolError::Keys(KeysError::NoRoot { .. }))));
}

#[tokio::test]
async fn a_rotation_in_two_steps_and_one_cut_short() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.enroll(&id("0421")).await.unwrap();
    assert!(matches!(
        w.desk().await.rotate(&Rotate { finish: true, ..Rotate::default() }).await,
        Err(EnrolError::NothingToFinish(1))
    ));
    let half = w.desk().await.rotate(&Rotate { keep_old: true, ..Rotate::default() }).await.unwrap();
    assert_eq!((half.version, half.publishers.len()), (2, 2));
    let done = w.desk().await.rotate(&Rotate { finish: true, ..Rotate::default() }).await.unwrap();
    assert_eq!((done.version, done.publishers.len()), (3, 1));
    assert_eq!(done.publishers[0].id, w.publisher(2).public().id());

    // Killed after the key was written: the next run takes that key, not another.
    w.desk().await.keyring().create(Role::Publisher).unwrap();
    let next = w.desk().await.rotate(&Rotate::default()).await.unwrap();
    assert_eq!(next.publishers[0].id, w.publisher(3).public().id());
    assert!(!w.dir.path().join("state/keys/publisher-4.key").exists());
    // While somebody publishes, keys stay.
    let ledger = Ledger::open(&w.config).await.unwrap();
    let config = Config {
        publish: crate::config::PublishConfig {
            lease_wait: proto::config::HumanDuration(Duration::ZERO),
            ..w.config.publish.clone()
        },
        ..w.config.clone()
    };
    ledger.acquire("publish on hq1", w.clock.now(), Duration::from_secs(60)).await.unwrap();
    let busy = Desk::open(&config, &w.clock, false).await.unwrap().rotate(&Rotate::default()).await;
    assert!(matches!(busy, Err(EnrolError::Busy(_))));
}

#[tokio::test]
async fn a_stolen_key_that_jumped_ahead_is_overcome_by_a_new_epoch() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421")).await.unwrap().code);
    let state = w.walk(TrustState::pinned(code.roots, code.trust_version)).unwrap();
    let good = w.accept(&state, &Seen::default()).unwrap();

    // The thief signs a manifest far ahead in serial and time.
    let thief = w.publisher(1);
    let mut evil = good.manifest.get().clone();
    evil.serial = u64::MAX / 4;
    evil.created_at = after(w.clock.now(), day(3650));
    evil.expires_at = after(w.clock.now(), day(7300));
    let bytes = trust::sign_manifest(&evil, &thief).unwrap();
    let store = "0421".parse().unwrap();
    let fooled = accept_manifest(&bytes, &store, &state, &good.seen, w.clock.now(), &Limits::default()).unwrap();

    let revoke = RevokeKey { key: thief.public().id(), new_epoch: true, root_key: Vec::new(), clock_is_right: false };
    let report = w.desk().await.revoke_key(&revoke).await.unwrap();
    assert_eq!((report.epoch, report.publishers.len()), (2, 1));
    assert_ne!(report.publishers[0].id, thief.public().id());
    w.desk().await.revoke_key(&revoke).await.expect("again only finishes");
    let state = w.walk(state).unwrap();
    let m = w.accept(&state, &fooled.seen).expect("the way back");
    assert_eq!(m.seen.serial, good.seen.serial + 1);
    let refused = accept_manifest(&bytes, &store, &state, &m.seen, w.clock.now(), &Limits::default()).unwrap_err();
    assert_eq!(refused.code(), "BAD_SIGNATURE");
    let unknown = RevokeKey { key: "ffff0000".into(), ..revoke };
    assert!(matches!(w.desk().await.revoke_key(&unknown).await, Err(EnrolError::UnknownKey { .. })));
}

/// He may put lists without end: who runs the command twice has it done.
#[tokio::test]
async fn a_thiefs_lists_stop_a_revocation_once() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421")).await.unwrap().code);
    let state = w.walk(TrustState::pinned(code.roots, code.trust_version)).unwrap();
    let (good, thief) = (w.accept(&state, &Seen::default()).unwrap(), w.publisher(1));
    let put = |serial| {
        let evil = proto::manifest::Manifest { serial, ..good.manifest.get().clone() };
        let path = w.dir.path().join("objects/stores/0421/manifest.json");
        fs::write(path, trust::sign_manifest(&evil, &thief).unwrap()).unwrap();
        w.accept(&state, &good.seen).unwrap().seen
    };
    let revoke = RevokeKey { key: thief.public().id(), new_epoch: true, root_key: Vec::new(), clock_is_right: false };
    put(50);
    let e = w.desk().await.revoke_key(&revoke).await.unwrap_err();
    assert!(matches!(e, EnrolError::SetBack(_)) && e.to_string().contains("run this again"), "{e}");
    assert_eq!(w.desk().await.show().await.unwrap().version, 1);
    assert_eq!(w.desk().await.ledger.unsent_mails().await.unwrap().len(), 1);
    let fooled = put(90);
    let report = w.desk().await.revoke_key(&revoke).await.unwrap();
    assert_eq!((report.version, report.epoch, report.manifests_signed), (2, 2, Some(1)));
    w.accept(&w.walk(state.clone()).unwrap(), &fooled).expect("the way back");
}

/// Revoked first, and only then are stores found that the thief locked out.
#[tokio::test]
async fn a_new_epoch_begins_though_the_key_is_revoked_already() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421")).await.unwrap().code);
    let thief = w.publisher(1);
    let revoke =
        |new_epoch| RevokeKey { key: thief.public().id(), new_epoch, root_key: Vec::new(), clock_is_right: false };
    assert_eq!(w.desk().await.revoke_key(&revoke(false)).await.unwrap().epoch, 1);
    // The ledger has seen times that this key signed.
    let ahead = after(w.clock.now(), day(3650));
    w.desk().await.ledger.touch(ahead).await.unwrap();
    let report = w.desk().await.revoke_key(&revoke(true)).await.unwrap();
    assert_eq!((report.version, report.epoch, report.manifests_signed), (3, 2, Some(1)));
    assert_eq!(report.publishers[0].id, w.publisher(2).public().id(), "the key in use stays");
    assert!(w.desk().await.ledger.latest_time().await.unwrap().unwrap() < ahead);
    let state = w.walk(TrustState::pinned(code.roots, code.trust_version)).unwrap();
    assert!(w.accept(&state, &Seen { epoch: 1, serial: u64::MAX / 4, ..Seen::default() }).is_ok());
    // It has begun: the times of this one stay, and the clock is looked at as ever.
    let later = after(w.clock.now(), day(1));
    w.desk().await.ledger.touch(later).await.unwrap();
    let again = w.desk().await.revoke_key(&revoke(true)).await.unwrap();
    assert_eq!((again.version, again.epoch), (3, 2));
    assert_eq!(w.desk().await.ledger.latest_time().await.unwrap(), Some(later));
    w.clock.advance(day(3650));
    assert!(matches!(w.desk().await.revoke_key(&revoke(true)).await, Err(EnrolError::Manifests(_))));
    assert_eq!(w.desk().await.ledger.latest_time().await.unwrap(), Some(later));
}

/// Its file lies where it lay, with a number above that of the key in use.
#[tokio::test]
async fn a_revoked_key_is_not_taken_for_the_next_one() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.rotate(&Rotate { keep_old: true, ..Rotate::default() }).await.unwrap();
    let stolen = w.publisher(2).public().id();
    let revoke = RevokeKey { key: stolen.clone(), new_epoch: false, root_key: Vec::new(), clock_is_right: false };
    w.desk().await.revoke_key(&revoke).await.unwrap();
    let report = w.desk().await.rotate(&Rotate::default()).await.unwrap();
    let trusted: Vec<&String> = report.publishers.iter().map(|p| &p.id).collect();
    assert_eq!(trusted, [&w.publisher(3).public().id()], "{stolen} was revoked");
}

#[tokio::test]
async fn a_clock_that_leapt_signs_nothing_until_somebody_vouches() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.enroll(&id("0421")).await.unwrap();
    w.clock.advance(day(400));
    let e = w.desk().await.enroll(&id("0421-01")).await.unwrap_err();
    assert!(matches!(e, EnrolError::Manifests(ManifestsError::ClockLeapt { .. })), "{e}");
    // Nor are keys changed.
    for _ in 0..2 {
        let e = w.desk().await.rotate(&Rotate::default()).await.unwrap_err();
        assert!(matches!(e, EnrolError::Manifests(ManifestsError::ClockLeapt { .. })), "{e}");
        let key = w.publisher(1).public().id();
        let revoke = RevokeKey { key, new_epoch: false, root_key: Vec::new(), clock_is_right: false };
        let e = w.desk().await.revoke_key(&revoke).await.unwrap_err();
        assert!(matches!(e, EnrolError::Manifests(ManifestsError::ClockLeapt { .. })), "{e}");
        assert_eq!(w.desk().await.show().await.unwrap().version, 1);
    }
    let vouched = Desk::open(&w.config, &w.clock, true).await.unwrap();
    vouched.enroll(&id("0421-01")).await.unwrap();
    w.desk().await.enroll(&id("0421-02")).await.expect("and from then on");
    // A clock that is behind signs by the latest time that was signed.
    w.clock.set("2026-01-01T00:00:00Z".parse().unwrap());
    w.desk().await.enroll(&id("0421-03")).await.unwrap();
    let row = w.desk().await.ledger.store(&"0421".parse().unwrap()).await.unwrap().unwrap();
    assert!(row.signed_at.unwrap() > after(w.clock.now(), day(399)));
}

#[tokio::test]
async fn manifests_are_signed_anew_by_age_without_waking_anyone() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.enroll(&id("0421")).await.unwrap();
    let desk = w.desk().await;
    let store = "0421".parse().unwrap();
    let serial = async || desk.ledger.store(&store).await.unwrap().unwrap().serial;
    for (days, signed) in [(5, 0), (2, 1), (0, 0)] {
        for _ in 0..days {
            w.clock.advance(day(1));
            desk.ledger.touch(w.clock.now()).await.unwrap();
        }
        let due = desk.signer().await.unwrap().sign_due(&desk.ledger, &w.clock).await.unwrap();
        assert_eq!(due.stores.len(), signed, "after {days} days");
    }
    assert_eq!(serial().await, 2);
    manifests::put_unfinished(&desk.ledger, &desk.buckets, None).await.unwrap();
    assert_eq!(desk.ledger.serials().await.unwrap()[&store].wake, 1);
}

#[tokio::test]
async fn a_new_machine_takes_over_by_its_key_and_goes_on_counting() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.enroll(&id("0421")).await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421-01")).await.unwrap().code);
    // The ledger is lost; keys and bucket are there.
    for f in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        let _ = fs::remove_file(w.dir.path().join("state").join(f));
    }
    assert_eq!(w.desk().await.init().await.unwrap().outcome, "taken over");
    let desk = w.desk().await;
    desk.enroll(&id("0421-02")).await.unwrap();
    let state = w.walk(TrustState::pinned(code.roots, code.trust_version)).unwrap();
    assert_eq!(w.accept(&state, &Seen::default()).unwrap().seen.serial, 3);
    // Without the key the bucket is somebody else's.
    fs::remove_dir_all(w.dir.path().join("state")).unwrap();
    let e = w.desk().await.init().await.unwrap_err();
    assert!(e.to_string().contains("none of the publisher keys"), "{e}");
}

#[tokio::test]
async fn a_ledger_set_back_before_a_rotation_takes_the_newer_trust_over() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421")).await.unwrap().code);
    w.desk().await.enroll(&id("0421-01")).await.unwrap();
    w.back_up();
    w.desk().await.rotate(&Rotate::default()).await.unwrap();
    w.desk().await.revoke(&id("0421-01")).await.unwrap();
    w.desk().await.enroll(&id("0421-02")).await.unwrap();
    w.restore();

    // What the stores have is not undone, and what the ledger forgot is told; not what is done by this very command.
    w.clock.advance(Duration::from_secs(60));
    let e = w.desk().await.enroll(&id("0421-03")).await.unwrap_err().to_string();
    assert!(e.contains("0421-02 was enrolled since") && e.contains("0421-01 was revoked since"), "{e}");
    assert!(!e.contains("0421 was") && !e.contains("0421-03"), "{e}");
    w.desk().await.enroll(&id("0421-03")).await.unwrap();
    let walk = || w.walk(TrustState::pinned(code.roots.clone(), code.trust_version)).unwrap();
    assert_eq!(walk().version(), 3);
    let m = w.accept(&walk(), &Seen::default()).unwrap();
    assert_eq!(m.seen.serial, 6);
    // The same before keys are changed.
    w.restore();
    let e = w.desk().await.rotate(&Rotate::default()).await.unwrap_err();
    assert!(matches!(e, EnrolError::SetBack(_)) && walk().version() == 3, "{e}");
    w.desk().await.rotate(&Rotate::default()).await.unwrap();
    assert_eq!(walk().version(), 5);
    assert!(w.accept(&walk(), &m.seen).is_ok());

    // A file that does not follow is a stranger's.
    let ours = w.object(&ObjectName::Trust);
    let far = String::from_utf8(ours).unwrap().replace('\n', "");
    let mut far: serde_json::Value = serde_json::from_str(&far).unwrap();
    far["payload"] = "eyJ2ZXJzaW9uIjogOX0=".into();
    fs::write(w.dir.path().join("objects/trust.json"), far.to_string()).unwrap();
    w.desk().await.enroll(&id("0421-04")).await.unwrap();
    assert_eq!(w.desk().await.show().await.unwrap().version, 5);
}

#[tokio::test]
async fn mending_by_a_ledger_set_back_undoes_nothing() {
    let w = World::new().await;
    let db = rusqlite::Connection::open(w.dir.path().join("hq.db")).unwrap();
    db.execute_batch("INSERT INTO store VALUES ('0422', 'east', NULL)").unwrap();
    w.desk().await.init().await.unwrap();
    for device in ["0421", "0422"] {
        w.desk().await.enroll(&id(device)).await.unwrap();
    }
    w.back_up();
    w.desk().await.enroll(&id("0421-01")).await.unwrap();
    w.desk().await.rotate(&Rotate { keep_old: true, ..Rotate::default() }).await.unwrap();
    w.restore();
    let [newer, gone] = ["0421", "0422"].map(|s| ObjectName::Manifest(s.parse().unwrap()));
    let there = || (w.object(&ObjectName::Trust), w.object(&newer));
    let before = there();
    fs::remove_file(w.dir.path().join("objects").join(gone.to_string())).unwrap();
    let desk = w.desk().await;
    let mended = crate::verify::put_back(&w.config, &desk.ledger, &desk.buckets, &w.clock).await;
    let e = mended.unwrap_err().to_string();
    assert!(e.contains("store 0421") && e.contains("0421-01 was enrolled since"), "{e}");
    assert!(there() == before, "the evidence stays");
    assert!(!w.object(&gone).is_empty(), "the others are put back");
}

/// Newer trust files that cannot be read are newer all the same, and so may be what their keys signed.
#[tokio::test]
async fn mending_leaves_alone_what_may_be_newer() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    w.desk().await.enroll(&id("0421")).await.unwrap();
    w.back_up();
    w.desk().await.rotate(&Rotate::default()).await.unwrap();
    w.restore();
    let [pointer, second] = [ObjectName::Trust, ObjectName::TrustVersion(2)];
    let path = |name: &ObjectName| w.dir.path().join("objects").join(name.to_string());
    let manifest = ObjectName::Manifest("0421".parse().unwrap());
    let (newest, good, signed) = (w.object(&pointer), w.object(&second), w.object(&manifest));
    let mend = async || {
        let desk = w.desk().await;
        crate::verify::put_back(&w.config, &desk.ledger, &desk.buckets, &w.clock).await
    };
    // Rotten, too long, gone while trust.json names it; and rotten while trust.json is gone, or an old copy.
    let long = vec![b'x'; usize::try_from(w.config.limits.trust_bytes).unwrap() + 1];
    for there in [Some(b"rotten".to_vec()), Some(long), None] {
        match there {
            Some(bytes) => fs::write(path(&second), bytes).unwrap(),
            None => fs::remove_file(path(&second)).unwrap(),
        }
        let e = mend().await.unwrap_err().to_string();
        assert!(e.contains("trust/0000000002.json"), "{e}");
        assert!((w.object(&pointer), w.object(&manifest)) == (newest.clone(), signed.clone()), "left as it is");
    }
    fs::write(path(&second), "rotten").unwrap();
    fs::write(path(&pointer), w.object(&ObjectName::TrustVersion(1))).unwrap();
    mend().await.unwrap_err();
    fs::remove_file(path(&pointer)).unwrap();
    mend().await.unwrap_err();
    assert!(!path(&pointer).exists() && w.object(&manifest) == signed);

    fs::write(path(&second), good).unwrap();
    mend().await.unwrap_err();
    assert!(w.object(&pointer) == newest && w.object(&manifest) == signed, "all that is newer is known now");
}

#[tokio::test]
async fn a_root_key_alone_takes_over_what_it_signed_and_nothing_else() {
    let w = World::new().await;
    w.desk().await.init().await.unwrap();
    let code = w.code(&w.desk().await.enroll(&id("0421")).await.unwrap().code);
    w.desk().await.rotate(&Rotate::default()).await.unwrap();
    // The machine is gone with its publisher key; the root key lies in the safe.
    let safe = w.dir.path().join("safe.key");
    fs::copy(w.dir.path().join("state/keys/root-1.key"), &safe).unwrap();
    let root = keys::read(&safe).unwrap();
    fs::remove_dir_all(w.dir.path().join("state")).unwrap();
    let by_root = Rotate { root_key: vec![safe], ..Rotate::default() };
    let e = w.desk().await.init().await.unwrap_err().to_string();
    assert!(e.contains("trust rotate --root-key"), "{e}");
    let e = w.desk().await.rotate(&Rotate::default()).await.unwrap_err().to_string();
    assert!(e.contains("trust rotate --root-key") && !e.contains("at hand"), "{e}");

    // Who has the bucket names our root key in a trust file of his own, and would have it signed on.
    let thief = SecretKey::from_seed([9; 32]);
    let now = w.clock.now();
    let forged = Trust {
        format: trust::FORMAT,
        version: 1,
        epoch: 1,
        created_at: now,
        root: RootKeys { threshold: 1, keys: vec![root.public(), thief.public()] },
        publishers: vec![PublisherKey { key: thief.public(), expires_at: after(now, day(400)) }],
        streams: Default::default(),
    };
    let forged = forged.sign(&[&thief]).unwrap();
    let names = [ObjectName::Trust, ObjectName::TrustVersion(1)];
    let ours = names.clone().map(|n| w.object(&n));
    let put = |name: &ObjectName, bytes: &[u8]| {
        fs::write(w.dir.path().join("objects").join(name.to_string()), bytes).unwrap();
    };
    names.iter().for_each(|n| put(n, &forged));
    let e = w.desk().await.rotate(&by_root).await.unwrap_err().to_string();
    assert!(e.contains("nor is the newest signed by enough of the root keys at hand"), "{e}");
    assert!(w.desk().await.ledger.trust().await.unwrap().is_empty());
    names.iter().zip(&ours).for_each(|(n, bytes)| put(n, bytes));

    // The lost key stays trusted until what it signed is taken over.
    let report = w.desk().await.rotate(&by_root).await.unwrap();
    assert_eq!((report.version, report.publishers.len(), report.manifests_signed), (4, 2, None));
    assert!(report.next.unwrap().contains("hq-publisher publish"));
    let state = w.walk(TrustState::pinned(code.roots, code.trust_version)).unwrap();
    assert_eq!(state.trust().unwrap().publishers[1].key, w.publisher(1).public());
    assert!(w.accept(&state, &Seen::default()).is_ok());
    let e = w.desk().await.rotate(&by_root).await.unwrap_err().to_string();
    assert!(e.contains("Run publish first"), "{e}");
}

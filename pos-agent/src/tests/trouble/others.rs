//! Programs in the way: that hold the database, deny a pack, or delete the log below whoever has it open.

use super::*;
use crate::register_db::{DbError, Healed};
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

#[tokio::test]
async fn a_program_that_holds_the_database_for_minutes_is_told_of() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    cycle(&agent).await;
    let other = Connection::open(r.config.store_db()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    for (pass, told) in [(0, false), (299, false), (1, true)] {
        r.clock.advance(pass * S);
        assert_eq!(cycle(&agent).await, End::Retry);
        assert!(debts(&agent).contains("price@zone-east: a program writes in store.db"), "{}", debts(&agent));
        assert_eq!(codes(&agent) == [fault::LOG_STUCK], told, "{pass}: {:?}", codes(&agent));
    }
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((r.rows("price"), codes(&agent), debts(&agent)), (rows(100, 51), vec![], String::new()));
}

/// Driven by cron: no process lasts for as long as a program must be in the way before it is told.
#[tokio::test]
async fn how_long_a_program_is_in_the_way_outlasts_a_process_and_ends_when_it_is_not() {
    let mut hq = usual();
    let mut r = Register::enrolled(&hq, &hq.url(), &[]);
    r.config.log_alarm = proto::config::HumanBytes(16 << 10);
    let once = async || {
        let agent = r.open();
        let exit = run::once(&agent).await;
        (exit, codes(&agent))
    };
    let done = (Exit::Done, vec![]);
    assert_eq!(once().await, done);
    let other = Connection::open(r.config.store_db()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    let stuck = |told: bool| vec![fault::LOG_STUCK.to_owned(); usize::from(told)];
    for (pass, told) in [(0, false), (299, false), (1, true)] {
        r.clock.advance(pass * S);
        assert_eq!(once().await, (Exit::Partly, stuck(told)), "it writes: {pass}");
    }
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(once().await, done);
    // The same of one that only reads, while the log grows.
    other.execute_batch("BEGIN; SELECT count(*) FROM price").unwrap();
    hq.full(PRICE, 60, &rows(3000, 60));
    hq.sign();
    for (pass, told) in [(0, false), (299, false), (1, true)] {
        r.clock.advance(pass * S);
        assert_eq!(once().await.1, stuck(told), "it reads: {pass}");
    }
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(once().await, done);
    let kept = lock(&r.open().device).fact::<serde_json::Value>("held_up").unwrap();
    assert_eq!(kept, Some(serde_json::json!({})), "it is not remembered for ever");
}

#[tokio::test]
async fn how_long_something_is_held_up_is_counted_anew_where_the_clock_was_ahead() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let now = r.clock.now();
    let lasted = |agent: &Agent| agent.memory.held_up(PRICE, &*r.clock);
    r.clock.set(after(now, 86_400 * S));
    let agent = r.open();
    assert_eq!(lasted(&agent), Duration::ZERO);
    agent.memory.save_held_up();
    // Set right while it runs: this process goes by its own time.
    r.clock.set(now);
    r.clock.advance(60 * S);
    assert_eq!(lasted(&agent), 60 * S);
    drop(agent);
    let agent = r.open();
    assert_eq!(lasted(&agent), Duration::ZERO, "noted for tomorrow");
    agent.memory.save_held_up();
    drop(agent);
    r.clock.advance(60 * S);
    let agent = r.open();
    assert_eq!(lasted(&agent), 60 * S);
    r.clock.advance(5 * S);
    assert_eq!(lasted(&agent), 65 * S);
    // No program outlasts the machine: closing time and the next opening time are not one.
    let mut noted: serde_json::Value = lock(&agent.device).fact("held_up").unwrap().unwrap();
    noted[PRICE]["boot"] = "another".into();
    lock(&agent.device).set_fact("held_up", &noted).unwrap();
    drop(agent);
    assert_eq!(lasted(&r.open()), Duration::ZERO);
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_for_minutes_is_told_of() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    let (path, aside) = (r.config.store_db(), r.config.data_dir.join("aside"));
    std::fs::rename(&path, &aside).unwrap();
    std::fs::create_dir(&path).unwrap();
    for (pass, told) in [(0, &[fault::DRIFT][..]), (300, &[fault::DRIFT, fault::LOCAL_FILES])] {
        r.clock.advance(pass * S);
        assert_eq!(cycle(&agent).await, End::Retry);
        assert_eq!(codes(&agent), told, "{pass}");
    }
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(codes(&agent), [""; 0]);
}

/// A POS application that has a database open. Its locks are its own, as no second connection's of this process are.
struct Pos {
    process: Child,
    ask: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Pos {
    fn open(database: &Path) -> Pos {
        let mut sqlite3 = Command::new("sqlite3");
        let mut process = sqlite3.arg(database).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (ask, answers) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()).lines());
        Pos { process, ask, answers }
    }
    fn cents(&mut self, table: &str) -> String {
        self.ask.write_all(format!("SELECT cents FROM {table} WHERE sku = 5;\n").as_bytes()).unwrap();
        self.answers.next().unwrap().unwrap()
    }
}

impl Drop for Pos {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[tokio::test]
async fn a_log_that_is_deleted_below_a_running_agent_hides_no_news_from_the_pos_application() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    cycle(&agent).await;
    delete(agent.db.path(), &["-wal", "-shm"]);
    let mut pos = Pos::open(agent.db.path());
    assert_eq!(pos.cents("price"), "50");
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, PRICE), pos.cents("price")), (Some(51), "51".to_owned()));
    assert_eq!(r.rows("price"), rows(100, 51));
}

#[tokio::test]
async fn who_had_the_database_open_when_its_log_was_deleted_reads_a_mix_and_that_is_told() {
    for ends in [&["-wal", "-shm"][..], &["-shm"]] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        let agent = r.open();
        poll_and_cycle(&agent).await;
        cycle(&agent).await;
        let mut pos = Pos::open(agent.db.path());
        assert_eq!(pos.cents("price"), "50");
        delete(agent.db.path(), ends);
        hq.delta(PRICE, 51, &rows(100, 51));
        hq.delta("promo@all", 8, &rows(10, 2));
        hq.sign();
        assert_eq!(cycle(&agent).await, End::Done, "{ends:?}");
        // The page that it remembers, and one that it had not read yet.
        assert_eq!([pos.cents("price"), pos.cents("promo")], ["50", "2"], "{ends:?}");
        assert_eq!(Pos::open(agent.db.path()).cents("price"), "51", "{ends:?}: a restart is all that it takes");
        let told = |agent: &Agent| {
            let told = agent.memory.look(|f| f.to_tell());
            assert!(told.len() == 1 && told[0].code == fault::DRIFT && told[0].instance.is_none(), "{told:?}");
            assert!(told[0].text.contains("restart every program that has had store.db open"), "{told:?}");
            told[0].since
        };
        let since = told(&agent);
        drop(agent);
        let agent = r.open();
        for (pass, open) in [(0, true), (3599, true), (1, false), (60, false)] {
            r.clock.advance(pass * S);
            assert_eq!(poll_and_cycle(&agent).await, End::Done);
            assert_eq!(codes(&agent) == [fault::DRIFT], open, "{ends:?}: {pass}: {:?}", codes(&agent));
            assert_eq!(told(&agent), since, "{ends:?}: until headquarters has it");
        }
    }
}

#[tokio::test]
async fn with_a_log_that_was_deleted_nothing_is_written_and_rows_that_it_tore_are_healed() {
    for ends in [&["-wal", "-shm"][..], &["-wal"], &["-shm"]] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        hq.delta(PRICE, 51, &rows(100, 51));
        hq.sign();
        let path = r.config.store_db();
        let agent = with_mishap(&r, move || delete(&path, ends));
        assert_eq!(poll_and_cycle(&agent).await, End::Retry, "{ends:?}");
        assert!(codes(&agent).is_empty() && agent.memory.avoided().is_empty(), "{ends:?}: {:?}", codes(&agent));
        assert_eq!(cycle(&agent).await, End::Done, "{ends:?}");
        assert!(!agent.db.is_swapped() && r.rows("price") == rows(100, 51), "{ends:?}");
        // As a page that came home under a reader of before.
        cycle(&agent).await;
        r.tamper("UPDATE promo SET cents = 9 WHERE sku = 3");
        agent.db.truncate_log().await.unwrap();
        delete(agent.db.path(), ends);
        cycle(&agent).await;
        assert_eq!(r.rows("promo"), rows(10, 1), "{ends:?}");
        let told = agent.memory.look(|f| f.to_tell());
        assert!(told.iter().any(|f| f.code == fault::DRIFT && f.instance.is_some()), "{ends:?}: and told: {told:?}");
    }
}

/// A scan that goes on until it is told to end.
async fn scan(agent: &Agent) -> (tokio::task::JoinHandle<()>, std::sync::mpsc::Sender<()>) {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let (begun, begins) = tokio::sync::oneshot::channel();
    let db = agent.db.clone();
    let scan = tokio::spawn(async move {
        let read = move |path: &Path, limits: &Limits| {
            let replica = proto::replica::Replica::open_read_only(path, limits)?;
            replica.all_held()?;
            begun.send(()).unwrap();
            ended.recv().unwrap();
            Ok(())
        };
        db.scan(read).await.unwrap();
    });
    begins.await.unwrap();
    (scan, end)
}

#[tokio::test]
async fn beside_a_scan_a_log_that_was_deleted_is_not_opened_anew_by_the_index_of_the_old_one() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    let path = r.config.store_db();
    let agent = with_mishap(&r, move || delete(&path, &["-wal", "-shm"]));
    let (scan, end) = scan(&agent).await;
    assert_eq!(poll_and_cycle(&agent).await, End::Retry);
    assert!(agent.db.is_swapped(), "as long as the scan has the old index");
    assert!(matches!(agent.verify().await, Err(DbError::Swapped(_))));
    // The next look gives up the old log, and opens nothing either.
    for _ in 0..2 {
        assert_eq!(cycle(&agent).await, End::Retry);
        assert!(matches!(agent.db.truncate_log().await, Err(DbError::Swapped(_))));
        assert!(matches!(agent.db.heal(), Ok(Healed::Sound)));
        assert!(!log_path(agent.db.path()).exists());
    }
    end.send(()).unwrap();
    scan.await.unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(100, 51));
    assert!(!agent.verify().await.unwrap().drift);
}

#[tokio::test]
async fn after_a_lost_log_the_rows_are_asked_until_all_have_answered() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    cycle(&agent).await;
    delete(agent.db.path(), &["-wal", "-shm"]);
    let held = agent.db.look().await.unwrap();
    // Deleted once more: no row answers.
    delete(agent.db.path(), &["-wal", "-shm"]);
    assert!(agent.db.lost_log() && !agent.look_through(&held).await);
    assert_eq!(cycle(&agent).await, End::Done);
    assert!(!agent.db.lost_log());
}

#[tokio::test]
async fn a_pack_that_is_denied_is_walked_around_or_told_of_while_the_log_is_cut() {
    let mut hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 52), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    relay.refuses(&delta_path(51), Some(403));
    for (pass, told) in [(0, false), (300, true)] {
        r.clock.advance(pass * S);
        assert_eq!(cycle(&agent).await, End::Retry);
        let debts = debts(&agent);
        assert!(debts.contains("no usable pack leads from version 50 to 51; ") && debts.contains("403"), "{debts}");
        assert_eq!(codes(&agent) == [fault::PACK_MISSING], told, "{pass}: {:?}", codes(&agent));
        assert_eq!(agent.db.log_bytes(), 0, "what was applied before is brought home");
    }
    hq.full(PRICE, 51, &rows(100, 51));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, PRICE), codes(&agent)), (Some(51), vec![]), "another way");
    // A server's own error is waited out: there is nothing wrong with its pack.
    hq.delta(PRICE, 52, &rows(100, 52));
    hq.sign();
    relay.refuses(&delta_path(52), Some(500));
    for (pass, told) in [(0, false), (300, true)] {
        r.clock.advance(pass * S);
        assert_eq!(cycle(&agent).await, End::Retry);
        assert!(debts(&agent).contains("500"), "{}", debts(&agent));
        assert_eq!(codes(&agent) == [fault::SOURCE], told, "{pass}: {:?}", codes(&agent));
    }
    relay.desk.versions.send_replace(None);
    agent.upstream.poll_relay(Duration::ZERO).await;
    assert_eq!(cycle(&agent).await, End::Done, "a static server is not hurried");
    relay.refuses(&delta_path(52), None);
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, PRICE), codes(&agent), debts(&agent)), (Some(52), vec![], String::new()));
}

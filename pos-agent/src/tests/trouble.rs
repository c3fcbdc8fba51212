//! What lasts: rows of our own that cannot be read, programs and servers that stand in the way, a disk that fails to
//! sync, faults whose cause is gone.

use super::kit::*;
use crate::agent::{Agent, Step};
use crate::cli;
use crate::memory;
use crate::pace::{End, From};
use crate::register_db::{DbError, Healed, RegisterDb, damaged, forget_stray_log, log_path, move_aside};
use crate::report;
use crate::run;
use crate::tries::Tries;
use crate::upstream::Heard;
use crate::verify;
use proto::cli::Exit;
use proto::clock::{Clock as _, after, boot_id};
use proto::device::Device;
use proto::follow::lock;
use proto::layout::PackKind;
use proto::limits::Limits;
use proto::wire::{StreamState, fault};
use rusqlite::Connection;
use rusqlite::config::DbConfig;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const S: Duration = Duration::from_secs(1);
const PRICE: &str = "price@zone-east";

fn codes(agent: &Agent) -> Vec<String> {
    agent.memory.look(|f| f.open().into_iter().map(|f| f.code).collect())
}

fn debts(agent: &Agent) -> String {
    report::stand(agent, Vec::new()).debts.join("\n")
}

fn usual() -> Hq {
    let mut hq = Hq::new();
    hq.full(PRICE, 50, &rows(100, 50));
    hq.full("promo@all", 7, &rows(10, 1));
    hq.sign();
    hq
}

/// The delta of a version that leads on from the newest one.
fn delta_path(version: u64) -> String {
    format!("packs/{PRICE}/{version:010}.delta.pack")
}

#[tokio::test]
async fn rows_of_our_own_that_cannot_be_read_are_healed() {
    for tampering in [
        "UPDATE tillcast_stream SET audience = '?'",
        "UPDATE tillcast_stream SET applied_at = 'yesterday' WHERE stream = 'promo'",
        "UPDATE tillcast_stream SET version = -1",
        "UPDATE tillcast_stream SET ddl = 'x'",
        "UPDATE tillcast_table SET digest = 'zz'",
        "UPDATE tillcast_table SET name = '?' WHERE name = 'price'",
        "DELETE FROM tillcast_stream",
        "DELETE FROM tillcast_table",
        "DROP TABLE tillcast_stream",
        "DROP TABLE tillcast_table",
        "PRAGMA user_version = 0",
    ] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        r.tamper(tampering);
        hq.delta(PRICE, 51, &rows(100, 51));
        hq.delta("promo@all", 8, &rows(10, 2));
        hq.sign();
        let agent = r.open();
        for _ in 0..3 {
            poll_and_cycle(&agent).await;
        }
        assert_eq!((r.rows("price"), r.rows("promo")), (rows(100, 51), rows(10, 2)), "{tampering}");
        assert_eq!(codes(&agent), [""; 0], "{tampering}");
        assert!(!agent.verify().await.unwrap().drift, "{tampering}");
    }
}

#[tokio::test]
async fn a_contract_over_lowered_limits_is_no_drift() {
    let mut hq = usual();
    let mut r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    let columns = std::mem::replace(&mut r.config.limits.columns, 1);
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    let agent = r.open();
    let found = agent.verify().await.unwrap();
    assert!(!found.drift && found.unread().count() == 2 && found.drifted().is_empty(), "{found:?}");
    assert!(found.text().contains("NOT CHECKED") && found.text().contains("limits.columns = 1"), "{}", found.text());
    for _ in 0..3 {
        poll_and_cycle(&agent).await;
    }
    // The pack cannot be taken under these limits, and that is all.
    assert_eq!((codes(&agent), r.rows("price")), (vec![fault::PACK_IN_ERROR.to_owned()], rows(100, 50)));
    assert!(agent.memory.drifts().is_empty());
    drop(agent);
    r.config.limits.columns = columns;
    r.clock.advance(3600 * S);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((codes(&agent), r.rows("price")), (vec![], rows(100, 51)));
    let found = agent.verify().await.unwrap();
    assert!(!found.drift && found.unread().next().is_none(), "{found:?}");
}

#[tokio::test]
async fn one_row_of_our_own_that_cannot_be_read_costs_no_other_stream_its_rows() {
    for tampering in [
        "UPDATE tillcast_stream SET applied_at = 'yesterday' WHERE stream = 'promo'",
        "UPDATE tillcast_table SET digest = 'zz' WHERE stream = 'promo'",
        "UPDATE tillcast_stream SET stream = '?' WHERE stream = 'promo'",
    ] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        r.tamper(tampering);
        // The WAN is down.
        let (bucket, away) = (hq.dir.path().to_owned(), hq.dir.path().with_extension("away"));
        std::fs::rename(&bucket, &away).unwrap();
        let agent = r.open();
        for _ in 0..3 {
            assert_eq!(cycle(&agent).await, End::Retry);
        }
        assert_eq!((r.rows("price"), r.rows("promo")), (rows(100, 50), rows(10, 1)), "{tampering}: to sell by");
        assert_eq!((version(&agent, PRICE), version(&agent, "promo@all")), (Some(50), None), "{tampering}");
        assert!(codes(&agent).contains(&fault::DRIFT.to_owned()), "{tampering}");
        assert!(!damaged(agent.db.path()).exists(), "{tampering}");
        std::fs::rename(&away, &bucket).unwrap();
        hq.delta("promo@all", 8, &rows(10, 2));
        hq.sign();
        assert_eq!(poll_and_cycle(&agent).await, End::Done, "{tampering}");
        assert_eq!((r.rows("price"), r.rows("promo")), (rows(100, 50), rows(10, 2)), "{tampering}");
        assert_eq!(codes(&agent), [""; 0], "{tampering}");
        assert!(!agent.verify().await.unwrap().drift, "{tampering}");
    }
}

/// Puts text in the place of a note of the agent's.
fn rot(r: &Register, name: &str, text: &str) {
    let db = Connection::open(r.config.data_dir.join(proto::device::FILE)).unwrap();
    db.execute("INSERT OR REPLACE INTO fact VALUES (?1, ?2)", [name, text]).unwrap();
}

#[tokio::test]
async fn a_note_that_cannot_be_read_keeps_no_register_from_starting() {
    for name in ["drift", "avoid", "faults", "held_up", "relay_word", "foreign"] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        for text in ["{", "7"] {
            rot(&r, name, text);
            hq.delta("promo@all", hq.serial + 7, &rows(10, hq.serial as i64));
            hq.sign();
            let agent = r.open();
            assert_eq!(run::once(&agent).await, Exit::Done, "{name}: {text}");
            assert_eq!((r.rows("promo"), codes(&agent)), (rows(10, hq.serial as i64 - 1), vec![]), "{name}: {text}");
        }
    }
}

#[tokio::test]
async fn a_database_that_cannot_be_disowned_is_begun_anew_if_it_is_damaged() {
    // Bytes of the page with our rows; a table of ours that is gone, of a file that is sound.
    for tampering in ["page", "DROP TABLE tillcast_stream"] {
        let hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        let agent = r.open();
        poll_and_cycle(&agent).await;
        cycle(&agent).await;
        drop(agent);
        rot(&r, "foreign", "true");
        let path = r.config.store_db();
        if tampering == "page" {
            let root = "SELECT rootpage FROM sqlite_schema WHERE name = 'tillcast_stream'";
            let page = r.reader().query_row(root, [], |r| r.get::<_, u32>(0)).unwrap() as usize;
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[(page - 1) * 4096..page * 4096].fill(0xff);
            std::fs::write(&path, &bytes).unwrap();
        } else {
            r.tamper(tampering);
        }
        let agent = r.open();
        let is_damaged = tampering == "page";
        assert_eq!(damaged(&path).exists(), is_damaged, "{tampering}");
        assert_eq!(codes(&agent).contains(&fault::DRIFT.to_owned()), is_damaged, "{tampering}");
        assert_eq!(agent.device.lock().unwrap().fact(proto::device::FOREIGN).unwrap(), Some(false), "{tampering}");
        assert_eq!(poll_and_cycle(&agent).await, End::Done, "{tampering}");
        assert_eq!((r.rows("price"), codes(&agent)), (rows(100, 50), vec![]), "{tampering}");
    }
}

/// A row of the POS application's in a table of its own, committed in the log alone.
fn basket(path: &Path, more: &str) {
    let pos = Connection::open(path).unwrap();
    pos.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    pos.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE basket (n INTEGER)").unwrap();
    pos.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    pos.execute_batch(&format!("INSERT INTO basket VALUES (42); {more}")).unwrap();
}

fn in_basket(path: &Path) -> i64 {
    Connection::open(path).unwrap().query_row("SELECT n FROM basket", [], |r| r.get(0)).unwrap()
}

#[tokio::test]
async fn a_sound_file_with_tables_of_the_pos_application_is_never_moved_aside() {
    let hq = usual();
    // Before the first install, at whatever number; as after a `.dump`; with a table of ours dropped.
    for (before, after) in [(1, ""), (0, ""), (2, "PRAGMA user_version = 0"), (1, "DROP TABLE tillcast_table")] {
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        let path = r.config.store_db();
        basket(&path, &format!("PRAGMA user_version = {before}"));
        assert_eq!(poll_and_cycle(&r.open()).await, End::Done, "{before}");
        r.tamper(after);
        let agent = r.open();
        poll_and_cycle(&agent).await;
        assert_eq!(poll_and_cycle(&agent).await, End::Done, "{after}");
        assert_eq!((r.rows("price"), codes(&agent)), (rows(100, 50), vec![]), "{before}, {after}");
        assert!(in_basket(&path) == 42 && !damaged(&path).exists(), "{before}, {after}");
        let is_told = agent.memory.look(|f| f.to_tell()).iter().any(|f| f.text.contains("tillcast_table was gone"));
        assert_eq!(is_told, after.starts_with("DROP"), "{before}, {after}");
    }
}

#[test]
fn a_damaged_database_takes_its_log_along_when_it_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    let log = log_path(&damaged(&path));
    basket(&path, "");
    move_aside(&path).unwrap();
    assert!(!path.exists() && !log_path(&path).exists() && log.exists());
    assert_eq!(in_basket(&damaged(&path)), 42);
    // The next one is not read with the log of the one before.
    std::fs::write(&log, "old").unwrap();
    std::fs::write(&path, "rotten").unwrap();
    move_aside(&path).unwrap();
    assert!(!log.exists() && std::fs::read(damaged(&path)).unwrap() == b"rotten");
    // The power went between log and database.
    std::fs::remove_file(damaged(&path)).unwrap();
    basket(&path, "");
    std::fs::rename(log_path(&path), &log).unwrap();
    move_aside(&path).unwrap();
    assert_eq!(in_basket(&damaged(&path)), 42);
    // It stays with its database, goes with it while that is damaged, and is nobody's beside one that is sound.
    for (aside, content, stays) in
        [(true, "", true), (false, "rotten, as long as a page's head is", true), (false, "", false)]
    {
        let _ = std::fs::remove_file(damaged(&path));
        delete_all(&path);
        if aside {
            std::fs::write(damaged(&path), "old").unwrap();
        }
        if content.is_empty() {
            basket(&path, "");
        } else {
            std::fs::write(&path, content.repeat(40)).unwrap();
        }
        std::fs::write(&log, "old").unwrap();
        forget_stray_log(&path).unwrap();
        assert_eq!(log.exists(), stays, "{aside}, {content}");
    }
}

#[tokio::test]
async fn that_a_database_was_damaged_is_written_down_before_it_is_moved_aside() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let (path, aside) = (r.config.store_db(), damaged(&r.config.store_db()));
    // Since when.
    let told = |agent: &Agent| {
        let told = agent.memory.look(|f| f.to_tell());
        told.iter().find(|f| f.code == fault::DRIFT && f.object.as_deref() == Some("store.db")).map(|f| f.since)
    };
    let settled = async || {
        let agent = r.open();
        poll_and_cycle(&agent).await;
        cycle(&agent).await;
        agent
    };
    let rot = || {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[..100].fill(7);
        std::fs::write(&path, bytes).unwrap();
    };
    drop(settled().await);
    rot();
    // The power goes before anything else is written.
    drop(r.open());
    assert!(aside.exists() && told(&r.open()) == Some(r.clock.now()));
    // Again, while the first is not over: who was restarted since is to be once more. (The log would
    // make the rot good.)
    Connection::open(&path).unwrap().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    r.clock.advance(S);
    rot();
    drop(r.open());
    assert_eq!(told(&r.open()), Some(r.clock.now()));
    // While it runs, and cannot be written down: what there is to sell by does not wait for that.
    let agent = settled().await;
    std::fs::remove_file(&aside).unwrap();
    r.clock.advance(S);
    rot();
    agent.verify().await.unwrap_err();
    let device = Connection::open(r.config.data_dir.join(proto::device::FILE)).unwrap();
    device.execute_batch("ALTER TABLE fact RENAME TO away").unwrap();
    assert_eq!(cycle(&agent).await, End::Retry);
    assert!(aside.exists() && told(&agent) == Some(r.clock.now()));
    device.execute_batch("ALTER TABLE away RENAME TO fact").unwrap();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(r.rows("price"), rows(100, 50));
    drop(agent);
    assert_eq!(told(&r.open()), Some(r.clock.now()), "written when it could be");
}

#[tokio::test]
async fn a_database_that_is_damaged_twice_is_let_be_and_one_that_cannot_be_moved_is_damaged_once() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let (path, aside) = (r.config.store_db(), damaged(&r.config.store_db()));
    let rot = async |agent: &Agent| {
        Connection::open(&path).unwrap().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[..100].fill(7);
        std::fs::write(&path, bytes).unwrap();
        agent.verify().await.unwrap_err();
    };
    let agent = r.open();
    poll_and_cycle(&agent).await;
    // Nothing can be moved over a directory.
    std::fs::create_dir(&aside).unwrap();
    rot(&agent).await;
    let begun = r.clock.now();
    for _ in 0..3 {
        assert_eq!(cycle(&agent).await, End::Retry);
        r.clock.advance(60 * S);
    }
    let told = agent.memory.look(|f| f.to_tell());
    let since: Vec<_> = told.iter().filter(|f| f.code == fault::DRIFT).map(|f| f.since).collect();
    assert_eq!(since, [begun], "told once");
    assert!(!codes(&agent).contains(&fault::HALTED.to_owned()), "{:?}", codes(&agent));
    std::fs::remove_dir(&aside).unwrap();
    let mut cycles = 1;
    while cycle(&agent).await != End::Done && cycles < 5 {
        cycles += 1;
    }
    assert_eq!(r.rows("price"), rows(100, 50));
    // Once more below the same process: the disk is not to be relied on.
    rot(&agent).await;
    assert_eq!(cycle(&agent).await, End::Halted);
    assert!(codes(&agent).contains(&fault::HALTED.to_owned()), "{:?}", codes(&agent));
    drop(agent);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    assert_eq!(r.rows("price"), rows(100, 50), "a restart begins anew");
}

#[tokio::test]
async fn drift_whose_note_is_lost_is_found_in_the_rows() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    r.tamper("UPDATE price SET cents = 1 WHERE sku = 5");
    let found = verify::check(&r.config.store_db(), &Limits::default()).unwrap();
    rot(&r, "drift", "{\"price\":");
    {
        // A check without an agent goes over what is lost, too.
        let mut device = Device::open(&r.config.data_dir, &r.config.device(), &Limits::default()).unwrap();
        memory::latch_offline(&mut device, &found.drifted(), r.clock.now()).unwrap();
    }
    let agent = r.open();
    assert!(agent.memory.drifted(&instance(PRICE).stream) && !agent.memory.lost_latches());
    drop(agent);
    rot(&r, "drift", "{\"price\":");
    let agent = r.open();
    assert!(agent.memory.lost_latches() && agent.memory.drifts().is_empty());
    assert_eq!(run::once(&agent).await, Exit::Done);
    assert_eq!(r.rows("price"), rows(100, 50));
    assert!(agent.memory.look(|f| f.to_tell()).iter().any(|f| f.code == fault::DRIFT), "and told");
    drop(agent);
    assert!(!r.open().memory.lost_latches());
}

#[tokio::test]
async fn what_a_cycle_healed_while_the_rows_were_checked_is_not_healed_again() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    r.tamper("UPDATE price SET cents = 1 WHERE sku = 5");
    let old = verify::check(&r.config.store_db(), &Limits::default()).unwrap();
    // Meanwhile another check found it, and a cycle healed it.
    agent.verify().await.unwrap();
    r.clock.advance(S);
    cycle(&agent).await;
    assert_eq!(r.rows("price"), rows(100, 50));
    agent.latch_found(&old).await;
    assert!(agent.memory.drifts().is_empty() && codes(&agent).is_empty(), "{:?}", codes(&agent));
    // A delta that came meanwhile heals nothing.
    r.tamper("UPDATE price SET cents = 1 WHERE sku = 5");
    let old = verify::check(&r.config.store_db(), &Limits::default()).unwrap();
    r.clock.advance(S);
    let mut next = rows(100, 50);
    next.remove(&7);
    hq.delta(PRICE, 51, &next);
    hq.sign();
    cycle(&agent).await;
    assert_eq!((version(&agent, PRICE), r.rows("price")[&5]), (Some(51), 1));
    agent.latch_found(&old).await;
    assert_eq!(codes(&agent), [fault::DRIFT]);
    cycle(&agent).await;
    assert_eq!((r.rows("price"), codes(&agent)), (next, vec![]));
}

/// An agent at whose next transaction something happens first, once.
fn with_mishap(r: &Register, mishap: impl Fn() + Send + Sync + 'static) -> Agent {
    let is_due = AtomicBool::new(true);
    r.watched(Some(Arc::new(move |step: &Step| {
        if matches!(step, Step::Applying(_)) && is_due.swap(false, Ordering::Relaxed) {
            mishap();
        }
        true
    })))
}

#[tokio::test]
async fn a_file_that_rots_between_download_and_apply_is_fetched_again_and_the_pack_is_not_blamed() {
    for (kind, cut) in [(PackKind::Delta, false), (PackKind::Delta, true), (PackKind::Full, false)] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        match kind {
            PackKind::Delta => hq.delta(PRICE, 51, &rows(100, 51)),
            PackKind::Full => hq.full(PRICE, 51, &rows(100, 51)),
        }
        hq.sign();
        let file = r.config.data_dir.join("packs").join(PRICE).join(format!("0000000051.{kind}.pack"));
        let rotting = file.clone();
        let agent = with_mishap(&r, move || {
            let mut bytes = std::fs::read(&rotting).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
            if cut {
                bytes.truncate(middle);
            }
            std::fs::write(&rotting, bytes).unwrap();
        });
        assert_eq!(poll_and_cycle(&agent).await, End::Retry, "{kind}, {cut}");
        assert!(!file.exists() && version(&agent, PRICE) == Some(50), "{kind}, {cut}");
        assert_eq!((codes(&agent), agent.memory.avoided().len()), (vec![], 0), "{kind}, {cut}");
        assert!(debts(&agent).contains("is not the file that was verified"), "{}", debts(&agent));
        assert_eq!(cycle(&agent).await, End::Done, "{kind}, {cut}");
        assert_eq!((r.rows("price"), debts(&agent)), (rows(100, 51), String::new()), "{kind}, {cut}");
    }
}

#[tokio::test]
async fn rows_of_our_own_that_are_gone_when_a_pack_comes_are_not_the_packs_fault() {
    for tampering in ["DROP TABLE tillcast_table", "DROP TABLE tillcast_stream"] {
        let mut hq = usual();
        let r = Arc::new(Register::enrolled(&hq, &hq.url(), &[]));
        poll_and_cycle(&r.open()).await;
        hq.full(PRICE, 51, &rows(100, 51));
        hq.sign();
        let at = r.clone();
        let agent = with_mishap(&r, move || at.tamper(tampering));
        assert_eq!(poll_and_cycle(&agent).await, End::Retry, "{tampering}");
        assert_eq!((codes(&agent), agent.memory.avoided().len()), (vec![], 0), "{tampering}");
        for _ in 0..3 {
            poll_and_cycle(&agent).await;
        }
        assert_eq!((r.rows("price"), r.rows("promo")), (rows(100, 51), rows(10, 1)), "{tampering}");
        assert_eq!(codes(&agent), [""; 0], "{tampering}");
    }
}

#[tokio::test]
async fn a_damaged_file_stays_until_it_is_known_that_its_room_is_wanted() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    let aside = damaged(&r.config.store_db());
    std::fs::write(&aside, "for people to look at").unwrap();
    let agent = r.open();
    agent.out_of_room("at a start");
    assert!(aside.exists(), "nothing was looked at yet");
    agent.out_of_room("in another stream's words");
    let told: Vec<String> = agent.memory.look(|f| f.open()).into_iter().map(|f| f.text).collect();
    assert_eq!(told, ["at a start"], "once");
    cycle(&agent).await;
    agent.out_of_room("complete");
    assert!(aside.exists());
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    std::fs::remove_file(hq.path(&delta_path(51).parse().unwrap())).unwrap();
    cycle(&agent).await;
    agent.out_of_room("a version is missing");
    assert!(!aside.exists());
}

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

/// Deletes a database with its log, where they are there.
fn delete_all(path: &Path) {
    ["", "-wal", "-shm"].iter().for_each(|end| drop(std::fs::remove_file(format!("{}{end}", path.display()))));
}

/// Deletes a database's files with these ends.
fn delete(path: &Path, ends: &[&str]) {
    ends.iter().for_each(|end| std::fs::remove_file(format!("{}{end}", path.display())).unwrap());
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

#[tokio::test]
async fn a_failed_sync_halts_wherever_it_is_met() {
    // Idle work; after a commit; when there is no room.
    for place in ["idle", "apply", "no room"] {
        let mut hq = usual();
        let mut r = Register::enrolled(&hq, &hq.url(), &[]);
        (r.config.limits.unpacked_bytes, r.config.limits.ratio) = (u64::MAX, u64::MAX);
        let agent = r.open();
        poll_and_cycle(&agent).await;
        if place != "idle" {
            hq.delta(PRICE, 51, &rows(100, 51));
        }
        if place == "no room" {
            hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs[1].unpacked = 1 << 50;
        }
        hq.sign();
        agent.db.sync_fails.store(true, Ordering::Relaxed);
        assert_eq!(cycle(&agent).await, End::Halted, "{place}");
        assert!(codes(&agent).contains(&fault::HALTED.to_owned()), "{place}: {:?}", codes(&agent));
        agent.db.sync_fails.store(false, Ordering::Relaxed);
        assert_eq!(cycle(&agent).await, End::Halted, "{place}: not tried again");
    }
}

/// A register that looks at its relay, and at headquarters where that one fails.
async fn with_a_fallback() -> (Hq, Relay, Register) {
    let hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 50), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[hq.url()]);
    (hq, relay, r)
}

#[tokio::test]
async fn a_relay_that_gives_objects_but_no_versions_is_left() {
    let (mut hq, relay, r) = with_a_fallback().await;
    let agent = r.open();
    poll_and_cycle(&agent).await;
    relay.refuses("v1/versions", Some(500));
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    for _ in 0..13 {
        r.clock.advance(10 * S);
        assert!(matches!(agent.upstream.poll_relay(Duration::ZERO).await, Heard::Silence(_)));
        cycle(&agent).await;
    }
    assert_eq!((agent.upstream.read_from(), version(&agent, PRICE)), (From::Fallback, Some(51)));
    relay.refuses("v1/versions", None);
    poll_and_cycle(&agent).await;
    assert_eq!(agent.upstream.read_from(), From::Relay);
}

/// A bucket's copy rotted, or a cache holds half of it, and the relay is down.
#[tokio::test]
async fn a_pack_that_no_fallback_has_right_is_fetched_ever_later() {
    let (mut hq, relay, r) = with_a_fallback().await;
    let agent = r.open();
    poll_and_cycle(&agent).await;
    relay.be_silent(true);
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.delta("promo@all", 8, &rows(11, 8));
    hq.sign();
    let (path, good) = hq.bend(PRICE, 51, PackKind::Delta);
    let part = r.config.data_dir.join("packs").join(PRICE);
    let look = async |after: u64| {
        r.clock.advance(Duration::from_secs(after));
        let _ = std::fs::remove_dir_all(&part);
        agent.upstream.poll_relay(Duration::ZERO).await;
        cycle(&agent).await;
        // What was fetched of it leaves its directory.
        part.exists()
    };
    // With a new list what lies there is swept.
    look(600).await;
    let fetched = [look(59).await, look(1).await, look(119).await, look(1).await, look(239).await];
    assert_eq!(fetched, [false, true, false, true, false]);
    assert_eq!((agent.upstream.read_from(), version(&agent, "promo@all")), (From::Fallback, Some(8)), "others go on");
    assert_eq!((version(&agent, PRICE), codes(&agent)), (Some(50), vec![fault::REFUSED.to_owned()]));
    std::fs::write(&path, &good).unwrap();
    assert!(look(1).await);
    assert_eq!(version(&agent, PRICE), Some(51));
}

#[tokio::test]
async fn faults_of_what_is_listed_no_more_end() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    // A pack that is wrong at its source, and then the store changes its zone.
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    hq.bend(PRICE, 51, PackKind::Delta);
    cycle(&agent).await;
    assert_eq!(codes(&agent), [fault::REFUSED]);
    hq.full("price@zone-west", 3, &rows(80, 300));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!(codes(&agent), [""; 0]);
    // A stream that drifted, and then is published no more.
    r.tamper("UPDATE promo SET cents = 5");
    agent.verify().await.unwrap();
    assert_eq!(codes(&agent), [fault::DRIFT]);
    hq.streams.remove(&instance("promo@all").stream);
    hq.sign();
    cycle(&agent).await;
    assert!(codes(&agent).is_empty() && agent.memory.drifts().is_empty(), "{:?}", codes(&agent));
    agent.verify().await.unwrap();
    assert_eq!(codes(&agent), [""; 0], "nor is it told anew");
}

#[tokio::test]
async fn an_entry_that_cannot_be_taken_stops_its_own_stream_alone() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    // Known of the stream before: that a pack of it is bad, and that its rows drifted.
    let bad = format!("{PRICE}/0000000052.delta.pack").parse().unwrap();
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.delta(PRICE, 52, &rows(100, 52));
    agent.memory.avoid(&bad, "bad", r.clock.now());
    r.tamper("UPDATE price SET cents = 5 WHERE sku = 1");
    agent.verify().await.unwrap();
    hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs[1].unpacked = 1 << 50;
    hq.delta("promo@all", 8, &rows(10, 2));
    hq.sign();
    assert_eq!(run::once(&agent).await, Exit::Partly);
    let is_kept = |agent: &Agent| {
        let shown = report::stand(agent, agent.memory.look(|f| f.open()));
        let told: Vec<_> = shown.errors.iter().map(|f| (f.code.as_str(), f.instance.clone())).collect();
        assert_eq!(told, [(fault::DRIFT, Some(instance(PRICE))), (fault::STREAM_REFUSED, Some(instance(PRICE)))]);
        assert!(shown.errors[1].text.contains("BAD_MANIFEST: stream price: pack 51 delta would unpack"), "{shown:?}");
        let debts = shown.debts.join("\n");
        assert!(debts.starts_with("price: what manifest 2 lists cannot be taken here"), "{debts}");
        assert_eq!((version(agent, PRICE), version(agent, "promo@all")), (Some(50), Some(8)));
        assert!(agent.memory.avoided().contains(&bad) && agent.memory.drifts().len() == 1);
    };
    is_kept(&agent);
    assert_eq!((r.rows("price").len(), r.rows("promo")), (100, rows(10, 2)));
    // The same after a restart, from what is kept.
    drop(agent);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    is_kept(&agent);
    // Without the drift the stream itself says that something is wrong.
    agent.memory.healed(&instance(PRICE).stream);
    agent.memory.faults(|f| f.mend(fault::DRIFT, |_| true));
    let state = |agent: &Agent| report::stand(agent, Vec::new()).streams[&instance(PRICE)].state;
    assert_eq!(state(&agent), StreamState::Error);
    // A list that can be taken: it goes on.
    hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs.truncate(1);
    hq.full(PRICE, 53, &rows(100, 53));
    hq.sign();
    poll_and_cycle(&agent).await;
    assert_eq!((state(&agent), r.rows("price")), (StreamState::Ok, rows(100, 53)));
    assert_eq!(run::once(&agent).await, Exit::Done);
    assert!(agent.memory.avoided().is_empty() && debts(&agent).is_empty(), "{}", debts(&agent));
}

#[tokio::test]
async fn refused_heartbeats_keep_their_beginning() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    let began = r.clock.now();
    agent.memory.faults(|f| f.raise(fault::REFUSED, None, Some(report::HEARTBEAT), "unknown", began));
    r.clock.advance(60 * S);
    poll_and_cycle(&agent).await;
    assert_eq!(agent.memory.look(|f| f.open())[0].since, began);
    // A static server in the relay's place.
    assert!(!report::send(&agent).await.unwrap());
    assert_eq!(codes(&agent), [""; 0]);
}

#[test]
fn the_log_of_a_database_that_cannot_be_looked_at_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.db");
    std::os::unix::fs::symlink(&path, &path).unwrap();
    std::fs::write(log_path(&path), b"committed").unwrap();
    RegisterDb::open(&path, &Limits::default()).unwrap_err();
    assert_eq!(std::fs::read(log_path(&path)).unwrap(), b"committed");
}

#[tokio::test]
async fn a_damaged_database_goes_when_there_is_no_room_for_what_takes_its_place() {
    let mut hq = usual();
    let mut r = Register::enrolled(&hq, &hq.url(), &[]);
    (r.config.limits.unpacked_bytes, r.config.limits.ratio) = (u64::MAX, u64::MAX);
    let agent = r.open();
    let aside = damaged(&r.config.store_db());
    std::fs::write(&aside, b"damaged").unwrap();
    poll_and_cycle(&agent).await;
    agent.out_of_room("no room for a heartbeat's number");
    assert!(aside.exists(), "the register is complete: it is for people to look at");
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.streams.get_mut(&instance(PRICE).stream).unwrap().packs[1].unpacked = 1 << 50;
    hq.sign();
    assert_eq!(cycle(&agent).await, End::DiskFull);
    assert!(!aside.exists());
}

#[tokio::test]
async fn a_pack_that_a_wrong_clock_blamed_is_tried_again() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let (agent, now) = (r.open(), r.clock.now());
    let name = format!("{PRICE}/0000000050.full.pack").parse().unwrap();
    agent.memory.avoid(&name, "bad", after(now, 86_400 * 365 * S));
    assert!(!agent.memory.avoids(&name, now));
    agent.memory.avoid(&name, "bad", now);
    assert!(agent.memory.avoids(&name, after(now, 3599 * S)) && !agent.memory.avoids(&name, after(now, 3600 * S)));
}

#[tokio::test]
async fn a_failed_sync_of_the_devices_own_file_halts_and_is_told() {
    let hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 50), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[]);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    report::send(&agent).await.unwrap();
    let kept = lock(&agent.device).fact::<u64>("seq").unwrap();
    // Whatever was to be written: most of those who write only warn of it.
    lock(&agent.device).fail_sync();
    report::send(&agent).await.unwrap();
    let told = relay.desk.beats.lock().unwrap().last().unwrap().clone();
    assert_eq!((told.seq, told.errors[0].code.as_str()), (2, fault::HALTED));
    assert_eq!(cycle(&agent).await, End::Halted);
    assert!(agent.latch(&instance(PRICE), "a row differs").is_err(), "nothing is said to be kept that is not");
    assert_eq!(lock(&agent.device).fact::<u64>("seq").unwrap(), kept);
    drop(agent);
    // In the middle of a cycle it ends as one.
    let agent = r.watched(Some(std::sync::Arc::new(|_| true)));
    poll_and_cycle(&agent).await;
    lock(&agent.device).fail_sync();
    assert_eq!(agent.settle(End::Done, false).await, End::Halted);
    assert_eq!(codes(&agent), [fault::HALTED]);
}

#[tokio::test]
async fn a_lock_that_cannot_be_opened_is_not_told_as_another_command() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    std::fs::create_dir(r.config.data_dir.join("lock")).unwrap();
    let failed = cli::once(r.config.clone(), r.clock.clone(), true).await.unwrap_err();
    assert_eq!(cli::code_of(&failed), "MACHINE", "{failed}");
}

#[tokio::test]
async fn a_number_that_cannot_be_written_is_told_by_the_heartbeat_that_has_it() {
    let hq = usual();
    let relay = Relay::serving(&hq).await;
    relay.lists(&[(PRICE, 50), ("promo@all", 7)]);
    let r = Register::enrolled(&hq, &relay.url, &[]);
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    for (seq, refuse) in [(1, false), (2, true), (3, true), (4, false)] {
        lock(&agent.device).refuse_writes(refuse);
        report::send(&agent).await.unwrap();
        let told = relay.desk.beats.lock().unwrap().last().unwrap().clone();
        let told_codes: Vec<&str> = told.errors.iter().map(|f| f.code.as_str()).collect();
        assert_eq!((told.seq, told_codes), (seq, vec![fault::LOCAL_FILES; usize::from(refuse)]));
    }
    assert_eq!(codes(&agent), [""; 0]);
}

#[tokio::test]
async fn a_stream_that_was_forgotten_is_told_until_it_is_held_again() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    // Price is stuck meanwhile: its pack is nowhere.
    hq.delta(PRICE, 51, &rows(100, 51));
    hq.sign();
    std::fs::remove_file(hq.pack_path(PRICE, 51, PackKind::Delta)).unwrap();
    r.tamper("UPDATE tillcast_stream SET applied_at = 'yesterday' WHERE stream = 'promo'");
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Retry);
    let drifts = |agent: &Agent| {
        let open = agent.memory.look(|f| f.open());
        open.into_iter().filter(|f| f.code == fault::DRIFT).map(|f| (f.instance, f.object)).collect::<Vec<_>>()
    };
    let forgotten = [(Some(instance("promo@all")), Some("store.db".to_owned()))];
    assert_eq!(drifts(&agent), forgotten);
    drop(agent);
    let agent = r.open();
    assert_eq!(drifts(&agent), forgotten, "a restart heals nothing");
    poll_and_cycle(&agent).await;
    assert_eq!((version(&agent, "promo@all"), version(&agent, PRICE)), (Some(7), Some(50)));
    assert_eq!(drifts(&agent), []);
    assert!(agent.memory.look(|f| f.to_tell()).iter().any(|f| f.code == fault::DRIFT), "headquarters hears of it");
}

#[tokio::test]
async fn a_deadly_pack_that_was_passed_is_told_once_and_forgotten() {
    for unlisted in [false, true] {
        let mut hq = usual();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        poll_and_cycle(&r.open()).await;
        hq.delta(PRICE, 51, &rows(100, 51));
        let deadly = format!("{PRICE}/0000000051.delta.pack");
        if unlisted {
            hq.streams.remove(&instance(PRICE).stream);
        } else {
            hq.full(PRICE, 51, &rows(100, 51));
        }
        hq.sign();
        for _ in 0..5 {
            Tries::open(&r.config.data_dir, Duration::ZERO, &boot_id()).begin(&deadly.parse().unwrap());
        }
        let agent = r.open();
        let told = || agent.memory.look(|f| f.to_tell().into_iter().map(|f| (f.object, f.since)).collect::<Vec<_>>());
        let has_a_word = || agent.memory.look(|f| f.to_tell().iter().all(|f| f.text.starts_with("CRASH: ")));
        let began = r.clock.now();
        for _ in 0..3 {
            assert_eq!(poll_and_cycle(&agent).await, End::Done, "{unlisted}");
            assert!(has_a_word());
            assert_eq!((codes(&agent), told()), (vec![], vec![(Some(deadly.clone()), began)]), "{unlisted}");
            r.clock.advance(S);
        }
        assert_eq!(version(&agent, PRICE), Some(if unlisted { 50 } else { 51 }));
        drop(agent);
        assert_eq!(Tries::open(&r.config.data_dir, Duration::ZERO, &boot_id()).last(), None, "{unlisted}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_full_of_a_stream_that_drifted_is_told_until_it_is_healed() {
    let mut hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    r.tamper("UPDATE price SET cents = 1 WHERE sku = 5");
    agent.verify().await.unwrap();
    hq.bend(PRICE, 50, PackKind::Full);
    let began = r.clock.now();
    let wrong = |agent: &Agent| {
        let open = agent.memory.look(|f| f.open());
        open.into_iter().filter(|f| f.code != fault::DRIFT).map(|f| (f.code, f.since)).collect::<Vec<_>>()
    };
    for _ in 0..3 {
        cycle(&agent).await;
        assert_eq!(wrong(&agent), [(fault::REFUSED.to_owned(), began)]);
        r.clock.advance(S);
    }
    // The same of one that only its application shows to be bad.
    let name = format!("{PRICE}/0000000050.full.pack");
    let pack = name.parse().unwrap();
    agent.memory.avoid(&pack, "bad", began);
    agent.memory.faults(|f| f.raise(fault::PACK_IN_ERROR, Some(&instance(PRICE)), Some(&name), "bad", began));
    cycle(&agent).await;
    assert_eq!(wrong(&agent).len(), 2);
    hq.full(PRICE, 51, &rows(100, 51));
    hq.sign();
    assert_eq!(cycle(&agent).await, End::Done);
    assert_eq!((r.rows("price"), codes(&agent)), (rows(100, 51), vec![]));
}

/// Removes the register's memory, as whoever empties its directory and leaves the database that is sold by.
fn lose_device_file(r: &Register) {
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(r.config.data_dir.join(format!("{}{end}", proto::device::FILE)));
    }
}

#[tokio::test]
async fn rows_of_nobody_knows_which_headquarters_count_no_more_and_are_read() {
    let mut hq = usual();
    let mut r = Register::enrolled(&hq, &hq.url(), &[]);
    hq.delta("promo@all", 8, &rows(10, 2));
    hq.sign();
    poll_and_cycle(&r.open()).await;
    lose_device_file(&r);
    // Another headquarters, which has not come to these versions yet.
    let mut other = Hq::new();
    other.full(PRICE, 1, &rows(90, 7));
    other.full("promo@all", 8, &rows(9, 7));
    other.sign();
    r.config.relay = other.url();
    Device::enrol(&r.config.data_dir, &other.code()).unwrap();
    let agent = r.open();
    assert_eq!((r.rows("price"), r.rows("promo")), (rows(100, 50), rows(10, 2)), "to sell by");
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!((version(&agent, PRICE), version(&agent, "promo@all")), (Some(1), Some(8)));
    assert_eq!((r.rows("price"), r.rows("promo")), (rows(90, 7), rows(9, 7)));
    assert!(codes(&agent).is_empty() && !agent.verify().await.unwrap().drift);
}

#[tokio::test]
async fn a_database_that_is_gone_is_told_by_verify() {
    let hq = usual();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let remove = || {
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(r.config.data_dir.join(format!("store.db{end}")));
        }
    };
    let verified = async || cli::verify_rows(&r.config, &*r.clock, false).await.unwrap();
    assert_eq!(verified().await, Exit::Done, "nothing was brought here yet");
    let (bucket, away) = (hq.dir.path().to_owned(), hq.dir.path().with_extension("away"));
    std::fs::rename(&bucket, &away).unwrap();
    poll_and_cycle(&r.open()).await;
    remove();
    assert_eq!(verified().await, Exit::Done, "nor by a cycle that reached nobody");
    std::fs::rename(&away, &bucket).unwrap();
    poll_and_cycle(&r.open()).await;
    assert_eq!(verified().await, Exit::Done);
    remove();
    for _ in 0..2 {
        assert_eq!(verified().await, Exit::Failed);
    }
    let agent = r.open();
    assert_eq!(poll_and_cycle(&agent).await, End::Done);
    assert_eq!(verified().await, Exit::Done);
    // The same below an agent that runs.
    remove();
    let found = agent.verify().await.unwrap();
    assert!(found.gone && found.drift && found.text().contains("store.db is gone"), "{}", found.text());
    assert_eq!(cycle(&agent).await, End::Done);
    assert!(!agent.verify().await.unwrap().drift && r.rows("price") == rows(100, 50));
}

//! A database whose rows of our own cannot be read, that is damaged, or gone: what is healed, what is moved aside.

use super::*;
use crate::register_db::{RegisterDb, damaged, forget_stray_log, move_aside};
use proto::device::Device;
use rusqlite::config::DbConfig;

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

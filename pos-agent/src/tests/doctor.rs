//! What `doctor` says of a register.

use super::kit::{Hq, Register, poll_and_cycle, rows};
use crate::agent::Agent;
use crate::cli;
use crate::config::Config;
use crate::doctor::{Check, Mark, examine};
use proto::clock::Clock;
use proto::device::Device;
use proto::keys::SecretKey;
use proto::trust::EnrolCode;
use proto::wire::fault;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

async fn checks(r: &Register) -> Vec<Check> {
    examine(&r.config, &*r.clock).await
}
fn of<'c>(checks: &'c [Check], name: &str) -> &'c Check {
    checks.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("{name}: {checks:?}"))
}
fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn doctor_tells_of_versions_faults_and_who_can_read_the_database() {
    let mut hq = Hq::new();
    hq.full("price@all", 1, &rows(3, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    mode(&r.config.data_dir, 0o755);
    mode(&r.config.store_db(), 0o644);
    let found = checks(&r).await;
    for name in ["files", "enrolment", "database", "readers"] {
        assert_eq!(of(&found, name).mark, Mark::Pass, "{found:?}");
    }
    assert!(found.iter().all(|c| c.name != "fault"));
    // Version 2 is listed, and its pack is gone.
    hq.full("price@all", 2, &rows(3, 2));
    hq.sign();
    fs::remove_file(hq.pack_path("price@all", 2, proto::layout::PackKind::Full)).unwrap();
    poll_and_cycle(&agent).await;
    agent.memory.faults(|f| f.raise(fault::SOURCE, None, Some("x"), "it is down", r.clock.now()));
    agent.memory.save_faults();
    mode(&r.config.store_db(), 0o600);
    let found = checks(&r).await;
    assert_eq!(of(&found, "database").text, "price@all 1, price@all 2 is listed");
    assert!(of(&found, "fault").text.contains("it is down"), "{found:?}");
    let readers = of(&found, "readers");
    assert!(readers.mark == Mark::Warn && readers.text.contains("mode 600"), "{readers:?}");
    mode(&r.config.store_db(), 0o640);
    assert_eq!(of(&checks(&r).await, "readers").mark, Mark::Pass);
    mode(&r.config.data_dir, 0o700);
    assert_eq!(of(&checks(&r).await, "readers").mark, Mark::Warn, "nobody else gets into the directory");
    // Rows that are another headquarters' are not the listed version.
    hq.streams.clear();
    hq.full("price@all", 1, &rows(3, 1));
    hq.sign();
    poll_and_cycle(&agent).await;
    assert_eq!(of(&checks(&r).await, "database").text, "price@all 1");
    agent.db.disown().unwrap();
    assert_eq!(of(&checks(&r).await, "database").text, "price@all 1, price@all 1 is listed");
}

#[tokio::test]
async fn a_database_that_a_program_holds_is_waited_for_and_not_called_damaged() {
    let mut hq = Hq::new();
    hq.full("price@all", 1, &rows(3, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    let pos = rusqlite::Connection::open(r.config.store_db()).unwrap();
    pos.execute_batch("PRAGMA locking_mode = EXCLUSIVE; CREATE TABLE basket (n INTEGER)").unwrap();
    let found = checks(&r).await;
    let database = of(&found, "database");
    assert!(database.mark == Mark::Fail && database.text.contains("end it"), "{database:?}");
    assert!(!database.text.contains("move"), "{database:?}");
    let e = Agent::open(r.config.clone(), r.clock.clone(), None).map(drop).unwrap_err();
    assert!(e.is_busy() && e.to_string().contains("end it") && !e.to_string().contains("move"), "{e}");
    // `run` waits for its end, and lets nobody wait for an answer meanwhile.
    let local_listen = (std::net::Ipv4Addr::LOCALHOST, tillcast_tests::quiet_port()).into();
    let mut begun = Box::pin(cli::begin(Config { local_listen, ..r.config.clone() }, r.clock.clone()));
    tokio::select! {
        biased;
        _ = &mut begun => panic!("it is held"),
        () = std::future::ready(()) => {}
    }
    assert!(std::net::TcpStream::connect(local_listen).is_err());
    pos.close().unwrap();
    let begun = begun.await.unwrap();
    assert!(std::net::TcpStream::connect(local_listen).is_ok());
    drop(begun);
    // A reader of before, in another mode than ours, keeps us out as well.
    let pos = rusqlite::Connection::open(r.config.store_db()).unwrap();
    pos.execute_batch("PRAGMA journal_mode = DELETE; BEGIN; SELECT * FROM price").unwrap();
    let e = Agent::open(r.config.clone(), r.clock.clone(), None).map(drop).unwrap_err();
    assert!(e.is_busy(), "{e}");
}

#[tokio::test]
async fn doctor_tells_a_device_that_was_enrolled_elsewhere() {
    let mut hq = Hq::new();
    hq.full("price@all", 1, &rows(3, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    poll_and_cycle(&r.open()).await;
    let seed = SecretKey::generate().unwrap().to_secret_text();
    Device::enrol(&r.config.data_dir, &EnrolCode { seed, ..hq.code() }).unwrap();
    let found = checks(&r).await;
    let enrolment = of(&found, "enrolment");
    assert!(enrolment.mark == Mark::Fail && enrolment.text.contains("enroll this device anew"), "{enrolment:?}");
}

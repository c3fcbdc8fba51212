//! What lasts: rows of our own that cannot be read, programs and servers that stand in the way, a disk that fails to
//! sync, faults whose cause is gone.

use super::kit::*;
use crate::agent::{Agent, Step};
use crate::cli;
use crate::memory;
use crate::pace::End;
use crate::register_db::log_path;
use crate::report;
use crate::run;
use crate::verify;
use proto::cli::Exit;
use proto::clock::{Clock as _, after};
use proto::follow::lock;
use proto::layout::PackKind;
use proto::limits::Limits;
use proto::wire::fault;
use rusqlite::Connection;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

mod database;
mod faults;
mod others;

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

/// Deletes a database with its log, where they are there.
fn delete_all(path: &Path) {
    ["", "-wal", "-shm"].iter().for_each(|end| drop(std::fs::remove_file(format!("{}{end}", path.display()))));
}

/// Deletes a database's files with these ends.
fn delete(path: &Path, ends: &[&str]) {
    ends.iter().for_each(|end| std::fs::remove_file(format!("{}{end}", path.display())).unwrap());
}

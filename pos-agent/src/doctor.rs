//! `doctor`: tries what the agent needs, line by line, with a remedy. Writes nothing.

use crate::agent::HELD;
use crate::config::Config;
use crate::memory::Memory;
use proto::clock::Clock;
use proto::device::{self, Device};
use proto::fetch::{Polled, Small, Source};
use proto::ids::Instance;
use proto::layout::ObjectName;
use proto::manifest::Manifest;
use proto::owner::{self, User};
use proto::replica::Replica;
use proto::replica::sqlite::MINIMUM_SQLITE;
use proto::shelf;
use serde::Serialize;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mark {
    /// Good.
    Pass,
    /// It works, but look at it.
    Warn,
    /// It does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was tried.
    pub name: String,
    /// How it went.
    pub mark: Mark,
    /// What was found, and the remedy.
    pub text: String,
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = match self.mark {
            Mark::Pass => "PASS",
            Mark::Warn => "WARN",
            Mark::Fail => "FAIL",
        };
        write!(f, "{mark}  {:<12} {}", self.name, self.text)
    }
}

fn check(name: impl Into<String>, mark: Mark, text: impl Into<String>) -> Check {
    Check { name: name.into(), mark, text: text.into() }
}

/// Tries everything.
pub async fn examine(config: &Config, clock: &dyn Clock) -> Vec<Check> {
    let mut out = vec![sqlite(), disk(config)];
    let files = files(config);
    // Whoever may not write there would only hear that again.
    if files.as_ref().is_none_or(|f| f.mark == Mark::Pass) {
        out.extend(device(config));
    }
    out.extend(files);
    out.extend(readers(config));
    for (n, url) in std::iter::once(&config.relay).chain(&config.fallback).enumerate() {
        let name = if n == 0 { "relay".to_owned() } else { format!("fallback {n}") };
        out.push(source(config, name, url, n == 0).await);
    }
    if clock.now().as_second() < 1_760_000_000 {
        out.push(check(
            "clock",
            Mark::Warn,
            format!("it says {}: set the clock; the agent works, its times mislead", clock.now()),
        ));
    }
    out
}

fn sqlite() -> Check {
    let version = rusqlite::version();
    if rusqlite::version_number() >= MINIMUM_SQLITE {
        check("sqlite", Mark::Pass, version)
    } else {
        check(
            "sqlite",
            Mark::Fail,
            format!("{version} is older than 3.51.3, which mends a WAL fault: use a release build"),
        )
    }
}

fn disk(config: &Config) -> Check {
    match shelf::free_space(&config.data_dir) {
        Ok(s) if s.free < s.total / 20 => {
            check("disk", Mark::Warn, format!("{} of {} MiB free: under 5%", s.free >> 20, s.total >> 20))
        }
        Ok(s) => check("disk", Mark::Pass, format!("{} of {} MiB free", s.free >> 20, s.total >> 20)),
        Err(e) => check("disk", Mark::Fail, format!("{e}: make data_dir, owned by the agent's user")),
    }
}

/// What lies in the data directory, if there is one.
fn files(config: &Config) -> Option<Check> {
    if !config.data_dir.exists() {
        return None;
    }
    Some(match owner::check(&config.data_dir, device::FILE) {
        Ok(()) => check("files", Mark::Pass, format!("all may be written by {}", User::me())),
        Err(e) => check("files", Mark::Fail, e),
    })
}

/// What the device remembers, and the database beside the manifest.
fn device(config: &Config) -> Vec<Check> {
    let id = config.device();
    let device = match Device::open(&config.data_dir, &id, &config.limits) {
        Ok(device) => device,
        Err(e) => return vec![check("enrolment", Mark::Fail, e.to_string()), database(config, None)],
    };
    let (manifest, key) = (device.manifest().cloned(), device.key().public());
    let manifest = manifest.as_deref();
    let enrolment = match manifest.map(|m| (m, m.disowns(&id, &key))) {
        Some((_, Some(why))) => check("enrolment", Mark::Fail, why),
        Some((m, None)) => check("enrolment", Mark::Pass, format!("{id}, manifest serial {}", m.serial)),
        None => check("enrolment", Mark::Warn, format!("{id}, no manifest received yet")),
    };
    let mut out = vec![enrolment, database(config, manifest)];
    match Memory::load(Arc::new(Mutex::new(device))) {
        Ok((memory, _)) => out.extend(memory.look(|f| f.open()).into_iter().map(|f| {
            let what = f.instance.map(|i| format!("{i}: ")).unwrap_or_default();
            check("fault", Mark::Warn, format!("{} since {}: {what}{}", f.code, f.since, f.text))
        })),
        Err(e) => out.push(check("fault", Mark::Fail, e.to_string())),
    }
    out
}

fn database(config: &Config, manifest: Option<&Manifest>) -> Check {
    let path = config.store_db();
    if !path.exists() {
        return check("database", Mark::Warn, format!("{} is made by the first cycle", path.display()));
    }
    let held = match Replica::open_read_only(&path, &config.limits).and_then(|r| r.all_held()) {
        Ok(held) => held,
        Err(e) if e.is_busy() => return check("database", Mark::Fail, format!("{e}: {HELD}")),
        Err(e) => {
            return check(
                "database",
                Mark::Fail,
                format!(
                    "{e}: stop the POS application and the agent, move store.db* away, start both; it is installed anew"
                ),
            );
        }
    };
    let mut list: Vec<_> = held.iter().map(|(s, h)| format!("{s}@{} {}", h.audience, h.version)).collect();
    let counted = |i: &Instance, epoch| held.get(&i.stream).and_then(|h| h.version_of(i, epoch));
    let behind: Vec<_> = manifest
        .iter()
        .flat_map(|m| m.instances().map(|(i, e)| (i, e, m.epoch)))
        .filter(|(i, e, epoch)| counted(i, *epoch).is_none_or(|v| v < e.version))
        .map(|(i, e, _)| format!("{i} {} is listed", e.version))
        .collect();
    if list.is_empty() {
        list.push("empty".into());
    }
    let unread =
        manifest.iter().flat_map(|m| &m.unread).map(|(s, why)| format!("{s}: what is listed is refused: {why}"));
    let behind: Vec<_> = behind.into_iter().chain(unread).collect();
    let mark = if behind.is_empty() { Mark::Pass } else { Mark::Warn };
    list.extend(behind);
    check("database", mark, list.join(", "))
}

/// Whether another user, the POS application's, can read the database.
fn readers(config: &Config) -> Option<Check> {
    let (path, dir) = (config.store_db(), &config.data_dir);
    let (file, of_dir) = (fs::metadata(&path).ok()?, fs::metadata(dir).ok()?);
    let (mode, dir_mode) = (file.mode() & 0o777, of_dir.mode() & 0o777);
    // A reader opens the file by a name in the directory.
    let may = |shift: u32| (mode >> shift) & 4 != 0 && (dir_mode >> shift) & 1 != 0;
    let told =
        format!("{} has mode {mode:03o} in a directory of {dir_mode:03o}, of {}", path.display(), User(file.uid()));
    Some(match (may(0), may(3)) {
        (true, _) => check("readers", Mark::Pass, "every user of this machine can read store.db"),
        (false, true) => check("readers", Mark::Pass, format!("{told}: users of group {} can read it", file.gid())),
        (false, false) => check(
            "readers",
            Mark::Warn,
            format!(
                "{told}: a POS application of another user cannot read it. Let the agent run with umask 022 (UMask= of its \
                 unit), and `chmod a+rx` the directory, `chmod a+r` store.db, store.db-wal and store.db-shm"
            ),
        ),
    })
}

async fn source(config: &Config, name: String, url: &str, is_relay: bool) -> Check {
    let source = match Source::parse(url, &config.source_options) {
        Ok(source) => source,
        Err(e) => return check(name, Mark::Fail, e.to_string()),
    };
    // A register lives without any of them for a while.
    let mark = if is_relay { Mark::Fail } else { Mark::Warn };
    let manifest = ObjectName::Manifest(config.register.store().clone());
    let kind = match source.versions_poll(0, None).await {
        Ok(Polled::Body { .. } | Polled::Unchanged) => "a relay",
        Ok(Polled::NoSuchPage) => "static",
        Err(e) => return check(name, mark, e.to_string()),
    };
    match source.get_small(&manifest, None, None, config.limits.manifest_bytes).await {
        Ok(Small::Body { .. } | Small::Unchanged) => {
            check(name, Mark::Pass, format!("{} ({kind}) has the store's manifest", source.url()))
        }
        Err(e) => check(name, mark, e.to_string()),
    }
}

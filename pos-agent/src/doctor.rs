//! `doctor`: tries what the agent needs, line by line, with a remedy. Writes nothing.

use crate::config::Config;
use proto::clock::Clock;
use proto::device::Device;
use proto::fetch::{Polled, Small, Source};
use proto::layout::ObjectName;
use proto::replica::Replica;
use proto::replica::sqlite::MINIMUM_SQLITE;
use proto::shelf;
use serde::Serialize;

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
    let mut out = vec![sqlite(), disk(config), enrolment(config), database(config)];
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

fn enrolment(config: &Config) -> Check {
    match Device::open(&config.data_dir, &config.device(), &config.limits) {
        Ok(d) => match d.manifest() {
            Some(m) => check("enrolment", Mark::Pass, format!("{}, manifest serial {}", d.id(), m.serial)),
            None => check("enrolment", Mark::Warn, format!("{}, no manifest received yet", d.id())),
        },
        Err(e) => check("enrolment", Mark::Fail, e.to_string()),
    }
}

fn database(config: &Config) -> Check {
    let path = config.store_db();
    if !path.exists() {
        return check("database", Mark::Warn, format!("{} is made by the first cycle", path.display()));
    }
    let held = Replica::open_read_only(&path, &config.limits).and_then(|r| r.all_held());
    match held {
        Ok(held) => {
            let list: Vec<_> = held.iter().map(|(s, h)| format!("{s}@{} {}", h.audience, h.version)).collect();
            check("database", Mark::Pass, if list.is_empty() { "empty".into() } else { list.join(", ") })
        }
        Err(e) => check(
            "database",
            Mark::Fail,
            format!(
                "{e}: stop the POS application and the agent, move store.db* away, start both; it is installed anew"
            ),
        ),
    }
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

//! Numbers for Prometheus, made at each scrape from what `serve` knows.

use crate::carry::Receipts;
use crate::config::StreamConfig;
use crate::fleet::DeviceView;
use crate::ledger::{Head, StoreRow, StoreSeen};
use crate::status::{behind, is_behind};
use prometheus::{Encoder, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use proto::ids::{DeviceId, Instance, StoreId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What `serve` counts.
pub struct Metrics {
    registry: Registry,
    /// Heartbeats recorded or known.
    pub beats: IntCounter,
    /// Heartbeats refused.
    pub beats_refused: IntCounter,
    /// Long polls that wait now.
    pub waiting: IntGauge,
    /// Long polls answered because something changed.
    pub woken: IntCounter,
    stores: IntGaugeVec,
    devices: IntGaugeVec,
    version: IntGaugeVec,
    behind: IntGaugeVec,
    mails: IntGauge,
    episodes: IntGauge,
    memory: IntGauge,
    build: IntGaugeVec,
}

/// What a scrape looks at.
#[derive(Debug)]
pub struct Scrape<'a> {
    /// Stores.
    pub stores: &'a [StoreRow],
    /// Devices.
    pub devices: &'a [DeviceView<'a>],
    /// Heads.
    pub heads: &'a BTreeMap<Instance, Head>,
    /// Streams of the settings.
    pub streams: &'a [StreamConfig],
    /// What relays told by stick.
    pub receipts: &'a Receipts,
    /// Mails that wait.
    pub mails: usize,
    /// Episodes that are open.
    pub episodes: usize,
    /// When a relay counts as silent.
    pub store_silent: Duration,
    /// When a register does.
    pub register_silent: Duration,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let registry = Registry::new();
        let name = |n: &str| format!("tillcast_{n}");
        let counter = |n: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let c = IntCounter::new(name(n), help)?;
            registry.register(Box::new(c.clone()))?;
            Ok(c)
        };
        let gauge = |n: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let g = IntGauge::new(name(n), help)?;
            registry.register(Box::new(g.clone()))?;
            Ok(g)
        };
        let vector = |n: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let g = IntGaugeVec::new(Opts::new(name(n), help), labels)?;
            registry.register(Box::new(g.clone()))?;
            Ok(g)
        };
        Ok(Metrics {
            beats: counter("heartbeats_total", "Heartbeats taken.")?,
            beats_refused: counter("heartbeats_refused_total", "Heartbeats refused.")?,
            waiting: gauge("wake_waiting", "Long polls that wait now.")?,
            woken: counter("wakes_total", "Long polls answered because a manifest changed.")?,
            stores: vector("stores", "Stores, by state.", &["state"])?,
            devices: vector("devices", "Enrolled devices, by role and state.", &["role", "state"])?,
            version: vector(
                "stream_version",
                "The newest version of each stream and audience.",
                &["stream", "audience"],
            )?,
            behind: vector("devices_behind", "Devices that hold an older version or none.", &["stream", "audience"])?,
            mails: gauge("mails_waiting", "Mails in the outbox.")?,
            episodes: gauge("episodes_open", "Things that are wrong now.")?,
            memory: gauge("process_resident_memory_bytes", "Resident memory.")?,
            build: vector("hq_build_info", "The program's version.", &["version"])?,
            registry,
        })
    }

    /// The text of a scrape.
    pub fn text(&self, s: &Scrape<'_>) -> Result<Vec<u8>, prometheus::Error> {
        let vanished = s.stores.iter().filter(|r| r.vanished_at.is_some()).count();
        self.stores.with_label_values(&["listed"]).set(number(s.stores.len() - vanished));
        self.stores.with_label_values(&["vanished"]).set(number(vanished));
        self.count_devices(s);
        self.version.reset();
        self.behind.reset();
        let late = count_behind(s);
        for (instance, head) in s.heads {
            let labels = [instance.stream.to_string(), instance.audience.to_string()];
            self.version.with_label_values(&labels).set(head.version.as_i64());
            self.behind.with_label_values(&labels).set(number(late.get(instance).copied().unwrap_or(0)));
        }
        self.mails.set(number(s.mails));
        self.episodes.set(number(s.episodes));
        self.memory.set(resident_bytes());
        self.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        Ok(out)
    }

    fn count_devices(&self, s: &Scrape<'_>) {
        for role in ["relay", "register"] {
            for state in ["heard", "silent", "never heard"] {
                let of = |d: &&DeviceView<'_>| (role == "relay") == matches!(d.id, DeviceId::Relay(_));
                let limit = if role == "relay" { s.store_silent } else { s.register_silent };
                let at = |d: &&DeviceView<'_>| match d.silent_for {
                    None => "never heard",
                    Some(silent) if silent >= limit => "silent",
                    Some(_) => "heard",
                };
                let n = s.devices.iter().filter(of).filter(|d| at(d) == state).count();
                self.devices.with_label_values(&[role, state]).set(number(n));
            }
        }
    }
}

/// How many devices are behind in each instance.
fn count_behind(s: &Scrape<'_>) -> BTreeMap<Instance, usize> {
    let stores: BTreeMap<&StoreId, &StoreSeen> = s.stores.iter().map(|r| (&r.seen.id, &r.seen)).collect();
    let mut late: BTreeMap<Instance, usize> = BTreeMap::new();
    for d in s.devices {
        let Some(held) = s.receipts.held(d) else { continue };
        let named = held.keys().filter(|i| is_behind(s.heads, &held, i)).map(|i| (*i).clone());
        let mut all: BTreeSet<Instance> = named.collect();
        // What never came is not named.
        if let Some(store) = stores.get(d.id.store()) {
            all.extend(behind(s.streams, s.heads, store, &held));
        }
        for instance in all {
            *late.entry(instance).or_default() += 1;
        }
    }
    late
}

fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Resident memory of this process, bytes; 0 where /proc does not tell.
fn resident_bytes() -> i64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: i64 = statm.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    pages * 4096
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_figure_is_documented() {
        let m = Metrics::new().unwrap();
        let nothing = Scrape {
            stores: &[],
            devices: &[],
            heads: &BTreeMap::new(),
            streams: &[],
            receipts: &Receipts::default(),
            mails: 0,
            episodes: 0,
            store_silent: Duration::ZERO,
            register_silent: Duration::ZERO,
        };
        m.text(&nothing).unwrap();
        // What has labels is there with its first value.
        m.version.with_label_values(&["price", "all"]);
        m.behind.with_label_values(&["price", "all"]);
        let text = TextEncoder::new().encode_to_string(&m.registry.gather()).unwrap();
        let told = include_str!("../../docs/METRICS.md");
        let told = told.split("\n## ").find(|s| s.starts_with("hq-publisher\n")).unwrap();
        let told: BTreeSet<&str> =
            told.lines().filter_map(|l| l.strip_prefix("| `")?.split(['`', '{']).next()).collect();
        let given = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect::<BTreeSet<_>>();
        assert_eq!(told, given);
    }
}

//! Counters for `/metrics`, in the names of Prometheus. In memory: they begin at 0 with the process.

use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};
use proto::wire::{Network, Status};
use std::fmt::Write as _;
use std::time::Duration;

/// The counters.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    applied: IntCounterVec,
    apply_seconds: Histogram,
    fetched_bytes: IntCounter,
    refused: IntCounterVec,
    checks: IntCounter,
    drifts: IntCounter,
    beats: IntCounterVec,
}

impl Metrics {
    /// All at 0.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let m = Metrics {
            registry: Registry::new(),
            applied: IntCounterVec::new(
                Opts::new("tillcast_agent_applied_total", "Transactions committed."),
                &["kind"],
            )?,
            apply_seconds: Histogram::with_opts(
                HistogramOpts::new("tillcast_agent_apply_seconds", "Time of a transaction, gunzip to commit.")
                    .buckets(prometheus::exponential_buckets(0.004, 4.0, 8)?),
            )?,
            fetched_bytes: IntCounter::new(
                "tillcast_agent_fetched_bytes_total",
                "Bytes of packs fetched and verified.",
            )?,
            refused: IntCounterVec::new(
                Opts::new("tillcast_agent_refused_total", "Applications rolled back."),
                &["reason"],
            )?,
            checks: IntCounter::new("tillcast_agent_checks_total", "Times that all rows were read and compared.")?,
            drifts: IntCounter::new(
                "tillcast_agent_drifts_total",
                "Times that rows were found to differ from their version.",
            )?,
            beats: IntCounterVec::new(Opts::new("tillcast_agent_heartbeats_total", "Heartbeats sent."), &["outcome"])?,
        };
        m.registry.register(Box::new(m.applied.clone()))?;
        m.registry.register(Box::new(m.apply_seconds.clone()))?;
        m.registry.register(Box::new(m.fetched_bytes.clone()))?;
        m.registry.register(Box::new(m.refused.clone()))?;
        m.registry.register(Box::new(m.checks.clone()))?;
        m.registry.register(Box::new(m.drifts.clone()))?;
        m.registry.register(Box::new(m.beats.clone()))?;
        Ok(m)
    }

    /// A transaction was committed.
    pub fn applied(&self, kind: &str, took: Duration) {
        self.applied.with_label_values(&[kind]).inc();
        self.apply_seconds.observe(took.as_secs_f64());
    }
    /// Transactions committed so far.
    pub fn transactions(&self) -> u64 {
        self.apply_seconds.get_sample_count()
    }
    /// A pack was fetched.
    pub fn fetched(&self, bytes: u64) {
        self.fetched_bytes.inc_by(bytes);
    }
    /// An application was rolled back.
    pub fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }
    /// All rows were compared.
    pub fn checked(&self) {
        self.checks.inc();
    }
    /// A drift was found.
    pub fn drifted(&self) {
        self.drifts.inc();
    }
    /// A heartbeat was taken, or not.
    pub fn beat(&self, taken: bool) {
        self.beats.with_label_values(&[if taken { "taken" } else { "failed" }]).inc();
    }

    /// The page: the counters, and the state as gauges. `log_bytes` is the database's log,
    /// `held_s` the rest of a hold.
    pub fn page(&self, status: &Status, log_bytes: u64, held_s: u64) -> String {
        let mut text = Vec::new();
        if let Err(e) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::warn!(error = %e, "metrics");
        }
        let mut page = String::from_utf8(text).unwrap_or_default();
        let mut gauge = |name: &str, help: &str, rows: &[(String, i64)]| {
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (labels, value) in rows {
                let _ = writeln!(page, "{name}{labels} {value}");
            }
        };
        // Names are parsed types of plain letters: nothing to escape.
        let streams = status.streams.iter();
        let versions: Vec<_> =
            streams.map(|(i, s)| (format!("{{stream=\"{i}\"}}"), s.version.map_or(0, |v| v.as_i64()))).collect();
        let one = |v: i64| [(String::new(), v)];
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        gauge(
            "tillcast_agent_build_info",
            "The program's version.",
            &[(format!("{{version=\"{}\"}}", crate::memory::PROGRAM), 1)],
        );
        gauge("tillcast_agent_stream_version", "Version held.", &versions);
        let states = [Network::Online, Network::InStore, Network::OnlineRelayDown, Network::Offline];
        let states: Vec<_> = states
            .iter()
            .map(|n| (format!("{{state=\"{}\"}}", crate::status::network(*n)), i64::from(*n == status.network)))
            .collect();
        gauge("tillcast_agent_network", "The network as seen; 1 for the present state.", &states);
        gauge("tillcast_agent_faults", "Faults that are not mended.", &one(number(status.errors.len() as u64)));
        gauge("tillcast_agent_hold_seconds", "Rest of the POS application's hold.", &one(number(held_s)));
        gauge("tillcast_agent_log_bytes", "Bytes of the database's write-ahead log.", &one(number(log_bytes)));
        if let Some(d) = status.disk {
            gauge("tillcast_agent_disk_free_bytes", "Free room on the data's disk.", &one(number(d.free)));
        }
        if let Some(s) = status.clock_skew_s {
            gauge("tillcast_agent_clock_skew_seconds", "How far this clock is ahead of the relay's.", &one(s));
        }
        if let Some(s) = status.hq_seen_s {
            gauge("tillcast_agent_hq_seen_seconds", "Seconds since HQ was seen.", &one(number(s)));
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::wire::Disk;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn every_figure_is_documented() {
        let m = Metrics::new().unwrap();
        // What has labels is there with its first value.
        m.applied("full", Duration::ZERO);
        m.refused("BAD_SCHEMA");
        m.beat(true);
        let status = Status {
            id: "0421-03".parse().unwrap(),
            streams: BTreeMap::new(),
            serial: None,
            network: Network::Offline,
            debts: Vec::new(),
            errors: Vec::new(),
            disk: Some(Disk { free: 1, total: 2 }),
            clock_skew_s: Some(0),
            hq_seen_s: Some(0),
        };
        let text = m.page(&status, 0, 0);
        let told = include_str!("../../docs/METRICS.md");
        let told = told.split("\n## ").find(|s| s.starts_with("pos-agent\n")).unwrap();
        let told: BTreeSet<&str> =
            told.lines().filter_map(|l| l.strip_prefix("| `")?.split(['`', '{']).next()).collect();
        let given = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect::<BTreeSet<_>>();
        assert_eq!(told, given);
    }
}

//! Figures for Prometheus. Counters are raised where things happen; gauges are set from the hall's state when
//! somebody asks.

use crate::hall::Hall;
use prometheus::{Encoder, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// The media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// The relay's figures.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Objects answered on the LAN.
    pub objects: IntCounter,
    /// Polls of versions answered.
    pub polls: IntCounter,
    /// Heartbeats kept.
    pub beats: IntCounter,
    /// Bytes downloaded from sources.
    pub downloaded: IntCounter,
    /// Trials by how they ended.
    pub trials: IntCounterVec,
    version: IntGaugeVec,
    head: IntGaugeVec,
    faults: IntGaugeVec,
    register_seen: IntGaugeVec,
    hq_seen: IntGauge,
    serial: IntGauge,
    disk_free: IntGauge,
    cached: IntGauge,
    connections: IntGauge,
    turned_away: IntGauge,
    build: IntGaugeVec,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// All figures at nothing.
    pub fn new() -> Metrics {
        let registry = Registry::new();
        Metrics {
            objects: counter(&registry, "tillcast_relay_objects_total", "Objects answered on the LAN."),
            polls: counter(&registry, "tillcast_relay_version_polls_total", "Polls of versions answered."),
            beats: counter(&registry, "tillcast_relay_heartbeats_total", "Heartbeats of registers kept."),
            downloaded: counter(&registry, "tillcast_relay_downloaded_bytes_total", "Bytes of packs from sources."),
            trials: {
                let opts = Opts::new("tillcast_relay_trials_total", "Trials on the shadow by how they ended.");
                made(&registry, IntCounterVec::new(opts, &["end"]))
            },
            version: gauges(&registry, "tillcast_relay_version", "The version served.", "stream"),
            head: gauges(&registry, "tillcast_relay_head_version", "The version that HQ lists.", "stream"),
            faults: gauges(&registry, "tillcast_relay_faults", "Faults not mended, by code.", "code"),
            register_seen: gauges(
                &registry,
                "tillcast_relay_register_seen_seconds",
                "Seconds since a register was heard.",
                "register",
            ),
            hq_seen: gauge(&registry, "tillcast_relay_hq_seen_seconds", "Seconds since HQ was heard; -1: never."),
            serial: gauge(&registry, "tillcast_relay_manifest_serial", "The serial of the manifest held."),
            disk_free: gauge(&registry, "tillcast_relay_disk_free_bytes", "Room on the data directory's disk."),
            connections: gauge(&registry, "tillcast_relay_connections", "LAN connections open now."),
            turned_away: gauge(
                &registry,
                "tillcast_relay_connections_refused",
                "LAN connections refused since the start: too many from one address, or in all.",
            ),
            cached: gauge(&registry, "tillcast_relay_cache_bytes", "Bytes of packs in memory."),
            build: gauges(&registry, "tillcast_relay_build_info", "The program's version.", "version"),
            registry,
        }
    }

    /// All figures as text.
    pub fn text(&self, hall: &Hall) -> Vec<u8> {
        self.set(hall);
        let mut out = Vec::new();
        if let Err(e) = TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            tracing::warn!(error = %e, "metrics cannot be written");
        }
        out
    }

    fn set(&self, hall: &Hall) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        self.hq_seen.set(hall.hq_seen_s().map_or(-1, number));
        self.disk_free.set(hall.disk.space().map_or(0, |d| number(d.free)));
        self.connections.set(number(hall.gate.open() as u64));
        self.turned_away.set(number(hall.gate.refused()));
        self.cached.set(number(hall.objects.cached_bytes()));
        for gauges in [&self.version, &self.head, &self.faults, &self.register_seen] {
            gauges.reset();
        }
        let (state, now) = (hall.state(), hall.clock.monotonic());
        self.serial.set(state.manifest.as_ref().map_or(0, |m| number(m.serial)));
        for (instance, version) in state.versions() {
            self.version.with_label_values(&[&instance.to_string()]).set(version.as_i64());
        }
        for (instance, entry) in state.instances() {
            self.head.with_label_values(&[&instance.to_string()]).set(entry.version.as_i64());
        }
        for fault in state.all_faults() {
            self.faults.with_label_values(&[&fault.code]).inc();
        }
        for (register, heard) in &state.registers {
            self.register_seen.with_label_values(&[register.as_str()]).set(number(heard.ago(now).as_secs()));
        }
    }
}

#[allow(clippy::expect_used, reason = "names are constants; the tests make them all")]
fn made<T: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<T>) -> T {
    let figure = made.expect("a metric's name is a constant");
    registry.register(Box::new(figure.clone())).expect("each metric is registered once");
    figure
}
fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    made(registry, IntCounter::new(name, help))
}
fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    made(registry, IntGauge::new(name, help))
}
fn gauges(registry: &Registry, name: &str, help: &str, label: &str) -> IntGaugeVec {
    made(registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::Store;
    use std::collections::BTreeSet;

    #[test]
    fn every_figure_is_documented() {
        let relay = Store::enrolled(&[]).open();
        let m = &relay.hall.metrics;
        m.set(&relay.hall);
        // What has labels is there with its first value.
        m.trials.with_label_values(&["x"]);
        for figures in [&m.version, &m.head, &m.faults, &m.register_seen] {
            figures.with_label_values(&["x"]);
        }
        let mut out = Vec::new();
        TextEncoder::new().encode(&m.registry.gather(), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let told = include_str!("../../docs/METRICS.md");
        let told = told.split("\n## ").find(|s| s.starts_with("store-relay\n")).unwrap();
        let told: BTreeSet<&str> =
            told.lines().filter_map(|l| l.strip_prefix("| `")?.split(['`', '{']).next()).collect();
        let given = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect::<BTreeSet<_>>();
        assert_eq!(told, given);
    }
}

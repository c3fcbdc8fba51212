//! The register's state for people and programs: `status`, `/v1/status`, heartbeats. Pure, from
//! what the database, the manifest and the memory say.

use crate::agent::OpenError;
use crate::config::Config;
use crate::memory::Memory;
use crate::register_db::{AllHeld, DbError};
use proto::clock::{Clock, Timestamp};
use proto::device::Device;
use proto::follow::lock;
use proto::ids::{DeviceId, Instance};
use proto::manifest::Manifest;
use proto::replica::Replica;
use proto::shelf;
use proto::wire::{Disk, Fault, Network, Status, StreamReport, StreamState, fault, unread_debts, unread_faults};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

/// What a report is made of.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Who reports.
    pub id: DeviceId,
    /// What the database holds.
    pub held: &'a AllHeld,
    /// What HQ signed, as far as it is known here.
    pub manifest: Option<&'a Manifest>,
    /// Streams whose rows are known to be wrong.
    pub drifted: BTreeSet<proto::ids::StreamName>,
    /// Streams that cannot go on now, and why.
    pub waits: &'a BTreeMap<Instance, String>,
    /// Whether a sale is open.
    pub on_hold: bool,
    /// Faults that are not mended.
    pub faults: Vec<Fault>,
    /// The network as seen.
    pub network: Network,
    /// The disk.
    pub disk: Option<Disk>,
    /// Seconds that the clock is ahead of the relay's.
    pub clock_skew_s: Option<i64>,
    /// Seconds since HQ was seen.
    pub hq_seen_s: Option<u64>,
    /// This device's time.
    pub now: Timestamp,
}

/// The report.
pub fn status(f: Facts<'_>) -> Status {
    let mut streams = BTreeMap::new();
    let mut debts: Vec<String> = f.waits.iter().map(|(i, why)| format!("{i}: {why}")).collect();
    for (stream, h) in f.held {
        let instance = Instance { stream: stream.clone(), audience: h.audience.clone() };
        let listed = f.manifest.is_none_or(|m| m.lists_stream(stream));
        if !listed {
            debts
                .push(format!("{instance}: the manifest lists it no more; its rows are kept at version {}", h.version));
        }
        // What was disowned is no version of this headquarters.
        let counts = h.epoch > 0;
        let report = StreamReport {
            version: counts.then_some(h.version),
            schema: counts.then_some(h.schema),
            digests: if counts { h.digests.clone() } else { BTreeMap::new() },
            state: state(&f, &instance),
        };
        streams.insert(instance, report);
    }
    for (instance, _) in f.manifest.iter().flat_map(|m| m.instances()) {
        if !f.held.contains_key(&instance.stream) {
            let state = state(&f, &instance);
            let report = StreamReport { version: None, schema: None, digests: BTreeMap::new(), state };
            streams.insert(instance, report);
        }
    }
    let mut errors = f.faults;
    if let Some(m) = f.manifest {
        debts.extend(unread_debts(m));
        errors.extend(unread_faults(m, f.held));
    }
    if let Some(m) = f.manifest
        && m.expires_at <= f.now
    {
        debts.push(format!("the manifest expired at {}; it stays in force until a newer one comes", m.expires_at));
    }
    Status {
        id: f.id,
        streams,
        serial: f.manifest.map(|m| m.serial),
        network: f.network,
        debts,
        errors,
        disk: f.disk,
        clock_skew_s: f.clock_skew_s,
        hq_seen_s: f.hq_seen_s,
    }
}

fn state(f: &Facts<'_>, instance: &Instance) -> StreamState {
    let bad =
        |e: &Fault| e.code == fault::PACK_IN_ERROR && e.instance.as_ref().is_some_and(|i| i.stream == instance.stream);
    if f.drifted.contains(&instance.stream) {
        return StreamState::Drift;
    }
    let Some(manifest) = f.manifest else { return StreamState::Waiting };
    if manifest.unread.contains_key(&instance.stream) {
        return StreamState::Error;
    }
    let Some(entry) = manifest.streams.get(&instance.stream) else { return StreamState::Ok };
    let held = f.held.get(&instance.stream);
    let there =
        held.is_some_and(|h| h.audience == entry.audience && h.epoch == manifest.epoch && h.version >= entry.version);
    match held {
        _ if there => StreamState::Ok,
        _ if f.faults.iter().any(bad) => StreamState::Error,
        None => StreamState::Waiting,
        Some(_) if f.on_hold => StreamState::Waiting,
        Some(_) => StreamState::Behind,
    }
}

/// The report from the files, while no agent runs here (or its API cannot be reached).
pub fn from_files(config: &Config, clock: &dyn Clock) -> Result<Status, OpenError> {
    let device = Arc::new(Mutex::new(Device::open(&config.data_dir, &config.device(), &config.limits)?));
    let (memory, _) = Memory::load(device.clone())?;
    let database = config.store_db();
    let held = match database.exists() {
        true => Replica::open_read_only(&database, &config.limits).and_then(|r| r.all_held()).map_err(DbError::from)?,
        false => AllHeld::new(),
    };
    let manifest = lock(&device).manifest().cloned();
    let space = shelf::free_space(&config.data_dir).ok();
    Ok(status(Facts {
        id: config.device(),
        held: &held,
        manifest: manifest.as_deref(),
        drifted: drifted(&memory),
        waits: &BTreeMap::new(),
        on_hold: false,
        faults: memory.look(|f| f.open()),
        // Nobody listens, and what was heard long ago says nothing of now.
        network: Network::Offline,
        disk: space.map(|s| Disk { free: s.free, total: s.total }),
        clock_skew_s: None,
        hq_seen_s: None,
        now: clock.now(),
    }))
}

/// The streams whose latch is set.
pub fn drifted(memory: &Memory) -> BTreeSet<proto::ids::StreamName> {
    memory.drifts().into_keys().collect()
}

/// The network's name, as in JSON.
pub fn network(n: Network) -> &'static str {
    match n {
        Network::Online => "online",
        Network::InStore => "in-store",
        Network::OnlineRelayDown => "online-relay-down",
        Network::Offline => "offline",
        Network::Unknown => "unknown",
    }
}

/// The report for people.
pub fn text(s: &Status) -> String {
    let mut out = String::new();
    let explained = match s.network {
        Network::Online => "headquarters seen within two minutes",
        Network::InStore => "the relay answers, headquarters has not been seen",
        Network::OnlineRelayDown => "the relay is silent; reading from CDN or bucket",
        Network::Offline => "nothing answers; selling goes on with what is here",
        Network::Unknown => "a state that this program does not know",
    };
    let _ = writeln!(out, "{}  {}: {explained}", s.id, network(s.network));
    let serial = s.serial.map_or("none received yet".into(), |n| n.to_string());
    let _ = writeln!(out, "manifest serial {serial}");
    for (instance, r) in &s.streams {
        let version = r.version.map_or("-".into(), |v| v.to_string());
        let _ = writeln!(out, "  {instance:<24} version {version:<10} {:?}", r.state);
    }
    for d in &s.debts {
        let _ = writeln!(out, "waiting: {d}");
    }
    for e in &s.errors {
        let _ = writeln!(out, "error: {} since {}: {}", e.code, e.since, e.text);
    }
    if let Some(skew) = s.clock_skew_s.filter(|s| s.abs() > 60) {
        let _ = writeln!(out, "clock: {} s {} the relay's", skew.abs(), if skew > 0 { "ahead of" } else { "behind" });
    }
    if let Some(d) = s.disk {
        let _ = writeln!(out, "disk: {} of {} MiB free", d.free >> 20, d.total >> 20);
    }
    out.truncate(out.trim_end().len());
    out
}

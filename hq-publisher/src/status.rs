//! `status`: how streams, stores, devices and mails stand. Reads the ledger, changes nothing.

use crate::carry::Receipts;
use crate::config::{Config, StreamConfig};
use crate::fleet::{self, DeviceView, Digests, Fleet, long};
use crate::intake;
use crate::ledger::{Head, Ledger, LedgerError, State, StoreRow, StoreSeen};
use crate::manifests::{followed, lost, newest_trust};
use crate::some::some;
use proto::clock::{Clock, Timestamp, after};
use proto::disk::DataDisk;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::wire::{Fault, Network, StreamState};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How everything stands.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Each instance that was published.
    pub streams: BTreeMap<Instance, StreamLine>,
    /// Each store.
    pub stores: Vec<StoreLine>,
    /// Each enrolled device.
    pub devices: Vec<DeviceLine>,
    /// What is wrong now, as `serve` would judge it.
    pub errors: Vec<String>,
    /// What was told and is not over.
    pub episodes: Vec<EpisodeLine>,
    /// Mails that wait.
    pub outbox: Vec<MailLine>,
    /// Versions that a run left between signature and end: the next publish finishes them.
    pub unfinished: Vec<String>,
    /// The greatest serial of the manifests; none before the first. This and the next two as the other tiers have them.
    pub serial: Option<u64>,
    /// Headquarters is where it is.
    pub network: Network,
    /// What is not finished, for people.
    pub debts: Vec<String>,
    /// The trust file's version and epoch; none before `init`.
    pub trust: Option<(u64, u64)>,
}

/// One instance.
#[derive(Debug, Clone, Serialize)]
pub struct StreamLine {
    /// Its newest version.
    pub version: Version,
    /// Its contract's number.
    pub schema: u64,
    /// Its digests.
    pub digests: Digests,
    /// `ok`, or `behind` while a store that was heard has not got it.
    pub state: &'static str,
    /// When it was signed.
    pub signed_at: Timestamp,
    /// Packs that manifests list.
    pub packs: usize,
    /// Stores whose relay reports an older version or none.
    pub stores_behind: usize,
}

/// One store.
#[derive(Debug, Clone, Serialize)]
pub struct StoreLine {
    /// Its id.
    pub id: StoreId,
    /// Its zone.
    pub zone: Option<String>,
    /// Its region.
    pub region: Option<String>,
    /// Its manifest's serial; 0 before the first.
    pub serial: u64,
    /// Whether that is in the bucket.
    pub put: bool,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// When the source no longer had the store.
    pub vanished_at: Option<Timestamp>,
    /// Instances that its relay has not at the newest version.
    pub behind: Vec<Instance>,
    /// When a stick's receipt told that, by the relay's clock, or when it was read back if that was ahead; none: its
    /// heartbeats did.
    pub by_stick: Option<Timestamp>,
}

/// One device.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceLine {
    /// Its id.
    pub id: DeviceId,
    /// Seconds since it was heard; none: never.
    pub heard_s: Option<u64>,
    /// Its program's version.
    pub program: Option<String>,
    /// The serial of the manifest that it holds.
    pub serial: Option<u64>,
    /// What it holds.
    pub streams: BTreeMap<Instance, (Option<Version>, StreamState)>,
    /// What it reports as wrong.
    pub errors: Vec<Fault>,
    /// How far its clock is ahead, s.
    pub clock_skew_s: Option<i64>,
}

/// One open episode.
#[derive(Debug, Clone, Serialize)]
pub struct EpisodeLine {
    /// Its key.
    pub key: String,
    /// What is wrong.
    pub text: String,
    /// Since when.
    pub opened_at: Timestamp,
}

/// One mail that waits.
#[derive(Debug, Clone, Serialize)]
pub struct MailLine {
    /// Its Message-ID.
    pub id: String,
    /// Its subject.
    pub subject: String,
    /// Tries so far.
    pub attempts: u32,
    /// Why the last one failed.
    pub last_error: Option<String>,
}

/// Looks.
pub async fn report(config: &Config, ledger: &Ledger, clock: &dyn Clock) -> Result<Report, LedgerError> {
    let now = clock.now();
    let enrolled = ledger.enrolled().await?;
    let (views, published) = intake::glance(ledger, &enrolled, now, &config.limits).await?;
    let heads = ledger.heads().await?;
    let stores = ledger.stores().await?;
    let expiring = ledger.expiring(after(now, config.alerts.manifest_expires.0)).await?;
    let assessment = fleet::assess(&Fleet {
        devices: &views,
        complaints: &[],
        published: &published,
        serials: &*ledger.serials().await?,
        expiring: &expiring,
        own_disk: DataDisk::new(&config.state.dir, None).space(),
        deaf_for: Some(Duration::ZERO),
        alerts: &config.alerts,
        now,
    });
    let relays: BTreeMap<&StoreId, &DeviceView<'_>> =
        views.iter().filter(|v| matches!(v.id, DeviceId::Relay(_))).map(|v| (v.id.store(), v)).collect();
    let receipts = Receipts::read(ledger, &config.limits).await?;
    let line = |s: &StoreRow| store_line(config, s, relays.get(&s.seen.id).copied(), &receipts, &heads);
    let lines: Vec<StoreLine> = stores.iter().map(line).collect();
    let mut late: BTreeMap<&Instance, usize> = BTreeMap::new();
    for instance in lines.iter().flat_map(|s| &s.behind) {
        *late.entry(instance).or_default() += 1;
    }
    let stream = |(i, h): (&Instance, &Head)| {
        let behind = late.get(i).copied().unwrap_or(0);
        let line = StreamLine {
            version: h.version,
            schema: h.schema,
            digests: h.digests.clone(),
            state: if behind == 0 { "ok" } else { "behind" },
            signed_at: h.signed_at,
            packs: h.packs.len(),
            stores_behind: behind,
        };
        (i.clone(), line)
    };
    let unfinished = ledger.publications(State::Signed).await?;
    let trust = newest_trust(ledger, &config.limits).await.ok().flatten();
    let unfinished: Vec<String> = unfinished.iter().map(|p| format!("{} {}", p.instance, p.version)).collect();
    let findings = assessment.findings.values().map(|f| format!("{}: {}", f.subject, f.lines.join("; ")));
    let lost = lost(config, &heads)
        .into_iter()
        .map(|s| format!("stream {s} is not in the settings; manifests go on listing what was published of it"));
    Ok(Report {
        streams: heads.iter().map(stream).collect(),
        serial: lines.iter().map(|s| s.serial).max().filter(|s| *s > 0),
        network: Network::Online,
        debts: unfinished.iter().map(|u| format!("{u} is signed and not finished: the next publish is to")).collect(),
        stores: lines,
        devices: views.iter().map(device_line).collect(),
        errors: findings.chain(lost).collect(),
        episodes: ledger
            .open_episodes("")
            .await?
            .into_iter()
            .map(|e| EpisodeLine { key: e.key, text: e.text, opened_at: e.opened_at })
            .collect(),
        outbox: ledger
            .unsent_mails()
            .await?
            .into_iter()
            .map(|m| MailLine { id: m.id, subject: m.subject, attempts: m.attempts, last_error: m.last_error })
            .collect(),
        unfinished,
        trust: trust.map(|t| (t.version, t.epoch)),
    })
}

fn store_line(
    config: &Config,
    s: &StoreRow,
    relay: Option<&DeviceView<'_>>,
    receipts: &Receipts,
    heads: &BTreeMap<Instance, Head>,
) -> StoreLine {
    let all = relay.and_then(|r| receipts.held(r)).unwrap_or_default();
    StoreLine {
        id: s.seen.id.clone(),
        zone: s.seen.zone.as_ref().map(ToString::to_string),
        region: s.seen.region.clone(),
        serial: s.serial,
        put: s.put_serial >= s.serial,
        expires_at: s.expires_at,
        vanished_at: s.vanished_at,
        // Without a relay nobody says what the store has.
        behind: if relay.is_some() { behind(&config.streams, heads, &s.seen, &all) } else { Vec::new() },
        by_stick: relay.and_then(|r| receipts.newest_word(r)).map(|r| r.time),
    }
}

/// Whether whoever holds these does not have the newest version of an instance.
pub fn is_behind(heads: &BTreeMap<Instance, Head>, held: &BTreeMap<&Instance, Option<Version>>, i: &Instance) -> bool {
    let held = held.get(i).copied().flatten();
    heads.get(i).is_some_and(|h| held.is_none_or(|v| v < h.version))
}

/// The instances that a store follows of which that is so.
pub fn behind(
    streams: &[StreamConfig],
    heads: &BTreeMap<Instance, Head>,
    store: &StoreSeen,
    held: &BTreeMap<&Instance, Option<Version>>,
) -> Vec<Instance> {
    let follows = streams.iter().filter_map(|c| followed(&c.name, c.audience, store));
    follows.filter(|i| is_behind(heads, held, i)).collect()
}

fn device_line(v: &DeviceView<'_>) -> DeviceLine {
    let beat = v.beat.as_deref();
    DeviceLine {
        id: v.id.clone(),
        heard_s: v.silent_for.as_ref().map(Duration::as_secs),
        program: beat.map(|b| b.program.clone()),
        serial: beat.and_then(|b| b.serial),
        streams: beat
            .map(|b| b.streams.iter().map(|(i, r)| (i.clone(), (r.version, r.state))).collect())
            .unwrap_or_default(),
        errors: beat.map(|b| b.errors.clone()).unwrap_or_default(),
        clock_skew_s: beat.and_then(|b| b.clock_skew_s),
    }
}

/// Stores and devices listed for people; JSON has them all.
const LISTED: usize = 50;

fn store_text(s: &StoreLine) -> String {
    let of: Vec<String> = s.behind.iter().map(ToString::to_string).collect();
    let state = if of.is_empty() { "up to date".to_owned() } else { format!("behind in {}", of.join(", ")) };
    let by_stick = s.by_stick.map_or_else(String::new, |t| format!(" (by stick, {t})"));
    format!("store {}: {state}{by_stick}", s.id)
}

impl Report {
    /// The report for people.
    pub fn lines(&self) -> Vec<String> {
        let mut out = Vec::new();
        if self.trust.is_none() {
            out.push("not initialised: run `hq-publisher init`".to_owned());
        }
        for (i, s) in &self.streams {
            let behind =
                if s.stores_behind == 0 { String::new() } else { format!(", {} stores behind", s.stores_behind) };
            out.push(format!("{i}: version {} ({} packs listed{behind})", s.version, s.packs));
        }
        let vanished: Vec<&StoreId> = self.stores.iter().filter(|s| s.vanished_at.is_some()).map(|s| &s.id).collect();
        let heard = self.devices.iter().filter(|d| d.heard_s.is_some()).count();
        out.push(format!(
            "{} stores ({} no longer in the list), {} devices enrolled, {heard} of them heard",
            self.stores.len(),
            vanished.len(),
            self.devices.len()
        ));
        let alive: BTreeSet<&StoreId> = self.devices.iter().map(|d| d.id.store()).collect();
        let gone: Vec<&StoreId> = vanished.into_iter().filter(|id| alive.contains(id)).collect();
        if !gone.is_empty() {
            out.push(format!("no longer in the list, and devices are enrolled there: {}", some(gone, ", ")));
        }
        // Those that are behind first: of a chain on sticks the others are many.
        for is_behind in [true, false] {
            let of_it = |s: &&StoreLine| s.behind.is_empty() != is_behind && (is_behind || s.by_stick.is_some());
            out.extend(self.stores.iter().filter(of_it).take(LISTED).map(store_text));
            let more = self.stores.iter().filter(of_it).count().saturating_sub(LISTED);
            if more > 0 {
                out.push(format!(
                    "… and {more} more stores {}",
                    if is_behind { "behind" } else { "up to date by stick" }
                ));
            }
        }
        out.extend(self.devices.iter().filter(|d| !d.errors.is_empty()).take(LISTED).map(|d| {
            let of: Vec<String> = d.errors.iter().map(|e| format!("{}: {}", e.code, e.text)).collect();
            let heard =
                d.heard_s.map_or_else(String::new, |s| format!(" (heard {} ago)", long(Duration::from_secs(s))));
            format!("{}{heard}: {}", d.id, of.join("; "))
        }));
        out.extend(self.errors.iter().map(|e| format!("wrong: {e}")));
        // What a publish found (a refusal, a mirror that lags) and what cannot be judged now is told by its episode alone.
        let is_told = |e: &&EpisodeLine| self.errors.iter().any(|told| told.starts_with(&e.text));
        let untold = self.episodes.iter().filter(|e| !is_told(e)).take(LISTED);
        out.extend(untold.map(|e| format!("wrong since {}: {}", e.opened_at, e.text)));
        out.extend(self.unfinished.iter().map(|u| format!("unfinished: {u}; the next publish goes on with it")));
        if !self.outbox.is_empty() {
            let last = self.outbox.iter().rev().find_map(|m| m.last_error.as_deref()).unwrap_or("not tried yet");
            out.push(format!("{} mails waiting ({last})", self.outbox.len()));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Report {
        Report {
            streams: BTreeMap::new(),
            stores: Vec::new(),
            devices: Vec::new(),
            errors: Vec::new(),
            episodes: Vec::new(),
            outbox: Vec::new(),
            unfinished: Vec::new(),
            serial: None,
            network: Network::Online,
            debts: Vec::new(),
            trust: Some((1, 1)),
        }
    }

    #[test]
    fn a_refused_publish_is_told_and_nothing_twice() {
        let episode = |key: &str, text: &str| EpisodeLine {
            key: key.to_owned(),
            text: text.to_owned(),
            opened_at: Timestamp::UNIX_EPOCH,
        };
        let report = Report {
            errors: vec!["Store 1 is silent: for 5 min".to_owned()],
            episodes: vec![
                episode("publish/refused/price@all/SHRINK", "Publishing price@all was refused (SHRINK)"),
                episode("silent/1", "Store 1 is silent"),
            ],
            ..nothing()
        };
        let wrong: Vec<String> = report.lines().into_iter().filter(|l| l.starts_with("wrong")).collect();
        let refused = "wrong since 1970-01-01T00:00:00Z: Publishing price@all was refused (SHRINK)";
        assert_eq!(wrong, ["wrong: Store 1 is silent: for 5 min", refused]);
    }
    /// A chain on sticks has hundreds that are up to date.
    #[test]
    fn stores_that_are_behind_come_before_those_that_a_stick_brought_up_to_date() {
        let store = |n: usize, behind: bool| StoreLine {
            id: format!("{n:04}").parse().unwrap(),
            zone: None,
            region: None,
            serial: 1,
            put: true,
            expires_at: None,
            vanished_at: None,
            behind: if behind { vec!["price@all".parse().unwrap()] } else { Vec::new() },
            by_stick: Some(Timestamp::UNIX_EPOCH),
        };
        let stores = (0..60).map(|n| store(n, false)).chain((60..112).map(|n| store(n, true))).collect();
        let told: Vec<String> = Report { stores, ..nothing() }.lines().into_iter().skip(1).collect();
        assert_eq!(told[0], "store 0060: behind in price@all (by stick, 1970-01-01T00:00:00Z)");
        assert_eq!(told[LISTED], "… and 2 more stores behind");
        assert_eq!(told[LISTED + 1], "store 0000: up to date (by stick, 1970-01-01T00:00:00Z)");
        assert_eq!(told[2 * LISTED + 1..], ["… and 10 more stores up to date by stick"]);
    }
}

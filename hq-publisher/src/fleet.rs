//! How the fleet stands: pure. What devices reported and HQ knows goes in, findings with reasons come
//! out. Asks no clock, no database; who mails what is [`crate::alert`]'s.

use crate::config::AlertsConfig;
use crate::hours::Open;
use crate::ledger::{Complaint, LIST_NOT_OURS, Serials, VERSION_NOT_OURS, WITNESSES};
use crate::mail::one_line;
use proto::clock::{Timestamp, since};
use proto::digest::StateDigest;
use proto::ids::{Audience, DeviceId, Instance, RegisterId, StoreId, TableName, Version};
use proto::wire::{Disk, Fault, Heartbeat, StreamReport, StreamState, fault};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// The state digests of one version.
pub type Digests = BTreeMap<TableName, StateDigest>;

/// The instances that are published, each with the digests of versions that devices hold; none of a version that the
/// ledger does not know.
pub type Published = BTreeMap<Instance, BTreeMap<Version, Option<Digests>>>;

/// A device as HQ sees it now.
#[derive(Debug, Clone)]
pub struct DeviceView<'a> {
    /// Who.
    pub id: &'a DeviceId,
    /// How long ago it was last heard, by HQ or its relay; none: never.
    pub silent_for: Option<Duration>,
    /// How long HQ could have heard it: since `serve` started or could hear again, or since its store came back; of a register
    /// also while it was silent before, if its store was away for less than an hour.
    pub watched_for: Duration,
    /// Heard once since it was silent: one word of a line that comes and goes ends nothing.
    pub is_just_back: bool,
    /// How long it has held an older list than it could have (its store's; a register: its relay's) without coming nearer;
    /// none: it has not.
    pub stuck_for: Option<Duration>,
    /// How long a stream has not come to what its list says, nor nearer; none: all do.
    pub late_for: Option<Duration>,
    /// Whether two machines report as this device.
    pub is_double: bool,
    /// What it last reported.
    pub beat: Option<Arc<Heartbeat>>,
}

/// A pack may be on its way over a thin line for longer than a list.
const LATE: u32 = 4;

impl DeviceView<'_> {
    /// How long it has been heard and got nothing of something that is published, and whether that is too long.
    fn gets_nothing(&self, alerts: &AlertsConfig) -> Option<(Duration, bool)> {
        let limits = [(self.stuck_for, alerts.stuck.0), (self.late_for, alerts.stuck.0.saturating_mul(LATE))];
        let waits = limits.into_iter().filter_map(|(since, limit)| Some((since?, since? >= limit)));
        waits.max_by_key(|(since, is_long)| (*is_long, *since))
    }
}

/// What [`assess`] looks at.
#[derive(Debug, Clone)]
pub struct Fleet<'a> {
    /// The devices that are enrolled and not revoked; those of which there is nothing to tell may be left out.
    pub devices: &'a [DeviceView<'a>],
    /// What they told and the fleet was not judged on yet, though they may tell of it no more: a register heals within
    /// the second.
    pub complaints: &'a [Complaint],
    /// The instances that are published, with the digests of versions that devices hold: of others nobody is believed.
    pub published: &'a Published,
    /// The serials of each store; read after the devices.
    pub serials: &'a BTreeMap<StoreId, Serials>,
    /// Stores whose manifest expires, and when.
    pub expiring: &'a [(StoreId, Timestamp)],
    /// The disk that headquarters' own state lies on.
    pub own_disk: Option<Disk>,
    /// For how long heartbeats have come that could not be kept; none: not known yet, nobody sent one.
    pub deaf_for: Option<Duration>,
    /// Thresholds.
    pub alerts: &'a AlertsConfig,
    /// Now, for texts, expiry and opening hours: silence is measured by durations.
    pub now: Timestamp,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What and where; the key of its episode.
    pub key: String,
    /// One line: what is wrong.
    pub subject: String,
    /// The reasons, a line each.
    pub lines: Vec<String>,
    /// Stores that it is told of.
    pub stores: usize,
}

/// All findings, by key; and what cannot be judged yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assessment {
    /// What is wrong.
    pub findings: BTreeMap<String, Finding>,
    /// Keys that are neither wrong nor right: HQ has not listened for long enough, the store above is
    /// silent, or the device was enrolled (anew) and not heard since. An open episode of these stays open.
    pub undecided: BTreeSet<String>,
    /// Stores that are silent as far as is known, or were not heard yet: whether their registers are too cannot be judged.
    /// (Not a key each: a carrier's outage has a hundred thousand.)
    pub silent: BTreeSet<StoreId>,
}

/// Devices listed in one finding; all are counted.
const LISTED: usize = 20;

/// Faults taken of one heartbeat: several of each stream that a store has.
const FAULTS: usize = 64;

/// What a device tells: the key of the episode, its subject, and the device's line in it.
type Told = (String, String, String);

/// What devices tell of one thing.
struct Report<'a> {
    subject: String,
    lines: Vec<String>,
    stores: Vec<&'a StoreId>,
}

/// Judges the fleet.
pub fn assess(fleet: &Fleet<'_>) -> Assessment {
    let mut a = Assessment::default();
    let mut reports: BTreeMap<String, Report> = BTreeMap::new();
    let open = Open::before(fleet.now, &fleet.alerts.register_hours, &fleet.alerts.time_zone);
    let silent = silent_stores(fleet, &mut a);
    let stuck = stuck_stores(fleet, &silent, &mut a);
    let mut complaints: BTreeMap<&DeviceId, Vec<&Fault>> = BTreeMap::new();
    for c in fleet.complaints {
        complaints.entry(&c.device).or_default().push(&c.fault);
    }
    // Devices of a store stand together: what is known of it is looked up once.
    for of_store in fleet.devices.chunk_by(|a, b| a.id.store() == b.id.store()) {
        let store = of_store[0].id.store();
        let is_silent = silent.contains(store);
        let has_reason = is_silent || stuck.contains(store);
        let signed = fleet.serials.get(store).map(|s| s.signed);
        let mut tell = |(key, subject, line): Told| {
            let report =
                reports.entry(key).or_insert_with(|| Report { subject, lines: Vec::new(), stores: Vec::new() });
            report.lines.push(line);
            if report.stores.last() != Some(&store) {
                report.stores.push(store);
            }
        };
        for d in of_store {
            if matches!(d.id, DeviceId::Register(_)) {
                register_silence(fleet, d, &open, is_silent, &mut a);
                stuck_register(fleet, d, has_reason, &mut a);
            }
            if d.is_double {
                let (key, subject) = double(d.id);
                tell((key, subject, DOUBLE.to_owned()));
            }
            let errors = d.beat.as_ref().map_or(&[][..], |b| &b.errors);
            let tells = |c: &&&Fault| errors.iter().any(|f| (&f.code, &f.instance) == (&c.code, &c.instance));
            let before = complaints.get(d.id).into_iter().flatten();
            let before = before.filter(|c| !tells(c) && c.instance.as_ref().is_none_or(|i| may_follow(store, i)));
            before.filter_map(|f| told_fault(d.id, f)).for_each(&mut tell);
            let Some(beat) = &d.beat else { continue };
            if let Some(disk) = &beat.disk {
                let is_full = errors.iter().any(|f| f.code == fault::DISK_FULL);
                low_disk(fleet, d.id.as_str(), disk, is_full, &mut a);
            }
            not_ours(signed, d.id, beat).into_iter().chain(told(d.id, beat, fleet.published)).for_each(&mut tell);
        }
    }
    if let Some(disk) = &fleet.own_disk {
        low_disk(fleet, "headquarters", disk, false, &mut a);
    }
    deaf(fleet, &mut a);
    for (key, Report { subject, lines, stores }) in reports {
        a.add_of(key, subject, lines, stores.len());
    }
    expiring(fleet, &mut a);
    a.silent = silent;
    a
}

fn deaf(fleet: &Fleet<'_>, a: &mut Assessment) {
    let key = "headquarters-deaf".to_owned();
    let Some(deaf_for) = fleet.deaf_for else {
        a.undecided.insert(key);
        return;
    };
    if deaf_for >= fleet.alerts.store_silent.0 {
        let line = format!("for {}: who is silent is not judged meanwhile; see the log of `serve`", long(deaf_for));
        a.add(key, "Headquarters can keep no heartbeats".into(), vec![line]);
    } else if !deaf_for.is_zero() {
        a.undecided.insert(key);
    }
}

/// Before the id and the time, in the key of a damaged database's episode.
pub const DATABASE: &str = "database/";
/// Before the id, in the key of a silent register's episode.
const REGISTER_SILENT: &str = "register-silent/";

impl Assessment {
    /// Whether an episode that is open stays so, though it was not found again.
    pub fn is_undecided(&self, key: &str) -> bool {
        let register = || key.strip_prefix(REGISTER_SILENT)?.parse::<RegisterId>().ok();
        self.undecided.contains(key) || register().is_some_and(|r| self.silent.contains(r.store()))
    }

    fn add(&mut self, key: String, subject: String, lines: Vec<String>) {
        self.add_of(key, subject, lines, 1);
    }

    fn add_of(&mut self, key: String, subject: String, mut lines: Vec<String>, stores: usize) {
        if lines.len() > LISTED {
            let more = lines.len() - LISTED;
            lines.truncate(LISTED);
            lines.push(format!("… and {more} more"));
        }
        self.findings.insert(key.clone(), Finding { key, subject, lines, stores });
    }
}

/// `5 min`, `2 h`, for people.
pub fn long(d: Duration) -> String {
    match d.as_secs() {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// Stores of whose relay nothing was heard: certain ones become findings; all that are silent as far
/// as is known suppress their registers.
fn silent_stores(fleet: &Fleet<'_>, a: &mut Assessment) -> BTreeSet<StoreId> {
    let limit = fleet.alerts.store_silent.0;
    let mut silent = BTreeSet::new();
    for d in fleet.devices {
        let DeviceId::Relay(store) = d.id else { continue };
        let key = format!("store-silent/{store}");
        // One that was never heard waits for its installation, or for another one.
        let Some(silent_for) = d.silent_for else {
            silent.insert(store.clone());
            a.undecided.insert(key);
            continue;
        };
        if silent_for < limit {
            if d.is_just_back {
                a.undecided.insert(key);
            }
            continue;
        }
        silent.insert(store.clone());
        if d.watched_for < limit {
            a.undecided.insert(key);
            continue;
        }
        let reason = format!("nothing was heard of the relay of store {store} for {}", long(silent_for));
        a.add(key, format!("Store {store} is silent"), vec![reason]);
    }
    silent
}

fn register_silence(fleet: &Fleet<'_>, d: &DeviceView, open: &Open, store_is_silent: bool, a: &mut Assessment) {
    let limit = fleet.alerts.register_silent.0;
    if store_is_silent || d.silent_for.is_some_and(|s| open.part_of(s) < limit) {
        return;
    }
    let key = format!("{REGISTER_SILENT}{}", d.id);
    // One that was never heard waits for its installation, or for another one.
    let Some(silent_for) = d.silent_for.filter(|_| d.watched_for >= limit) else {
        a.undecided.insert(key);
        return;
    };
    let reason = format!("nothing was heard of register {} for {}; its store's relay is heard", d.id, long(silent_for));
    a.add(key, format!("Register {} is silent", d.id), vec![reason]);
}

/// Stores whose relay is heard and takes nothing: a bucket that was emptied or hijacked, a frozen pointer, a list that it
/// refuses. Once it is certain they speak for their registers; after each publish a relay is behind for a moment.
fn stuck_stores(fleet: &Fleet<'_>, silent: &BTreeSet<StoreId>, a: &mut Assessment) -> BTreeSet<StoreId> {
    let mut stuck = BTreeSet::new();
    for d in fleet.devices {
        let (DeviceId::Relay(store), Some((stuck_for, is_long))) = (d.id, d.gets_nothing(fleet.alerts)) else {
            continue;
        };
        let key = format!("store-stuck/{store}");
        if silent.contains(store) || !is_long {
            a.undecided.insert(key);
        } else {
            stuck.insert(store.clone());
            a.add(key, format!("Store {store} does not get what is published"), stuck_lines(d, stuck_for));
        }
    }
    stuck
}

fn stuck_register(fleet: &Fleet<'_>, d: &DeviceView, store_has_reason: bool, a: &mut Assessment) {
    let Some((stuck_for, is_long)) = d.gets_nothing(fleet.alerts) else { return };
    let key = format!("register-stuck/{}", d.id);
    let is_silent = d.silent_for.is_none_or(|s| s >= fleet.alerts.register_silent.0);
    if store_has_reason || is_silent || !is_long {
        a.undecided.insert(key);
    } else {
        a.add(key, format!("Register {} does not get what is published", d.id), stuck_lines(d, stuck_for));
    }
}

/// A disk that will be full one day. A little room more ends nothing: it would begin anew tomorrow. One that is full is
/// told of as such.
fn low_disk(fleet: &Fleet<'_>, whose: &str, disk: &Disk, is_full: bool, a: &mut Assessment) {
    let low = fleet.alerts.disk_low_percent;
    if low == 0 || !is_below(disk, low + DISK_BAND) {
        return;
    }
    let key = format!("disk-low/{whose}");
    if is_full || !is_below(disk, low) {
        a.undecided.insert(key);
        return;
    }
    let mib = |bytes: u64| bytes >> 20;
    let line = format!(
        "{whose}: {} MiB of {} MiB are free, less than {low}% (alerts.disk_low_percent); what needs room waits when it is full",
        mib(disk.free),
        mib(disk.total)
    );
    a.add(key, format!("The disk of {whose} is nearly full"), vec![line]);
}

/// Whether a disk has less room than is asked for.
pub fn is_low(disk: &Disk, alerts: &AlertsConfig) -> bool {
    is_below(disk, alerts.disk_low_percent)
}

fn is_below(disk: &Disk, percent: u64) -> bool {
    u128::from(disk.free) * 100 < u128::from(disk.total) * u128::from(percent)
}

/// Per cent beyond the threshold from which a disk has room again.
const DISK_BAND: u64 = 3;

/// The episode of a device that is there twice: its relay and headquarters may both notice.
fn double(id: &DeviceId) -> (String, String) {
    (format!("identity-clone/{id}"), format!("Two machines report as {id}"))
}

const DOUBLE: &str = "its key is on two machines that are both switched on: a copied disk, or a stolen one; \
    `hq-publisher revoke` it, then enroll it anew";

/// Lines of what a device waits for, in a mail.
const WAITS: usize = 5;

/// Whether a fault is mailed itself, and says why a stream does not come.
pub fn is_mailed_as_such(code: &str) -> bool {
    is_of_pack(code) || [fault::DISK_FULL, fault::HALTED].contains(&code)
}

/// Whether a fault is about one pack.
pub fn is_of_pack(code: &str) -> bool {
    [fault::PACK_IN_ERROR, fault::PACK_MISSING].contains(&code)
}

/// What is known of the reason: how long, and what the device itself says of its sources.
fn stuck_lines(d: &DeviceView, stuck_for: Duration) -> Vec<String> {
    let beat = d.beat.as_deref();
    let held = beat.and_then(|b| b.serial).map_or_else(|| "no list".to_owned(), |n| format!("list {n}"));
    let first = if d.stuck_for.is_some() {
        format!("{} is heard, but holds {held}, which is not the newest, for {}", d.id, long(stuck_for))
    } else {
        format!("{} is heard and has {held}, but does not come to what it lists for {}", d.id, long(stuck_for))
    };
    let first = std::iter::once(first);
    let waits = beat.into_iter().flat_map(|b| &b.debts).take(WAITS).map(|w| format!("{}: {}", d.id, one_line(w, 1000)));
    let reasons =
        beat.into_iter().flat_map(|b| &b.errors).filter(|f| matches!(f.code.as_str(), fault::REFUSED | fault::SOURCE));
    first.chain(waits).chain(reasons.map(|f| fault_line(d.id, f))).collect()
}

/// A list that a device accepted and headquarters never signed: a publisher's key is in wrong hands.
fn not_ours(signed: Option<u64>, id: &DeviceId, beat: &Heartbeat) -> Option<Told> {
    let held = beat.serial?;
    let signed = signed.filter(|signed| (1..held).contains(signed))?;
    let line = format!(
        "{id} holds list {held}, the newest that was signed here is {signed}: somebody else has a publisher's key (`trust \
         revoke KEY --new-epoch`), or headquarters was set back to an old state (`publish` goes on above it)"
    );
    let (key, subject) = of_foreign_list(id.store());
    Some((key, subject, line))
}

fn of_foreign_list(store: &StoreId) -> (String, String) {
    (format!("list-not-ours/{store}"), format!("Store {store} holds a list that headquarters did not sign"))
}

/// A version that a device holds and headquarters never published.
fn not_published(id: &DeviceId, instance: &Instance, report: &StreamReport, published: &Published) -> Option<Told> {
    let (held, of) = (report.version?, published.get(instance)?);
    let newest = of.iter().rev().find(|(_, digests)| digests.is_some()).map(|(v, _)| *v)?;
    let is_beyond = held > newest && of.get(&held).is_some_and(Option::is_none);
    let line = || {
        format!(
            "{id} holds version {held}, the newest that was published here is {newest}: headquarters and its bucket were set \
             back to an old state (`publish` goes on above it once {WITNESSES} devices hold it), or what this device notes was \
             altered (move its store.db away: it is made anew)"
        )
    };
    is_beyond.then(|| {
        let (key, subject) = of_foreign_version(&instance.to_string());
        (key, subject, line())
    })
}

fn of_foreign_version(instance: &str) -> (String, String) {
    (format!("version-not-ours/{instance}"), format!("A version of {instance} is held that was not published"))
}

/// Whether a store may follow an instance. (Not by its zone today: it may have been another when the pack came.)
fn may_follow(store: &StoreId, instance: &Instance) -> bool {
    !matches!(&instance.audience, Audience::Store(s) if s != store)
}

/// What a heartbeat tells of faults. Of instances that are published, and that its store may follow: what a device makes
/// up would fill mails and ledger.
fn told<'a>(id: &'a DeviceId, beat: &'a Heartbeat, published: &'a Published) -> impl Iterator<Item = Told> {
    let is_known = move |i: &Instance| published.contains_key(i) && may_follow(id.store(), i);
    let believed = beat.errors.iter().filter(move |f| f.instance.as_ref().is_none_or(is_known)).take(FAULTS);
    let faults = believed.filter_map(move |f| told_fault(id, f));
    let followed = beat.streams.iter().filter(move |(i, _)| is_known(i));
    let drifts = followed.filter_map(move |(instance, report)| {
        if let Some(told) = not_published(id, instance, report, published) {
            return Some(told);
        }
        let differs = compare(report, instance, published) == Some(false);
        if report.state != StreamState::Drift && !differs {
            return None;
        }
        let version = report.version.map_or_else(|| "no version".to_owned(), |v| format!("version {v}"));
        let why =
            if report.state == StreamState::Drift { "says that its rows drifted" } else { "reports other digests" };
        let line = format!("{id} {why} at {version}; a full pack will heal it");
        Some((
            format!("digest-mismatch/{instance}"),
            format!("Rows of {instance} differ from what was published"),
            line,
        ))
    });
    faults.chain(drifts)
}

/// Whether a stream's digests are those that were published of its version; none where one of them is not known.
fn compare(report: &StreamReport, instance: &Instance, published: &Published) -> Option<bool> {
    let known = published.get(instance)?.get(&report.version?)?.as_ref()?;
    if report.digests.is_empty() { None } else { Some(known == &report.digests) }
}

/// The devices of whose last heartbeat there is nothing to tell, with its number; nor will there be, as long as it is the
/// last: versions do not change, and of a list of ours there is no doubt any more.
pub fn calm<'a>(fleet: &'a Fleet<'a>) -> impl Iterator<Item = (&'a DeviceId, u64)> {
    let as_published = |(instance, report): (&Instance, &StreamReport)| {
        report.state != StreamState::Drift && compare(report, instance, fleet.published) == Some(true)
    };
    let is_calm = move |id: &DeviceId, beat: &Heartbeat| {
        let signed = fleet.serials.get(id.store()).map_or(0, |s| s.signed);
        beat.errors.is_empty()
            && beat.serial.unwrap_or(0) <= signed
            && beat.disk.is_none_or(|disk| !is_below(&disk, fleet.alerts.disk_low_percent + DISK_BAND))
            && beat.streams.iter().all(as_published)
    };
    fleet.devices.iter().filter_map(move |d| {
        let beat = d.beat.as_ref().filter(|beat| is_calm(d.id, beat))?;
        Some((d.id, beat.seq))
    })
}

fn told_fault(id: &DeviceId, f: &Fault) -> Option<Told> {
    let of = f.instance.as_ref().map_or_else(|| id.to_string(), ToString::to_string);
    let line = fault_line(id, f);
    match f.code.as_str() {
        fault::PACK_IN_ERROR => Some((format!("pack-in-error/{of}"), format!("A pack of {of} is in error"), line)),
        fault::PACK_MISSING => {
            Some((format!("pack-missing/{of}"), format!("A pack of {of} is missing from the bucket"), line))
        }
        // Its list is the newest, so that it does not count as stuck.
        fault::STREAM_REFUSED => {
            Some((format!("stream-refused/{of}"), format!("What is listed of {of} is refused"), line))
        }
        fault::DISK_FULL => Some((format!("disk-full/{id}"), format!("The disk of {id} is full"), line)),
        fault::HALTED => Some((format!("halted/{id}"), format!("{id} stopped: its disk or database is unsound"), line)),
        fault::POWER_UNSTABLE => {
            Some((format!("power-unstable/{id}"), format!("The power of {id} fails again and again"), line))
        }
        fault::CRASH_LOOP => {
            Some((format!("crash-loop/{id}"), format!("The program of {id} dies again and again"), line))
        }
        fault::LOG_STUCK => {
            Some((format!("log-stuck/{id}"), format!("The database log of {id} cannot be brought home"), line))
        }
        // The next publish went above it before it was judged.
        LIST_NOT_OURS => {
            let (key, subject) = of_foreign_list(id.store());
            Some((key, subject, line))
        }
        VERSION_NOT_OURS => {
            let (key, subject) = of_foreign_version(&of);
            Some((key, subject, line))
        }
        fault::IDENTITY_CLONE => {
            // Of its own registers a relay may say so.
            let of =
                f.object.as_deref().and_then(|o| o.parse::<DeviceId>().ok()).filter(|o| o.store() == id.store())?;
            let (key, subject) = double(&of);
            Some((key, subject, line))
        }
        // Each time is one of its own: who has the old file open is to be restarted again.
        fault::DRIFT if f.instance.is_none() && f.object.is_some() => {
            let subject = format!("The database of {id} was damaged, deleted or replaced");
            Some((format!("{DATABASE}{id}/{}", f.since), subject, line))
        }
        // Also one that was healed before the heartbeat: the stream's state does not show it any more.
        fault::DRIFT => {
            Some((format!("digest-mismatch/{of}"), format!("Rows of {of} differ from what was published"), line))
        }
        // Refusals and sources are on the pages, and in the mail on who gets nothing for them.
        _ => None,
    }
}

/// A fault in a device's own words, each of them a line and not a page. PostgreSQL keeps no NUL, and nothing that is
/// written together with one.
pub fn in_lines(f: &Fault) -> Fault {
    let object = f.object.as_deref().map(|o| one_line(o, 200));
    Fault { code: one_line(&f.code, 40), object, text: one_line(&f.text, 1000), ..f.clone() }
}

fn fault_line(id: &DeviceId, f: &Fault) -> String {
    let f = in_lines(f);
    let object = f.object.map(|o| format!(" ({o})")).unwrap_or_default();
    format!("{id}, since {}: {}{object}", f.since, f.text)
}

fn expiring(fleet: &Fleet<'_>, a: &mut Assessment) {
    let lines: Vec<String> = fleet
        .expiring
        .iter()
        .map(|(store, at)| {
            let left = since(*at, fleet.now);
            if left.is_zero() {
                format!("store {store}: expired at {at}")
            } else {
                format!("store {store}: in {}, at {at}", long(left))
            }
        })
        .collect();
    if !lines.is_empty() {
        let (subject, stores) = ("Manifests expire and were not signed anew".to_owned(), lines.len());
        a.add_of("manifest-expires".into(), subject, lines, stores);
    }
}

#[cfg(test)]
mod tests;

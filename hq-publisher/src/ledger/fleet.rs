//! Devices, what they last reported, and receipts.

use super::db::{Columns, Write, parse, seconds, signed};
use super::{Ledger, LedgerError, Which};
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::keys::PublicKey;
use proto::wire::Fault;
use sqlx::AssertSqlSafe;
use sqlx::any::AnyRow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// An enrolled device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRow {
    /// Who.
    pub id: DeviceId,
    /// Its key.
    pub key: PublicKey,
    /// When its code was made.
    pub enrolled_at: Timestamp,
    /// When it was revoked; none while it is trusted.
    pub revoked_at: Option<Timestamp>,
}

/// A number that rises when a device is enrolled or revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Enrolments(pub i64);

/// The devices of a store, and when they were these.
#[derive(Debug, Clone)]
pub struct StoreDevices {
    /// All, revoked ones too.
    pub devices: Arc<[DeviceRow]>,
    /// The ledger's number then.
    pub at: Enrolments,
}

/// The last heartbeat of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatRow {
    /// Who.
    pub device: DeviceId,
    /// Its number.
    pub seq: u64,
    /// The signed envelope.
    pub envelope: String,
    /// When HQ received it.
    pub received_at: Timestamp,
    /// When the device was last heard, by HQ or by its relay.
    pub last_seen_at: Timestamp,
    /// The serial that the device holds, if it is to be counted with; not read back.
    pub serial: Option<u64>,
    /// Its faults that a later beat may tell of no more, though nobody has acted on them; not read back.
    pub complaints: Vec<Fault>,
    /// The versions that it reports, but for those that are known to be published; not read back.
    pub versions: Vec<(Instance, Version)>,
    /// When its device had the key that it was proved by, if it is to be asked whether it has it still; not read back.
    pub proved_at: Option<Enrolments>,
}

/// A fault that a device told of at least once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Who.
    pub device: DeviceId,
    /// What, since when.
    pub fault: Fault,
}

/// What became of a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeatOutcome {
    /// Newer than the last one: stored.
    Recorded,
    /// The last one again.
    Known,
    /// Older than the last one, whose number this is; or another one with its number.
    Older(u64),
    /// Proved before a device was enrolled or revoked, which may be its own: not stored.
    Outdated,
}

/// A receipt of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptRow {
    /// Whose.
    pub store: StoreId,
    /// When the relay wrote it.
    pub time: Timestamp,
    /// When it was read back here.
    pub recorded_at: Timestamp,
    /// The signed envelope.
    pub envelope: String,
}

/// Headquarters' own code for a device whose list was not signed here.
pub const LIST_NOT_OURS: &str = "LIST_NOT_OURS";

/// Headquarters' own code for a version that was not published here; the object is the version.
pub const VERSION_NOT_OURS: &str = "VERSION_NOT_OURS";

/// Devices that must hold a version for it to count as one that was out: one may be broken, or in wrong hands.
pub const WITNESSES: usize = 2;

/// Heartbeats that one statement puts, five values each, or names that it asks for.
const IN_A_STATEMENT: usize = 64;

/// How far above the ledger's serial, or version, a heartbeat's may be believed: beyond it, it is no loss of the
/// ledger but a broken or taken-over device.
pub const SERIAL_REACH: u64 = 1_000_000;

/// The fact that holds for how many seconds `serve` has watched since a publish went through.
const WATCHED: &str = "watched";

/// The fact that holds the latest time this ledger was used at.
pub(super) const TIME: &str = "time";

fn device(row: &AnyRow) -> Result<DeviceRow, LedgerError> {
    Ok(DeviceRow {
        id: row.parsed(0, "device id")?,
        key: row.parsed(1, "public key")?,
        enrolled_at: row.time(2)?,
        revoked_at: row.time_or_null(3)?,
    })
}

/// Since when a fault is comes with each heartbeat anew, reckoned from whole seconds of two clocks: what differs by no more is
/// the same one. A person is told once.
const SAME_S: i64 = 5;

/// Those that were judged too (1), or not (0).
const COMPLAINTS: &str = "SELECT device, instance, code, since_s, object, text FROM complaint WHERE judged <= $1 ORDER BY device, instance, code";

fn complaint(r: &AnyRow) -> Result<Complaint, LedgerError> {
    let instance = Some(r.text(1)?).filter(|i| !i.is_empty());
    let fault = Fault {
        code: r.text(2)?,
        instance: instance.map(|i| parse(&i, "instance")).transpose()?,
        object: r.text_or_null(4)?,
        text: r.text(5)?,
        since: r.time(3)?,
    };
    Ok(Complaint { device: r.parsed(0, "device id")?, fault })
}

fn instance_or_none(fault: &Fault) -> String {
    fault.instance.as_ref().map(ToString::to_string).unwrap_or_default()
}

impl Ledger {
    /// Stores a device's key, in place of an earlier one; its heartbeats are counted anew.
    pub async fn enrol(&self, id: &DeviceId, key: &PublicKey, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "INSERT INTO device (id, store, public_key, enrolled_s) VALUES ($1, $2, $3, $4) ON CONFLICT (id) \
             DO UPDATE SET public_key = excluded.public_key, enrolled_s = excluded.enrolled_s, revoked_s = NULL",
        )
        .bind(id.as_str())
        .bind(id.store().as_str())
        .bind(key.to_string())
        .bind(seconds(now))
        .execute(&mut **w)
        .await?;
        sqlx::query("DELETE FROM beat WHERE device = $1").bind(id.as_str()).execute(&mut **w).await?;
        w.count_enrolment(id).await?;
        w.commit().await
    }

    /// Revokes a device; false when there is none, or it is revoked.
    pub async fn revoke(&self, id: &DeviceId, now: Timestamp) -> Result<bool, LedgerError> {
        let mut w = self.write().await?;
        let done = sqlx::query("UPDATE device SET revoked_s = $1 WHERE id = $2 AND revoked_s IS NULL")
            .bind(seconds(now))
            .bind(id.as_str())
            .execute(&mut **w)
            .await?;
        w.count_enrolment(id).await?;
        w.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// All devices, revoked ones too.
    pub async fn devices(&self) -> Result<Vec<DeviceRow>, LedgerError> {
        let rows = sqlx::query("SELECT id, public_key, enrolled_s, revoked_s FROM device ORDER BY id")
            .fetch_all(self.pool())
            .await?;
        rows.iter().map(device).collect()
    }

    /// One device.
    pub async fn device(&self, id: &DeviceId) -> Result<Option<DeviceRow>, LedgerError> {
        let row = sqlx::query("SELECT id, public_key, enrolled_s, revoked_s FROM device WHERE id = $1")
            .bind(id.as_str())
            .fetch_optional(self.pool())
            .await?;
        row.as_ref().map(device).transpose()
    }

    /// The devices that are not revoked. Their keys are not read: checking a hundred thousand of them
    /// takes seconds.
    pub async fn enrolled(&self) -> Result<Arc<[DeviceId]>, LedgerError> {
        let state = vec![self.change().await?.0];
        if let Some(ids) = self.enrolled.as_of(&state) {
            return Ok(ids);
        }
        let rows =
            sqlx::query("SELECT id FROM device WHERE revoked_s IS NULL ORDER BY id").fetch_all(self.pool()).await?;
        let ids: Arc<[DeviceId]> = rows.iter().map(|r| r.parsed(0, "device id")).collect::<Result<_, _>>()?;
        Ok(self.enrolled.keep(state, ids))
    }

    /// The devices of one store.
    pub async fn devices_of(&self, store: &StoreId) -> Result<Vec<DeviceRow>, LedgerError> {
        Ok(self.store_devices(store).await?.map_or_else(Vec::new, |of| of.devices.to_vec()))
    }

    /// The devices of one store, and when they are these; none where it has none.
    pub async fn store_devices(&self, store: &StoreId) -> Result<Option<StoreDevices>, LedgerError> {
        let query = sqlx::query(
            "SELECT device.id, device.public_key, device.enrolled_s, device.revoked_s, change.devices FROM device, change \
             WHERE device.store = $1 ORDER BY device.id",
        );
        let rows = query.bind(store.as_str()).fetch_all(self.pool()).await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let devices = rows.iter().map(device).collect::<Result<_, _>>()?;
        Ok(Some(StoreDevices { devices, at: Enrolments(first.number(4)?) }))
    }

    /// The number of enrolments.
    pub async fn enrolments(&self) -> Result<Enrolments, LedgerError> {
        let row = sqlx::query("SELECT devices FROM change").fetch_one(self.pool()).await?;
        Ok(Enrolments(row.number(0)?))
    }

    /// The stores of which a device was enrolled or revoked after a time.
    pub async fn enrolled_after(&self, at: Enrolments) -> Result<Vec<StoreId>, LedgerError> {
        let query = sqlx::query("SELECT DISTINCT store FROM device WHERE changed > $1").bind(at.0);
        query.fetch_all(self.pool()).await?.iter().map(|r| r.parsed(0, "store id")).collect()
    }

    /// Records heartbeats in one transaction; an answer for each. Of a device that is there twice the order counts.
    pub async fn record_beats(&self, beats: &[BeatRow]) -> Result<Vec<BeatOutcome>, LedgerError> {
        let mut w = self.write().await?;
        let row = sqlx::query("SELECT devices FROM change").fetch_one(&mut **w).await?;
        let now = Enrolments(row.number(0)?);
        let counts = |b: &&BeatRow| b.proved_at.is_none_or(|at| at == now);
        let proved: Vec<&BeatRow> = beats.iter().filter(counts).collect();
        let mut outcomes = Vec::with_capacity(beats.len());
        let mut rest = proved.as_slice();
        while !rest.is_empty() {
            // PostgreSQL meets no row twice in one statement.
            let mut devices = BTreeSet::new();
            let some = rest.iter().take(IN_A_STATEMENT).take_while(|b| devices.insert(&b.device)).count();
            let (these, later) = rest.split_at(some);
            let recorded = w.put_beats(these).await?;
            for b in these {
                outcomes.push(if recorded.contains(b.device.as_str()) {
                    for c in &b.complaints {
                        w.complain(&b.device, c).await?;
                    }
                    BeatOutcome::Recorded
                } else {
                    let query = sqlx::query("SELECT seq, envelope FROM beat WHERE device = $1").bind(b.device.as_str());
                    let last = query.fetch_one(&mut **w).await?;
                    let (seq, envelope) = (last.unsigned(0)?, last.text(1)?);
                    if seq == b.seq && envelope == b.envelope { BeatOutcome::Known } else { BeatOutcome::Older(seq) }
                });
            }
            rest = later;
        }
        w.raise_serials(&proved).await?;
        w.note_versions(&proved).await?;
        w.commit().await?;
        let mut outcomes = outcomes.into_iter();
        let outcome = |b| if counts(&b) { outcomes.next() } else { None };
        Ok(beats.iter().map(outcome).map(|o| o.unwrap_or(BeatOutcome::Outdated)).collect())
    }

    /// The last heartbeat of each device that was received at or after a time (none: all).
    pub async fn beats(&self, since: Option<Timestamp>) -> Result<Vec<BeatRow>, LedgerError> {
        let rows = sqlx::query(
            "SELECT device, seq, envelope, received_s, last_seen_s FROM beat WHERE received_s >= $1 ORDER BY device",
        )
        .bind(since.map_or(0, seconds))
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|r| {
                Ok(BeatRow {
                    device: r.parsed(0, "device id")?,
                    seq: r.unsigned(1)?,
                    envelope: r.text(2)?,
                    received_at: r.time(3)?,
                    last_seen_at: r.time(4)?,
                    serial: None,
                    complaints: Vec::new(),
                    versions: Vec::new(),
                    proved_at: None,
                })
            })
            .collect()
    }

    /// When a device was last heard with the key that it has; none: never.
    pub async fn last_heard(&self, id: &DeviceId) -> Result<Option<Timestamp>, LedgerError> {
        let query = sqlx::query("SELECT last_seen_s FROM beat WHERE device = $1").bind(id.as_str());
        query.fetch_optional(self.pool()).await?.map(|r| r.time(0)).transpose()
    }

    /// The last complaint of each device, instance and code, answered or not.
    pub async fn complaints(&self) -> Result<Vec<Complaint>, LedgerError> {
        let rows = sqlx::query(COMPLAINTS).bind(1i64).fetch_all(self.pool()).await?;
        rows.iter().map(complaint).collect()
    }

    /// Those on which the fleet was not judged yet.
    pub async fn unjudged(&self) -> Result<Vec<Complaint>, LedgerError> {
        let rows = sqlx::query(COMPLAINTS).bind(0i64).fetch_all(self.pool()).await?;
        rows.iter().map(complaint).collect()
    }

    /// The fleet was judged on these, and people are told.
    pub async fn judged(&self, complaints: &[Complaint]) -> Result<(), LedgerError> {
        if complaints.is_empty() {
            return Ok(());
        }
        let mut w = self.write().await?;
        for c in complaints {
            sqlx::query(
                "UPDATE complaint SET judged = 1 WHERE device = $1 AND instance = $2 AND code = $3 AND since_s = $4",
            )
            .bind(c.device.as_str())
            .bind(instance_or_none(&c.fault))
            .bind(&c.fault.code)
            .bind(seconds(c.fault.since))
            .execute(&mut **w)
            .await?;
        }
        w.commit().await
    }

    /// Stores a receipt; the same again is fine.
    pub async fn add_receipt(&self, receipt: &ReceiptRow) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "INSERT INTO receipt (store, sha256, time_s, recorded_s, envelope) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (store, sha256) DO NOTHING",
        )
        .bind(receipt.store.as_str())
        .bind(Sha256::of(receipt.envelope.as_bytes()).to_string())
        .bind(seconds(receipt.time))
        .bind(seconds(receipt.recorded_at))
        .bind(&receipt.envelope)
        .execute(&mut **w)
        .await?;
        w.commit().await
    }

    /// The last receipt of each store, of those that the relay that is enrolled now gave; as of when it was read back
    /// where that relay's clock was ahead then. All of them, where several are of one second.
    pub async fn last_receipts(&self) -> Result<Vec<ReceiptRow>, LedgerError> {
        let rows = sqlx::query(
            "WITH told AS (SELECT receipt.store AS store, sha256, \
             CASE WHEN time_s < recorded_s THEN time_s ELSE recorded_s END AS at_s \
             FROM receipt JOIN device ON device.id = receipt.store \
             WHERE revoked_s IS NULL AND recorded_s >= enrolled_s) \
             SELECT told.store, at_s, recorded_s, envelope FROM told \
             JOIN (SELECT store, MAX(at_s) AS last_s FROM told GROUP BY store) AS newest \
             ON newest.store = told.store AND newest.last_s = at_s \
             JOIN receipt ON receipt.store = told.store AND receipt.sha256 = told.sha256",
        );
        let receipt = |r: &AnyRow| {
            let (time, recorded_at) = (r.time(1)?, r.time(2)?);
            Ok(ReceiptRow { store: r.parsed(0, "store id")?, time, recorded_at, envelope: r.text(3)? })
        };
        rows.fetch_all(self.pool()).await?.iter().map(receipt).collect()
    }

    /// A durable small fact.
    pub async fn fact(&self, name: &str) -> Result<Option<String>, LedgerError> {
        let row = sqlx::query("SELECT value FROM fact WHERE name = $1").bind(name).fetch_optional(self.pool()).await?;
        row.map(|r| r.text(0)).transpose()
    }

    /// Sets a fact.
    pub async fn set_fact(&self, name: &str, value: &str) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.set_fact(name, value).await?;
        w.commit().await
    }

    /// The names of facts that begin so.
    pub(super) async fn facts(&self, prefix: &str) -> Result<Vec<String>, LedgerError> {
        let rows = sqlx::query("SELECT name FROM fact ORDER BY name").fetch_all(self.pool()).await?;
        let names = rows.iter().map(|r| r.text(0)).collect::<Result<Vec<_>, _>>()?;
        Ok(names.into_iter().filter(|n| n.starts_with(prefix)).collect())
    }

    /// Forgets a fact.
    pub(super) async fn forget_fact(&self, name: &str) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("DELETE FROM fact WHERE name = $1").bind(name).execute(&mut **w).await?;
        w.commit().await
    }

    /// A mirror (by its URL and endpoint) is about to be put to: marks it as behind. The mark to give to
    /// [`Ledger::mirror_even`], and whether it was even before.
    pub async fn mirror_behind(&self, url: &str) -> Result<(i64, bool), LedgerError> {
        let mut w = self.write().await?;
        let row =
            sqlx::query("SELECT mark, even FROM mirror WHERE url = $1").bind(url).fetch_optional(&mut **w).await?;
        let (mark, even) =
            row.map(|r| Ok::<_, LedgerError>((r.number(0)?, r.number(1)?))).transpose()?.unwrap_or((0, 0));
        sqlx::query(
            "INSERT INTO mirror (url, mark, even) VALUES ($1, $2, 0) ON CONFLICT (url) \
             DO UPDATE SET mark = excluded.mark, even = 0",
        )
        .bind(url)
        .bind(mark + 1)
        .execute(&mut **w)
        .await?;
        w.commit().await?;
        Ok((mark + 1, even != 0))
    }

    /// A mirror has all that the first bucket has, unless somebody marked it since.
    pub async fn mirror_even(&self, url: &str, mark: i64) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE mirror SET even = 1 WHERE url = $1 AND mark = $2")
            .bind(url)
            .bind(mark)
            .execute(&mut **w)
            .await?;
        w.commit().await
    }

    /// The mark of a mirror that is even; none of one that is behind or not known.
    pub async fn mirror_is_even(&self, url: &str) -> Result<Option<i64>, LedgerError> {
        let query = sqlx::query("SELECT mark FROM mirror WHERE url = $1 AND even <> 0").bind(url);
        query.fetch_optional(self.pool()).await?.map(|r| r.number(0)).transpose()
    }

    /// Marks all mirrors but these as behind: nothing is put to them.
    pub async fn mirrors_behind_but(&self, these: &[String]) -> Result<(), LedgerError> {
        let even = sqlx::query("SELECT url FROM mirror WHERE even <> 0").fetch_all(self.pool()).await?;
        for url in even.iter().map(|r| r.text(0)) {
            let url = url?;
            if !these.contains(&url) {
                self.mirror_behind(&url).await?;
            }
        }
        Ok(())
    }

    /// A publish went through.
    pub async fn went_through(&self) -> Result<(), LedgerError> {
        self.set_fact(WATCHED, "0").await
    }

    /// `serve` watched for so long; how long it has in all since a publish went through, over its restarts; none before the
    /// first one.
    pub async fn watched(&self, by: Duration) -> Result<Option<Duration>, LedgerError> {
        let mut w = self.write().await?;
        let row = sqlx::query("SELECT value FROM fact WHERE name = $1").bind(WATCHED).fetch_optional(&mut **w).await?;
        let Some(row) = row else { return Ok(None) };
        let all = parse::<u64>(&row.text(0)?, "time")?.saturating_add(by.as_secs());
        w.set_fact(WATCHED, &all.to_string()).await?;
        w.commit().await?;
        Ok(Some(Duration::from_secs(all)))
    }

    /// The latest time that this ledger was used at; none in a new one.
    pub async fn latest_time(&self) -> Result<Option<Timestamp>, LedgerError> {
        self.fact(TIME).await?.map(|t| parse(&t, "time")).transpose()
    }

    /// The ledger is used now, by a clock that was found right.
    pub async fn touch(&self, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.raise_time(now).await?;
        w.commit().await
    }
}

impl Write {
    /// A device found elsewhere; one that is known, revoked ones too, stays as it is.
    pub(super) async fn know_device(
        &mut self,
        id: &DeviceId,
        key: &PublicKey,
        now: Timestamp,
    ) -> Result<(), LedgerError> {
        sqlx::query(
            "INSERT INTO device (id, store, public_key, enrolled_s) VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO NOTHING",
        )
        .bind(id.as_str())
        .bind(id.store().as_str())
        .bind(key.to_string())
        .bind(seconds(now))
        .execute(&mut ***self)
        .await?;
        Ok(())
    }

    pub(super) async fn set_fact(&mut self, name: &str, value: &str) -> Result<(), LedgerError> {
        sqlx::query(
            "INSERT INTO fact (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )
        .bind(name)
        .bind(value)
        .execute(&mut ***self)
        .await?;
        Ok(())
    }

    pub(super) async fn raise_time(&mut self, now: Timestamp) -> Result<(), LedgerError> {
        let row = sqlx::query("SELECT value FROM fact WHERE name = $1").bind(TIME).fetch_optional(&mut ***self).await?;
        let last: Option<Timestamp> = row.map(|r| parse(&r.text(0)?, "time")).transpose()?;
        if last.is_none_or(|l| l < now) { self.set_fact(TIME, &now.to_string()).await } else { Ok(()) }
    }

    /// Of instances that are published only: what a device makes up takes no room.
    async fn complain(&mut self, device: &DeviceId, fault: &Fault) -> Result<(), LedgerError> {
        sqlx::query(
            "INSERT INTO complaint (device, instance, code, since_s, object, text) \
             SELECT $1, $2, $3, $4, $5, $6 WHERE $2 = '' OR EXISTS (SELECT 1 FROM head WHERE head.instance = $2) \
             ON CONFLICT (device, instance, code) DO UPDATE SET since_s = excluded.since_s, \
             object = excluded.object, text = excluded.text, judged = 0 WHERE complaint.since_s < excluded.since_s \
             AND (complaint.since_s + $7 < excluded.since_s \
             OR COALESCE(complaint.object, '') <> COALESCE(excluded.object, ''))",
        )
        .bind(device.as_str())
        .bind(instance_or_none(fault))
        .bind(&fault.code)
        .bind(seconds(fault.since))
        .bind(fault.object.as_deref())
        .bind(&fault.text)
        .bind(SAME_S)
        .execute(&mut ***self)
        .await?;
        Ok(())
    }

    /// Puts each heartbeat that is newer than the one that is there, of devices that differ; those devices.
    async fn put_beats(&mut self, beats: &[&BeatRow]) -> Result<BTreeSet<String>, LedgerError> {
        let places = |n: usize| (1..=5).map(|k| format!("${}", n * 5 + k)).collect::<Vec<_>>().join(", ");
        let rows = (0..beats.len()).map(|n| format!("({})", places(n))).collect::<Vec<_>>().join(", ");
        let sql = format!(
            "INSERT INTO beat (device, seq, envelope, received_s, last_seen_s) VALUES {rows} \
             ON CONFLICT (device) DO UPDATE SET seq = excluded.seq, envelope = excluded.envelope, \
             received_s = excluded.received_s, last_seen_s = excluded.last_seen_s WHERE beat.seq < excluded.seq \
             RETURNING device"
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for b in beats {
            query = query.bind(b.device.as_str()).bind(signed(b.seq)).bind(&b.envelope);
            query = query.bind(seconds(b.received_at)).bind(seconds(b.last_seen_at));
        }
        query.fetch_all(&mut ***self).await?.iter().map(|r| r.text(0)).collect()
    }

    /// A device holds a manifest that this ledger does not know of: it was set back, or somebody else has our key. The
    /// next publish may be quicker than the next judgement: it is kept as a complaint.
    async fn raise_serials(&mut self, beats: &[&BeatRow]) -> Result<(), LedgerError> {
        let mut newest: BTreeMap<&str, &BeatRow> = BTreeMap::new();
        for b in beats.iter().copied().filter(|b| b.serial.is_some()) {
            let of_store = newest.entry(b.device.store().as_str()).or_insert(b);
            if b.serial > of_store.serial {
                *of_store = b;
            }
        }
        let stores: Vec<String> = newest.keys().map(|s| (*s).to_owned()).collect();
        for row in self.fetch_in("SELECT id, serial FROM store WHERE id IN", &stores).await? {
            let Some(beat) = newest.get(row.text(0)?.as_str()) else { continue };
            let (store, serial, known) = (beat.device.store(), beat.serial.unwrap_or(0), row.unsigned(1)?);
            if serial > known && serial - known <= SERIAL_REACH && self.raise_serial(store, serial).await? {
                let text = format!("list {serial} is held, the newest that was signed here is {known}");
                let code = LIST_NOT_OURS.to_owned();
                let fault = Fault { code, instance: None, object: None, text, since: beat.received_at };
                self.complain(&beat.device, &fault).await?;
            }
        }
        Ok(())
    }

    /// The rows of a query that ends in `IN`, of all these texts, so many a statement that it is always the same one.
    async fn fetch_in(&mut self, sql: &str, texts: &[String]) -> Result<Vec<AnyRow>, LedgerError> {
        let places = (1..=IN_A_STATEMENT).map(|n| format!("${n}")).collect::<Vec<_>>().join(", ");
        let sql = format!("{sql} ({places})");
        let mut rows = Vec::new();
        for some in texts.chunks(IN_A_STATEMENT) {
            // One that is there twice is found once.
            let all = some.iter().chain(std::iter::repeat(&some[0])).take(IN_A_STATEMENT);
            let query = all.fold(sqlx::query(AssertSqlSafe(sql.clone())), |q, text| q.bind(text.clone()));
            rows.extend(query.fetch_all(&mut ***self).await?);
        }
        Ok(rows)
    }

    /// Devices hold a version that is above the newest: this ledger and the bucket were set back, or a hand altered what a
    /// register notes. As many are kept as it takes to believe it.
    async fn note_versions(&mut self, beats: &[&BeatRow]) -> Result<(), LedgerError> {
        let mut held: BTreeMap<&(Instance, Version), Vec<&BeatRow>> = BTreeMap::new();
        for (b, version) in beats.iter().copied().flat_map(|b| b.versions.iter().map(move |v| (b, v))) {
            held.entry(version).or_default().push(b);
        }
        let instances: BTreeSet<String> = held.keys().map(|(i, _)| i.to_string()).collect();
        let instances: Vec<String> = instances.into_iter().collect();
        let mut heads: BTreeMap<Instance, u64> = BTreeMap::new();
        for row in self.fetch_in("SELECT instance, version FROM head WHERE instance IN", &instances).await? {
            heads.insert(row.parsed(0, "instance")?, row.version(1)?.get());
        }
        for ((instance, version), by) in held {
            let Some(&head) = heads.get(instance) else { continue };
            if !(1..=SERIAL_REACH).contains(&version.get().saturating_sub(head)) {
                continue;
            }
            let object = version.to_string();
            let sql = "SELECT complaint.device FROM complaint JOIN device ON device.id = complaint.device \
                       WHERE instance = $1 AND code = $2 AND object = $3 AND revoked_s IS NULL";
            let query = sqlx::query(sql).bind(instance.to_string()).bind(VERSION_NOT_OURS).bind(&object);
            let known = query.fetch_all(&mut ***self).await?;
            let known: BTreeSet<String> = known.iter().map(|r| r.text(0)).collect::<Result<_, _>>()?;
            let more: BTreeMap<&DeviceId, &BeatRow> =
                by.iter().filter(|b| !known.contains(b.device.as_str())).map(|b| (&b.device, *b)).collect();
            for (device, beat) in more.into_iter().take(WITNESSES.saturating_sub(known.len())) {
                let text = format!("version {version} is held, the newest that was published here is {head}");
                let (code, instance) = (VERSION_NOT_OURS.to_owned(), Some(instance.clone()));
                let fault = Fault { code, instance, object: Some(object.clone()), text, since: beat.received_at };
                self.complain(device, &fault).await?;
            }
        }
        Ok(())
    }

    /// The keys of all devices that are not revoked, by store.
    pub(super) async fn device_keys(
        &mut self,
        which: Which<'_>,
    ) -> Result<BTreeMap<StoreId, Vec<(DeviceId, String)>>, LedgerError> {
        let (condition, store) = match which {
            Which::All => ("store <> $1", String::new()),
            Which::Only(id) => ("store = $1", id.as_str().to_owned()),
        };
        let sql = format!("SELECT id, public_key FROM device WHERE revoked_s IS NULL AND {condition} ORDER BY id");
        let rows = sqlx::query(AssertSqlSafe(sql)).bind(store).fetch_all(&mut ***self).await?;
        let mut keys: BTreeMap<StoreId, Vec<_>> = BTreeMap::new();
        for row in &rows {
            let id: DeviceId = row.parsed(0, "device id")?;
            keys.entry(id.store().clone()).or_default().push((id, row.text(1)?));
        }
        Ok(keys)
    }
}

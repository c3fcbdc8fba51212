//! Stores, their manifests, and trust files.

use super::db::{CHANNEL, Columns, Kind, Write, parse, seconds, signed};
use super::fleet::TIME;
use super::{FoundList, Head, Ledger, LedgerError, News, Token};
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::ids::{DeviceId, Instance, StoreId};

pub use crate::source::StoreRow as StoreSeen;
use sqlx::AssertSqlSafe;
use sqlx::any::AnyRow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The serials of a store's manifests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Serials {
    /// For waking: of the last one with other content; 0 while that is not in the bucket.
    pub wake: u64,
    /// The greatest that was signed here, whether it is in the bucket or not.
    pub signed: u64,
}

/// A store as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreRow {
    /// What the source told last.
    pub seen: StoreSeen,
    /// When the source no longer had it; none while it has.
    pub vanished_at: Option<Timestamp>,
    /// Serial of its last manifest; 0 before the first.
    pub serial: u64,
    /// Serial of the last manifest with other content than the one before: what wakes a relay.
    pub content_serial: u64,
    /// The greatest serial that was put; less than `serial`: to be put.
    pub put_serial: u64,
    /// The manifest's trust epoch.
    pub epoch: u64,
    /// The key id of its signer.
    pub signer: String,
    /// Hash of its content without serial, epoch and times.
    pub content: Option<Sha256>,
    /// When it was signed.
    pub signed_at: Option<Timestamp>,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// The serial that its next manifest gets.
    pub next_serial: u64,
}

impl StoreRow {
    /// Whether the bucket had a newer manifest of ours, and none was signed above it yet.
    pub fn is_overtaken(&self) -> bool {
        self.serial > 0 && self.content.is_none()
    }
    /// The greatest serial of which it is known what became of it: what only a device told of is not.
    pub fn known_serial(&self) -> u64 {
        if self.content.is_some() { self.serial } else { self.next_serial - 1 }
    }
}

/// The fact that names [`Ledger::is_set_back`].
pub(super) const SET_BACK: &str = "set back";

/// What a manifest is made from, handed to the maker within [`Ledger::sign`].
#[derive(Debug)]
pub struct SignStore<'a> {
    /// The store.
    pub row: &'a StoreRow,
    /// The heads of all instances, those just staged included.
    pub heads: &'a BTreeMap<Instance, Head>,
    /// Its devices with their public keys as text (ten thousand stores' are parsed only where a
    /// manifest is made), revoked ones left out.
    pub devices: &'a [(DeviceId, String)],
    /// Its last manifest's envelope, once [`Made::NeedsPrevious`] was said.
    pub previous: Option<&'a str>,
}

/// The maker's answer.
#[derive(Debug)]
pub enum Made {
    /// The last manifest stands.
    Unchanged,
    /// Ask again with the last manifest's envelope (there is one).
    NeedsPrevious,
    /// A new one.
    New(NewManifest),
}

/// Makes a store's manifest, or says that the last one stands.
pub type Maker<'m> = &'m mut (dyn FnMut(&SignStore<'_>) -> Result<Made, String> + Send);

/// Which stores [`Ledger::sign`] goes through.
#[derive(Debug, Clone, Copy)]
pub enum Which<'a> {
    /// All.
    All,
    /// One.
    Only(&'a StoreId),
}

/// A manifest to store.
#[derive(Debug, Clone)]
pub struct NewManifest {
    /// One above the row's (or above the greatest seen elsewhere).
    pub serial: u64,
    /// The trust epoch.
    pub epoch: u64,
    /// The signed envelope.
    pub envelope: String,
    /// The key id of its signer.
    pub signer: String,
    /// Hash of its content without serial, epoch and times.
    pub content: Sha256,
    /// When it was signed.
    pub signed_at: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// A manifest to put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToPut {
    /// Whose.
    pub store: StoreId,
    /// Its serial.
    pub serial: u64,
    /// The signed envelope.
    pub envelope: String,
    /// The ETag that the bucket gave to the one put last.
    pub etag: Option<String>,
}

/// A manifest that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WasPut {
    /// Whose.
    pub store: StoreId,
    /// Its serial.
    pub serial: u64,
    /// The ETag that the bucket gave to it.
    pub etag: Option<String>,
}

fn to_put(row: &AnyRow) -> Result<ToPut, LedgerError> {
    Ok(ToPut {
        store: row.parsed(0, "store id")?,
        serial: row.unsigned(1)?,
        envelope: row.text(2)?,
        etag: row.text_or_null(3)?,
    })
}

/// A trust file as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRow {
    /// Its version.
    pub version: u64,
    /// The signed envelope.
    pub envelope: String,
    /// Whether it is in the bucket.
    pub put: bool,
}

const ROW: &str = "SELECT id, zone, region, vanished_s, serial, content_serial, put_serial, epoch, signer, content, \
                   signed_s, expires_s, serial_floor FROM store";

/// Stores read at a time while signing: bounds the memory that ten thousand of them take.
const BATCH: i64 = 500;

fn store_row(row: &AnyRow) -> Result<StoreRow, LedgerError> {
    Ok(StoreRow {
        seen: StoreSeen {
            id: row.parsed(0, "store id")?,
            zone: row.text_or_null(1)?.map(|z| parse(&z, "zone")).transpose()?,
            region: row.text_or_null(2)?,
        },
        vanished_at: row.time_or_null(3)?,
        serial: row.unsigned(4)?,
        content_serial: row.unsigned(5)?,
        put_serial: row.unsigned(6)?,
        epoch: row.unsigned(7)?,
        signer: row.text(8)?,
        content: row.text_or_null(9)?.map(|c| parse(&c, "hash")).transpose()?,
        signed_at: row.time_or_null(10)?,
        expires_at: row.time_or_null(11)?,
        next_serial: row.unsigned(4)?.max(row.unsigned(12)?) + 1,
    })
}

impl Ledger {
    /// Records what the source tells now; gives the stores that vanished by this.
    pub async fn see_stores(&self, stores: &[StoreSeen], now: Timestamp) -> Result<Vec<StoreId>, LedgerError> {
        let known: BTreeMap<StoreId, StoreRow> =
            self.stores().await?.into_iter().map(|s| (s.seen.id.clone(), s)).collect();
        let changed: Vec<&StoreSeen> = stores
            .iter()
            .filter(|s| known.get(&s.id).is_none_or(|k| &k.seen != *s || k.vanished_at.is_some()))
            .collect();
        let here: BTreeSet<&StoreId> = stores.iter().map(|s| &s.id).collect();
        let vanished: Vec<StoreId> = known
            .values()
            .filter(|k| k.vanished_at.is_none() && !here.contains(&k.seen.id))
            .map(|k| k.seen.id.clone())
            .collect();
        if changed.is_empty() && vanished.is_empty() {
            return Ok(vanished);
        }
        let mut w = self.write().await?;
        for s in changed {
            w.put_store(s).await?;
        }
        for id in &vanished {
            sqlx::query("UPDATE store SET vanished_s = $1 WHERE id = $2")
                .bind(seconds(now))
                .bind(id.as_str())
                .execute(&mut **w)
                .await?;
        }
        w.commit().await?;
        Ok(vanished)
    }

    /// All stores, vanished ones too, by id.
    pub async fn stores(&self) -> Result<Vec<StoreRow>, LedgerError> {
        let sql = format!("{ROW} ORDER BY id");
        sqlx::query(AssertSqlSafe(sql)).fetch_all(self.pool()).await?.iter().map(store_row).collect()
    }

    /// One store.
    pub async fn store(&self, id: &StoreId) -> Result<Option<StoreRow>, LedgerError> {
        let sql = format!("{ROW} WHERE id = $1");
        let row = sqlx::query(AssertSqlSafe(sql)).bind(id.as_str()).fetch_optional(self.pool()).await?;
        row.as_ref().map(store_row).transpose()
    }

    /// Records one store, or that it is there again.
    pub async fn add_store(&self, s: &StoreSeen) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.put_store(s).await?;
        w.commit().await
    }

    /// Signs, in one transaction: makes each staged publication its instance's head, retires those that no store wants, and
    /// stores what `make` gives for each store. `trust` is the version of the trust file that is signed under: a
    /// newer one in the ledger fails it. Without a token (`enroll`, signing anew) there may be no news.
    /// Its commit is the commit point of a publish. Gives the stores signed.
    pub async fn sign(
        &self,
        token: Option<Token>,
        news: News<'_>,
        which: Which<'_>,
        trust: u64,
        now: Timestamp,
        make: Maker<'_>,
    ) -> Result<Vec<StoreId>, LedgerError> {
        let mut w = self.write().await?;
        match token {
            Some(token) => w.check_lease(token).await?,
            None if news.are_none() => {}
            None => return Err(LedgerError::LeaseLost),
        }
        let newest =
            sqlx::query("SELECT COALESCE(MAX(version), 0) FROM trust").fetch_one(&mut **w).await?.unsigned(0)?;
        if newest > trust {
            let text = "the publisher's keys changed meanwhile: run this again, it will sign with the new one";
            return Err(LedgerError::Conflict(text.into()));
        }
        w.take_news(news, now).await?;
        let heads = w.heads().await?;
        let done = w.each(which, &heads, make).await?;
        w.raise_time(now).await?;
        w.commit().await?;
        Ok(done)
    }

    /// Asks `look` of each store as [`Ledger::sign`] does; nothing is written, whatever it says.
    pub async fn look(&self, look: Maker<'_>) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        let heads = w.heads().await?;
        w.each(Which::All, &heads, look).await.map(|_| ())
    }

    /// Manifests that are signed and not yet put, after a store's id; not those found to be overtaken,
    /// which are signed anew.
    pub async fn manifests_to_put(&self, after: Option<&StoreId>, limit: usize) -> Result<Vec<ToPut>, LedgerError> {
        let rows = sqlx::query(
            "SELECT id, serial, envelope, etag FROM store WHERE put_serial < serial AND content IS NOT NULL AND id > $1 \
             ORDER BY id LIMIT $2",
        )
        .bind(after.map_or("", |s| s.as_str()).to_owned())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(self.pool())
        .await?;
        rows.iter().map(to_put).collect()
    }

    /// The last manifests, where they were put, of stores that are not vanished, after a store's id.
    pub async fn manifests_in_place(&self, after: Option<&StoreId>, limit: usize) -> Result<Vec<ToPut>, LedgerError> {
        let rows = sqlx::query(
            "SELECT id, serial, envelope, etag FROM store WHERE put_serial >= serial AND content IS NOT NULL \
             AND vanished_s IS NULL AND id > $1 ORDER BY id LIMIT $2",
        )
        .bind(after.map_or("", |s| s.as_str()).to_owned())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(self.pool())
        .await?;
        rows.iter().map(to_put).collect()
    }

    /// A store's last manifest.
    pub async fn manifest(&self, store: &StoreId) -> Result<Option<ToPut>, LedgerError> {
        let row = sqlx::query("SELECT id, serial, envelope, etag FROM store WHERE id = $1 AND envelope IS NOT NULL")
            .bind(store.as_str())
            .fetch_optional(self.pool())
            .await?;
        row.as_ref().map(to_put).transpose()
    }

    /// Manifests that were put; wakes who waits for them. Gives those that were signed again
    /// meanwhile: what was put may lie over a newer one, so put them once more.
    pub async fn manifests_put(&self, put: &[WasPut]) -> Result<Vec<StoreId>, LedgerError> {
        let mut w = self.write().await?;
        let mut again = Vec::new();
        for p in put {
            let sql = "UPDATE store SET put_serial = $1, etag = $2, passed_from = 0, passed_to = 0 \
                       WHERE id = $3 AND serial = $1";
            let done = sqlx::query(sql)
                .bind(signed(p.serial))
                .bind(p.etag.clone())
                .bind(p.store.as_str())
                .execute(&mut **w)
                .await?;
            if done.rows_affected() == 0 {
                sqlx::query("UPDATE store SET put_serial = 0, etag = $1 WHERE id = $2")
                    .bind(p.etag.clone())
                    .bind(p.store.as_str())
                    .execute(&mut **w)
                    .await?;
                again.push(p.store.clone());
            }
        }
        w.count_change().await?;
        if w.kind == Kind::Postgres {
            sqlx::query("SELECT count(*) FROM pg_notify($1, '')").bind(CHANNEL).execute(&mut **w).await?;
        }
        w.commit().await?;
        Ok(again)
    }

    /// The bucket holds a manifest of this store that this ledger did not sign: the next one is above
    /// its serial, and is made whatever it says.
    pub async fn overtaken(&self, store: &StoreId, serial: u64) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.go_above(store, serial).await?;
        w.set_fact(SET_BACK, "1").await?;
        w.commit().await
    }

    /// Whether the ledger was found to be set back, or was made anew from lists that may be one's that was, and no publish
    /// has looked at what it does not know since.
    pub async fn is_set_back(&self) -> Result<bool, LedgerError> {
        Ok(self.fact(SET_BACK).await?.is_some_and(|f| f == "1"))
    }

    /// Notes that a publish knows what to look at, and keeps it.
    pub async fn set_back_is_known(&self) -> Result<(), LedgerError> {
        self.set_fact(SET_BACK, "").await
    }

    /// Whether no manifest was signed here under a serial, and the last one was signed above it because a device told of it.
    pub async fn passed_over(&self, store: &StoreId, serial: u64) -> Result<bool, LedgerError> {
        let sql = "SELECT COUNT(*) FROM store WHERE id = $1 AND passed_from < $2 AND $2 < passed_to";
        let row = sqlx::query(sql).bind(store.as_str()).bind(signed(serial)).fetch_one(self.pool()).await?;
        Ok(row.unsigned(0)? > 0)
    }

    /// Each store's serials.
    pub async fn serials(&self) -> Result<Arc<BTreeMap<StoreId, Serials>>, LedgerError> {
        // Serials only rise; a put, whatever it does, counts as a change.
        let state = "SELECT COUNT(*), CAST(COALESCE(SUM(serial), 0) AS BIGINT), (SELECT n FROM change) FROM store";
        let state = sqlx::query(state).fetch_one(self.pool()).await?.numbers()?;
        if let Some(serials) = self.serials.as_of(&state) {
            return Ok(serials);
        }
        let sql = "SELECT id, CASE WHEN put_serial >= content_serial THEN content_serial ELSE 0 END, serial FROM store";
        let rows = sqlx::query(sql).fetch_all(self.pool()).await?;
        let serials =
            |r: &AnyRow| Ok((r.parsed(0, "store id")?, Serials { wake: r.unsigned(1)?, signed: r.unsigned(2)? }));
        let serials = rows.iter().map(serials).collect::<Result<_, LedgerError>>()?;
        Ok(self.serials.keep(state, Arc::new(serials)))
    }

    /// Stores (not vanished ones) whose manifest expires before a time, and when it does.
    pub async fn expiring(&self, before: Timestamp) -> Result<Vec<(StoreId, Timestamp)>, LedgerError> {
        let rows =
            sqlx::query("SELECT id, expires_s FROM store WHERE expires_s < $1 AND vanished_s IS NULL ORDER BY id")
                .bind(seconds(before))
                .fetch_all(self.pool())
                .await?;
        rows.iter().map(|r| Ok((r.parsed(0, "store id")?, r.time(1)?))).collect()
    }

    /// All trust files, by version.
    pub async fn trust(&self) -> Result<Vec<TrustRow>, LedgerError> {
        let rows =
            sqlx::query("SELECT version, envelope, put FROM trust ORDER BY version").fetch_all(self.pool()).await?;
        rows.iter()
            .map(|r| Ok(TrustRow { version: r.unsigned(0)?, envelope: r.text(1)?, put: r.number(2)? != 0 }))
            .collect()
    }

    /// Stores the next trust file. The same again is fine; other bytes under its number are not. One that begins an epoch
    /// forgets, with it, what was claimed of the time: else whoever signs next would carry that over.
    pub async fn add_trust(
        &self,
        version: u64,
        envelope: &str,
        now: Timestamp,
        begins: bool,
    ) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        let row = sqlx::query("SELECT envelope FROM trust WHERE version = $1")
            .bind(signed(version))
            .fetch_optional(&mut **w)
            .await?;
        match row.map(|r| r.text(0)).transpose()? {
            Some(there) if there == envelope => return Ok(()),
            Some(_) => {
                return Err(LedgerError::Conflict(format!(
                    "trust file {version} was made by another command meanwhile"
                )));
            }
            None => {}
        }
        sqlx::query("INSERT INTO trust (version, envelope, created_s) VALUES ($1, $2, $3)")
            .bind(signed(version))
            .bind(envelope)
            .bind(seconds(now))
            .execute(&mut **w)
            .await?;
        if begins {
            w.set_fact(TIME, &now.to_string()).await?;
        }
        w.commit().await
    }

    /// Takes over the bucket's trust files, all or none: a ledger that has some looks only for those that follow. One that
    /// another process took over meanwhile is the same.
    pub async fn take_trust(&self, files: &[(u64, String)], now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        for (version, envelope) in files {
            sqlx::query("INSERT INTO trust (version, envelope, created_s, put) VALUES ($1, $2, $3, 1) ON CONFLICT (version) DO NOTHING")
                .bind(signed(*version))
                .bind(envelope)
                .bind(seconds(now))
                .execute(&mut **w)
                .await?;
        }
        w.commit().await
    }

    /// The trust files are not all in the bucket any more.
    pub async fn put_trust_again(&self) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE trust SET put = 0").execute(&mut **w).await?;
        w.commit().await
    }

    /// A trust file is in the bucket.
    pub async fn trust_put(&self, version: u64) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE trust SET put = 1 WHERE version = $1").bind(signed(version)).execute(&mut **w).await?;
        w.commit().await
    }
}

impl Write {
    /// Asks the maker of each store; gives those whose manifests it made.
    async fn each(
        &mut self,
        which: Which<'_>,
        heads: &BTreeMap<Instance, Head>,
        make: Maker<'_>,
    ) -> Result<Vec<StoreId>, LedgerError> {
        let devices = self.device_keys(which).await?;
        let mut done = Vec::new();
        let mut last = String::new();
        loop {
            let rows = self.store_batch(which, &last).await?;
            let Some(end) = rows.last() else { break };
            last = end.seen.id.as_str().to_owned();
            for row in &rows {
                let id = &row.seen.id;
                let devices = devices.get(id).map_or(&[][..], Vec::as_slice);
                let fail = |reason| LedgerError::Manifest { store: id.clone(), reason };
                let mut made = make(&SignStore { row, heads, devices, previous: None }).map_err(fail)?;
                if matches!(made, Made::NeedsPrevious) {
                    let envelope = self.envelope(id).await?;
                    let previous = envelope.as_deref();
                    made = make(&SignStore { row, heads, devices, previous }).map_err(fail)?;
                }
                if let Made::New(manifest) = made {
                    self.store_manifest(row, &manifest).await?;
                    done.push(id.clone());
                }
            }
            if matches!(which, Which::Only(_)) {
                break;
            }
        }
        Ok(done)
    }

    async fn store_batch(&mut self, which: Which<'_>, after: &str) -> Result<Vec<StoreRow>, LedgerError> {
        let (condition, id) = match which {
            Which::All => ("id > $1", after.to_owned()),
            Which::Only(id) => ("id = $1", id.as_str().to_owned()),
        };
        let sql = format!("{ROW} WHERE {condition} ORDER BY id LIMIT {BATCH}");
        sqlx::query(AssertSqlSafe(sql)).bind(id).fetch_all(&mut ***self).await?.iter().map(store_row).collect()
    }

    async fn envelope(&mut self, id: &StoreId) -> Result<Option<String>, LedgerError> {
        let query = sqlx::query("SELECT envelope FROM store WHERE id = $1").bind(id.as_str());
        query.fetch_one(&mut ***self).await?.text_or_null(0)
    }

    async fn store_manifest(&mut self, row: &StoreRow, m: &NewManifest) -> Result<(), LedgerError> {
        let content_serial = if row.content == Some(m.content) { row.content_serial } else { m.serial };
        // What was overtaken was told and is gone over; other serials are passed over by a device's word alone.
        if row.content.is_some() && m.serial > row.serial + 1 {
            sqlx::query("UPDATE store SET passed_from = $1, passed_to = $2 WHERE id = $3")
                .bind(signed(row.serial))
                .bind(signed(m.serial))
                .bind(row.seen.id.as_str())
                .execute(&mut ***self)
                .await?;
        }
        sqlx::query(
            "UPDATE store SET serial = $1, content_serial = $2, epoch = $3, signer = $4, content = $5, envelope = $6, \
             signed_s = $7, expires_s = $8 WHERE id = $9",
        )
        .bind(signed(m.serial))
        .bind(signed(content_serial))
        .bind(signed(m.epoch))
        .bind(&m.signer)
        .bind(m.content.to_string())
        .bind(&m.envelope)
        .bind(seconds(m.signed_at))
        .bind(seconds(m.expires_at))
        .bind(row.seen.id.as_str())
        .execute(&mut ***self)
        .await?;
        Ok(())
    }

    async fn put_store(&mut self, s: &StoreSeen) -> Result<(), LedgerError> {
        sqlx::query(
            "INSERT INTO store (id, zone, region) VALUES ($1, $2, $3) ON CONFLICT (id) \
             DO UPDATE SET zone = excluded.zone, region = excluded.region, vanished_s = NULL",
        )
        .bind(s.id.as_str())
        .bind(s.zone.as_ref().map(|z| z.as_str().to_owned()))
        .bind(s.region.clone())
        .execute(&mut ***self)
        .await?;
        Ok(())
    }

    /// A manifest in the bucket that is newer than what is known of the store.
    pub(super) async fn know_list(&mut self, list: &FoundList) -> Result<(), LedgerError> {
        sqlx::query("INSERT INTO store (id, zone) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING")
            .bind(list.store.as_str())
            .bind(list.zone.as_ref().map(|z| z.as_str().to_owned()))
            .execute(&mut ***self)
            .await?;
        let done = sqlx::query(
            "UPDATE store SET serial = $1, put_serial = $1, epoch = $2, envelope = $3, signed_s = $4, expires_s = $5 \
             WHERE id = $6 AND serial < $1",
        )
        .bind(signed(list.serial))
        .bind(signed(list.epoch))
        .bind(&list.envelope)
        .bind(seconds(list.signed_at))
        .bind(seconds(list.expires_at))
        .bind(list.store.as_str())
        .execute(&mut ***self)
        .await?;
        if done.rows_affected() == 1 { self.go_above(&list.store, list.serial).await } else { Ok(()) }
    }

    /// The store's next manifest is above this one in the bucket, and is made whatever it says.
    async fn go_above(&mut self, store: &StoreId, serial: u64) -> Result<(), LedgerError> {
        self.raise_serial(store, serial).await?;
        sqlx::query("UPDATE store SET content = NULL, etag = NULL, passed_from = 0, passed_to = 0 WHERE id = $1")
            .bind(store.as_str())
            .execute(&mut ***self)
            .await?;
        Ok(())
    }

    /// Whether it was not known.
    pub(super) async fn raise_serial(&mut self, store: &StoreId, serial: u64) -> Result<bool, LedgerError> {
        let done = sqlx::query("UPDATE store SET serial_floor = $1 WHERE id = $2 AND serial_floor < $1")
            .bind(signed(serial))
            .bind(store.as_str())
            .execute(&mut ***self)
            .await?;
        Ok(done.rows_affected() == 1)
    }
}

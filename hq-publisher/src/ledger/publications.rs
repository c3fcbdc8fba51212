//! Versions on their way: reserved, packed, signed, done; and the head of each instance.

use super::db::{Columns, Write, parse, seconds, signed, to_json};
use super::stores::SET_BACK;
use super::{Ledger, LedgerError, Token};
use proto::clock::Timestamp;
use proto::digest::{Sha256, StateDigest};
use proto::ids::{Audience, DeviceId, Instance, StoreId, StreamName, TableName, Version, Zone};
use proto::keys::PublicKey;
use proto::layout::{PackKind, PackName};
use proto::manifest::PackEntry;
use sqlx::any::AnyRow;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;

/// How far a publication got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its number is taken.
    Reserved,
    /// Its packs are in the bucket.
    Packed,
    /// Past the commit point: manifests that name it are stored.
    Signed,
    /// Manifests are in the bucket and the replica is there too.
    Done,
    /// Given up; the number stays used.
    Abandoned,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            State::Reserved => "reserved",
            State::Packed => "packed",
            State::Signed => "signed",
            State::Done => "done",
            State::Abandoned => "abandoned",
        }
    }
}

impl std::str::FromStr for State {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        use State::{Abandoned, Done, Packed, Reserved, Signed};
        let known = [Reserved, Packed, Signed, Done, Abandoned];
        known.into_iter().find(|k| k.as_str() == s).ok_or_else(|| format!("`{s}` is no state"))
    }
}

/// A number to take.
#[derive(Debug, Clone)]
pub struct Reserve<'a> {
    /// Whose.
    pub instance: &'a Instance,
    /// The number: above [`Ledger::max_version`].
    pub version: Version,
    /// The trust epoch.
    pub epoch: u64,
    /// The contract's number, from [`Ledger::schema_number`]; stored with its text if it is new.
    pub schema: u64,
    /// SHA-256 of the contract's text.
    pub schema_sha256: &'a Sha256,
    /// The contract's text.
    pub ddl: &'a str,
    /// What is planned and why, for people.
    pub plan: &'a str,
    /// Now.
    pub now: Timestamp,
}

/// A publication as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// Whose.
    pub instance: Instance,
    /// The number.
    pub version: Version,
    /// How far it got.
    pub state: State,
    /// The trust epoch.
    pub epoch: u64,
    /// The contract's number.
    pub schema: u64,
    /// What was planned and why.
    pub plan: String,
    /// Its packs, once packed: a full, a delta, or both.
    pub packs: Vec<PackEntry>,
    /// The state digests, once packed.
    pub digests: BTreeMap<TableName, StateDigest>,
    /// When the number was taken.
    pub created_at: Timestamp,
}

/// A packed publication to be made its instance's head by [`Ledger::sign`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// Whose.
    pub instance: Instance,
    /// The number.
    pub version: Version,
    /// The streams whose newest versions registers must hold before they take it.
    pub requires: BTreeSet<StreamName>,
}

/// What [`Ledger::sign`] does to heads.
#[derive(Debug, Clone, Copy, Default)]
pub struct News<'a> {
    /// Publications to be made heads.
    pub staged: &'a [Staged],
    /// Heads to be retired: no store wants them.
    pub unwanted: &'a [Instance],
    /// Retired heads to be taken back: their rows were compared.
    pub compared: &'a [Instance],
}

impl News<'_> {
    pub(super) fn are_none(&self) -> bool {
        self.staged.is_empty() && self.unwanted.is_empty() && self.compared.is_empty()
    }
}

/// The newest version of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The number.
    pub version: Version,
    /// The trust epoch it was published in.
    pub epoch: u64,
    /// The contract's number.
    pub schema: u64,
    /// The state digests.
    pub digests: BTreeMap<TableName, StateDigest>,
    /// The packs that manifests list, by (version, kind): from the full before the last one on.
    pub packs: Vec<PackEntry>,
    /// What registers must hold of other streams before they take it: of each the version, for whoever follows that instance.
    pub requires: BTreeMap<Instance, Version>,
    /// When it was signed.
    pub signed_at: Timestamp,
    /// No store wanted it when a publish looked: its rows grow old, and nobody follows it newly before they were compared.
    pub retired: bool,
}

impl Head {
    /// Deltas since the last full.
    pub fn deltas_since_full(&self) -> impl Iterator<Item = &PackEntry> {
        let full = self.packs.iter().rposition(|p| p.kind == PackKind::Full);
        let version = full.map(|i| self.packs[i].version);
        self.packs.iter().filter(move |p| p.kind == PackKind::Delta && Some(p.version) > version)
    }
    /// The last full.
    pub fn last_full(&self) -> Option<&PackEntry> {
        self.packs.iter().rfind(|p| p.kind == PackKind::Full)
    }
}

/// A head found in the bucket, with the contract found in its packs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// Whose.
    pub instance: Instance,
    /// What the newest manifest says.
    pub head: Head,
    /// SHA-256 of the contract's text.
    pub contract_sha256: Sha256,
    /// The contract's text.
    pub ddl: String,
}

/// A manifest of ours found in the bucket: the store's last one. The next is above it, and keeps what the source does not
/// tell of.
#[derive(Debug, Clone)]
pub struct FoundList {
    /// Whose.
    pub store: StoreId,
    /// Its serial.
    pub serial: u64,
    /// Its trust epoch.
    pub epoch: u64,
    /// Its bytes.
    pub envelope: String,
    /// The zone whose instances it lists.
    pub zone: Option<Zone>,
    /// When it was signed.
    pub signed_at: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// What else is taken over with them: what manifests found in the bucket tell of their stores.
#[derive(Debug, Clone, Default)]
pub struct TakenOver {
    /// The manifests.
    pub lists: Vec<FoundList>,
    /// Devices that they name. One that the ledger knows is left as it is.
    pub devices: Vec<(DeviceId, PublicKey)>,
}

/// A pack that was published and not yet deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedPack {
    /// The pack.
    pub entry: PackEntry,
    /// When its publication was signed.
    pub signed_at: Timestamp,
    /// When the publication was signed whose manifests no longer list it; none while listed.
    pub dropped_at: Option<Timestamp>,
}

/// The packs that a manifest lists, of all those of an instance in order: from the full before the
/// last one on, so that a chain that someone is on stays listed.
pub fn listed(packs: &[PackEntry]) -> &[PackEntry] {
    let mut fulls = packs.iter().enumerate().rev().filter(|(_, p)| p.kind == PackKind::Full).map(|(i, _)| i);
    let last = fulls.next();
    let from = fulls.next().or(last).unwrap_or(0);
    &packs[from..]
}

/// Puts packs in the order of manifests.
fn in_order(packs: &mut [PackEntry]) {
    packs.sort_by_key(|p| (p.version, p.kind));
}

/// Begins the facts that name packs to be deleted.
const TO_DELETE: &str = "delete ";

const PUBLICATION: &str =
    "SELECT instance, version, state, epoch, contract, plan, packs, digests, created_s FROM publication";
const HEAD: &str = "SELECT instance, version, epoch, contract, digests, packs, signed_s, retired, requires FROM head";

fn publication(row: &AnyRow) -> Result<Publication, LedgerError> {
    Ok(Publication {
        instance: row.parsed(0, "instance")?,
        version: row.version(1)?,
        state: row.parsed(2, "state")?,
        epoch: row.unsigned(3)?,
        schema: row.unsigned(4)?,
        plan: row.text(5)?,
        packs: row.json(6, "list of packs")?,
        digests: row.json(7, "list of digests")?,
        created_at: row.time(8)?,
    })
}

fn head(row: &AnyRow) -> Result<(Instance, Head), LedgerError> {
    let head = Head {
        version: row.version(1)?,
        epoch: row.unsigned(2)?,
        schema: row.unsigned(3)?,
        digests: row.json(4, "list of digests")?,
        packs: row.json(5, "list of packs")?,
        signed_at: row.time(6)?,
        retired: row.number(7)? != 0,
        requires: row.json(8, "list of versions")?,
    };
    Ok((row.parsed(0, "instance")?, head))
}

impl Ledger {
    /// The number for a contract's text: that of the stream's newest contract if it is the same
    /// text, else the next one (`true`). Nothing is written before [`Ledger::reserve`].
    pub async fn schema_number(&self, stream: &StreamName, sha256: &Sha256) -> Result<(u64, bool), LedgerError> {
        let row = sqlx::query("SELECT number, sha256 FROM contract WHERE stream = $1 ORDER BY number DESC LIMIT 1")
            .bind(stream.as_str())
            .fetch_optional(self.pool())
            .await?;
        let Some(row) = row else { return Ok((1, true)) };
        let number = row.unsigned(0)?;
        let same = row.text(1)? == sha256.to_string();
        Ok(if same { (number, false) } else { (number + 1, true) })
    }

    /// The contract's text of a number.
    pub async fn schema_ddl(&self, stream: &StreamName, number: u64) -> Result<Option<String>, LedgerError> {
        let row = sqlx::query("SELECT ddl FROM contract WHERE stream = $1 AND number = $2")
            .bind(stream.as_str())
            .bind(signed(number))
            .fetch_optional(self.pool())
            .await?;
        row.map(|r| r.text(0)).transpose()
    }

    /// The greatest number that the ledger knows of an instance, abandoned ones too.
    pub async fn max_version(&self, instance: &Instance) -> Result<Option<Version>, LedgerError> {
        let row = sqlx::query("SELECT version FROM publication WHERE instance = $1 ORDER BY version DESC LIMIT 1")
            .bind(instance.to_string())
            .fetch_optional(self.pool())
            .await?;
        row.map(|r| r.version(0)).transpose()
    }

    /// Takes a number. Fails when the lease is lost or the number is not above all before.
    pub async fn reserve(&self, token: Token, reserve: &Reserve<'_>) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.check_lease(token).await?;
        let instance = reserve.instance.to_string();
        let row = sqlx::query("SELECT version FROM publication WHERE instance = $1 ORDER BY version DESC LIMIT 1")
            .bind(&instance)
            .fetch_optional(&mut **w)
            .await?;
        if let Some(max) = row.map(|r| r.version(0)).transpose()?
            && max >= reserve.version
        {
            return Err(LedgerError::VersionTaken {
                instance: reserve.instance.clone(),
                version: reserve.version,
                max,
            });
        }
        w.contract(&reserve.instance.stream, reserve.schema, reserve.schema_sha256, reserve.ddl).await?;
        sqlx::query(
            "INSERT INTO publication (instance, version, state, epoch, contract, plan, packs, digests, created_s) \
             VALUES ($1, $2, 'reserved', $3, $4, $5, '[]', '{}', $6)",
        )
        .bind(&instance)
        .bind(reserve.version.as_i64())
        .bind(signed(reserve.epoch))
        .bind(signed(reserve.schema))
        .bind(reserve.plan)
        .bind(seconds(reserve.now))
        .execute(&mut **w)
        .await?;
        w.commit().await
    }

    /// The packs are in the bucket.
    pub async fn packed(
        &self,
        token: Token,
        instance: &Instance,
        version: Version,
        packs: &[PackEntry],
        digests: &BTreeMap<TableName, StateDigest>,
    ) -> Result<(), LedgerError> {
        let mut packs = packs.to_vec();
        in_order(&mut packs);
        let mut w = self.write().await?;
        w.check_lease(token).await?;
        let done = sqlx::query(
            "UPDATE publication SET state = 'packed', packs = $1, digests = $2 \
             WHERE instance = $3 AND version = $4 AND state = 'reserved'",
        )
        .bind(to_json(&packs, "list of packs")?)
        .bind(to_json(digests, "list of digests")?)
        .bind(instance.to_string())
        .bind(version.as_i64())
        .execute(&mut **w)
        .await?;
        if done.rows_affected() != 1 {
            return Err(LedgerError::NotInState { instance: instance.clone(), version, wanted: "reserved" });
        }
        w.commit().await
    }

    /// Gives up a reserved or packed publication; its number stays used, its packs are to be deleted.
    pub async fn abandon(&self, token: Token, instance: &Instance, version: Version) -> Result<(), LedgerError> {
        self.step(token, instance, version, "('reserved', 'packed')", "abandoned", "reserved or packed").await
    }

    /// Manifests are put and the replica is brought up.
    pub async fn done(&self, token: Token, instance: &Instance, version: Version) -> Result<(), LedgerError> {
        self.step(token, instance, version, "('signed', 'done')", "done", "signed").await
    }

    async fn step(
        &self,
        token: Token,
        instance: &Instance,
        version: Version,
        from: &str,
        to: &str,
        wanted: &'static str,
    ) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.check_lease(token).await?;
        let sql = format!("UPDATE publication SET state = $1 WHERE instance = $2 AND version = $3 AND state IN {from}");
        let done = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(to)
            .bind(instance.to_string())
            .bind(version.as_i64())
            .execute(&mut **w)
            .await?;
        if done.rows_affected() != 1 {
            return Err(LedgerError::NotInState { instance: instance.clone(), version, wanted });
        }
        if to == State::Abandoned.as_str() {
            for kind in [PackKind::Delta, PackKind::Full] {
                w.note_deletion(&PackName { instance: instance.clone(), version, kind }).await?;
            }
        }
        w.commit().await
    }

    /// Takes over heads found in the bucket's manifests (a publisher on a new machine), with serials and devices, all or
    /// none: a run that finds some does not look for others, and nobody may sign on half of them. A head that the ledger
    /// knows, or knows a higher one of, is left. Without a token there may be no heads.
    pub async fn adopt(
        &self,
        token: Option<Token>,
        stores: &TakenOver,
        heads: &[Adopted],
        now: Timestamp,
    ) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        match token {
            Some(token) => w.check_lease(token).await?,
            None if heads.is_empty() => {}
            None => return Err(LedgerError::LeaseLost),
        }
        for list in &stores.lists {
            w.know_list(list).await?;
        }
        for (device, key) in &stores.devices {
            w.know_device(device, key, now).await?;
        }
        for one in heads {
            w.adopt(one).await?;
        }
        // A ledger that was set back may have signed those lists before it was moved away.
        if !heads.is_empty() {
            w.set_fact(SET_BACK, "1").await?;
        }
        w.count_change().await?;
        w.commit().await
    }

    /// The newest version of every instance.
    pub async fn heads(&self) -> Result<BTreeMap<Instance, Head>, LedgerError> {
        sqlx::query(HEAD).fetch_all(self.pool()).await?.iter().map(head).collect()
    }

    /// The instances that have a version.
    pub async fn instances(&self) -> Result<Vec<Instance>, LedgerError> {
        let rows = sqlx::query("SELECT instance FROM head").fetch_all(self.pool()).await?;
        rows.iter().map(|r| r.parsed(0, "instance")).collect()
    }

    /// The newest version of one instance.
    pub async fn head(&self, instance: &Instance) -> Result<Option<Head>, LedgerError> {
        let sql = format!("{HEAD} WHERE instance = $1");
        let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(instance.to_string()).fetch_optional(self.pool()).await?;
        row.map(|r| Ok(head(&r)?.1)).transpose()
    }

    /// Publications in a state, oldest first: `Reserved` and `Packed` ones are left by a crash before
    /// the commit point (abandon them), `Signed` ones by a crash after it (finish them).
    pub async fn publications(&self, state: State) -> Result<Vec<Publication>, LedgerError> {
        let sql = format!("{PUBLICATION} WHERE state = $1 ORDER BY created_s, instance, version");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(state.as_str()).fetch_all(self.pool()).await?;
        rows.iter().map(publication).collect()
    }

    /// One publication.
    pub async fn publication(&self, i: &Instance, v: Version) -> Result<Option<Publication>, LedgerError> {
        let sql = format!("{PUBLICATION} WHERE instance = $1 AND version = $2");
        let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(i.to_string()).bind(v.as_i64());
        query.fetch_optional(self.pool()).await?.as_ref().map(publication).transpose()
    }

    /// Every pack of an instance that was signed and not deleted, by (version, kind): for retention.
    pub async fn published(&self, instance: &Instance) -> Result<Vec<PublishedPack>, LedgerError> {
        let rows = sqlx::query(
            "SELECT packs, signed_s FROM publication WHERE instance = $1 AND state IN ('signed', 'done') AND packs <> '[]' \
             ORDER BY version",
        )
        .bind(instance.to_string())
        .fetch_all(self.pool())
        .await?;
        let mut packs = Vec::new();
        for row in rows {
            let signed_at = row.time(1)?;
            for entry in row.json::<Vec<PackEntry>>(0, "list of packs")? {
                packs.push(PublishedPack { entry, signed_at, dropped_at: None });
            }
        }
        packs.sort_by_key(|p| (p.entry.version, p.entry.kind));
        drop_times(&mut packs);
        Ok(packs)
    }

    /// Packs that are to be deleted from the buckets: of numbers that were given up, and forgotten ones.
    pub async fn packs_to_delete(&self) -> Result<Vec<PackName>, LedgerError> {
        let names = self.facts(TO_DELETE).await?;
        names.iter().map(|n| parse(n.trim_start_matches(TO_DELETE), "pack to delete")).collect()
    }

    /// A pack is in no bucket any more.
    pub async fn pack_deleted(&self, pack: &PackName) -> Result<(), LedgerError> {
        self.forget_fact(&format!("{TO_DELETE}{pack}")).await
    }

    /// A pack is to be deleted from the buckets: first here, so that it is never counted on again.
    pub async fn forget_pack(&self, token: Token, pack: &PackName) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.check_lease(token).await?;
        let instance = pack.instance.to_string();
        // A head taken over from the bucket has all its packs in one row.
        let rows = sqlx::query(
            "SELECT version, packs FROM publication WHERE instance = $1 AND version >= $2 ORDER BY version",
        )
        .bind(&instance)
        .bind(pack.version.as_i64())
        .fetch_all(&mut **w)
        .await?;
        for row in rows {
            let mut packs: Vec<PackEntry> = row.json(1, "list of packs")?;
            let before = packs.len();
            packs.retain(|p| (p.version, p.kind) != (pack.version, pack.kind));
            if packs.len() == before {
                continue;
            }
            sqlx::query("UPDATE publication SET packs = $1 WHERE instance = $2 AND version = $3")
                .bind(to_json(&packs, "list of packs")?)
                .bind(&instance)
                .bind(row.number(0)?)
                .execute(&mut **w)
                .await?;
            break;
        }
        w.note_deletion(pack).await?;
        w.commit().await
    }

    /// Forgets the versions of an instance that another one replaced before this time, of which no pack is left; numbers
    /// given up below that go with them. The one that replaced them stays, and with it what [`Ledger::max_version`] says.
    pub async fn forget_replaced(&self, token: Token, i: &Instance, before: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        w.check_lease(token).await?;
        sqlx::query(
            "DELETE FROM publication WHERE instance = $1 AND (state = 'abandoned' OR state = 'done' AND packs = '[]') \
             AND version < (SELECT MAX(version) FROM publication WHERE instance = $1 AND signed_s < $2)",
        )
        .bind(i.to_string())
        .bind(seconds(before))
        .execute(&mut **w)
        .await?;
        w.commit().await
    }
}

/// A pack is dropped from manifests by the second full after it.
fn drop_times(packs: &mut [PublishedPack]) {
    let mut fulls_after: Vec<Timestamp> = Vec::new();
    for p in packs.iter_mut().rev() {
        p.dropped_at = fulls_after.len().checked_sub(2).map(|i| fulls_after[i]);
        if p.entry.kind == PackKind::Full {
            fulls_after.push(p.signed_at);
        }
    }
}

impl Write {
    async fn adopt(&mut self, one: &Adopted) -> Result<(), LedgerError> {
        let Adopted { instance, head, contract_sha256, ddl } = one;
        if self.head(instance).await?.is_some_and(|known| known.version >= head.version) {
            return Ok(());
        }
        self.contract(&instance.stream, head.schema, contract_sha256, ddl).await?;
        sqlx::query(
            "INSERT INTO publication \
             (instance, version, state, epoch, contract, plan, packs, digests, created_s, signed_s) \
             VALUES ($1, $2, 'done', $3, $4, 'found in the bucket', $5, $6, $7, $7) ON CONFLICT (instance, version) \
             DO UPDATE SET state = 'done', epoch = excluded.epoch, contract = excluded.contract, plan = excluded.plan, \
             packs = excluded.packs, digests = excluded.digests, signed_s = excluded.signed_s",
        )
        .bind(instance.to_string())
        .bind(head.version.as_i64())
        .bind(signed(head.epoch))
        .bind(signed(head.schema))
        .bind(to_json(&head.packs, "list of packs")?)
        .bind(to_json(&head.digests, "list of digests")?)
        .bind(seconds(head.signed_at))
        .execute(&mut ***self)
        .await?;
        self.set_head(instance, head).await
    }

    /// Notes that a pack is to be deleted from the buckets.
    async fn note_deletion(&mut self, pack: &PackName) -> Result<(), LedgerError> {
        self.set_fact(&format!("{TO_DELETE}{pack}"), "").await
    }

    /// Stores a contract's text under its number, if it is new there.
    async fn contract(&mut self, s: &StreamName, number: u64, sha: &Sha256, ddl: &str) -> Result<(), LedgerError> {
        let row = sqlx::query("SELECT sha256 FROM contract WHERE stream = $1 AND number = $2")
            .bind(s.as_str())
            .bind(signed(number))
            .fetch_optional(&mut ***self)
            .await?;
        if let Some(row) = row {
            let found: Sha256 = parse(&row.text(0)?, "hash")?;
            if &found != sha {
                return Err(LedgerError::Conflict(format!(
                    "contract {number} of stream {s} is in the ledger with another text: its number was given twice"
                )));
            }
            return Ok(());
        }
        sqlx::query("INSERT INTO contract (stream, number, sha256, ddl) VALUES ($1, $2, $3, $4)")
            .bind(s.as_str())
            .bind(signed(number))
            .bind(sha.to_string())
            .bind(ddl)
            .execute(&mut ***self)
            .await?;
        Ok(())
    }

    async fn head(&mut self, instance: &Instance) -> Result<Option<Head>, LedgerError> {
        let sql = format!("{HEAD} WHERE instance = $1");
        let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(instance.to_string()).fetch_optional(&mut ***self).await?;
        row.map(|r| Ok(head(&r)?.1)).transpose()
    }

    async fn set_head(&mut self, instance: &Instance, head: &Head) -> Result<(), LedgerError> {
        sqlx::query(
            "INSERT INTO head (instance, version, epoch, contract, digests, packs, signed_s, requires) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (instance) DO UPDATE SET version = excluded.version, \
             epoch = excluded.epoch, contract = excluded.contract, digests = excluded.digests, packs = excluded.packs, \
             signed_s = excluded.signed_s, requires = excluded.requires, retired = 0",
        )
        .bind(instance.to_string())
        .bind(head.version.as_i64())
        .bind(signed(head.epoch))
        .bind(signed(head.schema))
        .bind(to_json(&head.digests, "list of digests")?)
        .bind(to_json(&head.packs, "list of packs")?)
        .bind(seconds(head.signed_at))
        .bind(to_json(&head.requires, "list of versions")?)
        .execute(&mut ***self)
        .await?;
        Ok(())
    }

    /// Retires heads that no store wants, takes back those whose rows were compared, and makes heads of what is staged.
    pub(super) async fn take_news(&mut self, news: News<'_>, now: Timestamp) -> Result<(), LedgerError> {
        let retired = news.unwanted.iter().map(|i| (i, 1_i64)).chain(news.compared.iter().map(|i| (i, 0)));
        for (instance, retired) in retired {
            sqlx::query("UPDATE head SET retired = $1 WHERE instance = $2")
                .bind(retired)
                .bind(instance.to_string())
                .execute(&mut ***self)
                .await?;
        }
        // What is staged beside it is what it was made with.
        let mut newest = BTreeMap::new();
        if news.staged.iter().any(|s| !s.requires.is_empty()) {
            let rows =
                sqlx::query("SELECT instance, version FROM head WHERE retired = 0").fetch_all(&mut ***self).await?;
            for row in rows {
                newest.insert(row.parsed::<Instance>(0, "instance")?, row.version(1)?);
            }
            newest.extend(news.staged.iter().map(|s| (s.instance.clone(), s.version)));
        }
        for s in news.staged {
            // Who follows this audience follows no other of its kind.
            let may_be =
                |of: &Audience| *of == s.instance.audience || discriminant(of) != discriminant(&s.instance.audience);
            let of = newest.iter().filter(|(i, _)| s.requires.contains(&i.stream) && may_be(&i.audience));
            self.make_head(&s.instance, s.version, of.map(|(i, v)| (i.clone(), *v)).collect(), now).await?;
        }
        Ok(())
    }

    /// Makes a packed publication its instance's head.
    async fn make_head(
        &mut self,
        i: &Instance,
        v: Version,
        requires: BTreeMap<Instance, Version>,
        now: Timestamp,
    ) -> Result<(), LedgerError> {
        let sql = format!("{PUBLICATION} WHERE instance = $1 AND version = $2 AND state = 'packed'");
        let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(i.to_string()).bind(v.as_i64());
        let row = query.fetch_optional(&mut ***self).await?;
        let missing = || LedgerError::NotInState { instance: i.clone(), version: v, wanted: "packed" };
        let p = publication(&row.ok_or_else(missing)?)?;
        let before = self.head(i).await?;
        if let Some(before) = &before
            && before.version >= v
        {
            return Err(LedgerError::VersionTaken { instance: i.clone(), version: v, max: before.version });
        }
        let mut packs = before.map(|b| b.packs).unwrap_or_default();
        packs.extend(p.packs);
        in_order(&mut packs);
        let packs = listed(&packs).to_vec();
        let (epoch, schema, digests) = (p.epoch, p.schema, p.digests);
        let head = Head { version: v, epoch, schema, digests, packs, requires, signed_at: now, retired: false };
        self.set_head(i, &head).await?;
        sqlx::query("UPDATE publication SET state = 'signed', signed_s = $1 WHERE instance = $2 AND version = $3")
            .bind(seconds(now))
            .bind(i.to_string())
            .bind(v.as_i64())
            .execute(&mut ***self)
            .await?;
        Ok(())
    }

    /// The newest version of every instance, those just made included.
    pub(super) async fn heads(&mut self) -> Result<BTreeMap<Instance, Head>, LedgerError> {
        sqlx::query(HEAD).fetch_all(&mut ***self).await?.iter().map(head).collect()
    }
}

//! Making, signing and putting manifests.
//!
//! Owns what a store's manifest says, when it is signed anew, and the order of puts: trust files,
//! then manifests. Must never sign while the clock cannot be believed. What is signed is in the
//! ledger before it is put: if the power goes, the next run puts it.

use crate::bucket::{BucketError, Buckets, Content, Pointer};
use crate::config::{AudienceKind, Config};
use crate::keys::{Keyring, KeysError, Role};
use crate::ledger::{
    Adopted, FoundList, Head, Ledger, LedgerError, Made, NewManifest, News, SERIAL_REACH, SignStore, StoreRow,
    StoreSeen, TakenOver, ToPut, Token, WasPut, Which,
};
use crate::mail;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use proto::clock::{Clock, Timestamp, after, since};
use proto::config::HumanDuration;
use proto::digest::{Sha256, Sha256Stream};
use proto::dsse::{self, PayloadType};
use proto::failpoint;
use proto::ids::{Audience, DeviceId, Instance, StoreId, StreamName, TableName};
use proto::keys::{PublicKey, SecretKey};
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::manifest::{self, Manifest, StreamEntry};
use proto::trust::{Trust, TrustState, sign_manifest};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

/// Manifests could not be made or put.
#[derive(Debug, thiserror::Error)]
pub enum ManifestsError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The clock leapt.
    #[error(
        "the clock says {now}, more than {leap} past the last time in the ledger ({last}): a wrong clock would sign \
         manifests that lock stores out. If the clock is right (nothing ran here for long), run again with --clock-is-right"
    )]
    ClockLeapt {
        /// The clock.
        now: Timestamp,
        /// The ledger's last time.
        last: Timestamp,
        /// publish.clock_leap.
        leap: HumanDuration,
    },
    /// Keys or trust are not there or do not fit.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Another ledger publishes by the same keys; all stores where that was found.
    #[error("{}", told(.0))]
    Overtaken(Vec<Overtaken>),
    /// Manifests of single stores that the bucket does not give or take.
    #[error("{}", not_put(.0))]
    NotPut(Vec<NotPut>),
    /// The bucket knows versions, the ledger none.
    #[error(
        "the manifests in the bucket tell of versions that this ledger does not know, of {0} for one (a new machine, a ledger \
         lost or set back): nothing is signed before it knows them. Run publish first, then this again"
    )]
    NotTakenOver(Instance),
    /// Trust files found in the bucket.
    #[error("the trust files in the bucket cannot be taken over: {0}")]
    Foreign(String),
}

impl ManifestsError {
    /// The stores whose manifests the bucket does not give or take, where it is about nothing else.
    pub fn stores(&self) -> BTreeSet<StoreId> {
        match self {
            ManifestsError::NotPut(all) => all.iter().map(|n| n.store.clone()).collect(),
            _ => BTreeSet::new(),
        }
    }
}

/// A store of which the bucket has another manifest of ours than the ledger's, and none that is older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overtaken {
    /// Whose.
    pub store: StoreId,
    /// The serial there.
    pub found: u64,
    /// The serial that was to be put.
    pub ours: u64,
    /// Devices that it names and the ledger does not, or the other way round; for people.
    pub devices: Vec<String>,
}

impl Overtaken {
    /// No ledger of ours came so far, and a serial is not to be had above each.
    fn is_out_of_reach(&self) -> bool {
        self.found.saturating_sub(self.ours) > SERIAL_REACH
    }
}

/// A store whose manifest cannot be looked at or put.
#[derive(Debug)]
pub struct NotPut {
    /// Whose.
    pub store: StoreId,
    /// What the bucket said; it names the object.
    pub error: BucketError,
}

impl NotPut {
    /// The error of one store's manifest. What is no object's is about all.
    fn of(store: &StoreId, e: ManifestsError) -> ManifestsError {
        match e {
            ManifestsError::Bucket(
                error
                @ (BucketError::Failed { .. } | BucketError::TooLong { .. } | BucketError::OtherBytesThere { .. }),
            ) => ManifestsError::NotPut(vec![NotPut { store: store.clone(), error }]),
            e => e,
        }
    }
}

fn not_put(all: &[NotPut]) -> String {
    let named: Vec<String> = all.iter().take(NAMED).map(|n| n.error.to_string()).collect();
    let more = all.len().saturating_sub(NAMED);
    let more = if more > 0 { format!("; and of {more} more stores") } else { String::new() };
    format!("{}{more}", named.join("; "))
}

/// Stores named in an error; its devices are all named.
const NAMED: usize = 20;

fn told(all: &[Overtaken]) -> String {
    let (what, above) = match all {
        [one] => {
            let Overtaken { store, found, ours, .. } = one;
            let what = format!("manifest {found} of store {store}, signed by our key, where {ours} was to be put");
            (what, found.to_string())
        }
        all => {
            let stores = all.iter().take(NAMED).map(|o| format!("store {}: {} for {}", o.store, o.found, o.ours));
            let more = all.len().saturating_sub(NAMED);
            let more = (more > 0).then(|| format!("and {more} more"));
            let stores: Vec<String> = stores.chain(more).collect();
            let what = format!(
                "manifests of {} stores, signed by our key, where older ones were to be put ({})",
                all.len(),
                stores.join(", ")
            );
            (what, "those".to_owned())
        }
    };
    let devices: Vec<&str> = all.iter().flat_map(|o| &o.devices).map(String::as_str).collect();
    let devices = match devices[..] {
        [] => String::new(),
        _ => format!(". It forgets devices: {}: revoke or enroll them again", devices.join(", ")),
    };
    if all.iter().any(Overtaken::is_out_of_reach) {
        return format!(
            "the bucket has {what}: no ledger of ours came so far. Somebody has a publisher's key: `trust revoke KEYID \
             --new-epoch`{devices}"
        );
    }
    format!(
        "the bucket has {what}: does another publisher with another ledger write here? If not (a ledger set back), run \
         `publish`: it goes on above {above}; from an inbox move the ledger away first, so that it is made anew from the \
         bucket{devices}"
    )
}

/// The error to end with: all stores that were overtaken, else the first that is about all, else all stores that it is about.
pub fn gather(failed: Option<ManifestsError>, e: ManifestsError) -> ManifestsError {
    match (failed, e) {
        (Some(ManifestsError::Overtaken(mut all)), ManifestsError::Overtaken(more)) => {
            all.extend(more);
            ManifestsError::Overtaken(all)
        }
        (Some(other), all @ ManifestsError::Overtaken(_)) | (Some(all @ ManifestsError::Overtaken(_)), other) => {
            tracing::warn!("{other}");
            all
        }
        (Some(ManifestsError::NotPut(mut all)), ManifestsError::NotPut(more)) => {
            all.extend(more);
            ManifestsError::NotPut(all)
        }
        (Some(single @ ManifestsError::NotPut(_)), e) => {
            tracing::warn!("{single}");
            e
        }
        (Some(first), _) => first,
        (None, e) => e,
    }
}

/// The error of both of two steps of which the first does not keep the second from being done.
pub fn both(first: Result<(), ManifestsError>, second: Result<(), ManifestsError>) -> Result<(), ManifestsError> {
    match (first, second) {
        (Err(first), Err(e)) => Err(gather(Some(first), e)),
        (first, second) => first.and(second),
    }
}

/// What came of putting manifests. What was found to be overtaken is mailed, and only then gone on above: who dies before
/// finds it once more.
pub async fn telling<T>(
    ledger: &Ledger,
    clock: &dyn Clock,
    outcome: Result<T, ManifestsError>,
) -> Result<T, ManifestsError> {
    mail_overtaken(ledger, clock, &outcome).await?;
    if let Err(ManifestsError::Overtaken(all)) = &outcome {
        for one in all.iter().filter(|one| !one.is_out_of_reach()) {
            ledger.overtaken(&one.store, one.found).await?;
        }
    }
    outcome
}

/// Mails what was found to be overtaken. Who puts manifests by itself does no more: it must not put the lists of a ledger that
/// was set back over those of all stores.
pub async fn mail_overtaken<T>(
    ledger: &Ledger,
    clock: &dyn Clock,
    outcome: &Result<T, ManifestsError>,
) -> Result<(), LedgerError> {
    let Err(e @ ManifestsError::Overtaken(all)) = outcome else { return Ok(()) };
    let stores: Vec<&StoreId> = all.iter().map(|o| &o.store).collect();
    mail::publish_overtaken(ledger, clock, &stores, &e.to_string()).await
}

/// The newest trust file of the ledger.
pub async fn newest_trust(ledger: &Ledger, limits: &Limits) -> Result<Option<Trust>, ManifestsError> {
    let Some(row) = ledger.trust().await?.pop() else { return Ok(None) };
    Ok(Some(parse_trust(row.version, &row.envelope, limits)?))
}

fn parse_trust(version: u64, envelope: &str, limits: &Limits) -> Result<Trust, KeysError> {
    dsse::peek(envelope.as_bytes(), limits.trust_bytes)
        .map_err(|e| KeysError::BadTrust { version, reason: e.to_string() })
}

/// Fails when the clock has leapt too far past the latest time in the ledger; else remembers the
/// time. `clock_is_right`: somebody vouched for it.
pub async fn check_clock(
    config: &Config,
    ledger: &Ledger,
    clock: &dyn Clock,
    clock_is_right: bool,
) -> Result<(), ManifestsError> {
    judge_clock(config, ledger, clock, clock_is_right).await?;
    Ok(ledger.touch(clock.now()).await?)
}

/// As [`check_clock`], but nothing is remembered.
async fn judge_clock(
    config: &Config,
    ledger: &Ledger,
    clock: &dyn Clock,
    clock_is_right: bool,
) -> Result<(), ManifestsError> {
    let now = clock.now();
    let leap = config.publish.clock_leap;
    match ledger.latest_time().await? {
        Some(last) if since(now, last) > leap.0 && !clock_is_right => {
            Err(ManifestsError::ClockLeapt { now, last, leap })
        }
        _ => Ok(()),
    }
}

/// What signs: the publisher's key and the trust it stands in.
#[derive(Debug)]
pub struct Signer {
    key: SecretKey,
    trust: Trust,
    /// Those of the settings.
    streams: Vec<(StreamName, AudienceKind)>,
    /// Those that manifests list and the settings do not name.
    left_out: BTreeMap<StreamName, AudienceKind>,
    /// Stores whose last manifest cannot be put now.
    waiting: BTreeSet<StoreId>,
    life: Duration,
    resign_after: Duration,
    limits: Limits,
}

/// Streams in which stores stay with the instance that their manifests list.
pub type Held = BTreeMap<StoreId, BTreeSet<StreamName>>;

/// Whether stores go over to another instance of a stream (their zone changed), or to other streams.
#[derive(Debug, Clone, Copy)]
pub enum Moves<'a> {
    /// They stay: only a publish compares the rows.
    None,
    /// They do, but for these.
    AllBut(&'a Held),
}

/// A store that is to follow another instance of a stream than its manifest lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The store.
    pub store: StoreId,
    /// What its manifest lists.
    pub from: Instance,
    /// What it is to follow; none when it has no zone any more.
    pub to: Option<Instance>,
}

/// Streams that manifests list and the settings do not name, with their audiences: they go on being listed until
/// somebody says that they may go ([`Signer::drop_stream`]), or, store by store, until other streams on the store's list have
/// their tables.
fn left_out(config: &Config, heads: &BTreeMap<Instance, Head>) -> BTreeMap<StreamName, AudienceKind> {
    let is_left = |i: &Instance, h: &Head| !h.retired && config.stream(&i.stream).is_none();
    let mut left: Vec<_> = heads.iter().filter(|(i, h)| is_left(i, h)).collect();
    // Where the audience was another kind before, the newest tells.
    left.sort_by_key(|(_, h)| h.signed_at);
    let kind = |a: &Audience| match a {
        Audience::All => AudienceKind::All,
        Audience::Zone(_) => AudienceKind::Zone,
        Audience::Store(_) => AudienceKind::Store,
    };
    left.into_iter().map(|(i, _)| (i.stream.clone(), kind(&i.audience))).collect()
}

/// Tables of the versions published of streams that are not retired, of those that `of` picks.
fn tables_of(heads: &BTreeMap<Instance, Head>, of: impl Fn(&StreamName) -> bool) -> BTreeSet<&TableName> {
    let those = heads.iter().filter(|(i, h)| !h.retired && of(&i.stream));
    those.flat_map(|(_, h)| h.digests.keys()).collect()
}

/// Streams that manifests list, the settings do not name, and of which no table has moved to one that they name.
pub fn lost(config: &Config, heads: &BTreeMap<Instance, Head>) -> Vec<StreamName> {
    let moved = tables_of(heads, |s| config.stream(s).is_some());
    let left = left_out(config, heads).into_keys();
    left.filter(|s| tables_of(heads, |of| of == s).is_disjoint(&moved)).collect()
}

/// The stores whose manifest lists a stream.
#[derive(Debug, Default)]
pub struct ListedBy {
    /// Those that the source has.
    pub stores: Vec<StoreId>,
    /// Those that vanished from it: they may come back.
    pub away: Vec<StoreId>,
}

impl Signer {
    /// Opens the keyring and the ledger's newest trust; finds the key to sign with. Fails when the
    /// clock has leapt more than `publish.clock_leap` past the ledger, unless `clock_is_right`.
    pub async fn open(
        config: &Config,
        ledger: &Ledger,
        clock: &dyn Clock,
        clock_is_right: bool,
    ) -> Result<Signer, ManifestsError> {
        check_clock(config, ledger, clock, clock_is_right).await?;
        Signer::of_newest_trust(config, ledger, clock).await
    }

    /// As [`Signer::open`], for a run that writes nothing, the time included.
    pub async fn for_dry_run(
        config: &Config,
        ledger: &Ledger,
        clock: &dyn Clock,
        clock_is_right: bool,
    ) -> Result<Signer, ManifestsError> {
        judge_clock(config, ledger, clock, clock_is_right).await?;
        Signer::of_newest_trust(config, ledger, clock).await
    }

    async fn of_newest_trust(config: &Config, ledger: &Ledger, clock: &dyn Clock) -> Result<Signer, ManifestsError> {
        let trust = newest_trust(ledger, &config.limits).await?.ok_or(KeysError::NoTrust)?;
        let ring = Keyring::new(config.state.keys());
        let keys = ring.keys(Role::Publisher)?;
        let now = clock.now();
        // The last one in the file is the newest: a rotation under way signs with it.
        let key = trust
            .publisher_keys(now)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .find_map(|k| keys.iter().find(|f| &f.public() == k));
        let Some(key) = key.map(|f| f.key.clone()) else {
            let wanted: Vec<String> = trust.publisher_keys(now).map(PublicKey::id).collect();
            return Err(KeysError::NoPublisher {
                version: trust.version,
                dir: ring.dir().to_owned(),
                wanted: if wanted.is_empty() { "none: all have expired".into() } else { wanted.join(", ") },
            }
            .into());
        };
        Ok(Signer {
            key,
            trust,
            streams: config.streams.iter().map(|s| (s.name.clone(), s.audience)).collect(),
            left_out: left_out(config, &ledger.heads().await?),
            waiting: BTreeSet::new(),
            life: config.publish.manifest_life.0,
            resign_after: config.publish.resign_after.0,
            limits: config.limits.clone(),
        })
    }

    /// The trust epoch that versions are counted in.
    pub fn epoch(&self) -> u64 {
        self.trust.epoch
    }
    /// The trust file that it stands in.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }
    /// The key that signs.
    pub fn key_id(&self) -> String {
        self.key.public().id()
    }

    /// The streams that manifests list though the settings do not name them, and for whom their instances are.
    pub fn left_out(&self) -> impl Iterator<Item = (&StreamName, AudienceKind)> {
        self.left_out.iter().map(|(name, kind)| (name, *kind))
    }
    /// Manifests list a stream that was left out no longer.
    pub fn drop_stream(&mut self, stream: &StreamName) {
        self.left_out.remove(stream);
    }
    /// Signs nothing for stores whose last manifest cannot be put now: it may have been overtaken, and the next would hide it.
    pub fn leave(&mut self, stores: BTreeSet<StoreId>) {
        self.waiting = stores;
    }
    /// Whether some stores are left out.
    pub fn leaves_some(&self) -> bool {
        !self.waiting.is_empty()
    }
    fn all_streams(&self) -> impl Iterator<Item = (&StreamName, AudienceKind)> {
        self.streams.iter().map(|(name, kind)| (name, *kind)).chain(self.left_out())
    }

    /// The streams left out that have a table which is published by another one now, each with who lists it still.
    pub async fn moved(&self, ledger: &Ledger) -> Result<BTreeMap<StreamName, ListedBy>, ManifestsError> {
        if self.left_out.is_empty() {
            return Ok(BTreeMap::new());
        }
        let heads = ledger.heads().await?;
        let now = tables_of(&heads, |s| self.streams.iter().any(|(name, _)| name == s));
        let is_moved = |s: &StreamName| !tables_of(&heads, |of| of == s).is_disjoint(&now);
        let mut moved: BTreeMap<StreamName, ListedBy> =
            self.left_out.keys().filter(|s| is_moved(s)).map(|s| (s.clone(), ListedBy::default())).collect();
        if moved.is_empty() {
            return Ok(moved);
        }
        let mut look = |s: &SignStore<'_>| {
            if s.row.serial == 0 {
                return Ok(Made::Unchanged);
            }
            let Some(listed) = self.previous(s)? else { return Ok(Made::NeedsPrevious) };
            let its = moved.iter_mut().filter(|(stream, _)| listed.streams.contains_key(*stream));
            let is_away = s.row.vanished_at.is_some();
            its.for_each(|(_, by)| if is_away { &mut by.away } else { &mut by.stores }.push(s.row.seen.id.clone()));
            Ok(Made::Unchanged)
        };
        ledger.look(&mut look).await?;
        Ok(moved)
    }

    /// Lets go of those of them that no store's manifest lists any more.
    pub async fn drop_moved(&mut self, ledger: &Ledger) -> Result<(), ManifestsError> {
        for (stream, by) in self.moved(ledger).await? {
            if by.stores.is_empty() && by.away.is_empty() {
                self.drop_stream(&stream);
            }
        }
        Ok(())
    }

    /// The stores that are to follow another instance of a stream than their manifests list.
    pub async fn moves(&self, ledger: &Ledger, told: &[StoreSeen]) -> Result<Vec<Move>, ManifestsError> {
        let told: BTreeMap<&StoreId, &StoreSeen> = told.iter().map(|s| (&s.id, s)).collect();
        let (mut hashes, mut moves) = (HeadHashes::default(), Vec::new());
        let mut look = |s: &SignStore<'_>| {
            let Some(seen) = told.get(&s.row.seen.id).filter(|_| s.row.serial > 0) else { return Ok(Made::Unchanged) };
            let row = StoreRow { seen: (*seen).clone(), vanished_at: None, ..s.row.clone() };
            let s = SignStore { row: &row, ..*s };
            let Some(before) = self.previous(&s)? else {
                let same = self.lists_what_it_follows(&s, &mut hashes)?;
                return Ok(if same { Made::Unchanged } else { Made::NeedsPrevious });
            };
            for (name, kind) in self.all_streams() {
                let Some(from) = before.instance(name).filter(|i| s.heads.contains_key(i)) else { continue };
                let to = followed(name, kind, seen);
                if to.as_ref() != Some(&from) {
                    moves.push(Move { store: seen.id.clone(), from, to });
                }
            }
            Ok(Made::Unchanged)
        };
        ledger.look(&mut look).await?;
        Ok(moves)
    }

    /// **The commit point of a publish**: makes each staged publication its instance's head, retires heads, and signs
    /// a manifest for each store whose content changed (or whose manifest is due to be signed anew),
    /// in one transaction. Gives the stores signed.
    pub async fn sign_all(
        &self,
        ledger: &Ledger,
        token: Token,
        news: News<'_>,
        moves: Moves<'_>,
        clock: &dyn Clock,
    ) -> Result<Vec<StoreId>, ManifestsError> {
        self.sign(ledger, Some(token), news, Which::All, moves, clock).await
    }

    /// Signs what is due, without the lease: manifests that are old, of another key or epoch, or whose
    /// devices changed. What was overtaken, and what was signed and could not be put yet, which may be, is left to people.
    pub async fn sign_due(&self, ledger: &Ledger, clock: &dyn Clock) -> Result<Vec<StoreId>, ManifestsError> {
        self.sign(ledger, None, News::default(), Which::All, Moves::None, clock).await
    }

    /// Signs one store's manifest (after `enroll` or `revoke`), without the lease.
    pub async fn sign_one(&self, ledger: &Ledger, store: &StoreId, clock: &dyn Clock) -> Result<(), ManifestsError> {
        self.sign(ledger, None, News::default(), Which::Only(store), Moves::None, clock).await.map(|_| ())
    }

    async fn sign(
        &self,
        ledger: &Ledger,
        token: Option<Token>,
        news: News<'_>,
        which: Which<'_>,
        moves: Moves<'_>,
        clock: &dyn Clock,
    ) -> Result<Vec<StoreId>, ManifestsError> {
        // Time is never before what a publisher key signed.
        let clock = clock.now();
        let now = ledger.latest_time().await?.map_or(clock, |t| t.max(clock));
        let mut heads = HeadHashes::default();
        let by_itself = token.is_none() && matches!(which, Which::All);
        let is_left = |s: &StoreRow| {
            self.waiting.contains(&s.seen.id) || by_itself && (s.is_overtaken() || s.put_serial < s.serial)
        };
        let mut make = |s: &SignStore<'_>| match is_left(s.row) {
            true => Ok(Made::Unchanged),
            false => self.make(s, now, moves, &mut heads),
        };
        Ok(ledger.sign(token, news, which, self.trust.version, now, &mut make).await?)
    }

    /// One store's manifest, or nothing to do.
    fn make(
        &self,
        s: &SignStore<'_>,
        now: Timestamp,
        moves: Moves<'_>,
        hashes: &mut HeadHashes,
    ) -> Result<Made, String> {
        let vanished = s.row.vanished_at.is_some();
        let has_manifest = s.row.serial > 0;
        if vanished && !has_manifest {
            return Ok(Made::Unchanged);
        }
        // What the source or the heads no longer tell is taken from the manifest before.
        let untold = |(name, kind): (&StreamName, AudienceKind)| {
            followed(name, kind, &s.row.seen).is_none_or(|i| !is_fresh(s, &i))
                && s.heads.keys().any(|i| &i.stream == name)
        };
        let may_stay = match moves {
            Moves::None => true,
            Moves::AllBut(held) => held.contains_key(&s.row.seen.id),
        };
        if has_manifest
            && s.previous.is_none()
            && (vanished
                || !self.left_out.is_empty()
                || self.all_streams().any(untold)
                || may_stay && !self.lists_what_it_follows(s, hashes)?)
        {
            return Ok(Made::NeedsPrevious);
        }
        let instances = self.instances(s, self.previous(s)?.as_ref(), moves);
        let content = content_hash(&instances, s.heads, s.devices, hashes, &self.limits)?;
        let due = s.row.content != Some(content)
            || s.row.epoch != self.trust.epoch
            || s.row.signer != self.key_id()
            || s.row.signed_at.is_none_or(|t| since(now, t) >= spread(&s.row.seen.id, self.resign_after));
        if !due {
            return Ok(Made::Unchanged);
        }
        let manifest = self.build(s, &instances, now)?;
        let envelope = sign_manifest(&manifest, &self.key).map_err(|e| e.to_string())?;
        if envelope.len() as u64 > self.limits.manifest_bytes {
            return Err(format!("it has {} bytes, over limits.manifest_bytes", envelope.len()));
        }
        Ok(Made::New(NewManifest {
            serial: manifest.serial,
            epoch: manifest.epoch,
            envelope: String::from_utf8(envelope).map_err(|e| e.to_string())?,
            signer: self.key_id(),
            content,
            signed_at: now,
            expires_at: manifest.expires_at,
        }))
    }

    /// The store's last manifest, where it was asked for.
    fn previous(&self, s: &SignStore<'_>) -> Result<Option<Manifest>, String> {
        let read = |e: &str| dsse::peek(e.as_bytes(), self.limits.manifest_bytes);
        s.previous.map(read).transpose().map_err(|e| e.to_string())
    }

    /// Whether the store's last manifest, as it was signed, lists what the store follows now: told without reading it.
    fn lists_what_it_follows(&self, s: &SignStore<'_>, hashes: &mut HeadHashes) -> Result<bool, String> {
        let instances = self.instances(s, None, Moves::None);
        let content = content_hash(&instances, s.heads, s.devices, hashes, &self.limits)?;
        Ok(s.row.content == Some(content))
    }

    /// The instances that the store follows and that have a version. Where the wanted one has none, or one of long ago
    /// (a zone that is new, or was empty, and not yet published), or is not to be gone over to, the one followed before
    /// stays. Only a publish changes which they are: settings of other programs may be older than its.
    fn instances(&self, s: &SignStore<'_>, before: Option<&Manifest>, moves: Moves<'_>) -> Vec<Instance> {
        let tables = |i: &Instance| -> BTreeSet<&TableName> {
            s.heads.get(i).into_iter().flat_map(|h| h.digests.keys()).collect()
        };
        let vanished = s.row.vanished_at.is_some();
        if vanished || before.is_some() && matches!(moves, Moves::None) {
            let last = before.into_iter().flat_map(Manifest::instances).map(|(i, _)| i);
            let (known, dropped): (Vec<Instance>, Vec<_>) = last
                .filter(|i| s.heads.contains_key(i))
                .partition(|i| self.streams.iter().any(|(name, _)| name == &i.stream));
            let now: BTreeSet<&TableName> = known.iter().flat_map(tables).collect();
            // Rather one table by two streams than none: its registers keep what they have, and tell of the other.
            let dropped = dropped.into_iter().filter(|i| !tables(i).is_subset(&now));
            return known.iter().cloned().chain(dropped).collect();
        }
        let stays = |name: &StreamName| match moves {
            Moves::None => true,
            Moves::AllBut(held) => held.get(&s.row.seen.id).is_some_and(|streams| streams.contains(name)),
        };
        let wanted = |(name, kind): (&StreamName, AudienceKind)| {
            let wanted = followed(name, kind, &s.row.seen).filter(|i| is_fresh(s, i));
            let kept = || before.and_then(|m| m.instance(name)).filter(|i| s.heads.contains_key(i));
            if stays(name) { kept().or(wanted) } else { wanted.or_else(kept) }
        };
        let of_settings = self.streams.iter().map(|(name, kind)| (name, *kind)).filter_map(wanted);
        let mut instances: Vec<Instance> = of_settings.collect();
        // One that the settings lost is listed by those that list it, and by new stores. No reader can hold a table by two
        // streams: it goes over when all of them are there, or to one that was there before, for that one has others.
        let is_listed = |name: &StreamName| before.is_some_and(|m| m.streams.contains_key(name));
        let left = self.left_out().filter(|(name, _)| s.row.serial == 0 || is_listed(name));
        let left: Vec<Instance> = left.filter_map(wanted).collect();
        let goes = |left: &Instance, instances: &[Instance]| {
            let its = tables(left);
            let theirs: Vec<_> = instances.iter().filter(|i| !tables(i).is_disjoint(&its)).collect();
            let there: BTreeSet<&TableName> = theirs.iter().flat_map(|i| tables(i)).collect();
            its.is_subset(&there) || theirs.iter().any(|i| is_listed(&i.stream))
        };
        while let Some(stays) =
            left.iter().find(|l| !goes(l, &instances) && instances.iter().any(|i| !tables(i).is_disjoint(&tables(l))))
        {
            let its = tables(stays);
            instances.retain(|i| tables(i).is_disjoint(&its));
        }
        let stay: Vec<Instance> = left.into_iter().filter(|l| !goes(l, &instances)).collect();
        instances.extend(stay);
        instances
    }

    fn build(&self, s: &SignStore<'_>, instances: &[Instance], now: Timestamp) -> Result<Manifest, String> {
        let streams = instances.iter().filter_map(|i| Some((i.stream.clone(), entry(i, s.heads.get(i)?)))).collect();
        let (mut relay, mut registers) = (None, BTreeMap::new());
        for (device, key) in s.devices {
            let key: PublicKey = key.parse().map_err(|e| format!("the key of {device}: {e}"))?;
            match device {
                DeviceId::Relay(_) => relay = Some(key),
                DeviceId::Register(r) => {
                    registers.insert(r.clone(), key);
                }
            }
        }
        Ok(Manifest {
            format: manifest::FORMAT,
            store: s.row.seen.id.clone(),
            serial: s.row.next_serial,
            epoch: self.trust.epoch,
            created_at: now,
            expires_at: after(now, self.life),
            streams,
            relay,
            registers,
        })
    }
}

/// Whether an instance has a version whose rows are kept up to date.
fn is_fresh(s: &SignStore<'_>, instance: &Instance) -> bool {
    s.heads.get(instance).is_some_and(|head| !head.retired)
}

/// The instance of a stream that a store follows; none where it has no zone.
pub fn followed(stream: &StreamName, kind: AudienceKind, store: &StoreSeen) -> Option<Instance> {
    let audience = match kind {
        AudienceKind::All => Audience::All,
        AudienceKind::Zone => Audience::Zone(store.zone.clone()?),
        AudienceKind::Store => Audience::Store(store.id.clone()),
    };
    Some(Instance { stream: stream.clone(), audience })
}

fn entry(instance: &Instance, head: &Head) -> StreamEntry {
    StreamEntry {
        audience: instance.audience.clone(),
        version: head.version,
        schema: head.schema,
        digests: head.digests.clone(),
        packs: head.packs.clone(),
    }
}

/// When a manifest is signed anew: from three quarters of the time on, spread by store, so that ten
/// thousand are not due in one minute.
fn spread(store: &StoreId, resign_after: Duration) -> Duration {
    let hash = Sha256::of(store.as_str().as_bytes());
    let share = f64::from(hash.as_bytes()[0]) / 255.0;
    resign_after.mul_f64(0.75 + 0.25 * share)
}

/// Hash of each head, made once a signing: ten thousand stores share a handful.
#[derive(Debug, Default)]
struct HeadHashes(BTreeMap<Instance, Sha256>);

impl HeadHashes {
    fn of(&mut self, instance: &Instance, head: &Head, limits: &Limits) -> Result<Sha256, String> {
        if let Some(hash) = self.0.get(instance) {
            return Ok(*hash);
        }
        let entry = entry(instance, head);
        let json = serde_json::to_vec(&entry).map_err(|e| e.to_string())?;
        check_as_readers_do(instance, entry, limits)?;
        let hash = Sha256::of(&json);
        self.0.insert(instance.clone(), hash);
        Ok(hash)
    }
}

/// A manifest that readers would refuse must not be signed.
fn check_as_readers_do(instance: &Instance, entry: StreamEntry, limits: &Limits) -> Result<(), String> {
    let store = "check".parse().map_err(|e: proto::ids::BadName| e.to_string())?;
    let manifest = Manifest {
        format: manifest::FORMAT,
        store,
        serial: 1,
        epoch: 1,
        created_at: Timestamp::UNIX_EPOCH,
        expires_at: Timestamp::UNIX_EPOCH,
        streams: BTreeMap::from([(instance.stream.clone(), entry)]),
        relay: None,
        registers: BTreeMap::new(),
    };
    let payload = manifest.to_payload().map_err(|e| e.to_string())?;
    Manifest::from_payload(&payload, limits).map(|_| ()).map_err(|e| format!("readers would refuse it: {e}"))
}

/// Hash of what a manifest says, without serial, epoch and times.
fn content_hash(
    instances: &[Instance],
    heads: &BTreeMap<Instance, Head>,
    devices: &[(DeviceId, String)],
    hashes: &mut HeadHashes,
    limits: &Limits,
) -> Result<Sha256, String> {
    let mut all = Sha256Stream::default();
    // Their order says nothing.
    for instance in instances.iter().collect::<BTreeSet<_>>() {
        if let Some(head) = heads.get(instance) {
            all.update(instance.to_string().as_bytes());
            all.update(hashes.of(instance, head, limits)?.as_bytes());
        }
    }
    for (device, key) in devices {
        all.update(device.as_str().as_bytes());
        all.update(key.as_bytes());
    }
    Ok(all.finish())
}

/// Manifests put between two looks at the lease.
const BATCH: usize = 256;

/// Puts trust files and manifests that are signed and not yet in the bucket; how many manifests.
/// Run at the start of a publish (rolls a crashed one forward) and after each signing.
pub async fn put_unfinished(ledger: &Ledger, buckets: &Buckets, token: Option<Token>) -> Result<usize, ManifestsError> {
    put_trust(ledger, buckets).await?;
    put_each(ledger, buckets, token, None).await
}

/// Puts once more the manifests that lie in the bucket otherwise than they were put: gone, rotten, older ones. Only those
/// are read whose ETag in a listing is another one than was given to them; in a directory all. Only where the ledger has the
/// newest trust file ([`Followed::Newest`]): else those that lie there may be newer.
pub async fn put_again(ledger: &Ledger, buckets: &Buckets, token: Option<Token>) -> Result<(), ManifestsError> {
    let etags = buckets.manifest_etags().await?;
    put_each(ledger, buckets, token, Some(&etags)).await.map(|_| ())
}

/// The ETags that a listing gives.
type Etags = BTreeMap<ObjectName, String>;

/// Puts those that were not put, or where ETags are given those that were and lie there otherwise; how many were marked.
async fn put_each(
    ledger: &Ledger,
    buckets: &Buckets,
    token: Option<Token>,
    etags: Option<&Etags>,
) -> Result<usize, ManifestsError> {
    let (mut done, mut last, mut failed) = (0, None, None);
    loop {
        let batch = match etags {
            None => ledger.manifests_to_put(last.as_ref(), BATCH).await?,
            Some(_) => ledger.manifests_in_place(last.as_ref(), BATCH).await?,
        };
        let Some(end) = batch.last() else { break };
        last = Some(end.store.clone());
        if let Some(token) = token
            && !ledger.holds(token).await?
        {
            return Err(LedgerError::LeaseLost.into());
        }
        let (put, error) = put_batch(ledger, buckets, batch, etags).await;
        done += put.len();
        failed = match error {
            Some(e) => Some(gather(failed, e)),
            None => failed,
        };
        if put.is_empty() {
            continue;
        }
        for store in failpoint::around("manifests.marked", ledger.manifests_put(&put)).await? {
            if let Err(e) = put_store(ledger, buckets, &store).await {
                failed = Some(gather(failed, NotPut::of(&store, e)));
            }
        }
    }
    match failed {
        Some(e) => Err(e),
        None => Ok(done),
    }
}

/// Puts some manifests, several at once; those that were, and the error.
async fn put_batch(
    ledger: &Ledger,
    buckets: &Buckets,
    batch: Vec<ToPut>,
    etags: Option<&Etags>,
) -> (Vec<WasPut>, Option<ManifestsError>) {
    let puts = stream::iter(batch).map(|one| async move {
        let store = one.store.clone();
        let put = match etags {
            None => put_one(ledger, buckets, one).await,
            Some(etags) => put_one_again(ledger, buckets, one, etags).await,
        };
        put.map_err(|e| NotPut::of(&store, e))
    });
    let (mut put, mut failed) = (Vec::new(), None);
    for outcome in puts.buffer_unordered(buckets.concurrency()).collect::<Vec<_>>().await {
        match outcome {
            Ok(one) => put.extend(one),
            Err(e) => failed = Some(gather(failed, e)),
        }
    }
    (put, failed)
}

/// Puts one manifest if it does not lie there as it was put.
async fn put_one_again(
    ledger: &Ledger,
    buckets: &Buckets,
    one: ToPut,
    etags: &Etags,
) -> Result<Option<WasPut>, ManifestsError> {
    let name = ObjectName::Manifest(one.store.clone());
    let listed = etags.get(&name).cloned();
    if listed.is_some() && listed == one.etag {
        return Ok(None);
    }
    if buckets.get(&name, MOST).await?.is_some_and(|there| there == one.envelope.as_bytes()) {
        // It is not read again for a listing that names it otherwise than its put.
        return Ok(listed.map(|etag| WasPut { store: one.store, serial: one.serial, etag: Some(etag) }));
    }
    tracing::warn!(object = %name, "not as it was signed last: put again");
    put_one(ledger, buckets, one).await
}

/// Puts one manifest; nothing when it was signed again meanwhile.
async fn put_one(ledger: &Ledger, buckets: &Buckets, one: ToPut) -> Result<Option<WasPut>, ManifestsError> {
    let name = ObjectName::Manifest(one.store.clone());
    let bytes = Bytes::from(one.envelope.clone());
    let done = |etag| Ok(Some(WasPut { store: one.store.clone(), serial: one.serial, etag }));
    // Where the bucket honours conditions, the put itself asks whether somebody put since.
    if buckets.honours_conditions()
        && let Some(seen) = one.etag.as_deref()
        && let Pointer::Put(etag) = buckets.put_pointer_over(&name, bytes.clone(), Some(seen)).await?
    {
        return done(etag);
    }
    // Somebody did (another command of ours, a run that was cut short, a stranger), or it was not asked: a
    // directory; a ledger from a backup, which has forgotten serials that stores have seen.
    let there = buckets.get(&name, MOST).await?;
    if ledger.store(&one.store).await?.is_some_and(|s| s.serial > one.serial) {
        return Ok(None);
    }
    if let Some(there) = there {
        check_overtaken(ledger, &there, &one).await?;
    }
    match buckets.put_pointer_over(&name, bytes, None).await? {
        Pointer::Put(etag) => done(etag),
        Pointer::Changed => Ok(None),
    }
}

/// Fails where the bucket holds another manifest of ours that is not older than the one to be put, or has a serial that was
/// passed over because a device told of it: the next one is signed above it, once that was told ([`telling`]).
pub async fn check_overtaken(ledger: &Ledger, there: &[u8], one: &ToPut) -> Result<(), ManifestsError> {
    if there != one.envelope.as_bytes()
        && let Ok(claim) = dsse::peek::<Claim>(there, MOST)
        && claim.store == one.store
        && (claim.serial >= one.serial || ledger.passed_over(&one.store, claim.serial).await?)
        && signed_by_us(ledger, there, claim.epoch).await?
    {
        let devices = devices_that_differ(ledger, there, &one.store).await?;
        let overtaken = Overtaken { store: one.store.clone(), found: claim.serial, ours: one.serial, devices };
        return Err(ManifestsError::Overtaken(vec![overtaken]));
    }
    Ok(())
}

/// What a ledger set back forgot of a store's devices. Nothing is changed by it: who took the bucket could enroll devices
/// that way.
async fn devices_that_differ(ledger: &Ledger, there: &[u8], store: &StoreId) -> Result<Vec<String>, ManifestsError> {
    let Ok(manifest) = dsse::peek::<Manifest>(there, MOST) else { return Ok(Vec::new()) };
    let mut theirs: BTreeMap<DeviceId, &PublicKey> =
        manifest.registers.iter().map(|(id, key)| (DeviceId::Register(id.clone()), key)).collect();
    theirs.extend(manifest.relay.iter().map(|key| (DeviceId::Relay(store.clone()), key)));
    let mut ours = ledger.devices_of(store).await?;
    ours.retain(|d| d.revoked_at.is_none());
    let enrolled = theirs.iter().filter(|(id, key)| !ours.iter().any(|d| &d.id == *id && &d.key == **key));
    let enrolled = enrolled.map(|(id, _)| format!("{id} was enrolled since"));
    let revoked = ours.iter().filter(|d| !theirs.contains_key(&d.id)).map(|d| format!("{} was revoked since", d.id));
    Ok(enrolled.chain(revoked).collect())
}

/// What the bucket has that is newer than the ledger, which was set back then; for people. A ledger that knows no version
/// yet takes all over when it publishes.
pub async fn newer_in_bucket(
    ledger: &Ledger,
    buckets: &Buckets,
    limits: &Limits,
) -> Result<Vec<String>, ManifestsError> {
    let Some(ours) = newest_trust(ledger, limits).await? else { return Ok(Vec::new()) };
    let mut newer = Vec::new();
    let there = buckets.get(&ObjectName::Trust, limits.trust_bytes).await.map_err(foreign_if_too_long)?;
    let claimed = there.and_then(|t| TrustState::claimed_version(&t, limits).ok());
    if let Some(version) = claimed.filter(|v| *v > ours.version) {
        newer.push(format!("trust.json is version {version} there and {} here", ours.version));
    }
    if !ledger.heads().await?.is_empty() {
        let looks = stream::iter(buckets.list_stores().await?).map(|store| newer_manifest(ledger, buckets, store));
        let found: Vec<Option<String>> = looks.buffered(buckets.concurrency()).try_collect().await?;
        newer.extend(found.into_iter().flatten());
    }
    Ok(newer)
}

async fn newer_manifest(ledger: &Ledger, buckets: &Buckets, store: StoreId) -> Result<Option<String>, ManifestsError> {
    // The bucket first: what is put after this look is in the ledger already.
    let Some(there) = buckets.get(&ObjectName::Manifest(store.clone()), MOST).await? else { return Ok(None) };
    let Ok(claim) = dsse::peek::<Claim>(&there, MOST) else { return Ok(None) };
    let known = ledger.store(&store).await?.map_or(0, |s| s.known_serial());
    let passed_over = ledger.passed_over(&store, claim.serial).await?;
    if claim.store != store
        || (claim.serial <= known && !passed_over)
        || !signed_by_us(ledger, &there, claim.epoch).await?
    {
        return Ok(None);
    }
    let devices = devices_that_differ(ledger, &there, &store).await?;
    let devices = devices.iter().map(|d| format!(" ({d})")).collect::<String>();
    Ok(Some(format!("the manifest of store {store} is {} there and {known} here{devices}", claim.serial)))
}

/// Bytes of a manifest in the bucket looked at, whatever the limit for readers is.
const MOST: u64 = 64 << 20;

#[derive(serde::Deserialize)]
struct Claim {
    store: StoreId,
    serial: u64,
    epoch: u64,
}

/// Whether an envelope is by a key and of the epoch that are trusted today: only such a one can be
/// ahead of us.
pub async fn signed_by_us(ledger: &Ledger, envelope: &[u8], epoch: u64) -> Result<bool, ManifestsError> {
    let Some(trust) = newest_trust(ledger, &Limits::default()).await? else { return Ok(false) };
    let keys = trust.publishers.iter().map(|p| &p.key);
    Ok(trust.epoch == epoch && dsse::open(envelope, PayloadType::Manifest, keys, 1, MOST).is_ok())
}

/// Puts one store's newest manifest, again if it was signed anew meanwhile.
pub async fn put_store(ledger: &Ledger, buckets: &Buckets, store: &StoreId) -> Result<(), ManifestsError> {
    while let Some(newest) = ledger.manifest(store).await? {
        let Some(put) = put_one(ledger, buckets, newest).await? else { continue };
        if failpoint::around("store.marked", ledger.manifests_put(&[put])).await?.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Puts the trust files that are not in the bucket: each version, then the pointer, then the marks.
pub async fn put_trust(ledger: &Ledger, buckets: &Buckets) -> Result<(), ManifestsError> {
    let rows = ledger.trust().await?;
    let missing: Vec<_> = rows.iter().filter(|r| !r.put).collect();
    let (Some(newest), false) = (rows.last(), missing.is_empty()) else { return Ok(()) };
    for row in &missing {
        let content = Content::Bytes(row.envelope.clone().into());
        buckets.put_new(&ObjectName::TrustVersion(row.version), content).await?;
    }
    buckets.put_pointer(&ObjectName::Trust, newest.envelope.clone().into()).await?;
    for row in missing {
        failpoint::around("trust.marked", ledger.trust_put(row.version)).await?;
    }
    Ok(())
}

/// A head that the manifests in the bucket tell of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundHead {
    /// Its entry in the manifest.
    pub entry: StreamEntry,
    /// The manifest's epoch.
    pub epoch: u64,
    /// When the manifest was signed.
    pub signed_at: Timestamp,
}

impl FoundHead {
    /// As the ledger has it.
    pub fn to_head(&self) -> Head {
        let StreamEntry { version, schema, digests, packs, .. } = self.entry.clone();
        Head { version, epoch: self.epoch, schema, digests, packs, signed_at: self.signed_at, retired: false }
    }
}

/// What the manifests in the bucket tell.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// Serials and devices.
    pub stores: TakenOver,
    /// The newest version of each instance.
    pub heads: BTreeMap<Instance, FoundHead>,
}

/// What the bucket knows and an empty ledger does not (a new machine): takes over trust files, and gives what the
/// manifests tell, for the caller to take over at once: floors of serials without the heads would let manifests be signed
/// that empty the stores' lists. When the ledger has heads, only newer trust files.
pub async fn recover(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    clock: &dyn Clock,
) -> Result<Found, ManifestsError> {
    follow_trust(config, ledger, buckets, clock).await?;
    if !ledger.heads().await?.is_empty() {
        return Ok(Found::default());
    }
    recover_trust(config, ledger, buckets, clock, &[]).await?;
    find(config, ledger, buckets, |_| true).await
}

/// For who signs and does not publish: fails where the ledger knows no version and the bucket does. Where neither does,
/// manifests and devices are taken over.
pub async fn check_taken_over(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    clock: &dyn Clock,
) -> Result<(), ManifestsError> {
    if !ledger.heads().await?.is_empty() {
        return Ok(());
    }
    // Before the first publish many are enrolled: what lies there by this ledger is not read each time.
    let ours = |s: &StoreRow| s.serial > 0 && s.put_serial >= s.serial && s.content.is_some();
    let ours: BTreeSet<StoreId> = ledger.stores().await?.into_iter().filter(ours).map(|s| s.seen.id).collect();
    let found = find(config, ledger, buckets, |s| !ours.contains(s)).await?;
    match found.heads.into_keys().next() {
        Some(instance) => Err(ManifestsError::NotTakenOver(instance)),
        None => Ok(take_over(ledger, None, &found.stores, &[], clock).await?),
    }
}

/// Takes over what was found, all or nothing.
pub async fn take_over(
    ledger: &Ledger,
    token: Option<Token>,
    stores: &TakenOver,
    heads: &[Adopted],
    clock: &dyn Clock,
) -> Result<(), LedgerError> {
    if stores.lists.is_empty() {
        return Ok(());
    }
    failpoint::around("rebuild.heads", ledger.adopt(token, stores, heads, clock.now())).await
}

/// Reads the manifests in the bucket, those of some stores.
async fn find(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    of: impl Fn(&StoreId) -> bool,
) -> Result<Found, ManifestsError> {
    let limits = &config.limits;
    let mut found = Found::default();
    // Only what today's keys signed in today's epoch: a revoked key's manifests prove nothing.
    let Some(trust) = newest_trust(ledger, limits).await? else { return Ok(found) };
    let signers: Vec<PublicKey> = trust.publishers.iter().map(|p| p.key.clone()).collect();
    let stores = buckets.list_stores().await?;
    for store in stores.into_iter().filter(of) {
        let name = ObjectName::Manifest(store.clone());
        let Some(envelope) = buckets.get(&name, limits.manifest_bytes).await? else { continue };
        // Expired ones count: only the numbers in them are asked for.
        let opened = dsse::open(&envelope, PayloadType::Manifest, &signers, 1, limits.manifest_bytes);
        let manifest = opened
            .map_err(|e| e.to_string())
            .and_then(|p| Manifest::from_payload(&p, limits).map_err(|e| e.to_string()));
        let manifest = match manifest {
            Ok(m) if m.store == store && m.epoch == trust.epoch => m,
            Ok(m) => {
                tracing::warn!("{name} in the bucket is of store {}, epoch {}: left alone", m.store, m.epoch);
                continue;
            }
            Err(e) => {
                tracing::warn!("{name} in the bucket is not of this publisher ({e}): left alone");
                continue;
            }
        };
        for (instance, entry) in manifest.instances() {
            if found.heads.get(&instance).is_none_or(|f| f.entry.version < entry.version) {
                let head = FoundHead { entry: entry.clone(), epoch: manifest.epoch, signed_at: manifest.created_at };
                found.heads.insert(instance, head);
            }
        }
        // Devices whose keys a manifest of ours names go on being heard.
        found.stores.devices.extend(manifest.relay.iter().map(|k| (DeviceId::Relay(store.clone()), k.clone())));
        found
            .stores
            .devices
            .extend(manifest.registers.iter().map(|(id, k)| (DeviceId::Register(id.clone()), k.clone())));
        let zone = manifest.streams.values().find_map(|e| match &e.audience {
            Audience::Zone(zone) => Some(zone.clone()),
            _ => None,
        });
        found.stores.lists.push(FoundList {
            store,
            serial: manifest.serial,
            epoch: manifest.epoch,
            envelope: String::from_utf8_lossy(&envelope).into_owned(),
            zone,
            signed_at: manifest.created_at,
            expires_at: manifest.expires_at,
        });
    }
    Ok(found)
}

/// The bucket's trust files of these versions, each checked by the one before; the first pins what no state is given for.
async fn walk_trust(
    buckets: &Buckets,
    limits: &Limits,
    mut walked: Option<TrustState>,
    versions: RangeInclusive<u64>,
) -> Result<(Option<TrustState>, Vec<(u64, String)>), ManifestsError> {
    let mut envelopes = Vec::new();
    for version in versions {
        let name = ObjectName::TrustVersion(version);
        let missing = || ManifestsError::Foreign(format!("{name} is missing"));
        let there = buckets.get(&name, limits.trust_bytes).await.map_err(foreign_if_too_long)?;
        let bytes = there.ok_or_else(missing)?;
        let text = String::from_utf8(bytes.to_vec()).map_err(|e| ManifestsError::Foreign(e.to_string()))?;
        let state = match walked.take() {
            Some(state) => state,
            None => TrustState::pinned(parse_trust(version, &text, limits)?.root, version),
        };
        let step = state.step(&bytes, limits);
        walked = Some(step.map_err(|e| ManifestsError::Foreign(format!("{name}: {e}")))?);
        envelopes.push((version, text));
    }
    Ok((walked, envelopes))
}

fn foreign(e: proto::trust::Refusal) -> ManifestsError {
    ManifestsError::Foreign(e.to_string())
}

/// We never put an object that no reader would read.
fn foreign_if_too_long(e: BucketError) -> ManifestsError {
    match e {
        BucketError::TooLong { .. } => ManifestsError::Foreign(e.to_string()),
        e => e.into(),
    }
}

/// What became of trust files in the bucket that are newer than the ledger's.
#[derive(Debug)]
pub enum Followed {
    /// There are none, or they were taken over: the ledger has the newest.
    Newest,
    /// There are some, and they do not follow: rotten ones of ours, or a stranger's. Why.
    Not(String),
}

/// Takes over the trust files in the bucket that follow the ledger's newest: it was set back to before keys were changed,
/// and what it would sign nobody takes any more. What does not follow is left alone. Nothing, when the ledger has none.
pub async fn follow_trust(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    clock: &dyn Clock,
) -> Result<Followed, ManifestsError> {
    let Some(row) = ledger.trust().await?.pop() else { return Ok(Followed::Newest) };
    let limits = &config.limits;
    let walk = async {
        let ours = TrustState::pinned(parse_trust(row.version, &row.envelope, limits)?.root, row.version);
        let ours = ours.step(row.envelope.as_bytes(), limits).map_err(foreign)?;
        // Where trust.json is gone, rotten or an old copy, the files beside it tell.
        let there = buckets.get(&ObjectName::Trust, limits.trust_bytes).await.ok().flatten();
        let claimed = there.and_then(|there| TrustState::claimed_version(&there, limits).ok()).unwrap_or_default();
        let mut newest = claimed.max(row.version);
        while newest - row.version < limits.trust_steps && newest < u64::MAX {
            let next = ObjectName::TrustVersion(newest + 1);
            match buckets.get(&next, limits.trust_bytes).await {
                Ok(None) => break,
                Ok(Some(_)) | Err(BucketError::TooLong { .. }) => newest += 1,
                Err(e) => return Err(e.into()),
            }
        }
        let versions = ours.steps_to(newest, limits).map_err(foreign)?;
        Ok(walk_trust(buckets, limits, Some(ours), versions).await?.1)
    };
    match walk.await {
        Ok(newer) if newer.is_empty() => {}
        Ok(newer) => {
            tracing::warn!("the bucket has {} trust files that this ledger forgot: taken over", newer.len());
            failpoint::around("rebuild.trust", ledger.take_trust(&newer, clock.now())).await?;
        }
        Err(ManifestsError::Foreign(why)) => {
            tracing::warn!("newer trust files in the bucket are left alone: {why}");
            return Ok(Followed::Not(why));
        }
        Err(e) => return Err(e),
    }
    Ok(Followed::Newest)
}

/// Takes over the bucket's trust files into a ledger that has none, if one of the publisher keys here may sign by them, or
/// these root keys signed the newest of them (that it names one proves nothing: anybody can); whether there were any.
pub async fn recover_trust(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    clock: &dyn Clock,
    roots: &[PublicKey],
) -> Result<bool, ManifestsError> {
    if !ledger.trust().await?.is_empty() {
        return Ok(false);
    }
    let limits = &config.limits;
    let Some(newest) = buckets.get(&ObjectName::Trust, limits.trust_bytes).await? else { return Ok(false) };
    let claimed = TrustState::claimed_version(&newest, limits).map_err(foreign)?;
    let (walked, envelopes) = walk_trust(buckets, limits, None, 1..=claimed.min(limits.trust_steps)).await?;
    let ours = Keyring::new(config.state.keys()).keys(Role::Publisher)?;
    let is_ours = |t: &Trust| {
        let by_root = envelopes.last().is_some_and(|(_, envelope)| {
            let roots = roots.iter().filter(|k| t.root.keys.contains(k));
            let max = limits.trust_bytes;
            dsse::open(envelope.as_bytes(), PayloadType::Trust, roots, t.root.threshold, max).is_ok()
        });
        by_root || t.publishers.iter().any(|p| ours.iter().any(|k| k.public() == p.key))
    };
    if !walked.as_ref().and_then(TrustState::trust).is_some_and(is_ours) {
        let by_root =
            if roots.is_empty() { "" } else { ", nor is the newest signed by enough of the root keys at hand" };
        return Err(ManifestsError::Foreign(format!(
            "none of the publisher keys they name is in {}{by_root}: copy the key files there; if they are lost, make a new \
             one with `hq-publisher trust rotate --root-key FILE`; or use an empty bucket",
            config.state.keys().display()
        )));
    }
    failpoint::around("rebuild.trust", ledger.take_trust(&envelopes, clock.now())).await?;
    Ok(true)
}

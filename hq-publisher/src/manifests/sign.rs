//! Signing: what a store's manifest says, and when it is signed anew.
//!
//! Must never sign while the clock cannot be believed.

use super::error::{ManifestsError, NotPut};
use super::newest_trust;
use crate::bucket::MOST;
use crate::config::{AudienceKind, Config};
use crate::keys::{Keyring, KeysError, Role};
use crate::ledger::{Head, Ledger, LedgerError, Made, NewManifest, News, SignStore, StoreRow, StoreSeen, Token, Which};
use crate::mail;
use proto::clock::{Clock, Timestamp, after, since};
use proto::digest::{Sha256, Sha256Stream};
use proto::dsse;
use proto::ids::{Audience, DeviceId, Instance, StoreId, StreamName, TableName, Version};
use proto::keys::{PublicKey, SecretKey};
use proto::limits::Limits;
use proto::manifest::{self, Manifest, StreamEntry};
use proto::trust::{PublisherKey, Trust, sign_manifest};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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

/// Whether a publisher key is to be replaced now.
pub fn ends_soon(config: &Config, key: &PublisherKey, now: Timestamp) -> bool {
    since(key.expires_at, now) < config.alerts.key_expires.0
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
    /// Those that the settings do not name and no store of the source listed any more when a publish looked.
    over: BTreeMap<StreamName, AudienceKind>,
    /// Of the streams left out, what stores of the source list; unknown before [`Signer::drop_moved`].
    in_use: Option<BTreeSet<Instance>>,
    /// Of the streams that are over, those that stores list which were away meanwhile: known by [`Signer::moves`].
    back: BTreeSet<StreamName>,
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

/// What a signing came to.
#[derive(Debug)]
#[must_use]
pub struct Signed {
    /// The stores signed.
    pub stores: Vec<StoreId>,
    /// Those that could not be, which keeps nobody else from it.
    pub others: Result<(), ManifestsError>,
}

/// A store that is to follow another instance of a stream than its manifest lists, or that lists one of a stream that is
/// over.
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
/// their tables. When no store of the source lists one any more, it is over.
fn left_out(config: &Config, heads: &BTreeMap<Instance, Head>) -> BTreeMap<StreamName, AudienceKind> {
    unnamed(config, heads, |h| !h.retired)
}

/// Streams that the settings do not name, with their audiences.
fn unnamed(
    config: &Config,
    heads: &BTreeMap<Instance, Head>,
    of: impl Fn(&Head) -> bool,
) -> BTreeMap<StreamName, AudienceKind> {
    let mut left: Vec<_> = heads.iter().filter(|(i, h)| config.stream(&i.stream).is_none() && of(h)).collect();
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
    /// What those list that the source has.
    instances: BTreeSet<Instance>,
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
        let (mut keys, mut unusable) = (Vec::new(), Vec::new());
        for key in ring.each(Role::Publisher)? {
            key.map_or_else(|e| unusable.push(e), |key| keys.push(key));
        }
        let now = clock.now();
        // The last one in the file is the newest: a rotation under way signs with it.
        let key = trust
            .publisher_keys(now)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .find_map(|k| keys.iter().find(|f| &f.public() == k));
        let Some(key) = key.map(|f| f.key.clone()) else {
            if let Some(e) = unusable.into_iter().next() {
                return Err(e.into());
            }
            let wanted: Vec<String> = trust.publisher_keys(now).map(PublicKey::id).collect();
            return Err(KeysError::NoPublisher {
                version: trust.version,
                dir: ring.dir().to_owned(),
                wanted: if wanted.is_empty() { "none: all have expired".into() } else { wanted.join(", ") },
            }
            .into());
        };
        for e in unusable {
            tracing::warn!(error = %e, "a key file that nothing is signed with cannot be used: restore it from its backup, or delete it");
        }
        let heads = ledger.heads().await?;
        let left_out = left_out(config, &heads);
        let mut over = unnamed(config, &heads, |_| true);
        over.retain(|stream, _| !left_out.contains_key(stream));
        Ok(Signer {
            key,
            trust,
            streams: config.streams.iter().map(|s| (s.name.clone(), s.audience)).collect(),
            left_out,
            over,
            in_use: None,
            back: BTreeSet::new(),
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
    /// Mails that the key's end is near; and when another one signs.
    pub async fn mail_end(&self, config: &Config, ledger: &Ledger, clock: &dyn Clock) -> Result<(), LedgerError> {
        let own = self.trust.publishers.iter().find(|p| p.key == self.key.public());
        let text = own.filter(|p| ends_soon(config, p, clock.now())).map(|p| {
            format!(
                "Key {} may sign until {}; then nothing is published, and stores refuse what it signed. Run \
                 `hq-publisher trust rotate --root-key FILE`.",
                p.key.id(),
                p.expires_at
            )
        });
        let problem = text.as_deref().map(|text| ("The publisher key ends", text));
        mail::publish_notice(ledger, clock, "key-expires", problem).await
    }
    /// The key that signs.
    pub fn key_id(&self) -> String {
        self.key.public().id()
    }

    /// The streams that manifests list though the settings do not name them, and for whom their instances are.
    pub fn left_out(&self) -> impl Iterator<Item = (&StreamName, AudienceKind)> {
        self.left_out.iter().map(|(name, kind)| (name, *kind))
    }
    /// Those of them that stores of the source list.
    pub fn left_in_use(&self) -> impl Iterator<Item = (&StreamName, AudienceKind)> {
        self.left_out().filter(|(stream, _)| self.is_in_use(stream))
    }
    fn is_in_use(&self, left: &StreamName) -> bool {
        let listed = |those: &BTreeSet<Instance>| those.iter().any(|i| &i.stream == left);
        self.left_out.contains_key(left) && self.in_use.as_ref().is_none_or(listed)
    }
    /// The streams that are over, and that stores list which were away meanwhile: they come over as all others did.
    pub fn back(&self) -> impl Iterator<Item = &StreamName> {
        self.back.iter()
    }
    /// Manifests list a stream that the settings do not name no longer; gives whether they could.
    pub fn drop_stream(&mut self, stream: &StreamName) -> bool {
        let was_left = self.left_out.remove(stream).is_some();
        self.over.remove(stream).is_some() || was_left
    }
    /// Signs nothing for stores whose last manifest cannot be put now: it may have been overtaken, and the next would hide it.
    pub fn leave(&mut self, stores: BTreeSet<StoreId>) {
        self.waiting = stores;
    }
    /// Whether some stores are left out.
    pub fn leaves_some(&self) -> bool {
        !self.waiting.is_empty()
    }
    fn over(&self) -> impl Iterator<Item = (&StreamName, AudienceKind)> {
        self.over.iter().map(|(name, kind)| (name, *kind))
    }
    fn all_streams(&self) -> impl Iterator<Item = (&StreamName, AudienceKind)> {
        self.streams.iter().map(|(name, kind)| (name, *kind)).chain(self.left_out())
    }

    /// The streams left out that have a table which is published by another one now.
    async fn taken_over(&self, ledger: &Ledger) -> Result<BTreeSet<StreamName>, ManifestsError> {
        if self.left_out.is_empty() {
            return Ok(BTreeSet::new());
        }
        let heads = ledger.heads().await?;
        let now = tables_of(&heads, |s| self.streams.iter().any(|(name, _)| name == s));
        let is_moved = |s: &&StreamName| !tables_of(&heads, |of| of == *s).is_disjoint(&now);
        Ok(self.left_out.keys().filter(is_moved).cloned().collect())
    }

    /// Who lists these streams.
    async fn listed(
        &self,
        ledger: &Ledger,
        streams: impl IntoIterator<Item = StreamName>,
    ) -> Result<BTreeMap<StreamName, ListedBy>, ManifestsError> {
        let mut listed: BTreeMap<_, ListedBy> = streams.into_iter().map(|s| (s, ListedBy::default())).collect();
        if listed.is_empty() {
            return Ok(listed);
        }
        let mut look = |s: &SignStore<'_>| {
            if s.row.serial == 0 {
                return Ok(Made::Unchanged);
            }
            let Some(list) = self.previous(s)? else { return Ok(Made::NeedsPrevious) };
            for (stream, by) in &mut listed {
                let Some(instance) = list.instance(stream) else { continue };
                if s.row.vanished_at.is_some() {
                    by.away.push(s.row.seen.id.clone());
                } else {
                    by.stores.push(s.row.seen.id.clone());
                    by.instances.insert(instance);
                }
            }
            Ok(Made::Unchanged)
        };
        ledger.look(&mut look).await?;
        Ok(listed)
    }

    /// The streams left out that have a table which is published by another one now, and those that are over and that a
    /// store lists which came back: each with who lists it still.
    pub async fn moved(&self, ledger: &Ledger) -> Result<BTreeMap<StreamName, ListedBy>, ManifestsError> {
        let moved = self.taken_over(ledger).await?;
        self.listed(ledger, moved.into_iter().chain(self.back.iter().cloned())).await
    }

    /// Looks who lists the streams left out, and lets go of those that others took over and no store of the source lists any
    /// more. Stores that are away keep them on their lists, and when they come back until the others are there for them.
    pub async fn drop_moved(&mut self, ledger: &Ledger) -> Result<(), ManifestsError> {
        let moved = self.taken_over(ledger).await?;
        let listed = self.listed(ledger, self.left_out.keys().cloned()).await?;
        for (stream, _) in listed.iter().filter(|(s, by)| moved.contains(*s) && by.stores.is_empty()) {
            self.over.extend(self.left_out.remove_entry(stream));
        }
        self.in_use = Some(listed.into_values().flat_map(|by| by.instances).collect());
        Ok(())
    }

    /// The stores that are to follow another instance of a stream than their manifests list, or list what is over.
    pub async fn moves(&mut self, ledger: &Ledger, told: &[StoreSeen]) -> Result<Vec<Move>, ManifestsError> {
        let told: BTreeMap<&StoreId, &StoreSeen> = told.iter().map(|s| (&s.id, s)).collect();
        let (mut hashes, mut moves, mut back) = (HeadHashes::default(), Vec::new(), BTreeSet::new());
        let mut look = |s: &SignStore<'_>| {
            let Some(seen) = told.get(&s.row.seen.id).filter(|_| s.row.serial > 0) else { return Ok(Made::Unchanged) };
            let row = StoreRow { seen: (*seen).clone(), vanished_at: None, ..s.row.clone() };
            let s = SignStore { row: &row, ..*s };
            let Some(before) = self.previous(&s)? else {
                let same = self.lists_what_it_follows(&s, &mut hashes)?;
                return Ok(if same { Made::Unchanged } else { Made::NeedsPrevious });
            };
            for (name, kind) in self.all_streams().chain(self.over()) {
                let Some(from) = before.instance(name).filter(|i| s.heads.contains_key(i)) else { continue };
                let to = followed(name, kind, seen);
                let is_over = self.over.contains_key(name);
                if is_over {
                    back.insert(name.clone());
                }
                if is_over || to.as_ref() != Some(&from) {
                    moves.push(Move { store: seen.id.clone(), from, to });
                }
            }
            Ok(Made::Unchanged)
        };
        ledger.look(&mut look).await?;
        self.back = back;
        Ok(moves)
    }

    /// **The commit point of a publish**: makes each staged publication its instance's head, retires heads, and signs
    /// a manifest for each store whose content changed (or whose manifest is due to be signed anew),
    /// in one transaction.
    pub async fn sign_all(
        &self,
        ledger: &Ledger,
        token: Token,
        news: News<'_>,
        moves: Moves<'_>,
        clock: &dyn Clock,
    ) -> Result<Signed, ManifestsError> {
        self.sign(ledger, Some(token), news, Which::All, moves, clock).await
    }

    /// Signs what is due, without the lease: manifests that are old, of another key or epoch, or whose
    /// devices changed. What was overtaken, and what was signed and could not be put yet, which may be, is left to people.
    pub async fn sign_due(&self, ledger: &Ledger, clock: &dyn Clock) -> Result<Signed, ManifestsError> {
        self.sign(ledger, None, News::default(), Which::All, Moves::None, clock).await
    }

    /// Signs one store's manifest (after `enroll` or `revoke`), without the lease.
    pub async fn sign_one(&self, ledger: &Ledger, store: &StoreId, clock: &dyn Clock) -> Result<(), ManifestsError> {
        self.sign(ledger, None, News::default(), Which::Only(store), Moves::None, clock).await?.others
    }

    async fn sign(
        &self,
        ledger: &Ledger,
        token: Option<Token>,
        news: News<'_>,
        which: Which<'_>,
        moves: Moves<'_>,
        clock: &dyn Clock,
    ) -> Result<Signed, ManifestsError> {
        // Time is never before what a publisher key signed.
        let clock = clock.now();
        let now = ledger.latest_time().await?.map_or(clock, |t| t.max(clock));
        let mut heads = HeadHashes::default();
        let by_itself = token.is_none() && matches!(which, Which::All);
        let is_left = |s: &StoreRow| {
            self.waiting.contains(&s.seen.id) || by_itself && (s.is_overtaken() || s.put_serial < s.serial)
        };
        let (mut too_long, max) = (Vec::new(), self.limits.manifest_bytes);
        let mut make = |s: &SignStore<'_>| {
            let made = if is_left(s.row) { Made::Unchanged } else { self.make(s, now, moves, &mut heads)? };
            match &made {
                // It keeps its last one.
                Made::New(m) if m.envelope.len() as u64 > max => {
                    too_long.push(NotPut::too_long(&s.row.seen.id, m.envelope.len() as u64, max));
                    Ok(Made::Unchanged)
                }
                _ => Ok(made),
            }
        };
        let stores = ledger.sign(token, news, which, self.trust.version, now, &mut make).await?;
        let others = if too_long.is_empty() { Ok(()) } else { Err(ManifestsError::NotPut(too_long)) };
        Ok(Signed { stores, others })
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

    /// The store's last manifest, where it was asked for. It is ours: a limit that was lowered since says nothing of it.
    fn previous(&self, s: &SignStore<'_>) -> Result<Option<Manifest>, String> {
        let read = |e: &str| dsse::peek(e.as_bytes(), MOST);
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
        if s.row.vanished_at.is_some() || before.is_some() && matches!(moves, Moves::None) {
            return self.as_before(s, before);
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
        let of_settings = self.streams.iter().map(|(name, kind)| (name, *kind)).filter_map(wanted).collect();
        // One that the settings lost is listed by those that list it, and by new stores while others do.
        let is_listed = |name: &StreamName| match s.row.serial {
            0 => self.is_in_use(name),
            _ => before.is_some_and(|m| m.streams.contains_key(name)),
        };
        let left = self.left_out().chain(self.over()).filter(|(name, _)| is_listed(name)).filter_map(wanted).collect();
        self.beside_left(s, before, of_settings, left)
    }

    /// What the last manifest lists, but for streams that the settings lost and others replace. Rather one table by two
    /// streams than none: its registers keep what they have, and tell of the other.
    fn as_before(&self, s: &SignStore<'_>, before: Option<&Manifest>) -> Vec<Instance> {
        let last = before.into_iter().flat_map(Manifest::instances).map(|(i, _)| i);
        let (mut known, dropped): (Vec<Instance>, Vec<_>) = last
            .filter(|i| s.heads.contains_key(i))
            .partition(|i| self.streams.iter().any(|(name, _)| name == &i.stream));
        let now: BTreeSet<&TableName> = known.iter().flat_map(|i| tables_at(s, i)).collect();
        known.extend(dropped.into_iter().filter(|i| !tables_at(s, i).is_subset(&now)));
        known
    }

    /// Of the instances of the settings' streams and of those left out, what can be listed together. No reader can hold a
    /// table by two streams: one left out goes over when all of its tables are there, or to one that was listed before
    /// without them, for that one has others.
    fn beside_left(
        &self,
        s: &SignStore<'_>,
        before: Option<&Manifest>,
        mut instances: Vec<Instance>,
        left: Vec<Instance>,
    ) -> Vec<Instance> {
        let listed = |i: &Instance| before.and_then(|m| m.streams.get(&i.stream));
        // What is over has only a store that comes back: it waits for each table that is somebody's. What nobody has any
        // more went while it was away.
        let is_over = |i: &Instance| self.over.contains_key(&i.stream);
        let all = if left.iter().any(is_over) {
            tables_of(s.heads, |stream| !self.over.contains_key(stream))
        } else {
            BTreeSet::new()
        };
        let goes = |left: &Instance, instances: &[Instance]| {
            let mut its = tables_at(s, left);
            its.retain(|t| !is_over(left) || all.contains(t));
            let theirs: Vec<_> = instances.iter().filter(|i| !tables_at(s, i).is_disjoint(&its)).collect();
            let there: BTreeSet<&TableName> = theirs.iter().flat_map(|i| tables_at(s, i)).collect();
            let takes = |i: &&Instance| match listed(i) {
                Some(before) => !is_over(left) && before.digests.keys().all(|t| !its.contains(t)),
                // A new store has what its neighbours have.
                None => s.row.serial == 0 && self.in_use.as_ref().is_some_and(|those| !those.contains(left)),
            };
            its.is_subset(&there) || theirs.iter().any(takes)
        };
        // What was listed with it stays, as in `as_before`.
        let is_in_the_way =
            |i: &Instance, left: &Instance| listed(i).is_none() && !tables_at(s, i).is_disjoint(&tables_at(s, left));
        while let Some(stays) =
            left.iter().find(|l| !goes(l, &instances) && instances.iter().any(|i| is_in_the_way(i, l)))
        {
            instances.retain(|i| !is_in_the_way(i, stays));
        }
        let stay: Vec<Instance> = left.into_iter().filter(|l| !goes(l, &instances)).collect();
        instances.extend(stay);
        instances
    }

    fn build(&self, s: &SignStore<'_>, instances: &[Instance], now: Timestamp) -> Result<Manifest, String> {
        let listed = |i: &Instance| Some((i.stream.clone(), entry(i, s.heads.get(i)?, instances)));
        let streams = instances.iter().filter_map(listed).collect();
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
            unread: BTreeMap::new(),
        })
    }
}

/// Whether an instance has a version whose rows are kept up to date.
fn is_fresh(s: &SignStore<'_>, instance: &Instance) -> bool {
    s.heads.get(instance).is_some_and(|head| !head.retired)
}

/// The tables of an instance's head.
fn tables_at<'s>(s: &SignStore<'s>, instance: &Instance) -> BTreeSet<&'s TableName> {
    s.heads.get(instance).into_iter().flat_map(|head| head.digests.keys()).collect()
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

/// What a list with these instances says of one.
fn entry(instance: &Instance, head: &Head, listed: &[Instance]) -> StreamEntry {
    let is_listed = |(i, _): &(&Instance, &Version)| listed.contains(i);
    StreamEntry {
        audience: instance.audience.clone(),
        version: head.version,
        schema: head.schema,
        digests: head.digests.clone(),
        packs: head.packs.clone(),
        requires: head.requires.iter().filter(is_listed).map(|(i, v)| (i.stream.clone(), *v)).collect(),
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
        let entry = entry(instance, head, &[]);
        let mut json = serde_json::to_vec(&entry).map_err(|e| e.to_string())?;
        // Of these a list has those that it has the instances of, which are part of its hash, too.
        if !head.requires.is_empty() {
            serde_json::to_writer(&mut json, &head.requires).map_err(|e| e.to_string())?;
        }
        // A size that readers may refuse is refused when the pack is made.
        check_as_readers_do(instance, entry, &limits.for_published())?;
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
        unread: BTreeMap::new(),
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

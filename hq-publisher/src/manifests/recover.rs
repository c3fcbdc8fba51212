//! Taking over from the bucket what a ledger does not know: a new machine, a ledger lost or set back.
//!
//! Only what today's keys signed in today's epoch is believed, and a trust file only by the one before it.

use super::{ManifestsError, newest_trust, parse_trust};
use crate::bucket::{BucketError, Buckets, MOST};
use crate::config::Config;
use crate::keys::{Keyring, Role};
use crate::ledger::{Adopted, FoundList, Head, Ledger, LedgerError, StoreRow, TakenOver, Token};
use proto::clock::{Clock, Timestamp};
use proto::dsse::{self, PayloadType};
use proto::failpoint;
use proto::ids::{Audience, DeviceId, Instance, StoreId, Version};
use proto::keys::PublicKey;
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::manifest::{Manifest, StreamEntry};
use proto::trust::{Trust, TrustState};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// A head that the manifests in the bucket tell of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundHead {
    /// Its entry in a manifest.
    pub entry: StreamEntry,
    /// What all manifests that have it at that version say that it requires: stores may follow other instances.
    pub requires: BTreeMap<Instance, Version>,
    /// The manifest's epoch.
    pub epoch: u64,
    /// When the manifest was signed.
    pub signed_at: Timestamp,
}

impl FoundHead {
    /// As the ledger has it.
    pub fn to_head(&self) -> Head {
        let StreamEntry { version, schema, digests, packs, .. } = self.entry.clone();
        let (requires, signed_at) = (self.requires.clone(), self.signed_at);
        Head { version, epoch: self.epoch, schema, digests, packs, requires, signed_at, retired: false }
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
        let Some(envelope) = buckets.get(&name, MOST).await? else { continue };
        // Expired ones count: only the numbers in them are asked for.
        let opened = dsse::open(&envelope, PayloadType::Manifest, &signers, 1, MOST);
        let manifest = opened
            .map_err(|e| e.to_string())
            .and_then(|p| Manifest::for_reader(&p, &limits.for_published()).map_err(|e| e.to_string()));
        let mut manifest = match manifest {
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
        // The next list of the store would be without it.
        if let Some((stream, reason)) = manifest.unread.pop_first() {
            return Err(ManifestsError::Unread { store, stream, reason });
        }
        for (instance, entry) in manifest.instances() {
            let requires = entry.requires.iter().filter_map(|(stream, v)| Some((manifest.instance(stream)?, *v)));
            match found.heads.get_mut(&instance) {
                Some(known) if known.entry.version > entry.version => {}
                Some(known) if known.entry.version == entry.version => known.requires.extend(requires),
                _ => {
                    let (entry, requires) = (entry.clone(), requires.collect());
                    let (epoch, signed_at) = (manifest.epoch, manifest.created_at);
                    found.heads.insert(instance, FoundHead { entry, requires, epoch, signed_at });
                }
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
pub(super) fn foreign_if_too_long(e: BucketError) -> ManifestsError {
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

//! What the bucket has that is newer than the ledger: another ledger signs by the same keys, ours was set back, or
//! somebody has a key.
//!
//! Owns how that is found and told. Must never change what the ledger holds of devices or versions by it.

use super::error::{ManifestsError, NotPut, gather};
use super::newest_trust;
use super::recover::foreign_if_too_long;
use crate::bucket::{Buckets, MOST};
use crate::ledger::{DeviceRow, Ledger, LedgerError, SERIAL_REACH, StoreRow, ToPut};
use crate::mail;
use crate::some::some;
use futures_util::stream::{self, StreamExt};
use proto::clock::Clock;
use proto::dsse::{self, PayloadType};
use proto::ids::{DeviceId, StoreId};
use proto::keys::PublicKey;
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::manifest::Manifest;
use proto::trust::TrustState;
use std::collections::{BTreeMap, BTreeSet};

/// A store of which the bucket has another manifest of ours than the ledger's, and none that is older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overtaken {
    /// Whose.
    pub store: StoreId,
    /// The serial there.
    pub found: u64,
    /// The newest serial that the ledger has or knows of.
    pub ours: u64,
    /// Devices that it names and the ledger does not, or the other way round; for people.
    pub devices: Vec<String>,
}

impl Overtaken {
    /// No ledger of ours came so far, and a serial is not to be had above each.
    pub fn is_out_of_reach(&self) -> bool {
        self.found.saturating_sub(self.ours) > SERIAL_REACH
    }
}

pub(super) fn told(all: &[Overtaken]) -> String {
    let (what, above) = match all {
        [one] => {
            let Overtaken { store, found, ours, .. } = one;
            let what = format!("manifest {found} of store {store}, signed by our key, where the ledger has {ours}");
            (what, found.to_string())
        }
        all => {
            let stores = all.iter().map(|o| format!("store {}: {} for {}", o.store, o.found, o.ours));
            let what = format!(
                "manifests of {} stores, signed by our key, where the ledger has older ones ({})",
                all.len(),
                some(stores, ", ")
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
    // What was done here after that list was signed it cannot know: the command that found it, for one.
    let signed_at = manifest.created_at;
    let is_later = |d: &DeviceRow| d.enrolled_at > signed_at || d.revoked_at.is_some_and(|t| t > signed_at);
    let later: BTreeSet<DeviceId> = ours.iter().filter(|d| is_later(d)).map(|d| d.id.clone()).collect();
    theirs.retain(|id, _| !later.contains(id));
    ours.retain(|d| d.revoked_at.is_none() && !later.contains(&d.id));
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
        match check_newer(ledger, buckets).await {
            Err(ManifestsError::Overtaken(all)) => newer.extend(all.iter().map(line)),
            other => other?,
        }
    }
    Ok(newer)
}

fn line(one: &Overtaken) -> String {
    let Overtaken { store, found, ours, devices } = one;
    let devices = devices.iter().map(|d| format!(" ({d})")).collect::<String>();
    format!("the manifest of store {store} is {found} there and {ours} here{devices}")
}

/// Fails where the bucket holds manifests of ours that are newer than the ledger knows, also of stores that it does not know;
/// all of them. Only looks.
pub async fn check_newer(ledger: &Ledger, buckets: &Buckets) -> Result<(), ManifestsError> {
    let looks = stream::iter(buckets.list_stores().await?)
        .map(|store| async move { check_store(ledger, buckets, &store).await.map_err(|e| NotPut::of(&store, e)) });
    let mut failed = None;
    for look in looks.buffered(buckets.concurrency()).collect::<Vec<_>>().await {
        if let Err(e) = look {
            failed = Some(gather(failed, e));
        }
    }
    failed.map_or(Ok(()), Err)
}

async fn check_store(ledger: &Ledger, buckets: &Buckets, store: &StoreId) -> Result<(), ManifestsError> {
    // The bucket first: what is put after this look is in the ledger already.
    let Some(there) = buckets.get(&ObjectName::Manifest(store.clone()), MOST).await? else { return Ok(()) };
    let Ok(claim) = dsse::peek::<Claim>(&there, MOST) else { return Ok(()) };
    let row = ledger.store(store).await?;
    let ours = row.as_ref().map_or(0, StoreRow::known_serial);
    let is_told = row.is_some_and(|s| s.is_overtaken());
    let last = ledger.manifest(store).await?.filter(|last| !is_told && last.serial == claim.serial);
    let is_newer = claim.serial > ours
        || last.is_some_and(|last| there != last.envelope.as_bytes())
        || ledger.passed_over(store, claim.serial).await?;
    if claim.store != *store || !is_newer || !signed_by_us(ledger, &there, claim.epoch).await? {
        return Ok(());
    }
    let devices = devices_that_differ(ledger, &there, store).await?;
    Err(ManifestsError::Overtaken(vec![Overtaken { store: store.clone(), found: claim.serial, ours, devices }]))
}

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

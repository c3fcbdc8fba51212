//! Following HQ from whatever sources there are: trust file by trust file, then the manifest, then
//! packs. A relay, a register and an import all go through here, so that nobody checks less.
//!
//! What a step has checked is saved before the next begins; if the power goes, the next refresh
//! begins from the last whole state.

use crate::clock::Clock;
use crate::device::{Device, DeviceError};
use crate::dsse::DsseError;
use crate::fetch::{Etag, FetchError, RateFloor, Small, Source, Want};
use crate::layout::{ObjectName, PackName};
use crate::limits::Limits;
use crate::manifest::PackEntry;
use crate::retry::Verdict;
use crate::trust::{Accepted, Refusal, TrustState, Verified, accept_manifest};
use bytes::Bytes;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Why a source gave no newer manifest.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It could not be read.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// What it holds was refused.
    #[error("{object} from {source_url}: {refusal}")]
    Refused {
        /// The source, without credentials.
        source_url: String,
        /// The object.
        object: ObjectName,
        /// Why.
        refusal: Refusal,
    },
    /// This device's own memory failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl FollowError {
    /// A stable name of the reason.
    pub fn code(&self) -> &'static str {
        match self {
            FollowError::Fetch(_) => "SOURCE",
            FollowError::Refused { refusal, .. } => refusal.code(),
            FollowError::Device(_) => "DEVICE",
        }
    }
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        match self {
            FollowError::Fetch(e) => e.verdict(),
            FollowError::Refused { .. } => Verdict::Retry,
            FollowError::Device(e) => e.verdict(),
        }
    }
}

/// What a refresh brought.
#[derive(Debug, Default)]
pub struct Refreshed {
    /// Whether a newer manifest was accepted.
    pub changed: bool,
    /// Sources that answered, with news or without.
    pub reached: usize,
    /// Trust files walked: version and envelope, to be served on.
    pub trust: Vec<(u64, Bytes)>,
    /// Sources that failed or were refused.
    pub problems: Vec<FollowError>,
}

/// A reader of one or more sources.
#[derive(Debug)]
pub struct Follower {
    sources: Vec<Source>,
    /// The manifest accepted last from each source.
    etags: Vec<Option<Etag>>,
}

/// A device shared between tasks; a panic elsewhere leaves its durable state whole.
pub fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Follower {
    /// Reads these sources, in order of preference.
    pub fn new(sources: Vec<Source>) -> Self {
        let etags = sources.iter().map(|_| None).collect();
        Follower { sources, etags }
    }

    /// The sources.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Asks every source for the device's manifest and accepts the highest valid serial. `hint` is
    /// a serial heard of elsewhere, to get past a stale cache.
    pub async fn refresh(
        &mut self,
        device: &Mutex<Device>,
        clock: &dyn Clock,
        limits: &Limits,
        hint: Option<u64>,
    ) -> Refreshed {
        let mut out = Refreshed::default();
        for (source, etag) in self.sources.iter().zip(&mut self.etags) {
            match refresh_from(source, etag, device, clock, limits, hint, &mut out.trust).await {
                Ok((changed, problem)) => {
                    out.reached += 1;
                    out.changed |= changed;
                    out.problems.extend(problem);
                }
                Err(e) => {
                    out.reached += usize::from(matches!(e, FollowError::Refused { .. }));
                    out.problems.push(e);
                }
            }
        }
        out
    }

    /// Gets a pack from the first source that has it right; the part is whole and verified then.
    /// `skip` leaves a source out by its URL. The errors are one a source tried.
    pub async fn fetch_pack(
        &self,
        name: &PackName,
        entry: &PackEntry,
        part: &Path,
        floor: &RateFloor,
        skip: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<(), Vec<FetchError>> {
        let want = Want { bytes: entry.bytes, sha256: entry.sha256 };
        let mut errors = Vec::new();
        for source in self.sources.iter().filter(|s| !skip(s.url())) {
            match source.download(&name.clone().into(), &want, part, floor, &mut |_| {}).await {
                Ok(()) => return Ok(()),
                Err(e) => errors.push(e),
            }
        }
        Err(errors)
    }
}

/// One source: manifest → trust, if the manifest is new → accept → save. Whether the manifest is newer, and what is
/// wrong all the same.
async fn refresh_from(
    source: &Source,
    etag: &mut Option<Etag>,
    device: &Mutex<Device>,
    clock: &dyn Clock,
    limits: &Limits,
    hint: Option<u64>,
    walked: &mut Vec<(u64, Bytes)>,
) -> Result<(bool, Option<FollowError>), FollowError> {
    let (store, mut trust) = {
        let d = lock(device);
        (d.id().store().clone(), d.trust().clone())
    };
    let object = ObjectName::Manifest(store.clone());
    let (bytes, new_etag) = match source.get_small(&object, hint, etag.as_ref(), limits.manifest_bytes).await? {
        Small::Unchanged => return Ok((false, None)),
        Small::Body { bytes, etag } => (bytes, etag),
    };
    let whole = walk(source, &mut trust, limits, walked).await;
    let mut d = lock(device);
    // Also where the walk broke off: what was revoked on the way stays so.
    if trust.version() > d.trust().version() {
        d.save(&trust, None)?;
    } else {
        // Another source, read at the same time, has led as far or further: trust never goes back.
        trust = d.trust().clone();
    }
    // A pointer that says nothing hides no more than an old one could: the list is judged by what is known.
    let unread = match whole {
        Err(e) if is_no_pointer(&e) => Some(e),
        whole => whole.map(|()| None)?,
    };
    let accepted: Accepted = match accept_manifest(&bytes, &store, &trust, d.seen(), clock.now(), limits) {
        Ok(accepted) => accepted,
        Err(refusal) => {
            let refused = || FollowError::Refused { source_url: source.url().to_owned(), object, refusal };
            return Err(unread.unwrap_or_else(refused));
        }
    };
    // A newer trust file may read the same list otherwise.
    let changed = !accepted.again || d.manifest().map(Verified::get) != Some(accepted.manifest.get());
    if changed {
        d.save(&trust, Some(&accepted))?;
    }
    // The walk is tried again by the next look.
    if unread.is_none() {
        *etag = new_etag;
    }
    Ok((changed, unread))
}

/// Whether it is `trust.json` that cannot be read: nobody signed what that says.
fn is_no_pointer(e: &FollowError) -> bool {
    let FollowError::Refused { object: ObjectName::Trust, refusal, .. } = e else { return false };
    matches!(refusal, Refusal::Envelope(DsseError::NotAnEnvelope(_)))
}

/// Walks the trust files from what is known to what `trust.json` claims, as far as they are good.
async fn walk(
    source: &Source,
    trust: &mut TrustState,
    limits: &Limits,
    walked: &mut Vec<(u64, Bytes)>,
) -> Result<(), FollowError> {
    let refused =
        |object: ObjectName, refusal| FollowError::Refused { source_url: source.url().to_owned(), object, refusal };
    let Small::Body { bytes, .. } = source.get_small(&ObjectName::Trust, None, None, limits.trust_bytes).await? else {
        return Ok(());
    };
    let claimed = TrustState::claimed_version(&bytes, limits).map_err(|r| refused(ObjectName::Trust, r))?;
    for n in trust.steps_to(claimed, limits).map_err(|r| refused(ObjectName::Trust, r))? {
        let object = ObjectName::TrustVersion(n);
        let Small::Body { bytes, .. } = source.get_small(&object, None, None, limits.trust_bytes).await? else { break };
        *trust = trust.step(&bytes, limits).map_err(|r| refused(object, r))?;
        walked.push((n, bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

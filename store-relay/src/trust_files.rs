//! The trust files in `ok/`, by which registers walk to the newest. Registers judge them for themselves: one that
//! rotted here, or came bent, would lock them out. So what is served is right by its own roots and leads to the next,
//! up to the one that `device.db` trusts. If the power goes, the next start looks at all of them again.

use crate::relay::Relay;
use crate::shelves::{Room, is_exhausted};
use bytes::Bytes;
use proto::fetch::{Small, Source};
use proto::follow;
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::shelf::{self, ShelfError};
use proto::trust::TrustState;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

const ROTTEN: &str = "its bytes in ok/ are not what headquarters signed; it comes anew";

/// What no source had is asked for again with the next list, or after so long: a bucket may have lost it for good.
const AGAIN: Duration = Duration::from_secs(600);

/// Trust files by their numbers.
type Chain = BTreeMap<u64, Bytes>;

/// What a relay knows of them.
#[derive(Debug, Default)]
pub(crate) struct TrustFiles {
    /// Those that are served.
    served: Chain,
    /// Those that the latest looks found damaged.
    rotten: Vec<ObjectName>,
    /// When each source was last asked for what is missing, by the monotonic clock.
    asked: BTreeMap<String, Duration>,
}

impl Relay {
    fn known_trust(&self) -> MutexGuard<'_, TrustFiles> {
        self.trust_files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn newest_trust(&self) -> TrustState {
        follow::lock(&self.hall.device).trust().clone()
    }

    fn has_all_trust(&self, newest: u64) -> bool {
        let known = self.known_trust();
        (1..=newest).all(|n| known.served.contains_key(&n))
    }

    /// Whether a file up to the newest is missing, and one of the sources may be asked again.
    pub(crate) fn lacks_trust(&self, newest: u64, sources: &[Source]) -> bool {
        let now = self.hall.clock.monotonic();
        let is_due = |known: &TrustFiles, source: &Source| {
            known.asked.get(source.url()).is_none_or(|at| now.saturating_sub(*at) >= AGAIN)
        };
        !self.has_all_trust(newest) && sources.iter().any(|source| is_due(&self.known_trust(), source))
    }

    /// Makes what is served, and what lies in `ok/`, agree with what `device.db` trusts. What is damaged there is
    /// written anew where this relay has it still.
    pub(crate) fn order_trust(&self) -> Result<(), ShelfError> {
        let (hall, newest) = (&self.hall, self.newest_trust());
        let (limits, last) = (&hall.config.limits, newest.version());
        // 1. What the disk has. A number above the newest's is of a time that this device does not know: left alone.
        let mut there = BTreeMap::new();
        for (n, path) in hall.shelves.trust_files()?.into_iter().filter(|(n, _)| (1..=last).contains(n)) {
            there.insert(n, read(&path, limits)?);
        }
        let path = hall.shelves.path(Room::Ok, &ObjectName::Trust);
        let has_head = std::fs::symlink_metadata(&path).is_ok();
        let head = read(&path, limits)?;
        // 2. What is served: what was judged before, else what the disk has; of the newest there is a second copy.
        let (served, pointer) = {
            let mut known = self.known_trust();
            let mut found: Chain = there.iter().filter_map(|(n, bytes)| Some((*n, bytes.clone()?))).collect();
            found.append(&mut known.served);
            let copies = [found.remove(&last), head.clone()].into_iter().flatten();
            let copies: Vec<Bytes> = copies.filter(|bytes| is_newest(bytes, &newest, limits)).collect();
            // A signature that is gone shows only by the file before it.
            let before = last.checked_sub(1).and_then(|n| Some((n, found.get(&n)?)));
            let fits = |bytes: &&Bytes| before.is_none_or(|(n, file)| leads(n, file, Some(bytes), limits));
            let newest = copies.iter().find(fits).or(copies.first()).cloned();
            found.extend(newest.clone().map(|bytes| (last, bytes)));
            known.served = links(&found, limits);
            for n in found.into_keys().chain([last]).filter(|n| !known.served.contains_key(n)) {
                hall.objects.remove(&ObjectName::TrustVersion(n));
            }
            // Without the newest the one before it: registers go on, as far as they know.
            let pointer = newest.or_else(|| known.served.values().next_back().cloned());
            (known.served.clone(), pointer)
        };
        for (n, bytes) in &served {
            hall.objects.put_small(ObjectName::TrustVersion(*n), bytes.clone());
        }
        match &pointer {
            Some(bytes) => hall.objects.put_small(ObjectName::Trust, bytes.clone()),
            None => hall.objects.remove(&ObjectName::Trust),
        }
        // 3. The disk is made to agree.
        for (n, bytes) in &there {
            if bytes.is_none() || bytes.as_ref() != served.get(n) {
                self.drop_rotten_trust(ObjectName::TrustVersion(*n))?;
            }
        }
        // An older one is there where the power went before the newest was written.
        let is_ours = |bytes: &Bytes| Some(bytes) == pointer.as_ref() || served.values().any(|s| s == bytes);
        let is_later = |bytes: &Bytes| TrustState::claimed_version(bytes, limits).is_ok_and(|n| n > last);
        if has_head && !head.is_some_and(|bytes| is_ours(&bytes) || is_later(&bytes)) {
            self.drop_rotten_trust(ObjectName::Trust)?;
        }
        for (n, bytes) in &served {
            hall.shelves.put_small(&ObjectName::TrustVersion(*n), bytes)?;
        }
        pointer.map_or(Ok(()), |bytes| hall.shelves.put_small(&ObjectName::Trust, &bytes))
    }

    fn drop_rotten_trust(&self, name: ObjectName) -> Result<(), ShelfError> {
        let path = self.hall.shelves.path(Room::Ok, &name);
        // One that cannot be removed is told once.
        if !self.known_trust().rotten.contains(&name) {
            tracing::error!(object = %name, "{ROTTEN}");
            self.hall.event("BIT_ROT", &name.to_string(), ROTTEN);
            self.known_trust().rotten.push(name);
        }
        shelf::remove(&path)
    }

    /// Looks at all of them again; those found damaged now, or by the start.
    pub(crate) async fn verify_trust(&self) -> Result<Vec<ObjectName>, ShelfError> {
        let _one = self.adopting.lock().await;
        self.order_trust().inspect_err(|e| self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string()))?;
        Ok(std::mem::take(&mut self.known_trust().rotten))
    }

    /// Puts one that was checked into `ok/`, and serves it.
    pub(crate) fn put_trust(&self, n: u64, newest: bool, bytes: &Bytes) -> Result<(), ShelfError> {
        let names = [Some(ObjectName::TrustVersion(n)), newest.then_some(ObjectName::Trust)];
        for name in names.into_iter().flatten() {
            self.hall.shelves.put_small(&name, bytes)?;
            self.hall.objects.put_small(name, bytes.clone());
        }
        self.known_trust().served.insert(n, bytes.clone());
        Ok(())
    }

    /// Gets what is missing: registers enrolled before this relay walk files that it never had to read, and damaged
    /// ones are gone.
    pub(crate) async fn fill_trust(&self, sources: &[Source]) -> Result<(), ShelfError> {
        self.order_trust()?;
        self.known_trust().rotten.clear();
        let newest = self.newest_trust();
        for source in sources {
            if self.has_all_trust(newest.version()) {
                break;
            }
            let chain = self.chain_of(source, &newest).await;
            let unbroken = {
                let mut known = self.known_trust();
                known.asked.insert(source.url().to_owned(), self.hall.clock.monotonic());
                (1..=newest.version()).rev().take_while(|n| known.served.contains_key(n)).count()
            };
            // What leads no farther than what is served may be what rotted.
            for (n, bytes) in chain.iter().filter(|_| chain.len() > unbroken) {
                self.put_trust(*n, *n == newest.version(), bytes)?;
            }
        }
        Ok(())
    }

    /// From the newest down, as far as each leads to the next: the source's files, ours where it has none that does.
    /// All of them, for of two that do not fit it does not show which is the wrong one.
    async fn chain_of(&self, source: &Source, newest: &TrustState) -> Chain {
        let limits = &self.hall.config.limits;
        let mut chain = Chain::new();
        for n in (1..=newest.version()).rev() {
            let theirs = match source.get_small(&ObjectName::TrustVersion(n), None, None, limits.trust_bytes).await {
                Ok(Small::Body { bytes, .. }) => Some(bytes),
                Err(e) if !e.is_not_found() => break,
                _ => None,
            };
            let ours = self.known_trust().served.get(&n).cloned();
            let belongs = |bytes: &Bytes| match chain.first_key_value() {
                Some((_, next)) => leads(n, bytes, Some(next), limits),
                None => is_newest(bytes, newest, limits),
            };
            let Some(bytes) = [theirs, ours].into_iter().flatten().find(belongs) else { break };
            chain.insert(n, bytes);
        }
        chain
    }
}

/// A file's bytes; none where it cannot be read. A machine that is short of something says nothing of the file.
fn read(path: &Path, limits: &Limits) -> Result<Option<Bytes>, ShelfError> {
    match shelf::read_bounded(path, limits.trust_bytes) {
        Ok(bytes) => Ok(Some(bytes.into())),
        Err(e) if is_exhausted(&e.source) => Err(e),
        Err(_) => Ok(None),
    }
}

/// Whether it is the file that was checked last; right after an enrolment, one of its number.
fn is_newest(bytes: &[u8], newest: &TrustState, limits: &Limits) -> bool {
    TrustState::of_file(newest.version(), bytes, limits).is_ok_and(|file| newest.trust().is_none() || &file == newest)
}

/// Whether a file is right by its own roots, and by these the next one.
fn leads(n: u64, bytes: &[u8], next: Option<&Bytes>, limits: &Limits) -> bool {
    let file = TrustState::of_file(n, bytes, limits);
    file.is_ok_and(|file| next.is_none_or(|next| file.step(next, limits).is_ok()))
}

/// Those that belong together, from the newest down.
fn links(found: &Chain, limits: &Limits) -> Chain {
    let mut links = Chain::new();
    for (n, bytes) in found.iter().rev() {
        let next = n.checked_add(1).and_then(|above| links.get(&above));
        if leads(*n, bytes, next, limits) {
            links.insert(*n, bytes.clone());
        }
    }
    links
}

#[cfg(test)]
mod tests;

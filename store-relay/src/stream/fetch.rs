//! Step 2: the packs of a way that are not at hand, each from the first source that has it right.
//!
//! Owns the download, one at a time of each pack, and why a pack was not had. Must never put into `ready/` what was not
//! hashed whole, nor count a dead line as a try: only a whole body of other bytes is one. If the power goes there, a part
//! is resumed.

use super::{AtHand, Outcome, SOON, Supply, off_thread};
use crate::relay::{Pace, Relay, Wanted};
use crate::shelves::Room;
use crate::tries::{Attempts, Cause, Failure};
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::fetch::{Etag, FetchError, FetchErrorKind, Small, Source, Want};
use proto::ids::Instance;
use proto::layout::{ObjectName, PackName};
use proto::manifest::PackEntry;
use proto::retry::Verdict;
use proto::shelf::ShelfError;
use proto::wire::fault;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// A source that failed is asked last for so long.
const DOWN: Duration = Duration::from_secs(30);
/// Bytes of a bad body that are kept to be looked at.
const EVIDENCE: u64 = 16 << 20;

impl Relay {
    /// Step 2: the packs in order, as far as they could be got; and what stopped it.
    pub(crate) async fn gather(
        &self,
        instance: &Instance,
        packs: &[PackEntry],
        supply: Supply<'_>,
    ) -> (Vec<AtHand>, Option<Missing>) {
        let mut files = Vec::with_capacity(packs.len());
        for entry in packs {
            let name = entry.name(instance);
            match self.at_hand(&name, entry) {
                Ok(Some(path)) => files.push((path, entry.clone())),
                Ok(None) => match self.fetch_alone(&name, entry, supply).await {
                    Ok(path) => files.push((path, entry.clone())),
                    Err(missing) => return (files, Some(missing)),
                },
                Err(e) => return (files, Some(Missing::Disk(e))),
            }
        }
        (files, None)
    }

    /// Where a pack lies already.
    fn at_hand(&self, name: &PackName, entry: &PackEntry) -> Result<Option<PathBuf>, ShelfError> {
        let (in_ok, in_ready, given_up) = {
            let state = self.hall.state();
            let attempts = state.attempts.get(name).filter(|a| a.in_error && a.sha256 == entry.sha256);
            (
                state.ok.get(name) == Some(&Some(entry.sha256)),
                state.ready.get(name).copied(),
                attempts.is_some_and(|a| a.cause != Cause::Hash),
            )
        };
        let shelves = &self.hall.shelves;
        if in_ok {
            return Ok(Some(shelves.pack(Room::Ok, name)));
        }
        if in_ready.is_some_and(|h| h != entry.sha256) {
            shelves.drop_pack(Room::Ready, name)?;
            self.hall.state().ready.remove(name);
        } else if in_ready.is_some() {
            return Ok(Some(shelves.pack(Room::Ready, name)));
        }
        if given_up && shelves.take_back(name, entry.bytes)? {
            self.hall.state().ready.insert(name.clone(), entry.sha256);
            return Ok(Some(shelves.pack(Room::Ready, name)));
        }
        Ok(None)
    }

    /// One download of a pack at a time: a part has one writer.
    async fn fetch_alone(&self, name: &PackName, entry: &PackEntry, supply: Supply<'_>) -> Result<PathBuf, Missing> {
        let turn = {
            let mut turns = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(name.clone()).or_default())
        };
        let _alone = turn.lock().await;
        match self.at_hand(name, entry) {
            Ok(Some(path)) => Ok(path),
            Ok(None) => self.fetch(name, entry, supply).await,
            Err(e) => Err(Missing::Disk(e)),
        }
    }

    /// Downloads a pack from the first source that has it right; sources that failed lately come last.
    async fn fetch(&self, name: &PackName, entry: &PackEntry, supply: Supply<'_>) -> Result<PathBuf, Missing> {
        let hall = &self.hall;
        let part = hall.shelves.part(name).map_err(Missing::Disk)?;
        let there = std::fs::symlink_metadata(&part).map_or(0, |m| m.len());
        hall.disk.fits(entry.bytes.saturating_sub(there)).map_err(|why| Missing::NoRoom(format!("{name}: {why}")))?;
        let want = Want { bytes: entry.bytes, sha256: entry.sha256 };
        let mut errors = Vec::new();
        let mut importing = self.importing.subscribe();
        let object = ObjectName::Pack(name.clone());
        for source in self.in_order(supply.sources) {
            let mut silent = |_| {};
            let got = tokio::select! {
                got = source.download(&object, &want, &part, &hall.config.rate, &mut silent) => got,
                () = hall.stop.cancelled() => return Err(Missing::Stopped),
                // A stick does not wait for a slow line.
                _ = importing.wait_for(|now| *now), if supply.only.is_none() => return Err(Missing::Import),
            };
            match got {
                Ok(()) => {
                    self.note_source(source.url(), true);
                    hall.metrics.downloaded.inc_by(entry.bytes.saturating_sub(there));
                    return self.whole(name, entry.sha256).await.map_err(Missing::Disk);
                }
                Err(e) => {
                    self.note_source(source.url(), e.verdict() != Verdict::Retry || e.kind == FetchErrorKind::NotFound);
                    errors.push(e);
                }
            }
        }
        Err(Missing::Fetch(name.clone(), entry.clone(), errors))
    }

    /// A verified part goes to `ready/`.
    async fn whole(&self, name: &PackName, sha256: Sha256) -> Result<PathBuf, ShelfError> {
        let (shelves, moved) = (self.hall.shelves.clone(), name.clone());
        off_thread(move || shelves.part_is_whole(&moved)).await?;
        self.hall.state().ready.insert(name.clone(), sha256);
        self.end_missing(|_, had| had == name);
        Ok(self.hall.shelves.pack(Room::Ready, name))
    }

    fn in_order<'s>(&self, sources: &'s [Source]) -> Vec<&'s Source> {
        let now = self.hall.clock.monotonic();
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        let mut order: Vec<&Source> = sources.iter().collect();
        order.sort_by_key(|s| down.get(s.url()).is_some_and(|until| *until > now));
        order
    }

    fn note_source(&self, url: &str, answers: bool) {
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        if answers {
            down.remove(url);
        } else {
            down.insert(url.to_owned(), self.hall.clock.monotonic() + DOWN);
        }
    }

    /// Whether a source has said that it lacks an object. One that gives no lists either refuses us whatever we ask for.
    pub(crate) fn is_lacking(&self, e: &FetchError) -> bool {
        let refuses_us = || self.hall.state().faults.contains_key(&(fault::SOURCE.to_owned(), e.source_url.clone()));
        e.is_not_found() || (e.may_be_absent() && !refuses_us())
    }

    /// Whether each source has said what it has under an object's name. One that has not may have it.
    pub(crate) fn all_spoke(&self, errors: &[FetchError]) -> bool {
        errors.iter().all(|e| e.kind.wrong_body().is_some() || self.is_lacking(e))
    }

    /// What follows when a pack could not be got; `None`: plan again.
    pub(super) async fn not_gathered(
        &self,
        instance: &Instance,
        missing: Option<Missing>,
        supply: Supply<'_>,
        pace: Pace,
    ) -> Option<Outcome> {
        let (missing, stream) = (missing?, &instance.stream);
        let counted = self.not_had(Wanted::Here, instance, &missing, supply).await;
        let text = match missing {
            Missing::Stopped => return Some(Outcome::Stopped),
            Missing::Import => return Some(Outcome::Again(SOON, "an import goes first".into())),
            Missing::NoRoom(text) => text,
            Missing::Disk(e) => e.to_string(),
            Missing::Fetch(_, _, errors) if errors.iter().any(|e| e.kind == FetchErrorKind::Halt) => {
                return Some(Outcome::Halted);
            }
            Missing::Fetch(name, _, errors) => match counted {
                Some(given_up) => return self.after_a_try(stream, &name, given_up, all_texts(&errors), pace),
                None if errors.is_empty() => format!("{name}: there is no source"),
                None => {
                    if errors.iter().any(|e| self.is_lacking(e)) {
                        self.note_absent(Wanted::Here, &name, self.all_spoke(&errors));
                    }
                    all_texts(&errors)
                }
            },
        };
        self.waits(stream, Some(&text));
        Some(Outcome::Again(SOON, text))
    }

    /// Takes down why a pack could not be got: trouble with own files is told, and a whole body with a wrong hash is a
    /// try per source. Whether the pack was given up; `None`: nothing counted.
    pub(crate) async fn not_had(
        &self,
        wanted: Wanted,
        instance: &Instance,
        missing: &Missing,
        supply: Supply<'_>,
    ) -> Option<bool> {
        let trouble = |verdict, full, text: &str| self.trouble(Some((wanted, instance)), verdict, full, text);
        let (name, entry, errors) = match missing {
            Missing::Stopped | Missing::Import => return None,
            Missing::NoRoom(text) => {
                match wanted {
                    Wanted::Here => trouble(Verdict::Retry, true, text),
                    // A debt: the disk is not full, it only has no room for this.
                    Wanted::ByNew => self.make_room(),
                }
                return None;
            }
            Missing::Disk(e) => {
                trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                return None;
            }
            Missing::Fetch(name, entry, errors) => (name, entry, errors),
        };
        let text = all_texts(errors);
        let any = |kind| errors.iter().any(|e| e.kind == kind);
        if any(FetchErrorKind::Halt) {
            trouble(Verdict::Halt, false, &text);
            return None;
        }
        if any(FetchErrorKind::Disk) {
            // The part itself may be what fills the disk.
            let _ = self.hall.shelves.drop_pack(Room::Incoming, name);
            self.disk_full(&text);
        }
        if any(FetchErrorKind::Local) {
            // A part that cannot be written is begun anew, if the directory lets us.
            let _ = self.hall.shelves.drop_pack(Room::Incoming, name);
            trouble(Verdict::Retry, false, &text);
        }
        let failures: Vec<(&str, &FetchError)> =
            errors.iter().filter_map(|e| Some((e.kind.wrong_body()?, e))).collect();
        let (mut given_up, unheard) = (false, !self.all_spoke(errors));
        for (code, e) in &failures {
            let (code, reason) = ((*code).to_owned(), e.to_string());
            given_up |= self.count(name, entry.sha256, Failure { cause: Cause::Hash, code, reason, unheard });
        }
        if given_up {
            for (_, e) in &failures {
                if let Some(source) = supply.sources.iter().find(|s| s.url() == e.source_url) {
                    self.keep_evidence(name, entry, source).await;
                }
            }
        }
        (!failures.is_empty()).then_some(given_up)
    }

    /// What a source gives instead of a pack is kept beside the reason, if it is no giant, and its ETag, to notice
    /// when it changes.
    async fn keep_evidence(&self, name: &PackName, entry: &PackEntry, source: &Source) {
        let most = entry.bytes.min(EVIDENCE);
        let Ok(Small::Body { bytes, etag }) = source.get_small(&name.clone().into(), None, None, most).await else {
            return;
        };
        if bytes.len() as u64 == entry.bytes && Sha256::of(&bytes) == entry.sha256 {
            return; // It was mended just now.
        }
        let attempts = {
            let mut state = self.hall.state();
            let Some(attempts) = state.attempts.get_mut(name) else { return };
            attempts.etags.extend(etag.map(|e| (source.url().to_owned(), e.0)));
            attempts.clone()
        };
        let kept =
            self.hall.shelves.put_evidence(name, &bytes).and_then(|()| self.hall.shelves.refuse(name, &attempts));
        if let Err(e) = kept {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        // As they are by now: headquarters may have heard of it meanwhile.
        let Some(attempts) = self.hall.state().attempts.get(name).cloned() else { return };
        if let Err(e) = self.hall.spool.put_attempts(name, &attempts) {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
    }

    /// Asks a source whether what it gave instead of a pack has changed; then it is fetched again now.
    pub(crate) async fn look_at_bad(&self, source: &Source) {
        let bad: Vec<(PackName, Etag)> = {
            let state = self.hall.state();
            let known = |(n, a): (&PackName, &Attempts)| Some((n.clone(), Etag(a.etags.get(source.url())?.clone())));
            state.attempts.iter().filter(|(_, a)| a.in_error && a.cause == Cause::Hash).filter_map(known).collect()
        };
        for (name, etag) in bad {
            // No byte of it is wanted: a changed one is "too long".
            let asked = source.get_small(&name.clone().into(), None, Some(&etag), 0).await;
            let changed = match asked {
                Ok(Small::Unchanged) => false,
                Ok(Small::Body { .. }) => true,
                Err(e) => e.kind == FetchErrorKind::TooLong,
            };
            if changed {
                tracing::info!(pack = %name, source = source.url(), "it has changed; it is fetched again");
                if let Some(attempts) = self.hall.state().attempts.get_mut(&name) {
                    attempts.etags.remove(source.url());
                    attempts.last = Timestamp::UNIX_EPOCH;
                }
            }
        }
    }
}

/// Why a pack is not at hand.
#[derive(Debug)]
pub(crate) enum Missing {
    /// No source gave it.
    Fetch(PackName, PackEntry, Vec<FetchError>),
    /// Our own files.
    Disk(ShelfError),
    /// It would not fit.
    NoRoom(String),
    /// The process ends.
    Stopped,
    /// An import wants the stream.
    Import,
}

fn all_texts(errors: &[FetchError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

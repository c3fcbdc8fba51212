//! What to do when a step fails: whose fault it is, what is latched, what is told. Never touches a
//! row; what it latches is durable before it counts.

use super::{Agent, Goal, Went};
use crate::faults::Faults;
use crate::memory::STUCK;
use crate::pace::{End, From};
use crate::register_db::{AllHeld, ApplyFailure, DbError, Healed, Remedy, STORE_DB, STORE_LOG};
use crate::report;
use crate::verify::{self, StreamFound};
use proto::clock::Timestamp;
use proto::device::DeviceError;
use proto::disk;
use proto::fetch::{self, FetchError, FetchErrorKind, Want};
use proto::follow::{FollowError, lock};
use proto::ids::{Instance, StreamName};
use proto::layout::{PackKind, PackName};
use proto::manifest::{Manifest, PackEntry};
use proto::retry::Verdict;
use proto::shelf;
use proto::wire::{Fault, fault};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;

/// A failure of the surroundings that lasts so long is told of.
const PATIENCE: Duration = Duration::from_secs(300);

/// The first pause of a pack that no fallback has right.
const BENT: Duration = Duration::from_secs(60);
/// The longest.
const BENT_LONG: Duration = Duration::from_secs(16 * 60);

/// Packs that no fallback had right: the pause of each, and until when. Without pauses every register of a store whose
/// relay is down would fetch them whole, over the store's line, each time it looks.
#[derive(Debug, Default)]
pub(super) struct Bent(BTreeMap<PackName, (Duration, Duration)>);

impl Bent {
    fn found(&mut self, pack: &PackName, now: Duration) {
        let pause = self.0.get(pack).map_or(BENT, |(last, _)| (*last * 2).min(BENT_LONG));
        self.0.insert(pack.clone(), (pause, now + pause));
    }
    pub(super) fn rests(&self, pack: &PackName, now: Duration) -> bool {
        self.0.get(pack).is_some_and(|(_, until)| now < *until)
    }
    pub(super) fn forget(&mut self, pack: &PackName) {
        self.0.remove(pack);
    }
    pub(super) fn prune(&mut self, manifest: &Manifest) {
        self.0.retain(|pack, _| manifest.lists(pack));
    }
}

/// What is told of a damaged file: who has it open reads it on.
pub(super) fn begun_anew(why: &str) -> String {
    format!("{why}; a new one is begun: restart every program that has had {STORE_DB} open since before")
}

/// Notes that a file of the database was damaged, deleted or replaced. Another time is another fault, also while the
/// one before is open: who had the file open is to be restarted again.
pub(super) fn raise_anew(faults: &mut Faults, object: &str, text: &str, now: Timestamp) -> bool {
    faults.mend(fault::DRIFT, |f| f.instance.is_none() && f.object.as_deref() == Some(object));
    faults.raise(fault::DRIFT, None, Some(object), text, now)
}

/// That it cannot be written down keeps no register without a database: it is told from memory, and written when it can
/// be.
pub(super) fn goes_on_without(e: DeviceError) -> Result<(), DeviceError> {
    if e.verdict() == Verdict::Halt {
        return Err(e);
    }
    tracing::error!(error = %e, "that the database was damaged could not be written down");
    Ok(())
}

/// What cannot go on: a stream, or all.
fn held_up(instance: Option<&Instance>) -> String {
    instance.map_or_else(|| STORE_DB.to_owned(), Instance::to_string)
}

impl Agent {
    pub(super) async fn not_fetched<T>(&self, goal: &Goal, name: &PackName, errors: &[FetchError]) -> Went<T> {
        let text = errors.iter().map(|e| e.to_string()).collect::<Vec<_>>().join("; ");
        let any = |kind| errors.iter().any(|e| e.kind == kind);
        if any(FetchErrorKind::Halt) {
            self.trouble(Verdict::Halt, false, &text);
            return Went::Over(End::Halted);
        }
        if any(FetchErrorKind::Disk) {
            self.no_room(&text).await;
            return Went::Over(End::DiskFull);
        }
        if any(FetchErrorKind::Local) {
            // A part that cannot be written is begun anew, if the directory lets us.
            let _ = shelf::remove(&self.part(name));
            self.trouble(Verdict::Retry, false, &text);
            self.stuck(Some(&name.instance), fault::LOCAL_FILES, &name.to_string(), &text);
            return Went::Over(End::Retry);
        }
        if let Some(code) = errors.iter().find_map(|e| e.kind.wrong_body()) {
            let text = format!("{code}: {text}");
            // The source's copy is wrong, not the pack: leave it for now, take another way.
            tracing::warn!(code = fault::REFUSED, pack = %name, %text, "a pack was refused");
            // One that another source did not answer for may be right there.
            let has_it_not = |e: &FetchError| e.kind.wrong_body().is_some() || e.is_not_found();
            if goal.from == From::Fallback && errors.iter().all(has_it_not) {
                self.bent().found(name, self.clock.monotonic());
            }
            let (instance, now) = (name.instance.clone(), self.clock.now());
            self.memory.faults(|f| f.raise(fault::REFUSED, Some(&instance), Some(&name.to_string()), &text, now));
            return Went::Without(name.clone());
        }
        if errors.iter().all(FetchError::is_not_found) {
            tracing::debug!(pack = %name, "the pack is not there yet");
            return Went::Without(name.clone());
        }
        // A bucket that may not be listed says of what is not there that it is forbidden.
        if errors.iter().all(|e| e.is_not_found() || e.kind == FetchErrorKind::Unauthorized) {
            tracing::info!(pack = %name, %text, "the pack is not given");
            return Went::Denied(name.clone(), text);
        }
        tracing::info!(pack = %name, %text, "the pack could not be fetched now");
        self.stuck(Some(&name.instance), fault::SOURCE, &name.to_string(), &text);
        // A server that answers has said what it has to say: it is asked in the pace of polls, a LAN again at once.
        let said = errors.iter().all(|e| matches!(e.kind, FetchErrorKind::Status { .. }));
        Went::Over(if said && self.is_unhurried(goal) { End::Done } else { End::Retry })
    }

    pub(super) fn bent(&self) -> MutexGuard<'_, Bent> {
        self.bent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the file may be damaged.
    pub(super) fn doubt(&self) -> MutexGuard<'_, Option<String>> {
        self.doubt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream (or all: none) cannot go on for a failure of the surroundings: said at once, a fault when it lasts.
    pub(super) fn stuck(&self, instance: Option<&Instance>, code: &str, object: &str, why: &str) {
        if let Some(i) = instance {
            self.shown().waits.insert(i.clone(), why.to_owned());
        }
        if self.memory.held_up(&held_up(instance), &*self.clock) >= PATIENCE {
            let now = self.clock.now();
            self.memory.faults(|f| f.raise(code, instance, Some(object), why, now));
        }
    }

    /// It went on, or waits for what is to come.
    pub(super) fn goes_on(&self, instance: Option<&Instance>) {
        if let Some(i) = instance {
            self.shown().waits.remove(i);
        }
        self.memory.goes_on(&held_up(instance));
        let of_it = |f: &Fault| match instance {
            Some(_) => f.instance.as_ref() == instance,
            None => f.instance.is_none() && f.object.as_deref() == Some(STORE_DB),
        };
        self.memory.faults(|f| STUCK.iter().fold(false, |changed, code| f.mend(code, of_it) | changed));
    }

    /// There is no way now: for what is to come, or for a pack that no source gives.
    pub(super) fn goes_on_unless(&self, instance: &Instance, denied: Option<(PackName, String)>) {
        match denied {
            Some((pack, why)) => self.stuck(Some(instance), fault::PACK_MISSING, &pack.to_string(), &why),
            None => self.goes_on(Some(instance)),
        }
    }

    /// Whose fault was it? The rows here say.
    pub(super) async fn not_applied(
        &self,
        instance: &Instance,
        first: &PackName,
        files: &[(PathBuf, PackEntry)],
        failure: &ApplyFailure,
    ) -> Went<()> {
        let text = failure.to_string();
        self.metrics.refused(failure.code());
        match failure.remedy() {
            Remedy::MakeRoom => {
                self.no_room(&text).await;
                Went::Over(End::DiskFull)
            }
            Remedy::Retry => {
                tracing::warn!(%instance, %text, "not applied now");
                if failure.is_busy() {
                    let why =
                        format!("a program writes in store.db, or is stopped in the middle of it: end it ({text})");
                    self.stuck(Some(instance), fault::LOG_STUCK, &first.to_string(), &why);
                } else {
                    self.stuck(Some(instance), fault::LOCAL_FILES, &first.to_string(), &text);
                }
                Went::Over(End::Retry)
            }
            Remedy::Halt => {
                self.trouble(Verdict::Halt, false, &text);
                Went::Over(End::Halted)
            }
            Remedy::Wait => {
                tracing::debug!(%instance, %text, "it waits for another stream");
                Went::Awaits(first.clone(), text)
            }
            // A full and what follows it do not depend on the rows that were here.
            Remedy::AskRows if first.kind == PackKind::Delta => match self.rows_are_right(&instance.stream).await {
                Some(true) => self.blame(instance, first, files, failure).await,
                Some(false) => self.drifted(instance, &text),
                None => Went::Over(End::Retry),
            },
            Remedy::AskRows | Remedy::AvoidPack => self.blame(instance, first, files, failure).await,
            // A full makes the stream's tables anew; what it cannot mend needs a new file.
            Remedy::Damaged if first.kind == PackKind::Delta => self.drifted(instance, &text),
            Remedy::Damaged => Went::Over(self.rebuild(&text)),
        }
    }

    /// The pack is bad, unless what it met here is: our own tables, or its file, which may have rotted since it was verified.
    async fn blame(
        &self,
        instance: &Instance,
        first: &PackName,
        files: &[(PathBuf, PackEntry)],
        failure: &ApplyFailure,
    ) -> Went<()> {
        // The next cycle begins by reading them, and heals them.
        if let Err(e) = self.db.all_held().await {
            tracing::warn!(%instance, error = %e, %failure, "not applied, for what is held cannot be read");
            return Went::Over(End::Retry);
        }
        match rotten(files.to_vec()).await {
            Ok(paths) if paths.is_empty() => {}
            Ok(paths) => {
                for path in paths {
                    tracing::warn!(%instance, path = %path.display(), %failure, "a pack's file is not the one that was verified: it is fetched again");
                    let why = format!("{} is not the file that was verified ({failure})", path.display());
                    self.stuck(Some(instance), fault::LOCAL_FILES, &first.to_string(), &why);
                    if let Err(e) = shelf::remove(&path) {
                        tracing::warn!(error = %e, "it could not be deleted");
                    }
                }
                return Went::Over(End::Retry);
            }
            Err(e) => {
                tracing::warn!(%instance, error = %e, %failure, "not applied, and the packs cannot be looked at");
                self.stuck(Some(instance), fault::LOCAL_FILES, &first.to_string(), &e.to_string());
                return Went::Over(End::Retry);
            }
        }
        let why = format!("{}: {failure}", failure.code());
        self.avoid(instance, failure.pack().unwrap_or(&first.to_string()), &why)
    }

    /// Whether the rows of a stream are those of its version, as far as can be told; unknown when they cannot be read now.
    pub(super) async fn rows_are_right(&self, stream: &StreamName) -> Option<bool> {
        match self.db.verify(stream).await {
            Ok(checks) => Some(checks.iter().all(proto::replica::TableCheck::is_right)),
            Err(e) if e.verdict() == Verdict::Rebuild => Some(false),
            // A full of the contract would be refused, too: nothing says that the rows need one.
            Err(DbError::NotChecked(_)) => Some(true),
            Err(e) => {
                tracing::warn!(%stream, error = %e, "the rows could not be checked");
                None
            }
        }
    }

    /// The database, its log or the log's index were deleted or replaced below the agent. Who has it open since before reads
    /// the old file on, or by the old index, which nobody writes any more: pages that he remembers stay old, while others are
    /// read anew. The rows are right, so that no check finds it, and no lock tells who it is: a person is told.
    pub(super) fn was_deleted_below(&self, file: &Path) {
        let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
        let text = format!(
            "{name} was deleted or replaced while the agent ran: restart every program that has had {STORE_DB} open \
             since before; until then it may read old rows, or old and new ones mixed"
        );
        // The file's own ends when all is held again.
        let object = if file == self.db.path() { STORE_DB } else { STORE_LOG };
        let now = self.clock.now();
        self.memory.faults(|f| raise_anew(f, object, &text, now));
        // The next start finds nothing of it.
        self.memory.save_faults();
        self.tell.notify_one();
    }

    /// The log was lost: whether what was brought home of it is whole, the rows say. Whether those of all streams did.
    pub(crate) async fn look_through(&self, held: &AllHeld) -> bool {
        let mut all = true;
        for (stream, h) in held {
            match self.rows_are_right(stream).await {
                Some(true) => {}
                Some(false) => {
                    let instance = Instance { stream: stream.clone(), audience: h.audience.clone() };
                    self.drifted(&instance, "store.db-wal or store.db-shm was deleted or replaced while the agent ran");
                    all &= self.memory.drifted(stream);
                }
                None => all = false,
            }
        }
        all
    }

    /// The file is damaged: begin a new one, which the next cycle fills by fulls. Once a process, and only if it is so
    /// at a second look: until it is filled, there is nothing to sell by. What cannot be read of a sound file is
    /// forgotten, and comes again by a full, while other streams stay.
    pub(super) fn rebuild(&self, why: &str) -> End {
        match self.db.heal() {
            Ok(Healed::Lost) => {}
            Ok(Healed::Forgot(streams)) => {
                streams.iter().for_each(|(stream, why)| self.forgot(stream.as_ref(), why));
                self.wake.notify_one();
                return End::Retry;
            }
            Ok(Healed::Sound) => {
                self.trouble(Verdict::Retry, false, why);
                return End::Retry;
            }
            Err(e) => {
                self.trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                return End::Retry;
            }
        }
        if self.rebuilt.load(Ordering::Relaxed) {
            self.trouble(Verdict::Halt, false, &format!("{why}; the database was damaged twice: look at the disk"));
            return End::Halted;
        }
        tracing::error!(code = fault::DRIFT, %why, "the database is damaged: beginning a new one");
        let (now, is_same) = (self.clock.now(), self.unmoved.load(Ordering::Relaxed));
        self.memory.faults(|f| match is_same {
            true => f.raise(fault::DRIFT, None, Some(STORE_DB), &begun_anew(why), now),
            false => raise_anew(f, STORE_DB, &begun_anew(why), now),
        });
        self.tell.notify_one();
        // Before the file is moved: the next start finds nothing wrong.
        let make_room = |e: &DeviceError| self.out_of_room(&e.to_string());
        let kept = disk::or_make_room(|| self.memory.keep_faults(), DeviceError::is_disk_full, make_room);
        if let Err(e) = kept.or_else(goes_on_without) {
            self.trouble(e.verdict(), false, &e.to_string());
            return End::Retry;
        }
        // While it is where it was, what is found next is the same damage, and no second one.
        self.unmoved.store(true, Ordering::Relaxed);
        let moved = || {
            self.unmoved.store(false, Ordering::Relaxed);
            self.rebuilt.store(true, Ordering::Relaxed);
        };
        if let Err(e) = self.db.begin_anew(moved) {
            self.trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        self.wake.notify_one();
        End::Retry
    }

    /// A stream was forgotten: a fault until it is held again.
    fn forgot(&self, stream: Option<&StreamName>, why: &str) {
        tracing::error!(code = fault::DRIFT, ?stream, %why, "rows of our own cannot be read: their stream comes again by a full");
        let instance = stream.and_then(|s| lock(&self.device).manifest()?.instance(s));
        if let Some(i) = &instance {
            self.shown().held.remove(&i.stream);
        }
        let now = self.clock.now();
        self.memory.faults(|f| f.raise(fault::DRIFT, instance.as_ref(), Some(STORE_DB), why, now));
    }

    /// The rows here drifted: heal by a full.
    pub(super) fn drifted(&self, instance: &Instance, why: &str) -> Went<()> {
        if self.memory.drifted(&instance.stream) {
            // Latched already: a heal is under way and met this error itself.
            return Went::Over(End::Retry);
        }
        tracing::error!(code = fault::DRIFT, %instance, %why, "the rows are not those of the version; a full pack will heal them");
        match self.latch(instance, why) {
            Ok(()) => Went::On(()),
            Err(e) => {
                self.trouble(e.verdict(), e.is_disk_full(), &e.to_string());
                Went::Over(End::Retry)
            }
        }
    }

    /// Recomputes all digests from the rows; what drifted is latched, and healed by the next cycle.
    pub async fn verify(&self) -> Result<verify::Report, DbError> {
        let turn = self.verifying.clone().lock_owned().await;
        self.verify_in_turn(turn).await
    }

    /// The same, for whoever has the turn; it ends with the scan, though nobody may wait for that any more.
    pub async fn verify_in_turn(&self, turn: OwnedMutexGuard<()>) -> Result<verify::Report, DbError> {
        let gone = verify::gone(self.db.path(), &lock(&self.device));
        let checked = match gone {
            Some(gone) => Ok(gone),
            // Who gets the turn next finds the connection closed.
            None => match self.db.scan(move |path, limits| Ok((verify::check(path, limits), turn))).await {
                Ok((checked, _turn)) => checked.map_err(DbError::from),
                Err(e) => Err(e),
            },
        };
        if let Err(e) = &checked
            && (e.verdict() == Verdict::Rebuild || e.is_unreadable())
        {
            *self.doubt() = Some(e.to_string());
            self.wake.notify_one();
        }
        let found = checked?;
        self.latch_found(&found).await;
        self.metrics.checked();
        Ok(found)
    }

    /// Latches what a check of all rows found.
    pub(crate) async fn latch_found(&self, found: &verify::Report) {
        // What the manifest lists no more nobody can heal.
        let manifest = lock(&self.device).manifest().cloned();
        let is_listed = |i: &Instance| manifest.as_ref().is_none_or(|m| m.lists_stream(&i.stream));
        let mut all_latched = true;
        for (instance, stream) in found.streams.iter().filter(|(i, s)| s.has_drifted() && is_listed(i)) {
            // What was applied meanwhile may have healed it; the rows that are there now say.
            if !self.is_still(instance, stream).await && self.rows_are_right(&instance.stream).await == Some(true) {
                tracing::info!(%instance, "the rows had drifted, and were healed before their check was over");
                continue;
            }
            if let Err(e) = self.latch(instance, &stream.reason()) {
                tracing::error!(%instance, error = %e, "the drift could not be latched");
                all_latched = false;
            }
        }
        if found.drift {
            self.wake.notify_one();
        }
        if all_latched {
            self.memory.checked();
        }
    }

    /// Whether a stream is held as it was when its rows were checked. What cannot be read now is taken to be.
    async fn is_still(&self, instance: &Instance, found: &StreamFound) -> bool {
        let Ok(held) = self.db.all_held().await else { return true };
        held.get(&instance.stream).is_some_and(|h| {
            (&h.audience, h.version, h.applied_at) == (&instance.audience, found.version, found.applied_at)
        })
    }

    /// Sets the durable latch that the next cycle heals.
    pub fn latch(&self, instance: &Instance, why: &str) -> Result<(), DeviceError> {
        let now = self.clock.now();
        self.memory.faults(|f| f.raise(fault::DRIFT, Some(instance), None, why, now));
        // The latch is last: with it alone nobody would hear of what was healed after a power cut.
        self.memory.save_faults();
        self.memory.latch_drift(&instance.stream, why)?;
        self.metrics.drifted();
        self.tell.notify_one();
        Ok(())
    }

    /// The pack is bad: go on without it, keep selling.
    pub(super) fn avoid(&self, instance: &Instance, pack: &str, why: &str) -> Went<()> {
        let Ok(name) = pack.parse::<PackName>() else { return Went::Over(End::Retry) };
        tracing::error!(code = fault::PACK_IN_ERROR, %instance, pack, %why, "the pack is bad; the version before is kept");
        let now = self.clock.now();
        self.memory.avoid(&name, why, now);
        self.memory.faults(|f| f.raise(fault::PACK_IN_ERROR, Some(instance), Some(pack), why, now));
        if let Err(e) = shelf::remove(&self.part(&name)) {
            tracing::warn!(error = %e, "a bad pack could not be deleted");
        }
        self.tell.notify_one();
        Went::Without(name)
    }

    /// No room: let the ballast go, so that SQLite can clean up; the version held stays whole.
    pub(super) async fn no_room(&self, why: &str) {
        self.full.store(true, Ordering::Relaxed);
        self.out_of_room(why);
        // Applied packs may still lie there.
        *self.swept_for.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Err(e) = self.db.truncate_log().await {
            self.trouble(e.verdict(), e.is_disk_full(), &format!("the log could not be cut: {e}"));
        }
    }

    /// A failure of the surroundings.
    pub(super) fn trouble(&self, verdict: Verdict, disk_full: bool, text: &str) {
        let now = self.clock.now();
        if verdict == Verdict::Halt {
            tracing::error!(code = fault::HALTED, %text, "halted: the disk or the database cannot be relied on; restart after a look at it");
            self.halted.store(true, Ordering::Relaxed);
            self.memory.faults(|f| f.raise(fault::HALTED, None, None, text, now));
        } else if disk_full {
            self.full.store(true, Ordering::Relaxed);
            self.out_of_room(text);
        } else {
            tracing::warn!(%text, "trying again");
        }
    }

    /// A failed sync of `device.db` halts like any other, whoever met it; the number of a heartbeat that is not
    /// written is told by that heartbeat.
    pub fn heed_device(&self) {
        let (failed, unkept) = {
            let device = lock(&self.device);
            (device.halted().map(str::to_owned), device.unkept().map(str::to_owned))
        };
        let (of_it, now) = (Some(proto::device::FILE), self.clock.now());
        self.memory.faults(|f| match &unkept {
            Some(why) => f.raise(fault::LOCAL_FILES, None, of_it, why, now),
            None => f.mend(fault::LOCAL_FILES, |f| f.object.as_deref() == of_it),
        });
        if let Some(why) = failed
            && !self.halted.load(Ordering::Relaxed)
        {
            self.trouble(Verdict::Halt, false, &why);
            self.tell.notify_one();
        }
    }

    /// No room on the disk: lets the ballast go, so that the databases can be written again, and says so.
    pub fn out_of_room(&self, text: &str) {
        let now = self.clock.now();
        self.disk.release();
        // A damaged database that lies aside is for people to look at; what there is to sell by goes before it. Before the
        // first look nobody knows that there is less than all.
        let is_known = self.looked.load(Ordering::Relaxed) || self.rebuilt.load(Ordering::Relaxed);
        if is_known
            && !self.is_complete()
            && let Err(e) = self.db.forget_damaged()
        {
            tracing::warn!(error = %e, "the damaged database could not be deleted");
        }
        // Each cycle meets it again, with each stream's own words.
        if !self.told_full.swap(true, Ordering::Relaxed) {
            tracing::error!(code = fault::DISK_FULL, why = text, "no room on the disk; the versions held stay");
            self.memory.faults(|f| f.raise(fault::DISK_FULL, None, None, text, now));
        }
    }

    /// Sources that failed or were refused, as faults that end when they answer again.
    pub(super) fn note_sources(&self, problems: &[FollowError]) {
        let now = self.clock.now();
        let found: Vec<(&str, String, String)> = problems
            .iter()
            .map(|p| match p {
                FollowError::Fetch(e) => (fault::SOURCE, e.source_url.clone(), e.to_string()),
                FollowError::Refused { source_url, .. } => {
                    (fault::REFUSED, source_url.clone(), format!("{}: {p}", p.code()))
                }
                FollowError::Device(e) => (fault::SOURCE, proto::device::FILE.to_owned(), e.to_string()),
            })
            .collect();
        for p in problems {
            if let FollowError::Device(e) = p {
                self.trouble(p.verdict(), e.is_disk_full(), &e.to_string());
            }
        }
        let (news, is_over) = news(&mut self.said.lock().unwrap_or_else(PoisonError::into_inner), problems);
        for p in news {
            tracing::info!(code = p.code(), "{p}");
        }
        if is_over {
            tracing::info!("the sources answer");
        }
        self.memory.faults(|f| {
            let mut changed = false;
            for code in [fault::SOURCE, fault::REFUSED] {
                let still =
                    |object: Option<&str>| found.iter().any(|(c, o, _)| *c == code && Some(o.as_str()) == object);
                // What `report` and a look at the database say is theirs to end.
                let ours = |f: &Fault| {
                    f.instance.is_none() && !matches!(f.object.as_deref(), Some(report::HEARTBEAT | STORE_DB))
                };
                changed |= f.mend(code, |f| ours(f) && !still(f.object.as_deref()));
            }
            for (code, object, text) in &found {
                changed |= f.raise(code, None, Some(object), text, now);
            }
            changed
        });
    }
}

/// The files that are not what the manifest lists.
async fn rotten(files: Vec<(PathBuf, PackEntry)>) -> Result<Vec<PathBuf>, String> {
    let look = move || {
        let mut rotten = Vec::new();
        for (path, entry) in files {
            let want = Want { bytes: entry.bytes, sha256: entry.sha256 };
            if !fetch::is_as_wanted(&path, &want).map_err(|e| e.to_string())? {
                rotten.push(path);
            }
        }
        Ok(rotten)
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_else(|e| Err(e.to_string()))
}

/// What sources did not say at the last look, which is replaced; and whether what they said then is over. A relay that
/// is down for a night is a line in the log, not one for each look.
fn news<'p>(said: &mut BTreeSet<String>, problems: &'p [FollowError]) -> (Vec<&'p FollowError>, bool) {
    let of_sources = || problems.iter().filter(|p| !matches!(p, FollowError::Device(_)));
    let before = std::mem::replace(said, of_sources().map(ToString::to_string).collect());
    let is_over = said.is_empty() && !before.is_empty();
    (of_sources().filter(|p| !before.contains(&p.to_string())).collect(), is_over)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_stays_down_is_told_once_and_that_it_answers_again() {
        let down = |detail: &str| {
            let (source_url, name) = ("http://10.0.0.2:7421".to_owned(), "trust.json".into());
            FollowError::Fetch(FetchError { source_url, name, kind: FetchErrorKind::Network, detail: detail.into() })
        };
        let mut said = BTreeSet::new();
        let mut told = |problems: &[FollowError]| {
            let (news, is_over) = news(&mut said, problems);
            (news.len(), is_over)
        };
        assert_eq!(told(&[down("connection refused")]), (1, false));
        assert_eq!(told(&[down("connection refused")]), (0, false));
        assert_eq!(told(&[down("connection refused"), down("no answer")]), (1, false));
        assert_eq!(told(&[]), (0, true));
        assert_eq!(told(&[]), (0, false));
        assert_eq!(told(&[down("connection refused")]), (1, false));
    }
}

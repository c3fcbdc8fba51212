//! Hand-carried objects: copied from a folder (a stick, a mail) into `import/`, from where they go the road that
//! downloads go: trust walk, manifest, packs by hash, trial. Only names of the layout are looked for; links
//! and `..` are refused. Answered by a receipt signed with the relay's key. One at a time; it goes on to its end whether
//! or not somebody waits for it. Safe to repeat; if the power goes, the next start uses what was copied whole.

use crate::relay::{Pace, Relay, Wanted};
use crate::shelves::{RECEIPTS, Room};
use crate::stream::{Outcome, Supply};
use proto::config::resolve_url;
use proto::digest::Sha256Stream;
use proto::failpoint;
use proto::fetch::Source;
use proto::follow::{self, FollowError, Follower};
use proto::ids::{Instance, StreamName};
use proto::layout::{ObjectName, PackName};
use proto::manifest::PackEntry;
use proto::retry::Verdict;
use proto::shelf::{self, PartFile, ShelfError};
use proto::trust::Refusal;
use proto::wire::{Receipt, StreamReport};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;

/// How long an import waits for another to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why an import could not be done at all.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Not a folder, or it cannot be read.
    #[error("{}: {reason}", dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Another one is at work.
    #[error(
        "an import of {} is under way, and goes on to its end by itself: leave its stick in, and run this again when it \
        is done (`events` of `store-relay status --json`, or the relay's page)",
        dir.display()
    )]
    UnderWay {
        /// Its folder.
        dir: PathBuf,
    },
    /// A sync failed before.
    #[error("writing has stopped after a failed sync: look at the disk, restart the service, then import again")]
    Halted,
    /// Our own files.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// `import/` as a source.
    #[error(transparent)]
    Source(#[from] proto::fetch::BadSource),
    /// The receipt.
    #[error("the receipt cannot be written: {0}")]
    Receipt(#[from] serde_json::Error),
}

impl ImportError {
    /// A name that stays when the text is bettered.
    pub fn code(&self) -> &'static str {
        match self {
            ImportError::UnderWay { .. } => "LOCKED",
            ImportError::Halted => "HALTED",
            ImportError::Shelf(e) if e.verdict() == Verdict::Halt => "HALTED",
            ImportError::Shelf(e) if e.is_disk_full() => "DISK_FULL",
            ImportError::Shelf(_) => "MACHINE",
            ImportError::Folder { .. } | ImportError::Source(_) | ImportError::Receipt(_) => "FAILED",
        }
    }
}

/// What an import did.
#[derive(Debug, Serialize)]
pub struct Imported {
    /// The signed receipt's file.
    pub receipt_file: PathBuf,
    /// What it says.
    pub receipt: Receipt,
    /// Objects that were new.
    pub taken: Vec<String>,
    /// Whether all of it was here already.
    pub already_here: bool,
    /// Whether the folder's manifest is older than the one held.
    pub older: bool,
    /// Whether the folder's manifest was refused.
    pub refused: bool,
    /// Streams that are not at the manifest's version, and why.
    pub behind: BTreeMap<StreamName, String>,
}

impl Relay {
    /// Imports a folder. Another import is waited for, if it ends soon.
    pub async fn import(&self, dir: &Path) -> Result<Imported, ImportError> {
        self.import_within(dir, PATIENCE).await
    }

    async fn import_within(&self, dir: &Path, patience: Duration) -> Result<Imported, ImportError> {
        let folder = |reason: String| ImportError::Folder { dir: dir.to_owned(), reason };
        if !dir.is_dir() {
            return Err(folder("it is not a folder that this service can read".into()));
        }
        // It would be emptied.
        let real = |dir: &Path| std::fs::canonicalize(dir).ok();
        if real(dir).zip(real(&self.hall.shelves.import_dir())).is_some_and(|(dir, own)| dir.starts_with(own)) {
            return Err(folder("what lies there is taken in by `store-relay once`".into()));
        }
        let Ok(_turn) = timeout(patience, self.import_turn.lock()).await else {
            return Err(ImportError::UnderWay { dir: self.import_of.borrow().clone() });
        };
        let done = self.import_folder(dir).await;
        if let Err(e) = &done {
            self.import_failed(e);
            // Nobody may be there to be answered.
            self.hall.event("IMPORT", &dir.display().to_string(), &format!("it failed: {e}"));
        }
        done
    }

    /// Trouble with our own files is told like any other's; what was copied must not keep a disk full that is written on.
    fn import_failed(&self, e: &ImportError) {
        if let ImportError::Shelf(e) = e {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
        if let Err(e) = self.empty_import() {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
    }

    /// What a stop, or a failed sync, broke off is left to the next start.
    fn empty_import(&self) -> Result<(), ShelfError> {
        if self.hall.stop.is_cancelled() || self.is_halted() { Ok(()) } else { self.hall.shelves.clear_import() }
    }

    async fn import_folder(&self, dir: &Path) -> Result<Imported, ImportError> {
        let folder = |reason: String| ImportError::Folder { dir: dir.to_owned(), reason };
        // 1. What was broken off goes first: its stick may be gone, and what it brought need not be copied again.
        self.use_what_is_left().await;
        if self.is_halted() {
            return Err(ImportError::Halted);
        }
        self.empty_import()?;
        // 2. Trust files and this store's manifest are copied, then judged like any source's.
        self.import_of.send_replace(dir.to_owned());
        let mut work = Work::new(self, dir);
        let store = &self.hall.config.store;
        let judged = if work.copy_claims()? {
            self.judge_import(&mut work).await?
        } else if work.refusals.is_empty() {
            return Err(folder(format!(
                "there is no stores/{store}/manifest.json in it: was it exported for this store?"
            )));
        } else {
            Judged::Refused
        };
        // 3. The road of all packs, for those that lead on.
        let outcomes = work.bring_up().await?;
        // 4. A complete chain for registers that are new: no other source may have it.
        for instance in self.incomplete() {
            work.complete(&instance).await?;
        }
        // 5. The answer.
        self.empty_import()?;
        let behind = behind(&outcomes);
        let (receipt_file, receipt) = self.write_receipt(dir, &work.refusals)?;
        self.hall.event(
            "IMPORT",
            &dir.display().to_string(),
            &format!("{} new, {} refused; receipt: {}", work.taken.len(), work.refusals.len(), receipt_file.display()),
        );
        self.hall.wake.notify_one();
        Ok(Imported {
            already_here: work.taken.is_empty() && work.refusals.is_empty(),
            older: judged == Judged::Older,
            refused: judged == Judged::Refused,
            taken: work.taken,
            receipt_file,
            receipt,
            behind,
        })
    }

    /// What a crash left in `import/` goes its way; then it is emptied. The folder can be imported again for its
    /// receipt. What lies there of an import at work is that one's.
    pub(crate) async fn finish_import(&self) {
        if let Ok(_turn) = self.import_turn.try_lock() {
            self.use_what_is_left().await;
        }
    }

    async fn use_what_is_left(&self) {
        if self.is_halted() || !self.hall.shelves.import_waits() {
            return;
        }
        self.import_of.send_replace(self.hall.shelves.import_dir());
        let mut work = Work::new(self, &self.hall.shelves.import_dir());
        let finish = async {
            self.judge_import(&mut work).await?;
            work.copied = self.whole_in_import().await;
            let supply = [self.import_source()?];
            let supply = Supply { sources: &supply, only: Some(&work.copied) };
            let _first = Importing::begin(self);
            self.bring_all_up(supply, Pace::Once).await;
            for instance in self.incomplete() {
                self.complete(&instance, supply).await;
            }
            self.empty_import()?;
            Ok::<(), ImportError>(())
        };
        if let Err(e) = finish.await {
            tracing::warn!(error = %e, "what a crash left of an import is not used");
            self.import_failed(&e);
        }
    }

    fn import_source(&self) -> Result<Source, ImportError> {
        let config = &self.hall.config;
        let dir = std::path::absolute(&config.data_dir)
            .map_err(|e| ImportError::Folder { dir: config.data_dir.clone(), reason: e.to_string() })?;
        Ok(Source::parse(&resolve_url(&dir, &format!("file:{}", Room::Import.dir())), &config.source)?)
    }

    /// Judges the trust files and the manifest in `import/`.
    async fn judge_import(&self, work: &mut Work<'_>) -> Result<Judged, ImportError> {
        let source = self.import_source()?;
        let mut follower = Follower::new(vec![source.clone()]);
        let hall = &self.hall;
        let news = follower.refresh(&hall.device, &*hall.clock, &hall.config.limits, None).await;
        // What is wrong with our own memory; a stick is no source that could be mended.
        self.note_problems(&news, &[]);
        let trouble = self.take_news(&news, &[source]).await;
        let mut judged = if news.changed { Judged::Newer } else { Judged::Same };
        if news.changed {
            work.taken.push(ObjectName::Manifest(hall.config.store.clone()).to_string());
        }
        for problem in &news.problems {
            if matches!(problem, FollowError::Refused { refusal: Refusal::OlderSerial { .. }, .. }) {
                judged = Judged::Older;
            } else {
                if !news.changed {
                    judged = Judged::Refused;
                }
                work.refusals.push(reason(problem));
            }
        }
        work.refusals.extend(trouble);
        Ok(judged)
    }

    /// The packs of those not at hand that lie in `import/` whole. Off the threads that the LAN is served by.
    async fn whole_in_import(&self) -> BTreeSet<PackName> {
        let (lacking, shelves) = (self.lacking(), self.hall.shelves.clone());
        let is_whole = move |(name, entry): &(PackName, PackEntry)| {
            shelf::hash_file(&shelves.pack(Room::Import, name)).is_ok_and(|h| h == entry.sha256)
        };
        let look = move || lacking.into_iter().filter(is_whole).map(|(name, _)| name).collect();
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// The listed packs that are not at hand.
    fn lacking(&self) -> Vec<(PackName, PackEntry)> {
        let manifest = self.hall.state().manifest.clone();
        let instances = manifest.iter().flat_map(|m| m.instances());
        instances.flat_map(|(i, entry)| self.not_at_hand(&i, entry.packs.clone())).collect()
    }

    /// Signs the receipt and writes it beside the objects, or into the data directory when that cannot be.
    fn write_receipt(&self, dir: &Path, refusals: &[String]) -> Result<(PathBuf, Receipt), ImportError> {
        let hall = &self.hall;
        let receipt = {
            let state = hall.state();
            let versions = state.versions();
            // The shadow may be ahead of what is served, or lost.
            let of_served =
                |(i, r): &(Instance, StreamReport)| r.version.is_some() && r.version.as_ref() == versions.get(i);
            let digests = state.streams().into_iter().filter(of_served).map(|(i, r)| (i, r.digests)).collect();
            Receipt {
                format: 1,
                store: hall.config.store.clone(),
                serial: state.manifest.as_ref().map(|m| m.serial),
                versions,
                digests,
                time: hall.clock.now(),
                refusals: refusals.to_vec(),
            }
        };
        let sealed = receipt.seal(follow::lock(&hall.device).key())?;
        let serial = receipt.serial.unwrap_or_default();
        let name = format!("{}-{serial:010}.receipt.json", receipt.store);
        let beside = dir.join(RECEIPTS);
        // Where a stick was pulled out, its folder may be there still, or be made again: on this disk.
        let there =
            std::fs::symlink_metadata(dir.join(ObjectName::Manifest(receipt.store.clone()).to_string())).is_ok();
        let written = there.then(|| shelf::create_dir(&beside)).transpose().and_then(|made| {
            // A link could lead the writing anywhere.
            let real = made.is_some() && std::fs::symlink_metadata(&beside).is_ok_and(|m| m.is_dir());
            let write = || shelf::write_durable(&beside.join(&name), &sealed);
            if real { failpoint::step("import.receipt", write).map(|()| true) } else { Ok(false) }
        });
        if matches!(written, Ok(true)) {
            return Ok((beside.join(name), receipt));
        }
        let file = hall.config.data_dir.join(RECEIPTS).join(name);
        shelf::write_durable(&file, &sealed)?;
        Ok((file, receipt))
    }
}

/// How a folder's manifest was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judged {
    Newer,
    Same,
    Older,
    Refused,
}

/// While it lives, downloads step back: not for as long as a slow stick is copied.
struct Importing<'a>(&'a Relay);

impl<'a> Importing<'a> {
    fn begin(relay: &'a Relay) -> Self {
        relay.importing.send_replace(true);
        relay.end_spare();
        Importing(relay)
    }
}
impl Drop for Importing<'_> {
    fn drop(&mut self) {
        self.0.importing.send_replace(false);
    }
}

/// An import at work.
struct Work<'a> {
    relay: &'a Relay,
    dir: PathBuf,
    taken: Vec<String>,
    refusals: Vec<String>,
    /// The packs that lie in `import/`.
    copied: BTreeSet<PackName>,
    /// The packs that the folder has not got, or not right, or that do not fit.
    useless: BTreeSet<PackName>,
    /// Whether it was told that the disk is full.
    full: bool,
}

impl Work<'_> {
    fn new<'a>(relay: &'a Relay, dir: &Path) -> Work<'a> {
        let (taken, refusals, copied, useless) = Default::default();
        Work { relay, dir: dir.to_owned(), taken, refusals, copied, useless, full: false }
    }

    /// Brings all streams up with what the folder has of the ways that lead on.
    async fn bring_up(&mut self) -> Result<BTreeMap<StreamName, Outcome>, ImportError> {
        let (relay, source) = (self.relay, [self.relay.import_source()?]);
        let next = |there: &BTreeSet<PackName>| {
            relay.streams().iter().flat_map(|stream| relay.would_get(stream, there)).collect()
        };
        self.copy_packs(next, Wanted::Here)?;
        loop {
            let supply = Supply { sources: &source, only: Some(&self.copied) };
            let first = Importing::begin(relay);
            let outcomes = relay.bring_all_up(supply, Pace::Once).await;
            drop(first);
            // What was tried may have turned out bad: then another way is wanted.
            if !self.copy_packs(next, Wanted::Here)? {
                return Ok(outcomes);
            }
        }
    }

    /// Closes the gap in an instance's chain, as far as the folder has what is missing.
    async fn complete(&mut self, instance: &Instance) -> Result<(), ImportError> {
        let (relay, source) = (self.relay, [self.relay.import_source()?]);
        let next = |there: &BTreeSet<PackName>| relay.would_complete(instance, there);
        self.copy_packs(next, Wanted::ByNew)?;
        loop {
            let first = Importing::begin(relay);
            relay.complete(instance, Supply { sources: &source, only: Some(&self.copied) }).await;
            drop(first);
            if !self.copy_packs(next, Wanted::ByNew)? {
                return Ok(());
            }
        }
    }

    /// Copies trust files and the store's manifest; whether there is one that can be judged.
    fn copy_claims(&mut self) -> Result<bool, ImportError> {
        let config = &self.relay.hall.config;
        let manifest = ObjectName::Manifest(config.store.clone());
        if !self.copy(&manifest, config.limits.manifest_bytes, None)? {
            return Ok(false);
        }
        self.copy(&ObjectName::Trust, config.limits.trust_bytes, None)?;
        // Enough numbers for a walk from any start; what is not there is not asked for again.
        let known = follow::lock(&self.relay.hall.device).trust().version();
        for n in 1..=known.saturating_add(config.limits.trust_steps) {
            let there = self.copy(&ObjectName::TrustVersion(n), config.limits.trust_bytes, None)?;
            if !there && n > known {
                break;
            }
        }
        Ok(true)
    }

    /// Copies the packs that are wanted next, until none is that the folder might have; whether any was copied. What
    /// is not right there, or does not fit, is refused, and gone round.
    fn copy_packs(
        &mut self,
        next: impl Fn(&BTreeSet<PackName>) -> Vec<(PackName, PackEntry)>,
        wanted: Wanted,
    ) -> Result<bool, ImportError> {
        let mut any = false;
        while !self.relay.is_halted() {
            let there = self.relay.listed().difference(&self.useless).cloned().collect();
            let packs: Vec<_> = next(&there).into_iter().filter(|(name, _)| !self.copied.contains(name)).collect();
            if packs.is_empty() {
                break;
            }
            // What comes after such a one leads nowhere, unless the next round says so.
            let mut broken = BTreeSet::new();
            for (name, entry) in packs {
                let object = ObjectName::Pack(name.clone());
                if broken.contains(&name.instance) {
                    continue;
                }
                if self.has_room(&name, &entry, wanted) && self.copy(&object, entry.bytes, Some(&entry))? {
                    self.taken.push(object.to_string());
                    self.copied.insert(name);
                    any = true;
                } else {
                    broken.insert(name.instance.clone());
                    self.useless.insert(name);
                }
            }
        }
        Ok(any)
    }

    fn has_room(&mut self, name: &PackName, entry: &PackEntry, wanted: Wanted) -> bool {
        let Err(why) = self.relay.hall.disk.fits(entry.bytes) else { return true };
        let why = format!("{}: {why}", ObjectName::Pack(name.clone()));
        match wanted {
            Wanted::Here if !self.full => self.relay.disk_full(&why),
            Wanted::Here => {}
            // A debt: the disk is not full, it only has no room for this.
            Wanted::ByNew => self.relay.make_room(),
        }
        self.full |= wanted == Wanted::Here;
        self.refusals.push(why);
        false
    }

    /// Copies one object into `import/`; not there: false; not right: refused, and false.
    fn copy(&mut self, name: &ObjectName, max: u64, entry: Option<&PackEntry>) -> Result<bool, ImportError> {
        let relative = name.to_string();
        let mut file = match shelf::open_beneath(&self.dir, Path::new(&relative)) {
            Ok(file) => file,
            Err(e) if e.is_not_found() => return Ok(false),
            Err(e) => {
                self.refusals.push(format!("{relative}: {}", e.source));
                return Ok(false);
            }
        };
        let to = self.relay.hall.shelves.path(Room::Import, name);
        if let Some(parent) = to.parent() {
            shelf::create_dir(parent)?;
        }
        let mut part = PartFile::open(&to)?;
        part.restart()?;
        let (mut hash, mut chunk) = (Sha256Stream::default(), vec![0; 256 << 10]);
        loop {
            let n = match file.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => return self.refuse(part, &relative, &e.to_string()),
            };
            if part.length() + n as u64 > max {
                return self.refuse(part, &relative, &format!("it is longer than {max} bytes"));
            }
            hash.update(&chunk[..n]);
            part.write(&chunk[..n])?;
        }
        if let Some(entry) = entry {
            if part.length() != entry.bytes {
                let why = format!("it has {} bytes, the manifest says {}", part.length(), entry.bytes);
                return self.refuse(part, &relative, &why);
            }
            let found = hash.finish();
            if found != entry.sha256 {
                return self.refuse(
                    part,
                    &relative,
                    &format!("its SHA-256 is {found}, the manifest says {}", entry.sha256),
                );
            }
        }
        failpoint::step("import.copy", || part.finish())?;
        Ok(true)
    }

    fn refuse(&mut self, part: PartFile, name: &str, why: &str) -> Result<bool, ImportError> {
        part.discard()?;
        self.refusals.push(format!("{name}: {why}"));
        Ok(false)
    }
}

/// A refusal without our own directory's name.
fn reason(problem: &FollowError) -> String {
    match problem {
        FollowError::Refused { object, refusal, .. } => format!("{object}: {refusal} ({})", refusal.code()),
        FollowError::Fetch(e) if e.is_not_found() => format!("{}: it is not in the folder", e.name),
        FollowError::Fetch(e) => format!("{}: {}", e.name, e.detail),
        other => other.to_string(),
    }
}

fn behind(outcomes: &BTreeMap<StreamName, Outcome>) -> BTreeMap<StreamName, String> {
    let why = |outcome: &Outcome| match outcome {
        Outcome::AtHead => None,
        Outcome::Again(_, why) | Outcome::NoWay(why) => Some(why.clone()),
        Outcome::Halted => Some("writing has stopped after a failed sync; the next start goes on".into()),
        Outcome::Stopped => Some("the service is stopping; its next start goes on".into()),
    };
    outcomes.iter().filter_map(|(s, o)| Some((s.clone(), why(o)?))).collect()
}

#[cfg(test)]
mod tests;

//! Hand-carried objects: copied from a folder (a stick, a mail) into `import/`, from where they go the road that
//! downloads go: trust walk, manifest, packs by hash, trial. Only names of the layout are looked for; links
//! and `..` are refused. Answered by a receipt signed with the relay's key. Safe to repeat; if the power goes,
//! the next start uses what was copied whole.

use crate::relay::{Pace, Relay};
use crate::shelves::{self, RECEIPTS, Room};
use crate::stream::{Outcome, Supply};
use proto::digest::Sha256Stream;
use proto::failpoint;
use proto::fetch::Source;
use proto::follow::{self, FollowError, Follower};
use proto::ids::StreamName;
use proto::layout::{ObjectName, PackName};
use proto::manifest::PackEntry;
use proto::retry::Verdict;
use proto::shelf::{self, PartFile, ShelfError};
use proto::trust::Refusal;
use proto::wire::Receipt;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

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
    /// Our own files.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// `import/` as a source.
    #[error(transparent)]
    Source(#[from] proto::fetch::BadSource),
    /// A pack would not fit.
    #[error("{0}")]
    NoRoom(String),
    /// The receipt.
    #[error("the receipt cannot be written: {0}")]
    Receipt(#[from] serde_json::Error),
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
    /// Whether the folder's manifest was refused.
    pub refused: bool,
    /// Streams that are not at the manifest's version, and why.
    pub behind: BTreeMap<StreamName, String>,
}

impl Relay {
    /// Imports a folder.
    pub async fn import(&self, dir: &Path) -> Result<Imported, ImportError> {
        let folder = |reason: String| ImportError::Folder { dir: dir.to_owned(), reason };
        if !dir.is_dir() {
            return Err(folder("it is not a folder that this service can read".into()));
        }
        let _first = Importing::begin(self);
        let done = self.import_folder(dir).await;
        if let Err(e) = &done {
            self.import_failed(e);
        }
        done
    }

    /// Trouble with our own files is told like any other's; what was copied must not keep the disk full.
    fn import_failed(&self, e: &ImportError) {
        match e {
            ImportError::Shelf(e) => self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string()),
            ImportError::NoRoom(why) => self.own_trouble(Verdict::Retry, true, why),
            _ => {}
        }
        if let Err(e) = self.hall.shelves.clear_import() {
            self.own_trouble(e.verdict(), e.is_disk_full(), &e.to_string());
        }
    }

    async fn import_folder(&self, dir: &Path) -> Result<Imported, ImportError> {
        let folder = |reason: String| ImportError::Folder { dir: dir.to_owned(), reason };
        let mut work = Work { relay: self, dir: dir.to_owned(), taken: Vec::new(), refusals: Vec::new() };
        // 1. Trust files and this store's manifest are copied, then judged like any source's.
        self.hall.shelves.clear_import()?;
        let store = &self.hall.config.store;
        if !work.copy_claims()? {
            return Err(folder(format!(
                "there is no stores/{store}/manifest.json in it: was it exported for this store?"
            )));
        }
        let older = self.judge_import(&mut work).await?;
        // 2. The packs that the manifest lists and this store lacks.
        let packs = work.copy_packs(self.wanted())?;
        // 3. The road of all packs.
        let outcomes = self.take_import(&packs).await?;
        // 4. The answer.
        self.hall.shelves.clear_import()?;
        let behind = behind(&outcomes);
        let (receipt_file, receipt) = self.write_receipt(dir, &work.refusals)?;
        self.hall.event(
            "IMPORT",
            &dir.display().to_string(),
            &format!("{} new, {} refused", work.taken.len(), work.refusals.len()),
        );
        self.hall.wake.notify_one();
        Ok(Imported {
            already_here: work.taken.is_empty() && work.refusals.is_empty(),
            refused: older == Judged::Refused,
            taken: work.taken,
            receipt_file,
            receipt,
            behind,
        })
    }

    /// What a crash left in `import/` goes its way; then it is emptied. The folder can be imported again for its
    /// receipt.
    pub(crate) async fn finish_import(&self) {
        let _first = Importing::begin(self);
        let dir = self.hall.shelves.import_dir();
        let mut work = Work { relay: self, dir: dir.clone(), taken: Vec::new(), refusals: Vec::new() };
        let finish = async {
            self.judge_import(&mut work).await?;
            let whole = |(name, entry): &(PackName, PackEntry)| {
                shelves::hash_file(&self.hall.shelves.pack(Room::Import, name)).is_ok_and(|h| h == entry.sha256)
            };
            let packs = self.wanted().into_iter().filter(whole).map(|(name, _)| name).collect();
            self.take_import(&packs).await?;
            self.hall.shelves.clear_import()?;
            Ok::<(), ImportError>(())
        };
        if let Err(e) = finish.await {
            tracing::warn!(error = %e, "what a crash left of an import is not used");
            self.import_failed(&e);
        }
    }

    fn import_source(&self) -> Result<Source, ImportError> {
        let config = &self.hall.config;
        let dir = std::path::absolute(self.hall.shelves.import_dir())
            .map_err(|e| ImportError::Folder { dir: config.data_dir.clone(), reason: e.to_string() })?;
        Ok(Source::parse(&format!("file://{}", dir.display()), &config.source)?)
    }

    /// Judges the trust files and the manifest in `import/`.
    async fn judge_import(&self, work: &mut Work<'_>) -> Result<Judged, ImportError> {
        let source = self.import_source()?;
        let mut follower = Follower::new(vec![source.clone()]);
        let hall = &self.hall;
        let news = follower.refresh(&hall.device, &*hall.clock, &hall.config.limits, None).await;
        let trouble = self.take_news(&news, &[source]).await;
        let mut judged = if news.changed { Judged::Newer } else { Judged::Same };
        if news.changed {
            work.taken.push(ObjectName::Manifest(hall.config.store.clone()).to_string());
        }
        for problem in &news.problems {
            if matches!(problem, FollowError::Refused { refusal: Refusal::OlderSerial { .. }, .. }) {
                judged = Judged::Older;
            } else {
                judged = Judged::Refused;
                work.refusals.push(reason(problem));
            }
        }
        work.refusals.extend(trouble);
        Ok(judged)
    }

    /// The listed packs that are not at hand.
    fn wanted(&self) -> Vec<(PackName, PackEntry)> {
        let state = self.hall.state();
        let mut wanted = Vec::new();
        for (instance, entry) in state.instances() {
            for pack in &entry.packs {
                let name = pack.name(&instance);
                if state.ok.get(&name) != Some(&Some(pack.sha256)) && state.ready.get(&name) != Some(&pack.sha256) {
                    wanted.push((name, pack.clone()));
                }
            }
        }
        wanted
    }

    async fn take_import(&self, packs: &BTreeSet<PackName>) -> Result<BTreeMap<StreamName, Outcome>, ImportError> {
        let source = [self.import_source()?];
        Ok(self.bring_all_up(Supply { sources: &source, only: Some(packs) }, Pace::Once).await)
    }

    /// Signs the receipt and writes it beside the objects, or into the data directory when that cannot be.
    fn write_receipt(&self, dir: &Path, refusals: &[String]) -> Result<(PathBuf, Receipt), ImportError> {
        let hall = &self.hall;
        let receipt = {
            let state = hall.state();
            let digests = state.streams().into_iter().map(|(i, r)| (i, r.digests)).collect();
            Receipt {
                format: 1,
                store: hall.config.store.clone(),
                serial: state.manifest.as_ref().map(|m| m.serial),
                versions: state.versions(),
                digests,
                time: hall.clock.now(),
                refusals: refusals.to_vec(),
            }
        };
        let sealed = receipt.seal(follow::lock(&hall.device).key())?;
        let serial = receipt.serial.unwrap_or_default();
        let name = format!("{}-{serial:010}.receipt.json", receipt.store);
        let beside = dir.join(RECEIPTS);
        let written = shelf::create_dir(&beside).and_then(|()| {
            // A link could lead the writing anywhere.
            let real = std::fs::symlink_metadata(&beside).is_ok_and(|m| m.is_dir());
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

/// While it lives, downloads step back.
struct Importing<'a>(&'a Relay);

impl<'a> Importing<'a> {
    fn begin(relay: &'a Relay) -> Self {
        relay.importing.send_replace(true);
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
}

impl Work<'_> {
    /// Copies trust files and the store's manifest; whether there is a manifest.
    fn copy_claims(&mut self) -> Result<bool, ImportError> {
        let config = &self.relay.hall.config;
        let manifest = ObjectName::Manifest(config.store.clone());
        if !self.copy(&manifest, config.limits.manifest_bytes, None)? {
            return Ok(self.refusals.iter().any(|r| r.starts_with(&manifest.to_string())));
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

    /// Copies listed packs whose bytes are right; the rest is refused.
    fn copy_packs(&mut self, wanted: Vec<(PackName, PackEntry)>) -> Result<BTreeSet<PackName>, ImportError> {
        let mut copied = BTreeSet::new();
        for (name, entry) in wanted {
            let object = ObjectName::Pack(name.clone());
            if self.copy(&object, entry.bytes, Some(&entry))? {
                self.taken.push(object.to_string());
                copied.insert(name);
            }
        }
        Ok(copied)
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
        let hall = &self.relay.hall;
        if let Some(entry) = entry {
            hall.disk.fits(entry.bytes).map_err(|why| ImportError::NoRoom(format!("{relative}: {why}")))?;
        }
        let to = hall.shelves.path(Room::Import, name);
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
        FollowError::Fetch(e) => format!("{}: {}", e.name, e.detail),
        other => other.to_string(),
    }
}

fn behind(outcomes: &BTreeMap<StreamName, Outcome>) -> BTreeMap<StreamName, String> {
    let why = |outcome: &Outcome| match outcome {
        Outcome::AtHead => None,
        Outcome::Again(_, why) | Outcome::NoWay(why) => Some(why.clone()),
        Outcome::Halted => Some("writing has stopped after a failed sync".into()),
        Outcome::Stopped => Some("the service is stopping".into()),
    };
    outcomes.iter().filter_map(|(s, o)| Some((s.clone(), why(o)?))).collect()
}

#[cfg(test)]
mod tests;

//! The directories `incoming`, `ready`, `ok`, `error`, `import` and `receipts`: a view on the truth in
//! `shadow.db` (what was proved) and `relay.db` (what was given up). Paths below each are the objects'
//! own names. Owns every move between them; decides nothing about packs. If the power goes at any
//! line, `reconcile` at the next start makes the view agree with the truth again.

use crate::steps::Steps;
use crate::tries::Attempts;
use proto::digest::Sha256;
use proto::failpoint;
use proto::ids::Instance;
use proto::layout::{ObjectName, PackName};
use proto::manifest::PackEntry;
use proto::shelf::{self, Entry, ShelfError};
use rustix::io::Errno;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A directory of the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Downloads in work.
    Incoming,
    /// Whole and of the right hash, not yet tried.
    Ready,
    /// Proved on the shadow, and served.
    Ok,
    /// Given up, each with its reason beside it.
    Error,
    /// Copied from a stick, not yet looked at.
    Import,
}

impl Room {
    /// Its name in the data directory.
    pub fn dir(self) -> &'static str {
        match self {
            Room::Incoming => "incoming",
            Room::Ready => "ready",
            Room::Ok => "ok",
            Room::Error => "error",
            Room::Import => "import",
        }
    }
}

const ROOMS: [Room; 5] = [Room::Incoming, Room::Ready, Room::Ok, Room::Error, Room::Import];
/// Where receipts go when a stick cannot be written.
pub const RECEIPTS: &str = "receipts";
const PART: &str = ".part";
const REASON: &str = ".reason.json";

/// What the directories are a view of.
#[derive(Debug, Default)]
pub struct Truth {
    /// The packs that the manifest lists.
    pub listed: BTreeMap<PackName, PackEntry>,
    /// What the shadow proved, and the hash of what it was proved with.
    pub proofs: BTreeMap<PackName, Sha256>,
    /// The packs that failed.
    pub attempts: BTreeMap<PackName, Attempts>,
}

impl Truth {
    fn given_up(&self, name: &PackName) -> Option<&Attempts> {
        let attempts = self.attempts.get(name).filter(|a| a.in_error)?;
        let other = self.listed.get(name).is_some_and(|e| e.sha256 != attempts.sha256);
        (!other).then_some(attempts)
    }
}

/// What the directories hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The packs in `ok/`, bytes of each.
    pub ok: BTreeMap<PackName, u64>,
    /// The packs in `ready/`, bytes of each.
    pub ready: BTreeMap<PackName, u64>,
}

/// The text beside a pack in `error/`.
#[derive(Debug, Serialize)]
struct Reason<'a> {
    pack: &'a PackName,
    #[serde(flatten)]
    attempts: &'a Attempts,
}

/// The directories.
#[derive(Debug, Clone)]
pub struct Shelves {
    root: PathBuf,
    steps: Steps,
    /// Held by whoever moves or deletes a pack: else an emptied directory goes from under one on its way into it.
    moves: Arc<Mutex<()>>,
}

impl Shelves {
    /// Makes the directories where they are missing, and deletes what a crash left half-written.
    pub fn open(root: &Path, steps: Steps) -> Result<Shelves, ShelfError> {
        for room in ROOMS {
            shelf::create_dir(&root.join(room.dir()))?;
        }
        shelf::create_dir(&root.join(RECEIPTS))?;
        shelf::sweep(root)?;
        shelf::sweep(&root.join(RECEIPTS))?;
        let shelves = Shelves::new(root, steps);
        for room in ROOMS {
            for dir in shelves.all_dirs(room)? {
                shelf::sweep(&dir)?;
            }
        }
        Ok(shelves)
    }

    fn new(root: &Path, steps: Steps) -> Shelves {
        Shelves { root: root.to_owned(), steps, moves: Arc::default() }
    }

    /// Never around an await, nor around another move.
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where an object lies, or would.
    pub fn path(&self, room: Room, name: &ObjectName) -> PathBuf {
        self.root.join(room.dir()).join(name.to_string())
    }

    /// Where a pack lies, or would.
    pub fn pack(&self, room: Room, name: &PackName) -> PathBuf {
        let file = self.root.join(room.dir()).join("packs").join(name.to_string());
        match room {
            Room::Incoming => with_suffix(&file, PART),
            _ => file,
        }
    }

    fn reason(&self, name: &PackName) -> PathBuf {
        with_suffix(&self.pack(Room::Error, name), REASON)
    }

    /// The part to download a pack into; its directory is there.
    pub fn part(&self, name: &PackName) -> Result<PathBuf, ShelfError> {
        let part = self.pack(Room::Incoming, name);
        make_parent(&part)?;
        Ok(part)
    }

    /// A verified part becomes a pack to be tried.
    pub fn part_is_whole(&self, name: &PackName) -> Result<(), ShelfError> {
        self.step(failpoint::name("relay.ready"), Room::Incoming, Room::Ready, name)
    }

    /// A proved pack becomes one that is served.
    pub fn passed(&self, name: &PackName) -> Result<(), ShelfError> {
        self.step(failpoint::name("relay.ok"), Room::Ready, Room::Ok, name)
    }

    fn step(&self, what: &'static str, from: Room, to: Room, name: &PackName) -> Result<(), ShelfError> {
        let (from, to) = (self.pack(from, name), self.pack(to, name));
        let _alone = self.alone();
        make_parent(&to)?;
        self.steps.run(what, || shelf::promote(&from, &to))
    }

    /// Puts what there is of a bad pack into `error/`, with the reason. There may be no file: a
    /// source that cuts it short gives none.
    pub fn refuse(&self, name: &PackName, attempts: &Attempts) -> Result<(), ShelfError> {
        let to = self.pack(Room::Error, name);
        let _alone = self.alone();
        make_parent(&to)?;
        for room in [Room::Ready, Room::Incoming] {
            let from = self.pack(room, name);
            if from.is_file() {
                self.steps.run(failpoint::name("relay.error"), || shelf::promote(&from, &to))?;
                break;
            }
        }
        self.write_reason(name, attempts)
    }

    /// Keeps what a source gave instead of a pack.
    pub fn put_evidence(&self, name: &PackName, bytes: &[u8]) -> Result<(), ShelfError> {
        let path = self.pack(Room::Error, name);
        let _alone = self.alone();
        make_parent(&path)?;
        self.steps.run(failpoint::name("relay.evidence"), || shelf::write_durable(&path, bytes))
    }

    fn write_reason(&self, name: &PackName, attempts: &Attempts) -> Result<(), ShelfError> {
        let text = reason_text(name, attempts);
        self.steps.run(failpoint::name("relay.reason"), || shelf::write_durable(&self.reason(name), &text))
    }

    /// Whether the reason beside a pack is there and unharmed.
    fn has_reason(&self, name: &PackName, attempts: &Attempts) -> bool {
        let text = reason_text(name, attempts);
        shelf::read_bounded(&self.reason(name), text.len() as u64).is_ok_and(|there| there == text)
    }

    /// Takes a pack out of `error/` to be run again; whether it was there whole.
    pub fn take_back(&self, name: &PackName, bytes: u64) -> Result<bool, ShelfError> {
        let (from, to) = (self.pack(Room::Error, name), self.pack(Room::Ready, name));
        if !std::fs::symlink_metadata(&from).is_ok_and(|m| m.is_file() && m.len() == bytes) {
            return Ok(false);
        }
        let _alone = self.alone();
        make_parent(&to)?;
        self.steps.run(failpoint::name("relay.again"), || shelf::promote(&from, &to))?;
        shelf::remove(&self.reason(name))?;
        Ok(true)
    }

    /// Forgets a pack in `error/`: nothing of it stays, it is fetched again.
    pub fn forgive(&self, name: &PackName) -> Result<(), ShelfError> {
        failpoint::step("relay.forgive", || shelf::remove(&self.pack(Room::Error, name)))?;
        failpoint::step("relay.forgive-reason", || shelf::remove(&self.reason(name)))
    }

    /// Writes a small object into `ok/`.
    pub fn put_small(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), ShelfError> {
        let path = self.path(Room::Ok, name);
        if shelf::read_bounded(&path, bytes.len() as u64).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        make_parent(&path)?;
        let step = match name {
            ObjectName::Manifest(_) => failpoint::name("relay.manifest"),
            _ => failpoint::name("relay.trust"),
        };
        self.steps.run(step, || shelf::write_durable(&path, bytes))
    }

    /// Deletes trust files and manifests from `ok/`: nothing but their names tells another headquarters' from ours. Packs go
    /// by their hashes.
    pub fn drop_small(&self) -> Result<(), ShelfError> {
        let ok = self.root.join(Room::Ok.dir());
        shelf::remove(&self.path(Room::Ok, &ObjectName::Trust))?;
        let small = ["trust", "stores"].map(|dir| ok.join(dir));
        for dir in self.all_dirs(Room::Ok)?.into_iter().rev().filter(|d| small.iter().any(|s| d.starts_with(s))) {
            for file in list_if_there(&dir)?.iter().filter(|e| !e.is_dir) {
                shelf::remove(&file.path)?;
            }
            shelf::remove_empty_dir(&dir)?;
        }
        Ok(())
    }

    /// Deletes a pack from a directory.
    pub fn drop_pack(&self, room: Room, name: &PackName) -> Result<(), ShelfError> {
        let _alone = self.alone();
        self.remove_pack(room, name)
    }

    /// The same, of the rooms that `held` says, which forgets that it lies there: no other copy comes in between.
    pub fn drop_held(&self, name: &PackName, held: impl FnOnce() -> Vec<Room>) -> (bool, Vec<ShelfError>) {
        let _alone = self.alone();
        let rooms = held();
        (!rooms.is_empty(), rooms.into_iter().filter_map(|room| self.remove_pack(room, name).err()).collect())
    }

    fn remove_pack(&self, room: Room, name: &PackName) -> Result<(), ShelfError> {
        let path = self.pack(room, name);
        let step = match room {
            Room::Ok => failpoint::name("relay.drop-ok"),
            _ => failpoint::name("relay.drop"),
        };
        failpoint::step(step, || shelf::remove(&path))?;
        match path.parent() {
            Some(dir) => shelf::remove_empty_dir(dir),
            None => Ok(()),
        }
    }

    /// Deletes the parts of packs that nobody wants. Their directories stay: one may be about to be downloaded into.
    pub fn drop_parts(&self, is_wanted: impl Fn(&PackName) -> bool) -> Result<(), ShelfError> {
        for (name, part) in self.packs(Room::Incoming)? {
            if !is_wanted(&name) {
                let _alone = self.alone();
                failpoint::step("relay.drop", || shelf::remove(&part.path))?;
            }
        }
        Ok(())
    }

    /// Empties `import/`.
    pub fn clear_import(&self) -> Result<(), ShelfError> {
        for dir in self.all_dirs(Room::Import)?.into_iter().rev() {
            for entry in list_if_there(&dir)?.iter().filter(|e| !e.is_dir) {
                failpoint::step("import.clear", || shelf::remove(&entry.path))?;
            }
            if dir != self.root.join(Room::Import.dir()) {
                shelf::remove_empty_dir(&dir)?;
            }
        }
        Ok(())
    }

    /// `import/` itself.
    pub fn import_dir(&self) -> PathBuf {
        self.root.join(Room::Import.dir())
    }

    /// Whether a crash, or an import in work, left objects in `import/`.
    pub fn import_waits(&self) -> bool {
        self.all_dirs(Room::Import)
            .is_ok_and(|dirs| dirs.iter().any(|d| shelf::list(d).is_ok_and(|l| l.iter().any(|e| !e.is_dir))))
    }

    /// Makes the directories agree with the truth. Safe to run twice, and after a kill at any line.
    pub fn reconcile(&self, truth: &Truth) -> Result<Contents, ShelfError> {
        // 1. What is served: of the listed packs, only files that can be the proved ones.
        let mut contents = Contents::default();
        for (name, file) in self.packs(Room::Ok)? {
            if self.is_served(&name, &file, truth)? {
                contents.ok.insert(name, file.bytes);
            } else {
                tracing::warn!(pack = %name, "removed from ok/: not the file that the manifest lists");
                self.drop_pack(Room::Ok, &name)?;
            }
        }
        // 2. What was proved or given up but not yet moved; the rest that is listed stays to be tried.
        for (name, file) in self.packs(Room::Ready)? {
            match truth.listed.get(&name) {
                Some(entry) if entry.bytes == file.bytes && !contents.ok.contains_key(&name) => {
                    if truth.given_up(&name).is_some() {
                        continue; // 3.
                    } else if truth.proofs.get(&name) == Some(&entry.sha256) {
                        self.passed(&name)?;
                        contents.ok.insert(name, file.bytes);
                    } else {
                        contents.ready.insert(name, file.bytes);
                    }
                }
                _ => self.drop_pack(Room::Ready, &name)?,
            }
        }
        // 3. What was given up.
        for name in truth.attempts.keys() {
            if let Some(attempts) = truth.given_up(name)
                && (self.pack(Room::Ready, name).is_file() || !self.has_reason(name, attempts))
            {
                self.refuse(name, attempts)?;
            }
        }
        for (name, _) in self.packs(Room::Error)? {
            if truth.given_up(&name).is_none() {
                self.forgive(&name)?;
            }
        }
        // 4. Parts that are still wanted may go on.
        for (name, _) in self.packs(Room::Incoming)? {
            let there = contents.ok.contains_key(&name) || contents.ready.contains_key(&name);
            if there || !truth.listed.contains_key(&name) {
                self.drop_pack(Room::Incoming, &name)?;
            }
        }
        Ok(contents)
    }

    /// Whether a file in `ok/` may go on being served.
    fn is_served(&self, name: &PackName, file: &Entry, truth: &Truth) -> Result<bool, ShelfError> {
        let Some(entry) = truth.listed.get(name) else { return Ok(true) };
        if file.bytes != entry.bytes {
            return Ok(false);
        }
        if let Some(proof) = truth.proofs.get(name) {
            return Ok(proof == &entry.sha256);
        }
        // The shadow was lost, or a new epoch lists other bytes: the file itself must say.
        Ok(hash_if_readable(&file.path)? == Some(entry.sha256))
    }

    /// The packs in a directory. Files of other names are not looked at.
    fn packs(&self, room: Room) -> Result<Vec<(PackName, Entry)>, ShelfError> {
        let mut found = Vec::new();
        let packs = self.root.join(room.dir()).join("packs");
        for dir in list_if_there(&packs)?.into_iter().filter(|d| d.is_dir && d.name.parse::<Instance>().is_ok()) {
            for file in list_if_there(&dir.path)?.into_iter().filter(|f| !f.is_dir) {
                let own = if room == Room::Incoming { file.name.strip_suffix(PART) } else { Some(file.name.as_str()) };
                // A reason whose pack never came whole stands for it.
                let own = own.map(|n| if room == Room::Error { n.strip_suffix(REASON).unwrap_or(n) } else { n });
                if let Some(name) = own.and_then(|n| format!("{}/{n}", dir.name).parse().ok()) {
                    found.push((name, file));
                }
            }
        }
        Ok(found)
    }

    /// The packs in `ok/` of a relay that another process works on; nothing is put in order.
    pub fn look_at_ok(root: &Path) -> Result<Vec<PackName>, ShelfError> {
        let shelves = Shelves::new(root, Steps::default());
        Ok(shelves.packs(Room::Ok)?.into_iter().map(|(name, _)| name).collect())
    }

    /// The trust files in `ok/`, by number.
    pub fn trust_files(&self) -> Result<Vec<(u64, PathBuf)>, ShelfError> {
        let dir = self.root.join(Room::Ok.dir()).join("trust");
        let number = |e: &Entry| match format!("trust/{}", e.name).parse() {
            Ok(ObjectName::TrustVersion(n)) => Some(n),
            _ => None,
        };
        Ok(list_if_there(&dir)?.into_iter().filter_map(|e| Some((number(&e)?, e.path))).collect())
    }

    /// A directory and all below it, a parent before its children.
    fn all_dirs(&self, room: Room) -> Result<Vec<PathBuf>, ShelfError> {
        let mut dirs = vec![self.root.join(room.dir())];
        let mut at = 0;
        while let Some(dir) = dirs.get(at).cloned() {
            // The layout is two deep; what lies deeper is not ours.
            if dir.strip_prefix(&self.root).map_or(0, |d| d.components().count()) <= 3 {
                dirs.extend(list_if_there(&dir)?.into_iter().filter(|e| e.is_dir).map(|e| e.path));
            }
            at += 1;
        }
        Ok(dirs)
    }
}

fn reason_text(pack: &PackName, attempts: &Attempts) -> Vec<u8> {
    // A record of plain fields: writing it as JSON cannot fail.
    serde_json::to_vec_pretty(&Reason { pack, attempts }).unwrap_or_default()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(suffix);
    text.into()
}

fn make_parent(path: &Path) -> Result<(), ShelfError> {
    path.parent().map_or(Ok(()), shelf::create_dir)
}

/// The hash of a file's bytes; `None` where the file is gone, or the disk does not give its bytes any more.
pub fn hash_if_readable(path: &Path) -> Result<Option<Sha256>, ShelfError> {
    match shelf::hash_file(path) {
        Ok(hash) => Ok(Some(hash)),
        Err(e) if is_lost(&e.source) => Ok(None),
        Err(e) => Err(e),
    }
}

/// What is in a directory: nothing where there is none, or where somebody removes it meanwhile.
fn list_if_there(dir: &Path) -> Result<Vec<Entry>, ShelfError> {
    match shelf::list(dir) {
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.source.kind()) => Ok(Vec::new()),
        listed => listed,
    }
}

/// Whether an error says that a file itself is lost, and neither the machine short of something nor the way to it barred.
fn is_lost(e: &std::io::Error) -> bool {
    [Errno::NOENT, Errno::IO].into_iter().any(|lost| e.raw_os_error() == Some(lost.raw_os_error()))
}

/// Whether an error says that the machine is short of open files or memory: it says nothing of the file.
pub fn is_exhausted(e: &std::io::Error) -> bool {
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOMEM];
    e.kind() == ErrorKind::OutOfMemory || short.into_iter().any(|s| e.raw_os_error() == Some(s.raw_os_error()))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::tries::Cause;
    use proto::clock::Timestamp;
    use proto::ids::Version;
    use proto::layout::PackKind;
    use std::fs;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn name(v: u64) -> PackName {
        format!("price@zone-east/{v:010}.delta.pack").parse().unwrap()
    }
    fn body(v: u64) -> Vec<u8> {
        format!("pack {v}").into_bytes()
    }
    fn entry(v: u64) -> PackEntry {
        PackEntry {
            version: Version::try_from(v).unwrap(),
            kind: PackKind::Delta,
            base: None,
            bytes: body(v).len() as u64,
            unpacked: 1,
            sha256: Sha256::of(&body(v)),
        }
    }
    fn truth(listed: &[u64], proved: &[u64], failed: &[u64]) -> Truth {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let attempts = |v: u64| Attempts {
            sha256: entry(v).sha256,
            tries: 3,
            cause: Cause::Content,
            code: "DIGEST".into(),
            reason: "row 7".into(),
            since: now,
            last: now,
            in_error: true,
            unheard: false,
            judge: String::new(),
            told: false,
            etags: BTreeMap::new(),
        };
        Truth {
            listed: listed.iter().map(|v| (name(*v), entry(*v))).collect(),
            proofs: proved.iter().map(|v| (name(*v), entry(*v).sha256)).collect(),
            attempts: failed.iter().map(|v| (name(*v), attempts(*v))).collect(),
        }
    }
    fn shelves(dir: &Path) -> Shelves {
        Shelves::open(dir, Steps::default()).unwrap()
    }
    fn put(s: &Shelves, room: Room, v: u64, bytes: &[u8]) {
        let path = s.pack(room, &name(v));
        make_parent(&path).unwrap();
        fs::write(path, bytes).unwrap();
    }
    fn is_in(s: &Shelves, v: u64) -> Vec<Room> {
        ROOMS.into_iter().filter(|r| s.pack(*r, &name(v)).is_file()).collect()
    }

    #[test]
    fn a_start_makes_the_view_agree_with_the_truth() {
        let dir = tempfile::tempdir().unwrap();
        let s = shelves(dir.path());
        put(&s, Room::Ready, 1, &body(1)); // proved, not yet moved
        put(&s, Room::Ready, 2, &body(2)); // given up, not yet moved
        put(&s, Room::Ready, 3, &body(3)); // to be tried
        put(&s, Room::Ready, 4, b"short"); // a torn copy
        put(&s, Room::Ready, 5, &body(5)); // in two places
        put(&s, Room::Ok, 5, &body(5));
        put(&s, Room::Ok, 6, b"pack X"); // same length, other bytes, no proof
        put(&s, Room::Ok, 7, &body(7)); // no longer listed
        put(&s, Room::Incoming, 8, b"pa"); // half a download
        put(&s, Room::Incoming, 9, b"pa"); // half a download of nothing
        put(&s, Room::Error, 10, &body(10)); // forgiven
        put(&s, Room::Ok, 11, &body(11)); // proved with other bytes: another epoch
        let mut t = truth(&[1, 2, 3, 4, 5, 6, 8, 10, 11], &[1, 5], &[2]);
        t.proofs.insert(name(11), Sha256::of(b"other"));
        for _ in 0..2 {
            let contents = s.reconcile(&t).unwrap();
            assert_eq!(contents.ok.keys().cloned().collect::<Vec<_>>(), [name(1), name(5), name(7)]);
            assert_eq!(contents.ready.keys().cloned().collect::<Vec<_>>(), [name(3)]);
            assert_eq!(is_in(&s, 2), [Room::Error]);
            assert!(fs::read_to_string(s.reason(&name(2))).unwrap().contains("row 7"));
            assert_eq!(is_in(&s, 5), [Room::Ok]);
            assert_eq!(is_in(&s, 8), [Room::Incoming]);
            for gone in [4, 6, 9, 10, 11] {
                assert_eq!(is_in(&s, gone), [], "{gone}");
            }
        }
    }

    #[test]
    fn a_lost_file_is_told_from_a_machine_that_is_short_of_something() {
        let of = |e: Errno| std::io::Error::from(e);
        for lost in [Errno::NOENT, Errno::IO] {
            assert!(is_lost(&of(lost)) && !is_exhausted(&of(lost)));
        }
        for short in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert!(is_exhausted(&of(short)) && !is_lost(&of(short)));
        }
        assert!(!is_lost(&of(Errno::ACCESS)) && !is_exhausted(&of(Errno::ACCESS)));
    }

    #[test]
    fn a_lost_shadow_leaves_what_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let s = shelves(dir.path());
        put(&s, Room::Ok, 1, &body(1));
        let contents = s.reconcile(&truth(&[1], &[], &[])).unwrap();
        assert_eq!(contents.ok.len(), 1);
    }

    /// Pulls the plug before and after each durable step of a pack's way, then starts again.
    #[test]
    fn a_kill_at_any_step_is_put_right_by_the_next_start() {
        for bad in [false, true] {
            let mut killed_at = 0;
            loop {
                let dir = tempfile::tempdir().unwrap();
                let count = AtomicUsize::new(0);
                let steps = Steps::observed(move |_, _| {
                    assert!(count.fetch_add(1, Ordering::Relaxed) != killed_at, "power cut");
                });
                let s = Shelves::open(dir.path(), steps).unwrap();
                let t = truth(&[1], if bad { &[] } else { &[1] }, if bad { &[1] } else { &[] });
                put(&s, Room::Incoming, 1, &body(1));
                let way = catch_unwind(AssertUnwindSafe(|| {
                    s.part_is_whole(&name(1)).unwrap();
                    if bad { s.refuse(&name(1), &t.attempts[&name(1)]) } else { s.passed(&name(1)) }
                }));
                let again = shelves(dir.path());
                again.reconcile(&t).unwrap();
                let place = is_in(&again, 1);
                let wanted = if bad { Room::Error } else { Room::Ok };
                // A part is fetched on; everything else is where it belongs.
                assert!(place == [wanted] || (place == [Room::Incoming] && killed_at == 0), "{killed_at}: {place:?}");
                if way.is_ok() {
                    break;
                }
                killed_at += 1;
            }
            assert!(killed_at >= 4, "only {killed_at} steps were seen");
        }
    }

    /// A file that is not what it was is thrown away beside the work on its stream's other packs.
    #[test]
    fn an_emptied_directory_does_not_go_from_under_a_pack_on_its_way() {
        // In memory, where there is a place for that: it syncs some ten times a round.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let s = shelves(dir.path());
        std::thread::scope(|scope| {
            let way = scope.spawn(|| {
                for _ in 0..2_000 {
                    put(&s, Room::Incoming, 1, &body(1));
                    s.part_is_whole(&name(1)).unwrap();
                    s.passed(&name(1)).unwrap();
                    s.drop_pack(Room::Ok, &name(1)).unwrap();
                }
            });
            let beside = s.clone();
            while !way.is_finished() {
                for room in [Room::Ready, Room::Ok] {
                    beside.drop_pack(room, &name(2)).unwrap();
                    std::thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn directories_that_go_while_they_are_looked_through_are_empty() {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let s = shelves(dir.path());
        let packs = dir.path().join("incoming/packs");
        std::thread::scope(|scope| {
            let hand = scope.spawn(|| {
                for _ in 0..2_000 {
                    fs::create_dir_all(packs.join("price@zone-east")).unwrap();
                    fs::remove_dir_all(&packs).unwrap();
                }
            });
            while !hand.is_finished() {
                s.drop_parts(|_| true).unwrap();
            }
        });
    }

    #[test]
    fn import_is_emptied_whole() {
        let dir = tempfile::tempdir().unwrap();
        let s = shelves(dir.path());
        put(&s, Room::Import, 1, b"x");
        fs::write(s.import_dir().join("trust.json"), b"x").unwrap();
        assert!(s.import_waits());
        s.clear_import().unwrap();
        assert!(!s.import_waits() && s.import_dir().is_dir());
    }
}

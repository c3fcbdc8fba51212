//! A disk that knows what is synced, and what it may hold after the power went.
//!
//! Data of a file that was not synced may be kept, lost, or torn between sectors, and so may its length. A name
//! (created, renamed, removed) whose directory was not synced may be kept or lost, each for itself; a rename is atomic:
//! the old name, the new one, or both where it went to another directory. A journaling file system, which keeps its
//! changes of names in order and commits them all with any sync, is one of the ways in which it is cut.

use crate::trace::Call;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tillcast_tests::Dice;

const SECTOR: usize = 512;

/// Bytes with their hash, which is computed once.
#[derive(Debug, Default)]
pub struct Blob {
    /// The bytes.
    pub bytes: Vec<u8>,
    sha256: OnceLock<[u8; 32]>,
}

impl Blob {
    /// Some bytes.
    pub fn new(bytes: Vec<u8>) -> Arc<Blob> {
        Arc::new(Blob { bytes, sha256: OnceLock::new() })
    }
    /// Their SHA-256.
    pub fn sha256(&self) -> [u8; 32] {
        *self.sha256.get_or_init(|| Sha256::digest(&self.bytes).into())
    }
    /// The same in hex.
    pub fn hex(&self) -> String {
        hex::encode(self.sha256())
    }
}

/// All files by their paths relative to the site.
pub type Image = BTreeMap<String, Arc<Blob>>;

/// What a state is known by.
pub fn fingerprint(image: &Image) -> u128 {
    let mut hash = Sha256::new();
    for (path, blob) in image {
        hash.update(path.as_bytes());
        hash.update([0]);
        hash.update(blob.sha256());
    }
    let hash = hash.finalize();
    hash[..16].iter().fold(0, |n, byte| n << 8 | u128::from(*byte))
}

/// Whether a file is left out of the model: SQLite makes its index anew, locks and sockets hold nothing.
pub fn is_ignored(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.ends_with("-shm") || name == "lock" || name == "control.sock" || name == "strace.log"
}

/// The files below `root`, as they are.
pub fn image_of(root: &Path, watched: &[String]) -> Image {
    let mut image = Image::new();
    let mut rooms: Vec<PathBuf> = watched.iter().map(|w| root.join(w)).collect();
    while let Some(room) = rooms.pop() {
        for entry in std::fs::read_dir(&room).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(t) if t.is_dir() => rooms.push(path),
                Ok(t) if t.is_file() && !is_ignored(&path) => {
                    let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                    image.insert(name, Blob::new(std::fs::read(&path).unwrap()));
                }
                _ => {}
            }
        }
    }
    image
}

type Id = usize;

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Arc<[u8]>),
    Length(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Write(at, data) => put(bytes, *at, data),
            Change::Length(to) => bytes.resize(*to, 0),
        }
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

#[derive(Debug, Clone, Default)]
struct File {
    synced: Arc<Blob>,
    live: Vec<u8>,
    /// With the number of calls that had returned before.
    pending: Vec<(usize, Change)>,
    position: usize,
}

#[derive(Debug, Clone, Default)]
struct Dir {
    synced: BTreeMap<String, Id>,
    live: BTreeMap<String, Id>,
}

#[derive(Debug, Clone)]
enum Node {
    File(File),
    Dir(Dir),
}

/// What becomes of a name: a file or directory, or nothing.
#[derive(Debug, Clone)]
struct Half {
    dir: Id,
    name: String,
    to: Option<Id>,
    synced: bool,
}

/// A change of names that belongs together: first what appears, then what goes.
#[derive(Debug, Clone)]
struct Naming {
    at: usize,
    halves: Vec<Half>,
}

/// The disk.
#[derive(Debug, Clone)]
pub struct Disk {
    root: PathBuf,
    nodes: Vec<Node>,
    namings: Vec<Naming>,
    /// Calls before this were done when the last sync of anything began: a journal has committed their names.
    committed: usize,
    calls: usize,
}

/// How a state is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Whatever is not synced is gone.
    Lost,
    /// All is there: the process was killed, the power stayed.
    Kept,
    /// Every sector and name for itself, kept in so many of a hundred.
    Each(u64),
    /// All is there but one file's or name's change, which is drawn.
    OneDrawn,
    /// Nothing is there but one file's or name's change, which is drawn.
    OneKept,
    /// Calls in order up to some moment, the last one torn.
    InOrder,
    /// A journal of names, committed by every sync; data before names.
    Journal,
}

/// The ways, by weight.
const WAYS: [Way; 10] = [
    Way::Each(50),
    Way::Each(90),
    Way::Each(10),
    Way::Each(98),
    Way::OneDrawn,
    Way::OneDrawn,
    Way::OneKept,
    Way::InOrder,
    Way::InOrder,
    Way::Journal,
];

impl Disk {
    /// A disk that holds this image, all of it synced.
    pub fn new(root: &Path, image: &Image, dirs: &[String]) -> Disk {
        let mut disk = Disk {
            root: root.to_owned(),
            nodes: vec![Node::Dir(Dir::default())],
            namings: Vec::new(),
            committed: 0,
            calls: 0,
        };
        for dir in dirs {
            disk.make(dir, Node::Dir(Dir::default()));
        }
        for (path, blob) in image {
            let file = File { synced: blob.clone(), live: blob.bytes.clone(), ..File::default() };
            disk.make(path, Node::File(file));
        }
        disk
    }

    /// Puts a synced file or directory, and the directories above it.
    fn make(&mut self, path: &str, node: Node) {
        let mut at = 0;
        let steps: Vec<&str> = path.split('/').collect();
        for (i, step) in steps.iter().enumerate() {
            let known = self.dir(at).live.get(*step).copied();
            at = known.unwrap_or_else(|| {
                let node = if i + 1 == steps.len() { node.clone() } else { Node::Dir(Dir::default()) };
                self.nodes.push(node);
                let id = self.nodes.len() - 1;
                let dir = self.dir_mut(at);
                dir.live.insert((*step).to_owned(), id);
                dir.synced.insert((*step).to_owned(), id);
                id
            });
        }
    }

    fn dir(&self, id: Id) -> &Dir {
        match &self.nodes[id] {
            Node::Dir(d) => d,
            Node::File(_) => panic!("a file is used as a directory"),
        }
    }

    fn dir_mut(&mut self, id: Id) -> &mut Dir {
        match &mut self.nodes[id] {
            Node::Dir(d) => d,
            Node::File(_) => panic!("a file is used as a directory"),
        }
    }

    /// A path relative to the site; none for what lies outside or is left out.
    pub fn inside(&self, path: &Path) -> Option<String> {
        let inner = path.strip_prefix(&self.root).ok()?;
        (!is_ignored(path)).then(|| inner.to_string_lossy().into_owned())
    }

    fn find(&self, path: &Path) -> Option<Id> {
        let inner = path.strip_prefix(&self.root).ok()?;
        let mut at = 0;
        for step in inner.components() {
            let Node::Dir(dir) = &self.nodes[at] else { return None };
            at = *dir.live.get(step.as_os_str().to_string_lossy().as_ref())?;
        }
        Some(at)
    }

    /// The directory and the name of a path, if the directory is known.
    fn place(&self, path: &Path) -> Option<(Id, String)> {
        self.inside(path)?;
        let dir = self.find(path.parent()?)?;
        Some((dir, path.file_name()?.to_string_lossy().into_owned()))
    }

    fn file_mut(&mut self, path: &Path) -> Option<&mut File> {
        let id = self.find(path)?;
        match &mut self.nodes[id] {
            Node::File(f) => Some(f),
            Node::Dir(_) => None,
        }
    }

    /// Changes names, live at once.
    fn name(&mut self, changes: Vec<(Id, String, Option<Id>)>) {
        let mut halves = Vec::new();
        for (dir, name, to) in changes {
            match to {
                Some(id) => self.dir_mut(dir).live.insert(name.clone(), id),
                None => self.dir_mut(dir).live.remove(&name),
            };
            halves.push(Half { dir, name, to, synced: false });
        }
        self.namings.push(Naming { at: self.calls, halves });
    }

    fn change(&mut self, path: &Path, change: Change) {
        let at = self.calls;
        if let Some(file) = self.file_mut(path) {
            change.apply(&mut file.live);
            file.pending.push((at, change));
        }
    }

    /// Takes a call.
    pub fn take(&mut self, call: &Call) {
        match call {
            Call::Open { path, create, cut } => self.open(path, *create, *cut),
            Call::Write { path, at, data } => {
                let Some(position) = self.file_mut(path).map(|f| f.position) else { return self.done() };
                let start = at.map_or(position, |a| a as usize);
                self.change(path, Change::Write(start, data.as_slice().into()));
                if let Some(f) = self.file_mut(path).filter(|_| at.is_none()) {
                    f.position = start + data.len();
                }
            }
            Call::Length { path, to } => self.change(path, Change::Length(*to as usize)),
            Call::Reserve { path, to } => {
                let grown = self.file_mut(path).map(|f| f.live.len().max(*to as usize));
                if let Some(to) = grown {
                    self.change(path, Change::Length(to));
                }
            }
            Call::Seek { path, to } => {
                if let Some(f) = self.file_mut(path) {
                    f.position = *to as usize;
                }
            }
            Call::Copy { from, to, bytes } => self.copy(from, to, *bytes as usize),
            Call::Rename { from, to } => {
                if let (Some(old), Some(new), Some(id)) = (self.place(from), self.place(to), self.find(from)) {
                    self.name(vec![(new.0, new.1, Some(id)), (old.0, old.1, None)]);
                }
            }
            Call::Link { from, to } => {
                if let (Some(id), Some((dir, name))) = (self.find(from), self.place(to)) {
                    self.name(vec![(dir, name, Some(id))]);
                }
            }
            Call::Unlink { path } | Call::RemoveDir { path } => {
                if let (Some(_), Some((dir, name))) = (self.find(path), self.place(path)) {
                    self.name(vec![(dir, name, None)]);
                }
            }
            Call::MakeDir { path } => {
                if let Some((dir, name)) = self.place(path) {
                    self.nodes.push(Node::Dir(Dir::default()));
                    self.name(vec![(dir, name, Some(self.nodes.len() - 1))]);
                }
            }
            Call::Sync { path, covers } => self.sync(path, *covers),
            Call::FailedSync { .. } | Call::Say { .. } => {}
        }
        self.done();
    }

    fn done(&mut self) {
        self.calls += 1;
    }

    fn open(&mut self, path: &Path, create: bool, cut: bool) {
        if self.find(path).is_none() {
            if create && let Some((dir, name)) = self.place(path) {
                self.nodes.push(Node::File(File::default()));
                self.name(vec![(dir, name, Some(self.nodes.len() - 1))]);
            }
            return;
        }
        if cut && self.file_mut(path).is_some_and(|f| !f.live.is_empty()) {
            self.change(path, Change::Length(0));
        }
        if let Some(f) = self.file_mut(path) {
            f.position = 0;
        }
    }

    fn copy(&mut self, from: &Path, to: &Path, bytes: usize) {
        let data = match self.file_mut(from) {
            Some(f) => {
                let start = f.position.min(f.live.len());
                let end = (start + bytes).min(f.live.len());
                f.position = end;
                f.live[start..end].to_vec()
            }
            // From outside: it is copied as a whole, by one call.
            None => std::fs::read(from).unwrap_or_default().into_iter().take(bytes).collect(),
        };
        let Some(start) = self.file_mut(to).map(|f| f.position) else { return };
        let end = start + data.len();
        self.change(to, Change::Write(start, data.into()));
        if let Some(f) = self.file_mut(to) {
            f.position = end;
        }
    }

    fn sync(&mut self, path: &Path, covers: usize) {
        let Some(id) = self.find(path) else { return };
        self.committed = self.committed.max(covers);
        match &mut self.nodes[id] {
            Node::File(f) => {
                let (covered, rest): (Vec<_>, Vec<_>) = f.pending.drain(..).partition(|(at, _)| *at < covers);
                if !covered.is_empty() {
                    let mut bytes = f.synced.bytes.clone();
                    covered.iter().for_each(|(_, change)| change.apply(&mut bytes));
                    f.synced = Blob::new(bytes);
                }
                f.pending = rest;
            }
            Node::Dir(dir) => {
                for naming in self.namings.iter_mut().filter(|n| n.at < covers) {
                    for half in naming.halves.iter_mut().filter(|h| h.dir == id && !h.synced) {
                        half.synced = true;
                        match half.to {
                            Some(to) => dir.synced.insert(half.name.clone(), to),
                            None => dir.synced.remove(&half.name),
                        };
                    }
                }
                self.namings.retain(|n| n.halves.iter().any(|h| !h.synced));
            }
        }
    }

    /// Whether a state could differ from what all processes saw.
    pub fn is_all_synced(&self) -> bool {
        self.namings.is_empty() && self.nodes.iter().all(|n| !matches!(n, Node::File(f) if !f.pending.is_empty()))
    }

    /// The bytes of a file, as processes see it now.
    pub fn live(&self, path: &Path) -> Option<&[u8]> {
        match &self.nodes[self.find(path)?] {
            Node::File(f) => Some(&f.live),
            Node::Dir(_) => None,
        }
    }

    /// What the processes see.
    pub fn live_image(&self) -> Image {
        self.cut(Way::Kept, &mut Dice::of(0, 0))
    }

    /// A state after a power cut, in a way that is drawn.
    pub fn cut_anyhow(&self, dice: &mut Dice) -> Image {
        let way = WAYS[dice.index(WAYS.len())];
        self.cut(way, dice)
    }

    /// A state after a power cut.
    pub fn cut(&self, way: Way, dice: &mut Dice) -> Image {
        let dirty: Vec<Id> = (0..self.nodes.len()).filter(|i| self.is_dirty(*i)).collect();
        let one = dice.index(dirty.len() + self.namings.len());
        let moment = match way {
            Way::Journal => self.committed + dice.index(self.calls + 1 - self.committed.min(self.calls)),
            _ => dice.index(self.calls + 1),
        };
        let mut names: BTreeMap<Id, BTreeMap<String, Id>> = BTreeMap::new();
        for (i, naming) in self.namings.iter().enumerate() {
            let drawn = i + dirty.len() == one;
            let kept = match way {
                Way::Lost => 0,
                Way::Kept => 100,
                Way::Each(p) => p,
                Way::OneDrawn => {
                    if drawn {
                        50
                    } else {
                        100
                    }
                }
                Way::OneKept => {
                    if drawn {
                        100
                    } else {
                        0
                    }
                }
                Way::InOrder | Way::Journal => {
                    if naming.at < moment {
                        100
                    } else {
                        0
                    }
                }
            };
            self.keep_names(naming, kept, dice, &mut names);
        }
        let mut image = Image::new();
        let mut contents = BTreeMap::new();
        for (i, id) in dirty.iter().enumerate() {
            let Node::File(file) = &self.nodes[*id] else { continue };
            contents.insert(*id, Blob::new(content(file, way, i == one, moment, dice)));
        }
        self.walk(0, "", &names, &contents, &mut image);
        image
    }

    fn is_dirty(&self, id: Id) -> bool {
        matches!(&self.nodes[id], Node::File(f) if !f.pending.is_empty())
    }

    /// What of one change of names is kept.
    fn keep_names(
        &self,
        naming: &Naming,
        percent: u64,
        dice: &mut Dice,
        names: &mut BTreeMap<Id, BTreeMap<String, Id>>,
    ) {
        let one_dir = naming.halves.iter().all(|h| h.dir == naming.halves[0].dir);
        // A rename never loses both names: what appears goes first, and must be there when the other is gone.
        let must = naming.halves.iter().skip(1).any(|h| h.synced);
        let mut before = false;
        for (i, half) in naming.halves.iter().enumerate() {
            let keep = if i == 0 {
                half.synced || must || dice.percent(percent)
            } else if one_dir {
                before
            } else {
                half.synced || before && dice.percent(percent)
            };
            before = keep;
            if keep && !half.synced {
                let entries = names.entry(half.dir).or_insert_with(|| self.dir(half.dir).synced.clone());
                match half.to {
                    Some(to) => entries.insert(half.name.clone(), to),
                    None => entries.remove(&half.name),
                };
            }
        }
    }

    fn walk(
        &self,
        dir: Id,
        prefix: &str,
        names: &BTreeMap<Id, BTreeMap<String, Id>>,
        contents: &BTreeMap<Id, Arc<Blob>>,
        image: &mut Image,
    ) {
        for (name, id) in names.get(&dir).unwrap_or(&self.dir(dir).synced) {
            let path = format!("{prefix}{name}");
            match &self.nodes[*id] {
                Node::Dir(_) => self.walk(*id, &format!("{path}/"), names, contents, image),
                Node::File(f) => {
                    image.insert(path, contents.get(id).unwrap_or(&f.synced).clone());
                }
            }
        }
    }
}

/// What is left of a file.
fn content(file: &File, way: Way, one: bool, moment: usize, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = file.synced.bytes.clone();
    match way {
        Way::Kept => bytes.clone_from(&file.live),
        Way::Lost => {}
        Way::Each(percent) => sectors(&mut bytes, &file.pending, percent, dice),
        Way::OneDrawn if !one => bytes.clone_from(&file.live),
        Way::OneKept if !one => {}
        Way::OneDrawn | Way::OneKept => {
            // Half of it in order, half of it sector by sector.
            let n = dice.index(file.pending.len() + 1);
            file.pending[..n].iter().for_each(|(_, change)| change.apply(&mut bytes));
            if dice.percent(50) {
                let percent = [5, 50, 95][dice.index(3)];
                sectors(&mut bytes, &file.pending[n..], percent, dice);
            } else if let Some(torn) = file.pending.get(n..n + 1) {
                sectors(&mut bytes, torn, 50, dice);
            }
        }
        Way::InOrder | Way::Journal => {
            let n = file.pending.iter().filter(|(at, _)| *at < moment).count();
            file.pending[..n].iter().for_each(|(_, change)| change.apply(&mut bytes));
            if let Some(torn) = file.pending.get(n..n + 1) {
                sectors(&mut bytes, torn, 50, dice);
            }
        }
    }
    bytes
}

/// Keeps so many of a hundred sectors of what was written, and of changed lengths.
fn sectors(bytes: &mut Vec<u8>, changes: &[(usize, Change)], percent: u64, dice: &mut Dice) {
    for (_, change) in changes {
        match change {
            Change::Length(_) => {
                if dice.percent(percent) {
                    change.apply(bytes);
                }
            }
            Change::Write(at, data) => {
                let (mut start, end) = (*at, at + data.len());
                while start < end {
                    let next = ((start / SECTOR + 1) * SECTOR).min(end);
                    if dice.percent(percent) {
                        put(bytes, start, &data[start - at..next - at]);
                    } else if bytes.len() < next && dice.percent(20) {
                        // The length came, the data did not.
                        bytes.resize(next, 0);
                    }
                    start = next;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Disk {
        Disk::new(Path::new("/s"), &Image::new(), &["a".into(), "b".into()])
    }

    fn p(path: &str) -> PathBuf {
        Path::new("/s").join(path)
    }

    fn write(path: &str, at: u64, data: &[u8]) -> Call {
        Call::Write { path: p(path), at: Some(at), data: data.into() }
    }

    fn open(path: &str) -> Call {
        Call::Open { path: p(path), create: true, cut: false }
    }

    /// All the states that some thousand cuts show: paths with their contents.
    fn states(disk: &Disk) -> std::collections::BTreeSet<Vec<(String, Vec<u8>)>> {
        let mut dice = Dice::of(1, 1);
        let show = |i: Image| i.iter().map(|(p, b)| (p.clone(), b.bytes.clone())).collect();
        (0..4000).map(|_| show(disk.cut_anyhow(&mut dice))).collect()
    }

    fn all(disk: &mut Disk, calls: &[Call]) {
        for call in calls {
            let covers = disk.calls;
            match call {
                Call::Sync { path, .. } => disk.take(&Call::Sync { path: path.clone(), covers }),
                other => disk.take(other),
            }
        }
    }

    fn sync(path: &str) -> Call {
        Call::Sync { path: p(path), covers: 0 }
    }

    #[test]
    fn what_is_not_synced_may_be_kept_lost_or_torn() {
        let mut d = disk();
        all(&mut d, &[open("a/f"), sync("a"), write("a/f", 0, &[1; 1024])]);
        let lengths: Vec<(usize, u8, u8)> = states(&d)
            .iter()
            .map(|s| &s[0].1)
            .map(|b| (b.len(), b.first().copied().unwrap_or(9), b.last().copied().unwrap_or(9)))
            .collect();
        // Nothing; the first half; all; the second half alone; lengths whose data did not come.
        for wanted in [(0, 9, 9), (512, 1, 1), (1024, 1, 1), (1024, 0, 1), (1024, 1, 0), (512, 0, 0), (1024, 0, 0)] {
            assert!(lengths.contains(&wanted), "{wanted:?} in {lengths:?}");
        }
        all(&mut d, &[sync("a/f")]);
        assert_eq!(states(&d).len(), 1);
        assert!(d.is_all_synced());
    }

    #[test]
    fn a_sync_covers_only_what_had_returned_before() {
        let mut d = disk();
        all(&mut d, &[open("a/f"), sync("a")]);
        let covers = d.calls;
        d.take(&write("a/f", 0, &[1; 8]));
        d.take(&Call::Sync { path: p("a/f"), covers });
        assert_eq!(states(&d).len(), 3);
    }

    #[test]
    fn a_rename_is_old_new_or_both_but_never_neither() {
        let mut d = disk();
        all(&mut d, &[open("a/f"), sync("a/f"), sync("a"), Call::Rename { from: p("a/f"), to: p("b/f") }]);
        let names = |d: &Disk| -> Vec<String> {
            states(d).iter().map(|s| s.iter().map(|(p, _)| p.as_str()).collect::<Vec<_>>().join(" ")).collect()
        };
        assert_eq!(names(&d), ["a/f", "a/f b/f", "b/f"]);
        all(&mut d, &[sync("b")]);
        assert_eq!(names(&d), ["a/f b/f", "b/f"]);
        all(&mut d, &[sync("a")]);
        assert_eq!(names(&d), ["b/f"]);
        all(&mut d, &[open("b/g"), sync("b"), Call::Rename { from: p("b/f"), to: p("b/g") }]);
        assert_eq!(names(&d), ["b/f b/g", "b/g"], "in one directory it is atomic");
    }
}

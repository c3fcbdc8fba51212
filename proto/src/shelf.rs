//! Durable files: the only room that renames, syncs and deletes.
//!
//! Owns the order "write aside, fsync, rename, fsync the directory", so that it cannot be forgotten
//! at a call site. Never retries an fsync: after a failed one the kernel may have dropped the pages
//! and called them clean, so the error is `Halt`. If the power goes at any line, a name holds its
//! old bytes or its new ones, whole; what was written aside is swept at the next start.
#![allow(clippy::disallowed_methods, reason = "the one room that touches files for writing")]

use crate::digest::{Sha256, Sha256Stream};
use crate::failpoint;
use crate::retry::Verdict;
use rustix::fs::{AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An action on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct ShelfError {
    /// What was tried.
    pub action: Action,
    /// On which file or directory.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// What this room does to files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Open or inspect.
    Open,
    /// Read.
    Read,
    /// Create a file or directory.
    Create,
    /// Write, cut or reserve.
    Write,
    /// Bring to the disk; never tried twice.
    Sync,
    /// Rename or link.
    Rename,
    /// Delete.
    Remove,
    /// Lock.
    Lock,
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Action::Open => "open",
            Action::Read => "read",
            Action::Create => "create",
            Action::Write => "write",
            Action::Sync => "sync to disk",
            Action::Rename => "rename",
            Action::Remove => "remove",
            Action::Lock => "lock",
        })
    }
}

impl ShelfError {
    /// Halt after a failed sync; otherwise the surroundings are to blame.
    pub fn verdict(&self) -> Verdict {
        if self.action == Action::Sync { Verdict::Halt } else { Verdict::Retry }
    }
    /// Whether there is no such file.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
    /// Whether the disk (or quota) is full.
    pub fn is_disk_full(&self) -> bool {
        is_disk_full(&self.source)
    }
}

/// Whether an error says that the disk or a quota is full.
pub fn is_disk_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Names the action and the path of what failed.
trait At<T> {
    fn at(self, action: Action, path: &Path) -> Result<T, ShelfError>;
}
impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, action: Action, path: &Path) -> Result<T, ShelfError> {
        self.map_err(|e| ShelfError { action, path: path.to_owned(), source: e.into() })
    }
}

/// The directory a path lies in; `.` for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Makes a file's name durable, or that it has none any more.
pub fn sync_name(path: &Path) -> Result<(), ShelfError> {
    let dir = parent(path);
    File::open(dir).at(Action::Open, dir)?.sync_all().at(Action::Sync, dir)
}

/// Makes a directory and all above it, durably; one that is there is fine.
pub fn create_dir(path: &Path) -> Result<(), ShelfError> {
    let mut missing = Vec::new();
    let mut at = path;
    loop {
        match fs::metadata(at) {
            Ok(m) if m.is_dir() => break,
            Ok(_) => return Err(io::Error::from(io::ErrorKind::NotADirectory)).at(Action::Create, at),
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(at),
            Err(e) => return Err(e).at(Action::Create, at),
        }
        at = parent(at);
        if at == Path::new(".") {
            break;
        }
    }
    if missing.is_empty()
        && let Ok(above) = File::open(parent(path))
    {
        // It may be there since a crash before the directory above it was synced.
        return above.sync_all().at(Action::Sync, parent(path));
    }
    for dir in missing.into_iter().rev() {
        match fs::DirBuilder::new().mode(0o755).create(dir) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(e) => return Err(e).at(Action::Create, dir),
        }
        sync_name(dir)?;
    }
    Ok(())
}

const ASIDE: &str = ".tmp-";

/// A file written beside its final name; removed when dropped before it got there.
struct Aside {
    path: PathBuf,
    placed: bool,
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes and syncs what `fill` gives, beside `path`.
fn write_aside(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<Aside, ShelfError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (dir, n) = (parent(path), NEXT.fetch_add(1, Ordering::Relaxed));
    let (mut file, aside) = loop {
        let random = getrandom::u32().unwrap_or_default();
        let aside = dir.join(format!("{ASIDE}{}-{n}-{random:08x}", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).mode(mode).open(&aside) {
            Ok(file) => break (file, Aside { path: aside, placed: false }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).at(Action::Create, path),
        }
    };
    fill(&mut file).at(Action::Write, path)?;
    file.sync_all().at(Action::Sync, path)?;
    Ok(aside)
}

/// Writes a file, replacing what has the name. At success it survives a power cut; before, the old
/// bytes do.
pub fn write_durable(path: &Path, bytes: &[u8]) -> Result<(), ShelfError> {
    replace(path, 0o644, |f| f.write_all(bytes))
}

/// The same, for secrets: nobody but the owner may read it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), ShelfError> {
    replace(path, 0o600, |f| f.write_all(bytes))
}

/// The same, for what a web server gives out: shared ([`share`]), and of a later second than what it replaces. By that and
/// the length servers tell its states apart, and would answer of the new bytes that they are the old ones.
pub fn write_public(path: &Path, bytes: &[u8]) -> Result<(), ShelfError> {
    replace(path, 0o644, |f| {
        f.write_all(bytes)?;
        let new = f.metadata()?;
        if let Some(mode) = widened(&new, path) {
            let _ = f.set_permissions(mode);
        }
        if let Ok(old) = fs::symlink_metadata(path)
            && (0..AHEAD_S).contains(&(old.mtime() - new.mtime()))
            && let Some(later) = old.modified()?.checked_add(Duration::from_secs(1))
        {
            let _ = f.set_modified(later);
        }
        Ok(())
    })
}

/// How far a file's time may run ahead by many writes in one second; one that a wrong clock wrote is not followed.
const AHEAD_S: i64 = 600;

/// Lets who may read a file's or directory's own directory read it, too, whatever the umask was. Where that cannot be, it
/// stays as it is.
pub fn share(path: &Path) {
    if let Some(mode) = fs::symlink_metadata(path).ok().and_then(|m| widened(&m, path)) {
        let _ = fs::set_permissions(path, mode);
    }
}

/// The mode that lets in who may read the directory, if that is a wider one.
fn widened(meta: &fs::Metadata, path: &Path) -> Option<fs::Permissions> {
    let readers = match meta.is_dir() {
        true => 0o055,
        false if meta.is_file() => 0o044,
        false => return None,
    };
    let mode = meta.mode() & 0o7777;
    let wanted = mode | (fs::metadata(parent(path)).ok()?.mode() & readers);
    (wanted != mode).then(|| fs::Permissions::from_mode(wanted))
}

fn replace(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ShelfError> {
    let mut aside = write_aside(path, mode, fill)?;
    failpoint::inside("aside");
    fs::rename(&aside.path, path).at(Action::Rename, path)?;
    aside.placed = true;
    failpoint::inside("renamed");
    sync_name(path)?;
    sweep_old(path);
    Ok(())
}

/// Whether a create-only write wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum New {
    /// The file is new.
    Written,
    /// The name was taken; nothing was touched. Compare its bytes if it matters.
    AlreadyThere,
}

/// Writes a file only if the name is free, durably; a crash leaves all of it or nothing.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<New, ShelfError> {
    place_new(path, |f| f.write_all(bytes))
}

/// Copies a file, also from another disk, to a name only if that is free; durably, in bounded memory.
pub fn copy_new(from: &Path, to: &Path) -> Result<New, ShelfError> {
    let mut source = open_regular(from)?;
    place_new(to, |f| io::copy(&mut source, f).map(|_| ()))
}

fn place_new(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<New, ShelfError> {
    if fs::symlink_metadata(path).is_ok() {
        // It may be there since a crash before its directory was synced.
        sync_name(path)?;
        return Ok(New::AlreadyThere);
    }
    let mut aside = write_aside(path, 0o644, fill)?;
    failpoint::inside("aside");
    let outcome = match rustix::fs::renameat_with(CWD, &aside.path, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {
            aside.placed = true;
            New::Written
        }
        Err(Errno::EXIST) => New::AlreadyThere,
        // File systems without RENAME_NOREPLACE: a link never replaces either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            match rustix::fs::linkat(CWD, &aside.path, CWD, path, AtFlags::empty()) {
                Ok(()) => New::Written,
                Err(Errno::EXIST) => New::AlreadyThere,
                Err(e) => return Err(e).at(Action::Rename, path),
            }
        }
        Err(e) => return Err(e).at(Action::Rename, path),
    };
    drop(aside);
    failpoint::inside("renamed");
    sync_name(path)?;
    sweep_old(path);
    Ok(outcome)
}

/// Moves a finished file to its next directory, durably. Done already (`to` there, `from` gone) is
/// fine; `to` is replaced.
pub fn promote(from: &Path, to: &Path) -> Result<(), ShelfError> {
    match open_regular(from) {
        Ok(file) => {
            file.sync_all().at(Action::Sync, from)?;
            failpoint::inside("synced");
            fs::rename(from, to).at(Action::Rename, to)?;
            failpoint::inside("renamed");
        }
        Err(e) if e.is_not_found() && fs::symlink_metadata(to).is_ok_and(|m| m.is_file()) => {}
        Err(e) => return Err(e),
    }
    sync_name(to)?;
    if parent(to) != parent(from) && parent(from).exists() {
        sync_name(from)?;
    }
    Ok(())
}

/// Deletes a file, durably; one that is gone is fine.
pub fn remove(path: &Path) -> Result<(), ShelfError> {
    match fs::remove_file(path) {
        Ok(()) => {
            failpoint::inside("removed");
            sync_name(path)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).at(Action::Remove, path),
    }
}

/// Deletes an empty directory; one that is gone, or holds something, is left.
pub fn remove_empty_dir(path: &Path) -> Result<(), ShelfError> {
    match fs::remove_dir(path) {
        Ok(()) => sync_name(path),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(()),
        Err(e) => Err(e).at(Action::Remove, path),
    }
}

/// Deletes what a crash left half-written in `dir`. Only under the directory's lock.
pub fn sweep(dir: &Path) -> Result<usize, ShelfError> {
    let mut swept = 0;
    for entry in fs::read_dir(dir).at(Action::Open, dir)? {
        let entry = entry.at(Action::Read, dir)?;
        if is_aside(&entry.file_name()) {
            remove(&entry.path())?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// How much older than a file that was just written an aside must be to be nobody's work.
const ABANDONED_NS: i128 = 3_600_000_000_000;

/// Deletes what crashes left beside a file that was just written, where nobody holds a lock to [`sweep`] under.
fn sweep_old(written: &Path) {
    let (Ok(now), Ok(entries)) = (fs::symlink_metadata(written), fs::read_dir(parent(written))) else { return };
    for entry in entries.flatten().filter(|e| is_aside(&e.file_name())) {
        let is_old = |m: fs::Metadata| modified_ns(&now) - modified_ns(&m) > ABANDONED_NS;
        if entry.metadata().is_ok_and(is_old) {
            // It is tried again at the next write.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn is_aside(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(ASIDE.as_bytes())
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name there; bytes that are not UTF-8 replaced.
    pub name: String,
    /// Its path, exact.
    pub path: PathBuf,
    /// A directory, not a file.
    pub is_dir: bool,
    /// A file's length in bytes.
    pub bytes: u64,
    /// When it was last written, in ns since 1970.
    pub modified_ns: i128,
}

/// The files and directories in `dir`, by name. Links, devices and half-written files are left out.
pub fn list(dir: &Path) -> Result<Vec<Entry>, ShelfError> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).at(Action::Open, dir)? {
        let entry = entry.at(Action::Read, dir)?;
        // Not followed, and files may go while we look.
        let Ok(meta) = fs::symlink_metadata(entry.path()) else { continue };
        if is_aside(&entry.file_name()) || !(meta.is_file() || meta.is_dir()) {
            continue;
        }
        entries.push(Entry {
            name: entry.file_name().to_string_lossy().into_owned(),
            path: entry.path(),
            is_dir: meta.is_dir(),
            bytes: if meta.is_file() { meta.len() } else { 0 },
            modified_ns: modified_ns(&meta),
        });
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// When a file was last written, in ns since 1970.
pub fn modified_ns(meta: &fs::Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

/// What tells a file from what else may come to stand under its name, or was written into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    place: (u64, u64),
    bytes: u64,
    modified_ns: i128,
}

/// Which file stands under a name now.
pub fn file_id(path: &Path) -> Result<FileId, ShelfError> {
    let meta = fs::symlink_metadata(path).at(Action::Open, path)?;
    Ok(FileId { place: (meta.dev(), meta.ino()), bytes: meta.len(), modified_ns: modified_ns(&meta) })
}

// O_NONBLOCK: opening a pipe must not hang.
const READ: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

fn regular(file: File, path: &Path) -> Result<File, ShelfError> {
    if file.metadata().at(Action::Open, path)?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")).at(Action::Open, path)
}

fn link_refused(e: Errno) -> io::Error {
    match e {
        Errno::LOOP => io::Error::new(io::ErrorKind::InvalidInput, "it is a symbolic link"),
        // A socket, or a device without a driver.
        Errno::NXIO | Errno::NODEV => io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"),
        e => e.into(),
    }
}

/// The hash of a file's bytes. Blocks.
pub fn hash_file(path: &Path) -> Result<Sha256, ShelfError> {
    let mut file = open_regular(path)?;
    let (mut hash, mut chunk) = (Sha256Stream::default(), vec![0; 128 << 10]);
    loop {
        match file.read(&mut chunk).map_err(|source| ShelfError {
            action: Action::Read,
            path: path.to_owned(),
            source,
        })? {
            0 => return Ok(hash.finish()),
            n => hash.update(&chunk[..n]),
        }
    }
}

/// Opens a file for reading; links and everything that is no regular file are refused.
pub fn open_regular(path: &Path) -> Result<File, ShelfError> {
    let fd = rustix::fs::open(path, READ, Mode::empty()).map_err(link_refused).at(Action::Open, path)?;
    regular(File::from(fd), path)
}

/// Opens a file below `root` for reading; no step of `relative` may be a link or lead out.
pub fn open_beneath(root: &Path, relative: &Path) -> Result<File, ShelfError> {
    let path = root.join(relative);
    let mut at = File::open(root).at(Action::Open, root)?;
    let out = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why)).at(Action::Open, &path);
    for step in relative.components() {
        let Component::Normal(name) = step else { return out("it leads out of its directory") };
        let fd = rustix::fs::openat(&at, name, READ, Mode::empty()).map_err(link_refused).at(Action::Open, &path)?;
        at = File::from(fd);
    }
    regular(at, &path)
}

/// Reads a regular file of at most `max` bytes.
pub fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, ShelfError> {
    read_all(open_regular(path)?, path, max)
}

/// Reads an open file of at most `max` bytes; `path` names it in errors.
pub fn read_all(file: File, path: &Path, max: u64) -> Result<Vec<u8>, ShelfError> {
    let length = file.metadata().at(Action::Read, path)?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(length.min(max)).unwrap_or(0));
    file.take(max.saturating_add(1)).read_to_end(&mut bytes).at(Action::Read, path)?;
    if bytes.len() as u64 > max {
        let why = io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes"));
        return Err(why).at(Action::Read, path);
    }
    Ok(bytes)
}

/// A download in work. Its length is the point to resume from; what it holds is believed only
/// after it was hashed again.
#[derive(Debug)]
pub struct PartFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl PartFile {
    /// Opens a part at its end; makes an empty one if there is none.
    pub fn open(path: &Path) -> Result<Self, ShelfError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map_err(link_refused).at(Action::Open, path)?;
        let mut file = regular(File::from(fd), path)?;
        let length = file.seek(SeekFrom::End(0)).at(Action::Open, path)?;
        Ok(PartFile { file, path: path.to_owned(), length })
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Hands what is there to `take`, from the first byte, in chunks of up to 256 KiB.
    pub fn read_back(&mut self, mut take: impl FnMut(&[u8])) -> Result<(), ShelfError> {
        self.file.seek(SeekFrom::Start(0)).at(Action::Read, &self.path)?;
        let mut chunk = vec![0; 256 << 10];
        let mut left = self.length;
        while left > 0 {
            let n = self.file.read(&mut chunk).at(Action::Read, &self.path)?;
            if n == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).at(Action::Read, &self.path);
            }
            take(&chunk[..n]);
            left = left.saturating_sub(n as u64);
        }
        self.file.seek(SeekFrom::Start(self.length)).at(Action::Read, &self.path)?;
        Ok(())
    }

    /// Appends. After an error the part is as long as what arrived.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ShelfError> {
        let outcome = self.file.write_all(bytes);
        self.length = match outcome {
            Ok(()) => self.length + bytes.len() as u64,
            Err(_) => self.file.metadata().map_or(self.length, |m| m.len()),
        };
        outcome.at(Action::Write, &self.path)
    }

    /// Throws away what is there.
    pub fn restart(&mut self) -> Result<(), ShelfError> {
        self.file.set_len(0).at(Action::Write, &self.path)?;
        self.file.seek(SeekFrom::Start(0)).at(Action::Write, &self.path)?;
        self.length = 0;
        Ok(())
    }

    /// Syncs the bytes; the name becomes durable with `promote`.
    pub fn finish(self) -> Result<(), ShelfError> {
        self.file.sync_all().at(Action::Sync, &self.path)
    }

    /// Deletes the part.
    pub fn discard(self) -> Result<(), ShelfError> {
        remove(&self.path)
    }
}

/// Why a data directory could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{} is in use by {}: wait until it has ended, or stop it", dir.display(), holder(*pid))]
    Held {
        /// The directory.
        dir: PathBuf,
        /// The process, if it said so.
        pid: Option<u32>,
    },
    /// The lock file itself failed.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
}

impl LockError {
    /// A stable name of the reason, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            LockError::Held { .. } => "LOCKED",
            LockError::Shelf(e) if e.is_disk_full() => "DISK_FULL",
            LockError::Shelf(_) => "MACHINE",
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |p| format!("process {p}"))
}

/// A data directory's lock; the kernel frees it when the process ends, however it ends.
#[derive(Debug)]
pub struct LockFile {
    file: File,
}

impl LockFile {
    /// Locks `dir` (file `lock` in it), at once or not at all.
    pub fn acquire(dir: &Path) -> Result<LockFile, LockError> {
        let path = dir.join("lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(&path, flags, Mode::from_raw_mode(0o644)).map_err(link_refused).at(Action::Lock, &path)?;
        let mut file = regular(File::from(fd), &path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = file.take(20).read_to_string(&mut text);
                return Err(LockError::Held { dir: dir.to_owned(), pid: text.trim().parse().ok() });
            }
            Err(e) => return Err(e).at(Action::Lock, &path)?,
        }
        // The number is only a courtesy: a full disk must not keep the service from starting.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(LockFile { file })
    }
}

impl Drop for LockFile {
    /// Not left to the closing: a child that another thread is just starting holds a copy of the file until it has begun.
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// Room on a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What this user may still write.
    pub free: u64,
    /// What is free and what is taken: without what is kept for others, as `df` counts its per cent.
    pub total: u64,
}

impl Space {
    /// What is to stay free beside so many bytes: other programs write on this disk, too. Little asks for little, so that
    /// a nearly full disk still takes a small change.
    pub fn spare(&self, bytes: u64) -> u64 {
        (self.total / 50).min(64 << 20).min(bytes)
    }

    /// Whether so many bytes have room, and what is to stay free beside `of` bytes.
    pub fn takes(&self, bytes: u64, of: u64) -> Result<(), String> {
        let needed = bytes.saturating_add(self.spare(of));
        let missing = || format!("{} bytes are free, {needed} are needed", self.free);
        if self.free < needed { Err(missing()) } else { Ok(()) }
    }
}

/// The room on the disk that holds `path`.
pub fn free_space(path: &Path) -> Result<Space, ShelfError> {
    let s = rustix::fs::statvfs(path).at(Action::Open, path)?;
    let taken = s.f_blocks.saturating_sub(s.f_bfree);
    let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
    Ok(Space { free: bytes(s.f_bavail), total: bytes(taken.saturating_add(s.f_bavail)) })
}

/// Makes a file of no content `bytes` long, with real blocks behind it; 0 removes it. One that is right stays.
pub fn take_room(path: &Path, bytes: u64) -> Result<(), ShelfError> {
    let right = |m: fs::Metadata| m.is_file() && m.len() == bytes && m.blocks() * 512 >= bytes;
    if bytes > 0 && fs::symlink_metadata(path).is_ok_and(right) {
        return Ok(());
    }
    remove(path)?;
    if bytes == 0 {
        return Ok(());
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).at(Action::Create, path)?;
    let filled = reserve(&file, bytes).at(Action::Write, path).and_then(|()| file.sync_all().at(Action::Sync, path));
    filled.inspect_err(|_| drop(fs::remove_file(path)))
}

fn reserve(mut file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // File systems that cannot reserve: write.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; 1 << 20];
            let mut left = bytes;
            while left > 0 {
                let n = left.min(zeros.len() as u64);
                file.write_all(&zeros[..usize::try_from(n).unwrap_or(zeros.len())])?;
                left -= n;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests;

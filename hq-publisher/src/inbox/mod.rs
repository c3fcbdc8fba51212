//! File drops: CSV and NDJSON files that a batch job puts into a directory.
//!
//! Owns the inbox directory: which files are drops, when they are whole, where they go after. A
//! drop is read where it lies and moved only when what it says is signed (`done/`) or refused
//! (`rejected/`, with the reason beside), so that after a power cut it is read once more, and
//! found to be published already.

mod content;
mod csv;

pub use content::{read_stores, read_table};

use crate::source::SinkError;
use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, Watcher as _};
use proto::clock::Clock;
use proto::failpoint;
use proto::ids::{Instance, TableName};
use proto::shelf::{self, Action, Entry, ShelfError};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How a drop is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A header line with column names, then a line a row.
    Csv,
    /// A JSON object a row.
    Ndjson,
}

/// What a drop is, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// `stores.csv`.
    Stores,
    /// `STREAM.AUDIENCE.TABLE.csv` or `.ndjson`: all rows of the table for that audience.
    Table {
        /// The stream@audience.
        instance: Instance,
        /// The table.
        table: TableName,
        /// How it is written.
        format: Format,
    },
}

/// A drop that could not be read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    /// The line, counted from 1.
    pub line: Option<u64>,
    /// What is wrong.
    pub reason: String,
    /// With what.
    pub blame: Blame,
}

/// What is to blame for a drop that was not read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blame {
    /// The file says something wrong.
    File,
    /// The disk it lies on: what it says is not known.
    Disk,
    /// Where its rows go.
    Sink(SinkError),
}

impl FileError {
    const UTF_16: &str = "the file is UTF-16: write it as UTF-8";

    fn at(line: u64, reason: impl Into<String>) -> Self {
        FileError { line: Some(line), reason: reason.into(), blame: Blame::File }
    }
    fn read(e: std::io::Error) -> Self {
        FileError { line: None, reason: format!("it cannot be read: {e}"), blame: Blame::Disk }
    }
}

impl From<SinkError> for FileError {
    fn from(e: SinkError) -> Self {
        FileError { line: None, reason: e.to_string(), blame: Blame::Sink(e) }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for FileError {}

/// Reads a drop's name. `None`: not a drop at all (a marker, a half-copied file, a note).
pub fn parse_name(name: &str) -> Option<Result<What, String>> {
    let (stem, format) = if let Some(stem) = name.strip_suffix(".csv") {
        (stem, Format::Csv)
    } else if let Some(stem) = name.strip_suffix(".ndjson") {
        (stem, Format::Ndjson)
    } else {
        return None;
    };
    if name.starts_with('.') {
        return None;
    }
    if name == "stores.csv" {
        return Some(Ok(What::Stores));
    }
    let parts: Vec<&str> = stem.split('.').collect();
    let &[stream, audience, table] = parts.as_slice() else {
        let reason = "a drop is named STREAM.AUDIENCE.TABLE.csv or .ndjson, e.g. price.zone-east.price.csv; the list of \
                      stores is stores.csv";
        return Some(Err(reason.into()));
    };
    let told = |e: proto::ids::BadName| e.to_string();
    let what = || {
        let instance = Instance { stream: stream.parse().map_err(told)?, audience: audience.parse().map_err(told)? };
        Ok(What::Table { instance, table: table.parse().map_err(told)?, format })
    };
    Some(what())
}

/// Whether a name means the list of stores, however it is written.
pub fn is_list(name: &str) -> bool {
    name.eq_ignore_ascii_case("stores.csv")
}

/// The name of the other drop that a table may have: what it says, written the other way.
pub fn other_way(name: &str) -> Option<String> {
    let ndjson = name.strip_suffix(".csv").map(|stem| format!("{stem}.ndjson"));
    ndjson.or_else(|| name.strip_suffix(".ndjson").map(|stem| format!("{stem}.csv")))
}

/// Why what lies there is not taken, though its sender may think so.
fn stray(name: &str, kind: std::fs::FileType, there: &BTreeMap<String, std::fs::FileType>) -> Option<&'static str> {
    let what = match (kind.is_symlink(), kind.is_dir()) {
        (true, _) => Some("is a symbolic link, which is left alone: put the file itself there"),
        (_, true) => Some("is a directory, which is left alone: put the file itself there"),
        _ if kind.is_file() => None,
        _ => Some("is no regular file, which is left alone: put the file itself there"),
    };
    if what.is_some() {
        return what.filter(|_| parse_name(name.strip_suffix(".ok").unwrap_or(name)).is_some());
    }
    let ends_in_capitals = |end: &str| {
        let at = name.len().checked_sub(end.len()).and_then(|at| name.get(at..));
        at.is_some_and(|found| found != end && found.eq_ignore_ascii_case(end))
    };
    let lacks_its_ending =
        |stem: &str| !there.contains_key(stem) && matches!(parse_name(&format!("{stem}.csv")), Some(Ok(_)));
    let is_capital_marker = || ends_in_capitals(".ok") && name.get(..name.len() - 3).and_then(parse_name).is_some();
    if name.starts_with('.') {
        None
    } else if ends_in_capitals(".csv") || ends_in_capitals(".ndjson") || is_capital_marker() {
        Some("is left alone: write its ending in small letters")
    } else if parse_name(name).is_none() && there.get(&format!("{name}.ok")).is_some_and(|k| k.is_file()) {
        Some("is left alone, though NAME.ok lies beside it: the name of a drop ends in .csv or .ndjson")
    } else if name.strip_suffix(".ok").is_some_and(lacks_its_ending) {
        Some("vouches for no drop: a marker is named by the drop's whole name, .csv or .ndjson included, and .ok")
    } else {
        None
    }
}

/// A file in the inbox as one look saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its length and when it was written, ns since 1970: a change of either is a change of it.
    pub stamp: (u64, i128),
    /// Whether `NAME.ok` lies beside it and is not older: one that is was for what the file said before.
    pub marked: bool,
}

/// A drop that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drop {
    /// The file.
    pub file: Seen,
    /// What it is; why its name is refused.
    pub what: Result<What, String>,
}

impl Drop {
    /// Whether the file that was opened and read is, still, what the look saw.
    pub fn is(&self, file: &std::fs::File) -> bool {
        file.metadata().is_ok_and(|m| stamp(&m) == self.file.stamp)
    }

    /// Whether there is another file for the same table.
    fn has_rival(&self) -> bool {
        let is_table = matches!(self.what, Ok(What::Table { .. }));
        let other = other_way(&self.file.name).filter(|_| is_table);
        other.is_some_and(|name| self.file.path.with_file_name(name).symlink_metadata().is_ok_and(|m| m.is_file()))
    }
}

fn stamp(meta: &std::fs::Metadata) -> (u64, i128) {
    (meta.len(), shelf::modified_ns(meta))
}

/// Decides when files are whole: marked by `NAME.ok`, or unchanged for the rest period. Looks are
/// handed in with their time, so that nothing here waits.
#[derive(Debug)]
pub struct Watch {
    rest: Duration,
    since: BTreeMap<String, ((u64, i128), Duration)>,
}

/// What a look at the inbox gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Drops that are whole.
    pub ready: Vec<Drop>,
    /// Names of drops that are not known to be whole yet.
    pub waiting: Vec<String>,
    /// When the first of those could be, if nothing changes.
    pub next: Option<Duration>,
    /// What may be taken for a drop and is none: the name, and why it is not taken.
    pub strays: Vec<(String, &'static str)>,
}

impl Watch {
    /// Files must rest so long.
    pub fn new(rest: Duration) -> Self {
        Watch { rest, since: BTreeMap::new() }
    }

    /// Takes a look made at monotonic time `now`.
    pub fn observe(&mut self, files: Vec<Seen>, now: Duration) -> Look {
        let there: BTreeSet<&str> = files.iter().map(|f| f.name.as_str()).collect();
        self.since.retain(|name, _| there.contains(name.as_str()));
        let mut look = Look::default();
        for file in files {
            let Some(what) = parse_name(&file.name) else { continue };
            let seen = self.since.entry(file.name.clone()).or_insert((file.stamp, now));
            if seen.0 != file.stamp {
                *seen = (file.stamp, now);
            }
            let ready_at = seen.1 + self.rest;
            if file.marked || now >= ready_at {
                look.ready.push(Drop { file, what });
            } else {
                look.next = Some(look.next.map_or(ready_at, |n| n.min(ready_at)));
                look.waiting.push(file.name);
            }
        }
        look
    }
}

/// The inbox directory.
#[derive(Debug, Clone)]
pub struct Inbox {
    dir: PathBuf,
}

impl Inbox {
    /// The inbox at a directory that is there.
    pub fn new(dir: &Path) -> Self {
        Inbox { dir: dir.to_owned() }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether something of that name lies there.
    pub fn has(&self, name: &str) -> bool {
        self.dir.join(name).symlink_metadata().is_ok()
    }

    /// One look.
    pub fn look(&self) -> Result<Vec<Seen>, ShelfError> {
        let mut files = shelf::list(&self.dir)?;
        files.retain(|e| !e.is_dir);
        let markers: BTreeMap<&str, i128> =
            files.iter().filter_map(|m| Some((m.name.strip_suffix(".ok")?, m.modified_ns))).collect();
        let is_marked = |e: &Entry| markers.get(e.name.as_str()).is_some_and(|at| *at >= e.modified_ns);
        Ok(files
            .iter()
            .map(|e| Seen {
                name: e.name.clone(),
                path: e.path.clone(),
                stamp: (e.bytes, e.modified_ns),
                marked: is_marked(e),
            })
            .collect())
    }

    /// What may be taken for a drop and is none: it is never followed, opened or moved, for it may lead anywhere.
    fn strays(&self) -> Result<Vec<(String, &'static str)>, ShelfError> {
        let failed = |source| ShelfError { action: Action::Read, path: self.dir.clone(), source };
        let mut there = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Files may go while we look.
            if let Ok(kind) = entry.file_type() {
                there.insert(entry.file_name().to_string_lossy().into_owned(), kind);
            }
        }
        Ok(there.iter().filter_map(|(name, kind)| Some((name.clone(), stray(name, *kind, &there)?))).collect())
    }

    /// Looks until every drop is whole, but no longer than a few rest periods: a file that still
    /// grows is left for the next run.
    pub async fn settle(&self, rest: Duration, clock: &dyn Clock) -> Result<Look, ShelfError> {
        const LOOK: Duration = Duration::from_millis(100);
        let news = Arc::new(Notify::new());
        let _watcher = self.tell(&news);
        let mut watch = Watch::new(rest);
        let end = clock.monotonic() + rest * 3 + LOOK;
        loop {
            let now = clock.monotonic();
            let mut look = watch.observe(self.look()?, now);
            match look.next {
                Some(next) if now < end => {
                    let wait = next.saturating_sub(now).clamp(Duration::from_millis(1), LOOK);
                    let _ = tokio::time::timeout(wait, news.notified()).await;
                }
                _ => {
                    look.strays = self.strays()?;
                    return Ok(look);
                }
            }
        }
    }

    /// Has `news` told when a file appears or is closed. It only shortens a wait: events may be lost, and a network
    /// disk sends none.
    fn tell(&self, news: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
        let news = news.clone();
        let told = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|e| is_news(e.kind)) {
                news.notify_one();
            }
        };
        let watcher = notify::recommended_watcher(told).and_then(|mut watcher| {
            watcher.watch(&self.dir, notify::RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        watcher.inspect_err(|e| tracing::debug!("no events of {}: {e}", self.dir.display())).ok()
    }

    /// Moves a drop that was published to `done/`. One that changed since it was read stays: it
    /// says something else now. So does one whose table got another drop meanwhile: the next run must
    /// find both, and refuse.
    pub fn done(&self, drop: &Drop) -> Result<bool, ShelfError> {
        if drop.has_rival() { Ok(false) } else { self.move_to("done", drop) }
    }

    /// Moves a drop that cannot be published to `rejected/`, the reason beside it.
    pub fn reject(&self, drop: &Drop, reason: &str) -> Result<bool, ShelfError> {
        let dir = self.dir.join("rejected");
        shelf::create_dir(&dir)?;
        // First the reason: a file there always has one.
        let (path, text) = (dir.join(format!("{}.reason.txt", drop.file.name)), format!("{reason}\n"));
        failpoint::step("inbox.reason", || shelf::write_durable(&path, text.as_bytes()))?;
        self.move_to("rejected", drop)
    }

    fn move_to(&self, room: &str, drop: &Drop) -> Result<bool, ShelfError> {
        let now = drop.file.path.symlink_metadata();
        if now.is_ok_and(|m| m.is_file() && stamp(&m) == drop.file.stamp) { self.place(room, drop) } else { Ok(false) }
    }

    fn place(&self, room: &str, drop: &Drop) -> Result<bool, ShelfError> {
        let dir = self.dir.join(room);
        shelf::create_dir(&dir)?;
        let (from, to) = (&drop.file.path, dir.join(&drop.file.name));
        // First the marker: alone it would vouch for the next file of that name. What is no file is none.
        let marker = self.dir.join(format!("{}.ok", drop.file.name));
        let is_file = marker.symlink_metadata().is_ok_and(|m| m.is_file());
        failpoint::step("inbox.mark", || if is_file { shelf::remove(&marker) } else { Ok(()) })?;
        failpoint::step("inbox.move", || shelf::promote(from, &to))?;
        let is_other = shelf::open_regular(&to).is_ok_and(|file| !drop.is(&file));
        if is_other && !from.exists() {
            // It came after the look, and nobody has read it.
            shelf::promote(&to, from)?;
        }
        Ok(!is_other)
    }
}

/// Writes in between are not news: a growing file would wake us for each.
fn is_news(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(_))
            | EventKind::Access(AccessKind::Close(AccessMode::Write))
    )
}

#[cfg(test)]
mod tests;

//! Room on the disk under a data directory, what had none there, and the ballast: a file that only takes room, to be let go
//! when the disk is full, since SQLite cannot even checkpoint without any. A full disk never costs the version that is held.

use crate::ids::Instance;
use crate::layout::{PackKind, PackName};
use crate::manifest::PackEntry;
use crate::shelf;
use crate::wire::Disk;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The ballast's file in a data directory.
const BALLAST: &str = "ballast";

/// More is a slip: it is held back from what the disk is for.
const MOST_BALLAST: u64 = 64 << 30;

/// Refuses a ballast of more bytes than any disk should give.
pub fn check_ballast(ballast: Option<u64>) -> Result<(), String> {
    match ballast {
        Some(bytes) if bytes > MOST_BALLAST => Err("ballast: at most 64GiB".to_owned()),
        _ => Ok(()),
    }
}

/// Does what needs room; where the disk is full, makes some and does it once more.
pub fn or_make_room<T, E>(
    act: impl Fn() -> Result<T, E>,
    is_full: impl FnOnce(&E) -> bool,
    make: impl FnOnce(&E),
) -> Result<T, E> {
    act().or_else(|e| {
        if !is_full(&e) {
            return Err(e);
        }
        make(&e);
        act()
    })
}

/// The disk that a data directory lies on.
#[derive(Debug)]
pub struct DataDisk {
    dir: PathBuf,
    wanted: Option<u64>,
    /// What a test wants the disk to be.
    #[cfg(any(test, feature = "testkit"))]
    pretended: std::sync::Mutex<Option<shelf::Space>>,
}

impl DataDisk {
    /// The disk of a directory, with a ballast of so many bytes; by itself the lesser of 64 MiB and 2% of the disk, none
    /// on one below 256 MiB. Nothing is taken yet.
    pub fn new(data_dir: &Path, ballast: Option<u64>) -> DataDisk {
        DataDisk {
            dir: data_dir.to_owned(),
            wanted: ballast,
            #[cfg(any(test, feature = "testkit"))]
            pretended: Default::default(),
        }
    }

    /// Says from now on that the disk has this room.
    #[cfg(any(test, feature = "testkit"))]
    #[allow(clippy::unwrap_used, reason = "test code")]
    pub fn pretend(&self, space: shelf::Space) {
        *self.pretended.lock().unwrap() = Some(space);
    }

    fn room(&self) -> Option<shelf::Space> {
        #[cfg(any(test, feature = "testkit"))]
        if let Some(space) = self.pretended.lock().ok().and_then(|p| *p) {
            return Some(space);
        }
        shelf::free_space(&self.dir).ok()
    }

    /// The room there is; nothing where the disk does not say.
    pub fn space(&self) -> Option<Disk> {
        let space = self.room()?;
        Some(Disk { free: space.free, total: space.total })
    }

    /// Whether so many bytes more have room. A disk that does not say is tried.
    pub fn fits(&self, bytes: u64) -> Result<(), String> {
        match self.space() {
            Some(d) if d.free < bytes => {
                Err(format!("{} free in {}, about {bytes} bytes are needed", d.free, self.dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// The same, and what is to stay free for others besides.
    pub fn fits_with_spare(&self, bytes: u64) -> Result<(), String> {
        let Some(space) = self.room() else { return Ok(()) };
        space.takes(bytes, bytes).map_err(|why| format!("{}: {why}", self.dir.display()))
    }

    /// The room there is beside a log of so many bytes.
    pub fn beside(&self, log: u64) -> Option<Beside> {
        Some(Beside { free: self.space()?.free, log })
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join(BALLAST)
    }

    /// Lets the ballast go. Its blocks are free when this returns.
    pub fn release(&self) {
        if let Err(e) = shelf::remove(&self.ballast()) {
            tracing::error!(error = %e, "the ballast cannot be let go");
        }
    }

    /// Takes the ballast (again) where there is room for it and as much besides; whether all that is wanted is held.
    pub fn restore(&self) -> bool {
        let Some(space) = self.space() else { return false };
        let bytes = self.wanted.unwrap_or_else(|| usual_ballast(space.total));
        let path = self.ballast();
        if bytes > 0 && space.free < bytes.saturating_mul(2) && path.symlink_metadata().is_err() {
            return false;
        }
        shelf::take_room(&path, bytes).inspect_err(|e| tracing::warn!(error = %e, bytes, "no ballast")).is_ok()
    }
}

fn usual_ballast(total: u64) -> u64 {
    if total < 256 << 20 { 0 } else { (total / 50).min(64 << 20) }
}

/// What is free while a database's log has so many bytes, which are free again when it is cut.
#[derive(Debug, Clone, Copy)]
pub struct Beside {
    free: u64,
    log: u64,
}

/// Bytes that a pack asks for at least: its file, and its rows in the log; of a full of what is not held once more in the
/// database, before the log goes, while tables that a full replaces leave their room to it. What rows and indexes really
/// take is looked at while they are written, and before the commit: to ask for more here would keep out what has room.
fn room_for(pack: &PackEntry, is_held: bool) -> u64 {
    let times = if pack.kind == PackKind::Full && !is_held { 2 } else { 1 };
    pack.unpacked.saturating_mul(times).saturating_add(pack.bytes)
}

/// What is free may change without an end: a pack that had no room is tried again where there is more by this part of its
/// rows.
const MORE_ROOM: u64 = 16;

/// Not all that ends a full disk is seen in the room that is free: a quota is not.
const NO_ROOM_FOR: Duration = Duration::from_secs(3600);

/// A pack that was written until there was no room: not again before there may be, for that wears the disk.
#[derive(Debug)]
struct Short {
    /// What the transaction begins with.
    first: PackName,
    /// What is to be free before its rows are written again.
    needed: u64,
    /// When it was found, by the monotonic clock.
    at: Duration,
}

/// What was written to a database until there was no room.
#[derive(Debug, Default)]
pub struct Shortages(Mutex<BTreeMap<Instance, Short>>);

impl Shortages {
    fn all(&self) -> MutexGuard<'_, BTreeMap<Instance, Short>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether packs, of which so many bytes are there, may have room: as far as can be said before they are written, and
    /// by what was found the last time.
    pub fn may_fit(
        &self,
        disk: &DataDisk,
        instance: &Instance,
        packs: &[&PackEntry],
        is_held: bool,
        there: u64,
        now: Duration,
    ) -> Result<(), String> {
        let sum = |of: &dyn Fn(&PackEntry) -> u64| packs.iter().map(|p| of(p)).fold(0, u64::saturating_add);
        disk.fits_with_spare(sum(&|p| room_for(p, is_held)).saturating_sub(there))?;
        let first = packs.first().map(|p| p.name(instance));
        match self.all().get(instance) {
            Some(s) if Some(&s.first) == first.as_ref() && now.saturating_sub(s.at) < NO_ROOM_FOR => {
                disk.fits(s.needed.saturating_add(sum(&|p| p.bytes)).saturating_sub(there))
            }
            _ => Ok(()),
        }
    }

    /// Packs had no room where so many bytes were free before, or are with what the log took meanwhile, if others took or
    /// gave some.
    pub fn found(
        &self,
        instance: &Instance,
        packs: &[&PackEntry],
        before: Beside,
        after: Option<Beside>,
        now: Duration,
    ) {
        let Some(first) = packs.first().map(|p| p.name(instance)) else { return };
        let with_log = |a: Beside| a.free.saturating_add(a.log.saturating_sub(before.log));
        let free = before.free.min(after.map_or(before.free, with_log));
        let rows = packs.iter().map(|p| p.unpacked).fold(0, u64::saturating_add);
        let needed = free.saturating_add((rows / MORE_ROOM).max(1));
        self.all().insert(instance.clone(), Short { first, needed, at: now });
    }

    /// What was written for an instance had room.
    pub fn had_room(&self, instance: &Instance) {
        self.all().remove(instance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_asks_for_no_more_room_than_it_needs_at_least() {
        let pack = |kind| PackEntry {
            version: crate::ids::Version::FIRST,
            kind,
            base: None,
            bytes: 7,
            unpacked: 1000,
            sha256: crate::digest::Sha256::of(b""),
        };
        let full = pack(PackKind::Full);
        assert_eq!([false, true].map(|is_held| room_for(&full, is_held)), [2007, 1007]);
        assert_eq!(room_for(&pack(PackKind::Delta), true), 1007);
    }

    #[test]
    fn the_ballast_is_of_its_size_comes_goes_and_comes_back() {
        assert_eq!(usual_ballast(255 << 20), 0);
        assert_eq!(usual_ballast(1000 << 20), 20 << 20);
        assert_eq!(usual_ballast(1 << 40), 64 << 20);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(BALLAST);
        let disk = |bytes| DataDisk::new(dir.path(), Some(bytes));
        assert!(disk(1 << 20).restore());
        assert_eq!(path.metadata().unwrap().len(), 1 << 20);
        disk(1 << 20).release();
        assert!(!path.exists());
        assert!(!disk(1 << 60).restore() && !path.exists(), "there is no room for it");
        assert!(disk(1 << 20).restore() && path.exists(), "it comes back");
        assert!(disk(0).restore() && !path.exists(), "none is wanted");
        assert!(disk(0).fits(1 << 10).is_ok() && disk(0).fits(1 << 60).unwrap_err().contains("free in"));
        assert!(disk(0).fits_with_spare(1 << 10).is_ok());
        assert!(disk(0).fits_with_spare(1 << 60).unwrap_err().contains("are needed"));
        let none = DataDisk::new(Path::new("/none"), None);
        assert!(!none.restore() && none.fits(1 << 60).is_ok(), "a disk that is not there");
        assert!(none.fits_with_spare(1 << 60).is_ok());
    }

    #[test]
    fn room_is_made_for_a_full_disk_alone_and_once() {
        let full = std::cell::Cell::new(2);
        let act = || {
            full.set(full.get() - 1);
            if full.get() > 0 { Err("full") } else { Ok(full.get()) }
        };
        assert_eq!(or_make_room(act, |e| *e == "full", |_| ()), Ok(0));
        full.set(2);
        assert_eq!(or_make_room(act, |e| *e == "other", |_| panic!("nothing to make")), Err("full"));
        full.set(3);
        assert_eq!(or_make_room(act, |e| *e == "full", |_| ()), Err("full"));
    }
}

//! Room on the disk under a data directory, and the ballast: a file that only takes room, to be let go when the disk is
//! full, since SQLite cannot even checkpoint without any. A full disk never costs the version that is held.

use crate::shelf;
use crate::wire::Disk;
use std::path::{Path, PathBuf};

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

#[cfg(test)]
mod tests {
    use super::*;

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

//! Room on the disk: the ballast, and the look before a download. A full disk never costs the
//! version that is held; letting the ballast go makes SQLite able to clean up after itself.

use proto::config::HumanBytes;
use proto::manifest::PackEntry;
use proto::shelf::{self, Ballast, ShelfError, Space};
use proto::wire::Disk;
use std::path::{Path, PathBuf};

/// The disk under the data directory.
#[derive(Debug)]
pub struct Room {
    dir: PathBuf,
    ballast: PathBuf,
    bytes: u64,
}

impl Room {
    /// Makes the ballast if there is room; on a full disk it comes later.
    pub fn open(data_dir: &Path, wanted: Option<HumanBytes>) -> Result<Room, ShelfError> {
        let bytes = match wanted {
            Some(HumanBytes(n)) => n,
            None => shelf::ballast_bytes(shelf::free_space(data_dir)?.total),
        };
        let room = Room { dir: data_dir.to_owned(), ballast: data_dir.join(shelf::BALLAST), bytes };
        room.restore();
        Ok(room)
    }

    /// The room there is.
    pub fn space(&self) -> Option<Space> {
        shelf::free_space(&self.dir).ok()
    }

    /// The same, to report.
    pub fn report(&self) -> Option<Disk> {
        self.space().map(|s| Disk { free: s.free, total: s.total })
    }

    /// Whether packs can be fetched and applied: their files, and their rows once more in the log.
    /// What they take in the database itself comes out of the log's room or fails cleanly.
    pub fn fits(&self, packs: &[&PackEntry], there: u64) -> Result<(), String> {
        let wanted = packs.iter().fold(0u64, |n, p| n.saturating_add(p.bytes).saturating_add(p.unpacked));
        let wanted = wanted.saturating_sub(there);
        match self.space() {
            Some(s) if s.free < wanted => {
                Err(format!("{} free in {}, about {wanted} bytes are needed", s.free, self.dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// Lets the ballast go.
    pub fn release(&self) {
        if let Err(e) = shelf::remove(&self.ballast) {
            tracing::warn!(error = %e, "the ballast could not be let go");
        }
    }

    /// Makes the ballast anew when there is ample room; whether it is held.
    pub fn restore(&self) -> bool {
        if self.space().is_some_and(|s| s.free < self.bytes.saturating_mul(2)) && !self.ballast.exists() {
            return self.bytes == 0;
        }
        let made = Ballast::ensure(&self.ballast, self.bytes);
        made.inspect_err(|e| tracing::warn!(error = %e, bytes = self.bytes, "there is no room for the ballast")).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::digest::Sha256;
    use proto::ids::Version;
    use proto::layout::PackKind;

    #[test]
    fn the_ballast_comes_goes_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::open(dir.path(), Some(HumanBytes(1 << 20))).unwrap();
        let ballast = dir.path().join("ballast");
        assert_eq!(ballast.metadata().unwrap().len(), 1 << 20);
        room.release();
        assert!(!ballast.exists());
        room.restore();
        assert!(ballast.exists());
        Room::open(dir.path(), Some(HumanBytes(0))).unwrap();
        assert!(!ballast.exists(), "none is wanted");
    }

    #[test]
    fn what_cannot_fit_is_told_before_it_is_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::open(dir.path(), Some(HumanBytes(0))).unwrap();
        let pack = |bytes| PackEntry {
            version: Version::FIRST,
            kind: PackKind::Full,
            base: None,
            bytes,
            unpacked: 0,
            sha256: Sha256::of(b""),
        };
        assert!(room.fits(&[&pack(100)], 0).is_ok());
        assert!(room.fits(&[&pack(u64::MAX)], 0).unwrap_err().contains("free in"));
    }
}

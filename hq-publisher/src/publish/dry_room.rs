//! Where a dry run works.

use super::PublishError;
use proto::shelf::{self, LockFile};
use std::path::{Path, PathBuf};

/// Where a dry run works; it goes when the run ends, and after its death with the next one.
pub(super) struct DryRoom {
    pub(super) dir: PathBuf,
    _lock: LockFile,
}

impl DryRoom {
    pub(super) fn open(scratch: &Path) -> Result<DryRoom, PublishError> {
        let dir = scratch.join(format!("dry-{}", std::process::id()));
        shelf::create_dir(&dir)?;
        let lock = LockFile::acquire(&dir).map_err(PublishError::Lock)?;
        Ok(DryRoom { dir, _lock: lock })
    }

    /// Deletes those that nobody works in any more.
    pub(super) fn sweep(scratch: &Path) -> Result<(), PublishError> {
        for room in shelf::list(scratch)?.into_iter().filter(|e| e.is_dir && e.name.starts_with("dry-")) {
            if let Ok(lock) = LockFile::acquire(&room.path) {
                drop(DryRoom { dir: room.path, _lock: lock });
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), shelf::ShelfError> {
        for file in shelf::list(&self.dir)? {
            shelf::remove(&file.path)?;
        }
        shelf::remove_empty_dir(&self.dir)
    }
}

impl std::ops::Drop for DryRoom {
    fn drop(&mut self) {
        if let Err(e) = self.clear() {
            tracing::warn!("{e}");
        }
    }
}

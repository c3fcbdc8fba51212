//! `shadow.db`: the replica on which every pack is tried before a register sees it. Trials write it, one at a time,
//! in a child process; this process only reads it, and makes it anew when it is lost. If the power goes, it
//! is at the version before or after.

use crate::spool;
use crate::trial::{self, Runner, Trial, TrialEnd};
use proto::digest::Sha256;
use proto::failpoint;
use proto::ids::{Instance, StreamName};
use proto::layout::PackName;
use proto::limits::Limits;
use proto::replica::sqlite::{self, Checkpoint, SqliteError};
use proto::replica::{Held, Replica, TableCheck, VerifyError};
use proto::retry::Verdict;
use proto::shelf::ShelfError;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

/// The shadow's file in the data directory.
pub const FILE: &str = "shadow.db";
/// Where fulls at or below the shadow's version are proved.
const SCRATCH: &str = "scratch.db";

/// The shadow could not be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum ShadowError {
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// Setting a damaged file aside.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
}

impl ShadowError {
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        match self {
            ShadowError::Sqlite(e) => e.verdict(),
            ShadowError::Shelf(e) => e.verdict(),
        }
    }
    /// Whether the disk is full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            ShadowError::Sqlite(e) => e.is_disk_full(),
            ShadowError::Shelf(e) => e.is_disk_full(),
        }
    }
}

/// What the shadow says of itself.
#[derive(Debug, Default)]
pub struct Contents {
    /// The streams held.
    pub held: BTreeMap<StreamName, Held>,
    /// The packs proved, of the instances asked for.
    pub proofs: BTreeMap<PackName, Sha256>,
}

/// The shadow and who tries packs on it.
#[derive(Debug)]
pub struct Shadow {
    path: PathBuf,
    limits: Limits,
    runner: Runner,
    /// Held by whoever writes.
    gate: Mutex<()>,
}

impl Shadow {
    /// Opens the shadow, and reads all that it says of itself; one that is damaged is set aside and made anew, which `true`
    /// tells.
    pub fn open(dir: &Path, limits: &Limits, runner: Runner) -> Result<(Shadow, bool), ShadowError> {
        let shadow = Shadow { path: dir.join(FILE), limits: limits.clone(), runner, gate: Mutex::new(()) };
        trial::remove_database(&shadow.scratch())?;
        let lost = match shadow.open_whole() {
            Err(ShadowError::Sqlite(e)) if e.verdict() == Verdict::Rebuild && !sqlite::is_damaged(&shadow.path) => {
                tracing::warn!(error = %e, "the shadow could not be read; it can at a second look");
                shadow.open_whole()?;
                false
            }
            Err(ShadowError::Sqlite(e)) if e.verdict() == Verdict::Rebuild || e.is_unreadable() => {
                tracing::error!(error = %e, "the shadow is damaged; it is set aside and made anew from ok/");
                shadow.make_anew()?;
                true
            }
            Err(e) => return Err(e),
            Ok(()) => false,
        };
        Ok((shadow, lost))
    }

    /// Brings what a crash left in the WAL into order, and sees whether the file can be read.
    fn open_whole(&self) -> Result<(), ShadowError> {
        let replica = failpoint::step("shadow.open", || Replica::open(&self.path, &self.limits))?;
        replica.all_held()?;
        replica.all_proofs()?;
        Ok(())
    }

    fn make_anew(&self) -> Result<(), ShadowError> {
        failpoint::step("shadow.aside", || spool::set_aside(&self.path))?;
        Replica::open(&self.path, &self.limits)?;
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The database beside it that proofs are made in.
    pub fn scratch(&self) -> PathBuf {
        self.path.with_file_name(SCRATCH)
    }

    /// What it holds now. Blocks on the disk, briefly.
    pub fn read(&self, is_wanted: impl Fn(&Instance) -> bool) -> Result<Contents, SqliteError> {
        let replica = Replica::open_read_only(&self.path, &self.limits)?;
        let proofs = replica.proofs_of(is_wanted)?.into_iter();
        let proofs = proofs.map(|(instance, version, kind, sha256)| (PackName { instance, version, kind }, sha256));
        Ok(Contents { held: replica.all_held()?, proofs: proofs.collect() })
    }

    /// Tries packs; the only way into the shadow. One trial at a time.
    pub async fn advance(&self, trial: Trial, time: Duration, stop: &CancellationToken) -> TrialEnd {
        let _alone = self.gate.lock().await;
        self.runner.run(trial, time, stop).await
    }

    /// Proves packs in the scratch database; does not wait for, nor hold up, other trials.
    pub async fn prove(&self, trial: Trial, time: Duration, stop: &CancellationToken) -> TrialEnd {
        let end = self.runner.run(trial, time, stop).await;
        // A child that was killed leaves it, and with it less room than the next proof is asked for.
        if let Err(e) = trial::remove_database(&self.scratch()) {
            tracing::warn!(error = %e, "the scratch database stays until the next proof");
        }
        end
    }

    /// Throws a damaged shadow away; whether it is so at a second look.
    pub async fn rebuild(&self) -> Result<bool, ShadowError> {
        let _alone = self.gate.lock().await;
        let damaged = sqlite::is_damaged(&self.path);
        if damaged {
            self.make_anew()?;
        }
        Ok(damaged)
    }

    /// No version held counts any more. Of how many streams.
    pub fn disown(&self) -> Result<usize, SqliteError> {
        Replica::open(&self.path, &self.limits)?.disown()
    }

    /// Forgets streams and proofs that nobody wants any more; returns the streams that went.
    pub async fn forget(
        &self,
        streams: &[StreamName],
        keep: impl Fn(&PackName) -> bool,
    ) -> Result<Vec<StreamName>, SqliteError> {
        self.forget_unwanted(|| (streams.to_vec(), keep)).await
    }

    /// The same; what is wanted is asked when no trial runs any more, which may have been one of a newer list.
    pub async fn forget_unwanted<K: Fn(&PackName) -> bool>(
        &self,
        wanted: impl FnOnce() -> (Vec<StreamName>, K),
    ) -> Result<Vec<StreamName>, SqliteError> {
        let _alone = self.gate.lock().await;
        let (streams, keep) = wanted();
        let mut replica = Replica::open(&self.path, &self.limits)?;
        let gone = failpoint::step("shadow.drop-streams", || replica.drop_streams_except(&streams))?;
        failpoint::step("shadow.forget-proofs", || {
            replica
                .forget_proofs(|instance, version, kind| keep(&PackName { instance: instance.clone(), version, kind }))
        })?;
        Ok(gone)
    }

    /// As long as the guard lives, nothing is tried.
    #[cfg(test)]
    pub async fn alone(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.gate.lock().await
    }

    /// Brings the whole WAL home and cuts it, unless a trial runs.
    pub fn truncate_wal(&self) -> Result<(), SqliteError> {
        match self.gate.try_lock() {
            Ok(_alone) => {
                let replica = Replica::open(&self.path, &self.limits)?;
                failpoint::step("shadow.truncate", || replica.checkpoint(Checkpoint::Truncate))
            }
            Err(_) => Ok(()),
        }
    }

    /// The streams held.
    pub fn streams(&self) -> Result<Vec<StreamName>, SqliteError> {
        Ok(Replica::open_read_only(&self.path, &self.limits)?.all_held()?.into_keys().collect())
    }

    /// Recomputes the digests of a stream's tables from their rows; none if its contract is refused. Blocks for a scan.
    pub fn verify(&self, stream: &StreamName) -> Result<Vec<TableCheck>, VerifyError> {
        let replica = Replica::open_read_only(&self.path, &self.limits)?;
        let before = replica.held(stream)?;
        let checks = replica.verify(stream)?;
        // A full that was applied while they were read has healed them; of a delta the second look says the same.
        if checks.iter().all(TableCheck::is_right) || replica.held(stream)? == before {
            return Ok(checks);
        }
        replica.verify(stream)
    }
}

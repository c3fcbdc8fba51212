//! Remembers which packs were being applied when this process died, so that one that kills it each
//! time does not hold up the other streams. The file `trying` is written without fsync on purpose:
//! it survives the death of the process, which counts, and not a power cut, which does not.

use proto::failpoint;
use proto::layout::PackName;
use proto::shelf::{self, PartFile, ShelfError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Deaths in a row before the pack has to wait.
const PATIENCE: u32 = 3;
/// Deaths in a row before HQ is told.
const ALARM: u32 = 5;
/// The longest wait after a start: the other streams have had their turn by then.
const LONGEST: Duration = Duration::from_secs(15);

/// A pack that was being applied when the process died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trying {
    /// The first pack of the transaction.
    pub pack: PackName,
    /// Deaths in a row.
    pub deaths: u32,
}

impl Trying {
    /// How long after the start the pack has to wait.
    fn wait(&self) -> Duration {
        match self.deaths.checked_sub(PATIENCE) {
            None => Duration::ZERO,
            Some(n) => Duration::from_secs(1u64 << n.min(10)).min(LONGEST),
        }
    }
    /// Whether it died so often that HQ should know.
    pub fn is_alarming(&self) -> bool {
        self.deaths >= ALARM
    }
}

/// The file.
#[derive(Debug)]
pub struct Tries {
    path: PathBuf,
    started: Duration,
    last: Mutex<Option<Trying>>,
}

impl Tries {
    /// Reads what the process before left; an unreadable file says nothing.
    pub fn open(data_dir: &Path, started: Duration) -> Tries {
        let path = data_dir.join("trying");
        let text = shelf::read_bounded(&path, 4096).unwrap_or_default();
        let last = serde_json::from_slice::<Trying>(&text).ok().map(|t| Trying { deaths: t.deaths + 1, ..t });
        Tries { path, started, last: Mutex::new(last) }
    }

    /// The pack that the process died of before, if it has not been applied since.
    pub fn last(&self) -> Option<Trying> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a pack has to wait yet.
    pub fn must_wait(&self, pack: &PackName, now: Duration) -> bool {
        self.last().is_some_and(|t| &t.pack == pack && now < self.started + t.wait())
    }

    /// A transaction beginning with this pack is about to run.
    pub fn begin(&self, pack: &PackName) {
        let deaths = self.last().filter(|t| &t.pack == pack).map_or(0, |t| t.deaths);
        let trying = Trying { pack: pack.clone(), deaths };
        if let Err(e) =
            serde_json::to_vec(&trying).map_or(Ok(()), |text| failpoint::step("agent.trying", || self.write(&text)))
        {
            tracing::debug!(error = %e, "the try could not be noted");
        }
    }

    /// It ended, well or not.
    pub fn end(&self, pack: &PackName) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_some_and(|t| &t.pack == pack) {
            *last = None;
        }
        if let Err(e) = failpoint::step("agent.tried", || self.write(b"")) {
            tracing::debug!(error = %e, "the end of the try could not be noted");
        }
    }

    fn write(&self, text: &[u8]) -> Result<(), ShelfError> {
        let mut file = PartFile::open(&self.path)?;
        file.restart()?;
        file.write(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_are_counted_in_a_row_and_an_end_clears_them() {
        let dir = tempfile::tempdir().unwrap();
        let bad: PackName = "price@all/0000000002.delta.pack".parse().unwrap();
        let good: PackName = "promo@all/0000000002.delta.pack".parse().unwrap();
        let s = Duration::from_secs;
        for deaths in 0..6u32 {
            let t = Tries::open(dir.path(), s(100));
            assert_eq!(t.last().map_or(0, |t| t.deaths), deaths);
            assert_eq!(t.must_wait(&bad, s(100)), deaths >= 3, "{deaths}");
            assert!(!t.must_wait(&good, s(100)));
            assert!(!t.must_wait(&bad, s(100) + LONGEST));
            assert_eq!(t.last().is_some_and(|t| t.is_alarming()), deaths >= 5);
            t.begin(&bad);
            // Here the process dies.
        }
        let t = Tries::open(dir.path(), s(0));
        t.begin(&bad);
        t.end(&bad);
        assert_eq!(t.last(), None);
        assert_eq!(Tries::open(dir.path(), s(0)).last(), None);
    }

    #[test]
    fn a_try_of_another_pack_does_not_forget_the_deadly_one_in_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let bad: PackName = "price@all/0000000002.delta.pack".parse().unwrap();
        let good: PackName = "promo@all/0000000002.delta.pack".parse().unwrap();
        for _ in 0..4 {
            Tries::open(dir.path(), Duration::ZERO).begin(&bad);
        }
        let t = Tries::open(dir.path(), Duration::ZERO);
        t.begin(&good);
        t.end(&good);
        assert!(t.must_wait(&bad, Duration::ZERO));
    }
}

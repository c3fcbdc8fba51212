//! Remembers which packs were being applied when this process died, so that one that kills it each
//! time does not hold up the other streams. The file `trying` is written without fsync on purpose:
//! it survives the death of the process, which counts; if it survives a power cut too, the machine's boot tells that.

use proto::failpoint;
use proto::layout::PackName;
use proto::shelf::{self, PartFile, ShelfError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Deaths in a row before the pack has to wait.
const PATIENCE: u32 = 3;
/// Deaths in a row before HQ is told.
const ALARM: u32 = 5;
/// Power cuts in a row that are not deaths: after these it may be the pack that takes the machine down.
const CUTS: u32 = 10;
/// The longest wait after a start: the other streams have had their turn by then.
const LONGEST: Duration = Duration::from_secs(15);

/// A pack that was being applied when the process died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trying {
    /// The first pack of the transaction.
    pub pack: PackName,
    /// Deaths in a row.
    pub deaths: u32,
    /// Power cuts in a row.
    #[serde(default)]
    pub cuts: u32,
    /// In which boot of the machine it was tried; from older programs none.
    #[serde(default)]
    pub boot: String,
}

impl Trying {
    /// The same at the next start, in this boot: a power cut says nothing about the pack, unless there are ever more.
    fn at_start(self, boot: &str) -> Trying {
        if !self.boot.is_empty() && self.boot != boot && self.cuts < CUTS {
            return Trying { cuts: self.cuts + 1, ..self };
        }
        Trying { deaths: self.deaths.saturating_add(1), ..self }
    }
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
    boot: String,
    last: Mutex<Option<Trying>>,
    /// Nothing waits any more.
    hurried: AtomicBool,
}

impl Tries {
    /// Reads what the process before left; an unreadable file says nothing. `boot` names the time since the machine was
    /// switched on.
    pub fn open(data_dir: &Path, started: Duration, boot: &str) -> Tries {
        let path = data_dir.join("trying");
        let text = shelf::read_bounded(&path, 4096).unwrap_or_default();
        let last = serde_json::from_slice::<Trying>(&text).ok().map(|t| t.at_start(boot));
        Tries { path, started, boot: boot.to_owned(), last: Mutex::new(last), hurried: AtomicBool::new(false) }
    }

    /// The pack that the process died of before, if it has not been applied nor passed since.
    pub fn last(&self) -> Option<Trying> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a pack has to wait yet.
    pub fn must_wait(&self, pack: &PackName, now: Duration) -> bool {
        let waits = |t: Trying| &t.pack == pack && now < self.started + t.wait();
        !self.hurried.load(Ordering::Relaxed) && self.last().is_some_and(waits)
    }

    /// Ends the wait, if a pack has to: a process that ends after one cycle would never try it again, nor count on.
    /// Whether one had to.
    pub fn hurry(&self, now: Duration) -> bool {
        let waited = self.last().is_some_and(|t| self.must_wait(&t.pack, now));
        self.hurried.store(true, Ordering::Relaxed);
        waited
    }

    /// A transaction beginning with this pack is about to run.
    pub fn begin(&self, pack: &PackName) {
        let before = self.last().filter(|t| &t.pack == pack);
        let (deaths, cuts) = before.map_or((0, 0), |t| (t.deaths, t.cuts));
        let trying = Trying { pack: pack.clone(), deaths, cuts, boot: self.boot.clone() };
        if let Err(e) =
            serde_json::to_vec(&trying).map_or(Ok(()), |text| failpoint::step("agent.trying", || self.write(&text)))
        {
            tracing::debug!(error = %e, "the try could not be noted");
        }
    }

    /// It ended, well or not; or nobody will try it any more.
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
            let t = Tries::open(dir.path(), s(100), "boot");
            assert_eq!(t.last().map_or(0, |t| t.deaths), deaths);
            assert_eq!(t.must_wait(&bad, s(100)), deaths >= 3, "{deaths}");
            assert!(!t.must_wait(&good, s(100)));
            assert!(!t.must_wait(&bad, s(100) + LONGEST));
            assert_eq!(t.last().is_some_and(|t| t.is_alarming()), deaths >= 5);
            t.begin(&bad);
            // Here the process dies.
        }
        let t = Tries::open(dir.path(), s(0), "boot");
        t.begin(&bad);
        t.end(&bad);
        assert_eq!(t.last(), None);
        assert_eq!(Tries::open(dir.path(), s(0), "boot").last(), None);
    }

    #[test]
    fn power_cuts_are_no_deaths_of_a_pack_until_there_are_ever_more() {
        let dir = tempfile::tempdir().unwrap();
        let pack: PackName = "price@all/0000000002.delta.pack".parse().unwrap();
        for boot in 0..=CUTS {
            let t = Tries::open(dir.path(), Duration::ZERO, &format!("boot {boot}"));
            assert_eq!(t.last().map_or(0, |t| t.deaths), 0, "{boot}");
            assert!(!t.must_wait(&pack, Duration::ZERO));
            t.begin(&pack);
            // Here the power goes.
        }
        let deaths = |boot: &str| Tries::open(dir.path(), Duration::ZERO, boot).last().map(|t| t.deaths);
        assert_eq!(deaths(&format!("boot {CUTS}")), Some(1), "the same boot: the process died");
        assert_eq!(deaths("one cut more"), Some(1));
        // An older program wrote no boot: as it counted.
        let old = format!("{{\"pack\":\"{pack}\",\"deaths\":2}}");
        Tries::open(dir.path(), Duration::ZERO, "boot").write(old.as_bytes()).unwrap();
        assert_eq!(deaths("boot"), Some(3));
        Tries::open(dir.path(), Duration::ZERO, "boot").end(&pack);
        assert_eq!(deaths("boot"), None);
    }

    #[test]
    fn a_try_of_another_pack_does_not_forget_the_deadly_one_in_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let bad: PackName = "price@all/0000000002.delta.pack".parse().unwrap();
        let good: PackName = "promo@all/0000000002.delta.pack".parse().unwrap();
        for _ in 0..4 {
            Tries::open(dir.path(), Duration::ZERO, "boot").begin(&bad);
        }
        let t = Tries::open(dir.path(), Duration::ZERO, "boot");
        t.begin(&good);
        t.end(&good);
        assert!(t.must_wait(&bad, Duration::ZERO));
    }

    #[test]
    fn a_process_in_a_hurry_tries_it_again_and_deaths_are_counted_on() {
        let dir = tempfile::tempdir().unwrap();
        let bad: PackName = "price@all/0000000002.delta.pack".parse().unwrap();
        for deaths in 0..=ALARM {
            let t = Tries::open(dir.path(), Duration::ZERO, "boot");
            assert_eq!(t.last().map_or(0, |t| t.deaths), deaths);
            assert_eq!(t.hurry(Duration::ZERO), deaths >= PATIENCE, "{deaths}");
            assert!(!t.must_wait(&bad, Duration::ZERO) && !t.hurry(Duration::ZERO), "{deaths}");
            t.begin(&bad);
            // Here the process dies.
        }
        let t = Tries::open(dir.path(), Duration::ZERO, "boot");
        assert!(!t.hurry(LONGEST), "it has waited long enough");
        assert!(t.last().is_some_and(|t| t.is_alarming()));
    }
}

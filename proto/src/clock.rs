//! Time as an argument. Nothing else in the project asks the system for it.

use std::time::Duration;

pub use jiff::Timestamp;

/// What time it is, and how long something took.
pub trait Clock: std::fmt::Debug + Send + Sync {
    /// The system's wall clock; may be wrong, may leap.
    fn now(&self) -> Timestamp;
    /// Time since an arbitrary start; never goes back.
    fn monotonic(&self) -> Duration;
}

/// The machine's clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: std::time::Instant,
}

#[allow(clippy::disallowed_methods, reason = "the one room that reads the machine's clocks")]
mod system {
    use super::*;
    impl Default for SystemClock {
        fn default() -> Self {
            SystemClock { start: std::time::Instant::now() }
        }
    }
    impl Clock for SystemClock {
        fn now(&self) -> Timestamp {
            whole_seconds(Timestamp::now())
        }
        fn monotonic(&self) -> Duration {
            self.start.elapsed()
        }
    }
}

fn whole_seconds(t: Timestamp) -> Timestamp {
    Timestamp::from_second(t.as_second()).unwrap_or(t)
}

/// Names the time since the machine was switched on, the same for all who ask; empty where the system does not tell.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// `t` plus a duration, held at the end of the calendar.
pub fn after(t: Timestamp, d: Duration) -> Timestamp {
    t.checked_add(jiff::SignedDuration::try_from(d).unwrap_or(jiff::SignedDuration::MAX)).unwrap_or(Timestamp::MAX)
}

/// `t` less a duration, held at the beginning of the calendar.
pub fn before(t: Timestamp, d: Duration) -> Timestamp {
    t.checked_sub(jiff::SignedDuration::try_from(d).unwrap_or(jiff::SignedDuration::MAX)).unwrap_or(Timestamp::MIN)
}

/// How long `later` is after `earlier`; zero if it is not.
pub fn since(later: Timestamp, earlier: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or_default()
}

/// A clock that a test turns by hand.
#[cfg(any(test, feature = "testkit"))]
#[derive(Debug)]
pub struct TestClock(std::sync::Mutex<(Timestamp, Duration)>);

#[cfg(any(test, feature = "testkit"))]
#[allow(clippy::unwrap_used, reason = "test code")]
impl TestClock {
    /// A clock standing at `now`.
    pub fn at(now: &str) -> Self {
        TestClock(std::sync::Mutex::new((now.parse().unwrap(), Duration::ZERO)))
    }
    /// Lets time pass on both clocks.
    pub fn advance(&self, by: Duration) {
        let mut t = self.0.lock().unwrap();
        t.0 = after(t.0, by);
        t.1 += by;
    }
    /// Sets the wall clock alone, as NTP or a hand would.
    pub fn set(&self, now: Timestamp) {
        self.0.lock().unwrap().0 = now;
    }
}

#[cfg(any(test, feature = "testkit"))]
#[allow(clippy::unwrap_used, reason = "test code")]
impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        self.0.lock().unwrap().0
    }
    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}

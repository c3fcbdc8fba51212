//! A clock that a test turns by hand.
#![allow(clippy::unwrap_used)]

use proto::clock::{Clock, Timestamp, after};
use std::sync::Mutex;
use std::time::Duration;

pub(crate) struct TestClock(Mutex<(Timestamp, Duration)>);

impl TestClock {
    pub(crate) fn at(now: &str) -> Self {
        TestClock(Mutex::new((now.parse().unwrap(), Duration::ZERO)))
    }
    pub(crate) fn advance(&self, by: Duration) {
        let mut t = self.0.lock().unwrap();
        *t = (after(t.0, by), t.1 + by);
    }
    pub(crate) fn set(&self, now: Timestamp) {
        self.0.lock().unwrap().0 = now;
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        self.0.lock().unwrap().0
    }
    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}

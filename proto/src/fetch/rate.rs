//! Tells a slow source from a dead slow one; pure, time comes as an argument.

use super::RateFloor;
use crate::config::HumanDuration;
use std::collections::VecDeque;
use std::time::Duration;

/// How finely the window slides.
const STEPS: u32 = 6;

/// Bytes over the last window.
pub(super) struct RateMeter {
    rules: RateFloor,
    total: u64,
    /// What had arrived when; a sample a sixth of the window.
    samples: VecDeque<(Duration, u64)>,
}

impl RateMeter {
    pub(super) fn new(rules: RateFloor) -> Self {
        RateMeter { rules, total: 0, samples: VecDeque::new() }
    }

    /// Counts bytes that arrived at `now`; true when the last whole window was under the floor.
    pub(super) fn is_too_slow(&mut self, now: Duration, bytes: u64) -> bool {
        let window = self.rules.window.0;
        let Some(&(newest, _)) = self.samples.back() else {
            // The first bytes start the window; they are not of it.
            self.samples.push_back((now, 0));
            return false;
        };
        self.total += bytes;
        // The youngest sample that is a window old.
        while self.samples.get(1).is_some_and(|(t, _)| now.saturating_sub(*t) >= window) {
            self.samples.pop_front();
        }
        if now.saturating_sub(newest) >= window / STEPS {
            self.samples.push_back((now, self.total));
        }
        let Some(&(start, before)) = self.samples.front() else { return false };
        let past = now.saturating_sub(start);
        let floor = self.rules.bytes_per_second as f64 * past.as_secs_f64();
        !window.is_zero() && past >= window && ((self.total - before) as f64) < floor
    }
}

/// The floor of a small object's body, which comes whole or not at all: one that drips must not hold up the
/// sources after it.
pub(super) fn of_small(read_timeout: Duration) -> RateFloor {
    RateFloor { window: HumanDuration(read_timeout * 2), ..RateFloor::default() }
}

pub(super) fn too_slow(rules: &RateFloor) -> String {
    format!("slower than {} bytes/s over {}", rules.bytes_per_second, rules.window)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When a source that sends `bytes` each second is given up, in seconds.
    fn given_up(floor: u64, bytes: impl Fn(u64) -> u64) -> Option<u64> {
        let rules = RateFloor { bytes_per_second: floor, window: HumanDuration(Duration::from_secs(60)) };
        let mut meter = RateMeter::new(rules);
        (0..600).find(|s| meter.is_too_slow(Duration::from_secs(*s), bytes(*s)))
    }

    #[test]
    fn a_drip_is_given_up_within_75_seconds() {
        assert_eq!(given_up(1024, |_| 1), Some(60));
        assert_eq!(given_up(1024, |_| 1023), Some(60));
    }

    #[test]
    fn at_the_floor_it_goes_on() {
        assert_eq!(given_up(1024, |_| 1024), None);
        // A pause of half a minute is no drip.
        assert_eq!(given_up(1024, |s| if s % 60 < 30 { 0 } else { 4096 }), None);
    }

    #[test]
    fn a_fast_start_does_not_pay_for_a_drip() {
        let end = given_up(1024, |s| if s < 100 { 1 << 20 } else { 1 }).unwrap();
        assert!((160..=175).contains(&end), "{end}");
    }

    #[test]
    fn zero_waits_for_ever() {
        assert_eq!(given_up(0, |_| 0), None);
    }
}

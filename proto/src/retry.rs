//! What to do after a failure, and how long to wait before the next try.
//!
//! Owns the four verdicts and the arithmetic of waiting. Never waits itself, holds no state: loops
//! hand in the attempt and the random number. Power may go at any time.

use std::time::Duration;

/// What a failure asks of whoever met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The surroundings failed (network, busy, disk full, too many files): the same again, later.
    Retry,
    /// The object is bad: put it aside, count the try, go on without it.
    Quarantine,
    /// This replica drifted: heal it by a full pack.
    Rebuild,
    /// A failed fsync or an unsound database: latch, alert, touch nothing.
    Halt,
}

/// Exponential waiting with full jitter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The longest wait before the second try.
    pub base: Duration,
    /// The longest wait ever.
    pub cap: Duration,
}

impl Backoff {
    /// From `base` doubling to `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Backoff { base, cap }
    }

    /// The wait after failure number `attempt` (the first is 0): anything from nothing to
    /// `min(cap, base * 2^attempt)`, as `random` (0 to 1) says. Full jitter keeps a thousand
    /// stores from coming back in step.
    pub fn delay(&self, attempt: u32, random: f64) -> Duration {
        let factor = 1u32.checked_shl(attempt.min(31)).unwrap_or(u32::MAX);
        let most = self.base.saturating_mul(factor).min(self.cap);
        let random = if random.is_finite() { random.clamp(0.0, 1.0) } else { 1.0 };
        most.mul_f64(random)
    }
}

/// What somebody may still do: so much at once, and more with time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    left: f64,
    most: f64,
    a_second: f64,
    at: Duration,
}

impl Budget {
    /// `most` at once; so much more comes with each second, up to that.
    pub const fn new(most: u32, a_second: u32) -> Budget {
        Budget { left: most as f64, most: most as f64, a_second: a_second as f64, at: Duration::ZERO }
    }

    /// Takes one, at a monotonic time; whether there was one.
    pub fn take(&mut self, now: Duration) -> bool {
        let grown = self.left + now.saturating_sub(self.at).as_secs_f64() * self.a_second;
        (self.left, self.at) = (grown.min(self.most), now);
        let one = self.left >= 1.0;
        self.left -= f64::from(u8::from(one));
        one
    }
}

/// A random number from 0 up to, not including, 1. Without a source of randomness: a half.
pub fn random_unit() -> f64 {
    // 53 bits: all that an f64 in [0, 1) can hold.
    getrandom::u64().map_or(0.5, |n| (n >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_never_pass_it() {
        let b = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
        assert_eq!(b.delay(0, 1.0), Duration::from_secs(1));
        assert_eq!(b.delay(3, 1.0), Duration::from_secs(8));
        assert_eq!(b.delay(3, 0.5), Duration::from_secs(4));
        assert_eq!(b.delay(9, 1.0), Duration::from_secs(300));
        for attempt in [31, 32, 33, u32::MAX] {
            assert_eq!(b.delay(attempt, 1.0), Duration::from_secs(300));
            assert_eq!(b.delay(attempt, 0.0), Duration::ZERO);
        }
    }

    #[test]
    fn a_budget_is_so_much_at_once_and_more_with_time() {
        let ms = Duration::from_millis;
        let mut b = Budget::new(3, 2);
        let taken = |b: &mut Budget, at| (0..10).filter(|_| b.take(at)).count();
        assert_eq!(taken(&mut b, ms(1_000_000)), 3);
        assert_eq!(taken(&mut b, ms(1_000_499)), 0);
        assert_eq!(taken(&mut b, ms(1_001_000)), 2);
        assert_eq!(taken(&mut b, ms(9_000_000)), 3, "it is not saved up");
        assert_eq!(taken(&mut b, ms(5)), 0, "a clock that goes back gives nothing");
    }

    #[test]
    fn bad_random_numbers_do_not_panic() {
        let b = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
        for r in [-1.0, 2.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(b.delay(2, r) <= Duration::from_secs(4));
        }
    }

    #[test]
    fn random_units_are_units_and_differ() {
        let some: Vec<f64> = (0..100).map(|_| random_unit()).collect();
        assert!(some.iter().all(|r| (0.0..1.0).contains(r)));
        assert!(some.iter().any(|r| (r - some[0]).abs() > 0.01));
    }
}

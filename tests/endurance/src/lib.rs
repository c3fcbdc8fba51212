//! Weeks of a chain's life in minutes. Headquarters, relays and registers run as daemons while prices and master data
//! change, processes are killed, stores lose their WAN and the mail server is gone for a day. Meanwhile no register
//! may show rows that were never published, nor an older version; at the end all tiers hold the source's digests, and
//! no process and no directory has grown without bound. All chances come from a seed; days are seconds, since every
//! pause of the product is a setting.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "test code: a failure here is a failed run, and files and clocks are its own"
)]

mod chain;
mod life;
mod plot;
mod watch;

pub use life::{Options, Report, live};

/// SplitMix64: the same chances for the same seed.
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    /// From `from` up to `to`.
    fn between(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

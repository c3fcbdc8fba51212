//! Simulated time: one for the world, and each machine's own idea of it.

use proto::clock::{Clock, Timestamp};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Milliseconds since the simulation began.
pub type Ms = u64;

/// The world's time.
#[derive(Debug, Clone, Default)]
pub struct World(Arc<AtomicU64>);

/// When every simulation begins, in seconds since 1970.
const BEGIN: i64 = 1_900_000_000;

impl World {
    /// Now.
    pub fn now(&self) -> Ms {
        self.0.load(Relaxed)
    }
    /// Lets time pass.
    pub fn set(&self, to: Ms) {
        self.0.store(to, Relaxed);
    }
}

/// A machine's clocks: wrong by `skew` seconds, the monotonic one from its last start on.
#[derive(Debug)]
pub struct Machine {
    world: World,
    skew: AtomicI64,
    booted: AtomicU64,
}

impl Machine {
    /// A machine that is started now.
    pub fn new(world: &World) -> Arc<Machine> {
        Arc::new(Machine { world: world.clone(), skew: AtomicI64::new(0), booted: AtomicU64::new(world.now()) })
    }
    /// Its wall clock is wrong by so many seconds from now on.
    pub fn set_skew(&self, seconds: i64) {
        self.skew.store(seconds, Relaxed);
    }
    /// By how much it is wrong.
    pub fn skew(&self) -> i64 {
        self.skew.load(Relaxed)
    }
    /// It was switched off and on.
    pub fn reboot(&self) {
        self.booted.store(self.world.now(), Relaxed);
    }
}

impl Clock for Machine {
    fn now(&self) -> Timestamp {
        let seconds = BEGIN + (self.world.now() / 1000) as i64 + self.skew();
        Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
    }
    fn monotonic(&self) -> Duration {
        // A machine takes some time to start.
        Duration::from_millis(self.world.now().saturating_sub(self.booted.load(Relaxed))) + Duration::from_secs(10)
    }
}

//! A deterministic simulation of headquarters, bucket, CDN, relays, registers, their network, disks and clocks: the
//! product's own state machines, in one process, from one seed.
//!
//! One thing happens at a time. A machine's work runs until it asks the network for something; the simulation then
//! decides, by the seed, what becomes of the question and when, and goes on with whatever is next in simulated time.
//! After each thing `model` looks at what the machine holds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "test code: a failure here is a failed test, and files and clocks are the test's own"
)]

pub mod cdn;
pub mod clock;
pub mod disk;
pub mod evil;
pub mod hq;
pub mod log;
pub mod model;
pub mod net;
pub mod sim;
pub mod store;
pub mod trouble;

pub use sim::{Failure, Outcome, run_seed};

//! Explorers of what may happen to the real binaries: states that a power cut may leave, errors of system calls, kills
//! at any of them. What is left is judged by a checker that shares no code with the product.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "test code: a failure here is a failed test, and files and clocks are the test's own"
)]

pub mod bench;
pub mod check;
pub mod disk;
pub mod ioerrors;
pub mod kills;
pub mod powercut;
pub mod scenes;
mod stage;
pub mod trace;

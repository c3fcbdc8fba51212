//! Explorers of what a disk may do to the real binaries: states that a power cut may leave, and errors of system
//! calls. What is left is judged by a checker that shares no code with the product.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "test code: a failure here is a failed test, and files and clocks are the test's own"
)]

pub mod bench;
pub mod check;
pub mod dice;
pub mod disk;
pub mod ioerrors;
pub mod powercut;
pub mod scenes;
pub mod trace;

//! The agent as a whole, against a headquarters in a directory and a relay on loopback.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

mod chance;
mod cycle;
mod damage;
mod doctor;
mod kit;
mod relay;
mod trouble;

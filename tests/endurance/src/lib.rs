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

//! Real servers on loopback, on ports chosen by the system, without root, in temporary directories.

mod databases;
mod nginx;
mod s3;
mod smtp;

pub use databases::{MariaDb, Postgres};
pub use nginx::Nginx;
pub use s3::{Conditions, Request, S3, StandIn};
pub use smtp::{Mail, Smtp, SmtpOptions};

use crate::process::Process;

/// A start that lost its port to another test is tried again.
#[track_caller]
fn with_free_port<T>(mut start: impl FnMut(u16) -> Result<T, String>) -> T {
    let mut last = String::new();
    for _ in 0..3 {
        match start(crate::free_port()) {
            Ok(server) => return server,
            Err(e) => last = e,
        }
    }
    panic!("{last}")
}

/// Polls `ready` for up to a minute; Err with the log's end when it does not come, or the process ends.
fn ready(process: &mut Process, name: &str, mut ready: impl FnMut() -> bool) -> Result<(), String> {
    let deadline = std::time::Duration::from_secs(60);
    let up = crate::wait_for(deadline, || if ready() { Some(true) } else { (!process.is_running()).then_some(false) });
    match up {
        Some(true) => Ok(()),
        _ => Err(format!("{name} does not come up; its log ends:\n{}", crate::process::tail(process.log(), 30))),
    }
}

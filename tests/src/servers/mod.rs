//! Real servers on loopback, on ports chosen by the system, without root, in temporary directories.

mod databases;
mod nginx;
mod s3;
mod smtp;

pub use databases::{MariaDb, Postgres};
pub use nginx::Nginx;
pub use s3::{Conditions, Request, S3, StandIn};
pub use smtp::{Mail, Smtp, SmtpOptions};

use crate::process::{self, Process};
use std::path::Path;
use std::process::Command;

/// A port that no other test is told: who asks whether a server is up asks the port. A start that lost it all the same is
/// tried again.
#[track_caller]
fn with_free_port<T>(mut start: impl FnMut(u16) -> Result<T, String>) -> T {
    let mut last = String::new();
    for _ in 0..3 {
        match start(crate::quiet_port()) {
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

/// An authority (`ca.crt`) and a certificate by it for these names (`server.crt`, `server.key`).
fn make_certificates(dir: &Path, names: &str) {
    let openssl = |args: &str| {
        process::succeed(Command::new(process::program("openssl")).args(args.split(' ')).current_dir(dir));
    };
    std::fs::write(dir.join("ext"), format!("subjectAltName={names}\nextendedKeyUsage=serverAuth\n")).unwrap();
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=test-ca -keyout ca.key -out ca.crt",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
    );
    openssl("x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile ext -out server.crt");
}

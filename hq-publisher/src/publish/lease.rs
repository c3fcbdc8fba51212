//! One publisher at a time: a lock file for this machine, a lease in the ledger for all of them.
//!
//! The kernel frees the lock when a process dies, however it dies; so whoever has the lock knows
//! that a lease of the same machine and directory is of a dead process, and takes it over at once.

use super::PublishError;
use crate::config::Config;
use crate::ledger::{Acquired, Ledger, Token};
use proto::clock::Clock;
use proto::failpoint;
use proto::shelf::{self, LockError, LockFile};
use std::sync::Arc;
use std::time::Duration;

/// How often a publisher that waits looks again.
const LOOK: Duration = Duration::from_millis(200);

/// The lease, renewed in the background until it is given back or dropped.
#[derive(Debug)]
pub struct Lease {
    token: Token,
    ledger: Ledger,
    renewing: tokio::task::JoinHandle<()>,
    _lock: LockFile,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

impl Lease {
    /// Waits for the lease up to `publish.lease_wait`; then an error names who has it.
    pub async fn acquire(config: &Config, ledger: &Ledger, clock: &Arc<dyn Clock>) -> Result<Lease, PublishError> {
        let (lock, token) = Lease::take(config, ledger, clock.as_ref()).await?;
        let renewing = tokio::spawn(renew(ledger.clone(), token, config.publish.lease.0, clock.clone()));
        Ok(Lease { token, ledger: ledger.clone(), renewing, _lock: lock })
    }

    /// As [`Lease::acquire`], for who renews and releases it himself. It is his while he has the lock.
    pub async fn take(config: &Config, ledger: &Ledger, clock: &dyn Clock) -> Result<(LockFile, Token), PublishError> {
        let dir = config.state.dir.join("publish");
        shelf::create_dir(&dir)?;
        let place = format!("{}:{}", host(), config.state.dir.display());
        let holder = format!("{place}, process {}", std::process::id());
        let ttl = config.publish.lease.0;
        let wait = config.publish.lease_wait.0;
        let end = tokio::time::Instant::now() + wait;
        // Only for somebody: a disk that is slow is nobody's lease.
        let wait_for = async |holder: String| {
            if tokio::time::Instant::now() >= end {
                return Err(PublishError::LeaseHeld { holder, waited: wait.as_secs() });
            }
            tokio::time::sleep(LOOK).await;
            Ok(())
        };
        let lock = loop {
            match LockFile::acquire(&dir) {
                Ok(lock) => break lock,
                Err(LockError::Held { pid, .. }) => {
                    let who = pid.map_or_else(|| "another process".to_owned(), |p| format!("process {p}"));
                    wait_for(format!("{place}, {who}")).await?;
                }
                Err(e) => return Err(PublishError::Lock(e)),
            }
        };
        loop {
            match failpoint::around("lease.acquire", ledger.acquire(&holder, clock.now(), ttl)).await? {
                Acquired::Lease(token) => return Ok((lock, token)),
                Acquired::HeldBy { holder, .. } if holder.starts_with(&format!("{place}, ")) => {
                    tracing::info!(%holder, "taking over the lease of a publisher that died");
                    failpoint::around("lease.expire", ledger.expire(&holder)).await?;
                }
                Acquired::HeldBy { holder, .. } => wait_for(holder).await?,
            }
        }
    }

    /// The number that fences every write.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Gives the lease back.
    pub async fn release(self) {
        // It would run out by itself.
        if let Err(e) = failpoint::around("lease.release", self.ledger.release(self.token)).await {
            tracing::warn!(error = %e, "the lease could not be given back");
        }
    }
}

async fn renew(ledger: Ledger, token: Token, ttl: Duration, clock: Arc<dyn Clock>) {
    loop {
        tokio::time::sleep(ttl / 3).await;
        match ledger.renew(token, clock.now(), ttl).await {
            Ok(true) => {}
            // Every write of the run asks for the token: it stops there.
            Ok(false) => return tracing::error!("the publisher's lease was lost"),
            Err(e) => tracing::warn!(error = %e, "the lease could not be renewed"),
        }
    }
}

/// This machine's name, for people.
pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "this machine".into(), |h| h.trim().to_owned())
}

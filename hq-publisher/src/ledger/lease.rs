//! One publisher at a time: a lease with a fencing number.

use super::{Ledger, LedgerError};
use proto::clock::Timestamp;
use std::time::Duration;

/// The fencing number of a lease; rises with every acquisition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub(super) i64);

/// The answer to [`Ledger::acquire`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// Ours until `now + ttl`.
    Lease(Token),
    /// Somebody else's.
    HeldBy {
        /// Who, as they named themselves.
        holder: String,
        /// Until when, unless renewed.
        until: Timestamp,
    },
}

impl Ledger {
    /// Takes the publisher's lease if it is free or ran out. `holder` is for people: host and pid.
    pub async fn acquire(&self, holder: &str, now: Timestamp, ttl: Duration) -> Result<Acquired, LedgerError> {
        let _ = (holder, now, ttl);
        todo!()
    }
    /// Prolongs the lease; false when it is no longer ours.
    pub async fn renew(&self, token: Token, now: Timestamp, ttl: Duration) -> Result<bool, LedgerError> {
        let _ = (token, now, ttl);
        todo!()
    }
    /// Whether nobody took the lease since. Asked before each batch of puts.
    pub async fn holds(&self, token: Token) -> Result<bool, LedgerError> {
        let _ = token;
        todo!()
    }
    /// Gives the lease back; one that is no longer ours is left alone.
    pub async fn release(&self, token: Token) -> Result<(), LedgerError> {
        let _ = token;
        todo!()
    }
}

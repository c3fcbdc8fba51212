//! Episodes (something is wrong, since when) and the mails that tell of them.

use super::{Ledger, LedgerError};
use proto::clock::Timestamp;
use std::time::Duration;

/// Something that is or was wrong. One mail when it opens, one when it closes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Episode {
    /// What and where, e.g. `store-silent/0421`, `publish-refused/price@zone-east`.
    pub key: String,
    /// The line that people read.
    pub text: String,
    /// When it began.
    pub opened_at: Timestamp,
    /// When it ended; none while it lasts.
    pub closed_at: Option<Timestamp>,
}

/// A mail in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// Its Message-ID without brackets, the same at every try.
    pub id: String,
    /// Subject.
    pub subject: String,
    /// Text.
    pub body: String,
    /// When it was written.
    pub created_at: Timestamp,
    /// Tries so far.
    pub attempts: u32,
    /// Why the last try failed.
    pub last_error: Option<String>,
}

impl Ledger {
    /// Opens an episode and puts its mail into the outbox, in one transaction; false (and nothing
    /// is written) when it is open already.
    pub async fn open_episode(&self, key: &str, text: &str, mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        let _ = (key, text, mail, now);
        todo!()
    }
    /// Closes an episode and puts the mail of recovery into the outbox; false when none is open.
    pub async fn close_episode(&self, key: &str, mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        let _ = (key, mail, now);
        todo!()
    }
    /// Open episodes whose key begins so, by key.
    pub async fn open_episodes(&self, prefix: &str) -> Result<Vec<Episode>, LedgerError> {
        let _ = prefix;
        todo!()
    }
    /// Takes the next mail that is due, for `lease`; nobody else gets it meanwhile.
    pub async fn claim_mail(&self, now: Timestamp, lease: Duration) -> Result<Option<Mail>, LedgerError> {
        let _ = (now, lease);
        todo!()
    }
    /// A mail was taken by the server.
    pub async fn mail_sent(&self, id: &str, now: Timestamp) -> Result<(), LedgerError> {
        let _ = (id, now);
        todo!()
    }
    /// A try failed; the next not before `next`.
    pub async fn mail_failed(&self, id: &str, error: &str, next: Timestamp) -> Result<(), LedgerError> {
        let _ = (id, error, next);
        todo!()
    }
    /// Mails that wait, oldest first.
    pub async fn unsent_mails(&self) -> Result<Vec<Mail>, LedgerError> {
        todo!()
    }
}

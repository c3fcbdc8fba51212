//! Episodes (something is wrong, since when) and the mails that tell of them.

use super::db::{Columns, Write, seconds};
use super::{Ledger, LedgerError};
use proto::clock::{Timestamp, after};
use proto::failpoint;
use sqlx::AssertSqlSafe;
use sqlx::any::AnyRow;
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

const MAIL: &str = "SELECT id, subject, body, created_s, attempts, last_error FROM mail";

fn mail(row: &AnyRow) -> Result<Mail, LedgerError> {
    Ok(Mail {
        id: row.text(0)?,
        subject: row.text(1)?,
        body: row.text(2)?,
        created_at: row.time(3)?,
        attempts: u32::try_from(row.number(4)?).unwrap_or(u32::MAX),
        last_error: row.text_or_null(5)?,
    })
}

impl Ledger {
    /// Opens an episode and puts its mail into the outbox, in one transaction; false (and nothing
    /// is written) when it is open already.
    pub async fn open_episode(&self, key: &str, text: &str, mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        self.open_many(&[(key.to_owned(), text.to_owned())], mail, now).await
    }

    /// Opens several episodes that one mail tells of; no mail when all are open already.
    pub async fn open_many(&self, all: &[(String, String)], mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        let mut w = self.write().await?;
        let mut opened = 0;
        for (key, text) in all {
            let done = sqlx::query(
                "INSERT INTO episode (key, text, opened_s, closed_s) VALUES ($1, $2, $3, NULL) ON CONFLICT (key) \
                 DO UPDATE SET text = excluded.text, opened_s = excluded.opened_s, closed_s = NULL \
                 WHERE episode.closed_s IS NOT NULL",
            )
            .bind(key)
            .bind(text)
            .bind(seconds(now))
            .execute(&mut **w)
            .await?;
            opened += done.rows_affected();
        }
        w.tell(opened > 0, mail, now).await
    }

    /// Closes an episode and puts the mail of recovery into the outbox; false when none is open.
    pub async fn close_episode(&self, key: &str, mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        self.close_many(&[(key.to_owned(), String::new())], mail, now).await
    }

    /// Closes several episodes that one mail tells of; no mail when none was open.
    pub async fn close_many(&self, all: &[(String, String)], mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        let mut w = self.write().await?;
        let mut closed = 0;
        for (key, _) in all {
            let done = sqlx::query("UPDATE episode SET closed_s = $1 WHERE key = $2 AND closed_s IS NULL")
                .bind(seconds(now))
                .bind(key)
                .execute(&mut **w)
                .await?;
            closed += done.rows_affected();
        }
        // What ended long ago is of no more use.
        sqlx::query("DELETE FROM episode WHERE closed_s < $1").bind(seconds(now) - KEEP_S).execute(&mut **w).await?;
        w.tell(closed > 0, mail, now).await
    }

    /// Open episodes whose key begins so, by key.
    pub async fn open_episodes(&self, prefix: &str) -> Result<Vec<Episode>, LedgerError> {
        let rows = sqlx::query("SELECT key, text, opened_s, closed_s FROM episode WHERE closed_s IS NULL ORDER BY key")
            .fetch_all(self.pool())
            .await?;
        let mut open = Vec::new();
        for row in rows {
            let key = row.text(0)?;
            if key.starts_with(prefix) {
                open.push(Episode {
                    key,
                    text: row.text(1)?,
                    opened_at: row.time(2)?,
                    closed_at: row.time_or_null(3)?,
                });
            }
        }
        Ok(open)
    }

    /// Takes a mail, for `lease`; nobody else gets it meanwhile. When one is due, the oldest goes first,
    /// also one that waits for the server to come back: mails keep their order. A time more than a day
    /// away is of a clock that ran ahead.
    pub async fn claim_mail(&self, now: Timestamp, lease: Duration) -> Result<Option<Mail>, LedgerError> {
        let (now_s, far) = (seconds(now), seconds(after(now, Duration::from_secs(86_400))));
        let free = "sent_s IS NULL AND (claimed_s <= $1 OR claimed_s > $2)";
        let due = "(next_s <= $1 OR next_s > $2)";
        let mut w = self.write().await?;
        let sql = format!(
            "{MAIL} WHERE {free} AND ({due} OR own_fault = 0) AND EXISTS (SELECT 1 FROM mail WHERE {free} AND {due}) \
             ORDER BY n LIMIT 1"
        );
        let row = sqlx::query(AssertSqlSafe(sql)).bind(now_s).bind(far).fetch_optional(&mut **w).await?;
        let Some(mut mail) = row.as_ref().map(mail).transpose()? else { return Ok(None) };
        mail.attempts += 1;
        sqlx::query("UPDATE mail SET claimed_s = $1, attempts = $2 WHERE id = $3")
            .bind(seconds(after(now, lease)))
            .bind(i64::from(mail.attempts))
            .bind(&mail.id)
            .execute(&mut **w)
            .await?;
        w.commit().await?;
        Ok(Some(mail))
    }

    /// A mail was taken by the server.
    pub async fn mail_sent(&self, id: &str, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE mail SET sent_s = $1, last_error = NULL WHERE id = $2")
            .bind(seconds(now))
            .bind(id)
            .execute(&mut **w)
            .await?;
        // What was sent long ago is of no more use.
        sqlx::query("DELETE FROM mail WHERE sent_s < $1").bind(seconds(now) - KEEP_S).execute(&mut **w).await?;
        w.commit().await
    }

    /// A try failed; the next not before `next`. `own_fault`: this mail is to blame, not the server.
    pub async fn mail_failed(
        &self,
        id: &str,
        error: &str,
        own_fault: bool,
        next: Timestamp,
    ) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "UPDATE mail SET last_error = $1, next_s = $2, own_fault = $3, claimed_s = 0 WHERE id = $4 AND sent_s IS NULL",
        )
        .bind(error)
        .bind(seconds(next))
        .bind(i64::from(own_fault))
        .bind(id)
        .execute(&mut **w)
        .await?;
        w.commit().await
    }

    /// Nobody is to be told (no `[mail]` in the settings): what waits is put aside.
    pub async fn discard_mails(&self, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "UPDATE mail SET sent_s = $1, last_error = 'not sent: no [mail] in the settings' WHERE sent_s IS NULL",
        )
        .bind(seconds(now))
        .execute(&mut **w)
        .await?;
        w.commit().await
    }

    /// Mails that have waited since before `written`, and that the second way was not told of; oldest first.
    pub async fn untold_mails(&self, written: Timestamp) -> Result<Vec<Mail>, LedgerError> {
        let sql = format!("{MAIL} WHERE sent_s IS NULL AND told_s IS NULL AND created_s <= $1 ORDER BY n");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(seconds(written));
        query.fetch_all(self.pool()).await?.iter().map(mail).collect()
    }

    /// The second way took what a mail says.
    pub async fn mail_told(&self, id: &str, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        let query = sqlx::query("UPDATE mail SET told_s = $1 WHERE id = $2").bind(seconds(now)).bind(id);
        query.execute(&mut **w).await?;
        w.commit().await
    }

    /// Writes a mail unless one of its subject was written after `last`.
    pub async fn mail_now_and_then(&self, mail: &Mail, now: Timestamp, last: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        let known = sqlx::query("SELECT COUNT(*) FROM mail WHERE subject = $1 AND created_s > $2 AND created_s <= $3")
            .bind(&mail.subject)
            .bind(seconds(last))
            .bind(seconds(now))
            .fetch_one(&mut **w)
            .await?
            .number(0)?;
        w.tell(known == 0, mail, now).await.map(drop)
    }

    /// Mails that wait, oldest first.
    pub async fn unsent_mails(&self) -> Result<Vec<Mail>, LedgerError> {
        let sql = format!("{MAIL} WHERE sent_s IS NULL ORDER BY n");
        sqlx::query(AssertSqlSafe(sql)).fetch_all(self.pool()).await?.iter().map(mail).collect()
    }
}

/// Mails sent and episodes closed are kept for 90 days.
const KEEP_S: i64 = 90 * 86_400;

impl Write {
    async fn tell(mut self, anything: bool, mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        if anything {
            self.add_mail(mail, now).await?;
            failpoint::around("mail.queue", self.commit()).await?;
        }
        Ok(anything)
    }

    async fn add_mail(&mut self, mail: &Mail, now: Timestamp) -> Result<(), LedgerError> {
        sqlx::query(
            "INSERT INTO mail (n, id, subject, body, created_s, next_s) \
             SELECT COALESCE(MAX(n), 0) + 1, $1, $2, $3, $4, $4 FROM mail",
        )
        .bind(&mail.id)
        .bind(&mail.subject)
        .bind(&mail.body)
        .bind(seconds(now))
        .execute(&mut ***self)
        .await?;
        Ok(())
    }
}

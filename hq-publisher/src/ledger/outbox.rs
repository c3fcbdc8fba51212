//! Episodes (something is wrong, since when) and the mails that tell of them.

use super::db::{Columns, Write, seconds, to_json};
use super::{Ledger, LedgerError};
use futures_util::TryStreamExt;
use proto::clock::{Timestamp, after};
use proto::failpoint;
use sqlx::AssertSqlSafe;
use sqlx::any::AnyRow;
use std::collections::BTreeMap;
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

/// Who took a mail, and when, while others are still to get it.
pub type Taken = BTreeMap<String, Timestamp>;

/// A mail that is to be sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// Its place in the order.
    pub n: i64,
    /// The mail.
    pub mail: Mail,
    /// Who has it already.
    pub taken: Taken,
    /// Times that a server that was there said “not now” to it.
    pub refused: u32,
    /// Whether it is to blame itself: it holds up nobody.
    pub own_fault: bool,
}

/// What a try that failed leaves.
#[derive(Debug, Clone, Copy)]
pub struct Failed<'a> {
    /// Why.
    pub error: &'a str,
    /// This mail is to blame, not the server: others go past it from now on.
    pub own_fault: bool,
    /// No mail is due before this one.
    pub holds: bool,
    /// See [`Claimed::refused`].
    pub refused: u32,
    /// When this one is due.
    pub next: Timestamp,
    /// Who has it.
    pub taken: &'a Taken,
}

const MAIL: &str = "SELECT id, subject, body, created_s, attempts, last_error FROM mail";

fn mail(row: &AnyRow) -> Result<Mail, LedgerError> {
    Ok(Mail {
        id: row.text(0)?,
        subject: row.text(1)?,
        body: row.text(2)?,
        created_at: row.time(3)?,
        attempts: count(row, 4)?,
        last_error: row.text_or_null(5)?,
    })
}

fn count(row: &AnyRow, i: usize) -> Result<u32, LedgerError> {
    Ok(u32::try_from(row.number(i)?).unwrap_or(u32::MAX))
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

    /// Takes the oldest mail after place `above` that is wanted (by who has it already), for `lease`; nobody else gets it
    /// meanwhile. From the beginning (0) only when any is due: then the oldest goes first, also one that waits for the
    /// server to come back, so that mails keep their order. One that is to blame itself waits for its own time.
    pub async fn claim_mail(
        &self,
        now: Timestamp,
        lease: Duration,
        above: i64,
        wanted: impl Fn(&Taken) -> bool + Send,
    ) -> Result<Option<Claimed>, LedgerError> {
        let free = "sent_s IS NULL AND (claimed_s <= $1 OR claimed_s > $2)";
        let due = "(next_s <= $1 OR next_s > $2)";
        let mut w = self.write().await?;
        let sql = format!(
            "SELECT n, taken, refused, own_fault FROM mail WHERE {free} AND ({due} OR own_fault = 0) AND n > $3 \
             AND ($3 > 0 OR EXISTS (SELECT 1 FROM mail WHERE {free} AND {due})) ORDER BY n"
        );
        let query = sqlx::query(AssertSqlSafe(sql)).bind(seconds(now)).bind(far(now)).bind(above);
        let mut found = None;
        // Row by row: thousands may wait.
        let mut rows = query.fetch(&mut **w);
        while let Some(row) = rows.try_next().await? {
            let taken: Taken = row.json(1, "mail's recipients")?;
            if wanted(&taken) {
                found = Some((row.number(0)?, taken, count(&row, 2)?, row.number(3)? != 0));
                break;
            }
        }
        drop(rows);
        let Some((n, taken, refused, own_fault)) = found else { return Ok(None) };
        let query = sqlx::query(AssertSqlSafe(format!("{MAIL} WHERE n = $1"))).bind(n);
        let mut mail = mail(&query.fetch_one(&mut **w).await?)?;
        mail.attempts += 1;
        sqlx::query("UPDATE mail SET claimed_s = $1, attempts = $2 WHERE n = $3")
            .bind(seconds(after(now, lease)))
            .bind(i64::from(mail.attempts))
            .bind(n)
            .execute(&mut **w)
            .await?;
        w.commit().await?;
        Ok(Some(Claimed { n, mail, taken, refused, own_fault }))
    }

    /// A mail was taken by the server. Older ones that it refused again and again are to blame themselves.
    pub async fn mail_sent(&self, id: &str, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE mail SET sent_s = $1, last_error = NULL WHERE id = $2")
            .bind(seconds(now))
            .bind(id)
            .execute(&mut **w)
            .await?;
        sqlx::query(
            "UPDATE mail SET own_fault = 1 WHERE sent_s IS NULL AND claimed_s <= $1 AND refused > 1 \
             AND n < (SELECT n FROM mail WHERE id = $2)",
        )
        .bind(seconds(now))
        .bind(id)
        .execute(&mut **w)
        .await?;
        w.forget_mails(now).await?;
        w.commit().await
    }

    /// A try failed.
    pub async fn mail_failed(&self, id: &str, failed: Failed<'_>) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "UPDATE mail SET last_error = $1, next_s = $2, taken = $3, refused = $4, claimed_s = 0, \
             own_fault = CASE WHEN $5 = 1 THEN 1 ELSE own_fault END WHERE id = $6 AND sent_s IS NULL",
        )
        .bind(failed.error)
        .bind(seconds(failed.next))
        .bind(to_json(failed.taken, "mail's recipients")?)
        .bind(i64::from(failed.refused))
        .bind(i64::from(failed.own_fault))
        .bind(id)
        .execute(&mut **w)
        .await?;
        if failed.holds {
            sqlx::query("UPDATE mail SET next_s = $1 WHERE sent_s IS NULL AND (next_s < $1 OR next_s > $2)")
                .bind(seconds(failed.next))
                .bind(far(failed.next))
                .execute(&mut **w)
                .await?;
        }
        w.commit().await
    }

    /// What keeps the oldest mail that was tried, that nobody has and that is not to blame itself.
    pub async fn mails_held(&self) -> Result<Option<String>, LedgerError> {
        let row = sqlx::query(
            "SELECT last_error FROM mail WHERE sent_s IS NULL AND own_fault = 0 AND taken = '{}' \
             AND last_error IS NOT NULL ORDER BY n LIMIT 1",
        )
        .fetch_optional(self.pool())
        .await?;
        row.map(|row| row.text(0)).transpose()
    }

    /// Nobody is to be told (no `[mail]` in the settings that this program began with): what has waited for an hour is put
    /// aside. Sooner it may be of a program that began with newer settings; a restart finds it.
    pub async fn discard_mails(&self, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "UPDATE mail SET sent_s = $1, last_error = 'not sent: no [mail] in the settings' \
             WHERE sent_s IS NULL AND (created_s <= $2 OR created_s > $3)",
        )
        .bind(seconds(now))
        .bind(seconds(now) - DISCARD_S)
        .bind(far(now))
        .execute(&mut **w)
        .await?;
        w.forget_mails(now).await?;
        w.commit().await
    }

    /// Mails that have waited since before `written`, and that the second way is to be told of now; oldest first, none
    /// before an older one. `attempts` and `refused` are the second way's.
    pub async fn untold_mails(&self, written: Timestamp, now: Timestamp) -> Result<Vec<Claimed>, LedgerError> {
        let sql = format!(
            "SELECT id, subject, body, created_s, told_tries, last_error, n, told_refused, told_fault FROM mail \
             WHERE {UNTOLD} AND created_s <= $1 AND NOT ({RESTS}) AND NOT EXISTS \
             (SELECT 1 FROM mail AS older WHERE {UNTOLD} AND {RESTS} AND told_fault = 0 AND older.n < mail.n) ORDER BY n"
        );
        let query = sqlx::query(AssertSqlSafe(sql)).bind(seconds(written)).bind(seconds(now)).bind(far(now));
        let claimed = |row: &AnyRow| {
            let (refused, own_fault) = (count(row, 7)?, row.number(8)? != 0);
            Ok(Claimed { n: row.number(6)?, mail: mail(row)?, taken: Taken::new(), refused, own_fault })
        };
        query.fetch_all(self.pool()).await?.iter().map(claimed).collect()
    }

    /// Whether the second way is to be told of it by whoever asks: for `time` it is nobody else's.
    pub async fn claim_untold(&self, id: &str, now: Timestamp, time: Duration) -> Result<bool, LedgerError> {
        let mut w = self.write().await?;
        let sql = format!("UPDATE mail SET told_next_s = $4 WHERE id = $1 AND {UNTOLD} AND NOT ({RESTS})");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(id).bind(seconds(now)).bind(far(now));
        let query = query.bind(seconds(after(now, time)));
        let claimed = query.execute(&mut **w).await?.rows_affected() == 1;
        w.commit().await?;
        Ok(claimed)
    }

    /// The second way took what a mail says. Older ones that it refused again and again are to blame themselves.
    pub async fn mail_told(&self, id: &str, now: Timestamp) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        let query = sqlx::query("UPDATE mail SET told_s = $1 WHERE id = $2").bind(seconds(now)).bind(id);
        query.execute(&mut **w).await?;
        sqlx::query(
            "UPDATE mail SET told_fault = 1 WHERE sent_s IS NULL AND told_s IS NULL AND told_refused > 1 \
             AND n < (SELECT n FROM mail WHERE id = $1)",
        )
        .bind(id)
        .execute(&mut **w)
        .await?;
        w.commit().await
    }

    /// The second way did not take it: see [`Failed`].
    pub async fn mail_untold(
        &self,
        id: &str,
        own_fault: bool,
        refused: u32,
        next: Timestamp,
    ) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query(
            "UPDATE mail SET told_tries = told_tries + 1, told_refused = $1, told_next_s = $2, \
             told_fault = CASE WHEN $3 = 1 THEN 1 ELSE told_fault END WHERE id = $4",
        )
        .bind(i64::from(refused))
        .bind(seconds(next))
        .bind(i64::from(own_fault))
        .bind(id)
        .execute(&mut **w)
        .await?;
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

/// Mails sent or put aside and episodes closed are kept for 90 days.
const KEEP_S: i64 = 90 * 86_400;

/// Mails that nobody is to be told of are kept for an hour.
const DISCARD_S: i64 = 3600;

/// Mails that neither way has taken.
const UNTOLD: &str = "sent_s IS NULL AND told_s IS NULL";

/// Those that the second way is not to be told of before a time: $2 is now, $3 what is [`far`].
const RESTS: &str = "told_next_s > $2 AND told_next_s <= $3";

/// A time beyond this is of a clock that ran ahead: it is not waited for.
fn far(now: Timestamp) -> i64 {
    seconds(now) + 86_400
}

impl Write {
    async fn tell(mut self, anything: bool, mail: &Mail, now: Timestamp) -> Result<bool, LedgerError> {
        if anything {
            self.add_mail(mail, now).await?;
            failpoint::around("mail.queue", self.commit()).await?;
        }
        Ok(anything)
    }

    /// What was sent or put aside long ago is of no more use.
    async fn forget_mails(&mut self, now: Timestamp) -> Result<(), LedgerError> {
        sqlx::query("DELETE FROM mail WHERE sent_s < $1").bind(seconds(now) - KEEP_S).execute(&mut ***self).await?;
        Ok(())
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

//! One publisher at a time: a lease with a fencing number.

use super::db::{Columns, Write, seconds};
use super::{Ledger, LedgerError};
use proto::clock::{Timestamp, after};
use std::time::Duration;

/// The fencing number of a lease; rises with every acquisition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(i64);

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

const NAME: &str = "publish";

/// No publisher is given a longer lease, whatever its settings.
const LONGEST: Duration = Duration::from_secs(3600);

impl Ledger {
    /// Takes the publisher's lease if it is free or ran out. `holder` is for people: host and pid.
    /// A lease that ends more than an hour from now is of a clock that ran ahead: it counts as run out.
    pub async fn acquire(&self, holder: &str, now: Timestamp, ttl: Duration) -> Result<Acquired, LedgerError> {
        let mut w = self.write().await?;
        let row = sqlx::query("SELECT holder, token, until_s FROM lease WHERE name = $1")
            .bind(NAME)
            .fetch_optional(&mut **w)
            .await?;
        let mut token = 1;
        if let Some(row) = row {
            let until = row.time(2)?;
            if now < until && until <= after(now, LONGEST.max(ttl * 2)) {
                return Ok(Acquired::HeldBy { holder: row.text(0)?, until });
            }
            token = row.number(1)? + 1;
        }
        sqlx::query(
            "INSERT INTO lease (name, holder, token, until_s, since_s) VALUES ($1, $2, $3, $4, $5) ON CONFLICT (name) \
             DO UPDATE SET holder = excluded.holder, token = excluded.token, until_s = excluded.until_s, \
             since_s = excluded.since_s",
        )
        .bind(NAME)
        .bind(holder)
        .bind(token)
        .bind(seconds(after(now, ttl)))
        .bind(seconds(now))
        .execute(&mut **w)
        .await?;
        w.commit().await?;
        Ok(Acquired::Lease(Token(token)))
    }

    /// Since when the lease is whose it is; none where nobody took it yet.
    pub async fn held_since(&self) -> Result<Option<Timestamp>, LedgerError> {
        let sql = "SELECT since_s FROM lease WHERE name = $1 AND since_s > 0";
        sqlx::query(sql).bind(NAME).fetch_optional(self.pool()).await?.map(|r| r.time(0)).transpose()
    }

    /// Takes or keeps a turn at what one process does for all; false while it is another's. As with a lease, a turn that
    /// ends more than an hour from now counts as run out.
    pub async fn take_turn(
        &self,
        what: &str,
        holder: &str,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<bool, LedgerError> {
        let mut w = self.write().await?;
        let done = sqlx::query(
            "INSERT INTO lease (name, holder, token, until_s) VALUES ($1, $2, 1, $3) ON CONFLICT (name) \
             DO UPDATE SET holder = excluded.holder, until_s = excluded.until_s \
             WHERE lease.holder = excluded.holder OR lease.until_s <= $4 OR lease.until_s > $5",
        )
        .bind(what)
        .bind(holder)
        .bind(seconds(after(now, ttl)))
        .bind(seconds(now))
        .bind(seconds(after(now, LONGEST)))
        .execute(&mut **w)
        .await?;
        w.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Ends the lease of a holder that is known to be dead (the lock file of its directory is free).
    pub async fn expire(&self, holder: &str) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE lease SET until_s = 0 WHERE name = $1 AND holder = $2")
            .bind(NAME)
            .bind(holder)
            .execute(&mut **w)
            .await?;
        w.commit().await
    }

    /// Prolongs the lease; false when it is no longer ours.
    pub async fn renew(&self, token: Token, now: Timestamp, ttl: Duration) -> Result<bool, LedgerError> {
        let mut w = self.write().await?;
        let done = sqlx::query("UPDATE lease SET until_s = $1 WHERE name = $2 AND token = $3")
            .bind(seconds(after(now, ttl)))
            .bind(NAME)
            .bind(token.0)
            .execute(&mut **w)
            .await?;
        w.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Whether nobody took the lease since. Asked before each batch of puts.
    pub async fn holds(&self, token: Token) -> Result<bool, LedgerError> {
        let row = sqlx::query("SELECT token FROM lease WHERE name = $1").bind(NAME).fetch_optional(self.pool()).await?;
        Ok(row.map(|r| r.number(0)).transpose()? == Some(token.0))
    }

    /// Gives the lease back; one that is no longer ours is left alone.
    pub async fn release(&self, token: Token) -> Result<(), LedgerError> {
        let mut w = self.write().await?;
        sqlx::query("UPDATE lease SET until_s = 0 WHERE name = $1 AND token = $2")
            .bind(NAME)
            .bind(token.0)
            .execute(&mut **w)
            .await?;
        w.commit().await
    }
}

impl Write {
    /// Fails unless the lease is still the token's: whoever took it over must not be written under.
    pub(super) async fn check_lease(&mut self, token: Token) -> Result<(), LedgerError> {
        let row =
            sqlx::query("SELECT token FROM lease WHERE name = $1").bind(NAME).fetch_optional(&mut ***self).await?;
        if row.map(|r| r.number(0)).transpose()? == Some(token.0) { Ok(()) } else { Err(LedgerError::LeaseLost) }
    }
}

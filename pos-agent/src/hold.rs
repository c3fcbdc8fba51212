//! The POS application's hold: while a sale is open, nothing is applied. Bounded, in memory only:
//! a power cut or restart ends it, as it ends the sale.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest that application may be held in one go, however often a hold is renewed.
pub const LONGEST: Duration = Duration::from_secs(15 * 60);

/// Holds application, and tells whether a transaction is running.
#[derive(Debug, Default)]
pub struct Hold {
    state: Mutex<State>,
    /// Taken for each transaction.
    turn: tokio::sync::Mutex<()>,
    /// Rung when a hold ends early.
    ended: tokio::sync::Notify,
}

#[derive(Debug, Default, Clone, Copy)]
struct State {
    begun: Duration,
    until: Duration,
}

impl State {
    fn place(&mut self, now: Duration, seconds: Duration) -> Duration {
        if now >= self.until {
            self.begun = now;
        }
        self.until = now.saturating_add(seconds).min(self.begun.saturating_add(LONGEST));
        self.until
    }
}

impl Hold {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds from now on; a hold that is on is renewed, but never beyond [`LONGEST`] after it
    /// began. Gives the time left.
    pub fn place(&self, now: Duration, length: Duration) -> Duration {
        self.state().place(now, length).saturating_sub(now)
    }

    /// Ends the hold.
    pub fn end(&self) {
        self.state().until = Duration::ZERO;
        self.ended.notify_one();
    }

    /// Until when application is held, if it is.
    pub fn until(&self, now: Duration) -> Option<Duration> {
        let until = self.state().until;
        (now < until).then_some(until)
    }

    /// Ready when a hold was ended early.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// The right to run one transaction: refused with the end of the hold that is on. Whoever
    /// places a hold afterwards and waits for [`Hold::settled`] sees no commit until it ends.
    pub async fn enter(&self, now: impl Fn() -> Duration) -> Result<tokio::sync::MutexGuard<'_, ()>, Duration> {
        let turn = self.turn.lock().await;
        match self.until(now()) {
            Some(until) => Err(until),
            None => Ok(turn),
        }
    }

    /// Ready when no transaction runs.
    pub async fn settled(&self) {
        drop(self.turn.lock().await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_hold_lasts_as_asked_and_15_minutes_at_most_however_often_it_is_renewed() {
        let hold = Hold::default();
        assert_eq!(hold.until(s(100)), None);
        assert_eq!(hold.place(s(100), s(30)), s(30));
        assert_eq!(hold.until(s(129)), Some(s(130)));
        assert_eq!(hold.until(s(130)), None);
        assert_eq!(hold.place(s(200), s(4000)), s(900));
        assert_eq!(hold.place(s(1000), s(900)), s(100), "begun at 200");
        assert_eq!(hold.place(s(1100), s(900)), s(900), "a new one after the end");
        hold.end();
        assert_eq!(hold.until(s(1101)), None);
        assert_eq!(hold.place(s(1102), s(5)), s(5));
    }

    #[test]
    fn a_shorter_renewal_shortens() {
        let hold = Hold::default();
        hold.place(s(0), s(600));
        assert_eq!(hold.place(s(10), s(5)), s(5));
        assert_eq!(hold.until(s(15)), None);
    }

    #[tokio::test]
    async fn no_transaction_begins_under_a_hold_and_a_running_one_is_waited_for() {
        let hold = Hold::default();
        let turn = hold.enter(|| s(1)).await.unwrap();
        hold.place(s(1), s(60));
        assert!(tokio::time::timeout(Duration::from_millis(20), hold.settled()).await.is_err(), "one is running");
        drop(turn);
        hold.settled().await;
        assert_eq!(hold.enter(|| s(2)).await.unwrap_err(), s(61));
        hold.end();
        tokio::time::timeout(s(1), hold.ended()).await.unwrap();
        assert!(hold.enter(|| s(2)).await.is_ok());
    }
}

//! Whether headquarters could hear at all.
//!
//! Owns how long posts came in vain. Must never take for the fleet's silence what was its own deafness.

use super::{Intake, State};
use std::time::Duration;

/// Headquarters that could hear nobody for so long does not take that for their silence: relays wait for up to a minute
/// before they post again.
const DEAF: Duration = Duration::from_secs(60);

/// A post that was taken for so long when its sender hung up was in vain: strangers who hang up at once make nobody deaf.
const HANGS: Duration = Duration::from_secs(10);

/// What becomes of posts.
#[derive(Default, Clone, Copy)]
pub(super) enum Hearing {
    /// Nobody posted since the start, or since the last ones that did in vain.
    #[default]
    Unknown,
    /// The last one was kept.
    Kept,
    /// Monotonic times of the first and the last one that could not be kept, since one was.
    InVain(Duration, Duration),
}

/// A post that is being taken. Relays hang up after half a minute: one that a ledger keeps waiting for as long as that ends by
/// being dropped, not by an error.
pub(super) struct Unanswered<'a> {
    pub(super) intake: &'a Intake,
    pub(super) at: Duration,
    pub(super) is_over: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.is_over && self.intake.clock.monotonic().saturating_sub(self.at) >= HANGS {
            self.intake.note_deaf(self.at);
        }
    }
}

impl State {
    /// Watches anew from here on, where nobody could be heard for long before.
    fn watch_anew(&mut self, from: Duration, deaf_for: Duration) {
        if deaf_for >= DEAF {
            self.started = self.started.max(from);
        }
    }
}

impl Intake {
    /// Beats came at this time, and the ledger could not be used.
    pub(super) fn note_deaf(&self, at: Duration) {
        let (now, mut state) = (self.clock.monotonic(), self.state());
        let first = if let Hearing::InVain(first, _) = state.hearing { first } else { at };
        state.hearing = Hearing::InVain(first, now);
    }

    /// Beats were kept.
    pub(super) fn note_hearing(&self) {
        let (now, mut state) = (self.clock.monotonic(), self.state());
        if let Hearing::InVain(first, _) = std::mem::replace(&mut state.hearing, Hearing::Kept) {
            state.watch_anew(now, now.saturating_sub(first));
        }
    }

    /// A look at the fleet begins, which can use the ledger, after nobody could look for `blind`: without its ledger, or
    /// while it stood still, headquarters heard nobody, and that is no silence of theirs. For how long posts have come in vain;
    /// none: nobody posted since the start, or since the last ones that did, or one alone did.
    pub fn watch_on(&self, blind: Duration) -> Option<Duration> {
        let (now, mut state) = (self.clock.monotonic(), self.state());
        state.watch_anew(now, blind);
        let (first, last) = match state.hearing {
            Hearing::Unknown => return None,
            Hearing::Kept => return Some(Duration::ZERO),
            Hearing::InVain(first, last) => (first, last),
        };
        state.watch_anew(last, now.saturating_sub(first));
        // Where nobody posts any more, that is their silence again.
        if now.saturating_sub(last) >= self.store_silent.max(2 * DEAF) {
            state.hearing = Hearing::Unknown;
            return None;
        }
        Some(last.saturating_sub(first)).filter(|deaf_for| !deaf_for.is_zero())
    }
}

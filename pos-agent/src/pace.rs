//! When to look again, and where to read from. Pure: time and chance come as arguments, so that
//! tests drive tables, not clocks.

use proto::retry::Backoff;
use proto::wire::Network;
use std::time::Duration;

/// The settings that pace depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The longest time between looks.
    pub poll: Duration,
    /// A relay silent for so long counts as dead.
    pub relay_silent: Duration,
    /// The most that chance adds to it.
    pub fallback_jitter: Duration,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Whether there is another source than the relay.
    pub has_fallback: bool,
}

/// HQ counts as seen for so long.
const HQ_SEEN: Duration = Duration::from_secs(120);
/// The longest wait of a long poll.
const LONGEST_POLL: Duration = Duration::from_secs(30);
/// After a failure at the relay: it is on the LAN and should be back soon.
const AFTER_FAILURE: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
/// A full disk is looked at again this often.
const DISK_LOOK: Duration = Duration::from_secs(10);
/// After a check of all rows that failed: what kept it from them may be over.
const CHECK_AGAIN: Backoff = Backoff::new(Duration::from_secs(120), Duration::from_secs(600));
/// A halted agent only reports.
const HALTED: Duration = Duration::from_secs(3600);

/// What was seen of the tiers above, on the monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// When this process began to listen.
    pub started: Duration,
    /// When the relay last answered.
    pub relay: Option<Duration>,
    /// When a fallback last answered.
    pub fallback: Option<Duration>,
    /// HQ, by the relay's word.
    pub hq: Option<HqSeen>,
}

/// What the relay said of HQ, and when: HQ may have been seen before this process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HqSeen {
    /// When the relay said it.
    pub told: Duration,
    /// How long ago it was then.
    pub ago: Duration,
}

impl HqSeen {
    /// How long ago it is now.
    pub fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.told).saturating_add(self.ago)
    }
}

/// Where to read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// The relay: it answers, or has not been silent for long.
    Relay,
    /// CDN and buckets.
    Fallback,
}

impl Rules {
    /// When the relay counts as dead if it stays silent; `share` (0 to 1) is this register's luck.
    fn deadline(&self, seen: &Seen, share: f64) -> Duration {
        let jitter = self.fallback_jitter.mul_f64(share.clamp(0.0, 1.0));
        seen.relay.unwrap_or(seen.started).saturating_add(self.relay_silent).saturating_add(jitter)
    }

    /// Where to read from now.
    pub fn read_from(&self, now: Duration, seen: &Seen, share: f64) -> From {
        if self.has_fallback && now >= self.deadline(seen, share) { From::Fallback } else { From::Relay }
    }

    /// How long a long poll may last: several must fit into the silence that means death.
    pub fn poll_wait(&self) -> Duration {
        (self.relay_silent / 3).clamp(Duration::from_secs(1), LONGEST_POLL)
    }

    /// The network as it looks now.
    pub fn network(&self, now: Duration, seen: &Seen) -> Network {
        let within = |at: Option<Duration>, limit: Duration| at.is_some_and(|t| now.saturating_sub(t) <= limit);
        // HQ is heard of once a heartbeat: a rare one must not read as a lost HQ.
        let hq = seen.hq.is_some_and(|h| h.age(now) <= HQ_SEEN.max(self.heartbeat * 2));
        match within(seen.relay, self.relay_silent) {
            true if hq => Network::Online,
            true => Network::InStore,
            false if within(seen.fallback, self.relay_silent.max(self.poll * 3)) => Network::OnlineRelayDown,
            false => Network::Offline,
        }
    }

    /// How long to wait after a cycle, unless news come first.
    pub fn wait(&self, now: Duration, seen: &Seen, end: &End, attempt: u32, share: f64, random: f64) -> Duration {
        let wait = match end {
            End::Done => self.poll.mul_f64(0.8 + 0.4 * random.clamp(0.0, 1.0)),
            End::Again => Duration::ZERO,
            End::Retry => AFTER_FAILURE.delay(attempt, random).max(Duration::from_millis(50)),
            End::DiskFull => DISK_LOOK,
            End::Held { until } => until.saturating_sub(now).min(self.poll),
            End::Halted => return HALTED,
        };
        let deadline = self.deadline(seen, share);
        // Be awake when the relay's silence becomes too long.
        if self.has_fallback && deadline > now { wait.min(deadline - now) } else { wait }
    }
}

/// How long to wait after a check of all rows: `every`, or minutes after so many that failed in a row.
pub fn next_check(every: Duration, failures: u32, random: f64) -> Duration {
    match failures.checked_sub(1) {
        None => every,
        Some(attempt) => CHECK_AGAIN.delay(attempt, random).max(CHECK_AGAIN.base / 2).min(every),
    }
}

/// How a cycle ended, the most urgent of its streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nothing is left to do until there are news.
    Done,
    /// News came in between.
    Again,
    /// The surroundings failed.
    Retry,
    /// No room.
    DiskFull,
    /// A sale is open.
    Held {
        /// Until when at the latest, on the monotonic clock.
        until: Duration,
    },
    /// The disk or the database cannot be relied on.
    Halted,
}

impl End {
    fn urgency(self) -> u8 {
        match self {
            End::Halted => 5,
            End::Again => 4,
            End::Retry => 3,
            End::DiskFull => 2,
            End::Held { .. } => 1,
            End::Done => 0,
        }
    }
    /// The more urgent of two.
    pub fn or(self, other: End) -> End {
        if other.urgency() > self.urgency() { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }
    fn rules() -> Rules {
        Rules { poll: s(30), relay_silent: s(120), fallback_jitter: s(30), heartbeat: s(60), has_fallback: true }
    }
    fn seen(relay: Option<u64>, fallback: Option<u64>, hq: Option<u64>) -> Seen {
        Seen {
            started: s(1000),
            relay: relay.map(s),
            fallback: fallback.map(s),
            hq: hq.map(|t| HqSeen { told: s(t), ago: Duration::ZERO }),
        }
    }

    #[test]
    fn the_network_s_states() {
        let now = s(2000);
        for (relay, fallback, hq, expected) in [
            (Some(1999), None, Some(1990), Network::Online),
            (Some(1999), None, Some(1880), Network::Online),
            (Some(1999), None, Some(1879), Network::InStore),
            (Some(1999), None, None, Network::InStore),
            (Some(1880), Some(1999), Some(1990), Network::Online),
            (Some(1879), Some(1999), Some(1990), Network::OnlineRelayDown),
            (None, Some(1999), None, Network::OnlineRelayDown),
            (Some(1000), Some(1500), Some(1000), Network::Offline),
            (None, None, None, Network::Offline),
        ] {
            assert_eq!(rules().network(now, &seen(relay, fallback, hq)), expected, "{relay:?} {fallback:?} {hq:?}");
        }
        let before_the_start = HqSeen { told: s(1), ago: s(100) };
        assert_eq!(
            rules().network(s(5), &Seen { relay: Some(s(4)), hq: Some(before_the_start), ..Seen::default() }),
            Network::Online
        );
        let rare = Rules { heartbeat: s(600), ..rules() };
        assert_eq!(rare.network(now, &seen(Some(1999), None, Some(1000))), Network::Online);
    }

    #[test]
    fn a_silent_relay_is_left_after_two_minutes_and_a_share_of_jitter_and_taken_back_at_once() {
        let r = rules();
        let heard = seen(Some(2000), None, None);
        assert_eq!(r.read_from(s(2119), &heard, 0.0), From::Relay);
        assert_eq!(r.read_from(s(2120), &heard, 0.0), From::Fallback);
        assert_eq!(r.read_from(s(2149), &heard, 1.0), From::Relay);
        assert_eq!(r.read_from(s(2150), &heard, 1.0), From::Fallback);
        assert_eq!(r.read_from(s(2150), &seen(Some(2150), None, None), 0.0), From::Relay);
        assert_eq!(r.read_from(s(1119), &seen(None, None, None), 0.0), From::Relay, "counted from the start");
        assert_eq!(r.read_from(s(1120), &seen(None, None, None), 0.0), From::Fallback);
        let alone = Rules { has_fallback: false, ..rules() };
        assert_eq!(alone.read_from(s(9999), &heard, 0.0), From::Relay, "there is nowhere else");
    }

    #[test]
    fn waits_are_bounded_and_end_when_the_silence_does() {
        let r = rules();
        let (now, heard) = (s(2000), seen(Some(2000), None, None));
        let wait = |end: End, attempt, random| r.wait(now, &heard, &end, attempt, 0.0, random);
        assert_eq!(wait(End::Done, 0, 0.0), s(24));
        assert_eq!(wait(End::Done, 0, 1.0), s(36));
        assert_eq!(wait(End::Again, 7, 1.0), Duration::ZERO);
        assert_eq!(wait(End::Retry, 0, 1.0), Duration::from_millis(500));
        assert_eq!(wait(End::Retry, 0, 0.0), Duration::from_millis(50), "never a busy loop");
        assert_eq!(wait(End::Retry, 30, 1.0), s(15));
        assert_eq!(wait(End::Held { until: s(2010) }, 0, 0.5), s(10));
        assert_eq!(wait(End::Held { until: s(2900) }, 0, 0.5), s(30), "still looking, to have it at hand");
        assert_eq!(wait(End::Held { until: s(1000) }, 0, 0.5), Duration::ZERO);
        assert_eq!(wait(End::DiskFull, 9, 0.5), s(10));
        assert_eq!(wait(End::Halted, 0, 0.5), s(3600));
        assert_eq!(r.wait(s(2110), &heard, &End::Done, 0, 0.0, 0.5), s(10), "awake when the relay counts as dead");
        assert_eq!(r.wait(s(2200), &heard, &End::Done, 0, 0.0, 0.5), s(30), "and not in a hurry afterwards");
    }

    #[test]
    fn a_check_of_all_rows_that_failed_comes_again_in_minutes() {
        let day = s(86_400);
        assert_eq!(next_check(day, 0, 1.0), day);
        assert_eq!((next_check(day, 1, 0.0), next_check(day, 1, 1.0)), (s(60), s(120)));
        assert_eq!((next_check(day, 99, 0.0), next_check(day, 99, 1.0)), (s(60), s(600)));
        assert_eq!(next_check(s(5), 3, 1.0), s(5), "never rarer than one that went well");
    }

    #[test]
    fn several_long_polls_fit_into_the_silence() {
        assert_eq!(rules().poll_wait(), s(30));
        assert_eq!(Rules { relay_silent: s(6), ..rules() }.poll_wait(), s(2));
        assert_eq!(Rules { relay_silent: s(1), ..rules() }.poll_wait(), s(1));
    }

    #[test]
    fn the_most_urgent_end_decides() {
        assert_eq!(End::Done.or(End::DiskFull).or(End::Retry), End::Retry);
        assert_eq!(End::Held { until: s(1) }.or(End::Retry), End::Retry);
        assert_eq!(End::Again.or(End::Retry), End::Again);
        assert_eq!(End::Again.or(End::Halted), End::Halted);
    }
}

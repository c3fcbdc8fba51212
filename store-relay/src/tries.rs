//! Which failure counts as a try, and what follows from how many. Pure: times and records come in,
//! records and waits go out; `spool` keeps the records. If the power goes here, nothing was counted:
//! that is the point.

use crate::config::TryRules;
use crate::trial::TrialEnd;
use proto::clock::{Timestamp, after, since};
use proto::digest::Sha256;
use proto::limits::Limits;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Why a try failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// What the pack says cannot be applied.
    Content,
    /// The process that ran it died of its own.
    Crash,
    /// A source gave a whole body of another hash or length.
    Hash,
}

/// Whether the end of a trial is a try. Being stopped by us, a shadow that drifted, a busy or full
/// disk say nothing about the pack.
pub fn trial_cause(end: &TrialEnd) -> Option<Cause> {
    match end {
        TrialEnd::Refused { .. } => Some(Cause::Content),
        TrialEnd::Died { .. } => Some(Cause::Crash),
        TrialEnd::Done
        | TrialEnd::Waits { .. }
        | TrialEnd::Drifted { .. }
        | TrialEnd::Rotten { .. }
        | TrialEnd::Surroundings { .. }
        | TrialEnd::Unsound { .. }
        | TrialEnd::Halted { .. }
        | TrialEnd::Stopped => None,
    }
}

/// What is known of a pack that failed. Belongs to one hash: other bytes under the name start anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempts {
    /// Of which file.
    pub sha256: Sha256,
    /// Failures that counted.
    pub tries: u32,
    /// Why the last one failed.
    pub cause: Cause,
    /// A stable name of the reason.
    pub code: String,
    /// The reason, for people.
    pub reason: String,
    /// The first failure, UTC.
    pub since: Timestamp,
    /// The last failure, UTC.
    pub last: Timestamp,
    /// Whether it was given up and lies in `error/`.
    pub in_error: bool,
    /// Whether a source that may have it right was not heard when the last one failed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unheard: bool,
    /// Which [`judge`] counted the last one; of records of older builds nobody knows.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub judge: String,
    /// Whether headquarters has heard that.
    #[serde(default)]
    pub told: bool,
    /// What sources called the bad body, to notice when it changes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub etags: BTreeMap<String, String>,
}

/// What failed, as it is recorded.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Why.
    pub cause: Cause,
    /// A stable name of the reason.
    pub code: String,
    /// The reason, for people.
    pub reason: String,
    /// Whether a source that may have the pack right was not heard.
    pub unheard: bool,
}

/// Who judges packs here: this build, under these bounds. What one refused another may take.
pub fn judge(limits: &Limits) -> String {
    // Plain fields: writing them as JSON cannot fail.
    let bounds = Sha256::of(&serde_json::to_vec(limits).unwrap_or_default()).to_string();
    format!("{} {}", env!("CARGO_PKG_VERSION"), &bounds[..16])
}

/// The record after one more failure of the file with this hash.
pub fn count(
    before: Option<&Attempts>,
    sha256: Sha256,
    failure: Failure,
    now: Timestamp,
    rules: &TryRules,
    judge: &str,
) -> Attempts {
    let before = before.filter(|b| b.sha256 == sha256);
    let tries = before.map_or(0, |b| b.tries).saturating_add(1);
    Attempts {
        sha256,
        tries,
        cause: failure.cause,
        code: failure.code,
        reason: failure.reason,
        since: before.map_or(now, |b| b.since),
        last: now,
        in_error: tries >= rules.limit,
        unheard: failure.unheard,
        judge: judge.to_owned(),
        told: before.is_some_and(|b| b.told),
        etags: before.map(|b| b.etags.clone()).unwrap_or_default(),
    }
}

/// How long to wait after a failure that did not yet put the pack into `error/`.
pub fn pause(attempts: &Attempts, rules: &TryRules) -> Duration {
    if attempts.tries <= 1 { rules.first_pause.0 } else { rules.later_pause.0 }
}

/// When a pack in `error/` is tried again by the same judge; never, when its content is to blame (but for a format that
/// is not known yet).
pub fn due_again(attempts: &Attempts, rules: &TryRules) -> Option<Timestamp> {
    let wait = match attempts.cause {
        // A format that a later build of this program may know.
        Cause::Content if attempts.code == "UNKNOWN_FORMAT" => rules.refetch.0,
        Cause::Content => return None,
        // Who was away for a moment may have it right.
        Cause::Hash if attempts.unheard => ever_later(attempts, rules).min(rules.refetch.0),
        Cause::Hash => rules.refetch.0,
        Cause::Crash => ever_later(attempts, rules),
    };
    Some(after(attempts.last, wait))
}

fn ever_later(attempts: &Attempts, rules: &TryRules) -> Duration {
    let doublings = attempts.tries.saturating_sub(rules.limit).min(31);
    rules.crash_pause.0.saturating_mul(1 << doublings).min(rules.crash_pause_max.0)
}

/// Whether a pack with this hash may be used now. What another judge gave up is tried again at once: it may have been too
/// much for its bounds, or of later than its build.
pub fn usable(attempts: Option<&Attempts>, sha256: &Sha256, now: Timestamp, rules: &TryRules, judge: &str) -> bool {
    match attempts {
        Some(a) if a.in_error && &a.sha256 == sha256 && a.judge == judge => due_again(a, rules).is_some_and(|due| {
            // A clock that was set back must not postpone for ever.
            due <= now || since(a.last, now) > Duration::from_secs(60)
        }),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(s: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + s).unwrap()
    }
    fn failure(cause: Cause) -> Failure {
        Failure { cause, code: "X".into(), reason: "because".into(), unheard: false }
    }
    const JUDGE: &str = "1.0.0 abc";
    fn count(
        before: Option<&Attempts>,
        sha256: Sha256,
        failure: Failure,
        now: Timestamp,
        rules: &TryRules,
    ) -> Attempts {
        super::count(before, sha256, failure, now, rules, JUDGE)
    }
    fn usable(attempts: Option<&Attempts>, sha256: &Sha256, now: Timestamp, rules: &TryRules) -> bool {
        super::usable(attempts, sha256, now, rules, JUDGE)
    }

    #[test]
    fn only_the_packs_own_doing_is_a_try() {
        let text = String::new;
        let refused = TrialEnd::Refused { pack: None, code: "DIGEST".into(), text: text() };
        assert_eq!(trial_cause(&refused), Some(Cause::Content));
        assert_eq!(trial_cause(&TrialEnd::Died { pack: None, how: "signal 9".into() }), Some(Cause::Crash));
        for end in [
            TrialEnd::Stopped,
            TrialEnd::Waits { text: text() },
            TrialEnd::Drifted { text: text() },
            TrialEnd::Rotten { pack: None, text: text() },
            TrialEnd::Surroundings { code: "DISK_FULL".into(), text: text(), disk_full: true },
            TrialEnd::Unsound { text: text() },
            TrialEnd::Halted { text: text() },
        ] {
            assert_eq!(trial_cause(&end), None, "{end:?}");
        }
    }

    #[test]
    fn the_third_failure_puts_a_pack_into_error() {
        let (rules, sha) = (TryRules::default(), Sha256::of(b"a"));
        let one = count(None, sha, failure(Cause::Content), t(0), &rules);
        assert_eq!((one.tries, one.in_error, pause(&one, &rules)), (1, false, Duration::from_secs(1)));
        let two = count(Some(&one), sha, failure(Cause::Content), t(1), &rules);
        assert_eq!((two.tries, two.in_error, pause(&two, &rules)), (2, false, Duration::from_secs(5)));
        assert!(usable(Some(&two), &sha, t(1), &rules));
        let three = count(Some(&two), sha, failure(Cause::Content), t(6), &rules);
        assert_eq!((three.in_error, three.since), (true, t(0)));
        assert!(!usable(Some(&three), &sha, t(1_000_000), &rules));
        // Other bytes under the same name (a new epoch) start anew.
        assert!(usable(Some(&three), &Sha256::of(b"b"), t(7), &rules));
        assert_eq!(count(Some(&three), Sha256::of(b"b"), failure(Cause::Hash), t(8), &rules).tries, 1);
    }

    #[test]
    fn another_judge_tries_again_what_one_gave_up() {
        let (rules, sha) = (TryRules { limit: 1, ..TryRules::default() }, Sha256::of(b"a"));
        let given_up = count(None, sha, failure(Cause::Content), t(0), &rules);
        assert!(!usable(Some(&given_up), &sha, t(1), &rules));
        assert!(super::usable(Some(&given_up), &sha, t(1), &rules, "1.0.1 abc"));
        // Once: it fails there as well.
        let again = super::count(Some(&given_up), sha, failure(Cause::Content), t(2), &rules, "1.0.1 abc");
        assert_eq!((again.tries, again.in_error, again.since), (2, true, t(0)));
        assert!(!super::usable(Some(&again), &sha, t(3), &rules, "1.0.1 abc"));
        // A record of a build that did not say by whom.
        let mut old = serde_json::to_value(&given_up).unwrap();
        old.as_object_mut().unwrap().remove("judge");
        assert!(usable(Some(&serde_json::from_value(old).unwrap()), &sha, t(1), &rules));
        let wider = Limits { columns: 1000, ..Limits::default() };
        assert!(judge(&wider) != judge(&Limits::default()) && judge(&wider).starts_with(env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn wrong_hashes_come_back_hourly_and_crashes_ever_later() {
        let (rules, sha) = (TryRules::default(), Sha256::of(b"a"));
        let times = |cause, n| {
            let mut a = count(None, sha, failure(cause), t(0), &rules);
            for _ in 1..n {
                a = count(Some(&a), sha, failure(cause), t(0), &rules);
            }
            a
        };
        let hash = times(Cause::Hash, 5);
        assert!(!usable(Some(&hash), &sha, t(3599), &rules));
        assert!(usable(Some(&hash), &sha, t(3600), &rules));
        // Sooner, while a source was not heard, and never later than that.
        for (tries, wait) in [(3, 60), (4, 120), (8, 1920), (9, 3600), (u32::MAX, 3600)] {
            let unheard = Attempts { tries, unheard: true, ..hash.clone() };
            assert_eq!(due_again(&unheard, &rules), Some(t(wait)), "{tries}");
        }
        for (tries, wait) in [(3, 60), (4, 120), (6, 480), (20, 6 * 3600), (u32::MAX, 6 * 3600)] {
            let mut crash = times(Cause::Crash, 3);
            crash.tries = tries;
            assert_eq!(due_again(&crash, &rules), Some(t(wait)), "{tries}");
        }
        // The clock was set back by a day.
        assert!(usable(Some(&hash), &sha, t(-86_400), &rules));
    }
}

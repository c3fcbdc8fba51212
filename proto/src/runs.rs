//! The runs of a device's program, from its start to its end: what the device remembers of its own (a power cut, a
//! crash), and what others see in its heartbeats (a copy of its disk that runs elsewhere). Pure: asks no clock, no disk.

use crate::clock::{Timestamp, since};
use crate::wire::{Fault, Heartbeat, fault};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Power cuts within [`CUTS_WITHIN`] from which they are a fault.
pub const CUTS: usize = 3;
/// A day.
pub const CUTS_WITHIN: Duration = Duration::from_secs(86_400);
/// Crashes within [`CRASHES_WITHIN`] from which they are a fault.
pub const CRASHES: usize = 5;
/// Ten minutes.
pub const CRASHES_WITHIN: Duration = Duration::from_secs(600);
/// How long a loop of crashes is told of after the last one.
pub const CRASHES_TOLD: Duration = Duration::from_secs(3600);

/// How long a second machine is told of after it was last noticed.
pub const DOUBLE_TOLD: Duration = Duration::from_secs(3600);

/// Starts that are remembered.
const STARTS: usize = 32;
/// Runs of a device that are remembered by whoever hears it.
const RUNS: usize = 8;
/// Bytes of a run's name; longer ones are no names of ours.
const RUN_BYTES: usize = 64;

/// How the run before a start ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum After {
    /// Of itself; or there was none.
    Rest,
    /// The program died, the machine did not.
    Crash,
    /// The machine began anew.
    Cut,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Start {
    at: Timestamp,
    boot: String,
    after: After,
}

/// The latest starts of a device's program, kept by the device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Starts {
    latest: Vec<Start>,
    running: bool,
}

impl Starts {
    /// The program starts; `boot` names the time since the machine was switched on ([`crate::clock::boot_id`]).
    pub fn begin(&mut self, now: Timestamp, boot: &str) {
        let after = match self.latest.last() {
            Some(last) if self.running && last.boot != boot => After::Cut,
            Some(_) if self.running => After::Crash,
            _ => After::Rest,
        };
        self.latest.push(Start { at: now, boot: boot.to_owned(), after });
        if self.latest.len() > STARTS {
            self.latest.remove(0);
        }
        self.running = true;
    }

    /// The program ends of itself.
    pub fn end(&mut self) {
        self.running = false;
    }

    /// What the starts tell: power that fails again and again, a program that dies again and again.
    pub fn faults(&self, now: Timestamp) -> Vec<Fault> {
        let after = |why, within| {
            let near = move |s: &&Start| s.after == why && since(now, s.at).max(since(s.at, now)) <= within;
            self.latest.iter().filter(near).map(|s| s.at).collect::<Vec<_>>()
        };
        let told = |code: &str, text: String, since| Fault {
            code: code.to_owned(),
            instance: None,
            object: None,
            text,
            since,
        };
        let mut faults = Vec::new();
        let cuts = after(After::Cut, CUTS_WITHIN);
        if let (Some(third), Some(last)) = (cuts.get(CUTS - 1), cuts.last()) {
            let text = format!(
                "the power was cut {} times within a day, last before {last}: look at the plug and the supply",
                cuts.len()
            );
            faults.push(told(fault::POWER_UNSTABLE, text, *third));
        }
        let crashes = after(After::Crash, CRASHES_TOLD);
        let loops = crashes.windows(CRASHES).rfind(|w| since(w[CRASHES - 1], w[0]) <= CRASHES_WITHIN);
        if let Some(last) = loops.and_then(<[_]>::last) {
            let text = format!(
                "the program died {} times within the hour before {last}, {CRASHES} of them within {} min: see its log",
                crashes.len(),
                CRASHES_WITHIN.as_secs() / 60
            );
            faults.push(told(fault::CRASH_LOOP, text, *last));
        }
        faults
    }
}

/// The runs of one device, as whoever hears its heartbeats knows them.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    /// The run, and what its first heartbeat's clock said; the one heard last is last.
    heard: Vec<(String, Timestamp)>,
}

impl Runs {
    /// Notes a heartbeat that its device has signed, whatever its number. Whether it shows that two machines hold the
    /// device's key: a run that another one has followed speaks on. (A heartbeat that was on its way meanwhile, or that
    /// somebody copied, is older than the first of the run that followed.)
    pub fn hear(&mut self, beat: &Heartbeat) -> bool {
        let Some(run) = beat.run.as_ref().filter(|r| r.len() <= RUN_BYTES) else { return false };
        let current = self.heard.last();
        if current.is_some_and(|(name, _)| name == run) {
            return false;
        }
        let followed = self.heard.iter().position(|(name, _)| name == run);
        let speaks_on = current.is_some_and(|(_, first)| beat.sent_at > *first);
        match followed {
            Some(_) if !speaks_on => return false,
            Some(n) => drop(self.heard.remove(n)),
            None if self.heard.len() >= RUNS => drop(self.heard.remove(0)),
            None => {}
        }
        self.heard.push((run.clone(), beat.sent_at));
        followed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(s: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + s).unwrap()
    }

    fn codes(starts: &Starts, now: i64) -> Vec<String> {
        starts.faults(t(now)).into_iter().map(|f| f.code).collect()
    }

    #[test]
    fn three_power_cuts_in_a_day_are_a_fault_until_the_day_is_over() {
        let mut s = Starts::default();
        s.begin(t(0), "boot 0");
        for n in 1..=3 {
            assert!(codes(&s, n * 100).is_empty());
            s.begin(t(n * 100), &format!("boot {n}"));
        }
        assert_eq!(codes(&s, 301), ["POWER_UNSTABLE"]);
        assert!(s.faults(t(301))[0].text.contains("3 times"), "{:?}", s.faults(t(301)));
        assert_eq!(codes(&s, 86_500), ["POWER_UNSTABLE"], "the first was a day ago");
        assert!(codes(&s, 86_501).is_empty());
        assert!(codes(&s, -90_000).is_empty(), "a clock that went far back tells nothing for ever");
        // Whoever switches off by the rules has a new boot too.
        let mut s = Starts::default();
        for n in 0..9 {
            s.begin(t(n), &format!("boot {n}"));
            s.end();
        }
        assert!(codes(&s, 9).is_empty());
    }

    #[test]
    fn five_crashes_in_ten_minutes_are_a_fault_for_an_hour() {
        let mut s = Starts::default();
        for n in 0..=5 {
            assert!(codes(&s, n * 150).is_empty());
            s.begin(t(n * 150), "boot");
        }
        assert_eq!(codes(&s, 751), ["CRASH_LOOP"], "five crashes, ten minutes from the first to the last");
        assert_eq!(codes(&s, 750 + 3000), ["CRASH_LOOP"]);
        assert!(codes(&s, 750 + 3601).is_empty());
        let mut slow = Starts::default();
        for n in 0..=20 {
            slow.begin(t(n * 151), "boot");
        }
        assert!(codes(&slow, 3100).is_empty(), "one in 151 s is no loop");
        assert!(slow.latest.len() <= STARTS && serde_json::to_string(&slow).unwrap().len() < 4000);
    }

    fn beat(run: &str, sent: i64) -> Heartbeat {
        let run = (!run.is_empty()).then(|| run.to_owned());
        Heartbeat { run, sent_at: t(sent), ..Heartbeat::plain("0421".parse().unwrap(), 1) }
    }

    #[test]
    fn a_run_that_another_followed_and_that_speaks_on_is_a_second_machine() {
        let mut runs = Runs::default();
        for (run, sent, cloned, why) in [
            ("a", 0, false, "the first"),
            ("a", 60, false, "the same"),
            ("b", 100, false, "a restart"),
            ("a", 99, false, "one that was on its way"),
            ("a", 60, false, "a copy of an old one"),
            ("", 200, false, "a program that does not tell"),
            ("b", 160, false, "the run of now"),
            ("a", 161, true, "the one before speaks on"),
            ("a", 221, false, "still this one"),
            ("b", 220, true, "and the other"),
            ("c", 300, false, "a restart of one of them"),
            (&"x".repeat(65), 400, false, "no name"),
            ("c", 401, false, "nobody came between"),
        ] {
            assert_eq!(runs.hear(&beat(run, sent)), cloned, "{why}");
        }
        for n in 0..100 {
            assert!(!runs.hear(&beat(&format!("run {n}"), 1000 + n)), "restarts are no copies");
        }
        assert_eq!(runs.heard.len(), RUNS);
    }
}

//! When registers are meant to be on, and how much of a silence falls into that. Reads no clock.

use crate::source_db::times::SourceZone;
use jiff::civil::Date;
use jiff::{Span, Timestamp, ToSpan};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A time of day on some days of a week, by the clocks of [`SourceZone`]: `Mon-Sat 07:00-22:00`, `Sun 10:00-18:00`, or
/// `07:00-22:00` on each day. One that ends before it begins ends on the day after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hours {
    /// Its days, Monday first.
    days: [bool; 7],
    /// Minutes since midnight.
    from: i64,
    /// The same; over 1,440 on the day after.
    to: i64,
    text: String,
}

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const DAY: i64 = 1440;

impl TryFrom<String> for Hours {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let parsed = (|| {
            let (days, times) = text.split_once(' ').unwrap_or(("Mon-Sun", &text));
            let (first, last) = days.split_once('-').unwrap_or((days, days));
            let day = |name: &str| DAYS.iter().position(|d| *d == name);
            let (first, last) = (day(first)?, day(last)?);
            let (from, to) = times.split_once('-')?;
            let (from, to) = (minute(from)?, minute(to)?);
            // `Sat-Mon` goes round the week's end.
            let is_in = |d: usize| (d + 7 - first) % 7 <= (last + 7 - first) % 7;
            let days = std::array::from_fn(is_in);
            (from != to && from < DAY).then(|| (days, from, if to > from { to } else { to + DAY }))
        })();
        let (days, from, to) = parsed
            .ok_or_else(|| format!("`{text}` is no hours; write them like `Mon-Sat 07:00-22:00` or `07:00-22:00`"))?;
        Ok(Hours { days, from, to, text })
    }
}

fn minute(text: &str) -> Option<i64> {
    let (hours, minutes) = text.split_once(':')?;
    let number =
        |t: &str| (t.len() == 2 && t.bytes().all(|b| b.is_ascii_digit())).then(|| t.parse::<i64>().ok()).flatten();
    let at = number(hours)? * 60 + number(minutes).filter(|m| *m < 60)?;
    (at <= DAY).then_some(at)
}

impl From<Hours> for String {
    fn from(hours: Hours) -> String {
        hours.text
    }
}

/// Whoever is silent for longer is silent, whatever its hours.
const LONGEST: i64 = 15;

/// The times within the last days when registers are meant to be on; none set: always.
#[derive(Debug)]
pub struct Open {
    /// From and to, the last first; parted.
    spans: Option<Vec<(Timestamp, Timestamp)>>,
    now: Timestamp,
}

impl Open {
    /// What lies behind `now`.
    pub fn before(now: Timestamp, hours: &[Hours], zone: &SourceZone) -> Open {
        if hours.is_empty() {
            return Open { spans: None, now };
        }
        let today = zone.date(now);
        let mut spans = Vec::new();
        for back in 0..=LONGEST + 1 {
            let Ok(date) = today.checked_sub(back.days()) else { break };
            spans.extend(hours.iter().filter_map(|h| h.on(date, zone)).map(|(from, to)| (from, to.min(now))));
        }
        spans.retain(|(from, to)| from < to);
        spans.sort_unstable_by(|a, b| b.cmp(a));
        // Those that overlap count once.
        let mut parted: Vec<(Timestamp, Timestamp)> = Vec::new();
        for (from, to) in spans {
            match parted.last_mut() {
                Some(last) if to >= last.0 => *last = (from.min(last.0), to.max(last.1)),
                _ => parted.push((from, to)),
            }
        }
        Open { spans: Some(parted), now }
    }

    /// How much of a silence that lasts until now counts.
    pub fn part_of(&self, silence: Duration) -> Duration {
        let Some(spans) = &self.spans else { return silence };
        if silence >= Duration::from_secs(LONGEST as u64 * 86_400) {
            return silence;
        }
        let Ok(since) = self.now.checked_sub(silence) else { return silence };
        let counts =
            spans.iter().take_while(|(_, to)| *to > since).map(|(from, to)| to.duration_since(*from.max(&since)));
        counts.filter_map(|d| Duration::try_from(d).ok()).sum()
    }
}

impl Hours {
    /// When they begin and end that begin on a date.
    fn on(&self, date: Date, zone: &SourceZone) -> Option<(Timestamp, Timestamp)> {
        let is_in = self.days[usize::from(date.weekday().to_monday_zero_offset().unsigned_abs())];
        let at = |minutes: i64| zone.instant(date.at(0, 0, 0, 0).checked_add(Span::new().minutes(minutes)).ok()?);
        if is_in { Some((at(self.from)?, at(self.to)?)) } else { None }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hours(text: &str) -> Hours {
        Hours::try_from(text.to_owned()).unwrap()
    }
    fn minutes(n: u64) -> Duration {
        Duration::from_secs(n * 60)
    }
    /// How many minutes of so many before a time count.
    fn counts(at: &str, zone: &str, all: &[&str], silence: u64) -> u64 {
        let all: Vec<Hours> = all.iter().map(|h| hours(h)).collect();
        let open = Open::before(at.parse().unwrap(), &all, &SourceZone::try_from(zone.to_owned()).unwrap());
        open.part_of(minutes(silence)).as_secs() / 60
    }

    #[test]
    fn what_is_no_hours_is_refused() {
        for bad in [
            "",
            "7:00-22:00",
            "07:00",
            "07:00-25:00",
            "07:60-08:00",
            "Mo 07:00-22:00",
            "Mon-Fry 07:00-22:00",
            "08:00-08:00",
            "24:00-08:00",
            "Mon  07:00-22:00",
            "07:00-22:00 Mon",
        ] {
            let e = Hours::try_from(bad.to_owned()).unwrap_err();
            assert!(e.contains("Mon-Sat 07:00-22:00"), "{bad}: {e}");
        }
        for good in ["07:00-22:00", "00:00-24:00", "Sun 22:00-02:00", "Sat-Mon 10:00-18:00"] {
            assert_eq!(String::from(hours(good)), good);
        }
    }

    #[test]
    fn of_a_silence_counts_what_falls_into_them() {
        // 2026-11-30 is a Monday.
        for (at, zone, all, silence, want) in [
            ("2026-11-30T08:00Z", "UTC", &[][..], 700, 700),
            ("2026-11-30T06:59Z", "UTC", &["07:00-22:00"][..], 539, 0),
            ("2026-11-30T07:10Z", "UTC", &["07:00-22:00"], 560, 20),
            ("2026-11-30T07:10Z", "UTC", &["07:00-22:00"], 5, 5),
            ("2026-11-30T07:10Z", "UTC", &["07:00-22:00"], 1440, 900),
            ("2026-11-30T23:00Z", "UTC", &["07:00-22:00"], 90, 30),
            ("2026-11-30T07:10Z", "Europe/Berlin", &["07:00-22:00"], 560, 70),
            ("2026-11-30T07:10Z", "UTC", &["Mon-Sat 07:00-22:00"], 2000, 20),
            ("2026-11-29T12:00Z", "UTC", &["Mon-Sat 07:00-22:00"], 600, 0),
            ("2026-11-30T01:00Z", "UTC", &["Sun 22:00-02:00"], 300, 180),
            ("2026-11-30T01:00Z", "UTC", &["Mon 22:00-02:00"], 300, 0),
            ("2026-11-30T12:00Z", "UTC", &["07:00-11:00", "08:00-10:00", "10:00-12:00"], 600, 300),
            // The hour that is left out in spring is no hour of silence.
            ("2026-03-29T10:00Z", "Europe/Berlin", &["00:00-24:00"], 720, 720),
        ] {
            assert_eq!(counts(at, zone, all, silence), want, "{at} {zone} {all:?} {silence}");
        }
        // A register that is gone is told of, whatever its hours.
        assert_eq!(counts("2026-11-30T06:00Z", "UTC", &["Tue 07:00-07:01"], 20 * 1440), 20 * 1440);
    }
}

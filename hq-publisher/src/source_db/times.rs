//! The time zone of a source, and its times in UTC.
//!
//! Owns the setting's names and rules, and what is done where a clock is put forward or back. Reads no clock.

use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::{Offset, TimeZone, TimeZoneDatabase};
use serde::{Deserialize, Serialize};

/// The zone that a source's clocks show, by its IANA name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SourceZone(TimeZone);

impl Default for SourceZone {
    fn default() -> Self {
        SourceZone(TimeZone::UTC)
    }
}

impl TryFrom<String> for SourceZone {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        // Names by the list built in: this machine may have none, and knows some that a database does not (`localtime`).
        let named = TimeZoneDatabase::bundled().get(&name).ok().filter(|z| !z.is_unknown());
        let named = named.ok_or_else(|| {
            format!("`{name}` is no time zone; write a name of the IANA list, e.g. Asia/Shanghai, or UTC")
        })?;
        // Rules by the machine's, which may be newer.
        let rules = named.iana_name().and_then(|n| jiff::tz::db().get(n).ok());
        Ok(SourceZone(rules.unwrap_or(named)))
    }
}

impl From<SourceZone> for String {
    fn from(zone: SourceZone) -> String {
        zone.name().to_owned()
    }
}

impl SourceZone {
    /// Its IANA name: letters, digits, `/`, `_`, `+`, `-`.
    pub fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }

    /// A time that this zone's clocks show, in UTC. Of an hour that they show twice the second is meant, one that they
    /// leave out is counted on from before it: so PostgreSQL understands them, too. 9999-12-31 stays: it means for ever.
    pub fn utc(&self, shown: DateTime) -> String {
        match Some(shown).filter(|s| s.date() < Date::MAX).and_then(|s| self.instant(s)) {
            Some(t) => t.to_string(),
            // The last hours that a timestamp cannot hold are so far off that no zone matters.
            _ => utc(shown),
        }
    }

    /// When this zone's clocks show a time; of an hour that they show twice the second.
    pub fn instant(&self, shown: DateTime) -> Option<Timestamp> {
        self.0.to_ambiguous_timestamp(shown).later().ok()
    }

    /// The date that its clocks show.
    pub fn date(&self, at: Timestamp) -> Date {
        self.0.to_datetime(at).date()
    }

    /// How far its clocks are before UTC at a time, in whole minutes, as MySQL takes it.
    pub fn offset(&self, at: Timestamp) -> Offset {
        let seconds = self.0.to_offset(at).seconds();
        Offset::from_seconds(seconds - seconds % 60).unwrap_or(Offset::UTC)
    }
}

/// `+08:00`.
pub fn offset_text(offset: Offset) -> String {
    let minutes = offset.seconds() / 60;
    let sign = if minutes < 0 { '-' } else { '+' };
    format!("{sign}{:02}:{:02}", minutes.abs() / 60, minutes.abs() % 60)
}

/// A time that is in UTC. Not by way of [`Timestamp`], which ends a day before 9999-12-31, the usual "for ever".
pub fn utc(at: DateTime) -> String {
    format!("{at}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(name: &str) -> SourceZone {
        SourceZone::try_from(name.to_owned()).unwrap()
    }

    #[test]
    fn times_without_a_zone_are_the_sources() {
        for (name, shown, want) in [
            ("UTC", "2026-02-28T13:00", "2026-02-28T13:00:00Z"),
            ("Asia/Shanghai", "2026-02-28T13:00:00.25", "2026-02-28T05:00:00.25Z"),
            ("America/New_York", "2026-07-01T22:00", "2026-07-02T02:00:00Z"),
            ("Europe/Berlin", "2026-03-29T02:30", "2026-03-29T01:30:00Z"),
            ("Europe/Berlin", "2026-10-25T02:30", "2026-10-25T01:30:00Z"),
            ("Asia/Shanghai", "9999-12-31T00:00", "9999-12-31T00:00:00Z"),
            ("America/New_York", "9999-12-31T23:59:59", "9999-12-31T23:59:59Z"),
            ("America/New_York", "9999-12-30T20:00", "9999-12-30T20:00:00Z"),
            ("UTC", "9999-12-31T23:59:59.999999", "9999-12-31T23:59:59.999999Z"),
        ] {
            assert_eq!(zone(name).utc(shown.parse().unwrap()), want, "{shown} in {name}");
        }
    }

    #[test]
    fn a_session_has_the_offset_of_its_time() {
        for (name, at, want) in [
            ("UTC", "2026-07-01T00:00Z", "+00:00"),
            ("Asia/Kolkata", "2026-07-01T00:00Z", "+05:30"),
            ("America/St_Johns", "2026-07-01T00:00Z", "-02:30"),
            ("Europe/Berlin", "2026-10-25T00:59Z", "+02:00"),
            ("Europe/Berlin", "2026-10-25T01:00Z", "+01:00"),
        ] {
            assert_eq!(offset_text(zone(name).offset(at.parse().unwrap())), want, "{name} at {at}");
        }
    }

    #[test]
    fn zones_are_known_by_their_iana_names_whatever_this_machine_knows() {
        assert_eq!(zone("asia/shanghai").name(), "Asia/Shanghai");
        assert_eq!(zone("UTC"), SourceZone::default());
        for name in ["", "Asia/Peking", "+08:00", "localtime", "Etc/Unknown", "CST-8", "posix/Asia/Shanghai"] {
            assert!(SourceZone::try_from(name.to_owned()).unwrap_err().contains("IANA"), "{name}");
        }
    }
}

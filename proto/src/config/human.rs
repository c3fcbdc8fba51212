//! Values as people write them: durations, sizes, secrets.

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A duration as people write it: `200ms`, `30s`, `5m`, `1h`, `7d`, `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(pub Duration);

/// A size in bytes as people write it: `100`, `64KiB`, `64MiB`, `4GiB`; `KB`, `MB`, `GB` are
/// powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanBytes(pub u64);

const TIMES: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
const SIZES: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("B", 1),
];

/// A hundred years: longer is a slip, and what adds it to a time could overflow.
const LONGEST_MS: u64 = 36_500 * 86_400_000;

/// The next number and its unit, and what follows them.
fn number_and_unit(s: &str) -> Option<(u64, &str, &str)> {
    let digits = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let number = s[..digits].parse().ok()?;
    let rest = s[digits..].trim_start();
    let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
    Some((number, &rest[..letters], rest[letters..].trim_start()))
}

impl FromStr for HumanDuration {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("`{s}` is no duration; write 200ms, 30s, 5m, 1h, 7d or 1h30m");
        let (mut ms, mut rest) = (0u64, s.trim());
        if rest.is_empty() {
            return Err(bad());
        }
        while !rest.is_empty() {
            let (number, unit, after) = number_and_unit(rest).ok_or_else(bad)?;
            let (_, factor) = TIMES.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
            ms = number.checked_mul(*factor).and_then(|n| ms.checked_add(n)).ok_or_else(bad)?;
            rest = after;
        }
        if ms > LONGEST_MS {
            return Err(format!("`{s}` is longer than 36500d"));
        }
        Ok(HumanDuration(Duration::from_millis(ms)))
    }
}

impl FromStr for HumanBytes {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("`{s}` is no size; write 4096, 64KiB, 64MiB or 4GiB");
        let (number, unit, rest) = number_and_unit(s.trim()).ok_or_else(bad)?;
        let unit = if unit.is_empty() { "B" } else { unit };
        let (_, factor) = SIZES.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(bad)?;
        if !rest.is_empty() {
            return Err(bad());
        }
        number.checked_mul(*factor).map(HumanBytes).ok_or_else(bad)
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if left == 0 {
            return f.write_str("0s");
        }
        for (unit, factor) in TIMES {
            if left >= factor {
                write!(f, "{}{unit}", left / factor)?;
                left %= factor;
            }
        }
        Ok(())
    }
}

impl fmt::Display for HumanBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) =
            SIZES[..4].iter().find(|(_, n)| self.0 >= *n && self.0.is_multiple_of(*n)).unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl Serialize for HumanBytes {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

struct DurationText;
impl Visitor<'_> for DurationText {
    type Value = HumanDuration;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration such as \"30s\"")
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<HumanDuration, E> {
        v.parse().map_err(E::custom)
    }
}
impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_str(DurationText)
    }
}

struct SizeText;
impl Visitor<'_> for SizeText {
    type Value = HumanBytes;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as \"64MiB\"")
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<HumanBytes, E> {
        v.parse().map_err(E::custom)
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<HumanBytes, E> {
        u64::try_from(v).map(HumanBytes).map_err(|_| E::invalid_value(Unexpected::Signed(v), &self))
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<HumanBytes, E> {
        Ok(HumanBytes(v))
    }
}
impl<'de> Deserialize<'de> for HumanBytes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(SizeText)
    }
}

/// For `deserialize_with`: a size as people write it, where a plain number of bytes is kept.
pub fn bytes<'de, D: Deserializer<'de>, N: TryFrom<u64>>(d: D) -> Result<N, D::Error> {
    let size = HumanBytes::deserialize(d)?;
    N::try_from(size.0).map_err(|_| D::Error::custom(format!("{size} is more than this machine counts")))
}

/// A text that is neither logged nor printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }
    /// The text itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str("…")
    }
}
impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(Secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_and_print_the_same() {
        for (text, ms) in [
            ("200ms", 200),
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("7d", 604_800_000),
            ("1h30m", 5_400_000),
        ] {
            let d: HumanDuration = text.parse().unwrap();
            assert_eq!(d.0, Duration::from_millis(ms));
            assert_eq!(d.to_string(), text);
        }
        assert_eq!("0s".parse::<HumanDuration>().unwrap().to_string(), "0s");
        assert_eq!(" 1 h 30 m ".parse::<HumanDuration>().unwrap().to_string(), "1h30m");
        for bad in
            ["", "30", "s", "-1s", "1.5h", "5 minutes", "99999999999999999999d", "999999999999999999d", "36501d", "1s,"]
        {
            assert!(bad.parse::<HumanDuration>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_read_and_print_the_same() {
        for (text, n) in [("100B", 100), ("64KiB", 65_536), ("64MiB", 64 << 20), ("4GiB", 4 << 30), ("0B", 0)] {
            let b: HumanBytes = text.parse().unwrap();
            assert_eq!((b.0, b.to_string().as_str()), (n, text));
        }
        assert_eq!("4096".parse::<HumanBytes>().unwrap().0, 4096);
        assert_eq!("2 mb".parse::<HumanBytes>().unwrap().0, 2_000_000);
        for bad in ["", "MiB", "-1", "1.5GiB", "1X", "1MiB2", "99999999999TiB"] {
            assert!(bad.parse::<HumanBytes>().is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_do_not_show() {
        let s = Secret::new("hunter2");
        assert!(!format!("{s:?}{}", serde_json::to_string(&s).unwrap()).contains("hunter2"));
        assert_eq!(s.reveal(), "hunter2");
    }
}

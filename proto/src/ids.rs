//! Names. Each is a parsed type with a private field, one parser and one printer, so that a name
//! from a config file, a manifest or a URL cannot become a path or a piece of SQL unchecked.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A name that was refused, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{value}` is refused: {reason}")]
pub struct BadName {
    /// What kind of name was expected, e.g. `stream name`.
    pub what: &'static str,
    /// The offending text, cut to 80 characters and without control characters.
    pub value: String,
    /// The rule that it breaks.
    pub reason: &'static str,
}

impl BadName {
    pub(crate) fn new(what: &'static str, value: &str, reason: &'static str) -> Self {
        let value = value.chars().take(80).flat_map(char::escape_debug).collect();
        BadName { what, value, reason }
    }
}

/// Windows device names: a store's folder on a stick must be creatable anywhere.
fn is_device_name(s: &str) -> bool {
    let s = s.to_ascii_uppercase();
    matches!(s.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (s.len() == 4 && (s.starts_with("COM") || s.starts_with("LPT")) && s.as_bytes()[3].is_ascii_digit())
}

fn check_id(what: &'static str, s: &str, max: usize) -> Result<(), BadName> {
    if s.is_empty() || s.len() > max {
        return Err(BadName::new(what, s, "it must have 1 to 32 characters (16 after a register's dash)"));
    }
    if !s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(BadName::new(what, s, "only A-Z a-z 0-9 _ are allowed"));
    }
    if is_device_name(s) {
        return Err(BadName::new(what, s, "it is a Windows device name"));
    }
    Ok(())
}

fn check_name(what: &'static str, s: &str) -> Result<(), BadName> {
    if s.is_empty() || s.len() > 63 {
        return Err(BadName::new(what, s, "it must have 1 to 63 characters"));
    }
    if !s.as_bytes()[0].is_ascii_lowercase() {
        return Err(BadName::new(what, s, "it must begin with a letter a-z"));
    }
    if !s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
        return Err(BadName::new(what, s, "only a-z 0-9 _ are allowed"));
    }
    Ok(())
}

/// Gives a newtype over `String` its parser, printer, serde and ordering.
macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);
        impl $type {
            /// The name as text, safe as one path segment.
            pub fn as_str(&self) -> &str { &self.0 }
        }
        impl FromStr for $type {
            type Err = BadName;
            fn from_str(s: &str) -> Result<Self, BadName> {
                let check: fn(&str) -> Result<(), BadName> = $check;
                check(s)?;
                Ok($type(s.to_owned()))
            }
        }
        impl TryFrom<String> for $type {
            type Error = BadName;
            fn try_from(s: String) -> Result<Self, BadName> { s.parse() }
        }
        impl From<$type> for String {
            fn from(v: $type) -> String { v.0 }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.pad(&self.0) }
        }
        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str { &self.0 }
        }
        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str { &self.0 }
        }
    };
}

name_type!(
    /// A store's id: 1-32 of `A-Z a-z 0-9 _`, no Windows device name.
    StoreId, "store id", |s| check_id("store id", s, 32)
);
name_type!(
    /// A stream's name: 1-63 of `a-z 0-9 _`, a letter first. `tillcast` is ours.
    StreamName, "stream name", |s| {
        check_name("stream name", s)?;
        if s == "tillcast" {
            return Err(BadName::new("stream name", s, "it is reserved"));
        }
        Ok(())
    }
);
name_type!(
    /// A table's name: 1-63 of `a-z 0-9 _`, a letter first; names beginning with `tillcast_` or
    /// `sqlite_` are kept for the replica's own tables.
    TableName, "table name", |s| {
        check_name("table name", s)?;
        if s.starts_with("tillcast_") || s.starts_with("sqlite_") {
            return Err(BadName::new("table name", s, "the prefixes tillcast_ and sqlite_ are reserved"));
        }
        Ok(())
    }
);
name_type!(
    /// A column's name: 1-63 of `a-z 0-9 _`, a letter first.
    ColumnName, "column name", |s| check_name("column name", s)
);
name_type!(
    /// A price zone's name: 1-63 of `a-z 0-9 _`, a letter first.
    Zone, "zone", |s| check_name("zone", s)
);

/// A register's id: its store's, a dash, 1-16 of `A-Z a-z 0-9 _`, e.g. `0421-03`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegisterId {
    text: String,
    store: StoreId,
}

impl RegisterId {
    /// The store that the register stands in.
    pub fn store(&self) -> &StoreId {
        &self.store
    }
    /// The whole id, safe as one path segment.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for RegisterId {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        let (store, lane) = s.split_once('-').ok_or_else(|| {
            BadName::new("register id", s, "it must be the store's id, a dash and the lane, e.g. 0421-03")
        })?;
        check_id("register id", lane, 16)?;
        Ok(RegisterId { text: s.to_owned(), store: store.parse()? })
    }
}
impl TryFrom<String> for RegisterId {
    type Error = BadName;
    fn try_from(s: String) -> Result<Self, BadName> {
        s.parse()
    }
}
impl From<RegisterId> for String {
    fn from(v: RegisterId) -> String {
        v.text
    }
}
impl fmt::Display for RegisterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

/// Whoever holds a device key: a store's relay or a register.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceId {
    /// The relay of a store, named as the store is.
    Relay(StoreId),
    /// A register.
    Register(RegisterId),
}

impl DeviceId {
    /// The store that the device stands in.
    pub fn store(&self) -> &StoreId {
        match self {
            DeviceId::Relay(s) => s,
            DeviceId::Register(r) => r.store(),
        }
    }
    /// The id as text, safe as one path segment.
    pub fn as_str(&self) -> &str {
        match self {
            DeviceId::Relay(s) => s.as_str(),
            DeviceId::Register(r) => r.as_str(),
        }
    }
}
impl FromStr for DeviceId {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        if s.contains('-') { s.parse().map(DeviceId::Register) } else { s.parse().map(DeviceId::Relay) }
    }
}
impl TryFrom<String> for DeviceId {
    type Error = BadName;
    fn try_from(s: String) -> Result<Self, BadName> {
        s.parse()
    }
}
impl From<DeviceId> for String {
    fn from(v: DeviceId) -> String {
        v.as_str().to_owned()
    }
}
impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// For whom an instance of a stream is made: `all`, `zone-east`, `store-0421`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Audience {
    /// Every store.
    All,
    /// The stores of one zone.
    Zone(Zone),
    /// One store.
    Store(StoreId),
}

impl FromStr for Audience {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        if s == "all" {
            Ok(Audience::All)
        } else if let Some(z) = s.strip_prefix("zone-") {
            z.parse().map(Audience::Zone)
        } else if let Some(id) = s.strip_prefix("store-") {
            id.parse().map(Audience::Store)
        } else {
            Err(BadName::new("audience", s, "it must be `all`, `zone-NAME` or `store-ID`"))
        }
    }
}
impl TryFrom<String> for Audience {
    type Error = BadName;
    fn try_from(s: String) -> Result<Self, BadName> {
        s.parse()
    }
}
impl From<Audience> for String {
    fn from(v: Audience) -> String {
        v.to_string()
    }
}
impl fmt::Display for Audience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Audience::All => f.pad("all"),
            Audience::Zone(z) => f.pad(&format!("zone-{z}")),
            Audience::Store(s) => f.pad(&format!("store-{s}")),
        }
    }
}

/// One instance of a stream, `price@zone-east`: what a version number counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Instance {
    /// The stream.
    pub stream: StreamName,
    /// For whom this instance is made.
    pub audience: Audience,
}

impl FromStr for Instance {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        let (stream, audience) =
            s.split_once('@').ok_or_else(|| BadName::new("stream instance", s, "it must be STREAM@AUDIENCE"))?;
        Ok(Instance { stream: stream.parse()?, audience: audience.parse()? })
    }
}
impl TryFrom<String> for Instance {
    type Error = BadName;
    fn try_from(s: String) -> Result<Self, BadName> {
        s.parse()
    }
}
impl From<Instance> for String {
    fn from(v: Instance) -> String {
        v.to_string()
    }
}
impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}@{}", self.stream, self.audience))
    }
}

/// A version of one stream@audience: 1 to 2^63-1 (SQLite's integers end there). Compared only
/// within an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Version(u64);

impl Version {
    /// The greatest version that can be stored.
    pub const MAX: Version = Version(i64::MAX as u64);
    /// The first version of an instance.
    pub const FIRST: Version = Version(1);

    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
    /// The number as SQLite stores it.
    pub fn as_i64(self) -> i64 {
        self.0 as i64
    }
    /// The next version, or `None` at the end of the range.
    pub fn next(self) -> Option<Version> {
        Version::try_from(self.0 + 1).ok()
    }
}
impl TryFrom<u64> for Version {
    type Error = BadName;
    fn try_from(n: u64) -> Result<Self, BadName> {
        if n == 0 || n > Self::MAX.0 {
            return Err(BadName::new("version", &n.to_string(), "it must be 1 to 9223372036854775807"));
        }
        Ok(Version(n))
    }
}
impl TryFrom<i64> for Version {
    type Error = BadName;
    fn try_from(n: i64) -> Result<Self, BadName> {
        Version::try_from(u64::try_from(n).unwrap_or(0))
    }
}
impl From<Version> for u64 {
    fn from(v: Version) -> u64 {
        v.0
    }
}
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Finds two names that differ only in case (a stick's file system may not tell them apart).
pub fn case_clash<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<(String, String)> {
    let mut seen = std::collections::HashMap::new();
    for name in names {
        if let Some(other) = seen.insert(name.to_ascii_lowercase(), name)
            && other != name
        {
            return Some((other.to_owned(), name.to_owned()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused_where_they_are_read() {
        for s in ["", "..", ".", "a/b", "a\\b", "CON", "com1", "é", "a b", "a\0", "x;drop", "0421-03", &"a".repeat(33)]
        {
            assert!(s.parse::<StoreId>().is_err(), "{s:?}");
        }
        for s in ["", "..", "Price", "1price", "price-east", "p\"", "tillcast", &"a".repeat(64)] {
            assert!(s.parse::<StreamName>().is_err(), "{s:?}");
        }
        for s in ["0421", "0421-", "-03", "0421-nul", "0421-1-2", &format!("0421-{}", "a".repeat(17))] {
            assert!(s.parse::<RegisterId>().is_err(), "{s:?}");
        }
        for s in ["ALL", "zone-", "zone-East", "store-../x", "region-1"] {
            assert!(s.parse::<Audience>().is_err(), "{s:?}");
        }
        for s in ["tillcast_stream", "sqlite_x"] {
            assert!(s.parse::<TableName>().is_err(), "{s:?}");
        }
    }

    #[test]
    fn names_print_as_they_were_read() {
        for s in ["price@zone-east", "catalog@all", "price@store-0421"] {
            assert_eq!(s.parse::<Instance>().unwrap().to_string(), s);
        }
        assert_eq!("0421-03".parse::<RegisterId>().unwrap().store().as_str(), "0421");
    }

    #[test]
    fn versions_end_where_sqlite_integers_end() {
        assert!(Version::try_from(0u64).is_err());
        assert!(Version::try_from(u64::MAX).is_err());
        assert_eq!(Version::MAX.next(), None);
        assert_eq!(Version::FIRST.next().unwrap().get(), 2);
    }

    #[test]
    fn ids_that_differ_only_in_case_are_found() {
        assert_eq!(case_clash(["a1", "b", "A1"]), Some(("a1".into(), "A1".into())));
        assert_eq!(case_clash(["a1", "a2"]), None);
    }
}

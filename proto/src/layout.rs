//! The objects' names: the same in the bucket, under a relay's `ok/` and URL, and on a stick.
//! One enum owns path, media type and cache life, so that no two tiers can disagree on a name.

use crate::ids::{BadName, Instance, StoreId, Version};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Whether a pack holds all rows or the changes since a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PackKind {
    /// All rows at a version.
    Full,
    /// The changes from a base version to a version.
    Delta,
}

impl fmt::Display for PackKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PackKind::Full => "full",
            PackKind::Delta => "delta",
        })
    }
}

/// A pack's name, `price@zone-east/0000000057.delta.pack`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PackName {
    /// The stream@audience.
    pub instance: Instance,
    /// The version that the pack leads to.
    pub version: Version,
    /// Full or delta.
    pub kind: PackKind,
}

impl PackName {
    /// The file's own name, without its folder.
    pub fn file_name(&self) -> String {
        format!("{:010}.{}.pack", self.version, self.kind)
    }
}
impl fmt::Display for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.instance, self.file_name())
    }
}
impl FromStr for PackName {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        let bad = |reason| BadName::new("pack name", s, reason);
        let (folder, file) = s.split_once('/').ok_or_else(|| bad("it must be STREAM@AUDIENCE/VERSION.KIND.pack"))?;
        let (number, kind) = file
            .strip_suffix(".pack")
            .and_then(|f| f.split_once('.'))
            .ok_or_else(|| bad("it must end in VERSION.full.pack or VERSION.delta.pack"))?;
        let kind = match kind {
            "full" => PackKind::Full,
            "delta" => PackKind::Delta,
            _ => return Err(bad("the kind must be full or delta")),
        };
        let version = number.parse::<u64>().map_err(|_| bad("the version must be a number"))?;
        let name = PackName { instance: folder.parse()?, version: Version::try_from(version)?, kind };
        // One spelling a name: 10 digits, zero padded.
        if name.to_string() == s { Ok(name) } else { Err(bad("the version must have 10 digits, zero padded")) }
    }
}
impl TryFrom<String> for PackName {
    type Error = BadName;
    fn try_from(s: String) -> Result<Self, BadName> {
        s.parse()
    }
}
impl From<PackName> for String {
    fn from(v: PackName) -> String {
        v.to_string()
    }
}

/// Any object of the layout.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// `trust.json`: the newest trust file.
    Trust,
    /// `trust/0000000003.json`: one version of it, for ever.
    TrustVersion(u64),
    /// `stores/0421/manifest.json`.
    Manifest(StoreId),
    /// `packs/price@zone-east/0000000057.delta.pack`.
    Pack(PackName),
}

impl ObjectName {
    /// The media type served with the object.
    pub fn content_type(&self) -> &'static str {
        match self {
            ObjectName::Trust | ObjectName::TrustVersion(_) | ObjectName::Manifest(_) => "application/json",
            ObjectName::Pack(_) => "application/gzip",
        }
    }
    /// The Cache-Control header: pointers live shortly, what never changes for a year.
    pub fn cache_control(&self) -> &'static str {
        match self {
            ObjectName::Trust | ObjectName::Manifest(_) => "public, max-age=10, must-revalidate",
            ObjectName::TrustVersion(_) | ObjectName::Pack(_) => "public, max-age=31536000, immutable",
        }
    }
    /// Whether the object, once put, never changes.
    pub fn is_immutable(&self) -> bool {
        matches!(self, ObjectName::TrustVersion(_) | ObjectName::Pack(_))
    }
}

impl From<PackName> for ObjectName {
    fn from(p: PackName) -> Self {
        ObjectName::Pack(p)
    }
}

impl fmt::Display for ObjectName {
    /// The path below the bucket's root, with `/` between segments and none in front.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectName::Trust => f.write_str("trust.json"),
            ObjectName::TrustVersion(n) => write!(f, "trust/{n:010}.json"),
            ObjectName::Manifest(s) => write!(f, "stores/{s}/manifest.json"),
            ObjectName::Pack(p) => write!(f, "packs/{p}"),
        }
    }
}

impl FromStr for ObjectName {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        let bad = |reason| BadName::new("object name", s, reason);
        if s == "trust.json" {
            return Ok(ObjectName::Trust);
        }
        let (room, rest) = s.split_once('/').ok_or_else(|| bad("it is none of the layout"))?;
        let name = match room {
            "trust" => {
                let n = rest.strip_suffix(".json").and_then(|n| n.parse().ok());
                ObjectName::TrustVersion(n.ok_or_else(|| bad("it must be trust/NUMBER.json"))?)
            }
            "stores" => {
                let id =
                    rest.strip_suffix("/manifest.json").ok_or_else(|| bad("it must be stores/ID/manifest.json"))?;
                ObjectName::Manifest(id.parse()?)
            }
            "packs" => ObjectName::Pack(rest.parse()?),
            _ => return Err(bad("it is none of the layout")),
        };
        if name.to_string() == s { Ok(name) } else { Err(bad("numbers have 10 digits, zero padded")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_designs() {
        for s in [
            "trust.json",
            "trust/0000000003.json",
            "stores/0421/manifest.json",
            "packs/price@zone-east/0000000057.delta.pack",
            "packs/price@zone-east/0000000050.full.pack",
        ] {
            assert_eq!(s.parse::<ObjectName>().unwrap().to_string(), s);
        }
    }

    #[test]
    fn other_spellings_and_tricks_are_refused() {
        for s in [
            "",
            "/trust.json",
            "trust/3.json",
            "trust/../trust.json",
            "stores/../x/manifest.json",
            "stores/04 21/manifest.json",
            "packs/price@zone-east/57.delta.pack",
            "packs/price@zone-east/0000000057.patch.pack",
            "packs/price/0000000057.full.pack",
            "packs/../price@all/0000000001.full.pack",
            "packs/price@all/0000000000.full.pack",
            "packs/price@all/+000000001.full.pack",
            "stores/0421/manifest.json/",
            "packs//price@all/0000000001.full.pack",
        ] {
            assert!(s.parse::<ObjectName>().is_err(), "{s}");
        }
    }
}

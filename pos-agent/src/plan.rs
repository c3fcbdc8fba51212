//! What to do next for one stream. Pure: decides from what is held, what is signed and what is
//! served; touches nothing.

use proto::chain;
use proto::ids::{Audience, Version};
use proto::layout::PackKind;
use proto::manifest::{PackEntry, StreamEntry};

/// What the register holds of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    /// The instance's audience.
    pub audience: Audience,
    /// Its version.
    pub version: Version,
    /// The trust epoch that the version is counted in.
    pub epoch: u64,
}

/// How far the source in use can bring a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// A relay: up to the version that it lists.
    Upto(Version),
    /// A relay that does not list the instance (yet).
    Nothing,
    /// A static source or a bucket: whatever the manifest lists, if it is there.
    All,
}

/// What is known of a stream.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// What is held, by the database itself.
    pub held: Option<&'a At>,
    /// What the manifest lists.
    pub entry: &'a StreamEntry,
    /// The manifest's epoch.
    pub epoch: u64,
    /// What the source can give.
    pub served: Served,
    /// The rows held are not those of the version.
    pub drifted: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next<'p> {
    /// The stream is where it should be, or ahead of its relay.
    Nothing,
    /// There is no way now; the reason, for people.
    Wait(String),
    /// Apply these, in this order, in one transaction.
    Apply(Vec<&'p PackEntry>),
}

/// The next transaction of a stream: one delta, or a full with the deltas that lead to at least
/// the version that readers saw before (after a change of audience or epoch: all of them). The way
/// is the cheapest by bytes of the packs that `usable` admits, as far as one leads.
pub fn next<'p>(s: Standing<'p>, usable: impl Fn(&PackEntry) -> bool) -> Next<'p> {
    let target = match s.served {
        Served::All => s.entry.version,
        Served::Upto(v) => v.min(s.entry.version),
        Served::Nothing => return waits_unless_there(s, "the relay does not serve it yet"),
    };
    // Versions are compared within one instance and epoch only: a change of either needs a full.
    let same = s.held.filter(|h| h.audience == s.entry.audience && h.epoch == s.epoch);
    let (from, least) = match same {
        Some(h) if s.drifted => (None, Some(h.version)),
        Some(h) if h.version >= target => return Next::Nothing,
        Some(h) => (Some(h.version), Some(h.version)),
        None => (None, None),
    };
    // Readers never go back: a heal ends at the version held or beyond.
    let target = least.map_or(target, |l| target.max(l)).min(s.entry.version);
    match chain::furthest(&s.entry.packs, from, target, usable) {
        Some((reached, way)) if least.is_none_or(|l| reached >= l) => {
            // Of another instance or epoch readers saw what only the end of the chain may replace.
            let seen = if same.is_none() && s.held.is_some() { Some(Version::MAX) } else { least };
            Next::Apply(first_transaction(way, seen))
        }
        _ => Next::Wait(match from {
            Some(v) => format!("no usable pack leads from version {v} to {target}"),
            None => format!("no usable full pack leads to version {target}"),
        }),
    }
}

fn waits_unless_there<'p>(s: Standing<'p>, why: &str) -> Next<'p> {
    let there = |h: &At| h.audience == s.entry.audience && h.epoch == s.epoch && h.version >= s.entry.version;
    if !s.drifted && s.held.is_some_and(there) { Next::Nothing } else { Next::Wait(why.to_owned()) }
}

fn first_transaction(mut way: Vec<&PackEntry>, seen: Option<Version>) -> Vec<&PackEntry> {
    let full = way.first().is_some_and(|p| p.kind == PackKind::Full);
    let ends = way.iter().position(|p| !full || seen.is_none_or(|l| p.version >= l));
    way.truncate(ends.map_or(way.len(), |i| i + 1));
    way
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::digest::Sha256;
    use std::collections::BTreeMap;

    fn v(n: u64) -> Version {
        Version::try_from(n).unwrap()
    }
    fn pack(base: Option<u64>, version: u64, bytes: u64) -> PackEntry {
        let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
        PackEntry { version: v(version), kind, base: base.map(v), bytes, unpacked: bytes, sha256: Sha256::of(b"") }
    }
    fn entry(packs: Vec<PackEntry>) -> StreamEntry {
        let version = packs.last().unwrap().version;
        StreamEntry {
            audience: "zone-east".parse().unwrap(),
            version,
            schema: 1,
            digests: BTreeMap::new(),
            packs,
            requires: BTreeMap::new(),
        }
    }
    fn at(audience: &str, version: u64, epoch: u64) -> At {
        At { audience: audience.parse().unwrap(), version: v(version), epoch }
    }
    /// Full 50, deltas to 57, another full at 55.
    fn usual() -> StreamEntry {
        let mut packs = vec![pack(None, 50, 100)];
        for n in 51..=57 {
            if n == 55 {
                packs.push(pack(None, 55, 40));
            }
            packs.push(pack(Some(n - 1), n, 5));
        }
        entry(packs)
    }
    fn names(next: Next) -> String {
        match next {
            Next::Nothing => "nothing".into(),
            Next::Wait(_) => "wait".into(),
            Next::Apply(way) => {
                let name = |p: &&PackEntry| format!("{}{}", &p.kind.to_string()[..1], p.version);
                way.iter().map(name).collect::<Vec<_>>().join(" ")
            }
        }
    }

    #[test]
    fn the_table() {
        let e = usual();
        let east = |n, epoch| Some(at("zone-east", n, epoch));
        for (held, served, drifted, expected, why) in [
            (None, Served::All, false, "f55", "install: a full alone, deltas after it one by one"),
            (east(55, 1), Served::All, false, "d56", "one delta a transaction"),
            (east(57, 1), Served::All, false, "nothing", "there"),
            (east(56, 1), Served::Upto(v(56)), false, "nothing", "the relay has no more"),
            (east(57, 1), Served::Upto(v(55)), false, "nothing", "ahead of its relay"),
            (east(53, 1), Served::Upto(v(90)), false, "d54", "not beyond what is signed"),
            (None, Served::Upto(v(54)), false, "f50", "not beyond what the relay serves"),
            (None, Served::Nothing, false, "wait", "a relay without it"),
            (east(57, 1), Served::Nothing, false, "nothing", "a relay without it, all there"),
            (Some(at("zone-west", 90, 1)), Served::All, false, "f55 d56 d57", "a zone switch is one transaction"),
            (Some(at("zone-west", 90, 1)), Served::Nothing, false, "wait", "a zone switch before the relay's"),
            (east(900, 1), Served::All, false, "nothing", "never back within an epoch"),
            (Some(At { epoch: 0, ..at("zone-east", 900, 0) }), Served::All, false, "f55 d56 d57", "so is a new epoch"),
            (east(57, 1), Served::All, true, "f55 d56 d57", "a heal never goes back for readers"),
            (east(54, 1), Served::All, true, "f55", "a heal by a later full"),
            (east(57, 1), Served::Upto(v(55)), true, "f55 d56 d57", "a heal ahead of the relay"),
            (east(30, 1), Served::All, false, "f55", "a chain that is gone"),
        ] {
            let s = Standing { held: held.as_ref(), entry: &e, epoch: 1, served, drifted };
            assert_eq!(names(next(s, |_| true)), expected, "{why}");
        }
    }

    #[test]
    fn a_bad_or_missing_pack_is_walked_around_as_far_as_a_way_leads() {
        let e = usual();
        let held = at("zone-east", 53, 1);
        let s = Standing { held: Some(&held), entry: &e, epoch: 1, served: Served::All, drifted: false };
        let without = |k: PackKind, n: u64| move |p: &PackEntry| !(p.kind == k && p.version == v(n));
        assert_eq!(names(next(s, without(PackKind::Delta, 54))), "f55");
        assert_eq!(names(next(s, without(PackKind::Delta, 57))), "d54");
        assert_eq!(names(next(s, |p| p.version > v(56))), "wait");
        let healing = Standing { drifted: true, ..s };
        assert_eq!(
            names(next(healing, |p| p.kind == PackKind::Full && p.version == v(50))),
            "wait",
            "50 is older than 53"
        );
    }
}

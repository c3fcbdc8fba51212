//! Gaps between what headquarters lists and what the store has, named for people. Pure.

use crate::tries::Attempts;
use proto::chain;
use proto::ids::{Instance, Version};
use proto::layout::PackName;
use proto::manifest::StreamEntry;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of one stream.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// The stream@audience.
    pub instance: &'a Instance,
    /// What the manifest says of it.
    pub entry: &'a StreamEntry,
    /// The version that the shadow holds, if it counts.
    pub held: Option<Version>,
    /// Whether its rows are to come again by a full.
    pub drifted: bool,
    /// The packs in `ok/`.
    pub served: &'a BTreeSet<PackName>,
    /// The packs that failed.
    pub attempts: &'a BTreeMap<PackName, Attempts>,
    /// Why it does not go on, if that is known.
    pub waits_for: Option<&'a str>,
}

impl Standing<'_> {
    /// Whether a register with nothing could install from `ok/` alone, up to a version.
    pub fn is_complete_to(&self, version: Version) -> bool {
        let there = |p: &proto::manifest::PackEntry| self.served.contains(&p.name(self.instance));
        chain::cheapest(&self.entry.packs, None, version, there).is_some()
    }

    /// The packs in `error/` that are still in the way: at most the head, above what is held; any, where what is held
    /// drifted.
    pub fn in_the_way(&self) -> impl Iterator<Item = (PackName, &Attempts)> {
        let held = self.held.filter(|_| !self.drifted);
        self.entry.packs.iter().filter(move |p| held.is_none_or(|h| p.version > h)).filter_map(|p| {
            let name = p.name(self.instance);
            let attempts = self.attempts.get(&name).filter(|a| a.in_error && a.sha256 == p.sha256)?;
            Some((name, attempts))
        })
    }

    /// The gaps; none when all is as it should be.
    pub fn debts(&self) -> Vec<String> {
        let mut out = Vec::new();
        let (instance, head) = (self.instance, self.entry.version);
        if self.held != Some(head) {
            let at = self.held.map_or("nothing yet".to_owned(), |v| format!("at {v}"));
            let mut reasons: Vec<String> = self
                .in_the_way()
                .map(|(name, a)| format!("{} is in error/ since {} ({})", name.file_name(), a.since, a.code))
                .collect();
            reasons.extend(self.waits_for.map(str::to_owned));
            if reasons.is_empty() {
                reasons.push("on the way".into());
            }
            out.push(format!("{instance}: {at}, headquarters is at {head}: {}", reasons.join("; ")));
        }
        if let Some(held) = self.held
            && !self.is_complete_to(held)
        {
            out.push(format!(
                "{instance}: no complete chain to {held} in ok/: a new register cannot install from here yet"
            ));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tries::Cause;
    use proto::clock::Timestamp;
    use proto::digest::Sha256;
    use proto::layout::PackKind;
    use proto::manifest::PackEntry;

    fn v(n: u64) -> Version {
        Version::try_from(n).unwrap()
    }

    #[test]
    fn a_gap_is_named_until_it_closes() {
        let instance: Instance = "price@zone-east".parse().unwrap();
        let pack = |version, base: Option<u64>| PackEntry {
            version: v(version),
            kind: if base.is_some() { PackKind::Delta } else { PackKind::Full },
            base: base.map(v),
            bytes: 10,
            unpacked: 10,
            sha256: Sha256::of(b""),
        };
        let entry = StreamEntry {
            audience: instance.audience.clone(),
            version: v(3),
            schema: 1,
            digests: BTreeMap::new(),
            packs: vec![pack(1, None), pack(2, Some(1)), pack(3, Some(2))],
            requires: BTreeMap::new(),
        };
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let attempts = BTreeMap::from([(
            entry.packs[1].name(&instance),
            Attempts {
                sha256: Sha256::of(b""),
                tries: 3,
                cause: Cause::Content,
                code: "DIGEST".into(),
                reason: "x".into(),
                since: now,
                last: now,
                in_error: true,
                unheard: false,
                judge: String::new(),
                told: false,
                etags: BTreeMap::new(),
            },
        )]);
        let served: BTreeSet<_> = [entry.packs[0].name(&instance)].into();
        let at = |held| Standing {
            instance: &instance,
            entry: &entry,
            held,
            drifted: false,
            served: &served,
            attempts: &attempts,
            waits_for: None,
        };
        let debts = at(Some(v(1))).debts();
        assert_eq!(debts.len(), 1, "{debts:?}");
        assert!(
            debts[0].contains("at 1, headquarters is at 3") && debts[0].contains("0000000002.delta.pack is in error/")
        );
        assert!(at(None).debts()[0].contains("nothing yet"));
        // The head was reached by another way: the pack is no longer in the way, but the chain is not whole.
        let debts = at(Some(v(3))).debts();
        assert!(debts.len() == 1 && debts[0].contains("no complete chain"), "{debts:?}");
        assert_eq!(at(Some(v(3))).in_the_way().count(), 0);
        assert_eq!(Standing { drifted: true, ..at(Some(v(3))) }.in_the_way().count(), 1, "a full is to heal it");
    }
}

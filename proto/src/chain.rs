//! The cheapest way from what a replica holds to a version, by bytes. Pure.

use crate::ids::Version;
use crate::layout::PackKind;
use crate::manifest::PackEntry;
use std::collections::BTreeMap;

/// The packs to apply, in order, that lead from `from` (none: an empty replica, or one whose
/// version cannot be built on) to `target` for the fewest bytes. Packs for which `usable` says no
/// are left out. Empty when already there; `None` when there is no way.
///
/// `packs` are ordered by version, fulls first, as a manifest lists them.
pub fn cheapest(
    packs: &[PackEntry],
    from: Option<Version>,
    target: Version,
    usable: impl Fn(&PackEntry) -> bool,
) -> Option<Vec<&PackEntry>> {
    if from == Some(target) {
        return Some(Vec::new());
    }
    let reached = reach(packs, from, target, usable);
    reached.contains_key(&target).then(|| way_to(packs, from, target, &reached))
}

/// The highest version up to `target` that some way leads to, with that way: what to do when a
/// pack on the way to the head is missing or bad.
pub fn furthest(
    packs: &[PackEntry],
    from: Option<Version>,
    target: Version,
    usable: impl Fn(&PackEntry) -> bool,
) -> Option<(Version, Vec<&PackEntry>)> {
    let reached = reach(packs, from, target, usable);
    let (&version, _) = reached.last_key_value()?;
    Some((version, way_to(packs, from, version, &reached)))
}

/// Of each version that can be reached, the bytes that it costs and the last pack.
type Reached = BTreeMap<Version, (u64, usize)>;

/// Packs come in order of version and lead upwards only, so that one pass settles each.
fn reach(packs: &[PackEntry], from: Option<Version>, target: Version, usable: impl Fn(&PackEntry) -> bool) -> Reached {
    let mut reached = Reached::new();
    for (i, pack) in packs.iter().enumerate() {
        if pack.version > target || from.is_some_and(|f| pack.version <= f) || !usable(pack) {
            continue;
        }
        let before = match (pack.kind, pack.base) {
            (PackKind::Full, _) => Some(0),
            (PackKind::Delta, base) if base == from && from.is_some() => Some(0),
            (PackKind::Delta, base) => base.filter(|b| *b < pack.version).and_then(|b| reached.get(&b)).map(|r| r.0),
        };
        let Some(bytes) = before.map(|b| b.saturating_add(pack.bytes)) else { continue };
        if reached.get(&pack.version).is_none_or(|best| bytes < best.0) {
            reached.insert(pack.version, (bytes, i));
        }
    }
    reached
}

/// Back from a version that was reached.
fn way_to<'p>(packs: &'p [PackEntry], from: Option<Version>, to: Version, reached: &Reached) -> Vec<&'p PackEntry> {
    let mut way = Vec::new();
    let mut at = Some(to);
    while let Some(&(_, i)) = at.and_then(|v| reached.get(&v)) {
        way.push(&packs[i]);
        at = packs[i].base.filter(|b| Some(*b) != from);
    }
    way.reverse();
    way
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Sha256;
    use proptest::prelude::*;

    fn v(n: u64) -> Version {
        Version::try_from(n).unwrap()
    }
    fn full(version: u64, bytes: u64) -> PackEntry {
        let sha256 = Sha256::of(b"");
        PackEntry { version: v(version), kind: PackKind::Full, base: None, bytes, unpacked: bytes, sha256 }
    }
    fn delta(base: u64, version: u64, bytes: u64) -> PackEntry {
        PackEntry { kind: PackKind::Delta, base: Some(v(base)), ..full(version, bytes) }
    }
    fn names(way: &[&PackEntry]) -> Vec<String> {
        way.iter().map(|p| format!("{}{}", &p.kind.to_string()[..1], p.version)).collect()
    }
    fn way(packs: &[PackEntry], from: u64, target: u64) -> Option<Vec<String>> {
        cheapest(packs, (from > 0).then(|| v(from)), v(target), |_| true).map(|w| names(&w))
    }

    #[test]
    fn the_cheapest_way_is_taken() {
        let packs = [full(1, 100), delta(1, 2, 10), delta(2, 3, 10), full(4, 100), delta(3, 4, 95), delta(4, 6, 1)];
        assert_eq!(way(&packs, 0, 3).unwrap(), ["f1", "d2", "d3"]);
        assert_eq!(way(&packs, 2, 3).unwrap(), ["d3"]);
        assert_eq!(way(&packs, 3, 6).unwrap(), ["d4", "d6"]);
        assert_eq!(way(&packs, 2, 6).unwrap(), ["f4", "d6"]);
        assert_eq!(way(&packs, 6, 6).unwrap(), [""; 0]);
        assert_eq!(way(&packs, 5, 6), None);
    }

    /// Only a manifest by hand has one.
    #[test]
    fn a_delta_upon_nothing_leads_nowhere() {
        let baseless = PackEntry { base: None, ..delta(1, 2, 1) };
        assert_eq!(way(std::slice::from_ref(&baseless), 0, 2), None);
        assert_eq!(way(&[full(1, 10), baseless], 1, 2), None);
    }

    #[test]
    fn a_bad_pack_is_walked_around() {
        let packs = [full(1, 100), delta(1, 2, 10), delta(2, 3, 10), full(3, 100), delta(3, 4, 10)];
        let avoid = |p: &PackEntry| !(p.kind == PackKind::Delta && p.version == v(2));
        assert_eq!(names(&cheapest(&packs, Some(v(1)), v(4), avoid).unwrap()), ["f3", "d4"]);
        let worse = |p: &PackEntry| avoid(p) && p.kind == PackKind::Delta;
        assert!(furthest(&packs, Some(v(1)), v(4), worse).is_none());
        let gap = |p: &PackEntry| p.version != v(4);
        let (to, w) = furthest(&packs, Some(v(1)), v(4), gap).unwrap();
        assert_eq!((to, names(&w)), (v(3), vec!["d2".to_owned(), "d3".to_owned()]));
    }

    proptest! {
        /// Against plain search over all ways.
        #[test]
        fn no_other_way_costs_less(
            steps in proptest::collection::vec((1u64..4, 1u64..50, any::<bool>(), 1u64..200), 1..8),
            start in 0u64..8,
        ) {
            let mut packs = vec![full(1, 60)];
            for (i, (back, bytes, also_full, full_bytes)) in steps.iter().enumerate() {
                let version = i as u64 + 2;
                if *also_full { packs.push(full(version, *full_bytes)); }
                packs.push(delta(version.saturating_sub(*back).max(1), version, *bytes));
            }
            let target = steps.len() as u64 + 1;
            prop_assume!(start <= target);
            fn search(packs: &[PackEntry], at: u64, target: u64) -> Option<u64> {
                if at == target { return Some(0); }
                packs.iter()
                    .filter(|p| p.version.get() > at && p.version.get() <= target)
                    .filter(|p| p.base.is_none_or(|b| b.get() == at))
                    .filter_map(|p| search(packs, p.version.get(), target).map(|c| c + p.bytes))
                    .min()
            }
            let found = cheapest(&packs, (start > 0).then(|| v(start)), v(target), |_| true);
            let cost = found.map(|w| w.iter().map(|p| p.bytes).sum::<u64>());
            prop_assert_eq!(cost, search(&packs, start, target));
        }
    }
}

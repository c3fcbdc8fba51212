//! The cheapest way from what a replica holds to a version, by bytes. Pure.

use crate::ids::Version;
use crate::layout::PackKind;
use crate::manifest::PackEntry;

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
    // For each version reached: the bytes it costs and the last pack. Packs come in order of
    // version and lead upwards only, so that one pass settles each.
    let mut reached: Vec<(Version, u64, usize)> = Vec::new();
    for (i, pack) in packs.iter().enumerate() {
        if pack.version > target || from.is_some_and(|f| pack.version <= f) || !usable(pack) {
            continue;
        }
        let before = match (pack.kind, pack.base) {
            (PackKind::Full, _) => Some(0),
            (PackKind::Delta, base) if base == from && from.is_some() => Some(0),
            (PackKind::Delta, base) => reached.iter().filter(|r| Some(r.0) == base).map(|r| r.1).min(),
        };
        if let Some(before) = before {
            reached.push((pack.version, before.saturating_add(pack.bytes), i));
        }
    }
    let mut at = target;
    let mut way = Vec::new();
    loop {
        let &(_, _, i) = reached.iter().filter(|r| r.0 == at).min_by_key(|r| r.1)?;
        way.push(&packs[i]);
        match packs[i].base {
            None => break,
            Some(base) if Some(base) == from => break,
            Some(base) => at = base,
        }
    }
    way.reverse();
    Some(way)
}

/// The highest version up to `target` that some way leads to, with that way: what to do when a
/// pack on the way to the head is missing or bad.
pub fn furthest(
    packs: &[PackEntry],
    from: Option<Version>,
    target: Version,
    usable: impl Fn(&PackEntry) -> bool,
) -> Option<(Version, Vec<&PackEntry>)> {
    let mut versions: Vec<Version> =
        packs.iter().map(|p| p.version).filter(|v| *v <= target && from.is_none_or(|f| *v > f)).collect();
    versions.dedup();
    versions.into_iter().rev().find_map(|v| cheapest(packs, from, v, &usable).map(|way| (v, way)))
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

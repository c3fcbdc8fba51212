//! Which packs may be deleted. Pure; the spine deletes them, first in the ledger, then in buckets.

use crate::ledger::PublishedPack;
use proto::clock::{Timestamp, after};
use std::time::Duration;

/// How long a version whose packs are gone is known by its digests after the next one came: a device that holds it may be
/// heard again. No older word of a device counts.
pub const REMEMBERED: Duration = Duration::from_secs(400 * 86_400);

/// How long packs are kept that no manifest lists any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// At least so long after they were signed …
    pub age: Duration,
    /// … while all of the instance's packs together have no more bytes than this.
    pub bytes: u64,
    /// The manifests that dropped a pack must be out for so long.
    pub settled: Duration,
}

/// The packs (of one instance, in order of version) that nobody needs. What manifests list (the
/// last two fulls and all deltas since the older) always stays.
pub fn expendable(packs: &[PublishedPack], keep: Keep, now: Timestamp) -> Vec<&PublishedPack> {
    let mut bytes: u64 = 0;
    let mut out = Vec::new();
    for pack in packs.iter().rev() {
        bytes = bytes.saturating_add(pack.entry.bytes);
        let Some(dropped_at) = pack.dropped_at else { continue };
        let settled = after(dropped_at, keep.settled) <= now;
        let old = after(pack.signed_at, keep.age) <= now;
        if settled && (old || bytes > keep.bytes) {
            out.push(pack);
        }
    }
    out.reverse();
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::digest::Sha256;
    use proto::ids::Version;
    use proto::layout::PackKind;
    use proto::manifest::PackEntry;

    const DAY: Duration = Duration::from_secs(86_400);

    fn pack(version: u64, bytes: u64, signed: &str, dropped: Option<&str>) -> PublishedPack {
        let entry = PackEntry {
            version: Version::try_from(version).unwrap(),
            kind: PackKind::Full,
            base: None,
            bytes,
            unpacked: bytes,
            sha256: Sha256::of(b""),
        };
        PublishedPack { entry, signed_at: signed.parse().unwrap(), dropped_at: dropped.map(|d| d.parse().unwrap()) }
    }

    fn gone(packs: &[PublishedPack], bytes: u64, now: &str) -> Vec<u64> {
        let keep = Keep { age: 60 * DAY, bytes, settled: DAY };
        expendable(packs, keep, now.parse().unwrap()).iter().map(|p| p.entry.version.get()).collect()
    }

    #[test]
    fn old_dropped_packs_go_and_listed_ones_stay() {
        let packs = [
            pack(1, 10, "2026-01-01T00:00:00Z", Some("2026-01-05T00:00:00Z")),
            pack(2, 10, "2026-01-02T00:00:00Z", Some("2026-03-09T12:00:00Z")),
            pack(3, 10, "2026-02-20T00:00:00Z", Some("2026-02-21T00:00:00Z")),
            pack(4, 10, "2026-01-01T00:00:00Z", None),
        ];
        assert_eq!(gone(&packs, 1000, "2026-03-10T00:00:00Z"), [1], "2: its manifests are 12 hours old; 3: young");
        assert_eq!(gone(&packs, 1000, "2026-03-11T00:00:00Z"), [1, 2]);
        assert_eq!(gone(&packs, 15, "2026-03-10T00:00:00Z"), [1, 3], "over the cap");
        assert_eq!(gone(&packs, 0, "2026-02-21T12:00:00Z"), [1], "not settled yet");
    }
}

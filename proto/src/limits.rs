//! Every maximum in one place, with its default and its reason. Readers enforce them in the
//! stream, before they trust anything.

use serde::{Deserialize, Serialize};

/// Bounds on what is read from outside. A `[limits]` table in each tier's file sets them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a manifest's envelope. 4 MiB: 16 streams with 128 packs each are 600 KB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub manifest_bytes: u64,
    /// Bytes of a trust file's envelope. 64 KiB: dozens of keys.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub trust_bytes: u64,
    /// Trust files walked in one refresh. 1,024, as TUF clients do.
    pub trust_steps: u64,
    /// Bytes of a heartbeat's envelope. 64 KiB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub heartbeat_bytes: u64,
    /// Bytes of one pack on disk. 4 GiB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub pack_bytes: u64,
    /// Bytes of one pack unpacked. 32 GiB; also never more than its manifest declares.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub unpacked_bytes: u64,
    /// Unpacked bytes for each packed one, of packs above 64 MiB. 200: DEFLATE ends at 1,032, real rows at about 25.
    pub ratio: u64,
    /// Bytes of one line of a pack, and of one field or row of a source. 16 MiB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub line_bytes: u64,
    /// Rows in one pack. 100 million.
    pub rows: u64,
    /// Tables of one stream. 64.
    pub tables: usize,
    /// Columns of one table. 256.
    pub columns: usize,
    /// Bytes of one stream's DDL. 256 KiB.
    #[serde(deserialize_with = "crate::config::bytes")]
    pub ddl_bytes: usize,
}

const MIB: u64 = 1 << 20;

/// Up to here the ratio is not judged: few rows may repeat themselves without being a bomb, and so many bytes, streamed,
/// harm nobody.
const RATIO_FLOOR: u64 = 64 * MIB;

impl Limits {
    /// Whether a pack may unpack that much.
    pub fn unpacks_within(&self, bytes: u64, unpacked: u64) -> bool {
        unpacked <= self.unpacked_bytes && (unpacked <= RATIO_FLOOR || unpacked / self.ratio.max(1) <= bytes)
    }

    /// The same for who made the packs: of what is published already, a bound that was lowered since undoes nothing.
    pub fn for_published(&self) -> Limits {
        let most = u64::MAX;
        let (pack_bytes, unpacked_bytes, ratio, line_bytes, rows) = (most, most, most, most, most);
        Limits { pack_bytes, unpacked_bytes, ratio, line_bytes, rows, ..self.clone() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            manifest_bytes: 4 * MIB,
            trust_bytes: 64 << 10,
            trust_steps: 1024,
            heartbeat_bytes: 64 << 10,
            pack_bytes: 4096 * MIB,
            unpacked_bytes: 32 * 1024 * MIB,
            ratio: 200,
            line_bytes: 16 * MIB,
            rows: 100_000_000,
            tables: 64,
            columns: 256,
            ddl_bytes: 256 << 10,
        }
    }
}

impl Limits {
    /// Refuses bounds that nothing real fits in.
    pub fn check(&self) -> Result<(), String> {
        const KIB: u64 = 1 << 10;
        for (name, value, least) in [
            ("manifest_bytes", self.manifest_bytes, 16 * KIB),
            ("trust_bytes", self.trust_bytes, 4 * KIB),
            ("trust_steps", self.trust_steps, 1),
            ("heartbeat_bytes", self.heartbeat_bytes, 4 * KIB),
            ("pack_bytes", self.pack_bytes, 64 * KIB),
            ("unpacked_bytes", self.unpacked_bytes, 64 * KIB),
            ("ratio", self.ratio, 2),
            ("line_bytes", self.line_bytes, 4 * KIB),
            ("rows", self.rows, 1),
            ("tables", self.tables as u64, 1),
            ("columns", self.columns as u64, 1),
            ("ddl_bytes", self.ddl_bytes as u64, KIB),
        ] {
            if value < least {
                return Err(format!("limits.{name} = {value}: at least {least}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_packs_may_repeat_themselves_and_bombs_may_not() {
        let limits = Limits::default();
        for (bytes, unpacked, fits) in [
            (500, 400_000, true),
            (64 << 10, 64 * MIB, true),
            (64 << 10, 64 * MIB + 1, false),
            (MIB, 200 * MIB, true),
            (MIB, 201 * MIB, false),
            (1024 * MIB, 32 * 1024 * MIB + 1, false),
        ] {
            assert_eq!(limits.unpacks_within(bytes, unpacked), fits, "{bytes} {unpacked}");
        }
    }

    #[test]
    fn bounds_that_nothing_fits_in_are_refused() {
        Limits::default().check().unwrap();
        for (limits, told) in [
            (Limits { pack_bytes: 0, ..Limits::default() }, "limits.pack_bytes = 0: at least 65536"),
            (Limits { manifest_bytes: 1, ..Limits::default() }, "limits.manifest_bytes = 1: at least 16384"),
        ] {
            assert_eq!(limits.check().unwrap_err(), told);
        }
    }
}

//! `verify`: recomputes every digest from the rows. Reads only; who calls it sets the latch.

use crate::register_db::STORE_DB;
use proto::clock::Timestamp;
use proto::device::Device;
use proto::digest::StateDigest;
use proto::ids::{Instance, TableName, Version};
use proto::limits::Limits;
use proto::replica::sqlite::SqliteError;
use proto::replica::{Replica, TableCheck, VerifyError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether any stream drifted, or the file is gone.
    pub drift: bool,
    /// Whether the file is gone, with all that was held.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gone: bool,
    /// Every stream held.
    pub streams: BTreeMap<Instance, StreamFound>,
}

/// One stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamFound {
    /// Its version.
    pub version: Version,
    /// When that was applied: with the version it tells one state of the rows from another.
    #[serde(skip)]
    pub applied_at: Timestamp,
    /// Whether every table has the version's rows.
    pub ok: bool,
    /// Why they were not read: that is no drift.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread: Option<String>,
    /// Its tables.
    pub tables: BTreeMap<TableName, TableFound>,
}

/// One table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableFound {
    /// Rows read.
    pub rows: u64,
    /// The digest that came with the version.
    pub digest: StateDigest,
    /// The digest of the rows; none when the table cannot be read.
    pub found: Option<StateDigest>,
}

impl Report {
    /// The streams that drifted, with the reason for the latch.
    pub fn drifted(&self) -> BTreeMap<Instance, String> {
        let wrong = self.streams.iter().filter(|(_, s)| s.has_drifted());
        wrong.map(|(i, s)| (i.clone(), s.reason())).collect()
    }

    /// Why streams were not read.
    pub fn unread(&self) -> impl Iterator<Item = &str> {
        self.streams.values().filter_map(|s| s.unread.as_deref())
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let line = |(i, s): (&Instance, &StreamFound)| {
            let rows: u64 = s.tables.values().map(|t| t.rows).sum();
            let verdict = match &s.unread {
                Some(why) => format!("NOT CHECKED: {why}"),
                None if s.ok => "ok".to_owned(),
                None => format!("DRIFT: {}", s.reason()),
            };
            format!("{i:<24} version {:<10} {rows:>9} rows  {verdict}", s.version)
        };
        if self.gone {
            format!("{STORE_DB} is gone: the next cycle brings all streams anew")
        } else if self.streams.is_empty() {
            "no streams are held".into()
        } else {
            self.streams.iter().map(line).collect::<Vec<_>>().join("\n")
        }
    }
}

impl StreamFound {
    /// Whether its rows were read, and are others than the version's.
    pub fn has_drifted(&self) -> bool {
        !self.ok && self.unread.is_none()
    }

    /// Which tables differ, for people.
    pub fn reason(&self) -> String {
        let wrong = self.tables.iter().filter(|(_, t)| t.found != Some(t.digest));
        let parts = wrong.map(|(name, t)| match t.found {
            Some(found) => format!(
                "the {} rows of table {name} have digest {found}, version {} has {}",
                t.rows, self.version, t.digest
            ),
            None => format!("table {name} is gone or altered"),
        });
        parts.collect::<Vec<_>>().join("; ")
    }
}

/// What there is to say of a register's file that is not there, though its agent has accepted a list, before which it
/// makes the file. A register that was never brought up has lost nothing.
pub fn gone(database: &Path, device: &Device) -> Option<Report> {
    let is_gone = device.manifest().is_some() && !database.exists();
    is_gone.then(|| Report { drift: true, gone: true, ..Report::default() })
}

/// Reads all rows. Blocks: seconds for millions of rows.
pub fn check(database: &Path, limits: &Limits) -> Result<Report, SqliteError> {
    if !database.exists() {
        return Ok(Report::default());
    }
    let replica = Replica::open_read_only(database, limits)?;
    let mut report = Report::default();
    for stream in replica.all_held()?.into_keys() {
        // Looked at before the rows: whatever is applied meanwhile, the state at the end is another one.
        let Some(held) = replica.held(&stream)? else { continue };
        let (checks, unread) = match replica.verify(&stream) {
            Ok(checks) => (checks, None),
            Err(e @ VerifyError::Contract { .. }) => (Vec::new(), Some(e.to_string())),
            Err(VerifyError::Sqlite(e)) => return Err(e),
        };
        let ok = unread.is_none() && checks.iter().all(|t| t.is_right());
        let table = |t: TableCheck| (t.table, TableFound { rows: t.rows, digest: t.stored, found: t.found });
        let tables = checks.into_iter().map(table).collect();
        let found = StreamFound { version: held.version, applied_at: held.applied_at, ok, unread, tables };
        report.drift |= found.has_drifted();
        report.streams.insert(Instance { stream, audience: held.audience }, found);
    }
    Ok(report)
}

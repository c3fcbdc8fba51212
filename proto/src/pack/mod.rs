//! Packs, format 1: gzip of NDJSON (docs/FORMAT.md). The writer and the reader stream; the reader
//! bounds everything before it trusts anything, and what it gives is proven only once
//! [`PackReader::finish`] has agreed.

mod reader;
mod writer;

pub use reader::{Event, PackError, PackReader};
pub use writer::{PackWriter, Written};

use crate::clock::Timestamp;
use crate::digest::{Sha256, StateDigest};
use crate::ids::{Audience, ColumnName, Instance, StreamName, TableName, Version};
use crate::layout::PackKind;
use crate::schema::Contract;
use crate::value::ColumnType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The pack format that this build reads and writes.
pub const FORMAT: u32 = 1;

/// Line 1 of a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: u32,
    /// The stream.
    pub stream: StreamName,
    /// For whom.
    pub audience: Audience,
    /// The version that the pack leads to.
    pub version: Version,
    /// The version that a delta starts from; null in a full.
    pub base: Option<Version>,
    /// Full or delta.
    pub kind: PackKind,
    /// The contract.
    pub schema: SchemaPart,
    /// When it was made, UTC.
    pub created_at: Timestamp,
    /// What it was made from, for people: no secrets.
    pub source: String,
    /// The tables with columns and types; by our writer in order of name.
    pub tables: Vec<TableHead>,
}

impl Header {
    /// The stream@audience.
    pub fn instance(&self) -> Instance {
        Instance { stream: self.stream.clone(), audience: self.audience.clone() }
    }
}

/// The contract in a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchemaPart {
    /// Rises when the stream's DDL changes.
    pub number: u64,
    /// The whole DDL.
    pub ddl: String,
    /// Hash of `ddl`.
    pub sha256: Sha256,
    /// In a delta: the additive statements since the base's number. Readers make them again from
    /// the two contracts and refuse a delta whose statements mean something else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub migrate: Vec<String>,
}

/// One table in a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableHead {
    /// The table.
    pub table: TableName,
    /// Its columns in the contract's order.
    pub columns: Vec<ColumnHead>,
    /// The key's columns.
    pub key: Vec<ColumnName>,
}

/// One column in a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnHead {
    /// The column.
    pub name: ColumnName,
    /// Its type; a `blob` is base64 in rows.
    #[serde(rename = "type")]
    pub ty: ColumnType,
}

/// The tables of a contract as a header tells them.
pub fn table_heads(contract: &Contract) -> Vec<TableHead> {
    contract
        .tables
        .iter()
        .map(|t| TableHead {
            table: t.name.clone(),
            columns: t.columns.iter().map(|c| ColumnHead { name: c.name.clone(), ty: c.ty }).collect(),
            key: t.key.iter().map(|k| t.columns[*k].name.clone()).collect(),
        })
        .collect()
}

/// What a section does with its rows. Sections stand in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Rows hold the key.
    Delete,
    /// Rows hold the key and the columns that changed.
    Update,
    /// Rows hold all columns.
    Insert,
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Op::Delete => "delete",
            Op::Update => "update",
            Op::Insert => "insert",
        })
    }
}

/// The line that begins a section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// The table.
    pub table: TableName,
    /// What to do.
    pub op: Op,
    /// The columns of the rows that follow; the key's come first, in the key's order, unless all
    /// columns are given (insert).
    pub columns: Vec<ColumnName>,
}

/// Rows of a pack by operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCounts {
    /// Rows deleted.
    pub delete: u64,
    /// Rows updated.
    pub update: u64,
    /// Rows inserted.
    pub insert: u64,
}

impl fmt::Display for RowCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} deleted, {} updated, {} inserted", self.delete, self.update, self.insert)
    }
}

impl RowCounts {
    /// Counts one row more.
    pub fn count(&mut self, op: Op) {
        match op {
            Op::Delete => self.delete += 1,
            Op::Update => self.update += 1,
            Op::Insert => self.insert += 1,
        }
    }
    /// All rows.
    pub fn total(&self) -> u64 {
        self.delete + self.update + self.insert
    }
}

/// The last line: without it a pack is truncated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trailer {
    /// Rows of the pack by operation.
    pub rows: RowCounts,
    /// The state digest of each table of the stream after the pack.
    pub digests: BTreeMap<TableName, StateDigest>,
}

#[cfg(test)]
mod tests;

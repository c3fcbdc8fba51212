//! Writes a pack to anything that takes bytes, hashing and counting as they go.

use super::{Header, Op, RowCounts, Section, Trailer};
use crate::digest::{Sha256, Sha256Stream, StateDigest};
use crate::ids::{ColumnName, TableName};
use crate::value::{self, Value};
use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use std::collections::BTreeMap;
use std::io::{self, Write};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Length of the pack.
    pub bytes: u64,
    /// Length of its unpacked content.
    pub unpacked: u64,
    /// Hash of the pack.
    pub sha256: Sha256,
    /// Rows by operation.
    pub rows: RowCounts,
}

/// A pack being written. Sections must come in order: deletes, updates, inserts.
#[derive(Debug)]
pub struct PackWriter<W: Write> {
    out: GzEncoder<Counting<W>>,
    line: Vec<u8>,
    unpacked: u64,
    rows: RowCounts,
    op: Option<Op>,
}

impl<W: Write> PackWriter<W> {
    /// Begins a pack. `level` is gzip's, 1 to 9.
    pub fn new(out: W, header: &Header, level: u32) -> io::Result<Self> {
        let counting = Counting { out, bytes: 0, hash: Sha256Stream::default() };
        // No name and no time in the gzip header: the same rows make the same bytes.
        let out = GzBuilder::new().write(counting, Compression::new(level.clamp(1, 9)));
        let mut w = PackWriter { out, line: Vec::new(), unpacked: 0, rows: RowCounts::default(), op: None };
        w.json(header)?;
        Ok(w)
    }

    /// Begins a section.
    pub fn section(&mut self, table: &TableName, op: Op, columns: &[ColumnName]) -> io::Result<()> {
        if self.op.is_some_and(|before| before > op) {
            return Err(io::Error::other(format!("a {op} section after a later operation")));
        }
        self.op = Some(op);
        self.json(&Section { table: table.clone(), op, columns: columns.to_vec() })
    }

    /// Writes one row of the section begun last.
    pub fn row(&mut self, row: &[Value<'_>]) -> io::Result<()> {
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        value::write_row(row, &mut line)?;
        let result = self.raw_row(&line);
        self.line = line;
        result
    }

    /// Writes one row that is already a JSON array and its newline.
    pub fn raw_row(&mut self, line: &[u8]) -> io::Result<()> {
        let op = self.op.ok_or_else(|| io::Error::other("a row before any section"))?;
        self.rows.count(op);
        self.write(line)
    }

    /// Writes the trailer and ends the pack; gives back what it wrote to.
    pub fn finish(mut self, digests: &BTreeMap<TableName, StateDigest>) -> io::Result<(W, Written)> {
        self.json(&Trailer { rows: self.rows, digests: digests.clone() })?;
        let mut end = self.out.finish()?;
        end.out.flush()?;
        let written = Written { bytes: end.bytes, unpacked: self.unpacked, sha256: end.hash.finish(), rows: self.rows };
        Ok((end.out, written))
    }

    fn json<T: serde::Serialize>(&mut self, line: &T) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.unpacked += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

#[derive(Debug)]
struct Counting<W> {
    out: W,
    bytes: u64,
    hash: Sha256Stream,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.hash.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

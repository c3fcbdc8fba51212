//! Reads a pack ahead of the database, on a thread of its own: gunzips, hashes the file, reads and checks the rows
//! and hashes them. What is left for the thread that owns the database is SQLite's own work.
//!
//! Rows are handed over in their canonical form, which their hashes are made of, in blocks of bounded size.

use crate::digest::RowHash;
use crate::pack::{Event, PackError, PackReader, Section, Trailer};
use crate::value::{self, ColumnType};
use std::io::Read;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, Scope};

/// Canonical bytes from which a block is handed over.
const BLOCK: usize = 64 << 10;
/// Blocks that may wait for the database.
const AHEAD: usize = 4;

/// What comes next, in the pack's order.
pub(super) enum Block {
    /// A section begins.
    Section(Section),
    /// Rows of it, each of its types.
    Rows(Rows),
    /// The rows' end. The file is only then the listed one when [`Block::Listed`] follows.
    End(Trailer),
    /// Nothing follows the trailer, and the bytes are those of the manifest.
    Listed,
}

/// Rows on lines that follow each other.
#[derive(Default)]
pub(super) struct Rows {
    /// The line of the first.
    line: u64,
    bytes: Vec<u8>,
    /// Where each ends in `bytes`, and its hash.
    ends: Vec<(usize, RowHash)>,
}

impl Rows {
    fn push(&mut self, line: u64, row: &[u8], types: &[ColumnType]) -> Result<(), serde_json::Error> {
        if self.ends.is_empty() {
            self.line = line;
        }
        let start = self.bytes.len();
        value::canonical_row(row, types, &mut self.bytes)?;
        self.ends.push((self.bytes.len(), RowHash::of(&self.bytes[start..])));
        Ok(())
    }

    /// Each row's line, canonical form and the hash of that.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8], RowHash)> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|(end, _)| *end));
        let rows = starts.zip(&self.ends).map(|(start, (end, hash))| (&self.bytes[start..*end], *hash));
        (self.line..).zip(rows).map(|(line, (bytes, hash))| (line, bytes, hash))
    }
}

/// What the reading thread says. After an error nothing follows.
pub(super) type Said = Result<Block, PackError>;

/// Starts the thread. It ends when it has said all, or when nobody listens any more.
pub(super) fn read_ahead<'s, R: Read + Send + 's>(
    scope: &'s Scope<'s, '_>,
    reader: PackReader<R>,
) -> Result<Receiver<Said>, PackError> {
    let (say, heard) = sync_channel(AHEAD);
    let mut ahead = Ahead { rows: Rows::default(), say };
    Builder::new().name("pack".into()).spawn_scoped(scope, move || ahead.work(reader)).map_err(PackError::Io)?;
    Ok(heard)
}

struct Ahead {
    /// Not handed over yet.
    rows: Rows,
    say: SyncSender<Said>,
}

/// Why the thread ends early.
enum Stop {
    Pack(PackError),
    NobodyListens,
}
impl From<PackError> for Stop {
    fn from(e: PackError) -> Self {
        Stop::Pack(e)
    }
}

impl Ahead {
    fn work<R: Read>(&mut self, reader: PackReader<R>) {
        if let Err(Stop::Pack(e)) = self.read(reader) {
            // What stands before it may have a fault of its own, which comes first.
            let _ = self.hand_over().and_then(|()| self.tell(Err(e)));
        }
    }

    fn read<R: Read>(&mut self, mut reader: PackReader<R>) -> Result<(), Stop> {
        let contract = reader.contract().clone();
        let (mut types, mut table): (Vec<ColumnType>, String) = (Vec::new(), String::new());
        loop {
            let line = reader.line_number() + 1;
            match reader.next()? {
                Event::Row(row) => {
                    let wrong = |e| PackError::Line { line, reason: format!("table {table}: {e}") };
                    self.rows.push(line, row, &types).map_err(wrong)?;
                    if self.rows.bytes.len() >= BLOCK {
                        self.hand_over()?;
                    }
                }
                Event::Section(section) => {
                    self.hand_over()?;
                    table = section.table.to_string();
                    // The reader has seen that the contract has them.
                    let of = contract.table(&section.table);
                    let ty = |name: &str| of.and_then(|t| Some(t.columns[t.column(name)?].ty));
                    types = section.columns.iter().filter_map(|c| ty(c.as_str())).collect();
                    self.tell(Ok(Block::Section(section)))?;
                }
                Event::End(trailer) => {
                    self.hand_over()?;
                    self.tell(Ok(Block::End(trailer)))?;
                    reader.finish()?;
                    return self.tell(Ok(Block::Listed));
                }
            }
        }
    }

    fn hand_over(&mut self) -> Result<(), Stop> {
        let rows = std::mem::take(&mut self.rows);
        if rows.ends.is_empty() { Ok(()) } else { self.tell(Ok(Block::Rows(rows))) }
    }

    fn tell(&self, said: Said) -> Result<(), Stop> {
        self.say.send(said).map_err(|_| Stop::NobodyListens)
    }
}

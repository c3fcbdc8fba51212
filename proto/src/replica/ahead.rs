//! Reads a pack ahead of the database, on a thread of its own: gunzips, hashes the file, reads and checks the rows
//! and hashes them. What is left for the thread that owns the database is SQLite's own work.
//!
//! Rows are handed over in their canonical form, which their hashes are made of, in blocks of bounded size.

use crate::digest::RowHash;
use crate::pack::{Event, PackError, PackReader, Section, Trailer};
use crate::value::{self, ColumnType, Rows};
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
    Rows(RowLines),
    /// The rows' end. The file is only then the listed one when [`Block::Listed`] follows.
    End(Trailer),
    /// Nothing follows the trailer, and the bytes are those of the manifest.
    Listed,
}

/// Rows on lines that follow each other.
#[derive(Default)]
pub(super) struct RowLines {
    /// The line of the first.
    line: u64,
    rows: Rows,
    hashes: Vec<RowHash>,
}

impl RowLines {
    fn push(&mut self, line: u64, row: &[u8], types: &[ColumnType]) -> Result<(), serde_json::Error> {
        let mut values = Vec::with_capacity(types.len());
        value::read_row(row, types, &mut values)?;
        if self.rows.is_empty() {
            self.line = line;
        }
        self.hashes.push(RowHash::of(self.rows.push(&values)));
        Ok(())
    }

    /// Each row's line, canonical form and the hash of that.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8], RowHash)> {
        let rows = self.rows.iter().zip(&self.hashes);
        (self.line..).zip(rows).map(|(line, (row, hash))| (line, row, *hash))
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
    let mut ahead = Ahead { rows: RowLines::default(), say };
    Builder::new().name("pack".into()).spawn_scoped(scope, move || ahead.work(reader)).map_err(PackError::Io)?;
    Ok(heard)
}

struct Ahead {
    /// Not handed over yet.
    rows: RowLines,
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
                    if self.rows.rows.bytes() >= BLOCK {
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
        if rows.rows.is_empty() { Ok(()) } else { self.tell(Ok(Block::Rows(rows))) }
    }

    fn tell(&self, said: Said) -> Result<(), Stop> {
        self.say.send(said).map_err(|_| Stop::NobodyListens)
    }
}

//! Reads a pack from anything, in bounded memory.

use super::{FORMAT, Header, Op, RowCounts, Section, TableHead, Trailer, table_heads};
use crate::digest::Sha256Stream;
use crate::ids::Instance;
use crate::layout::PackKind;
use crate::limits::Limits;
use crate::manifest::PackEntry;
use crate::schema::{Contract, SchemaError};
use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, BufReader, Read};

/// Why a pack was refused. All but [`PackError::Io`] are the pack's fault.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The bytes could not be read.
    #[error("reading the pack: {0}")]
    Io(io::Error),
    /// Not gzip, or damaged within.
    #[error("not a whole gzip stream: {0}")]
    Gzip(io::Error),
    /// Ends before its trailer.
    #[error("truncated: it ends at line {line} without a trailer")]
    Truncated {
        /// The last line.
        line: u64,
    },
    /// A line that is not what must stand there.
    #[error("line {line}: {reason}")]
    Line {
        /// The line's number, from 1.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// A bound was passed.
    #[error("line {line}: over {limit}")]
    TooMuch {
        /// The line's number, from 1.
        line: u64,
        /// The bound, with its name.
        limit: String,
    },
    /// A format from the future.
    #[error("the pack has format {0}; this build reads format {FORMAT}: update this program")]
    UnknownFormat(u32),
    /// Not the pack that was asked for.
    #[error("not the pack that its name says: {0}")]
    OtherPack(String),
    /// Its contract was refused.
    #[error("contract: {0}")]
    Schema(#[from] SchemaError),
    /// Other bytes than the manifest says.
    #[error("the file is not the one in the manifest: {0}")]
    NotListed(String),
    /// Bytes after the end.
    #[error("{0}")]
    Trailing(&'static str),
}

impl PackError {
    /// A stable name of the reason, for reason files, logs and JSON.
    pub fn code(&self) -> &'static str {
        match self {
            PackError::Io(_) => "IO",
            PackError::Gzip(_) => "NOT_GZIP",
            PackError::Truncated { .. } => "TRUNCATED",
            PackError::Line { .. } => "BAD_LINE",
            PackError::TooMuch { .. } => "TOO_MUCH",
            PackError::UnknownFormat(_) => "UNKNOWN_FORMAT",
            PackError::OtherPack(_) => "OTHER_PACK",
            PackError::Schema(_) => "BAD_SCHEMA",
            PackError::NotListed(_) => "NOT_LISTED",
            PackError::Trailing(_) => "TRAILING_GARBAGE",
        }
    }
}

/// What comes next in a pack.
#[derive(Debug)]
pub enum Event<'l> {
    /// A section begins.
    Section(Section),
    /// A row of the section: the line, a JSON array.
    Row(&'l [u8]),
    /// The end. Nothing is proven before [`PackReader::finish`].
    End(Trailer),
}

/// A pack being read.
pub struct PackReader<R: Read> {
    lines: BufReader<GzDecoder<BufReader<Hashing<R>>>>,
    line: Vec<u8>,
    number: u64,
    unpacked: u64,
    entry: PackEntry,
    limits: Limits,
    header: Header,
    contract: Contract,
    rows: RowCounts,
    op: Option<Op>,
    ended: bool,
}

impl<R: Read> std::fmt::Debug for PackReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackReader").field("header", &self.header).field("line", &self.number).finish()
    }
}

const BUFFER: usize = 64 << 10;

impl<R: Read> PackReader<R> {
    /// Reads and checks the header against what the manifest says the pack is.
    pub fn new(file: R, instance: &Instance, entry: &PackEntry, limits: &Limits) -> Result<Self, PackError> {
        let hashing = Hashing {
            file: file.take(entry.bytes.saturating_add(1)),
            bytes: 0,
            hash: Sha256Stream::default(),
            failed: None,
        };
        let lines = BufReader::with_capacity(BUFFER, GzDecoder::new(BufReader::with_capacity(BUFFER, hashing)));
        let (mut number, mut unpacked, mut line) = (0, 0, Vec::new());
        let mut lines = lines;
        if !next_line(&mut lines, &mut line, &mut number, &mut unpacked, entry, limits)? {
            return Err(PackError::Truncated { line: 0 });
        }
        let (header, contract) = read_header(&line, instance, entry, limits)?;
        Ok(PackReader {
            lines,
            line,
            number,
            unpacked,
            entry: entry.clone(),
            limits: limits.clone(),
            header,
            contract,
            rows: RowCounts::default(),
            op: None,
            ended: false,
        })
    }

    /// Line 1.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// The header's contract, understood.
    pub fn contract(&self) -> &Contract {
        &self.contract
    }
    /// The number of the line read last, from 1.
    pub fn line_number(&self) -> u64 {
        self.number
    }

    /// The next section, row or the end.
    #[allow(clippy::should_implement_trait, reason = "events borrow the line")]
    pub fn next(&mut self) -> Result<Event<'_>, PackError> {
        if !next_line(&mut self.lines, &mut self.line, &mut self.number, &mut self.unpacked, &self.entry, &self.limits)?
        {
            return Err(PackError::Truncated { line: self.number });
        }
        if self.ended {
            return Err(PackError::Trailing("lines after the trailer"));
        }
        if self.line.first() == Some(&b'[') {
            let op = self.op.ok_or_else(|| bad(self.number, "a row before any section"))?;
            self.rows.count(op);
            if self.rows.total() > self.limits.rows {
                return Err(PackError::TooMuch {
                    line: self.number,
                    limit: format!("limits.rows = {}", self.limits.rows),
                });
            }
            return Ok(Event::Row(&self.line));
        }
        if self.line.starts_with(b"{\"rows\"") {
            let trailer: Trailer = serde_json::from_slice(&self.line).map_err(|e| bad(self.number, e))?;
            self.ended = true;
            if trailer.rows != self.rows {
                return Err(bad(
                    self.number,
                    format!("the trailer counts {}, the pack has {}", trailer.rows, self.rows),
                ));
            }
            return Ok(Event::End(trailer));
        }
        let section: Section = serde_json::from_slice(&self.line).map_err(|e| bad(self.number, e))?;
        self.check_section(&section).map_err(|reason| bad(self.number, reason))?;
        self.op = Some(section.op);
        Ok(Event::Section(section))
    }

    fn check_section(&self, s: &Section) -> Result<(), String> {
        let table = self.contract.table(&s.table).ok_or_else(|| format!("table {} is not in the contract", s.table))?;
        if self.op.is_some_and(|before| before > s.op) {
            return Err(format!("a section of {} after a later operation", s.op));
        }
        if self.header.kind == PackKind::Full && s.op != Op::Insert {
            return Err(format!("a section of {} in a full", s.op));
        }
        let key: Vec<&str> = table.key.iter().map(|k| table.columns[*k].name.as_str()).collect();
        let columns: Vec<&str> = s.columns.iter().map(|c| c.as_str()).collect();
        if let Some(c) = columns.iter().find(|c| table.column(c).is_none()) {
            return Err(format!("column {c} is not in table {}", s.table));
        }
        let right = match s.op {
            Op::Insert => columns.iter().copied().eq(table.columns.iter().map(|c| c.name.as_str())),
            Op::Delete => columns == key,
            Op::Update => {
                let changed = columns.get(key.len()..).unwrap_or_default();
                columns.starts_with(&key)
                    && !changed.is_empty()
                    && changed.iter().enumerate().all(|(i, c)| !key.contains(c) && !changed[..i].contains(c))
            }
        };
        if right { Ok(()) } else { Err(format!("a section of {} with columns {}", s.op, columns.join(", "))) }
    }

    /// The last check: the trailer was seen, nothing follows it, and the bytes are those that the
    /// manifest lists.
    pub fn finish(mut self) -> Result<(), PackError> {
        if !self.ended {
            return Err(PackError::Truncated { line: self.number });
        }
        if next_line(&mut self.lines, &mut self.line, &mut self.number, &mut self.unpacked, &self.entry, &self.limits)?
        {
            return Err(PackError::Trailing("lines after the trailer"));
        }
        let mut file = self.lines.into_inner().into_inner();
        if !file.fill_buf().map_err(PackError::Io)?.is_empty() {
            return Err(PackError::Trailing("bytes after the gzip stream"));
        }
        let Hashing { bytes, hash, .. } = file.into_inner();
        let found = hash.finish();
        if bytes != self.entry.bytes || found != self.entry.sha256 {
            return Err(PackError::NotListed(format!(
                "{bytes} bytes with SHA-256 {found}, the manifest says {} bytes with {}",
                self.entry.bytes, self.entry.sha256
            )));
        }
        if self.unpacked != self.entry.unpacked {
            return Err(PackError::NotListed(format!(
                "{} bytes unpacked, the manifest says {}",
                self.unpacked, self.entry.unpacked
            )));
        }
        Ok(())
    }
}

fn bad(line: u64, reason: impl std::fmt::Display) -> PackError {
    PackError::Line { line, reason: reason.to_string() }
}

/// Checks the header against the manifest's entry and against its own contract.
fn read_header(
    line: &[u8],
    instance: &Instance,
    entry: &PackEntry,
    limits: &Limits,
) -> Result<(Header, Contract), PackError> {
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = serde_json::from_slice(line).map_err(|e| bad(1, e))?;
    if format != FORMAT {
        return Err(PackError::UnknownFormat(format));
    }
    let header: Header = serde_json::from_slice(line).map_err(|e| bad(1, e))?;
    let (found, wanted) = (
        (header.instance(), header.version, header.kind, header.base),
        (instance.clone(), entry.version, entry.kind, entry.base),
    );
    if found != wanted {
        let name = |(i, v, k, b): (Instance, crate::ids::Version, PackKind, Option<crate::ids::Version>)| {
            format!("{k} of {i} to version {v}{}", b.map_or(String::new(), |b| format!(" from {b}")))
        };
        return Err(PackError::OtherPack(format!("it holds a {}, not a {}", name(found), name(wanted))));
    }
    let contract = Contract::parse(&header.schema.ddl, limits)?;
    let of_ddl = table_heads(&contract);
    let mut told: Vec<&TableHead> = header.tables.iter().collect();
    told.sort_by_key(|t| &t.table);
    if contract.sha256 != header.schema.sha256 || !told.into_iter().eq(&of_ddl) {
        return Err(bad(1, "the tables are not those of the DDL"));
    }
    if header.kind == PackKind::Full && !header.schema.migrate.is_empty() {
        return Err(bad(1, "migration statements in a full"));
    }
    Ok((header, contract))
}

/// Reads a line without its newline; false at the end. Bounded by `line_bytes` and by what the
/// manifest declares unpacked.
fn next_line<R: Read>(
    lines: &mut BufReader<GzDecoder<BufReader<Hashing<R>>>>,
    line: &mut Vec<u8>,
    number: &mut u64,
    unpacked: &mut u64,
    entry: &PackEntry,
    limits: &Limits,
) -> Result<bool, PackError> {
    line.clear();
    *number += 1;
    let declared = entry.unpacked.min(limits.unpacked_bytes);
    let left = declared.saturating_sub(*unpacked);
    let read = lines.fill_buf().map(|there| there.first().copied()).and_then(|first| match first {
        // Anything else, a bomb say, is not taken into memory.
        Some(first) if left > 0 && !matches!(first, b'{' | b'[') => Ok(None),
        _ => (&mut *lines).take(left.min(limits.line_bytes).saturating_add(1)).read_until(b'\n', line).map(Some),
    });
    let n = match read {
        Ok(Some(n)) => n,
        Ok(None) => return Err(bad(*number, "it begins with neither { nor [")),
        Err(e) => {
            // The decoder hides where an error came from: ask the file below it.
            let failed = lines.get_mut().get_mut().get_mut().failed.take();
            return Err(failed.map_or(PackError::Gzip(e), PackError::Io));
        }
    };
    *unpacked += n as u64;
    if n == 0 {
        *number -= 1;
        return Ok(false);
    }
    if n as u64 > left {
        let limit = format!("the {declared} unpacked bytes that the manifest declares");
        return Err(PackError::TooMuch { line: *number, limit });
    }
    if n as u64 > limits.line_bytes {
        return Err(PackError::TooMuch { line: *number, limit: format!("limits.line_bytes = {}", limits.line_bytes) });
    }
    if line.pop() != Some(b'\n') {
        return Err(PackError::Truncated { line: *number });
    }
    Ok(true)
}

/// Counts and hashes the file's bytes as they pass; never reads more than the manifest lists and
/// one byte.
struct Hashing<R> {
    file: io::Take<R>,
    bytes: u64,
    hash: Sha256Stream,
    failed: Option<io::Error>,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.file.read(buf) {
            Ok(n) => {
                self.hash.update(&buf[..n]);
                self.bytes += n as u64;
                Ok(n)
            }
            Err(e) => {
                let kind = e.kind();
                self.failed = Some(e);
                Err(kind.into())
            }
        }
    }
}

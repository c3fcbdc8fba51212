//! CSV as RFC 4180 has it, streamed: one record at a time, whatever the file's size. Stricter than
//! most readers where a half-written file could look whole.

use super::FileError;
use std::io::{BufRead, BufReader, Chain, Cursor, Read};

/// Reads records.
pub struct Reader<R> {
    input: BufReader<Chain<Cursor<Vec<u8>>, R>>,
    /// The line that the next byte is on.
    line: u64,
    max: usize,
    data: Vec<u8>,
    ends: Vec<usize>,
    /// Whether the last record had its line break.
    closed: bool,
    /// Whether a field of the record was quoted: `""` alone on a line is a record.
    was_quoted: bool,
}

/// Whether bytes begin with the byte order mark of UTF-16.
pub fn is_utf_16(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF")
}

#[derive(Clone, Copy, PartialEq)]
enum At {
    FieldStart,
    Plain,
    Quoted,
    /// After a quote inside a quoted field: its end, or half of a doubled one.
    QuoteAgain,
    /// After a carriage return outside quotes.
    Return,
}

impl<R: Read> Reader<R> {
    /// Reads from the beginning of a file; records of more than `max` bytes are refused.
    pub fn new(mut input: R, max: u64) -> Result<Self, FileError> {
        // A byte order mark is no data.
        let mut head = Vec::new();
        (&mut input).take(3).read_to_end(&mut head).map_err(FileError::read)?;
        if head == b"\xEF\xBB\xBF" {
            head.clear();
        } else if is_utf_16(&head) {
            return Err(FileError::at(1, FileError::UTF_16));
        }
        Ok(Reader {
            input: BufReader::with_capacity(256 << 10, Cursor::new(head).chain(input)),
            line: 1,
            max: usize::try_from(max).unwrap_or(usize::MAX),
            data: Vec::new(),
            ends: Vec::new(),
            closed: true,
            was_quoted: false,
        })
    }

    /// Whether the last record read ended in a line break.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The fields of the record read last.
    pub fn fields(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        let start = |i: usize| if i == 0 { 0 } else { self.ends[i - 1] };
        self.ends.iter().enumerate().map(move |(i, end)| &self.data[start(i)..*end])
    }

    /// Reads the next record; the line that it begins on, or `None` at the end. Empty lines are
    /// no records.
    pub fn next(&mut self) -> Result<Option<u64>, FileError> {
        loop {
            let first = self.line;
            let Some(()) = self.record(first)? else { return Ok(None) };
            if self.ends.len() > 1 || !self.data.is_empty() || self.was_quoted {
                return Ok(Some(first));
            }
        }
    }

    fn record(&mut self, first: u64) -> Result<Option<()>, FileError> {
        self.data.clear();
        self.ends.clear();
        self.was_quoted = false;
        let mut at = At::FieldStart;
        let mut any = false;
        let mut quote_line = first;
        // Bytes of the record, commas and quotes too: each comma costs memory.
        let mut taken = 0;
        loop {
            let chunk = self.input.fill_buf().map_err(FileError::read)?;
            if chunk.is_empty() {
                return self.end(at, any, quote_line);
            }
            any = true;
            let chunk = &chunk[..chunk.len().min((self.max - taken).saturating_add(1))];
            let mut used = chunk.len();
            let mut done = false;
            for (i, &b) in chunk.iter().enumerate() {
                if b == b'\n' {
                    self.line += 1;
                }
                at = match (at, b) {
                    (At::Quoted, b'"') => At::QuoteAgain,
                    (At::Quoted, _) | (At::QuoteAgain, b'"') => {
                        self.data.push(b);
                        At::Quoted
                    }
                    (At::Return, b'\n') | (At::FieldStart | At::Plain | At::QuoteAgain, b'\n') => {
                        self.ends.push(self.data.len());
                        (used, done) = (i + 1, true);
                        break;
                    }
                    (At::Return, _) => {
                        return Err(FileError::at(self.line, "a carriage return without a line feed"));
                    }
                    (_, b'\r') => At::Return,
                    (_, b',') => {
                        self.ends.push(self.data.len());
                        At::FieldStart
                    }
                    (At::FieldStart, b'"') => {
                        quote_line = self.line;
                        self.was_quoted = true;
                        At::Quoted
                    }
                    (At::QuoteAgain, _) => {
                        return Err(FileError::at(
                            self.line,
                            "text after a closing quote (a quote inside is written \"\")",
                        ));
                    }
                    (At::FieldStart | At::Plain, _) => {
                        self.data.push(b);
                        At::Plain
                    }
                };
            }
            self.input.consume(used);
            taken += used;
            if taken > self.max {
                return Err(FileError::at(
                    first,
                    format!("a record of more than limits.line_bytes = {} bytes", self.max),
                ));
            }
            if done {
                self.closed = true;
                return Ok(Some(()));
            }
        }
    }

    /// The end of the file.
    fn end(&mut self, at: At, any: bool, quote_line: u64) -> Result<Option<()>, FileError> {
        match at {
            _ if !any => Ok(None),
            At::Quoted => {
                Err(FileError::at(quote_line, "a quote is opened and never closed: the file is half-written"))
            }
            At::Return => {
                Err(FileError::at(self.line, "a carriage return without a line feed: the file is half-written"))
            }
            _ => {
                self.ends.push(self.data.len());
                self.closed = false;
                Ok(Some(()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> Result<Vec<(u64, Vec<String>)>, String> {
        // One byte at a time, so that every state crosses a buffer's end.
        struct Drip<'a>(&'a [u8]);
        impl Read for Drip<'_> {
            fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                let n = self.0.len().min(1);
                buf[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let mut r = Reader::new(Drip(text), 1000).unwrap();
        let mut out = Vec::new();
        while let Some(line) = r.next().map_err(|e| e.to_string())? {
            out.push((line, r.fields().map(|f| String::from_utf8_lossy(f).into_owned()).collect()));
        }
        Ok(out)
    }

    fn row(line: u64, fields: &[&str]) -> (u64, Vec<String>) {
        (line, fields.iter().map(|f| (*f).to_owned()).collect())
    }

    #[test]
    fn records_are_read_right() {
        let text = b"\xEF\xBB\xBFa,b\r\n1,\"x \"\"y\"\"\r\nz, \"\r\n\r\n,\n5\" nail,\"\"\nlast,one";
        let want = [
            row(1, &["a", "b"]),
            row(2, &["1", "x \"y\"\r\nz, "]),
            row(5, &["", ""]),
            row(6, &["5\" nail", ""]),
            row(7, &["last", "one"]),
        ];
        assert_eq!(all(text).unwrap(), want);
        assert_eq!(all(b"a\n\"\"\n\nb\n").unwrap(), [row(1, &["a"]), row(2, &[""]), row(4, &["b"])]);
        assert!(all(b"").unwrap().is_empty());
    }

    #[test]
    fn what_is_broken_is_told_with_its_line() {
        for (text, want) in [
            (&b"a,b\n1,\"x\ny"[..], "line 2: a quote is opened"),
            (b"a\n\"x\"y\n", "line 2: text after"),
            (b"a\nx\ry\n", "line 2: a carriage return"),
            (b"a\nx\r", "line 2: a carriage return"),
        ] {
            let e = all(text).unwrap_err();
            assert!(e.starts_with(want), "{e}");
        }
        let long = [b"a\n\"".to_vec(), vec![b'x'; 2000]].concat();
        assert!(all(&long).unwrap_err().contains("limits.line_bytes"));
        assert!(all(",".repeat(2000).as_bytes()).unwrap_err().contains("limits.line_bytes"));
        assert_eq!(all(",".repeat(998).as_bytes()).unwrap()[0].1.len(), 999);
    }

    #[test]
    fn a_last_line_without_a_break_is_noticed() {
        let mut r = Reader::new(&b"a\nb"[..], 100).unwrap();
        r.next().unwrap();
        assert!(r.is_closed());
        r.next().unwrap();
        assert!(!r.is_closed());
    }
}

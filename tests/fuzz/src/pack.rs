//! The pack reader. The input is a packed file (first byte `z`), or the lines of one, which are packed here, so that
//! the fuzzer need not find its way through gzip. The manifest's entry says of it what is true.

use crate::Drip;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use proto::digest::Sha256;
use proto::ids::Instance;
use proto::limits::Limits;
use proto::manifest::PackEntry;
use proto::pack::{Event, Header, PackError, PackReader, PackWriter, Section, Trailer};
use std::io::{Read, Write as _};

/// What an event is, owned.
#[derive(Debug, PartialEq)]
enum Seen {
    Section(Section),
    Row(Vec<u8>),
    End(Trailer),
}

pub(crate) fn gzip(lines: &[u8]) -> Vec<u8> {
    let mut gz = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(lines).unwrap();
    gz.finish().unwrap()
}

const UNPACKED: u64 = 1 << 20;

fn limits() -> Limits {
    Limits { line_bytes: 4096, rows: 100, unpacked_bytes: UNPACKED, tables: 8, columns: 16, ..Limits::default() }
}

fn read(from: impl Read, instance: &Instance, entry: &PackEntry) -> Result<(Header, Vec<Seen>), PackError> {
    let mut reader = PackReader::new(from, instance, entry, &limits())?;
    let (header, mut seen) = (reader.header().clone(), Vec::new());
    loop {
        match reader.next()? {
            Event::Section(s) => seen.push(Seen::Section(s)),
            Event::Row(line) => seen.push(Seen::Row(line.to_vec())),
            Event::End(trailer) => {
                seen.push(Seen::End(trailer));
                return reader.finish().map(|()| (header, seen));
            }
        }
    }
}

/// What a manifest would truly list, by the header's own word.
fn listed(bytes: &[u8], unpacked: &[u8]) -> (Instance, PackEntry) {
    let line = unpacked.split(|b| *b == b'\n').next().unwrap_or_default();
    let header: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
    let instance = format!("{}@{}", header["stream"].as_str().unwrap_or(""), header["audience"].as_str().unwrap_or(""));
    let number = |key: &str| header[key].as_u64().and_then(|n| n.try_into().ok());
    let entry = PackEntry {
        version: number("version").unwrap_or(proto::ids::Version::FIRST),
        kind: serde_json::from_value(header["kind"].clone()).unwrap_or(proto::layout::PackKind::Full),
        base: number("base"),
        bytes: bytes.len() as u64,
        unpacked: unpacked.len() as u64,
        sha256: Sha256::of(bytes),
    };
    (instance.parse().unwrap_or_else(|_| "price@all".parse().unwrap()), entry)
}

pub fn pack(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    let bytes = if *mode == b'z' { rest.to_vec() } else { gzip(rest) };
    let mut unpacked = Vec::new();
    let _ = GzDecoder::new(&bytes[..]).take(2 * UNPACKED).read_to_end(&mut unpacked);
    let (instance, entry) = listed(&bytes, &unpacked);
    let whole = read(&bytes[..], &instance, &entry);
    let pieces = read(Drip(&bytes), &instance, &entry);
    match (&whole, &pieces) {
        (Ok(a), Ok(b)) => assert_eq!(a, b, "read otherwise in pieces"),
        (Err(a), Err(b)) => assert!(!a.code().is_empty() && !matches!(b, PackError::Io(_))),
        _ => panic!("whole {whole:?}, in pieces {pieces:?}"),
    }
    let Ok((header, seen)) = whole else { return };
    is_every_line(&unpacked, &seen);
    writes_back(&instance, &header, &seen);
    only_as_listed(&bytes, &instance, &entry);
}

/// Nothing of the file is left out, nothing is past a limit.
fn is_every_line(unpacked: &[u8], seen: &[Seen]) {
    assert!(unpacked.len() as u64 <= UNPACKED && unpacked.ends_with(b"\n"));
    let lines: Vec<&[u8]> = unpacked[..unpacked.len() - 1].split(|b| *b == b'\n').skip(1).collect();
    assert_eq!(lines.len(), seen.len());
    for (line, seen) in lines.iter().zip(seen) {
        assert!(line.len() < 4096);
        let begins = match seen {
            Seen::Row(row) => row == line && line.starts_with(b"["),
            // docs/FORMAT.md: an object begins a section, and `{"rows"` the trailer.
            Seen::Section(_) => line.starts_with(b"{"),
            Seen::End(_) => line.starts_with(b"{\"rows\""),
        };
        assert!(begins, "{seen:?} from {}", String::from_utf8_lossy(line));
    }
    assert!(seen.iter().filter(|s| matches!(s, Seen::Row(_))).count() <= 100);
}

/// Our writer makes the same pack of what was read.
fn writes_back(instance: &Instance, header: &Header, seen: &[Seen]) {
    let mut w = PackWriter::new(Vec::new(), header, 1).unwrap();
    let mut digests = None;
    for event in seen {
        match event {
            Seen::Section(s) => w.section(&s.table, s.op, &s.columns).unwrap(),
            Seen::Row(line) => w.raw_row(&[line, &b"\n"[..]].concat()).unwrap(),
            Seen::End(t) => digests = Some(&t.digests),
        }
    }
    let (bytes, written) = w.finish(digests.unwrap()).unwrap();
    let entry = PackEntry {
        version: header.version,
        kind: header.kind,
        base: header.base,
        bytes: written.bytes,
        unpacked: written.unpacked,
        sha256: written.sha256,
    };
    // Written plainly it may be longer than it was, and so past the limit of a line or of all.
    match read(&bytes[..], instance, &entry) {
        Ok((h, s)) => assert!(&h == header && s == seen),
        Err(e) => assert!(matches!(e, PackError::TooMuch { .. }), "{e}"),
    }
}

/// A good pack that is cut, longer, or listed otherwise is refused.
fn only_as_listed(bytes: &[u8], instance: &Instance, entry: &PackEntry) {
    let cut = &bytes[..bytes.len() - 1];
    let longer = [bytes, b"\0"].concat();
    for other in [cut, &longer] {
        assert!(read(other, instance, entry).is_err());
        let so = PackEntry { bytes: other.len() as u64, sha256: Sha256::of(other), ..entry.clone() };
        assert!(read(other, instance, &so).is_err());
    }
    for n in [entry.unpacked - 1, entry.unpacked + 1] {
        assert!(read(bytes, instance, &PackEntry { unpacked: n, ..entry.clone() }).is_err());
    }
    assert!(read(bytes, instance, &PackEntry { sha256: Sha256::of(b""), ..entry.clone() }).is_err());
}

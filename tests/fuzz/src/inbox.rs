//! File drops. The first byte says whether the sender marked the file whole (bit 0), and for CSV whether it is a
//! table or the list of stores (bit 1). What the product makes of the rest is compared with what a second reader does:
//! the `csv` crate, and `serde_json`'s values, converted by rules spelt out here.

use crate::Drip;
use base64::Engine as _;
use hq_publisher::inbox::{Blame, FileError, Format, read_stores, read_table};
use hq_publisher::source::{RowFault, RowSink, SinkError, StoreRow};
use proto::limits::Limits;
use proto::schema::{Contract, Table};
use proto::value::{ColumnType, OwnedValue, Value};
use serde::de::{MapAccess, Visitor};
use std::io::Read;
use std::sync::LazyLock;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let ddl = "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL, cents INTEGER NOT NULL, kg REAL, pic BLOB, note TEXT) STRICT;";
    Contract::parse(ddl, &Limits::default()).unwrap().tables.remove(0)
});

/// A line's and a record's limit: small, so that it is met.
const MAX: u64 = 512;

/// Rows with their lines; None: a row that was refused.
#[derive(Default, Debug, PartialEq)]
struct Taken(Vec<(u64, Option<Vec<OwnedValue>>)>);

impl RowSink for Taken {
    fn row(&mut self, row: &[Value<'_>], line: Option<u64>) -> Result<(), SinkError> {
        self.0.push((line.unwrap(), Some(row.iter().cloned().map(Value::into_owned).collect())));
        Ok(())
    }
    fn fault(&mut self, fault: RowFault) -> Result<(), SinkError> {
        assert!(!fault.problem.is_empty() && fault.to_string().len() < 4000);
        self.0.push((fault.line.unwrap(), None));
        Ok(())
    }
}

fn take(input: impl Read, format: Format, complete: bool) -> (Taken, Result<(), FileError>) {
    let mut taken = Taken::default();
    let result = read_table(input, format, complete, MAX, &TABLE, &mut taken);
    (taken, result)
}

/// Reads the file whole and in pieces; what came of it, if it could be read to its end.
fn table(file: &[u8], format: Format, complete: bool) -> Option<Taken> {
    let (taken, result) = take(file, format, complete);
    let (pieces, again) = take(Drip(file), format, complete);
    assert_eq!(result, again);
    match result {
        Ok(()) => {
            assert_eq!(taken, pieces);
            Some(taken)
        }
        Err(e) => {
            assert!(e.blame == Blame::File && e.line.is_some_and(|l| l <= 1 + file.len() as u64), "{e:?}");
            None
        }
    }
}

fn without_mark(file: &[u8]) -> &[u8] {
    file.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(file)
}

pub fn csv(data: &[u8]) {
    let Some((flags, file)) = data.split_first() else { return };
    if flags & 2 != 0 {
        return stores(file, flags & 1 != 0);
    }
    let Some(taken) = table(file, Format::Csv, flags & 1 != 0) else { return };
    let mut other = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(without_mark(file));
    let records: Vec<csv::ByteRecord> = other.byte_records().map(Result::unwrap).collect();
    let (header, rows) = records.split_first().expect("what is taken has a header");
    let place = |i: usize| header.iter().position(|h| h == TABLE.columns[i].name.as_str().as_bytes()).unwrap();
    let expected = rows.iter().map(|r| {
        let fits = r.len() == header.len();
        fits.then(|| (0..TABLE.columns.len()).map(|i| csv_value(i, &r[place(i)])).collect()).flatten()
    });
    let expected: Vec<Option<Vec<OwnedValue>>> = expected.collect();
    assert_eq!(taken.0.iter().map(|t| &t.1).collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
    assert!(taken.0.is_sorted_by(|a, b| a.0 < b.0), "lines go up");
    assert!(flags & 1 != 0 || file.ends_with(b"\n"), "a last line without a break is half a line");
}

/// A field as the contract takes it; None: not at all.
fn csv_value(column: usize, field: &[u8]) -> Option<OwnedValue> {
    let column = &TABLE.columns[column];
    if field.is_empty() && !column.not_null {
        return Some(Value::Null);
    }
    let text = std::str::from_utf8(field).ok()?;
    match column.ty {
        ColumnType::Text => (!text.contains('\0')).then(|| Value::Text(text.to_owned().into())),
        ColumnType::Integer => {
            let digits = text.strip_prefix('-').unwrap_or(text).as_bytes();
            let canonical = digits == b"0" || digits.first().is_some_and(|d| (b'1'..=b'9').contains(d));
            (canonical && digits.iter().all(u8::is_ascii_digit)).then(|| text.parse().ok().map(Value::Int)).flatten()
        }
        ColumnType::Real => {
            let r: f64 = text.parse().ok().filter(|_| !text.to_ascii_lowercase().contains(['n', 'i']))?;
            (r.is_finite() && !is_rounded(text, r)).then_some(Value::Real(r + 0.0))
        }
        ColumnType::Blob => blob(text),
    }
}

/// Whether a number without an exponent is another one as a real, digits after the point of those below 2^53 apart.
fn is_rounded(text: &str, r: f64) -> bool {
    let exact = format!("{:.0}", r.abs());
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_same = whole.trim_start_matches(['+', '-', '0']) == exact && fraction.trim_end_matches('0').is_empty();
    r.abs() >= 2f64.powi(53) && !text.to_ascii_lowercase().contains('e') && !is_same
}

fn blob(text: &str) -> Option<OwnedValue> {
    base64::engine::general_purpose::STANDARD.decode(text).ok().map(|b| Value::Blob(b.into()))
}

fn stores(file: &[u8], complete: bool) {
    let (list, pieces) = (read_stores(file, complete, MAX), read_stores(Drip(file), complete, MAX));
    assert_eq!(list, pieces);
    let Ok(list) = list else { return };
    assert!(list.is_sorted_by(|a, b| a.id.as_str() < b.id.as_str()), "by id, each once");
    let controls = |s: &StoreRow| s.region.as_ref().is_some_and(|r| r.chars().any(char::is_control));
    assert!(!list.iter().any(controls));
    let mut other = csv::ReaderBuilder::new().from_reader(without_mark(file));
    assert_eq!(other.byte_records().map(Result::unwrap).count(), list.len());
}

pub fn ndjson(data: &[u8]) {
    let Some((flags, file)) = data.split_first() else { return };
    let Some(taken) = table(file, Format::Ndjson, flags & 1 != 0) else { return };
    let lines = without_mark(file).split(|b| *b == b'\n');
    let lines = lines.enumerate().filter(|(_, l)| !l.trim_ascii().is_empty());
    let expected: Vec<_> = lines.map(|(n, line)| (n as u64 + 1, json_row(line))).collect();
    assert_eq!(taken.0, expected);
}

/// An object's members in order, doubles kept.
struct Members(Vec<(String, Box<serde_json::value::RawValue>)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Members;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut all = Vec::new();
                while let Some(member) = map.next_entry()? {
                    all.push(member);
                }
                Ok(Members(all))
            }
        }
        d.deserialize_map(All)
    }
}

fn json_row(line: &[u8]) -> Option<Vec<OwnedValue>> {
    let Members(members) = serde_json::from_slice(line).ok()?;
    let read = |(name, text): (String, Box<serde_json::value::RawValue>)| {
        Some((name, serde_json::from_str::<serde_json::Value>(text.get()).ok()?, text))
    };
    let members: Vec<_> = members.into_iter().map(read).collect::<Option<_>>()?;
    let names: Vec<&str> = members.iter().map(|m| m.0.as_str()).collect();
    let known = |n: &&str| TABLE.column(n).is_some();
    if !names.iter().all(known) || (1..names.len()).any(|i| names[..i].contains(&names[i])) {
        return None;
    }
    // A value that is no scalar spoils the line, whatever its column.
    if members.iter().any(|(_, v, _)| v.is_array() || v.is_object()) {
        return None;
    }
    let value = |column: &proto::schema::Column| match members.iter().find(|m| m.0 == column.name.as_str()) {
        None => (!column.not_null).then_some(Value::Null),
        Some((_, v, text)) => json_value(v, text.get(), column.ty),
    };
    TABLE.columns.iter().map(value).collect()
}

fn json_value(json: &serde_json::Value, text: &str, ty: ColumnType) -> Option<OwnedValue> {
    use serde_json::Value as Json;
    let whole = match json {
        Json::Bool(b) => Some(i128::from(*b)),
        Json::Number(n) => n.as_i64().map(i128::from).or(n.as_u64().map(i128::from)),
        _ => None,
    };
    match (json, ty) {
        (Json::Null, _) => Some(Value::Null),
        (Json::String(s), ColumnType::Text) => (!s.contains('\0')).then(|| Value::Text(s.clone().into())),
        (Json::String(s), ColumnType::Blob) => blob(s),
        (_, ColumnType::Integer) if whole.is_some() => whole.and_then(|n| i64::try_from(n).ok()).map(Value::Int),
        // An integer that a real would round is refused.
        (_, ColumnType::Real) if whole.is_some() => {
            whole.filter(|n| (*n as f64) as i128 == *n).map(|n| Value::Real(n as f64))
        }
        (Json::Number(n), ColumnType::Real) => {
            n.as_f64().filter(|r| r.is_finite() && !is_rounded(text, *r)).map(|r| Value::Real(r + 0.0))
        }
        // One with a point or an exponent counts while it is surely whole.
        (Json::Number(n), ColumnType::Integer) => {
            let r =
                n.as_f64().filter(|r| r.fract() == 0.0 && r.abs() < 2f64.powi(53) && is_exactly(text, *r as i64))?;
            Some(Value::Int(r as i64))
        }
        _ => None,
    }
}

/// Whether a number is written so that it is this whole one, digit by digit.
fn is_exactly(text: &str, n: i64) -> bool {
    let text = text.trim_start_matches('-');
    let (decimal, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, fraction) = decimal.split_once('.').unwrap_or((decimal, ""));
    let digits = format!("{whole}{fraction}");
    if digits.bytes().all(|b| b == b'0') {
        return n == 0;
    }
    let point = exponent.parse::<i64>().ok().and_then(|e| e.checked_add(whole.len() as i64));
    let Some(point) = point.and_then(|p| usize::try_from(p).ok()) else { return false };
    let before: String = digits.chars().chain(std::iter::repeat('0')).take(point).collect();
    let after = digits.get(point..).unwrap_or("");
    before.trim_start_matches('0') == n.unsigned_abs().to_string() && after.bytes().all(|b| b == b'0')
}

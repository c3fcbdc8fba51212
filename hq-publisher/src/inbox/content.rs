//! What is in a drop: CSV or NDJSON rows, by column name, typed by the contract.

use super::csv::{Reader, is_utf_16};
use super::{Blame, FileError, Format};
use crate::source::{Problem, RowFault, RowSink, StoreList, StoreRow, key_for_people, match_columns};
use crate::source_db::convert::Raw;
use base64::Engine as _;
use proto::schema::{Column, Table};
use proto::value::{ColumnType, Value};
use serde::de::{self, DeserializeSeed, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, Read};

/// Reads a table's rows into the sink. `complete`: the sender said that the file is whole.
pub fn read_table(
    input: impl Read,
    format: Format,
    complete: bool,
    max: u64,
    table: &Table,
    sink: &mut dyn RowSink,
) -> Result<(), FileError> {
    match format {
        Format::Csv => read_csv(input, complete, max, table, sink),
        Format::Ndjson => read_ndjson(input, max, table, sink),
    }
}

fn read_csv(
    input: impl Read,
    complete: bool,
    max: u64,
    table: &Table,
    sink: &mut dyn RowSink,
) -> Result<(), FileError> {
    let mut csv = Reader::new(input, max)?;
    let wanted: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
    let (places, width) = header(&mut csv, complete, &wanted, &[])?;
    let places: Vec<usize> = places.into_iter().flatten().collect();
    while let Some(line) = csv.next()? {
        let fields: Vec<&[u8]> = csv.fields().collect();
        let fault = |key: String, column: Option<&Column>, problem: String| RowFault {
            table: table.name.clone(),
            line: Some(line),
            key,
            column: column.map(|c| c.name.clone()),
            problem,
        };
        if fields.len() != width {
            let problem = format!("the line has {} fields, the header has {width}", fields.len());
            sink.fault(fault(String::new(), None, problem))?;
        } else {
            let value = |i: usize| field(fields[places[i]], &table.columns[i]);
            let row: Result<Vec<_>, _> =
                (0..places.len()).map(|i| value(i).map_err(|Problem(p)| (&table.columns[i], p))).collect();
            match row {
                Ok(row) => sink.row(&row, Some(line))?,
                Err((column, problem)) => {
                    sink.fault(fault(key_for_people(table, |k| value(k).ok()), Some(column), problem))?;
                }
            }
        }
        ends_whole(&csv, complete, line)?;
    }
    Ok(())
}

/// The columns' places by name, and how many fields a line has.
fn header<R: Read>(
    csv: &mut Reader<R>,
    complete: bool,
    wanted: &[&str],
    optional: &[&str],
) -> Result<(Vec<Option<usize>>, usize), FileError> {
    let Some(line) = csv.next()? else {
        return Err(FileError::at(1, "the file is empty: not even a header line"));
    };
    let names: Vec<String> = csv.fields().map(|f| String::from_utf8_lossy(f).into_owned()).collect();
    if !(complete || csv.is_closed()) {
        let reason = "the header line has no line break, so that the file may be half-written: end it with one, or put NAME.ok beside the file when it is whole";
        return Err(FileError::at(line, reason));
    }
    let places = match_columns(&names, wanted, optional).map_err(|e| match names.as_slice() {
        [all] if all.contains([';', '\t']) => {
            FileError::at(line, format!("{}: fields are separated by commas", shown(all)))
        }
        _ => FileError::at(line, e),
    })?;
    Ok((places, names.len()))
}

/// A last line without a break may be cut anywhere in its last field: only the sender knows.
fn ends_whole<R: Read>(csv: &Reader<R>, complete: bool, line: u64) -> Result<(), FileError> {
    if complete || csv.is_closed() {
        return Ok(());
    }
    Err(FileError::at(
        line,
        "the last line has no line break, so that the file may be half-written: end it with one, or put NAME.ok beside the file when it is whole",
    ))
}

/// One CSV field as a value. Empty is NULL where the column may be, else an empty text.
fn field<'f>(bytes: &'f [u8], column: &Column) -> Result<Value<'f>, Problem> {
    if bytes.is_empty() && !column.not_null {
        return Ok(Value::Null);
    }
    let Raw::Text(text) = Raw::text(bytes)? else { return Ok(Value::Null) };
    match column.ty {
        ColumnType::Text => Raw::Text(text).fit(ColumnType::Text),
        ColumnType::Integer => integer(&text).map(Value::Int),
        ColumnType::Real => real(&text),
        ColumnType::Blob => blob(&text),
    }
}

fn shown(text: &str) -> String {
    Value::Text(Cow::Borrowed(text)).for_people()
}

/// Digits with at most a minus in front. A leading zero is a number that wants to be a text.
fn integer(text: &str) -> Result<i64, Problem> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if text.is_empty() {
        return Err(Problem::new("is empty, the contract has INTEGER NOT NULL"));
    }
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Problem::new(format!("is {}, which is no integer", shown(text))));
    }
    if digits.len() > 1 && digits.starts_with('0') {
        return Err(Problem::new(format!(
            "is {}: an INTEGER would lose the leading zero; make the column TEXT",
            shown(text)
        )));
    }
    text.parse().map_err(|_| Problem::new(format!("is {}, beyond a 64-bit signed integer", shown(text))))
}

/// From here on, 2^53, a real does not hold every whole number.
const WHOLE: f64 = 9_007_199_254_740_992.0;

/// Whether a real is not the number as it is written, beyond the digits after the point, which are rounded like any
/// real's. An exponent says that the number is no more exact than that.
fn is_rounded(text: &str, r: f64) -> bool {
    if r.abs() < WHOLE || text.contains(['e', 'E']) {
        return false;
    }
    let digits = text.trim_start_matches(['+', '-', '0']);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    whole != format!("{:.0}", r.abs()) || fraction.bytes().any(|b| b != b'0')
}

/// A decimal number with a point, and an exponent if need be; no comma, no inf, no nan.
fn real<'v>(text: &str) -> Result<Value<'v>, Problem> {
    let looks = !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.' | b'e' | b'E'))
        && text.bytes().any(|b| b.is_ascii_digit());
    match text.parse::<f64>() {
        Ok(r) if looks => match Value::real(r) {
            None => Err(Problem::new(format!("is {}, too great for a real", shown(text)))),
            Some(_) if is_rounded(text, r) => {
                Err(Problem::new(format!("is {}, which a REAL column would round", shown(text))))
            }
            Some(value) => Ok(value),
        },
        _ => Err(Problem::new(format!("is {}, which is no real number (write 12.5)", shown(text)))),
    }
}

fn blob<'v>(text: &str) -> Result<Value<'v>, Problem> {
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .map(|b| Value::Blob(b.into()))
        .map_err(|e| Problem::new(format!("is {}, which is not base64: {e}", shown(text))))
}

fn read_ndjson(input: impl Read, max: u64, table: &Table, sink: &mut dyn RowSink) -> Result<(), FileError> {
    let mut input = BufReader::with_capacity(256 << 10, input);
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        line.clear();
        let read = (&mut input).take(max.saturating_add(1)).read_until(b'\n', &mut line).map_err(FileError::read)?;
        if read == 0 {
            break;
        }
        number += 1;
        if read as u64 > max {
            return Err(FileError::at(number, format!("a line of more than limits.line_bytes = {max} bytes")));
        }
        let text = if number == 1 { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&line) } else { &line[..] };
        if number == 1 && is_utf_16(text) {
            return Err(FileError::at(1, FileError::UTF_16));
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        match object(text.strip_suffix(b"\n").unwrap_or(text), table) {
            Ok(row) => sink.row(&row, Some(number))?,
            Err(mut fault) => {
                fault.line = Some(number);
                sink.fault(fault)?;
            }
        }
    }
    if number == 0 {
        Err(FileError::at(1, "the file is empty: for a table without rows send one empty line"))
    } else {
        Ok(())
    }
}

/// One NDJSON line as a row.
fn object<'l>(line: &'l [u8], table: &Table) -> Result<Vec<Value<'l>>, RowFault> {
    let fault = |key: String, column: Option<&Column>, problem: String| RowFault {
        table: table.name.clone(),
        line: None,
        key,
        column: column.map(|c| c.name.clone()),
        problem,
    };
    let mut raw: Vec<Option<Raw<'l>>> = vec![None; table.columns.len()];
    let mut de = serde_json::Deserializer::from_slice(line);
    ObjectSeed { table, raw: &mut raw }
        .deserialize(&mut de)
        .and_then(|()| de.end())
        .map_err(|e| fault(String::new(), None, not_an_object(&e)))?;
    let value = |i: usize| -> Result<Value<'l>, Problem> {
        let column = &table.columns[i];
        match (raw[i].clone(), column.ty) {
            (None, _) if column.not_null => Err(Problem::new("is missing and may not be NULL")),
            (None, _) => Ok(Value::Null),
            (Some(Raw::Text(t)), ColumnType::Blob) => blob(&t),
            (Some(Raw::Text(t)), ColumnType::Integer | ColumnType::Real) => {
                let (text, ty) = (shown(&t), column.ty);
                Err(Problem::new(format!("is the text {text}, the contract has {ty}: write it without quotes")))
            }
            (Some(Raw::Int(_) | Raw::Uint(_) | Raw::Real(_)), ColumnType::Text) => {
                Err(Problem::new("is a number, the contract has TEXT: write it in quotes"))
            }
            (Some(Raw::Int(_) | Raw::Uint(_) | Raw::Real(_)), ColumnType::Blob) => {
                Err(Problem::new("is a number, the contract has BLOB: write base64 in quotes"))
            }
            (Some(Raw::Real(r)), ColumnType::Integer) if r.fract() != 0.0 => {
                Err(Problem::new(format!("is the real {r:?}, the contract has INTEGER (cents, not units)")))
            }
            // JSON's reader gives such numbers rounded already.
            (Some(raw @ Raw::Real(r)), ty) if r.abs() >= WHOLE => match written(line, column) {
                Some(text) if ty == ColumnType::Integer => integer(text).map(Value::Int),
                Some(text) => real(text),
                None => raw.fit(ty),
            },
            // The same of smaller ones, where more digits are written than a real holds.
            (Some(raw @ Raw::Real(_)), ColumnType::Integer) => match written(line, column) {
                Some(text) => whole(text)
                    .map(Value::Int)
                    .ok_or_else(|| Problem::new(format!("is {text}, the contract has INTEGER (cents, not units)"))),
                None => raw.fit(ColumnType::Integer),
            },
            (Some(raw), ty) => raw.fit(ty),
        }
    };
    (0..raw.len())
        .map(|i| {
            value(i).map_err(|Problem(p)| fault(key_for_people(table, |k| value(k).ok()), Some(&table.columns[i]), p))
        })
        .collect()
}

/// The whole number that a JSON number with a point or an exponent is, if it is one.
fn whole(text: &str) -> Option<i64> {
    let (decimal, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, fraction) = decimal.split_once('.').unwrap_or((decimal, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_end_matches('0');
    if significant.trim_start_matches(['-', '0']).is_empty() {
        return Some(0);
    }
    let zeros = i64::try_from(digits.len() - significant.len()).ok()? - i64::try_from(fraction.len()).ok()?;
    let power = exponent.parse::<i64>().ok()?.checked_add(zeros)?;
    significant.parse::<i64>().ok()?.checked_mul(10_i64.checked_pow(power.try_into().ok()?)?)
}

/// What the line says for a column, as it is written there.
fn written<'l>(line: &'l [u8], column: &Column) -> Option<&'l str> {
    let members: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(line).ok()?;
    members.get(column.name.as_str()).map(|v| v.get())
}

/// The reader counts lines from the one that it was given: its place in that is told.
fn not_an_object(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    let place = if e.column() > 0 { format!(" (byte {})", e.column()) } else { String::new() };
    format!("not a JSON object of the table's columns: {what}{place}")
}

struct ObjectSeed<'t, 'r, 'l> {
    table: &'t Table,
    raw: &'r mut Vec<Option<Raw<'l>>>,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_, '_, 'de> {
    type Value = ();
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_, '_, 'de> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a value for each column")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            let cut = || shown(&name);
            let i = self
                .table
                .column(&name)
                .ok_or_else(|| de::Error::custom(format_args!("column {} is not in the contract", cut())))?;
            let value = map.next_value_seed(Scalar)?;
            if self.raw[i].replace(value).is_some() {
                return Err(de::Error::custom(format_args!("column {} is there twice", cut())));
            }
        }
        Ok(())
    }
}

struct Scalar;

impl<'de> DeserializeSeed<'de> for Scalar {
    type Value = Raw<'de>;
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<Raw<'de>, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Scalar {
    type Value = Raw<'de>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, a string, true, false or null")
    }
    fn visit_unit<E: de::Error>(self) -> Result<Raw<'de>, E> {
        Ok(Raw::Null)
    }
    fn visit_bool<E: de::Error>(self, b: bool) -> Result<Raw<'de>, E> {
        Ok(Raw::Int(b.into()))
    }
    fn visit_i64<E: de::Error>(self, n: i64) -> Result<Raw<'de>, E> {
        Ok(Raw::Int(n))
    }
    fn visit_u64<E: de::Error>(self, n: u64) -> Result<Raw<'de>, E> {
        Ok(Raw::Uint(n))
    }
    fn visit_f64<E: de::Error>(self, r: f64) -> Result<Raw<'de>, E> {
        Ok(Raw::Real(r))
    }
    fn visit_borrowed_str<E: de::Error>(self, s: &'de str) -> Result<Raw<'de>, E> {
        Ok(Raw::Text(Cow::Borrowed(s)))
    }
    fn visit_str<E: de::Error>(self, s: &str) -> Result<Raw<'de>, E> {
        Ok(Raw::Text(Cow::Owned(s.to_owned())))
    }
}

/// Reads `stores.csv`: column `id`, and `zone` and `region` where there are any.
pub fn read_stores(input: impl Read, complete: bool, max: u64) -> Result<Vec<StoreRow>, FileError> {
    let mut csv = Reader::new(input, max)?;
    let (places, width) = header(&mut csv, complete, &["id", "zone", "region"], &["zone", "region"])?;
    let mut list = StoreList::default();
    while let Some(line) = csv.next()? {
        let fields: Vec<&[u8]> = csv.fields().collect();
        let text = |place: Option<usize>| place.map(|p| std::str::from_utf8(fields[p])).transpose();
        if fields.len() != width {
            list.unreadable(format!("line {line} has {} fields, the header has {width}", fields.len()));
        } else if let (Ok(id), Ok(zone), Ok(region)) = (text(places[0]), text(places[1]), text(places[2])) {
            list.push(id, zone, region);
        } else {
            list.unreadable(format!("line {line} is not UTF-8"));
        }
        ends_whole(&csv, complete, line)?;
    }
    list.finish().map_err(|e| FileError { line: None, reason: e.to_string(), blame: Blame::File })
}

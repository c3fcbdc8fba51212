//! A row of each driver, column by column. The wire's own formats are read here, so that no
//! driver's conversion can round or guess.

use super::convert::Raw;
use super::times::{self, SourceZone};
use crate::source::Problem;
use jiff::SignedDuration;
use jiff::civil::{Date, DateTime, Time};
use jiff::tz::Offset;
use rusqlite::types::ValueRef;
use sqlx::mysql::MySqlRow;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgRow, PgTypeKind, PgValueFormat};
use sqlx::{Decode, MySql, Row, Type, TypeInfo, ValueRef as _};
use std::borrow::Cow;

/// By what a row's times are understood.
#[derive(Debug, Clone)]
pub struct Session {
    /// By this those without a zone.
    pub zone: SourceZone,
    /// By this MySQL's TIMESTAMPs, which come in the session's zone and do not say so.
    pub offset: Offset,
}

/// The values of a row by their place in the query.
pub trait Fields {
    /// The value at a place.
    fn raw(&self, place: usize, session: &Session) -> Result<Raw<'_>, Problem>;
}

fn owned<'r>(text: String) -> Raw<'r> {
    Raw::Text(text.into())
}

fn unreadable(e: impl std::fmt::Display) -> Problem {
    Problem::new(format!("cannot be read: {e}"))
}

fn unsupported(type_name: &str) -> Problem {
    Problem::new(format!("has the type {type_name}, which is not supported: cast it to text in the query"))
}

fn broken() -> Problem {
    Problem::new("has a length that does not fit its type")
}

impl Fields for rusqlite::Row<'_> {
    fn raw(&self, place: usize, _: &Session) -> Result<Raw<'_>, Problem> {
        // What is stored counts, not what the column was declared as.
        match self.get_ref(place).map_err(unreadable)? {
            ValueRef::Null => Ok(Raw::Null),
            ValueRef::Integer(i) => Ok(Raw::Int(i)),
            ValueRef::Real(r) => Ok(Raw::Real(r)),
            ValueRef::Text(t) => Raw::text(t),
            ValueRef::Blob(b) => Ok(Raw::Bytes(b)),
        }
    }
}

impl Fields for PgRow {
    fn raw(&self, place: usize, session: &Session) -> Result<Raw<'_>, Problem> {
        let v = self.try_get_raw(place).map_err(unreadable)?;
        if v.is_null() {
            return Ok(Raw::Null);
        }
        let b = v.as_bytes().map_err(unreadable)?;
        let ty = v.type_info();
        if v.format() != PgValueFormat::Binary {
            return Err(unsupported(ty.name()));
        }
        match ty.name() {
            "BOOL" => Ok(Raw::Int(i64::from(be::<1>(b)?[0] != 0))),
            "INT2" => Ok(Raw::Int(i16::from_be_bytes(be(b)?).into())),
            "INT4" => Ok(Raw::Int(i32::from_be_bytes(be(b)?).into())),
            "INT8" => Ok(Raw::Int(i64::from_be_bytes(be(b)?))),
            "OID" => Ok(Raw::Int(Oid(u32::from_be_bytes(be(b)?)).0.into())),
            "FLOAT4" => Ok(Raw::Real(f32::from_be_bytes(be(b)?).into())),
            "FLOAT8" => Ok(Raw::Real(f64::from_be_bytes(be(b)?))),
            "NUMERIC" => pg_numeric(b),
            "TEXT" | "VARCHAR" | "CHAR" | "NAME" | "UNKNOWN" | "JSON" | "\"CHAR\"" | "citext" => Raw::text(b),
            "JSONB" => Raw::text(b.strip_prefix(&[1]).ok_or_else(broken)?),
            "BYTEA" => Ok(Raw::Bytes(b)),
            "UUID" => Ok(owned(uuid(be(b)?))),
            "DATE" => pg_date(i32::from_be_bytes(be(b)?)),
            "TIME" => pg_time(i64::from_be_bytes(be(b)?)),
            "TIMESTAMP" => Ok(owned(session.zone.utc(pg_timestamp(i64::from_be_bytes(be(b)?))?))),
            "TIMESTAMPTZ" => Ok(owned(times::utc(pg_timestamp(i64::from_be_bytes(be(b)?))?))),
            _ if matches!(ty.kind(), PgTypeKind::Enum(_)) => Raw::text(b),
            other => Err(unsupported(other)),
        }
    }
}

fn be<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Problem> {
    bytes.try_into().map_err(|_| broken())
}

fn uuid(b: [u8; 16]) -> String {
    let h = hex::encode(b);
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// Base-10,000 digits, the place of the first, a sign, and digits after the point.
fn pg_numeric<'r>(b: &[u8]) -> Result<Raw<'r>, Problem> {
    let short = |i: usize| b.get(i * 2..i * 2 + 2).map(|s| i16::from_be_bytes([s[0], s[1]])).ok_or_else(broken);
    let (count, weight, sign, scale) = (short(0)?, short(1)?, short(2)? as u16, short(3)?);
    let negative = match sign {
        0x0000 => false,
        0x4000 => true,
        _ => return Err(Problem::new("is NaN or infinite, which is no number")),
    };
    let group = |i: i32| match usize::try_from(i) {
        Ok(i) if i < usize::try_from(count).unwrap_or(0) => short(4 + i),
        _ => Ok(0),
    };
    let mut text = String::new();
    if negative {
        text.push('-');
    }
    if weight < 0 {
        text.push('0');
    }
    for i in 0..=i32::from(weight) {
        let digits = group(i)?;
        text.push_str(&if i == 0 { digits.to_string() } else { format!("{digits:04}") });
    }
    if scale > 0 {
        let mut fraction = String::new();
        let mut i = i32::from(weight) + 1;
        while fraction.len() < scale as usize {
            fraction.push_str(&format!("{:04}", group(i)?));
            i += 1;
        }
        text.push('.');
        text.push_str(&fraction[..scale as usize]);
    }
    Ok(Raw::Decimal(text.into()))
}

const INFINITE: &str = "is infinite, which is no time";
/// Where PostgreSQL counts from.
const PG_EPOCH: Date = jiff::civil::date(2000, 1, 1);

fn pg_timestamp(us: i64) -> Result<DateTime, Problem> {
    if us == i64::MAX || us == i64::MIN {
        return Err(Problem::new(INFINITE));
    }
    PG_EPOCH
        .to_datetime(Time::midnight())
        .checked_add(SignedDuration::from_micros(us))
        .map_err(|_| Problem::new("is a time beyond the years -9999 to 9999"))
}

fn pg_date<'r>(days: i32) -> Result<Raw<'r>, Problem> {
    if days == i32::MAX || days == i32::MIN {
        return Err(Problem::new(INFINITE));
    }
    PG_EPOCH
        .checked_add(jiff::Span::new().try_days(days).map_err(unreadable)?)
        .map(|d| Raw::Text(d.to_string().into()))
        .map_err(|_| Problem::new("is a date beyond the years -9999 to 9999"))
}

fn pg_time<'r>(us: i64) -> Result<Raw<'r>, Problem> {
    if us == 86_400_000_000 {
        return Ok(Raw::Text("24:00:00".into()));
    }
    Time::midnight()
        .checked_add(SignedDuration::from_micros(us))
        .map(|t| Raw::Text(t.to_string().into()))
        .map_err(unreadable)
}

impl Fields for MySqlRow {
    fn raw(&self, place: usize, session: &Session) -> Result<Raw<'_>, Problem> {
        let v = self.try_get_raw(place).map_err(unreadable)?;
        let ty = v.type_info().into_owned();
        // Not `is_null`: that takes the date 0000-00-00 for NULL.
        let Ok(b) = <&[u8] as Decode<MySql>>::decode(v) else { return Ok(Raw::Null) };
        match ty.name() {
            // A TINYINT(1) has this name whether it has a sign or not.
            "BOOLEAN" if <u8 as Type<MySql>>::compatible(&ty) => Ok(Raw::Uint(little(b)?)),
            "BOOLEAN" | "TINYINT" | "SMALLINT" | "MEDIUMINT" | "INT" | "BIGINT" => Ok(Raw::Int(little_signed(b)?)),
            "TINYINT UNSIGNED" | "SMALLINT UNSIGNED" | "MEDIUMINT UNSIGNED" | "INT UNSIGNED" | "BIGINT UNSIGNED"
            | "YEAR" => Ok(Raw::Uint(little(b)?)),
            "BIT" => Ok(Raw::Uint(b.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte)))),
            "FLOAT" => Ok(Raw::Real(f32::from_le_bytes(be(b)?).into())),
            "DOUBLE" => Ok(Raw::Real(f64::from_le_bytes(be(b)?))),
            "DECIMAL" => match Raw::text(b)? {
                Raw::Text(t) => Ok(Raw::Decimal(t)),
                other => Ok(other),
            },
            "CHAR" | "VARCHAR" | "TINYTEXT" | "TEXT" | "MEDIUMTEXT" | "LONGTEXT" | "ENUM" | "SET" | "JSON" => {
                Raw::text(b)
            }
            // Text of a `_bin` collation has these names too (MariaDB's JSON for one).
            "BINARY" | "VARBINARY" | "TINYBLOB" | "BLOB" | "MEDIUMBLOB" | "LONGBLOB" => {
                if <str as Type<MySql>>::compatible(&ty) {
                    Raw::text(b)
                } else {
                    Ok(Raw::Bytes(b))
                }
            }
            "DATE" => Ok(Raw::Text(my_date(b)?.to_string().into())),
            "DATETIME" => Ok(owned(session.zone.utc(my_datetime(b)?))),
            "TIMESTAMP" => {
                let ahead = SignedDuration::from_secs(session.offset.seconds().into());
                my_datetime(b)?.checked_sub(ahead).map(|at| owned(times::utc(at))).map_err(unreadable)
            }
            "TIME" => my_time(b),
            "NULL" => Ok(Raw::Null),
            other => Err(unsupported(other)),
        }
    }
}

fn little(b: &[u8]) -> Result<u64, Problem> {
    if b.is_empty() || b.len() > 8 {
        return Err(broken());
    }
    Ok(b.iter().rev().fold(0, |n, byte| (n << 8) | u64::from(*byte)))
}

fn little_signed(b: &[u8]) -> Result<i64, Problem> {
    let unused = 64 - 8 * u32::try_from(b.len()).map_err(unreadable)?.min(8);
    Ok(((little(b)? << unused) as i64) >> unused)
}

/// Length, year (2 bytes), month, day; a length of 0 is 0000-00-00.
fn my_date(b: &[u8]) -> Result<Date, Problem> {
    let &[_, y0, y1, month, day, ..] = b else {
        return Err(Problem::new("is the date 0000-00-00, which is none: use NULLIF in the query"));
    };
    let year = i16::from_le_bytes([y0, y1]);
    Date::new(year, month as i8, day as i8)
        .map_err(|_| Problem::new(format!("is {year:04}-{month:02}-{day:02}, which is no date")))
}

fn my_clock(b: &[u8]) -> Result<Time, Problem> {
    let (h, m, s, us) = match *b {
        [] => (0, 0, 0, 0),
        [h, m, s] => (h, m, s, 0),
        [h, m, s, a, b, c, d] => (h, m, s, u32::from_le_bytes([a, b, c, d])),
        _ => return Err(broken()),
    };
    let ns = i32::try_from(us).ok().and_then(|us| us.checked_mul(1000)).ok_or_else(broken)?;
    Time::new(h as i8, m as i8, s as i8, ns).map_err(unreadable)
}

fn my_datetime(b: &[u8]) -> Result<DateTime, Problem> {
    Ok(my_date(b)?.to_datetime(my_clock(b.get(5..).unwrap_or(&[]))?))
}

/// Length, sign, days (4 bytes), h, m, s, µs (4 bytes): a span, not a time of day.
fn my_time<'r>(b: &[u8]) -> Result<Raw<'r>, Problem> {
    let (sign, days, clock) = match b {
        [_] => (0, 0, &b[1..]),
        [_, sign, d0, d1, d2, d3, clock @ ..] => (*sign, u32::from_le_bytes([*d0, *d1, *d2, *d3]), clock),
        _ => return Err(broken()),
    };
    let t = my_clock(clock)?;
    let hours = u64::from(days) * 24 + t.hour().unsigned_abs() as u64;
    let mut text: Cow<'_, str> =
        format!("{}{hours:02}:{:02}:{:02}", if sign == 1 { "-" } else { "" }, t.minute(), t.second()).into();
    if t.subsec_nanosecond() > 0 {
        let us = format!(".{:06}", t.subsec_nanosecond() / 1000);
        text.to_mut().push_str(us.trim_end_matches('0'));
    }
    Ok(Raw::Text(text.into_owned().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numeric(digits: &[i16], weight: i16, sign: u16, scale: i16) -> String {
        let mut b = Vec::new();
        for n in [digits.len() as i16, weight, sign as i16, scale].iter().chain(digits) {
            b.extend_from_slice(&n.to_be_bytes());
        }
        match pg_numeric(&b) {
            Ok(Raw::Decimal(d)) => d.into_owned(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn numerics_keep_every_digit() {
        assert_eq!(numeric(&[12, 3400], 0, 0, 2), "12.34");
        assert_eq!(numeric(&[1, 0, 5], 2, 0x4000, 0), "-100000005");
        assert_eq!(numeric(&[1], 2, 0, 3), "100000000.000");
        assert_eq!(numeric(&[5], -2, 0, 6), "0.000005".to_owned().replace("000005", "000000")[..].to_owned());
        assert_eq!(numeric(&[500], -2, 0, 6), "0.000005");
        assert_eq!(numeric(&[], 0, 0, 0), "0");
        assert!(numeric(&[], 0, 0xC000, 0).contains("NaN"));
    }

    #[test]
    fn times_are_iso_8601_in_utc() {
        let text = |r: Result<Raw<'static>, Problem>| match r {
            Ok(Raw::Text(t)) => t.into_owned(),
            other => format!("{other:?}"),
        };
        let utc = |at| owned(times::utc(at));
        assert_eq!(text(pg_timestamp(0).map(utc)), "2000-01-01T00:00:00Z");
        assert_eq!(text(pg_timestamp(1_500_000).map(utc)), "2000-01-01T00:00:01.5Z");
        assert!(text(pg_timestamp(i64::MAX).map(utc)).contains("infinite"));
        assert_eq!(text(pg_date(-1)), "1999-12-31");
        assert_eq!(text(pg_time(3_661_000_001)), "01:01:01.000001");
        assert_eq!(text(my_datetime(&[4, 0xEA, 0x07, 2, 28]).map(utc)), "2026-02-28T00:00:00Z");
        assert_eq!(text(my_datetime(&[7, 0xEA, 0x07, 2, 28, 23, 59, 1]).map(utc)), "2026-02-28T23:59:01Z");
        assert!(text(my_datetime(&[0]).map(utc)).contains("0000-00-00"));
        assert!(text(my_datetime(&[4, 0xEA, 0x07, 2, 0]).map(utc)).contains("no date"));
        let for_ever = [7, 0x0F, 0x27, 12, 31, 23, 59, 59];
        assert_eq!(text(my_datetime(&for_ever).map(utc)), "9999-12-31T23:59:59Z");
        assert_eq!(text(pg_timestamp(252_455_615_999_999_999).map(utc)), "9999-12-31T23:59:59.999999Z");
        assert!(text(pg_timestamp(252_455_616_000_000_000).map(utc)).contains("beyond the years"));
        assert_eq!(text(my_time(&[8, 1, 1, 0, 0, 0, 2, 3, 4])), "-26:03:04");
        assert_eq!(text(my_time(&[0])), "00:00:00");
    }

    #[test]
    fn integers_of_every_width_keep_their_sign() {
        assert_eq!(little_signed(&[0xFF]).unwrap(), -1);
        assert_eq!(little_signed(&[0, 0x80]).unwrap(), -32768);
        assert_eq!(little_signed(&i64::MIN.to_le_bytes()).unwrap(), i64::MIN);
        assert_eq!(little(&u64::MAX.to_le_bytes()).unwrap(), u64::MAX);
    }
}

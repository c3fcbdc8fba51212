//! From what a driver gave to what a contract's column takes, exactly or not at all.

use crate::source::Problem;
use proto::value::{ColumnType, Value};
use std::borrow::Cow;

/// A value as a driver gave it, before the contract has its say.
#[derive(Debug, Clone, PartialEq)]
pub enum Raw<'r> {
    /// SQL NULL.
    Null,
    /// Integers of any width, booleans.
    Int(i64),
    /// Unsigned integers.
    Uint(u64),
    /// Floats.
    Real(f64),
    /// NUMERIC and DECIMAL, as exact text.
    Decimal(Cow<'r, str>),
    /// Text; also times, UUIDs, JSON and enums.
    Text(Cow<'r, str>),
    /// Bytes.
    Bytes(&'r [u8]),
}

impl<'r> Raw<'r> {
    /// Text from bytes that should be UTF-8.
    pub fn text(bytes: &'r [u8]) -> Result<Self, Problem> {
        std::str::from_utf8(bytes)
            .map(|t| Raw::Text(Cow::Borrowed(t)))
            .map_err(|e| Problem::new(format!("is not UTF-8 (byte {})", e.valid_up_to() + 1)))
    }

    /// The value for a column of this type; what would lose or guess is a problem with its remedy.
    pub fn fit(self, ty: ColumnType) -> Result<Value<'r>, Problem> {
        match (self, ty) {
            (Raw::Null, _) => Ok(Value::Null),
            (Raw::Int(i), ColumnType::Integer) => Ok(Value::Int(i)),
            (Raw::Uint(u), ColumnType::Integer) => i64::try_from(u)
                .map(Value::Int)
                .map_err(|_| Problem::new(format!("is {u}, beyond a 64-bit signed integer"))),
            (Raw::Int(i), ColumnType::Real) => exact_real(i128::from(i)),
            (Raw::Uint(u), ColumnType::Real) => exact_real(i128::from(u)),
            (Raw::Int(i), ColumnType::Text) => Ok(Value::Text(i.to_string().into())),
            (Raw::Uint(u), ColumnType::Text) => Ok(Value::Text(u.to_string().into())),
            (Raw::Real(r), ColumnType::Real) => Value::real(r).ok_or_else(|| not_finite(r)),
            (Raw::Real(r), ColumnType::Integer) => integral(r),
            (Raw::Decimal(d), ColumnType::Text) => Ok(Value::Text(d)),
            (Raw::Decimal(d), ColumnType::Integer) => integral_decimal(&d),
            (Raw::Text(t), ColumnType::Text) => match t.find('\0') {
                Some(at) => Err(Problem::new(format!("has a NUL character (byte {})", at + 1))),
                None => Ok(Value::Text(t)),
            },
            (Raw::Bytes(b), ColumnType::Blob) => Ok(Value::Blob(Cow::Borrowed(b))),
            (raw, ty) => Err(raw.mismatch(ty)),
        }
    }

    fn mismatch(self, ty: ColumnType) -> Problem {
        let (is, remedy) = match self {
            Raw::Null => ("NULL".to_owned(), ""),
            Raw::Int(i) => (format!("the integer {i}"), "cast it in the query"),
            Raw::Uint(u) => (format!("the integer {u}"), "cast it in the query"),
            Raw::Real(r) => (format!("the real {r:?}"), "round or cast it in the query"),
            Raw::Decimal(d) => (
                format!("the decimal {d}"),
                "take it into a TEXT column exactly, or scale it to an integer in the query",
            ),
            Raw::Text(t) => (format!("the text {}", Value::Text(t).for_people()), "cast it in the query"),
            Raw::Bytes(b) => (format!("a blob of {} bytes", b.len()), "cast or encode it in the query"),
        };
        Problem::new(format!("is {is}, the contract has {ty}: {remedy}"))
    }
}

fn not_finite(r: f64) -> Problem {
    Problem::new(format!("is {r}, which is no number"))
}

/// 2^63, exactly.
const TWO_63: f64 = 9_223_372_036_854_775_808.0;

fn exact_real<'r>(n: i128) -> Result<Value<'r>, Problem> {
    let r = n as f64;
    if r as i128 == n {
        Ok(Value::Real(r))
    } else {
        Err(Problem::new(format!("is the integer {n}, which a REAL column would round")))
    }
}

fn integral<'r>(r: f64) -> Result<Value<'r>, Problem> {
    if !r.is_finite() {
        return Err(not_finite(r));
    }
    if r.fract() != 0.0 {
        return Err(Problem::new(format!(
            "is the real {r:?}, the contract has INTEGER: scale or round it in the query"
        )));
    }
    if !(-TWO_63..TWO_63).contains(&r) {
        return Err(Problem::new(format!("is {r:?}, beyond a 64-bit signed integer")));
    }
    Ok(Value::Int(r as i64))
}

fn integral_decimal<'r>(d: &str) -> Result<Value<'r>, Problem> {
    let (whole, fraction) = d.split_once('.').unwrap_or((d, ""));
    if fraction.bytes().any(|b| b != b'0') {
        return Err(Problem::new(format!(
            "is the decimal {d}, the contract has INTEGER: scale it in the query (cents, not units)"
        )));
    }
    match whole.parse() {
        Ok(i) => Ok(Value::Int(i)),
        Err(_) => Err(Problem::new(format!("is {d}, beyond a 64-bit signed integer"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ColumnType::{Blob, Integer, Real, Text};

    #[test]
    fn values_fit_exactly_or_are_refused_with_the_remedy() {
        let ok = |raw: Raw<'static>, ty| raw.fit(ty).unwrap();
        assert_eq!(ok(Raw::Uint(7), Integer), Value::Int(7));
        assert_eq!(ok(Raw::Int(7), Text), Value::Text("7".into()));
        assert_eq!(ok(Raw::Int(7), Real), Value::Real(7.0));
        assert_eq!(ok(Raw::Real(-0.0), Real), Value::Real(0.0));
        assert_eq!(ok(Raw::Real(3.0), Integer), Value::Int(3));
        assert_eq!(ok(Raw::Real(-TWO_63), Integer), Value::Int(i64::MIN));
        assert_eq!(ok(Raw::Decimal("12.00".into()), Integer), Value::Int(12));
        assert_eq!(ok(Raw::Decimal("12.00".into()), Text), Value::Text("12.00".into()));
        assert_eq!(ok(Raw::Null, Blob), Value::Null);
        for (raw, ty, part) in [
            (Raw::Uint(u64::MAX), Integer, "beyond"),
            (Raw::Int((1 << 53) + 1), Real, "round"),
            (Raw::Real(f64::NAN), Real, "NaN"),
            (Raw::Real(f64::INFINITY), Integer, "inf"),
            (Raw::Real(1.5), Integer, "scale"),
            (Raw::Real(TWO_63), Integer, "beyond"),
            (Raw::Real(1.5), Text, "cast"),
            (Raw::Decimal("12.34".into()), Integer, "cents"),
            (Raw::Decimal("12.34".into()), Real, "TEXT column"),
            (Raw::Decimal("99999999999999999999".into()), Integer, "beyond"),
            (Raw::Text("12".into()), Integer, "the text \"12\""),
            (Raw::Text("a\0b".into()), Text, "NUL"),
            (Raw::Bytes(b"x"), Text, "blob of 1 bytes"),
            (Raw::Text("x".into()), Blob, "BLOB"),
        ] {
            let e = raw.clone().fit(ty).unwrap_err().0;
            assert!(e.contains(part), "{raw:?} into {ty}: {e}");
        }
        assert!(Raw::text(b"ab\xff").unwrap_err().0.contains("byte 3"));
    }
}

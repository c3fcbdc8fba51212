//! Values as SQLite stores them, their JSON form in a pack, and their canonical bytes.

use serde::de::{self, DeserializeSeed, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;

/// A column's type in a contract. STRICT tables know a few names more; these are their classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    /// 64-bit signed integer (`INT`, `INTEGER`).
    Integer,
    /// 64-bit float; finite (JSON has no word for the others).
    Real,
    /// UTF-8 text without NUL.
    Text,
    /// Bytes; base64 in a pack.
    Blob,
}

impl fmt::Display for ColumnType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ColumnType::Integer => "INTEGER",
            ColumnType::Real => "REAL",
            ColumnType::Text => "TEXT",
            ColumnType::Blob => "BLOB",
        })
    }
}

/// One value, borrowed from a line or a database row where it can be.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// SQL NULL.
    Null,
    /// A 64-bit integer.
    Int(i64),
    /// A float; never NaN or infinite, never -0.0 (SQLite stores 0.0).
    Real(f64),
    /// Text.
    Text(Cow<'a, str>),
    /// Bytes.
    Blob(Cow<'a, [u8]>),
}

/// A value that owns its bytes.
pub type OwnedValue = Value<'static>;

impl Value<'_> {
    /// A copy that owns its bytes.
    pub fn into_owned(self) -> OwnedValue {
        match self {
            Value::Null => Value::Null,
            Value::Int(i) => Value::Int(i),
            Value::Real(r) => Value::Real(r),
            Value::Text(t) => Value::Text(Cow::Owned(t.into_owned())),
            Value::Blob(b) => Value::Blob(Cow::Owned(b.into_owned())),
        }
    }

    /// Whether a column of this type may hold the value (NULL fits every type here).
    pub fn fits(&self, ty: ColumnType) -> bool {
        matches!(
            (self, ty),
            (Value::Null, _)
                | (Value::Int(_), ColumnType::Integer)
                | (Value::Real(_), ColumnType::Real)
                | (Value::Text(_), ColumnType::Text)
                | (Value::Blob(_), ColumnType::Blob)
        )
    }

    /// Appends the canonical form that row hashes are made of (docs/FORMAT.md, "Canonical row").
    pub fn canonical(&self, out: &mut Vec<u8>) {
        fn sized(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
            out.push(tag);
            // A line is bounded to far less than 4 GiB (limits::Limits::line_bytes).
            out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
            out.extend_from_slice(bytes);
        }
        match self {
            Value::Null => out.push(b'N'),
            Value::Int(i) => {
                out.push(b'I');
                out.extend_from_slice(&i.to_be_bytes());
            }
            Value::Real(r) => {
                out.push(b'R');
                out.extend_from_slice(&r.to_be_bytes());
            }
            Value::Text(t) => sized(out, b'T', t.as_bytes()),
            Value::Blob(b) => sized(out, b'B', b),
        }
    }

    /// Appends the JSON form: numbers, strings, null; blobs as base64 text.
    pub fn write_json(&self, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
        match self {
            Value::Null => out.extend_from_slice(b"null"),
            Value::Int(i) => serde_json::to_writer(out, i)?,
            Value::Real(r) => serde_json::to_writer(out, r)?,
            Value::Text(t) => serde_json::to_writer(out, t.as_ref())?,
            Value::Blob(b) => {
                use base64::Engine as _;
                let text = base64::engine::general_purpose::STANDARD.encode(b);
                serde_json::to_writer(out, &text)?;
            }
        }
        Ok(())
    }

    /// A short form for people: text is quoted and cut to 60 characters.
    pub fn for_people(&self) -> String {
        match self {
            Value::Null => "NULL".into(),
            Value::Int(i) => i.to_string(),
            Value::Real(r) => format!("{r:?}"),
            Value::Text(t) => {
                let cut: String = t.chars().take(60).collect();
                let dots = if cut.len() < t.len() { "…" } else { "" };
                format!("{cut:?}{dots}")
            }
            Value::Blob(b) => format!("blob of {} bytes", b.len()),
        }
    }
}

impl<'a> Value<'a> {
    /// The value that SQLite would give back for a stored one. NaN and infinities have none.
    pub fn real(r: f64) -> Option<Value<'a>> {
        // SQLite keeps integral reals as integers on disk, so that -0.0 comes back as 0.0.
        r.is_finite().then_some(Value::Real(if r == 0.0 { 0.0 } else { r }))
    }
}

impl<'a> From<rusqlite::types::ValueRef<'a>> for Value<'a> {
    /// Text that is not UTF-8 cannot come from a replica (it was checked when written); should a
    /// hand have put it there, the lossy copy changes the digest, so that it is found as drift.
    fn from(v: rusqlite::types::ValueRef<'a>) -> Self {
        use rusqlite::types::ValueRef;
        match v {
            ValueRef::Null => Value::Null,
            ValueRef::Integer(i) => Value::Int(i),
            ValueRef::Real(r) => Value::Real(r),
            // from_utf8 is several times faster than the lossy reader, and all but always enough.
            ValueRef::Text(t) => {
                Value::Text(std::str::from_utf8(t).map_or_else(|_| String::from_utf8_lossy(t), Cow::Borrowed))
            }
            ValueRef::Blob(b) => Value::Blob(Cow::Borrowed(b)),
        }
    }
}

impl rusqlite::ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        use rusqlite::types::{ToSqlOutput, ValueRef};
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => ValueRef::Null,
            Value::Int(i) => ValueRef::Integer(*i),
            Value::Real(r) => ValueRef::Real(*r),
            Value::Text(t) => ValueRef::Text(t.as_bytes()),
            Value::Blob(b) => ValueRef::Blob(b),
        }))
    }
}

/// Appends a row as a JSON array and a newline.
pub fn write_row(row: &[Value<'_>], out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    out.push(b'[');
    for (i, v) in row.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        v.write_json(out)?;
    }
    out.extend_from_slice(b"]\n");
    Ok(())
}

/// Reads a JSON array of exactly `types.len()` values of these types. Text without escapes is
/// borrowed from the line. Anything else in the line is an error that tells position and want.
pub fn read_row<'a>(line: &'a [u8], types: &[ColumnType], row: &mut Vec<Value<'a>>) -> Result<(), serde_json::Error> {
    row.clear();
    let mut de = serde_json::Deserializer::from_slice(line);
    RowSeed { types, row }.deserialize(&mut de)?;
    de.end()
}

/// Rows in their canonical form, to be handed from thread to thread.
#[derive(Debug, Default)]
pub struct Rows {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Rows {
    /// Adds a row; gives its canonical form.
    pub fn push(&mut self, row: &[Value<'_>]) -> &[u8] {
        let start = self.bytes.len();
        row.iter().for_each(|v| v.canonical(&mut self.bytes));
        self.ends.push(self.bytes.len());
        &self.bytes[start..]
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
    /// What they take.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
    /// Each row's canonical form, for [`from_canonical`].
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }
}

/// The values of a canonical form, borrowed from it; `None` if it is none.
pub fn from_canonical(bytes: &[u8], columns: usize) -> Option<Vec<Value<'_>>> {
    fn sized<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (value, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        *rest = after;
        Some(value)
    }
    fn eight(rest: &mut &[u8]) -> Option<[u8; 8]> {
        let (value, after) = rest.split_first_chunk::<8>()?;
        *rest = after;
        Some(*value)
    }
    let mut row = Vec::with_capacity(columns);
    let mut rest = bytes;
    while let Some((tag, after)) = rest.split_first() {
        rest = after;
        row.push(match tag {
            b'N' => Value::Null,
            b'I' => Value::Int(i64::from_be_bytes(eight(&mut rest)?)),
            b'R' => Value::Real(f64::from_be_bytes(eight(&mut rest)?)),
            b'T' => Value::Text(Cow::Borrowed(std::str::from_utf8(sized(&mut rest)?).ok()?)),
            b'B' => Value::Blob(Cow::Borrowed(sized(&mut rest)?)),
            _ => return None,
        });
    }
    (row.len() == columns).then_some(row)
}

struct RowSeed<'t, 'r, 'a> {
    types: &'t [ColumnType],
    row: &'r mut Vec<Value<'a>>,
}

impl<'de> DeserializeSeed<'de> for RowSeed<'_, '_, 'de> {
    type Value = ();
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for RowSeed<'_, '_, 'de> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of {} values", self.types.len())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        for (i, ty) in self.types.iter().enumerate() {
            match seq.next_element_seed(ValueSeed(*ty))? {
                Some(v) => self.row.push(v),
                None => return Err(de::Error::invalid_length(i, &self)),
            }
        }
        if seq.next_element::<de::IgnoredAny>()?.is_some() {
            return Err(de::Error::invalid_length(self.types.len() + 1, &self));
        }
        Ok(())
    }
}

struct ValueSeed(ColumnType);

impl<'de> DeserializeSeed<'de> for ValueSeed {
    type Value = Value<'de>;
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> Result<Value<'de>, D::Error> {
        d.deserialize_any(self)
    }
}

impl ValueSeed {
    fn text<E: de::Error>(&self, t: Cow<'_, str>) -> Result<(), E> {
        match self.0 {
            ColumnType::Text if t.contains('\0') => Err(E::custom("a NUL character in a text")),
            ColumnType::Text | ColumnType::Blob => Ok(()),
            _ => Err(E::invalid_type(de::Unexpected::Str(&t), self)),
        }
    }
    fn blob<'a, E: de::Error>(t: &str) -> Result<Value<'a>, E> {
        use base64::Engine as _;
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(t)
            .map_err(|e| E::custom(format_args!("a blob that is not base64: {e}")))?;
        Ok(Value::Blob(Cow::Owned(bytes)))
    }
}

impl<'de> Visitor<'de> for ValueSeed {
    type Value = Value<'de>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value of type {} or null", self.0)
    }
    fn visit_unit<E: de::Error>(self) -> Result<Value<'de>, E> {
        Ok(Value::Null)
    }
    fn visit_i64<E: de::Error>(self, n: i64) -> Result<Value<'de>, E> {
        match self.0 {
            ColumnType::Integer => Ok(Value::Int(n)),
            ColumnType::Real => Ok(Value::Real(n as f64)),
            _ => Err(E::invalid_type(de::Unexpected::Signed(n), &self)),
        }
    }
    fn visit_u64<E: de::Error>(self, n: u64) -> Result<Value<'de>, E> {
        match (i64::try_from(n), self.0) {
            (Ok(n), _) => self.visit_i64(n),
            (Err(_), ColumnType::Real) => Ok(Value::Real(n as f64)),
            _ => Err(E::custom(format_args!("{n} is beyond a 64-bit signed integer"))),
        }
    }
    fn visit_f64<E: de::Error>(self, r: f64) -> Result<Value<'de>, E> {
        match self.0 {
            ColumnType::Real => Value::real(r).ok_or_else(|| E::custom("a real that is not finite")),
            _ => Err(E::invalid_type(de::Unexpected::Float(r), &self)),
        }
    }
    fn visit_borrowed_str<E: de::Error>(self, s: &'de str) -> Result<Value<'de>, E> {
        self.text(Cow::Borrowed(s))?;
        if self.0 == ColumnType::Blob { Self::blob(s) } else { Ok(Value::Text(Cow::Borrowed(s))) }
    }
    fn visit_str<E: de::Error>(self, s: &str) -> Result<Value<'de>, E> {
        self.text(Cow::Borrowed(s))?;
        if self.0 == ColumnType::Blob { Self::blob(s) } else { Ok(Value::Text(Cow::Owned(s.to_owned()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TYPES: [ColumnType; 4] = [ColumnType::Integer, ColumnType::Real, ColumnType::Text, ColumnType::Blob];

    fn round_trip(row: &[OwnedValue]) -> Vec<OwnedValue> {
        let mut line = Vec::new();
        write_row(row, &mut line).unwrap();
        let mut back = Vec::new();
        read_row(&line, &TYPES, &mut back).unwrap();
        back.into_iter().map(Value::into_owned).collect()
    }

    proptest! {
        #[test]
        fn any_row_comes_back_to_the_bit(
            i: i64,
            r in proptest::num::f64::NORMAL | proptest::num::f64::SUBNORMAL | proptest::num::f64::ZERO,
            t in "[^\0]*",
            b: Vec<u8>,
        ) {
            let row = [Value::Int(i), Value::real(r).unwrap(), Value::Text(t.into()), Value::Blob(b.into())];
            prop_assert_eq!(round_trip(&row), row.to_vec());
            let mut rows = Rows::default();
            let canonical = rows.push(&row).to_vec();
            rows.push(&[]);
            prop_assert_eq!(rows.iter().collect::<Vec<_>>(), [&canonical[..], &[]]);
            prop_assert_eq!(rows.bytes(), canonical.len());
            prop_assert_eq!(from_canonical(&canonical, 4).unwrap(), row.to_vec());
            for cut in 0..canonical.len() {
                prop_assert!(from_canonical(&canonical[..cut], 4).is_none());
            }
        }
    }

    #[test]
    fn values_of_another_type_are_refused() {
        for line in [
            r#"["1",1.0,"a",""]"#,
            r#"[1.5,1.0,"a",""]"#,
            r#"[1,"x","a",""]"#,
            r#"[1,1.0,5,""]"#,
            r#"[1,1.0,"a","!"]"#,
            r#"[1,1.0,"a"]"#,
            r#"[1,1.0,"a","",null]"#,
            r#"[1,1.0,"a",""] x"#,
            r#"[9223372036854775808,1.0,"a",""]"#,
            r#"[1,1e999,"a",""]"#,
            r#"[1,1.0,"a\u0000b",""]"#,
            r#"[[1],1.0,"a",""]"#,
            r#"{"a":1}"#,
            "",
        ] {
            assert!(read_row(line.as_bytes(), &TYPES, &mut Vec::new()).is_err(), "{line}");
        }
        let mut row = Vec::new();
        read_row(b"[null,3,null,null]", &TYPES, &mut row).unwrap();
        assert_eq!(row, [Value::Null, Value::Real(3.0), Value::Null, Value::Null]);
        row.clear();
        read_row(b"[1,18446744073709551615,null,null]", &TYPES, &mut row).unwrap();
        assert_eq!(row[1], Value::Real(u64::MAX as f64));
        // Text that JSON escapes is not lent but made.
        row.clear();
        read_row(br#"[1,1.0,"\u0061","\u0041Q=="]"#, &TYPES, &mut row).unwrap();
        assert_eq!(row[2..], [Value::Text("a".into()), Value::Blob(Cow::Borrowed(&[1]))]);
    }

    #[test]
    fn errors_say_what_was_wanted() {
        let told = |line: &str| read_row(line.as_bytes(), &TYPES, &mut Vec::new()).unwrap_err().to_string();
        for (line, why) in [
            (r#"["1",1.0,"a",""]"#, "invalid type: string \"1\", expected a value of type INTEGER or null"),
            (r#"[1,1.0,5,""]"#, "invalid type: integer `5`, expected a value of type TEXT or null"),
            (r#"[1,1.0,"a",5]"#, "invalid type: integer `5`, expected a value of type BLOB or null"),
            (r#"[1,"x","a",""]"#, "invalid type: string \"x\", expected a value of type REAL or null"),
            (r#"[1,1.0,"a"]"#, "invalid length 3, expected an array of 4 values"),
            (r#"[1,1.0,"a","",null]"#, "invalid length 5, expected an array of 4 values"),
        ] {
            assert!(told(line).starts_with(why), "{line}: {}", told(line));
        }
    }

    #[test]
    fn a_value_fits_its_own_type_and_null_fits_all() {
        let values = [Value::Int(1), Value::Real(1.0), Value::Text("a".into()), Value::Blob(Cow::Borrowed(b"a"))];
        for (v, value) in values.iter().enumerate() {
            for (t, ty) in TYPES.iter().enumerate() {
                assert_eq!(value.fits(*ty), v == t, "{value:?} in {ty}");
            }
        }
        assert!(TYPES.iter().all(|ty| Value::Null.fits(*ty)));
    }

    #[test]
    fn people_see_sixty_characters_of_a_text() {
        let told = |t: &str| Value::Text(t.into()).for_people();
        assert_eq!(told(&"ä".repeat(60)), format!("{:?}", "ä".repeat(60)));
        assert_eq!(told(&"ä".repeat(61)), format!("{:?}…", "ä".repeat(60)));
        let others = [Value::Null, Value::Int(-1), Value::Real(2.0), Value::Blob(Cow::Borrowed(b"abc"))];
        assert_eq!(others.map(|v| v.for_people()), ["NULL", "-1", "2.0", "blob of 3 bytes"]);
    }
}

//! SHA-256 of objects, and the state digest that proves a table's content.

use crate::value::Value;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256 as Hasher};
use std::fmt;
use std::str::FromStr;

/// A digest in hex that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest of {1} lower-case hex digits")]
pub struct BadDigest(String, usize);

/// SHA-256 of an object's bytes; 64 lower-case hex digits as text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256([u8; 32]);

impl Sha256 {
    /// Hashes bytes at hand.
    pub fn of(bytes: &[u8]) -> Self {
        Sha256(Hasher::digest(bytes).into())
    }
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Hashes bytes as they pass.
#[derive(Debug, Clone, Default)]
pub struct Sha256Stream(Hasher);

impl Sha256Stream {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The hash of all bytes taken.
    pub fn finish(self) -> Sha256 {
        Sha256(self.0.finalize().into())
    }
}

fn parse_hex<const N: usize>(s: &str) -> Result<[u8; N], BadDigest> {
    let bad = || BadDigest(s.chars().take(80).collect(), N * 2);
    let mut out = [0; N];
    if s.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(bad());
    }
    hex::decode_to_slice(s, &mut out).map_err(|_| bad())?;
    Ok(out)
}

macro_rules! hex_text {
    ($type:ident) => {
        impl TryFrom<String> for $type {
            type Error = BadDigest;
            fn try_from(s: String) -> Result<Self, BadDigest> {
                s.parse()
            }
        }
        impl From<$type> for String {
            fn from(v: $type) -> String {
                v.to_string()
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
    };
}
hex_text!(Sha256);
hex_text!(StateDigest);

impl FromStr for Sha256 {
    type Err = BadDigest;
    fn from_str(s: &str) -> Result<Self, BadDigest> {
        parse_hex(s).map(Sha256)
    }
}
impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Proof of a table's content: the sum of its rows' hashes mod 2^128, so that it does not depend
/// on their order and follows each change in O(1). 32 lower-case hex digits as text; empty is 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StateDigest(u128);

impl StateDigest {
    /// Counts a row in.
    pub fn add(&mut self, row: RowHash) {
        self.0 = self.0.wrapping_add(row.0);
    }
    /// Counts a row out.
    pub fn subtract(&mut self, row: RowHash) {
        self.0 = self.0.wrapping_sub(row.0);
    }
}
impl FromStr for StateDigest {
    type Err = BadDigest;
    fn from_str(s: &str) -> Result<Self, BadDigest> {
        parse_hex(s).map(|b| StateDigest(u128::from_be_bytes(b)))
    }
}
impl fmt::Display for StateDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The first 16 bytes of SHA-256 of a canonical row, as a big-endian number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowHash(u128);

impl RowHash {
    /// The hash of a row in its canonical form.
    pub fn of(canonical: &[u8]) -> RowHash {
        let full: [u8; 32] = Hasher::digest(canonical).into();
        let mut first = [0; 16];
        first.copy_from_slice(&full[..16]);
        RowHash(u128::from_be_bytes(first))
    }
}

/// Hashes rows, reusing one buffer.
#[derive(Debug, Default)]
pub struct RowHasher(Vec<u8>);

impl RowHasher {
    /// The hash of a row: all the table's columns, in the contract's order, as stored.
    pub fn hash<'v, 'd: 'v>(&mut self, row: impl IntoIterator<Item = &'v Value<'d>>) -> RowHash {
        self.0.clear();
        for v in row {
            v.canonical(&mut self.0);
        }
        RowHash::of(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // python3 -c "import hashlib;print(hashlib.sha256(b'I'+(7).to_bytes(8,'big')+b'T'+(2).to_bytes(4,'big')+b'ab'+b'N').hexdigest()[:32])"
        let mut d = StateDigest::default();
        assert_eq!(d.to_string(), "0".repeat(32));
        let row = RowHasher::default().hash(&[Value::Int(7), Value::Text("ab".into()), Value::Null]);
        d.add(row);
        assert_eq!(d.to_string(), "4d972ed3b5b06da2c912fe3b1e280d43");
        d.subtract(row);
        assert_eq!(d, StateDigest::default());
        // RFC 6234's, of "abc".
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let hash = Sha256::of(b"abc");
        assert_eq!((hash.to_string(), hex::encode(hash.as_bytes())), (abc.into(), abc.into()));
        let short = abc[..60].parse::<Sha256>().unwrap_err().to_string();
        assert!(short.contains("64") && short.contains(&abc[..60]), "{short}");
    }

    #[test]
    fn type_and_case_tell_rows_apart() {
        let mut h = RowHasher::default();
        let rows = [
            h.hash(&[Value::Int(1)]),
            h.hash(&[Value::Real(1.0)]),
            h.hash(&[Value::Text("1".into())]),
            h.hash(&[Value::Blob(b"1"[..].into())]),
            h.hash(&[Value::Text("a".into())]),
            h.hash(&[Value::Text("A".into())]),
            h.hash(&[Value::Null]),
        ];
        for (i, a) in rows.iter().enumerate() {
            for b in &rows[i + 1..] {
                assert_ne!(a, b);
            }
        }
    }

    #[test]
    fn upper_case_and_short_hex_are_refused() {
        assert!("AB".repeat(32).parse::<Sha256>().is_err());
        assert!("ab".parse::<Sha256>().is_err());
        assert!("".parse::<StateDigest>().is_err());
    }
}

//! Ed25519 keys as text. A weak public key never becomes a [`PublicKey`]; a secret never prints.

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use std::fmt;
use std::str::FromStr;

/// A key that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// Not 64 lower-case hex digits.
    #[error("a key must be 64 lower-case hex digits")]
    NotHex,
    /// Not a point of the curve.
    #[error("the public key is no point of the curve")]
    NotAPoint,
    /// A signature by it would prove nothing.
    #[error("the public key is weak (of small order)")]
    Weak,
    /// The system gave no randomness.
    #[error("no randomness from the system: {0}")]
    NoRandomness(String),
}

/// A strong Ed25519 public key; 64 lower-case hex digits as text.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// The 32 bytes that tell keys apart (ids do not: a key may claim any).
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
    /// The key's short name in envelopes and logs: the first 16 hex digits of its SHA-256.
    pub fn id(&self) -> String {
        hex::encode(&sha2::Sha256::digest(self.as_bytes())[..8])
    }
    /// Strict verification (RFC 8032, no malleable or small-order signatures).
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let Ok(signature) = ed25519_dalek::Signature::from_slice(signature) else { return false };
        self.0.verify_strict(message, &signature).is_ok()
    }
}

impl FromStr for PublicKey {
    type Err = BadKey;
    fn from_str(s: &str) -> Result<Self, BadKey> {
        let key = VerifyingKey::from_bytes(&bytes_of(s)?).map_err(|_| BadKey::NotAPoint)?;
        if key.is_weak() { Err(BadKey::Weak) } else { Ok(PublicKey(key)) }
    }
}
impl TryFrom<String> for PublicKey {
    type Error = BadKey;
    fn try_from(s: String) -> Result<Self, BadKey> {
        s.parse()
    }
}
impl From<PublicKey> for String {
    fn from(k: PublicKey) -> String {
        k.to_string()
    }
}
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.as_bytes()))
    }
}
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id())
    }
}

/// An Ed25519 secret key. Its text form (64 hex digits) is the seed; `Debug` shows the id only.
#[derive(Clone)]
pub struct SecretKey(SigningKey);

impl SecretKey {
    /// The key of a seed.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        SecretKey(SigningKey::from_bytes(&seed))
    }
    /// A new key from the system's randomness.
    pub fn generate() -> Result<Self, BadKey> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| BadKey::NoRandomness(e.to_string()))?;
        Ok(Self::from_seed(seed))
    }
    /// The seed as text, for the key's file or an enrolment code.
    pub fn to_secret_text(&self) -> String {
        hex::encode(self.0.to_bytes())
    }
    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }
    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}
impl FromStr for SecretKey {
    type Err = BadKey;
    fn from_str(s: &str) -> Result<Self, BadKey> {
        Ok(Self::from_seed(bytes_of(s.trim())?))
    }
}
impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({})", self.public().id())
    }
}

fn bytes_of(s: &str) -> Result<[u8; 32], BadKey> {
    let mut out = [0; 32];
    if s.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(BadKey::NotHex);
    }
    hex::decode_to_slice(s, &mut out).map_err(|_| BadKey::NotHex)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_and_other_small_orders_are_refused() {
        for weak in [
            "0100000000000000000000000000000000000000000000000000000000000000",
            "0000000000000000000000000000000000000000000000000000000000000000",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        ] {
            assert!(weak.parse::<PublicKey>().is_err(), "{weak}");
        }
    }

    #[test]
    fn rfc_8032_test_2() {
        let key: SecretKey = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb".parse().unwrap();
        assert_eq!(key.public().to_string(), "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
        let signature = key.sign(&[0x72]);
        assert!(hex::encode(signature).starts_with("92a009a9f0d4cab8720e820b5f642540"));
        assert!(key.public().verifies(&[0x72], &signature));
        assert!(!key.public().verifies(&[0x73], &signature));
        assert!(!key.public().verifies(&[0x72], &signature[..63]));
    }
}

//! DSSE envelopes (github.com/secure-systems-lab/dsse, v1): a signature covers the exact bytes of
//! the payload and its type, so that nothing is parsed, let alone trusted, before it is verified.

use crate::keys::{PublicKey, SecretKey};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use serde::{Deserialize, Serialize};

/// What an envelope carries. A signature for one type never passes for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadType {
    /// `trust.json`.
    Trust,
    /// A store's manifest.
    Manifest,
    /// A register's or relay's heartbeat.
    Heartbeat,
    /// A relay's answer to an import.
    Receipt,
}

impl PayloadType {
    /// The media type in the envelope.
    pub fn as_str(self) -> &'static str {
        match self {
            PayloadType::Trust => "application/vnd.tillcast.trust+json",
            PayloadType::Manifest => "application/vnd.tillcast.manifest+json",
            PayloadType::Heartbeat => "application/vnd.tillcast.heartbeat+json",
            PayloadType::Receipt => "application/vnd.tillcast.receipt+json",
        }
    }
}

/// An envelope that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DsseError {
    /// More bytes than the limit.
    #[error("the envelope is longer than {limit} bytes")]
    TooLong {
        /// The limit in bytes.
        limit: u64,
    },
    /// Not an envelope.
    #[error("not a DSSE envelope: {0}")]
    NotAnEnvelope(String),
    /// An envelope of something else.
    #[error("the envelope carries `{found}`, not `{wanted}`")]
    OtherType {
        /// The type in the envelope.
        found: String,
        /// The type asked for.
        wanted: &'static str,
    },
    /// Too few good signatures by known keys.
    #[error("{good} of {threshold} needed signatures are good and by a known key (signed by: {signers})")]
    NotSigned {
        /// Good signatures by distinct known keys.
        good: usize,
        /// How many are needed.
        threshold: usize,
        /// The key ids that the envelope claims.
        signers: String,
    },
}

/// The envelope as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The payload's media type.
    #[serde(rename = "payloadType")]
    pub payload_type: String,
    /// The payload, base64.
    pub payload: String,
    /// The signatures.
    pub signatures: Vec<Signature>,
}

/// One signature of an envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Which key claims to have signed; a hint only, and it may be left out.
    #[serde(default)]
    pub keyid: String,
    /// The signature, base64.
    pub sig: String,
}

/// Base64 as the specification has it: by either alphabet of RFC 4648, padded.
fn decode(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
    STANDARD.decode(text).or_else(|e| URL_SAFE.decode(text).map_err(|_| e))
}

/// The bytes that a signature covers.
fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = format!("DSSEv1 {} {} {} ", payload_type.len(), payload_type, payload.len()).into_bytes();
    out.extend_from_slice(payload);
    out
}

/// Wraps and signs a payload; the envelope's JSON bytes.
pub fn seal(payload_type: PayloadType, payload: &[u8], keys: &[&SecretKey]) -> Vec<u8> {
    let message = pre_authentication_encoding(payload_type.as_str(), payload);
    let envelope = Envelope {
        payload_type: payload_type.as_str().to_owned(),
        payload: STANDARD.encode(payload),
        signatures: keys
            .iter()
            .map(|k| Signature { keyid: k.public().id(), sig: STANDARD.encode(k.sign(&message)) })
            .collect(),
    };
    // An envelope is three plain strings: writing it cannot fail.
    serde_json::to_vec(&envelope).unwrap_or_default()
}

impl Envelope {
    /// Reads an envelope. More than `max` bytes are not looked at.
    pub fn from_json(bytes: &[u8], max: u64) -> Result<Envelope, DsseError> {
        if bytes.len() as u64 > max {
            return Err(DsseError::TooLong { limit: max });
        }
        serde_json::from_slice(bytes).map_err(|e| DsseError::NotAnEnvelope(e.to_string()))
    }

    /// Its payload, decoded, and not proven by anybody.
    pub(crate) fn unproven(&self) -> Result<Unproven<'_>, DsseError> {
        let payload = decode(&self.payload).map_err(|e| DsseError::NotAnEnvelope(e.to_string()))?;
        Ok(Unproven { envelope: self, payload })
    }
}

/// An envelope's payload whose signatures nobody has looked at.
pub(crate) struct Unproven<'e> {
    envelope: &'e Envelope,
    payload: Vec<u8>,
}

impl Unproven<'_> {
    /// Verifies it and gives the payload: at least `threshold` distinct keys of `keys` (told apart by their bytes, not ids)
    /// must have signed it.
    pub fn open<'k>(
        &self,
        payload_type: PayloadType,
        keys: impl IntoIterator<Item = &'k PublicKey>,
        threshold: usize,
    ) -> Result<&[u8], DsseError> {
        let Unproven { envelope: Envelope { payload_type: found, signatures: all, .. }, payload } = self;
        if found != payload_type.as_str() {
            let found = found.chars().take(80).collect();
            return Err(DsseError::OtherType { found, wanted: payload_type.as_str() });
        }
        let message = pre_authentication_encoding(payload_type.as_str(), payload);
        let signatures: Vec<Vec<u8>> = all.iter().take(MAX_SIGNATURES).filter_map(|s| decode(&s.sig).ok()).collect();
        let mut counted: Vec<&[u8; 32]> = Vec::new();
        for key in keys {
            if !counted.contains(&key.as_bytes()) && signatures.iter().any(|s| key.verifies(&message, s)) {
                counted.push(key.as_bytes());
            }
        }
        let threshold = threshold.max(1);
        if counted.len() >= threshold {
            return Ok(payload);
        }
        let signers: Vec<String> =
            all.iter().take(MAX_SIGNATURES).map(|s| s.keyid.chars().take(16).collect()).collect();
        Err(DsseError::NotSigned { good: counted.len(), threshold, signers: signers.join(", ") })
    }

    /// The payload as it is: see [`peek`].
    pub fn peek<T: for<'de> Deserialize<'de>>(&self) -> Result<T, DsseError> {
        serde_json::from_slice(&self.payload).map_err(|e| DsseError::NotAnEnvelope(e.to_string()))
    }
}

/// Verifies an envelope of at most `max` bytes and gives its payload: at least `threshold` distinct keys of `keys` must have
/// signed it.
pub fn open<'k>(
    bytes: &[u8],
    payload_type: PayloadType,
    keys: impl IntoIterator<Item = &'k PublicKey>,
    threshold: usize,
    max: u64,
) -> Result<Vec<u8>, DsseError> {
    let envelope = Envelope::from_json(bytes, max)?;
    let unproven = envelope.unproven()?;
    unproven.open(payload_type, keys, threshold)?;
    Ok(unproven.payload)
}

/// Signatures looked at in one envelope: bounds the work that a stranger can ask for.
pub(crate) const MAX_SIGNATURES: usize = 16;

/// The payload of an envelope whose signature nobody has looked at: to learn a version number or
/// an id to look a key up by, never to act on.
pub fn peek<T: for<'de> Deserialize<'de>>(bytes: &[u8], max: u64) -> Result<T, DsseError> {
    Envelope::from_json(bytes, max)?.unproven()?.peek()
}

/// The same, as the bytes that it is.
pub fn peek_payload(bytes: &[u8], max: u64) -> Result<Vec<u8>, DsseError> {
    Ok(Envelope::from_json(bytes, max)?.unproven()?.payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed([n; 32])
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let sealed = seal(PayloadType::Manifest, b"{\"serial\":1}", &[&key(1)]);
        let public = [key(1).public()];
        let good = open(&sealed, PayloadType::Manifest, &public, 1, 1 << 20).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut bent = sealed.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            // What still opens must be the very payload (a flip in a key id or in base64's unused bits).
            if let Ok(p) = open(&bent, PayloadType::Manifest, &public, 1, 1 << 20) {
                assert_eq!(p, good);
            }
        }
    }

    #[test]
    fn one_key_counts_once_under_any_id() {
        let mut e: Envelope = serde_json::from_slice(&seal(PayloadType::Trust, b"x", &[&key(1)])).unwrap();
        e.signatures.push(Signature { keyid: "other".into(), sig: e.signatures[0].sig.clone() });
        let bytes = serde_json::to_vec(&e).unwrap();
        let twice = [key(1).public(), key(1).public(), key(2).public()];
        assert!(matches!(
            open(&bytes, PayloadType::Trust, &twice, 2, 1 << 20),
            Err(DsseError::NotSigned { good: 1, threshold: 2, .. })
        ));
    }

    #[test]
    fn a_key_id_may_be_left_out_and_either_alphabet_is_read() {
        // Bytes whose base64 has both characters that the alphabets differ in.
        let payload = b"\xfb\xef\xbe\xff\xff\xff~";
        let e: serde_json::Value = serde_json::from_slice(&seal(PayloadType::Trust, payload, &[&key(1)])).unwrap();
        let url_safe =
            |v: &serde_json::Value| serde_json::json!(v.as_str().unwrap().replace('+', "-").replace('/', "_"));
        let public = [key(1).public()];
        let read = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut e = e.clone();
            change(&mut e);
            let bytes = serde_json::to_vec(&e).unwrap();
            let opened = open(&bytes, PayloadType::Trust, &public, 1, 1 << 20);
            assert!(opened.is_err() || peek_payload(&bytes, 1 << 20) == opened);
            opened.map(|p| assert_eq!(p, payload))
        };
        assert_ne!(url_safe(&e["payload"]), e["payload"]);
        read(&|e| drop(e["signatures"][0].as_object_mut().unwrap().remove("keyid"))).unwrap();
        read(&|e| e["payload"] = url_safe(&e["payload"])).unwrap();
        read(&|e| e["signatures"][0]["sig"] = url_safe(&e["signatures"][0]["sig"])).unwrap();
        for other in ["both", "bare", "blank"] {
            let e = read(&|e| {
                let text = e["payload"].as_str().unwrap();
                e["payload"] = match other {
                    "both" => text.replace('+', "-").into(),
                    "bare" => text.trim_end_matches('=').into(),
                    _ => format!("{text}\n").into(),
                };
            });
            assert!(matches!(e, Err(DsseError::NotAnEnvelope(_))), "{other}: {e:?}");
        }
        assert!(matches!(read(&|e| e["signatures"][0]["keyid"] = 7.into()), Err(DsseError::NotAnEnvelope(_))));
    }

    #[test]
    fn type_threshold_and_length_are_held() {
        let sealed = seal(PayloadType::Heartbeat, b"x", &[&key(1), &key(2)]);
        let keys = [key(1).public(), key(2).public()];
        assert!(open(&sealed, PayloadType::Heartbeat, &keys, 2, 1 << 20).is_ok());
        assert!(matches!(open(&sealed, PayloadType::Manifest, &keys, 1, 1 << 20), Err(DsseError::OtherType { .. })));
        assert!(matches!(open(&sealed, PayloadType::Heartbeat, &keys, 1, 10), Err(DsseError::TooLong { .. })));
        assert!(open(&sealed, PayloadType::Heartbeat, &[], 0, 1 << 20).is_err());
        let longest = sealed.len() as u64;
        assert_eq!(peek_payload(&sealed, longest).unwrap(), b"x");
        assert_eq!(peek_payload(&sealed, longest - 1), Err(DsseError::TooLong { limit: longest - 1 }));
    }
}

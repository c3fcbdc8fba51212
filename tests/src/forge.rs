//! Makes objects as headquarters would, and as it never would: packs line by line, envelopes by any key. It shares
//! no code with the product, so that nothing stops it from lying.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signer as _, SigningKey};
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::io::{Read as _, Write as _};
use std::path::Path;

/// A pack's lines, without their newlines.
#[track_caller]
pub fn unpack(pack: &[u8]) -> Vec<String> {
    let mut text = String::new();
    MultiGzDecoder::new(pack).read_to_string(&mut text).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// A pack of these lines.
pub fn pack<S: AsRef<str>>(lines: &[S]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    for line in lines {
        gzip.write_all(line.as_ref().as_bytes()).unwrap();
        gzip.write_all(b"\n").unwrap();
    }
    gzip.finish().unwrap()
}

/// The tables of a contract as a header tells them, by SQLite itself; none where it takes no such DDL, or a header
/// could not say it.
pub fn tables(ddl: &str) -> Option<Value> {
    // Not run here: what never ends, or reaches further than this database; nor what no header has a name for.
    if ["RECURSIVE", "VACUUM", "ATTACH", "PRAGMA", "TABLE tillcast_"].iter().any(|word| ddl.contains(word)) {
        return None;
    }
    let db = rusqlite::Connection::open_in_memory().unwrap();
    db.execute_batch(ddl).ok()?;
    let list = |sql: &str, of: &str| -> Vec<(String, String)> {
        let mut found = db.prepare(sql).unwrap();
        let pairs = found.query_map([of], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
        pairs.map(Result::unwrap).collect()
    };
    let names = list("SELECT name, sql FROM sqlite_schema WHERE type = ?1 AND sql IS NOT NULL ORDER BY name", "table");
    let head = |(table, _): &(String, String)| {
        let columns = list("SELECT name, lower(type) FROM pragma_table_xinfo(?1) ORDER BY cid", table);
        let columns: Vec<Value> = columns.iter().map(|(n, t)| json!({"name": n, "type": t})).collect();
        let key = list("SELECT name, type FROM pragma_table_xinfo(?1) WHERE pk > 0 ORDER BY pk", table);
        json!({"table": table, "columns": columns, "key": key.iter().map(|(n, _)| n).collect::<Vec<_>>()})
    };
    let heads: Vec<Value> = names.iter().map(head).collect();
    let columns = || heads.iter().flat_map(|h| h["columns"].as_array().unwrap());
    let known = |c: &Value| ["integer", "real", "text", "blob"].contains(&c["type"].as_str().unwrap());
    let plain = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let told = names.iter().all(|(name, _)| plain(name)) && columns().all(known);
    told.then(|| heads.into())
}

/// What a manifest lists of a pack, read from its header: true in all it says.
#[track_caller]
pub fn entry(pack: &[u8]) -> Value {
    let lines = unpack(pack);
    let header: Value = serde_json::from_str(&lines[0]).unwrap();
    let unpacked: usize = lines.iter().map(|l| l.len() + 1).sum();
    let mut entry = json!({"version": header["version"], "kind": header["kind"], "bytes": pack.len(), "unpacked": unpacked, "sha256": sha256(pack)});
    if !header["base"].is_null() {
        entry["base"] = header["base"].clone();
    }
    entry
}

/// 64 hex digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A DSSE envelope; `kind` is `trust`, `manifest`, `heartbeat` or `receipt`.
pub fn seal(kind: &str, payload: &[u8], keys: &[&SigningKey]) -> Vec<u8> {
    let kind = format!("application/vnd.tillcast.{kind}+json");
    let mut message = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    message.extend(payload);
    let id = |k: &SigningKey| hex::encode(&Sha256::digest(k.verifying_key().as_bytes())[..8]);
    let sign = |k: &&SigningKey| json!({"keyid": id(k), "sig": STANDARD.encode(k.sign(&message).to_bytes())});
    let signatures: Vec<Value> = keys.iter().map(sign).collect();
    serde_json::to_vec(&json!({"payloadType": kind, "payload": STANDARD.encode(payload), "signatures": signatures}))
        .unwrap()
}

/// Whether an envelope of this kind is whole and signed by the key.
pub fn is_sealed_by(kind: &str, envelope: &[u8], key: &SigningKey) -> bool {
    let Ok(found) = serde_json::from_slice::<Value>(envelope) else { return false };
    let Ok(payload) = STANDARD.decode(found["payload"].as_str().unwrap_or_default()) else { return false };
    // Ed25519 signs the same bytes in the same way each time.
    let right: Value = serde_json::from_slice(&seal(kind, &payload, &[key])).unwrap();
    let signatures = found["signatures"].as_array().cloned().unwrap_or_default();
    found["payloadType"] == right["payloadType"] && signatures.iter().any(|s| s["sig"] == right["signatures"][0]["sig"])
}

/// An envelope's payload, its signatures unchecked.
#[track_caller]
pub fn payload(envelope: &[u8]) -> Value {
    let envelope: Value = serde_json::from_slice(envelope).unwrap();
    serde_json::from_slice(&STANDARD.decode(envelope["payload"].as_str().unwrap()).unwrap()).unwrap()
}

/// A key file of headquarters: 64 hex digits, the seed.
#[track_caller]
pub fn key_file(path: &Path) -> SigningKey {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    SigningKey::from_bytes(&hex::decode(text.trim()).unwrap().try_into().unwrap())
}

/// The key of a seed of one repeated byte: a stranger's.
pub fn strange_key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

/// A public key as manifests and trust files write it.
pub fn public(key: &SigningKey) -> String {
    hex::encode(key.verifying_key().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back() {
        let lines = [r#"{"version":2,"kind":"delta","base":1}"#, "[1]", r#"{"rows":{}}"#];
        let packed = pack(&lines);
        assert_eq!(unpack(&packed), lines);
        assert_eq!(entry(&packed)["unpacked"], lines.iter().map(|l| l.len() + 1).sum::<usize>());
        let sealed = seal("manifest", b"{\"a\":1}", &[&strange_key(1)]);
        assert_eq!(payload(&sealed), json!({"a": 1}));
        assert!(is_sealed_by("manifest", &sealed, &strange_key(1)));
        assert!(!is_sealed_by("manifest", &sealed, &strange_key(2)));
        assert!(!is_sealed_by("trust", &sealed, &strange_key(1)));
        assert!(!is_sealed_by("manifest", &sealed[1..], &strange_key(1)));
    }
}

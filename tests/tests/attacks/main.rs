//! Attacks, each on the real programs: what is refused, what is told of it, that the rows which registers sell by
//! stay those of the model, and that good news arrive afterwards. Those of TUF's list that concern keys and
//! manifests are in `trust.rs`, poisoned packs in `poison.rs`, sticks in `carry.rs`; docs/FAILURES.md has the table.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

mod contracts;
mod crowd;
mod protocol;
mod relays;
mod sources;
mod sticks;
mod texts;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tillcast_tests::site::Builder;
use tillcast_tests::{Site, digest, forge};

/// So many that a full outweighs all the deltas of a test.
const ITEMS: usize = 1500;

/// One store, one register.
fn small() -> Builder {
    Site::builder().stores(&[("0421", "east")]).registers(1).items(ITEMS)
}

/// A price that is another one after each call, published.
fn news(site: &Site) {
    site.sql("UPDATE price SET price_cents = price_cents + 1 WHERE sku = 'SKU0000001'");
    site.publish();
}

/// What a register sells by.
fn rows(site: &Site, register: &str) -> BTreeMap<String, String> {
    digest::of_database(&site.store_db(register))
}

/// Enrols a device at headquarters, and keeps its key: the device itself hears nothing of it.
fn taken_key(site: &Site, device: &str) -> SigningKey {
    let code = site.hq.json(&["enroll", device])["code"].as_str().unwrap().to_owned();
    key_of_code(&code)
}

fn key_of_code(code: &str) -> SigningKey {
    let code: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(code).unwrap()).unwrap();
    SigningKey::from_bytes(&hex::decode(code["seed"].as_str().unwrap()).unwrap().try_into().unwrap())
}

/// A signed heartbeat of a register, `{"envelope":…,"seen_s":0}`, with these errors.
fn beat(register: &str, seq: u64, key: &SigningKey, errors: Value) -> Value {
    let beat = json!({"format": 1, "device": register, "seq": seq, "sent_at": "2026-01-01T00:00:00Z", "program": "x",
        "serial": 1, "streams": {}, "network": "online", "errors": errors, "debts": [], "disk": null,
        "clock_skew_s": null});
    let envelope = forge::seal("heartbeat", &serde_json::to_vec(&beat).unwrap(), &[key]);
    json!({"envelope": serde_json::from_slice::<Value>(&envelope).unwrap(), "seen_s": 0})
}

fn post(beats: &[Value]) -> Vec<u8> {
    serde_json::to_vec(&json!({ "beats": beats })).unwrap()
}

/// Panics if one of the programs of this output panicked: a refusal is words, not a crash.
#[track_caller]
fn no_panic(told: &str) {
    assert!(!told.contains("panicked"), "{told}");
}

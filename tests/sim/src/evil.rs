//! A pack that is signed and bad, as by a publisher that went mad or whose key was stolen: only running it tells.

use crate::hq::Hq;
use crate::model::Model;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tillcast_tests::Dice;
use tillcast_tests::forge;

/// Puts a poisoned version of one of the store's streams into the bucket, with a manifest that lists it; which.
pub fn poison(hq: &Hq, store: &str, dice: &mut Dice, model: &mut Model) -> Option<String> {
    let file = hq.bucket().join(format!("stores/{store}/manifest.json"));
    let mut m = forge::payload(&fs::read(&file).ok()?);
    let names: Vec<String> = m["streams"].as_object()?.keys().cloned().collect();
    let stream = names[dice.index(names.len())].clone();
    let entry = m["streams"][&stream].clone();
    let instance = format!("{stream}@{}", entry["audience"].as_str()?);
    let base = entry["version"].as_u64()?;
    let (lines, kind) = bad_lines(&hq.bucket(), &instance, &entry, base, dice)?;
    let pack = forge::pack(&lines);
    let to = hq.bucket().join(format!("packs/{instance}/{:010}.{kind}.pack", base + 1));
    if to.exists() {
        return None;
    }
    fs::write(&to, &pack).unwrap();
    // The manifest says the truth about the file, and lies about nothing that can be seen without running it.
    let trailer: Value = serde_json::from_str(lines.last()?).ok()?;
    let listed = &mut m["streams"][&stream];
    listed["version"] = json!(base + 1);
    listed["digests"] = trailer["digests"].clone();
    listed["packs"].as_array_mut()?.push(forge::entry(&pack));
    m["serial"] = json!(m["serial"].as_u64()? + 1);
    let envelope = forge::seal("manifest", &serde_json::to_vec(&m).unwrap(), &[&hq.publisher]);
    model.forged(&envelope);
    fs::write(&file, &envelope).unwrap();
    Some(format!("{instance} {} {kind}", base + 1))
}

/// A thief with the publisher key: the store's list as it is, with a number that is far ahead.
pub fn jump(hq: &Hq, store: &str, model: &mut Model) -> Option<u64> {
    let file = hq.bucket().join(format!("stores/{store}/manifest.json"));
    let mut m = forge::payload(&fs::read(&file).ok()?);
    let serial = m["serial"].as_u64()? + 1_000_000;
    m["serial"] = json!(serial);
    let envelope = forge::seal("manifest", &serde_json::to_vec(&m).unwrap(), &[&hq.publisher]);
    model.forged(&envelope);
    fs::write(&file, &envelope).unwrap();
    Some(serial)
}

/// Lines of a pack on top of the newest version: made of the newest full, so that contract and columns are right.
fn bad_lines(
    bucket: &Path,
    instance: &str,
    entry: &Value,
    base: u64,
    dice: &mut Dice,
) -> Option<(Vec<String>, &'static str)> {
    let full = entry["packs"].as_array()?.iter().rfind(|p| p["kind"] == "full")?;
    let name = format!("packs/{instance}/{:010}.full.pack", full["version"].as_u64()?);
    let mut lines = forge::unpack(&fs::read(bucket.join(name)).ok()?);
    let mut header: Value = serde_json::from_str(&lines[0]).ok()?;
    let table = header["tables"][0]["table"].as_str()?.to_owned();
    let columns: Vec<String> = header["tables"][0]["columns"]
        .as_array()?
        .iter()
        .map(|c| c["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    header["version"] = json!(base + 1);
    let bent = json!({ table.clone(): "00112233445566778899aabbccddeeff" });
    if dice.percent(35) {
        // A full whose rows are not those that it claims.
        lines[0] = header.to_string();
        let last = lines.len() - 1;
        let before: Value = serde_json::from_str(&lines[last]).ok()?;
        lines[last] = trailer(&before["rows"], &bent);
        return Some((lines, "full"));
    }
    header["kind"] = json!("delta");
    header["base"] = json!(base);
    let key = if table == "promo" { json!(12_345) } else { json!("no such") };
    let (op, row) = match dice.below(3) {
        // Strict: a delete that misses.
        0 => (json!({"table": table, "op": "delete", "columns": [columns[0]]}), json!([key])),
        // Refused by the contract.
        1 if table == "price" => {
            (json!({"table": table, "op": "insert", "columns": columns}), json!(["new", -5, null]))
        }
        // Whole and well formed, but for the proof.
        _ => {
            let mut row = match table.as_str() {
                "price" => json!(["evil", 1, "one cent"]),
                "promo" => json!([777, 0.99, "all must go"]),
                _ => json!(["evil", 99]),
            };
            // Columns that came later.
            row.as_array_mut()?.resize(columns.len(), Value::Null);
            (json!({"table": table, "op": "insert", "columns": columns}), row)
        }
    };
    let mut rows = json!({"delete": 0, "update": 0, "insert": 0});
    let which = op["op"].as_str()?.to_owned();
    rows[which] = json!(1);
    Some((vec![header.to_string(), op.to_string(), row.to_string(), trailer(&rows, &bent)], "delta"))
}

/// A last line: it is known by its first word.
fn trailer(rows: &Value, digests: &Value) -> String {
    format!("{{\"rows\":{rows},\"digests\":{digests}}}")
}

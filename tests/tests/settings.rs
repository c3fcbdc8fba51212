//! docs/SETTINGS.md names every setting, with the value that it has where it is left out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::Value;
use std::collections::BTreeMap;
use tillcast_tests::{Product, repository, temp_dir};

/// The least that each program must be told.
const HQ: &str = "[source]\nurl = 'sqlite:hq.db'\n[objects]\nurls = ['file:objects']\n[state]\ndir = 'state'\n\
    [stores]\nquery = 'SELECT id FROM store'\n[mail]\nsmtp = 'smtp://127.0.0.1'\nfrom = 'a@b.c'\nto = ['a@b.c']\n\
    [[stream]]\nname = 'price'\naudience = 'all'\nschema = 'price.sql'\n[[stream.table]]\nname = 'price'\nquery = 'SELECT 1'\n";
const RELAY: &str = "store = '0421'\ndata_dir = 'data'\n";
const AGENT: &str = "register = '0421-03'\ndata_dir = 'data'\nrelay = 'http://127.0.0.1:7421'\n";

#[test]
fn every_setting_is_documented_with_its_default() {
    let text = std::fs::read_to_string(repository().join("docs/SETTINGS.md")).unwrap();
    let section = |title: &str| {
        let (_, rest) = text.split_once(&format!("\n## {title}\n")).unwrap();
        rows(rest.split("\n## ").next().unwrap())
    };
    let shared = section("Of several");
    let mut unused: BTreeMap<&str, &str> = shared.clone();
    for (product, file, least, options) in [
        (Product::Hq, "hq.toml", HQ, None),
        (Product::Relay, "relay.toml", RELAY, Some("source.")),
        (Product::Agent, "agent.toml", AGENT, Some("source_options.")),
    ] {
        let dir = temp_dir("settings");
        std::fs::write(dir.path().join(file), least).unwrap();
        std::fs::write(dir.path().join("price.sql"), "CREATE TABLE price (sku TEXT PRIMARY KEY) STRICT;").unwrap();
        let mut own = section(product.name());
        let settings = product.run(dir.path(), &["check-config", "--json"]).ok().json();
        for (name, value) in leaves("", &settings) {
            if let Some(told) = own.remove(&name[..]) {
                assert!(told == "must be set" || told == value, "{file}: {name} is {value}, told as {told}");
                continue;
            }
            let plain = name.strip_prefix("serve.").unwrap_or(&name);
            let plain = options.and_then(|o| plain.strip_prefix(o)).map_or(plain.to_owned(), |n| format!("source.{n}"));
            let told = shared.get(&plain[..]).unwrap_or_else(|| panic!("{file}: {name} = {value} is not documented"));
            assert_eq!(*told, value, "{file}: {name}");
            unused.remove(&plain[..]);
        }
        // What is set has no default to print, and what is none may be left out of the print.
        own.retain(|name, told| !name.ends_with('…') && *told != "–");
        assert!(own.is_empty(), "{file} knows nothing of {own:?}");
    }
    assert!(unused.is_empty(), "nobody knows {unused:?}");
}

/// Programs read why a command failed as a whole, whichever it was.
#[test]
fn what_fails_as_a_whole_says_so_in_json() {
    for (product, file, least, enrolled) in [
        (Product::Hq, "hq.toml", HQ, "KEYS"),
        (Product::Relay, "relay.toml", RELAY, "NOT_ENROLLED"),
        (Product::Agent, "agent.toml", AGENT, "NOT_ENROLLED"),
    ] {
        let dir = temp_dir("failures");
        let command = if product == Product::Hq { "publish" } else { "once" };
        std::fs::write(dir.path().join("price.sql"), "CREATE TABLE price (sku TEXT PRIMARY KEY) STRICT;").unwrap();
        for (settings, code) in [(format!("{least}\nnonsense = 1\n"), "CONFIG"), (least.to_owned(), enrolled)] {
            std::fs::write(dir.path().join(file), settings).unwrap();
            let out = product.run(dir.path(), &[command, "--json"]);
            assert!(out.code.is_some_and(|c| c > 0), "{}", out.text());
            let told = out.json();
            assert!(told["code"] == code && told["error"].as_str().is_some_and(|e| !e.is_empty()), "{told}");
        }
    }
}

/// Setting and default of each row of the tables.
fn rows(section: &str) -> BTreeMap<&str, &str> {
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<&str> = line.split(" | ").collect();
        for name in cells[0].trim_start_matches("| ").split(", ") {
            rows.insert(name.trim_matches('`'), cells[1].trim_matches('`'));
        }
    }
    rows
}

/// Every value that is no table, by its path; of lists of tables the first.
fn leaves(path: &str, value: &Value) -> Vec<(String, String)> {
    match value {
        Value::Object(of) => of
            .iter()
            .flat_map(|(k, v)| leaves(&if path.is_empty() { k.clone() } else { format!("{path}.{k}") }, v))
            .collect(),
        Value::Array(of) if of.first().is_some_and(Value::is_object) => leaves(path, &of[0]),
        Value::Null => vec![(path.to_owned(), "–".to_owned())],
        Value::Array(of) if of.is_empty() => vec![(path.to_owned(), "–".to_owned())],
        Value::String(text) => vec![(path.to_owned(), text.clone())],
        other => vec![(path.to_owned(), other.to_string())],
    }
}

//! docs/SETTINGS.md names every setting, with the value that it has where it is left out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use serde_json::Value;
use std::collections::BTreeMap;
use tillcast_tests::site::Node;
use tillcast_tests::{Product, Site, repository, temp_dir};

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

/// It exits with 1, and programs are told what failed, and that the rest did not.
#[test]
fn a_doctor_that_finds_something_fails_and_names_it() {
    let site = Site::builder().registers(1).items(10).build();
    site.publish();
    site.bring_down();
    let (relay, register) = (site.relay("0421"), site.register("0421-01"));
    // The checks that failed, by name, and what each says.
    let failed = |node: &Node, code: i32| -> Vec<(String, String)> {
        let told = node.run(&["doctor", "--json"]).code(code).json();
        let (list, name, text) = match node.product {
            Product::Hq => (&told, "name", "found"),
            Product::Relay => (&told["findings"], "what", "text"),
            Product::Agent => (&told, "name", "text"),
        };
        let list = list.as_array().unwrap();
        assert!(list.len() > 3 && (node.product != Product::Relay || told["well"] == (code == 0)), "{told:#}");
        let is_bad = |c: &&Value| c["verdict"] == "FAIL" || c["mark"] == "FAIL" || c["well"] == false;
        let word = |c: &Value, of: &str| c[of].as_str().unwrap().to_owned();
        list.iter().filter(is_bad).map(|c| (word(c, name), word(c, text))).collect()
    };
    let none: [(String, String); 0] = [];
    assert_eq!((failed(&site.hq, 0), failed(relay, 0)), (none.to_vec(), none.to_vec()));
    site.with_relays(|| assert_eq!(failed(register, 0), none));
    let names = |failed: &[(String, String)]| failed.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    // Nobody is at its relay's address.
    let found = failed(register, 1);
    assert!(names(&found) == ["relay"] && found[0].1.contains(&relay.url()), "{found:?}");
    let (source, away) = (site.hq.dir.join("source.db"), site.hq.dir.join("away.db"));
    std::fs::rename(&source, &away).unwrap();
    let found = failed(&site.hq, 1);
    assert!(names(&found) == ["source"] && found[0].1.contains("source.db"), "{found:?}");
    std::fs::rename(&away, &source).unwrap();
    std::fs::remove_file(site.bucket().join("stores/0421/manifest.json")).unwrap();
    let found = failed(relay, 1);
    let bucket = format!("source file://{}", site.bucket().display());
    assert!(names(&found) == [bucket] && found[0].1.contains("stores/0421/manifest.json"), "{found:?}");
    // Of a command that cannot even begin.
    for node in [&site.hq, relay, register] {
        std::fs::write(node.config(), "nonsense = 1\n").unwrap();
        let told = node.run(&["doctor", "--json"]).code(2).json();
        assert!(told["code"] == "CONFIG" && told["error"].as_str().unwrap().contains("nonsense"), "{told}");
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

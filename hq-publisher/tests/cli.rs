//! What scripts see of the program: a failure in JSON, texts that tell each thing once, what is true said twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, missing_docs)]

use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

/// Exit code, stdout and stderr.
fn run(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_hq-publisher")).current_dir(dir).args(args).output().unwrap();
    let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

fn settings(dir: &Path, port: u16) {
    let text = format!(
        "[source]\nurl = \"sqlite:hq.db\"\n[objects]\nurls = [\"file:objects\"]\n[state]\ndir = \"state\"\n[stores]\nquery = \"SELECT id FROM store\"\n\
         [publish]\nlease_wait = \"0s\"\n[serve]\nlisten = \"127.0.0.1:{port}\"\n\
         [[stream]]\nname = \"price\"\naudience = \"all\"\nschema = \"price.sql\"\n\
         [[stream.table]]\nname = \"price\"\nquery = \"SELECT sku FROM price\"\n"
    );
    fs::write(dir.join("hq.toml"), text).unwrap();
    fs::write(dir.join("price.sql"), "CREATE TABLE price (sku TEXT PRIMARY KEY) STRICT;").unwrap();
    let db = rusqlite::Connection::open(dir.join("hq.db")).unwrap();
    db.execute_batch("CREATE TABLE store (id TEXT); INSERT INTO store VALUES ('0421'); CREATE TABLE price (sku TEXT)")
        .unwrap();
}

#[test]
fn a_failure_as_a_whole_is_json_for_who_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |args: &[&str], exit: i32, code: &str| {
        let (got, stdout, stderr) = run(dir.path(), args);
        assert_eq!(got, exit, "{args:?}: {stdout}{stderr}");
        let told: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {stdout}{stderr}"));
        assert_eq!(told["code"], code, "{args:?}: {told}");
        let error = told["error"].as_str().unwrap().to_owned();
        assert!(stderr.contains(&format!("error: {error}")), "{args:?}: {error}\n{stderr}");
        error
    };
    fails(&["publish", "--json"], 2, "CONFIG");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    settings(dir.path(), taken.local_addr().unwrap().port());
    fails(&["publish", "--json"], 1, "KEYS");
    assert_eq!(run(dir.path(), &["init"]).0, 0);
    assert_eq!(run(dir.path(), &["publish", "--json"]).0, 0);
    fails(&["enroll", "0999", "--json"], 1, "UNKNOWN_STORE");
    fails(&["revoke", "0421-07", "--json"], 1, "NOT_ENROLLED");
    fails(&["export", "--store", "0999", "stick", "--json"], 1, "NO_MANIFEST");
    let in_use = fails(&["serve", "--json"], 1, "LISTEN");
    assert_eq!(in_use.matches("in use").count(), 1, "{in_use}");
    fs::rename(dir.path().join("hq.db"), dir.path().join("away.db")).unwrap();
    fails(&["publish", "--json"], 1, "SOURCE");
    let (_, stdout, stderr) = run(dir.path(), &["publish"]);
    assert!(stdout.is_empty() && stderr.contains("error: the source database cannot be reached"), "{stdout}{stderr}");
}

#[test]
fn a_wrong_url_or_address_is_a_matter_of_the_settings_in_every_command() {
    let dir = tempfile::tempdir().unwrap();
    settings(dir.path(), 0);
    assert_eq!(run(dir.path(), &["init"]).0, 0);
    let right = fs::read_to_string(dir.path().join("hq.toml")).unwrap();
    let mail = "[mail]\nsmtp = \"smtp://127.0.0.1:1\"\nto = [\"it@example.com\"]\nfrom = \"no address\"\n[publish]";
    let all: &[&[&str]] =
        &[&["check-config"], &["publish"], &["publish", "--dry-run"], &["enroll", "0421"], &["verify"]];
    for (was, wrong, told, commands) in [
        ("file:objects", "file:///srv/a?b", "objects.urls", all),
        ("file:objects", "s3:///prefix", "objects.urls", all),
        ("sqlite:hq.db", "postgres://h:port/d", "source.url", &all[..4]),
        ("[publish]", mail, "mail.from", &all[..1]),
    ] {
        fs::write(dir.path().join("hq.toml"), right.replace(was, wrong)).unwrap();
        for args in commands {
            let (exit, stdout, stderr) = run(dir.path(), &[*args, &["--json"][..]].concat());
            assert_eq!(exit, 2, "{wrong} {args:?}: {stdout}{stderr}");
            let answer: Value = serde_json::from_str(&stdout).unwrap();
            assert_eq!(answer["code"], "CONFIG", "{wrong} {args:?}: {answer}");
            assert!(answer["error"].as_str().unwrap().contains(told), "{wrong} {args:?}: {answer}");
        }
    }
    // Prices wait for no mail's sake.
    fs::write(dir.path().join("hq.toml"), right.replace("[publish]", mail)).unwrap();
    let (exit, stdout, _) = run(dir.path(), &["publish"]);
    assert_eq!(exit, 3, "{stdout}");
    assert!(stdout.contains("mail.from") && stdout.contains("published"), "{stdout}");
    // A timer reads no exit codes.
    fs::write(dir.path().join("hq.toml"), right).unwrap();
    let (_, status, _) = run(dir.path(), &["status", "--json"]);
    let waits = serde_json::from_str::<Value>(&status).unwrap()["outbox"].to_string();
    assert!(waits.contains("publish failed"), "{waits}");
}

#[test]
fn init_tells_a_script_what_it_wrote_and_what_it_made() {
    let dir = tempfile::tempdir().unwrap();
    let init = |at: &Path| {
        let (exit, stdout, stderr) = run(at, &["init", "--json"]);
        assert_eq!(exit, 0, "{stdout}{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"))
    };
    let told = init(dir.path());
    assert_eq!(told["outcome"], "settings written");
    for file in told["files"].as_array().unwrap() {
        assert!(dir.path().join(file.as_str().unwrap()).is_file(), "{told}");
    }
    settings(dir.path(), 0);
    assert_eq!((&init(dir.path())["outcome"], &init(dir.path())["outcome"]), (&"made".into(), &"found".into()));
}

#[test]
fn who_is_revoked_already_is_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    settings(dir.path(), 0);
    for args in [&["init"][..], &["enroll", "0421-03"]] {
        assert_eq!(run(dir.path(), args).0, 0, "{args:?}");
    }
    let revoke = || {
        let (exit, stdout, stderr) = run(dir.path(), &["revoke", "0421-03", "--json"]);
        assert_eq!(exit, 0, "{stderr}");
        let told: Value = serde_json::from_str(&stdout).unwrap();
        (told["revoked"] == true, told["was_revoked"] == true)
    };
    assert_eq!([revoke(), revoke()], [(true, false), (true, true)]);
    let (exit, stdout, _) = run(dir.path(), &["revoke", "0421-03"]);
    assert_eq!(exit, 0);
    assert!(stdout.starts_with("0421-03 is revoked already"), "{stdout}");
}

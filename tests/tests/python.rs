//! The Python scripts agree with the harness on what a digest is (the product has no part in this).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::process::Command;
use tillcast_tests::{digest, process, repository, temp_dir, tools};

#[test]
fn the_digest_script_and_the_harness_agree() {
    let dir = temp_dir("csv");
    let (base, delta) = (dir.path().join("base.csv"), dir.path().join("delta.csv"));
    std::fs::write(&base, "\u{feff}id,name,price,w\r\n1,\"a \"\"b\"\", c\",0.99,1.5\r\n2,Łódź,12.3,\r\n3,x,7,0\r\n")
        .unwrap();
    std::fs::write(&delta, "op,id,name,price,w\nD,1,,,\nU,3,y,7.01,-0\nI,4,,1,2e3\n").unwrap();
    let script = |files: &[&std::path::Path]| -> serde_json::Value {
        let mut c = Command::new(tools().join("venv/bin/python"));
        c.arg(repository().join("tests/python/digest.py")).args([
            "--key",
            "id",
            "id:integer,name:text?,price:cents,w:real?",
        ]);
        serde_json::from_str(&process::succeed(c.args(files))).unwrap()
    };
    let db = rusqlite::Connection::open_in_memory().unwrap();
    db.execute_batch("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, price INTEGER, w REAL) STRICT").unwrap();
    db.execute_batch("INSERT INTO t VALUES (1, 'a \"b\", c', 99, 1.5), (2, 'Łódź', 1230, NULL), (3, 'x', 700, 0.0)")
        .unwrap();
    let answer = script(&[&base]);
    assert_eq!(
        (answer["rows"].as_u64(), answer["digest"].as_str().unwrap()),
        (Some(3), digest::of_table(&db, "t").as_str())
    );
    db.execute_batch("DELETE FROM t WHERE id = 1; UPDATE t SET name = 'y', price = 701 WHERE id = 3; INSERT INTO t VALUES (4, NULL, 100, 2000)")
        .unwrap();
    assert_eq!(script(&[&base, &delta])["digest"], digest::of_table(&db, "t").as_str());
}

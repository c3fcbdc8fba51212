//! Files as batch jobs write them, good and bad.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use crate::source::{RowFault, RowSink};
use proto::limits::Limits;
use proto::schema::{Contract, Table};
use proto::value::Value;

const DDL: &str = "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL, cents INTEGER NOT NULL, kg REAL, pic BLOB, note TEXT) STRICT;";

#[derive(Default)]
struct Taken {
    rows: Vec<String>,
    faults: Vec<String>,
}
impl RowSink for Taken {
    fn row(&mut self, row: &[Value<'_>], line: Option<u64>) -> Result<(), SinkError> {
        let values: Vec<String> = row.iter().map(Value::for_people).collect();
        self.rows.push(format!("{}: {}", line.unwrap_or(0), values.join(" ")));
        Ok(())
    }
    fn fault(&mut self, fault: RowFault) -> Result<(), SinkError> {
        self.faults.push(fault.to_string());
        Ok(())
    }
}

fn table() -> Table {
    Contract::parse(DDL, &Limits::default()).unwrap().tables.remove(0)
}
fn read(bytes: &[u8], format: Format, complete: bool) -> (Taken, Result<(), String>) {
    let mut taken = Taken::default();
    let result = read_table(bytes, format, complete, 10_000, &table(), &mut taken).map_err(|e| e.to_string());
    (taken, result)
}
fn csv(text: &str) -> (Taken, Result<(), String>) {
    read(text.as_bytes(), Format::Csv, false)
}

#[test]
fn good_csv_is_typed_by_the_contract() {
    let (t, r) =
        csv("\u{feff}sku,cents,name,kg,pic,note\r\n007,-12,\"Tea, \"\"green\"\"\nnew\",1.5e1,AQI=,\r\n8,0,,,,x\r\n");
    r.unwrap();
    assert_eq!(t.faults, [""; 0]);
    assert_eq!(
        t.rows,
        ["2: \"007\" \"Tea, \\\"green\\\"\\nnew\" -12 15.0 blob of 2 bytes NULL", "4: \"8\" \"\" 0 NULL NULL \"x\"",]
    );
}

const HEADER: &str = "sku,name,cents,kg,pic,note\n";

#[test]
fn bad_csv_rows_are_told_with_line_key_and_column() {
    for (line, want) in [
        ("1,x,1.5,,,", "line 2, key sku=\"1\": column cents is \"1.5\", which is no integer"),
        ("1,x,,,,", "line 2, key sku=\"1\": column cents is empty, the contract has INTEGER NOT NULL"),
        ("1,x,007,,,", "column cents is \"007\": an INTEGER would lose the leading zero"),
        ("1,x, 7,,,", "column cents is \" 7\", which is no integer"),
        ("1,x,+7,,,", "no integer"),
        ("1,x,9223372036854775808,,,", "beyond a 64-bit signed integer"),
        ("1,x,1,\"1,5\",,", "column kg is \"1,5\", which is no real number"),
        ("1,x,1,nan,,", "no real number"),
        ("1,x,1,inf,,", "no real number"),
        ("1,x,1,1e999,,", "too great for a real"),
        (
            "1,x,1,9007199254740993,,",
            "line 2, key sku=\"1\": column kg is \"9007199254740993\", which a REAL column would round",
        ),
        ("1,x,1,-9007199254740993.00,,", "would round"),
        ("1,x,1,12345678901234567890.5,,", "would round"),
        ("1,x,1,18446744073709551617,,", "would round"),
        ("1,x,1,,%%,", "column pic is \"%%\", which is not base64"),
        ("1,x\0y,1,,,", "column name has a NUL character"),
        ("1,x,1,,", "line 2: the line has 5 fields, the header has 6"),
        ("1,x,1,,,,", "the line has 7 fields"),
    ] {
        let (t, r) = csv(&format!("{HEADER}{line}\n2,fine,2,,,\n"));
        r.unwrap();
        assert_eq!((t.rows.len(), t.faults.len()), (1, 1), "{line}: {:?}", t.faults);
        assert!(t.faults[0].contains(want), "{line}: {}", t.faults[0]);
    }
    // What a real holds, and what is no more exact than it is written.
    for kg in ["9007199254740994", "-0018446744073709551616.00", "1e23", "0.12345678901234567890", "9007199254740991.0"]
    {
        let (t, _) = csv(&format!("{HEADER}1,x,1,{kg},,\n"));
        assert_eq!((t.rows.len(), t.faults), (1, vec![]), "{kg}");
    }
    let (t, _) = read(&[HEADER.as_bytes(), b"1,\xff,1,,,\n"].concat(), Format::Csv, false);
    assert!(t.faults[0].contains("line 2, key sku=\"1\": column name is not UTF-8"), "{:?}", t.faults);
}

#[test]
fn files_that_are_broken_or_half_written_are_refused_with_the_line() {
    for (text, want) in [
        ("", "line 1: the file is empty"),
        ("sku,na", "line 1: the header line has no line break"),
        ("sku,name,cents,kg,pic\n", "line 1: column note is missing"),
        ("sku,name,cents,kg,pic,note,sku\n", "column `sku` is there twice"),
        ("sku,name,cents,kg,pic,note,price\n", "column `price` is not in the contract"),
        (&format!("{HEADER}1,x,1,,,\n2,\"open"), "line 3: a quote is opened and never closed"),
        (&format!("{HEADER}1,x,1,,,\n2,y,1"), "line 3: the last line has no line break"),
        (&format!("{HEADER}1,x,1,,,"), "line 2: the last line has no line break"),
        (&format!("{HEADER}1,\"x\"y,1,,,\n"), "line 2: text after a closing quote"),
        ("sku;name;cents;kg;pic;note\n", "line 1: \"sku;name;cents;kg;pic;note\": fields are separated by commas"),
    ] {
        let (_, r) = csv(text);
        let e = r.unwrap_err();
        assert!(e.contains(want), "{text:?}: {e}");
    }
    for (mark, format) in [(b"\xff\xfe", Format::Csv), (b"\xfe\xff", Format::Csv), (b"\xff\xfe", Format::Ndjson)] {
        let (_, r) = read(&[&mark[..], b"s\0k\0u\0"].concat(), format, true);
        assert_eq!(r.unwrap_err(), "line 1: the file is UTF-16: write it as UTF-8");
    }
    let (t, r) = read(format!("{HEADER}1,x,1,,,").as_bytes(), Format::Csv, true);
    r.unwrap();
    assert_eq!(t.rows.len(), 1, "NAME.ok vouches for the last line");
    let (t, r) = read(HEADER.trim_end().as_bytes(), Format::Csv, true);
    r.unwrap();
    assert_eq!((t.rows.len(), t.faults.len()), (0, 0), "a table without rows");
    let (t, r) = read(format!("{HEADER}1,x,1,,").as_bytes(), Format::Csv, true);
    r.unwrap();
    assert_eq!((t.rows.len(), t.faults.len()), (0, 1), "a line that lacks a field is no row, marked or not");
}

#[test]
fn ndjson_is_strict_about_types_and_names() {
    let good = "\u{feff}{\"sku\":\"007\",\"cents\":1,\"name\":\"ä\",\"kg\":2,\"pic\":\"AQI=\"}\r\n\n{\"name\":\"\",\"sku\":\"b\",\"cents\":true,\"note\":null}";
    let (t, r) = read(good.as_bytes(), Format::Ndjson, false);
    r.unwrap();
    assert_eq!(t.faults, [""; 0]);
    assert_eq!(t.rows, ["1: \"007\" \"ä\" 1 2.0 blob of 2 bytes NULL", "3: \"b\" \"\" 1 NULL NULL NULL"]);
    for (line, want) in [
        (r#"{"sku":"1","name":"x"}"#, "key sku=\"1\": column cents is missing and may not be NULL"),
        (r#"{"sku":1,"name":"x","cents":1}"#, "column sku is a number, the contract has TEXT"),
        (r#"{"sku":1.5,"name":"x","cents":1}"#, "column sku is a number, the contract has TEXT: write it in quotes"),
        (
            r#"{"sku":"1","name":"x","cents":"1"}"#,
            "column cents is the text \"1\", the contract has INTEGER: write it without quotes",
        ),
        (
            r#"{"sku":"1","name":"x","cents":1,"kg":"1.5"}"#,
            "column kg is the text \"1.5\", the contract has REAL: write",
        ),
        (r#"{"sku":"1","name":"x","cents":1,"pic":7}"#, "column pic is a number, the contract has BLOB: write base64"),
        (r#"{"sku":"1","name":"x","cents":1.5}"#, "column cents is the real 1.5, the contract has INTEGER (cents"),
        (
            r#"{"sku":"1","name":"x","cents":12.99999999999999999}"#,
            "column cents is 12.99999999999999999, the contract has INTEGER (cents",
        ),
        (r#"{"sku":"1","name":"x","cents":4503599627370497.25}"#, "column cents is 4503599627370497.25, the contract"),
        (r#"{"sku":"1","name":"x","cents":1299999999999999999999e-20}"#, "column cents is 1299999999999999999999e-20,"),
        (r#"{"sku":"1","name":"x","cents":9007199254740993.0}"#, "column cents is \"9007199254740993.0\", which is no"),
        (r#"{"sku":"1","name":"x","cents":18446744073709551617}"#, "column cents is \"18446744073709551617\", beyond"),
        (
            r#"{"sku":"1","name":"x","cents":1,"kg":9007199254740993}"#,
            "9007199254740993, which a REAL column would round",
        ),
        (r#"{"sku":"1","name":"x","cents":1,"kg":100000000000000000001}"#, "which a REAL column would round"),
        (r#"{"kg":9007199254740993.0,"sku":"1","name":"x","cents":1}"#, "which a REAL column would round"),
        (r#"{"sku":"1","name":"x","cents":1,"price":2}"#, "column \"price\" is not in the contract"),
        (r#"{"sku":"1","sku":"2","name":"x","cents":1}"#, "column \"sku\" is there twice"),
        (r#"{"sku":"1","name":["x"],"cents":1}"#, "not a JSON object of the table's columns"),
        (r#"{"sku":"1","name":"x","cents":1} x"#, "not a JSON object"),
        (r#"["1","x",1]"#, "not a JSON object"),
        (r#"{"sku":"1","name":"x","cen"#, "not a JSON object"),
    ] {
        let (t, r) = read(line.as_bytes(), Format::Ndjson, false);
        r.unwrap();
        assert!(t.faults.len() == 1 && t.faults[0].contains(want), "{line}: {:?}", t.faults);
        assert!(!t.faults[0].contains("query"), "there is none: {:?}", t.faults);
    }
    // Whole numbers, however they are written.
    for cents in ["-12.0", "-1.2E+1", "-1200e-2", "-12.00000000000000000000", "-0.0012e4"] {
        let (t, _) =
            read(format!("{{\"sku\":\"1\",\"name\":\"x\",\"cents\":{cents}}}").as_bytes(), Format::Ndjson, false);
        assert_eq!((t.rows, t.faults), (vec!["1: \"1\" \"x\" -12 NULL NULL NULL".to_owned()], vec![]), "{cents}");
    }
    let (t, _) = read(b"\n{\"sku\":\n\"1\"}\n", Format::Ndjson, false);
    let of_line =
        |n: u64, what: &str| format!("table item, line {n}: not a JSON object of the table's columns: {what}");
    assert_eq!(t.faults[0], of_line(2, "EOF while parsing a value (byte 7)"), "JSON's own line is not told");
    assert!(t.faults[1].starts_with(&of_line(3, "invalid type")), "{:?}", t.faults);
    let exact = r#"{"sku":"1","name":"x","cents":1,"kg":18446744073709551616}"#;
    assert_eq!(read(exact.as_bytes(), Format::Ndjson, false).0.faults, [""; 0]);
}

/// Whose fault it is decides whether the file goes to `rejected/`.
#[test]
fn a_disk_that_fails_is_not_the_files_fault() {
    struct Fails;
    impl std::io::Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("stale"))
        }
    }
    use std::io::Read as _;
    for (text, format) in [("", Format::Csv), (HEADER, Format::Csv), ("{", Format::Ndjson)] {
        let mut taken = Taken::default();
        let e = read_table(text.as_bytes().chain(Fails), format, true, 1000, &table(), &mut taken).unwrap_err();
        assert_eq!((e.blame, e.reason.as_str()), (Blame::Disk, "it cannot be read: stale"), "{text}");
    }
    assert_eq!(read_stores(b"id\n".chain(Fails), true, 1000).unwrap_err().blame, Blame::Disk);
}

#[test]
fn stores_are_read_from_csv() {
    let stores = read_stores(&b"region,id,zone\nNorth,2,\n,1,east\n"[..], false, 1000).unwrap();
    assert_eq!(stores.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(stores[0].zone.as_ref().map(|z| z.as_str()), Some("east"));
    let e = read_stores(&b"id,zone\n1,east\n1,west\n../x,a\n2\n"[..], false, 1000).unwrap_err().to_string();
    for part in ["1 is listed twice", "../x", "line 5 has 1 fields"] {
        assert!(e.contains(part), "{part}: {e}");
    }
    let e = read_stores(&b"id,zone\n1,ea"[..], false, 1000).unwrap_err().to_string();
    assert!(e.contains("line 2: the last line has no line break") && e.contains("put NAME.ok beside"), "{e}");
    assert_eq!(read_stores(&b"id,zone\n1,east"[..], true, 1000).unwrap().len(), 1);
}

#[test]
fn names_are_parsed_or_refused() {
    let Some(Ok(What::Table { instance, table, format })) = parse_name("price.zone-east.price.ndjson") else {
        panic!()
    };
    assert_eq!((instance.to_string().as_str(), table.as_str(), format), ("price@zone-east", "price", Format::Ndjson));
    assert_eq!(parse_name("stores.csv"), Some(Ok(What::Stores)));
    for name in [
        "price.csv",
        "price.zone-east.csv",
        "a.b.c.d.csv",
        "price.zone-East.price.csv",
        "price.all.tillcast_x.csv",
        "price.store-..-x.p.csv",
        "p;drop.all.t.csv",
    ] {
        assert!(matches!(parse_name(name), Some(Err(_))), "{name}");
    }
    for name in ["x.csv.ok", "price.zone-east.price.csv.part", ".price.all.price.csv", "README", "x.txt"] {
        assert_eq!(parse_name(name), None, "{name}");
    }
}

fn seen(name: &str, bytes: u64, marked: bool) -> Seen {
    Seen { name: name.into(), path: name.into(), stamp: (bytes, 0), marked }
}

#[test]
fn a_file_is_taken_when_it_rested_or_is_vouched_for() {
    let s = Duration::from_secs;
    let mut w = Watch::new(s(2));
    let ready = |look: &Look| look.ready.iter().map(|d| d.file.name.clone()).collect::<Vec<_>>();
    let look = w.observe(vec![seen("a.all.a.csv", 5, false), seen("b.all.b.csv", 5, true)], s(10));
    assert_eq!((ready(&look), look.waiting.len(), look.next), (vec!["b.all.b.csv".to_owned()], 1, Some(s(12))));
    let look = w.observe(vec![seen("a.all.a.csv", 9, false)], s(11));
    assert_eq!(look.next, Some(s(13)), "it grew");
    assert!(ready(&w.observe(vec![seen("a.all.a.csv", 9, false)], s(12))).is_empty());
    assert_eq!(ready(&w.observe(vec![seen("a.all.a.csv", 9, false)], s(13))), ["a.all.a.csv"]);
    // Gone and back: another file.
    w.observe(vec![], s(14));
    assert!(ready(&w.observe(vec![seen("a.all.a.csv", 9, false)], s(15))).is_empty());
}

#[test]
fn an_older_marker_vouches_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str, seconds| {
        let file = std::fs::File::create(dir.path().join(name)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    };
    let marked = || Inbox::new(dir.path()).look().unwrap()[0].marked;
    for (drop, marker, want) in [(10, 10, true), (20, 10, false), (20, 30, true)] {
        at("a.all.a.csv", drop);
        at("a.all.a.csv.ok", marker);
        assert_eq!(marked(), want, "{drop} {marker}");
    }
}

#[test]
fn what_may_be_taken_for_a_drop_and_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = [
        "README",
        "a.all.a.csv",
        "a.all.a.csv.ok",
        ".b.all.b.CSV",
        "c.all.c.csv.part",
        "d.all.d.json",
        "CSV",
        "é",
        "k.all.k.ndjson.ok",
        "NOTES.ok",
        ".l.all.l.ok",
    ];
    let named =
        ["e.all.e.CSV", "f.all.f.ndJson", "g.all.g.csv.OK", "h.all.h.jsonl", "j.all.j.ok", "stores.Csv", "stores.ok"];
    for name in quiet.iter().chain(&named).chain(&["e.all.e.CSV.ok", "h.all.h.jsonl.ok"]) {
        std::fs::write(dir.path().join(name), "x").unwrap();
    }
    std::fs::create_dir(dir.path().join("i.all.i.csv.ok")).unwrap();
    let strays = Inbox::new(dir.path()).strays().unwrap();
    let found: Vec<&str> = strays.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        found,
        [
            "e.all.e.CSV",
            "f.all.f.ndJson",
            "g.all.g.csv.OK",
            "h.all.h.jsonl",
            "i.all.i.csv.ok",
            "j.all.j.ok",
            "stores.Csv",
            "stores.ok"
        ]
    );
    for (n, why) in [
        (0, "small letters"),
        (2, "small letters"),
        (3, "NAME.ok lies beside it"),
        (4, "is a directory"),
        (5, "whole name, .csv or .ndjson included"),
        (7, "whole name"),
    ] {
        assert!(strays[n].1.contains(why), "{:?}", strays[n]);
    }
}

#[test]
fn moved_drops_leave_no_marker_and_changed_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let inbox = Inbox::new(dir.path());
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let drop_of = |name: &str| {
        let file = inbox.look().unwrap().into_iter().find(|f| f.name == name).unwrap();
        Drop { what: parse_name(name).unwrap(), file }
    };
    put("a.all.a.csv", "x");
    put("a.all.a.csv.ok", "");
    let d = drop_of("a.all.a.csv");
    assert!(d.file.marked);
    assert!(inbox.done(&d).unwrap());
    assert!(dir.path().join("done/a.all.a.csv").exists());
    assert!(inbox.look().unwrap().is_empty());
    // What is no file was no marker.
    put("a.all.a.csv", "x");
    std::fs::create_dir(dir.path().join("a.all.a.csv.ok")).unwrap();
    assert!(inbox.done(&drop_of("a.all.a.csv")).unwrap());
    put("b.all.b.csv", "x");
    let d = drop_of("b.all.b.csv");
    put("b.all.b.csv", "other");
    assert!(!inbox.done(&d).unwrap(), "it says something else now");
    assert!(dir.path().join("b.all.b.csv").exists());
    // It came between the look and the move.
    assert!(!inbox.place("done", &d).unwrap());
    assert_eq!(std::fs::read_to_string(dir.path().join("b.all.b.csv")).unwrap(), "other");
    assert!(!dir.path().join("done/b.all.b.csv").exists());
    assert!(inbox.reject(&drop_of("b.all.b.csv"), "line 2: no").unwrap());
    assert_eq!(std::fs::read_to_string(dir.path().join("rejected/b.all.b.csv.reason.txt")).unwrap(), "line 2: no\n");
    assert!(dir.path().join("rejected/b.all.b.csv").exists());
}

#[tokio::test]
async fn a_drop_is_told_when_it_appears_and_when_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let news = Arc::new(Notify::new());
    let _watcher = Inbox::new(dir.path()).tell(&news).unwrap();
    let told = || async { tokio::time::timeout(Duration::from_secs(30), news.notified()).await.unwrap() };
    let mut file = std::fs::File::create(dir.path().join("price.all.price.csv")).unwrap();
    told().await;
    std::io::Write::write_all(&mut file, b"sku\n").unwrap();
    drop(file);
    told().await;
    std::fs::rename(dir.path().join("price.all.price.csv"), dir.path().join("price.all.item.csv")).unwrap();
    told().await;
}

#[test]
fn a_line_without_end_is_refused_in_either_format() {
    let long = "x".repeat(10_001);
    for (text, format) in
        [(format!("{HEADER}{long},b,1,,,\n"), Format::Csv), (format!("{{\"sku\":\"{long}\"}}\n"), Format::Ndjson)]
    {
        let e = read(text.as_bytes(), format, true).1.unwrap_err();
        assert!(e.contains("limits.line_bytes"), "{e}");
    }
}

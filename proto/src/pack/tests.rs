use super::*;
use crate::limits::Limits;
use crate::manifest::PackEntry;
use crate::value::Value;
use std::io::Read;

const DDL: &str = "CREATE TABLE price (sku TEXT PRIMARY KEY, cents INTEGER NOT NULL, note TEXT) STRICT;";

fn header(kind: PackKind, version: u64, base: Option<u64>) -> Header {
    let contract = Contract::parse(DDL, &Limits::default()).unwrap();
    Header {
        format: 1,
        stream: "price".parse().unwrap(),
        audience: "zone-east".parse().unwrap(),
        version: version.try_into().unwrap(),
        base: base.map(|b| b.try_into().unwrap()),
        kind,
        schema: SchemaPart { number: 1, ddl: DDL.into(), sha256: contract.sha256, migrate: vec![] },
        created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        source: "test".into(),
        tables: table_heads(&contract),
    }
}

fn names(n: &[&str]) -> Vec<ColumnName> {
    n.iter().map(|n| n.parse().unwrap()).collect()
}

fn delta(rows: usize) -> (Vec<u8>, PackEntry) {
    let table: TableName = "price".parse().unwrap();
    let mut w = PackWriter::new(Vec::new(), &header(PackKind::Delta, 2, Some(1)), 6).unwrap();
    w.section(&table, Op::Delete, &names(&["sku"])).unwrap();
    w.row(&[Value::Text("gone".into())]).unwrap();
    w.section(&table, Op::Update, &names(&["sku", "cents"])).unwrap();
    for i in 0..rows {
        w.row(&[Value::Text(format!("sku {i}").into()), Value::Int(i as i64)]).unwrap();
    }
    w.section(&table, Op::Insert, &names(&["sku", "cents", "note"])).unwrap();
    w.row(&[Value::Text("new\n\"1\"".into()), Value::Int(5), Value::Null]).unwrap();
    let (bytes, written) = w.finish(&BTreeMap::from([(table, StateDigest::default())])).unwrap();
    let entry = entry_of(&bytes, written.unpacked);
    assert_eq!((written.bytes, written.sha256), (entry.bytes, entry.sha256));
    (bytes, entry)
}

fn entry_of(bytes: &[u8], unpacked: u64) -> PackEntry {
    PackEntry {
        version: 2u64.try_into().unwrap(),
        kind: PackKind::Delta,
        base: Some(1u64.try_into().unwrap()),
        bytes: bytes.len() as u64,
        unpacked,
        sha256: Sha256::of(bytes),
    }
}

fn read_all(bytes: &[u8], entry: &PackEntry, limits: &Limits) -> Result<RowCounts, PackError> {
    let mut r = PackReader::new(bytes, &"price@zone-east".parse().unwrap(), entry, limits)?;
    loop {
        if let Event::End(t) = r.next()? {
            r.finish()?;
            return Ok(t.rows);
        }
    }
}

/// A pack of lines put together by hand, with an entry that lists it as it is.
fn by_hand(lines: &str) -> (Vec<u8>, PackEntry) {
    use std::io::Write as _;
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(lines.as_bytes()).unwrap();
    let bytes = gz.finish().unwrap();
    let entry = entry_of(&bytes, lines.len() as u64);
    (bytes, entry)
}

fn text(bytes: &[u8]) -> String {
    let mut out = String::new();
    flate2::read::GzDecoder::new(bytes).read_to_string(&mut out).unwrap();
    out
}

#[test]
fn rows_are_counted_and_told_by_what_is_done_with_them() {
    let mut rows = RowCounts::default();
    for (op, times) in [(Op::Delete, 2), (Op::Update, 3), (Op::Insert, 5)] {
        (0..times).for_each(|_| rows.count(op));
    }
    assert_eq!((rows.total(), rows.to_string().as_str()), (10, "2 deleted, 3 updated, 5 inserted"));
    let words = [Op::Delete, Op::Update, Op::Insert].map(|op| format!("{op:>7}"));
    assert_eq!(words, [" delete", " update", " insert"]);
}

#[test]
fn a_pack_is_read_as_written() {
    let (bytes, entry) = delta(3);
    let rows = read_all(&bytes, &entry, &Limits::default()).unwrap();
    assert_eq!(rows, RowCounts { delete: 1, update: 3, insert: 1 });
}

#[test]
fn a_pack_at_its_limits_is_read_and_one_beyond_them_is_refused() {
    let (bytes, entry) = delta(3);
    let lines = text(&bytes);
    let longest = lines.lines().map(str::len).max().unwrap() as u64 + 1;
    let with = |rows, line_bytes| read_all(&bytes, &entry, &Limits { rows, line_bytes, ..Limits::default() });
    assert_eq!(with(5, longest).unwrap().total(), 5);
    let too_much = |r: Result<RowCounts, PackError>| match r {
        Err(PackError::TooMuch { line, limit }) => (line, limit),
        other => panic!("{other:?}"),
    };
    // Lines: the header, a section and its row, a section and its three, a section and its row.
    assert_eq!(too_much(with(4, longest)), (9, "limits.rows = 4".to_owned()));
    assert_eq!(too_much(with(5, longest - 1)), (1, format!("limits.line_bytes = {}", longest - 1)));
    let short = Limits { unpacked_bytes: entry.unpacked - 1, ..Limits::default() };
    assert_eq!(too_much(read_all(&bytes, &entry, &short)).0, lines.lines().count() as u64);
    let (head, rest) = lines.split_once('\n').unwrap();
    let three: String = [head].into_iter().chain(rest.lines().take(2)).map(|l| format!("{l}\n")).collect();
    let (cut, cut_entry) = by_hand(&three);
    let e = read_all(&cut, &cut_entry, &Limits::default()).unwrap_err();
    assert!(matches!(e, PackError::Truncated { line: 3 }), "{e:?}");
    let mut r = PackReader::new(&bytes[..], &"price@zone-east".parse().unwrap(), &entry, &Limits::default()).unwrap();
    for line in 1..=lines.lines().count() as u64 {
        assert_eq!(r.line_number(), line);
        let _ = r.next();
    }
}

#[test]
fn tables_in_any_order_and_fields_of_later_builds_are_read_over() {
    let ddl = "CREATE TABLE b (id INTEGER PRIMARY KEY, n TEXT) STRICT; CREATE TABLE a (id INTEGER PRIMARY KEY) STRICT;";
    let contract = Contract::parse(ddl, &Limits::default()).unwrap();
    let mut header = header(PackKind::Delta, 2, Some(1));
    header.schema = SchemaPart { number: 1, ddl: ddl.into(), sha256: contract.sha256, migrate: vec![] };
    let read = |tables: Vec<TableHead>, lines: &str| {
        let head = serde_json::to_string(&Header { tables, ..header.clone() }).unwrap();
        let (bytes, entry) = by_hand(&format!("{head}\n{lines}\n"));
        read_all(&bytes, &entry, &Limits::default())
    };
    let plain = r#"{"rows":{"delete":0,"update":0,"insert":0},"digests":{}}"#;
    let [a, b] = table_heads(&contract).try_into().unwrap();
    read(vec![a.clone(), b.clone()], plain).unwrap();
    read(vec![b.clone(), a.clone()], plain).unwrap();
    let mut turned = b.clone();
    turned.columns.reverse();
    for tables in [vec![b.clone()], vec![a.clone(), b.clone(), b.clone()], vec![a.clone(), turned]] {
        assert!(read(tables, plain).unwrap_err().to_string().contains("not those of the DDL"));
    }
    let later = r#"{"table":"b","op":"insert","columns":["id","n"],"sorted":true}
[1,"x"]
{"rows":{"delete":0,"update":0,"insert":1,"merge":0},"digests":{},"later":[{}]}"#;
    assert_eq!(read(vec![a, b], later).unwrap(), RowCounts { insert: 1, ..RowCounts::default() });
}

#[test]
fn a_pack_cut_anywhere_is_refused() {
    let (bytes, entry) = delta(3);
    for cut in 0..bytes.len() {
        assert!(read_all(&bytes[..cut], &entry, &Limits::default()).is_err(), "cut at {cut}");
        let listed_so = PackEntry { bytes: cut as u64, sha256: Sha256::of(&bytes[..cut]), ..entry.clone() };
        assert!(read_all(&bytes[..cut], &listed_so, &Limits::default()).is_err(), "listed as cut at {cut}");
    }
}

/// A pack of 64 KiB: hex digits pack to half.
fn large() -> (Vec<u8>, PackEntry) {
    let table: TableName = "price".parse().unwrap();
    let mut w = PackWriter::new(Vec::new(), &header(PackKind::Delta, 2, Some(1)), 6).unwrap();
    w.section(&table, Op::Insert, &names(&["sku", "cents", "note"])).unwrap();
    for i in 0..100u64 {
        let noise: String = (0..24).map(|n| Sha256::of(format!("{i} {n}").as_bytes()).to_string()).collect();
        w.row(&[Value::Text(format!("sku {i}").into()), Value::Int(i as i64), Value::Text(noise.into())]).unwrap();
    }
    let (bytes, written) = w.finish(&BTreeMap::from([(table, StateDigest::default())])).unwrap();
    let entry = entry_of(&bytes, written.unpacked);
    assert!(bytes.len() > 64 << 10, "{}", bytes.len());
    (bytes, entry)
}

fn refuse_each_flipped_bit((bytes, entry): (Vec<u8>, PackEntry)) {
    let bits = bytes.len() * 8;
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let some = |first: usize| {
        let mut bent = bytes.clone();
        for bit in (first..bits).step_by(workers) {
            bent[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&bent, &entry, &Limits::default()).is_err(), "bit {bit}");
            bent[bit / 8] ^= 1 << (bit % 8);
        }
    };
    std::thread::scope(|scope| (0..workers).for_each(|n| drop(scope.spawn(move || some(n)))));
}

#[test]
fn every_flipped_bit_is_refused() {
    refuse_each_flipped_bit(delta(3));
}

#[test]
#[ignore = "half a million bits take minutes"]
fn every_flipped_bit_of_a_large_pack_is_refused() {
    refuse_each_flipped_bit(large());
}

#[test]
fn more_bytes_than_listed_are_not_looked_at() {
    let (bytes, entry) = delta(3);
    let mut longer = bytes.clone();
    longer.extend_from_slice(b"garbage");
    assert!(matches!(read_all(&longer, &entry, &Limits::default()), Err(PackError::Trailing(_))));
    let twice = [bytes.as_slice(), bytes.as_slice()].concat();
    let listed = entry_of(&twice, entry.unpacked);
    assert!(matches!(read_all(&twice, &listed, &Limits::default()), Err(PackError::Trailing(_))));
}

#[test]
fn a_bomb_stops_at_what_was_declared() {
    let (bytes, entry) = by_hand(&format!("{}\n", "[".repeat(20 << 20)));
    let small = PackEntry { unpacked: 1000, ..entry.clone() };
    assert!(matches!(read_all(&bytes, &small, &Limits::default()), Err(PackError::TooMuch { line: 1, .. })));
    assert!(matches!(read_all(&bytes, &entry, &Limits::default()), Err(PackError::TooMuch { line: 1, .. })));
}

#[test]
fn rows_and_nesting_are_bounded() {
    let (bytes, entry) = delta(50);
    let limits = Limits { rows: 20, ..Limits::default() };
    assert!(matches!(read_all(&bytes, &entry, &limits), Err(PackError::TooMuch { .. })));
    let (bytes, entry) = by_hand(&format!("{}{}\n", "{\"a\":".repeat(100_000), "1"));
    assert!(matches!(read_all(&bytes, &entry, &Limits::default()), Err(PackError::Line { line: 1, .. })));
}

#[test]
fn what_is_not_the_named_pack_is_refused() {
    let (bytes, entry) = delta(1);
    let limits = Limits::default();
    let other =
        |e: &PackEntry, i: &str| PackReader::new(&bytes[..], &i.parse().unwrap(), e, &limits).map(|_| ()).unwrap_err();
    assert!(matches!(other(&entry, "price@zone-west"), PackError::OtherPack(_)));
    assert!(matches!(other(&entry, "promo@zone-east"), PackError::OtherPack(_)));
    let wrong_base = PackEntry { base: None, kind: PackKind::Full, ..entry.clone() };
    assert!(matches!(other(&wrong_base, "price@zone-east"), PackError::OtherPack(_)));
}

#[test]
fn lines_that_break_the_format_are_refused_by_number() {
    let good = text(&delta(1).0);
    let swap = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} in {good}");
        let (bytes, entry) = by_hand(&good.replacen(from, to, 1));
        read_all(&bytes, &entry, &Limits::default()).unwrap_err().to_string()
    };
    for (from, to, why) in [
        (
            "\"op\":\"insert\",\"columns\":[\"sku\",\"cents\",\"note\"]",
            "\"op\":\"delete\",\"columns\":[\"sku\"]",
            "after a later operation",
        ),
        ("\"columns\":[\"sku\",\"cents\"]}", "\"columns\":[\"sku\",\"price\"]}", "column price is not in table price"),
        ("\"columns\":[\"sku\",\"cents\"]}", "\"columns\":[\"sku\",\"sku\"]}", "line 4"),
        ("\"format\":1", "\"format\":2", "format 2"),
        ("\"op\":\"delete\"", "\"op\":\"upsert\"", "line 2"),
        ("\"table\":\"price\",\"op\"", "\"table\":\"cost\",\"op\"", "not in the contract"),
        ("\"columns\":[\"sku\",\"cents\"]}", "\"columns\":[\"cents\",\"sku\"]}", "line 4"),
        ("\"columns\":[\"sku\",\"cents\"]}", "\"columns\":[\"sku\"]}", "line 4"),
        ("\"columns\":[\"sku\",\"cents\"]}", "\"columns\":[\"sku\",\"cents\",\"cents\"]}", "line 4"),
        ("\"op\":\"update\"", "\"op\":\"insert\"", "line 4"),
        ("\"rows\":{\"delete\":1", "\"rows\":{\"delete\":2", "counts"),
        ("{\"rows\"", "{ \"rows\"", "line"),
        (r#"{"table":"price","op":"delete","columns":["sku"]}"#, r#" ["price","delete",["sku"]]"#, "neither"),
        ("sku TEXT", "sku2 TEXT", "line 1"),
    ] {
        let e = swap(from, to);
        assert!(e.contains(why), "{from} -> {to}: {e}");
    }
    let (bytes, entry) = by_hand(&format!("{good}[\"x\"]\n"));
    assert!(matches!(read_all(&bytes, &entry, &Limits::default()), Err(PackError::Trailing(_))));
}

#[test]
fn a_full_inserts_and_migrates_nothing() {
    let read = |migrate: &[&str], lines: &str| {
        let mut head = header(PackKind::Full, 2, None);
        head.schema.migrate = migrate.iter().map(|s| (*s).to_owned()).collect();
        let (bytes, entry) = by_hand(&format!("{}\n{lines}\n", serde_json::to_string(&head).unwrap()));
        let entry = PackEntry { kind: PackKind::Full, base: None, ..entry };
        read_all(&bytes, &entry, &Limits::default()).map_err(|e| e.to_string())
    };
    let end = r#"{"rows":{"delete":0,"update":0,"insert":0},"digests":{}}"#;
    read(&[], end).unwrap();
    assert!(
        read(&["ALTER TABLE price ADD COLUMN x TEXT"], end).unwrap_err().contains("migration statements in a full")
    );
    let section = |op: &str, columns: &str| format!(r#"{{"table":"price","op":"{op}","columns":[{columns}]}}"#);
    for (op, columns) in [("delete", r#""sku""#), ("update", r#""sku","cents""#)] {
        let e = read(&[], &format!("{}\n{end}", section(op, columns))).unwrap_err();
        assert!(e.contains(&format!("a section of {op} in a full")), "{e}");
    }
}

#[test]
fn a_pack_ends_once_and_with_a_whole_line() {
    let good = text(&delta(1).0);
    for (lines, last) in [("", 0), (good.trim_end(), good.lines().count() as u64)] {
        let (bytes, entry) = by_hand(lines);
        let e = read_all(&bytes, &entry, &Limits::default()).unwrap_err();
        assert!(matches!(e, PackError::Truncated { line } if line == last), "{last}: {e:?}");
    }
    let reader = |lines: &str| {
        let (bytes, entry) = by_hand(lines);
        PackReader::new(std::io::Cursor::new(bytes), &"price@zone-east".parse().unwrap(), &entry, &Limits::default())
            .unwrap()
    };
    assert!(matches!(reader(&good).finish(), Err(PackError::Truncated { .. })), "before its end");
    let mut more = reader(&format!("{good}[\"x\"]\n"));
    while !matches!(more.next().unwrap(), Event::End(_)) {}
    assert!(matches!(more.next(), Err(PackError::Trailing(_))));
    // Of which the manifest says more than there is.
    let (bytes, entry) = by_hand(&good);
    let longer = PackEntry { bytes: entry.bytes + 1, ..entry };
    assert!(matches!(read_all(&bytes, &longer, &Limits::default()), Err(PackError::NotListed(_))));
}

#[test]
fn a_section_out_of_order_is_not_written() {
    let table: TableName = "price".parse().unwrap();
    let mut w = PackWriter::new(Vec::new(), &header(PackKind::Delta, 2, Some(1)), 6).unwrap();
    w.section(&table, Op::Update, &names(&["sku", "cents"])).unwrap();
    let e = w.section(&table, Op::Delete, &names(&["sku"])).unwrap_err();
    assert!(e.to_string().contains("a delete section after a later operation"), "{e}");
}

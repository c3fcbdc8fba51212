//! Whose tables, views and indexes are: another stream's, the POS application's, or nobody's any more.

use super::*;

#[test]
fn a_full_takes_the_place_of_tables_whose_version_was_lost() {
    let shop = Shop::new();
    let one = simple(&[("a", 1.0), ("b", 2.0)]);
    let full = shop.full("all", 1, &one);
    for loss in ["DELETE FROM tillcast_stream", "DELETE FROM tillcast_table", "UPDATE tillcast_table SET stream = 'x'"]
    {
        let mut r = shop.replica("r.db");
        apply(&mut r, "all", &[&full]).unwrap();
        r.connection().execute_batch(loss).unwrap();
        let checks = r.verify(&"catalog".parse().unwrap()).unwrap();
        assert!(loss.starts_with("DELETE FROM tillcast_stream") || !checks[0].is_right(), "{loss}");
        apply(&mut r, "all", &[&full]).unwrap();
        assert_right(&r, &one, false);
    }
}

/// What is logged meanwhile.
fn logged(work: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let lines = log.clone();
    let to_log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || lines.clone()).finish();
    tracing::subscriber::with_default(to_log, work);
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_table_of_somebody_elses_is_replaced_with_a_warning() {
    let shop = Shop::new();
    let one = simple(&[("a", 1.0)]);
    let full = shop.full("all", 1, &one);
    for (n, (before, warned)) in [
        ("CREATE TABLE item (code INTEGER, label TEXT); INSERT INTO item VALUES (1, 'tea')", true),
        ("CREATE TABLE Item (code INTEGER, label TEXT); INSERT INTO Item VALUES (1, 'tea')", true),
        ("CREATE TABLE item (code INTEGER, label TEXT)", false),
        ("CREATE TABLE mine (code INTEGER, label TEXT); INSERT INTO mine VALUES (1, 'tea')", false),
        // A rest of our own: its stream was forgotten, or another one had it.
        ("CREATE TABLE item (sku TEXT PRIMARY KEY, plu INTEGER); INSERT INTO item VALUES ('a', 1)", false),
        (
            "CREATE TABLE item (code INTEGER); INSERT INTO item VALUES (1); INSERT INTO tillcast_table VALUES ('item', 'old', '')",
            false,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let mut r = shop.replica(&format!("{n}.db"));
        r.connection().execute_batch(before).unwrap();
        let log = logged(|| assert_eq!(apply(&mut r, "all", &[&full]).unwrap().version, v(1)));
        assert_right(&r, &one, false);
        assert_eq!(log.contains("WARN") && log.contains("table=item"), warned, "{before}: {log}");
    }
}

#[test]
fn a_stream_that_is_not_wanted_goes_with_its_tables() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    apply(&mut r, "all", &[&shop.full("all", 1, &simple(&[("a", 1.0)]))]).unwrap();
    assert_eq!(r.drop_streams_except(&["catalog".parse().unwrap()]).unwrap(), []);
    assert_eq!(r.drop_streams_except(&[]).unwrap(), ["catalog".parse().unwrap()]);
    assert!(r.connection().prepare("SELECT * FROM item").is_err());
}

/// A pack of a stream with these tables, each with one row.
fn pack_of(shop: &Shop, stream: &str, version: u64, ddl: &str, tables: &[&str]) -> (PathBuf, PackEntry) {
    let contract = Contract::parse(ddl, &Limits::default()).unwrap();
    let header = Header {
        format: 1,
        stream: stream.parse().unwrap(),
        audience: Audience::All,
        version: v(version),
        base: None,
        kind: PackKind::Full,
        schema: SchemaPart { number: version, ddl: ddl.into(), sha256: contract.sha256, migrate: vec![] },
        created_at: now(),
        source: "test".into(),
        tables: table_heads(&contract),
    };
    let mut w = PackWriter::new(Vec::new(), &header, 1).unwrap();
    let mut digests = BTreeMap::new();
    for table in tables {
        let row = [Value::Int(version as i64)];
        w.section(&table.parse().unwrap(), Op::Insert, &["id".parse().unwrap()]).unwrap();
        w.row(&row).unwrap();
        let mut digest = StateDigest::default();
        digest.add(RowHasher::default().hash(&row));
        digests.insert(table.parse().unwrap(), digest);
    }
    let (bytes, written) = w.finish(&digests).unwrap();
    let path = shop.dir.path().join(format!("{stream}-{version}.pack"));
    std::fs::write(&path, &bytes).unwrap();
    let (kind, base) = (PackKind::Full, None);
    let (bytes, unpacked, sha256) = (written.bytes, written.unpacked, written.sha256);
    (path, PackEntry { version: v(version), kind, base, bytes, unpacked, sha256 })
}

#[test]
fn a_table_that_another_stream_is_to_have_is_read_until_it_comes() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let ddl = |tables: &[&str]| {
        let of =
            |t: &&str| format!("CREATE TABLE {t} (id INTEGER PRIMARY KEY) STRICT;\nCREATE INDEX {t}_by ON {t} (id);\n");
        tables.iter().map(of).collect::<String>()
    };
    let list = |streams: &[(&str, &[&str])]| -> Listed {
        let tables = |tables: &[&str]| tables.iter().map(|t| t.parse().unwrap()).collect();
        streams.iter().map(|(s, t)| (s.parse().unwrap(), Some(tables(t)))).collect()
    };
    let bring = |r: &mut Replica, listed: &Listed, stream: &str, version: u64, ddl: &str, tables: &[&str]| {
        let (path, entry) = pack_of(&shop, stream, version, ddl, tables);
        let (instance, packs) = (format!("{stream}@all").parse().unwrap(), [PackFile { path: &path, entry: &entry }]);
        r.apply(&Job { instance: &instance, epoch: 1, packs: &packs, now: now(), prove: false, listed: Some(listed) })
    };
    let there = |r: &Replica, table: &str| {
        r.connection().query_row(&format!("SELECT id FROM {table}"), [], |r| r.get::<_, i64>(0)).ok()
    };
    let one = list(&[("old", &["a", "b", "c"])]);
    bring(&mut r, &one, "old", 1, &ddl(&["a", "b", "c"]), &["a", "b", "c"]).unwrap();
    // A stream that is listed loses nothing to another: that one waits.
    let early = list(&[("old", &["b", "c"]), ("x", &["a"])]);
    let held = r.all_held().unwrap();
    assert_eq!(bring(&mut r, &early, "x", 2, &ddl(&["a"]), &["a"]).unwrap_err().code(), "BAD_SCHEMA");
    assert_eq!((r.all_held().unwrap(), there(&r, "a")), (held, Some(1)));
    // It is listed no more, and two others have what it had, but for what nobody has.
    let two = list(&[("x", &["a"]), ("y", &["b"])]);
    bring(&mut r, &two, "x", 2, &ddl(&["a"]), &["a"]).unwrap();
    assert_eq!(["a", "b", "c"].map(|t| there(&r, t)), [Some(2), Some(1), None]);
    assert_eq!(r.all_held().unwrap().into_keys().map(|s| s.to_string()).collect::<Vec<_>>(), ["x"]);
    // What stayed is in nobody's way: not by its name, not by its indexes'.
    let other = format!("{}CREATE INDEX b_by ON a (id);\n", "CREATE TABLE a (id INTEGER PRIMARY KEY) STRICT;\n");
    bring(&mut r, &two, "x", 3, &other, &["a"]).unwrap();
    assert_eq!(["a", "b"].map(|t| there(&r, t)), [Some(3), Some(1)]);
    bring(&mut r, &two, "x", 4, &ddl(&["a"]), &["a"]).unwrap();
    bring(&mut r, &two, "y", 5, &ddl(&["b"]), &["b"]).unwrap();
    assert_eq!(["a", "b"].map(|t| there(&r, t)), [Some(4), Some(5)]);
    // Both stay on the list, and one gives to the other: the giver's pack comes first.
    let moved = list(&[("x", &["d"]), ("y", &["a", "b"])]);
    bring(&mut r, &moved, "x", 6, &ddl(&["d"]), &["d"]).unwrap();
    assert_eq!(["a", "b", "d"].map(|t| there(&r, t)), [Some(4), Some(5), Some(6)]);
    bring(&mut r, &moved, "y", 7, &ddl(&["a", "b"]), &["a", "b"]).unwrap();
    assert_eq!(["a", "b", "d"].map(|t| there(&r, t)), [Some(7), Some(7), Some(6)]);
    // Each has what the other gets: neither could wait for the other.
    let swapped = list(&[("x", &["a", "b"]), ("y", &["d"])]);
    bring(&mut r, &swapped, "y", 8, &ddl(&["d"]), &["d"]).unwrap();
    assert_eq!(["a", "b", "d"].map(|t| there(&r, t)), [Some(7), Some(7), Some(8)]);
    bring(&mut r, &swapped, "x", 9, &ddl(&["a", "b"]), &["a", "b"]).unwrap();
    assert_eq!(["a", "b", "d"].map(|t| there(&r, t)), [Some(9), Some(9), Some(8)]);
    // By two streams of one list: neither takes it from the other.
    let double = list(&[("x", &["a", "b", "d"]), ("y", &["d"])]);
    let e = bring(&mut r, &double, "x", 10, &ddl(&["a", "b", "d"]), &["a", "b", "d"]).unwrap_err();
    assert!(e.code() == "BAD_SCHEMA" && !e.waits(), "{e}");
    // One whose entry cannot be read keeps what it holds, in a later epoch too, and what others lose may be its: who gets
    // such a table waits, and its pack is not to blame.
    let unread = Listed::from([("y".parse().unwrap(), None), ("x".parse().unwrap(), double["x"].clone())]);
    let e = bring(&mut r, &unread, "x", 10, &ddl(&["a", "b", "d"]), &["a", "b", "d"]).unwrap_err();
    assert!(e.code() == "BAD_SCHEMA" && e.waits(), "{e}");
    let (path, entry) = pack_of(&shop, "x", 10, &ddl(&["d"]), &["d"]);
    let (x, packs) = ("x@all".parse().unwrap(), [PackFile { path: &path, entry: &entry }]);
    let later = Job { instance: &x, epoch: 2, packs: &packs, now: now(), prove: false, listed: Some(&unread) };
    assert!(r.apply(&later).unwrap_err().waits());
    bring(&mut r, &unread, "x", 11, &ddl(&["b"]), &["b"]).unwrap();
    assert_eq!(["a", "b", "d"].map(|t| there(&r, t)), [Some(9), Some(11), Some(8)]);
    bring(&mut r, &swapped, "x", 12, &ddl(&["a", "b"]), &["a", "b"]).unwrap();
    assert_eq!(["a", "b", "d"].map(|t| there(&r, t)), [Some(12), Some(12), Some(8)]);
    // An index by a name that one has which is listed no more: it keeps its rows.
    let last = list(&[("z", &["e"])]);
    let named = "CREATE TABLE e (id INTEGER PRIMARY KEY) STRICT;\nCREATE INDEX a_by ON e (id);\n";
    bring(&mut r, &last, "z", 13, named, &["e"]).unwrap();
    assert_eq!(["a", "b", "d", "e"].map(|t| there(&r, t)), [Some(12), Some(12), Some(8), Some(13)]);
    for stream in ["x", "y", "z"] {
        assert!(r.verify(&stream.parse().unwrap()).unwrap().iter().all(TableCheck::is_right));
    }
}

#[test]
fn the_name_of_an_index_goes_over_at_once() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let ddl = |table: &str, index: &str| {
        format!("CREATE TABLE {table} (id INTEGER PRIMARY KEY) STRICT;\nCREATE UNIQUE INDEX {index} ON {table} (id);\n")
    };
    let listed: Listed = ["x", "y"]
        .map(|s| (s.parse().unwrap(), Some([if s == "x" { "a" } else { "b" }.parse().unwrap()].into())))
        .into_iter()
        .collect();
    let bring = |r: &mut Replica, stream: &str, version: u64, table: &str, index: &str| {
        let (path, entry) = pack_of(&shop, stream, version, &ddl(table, index), &[table]);
        let (instance, packs) = (format!("{stream}@all").parse().unwrap(), [PackFile { path: &path, entry: &entry }]);
        r.apply(&Job { instance: &instance, epoch: 1, packs: &packs, now: now(), prove: false, listed: Some(&listed) })
            .unwrap();
    };
    let of = |r: &Replica, index: &str| {
        let on = "SELECT tbl_name FROM sqlite_schema WHERE type = 'index' AND name = ?1";
        r.connection().query_row(on, [index], |r| r.get::<_, String>(0)).ok()
    };
    let is_right = |r: &Replica| {
        for stream in ["x", "y"] {
            assert!(r.verify(&stream.parse().unwrap()).unwrap().iter().all(TableCheck::is_right));
        }
    };
    bring(&mut r, "x", 1, "a", "one");
    bring(&mut r, "y", 2, "b", "two");
    // Two listed streams swap their names: neither waits for the other.
    bring(&mut r, "x", 3, "a", "Two");
    is_right(&r);
    assert_eq!([of(&r, "one"), of(&r, "two"), of(&r, "Two")], [None, None, Some("a".into())]);
    // A delta that still has the old name takes nothing back.
    let (old, new) = (ddl("b", "two"), ddl("b", "two").replace("KEY)", "KEY, n INTEGER)"));
    let [old, new] = [old, new].map(|ddl| (Contract::parse(&ddl, &Limits::default()).unwrap(), ddl));
    let header = Header {
        format: 1,
        stream: "y".parse().unwrap(),
        audience: Audience::All,
        version: v(3),
        base: Some(v(2)),
        kind: PackKind::Delta,
        schema: SchemaPart {
            number: 3,
            ddl: new.1,
            sha256: new.0.sha256,
            migrate: new.0.additive_since(&old.0).unwrap(),
        },
        created_at: now(),
        source: "test".into(),
        tables: table_heads(&new.0),
    };
    let mut digest = StateDigest::default();
    digest.add(RowHasher::default().hash(&[Value::Int(2), Value::Null]));
    let w = PackWriter::new(Vec::new(), &header, 1).unwrap();
    let (bytes, written) = w.finish(&BTreeMap::from([("b".parse().unwrap(), digest)])).unwrap();
    let path = shop.dir.path().join("y-3.delta.pack");
    std::fs::write(&path, &bytes).unwrap();
    let (kind, base) = (PackKind::Delta, Some(v(2)));
    let (bytes, unpacked, sha256) = (written.bytes, written.unpacked, written.sha256);
    let entry = PackEntry { version: v(3), kind, base, bytes, unpacked, sha256 };
    let (y, packs) = ("y@all".parse().unwrap(), [PackFile { path: &path, entry: &entry }]);
    r.apply(&Job { instance: &y, epoch: 1, packs: &packs, now: now(), prove: false, listed: Some(&listed) }).unwrap();
    is_right(&r);
    assert_eq!(of(&r, "Two"), Some("a".into()));
    bring(&mut r, "y", 4, "b", "one");
    is_right(&r);
    assert_eq!([of(&r, "one"), of(&r, "Two")], [Some("b".into()), Some("a".into())]);
    // One on a table of somebody else's goes, too, and its table stays; a note that rotted is in nobody's way.
    r.connection()
        .execute_batch(
            "CREATE TABLE mine (code INTEGER); CREATE INDEX Three ON mine (code);
             INSERT INTO tillcast_table VALUES ('not a name', '', ''), (CAST(x'ff' AS TEXT), '', '')",
        )
        .unwrap();
    let log = logged(|| bring(&mut r, "y", 5, "b", "three"));
    assert!(log.contains("index=three") && log.contains("table=mine"), "{log}");
    assert_eq!([of(&r, "three"), of(&r, "Two")], [Some("b".into()), Some("a".into())]);
    let notes = "SELECT count(*) FROM tillcast_table WHERE stream = ''";
    assert_eq!(r.connection().query_row(notes, [], |r| r.get::<_, i64>(0)).unwrap(), 0);
    assert!(r.connection().prepare("SELECT code FROM mine").is_ok());
    is_right(&r);
}

#[test]
fn a_delta_makes_an_index_again_that_somebody_dropped() {
    let shop = Shop::new();
    let (one, two) = (simple(&[("a", 1.0)]), simple(&[("a", 2.0)]));
    let mut r = shop.replica("r.db");
    apply(&mut r, "all", &[&shop.full("all", 1, &one)]).unwrap();
    r.connection().execute_batch("DROP INDEX item_name").unwrap();
    apply(&mut r, "all", &[&shop.delta(2, 1, &one, &two)]).unwrap();
    let there = "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'item_name'";
    assert_eq!(r.connection().query_row(there, [], |r| r.get::<_, i64>(0)).unwrap(), 1);
    assert_right(&r, &two, false);
}

/// Somebody else's connection, whose last commit stays in the log when it closes.
fn of_the_pos(path: &Path) -> Connection {
    let db = Connection::open(path).unwrap();
    db.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    db.execute_batch("PRAGMA journal_mode = WAL").unwrap();
    db
}

#[test]
fn a_replica_is_known_by_its_tables_and_user_version_is_left_to_others() {
    let shop = Shop::new();
    let (one, two) = (simple(&[("a", 1.0)]), simple(&[("a", 2.0)]));
    let packs = [shop.full("all", 1, &one), shop.delta(2, 1, &one, &two)];
    for before in [0, 1, 7] {
        let path = shop.dir.path().join(format!("{before}.db"));
        let mine = "CREATE TABLE basket (n INTEGER); INSERT INTO basket VALUES (42);";
        of_the_pos(&path).execute_batch(&format!("{mine} PRAGMA user_version = {before}")).unwrap();
        apply(&mut shop.replica(&format!("{before}.db")), "all", &[&packs[0]]).unwrap();
        assert_eq!(number(&of_the_pos(&path), "PRAGMA user_version"), before);
        for after in [0, 9] {
            of_the_pos(&path).execute_batch(&format!("PRAGMA user_version = {after}")).unwrap();
            assert_eq!(shop.replica(&format!("{before}.db")).all_held().unwrap().len(), 1, "{before}, {after}");
        }
        let mut r = shop.replica(&format!("{before}.db"));
        apply(&mut r, "all", &[&packs[1]]).unwrap();
        assert_right(&r, &two, false);
        assert_eq!(number(r.connection(), "SELECT n FROM basket"), 42);
    }
    let r = shop.replica("ours.db");
    assert_eq!(number(r.connection(), "PRAGMA user_version"), 1, "as builds before this one know it");
    r.connection().execute_batch("CREATE TABLE tillcast_shape (shape INTEGER)").unwrap();
    shop.replica("ours.db");
    r.connection().execute_batch("INSERT INTO tillcast_shape VALUES (2)").unwrap();
    let e = Replica::open(r.path(), &Limits::default()).unwrap_err();
    assert!(e.is_newer() && e.to_string().contains("shape 2"), "{e}");
}

#[test]
fn a_table_of_ours_that_is_gone_is_made_again_and_all_streams_are_forgotten() {
    let shop = Shop::new();
    let one = simple(&[("a", 1.0)]);
    let full = shop.full("all", 1, &one);
    for table in OURS {
        let mut r = shop.replica(&format!("{table}.db"));
        apply(&mut r, "all", &[&full]).unwrap();
        r.connection().execute_batch(&format!("DROP TABLE {table}")).unwrap();
        let mut r = shop.replica(&format!("{table}.db"));
        assert_eq!(r.forget_unreadable().unwrap(), [(None, format!("table {table} was gone"))]);
        assert_eq!(r.forget_unreadable().unwrap(), []);
        assert_eq!(r.all_held().unwrap().is_empty(), table != "tillcast_pack", "{table}");
        assert_eq!(rows(&r), 1, "to sell by");
        apply(&mut r, "all", &[&full]).unwrap();
        assert_right(&r, &one, false);
    }
}

#[test]
fn a_view_or_an_index_by_a_contracts_name_gives_way_to_its_table() {
    let shop = Shop::new();
    let one = simple(&[("a", 1.0)]);
    let full = shop.full("all", 1, &one);
    for (n, before) in [
        "CREATE TABLE mine (sku); CREATE VIEW item AS SELECT * FROM mine",
        "CREATE VIEW Item AS SELECT * FROM gone",
        "CREATE TABLE mine (sku); CREATE INDEX item ON mine (sku)",
    ]
    .into_iter()
    .enumerate()
    {
        let mut r = shop.replica(&format!("{n}.db"));
        r.connection().execute_batch(before).unwrap();
        let log = logged(|| assert_eq!(apply(&mut r, "all", &[&full]).unwrap().version, v(1), "{before}"));
        assert!(log.contains("WARN") && log.contains("table=item"), "{before}: {log}");
        assert_right(&r, &one, false);
    }
    // In the place of a table that was held.
    let mut r = shop.replica("held.db");
    apply(&mut r, "all", &[&full]).unwrap();
    r.connection().execute_batch("DROP TABLE item; CREATE VIEW item AS SELECT 1 AS sku").unwrap();
    assert!(!r.verify(&"catalog".parse().unwrap()).unwrap()[0].is_right());
    apply(&mut r, "all", &[&full]).unwrap();
    assert_right(&r, &one, false);
}

#[test]
fn a_view_by_the_name_of_a_contracts_index_gives_way_and_a_table_is_no_packs_fault() {
    let shop = Shop::new();
    let (one, two) = (simple(&[("a", 1.0)]), simple(&[("a", 2.0)]));
    let packs = [shop.full("all", 1, &one), shop.delta(2, 1, &one, &two)];
    let listed: Listed = [("catalog".parse().unwrap(), Some(["item".parse().unwrap()].into()))].into_iter().collect();
    let bring = |r: &mut Replica, n: usize| {
        let (path, entry) = &packs[n];
        let packs = [PackFile { path, entry }];
        let (instance, listed) = (instance("all"), Some(&listed));
        r.apply(&Job { instance: &instance, epoch: 1, packs: &packs, now: now(), prove: false, listed })
    };
    let there = "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'item_name'";
    let mut r = shop.replica("view.db");
    for (n, before) in ["CREATE VIEW Item_Name AS SELECT 1", "DROP INDEX item_name; CREATE VIEW item_name AS SELECT 1"]
        .into_iter()
        .enumerate()
    {
        r.connection().execute_batch(before).unwrap();
        let log = logged(|| assert!(bring(&mut r, n).is_ok(), "{before}"));
        assert!(log.contains("WARN") && log.contains("kind=view"), "{log}");
        assert_eq!(number(r.connection(), there), 1);
    }
    assert_right(&r, &two, false);
    let mut r = shop.replica("table.db");
    for (n, before, after) in [
        (0, "CREATE TABLE item_name (n INTEGER)", "ALTER TABLE item_name RENAME TO mine"),
        (1, "DROP INDEX item_name; CREATE TABLE item_name (n INTEGER)", "DROP TABLE item_name"),
    ] {
        r.connection().execute_batch(before).unwrap();
        let e = bring(&mut r, n).unwrap_err();
        assert!(e.verdict() == Verdict::Retry && e.to_string().contains("rename it"), "{e}");
        r.connection().execute_batch(after).unwrap();
        bring(&mut r, n).unwrap();
    }
    assert_right(&r, &two, false);
}

#[test]
fn an_index_that_cannot_be_used_here_goes_with_a_delta_and_is_no_drift() {
    let shop = Shop::new();
    let states = [&[("a", 1.0), ("b", 2.0)][..], &[("a", 1.0), ("b", 1.0)]].map(simple);
    let packs = [shop.full("all", 1, &states[0]), shop.delta(2, 1, &states[0], &states[1])];
    for (n, (index, theirs)) in [
        ("item (name COLLATE NOCASE)", "replace(sql, 'NOCASE', 'POSLOC')"),
        ("item (name) WHERE name > 'a' COLLATE RTRIM", "replace(sql, 'RTRIM', 'POSLOC')"),
        ("item (abs(price))", "replace(sql, 'abs', 'pos_round')"),
        ("item (plu) WHERE abs(price) > 1", "replace(sql, 'abs', 'pos_round')"),
    ]
    .into_iter()
    .enumerate()
    {
        for is_right in [true, false] {
            let name = format!("{n}-{is_right}.db");
            apply(&mut shop.replica(&name), "all", &[&packs[0]]).unwrap();
            let pos = of_the_pos(&shop.dir.path().join(&name));
            let tamper = if is_right { "" } else { "UPDATE item SET price = 9.0 WHERE sku = 'a';" };
            // As if by a connection that knows the collation or function.
            pos.execute_batch(&format!(
                "{tamper} CREATE INDEX mine ON {index}; PRAGMA writable_schema = ON;
                 UPDATE sqlite_schema SET sql = {theirs} WHERE name = 'mine'"
            ))
            .unwrap();
            drop(pos);
            let mut r = shop.replica(&name);
            let e = r.connection().execute("UPDATE item SET name = 'm', plu = 1, price = 4.0 WHERE sku = 'b'", []);
            assert!(sqlite::is_misfit(&e.unwrap_err()), "{index}");
            assert_eq!(r.verify(&"catalog".parse().unwrap()).unwrap()[0].is_right(), is_right, "{index}");
            if is_right {
                let log = logged(|| assert_eq!(apply(&mut r, "all", &[&packs[1]]).unwrap().version, v(2), "{index}"));
                assert!(log.contains("WARN") && log.contains("index=mine"), "{index}: {log}");
                assert_right(&r, &states[1], false);
            }
        }
    }
}

#[test]
fn an_index_that_is_not_the_contracts_goes_when_it_refuses_a_row() {
    let shop = Shop::new();
    let states = [&[("a", 1.0), ("b", 2.0)][..], &[("a", 1.0), ("b", 1.0)], &[("a", 3.0), ("b", 1.0)]].map(simple);
    let packs = [
        shop.full("all", 1, &states[0]),
        shop.delta(2, 1, &states[0], &states[1]),
        shop.delta(3, 2, &states[1], &states[2]),
    ];
    for strange in [
        "CREATE UNIQUE INDEX mine ON item (price)",
        "CREATE INDEX mine ON item (json_extract(name, '$')) WHERE price = 1.0 AND sku = 'b'",
    ] {
        let mut r = shop.replica("r.db");
        apply(&mut r, "all", &[&packs[0]]).unwrap();
        // One that is in nobody's way stays.
        r.connection().execute_batch(&format!("{strange}; CREATE INDEX quick ON item (price)")).unwrap();
        let indexes = "SELECT group_concat(name) FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL";
        let indexes = |r: &Replica| r.connection().query_row(indexes, [], |r| r.get::<_, String>(0)).unwrap();
        let log = logged(|| assert_eq!(apply(&mut r, "all", &[&packs[1]]).unwrap().version, v(2), "{strange}"));
        assert!(log.contains("WARN") && log.contains("index=mine"), "{strange}: {log}");
        assert_eq!(indexes(&r), "item_name,quick", "{strange}");
        assert_right(&r, &states[1], false);
        apply(&mut r, "all", &[&packs[2]]).unwrap();
        assert_eq!(indexes(&r), "item_name,quick");
    }
    // A row that is wrong whatever there is refuses its pack, and no index goes for it.
    let twice = shop.write("all", 4, None, vec![], StateDigest::default(), |w| {
        w.section(&"item".parse().unwrap(), Op::Insert, &shop.columns()).unwrap();
        for sku in ["a", "b"] {
            w.row(&values(sku, &(Some(1), "n".into(), None, None), false)).unwrap();
        }
    });
    for (n, (more, pack)) in
        [("; UPDATE item SET sku = 'c' WHERE sku = 'b'", &packs[1]), ("", &twice)].into_iter().enumerate()
    {
        let mut r = shop.replica(&format!("{n}.db"));
        apply(&mut r, "all", &[&packs[0]]).unwrap();
        r.connection().execute_batch(&format!("CREATE UNIQUE INDEX mine ON item (price){more}")).unwrap();
        let log = logged(|| assert_eq!(apply(&mut r, "all", &[pack]).unwrap_err().code(), "ROW"));
        let mine = "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'mine'";
        assert_eq!((number(r.connection(), mine), log.contains("WARN")), (1, false), "{n}: {log}");
    }
}

//! Packs applied in one transaction: proved by their digests, judged by what went wrong, or taken back.

use super::*;
use crate::pack::RowCounts;

/// By the form of docs/FORMAT.md, hashed elsewhere.
#[test]
fn the_digest_of_a_stream_is_that_of_its_tables_in_order() {
    let of = |t: &str, d: &str| (t.parse().unwrap(), d.parse().unwrap());
    let digests = [of("price", &"0".repeat(32)), of("deal", &"0123456789abcdef".repeat(2))];
    assert_eq!(stream_digest(&BTreeMap::from(digests)), "258535f79a797bbd9cf58f5063b7f13c");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Any states, by any cut of the way into fulls and deltas, end in the same rows and digest.
    #[test]
    fn any_way_ends_in_the_same_digest(
        states in proptest::collection::vec(
            proptest::collection::btree_map("[aA-c]{1,2}", (proptest::option::of(0i64..6), "[a-cé]{0,4}", proptest::option::of(-2.0..2.0f64), proptest::option::of(proptest::collection::vec(any::<u8>(), 0..3))), 0..8),
            2..5),
        use_full in proptest::collection::vec(any::<bool>(), 5),
    ) {
        let states: Vec<State> = states.into_iter().map(|mut s| {
            // UNIQUE: the first holder of a plu keeps it; 0.0 has one sign.
            let mut seen = std::collections::HashSet::new();
            for r in s.values_mut() {
                if r.0.is_some_and(|p| !seen.insert(p)) { r.0 = None; }
                r.2 = r.2.map(|x| if x == 0.0 { 0.0 } else { x });
            }
            s
        }).collect();
        let shop = Shop::new();
        let mut a = shop.replica("a.db");
        let mut b = shop.replica("b.db");
        let mut chain = vec![shop.full("all", 1, &states[0])];
        apply(&mut a, "all", &[&chain[0]]).unwrap();
        for (i, pair) in states.windows(2).enumerate() {
            let version = i as u64 + 2;
            let step = if use_full[i] { shop.full("all", version, &pair[1]) } else { shop.delta(version, version - 1, &pair[0], &pair[1]) };
            apply(&mut a, "all", &[&step]).unwrap();
            if use_full[i] { chain.clear(); }
            chain.push(step);
        }
        apply(&mut b, "all", &chain.iter().collect::<Vec<_>>()).unwrap();
        let last = states.last().unwrap();
        assert_right(&a, last, false);
        assert_right(&b, last, false);
        prop_assert_eq!(a.held(&"catalog".parse().unwrap()).unwrap().unwrap().digests, b.held(&"catalog".parse().unwrap()).unwrap().unwrap().digests);
    }
}

#[test]
fn a_version_and_its_proof_come_with_the_rows() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let (one, two) = (simple(&[("a", 1.0), ("b", 2.0)]), simple(&[("a", 1.5), ("c", 3.0)]));
    let full = shop.full("all", 1, &one);
    let delta = shop.delta(4, 1, &one, &two);
    let applied = apply(&mut r, "all", &[&full, &delta]).unwrap();
    assert_eq!((applied.version, applied.transactions), (v(4), 2));
    let held = r.held(&"catalog".parse().unwrap()).unwrap().unwrap();
    assert_eq!((held.version, held.epoch, held.schema), (v(4), 1, 1));
    assert_eq!(
        proofs(&r, &instance("all")),
        [(v(1), PackKind::Full, full.1.sha256), (v(4), PackKind::Delta, delta.1.sha256)]
    );
    r.forget_proofs(|_, version, _| version > v(1)).unwrap();
    assert_eq!(proofs(&r, &instance("all")).len(), 1);
    assert_right(&r, &two, false);
}

#[test]
fn a_delta_that_does_not_fit_changes_nothing() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let one = simple(&[("a", 1.0), ("b", 2.0)]);
    apply(&mut r, "all", &[&shop.full("all", 1, &one)]).unwrap();
    let other = simple(&[("a", 1.0), ("x", 2.0)]);
    for (from, to, why) in [
        (&other, simple(&[("a", 1.0)]), "there is no such row"),
        (&other, simple(&[("a", 1.0), ("x", 9.0)]), "there is no such row"),
        (&simple(&[]), simple(&[("a", 1.0)]), "UNIQUE"),
        (&simple(&[("a", 5.0)]), simple(&[("a", 5.0), ("c", 1.0)]), "digest"),
        (&one, State::from([("a".into(), (None, "12345678901".into(), None, None))]), "CHECK"),
    ] {
        let e = apply(&mut r, "all", &[&shop.delta(2, 1, from, &to)]).unwrap_err();
        assert!(e.to_string().contains(why), "{e}");
        assert_eq!(e.verdict(), Verdict::Quarantine);
        assert!(e.may_be_drift(), "{e}");
        assert_right(&r, &one, false);
        assert_eq!(r.held(&"catalog".parse().unwrap()).unwrap().unwrap().version, v(1));
    }
    let e = apply(&mut r, "all", &[&shop.delta(3, 2, &one, &one)]).unwrap_err();
    assert!(matches!(e, ApplyError::WrongBase { .. }) && !e.may_be_drift(), "{e}");
}

#[test]
fn readers_never_see_an_older_version() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let states: Vec<State> = (1..=3).map(|n| simple(&[("a", n as f64)])).collect();
    let full = shop.full("all", 1, &states[0]);
    let d2 = shop.delta(2, 1, &states[0], &states[1]);
    let d3 = shop.delta(3, 2, &states[1], &states[2]);
    apply(&mut r, "all", &[&full, &d2]).unwrap();
    // From version 2, by the full of version 1: one transaction up to 2, then one for 3.
    assert_eq!(apply(&mut r, "all", &[&full, &d2, &d3]).unwrap().transactions, 2);
    assert_right(&r, &states[2], false);
    // Another audience, or epoch: the whole chain is one.
    let west = simple(&[("w", 1.0)]);
    assert_eq!(apply(&mut r, "zone-west", &[&shop.full("zone-west", 1, &west)]).unwrap().transactions, 1);
    assert_eq!(r.held(&"catalog".parse().unwrap()).unwrap().unwrap().audience, instance("zone-west").audience);
    assert_eq!(apply(&mut r, "all", &[&full, &d2, &d3]).unwrap().transactions, 1);
}

#[test]
fn a_failed_chain_keeps_what_was_whole() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let (one, two) = (simple(&[("a", 1.0)]), simple(&[("a", 2.0)]));
    let full = shop.full("all", 1, &one);
    apply(&mut r, "all", &[&full]).unwrap();
    let good = shop.delta(2, 1, &one, &two);
    let bad = shop.delta(3, 2, &simple(&[("z", 1.0)]), &simple(&[]));
    apply(&mut r, "all", &[&good, &bad]).unwrap_err();
    assert_right(&r, &two, false);
    // A full with a bad delta that must share its transaction leaves everything as it was.
    apply(&mut r, "all", &[&full, &shop.delta(2, 1, &simple(&[("z", 1.0)]), &simple(&[]))]).unwrap_err();
    assert_right(&r, &two, false);
}

#[test]
fn a_changed_file_is_refused_before_the_commit() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let (path, entry) = shop.full("all", 1, &simple(&[("a", 1.0)]));
    let bytes = std::fs::read(&path).unwrap();
    let other = shop.full("all", 1, &simple(&[("a", 9.0)]));
    let e = apply(&mut r, "all", &[&(other.0.clone(), entry.clone())]).unwrap_err();
    assert!(e.code() == "NOT_LISTED" || e.code() == "TOO_MUCH" || e.code() == "TRUNCATED", "{e}");
    std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
    assert_eq!(apply(&mut r, "all", &[&(path, entry)]).unwrap_err().verdict(), Verdict::Quarantine);
    assert!(r.held(&"catalog".parse().unwrap()).unwrap().is_none());
}

#[test]
fn a_contract_migrates_inside_a_delta() {
    let mut shop = Shop::new();
    let mut r = shop.replica("r.db");
    let one = simple(&[("a", 1.0), ("b", 2.0)]);
    let full = shop.full("all", 1, &one);
    apply(&mut r, "all", &[&full]).unwrap();
    let old = Contract::parse(DDL, &Limits::default()).unwrap();
    shop.ddl = DDL.replace("img BLOB", "img BLOB, vat INTEGER NOT NULL DEFAULT 19");
    shop.schema = 2;
    shop.extra = true;
    let migrate = Contract::parse(&shop.ddl, &Limits::default()).unwrap().additive_since(&old).unwrap();
    let forged = shop.write("all", 2, Some(1), vec!["DROP TABLE item".into()], digest(&one, true), |_| {});
    assert_eq!(apply(&mut r, "all", &[&forged]).unwrap_err().code(), "BAD_SCHEMA");
    assert_eq!(rows(&r), 2);
    assert_eq!(migrate, ["ALTER TABLE \"item\" ADD COLUMN vat INTEGER NOT NULL DEFAULT 19"]);
    // As another publisher may write it; what is run is our own.
    let spelt = vec!["alter table item add vat integer not null default 19;".to_owned()];
    for migrate in [migrate, spelt] {
        let delta = shop.write("all", 2, Some(1), migrate, digest(&one, true), |_| {});
        let mut r = shop.replica(&format!("{}.db", delta.1.sha256));
        apply(&mut r, "all", &[&(full.0.clone(), full.1.clone()), &delta]).unwrap();
        assert_right(&r, &one, true);
        assert_eq!(r.held(&"catalog".parse().unwrap()).unwrap().unwrap().schema, 2);
    }
}

/// Headquarters validates with the same settings: what it takes, every device takes.
#[test]
fn a_new_column_with_a_default_may_refer() {
    let mut shop = Shop::new();
    let shelves = "CREATE TABLE shelf (id INTEGER PRIMARY KEY) STRICT;";
    shop.ddl = format!("{DDL}{shelves}");
    let old = Contract::parse(&shop.ddl, &Limits::default()).unwrap();
    let one = simple(&[("a", 1.0), ("b", 2.0)]);
    let shelf: TableName = "shelf".parse().unwrap();
    let row = |id: i64| RowHasher::default().hash(&[Value::Int(id)]);
    let mut of_shelf = StateDigest::default();
    of_shelf.add(row(19));
    let with = |mut digest: StateDigest, row| {
        digest.add(row);
        digest
    };
    let write = |shop: &Shop, version, base, migrate, of_shelf, fill: &dyn Fn(&mut PackWriter<Vec<u8>>)| {
        let digests = BTreeMap::from([("item".parse().unwrap(), digest(&one, shop.extra)), (shelf.clone(), of_shelf)]);
        shop.write_all("all", version, base, migrate, &digests, |w| fill(w))
    };
    let full = write(&shop, 1, None, vec![], of_shelf, &|w| {
        w.section(&"item".parse().unwrap(), Op::Insert, &shop.columns()).unwrap();
        one.iter().for_each(|(sku, r)| w.row(&values(sku, r, false)).unwrap());
        w.section(&shelf, Op::Insert, &["id".parse().unwrap()]).unwrap();
        w.row(&[Value::Int(19)]).unwrap();
    });
    let (mut hq, mut r) = (shop.replica("hq.db"), shop.replica("r.db"));
    apply(&mut hq, "all", &[&full]).unwrap();
    apply(&mut r, "all", &[&full]).unwrap();
    shop.ddl = shop.ddl.replace("img BLOB", "img BLOB, vat INTEGER NOT NULL DEFAULT 19 REFERENCES shelf (id)");
    (shop.schema, shop.extra) = (2, true);
    let migrate = Contract::parse(&shop.ddl, &Limits::default()).unwrap().additive_since(&old).unwrap();
    let delta = write(&shop, 2, Some(1), migrate, of_shelf, &|_| {});
    let (i, files) = (instance("all"), [PackFile { path: &delta.0, entry: &delta.1 }]);
    let job = Job { instance: &i, epoch: 1, packs: &files, now: now(), prove: false, listed: None };
    hq.apply_uncommitted(&job).unwrap();
    apply(&mut r, "all", &[&delta]).unwrap();
    assert_right(&r, &one, true);
    // What a pack cannot break is not looked through: here a reference that a hand broke shows that nobody does.
    let by_hand = |r: &Replica, vat: i64| {
        r.connection().execute("UPDATE item SET vat = ?1 WHERE sku = 'a'", [vat]).unwrap();
    };
    by_hand(&r, 77);
    let more = write(&shop, 3, Some(2), vec![], with(of_shelf, row(20)), &|w| {
        w.section(&shelf, Op::Insert, &["id".parse().unwrap()]).unwrap();
        w.row(&[Value::Int(20)]).unwrap();
    });
    apply(&mut r, "all", &[&more]).unwrap();
    by_hand(&r, 19);
    // A parent that goes is missed by its children.
    let orphans = write(&shop, 4, Some(3), vec![], with(StateDigest::default(), row(20)), &|w| {
        w.section(&shelf, Op::Delete, &["id".parse().unwrap()]).unwrap();
        w.row(&[Value::Int(19)]).unwrap();
    });
    let e = apply(&mut r, "all", &[&orphans]).unwrap_err();
    assert!(matches!(&e, ApplyError::ForeignKey { table, count: 2, .. } if table == "item"), "{e}");
    assert_right(&r, &one, true);
}

#[test]
fn an_open_validation_can_be_taken_back() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let (path, entry) = shop.full("all", 1, &simple(&[("a", 1.0)]));
    let files = [PackFile { path: &path, entry: &entry }];
    let i = instance("all");
    let job = Job { instance: &i, epoch: 1, packs: &files, now: now(), prove: false, listed: None };
    r.apply_uncommitted(&job).unwrap();
    r.rollback();
    assert!(r.held(&i.stream).unwrap().is_none());
    r.apply_uncommitted(&job).unwrap();
    r.commit().unwrap();
    assert_eq!(rows(&r), 1);
    assert!(proofs(&r, &i).is_empty());
}

#[test]
fn a_row_that_the_contracts_functions_cannot_take_is_the_packs_fault() {
    for (from, to) in [("length(name) <= 10", "name ->> 'x' IS NULL"), ("ON item (name)", "ON item (name ->> 'x')")] {
        let mut shop = Shop::new();
        shop.ddl = DDL.replace(from, to);
        let mut r = shop.replica("r.db");
        let none = simple(&[]);
        apply(&mut r, "all", &[&shop.full("all", 1, &none)]).unwrap();
        let e = apply(&mut r, "all", &[&shop.delta(2, 1, &none, &simple(&[("a", 1.0)]))]).unwrap_err();
        assert!(
            matches!(&e, ApplyError::Row { key, reason, .. } if key == "sku=\"a\"" && reason.contains("malformed JSON")),
            "{e}"
        );
        assert_eq!((e.verdict(), rows(&r)), (Verdict::Quarantine, 0));
    }
}

#[test]
fn references_must_lead_somewhere() {
    let dir = TempDir::new().unwrap();
    let mut r = Replica::open(&dir.path().join("r.db"), &Limits::default()).unwrap();
    let ddl = "CREATE TABLE brand (id INTEGER PRIMARY KEY) STRICT; CREATE TABLE item (sku TEXT PRIMARY KEY, brand INTEGER REFERENCES brand (id)) STRICT;";
    let contract = Contract::parse(ddl, &Limits::default()).unwrap();
    let pack = |version: u64, base: Option<u64>, brand: Option<i64>, sku: &str, to: i64| {
        let mut w = PackWriter::new(
            Vec::new(),
            &Header {
                format: 1,
                stream: "catalog".parse().unwrap(),
                audience: Audience::All,
                version: v(version),
                base: base.map(v),
                kind: if base.is_some() { PackKind::Delta } else { PackKind::Full },
                schema: SchemaPart { number: 1, ddl: ddl.into(), sha256: contract.sha256, migrate: vec![] },
                created_at: now(),
                source: String::new(),
                tables: table_heads(&contract),
            },
            1,
        )
        .unwrap();
        w.section(&"item".parse().unwrap(), Op::Insert, &["sku".parse().unwrap(), "brand".parse().unwrap()]).unwrap();
        w.row(&[text(sku), Value::Int(to)]).unwrap();
        let (mut d, mut b) = (StateDigest::default(), StateDigest::default());
        d.add(RowHasher::default().hash(&[text(sku), Value::Int(to)]));
        if base.is_some() {
            d.add(RowHasher::default().hash(&[text("a"), Value::Int(1)]));
        }
        if let Some(id) = brand {
            w.section(&"brand".parse().unwrap(), Op::Insert, &["id".parse().unwrap()]).unwrap();
            w.row(&[Value::Int(id)]).unwrap();
        }
        b.add(RowHasher::default().hash(&[Value::Int(1)]));
        let (bytes, wr) =
            w.finish(&BTreeMap::from([("item".parse().unwrap(), d), ("brand".parse().unwrap(), b)])).unwrap();
        let path = dir.path().join(format!("{version}-{to}"));
        std::fs::write(&path, bytes).unwrap();
        let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
        (
            path,
            PackEntry {
                version: v(version),
                kind,
                base: base.map(v),
                bytes: wr.bytes,
                unpacked: wr.unpacked,
                sha256: wr.sha256,
            },
        )
    };
    // The child stands before its parent in the pack: checked at the end only.
    apply(&mut r, "all", &[&pack(1, None, Some(1), "a", 1)]).unwrap();
    let e = apply(&mut r, "all", &[&pack(2, Some(1), None, "b", 7)]).unwrap_err();
    assert!(matches!(&e, ApplyError::ForeignKey { table, count: 1, .. } if table == "item"), "{e}");
    assert_eq!(rows(&r), 1);
    apply(&mut r, "all", &[&pack(2, Some(1), None, "b", 1)]).unwrap();
    assert_eq!(rows(&r), 2);
}

#[test]
fn references_are_looked_through_where_they_may_be_broken() {
    let db = rusqlite::Connection::open_in_memory().unwrap();
    db.execute_batch(
        "CREATE TABLE brand (id INTEGER PRIMARY KEY, code TEXT UNIQUE, name TEXT) STRICT;
         CREATE TABLE item (sku TEXT PRIMARY KEY, cents INTEGER, brand INTEGER REFERENCES Brand) STRICT;
         CREATE TABLE label (sku TEXT PRIMARY KEY, of TEXT REFERENCES brand (Code), twin TEXT REFERENCES label) STRICT;",
    )
    .unwrap();
    let checked = |touched: super::apply::Touched| {
        let may = |t: &&str| touched.may_break(&db, &t.parse().unwrap()).unwrap();
        ["brand", "item", "label"].into_iter().filter(may).collect::<Vec<_>>()
    };
    let tables = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    let grown = |names: &[&str]| super::apply::Touched { grown: tables(names), ..Default::default() };
    let shrunk = |names: &[&str]| super::apply::Touched { shrunk: tables(names), ..Default::default() };
    let updated = |table: &str, column: &str| super::apply::Touched {
        updated: [(table.to_owned(), column.to_owned())].into(),
        ..Default::default()
    };
    assert_eq!(checked(grown(&["brand"])), [""; 0]);
    assert_eq!(checked(grown(&["item"])), ["item"]);
    assert_eq!(checked(shrunk(&["item"])), [""; 0]);
    assert_eq!(checked(shrunk(&["brand"])), ["item", "label"]);
    assert_eq!(checked(shrunk(&["label"])), ["label"]);
    assert_eq!(checked(updated("item", "cents")), [""; 0]);
    assert_eq!(checked(updated("item", "brand")), ["item"]);
    assert_eq!(checked(updated("brand", "name")), [""; 0]);
    assert_eq!(checked(updated("brand", "code")), ["label"]);
}

#[test]
fn room_is_looked_at_before_and_after_each_index_and_more_is_left_where_more_is_written() {
    let mut shop = Shop::new();
    let state: State = (0..20_000).map(|n| (format!("{n:05}"), (None, "name".into(), Some(1.0), None))).collect();
    let roomy = |free| Some(shelf::Space { free, total: 1 << 50 });
    // A look after the table, each row block and all of it, and two for each index.
    let looks = |shop: &Shop, name: &str| {
        let mut r = shop.replica(name);
        r.pretended.set(roomy(1 << 40));
        apply(&mut r, "all", &[&shop.full("all", 1, &state)]).unwrap();
        r.looks.get()
    };
    let one = looks(&shop, "one.db");
    let ddl = shop.ddl.clone();
    shop.ddl.push_str("\nCREATE INDEX a ON item (price);\nCREATE INDEX b ON item (img);");
    assert_eq!(looks(&shop, "three.db"), one + 4);
    // A delta of a few bytes that brings an index.
    let old = Contract::parse(&ddl, &Limits::default()).unwrap();
    shop.ddl = ddl;
    let full = shop.full("all", 1, &state);
    shop.ddl.push_str("\nCREATE INDEX a ON item (name, price, sku);");
    let migrate = Contract::parse(&shop.ddl, &Limits::default()).unwrap().additive_since(&old).unwrap();
    let delta = shop.write("all", 2, Some(1), migrate, digest(&state, false), |_| ());
    let ready = |name: &str| {
        let mut r = shop.replica(name);
        apply(&mut r, "all", &[&full]).unwrap();
        r.checkpoint(Checkpoint::Truncate).unwrap();
        r
    };
    let mut r = ready("delta.db");
    let before = std::fs::metadata(r.path()).unwrap().len();
    apply(&mut r, "all", &[&delta]).unwrap();
    let log = sqlite::log_bytes(r.path());
    r.checkpoint(Checkpoint::Truncate).unwrap();
    let home = std::fs::metadata(r.path()).unwrap().len() - before;
    assert!(log > 100 * delta.1.unpacked && home > 0, "{log}, {home}, {}", delta.1.unpacked);
    for (free, fits) in [(home + log / 2, false), (home + log, false), (home + 2 * log, true)] {
        let mut r = ready(&format!("{free}.db"));
        r.pretended.set(roomy(free));
        let code = apply(&mut r, "all", &[&delta]).map_err(|e| e.code()).map(|a| a.version);
        assert_eq!(code, if fits { Ok(v(2)) } else { Err("DISK_FULL") });
    }
}

#[test]
fn a_value_of_another_type_is_named_by_its_line_and_table() {
    let shop = Shop::new();
    let pack = shop.write("all", 1, None, vec![], StateDigest::default(), |w| {
        w.section(&"item".parse().unwrap(), Op::Insert, &shop.columns()).unwrap();
        w.row(&values("a", &(None, "n".into(), None, None), false)).unwrap();
        w.row(&[text("b"), Value::Null, Value::Int(5), Value::Null, Value::Null]).unwrap();
    });
    let e = apply(&mut shop.replica("r.db"), "all", &[&pack]).unwrap_err().to_string();
    assert!(e.contains("line 4: table item: invalid type: integer `5`, expected a value of type TEXT or null"), "{e}");
}

/// SQLite would give an INTEGER PRIMARY KEY a number of its own choice for a NULL, after the row was hashed without one.
#[test]
fn a_row_without_a_key_is_refused_by_its_line() {
    let shop = Shop { ddl: "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT) STRICT;".into(), ..Shop::new() };
    let rows = [[Value::Int(7), text("n")], [Value::Null, text("n")]];
    let mut digest = StateDigest::default();
    rows.iter().for_each(|row| digest.add(RowHasher::default().hash(row)));
    let pack = shop.write("all", 1, None, vec![], digest, |w| {
        w.section(&"item".parse().unwrap(), Op::Insert, &["id", "name"].map(|c| c.parse().unwrap())).unwrap();
        rows.iter().for_each(|row| w.row(row).unwrap());
    });
    let e = apply(&mut shop.replica("r.db"), "all", &[&pack]).unwrap_err();
    assert!(matches!(e, ApplyError::Row { line: 4, .. }) && e.to_string().contains("a key with NULL"), "{e}");
}

#[test]
fn what_went_wrong_is_named_and_judged() {
    let (pack, table) = ("p".to_owned(), "item".parse::<TableName>().unwrap());
    let io = || crate::pack::PackError::Io(std::io::Error::other("EIO"));
    let of = |code: i32| {
        let code = libsqlite3_sys::Error::new(code);
        ApplyError::Sqlite(SqliteError::new("x", rusqlite::Error::SqliteFailure(code, None)))
    };
    let row = ApplyError::Row {
        pack: pack.clone(),
        line: 1,
        table: table.clone(),
        op: Op::Insert,
        key: String::new(),
        reason: String::new(),
    };
    let digest = ApplyError::Digest {
        pack: pack.clone(),
        table: table.clone(),
        wanted: String::new(),
        found: StateDigest::default(),
    };
    let key = ApplyError::ForeignKey { pack: pack.clone(), table: String::new(), count: 1, row: String::new() };
    let elsewhere = |is_to_go| ApplyError::Elsewhere {
        pack: pack.clone(),
        table: table.clone(),
        holder: "x".parse().unwrap(),
        is_to_go,
    };
    let base = ApplyError::WrongBase { pack: pack.clone(), base: String::new(), held: String::new() };
    let schema = ApplyError::Schema { pack: pack.clone(), reason: String::new() };
    for (e, code, verdict, may_be_drift, waits) in [
        (ApplyError::Pack { pack: pack.clone(), source: io() }, "IO", Verdict::Retry, false, false),
        (
            ApplyError::Pack { pack: pack.clone(), source: crate::pack::PackError::Truncated { line: 1 } },
            "TRUNCATED",
            Verdict::Quarantine,
            false,
            false,
        ),
        (row, "ROW", Verdict::Quarantine, true, false),
        (digest, "DIGEST", Verdict::Quarantine, true, false),
        (key, "FOREIGN_KEY", Verdict::Quarantine, true, false),
        (base, "WRONG_BASE", Verdict::Quarantine, false, false),
        (schema, "BAD_SCHEMA", Verdict::Quarantine, false, false),
        (elsewhere(false), "BAD_SCHEMA", Verdict::Quarantine, false, false),
        (elsewhere(true), "BAD_SCHEMA", Verdict::Quarantine, false, true),
        (of(libsqlite3_sys::SQLITE_FULL), "DISK_FULL", Verdict::Retry, false, false),
        (of(libsqlite3_sys::SQLITE_BUSY), "SQLITE", Verdict::Retry, false, false),
        (of(libsqlite3_sys::SQLITE_CONSTRAINT), "SQLITE", Verdict::Quarantine, true, false),
        (of(libsqlite3_sys::SQLITE_CORRUPT), "SQLITE", Verdict::Rebuild, false, false),
        (of(libsqlite3_sys::SQLITE_IOERR_FSYNC), "SQLITE", Verdict::Halt, false, false),
    ] {
        assert_eq!((e.code(), e.verdict(), e.may_be_drift(), e.waits()), (code, verdict, may_be_drift, waits), "{e:?}");
    }
}

#[test]
fn rows_are_counted_over_packs_and_transactions() {
    let shop = Shop::new();
    let (one, two) =
        (simple(&[("a", 1.0), ("b", 2.0), ("c", 3.0)]), simple(&[("a", 1.0), ("b", 5.0), ("d", 4.0), ("e", 5.0)]));
    let (full, delta) = (shop.full("all", 1, &one), shop.delta(2, 1, &one, &two));
    let counted = RowCounts { delete: 1, update: 1, insert: 5 };
    let mut r = shop.replica("r.db");
    let applied = apply(&mut r, "all", &[&full, &delta]).unwrap();
    assert_eq!((applied.rows, applied.transactions, applied.version), (counted, 2, v(2)));
    // A heal: readers saw version 2 before.
    let applied = apply(&mut r, "all", &[&full, &delta]).unwrap();
    assert_eq!((applied.rows, applied.transactions, applied.version), (counted, 1, v(2)));
    assert_right(&r, &two, false);
}

#[test]
fn a_migration_is_previewed_and_taken_back() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    apply(&mut r, "all", &[&shop.full("all", 1, &simple(&[("a", 1.0)]))]).unwrap();
    let has_it = |r: &Replica| r.connection().prepare("SELECT vat FROM item").is_ok();
    r.preview_migration(&["ALTER TABLE item ADD COLUMN vat INTEGER NOT NULL DEFAULT 19".to_owned()]).unwrap();
    assert!(has_it(&r));
    r.rollback();
    assert!(!has_it(&r));
    let e = r.preview_migration(&["ALTER TABLE item ADD COLUMN vat INTEGER NOT NULL".to_owned()]).unwrap_err();
    assert!(e.to_string().contains("NOT NULL"), "{e}");
    r.rollback();
}

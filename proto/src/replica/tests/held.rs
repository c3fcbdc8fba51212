//! What is held: what differs, drifts, is waited for or required, and rows of our own that cannot be read.

use super::*;

#[test]
fn drift_is_found_by_verify_and_healed_by_a_full() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    // Foreign keys are off while packs are applied, and checked at the end of each.
    sqlite::assert_settings(r.connection());
    let one = simple(&[("a", 1.0), ("b", 2.0)]);
    let full = shop.full("all", 1, &one);
    apply(&mut r, "all", &[&full]).unwrap();
    r.connection().execute("UPDATE item SET price = 0.5 WHERE sku = 'b'", []).unwrap();
    assert!(!r.verify(&"catalog".parse().unwrap()).unwrap()[0].is_right());
    apply(&mut r, "all", &[&full]).unwrap();
    assert_right(&r, &one, false);
    r.connection().execute_batch("DROP TABLE item").unwrap();
    assert_eq!(r.verify(&"catalog".parse().unwrap()).unwrap()[0].found, None);
    apply(&mut r, "all", &[&full]).unwrap();
    assert_right(&r, &one, false);
}

#[test]
fn a_contract_that_is_refused_now_says_nothing_of_the_rows() {
    let (shop, stream) = (Shop::new(), "catalog".parse().unwrap());
    let one = simple(&[("a", 1.0)]);
    apply(&mut shop.replica("r.db"), "all", &[&shop.full("all", 1, &one)]).unwrap();
    let path = shop.dir.path().join("r.db");
    let refused = |r: &Replica| match r.verify(&stream).unwrap_err() {
        VerifyError::Contract { why, .. } => why.to_string(),
        other => panic!("{other:?}"),
    };
    let tight = Replica::open(&path, &Limits { columns: 2, ..Limits::default() }).unwrap();
    assert!(refused(&tight).contains("limits.columns = 2"));
    drop(tight);
    // A later build's: this one does not know the function.
    let r = shop.replica("r.db");
    assert_right(&r, &one, false);
    let newer = "CREATE TABLE item (sku TEXT PRIMARY KEY CHECK (is_sku(sku))) STRICT;";
    let alter = "UPDATE tillcast_stream SET ddl = ?1, schema_sha256 = ?2";
    r.connection().execute(alter, [newer, &Sha256::of(newer.as_bytes()).to_string()]).unwrap();
    assert!(refused(&r).contains("is_sku"));
    // A text that is not the one that came is the rows' affair.
    r.connection().execute("UPDATE tillcast_stream SET ddl = ddl || 'x'", []).unwrap();
    assert!(!r.verify(&stream).unwrap()[0].is_right());
}

#[test]
fn a_file_that_is_just_being_made_holds_nothing() {
    let shop = Shop::new();
    let path = shop.dir.path().join("r.db");
    drop(sqlite::open_private(&path).unwrap());
    let r = Replica::open_read_only(&path, &Limits::default()).unwrap();
    assert!(r.all_held().unwrap().is_empty());
}

#[test]
fn what_is_held_by_its_number_alone_differs_from_what_is_listed() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    apply(&mut r, "all", &[&shop.full("all", 1, &simple(&[("a", 1.0)]))]).unwrap();
    let (item, catalog) = ("item".parse::<TableName>().unwrap(), instance("all"));
    let held = r.held(&catalog.stream).unwrap().unwrap();
    let (here, other) = (held.digests[&item], StateDigest::default());
    let listed = |version, digest| StreamEntry {
        audience: catalog.audience.clone(),
        version: v(version),
        schema: 1,
        digests: BTreeMap::from([digest]),
        packs: Vec::new(),
        requires: BTreeMap::new(),
    };
    assert_eq!(held.differs_from(&catalog, 1, &listed(1, (item.clone(), here))), None);
    let why = held.differs_from(&catalog, 1, &listed(1, (item.clone(), other))).unwrap();
    let text =
        format!("version 1 is held with other rows than the list says (table item: {here} here, {other} listed)");
    assert_eq!(why, text);
    for (epoch, version, table) in [(2, 1, "item"), (1, 2, "item"), (1, 1, "price")] {
        let entry = listed(version, (table.parse().unwrap(), other));
        assert_eq!(held.differs_from(&catalog, epoch, &entry), None, "{epoch} {version} {table}");
    }
    let entry = listed(1, (item, other));
    assert_eq!(held.differs_from(&instance("zone-east"), 1, &entry), None, "another instance");
}

/// Streams held at version 1, with their tables.
fn held_with(streams: &[(&str, &[&str])]) -> BTreeMap<StreamName, Held> {
    let of = |(stream, tables): &(&str, &[&str])| {
        let held = Held {
            audience: "all".parse().unwrap(),
            version: v(1),
            epoch: 1,
            schema: 1,
            ddl: String::new(),
            digests: tables.iter().map(|t| (t.parse().unwrap(), StateDigest::default())).collect(),
            applied_at: now(),
        };
        (stream.parse().unwrap(), held)
    };
    streams.iter().map(of).collect()
}

#[test]
fn a_stream_waits_for_who_loses_a_table_that_it_gets() {
    let name = |s: &str| s.parse::<StreamName>().unwrap();
    let tables = |of: &[&str]| Some(of.iter().map(|t| t.parse().unwrap()).collect());
    let listed = Listed::from([
        (name("a"), tables(&["one", "two"])),
        (name("b"), tables(&["three"])),
        (name("c"), tables(&["four"])),
        (name("keeps"), tables(&["one"])),
        (name("unread"), None),
    ]);
    for (held, waits) in [
        (&[("b", &["two", "three"][..])][..], true),
        (&[("b", &["three"])], false),
        (&[("a", &["one", "two"])], false),
        (&[("keeps", &["one"])], false),
        (&[("unread", &["one"])], false),
        (&[("gone", &["one"])], false),
    ] {
        assert_eq!(is_in_the_way(&listed, &name("a"), &held_with(held)), waits, "{held:?}");
        assert!(!is_in_the_way(&listed, &name("unread"), &held_with(held)));
    }
    // a waits for b, and b for c.
    let held = held_with(&[("b", &["two"]), ("c", &["three", "four"])]);
    for (stream, other, waits) in
        [("a", "b", true), ("a", "c", true), ("b", "c", true), ("b", "a", false), ("c", "a", false)]
    {
        assert_eq!(waits_for(&listed, &held, &name(stream), &name(other)), waits, "{stream} for {other}");
    }
}

#[test]
fn what_is_required_is_lacking_unless_it_waits_for_who_requires_it() {
    let entry = |tables: &[&str], requires: &[(&str, u64)]| StreamEntry {
        audience: "all".parse().unwrap(),
        version: v(2),
        schema: 1,
        digests: tables.iter().map(|t| (t.parse().unwrap(), StateDigest::default())).collect(),
        packs: Vec::new(),
        requires: requires.iter().map(|(s, n)| (s.parse().unwrap(), v(*n))).collect(),
    };
    let manifest = |streams: &[(&str, StreamEntry)]| Manifest {
        format: 1,
        store: "0421".parse().unwrap(),
        serial: 1,
        epoch: 1,
        created_at: now(),
        expires_at: now(),
        streams: streams.iter().map(|(s, e)| (s.parse().unwrap(), e.clone())).collect(),
        relay: None,
        registers: BTreeMap::new(),
        unread: BTreeMap::new(),
    };
    let told = |m: &Manifest, stream: &str, held: &[(&str, &[&str])]| {
        let lacking = lacking(m, &stream.parse().unwrap(), &held_with(held));
        lacking.into_iter().map(|(s, n)| format!("{s} {n}")).collect::<Vec<_>>()
    };
    let m = manifest(&[
        ("price", entry(&["price"], &[("tax", 2), ("unit", 1)])),
        ("tax", entry(&["code"], &[("unit", 1)])),
        ("unit", entry(&["unit"], &[])),
    ]);
    assert_eq!(told(&m, "price", &[]), ["tax 2", "unit 1"]);
    assert_eq!(told(&m, "price", &[("unit", &["unit"]), ("tax", &["code"])]), ["tax 2"]);
    assert_eq!(told(&m, "tax", &[("unit", &["unit"])]), [""; 0]);
    // Tax is to get what price is to lose, by itself or by way of unit.
    assert_eq!(told(&m, "price", &[("price", &["price", "code"])]), ["unit 1"]);
    assert_eq!(told(&m, "price", &[("price", &["price", "unit"])]), [""; 0]);
}

#[test]
fn proofs_of_elsewhere_are_kept_until_nobody_wants_them() {
    let shop = Shop::new();
    let r = shop.replica("r.db");
    let of = instance("all");
    let proof = |n: u64| (v(n), PackKind::Full, Sha256::of(&n.to_be_bytes()));
    for n in 1..=3 {
        r.add_proof(&of, proof(n), now()).unwrap();
    }
    assert_eq!(proofs(&r, &of), [1, 2, 3].map(proof));
    r.forget_proofs(|i, version, kind| *i == of && version != v(2) && kind == PackKind::Full).unwrap();
    assert_eq!(proofs(&r, &of), [1, 3].map(proof));
}

#[test]
fn what_is_disowned_counts_in_no_epoch_and_is_read_on() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    assert_eq!(r.disown().unwrap(), 0);
    apply(&mut r, "all", &[&shop.full("all", 1, &simple(&[("a", 1.0)]))]).unwrap();
    assert_eq!(r.disown().unwrap(), 1);
    let held = r.held(&instance("all").stream).unwrap().unwrap();
    assert_eq!((held.epoch, held.version_of(&instance("all"), 1), rows(&r)), (0, None, 1));
}

#[test]
fn a_stream_whose_row_of_ours_cannot_be_read_is_forgotten_and_read_on() {
    let shop = Shop::new();
    let full = shop.full("all", 1, &simple(&[("a", 1.0)]));
    for bad in ["audience = 'nowhere'", "applied_at = 'soon'", "version = -1"] {
        let mut r = shop.replica("r.db");
        apply(&mut r, "all", &[&full]).unwrap();
        r.connection().execute_batch(&format!("UPDATE tillcast_stream SET {bad}")).unwrap();
        assert!(r.all_held().is_err(), "{bad}");
        let forgotten = r.forget_unreadable().unwrap();
        let [(Some(stream), why)] = &forgotten[..] else { panic!("{bad}: {forgotten:?}") };
        assert_eq!(*stream, instance("all").stream, "{bad}: {why}");
        assert!(r.all_held().unwrap().is_empty() && rows(&r) == 1, "{bad}");
        let tables: i64 = r.connection().query_row("SELECT count(*) FROM tillcast_table", [], |r| r.get(0)).unwrap();
        assert_eq!(tables, 0, "{bad}");
    }
}

#[test]
fn a_table_of_ours_that_is_gone_is_no_empty_replica() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    apply(&mut r, "all", &[&shop.full("all", 1, &simple(&[("a", 1.0)]))]).unwrap();
    r.connection().execute_batch("DROP TABLE tillcast_stream").unwrap();
    assert!(r.all_held().is_err());
    let path = shop.dir.path().join("r.db");
    let read_only = Replica::open_read_only(&path, &Limits::default()).unwrap();
    assert!(read_only.all_held().is_err());
    r.connection().execute_batch("DROP TABLE tillcast_table; DROP TABLE tillcast_pack").unwrap();
    assert!(r.all_held().is_err(), "it is not being made by another: this one may write");
}

/// A look that was broken off proves nothing, and blames no table.
#[test]
fn a_look_at_rows_that_is_broken_off_is_an_error() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let many: State = (0..3000).map(|n| (format!("sku{n}"), (None, "n".to_owned(), None, None))).collect();
    apply(&mut r, "all", &[&shop.full("all", 1, &many)]).unwrap();
    let catalog = instance("all").stream;
    // In the look at indexes, and for good.
    for times in [1, usize::MAX] {
        let left = std::sync::atomic::AtomicUsize::new(times);
        let breaks = move || {
            use std::sync::atomic::Ordering::SeqCst;
            left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok()
        };
        r.connection().progress_handler(5000, Some(breaks)).unwrap();
        let e = r.verify(&catalog).unwrap_err();
        assert!(matches!(&e, VerifyError::Sqlite(e) if e.to_string().contains("reading table item")), "{e}");
    }
    r.connection().progress_handler(0, None::<fn() -> bool>).unwrap();
    let [item] = &r.verify(&catalog).unwrap()[..] else { panic!() };
    assert!(item.is_right() && item.rows == 3000);
}

/// A scan does not see it.
#[test]
fn an_index_that_leads_astray_is_drift() {
    let shop = Shop::new();
    let mut r = shop.replica("r.db");
    let one = simple(&[("a", 1.0), ("b", 2.0)]);
    let full = shop.full("all", 1, &one);
    apply(&mut r, "all", &[&full]).unwrap();
    drop(r);
    let db = Connection::open(shop.dir.path().join("r.db")).unwrap();
    let bend = "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, '(name)', '(price)') WHERE name = 'item_name'";
    db.execute_batch(bend).unwrap();
    drop(db);
    let mut r = shop.replica("r.db");
    let [item] = &r.verify(&instance("all").stream).unwrap()[..] else { panic!() };
    assert!(!item.is_right() && item.found.is_none(), "{item:?}");
    apply(&mut r, "all", &[&full]).unwrap();
    assert_right(&r, &one, false);
}

#![allow(clippy::disallowed_methods, reason = "tests write files as they like")]
use super::*;
use crate::manifest::PackEntry;
use crate::pack::{Header, Op, PackWriter, RowCounts, SchemaPart, table_heads};
use crate::retry::Verdict;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tempfile::TempDir;

const DDL: &str = "CREATE TABLE item (sku TEXT PRIMARY KEY, plu INTEGER UNIQUE, name TEXT NOT NULL CHECK (length(name) <= 10), price REAL, img BLOB) STRICT;\nCREATE INDEX item_name ON item (name);";

type OwnedRow = (Option<i64>, String, Option<f64>, Option<Vec<u8>>);
type State = BTreeMap<String, OwnedRow>;

struct Shop {
    dir: TempDir,
    ddl: String,
    schema: u64,
    extra: bool,
}

fn v(n: u64) -> Version {
    Version::try_from(n).unwrap()
}
fn instance(audience: &str) -> Instance {
    format!("catalog@{audience}").parse().unwrap()
}
fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}
fn text(s: &str) -> Value<'_> {
    Value::Text(s.into())
}
fn values<'a>(sku: &'a str, r: &'a OwnedRow, extra: bool) -> Vec<Value<'a>> {
    let mut out = vec![
        text(sku),
        r.0.map_or(Value::Null, Value::Int),
        text(&r.1),
        r.2.map_or(Value::Null, |x| Value::real(x).unwrap()),
        r.3.as_ref().map_or(Value::Null, |b| Value::Blob(b.as_slice().into())),
    ];
    if extra {
        out.push(Value::Int(19));
    }
    out
}
fn digest(state: &State, extra: bool) -> StateDigest {
    let mut d = StateDigest::default();
    for (sku, r) in state {
        d.add(RowHasher::default().hash(&values(sku, r, extra)));
    }
    d
}

/// By the form of docs/FORMAT.md, hashed elsewhere.
#[test]
fn the_digest_of_a_stream_is_that_of_its_tables_in_order() {
    let of = |t: &str, d: &str| (t.parse().unwrap(), d.parse().unwrap());
    let digests = [of("price", &"0".repeat(32)), of("deal", &"0123456789abcdef".repeat(2))];
    assert_eq!(stream_digest(&BTreeMap::from(digests)), "258535f79a797bbd9cf58f5063b7f13c");
}

impl Shop {
    fn new() -> Self {
        Shop { dir: TempDir::new().unwrap(), ddl: DDL.into(), schema: 1, extra: false }
    }
    fn replica(&self, name: &str) -> Replica {
        Replica::open(&self.dir.path().join(name), &Limits::default()).unwrap()
    }
    fn columns(&self) -> Vec<crate::ids::ColumnName> {
        let mut c = vec!["sku", "plu", "name", "price", "img"];
        if self.extra {
            c.push("vat");
        }
        c.into_iter().map(|c| c.parse().unwrap()).collect()
    }
    fn write(
        &self,
        audience: &str,
        version: u64,
        base: Option<u64>,
        migrate: Vec<String>,
        digest: StateDigest,
        fill: impl FnOnce(&mut PackWriter<Vec<u8>>),
    ) -> (PathBuf, PackEntry) {
        self.write_all(audience, version, base, migrate, &BTreeMap::from([("item".parse().unwrap(), digest)]), fill)
    }
    fn write_all(
        &self,
        audience: &str,
        version: u64,
        base: Option<u64>,
        migrate: Vec<String>,
        digests: &BTreeMap<TableName, StateDigest>,
        fill: impl FnOnce(&mut PackWriter<Vec<u8>>),
    ) -> (PathBuf, PackEntry) {
        let contract = Contract::parse(&self.ddl, &Limits::default()).unwrap();
        let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
        let i = instance(audience);
        let header = Header {
            format: 1,
            stream: i.stream.clone(),
            audience: i.audience.clone(),
            version: v(version),
            base: base.map(v),
            kind,
            schema: SchemaPart { number: self.schema, ddl: self.ddl.clone(), sha256: contract.sha256, migrate },
            created_at: now(),
            source: "test".into(),
            tables: table_heads(&contract),
        };
        let mut w = PackWriter::new(Vec::new(), &header, 1).unwrap();
        fill(&mut w);
        let (bytes, written) = w.finish(digests).unwrap();
        let path = self.dir.path().join(format!("{audience}-{version}-{kind}.pack"));
        std::fs::write(&path, &bytes).unwrap();
        let entry = PackEntry {
            version: v(version),
            kind,
            base: base.map(v),
            bytes: written.bytes,
            unpacked: written.unpacked,
            sha256: written.sha256,
        };
        (path, entry)
    }
    fn full(&self, audience: &str, version: u64, state: &State) -> (PathBuf, PackEntry) {
        self.write(audience, version, None, vec![], digest(state, self.extra), |w| {
            w.section(&"item".parse().unwrap(), Op::Insert, &self.columns()).unwrap();
            for (sku, r) in state {
                w.row(&values(sku, r, self.extra)).unwrap();
            }
        })
    }
    fn delta(&self, version: u64, base: u64, from: &State, to: &State) -> (PathBuf, PackEntry) {
        self.write("all", version, Some(base), vec![], digest(to, self.extra), |w| {
            let item = "item".parse().unwrap();
            let moved = |sku: &String| to.get(sku).is_none_or(|r| r.0 != from[sku].0);
            w.section(&item, Op::Delete, &self.columns()[..1]).unwrap();
            from.keys().filter(|s| moved(s)).for_each(|s| w.row(&[text(s)]).unwrap());
            let columns = self.columns();
            let changed = [0usize, 2, 3, 4].map(|i| columns[i].clone());
            w.section(&item, Op::Update, &changed).unwrap();
            for (sku, r) in to.iter().filter(|(s, r)| from.get(*s).is_some_and(|f| f != *r && f.0 == r.0)) {
                let all = values(sku, r, false);
                w.row(&[all[0].clone(), all[2].clone(), all[3].clone(), all[4].clone()]).unwrap();
            }
            w.section(&item, Op::Insert, &columns).unwrap();
            for (sku, r) in to.iter().filter(|(s, _)| !from.contains_key(*s) || moved(s)) {
                w.row(&values(sku, r, self.extra)).unwrap();
            }
        })
    }
}

fn apply(replica: &mut Replica, audience: &str, packs: &[&(PathBuf, PackEntry)]) -> Result<Applied, ApplyError> {
    let files: Vec<_> = packs.iter().map(|(path, entry)| PackFile { path, entry }).collect();
    replica.apply(&Job {
        instance: &instance(audience),
        epoch: 1,
        packs: &files,
        now: now(),
        prove: true,
        listed: None,
    })
}

fn rows(replica: &Replica) -> i64 {
    replica.connection().query_row("SELECT count(*) FROM item", [], |r| r.get(0)).unwrap()
}

fn simple(pairs: &[(&str, f64)]) -> State {
    pairs.iter().map(|(s, p)| (s.to_string(), (None, "n".to_string(), Some(*p), None))).collect()
}

fn assert_right(replica: &Replica, state: &State, extra: bool) {
    let checks = replica.verify(&"catalog".parse().unwrap()).unwrap();
    assert!(checks.iter().all(TableCheck::is_right), "{checks:?}");
    assert_eq!(checks[0].found, Some(digest(state, extra)));
}

fn proofs(replica: &Replica, of: &Instance) -> Vec<(Version, PackKind, Sha256)> {
    let mut proofs: Vec<_> = replica
        .proofs_of(|i| i == of)
        .unwrap()
        .into_iter()
        .map(|(_, version, kind, sha256)| (version, kind, sha256))
        .collect();
    proofs.sort_by_key(|(version, ..)| *version);
    proofs
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
fn a_file_that_is_just_being_made_holds_nothing() {
    let shop = Shop::new();
    let path = shop.dir.path().join("r.db");
    drop(sqlite::open_private(&path).unwrap());
    let r = Replica::open_read_only(&path, &Limits::default()).unwrap();
    assert!(r.all_held().unwrap().is_empty());
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

/// Somebody else's connection, whose last commit stays in the log when it closes.
fn of_the_pos(path: &Path) -> Connection {
    let db = Connection::open(path).unwrap();
    db.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    db.execute_batch("PRAGMA journal_mode = WAL").unwrap();
    db
}

fn number(db: &Connection, sql: &str) -> i64 {
    db.query_row(sql, [], |r| r.get(0)).unwrap()
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

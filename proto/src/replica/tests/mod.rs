//! Replicas of a small shop: its rows, the packs that say them, and what is applied and held.
#![allow(clippy::disallowed_methods, reason = "tests write files as they like")]

use super::*;
use crate::manifest::PackEntry;
use crate::pack::{Header, Op, PackWriter, SchemaPart, table_heads};
use crate::retry::Verdict;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tempfile::TempDir;

mod held;
mod packs;
mod tables;

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

fn number(db: &Connection, sql: &str) -> i64 {
    db.query_row(sql, [], |r| r.get(0)).unwrap()
}

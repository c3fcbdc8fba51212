//! Applying a pack to a replica, against a model that does the same by hand. The input is the sections of a pack whose
//! header and trailer are made here: bit 0 of its first byte says full or delta, bit 1 whether the contract changes.
//! The product takes it if the model does, and then holds the model's rows.

use crate::model::{BASE, DDL, Model, NEWER};
use crate::pack::gzip;
use proto::clock::Timestamp;
use proto::digest::Sha256;
use proto::layout::PackKind;
use proto::limits::Limits;
use proto::manifest::PackEntry;
use proto::pack::{FORMAT, Header, SchemaPart, table_heads};
use proto::replica::{Job, PackFile, Replica};
use proto::schema::Contract;
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::path::PathBuf;

struct Bench {
    replica: Replica,
    base: Model,
    file: PathBuf,
    contracts: [Contract; 2],
    _dir: tempfile::TempDir,
}

thread_local! {
    static BENCH: std::cell::RefCell<Bench> = std::cell::RefCell::new(Bench::new());
}

impl Bench {
    fn new() -> Bench {
        let (dir, limits) = (crate::scratch_dir(), Limits { line_bytes: 4096, rows: 200, ..Limits::default() });
        let replica = Replica::open(&dir.path().join("replica.db"), &limits).unwrap();
        let contracts = [DDL, NEWER].map(|ddl| Contract::parse(ddl, &limits).unwrap());
        let (file, base) = (dir.path().join("a.pack"), Model::empty(false));
        let mut bench = Bench { replica, base, file, contracts, _dir: dir };
        let counts = bench.base.apply(BASE.as_bytes(), true).unwrap();
        let digests = bench.base.digests();
        let entry = bench.write(BASE.as_bytes(), 1, PackKind::Full, false, counts, &digests);
        bench.take(&entry).unwrap();
        bench.replica.commit().unwrap();
        bench
    }

    fn write(
        &self,
        lines: &[u8],
        version: u64,
        kind: PackKind,
        newer: bool,
        counts: [u64; 3],
        digests: &BTreeMap<String, String>,
    ) -> PackEntry {
        let [old, new] = &self.contracts;
        let contract = if newer { new } else { old };
        let migrates = newer && kind == PackKind::Delta;
        let base = (kind == PackKind::Delta).then_some(proto::ids::Version::FIRST);
        let header = Header {
            format: FORMAT,
            stream: "mix".parse().unwrap(),
            audience: "all".parse().unwrap(),
            version: version.try_into().unwrap(),
            base,
            kind,
            schema: SchemaPart {
                number: 1,
                ddl: contract.ddl.clone(),
                sha256: contract.sha256,
                migrate: if migrates { new.additive_since(old).unwrap() } else { Vec::new() },
            },
            created_at: Timestamp::UNIX_EPOCH,
            source: String::new(),
            tables: table_heads(contract),
        };
        let [delete, update, insert] = counts;
        let rows = serde_json::json!({"delete": delete, "update": update, "insert": insert});
        let mut text = serde_json::to_vec(&header).unwrap();
        text.push(b'\n');
        text.extend_from_slice(lines);
        if !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        text.extend_from_slice(
            format!("{{\"rows\":{rows},\"digests\":{}}}\n", serde_json::to_string(digests).unwrap()).as_bytes(),
        );
        let bytes = gzip(&text);
        std::fs::write(&self.file, &bytes).unwrap();
        let (unpacked, sha256) = (text.len() as u64, Sha256::of(&bytes));
        PackEntry { version: header.version, kind, base, bytes: bytes.len() as u64, unpacked, sha256 }
    }

    /// Applies, and leaves the transaction open.
    fn take(&mut self, entry: &PackEntry) -> Result<(), String> {
        let packs = [PackFile { path: &self.file, entry }];
        let instance = "mix@all".parse().unwrap();
        let job =
            Job { instance: &instance, epoch: 1, packs: &packs, now: Timestamp::UNIX_EPOCH, prove: true, listed: None };
        self.replica.apply_uncommitted(&job).map(drop).map_err(|e| e.to_string())
    }
}

/// The digests of the rows that a database has, in the contract's order of columns.
fn found(db: &Connection, model: &Model) -> BTreeMap<String, String> {
    let digest = |table: &String| (table.clone(), tillcast_tests::digest::of_table(db, table));
    model.digests().keys().map(digest).collect()
}

pub fn apply(data: &[u8]) {
    let Some((flags, lines)) = data.split_first() else { return };
    let kind = if flags & 1 == 0 { PackKind::Delta } else { PackKind::Full };
    let newer = flags & 2 != 0;
    BENCH.with_borrow_mut(|bench| {
        let mut model = match (kind, newer) {
            (PackKind::Full, newer) => Model::empty(newer),
            (PackKind::Delta, true) => bench.base.clone().migrated(),
            (PackKind::Delta, false) => bench.base.clone(),
        };
        let long = lines.split(|b| *b == b'\n').any(|l| l.len() >= 4096) || lines.len() > 100_000;
        let counts = model.apply(lines, kind == PackKind::Full).filter(|c| c.iter().sum::<u64>() <= 200 && !long);
        let entry = bench.write(lines, 2, kind, newer, counts.unwrap_or_default(), &model.digests());
        match (bench.take(&entry), counts) {
            (Ok(()), Some(_)) => assert_eq!(found(bench.replica.connection(), &model), model.digests()),
            (Err(_), None) => {}
            (Ok(()), None) => panic!("taken, though the model refuses it"),
            (Err(e), Some(_)) => panic!("refused, though the model takes it: {e}"),
        }
        bench.replica.rollback();
        let held = bench.replica.held(&"mix".parse().unwrap()).unwrap().unwrap();
        assert_eq!(held.version.get(), 1, "nothing stays of what was rolled back");
    });
}

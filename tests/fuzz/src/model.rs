//! Rows of three fixed tables and what a pack's lines do to them, written from docs/FORMAT.md: it shares no code with
//! the product. The contract's rules are spelt out here by hand.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// The contract that every input meets.
pub const DDL: &str = "CREATE TABLE item (sku TEXT PRIMARY KEY CHECK (length(sku) <= 5), plu INTEGER UNIQUE, kg REAL, pic BLOB, name TEXT NOT NULL) STRICT;
CREATE TABLE line (store TEXT NOT NULL, no INTEGER NOT NULL, sku TEXT REFERENCES item (sku), qty INTEGER NOT NULL CHECK (qty <> 13), PRIMARY KEY (no, store)) STRICT, WITHOUT ROWID;
CREATE TABLE tag (id INTEGER PRIMARY KEY, txt TEXT) STRICT;
CREATE UNIQUE INDEX tag_txt ON tag (txt);
";

/// The contract after an additive change: a column, a table, an index.
pub const NEWER: &str = "CREATE TABLE item (sku TEXT PRIMARY KEY CHECK (length(sku) <= 5), plu INTEGER UNIQUE, kg REAL, pic BLOB, name TEXT NOT NULL, vat INTEGER NOT NULL DEFAULT 19) STRICT;
CREATE TABLE line (store TEXT NOT NULL, no INTEGER NOT NULL, sku TEXT REFERENCES item (sku), qty INTEGER NOT NULL CHECK (qty <> 13), PRIMARY KEY (no, store)) STRICT, WITHOUT ROWID;
CREATE TABLE more (id INTEGER PRIMARY KEY) STRICT;
CREATE TABLE tag (id INTEGER PRIMARY KEY, txt TEXT) STRICT;
CREATE UNIQUE INDEX tag_txt ON tag (txt);
CREATE INDEX item_name ON item (name);
";

/// What is held before a delta, as the sections of a full.
pub const BASE: &str = r#"{"table":"item","op":"insert","columns":["sku","plu","kg","pic","name"]}
["a",1,0.5,"AQI=","Apple"]
["b",2,null,null,"Bread"]
["c",null,-1e300,"","Č"]
{"table":"line","op":"insert","columns":["store","no","sku","qty"]}
["x",1,"a",2]
["y",1,"b",-5]
["x",2,null,0]
{"table":"tag","op":"insert","columns":["id","txt"]}
[1,"t"]
[-9,null]
"#;

/// A value; the product's are another type.
#[derive(Debug, Clone, PartialEq)]
pub enum Val {
    Null,
    Int(i64),
    Real(f64),
    Text(String),
    Blob(Vec<u8>),
}

impl Val {
    fn canonical(&self) -> Vec<u8> {
        let sized = |tag: u8, b: &[u8]| [&[tag][..], &u32::try_from(b.len()).unwrap().to_be_bytes(), b].concat();
        match self {
            Val::Null => b"N".to_vec(),
            Val::Int(n) => [&b"I"[..], &n.to_be_bytes()].concat(),
            Val::Real(r) => [&b"R"[..], &r.to_bits().to_be_bytes()].concat(),
            Val::Text(t) => sized(b'T', t.as_bytes()),
            Val::Blob(b) => sized(b'B', b),
        }
    }

    fn read(json: &serde_json::Value, ty: char) -> Option<Val> {
        use serde_json::Value;
        Some(match (json, ty) {
            (Value::Null, _) => Val::Null,
            (Value::Number(n), 'i') => Val::Int(n.as_i64()?),
            (Value::Number(n), 'r') => Val::Real(n.as_f64()? + 0.0),
            (Value::String(s), 't') if !s.contains('\0') => Val::Text(s.clone()),
            (Value::String(s), 'b') => Val::Blob(STANDARD.decode(s).ok()?),
            _ => return None,
        })
    }
}

/// A table's shape: columns with type and whether NULL is refused, the key, columns that are unique.
struct Shape {
    columns: &'static [(&'static str, char, bool)],
    key: &'static [usize],
    unique: &'static [usize],
}

fn shape(table: &str, newer: bool) -> Option<Shape> {
    let columns: &[(&str, char, bool)] = match (table, newer) {
        ("item", false) => {
            &[("sku", 't', true), ("plu", 'i', false), ("kg", 'r', false), ("pic", 'b', false), ("name", 't', true)]
        }
        ("item", true) => &[
            ("sku", 't', true),
            ("plu", 'i', false),
            ("kg", 'r', false),
            ("pic", 'b', false),
            ("name", 't', true),
            ("vat", 'i', true),
        ],
        ("line", _) => &[("store", 't', true), ("no", 'i', true), ("sku", 't', false), ("qty", 'i', true)],
        ("tag", _) => &[("id", 'i', true), ("txt", 't', false)],
        ("more", true) => &[("id", 'i', true)],
        _ => return None,
    };
    let (key, unique): (&[usize], &[usize]) = match table {
        "item" => (&[0], &[1]),
        "line" => (&[1, 0], &[]),
        "tag" => (&[0], &[1]),
        _ => (&[0], &[]),
    };
    Some(Shape { columns, key, unique })
}

impl Shape {
    fn place(&self, column: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.0 == column)
    }
    fn key_of(&self, row: &[Val]) -> Vec<u8> {
        self.key.iter().flat_map(|k| row[*k].canonical()).collect()
    }
}

#[derive(Deserialize)]
struct Section {
    table: String,
    op: String,
    columns: Vec<String>,
}

/// What one section's rows do.
struct Work {
    table: String,
    op: usize,
    /// Which column each value of a row is.
    places: Vec<usize>,
}

/// Rows by table and key.
#[derive(Clone, Default)]
pub struct Model {
    newer: bool,
    rows: BTreeMap<String, BTreeMap<Vec<u8>, Vec<Val>>>,
}

impl Model {
    /// Empty tables.
    pub fn empty(newer: bool) -> Model {
        let tables = ["item", "line", "more", "tag"].into_iter().filter(|t| newer || *t != "more");
        Model { newer, rows: tables.map(|t| (t.to_owned(), BTreeMap::new())).collect() }
    }

    /// The same rows under the newer contract.
    pub fn migrated(mut self) -> Model {
        self.newer = true;
        self.rows.insert("more".into(), BTreeMap::new());
        self.rows.get_mut("item").unwrap().values_mut().for_each(|row| row.push(Val::Int(19)));
        self
    }

    /// Does what a pack's sections say. None: they cannot be done, or are no sections. Else the rows by operation.
    pub fn apply(&mut self, lines: &[u8], full: bool) -> Option<[u64; 3]> {
        let (mut work, mut counts): (Option<Work>, _) = (None, [0; 3]);
        for line in lines.strip_suffix(b"\n").unwrap_or(lines).split(|b| *b == b'\n') {
            if lines.is_empty() {
                break;
            }
            if line.first() == Some(&b'[') {
                let w = work.as_ref()?;
                self.row(line, w)?;
                counts[w.op] += 1;
            } else {
                work = Some(self.section(line, full, work.as_ref().map_or(0, |w| w.op))?);
            }
        }
        let items: BTreeSet<Vec<u8>> = self.rows["item"].values().map(|r| r[0].canonical()).collect();
        let led = |row: &Vec<Val>| row[2] == Val::Null || items.contains(&row[2].canonical());
        self.rows["line"].values().all(led).then_some(counts)
    }

    fn section(&self, line: &[u8], full: bool, after: usize) -> Option<Work> {
        if line.first() != Some(&b'{') || line.starts_with(b"{\"rows\"") {
            return None;
        }
        let section: Section = serde_json::from_slice(line).ok()?;
        let shape = shape(&section.table, self.newer)?;
        let op = ["delete", "update", "insert"].iter().position(|o| *o == section.op)?;
        let places: Vec<usize> = section.columns.iter().map(|c| shape.place(c)).collect::<Option<_>>()?;
        let distinct: BTreeSet<usize> = places.iter().copied().collect();
        let fits = match op {
            0 => places == shape.key,
            1 => places.starts_with(shape.key) && places.len() > shape.key.len() && distinct.len() == places.len(),
            _ => places.iter().copied().eq(0..shape.columns.len()),
        };
        (fits && op >= after && (op == 2 || !full)).then_some(Work { table: section.table, op, places })
    }

    fn row(&mut self, line: &[u8], work: &Work) -> Option<()> {
        let shape = shape(&work.table, self.newer)?;
        let json: Vec<serde_json::Value> = serde_json::from_slice(line).ok()?;
        if json.len() != work.places.len() {
            return None;
        }
        let mut given = vec![Val::Null; shape.columns.len()];
        for (value, place) in json.iter().zip(&work.places) {
            given[*place] = Val::read(value, shape.columns[*place].1)?;
        }
        if shape.key.iter().any(|k| given[*k] == Val::Null) {
            return None;
        }
        let key = shape.key_of(&given);
        let table = self.rows.get_mut(&work.table)?;
        let new = match (work.op, table.remove(&key)) {
            (0, Some(_)) => return Some(()),
            (1, Some(mut old)) => {
                work.places.iter().for_each(|p| old[*p] = given[*p].clone());
                old
            }
            (2, None) => given,
            _ => return None,
        };
        let null = shape.columns.iter().zip(&new).any(|(c, v)| c.2 && *v == Val::Null);
        let taken = |u: &usize| new[*u] != Val::Null && table.values().any(|r| r[*u] == new[*u]);
        let checked = match (work.table.as_str(), &new[0], new.get(3)) {
            ("item", Val::Text(sku), _) => sku.chars().count() <= 5,
            ("line", _, Some(qty)) => *qty != Val::Int(13),
            _ => true,
        };
        if null || !checked || shape.unique.iter().any(taken) {
            return None;
        }
        table.insert(key, new);
        Some(())
    }

    /// The state digest of each table.
    pub fn digests(&self) -> BTreeMap<String, String> {
        let hash = |row: &Vec<Val>| {
            let bytes: Vec<u8> = row.iter().flat_map(Val::canonical).collect();
            Sha256::digest(&bytes)[..16].iter().fold(0u128, |n, b| n << 8 | u128::from(*b))
        };
        let sum = |t: &BTreeMap<_, Vec<Val>>| t.values().map(hash).fold(0u128, u128::wrapping_add);
        self.rows.iter().map(|(name, t)| (name.clone(), format!("{:032x}", sum(t)))).collect()
    }
}

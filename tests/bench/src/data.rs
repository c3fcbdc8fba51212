//! The data of the benches: items of 12 columns with one index, the same in every run, and changes to 1% of them.

use proto::digest::{RowHasher, StateDigest};
use proto::ids::{ColumnName, Instance, TableName, Version};
use proto::layout::PackKind;
use proto::limits::Limits;
use proto::manifest::PackEntry;
use proto::pack::{Header, Op, PackWriter, SchemaPart, table_heads};
use proto::replica::PackFile;
use proto::schema::Contract;
use proto::value::Value;
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// The contract, and the source's table.
pub const DDL: &str = "CREATE TABLE item (
    sku TEXT NOT NULL PRIMARY KEY CHECK (length(sku) <= 13),
    ean TEXT NOT NULL CHECK (length(ean) <= 14),
    name TEXT NOT NULL CHECK (length(name) <= 100),
    brand TEXT,
    department INTEGER NOT NULL,
    vat INTEGER NOT NULL,
    unit TEXT NOT NULL,
    content REAL,
    price_cents INTEGER NOT NULL CHECK (price_cents BETWEEN 0 AND 9999999),
    deposit_cents INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    updated TEXT NOT NULL
) STRICT;
";
/// The one index.
pub const INDEX: &str = "CREATE INDEX item_ean ON item (ean);\n";
/// All columns, as queries name them.
pub const COLUMNS: &str =
    "sku, ean, name, brand, department, vat, unit, content, price_cents, deposit_cents, flags, updated";
/// Inserts one row.
pub const INSERT: &str = "INSERT INTO item (sku, ean, name, brand, department, vat, unit, content, price_cents, deposit_cents, flags, updated)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)";
/// What a delta changes.
pub const UPDATE: &str = "UPDATE item SET price_cents = ?2, updated = ?3 WHERE sku = ?1";
/// Where that stands in a row.
const PRICE: usize = 8;
const UPDATED: usize = 11;

/// A number that looks random (splitmix64).
pub fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One change of a delta: which row, its new price and time.
#[derive(Debug, Clone)]
pub struct Change {
    /// The row.
    pub row: u64,
    /// Its key.
    pub sku: String,
    /// The new price.
    pub price: i64,
    /// The new time.
    pub updated: String,
}

/// The items as they stand at a version.
#[derive(Debug, Clone)]
pub struct Catalog {
    prices: Vec<i64>,
    /// The version in which each price was set.
    set_in: Vec<u32>,
    version: u32,
}

const WORDS: [&str; 24] = [
    "Bio",
    "Classic",
    "Joghurt",
    "Vollmilch",
    "Schokolade",
    "Käse",
    "Brot",
    "Äpfel",
    "Mineralwasser",
    "Orangensaft",
    "Spaghetti",
    "Reis",
    "Kaffee",
    "Tee",
    "Waschmittel",
    "Shampoo",
    "Zahnpasta",
    "Butter",
    "Sahne",
    "Tomaten",
    "Crème",
    "Linsen",
    "Honig",
    "Müsli",
];
const BRANDS: [&str; 12] = [
    "Alpenhof",
    "Beste Wahl",
    "Casa Mia",
    "Dorfgut",
    "Erntezeit",
    "Frischeland",
    "Gutes",
    "Hausmarke",
    "Île de Sel",
    "Jolly",
    "Kornblume",
    "Landpartie",
];

impl Catalog {
    /// `rows` items at version 1.
    pub fn new(rows: u64) -> Catalog {
        let prices = (0..rows).map(|i| 49 + (mix(i ^ 0xca5e) % 4000) as i64).collect();
        Catalog { prices, set_in: vec![1; rows as usize], version: 1 }
    }

    /// How many.
    pub fn rows(&self) -> u64 {
        self.prices.len() as u64
    }

    /// The version.
    pub fn version(&self) -> u64 {
        self.version.into()
    }

    /// One item, in the order of the keys.
    pub fn item(&self, i: u64) -> [Value<'static>; 12] {
        let r = mix(i);
        let pick = |n: u32, of: usize| (r >> n) as usize % of;
        let text = |s: String| Value::Text(s.into());
        let still = |s: &'static str| Value::Text(s.into());
        let name = format!(
            "{} {} {} {}",
            BRANDS[pick(3, 12)],
            WORDS[pick(9, 24)],
            WORDS[pick(17, 24)],
            50 * (1 + pick(31, 40))
        );
        [
            text(sku(i)),
            text(format!("4{:012}", (r >> 8) % 1_000_000_000_000)),
            text(name),
            if pick(23, 7) == 0 { Value::Null } else { still(BRANDS[pick(3, 12)]) },
            Value::Int(1 + pick(41, 60) as i64),
            Value::Int([7, 19][pick(2, 4) / 3]),
            still(["ST", "KG", "L", "PK"][pick(45, 4)]),
            if pick(27, 9) == 0 { Value::Null } else { Value::Real((1 + pick(29, 400)) as f64 / 8.0) },
            Value::Int(self.prices[i as usize]),
            Value::Int([0, 0, 0, 25][pick(47, 4)]),
            Value::Int(pick(50, 16) as i64),
            text(time(self.set_in[i as usize])),
        ]
    }

    /// Changes price and time of `count` rows, spread over all of them: the next version.
    pub fn change(&mut self, count: u64) -> Vec<Change> {
        self.version += 1;
        let every = self.rows() / count;
        let mut changes = Vec::with_capacity(count as usize);
        for block in 0..count {
            let r = mix(block.wrapping_mul(0x1_0001) ^ (u64::from(self.version) << 40));
            let i = block * every + r % every;
            let old = self.prices[i as usize];
            // Prices move by up to a third, to one that ends in 9.
            let moved = old * (67 + (r >> 20) as i64 % 67) / 100 / 10 * 10 + 9;
            let price = if moved == old { old + 10 } else { moved };
            (self.prices[i as usize], self.set_in[i as usize]) = (price, self.version);
            changes.push(Change { row: i, sku: sku(i), price, updated: time(self.version) });
        }
        changes
    }

    /// Fills a table `item` that is there.
    pub fn fill(&self, db: &Connection) {
        db.execute_batch("BEGIN").unwrap();
        let mut insert = db.prepare(INSERT).unwrap();
        for i in 0..self.rows() {
            insert.execute(rusqlite::params_from_iter(self.item(i))).unwrap();
        }
        drop(insert);
        db.execute_batch("COMMIT").unwrap();
    }
}

/// The key of a row.
pub fn sku(i: u64) -> String {
    format!("{:08}", 10_000_000 + i * 3)
}

fn time(version: u32) -> String {
    // A nightly batch sets one time on all that it touches.
    format!("2026-{:02}-{:02}T04:00:00Z", 1 + version / 28 % 12, 1 + version % 28)
}

/// Changes rows of a table `item`, in one transaction.
pub fn update(db: &Connection, changes: &[Change]) {
    db.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut update = db.prepare_cached(UPDATE).unwrap();
    for c in changes {
        assert_eq!(update.execute((&c.sku, c.price, &c.updated)).unwrap(), 1);
    }
    drop(update);
    db.execute_batch("COMMIT").unwrap();
}

/// A pack in a file.
#[derive(Debug)]
pub struct Pack {
    /// The file.
    pub path: PathBuf,
    /// What a manifest would say.
    pub entry: PackEntry,
}

impl Pack {
    /// For [`proto::replica::Job`].
    pub fn file(&self) -> PackFile<'_> {
        PackFile { path: &self.path, entry: &self.entry }
    }
}

/// Writes packs of a catalog, as headquarters does, and keeps their digest.
#[derive(Debug)]
pub struct Packer {
    dir: PathBuf,
    contract: Contract,
    digest: StateDigest,
    hasher: RowHasher,
    version: u64,
}

/// The stream@audience of the packs.
pub fn instance() -> Instance {
    "catalog@all".parse().unwrap()
}

fn version(n: u64) -> Version {
    Version::try_from(n).unwrap()
}

fn columns(list: &str) -> Vec<ColumnName> {
    list.split(", ").map(|c| c.parse().unwrap()).collect()
}

impl Packer {
    /// Packs will lie in `dir`.
    pub fn new(dir: &Path) -> Packer {
        let contract = Contract::parse(&format!("{DDL}{INDEX}"), &Limits::default()).unwrap();
        Packer { dir: dir.into(), contract, digest: StateDigest::default(), hasher: RowHasher::default(), version: 0 }
    }

    /// All rows.
    pub fn full(&mut self, catalog: &Catalog) -> Pack {
        self.digest = StateDigest::default();
        self.write(catalog.version(), None, |packer, w| {
            w.section(&item(), Op::Insert, &columns(COLUMNS)).unwrap();
            for i in 0..catalog.rows() {
                let row = catalog.item(i);
                packer.digest.add(packer.hasher.hash(&row));
                w.row(&row).unwrap();
            }
        })
    }

    /// The way from the version before; `before` is the catalog of that version, `changes` lead to the next.
    pub fn delta(&mut self, before: &[[Value<'static>; 12]], changes: &[Change]) -> Pack {
        let base = self.version;
        self.write(base + 1, Some(base), |packer, w| {
            w.section(&item(), Op::Update, &columns("sku, price_cents, updated")).unwrap();
            for (old, c) in before.iter().zip(changes) {
                let mut new = old.clone();
                new[PRICE] = Value::Int(c.price);
                new[UPDATED] = Value::Text(c.updated.clone().into());
                packer.digest.subtract(packer.hasher.hash(old));
                packer.digest.add(packer.hasher.hash(&new));
                w.row(&[new[0].clone(), new[PRICE].clone(), new[UPDATED].clone()]).unwrap();
            }
        })
    }

    fn write(
        &mut self,
        to: u64,
        base: Option<u64>,
        rows: impl FnOnce(&mut Self, &mut PackWriter<BufWriter<std::fs::File>>),
    ) -> Pack {
        let kind = if base.is_some() { PackKind::Delta } else { PackKind::Full };
        let i = instance();
        let header = Header {
            format: 1,
            stream: i.stream,
            audience: i.audience,
            version: version(to),
            base: base.map(version),
            kind,
            schema: SchemaPart {
                number: 1,
                ddl: self.contract.ddl.clone(),
                sha256: self.contract.sha256,
                migrate: Vec::new(),
            },
            created_at: now(),
            source: "bench".into(),
            tables: table_heads(&self.contract),
        };
        let path = self.dir.join(format!("{to:010}.{kind}.pack"));
        let mut w = PackWriter::new(BufWriter::new(std::fs::File::create(&path).unwrap()), &header, LEVEL).unwrap();
        rows(self, &mut w);
        let (_, written) = w.finish(&BTreeMap::from([(item(), self.digest)])).unwrap();
        self.version = to;
        let entry = PackEntry {
            version: version(to),
            kind,
            base: base.map(version),
            bytes: written.bytes,
            unpacked: written.unpacked,
            sha256: written.sha256,
        };
        Pack { path, entry }
    }
}

/// gzip's level, as hq-publisher's default.
const LEVEL: u32 = 6;

fn item() -> TableName {
    "item".parse().unwrap()
}

/// A time for headers: any.
pub fn now() -> proto::clock::Timestamp {
    "2026-11-21T04:00:00Z".parse().unwrap()
}

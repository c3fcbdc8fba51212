//! Contracts that are understood, those that are refused, and what leads from one to the next.

use super::*;

fn parse(ddl: &str) -> Result<Contract, SchemaError> {
    Contract::parse(ddl, &Limits::default())
}

const ITEM: &str = "CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL CHECK (length(name) <= 100), plu INTEGER UNIQUE, price REAL, img BLOB) STRICT;\nCREATE INDEX item_name ON item (name);";

#[test]
fn a_contract_is_understood() {
    let c = parse(ITEM).unwrap();
    let t = &c.tables[0];
    assert_eq!(t.column_list(), "\"sku\", \"name\", \"plu\", \"price\", \"img\"");
    assert_eq!((t.key.as_slice(), t.unique.as_slice()), ([0].as_slice(), [2].as_slice()));
    assert_eq!(t.columns[1].max_length, Some(100));
    assert!(t.columns[0].not_null && t.columns[1].not_null && !t.columns[2].not_null);
    assert_eq!(t.indexes[0].0, "item_name");
    let partial = parse(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b TEXT, on_sale INTEGER, c TEXT) STRICT; CREATE UNIQUE INDEX i ON t (a, b) WHERE \"on_sale\" = 1;",
    );
    assert_eq!(partial.unwrap().tables[0].unique, [1, 2, 3]);
    parse("CREATE TABLE t (a TEXT COLLATE binary PRIMARY KEY CHECK (a <> 'x' COLLATE NOCASE), b TEXT COLLATE NOCASE) STRICT")
        .unwrap();
}

#[test]
fn what_a_contract_may_not_do_is_refused() {
    for (ddl, why) in [
        ("CREATE TABLE t (a TEXT PRIMARY KEY)", "STRICT"),
        ("CREATE TABLE t (a TEXT) STRICT", "PRIMARY KEY"),
        ("CREATE TABLE t (a ANY PRIMARY KEY) STRICT", "type ANY"),
        ("CREATE TABLE t (a REAL PRIMARY KEY) STRICT", "REAL"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY COLLATE NOCASE) STRICT", "COLLATE"),
        ("CREATE TABLE t (a TEXT COLLATE 'nocase', PRIMARY KEY (a COLLATE BINARY)) STRICT", "COLLATE"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT AS (a || 'x')) STRICT", "generated"),
        ("CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT) STRICT", "AUTOINCREMENT"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY ON CONFLICT REPLACE) STRICT", "ON CONFLICT"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, n INTEGER NOT NULL on/**/conflict ignore) STRICT", "ON CONFLICT"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT UNIQUE ON \u{feff}CONFLICT IGNORE) STRICT", "ON CONFLICT"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, CHECK (a > 'b') ON CONFLICT IGNORE) STRICT", "ON CONFLICT"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT DEFAULT ('' || current_timestamp)) STRICT", "a literal"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT DEFAULT (lower('X'))) STRICT", "a literal"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT REFERENCES u (a)) STRICT", "no table of this stream"),
        (
            "CREATE TABLE u (a TEXT PRIMARY KEY) STRICT; CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT REFERENCES u (a) ON DELETE CASCADE) STRICT",
            "actions",
        ),
        (
            "CREATE TABLE u (a TEXT PRIMARY KEY) STRICT; CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT REFERENCES u (a) ON UPDATE CASCADE) STRICT",
            "actions",
        ),
        ("CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT COLLATE NOCASE UNIQUE) STRICT", "drop its COLLATE"),
        (
            "CREATE TABLE t (a TEXT PRIMARY KEY, b TEXT) STRICT; CREATE UNIQUE INDEX i ON t (b COLLATE NOCASE)",
            "drop its COLLATE",
        ),
        ("CREATE TABLE t (a TEXT PRIMARY KEY) STRICT; CREATE INDEX tillcast_i ON t (a)", "reserved"),
        ("CREATE TABLE Item (a TEXT PRIMARY KEY) STRICT", "refused"),
        ("CREATE TABLE tillcast_stream (a TEXT PRIMARY KEY) STRICT", "reserved"),
        ("CREATE TABLE t (a TEXT PRIMARY KEY) STRICT; CREATE UNIQUE INDEX i ON t (lower(a))", "plain columns"),
        ("", "0 tables"),
    ] {
        let e = parse(ddl).unwrap_err().to_string();
        assert!(e.contains(why), "{ddl}: {e}");
    }
}

#[test]
fn a_foreign_key_refers_to_what_is_unique() {
    let with = |parent: &str, refers: &str| {
        parse(&format!(
            "CREATE TABLE p ({parent}) STRICT; CREATE TABLE c (id INTEGER PRIMARY KEY, code TEXT {refers}) STRICT;"
        ))
    };
    let (one, two) = ("id INTEGER PRIMARY KEY, code TEXT", "a TEXT, b TEXT, PRIMARY KEY (a, b)");
    let index = |sql: &str| {
        format!("{one}) STRICT; CREATE UNIQUE INDEX i ON p (code){sql}; CREATE TABLE more (a TEXT PRIMARY KEY")
    };
    for (parent, refers) in [
        (one, "REFERENCES p (code)"),
        (one, "REFERENCES p (nosuch)"),
        (two, "REFERENCES p"),
        (two, "REFERENCES p (a)"),
        (index(" WHERE id > 3").as_str(), "REFERENCES p (code)"),
        (one, "REFERENCES c (code)"),
    ] {
        let e = with(parent, refers).unwrap_err();
        assert!(e.to_string().starts_with("table c: foreign key mismatch") && e.to_string().contains("UNIQUE"), "{e}");
    }
    for (parent, refers) in [
        (one, "REFERENCES p"),
        ("id INTEGER PRIMARY KEY, code TEXT UNIQUE", "REFERENCES P (Code)"),
        (index("").as_str(), "REFERENCES p (code)"),
        (two, ", up TEXT, FOREIGN KEY (up, code) REFERENCES p"),
        (one, "UNIQUE REFERENCES c (code)"),
    ] {
        with(parent, refers).unwrap();
    }
}

/// A text in double quotes: none that is written is taken, one that is out is held with its rows.
#[test]
fn a_text_in_double_quotes_is_read_and_not_published() {
    let strict = |ddl: &str| Contract::parse_strict(ddl, &Limits::default());
    for column in ["b TEXT CHECK (b IN (\"x\", 'y'))", "\"b\" TEXT CHECK (\"c\" <> 'x')"] {
        let ddl = format!("CREATE TABLE t (a TEXT PRIMARY KEY, {column}) STRICT");
        assert!(strict(&ddl).unwrap_err().to_string().contains("no such column: \""), "{ddl}");
        let old = parse("CREATE TABLE t (a TEXT PRIMARY KEY) STRICT").unwrap();
        parse(&ddl).unwrap().additive_since(&old).unwrap();
    }
    assert_eq!(strict(ITEM), parse(ITEM));
    strict("CREATE TABLE t (a TEXT PRIMARY KEY, \"b\" TEXT CHECK (\"b\" <> 'x')) STRICT").unwrap();
}

#[test]
fn what_only_looks_like_a_broken_rule_is_taken() {
    for columns in [
        "conflict TEXT, b TEXT CHECK (b <> 'ON CONFLICT')",
        "\"on\" TEXT REFERENCES t (a), \"conflict\" TEXT -- ON CONFLICT\n",
        "b TEXT DEFAULT 'a(b)', c TEXT DEFAULT 'current_time', d REAL DEFAULT -1.5e-3, e BLOB DEFAULT x'28'",
    ] {
        parse(&format!("CREATE TABLE t (a TEXT PRIMARY KEY, {columns}) STRICT")).unwrap();
    }
}

/// A delta's ALTER TABLE is made of the tokens: each literal and operator must come through.
#[test]
fn columns_of_all_literals_and_operators_are_added() {
    let old = parse("CREATE TABLE t (a TEXT PRIMARY KEY) STRICT").unwrap();
    for column in [
        "z BLOB NOT NULL DEFAULT x'0102'",
        "z BLOB CHECK (z <> X'00')",
        "z REAL DEFAULT 1e+5",
        "z REAL DEFAULT -1.5E-3 CHECK (z > -.5e+3 AND z <> 2e3)",
        "z INTEGER DEFAULT 0x1E CHECK (z+1 <> 0x1e+1)",
        "z TEXT CHECK (z ->> '$.a' IS NULL AND z->'$.b' IS NULL AND z->>'$.c' IS NULL)",
        "z INTEGER CHECK (z <> -1 -- a word\n AND z << 1 >= 0 OR z||'' == '' OR z != 1_000)",
        "\"x\" TEXT DEFAULT 'x''y'",
    ] {
        let new = parse(&format!("CREATE TABLE t (a TEXT PRIMARY KEY, {column}) STRICT")).unwrap();
        let added = new.additive_since(&old).unwrap_or_else(|e| panic!("{column}: {e}"));
        let spelt = |create: &str| sql::tokens(create).iter().map(|t| t.text.to_owned()).collect::<Vec<_>>();
        let definition = added[0].strip_prefix("ALTER TABLE \"t\" ADD COLUMN ").unwrap();
        assert_eq!(spelt(definition), spelt(column), "{column}");
    }
}

/// One CHECK a function, which a good row passes and a bad one breaks.
#[test]
fn pure_functions_judge_rows() {
    let checks = [
        ("date(a) IS a", "'2026-02-28'", "'2026-02-30'"),
        ("time(a) IS a", "'08:30:00'", "'8:30'"),
        ("datetime(a) IS NOT NULL", "'2026-01-06T08:00:00Z'", "'soon'"),
        ("julianday(a) > 2461000", "'2026-01-06'", "'1926-01-06'"),
        ("unixepoch(a) > 0", "'2026-01-06'", "'1926-01-06'"),
        ("strftime('%w', a) <> '0'", "'2026-11-28'", "'2026-11-29'"),
        ("json_type(a) = 'array'", "'[]'", "'{}'"),
        ("json_extract(a, '$.x') = 1", "'{\"x\":1}'", "'{\"x\":2}'"),
        ("a -> '$.x' = '1' AND a ->> '$.x' = 1", "'{\"x\":1}'", "'{\"x\":2}'"),
        ("json_array_length(a) < 2", "'[1]'", "'[1,2]'"),
        ("a <> char(65)", "'B'", "'A'"),
        ("concat(a, 'x') = 'yx' AND concat_ws('-', a, 'x') = 'y-x'", "'y'", "'z'"),
        ("quote(a) = char(39) || 'y' || char(39)", "'y'", "'z'"),
        ("unhex(a) IS NOT NULL", "'00ff'", "'0'"),
        ("if(a = 'y', 1, 0)", "'y'", "'z'"),
    ];
    for (check, good, bad) in checks {
        let contract = parse(&format!("CREATE TABLE t (a TEXT PRIMARY KEY CHECK ({check})) STRICT"));
        let db = Connection::open_in_memory().unwrap();
        db.execute_batch("PRAGMA trusted_schema = OFF").unwrap();
        db.execute_batch(&contract.unwrap_or_else(|e| panic!("{check}: {e}")).ddl).unwrap();
        let insert = |value: &str| db.execute(&format!("INSERT INTO t VALUES ({value})"), []);
        insert(good).unwrap_or_else(|e| panic!("{check}: {e}"));
        assert!(insert(bad).unwrap_err().to_string().contains("CHECK constraint failed"), "{check}");
    }
    let formats = include_str!("../../../docs/FORMAT.md");
    for function in PURE_FUNCTIONS {
        assert!(formats.contains(&format!("`{function}`")), "docs/FORMAT.md names {function}");
    }
}

#[test]
fn no_clock_and_no_time_zone_judges_a_row() {
    for check in ["date() > a", "a < datetime('now')", "time(a, 'localtime') <> ''", "date(a, 'utc') <> ''"] {
        let ddl = format!("CREATE TABLE t (a TEXT PRIMARY KEY CHECK ({check})) STRICT");
        // Whether the contract is taken or not, no row ever is.
        let db = Connection::open_in_memory().unwrap();
        db.execute_batch(&ddl).unwrap();
        let e = db.execute("INSERT INTO t VALUES ('2026-01-06')", []).unwrap_err().to_string();
        assert!(e.contains("non-deterministic use of"), "{check}: {e}");
        parse(&ddl).unwrap();
    }
    assert!(parse("CREATE TABLE t (a TEXT PRIMARY KEY CHECK (a < current_timestamp)) STRICT").is_err());
}

#[test]
fn hostile_ddl_is_stopped_by_the_authorizer() {
    let table = "CREATE TABLE t (a TEXT PRIMARY KEY) STRICT;";
    for evil in [
        "ATTACH '/tmp/x' AS x",
        "PRAGMA writable_schema = ON",
        "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE VIRTUAL TABLE f USING fts5(a)",
        "INSERT INTO t VALUES ('x')",
        "DROP TABLE t",
        "SELECT load_extension('x')",
        "VACUUM INTO '/tmp/y'",
        "CREATE TABLE u AS SELECT 1",
        "CREATE TEMP TABLE w (a TEXT)",
        "DELETE FROM sqlite_master",
        "CREATE TABLE u (a TEXT PRIMARY KEY CHECK (random() > 0)) STRICT",
        "BEGIN",
        "CREATE TABLE u (a BLOB PRIMARY KEY DEFAULT (zeroblob(1000000000))) STRICT",
        "ALTER TABLE t RENAME TO u",
        "ANALYZE",
    ] {
        assert!(parse(&format!("{table}{evil};")).is_err(), "{evil}");
    }
    assert!(!std::path::Path::new("/tmp/y").exists());
}

#[test]
fn additive_changes_are_statements_and_others_are_told() {
    let old = parse(ITEM).unwrap();
    let new = parse("CREATE TABLE item (sku TEXT PRIMARY KEY, name TEXT NOT NULL CHECK (length(name) <= 100), plu INTEGER UNIQUE,\n price REAL, img BLOB, vat INTEGER NOT NULL DEFAULT 19, note TEXT) STRICT; CREATE INDEX item_name ON item (name); CREATE INDEX item_vat ON item (vat); CREATE TABLE brand (id INTEGER PRIMARY KEY) STRICT;").unwrap();
    let m = new.additive_since(&old).unwrap();
    assert_eq!(m.len(), 4, "{m:?}");
    assert!(m.contains(&"ALTER TABLE \"item\" ADD COLUMN vat INTEGER NOT NULL DEFAULT 19".to_owned()));
    assert_eq!(old.additive_since(&old).unwrap(), [""; 0]);
    for (change, why) in [
        (ITEM.replace("<= 100", "<= 200"), "definition of column name"),
        (ITEM.replace("price REAL, ", ""), "dropped, renamed or moved"),
        (ITEM.replace("plu INTEGER UNIQUE", "x TEXT, plu INTEGER UNIQUE"), "moved"),
        (ITEM.replace("CREATE INDEX item_name ON item (name);", ""), "index item_name"),
        (ITEM.replace("img BLOB", "img BLOB, z TEXT NOT NULL"), "without a DEFAULT"),
        (ITEM.replace("img BLOB", "img BLOB, z TEXT UNIQUE"), "SQLite refuses"),
        (ITEM.replace("item (sku", "items (sku").replace("ON item", "ON items"), "gone"),
        (ITEM.replace(") STRICT", ") STRICT, WITHOUT ROWID"), "options"),
        (ITEM.replace("img BLOB", "img BLOB, CHECK (price > 0)"), "table constraints"),
        (ITEM.replace("img BLOB", "img BLOB, vat INTEGER, UNIQUE (name, plu)"), "table constraints"),
    ] {
        let e = parse(&change).unwrap().additive_since(&old).unwrap_err().to_string();
        assert!(e.contains(why), "{change}: {e}");
    }
}

#[test]
fn a_migration_is_the_same_in_any_order_but_of_columns() {
    let of = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let ours = of(&[
        "ALTER TABLE \"a\" ADD COLUMN x TEXT",
        "ALTER TABLE \"a\" ADD COLUMN y TEXT",
        "CREATE INDEX a_x ON a (x)",
        "ALTER TABLE \"b\" ADD COLUMN z TEXT",
    ]);
    let theirs = [
        "create index a_x on a(x);",
        "alter table b add z TEXT",
        "alter table a add x TEXT;",
        "alter table a add y TEXT;",
    ];
    assert!(is_same_migration(&ours, &of(&theirs)));
    let turned = [theirs[0], theirs[1], theirs[3], theirs[2]];
    for other in [&turned[..], &theirs[..3], &[theirs[0], theirs[0], theirs[2], theirs[3]]] {
        assert!(!is_same_migration(&ours, &of(other)), "{other:?}");
    }
}

#[test]
fn two_streams_cannot_share_a_name() {
    let (a, b) = (
        parse(ITEM).unwrap(),
        parse("CREATE TABLE brand (a TEXT PRIMARY KEY) STRICT; CREATE INDEX item_NAME ON brand (a);").unwrap(),
    );
    let (s, t) = ("catalog".parse().unwrap(), "price".parse().unwrap());
    assert!(names_clash(&[(&s, &a), (&t, &b)]).unwrap().to_lowercase().contains("item_name"));
}

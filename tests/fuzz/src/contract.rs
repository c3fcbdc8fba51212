//! Contracts: SQL DDL from a file or a pack. The input is a contract, and after a line `---` an older one.

use proto::ids::TableName;
use proto::limits::Limits;
use proto::schema::{Contract, Table, sql};
use rusqlite::Connection;

pub fn contract(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let limits = Limits { tables: 8, columns: 32, ddl_bytes: 8192, ..Limits::default() };
    let (new, old) = crate::halves(text);
    let Ok(new) = Contract::parse(new, &limits) else { return };
    is_sound(&new, &limits);
    let Ok(old) = Contract::parse(old, &limits) else { return };
    assert_eq!(new.additive_since(&new).as_deref(), Ok(&[][..]), "nothing changes");
    let Ok(statements) = new.additive_since(&old) else { return };
    // What the check ran on empty tables holds on tables with rows, unless a row's value is to blame.
    let db = made(&old);
    old.tables.iter().for_each(|t| fill(&db, t));
    if statements.iter().all(|s| db.execute_batch(s).is_ok()) {
        let check: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert!(check == "ok" || check.contains("CHECK constraint") || check.contains("NULL value"), "{check}");
        for table in &new.tables {
            let names = format!("SELECT {} FROM {}", table.column_list(), table.quoted());
            assert_eq!(db.prepare(&names).unwrap().column_count(), table.columns.len());
        }
    }
}

/// The tables and indexes as a replica makes them: without the authorizer, so that what it let through shows.
fn made(contract: &Contract) -> Connection {
    let db = Connection::open_in_memory().unwrap();
    for table in &contract.tables {
        db.execute_batch(&table.create).unwrap_or_else(|e| panic!("{e}: {}", table.create));
        table
            .indexes
            .iter()
            .for_each(|(_, create)| db.execute_batch(create).unwrap_or_else(|e| panic!("{e}: {create}")));
    }
    db
}

fn is_sound(contract: &Contract, limits: &Limits) {
    assert!(!contract.tables.is_empty() && contract.tables.len() <= limits.tables);
    let names: Vec<&TableName> = contract.tables.iter().map(|t| &t.name).collect();
    assert!(names.is_sorted());
    let db = made(contract);
    let objects = "SELECT count(*) FROM sqlite_schema WHERE type NOT IN ('table', 'index')";
    assert_eq!(db.query_row(objects, [], |r| r.get::<_, i64>(0)), Ok(0), "tables and indexes, nothing else");
    let text: String = contract
        .tables
        .iter()
        .flat_map(|t| std::iter::once(&t.create).chain(t.indexes.iter().map(|i| &i.1)).map(|s| format!("{s};\n")))
        .collect();
    // A parent may stand after its child: references are read as they are.
    match Contract::parse(&text, &Limits { ddl_bytes: 1 << 20, ..limits.clone() }) {
        Ok(again) => assert_eq!(again.tables, contract.tables, "its own statements make another contract"),
        Err(e) => panic!("its own statements are refused: {e}: {text}"),
    }
    for table in &contract.tables {
        assert!(!table.columns.is_empty() && table.columns.len() <= limits.columns);
        assert!(!table.key.is_empty() && table.key.iter().all(|k| *k < table.columns.len()));
        assert!(table.key.iter().all(|k| table.columns[*k].not_null));
        let tokens = sql::tokens(&table.create);
        assert!(tokens.windows(2).all(|w| w[0].start + w[0].text.len() <= w[1].start));
        assert!(sql::definitions(&table.create).0.len() >= table.columns.len());
        keys_tell_rows_apart(&db, table);
    }
}

/// A statement by key meets one row, as packs and diffs need it: keys compare by bytes.
fn keys_tell_rows_apart(db: &Connection, table: &Table) {
    let [key] = table.key[..] else { return };
    if table.columns[key].ty != proto::value::ColumnType::Text {
        return;
    }
    let (name, quoted) = (&table.columns[key].name, table.quoted());
    for value in ["a", "A", "a "] {
        let _ = db.execute(&format!("INSERT INTO {quoted} (\"{name}\") VALUES (?1)"), [value]);
    }
    let count = format!("SELECT count(*) FROM {quoted} WHERE \"{name}\" = ?1");
    for value in ["a", "A", "a "] {
        assert!(db.query_row(&count, [value], |r| r.get::<_, i64>(0)).unwrap() <= 1, "{value:?} in {quoted}");
    }
}

/// Some rows, where constraints let them in.
fn fill(db: &Connection, table: &Table) {
    for n in 0..3 {
        let values: Vec<String> = table
            .columns
            .iter()
            .map(|c| match c.ty {
                proto::value::ColumnType::Text => format!("'v{n}'"),
                proto::value::ColumnType::Blob => format!("x'0{n}'"),
                _ => n.to_string(),
            })
            .collect();
        let sql = format!("INSERT INTO {} ({}) VALUES ({})", table.quoted(), table.column_list(), values.join(", "));
        let _ = db.execute(&sql, []);
    }
}

//! The state digest, written from docs/FORMAT.md alone: it shares no code with the product, so that a mistake
//! there is not repeated here.

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// The canonical bytes of one value.
fn canonical(value: ValueRef<'_>, out: &mut Vec<u8>) {
    match value {
        ValueRef::Null => out.extend(b"N"),
        ValueRef::Integer(i) => out.extend([&b"I"[..], &i.to_be_bytes()].concat()),
        ValueRef::Real(r) => out.extend([&b"R"[..], &r.to_bits().to_be_bytes()].concat()),
        ValueRef::Text(t) => out.extend([&b"T"[..], &u32::try_from(t.len()).unwrap().to_be_bytes(), t].concat()),
        ValueRef::Blob(b) => out.extend([&b"B"[..], &u32::try_from(b.len()).unwrap().to_be_bytes(), b].concat()),
    }
}

/// The digest of what a query returns, a row a row: name the table's columns in the contract's order.
pub fn of_query(db: &Connection, sql: &str) -> String {
    let mut statement = db.prepare(sql).unwrap_or_else(|e| panic!("{sql}: {e}"));
    let columns = statement.column_count();
    let mut rows = statement.query([]).unwrap();
    let (mut sum, mut row_bytes) = (0u128, Vec::new());
    while let Some(row) = rows.next().unwrap() {
        row_bytes.clear();
        (0..columns).for_each(|i| canonical(row.get_ref(i).unwrap(), &mut row_bytes));
        let hash = Sha256::digest(&row_bytes);
        sum = sum.wrapping_add(hash[..16].iter().fold(0, |n, byte| n << 8 | u128::from(*byte)));
    }
    format!("{sum:032x}")
}

/// The digest of a table with its columns in the order in which the DDL names them.
pub fn of_table(db: &Connection, table: &str) -> String {
    let mut statement = db.prepare("SELECT name FROM pragma_table_info(?1) ORDER BY cid").unwrap();
    let names = statement.query_map([table], |r| r.get::<_, String>(0)).unwrap();
    let columns: Vec<String> = names.map(|n| format!("\"{}\"", n.unwrap())).collect();
    assert!(!columns.is_empty(), "there is no table {table}");
    of_query(db, &format!("SELECT {} FROM \"{table}\"", columns.join(", ")))
}

/// The digests of all of a database's tables but the product's own (`tillcast_…`) and SQLite's.
pub fn of_database(path: &Path) -> BTreeMap<String, String> {
    let db = open_read_only(path);
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'tillcast\\_%' ESCAPE '\\' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'";
    let mut statement = db.prepare(sql).unwrap();
    let names: Vec<String> = statement.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    names.into_iter().map(|t| (of_table(&db, &t), t)).map(|(d, t)| (t, d)).collect()
}

/// Opens a database as a POS application does: for reading, with a busy timeout.
pub fn open_read_only(path: &Path) -> Connection {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    db.busy_timeout(std::time::Duration::from_secs(5)).unwrap();
    db
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer_and_order_does_not_matter() {
        let db = Connection::open_in_memory().unwrap();
        db.execute_batch(
            "CREATE TABLE t (a INTEGER, b TEXT, c REAL) STRICT; CREATE TABLE u (a INTEGER, b TEXT, c REAL) STRICT;",
        )
        .unwrap();
        assert_eq!(of_table(&db, "t"), "0".repeat(32));
        db.execute_batch("INSERT INTO t VALUES (7, 'ab', NULL)").unwrap();
        // hashlib.sha256(b'I'+(7).to_bytes(8,'big')+b'T'+(2).to_bytes(4,'big')+b'ab'+b'N').hexdigest()[:32]
        assert_eq!(of_table(&db, "t"), "4d972ed3b5b06da2c912fe3b1e280d43");
        db.execute_batch("INSERT INTO t VALUES (8, '', 1.5); INSERT INTO u VALUES (8, '', 1.5), (7, 'ab', NULL)")
            .unwrap();
        assert_eq!(of_table(&db, "t"), of_table(&db, "u"));
    }
}

//! A SQLite file of its own for one instance's new rows. Loading it *is* the validation of rows:
//! the contract's own constraints decide, and what they refuse is explained in people's words.
//!
//! Owns `state.dir/scratch`. Must never hold anything that is needed again: no journal, no sync;
//! after a power cut the file is garbage and is thrown away.

use crate::source::{Faults, RowFault, RowSink, SinkError, key_for_people};
use proto::ids::TableName;
use proto::limits::Limits;
use proto::replica::sqlite::{self, is_refused_value};
use proto::schema::{Column, Contract, Table, quoted_list, sql};
use proto::shelf;
use proto::value::Value;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Statement, ffi};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The scratch database failed: the disk, never a row.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// SQLite.
    #[error("the scratch database {path}: {source}")]
    Sqlite {
        /// Which.
        path: String,
        /// What it said.
        source: rusqlite::Error,
    },
    /// Its file.
    #[error("{0}")]
    Shelf(#[from] shelf::ShelfError),
    /// Where the rows went.
    #[error("{0}")]
    Sink(#[from] SinkError),
}

/// Tables with rows that refer to none, by those that they refer to.
pub type Missed = BTreeMap<TableName, BTreeSet<TableName>>;

/// New rows under their contract, until it is dropped.
#[derive(Debug)]
pub struct Scratch {
    db: Connection,
    path: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left-overs are deleted by the next run too.
        if let Err(e) = shelf::remove(&self.path) {
            tracing::debug!(path = %self.path.display(), error = %e, "a scratch file stays for now");
        }
    }
}

impl Scratch {
    /// Makes the contract's tables in a new file.
    pub fn create(path: &Path, contract: &Contract) -> Result<Scratch, ScratchError> {
        shelf::remove(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let failed = |source| ScratchError::Sqlite { path: path.display().to_string(), source };
        let scratch = Scratch { db: Connection::open_with_flags(path, flags).map_err(failed)?, path: path.to_owned() };
        sqlite::sort_beside(&scratch.db, path);
        // The journal in memory holds nothing here: every page is new in the one transaction.
        scratch
            .db
            .execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF;
                 PRAGMA trusted_schema = OFF; PRAGMA foreign_keys = OFF; PRAGMA cache_size = -49152; BEGIN;",
            )
            .map_err(failed)?;
        for table in &contract.tables {
            scratch.db.execute_batch(&table.create).map_err(failed)?;
            // Other indexes prove nothing about rows.
            for (_, create) in table.indexes.iter().filter(|(_, create)| is_unique(create) || has_functions(create)) {
                scratch.db.execute_batch(create).map_err(failed)?;
            }
        }
        Ok(scratch)
    }

    /// The rows.
    pub fn connection(&self) -> &Connection {
        &self.db
    }

    fn failed(&self, source: rusqlite::Error) -> ScratchError {
        ScratchError::Sqlite { path: self.path.display().to_string(), source }
    }

    /// Takes the rows of one table.
    pub fn loader<'s>(
        &'s self,
        table: &'s Table,
        limits: &Limits,
        faults: &'s mut Faults,
    ) -> Result<Loader<'s>, ScratchError> {
        let places: Vec<String> = (1..=table.columns.len()).map(|n| format!("?{n}")).collect();
        let insert = format!("INSERT INTO {} ({}) VALUES ({})", table.quoted(), table.column_list(), places.join(", "));
        let insert = self.db.prepare(&insert).map_err(|e| self.failed(e))?;
        Ok(Loader { scratch: self, table, insert, limits: limits.clone(), faults, rows: 0 })
    }

    /// Copies a table's rows from a replica: a table that no drop came for keeps its content. Columns that the replica
    /// does not have yet get their defaults, those that the contract only drops are left out. Gives why the contract does
    /// not take the rows, if it does not.
    pub fn copy(&self, table: &Table, from: &Connection, had: &Table) -> Result<Option<String>, ScratchError> {
        let is_new = |c: &&Column| had.column(c.name.as_str()).is_none();
        // SQLite would number the rows by itself.
        if let Some(c) = table.key.iter().map(|k| &table.columns[*k]).find(is_new) {
            return Ok(Some(format!("column {} of the key is new", c.name)));
        }
        // It may be one column that was renamed: only their owner knows.
        let gone = had.columns.iter().find(|c| table.column(c.name.as_str()).is_none());
        if let (Some(gone), Some(new)) = (gone, table.columns.iter().find(is_new)) {
            return Ok(Some(format!("column {} is gone and {} is new", gone.name, new.name)));
        }
        let columns: Vec<&Column> = table.columns.iter().filter(|c| !is_new(c)).collect();
        let list = quoted_list(columns.iter().map(|c| &c.name));
        let places: Vec<String> = (1..=columns.len()).map(|n| format!("?{n}")).collect();
        let run = || -> rusqlite::Result<Option<String>> {
            let mut read = from.prepare(&format!("SELECT {list} FROM {}", had.quoted()))?;
            let mut insert =
                self.db.prepare(&format!("INSERT INTO {} ({list}) VALUES ({})", table.quoted(), places.join(", ")))?;
            let mut rows = read.query([])?;
            while let Some(row) = rows.next()? {
                let told = |problem: String| {
                    let value = |k: usize| {
                        let at = columns.iter().position(|c| c.name == table.columns[k].name)?;
                        row.get_ref(at).ok().map(Value::from)
                    };
                    Ok(Some(format!("key {}: {problem}", key_for_people(table, value))))
                };
                for (i, column) in columns.iter().enumerate() {
                    let value = Value::from(row.get_ref(i)?);
                    if let Some(problem) = misfit(&value, column) {
                        return told(format!("column {} {problem}", column.name));
                    }
                    insert.raw_bind_parameter(i + 1, value)?;
                }
                match insert.raw_execute() {
                    Ok(_) => {}
                    Err(e) if is_refused_row(&e) => return told(e.to_string()),
                    Err(e) => return Err(e),
                }
            }
            Ok(None)
        };
        run().map_err(|e| self.failed(e))
    }

    /// Finds rows whose foreign keys lead nowhere; to be asked when all tables are loaded. Gives the tables that have such
    /// rows, each with those that the rows miss.
    pub fn check_references(&self, contract: &Contract, faults: &mut Faults) -> Result<Missed, ScratchError> {
        let mut missed = Missed::new();
        for table in contract.tables.iter().filter(|t| t.has_foreign_keys) {
            let parents = self.broken_references(contract, table, faults).map_err(|e| self.failed(e))?;
            if !parents.is_empty() {
                missed.insert(table.name.clone(), parents);
            }
        }
        Ok(missed)
    }

    /// One fault a row, whatever number of its references lead nowhere; the tables that they lead to.
    fn broken_references(
        &self,
        contract: &Contract,
        table: &Table,
        faults: &mut Faults,
    ) -> rusqlite::Result<BTreeSet<TableName>> {
        let mut check = self.db.prepare(&format!("PRAGMA foreign_key_check({})", table.quoted()))?;
        let broken: BTreeSet<i64> = check.query_map([], |r| r.get(3))?.collect::<Result<_, _>>()?;
        if broken.is_empty() {
            return Ok(BTreeSet::new());
        }
        // The check names no row of a table WITHOUT ROWID, nor any value: both are asked for.
        let references = self.references(contract, table, &broken)?;
        let conditions: Vec<String> = references.iter().map(Reference::leads_nowhere).collect();
        let mut find = self.db.prepare(&format!(
            "SELECT {}, {} FROM {} AS child WHERE {}",
            table.column_list(),
            conditions.join(", "),
            table.quoted(),
            conditions.join(" OR ")
        ))?;
        let mut rows = find.query([])?;
        let before = faults.count;
        while let Some(row) = rows.next()? {
            let value = |column: usize| row.get_ref(column).ok().map(Value::from);
            let mut problems = Vec::new();
            for (n, reference) in references.iter().enumerate() {
                if row.get(table.columns.len() + n)? {
                    problems.push(reference.problem(table, value));
                }
            }
            let (key, problem) = (key_for_people(table, value), problems.join("; "));
            faults.push(RowFault { table: table.name.clone(), line: None, key, column: None, problem });
        }
        if faults.count == before {
            // Whatever they are: what the check has found is never published.
            let parents: Vec<&str> = references.iter().map(|r| r.parent.as_str()).collect();
            let problem = format!("rows refer to rows of table {} that are not there", parents.join(", "));
            faults.push(RowFault { table: table.name.clone(), line: None, key: String::new(), column: None, problem });
        }
        Ok(references.into_iter().map(|r| r.parent).collect())
    }

    /// Some foreign keys of a table, named by the numbers that SQLite gives them, as the contract has them.
    fn references(
        &self,
        contract: &Contract,
        table: &Table,
        wanted: &BTreeSet<i64>,
    ) -> rusqlite::Result<Vec<Reference>> {
        let mut list = self
            .db
            .prepare("SELECT id, \"table\", \"from\", \"to\" FROM pragma_foreign_key_list(?1) ORDER BY id, seq")?;
        let mut rows = list.query([table.name.as_str()])?;
        let mut references: BTreeMap<i64, Reference> = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let (id, parent, from): (i64, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let to: Option<String> = row.get(3)?;
            let parent = contract.tables.iter().find(|t| t.name.as_str().eq_ignore_ascii_case(&parent));
            let Some(parent) = parent.filter(|_| wanted.contains(&id)) else { continue };
            let new = || Reference { parent: parent.name.clone(), columns: Vec::new() };
            let one = references.entry(id).or_insert_with(new);
            // Where none is named, the parent's key is meant.
            let key = || Some(parent.columns[*parent.key.get(one.columns.len())?].name.to_string());
            let Some(to) = to.or_else(key) else { continue };
            one.columns.push((from, to));
        }
        // SQLite counts from the last one.
        Ok(references.into_values().rev().collect())
    }

    /// Ends the loading; rows can be read.
    pub fn finish(&self) -> Result<(), ScratchError> {
        self.db.execute_batch("COMMIT").map_err(|e| self.failed(e))
    }
}

/// A foreign key: the table referred to, and each column that refers with the one referred to.
struct Reference {
    parent: TableName,
    columns: Vec<(String, String)>,
}

impl Reference {
    /// SQL: whether a row of `child` refers to none. The plus takes the child's affinity away: the parent's decides, as in
    /// SQLite's own check.
    fn leads_nowhere(&self) -> String {
        let are_set: Vec<String> = self.columns.iter().map(|(from, _)| format!("child.\"{from}\" NOT NULL")).collect();
        let are_equal: Vec<String> =
            self.columns.iter().map(|(from, to)| format!("parent.\"{to}\" = +child.\"{from}\"")).collect();
        format!(
            "({} AND NOT EXISTS (SELECT 1 FROM \"{}\" AS parent WHERE {}))",
            are_set.join(" AND "),
            self.parent,
            are_equal.join(" AND ")
        )
    }

    /// The columns that refer, with the values that are missing.
    fn problem<'v>(&self, table: &Table, value: impl Fn(usize) -> Option<Value<'v>>) -> String {
        let told = |(from, _): &(String, String)| {
            let value = table.column(from).and_then(&value);
            format!("{from}={}", value.map_or_else(|| "?".to_owned(), |v| v.for_people()))
        };
        let columns: Vec<String> = self.columns.iter().map(told).collect();
        format!("refers by {} to a row of table {} that is not there", columns.join(" "), self.parent)
    }
}

fn is_unique(create: &str) -> bool {
    sql::tokens(create).get(1).is_some_and(|t| t.is("UNIQUE"))
}

/// Whether values are handed to functions, which may not take them: `->` and `->>` are functions too.
fn has_functions(create: &str) -> bool {
    let tokens = sql::tokens(create);
    tokens.iter().filter(|t| t.text == "(").count() > 1 || tokens.iter().any(|t| t.text.starts_with("->"))
}

/// What a value that its column cannot have is, for people.
fn misfit(value: &Value<'_>, column: &Column) -> Option<String> {
    if *value == Value::Null && column.not_null {
        return Some("is NULL, the contract says NOT NULL".to_owned());
    }
    (!value.fits(column.ty)).then(|| format!("is {}, the contract has {}", value.for_people(), column.ty))
}

/// Whether a row was refused: by a constraint, or by a function that does not take a value of it.
fn is_refused_row(e: &rusqlite::Error) -> bool {
    e.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) || is_refused_value(e)
}

/// Inserts rows as they come; refused ones are explained and counted.
pub struct Loader<'s> {
    scratch: &'s Scratch,
    table: &'s Table,
    insert: Statement<'s>,
    limits: Limits,
    faults: &'s mut Faults,
    rows: u64,
}

impl Loader<'_> {
    /// Good rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    fn insert(&mut self, row: &[Value<'_>]) -> rusqlite::Result<()> {
        for (i, v) in row.iter().enumerate() {
            self.insert.raw_bind_parameter(i + 1, v)?;
        }
        self.insert.raw_execute().map(|_| ())
    }

    fn tell(&mut self, row: &[Value<'_>], line: Option<u64>, column: Option<usize>, problem: String) {
        self.faults.push(RowFault {
            table: self.table.name.clone(),
            line,
            key: key_for_people(self.table, |k| row.get(k).cloned()),
            column: column.map(|c| self.table.columns[c].name.clone()),
            problem,
        });
    }

    /// A row that no reader would take: its line in a pack would be too long.
    fn too_long(&self, row: &[Value<'_>]) -> Option<String> {
        let raw: usize = row
            .iter()
            .map(|v| match v {
                Value::Text(t) => t.len(),
                Value::Blob(b) => b.len() / 3 * 4,
                _ => 0,
            })
            .sum();
        // A character takes at most 6 bytes in JSON.
        if (raw as u64).saturating_mul(6) < self.limits.line_bytes {
            return None;
        }
        let mut line = Vec::new();
        proto::value::write_row(row, &mut line).ok()?;
        let (found, limit) = (line.len() as u64, self.limits.line_bytes);
        (found > limit).then(|| format!("the row has {found} bytes as JSON, over limits.line_bytes = {limit}"))
    }

    /// What a constraint had against a row.
    fn explain(&self, row: &[Value<'_>], e: &rusqlite::Error) -> (Option<usize>, String) {
        if let Some(found) = self.column_problem(row) {
            return found;
        }
        let code = e.sqlite_error().map_or(0, |e| e.extended_code);
        let text = match e {
            rusqlite::Error::SqliteFailure(_, Some(text)) => text.clone(),
            other => other.to_string(),
        };
        match code {
            ffi::SQLITE_CONSTRAINT_PRIMARYKEY | ffi::SQLITE_CONSTRAINT_ROWID => {
                (None, "the key is there twice".to_owned())
            }
            // Another column's may be met first.
            ffi::SQLITE_CONSTRAINT_UNIQUE if self.equal(row, &self.table.key).is_some() => {
                (None, "the key is there twice".to_owned())
            }
            ffi::SQLITE_CONSTRAINT_UNIQUE => self.duplicate(row, &text),
            ffi::SQLITE_CONSTRAINT_CHECK => {
                let rule = text.strip_prefix("CHECK constraint failed: ").unwrap_or(&text);
                self.too_long_for(row, rule).unwrap_or_else(|| self.broken_check(row, rule))
            }
            _ => (None, text),
        }
    }

    /// A column whose value alone breaks the contract.
    fn column_problem(&self, row: &[Value<'_>]) -> Option<(Option<usize>, String)> {
        let mut columns = row.iter().zip(&self.table.columns).enumerate();
        columns.find_map(|(i, (v, c))| Some((Some(i), misfit(v, c)?)))
    }

    /// A value that is longer than a broken CHECK lets it be.
    fn too_long_for(&self, row: &[Value<'_>], rule: &str) -> Option<(Option<usize>, String)> {
        // Of one that has a name, that is all that SQLite tells.
        let is_name = sql::tokens(rule).len() == 1;
        row.iter().zip(&self.table.columns).enumerate().find_map(|(i, (v, c))| {
            let (length, unit) = match v {
                Value::Text(t) => (t.chars().count() as u64, "characters"),
                Value::Blob(b) => (b.len() as u64, "bytes"),
                _ => return None,
            };
            let limit = if is_name { c.max_length } else { sql::length_limit(rule, c.name.as_str()) };
            let limit = limit.filter(|limit| length > *limit)?;
            Some((Some(i), format!("has {length} {unit}, the limit is {limit}: {}", v.for_people())))
        })
    }

    /// A UNIQUE that another row was first to: both keys are named.
    fn duplicate(&self, row: &[Value<'_>], text: &str) -> (Option<usize>, String) {
        let table = self.table;
        let prefix = format!("{}.", table.name);
        let names = text.rsplit(": ").next().unwrap_or("").split(", ");
        let columns: Vec<usize> = names.filter_map(|n| table.column(n.strip_prefix(&prefix).unwrap_or(n))).collect();
        if columns.is_empty() {
            return (None, text.to_owned());
        }
        let values: Vec<String> = columns.iter().map(|c| row[*c].for_people()).collect();
        let other = self.equal(row, &columns);
        let other = other.map_or_else(|| "another row".to_owned(), |key| format!("the row with key {key}"));
        let more: Vec<String> = columns[1..].iter().map(|c| table.columns[*c].name.to_string()).collect();
        let with = if more.is_empty() { String::new() } else { format!(" (with {})", more.join(", ")) };
        (Some(columns[0]), format!("is {}{with}, which must be unique, and is in {other} too", values.join(", ")))
    }

    /// The key, for people, of a row that has the same values in some columns.
    fn equal(&self, row: &[Value<'_>], columns: &[usize]) -> Option<String> {
        let table = self.table;
        let conditions: Vec<String> =
            columns.iter().enumerate().map(|(n, c)| format!("\"{}\" = ?{}", table.columns[*c].name, n + 1)).collect();
        let find = format!("SELECT {} FROM {} WHERE {}", table.key_list(), table.quoted(), conditions.join(" AND "));
        let values = rusqlite::params_from_iter(columns.iter().map(|c| &row[*c]));
        let found = self.scratch.db.query_row(&find, values, |r| {
            let at = |k: usize| {
                let i = table.key.iter().position(|c| *c == k)?;
                r.get_ref(i).ok().map(|v| Value::from(v).into_owned())
            };
            Ok(key_for_people(table, at))
        });
        found.ok()
    }

    /// A CHECK, quoted; where it speaks of one column only, that column's value is told.
    fn broken_check(&self, row: &[Value<'_>], rule: &str) -> (Option<usize>, String) {
        let words = sql::tokens(rule);
        let mut named = (0..self.table.columns.len()).filter(|i| {
            let name = self.table.columns[*i].name.as_str();
            words.iter().any(|t| t.is(name))
        });
        match (named.next(), named.next()) {
            (Some(i), None) => (Some(i), format!("is {}, which breaks CHECK ({rule})", row[i].for_people())),
            _ => (None, format!("the row breaks CHECK ({rule})")),
        }
    }
}

impl RowSink for Loader<'_> {
    fn row(&mut self, row: &[Value<'_>], line: Option<u64>) -> Result<(), SinkError> {
        // SQLite would give a NULL in an INTEGER PRIMARY KEY a number of its own choice.
        if let Some(k) = self.table.key.iter().find(|k| row[**k] == Value::Null) {
            self.tell(row, line, Some(*k), "is NULL; a key's columns never are".to_owned());
            return Ok(());
        }
        if let Some(problem) = self.too_long(row) {
            self.tell(row, line, None, problem);
            return Ok(());
        }
        match self.insert(row) {
            Ok(()) => {
                self.rows += 1;
                if self.rows > self.limits.rows {
                    return Err(SinkError::TooMany(format!(
                        "table {}: more than limits.rows = {}",
                        self.table.name, self.limits.rows
                    )));
                }
                Ok(())
            }
            Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) => {
                let (column, problem) = self.explain(row, &e);
                self.tell(row, line, column, problem);
                Ok(())
            }
            Err(e) if is_refused_value(&e) => {
                self.tell(row, line, None, format!("the contract cannot judge the row: {e}"));
                Ok(())
            }
            Err(e) => Err(SinkError::Failed(self.scratch.failed(e).to_string())),
        }
    }

    fn fault(&mut self, fault: RowFault) -> Result<(), SinkError> {
        self.faults.push(fault);
        Ok(())
    }
}

/// Compares two stored values by SQLite's order under BINARY collation.
pub fn order(a: ValueRef<'_>, b: ValueRef<'_>) -> std::cmp::Ordering {
    use std::cmp::Ordering;
    fn class(v: &ValueRef<'_>) -> u8 {
        match v {
            ValueRef::Null => 0,
            ValueRef::Integer(_) | ValueRef::Real(_) => 1,
            ValueRef::Text(_) => 2,
            ValueRef::Blob(_) => 3,
        }
    }
    match (a, b) {
        (ValueRef::Integer(a), ValueRef::Integer(b)) => a.cmp(&b),
        (ValueRef::Real(a), ValueRef::Real(b)) => a.total_cmp(&b),
        (ValueRef::Text(a), ValueRef::Text(b)) | (ValueRef::Blob(a), ValueRef::Blob(b)) => a.cmp(b),
        (a, b) => match class(&a).cmp(&class(&b)) {
            // An integer against a real: keys are of one type, so that this is a change of type.
            Ordering::Equal => matches!(a, ValueRef::Real(_)).cmp(&matches!(b, ValueRef::Real(_))),
            other => other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DDL: &str = "
        CREATE TABLE item (
            sku TEXT PRIMARY KEY, name TEXT NOT NULL CHECK (length(name) <= 100), plu INTEGER UNIQUE,
            cents INTEGER CHECK (cents >= 0), low INTEGER, high INTEGER, pic BLOB, CHECK (low <= high)) STRICT;
        CREATE TABLE number (id INTEGER PRIMARY KEY, sku TEXT REFERENCES item (sku)) STRICT;
        CREATE UNIQUE INDEX item_range ON item (low, high);
        CREATE INDEX item_name ON item (name);";

    fn text(t: &str) -> Value<'static> {
        Value::Text(t.to_owned().into())
    }
    fn item(sku: &str, name: &str) -> Vec<Value<'static>> {
        vec![text(sku), text(name), Value::Null, Value::Null, Value::Null, Value::Null, Value::Null]
    }
    fn with(mut row: Vec<Value<'static>>, column: usize, value: Value<'static>) -> Vec<Value<'static>> {
        row[column] = value;
        row
    }

    fn load(rows: &[(&str, Vec<Value<'static>>)], limits: &Limits) -> (u64, Vec<String>, u64) {
        load_under(DDL, rows, limits)
    }

    fn load_under(ddl: &str, rows: &[(&str, Vec<Value<'static>>)], limits: &Limits) -> (u64, Vec<String>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let contract = Contract::parse(ddl, &Limits::default()).unwrap();
        let path = dir.path().join("s.db");
        let scratch = Scratch::create(&path, &contract).unwrap();
        let mut faults = Faults::telling(20);
        let mut good = 0;
        for table in &contract.tables {
            let mut loader = scratch.loader(table, limits, &mut faults).unwrap();
            for (_, row) in rows.iter().filter(|(t, _)| *t == table.name.as_str()) {
                loader.row(row, None).unwrap();
            }
            good += loader.rows();
        }
        scratch.check_references(&contract, &mut faults).unwrap();
        scratch.finish().unwrap();
        drop(scratch);
        assert!(!path.exists());
        (good, faults.first.iter().map(ToString::to_string).collect(), faults.count)
    }

    #[test]
    fn bad_rows_are_told_with_key_column_value_and_limit() {
        let long = "Very long name ".repeat(7)[..101].to_owned();
        for (row, want) in [
            (
                item("123", &long),
                "table item, key sku=\"123\": column name has 101 characters, the limit is 100: \"Very long name Very long name Very long name Very long name \"…",
            ),
            (
                with(item("1", "x"), 1, Value::Null),
                "table item, key sku=\"1\": column name is NULL, the contract says NOT NULL",
            ),
            (
                with(item("1", "x"), 0, Value::Null),
                "table item, key sku=NULL: column sku is NULL; a key's columns never are",
            ),
            (
                with(item("1", "x"), 3, Value::Int(-5)),
                "table item, key sku=\"1\": column cents is -5, which breaks CHECK (cents >= 0)",
            ),
            (
                with(with(item("1", "x"), 4, Value::Int(2)), 5, Value::Int(1)),
                "table item, key sku=\"1\": the row breaks CHECK (low <= high)",
            ),
            (
                with(item("1", "x"), 2, text("seven")),
                "table item, key sku=\"1\": column plu is \"seven\", the contract has INTEGER",
            ),
            (item("0", "again"), "table item, key sku=\"0\": the key is there twice"),
            (with(item("0", "again"), 2, Value::Int(7)), "table item, key sku=\"0\": the key is there twice"),
            (
                with(item("1", "x"), 2, Value::Int(7)),
                "table item, key sku=\"1\": column plu is 7, which must be unique, and is in the row with key sku=\"0\" too",
            ),
            (
                with(with(item("1", "x"), 4, Value::Int(1)), 5, Value::Int(9)),
                "table item, key sku=\"1\": column low is 1, 9 (with high), which must be unique, and is in the row with key sku=\"0\" too",
            ),
        ] {
            let first = with(with(with(item("0", "first"), 2, Value::Int(7)), 4, Value::Int(1)), 5, Value::Int(9));
            let (good, told, count) =
                load(&[("item", first), ("item", row), ("item", item("last", "fine"))], &Limits::default());
            assert_eq!((good, count), (2, 1), "{told:?}");
            assert_eq!(told, [want]);
        }
    }

    #[test]
    fn a_length_is_blamed_only_by_the_check_that_limits_it() {
        let ddl = "CREATE TABLE t (
            a TEXT PRIMARY KEY, plu INTEGER UNIQUE, kind TEXT, name TEXT CHECK (name <> 'of long ago'), note TEXT,
            CHECK (kind = 'long' OR length(name) <= 5), CONSTRAINT short CHECK (length(note) <= 3)) STRICT;";
        let row = |key: &str, plu, kind: &str, name: &str, note: &str| {
            ("t", vec![text(key), Value::Int(plu), text(kind), text(name), text(note)])
        };
        let rows = [
            row("1", 7, "long", "Long enough", "x"),
            row("2", 7, "long", "Long enough", "x"),
            row("3", 8, "long", "of long ago", "x"),
            row("4", 9, "", "Too long", "x"),
            row("5", 10, "", "Fits", "long"),
        ];
        let (good, told, _) = load_under(ddl, &rows, &Limits::default());
        assert_eq!(good, 1);
        assert_eq!(
            told,
            [
                "table t, key a=\"2\": column plu is 7, which must be unique, and is in the row with key a=\"1\" too",
                "table t, key a=\"3\": column name is \"of long ago\", which breaks CHECK (name <> 'of long ago')",
                "table t, key a=\"4\": column name has 8 characters, the limit is 5: \"Too long\"",
                "table t, key a=\"5\": column note has 4 characters, the limit is 3: \"long\"",
            ]
        );
    }

    #[test]
    fn a_value_that_a_check_cannot_take_is_the_rows_fault() {
        let day = "2026-01-06";
        let row = |key: &str, j: &str, d: &str| ("t", vec![text(key), text(j), text(d)]);
        let rows = [row("1", "{\"x\":1}", day), row("2", "{x", day), row("3", "{}", "now"), row("4", "[]", day)];
        let mut told = Vec::new();
        for (check, index) in [
            ("CHECK (j ->> 'x' IS NOT 2), d TEXT CHECK (date(d) IS d)", ""),
            (", d TEXT", "CREATE INDEX i ON t (j ->> 'x', date(d));"),
            (", d TEXT", "CREATE INDEX i ON t (date(d)); CREATE INDEX k ON t (a) WHERE j -> 'x' = 1;"),
        ] {
            let ddl = format!("CREATE TABLE t (a TEXT PRIMARY KEY, j TEXT {check}) STRICT; {index}");
            let (good, faults, count) = load_under(&ddl, &rows, &Limits::default());
            assert_eq!((good, count), (2, 2), "{ddl}: {faults:?}");
            told = faults;
        }
        assert_eq!(told[0], "table t, key a=\"2\": the contract cannot judge the row: malformed JSON");
        assert!(told[1].contains("key a=\"3\"") && told[1].contains("non-deterministic use of date()"), "{}", told[1]);
    }

    #[test]
    fn a_null_integer_key_gets_no_number_and_references_lead_somewhere() {
        let rows = [
            ("item", item("a", "x")),
            ("number", vec![Value::Null, text("a")]),
            ("number", vec![Value::Int(4), text("a")]),
            ("number", vec![Value::Int(5), text("gone")]),
        ];
        let (good, told, _) = load(&rows, &Limits::default());
        assert_eq!(good, 3);
        assert_eq!(
            told,
            [
                "table number, key id=NULL: column id is NULL; a key's columns never are",
                "table number, key id=5: refers by sku=\"gone\" to a row of table item that is not there",
            ]
        );
    }

    #[test]
    fn references_that_lead_nowhere_are_told_row_by_row_with_columns_and_values() {
        const REFERENCES: &str = "
            CREATE TABLE item (sku TEXT PRIMARY KEY, plu INTEGER UNIQUE) STRICT;
            CREATE TABLE box (a INTEGER, b TEXT, PRIMARY KEY (a, b)) STRICT, WITHOUT ROWID;
            CREATE TABLE line (
                store TEXT, no INTEGER, sku TEXT REFERENCES Item, plu TEXT REFERENCES item (PLU), a INTEGER, b TEXT, up INTEGER UNIQUE
                REFERENCES line (up), PRIMARY KEY (store, no), FOREIGN KEY (a, b) REFERENCES box) STRICT, WITHOUT ROWID;
            CREATE TABLE note (id TEXT PRIMARY KEY, x TEXT REFERENCES item, y TEXT REFERENCES item) STRICT;";
        let line = |no, sku: Option<&str>, plu: Option<&str>, a: Option<i64>| {
            let null = Value::Null;
            let (sku, plu) = (sku.map_or(null.clone(), text), plu.map_or(null.clone(), text));
            let row =
                vec![text("0421"), Value::Int(no), sku, plu, a.map_or(null, Value::Int), text("x"), Value::Int(no)];
            ("line", row)
        };
        let rows = [
            ("item", vec![text("a"), Value::Int(7)]),
            ("box", vec![Value::Int(1), text("x")]),
            // The parent's type decides: the text is the number.
            line(1, Some("a"), Some("7"), Some(1)),
            line(2, Some("gone"), Some("8"), Some(1)),
            line(3, None, None, Some(2)),
            line(4, None, None, None),
            ("note", vec![text("n"), text("u"), text("u")]),
        ];
        let (good, told, count) = load_under(REFERENCES, &rows, &Limits::default());
        assert_eq!((good, count), (7, 3), "{told:?}");
        let nowhere = |by: &str, to: &str| format!("refers by {by} to a row of table {to} that is not there");
        let line = |no, text: String| format!("table line, key store=\"0421\" no={no}: {text}");
        let two = [nowhere("sku=\"gone\"", "item"), nowhere("plu=\"8\"", "item")];
        let note = [nowhere("x=\"u\"", "item"), nowhere("y=\"u\"", "item")].join("; ");
        assert_eq!(
            told,
            [
                line(2, two.join("; ")),
                line(3, nowhere("a=2 b=\"x\"", "box")),
                format!("table note, key id=\"n\": {note}")
            ]
        );
    }

    #[test]
    fn all_bad_rows_are_counted_and_twenty_told() {
        let rows: Vec<_> = (0..50).map(|n| ("item", with(item(&n.to_string(), "x"), 3, Value::Int(-1)))).collect();
        let (good, told, count) = load(&rows, &Limits::default());
        assert_eq!((good, told.len(), count), (0, 20, 50));
    }

    #[test]
    fn a_row_that_no_pack_line_holds_is_bad() {
        let limits = Limits { line_bytes: 1000, ..Limits::default() };
        let big = with(item("1", "x"), 6, Value::Blob(vec![1; 900].into()));
        let fits = with(item("2", "x"), 6, Value::Blob(vec![1; 600].into()));
        let (good, told, _) = load(&[("item", big), ("item", fits)], &limits);
        assert_eq!(good, 1);
        assert!(told[0].contains("over limits.line_bytes = 1000"), "{told:?}");
    }
}

//! The contract of a stream: SQL DDL in a file the user owns, understood by letting SQLite itself
//! run it, alone and under an authorizer, and asking what came of it. DDL that comes in a pack
//! goes through the same door before any of it touches a replica.

pub mod sql;

use crate::digest::Sha256;
use crate::ids::{BadName, ColumnName, StreamName, TableName};
use crate::limits::Limits;
use crate::value::ColumnType;
use rusqlite::Connection;
use rusqlite::config::DbConfig;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

/// A contract that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// The file is longer than the limit.
    #[error("the DDL has {0} bytes, over limits.ddl_bytes = {1}")]
    TooLong(usize, usize),
    /// More tables than the limit, or none.
    #[error("the DDL makes {0} tables; 1 to limits.tables = {1} are allowed")]
    Tables(usize, usize),
    /// SQLite did not take it, or the authorizer forbade it.
    #[error("SQLite refuses the DDL: {0}")]
    Sql(String),
    /// A name that is no table's or column's.
    #[error("{0}")]
    Name(#[from] BadName),
    /// A rule for contracts is broken.
    #[error("table {table}: {rule}")]
    Rule {
        /// The table.
        table: String,
        /// The rule, and what to do.
        rule: String,
    },
}

/// A change that cannot travel inside a delta.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("table {table}: {reason}")]
pub struct NotAdditive {
    /// The table.
    pub table: TableName,
    /// What is not additive.
    pub reason: String,
}

/// A stream's tables, as SQLite understands them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contract {
    /// The whole text.
    pub ddl: String,
    /// Hash of the text.
    pub sha256: Sha256,
    /// The tables in order of name.
    pub tables: Vec<Table>,
}

/// One table of a contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: TableName,
    /// Its columns, in the contract's order.
    pub columns: Vec<Column>,
    /// The primary key: indexes into `columns`.
    pub key: Vec<usize>,
    /// Columns that a UNIQUE constraint or index covers: a row that changes one is deleted and
    /// inserted.
    pub unique: Vec<usize>,
    /// Whether it has foreign keys.
    pub has_foreign_keys: bool,
    /// CREATE TABLE as SQLite keeps it.
    pub create: String,
    /// Its indexes: name and CREATE INDEX.
    pub indexes: Vec<(String, String)>,
}

/// One column of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: ColumnName,
    /// Its type.
    pub ty: ColumnType,
    /// Whether NULL is refused (a key's columns always).
    pub not_null: bool,
    /// Whether it has a DEFAULT other than NULL (a literal).
    pub has_default: bool,
    /// N, where a CHECK says `length(column) <= N`.
    pub max_length: Option<u64>,
}

impl Table {
    /// Where a column stands.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name.as_str() == name)
    }
    /// The table's name, quoted for SQL. Names are parsed types, so that this cannot go wrong; the
    /// quotes are for keywords.
    pub fn quoted(&self) -> String {
        format!("\"{}\"", self.name)
    }
    /// The columns' names, quoted and separated by commas.
    pub fn column_list(&self) -> String {
        quoted_list(self.columns.iter().map(|c| &c.name))
    }
    /// The key's columns, quoted and separated by commas.
    pub fn key_list(&self) -> String {
        quoted_list(self.key.iter().map(|k| &self.columns[*k].name))
    }
    /// The names of the columns whose values an index keeps, by its CREATE INDEX: those that it names, and the key's.
    pub fn kept_by(&self, create: &str) -> Vec<&ColumnName> {
        let named = sql::tokens(create);
        let is_kept = |i: usize, c: &Column| self.key.contains(&i) || named.iter().any(|t| t.is(c.name.as_str()));
        self.columns.iter().enumerate().filter(|(i, c)| is_kept(*i, c)).map(|(_, c)| &c.name).collect()
    }
    /// The columns' types.
    pub fn types(&self) -> Vec<ColumnType> {
        self.columns.iter().map(|c| c.ty).collect()
    }
}

/// Names, quoted and separated by commas.
pub fn quoted_list<'n>(names: impl Iterator<Item = &'n ColumnName>) -> String {
    names.map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ")
}

/// Functions that a CHECK, DEFAULT or index may call: built in, and the same everywhere always.
/// Those of dates are, but for `now`, `localtime` and `utc`, which SQLite refuses where a row is judged.
const PURE_FUNCTIONS: &[&str] = &[
    "->",
    "->>",
    "abs",
    "char",
    "coalesce",
    "concat",
    "concat_ws",
    "date",
    "datetime",
    "format",
    "glob",
    "hex",
    "if",
    "ifnull",
    "iif",
    "instr",
    "json_array_length",
    "json_extract",
    "json_type",
    "json_valid",
    "julianday",
    "length",
    "like",
    "lower",
    "ltrim",
    "max",
    "min",
    "nullif",
    "octet_length",
    "printf",
    "quote",
    "replace",
    "round",
    "rtrim",
    "sign",
    "strftime",
    "substr",
    "substring",
    "time",
    "trim",
    "typeof",
    "unhex",
    "unicode",
    "unixepoch",
    "upper",
];

/// What DDL from a file or pack may do: make tables and indexes in the main schema, and call pure
/// functions. No ATTACH, PRAGMA, trigger, view, virtual table, SELECT or write to a table's rows.
fn authorize_ddl(ctx: AuthContext<'_>) -> Authorization {
    let main = ctx.database_name.is_none_or(|d| d == "main");
    let catalog = |t: &str| t == "sqlite_master" || t == "sqlite_schema";
    let allowed = match ctx.action {
        AuthAction::CreateTable { .. } | AuthAction::CreateIndex { .. } | AuthAction::Reindex { .. } => true,
        AuthAction::Insert { table_name } | AuthAction::Delete { table_name } => catalog(table_name),
        AuthAction::Update { table_name, .. } => catalog(table_name),
        // CHECKs and index expressions read columns of the table being made.
        AuthAction::Read { .. } => true,
        AuthAction::Function { function_name } => PURE_FUNCTIONS.contains(&function_name.to_ascii_lowercase().as_str()),
        _ => false,
    };
    if allowed && main { Authorization::Allow } else { Authorization::Deny }
}

/// What a migration statement made by [`Contract::additive_since`] may do besides: ALTER, and
/// what SQLite runs within ALTER to rewrite and check the table.
fn authorize_migration(ctx: AuthContext<'_>) -> Authorization {
    match ctx.action {
        AuthAction::AlterTable { .. } | AuthAction::Select | AuthAction::Recursive => Authorization::Allow,
        AuthAction::Pragma { pragma_name: "quick_check" | "integrity_check", .. } => Authorization::Allow,
        AuthAction::Function { .. } | AuthAction::Read { .. } => Authorization::Allow,
        AuthAction::Update { table_name: "sqlite_temp_master" | "sqlite_temp_schema", .. } => Authorization::Allow,
        _ => authorize_ddl(ctx),
    }
}

/// Runs statements that a contract made, under the authorizer.
pub(crate) fn run_guarded(db: &Connection, statements: &[String], migration: bool) -> rusqlite::Result<()> {
    let authorizer = if migration { authorize_migration } else { authorize_ddl };
    db.authorizer(Some(authorizer))?;
    let result = statements.iter().try_for_each(|s| db.execute_batch(s));
    db.authorizer(None::<fn(AuthContext<'_>) -> Authorization>)?;
    result
}

impl Contract {
    /// Understands a contract that is to be published: one with texts in double quotes, which replicas take for the names
    /// of columns, is refused. [`Contract::parse`] bears with them in what is out already: a column that was added came
    /// through with one, and is held.
    pub fn parse_strict(ddl: &str, limits: &Limits) -> Result<Contract, SchemaError> {
        let contract = Contract::parse(ddl, limits)?;
        let run = || {
            let db = Connection::open_in_memory()?;
            db.execute_batch("PRAGMA trusted_schema = OFF")?;
            for quotes in [DbConfig::SQLITE_DBCONFIG_DQS_DML, DbConfig::SQLITE_DBCONFIG_DQS_DDL] {
                db.set_db_config(quotes, false)?;
            }
            run_guarded(&db, std::slice::from_ref(&contract.ddl), false)
        };
        run().map_err(|e: rusqlite::Error| SchemaError::Sql(e.to_string()))?;
        Ok(contract)
    }

    /// Understands a contract, or says which rule it breaks.
    pub fn parse(ddl: &str, limits: &Limits) -> Result<Contract, SchemaError> {
        if ddl.len() > limits.ddl_bytes {
            return Err(SchemaError::TooLong(ddl.len(), limits.ddl_bytes));
        }
        if ddl.contains('\0') {
            // SQLite would read up to there, people and others further.
            return Err(SchemaError::Sql("it holds a NUL character".into()));
        }
        let sql = |e: rusqlite::Error| SchemaError::Sql(e.to_string());
        let db = Connection::open_in_memory().map_err(sql)?;
        db.execute_batch("PRAGMA trusted_schema = OFF").map_err(sql)?;
        run_guarded(&db, std::slice::from_ref(&ddl.to_owned()), false).map_err(sql)?;
        let tables = introspect(&db, limits)?;
        if tables.is_empty() || tables.len() > limits.tables {
            return Err(SchemaError::Tables(tables.len(), limits.tables));
        }
        for t in &tables {
            foreign_keys_stay_inside(&db, t, &tables)?;
        }
        for t in tables.iter().filter(|t| t.has_foreign_keys) {
            foreign_keys_fit(&db, t)?;
        }
        Ok(Contract { ddl: ddl.to_owned(), sha256: Sha256::of(ddl.as_bytes()), tables })
    }

    /// A table by name.
    pub fn table(&self, name: &TableName) -> Option<&Table> {
        self.tables.iter().find(|t| &t.name == name)
    }

    /// The statements that turn an older contract into this one, when every change is additive:
    /// a table, a column at the end (with a default or NULL), an index.
    pub fn additive_since(&self, old: &Contract) -> Result<Vec<String>, NotAdditive> {
        let mut statements = Vec::new();
        for table in &old.tables {
            if self.table(&table.name).is_none() {
                return Err(NotAdditive { table: table.name.clone(), reason: "it is gone from the contract".into() });
            }
        }
        for table in &self.tables {
            match old.table(&table.name) {
                None => {
                    statements.push(table.create.clone());
                    statements.extend(table.indexes.iter().map(|(_, sql)| sql.clone()));
                }
                Some(before) => statements.extend(table.additive_since(before)?),
            }
        }
        self.try_migration(old, &statements)?;
        Ok(statements)
    }

    /// The proof that statements do what they should: run on the old contract, they give the new.
    fn try_migration(&self, old: &Contract, statements: &[String]) -> Result<(), NotAdditive> {
        let first = || self.tables.first().map_or_else(|| old.tables[0].name.clone(), |t| t.name.clone());
        let failed = |e: rusqlite::Error| NotAdditive { table: first(), reason: format!("SQLite refuses: {e}") };
        let db = Connection::open_in_memory().map_err(failed)?;
        db.execute_batch(&old.ddl).map_err(failed)?;
        run_guarded(&db, statements, true).map_err(failed)?;
        let limits = Limits { columns: usize::MAX, tables: usize::MAX, ..Limits::default() };
        let found = introspect(&db, &limits).map_err(|e| NotAdditive { table: first(), reason: e.to_string() })?;
        for (wanted, found) in self.tables.iter().zip(&found) {
            if wanted.columns != found.columns || wanted.key != found.key || wanted.unique != found.unique {
                return Err(NotAdditive { table: wanted.name.clone(), reason: "its columns or keys change".into() });
            }
        }
        Ok(())
    }
}

impl Table {
    /// The statements for one table that was there before.
    fn additive_since(&self, old: &Table) -> Result<Vec<String>, NotAdditive> {
        let no = |reason: String| NotAdditive { table: self.name.clone(), reason };
        let (defs, options) = sql::definitions(&self.create);
        let (old_defs, old_options) = sql::definitions(&old.create);
        if options != old_options {
            return Err(no("its options (STRICT, WITHOUT ROWID) change".into()));
        }
        let (n, m) = (self.columns.len(), old.columns.len());
        if n < m || self.columns[..m].iter().zip(&old.columns).any(|(a, b)| a.name != b.name) {
            return Err(no("columns are dropped, renamed or moved (new columns must stand last)".into()));
        }
        if let Some(i) = (0..m).find(|i| defs[*i] != old_defs[*i]) {
            return Err(no(format!("the definition of column {} changes", self.columns[i].name)));
        }
        // SQLite itself minds only when there are rows.
        if let Some(c) = self.columns[m..].iter().find(|c| c.not_null && !c.has_default) {
            return Err(no(format!("the new column {} is NOT NULL without a DEFAULT", c.name)));
        }
        if defs[n..] != old_defs[m..] {
            return Err(no("its table constraints change".into()));
        }
        let mut out: Vec<String> =
            defs[m..n].iter().map(|d| format!("ALTER TABLE {} ADD COLUMN {d}", self.quoted())).collect();
        for (name, sql) in &old.indexes {
            if !self.indexes.iter().any(|(n, s)| n == name && sql::same(s, sql)) {
                return Err(no(format!("index {name} is dropped or changed")));
            }
        }
        let new = self.indexes.iter().filter(|(n, _)| old.indexes.iter().all(|(o, _)| o != n));
        out.extend(new.map(|(_, sql)| sql.clone()));
        Ok(out)
    }
}

/// Whether two lists of migration statements mean the same, however they are spelt: the columns that a table gets stand in
/// one order, all else in any.
pub(crate) fn is_same_migration(a: &[String], b: &[String]) -> bool {
    let meant = |list: &[String]| {
        let mut meant: Vec<Vec<String>> = list.iter().map(|s| sql::meaning(s)).collect();
        let of_table = |s: &Vec<String>| match s.first().map(String::as_str) {
            Some("alter") => s.iter().take(3).cloned().collect(),
            _ => s.clone(),
        };
        // A stable sort: columns of one table stay as they stand.
        meant.sort_by_cached_key(of_table);
        meant
    };
    a.len() == b.len() && meant(a) == meant(b)
}

/// Finds a table or index name that two streams both make: they share one file at the store.
pub fn names_clash(contracts: &[(&StreamName, &Contract)]) -> Option<String> {
    let mut seen = std::collections::HashMap::new();
    for (stream, contract) in contracts {
        for t in &contract.tables {
            for name in std::iter::once(t.name.as_str()).chain(t.indexes.iter().map(|(n, _)| n.as_str())) {
                if let Some(other) = seen.insert(name.to_ascii_lowercase(), *stream) {
                    return Some(format!("streams {other} and {stream} both make a table or index named {name}"));
                }
            }
        }
    }
    None
}

fn introspect(db: &Connection, limits: &Limits) -> Result<Vec<Table>, SchemaError> {
    let sql = |e: rusqlite::Error| SchemaError::Sql(e.to_string());
    let mut list = db
        .prepare("SELECT name, type, strict FROM pragma_table_list WHERE schema = 'main' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name COLLATE BINARY")
        .map_err(sql)?;
    let rows = list
        .query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?, r.get::<_, bool>(2)?)))
        .map_err(sql)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(sql)?;
    rows.into_iter()
        .map(|(name, kind, strict)| {
            let rule = |rule: &str| SchemaError::Rule { table: name.clone(), rule: rule.into() };
            if kind != "table" {
                return Err(rule("only plain tables are allowed in a contract"));
            }
            if !strict {
                return Err(rule("tables of a contract must be STRICT: write `) STRICT;`"));
            }
            introspect_table(db, name.parse()?, limits)
        })
        .collect()
}

fn introspect_table(db: &Connection, name: TableName, limits: &Limits) -> Result<Table, SchemaError> {
    let sql = |e: rusqlite::Error| SchemaError::Sql(e.to_string());
    let rule = |rule: String| SchemaError::Rule { table: name.to_string(), rule };
    let create: String = db
        .query_row("SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?1", [name.as_str()], |r| r.get(0))
        .map_err(sql)?;
    let create = sql::trimmed(&create).to_owned();
    let words = sql::tokens(&create);
    let is = |t: &sql::Token<'_>, word: &str| t.text.eq_ignore_ascii_case(word);
    if words.iter().any(|t| is(t, "AUTOINCREMENT")) {
        return Err(rule("AUTOINCREMENT is refused: keys come from the source".into()));
    }
    // CONFLICT alone may be a column; ON is nobody's name.
    if words.windows(2).any(|w| is(&w[0], "ON") && is(&w[1], "CONFLICT")) {
        return Err(rule("ON CONFLICT is refused: it would drop or change rows without a word; leave it out".into()));
    }
    let mut columns = Vec::new();
    let mut keyed: Vec<(i64, usize)> = Vec::new();
    let mut statement = db
        .prepare("SELECT name, type, \"notnull\", pk, hidden, dflt_value FROM pragma_table_xinfo(?1)")
        .map_err(sql)?;
    let mut rows = statement.query([name.as_str()]).map_err(sql)?;
    while let Some(r) = rows.next().map_err(sql)? {
        let get = |i| r.get::<_, i64>(i).map_err(sql);
        let column: ColumnName = r.get::<_, String>(0).map_err(sql)?.parse()?;
        let declared: String = r.get(1).map_err(sql)?;
        if get(4)? != 0 {
            return Err(rule(format!("column {column} is generated; put plain values in it")));
        }
        let ty = match declared.to_ascii_uppercase().as_str() {
            "INT" | "INTEGER" => ColumnType::Integer,
            "REAL" => ColumnType::Real,
            "TEXT" => ColumnType::Text,
            "BLOB" => ColumnType::Blob,
            _ => return Err(rule(format!("column {column} has type {declared}; use INTEGER, REAL, TEXT or BLOB"))),
        };
        let default: Option<String> = r.get(5).map_err(sql)?;
        let computed = |t: &sql::Token<'_>| t.text == "(" || t.text.to_ascii_uppercase().starts_with("CURRENT_");
        if default.as_ref().is_some_and(|d| sql::tokens(d).iter().any(computed)) {
            return Err(rule(format!(
                "column {column}: its DEFAULT must be a literal; rows come whole from the source"
            )));
        }
        let has_default = default.is_some_and(|d| !d.eq_ignore_ascii_case("NULL"));
        let pk = get(3)?;
        if pk > 0 {
            keyed.push((pk, columns.len()));
        }
        let max_length = sql::length_limit(&create, column.as_str());
        columns.push(Column { name: column, ty, not_null: get(2)? != 0 || pk > 0, has_default, max_length });
    }
    if columns.len() > limits.columns {
        return Err(rule(format!("it has {} columns, over limits.columns = {}", columns.len(), limits.columns)));
    }
    keyed.sort_unstable();
    let key: Vec<usize> = keyed.into_iter().map(|(_, i)| i).collect();
    if key.is_empty() {
        return Err(rule("it has no PRIMARY KEY, which tells rows apart".into()));
    }
    if let Some(c) = key.iter().map(|k| &columns[*k]).find(|c| c.ty == ColumnType::Real) {
        return Err(rule(format!("key column {} is REAL; floats make poor keys: use INTEGER or TEXT", c.name)));
    }
    // Its index may say BINARY, and statements by key still compare as the column does.
    let (definitions, _) = sql::definitions(&create);
    let binary = |k: &&usize| definitions.get(**k).is_some_and(|d| sql::collation(d).eq_ignore_ascii_case("BINARY"));
    if let Some(k) = key.iter().find(|k| !binary(k)) {
        return Err(rule(format!("key column {}: keys compare by bytes; drop its COLLATE", columns[*k].name)));
    }
    let (unique, indexes) = introspect_indexes(db, &name, &columns)?;
    let has_foreign_keys = db
        .query_row("SELECT count(*) FROM pragma_foreign_key_list(?1)", [name.as_str()], |r| r.get::<_, i64>(0))
        .map_err(sql)?
        > 0;
    Ok(Table { name, columns, key, unique, has_foreign_keys, create, indexes })
}

/// The columns under UNIQUE (the key's own apart), and the named indexes.
type Indexes = (Vec<usize>, Vec<(String, String)>);

fn introspect_indexes(db: &Connection, table: &TableName, columns: &[Column]) -> Result<Indexes, SchemaError> {
    let sql = |e: rusqlite::Error| SchemaError::Sql(e.to_string());
    let rule = |rule: String| SchemaError::Rule { table: table.to_string(), rule };
    let mut unique = Vec::new();
    let mut indexes = Vec::new();
    let mut list = db
        .prepare("SELECT l.name, l.\"unique\", l.origin, s.sql FROM pragma_index_list(?1) l LEFT JOIN sqlite_schema s ON s.type = 'index' AND s.name = l.name ORDER BY l.name")
        .map_err(sql)?;
    let mut rows = list.query([table.as_str()]).map_err(sql)?;
    while let Some(r) = rows.next().map_err(sql)? {
        let (index, is_unique): (String, bool) = (r.get(0).map_err(sql)?, r.get(1).map_err(sql)?);
        let (origin, text): (String, Option<String>) = (r.get(2).map_err(sql)?, r.get(3).map_err(sql)?);
        if let Some(text) = text {
            if index.to_ascii_lowercase().starts_with("tillcast_") {
                return Err(rule(format!("index {index}: the prefix tillcast_ is reserved")));
            }
            if is_unique {
                // A partial one covers the columns of its WHERE too: they decide which rows it compares.
                let named = sql::tokens(&text);
                unique.extend((0..columns.len()).filter(|i| named.iter().any(|t| t.is(columns[*i].name.as_str()))));
            }
            indexes.push((index.clone(), sql::trimmed(&text).to_owned()));
        }
        if !is_unique {
            continue;
        }
        let mut parts = db.prepare("SELECT cid, coll FROM pragma_index_xinfo(?1) WHERE key = 1").map_err(sql)?;
        let mut parts = parts.query([&index]).map_err(sql)?;
        while let Some(p) = parts.next().map_err(sql)? {
            let (cid, collation): (i64, Option<String>) = (p.get(0).map_err(sql)?, p.get(1).map_err(sql)?);
            if collation.is_some_and(|c| !c.eq_ignore_ascii_case("BINARY")) {
                return Err(rule(format!("index {index}: keys compare by bytes; drop its COLLATE")));
            }
            match usize::try_from(cid) {
                Ok(i) if i < columns.len() => {
                    if origin != "pk" && !unique.contains(&i) {
                        unique.push(i);
                    }
                }
                _ => return Err(rule(format!("index {index}: a UNIQUE index must be of plain columns"))),
            }
        }
    }
    unique.sort_unstable();
    unique.dedup();
    Ok((unique, indexes))
}

fn foreign_keys_stay_inside(db: &Connection, table: &Table, tables: &[Table]) -> Result<(), SchemaError> {
    let sql = |e: rusqlite::Error| SchemaError::Sql(e.to_string());
    let rule = |rule: String| SchemaError::Rule { table: table.name.to_string(), rule };
    let mut list =
        db.prepare("SELECT \"table\", on_update, on_delete FROM pragma_foreign_key_list(?1)").map_err(sql)?;
    let mut rows = list.query([table.name.as_str()]).map_err(sql)?;
    while let Some(r) = rows.next().map_err(sql)? {
        let get = |i| r.get::<_, String>(i).map_err(sql);
        let (parent, update, delete) = (get(0)?, get(1)?, get(2)?);
        if !tables.iter().any(|t| t.name.as_str().eq_ignore_ascii_case(&parent)) {
            return Err(rule(format!("a foreign key to {parent}, which is no table of this stream: drop it")));
        }
        if update != "NO ACTION" || delete != "NO ACTION" {
            return Err(rule(format!(
                "a foreign key to {parent} with actions: rows change by packs alone, drop ON UPDATE and ON DELETE"
            )));
        }
    }
    Ok(())
}

/// SQLite takes a foreign key by which it can check no row, and says so at the first check.
fn foreign_keys_fit(db: &Connection, table: &Table) -> Result<(), SchemaError> {
    let check = db.prepare(&format!("PRAGMA foreign_key_check({})", table.quoted()));
    check.map(drop).map_err(|e| SchemaError::Rule {
        table: table.name.to_string(),
        rule: format!("{e}: what a foreign key refers to must be the PRIMARY KEY there, or UNIQUE"),
    })
}

#[cfg(test)]
mod tests {
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
            assert!(
                e.to_string().starts_with("table c: foreign key mismatch") && e.to_string().contains("UNIQUE"),
                "{e}"
            );
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
}

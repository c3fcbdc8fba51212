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
mod tests;

//! Reads a headquarters database: PostgreSQL, MySQL/MariaDB or SQLite. A run reads one snapshot.
//!
//! Owns connections and the conversion of rows. Must never write to the source. Rows are streamed:
//! memory does not grow with a table. Power may go at any time: nothing is kept.
//!
//! SQLite files are read by rusqlite: sqlx hands each value over to another thread, which costs ten
//! times the scan itself.

pub mod convert;
pub mod drivers;
pub mod query;
pub mod times;

use crate::config::{AudienceKind, SourceConfig, SourceKind};
use crate::source::{
    BadStores, Problem, RowFault, RowSink, SinkError, StoreList, StoreRow, key_for_people, match_columns,
};
use drivers::{Fields, Session};
use futures_util::{FutureExt, TryStreamExt};
use jiff::tz::Offset;
use proto::config::ConfigError;
use proto::ids::{StoreId, Zone};
use proto::schema::Table;
use proto::value::{ColumnType, Value};
use query::{Dialect, Param, Query};
use rusqlite::OpenFlags;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Column, ConnectOptions, Connection, Executor, SqlSafeStr, Statement};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

/// The source database could not be read. Nothing of the stream is published.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The URL.
    #[error("source.url: {0}")]
    Url(String),
    /// No connection.
    #[error("the source database cannot be reached: {0}")]
    Connect(String),
    /// A query failed.
    #[error("{what}: the query failed: {text}")]
    Query {
        /// The table, or `stores.query`.
        what: String,
        /// What the database said.
        text: String,
    },
    /// Nothing came for `source.row_timeout`.
    #[error("{what}: no answer within source.row_timeout = {limit} s")]
    Late {
        /// The table, or `stores.query`.
        what: String,
        /// The limit, s.
        limit: u64,
    },
    /// The connection waits for the answer to an earlier query.
    #[error("{what}: not asked: the source database gave no answer to an earlier query of this run")]
    Dead {
        /// The table, or `stores.query`.
        what: String,
    },
    /// PostgreSQL: the snapshot does not see the rows of a table as they were when it began.
    #[error(
        "{what}: {tables}: truncated, rewritten or made anew after this run's snapshot began, which cannot tell its rows \
         any more; the next run can. Such a table is better emptied by DELETE than by TRUNCATE"
    )]
    Unseen {
        /// The table, or `stores.query`.
        what: String,
        /// The source's tables.
        tables: String,
    },
    /// The query's columns are not the contract's.
    #[error("{what}: the query's columns are not the contract's: {text}")]
    Columns {
        /// The table, or `stores.query`.
        what: String,
        /// Which.
        text: String,
    },
    /// The list of stores.
    #[error(transparent)]
    Stores(#[from] BadStores),
    /// Where the rows go.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// The values of `:store` and `:zone`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Names<'n> {
    /// The store that rows are read for.
    pub store: Option<&'n StoreId>,
    /// The zone that rows are read for.
    pub zone: Option<&'n Zone>,
}

/// Which SQL a source speaks; none for an inbox.
pub fn dialect(kind: &SourceKind) -> Option<Dialect> {
    match kind {
        SourceKind::Sqlite(_) => Some(Dialect::Sqlite),
        SourceKind::Postgres(_) => Some(Dialect::Postgres),
        SourceKind::MySql(_) => Some(Dialect::MySql),
        SourceKind::Inbox(_) => None,
    }
}

/// Whether the source's URL can be read; connects to nothing.
pub fn check_url(config: &SourceConfig) -> Result<(), ConfigError> {
    match config.kind()? {
        SourceKind::Postgres(url) => PgConnectOptions::from_str(&url).map(drop),
        SourceKind::MySql(url) => MySqlConnectOptions::from_str(&url).map(drop),
        SourceKind::Sqlite(_) | SourceKind::Inbox(_) => Ok(()),
    }
    .map_err(|e| ConfigError(format!("source.url: {e}")))
}

enum Link {
    Sqlite(rusqlite::Connection),
    Postgres(sqlx::PgConnection),
    MySql(sqlx::MySqlConnection),
}

/// One snapshot of the source database, on one connection, until it is dropped.
pub struct Database {
    link: Link,
    session: Session,
    row_timeout: Duration,
    /// It did not answer in time: whatever is asked now waits behind that.
    is_dead: bool,
}

/// Of the tables that PostgreSQL's transaction has read (it holds their locks, so that none of them can become unseen
/// later): those whose rows lie in another file than the snapshot's catalogue says, or that this knows by another name, or
/// not. TRUNCATE, a rewrite and DROP with CREATE count for older snapshots at once, which see the table empty, and so does
/// the name of a table that was put in another's place. Indexes made anew are no matter, nor is a refreshed materialized
/// view that is all that was read, also by functions: older snapshots see its new rows, whole.
const UNSEEN: &str = "SELECT string_agg(DISTINCT relation::regclass::text, ', ') FILTER (WHERE is_unseen) FROM (
        SELECT l.relation, c.relkind IS NOT DISTINCT FROM 'm' AS is_view,
            c.oid IS NULL OR c.relfilenode <> 0 AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode
                OR l.relation::regclass::text <> quote_ident(c.relname)
                AND right(l.relation::regclass::text, length(quote_ident(c.relname)) + 1) <> '.' || quote_ident(c.relname)
                AS is_unseen,
            (c.relkind IN ('v', 't') OR c.relnamespace = 'pg_catalog'::regnamespace) IS NOT TRUE AS has_rows
        FROM pg_locks l LEFT JOIN pg_class c ON c.oid = l.relation
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation'
        AND pg_index_has_property(l.relation, 'clusterable') IS NULL) was_read
    HAVING count(DISTINCT relation) FILTER (WHERE has_rows) <> 1 OR NOT bool_and(is_view) FILTER (WHERE is_unseen)";

/// Whether that has locked a materialized view.
const HAS_VIEW: &str = "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND c.relkind = 'm')";

/// What a query gives.
struct Found {
    /// The names of its columns.
    names: Vec<String>,
    /// Which of them MySQL shows with zeros before the number, and gives without.
    zerofill: Vec<bool>,
    /// Whether it reads a materialized view of PostgreSQL's.
    has_view: bool,
}

fn zerofill(column: &str) -> String {
    format!(
        "column {column} is ZEROFILL, and comes as a number: write CAST({column} AS CHAR) AS {column} for a text with its \
         zeros, {column} + 0 AS {column} for one without"
    )
}

impl Found {
    fn of(names: Vec<String>) -> Self {
        Found { zerofill: vec![false; names.len()], names, has_view: false }
    }

    /// The places of the wanted columns, `texts` of which go into texts: there a number without its zeros would be
    /// another one's key.
    fn places(&self, wanted: &[&str], optional: &[&str], texts: &[bool]) -> Result<Vec<Option<usize>>, String> {
        let places = match_columns(&self.names, wanted, optional)?;
        let is_cut = |i: &usize| texts[*i] && places[*i].is_some_and(|p| self.zerofill[p]);
        let told: Vec<String> = (0..wanted.len()).filter(is_cut).map(|i| zerofill(wanted[i])).collect();
        if told.is_empty() { Ok(places) } else { Err(told.join("; ")) }
    }
}

async fn in_time<T>(limit: Duration, what: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, SourceError> {
    match tokio::time::timeout(limit, what).await {
        Ok(done) => done.map_err(|e| SourceError::Connect(e.to_string())),
        Err(_) => Err(SourceError::Connect(format!("no answer within source.connect_timeout = {} s", limit.as_secs()))),
    }
}

/// Opens a SQLite file for reading and begins its snapshot (with the first read).
fn open_file(path: &Path, limit: Duration) -> rusqlite::Result<rusqlite::Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = rusqlite::Connection::open_with_flags(path, flags)?;
    db.busy_timeout(limit)?;
    db.execute_batch("PRAGMA trusted_schema = OFF; BEGIN; SELECT count(*) FROM sqlite_schema")?;
    Ok(db)
}

impl Database {
    /// Connects and begins the snapshot that every later read sees.
    pub async fn open(config: &SourceConfig) -> Result<Database, SourceError> {
        let bad = |e: sqlx::Error| SourceError::Url(e.to_string());
        let limit = config.connect_timeout.0;
        let mut session = Session { zone: config.time_zone.clone(), offset: Offset::UTC };
        let link = match config.kind().map_err(|e| SourceError::Url(e.0))? {
            SourceKind::Inbox(_) => return Err(SourceError::Url("an inbox is no database".into())),
            SourceKind::Sqlite(path) => {
                let failed = |e: rusqlite::Error| SourceError::Connect(format!("{}: {e}", path.display()));
                Link::Sqlite(open_file(&path, limit).map_err(failed)?)
            }
            SourceKind::Postgres(url) => {
                let mut conn = in_time(
                    limit,
                    PgConnectOptions::from_str(&url).map_err(bad)?.disable_statement_logging().connect(),
                )
                .await?;
                // Between two reads packs are made: a limit for idle transactions (of servers from 9.6 on) would end the
                // snapshot there, at each run alike.
                let begin = format!(
                    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL TimeZone = '{}'; \
                     SELECT set_config('idle_in_transaction_session_timeout', '0', true) \
                     WHERE current_setting('server_version_num')::int >= 90600; SELECT 1; SAVEPOINT tillcast",
                    session.zone.name()
                );
                in_time(limit, conn.execute(sqlx::raw_sql(AssertSqlSafe(begin)))).await?;
                Link::Postgres(conn)
            }
            SourceKind::MySql(url) => {
                // The server's own sql_mode, so that a query means what it means in its console.
                let options = MySqlConnectOptions::from_str(&url)
                    .map_err(bad)?
                    .pipes_as_concat(false)
                    .no_engine_substitution(false)
                    .disable_statement_logging();
                let mut conn = in_time(limit, options.connect()).await?;
                // Few servers know zones by name (`mysql_tzinfo_to_sql`), and of an hour that a named zone shows twice
                // TIMESTAMPs do not say which: the offset of now, by the server's clock.
                let now = sqlx::query_scalar("SELECT CAST(UNIX_TIMESTAMP() AS SIGNED)").fetch_one(&mut conn);
                let now = jiff::Timestamp::from_second(in_time(limit, now).await?);
                let now = now.map_err(|e| SourceError::Connect(format!("its clock: {e}")))?;
                session.offset = session.zone.offset(now);
                let zone = format!("SET SESSION time_zone = '{}'", times::offset_text(session.offset));
                for begin in [
                    &zone,
                    // As above: its default, where the server's own is lower.
                    "SET SESSION wait_timeout = GREATEST(@@wait_timeout, 28800)",
                    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
                    "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
                ] {
                    in_time(limit, conn.execute(sqlx::raw_sql(AssertSqlSafe(begin)))).await?;
                }
                Link::MySql(conn)
            }
        };
        Ok(Database { link, session, row_timeout: config.row_timeout.0, is_dead: false })
    }

    /// Ends the snapshot.
    pub async fn close(self) {
        if self.is_dead {
            return;
        }
        // A read-only snapshot has nothing to lose.
        let end = async {
            match self.link {
                Link::Sqlite(_) => Ok(()),
                Link::Postgres(conn) => conn.close().await,
                Link::MySql(conn) => conn.close().await,
            }
        };
        let _ = tokio::time::timeout(self.row_timeout, end).await;
    }

    /// A query's columns, without running it.
    async fn columns(&mut self, what: &str, query: &Query) -> Result<Found, SourceError> {
        if self.is_dead {
            return Err(SourceError::Dead { what: what.to_owned() });
        }
        let limit = self.row_timeout;
        let found = tokio::time::timeout(limit, self.prepare(what, query)).await.unwrap_or_else(|_| {
            self.is_dead = true;
            Err(SourceError::Late { what: what.to_owned(), limit: limit.as_secs() })
        })?;
        // It is judged by its own locks.
        if found.has_view {
            self.back().await;
        }
        Ok(found)
    }

    async fn prepare(&mut self, what: &str, query: &Query) -> Result<Found, SourceError> {
        let failed = |e: sqlx::Error| SourceError::Query { what: what.to_owned(), text: e.to_string() };
        let sql = AssertSqlSafe(query.sql.clone()).into_sql_str();
        macro_rules! names {
            ($statement:expr) => {
                $statement.columns().iter().map(|c| c.name().to_owned()).collect()
            };
        }
        Ok(match &mut self.link {
            Link::Sqlite(db) => {
                let failed = |e: rusqlite::Error| SourceError::Query { what: what.to_owned(), text: e.to_string() };
                let statement = db.prepare(&query.sql).map_err(failed)?;
                Found::of(statement.column_names().into_iter().map(str::to_owned).collect())
            }
            Link::MySql(conn) => {
                let statement = conn.prepare(sql).await.map_err(failed)?;
                // The driver shows a column's flags in no other way.
                let is_zerofill = |c: &sqlx::mysql::MySqlColumn| format!("{:?}", c.type_info()).contains("ZEROFILL");
                let zerofill = statement.columns().iter().map(is_zerofill).collect();
                Found { names: names!(statement), zerofill, has_view: false }
            }
            Link::Postgres(conn) => {
                let text = <String as sqlx::Type<sqlx::Postgres>>::type_info();
                let statement = conn.prepare_with(sql, &vec![text; query.params.len()]).await.map_err(failed)?;
                let found = Found::of(names!(statement));
                Found { has_view: sqlx::query_scalar(HAS_VIEW).fetch_one(conn).await.map_err(failed)?, ..found }
            }
        })
    }

    /// Runs a query and hands on its rows as they come.
    async fn each(
        &mut self,
        what: &str,
        query: &Query,
        names: Names<'_>,
        take: &mut dyn FnMut(&dyn Fields) -> Result<(), SinkError>,
    ) -> Result<(), SourceError> {
        let failed = |text: String| SourceError::Query { what: what.to_owned(), text };
        let limit = self.row_timeout;
        let value = |p: &Param| match p {
            Param::Store => names.store.map(|s| s.as_str().to_owned()),
            Param::Zone => names.zone.map(|z| z.as_str().to_owned()),
        };
        let values: Vec<Option<String>> = query.params.iter().map(value).collect();
        macro_rules! stream {
            ($conn:expr) => {{
                let mut run = sqlx::query(AssertSqlSafe(query.sql.clone())).persistent(false);
                for value in &values {
                    run = run.bind(value);
                }
                let mut rows = run.fetch($conn);
                loop {
                    // Rows mostly wait in the driver's buffer: a timer for each would cost more than they do.
                    let next = match rows.try_next().now_or_never() {
                        Some(ready) => ready,
                        None => tokio::time::timeout(limit, rows.try_next()).await.map_err(|_| {
                            self.is_dead = true;
                            SourceError::Late { what: what.to_owned(), limit: limit.as_secs() }
                        })?,
                    };
                    let Some(row) = next.map_err(|e| failed(e.to_string()))? else { break };
                    take(&row)?;
                }
            }};
        }
        match &mut self.link {
            Link::Postgres(conn) => {
                stream!(&mut *conn);
                let asked = sqlx::query_scalar::<_, Option<String>>(UNSEEN).fetch_optional(&mut *conn);
                let tables = tokio::time::timeout(limit, asked)
                    .await
                    .map_err(|_| {
                        self.is_dead = true;
                        SourceError::Late { what: what.to_owned(), limit: limit.as_secs() }
                    })?
                    .map_err(|e| failed(e.to_string()))?;
                if let Some(tables) = tables.flatten() {
                    return Err(SourceError::Unseen { what: what.to_owned(), tables });
                }
            }
            Link::MySql(conn) => stream!(conn),
            Link::Sqlite(db) => {
                let failed = |e: rusqlite::Error| failed(e.to_string());
                let mut statement = db.prepare(&query.sql).map_err(failed)?;
                let mut rows = statement.query(rusqlite::params_from_iter(&values)).map_err(failed)?;
                while let Some(row) = rows.next().map_err(failed)? {
                    take(row)?;
                }
            }
        }
        Ok(())
    }

    /// What a query gave. One that failed has ended PostgreSQL's transaction; one that reads a materialized view is
    /// judged by its own locks, and gives them up for those after it. All others keep theirs: what is read for one zone is not
    /// made anew before it is read for the next.
    async fn over<T>(&mut self, result: Result<(T, Found), SourceError>) -> Result<T, SourceError> {
        if !matches!(&result, Ok((_, found)) if !found.has_view) {
            self.back().await;
        }
        result.map(|(given, _)| given)
    }

    /// Back to the beginning of PostgreSQL's transaction, in the same snapshot.
    async fn back(&mut self) {
        if let (Link::Postgres(conn), false) = (&mut self.link, self.is_dead) {
            let back = conn.execute(sqlx::raw_sql("ROLLBACK TO SAVEPOINT tillcast"));
            match tokio::time::timeout(self.row_timeout, back).await {
                Ok(Ok(_)) => {}
                Ok(Err(e)) => tracing::warn!(error = %e, "the snapshot is lost"),
                Err(_) => self.is_dead = true,
            }
        }
    }

    /// Reads a table's rows into the sink, by column name, converted to the contract's types.
    pub async fn read(
        &mut self,
        table: &Table,
        query: &Query,
        names: Names<'_>,
        sink: &mut dyn RowSink,
    ) -> Result<(), SourceError> {
        let result = self.read_rows(table, query, names, sink).await;
        self.over(result).await
    }

    async fn read_rows(
        &mut self,
        table: &Table,
        query: &Query,
        names: Names<'_>,
        sink: &mut dyn RowSink,
    ) -> Result<((), Found), SourceError> {
        let what = format!("table {}", table.name);
        let found = self.columns(&what, query).await?;
        let places = places(&what, table, &found)?;
        let types: Vec<ColumnType> = table.columns.iter().map(|c| c.ty).collect();
        let session = self.session.clone();
        self.each(&what, query, names, &mut |row| take_row(table, &places, &types, row, &session, sink)).await?;
        Ok(((), found))
    }

    /// Checks that a query runs and has the contract's columns, without reading rows.
    pub async fn probe(&mut self, table: &Table, query: &Query) -> Result<(), SourceError> {
        let what = format!("table {}", table.name);
        let found = self.columns(&what, query).await;
        self.back().await;
        places(&what, table, &found?).map(|_| ())
    }

    /// Reads the list of stores: column `id`, and `zone` and `region` where there are any.
    pub async fn stores(&mut self, query: &Query) -> Result<Vec<StoreRow>, SourceError> {
        let result = self.read_stores(query).await;
        self.over(result).await
    }

    async fn read_stores(&mut self, query: &Query) -> Result<(Vec<StoreRow>, Found), SourceError> {
        let what = "stores.query";
        let found = self.columns(what, query).await?;
        let places = found
            .places(&["id", "zone", "region"], &["zone", "region"], &[true; 3])
            .map_err(|text| SourceError::Columns { what: what.into(), text })?;
        let mut list = StoreList::default();
        let session = self.session.clone();
        self.each(what, query, Names::default(), &mut |row| {
            let texts: Result<Vec<Option<String>>, Problem> =
                places.iter().map(|p| text_at(row, *p, &session)).collect();
            match texts.as_deref() {
                Ok([id, zone, region]) => list.push(id.as_deref(), zone.as_deref(), region.as_deref()),
                Ok(_) => {}
                Err(Problem(text)) => list.unreadable(format!("a store's row {text}")),
            }
            Ok(())
        })
        .await?;
        Ok((list.finish()?, found))
    }
}

/// The place of each of the contract's columns in what a query gives.
fn places(what: &str, table: &Table, found: &Found) -> Result<Vec<usize>, SourceError> {
    let wanted: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
    let texts: Vec<bool> = table.columns.iter().map(|c| c.ty == ColumnType::Text).collect();
    match found.places(&wanted, &[], &texts) {
        Ok(places) => Ok(places.into_iter().flatten().collect()),
        Err(text) => Err(SourceError::Columns { what: what.to_owned(), text }),
    }
}

fn text_at(row: &dyn Fields, place: Option<usize>, session: &Session) -> Result<Option<String>, Problem> {
    let Some(place) = place else { return Ok(None) };
    match row.raw(place, session)?.fit(ColumnType::Text)? {
        Value::Text(t) => Ok(Some(t.into_owned())),
        _ => Ok(None),
    }
}

fn take_row(
    table: &Table,
    places: &[usize],
    types: &[ColumnType],
    row: &dyn Fields,
    session: &Session,
    sink: &mut dyn RowSink,
) -> Result<(), SinkError> {
    let value = |i: usize| row.raw(places[i], session).and_then(|raw| raw.fit(types[i]));
    let mut values = Vec::with_capacity(places.len());
    for i in 0..places.len() {
        match value(i) {
            Ok(v) => values.push(v),
            Err(Problem(problem)) => {
                let key = key_for_people(table, |k| value(k).ok());
                let column = Some(table.columns[i].name.clone());
                return sink.fault(RowFault { table: table.name.clone(), line: None, key, column, problem });
            }
        }
    }
    sink.row(&values, None)
}

/// Parses a table's query and checks its names against the stream's audience.
pub fn parse_query(text: &str, dialect: Dialect, audience: AudienceKind) -> Result<Query, query::QueryError> {
    let query = Query::parse(text, dialect)?;
    query.check(match audience {
        AudienceKind::All => "all",
        AudienceKind::Zone => "zone",
        AudienceKind::Store => "store",
    })?;
    Ok(query)
}

//! Reading PostgreSQL and MariaDB: every type, exactly or refused; one snapshot; one broken query
//! does not spoil the next.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use hq_publisher::config::{AudienceKind, SourceConfig};
use hq_publisher::source::{RowFault, RowSink, SinkError};
use hq_publisher::source_db::query::Dialect;
use hq_publisher::source_db::{Database, Names, SourceError, parse_query};
use proto::config::{HumanDuration, Secret};
use proto::ids::Zone;
use proto::limits::Limits;
use proto::schema::{Contract, Table};
use proto::value::Value;
use sqlx::{Connection, Executor};
use std::time::Duration;
use tillcast_tests::{MariaDb, Postgres};

#[derive(Default)]
struct Taken(Vec<String>);
impl RowSink for Taken {
    fn row(&mut self, row: &[Value<'_>], _: Option<u64>) -> Result<(), SinkError> {
        let values: Vec<String> = row.iter().map(Value::for_people).collect();
        self.0.push(values.join(" | "));
        Ok(())
    }
    fn fault(&mut self, fault: RowFault) -> Result<(), SinkError> {
        self.0.push(fault.to_string());
        Ok(())
    }
}

async fn open(url: &str) -> Database {
    open_with(url, 60, "UTC").await
}

async fn open_with(url: &str, row_timeout: u64, time_zone: &str) -> Database {
    let s = |n| HumanDuration(Duration::from_secs(n));
    let row_timeout = s(row_timeout);
    let time_zone = time_zone.to_owned().try_into().unwrap();
    let (url, rest, wait) = (Secret::new(url), s(2), s(3600));
    let config = SourceConfig { url, connect_timeout: s(60), row_timeout, time_zone, rest, wait };
    Database::open(&config).await.unwrap()
}

fn table(columns: &[(&str, &str)]) -> Table {
    let columns: Vec<String> = columns.iter().map(|(n, t)| format!("{n} {t}")).collect();
    let ddl = format!("CREATE TABLE t (id INTEGER PRIMARY KEY, {}) STRICT;", columns.join(", "));
    Contract::parse(&ddl, &Limits::default()).unwrap().tables.remove(0)
}

async fn read(db: &mut Database, dialect: Dialect, table: &Table, sql: &str) -> Result<Vec<String>, String> {
    let query = parse_query(sql, dialect, AudienceKind::Zone).unwrap();
    let zone: Zone = "east".parse().unwrap();
    let mut taken = Taken::default();
    let names = Names { store: None, zone: Some(&zone) };
    db.read(table, &query, names, &mut taken).await.map_err(|e| e.to_string())?;
    Ok(taken.0)
}

/// A value of each type with what it becomes, one by one: `(SQL expression, type, want)`.
async fn each(db: &mut Database, dialect: Dialect, cases: &[(&str, &str, &str)]) {
    for (sql, ty, want) in cases {
        let got = read(db, dialect, &table(&[("v", ty)]), &format!("SELECT 1 AS id, {sql} AS v")).await.unwrap();
        assert!(got[0].contains(want), "{sql} into {ty}: {} where {want} was wanted", got[0]);
    }
}

#[tokio::test]
async fn postgres_values_come_exactly_or_not_at_all() {
    let server = Postgres::start();
    server.sql("src", "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN cents AS bigint");
    let mut db = open(&server.url("src")).await;
    each(
        &mut db,
        Dialect::Postgres,
        &[
            ("true", "INTEGER", "1 | 1"),
            ("'-7'::int2", "INTEGER", "1 | -7"),
            ("2147483647", "INTEGER", "1 | 2147483647"),
            ("'-9223372036854775808'::int8", "INTEGER", "1 | -9223372036854775808"),
            ("5::cents", "INTEGER", "1 | 5"),
            ("12.3400::numeric", "TEXT", "1 | \"12.3400\""),
            ("-0.00012::numeric", "TEXT", "1 | \"-0.00012\""),
            ("123456789012345678901234567890.5", "TEXT", "\"123456789012345678901234567890.5\""),
            ("1e20::numeric", "TEXT", "\"100000000000000000000\""),
            ("12.00::numeric(9,2)", "INTEGER", "1 | 12"),
            ("12.34::numeric", "INTEGER", "scale it"),
            ("CAST(round(19.99::numeric(9,2) * 100) AS INTEGER)", "INTEGER", "1 | 1999"),
            ("CAST(round(19.99::float4 * 100) AS INTEGER)", "INTEGER", "1 | 1999"),
            ("CAST(round(1.15::float8 * 100) AS INTEGER)", "INTEGER", "1 | 115"),
            ("true", "TEXT", "1 | \"1\""),
            ("12.99::float4", "REAL", "1 | 12.989999771118164"),
            ("'NaN'::numeric", "TEXT", "NaN"),
            ("1e30::numeric", "INTEGER", "beyond a 64-bit"),
            ("0.1::float8", "REAL", "1 | 0.1"),
            ("0.5::float4", "REAL", "1 | 0.5"),
            ("'NaN'::float8", "REAL", "NaN"),
            ("'infinity'::float8", "REAL", "inf"),
            ("'é\"x'::varchar(9)", "TEXT", "1 | \"é\\\"x\""),
            ("'ab'::char(4)", "TEXT", "1 | \"ab  \""),
            ("'ok'::mood", "TEXT", "1 | \"ok\""),
            ("'\\x00ff'::bytea", "BLOB", "1 | blob of 2 bytes"),
            ("'6ba7b810-9dad-11d1-80b4-00c04fd430c8'::uuid", "TEXT", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
            ("'{\"a\": 1}'::json", "TEXT", "{\\\"a\\\": 1}"),
            ("'{\"a\":1}'::jsonb", "TEXT", "{\\\"a\\\": 1}"),
            ("'2026-02-28'::date", "TEXT", "1 | \"2026-02-28\""),
            ("'23:59:01.5'::time", "TEXT", "1 | \"23:59:01.5\""),
            ("'2026-02-28 12:00:00'::timestamp", "TEXT", "1 | \"2026-02-28T12:00:00Z\""),
            ("'2026-02-28 12:00:00.25+02'::timestamptz", "TEXT", "1 | \"2026-02-28T10:00:00.25Z\""),
            ("'9999-12-31 00:00:00'::timestamp", "TEXT", "1 | \"9999-12-31T00:00:00Z\""),
            ("'9999-12-31 23:59:59+00'::timestamptz", "TEXT", "1 | \"9999-12-31T23:59:59Z\""),
            ("'infinity'::timestamptz", "TEXT", "infinite"),
            ("NULL::text", "TEXT", "1 | NULL"),
            ("'1 day'::interval", "TEXT", "INTERVAL, which is not supported: cast it to text"),
            ("'12'", "INTEGER", "the text \"12\""),
            (":zone::varchar", "TEXT", "1 | \"east\""),
            ("1 || ':zone' || $$:zone$$", "TEXT", "1 | \"1:zone:zone\""),
        ],
    )
    .await;
    db.close().await;
}

#[tokio::test]
async fn mariadb_values_come_exactly_or_not_at_all() {
    let server = MariaDb::start();
    server.sql("src", "CREATE TABLE v (id INT, a TINYINT(1), b BIGINT UNSIGNED, c DECIMAL(20,4), d DATETIME(3), e DATE, f TIME, g BIT(9), h YEAR, i ENUM('x','y'), j VARBINARY(9), k FLOAT, l TIMESTAMP NULL, m JSON, n MEDIUMINT, z VARCHAR(9), o TINYINT(1) UNSIGNED, p TINYINT(1));
        SET sql_mode = ''; INSERT INTO v VALUES (1, 1, 18446744073709551615, 12.3400, '2026-02-28 12:00:00.250', '0000-00-00', '-26:03:04', b'100000001', 2026, 'y', x'00ff', 0.5, '2026-02-28 12:00:00', '{\"a\": 1}', -8388608, 'east', 200, -56)");
    let mut db = open(&server.url("src")).await;
    let mut cases = Vec::new();
    for (column, ty, want) in [
        ("a", "INTEGER", "1 | 1"),
        ("b", "INTEGER", "is 18446744073709551615, beyond"),
        ("b", "TEXT", "\"18446744073709551615\""),
        ("c", "TEXT", "1 | \"12.3400\""),
        ("c", "INTEGER", "scale it"),
        ("c * 10000", "INTEGER", "1 | 123400"),
        ("CAST(round(CAST('19.99' AS DECIMAL(9,2)) * 100) AS SIGNED)", "INTEGER", "1 | 1999"),
        ("CAST(round(1.15e0 * 100) AS SIGNED)", "INTEGER", "1 | 115"),
        ("d", "TEXT", "1 | \"2026-02-28T12:00:00.25Z\""),
        ("CAST('9999-12-31 23:59:59' AS DATETIME)", "TEXT", "1 | \"9999-12-31T23:59:59Z\""),
        ("e", "TEXT", "0000-00-00"),
        ("NULLIF(e, '0000-00-00')", "TEXT", "1 | NULL"),
        ("f", "TEXT", "1 | \"-26:03:04\""),
        ("g", "INTEGER", "1 | 257"),
        ("h", "INTEGER", "1 | 2026"),
        ("i", "TEXT", "1 | \"y\""),
        ("j", "BLOB", "1 | blob of 2 bytes"),
        ("k", "REAL", "1 | 0.5"),
        ("m", "TEXT", "{\\\"a\\\": 1}"),
        ("z COLLATE utf8mb4_bin", "TEXT", "1 | \"east\""),
        ("n", "INTEGER", "1 | -8388608"),
        ("o", "INTEGER", "1 | 200"),
        ("p", "INTEGER", "1 | -56"),
        ("'é :zone'", "TEXT", "1 | \"é :zone\""),
        ("CAST('é' AS CHAR)", "TEXT", "1 | \"é\""),
    ] {
        cases.push((format!("{column} AS v FROM v WHERE z = :zone # :zone\n AND id = 1 OR z = :zone -- x"), ty, want));
    }
    for (sql, ty, want) in cases {
        let got = read(&mut db, Dialect::MySql, &table(&[("v", ty)]), &format!("SELECT 1 AS id, {sql}")).await.unwrap();
        assert!(got[0].contains(want), "{sql} into {ty}: {} where {want} was wanted", got[0]);
    }
    db.close().await;
}

/// `000421` of a ZEROFILL column comes as 421, which as a text is another key.
#[tokio::test]
async fn a_number_with_zeros_before_it_is_no_text_without_them() {
    let server = MariaDb::start();
    server.sql("src", "CREATE TABLE a (id INT, z INT(6) ZEROFILL); INSERT INTO a VALUES (1, 421)");
    let mut db = open(&server.url("src")).await;
    let (text, number) = (table(&[("z", "TEXT")]), table(&[("z", "INTEGER")]));
    let query = parse_query("SELECT id, z FROM a", Dialect::MySql, AudienceKind::All).unwrap();
    for e in [
        read(&mut db, Dialect::MySql, &text, "SELECT id, z FROM a").await.unwrap_err(),
        db.probe(&text, &query).await.unwrap_err().to_string(),
        db.stores(&parse_query("SELECT z AS id FROM a", Dialect::MySql, AudienceKind::All).unwrap())
            .await
            .unwrap_err()
            .to_string(),
    ] {
        assert!(e.contains("is ZEROFILL") && e.contains("AS CHAR)"), "{e}");
    }
    for (t, sql, want) in [
        (&text, "SELECT id, CAST(z AS CHAR) AS z FROM a", "1 | \"000421\""),
        (&text, "SELECT id, z + 0 AS z FROM a", "1 | \"421\""),
        (&number, "SELECT id, z FROM a", "1 | 421"),
    ] {
        assert_eq!(read(&mut db, Dialect::MySql, t, sql).await.unwrap(), [want], "{sql}");
    }
    db.close().await;
}

/// Queries have the clock of `source.time_zone`; times without a zone are that clock's, those with one stay.
#[tokio::test]
async fn times_without_a_zone_are_those_of_the_sources_time_zone() {
    let (postgres, maria) = (Postgres::start(), MariaDb::start());
    postgres.sql("src", "ALTER DATABASE src SET TimeZone = 'America/New_York'");
    for (zone, cases) in [
        (
            "Asia/Shanghai",
            &[
                ("current_setting('TimeZone')", "TEXT", "Asia/Shanghai"),
                ("(localtimestamp - (now() AT TIME ZONE 'UTC'))::text", "TEXT", "\"08:00:00\""),
                ("'2026-02-28 13:00:00'::timestamp", "TEXT", "2026-02-28T05:00:00Z"),
                ("'2026-02-28 13:00:00+00'::timestamptz", "TEXT", "2026-02-28T13:00:00Z"),
                ("'9999-12-31 23:59:59'::timestamp", "TEXT", "9999-12-31T23:59:59Z"),
                ("'2026-02-28'::date", "TEXT", "\"2026-02-28\""),
            ][..],
        ),
        (
            // As PostgreSQL itself understands the hour that is left out and the one that comes twice.
            "Europe/Berlin",
            &[
                ("'2026-03-29 02:30'::timestamp", "TEXT", "2026-03-29T01:30:00Z"),
                ("('2026-03-29 02:30'::timestamp)::timestamptz", "TEXT", "2026-03-29T01:30:00Z"),
                ("'2026-10-25 02:30'::timestamp", "TEXT", "2026-10-25T01:30:00Z"),
                ("('2026-10-25 02:30'::timestamp)::timestamptz", "TEXT", "2026-10-25T01:30:00Z"),
            ],
        ),
    ] {
        let mut db = open_with(&postgres.url("src"), 60, zone).await;
        assert!(read(&mut db, Dialect::Postgres, &table(&[("v", "TEXT")]), "SELECT id, v FROM missing").await.is_err());
        each(&mut db, Dialect::Postgres, cases).await;
        db.close().await;
    }
    maria.sql(
        "src",
        "SET time_zone = '+00:00'; CREATE TABLE v (id INT, a TIMESTAMP(2) NULL, b TIMESTAMP NULL, c TIMESTAMP NULL, d DATETIME);
        INSERT INTO v VALUES (1, '2026-02-28 12:00:00.25', '2026-10-25 00:30:00', '2026-10-25 01:30:00', '2026-10-25 02:30:00')",
    );
    for (zone, offset, d) in
        [("Asia/Shanghai", "8", "2026-10-24T18:30:00Z"), ("Asia/Kolkata", "5", "2026-10-24T21:00:00Z")]
    {
        let mut db = open_with(&maria.url("src"), 60, zone).await;
        for (column, want) in [
            ("a", "2026-02-28T12:00:00.25Z"),
            ("b", "2026-10-25T00:30:00Z"),
            ("c", "2026-10-25T01:30:00Z"),
            ("d", d),
            ("CAST('9999-12-31 23:59:59' AS DATETIME)", "9999-12-31T23:59:59Z"),
            ("TIMESTAMPDIFF(HOUR, UTC_TIMESTAMP(), NOW())", offset),
        ] {
            let sql = format!("SELECT id, {column} AS v FROM v");
            let got = read(&mut db, Dialect::MySql, &table(&[("v", "TEXT")]), &sql).await.unwrap();
            assert_eq!(got, [format!("1 | \"{want}\"")], "{column} in {zone}");
        }
        db.close().await;
    }
    let mut db = open_with(&maria.url("src"), 60, "Europe/Berlin").await;
    for (column, want) in [("b", "2026-10-25T00:30:00Z"), ("c", "2026-10-25T01:30:00Z"), ("d", "2026-10-25T01:30:00Z")]
    {
        let sql = format!("SELECT id, {column} AS v FROM v");
        let got = read(&mut db, Dialect::MySql, &table(&[("v", "TEXT")]), &sql).await.unwrap();
        assert_eq!(got, [format!("1 | \"{want}\"")], "{column} in Berlin");
    }
    db.close().await;
}

#[tokio::test]
async fn a_run_reads_one_snapshot_and_survives_a_broken_query() {
    let (postgres, maria) = (Postgres::start(), MariaDb::start());
    let tables = "CREATE TABLE a (id INT PRIMARY KEY, v VARCHAR(20)); INSERT INTO a VALUES (1, 'old')";
    postgres.sql("src", tables);
    maria.sql("src", tables);
    for (url, dialect) in [(postgres.url("src"), Dialect::Postgres), (maria.url("src"), Dialect::MySql)] {
        let mut db = open(&url).await;
        let change = "UPDATE a SET v = 'new'; INSERT INTO a VALUES (2, 'more')";
        match dialect {
            Dialect::Postgres => postgres.sql("src", change),
            _ => maria.sql("src", change),
        };
        let t = table(&[("v", "TEXT")]);
        let e = read(&mut db, dialect, &t, "SELECT id, v FROM missing").await.unwrap_err();
        assert!(e.contains("table t: the query failed") && e.contains("missing"), "{e}");
        let e = read(&mut db, dialect, &t, "SELECT id, v AS w FROM a WHERE 1 = 0").await.unwrap_err();
        assert!(e.contains("column `w` is not in the contract; column v is missing"), "{e}");
        assert!(
            read(&mut db, dialect, &t, "SELECT id, v FROM a WHERE 1 / (id - id) = 1 OR id = 'x'").await.is_err()
                || dialect == Dialect::MySql
        );
        assert_eq!(read(&mut db, dialect, &t, "SELECT v, id FROM a").await.unwrap(), ["1 | \"old\""]);
        db.close().await;
        let mut db = open(&url).await;
        assert_eq!(
            read(&mut db, dialect, &t, "SELECT id, v FROM a ORDER BY id").await.unwrap(),
            ["1 | \"new\"", "2 | \"more\""]
        );
        assert!(read(&mut db, dialect, &t, "UPDATE a SET v = 'x' RETURNING id, v").await.is_err(), "read only");
        let stores = parse_query("SELECT id, 'east' AS zone FROM a", dialect, AudienceKind::All).unwrap();
        let ids: Vec<String> = db.stores(&stores).await.unwrap().into_iter().map(|s| s.id.to_string()).collect();
        assert_eq!(ids, ["1", "2"]);
        db.close().await;
    }
}

/// The first zone's packs are made for minutes, while its session waits to be asked for the second one's rows.
#[tokio::test]
async fn a_servers_limits_for_idle_sessions_end_no_snapshot() {
    let (postgres, maria) = (Postgres::start(), MariaDb::start());
    postgres.sql("src", "ALTER DATABASE src SET idle_in_transaction_session_timeout = '1h'");
    maria.sql("src", "SET GLOBAL wait_timeout = 3600");
    for (url, dialect, asked, want) in [
        (postgres.url("src"), Dialect::Postgres, "current_setting('idle_in_transaction_session_timeout')", "1 | \"0\""),
        (maria.url("src"), Dialect::MySql, "CAST(@@wait_timeout AS CHAR)", "1 | \"28800\""),
    ] {
        let mut db = open(&url).await;
        // A query that fails goes back to the beginning, and not before that.
        read(&mut db, dialect, &table(&[("v", "TEXT")]), "SELECT 1 AS id, nothing AS v").await.unwrap_err();
        each(&mut db, dialect, &[(asked, "TEXT", want)]).await;
        db.close().await;
    }
}

/// A snapshot older than a TRUNCATE sees the table empty: of a left join that would be prices that never were.
#[tokio::test]
async fn a_table_truncated_under_the_snapshot_is_refused_until_the_next_run() {
    let server = Postgres::start();
    server.sql(
        "src",
        "CREATE TABLE b (id INT PRIMARY KEY, v TEXT); INSERT INTO b VALUES (1, 'base'), (2, 'base');
         CREATE TABLE o (id INT PRIMARY KEY, v TEXT); INSERT INTO o VALUES (1, 'old');
         CREATE TABLE p (id INT, v TEXT) PARTITION BY LIST (id); CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
         INSERT INTO p VALUES (2, 'old');
         CREATE MATERIALIZED VIEW m AS SELECT id, v FROM b;
         CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
    );
    let url = server.url("src").replace("hq@", "reader@");
    let t = table(&[("v", "TEXT")]);
    let sql =
        "SELECT id, coalesce(o.v, p.v, m.v) AS v FROM m LEFT JOIN o USING (id) LEFT JOIN p USING (id) ORDER BY id";
    for (change, told) in [
        ("TRUNCATE o; INSERT INTO o VALUES (1, 'old')", Some("table t: o:")),
        ("TRUNCATE p2; INSERT INTO p VALUES (2, 'old')", Some("table t: p2:")),
        ("ALTER TABLE o ALTER id TYPE BIGINT", Some("table t: o:")),
        (
            "CREATE TABLE n (LIKE o); INSERT INTO n SELECT * FROM o; DROP TABLE o; ALTER TABLE n RENAME TO o; GRANT SELECT ON o TO reader",
            Some("table t: o:"),
        ),
        (
            "CREATE TABLE s (LIKE o INCLUDING ALL); ALTER TABLE o RENAME TO q; ALTER TABLE s RENAME TO o;
             INSERT INTO o SELECT * FROM q; DROP TABLE q; GRANT SELECT ON o TO reader",
            Some("table t: o:"),
        ),
        ("DELETE FROM o; INSERT INTO o VALUES (1, 'old'); CREATE INDEX i ON o (v); REINDEX TABLE b", None),
        ("REFRESH MATERIALIZED VIEW m", Some("table t: m:")),
    ] {
        let mut db = open(&url).await;
        server.sql("src", change);
        let got = read(&mut db, Dialect::Postgres, &t, sql).await;
        match told {
            Some(told) => {
                let e = got.unwrap_err();
                assert!(e.contains(told) && e.contains("the next run can"), "{change}: {e}");
            }
            None => assert_eq!(got.unwrap(), ["1 | \"old\"", "2 | \"old\""], "{change}"),
        }
        let other = read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM b WHERE id = 1").await;
        assert_eq!(other.unwrap(), ["1 | \"base\""], "another table after {change}");
        db.close().await;
        let mut db = open(&url).await;
        let next = read(&mut db, Dialect::Postgres, &t, sql).await;
        assert_eq!(next.unwrap(), ["1 | \"old\"", "2 | \"old\""], "the next run after {change}");
        db.close().await;
    }
    // One that is just loaded anew is waited for, and then not seen: the list of stores is not taken, other tables are read.
    server
        .sql("src", "CREATE TABLE store (id TEXT); INSERT INTO store VALUES ('0421'); GRANT SELECT ON store TO reader");
    let mut db = open(&url).await;
    server.sql("src", "BEGIN; TRUNCATE store; INSERT INTO store VALUES ('0421'); COMMIT");
    let stores = parse_query("SELECT id FROM store", Dialect::Postgres, AudienceKind::All).unwrap();
    let e = db.stores(&stores).await.unwrap_err();
    assert!(matches!(&e, SourceError::Unseen { tables, .. } if tables == "store"), "{e}");
    assert_eq!(read(&mut db, Dialect::Postgres, &t, sql).await.unwrap(), ["1 | \"old\"", "2 | \"old\""]);
    db.close().await;
    // A view alone is read as it is now, and so is what does not read it after that.
    server.sql(
        "src",
        "CREATE FUNCTION of_b(i INT) RETURNS TEXT LANGUAGE plpgsql STABLE
         AS $$BEGIN RETURN (SELECT v FROM b WHERE id = i); END$$;
         CREATE VIEW w AS SELECT id, v FROM m; GRANT SELECT ON w TO reader",
    );
    let mut db = open(&url).await;
    server.sql("src", "INSERT INTO b VALUES (3, 'new'); REFRESH MATERIALIZED VIEW m");
    let got = read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM m WHERE 'east' = :zone ORDER BY id").await;
    assert_eq!(got.unwrap(), ["1 | \"base\"", "2 | \"base\"", "3 | \"new\""]);
    let other = read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM b ORDER BY id").await;
    assert_eq!(other.unwrap(), ["1 | \"base\"", "2 | \"base\""], "the snapshot");
    let joined = read(&mut db, Dialect::Postgres, &t, "SELECT id, o.v FROM b JOIN o USING (id)").await;
    assert_eq!(joined.unwrap(), ["1 | \"old\""], "two tables, and not the view");
    let parts = read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM p").await;
    assert_eq!(parts.unwrap(), ["2 | \"old\""]);
    let through = read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM w ORDER BY id").await;
    assert_eq!(through.unwrap(), ["1 | \"base\"", "2 | \"base\"", "3 | \"new\""]);
    for both in ["SELECT id, m.v FROM m JOIN b USING (id)", "SELECT id, of_b(id) AS v FROM m"] {
        let e = read(&mut db, Dialect::Postgres, &t, both).await.unwrap_err();
        assert!(e.contains("table t: m:"), "{both}: {e}");
    }
    db.close().await;
    // MariaDB refuses by itself.
    let server = MariaDb::start();
    server.sql("src", "CREATE TABLE o (id INT PRIMARY KEY, v VARCHAR(9)); INSERT INTO o VALUES (1, 'old')");
    for change in [
        "TRUNCATE o; INSERT INTO o VALUES (1, 'old')",
        "CREATE TABLE n LIKE o; INSERT INTO n SELECT * FROM o; RENAME TABLE o TO gone, n TO o",
    ] {
        let mut db = open(&server.url("src")).await;
        server.sql("src", change);
        let e = read(&mut db, Dialect::MySql, &t, "SELECT id, v FROM o").await.unwrap_err();
        assert!(e.contains("Table definition has changed"), "{change}: {e}");
        db.close().await;
    }
}

/// Between two reads nothing is put in the place of what was read: the second zone gets the rows of the first one's time.
#[tokio::test]
async fn what_is_read_for_one_zone_is_the_same_for_the_next() {
    let server = Postgres::start();
    server.sql(
        "src",
        "CREATE TABLE o (id INT PRIMARY KEY, v TEXT); INSERT INTO o VALUES (1, 'old');
         CREATE TABLE o2 (id INT PRIMARY KEY, v TEXT); INSERT INTO o2 VALUES (1, 'older');
         CREATE MATERIALIZED VIEW m AS SELECT id, v FROM o; CREATE TABLE p AS SELECT * FROM o",
    );
    let (url, t, sql) = (server.url("src"), table(&[("v", "TEXT")]), "SELECT id, v FROM o");
    let old = ["1 | \"old\""];
    let mut other = sqlx::PgConnection::connect(&url).await.unwrap();
    other.execute(sqlx::raw_sql("SET lock_timeout = '100ms'")).await.unwrap();
    let mut db = open(&url).await;
    for query in [sql, sql, "SELECT o.id, p.v FROM o JOIN p USING (id)"] {
        assert_eq!(read(&mut db, Dialect::Postgres, &t, query).await.unwrap(), old);
        let e = other.execute(sqlx::raw_sql("TRUNCATE o")).await.unwrap_err().to_string();
        assert!(e.contains("lock timeout"), "{e}");
    }
    // A view's lock is given up: a refresh between two zones is the newest rows for the second one, whole.
    assert_eq!(read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM m").await.unwrap(), old);
    other.execute(sqlx::raw_sql("REFRESH MATERIALIZED VIEW m")).await.unwrap();
    assert_eq!(read(&mut db, Dialect::Postgres, &t, "SELECT id, v FROM m").await.unwrap(), old);
    db.close().await;
    // Two that change places, emptied by DELETE before: the name has rows of long ago for the snapshot.
    let mut db = open(&url).await;
    server.sql(
        "src",
        "DELETE FROM o2; INSERT INTO o2 VALUES (1, 'new');
         ALTER TABLE o RENAME TO q; ALTER TABLE o2 RENAME TO o; ALTER TABLE q RENAME TO o2",
    );
    let e = read(&mut db, Dialect::Postgres, &t, sql).await.unwrap_err();
    assert!(e.contains("table t: o:"), "{e}");
    db.close().await;
    let mut db = open(&url).await;
    assert_eq!(read(&mut db, Dialect::Postgres, &t, sql).await.unwrap(), ["1 | \"new\""]);
    db.close().await;
}

/// A server that hangs holds up one stream for `row_timeout`; it is asked nothing more.
#[tokio::test]
async fn a_source_that_hangs_is_given_up() {
    let (postgres, maria) = (Postgres::start(), MariaDb::start());
    let tables = "CREATE TABLE a (id INT PRIMARY KEY, v VARCHAR(20)); INSERT INTO a VALUES (1, 'old')";
    postgres.sql("src", tables);
    maria.sql("src", tables);
    postgres.sql("src", "CREATE TABLE b (id INT, v TEXT)");
    let mut locks = sqlx::PgConnection::connect(&postgres.url("src")).await.unwrap();
    locks.execute(sqlx::raw_sql("BEGIN; LOCK TABLE b")).await.unwrap();
    for (url, dialect, hangs) in [
        (postgres.url("src"), Dialect::Postgres, "SELECT id, v FROM a WHERE pg_sleep(600) IS NOT NULL"),
        (postgres.url("src"), Dialect::Postgres, "SELECT id, v FROM b"),
        (maria.url("src"), Dialect::MySql, "SELECT id, v FROM a WHERE SLEEP(600) = 0"),
    ] {
        let all = async {
            let mut db = open_with(&url, 3, "UTC").await;
            let t = table(&[("v", "TEXT")]);
            let e = read(&mut db, dialect, &t, hangs).await.unwrap_err();
            assert!(e.contains("table t: no answer within source.row_timeout = 3 s"), "{e}");
            for _ in 0..9 {
                let e = read(&mut db, dialect, &t, "SELECT id, v FROM a").await.unwrap_err();
                assert!(e.contains("table t: not asked"), "{e}");
            }
            db.close().await;
        };
        tokio::time::timeout(Duration::from_secs(60), all).await.expect(hangs);
    }
}

#[tokio::test]
async fn sqlite_values_come_exactly_or_not_at_all_from_one_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hq.db");
    let writer = rusqlite::Connection::open(&path).unwrap();
    writer
        .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE a (id INT, v); INSERT INTO a VALUES (1, 'old')")
        .unwrap();
    let mut db = open(&format!("sqlite:{}", path.display())).await;
    writer.execute_batch("UPDATE a SET v = 'new'").unwrap();
    let t = table(&[("v", "TEXT")]);
    assert!(read(&mut db, Dialect::Sqlite, &t, "SELECT id, v FROM b").await.unwrap_err().contains("no such table: b"));
    assert_eq!(read(&mut db, Dialect::Sqlite, &t, "SELECT id, v FROM a").await.unwrap(), ["1 | \"old\""]);
    assert!(
        read(&mut db, Dialect::Sqlite, &t, "INSERT INTO a VALUES (2, 'x') RETURNING id, v").await.is_err(),
        "read only"
    );
    each(
        &mut db,
        Dialect::Sqlite,
        &[
            ("9223372036854775807", "INTEGER", "1 | 9223372036854775807"),
            ("12.0", "INTEGER", "1 | 12"),
            ("12.5", "INTEGER", "the real 12.5"),
            ("9e999", "REAL", "inf, which is no number"),
            ("7", "REAL", "1 | 7.0"),
            ("9007199254740993", "REAL", "would round"),
            ("CAST(round(19.99 * 100) AS INTEGER)", "INTEGER", "1 | 1999"),
            ("CAST(round(1.15 * 100) AS INTEGER)", "INTEGER", "1 | 115"),
            ("'12'", "INTEGER", "the text \"12\""),
            ("12", "TEXT", "1 | \"12\""),
            ("'a' || char(0) || 'b'", "TEXT", "has a NUL character (byte 2)"),
            ("CAST(x'6162ff' AS TEXT)", "TEXT", "is not UTF-8 (byte 3)"),
            ("x'00'", "TEXT", "a blob of 1 bytes"),
            ("x'00'", "BLOB", "1 | blob of 1 bytes"),
            (":zone || ':zone'", "TEXT", "1 | \"east:zone\""),
        ],
    )
    .await;
    db.close().await;
}

//! PostgreSQL and MariaDB, tuned for tests: nothing is synced.

use super::{ready, with_free_port};
use crate::process::{Process, command, give, program, succeed};
use rustix::process::Signal;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// A PostgreSQL server; the newest that the machine has.
#[derive(Debug)]
pub struct Postgres {
    // Ended before its directory goes.
    _process: Process,
    port: u16,
    _dir: TempDir,
}

impl Postgres {
    /// Starts one with a database `src` (user `hq`, no password). About two seconds.
    #[track_caller]
    pub fn start() -> Postgres {
        sweep();
        let dir = crate::temp_dir(NAME);
        give(dir.path(), "postgres");
        let data = dir.path().join("data");
        let mut init = command(&program("initdb"), Some("postgres"), "KILL");
        init.args(["-U", "hq", "--auth=trust", "--no-sync", "--locale=C.UTF-8", "-E", "UTF8", "--wal-segsize=1", "-D"]);
        init.arg(&data);
        succeed(init.env("HOME", dir.path()).current_dir(dir.path()));
        let log = dir.path().join("log");
        let (process, port) = with_free_port(|port| {
            let mut server = command(&program("postgres"), Some("postgres"), "INT");
            server.arg("-D").arg(&data).args(["-p", &port.to_string(), "-k"]).arg(dir.path());
            for setting in [
                "listen_addresses=127.0.0.1",
                "fsync=off",
                "synchronous_commit=off",
                "full_page_writes=off",
                "shared_buffers=32MB",
                "max_connections=200",
                "wal_level=logical",
            ] {
                server.args(["-c", setting]);
            }
            server.env("HOME", dir.path()).current_dir(dir.path());
            let mut process = Process::spawn("postgres", server, &log).gentle(Signal::INT);
            ready(&mut process, "PostgreSQL", || {
                psql(port, "postgres").args(["-c", "SELECT 1"]).output().unwrap().status.success()
            })?;
            Ok((process, port))
        });
        let server = Postgres { _process: process, port, _dir: dir };
        server.create_database("src");
        server
    }

    /// Makes a database and gives its URL.
    #[track_caller]
    pub fn create_database(&self, name: &str) -> String {
        succeed(psql(self.port, "postgres").args(["-c", &format!("CREATE DATABASE {name}")]));
        self.url(name)
    }

    /// `postgres://hq@127.0.0.1:PORT/NAME`.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://hq@127.0.0.1:{}/{database}", self.port)
    }

    /// `127.0.0.1:PORT`, for a proxy.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Runs SQL in a database; panics if it fails. Rows come back as lines, columns parted by `|`.
    #[track_caller]
    pub fn sql(&self, database: &str, sql: &str) -> String {
        use_stdin(psql(self.port, database).args(["-v", "ON_ERROR_STOP=1", "-1"]), sql)
    }

    /// Runs one command that may not stand in a transaction.
    #[track_caller]
    pub fn command(&self, database: &str, sql: &str) {
        succeed(psql(self.port, database).args(["-c", sql]));
    }
}

/// Of the directories of servers.
const NAME: &str = "postgres";

/// Takes away what servers left that are gone: one in a `static` of a test program is ended with it, and its directory stays.
fn sweep() {
    let here = std::env::temp_dir();
    for entry in std::fs::read_dir(&here).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_old = || {
            let made = entry.metadata().and_then(|m| m.modified()).ok();
            made.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > Duration::from_secs(600))
        };
        let is_ours = name.to_str().is_some_and(|n| n.starts_with(&format!("tillcast-{NAME}-")));
        if is_ours && is_old() && !entry.path().join("data/postmaster.pid").exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn psql(port: u16, database: &str) -> Command {
    let mut c = Command::new(program("psql"));
    c.args(["-h", "127.0.0.1", "-U", "hq", "-X", "-q", "-A", "-t", "-p", &port.to_string(), "-d", database]);
    c.env("PGCONNECT_TIMEOUT", "60").current_dir("/");
    c
}

/// A MariaDB server.
#[derive(Debug)]
pub struct MariaDb {
    _process: Process,
    port: u16,
    dir: TempDir,
}

impl MariaDb {
    /// Starts one with a database `src`; user `hq`, password `secret`. About two seconds.
    #[track_caller]
    pub fn start() -> MariaDb {
        let dir = crate::temp_dir("mariadb");
        give(dir.path(), "nobody");
        let data = dir.path().join("data");
        let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let mut init = command(&program("mariadb-install-db"), Some("nobody"), "KILL");
        init.args([
            "--no-defaults",
            &option("datadir", &data),
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]);
        // A server that starts clears away the temporary tables of those that share its directory.
        succeed(init.env("HOME", dir.path()).env("TMPDIR", dir.path()).current_dir(dir.path()));
        let log = dir.path().join("log");
        let (process, port) = with_free_port(|port| {
            let mut server = command(&program("mariadbd"), Some("nobody"), "KILL");
            server.args(["--no-defaults", &option("datadir", &data), "--bind-address=127.0.0.1", "--skip-log-bin"]);
            server.args([
                &format!("--port={port}"),
                &option("socket", &dir.path().join("s")),
                &option("pid-file", &dir.path().join("pid")),
            ]);
            server.args(["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--skip-networking=0"]);
            server.env("HOME", dir.path()).env("TMPDIR", dir.path()).current_dir(dir.path());
            let mut process = Process::spawn("mariadbd", server, &log);
            ready(&mut process, "MariaDB", || {
                mariadb(dir.path(), "").args(["-e", "SELECT 1"]).output().unwrap().status.success()
            })?;
            Ok((process, port))
        });
        let server = MariaDb { _process: process, port, dir };
        server.sql("", "CREATE USER hq@'127.0.0.1' IDENTIFIED BY 'secret'");
        server.create_database("src");
        server
    }

    /// Makes a database (utf8mb4) and gives its URL.
    #[track_caller]
    pub fn create_database(&self, name: &str) -> String {
        self.sql("", &format!("CREATE DATABASE {name} CHARACTER SET utf8mb4; GRANT ALL ON {name}.* TO hq@'127.0.0.1'"));
        self.url(name)
    }

    /// `mysql://hq:secret@127.0.0.1:PORT/NAME`.
    pub fn url(&self, database: &str) -> String {
        format!("mysql://hq:secret@127.0.0.1:{}/{database}", self.port)
    }

    /// `127.0.0.1:PORT`, for a proxy.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Runs SQL in a database as root; panics if it fails. Rows come back as lines, columns parted by tabs.
    #[track_caller]
    pub fn sql(&self, database: &str, sql: &str) -> String {
        use_stdin(&mut mariadb(self.dir.path(), database), sql)
    }
}

fn mariadb(dir: &Path, database: &str) -> Command {
    let mut c = Command::new(program("mariadb"));
    c.args(["--no-defaults", "-uroot", "-N", "-B", "--default-character-set=utf8mb4", "-S"]).arg(dir.join("s"));
    if !database.is_empty() {
        c.arg(database);
    }
    c
}

/// Runs a client with a script on its stdin (scripts may be longer than a command line).
#[track_caller]
fn use_stdin(client: &mut Command, script: &str) -> String {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, script.as_bytes()).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    succeed(client.stdin(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_starts_and_answers() {
        let pg = Postgres::start();
        pg.sql("src", "CREATE TABLE t (a int, b text); INSERT INTO t VALUES (1, 'Zürich')");
        assert_eq!(pg.sql("src", "SELECT a, b FROM t").trim(), "1|Zürich");
    }

    #[test]
    fn mariadb_starts_and_answers() {
        let db = MariaDb::start();
        db.sql("src", "CREATE TABLE t (a int, b text); INSERT INTO t VALUES (1, 'Zürich')");
        assert_eq!(db.sql("src", "SELECT a, b FROM t").trim(), "1\tZürich");
    }
}

//! `doctor`: tries everything that publishing and serving rely on, and says what to do about what
//! fails. Changes nothing but a probe object, which it deletes.

use crate::bucket::{Bucket, Buckets, Conditions};
use crate::config::{Config, SourceKind};
use crate::keys::{KeyFile, Keyring, Role};
use crate::ledger::{Kind, Ledger};
use crate::mail::Smtp;
use crate::manifests::{self, ManifestsError, ends_soon, newer_in_bucket, newest_trust};
use crate::publish::contracts::{self, Contracts};
use crate::some::some;
use crate::source_db::Database;
use proto::clock::{Clock, since};
use proto::owner::User;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// As it should be.
    Pass,
    /// It works, but.
    Warn,
    /// It does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was tried.
    pub name: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Check {
    /// The line for people.
    pub fn line(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Pass => "PASS",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        let hint = self.hint.as_deref().map(|h| format!("\n       {h}")).unwrap_or_default();
        format!("{verdict}  {}: {}{hint}", self.name, self.found)
    }
}

#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, verdict: Verdict, name: &str, found: impl ToString, hint: &str) {
        let hint = (verdict != Verdict::Pass && !hint.is_empty()).then(|| hint.to_owned());
        self.0.push(Check { name: name.to_owned(), verdict, found: found.to_string(), hint });
    }
    fn pass(&mut self, name: &str, found: impl ToString) {
        self.add(Verdict::Pass, name, found, "");
    }
    fn warn(&mut self, name: &str, found: impl ToString, hint: &str) {
        self.add(Verdict::Warn, name, found, hint);
    }
    fn fail(&mut self, name: &str, found: impl ToString, hint: &str) {
        self.add(Verdict::Fail, name, found, hint);
    }
}

/// The oldest SQLite whose write-ahead log can be relied on.
const SQLITE: i32 = 3_051_003;

/// Free room below which a full pack may not fit.
const ROOM: u64 = 1 << 30;

/// Tries everything.
pub async fn run(config: &Config, clock: &dyn Clock) -> Vec<Check> {
    let mut c = Checks::default();
    let contracts = match contracts::load(config) {
        Ok(contracts) => {
            c.pass("contracts", format!("{} streams", contracts.streams.len()));
            Some(contracts)
        }
        Err(e) => {
            c.fail("contracts", e, "mend the contract or the query that it names");
            None
        }
    };
    sqlite(&mut c);
    disk(config, &mut c);
    // Another user could not tell wrong from not allowed, and would leave files that the publisher cannot write.
    let ledger = if is_owner(config, &mut c) {
        let keys = keys(config, &mut c);
        let ledger = ledger(config, &mut c).await;
        if let Some(ledger) = &ledger {
            // Without a look at the keys nobody can say that they are the wrong ones.
            if let Some(keys) = keys {
                trust(config, ledger, &keys, clock, &mut c).await;
            }
            clock_against_ledger(config, ledger, clock, &mut c).await;
            for url in &config.objects.urls {
                bucket(config, ledger, url, clock, &mut c).await;
            }
            ledger_against_bucket(config, ledger, &mut c).await;
        }
        ledger
    } else {
        None
    };
    source(config, contracts.as_ref(), ledger.as_ref(), &mut c).await;
    mail(config, &mut c).await;
    serve(config, &mut c).await;
    c.0
}

fn sqlite(c: &mut Checks) {
    let found = rusqlite::version();
    if rusqlite::version_number() >= SQLITE {
        c.pass("SQLite", found);
    } else {
        c.fail("SQLite", found, "3.51.3 or later is needed: older ones can damage a database while checkpointing");
    }
}

fn disk(config: &Config, c: &mut Checks) {
    let dir = &config.state.dir;
    match proto::shelf::free_space(dir) {
        Ok(s) if s.free < ROOM => {
            c.warn(
                "disk",
                format!("{} MiB free for {}", s.free >> 20, dir.display()),
                "packs and replicas are written here: make room",
            );
        }
        Ok(s) => c.pass("disk", format!("{} MiB free for {}", s.free >> 20, dir.display())),
        Err(e) => c.fail("disk", e, "run `hq-publisher init`, or mend state.dir"),
    }
}

/// Whether this user is the one whose files these are. What root or a colleague's shell left behind the publisher cannot
/// write.
fn is_owner(config: &Config, c: &mut Checks) -> bool {
    let dir = &config.state.dir;
    // `disk` told of it.
    if !dir.exists() {
        return true;
    }
    match proto::owner::check(dir, "keys") {
        Ok(()) => c.pass("owner", format!("all in {} is {}'s", dir.display(), User::me())),
        Err(e) => {
            c.fail("owner", e, "keys, ledger and buckets are looked at by the owner of state.dir alone");
            return false;
        }
    }
    true
}

/// The publisher's keys; none if they cannot be read.
fn keys(config: &Config, c: &mut Checks) -> Option<Vec<KeyFile>> {
    let ring = Keyring::new(config.state.keys());
    match ring.exposed() {
        Ok(exposed) if exposed.is_empty() => {
            c.pass("key files", format!("in {}, readable by their owner alone", ring.dir().display()))
        }
        Ok(exposed) => {
            let names: Vec<String> = exposed.iter().map(|p| p.display().to_string()).collect();
            c.fail(
                "key files",
                format!("others may read {}", names.join(", ")),
                "chmod 600; if somebody may have: `trust rotate`",
            );
        }
        Err(e) => {
            c.fail("key files", e, "restore the file from its backup");
            return None;
        }
    }
    if ring.keys(Role::Root).is_ok_and(|r| !r.is_empty()) {
        c.warn(
            "root key",
            "it lies on this machine",
            "move root-*.key offline (keep two copies) and name it by --root-key when keys change",
        );
    }
    ring.keys(Role::Publisher).ok()
}

async fn ledger(config: &Config, c: &mut Checks) -> Option<Ledger> {
    // Opened, it would be made, and perhaps not as whose it is to be.
    let url = config.state.database_url();
    if let Some(path) = proto::config::sqlite_path(&url)
        && matches!(path.try_exists(), Ok(false))
    {
        c.fail("ledger", format!("there is no {}", path.display()), "run `hq-publisher init`");
        return None;
    }
    // It opens by a transaction that writes.
    match Ledger::open(config).await {
        Ok(l) => {
            c.pass("ledger", if l.kind() == Kind::Sqlite { "SQLite" } else { "PostgreSQL" });
            Some(l)
        }
        Err(e) => {
            c.fail("ledger", e, "mend state.database");
            None
        }
    }
}

async fn trust(config: &Config, ledger: &Ledger, files: &[KeyFile], clock: &dyn Clock, c: &mut Checks) {
    let trust = match newest_trust(ledger, &config.limits).await {
        Ok(Some(trust)) => trust,
        Ok(None) => return c.fail("trust", "there is no trust file", "run `hq-publisher init`"),
        Err(e) => return c.fail("trust", e, ""),
    };
    let ours = trust.publishers.iter().rev().find(|p| files.iter().any(|f| f.public() == p.key));
    match ours {
        None => c.fail(
            "trust",
            format!("no publisher key of trust file {} is here", trust.version),
            "copy its file to the keys directory, or `trust rotate`",
        ),
        Some(p) if ends_soon(config, p, clock.now()) => {
            c.warn(
                "trust",
                format!("publisher key {} may sign until {}", p.key.id(), p.expires_at),
                "run `hq-publisher trust rotate`",
            );
        }
        Some(p) => c.pass(
            "trust",
            format!("file {}, epoch {}, key {} until {}", trust.version, trust.epoch, p.key.id(), p.expires_at),
        ),
    }
}

async fn clock_against_ledger(config: &Config, ledger: &Ledger, clock: &dyn Clock, c: &mut Checks) {
    let now = clock.now();
    match ledger.latest_time().await {
        Ok(Some(last)) if since(now, last) > config.publish.clock_leap.0 => {
            c.warn(
                "clock",
                format!("{now}, long after the ledger's last time {last}"),
                "if it is right: publish once with --clock-is-right",
            );
        }
        Ok(Some(last)) if since(last, now) > Duration::from_secs(60) => {
            c.warn("clock", format!("{now}, before the ledger's last time {last}"), "set the clock");
        }
        Ok(_) => c.pass("clock", now),
        Err(e) => c.fail("clock", e, ""),
    }
}

async fn bucket(config: &Config, ledger: &Ledger, url: &str, clock: &dyn Clock, c: &mut Checks) {
    let name = format!("bucket {url}");
    let bucket = match Bucket::open(url, &config.objects) {
        Ok(bucket) => bucket,
        Err(e) => return c.fail(&name, e, "mend objects.urls or [objects.s3]"),
    };
    match bucket.probe().await {
        Ok(found) => {
            // What was found now is what puts go by from now on.
            let _ = bucket.remember(ledger, found).await;
            match found {
                Conditions::Honoured => c.pass(&name, "writable; create-only puts are honoured"),
                Conditions::Ignored => c.warn(
                    &name,
                    "writable; conditions on puts are ignored",
                    "names are looked at before each put; only the publisher's lease keeps two publishers apart",
                ),
                Conditions::Refused => c.warn(
                    &name,
                    "writable; conditions on puts are refused",
                    "names are looked at before each put; only the publisher's lease keeps two publishers apart",
                ),
            }
        }
        Err(e) => c.fail(
            &name,
            e,
            "check the URL, the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the permissions",
        ),
    }
    if let Some(date) = bucket.date().await {
        let apart = since(clock.now(), date).max(since(date, clock.now()));
        if apart > Duration::from_secs(60) {
            c.warn(
                &format!("{name} clock"),
                format!("it says {date}: {} s apart", apart.as_secs()),
                "set this machine's clock",
            );
        } else {
            c.pass(&format!("{name} clock"), format!("{} s apart", apart.as_secs()));
        }
    }
}

async fn inbox(config: &Config, dir: &Path, ledger: Option<&Ledger>, c: &mut Checks) {
    let found = match proto::shelf::list(dir) {
        Ok(found) => found,
        Err(e) => return c.fail("inbox", e, "make the directory, let the publisher's user in, or mend source.url"),
    };
    let closed: Vec<String> = std::iter::once(dir.to_owned())
        .chain(["done", "rejected"].map(|to| dir.join(to)))
        .filter(|d| d.exists() && !proto::owner::is_open(d))
        .map(|d| d.display().to_string())
        .collect();
    if closed.is_empty() {
        c.pass("inbox", format!("{} entries in {}", found.len(), dir.display()));
    } else {
        let found = format!("{} cannot write in {}", User::me(), closed.join(", "));
        c.fail(
            "inbox",
            found,
            "what was published is moved to done/ in it: let the publisher's user (or group) write there",
        );
    }
    // Once taken it is in done/, and the ledger knows what it said.
    let is_there = found.iter().any(|e| e.name == "stores.csv");
    let is_known = match ledger {
        Some(ledger) => ledger.stores().await.is_ok_and(|s| !s.is_empty()),
        // Before `init` none was read; after it, whoever cannot look says nothing.
        None => config.state.dir.exists(),
    };
    if !is_there && !is_known {
        c.warn(
            "stores",
            "there is no stores.csv in the inbox, and none was read before",
            "without stores nobody gets anything",
        );
    }
}

/// A ledger from a backup forgot what was signed since.
async fn ledger_against_bucket(config: &Config, ledger: &Ledger, c: &mut Checks) {
    let name = "ledger against bucket";
    let look = async {
        let buckets = Buckets::open(config, ledger).await?;
        let doubt = manifests::doubt(ledger, &buckets, &config.limits).await?;
        if let Some(lacking) = doubt.and_then(|d| d.refusal(&buckets)) {
            return Err(lacking);
        }
        newer_in_bucket(ledger, &buckets, &config.limits).await
    };
    match look.await {
        Err(e @ ManifestsError::Lacking { .. }) => c.fail(name, e, "publish puts nothing there before that is settled"),
        Ok(newer) if newer.is_empty() => c.pass(name, "nothing there is newer"),
        Ok(newer) => {
            c.fail(
                name,
                format!("the ledger is older than the bucket: {}", some(newer, "; ")),
                "it was set back, or another publisher writes there too. If it was set back: publish twice, then enroll or \
                 revoke again the devices that it forgot",
            );
        }
        Err(e) => c.warn(name, e, "it could not be compared"),
    }
}

async fn source(config: &Config, contracts: Option<&Contracts>, ledger: Option<&Ledger>, c: &mut Checks) {
    match config.source.kind() {
        Ok(SourceKind::Inbox(dir)) => inbox(config, &dir, ledger, c).await,
        Ok(_) => {
            let mut db = match Database::open(&config.source).await {
                Ok(db) => db,
                Err(e) => return c.fail("source", e, "mend source.url, or start the database"),
            };
            c.pass("source", "reached");
            for stream in contracts.map_or(&[][..], |c| &c.streams) {
                for table in &stream.contract.tables {
                    let Some(query) = stream.queries.get(&table.name) else { continue };
                    let name = format!("query {}.{}", stream.name, table.name);
                    match db.probe(table, query).await {
                        Ok(()) => c.pass(&name, "its columns are the contract's"),
                        Err(e) => c.fail(&name, e, "mend the query or the contract"),
                    }
                }
            }
            if let Some(query) = contracts.and_then(|c| c.stores.as_ref()) {
                match db.stores(query).await {
                    Ok(stores) if stores.is_empty() => {
                        c.warn("stores", "the query gives none", "nobody will get anything")
                    }
                    Ok(stores) => c.pass("stores", stores.len()),
                    Err(e) => c.fail("stores", e, "mend stores.query"),
                }
            }
            db.close().await;
        }
        Err(e) => c.fail("source", e, ""),
    }
}

async fn mail(config: &Config, c: &mut Checks) {
    let Some(mail) = &config.mail else {
        return c.warn("mail", "no [mail] in the settings", "alerts are only shown on the page and in the log");
    };
    match Smtp::new(mail) {
        Ok(smtp) => match smtp.test().await {
            Ok(()) => c.pass("mail", "the server answers"),
            Err(e) => c.fail("mail", e, "mend mail.smtp: host, port, tls, user, password, ca_file"),
        },
        Err(e) => c.fail("mail", e, ""),
    }
}

async fn serve(config: &Config, c: &mut Checks) {
    let url = format!("http://{}/healthz", config.serve.listen);
    let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy().build();
    let answer = match client {
        Ok(client) => client.get(&url).send().await.map(|r| r.status()).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    match answer {
        Ok(status) if status.is_success() => c.pass("serve", format!("runs at {}", config.serve.listen)),
        Ok(status) => {
            c.fail("serve", format!("something else answers at {} ({status})", config.serve.listen), "set serve.listen")
        }
        Err(_) => c.warn(
            "serve",
            format!("nothing answers at {}", config.serve.listen),
            "without `hq-publisher serve` relays only poll, and nobody is alerted",
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;
    use proto::clock::SystemClock;
    use std::os::unix::fs::{PermissionsExt, chown};

    async fn checks(dir: &Path) -> Vec<Check> {
        proto::fetch::install_tls();
        let config = crate::config::load(Some(&dir.join("hq.toml")), []).unwrap().value;
        run(&config, &SystemClock::default()).await
    }
    fn of<'c>(checks: &'c [Check], name: &str) -> &'c Check {
        checks.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("{name}: {checks:?}"))
    }
    fn inbox() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let text = "[source]\nurl = \"inbox:in\"\n[objects]\nurls = [\"file:objects\"]\n[state]\ndir = \"state\"\n";
        std::fs::write(dir.path().join("hq.toml"), text).unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        dir
    }

    #[tokio::test]
    async fn nothing_is_made_before_init() {
        let dir = inbox();
        let found = checks(dir.path()).await;
        for name in ["disk", "ledger"] {
            assert!(of(&found, name).hint.as_ref().unwrap().contains("init"), "{found:?}");
        }
        assert!(!dir.path().join("state").exists());
    }

    #[tokio::test]
    async fn a_ledger_by_a_url_with_escapes_is_looked_for_where_it_lies() {
        let dir = inbox();
        let file = dir.path().join("the fleet.db");
        let toml = dir.path().join("hq.toml");
        let text = std::fs::read_to_string(&toml).unwrap();
        std::fs::write(&toml, text + "database = \"sqlite:the%20fleet.db?mode=rwc\"\n").unwrap();
        let found = checks(dir.path()).await;
        assert!(of(&found, "ledger").found.contains(file.to_str().unwrap()), "{found:?}");
        Ledger::open(&crate::config::load(Some(&toml), []).unwrap().value).await.unwrap();
        assert!(file.exists());
        assert_eq!(of(&checks(dir.path()).await, "ledger").verdict, Verdict::Pass);
    }

    #[tokio::test]
    async fn the_wrong_user_is_told_so_and_of_no_backup() {
        if User::me() != User(0) {
            return; // Only root gives files away.
        }
        let dir = inbox();
        let keys = dir.path().join("state/keys");
        std::fs::create_dir_all(&keys).unwrap();
        std::fs::write(keys.join("publisher-1.key"), "unreadable").unwrap();
        chown(&keys, Some(65_533), None).unwrap();
        let found = checks(dir.path()).await;
        assert!(of(&found, "owner").found.contains("uid 65533"), "{found:?}");
        let judged = ["key files", "ledger", "trust"];
        assert!(found.iter().all(|c| !judged.contains(&&*c.name)), "{found:?}");
        assert!(!dir.path().join("objects").exists() && !dir.path().join("state/fleet.db").exists());
    }

    #[tokio::test]
    async fn an_inbox_that_cannot_be_cleared_or_names_no_stores_is_told() {
        let dir = inbox();
        let found = checks(dir.path()).await;
        assert!(of(&found, "stores").found.contains("no stores.csv"), "{found:?}");
        std::fs::write(dir.path().join("in/stores.csv"), "id\n1\n").unwrap();
        assert!(checks(dir.path()).await.iter().all(|c| c.name != "stores"));
        if User::me() == User(0) {
            return; // To root all is open.
        }
        std::fs::set_permissions(dir.path().join("in"), std::fs::Permissions::from_mode(0o500)).unwrap();
        let found = checks(dir.path()).await;
        assert!(of(&found, "inbox").found.contains("cannot write in"), "{found:?}");
    }
}

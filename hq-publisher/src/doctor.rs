//! `doctor`: tries everything that publishing and serving rely on, and says what to do about what
//! fails. Changes nothing but a probe object, which it deletes.

use crate::bucket::{Bucket, Buckets, Conditions};
use crate::config::{Config, SourceKind};
use crate::keys::{Keyring, Role};
use crate::ledger::{Kind, Ledger};
use crate::mail::Smtp;
use crate::manifests::{newer_in_bucket, newest_trust};
use crate::publish::contracts::{self, Contracts};
use crate::source_db::Database;
use proto::clock::{Clock, since};
use serde::Serialize;
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
    keys(config, &mut c);
    if let Some(ledger) = ledger(config, &mut c).await {
        trust(config, &ledger, clock, &mut c).await;
        clock_against_ledger(config, &ledger, clock, &mut c).await;
        for url in &config.objects.urls {
            bucket(config, &ledger, url, clock, &mut c).await;
        }
        ledger_against_bucket(config, &ledger, &mut c).await;
    }
    source(config, contracts.as_ref(), &mut c).await;
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

fn keys(config: &Config, c: &mut Checks) {
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
        Err(e) => c.fail("key files", e, "restore the file from its backup"),
    }
    if ring.keys(Role::Root).is_ok_and(|r| !r.is_empty()) {
        c.warn(
            "root key",
            "it lies on this machine",
            "move root-*.key offline (keep two copies) and name it by --root-key when keys change",
        );
    }
}

async fn ledger(config: &Config, c: &mut Checks) -> Option<Ledger> {
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

async fn trust(config: &Config, ledger: &Ledger, clock: &dyn Clock, c: &mut Checks) {
    let trust = match newest_trust(ledger, &config.limits).await {
        Ok(Some(trust)) => trust,
        Ok(None) => return c.fail("trust", "there is no trust file", "run `hq-publisher init`"),
        Err(e) => return c.fail("trust", e, ""),
    };
    let files = Keyring::new(config.state.keys()).keys(Role::Publisher).unwrap_or_default();
    let ours = trust.publishers.iter().rev().find(|p| files.iter().any(|f| f.public() == p.key));
    match ours {
        None => c.fail(
            "trust",
            format!("no publisher key of trust file {} is here", trust.version),
            "copy its file to the keys directory, or `trust rotate`",
        ),
        Some(p) if since(p.expires_at, clock.now()) < Duration::from_secs(30 * 86_400) => {
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

/// Lines told of what is newer in the bucket.
const LISTED: usize = 20;

/// A ledger from a backup forgot what was signed since.
async fn ledger_against_bucket(config: &Config, ledger: &Ledger, c: &mut Checks) {
    let name = "ledger against bucket";
    let newer = async {
        let buckets = Buckets::open(config, ledger).await?;
        newer_in_bucket(ledger, &buckets, &config.limits).await
    };
    match newer.await {
        Ok(newer) if newer.is_empty() => c.pass(name, "nothing there is newer"),
        Ok(newer) => {
            let told: Vec<&str> = newer.iter().take(LISTED).map(String::as_str).collect();
            let more = newer.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            c.fail(
                name,
                format!("the ledger is older than the bucket: {}{more}", told.join("; ")),
                "it was set back, or another publisher writes there too. If it was set back: publish twice, then enroll or \
                 revoke again the devices that it forgot",
            );
        }
        Err(e) => c.warn(name, e, "it could not be compared"),
    }
}

async fn source(config: &Config, contracts: Option<&Contracts>, c: &mut Checks) {
    match config.source.kind() {
        Ok(SourceKind::Inbox(dir)) => match proto::shelf::list(&dir) {
            Ok(found) => c.pass("inbox", format!("{} entries in {}", found.len(), dir.display())),
            Err(e) => c.fail("inbox", e, "make the directory, or mend source.url"),
        },
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

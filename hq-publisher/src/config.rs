//! `hq.toml`: every setting of this program, typed and checked before anything is touched.
//!
//! Owns names, defaults and the rules between settings. Reads nothing but the file and the
//! environment (through [`proto::config`]), and the machine's time zones; opens no database and no bucket.

use crate::hours::Hours;
use crate::source_db::times::SourceZone;
use proto::config::{ConfigError, HumanBytes, HumanDuration, Loaded, Secret};
use proto::fetch::S3Options;
use proto::http::HttpLimits;
use proto::ids::{StreamName, TableName};
use proto::limits::Limits;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

const fn s(n: u64) -> HumanDuration {
    HumanDuration(Duration::from_secs(n))
}
const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Deltas between two fulls, at most: a list names those before the last full, too, and is to be within
/// `limits.manifest_bytes`.
const MOST_DELTAS: u64 = 500;

/// All settings. Paths and URLs are absolute after [`load`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the data comes from.
    pub source: SourceConfig,
    /// Where the objects go.
    pub objects: ObjectsConfig,
    /// What this program keeps.
    pub state: StateConfig,
    /// Which stores there are.
    #[serde(default)]
    pub stores: StoresConfig,
    /// The streams, `[[stream]]`.
    #[serde(default, rename = "stream")]
    pub streams: Vec<StreamConfig>,
    /// The service.
    #[serde(default)]
    pub serve: ServeConfig,
    /// Whom to tell; without it alerts are only logged and shown.
    #[serde(default)]
    pub mail: Option<MailConfig>,
    /// When to tell.
    #[serde(default)]
    pub alerts: AlertsConfig,
    /// How to publish.
    #[serde(default)]
    pub publish: PublishConfig,
    /// Bounds on what is read.
    #[serde(default)]
    pub limits: Limits,
}

/// `[source]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// `sqlite:FILE`, `postgres://…`, `mysql://…` or `inbox:DIR`. May hold a password.
    pub url: Secret,
    /// The longest wait for a connection. 10 s.
    #[serde(default = "ten_seconds")]
    pub connect_timeout: HumanDuration,
    /// The longest wait for one row of a query. 10 min.
    #[serde(default = "ten_minutes")]
    pub row_timeout: HumanDuration,
    /// Of a PostgreSQL or MySQL database: the zone of its queries' clocks, by which its times without a zone are
    /// understood; an IANA name. UTC.
    #[serde(default)]
    pub time_zone: SourceZone,
    /// How long a drop's size must rest before it is taken, where no `NAME.ok` says so. 2 s.
    #[serde(default = "two_seconds")]
    pub rest: HumanDuration,
    /// How long a drop may wait for another one to whose rows its own refer; then it is rejected. 1 h.
    #[serde(default = "an_hour")]
    pub wait: HumanDuration,
}

fn ten_seconds() -> HumanDuration {
    s(10)
}
fn ten_minutes() -> HumanDuration {
    s(600)
}
fn two_seconds() -> HumanDuration {
    s(2)
}
fn an_hour() -> HumanDuration {
    s(3600)
}

/// What a source's URL names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceKind {
    /// A SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL URL.
    Postgres(String),
    /// A MySQL or MariaDB URL (`mysql://`; `mariadb://` is read as the same).
    MySql(String),
    /// A directory of file drops.
    Inbox(PathBuf),
}

impl SourceConfig {
    /// What the URL names; [`load`] has checked it.
    pub fn kind(&self) -> Result<SourceKind, ConfigError> {
        let url = self.url.reveal();
        if let Some(file) = proto::config::sqlite_path(url) {
            Ok(SourceKind::Sqlite(file))
        } else if let Some(rest) = url.strip_prefix("inbox:") {
            Ok(SourceKind::Inbox(PathBuf::from(rest.strip_prefix("//").unwrap_or(rest))))
        } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            Ok(SourceKind::Postgres(url.to_owned()))
        } else if let Some(rest) = url.strip_prefix("mariadb://").or(url.strip_prefix("mysql://")) {
            Ok(SourceKind::MySql(format!("mysql://{rest}")))
        } else {
            let scheme = url.split(':').next().unwrap_or_default();
            Err(ConfigError(format!(
                "source.url: `{scheme}:` is not known; use sqlite:FILE, postgres://…, mysql://… or inbox:DIR"
            )))
        }
    }
}

/// Whether a database's URL would set a session's time zone, by whatever name drivers have for it.
fn sets_time_zone(url: &str) -> bool {
    let names_it = |text: &str| text.replace(['-', '_'], "").to_ascii_lowercase().contains("timezone");
    let Ok(url) = url::Url::parse(url) else { return false };
    url.query_pairs().any(|(name, value)| names_it(&name) || name == "options" && names_it(&value))
}

/// `[objects]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectsConfig {
    /// Buckets, `file:///DIR` or `s3://BUCKET/PREFIX`. The first decides, the others are mirrors.
    pub urls: Vec<String>,
    /// For `s3://` buckets.
    #[serde(default)]
    pub s3: S3Options,
    /// Puts under way at once. 32.
    #[serde(default = "puts")]
    pub concurrency: usize,
}

fn puts() -> usize {
    32
}

/// `[state]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateConfig {
    /// Replicas, keys, packs being written.
    pub dir: PathBuf,
    /// `sqlite:FILE` or `postgres://…`; left out: `DIR/fleet.db`. May hold a password.
    #[serde(default)]
    pub database: Option<Secret>,
}

impl StateConfig {
    /// The database's URL.
    pub fn database_url(&self) -> String {
        match &self.database {
            Some(url) => url.reveal().to_owned(),
            None => proto::config::sqlite_url(&self.dir.join("fleet.db")),
        }
    }
    /// Where the key files lie.
    pub fn keys(&self) -> PathBuf {
        self.dir.join("keys")
    }
}

/// `[stores]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoresConfig {
    /// Columns `id`, and if wanted `zone` and `region`. With an inbox: `stores.csv` there instead.
    #[serde(default)]
    pub query: Option<String>,
}

/// For whom a stream's instances are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AudienceKind {
    /// One for every store.
    All,
    /// One a zone.
    Zone,
    /// One a store.
    Store,
}

/// `[[stream]]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// Its name.
    pub name: StreamName,
    /// For whom.
    pub audience: AudienceKind,
    /// The file with its contract.
    pub schema: PathBuf,
    /// The streams that its rows refer to: a register takes a version of this one when it holds those of them that were the
    /// newest when it was made.
    #[serde(default)]
    pub requires: BTreeSet<StreamName>,
    /// Its tables, `[[stream.table]]`. With an inbox they may be left out.
    #[serde(default, rename = "table")]
    pub tables: Vec<TableConfig>,
}

/// `[[stream.table]]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// Its name in the contract.
    pub name: TableName,
    /// Its rows; `:store` and `:zone` are bound. With an inbox it says nothing, and may be left out.
    #[serde(default)]
    pub query: Option<String>,
}

/// `[serve]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeConfig {
    /// Where the service listens. 127.0.0.1:7400.
    pub listen: std::net::SocketAddr,
    /// Bounds on clients. Unlike a store's, this service stands behind a balancer: 20,000
    /// connections, as many from one address.
    pub http: HttpLimits,
    /// The longest long poll. 60 s.
    pub longest_wait: HumanDuration,
    /// Bytes of one `POST /v1/heartbeats`. 4 MiB.
    pub beats_bytes: HumanBytes,
    /// How often silence and faults are looked at. 5 s.
    pub alert_tick: HumanDuration,
    /// How often manifests are looked over for signing anew, mirrors for repair. 10 min.
    pub resign_tick: HumanDuration,
}

impl Default for ServeConfig {
    fn default() -> Self {
        ServeConfig {
            listen: std::net::SocketAddr::from(([127, 0, 0, 1], 7400)),
            http: HttpLimits { connections: 20_000, per_ip: 20_000, ..HttpLimits::default() },
            longest_wait: s(60),
            beats_bytes: HumanBytes(4 << 20),
            alert_tick: s(5),
            resign_tick: s(600),
        }
    }
}

/// `[mail]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MailConfig {
    /// `smtp://host:25`, `smtp://user:password@host:587?tls=required` (STARTTLS) or
    /// `smtps://user:password@host:465`.
    pub smtp: Secret,
    /// The sender.
    pub from: String,
    /// The receivers.
    pub to: Vec<String>,
    /// PEM certificates trusted beside the usual ones.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// The longest wait for a connection to the server, and in `doctor` for its answer. 30 s.
    #[serde(default = "half_minute")]
    pub timeout: HumanDuration,
}

fn half_minute() -> HumanDuration {
    s(30)
}

/// `[alerts]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlertsConfig {
    /// A store of which nothing was heard. 5 min.
    pub store_silent: HumanDuration,
    /// A register of which nothing was heard. 30 min.
    pub register_silent: HumanDuration,
    /// When registers are meant to be on: of their silence only what falls into these counts. None: always.
    pub register_hours: Vec<Hours>,
    /// The zone by whose clocks `register_hours` are meant. UTC.
    pub time_zone: SourceZone,
    /// A store or register that is heard and gets nothing of what is published. 15 min.
    pub stuck: HumanDuration,
    /// No publish that went through, for so long as `serve` has watched. 4 days; 0s: never.
    pub no_publish: HumanDuration,
    /// A disk of which less than this share is free, of a device or of headquarters itself. 15 (%); 0: never.
    pub disk_low_percent: u64,
    /// Where mails go that the mail server has not taken for `webhook_after`, and all where there is no `[mail]`: a POST
    /// of JSON, whose `text` a chat shows. The address is a secret.
    pub webhook: Option<Secret>,
    /// 15 min.
    pub webhook_after: HumanDuration,
    /// Asked by `serve` every `ping_every` while it judges the fleet: the address of a service that tells you when this
    /// stops (a dead man's switch).
    pub ping: Option<Secret>,
    /// 60 s.
    pub ping_every: HumanDuration,
    /// A mail that only says that mails arrive, this often. 7 days; 0s: never.
    pub self_test: HumanDuration,
    /// A manifest that nobody signed anew and that expires within this. 7 days.
    pub manifest_expires: HumanDuration,
    /// A publisher key that may sign for no longer than this, here and in `doctor`. 30 days; 0s: never.
    pub key_expires: HumanDuration,
}

impl Default for AlertsConfig {
    fn default() -> Self {
        AlertsConfig {
            store_silent: s(300),
            register_silent: s(1800),
            register_hours: Vec::new(),
            time_zone: SourceZone::default(),
            stuck: s(900),
            no_publish: s(4 * 24 * HOUR),
            disk_low_percent: 15,
            webhook: None,
            webhook_after: s(900),
            ping: None,
            ping_every: s(60),
            self_test: s(7 * DAY),
            manifest_expires: s(7 * DAY),
            key_expires: s(30 * DAY),
        }
    }
}

/// `[publish]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PublishConfig {
    /// Refuse when more than this share of a table's rows would go. 20 (%).
    pub shrink_percent: u64,
    /// … and more than this many. 100.
    pub shrink_rows: u64,
    /// Make a full again after so many deltas; 500 at most. 64.
    pub deltas: u64,
    /// gzip level of packs, 1 to 9. 6.
    pub level: u32,
    /// Bad rows listed in an error; all are counted. 20.
    pub errors_listed: usize,
    /// How long packs that no manifest lists are kept. 60 days.
    pub keep: HumanDuration,
    /// … up to so many bytes of one instance. 4 GiB.
    pub keep_bytes: HumanBytes,
    /// How long the manifests that dropped a pack must have been out before it is deleted. 24 h.
    pub delete_after: HumanDuration,
    /// How long a manifest is valid. 30 days.
    pub manifest_life: HumanDuration,
    /// Manifests older than this are signed anew. 7 days.
    pub resign_after: HumanDuration,
    /// The publisher's lease, renewed at a third of it. 60 s.
    pub lease: HumanDuration,
    /// How long a second publisher waits for it. 30 s.
    pub lease_wait: HumanDuration,
    /// How far the clock may be past the ledger before nothing is signed: how long headquarters may be off. 1 day.
    pub clock_leap: HumanDuration,
    /// How long `publish` tries to send its mails before it leaves them to `serve`. 10 s.
    pub mail_wait: HumanDuration,
    /// How long an enrolment code may be used. 7 days.
    pub code_life: HumanDuration,
    /// How long a new publisher key may sign. 2 years.
    pub publisher_key_life: HumanDuration,
}

impl Default for PublishConfig {
    fn default() -> Self {
        PublishConfig {
            shrink_percent: 20,
            shrink_rows: 100,
            deltas: 64,
            level: 6,
            errors_listed: 20,
            keep: s(60 * DAY),
            keep_bytes: HumanBytes(4 << 30),
            delete_after: s(DAY),
            manifest_life: s(30 * DAY),
            resign_after: s(7 * DAY),
            lease: s(60),
            lease_wait: s(30),
            clock_leap: s(DAY),
            mail_wait: s(10),
            code_life: s(7 * DAY),
            publisher_key_life: s(730 * DAY),
        }
    }
}

/// The file looked for without `--config`.
pub const FILE: &str = "hq.toml";

/// Reads the settings, makes paths and URLs absolute, and checks what can be checked without
/// opening anything.
pub fn load(
    explicit: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded<Config>, ConfigError> {
    let mut loaded = proto::config::load::<Config>(explicit, FILE, env)?;
    let dir = loaded.dir.clone();
    if loaded.value.state.dir.as_os_str().is_empty() {
        return Err(ConfigError("state.dir: name a directory".into()));
    }
    loaded.value.resolve(&dir);
    loaded.value.check()?;
    Ok(loaded)
}

impl Config {
    /// The stream of a name.
    pub fn stream(&self, name: &StreamName) -> Option<&StreamConfig> {
        self.streams.iter().find(|s| &s.name == name)
    }

    /// Makes paths and URLs absolute.
    fn resolve(&mut self, dir: &Path) {
        let url = |u: &str| proto::config::resolve_url(dir, u);
        let path = |p: &Path| proto::config::resolve(dir, p);
        self.source.url = Secret::new(url(self.source.url.reveal()));
        self.objects.urls = self.objects.urls.iter().map(|u| url(u)).collect();
        self.state.dir = path(&self.state.dir);
        self.state.database = self.state.database.as_ref().map(|d| Secret::new(url(d.reveal())));
        for stream in &mut self.streams {
            stream.schema = path(&stream.schema);
        }
        if let Some(mail) = &mut self.mail {
            mail.ca_file = mail.ca_file.as_deref().map(path);
        }
    }

    /// Refuses values with which nothing would be done, or all the time.
    fn bounds(&self) -> Result<(), ConfigError> {
        self.serve.http.check("serve.http").map_err(ConfigError)?;
        self.limits.check().map_err(ConfigError)?;
        let (source, serve, alerts, publish) = (&self.source, &self.serve, &self.alerts, &self.publish);
        let mail = self.mail.iter().map(|m| ("mail.timeout", m.timeout));
        let waits = [
            ("source.connect_timeout", source.connect_timeout),
            ("source.row_timeout", source.row_timeout),
            ("serve.alert_tick", serve.alert_tick),
            ("serve.resign_tick", serve.resign_tick),
            ("alerts.store_silent", alerts.store_silent),
            ("alerts.register_silent", alerts.register_silent),
            ("alerts.stuck", alerts.stuck),
            ("publish.manifest_life", publish.manifest_life),
            ("publish.resign_after", publish.resign_after),
            ("publish.clock_leap", publish.clock_leap),
            ("publish.code_life", publish.code_life),
            ("publish.publisher_key_life", publish.publisher_key_life),
        ];
        for (name, value) in waits.into_iter().chain(mail) {
            if value.0.is_zero() {
                return Err(ConfigError(format!("{name} = \"{value}\": it must be longer than 0")));
            }
        }
        if publish.deltas > MOST_DELTAS {
            return Err(ConfigError(format!("publish.deltas: at most {MOST_DELTAS}; a list names them all")));
        }
        if self.serve.beats_bytes.0 < self.limits.heartbeat_bytes {
            return Err(ConfigError("serve.beats_bytes: at least limits.heartbeat_bytes".into()));
        }
        Ok(())
    }

    /// The rules between settings.
    fn check(&self) -> Result<(), ConfigError> {
        let bad = |text: String| Err(ConfigError(text));
        let source = self.source.kind()?;
        if let SourceKind::Postgres(url) | SourceKind::MySql(url) = &source
            && sets_time_zone(url)
        {
            return bad(
                "source.url: a time zone has no place in it; write time_zone = \"Asia/Shanghai\" in [source]".into()
            );
        }
        if self.objects.urls.is_empty() {
            return bad("objects.urls: name at least one bucket, e.g. \"file:///srv/tillcast/objects\"".into());
        }
        if let Some(url) = self.objects.urls.iter().find(|u| !u.starts_with("file:") && !u.starts_with("s3://")) {
            return bad(format!("objects.urls: `{url}` is neither file:///DIR nor s3://BUCKET/PREFIX"));
        }
        if self.objects.concurrency == 0 {
            return bad("objects.concurrency: at least 1".into());
        }
        for (name, url) in [("webhook", &self.alerts.webhook), ("ping", &self.alerts.ping)] {
            let is_web = |u: &Secret| url::Url::parse(u.reveal()).is_ok_and(|u| matches!(u.scheme(), "http" | "https"));
            if !url.as_ref().is_none_or(is_web) {
                return bad(format!("alerts.{name}: write an address that begins with https:// or http://"));
            }
        }
        if self.alerts.ping_every.0 < Duration::from_secs(1) || self.alerts.disk_low_percent > 90 {
            return bad("alerts.ping_every: at least 1s; alerts.disk_low_percent: 0 to 90".into());
        }
        self.bounds()?;
        let database = self.state.database_url();
        if !["sqlite:", "postgres://", "postgresql://"].iter().any(|p| database.starts_with(p)) {
            return bad("state.database: it must be sqlite:FILE or postgres://…".into());
        }
        let inbox = matches!(source, SourceKind::Inbox(_));
        if !inbox && self.stores.query.is_none() {
            return bad("stores.query: missing; e.g. query = \"SELECT id, zone, region FROM store\"".into());
        }
        let mut streams = BTreeSet::new();
        let mut tables = BTreeSet::new();
        for stream in &self.streams {
            if !streams.insert(&stream.name) {
                return bad(format!("stream {}: there are two of this name", stream.name));
            }
            if stream.tables.is_empty() && !inbox {
                return bad(format!("stream {}: it has no [[stream.table]]", stream.name));
            }
            for table in &stream.tables {
                if !tables.insert(&table.name) {
                    return bad(format!(
                        "stream {}: table {} is there twice; a table belongs to one stream",
                        stream.name, table.name
                    ));
                }
                if table.query.is_none() && !inbox {
                    return bad(format!(
                        "stream {}: table {} has no query; e.g. query = \"SELECT … FROM {}\"",
                        stream.name, table.name, table.name
                    ));
                }
            }
        }
        if !(1..=9).contains(&self.publish.level) {
            return bad(format!("publish.level: {} is not 1 to 9", self.publish.level));
        }
        if self.publish.resign_after.0 >= self.publish.manifest_life.0 {
            return bad("publish.resign_after: it must be less than publish.manifest_life".into());
        }
        if self.publish.lease.0 < Duration::from_secs(3) {
            return bad("publish.lease: at least 3s".into());
        }
        if self.serve.longest_wait.0 >= self.serve.http.answer_timeout.0 {
            return bad("serve.longest_wait: it must be less than serve.http.answer_timeout".into());
        }
        if let Some(mail) = &self.mail
            && mail.to.is_empty()
        {
            return bad("mail.to: name at least one receiver".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }
    fn parse(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hq.toml");
        std::fs::write(&file, text).unwrap();
        load(Some(&file), []).map(|l| l.value)
    }
    const NO_QUERY: &str =
        "[[stream]]\nname = \"p\"\naudience = \"all\"\nschema = \"p.sql\"\n[[stream.table]]\nname = \"t\"\n";
    const LEAST: &str = "[source]\nurl = \"sqlite:a.db\"\n[objects]\nurls = [\"file:o\"]\n[state]\ndir = \"s\"\n[stores]\nquery = \"SELECT id\"\n";

    fn passes_check_config(config: &Config) {
        crate::publish::contracts::load(config).unwrap();
        crate::hooks::Post::new(config).unwrap();
        for url in &config.objects.urls {
            crate::bucket::Bucket::open(url, &config.objects).unwrap();
        }
    }

    #[test]
    fn the_samples_are_valid() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let sample = load(Some(&root.join("../deploy/hq.toml")), []).unwrap().value;
        passes_check_config(&sample);
        assert_eq!(sample.streams[0].audience, AudienceKind::Zone);
        assert_eq!(sample.alerts.register_silent.0, Duration::from_secs(1800));
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("schema")).unwrap();
        std::fs::write(dir.path().join("hq.toml"), include_str!("init/hq.toml")).unwrap();
        std::fs::write(dir.path().join("schema/price.sql"), include_str!("init/price.sql")).unwrap();
        let first = load(Some(&dir.path().join("hq.toml")), []).unwrap().value;
        assert_eq!(first.publish.lease.0, PublishConfig::default().lease.0);
        passes_check_config(&first);
        let chain = load(Some(&root.join("../deploy/sample/hq.toml")), []).unwrap().value;
        passes_check_config(&chain);
    }

    #[test]
    fn paths_are_relative_to_the_file_and_the_environment_overrides() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hq.toml");
        std::fs::write(&file, LEAST).unwrap();
        let over = env(&[
            ("TILLCAST__SERVE__LISTEN", "127.0.0.1:9"),
            ("TILLCAST__OBJECTS__URLS", "[\"file:x\", \"s3://b/p\"]"),
            ("TILLCAST__PUBLISH__SHRINK_ROWS", "7"),
        ]);
        let c = load(Some(&file), over).unwrap().value;
        assert_eq!(c.source.kind().unwrap(), SourceKind::Sqlite(dir.path().join("a.db")));
        assert_eq!(c.state.database_url(), format!("sqlite:{}", dir.path().join("s/fleet.db").display()));
        assert_eq!((c.serve.listen.port(), c.publish.shrink_rows, c.objects.urls.len()), (9, 7, 2));
        assert!(c.objects.urls[0].contains(dir.path().to_str().unwrap()));
    }

    /// Source, ledger and objects lie where the settings say, whatever the directory is called.
    #[tokio::test]
    async fn a_directory_of_any_name_holds_what_the_settings_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["my shop", "100%", "größe 50%20?", "a#b"] {
            let room = dir.path().join(name);
            std::fs::create_dir(&room).unwrap();
            let file = room.join("hq.toml");
            let text = LEAST.replace("a.db", "a.db?mode=ro").replace("file:o", "file:my objects");
            std::fs::write(&file, text).unwrap();
            let c = load(Some(&file), []).unwrap().value;
            assert_eq!(c.source.kind().unwrap(), SourceKind::Sqlite(room.join("a.db")));
            crate::ledger::Ledger::open(&c).await.unwrap();
            assert!(room.join("s/fleet.db").exists());
            let bucket = crate::bucket::Bucket::open(&c.objects.urls[0], &c.objects).unwrap();
            bucket.probe().await.unwrap();
            assert!(room.join("my objects").exists(), "{:?}", c.objects.urls);
        }
        let objects = parse(LEAST).unwrap().objects;
        for url in ["file:///a?b", "file:///a#b", "file://host/a", "file:a", "file:"] {
            let e = crate::bucket::Bucket::open(url, &objects).unwrap_err().to_string();
            assert!(e.contains("write file:///DIR"), "{e}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (text, told) in [
            (LEAST.replace("sqlite:a.db", "oracle://x"), "source.url"),
            (
                LEAST.replace("sqlite:a.db\"", "mysql://h/d\"\ntime_zone = \"Asia/Peking\""),
                "`Asia/Peking` is no time zone",
            ),
            (LEAST.replace("sqlite:a.db", "mysql://h/d?timezone=%2B08:00"), "write time_zone = "),
            (LEAST.replace("sqlite:a.db", "postgres://h/d?sslmode=disable&TimeZone=PRC"), "write time_zone = "),
            (LEAST.replace("sqlite:a.db", "postgres://h/d?options=-c%20TimeZone%3DPRC"), "write time_zone = "),
            (LEAST.replace("sqlite:a.db", "postgres://h/d?options[timezone]=PRC"), "write time_zone = "),
            (LEAST.replace("[\"file:o\"]", "[]"), "objects.urls"),
            (LEAST.replace("file:o", "ftp://o"), "ftp://o"),
            (LEAST.replace("query = \"SELECT id\"", ""), "stores.query"),
            (format!("{LEAST}[publish]\nlevel = 12\n"), "publish.level"),
            (format!("{LEAST}[publish]\nresign_after = \"40d\"\n"), "publish.resign_after"),
            (format!("{LEAST}[publish]\nresign_after = \"0s\"\n"), "publish.resign_after"),
            (format!("{LEAST}[publish]\ndeltas = 501\n"), "publish.deltas"),
            (format!("{LEAST}[mail]\nsmtp = \"smtp://h\"\nfrom = \"a@b.c\"\nto = []\n"), "mail.to"),
            (
                format!("{LEAST}[mail]\nsmtp = \"smtp://h\"\nfrom = \"a@b.c\"\nto = [\"a@b.c\"]\ntimeout = \"0s\"\n"),
                "mail.timeout",
            ),
            (LEAST.replace("dir = \"s\"", "dir = \"\""), "state.dir"),
            (format!("{LEAST}[alerts]\nstore_silent = \"0s\"\n"), "alerts.store_silent"),
            (format!("{LEAST}[limits]\npack_bytes = 0\n"), "limits.pack_bytes"),
            (format!("{LEAST}[serve.http]\nhead_timeout = \"0s\"\n"), "serve.http.head_timeout"),
            (format!("{LEAST}[server]\nlisten = \"x\"\n"), "serve"),
            (format!("{LEAST}[[stream]]\nname = \"p\"\naudience = \"all\"\nschema = \"p.sql\"\n"), "[[stream.table]]"),
            (format!("{LEAST}[[stream]]\nname = \"P\"\naudience = \"all\"\nschema = \"p.sql\"\n"), "stream name"),
            (format!("{LEAST}{NO_QUERY}"), "stream p: table t has no query"),
        ] {
            let e = parse(&text).unwrap_err().to_string();
            assert!(e.contains(told), "{told}: {e}");
        }
        let twice = format!(
            "{LEAST}{0}{1}",
            "[[stream]]\nname = \"a\"\naudience = \"all\"\nschema = \"p.sql\"\n[[stream.table]]\nname = \"t\"\nquery = \"q\"\n",
            "[[stream]]\nname = \"b\"\naudience = \"all\"\nschema = \"p.sql\"\n[[stream.table]]\nname = \"t\"\nquery = \"q\"\n"
        );
        assert!(parse(&twice).unwrap_err().to_string().contains("belongs to one stream"));
        let inbox = LEAST.replace("[stores]\nquery = \"SELECT id\"", "").replace("sqlite:a.db", "inbox:in");
        assert!(parse(&inbox).is_ok());
        assert_eq!(parse(&format!("{inbox}{NO_QUERY}")).unwrap().streams[0].tables[0].query, None);
    }

    #[test]
    fn passwords_are_not_shown() {
        let text = LEAST.replace("sqlite:a.db", "postgres://u:hunter2@h/d");
        let c = parse(&text).unwrap();
        assert!(!format!("{c:?}").contains("hunter2"));
        assert!(!serde_json::to_string(&c).unwrap().contains("hunter2"));
    }
}

//! The relay's settings: `relay.toml`, overridden by `TILLCAST__…`. Every limit of the relay is
//! here with its default. Only this room reads them; the others are handed values.

use proto::config::{self, ConfigError, HumanBytes, HumanDuration, Loaded};
use proto::disk::{self, DataDisk};
use proto::fetch::{RateFloor, Source, SourceOptions, without_credentials};
use proto::http::HttpLimits;
use proto::ids::StoreId;
use proto::limits::Limits;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file's usual name.
pub const FILE: &str = "relay.toml";

/// All settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The store that this relay serves.
    pub store: StoreId,
    /// Where everything lies that it keeps.
    pub data_dir: PathBuf,
    /// Where objects are read: `https://…`, `http://…`, `file://…`, `s3://…`. None: a store that lives on imports.
    #[serde(default)]
    pub sources: Vec<String>,
    /// Headquarters' service, for wake-ups and heartbeats. None: sources are only polled.
    #[serde(default)]
    pub hq: Option<String>,
    /// The address served on the LAN.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The pause between looks at the sources.
    #[serde(default = "default_poll")]
    pub poll: HumanDuration,
    /// The pause between heartbeats to headquarters.
    #[serde(default = "default_heartbeat")]
    pub heartbeat: HumanDuration,
    /// How long an object that no manifest lists any more stays in `ok/`.
    #[serde(default = "default_grace")]
    pub grace: HumanDuration,
    /// How long a pack that no manifest lists any more stays in `error/`.
    #[serde(default = "default_error_grace")]
    pub error_grace: HumanDuration,
    /// Room kept for the day the disk is full. Unset: the lesser of 64 MiB and 2% of the disk; 0: none.
    #[serde(default)]
    pub ballast: Option<HumanBytes>,
    /// The pause between checks of all rows of the shadow against their digests.
    #[serde(default = "default_verify")]
    pub verify: HumanDuration,
    /// Entries kept in the event log.
    #[serde(default = "default_events")]
    pub events: u32,
    /// The trial's bounds.
    #[serde(default)]
    pub trial: TrialRules,
    /// When a pack is given up, and when it is tried again.
    #[serde(default)]
    pub tries: TryRules,
    /// The memory cache in front of `ok/`.
    #[serde(default)]
    pub cache: CacheRules,
    /// How sources and headquarters are reached.
    #[serde(default)]
    pub source: SourceOptions,
    /// The slowest download worth waiting for.
    #[serde(default)]
    pub rate: RateFloor,
    /// Bounds on LAN clients.
    #[serde(default)]
    pub http: HttpLimits,
    /// Bounds on what is read from outside.
    #[serde(default)]
    pub limits: Limits,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7421))
}
fn default_poll() -> HumanDuration {
    seconds(30)
}
fn default_heartbeat() -> HumanDuration {
    seconds(60)
}
fn default_grace() -> HumanDuration {
    seconds(24 * 3600)
}
fn default_error_grace() -> HumanDuration {
    seconds(7 * 24 * 3600)
}
fn default_verify() -> HumanDuration {
    seconds(24 * 3600)
}
fn default_events() -> u32 {
    10_000
}
const fn seconds(n: u64) -> HumanDuration {
    HumanDuration(Duration::from_secs(n))
}

/// Bounds on the process that runs a pack on the shadow.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrialRules {
    /// Private memory. 256 MiB; at least 32 MiB.
    pub memory: HumanBytes,
    /// The longest time for one run of a chain of packs; small ones get less, see `Relay::time_for`. 15 min.
    pub time: HumanDuration,
}

impl Default for TrialRules {
    fn default() -> Self {
        TrialRules { memory: HumanBytes(256 << 20), time: seconds(900) }
    }
}

/// When a pack is given up, and when one that was given up is tried again.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TryRules {
    /// Failures that put a pack into `error/`. 3.
    pub limit: u32,
    /// The wait after the first failure. 1 s.
    pub first_pause: HumanDuration,
    /// The wait after later failures. 5 s.
    pub later_pause: HumanDuration,
    /// A pack in `error/` for a wrong hash is fetched again after this; sooner, where a source was not heard. 1 h.
    pub refetch: HumanDuration,
    /// A listed pack that no source has for so long is told, and gone round if another way leads on. 10 min.
    pub missing: HumanDuration,
    /// A pack in `error/` for a crash is run again after this, then twice this, and so on. 1 min.
    pub crash_pause: HumanDuration,
    /// The longest wait before a pack that crashed is run again. 6 h.
    pub crash_pause_max: HumanDuration,
}

impl Default for TryRules {
    fn default() -> Self {
        TryRules {
            limit: 3,
            first_pause: seconds(1),
            later_pause: seconds(5),
            refetch: seconds(3600),
            missing: seconds(600),
            crash_pause: seconds(60),
            crash_pause_max: seconds(6 * 3600),
        }
    }
}

/// Bounds of the memory cache in front of `ok/`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheRules {
    /// Bytes in all. 24 MiB.
    pub bytes: HumanBytes,
    /// Objects larger than this are read from disk each time. 16 MiB.
    pub object: HumanBytes,
}

impl Default for CacheRules {
    fn default() -> Self {
        CacheRules { bytes: HumanBytes(24 << 20), object: HumanBytes(16 << 20) }
    }
}

/// Reads the settings and checks all that can be checked without touching disk or network.
pub fn load(
    explicit: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded<Config>, ConfigError> {
    let mut loaded: Loaded<Config> = config::load(explicit, FILE, env)?;
    let dir = loaded.dir.clone();
    let config = &mut loaded.value;
    if config.data_dir.as_os_str().is_empty() {
        return Err(ConfigError("data_dir: name a directory".into()));
    }
    config.data_dir = config::resolve(&dir, &config.data_dir);
    for url in &mut config.sources {
        *url = config::resolve_url(&dir, url);
    }
    if let Some(file) = &mut config.source.ca_file {
        *file = config::resolve(&dir, file);
    }
    config.check()?;
    Ok(loaded)
}

impl Config {
    /// The disk under `data_dir`.
    pub fn disk(&self) -> DataDisk {
        DataDisk::new(&self.data_dir, self.ballast.map(|b| b.0))
    }

    /// The settings to show: URLs without the names and passwords in them.
    pub fn shown(&self) -> Config {
        let mut shown = self.clone();
        shown.sources.iter_mut().chain(&mut shown.hq).for_each(|url| *url = without_credentials(url));
        shown
    }

    fn check(&self) -> Result<(), ConfigError> {
        let settings = [
            ("poll", self.poll),
            ("heartbeat", self.heartbeat),
            ("verify", self.verify),
            ("trial.time", self.trial.time),
        ];
        for (name, duration) in settings {
            if duration.0.is_zero() {
                return Err(ConfigError(format!("{name} must be longer than 0")));
            }
        }
        self.http.check("http").map_err(ConfigError)?;
        self.limits.check().map_err(ConfigError)?;
        disk::check_ballast(self.ballast.map(|b| b.0)).map_err(ConfigError)?;
        if self.tries.limit == 0 {
            return Err(ConfigError("tries.limit must be at least 1".into()));
        }
        if self.trial.memory.0 < 32 << 20 {
            return Err(ConfigError(format!("trial.memory = {} is too little: 32MiB is the least", self.trial.memory)));
        }
        if let Some(hq) = &self.hq
            && !(hq.starts_with("http://") || hq.starts_with("https://"))
        {
            return Err(ConfigError(format!("hq = `{hq}`: it must be an http:// or https:// URL")));
        }
        self.sources().map(drop)?;
        self.hq_source().map(drop)
    }

    /// The sources in order.
    pub fn sources(&self) -> Result<Vec<Source>, ConfigError> {
        self.sources.iter().map(|url| self.parse_source(url)).collect()
    }

    /// Headquarters, if it is to be asked.
    pub fn hq_source(&self) -> Result<Option<Source>, ConfigError> {
        self.hq.as_ref().map(|url| self.parse_source(url)).transpose()
    }

    fn parse_source(&self, url: &str) -> Result<Source, ConfigError> {
        Source::parse(url, &self.source).map_err(|e| ConfigError(e.to_string()))
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use std::fs;

    fn from_text(text: &str, env: &[(&str, &str)]) -> Result<Loaded<Config>, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        fs::write(&file, text).unwrap();
        load(Some(&file), env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
    }

    #[test]
    fn the_shipped_sample_is_valid() {
        proto::cli::start(&proto::cli::Common::default());
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/relay.toml");
        let config = load(Some(&sample), []).unwrap().value;
        assert_eq!(config.store.as_str(), "0421");
        assert_eq!(config.listen.port(), 7421);
        assert_eq!(config.heartbeat, seconds(60));
        assert_eq!(config.hq.as_deref(), Some("https://hq.example.com"));
    }

    #[test]
    fn paths_are_relative_to_the_file_and_the_environment_wins() {
        let text = "store = \"0421\"\ndata_dir = \"data\"\n";
        let loaded =
            from_text(text, &[("TILLCAST__POLL", "200ms"), ("TILLCAST__SOURCES", "[\"file:objects\"]")]).unwrap();
        assert_eq!(loaded.value.data_dir, loaded.dir.join("data"));
        assert_eq!(loaded.value.poll.0, Duration::from_millis(200));
        let objects = loaded.dir.join("objects");
        assert!(loaded.value.sources[0].ends_with(objects.to_str().unwrap()), "{:?}", loaded.value.sources);
        assert!(loaded.value.hq.is_none());
    }

    #[test]
    fn every_size_is_written_as_people_write_sizes() {
        let text = "store = \"0421\"\ndata_dir = \"d\"\n[limits]\npack_bytes = \"8GiB\"\nddl_bytes = \"1MiB\"\n\
            [http]\nhead_bytes = \"32KiB\"\nstall_bytes = 20480\n[rate]\nbytes_per_second = \"2KiB\"\n";
        let config = from_text(text, &[("TILLCAST__LIMITS__LINE_BYTES", "32MiB")]).unwrap().value;
        let (limits, http) = (&config.limits, &config.http);
        assert_eq!((limits.pack_bytes, limits.ddl_bytes, limits.line_bytes), (8 << 30, 1 << 20, 32 << 20));
        assert_eq!((http.head_bytes, http.stall_bytes, config.rate.bytes_per_second), (32 << 10, 20 << 10, 2 << 10));
        // What is printed is what the file may say.
        let printed = serde_json::to_value(limits).unwrap();
        assert_eq!(serde_json::from_value::<Limits>(printed).unwrap(), *limits);
    }

    #[test]
    fn mistakes_are_named() {
        let base = "store = \"0421\"\ndata_dir = \"d\"\n";
        for (text, word) in [
            ("store = \"04-21\"\ndata_dir = \"d\"\n".to_owned(), "store"),
            (format!("{base}hearbeat = \"60s\"\n"), "heartbeat"),
            (format!("{base}hq = \"ftp://x\"\n"), "hq"),
            (format!("{base}poll = \"0s\"\n"), "poll"),
            (format!("{base}sources = [\"gopher://x\"]\n"), "gopher"),
            (format!("{base}[trial]\nmemory = \"1MiB\"\n"), "trial.memory"),
            (base.replace("\"d\"", "\"\""), "data_dir"),
            (format!("{base}ballast = \"900TiB\"\n"), "ballast"),
            (format!("{base}[http]\nconnections = 0\n"), "http.connections"),
            (format!("{base}[limits]\npack_bytes = 0\n"), "limits.pack_bytes"),
            (format!("{base}sources = [\"file:///o\"]\n[source]\nca_file = \"none.pem\"\n"), "none.pem"),
            (format!("{base}sources = [\"file:///o\"]\n[source]\nread_timeout = \"0s\"\n"), "read_timeout"),
        ] {
            let error = from_text(&text, &[]).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}

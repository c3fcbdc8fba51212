//! The register's settings: `agent.toml` and `TILLCAST__…`, read once, checked before anything is
//! touched. Owns every setting's default and range; writes nothing, so the power may go at any time.

use crate::register_db::STORE_DB;
use proto::config::{self, ConfigError, HumanBytes, HumanDuration, Loaded};
use proto::fetch::{RateFloor, SourceOptions, without_credentials};
use proto::http::HttpLimits;
use proto::ids::{DeviceId, RegisterId};
use proto::limits::Limits;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file's usual name.
pub const FILE: &str = "agent.toml";

/// The settings of `agent.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which register this is, e.g. `0421-03`.
    pub register: RegisterId,
    /// Where everything lies; the POS application reads `store.db` in it.
    pub data_dir: PathBuf,
    /// The store's relay, or a static server of the same objects.
    pub relay: String,
    /// Read in this order while the relay is silent: CDN, buckets.
    #[serde(default)]
    pub fallback: Vec<String>,
    /// The loopback API. 127.0.0.1:7422.
    #[serde(default = "local_listen")]
    pub local_listen: SocketAddr,
    /// Let `local_listen` be another address than loopback: whoever reaches it can hold updates.
    #[serde(default)]
    pub local_listen_anywhere: bool,
    /// Time between heartbeats; news are reported at once. 60 s.
    #[serde(default = "minute")]
    pub heartbeat: HumanDuration,
    /// The longest time between looks at the manifest, and the pace of static sources. 30 s.
    #[serde(default = "half_minute")]
    pub poll: HumanDuration,
    /// A relay silent for so long counts as dead: the fallbacks are read. 2 min.
    #[serde(default = "two_minutes")]
    pub relay_silent: HumanDuration,
    /// Each register waits up to this much longer, by chance, so that a chain does not come to the
    /// CDN as one. 30 s.
    #[serde(default = "half_minute")]
    pub fallback_jitter: HumanDuration,
    /// The pause between checks of all rows against their digests; the first is at the start. 24 h.
    #[serde(default = "day")]
    pub verify: HumanDuration,
    /// Room kept aside to recover from a full disk. The lesser of 64 MiB and 2% of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ballast: Option<HumanBytes>,
    /// A log of the database (`store.db-wal`) longer than this that a reader holds for 5 minutes is a fault. 64 MiB.
    #[serde(default = "log_alarm")]
    pub log_alarm: HumanBytes,
    /// Bounds on what is read.
    #[serde(default)]
    pub limits: Limits,
    /// Bounds on clients of the loopback API.
    #[serde(default)]
    pub http: HttpLimits,
    /// The slowest download worth waiting for.
    #[serde(default)]
    pub rate: RateFloor,
    /// How sources are reached.
    #[serde(default)]
    pub source_options: SourceOptions,
}

fn local_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7422))
}
fn log_alarm() -> HumanBytes {
    HumanBytes(64 << 20)
}
fn day() -> HumanDuration {
    HumanDuration(Duration::from_secs(24 * 3600))
}
fn half_minute() -> HumanDuration {
    HumanDuration(Duration::from_secs(30))
}
fn minute() -> HumanDuration {
    HumanDuration(Duration::from_secs(60))
}
fn two_minutes() -> HumanDuration {
    HumanDuration(Duration::from_secs(120))
}

impl Config {
    /// Reads the file (given, `./agent.toml`, `/etc/tillcast/agent.toml`), then the environment,
    /// makes relative paths those of the file, and checks all ranges.
    pub fn load(
        explicit: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Loaded<Config>, ConfigError> {
        let mut loaded: Loaded<Config> = config::load(explicit, FILE, env)?;
        let (dir, c) = (&loaded.dir, &mut loaded.value);
        if c.data_dir.as_os_str().is_empty() {
            return Err(ConfigError("data_dir: name a directory".into()));
        }
        c.data_dir = config::resolve(dir, &c.data_dir);
        c.relay = config::resolve_url(dir, &c.relay);
        for f in &mut c.fallback {
            *f = config::resolve_url(dir, f);
        }
        if let Some(ca) = &mut c.source_options.ca_file {
            *ca = config::resolve(dir, ca);
        }
        c.check()?;
        Ok(loaded)
    }

    /// Who this is.
    pub fn device(&self) -> DeviceId {
        DeviceId::Register(self.register.clone())
    }

    /// The settings to show: URLs without the names and passwords in them.
    pub fn shown(&self) -> Config {
        let mut shown = self.clone();
        shown.fallback.iter_mut().chain([&mut shown.relay]).for_each(|url| *url = without_credentials(url));
        shown
    }

    /// The database that the POS application reads.
    pub fn store_db(&self) -> PathBuf {
        self.data_dir.join(STORE_DB)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse = |text: String| Err(ConfigError(text));
        if !self.local_listen.ip().is_loopback() && !self.local_listen_anywhere {
            return refuse(format!(
                "local_listen = \"{}\" is not a loopback address; whoever reaches it could hold updates. Use \
                 127.0.0.1:{}, or set local_listen_anywhere = true",
                self.local_listen,
                self.local_listen.port()
            ));
        }
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
        for (name, value) in [("heartbeat", self.heartbeat), ("poll", self.poll), ("relay_silent", self.relay_silent)] {
            if value.0 < second || value.0 > hour {
                return refuse(format!("{name} = \"{value}\" is out of range: 1s to 1h"));
            }
        }
        if self.verify.0 < second {
            return refuse(format!("verify = \"{}\" is out of range: 1s or more", self.verify));
        }
        self.http.check("http").map_err(ConfigError)?;
        self.limits.check().map_err(ConfigError)?;
        proto::disk::check_ballast(self.ballast.map(|b| b.0)).map_err(ConfigError)?;
        if self.fallback_jitter.0 > hour {
            return refuse(format!("fallback_jitter = \"{}\" is out of range: 0s to 1h", self.fallback_jitter));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;

    fn load(text: &str) -> Result<Loaded<Config>, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file), [])
    }
    const LEAST: &str = "register = \"0421-03\"\ndata_dir = \"data\"\nrelay = \"http://10.0.0.2:7421\"\n";

    #[test]
    fn the_shipped_sample_is_valid_and_shows_the_defaults() {
        let shipped = load(include_str!("../../deploy/agent.toml")).unwrap().value;
        assert_eq!(shipped.register.as_str(), "0421-03");
        assert_eq!(shipped.fallback, ["https://cdn.example.com/tillcast"]);
        let least = load(LEAST).unwrap().value;
        assert_eq!(shipped.local_listen, least.local_listen);
        assert_eq!(shipped.heartbeat, least.heartbeat);
    }

    #[test]
    fn every_setting_in_the_sample_s_comments_is_known() {
        let mut text = String::new();
        for line in include_str!("../../deploy/agent.toml").lines() {
            let bare = line.strip_prefix("# ").unwrap_or(line);
            let is_setting =
                bare.split_once(" = ").is_some_and(|(k, _)| k.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
            text += if is_setting || bare.starts_with('[') { bare } else { line };
            text += "\n";
        }
        load(&text).unwrap();
    }

    #[test]
    fn paths_are_the_files_and_the_environment_overrides() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        std::fs::write(&file, LEAST).unwrap();
        let env = [("TILLCAST__REGISTER".to_owned(), "0421-07".to_owned())];
        let c = Config::load(Some(&file), env).unwrap().value;
        assert_eq!(c.store_db(), dir.path().join("data/store.db"));
        assert_eq!(c.register.as_str(), "0421-07");
    }

    #[test]
    fn no_password_of_a_url_is_shown() {
        let text = LEAST.replace("http://", "http://till:canary@")
            + "fallback = [\"https://till:canary@cdn.example.com/t\"]\n";
        let config = load(&text).unwrap().value;
        assert!(config.relay.contains("canary"));
        let shown = serde_json::to_string(&config.shown()).unwrap();
        assert!(!shown.contains("canary"), "{shown}");
        assert!(shown.contains("http://10.0.0.2:7421") && shown.contains("https://cdn.example.com/t"), "{shown}");
    }

    #[test]
    fn mistakes_are_found_before_anything_is_touched() {
        for (more, tells) in [
            ("local_listen = \"0.0.0.0:7422\"\n", "local_listen_anywhere"),
            ("heartbeat = \"0s\"\n", "1s to 1h"),
            ("heartbeats = \"60s\"\n", "heartbeat"),
            ("relay_silent = \"2 h\"\n", "relay_silent"),
            ("ballast = \"900TiB\"\n", "ballast"),
            ("[http]\nper_ip = 0\n", "http.per_ip"),
            ("[limits]\nmanifest_bytes = 1\n", "limits.manifest_bytes"),
        ] {
            let e = load(&format!("{LEAST}{more}")).unwrap_err().to_string();
            assert!(e.contains(tells), "{e}");
        }
        assert!(load(&LEAST.replace("\"data\"", "\"\"")).unwrap_err().to_string().contains("data_dir"));
        assert!(load("register = \"../../etc\"\ndata_dir = \"d\"\nrelay = \"http://h\"\n").is_err());
        load(&format!("{LEAST}local_listen = \"0.0.0.0:7422\"\nlocal_listen_anywhere = true\n")).unwrap();
    }
}

//! Settings: a TOML file, overridden by the environment.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Settings that cannot be used; exit code 2. The text names file, line, key or variable, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Settings with where they came from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings.
    pub value: T,
    /// What relative paths in them are relative to.
    pub dir: PathBuf,
    /// The file; none if the environment says it all.
    pub file: Option<PathBuf>,
}

/// Reads `--config FILE`, else ./NAME, else /etc/tillcast/NAME, then overrides by `TILLCAST__…`.
pub fn load<T: DeserializeOwned>(
    explicit: Option<&Path>,
    default_name: &str,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded<T>, ConfigError> {
    let _ = (explicit, default_name, env.into_iter().count());
    todo!()
}

/// The process's environment, for `load`. Values that are not UTF-8 are left out.
pub fn environment() -> Vec<(String, String)> {
    todo!()
}

/// One variable of the process's environment.
pub fn variable(name: &str) -> Option<String> {
    let _ = name;
    todo!()
}

/// `path` as meant by a file in `dir`.
pub fn resolve(dir: &Path, path: &Path) -> PathBuf {
    dir.join(path)
}

/// A URL as meant by a file in `dir`: `sqlite:hq.db`, `file:objects` and `inbox:drops` become absolute, others stay.
pub fn resolve_url(dir: &Path, url: &str) -> String {
    let _ = (dir, url);
    todo!()
}

/// A duration as people write it: `200ms`, `30s`, `5m`, `1h`, `7d`, `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(pub Duration);

/// A size as people write it: `100`, `64KiB`, `64MiB`, `4GiB`; `KB`, `MB`, `GB` are powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanBytes(pub u64);

/// A text that is neither logged nor printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }
    /// The text itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str("…")
    }
}
impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(Secret)
    }
}
impl FromStr for HumanDuration {
    type Err = String;
    fn from_str(_s: &str) -> Result<Self, String> {
        todo!()
    }
}
impl FromStr for HumanBytes {
    type Err = String;
    fn from_str(_s: &str) -> Result<Self, String> {
        todo!()
    }
}
impl fmt::Display for HumanDuration {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}
impl fmt::Display for HumanBytes {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}
macro_rules! text_serde {
    ($t:ty) => {
        impl Serialize for $t {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $t {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
text_serde!(HumanDuration);
text_serde!(HumanBytes);

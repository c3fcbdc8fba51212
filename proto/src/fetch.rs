//! Reading objects from wherever they lie: a directory, an HTTP server, a bucket.

use crate::config::{HumanDuration, Secret};
use crate::digest::Sha256;
use crate::layout::ObjectName;
use crate::retry::Verdict;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How sources are reached. A `[source_options]`-like table in each tier's file sets it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// A bearer token sent with each HTTP request.
    pub token: Option<Secret>,
    /// PEM certificates trusted beside the machine's own.
    pub ca_file: Option<PathBuf>,
    /// The longest wait for a connection. 10 s.
    pub connect_timeout: HumanDuration,
    /// The longest wait for the next bytes. 30 s.
    pub read_timeout: HumanDuration,
    /// For `s3://` sources.
    pub s3: S3Options,
}

/// A bucket's server; keys come from the usual AWS variables.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Options {
    /// The server's URL, where it is not Amazon's.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// Whether the server honours If-None-Match and If-Match on puts; unset: as probed. Readers ignore it.
    pub conditions: Option<bool>,
    /// Put the bucket's name into the host (OSS wants this).
    pub virtual_hosted: bool,
}

impl Default for SourceOptions {
    fn default() -> Self {
        SourceOptions {
            token: None,
            ca_file: None,
            connect_timeout: HumanDuration(Duration::from_secs(10)),
            read_timeout: HumanDuration(Duration::from_secs(30)),
            s3: S3Options::default(),
        }
    }
}

/// A source's URL or options that cannot work; found before anything is fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("source `{url}`: {reason}")]
pub struct BadSource {
    /// The URL, without credentials.
    pub url: String,
    /// Why not, and what would be right.
    pub reason: String,
}

/// What tells one state of an object from another; compare for equality only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Etag(pub String);

/// A small object's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Small {
    /// As the known ETag says.
    Unchanged,
    /// The object.
    Body {
        /// All of it.
        bytes: Bytes,
        /// What to ask with next time.
        etag: Option<Etag>,
    },
}

/// A long poll's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Polled {
    /// Nothing new within the wait.
    Unchanged,
    /// The source is a static one: there is no such page.
    NoSuchPage,
    /// News.
    Body {
        /// All of it.
        bytes: Bytes,
        /// What to ask with next time.
        etag: Option<Etag>,
    },
}

/// What a signed manifest says of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub sha256: Sha256,
}

/// The slowest download worth waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateFloor {
    /// Bytes a second, averaged over the window. 1,024.
    pub bytes_per_second: u64,
    /// The window. 60 s.
    pub window: HumanDuration,
}

impl Default for RateFloor {
    fn default() -> Self {
        RateFloor { bytes_per_second: 1024, window: HumanDuration(Duration::from_secs(60)) }
    }
}

/// Why a fetch failed, for code to decide on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchErrorKind {
    /// The source does not have it.
    NotFound,
    /// 401 or 403.
    Unauthorized,
    /// No connection, a cut or silent one, TLS.
    Network,
    /// Another HTTP status.
    Status {
        /// The status.
        code: u16,
        /// How long the server asks to wait.
        retry_after: Option<Duration>,
    },
    /// The body ended before its announced end; the part stays for resuming.
    NotWhole,
    /// A web page instead of an object: captive portal, proxy.
    NotAnObject,
    /// More bytes than allowed or declared.
    TooLong,
    /// A whole object, shorter than declared.
    TooShort,
    /// A whole object of another hash.
    WrongHash,
    /// Under the rate floor.
    Slow,
    /// The local disk: full, or not writable.
    Disk,
    /// A local fsync failed.
    Halt,
}

/// A fetch that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} from {source_url}: {detail}")]
pub struct FetchError {
    /// The source's URL, without credentials.
    pub source_url: String,
    /// The object or page.
    pub name: String,
    /// For code.
    pub kind: FetchErrorKind,
    /// For people.
    pub detail: String,
}

impl FetchError {
    /// What to do about it.
    pub fn verdict(&self) -> Verdict {
        match self.kind {
            FetchErrorKind::WrongHash | FetchErrorKind::TooLong | FetchErrorKind::TooShort => Verdict::Quarantine,
            FetchErrorKind::Halt => Verdict::Halt,
            _ => Verdict::Retry,
        }
    }
}

/// Where objects are read from. Cheap to clone; one HTTP client each.
#[derive(Debug, Clone)]
pub struct Source {}

impl Source {
    /// Reads `file:///dir`, `http://…`, `https://…` or `s3://bucket/prefix`.
    pub fn parse(url: &str, options: &SourceOptions) -> Result<Source, BadSource> {
        let _ = (url, options);
        todo!()
    }
    /// The URL, without credentials.
    pub fn url(&self) -> &str {
        todo!()
    }
    /// Gets a small object whole, unless it is as `known`. `query_serial` gets past a stale CDN.
    pub async fn get_small(
        &self,
        name: &ObjectName,
        query_serial: Option<u64>,
        known: Option<&Etag>,
        max_bytes: u64,
    ) -> Result<Small, FetchError> {
        let _ = (name, query_serial, known, max_bytes);
        todo!()
    }
    /// Downloads an object into `part`, going on from its length; at success it is whole, verified
    /// and synced. `progress` hears the bytes there so far.
    pub async fn download(
        &self,
        name: &ObjectName,
        want: &Want,
        part: &Path,
        rules: &RateFloor,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let _ = (name, want, part, rules, progress);
        todo!()
    }
    /// `GET /v1/versions?wait=N`. Sources that are no HTTP servers: `NoSuchPage`.
    pub async fn versions_poll(&self, wait_s: u64, known: Option<&Etag>) -> Result<Polled, FetchError> {
        self.long_poll("v1/versions", &[], wait_s, known).await
    }
    /// `GET path?query&wait=N` with If-None-Match; answers up to 1 MiB.
    pub async fn long_poll(
        &self,
        path: &str,
        query: &[(&str, &str)],
        wait_s: u64,
        known: Option<&Etag>,
    ) -> Result<Polled, FetchError> {
        let _ = (path, query, wait_s, known);
        todo!()
    }
    /// `POST path`; the answer's body, up to `max_bytes`.
    pub async fn post(&self, path: &str, content_type: &str, body: Bytes, max_bytes: u64) -> Result<Bytes, FetchError> {
        let _ = (path, content_type, body, max_bytes);
        todo!()
    }
}

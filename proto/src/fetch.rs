//! Reading objects from wherever they lie: a directory, an HTTP server, a bucket.
//!
//! Owns how an object is asked for, bounded, resumed and checked against what a manifest says of it.
//! Never trusts a source: more bytes than wanted are not read, other bytes are thrown away. Never
//! retries: loops do, by `verdict()`. If the power goes, a part stays and is resumed from its
//! length, once hashed again.

mod bucket;
mod dir;
mod rate;
mod web;

use crate::clock::{Clock, SystemClock};
use crate::config::{HumanDuration, Secret};
use crate::digest::{Sha256, Sha256Stream};
use crate::failpoint;
use crate::layout::ObjectName;
use crate::retry::Verdict;
use crate::shelf::{self, Action, PartFile, ShelfError};
use crate::wire::brief;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt};
use rate::RateMeter;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use bucket::BoundedErrors;
pub use web::install_tls;

/// How sources are reached. A table in each tier's file sets it.
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
    /// How long a server may ask to be left alone (Retry-After of 429 and 503); beyond, it is asked all the same. 60 s.
    pub retry_after: HumanDuration,
    /// For `s3://` sources.
    pub s3: S3Options,
    /// What HTTP requests go over, where it is not the network.
    #[serde(skip)]
    pub wire: Option<Arc<dyn Wire>>,
    /// By whose time servers are left alone, where it is not the machine's.
    #[serde(skip)]
    pub clock: Option<Arc<dyn Clock>>,
}

/// What carries an HTTP request to its server and brings the answer's head: the network, unless something else is
/// put in its place (a simulated one).
pub trait Wire: std::fmt::Debug + Send + Sync {
    /// Asks, and waits for the answer; the error is for people.
    fn ask(&self, request: reqwest::Request) -> BoxFuture<'static, Result<reqwest::Response, String>>;
}

/// A bucket's server; keys come from the usual AWS variables (`AWS_SKIP_SIGNATURE=true` for a
/// public bucket).
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
            retry_after: HumanDuration(Duration::from_secs(60)),
            s3: S3Options::default(),
            wire: None,
            clock: None,
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

/// Hex digits of a body's SHA-256 in an ETag of ours.
const ETAG_DIGITS: usize = 16;

impl Etag {
    /// Of a body that a relay makes up itself: the beginning of its SHA-256.
    pub fn of(body: &[u8]) -> Etag {
        Etag(format!("\"{}\"", &Sha256::of(body).to_string()[..ETAG_DIGITS]))
    }

    /// Whether a body may have come with it: one of our making tells a body that was bent on its way, which would be
    /// believed for as long as the answer is “unchanged”. Any other tells nothing.
    pub fn fits(&self, body: &[u8]) -> bool {
        let digits = self.0.trim_matches('"');
        let is_ours = digits.len() == ETAG_DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit());
        !is_ours || *self == Etag::of(body)
    }
}

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

/// The slowest download worth waiting for. A floor or a window of 0 waits for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateFloor {
    /// Bytes a second, averaged over the window. 1,024.
    #[serde(deserialize_with = "crate::config::bytes")]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchErrorKind {
    /// The source does not have it.
    NotFound,
    /// 401 or 403, or no permission to read.
    Unauthorized,
    /// No connection, a silent one, TLS, a redirect elsewhere, a directory that is not mounted.
    Network,
    /// Another HTTP status.
    Status {
        /// The status.
        code: u16,
        /// How long the server will be left alone, as it asked.
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
    /// Under the rate floor; the part stays.
    Slow,
    /// The local disk is full.
    Disk,
    /// Our own files cannot be read or written.
    Local,
    /// A local fsync failed.
    Halt,
}

impl FetchErrorKind {
    /// The name of what is wrong with a whole body that is not the listed one. A cut body, a web page, a dead source or a full
    /// disk say nothing about the object.
    pub fn wrong_body(self) -> Option<&'static str> {
        match self {
            FetchErrorKind::TooLong => Some("TOO_LONG"),
            FetchErrorKind::TooShort => Some("TOO_SHORT"),
            FetchErrorKind::WrongHash => Some("WRONG_HASH"),
            _ => None,
        }
    }
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
    /// For people; not all of a long one.
    pub detail: String,
}

impl FetchError {
    /// What to do about it. `Quarantine` says that this source's object is not what the manifest
    /// lists; another source may have the right one.
    pub fn verdict(&self) -> Verdict {
        match self.kind {
            kind if kind.wrong_body().is_some() => Verdict::Quarantine,
            FetchErrorKind::Halt => Verdict::Halt,
            _ => Verdict::Retry,
        }
    }
    /// Whether the source has no such object (yet).
    pub fn is_not_found(&self) -> bool {
        self.kind == FetchErrorKind::NotFound
    }
    /// Whether that may be what it says: of a bucket that may not be listed, what is not there is forbidden.
    pub fn may_be_absent(&self) -> bool {
        self.is_not_found() || self.kind == FetchErrorKind::Unauthorized
    }
}

/// A failure before it is known of which object.
#[derive(Debug)]
struct Trouble {
    kind: FetchErrorKind,
    detail: String,
}

impl Trouble {
    fn new(kind: FetchErrorKind, detail: impl Into<String>) -> Self {
        Trouble { kind, detail: detail.into() }
    }
    fn page() -> Self {
        Trouble::new(FetchErrorKind::NotAnObject, "the answer is a web page (captive portal or proxy?)")
    }
    fn too_long(max: u64) -> Self {
        Trouble::new(FetchErrorKind::TooLong, format!("it has more than {max} bytes"))
    }
}

impl From<ShelfError> for Trouble {
    fn from(e: ShelfError) -> Self {
        let kind = match e.verdict() {
            Verdict::Halt => FetchErrorKind::Halt,
            _ if e.is_disk_full() => FetchErrorKind::Disk,
            _ => FetchErrorKind::Local,
        };
        Trouble::new(kind, e.to_string())
    }
}

/// An object being read from `start`.
struct Opened {
    start: u64,
    /// The whole object's length, where the source tells.
    total: Option<u64>,
    body: BoxStream<'static, Result<Bytes, Trouble>>,
}

/// Where objects are read from. Cheap to clone; the clones share one client and its connections.
#[derive(Debug, Clone)]
pub struct Source {
    url: Arc<str>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Dir(dir::Dir),
    Web(web::Web),
    Bucket(bucket::Bucket),
}

impl Source {
    /// Reads `file:///dir`, `http://…`, `https://…` or `s3://bucket/prefix`. Relative ones go
    /// through `config::resolve_url` first.
    pub fn parse(url: &str, options: &SourceOptions) -> Result<Source, BadSource> {
        let shown = without_credentials(url);
        let bad = |reason: String| BadSource { url: shown.clone(), reason };
        if options.connect_timeout.0.is_zero() || options.read_timeout.0.is_zero() {
            return Err(bad("connect_timeout and read_timeout must be longer than 0".to_owned()));
        }
        // Also where this source has no need of it: the next one may.
        web::ca_pem(options).map_err(bad)?;
        let parsed = url::Url::parse(url)
            .map_err(|e| bad(format!("{e}; write file:///dir, https://… or s3://bucket/prefix")))?;
        let kind = match parsed.scheme() {
            "file" if url.starts_with("file:///") => {
                let root = parsed.to_file_path().map_err(|()| bad("it is no path".to_owned()))?;
                Kind::Dir(dir::Dir::new(&root, options.read_timeout.0))
            }
            "file" => return Err(bad("the path must be absolute, file:///dir".to_owned())),
            "http" | "https" => Kind::Web(web::Web::new(parsed, options).map_err(bad)?),
            "s3" => Kind::Bucket(bucket::Bucket::new(&parsed, options).map_err(bad)?),
            other => {
                return Err(bad(format!("`{other}` is unknown; write file:///dir, https://… or s3://bucket/prefix")));
            }
        };
        Ok(Source { url: shown.as_str().into(), kind })
    }

    /// The URL, without credentials.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether it is an HTTP server, which may have pages to poll and post to.
    pub fn is_web(&self) -> bool {
        matches!(self.kind, Kind::Web(_))
    }

    /// Gets a small object whole, unless it is as `known`. `query_serial` gets past a stale CDN.
    pub async fn get_small(
        &self,
        name: &ObjectName,
        query_serial: Option<u64>,
        known: Option<&Etag>,
        max_bytes: u64,
    ) -> Result<Small, FetchError> {
        let path = name.to_string();
        let outcome = match &self.kind {
            Kind::Dir(dir) => dir.get_small(path, known.cloned(), max_bytes).await,
            Kind::Web(web) => web.get_small(&path, query_serial, known, max_bytes).await,
            Kind::Bucket(bucket) => bucket.get_small(&path, known, max_bytes).await,
        };
        outcome.map_err(|t| self.error(name.to_string(), t))
    }

    /// Downloads an object into `part`, going on from its length; at success the part is whole,
    /// verified and synced. `progress` hears the bytes there so far, resumed ones included.
    /// A part that turns out wrong is deleted; one that was cut off stays.
    pub async fn download(
        &self,
        name: &ObjectName,
        want: &Want,
        part: &Path,
        rules: &RateFloor,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), FetchError> {
        let outcome = self.fill_part(&name.to_string(), want, part, rules, progress).await;
        outcome.map_err(|t| self.error(name.to_string(), t))
    }

    async fn fill_part(
        &self,
        path: &str,
        want: &Want,
        part: &Path,
        rules: &RateFloor,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), Trouble> {
        let mut work = Work::open(part.to_owned(), *want).await?;
        if work.length == want.bytes && work.hash() != Some(want.sha256) {
            work.restart().await?;
        }
        if work.length < want.bytes {
            let resumed = work.length > 0;
            work = self.fill(path, work, rules, progress).await?;
            if resumed && work.hash() != Some(want.sha256) {
                // The old bytes may have been another source's: judge this one by its own.
                work.restart().await?;
                work = self.fill(path, work, rules, progress).await?;
            }
        }
        work.finish().await
    }

    /// Brings the part to its wanted length.
    async fn fill(
        &self,
        path: &str,
        mut work: Work,
        rules: &RateFloor,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Work, Trouble> {
        let want = work.want.bytes;
        let opened = self.open(path, work.length, want).await?;
        // Fused: one that is empty ends at the first look, and is asked again below.
        let mut body = opened.body.fuse();
        // Before anything is judged by its length, or the part is begun anew: a login page says nothing about the pack.
        let mut first = None;
        if self.is_web() && opened.start == 0 {
            first = body.next().await;
            if matches!(&first, Some(Ok(chunk)) if web::is_page(chunk)) {
                return Err(Trouble::page());
            }
        }
        if opened.start != work.length {
            if opened.start != 0 {
                let detail = format!("asked for bytes from {}, got them from {}", work.length, opened.start);
                return Err(Trouble::new(FetchErrorKind::NotWhole, detail));
            }
            // An answer that breaks or ends before its first byte is worth no part that is there.
            match first {
                Some(Err(broken)) => return Err(broken),
                None if self.is_web() && opened.total.is_none() => {
                    return Err(Trouble::new(FetchErrorKind::NotWhole, "the answer is empty"));
                }
                _ => work.restart().await?,
            }
        }
        match opened.total {
            Some(n) if n > want => return Err(work.discard(Trouble::too_long(want)).await),
            Some(n) if n < want => {
                let detail = format!("it has {n} bytes, the manifest says {want}");
                return Err(work.discard(Trouble::new(FetchErrorKind::TooShort, detail)).await);
            }
            _ => {}
        }
        let clock = SystemClock::default();
        let mut meter = RateMeter::new(*rules);
        progress(work.length);
        let cut = loop {
            let next = match first.take() {
                Some(first) => Some(first),
                None => body.next().await,
            };
            let chunk = match next {
                Some(Ok(chunk)) => chunk,
                Some(Err(t)) => break Some(t),
                None => break None,
            };
            if work.arrived() + chunk.len() as u64 > want {
                return Err(work.discard(Trouble::too_long(want)).await);
            }
            work.take(&chunk, clock.monotonic()).await?;
            progress(work.arrived());
            if meter.is_too_slow(clock.monotonic(), chunk.len() as u64) && work.arrived() < want {
                break Some(Trouble::new(FetchErrorKind::Slow, rate::too_slow(rules)));
            }
        };
        work.flush().await?;
        let there = work.length;
        match cut {
            Some(t) => Err(Trouble::new(t.kind, format!("{} ({there} of {want} bytes are there)", t.detail))),
            None if there < want => {
                Err(Trouble::new(FetchErrorKind::NotWhole, format!("the answer ended after {there} of {want} bytes")))
            }
            None => Ok(work),
        }
    }

    async fn open(&self, path: &str, start: u64, want: u64) -> Result<Opened, Trouble> {
        match &self.kind {
            Kind::Dir(dir) => dir.open(path.to_owned(), start).await,
            Kind::Web(web) => web.open(path, start, want).await,
            Kind::Bucket(bucket) => bucket.open(path, start).await,
        }
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
        let Kind::Web(web) = &self.kind else { return Ok(Polled::NoSuchPage) };
        web.long_poll(path, query, wait_s, known).await.map_err(|t| self.error(path.to_owned(), t))
    }

    /// `POST path`; the answer's body, up to `max_bytes`. Sources that are no HTTP servers: `NotFound`.
    pub async fn post(&self, path: &str, content_type: &str, body: Bytes, max_bytes: u64) -> Result<Bytes, FetchError> {
        let outcome = match &self.kind {
            Kind::Web(web) => web.post(path, content_type, body, max_bytes).await,
            _ => Err(Trouble::new(FetchErrorKind::NotFound, "it takes no posts")),
        };
        outcome.map_err(|t| self.error(path.to_owned(), t))
    }

    fn error(&self, name: String, t: Trouble) -> FetchError {
        FetchError { source_url: self.url.to_string(), name, kind: t.kind, detail: brief(&t.detail).to_owned() }
    }
}

/// A URL to show: user, password and query (a signed one's key) taken out.
pub fn without_credentials(url: &str) -> String {
    let Ok(mut u) = url::Url::parse(url) else {
        return url.rsplit('@').next().unwrap_or_default().split('?').next().unwrap_or_default().to_owned();
    };
    let _ = u.set_username("");
    let _ = u.set_password(None);
    u.set_query(None);
    u.to_string()
}

/// Whether a file that was verified is still what was wanted. Blocks.
pub fn is_as_wanted(file: &Path, want: &Want) -> Result<bool, ShelfError> {
    let read = |source| ShelfError { action: Action::Read, path: file.to_owned(), source };
    let length = shelf::open_regular(file)?.metadata().map_err(read)?.len();
    if length != want.bytes {
        return Ok(false);
    }
    Ok(shelf::hash_file(file)? == want.sha256)
}

/// What is written at once.
const BUFFER: usize = 256 << 10;
/// What comes is written after this at the latest, as more comes: news end a download, and a slow one would never get on.
const UNWRITTEN: Duration = Duration::from_secs(1);

/// A part, the hash of what it holds, and what arrived since the last write. Touches the disk off
/// the async threads.
struct Work {
    want: Want,
    /// Out while a job runs on it.
    disk: Option<OnDisk>,
    /// Bytes on the disk.
    length: u64,
    buffer: Vec<u8>,
    /// When the first of them came, by the monotonic clock.
    since: Option<Duration>,
}

struct OnDisk {
    part: PartFile,
    hash: Sha256Stream,
}

/// All of a small body, at most `max` bytes and not slower than the floor.
async fn whole(
    mut body: impl futures_util::Stream<Item = Result<Bytes, Trouble>> + Unpin,
    max: u64,
    read_timeout: Duration,
) -> Result<Vec<u8>, Trouble> {
    let rules = rate::of_small(read_timeout);
    let (clock, mut meter) = (SystemClock::default(), RateMeter::new(rules));
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        if bytes.len() as u64 + chunk.len() as u64 > max {
            return Err(Trouble::too_long(max));
        }
        bytes.extend_from_slice(&chunk);
        if meter.is_too_slow(clock.monotonic(), chunk.len() as u64) {
            return Err(Trouble::new(FetchErrorKind::Slow, rate::too_slow(&rules)));
        }
    }
    Ok(bytes)
}

async fn off_thread<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, Trouble> + Send + 'static,
) -> Result<T, Trouble> {
    match tokio::task::spawn_blocking(job).await {
        Ok(outcome) => outcome,
        Err(e) => Err(Trouble::new(FetchErrorKind::Local, format!("a task broke off: {e}"))),
    }
}

impl Work {
    /// Opens the part and hashes what it holds; one that is too long starts over.
    async fn open(path: PathBuf, want: Want) -> Result<Work, Trouble> {
        off_thread(move || {
            let mut part = PartFile::open(&path)?;
            if part.length() > want.bytes {
                part.restart()?;
            }
            let mut hash = Sha256Stream::default();
            part.read_back(|chunk| hash.update(chunk))?;
            let (length, disk) = (part.length(), Some(OnDisk { part, hash }));
            Ok(Work { want, disk, length, buffer: Vec::new(), since: None })
        })
        .await
    }

    /// Bytes on the disk and waiting.
    fn arrived(&self) -> u64 {
        self.length + self.buffer.len() as u64
    }

    fn hash(&self) -> Option<Sha256> {
        self.disk.as_ref().map(|d| d.hash.clone().finish())
    }

    async fn take(&mut self, chunk: &[u8], now: Duration) -> Result<(), Trouble> {
        self.buffer.extend_from_slice(chunk);
        let waited = now.saturating_sub(*self.since.get_or_insert(now));
        if self.buffer.len() >= BUFFER || waited >= UNWRITTEN { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Trouble> {
        self.since = None;
        if self.buffer.is_empty() {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        self.buffer = self
            .run(move |d| {
                failpoint::step("fetch.write", || d.part.write(&buffer))?;
                d.hash.update(&buffer);
                // Its room serves the next bytes.
                buffer.clear();
                Ok(buffer)
            })
            .await?;
        Ok(())
    }

    async fn restart(&mut self) -> Result<(), Trouble> {
        self.buffer.clear();
        self.since = None;
        self.run(|d| {
            d.hash = Sha256Stream::default();
            d.part.restart()
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &mut self,
        job: impl FnOnce(&mut OnDisk) -> Result<T, ShelfError> + Send + 'static,
    ) -> Result<T, Trouble> {
        let mut disk = self.take_disk()?;
        let (disk, outcome) = off_thread(move || {
            let outcome = job(&mut disk);
            Ok((disk, outcome))
        })
        .await?;
        self.length = disk.part.length();
        self.disk = Some(disk);
        Ok(outcome?)
    }

    fn take_disk(&mut self) -> Result<OnDisk, Trouble> {
        self.disk.take().ok_or_else(|| Trouble::new(FetchErrorKind::Local, "an earlier task on the part broke off"))
    }

    /// Deletes the part, and gives back why.
    async fn discard(mut self, why: Trouble) -> Trouble {
        let Ok(disk) = self.take_disk() else { return why };
        match off_thread(move || Ok(disk.part.discard()?)).await {
            Err(t) if t.kind == FetchErrorKind::Halt => t,
            _ => why,
        }
    }

    /// Judges the whole part, and syncs it.
    async fn finish(mut self) -> Result<(), Trouble> {
        if let Some(found) = self.hash().filter(|found| *found != self.want.sha256) {
            let detail = format!("its SHA-256 is {found}, the manifest says {}", self.want.sha256);
            return Err(self.discard(Trouble::new(FetchErrorKind::WrongHash, detail)).await);
        }
        let disk = self.take_disk()?;
        off_thread(move || Ok(failpoint::step("fetch.sync", || disk.part.finish())?)).await
    }
}

#[cfg(test)]
mod tests;

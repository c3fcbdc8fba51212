//! What is in `ok/`, as it is served: an index by URL path, and a bounded memory cache in front of the
//! disk. A hot answer touches no disk and copies no bytes. Nothing is served that was not put here by
//! name, so that no URL can lead anywhere else. Holds no state that a restart does not rebuild.

use crate::config::CacheRules;
use crate::shelves;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use proto::clock::Clock;
use proto::digest::Sha256;
use proto::http::{Body, FileBody, RangeAsked, none_match, range_asked};
use proto::layout::{ObjectName, PackName};
use proto::shelf::{self, ShelfError};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::mpsc;

/// A pack that is served from the disk is hashed again after this: rot must not go out as good.
const RECHECK: Duration = Duration::from_secs(60);

/// An object that is served.
#[derive(Debug)]
pub struct Object {
    name: ObjectName,
    path: PathBuf,
    length: u64,
    sha256: Sha256,
    etag: String,
    /// Of a 200, whole.
    headers: HeaderMap,
    cached: RwLock<Option<Arc<InMemory>>>,
    /// When it was last asked for, in requests.
    used: AtomicU64,
    loading: tokio::sync::Mutex<()>,
    /// The file that was hashed last, and when that was done. Held while it is: one hash, however many ask.
    checked: tokio::sync::Mutex<Option<(shelf::FileId, Duration)>>,
}

/// An object's bytes in memory. A pack's are counted for as long as anybody holds them: an answer to a slow client, too.
#[derive(Debug)]
struct InMemory {
    bytes: Vec<u8>,
    counted: u64,
    held: Arc<AtomicU64>,
}

impl InMemory {
    /// Room for so many bytes, taken before they are read.
    fn reserve(length: u64, held: &Arc<AtomicU64>) -> InMemory {
        held.fetch_add(length, Ordering::Relaxed);
        InMemory { bytes: Vec::new(), counted: length, held: Arc::clone(held) }
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        self.held.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

/// One answer's hold on them.
struct Lent(Arc<InMemory>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

impl Object {
    fn new(name: ObjectName, path: PathBuf, length: u64, sha256: Sha256, cached: Option<Arc<InMemory>>) -> Object {
        let etag = format!("\"{}\"", &sha256.to_string()[..32]);
        let mut headers = HeaderMap::with_capacity(8);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(name.content_type()));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(name.cache_control()));
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        if let Ok(etag) = HeaderValue::from_str(&etag) {
            headers.insert(header::ETAG, etag);
        }
        Object {
            name,
            path,
            length,
            sha256,
            etag,
            headers,
            cached: RwLock::new(cached),
            used: AtomicU64::new(0),
            loading: tokio::sync::Mutex::new(()),
            checked: tokio::sync::Mutex::new(None),
        }
    }

    fn in_memory(&self) -> Option<Arc<InMemory>> {
        self.cached.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether its bytes are in memory, and no answer holds them: to let them go gives room.
    fn is_idle_in_memory(&self) -> bool {
        let cached = self.cached.read().unwrap_or_else(PoisonError::into_inner);
        cached.as_ref().is_some_and(|bytes| Arc::strong_count(bytes) == 1)
    }
}

/// The index and its cache.
pub struct Objects {
    by_path: RwLock<HashMap<String, Arc<Object>>>,
    rules: CacheRules,
    /// Bytes of packs in memory.
    held: Arc<AtomicU64>,
    clock: AtomicU64,
    rotten: mpsc::UnboundedSender<PackName>,
    time: Arc<dyn Clock>,
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objects").field("rules", &self.rules).finish_non_exhaustive()
    }
}

impl Objects {
    /// An empty index. Packs whose files turn out rotten are told to `rotten`.
    pub fn new(rules: CacheRules, rotten: mpsc::UnboundedSender<PackName>, time: Arc<dyn Clock>) -> Arc<Objects> {
        let (by_path, held, clock) = (RwLock::default(), Arc::default(), AtomicU64::new(0));
        Arc::new(Objects { by_path, rules, held, clock, rotten, time })
    }

    /// Serves a pack from its file.
    pub fn put_pack(&self, name: PackName, path: PathBuf, length: u64, sha256: Sha256) {
        self.insert(Object::new(name.into(), path, length, sha256, None));
    }

    /// Serves a small object from memory.
    pub fn put_small(&self, name: ObjectName, bytes: Bytes) {
        let (length, sha256) = (bytes.len() as u64, Sha256::of(&bytes));
        let in_memory = InMemory { bytes: bytes.into(), counted: 0, held: Arc::clone(&self.held) };
        self.insert(Object::new(name, PathBuf::new(), length, sha256, Some(Arc::new(in_memory))));
    }

    fn insert(&self, object: Object) {
        let key = format!("/{}", object.name);
        let old = self.by_path.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::new(object));
        self.let_go(old.as_deref());
    }

    /// Serves an object no more.
    pub fn remove(&self, name: &ObjectName) {
        let old = self.by_path.write().unwrap_or_else(PoisonError::into_inner).remove(&format!("/{name}"));
        self.let_go(old.as_deref());
    }

    /// Takes a pack's bytes out of memory.
    fn let_go(&self, object: Option<&Object>) {
        if let Some(object) = object.filter(|o| matches!(o.name, ObjectName::Pack(_))) {
            *object.cached.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// The object of a URL path, which may be written with percent signs: `%40` for `@`, as some clients and proxies do.
    pub fn get(&self, path: &str) -> Option<Arc<Object>> {
        let path = if path.contains('%') { Cow::Owned(decoded(path)?) } else { Cow::Borrowed(path) };
        self.by_path.read().unwrap_or_else(PoisonError::into_inner).get(&*path).cloned()
    }

    /// Bytes of packs in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Reads a new pack into memory, before everybody asks for it.
    pub async fn warm(&self, name: &PackName) {
        if let Some(object) = self.get(&format!("/packs/{name}")) {
            let _ = self.load(&object).await;
        }
    }

    /// Answers GET and HEAD of an object.
    pub async fn answer(self: &Arc<Self>, object: &Arc<Object>, asked: &HeaderMap, head_only: bool) -> Response<Body> {
        object.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if asked.contains_key(header::IF_NONE_MATCH) && none_match(asked, &object.etag) {
            return not_modified(object);
        }
        let range = if asked.contains_key(header::RANGE) && !head_only {
            range_asked(asked, object.length, &object.etag)
        } else {
            RangeAsked::Whole
        };
        let (start, length) = match range {
            RangeAsked::Whole => (0, object.length),
            RangeAsked::Part { start, length } => (start, length),
            RangeAsked::Unsatisfiable => return unsatisfiable(object.length),
        };
        let body = if head_only {
            Ok(Body::Empty)
        } else if let Some(bytes) = object.in_memory() {
            Ok(slice(lend(bytes), start, length))
        } else {
            self.body_from_disk(object, start, length).await
        };
        match body {
            Ok(body) => whole_or_part(object, body, range),
            Err(_) => unavailable(),
        }
    }

    async fn body_from_disk(self: &Arc<Self>, object: &Arc<Object>, start: u64, length: u64) -> Result<Body, Gone> {
        if let Some(bytes) = self.load(object).await? {
            return Ok(slice(lend(bytes), start, length));
        }
        self.check(object).await?;
        let path = object.path.clone();
        let opened = tokio::task::spawn_blocking(move || shelf::open_regular(&path)).await;
        match opened {
            Ok(Ok(file)) => Ok(Body::File(FileBody::new(file, start, length))),
            Ok(Err(e)) => Err(self.failed(object, &e).await),
            Err(_) => Err(Gone),
        }
    }

    /// Hashes a file that is too large for memory, unless that very file was hashed a moment ago. Goes on to its end when
    /// whoever asked has given up (a register after its `read_timeout`): the next one has what was found.
    async fn check(self: &Arc<Self>, object: &Arc<Object>) -> Result<(), Gone> {
        let (objects, object) = (Arc::clone(self), Arc::clone(object));
        tokio::spawn(async move { objects.check_now(&object).await }).await.unwrap_or(Err(Gone))
    }

    async fn check_now(&self, object: &Arc<Object>) -> Result<(), Gone> {
        let mut checked = object.checked.lock().await;
        // It was found rotten while this one waited.
        if !self.is_served(object) {
            return Err(Gone);
        }
        let now = self.time.monotonic();
        let (path, known) = (object.path.clone(), *checked);
        let look = move || {
            let file = shelf::file_id(&path)?;
            let fresh = known.is_some_and(|(f, at)| f == file && now.saturating_sub(at) < RECHECK);
            Ok::<_, shelf::ShelfError>((file, if fresh { None } else { Some(shelf::hash_file(&path)?) }))
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Ok((_, None))) => Ok(()),
            Ok(Ok((file, Some(found)))) if found == object.sha256 => {
                *checked = Some((file, self.time.monotonic()));
                Ok(())
            }
            Ok(Ok(_)) => Err(self.lost(object, ROTTEN).await),
            Ok(Err(e)) => Err(self.failed(object, &e).await),
            Err(_) => Err(Gone),
        }
    }

    /// Brings an object into memory, once however many ask; none if it is too large for that, or slow answers hold all
    /// the room there is. Its hash is checked on the way.
    async fn load(&self, object: &Arc<Object>) -> Result<Option<Arc<InMemory>>, Gone> {
        if object.length > self.rules.object.0.min(self.rules.bytes.0) {
            return Ok(None);
        }
        let _one = object.loading.lock().await;
        // It was found rotten while this one waited.
        if !self.is_served(object) {
            return Err(Gone);
        }
        if let Some(bytes) = object.in_memory() {
            return Ok(Some(bytes));
        }
        let Some(mut room) = self.make_room(object.length) else { return Ok(None) };
        let (path, length) = (object.path.clone(), object.length);
        let read = tokio::task::spawn_blocking(move || shelf::read_bounded(&path, length)).await;
        room.bytes = match read {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(e)) => return Err(self.failed(object, &e).await),
            Err(_) => return Err(Gone),
        };
        if Sha256::of(&room.bytes) != object.sha256 {
            return Err(self.lost(object, ROTTEN).await);
        }
        object.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        let bytes = Arc::new(room);
        *object.cached.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&bytes));
        // It may have been removed meanwhile; then its bytes must not stay.
        if !self.is_served(object) {
            self.let_go(Some(object));
        }
        Ok(Some(bytes))
    }

    fn is_served(&self, object: &Arc<Object>) -> bool {
        self.get(&format!("/{}", object.name)).is_some_and(|current| Arc::ptr_eq(&current, object))
    }

    /// Takes room for so many bytes, and lets the least used packs go for it; those that answers hold would give none.
    fn make_room(&self, length: u64) -> Option<InMemory> {
        let room = InMemory::reserve(length, &self.held);
        while self.cached_bytes() > self.rules.bytes.0 {
            let by_path = self.by_path.read().unwrap_or_else(PoisonError::into_inner);
            let oldest = by_path
                .values()
                .filter(|o| matches!(o.name, ObjectName::Pack(_)) && o.is_idle_in_memory())
                .min_by_key(|o| o.used.load(Ordering::Relaxed))
                .cloned();
            drop(by_path);
            self.let_go(Some(&*oldest?));
        }
        Some(room)
    }

    /// A file could not be read: it is lost, but where the machine is short of something.
    async fn failed(&self, object: &Arc<Object>, error: &ShelfError) -> Gone {
        if shelves::is_exhausted(&error.source) {
            tracing::warn!(object = %object.name, "cannot be served now: {error}");
            return Gone;
        }
        self.lost(object, &error.to_string()).await
    }

    /// A file is gone or damaged: it is served no more, and fetched anew. It is looked at again first, so that no healthy one
    /// goes.
    async fn lost(&self, object: &Arc<Object>, why: &str) -> Gone {
        let path = object.path.clone();
        match tokio::task::spawn_blocking(move || shelf::hash_file(&path)).await {
            Ok(Ok(found)) if found == object.sha256 => {
                tracing::warn!(object = %object.name, "could not be served; it can at a second look: {why}");
                return Gone;
            }
            Ok(Err(e)) if shelves::is_exhausted(&e.source) => return Gone,
            Err(_) => return Gone,
            // Another one found it, and it may be back already.
            Ok(_) if !self.is_served(object) => return Gone,
            Ok(_) => {}
        }
        tracing::error!(object = %object.name, "cannot be served: {why}");
        self.remove(&object.name);
        if let ObjectName::Pack(name) = &object.name {
            let _ = self.rotten.send(name.clone());
        }
        Gone
    }
}

const ROTTEN: &str = "its bytes have changed on the disk";

/// The file is gone or damaged, or cannot be read now.
struct Gone;

/// A path with each `%XX` as the byte that it stands for, once; none where that is no text.
fn decoded(path: &str) -> Option<String> {
    let mut parts = path.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2).filter(|(d, _)| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

fn lend(bytes: Arc<InMemory>) -> Bytes {
    Bytes::from_owner(Lent(bytes))
}

fn slice(bytes: Bytes, start: u64, length: u64) -> Body {
    let end = usize::try_from(start + length).unwrap_or(usize::MAX).min(bytes.len());
    let start = usize::try_from(start).unwrap_or(usize::MAX).min(end);
    Body::Bytes(if start == 0 && end == bytes.len() { bytes } else { bytes.slice(start..end) })
}

fn whole_or_part(object: &Object, body: Body, range: RangeAsked) -> Response<Body> {
    let mut response = Response::new(body);
    *response.headers_mut() = object.headers.clone();
    if let RangeAsked::Part { start, length } = range {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        let range = format!("bytes {start}-{}/{}", start + length - 1, object.length);
        if let Ok(range) = HeaderValue::from_str(&range) {
            headers.insert(header::CONTENT_RANGE, range);
        }
    }
    response
}

fn not_modified(object: &Object) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    for name in [header::ETAG, header::CACHE_CONTROL] {
        if let Some(value) = object.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response
}

fn unsatisfiable(length: u64) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
    if let Ok(range) = HeaderValue::from_str(&format!("bytes */{length}")) {
        response.headers_mut().insert(header::CONTENT_RANGE, range);
    }
    response
}

fn unavailable() -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
    response
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use proto::clock::{TestClock, Timestamp};
    use proto::config::HumanBytes;

    fn name(n: u64) -> PackName {
        format!("price@all/{n:010}.full.pack").parse().unwrap()
    }

    #[tokio::test]
    async fn slow_answers_count_and_never_make_the_cache_exceed_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, _rotten) = mpsc::unbounded_channel();
        let rules = CacheRules { bytes: HumanBytes(250), object: HumanBytes(100) };
        let objects = Objects::new(rules, tell, Arc::new(TestClock::at("2026-01-01T00:00:00Z")));
        let get = async |n| {
            let object = objects.get(&format!("/packs/{}", name(n))).unwrap();
            objects.answer(&object, &HeaderMap::new(), false).await.into_body()
        };
        for n in 1..=5 {
            let path = dir.path().join(n.to_string());
            std::fs::write(&path, [n as u8; 100]).unwrap();
            objects.put_pack(name(n), path, 100, Sha256::of(&[n as u8; 100]));
        }
        let slow = [get(1).await, get(2).await, get(1).await];
        assert!(slow.iter().all(|body| matches!(body, Body::Bytes(_))));
        // What they hold stays in memory for others; the rest is read from the disk.
        for n in [3, 4, 5, 3] {
            assert!(matches!(get(n).await, Body::File(_)));
            assert!(matches!(get(1).await, Body::Bytes(_)));
            assert_eq!(objects.cached_bytes(), 200);
        }
        objects.remove(&name(1).into());
        assert_eq!(objects.cached_bytes(), 200, "two answers hold it");
        drop(slow);
        assert_eq!(objects.cached_bytes(), 100);
        assert!(matches!(get(3).await, Body::Bytes(_)));
    }

    #[tokio::test]
    async fn a_machine_short_of_files_costs_no_healthy_pack() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, mut rotten) = mpsc::unbounded_channel();
        let rules = CacheRules { bytes: HumanBytes(250), object: HumanBytes(100) };
        let objects = Objects::new(rules, tell, Arc::new(TestClock::at("2026-01-01T00:00:00Z")));
        let path = dir.path().join("1");
        std::fs::write(&path, b"abc").unwrap();
        objects.put_pack(name(1), path.clone(), 3, Sha256::of(b"abc"));
        let object = objects.get(&format!("/packs/{}", name(1))).unwrap();
        let mut failed = async |errno: i32| {
            let source = std::io::Error::from_raw_os_error(errno);
            objects.failed(&object, &ShelfError { action: shelf::Action::Open, path: path.clone(), source }).await;
            (rotten.try_recv().is_err(), objects.get(&format!("/packs/{}", name(1))).is_some())
        };
        // EMFILE; EIO that is over at a second look; EMFILE where the file is gone; ENOENT.
        assert_eq!(failed(24).await, (true, true));
        assert_eq!(failed(5).await, (true, true));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(failed(24).await, (true, true));
        assert_eq!(failed(2).await, (false, false));
    }

    /// A clock on which an hour passes between two looks.
    #[derive(Debug)]
    struct Hourly(AtomicU64);

    impl Clock for Hourly {
        fn now(&self) -> Timestamp {
            Timestamp::UNIX_EPOCH
        }
        fn monotonic(&self) -> Duration {
            Duration::from_secs(3600 * self.0.fetch_add(1, Ordering::Relaxed))
        }
    }

    #[tokio::test]
    async fn a_large_pack_is_hashed_to_the_end_though_whoever_asked_has_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, mut rotten) = mpsc::unbounded_channel();
        let rules = CacheRules { bytes: HumanBytes(250), object: HumanBytes(2) };
        let objects = Objects::new(rules, tell, Arc::new(Hourly(AtomicU64::new(0))));
        let path = dir.path().join("1");
        std::fs::write(&path, b"abc").unwrap();
        objects.put_pack(name(1), path.clone(), 3, Sha256::of(b"abc"));
        let object = objects.get(&format!("/packs/{}", name(1))).unwrap();
        let ask_in_vain = async || {
            let nothing = HeaderMap::new();
            let mut asked = Box::pin(objects.answer(&object, &nothing, false));
            assert!(futures_util::poll!(&mut asked).is_pending());
        };
        ask_in_vain().await;
        let hashed = async {
            loop {
                let checked = *object.checked.lock().await;
                match checked {
                    Some((_, at)) => return at,
                    None => tokio::task::yield_now().await,
                }
            }
        };
        // It counts from its end: it may have taken longer than that.
        assert_eq!(tokio::time::timeout(RECHECK, hashed).await.unwrap(), Duration::from_secs(3600));
        // What is found rotten is fetched anew, though nobody waits for the answer.
        std::fs::write(&path, b"abd").unwrap();
        ask_in_vain().await;
        assert_eq!(tokio::time::timeout(RECHECK, rotten.recv()).await.unwrap(), Some(name(1)));
    }

    #[tokio::test]
    async fn the_cache_keeps_its_bound_and_rot_is_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, mut rotten) = mpsc::unbounded_channel();
        let rules = CacheRules { bytes: HumanBytes(250), object: HumanBytes(100) };
        let time = Arc::new(TestClock::at("2026-01-01T00:00:00Z"));
        let objects = Objects::new(rules, tell, time.clone());
        for n in 1..=4 {
            let path = dir.path().join(n.to_string());
            let length = if n == 4 { 101 } else { 100 };
            let body = vec![n as u8; length];
            std::fs::write(&path, &body).unwrap();
            objects.put_pack(name(n), path, length as u64, Sha256::of(&body));
            objects.warm(&name(n)).await;
            assert!(objects.cached_bytes() <= 250, "{}", objects.cached_bytes());
        }
        // 1 was the least used when 3 came; 4 is too large for memory and is served from disk.
        let cached = |n| objects.get(&format!("/packs/{}", name(n))).unwrap().in_memory().is_some();
        assert_eq!([1, 2, 3, 4].map(cached), [false, true, true, false]);
        let four = objects.get(&format!("/packs/{}", name(4))).unwrap();
        assert!(matches!(objects.answer(&four, &HeaderMap::new(), false).await.body(), Body::File(_)));
        objects.remove(&name(2).into());
        assert_eq!(objects.cached_bytes(), 100);
        // A bit flips on the disk.
        std::fs::write(dir.path().join("1"), vec![9; 100]).unwrap();
        let one = objects.get(&format!("/packs/{}", name(1))).unwrap();
        let nothing = HeaderMap::new();
        let ask = || objects.answer(&one, &nothing, false);
        let answers = tokio::join!(ask(), ask(), ask());
        for answer in [answers.0, answers.1, answers.2] {
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        }
        assert_eq!((rotten.try_recv().ok(), rotten.try_recv().ok()), (Some(name(1)), None), "told once");
        assert!(objects.get(&format!("/packs/{}", name(1))).is_none());
        // Neither in one that is too large for memory: another file at once, the same after a while.
        let rot = || std::fs::write(dir.path().join("4"), vec![9; 101]).unwrap();
        let status = async || objects.answer(&four, &HeaderMap::new(), false).await.status();
        let before = std::fs::metadata(dir.path().join("4")).unwrap().modified().unwrap();
        rot();
        std::fs::File::open(dir.path().join("4")).unwrap().set_modified(before).unwrap();
        assert_eq!(status().await, StatusCode::OK, "hashed a moment ago");
        time.advance(RECHECK);
        assert_eq!(status().await, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(rotten.try_recv().unwrap(), name(4));
    }
}

//! An S3 subset on a directory: PUT, GET with Range and If-None-Match, HEAD, DELETE, delete of many, list (v2),
//! multipart.
//! By default it behaves as Alibaba's OSS does towards S3 clients: conditions on PUT are answered by 501.

use crate::RUNTIME;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Method, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use tempfile::TempDir;
use tokio::task::AbortHandle;

/// What becomes of If-Match and If-None-Match on a PUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditions {
    /// 412 when they do not hold, as S3.
    Kept,
    /// Nothing, as some copies of S3.
    Ignored,
    /// 501, as OSS.
    Refused,
}

/// A request as it came, for tests that assert what was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `PUT`.
    pub method: String,
    /// The key within the bucket, `stores/0421/manifest.json`; "" for the bucket itself.
    pub key: String,
    /// The query, or "".
    pub query: String,
    /// The status answered.
    pub status: u16,
}

type Answer = Response<Full<Bytes>>;

#[derive(Debug)]
struct State {
    conditions: Conditions,
    root: PathBuf,
    requests: Vec<Request>,
    failures: (u16, u32),
    uploads: HashMap<String, BTreeMap<u32, Bytes>>,
}

/// The stand-in. Its bucket `packs` is a directory that a test may read and spoil.
#[derive(Debug)]
pub struct StandIn {
    port: u16,
    state: Arc<Mutex<State>>,
    task: AbortHandle,
    dir: TempDir,
}

impl StandIn {
    /// Starts one with a bucket `packs`. Any key and signature is taken.
    pub fn start(conditions: Conditions) -> StandIn {
        let dir = crate::temp_dir("oss");
        let root = dir.path().join("packs");
        std::fs::create_dir(&root).unwrap();
        let state = State { conditions, root, requests: Vec::new(), failures: (0, 0), uploads: HashMap::new() };
        let state = Arc::new(Mutex::new(state));
        let listener = RUNTIME.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = state.clone();
        let task = RUNTIME.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = shared.clone();
                let service = hyper::service::service_fn(move |r| answer(state.clone(), r));
                let io = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            }
        });
        StandIn { port, state, task: task.abort_handle(), dir }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The bucket.
    pub fn bucket(&self) -> &'static str {
        "packs"
    }

    /// Keys for the product's commands; any would do.
    pub fn env(&self) -> [(&'static str, &'static str); 2] {
        [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "testtest")]
    }

    /// The bucket's directory: a key is a path in it.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("packs")
    }

    /// Answers the next `n` requests with this status, without doing them.
    pub fn fail_next(&self, status: u16, n: u32) {
        self.lock().failures = (status, n);
    }

    /// The requests so far; cleared by this call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.lock().requests)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(state: Arc<Mutex<State>>, request: hyper::Request<Incoming>) -> Result<Answer, Infallible> {
    let (parts, body) = request.into_parts();
    let Ok(body) = body.collect().await.map(|b| b.to_bytes()) else {
        return Ok(fail(400, "IncompleteBody"));
    };
    let mut state = state.lock().unwrap();
    let path = unescape(parts.uri.path());
    let (bucket, key) = path.trim_start_matches('/').split_once('/').unwrap_or((path.trim_start_matches('/'), ""));
    let query = parts.uri.query().unwrap_or_default();
    let reply = if state.failures.1 > 0 {
        state.failures.1 -= 1;
        fail(state.failures.0, "Injected")
    } else if bucket != "packs" {
        fail(404, "NoSuchBucket")
    } else if key.split('/').any(|s| s == "..") {
        fail(400, "InvalidObjectName")
    } else {
        state.act(&parts, key, &Query::parse(query), body)
    };
    let (method, status) = (parts.method.to_string(), reply.status().as_u16());
    state.requests.push(Request { method, key: key.into(), query: query.into(), status });
    Ok(reply)
}

struct Query(BTreeMap<String, String>);

impl Query {
    fn parse(text: &str) -> Query {
        let pairs = text.split('&').filter(|p| !p.is_empty());
        Query(pairs.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(k, v)| (unescape(k), unescape(v))).collect())
    }
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl State {
    fn act(&mut self, parts: &hyper::http::request::Parts, key: &str, query: &Query, body: Bytes) -> Answer {
        let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok());
        let upload = query.get("uploadId");
        match (&parts.method, key, upload) {
            (&Method::GET | &Method::HEAD, "", _) => self.list(query),
            (&Method::GET | &Method::HEAD, _, _) => self.read(key, header("range"), header("if-none-match")),
            (&Method::PUT, _, Some(id)) => self.put_part(id, query.get("partNumber"), body),
            (&Method::PUT, _, None) => self.put(key, header("if-match"), header("if-none-match"), &body),
            (&Method::POST, "", None) if query.get("delete").is_some() => self.delete_many(&body),
            (&Method::POST, _, None) if query.get("uploads").is_some() => self.begin_upload(),
            (&Method::POST, _, Some(id)) => {
                let whole = self.uploads.remove(id).map(|parts| parts.into_values().collect::<Vec<_>>().concat());
                let Some(whole) = whole else { return fail(404, "NoSuchUpload") };
                let done = self.put(key, header("if-match"), header("if-none-match"), &whole);
                if !done.status().is_success() {
                    return done;
                }
                xml(
                    200,
                    &format!(
                        "<CompleteMultipartUploadResult><Key>{key}</Key><ETag>{}</ETag></CompleteMultipartUploadResult>",
                        etag(&whole)
                    ),
                )
            }
            (&Method::DELETE, _, Some(id)) => {
                self.uploads.remove(id);
                empty(204)
            }
            (&Method::DELETE, _, None) => {
                let _ = std::fs::remove_file(self.root.join(key));
                empty(204)
            }
            _ => fail(501, "NotImplemented"),
        }
    }

    fn put(&self, key: &str, if_match: Option<&str>, if_none_match: Option<&str>, body: &[u8]) -> Answer {
        let path = self.root.join(key);
        if if_match.or(if_none_match).is_some() {
            let now = std::fs::read(&path).ok().map(|b| etag(&b));
            let holds = match (if_match, if_none_match) {
                (Some(want), _) => now.as_deref() == Some(want),
                (None, _) => now.is_none(),
            };
            match self.conditions {
                Conditions::Refused => return fail(501, "NotImplemented"),
                Conditions::Kept if !holds => return fail(412, "PreconditionFailed"),
                _ => {}
            }
        }
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, body).unwrap();
        with_etag(empty(200), body)
    }

    fn read(&self, key: &str, range: Option<&str>, if_none_match: Option<&str>) -> Answer {
        let path = self.root.join(key);
        let Ok(body) = std::fs::read(&path) else { return fail(404, "NoSuchKey") };
        if if_none_match.is_some_and(|tag| tag == etag(&body)) {
            return with_etag(empty(304), &body);
        }
        let mut reply = match range.map(|r| parse_range(r, body.len())) {
            None => Response::new(Full::new(Bytes::copy_from_slice(&body))),
            Some(None) => return fail(416, "InvalidRange"),
            Some(Some((from, to))) => {
                let mut part = Response::new(Full::new(Bytes::copy_from_slice(&body[from..=to])));
                *part.status_mut() = StatusCode::PARTIAL_CONTENT;
                let text = format!("bytes {from}-{to}/{}", body.len());
                part.headers_mut().insert("content-range", text.parse().unwrap());
                part
            }
        };
        // S3's clients want the header; its value matters to no test.
        reply
            .headers_mut()
            .insert("last-modified", hyper::header::HeaderValue::from_static("Thu, 01 Jan 2026 00:00:00 GMT"));
        with_etag(reply, &body)
    }

    fn list(&self, query: &Query) -> Answer {
        let prefix = query.get("prefix").unwrap_or_default();
        let mut keys = Vec::new();
        walk(&self.root, &self.root, &mut keys);
        keys.retain(|k| k.starts_with(prefix) && k.as_str() > query.get("start-after").unwrap_or_default());
        keys.sort();
        let (mut contents, mut folders) = (String::new(), Vec::new());
        for key in &keys {
            let rest = &key[prefix.len()..];
            if let Some(i) = query.get("delimiter").filter(|d| !d.is_empty()).and_then(|d| rest.find(d)) {
                folders.push(key[..=prefix.len() + i].to_owned());
                continue;
            }
            let body = std::fs::read(self.root.join(key)).unwrap_or_default();
            contents += &format!(
                "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                etag(&body).replace('"', "&quot;"),
                body.len()
            );
        }
        folders.dedup();
        for folder in folders {
            contents += &format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
        }
        xml(
            200,
            &format!(
                "<ListBucketResult><Name>packs</Name><Prefix>{prefix}</Prefix><KeyCount>{}</KeyCount><MaxKeys>100000</MaxKeys><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>",
                keys.len()
            ),
        )
    }

    fn delete_many(&self, body: &[u8]) -> Answer {
        let text = String::from_utf8_lossy(body);
        let mut done = String::new();
        for key in text.split("<Key>").skip(1).filter_map(|k| k.split_once("</Key>")).map(|(key, _)| key) {
            if !key.split('/').any(|s| s == "..") {
                let _ = std::fs::remove_file(self.root.join(key));
            }
            done += &format!("<Deleted><Key>{key}</Key></Deleted>");
        }
        xml(200, &format!("<DeleteResult>{done}</DeleteResult>"))
    }

    fn begin_upload(&mut self) -> Answer {
        let id = format!("u{}", self.requests.len());
        self.uploads.insert(id.clone(), BTreeMap::new());
        xml(200, &format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"))
    }

    fn put_part(&mut self, id: &str, number: Option<&str>, body: Bytes) -> Answer {
        match (self.uploads.get_mut(id), number.and_then(|n| n.parse().ok())) {
            (Some(parts), Some(number)) => {
                let reply = with_etag(empty(200), &body);
                parts.insert(number, body);
                reply
            }
            _ => fail(404, "NoSuchUpload"),
        }
    }
}

fn walk(root: &Path, dir: &Path, keys: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            walk(root, &entry.path(), keys);
        } else {
            keys.push(entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned());
        }
    }
}

/// `bytes=a-b`, `bytes=a-`, `bytes=-n`, as first and last offset.
fn parse_range(text: &str, length: usize) -> Option<(usize, usize)> {
    let (from, to) = text.strip_prefix("bytes=")?.split_once('-')?;
    let last = length.checked_sub(1)?;
    match (from.parse::<usize>(), to.parse::<usize>()) {
        (Ok(from), Ok(to)) => (from <= to && from <= last).then_some((from, to.min(last))),
        (Ok(from), Err(_)) => (from <= last).then_some((from, last)),
        (Err(_), Ok(n)) => (n > 0).then_some((length.saturating_sub(n), last)),
        _ => None,
    }
}

fn etag(body: &[u8]) -> String {
    let hash = Sha256::digest(body);
    format!("\"{}\"", hash[..16].iter().map(|b| format!("{b:02x}")).collect::<String>())
}

fn with_etag(mut reply: Answer, body: &[u8]) -> Answer {
    reply.headers_mut().insert("etag", etag(body).parse().unwrap());
    reply
}

fn empty(status: u16) -> Answer {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = StatusCode::from_u16(status).unwrap();
    reply
}

fn xml(status: u16, body: &str) -> Answer {
    let mut reply = Response::new(Full::from(format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}")));
    *reply.status_mut() = StatusCode::from_u16(status).unwrap();
    reply.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/xml"));
    reply
}

fn fail(status: u16, code: &str) -> Answer {
    xml(status, &format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>"))
}

fn unescape(text: &str) -> String {
    let (mut out, bytes) = (Vec::new(), text.as_bytes());
    let mut i = 0;
    while i < bytes.len() {
        let hex = || text.get(i + 1..i + 3).and_then(|h| u8::from_str_radix(h, 16).ok());
        match (bytes[i], hex()) {
            (b'%', Some(byte)) => {
                out.push(byte);
                i += 3;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

//! A small S3 server in memory that does with conditions on puts what it is told to.
#![allow(clippy::unwrap_used)]

use super::Conditions;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;

type Parts = BTreeMap<u32, Bytes>;

pub(super) struct FakeS3 {
    conditions: Conditions,
    objects: Mutex<BTreeMap<String, Bytes>>,
    uploads: Mutex<HashMap<String, Parts>>,
    /// Requests: method and key, for those who count round trips.
    pub(super) log: Mutex<Vec<String>>,
    /// Answers 503 to everything.
    pub(super) down: Mutex<bool>,
    /// What puts with conditions are answered.
    pub(super) ailing: Mutex<Option<StatusCode>>,
    /// The next put lands when it is told to.
    pub(super) late: Mutex<Option<oneshot::Receiver<()>>>,
}

impl FakeS3 {
    /// Serves bucket `b` until the runtime ends; the endpoint.
    pub(super) async fn start(conditions: Conditions) -> (String, Arc<FakeS3>) {
        let fake = Arc::new(FakeS3 {
            conditions,
            objects: Mutex::default(),
            uploads: Mutex::default(),
            log: Mutex::default(),
            down: Mutex::default(),
            ailing: Mutex::default(),
            late: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let limit = axum::extract::DefaultBodyLimit::disable();
        let router = Router::new()
            .route("/b", any(list))
            .route("/b/{*key}", any(object))
            .layer(limit)
            .with_state(Arc::clone(&fake));
        let handler = proto::http::from_tower(router);
        let limits = proto::http::HttpLimits { per_ip: 512, ..Default::default() };
        tokio::spawn(proto::http::serve(listener, limits, std::future::pending(), handler));
        (endpoint, fake)
    }

    pub(super) fn get(&self, key: &str) -> Option<Bytes> {
        self.objects.lock().unwrap().get(key).cloned()
    }
    pub(super) fn remove(&self, key: &str) {
        self.objects.lock().unwrap().remove(key);
    }
    pub(super) fn set(&self, key: &str, bytes: &'static str) {
        self.objects.lock().unwrap().insert(key.to_owned(), bytes.into());
    }
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", proto::digest::Sha256::of(bytes))
}

async fn list(State(fake): State<Arc<FakeS3>>, Query(q): Query<HashMap<String, String>>) -> Response {
    if *fake.down.lock().unwrap() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let prefix = q.get("prefix").cloned().unwrap_or_default();
    let all = fake.objects.lock().unwrap();
    let content = |(key, bytes): (&String, &Bytes)| {
        let (size, etag) = (bytes.len(), etag(bytes));
        format!(
            "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>{etag}</ETag>\
             <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        )
    };
    let after = q.get("continuation-token").or(q.get("start-after")).cloned().unwrap_or_default();
    let most = q.get("max-keys").map_or(1000, |n| n.parse().unwrap());
    let rest: Vec<_> = all.iter().filter(|(k, _)| k.starts_with(&prefix) && **k > after).collect();
    let contents: String = rest.iter().take(most).copied().map(content).collect();
    let next = if rest.len() > most {
        format!("<NextContinuationToken>{}</NextContinuationToken>", rest[most - 1].0)
    } else {
        String::new()
    };
    format!("<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{next}</ListBucketResult>").into_response()
}

async fn object(
    State(fake): State<Arc<FakeS3>>,
    method: Method,
    Path(key): Path<String>,
    Query(q): Query<HashMap<String, String>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    fake.log.lock().unwrap().push(format!("{method} {key}"));
    if *fake.down.lock().unwrap() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    match (method, q.get("partNumber"), q.get("uploadId"), q.contains_key("uploads")) {
        (Method::POST, _, None, true) => {
            fake.uploads.lock().unwrap().insert(key.clone(), Parts::new());
            format!("<InitiateMultipartUploadResult><UploadId>{key}</UploadId></InitiateMultipartUploadResult>")
                .into_response()
        }
        (Method::PUT, Some(n), Some(id), _) => {
            let tag = etag(&body);
            fake.uploads.lock().unwrap().get_mut(id).unwrap().insert(n.parse().unwrap(), body);
            [("etag", tag)].into_response()
        }
        (Method::POST, _, Some(id), _) => {
            let parts = fake.uploads.lock().unwrap().remove(id).unwrap();
            let whole: Vec<u8> = parts.into_values().flatten().collect();
            fake.objects.lock().unwrap().insert(key, whole.into());
            "<CompleteMultipartUploadResult><ETag>\"m\"</ETag></CompleteMultipartUploadResult>".into_response()
        }
        (Method::PUT, ..) => {
            let late = fake.late.lock().unwrap().take();
            if let Some(land) = late {
                land.await.unwrap();
            }
            put(&fake, key, &headers, body)
        }
        (Method::DELETE, ..) => {
            fake.objects.lock().unwrap().remove(&key);
            StatusCode::NO_CONTENT.into_response()
        }
        _ => match fake.get(&key) {
            Some(bytes) => {
                let tag = etag(&bytes);
                ([("etag", tag.as_str()), ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT")], bytes).into_response()
            }
            None => StatusCode::NOT_FOUND.into_response(),
        },
    }
}

fn put(fake: &FakeS3, key: String, headers: &HeaderMap, body: Bytes) -> Response {
    let (create, update) = (headers.contains_key("if-none-match"), headers.get("if-match"));
    if let Some(status) = fake.ailing.lock().unwrap().filter(|_| create || update.is_some()) {
        return status.into_response();
    }
    let mut objects = fake.objects.lock().unwrap();
    let there = objects.get(&key).map(|b| etag(b));
    match fake.conditions {
        Conditions::Refused if create || update.is_some() => return StatusCode::NOT_IMPLEMENTED.into_response(),
        Conditions::Honoured if create && there.is_some() => return StatusCode::PRECONDITION_FAILED.into_response(),
        Conditions::Honoured if update.is_some_and(|u| Some(u.to_str().unwrap()) != there.as_deref()) => {
            return StatusCode::PRECONDITION_FAILED.into_response();
        }
        _ => {}
    }
    let tag = etag(&body);
    objects.insert(key, body);
    [("etag", tag)].into_response()
}

//! Plain HTTP calls for tests, and a tiny way to serve.

use crate::RUNTIME;
use std::sync::LazyLock;
use std::time::Duration;

static CLIENT: LazyLock<reqwest::Client> = LazyLock::new(|| {
    let _ = rustls::crypto::ring::default_provider().install_default();
    // No proxy from the environment: everything is on loopback. A connection a call: what happened to the last one
    // is not this one's matter.
    reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap()
});

/// An answer, whatever its status.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// All headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// A header's value, or "".
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v)
    }
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    /// The body as JSON; panics with the body if it is not.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("not JSON ({e}): {} {}", self.status, self.text()))
    }
    /// Panics with the body unless the status is this one.
    #[track_caller]
    pub fn expect_status(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }
}

/// One request; Err when there was no whole answer within a minute.
pub fn try_request(method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Reply, String> {
    request_within(method, url, headers, body, Duration::from_secs(60))
}

/// GET; Err when there was no whole answer in that time.
pub fn try_get_within(url: &str, limit: Duration) -> Result<Reply, String> {
    request_within("GET", url, &[], b"", limit)
}

fn request_within(
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    limit: Duration,
) -> Result<Reply, String> {
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let mut request = CLIENT.request(method, url).body(body.to_vec()).timeout(limit);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    RUNTIME.block_on(async {
        let answer = request.send().await.map_err(|e| format!("{url}: {e:?}"))?;
        let status = answer.status().as_u16();
        let text = |v: &reqwest::header::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
        let headers = answer.headers().iter().map(|(n, v)| (n.to_string(), text(v))).collect();
        let body = answer.bytes().await.map_err(|e| format!("{url}: {e:?}"))?.to_vec();
        Ok(Reply { status, headers, body })
    })
}

/// GET; panics when there is no answer.
#[track_caller]
pub fn get(url: &str) -> Reply {
    get_with(url, &[])
}

/// GET with headers (`If-None-Match`, `Range`, …).
#[track_caller]
pub fn get_with(url: &str, headers: &[(&str, &str)]) -> Reply {
    try_request("GET", url, headers, b"").unwrap_or_else(|e| panic!("{e}"))
}

/// GET; None when there is no answer within two seconds, for polling.
pub fn try_get(url: &str) -> Option<Reply> {
    try_get_within(url, Duration::from_secs(2)).ok()
}

/// POST of a body with a content type.
#[track_caller]
pub fn post(url: &str, content_type: &str, body: &[u8]) -> Reply {
    try_request("POST", url, &[("content-type", content_type)], body).unwrap_or_else(|e| panic!("{e}"))
}

/// DELETE.
#[track_caller]
pub fn delete(url: &str) -> Reply {
    try_request("DELETE", url, &[], b"").unwrap_or_else(|e| panic!("{e}"))
}

/// PUT of a body.
#[track_caller]
pub fn put(url: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    try_request("PUT", url, headers, body).unwrap_or_else(|e| panic!("{e}"))
}

//! Objects and pages on HTTP servers: relays, CDNs, static servers.

use super::bucket::causes;
use super::{Etag, FetchErrorKind, Opened, Polled, Small, SourceOptions, Trouble, Wire};
use crate::clock::{Clock, SystemClock, since};
use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt};
use hyper::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_NONE_MATCH, RANGE, RETRY_AFTER,
};
use reqwest::{Client, RequestBuilder, Response, StatusCode, redirect};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use url::Url;

/// A long poll's answer is a line a stream.
const POLL_BYTES: u64 = 1 << 20;

/// How long a connection without work is kept. Less than any server of ours keeps one (`http.head_timeout`): whose
/// request meets the server's close on its way cannot know whether it was heard, and is told as a failure.
pub(super) const IDLE: Duration = Duration::from_secs(3);

/// Makes ring the process's TLS provider, if none is set; mains and tests may call it as often as they like.
pub fn install_tls() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The bytes of `ca_file`.
pub(super) fn ca_pem(options: &SourceOptions) -> Result<Option<Vec<u8>>, String> {
    let Some(path) = &options.ca_file else { return Ok(None) };
    std::fs::read(path).map(Some).map_err(|e| format!("ca_file {}: {e}", path.display()))
}

#[derive(Debug, Clone)]
pub(super) struct Web {
    client: Client,
    wire: Option<Arc<dyn Wire>>,
    base: Url,
    read_timeout: Duration,
    /// The longest rest.
    most: Duration,
    clock: Arc<dyn Clock>,
    /// The server asked to be left alone: with which status, and until when by the monotonic clock.
    rest: Arc<Mutex<Option<(StatusCode, Duration)>>>,
}

impl Web {
    pub(super) fn new(mut base: Url, options: &SourceOptions) -> Result<Self, String> {
        install_tls();
        base.set_fragment(None);
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(token) = &options.token {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.reveal()))
                .map_err(|_| "the token has characters that no header may have".to_owned())?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut builder = Client::builder()
            .user_agent(concat!("tillcast/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .connect_timeout(options.connect_timeout.0)
            .tcp_keepalive(Duration::from_secs(15))
            .pool_idle_timeout(IDLE)
            .redirect(redirect::Policy::custom(same_scheme));
        if base.scheme() == "http" {
            // Redirects to TLS are refused, so the machine's certificates need not be there.
            builder = builder.tls_certs_only([]);
        } else if let Some(pem) = ca_pem(options)? {
            let more = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| format!("ca_file: {e}"))?;
            builder = builder.tls_certs_merge(more);
        }
        if is_near(&base) {
            // A relay on the LAN is not behind the proxy that the machine uses for the web.
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|e| causes(&e))?;
        let (wire, read_timeout, most) = (options.wire.clone(), options.read_timeout.0, options.retry_after.0);
        let clock = options.clock.clone().unwrap_or_else(|| Arc::new(SystemClock::default()));
        Ok(Web { client, wire, base, read_timeout, most, clock, rest: Arc::default() })
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        // Only URLs that cannot be a base refuse this, and http ones can.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path.split('/'));
        }
        url
    }

    /// Sends, and waits for the answer's head.
    async fn send(&self, request: RequestBuilder, wait: Duration) -> Result<Response, Trouble> {
        if let Some((status, until)) = *self.rest() {
            let left = until.saturating_sub(self.clock.monotonic());
            if !left.is_zero() {
                let kind = FetchErrorKind::Status { code: status.as_u16(), retry_after: Some(left) };
                return Err(Trouble::new(kind, left_alone(status)));
            }
        }
        let told = |e: reqwest::Error| causes(&e.without_url());
        let answer = async {
            match &self.wire {
                None => request.send().await.map_err(told),
                Some(wire) => wire.ask(request.build().map_err(told)?).await,
            }
        };
        match tokio::time::timeout(wait, answer).await {
            Ok(Ok(response)) => {
                let asked = retry_after(&response).map(|d| d.min(self.most));
                *self.rest() = asked.map(|d| (response.status(), self.clock.monotonic().saturating_add(d)));
                Ok(response)
            }
            Ok(Err(e)) => Err(Trouble::new(FetchErrorKind::Network, e)),
            Err(_) => Err(Trouble::new(FetchErrorKind::Network, format!("no answer within {} s", wait.as_secs()))),
        }
    }

    fn rest(&self) -> std::sync::MutexGuard<'_, Option<(StatusCode, Duration)>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn get_small(
        &self,
        path: &str,
        query_serial: Option<u64>,
        known: Option<&Etag>,
        max: u64,
    ) -> Result<Small, Trouble> {
        let mut url = self.url(path);
        if let Some(serial) = query_serial {
            url.query_pairs_mut().append_pair("serial", &serial.to_string());
        }
        let response = self.send(conditional(self.client.get(url), known), self.read_timeout).await?;
        if known.is_some() && response.status() == StatusCode::NOT_MODIFIED {
            return Ok(Small::Unchanged);
        }
        let response = good(response)?;
        let etag = etag(&response);
        Ok(Small::Body { bytes: self.whole(response, max).await?, etag })
    }

    pub(super) async fn long_poll(
        &self,
        path: &str,
        query: &[(&str, &str)],
        wait_s: u64,
        known: Option<&Etag>,
    ) -> Result<Polled, Trouble> {
        let mut url = self.url(path);
        url.query_pairs_mut().extend_pairs(query).append_pair("wait", &wait_s.to_string());
        let wait = self.read_timeout + Duration::from_secs(wait_s);
        let response = self.send(conditional(self.client.get(url), known), wait).await?;
        match response.status() {
            StatusCode::NOT_MODIFIED if known.is_some() => Ok(Polled::Unchanged),
            // Empty-handed without an ETag to compare.
            StatusCode::NO_CONTENT => Ok(Polled::Unchanged),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(Polled::NoSuchPage),
            _ => {
                let response = good(response)?;
                let etag = etag(&response);
                Ok(Polled::Body { bytes: self.whole(response, POLL_BYTES).await?, etag })
            }
        }
    }

    pub(super) async fn post(&self, path: &str, content_type: &str, body: Bytes, max: u64) -> Result<Bytes, Trouble> {
        let request = self.client.post(self.url(path)).header(CONTENT_TYPE, content_type).body(body);
        let response = good(self.send(request, self.read_timeout).await?)?;
        self.whole(response, max).await
    }

    /// A body of at most `max` bytes.
    async fn whole(&self, response: Response, max: u64) -> Result<Bytes, Trouble> {
        if response.content_length().is_some_and(|n| n > max) {
            return Err(Trouble::too_long(max));
        }
        let bytes = super::whole(self.chunks(response), max, self.read_timeout).await?;
        if is_page(&bytes) {
            return Err(Trouble::page());
        }
        Ok(bytes.into())
    }

    pub(super) async fn open(&self, path: &str, start: u64, want: u64) -> Result<Opened, Trouble> {
        let response = self.get_from(path, start).await?;
        let is_wrong = match (response.status(), content_range(&response)) {
            _ if start == 0 => false,
            // Whole at our part's end or before: the length will be judged.
            (StatusCode::RANGE_NOT_SATISFIABLE, Some((_, Some(total)))) if total < want => {
                return Ok(Opened { start: 0, total: Some(total), body: futures_util::stream::empty().boxed() });
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, _) => true,
            // Other bytes than were asked for, or nobody knows which: the same range would bring them again and again.
            (StatusCode::PARTIAL_CONTENT, range) => !matches!(range, Some((Some(at), _)) if at == start || at == 0),
            _ => false,
        };
        self.opened(good(if is_wrong { self.get_from(path, 0).await? } else { response })?)
    }

    async fn get_from(&self, path: &str, start: u64) -> Result<Response, Trouble> {
        let mut request = self.client.get(self.url(path));
        if start > 0 {
            request = request.header(RANGE, format!("bytes={start}-"));
        }
        self.send(request, self.read_timeout).await
    }

    fn opened(&self, response: Response) -> Result<Opened, Trouble> {
        let (start, total) = if response.status() == StatusCode::PARTIAL_CONTENT {
            match content_range(&response) {
                Some((Some(start), total)) => (start, total),
                _ => {
                    return Err(Trouble::new(FetchErrorKind::NotWhole, "206 without a Content-Range that can be read"));
                }
            }
        } else {
            (0, response.content_length())
        };
        Ok(Opened { start, total, body: self.chunks(response) })
    }

    fn chunks(&self, response: Response) -> BoxStream<'static, Result<Bytes, Trouble>> {
        let cut = |e: reqwest::Error| Trouble::new(FetchErrorKind::NotWhole, causes(&e.without_url()));
        within(self.read_timeout, response.bytes_stream().map(move |c| c.map_err(cut)).boxed()).boxed()
    }
}

/// A stream that ends in an error when its next item takes longer than `wait`.
pub(super) fn within<S>(
    wait: Duration,
    stream: S,
) -> impl futures_util::Stream<Item = Result<Bytes, Trouble>> + Send + Unpin + use<S>
where
    S: futures_util::Stream<Item = Result<Bytes, Trouble>> + Send + Unpin + 'static,
{
    let next = move |state: Option<S>| async move {
        let mut stream = state?;
        match tokio::time::timeout(wait, stream.next()).await {
            Ok(Some(item)) => Some((item, Some(stream))),
            Ok(None) => None,
            Err(_) => {
                let silent = format!("nothing arrived for {} s", wait.as_secs());
                Some((Err(Trouble::new(FetchErrorKind::Network, silent)), None))
            }
        }
    };
    Box::pin(futures_util::stream::unfold(Some(stream), next))
}

/// Whether a URL names a machine on the LAN, or this one, by address.
fn is_near(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

fn same_scheme(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from = attempt.previous().last().map(|u| u.scheme().to_owned());
    if from.as_deref() != Some(attempt.url().scheme()) {
        let to = attempt.url().scheme().to_owned();
        return attempt.error(format!("it redirects to another scheme, {to}; name that URL in the settings"));
    }
    if attempt.previous().len() > 5 {
        return attempt.error("it redirects more than 5 times");
    }
    attempt.follow()
}

fn conditional(request: RequestBuilder, known: Option<&Etag>) -> RequestBuilder {
    match known {
        Some(etag) => request.header(IF_NONE_MATCH, &etag.0),
        None => request,
    }
}

fn header<'r>(response: &'r Response, name: &HeaderName) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

fn etag(response: &Response) -> Option<Etag> {
    header(response, &ETAG).map(|e| Etag(e.to_owned()))
}

/// Whether a body begins as HTML or XML do; neither gzip nor JSON can.
pub(super) fn is_page(body: &[u8]) -> bool {
    let text = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    matches!(text.trim_ascii_start(), [b'<', next, ..] if matches!(next, b'!' | b'?') || next.is_ascii_alphabetic())
}

/// 200 or 206 with something that is no web page.
fn good(response: Response) -> Result<Response, Trouble> {
    let status = response.status();
    let retry_after = retry_after(&response);
    let told = if retry_after.is_some() { left_alone(status) } else { format!("the server answers {status}") };
    let kind = match status {
        StatusCode::OK
        | StatusCode::PARTIAL_CONTENT
        | StatusCode::CREATED
        | StatusCode::ACCEPTED
        | StatusCode::NO_CONTENT => {
            let html =
                header(&response, &CONTENT_TYPE).is_some_and(|t| t.to_ascii_lowercase().starts_with("text/html"));
            return if html { Err(Trouble::page()) } else { Ok(response) };
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => FetchErrorKind::NotFound,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => FetchErrorKind::Unauthorized,
        other => FetchErrorKind::Status { code: other.as_u16(), retry_after },
    };
    Err(Trouble::new(kind, told))
}

/// Of the answer, and for as long as it is kept to: readers write down and tell what has changed, so no number runs in it.
fn left_alone(status: StatusCode) -> String {
    format!("the server answers {status} and asks to be left alone")
}

/// How long a server that is too busy asks to be left alone (RFC 9110, 10.2.3): seconds, or a time by its own clock.
fn retry_after(response: &Response) -> Option<Duration> {
    if !matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let text = header(response, &RETRY_AFTER)?.trim();
    let time = |text: &str| Some(jiff::fmt::rfc2822::parse(text).ok()?.timestamp());
    let until = || Some(since(time(text)?, time(header(response, &DATE)?)?));
    text.parse().ok().map(Duration::from_secs).or_else(until)
}

/// First byte and whole length of `bytes 5-9/10` or `bytes */10`.
fn content_range(response: &Response) -> Option<(Option<u64>, Option<u64>)> {
    parse_content_range(header(response, &CONTENT_RANGE)?)
}

fn parse_content_range(text: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let start = match range.trim() {
        "*" => None,
        range => Some(range.split_once('-')?.0.trim().parse().ok()?),
    };
    let total = match total.trim() {
        "*" => None,
        n => Some(n.parse().ok()?),
    };
    Some((start, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_given_up_before_a_server_of_ours_closes_it() {
        assert!(IDLE < crate::http::HttpLimits::default().head_timeout.0);
    }

    #[test]
    fn machines_on_the_lan_are_told_from_the_web() {
        for (url, near) in [
            ("http://10.0.0.2:7421/", true),
            ("http://127.0.0.1/", true),
            ("http://localhost/", true),
            ("http://[fd00::1]/", true),
            ("http://8.8.8.8/", false),
            ("https://cdn.example.com/", false),
        ] {
            assert_eq!(is_near(&url.parse().unwrap()), near, "{url}");
        }
    }

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((Some(5), Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((Some(5), None)));
        assert_eq!(parse_content_range("bytes */10"), Some((None, Some(10))));
        for bad in
            ["", "5-9/10", "items 5-9/10", "bytes 5-9", "bytes x-9/10", "bytes 5/10", "bytes 5-9/x", "bytes -5/10"]
        {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}

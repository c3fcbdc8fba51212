//! What the store's LAN may ask, over plain HTTP: the objects in `ok/` by their own names, versions with long
//! poll, heartbeats, health, figures, and a page for whoever stands in the store. Reads the hall, changes
//! nothing but by a verified heartbeat. A hand-written match: the hot paths must cost as little as a
//! static file server's.

pub mod objects;
mod page;

use crate::beats;
use crate::hall::{Hall, Listing};
use crate::metrics;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use proto::fetch::Etag;
use proto::http::{Body, Inbound, none_match, read_body};
use proto::wire::{BeatAnswer, Beats, fault};
use serde::Serialize;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// The longest long poll.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Bytes of one post of heartbeats.
const MAX_BEATS: u64 = 1 << 20;

/// Answers one request.
pub async fn answer(hall: Arc<Hall>, request: Request<Inbound>, from: IpAddr) -> Response<Body> {
    let head_only = request.method() == Method::HEAD;
    let path = request.uri().path();
    if request.method() == Method::GET || head_only {
        if let Some(object) = hall.objects.get(path) {
            hall.metrics.objects.inc();
            return hall.objects.answer(&object, request.headers(), head_only).await;
        }
        return match path {
            "/v1/versions" => versions(&hall, &request, head_only).await,
            "/v1/status" => json(StatusCode::OK, &hall.status()),
            "/v1/errors" => errors(&hall, request.headers()),
            "/healthz" => healthz(&hall),
            "/readyz" => readyz(&hall),
            "/metrics" => text(StatusCode::OK, metrics::CONTENT_TYPE, hall.metrics.text(&hall)),
            "/" => match tokio::task::spawn_blocking(move || page::answer(&hall)).await {
                Ok(page) => page,
                Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made\n"),
            },
            "/style.css" => text(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
            _ => plain(StatusCode::NOT_FOUND, "not here\n"),
        };
    }
    match (request.method(), path) {
        (&Method::POST, "/v1/heartbeats") => heartbeats(hall, request, from).await,
        _ => {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET, HEAD, or POST /v1/heartbeats\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
    }
}

/// `/v1/versions?wait=30`: at once when the client knows something else, or nothing; otherwise when there is
/// news, or 304 at the end.
async fn versions(hall: &Hall, request: &Request<Inbound>, head_only: bool) -> Response<Body> {
    hall.metrics.polls.inc();
    // Register interest before looking.
    let mut news = hall.versions();
    let wait = wait_asked(request.uri().query(), hall.config.http.answer_timeout.0);
    let now = Arc::clone(&news.borrow_and_update());
    if !is_known(request.headers(), &now) {
        return listing(&now, head_only);
    }
    if !wait.is_zero() {
        let changed = async {
            loop {
                news.changed().await.ok()?;
                let now = Arc::clone(&news.borrow_and_update());
                if !is_known(request.headers(), &now) {
                    return Some(now);
                }
            }
        };
        tokio::select! {
            now = changed => if let Some(now) = now { return listing(&now, head_only) },
            () = tokio::time::sleep(wait) => {}
            // Whoever waits should come back to the next process, not hang on this one.
            () = hall.stop.cancelled() => {}
        }
    }
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    set_etag(&mut response, &now);
    response
}

/// `/v1/errors`: the packs given up here for what they are, so that a register that reads elsewhere leaves them out too.
fn errors(hall: &Hall, asked: &HeaderMap) -> Response<Body> {
    let body = serde_json::to_vec(&hall.state().given_up()).unwrap_or_default();
    let Etag(etag) = Etag::of(&body);
    let mut response = if none_match(asked, &etag) {
        let mut unchanged = Response::new(Body::Empty);
        *unchanged.status_mut() = StatusCode::NOT_MODIFIED;
        unchanged
    } else {
        text(StatusCode::OK, "application/json", body)
    };
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

fn is_known(headers: &HeaderMap, now: &Listing) -> bool {
    headers.contains_key(header::IF_NONE_MATCH) && none_match(headers, &now.etag)
}

/// Shorter than any answer may take.
fn wait_asked(query: Option<&str>, answer_timeout: Duration) -> Duration {
    let seconds = query
        .and_then(|q| q.split('&').find_map(|pair| pair.strip_prefix("wait=")))
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    Duration::from_secs(seconds).min(MAX_WAIT).min(answer_timeout * 3 / 4)
}

fn listing(now: &Listing, head_only: bool) -> Response<Body> {
    let mut response = Response::new(if head_only { Body::Empty } else { Body::Bytes(now.body.clone()) });
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(now.body.len()));
    set_etag(&mut response, now);
    response
}

fn set_etag(response: &mut Response<Body>, now: &Listing) {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(etag) = HeaderValue::from_str(&now.etag) {
        headers.insert(header::ETAG, etag);
    }
}

async fn heartbeats(hall: Arc<Hall>, request: Request<Inbound>, from: IpAddr) -> Response<Body> {
    let body = match read_body(request.into_body(), MAX_BEATS).await {
        Ok(body) => body,
        Err(e) => return plain(e.status(), format!("{e}\n")),
    };
    let beats = match Beats::from_body(&body) {
        Ok(beats) => beats,
        Err(e) => return plain(StatusCode::BAD_REQUEST, format!("not heartbeats: {e}\n")),
    };
    if beats.beats.len() > beats::BEATS {
        let many = format!("{} heartbeats in one post, {} are allowed\n", beats.beats.len(), beats::BEATS);
        return plain(StatusCode::PAYLOAD_TOO_LARGE, many);
    }
    let desk = Arc::clone(&hall);
    let Ok(taken) = tokio::task::spawn_blocking(move || beats::take(&desk, &beats, from)).await else {
        return plain(StatusCode::INTERNAL_SERVER_ERROR, "the heartbeats were not kept\n");
    };
    let answer = BeatAnswer {
        hq_seen_s: hall.hq_seen_s(),
        now: hall.clock.now(),
        refused: taken.refused,
        passed_on: taken.passed_on,
        go_on_above: taken.go_on_above,
    };
    let status = if taken.failed {
        StatusCode::SERVICE_UNAVAILABLE
    } else if taken.unknown {
        // It may have been enrolled a moment ago.
        hall.look_soon();
        StatusCode::UNAUTHORIZED
    } else {
        StatusCode::OK
    };
    json(status, &answer)
}

fn healthz(hall: &Hall) -> Response<Body> {
    let state = hall.state();
    match state.faults.values().find(|f| f.code == fault::HALTED) {
        Some(halted) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", halted.text)),
        None => plain(StatusCode::OK, "ok\n"),
    }
}

fn readyz(hall: &Hall) -> Response<Body> {
    match hall.state().is_ready() {
        Ok(()) => plain(StatusCode::OK, "ready\n"),
        Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    text(status, "text/plain; charset=utf-8", body)
}

fn text(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::Bytes(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    text(status, "application/json", serde_json::to_vec(value).unwrap_or_default())
}

#[cfg(test)]
mod tests;

//! The loopback API: what the POS application and the register's own commands ask.
//!
//! Owns the routes and their answers. Never lets a web page in a browser on the register steer it
//! (requests with an `Origin` are refused), never waits for the network. Holds end with the process.

use crate::agent::Agent;
use crate::hold::LONGEST;
use crate::register_db::log_path;
use crate::{report, run};
use http::{Method, Request, Response, StatusCode};
use proto::http::{Body, Inbound, json, read_body, text};
use proto::wire::{Status, fault};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// `POST /v1/hold`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HoldAsked {
    /// For how long nothing may be applied; more than 900 counts as 900.
    pub seconds: u64,
}

/// The answer to all of `/v1/hold`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldAnswer {
    /// The rest of the hold, s; 0: nothing is held.
    pub held_s: u64,
    /// No transaction is running: what is read now stays until the hold ends.
    pub settled: bool,
}

/// The answer to `POST /v1/once`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OnceAnswer {
    /// The command's exit code.
    pub exit: u8,
    /// How the register stands after it.
    pub status: Status,
}

/// What takes as long as it takes, whatever `answer_timeout` says.
pub const SLOW: [&str; 2] = ["/v1/once", "/v1/verify"];

/// Bytes of a request's body.
const BODY: u64 = 4096;
/// How long a hold waits for a transaction that is running.
const SETTLE: Duration = Duration::from_secs(5);

/// Answers one request.
pub async fn answer(agent: Arc<Agent>, request: Request<Inbound>) -> Response<Body> {
    if request.headers().contains_key(http::header::ORIGIN) {
        return text(StatusCode::FORBIDDEN, "not for web pages");
    }
    let (parts, body) = request.into_parts();
    let route = (parts.method.clone(), parts.uri.path());
    match (&route.0, route.1) {
        (&Method::GET, "/healthz") => health(&agent),
        (&Method::GET, "/metrics") => metrics(&agent),
        (&Method::GET, "/v1/status") => json_of(&report::stand(&agent, agent.memory.look(|f| f.open()))),
        (&Method::GET, "/v1/hold") => json_of(&held(&agent, true)),
        (&Method::POST, "/v1/hold") => hold(&agent, body).await,
        (&Method::DELETE, "/v1/hold") => {
            agent.hold.end();
            json_of(&held(&agent, true))
        }
        (&Method::POST, "/v1/verify") => verify_rows(&agent).await,
        (&Method::POST, "/v1/once") => once(agent.clone()).await,
        (_, "/healthz" | "/metrics" | "/v1/status" | "/v1/hold" | "/v1/verify" | "/v1/once") => {
            text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "GET /v1/status, POST or DELETE /v1/hold, POST /v1/verify, POST /v1/once, GET /healthz, GET /metrics",
        ),
    }
}

fn health(agent: &Agent) -> Response<Body> {
    let halted = agent.memory.look(|f| f.open().into_iter().find(|f| f.code == fault::HALTED));
    match halted {
        Some(f) => text(StatusCode::SERVICE_UNAVAILABLE, &f.text),
        None => text(StatusCode::OK, "ok"),
    }
}

fn json_of(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => json(StatusCode::OK, bytes),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

fn held(agent: &Agent, settled: bool) -> HoldAnswer {
    let now = agent.clock.monotonic();
    let left = agent.hold.until(now).map_or(Duration::ZERO, |u| u.saturating_sub(now));
    HoldAnswer { held_s: left.as_secs_f64().ceil() as u64, settled }
}

async fn hold(agent: &Agent, body: Inbound) -> Response<Body> {
    let body = match read_body(body, BODY).await {
        Ok(body) => body,
        Err(e) => return text(e.status(), &e.to_string()),
    };
    let asked = match serde_json::from_slice::<HoldAsked>(&body) {
        Ok(asked) if asked.seconds > 0 => asked,
        Ok(_) => return text(StatusCode::BAD_REQUEST, "seconds must be 1 to 900; DELETE ends a hold"),
        Err(e) => return text(StatusCode::BAD_REQUEST, &format!("the body must be {{\"seconds\":N}}: {e}")),
    };
    agent.hold.place(agent.clock.monotonic(), Duration::from_secs(asked.seconds).min(LONGEST));
    // What began before ends as one whole version; afterwards nothing begins.
    let settled = tokio::time::timeout(SETTLE, agent.hold.settled()).await.is_ok();
    json_of(&held(agent, settled))
}

async fn verify_rows(agent: &Arc<Agent>) -> Response<Body> {
    // Each is a scan of all rows, which goes on when whoever asked has gone.
    let Ok(turn) = agent.verifying.clone().try_lock_owned() else {
        return text(StatusCode::TOO_MANY_REQUESTS, "the rows are being verified: ask again when that is done");
    };
    match agent.verify_in_turn(turn).await {
        Ok(found) => json_of(&found),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

/// One cycle and one heartbeat.
async fn once(agent: Arc<Agent>) -> Response<Body> {
    // A transaction is not left alone by whoever asked and has gone.
    let done = tokio::spawn(async move {
        let exit = run::once_beside(&agent).await.code();
        OnceAnswer { exit, status: report::stand(&agent, agent.memory.look(|f| f.open())) }
    });
    match done.await {
        Ok(done) => json_of(&done),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

fn metrics(agent: &Agent) -> Response<Body> {
    let status = report::stand(agent, agent.memory.look(|f| f.open()));
    let log = std::fs::metadata(log_path(agent.db.path())).map_or(0, |m| m.len());
    let page = agent.metrics.page(&status, log, held(agent, true).held_s);
    let mut answer = text(StatusCode::OK, page.trim_end());
    answer
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    answer
}

//! `serve`: wakes relays, takes heartbeats, shows the fleet, and keeps the house in order.
//!
//! Owns the routes and the loops; what a loop does once is in [`ticks`], so that tests drive steps.
//! Must never publish rows. If the power goes, everything it knew is in the ledger.

mod page;
#[cfg(test)]
mod tests;
pub mod ticks;
mod wake;

use crate::carry::Receipts;
use crate::config::Config;
use crate::hooks::Post;
use crate::intake::{BEATS, Intake, Taken};
use crate::ledger::{Ledger, LedgerError};
use crate::metrics::{Metrics, Scrape};
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use proto::clock::{Clock, Timestamp};
use proto::config::ConfigError;
use proto::http::{Gate, Peer};
use proto::ids::StoreId;
use proto::wire::Beats;
use serde::Deserialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use wake::{Wakes, Woken};

/// The service could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The port.
    #[error("cannot listen on serve.listen = {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The counters.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A loop of the service ended by a defect.
    #[error("a defect of this program ended one of the loops of `serve`, which is to be started anew: {0}")]
    Loop(tokio::task::JoinError),
}

/// What handlers and loops share.
pub struct App {
    pub(crate) config: Config,
    pub(crate) ledger: Ledger,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) intake: Intake,
    pub(crate) wakes: Wakes,
    pub(crate) metrics: Metrics,
    pub(crate) post: Post,
    /// Monotonic time at which the fleet was last judged.
    pub(crate) judged: Mutex<Option<Duration>>,
    /// The wall clock and the monotonic one when the ledger's time was last noted.
    pub(crate) noted: Mutex<Option<(Timestamp, Duration)>>,
    /// Monotonic time up to which it is counted how long no publish went through.
    pub(crate) watched: Mutex<Duration>,
    /// The own disk was nearly full at the last look, where another process judges.
    pub(crate) disk_was_low: AtomicBool,
    pub(crate) gate: Arc<Gate>,
    /// The pages that read the whole ledger are made one at a time: a flood of them must not keep heartbeats waiting.
    pub(crate) turn: tokio::sync::Mutex<()>,
    stopping: watch::Receiver<bool>,
}

/// How often the number of puts is asked for on SQLite.
const POLL: Duration = Duration::from_millis(100);

/// How often it is looked whether a mail should say that mails arrive.
const SELF_TEST_TICK: Duration = Duration::from_secs(60);

/// How often the ledger's time is noted.
const TIME_TICK: Duration = Duration::from_secs(60);

/// How often it is looked whether somebody publishes.
const PUBLISHES_TICK: Duration = Duration::from_secs(60);

/// How often the log of a ledger in SQLite is brought home.
const CHECKPOINT_TICK: Duration = Duration::from_secs(1);

/// How often the outbox is looked into.
const MAIL_TICK: Duration = Duration::from_secs(2);

impl App {
    /// Opens the ledger and reads what it knows of the fleet.
    pub async fn open(
        config: &Config,
        clock: Arc<dyn Clock>,
        stopping: watch::Receiver<bool>,
    ) -> Result<Arc<App>, ServeError> {
        let post = Post::new(config)?;
        let ledger = Ledger::open_for_service(config).await?;
        let watched = Mutex::new(clock.monotonic());
        let intake = Intake::open(ledger.clone(), Arc::clone(&clock), config.limits.clone(), &config.alerts).await?;
        let app = App {
            config: config.clone(),
            wakes: Wakes::default(),
            gate: Arc::new(Gate::new(config.serve.http.clone())),
            turn: tokio::sync::Mutex::new(()),
            metrics: Metrics::new()?,
            ledger,
            clock,
            intake,
            post,
            judged: Mutex::default(),
            noted: Mutex::default(),
            watched,
            disk_was_low: AtomicBool::default(),
            stopping,
        };
        app.wakes.refresh(&app.ledger).await?;
        Ok(Arc::new(app))
    }

    /// The routes.
    pub fn router(self: &Arc<Self>) -> Router {
        let beats = usize::try_from(self.config.serve.beats_bytes.0).unwrap_or(usize::MAX);
        Router::new()
            .route("/v1/wake", get(wake))
            .route("/v1/heartbeats", post(heartbeats).layer(DefaultBodyLimit::max(beats)))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .route("/", get(page::fleet))
            .route("/style.css", get(page::style))
            .with_state(Arc::clone(self))
    }
}

/// Serves until `shutdown` is ready.
pub async fn serve(
    config: &Config,
    clock: Arc<dyn Clock>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (stop, stopping) = watch::channel(false);
    let app = App::open(config, clock, stopping).await?;
    let address = config.serve.listen;
    let listener =
        proto::http::listen(address, app.gate.limits()).map_err(|source| ServeError::Listen { address, source })?;
    let at = listener.local_addr().unwrap_or(address);
    tracing::info!("listening on http://{at}");
    let mut loops = JoinSet::new();
    start_loops(&app, &mut loops);
    proto::cli::notify_ready();
    let (halted, mut dead) = (AtomicBool::default(), None);
    let (gate, handler) = (Arc::clone(&app.gate), proto::http::from_tower(app.router()));
    let shutdown = async {
        // A sync that failed is not tried again: whoever supervises this starts it anew.
        tokio::select! {
            () = shutdown => {}
            () = app.ledger.halted() => halted.store(true, Ordering::Relaxed),
            // Relays and pages would be answered on, and nobody would be mailed. They end by themselves only after this.
            Some(Err(e)) = loops.join_next() => dead = Some(e),
        }
        proto::cli::notify_stopping();
        // Long polls answer now, not at their end.
        let _ = stop.send(true);
    };
    proto::http::serve_gated(listener, gate, shutdown, handler).await;
    // A mail on its way may finish; what is cut off is claimed again later.
    let _ = tokio::time::timeout(config.serve.http.drain.0, async { while loops.join_next().await.is_some() {} }).await;
    if halted.into_inner() {
        return Err(LedgerError::Halted.into());
    }
    dead.map_or(Ok(()), |e| Err(ServeError::Loop(e)))
}

/// Runs `step` every `wait`, until the service stops.
async fn every(app: Arc<App>, wait: Duration, name: &'static str, step: impl AsyncFn(&App) -> Result<(), String>) {
    let mut stopping = app.stopping.clone();
    let mut failing = false;
    loop {
        match step(&app).await {
            Ok(()) if failing => {
                tracing::info!("{name}: works again");
                failing = false;
            }
            Ok(()) => {}
            // Once an episode: a dead server must not fill the log.
            Err(e) if !failing => {
                tracing::warn!("{name}: {e}");
                failing = true;
            }
            Err(e) => tracing::debug!("{name}: {e}"),
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = stopping.wait_for(|s| *s) => return,
        }
    }
}

fn start_loops(app: &Arc<App>, loops: &mut JoinSet<()>) {
    let serve = &app.config.serve;
    loops.spawn(follow_puts(Arc::clone(app)));
    loops.spawn(every(Arc::clone(app), serve.alert_tick.0, "alerts", async |a: &App| ticks::alerts(a).await));
    loops.spawn(every(Arc::clone(app), CHECKPOINT_TICK, "checkpoint", async |a: &App| {
        a.ledger.checkpoint().await.map_err(|e| e.to_string())
    }));
    loops.spawn(every(Arc::clone(app), TIME_TICK, "time", async |a: &App| ticks::time(a).await));
    loops.spawn(every(Arc::clone(app), PUBLISHES_TICK, "publishes", async |a: &App| ticks::publishes(a).await));
    loops.spawn(every(Arc::clone(app), MAIL_TICK, "mail", async |a: &App| ticks::mails(a).await));
    loops.spawn(every(Arc::clone(app), SELF_TEST_TICK, "self-test", async |a: &App| ticks::self_test(a).await));
    if app.post.hooks().has_ping() {
        let every_so_often = app.config.alerts.ping_every.0;
        loops.spawn(every(Arc::clone(app), every_so_often, "ping", async |a: &App| ticks::ping(a).await));
    }
    loops.spawn(every(Arc::clone(app), serve.resign_tick.0, "manifests", async |a: &App| ticks::manifests(a).await));
    if let Some(interval) = proto::cli::watchdog_interval() {
        loops.spawn(every(Arc::clone(app), interval, "watchdog", async |_: &App| {
            proto::cli::notify_watchdog();
            Ok(())
        }));
    }
}

/// Wakes relays when manifests were put.
async fn follow_puts(app: Arc<App>) {
    let mut stopping = app.stopping.clone();
    let mut listener = None;
    let mut known = None;
    loop {
        match ticks::wake(&app, known).await {
            Ok(now) => known = Some(now),
            Err(e) => tracing::debug!("wake: {e}"),
        }
        tokio::select! {
            () = app.ledger.await_change(&mut listener, POLL) => {}
            _ = stopping.wait_for(|s| *s) => return,
        }
    }
}

#[derive(Debug, Deserialize)]
struct WakeQuery {
    store: String,
    wait: Option<u64>,
}

/// A status with a line of JSON that says why.
fn refuse(status: StatusCode, why: &str) -> Response {
    let body = serde_json::json!({ "error": why }).to_string();
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// `GET /v1/wake?store=S&wait=30`: 200 when the store's manifest changed after the serial in
/// If-None-Match, 304 at the end of the wait.
async fn wake(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    query: Result<Query<WakeQuery>, QueryRejection>,
) -> Response {
    let Ok(Query(query)) = query else {
        return refuse(StatusCode::BAD_REQUEST, "ask /v1/wake?store=ID&wait=SECONDS");
    };
    let Ok(store) = query.store.parse::<StoreId>() else {
        return refuse(StatusCode::BAD_REQUEST, "no such store id");
    };
    let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()).and_then(serial_of);
    let wait = Duration::from_secs(query.wait.unwrap_or(30)).min(app.config.serve.longest_wait.0);
    app.metrics.waiting.inc();
    let woken = app.wakes.wait(&store, known, wait, app.stopping.clone()).await;
    app.metrics.waiting.dec();
    let (status, serial) = match woken {
        Woken::Unknown => return refuse(StatusCode::NOT_FOUND, "the store is not known here (yet)"),
        Woken::Changed(serial) => (StatusCode::OK, serial),
        Woken::Unchanged(serial) => (StatusCode::NOT_MODIFIED, serial),
    };
    let etag = format!("\"{serial}\"");
    let headers = [(ETAG, etag.as_str()), (CACHE_CONTROL, "no-store")];
    if status == StatusCode::NOT_MODIFIED {
        return (status, headers).into_response();
    }
    app.metrics.woken.inc();
    let body = serde_json::json!({ "serial": serial }).to_string();
    (status, headers, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// The serial in an ETag, weak or not.
fn serial_of(etag: &str) -> Option<u64> {
    etag.trim().strip_prefix("W/").unwrap_or(etag.trim()).trim_matches('"').parse().ok()
}

/// `POST /v1/heartbeats`
async fn heartbeats(State(app): State<Arc<App>>, peer: Option<Extension<Peer>>, body: Bytes) -> Response {
    let beats = match Beats::from_body(&body) {
        Ok(beats) => beats,
        Err(e) => return refuse(StatusCode::BAD_REQUEST, &format!("not heartbeats: {e}")),
    };
    let count = beats.beats.len();
    if count > BEATS {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, &format!("{count} heartbeats in one post, {BEATS} are allowed"));
    }
    match app.intake.take(beats).await {
        Ok(Taken { answer, proved }) => {
            if let Some(Extension(peer)) = peer.filter(|_| proved) {
                // From here on a flood of strangers cannot keep it out.
                app.gate.befriend(peer.0.ip());
            }
            let refused = answer.refused.len();
            app.metrics.beats_refused.inc_by(refused as u64);
            app.metrics.beats.inc_by(count.saturating_sub(refused) as u64);
            for (who, why) in &answer.refused {
                tracing::debug!(%who, "heartbeat refused: {why}");
            }
            axum::Json(answer).into_response()
        }
        Err(e) => unavailable(&e),
    }
}

/// The ledger cannot be used now.
fn unavailable(e: &dyn std::fmt::Display) -> Response {
    tracing::warn!("{e}");
    let mut response = refuse(StatusCode::SERVICE_UNAVAILABLE, "the ledger cannot be used now");
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    response
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.ledger.change().await {
        Ok(_) => "ready\n".into_response(),
        Err(e) => unavailable(&e),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    match scrape(&app).await {
        Ok(text) => ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(e) => unavailable(&e),
    }
}

async fn scrape(app: &App) -> Result<Vec<u8>, ServeError> {
    let _turn = app.turn.lock().await;
    let enrolled = app.ledger.enrolled().await?;
    let devices = app.intake.views(&enrolled);
    let scrape = Scrape {
        stores: &app.ledger.stores().await?,
        devices: &devices,
        heads: &app.ledger.heads().await?,
        streams: &app.config.streams,
        receipts: &Receipts::read(&app.ledger, &app.config.limits).await?,
        mails: app.ledger.unsent_mails().await?.len(),
        episodes: app.ledger.open_episodes("").await?.len(),
        store_silent: app.config.alerts.store_silent.0,
        register_silent: app.config.alerts.register_silent.0,
    };
    Ok(app.metrics.text(&scrape)?)
}

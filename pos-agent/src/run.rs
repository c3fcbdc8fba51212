//! The loops around the steps: cycles, the long poll at the relay, heartbeats, the loopback API.
//! Waits and wakes; decides nothing. All may stop at any point: steps are whole by themselves.

use crate::agent::Agent;
use crate::local_api;
use crate::pace::{self, End};
use crate::report;
use crate::upstream::Heard;
use proto::cli::{self, Exit};
use proto::follow;
use proto::http::Gate;
use proto::retry::{Backoff, random_unit};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Between tries of a relay that does not answer.
const RELAY_AGAIN: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
/// Between tries of a heartbeat that was not taken.
const BEAT_AGAIN: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(30));
/// Heartbeats are never closer than this, however many news there are.
const BEAT_GAP: Duration = Duration::from_millis(250);
/// A relay that ignores `wait` is not asked more often than this.
const POLL_GAP: Duration = Duration::from_millis(500);

/// So many news in a row may come at once, as when several streams arrive; a relay that has ever more of them is
/// not asked more often than [`POLL_GAP`].
const BURST: u32 = 8;

/// Runs until `shutdown`.
pub async fn run(agent: Arc<Agent>, listener: TcpListener, shutdown: impl Future<Output = ()> + Send + 'static) {
    let (stop, mut stopped) = watch::channel(false);
    let mut news = agent.news.subscribe();
    let mut loops = tokio::task::JoinSet::new();
    loops.spawn(watch_relay(agent.clone()));
    loops.spawn(beats(agent.clone()));
    loops.spawn(checks(agent.clone()));
    if let Some(every) = cli::watchdog_interval() {
        loops.spawn(async move {
            loop {
                cli::notify_watchdog();
                sleep(every).await;
            }
        });
    }
    let mut api_stopped = stopped.clone();
    let api = tokio::spawn(serve(agent.clone(), listener, async move {
        let _ = api_stopped.wait_for(|s| *s).await;
    }));
    tokio::spawn(async move {
        shutdown.await;
        stop.send_replace(true);
    });
    cli::notify_ready();
    tokio::select! {
        () = cycles(&agent, &mut news) => {}
        _ = stopped.wait_for(|s| *s) => {}
    }
    cli::notify_stopping();
    // A transaction that is running ends by itself before the runtime does.
    loops.shutdown().await;
    let _ = api.await;
}

async fn serve(agent: Arc<Agent>, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) {
    let gate = Gate::new(agent.config.http.clone()).with_slow(&local_api::SLOW);
    let handler = move |request, _peer| local_api::answer(agent.clone(), request);
    proto::http::serve_gated(listener, Arc::new(gate), shutdown, handler).await;
}

/// Cycle after cycle, as `pace` says.
async fn cycles(agent: &Agent, news: &mut watch::Receiver<u64>) {
    // The first look at the relay comes first, whatever it brings.
    let _ = timeout(agent.upstream.rules().relay_silent, news.changed()).await;
    let mut failures = 0;
    loop {
        let end = agent.cycle(news).await;
        failures = if end == End::Retry { failures + 1 } else { 0 };
        let (seen, share) = agent.upstream.seen();
        let now = agent.clock.monotonic();
        let wait = agent.upstream.rules().wait(now, &seen, &end, failures.max(1) - 1, share, random_unit());
        tokio::select! {
            _ = news.changed() => {}
            () = agent.wake.notified() => {}
            () = agent.hold.ended() => {}
            () = sleep(wait) => {}
        }
    }
}

/// The long poll at the relay: news wake the cycle within a round trip.
async fn watch_relay(agent: Arc<Agent>) {
    let mut silent_for = 0u32;
    let mut first = true;
    let mut quick = 0;
    loop {
        let rules = agent.upstream.rules();
        // One that was silent is asked what it has now, not to wait for more.
        let wait = if silent_for > 0 { Duration::ZERO } else { rules.poll_wait() };
        let asked = agent.clock.monotonic();
        let heard = agent.upstream.poll_relay(wait).await;
        let took = agent.clock.monotonic().saturating_sub(asked);
        let was_silent = silent_for > 0;
        silent_for = if matches!(heard, Heard::Silence(_)) { silent_for + 1 } else { 0 };
        let is_news = matches!(heard, Heard::News);
        quick = if took < POLL_GAP { quick + 1 } else { 0 };
        if first || is_news || (was_silent && silent_for == 0) {
            agent.news.send_modify(|n| *n += 1);
        }
        if was_silent && silent_for == 0 {
            tracing::info!(relay = agent.upstream.relay().url(), "the relay answers again");
            agent.tell.notify_one();
        }
        first = false;
        match heard {
            Heard::News | Heard::Same => {
                hear_errors(&agent, is_news).await;
                if quick > BURST || (!is_news && !was_silent && took < POLL_GAP) {
                    sleep(POLL_GAP).await;
                }
            }
            Heard::Static => sleep(rules.poll.min(rules.poll_wait())).await,
            Heard::Silence(e) => {
                if silent_for == 1 {
                    tracing::warn!("the relay does not answer: {e}");
                }
                sleep(RELAY_AGAIN.delay(silent_for - 1, random_unit())).await;
            }
        }
    }
}

/// Asks what the relay refused, and keeps its word. Of what it refused the versions tell whether it got past it: news of
/// them are kept, too.
async fn hear_errors(agent: &Agent, is_news: bool) {
    let changed = agent.upstream.ask_errors().await;
    let word = agent.upstream.word();
    if changed || (is_news && !word.errors.is_empty()) {
        agent.memory.keep_relay_word(&word);
    }
}

/// Reads all rows now and then: a bit that rots in a row that no pack touches is seen by nobody else.
async fn checks(agent: Arc<Agent>) {
    let mut failures = 0;
    loop {
        let checked = agent.verify().await;
        failures = if checked.is_err() { failures + 1 } else { 0 };
        match checked {
            Ok(found) if found.drift => tracing::error!("the rows were checked: {}", found.text()),
            Ok(found) if found.unread().next().is_some() => tracing::warn!("the rows were checked: {}", found.text()),
            Ok(_) => tracing::debug!("the rows were checked"),
            Err(e) => tracing::warn!(error = %e, "the rows could not be checked"),
        }
        sleep(pace::next_check(agent.config.verify.0, failures, random_unit())).await;
    }
}

/// Heartbeats: at once when there is something to tell, else in their interval.
async fn beats(agent: Arc<Agent>) {
    let mut failures = 0u32;
    // The first one follows the first cycle.
    let _ = timeout(Duration::from_secs(5), agent.tell.notified()).await;
    loop {
        let wait = match report::send(&agent).await {
            Ok(_) => {
                failures = 0;
                agent.config.heartbeat.0
            }
            Err(e) => {
                if failures == 0 {
                    tracing::info!("the heartbeat was not taken: {e}");
                }
                failures += 1;
                BEAT_AGAIN.delay(failures - 1, random_unit()).max(BEAT_GAP).min(agent.config.heartbeat.0)
            }
        };
        sleep(BEAT_GAP).await;
        let _ = timeout(wait, agent.tell.notified()).await;
    }
}

/// One cycle and one heartbeat: for cron and tests. Partly when some streams could not go on,
/// failed when nothing could be read.
pub async fn once(agent: &Agent) -> Exit {
    agent.upstream.be_impatient();
    if agent.memory.lost_latches()
        && let Err(e) = agent.verify().await
    {
        tracing::warn!(error = %e, "the rows could not be checked");
    }
    let exit = once_beside(agent).await;
    // What killed this process before comes when all else is brought and told: nothing is left to do if it does so again.
    if agent.hurry() { once_beside(agent).await } else { exit }
}

/// The same while the loops run: in turn with their cycles, and a silent relay is left in their time.
pub async fn once_beside(agent: &Agent) -> Exit {
    let began = agent.clock.monotonic();
    let mut news = agent.news.subscribe();
    let heard = agent.upstream.poll_relay(Duration::ZERO).await;
    let is_news = matches!(heard, Heard::News);
    if is_news || matches!(heard, Heard::Same) {
        hear_errors(agent, is_news).await;
    }
    if is_news {
        // A download that is running is not for these.
        agent.news.send_modify(|n| *n += 1);
    }
    let end = loop {
        match agent.cycle(&mut news).await {
            End::Again => {}
            end => break end,
        }
    };
    if let Err(e) = report::send(agent).await {
        tracing::warn!("the heartbeat was not taken: {e}");
    }
    let (seen, _) = agent.upstream.seen();
    let shown = agent.shown().clone();
    // A relay that does not know this register yet is no failure of the cycle.
    let failed = |f: &proto::wire::Fault| f.object.as_deref() != Some(report::HEARTBEAT);
    let unread = follow::lock(&agent.device).manifest().is_some_and(|m| !m.unread.is_empty());
    let stuck = unread || !shown.waits.is_empty() || agent.memory.look(|f| f.open().iter().any(failed));
    match end {
        End::Done if !stuck => Exit::Done,
        End::Halted => Exit::Failed,
        _ if [seen.relay, seen.fallback].iter().flatten().all(|at| *at < began) => Exit::Failed,
        _ if shown.held.is_empty() => Exit::Failed,
        _ => Exit::Partly,
    }
}

//! The loop around the spine: when to look at the sources, which stream is due, what to do in spare time; and the
//! service around the loop. Decides nothing about packs. It may be killed at any point: every step that it
//! starts leaves the disk in order.

use crate::control;
use crate::lan;
use crate::relay::{Pace, Relay};
use crate::report;
use crate::stream::{Outcome, Supply};
use crate::wake;
use proto::cli;
use proto::ids::StreamName;
use proto::retry::random_unit;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

/// Why the service could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The control socket.
    #[error("cannot open the control socket: {0}")]
    Control(std::io::Error),
    /// Headquarters' URL.
    #[error(transparent)]
    Config(#[from] proto::config::ConfigError),
}

/// Serves until `shutdown`, then drains.
pub async fn serve(relay: Arc<Relay>, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let hall = Arc::clone(&relay.hall);
    let address = hall.config.listen;
    let listen = |source| RunError::Listen { address, source };
    let listener = proto::http::listen(address, hall.gate.limits()).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let orders = control::listen(&hall.config.data_dir).map_err(RunError::Control)?;
    let mut tasks = JoinSet::new();
    let (desk, stop) = (Arc::clone(&hall), hall.stop.clone());
    tasks.spawn(proto::http::serve_gated(
        listener,
        Arc::clone(&hall.gate),
        stop.cancelled_owned(),
        move |request, from| lan::answer(Arc::clone(&desk), request, from.ip()),
    ));
    tasks.spawn(control::serve(Arc::clone(&relay), orders));
    if let Some(hq) = hall.config.hq_source()? {
        tasks.spawn(wake::run(Arc::clone(&hall), hq.clone()));
        tasks.spawn(report::run(Arc::clone(&hall), hq));
    }
    tasks.spawn(Mirror::new(Arc::clone(&relay)).run());
    tracing::info!(%address, store = %hall.config.store, "serving");
    cli::notify_ready();
    shutdown.await;
    cli::notify_stopping();
    hall.stop.cancel();
    let drained = timeout(hall.config.http.drain.0 + Duration::from_secs(2), async {
        while tasks.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        tracing::warn!("not everything ended in time");
    }
    Ok(())
}

/// The pause before a source that is behind is looked at again, and how often, after a wake-up.
const RELOOK: Duration = Duration::from_secs(1);
const RELOOKS: u32 = 12;

/// Why sources are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// It is time.
    Time,
    /// Somebody said that there are news.
    Told,
}

/// The loop's own state.
struct Mirror {
    relay: Arc<Relay>,
    /// Looks at sources in work.
    looks: JoinSet<usize>,
    /// Sources being looked at; whether to look again after.
    looking: BTreeMap<usize, bool>,
    /// Streams in work.
    steps: JoinSet<(StreamName, Outcome)>,
    busy: BTreeSet<StreamName>,
    /// When each stream is to be stepped next.
    due: BTreeMap<StreamName, Instant>,
    /// Spare-time work.
    spare: JoinSet<()>,
    spare_wanted: bool,
    /// Looks again at a source that is behind what headquarters said: when, and how many are left.
    relook: (Option<Instant>, u32),
    /// The manifest that the streams were last set going by.
    adopted: Option<(u64, u64)>,
}

impl Mirror {
    fn new(relay: Arc<Relay>) -> Mirror {
        Mirror {
            relay,
            looks: JoinSet::new(),
            looking: BTreeMap::new(),
            steps: JoinSet::new(),
            busy: BTreeSet::new(),
            due: BTreeMap::new(),
            spare: JoinSet::new(),
            // The first tick wants it, after the streams.
            spare_wanted: false,
            relook: (None, 0),
            adopted: None,
        }
    }

    async fn run(mut self) {
        let hall = Arc::clone(&self.relay.hall);
        self.relay.finish_import().await;
        let mut poll = interval(hall.config.poll.0);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = interval(cli::watchdog_interval().unwrap_or(Duration::from_secs(3600)));
        let relay = Arc::clone(&self.relay);
        let mut rotten = relay.rotten.lock().await;
        loop {
            self.start_due();
            self.start_spare();
            let next = self.next_due();
            let relook = self.relook.0;
            tokio::select! {
                () = hall.stop.cancelled() => break,
                () = hall.wake.notified() => {
                    self.relook = (None, RELOOKS);
                    self.look(Reason::Told);
                }
                _ = poll.tick() => {
                    self.look(Reason::Time);
                    self.all_due();
                }
                Some(looked) = self.looks.join_next(), if !self.looks.is_empty() => self.looked(looked.ok()),
                Some(done) = self.steps.join_next(), if !self.steps.is_empty() => self.stepped(done),
                Some(_) = self.spare.join_next(), if !self.spare.is_empty() => {}
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                () = sleep_until(relook.unwrap_or_else(Instant::now)), if relook.is_some() => {
                    self.relook.0 = None;
                    self.look(Reason::Told);
                }
                Some(name) = rotten.recv() => {
                    self.relay.found_rotten(&name);
                    self.due.insert(name.instance.stream.clone(), Instant::now());
                    self.spare_wanted = true;
                }
                _ = watchdog.tick() => cli::notify_watchdog(),
            }
        }
        // Steps that run see the stop for themselves; their ends are waited for, so that no child is orphaned.
        while self.steps.join_next().await.is_some() {}
        self.spare.shutdown().await;
    }

    /// Looks at every source; one that is being looked at is looked at again after, where there are news to miss.
    fn look(&mut self, reason: Reason) {
        for n in 0..self.relay.sources.len() {
            match self.looking.get_mut(&n) {
                Some(again) => *again |= reason == Reason::Told,
                None => self.look_at(n),
            }
        }
        // News may have come by an import, too.
        self.follow_news();
    }

    fn look_at(&mut self, n: usize) {
        if self.relay.is_halted() {
            return;
        }
        self.looking.insert(n, false);
        let relay = Arc::clone(&self.relay);
        self.looks.spawn(async move {
            relay.refresh(n).await;
            n
        });
    }

    fn looked(&mut self, n: Option<usize>) {
        match n {
            Some(n) => {
                if self.looking.remove(&n) == Some(true) {
                    self.look_at(n);
                }
            }
            // It panicked, and does not say which it was.
            None => self.looking.clear(),
        }
        // A cache on the way may be a moment behind.
        if self.looks.is_empty() && self.relook.1 > 0 && self.relay.hall.state().awaited().is_some() {
            self.relook = (Some(Instant::now() + RELOOK), self.relook.1 - 1);
        }
        self.follow_news();
    }

    /// A new manifest sets every stream going.
    fn follow_news(&mut self) {
        let adopted = self.relay.hall.state().adopted;
        if adopted != self.adopted {
            self.adopted = adopted;
            self.relay.end_spare();
            self.all_due();
        }
    }

    fn all_due(&mut self) {
        let now = Instant::now();
        for stream in self.relay.streams() {
            self.due.insert(stream, now);
        }
        self.spare_wanted = true;
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        let ready: Vec<StreamName> =
            self.due.iter().filter(|(s, at)| **at <= now && !self.busy.contains(*s)).map(|(s, _)| s.clone()).collect();
        for stream in ready {
            self.due.remove(&stream);
            self.busy.insert(stream.clone());
            let relay = Arc::clone(&self.relay);
            self.steps.spawn(async move {
                let supply = Supply { sources: &relay.sources, only: None };
                let outcome = relay.bring_up(&stream, supply, Pace::Service).await;
                (stream, outcome)
            });
        }
    }

    fn stepped(&mut self, done: Result<(StreamName, Outcome), tokio::task::JoinError>) {
        let (stream, outcome) = match done {
            Ok(done) => done,
            Err(e) => {
                // Which one it was is not said: let the next poll find it.
                tracing::error!(error = %e, "a stream's step panicked");
                self.busy.clear();
                return;
            }
        };
        self.busy.remove(&stream);
        self.spare_wanted = true;
        for waited in self.relay.may_go_on() {
            self.due.insert(waited, Instant::now());
        }
        if let Outcome::Again(pause, _) = outcome {
            let at = Instant::now() + pause.mul_f64(1.0 + random_unit() / 4.0);
            let earlier = self.due.get(&stream).is_some_and(|d| *d <= at);
            if !earlier {
                self.due.insert(stream, at);
            }
        }
    }

    /// The next moment at which a stream that is not in work is due.
    fn next_due(&self) -> Option<Instant> {
        self.due.iter().filter(|(s, _)| !self.busy.contains(*s)).map(|(_, at)| *at).min()
    }

    /// When no stream is in work: the chain's gaps, and order. Beside looks: one at a source that hangs may never end, and
    /// the news that a look brings end what takes long here.
    fn start_spare(&mut self) {
        let idle = self.steps.is_empty() && self.spare.is_empty();
        if !(idle && self.spare_wanted) || self.relay.is_halted() {
            return;
        }
        self.spare_wanted = false;
        let relay = Arc::clone(&self.relay);
        self.spare.spawn(async move {
            relay.spare_time().await;
            relay.check_rows().await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::Store;

    #[tokio::test]
    async fn a_source_that_hangs_keeps_nobody_from_spare_time_and_is_left_alone() {
        let store = Store::enrolled(&["file:///none".into()]);
        let mut mirror = Mirror::new(Arc::new(store.open()));
        mirror.looks.spawn(std::future::pending());
        mirror.looking.insert(0, false);
        mirror.look(Reason::Time);
        assert!(!mirror.looking[&0]);
        mirror.look(Reason::Told);
        assert_eq!((mirror.looking[&0], mirror.looks.len()), (true, 1));
        mirror.all_due();
        mirror.start_spare();
        assert!(mirror.spare.join_next().await.is_some());
    }
}

//! Where packs come from: the relay while it answers, CDN and buckets while it is silent.
//!
//! Owns the sources, what was last heard of each, and the relay's list of versions and errors.
//! Never decides when to look (that is `pace`), never believes an unsigned word: what the relay
//! says only leaves packs out. In memory, but for the relay's errors, which the agent keeps; a
//! power cut costs one poll.

use crate::config::Config;
use crate::pace::{self, HqSeen, Rules, Seen};
use crate::plan::Served;
use proto::clock::Clock;
use proto::device::Device;
use proto::fetch::{BadSource, Etag, FetchError, FetchErrorKind, Polled, RateFloor, Source};
use proto::follow::{Follower, Refreshed};
use proto::ids::Instance;
use proto::layout::PackName;
use proto::limits::Limits;
use proto::manifest::PackEntry;
use proto::retry::random_unit;
use proto::wire::{Fault, KnownVersions, Network, Versions, fault};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A long poll that takes this much longer than asked is dead.
const POLL_MARGIN: Duration = Duration::from_secs(10);

/// What the relay said last, kept over restarts: while it is silent, what it refused stays refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayWord {
    /// What it served.
    pub versions: Versions,
    /// Packs that lie in its `error/`.
    pub errors: BTreeSet<PackName>,
}

impl RelayWord {
    /// Whether the relay refused a pack, or the version that it leads to and never got past it.
    pub fn refuses(&self, instance: &Instance, pack: &PackEntry) -> bool {
        let got_there = || self.versions.get(instance).is_some_and(|v| *v >= pack.version);
        self.errors
            .iter()
            .any(|e| &e.instance == instance && e.version == pack.version && (e.kind == pack.kind || !got_there()))
    }
}

/// What a poll of the relay brought.
#[derive(Debug)]
pub enum Heard {
    /// Other versions than before, or the first ones.
    News,
    /// The same.
    Same,
    /// It is a static server: there is nothing to wait for.
    Static,
    /// It did not answer.
    Silence(FetchError),
}

/// The tiers above.
pub struct Upstream {
    relay: Source,
    by_relay: tokio::sync::Mutex<Follower>,
    by_fallback: tokio::sync::Mutex<Follower>,
    rules: Rules,
    floor: RateFloor,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    seen: Seen,
    /// Whether `/v1/versions` was 404.
    is_static: bool,
    /// The manifest could not be read from the relay.
    is_empty: bool,
    /// Why the last poll brought no versions.
    silence: Option<String>,
    /// Whether the list of versions is this process's own hearing, not a memory.
    heard: bool,
    word: RelayWord,
    versions_etag: Option<Etag>,
    errors_etag: Option<Etag>,
    /// This register's share of the jitter, drawn anew for each silence.
    share: f64,
    /// One look, no patience: a relay that does not answer now is left at once.
    impatient: bool,
}

impl Upstream {
    /// Reads the settings' sources; nothing is asked yet.
    pub fn new(config: &Config, clock: Arc<dyn Clock>, word: RelayWord) -> Result<Upstream, BadSource> {
        let source = |url: &String| Source::parse(url, &config.source_options);
        let relay = source(&config.relay)?;
        let fallback = config.fallback.iter().map(source).collect::<Result<Vec<_>, _>>()?;
        let rules = Rules {
            poll: config.poll.0,
            relay_silent: config.relay_silent.0,
            fallback_jitter: config.fallback_jitter.0,
            heartbeat: config.heartbeat.0,
            has_fallback: !fallback.is_empty(),
        };
        let seen = Seen { started: clock.monotonic(), ..Seen::default() };
        Ok(Upstream {
            by_relay: Follower::new(vec![relay.clone()]).into(),
            by_fallback: Follower::new(fallback).into(),
            relay,
            rules,
            floor: config.rate,
            clock,
            state: State { seen, word, share: random_unit(), ..State::default() }.into(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings of pace.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }
    /// The relay, for heartbeats.
    pub fn relay(&self) -> &Source {
        &self.relay
    }
    /// What was seen of each, and this register's share of the jitter.
    pub fn seen(&self) -> (Seen, f64) {
        let s = self.state();
        (s.seen, s.share)
    }
    /// The network as it looks now.
    pub fn network(&self) -> Network {
        self.rules.network(self.clock.monotonic(), &self.state().seen)
    }
    /// Seconds since HQ was seen, by the relay's word.
    pub fn hq_seen_s(&self) -> Option<u64> {
        self.state().seen.hq.map(|hq| hq.age(self.clock.monotonic()).as_secs())
    }
    /// Where to read from now.
    pub fn read_from(&self) -> pace::From {
        let s = self.state();
        if s.impatient && self.rules.has_fallback && s.silence.is_some() {
            return pace::From::Fallback;
        }
        self.rules.read_from(self.clock.monotonic(), &s.seen, s.share)
    }
    /// What the relay said last.
    pub fn word(&self) -> RelayWord {
        self.state().word.clone()
    }
    /// Whether the relay is a static server, which takes no heartbeats.
    pub fn is_static(&self) -> bool {
        self.state().is_static
    }

    /// A single cycle (`once`) cannot wait for a silence to last.
    pub fn be_impatient(&self) {
        self.state().impatient = true;
    }

    /// The relay answered something sensible.
    pub fn relay_answered(&self) {
        let mut s = self.state();
        // One that serves nothing and has no list for us, as a new machine that finds no way out, leads nowhere: it is
        // left like a silent one, if there is somewhere to go.
        if self.rules.has_fallback && s.is_empty && s.word.versions.is_empty() {
            return;
        }
        s.seen.relay = Some(self.clock.monotonic());
        s.share = random_unit();
    }

    /// The relay told how long ago it heard HQ.
    pub fn hq_seen(&self, ago_s: Option<u64>) {
        let told = self.clock.monotonic();
        let Some(said) = ago_s.map(|s| HqSeen { told, ago: Duration::from_secs(s) }) else { return };
        let mut s = self.state();
        if s.seen.hq.is_none_or(|known| said.age(told) <= known.age(told)) {
            s.seen.hq = Some(said);
        }
    }

    /// How far the source can bring an instance. None: the relay has not told yet.
    pub fn served(&self, from: pace::From, instance: &Instance) -> Option<Served> {
        let s = self.state();
        if from == pace::From::Fallback || s.is_static {
            return Some(Served::All);
        }
        s.heard.then(|| s.word.versions.get(instance).map_or(Served::Nothing, |v| Served::Upto(*v)))
    }

    /// Whether the relay takes heartbeats now.
    pub fn takes_heartbeats(&self) -> bool {
        let s = self.state();
        self.relay.is_web() && !s.is_static && s.silence.is_none()
    }

    /// Asks the relay for its versions, waiting up to `wait` for news.
    pub async fn poll_relay(&self, wait: Duration) -> Heard {
        // One that hangs is as silent as one that is gone.
        let polled = tokio::time::timeout(wait + POLL_MARGIN, self.poll(wait)).await;
        let heard =
            polled.unwrap_or_else(|_| Heard::Silence(self.no_versions(FetchErrorKind::Slow, "no answer in time")));
        self.state().silence = if let Heard::Silence(e) = &heard { Some(e.to_string()) } else { None };
        heard
    }

    /// Why the relay's last answer brought no versions, if it brought none.
    pub fn silence(&self) -> Option<String> {
        self.state().silence.clone()
    }

    fn no_versions(&self, kind: FetchErrorKind, detail: impl Into<String>) -> FetchError {
        FetchError { source_url: self.relay.url().to_owned(), name: "v1/versions".into(), kind, detail: detail.into() }
    }

    async fn poll(&self, wait: Duration) -> Heard {
        let known = {
            let s = self.state();
            // Right after a start there is nothing to compare with.
            if s.heard { s.versions_etag.clone() } else { None }
        };
        let wait = if known.is_some() { wait.as_secs() } else { 0 };
        match self.relay.versions_poll(wait, known.as_ref()).await {
            Ok(Polled::Unchanged) => {
                self.relay_answered();
                Heard::Same
            }
            Ok(Polled::NoSuchPage) => {
                let is_empty = {
                    let mut s = self.state();
                    s.is_static = true;
                    // A relay that has the page again, with what it said before, must not answer “unchanged”.
                    s.versions_etag = None;
                    s.is_empty
                };
                // A web server that says 404 lives, unless it has no manifest for us either; of a
                // directory only its objects can tell.
                if self.relay.is_web() && !is_empty {
                    self.relay_answered();
                }
                Heard::Static
            }
            Ok(Polled::Body { bytes, etag }) => match page::<KnownVersions>(&bytes, etag.as_ref()) {
                Ok(KnownVersions(versions)) => {
                    let heard = self.take_versions(versions, etag);
                    self.relay_answered();
                    heard
                }
                Err(why) => {
                    let why = format!("not a list of versions: {why}");
                    Heard::Silence(self.no_versions(FetchErrorKind::NotAnObject, why))
                }
            },
            Err(e) => Heard::Silence(e),
        }
    }

    fn take_versions(&self, versions: Versions, etag: Option<Etag>) -> Heard {
        let mut s = self.state();
        s.is_static = false;
        s.versions_etag = etag;
        let first = !std::mem::replace(&mut s.heard, true);
        if !first && s.word.versions == versions {
            return Heard::Same;
        }
        s.word.versions = versions;
        Heard::News
    }

    /// Asks the relay which packs lie in its `error/`. Whether that changed; a relay without the
    /// page leaves what is known.
    pub async fn ask_errors(&self) -> bool {
        let known = self.state().errors_etag.clone();
        let Ok(Polled::Body { bytes, etag }) = self.relay.long_poll("v1/errors", &[], 0, known.as_ref()).await else {
            return false;
        };
        let Ok(faults) = page::<Vec<Fault>>(&bytes, etag.as_ref()) else { return false };
        let errors = faults
            .into_iter()
            .filter(|f| f.code == fault::PACK_IN_ERROR)
            .filter_map(|f| f.object?.parse().ok())
            .collect();
        let mut s = self.state();
        s.errors_etag = etag;
        let changed = s.word.errors != errors;
        s.word.errors = errors;
        changed
    }

    /// Reads trust and manifest from the source in use, and takes them when they pass; and which source that is.
    pub async fn refresh(&self, device: &Mutex<Device>, limits: &Limits) -> (pace::From, Refreshed) {
        let from = self.read_from();
        // Of a static server that was left, or a relay that had no list for us, only its objects tell that it is back.
        let may_be_back = {
            let s = self.state();
            s.silence.is_none() && (s.is_static || s.is_empty)
        };
        if from == pace::From::Fallback && may_be_back {
            let back = self.read(pace::From::Relay, device, limits).await;
            if back.reached > 0 {
                return (pace::From::Relay, back);
            }
        }
        (from, self.read(from, device, limits).await)
    }

    async fn read(&self, from: pace::From, device: &Mutex<Device>, limits: &Limits) -> Refreshed {
        let follower = match from {
            pace::From::Relay => &self.by_relay,
            pace::From::Fallback => &self.by_fallback,
        };
        let refreshed = follower.lock().await.refresh(device, &*self.clock, limits, None).await;
        if from == pace::From::Relay {
            self.state().is_empty = refreshed.reached == 0;
        }
        if refreshed.reached > 0 {
            match from {
                // Without its versions its objects lead nowhere: it is left like a silent one.
                pace::From::Relay if self.state().silence.is_some() => {}
                pace::From::Relay => self.relay_answered(),
                pace::From::Fallback => self.state().seen.fallback = Some(self.clock.monotonic()),
            }
        }
        refreshed
    }

    /// Brings a pack into `part`, whole and verified.
    pub async fn fetch_pack(
        &self,
        from: pace::From,
        name: &PackName,
        entry: &PackEntry,
        part: &Path,
    ) -> Result<(), Vec<FetchError>> {
        let follower = match from {
            pace::From::Relay => &self.by_relay,
            pace::From::Fallback => &self.by_fallback,
        };
        follower.lock().await.fetch_pack(name, entry, part, &self.floor, &|_| false).await
    }
}

/// What a page of the relay's own making says, if it came whole.
fn page<T: DeserializeOwned>(body: &[u8], etag: Option<&Etag>) -> Result<T, String> {
    if etag.is_some_and(|e| !e.fits(body)) {
        return Err("it was bent on its way".into());
    }
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

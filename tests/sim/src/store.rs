//! The machines of a store: how a relay and a register are set up, started and asked to do one thing.

use crate::clock::Machine;
use crate::disk::SmallDisk;
use crate::net::Line;
use bytes::Bytes;
use pos_agent::agent::{Agent, OpenError};
use pos_agent::pace::End;
use pos_agent::report::send;
use pos_agent::upstream::Heard;
use proto::clock::Clock;
use proto::device::Device;
use proto::fetch::{Etag, Source};
use proto::http::Inbound;
use proto::ids::StreamName;
use proto::trust::EnrolCode;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use store_relay::relay::{Pace, Relay, RelayError, Tools};
use store_relay::steps::Steps;
use store_relay::stream::{Outcome, Supply};
use store_relay::trial::Runner;
use store_relay::wake::{self, Asked};
use tokio::sync::watch;

/// What a step's observer throws when the plug is pulled there.
#[derive(Debug)]
pub struct PowerCut;

/// Counts steps down and pulls the plug at one.
#[derive(Debug, Clone)]
pub struct Fuse {
    left: Arc<AtomicI64>,
    blown: Arc<AtomicBool>,
}

impl Default for Fuse {
    fn default() -> Self {
        Fuse { left: Arc::new(AtomicI64::new(-1)), blown: Arc::default() }
    }
}

impl Fuse {
    /// It goes after so many steps more.
    pub fn light(&self, steps: u64) {
        self.left.store(steps as i64, SeqCst);
    }
    /// One step; whether it goes now.
    pub fn burn(&self) -> bool {
        if self.left.load(SeqCst) < 0 {
            return false;
        }
        let goes = self.left.fetch_sub(1, SeqCst) == 0;
        self.blown.fetch_or(goes, SeqCst);
        goes
    }
    /// A new one; whether the old one had gone.
    pub fn replace(&self) -> bool {
        self.left.store(-1, SeqCst);
        self.blown.swap(false, SeqCst)
    }
    /// Does not burn until it is given back what this gives.
    pub fn hold(&self) -> i64 {
        self.left.swap(-1, SeqCst)
    }
    /// Burns on.
    pub fn give_back(&self, left: i64) {
        self.left.store(left, SeqCst);
    }
    /// Whether it has gone.
    pub fn is_blown(&self) -> bool {
        self.blown.load(SeqCst)
    }
}

/// Something that a machine does once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// Begins to work.
    Start,
    /// Relay: looks at all its sources.
    Look,
    /// Relay: brings a stream up.
    Step(String),
    /// Relay: idle work.
    Spare,
    /// Relay: tells headquarters how it stands.
    Report,
    /// Relay: asks headquarters whether there is news.
    Wake,
    /// Register: asks its relay for versions and errors.
    Poll,
    /// Register: one cycle.
    Cycle,
    /// Register: one heartbeat.
    Beat,
    /// Register or relay: recomputes its digests.
    Verify,
    /// Headquarters: publishes.
    Publish,
    /// Headquarters: judges the fleet.
    Judge,
}

/// How it ended.
#[derive(Debug)]
pub enum Done {
    /// Nothing to tell.
    Well,
    /// A stream's step.
    Stepped(Outcome),
    /// A report or heartbeat: whether it arrived.
    Told(bool),
    /// A wake-up.
    Woken(Result<Asked, ()>),
    /// What the relay said, in a word.
    Heard(&'static str),
    /// A cycle.
    Cycled(End),
    /// The plug was pulled.
    Cut,
    /// A defect.
    Panicked(String),
}

/// A relay's machine.
pub struct RelayNode {
    /// Its store's id.
    pub store: String,
    /// Its data directory.
    pub data: PathBuf,
    /// The disk under it.
    pub disk: SmallDisk,
    /// Its clock.
    pub clock: Arc<Machine>,
    /// The relay, while it runs.
    pub relay: Option<Arc<Relay>>,
    /// Headquarters, as it reaches it.
    pub hq: Source,
    /// What cuts it off.
    pub fuse: Fuse,
    /// The manifest that its streams were last set going by.
    pub adopted: Option<(u64, u64)>,
    /// Idle work waits.
    pub spare_wanted: bool,
    /// Looks that are left after a wake-up.
    pub relooks: u32,
    /// What its registers were last told.
    pub listing: String,
    /// What it knows of headquarters' wake page.
    pub woken: Option<Etag>,
    /// Reports in a row that did not arrive.
    pub failures: u32,
    /// What it served when its shadow was lost: that is believed by hash.
    pub unproved: BTreeSet<String>,
    config: store_relay::config::Config,
}

impl RelayNode {
    /// Enrols a relay in a directory of its own.
    pub fn new(dir: &Path, code: &EnrolCode, n: usize, line: Line, clock: Arc<Machine>) -> RelayNode {
        let store = code.id.to_string();
        let data = dir.join(format!("relay-{n}"));
        let disk = SmallDisk::mount(&data);
        let file = dir.join(format!("relay-{n}.toml"));
        let text = format!(
            "store = \"{store}\"\ndata_dir = \"{}\"\nsources = [\"http://cdn/\", \"http://bucket/\"]\nhq = \"http://hq/\"\nballast = \"1MiB\"\n\
             grace = \"10m\"\nerror_grace = \"30m\"\n[tries]\nrefetch = \"10m\"\nmissing = \"1m\"\n",
            data.display()
        );
        fs::write(&file, text).unwrap();
        let mut config = store_relay::config::load(Some(&file), []).unwrap().value;
        config.source.wire = Some(Arc::new(line));
        config.source.clock = Some(clock.clone());
        Device::enrol(&data, code).unwrap();
        let hq = config.hq_source().unwrap().unwrap();
        RelayNode {
            store,
            data,
            disk,
            clock,
            relay: None,
            hq,
            fuse: Fuse::default(),
            adopted: None,
            spare_wanted: true,
            relooks: 0,
            listing: String::new(),
            woken: None,
            failures: 0,
            unproved: BTreeSet::new(),
            config,
        }
    }

    /// Opens the data directory, as a service does when it starts.
    pub fn start(&mut self) -> Result<(), RelayError> {
        let fuse = self.fuse.clone();
        let steps = Steps::observed(move |_, _| {
            if fuse.burn() {
                std::panic::panic_any(PowerCut);
            }
        });
        let clock: Arc<dyn Clock> = self.clock.clone();
        let relay = Relay::open(self.config.clone(), clock, Tools { runner: Runner::Here, steps })?;
        self.relay = Some(Arc::new(relay));
        self.hq = self.config.hq_source().unwrap().unwrap();
        (self.adopted, self.spare_wanted, self.relooks, self.woken, self.failures) = (None, true, 0, None, 0);
        self.listing.clear();
        Ok(())
    }
}

/// A relay does one thing.
pub async fn relay_does(relay: Arc<Relay>, hq: Source, woken: Option<Etag>, op: Op) -> Done {
    match op {
        Op::Look => {
            for n in 0..relay.sources.len() {
                relay.refresh(n).await;
            }
            Done::Well
        }
        Op::Step(stream) => {
            let stream: StreamName = stream.parse().unwrap();
            let supply = Supply { sources: &relay.sources, only: None };
            Done::Stepped(relay.bring_up(&stream, supply, Pace::Service).await)
        }
        Op::Spare => {
            relay.spare_time().await;
            Done::Well
        }
        Op::Report => Done::Told(store_relay::report::report_once(&relay.hall, &hq).await.is_ok()),
        Op::Wake => Done::Woken(wake::poll_once(&relay.hall, &hq, woken).await.map_err(|_| ())),
        Op::Verify => {
            store_relay::control::obey(&relay, store_relay::control::Order::Verify).await;
            Done::Well
        }
        other => panic!("no relay does {other:?}"),
    }
}

/// A register's machine.
pub struct RegisterNode {
    /// Its id.
    pub id: String,
    /// The number of its store's relay.
    pub relay: usize,
    /// Its data directory.
    pub data: PathBuf,
    /// The disk under it.
    pub disk: SmallDisk,
    /// Its clock.
    pub clock: Arc<Machine>,
    /// The agent, while it runs.
    pub agent: Option<Arc<Agent>>,
    /// What breaks off a download.
    pub news: watch::Sender<u64>,
    /// What cuts it off.
    pub fuse: Fuse,
    /// Cycles in a row that are to be tried again.
    pub failures: u32,
    /// Polls in a row without an answer.
    pub silences: u32,
    /// It has not polled since it started.
    pub first: bool,
    /// Heartbeats in a row that were not taken.
    pub beats_failed: u32,
    config: pos_agent::config::Config,
}

impl RegisterNode {
    /// Enrols a register in a directory of its own.
    pub fn new(dir: &Path, code: &EnrolCode, n: usize, relay: usize, line: Line, clock: Arc<Machine>) -> RegisterNode {
        let id = code.id.to_string();
        let data = dir.join(format!("register-{n}"));
        let disk = SmallDisk::mount(&data);
        let file = dir.join(format!("register-{n}.toml"));
        let text = format!(
            "register = \"{id}\"\ndata_dir = \"{}\"\nrelay = \"http://relay-{relay}/\"\nfallback = [\"http://cdn/\"]\nballast = \"1MiB\"\n\
             fallback_jitter = \"0s\"\n",
            data.display()
        );
        fs::write(&file, text).unwrap();
        let mut config = pos_agent::config::Config::load(Some(&file), []).unwrap().value;
        config.source_options.wire = Some(Arc::new(line));
        config.source_options.clock = Some(clock.clone());
        Device::enrol(&data, code).unwrap();
        RegisterNode {
            id,
            relay,
            data,
            disk,
            clock,
            agent: None,
            news: watch::channel(0).0,
            fuse: Fuse::default(),
            failures: 0,
            silences: 0,
            first: true,
            beats_failed: 0,
            config,
        }
    }

    /// Opens the data directory, as a service does when it starts.
    pub fn start(&mut self) -> Result<(), OpenError> {
        let fuse = self.fuse.clone();
        let observer: pos_agent::agent::Observer = Arc::new(move |_| {
            if fuse.burn() {
                std::panic::panic_any(PowerCut);
            }
            true
        });
        let clock: Arc<dyn Clock> = self.clock.clone();
        self.agent = Some(Arc::new(Agent::open(self.config.clone(), clock, Some(observer))?));
        (self.failures, self.silences, self.first, self.beats_failed) = (0, 0, true, 0);
        Ok(())
    }
}

/// A register does one thing.
pub async fn register_does(agent: Arc<Agent>, mut news: watch::Receiver<u64>, op: Op) -> Done {
    match op {
        Op::Poll => {
            let heard = agent.upstream.poll_relay(std::time::Duration::ZERO).await;
            if matches!(heard, Heard::News | Heard::Same) && agent.upstream.ask_errors().await {
                agent.memory.keep_relay_word(&agent.upstream.word());
            }
            Done::Heard(match heard {
                Heard::News => "news",
                Heard::Same => "same",
                Heard::Static => "static",
                Heard::Silence(_) => "silence",
            })
        }
        Op::Cycle => Done::Cycled(agent.cycle(&mut news).await),
        Op::Beat => Done::Told(send(&agent).await.is_ok()),
        Op::Verify => {
            let request = http::Request::post("/v1/verify").body(Inbound::from(Bytes::new())).unwrap();
            pos_agent::local_api::answer(agent, request).await;
            Done::Well
        }
        other => panic!("no register does {other:?}"),
    }
}

//! What the tests of several rooms need: a headquarters, and a store enrolled with it.
#![allow(clippy::disallowed_methods)]

mod hq;

use crate::config::Config;
use crate::hall::State;
use crate::relay::{Relay, RelayError, Tools};
use crate::shelves::Room;
use crate::steps::Steps;
use crate::trial::Runner;
pub use hq::*;
use proto::clock::{Clock, TestClock};
use proto::device::Device;
use proto::ids::Instance;
use proto::layout::PackName;
use proto::shelf::LockError;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// An enrolled store's data directory, with settings.
pub struct Store {
    pub dir: TempDir,
    pub clock: Arc<TestClock>,
    pub config: Config,
}

impl Store {
    pub fn enrolled(sources: &[String]) -> Store {
        let dir = TempDir::new().unwrap();
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        Device::enrol(&data, &code()).unwrap();
        let file = dir.path().join(crate::config::FILE);
        let text = format!(
            "store = \"0421\"\ndata_dir = \"data\"\nlisten = \"127.0.0.1:0\"\nballast = \"0\"\nsources = {}\n",
            serde_json::to_string(sources).unwrap()
        );
        fs::write(&file, text).unwrap();
        let config = crate::config::load(Some(&file), []).unwrap().value;
        Store { dir, clock: Arc::new(TestClock::at(NOW)), config }
    }

    pub fn data(&self) -> &Path {
        &self.config.data_dir
    }
    pub fn open(&self) -> Relay {
        self.open_with(Runner::Here, Steps::default())
    }
    pub fn open_with(&self, runner: Runner, steps: Steps) -> Relay {
        self.try_open(runner, steps).unwrap()
    }
    /// As [`Store::open`], once nothing runs any more of a relay that was cut off.
    pub async fn open_after_cut(&self) -> Relay {
        for _ in 0..3000 {
            match self.try_open(Runner::Here, Steps::default()) {
                Err(RelayError::Lock(LockError::Held { .. })) => tokio::time::sleep(Duration::from_millis(10)).await,
                opened => return opened.unwrap(),
            }
        }
        panic!("{} is held for ever", self.data().display());
    }
    fn try_open(&self, runner: Runner, steps: Steps) -> Result<Relay, RelayError> {
        let clock: Arc<dyn Clock> = Arc::clone(&self.clock) as Arc<dyn Clock>;
        Relay::open(self.config.clone(), clock, Tools { runner, steps })
    }
}

/// Where a pack's file lies.
pub fn rooms_of(relay: &Relay, name: &PackName) -> Vec<&'static str> {
    [Room::Incoming, Room::Ready, Room::Ok, Room::Error]
        .into_iter()
        .filter(|r| relay.hall.shelves.pack(*r, name).is_file())
        .map(Room::dir)
        .collect()
}

/// The version served of an instance.
pub fn served(relay: &Relay, instance: &Instance) -> Option<u64> {
    state(relay).versions().get(instance).map(|v| v.get())
}

pub fn state(relay: &Relay) -> std::sync::MutexGuard<'_, State> {
    relay.hall.state()
}

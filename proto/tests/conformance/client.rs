//! A device: its memory on disk, its clock, and looks at a server. Whatever is kept is read from the disk again.

use crate::repo::{Repo, Server, key, list_name, t0, trust_name};
use proto::clock::TestClock;
use proto::device::Device;
use proto::fetch::{FetchErrorKind, RateFloor, Source, SourceOptions};
use proto::follow::{FollowError, Follower, Refreshed, lock};
use proto::ids::DeviceId;
use proto::layout::{ObjectName, PackName};
use proto::limits::Limits;
use proto::trust::{EnrolCode, RootKeys};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// How a look at one source ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A new list was accepted.
    News,
    /// Nothing new.
    Same,
    /// An object was refused: which, and the reason's code.
    Refused(ObjectName, &'static str),
    /// An object could not be read: its name, and why.
    Failed(String, FetchErrorKind),
}

pub fn list_refused(code: &'static str) -> Outcome {
    Outcome::Refused(list_name(), code)
}
pub fn trust_refused(version: u64, code: &'static str) -> Outcome {
    Outcome::Refused(trust_name(version), code)
}

impl Outcome {
    pub fn of(news: Refreshed) -> Outcome {
        assert!(news.problems.len() < 2, "{news:?}");
        match news.problems.into_iter().next() {
            None if news.changed => Outcome::News,
            None => Outcome::Same,
            Some(FollowError::Refused { object, refusal, .. }) => Outcome::Refused(object, refusal.code()),
            Some(FollowError::Fetch(e)) => Outcome::Failed(e.name, e.kind),
            Some(e @ FollowError::Device(_)) => panic!("{e}"),
        }
    }
}

pub struct Client {
    pub home: TempDir,
    pub id: DeviceId,
    pub clock: TestClock,
    pub limits: Limits,
    pub options: SourceOptions,
}

impl Client {
    /// Enrolled for store 0421 by the root keys of today, at trust file 1.
    pub fn of(repo: &Repo) -> Client {
        Client::enrolled(repo.trust.root.clone())
    }

    pub fn enrolled(roots: RootKeys) -> Client {
        let client = Client::at(TempDir::new().unwrap());
        Device::enrol(client.home.path(), &client.code(roots)).unwrap();
        client
    }

    /// With this for its memory.
    pub fn at(home: TempDir) -> Client {
        Client {
            home,
            id: "0421".parse().unwrap(),
            clock: TestClock::at(&t0().to_string()),
            limits: Limits::default(),
            options: SourceOptions::default(),
        }
    }

    /// The code that headquarters would give.
    pub fn code(&self, roots: RootKeys) -> EnrolCode {
        let seed = key(9).to_secret_text();
        EnrolCode {
            format: 1,
            id: self.id.clone(),
            seed,
            roots,
            trust_version: 1,
            expires_at: "2026-01-08T00:00:00Z".parse().unwrap(),
        }
    }

    /// Its memory, opened as at a start.
    pub fn device(&self) -> Mutex<Device> {
        Mutex::new(Device::open(self.home.path(), &self.id, &self.limits).unwrap())
    }

    /// The version of trust and the serial of the list that it would start with.
    pub fn kept(&self) -> (u64, Option<u64>) {
        let device = self.device();
        let device = lock(&device);
        let serial = device.manifest().map(|m| m.serial);
        assert_eq!(serial.unwrap_or(0), device.seen().serial, "list and memory of it are one");
        (device.trust().version(), serial)
    }

    /// The streams of the kept list whose entries it could not read.
    pub fn unread(&self) -> Vec<String> {
        let device = self.device();
        let device = lock(&device);
        device.manifest().unwrap().unread.keys().map(ToString::to_string).collect()
    }

    pub fn follower(&self, servers: &[&Arc<Server>]) -> Follower {
        let source = |(n, server): (usize, &&Arc<Server>)| {
            let options = SourceOptions { wire: Some((*server).clone()), ..self.options.clone() };
            Source::parse(&format!("http://127.0.0.1:{}/", n + 1), &options).unwrap()
        };
        Follower::new(servers.iter().enumerate().map(source).collect())
    }

    /// One look of a program that runs on.
    pub async fn look(&self, follower: &mut Follower, device: &Mutex<Device>) -> Outcome {
        Outcome::of(follower.refresh(device, &self.clock, &self.limits, None).await)
    }

    /// One look of a program that was started for it.
    pub async fn refresh(&self, repo: &Repo) -> Outcome {
        self.look(&mut self.follower(&[&repo.server]), &self.device()).await
    }

    /// What the server shows gives this outcome, however often one looks, and leaves this behind; then headquarters'
    /// next list is taken.
    pub async fn refuses(&self, case: &str, repo: &mut Repo, outcome: Outcome, kept: (u64, Option<u64>)) {
        let (mut follower, device) = (self.follower(&[&repo.server]), self.device());
        for look in 1..=2 {
            assert_eq!(self.look(&mut follower, &device).await, outcome, "{case}, look {look}");
        }
        drop(device);
        assert_eq!(self.kept(), kept, "{case}");
        self.recovers(case, repo).await;
    }

    /// The server is honest again, headquarters goes on.
    pub async fn recovers(&self, case: &str, repo: &mut Repo) {
        repo.restore();
        repo.put_list(|_| ());
        self.takes(case, repo).await;
    }

    /// All that headquarters has signed is accepted, and kept.
    pub async fn takes(&self, case: &str, repo: &Repo) {
        assert_eq!(self.refresh(repo).await, Outcome::News, "{case}");
        assert_eq!(self.kept(), (repo.trust.version, Some(repo.list.serial)), "{case}");
    }

    pub fn part(&self, name: &PackName) -> PathBuf {
        self.home.path().join(name.to_string().replace('/', "-") + ".part")
    }

    /// A pack by what the kept list says of it; its bytes once they are whole and verified.
    pub async fn download(&self, repo: &Repo, name: &PackName) -> Result<Vec<u8>, FetchErrorKind> {
        self.download_by(repo, name, &RateFloor::default()).await
    }

    pub async fn download_by(
        &self,
        repo: &Repo,
        name: &PackName,
        floor: &RateFloor,
    ) -> Result<Vec<u8>, FetchErrorKind> {
        let device = self.device();
        let list = lock(&device).manifest().cloned().expect("a list was accepted");
        let stream = &list.streams[&name.instance.stream];
        assert_eq!(stream.audience, name.instance.audience);
        let entry = stream.pack(name.version, name.kind).expect("the pack is listed");
        let (follower, part) = (self.follower(&[&repo.server]), self.part(name));
        match follower.fetch_pack(name, entry, &part, floor, &|_| false).await {
            Ok(()) => Ok(std::fs::read(part).unwrap()),
            Err(errors) => Err(errors[0].kind),
        }
    }
}

//! Ways back, and the way forward after a jump.

use super::*;
use proto::chain;
use proto::clock::after;
use proto::follow::{Follower, lock};
use proto::ids::Version;
use proto::layout::ObjectName;
use proto::replica::{ApplyError, Job, PackFile, Replica};

#[tokio::test]
async fn a_lower_serial_is_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    let first = repo.object(&list_name()).to_vec();
    repo.put_list(|_| ());
    client.takes("second", &repo).await;
    repo.forge_list(&first);
    client.refuses("the very first", &mut repo, list_refused("OLDER_SERIAL"), (1, Some(2))).await;
    repo.forge_list(&repo.list_by(&[11], |m| m.serial = 2));
    client.refuses("signed anew", &mut repo, list_refused("OLDER_SERIAL"), (1, Some(3))).await;
    repo.forge_list(&repo.list_by(&[11], |m| m.serial = 0));
    client.refuses("none", &mut repo, list_refused("OLDER_SERIAL"), (1, Some(4))).await;
}

/// The old `trust.json` with all that belonged to it.
#[tokio::test]
async fn older_trust_moves_nobody_back() {
    let mut repo = Repo::new();
    let old = repo.object(&ObjectName::Trust).to_vec();
    repo.rotate(12);
    let client = Client::of(&repo);
    client.takes("by the second key", &repo).await;
    repo.server.put(&ObjectName::Trust, &old);
    repo.server.remove(&trust_name(2));
    repo.forge_list(&repo.list_by(&[11], |_| ()));
    client.refuses("the first key's", &mut repo, list_refused("BAD_SIGNATURE"), (2, Some(2))).await;
    // With a good list an old pointer is only a stale cache.
    repo.put_list(|_| ());
    repo.server.put(&ObjectName::Trust, &old);
    client.takes("a stale pointer", &repo).await;
}

/// A list of a higher serial may tell of a lower version: a publisher signed it. No way of packs leads down.
#[tokio::test]
async fn a_stream_that_goes_back_in_a_newer_list_has_no_way() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    let name = repo.add_pack("price@zone-east", None, 1, b"old");
    let old = repo.list.streams.clone();
    repo.add_pack("price@zone-east", Some(1), 2, b"new");
    repo.put_list(|_| ());
    client.takes("version 2", &repo).await;
    repo.put_list(|m| m.streams = old);
    client.takes("version 1", &repo).await;
    let device = client.device();
    let list = lock(&device).manifest().cloned().unwrap();
    let entry = &list.streams[&name.instance.stream];
    let held = Version::try_from(2u64).ok();
    assert_eq!(chain::cheapest(&entry.packs, held, entry.version, |_| true), None);
    assert_eq!(chain::furthest(&entry.packs, held, entry.version, |_| true), None);
}

#[tokio::test]
async fn a_stream_that_vanishes_is_headquarters_right() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    let name = repo.add_pack("price@zone-east", None, 1, b"rows");
    repo.put_list(|_| ());
    client.takes("with it", &repo).await;
    let streams = std::mem::take(&mut repo.list.streams);
    repo.put_list(|_| ());
    client.takes("without it", &repo).await;
    assert!(lock(&client.device()).manifest().unwrap().instance(&name.instance.stream).is_none());
    repo.list.streams = streams;
    client.recovers("with it again", &mut repo).await;
}

/// Whoever stole the publisher's key jumped ahead, in all that only goes up.
async fn jumped() -> (Repo, Client) {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.add_pack("price@zone-east", None, 1 << 40, b"stolen");
    repo.put_list(|m| {
        m.serial = u64::MAX;
        m.created_at = after(t0(), 30 * 365 * DAY);
        m.expires_at = after(t0(), 40 * 365 * DAY);
    });
    client.takes("a stolen key is believed", &repo).await;
    repo.list.streams.clear();
    repo.list.serial = 1;
    (repo, client)
}

#[tokio::test]
async fn a_new_key_alone_forgets_no_serial() {
    let (mut repo, client) = jumped().await;
    repo.signer = 12;
    // Of a life that the jump of time cannot end.
    let forever = after(t0(), 100 * 365 * DAY);
    repo.put_trust(|t| t.publishers = vec![proto::trust::PublisherKey { expires_at: forever, ..publisher(12) }]);
    repo.put_list(|_| ());
    assert_eq!(client.refresh(&repo).await, list_refused("OLDER_SERIAL"));
    assert_eq!(client.kept(), (2, Some(u64::MAX)));
    repo.put_trust(|t| t.epoch = 2);
    repo.put_list(|m| m.epoch = 2);
    client.takes("with a new epoch", &repo).await;
}

#[tokio::test]
async fn a_new_epoch_takes_lower_serials_and_an_earlier_time() {
    let (mut repo, client) = jumped().await;
    let stolen = repo.list_by(&[11], |m| (m.serial, m.epoch) = (u64::MAX, 2));
    repo.signer = 12;
    repo.put_trust(|t| (t.epoch, t.publishers) = (2, vec![publisher(12)]));
    repo.put_list(|m| (m.epoch, m.serial) = (2, 1));
    client.takes("serial 1, of today", &repo).await;
    assert_eq!(lock(&client.device()).seen().floor, Some(t0()));
    repo.forge_list(&stolen);
    client.refuses("the thief again", &mut repo, list_refused("BAD_SIGNATURE"), (2, Some(1))).await;
    repo.forge_list(&repo.list_by(&[12], |m| m.epoch = 1));
    client.refuses("the old epoch", &mut repo, list_refused("OTHER_EPOCH"), (2, Some(2))).await;
}

/// What lies in `museum/`, as a device of today finds it.
struct Museum {
    client: Client,
    follower: Follower,
    replica: Replica,
}

impl Museum {
    async fn visited() -> Museum {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/museum/2026-11-first");
        let about: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("about.json")).unwrap()).unwrap();
        let root = about["root"].as_str().unwrap().parse().unwrap();
        let client = Client::enrolled(proto::trust::RootKeys { threshold: 1, keys: vec![root] });
        client.clock.set(about["signed_at"].as_str().unwrap().parse().unwrap());
        let source = proto::fetch::Source::parse(&format!("file://{}", dir.display()), &client.options).unwrap();
        let mut follower = Follower::new(vec![source]);
        assert_eq!(client.look(&mut follower, &client.device()).await, Outcome::News);
        let replica = Replica::open(&client.home.path().join("store.db"), &client.limits).unwrap();
        Museum { client, follower, replica }
    }

    /// Fetches packs by their versions and applies them as of an epoch.
    async fn apply(&mut self, epoch: u64, versions: &[u64]) -> Result<Version, ApplyError> {
        let list = lock(&self.client.device()).manifest().cloned().unwrap();
        let stream = "catalog".parse().unwrap();
        let (instance, entry) = (list.instance(&stream).unwrap(), &list.streams[&stream]);
        let packs: Vec<_> =
            versions.iter().map(|v| entry.packs.iter().find(|p| p.version.get() == *v).unwrap()).collect();
        let mut parts = Vec::new();
        for pack in &packs {
            let name = pack.name(&instance);
            let part = self.client.part(&name);
            self.follower.fetch_pack(&name, pack, &part, &Default::default(), &|_| false).await.unwrap();
            parts.push(part);
        }
        let packs: Vec<PackFile<'_>> =
            packs.into_iter().zip(&parts).map(|(entry, path)| PackFile { path, entry }).collect();
        self.replica.apply(&Job {
            instance: &instance,
            epoch,
            packs: &packs,
            now: t0(),
            prove: false,
            listed: None,
        })?;
        Ok(self.held().0)
    }

    fn held(&self) -> (Version, u64) {
        let held = self.replica.held(&"catalog".parse().unwrap()).unwrap().unwrap();
        (held.version, held.epoch)
    }
}

#[tokio::test]
async fn a_bucket_of_an_older_release_is_read_to_its_newest_version() {
    let mut museum = Museum::visited().await;
    assert_eq!(museum.apply(1, &[1, 2, 3]).await.unwrap().get(), 3);
    assert!(museum.replica.verify(&"catalog".parse().unwrap()).unwrap().iter().all(|t| t.is_right()));
}

#[tokio::test]
async fn a_delta_that_was_passed_is_not_applied_again() {
    let mut museum = Museum::visited().await;
    museum.apply(1, &[1, 2, 3]).await.unwrap();
    for back in [&[2][..], &[3], &[2, 3]] {
        let refused = museum.apply(1, back).await.unwrap_err();
        assert_eq!(refused.code(), "WRONG_BASE", "{refused}");
        assert_eq!(museum.held().0.get(), 3, "{back:?}");
    }
}

/// Versions of another epoch count for nothing: lower ones are the way forward then, from a full.
#[tokio::test]
async fn a_new_epoch_begins_with_a_full_of_whatever_version() {
    let mut museum = Museum::visited().await;
    museum.apply(1, &[1, 2, 3]).await.unwrap();
    let refused = museum.apply(2, &[2]).await.unwrap_err();
    assert_eq!(refused.code(), "WRONG_BASE", "{refused}");
    let held = museum.replica.held(&"catalog".parse().unwrap()).unwrap().unwrap();
    assert_eq!(held.version_of(&"catalog@all".parse().unwrap(), 2), None);
    assert_eq!(museum.apply(2, &[1]).await.unwrap().get(), 1);
    assert_eq!(museum.held().1, 2);
    assert_eq!(museum.apply(2, &[2, 3]).await.unwrap().get(), 3);
}

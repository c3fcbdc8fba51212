//! What has an end: publishers' keys and lists. Trust files and packs have none.

use super::*;
use proto::clock::{after, before};
use proto::follow::lock;

#[tokio::test]
async fn a_trust_file_whose_publishers_have_ended_is_walked_and_their_lists_are_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.put_trust(|_| ());
    repo.put_list(|_| ());
    client.takes("second", &repo).await;
    for end in [before(t0(), DAY), t0()] {
        repo.put_trust(|t| t.publishers[0].expires_at = end);
        repo.put_list(|_| ());
        let kept = (repo.trust.version, Some(repo.list.serial - 1));
        assert_eq!(client.refresh(&repo).await, list_refused("KEY_EXPIRED"), "{end}");
        assert_eq!(client.kept(), kept, "{end}");
        repo.put_trust(|t| t.publishers = vec![publisher(11)]);
        client.takes("a longer life", &repo).await;
    }
}

#[tokio::test]
async fn a_new_list_that_has_ended_is_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    for (case, end) in [("five days ago", before(t0(), 5 * DAY)), ("now", t0())] {
        repo.put_list(|m| m.expires_at = end);
        let kept = (1, Some(repo.list.serial - 1));
        client.refuses(case, &mut repo, list_refused("EXPIRED"), kept).await;
    }
}

/// A list is one file: what would be an expired snapshot or targets file is the list's own end. What it named may be
/// fetched after that, and it is not refused when it is met again.
#[tokio::test]
async fn what_was_accepted_is_finished_after_its_end() {
    let mut repo = Repo::new();
    let name = repo.add_pack("price@zone-east", None, 1, b"rows");
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("the list", &repo).await;
    client.clock.advance(31 * DAY);
    assert_eq!(client.refresh(&repo).await, Outcome::Same);
    assert_eq!(client.download(&repo, &name).await.unwrap(), b"rows");
    // One that never had it does not begin with it.
    let new = Client::of(&repo);
    new.clock.advance(31 * DAY);
    assert_eq!(new.refresh(&repo).await, list_refused("EXPIRED"));
    assert_eq!(new.kept(), (1, None));
    repo.now = after(t0(), 31 * DAY);
    repo.put_list(|_| ());
    client.takes("a later one", &repo).await;
    new.takes("a later one", &repo).await;
}

#[tokio::test]
async fn a_device_whose_publisher_has_ended_walks_on_to_the_next() {
    let mut repo = Repo::new();
    repo.put_trust(|t| t.publishers[0].expires_at = after(t0(), 7 * DAY));
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    client.clock.advance(18 * DAY);
    repo.now = after(t0(), 18 * DAY);
    repo.put_list(|_| ());
    assert_eq!(client.refresh(&repo).await, list_refused("KEY_EXPIRED"), "its key has ended");
    assert_eq!(client.kept(), (2, Some(2)));
    repo.rotate(12);
    client.takes("by a new key", &repo).await;
}

#[tokio::test]
async fn a_device_whose_list_has_ended_takes_the_next() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    repo.put_list(|m| m.expires_at = after(t0(), 7 * DAY));
    client.takes("for a week", &repo).await;
    client.clock.advance(18 * DAY);
    // It is kept as it is: at a start nothing is forgotten.
    assert_eq!(client.kept(), (1, Some(2)));
    repo.put_list(|m| m.expires_at = after(t0(), 21 * DAY));
    client.takes("for three", &repo).await;
    assert!(lock(&client.device()).manifest().unwrap().expires_at > after(t0(), 18 * DAY));
}

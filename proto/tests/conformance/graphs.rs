//! TUF delegates: roles name roles, and a client walks that graph for a file. Nothing is delegated here: one publisher
//! signs a store's whole list. What a client walks is the graph of packs, from the version it holds to the newest.

use super::repo::entry;
use super::*;
use proto::chain;
use proto::fetch::FetchErrorKind;
use proto::follow::lock;
use proto::ids::{Instance, Version};
use proto::manifest::{PackEntry, StreamEntry};
use std::collections::BTreeMap;

/// A pack: the version it starts from, the one it leads to, its bytes.
type Pack = (Option<u64>, u64, u64);

/// A case: what is listed, the version held, what is fetched.
type Way<'a> = (&'a str, &'a [Pack], Option<u64>, &'a [&'a str]);

const FULL: Option<u64> = None;
const fn from(base: u64) -> Option<u64> {
    Some(base)
}

/// A list with these packs of prices, the newest version as told.
fn put_graph(repo: &mut Repo, packs: &[Pack], version: u64) {
    let packs =
        packs.iter().map(|(base, to, bytes)| PackEntry { bytes: *bytes, ..entry(*base, *to, b"rows") }).collect();
    let audience = "zone-east".parse().unwrap();
    let version = Version::try_from(version).unwrap();
    let stream =
        StreamEntry { audience, version, schema: 1, digests: BTreeMap::new(), packs, requires: BTreeMap::new() };
    repo.list.streams.insert("price".parse().unwrap(), stream);
    repo.put_list(|_| ());
}

/// The packs that a client with a version fetches, in order, of the list that it has kept.
async fn walk(repo: &Repo, client: &Client, held: Option<u64>) -> Vec<String> {
    let list = lock(&client.device()).manifest().cloned().unwrap();
    let (instance, stream) = list.instances().next().unwrap();
    let held = held.map(|v| Version::try_from(v).unwrap());
    repo.server.asked();
    for pack in chain::cheapest(&stream.packs, held, stream.version, |_| true).into_iter().flatten() {
        // Nothing is there: that it was asked for is enough.
        assert_eq!(client.download(repo, &pack.name(&instance)).await, Err(FetchErrorKind::NotFound));
    }
    repo.server.asked_packs()
}

#[tokio::test]
async fn packs_are_fetched_in_the_order_of_the_cheapest_way() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    let ways: &[Way<'_>] = &[
        ("one full", &[(FULL, 1, 9)], None, &["1.full.pack"]),
        ("a full and a delta", &[(FULL, 1, 9), (from(1), 2, 1)], None, &["1.full.pack", "2.delta.pack"]),
        (
            "three levels",
            &[(FULL, 1, 9), (from(1), 2, 1), (from(2), 3, 1)],
            None,
            &["1.full.pack", "2.delta.pack", "3.delta.pack"],
        ),
        ("from where one is", &[(FULL, 1, 9), (from(1), 2, 1), (from(2), 3, 1)], Some(2), &["3.delta.pack"]),
        ("nothing to do", &[(FULL, 1, 9), (from(1), 2, 1)], Some(2), &[]),
        (
            "a full that is dearer",
            &[(FULL, 1, 9), (from(1), 2, 1), (FULL, 3, 9), (from(2), 3, 1)],
            Some(1),
            &["2.delta.pack", "3.delta.pack"],
        ),
        (
            "a full that is cheaper",
            &[(FULL, 1, 9), (from(1), 2, 9), (FULL, 3, 9), (from(2), 3, 9)],
            Some(1),
            &["3.full.pack"],
        ),
        (
            "two ways, the short one cheaper",
            &[(FULL, 1, 9), (from(1), 2, 5), (from(1), 3, 6)],
            None,
            &["1.full.pack", "3.delta.pack"],
        ),
        ("an end that leads nowhere", &[(FULL, 1, 9), (from(1), 2, 1), (from(1), 3, 1)], Some(1), &["3.delta.pack"]),
        (
            "a delta of a base that nobody has",
            &[(FULL, 1, 9), (from(1), 3, 9), (FULL, 4, 9), (from(2), 4, 1)],
            Some(1),
            &["4.full.pack"],
        ),
        (
            "a version that is in no list any more",
            &[(FULL, 5, 9), (from(5), 6, 1)],
            Some(2),
            &["5.full.pack", "6.delta.pack"],
        ),
        ("a version beyond the list", &[(FULL, 1, 9), (from(1), 2, 1)], Some(7), &[]),
    ];
    for (case, packs, held, expected) in ways {
        put_graph(&mut repo, packs, packs.last().unwrap().1);
        client.takes(case, &repo).await;
        assert_eq!(walk(&repo, &client, *held).await, *expected, "{case}");
    }
}

#[tokio::test]
async fn a_graph_that_is_none_is_left_unread_and_stops_no_other_stream() {
    let mut repo = Repo::new();
    let other = repo.add_pack("promo@all", None, 1, b"rows");
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    let graphs: &[(&str, &[Pack], u64)] = &[
        ("no packs", &[], 1),
        ("a ring", &[(from(2), 1, 1), (from(1), 2, 1)], 2),
        ("a delta of itself beside a good way", &[(FULL, 1, 9), (FULL, 2, 9), (from(2), 2, 1)], 2),
        ("a delta that leads back", &[(FULL, 1, 9), (FULL, 2, 9), (from(3), 2, 1), (FULL, 3, 9)], 3),
        ("no full to begin with", &[(from(1), 2, 1)], 2),
        ("no way to the newest", &[(FULL, 1, 9), (from(2), 3, 1)], 3),
        ("a pack beyond the newest", &[(FULL, 1, 9), (from(1), 2, 1)], 1),
        ("one twice", &[(FULL, 1, 9), (FULL, 1, 9)], 1),
        ("two ways of one name", &[(FULL, 1, 9), (from(1), 2, 1), (from(1), 3, 1), (from(2), 3, 1)], 3),
        ("out of order", &[(FULL, 1, 9), (from(2), 3, 1), (from(1), 2, 1)], 3),
        ("more than a pack may have", &[(FULL, 1, u64::MAX)], 1),
    ];
    for (case, packs, version) in graphs {
        put_graph(&mut repo, packs, *version);
        client.takes(case, &repo).await;
        assert_eq!(client.unread(), ["price"], "{case}");
        assert_eq!(client.download(&repo, &other).await.unwrap(), b"rows", "{case}");
        repo.list.streams.remove("price");
        repo.put_list(|_| ());
        client.takes(case, &repo).await;
        assert_eq!(client.unread(), [""; 0], "{case}");
    }
}

/// Which of the packs in the bucket is whose: by the stream and audience in the list, letter by letter.
#[tokio::test]
async fn a_pack_is_looked_for_under_the_listed_stream_and_audience_alone() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    for (n, instance) in ["price@all", "price@zone-east", "price@zone-east_2", "price@store-0421", "prices@zone-east"]
        .into_iter()
        .enumerate()
    {
        repo.list.streams.clear();
        repo.add_pack(instance, None, 1, format!("rows {n}").as_bytes());
    }
    for (n, instance) in
        ["price@all", "price@zone-east", "price@zone-east_2", "price@store-0421"].into_iter().enumerate()
    {
        let instance: Instance = instance.parse().unwrap();
        repo.list.streams.clear();
        let name = repo.add_pack(&instance.to_string(), None, 1, format!("rows {n}").as_bytes());
        repo.put_list(|_| ());
        client.takes("the next audience", &repo).await;
        repo.server.asked();
        assert_eq!(client.download(&repo, &name).await.unwrap(), format!("rows {n}").into_bytes());
        assert_eq!(repo.server.asked(), [format!("packs/{instance}/0000000001.full.pack")]);
    }
    // What lies there and stands in no list is nobody's.
    let list = lock(&client.device()).manifest().cloned().unwrap();
    assert!(list.instance(&"prices".parse().unwrap()).is_none());
}

/// What was proved under one list is proved again under the next.
#[tokio::test]
async fn a_pack_that_was_good_by_one_list_is_judged_anew_by_the_next() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    let name = repo.add_pack("price@zone-east", None, 1, b"by the one");
    repo.put_list(|_| ());
    client.takes("the one", &repo).await;
    assert_eq!(client.download(&repo, &name).await.unwrap(), b"by the one");
    let streams = repo.list.streams.clone();
    repo.put_list(|m| {
        let pack = &mut m.streams.get_mut(&name.instance.stream).unwrap().packs[0];
        *pack = entry(None, 1, b"by another");
    });
    client.takes("another", &repo).await;
    assert_eq!(client.download(&repo, &name).await, Err(FetchErrorKind::WrongHash));
    assert!(!client.part(&name).exists());
    repo.list.streams = streams;
    client.recovers("as it was", &mut repo).await;
    assert_eq!(client.download(&repo, &name).await.unwrap(), b"by the one");
}

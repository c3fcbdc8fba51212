//! Each test runs on SQLite and on PostgreSQL.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use futures_util::FutureExt;
use proto::clock::{Timestamp, after};
use proto::digest::Sha256;
use proto::ids::{DeviceId, Instance, StoreId, Version};
use proto::keys::SecretKey;
use proto::layout::{PackKind, PackName};
use proto::manifest::PackEntry;
use proto::wire::{Fault, fault};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tillcast_tests::Postgres;

mod fleet;
mod lists;
mod mails;

static POSTGRES: LazyLock<Postgres> = LazyLock::new(Postgres::start);

/// A ledger in a PostgreSQL database of its own.
async fn on_postgres() -> Ledger {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let url = POSTGRES.create_database(&format!("ledger{}", MADE.fetch_add(1, Ordering::Relaxed)));
    Ledger::open_url(&url).await.unwrap()
}

fn database(l: &Ledger) -> &str {
    l.url().rsplit('/').next().unwrap()
}

/// Each takes room.
async fn drop_database(l: Ledger) {
    l.close().await;
    POSTGRES.command("src", &format!("DROP DATABASE {} WITH (FORCE)", database(&l)));
}

#[test]
fn what_was_read_is_kept_as_long_as_its_numbers_say() {
    let kept = super::db::Kept::<[u8]>::default();
    assert!(kept.as_of(&[]).is_none());
    kept.keep(vec![1, 2], [7].into());
    let shared = kept.clone();
    assert_eq!(shared.as_of(&[1, 2]).as_deref(), Some(&[7][..]), "clones share it");
    assert!(shared.as_of(&[1, 3]).is_none() && kept.as_of(&[]).is_none());
}

/// What would count connections beside those who take and give them is not started.
#[test]
fn no_task_counts_the_idle_connections() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let options = db::pool_options(kind, 1000);
        assert_eq!(
            (options.get_idle_timeout(), options.get_max_lifetime(), options.get_min_connections()),
            (None, None, 0)
        );
    }
}

async fn on_each_database(test: impl AsyncFn(Ledger)) {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", dir.path().join("with space/fleet.db").display());
    test(Ledger::open_url(&url).await.unwrap()).await;
    // What was written is there for the next process.
    Ledger::open_url(&url).await.unwrap().change().await.unwrap();
    let l = on_postgres().await;
    test(l.clone()).await;
    drop_database(l).await;
}

fn t(s: i64) -> Timestamp {
    after("2026-01-01T00:00:00Z".parse().unwrap(), Duration::from_secs(u64::try_from(s).unwrap()))
}
fn price() -> Instance {
    "price@zone-east".parse().unwrap()
}
fn store(id: &str) -> StoreSeen {
    StoreSeen { id: id.parse().unwrap(), zone: Some("east".parse().unwrap()), region: None }
}
fn v(n: u64) -> Version {
    Version::try_from(n).unwrap()
}
fn pack(version: u64, kind: PackKind) -> PackEntry {
    let base = (kind == PackKind::Delta).then(|| v(version - 1));
    PackEntry { version: v(version), kind, base, bytes: 10, unpacked: 20, sha256: Sha256::of(&version.to_be_bytes()) }
}
const TTL: Duration = Duration::from_secs(60);

async fn lease(l: &Ledger, now: Timestamp) -> Token {
    match l.acquire("test", now, TTL).await.unwrap() {
        Acquired::Lease(t) => t,
        held => panic!("{held:?}"),
    }
}

fn of(staged: &[Staged]) -> News<'_> {
    News { staged, ..News::default() }
}

async fn pack_one(l: &Ledger, token: Token, version: u64, kinds: &[PackKind]) -> Result<Staged, LedgerError> {
    pack_of(l, token, price(), version, kinds).await
}

async fn pack_of(
    l: &Ledger,
    token: Token,
    instance: Instance,
    version: u64,
    kinds: &[PackKind],
) -> Result<Staged, LedgerError> {
    let version = v(version);
    let sha = Sha256::of(b"ddl");
    let (schema, _) = l.schema_number(&instance.stream, &sha).await?;
    let reserve = Reserve {
        instance: &instance,
        version,
        epoch: 1,
        schema,
        schema_sha256: &sha,
        ddl: "ddl",
        plan: "first",
        now: t(0),
    };
    l.reserve(token, &reserve).await?;
    let packs: Vec<PackEntry> = kinds.iter().map(|k| pack(version.get(), *k)).collect();
    l.packed(token, &instance, version, &packs, &BTreeMap::new()).await?;
    Ok(Staged { instance, version, requires: BTreeSet::new() })
}

/// A maker that signs each store once a head is there.
fn maker(s: &SignStore<'_>) -> Result<Made, String> {
    let content = Sha256::of(format!("{:?}{:?}", s.heads, s.devices).as_bytes());
    if s.row.content == Some(content) {
        return Ok(Made::Unchanged);
    }
    Ok(Made::New(NewManifest {
        serial: s.row.next_serial,
        epoch: 1,
        envelope: format!("{{\"serial\":{}}}", s.row.next_serial),
        signer: "k".into(),
        content,
        signed_at: t(1),
        expires_at: t(100),
    }))
}

#[tokio::test]
async fn one_publisher_at_a_time_and_a_late_one_writes_nothing() {
    on_each_database(async |l| {
        assert_eq!(l.held_since().await.unwrap(), None);
        let first = lease(&l, t(0)).await;
        assert_eq!(
            l.acquire("other", t(59), TTL).await.unwrap(),
            Acquired::HeldBy { holder: "test".into(), until: t(60) }
        );
        assert!(l.renew(first, t(50), TTL).await.unwrap());
        assert_eq!(l.held_since().await.unwrap(), Some(t(0)));
        assert!(matches!(l.acquire("other", t(109), TTL).await.unwrap(), Acquired::HeldBy { .. }));
        let Acquired::Lease(second) = l.acquire("other", t(110), TTL).await.unwrap() else { panic!() };
        assert!(second > first);
        assert_eq!(l.held_since().await.unwrap(), Some(t(110)));
        assert!(!l.renew(first, t(111), TTL).await.unwrap());
        assert!(!l.holds(first).await.unwrap() && l.holds(second).await.unwrap());
        assert!(matches!(pack_one(&l, first, 1, &[PackKind::Full]).await, Err(LedgerError::LeaseLost)));
        assert_eq!(l.max_version(&price()).await.unwrap(), None);
        l.release(first).await.unwrap();
        assert!(l.holds(second).await.unwrap(), "a lost lease gives nothing back");
        l.release(second).await.unwrap();
        assert!(lease(&l, t(112)).await > second);
        // A holder whose clock was years ahead does not lock everybody out.
        let ahead = lease(&l, t(1_000_000)).await;
        assert!(lease(&l, t(200)).await > ahead);
        // One that is known to be dead is not waited for.
        l.expire("other").await.unwrap();
        assert!(matches!(l.acquire("next", t(201), TTL).await.unwrap(), Acquired::HeldBy { .. }));
        l.expire("test").await.unwrap();
        assert!(matches!(l.acquire("next", t(201), TTL).await.unwrap(), Acquired::Lease(_)));
        // One as long as settings may want it is none of a clock that ran ahead.
        let hours = Duration::from_secs(2 * 3600);
        assert!(matches!(l.acquire("long", t(300), hours).await.unwrap(), Acquired::Lease(_)));
        assert!(matches!(l.acquire("other", t(301), hours).await.unwrap(), Acquired::HeldBy { .. }));
    })
    .await;
}

#[tokio::test]
async fn a_turn_is_one_process_until_it_falls_silent() {
    on_each_database(async |l| {
        let turn = async |who: &str, s: i64| l.take_turn("judge", who, t(s), TTL).await.unwrap();
        assert!(turn("a", 0).await && !turn("b", 59).await && turn("a", 59).await);
        assert!(!turn("b", 118).await && turn("b", 119).await && !turn("a", 120).await);
        assert!(turn("b", 1_000_000).await && turn("a", 200).await, "its clock was far ahead");
        lease(&l, t(0)).await;
    })
    .await;
}

#[tokio::test]
async fn what_serve_watched_counts_from_the_last_publish_on() {
    on_each_database(async |l| {
        let watched = async |s: u64| l.watched(Duration::from_secs(s)).await.unwrap().map(|d| d.as_secs());
        assert_eq!(watched(9).await, None, "none went through yet");
        l.went_through().await.unwrap();
        assert_eq!([watched(60).await, watched(0).await, watched(5).await], [Some(60), Some(60), Some(65)]);
        l.went_through().await.unwrap();
        assert_eq!(watched(1).await, Some(1));
    })
    .await;
}

#[tokio::test]
async fn numbers_are_used_once_and_only_signed_ones_are_heads() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        l.see_stores(&[store("1"), store("2")], t(0)).await.unwrap();
        pack_one(&l, token, 1, &[PackKind::Full]).await.unwrap();
        // A crash before the commit point: the number is burnt.
        assert_eq!(l.heads().await.unwrap(), BTreeMap::new());
        let left = l.publications(State::Packed).await.unwrap();
        assert_eq!((left.len(), left[0].version, left[0].packs.len()), (1, v(1), 1));
        l.abandon(token, &price(), v(1)).await.unwrap();
        let burnt = |kind| PackName { instance: price(), version: v(1), kind };
        assert_eq!(l.packs_to_delete().await.unwrap(), [PackKind::Delta, PackKind::Full].map(burnt));
        l.pack_deleted(&burnt(PackKind::Delta)).await.unwrap();
        assert_eq!(l.packs_to_delete().await.unwrap(), [burnt(PackKind::Full)]);
        assert_eq!(l.max_version(&price()).await.unwrap(), Some(v(1)));
        assert!(matches!(pack_one(&l, token, 1, &[PackKind::Full]).await, Err(LedgerError::VersionTaken { .. })));

        let staged = pack_one(&l, token, 2, &[PackKind::Full]).await.unwrap();
        let signed =
            l.sign(Some(token), of(std::slice::from_ref(&staged)), Which::All, 9, t(5), &mut maker).await.unwrap();
        assert_eq!(signed.len(), 2);
        let head = l.head(&price()).await.unwrap().unwrap();
        assert_eq!((head.version, head.packs.len(), head.signed_at), (v(2), 1, t(5)));
        assert_eq!(l.latest_time().await.unwrap(), Some(t(5)));
        // A crash after it: known as unfinished, its manifests are to be put.
        assert_eq!(l.publications(State::Signed).await.unwrap().len(), 1);
        let to_put = l.manifests_to_put(None, 1).await.unwrap();
        assert_eq!((to_put[0].store.as_str(), to_put[0].serial), ("1", 1));
        assert_eq!(l.manifests_to_put(Some(&to_put[0].store), 9).await.unwrap().len(), 1);
        l.done(token, &price(), v(2)).await.unwrap();
        assert!(l.publications(State::Signed).await.unwrap().is_empty());
        for (version, state) in [(1, State::Abandoned), (2, State::Done)] {
            assert_eq!(l.publication(&price(), v(version)).await.unwrap().unwrap().state, state);
        }
        assert_eq!(l.packs_to_delete().await.unwrap().len(), 1);
        assert!(matches!(l.abandon(token, &price(), v(2)).await, Err(LedgerError::NotInState { .. })));
        assert!(l.sign(None, of(&[staged]), Which::All, 9, t(6), &mut maker).await.is_err(), "staged without a lease");
    })
    .await;
}

/// What was newest when it was signed, of whom its own stores follow; what is staged beside it is newer than a head.
#[tokio::test]
async fn a_head_requires_what_was_newest_beside_it() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        l.see_stores(&[store("1")], t(0)).await.unwrap();
        let sign = async |staged: &[Staged], s| {
            l.sign(Some(token), of(staged), Which::All, 9, t(s), &mut maker).await.unwrap();
        };
        let full = async |instance: &str, version| {
            pack_of(&l, token, instance.parse().unwrap(), version, &[PackKind::Full]).await.unwrap()
        };
        let names = ["catalog@all", "catalog@zone-east", "catalog@zone-west", "catalog@store-1", "prize@all"];
        for (n, name) in (1..).zip(names) {
            sign(&[full(name, n).await], 1).await;
        }
        let unwanted = ["catalog@store-1".parse().unwrap()];
        let news = News { unwanted: &unwanted, ..News::default() };
        l.sign(Some(token), news, Which::All, 9, t(2), &mut maker).await.unwrap();
        let requires = BTreeSet::from(["catalog".parse().unwrap()]);
        let price_1 = Staged { requires: requires.clone(), ..full("price@zone-east", 1).await };
        sign(&[price_1, full("catalog@all", 9).await], 3).await;
        let head = l.head(&price()).await.unwrap().unwrap();
        let wanted = [("catalog@all", 9), ("catalog@zone-east", 2)].map(|(i, n)| (i.parse().unwrap(), v(n)));
        assert_eq!(head.requires, BTreeMap::from(wanted));
        sign(&[full("price@zone-east", 2).await], 4).await;
        assert!(l.head(&price()).await.unwrap().unwrap().requires.is_empty());
        sign(&[Staged { requires, ..full("price@zone-east", 3).await }], 5).await;
        assert_eq!(l.head(&price()).await.unwrap().unwrap().requires, head.requires, "alone too");
    })
    .await;
}

#[tokio::test]
async fn a_maker_that_fails_leaves_everything_as_it_was() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        l.see_stores(&[store("1"), store("2")], t(0)).await.unwrap();
        let staged = pack_one(&l, token, 1, &[PackKind::Full]).await.unwrap();
        let mut fails = |s: &SignStore<'_>| if s.row.seen.id.as_str() == "2" { Err("no".into()) } else { maker(s) };
        let failed = l.sign(Some(token), of(std::slice::from_ref(&staged)), Which::All, 9, t(5), &mut fails).await;
        assert!(matches!(failed, Err(LedgerError::Manifest { .. })));
        assert!(l.heads().await.unwrap().is_empty());
        assert!(l.manifests_to_put(None, 9).await.unwrap().is_empty());
        assert_eq!(l.publications(State::Packed).await.unwrap().len(), 1);
        // Nor is a head retired that lists still name.
        l.sign(Some(token), of(&[staged]), Which::All, 9, t(6), &mut maker).await.unwrap();
        let (gone, is_retired) = ([price()], async || l.head(&price()).await.unwrap().unwrap().retired);
        let news = News { unwanted: &gone, ..News::default() };
        assert!(matches!(l.sign(None, news, Which::All, 9, t(7), &mut maker).await, Err(LedgerError::LeaseLost)));
        l.sign(Some(token), news, Which::All, 9, t(7), &mut |_| Err("no".into())).await.unwrap_err();
        assert!(!is_retired().await);
        l.sign(Some(token), news, Which::All, 9, t(7), &mut maker).await.unwrap();
        assert!(is_retired().await);
    })
    .await;
}

#[tokio::test]
async fn waking_follows_puts_of_changed_manifests_only() {
    on_each_database(async |l| {
        let id: StoreId = "1".parse().unwrap();
        l.see_stores(&[store("1")], t(0)).await.unwrap();
        assert_eq!(l.serials().await.unwrap()[&id].wake, 0);
        let before = l.change().await.unwrap();
        let put = |serial| WasPut { store: id.clone(), serial, etag: Some(format!("e{serial}")) };
        l.sign(None, News::default(), Which::Only(&id), 9, t(1), &mut maker).await.unwrap();
        assert_eq!(l.change().await.unwrap(), before, "signed, not put: nothing to fetch yet");
        assert_eq!(l.serials().await.unwrap()[&id].wake, 0);
        assert!(l.manifests_put(&[put(1)]).await.unwrap().is_empty());
        assert!(l.change().await.unwrap() > before);
        assert_eq!(l.serials().await.unwrap()[&id].wake, 1);
        // Signed anew, same content: put, but nobody is woken.
        let mut again = |s: &SignStore<'_>| {
            let Made::New(m) = maker(&SignStore { row: &StoreRow { content: None, ..s.row.clone() }, ..*s })? else {
                return Ok(Made::Unchanged);
            };
            Ok(Made::New(m))
        };
        l.sign(None, News::default(), Which::Only(&id), 9, t(2), &mut again).await.unwrap();
        let row = l.store(&id).await.unwrap().unwrap();
        assert_eq!((row.serial, row.content_serial, row.put_serial), (2, 1, 1));
        // A slow put of serial 1 that lands now lies over whatever is there: it must be put again.
        assert_eq!(l.manifests_put(&[put(1)]).await.unwrap(), std::slice::from_ref(&id));
        assert_eq!(l.manifests_to_put(None, 9).await.unwrap()[0].serial, 2);
        l.manifests_put(&[put(2)]).await.unwrap();
        assert_eq!(l.serials().await.unwrap()[&id].wake, 1);
        assert_eq!(l.manifest(&id).await.unwrap().unwrap().etag.as_deref(), Some("e2"));
        // Who waits for a put hears of it: by a notification where there is one.
        let (mut listener, mut heard) = (None, false);
        for _ in 0..100 {
            let put = [put(2)];
            let short = Duration::from_millis(200);
            let before = l.change().await.unwrap();
            let wait = tokio::time::timeout(Duration::from_secs(5), l.await_change(&mut listener, short));
            let (ended, _) = tokio::join!(wait, async {
                tokio::time::sleep(short / 2).await;
                l.manifests_put(&put).await.unwrap()
            });
            heard = ended.is_ok() && l.change().await.unwrap() > before;
            if heard {
                break;
            }
        }
        assert!(heard);
        // A serial seen elsewhere is passed.
        let list = FoundList {
            store: id.clone(),
            serial: 40,
            epoch: 1,
            envelope: "{}".into(),
            zone: None,
            signed_at: t(0),
            expires_at: t(1),
        };
        let seen = TakenOver { lists: vec![list], devices: Vec::new() };
        l.adopt(None, &seen, &[], t(1)).await.unwrap();
        assert_eq!(l.store(&id).await.unwrap().unwrap().next_serial, 41);
        l.overtaken(&id, 50).await.unwrap();
        let row = l.store(&id).await.unwrap().unwrap();
        assert_eq!((row.next_serial, row.content), (51, None));
    })
    .await;
}

#[tokio::test]
async fn stores_that_vanish_are_told_once_and_come_back() {
    on_each_database(async |l| {
        assert!(l.see_stores(&[store("1"), store("2")], t(0)).await.unwrap().is_empty());
        assert_eq!(l.see_stores(&[store("1")], t(1)).await.unwrap(), ["2".parse().unwrap()]);
        assert!(l.see_stores(&[store("1")], t(2)).await.unwrap().is_empty());
        assert_eq!(l.store(&"2".parse().unwrap()).await.unwrap().unwrap().vanished_at, Some(t(1)));
        let west = StoreSeen { zone: None, region: Some("W".into()), ..store("2") };
        // As another one, as it was before it went, and while it is there.
        for (s, two) in [(3, Some(&west)), (4, None), (5, Some(&west)), (6, Some(&store("2")))] {
            l.see_stores(&[[store("1")].as_slice(), two.map_or(&[], std::slice::from_ref)].concat(), t(s))
                .await
                .unwrap();
            let row = l.store(&"2".parse().unwrap()).await.unwrap().unwrap();
            let expected = two.map_or((&west, Some(t(4))), |two| (two, None));
            assert_eq!((&row.seen, row.vanished_at), expected);
        }
        l.add_store(&store("3")).await.unwrap();
        assert_eq!(l.stores().await.unwrap().len(), 3);
    })
    .await;
}

#[tokio::test]
async fn manifests_list_two_fulls_and_what_follows_and_retention_knows_the_rest() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        use PackKind::{Delta, Full};
        for (n, kinds) in [&[Full][..], &[Delta], &[Full, Delta], &[Delta], &[Full, Delta], &[Delta]].iter().enumerate()
        {
            let n = n as u64 + 1;
            let staged = pack_one(&l, token, n, kinds).await.unwrap();
            l.sign(Some(token), of(&[staged]), Which::All, 9, t(i64::try_from(n).unwrap()), &mut maker).await.unwrap();
        }
        let head = l.head(&price()).await.unwrap().unwrap();
        let names = |packs: &[PackEntry]| packs.iter().map(|p| format!("{}{}", p.version, p.kind)).collect::<Vec<_>>();
        assert_eq!(names(&head.packs), ["3full", "3delta", "4delta", "5full", "5delta", "6delta"]);
        assert_eq!(names(&head.deltas_since_full().cloned().collect::<Vec<_>>()), ["6delta"]);
        assert_eq!(head.last_full().unwrap().version, v(5));
        let published = l.published(&price()).await.unwrap();
        assert_eq!(published.len(), 8);
        let dropped: Vec<_> =
            published.iter().filter(|p| p.dropped_at == Some(t(5))).map(|p| p.entry.clone()).collect();
        assert_eq!(names(&dropped), ["1full", "2delta"], "dropped when the second full after them was signed");
        assert_eq!(published.iter().filter(|p| p.dropped_at.is_some()).count(), 2);
        l.forget_pack(token, &PackName { instance: price(), version: v(1), kind: Full }).await.unwrap();
        assert_eq!(l.published(&price()).await.unwrap().len(), 7);
        assert_eq!(l.head(&price()).await.unwrap().unwrap(), head);
    })
    .await;
}

/// A row a version for ever would be read by each publish. What a device may hold, or a pack is left of, stays; no number
/// comes again.
#[tokio::test]
async fn versions_that_were_replaced_long_ago_are_forgotten() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        use PackKind::{Delta, Full};
        for n in 1..=9 {
            let kinds: &[PackKind] = match n {
                1 => &[Full],
                5 | 7 => &[Full, Delta],
                _ => &[Delta],
            };
            let staged = pack_one(&l, token, n, kinds).await.unwrap();
            if [3, 9].contains(&n) {
                l.abandon(token, &price(), v(n)).await.unwrap();
                continue;
            }
            l.sign(Some(token), of(&[staged]), Which::All, 9, t(i64::try_from(n).unwrap()), &mut maker).await.unwrap();
            l.done(token, &price(), v(n)).await.unwrap();
        }
        let there = async || {
            let mut there = Vec::new();
            for n in 1..=9 {
                there.extend(l.publication(&price(), v(n)).await.unwrap().map(|p| p.version.get()));
            }
            there
        };
        let head = l.head(&price()).await.unwrap().unwrap();
        l.forget_replaced(token, &price(), t(100)).await.unwrap();
        assert_eq!(there().await, [1, 2, 4, 5, 6, 7, 8, 9], "their packs are there; 3 was given up");
        for (version, kind) in [(1, Full), (2, Delta), (4, Delta), (5, Full), (5, Delta)] {
            l.forget_pack(token, &PackName { instance: price(), version: v(version), kind }).await.unwrap();
        }
        let published = l.published(&price()).await.unwrap();
        assert_eq!(published.iter().map(|p| p.entry.version.get()).collect::<Vec<_>>(), [6, 7, 7, 8]);
        // Each is known until the time is over at which the next one was signed.
        for (before, left) in [
            (1, &[1, 2, 4, 5, 6, 7, 8, 9][..]),
            (5, &[4, 5, 6, 7, 8, 9]),
            (6, &[5, 6, 7, 8, 9]),
            (7, &[6, 7, 8, 9]),
            (1000, &[6, 7, 8, 9]),
        ] {
            l.forget_replaced(token, &price(), t(before)).await.unwrap();
            assert_eq!(there().await, left, "{before}");
            assert_eq!(l.published(&price()).await.unwrap(), published);
            assert_eq!(l.max_version(&price()).await.unwrap(), Some(v(9)));
        }
        assert_eq!(l.head(&price()).await.unwrap().unwrap(), head);
        assert!(matches!(pack_one(&l, token, 9, &[Full]).await, Err(LedgerError::VersionTaken { .. })));
        pack_one(&l, token, 10, &[Full]).await.unwrap();
        // Nor do all of an instance go that has no pack.
        for (version, kind) in [(6, Delta), (7, Full), (7, Delta), (8, Delta)] {
            l.forget_pack(token, &PackName { instance: price(), version: v(version), kind }).await.unwrap();
        }
        l.forget_replaced(token, &price(), t(1000)).await.unwrap();
        assert_eq!((there().await, l.max_version(&price()).await.unwrap()), (vec![8, 9], Some(v(10))));
        assert!(matches!(l.acquire("other", t(1000), TTL).await.unwrap(), Acquired::Lease(_)));
        let late = l.forget_replaced(token, &price(), t(1000)).await;
        assert!(matches!(late, Err(LedgerError::LeaseLost)));
    })
    .await;
}

#[tokio::test]
async fn contracts_are_numbered_by_change_and_never_rewritten() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        let stream = price().stream;
        let (a, b) = (Sha256::of(b"a"), Sha256::of(b"b"));
        let mut version = 0;
        for (sha, ddl, number, new) in [(a, "a", 1, true), (a, "a", 1, false), (b, "b", 2, true), (a, "a", 3, true)] {
            assert_eq!(l.schema_number(&stream, &sha).await.unwrap(), (number, new));
            version += 1;
            let instance = price();
            let r = Reserve {
                instance: &instance,
                version: v(version),
                epoch: 1,
                schema: number,
                schema_sha256: &sha,
                ddl,
                plan: "",
                now: t(0),
            };
            l.reserve(token, &r).await.unwrap();
            let twice = Reserve { version: v(version + 50), schema_sha256: &Sha256::of(b"z"), ..r };
            assert!(matches!(l.reserve(token, &twice).await, Err(LedgerError::Conflict(_))));
        }
        assert_eq!(l.schema_ddl(&stream, 2).await.unwrap().as_deref(), Some("b"));
        assert_eq!(l.schema_ddl(&stream, 9).await.unwrap(), None);
    })
    .await;
}

#[tokio::test]
async fn a_head_found_in_the_bucket_is_taken_over_once() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        let sha = Sha256::of(b"ddl");
        let head = Head {
            version: v(7),
            epoch: 2,
            schema: 4,
            digests: BTreeMap::new(),
            packs: vec![pack(6, PackKind::Full), pack(7, PackKind::Delta)],
            requires: BTreeMap::from([("catalog@all".parse().unwrap(), v(3))]),
            signed_at: t(1),
            retired: false,
        };
        let found = Adopted { instance: price(), head: head.clone(), contract_sha256: sha, ddl: "ddl".into() };
        let alone = l.adopt(None, &TakenOver::default(), std::slice::from_ref(&found), t(1)).await;
        assert!(matches!(alone, Err(LedgerError::LeaseLost)), "heads are the publisher's");
        l.adopt(None, &TakenOver::default(), &[], t(1)).await.unwrap();
        assert!(!l.is_set_back().await.unwrap());
        for _ in 0..2 {
            l.adopt(Some(token), &TakenOver::default(), std::slice::from_ref(&found), t(1)).await.unwrap();
        }
        assert_eq!(l.head(&price()).await.unwrap().as_ref(), Some(&head));
        assert_eq!(l.published(&price()).await.unwrap().len(), 2);
        for (version, newest) in [(6, 7), (7, 7), (8, 8), (7, 8)] {
            let head = Head { version: v(version), ..head.clone() };
            l.adopt(Some(token), &TakenOver::default(), &[Adopted { head, ..found.clone() }], t(2)).await.unwrap();
            assert_eq!(l.head(&price()).await.unwrap().unwrap().version, v(newest));
        }
        assert_eq!(l.max_version(&price()).await.unwrap(), Some(v(8)));
        assert_eq!(l.schema_number(&price().stream, &sha).await.unwrap(), (4, false));
        assert_eq!(l.instances().await.unwrap(), [price()]);
        assert!(l.is_set_back().await.unwrap());
    })
    .await;
}

/// PostgreSQL takes no NUL in a text; what of a device's words is written has none.
#[tokio::test]
async fn a_fault_in_lines_is_kept_and_a_refused_value_is_told_from_a_database_that_ails() {
    on_each_database(async |l| {
        let id: DeviceId = "1-01".parse().unwrap();
        l.see_stores(&[store("1")], t(0)).await.unwrap();
        let (code, text) = (fault::DRIFT.to_owned(), "a row\0differs".to_owned());
        let raw = Fault { code, instance: None, object: Some("store\0db".into()), text, since: t(1) };
        let beat = |seq, fault: &Fault| BeatRow {
            device: id.clone(),
            seq,
            envelope: "{}".into(),
            received_at: t(1),
            last_seen_at: t(1),
            serial: None,
            complaints: vec![fault.clone()],
            versions: Vec::new(),
            proved_at: None,
        };
        if l.kind() == Kind::Postgres {
            let e = l.record_beats(&[beat(1, &raw)]).await.unwrap_err();
            assert!(e.is_of_values(), "{e}");
        }
        l.record_beats(&[beat(1, &crate::fleet::in_lines(&raw))]).await.unwrap();
        assert_eq!(l.complaints().await.unwrap()[0].fault.text, "a row differs");
        let missing = sqlx::query("SELECT nothing").execute(l.pool()).await.unwrap_err();
        assert!(!LedgerError::from(missing).is_of_values() && !LedgerError::Halted.is_of_values());
    })
    .await;
}

#[tokio::test]
async fn a_trust_file_is_not_rewritten_and_a_later_ledger_is_refused() {
    on_each_database(async |l| {
        l.add_trust(1, "{}", t(0), false).await.unwrap();
        l.add_trust(1, "{}", t(1), false).await.unwrap();
        assert!(matches!(l.add_trust(1, "{ }", t(1), false).await, Err(LedgerError::Conflict(_))));
        l.trust_put(1).await.unwrap();
        assert_eq!(l.trust().await.unwrap(), [TrustRow { version: 1, envelope: "{}".into(), put: true }]);
        sqlx::query("INSERT INTO migration (number) VALUES (99)").execute(l.pool()).await.unwrap();
        assert!(matches!(Ledger::open_url(l.url()).await, Err(LedgerError::Unfit(_))));
        sqlx::query("DELETE FROM migration WHERE number = 99").execute(l.pool()).await.unwrap();
    })
    .await;
}

/// What every build before this one may have written, by the statements that it made its tables with.
#[tokio::test]
async fn a_ledger_of_any_earlier_build_is_brought_up_with_what_it_holds() {
    for known in 1..=db::MIGRATIONS.len() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fleet.db");
        let old = rusqlite::Connection::open(&file).unwrap();
        old.execute_batch("CREATE TABLE migration (number BIGINT PRIMARY KEY)").unwrap();
        for (i, sql) in db::MIGRATIONS[..known].iter().enumerate() {
            old.execute_batch(sql).unwrap();
            old.execute("INSERT INTO migration VALUES (?1)", [i64::try_from(i + 1).unwrap()]).unwrap();
        }
        old.execute_batch(
            "INSERT INTO head (instance, version, epoch, contract, digests, packs, signed_s) \
             VALUES ('price@zone-east', 7, 1, 1, '{}', '[]', 0); \
             INSERT INTO store (id, zone, serial, serial_floor) VALUES ('0421', 'east', 9, 4); \
             INSERT INTO device (id, store, public_key, enrolled_s) VALUES ('0421', '0421', 'k', 0); \
             INSERT INTO mail (n, id, subject, body, created_s, next_s) VALUES (1, 'a@hq', 's', 'b', 0, 0); \
             INSERT INTO lease VALUES ('publish', 'somebody', 3, 0 ADDED);"
                .replace(" ADDED", if known < 5 { "" } else { ", 0" })
                .as_str(),
        )
        .unwrap();
        drop(old);
        for turn in 0..2 {
            let l = Ledger::open_url(&format!("sqlite:{}", file.display())).await.unwrap();
            let heads = l.heads().await.unwrap();
            assert_eq!(heads[&price()].version, v(7), "{known}");
            assert_eq!(l.store(&"0421".parse().unwrap()).await.unwrap().unwrap().serial, 9, "{known}");
            assert_eq!(l.unsent_mails().await.unwrap().len(), 1, "{known}");
            lease(&l, t(turn * 100)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_writers_at_once_wait_for_each_other() {
    on_each_database(async |l| {
        let other = Ledger::open_url(l.url()).await.unwrap();
        let writers = (0..40).map(|i| {
            let ledger = if i % 2 == 0 { l.clone() } else { other.clone() };
            tokio::spawn(async move { ledger.set_fact(&format!("f{i}"), "x").await })
        });
        for w in writers.collect::<Vec<_>>() {
            w.await.unwrap().unwrap();
        }
        assert_eq!(l.fact("f39").await.unwrap().as_deref(), Some("x"));
    })
    .await;
}

/// Which commits leave behind, up to a limit: `serve` does it, and no post waits for it.
#[tokio::test]
async fn the_log_is_brought_home_beside_who_writes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fleet.db");
    let l = Ledger::open_with(&format!("sqlite:{}", file.display()), 16_384).await.unwrap();
    let bytes = || std::fs::metadata(&file).unwrap().len();
    let before = bytes();
    for n in 0..200 {
        l.set_fact(&format!("f{n}"), &"x".repeat(30_000)).await.unwrap();
        if n == 79 {
            l.checkpoint().await.unwrap();
            assert_eq!(bytes(), before, "a commit would leave 3 MB");
        }
    }
    assert_eq!(bytes(), before, "6 MB are in the log alone");
    let open = l.write().await.unwrap();
    l.checkpoint().await.unwrap();
    assert!(bytes() > before + (5 << 20), "{}", bytes());
    drop(open);
    l.set_fact("next", "x").await.unwrap();
    assert!(l.fact("f199").await.unwrap().is_some() && l.fact("next").await.unwrap().is_some());
    for n in 0..200 {
        l.set_fact(&format!("g{n}"), &"x".repeat(30_000)).await.unwrap();
    }
    super::db::halt_if_unsynced(&sqlx::Error::Database(Box::new(Unsynced("1034"))), &l.halted);
    let before = bytes();
    l.checkpoint().await.unwrap();
    assert_eq!(bytes(), before, "nothing after a failed sync");
}

#[tokio::test]
async fn every_connection_syncs_in_full() {
    let dir = tempfile::tempdir().unwrap();
    let settings = "[source]\nurl = \"inbox:i\"\n[objects]\nurls = [\"file:o\"]\n[state]\ndir = \"s\"\n";
    std::fs::write(dir.path().join("hq.toml"), settings).unwrap();
    let config = crate::config::load(Some(&dir.path().join("hq.toml")), []).unwrap().value;
    // `serve` brings the log home beside its commits.
    for (l, log_pages) in [
        (Ledger::open(&config).await.unwrap(), 1000),
        (Ledger::open_for_service(&config).await.unwrap(), (64 << 20) / 4096),
    ] {
        for (pragma, wanted) in [
            ("synchronous", 2),
            ("journal_size_limit", 64 << 20),
            ("wal_autocheckpoint", log_pages),
            ("trusted_schema", 0),
            ("cell_size_check", 1),
        ] {
            let row = sqlx::query(sqlx::AssertSqlSafe(format!("PRAGMA {pragma}"))).fetch_one(l.pool()).await.unwrap();
            assert_eq!(sqlx::Row::get::<i64, _>(&row, 0), wanted, "{pragma}");
        }
    }
}

/// What a commit answers when the disk fails its sync.
#[derive(Debug)]
struct Unsynced(&'static str);
impl std::fmt::Display for Unsynced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("disk I/O error")
    }
}
impl std::error::Error for Unsynced {}
impl sqlx::error::DatabaseError for Unsynced {
    fn message(&self) -> &str {
        "disk I/O error"
    }
    fn code(&self) -> Option<std::borrow::Cow<'_, str>> {
        Some(self.0.into())
    }
    fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        self
    }
    fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
        self
    }
    fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
        self
    }
    fn kind(&self) -> sqlx::error::ErrorKind {
        sqlx::error::ErrorKind::Other
    }
}

#[tokio::test]
async fn after_a_failed_sync_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let l = Ledger::open_url(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap();
    let fails = |code| super::db::halt_if_unsynced(&sqlx::Error::Database(Box::new(Unsynced(code))), &l.halted);
    // A read or a write that fails may be tried again.
    ["266", "778", "13"].into_iter().for_each(fails);
    l.touch(t(1)).await.unwrap();
    assert!(l.halted().now_or_never().is_none());
    // Who waits for the turn while a sync fails writes nothing either.
    let turn = l.write().await.unwrap();
    let mut waits = std::pin::pin!(l.touch(t(2)));
    assert!(tokio::time::timeout(Duration::ZERO, &mut waits).await.is_err(), "it has no turn yet");
    fails("1034");
    drop(turn);
    assert!(matches!(waits.await, Err(LedgerError::Halted)));
    assert!(matches!(l.clone().touch(t(2)).await, Err(LedgerError::Halted)));
    l.halted().await;
    // The last one to close would try the sync again.
    l.close().await;
    assert_eq!(l.latest_time().await.unwrap(), Some(t(1)));
}

#[tokio::test]
async fn a_disk_without_room_is_called_so() {
    let dir = tempfile::tempdir().unwrap();
    let l = Ledger::open_url(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap();
    let mut small = l.pool().acquire().await.unwrap();
    sqlx::query("PRAGMA max_page_count = 1").execute(&mut *small).await.unwrap();
    let large = "INSERT INTO fact (name, value) VALUES ('large', hex(zeroblob(100000)))";
    let e = LedgerError::from(sqlx::query(large).execute(&mut *small).await.unwrap_err());
    assert!(matches!(e, LedgerError::Full(_)) && e.to_string().contains("make some on its disk"), "{e:?}");
    let e = LedgerError::from(sqlx::query("SELECT nothing").execute(&mut *small).await.unwrap_err());
    assert!(matches!(e, LedgerError::Database(_)), "{e:?}");
}

/// SQLite would lay the log over whatever file has the name, and call it a ledger.
#[tokio::test]
async fn a_backup_beside_the_log_of_a_crash_is_no_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let url = format!("sqlite:{}", path("fleet.db").display());
    let l = Ledger::open_url(&url).await.unwrap();
    let bring_home = async |copy: &str| {
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_all(l.pool()).await.unwrap();
        std::fs::copy(path("fleet.db"), path(copy)).unwrap();
    };
    bring_home("backup").await;
    for n in 0..200 {
        if n == 100 {
            bring_home("its own").await;
        }
        l.set_fact(&format!("f{n}"), &"x".repeat(300)).await.unwrap();
    }
    std::fs::copy(path("fleet.db-wal"), path("log")).unwrap();
    l.close().await;
    let crash_and_restore = |file: &str| {
        let _ = std::fs::remove_file(path("fleet.db-shm"));
        std::fs::copy(path(file), path("fleet.db")).unwrap();
        std::fs::copy(path("log"), path("fleet.db-wal")).unwrap();
    };

    crash_and_restore("its own");
    let l = Ledger::open_url(&url).await.unwrap();
    assert!(l.fact("f0").await.unwrap().is_some() && l.fact("f199").await.unwrap().is_some());
    l.close().await;

    crash_and_restore("backup");
    // The log is not brought home by a look: it can still be taken away.
    for _ in 0..2 {
        let e = Ledger::open_url(&url).await.unwrap_err();
        assert!(matches!(e, LedgerError::Unfit(_)) && e.to_string().contains("with its -wal and -shm"), "{e:?}");
    }
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(path(&format!("fleet.db{end}")));
    }
    assert_eq!(Ledger::open_url(&url).await.unwrap().fact("f0").await.unwrap(), None);
}

/// The pool would try either for a minute, and say that it waited.
#[tokio::test]
async fn a_file_that_is_no_ledger_or_was_emptied_is_called_so_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let url = |name: &str| format!("sqlite:{}", path(name).display());
    std::fs::write(path("other"), "x".repeat(100_000)).unwrap();
    let e = Ledger::open_url(&url("other")).await.unwrap_err();
    assert!(matches!(e, LedgerError::Unfit(_)) && e.to_string().contains("move it away"), "{e:?}");
    // One that nobody has open is begun anew.
    for (name, has_it_open) in [("left", false), ("open", true)] {
        let l = Ledger::open_url(&url(name)).await.unwrap();
        l.set_fact("f", "x").await.unwrap();
        if !has_it_open {
            l.close().await;
            std::fs::write(path("left-shm"), [0; 32_768]).unwrap();
        }
        std::fs::File::create(path(name)).unwrap();
        match Ledger::open_url(&url(name)).await {
            Err(e) => assert!(has_it_open && e.to_string().contains("while another process has it open"), "{e:?}"),
            Ok(l) => assert!(!has_it_open && l.fact("f").await.unwrap().is_none()),
        }
    }
}

#[test]
fn a_damaged_ledger_is_called_so_whenever_it_is_met() {
    let of = |code| LedgerError::from(sqlx::Error::Database(Box::new(Unsynced(code))));
    // SQLITE_CORRUPT, SQLITE_CORRUPT_INDEX, SQLITE_NOTADB.
    for code in ["11", "779", "26"] {
        let e = of(code);
        assert!(matches!(e, LedgerError::Unfit(_)) && e.to_string().contains("move it away"), "{code}: {e:?}");
    }
    // SQLITE_ERROR, SQLITE_BUSY, one of PostgreSQL's.
    for code in ["1", "5", "22027"] {
        assert!(matches!(of(code), LedgerError::Database(_)), "{code}");
    }
    assert!(matches!(of("53100"), LedgerError::Full(_)) && matches!(of("13"), LedgerError::Full(_)));
    // What was to be written: too long, a constraint; and PostgreSQL's classes of data, constraints and limits.
    for code in ["18", "19", "2067", "20", "22021", "23505", "54000"] {
        assert!(of(code).is_of_values(), "{code}");
    }
    for code in ["1", "5", "40001", "42P01", "57P01"] {
        assert!(!of(code).is_of_values(), "{code}");
    }
}

/// A database that lets nobody in and takes nobody's orders, as one that is just started anew.
#[tokio::test]
async fn a_listener_that_was_lost_waits_as_who_has_none_and_listens_again() {
    let l = on_postgres().await;
    let database = database(&l).to_owned();
    let (mut listener, poll) = (None, Duration::from_millis(10));
    l.await_change(&mut listener, poll).await;
    assert!(listener.is_some());
    let admit = |yes: bool| POSTGRES.command("src", &format!("ALTER DATABASE {database} ALLOW_CONNECTIONS {yes}"));
    admit(false);
    let end = format!("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{database}'");
    POSTGRES.sql("src", &end);
    l.await_change(&mut listener, poll).await;
    assert!(listener.is_none(), "whoever asks now is told of an error");
    l.await_change(&mut listener, poll).await;
    assert!(listener.is_none() && l.change().await.is_err());
    admit(true);
    l.await_change(&mut listener, poll).await;
    assert!(listener.is_some());
    l.change().await.unwrap();
    drop(listener);
    drop_database(l).await;
}

#[tokio::test]
async fn what_comes_out_of_its_order_is_refused() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        l.see_stores(&[store("1")], t(0)).await.unwrap();
        let one = pack_one(&l, token, 1, &[PackKind::Full]).await.unwrap();
        let again = l.packed(token, &price(), v(1), &[], &BTreeMap::new()).await;
        assert!(matches!(again, Err(LedgerError::NotInState { wanted: "reserved", .. })), "{again:?}");
        let two = pack_one(&l, token, 2, &[PackKind::Delta, PackKind::Full]).await.unwrap();
        let kinds = l.publication(&price(), v(2)).await.unwrap().unwrap().packs.into_iter().map(|p| p.kind);
        assert!(kinds.is_sorted(), "as manifests list them");
        // The keys changed meanwhile: what would be signed is not by the one that counts now.
        l.add_trust(10, "{}", t(0), false).await.unwrap();
        let old_key = l.sign(Some(token), of(std::slice::from_ref(&two)), Which::All, 9, t(1), &mut maker).await;
        assert!(matches!(&old_key, Err(LedgerError::Conflict(why)) if why.contains("keys changed")), "{old_key:?}");
        assert!(!l.store(&"1".parse().unwrap()).await.unwrap().unwrap().is_overtaken(), "it has no list yet");
        l.sign(Some(token), of(&[two]), Which::All, 10, t(1), &mut maker).await.unwrap();
        let late = l.sign(Some(token), of(&[one]), Which::All, 10, t(1), &mut maker).await;
        assert!(matches!(&late, Err(LedgerError::VersionTaken { max, .. }) if *max == v(2)), "{late:?}");
        // The full of the first, which the second does not have.
        let gone = PackName { instance: price(), version: v(1), kind: PackKind::Full };
        l.forget_pack(token, &gone).await.unwrap();
        let packs = async |n| l.publication(&price(), v(n)).await.unwrap().unwrap().packs.len();
        assert_eq!((packs(1).await, packs(2).await), (0, 2));
    })
    .await;
}

//! Manifests and trust files: of whom, how far, what is above them.

use super::*;

fn one() -> StoreId {
    "1".parse().unwrap()
}

async fn row(l: &Ledger) -> StoreRow {
    l.store(&one()).await.unwrap().unwrap()
}

/// Signs, and shows the maker all heads.
async fn sign(l: &Ledger, token: Token, staged: &[Staged], heads: usize) -> Vec<StoreId> {
    let mut looking = |s: &SignStore<'_>| {
        assert_eq!(s.heads.len(), heads);
        maker(s)
    };
    l.sign(Some(token), of(staged), Which::All, 9, t(1), &mut looking).await.unwrap()
}

#[tokio::test]
async fn what_is_signed_next_is_above_all_that_was_heard_of() {
    on_each_database(async |l| {
        let token = lease(&l, t(0)).await;
        l.see_stores(&[store("1")], t(0)).await.unwrap();
        l.overtaken(&one(), 3).await.unwrap();
        assert!(!row(&l).await.is_overtaken(), "nothing was signed yet");
        let mut asked = Vec::new();
        let look = &mut |s: &SignStore<'_>| {
            asked.push(s.row.seen.id.clone());
            maker(s)
        };
        l.look(look).await.unwrap();
        assert_eq!((asked, row(&l).await.serial), (vec![one()], 0), "a look signs nothing");
        let staged = pack_one(&l, token, 1, &[PackKind::Full]).await.unwrap();
        assert_eq!(sign(&l, token, &[staged], 1).await, [one()]);
        let first = row(&l).await;
        assert_eq!((first.serial, first.known_serial(), first.is_overtaken()), (4, 4, false));
        let mut previous = Vec::new();
        let look = &mut |s: &SignStore<'_>| {
            previous.push(s.previous.map(str::to_owned));
            Ok(Made::NeedsPrevious)
        };
        l.look(look).await.unwrap();
        assert_eq!(previous, [None, Some(r#"{"serial":4}"#.to_owned())]);
        let put = |serial| WasPut { store: one(), serial, etag: Some("e".into()) };
        assert!(l.manifests_put(&[put(4)]).await.unwrap().is_empty());
        let in_place = l.manifests_in_place(None, 9).await.unwrap();
        assert_eq!((in_place.len(), in_place[0].serial, in_place[0].etag.as_deref()), (1, 4, Some("e")));

        l.set_back_is_known().await.unwrap();
        l.overtaken(&one(), 50).await.unwrap();
        let overtaken = row(&l).await;
        assert_eq!((overtaken.known_serial(), overtaken.next_serial, overtaken.is_overtaken()), (50, 51, true));
        assert!(l.is_set_back().await.unwrap());
        l.set_back_is_known().await.unwrap();
        assert!(!l.is_set_back().await.unwrap());
        let lists = (l.manifests_in_place(None, 9).await.unwrap(), l.manifests_to_put(None, 9).await.unwrap());
        assert_eq!(lists, (Vec::new(), Vec::new()), "signed anew first");
        assert_eq!(sign(&l, token, &[], 1).await, [one()]);
        assert_eq!(row(&l).await.serial, 51);
        assert!(!l.passed_over(&one(), 30).await.unwrap(), "that was told");

        // A device tells of one that nobody else knows.
        let device: DeviceId = "1-01".parse().unwrap();
        l.enrol(&device, &SecretKey::from_seed([1; 32]).public(), t(0)).await.unwrap();
        let beat = BeatRow { serial: Some(60), ..fleet::beat("1-01", 1, 2) };
        l.record_beats(&[beat]).await.unwrap();
        let heard = row(&l).await;
        assert_eq!((heard.known_serial(), heard.next_serial, heard.is_overtaken()), (51, 61, false));
        assert_eq!(sign(&l, token, &[], 1).await, [one()]);
        let passed = async |serial| l.passed_over(&one(), serial).await.unwrap();
        assert_eq!(
            (passed(51).await, passed(52).await, passed(60).await, passed(61).await),
            (false, true, true, false)
        );
        assert!(l.manifests_put(&[put(61)]).await.unwrap().is_empty());
        assert!(!passed(60).await, "it lies over whatever was there");
    })
    .await;
}

#[tokio::test]
async fn a_list_found_in_the_bucket_is_the_last_one_unless_a_later_is_known() {
    on_each_database(async |l| {
        let list = |serial| FoundList {
            store: one(),
            serial,
            epoch: 2,
            envelope: format!("{serial}"),
            zone: Some("east".parse().unwrap()),
            signed_at: t(1),
            expires_at: t(100),
        };
        for (serial, last) in [(7, 7), (5, 7), (8, 8)] {
            let found = TakenOver { lists: vec![list(serial)], ..TakenOver::default() };
            l.adopt(None, &found, &[], t(2)).await.unwrap();
            let row = row(&l).await;
            assert_eq!((row.serial, row.put_serial, row.next_serial, row.is_overtaken()), (last, last, last + 1, true));
            assert_eq!(l.manifest(&one()).await.unwrap().unwrap().envelope, format!("{last}"));
        }
        // One that was signed here since is the last one; a later one is gone above.
        let token = lease(&l, t(0)).await;
        let staged = pack_one(&l, token, 1, &[PackKind::Full]).await.unwrap();
        sign(&l, token, &[staged], 1).await;
        for (serial, is_overtaken) in [(8, false), (9, false), (10, true)] {
            let found = TakenOver { lists: vec![list(serial)], ..TakenOver::default() };
            l.adopt(None, &found, &[], t(2)).await.unwrap();
            assert_eq!(row(&l).await.is_overtaken(), is_overtaken, "{serial}");
        }
        let expiring = async |before| l.expiring(t(before)).await.unwrap();
        assert!(expiring(100).await.is_empty());
        assert_eq!(expiring(101).await, [(one(), t(100))]);
        l.see_stores(&[], t(3)).await.unwrap();
        assert!(expiring(101).await.is_empty(), "it is gone");
    })
    .await;
}

#[tokio::test]
async fn trust_files_are_put_one_by_one_and_an_epoch_begins_its_own_time() {
    on_each_database(async |l| {
        let put = async || l.trust().await.unwrap().iter().map(|f| (f.version, f.put)).collect::<Vec<_>>();
        l.take_trust(&[(1, "one".into()), (2, "two".into())], t(0)).await.unwrap();
        l.take_trust(&[(2, "another".into())], t(0)).await.unwrap();
        l.touch(t(50)).await.unwrap();
        l.add_trust(3, "three", t(20), false).await.unwrap();
        assert_eq!(put().await, [(1, true), (2, true), (3, false)]);
        assert_eq!(
            (l.trust().await.unwrap()[1].envelope.as_str(), l.latest_time().await.unwrap()),
            ("two", Some(t(50)))
        );
        l.trust_put(3).await.unwrap();
        assert_eq!(put().await, [(1, true), (2, true), (3, true)]);
        l.put_trust_again().await.unwrap();
        assert_eq!(put().await, [(1, false), (2, false), (3, false)]);
        l.add_trust(4, "four", t(30), true).await.unwrap();
        assert_eq!(l.latest_time().await.unwrap(), Some(t(30)));
    })
    .await;
}

//! What is kept of devices, mirrors and sticks.

use super::*;

pub(super) fn beat(device: &str, seq: u64, at: i64) -> BeatRow {
    BeatRow {
        device: device.parse().unwrap(),
        seq,
        envelope: format!("{device} {seq}"),
        received_at: t(at),
        last_seen_at: t(at - 1),
        serial: None,
        complaints: Vec::new(),
        versions: Vec::new(),
        proved_at: None,
    }
}

fn key(n: u8) -> proto::keys::PublicKey {
    SecretKey::from_seed([n; 32]).public()
}

/// Stores 1 and 2, each with its relay and two registers.
async fn enrolled(l: &Ledger) -> Vec<DeviceId> {
    l.see_stores(&[store("1"), store("2")], t(0)).await.unwrap();
    let mut ids: Vec<DeviceId> = Vec::new();
    for (n, id) in (1..).zip(["1", "1-01", "1-02", "2", "2-01", "2-02"]) {
        ids.push(id.parse().unwrap());
        l.enrol(ids.last().unwrap(), &key(n), t(5)).await.unwrap();
    }
    ids
}

#[tokio::test]
async fn a_device_is_known_by_itself_and_by_its_store() {
    on_each_database(async |l| {
        let ids = enrolled(&l).await;
        l.revoke(&ids[2], t(6)).await.unwrap();
        let all = l.devices().await.unwrap();
        assert_eq!(all.iter().map(|d| d.id.clone()).collect::<Vec<_>>(), ids);
        let of_two: StoreId = "2".parse().unwrap();
        assert_eq!(l.devices_of(&of_two).await.unwrap(), all[3..]);
        let asked = l.store_devices(&of_two).await.unwrap().unwrap();
        assert_eq!((&*asked.devices, asked.at), (&all[3..], l.enrolments().await.unwrap()));
        assert!(l.store_devices(&"3".parse().unwrap()).await.unwrap().is_none());
        let (mut keys, two) = (Vec::new(), Which::Only(&of_two));
        for which in [two, Which::All] {
            l.sign(None, News::default(), which, 9, t(7), &mut |s: &SignStore<'_>| {
                keys.extend(s.devices.to_vec());
                Ok(Made::Unchanged)
            })
            .await
            .unwrap();
        }
        let told = |ds: &[DeviceRow]| ds.iter().map(|d| (d.id.clone(), d.key.to_string())).collect::<Vec<_>>();
        assert_eq!(keys, [told(&all[3..]), told(&all[..2]), told(&all[3..])].concat(), "without the revoked one");

        // One found in the bucket is taken over; one that is known stays as it is.
        let mut w = l.write().await.unwrap();
        let new: DeviceId = "2-03".parse().unwrap();
        for id in [&new, &ids[2]] {
            w.know_device(id, &key(9), t(8)).await.unwrap();
        }
        w.commit().await.unwrap();
        assert_eq!(l.device(&new).await.unwrap().unwrap().key, key(9));
        assert_eq!(l.device(&ids[2]).await.unwrap().unwrap(), all[2]);
    })
    .await;
}

#[tokio::test]
async fn a_heartbeat_is_the_same_only_by_number_and_words() {
    on_each_database(async |l| {
        let ids = enrolled(&l).await;
        assert_eq!(l.last_heard(&ids[1]).await.unwrap(), None);
        let other_words = BeatRow { envelope: "other".into(), ..beat("1-01", 5, 12) };
        assert_eq!(
            l.record_beats(&[beat("1-01", 5, 10), other_words, beat("1-01", 5, 13)]).await.unwrap(),
            [BeatOutcome::Recorded, BeatOutcome::Older(5), BeatOutcome::Known]
        );
        assert_eq!(l.last_heard(&ids[1]).await.unwrap(), Some(t(9)));
    })
    .await;
}

/// What a device says of its list and its versions that headquarters did not make.
#[tokio::test]
async fn lists_and_versions_from_elsewhere_are_told_by_who_holds_the_newest() {
    on_each_database(async |l| {
        enrolled(&l).await;
        let token = lease(&l, t(0)).await;
        let one = pack_one(&l, token, 1, &[PackKind::Full]).await.unwrap();
        l.sign(Some(token), of(&[one]), Which::All, 9, t(1), &mut maker).await.unwrap();
        let row = async |id: &str| l.store(&id.parse().unwrap()).await.unwrap().unwrap();
        assert_eq!((row("1").await.serial, row("2").await.serial), (1, 1));

        let lists = |device, seq, serial| BeatRow { serial: Some(serial), ..beat(device, seq, 10) };
        l.record_beats(&[lists("1-01", 1, 1), lists("2-01", 1, 1_000_002)]).await.unwrap();
        assert!(l.unjudged().await.unwrap().is_empty(), "ours, and one out of reach");
        l.record_beats(&[lists("1-01", 2, 3), lists("1-02", 2, 5), lists("1", 2, 4), lists("2-01", 2, 1_000_001)])
            .await
            .unwrap();
        let told = l.unjudged().await.unwrap();
        let lines: Vec<_> = told.iter().map(|c| format!("{} {} {}", c.device, c.fault.code, c.fault.text)).collect();
        let line =
            |device, n| format!("{device} {LIST_NOT_OURS} list {n} is held, the newest that was signed here is 1");
        assert_eq!(lines, [line("1-02", 5), line("2-01", 1_000_001)]);
        assert_eq!((row("1").await.next_serial, row("2").await.next_serial), (6, 1_000_002));
        l.judged(&told).await.unwrap();

        let holds = |device, seq, version| BeatRow { versions: vec![(price(), v(version))], ..beat(device, seq, 20) };
        let unknown = BeatRow { versions: vec![("unknown@all".parse().unwrap(), v(7))], ..beat("1", 3, 20) };
        l.record_beats(&[holds("1-01", 3, 1), holds("1-02", 3, 1_000_002), unknown]).await.unwrap();
        assert!(l.unjudged().await.unwrap().is_empty(), "ours, out of reach, of what nobody publishes");
        let above = ["1-01", "1-02", "2-01", "2-02"].map(|device| holds(device, 4, 6));
        l.record_beats(&above[..1]).await.unwrap();
        l.record_beats(&above[1..]).await.unwrap();
        let told = l.unjudged().await.unwrap();
        let who: Vec<_> = told.iter().map(|c| (c.device.as_str(), c.fault.object.as_deref().unwrap())).collect();
        assert_eq!(who, [("1-01", "6"), ("1-02", "6")], "as many as it takes to believe it");
        assert_eq!(told[0].fault.text, "version 6 is held, the newest that was published here is 1");

        // Of one code: one of an instance and one of none. Who is told of the one is not of the other.
        let fault = |instance| Fault { code: "X".into(), instance, object: None, text: String::new(), since: t(30) };
        let both = BeatRow { complaints: vec![fault(None), fault(Some(price()))], ..beat("2-01", 9, 30) };
        l.judged(&told).await.unwrap();
        l.record_beats(&[both]).await.unwrap();
        let told = l.unjudged().await.unwrap();
        assert_eq!(told.iter().map(|c| &c.fault).collect::<Vec<_>>(), [&fault(None), &fault(Some(price()))]);
        l.judged(&told[1..]).await.unwrap();
        assert_eq!(l.unjudged().await.unwrap(), told[..1]);
    })
    .await;
}

#[tokio::test]
async fn the_last_receipts_are_of_relays_that_are_enrolled() {
    on_each_database(async |l| {
        let ids = enrolled(&l).await;
        let receipt = |store: &str, time, recorded| ReceiptRow {
            store: store.parse().unwrap(),
            time: t(time),
            recorded_at: t(recorded),
            envelope: format!("{store} {time}"),
        };
        // Read back before the relay was enrolled; older; of the last second, two; with a clock ahead.
        for r in [receipt("1", 50, 4), receipt("1", 10, 20), receipt("1", 12, 20), receipt("2", 90, 30)] {
            l.add_receipt(&r).await.unwrap();
            l.add_receipt(&r).await.unwrap();
        }
        let same_second = ReceiptRow { envelope: "of the same second".into(), ..receipt("1", 12, 21) };
        l.add_receipt(&same_second).await.unwrap();
        let mut last = l.last_receipts().await.unwrap();
        last.sort_by(|a, b| (&a.store, &a.envelope).cmp(&(&b.store, &b.envelope)));
        let ahead = ReceiptRow { time: t(30), ..receipt("2", 90, 30) };
        assert_eq!(last, [receipt("1", 12, 20), same_second, ahead.clone()]);
        l.revoke(&ids[0], t(40)).await.unwrap();
        assert_eq!(l.last_receipts().await.unwrap(), [ahead]);
    })
    .await;
}

#[tokio::test]
async fn a_mirror_is_even_by_the_last_mark_alone() {
    on_each_database(async |l| {
        assert_eq!(l.mirror_is_even("a").await.unwrap(), None);
        assert_eq!(l.mirror_behind("a").await.unwrap(), (1, false));
        l.mirror_even("a", 1).await.unwrap();
        assert_eq!(l.mirror_is_even("a").await.unwrap(), Some(1));
        assert_eq!(l.mirror_behind("a").await.unwrap(), (2, true));
        l.mirror_even("a", 1).await.unwrap();
        assert_eq!(l.mirror_is_even("a").await.unwrap(), None, "somebody marked it since");
        l.mirror_even("a", 2).await.unwrap();
        assert_eq!(l.mirror_behind("b").await.unwrap(), (1, false));
        l.mirror_even("b", 1).await.unwrap();
        l.mirrors_behind_but(&["a".into()]).await.unwrap();
        assert_eq!((l.mirror_is_even("a").await.unwrap(), l.mirror_is_even("b").await.unwrap()), (Some(2), None));
        assert_eq!(l.mirror_behind("b").await.unwrap(), (3, false));
    })
    .await;
}

#[tokio::test]
async fn facts_are_forgotten_by_name_and_time_goes_on() {
    on_each_database(async |l| {
        for name in ["lost a", "lost b", "other"] {
            l.set_fact(name, "x").await.unwrap();
        }
        l.forget_fact("lost a").await.unwrap();
        assert_eq!(l.facts("lost ").await.unwrap(), ["lost b"]);
        for (at, latest) in [(5, 5), (3, 5), (6, 6)] {
            l.touch(t(at)).await.unwrap();
            assert_eq!(l.latest_time().await.unwrap(), Some(t(latest)));
        }
    })
    .await;
}

#[tokio::test]
async fn devices_and_beats() {
    on_each_database(async |l| {
        let id: DeviceId = "1-01".parse().unwrap();
        let key = SecretKey::from_seed([7; 32]).public();
        l.see_stores(&[store("1")], t(0)).await.unwrap();
        let nobody = (l.enrolments().await.unwrap(), l.change().await.unwrap());
        l.enrol(&id, &key, t(0)).await.unwrap();
        let first = (l.enrolments().await.unwrap(), l.change().await.unwrap());
        assert!(nobody.0 < first.0 && nobody.1 < first.1, "{nobody:?} {first:?}");
        assert_eq!(l.enrolled_after(nobody.0).await.unwrap(), [id.store().clone()]);
        let beat = |seq, at| BeatRow {
            device: id.clone(),
            seq,
            envelope: format!("{seq}"),
            received_at: t(at),
            last_seen_at: t(at),
            serial: Some(3),
            complaints: Vec::new(),
            versions: Vec::new(),
            proved_at: None,
        };
        use BeatOutcome::{Known, Older, Recorded};
        assert_eq!(
            l.record_beats(&[beat(5, 10), beat(5, 11), beat(4, 12), beat(6, 13)]).await.unwrap(),
            [Recorded, Known, Older(5), Recorded]
        );
        assert_eq!(l.beats(None).await.unwrap(), [BeatRow { serial: None, ..beat(6, 13) }]);
        assert!(l.beats(Some(t(14))).await.unwrap().is_empty());
        // Of a batch those are kept whose devices are what they were, each with its own answer.
        let now = l.enrolments().await.unwrap();
        let proved = |seq, at: i64| BeatRow { proved_at: Some(Enrolments(now.0 + at)), serial: None, ..beat(seq, 13) };
        let mixed = [proved(9, -1), BeatRow { serial: None, ..beat(6, 13) }, proved(8, 1), proved(5, 0)];
        assert_eq!(
            l.record_beats(&mixed).await.unwrap(),
            [BeatOutcome::Outdated, Known, BeatOutcome::Outdated, Older(6)]
        );
        assert_eq!(l.beats(None).await.unwrap(), [BeatRow { serial: None, ..beat(6, 13) }]);
        assert!(l.enrolled_after(now).await.unwrap().is_empty());
        assert_eq!(l.enrolled_after(Enrolments(now.0 - 1)).await.unwrap(), [id.store().clone()]);
        assert_eq!(l.store(id.store()).await.unwrap().unwrap().next_serial, 4, "a ledger that was set back");
        l.record_beats(&[BeatRow { serial: Some(u64::MAX), ..beat(7, 13) }]).await.unwrap();
        assert_eq!(l.store(id.store()).await.unwrap().unwrap().next_serial, 4, "not as far as that");
        let foreign = l.unjudged().await.unwrap();
        assert_eq!((foreign.len(), foreign[0].fault.code.as_str()), (1, LIST_NOT_OURS), "told once");
        l.judged(&foreign).await.unwrap();

        let fault = |since, instance: Option<&str>| Fault {
            code: fault::DRIFT.into(),
            instance: instance.map(|i| i.parse().unwrap()),
            object: Some("store.db".into()),
            text: "x".into(),
            since: t(since),
        };
        let told = |seq, complaints| BeatRow { complaints, ..beat(seq, 14) };
        l.record_beats(&[told(8, vec![fault(12, None), fault(12, Some("unknown@all"))])]).await.unwrap();
        let known = l.unjudged().await.unwrap();
        assert_eq!(known, [Complaint { device: id.clone(), fault: fault(12, None) }]);
        // The next beat may have it a second later; a younger one comes while the older one is judged.
        l.record_beats(&[told(9, vec![fault(14, None)])]).await.unwrap();
        assert_eq!(l.unjudged().await.unwrap(), known);
        l.record_beats(&[told(10, vec![fault(18, None)])]).await.unwrap();
        l.judged(&known).await.unwrap();
        let known = l.unjudged().await.unwrap();
        assert_eq!(known, [Complaint { device: id.clone(), fault: fault(18, None) }]);
        l.judged(&known).await.unwrap();
        l.record_beats(&[told(11, vec![fault(18, None)]), told(12, vec![fault(19, None)])]).await.unwrap();
        assert_eq!(
            (l.unjudged().await.unwrap(), l.complaints().await.unwrap()),
            (Vec::new(), [known, foreign].concat())
        );

        assert!(l.revoke(&id, t(20)).await.unwrap());
        let revoked = (l.enrolments().await.unwrap(), l.change().await.unwrap());
        assert!(first.0 < revoked.0 && first.1 < revoked.1, "{first:?} {revoked:?}");
        assert_eq!(l.enrolled_after(first.0).await.unwrap(), [id.store().clone()]);
        assert!(!l.revoke(&id, t(21)).await.unwrap());
        let mut devices = Vec::new();
        l.sign(None, News::default(), Which::All, 9, t(22), &mut |s: &SignStore<'_>| {
            devices.extend(s.devices.to_vec());
            Ok(Made::Unchanged)
        })
        .await
        .unwrap();
        assert!(devices.is_empty(), "a revoked key is in no manifest");
        let other = SecretKey::from_seed([8; 32]).public();
        l.enrol(&id, &other, t(30)).await.unwrap();
        assert_eq!(l.device(&id).await.unwrap().unwrap().key, other);
        assert_eq!(l.record_beats(&[beat(1, 31)]).await.unwrap(), [Recorded], "a new key counts anew");
    })
    .await;
}

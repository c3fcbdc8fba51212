#![allow(clippy::disallowed_methods)]
use super::*;
use crate::control::{self, Order};
use crate::kit::{Hq, Make, Store, rooms_of, secret, served, state};
use crate::relay::tests::copy_tree;
use crate::steps::{Moment, Steps};
use crate::trial::Runner;
use proto::layout::PackKind::{Delta, Full};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::{Arc, Mutex, OnceLock};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

/// A store without sources, and a stick with everything.
fn stick() -> (Hq, Store, TempDir) {
    let mut hq = Hq::new();
    hq.follow("price", "zone-east");
    hq.publish("price", &[(1, Some("a"))], Make::Full);
    hq.publish("price", &[(2, Some("b"))], Make::Delta);
    hq.sign();
    let stick = TempDir::new().unwrap();
    copy_tree(hq.bucket.path(), stick.path());
    (hq, Store::enrolled(&[]), stick)
}

fn opened(done: &Imported) -> Receipt {
    let bytes = fs::read(&done.receipt_file).unwrap();
    Receipt::open(&bytes, &secret(21).public(), &Default::default()).unwrap()
}

#[tokio::test]
async fn a_stick_brings_a_store_up_and_is_answered() {
    let (hq, store, stick) = stick();
    let relay = store.open();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(!done.already_here && !done.refused && done.behind.is_empty(), "{done:?}");
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    let receipt = opened(&done);
    assert!(done.receipt_file.starts_with(stick.path().join("receipts")));
    assert_eq!((receipt.serial, receipt.versions.values().next().unwrap().get()), (Some(1), 2));
    assert_eq!(receipt.digests[&hq.instance("price")].values().next(), Some(&hq.digest("price")));
    assert!(!relay.hall.shelves.import_waits());
    // Again: harmless.
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.already_here && done.behind.is_empty(), "{done:?}");
    assert_eq!(opened(&done).versions, receipt.versions);
}

#[tokio::test]
async fn an_older_stick_is_already_here() {
    let (mut hq, _, stick) = stick();
    hq.publish("price", &[(3, Some("c"))], Make::Delta);
    hq.sign();
    let store = Store::enrolled(&[hq.url()]);
    let relay = store.open();
    relay.mirror_once(Pace::Once).await;
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.already_here && !done.refused, "{done:?}");
    assert_eq!(opened(&done).serial, Some(2));
}

#[tokio::test]
async fn a_stick_that_cannot_be_written_is_answered_in_the_data_directory() {
    let (_hq, store, stick) = stick();
    let relay = store.open();
    // A file where the folder should be, as root writes through any permission.
    fs::write(stick.path().join("receipts"), "x").unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.receipt_file.starts_with(store.data().join("receipts")), "{:?}", done.receipt_file);
    opened(&done);
    // A link could lead the receipt anywhere.
    fs::remove_file(stick.path().join("receipts")).unwrap();
    let elsewhere = TempDir::new().unwrap();
    symlink(elsewhere.path(), stick.path().join("receipts")).unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.receipt_file.starts_with(store.data()));
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn links_and_damage_are_refused_and_named() {
    let (hq, store, stick) = stick();
    let relay = store.open();
    let delta = hq.pack("price", 2, Delta);
    let on_stick = stick.path().join("packs").join(delta.to_string());
    // A link, even to the right bytes.
    fs::remove_file(&on_stick).unwrap();
    symlink(hq.path(&delta.clone().into()), &on_stick).unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.receipt.refusals[0].contains("0000000002.delta.pack: it is a symbolic link"), "{done:?}");
    assert_eq!(served(&relay, &hq.instance("price")), Some(1));
    assert!(done.behind.contains_key("price"));
    // Bytes that are not the listed ones, as long and longer.
    let good = fs::read(hq.path(&delta.clone().into())).unwrap();
    fs::remove_file(&on_stick).unwrap();
    for (bytes, word) in [
        (
            {
                let mut b = good.clone();
                b[9] ^= 1;
                b
            },
            "SHA-256",
        ),
        (
            {
                let mut b = good.clone();
                b.push(0);
                b
            },
            "longer",
        ),
        (good[..good.len() - 1].to_vec(), "the manifest says"),
    ] {
        fs::write(&on_stick, bytes).unwrap();
        let done = relay.import(stick.path()).await.unwrap();
        assert!(done.receipt.refusals[0].contains(word), "{done:?}");
        assert!(state(&relay).attempts.is_empty(), "a damaged stick says nothing about the pack");
    }
    fs::write(&on_stick, good).unwrap();
    assert!(relay.import(stick.path()).await.unwrap().behind.is_empty());
    assert_eq!(rooms_of(&relay, &delta), ["ok"]);
}

#[tokio::test]
async fn linked_folders_and_strangers_are_not_followed() {
    let (hq, store, stick) = stick();
    let relay = store.open();
    // packs/ itself is a link.
    let packs = stick.path().join("packs");
    fs::remove_dir_all(&packs).unwrap();
    symlink(hq.bucket.path().join("packs"), &packs).unwrap();
    fs::write(stick.path().join("autorun.inf"), "x").unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert_eq!(done.taken, ["stores/0421/manifest.json"]);
    assert!(!done.receipt.refusals.is_empty());
    assert_eq!(served(&relay, &hq.instance("price")), None);
    assert!(!store.data().join("import/autorun.inf").exists());
}

#[tokio::test]
async fn another_stores_stick_and_forged_ones_are_refused() {
    let (mut hq, store, stick) = stick();
    let relay = store.open();
    let manifest = stick.path().join("stores/0421/manifest.json");
    hq.publisher = secret(66);
    hq.sign();
    fs::copy(hq.bucket.path().join("stores/0421/manifest.json"), &manifest).unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.refused && done.receipt.refusals[0].contains("BAD_SIGNATURE"), "{done:?}");
    assert_eq!(done.receipt.serial, None);
    fs::rename(stick.path().join("stores/0421"), stick.path().join("stores/0999")).unwrap();
    let error = relay.import(stick.path()).await.unwrap_err().to_string();
    assert!(error.contains("stores/0421/manifest.json"), "{error}");
    assert!(relay.import(Path::new("/nonexistent")).await.is_err());
}

#[tokio::test]
async fn what_a_crash_left_is_used_by_the_next_start() {
    let (hq, store, stick) = stick();
    copy_tree(stick.path(), &store.data().join("import"));
    // The last copy was torn.
    let torn = store.data().join("import/packs").join(hq.pack("price", 2, Delta).to_string());
    fs::write(&torn, b"torn").unwrap();
    let relay = store.open();
    relay.mirror_once(Pace::Once).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(1));
    assert_eq!(rooms_of(&relay, &hq.pack("price", 1, Full)), ["ok"]);
    assert!(!relay.hall.shelves.import_waits() && state(&relay).attempts.is_empty());
}

#[tokio::test]
async fn missing_permissions_are_a_reason() {
    let (_hq, store, stick) = stick();
    let relay = store.open();
    fs::set_permissions(stick.path(), fs::Permissions::from_mode(0o500)).unwrap();
    // Root reads anyway; anybody else is told. Either way there is an answer.
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.receipt_file.is_file());
    fs::set_permissions(stick.path(), fs::Permissions::from_mode(0o700)).unwrap();
}

#[tokio::test]
async fn what_does_not_fit_is_told_and_the_rest_goes_in() {
    let (mut hq, mut store, stick) = stick();
    store.config.limits.pack_bytes = u64::MAX;
    hq.follow("promo", "all");
    hq.publish("promo", &[(7, Some("x"))], Make::Full);
    hq.lines.get_mut("price").unwrap().entries[1].bytes = 1 << 50;
    hq.sign();
    copy_tree(hq.bucket.path(), stick.path());
    let relay = store.open();
    let done = relay.import(stick.path()).await.unwrap();
    let [refusal] = &done.receipt.refusals[..] else { panic!("{done:?}") };
    assert!(refusal.contains("0000000002.delta.pack"), "{refusal}");
    assert_eq!(opened(&done).refusals, done.receipt.refusals);
    assert_eq!((served(&relay, &hq.instance("price")), served(&relay, &hq.instance("promo"))), (Some(1), Some(1)));
    assert!(done.behind.contains_key("price") && !done.behind.contains_key("promo"), "{done:?}");
    let codes: Vec<String> = state(&relay).all_faults().into_iter().map(|f| f.code).collect();
    assert_eq!(codes, ["DISK_FULL"]);
    assert!(!relay.hall.shelves.import_waits());
}

/// The relay takes the delta; the full on the same stick is what a new register wants once the old one is listed no more.
#[tokio::test]
async fn a_store_that_lives_on_sticks_keeps_a_complete_chain() {
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    // None, and one that is away.
    for sources in [vec![], vec!["file:///nonexistent".to_owned()]] {
        for crashed in [false, true] {
            let mut hq = Hq::new();
            hq.follow("price", "zone-east");
            hq.publish("price", &many, Make::Full);
            let store = Store::enrolled(&sources);
            let relay = store.open();
            for n in 1..=5u64 {
                if n > 1 {
                    hq.publish("price", &[(1, Some(&n.to_string()))], Make::Both);
                }
                if n > 2 {
                    hq.unlist(&hq.pack("price", n - 2, Full));
                    hq.unlist(&hq.pack("price", n - 2, Delta));
                }
                hq.sign();
                let stick = TempDir::new().unwrap();
                copy_tree(hq.bucket.path(), stick.path());
                if crashed {
                    copy_tree(stick.path(), &store.data().join("import"));
                    relay.mirror_once(Pace::Once).await;
                } else {
                    let done = relay.import(stick.path()).await.unwrap();
                    assert!(!done.already_here && done.behind.is_empty(), "{n}: {done:?}");
                    let again = relay.import(stick.path()).await.unwrap();
                    assert!(again.already_here && again.taken.is_empty(), "{n}: {again:?}");
                }
                assert_eq!(served(&relay, &hq.instance("price")), Some(n));
                assert!(state(&relay).debts().is_empty(), "{n}: {:?}", state(&relay).debts());
                // What is not listed any more goes.
                relay.tidy().await;
                store.clock.advance(relay.hall.config.grace.0);
                relay.tidy().await;
                assert!(relay.incomplete().is_empty(), "{n}");
            }
            assert!(!relay.hall.shelves.import_waits() && state(&relay).attempts.is_empty());
        }
    }
}

/// A way that turned out bad is gone round with what else lies on the stick.
#[tokio::test]
async fn of_a_stick_all_that_helps_is_taken_and_nothing_else() {
    let (mut hq, store, stick) = stick();
    let many: Vec<(i64, Option<&str>)> = (10..300).map(|n| (n, Some("a row that makes a full long"))).collect();
    hq.publish("price", &many, Make::Both);
    hq.publish("price", &[(1, Some("c"))], Make::Both);
    hq.sign();
    let relay = store.open();
    relay.import(stick.path()).await.unwrap();
    copy_tree(hq.bucket.path(), stick.path());
    {
        let db = rusqlite::Connection::open(relay.shadow.path()).unwrap();
        db.execute("UPDATE price_row SET name = 'by hand' WHERE id = 2", []).unwrap();
    }
    let done = relay.import(stick.path()).await.unwrap();
    assert_eq!(served(&relay, &hq.instance("price")), Some(4), "{done:?}");
    assert!(done.behind.is_empty() && state(&relay).drifts.is_empty(), "{done:?}");
    let full = |version| hq.pack("price", version, Full);
    assert_eq!(rooms_of(&relay, &full(4)), ["ok"], "what the deltas met was wrong");
    assert!(rooms_of(&relay, &full(3)).is_empty(), "nobody needs it");
    assert!(!done.taken.iter().any(|t| t.contains(&full(3).to_string())), "{done:?}");
}

#[tokio::test]
async fn an_older_stick_is_done_though_the_store_is_behind() {
    let (mut hq, _, stick) = stick();
    hq.publish("price", &[(3, Some("c"))], Make::Delta);
    hq.sign();
    fs::remove_file(hq.path(&hq.pack("price", 3, Delta).into())).unwrap();
    let store = Store::enrolled(&[hq.url()]);
    let relay = store.open();
    relay.mirror_once(Pace::Once).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    let order = Order::Import { dir: stick.path().to_owned() };
    let answer = control::obey(&relay, order).await;
    assert_eq!(answer.exit, 0, "{:?}", answer.lines);
    assert_eq!(answer.report["already_here"], true);
}

/// The bucket's pack was bent and given up: the stick's is another file.
#[tokio::test]
async fn a_pack_that_sources_gave_bent_is_taken_from_a_stick() {
    let (hq, _, stick) = stick();
    let delta = hq.pack("price", 2, Delta);
    hq.spoil(&delta);
    let store = Store::enrolled(&[hq.url()]);
    let relay = store.open();
    for _ in 0..3 {
        relay.mirror_once(Pace::Once).await;
    }
    assert_eq!((rooms_of(&relay, &delta), served(&relay, &hq.instance("price"))), (vec!["error"], Some(1)));
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.behind.is_empty(), "{done:?}");
    assert_eq!((rooms_of(&relay, &delta), served(&relay, &hq.instance("price"))), (vec!["ok"], Some(2)));
    assert!(state(&relay).all_faults().is_empty() && state(&relay).attempts.is_empty());
}

/// Whoever broke the command off, or did not wait, and gives it again; and `once` from cron beside both.
#[tokio::test]
async fn imports_at_once_take_turns_and_once_leaves_them_alone() {
    let (hq, store, stick) = stick();
    let relay = store.open();
    let (first, second, round) =
        tokio::join!(relay.import(stick.path()), relay.import(stick.path()), relay.mirror_once(Pace::Once));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert!(!first.already_here && first.behind.is_empty() && first.receipt.refusals.is_empty(), "{first:?}");
    assert!(second.already_here && second.behind.is_empty(), "{second:?}");
    assert_eq!(opened(&second).versions[&hq.instance("price")].get(), 2);
    assert!(round.problems.is_empty(), "{round:?}");
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    assert!(!relay.hall.shelves.import_waits() && state(&relay).all_faults().is_empty());
}

#[tokio::test]
async fn an_import_that_does_not_end_soon_is_named_to_the_next() {
    let (_hq, store, stick) = stick();
    let relay = store.open();
    let long = relay.import_turn.lock().await;
    relay.import_of.send_replace("/media/first".into());
    let error = relay.import_within(stick.path(), Duration::ZERO).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/media/first") && text.contains("leave its stick in"), "{text}");
    assert_eq!(error.code(), "LOCKED");
    drop(long);
    assert!(relay.import_within(stick.path(), Duration::ZERO).await.unwrap().behind.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_goes_on_to_its_receipt_though_whoever_gave_it_has_gone() {
    let (hq, store, stick) = stick();
    let relay = Arc::new(store.open());
    let socket = control::listen(store.data()).unwrap();
    let service = tokio::spawn(control::serve(Arc::clone(&relay), socket));
    let order = serde_json::to_vec(&Order::Import { dir: stick.path().to_owned() }).unwrap();
    let mut client = tokio::net::UnixStream::connect(store.data().join(control::SOCKET)).await.unwrap();
    client.write_all(&[&order[..], b"\n"].concat()).await.unwrap();
    drop(client);
    // The last thing that an import does.
    relay.hall.wake.notified().await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    assert!(stick.path().join("receipts/0421-0000000001.receipt.json").is_file());
    service.abort();
}

#[tokio::test]
async fn downloads_step_back_for_what_was_copied_not_while_it_is_copied() {
    let (_hq, store, stick) = stick();
    let (seen, importing) = (Arc::new(Mutex::new(Vec::new())), Arc::new(OnceLock::<watch::Receiver<bool>>::new()));
    let (told, now) = (Arc::clone(&seen), Arc::clone(&importing));
    let steps = Steps::observed(move |step, moment| {
        if moment == Moment::Before {
            told.lock().unwrap().push((step, now.get().is_some_and(|now| *now.borrow())));
        }
    });
    let relay = store.open_with(Runner::Here, steps);
    importing.set(relay.importing.subscribe()).unwrap();
    assert!(relay.import(stick.path()).await.unwrap().behind.is_empty());
    let at = |step| seen.lock().unwrap().iter().filter(|(s, _)| *s == step).map(|(_, i)| *i).collect::<Vec<_>>();
    // The manifest is put to work between the copying of claims and that of packs.
    assert_eq!((at("relay.manifest"), at("relay.ok")), (vec![false], vec![true, true]));
    assert!(!*relay.importing.borrow());
}

/// A restart in the middle, and the stick is gone when it is over: by import, and by the start that goes on.
#[tokio::test]
async fn a_stop_leaves_what_was_copied_to_the_next_start() {
    let (hq, store, stick) = stick();
    for stopped in [0, 1, 2] {
        let relay = store.open();
        relay.hall.stop.cancel();
        if stopped == 0 {
            let done = relay.import(stick.path()).await.unwrap();
            assert!(done.behind["price"].contains("next start"), "{done:?}");
            assert_eq!(done.receipt.versions.len(), 0);
            fs::remove_dir_all(stick.path()).unwrap();
        } else {
            relay.mirror_once(Pace::Once).await;
        }
        assert!(relay.hall.shelves.import_waits(), "{stopped}");
    }
    let relay = store.open();
    relay.mirror_once(Pace::Once).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    assert!(!relay.hall.shelves.import_waits());
}

#[tokio::test]
async fn a_relay_that_has_halted_imports_nothing_and_touches_nothing() {
    let (hq, store, stick) = stick();
    let relay = store.open();
    copy_tree(stick.path(), &store.data().join("import"));
    relay.own_trouble(Verdict::Halt, false, "a sync failed");
    let answer = control::obey(&relay, Order::Import { dir: stick.path().to_owned() }).await;
    assert_eq!((answer.exit, answer.report["code"].as_str()), (1, Some("HALTED")), "{answer:?}");
    assert!(answer.failure().is_some_and(|(why, _)| why.contains("restart")), "{answer:?}");
    relay.mirror_once(Pace::Once).await;
    assert!(relay.hall.shelves.import_waits() && !stick.path().join("receipts").exists());
    drop(relay);
    let relay = store.open();
    relay.mirror_once(Pace::Once).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
}

#[tokio::test]
async fn a_sync_of_the_devices_own_file_that_fails_in_an_import_halts() {
    let (_hq, store, stick) = stick();
    let relay = store.open();
    follow::lock(&relay.hall.device).fail_sync();
    let answer = control::obey(&relay, Order::Import { dir: stick.path().to_owned() }).await;
    assert_eq!(answer.exit, 1, "{answer:?}");
    assert!(relay.is_halted() && relay.hall.shelves.import_waits(), "{answer:?}");
}

/// The power was cut while the first stick was read; the next one that comes is another store's.
#[tokio::test]
async fn what_was_broken_off_is_used_before_the_next_stick_is_read() {
    let (hq, store, stick) = stick();
    copy_tree(stick.path(), &store.data().join("import"));
    let relay = store.open();
    let other = TempDir::new().unwrap();
    assert!(relay.import(other.path()).await.is_err());
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
    // The same stick has no more to do than to be answered.
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.already_here, "{done:?}");
    assert_eq!(opened(&done).serial, Some(1));
}

/// Objects that came by mail, unpacked into `import/` itself.
#[tokio::test]
async fn import_itself_is_no_folder_to_import() {
    let (hq, store, stick) = stick();
    let own = store.data().join("import");
    copy_tree(stick.path(), &own);
    let relay = store.open();
    for dir in [own.clone(), own.join("packs")] {
        let error = relay.import(&dir).await.unwrap_err().to_string();
        assert!(error.contains("store-relay once"), "{error}");
    }
    assert!(relay.hall.shelves.import_waits());
    relay.mirror_once(Pace::Once).await;
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
}

/// All of it was copied; the folder that it was mounted at is gone with it, or is an empty one of the disk below.
#[tokio::test]
async fn a_stick_that_was_pulled_out_is_answered_in_the_data_directory() {
    for gone in [false, true] {
        let (_hq, store, stick) = stick();
        let root = stick.path().to_owned();
        let steps = Steps::observed(move |step, moment| {
            if (step, moment) == ("relay.ok", Moment::After) && root.exists() {
                fs::remove_dir_all(&root).unwrap();
                if !gone {
                    fs::create_dir(&root).unwrap();
                }
            }
        });
        let relay = store.open_with(Runner::Here, steps);
        let done = relay.import(stick.path()).await.unwrap();
        assert!(done.behind.is_empty() && done.receipt_file.starts_with(store.data()), "{done:?}");
        assert_eq!(opened(&done).versions.len(), 1);
        assert!(stick.path().exists() != gone && !stick.path().join("receipts").exists());
    }
}

/// It is read back at headquarters against the versions that it names.
#[tokio::test]
async fn a_receipt_has_the_digests_of_what_is_served_and_of_nothing_else() {
    let (hq, store, stick) = stick();
    let relay = store.open();
    relay.import(stick.path()).await.unwrap();
    let (instance, delta) = (hq.instance("price"), hq.pack("price", 2, Delta));
    relay.unserve(&delta).unwrap();
    fs::remove_file(stick.path().join("packs").join(delta.to_string())).unwrap();
    let receipt = opened(&relay.import(stick.path()).await.unwrap());
    assert_eq!((receipt.versions[&instance].get(), receipt.digests.get(&instance)), (1, None));
}

#[tokio::test]
async fn the_event_log_says_how_an_import_ended_and_where_its_receipt_is() {
    let (_hq, store, stick) = stick();
    let relay = store.open();
    let done = relay.import(stick.path()).await.unwrap();
    let last = || relay.hall.events().pop().unwrap();
    assert!(last().code == "IMPORT" && last().text.contains(done.receipt_file.to_str().unwrap()), "{:?}", last());
    fs::remove_dir_all(stick.path().join("stores")).unwrap();
    relay.import(stick.path()).await.unwrap_err();
    assert!(last().code == "IMPORT" && last().text.contains("it failed"), "{:?}", last());
}

#[tokio::test]
async fn a_data_directory_may_have_any_name() {
    let (hq, mut store, stick) = stick();
    let odd = store.dir.path().join("store #1, 50%25?");
    fs::rename(store.data(), &odd).unwrap();
    store.config.data_dir = odd;
    let relay = store.open();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(!done.refused && done.behind.is_empty(), "{done:?}");
    assert_eq!(served(&relay, &hq.instance("price")), Some(2));
}

/// By names of the folder, not of our own directory that it is copied to.
#[tokio::test]
async fn what_a_folder_lacks_or_does_not_let_us_read_is_told_once() {
    let (_hq, store, stick) = stick();
    let relay = store.open();
    let trust = stick.path().join("trust.json");
    let kept = fs::read(&trust).unwrap();
    fs::remove_file(&trust).unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert_eq!(done.receipt.refusals, ["trust.json: it is not in the folder"]);
    fs::write(trust, kept).unwrap();
    let manifest = stick.path().join("stores/0421/manifest.json");
    fs::remove_file(&manifest).unwrap();
    fs::create_dir(&manifest).unwrap();
    let done = relay.import(stick.path()).await.unwrap();
    assert!(done.refused, "{done:?}");
    assert_eq!(done.receipt.refusals, ["stores/0421/manifest.json: it is not a regular file"]);
}

#![allow(clippy::disallowed_methods)]
use super::*;
use crate::kit::{Hq, Make, Store, rooms_of, secret, served, state};
use crate::relay::tests::copy_tree;
use proto::layout::PackKind::{Delta, Full};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use tempfile::TempDir;

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
async fn what_does_not_fit_is_told_and_leaves_nothing_on_the_disk() {
    let (mut hq, mut store, stick) = stick();
    store.config.limits.pack_bytes = u64::MAX;
    hq.lines.get_mut("price").unwrap().entries[1].bytes = 1 << 50;
    hq.sign();
    copy_tree(hq.bucket.path(), stick.path());
    let relay = store.open();
    let error = relay.import(stick.path()).await.unwrap_err();
    assert!(matches!(&error, ImportError::NoRoom(why) if why.contains("0000000002.delta.pack")), "{error}");
    let codes: Vec<String> = state(&relay).all_faults().into_iter().map(|f| f.code).collect();
    assert_eq!(codes, ["DISK_FULL"]);
    assert!(!relay.hall.shelves.import_waits(), "what was copied before it");
}

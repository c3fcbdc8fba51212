#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::fake_s3::FakeS3;
use super::*;
use object_store::aws::AmazonS3Builder;
use std::fs;

fn config(urls: &[String]) -> ObjectsConfig {
    ObjectsConfig { urls: urls.to_vec(), s3: Default::default(), concurrency: 4 }
}

async fn buckets(dir: &Path, names: &[&str]) -> Buckets {
    let ledger = Ledger::open_url(&format!("sqlite:{}", dir.join("fleet.db").display())).await.unwrap();
    let urls: Vec<String> = names.iter().map(|n| format!("file://{}", dir.join(n).display())).collect();
    let objects = config(&urls);
    let mut all = urls.iter().map(|u| Bucket::open(u, &objects).unwrap());
    Buckets {
        first: all.next().unwrap(),
        mirrors: all.map(|bucket| Arc::new(Mirror { bucket, state: Mutex::default() })).collect(),
        others_left: Arc::default(),
        ledger,
        limits: Limits::default(),
        concurrency: 4,
        room: dir.join("room"),
    }
}

fn pack(n: u64) -> ObjectName {
    format!("packs/price@zone-east/{n:010}.full.pack").parse().unwrap()
}
fn bytes(s: &'static str) -> Content<'static> {
    Content::Bytes(Bytes::from_static(s.as_bytes()))
}

#[tokio::test]
async fn a_name_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let b = buckets(dir.path(), &["a"]).await;
    assert_eq!(b.put_new(&pack(1), bytes("one")).await.unwrap(), Put::New);
    assert_eq!(b.put_new(&pack(1), bytes("one")).await.unwrap(), Put::SameThere);
    let other = b.put_new(&pack(1), bytes("two")).await.unwrap_err();
    assert!(matches!(other, BucketError::OtherBytesThere { .. }), "{other}");
    assert!(other.to_string().contains("0000000001.full.pack"));

    let file = dir.path().join("aside");
    fs::write(&file, "three").unwrap();
    let content = |sha: &[u8]| Content::File { path: &file, bytes: 5, sha256: Sha256::of(sha) };
    assert_eq!(b.put_new(&pack(2), content(b"three")).await.unwrap(), Put::New);
    assert_eq!(b.put_new(&pack(2), content(b"three")).await.unwrap(), Put::SameThere);
    assert!(b.put_new(&pack(2), content(b"other")).await.is_err());
    assert_eq!(b.list_packs(&"price@zone-east".parse().unwrap()).await.unwrap().len(), 2);
    assert!(b.list_packs(&"price@zone-west".parse().unwrap()).await.unwrap().is_empty());
}

/// Anybody who may put an object can put one that is no path; it must not hide the others.
#[tokio::test]
async fn stray_keys_are_passed_by() {
    proto::fetch::install_tls();
    for room in ["", "chain/"] {
        let (endpoint, fake) = FakeS3::start(Conditions::Honoured).await;
        let bucket = open_at(&endpoint, &format!("s3://b/{room}")).await;
        for n in 1..=1500 {
            fake.set(&format!("{room}{}", pack(n)), "x");
        }
        let at = format!("{room}packs/price@zone-east/");
        for stray in ["../../x", "..", "//x", "", "0000000700.full.pack/../x", "0000001500.full.pack//", "./y", "zz//"]
        {
            fake.set(&format!("{at}{stray}"), "x");
        }
        let listed = bucket.list("packs/price@zone-east/").await.unwrap();
        assert_eq!(listed.into_keys().collect::<Vec<_>>(), (1..=1500).map(pack).collect::<Vec<_>>(), "{room}");
        assert_eq!(bucket.list("").await.unwrap().len(), 1500, "{room}");
        // A flood of them is told, not waited for.
        (0..200).for_each(|n| fake.set(&format!("{at}//{n}"), "x"));
        let told = bucket.list("packs/price@zone-east/").await.unwrap_err().to_string();
        assert!(told.contains("more than 100 keys"), "{told}");
    }
}

#[tokio::test]
async fn pointers_are_replaced_and_reads_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let b = buckets(dir.path(), &["a"]).await;
    let name = ObjectName::Manifest("0421".parse().unwrap());
    assert_eq!(b.get(&name, 10).await.unwrap(), None);
    b.put_pointer(&name, "one".into()).await.unwrap();
    b.put_pointer(&name, "two".into()).await.unwrap();
    assert_eq!(b.get(&name, 3).await.unwrap().as_deref(), Some(&b"two"[..]));
    assert!(b.get(&name, 2).await.is_err());
    fs::write(dir.path().join("a/README"), "not ours").unwrap();
    assert_eq!(b.list_stores().await.unwrap().len(), 1);
    let to = dir.path().join("copy");
    fs::write(&to, "old and longer").unwrap();
    assert_eq!(b.get_to_file(&name, &to).await.unwrap(), Some((3, Sha256::of(b"two"))));
    assert_eq!(fs::read(&to).unwrap(), b"two");
    b.delete(&name).await.unwrap();
    b.delete(&name).await.unwrap();
    assert_eq!(b.get_to_file(&name, &to).await.unwrap(), None);
    assert_eq!(b.first.probe().await.unwrap(), Conditions::Honoured);
}

/// Web servers tell a file's states apart by its length and the second of its time.
#[tokio::test]
async fn lists_of_one_length_put_within_a_second_have_times_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let b = buckets(dir.path(), &["a"]).await;
    let name = ObjectName::Manifest("0421".parse().unwrap());
    let file = dir.path().join("a").join(name.to_string());
    let second = || std::os::unix::fs::MetadataExt::mtime(&fs::metadata(&file).unwrap());
    let mut seconds = Vec::new();
    for list in ["one", "two", "six", "ten"] {
        b.put_pointer(&name, list.into()).await.unwrap();
        seconds.push(second());
    }
    assert!(seconds.is_sorted_by(|a, b| a < b), "{seconds:?}");
    // What was put while the clock was years ahead keeps none there.
    let ahead = std::time::SystemTime::now() + std::time::Duration::from_secs(1_000_000);
    fs::File::options().write(true).open(&file).unwrap().set_modified(ahead).unwrap();
    let far = second();
    b.put_pointer(&name, "now".into()).await.unwrap();
    assert!(second() < far);
}

/// A directory that a command by hand made while its umask was narrow.
#[tokio::test]
async fn what_is_put_is_for_whoever_may_read_the_bucket() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let b = buckets(dir.path(), &["a"]).await;
    let path = |name: &str| dir.path().join("a").join(name);
    let mode = |name: &str| fs::metadata(path(name)).unwrap().permissions().mode() & 0o777;
    let set = |name: &str, mode| fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
    let manifest = ObjectName::Manifest("0421".parse().unwrap());
    for (bucket, directory, file) in [(0o755, 0o755, 0o644), (0o711, 0o711, 0o600), (0o700, 0o700, 0o600)] {
        b.put_new(&pack(1), bytes("one")).await.unwrap();
        b.put_pointer(&manifest, "m1".into()).await.unwrap();
        set("", bucket);
        for narrow in ["packs", "packs/price@zone-east", "stores", "stores/0421"] {
            set(narrow, 0o700);
        }
        set(&pack(1).to_string(), 0o600);
        // The run that was cut off is run again.
        assert_eq!(b.put_new(&pack(1), bytes("one")).await.unwrap(), Put::SameThere);
        b.put_pointer(&manifest, "m2".into()).await.unwrap();
        for wide in ["packs", "packs/price@zone-east", "stores", "stores/0421"] {
            assert_eq!(mode(wide), directory, "{wide} in a bucket of {bucket:o}");
        }
        assert_eq!((mode(""), mode(&pack(1).to_string())), (bucket, file));
    }
}

#[tokio::test]
async fn a_mirror_that_was_down_is_brought_up() {
    let dir = tempfile::tempdir().unwrap();
    // A file where the mirror's directory should be: every put fails.
    fs::write(dir.path().join("b"), "").unwrap();
    let b = buckets(dir.path(), &["a", "b"]).await;
    let manifest = ObjectName::Manifest("0421".parse().unwrap());
    b.put_new(&pack(1), bytes("one")).await.unwrap();
    b.put_pointer(&manifest, "m1".into()).await.unwrap();
    let lag = b.repair_mirrors().await.unwrap();
    assert_eq!(lag.mirrors.len(), 1, "{lag:?}");

    fs::remove_file(dir.path().join("b")).unwrap();
    b.put_new(&pack(2), bytes("two")).await.unwrap();
    b.put_pointer(&manifest, "m2".into()).await.unwrap();
    assert!(!dir.path().join("b/packs/price@zone-east/0000000001.full.pack").exists());
    assert!(!dir.path().join("b/stores").exists(), "it would promise the first pack");
    assert_eq!(b.repair_mirrors().await.unwrap(), Lag::default());
    assert_eq!(b.mirrors[0].bucket.get(&manifest, 2).await.unwrap().as_deref(), Some(&b"m2"[..]));
    let theirs = b.mirrors[0].bucket.list("").await.unwrap();
    assert_eq!(theirs, b.first.list("").await.unwrap());
    assert_eq!(theirs.len(), 3);

    // Even now: a run only puts its own. A run that dies before its repair leaves the mark.
    b.put_new(&pack(3), bytes("three")).await.unwrap();
    fs::remove_file(dir.path().join("b/packs/price@zone-east/0000000003.full.pack")).unwrap();
    let after_crash = buckets(dir.path(), &["a", "b"]).await;
    assert_eq!(after_crash.repair_mirrors().await.unwrap(), Lag::default());
    assert_eq!(after_crash.mirrors[0].bucket.list("").await.unwrap().len(), 4);
}

/// While a run is under way, another process brings the mirror up and calls it even.
#[tokio::test]
async fn a_put_that_fails_after_a_repair_by_another_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let open = || buckets(dir.path(), &["a", "b"]);
    let (mirror, aside) = (dir.path().join("b"), dir.path().join("aside"));
    let run = open().await;
    run.put_new(&pack(1), bytes("one")).await.unwrap();
    assert_eq!(open().await.repair_mirrors().await.unwrap(), Lag::default());
    fs::rename(&mirror, &aside).unwrap();
    fs::write(&mirror, "").unwrap();
    run.put_new(&pack(2), bytes("two")).await.unwrap();
    assert_eq!(run.repair_mirrors().await.unwrap().mirrors.len(), 1);
    fs::remove_file(&mirror).unwrap();
    fs::rename(&aside, &mirror).unwrap();
    let next = open().await;
    assert_eq!(next.repair_mirrors().await.unwrap(), Lag::default());
    assert_eq!(next.mirrors[0].bucket.list("").await.unwrap().len(), 2);
}

#[tokio::test]
async fn one_bad_object_in_a_mirror_keeps_back_pointers_and_no_packs() {
    let dir = tempfile::tempdir().unwrap();
    let b = buckets(dir.path(), &["a", "b"]).await;
    let strange = dir.path().join("b/packs/price@zone-east/0000000001.full.pack");
    fs::create_dir_all(strange.parent().unwrap()).unwrap();
    fs::write(&strange, "another's").unwrap();
    let large = vec![7; usize::try_from(s3::SMALL).unwrap() + 1];
    for (n, bytes) in [(1, "one".into()), (2, "two".into()), (3, large.into())] {
        b.first.put_new(&pack(n), &Content::Bytes(bytes)).await.unwrap();
    }
    let manifest = ObjectName::Manifest("0421".parse().unwrap());
    b.first.put_pointer(&manifest, "m1".into(), None).await.unwrap();
    // What a crash left on its way is swept.
    fs::create_dir(&b.room).unwrap();
    let left = fs::File::create(b.room.join("left")).unwrap();
    left.set_modified(std::time::UNIX_EPOCH).unwrap();

    let lag = b.repair_mirrors().await.unwrap().mirrors;
    assert!(lag.len() == 1 && lag[0].contains("0000000001.full.pack"), "{lag:?}");
    let theirs = b.mirrors[0].bucket.list("").await.unwrap();
    assert_eq!(theirs.into_keys().collect::<Vec<_>>(), [1, 2, 3].map(pack));
    assert_eq!(fs::read_dir(&b.room).unwrap().count(), 0);
    fs::remove_file(&strange).unwrap();
    assert_eq!(b.repair_mirrors().await.unwrap(), Lag::default());
    assert_eq!(b.mirrors[0].bucket.list("").await.unwrap(), b.first.list("").await.unwrap());
}

/// As by hand, without the unit's variables; the fake is the cloud that has no keys for this machine.
#[tokio::test]
async fn a_bucket_without_keys_is_told_by_the_variable_that_is_not_set() {
    proto::fetch::install_tls();
    let (endpoint, _fake) = FakeS3::start(Conditions::Honoured).await;
    let mut config = config(&[]);
    (config.s3.endpoint, config.s3.region) = (Some(endpoint.clone()), Some("x".into()));
    let s3 = S3::build(AmazonS3Builder::new().with_metadata_endpoint(endpoint), "s3://b/pre", &config).unwrap();
    let bucket = Bucket { url: "s3://b/pre".into(), kind: Kind::S3(s3) };
    let told = bucket.probe().await.unwrap_err().to_string();
    assert!(told.contains("AWS_ACCESS_KEY_ID is not set"), "{told}");
    // Another error of a bucket with keys is told as it is.
    let (bucket, fake) = on_fake(Conditions::Honoured).await;
    *fake.ailing.lock().unwrap() = Some(http::StatusCode::FORBIDDEN);
    let told = bucket.put_new(&pack(1), &bytes("one")).await.unwrap_err().to_string();
    assert!(!told.contains("AWS_ACCESS_KEY_ID"), "{told}");
}

/// A bucket on the fake, opened as a run opens it: probed.
async fn on_fake(conditions: Conditions) -> (Bucket, Arc<FakeS3>) {
    proto::fetch::install_tls();
    let (endpoint, fake) = FakeS3::start(conditions).await;
    let bucket = open_fake(&endpoint).await;
    (bucket, fake)
}
async fn open_fake(endpoint: &str) -> Bucket {
    open_at(endpoint, "s3://b/pre").await
}
async fn open_at(endpoint: &str, url: &str) -> Bucket {
    let mut config = config(&[]);
    config.s3.endpoint = Some(endpoint.to_owned());
    config.s3.region = Some("x".into());
    let builder = AmazonS3Builder::new().with_access_key_id("a").with_secret_access_key("b");
    let mut s3 = S3::build(builder, url, &config).unwrap();
    let found = s3.probe().await.unwrap();
    s3.set_conditions(found);
    Bucket { url: url.into(), kind: Kind::S3(s3) }
}

#[tokio::test]
async fn the_same_contract_whatever_a_server_does_with_conditions() {
    for conditions in [Conditions::Honoured, Conditions::Ignored, Conditions::Refused] {
        let (b, fake) = on_fake(conditions).await;
        assert_eq!(b.probe().await.unwrap(), conditions);
        assert!(b.list("").await.unwrap().is_empty(), "a probe leaves nothing");
        fake.log.lock().unwrap().clear();
        assert_eq!(b.put_new(&pack(1), &bytes("one")).await.unwrap(), Put::New);
        let trips = fake.log.lock().unwrap().len();
        assert_eq!(trips, if conditions == Conditions::Honoured { 1 } else { 2 }, "{conditions:?}");
        assert_eq!(b.put_new(&pack(1), &bytes("one")).await.unwrap(), Put::SameThere);
        let other = b.put_new(&pack(1), &bytes("two")).await.unwrap_err();
        assert!(matches!(other, BucketError::OtherBytesThere { .. }), "{conditions:?}: {other}");
        assert_eq!(fake.get("pre/packs/price@zone-east/0000000001.full.pack").as_deref(), Some(&b"one"[..]));

        let manifest = ObjectName::Manifest("0421".parse().unwrap());
        let Pointer::Put(seen) = b.put_pointer(&manifest, "m1".into(), None).await.unwrap() else { panic!() };
        assert_eq!(b.etags("stores/").await.unwrap(), BTreeMap::from([(manifest.clone(), seen.clone().unwrap())]));
        fake.set("pre/stores/0421/manifest.json", "somebody's");
        let over = b.put_pointer(&manifest, "m2".into(), seen.as_deref()).await.unwrap();
        assert_eq!(over == Pointer::Changed, conditions == Conditions::Honoured);
        b.put_pointer(&manifest, "m2".into(), None).await.unwrap();
        assert_eq!(b.get(&manifest, 2).await.unwrap().as_deref(), Some(&b"m2"[..]));
        assert!(b.get(&manifest, 1).await.is_err());
        assert_eq!(b.get(&pack(9), 9).await.unwrap(), None);
        assert_eq!(b.hash(&pack(9)).await.unwrap(), None);
        assert_eq!(b.hash(&pack(1)).await.unwrap(), Some((3, Sha256::of(b"one"))));
        assert_eq!(b.list("packs/price@zone-east/").await.unwrap().into_iter().collect::<Vec<_>>(), [(pack(1), 3)]);
        assert_eq!(b.list("").await.unwrap().len(), 2);
        b.delete(&pack(1)).await.unwrap();
        b.delete(&pack(1)).await.unwrap();
    }
}

/// What was found out of one says nothing of the other.
#[tokio::test]
async fn the_same_url_at_another_endpoint_is_another_bucket() {
    let ((one, _fake), (other, _other)) = (on_fake(Conditions::Honoured).await, on_fake(Conditions::Ignored).await);
    assert_eq!(one.url(), other.url());
    assert_ne!(one.key(), other.key());
    let dir = tempfile::tempdir().unwrap();
    let ledger = buckets(dir.path(), &["a"]).await.ledger;
    one.remember(&ledger, Conditions::Honoured).await.unwrap();
    assert_eq!(ledger.fact(&other.condition_fact()).await.unwrap(), None);
}

/// What is remembered is what the server does, not how it was that day.
#[tokio::test]
async fn a_probe_tells_a_refusal_from_an_ailment() {
    let (b, fake) = on_fake(Conditions::Honoured).await;
    for (status, refused) in [(501, true), (400, true), (403, true), (409, false), (412, false), (503, false)] {
        *fake.ailing.lock().unwrap() = Some(http::StatusCode::from_u16(status).unwrap());
        let found = b.probe().await;
        assert_eq!(found.as_ref().ok(), refused.then_some(&Conditions::Refused), "{status}: {found:?}");
        assert!(b.list("").await.unwrap().is_empty());
    }
    *fake.ailing.lock().unwrap() = None;
    assert_eq!(b.probe().await.unwrap(), Conditions::Honoured);
}

#[tokio::test]
async fn a_large_pack_goes_in_parts_and_is_compared_by_hash() {
    let (b, fake) = on_fake(Conditions::Honoured).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("big");
    let big: Vec<u8> = (0..(s3::SMALL * 5 / 2)).map(|n| (n % 251) as u8).collect();
    fs::write(&path, &big).unwrap();
    let content = Content::File { path: &path, bytes: big.len() as u64, sha256: Sha256::of(&big) };
    assert_eq!(b.put_new(&pack(1), &content).await.unwrap(), Put::New);
    assert_eq!(fake.get("pre/packs/price@zone-east/0000000001.full.pack").unwrap(), big);
    assert_eq!(b.put_new(&pack(1), &content).await.unwrap(), Put::SameThere);
    let to = dir.path().join("back");
    assert_eq!(b.get_to_file(&pack(1), &to).await.unwrap(), Some((big.len() as u64, Sha256::of(&big))));
    assert_eq!(fs::read(&to).unwrap(), big);
    // A file that is not what its writer hashed is not put.
    let wrong = Content::File { path: &path, bytes: big.len() as u64, sha256: Sha256::of(b"x") };
    assert!(b.put_new(&pack(2), &wrong).await.unwrap_err().to_string().contains("changed while it was read"));
    assert!(b.put_new(&pack(1), &wrong).await.is_err());
    assert_eq!(fake.get("pre/packs/price@zone-east/0000000002.full.pack"), None);
}

#[tokio::test]
async fn files_that_are_not_ours_are_left_alone() {
    let (b, fake) = on_fake(Conditions::Honoured).await;
    fake.set("pre/README", "x");
    fake.set("other/packs/price@zone-east/0000000001.full.pack", "x");
    fake.set("pre/stores/0421/manifest.json", "x");
    assert_eq!(b.list("").await.unwrap().len(), 1);
    *fake.down.lock().unwrap() = true;
    let e = b.get(&pack(1), 9).await.unwrap_err().to_string();
    assert!(e.contains("cannot get packs/price@zone-east/0000000001.full.pack in s3://b/pre"), "{e}");
}

/// A ledger with store 1, and trust in `key`.
async fn begin(ledger: &Ledger, key: &proto::keys::SecretKey) {
    use proto::trust::{PublisherKey, RootKeys, Trust};
    let trust = Trust {
        format: 1,
        version: 1,
        epoch: 1,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        root: RootKeys { threshold: 1, keys: vec![key.public()] },
        publishers: vec![PublisherKey { key: key.public(), expires_at: jiff::Timestamp::MAX }],
        streams: Default::default(),
    };
    let signed = String::from_utf8(trust.sign(&[key]).unwrap()).unwrap();
    ledger.add_trust(1, &signed, jiff::Timestamp::UNIX_EPOCH, false).await.unwrap();
    ledger.add_store(&crate::ledger::StoreSeen { id: "1".parse().unwrap(), zone: None, region: None }).await.unwrap();
}

/// Signs a manifest of store 1 by `key`, as a publisher would.
async fn sign(ledger: &Ledger, key: &proto::keys::SecretKey) -> u64 {
    let store = "1".parse().unwrap();
    let mut make = |s: &crate::ledger::SignStore<'_>| {
        let serial = s.row.next_serial;
        Ok(crate::ledger::Made::New(crate::ledger::NewManifest {
            serial,
            epoch: 1,
            envelope: envelope(serial, key),
            signer: key.public().id(),
            content: Sha256::of(&serial.to_be_bytes()),
            signed_at: jiff::Timestamp::UNIX_EPOCH,
            expires_at: jiff::Timestamp::UNIX_EPOCH,
        }))
    };
    let which = crate::ledger::Which::Only(&store);
    ledger.sign(None, crate::ledger::News::default(), which, 1, jiff::Timestamp::UNIX_EPOCH, &mut make).await.unwrap();
    ledger.store(&store).await.unwrap().unwrap().serial
}

fn envelope(serial: u64, key: &proto::keys::SecretKey) -> String {
    let manifest = proto::manifest::Manifest {
        format: 1,
        store: "1".parse().unwrap(),
        serial,
        epoch: 1,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        expires_at: jiff::Timestamp::UNIX_EPOCH,
        streams: BTreeMap::new(),
        relay: None,
        registers: BTreeMap::new(),
        unread: BTreeMap::new(),
    };
    String::from_utf8(proto::trust::sign_manifest(&manifest, key).unwrap()).unwrap()
}

#[tokio::test]
async fn a_manifest_is_put_over_what_was_seen_and_a_second_ledger_is_noticed() {
    use crate::manifests::{ManifestsError, put_unfinished, telling};
    let dir = tempfile::tempdir().unwrap();
    let (first, fake) = on_fake(Conditions::Honoured).await;
    let b = Buckets { first, ..buckets(dir.path(), &["unused"]).await };
    let l = b.ledger.clone();
    let key = proto::keys::SecretKey::from_seed([1; 32]);
    begin(&l, &key).await;
    let there = || String::from_utf8(fake.get("pre/stores/1/manifest.json").unwrap().to_vec()).unwrap();

    sign(&l, &key).await;
    assert_eq!(put_unfinished(&l, &b, None).await.unwrap(), 1);
    assert_eq!((there(), put_unfinished(&l, &b, None).await.unwrap()), (envelope(1, &key), 0));
    // A slow put of an older one, or garbage, landed since: put right.
    for landed in [envelope(1, &key), "garbage".into(), envelope(99, &proto::keys::SecretKey::from_seed([2; 32]))] {
        fake.set("pre/stores/1/manifest.json", Box::leak(landed.into_boxed_str()));
        let serial = sign(&l, &key).await;
        put_unfinished(&l, &b, None).await.unwrap();
        assert_eq!(there(), envelope(serial, &key));
    }
    // One by our key and ahead of us is another ledger's: told, left there, and passed.
    fake.set("pre/stores/1/manifest.json", Box::leak(envelope(50, &key).into_boxed_str()));
    sign(&l, &key).await;
    let e = put_unfinished(&l, &b, None).await.unwrap_err();
    let ManifestsError::Overtaken(all) = &e else { panic!("{e}") };
    assert_eq!(all.iter().map(|o| (o.found, o.ours)).collect::<Vec<_>>(), [(50, 5)]);
    assert_eq!(there(), envelope(50, &key));
    // A run that dies before it is told finds it again.
    assert!(put_unfinished(&l, &b, None).await.is_err() && l.unsent_mails().await.unwrap().is_empty());
    let clock = proto::clock::TestClock::at("2026-01-01T00:00:00Z");
    telling(&l, &clock, Err::<(), _>(e)).await.unwrap_err();
    assert_eq!(l.unsent_mails().await.unwrap().len(), 1);
    assert_eq!(sign(&l, &key).await, 51);
    put_unfinished(&l, &b, None).await.unwrap();
    assert_eq!(there(), envelope(51, &key));
}

/// While one program puts a list, another of ours signs the next; it puts that, or dies before. The older one lands last.
#[tokio::test]
async fn a_list_that_lands_after_the_next_was_signed_is_not_left_there() {
    use crate::manifests::put_unfinished;
    let name = "pre/stores/1/manifest.json";
    for conditions in [Conditions::Honoured, Conditions::Ignored, Conditions::Refused] {
        for (is_first, next_is_put) in [(true, true), (true, false), (false, true), (false, false)] {
            let what = format!("{conditions:?}, the first: {is_first}, the next was put: {next_is_put}");
            let dir = tempfile::tempdir().unwrap();
            let (first, fake) = on_fake(conditions).await;
            let b = Buckets { first, ..buckets(dir.path(), &["unused"]).await };
            let (l, key) = (b.ledger.clone(), proto::keys::SecretKey::from_seed([1; 32]));
            begin(&l, &key).await;
            let there = || String::from_utf8(fake.get(name).unwrap().to_vec()).unwrap();
            assert_eq!(put_unfinished(&l, &b, None).await.unwrap(), 0, "trust is there");
            if !is_first {
                sign(&l, &key).await;
                put_unfinished(&l, &b, None).await.unwrap();
            }
            fake.log.lock().unwrap().clear();
            let is_on_its_way = || fake.log.lock().unwrap().contains(&format!("PUT {name}"));
            let older = sign(&l, &key).await;
            let (land, late) = tokio::sync::oneshot::channel();
            *fake.late.lock().unwrap() = Some(late);
            let other = async {
                while !is_on_its_way() {
                    tokio::task::yield_now().await;
                }
                let next = sign(&l, &key).await;
                if next_is_put {
                    put_unfinished(&l, &b, None).await.unwrap();
                    assert_eq!(there(), envelope(next, &key), "{what}");
                }
                land.send(()).unwrap();
                next
            };
            let both = async { tokio::join!(put_unfinished(&l, &b, None), other) };
            let (put, next) = tokio::time::timeout(tillcast_tests::PATIENCE, both).await.expect(&what);
            put.unwrap();
            assert_eq!((next, there()), (older + 1, envelope(next, &key)), "{what}");
            let row = l.store(&"1".parse().unwrap()).await.unwrap().unwrap();
            assert_eq!((row.serial, row.put_serial), (next, next), "{what}");
        }
    }
}

/// A manifest that lies in the bucket otherwise than it was put is put again, and only such a one is read.
#[tokio::test]
async fn an_older_manifest_that_was_put_back_is_replaced() {
    use crate::manifests::{ManifestsError, put_again, put_unfinished, telling};
    for conditions in [Conditions::Honoured, Conditions::Refused] {
        let dir = tempfile::tempdir().unwrap();
        let (first, fake) = on_fake(conditions).await;
        let b = Buckets { first, ..buckets(dir.path(), &["unused"]).await };
        let (l, key) = (b.ledger.clone(), proto::keys::SecretKey::from_seed([1; 32]));
        begin(&l, &key).await;
        let name = "pre/stores/1/manifest.json";
        let there = || fake.get(name).map(|b| String::from_utf8(b.to_vec()).unwrap());
        let reads = || fake.log.lock().unwrap().drain(..).filter(|r| r == &format!("GET {name}")).count();

        sign(&l, &key).await;
        sign(&l, &key).await;
        put_unfinished(&l, &b, None).await.unwrap();
        reads();
        put_again(&l, &b, None).await.unwrap();
        assert_eq!((there(), reads()), (Some(envelope(2, &key)), 0));
        for landed in [Some(envelope(1, &key)), Some("garbage".into()), None] {
            match landed {
                Some(landed) => fake.set(name, Box::leak(landed.into_boxed_str())),
                None => fake.remove(name),
            }
            put_again(&l, &b, None).await.unwrap();
            assert_eq!(there(), Some(envelope(2, &key)), "{conditions:?}");
        }
        reads();
        put_again(&l, &b, None).await.unwrap();
        assert_eq!(reads(), 0);
        // One that is ahead of us is left, and the next is signed above it.
        fake.set(name, Box::leak(envelope(50, &key).into_boxed_str()));
        let e = put_again(&l, &b, None).await.unwrap_err();
        let ManifestsError::Overtaken(all) = &e else { panic!("{e}") };
        assert_eq!(all.iter().map(|o| (o.found, o.ours)).collect::<Vec<_>>(), [(50, 2)]);
        let clock = proto::clock::TestClock::at("2026-01-01T00:00:00Z");
        telling(&l, &clock, Err::<(), _>(e)).await.unwrap_err();
        assert_eq!((there(), sign(&l, &key).await), (Some(envelope(50, &key)), 51));
    }
}

/// What was on its way to a mirror when too many copies failed is no rest on the disk.
#[tokio::test]
async fn copies_that_a_mirror_refuses_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let b = buckets(dir.path(), &["a", "b"]).await;
    let large = Bytes::from(vec![7; usize::try_from(s3::SMALL).unwrap() + 1]);
    for n in 1..16 {
        b.first.put_new(&pack(n), &Content::Bytes(large.clone())).await.unwrap();
    }
    fs::create_dir(dir.path().join("b")).unwrap();
    fs::write(dir.path().join("b/packs"), "no directory").unwrap();
    let lag = b.repair_mirrors().await.unwrap().mirrors;
    assert_eq!(lag.len(), 1, "{lag:?}");
    assert_eq!(fs::read_dir(&b.room).unwrap().count(), 0);
}

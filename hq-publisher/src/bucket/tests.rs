#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
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
        ledger,
        limits: Limits::default(),
        concurrency: 4,
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
    assert!(!dir.path().join("b/packs/price@zone-east/0000000001.full.pack").exists());
    assert_eq!(b.repair_mirrors().await.unwrap(), Lag::default());
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

//! Old objects that every later reader must read: registers in hundreds of stores upgrade slowly. A folder of
//! `museum/` is a bucket as some release wrote it; `about.json` has the root key and the digests that its rows have,
//! computed without this code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use proto::chain;
use proto::clock::Timestamp;
use proto::ids::{StoreId, StreamName, Version};
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::replica::{Job, PackFile, Replica};
use proto::trust::{Accepted, RootKeys, Seen, TrustState, accept_manifest};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The exhibits. A folder that is not listed here is not looked at: add it.
const EXHIBITS: [&str; 1] = ["2026-11-first"];

#[derive(Deserialize)]
struct About {
    store: StoreId,
    root: String,
    signed_at: Timestamp,
    stream: StreamName,
    digests: BTreeMap<u64, String>,
}

fn museum() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/museum")
}

fn read(dir: &Path, name: &ObjectName) -> Vec<u8> {
    std::fs::read(dir.join(name.to_string())).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Walks the trust files from the pinned root and accepts the manifest, as a device did then.
fn manifest(dir: &Path, about: &About, limits: &Limits) -> Accepted {
    let roots = RootKeys { threshold: 1, keys: vec![about.root.parse().unwrap()] };
    let mut trust = TrustState::pinned(roots, 1);
    let claimed = TrustState::claimed_version(&read(dir, &ObjectName::Trust), limits).unwrap();
    for n in trust.steps_to(claimed, limits).unwrap() {
        trust = trust.step(&read(dir, &ObjectName::TrustVersion(n)), limits).unwrap();
    }
    let envelope = read(dir, &ObjectName::Manifest(about.store.clone()));
    accept_manifest(&envelope, &about.store, &trust, &Seen::default(), about.signed_at, limits).unwrap()
}

#[test]
fn every_exhibit_is_listed() {
    let mut found: Vec<String> =
        std::fs::read_dir(museum()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, EXHIBITS);
}

#[test]
fn every_exhibit_is_read_to_its_digests() {
    for exhibit in EXHIBITS {
        let dir = museum().join(exhibit);
        let about: About = serde_json::from_slice(&std::fs::read(dir.join("about.json")).unwrap()).unwrap();
        let limits = Limits::default();
        let accepted = manifest(&dir, &about, &limits);
        let entry = &accepted.manifest.streams[&about.stream];
        let instance = accepted.manifest.instance(&about.stream).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let mut replica = Replica::open(&scratch.path().join("replica.db"), &limits).unwrap();
        let mut from = None;
        for (version, digest) in &about.digests {
            let version = Version::try_from(*version).unwrap();
            let way = chain::cheapest(&entry.packs, from, version, |_| true).unwrap();
            let paths: Vec<PathBuf> =
                way.iter().map(|p| dir.join(ObjectName::from(p.name(&instance)).to_string())).collect();
            let packs: Vec<PackFile<'_>> =
                way.iter().zip(&paths).map(|(entry, path)| PackFile { path, entry }).collect();
            let job =
                Job { instance: &instance, epoch: 1, packs: &packs, now: about.signed_at, prove: false, listed: None };
            replica.apply(&job).unwrap_or_else(|e| panic!("{exhibit}: {e}"));
            let checks = replica.verify(&about.stream).unwrap();
            assert_eq!(checks[0].found.unwrap().to_string(), *digest, "{exhibit}, version {version}");
            from = Some(version);
        }
        assert_eq!(from, Some(entry.version));
    }
}

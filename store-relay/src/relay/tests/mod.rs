//! A relay's rounds against headquarters in a directory, whose packs and disk are bent, lost and cut.
#![allow(clippy::disallowed_methods)]

use super::*;
use crate::kit::{Hq, Make, Store, now, rooms_of, secret, served, state, v};
use crate::steps::Moment;
use crate::trial::remove_database;
use proto::digest::StateDigest;
use proto::layout::PackKind::{Delta, Full};
use proto::replica::Replica;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use tillcast_tests::files;

mod disk;
mod refused;
mod rounds;
mod shadow;
mod sources;

const HOUR: Duration = Duration::from_secs(3600);

/// A headquarters with two streams at version 1, and a store that reads its bucket.
fn two_streams() -> (Hq, Store) {
    let mut hq = Hq::new();
    hq.follow("price", "zone-east");
    hq.follow("promo", "all");
    hq.publish("price", &[(1, Some("a")), (2, Some("b"))], Make::Full);
    hq.publish("promo", &[(7, Some("x"))], Make::Full);
    hq.sign();
    let store = Store::enrolled(&[hq.url()]);
    (hq, store)
}

fn bent(d: StateDigest) -> StateDigest {
    let mut other = d;
    other.add(proto::digest::RowHasher::default().hash(&[proto::value::Value::Int(0)]));
    other
}

fn shadow_digest(relay: &Relay, stream: &str) -> String {
    let replica = Replica::open_read_only(relay.shadow.path(), &relay.hall.config.limits).unwrap();
    let checks = replica.verify(&stream.parse().unwrap()).unwrap();
    checks[0].found.unwrap().to_string()
}

fn fault_codes(relay: &Relay) -> Vec<String> {
    state(relay).all_faults().into_iter().map(|f| f.code).collect()
}

async fn once(relay: &Relay) -> Round {
    relay.mirror_once(Pace::Once).await
}

pub(crate) fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

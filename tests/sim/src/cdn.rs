//! The bucket as it is read over HTTP, and a cache in front of it that may lag, hide what is new, and keep what it
//! got wrong.

use crate::clock::Ms;
use crate::disk;
use crate::net::{Answer, Question};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tillcast_tests::Dice;

/// One state of an object, and since when it is there.
#[derive(Debug, Clone)]
struct State {
    since: Ms,
    bytes: Bytes,
}

/// The cache.
#[derive(Debug)]
pub struct Cdn {
    bucket: PathBuf,
    /// All states of every object that was ever there; empty bytes: deleted.
    seen: BTreeMap<String, Vec<State>>,
    /// Answers are as old as this.
    pub lag: Ms,
    /// Until when it lags.
    pub lag_until: Ms,
    /// Copies that went wrong, until they are fetched again.
    wrong: BTreeMap<String, Bytes>,
}

impl Cdn {
    /// An empty cache in front of a directory.
    pub fn new(bucket: &Path) -> Cdn {
        Cdn { bucket: bucket.to_owned(), seen: BTreeMap::new(), lag: 0, lag_until: 0, wrong: BTreeMap::new() }
    }

    /// Looks at what the bucket holds now.
    pub fn look(&mut self, now: Ms) {
        let mut there = BTreeMap::new();
        for path in disk::files(&self.bucket) {
            let name = path.strip_prefix(&self.bucket).unwrap().to_string_lossy().into_owned();
            if !name.contains("/.") && !name.starts_with('.') {
                there.insert(name, Bytes::from(std::fs::read(&path).unwrap()));
            }
        }
        for gone in self.seen.keys().filter(|n| !there.contains_key(*n)).cloned().collect::<Vec<_>>() {
            there.insert(gone, Bytes::new());
        }
        for (name, bytes) in there {
            let states = self.seen.entry(name).or_default();
            if states.last().is_none_or(|s| s.bytes != bytes) {
                states.push(State { since: now, bytes });
            }
        }
    }

    /// The packs that are there.
    pub fn packs(&self) -> Vec<String> {
        self.seen.keys().filter(|n| n.starts_with("packs/")).cloned().collect()
    }

    /// The cache's copy of an object goes wrong, and stays so until [`Cdn::purge`].
    pub fn spoil(&mut self, name: &str, dice: &mut Dice) {
        let Some(state) = self.seen.get(name).and_then(|s| s.last()).filter(|s| !s.bytes.is_empty()) else { return };
        let mut bytes = state.bytes.to_vec();
        match dice.below(3) {
            0 => bytes.truncate(dice.index(bytes.len())),
            1 => bytes.push(0),
            _ => {
                let at = dice.index(bytes.len());
                bytes[at] ^= 1 << dice.below(8);
            }
        }
        self.wrong.insert(name.to_owned(), bytes.into());
    }

    /// Whether any copy is wrong.
    pub fn is_wrong(&self) -> bool {
        !self.wrong.is_empty()
    }

    /// Everything is as in the bucket again.
    pub fn purge(&mut self) {
        self.lag_until = 0;
        self.wrong.clear();
    }

    /// Answers a question: as the bucket, or as the cache.
    pub fn answer(&self, question: &Question, cached: bool, now: Ms) -> Answer {
        let (path, query) = question.path.split_once('?').unwrap_or((&question.path, ""));
        let name = path.trim_start_matches('/');
        // A serial in the query is another entry to a cache: it asks the bucket.
        let is_old = cached && now < self.lag_until && !query.contains("serial=");
        let then = if is_old { now.saturating_sub(self.lag) } else { now };
        let state = self.seen.get(name).and_then(|s| s.iter().rfind(|s| s.since <= then));
        let state = state.map(|s| s.bytes.clone()).filter(|b| !b.is_empty());
        let bytes = if cached { self.wrong.get(name).cloned().or(state) } else { state };
        let Some(bytes) = bytes else { return Answer::new(404, "not here") };
        let etag = format!("\"{}\"", hex::encode(&Sha256::digest(&bytes)[..8]));
        let header = |n: &str| question.headers.get(n).and_then(|v| v.to_str().ok());
        if header("if-none-match") == Some(&etag) {
            return Answer::new(304, "").with("etag", etag);
        }
        let length = bytes.len();
        let start = header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        match start {
            Some(start) if start >= length => Answer::new(416, "").with("content-range", format!("bytes */{length}")),
            Some(start) => Answer::new(206, bytes.slice(start..))
                .with("etag", etag)
                .with("content-range", format!("bytes {start}-{}/{length}", length - 1)),
            None => Answer::new(200, bytes).with("etag", etag),
        }
    }
}

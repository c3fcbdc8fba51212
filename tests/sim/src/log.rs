//! The log of what happened, and its hash: two runs of a seed must agree to the byte.

use crate::clock::Ms;
use sha2::{Digest as _, Sha256};

/// Lines, and the hash of all of them.
#[derive(Debug)]
pub struct Log {
    hash: Sha256,
    /// What happened, a line each.
    pub lines: Vec<String>,
    loud: bool,
}

impl Log {
    /// An empty log; a loud one is printed as it grows.
    pub fn new(loud: bool) -> Log {
        Log { hash: Sha256::new(), lines: Vec::new(), loud }
    }
    /// Takes a line down.
    pub fn write(&mut self, now: Ms, line: &str) {
        let line = format!("{:>10.3} {line}", now as f64 / 1000.0);
        if self.loud {
            println!("{line}");
        }
        self.hash.update(line.as_bytes());
        self.hash.update(b"\n");
        self.lines.push(line);
    }
    /// The hash so far, 16 hex digits.
    pub fn hash(&self) -> String {
        hex::encode(&self.hash.clone().finalize()[..8])
    }
}

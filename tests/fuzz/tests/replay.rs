//! The corpus of every fuzz target, and some thousand mutations of it from a fixed seed: what the fuzzer found once
//! stays mended, and each target still runs. `tests/fuzz/run` is the search itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tillcast_fuzz::TARGETS;
use tillcast_tests::Dice;

/// One change of a few kinds; `other` is another input to take a piece from.
fn change(dice: &mut Dice, input: &mut Vec<u8>, other: &[u8]) {
    const ODD: [&[u8]; 12] =
        [b"\0", b"\n", b"\"", b"0", b"-", b",", b"{", b"]", b"null", b"9223372036854775808", b"\xff", "é".as_bytes()];
    let at = dice.index(input.len() + 1);
    let end = (at + 1 + dice.index(8)).min(input.len());
    match dice.index(6) {
        0 if at < input.len() => input[at] ^= 1 << dice.index(8),
        1 => drop(input.drain(at.min(end)..end)),
        2 => drop(input.splice(at..at, ODD[dice.index(ODD.len())].iter().copied())),
        3 => {
            let piece = input[at.min(end)..end].to_vec();
            input.splice(at..at, piece);
        }
        4 => {
            let from = dice.index(other.len() + 1);
            let piece = &other[from..(from + 1 + dice.index(40)).min(other.len()).max(from)];
            input.splice(at..at, piece.iter().copied());
        }
        _ => input.truncate(at),
    }
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<_> =
        entries.map(|e| e.unwrap().path()).map(|p| (p.clone(), std::fs::read(&p).unwrap())).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    files
}

/// Runs one input; a find is kept as a file, to be put into the corpus when it is mended.
fn hold(target: &str, input: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| tillcast_fuzz::run(target, input))).is_err() {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("find-{target}"));
        std::fs::write(&file, input).unwrap();
        panic!("{target}: {what} is a find, kept as {}: {}", file.display(), String::from_utf8_lossy(input));
    }
}

fn replay(target: &str, mutations: usize) {
    let files = corpus(target);
    for (path, input) in &files {
        hold(target, input, &path.display().to_string());
    }
    let mut dice = Dice::new(2026);
    for n in 0..mutations {
        let (mut input, other) = (files[dice.index(files.len())].1.clone(), &files[dice.index(files.len())].1);
        (0..=dice.index(4)).for_each(|_| change(&mut dice, &mut input, other));
        hold(target, &input, &format!("mutation {n}"));
    }
}

macro_rules! replays {
    ($($target:ident $mutations:literal)*) => {
        $(#[test]
        fn $target() {
            replay(stringify!($target), $mutations);
        })*

        #[test]
        fn every_target_is_replayed() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($target)),*]);
        }
    };
}

replays! {
    answers 6000
    apply 1000
    code 4000
    config 3000
    contract 1000
    csv 6000
    dsse 3000
    manifest 2000
    names 10000
    ndjson 6000
    pack 1000
    range 6000
    trust 1500
    wire 3000
}

//! Bodies of the fuzz targets: one function for every parser that meets bytes from outside. Each is more than "no
//! panic": what is accepted reads back as it was written, is within its limits, is read alike in whatever pieces it
//! comes, and agrees with a second reader that shares no code with the product, where one is cheap. libFuzzer drives
//! them (`tests/fuzz/run`), and `tests/replay.rs` holds the corpus and some thousand seeded mutations of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "test code: a panic here is a find"
)]

mod answers;
mod apply;
mod config;
mod contract;
mod inbox;
mod model;
mod names;
mod pack;
mod range;
mod signed;
mod wire;

/// A target: anything goes in; a panic is a find.
pub type Target = fn(&[u8]);

/// Every target by name; the name of its corpus, too.
pub const TARGETS: [(&str, Target); 14] = [
    ("answers", answers::answers),
    ("apply", apply::apply),
    ("code", signed::code),
    ("config", config::config),
    ("contract", contract::contract),
    ("csv", inbox::csv),
    ("dsse", signed::dsse),
    ("manifest", signed::manifest),
    ("names", names::names),
    ("ndjson", inbox::ndjson),
    ("pack", pack::pack),
    ("range", range::range),
    ("trust", signed::trust),
    ("wire", wire::wire),
];

/// Runs one target on one input.
pub fn run(target: &str, data: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    found.unwrap_or_else(|| panic!("there is no target {target}")).1(data);
}

/// Hands out a slice in pieces of a few bytes, so that every state of a reader crosses a buffer's end.
struct Drip<'a>(&'a [u8]);

impl std::io::Read for Drip<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = (1 + self.0.len() % 7).min(self.0.len()).min(buf.len());
        buf[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

/// The input's text before and after the first line `---`.
fn halves(text: &str) -> (&str, &str) {
    text.split_once("\n---\n").unwrap_or((text, ""))
}

/// A directory in memory where there is one: some targets write a file for each input.
fn scratch_dir() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("tillcast-fuzz-").tempdir_in(dir).unwrap()
}

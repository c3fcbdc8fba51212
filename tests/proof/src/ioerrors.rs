//! stub
#[allow(missing_docs)]
pub struct Options { pub runs: usize, pub seed: u64, pub scenes: Vec<String>, pub workers: usize, pub verbose: bool }
#[allow(missing_docs)]
pub struct Report { pub violations: Vec<String> }
impl std::fmt::Display for Report { fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { Ok(()) } }
#[allow(missing_docs)]
pub fn run(_: &Options) -> Report { todo!() }

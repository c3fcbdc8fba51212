//! Placeholder.
/// x
#[derive(Debug)]
pub struct Site;

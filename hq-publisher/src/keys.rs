//! Key files: `root-N.key` and `publisher-N.key` in `state.dir/keys`, 64 hex digits, readable by
//! their owner alone.

/// A key file is missing or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// For people.
    #[error("{0}")]
    Keys(String),
}

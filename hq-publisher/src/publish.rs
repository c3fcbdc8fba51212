//! (to come)

use crate::config::Config;
use proto::clock::Clock;
use proto::ids::StreamName;
use serde::Serialize;

/// What `publish` was asked to do.
#[derive(Debug, Clone, Default)]
pub struct PublishOptions {
    /// Only this stream.
    pub stream: Option<StreamName>,
    /// Tell what would change, publish nothing, mail nothing.
    pub dry_run: bool,
    /// Make fulls.
    pub full: bool,
    /// Let tables shrink: `None` no, `Some(None)` any stream, `Some(Some(s))` that stream.
    pub allow_shrink: Option<Option<StreamName>>,
    /// Let a contract change that needs a rebuild by full.
    pub allow_rebuild: bool,
    /// The clock is right though the ledger is old.
    pub clock_is_right: bool,
    /// Show progress bars on stderr.
    pub progress: bool,
}

/// What `publish` did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PublishReport {}

/// Why `publish` did nothing at all.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// To come.
    #[error("to come")]
    ToCome,
}

/// Publishes what changed.
pub async fn run(config: &Config, options: &PublishOptions, clock: &dyn Clock) -> Result<PublishReport, PublishError> {
    let _ = (config, options, clock);
    todo!()
}

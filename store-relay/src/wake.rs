//! The long poll to headquarters: when it says that something has changed, the mirror looks at the sources at once.
//! Carries no data and decides nothing; when headquarters is dead, sources are only polled. Holds nothing
//! that a restart would miss.

use crate::hall::Hall;
use proto::fetch::{Etag, FetchError, Polled, Source};
use proto::retry::{Backoff, random_unit};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// Seconds that one poll waits.
const WAIT_S: u64 = 30;
/// From a second to a minute, with jitter, so that a chain of stores does not come back in step.
const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
/// Headquarters without a wake page is asked again after this.
const NO_PAGE: Duration = Duration::from_secs(300);

/// One poll; the ETag to ask with next.
pub async fn poll_once(hall: &Hall, hq: &Source, known: Option<Etag>) -> Result<Asked, FetchError> {
    let query = [("store", hall.config.store.as_str())];
    let polled = hq.long_poll("v1/wake", &query, WAIT_S, known.as_ref()).await?;
    if polled != Polled::NoSuchPage {
        hall.state().hq_seen = Some(hall.clock.monotonic());
    }
    Ok(match polled {
        Polled::Unchanged => Asked::Quiet(known),
        Polled::NoSuchPage => Asked::NoPage,
        Polled::Body { bytes, etag } => {
            hall.state().hint = serde_json::from_slice::<Woken>(&bytes).ok().map(|w| w.serial);
            hall.wake.notify_one();
            Asked::News(etag)
        }
    })
}

/// What a wake-up says: enough to get past a stale cache, nothing to be believed.
#[derive(Debug, Deserialize)]
struct Woken {
    serial: u64,
}

/// What a poll said.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing new.
    Quiet(Option<Etag>),
    /// Something has changed.
    News(Option<Etag>),
    /// There is no such page.
    NoPage,
}

/// Polls until the process ends.
pub async fn run(hall: Arc<Hall>, hq: Source) {
    let (mut known, mut failures) = (None, 0);
    loop {
        let asked = tokio::select! {
            asked = poll_once(&hall, &hq, known.clone()) => asked,
            () = hall.stop.cancelled() => return,
        };
        let pause = match asked {
            Ok(Asked::Quiet(etag)) => {
                (known, failures) = (etag, 0);
                Duration::ZERO
            }
            Ok(Asked::News(etag)) => {
                failures = 0;
                // A server without ETags would answer at once for ever.
                let pause = if etag.is_none() { Duration::from_secs(1) } else { Duration::ZERO };
                known = etag;
                pause
            }
            Ok(Asked::NoPage) => NO_PAGE,
            Err(e) => {
                if failures == 0 {
                    tracing::warn!(error = %e, "headquarters does not answer; sources are polled");
                }
                failures += 1;
                BACKOFF.delay(failures, random_unit())
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = hall.stop.cancelled() => return,
        }
    }
}

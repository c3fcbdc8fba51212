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

/// What answers polls at once for ever (a proxy, a server without ETags) is not asked more often than this.
const GAP: Duration = Duration::from_millis(500);
/// So many news in a row may come at once.
const BURST: u32 = 8;

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

/// The pause after an answer, which took so long; `quick` counts those in a row that came at once.
fn pause(asked: &Asked, took: Duration, quick: &mut u32) -> Duration {
    *quick = if took < GAP { *quick + 1 } else { 0 };
    match asked {
        Asked::NoPage => NO_PAGE,
        // A server without ETags would answer at once for ever.
        Asked::News(None) => Duration::from_secs(1),
        Asked::News(Some(_)) if *quick <= BURST => Duration::ZERO,
        Asked::Quiet(_) if *quick == 0 => Duration::ZERO,
        Asked::News(_) | Asked::Quiet(_) => GAP,
    }
}

/// Polls until the process ends.
pub async fn run(hall: Arc<Hall>, hq: Source) {
    let (mut known, mut failures, mut quick) = (None, 0, 0);
    loop {
        let started = hall.clock.monotonic();
        let asked = tokio::select! {
            asked = poll_once(&hall, &hq, known.clone()) => asked,
            () = hall.stop.cancelled() => return,
        };
        let pause = match asked {
            Ok(asked) => {
                if failures > 0 {
                    tracing::info!("headquarters answers again");
                }
                failures = 0;
                let pause = pause(&asked, hall.clock.monotonic().saturating_sub(started), &mut quick);
                if let Asked::Quiet(etag) | Asked::News(etag) = asked {
                    known = etag;
                }
                pause
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_answers_at_once_for_ever_is_not_asked_without_end() {
        let (mut quick, at_once, long) = (0, Duration::from_millis(3), Duration::from_secs(30));
        let quiet = Asked::Quiet(Some(Etag("\"1\"".into())));
        let news = Asked::News(Some(Etag("\"2\"".into())));
        assert_eq!(pause(&quiet, long, &mut quick), Duration::ZERO);
        assert_eq!(pause(&quiet, at_once, &mut quick), GAP, "it was to wait");
        assert_eq!(pause(&news, long, &mut quick), Duration::ZERO);
        for _ in 0..BURST {
            assert_eq!(pause(&news, at_once, &mut quick), Duration::ZERO, "several publishes in a row");
        }
        assert_eq!(pause(&news, at_once, &mut quick), GAP);
        assert_eq!(pause(&news, long, &mut quick), Duration::ZERO);
    }
}

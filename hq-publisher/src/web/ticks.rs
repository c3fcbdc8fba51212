//! What the loops of `serve` do once. Each is safe to run at any time, twice, or by two processes.

use super::App;
use crate::alert::{self, Notice};
use crate::bucket::Buckets;
use crate::fleet::{self, Fleet, long};
use crate::ledger::{Change, Kind, LedgerError};
use crate::mail;
use crate::manifests::{self, Followed, ManifestsError, Signer};
use crate::publish::{NOT_RUN, host};
use proto::clock::{Timestamp, after, since};
use proto::disk::DataDisk;
use proto::failpoint;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Wakes who waits, if the number of puts is not `known`; the number now.
pub async fn wake(app: &App, known: Option<Change>) -> Result<Change, LedgerError> {
    let now = app.ledger.change().await?;
    if known != Some(now) {
        app.wakes.refresh(&app.ledger).await?;
    }
    Ok(now)
}

/// Judges the fleet; opens and closes episodes, with their mails.
pub async fn alerts(app: &App) -> Result<(), String> {
    judge(app).await.map_err(|e| e.to_string())?;
    *app.judged.lock().unwrap_or_else(PoisonError::into_inner) = Some(app.clock.monotonic());
    Ok(())
}

async fn judge(app: &App) -> Result<(), LedgerError> {
    let (ledger, now) = (&app.ledger, app.clock.now());
    if ledger.kind() == Kind::Postgres {
        app.intake.read_ledger().await?;
    }
    let told = ledger.unjudged().await?;
    app.intake.expect(&*ledger.serials().await?);
    let own_disk = DataDisk::new(&app.config.state.dir, None).space();
    // Whoever does not judge may have to the next time: what nobody could hear is no silence then, either.
    let (at, last) = (app.clock.monotonic(), *app.judged.lock().unwrap_or_else(PoisonError::into_inner));
    let blind = last.map_or(Duration::ZERO, |last| at.saturating_sub(last));
    let deaf_for = app.intake.watch_on(blind.saturating_sub(app.config.serve.alert_tick.0 * 3));
    if !is_judge(app).await? {
        // The judge sees its own disk only.
        let low = own_disk.is_some_and(|d| fleet::is_low(&d, &app.config.alerts));
        if turns(&app.disk_was_low, low) {
            tracing::warn!("the disk of {} is nearly full", app.config.state.dir.display());
        }
        return Ok(());
    }
    let enrolled = ledger.enrolled().await?;
    let views = app.intake.news(&enrolled, &told);
    let published = app.intake.published(&views).await?;
    let expiring = ledger.expiring(after(now, app.config.alerts.manifest_expires.0)).await?;
    let serials = ledger.serials().await?;
    let fleet = Fleet {
        devices: &views,
        complaints: &told,
        published: &published,
        serials: &serials,
        expiring: &expiring,
        own_disk,
        deaf_for,
        alerts: &app.config.alerts,
        now,
    };
    let assessment = fleet::assess(&fleet);
    app.intake.note_calm(fleet::calm(&fleet));
    let due = alert::due(&assessment, &ledger.open_episodes("").await?, now);
    for Notice { episodes, subject, .. } in &due.open {
        tracing::warn!(episodes = episodes.len(), "{subject}");
    }
    for n in &due.open {
        ledger.open_many(&n.episodes, &mail::compose(n, now), now).await?;
    }
    for n in &due.close {
        tracing::info!("{}", n.subject);
        ledger.close_many(&n.episodes, &mail::compose(n, now), now).await?;
    }
    ledger.judged(&told).await
}

/// Whether it is so now and was not before.
fn turns(was: &AtomicBool, now: bool) -> bool {
    !was.swap(now, Ordering::Relaxed) && now
}

/// Several processes on one ledger would each know best what they heard themselves, and contradict each other by mail: one
/// judges, the others know enough to go on when it falls silent. Started anew it goes on at once.
async fn is_judge(app: &App) -> Result<bool, LedgerError> {
    if app.ledger.kind() == Kind::Sqlite {
        return Ok(true);
    }
    let me = format!("{}:{} at {}", host(), app.config.state.dir.display(), app.config.serve.listen);
    let patience = app.config.serve.alert_tick.0 * 3 + Duration::from_secs(15);
    app.ledger.take_turn("judge", &me, app.clock.now(), patience).await
}

/// Sends what is in the outbox.
pub async fn mails(app: &App) -> Result<(), String> {
    match app.post.deliver(&app.ledger, app.clock.as_ref()).await {
        Ok(None) => Ok(()),
        Ok(Some(down)) => Err(format!("the server cannot be used, mails wait: {down}")),
        Err(e) => Err(e.to_string()),
    }
}

/// Writes the mail that only says that mails arrive, when it is due.
pub async fn self_test(app: &App) -> Result<(), String> {
    app.post.self_test(&app.ledger, app.clock.as_ref()).await.map_err(|e| e.to_string())
}

/// A sign of life to whoever watches the watcher; none while the fleet is not judged.
pub async fn ping(app: &App) -> Result<(), String> {
    let patience = app.config.serve.alert_tick.0 * 3 + Duration::from_secs(60);
    let judged = app.judged.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_default();
    if app.clock.monotonic().saturating_sub(judged) > patience {
        return Err("the fleet has not been judged for long: no sign of life is given".into());
    }
    app.post.hooks().ping().await
}

/// Notes the time in the ledger, whatever becomes of buckets: days without them are no leap of the clock. One that leapt
/// while this runs is left to whoever signs next.
pub async fn time(app: &App) -> Result<(), String> {
    let (now, at) = (app.clock.now(), app.clock.monotonic());
    let latest = app.ledger.latest_time().await.map_err(|e| e.to_string())?;
    let noted = *app.noted.lock().unwrap_or_else(PoisonError::into_inner);
    if !runs_on(noted, (now, at), latest, app.config.publish.clock_leap.0) {
        return Err(format!(
            "the clock says {now}: it leapt, or nothing ran here for long. The ledger's time is not noted until a command \
             finds it right (publish --clock-is-right, if it is)"
        ));
    }
    app.ledger.touch(now).await.map_err(|e| e.to_string())?;
    *app.noted.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, at));
    Ok(())
}

/// What a time server may correct between two looks: more is a leap.
const CORRECTED: Duration = Duration::from_secs(300);

/// Whether the wall clock goes on from where it was noted, as the monotonic one did; or from the ledger's time, which
/// others judge and note, too.
fn runs_on(
    noted: Option<(Timestamp, Duration)>,
    (now, at): (Timestamp, Duration),
    latest: Option<Timestamp>,
    leap: Duration,
) -> bool {
    let is_near = |t: Timestamp| since(now, t).max(since(t, now)) <= CORRECTED;
    match (noted, latest) {
        (_, Some(latest)) if is_near(latest) => true,
        (Some((then, at_then)), _) => is_near(after(then, at.saturating_sub(at_then))),
        (None, Some(latest)) => now > latest && since(now, latest) <= leap,
        (None, None) => true,
    }
}

/// Counts for how long no publish went through, and mails when that is too long: its timer is off, or it dies each time.
/// What was not watched does not count: headquarters was off then, and its timer too. A publish ends it.
pub async fn publishes(app: &App) -> Result<(), String> {
    watch_publishes(app).await.map_err(|e| e.to_string())
}

async fn watch_publishes(app: &App) -> Result<(), LedgerError> {
    let limit = app.config.alerts.no_publish;
    if limit.0.is_zero() {
        return Ok(());
    }
    let at = app.clock.monotonic();
    let before = *app.watched.lock().unwrap_or_else(PoisonError::into_inner);
    // The judge alone: two would count twice.
    if is_judge(app).await?
        && let Some(passed) = app.ledger.watched(at.saturating_sub(before)).await?
        && passed >= limit.0
    {
        let text = format!(
            "No publish has gone through for {} that `serve` has watched (alerts.no_publish = \"{limit}\"). Is its timer on \
             (systemctl list-timers hq-publish.timer), or the batch that runs it? Run it once by hand, to see what it says.",
            long(passed)
        );
        mail::publish_notice(&app.ledger, app.clock.as_ref(), NOT_RUN, Some(("No publish goes through", &text)))
            .await?;
    }
    *app.watched.lock().unwrap_or_else(PoisonError::into_inner) = at;
    Ok(())
}

/// Signs manifests that are due anew, puts what is not in the bucket or is no more, repairs mirrors.
pub async fn manifests(app: &App) -> Result<(), String> {
    let kept = keep_manifests(app).await;
    manifests::mail_overtaken(&app.ledger, app.clock.as_ref(), &kept).await.map_err(|e| e.to_string())?;
    match kept {
        Ok(()) => Ok(()),
        // Before `init` there is nothing to keep.
        Err(ManifestsError::Keys(crate::keys::KeysError::NoTrust)) => Ok(()),
        Err(e) => Err(e.to_string()),
    }
}

async fn keep_manifests(app: &App) -> Result<(), ManifestsError> {
    let buckets = Buckets::open(&app.config, &app.ledger).await?;
    let followed = manifests::follow_trust(&app.config, &app.ledger, &buckets, app.clock.as_ref()).await?;
    manifests::check_place(&app.ledger, &buckets, &app.config.limits, false).await?;
    manifests::check_taken_over(&app.config, &app.ledger, &buckets, app.clock.as_ref()).await?;
    let signer = Signer::open(&app.config, &app.ledger, app.clock.as_ref(), false).await?;
    signer.mail_end(&app.config, &app.ledger, app.clock.as_ref()).await?;
    let signed = failpoint::around("serve.sign", signer.sign_due(&app.ledger, app.clock.as_ref())).await?;
    if !signed.stores.is_empty() {
        tracing::info!("signed {} manifests anew", signed.stores.len());
    }
    // One store that was overtaken, which may last until people act, holds up nobody else's.
    let put = manifests::put_unfinished(&app.ledger, &buckets, None).await.map(drop);
    let mut outcome = manifests::both(signed.others, put);
    if let Followed::Newest = followed {
        let again = manifests::put_again(&app.ledger, &buckets, None).await;
        outcome = manifests::both(outcome, again);
    }
    for lag in buckets.repair_mirrors().await?.mirrors {
        tracing::warn!("{lag}");
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AlertsConfig;
    use proto::wire::Disk;

    #[test]
    fn a_clock_runs_on_with_the_monotonic_one_or_the_ledgers_time() {
        let t = |hours: i64| Timestamp::from_second(hours * 3600).unwrap();
        let h = |hours: u64| Duration::from_secs(hours * 3600);
        for (name, noted, now, latest, expected) in [
            ("a new ledger", None, (t(0), h(0)), None, true),
            ("a start within a day", None, (t(30), h(0)), Some(t(7)), true),
            ("a start after a weekend", None, (t(70), h(0)), Some(t(7)), false),
            ("somebody vouched for it", None, (t(70), h(1)), Some(t(70)), true),
            ("a start with a clock that is behind", None, (t(5), h(0)), Some(t(7)), false),
            ("days without a ledger", Some((t(0), h(0))), (t(70), h(70)), Some(t(0)), true),
            ("a leap of hours", Some((t(0), h(0))), (t(5), h(1)), Some(t(0)), false),
            ("a leap of days", Some((t(0), h(0))), (t(71), h(1)), Some(t(0)), false),
            ("it was found right", Some((t(0), h(0))), (t(71), h(1)), Some(t(71)), true),
            ("a leap back", Some((t(9), h(0))), (t(1), h(1)), Some(t(9)), false),
            ("and back again", Some((t(9), h(0))), (t(14), h(5)), Some(t(9)), true),
        ] {
            assert_eq!(runs_on(noted, now, latest, h(24)), expected, "{name}");
        }
    }

    #[test]
    fn a_disk_that_runs_full_is_told_once() {
        let (was, alerts) = (AtomicBool::default(), AlertsConfig::default());
        let told = [500, 10, 10, 500, 10].map(|free| turns(&was, fleet::is_low(&Disk { free, total: 1000 }, &alerts)));
        assert_eq!(told, [false, true, false, false, true]);
    }
}

//! Whom a run tells of what: the report, the mails, the senders of drops.

use super::contracts::Contracts;
use super::feed::{Drops, Feed};
use super::report::{InstanceReport, Outcome, PublishReport, Rejected};
use super::stage::Refusal;
use super::{PublishError, Run, Step};
use crate::inbox::{Drop, What};
use crate::ledger::{Ledger, LedgerError, State};
use crate::mail;
use crate::manifests::{ManifestsError, NotPut};
use proto::clock::Clock;
use proto::ids::{Instance, StreamName};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

/// Files in the inbox that are no drops and are mailed one by one; an exporter may write thousands.
const STRAYS: usize = 20;

/// The notices of files, by name, of which `publish` says more: what became of one, and of many.
fn of_files(kind: &str, files: Vec<(&str, String)>, [one, many]: [&str; 2]) -> BTreeMap<String, (String, String)> {
    let more = files.len().saturating_sub(STRAYS);
    let notice = |(name, text)| (format!("{kind} {name}"), (format!("{name} in the inbox {one}"), text));
    let mut notices: BTreeMap<_, _> = files.into_iter().take(STRAYS).map(notice).collect();
    if more > 0 {
        let subject = format!("{more} more files in the inbox {many}");
        notices.insert(format!("{kind} …"), (subject, "`publish` names them all.".into()));
    }
    notices
}

/// The notice that no run goes through any more; `serve` opens it.
pub const NOT_RUN: &str = "not-run";

/// A run that ended as a whole (settings, source, bucket or this machine) is mailed once, and once when one
/// went through again. What a refusal of one stream says is mailed where it is refused.
pub(super) async fn tell_of_run(ledger: &Ledger, clock: &dyn Clock, result: &Result<PublishReport, PublishError>) {
    let told = match result {
        Ok(_) => all_is_well(ledger, clock).await,
        // The former is mailed where it lasts too long.
        Err(PublishError::LeaseHeld { .. } | PublishError::Aborted(_)) => return,
        // Mailed where the manifests are put.
        Err(PublishError::Manifests(ManifestsError::Overtaken(_))) => return,
        Err(e) => tell_of_failure(ledger, clock, e).await,
    };
    warn_untold(told);
}

async fn all_is_well(ledger: &Ledger, clock: &dyn Clock) -> Result<(), LedgerError> {
    ledger.went_through().await?;
    for over in ["run", NOT_RUN] {
        mail::publish_notice(ledger, clock, over, None).await?;
    }
    mail::publish_caught_up(ledger, clock).await
}

const SIGNED: &str = "What is signed waits for that, and the next run puts it.";

pub(super) async fn tell_of_failure(ledger: &Ledger, clock: &dyn Clock, e: &PublishError) -> Result<(), LedgerError> {
    // Past the commit point it is not undone.
    let what = match e {
        PublishError::Manifests(ManifestsError::NotPut(all)) if all.iter().all(NotPut::is_too_long) => {
            "What is new waits for that, and the first run after it lists it."
        }
        PublishError::Manifests(ManifestsError::NotPut(_)) => SIGNED,
        _ if !ledger.publications(State::Signed).await?.is_empty() => SIGNED,
        _ => "Nothing was published; the next run tries again.",
    };
    let text = format!("{e}\n\n{what}");
    mail::publish_notice(ledger, clock, "run", Some(("publish failed", &text))).await
}

pub(super) fn warn_untold(told: Result<(), LedgerError>) {
    if let Err(e) = told {
        tracing::warn!(error = %e, "no mail could be written");
    }
}

impl Run<'_> {
    /// Told once, however often it is met.
    pub(super) fn problem(&self, text: String) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        if !problems.contains(&text) {
            tracing::warn!("{text}");
            problems.push(text);
        }
    }

    /// Tells of a refusal: in the report, to the sender of a drop, and by mail ([`Run::tell_refused`]).
    pub(super) fn refuse(&self, instance: &Instance, refusal: Refusal, feed: &mut Feed, entry: &mut InstanceReport) {
        entry.outcome = Outcome::Refused;
        entry.code = Some(refusal.code);
        entry.reason.clone_from(&refusal.text);
        let mut text = refusal.text;
        for fault in &refusal.faults.first {
            text.push_str(&format!("\n{instance}: {fault}"));
        }
        if refusal.faults.untold() > 0 {
            text.push_str(&format!("\nand {} more", refusal.faults.untold()));
        }
        tracing::error!(%instance, code = refusal.code, "refused: {text}");
        if let Feed::Inbox(drops) = feed {
            drops.rejected.extend(refusal.reject);
        }
        if !self.options.dry_run {
            let refused = mail::Refused { instance: instance.clone(), reason: refusal.code.to_owned(), text };
            self.refused.lock().unwrap_or_else(PoisonError::into_inner).push(refused);
        }
    }

    /// Writes the mails of what was refused up to here; many share one.
    pub(super) async fn tell_refused(&self) -> Result<(), PublishError> {
        let refused = std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(mail::publish_refused(self.ledger, self.clock, &refused).await?)
    }

    /// Streams that manifests list and the settings do not name, and stores without the zone that they had: both keep what
    /// they have, and somebody should know. Not told of, where a table is another stream's by the settings, before that is
    /// published: it goes over.
    pub(super) async fn tell_left_out(
        &self,
        contracts: &Contracts,
        report: &mut PublishReport,
    ) -> Result<(), PublishError> {
        let mut told = BTreeMap::new();
        let mut tell = |stream: &StreamName, text: String| {
            self.problem(text.clone());
            told.insert(format!("stream {stream}"), (format!("Stream {stream} is not in the settings"), text));
        };
        let goes_over = |s: &StreamName| self.tables_left(s).iter().any(|t| contracts.stream_of(t).is_some());
        for (stream, _) in self.signer.left_out().filter(|(s, _)| !goes_over(s)) {
            let text = format!(
                "stream {stream} is not in the settings and manifests list it: they go on listing what was published of it. \
                 Put its [[stream]] back, or, if no store is to get it any more, run again with --allow-shrink {stream}"
            );
            tell(stream, text);
        }
        if self.options.dry_run {
            return Ok(());
        }
        for (stream, by) in self.signer.moved(self.ledger).await? {
            if let Some(first) = by.stores.first() {
                let text = format!(
                    "stream {stream} is not in the settings, and other streams have its tables: {} stores (the first is \
                     {first}) list it until all of them are published for them. If they are to get what there is, run \
                     again with --allow-shrink {stream}",
                    by.stores.len()
                );
                tell(&stream, text);
            } else if let Some(first) = by.away.first() {
                report.notes.push(format!(
                    "stream {stream} is kept for stores that the source has no more: {} (the first is {first}). Should they \
                     come back, they go over as the others did",
                    by.away.len()
                ));
            }
        }
        mail::publish_notices(self.ledger, self.clock, "stream ", &told).await?;
        self.tell_lost_zones().await
    }

    /// Moves drops: published ones to `done/`, refused ones to `rejected/`, held ones stay. A dry run
    /// only tells.
    pub(super) async fn clear_inbox(
        &self,
        drops: Drops,
        settled: &[Instance],
        report: &mut PublishReport,
    ) -> Result<(), PublishError> {
        for (drop, reason) in &drops.rejected {
            report.rejected.push(Rejected { name: drop.file.name.clone(), reason: reason.clone() });
        }
        for problem in drops.strays.values() {
            self.problem(problem.clone());
        }
        if self.options.dry_run {
            return Ok(());
        }
        let strays = drops.strays.iter().map(|(name, text)| (name.as_str(), text.clone()));
        let strays = of_files("inbox", strays.collect(), ["is left alone", "are left alone"]);
        mail::publish_notices(self.ledger, self.clock, "inbox ", &strays).await?;
        // Of no instance: nobody knows which drop comes in its place. One that came, and no such name, ends it.
        let nameless = drops.rejected.iter().filter(|(drop, _)| drop.what.is_err());
        let nameless = nameless.map(|(drop, reason)| {
            let name = drop.file.name.as_str();
            let next = "It lies in rejected/: put it into the inbox again, by its right name.";
            (name, format!("{name} was rejected: {reason}\n\n{next}"))
        });
        let nameless = of_files("nameless", nameless.collect(), ["was rejected", "were rejected"]);
        if report.instances.values().any(InstanceReport::is_well) {
            mail::publish_notices(self.ledger, self.clock, "nameless ", &nameless).await?;
        } else {
            for (what, (subject, text)) in &nameless {
                mail::publish_notice(self.ledger, self.clock, what, Some((subject, text))).await?;
            }
        }
        let published = |i: &Instance| report.instances.get(i).is_some_and(|r| r.outcome == Outcome::Published);
        let rejected: Vec<&str> = drops.rejected.iter().map(|(d, _)| d.file.name.as_str()).collect();
        let tables = drops.tables.iter().filter(|(i, _)| published(i) || settled.contains(i));
        let done: Vec<&Drop> = tables.flat_map(|(_, t)| t.values()).chain(drops.stores.as_ref()).collect();
        for drop in done.into_iter().filter(|d| !rejected.contains(&d.file.name.as_str())) {
            self.step(Step::MoveDrop(drop.file.name.clone()), async { drops.inbox.done(drop) }).await?;
        }
        // A refusal of the instance was mailed already.
        let is_told = |i: &Instance| report.instances.get(i).is_some_and(|r| r.outcome == Outcome::Refused);
        let refused = drops.rejected.iter().filter_map(|(drop, reason)| match &drop.what {
            Ok(What::Table { instance, .. }) if !is_told(instance) => Some(mail::Refused {
                instance: instance.clone(),
                reason: "DROP".to_owned(),
                text: format!("{} was rejected: {reason}", drop.file.name),
            }),
            _ => None,
        });
        mail::publish_refused(self.ledger, self.clock, &refused.collect::<Vec<_>>()).await?;
        for (drop, reason) in &drops.rejected {
            self.step(Step::MoveDrop(drop.file.name.clone()), async { drops.inbox.reject(drop, reason) }).await?;
        }
        Ok(())
    }

    /// Closes what is well again, and ends the report.
    pub(super) async fn tell(&self, report: &mut PublishReport) -> Result<(), PublishError> {
        report.problems.append(&mut self.problems.lock().unwrap_or_else(PoisonError::into_inner));
        if self.options.dry_run {
            return Ok(());
        }
        self.sweep()?;
        let rejected =
            |i: &Instance| report.rejected.iter().any(|r| r.name.starts_with(&format!("{}.{}.", i.stream, i.audience)));
        let well = report.instances.iter().filter(|(i, entry)| entry.is_well() && !rejected(i));
        let mut over: BTreeSet<Instance> = well.map(|(i, _)| i.clone()).collect();
        // What is no instance (any more) ends with the next run that went well without it: a drop of an unknown
        // stream or zone that was not sent again, an audience that is gone.
        let went_well = report.instances.values().any(|e| e.is_well());
        let is_gone = |i: &Instance| self.is_asked(&i.stream) && !report.instances.contains_key(i) && !rejected(i);
        if went_well {
            over.extend(mail::refused_instances(self.ledger, None).await?.into_iter().filter(is_gone));
        }
        Ok(mail::publish_recovered(self.ledger, self.clock, &over).await?)
    }
}

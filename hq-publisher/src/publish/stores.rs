//! The list of stores: read, guarded like a table, recorded.

use super::contracts::Contracts;
use super::feed::{Drops, Feed};
use super::report::PublishReport;
use super::steps::Step;
use super::{PublishError, Run};
use crate::config::AudienceKind;
use crate::guard;
use crate::inbox::{self, Blame, Drop};
use crate::ledger::StoreRow as Known;
use crate::mail;
use crate::manifests;
use crate::some::some;
use crate::source::{self, StoreRow};
use crate::source_db::SourceError;
use proto::ids::{DeviceId, Instance, StoreId};
use proto::shelf;
use std::collections::BTreeSet;

impl Run<'_> {
    /// The stores of the source; guarded like a table, and recorded.
    pub(super) async fn stores(
        &self,
        contracts: &Contracts,
        feed: &mut Feed,
        report: &mut PublishReport,
    ) -> Result<Vec<StoreRow>, PublishError> {
        let all = self.ledger.stores().await?;
        let ids: Vec<StoreId> = all.iter().map(|s| s.seen.id.clone()).collect();
        let known: Vec<StoreRow> = all.into_iter().filter(|s| s.vanished_at.is_none()).map(|s| s.seen).collect();
        let told = match feed {
            Feed::Database(_) => {
                let told = feed.stores(contracts).await.and_then(|told| {
                    told.iter().try_for_each(|t| source::cases_agree(t, &ids))?;
                    Ok(told)
                });
                match told {
                    // One store's mistake keeps no price from the others, nor does a list that is just being made, or
                    // cannot be read: what else cannot be read the tables' own queries tell.
                    Err(
                        e @ (SourceError::Stores(_)
                        | SourceError::Unseen { .. }
                        | SourceError::Query { .. }
                        | SourceError::Columns { .. }),
                    ) if !known.is_empty() => {
                        let text = format!("the list of stores in the source is not taken: {e}");
                        self.problem(text.clone());
                        self.mail_unread(&text).await?;
                        None
                    }
                    told => told?,
                }
            }
            Feed::Inbox(drops) => self.dropped_stores(drops, &ids).await?,
        };
        let Some(mut told) = told else {
            report.stores = known.len();
            return Ok(known);
        };
        if !self.options.dry_run {
            mail::publish_notice(self.ledger, self.clock, "stores-unread", None).await?;
        }
        let there: BTreeSet<&StoreId> = told.iter().map(|s| &s.id).collect();
        let gone: Vec<StoreId> = known.iter().map(|s| &s.id).filter(|id| !there.contains(id)).cloned().collect();
        let (before, lost, after) = (known.len() as u64, gone.len() as u64, told.len() as u64);
        let shrunk = guard::check("the list of stores", before, lost, after, self.bounds());
        if let Some(shrunk) = shrunk.filter(|_| self.options.allow_shrink != Some(None)) {
            if !self.options.dry_run {
                let subject = "publish refused: the list of stores";
                mail::publish_notice(self.ledger, self.clock, "stores", Some((subject, &shrunk.to_string()))).await?;
            }
            self.problem(format!("{shrunk}; the list is held. If that is right, run again with --allow-shrink"));
            if let Feed::Inbox(drops) = feed {
                (drops.stores, drops.stores_wait) = (None, true);
            }
            told = known;
        } else if self.options.dry_run {
            report.vanished = gone;
        } else {
            report.vanished = self.step(Step::SeeStores, self.ledger.see_stores(&told, self.clock.now())).await?;
            mail::publish_notice(self.ledger, self.clock, "stores", None).await?;
        }
        report.stores = told.len();
        Self::tell_stores_without_zone(contracts, &told, report);
        Ok(told)
    }

    /// Stores that left the list while their devices are enrolled: they sell by what grows old, and there all looks well.
    pub(super) async fn tell_unlisted(
        &self,
        stores: &[StoreRow],
        report: &mut PublishReport,
    ) -> Result<(), PublishError> {
        let (known, enrolled) = (self.ledger.stores().await?, self.ledger.enrolled().await?);
        let listed: BTreeSet<&StoreId> = stores.iter().map(|s| &s.id).collect();
        let alive: BTreeSet<&StoreId> = enrolled.iter().map(DeviceId::store).collect();
        let is_gone = |s: &&Known| s.vanished_at.is_some() || report.vanished.contains(&s.seen.id);
        let gone = known.iter().filter(is_gone).map(|s| &s.seen.id);
        let gone: Vec<&StoreId> = gone.filter(|id| !listed.contains(id) && alive.contains(id)).collect();
        if !gone.is_empty() {
            report.notes.push(format!(
                "not in the list of stores any more, and devices are enrolled there: {}. They go on with what they follow, and \
                 get nothing new but of what is made for all, or for a zone that other stores have. Put them back into the \
                 list; or, if they are closed for good, revoke their devices",
                some(&gone, ", ")
            ));
        }
        if !self.options.dry_run {
            mail::publish_unlisted(self.ledger, self.clock, &gone).await?;
        }
        Ok(())
    }

    /// What stores that have devices are to follow.
    pub(super) async fn awaited(
        &self,
        contracts: &Contracts,
        stores: &[StoreRow],
    ) -> Result<BTreeSet<Instance>, PublishError> {
        let enrolled = self.ledger.enrolled().await?;
        let alive: BTreeSet<&StoreId> = enrolled.iter().map(DeviceId::store).collect();
        let follows = |s| contracts.streams.iter().filter_map(move |c| manifests::followed(&c.name, c.audience, s));
        Ok(stores.iter().filter(|s| alive.contains(&s.id)).flat_map(follows).collect())
    }

    async fn dropped_stores(
        &self,
        drops: &mut Drops,
        known: &[StoreId],
    ) -> Result<Option<Vec<StoreRow>>, PublishError> {
        let Some(drop) = drops.stores.clone() else { return Ok(None) };
        let text = match read(&drop, known, self.config.limits.line_bytes) {
            Ok(stores) => return Ok(Some(stores)),
            Err(NotRead::Changed) => {
                self.problem(format!("{} changed while it was read; it is left for the next run", drop.file.name));
                None
            }
            Err(NotRead::Waits(reason)) => {
                let text = format!("{} is left for the next run: {reason}", drop.file.name);
                self.problem(text.clone());
                Some(text)
            }
            Err(NotRead::Wrong(reason)) => {
                let text = format!("{} was rejected: {reason}", drop.file.name);
                drops.rejected.push((drop, reason));
                Some(text)
            }
        };
        (drops.stores, drops.stores_wait) = (None, true);
        if let Some(text) = text {
            self.mail_unread(&text).await?;
        }
        Ok(None)
    }

    /// Mails that the list of stores is not taken.
    async fn mail_unread(&self, text: &str) -> Result<(), PublishError> {
        if self.options.dry_run {
            return Ok(());
        }
        let text = format!("{text}\n\nWho was in the list before is published to.");
        let problem = Some(("The list of stores cannot be taken", text.as_str()));
        Ok(mail::publish_notice(self.ledger, self.clock, "stores-unread", problem).await?)
    }

    fn tell_stores_without_zone(contracts: &Contracts, stores: &[StoreRow], report: &mut PublishReport) {
        let by_zone = contracts.streams.iter().find(|s| s.audience == AudienceKind::Zone);
        let without: Vec<&str> = stores.iter().filter(|s| s.zone.is_none()).map(|s| s.id.as_str()).collect();
        if let (Some(stream), Some(first)) = (by_zone, without.first()) {
            let n = without.len();
            report.notes.push(format!(
                "{n} stores have no zone (the first is {first}): of streams that are made by zone, like {}, they keep what \
                 they follow, and get none that they do not follow yet",
                stream.name
            ));
        }
    }
}

/// Why a list is not taken.
#[derive(Debug, PartialEq)]
enum NotRead {
    /// It changed meanwhile.
    Changed,
    /// Its disk, or its rights: what it says is not known.
    Waits(String),
    /// It says something wrong.
    Wrong(String),
}

/// The stores in a drop.
fn read(drop: &Drop, known: &[StoreId], line_bytes: u64) -> Result<Vec<StoreRow>, NotRead> {
    let file = shelf::open_regular(&drop.file.path).map_err(|e| NotRead::Waits(e.to_string()))?;
    let stores = inbox::read_stores(&file, drop.file.marked, line_bytes);
    if !drop.is(&file) {
        return Err(NotRead::Changed);
    }
    let stores = stores.map_err(|e| match e.blame {
        Blame::File => NotRead::Wrong(e.to_string()),
        _ => NotRead::Waits(e.to_string()),
    })?;
    source::cases_agree(&stores, known).map_err(|e| NotRead::Wrong(e.to_string()))?;
    Ok(stores)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;
    use crate::inbox::{Inbox, What};

    #[test]
    fn a_list_that_changes_while_it_is_read_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stores.csv");
        std::fs::write(&path, "id,zone\n1,east\n").unwrap();
        let file = Inbox::new(dir.path()).look().unwrap().remove(0);
        let drop = Drop { file, what: Ok(What::Stores) };
        assert_eq!(read(&drop, &[], 1000).unwrap().len(), 1);
        for half in ["id,zone\n1,east\n2,west\n", "id,zone\n1,ea"] {
            std::fs::write(&path, half).unwrap();
            assert_eq!(read(&drop, &[], 1000), Err(NotRead::Changed));
        }
    }

    #[test]
    fn a_list_that_cannot_be_opened_is_not_a_wrong_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stores.csv");
        std::fs::write(&path, "id\n1\n").unwrap();
        let file = Inbox::new(dir.path()).look().unwrap().remove(0);
        let drop = Drop { file, what: Ok(What::Stores) };
        // Root may open anything but what is no file.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let e = read(&drop, &[], 1000).unwrap_err();
        assert!(matches!(&e, NotRead::Waits(why) if why.contains("cannot open")), "{e:?}");
    }
}

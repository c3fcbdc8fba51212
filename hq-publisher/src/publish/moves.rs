//! Stores that are to follow another instance of a stream than their manifests list: their zone was changed at the source,
//! or the stream's audience in the settings. For their registers that is a change of rows like any other, and one letter
//! wrong in a zone empties a table: it is guarded as what is deleted is. A store stays with what it has until its stream was
//! looked at and the guard lets it go. Where tables go over to a stream of another name, it is the same.

use super::contracts::{Contracts, Stream};
use super::feed::Feed;
use super::report::{InstanceReport, Outcome, PublishReport};
use super::stage::{Ready, Refusal};
use super::{PublishError, Run, read_only_at};
use crate::guard;
use crate::ledger::Head;
use crate::mail;
use crate::manifests::{self, Held, Move};
use crate::rebuild::{self, RebuildError};
use crate::source::{Faults, StoreRow};
use proto::ids::{Instance, StreamName, TableName};
use std::collections::{BTreeMap, BTreeSet};

type Rows = BTreeMap<TableName, u64>;

/// Stores and streams whose going over is noted one by one.
const NOTED: usize = 20;

/// A table that goes over from one stream of the settings to another.
struct Change<'c> {
    from: &'c Stream,
    table: TableName,
    to: &'c Stream,
}

/// Why a stream is not published now.
struct Wait {
    code: &'static str,
    text: String,
}

impl Run<'_> {
    /// Looks at each instance that stores are to go over to; gives the refusals. `whole`: nothing else of the stream is
    /// refused, so that what was staged is what they get.
    pub(super) async fn guard_moves(
        &self,
        contracts: &Contracts,
        stream: &Stream,
        stores: &[StoreRow],
        whole: bool,
        report: &PublishReport,
    ) -> Result<Vec<(Instance, Refusal)>, PublishError> {
        if self.may_shrink(&stream.name) {
            return Ok(Vec::new());
        }
        let mut by_goal: BTreeMap<&Instance, BTreeMap<&Instance, Vec<&Move>>> = BTreeMap::new();
        for m in self.moves.iter().filter(|m| m.from.stream == stream.name) {
            if let Some(to) = &m.to {
                by_goal.entry(to).or_default().entry(&m.from).or_default().push(m);
            }
        }
        let renamed = self.renamed(contracts, stream, stores, report);
        for (from, to) in &renamed {
            by_goal.entry(to).or_default().entry(from).or_default();
        }
        let mut refusals = Vec::new();
        for (to, origins) in by_goal {
            let mut lines = Vec::new();
            for (from, moves) in origins {
                let why = match self.lost_by_going(from, to, whole, report).await {
                    Ok(lost) if lost.is_empty() => continue,
                    Ok(lost) => format!(": {}", lost.join("; ")),
                    Err(e) if e.needs_full() => format!(", and rows cannot be compared: {e}"),
                    Err(e) => return Err(e.into()),
                };
                lines.push(format!("{} it in place of {from}{why}", would_follow(&moves)));
            }
            if !lines.is_empty() {
                let text =
                    format!("{}. If that is right, run again with --allow-shrink {}", lines.join("; "), stream.name);
                refusals.push((to.clone(), refusal("SHRINK", text)));
            }
        }
        Ok(refusals)
    }

    /// Refuses an instance, to which no store goes over then.
    pub(super) fn keep_away(&self, instance: Instance, refusal: Refusal, feed: &mut Feed, report: &mut PublishReport) {
        let mut entry = report.instances.remove(&instance).unwrap_or_default();
        (entry.keeps_away, entry.version) = (true, self.heads.get(&instance).map(|h| h.version));
        self.refuse(&instance, refusal, feed, &mut entry);
        report.instances.insert(instance, entry);
    }

    /// Instances of streams that the settings lost, or that lose a table by them, each with one of this stream that has a
    /// table of it for the first time and is for a store that follows it.
    fn renamed(
        &self,
        contracts: &Contracts,
        stream: &Stream,
        stores: &[StoreRow],
        report: &PublishReport,
    ) -> BTreeSet<(Instance, Instance)> {
        let mut pairs = BTreeSet::new();
        let changing = self.changing_hands(contracts);
        let givers = changing.iter().filter(|c| c.to.name == stream.name).map(|c| (&c.from.name, c.from.audience));
        let left = self.signer.left_in_use().chain(givers).map(|(left, kind)| (left, Some(kind)));
        // What is over is left by those alone who list it.
        for (left, kind) in left.chain(self.signer.back().map(|over| (over, None))) {
            let both = stores.iter().filter_map(|s| {
                let from = self.listed_before(left, s).or_else(|| manifests::followed(left, kind?, s))?;
                Some((from, manifests::followed(&stream.name, stream.audience, s)?))
            });
            let comes = |from: &Instance, to: &Instance| {
                let mut tables = stream.contract.tables.iter().map(|t| &t.name);
                report.instances.contains_key(to) && tables.any(|t| self.had(from, t) && !self.had(to, t))
            };
            pairs.extend(both.filter(|(from, to)| comes(from, to)));
        }
        pairs
    }

    /// The instance that a store's list names, where it is to follow another one of the stream.
    fn listed_before(&self, stream: &StreamName, store: &StoreRow) -> Option<Instance> {
        let place = self.moves.binary_search_by(|m| (&m.store, &m.from.stream).cmp(&(&store.id, stream)));
        place.ok().map(|n| self.moves[n].from.clone())
    }

    /// Whether what is published of an instance, be it of long ago, has a table.
    fn had(&self, instance: &Instance, table: &TableName) -> bool {
        self.heads.get(instance).is_some_and(|h| h.digests.contains_key(table))
    }

    /// Whether an instance that is kept up to date has a table.
    fn has(&self, instance: &Instance, table: &TableName) -> bool {
        self.heads.get(instance).is_some_and(|h| !h.retired && h.digests.contains_key(table))
    }

    /// The tables published of a stream, but of instances that no store wants.
    pub(super) fn tables_left(&self, stream: &StreamName) -> BTreeSet<&TableName> {
        self.kept_up(stream).flat_map(|h| h.digests.keys()).collect()
    }

    /// What is published of a stream, but of instances that no store wants.
    fn kept_up(&self, stream: &StreamName) -> impl Iterator<Item = &Head> {
        self.heads.iter().filter(move |(i, h)| &i.stream == stream && !h.retired).map(|(_, h)| h)
    }

    /// By the stream that takes over tables of one that the settings lost: why it must not, while that one's other tables
    /// are nobody's. Registers would lose them.
    pub(super) fn find_splits(&self, contracts: &Contracts) -> BTreeMap<StreamName, String> {
        let mut splits = BTreeMap::new();
        for (left, _) in self.signer.left_in_use().filter(|(s, _)| !self.may_shrink(s)) {
            let tables = self.tables_left(left);
            let lost = tables.iter().filter(|t| contracts.stream_of(t).is_none()).map(|t| t.as_str());
            let lost = lost.collect::<Vec<_>>().join(", ");
            let taken = tables.iter().filter_map(|t| Some((t, contracts.stream_of(t)?)));
            for (table, stream) in taken.filter(|(t, s)| !lost.is_empty() && !self.took(&s.name, t)) {
                let text = format!(
                    "it takes table {table} over from stream {left}, which the settings do not name any more, and no \
                     stream has {lost}: registers would lose that. Give it a stream, or, if no store is to get it any \
                     more, run again with --allow-shrink {left}"
                );
                splits.insert(stream.name.clone(), text);
            }
        }
        splits
    }

    /// Whether all that is published of a stream has a table: nobody loses anything by its next version.
    fn took(&self, stream: &StreamName, table: &TableName) -> bool {
        let mut heads = self.kept_up(stream).peekable();
        heads.peek().is_some() && heads.all(|h| h.digests.contains_key(table))
    }

    /// The tables published that go over, by the settings, from one stream that they name to another.
    fn changing_hands<'c>(&self, contracts: &'c Contracts) -> Vec<Change<'c>> {
        let mut all = Vec::new();
        for from in &contracts.streams {
            let gone = self.tables_left(&from.name).into_iter().filter(|t| from.contract.table(t).is_none());
            all.extend(gone.filter_map(|t| Some(Change { from, table: t.clone(), to: contracts.stream_of(t)? })));
        }
        all
    }

    /// Takes back what would take tables over, from a stream that the settings lost, into one that stores have already,
    /// while one of them would lose another of its tables, which is not published yet (a stream that is new is not listed
    /// before all are there: [`manifests::Signer`]); and of two streams of the settings between which a table goes over the
    /// one that comes without the other.
    pub(super) async fn hold_takers(
        &self,
        contracts: &Contracts,
        stores: &[StoreRow],
        feed: &mut Feed,
        ready: &mut Vec<Ready>,
        report: &mut PublishReport,
    ) -> Result<(), PublishError> {
        let lost: BTreeSet<&TableName> = self.signer.left_in_use().flat_map(|(s, _)| self.tables_left(s)).collect();
        let changing = self.changing_hands(contracts);
        for (stream, wait) in self.who_waits(contracts, &changing, stores, report) {
            let is_its = |t: &TableName| contracts.stream_of(t).is_some_and(|s| s.name == stream);
            let gains = |i: &Instance| lost.iter().any(|t| is_its(t) && !self.had(i, t));
            let may_be_listed =
                |i: &Instance| self.heads.contains_key(i) || self.moves.iter().any(|m| m.to.as_ref() == Some(i));
            let takes = |i: &Instance| {
                may_be_listed(i) && gains(i)
                    || changing.iter().any(|c| c.to.name == stream && !self.had(i, &c.table))
                    || changing.iter().any(|c| c.from.name == stream)
            };
            let coming: Vec<Instance> =
                report.instances.keys().filter(|i| i.stream == stream && comes(i, report)).cloned().collect();
            if !coming.iter().any(takes) {
                continue;
            }
            for instance in coming {
                if let Some(n) = ready.iter().position(|r| r.instance == instance) {
                    self.unstage(ready.remove(n), &wait.text, report).await?;
                }
                self.keep_away(instance, refusal(wait.code, wait.text.clone()), feed, report);
            }
        }
        Ok(())
    }

    /// The streams that have a table, by the settings, of one that these lost, of which some store would miss another; and
    /// those that give a table to another, or take one, that does not come with them: with the reason.
    fn who_waits(
        &self,
        contracts: &Contracts,
        changing: &[Change<'_>],
        stores: &[StoreRow],
        report: &PublishReport,
    ) -> BTreeMap<StreamName, Wait> {
        // One stream that waits may make others wait: what is published of it need not be listed.
        let shrink = |text: &String| Wait { code: "SHRINK", text: text.clone() };
        let mut waits: BTreeMap<StreamName, Wait> =
            self.splits.iter().map(|(stream, text)| (stream.clone(), shrink(text))).collect();
        loop {
            let before = waits.len();
            for (left, kind) in self.signer.left_in_use().filter(|(s, _)| !self.may_shrink(s)) {
                let misses = |s: &StoreRow, t: &TableName, owner: &Stream| {
                    let held = self.listed_before(left, s).or_else(|| manifests::followed(left, kind, s));
                    let gets = manifests::followed(&owner.name, owner.audience, s);
                    let gets = gets.filter(|i| self.has(i, t) || comes(i, report));
                    held.is_some_and(|i| self.had(&i, t)) && (gets.is_none() || waits.contains_key(&owner.name))
                };
                let tables = self.tables_left(left);
                let missed = tables.iter().find_map(|t| {
                    let owner = contracts.stream_of(t)?;
                    Some((*t, owner, stores.iter().find(|s| misses(s, t, owner))?))
                });
                let Some((table, owner, store)) = missed else { continue };
                let asked = self.asked(&[owner]);
                let text = format!(
                    "it takes a table over from stream {left}, which the settings do not name any more, and {table} is not \
                     published for store {} by {}: its registers would lose that. Publish that too{asked}, or, if no store \
                     is to get it any more, run again with --allow-shrink {left}",
                    store.id, owner.name
                );
                for owner in tables.iter().filter_map(|t| contracts.stream_of(t)) {
                    waits.entry(owner.name.clone()).or_insert_with(|| shrink(&text));
                }
            }
            for change in changing {
                let wait = stores.iter().find_map(|s| self.comes_alone(change, s, &waits, report));
                if let Some((stream, wait)) = wait {
                    waits.insert(stream.clone(), wait);
                }
            }
            if waits.len() == before {
                break;
            }
        }
        waits
    }

    /// Of the two streams between which a table goes over, the one that would come to a store without the other.
    fn comes_alone<'c>(
        &self,
        change: &Change<'c>,
        store: &StoreRow,
        waits: &BTreeMap<StreamName, Wait>,
        report: &PublishReport,
    ) -> Option<(&'c StreamName, Wait)> {
        let Change { from, table, to } = change;
        let held = self.listed_before(&from.name, store);
        let follows = manifests::followed(&from.name, from.audience, store);
        if !held.as_ref().or(follows.as_ref()).is_some_and(|i| self.had(i, table)) {
            return None;
        }
        let waits = |s: &Stream| waits.contains_key(&s.name);
        let has_zone = follows.is_some();
        let goes = !waits(from) && follows.or(held).is_some_and(|i| comes(&i, report));
        let gets = manifests::followed(&to.name, to.audience, store).filter(|_| !waits(to));
        let has = gets.as_ref().is_some_and(|i| self.has(i, table));
        let arrives = !has && gets.is_some_and(|i| comes(&i, report));
        let asked = self.asked(&[from, to]);
        let (from, to) = (&from.name, &to.name);
        if goes && !has && !arrives && !self.may_shrink(from) {
            let text = format!(
                "table {table} goes over to stream {to}, which is not published with it for store {}: its registers would \
                 lose that. Publish both together{asked}, or, if no store is to get it any more, run again with \
                 --allow-shrink {from}",
                store.id
            );
            return Some((from, Wait { code: "SHRINK", text }));
        }
        if arrives && !goes {
            let what = if has_zone {
                format!("Publish both together{asked}; that {from} gives it up needs --allow-rebuild")
            } else {
                "It keeps that, for it has no zone in the source: give it one, or take it off the list of stores".into()
            };
            let text = format!(
                "it takes table {table} over from stream {from}, by which store {} has it: no register can hold it by two. \
                 {what}",
                store.id
            );
            return Some((to, Wait { code: "REBUILD", text }));
        }
        None
    }

    /// What else it takes to publish these streams.
    fn asked(&self, streams: &[&Stream]) -> &'static str {
        if streams.iter().all(|s| self.is_asked(&s.name)) { "" } else { " (run without --stream)" }
    }

    /// What tables lose for a store that goes over.
    async fn lost_by_going(
        &self,
        from: &Instance,
        to: &Instance,
        whole: bool,
        report: &PublishReport,
    ) -> Result<Vec<String>, RebuildError> {
        let staged = report
            .instances
            .get(to)
            .filter(|e| whole && matches!(e.outcome, Outcome::Published | Outcome::Unchanged) && !e.tables.is_empty());
        let after = match staged {
            Some(entry) => entry.tables.iter().map(|(name, t)| (name.clone(), t.after)).collect(),
            // One that has no version, or one of long ago, is not followed.
            None if !self.is_out(to, report) => return Ok(Vec::new()),
            None => self.published_rows(to).await?,
        };
        let lost = |(name, before): (&TableName, &u64)| {
            let after = *after.get(name)?;
            let lost =
                guard::check(format!("table {name}"), *before, before.saturating_sub(after), after, self.bounds())?;
            Some(lost.to_string())
        };
        Ok(self.published_rows(from).await?.iter().filter_map(lost).collect())
    }

    /// Whether what is published of an instance is kept up to date, or this run looked at its rows.
    fn is_out(&self, instance: &Instance, report: &PublishReport) -> bool {
        let is_fresh = self.heads.get(instance).is_some_and(|head| !head.retired);
        is_fresh || report.instances.get(instance).is_some_and(InstanceReport::is_well)
    }

    /// How many rows of each table are published.
    async fn published_rows(&self, instance: &Instance) -> Result<Rows, RebuildError> {
        let Some(head) = self.heads.get(instance) else { return Ok(Rows::new()) };
        let path = self.replica_path(instance);
        // What is staged on it is not committed yet, and is not seen by another connection.
        let replica = match read_only_at(&path, instance, head, self.config) {
            Some(replica) => replica,
            None if self.options.dry_run => {
                let path = self.scratch_dir.join(format!("{instance}.published.db"));
                rebuild::published(self.workshop(), &path, instance, head, true).await?
            }
            None => rebuild::published(self.workshop(), &path, instance, head, false).await?,
        };
        let count = |table: &TableName| {
            let sql = format!("SELECT count(*) FROM \"{table}\"");
            let rows = replica.connection().query_row(&sql, [], |r| r.get::<_, i64>(0));
            let failed = |e: rusqlite::Error| RebuildError::NoWay {
                instance: instance.clone(),
                version: head.version,
                reason: e.to_string(),
            };
            Ok((table.clone(), rows.map_err(failed)?.unsigned_abs()))
        };
        tokio::task::block_in_place(|| head.digests.keys().map(count).collect())
    }

    /// Who stays where he is: in streams that this run does not look at or whose guard refused.
    pub(super) fn held(&self, report: &PublishReport) -> Held {
        let mut held = Held::new();
        for m in self.moves.iter().filter(|m| self.stays(&m.from.stream, report)) {
            held.entry(m.store.clone()).or_default().insert(m.from.stream.clone());
        }
        held
    }

    /// Whether stores stay where they are in a stream, or in one that it requires.
    pub(super) fn stays(&self, stream: &StreamName, report: &PublishReport) -> bool {
        let settings = self.config.stream(stream);
        let looked_at = settings.is_some() && self.is_asked(stream);
        let requires = settings.into_iter().flat_map(|s| &s.requires);
        !looked_at
            || requires.into_iter().any(|r| self.stays(r, report))
            || report.instances.iter().any(|(i, e)| &i.stream == stream && e.keeps_away)
    }

    /// Notes which stores go over: what the guard lets pass may be a letter wrong nevertheless.
    pub(super) fn note_moves(&self, report: &mut PublishReport) {
        let note = |m: &Move| {
            let to = m.to.as_ref()?;
            let when = if self.is_out(to, report) { "" } else { ", once that is published" };
            Some(format!("store {}: {} → {to}{when}", m.store, m.from))
        };
        let mut notes: Vec<String> =
            self.moves.iter().filter(|m| !self.stays(&m.from.stream, report)).filter_map(note).collect();
        let more = notes.len().saturating_sub(NOTED);
        notes.truncate(NOTED);
        report.notes.append(&mut notes);
        if more > 0 {
            report.notes.push(format!("{more} more stores and streams go over so"));
        }
    }

    /// Mails which stores lost their zone, once, and when all have one again.
    pub(super) async fn tell_lost_zones(&self) -> Result<(), PublishError> {
        let mut lost: Vec<&str> = self.moves.iter().filter(|m| m.to.is_none()).map(|m| m.store.as_str()).collect();
        lost.dedup();
        let text = format!(
            "These have no zone in the source any more: {}.\n\nThey keep what they follow; if nobody else follows it, it \
             grows old. Give them a zone.",
            lost.join(", ")
        );
        let problem = (!lost.is_empty()).then_some(("Stores lost their zone", text.as_str()));
        Ok(mail::publish_notice(self.ledger, self.clock, "zones", problem).await?)
    }
}

fn refusal(code: &'static str, text: String) -> Refusal {
    Refusal { code, text, faults: Faults::default(), reject: Vec::new() }
}

/// Whether this run publishes a version of an instance.
fn comes(instance: &Instance, report: &PublishReport) -> bool {
    report.instances.get(instance).is_some_and(|e| e.outcome == Outcome::Published)
}

fn would_follow(moves: &[&Move]) -> String {
    let first = moves.first().map_or("", |m| m.store.as_str());
    match moves.len() {
        0 => "stores would follow".to_owned(),
        1 => format!("store {first} would follow"),
        n => format!("{n} stores (the first is {first}) would follow"),
    }
}

//! `verify`: are the rows that were published still the rows of their versions, and does the bucket
//! hold what the manifests say? Reads everything, and changes nothing unless it is asked to put back what was signed;
//! the next publish mends replicas.

use crate::bucket::{BucketError, Buckets, MOST};
use crate::config::Config;
use crate::ledger::{Head, Ledger, LedgerError, StoreRow};
use crate::manifests::{self, Followed, ManifestsError};
use crate::publish::PublishError;
use crate::rebuild::{is_at, replica_path};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use proto::clock::Clock;
use proto::dsse;
use proto::ids::{Instance, Version};
use proto::layout::ObjectName;
use proto::limits::Limits;
use proto::manifest::Manifest;
use proto::replica::{Replica, TableCheck, VerifyError};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Each instance.
    pub instances: BTreeMap<Instance, InstanceCheck>,
    /// Manifests compared.
    pub manifests: usize,
    /// Trust files compared.
    pub trust_files: usize,
    /// What is wrong with manifests, trust files and mirrors.
    pub problems: Vec<String>,
}

/// One instance.
#[derive(Debug, Clone, Serialize)]
pub struct InstanceCheck {
    /// Its newest version.
    pub version: Version,
    /// Rows read in the published replica; none when there is no replica (the next publish makes it).
    pub rows: Option<u64>,
    /// Packs read in the bucket.
    pub packs: usize,
    /// What is wrong.
    pub problems: Vec<String>,
    /// What is wrong and nobody needs any more.
    pub notes: Vec<String>,
}

impl Report {
    /// Whether all is as published.
    pub fn is_right(&self) -> bool {
        self.problems.is_empty() && self.instances.values().all(|i| i.problems.is_empty())
    }

    /// The report for people.
    pub fn lines(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (instance, c) in &self.instances {
            let rows = c.rows.map_or_else(|| "no replica here".to_owned(), |n| format!("{n} rows"));
            let verdict = if c.problems.is_empty() { "ok" } else { "WRONG" };
            out.push(format!("{instance} {}: {verdict} ({rows}, {} packs)", c.version, c.packs));
            out.extend(c.problems.iter().map(|p| format!("  {p}")));
            out.extend(c.notes.iter().map(|n| format!("  note: {n}")));
        }
        out.push(format!("{} manifests and {} trust files compared", self.manifests, self.trust_files));
        out.extend(self.problems.iter().map(|p| format!("  {p}")));
        out
    }
}

/// Checks everything; `step` hears of each instance: done, of how many.
pub async fn run(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    mut step: impl FnMut(usize, usize),
) -> Result<Report, LedgerError> {
    let mut report = Report::default();
    let heads = ledger.heads().await?;
    for (n, (instance, head)) in heads.iter().enumerate() {
        step(n, heads.len());
        let (problems, notes) = (Vec::new(), Vec::new());
        let mut check = InstanceCheck { version: head.version, rows: None, packs: 0, problems, notes };
        check_replica(config, instance, head, &mut check).await;
        check_packs(config, buckets, instance, head, &mut check).await;
        // A publish that went by meanwhile is no fault: its own run checks what it makes.
        let moved = ledger.head(instance).await?.is_none_or(|now| now.version != head.version);
        if moved {
            check.problems.clear();
            check.notes.clear();
        }
        report.instances.insert(instance.clone(), check);
    }
    step(heads.len(), heads.len());
    check_manifests(ledger, buckets, &mut report).await?;
    check_trust(config, ledger, buckets, &mut report).await?;
    match buckets.compare_mirrors().await {
        Ok(told) => report.problems.extend(told),
        Err(e) => report.problems.push(e.to_string()),
    }
    Ok(report)
}

async fn check_replica(config: &Config, instance: &Instance, head: &Head, check: &mut InstanceCheck) {
    let path = replica_path(&config.state.dir.join("replicas"), instance);
    if !path.exists() {
        return;
    }
    let (instance, head, limits) = (instance.clone(), head.clone(), config.limits.clone());
    let work = move || read_replica(&path, &instance, &head, &limits);
    match tokio::task::spawn_blocking(work).await {
        Ok((rows, problems)) => {
            check.rows = Some(rows);
            check.problems.extend(problems);
        }
        Err(e) => check.problems.push(format!("the replica cannot be read: {e}")),
    }
}

/// Rows read, and what is wrong.
fn read_replica(path: &Path, instance: &Instance, head: &Head, limits: &Limits) -> (u64, Vec<String>) {
    let look = || {
        let replica = Replica::open_read_only(path, limits)?;
        Ok::<_, VerifyError>((replica.held(&instance.stream)?, replica.verify(&instance.stream)?))
    };
    let (held, tables) = match look() {
        Ok(found) => found,
        Err(e) => return (0, vec![format!("the replica cannot be read: {e}")]),
    };
    let mut problems = Vec::new();
    if !is_at(held.as_ref(), instance, head) {
        let at = held.map_or_else(|| "no version".to_owned(), |h| format!("version {}", h.version));
        problems.push(format!("the replica is at {at} or has other digests: the next publish brings it up"));
    }
    for t in tables.iter().filter(|t| !t.is_right()) {
        let found = t.found.map_or_else(|| "unreadable".to_owned(), |d| d.to_string());
        problems.push(format!(
            "table {}: its rows drifted (digest {found}, published {}): the next publish makes the replica anew",
            t.table, t.stored
        ));
    }
    (tables.iter().map(|t: &TableCheck| t.rows).sum(), problems)
}

async fn check_packs(config: &Config, buckets: &Buckets, instance: &Instance, head: &Head, check: &mut InstanceCheck) {
    let mut lost = Vec::new();
    for entry in &head.packs {
        let name = ObjectName::Pack(entry.name(instance));
        check.packs += 1;
        match buckets.hash(&name).await {
            Ok(Some(found)) if found == (entry.bytes, entry.sha256) => {}
            Ok(Some((bytes, _))) => {
                let put = entry.bytes;
                let text =
                    format!("{name} in the bucket has {bytes} bytes and other content than was put ({put} bytes)");
                lost.push((entry, text));
            }
            Ok(None) => lost.push((entry, format!("{name} is missing in the bucket"))),
            Err(e) => check.problems.push(e.to_string()),
        }
    }
    let round = head.last_full().filter(|full| lost.iter().all(|(entry, _)| entry != full));
    for (entry, text) in &lost {
        // It stays listed until the full after that one, and nobody needs it.
        if let Some(full) = round.filter(|full| entry.version <= full.version) {
            check.notes.push(format!("{text}; {} goes round it", ObjectName::Pack(full.name(instance))));
        } else if head.retired {
            check
                .notes
                .push(format!("{text}; no store follows it: when one does again, publish --full makes a way round"));
        } else if config.stream(&instance.stream).is_none() {
            check.problems.push(format!("{text}: put its [[stream]] back; publish --full then makes a way round"));
        } else {
            check.problems.push(format!("{text}: publish --full makes a way round"));
        }
    }
}

/// Puts manifests and trust files that are wrong or missing in the bucket there once more, how many; and copies to mirrors
/// what they lack. Only under the publisher's lease. Never over newer ones of ours: a ledger set back must not undo what was
/// signed since; where newer trust files cannot be followed, what a key signed that they may name counts as newer. Those are
/// told by an error, after all others were put. (A pack is not kept here: a full goes round it.)
pub async fn put_back(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    clock: &dyn Clock,
) -> Result<usize, PublishError> {
    // What is put to a place that lacks packs makes it no known one.
    if let Err(e) = manifests::check_place(ledger, buckets, &config.limits, false).await {
        tracing::warn!("{e}");
    }
    let unfollowed = match manifests::follow_trust(config, ledger, buckets, clock).await {
        Ok(Followed::Newest) => None,
        Ok(Followed::Not(why)) => Some(ManifestsError::Foreign(format!(
            "{why}. trust.json, and manifests by keys that are not known here, were left as they are: they may be newer than \
             this ledger. Put the right file there, and run this again; if it is a stranger's, delete it and trust.json first"
        ))),
        Err(e) => Some(e),
    };
    let rows = ledger.trust().await?;
    let newest = rows.last().map(|r| (ObjectName::Trust, r.envelope.clone()));
    let mut signed: Vec<_> = rows.into_iter().map(|r| (ObjectName::TrustVersion(r.version), r.envelope)).collect();
    // The pointer last: it leads to the others.
    signed.extend(newest);
    let (mut put, mut overtaken) = (0, None);
    let put_one = async |name: ObjectName, envelope: String| {
        tracing::warn!(object = %name, "put back");
        buckets.put_pointer(&name, envelope.into()).await
    };
    for (name, envelope) in signed {
        match (buckets.get(&name, MOST).await, &unfollowed) {
            (Ok(Some(there)), _) if there == envelope.as_bytes() => {}
            // It may be a newer one: that is known when all trust files can be read.
            (_, Some(_)) if name == ObjectName::Trust => tracing::warn!(object = %name, "left as it is"),
            // One that cannot even be read is put, too.
            _ => {
                put_one(name, envelope).await?;
                put += 1;
            }
        }
    }
    for row in ledger.stores().await?.into_iter().filter(|s| s.serial > 0) {
        let Some(last) = ledger.manifest(&row.seen.id).await? else { continue };
        let name = ObjectName::Manifest(last.store.clone());
        let there = buckets.get(&name, MOST).await;
        if ledger.store(&last.store).await?.is_some_and(|now| now.serial > last.serial) {
            continue;
        }
        match there {
            Ok(Some(there)) if there == last.envelope.as_bytes() => continue,
            Ok(Some(there)) if let Some(manifest) = read_manifest(&there, config) => {
                if let Err(e) = manifests::check_overtaken(ledger, &there, &last).await {
                    overtaken = Some(manifests::gather(overtaken, e));
                    continue;
                }
                if unfollowed.is_some() && !manifests::signed_by_us(ledger, &there, manifest.epoch).await? {
                    tracing::warn!(object = %name, "left as it is: by a key that this ledger does not know");
                    continue;
                }
            }
            Err(_) if unfollowed.is_some() => {
                tracing::warn!(object = %name, "left as it is");
                continue;
            }
            // One that cannot even be read, or by no reader, is no newer one.
            _ => {}
        }
        put_one(name, last.envelope).await?;
        put += 1;
    }
    for lag in buckets.copy_to_mirrors().await?.mirrors {
        tracing::warn!("{lag}");
    }
    match overtaken {
        Some(e) => Ok(manifests::telling(ledger, clock, Err(e)).await?),
        None if let Some(e) = unfollowed => Err(e.into()),
        None => Ok(put),
    }
}

fn read_manifest(there: &[u8], config: &Config) -> Option<Manifest> {
    let payload = dsse::peek_payload(there, MOST).ok()?;
    Manifest::for_reader(&payload, &config.limits).ok()
}

async fn compare(buckets: &Buckets, name: &ObjectName, wanted: &str, max: u64) -> Result<Option<String>, BucketError> {
    Ok(match buckets.get(name, max).await? {
        Some(there) if there == wanted.as_bytes() => None,
        Some(_) => Some(format!("{name} in the bucket is not the one that was signed last")),
        None => Some(format!("{name} is missing in the bucket")),
    })
}

async fn check_manifests(ledger: &Ledger, buckets: &Buckets, report: &mut Report) -> Result<(), LedgerError> {
    let signed: Vec<StoreRow> = ledger.stores().await?.into_iter().filter(|s| s.serial > 0).collect();
    report.manifests = signed.len();
    let checks = stream::iter(signed).map(|row| check_manifest(ledger, buckets, row));
    let problems: Vec<Option<String>> = checks.buffered(buckets.concurrency()).try_collect().await?;
    report.problems.extend(problems.into_iter().flatten());
    Ok(())
}

async fn check_manifest(ledger: &Ledger, buckets: &Buckets, row: StoreRow) -> Result<Option<String>, LedgerError> {
    let Some(last) = ledger.manifest(&row.seen.id).await? else { return Ok(None) };
    let name = ObjectName::Manifest(last.store.clone());
    let problem = match compare(buckets, &name, &last.envelope, MOST).await {
        Ok(None) => return Ok(None),
        Ok(Some(_)) if row.put_serial < row.serial => {
            format!("{name} was signed and not put: the next publish puts it")
        }
        Ok(Some(problem)) => problem,
        Err(e) => e.to_string(),
    };
    // One that was signed anew meanwhile is no fault.
    let moved = ledger.manifest(&row.seen.id).await?.is_some_and(|now| now.serial != last.serial);
    Ok((!moved).then_some(problem))
}

async fn check_trust(
    config: &Config,
    ledger: &Ledger,
    buckets: &Buckets,
    report: &mut Report,
) -> Result<(), LedgerError> {
    let rows = ledger.trust().await?;
    let newest = rows.last().map(|r| (ObjectName::Trust, r.envelope.clone()));
    let all = rows.into_iter().map(|r| (ObjectName::TrustVersion(r.version), r.envelope)).chain(newest);
    for (name, envelope) in all {
        report.trust_files += 1;
        match compare(buckets, &name, &envelope, config.limits.trust_bytes).await {
            Ok(problem) => report.problems.extend(problem),
            Err(e) => report.problems.push(e.to_string()),
        }
    }
    Ok(())
}

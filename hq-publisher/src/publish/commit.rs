//! The commit point, and what follows from it: replicas, manifests, packs that nobody needs any more; and the same for
//! what an earlier run left.

use super::report::{Outcome, PublishReport};
use super::stage::Ready;
use super::{PublishError, Run, Step};
use crate::ledger::{Head, News, Staged, State, StoreRow, Token};
use crate::mail;
use crate::manifests::{self, Followed, ManifestsError, Moves, put_unfinished};
use crate::rebuild;
use crate::retention::{self, Keep};
use crate::some::some;
use proto::clock::before;
use proto::failpoint;
use proto::ids::{Instance, StoreId};
use proto::layout::ObjectName;
use proto::replica::sqlite::Checkpoint;
use proto::replica::{Job, PackFile};
use proto::shelf;
use std::collections::BTreeSet;

impl Run<'_> {
    /// Some stores' manifests that cannot be signed, or that the bucket does not take, hold up nobody else's; those of all
    /// are, `at_end`, the run's failure. Gives what was told.
    async fn bear(&self, put: Result<(), ManifestsError>, at_end: bool) -> Result<Option<String>, ManifestsError> {
        let (failed, e) = match put {
            Err(e @ ManifestsError::NotPut(_)) => (e.stores(), e),
            other => return other.map(|()| None),
        };
        let stores = self.ledger.stores().await?;
        let is_here = |s: &&StoreRow| s.vanished_at.is_none() && (s.serial > 0 || failed.contains(&s.seen.id));
        let mut here = stores.iter().filter(is_here).peekable();
        if at_end && here.peek().is_some() && here.all(|s| failed.contains(&s.seen.id)) {
            return Err(e);
        }
        let text = format!("{} stores get nothing new before their manifests can be put: {e}", failed.len());
        self.problem(text.clone());
        Ok(Some(text))
    }

    /// Rolls forward what was signed, gives up what was not. Gives the stores whose manifests cannot be put.
    pub(super) async fn finish_earlier(&self, report: &mut PublishReport) -> Result<BTreeSet<StoreId>, PublishError> {
        let Some(token) = self.token else { return self.look_before_put().await };
        for state in [State::Reserved, State::Packed] {
            for p in self.ledger.publications(state).await? {
                let step = Step::Abandon(p.instance.clone(), p.version);
                self.step(step, self.ledger.abandon(token, &p.instance, p.version)).await?;
            }
        }
        self.still_publisher().await?;
        // That the ledger was set back is told, of all stores at once, before anything is made that would hide it.
        let put = async {
            let put = put_unfinished(self.ledger, self.buckets, Some(token)).await.map(drop);
            let waiting = put.as_ref().err().map_or_else(BTreeSet::new, ManifestsError::stores);
            match (put, self.put_again().await) {
                (Ok(()), Err(e @ (ManifestsError::Bucket(_) | ManifestsError::NotPut(_)))) => {
                    self.cannot_look(&e);
                }
                (put, again) => drop(self.bear(manifests::both(put, again), false).await?),
            }
            Ok::<_, ManifestsError>(waiting)
        };
        let waiting = self.step(Step::PutManifests, put).await?;
        for p in self.ledger.publications(State::Signed).await? {
            if let Some(head) = self.ledger.head(&p.instance).await? {
                let path = self.replica_path(&p.instance);
                match rebuild::published(self.workshop(), &path, &p.instance, &head, false).await {
                    Ok(_) => {}
                    // It is tried again when the instance is looked at, and told there.
                    Err(e) if e.needs_full() => {
                        tracing::warn!(instance = %p.instance, error = %e, "not brought up yet")
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            let step = Step::Done(p.instance.clone(), p.version);
            self.step(step, self.ledger.done(token, &p.instance, p.version)).await?;
            report.finished.push(format!("{} {}", p.instance, p.version));
        }
        Ok(waiting)
    }

    /// A dry run tells of what a run may end with, and goes on as the one after it.
    async fn look_before_put(&self) -> Result<BTreeSet<StoreId>, PublishError> {
        match manifests::newer_in_bucket(self.ledger, self.buckets, &self.config.limits).await {
            Ok(newer) if newer.is_empty() => {}
            Ok(newer) => self.problem(format!(
                "the ledger is older than the bucket (set back, or another publisher writes there too), which a publish takes \
                 over or ends with: {}",
                some(newer, "; ")
            )),
            Err(e @ (ManifestsError::Bucket(_) | ManifestsError::NotPut(_))) => self.cannot_look(&e),
            Err(e) => return Err(e.into()),
        }
        Ok(BTreeSet::new())
    }

    fn cannot_look(&self, e: &ManifestsError) {
        self.problem(format!("a manifest put earlier cannot be looked at: {e}"));
    }

    /// Puts manifests once more that somebody replaced or deleted.
    async fn put_again(&self) -> Result<(), ManifestsError> {
        match manifests::follow_trust(self.config, self.ledger, self.buckets, self.clock).await? {
            Followed::Newest => manifests::put_again(self.ledger, self.buckets, self.token).await,
            Followed::Not(_) => Ok(()),
        }
    }

    /// The commit point and what follows from it.
    pub(super) async fn sign(&self, mut ready: Vec<Ready>, report: &mut PublishReport) -> Result<(), PublishError> {
        let Some(token) = self.token else { return Ok(()) };
        self.progress.signing(ready.len());
        let stage = |r: &Ready| Staged {
            instance: r.instance.clone(),
            version: r.version,
            requires: self.config.stream(&r.instance.stream).map(|s| s.requires.clone()).unwrap_or_default(),
        };
        let staged: Vec<Staged> = ready.iter().map(stage).collect();
        let (unwanted, compared) = self.retired_heads(report);
        let held = self.held(report);
        let news = News { staged: &staged, unwanted: &unwanted, compared: &compared };
        let sign = self.signer.sign_all(self.ledger, token, news, Moves::AllBut(&held), self.clock);
        let signed = self.step(Step::Sign, sign).await?;
        report.signed = signed.stores.len();
        let mut behind = Vec::new();
        for one in &mut ready {
            let step = Step::CommitReplica(one.instance.clone());
            if let Err(e) = self.step(step, async { self.commit_replica(one) }).await {
                if matches!(e, PublishError::Aborted(_)) {
                    return Err(e);
                }
                // It is out already; the next run brings the replica up from the pack.
                self.problem(format!("{}: the published replica could not follow: {e}", one.instance));
                behind.push(one.instance.clone());
            }
        }
        self.still_publisher().await?;
        let put = async {
            let put = put_unfinished(self.ledger, self.buckets, Some(token)).await.map(drop);
            self.bear(manifests::both(signed.others, put), true).await
        };
        let lacking = self.step(Step::PutManifests, put).await?;
        let problem = lacking.as_deref().map(|text| ("Manifests of some stores cannot be put", text));
        mail::publish_notice(self.ledger, self.clock, "manifests", problem).await?;
        for one in ready {
            if !behind.contains(&one.instance) {
                let step = Step::Done(one.instance.clone(), one.version);
                self.step(step, self.ledger.done(token, &one.instance, one.version)).await?;
            }
            for (_, path) in &one.packs {
                shelf::remove(path)?;
            }
            // What a list says that could not be replaced stays; also of one that was put only now, as it was.
            if lacking.is_none() && !self.signer.leaves_some() {
                report.deleted += self.retain(token, &one.instance).await?;
            }
        }
        self.delete_packs().await
    }

    /// Heads that no store wants any more, and retired ones that one wants again and whose rows are still the source's
    /// (of those with other rows the new version is no retired one). Of a stream that the settings do not name, all when it
    /// may go.
    pub(super) fn retired_heads(&self, report: &PublishReport) -> (Vec<Instance>, Vec<Instance>) {
        let is_left = |i: &Instance| self.moves.iter().any(|m| &m.from == i && self.stays(&i.stream, report));
        let unwanted = |i: &Instance, h: &Head| {
            let is_gone = match self.config.stream(&i.stream) {
                Some(_) => self.is_asked(&i.stream) && !report.instances.contains_key(i) && !is_left(i),
                None => !self.signer.left_out().any(|(s, _)| s == &i.stream),
            };
            !h.retired && is_gone
        };
        let compared = |i: &Instance, h: &Head| {
            h.retired && report.instances.get(i).is_some_and(|e| e.outcome == Outcome::Unchanged && e.is_well())
        };
        let those = |is: &dyn Fn(&Instance, &Head) -> bool| {
            self.heads.iter().filter(|(i, h)| is(i, h)).map(|(i, _)| i.clone()).collect()
        };
        (those(&unwanted), those(&compared))
    }

    fn commit_replica(&self, one: &mut Ready) -> Result<(), PublishError> {
        tokio::task::block_in_place(|| {
            let mut replica = match one.replica.take() {
                Some(replica) => replica,
                None => {
                    let (mut replica, _) =
                        rebuild::open(&self.replica_path(&one.instance), &one.instance, &self.config.limits)?;
                    let (entry, path) = &one.packs[0];
                    let packs = [PackFile { path, entry }];
                    let job = Job {
                        instance: &one.instance,
                        epoch: self.epoch,
                        packs: &packs,
                        now: self.clock.now(),
                        prove: false,
                        listed: None,
                    };
                    replica.apply_uncommitted(&job).map_err(|e| PublishError::Machine(e.to_string()))?;
                    replica
                }
            };
            failpoint::step("publish.commit", || replica.commit())?;
            Ok(replica.checkpoint(Checkpoint::Truncate)?)
        })
    }

    /// Takes packs that nobody needs any more off the ledger, which notes them to be deleted.
    async fn retain(&self, token: Token, instance: &Instance) -> Result<usize, PublishError> {
        let p = &self.config.publish;
        let keep = Keep { age: p.keep.0, bytes: p.keep_bytes.0, settled: p.delete_after.0 };
        let packs = self.ledger.published(instance).await?;
        let gone: Vec<_> =
            retention::expendable(&packs, keep, self.clock.now()).into_iter().map(|p| p.entry.name(instance)).collect();
        if !gone.is_empty() {
            self.still_publisher().await?;
        }
        for name in &gone {
            self.step(Step::ForgetPack(name.clone()), self.ledger.forget_pack(token, name)).await?;
        }
        if !gone.is_empty() {
            self.ledger.forget_replaced(token, instance, before(self.clock.now(), retention::REMEMBERED)).await?;
        }
        Ok(gone.len())
    }

    /// Deletes packs that the ledger gave up or forgot, what earlier runs left undone included. Only below a head
    /// that is out: a ledger from a backup may have given up a number that went out later.
    async fn delete_packs(&self) -> Result<(), PublishError> {
        let names = self.ledger.packs_to_delete().await?;
        if names.is_empty() {
            return Ok(());
        }
        self.still_publisher().await?;
        let heads = self.ledger.heads().await?;
        for name in names.into_iter().filter(|n| heads.get(&n.instance).is_some_and(|h| h.version > n.version)) {
            let delete = async {
                // A mirror that is down is asked again by the next run.
                if self.buckets.delete(&ObjectName::Pack(name.clone())).await? {
                    self.ledger.pack_deleted(&name).await?;
                }
                Ok::<(), PublishError>(())
            };
            self.step(Step::DeletePack(name.clone()), delete).await?;
        }
        Ok(())
    }
}

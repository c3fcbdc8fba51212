//! The end of a cycle: what it mended, what may be deleted, idle work. All of it may be cut off and
//! comes again with the next cycle.

use super::{Agent, Goal};
use crate::pace::End;
use crate::register_db::{STORE_DB, STORE_LOG, log_path};
use proto::clock::since;
use proto::failpoint;
use proto::follow::lock;
use proto::layout::PackName;
use proto::manifest::PackEntry;
use proto::shelf;
use proto::wire::{Fault, fault};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a reader may hold a long log.
const LOG_PATIENCE: Duration = Duration::from_secs(300);

/// So long it is told that a log was lost: nothing here says who reads by it still.
const LOST_LOG: Duration = Duration::from_secs(3600);

impl Agent {
    /// Step 7: what the cycle mended, what it found, and idle work.
    pub(crate) async fn settle(&self, end: End, advanced: bool) -> End {
        self.heed_device();
        let end = if self.halted.load(Ordering::Relaxed) { End::Halted } else { end };
        // It was full until there is room for the ballast too, whatever else a stream waits for.
        if !self.full.load(Ordering::Relaxed) && end != End::Halted && self.disk.restore() {
            self.memory.faults(|f| f.mend(fault::DISK_FULL, |_| true));
            self.told_full.store(false, Ordering::Relaxed);
        }
        let held = self.shown().held.clone();
        let is_held_again = |f: &Fault| {
            f.object.as_deref() == Some(STORE_DB) && f.instance.as_ref().is_some_and(|i| held.contains_key(&i.stream))
        };
        self.memory.faults(|f| f.mend(fault::DRIFT, is_held_again));
        if end == End::Done && self.is_complete() {
            // A file that was begun anew has everything again.
            let is_whole = |f: &Fault| f.instance.is_none() && f.object.as_deref() == Some(STORE_DB);
            self.memory.faults(|f| f.mend(fault::DRIFT, is_whole));
        }
        let now = self.clock.now();
        let is_old = |f: &Fault| f.since > now || since(now, f.since) >= LOST_LOG;
        self.memory.faults(|f| f.mend(fault::DRIFT, |f| f.object.as_deref() == Some(STORE_LOG) && is_old(f)));
        self.mend_packs();
        if end != End::Halted {
            self.cut_log(advanced).await;
        }
        self.memory.save_held_up();
        if self.memory.save_faults() {
            self.tell.notify_one();
        }
        if self.halted.load(Ordering::Relaxed) { End::Halted } else { end }
    }

    /// Idle work: the log is cut; a long one also while news come. Who keeps it from that for minutes is told of: the
    /// log grows with every pack until it fills the disk.
    async fn cut_log(&self, advanced: bool) {
        let long = self.db.log_bytes() > self.config.log_alarm.0;
        if self.log_dirty.load(Ordering::Relaxed) && (long || !advanced) {
            match self.db.truncate_log().await {
                Ok(cut) => self.log_dirty.store(!cut, Ordering::Relaxed),
                Err(e) => self.trouble(e.verdict(), e.is_disk_full(), &format!("the log could not be cut: {e}")),
            }
        }
        if !long || !self.log_dirty.load(Ordering::Relaxed) {
            self.memory.goes_on(STORE_LOG);
            // Of a stream that cannot be written `goes_on` tells.
            self.memory.faults(|f| f.mend(fault::LOG_STUCK, |f| f.instance.is_none()));
        } else if self.memory.held_up(STORE_LOG, &*self.clock) >= LOG_PATIENCE {
            let text = format!(
                "{} is longer than {} (log_alarm), for a program reads in one transaction for minutes: end it",
                log_path(&self.config.store_db()).display(),
                self.config.log_alarm
            );
            let now = self.clock.now();
            self.memory.faults(|f| f.raise(fault::LOG_STUCK, None, None, &text, now));
        }
    }

    /// Whether the database holds every stream that is listed, but for those whose entries cannot be taken: they are told of
    /// as such.
    pub(super) fn is_complete(&self) -> bool {
        let Some(manifest) = lock(&self.device).manifest().cloned() else { return false };
        let shown = self.shown();
        manifest.instances().all(|(i, e)| {
            shown.held.get(&i.stream).and_then(|h| h.version_of(&i, manifest.epoch)).is_some_and(|v| v >= e.version)
        })
    }

    /// A bad pack that was left behind, or is listed no more, is a fault no more; one that kills
    /// this process again and again is.
    pub(super) fn mend_packs(&self) {
        let (held, now) = (self.shown().held.clone(), self.clock.now());
        let (avoided, drifts) = (self.memory.avoided(), self.memory.drifts());
        let manifest = lock(&self.device).manifest().cloned();
        // What is held of another epoch, or of another headquarters, is no version of this one's; what drifted is to come
        // again by a full, perhaps by this one.
        let is_behind = |name: &PackName| {
            let held = held.get(&name.instance.stream).filter(|_| !drifts.contains_key(&name.instance.stream));
            let version = held.zip(manifest.as_ref()).and_then(|(h, m)| h.version_of(&name.instance, m.epoch));
            version.is_some_and(|v| v >= name.version)
        };
        let is_over = |name: &PackName| is_behind(name) || manifest.as_ref().is_some_and(|m| !m.lists(name));
        let tried = self.tries.last();
        let deadly = tried.as_ref().filter(|t| t.is_alarming());
        self.memory.faults(|f| {
            let mut changed = false;
            // First: headquarters is to hear of it though a way round came at once.
            if let Some(t) = deadly {
                // The word that a relay has for it: headquarters goes by it.
                let text = format!(
                    "CRASH: this agent died {} times while applying it; trying again with growing delay",
                    t.deaths
                );
                changed |= f.raise(fault::PACK_IN_ERROR, Some(&t.pack.instance), Some(&t.pack.to_string()), &text, now);
            }
            changed |= f.mend(fault::PACK_IN_ERROR, |f| {
                let name: Option<PackName> = f.object.as_deref().and_then(|o| o.parse().ok());
                let is_deadly = |n: &PackName| deadly.is_some_and(|d| &d.pack == n);
                name.is_none_or(|n| is_over(&n) || !(avoided.contains(&n) || is_deadly(&n)))
            });
            // Another way led past what a source had wrong.
            changed |= f.mend(fault::REFUSED, |f| {
                f.object.as_deref().and_then(|o| o.parse().ok()).is_some_and(|n: PackName| is_behind(&n))
            });
            changed
        });
        // Else it would be told anew by each cycle.
        if let Some(t) = tried.filter(|t| is_over(&t.pack)) {
            self.tries.end(&t.pack);
        }
    }

    /// What killed this process before waits no longer. Whether it had to.
    pub fn hurry(&self) -> bool {
        self.tries.hurry(self.clock.monotonic())
    }

    /// Deletes downloads that no plan will want any more, once a manifest.
    pub(super) async fn sweep_packs(&self, goal: &Goal) {
        let swept = self.swept_for.lock().unwrap_or_else(PoisonError::into_inner).replace(goal.manifest.serial);
        if swept == Some(goal.manifest.serial) {
            return;
        }
        let held = self.shown().held.clone();
        let wanted: BTreeSet<PathBuf> = goal
            .manifest
            .instances()
            .flat_map(|(i, e)| {
                let at = held.get(&i.stream).and_then(|h| h.version_of(&i, goal.manifest.epoch));
                let drifted = self.memory.drifted(&i.stream);
                let ahead = move |p: &&PackEntry| drifted || at.is_none_or(|v| p.version > v);
                e.packs.iter().filter(ahead).map(|p| self.part(&p.name(&i))).collect::<Vec<_>>()
            })
            .collect();
        let root = self.config.data_dir.join("packs");
        let sweep = move || {
            for dir in shelf::list(&root)? {
                for file in if dir.is_dir { shelf::list(&dir.path)? } else { vec![dir.clone()] } {
                    if !wanted.contains(&file.path) && !file.is_dir {
                        failpoint::step("agent.sweep", || shelf::remove(&file.path))?;
                    }
                }
                if dir.is_dir {
                    shelf::remove_empty_dir(&dir.path)?;
                }
            }
            Ok::<(), shelf::ShelfError>(())
        };
        if let Ok(Err(e)) = tokio::task::spawn_blocking(sweep).await {
            tracing::warn!(error = %e, "old downloads could not be deleted");
        }
    }
}

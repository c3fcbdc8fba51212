//! The fleet as it is seen now: by `serve` from what was heard, by a command from the ledger.
//!
//! Owns which published digests are known without asking. Changes nothing of what was heard.

use super::Intake;
use super::voices::Heard;
use crate::fleet::{DeviceView, Published};
use crate::ledger::{BeatRow, Complaint, Ledger, LedgerError};
use proto::clock::{Timestamp, since};
use proto::dsse;
use proto::ids::DeviceId;
use proto::limits::Limits;
use proto::runs::DOUBLE_TOLD;
use proto::wire::Heartbeat;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Versions whose digests are kept though nobody asked for them lately: as many as a large chain publishes in weeks.
const KNOWN: usize = 20_000;

impl Intake {
    /// Every enrolled device as it is seen now.
    pub fn views<'a>(&self, devices: &'a [DeviceId]) -> Vec<DeviceView<'a>> {
        self.views_with(devices, |_, _, _| true, |_| true)
    }

    /// The same, without devices and heartbeats of which there is nothing to tell: most are heard, say what they said, and
    /// have no complaint.
    pub fn news<'a>(&self, devices: &'a [DeviceId], complaints: &[Complaint]) -> Vec<DeviceView<'a>> {
        let complain: BTreeSet<&DeviceId> = complaints.iter().map(|c| &c.device).collect();
        let says_something = |h: &Heard| !h.is_calm || h.stuck.is_some() || !h.late.is_empty();
        let is_news = |id: &DeviceId, heard: Option<&Heard>, now: Duration| {
            let limit = self.away(id);
            let is_loud =
                |h: &Heard| says_something(h) || h.double.is_some() || h.is_just_back() || h.silent_for(now) >= limit;
            // Of one that was enrolled anew an episode may be open.
            heard.is_none_or(is_loud) || complain.contains(id)
        };
        self.views_with(devices, is_news, says_something)
    }

    fn views_with<'a>(
        &self,
        devices: &'a [DeviceId],
        is_wanted: impl Fn(&DeviceId, Option<&Heard>, Duration) -> bool,
        with_beat: impl Fn(&Heard) -> bool,
    ) -> Vec<DeviceView<'a>> {
        let now = self.clock.monotonic();
        let state = self.state();
        let mut views = Vec::new();
        for of_store in devices.chunk_by(|a, b| a.store() == b.store()) {
            let store = of_store[0].store();
            let voices = state.heard.0.get(store).map(|of| &of.devices);
            let heard = |id: &DeviceId| voices.and_then(|v| v.get(id));
            // A register is watched while its store's relay is heard: not where there is none, or none was heard yet.
            let relay = of_store.iter().find(|id| matches!(id, DeviceId::Relay(_))).and_then(heard);
            views.extend(of_store.iter().filter_map(|id| {
                let heard = heard(id);
                if !is_wanted(id, heard, now) {
                    return None;
                }
                let (watched_from, before) = match id {
                    DeviceId::Relay(_) => (state.started, Duration::ZERO),
                    DeviceId::Register(_) => relay.map_or((now, Duration::ZERO), |r| {
                        // Each return of the relay leaves it some minutes all the same.
                        let most = self.register_silent.saturating_sub(self.store_silent);
                        let before = heard.map_or(Duration::ZERO, |h| h.watched.min(most));
                        (r.back.unwrap_or_default().max(state.started), before)
                    }),
                };
                let without = |since: Option<Duration>| Some(heard?.without_since(since?, now));
                Some(DeviceView {
                    id,
                    silent_for: heard.map(|h| h.silent_for(now)),
                    watched_for: now.saturating_sub(watched_from) + before,
                    is_just_back: heard.is_some_and(Heard::is_just_back),
                    stuck_for: without(heard.and_then(|h| h.stuck)),
                    late_for: without(heard.and_then(|h| h.late.values().min().copied())),
                    is_double: heard.and_then(|h| h.double).is_some_and(|at| now.saturating_sub(at) < DOUBLE_TOLD),
                    beat: heard.filter(|h| with_beat(h)).map(|h| Arc::clone(&h.beat)),
                })
            }));
        }
        views
    }

    /// The digests, as published, of every version that these devices hold.
    pub async fn published(&self, views: &[DeviceView<'_>]) -> Result<Arc<Published>, LedgerError> {
        let known = std::mem::take(&mut self.state().published);
        let found = Arc::new(published(&self.ledger, views, Arc::unwrap_or_clone(known)).await?);
        self.state().published = Arc::clone(&found);
        Ok(found)
    }
}

/// The digests of all versions that devices report, from the ledger where they are not known.
async fn published(ledger: &Ledger, views: &[DeviceView<'_>], known: Published) -> Result<Published, LedgerError> {
    let few = known.values().map(BTreeMap::len).sum::<usize>() < KNOWN;
    let mut published = if few { known } else { Published::new() };
    let beats = || views.iter().filter_map(|v| v.beat.as_ref());
    let is_new_to_us = |b: &Arc<Heartbeat>| {
        let mut all = b.streams.keys().chain(b.errors.iter().filter_map(|f| f.instance.as_ref()));
        all.any(|i| !published.contains_key(i))
    };
    if beats().any(is_new_to_us) {
        for instance in ledger.instances().await? {
            published.entry(instance).or_default();
        }
    }
    // What was above the newest may be published by now.
    for of in published.values_mut() {
        let newest = of.iter().rev().find(|(_, digests)| digests.is_some()).map(|(v, _)| *v);
        of.retain(|v, digests| digests.is_some() || newest.is_some_and(|newest| *v < newest));
    }
    for beat in beats() {
        for (instance, report) in beat.streams.iter() {
            let (Some(version), Some(of)) = (report.version, published.get_mut(instance)) else { continue };
            if let Entry::Vacant(unknown) = of.entry(version) {
                let digests = ledger.publication(instance, version).await?.map(|p| p.digests);
                let is_known = unknown.insert(digests).is_some();
                // One that is above the newest was never published here.
                if !is_known && let Some(head) = ledger.head(instance).await? {
                    of.insert(head.version, Some(head.digests));
                }
            }
        }
    }
    Ok(published)
}

/// The fleet for a command that runs once: silence by the wall clock, watched for ever.
pub async fn glance<'a>(
    ledger: &Ledger,
    devices: &'a [DeviceId],
    now: Timestamp,
    limits: &Limits,
) -> Result<(Vec<DeviceView<'a>>, Published), LedgerError> {
    let mut beats: BTreeMap<DeviceId, BeatRow> =
        ledger.beats(None).await?.into_iter().map(|b| (b.device.clone(), b)).collect();
    let mut views = Vec::new();
    for id in devices {
        let row = beats.remove(id);
        views.push(DeviceView {
            silent_for: row.as_ref().map(|r| since(now, r.last_seen_at)),
            watched_for: Duration::MAX,
            is_just_back: false,
            stuck_for: None,
            late_for: None,
            is_double: false,
            beat: row.and_then(|r| dsse::peek(r.envelope.as_bytes(), limits.heartbeat_bytes).ok()).map(Arc::new),
            id,
        });
    }
    let digests = published(ledger, &views, Published::new()).await?;
    Ok((views, digests))
}

//! Who waits for a store's next manifest.

use crate::ledger::{Ledger, LedgerError, Serials};
use proto::ids::StoreId;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::watch;

/// The answer to a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// No such store.
    Unknown,
    /// A newer manifest is there: its serial.
    Changed(u64),
    /// None came: the serial that was known before.
    Unchanged(u64),
}

/// One channel a store: only those concerned wake.
#[derive(Debug, Default)]
pub struct Wakes(RwLock<HashMap<StoreId, watch::Sender<u64>>>);

impl Wakes {
    /// Reads the serials that are in the bucket and wakes whose changed.
    pub async fn refresh(&self, ledger: &Ledger) -> Result<(), LedgerError> {
        let serials = ledger.serials().await?;
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (store, Serials { wake: serial, .. }) in &*serials {
            match all.get(store) {
                // 0: signed and not put; the one before still stands.
                Some(sender) => {
                    sender.send_if_modified(|s| {
                        if *serial != 0 && s != serial {
                            *s = *serial;
                            true
                        } else {
                            false
                        }
                    });
                }
                None => {
                    all.insert(store.clone(), watch::Sender::new(*serial));
                }
            }
        }
        Ok(())
    }

    fn subscribe(&self, store: &StoreId) -> Option<watch::Receiver<u64>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all.get(store).map(watch::Sender::subscribe)
    }

    /// Waits until the store's serial is above `known` (none: until it has one).
    pub async fn wait(
        &self,
        store: &StoreId,
        known: Option<u64>,
        longest: Duration,
        mut stopping: watch::Receiver<bool>,
    ) -> Woken {
        let Some(mut serial) = self.subscribe(store) else { return Woken::Unknown };
        let newer = |s: &u64| *s > known.unwrap_or(0);
        let changed = tokio::select! {
            // News that came with the last moment are news.
            biased;
            changed = serial.wait_for(newer) => changed.map(|s| *s).ok(),
            () = tokio::time::sleep(longest) => None,
            _ = stopping.wait_for(|s| *s) => None,
        };
        match changed {
            Some(serial) => Woken::Changed(serial),
            None => Woken::Unchanged(*serial.borrow()),
        }
    }
}

//! Devices, what they last reported, and receipts.

use super::{Ledger, LedgerError};
use proto::clock::Timestamp;
use proto::ids::{DeviceId, StoreId};
use proto::keys::PublicKey;

/// An enrolled device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRow {
    /// Who.
    pub id: DeviceId,
    /// Its key.
    pub key: PublicKey,
    /// When its code was made.
    pub enrolled_at: Timestamp,
    /// When it was revoked; none while it is trusted.
    pub revoked_at: Option<Timestamp>,
}

/// The last heartbeat of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatRow {
    /// Who.
    pub device: DeviceId,
    /// Its number.
    pub seq: u64,
    /// The signed envelope.
    pub envelope: String,
    /// When HQ received it.
    pub received_at: Timestamp,
    /// When the device was last heard, by HQ or by its relay.
    pub last_seen_at: Timestamp,
}

/// What became of a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeatOutcome {
    /// Newer than the last one: stored.
    Recorded,
    /// The last one again.
    Known,
    /// Older than the last one, whose number this is.
    Older(u64),
}

/// A receipt of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptRow {
    /// Whose.
    pub store: StoreId,
    /// When the relay wrote it.
    pub time: Timestamp,
    /// When it was read back here.
    pub recorded_at: Timestamp,
    /// The signed envelope.
    pub envelope: String,
}

impl Ledger {
    /// Stores a device's key, in place of an earlier one; its heartbeats are counted anew.
    pub async fn enrol(&self, id: &DeviceId, key: &PublicKey, now: Timestamp) -> Result<(), LedgerError> {
        let _ = (id, key, now);
        todo!()
    }
    /// Revokes a device; false when there is none, or it is revoked.
    pub async fn revoke(&self, id: &DeviceId, now: Timestamp) -> Result<bool, LedgerError> {
        let _ = (id, now);
        todo!()
    }
    /// All devices, revoked ones too.
    pub async fn devices(&self) -> Result<Vec<DeviceRow>, LedgerError> {
        todo!()
    }
    /// One device.
    pub async fn device(&self, id: &DeviceId) -> Result<Option<DeviceRow>, LedgerError> {
        let _ = id;
        todo!()
    }
    /// Records heartbeats in one transaction; an answer for each.
    pub async fn record_beats(&self, beats: &[BeatRow]) -> Result<Vec<BeatOutcome>, LedgerError> {
        let _ = beats;
        todo!()
    }
    /// The last heartbeat of each device that was received at or after a time (none: all).
    pub async fn beats(&self, since: Option<Timestamp>) -> Result<Vec<BeatRow>, LedgerError> {
        let _ = since;
        todo!()
    }
    /// Stores a receipt; the same again is fine.
    pub async fn add_receipt(&self, receipt: &ReceiptRow) -> Result<(), LedgerError> {
        let _ = receipt;
        todo!()
    }
    /// A durable small fact.
    pub async fn fact(&self, name: &str) -> Result<Option<String>, LedgerError> {
        let _ = name;
        todo!()
    }
    /// Sets a fact.
    pub async fn set_fact(&self, name: &str, value: &str) -> Result<(), LedgerError> {
        let _ = (name, value);
        todo!()
    }
}

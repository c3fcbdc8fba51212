//! `fleet.db`: what this program knows, and the only SQL on it. SQLite or PostgreSQL, one text of
//! SQL for both.
//!
//! Owns leases, versions, manifests, devices, heartbeats and the outbox. Must never look into a
//! bucket or a source. Every method is one transaction: if the power goes, it happened or did not;
//! the commit of [`Ledger::sign`] is the point after which a publish is rolled forward.

mod db;
mod fleet;
mod lease;
mod outbox;
mod publications;
mod stores;

pub use db::{Change, Kind, Ledger, LedgerError, Listener};
pub use fleet::{
    BeatOutcome, BeatRow, Complaint, DeviceRow, Enrolments, LIST_NOT_OURS, ReceiptRow, SERIAL_REACH, StoreDevices,
    VERSION_NOT_OURS, WITNESSES,
};
pub use lease::{Acquired, Token};
pub use outbox::{Claimed, Episode, Failed, Mail, Taken};
pub use publications::{
    Adopted, FoundList, Head, News, Publication, PublishedPack, Reserve, Staged, State, TakenOver, listed,
};
pub use stores::{Made, Maker, NewManifest, Serials, SignStore, StoreRow, StoreSeen, ToPut, TrustRow, WasPut, Which};

#[cfg(test)]
mod tests;

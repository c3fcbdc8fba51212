//! Versions on their way: reserved, packed, signed, done; and the head of each instance.

use super::{Ledger, LedgerError, Token};
use proto::clock::Timestamp;
use proto::digest::{Sha256, StateDigest};
use proto::ids::{Instance, StreamName, TableName, Version};
use proto::layout::{PackKind, PackName};
use proto::manifest::PackEntry;
use std::collections::BTreeMap;

/// How far a publication got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its number is taken.
    Reserved,
    /// Its packs are in the bucket.
    Packed,
    /// Past the commit point: manifests that name it are stored.
    Signed,
    /// Manifests are in the bucket and the replica is there too.
    Done,
    /// Given up; the number stays used.
    Abandoned,
}

/// A number to take.
#[derive(Debug, Clone)]
pub struct Reserve<'a> {
    /// Whose.
    pub instance: &'a Instance,
    /// The number: above [`Ledger::max_version`].
    pub version: Version,
    /// The trust epoch.
    pub epoch: u64,
    /// The contract's number, from [`Ledger::schema_number`]; stored with its text if it is new.
    pub schema: u64,
    /// SHA-256 of the contract's text.
    pub schema_sha256: &'a Sha256,
    /// The contract's text.
    pub ddl: &'a str,
    /// What is planned and why, for people.
    pub plan: &'a str,
    /// Now.
    pub now: Timestamp,
}

/// A publication as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// Whose.
    pub instance: Instance,
    /// The number.
    pub version: Version,
    /// How far it got.
    pub state: State,
    /// The trust epoch.
    pub epoch: u64,
    /// The contract's number.
    pub schema: u64,
    /// What was planned and why.
    pub plan: String,
    /// Its packs, once packed: a full, a delta, or both.
    pub packs: Vec<PackEntry>,
    /// The state digests, once packed.
    pub digests: BTreeMap<TableName, StateDigest>,
    /// When the number was taken.
    pub created_at: Timestamp,
}

/// A packed publication to be made its instance's head by [`Ledger::sign`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// Whose.
    pub instance: Instance,
    /// The number.
    pub version: Version,
}

/// The newest version of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The number.
    pub version: Version,
    /// The trust epoch it was published in.
    pub epoch: u64,
    /// The contract's number.
    pub schema: u64,
    /// The state digests.
    pub digests: BTreeMap<TableName, StateDigest>,
    /// The packs that manifests list, by (version, kind): from the full before the last one on.
    pub packs: Vec<PackEntry>,
    /// When it was signed.
    pub signed_at: Timestamp,
}

impl Head {
    /// Deltas since the last full.
    pub fn deltas_since_full(&self) -> impl Iterator<Item = &PackEntry> {
        let full = self.packs.iter().rposition(|p| p.kind == PackKind::Full);
        let version = full.map(|i| self.packs[i].version);
        self.packs.iter().filter(move |p| p.kind == PackKind::Delta && Some(p.version) > version)
    }
    /// The last full.
    pub fn last_full(&self) -> Option<&PackEntry> {
        self.packs.iter().rfind(|p| p.kind == PackKind::Full)
    }
}

/// A pack that was published and not yet deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedPack {
    /// The pack.
    pub entry: PackEntry,
    /// When its publication was signed.
    pub signed_at: Timestamp,
    /// When the publication was signed whose manifests no longer list it; none while listed.
    pub dropped_at: Option<Timestamp>,
}

/// The packs that a manifest lists, of all those of an instance in order: from the full before the
/// last one on, so that a chain that someone is on stays listed.
pub fn listed(packs: &[PackEntry]) -> &[PackEntry] {
    let _ = packs;
    todo!()
}

impl Ledger {
    /// The number for a contract's text: that of the stream's newest contract if it is the same
    /// text, else the next one (`true`). Nothing is written before [`Ledger::reserve`].
    pub async fn schema_number(&self, stream: &StreamName, sha256: &Sha256) -> Result<(u64, bool), LedgerError> {
        let _ = (stream, sha256);
        todo!()
    }
    /// The contract's text of a number.
    pub async fn schema_ddl(&self, stream: &StreamName, number: u64) -> Result<Option<String>, LedgerError> {
        let _ = (stream, number);
        todo!()
    }
    /// The greatest number that the ledger knows of an instance, abandoned ones too.
    pub async fn max_version(&self, instance: &Instance) -> Result<Option<Version>, LedgerError> {
        let _ = instance;
        todo!()
    }
    /// Takes a number. Fails when the lease is lost or the number is not above all before.
    pub async fn reserve(&self, token: Token, reserve: &Reserve<'_>) -> Result<(), LedgerError> {
        let _ = (token, reserve);
        todo!()
    }
    /// The packs are in the bucket.
    pub async fn packed(
        &self,
        token: Token,
        instance: &Instance,
        version: Version,
        packs: &[PackEntry],
        digests: &BTreeMap<TableName, StateDigest>,
    ) -> Result<(), LedgerError> {
        let _ = (token, instance, version, packs, digests);
        todo!()
    }
    /// Gives up a reserved or packed publication; its number stays used.
    pub async fn abandon(&self, token: Token, instance: &Instance, version: Version) -> Result<(), LedgerError> {
        let _ = (token, instance, version);
        todo!()
    }
    /// Manifests are put and the replica is brought up.
    pub async fn done(&self, token: Token, instance: &Instance, version: Version) -> Result<(), LedgerError> {
        let _ = (token, instance, version);
        todo!()
    }
    /// Takes over a head found in the bucket's manifests, where the ledger knows none or a lower one
    /// (a publisher on a new machine). `ddl` is the contract found in its packs.
    pub async fn adopt(
        &self,
        token: Token,
        instance: &Instance,
        head: &Head,
        ddl: (&Sha256, &str),
    ) -> Result<(), LedgerError> {
        let _ = (token, instance, head, ddl);
        todo!()
    }
    /// The newest version of every instance.
    pub async fn heads(&self) -> Result<BTreeMap<Instance, Head>, LedgerError> {
        todo!()
    }
    /// The newest version of one instance.
    pub async fn head(&self, instance: &Instance) -> Result<Option<Head>, LedgerError> {
        let _ = instance;
        todo!()
    }
    /// Publications in a state, oldest first: `Reserved` and `Packed` ones are left by a crash before
    /// the commit point (abandon them), `Signed` ones by a crash after it (finish them).
    pub async fn publications(&self, state: State) -> Result<Vec<Publication>, LedgerError> {
        let _ = state;
        todo!()
    }
    /// One publication.
    pub async fn publication(&self, i: &Instance, v: Version) -> Result<Option<Publication>, LedgerError> {
        let _ = (i, v);
        todo!()
    }
    /// Every pack of an instance that was signed and not deleted, by (version, kind): for retention.
    pub async fn published(&self, instance: &Instance) -> Result<Vec<PublishedPack>, LedgerError> {
        let _ = instance;
        todo!()
    }
    /// A pack is to be deleted from the buckets: first here, so that it is never listed again.
    pub async fn forget_pack(&self, token: Token, pack: &PackName) -> Result<(), LedgerError> {
        let _ = (token, pack);
        todo!()
    }
}

//! Keys and devices: `init`, `enroll`, `revoke`, `trust …`.
//!
//! Owns the order of steps: a key file before anything is signed by it, the ledger before the bucket.
//! Each command picks up where a crash left it when it is run again. Must never print a secret but the
//! code that it was asked for.

use crate::bucket::{BucketError, Buckets};
use crate::config::{Config, SourceKind};
use crate::keys::{self, KeyFile, Keyring, KeysError, Role};
use crate::ledger::{DeviceRow, Ledger, LedgerError, News, Token};
use crate::manifests::{self, ManifestsError, Moves, Signer};
use crate::publish::{Lease, PublishError, behind};
use crate::source::{self, BadStores};
use crate::source_db::{Database, SourceError, dialect, query::Query};
use proto::clock::{Clock, Timestamp, after};
use proto::failpoint;
use proto::ids::{DeviceId, Instance, StoreId, StreamName};
use proto::keys::{PublicKey, SecretKey};
use proto::shelf::LockFile;
use proto::trust::{self, EnrolCode, PublisherKey, RootKeys, Trust};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Keys or devices could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// Signing or putting.
    #[error(transparent)]
    Manifests(#[from] ManifestsError),
    /// Key files.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The source, asked for its stores.
    #[error("cannot look store {store} up in the source: {source}")]
    Source {
        /// The store asked for.
        store: StoreId,
        /// Why not.
        source: SourceError,
    },
    /// No such store.
    #[error(
        "store {0} is not known: the [stores] query does not give it (with an inbox: publish once, with stores.csv)"
    )]
    UnknownStore(StoreId),
    /// No such device.
    #[error("{0} is not enrolled")]
    NotEnrolled(DeviceId),
    /// A file system that does not tell case apart would hold one of the two.
    #[error("{id} differs only in case from {known}, which is enrolled: write it {known}, or revoke that first")]
    CaseClash {
        /// As given.
        id: DeviceId,
        /// What is enrolled.
        known: DeviceId,
    },
    /// The list of stores.
    #[error(transparent)]
    Stores(#[from] BadStores),
    /// The lease is somebody else's.
    #[error("{0}: wait for it, then run this again")]
    Busy(Box<PublishError>),
    /// Trust files or codes.
    #[error(transparent)]
    Refused(#[from] trust::Refusal),
    /// A key id that fits none, or several.
    #[error("`{key}` is not the id of a publisher key that is trusted; those are: {known}")]
    UnknownKey {
        /// As given.
        key: String,
        /// The ids that are.
        known: String,
    },
    /// The bucket has what the ledger does not know, and nobody could tell by whom when the key is let go of. Told once.
    #[error(
        "no key was changed yet: {0}. When that is done, or if a key's thief put those, run this again: it goes on"
    )]
    SetBack(ManifestsError),
    /// The key is revoked; in a new epoch registers would go back to the rows that the ledger knows.
    #[error(
        "the key is not trusted any more. No new epoch begins yet: the bucket has packs of {0} above the version that the \
         ledger knows, which was set back, or they are a thief's (delete those). Run publish until it exits 0, then this again"
    )]
    EpochWaits(Instance),
    /// `--finish` without a rotation.
    #[error("no rotation is under way: trust file {0} names one publisher key")]
    NothingToFinish(u64),
    /// The system gave no randomness.
    #[error(transparent)]
    Key(#[from] proto::keys::BadKey),
    /// The first key files are there, a trust file is not.
    #[error("{0}")]
    Init(String),
}

/// Everything that these commands work on.
pub struct Desk<'a> {
    /// The settings.
    pub config: &'a Config,
    /// The ledger.
    pub ledger: Ledger,
    /// The buckets.
    pub buckets: Buckets,
    /// The time.
    pub clock: &'a dyn Clock,
    /// Somebody vouched for the clock.
    pub clock_is_right: bool,
}

/// What `init` did.
#[derive(Debug, Clone, Serialize)]
pub struct InitReport {
    /// A short word: `made`, `found` (was there), `taken over` (from the bucket).
    pub outcome: &'static str,
    /// The trust file's version.
    pub trust_version: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Root key files in the keys directory.
    pub root_keys: Vec<PathBuf>,
    /// Publisher key files in the keys directory.
    pub publisher_keys: Vec<PathBuf>,
}

/// A code to give to `enroll` on a device.
#[derive(Debug, Clone, Serialize)]
pub struct NewCode {
    /// The device.
    pub id: DeviceId,
    /// The code: a secret.
    pub code: String,
    /// After this it is refused.
    pub expires_at: Timestamp,
    /// When the device was last heard with its key before, which counts no more; none: it had none that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_heard_at: Option<Timestamp>,
}

/// What `trust show` tells, and `rotate` and `revoke` end with.
#[derive(Debug, Clone, Serialize)]
pub struct TrustReport {
    /// The trust file's version.
    pub version: u64,
    /// Its epoch.
    pub epoch: u64,
    /// When it was signed.
    pub created_at: Timestamp,
    /// Root signatures needed.
    pub root_threshold: usize,
    /// The root keys.
    pub root: Vec<KeyLine>,
    /// The publisher keys; the last one whose file is here signs.
    pub publishers: Vec<KeyLine>,
    /// The streams that lists may have; none: any.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub streams: BTreeSet<StreamName>,
    /// Manifests signed by this command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifests_signed: Option<usize>,
    /// The root key that this command made; it must go offline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_root: Option<PathBuf>,
    /// The publisher key that this command brought into use; no backup has it yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_publisher: Option<PathBuf>,
    /// What is to be done now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<&'static str>,
}

/// One key in a report.
#[derive(Debug, Clone, Serialize)]
pub struct KeyLine {
    /// Its id.
    pub id: String,
    /// Its public half.
    pub public_key: String,
    /// Until when it may sign; roots: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Its file, if it is in the keys directory.
    pub file: Option<PathBuf>,
}

impl<'a> Desk<'a> {
    /// Opens ledger and buckets.
    pub async fn open(config: &'a Config, clock: &'a dyn Clock, clock_is_right: bool) -> Result<Desk<'a>, EnrolError> {
        let ledger = Ledger::open(config).await?;
        let buckets = Buckets::open(config, &ledger).await?;
        Ok(Desk { config, ledger, buckets, clock, clock_is_right })
    }

    fn keyring(&self) -> Keyring {
        Keyring::new(self.config.state.keys())
    }

    async fn trust(&self) -> Result<Trust, EnrolError> {
        let newest = manifests::newest_trust(&self.ledger, &self.config.limits).await?;
        Ok(newest.ok_or(KeysError::NoTrust)?)
    }

    /// Signs what is put to a bucket that has what lists name.
    async fn signer(&self) -> Result<Signer, EnrolError> {
        manifests::check_place(&self.ledger, &self.buckets, &self.config.limits, false).await?;
        self.signer_anywhere().await
    }

    async fn signer_anywhere(&self) -> Result<Signer, EnrolError> {
        manifests::follow_trust(self.config, &self.ledger, &self.buckets, self.clock).await?;
        manifests::check_taken_over(self.config, &self.ledger, &self.buckets, self.clock).await?;
        Ok(Signer::open(self.config, &self.ledger, self.clock, self.clock_is_right).await?)
    }

    /// Makes keys and the first trust file; takes over what is there.
    pub async fn init(&self) -> Result<InitReport, EnrolError> {
        let ring = self.keyring();
        let outcome = if !self.ledger.trust().await?.is_empty() {
            "found"
        } else if manifests::recover_trust(self.config, &self.ledger, &self.buckets, self.clock, &[]).await? {
            "taken over"
        } else {
            // A crash after a key was written: the next run goes on with it.
            let root = first_or_new(&ring, Role::Root)?;
            let publisher = first_or_new(&ring, Role::Publisher)?;
            let now = self.clock.now();
            let first = Trust {
                format: trust::FORMAT,
                version: 1,
                epoch: 1,
                created_at: now,
                root: RootKeys { threshold: 1, keys: vec![root.public()] },
                publishers: vec![self.may_sign(publisher.public(), now)],
                streams: BTreeSet::new(),
            };
            self.add_trust(&first, &[&root.key], false).await?;
            "made"
        };
        manifests::put_trust(&self.ledger, &self.buckets).await?;
        self.buckets.repair_mirrors().await?;
        let trust = self.trust().await?;
        let paths = |role| Ok::<_, KeysError>(ring.keys(role)?.into_iter().map(|k| k.path).collect());
        Ok(InitReport {
            outcome,
            trust_version: trust.version,
            epoch: trust.epoch,
            root_keys: paths(Role::Root)?,
            publisher_keys: paths(Role::Publisher)?,
        })
    }

    fn may_sign(&self, key: PublicKey, now: Timestamp) -> PublisherKey {
        PublisherKey { key, expires_at: after(now, self.config.publish.publisher_key_life.0) }
    }

    async fn add_trust(&self, trust: &Trust, roots: &[&SecretKey], begins: bool) -> Result<(), EnrolError> {
        let envelope = trust.sign(roots)?;
        let text = String::from_utf8(envelope).map_err(|e| trust::Refusal::Trust(e.to_string()))?;
        let add = self.ledger.add_trust(trust.version, &text, self.clock.now(), begins);
        Ok(failpoint::around("trust.signed", add).await?)
    }

    /// Makes a device's key and code, and puts its public half into its store's manifest.
    pub async fn enroll(&self, id: &DeviceId) -> Result<NewCode, EnrolError> {
        let store = id.store();
        self.know(store).await?;
        let enrolled = self.ledger.devices_of(store).await?;
        let mut trusted = enrolled.iter().filter(|d| d.revoked_at.is_none());
        let other_case = |d: &&DeviceRow| &d.id != id && d.id.as_str().eq_ignore_ascii_case(id.as_str());
        if let Some(known) = trusted.clone().find(other_case) {
            return Err(EnrolError::CaseClash { id: id.clone(), known: known.id.clone() });
        }
        let last_heard_at = if trusted.any(|d| &d.id == id) { self.ledger.last_heard(id).await? } else { None };
        // 1. What can fail without a trace, first.
        let signer = self.signer().await?;
        let now = self.clock.now();
        let key = SecretKey::generate()?;
        let expires_at = after(now, self.config.publish.code_life.0);
        let code = EnrolCode {
            format: 1,
            id: id.clone(),
            seed: key.to_secret_text(),
            roots: signer.trust().root.clone(),
            trust_version: signer.trust().version,
            expires_at,
        };
        let code = code.to_text()?;
        // 2. The ledger, then the bucket. After a crash between them the next publish puts it.
        failpoint::around("enrol.device", self.ledger.enrol(id, &key.public(), now)).await?;
        self.sign_and_put(&signer, store).await?;
        Ok(NewCode { id: id.clone(), code, expires_at, last_heard_at })
    }

    /// Takes a device's key out of its store's manifest.
    pub async fn revoke(&self, id: &DeviceId) -> Result<(), EnrolError> {
        // The ledger first: from here on nobody believes it, whether or not the bucket can be reached.
        let revoke = async || failpoint::around("enrol.revoke", self.ledger.revoke(id, self.clock.now())).await;
        let revoked = revoke().await?;
        let signer = self.signer().await?;
        // One that a new ledger knows only now; or a crash after the ledger: it is revoked, its manifest perhaps not yet put.
        if !revoked && !revoke().await? && self.ledger.device(id).await?.is_none() {
            return Err(EnrolError::NotEnrolled(id.clone()));
        }
        self.sign_and_put(&signer, id.store()).await
    }

    async fn sign_and_put(&self, signer: &Signer, store: &StoreId) -> Result<(), EnrolError> {
        manifests::put_trust(&self.ledger, &self.buckets).await?;
        // One that waits to be put may have been overtaken: the next would hide it.
        if self.ledger.store(store).await?.is_some_and(|s| s.put_serial < s.serial && !s.is_overtaken()) {
            let put = manifests::put_store(&self.ledger, &self.buckets, store).await;
            manifests::telling(&self.ledger, self.clock, put).await?;
        }
        failpoint::around("enrol.sign", signer.sign_one(&self.ledger, store, self.clock)).await?;
        let put = manifests::put_store(&self.ledger, &self.buckets, store).await;
        manifests::telling(&self.ledger, self.clock, put).await?;
        for line in self.buckets.repair_mirrors().await?.mirrors {
            tracing::warn!("{line}");
        }
        Ok(())
    }

    /// Makes sure that the ledger knows the store; asks the source if not.
    async fn know(&self, id: &StoreId) -> Result<(), EnrolError> {
        if self.ledger.store(id).await?.is_some_and(|s| s.vanished_at.is_none()) {
            return Ok(());
        }
        let unknown = || EnrolError::UnknownStore(id.clone());
        let failed = |source| EnrolError::Source { store: id.clone(), source };
        let kind = self.config.source.kind().map_err(|_| unknown())?;
        let stores = match kind {
            SourceKind::Inbox(dir) => {
                let file = proto::shelf::open_regular(&dir.join("stores.csv")).map_err(|_| unknown())?;
                crate::inbox::read_stores(file, true, self.config.limits.line_bytes).map_err(|_| unknown())?
            }
            _ => {
                let (Some(dialect), Some(text)) = (dialect(&kind), &self.config.stores.query) else {
                    return Err(unknown());
                };
                let query = Query::parse(text, dialect).map_err(|e| EnrolError::Init(format!("stores.query: {e}")))?;
                let mut source = Database::open(&self.config.source).await.map_err(failed)?;
                let stores = source.stores(&query).await.map_err(failed)?;
                source.close().await;
                stores
            }
        };
        let store = stores.iter().find(|s| &s.id == id).ok_or_else(unknown)?;
        let known: Vec<StoreId> = self.ledger.stores().await?.into_iter().map(|s| s.seen.id).collect();
        source::cases_agree(std::slice::from_ref(store), &known)?;
        Ok(failpoint::around("enrol.store", self.ledger.add_store(store)).await?)
    }

    /// Who may sign, and where the keys are.
    pub async fn show(&self) -> Result<TrustReport, EnrolError> {
        let trust = self.trust().await?;
        let ring = self.keyring();
        let file =
            |files: &[KeyFile], key: &PublicKey| files.iter().find(|f| &f.public() == key).map(|f| f.path.clone());
        let (roots, publishers) = (ring.keys(Role::Root)?, ring.keys(Role::Publisher)?);
        let line = |key: &PublicKey, expires_at, files: &[KeyFile]| KeyLine {
            id: key.id(),
            public_key: key.to_string(),
            expires_at,
            file: file(files, key),
        };
        Ok(TrustReport {
            version: trust.version,
            epoch: trust.epoch,
            created_at: trust.created_at,
            root_threshold: trust.root.threshold,
            root: trust.root.keys.iter().map(|k| line(k, None, &roots)).collect(),
            publishers: trust.publishers.iter().map(|p| line(&p.key, Some(p.expires_at), &publishers)).collect(),
            streams: trust.streams,
            manifests_signed: None,
            new_root: None,
            new_publisher: None,
            next: None,
        })
    }

    /// Root keys: those named, or those in the keys directory.
    fn root_keys(&self, files: &[PathBuf]) -> Result<Vec<SecretKey>, KeysError> {
        match files {
            [] => Ok(self.keyring().keys(Role::Root)?.into_iter().map(|k| k.key).collect()),
            files => files.iter().map(|f| keys::read(f)).collect(),
        }
    }

    /// Root keys that may sign the file after `trust`.
    fn roots(&self, trust: &Trust, files: &[PathBuf]) -> Result<Vec<SecretKey>, EnrolError> {
        let mut found = self.root_keys(files)?;
        found.retain(|k| trust.root.keys.contains(&k.public()));
        if found.len() < trust.root.threshold {
            let ids: Vec<String> = trust.root.keys.iter().map(PublicKey::id).collect();
            let error = KeysError::NoRoot { found: found.len(), wanted: trust.root.threshold, ids: ids.join(", ") };
            return Err(error.into());
        }
        Ok(found)
    }

    /// Nobody publishes while keys change: what they sign would be by the old one. Keys are changed from the newest file on.
    async fn lease(&self) -> Result<(LockFile, Token), EnrolError> {
        manifests::follow_trust(self.config, &self.ledger, &self.buckets, self.clock).await?;
        // Whoever emptied the bucket keeps no key trusted by it; what is put there makes it no known one.
        if let Err(e) = manifests::check_place(&self.ledger, &self.buckets, &self.config.limits, false).await {
            tracing::warn!("{e}");
        }
        let taken = Lease::take(self.config, &self.ledger, self.clock).await;
        taken.map_err(|e| EnrolError::Busy(Box::new(e)))
    }

    /// Replaces the publisher key: a trust file with both, all manifests signed by the new one, a trust
    /// file without the old. What a run left undone the next one does.
    pub async fn rotate(&self, options: &crate::cli::Rotate) -> Result<TrustReport, EnrolError> {
        let (_lock, token) = self.lease().await?;
        let outcome = self.rotate_held(options, token).await;
        failpoint::around("trust.release", self.ledger.release(token)).await?;
        outcome.map(|r| TrustReport { new_publisher: r.publishers.last().and_then(|k| k.file.clone()), ..r })
    }

    /// What forbids to sign manifests is told before a trust file is signed.
    async fn check(&self) -> Result<(), EnrolError> {
        manifests::check_taken_over(self.config, &self.ledger, &self.buckets, self.clock).await?;
        Ok(manifests::check_clock(self.config, &self.ledger, self.clock, self.clock_is_right).await?)
    }

    /// What lies in the bucket is looked at while its signers are trusted: what was signed by a key or in an epoch that was let
    /// go of is nobody's, and nobody would be told that the ledger was set back. It stops once; who runs the command again goes
    /// on, or a thief could hold it up for ever by lists of his own. Those of a serial out of reach hold up nothing.
    async fn look_before_letting_go(&self) -> Result<(), EnrolError> {
        let is_told = self.ledger.is_set_back().await?;
        let newer = match manifests::check_newer(&self.ledger, &self.buckets).await {
            Err(ManifestsError::Overtaken(all)) => all.into_iter().filter(|one| !one.is_out_of_reach()).collect(),
            Err(e @ ManifestsError::NotPut(_)) => {
                tracing::warn!("not looked at: {e}");
                Vec::new()
            }
            other => return Ok(other?),
        };
        if newer.is_empty() {
            return Ok(());
        }
        match manifests::telling(&self.ledger, self.clock, Err(ManifestsError::Overtaken(newer))).await {
            Err(e @ ManifestsError::Overtaken(_)) if is_told => {
                tracing::warn!("{e}");
                Ok(())
            }
            Err(e @ ManifestsError::Overtaken(_)) => Err(EnrolError::SetBack(e)),
            other => Ok(other?),
        }
    }

    /// Whether the bucket has manifests and this ledger signed none: a new machine, or one that lost it.
    async fn knows_nothing(&self) -> Result<bool, EnrolError> {
        let signed = self.ledger.stores().await?.iter().any(|s| s.serial > 0);
        Ok(!signed && self.ledger.heads().await?.is_empty() && !self.buckets.list_stores().await?.is_empty())
    }

    /// The way back where the publisher key is lost with the ledger, and the bucket and the root key are not: takes the
    /// bucket's trust files over and makes a new publisher key beside the lost one. That one stays trusted meanwhile: what
    /// it signed is all that tells the next publish what is out.
    async fn rotate_lost(&self, options: &crate::cli::Rotate) -> Result<TrustReport, EnrolError> {
        let roots: Vec<PublicKey> = self.root_keys(&options.root_key)?.iter().map(SecretKey::public).collect();
        manifests::recover_trust(self.config, &self.ledger, &self.buckets, self.clock, &roots).await?;
        manifests::check_clock(self.config, &self.ledger, self.clock, self.clock_is_right).await?;
        let trust = self.trust().await?;
        let files = self.keyring().keys(Role::Publisher)?;
        if trust.publishers.iter().any(|p| files.iter().any(|f| f.public() == p.key)) {
            let text = "this ledger knows nothing of what was published. Run publish first, then this again";
            return Err(EnrolError::Init(text.into()));
        }
        let roots = self.roots(&trust, &options.root_key)?;
        let new_root = self.trust_both(trust, roots, options).await?;
        manifests::put_trust(&self.ledger, &self.buckets).await?;
        let next = "run `hq-publisher publish` now: it rebuilds the state from the bucket and signs by the new key; then \
                    `hq-publisher trust rotate --finish --root-key FILE`, which ends the trust in the lost one";
        Ok(TrustReport { manifests_signed: None, new_root, next: Some(next), ..self.finish_report(0).await? })
    }

    async fn trust_both(
        &self,
        trust: Trust,
        mut roots: Vec<SecretKey>,
        options: &crate::cli::Rotate,
    ) -> Result<Option<PathBuf>, EnrolError> {
        let (now, mut new_root) = (self.clock.now(), None);
        let new = self.next_publisher(&trust).await?;
        let mut both = Trust { version: trust.version + 1, created_at: now, ..trust };
        both.publishers.push(self.may_sign(new.public(), now));
        if options.any_stream || !options.streams.is_empty() {
            both.streams = options.streams.iter().cloned().collect();
        }
        if options.root {
            let root = self.keyring().create_another_root()?;
            new_root = Some(root.path.clone());
            both.root = RootKeys { threshold: 1, keys: vec![root.public()] };
            roots.push(root.key);
        }
        self.add_trust(&both, &roots.iter().collect::<Vec<_>>(), false).await?;
        Ok(new_root)
    }

    async fn rotate_held(&self, options: &crate::cli::Rotate, token: Token) -> Result<TrustReport, EnrolError> {
        self.check_streams(options).await?;
        if self.knows_nothing().await? {
            return self.rotate_lost(options).await;
        }
        self.check().await?;
        let trust = self.trust().await?;
        let roots = self.roots(&trust, &options.root_key)?;
        // 1. Trust both.
        let under_way = trust.publishers.len() > 1;
        let mut new_root = None;
        if options.finish && !under_way {
            return Err(EnrolError::NothingToFinish(trust.version));
        }
        if under_way && (options.any_stream || !options.streams.is_empty()) {
            let text =
                "a rotation is under way, and what lists may have is told when one begins: run `trust rotate` first";
            return Err(EnrolError::Init(text.into()));
        }
        self.look_before_letting_go().await?;
        if !under_way {
            new_root = self.trust_both(trust, roots, options).await?;
        }
        // 2. Sign all manifests with the new one.
        let signed = self.sign_everything(token).await?;
        // 3. Trust only that.
        if !options.keep_old {
            let both = self.trust().await?;
            let roots = self.roots_with_new(&both, options)?;
            let mut only = Trust { version: both.version + 1, created_at: self.clock.now(), ..both };
            let new = only.publishers.pop();
            only.publishers = new.into_iter().collect();
            self.add_trust(&only, &roots.iter().collect::<Vec<_>>(), false).await?;
            manifests::put_trust(&self.ledger, &self.buckets).await?;
        }
        Ok(TrustReport { new_root, ..self.finish_report(signed).await? })
    }

    /// What is published, or listed still, may not be left out of the streams that lists may have.
    async fn check_streams(&self, options: &crate::cli::Rotate) -> Result<(), EnrolError> {
        if options.streams.is_empty() {
            return Ok(());
        }
        let heads = self.ledger.heads().await?;
        let listed = heads.iter().filter(|(_, h)| !h.retired).map(|(i, _)| &i.stream);
        let used = self.config.streams.iter().map(|s| &s.name).chain(listed);
        let left: BTreeSet<&str> = used.filter(|s| !options.streams.contains(s)).map(|s| s.as_str()).collect();
        if left.is_empty() {
            return Ok(());
        }
        let left = left.into_iter().collect::<Vec<_>>().join(", ");
        Err(EnrolError::Init(format!(
            "--streams leaves out {left}, which the settings or stores' lists have: name it too, or let it go first"
        )))
    }

    /// The roots for the last step: those named, and the one that this command made.
    fn roots_with_new(&self, trust: &Trust, options: &crate::cli::Rotate) -> Result<Vec<SecretKey>, EnrolError> {
        self.roots(trust, &options.root_key).or_else(|_| self.roots(trust, &[]))
    }

    async fn finish_report(&self, signed: usize) -> Result<TrustReport, EnrolError> {
        for line in self.buckets.repair_mirrors().await?.mirrors {
            tracing::warn!("{line}");
        }
        Ok(TrustReport { manifests_signed: Some(signed), ..self.show().await? })
    }

    /// Puts trust, signs every manifest that is not by today's key and epoch, puts them; how many.
    async fn sign_everything(&self, token: Token) -> Result<usize, EnrolError> {
        manifests::put_trust(&self.ledger, &self.buckets).await?;
        let mut signer = self.signer_anywhere().await?;
        let mut all = 0;
        loop {
            // As above; what else keeps one from being put keeps no other from being signed.
            let put = manifests::put_unfinished(&self.ledger, &self.buckets, Some(token)).await;
            // What could not be looked at may have been overtaken: it is put first, and told.
            signer.leave(put.as_ref().err().map_or_else(BTreeSet::new, ManifestsError::stores));
            if let Err(ManifestsError::Overtaken(_)) = &put {
                manifests::telling(&self.ledger, self.clock, put).await?;
            }
            let sign = signer.sign_all(&self.ledger, token, News::default(), Moves::None, self.clock);
            let signed = failpoint::around("trust.resign", sign).await?;
            all += signed.stores.len();
            self.ledger.renew(token, self.clock.now(), self.config.publish.lease.0).await?;
            let put = manifests::put_unfinished(&self.ledger, &self.buckets, Some(token)).await.map(drop);
            // While one could not be signed, the key that signed it stays.
            let put = manifests::both(signed.others, put);
            manifests::telling(&self.ledger, self.clock, put).await?;
            // What could be put now, as it was, is signed, too.
            if !signer.leaves_some() {
                return Ok(all);
            }
        }
    }

    /// A publisher key that no trust file named yet: one that a crash left, or a new one.
    async fn next_publisher(&self, trust: &Trust) -> Result<KeyFile, EnrolError> {
        let ring = self.keyring();
        let files = ring.keys(Role::Publisher)?;
        let newest_used =
            files.iter().filter(|f| trust.publishers.iter().any(|p| p.key == f.public())).map(|f| f.number).max();
        // Only above the one in use, and none that was trusted before: it may have been stolen.
        for left in files.into_iter().filter(|f| newest_used.is_some_and(|n| f.number > n)) {
            if self.last_epoch(trust, |key| *key == left.public()).await?.is_none() {
                return Ok(left);
            }
        }
        Ok(ring.create(Role::Publisher)?)
    }

    /// Stops trusting a publisher key at once; with a new epoch readers forget what it claimed.
    pub async fn revoke_key(&self, options: &crate::cli::RevokeKey) -> Result<TrustReport, EnrolError> {
        let (_lock, token) = self.lease().await?;
        let outcome = self.revoke_key_held(options, token).await;
        failpoint::around("trust.release", self.ledger.release(token)).await?;
        outcome
    }

    async fn revoke_key_held(&self, o: &crate::cli::RevokeKey, token: Token) -> Result<TrustReport, EnrolError> {
        let trust = self.trust().await?;
        let roots = self.roots(&trust, &o.root_key)?;
        let fits = |k: &PublicKey| o.key.len() >= 4 && (k.id().starts_with(&o.key) || k.to_string() == o.key);
        let named = trust.publishers.iter().filter(|p| fits(&p.key)).count();
        let last_epoch = match named {
            0 => self.last_epoch(&trust, fits).await?,
            1 => Some(trust.epoch),
            _ => None,
        };
        let Some(last_epoch) = last_epoch else {
            let known: Vec<String> = trust.publishers.iter().map(|p| p.key.id()).collect();
            return Err(EnrolError::UnknownKey { key: o.key.clone(), known: known.join(", ") });
        };
        let now = self.clock.now();
        // A key revoked without a new epoch may have jumped ahead in this one. What a run that was cut short did is not
        // done again.
        let is_asked = o.new_epoch && last_epoch == trust.epoch;
        manifests::check_taken_over(self.config, &self.ledger, &self.buckets, self.clock).await?;
        if named == 1 || is_asked {
            self.look_before_letting_go().await?;
        }
        // In a new epoch what registers hold counts no more: no list of it may name a version below that.
        let waits = if is_asked { self.behind().await? } else { None };
        let begins = is_asked && waits.is_none();
        // A new epoch forgets the time.
        if !begins {
            manifests::check_clock(self.config, &self.ledger, self.clock, self.clock_is_right).await?;
        }
        let mut new_publisher = None;
        if named == 1 || begins {
            let epoch = trust.epoch + u64::from(begins);
            let mut next = Trust { version: trust.version + 1, epoch, created_at: now, ..trust.clone() };
            next.publishers.retain(|p| !fits(&p.key));
            if next.publishers.is_empty() {
                let new = self.next_publisher(&trust).await?;
                next.publishers.push(self.may_sign(new.public(), now));
                new_publisher = Some(new.path);
            }
            self.add_trust(&next, &roots.iter().collect::<Vec<_>>(), begins).await?;
        }
        let signed = self.sign_everything(token).await?;
        let report = TrustReport { new_publisher, ..self.finish_report(signed).await? };
        waits.map_or(Ok(report), |instance| Err(EnrolError::EpochWaits(instance)))
    }

    /// An instance that stores follow and of which a newer version may be out than the ledger knows.
    async fn behind(&self) -> Result<Option<Instance>, EnrolError> {
        let mut heads = self.ledger.heads().await?;
        heads.retain(|_, head| !head.retired);
        Ok(behind::look(&self.ledger, &self.buckets, &heads).await?.into_iter().next())
    }

    /// The last epoch in which a key was trusted that no longer is.
    async fn last_epoch(&self, now: &Trust, fits: impl Fn(&PublicKey) -> bool) -> Result<Option<u64>, EnrolError> {
        let mut last = None;
        for row in self.ledger.trust().await? {
            let max = self.config.limits.trust_bytes;
            let before: Trust = proto::dsse::peek(row.envelope.as_bytes(), max).map_err(trust::Refusal::from)?;
            if row.version < now.version && before.publishers.iter().any(|p| fits(&p.key)) {
                last = Some(before.epoch);
            }
        }
        Ok(last)
    }
}

fn first_or_new(ring: &Keyring, role: Role) -> Result<KeyFile, KeysError> {
    match ring.keys(role)?.into_iter().next() {
        Some(key) => Ok(key),
        None => ring.create(role),
    }
}

#[cfg(test)]
mod tests;

//! One version's packs: written aside, and applied to the published replica by the code that
//! registers run. Nothing here reaches the bucket.

use super::report::{InstanceReport, PackReport};
use super::stage::{Compared, Published, Ready, Stop, Task, refused};
use super::steps::{Phase, Step};
use super::{PublishError, Run};
use crate::diff::write_all;
use crate::ledger::{Head, Reserve};
use crate::plan::Plan;
use crate::rebuild;
use crate::scratch::Scratch;
use proto::digest::StateDigest;
use proto::failpoint;
use proto::ids::{Instance, TableName, Version};
use proto::layout::{PackKind, PackName};
use proto::limits::Limits;
use proto::manifest::PackEntry;
use proto::pack::{FORMAT, Header, PackWriter, RowCounts, SchemaPart, Written, table_heads};
use proto::replica::{ApplyError, Job, PackFile, Replica};
use proto::retry::Verdict;
use proto::shelf;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter};
use std::path::PathBuf;

/// Making packs went wrong.
pub(super) enum MakeError {
    /// The published rows are not what the delta builds on.
    Drift(String),
    /// Something else.
    Stop(Stop),
}
impl<E: Into<Stop>> From<E> for MakeError {
    fn from(e: E) -> Self {
        MakeError::Stop(e.into())
    }
}

/// The reason of a pack that is over the limits.
pub(super) const PACK_LIMITS: &str = "PACK_LIMITS";

/// What is said of a pack that is over the limits.
pub(super) fn too_large(instance: &Instance, pack: &PackEntry, limits: &Limits) -> Option<String> {
    let (name, PackEntry { bytes, unpacked, .. }) = (pack.name(instance), pack);
    let is_within = *bytes <= limits.pack_bytes && limits.unpacks_within(*bytes, *unpacked);
    let text = || {
        format!(
            "{name} has {bytes} bytes and {unpacked} unpacked: readers refuse that (limits.pack_bytes = {}, \
             limits.unpacked_bytes = {}, limits.ratio = {}; raise them at every tier)",
            limits.pack_bytes, limits.unpacked_bytes, limits.ratio
        )
    };
    (!is_within).then(text)
}

/// The state digest of each table.
pub type Digests = BTreeMap<TableName, StateDigest>;

/// Making one version.
pub(super) struct Making<'m, 'r> {
    pub(super) run: &'m Run<'r>,
    pub(super) task: &'m Task<'m>,
    pub(super) head: Option<&'m Head>,
    pub(super) version: Version,
    pub(super) plan: &'m Plan,
    pub(super) source: &'static str,
}

impl Making<'_, '_> {
    /// Reserves, writes and validates. In a dry run only writes, to know the bytes.
    pub(super) async fn make(
        &self,
        scratch: &Scratch,
        compared: &mut Compared,
        published: Option<Published>,
        report: &mut InstanceReport,
    ) -> Result<Option<Ready>, MakeError> {
        let (run, instance) = (self.run, self.task.instance);
        let number = self.reserve().await?;
        run.progress.phase(instance, Phase::Packing);
        let mut packs: Vec<(PackEntry, PathBuf)> = Vec::new();
        let (mut digests, mut full) = (compared.diff.digests.clone(), self.plan.full);
        if self.plan.delta {
            let migrate = compared.migrate.clone();
            let spool = &mut compared.spool;
            let written = self.write(PackKind::Delta, number, migrate, report, |w| {
                spool.write(w).map_err(|e| PublishError::Machine(format!("a delta: {e}")))?;
                Ok(digests.clone())
            });
            match written {
                Ok((entry, path, _)) => packs.push((entry, path)),
                // Rows that go count as those that come do, and a row whose UNIQUE value changed is both.
                Err(Stop::Refused(r)) if r.code == PACK_LIMITS => {
                    tracing::warn!(%instance, why = %r.text, "the delta is over the limits: a full alone is made");
                    let reason = format!("{}; the delta is over the limits", self.plan.reason);
                    report.plan = Some(Plan { delta: false, full: true, reason });
                    report.packs.clear();
                    full = true;
                }
                Err(stop) => return Err(stop.into()),
            }
        }
        if full {
            let (entry, path, found) =
                self.write(PackKind::Full, number, Vec::new(), report, |w| self.all_rows(scratch, w))?;
            digests = found;
            packs.push((entry, path));
        }
        if run.options.dry_run {
            packs.iter().try_for_each(|(_, path)| shelf::remove(path))?;
            return Ok(None);
        }
        run.progress.phase(instance, Phase::Applying);
        let validate = || failpoint::step("publish.validate", || self.validate(published, &packs));
        let replica = tokio::task::block_in_place(validate)?;
        let (instance, version) = (instance.clone(), self.version);
        Ok(Some(Ready { instance, version, replica, packs, digests }))
    }

    /// Takes the number; gives the contract's.
    async fn reserve(&self) -> Result<u64, Stop> {
        let (run, instance, contract) = (self.run, self.task.instance, &self.task.stream.contract);
        let (number, _) = run.ledger.schema_number(&instance.stream, &contract.sha256).await?;
        // A contract that went back to an earlier text is a new number all the same.
        let Some(token) = run.token else { return Ok(number) };
        let plan = self.plan.to_string();
        let reserve = Reserve {
            instance,
            version: self.version,
            epoch: run.epoch,
            schema: number,
            schema_sha256: &contract.sha256,
            ddl: &contract.ddl,
            plan: &plan,
            now: run.clock.now(),
        };
        run.step(Step::Reserve(instance.clone(), self.version), run.ledger.reserve(token, &reserve)).await?;
        Ok(number)
    }

    fn header(&self, kind: PackKind, number: u64, migrate: Vec<String>) -> Header {
        let contract = &self.task.stream.contract;
        let base = match kind {
            PackKind::Full => None,
            PackKind::Delta => self.head.map(|h| h.version),
        };
        Header {
            format: FORMAT,
            stream: self.task.instance.stream.clone(),
            audience: self.task.instance.audience.clone(),
            version: self.version,
            base,
            kind,
            schema: SchemaPart { number, ddl: contract.ddl.clone(), sha256: contract.sha256, migrate },
            created_at: self.run.clock.now(),
            source: self.source.to_owned(),
            tables: table_heads(contract),
        }
    }

    /// Writes a pack aside. Nothing needs it after a power cut, so that it is not synced.
    fn write(
        &self,
        kind: PackKind,
        number: u64,
        migrate: Vec<String>,
        report: &mut InstanceReport,
        body: impl FnOnce(&mut PackWriter<BufWriter<File>>) -> Result<Digests, PublishError>,
    ) -> Result<(PackEntry, PathBuf, Digests), Stop> {
        let run = self.run;
        let name = PackName { instance: self.task.instance.clone(), version: self.version, kind };
        let path = run.packs_dir.join(format!("{}.{}", self.task.instance, name.file_name()));
        let header = self.header(kind, number, migrate);
        let base = header.base;
        let write = || -> Result<(Written, Digests), PublishError> {
            let failed = |e: io::Error| PublishError::Machine(format!("writing {}: {e}", path.display()));
            let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path).map_err(failed)?;
            let out = BufWriter::with_capacity(256 << 10, file);
            let mut writer = PackWriter::new(out, &header, run.config.publish.level).map_err(failed)?;
            let digests = body(&mut writer)?;
            let (_, written) = writer.finish(&digests).map_err(failed)?;
            Ok((written, digests))
        };
        let step = Step::WritePack(name.clone());
        run.steps.before(&step)?;
        let (written, digests) = tokio::task::block_in_place(|| failpoint::step(step.failpoint(), write))?;
        run.steps.after(&step)?;
        let rows = written.rows.total();
        report.packs.push(PackReport { kind, bytes: written.bytes, rows });
        let Written { bytes, unpacked, sha256, .. } = written;
        let entry = PackEntry { version: self.version, kind, base, bytes, unpacked, sha256 };
        let limits = &run.config.limits;
        let too_many = || {
            format!(
                "{name} has {rows} rows: readers refuse that (limits.rows = {}; raise it at every tier)",
                limits.rows
            )
        };
        let text = too_large(self.task.instance, &entry, limits);
        if let Some(text) = text.or_else(|| (rows > limits.rows).then(too_many)) {
            shelf::remove(&path)?;
            return Err(refused(PACK_LIMITS, text));
        }
        Ok((entry, path, digests))
    }

    fn all_rows(&self, scratch: &Scratch, w: &mut PackWriter<BufWriter<File>>) -> Result<Digests, PublishError> {
        let mut digests = Digests::new();
        for table in &self.task.stream.contract.tables {
            let (_, digest) =
                write_all(scratch.connection(), table, w).map_err(|e| PublishError::Machine(e.to_string()))?;
            digests.insert(table.name.clone(), digest);
        }
        Ok(digests)
    }

    /// Applies the first pack to the published replica, in a transaction that stays open. A full
    /// that stands beside a delta is proved in a replica of its own.
    fn validate(
        &self,
        published: Option<Published>,
        packs: &[(PackEntry, PathBuf)],
    ) -> Result<Option<Replica>, MakeError> {
        let (run, instance) = (self.run, self.task.instance);
        let drift = published.is_some();
        let mut replica = match published {
            Some(p) => p.replica,
            None => {
                let path = run.replica_path(instance);
                let (replica, held) = rebuild::open(&path, instance, &run.config.limits).map_err(PublishError::from)?;
                // What nothing is known of was never published.
                if held.is_some() {
                    drop(replica);
                    rebuild::discard(&path)?;
                    rebuild::open(&path, instance, &run.config.limits).map_err(PublishError::from)?.0
                } else {
                    replica
                }
            }
        };
        self.apply(&mut replica, &packs[0]).map_err(|e| {
            if drift && e.may_be_drift() { MakeError::Drift(e.to_string()) } else { self.fatal(e).into() }
        })?;
        if let [_, full] = packs {
            let path = run.scratch_dir.join(format!("{instance}.proof.db"));
            rebuild::discard(&path)?;
            let mut proof = Replica::open(&path, &run.config.limits)?;
            let result = self.apply(&mut proof, full);
            proof.rollback();
            drop(proof);
            rebuild::discard(&path)?;
            result.map_err(|e| self.fatal(e))?;
        }
        if self.task.keep_open {
            replica
                .connection()
                .execute_batch("PRAGMA shrink_memory")
                .map_err(|e| PublishError::Machine(e.to_string()))?;
            return Ok(Some(replica));
        }
        replica.rollback();
        Ok(None)
    }

    fn apply(&self, replica: &mut Replica, pack: &(PackEntry, PathBuf)) -> Result<RowCounts, ApplyError> {
        let packs = [PackFile { path: &pack.1, entry: &pack.0 }];
        let job = Job {
            instance: self.task.instance,
            epoch: self.run.epoch,
            packs: &packs,
            now: self.run.clock.now(),
            prove: false,
            listed: None,
        };
        replica.apply_uncommitted(&job)
    }

    /// A pack of ours that does not apply: this machine, or rows that pass the scratch database
    /// and not a register.
    fn fatal(&self, e: ApplyError) -> Stop {
        match e.verdict() {
            Verdict::Quarantine => refused("VALIDATION", format!("registers would refuse it: {e}")),
            _ => Stop::Fatal(PublishError::Machine(e.to_string())),
        }
    }
}

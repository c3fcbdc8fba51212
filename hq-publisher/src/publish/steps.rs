//! What a publish does durably, step by step, so that a test can cut it anywhere; and how it tells
//! whoever waits in front of it.

use crate::publish::report::InstanceReport;
use proto::failpoint;
use proto::ids::{Instance, Version};
use proto::layout::PackName;

/// One durable step. Between two of them a crash changes nothing that they did not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Heads of a lost ledger are taken over from the bucket.
    Adopt,
    /// A number left by an earlier run is given up.
    Abandon(Instance, Version),
    /// The source's stores are recorded.
    SeeStores,
    /// A number is taken.
    Reserve(Instance, Version),
    /// A pack is written aside.
    WritePack(PackName),
    /// A pack is put.
    PutPack(PackName),
    /// The packs of a version are recorded.
    Packed(Instance, Version),
    /// **The commit point.**
    Sign,
    /// A published replica goes to its new version.
    CommitReplica(Instance),
    /// Manifests are put.
    PutManifests,
    /// A version is recorded as finished.
    Done(Instance, Version),
    /// A drop is moved out of the inbox.
    MoveDrop(String),
    /// A pack is taken off the ledger.
    ForgetPack(PackName),
    /// A pack is deleted from the buckets.
    DeletePack(PackName),
}

impl Step {
    /// Its name as a failpoint.
    pub fn failpoint(&self) -> &'static str {
        match self {
            Step::Adopt => failpoint::name("publish.adopt"),
            Step::Abandon(..) => failpoint::name("publish.abandon"),
            Step::SeeStores => failpoint::name("publish.stores"),
            Step::Reserve(..) => failpoint::name("publish.reserve"),
            Step::WritePack(_) => failpoint::name("publish.write"),
            Step::PutPack(_) => failpoint::name("publish.put"),
            Step::Packed(..) => failpoint::name("publish.packed"),
            Step::Sign => failpoint::name("publish.sign"),
            Step::CommitReplica(_) => failpoint::name("publish.replica"),
            Step::PutManifests => failpoint::name("publish.manifests"),
            Step::Done(..) => failpoint::name("publish.done"),
            Step::MoveDrop(_) => failpoint::name("publish.drop"),
            Step::ForgetPack(_) => failpoint::name("publish.forget"),
            Step::DeletePack(_) => failpoint::name("publish.delete"),
        }
    }
}

/// The run ends here, as if the power had gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the run was cut here")]
pub struct Aborted;

/// Watches durable steps; an error ends the run on the spot, without any tidying.
pub trait Steps: Send + Sync {
    /// Before a step.
    fn before(&self, step: &Step) -> Result<(), Aborted> {
        let _ = step;
        Ok(())
    }
    /// After it.
    fn after(&self, step: &Step) -> Result<(), Aborted> {
        let _ = step;
        Ok(())
    }
}

/// What is being done with an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Rows come from the source.
    Reading,
    /// They are compared with the published ones.
    Comparing,
    /// Packs are written.
    Packing,
    /// The packs are applied to the published replica: the validation.
    Applying,
    /// The packs go to the bucket.
    Putting,
}

/// Tells how far a run is.
pub trait Progress: Send + Sync {
    /// So many instances will be looked at.
    fn planned(&self, instances: usize) {
        let _ = instances;
    }
    /// An instance enters a phase.
    fn phase(&self, instance: &Instance, phase: Phase) {
        let _ = (instance, phase);
    }
    /// An instance is through (staged, unchanged or refused).
    fn finished(&self, instance: &Instance, report: &InstanceReport) {
        let _ = (instance, report);
    }
    /// All is staged; so many versions are signed and put now.
    fn signing(&self, versions: usize) {
        let _ = versions;
    }
}

/// Neither watches nor tells.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;
impl Steps for Quiet {}
impl Progress for Quiet {}

//! Why a command failed as a whole, for programs: a name that stays when the text is bettered.

use crate::bucket::BucketError;
use crate::carry::CarryError;
use crate::enrol::EnrolError;
use crate::keys::KeysError;
use crate::ledger::LedgerError;
use crate::manifests::{ManifestsError, NotPutError};
use crate::publish::PublishError;
use crate::source_db::SourceError;
use crate::web::ServeError;
use proto::config::ConfigError;
use proto::shelf::ShelfError;
use proto::wire::fault;

/// The name of what went wrong.
pub fn of(e: &anyhow::Error) -> &'static str {
    e.chain().find_map(of_cause).unwrap_or("FAILED")
}

fn of_cause(e: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    None.or_else(|| e.downcast_ref().map(publish))
        .or_else(|| e.downcast_ref().map(enrol))
        .or_else(|| e.downcast_ref().map(carry))
        .or_else(|| e.downcast_ref().map(serve))
        .or_else(|| e.downcast_ref().map(manifests))
        .or_else(|| e.downcast_ref().map(ledger))
        .or_else(|| e.downcast_ref().map(bucket))
        .or_else(|| e.downcast_ref().map(source))
        .or_else(|| e.downcast_ref().map(shelf))
        .or_else(|| e.is::<ConfigError>().then_some(CONFIG))
        .or_else(|| e.is::<KeysError>().then_some(KEYS))
}

pub(crate) const CONFIG: &str = "CONFIG";
const LEDGER: &str = "LEDGER";
const BUCKET: &str = "BUCKET";
const KEYS: &str = "KEYS";
const STORES: &str = "STORES";
/// The bucket has what the ledger does not know.
const OVERTAKEN: &str = "OVERTAKEN";
/// This machine: its disk, its memory, its SQLite.
const MACHINE: &str = "MACHINE";

pub(crate) fn publish(e: &PublishError) -> &'static str {
    match e {
        PublishError::Config(_) => CONFIG,
        PublishError::LeaseHeld { .. } => "LEASE_HELD",
        PublishError::Ledger(e) => ledger(e),
        PublishError::Bucket(e) => bucket(e),
        PublishError::Manifests(e) => manifests(e),
        PublishError::Source(e) => source(e),
        PublishError::Shelf(e) => shelf(e),
        PublishError::Lock(_)
        | PublishError::Sqlite(_)
        | PublishError::Scratch(_)
        | PublishError::Machine(_)
        | PublishError::Aborted(_) => MACHINE,
    }
}

fn enrol(e: &EnrolError) -> &'static str {
    match e {
        EnrolError::Ledger(e) => ledger(e),
        EnrolError::Bucket(e) => bucket(e),
        EnrolError::Manifests(e) => manifests(e),
        EnrolError::Keys(_) => KEYS,
        EnrolError::Source { source: e, .. } => source(e),
        EnrolError::SetBack(_) | EnrolError::EpochWaits(_) => OVERTAKEN,
        EnrolError::UnknownStore(_) => "UNKNOWN_STORE",
        EnrolError::NotEnrolled(_) => "NOT_ENROLLED",
        EnrolError::CaseClash { .. } => "CASE_CLASH",
        EnrolError::Stores(_) => STORES,
        EnrolError::Busy(e) => publish(e),
        EnrolError::Refused(_) => "TRUST",
        EnrolError::UnknownKey { .. } => "UNKNOWN_KEY",
        EnrolError::NothingToFinish(_) => "NOTHING_TO_FINISH",
        EnrolError::Key(_) => MACHINE,
        EnrolError::Init(_) => "INIT",
    }
}

fn carry(e: &CarryError) -> &'static str {
    match e {
        CarryError::Ledger(e) => ledger(e),
        CarryError::Bucket(e) => bucket(e),
        CarryError::Shelf(e) => shelf(e),
        CarryError::NoManifest(_) => "NO_MANIFEST",
        CarryError::BadManifest(..) => LEDGER,
        CarryError::BadPack { .. } => BUCKET,
    }
}

fn serve(e: &ServeError) -> &'static str {
    match e {
        ServeError::Config(_) => CONFIG,
        ServeError::Ledger(e) => ledger(e),
        ServeError::Listen { .. } => "LISTEN",
        ServeError::Metrics(_) | ServeError::Loop(_) => MACHINE,
    }
}

fn manifests(e: &ManifestsError) -> &'static str {
    match e {
        ManifestsError::Ledger(e) => ledger(e),
        ManifestsError::Bucket(e) => bucket(e),
        ManifestsError::Lacking { .. } => BUCKET,
        ManifestsError::NotPut(all) => all.first().map_or(BUCKET, |n| match &n.error {
            NotPutError::Bucket(e) => bucket(e),
            NotPutError::TooLong { .. } => "LIMITS",
        }),
        ManifestsError::ClockLeapt { .. } => "CLOCK",
        ManifestsError::Keys(_) => KEYS,
        ManifestsError::Overtaken(_) | ManifestsError::NotTakenOver(_) | ManifestsError::Unread { .. } => OVERTAKEN,
        ManifestsError::Foreign(_) => "TRUST",
    }
}

fn ledger(e: &LedgerError) -> &'static str {
    match e {
        LedgerError::Full(_) => fault::DISK_FULL,
        LedgerError::LeaseLost => "LEASE_LOST",
        _ => LEDGER,
    }
}

fn bucket(e: &BucketError) -> &'static str {
    match e {
        BucketError::Ledger(e) => ledger(e),
        BucketError::BadUrl { .. } => CONFIG,
        _ => BUCKET,
    }
}

fn source(e: &SourceError) -> &'static str {
    match e {
        SourceError::Stores(_) => STORES,
        SourceError::Url(_) => CONFIG,
        _ => fault::SOURCE,
    }
}

fn shelf(e: &ShelfError) -> &'static str {
    if e.is_disk_full() { fault::DISK_FULL } else { MACHINE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn a_failure_has_its_name_however_it_is_wrapped() {
        let held = || PublishError::LeaseHeld { holder: "x".into(), waited: 1 };
        let stores = || SourceError::Stores(crate::source::BadStores("x".into()));
        let wrapped = Err::<(), _>(held()).context("while y").unwrap_err();
        for (e, code) in [
            (anyhow::Error::from(held()), "LEASE_HELD"),
            (wrapped, "LEASE_HELD"),
            (EnrolError::Busy(Box::new(held())).into(), "LEASE_HELD"),
            (PublishError::from(stores()).into(), "STORES"),
            (SourceError::Connect("x".into()).into(), "SOURCE"),
            (ConfigError("x".into()).into(), "CONFIG"),
            (PublishError::from(LedgerError::LeaseLost).into(), "LEASE_LOST"),
            (CarryError::NoManifest("1".parse().unwrap()).into(), "NO_MANIFEST"),
            (anyhow::anyhow!("x"), "FAILED"),
        ] {
            assert_eq!(of(&e), code, "{e}");
        }
    }
}

//! Putting what is signed: trust files, then manifests; and once more what lies in the bucket otherwise than it was put.

use super::error::{ManifestsError, NotPut, gather};
use super::overtaken::check_overtaken;
use crate::bucket::{Buckets, Content, MOST, Pointer};
use crate::ledger::{Ledger, LedgerError, ToPut, Token, WasPut};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use proto::failpoint;
use proto::ids::StoreId;
use proto::layout::ObjectName;
use std::collections::BTreeMap;

/// Manifests put between two looks at the lease.
const BATCH: usize = 256;

/// Puts trust files and manifests that are signed and not yet in the bucket; how many manifests.
/// Run at the start of a publish (rolls a crashed one forward) and after each signing.
pub async fn put_unfinished(ledger: &Ledger, buckets: &Buckets, token: Option<Token>) -> Result<usize, ManifestsError> {
    put_trust(ledger, buckets).await?;
    put_each(ledger, buckets, token, None).await
}

/// Puts once more the manifests that lie in the bucket otherwise than they were put: gone, rotten, older ones. Only those
/// are read whose ETag in a listing is another one than was given to them; in a directory all. Only where the ledger has the
/// newest trust file ([`super::Followed::Newest`]): else those that lie there may be newer.
pub async fn put_again(ledger: &Ledger, buckets: &Buckets, token: Option<Token>) -> Result<(), ManifestsError> {
    let etags = buckets.manifest_etags().await?;
    put_each(ledger, buckets, token, Some(&etags)).await.map(|_| ())
}

/// The ETags that a listing gives.
type Etags = BTreeMap<ObjectName, String>;

/// Puts those that were not put, or where ETags are given those that were and lie there otherwise; how many were marked.
async fn put_each(
    ledger: &Ledger,
    buckets: &Buckets,
    token: Option<Token>,
    etags: Option<&Etags>,
) -> Result<usize, ManifestsError> {
    let (mut done, mut last, mut failed) = (0, None, None);
    loop {
        let batch = match etags {
            None => ledger.manifests_to_put(last.as_ref(), BATCH).await?,
            Some(_) => ledger.manifests_in_place(last.as_ref(), BATCH).await?,
        };
        let Some(end) = batch.last() else { break };
        last = Some(end.store.clone());
        if let Some(token) = token
            && !ledger.holds(token).await?
        {
            return Err(LedgerError::LeaseLost.into());
        }
        let (put, error) = put_batch(ledger, buckets, batch, etags).await;
        done += put.len();
        failed = match error {
            Some(e) => Some(gather(failed, e)),
            None => failed,
        };
        if put.is_empty() {
            continue;
        }
        for store in failpoint::around("manifests.marked", ledger.manifests_put(&put)).await? {
            if let Err(e) = put_store(ledger, buckets, &store).await {
                failed = Some(gather(failed, NotPut::of(&store, e)));
            }
        }
    }
    match failed {
        Some(e) => Err(e),
        None => Ok(done),
    }
}

/// Puts some manifests, several at once; those that were, and the error.
async fn put_batch(
    ledger: &Ledger,
    buckets: &Buckets,
    batch: Vec<ToPut>,
    etags: Option<&Etags>,
) -> (Vec<WasPut>, Option<ManifestsError>) {
    let puts = stream::iter(batch).map(|one| async move {
        let store = one.store.clone();
        let put = match etags {
            None => put_one(ledger, buckets, one).await,
            Some(etags) => put_one_again(ledger, buckets, one, etags).await,
        };
        put.map_err(|e| NotPut::of(&store, e))
    });
    let (mut put, mut failed) = (Vec::new(), None);
    for outcome in puts.buffer_unordered(buckets.concurrency()).collect::<Vec<_>>().await {
        match outcome {
            Ok(one) => put.extend(one),
            Err(e) => failed = Some(gather(failed, e)),
        }
    }
    (put, failed)
}

/// Puts one manifest if it does not lie there as it was put.
async fn put_one_again(
    ledger: &Ledger,
    buckets: &Buckets,
    one: ToPut,
    etags: &Etags,
) -> Result<Option<WasPut>, ManifestsError> {
    let name = ObjectName::Manifest(one.store.clone());
    let listed = etags.get(&name).cloned();
    if listed.is_some() && listed == one.etag {
        return Ok(None);
    }
    if buckets.get(&name, MOST).await?.is_some_and(|there| there == one.envelope.as_bytes()) {
        // It is not read again for a listing that names it otherwise than its put.
        return Ok(listed.map(|etag| WasPut { store: one.store, serial: one.serial, etag: Some(etag) }));
    }
    tracing::warn!(object = %name, "not as it was signed last: put again");
    put_one(ledger, buckets, one).await
}

/// Puts one manifest; nothing when it was signed again meanwhile.
async fn put_one(ledger: &Ledger, buckets: &Buckets, one: ToPut) -> Result<Option<WasPut>, ManifestsError> {
    let name = ObjectName::Manifest(one.store.clone());
    let bytes = Bytes::from(one.envelope.clone());
    let done = |etag| Ok(Some(WasPut { store: one.store.clone(), serial: one.serial, etag }));
    // Where the bucket honours conditions, the put itself asks whether somebody put since.
    if buckets.honours_conditions()
        && let Some(seen) = one.etag.as_deref()
        && let Pointer::Put(etag) = buckets.put_pointer_over(&name, bytes.clone(), Some(seen)).await?
    {
        return done(etag);
    }
    // Somebody did (another command of ours, a run that was cut short, a stranger), or it was not asked: a
    // directory; a ledger from a backup, which has forgotten serials that stores have seen.
    let there = buckets.get(&name, MOST).await?;
    if ledger.store(&one.store).await?.is_some_and(|s| s.serial > one.serial) {
        return Ok(None);
    }
    if let Some(there) = there {
        check_overtaken(ledger, &there, &one).await?;
    }
    match buckets.put_pointer_over(&name, bytes, None).await? {
        Pointer::Put(etag) => done(etag),
        Pointer::Changed => Ok(None),
    }
}

/// Puts one store's newest manifest, again if it was signed anew meanwhile.
pub async fn put_store(ledger: &Ledger, buckets: &Buckets, store: &StoreId) -> Result<(), ManifestsError> {
    while let Some(newest) = ledger.manifest(store).await? {
        let Some(put) = put_one(ledger, buckets, newest).await? else { continue };
        if failpoint::around("store.marked", ledger.manifests_put(&[put])).await?.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Puts the trust files that are not in the bucket: each version, then the pointer, then the marks.
pub async fn put_trust(ledger: &Ledger, buckets: &Buckets) -> Result<(), ManifestsError> {
    let rows = ledger.trust().await?;
    let missing: Vec<_> = rows.iter().filter(|r| !r.put).collect();
    let (Some(newest), false) = (rows.last(), missing.is_empty()) else { return Ok(()) };
    for row in &missing {
        let content = Content::Bytes(row.envelope.clone().into());
        buckets.put_new(&ObjectName::TrustVersion(row.version), content).await?;
    }
    buckets.put_pointer(&ObjectName::Trust, newest.envelope.clone().into()).await?;
    for row in missing {
        failpoint::around("trust.marked", ledger.trust_put(row.version)).await?;
    }
    Ok(())
}

//! Mails: written into the ledger's outbox, sent from there.

use crate::ledger::{Ledger, LedgerError};
use proto::clock::Clock;
use proto::ids::Instance;

/// A stream's publish was refused: opens the episode of (instance, reason) and writes its mail,
/// unless that episode is open. `reason` is a short stable name (`BAD_ROWS`, `SHRINK`, …), `text` what people read (rows, counts, remedy).
pub async fn publish_refused(
    ledger: &Ledger,
    clock: &dyn Clock,
    instance: &Instance,
    reason: &str,
    text: &str,
) -> Result<(), LedgerError> {
    let _ = (ledger, clock, instance, reason, text);
    todo!()
}

/// A stream was published, or had nothing to do: closes its episodes, with a mail for each.
pub async fn publish_recovered(ledger: &Ledger, clock: &dyn Clock, instance: &Instance) -> Result<(), LedgerError> {
    let _ = (ledger, clock, instance);
    todo!()
}

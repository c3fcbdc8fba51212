//! Rows on their way from a source into the scratch database: one thread reads and converts them, another inserts.

use crate::scratch::Loader;
use crate::source::{RowFault, RowSink, SinkError};
use proto::value::{Rows, Value, from_canonical};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::Builder;

/// Bytes from which rows are handed over.
const BLOCK: usize = 64 << 10;
/// Blocks that may wait to be inserted.
const AHEAD: usize = 4;

/// Takes rows of a source and hands them over in blocks.
pub struct Reading {
    rows: Rows,
    say: SyncSender<Said>,
}

enum Said {
    Rows(Rows),
    Fault(RowFault),
}

impl Reading {
    fn hand_over(&mut self) -> Result<(), SinkError> {
        let rows = std::mem::take(&mut self.rows);
        if rows.is_empty() { Ok(()) } else { self.tell(Said::Rows(rows)) }
    }

    fn tell(&self, said: Said) -> Result<(), SinkError> {
        // Its own error says why; this one is not shown.
        self.say.send(said).map_err(|_| SinkError::Failed("the scratch database takes no more".into()))
    }
}

impl RowSink for Reading {
    fn row(&mut self, row: &[Value<'_>], _: Option<u64>) -> Result<(), SinkError> {
        self.rows.push(row);
        if self.rows.bytes() < BLOCK { Ok(()) } else { self.hand_over() }
    }
    fn fault(&mut self, fault: RowFault) -> Result<(), SinkError> {
        self.hand_over()?;
        self.tell(Said::Fault(fault))
    }
}

/// Calls `read` on a thread of its own and loads, on this one, what it reads. The outer error is the scratch
/// database's; `read`'s result does not count then.
pub fn load<E: Send>(
    columns: usize,
    loader: &mut Loader<'_>,
    read: impl FnOnce(&mut Reading) -> Result<(), E> + Send,
) -> Result<Result<(), E>, SinkError> {
    let (say, heard) = sync_channel(AHEAD);
    let mut reading = Reading { rows: Rows::default(), say };
    std::thread::scope(|scope| {
        let work = move || {
            let done = read(&mut reading);
            // If nobody listens, the error is told there.
            let _ = reading.hand_over();
            done
        };
        let thread = Builder::new().name("source".into()).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| SinkError::Failed(format!("no thread to read the source: {e}")))?;
        for said in heard {
            match said {
                Said::Fault(fault) => loader.fault(fault)?,
                Said::Rows(rows) => rows.iter().try_for_each(|row| {
                    let row =
                        from_canonical(row, columns).ok_or_else(|| SinkError::Failed("a row was mangled".into()))?;
                    loader.row(&row, None)
                })?,
            }
        }
        thread.join().map_err(|_| SinkError::Failed("reading the source ended in a panic".into()))
    })
}

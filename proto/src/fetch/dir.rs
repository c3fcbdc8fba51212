//! Objects in a directory: a mounted share, a stick, a bucket on disk. Links are not followed.

use super::{Etag, FetchErrorKind, Opened, Small, Trouble, off_thread};
use crate::shelf::{self, ShelfError};
use bytes::Bytes;
use futures_util::stream;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;

const CHUNK: usize = 256 << 10;

/// A source's file that cannot be read is not our disk's fault.
fn trouble(root: &Path, e: &ShelfError) -> Trouble {
    let kind = match e.source.kind() {
        io::ErrorKind::NotFound if root.is_dir() => FetchErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => FetchErrorKind::Unauthorized,
        io::ErrorKind::FileTooLarge => FetchErrorKind::TooLong,
        _ => FetchErrorKind::Network,
    };
    Trouble::new(kind, e.to_string())
}

fn read_trouble(e: &io::Error) -> Trouble {
    Trouble::new(FetchErrorKind::Network, format!("cannot read: {e}"))
}

fn etag(meta: &Metadata) -> Etag {
    Etag(format!("{}-{}-{}", meta.len(), shelf::modified_ns(meta), meta.ino()))
}

/// A directory. What reads a network share whose server died comes back when that does, if ever: nobody waits for it longer
/// than for a silent server, and it costs one thread, since one reads at a time.
#[derive(Debug, Clone)]
pub(super) struct Dir {
    root: Arc<Path>,
    pub(super) read_timeout: Duration,
    /// Held by the read at work, until it comes back.
    pub(super) turn: Arc<Mutex<()>>,
    /// Whether the read at work was waited for in vain.
    hangs: Arc<AtomicBool>,
}

impl Dir {
    pub(super) fn new(root: &Path, read_timeout: Duration) -> Dir {
        Dir { root: root.into(), read_timeout, turn: Arc::default(), hangs: Arc::default() }
    }

    /// Reads off the async threads. While an earlier read hangs, none begins.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Path) -> Result<T, Trouble> + Send + 'static,
    ) -> Result<T, Trouble> {
        let silent = || {
            let text = format!("it is not read within {} s (a network share that hangs?)", self.read_timeout.as_secs());
            Trouble::new(FetchErrorKind::Network, text)
        };
        if self.hangs.load(Ordering::Relaxed) && self.turn.try_lock().is_err() {
            return Err(silent());
        }
        let (turn, hangs, root) = (Arc::clone(&self.turn), Arc::clone(&self.hangs), Arc::clone(&self.root));
        let read = async move {
            let turn = turn.lock_owned().await;
            off_thread(move || {
                let outcome = job(&root);
                hangs.store(false, Ordering::Relaxed);
                drop(turn);
                outcome
            })
            .await
        };
        tokio::time::timeout(self.read_timeout, read).await.unwrap_or_else(|_| {
            self.hangs.store(true, Ordering::Relaxed);
            Err(silent())
        })
    }

    pub(super) async fn get_small(&self, path: String, known: Option<Etag>, max: u64) -> Result<Small, Trouble> {
        self.read(move |root| {
            let file = shelf::open_beneath(root, Path::new(&path)).map_err(|e| trouble(root, &e))?;
            let etag = etag(&file.metadata().map_err(|e| read_trouble(&e))?);
            if known.as_ref() == Some(&etag) {
                return Ok(Small::Unchanged);
            }
            let bytes = shelf::read_all(file, &root.join(&path), max).map_err(|e| trouble(root, &e))?;
            Ok(Small::Body { bytes: bytes.into(), etag: Some(etag) })
        })
        .await
    }

    pub(super) async fn open(&self, path: String, start: u64) -> Result<Opened, Trouble> {
        let opened = self.read(move |root| {
            let file = shelf::open_beneath(root, Path::new(&path)).map_err(|e| trouble(root, &e))?;
            let total = file.metadata().map_err(|e| read_trouble(&e))?.len();
            Ok((Arc::new(file), total))
        });
        let (file, total) = opened.await?;
        let body = stream::try_unfold((self.clone(), file, start), |(dir, file, at)| async move {
            let from = Arc::clone(&file);
            let chunk = dir.read(move |_| read_at(&from, at).map_err(|e| read_trouble(&e))).await?;
            let end = at + chunk.len() as u64;
            Ok((!chunk.is_empty()).then_some((chunk, (dir, file, end))))
        });
        Ok(Opened { start, total: Some(total), body: Box::pin(body) })
    }
}

fn read_at(file: &File, at: u64) -> io::Result<Bytes> {
    let mut chunk = vec![0; CHUNK];
    let n = loop {
        match file.read_at(&mut chunk, at) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    chunk.truncate(n);
    Ok(chunk.into())
}

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

pub(super) async fn get_small(root: Arc<Path>, path: String, known: Option<Etag>, max: u64) -> Result<Small, Trouble> {
    off_thread(move || {
        let file = shelf::open_beneath(&root, Path::new(&path)).map_err(|e| trouble(&root, &e))?;
        let etag = etag(&file.metadata().map_err(|e| read_trouble(&e))?);
        if known.as_ref() == Some(&etag) {
            return Ok(Small::Unchanged);
        }
        let bytes = shelf::read_all(file, &root.join(&path), max).map_err(|e| trouble(&root, &e))?;
        Ok(Small::Body { bytes: bytes.into(), etag: Some(etag) })
    })
    .await
}

pub(super) async fn open(root: Arc<Path>, path: String, start: u64) -> Result<Opened, Trouble> {
    let (file, total) = off_thread(move || {
        let file = shelf::open_beneath(&root, Path::new(&path)).map_err(|e| trouble(&root, &e))?;
        let total = file.metadata().map_err(|e| read_trouble(&e))?.len();
        Ok((Arc::new(file), total))
    })
    .await?;
    let body = stream::try_unfold((file, start), |(file, at)| async move {
        let next = off_thread(move || {
            let chunk = read_at(&file, at).map_err(|e| read_trouble(&e))?;
            Ok((chunk, file))
        });
        let (chunk, file) = next.await?;
        let end = at + chunk.len() as u64;
        Ok((!chunk.is_empty()).then_some((chunk, (file, end))))
    });
    Ok(Opened { start, total: Some(total), body: Box::pin(body) })
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

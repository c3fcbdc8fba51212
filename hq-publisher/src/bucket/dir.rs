//! A bucket in a directory. Every put is synced before it counts.

use super::{Conditions, Content, Inner, Put, Trouble};
use bytes::Bytes;
use proto::digest::{Sha256, Sha256Stream};
use proto::failpoint;
use proto::shelf::{self, New};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

#[derive(Debug, Clone)]
pub(super) struct Dir {
    root: PathBuf,
}

/// Runs what may wait for the disk.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> Inner<T> + Send + 'static) -> Inner<T> {
    tokio::task::spawn_blocking(work).await?
}

impl Dir {
    pub(super) fn new(root: PathBuf) -> Self {
        Dir { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) async fn put_new(&self, name: &str, content: &Content<'_>) -> Inner<Put> {
        let (to, wanted, step) = (self.path(name), (content.length(), content.sha256()), step(name));
        let root = self.root.clone();
        let (bytes, from) = match content {
            Content::Bytes(b) => (Some(b.clone()), None),
            Content::File { path, .. } => (None, Some(path.to_path_buf())),
        };
        off_thread(move || {
            make_parent(&root, &to)?;
            let put = failpoint::step(step, || match (&bytes, &from) {
                (Some(b), _) => shelf::write_new(&to, b),
                (None, Some(from)) => shelf::copy_new(from, &to),
                (None, None) => Ok(New::AlreadyThere),
            })?;
            shelf::share(&to);
            if put == New::Written && from.is_none() {
                return Ok(Put::New);
            }
            // What was copied is what was meant, or nothing was proved.
            match hash(shelf::open_regular(&to)?)? == wanted {
                true => Ok(if put == New::Written { Put::New } else { Put::SameThere }),
                false => Err(Trouble::OtherBytesThere),
            }
        })
        .await
    }

    pub(super) async fn put_pointer(&self, name: &str, bytes: Bytes) -> Inner<()> {
        let (root, to, step) = (self.root.clone(), self.path(name), step(name));
        off_thread(move || {
            make_parent(&root, &to)?;
            Ok(failpoint::step(step, || shelf::write_public(&to, &bytes))?)
        })
        .await
    }

    pub(super) async fn get(&self, name: &str, max: u64) -> Inner<Option<Bytes>> {
        let path = self.path(name);
        off_thread(move || match shelf::read_bounded(&path, max) {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) if e.source.kind() == ErrorKind::FileTooLarge => Err(Trouble::TooLong(max)),
            Err(e) => Err(e.into()),
        })
        .await
    }

    pub(super) async fn get_to_file(&self, name: &str, to: &Path) -> Inner<Option<(u64, Sha256)>> {
        let (from, to) = (self.path(name), to.to_owned());
        off_thread(move || {
            match shelf::open_regular(&from) {
                Ok(_) => {}
                Err(e) if e.is_not_found() => return Ok(None),
                Err(e) => return Err(e.into()),
            }
            shelf::remove(&to)?;
            if shelf::copy_new(&from, &to)? == New::AlreadyThere {
                return Err(Trouble::Failed(format!("{} was made by somebody else meanwhile", to.display())));
            }
            Ok(Some(hash(shelf::open_regular(&to)?)?))
        })
        .await
    }

    pub(super) async fn hash(&self, name: &str) -> Inner<Option<(u64, Sha256)>> {
        let path = self.path(name);
        off_thread(move || match shelf::open_regular(&path) {
            Ok(file) => Ok(Some(hash(file)?)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e.into()),
        })
        .await
    }

    pub(super) async fn list(&self, prefix: &str) -> Inner<Vec<(String, u64)>> {
        let root = self.root.clone();
        let prefix = prefix.to_owned();
        off_thread(move || {
            let mut found = Vec::new();
            let mut rooms = vec![prefix.trim_end_matches('/').to_owned()];
            while let Some(room) = rooms.pop() {
                let entries = match shelf::list(&root.join(&room)) {
                    Ok(entries) => entries,
                    Err(e) if e.is_not_found() => continue,
                    Err(e) => return Err(e.into()),
                };
                for e in entries {
                    let name = if room.is_empty() { e.name } else { format!("{room}/{}", e.name) };
                    if e.is_dir {
                        rooms.push(name);
                    } else {
                        found.push((name, e.bytes));
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    pub(super) async fn delete(&self, name: &str) -> Inner<()> {
        let path = self.path(name);
        off_thread(move || Ok(failpoint::step("bucket.delete", || shelf::remove(&path))?)).await
    }

    pub(super) async fn probe(&self) -> Inner<Conditions> {
        let (root, path) = (self.root.clone(), self.path(".probe"));
        off_thread(move || {
            make_parent(&root, &path)?;
            shelf::remove(&path)?;
            let first = shelf::write_new(&path, b"first")?;
            let second = shelf::write_new(&path, b"second")?;
            shelf::remove(&path)?;
            let honoured = (first, second) == (New::Written, New::AlreadyThere);
            Ok(if honoured { Conditions::Honoured } else { Conditions::Ignored })
        })
        .await
    }
}

/// The failpoint of a put.
fn step(name: &str) -> &'static str {
    match name.split_once('/') {
        Some(("packs", _)) => failpoint::name("bucket.pack"),
        Some(("stores", _)) => failpoint::name("bucket.manifest"),
        Some(_) => failpoint::name("bucket.trust-file"),
        None => failpoint::name("bucket.trust"),
    }
}

/// What is put is for readers, a web server among them, also where a command by hand has a narrow umask. The bucket itself
/// is as wide as its owner made it.
fn make_parent(root: &Path, path: &Path) -> Inner<()> {
    let Some(dir) = path.parent() else { return Ok(()) };
    let is_ours = |d: &Path| (d.starts_with(root) && d != root) || !d.exists();
    let ours: Vec<&Path> = dir.ancestors().take_while(|d| is_ours(d)).collect();
    shelf::create_dir(dir)?;
    ours.into_iter().rev().for_each(shelf::share);
    Ok(())
}

fn hash(mut file: File) -> Inner<(u64, Sha256)> {
    let (mut length, mut hash) = (0, Sha256Stream::default());
    let mut chunk = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut chunk)?;
        if n == 0 {
            return Ok((length, hash.finish()));
        }
        length += n as u64;
        hash.update(&chunk[..n]);
    }
}

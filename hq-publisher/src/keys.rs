//! Key files: `root-N.key` (of a rotation `root-N-ID.key`) and `publisher-N.key` in `state.dir/keys`, 64 hex digits, readable by
//! their owner alone.
//!
//! Owns names and numbers of the files. Must never print a secret, nor replace or delete a file: a
//! key that is written is there before anything is signed by it, if the power goes too.

use proto::failpoint;
use proto::keys::{PublicKey, SecretKey};
use proto::shelf;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A key file is missing or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file system.
    #[error("{0}")]
    Shelf(#[from] shelf::ShelfError),
    /// Not a key.
    #[error("{}: {reason}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// None of the keys that could sign is here.
    #[error(
        "none of the publisher keys that trust file {version} names is in {} (wanted: {wanted}): copy the key file \
         there, or make a new key with `hq-publisher trust rotate`",
        dir.display()
    )]
    NoPublisher {
        /// The trust file.
        version: u64,
        /// Where keys were looked for.
        dir: PathBuf,
        /// The key ids that would do.
        wanted: String,
    },
    /// Too few root keys.
    #[error("{found} of {wanted} needed root keys are at hand: name their files with --root-key (key ids: {ids})")]
    NoRoot {
        /// How many fit.
        found: usize,
        /// How many must sign.
        wanted: usize,
        /// The ids of those that would do.
        ids: String,
    },
    /// No trust at all.
    #[error("there is no trust file yet: run `hq-publisher init`")]
    NoTrust,
    /// The trust file cannot be read.
    #[error("trust file {version} in the ledger cannot be read: {reason}")]
    BadTrust {
        /// Which.
        version: u64,
        /// Why not.
        reason: String,
    },
}

/// What a key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Trust files. Kept offline but for `trust rotate` and `trust revoke`.
    Root,
    /// Manifests.
    Publisher,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Role::Root => "root",
            Role::Publisher => "publisher",
        }
    }
}

/// A key with the file it came from.
#[derive(Debug, Clone)]
pub struct KeyFile {
    /// Where it lies.
    pub path: PathBuf,
    /// The number in its name.
    pub number: u64,
    /// The key.
    pub key: SecretKey,
}

impl KeyFile {
    /// Its public half.
    pub fn public(&self) -> PublicKey {
        self.key.public()
    }
}

/// The directory of key files.
#[derive(Debug, Clone)]
pub struct Keyring {
    dir: PathBuf,
}

/// Bytes of a key file looked at.
const KEY_FILE_BYTES: u64 = 4096;

impl Keyring {
    /// The keys in a directory; it is made when the first key is.
    pub fn new(dir: PathBuf) -> Self {
        Keyring { dir }
    }
    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The keys of a role, by number.
    pub fn keys(&self, role: Role) -> Result<Vec<KeyFile>, KeysError> {
        self.each(role)?.into_iter().collect()
    }

    /// The same, with what is wrong with those that cannot be used: a file that nobody needs any more stops nobody.
    pub fn each(&self, role: Role) -> Result<Vec<Result<KeyFile, KeysError>>, KeysError> {
        let entries = match shelf::list(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.is_not_found() => return Ok(Vec::new()),
            Err(e) => return Err(e.into()),
        };
        let numbered = |e: shelf::Entry| number_of(&e.name, role).filter(|_| !e.is_dir).map(|n| (n, e.path));
        let mut files: Vec<(u64, PathBuf)> = entries.into_iter().filter_map(numbered).collect();
        files.sort_unstable();
        Ok(files.into_iter().map(|(number, path)| Ok(KeyFile { key: read(&path)?, path, number })).collect())
    }

    /// Makes a key under the next number and writes it, durably.
    pub fn create(&self, role: Role) -> Result<KeyFile, KeysError> {
        self.make(role, |number, _| format!("{}-{number}.key", role.as_str()))
    }

    /// The same for a root key that is not the first. The first may be offline, its number free again: the key's id in the
    /// name keeps whoever moves this one there from overwriting it.
    pub fn create_another_root(&self) -> Result<KeyFile, KeysError> {
        self.make(Role::Root, |number, key| format!("root-{number}-{}.key", &key.id()[..8]))
    }

    fn make(&self, role: Role, name: impl Fn(u64, &PublicKey) -> String) -> Result<KeyFile, KeysError> {
        shelf::create_dir(&self.dir)?;
        let number = self.keys(role)?.last().map_or(1, |k| k.number + 1);
        let bad = |e: proto::keys::BadKey| KeysError::Bad { path: self.dir.clone(), reason: e.to_string() };
        let key = SecretKey::generate().map_err(bad)?;
        let path = self.dir.join(name(number, &key.public()));
        let text = format!("{}\n", key.to_secret_text());
        failpoint::step("keys.write", || shelf::write_private(&path, text.as_bytes()))?;
        Ok(KeyFile { path, number, key })
    }

    /// The files that others than their owner may read or write: for `doctor`.
    pub fn exposed(&self) -> Result<Vec<PathBuf>, KeysError> {
        let mut exposed = Vec::new();
        for k in self.keys(Role::Root)?.into_iter().chain(self.keys(Role::Publisher)?) {
            let mode = std::fs::metadata(&k.path).map_or(0, |m| m.permissions().mode());
            if mode & 0o077 != 0 {
                exposed.push(k.path);
            }
        }
        Ok(exposed)
    }
}

/// Reads one key file.
pub fn read(path: &Path) -> Result<SecretKey, KeysError> {
    let bad = |reason: String| KeysError::Bad { path: path.to_owned(), reason };
    let bytes = shelf::read_bounded(path, KEY_FILE_BYTES)?;
    let text = String::from_utf8(bytes).map_err(|_| bad("it is no key file: not text".into()))?;
    text.parse().map_err(|e: proto::keys::BadKey| bad(format!("it is no key file: {e}")))
}

fn number_of(name: &str, role: Role) -> Option<u64> {
    let of = name.strip_prefix(role.as_str())?.strip_prefix('-')?.strip_suffix(".key")?;
    // Root keys after the first have their id in their names; a publisher's that was renamed is none any more.
    let number = if role == Role::Root { of.split_once('-').map_or(of, |(number, _)| number) } else { of };
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;

    #[test]
    fn a_later_root_key_has_another_name_than_one_that_was_moved_away() {
        let dir = tempfile::tempdir().unwrap();
        let ring = Keyring::new(dir.path().join("keys"));
        let first = ring.create(Role::Root).unwrap();
        let offline = dir.path().join("root-1.key");
        std::fs::rename(&first.path, &offline).unwrap();
        let second = ring.create_another_root().unwrap();
        let name = second.path.file_name().unwrap().to_str().unwrap();
        assert_eq!(name, format!("root-1-{}.key", &second.public().id()[..8]));
        assert_eq!(ring.keys(Role::Root).unwrap()[0].public(), second.public());
        assert_eq!(ring.create_another_root().unwrap().number, 2);
    }

    #[test]
    fn keys_are_numbered_private_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let ring = Keyring::new(dir.path().join("keys"));
        assert!(ring.keys(Role::Root).unwrap().is_empty());
        let one = ring.create(Role::Publisher).unwrap();
        let two = ring.create(Role::Publisher).unwrap();
        ring.create(Role::Root).unwrap();
        assert!(one.path.ends_with("publisher-1.key") && two.path.ends_with("publisher-2.key"));
        assert_eq!(std::fs::metadata(&one.path).unwrap().permissions().mode() & 0o777, 0o600);
        let all = ring.keys(Role::Publisher).unwrap();
        assert_eq!(all.iter().map(KeyFile::public).collect::<Vec<_>>(), [one.public(), two.public()]);
        assert!(ring.exposed().unwrap().is_empty());
        std::fs::set_permissions(&one.path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(ring.exposed().unwrap(), std::slice::from_ref(&one.path));
        std::fs::write(&two.path, "xyz").unwrap();
        let [good, bad] = ring.each(Role::Publisher).unwrap().try_into().unwrap();
        assert_eq!(good.unwrap().public(), one.public());
        assert_eq!(bad.unwrap_err().to_string(), ring.keys(Role::Publisher).unwrap_err().to_string());
        let bad = ring.keys(Role::Publisher).unwrap_err().to_string();
        assert!(bad.contains("publisher-2.key") && bad.contains("64 lower-case hex digits"), "{bad}");
    }
}

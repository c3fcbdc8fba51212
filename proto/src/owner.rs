//! Whose the files of a data directory are: for `doctor`. A command that was run once by another user (root, as a rule)
//! leaves files that the service cannot write, and finds nothing wrong itself. Only looks.

use crate::shelf;
use rustix::fs::Access;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A user by number, shown with the name that `/etc/passwd` has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User(pub u32);

impl User {
    /// Who runs this process.
    pub fn me() -> User {
        User(rustix::process::geteuid().as_raw())
    }
    /// Whose a file is, or a link itself.
    pub fn of(path: &Path) -> io::Result<User> {
        fs::symlink_metadata(path).map(|m| User(m.uid()))
    }
    /// Whose a directory is that a link may lead to.
    fn of_dir(path: &Path) -> io::Result<User> {
        fs::metadata(path).map(|m| User(m.uid()))
    }
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let users = shelf::read_bounded(Path::new("/etc/passwd"), 1 << 20).unwrap_or_default();
        let users = String::from_utf8_lossy(&users);
        let name = users.lines().find_map(|line| {
            let mut of = line.split(':');
            let (name, number) = (of.next()?, of.nth(1)?);
            (number.parse() == Ok(self.0)).then_some(name)
        });
        match name {
            Some(name) => write!(f, "{name} (uid {})", self.0),
            None => write!(f, "uid {}", self.0),
        }
    }
}

/// Whether this user may list a directory and make, rename and delete in it.
pub fn is_open(dir: &Path) -> bool {
    rustix::fs::access(dir, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// Files of another owner that are named; the others are counted.
const NAMED: usize = 3;
/// Entries that are looked at.
const LOOKED_AT: usize = 10_000;

/// Whether this user can work with all that lies below a directory, and it with what this user leaves there. Whose the
/// directory is is told by `chief`, the first file in it, where it is there. The error says what to do.
pub fn check(dir: &Path, chief: &str) -> Result<(), String> {
    let told = |e: io::Error, path: &Path| match e.kind() {
        io::ErrorKind::NotFound => format!("there is no {}", path.display()),
        io::ErrorKind::PermissionDenied => {
            format!("{}: {e}: run every command as the user of the service", path.display())
        }
        _ => format!("{}: {e}", path.display()),
    };
    let of_dir = User::of_dir(dir).map_err(|e| told(e, dir))?;
    let owner = match User::of(&dir.join(chief)) {
        Ok(owner) => owner,
        Err(e) if e.kind() == io::ErrorKind::NotFound => of_dir,
        Err(e) => return Err(told(e, &dir.join(chief))),
    };
    let me = User::me();
    if me != owner {
        return Err(format!(
            "this is run by {me}, and what lies in {} is of {owner}: run every command as the user of the service \
             (`sudo -u USER …`)",
            dir.display()
        ));
    }
    let mut found = Found::default();
    found.look(dir, Ok(of_dir), owner, true).map_err(|e| e.to_string())?;
    found.told(owner, dir)
}

#[derive(Default)]
struct Found {
    looked_at: usize,
    foreign: Vec<PathBuf>,
    closed: Vec<PathBuf>,
}

impl Found {
    fn look(
        &mut self,
        path: &Path,
        whose: io::Result<User>,
        owner: User,
        is_dir: bool,
    ) -> Result<(), shelf::ShelfError> {
        self.looked_at += 1;
        let is_closed = if is_dir { !is_open(path) } else { rustix::fs::access(path, Access::WRITE_OK).is_err() };
        // What went meanwhile is nobody's.
        if whose.is_ok_and(|u| u != owner) {
            self.foreign.push(path.to_owned());
        } else if is_closed && path.exists() {
            self.closed.push(path.to_owned());
        }
        if !is_dir || is_closed {
            return Ok(());
        }
        let entries = match shelf::list(path) {
            Err(e) if e.is_not_found() => Vec::new(),
            listed => listed?,
        };
        // A file system of its own has a directory of root's.
        for entry in entries.into_iter().filter(|e| e.name != "lost+found") {
            if self.looked_at < LOOKED_AT {
                self.look(&entry.path, User::of(&entry.path), owner, entry.is_dir)?;
            }
        }
        Ok(())
    }

    fn told(&self, owner: User, dir: &Path) -> Result<(), String> {
        let names = |paths: &[PathBuf]| {
            let mut names: Vec<String> = paths.iter().take(NAMED).map(|p| p.display().to_string()).collect();
            if paths.len() > NAMED {
                names.push(format!("{} more", paths.len() - NAMED));
            }
            names.join(", ")
        };
        if !self.foreign.is_empty() {
            return Err(format!(
                "of another user than {owner}: {}. Stop the service, `chown -R` {} to its user, and run every command as \
                 that user",
                names(&self.foreign),
                dir.display()
            ));
        }
        if !self.closed.is_empty() {
            return Err(format!("{owner} cannot write: {}; see to mode and mount", names(&self.closed)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_this_user_cannot_write_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let room = dir.path().join("ok/packs");
        fs::create_dir_all(&room).unwrap();
        fs::write(dir.path().join("device.db"), "x").unwrap();
        check(dir.path(), "device.db").unwrap();
        assert!(check(&dir.path().join("none"), "device.db").unwrap_err().contains("there is no "));
        if User::me() == User(0) {
            return; // To root all is open.
        }
        mode(&room, 0o500);
        mode(&dir.path().join("device.db"), 0o400);
        let told = check(dir.path(), "device.db").unwrap_err();
        assert!(told.contains("ok/packs") && told.contains("device.db") && told.contains("cannot write"), "{told}");
        mode(&room, 0o700);
    }

    #[test]
    fn files_of_another_user_are_named_and_who_should_run_it() {
        if User::me() != User(0) {
            return; // Only root gives files away.
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("ok")).unwrap();
        for name in ["device.db", "ok/a", "ok/b", "ok/c", "ok/d"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        for name in ["ok/a", "ok/b", "ok/c", "ok/d"] {
            chown(dir.path().join(name), Some(65_533), None).unwrap();
        }
        let told = check(dir.path(), "device.db").unwrap_err();
        assert!(told.contains("ok/a") && told.contains("1 more") && told.contains("chown -R"), "{told}");
        chown(dir.path().join("device.db"), Some(65_533), None).unwrap();
        let told = check(dir.path(), "device.db").unwrap_err();
        assert!(told.contains("root (uid 0)") && told.contains("uid 65533") && told.contains("sudo -u"), "{told}");
    }
}

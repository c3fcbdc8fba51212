//! What a power cut leaves of files that were not synced. What the product's room `shelf` renamed and SQLite
//! committed is synced; parts of downloads, files written aside, SQLite's index and what follows the last commit in
//! its log are not.
//!
//! The exact states are the power-cut explorer's business (tests/proof); here it is enough that something is lost.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tillcast_tests::Dice;
use tillcast_tests::process::succeed;

/// What a machine's disk holds at most: some times what it needs.
const MEGABYTES: u32 = 12;
const PAGE: usize = 4096;

/// A machine's own disk, of a size that can be filled. Wants to run where it may mount (`process::with_disks`).
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Puts an empty disk at a new directory.
    pub fn mount(at: &Path) -> SmallDisk {
        fs::create_dir_all(at).unwrap();
        succeed(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={MEGABYTES}m"), "none"]).arg(at));
        SmallDisk(at.to_owned())
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
    /// Somebody else takes all the room there is but so many pages.
    pub fn fill(&self, pages: u64) {
        let mut filler = fs::File::options().create(true).append(true).open(self.filler()).unwrap();
        for block in [vec![b'x'; 16 * PAGE], vec![b'x'; PAGE]] {
            while filler.write(&block).is_ok_and(|n| n > 0) {}
        }
        let taken = filler.metadata().unwrap().len();
        filler.set_len(taken.saturating_sub(pages * PAGE as u64)).unwrap();
    }
    /// And gives it back.
    pub fn empty(&self) {
        let _ = fs::remove_file(self.filler());
    }
    /// Whether somebody else holds room.
    pub fn is_filled(&self) -> bool {
        self.filler().exists()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: what a dead machine's threads hold open goes when they do.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// All files below a directory, in order.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else { return found };
    let mut entries: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Harms what a power cut may harm.
pub fn power_cut(dir: &Path, dice: &mut Dice) {
    for path in files(dir) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let rel = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
        if name.starts_with(".tmp-") || name.ends_with(".part") || rel.starts_with("packs/") || name == "trying" {
            tear(&path, dice);
        } else if name.ends_with("-shm") {
            if dice.percent(60) {
                fs::remove_file(&path).unwrap();
            }
        } else if name.ends_with("-wal") && dice.percent(40) {
            let log = fs::read(&path).unwrap();
            if log.len() >= 32 {
                // A transaction of which some sectors came to the disk, and no commit.
                let frame = log[32..log.len().min(32 + 24 + 4096)].to_vec();
                let torn: Vec<u8> = match dice.below(3) {
                    0 => (0..dice.between(1, 5000)).map(|_| dice.any() as u8).collect(),
                    1 => frame[..dice.index(frame.len() + 1)].to_vec(),
                    _ => vec![0; dice.between(1, 9000) as usize],
                };
                // On a full disk, as much of it as fits.
                let _ = fs::File::options().append(true).open(&path).unwrap().write_all(&torn);
            }
        }
    }
}

/// The same at headquarters, whose ledger may be open still in a pool that closes by and by: its index stays.
pub fn power_cut_at_hq(dir: &Path, dice: &mut Dice) {
    for path in files(dir) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(".tmp-") {
            tear(&path, dice);
        }
    }
}

/// One bit of a file is another.
pub fn flip(path: &Path, dice: &mut Dice) {
    let mut bytes = fs::read(path).unwrap();
    if !bytes.is_empty() {
        let at = dice.index(bytes.len());
        bytes[at] ^= 1 << dice.below(8);
        fs::write(path, bytes).unwrap();
    }
}

/// Harms one file below a directory, if there is any.
pub fn tear_one(dir: &Path, dice: &mut Dice) {
    let all = files(dir);
    if !all.is_empty() {
        tear(&all[dice.index(all.len())], dice);
    }
}

/// Gone, cut, or with zeros where bytes were.
fn tear(path: &Path, dice: &mut Dice) {
    match dice.below(4) {
        0 => fs::remove_file(path).unwrap(),
        1 => {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..dice.index(bytes.len() + 1)]).unwrap();
        }
        2 => {
            let mut bytes = fs::read(path).unwrap();
            let at = dice.index(bytes.len() + 1);
            bytes[at..].fill(0);
            fs::write(path, bytes).unwrap();
        }
        _ => {}
    }
}

//! Files on a disk that works, and what a crash left.

use super::*;
use std::os::unix::fs::symlink;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}
fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn what_a_crash_left_goes_with_a_write_beside_it_an_hour_later() {
    let dir = dir();
    for (name, age) in [(".tmp-1-old", 7200), (".tmp-2-young", 60)] {
        let file = File::create(dir.path().join(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
    }
    write_durable(&dir.path().join("a"), b"x").unwrap();
    assert_eq!(names(dir.path()), [".tmp-2-young", "a"]);
}

#[test]
fn a_durable_write_replaces_and_leaves_nothing_aside() {
    let d = dir();
    let path = d.path().join("a.json");
    write_durable(&path, b"one").unwrap();
    write_durable(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    let key = d.path().join("key");
    write_private(&key, b"secret").unwrap();
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(names(d.path()), ["a.json", "key"]);
    // A directory in the way: refused, and nothing left.
    fs::create_dir(d.path().join("x")).unwrap();
    fs::write(d.path().join("x/y"), b"").unwrap();
    let e = write_durable(&d.path().join("x"), b"").unwrap_err();
    assert_eq!((e.action, e.verdict()), (Action::Rename, Verdict::Retry));
    assert_eq!(names(d.path()), ["a.json", "key", "x"]);
    assert!(write_durable(&d.path().join("no/such/dir"), b"").unwrap_err().is_not_found());
}

#[test]
fn a_create_only_write_never_replaces() {
    let d = dir();
    let path = d.path().join("pack");
    assert_eq!(write_new(&path, b"one").unwrap(), New::Written);
    assert_eq!(write_new(&path, b"two").unwrap(), New::AlreadyThere);
    assert_eq!(fs::read(&path).unwrap(), b"one");
    // A link that leads nowhere holds its name too, and is not written through.
    symlink(d.path().join("elsewhere"), d.path().join("link")).unwrap();
    assert_eq!(write_new(&d.path().join("link"), b"x").unwrap(), New::AlreadyThere);
    assert_eq!(names(d.path()), ["link", "pack"]);
}

#[test]
fn of_many_create_only_writers_one_wins() {
    let d = dir();
    let path = d.path().join("pack");
    let wins: Vec<u8> = std::thread::scope(|s| {
        let writers: Vec<_> = (0..8u8)
            .map(|n| {
                let path = &path;
                s.spawn(move || (write_new(path, &[n; 10_000]).unwrap() == New::Written).then_some(n))
            })
            .collect();
        writers.into_iter().filter_map(|w| w.join().unwrap()).collect()
    });
    assert_eq!(wins.len(), 1);
    assert_eq!(fs::read(&path).unwrap(), [wins[0]; 10_000]);
    assert_eq!(names(d.path()), ["pack"]);
}

#[test]
fn a_promotion_may_be_repeated() {
    let d = dir();
    let (from, to) = (d.path().join("ready/p"), d.path().join("ok/p"));
    create_dir(from.parent().unwrap()).unwrap();
    create_dir(to.parent().unwrap()).unwrap();
    assert!(promote(&from, &to).unwrap_err().is_not_found(), "neither is there");
    fs::write(&from, b"new").unwrap();
    fs::write(&to, b"old").unwrap();
    promote(&from, &to).unwrap();
    promote(&from, &to).unwrap();
    assert!(!from.exists());
    assert_eq!(fs::read(&to).unwrap(), b"new");
    symlink(&to, &from).unwrap();
    assert!(promote(&from, &to).is_err(), "links are not moved");
}

#[test]
fn directories_are_made_at_all_levels() {
    let d = dir();
    let deep = d.path().join("a/b/c");
    create_dir(&deep).unwrap();
    create_dir(&deep).unwrap();
    assert!(deep.is_dir());
    fs::write(d.path().join("file"), b"").unwrap();
    assert!(create_dir(&d.path().join("file/x")).is_err());
    assert!(create_dir(&d.path().join("file")).is_err());
    remove_empty_dir(&deep).unwrap();
    remove_empty_dir(&deep).unwrap();
    fs::write(d.path().join("a/b/f"), b"").unwrap();
    remove_empty_dir(&d.path().join("a/b")).unwrap();
    assert!(d.path().join("a/b").is_dir(), "what holds something stays");
}

#[test]
fn removing_what_is_gone_is_fine() {
    let d = dir();
    let path = d.path().join("x");
    fs::write(&path, b"").unwrap();
    remove(&path).unwrap();
    remove(&path).unwrap();
    assert!(remove(d.path()).is_err(), "a directory is no file");
}

#[test]
fn listings_are_sorted_and_hold_no_links_nor_half_written_files() {
    let d = dir();
    for name in ["b", "a", ".tmp-1-2-3"] {
        fs::write(d.path().join(name), b"123").unwrap();
    }
    fs::create_dir(d.path().join("c")).unwrap();
    symlink("/etc", d.path().join("link")).unwrap();
    let all = list(d.path()).unwrap();
    let seen: Vec<_> = all.iter().map(|e| (e.name.as_str(), e.is_dir, e.bytes)).collect();
    assert_eq!(seen, [("a", false, 3), ("b", false, 3), ("c", true, 0)]);
    assert!(all[0].modified_ns > 1_700_000_000 * 1_000_000_000);
    assert_eq!(sweep(d.path()).unwrap(), 1);
    assert_eq!(names(d.path()), ["a", "b", "c", "link"]);
    assert!(list(&d.path().join("none")).unwrap_err().is_not_found());
}

#[test]
fn only_regular_files_are_opened_and_only_beneath_the_root() {
    let d = dir();
    fs::create_dir(d.path().join("in")).unwrap();
    fs::write(d.path().join("in/f"), b"inside").unwrap();
    fs::write(d.path().join("out"), b"outside").unwrap();
    symlink(d.path(), d.path().join("in/up")).unwrap();
    symlink("f", d.path().join("in/near")).unwrap();
    let root = d.path().join("in");
    for refused in ["../out", "up/out", "near", "/etc/passwd", "", ".", "./../out", "f/x"] {
        assert!(open_beneath(&root, Path::new(refused)).is_err(), "{refused}");
    }
    assert!(open_beneath(&root, Path::new("none")).unwrap_err().is_not_found());
    let file = open_beneath(&root, Path::new("f")).unwrap();
    assert_eq!(read_all(file, Path::new("f"), 6).unwrap(), b"inside");
    let e = open_regular(&root.join("near")).unwrap_err();
    assert!(e.to_string().contains("symbolic link") && e.to_string().contains("in/near"), "{e}");
    rustix::fs::mkfifoat(CWD, root.join("pipe"), Mode::RWXU).unwrap();
    assert!(open_regular(&root.join("pipe")).is_err(), "and it did not hang");
    assert!(open_regular(&root).is_err());
}

#[test]
fn reading_is_bounded() {
    let d = dir();
    let path = d.path().join("f");
    fs::write(&path, b"12345").unwrap();
    assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
    let e = read_bounded(&path, 4).unwrap_err();
    assert!(e.to_string().contains("more than 4 bytes"), "{e}");
    assert_eq!(read_bounded(&path, u64::MAX).unwrap(), b"12345");
}

#[test]
fn a_part_goes_on_where_it_ended() {
    let d = dir();
    let path = d.path().join("x.part");
    let mut part = PartFile::open(&path).unwrap();
    part.write(b"hello ").unwrap();
    drop(part);
    let mut part = PartFile::open(&path).unwrap();
    assert_eq!(part.length(), 6);
    let mut seen = Vec::new();
    part.read_back(|c| seen.extend_from_slice(c)).unwrap();
    assert_eq!(seen, b"hello ");
    part.write(b"world").unwrap();
    assert_eq!(part.length(), 11);
    part.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hello world");
    let mut part = PartFile::open(&path).unwrap();
    part.restart().unwrap();
    part.write(b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    part.discard().unwrap();
    assert!(!path.exists());
    symlink(d.path().join("target"), &path).unwrap();
    assert!(PartFile::open(&path).is_err());
    assert!(!d.path().join("target").exists(), "not written through a link");
}

#[test]
fn one_process_at_a_time_has_a_directory() {
    let d = dir();
    let lock = LockFile::acquire(d.path()).unwrap();
    let e = LockFile::acquire(d.path()).unwrap_err();
    assert!(matches!(e, LockError::Held { pid: Some(p), .. } if p == std::process::id()), "{e}");
    assert!(e.to_string().contains(&format!("process {}", std::process::id())), "{e}");
    // As a child has it that is just started.
    let copy = lock.file.try_clone().unwrap();
    drop(lock);
    drop(LockFile::acquire(d.path()).unwrap());
    drop(copy);
    // It may be an import, which is to come to its end.
    assert!(e.to_string().contains("wait until it has ended"), "{e}");
    assert_eq!(e.code(), "LOCKED");
    // Who waits for another command would wait for ever.
    assert_eq!(LockFile::acquire(&d.path().join("none")).unwrap_err().code(), "MACHINE");
}

#[test]
fn room_is_taken_with_real_blocks() {
    let d = dir();
    let path = d.path().join("ballast");
    take_room(&path, 3 << 20).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert!(meta.len() == 3 << 20 && meta.blocks() * 512 >= 3 << 20, "no hole");
    take_room(&path, 3 << 20).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().ino(), meta.ino(), "one that is right stays");
    take_room(&path, 1 << 20).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    take_room(&path, 0).unwrap();
    take_room(&path, 0).unwrap();
    assert!(!path.exists());
    let e = take_room(&path, 1 << 60).unwrap_err();
    assert!(e.verdict() == Verdict::Retry && !path.exists(), "{e}");
}

#[test]
fn a_disk_has_room() {
    let s = free_space(Path::new("/")).unwrap();
    assert!(s.total > 0 && s.free <= s.total);
}

#[test]
fn of_a_disk_some_stays_free_for_others_and_little_asks_for_little() {
    let disk = |free: u64, total: u64| Space { free: free << 20, total: total << 20 };
    assert_eq!(disk(1, 100).spare(u64::MAX), 2 << 20);
    assert_eq!(disk(1, 1 << 20).spare(u64::MAX), 64 << 20);
    assert_eq!(disk(1, 100).spare(300), 300);
    assert_eq!(disk(12, 100).takes(10 << 20, u64::MAX), Ok(()));
    let refused = disk(12, 100).takes((10 << 20) + 1, u64::MAX).unwrap_err();
    assert_eq!(refused, "12582912 bytes are free, 12582913 are needed");
    assert_eq!(disk(12, 100).takes((12 << 20) - 300, 300), Ok(()));
}

#[test]
fn a_failed_sync_halts_and_a_full_disk_does_not() {
    let full = || io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
    let of = |action, source| ShelfError { action, path: "p".into(), source };
    assert_eq!(of(Action::Sync, full()).verdict(), Verdict::Halt);
    assert_eq!(of(Action::Write, full()).verdict(), Verdict::Retry);
    assert!(of(Action::Write, full()).is_disk_full());
    assert!(is_disk_full(&io::Error::from_raw_os_error(Errno::DQUOT.raw_os_error())));
    assert!(!is_disk_full(&io::Error::from_raw_os_error(Errno::IO.raw_os_error())));
}

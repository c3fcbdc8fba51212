//! Records what a command does to files, and what it says to the outside, by strace.
//!
//! A call counts when it has returned, so that what a sync covers had returned before it began; what is said counts
//! from the moment its call begins.

use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Output};
use tillcast_tests::process;
use tillcast_tests::site::Node;

/// What changes files, or tells the outside something.
const CALLS: &str = "open,openat,creat,write,pwrite64,writev,pwritev,sendto,sendmsg,ftruncate,truncate,fallocate,lseek,copy_file_range,sendfile,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,fsync,fdatasync";

#[allow(missing_docs, reason = "fields are what the variant says")]
/// A call that succeeded; paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Opened, to be made if it is not there, to be cut to nothing if it is.
    Open { path: PathBuf, create: bool, cut: bool },
    /// Written at an offset, or where the file's position is.
    Write { path: PathBuf, at: Option<u64>, data: Vec<u8> },
    /// Cut or extended to a length.
    Length { path: PathBuf, to: u64 },
    /// Grown to at least this length.
    Reserve { path: PathBuf, to: u64 },
    /// The position was set.
    Seek { path: PathBuf, to: u64 },
    /// So many bytes copied from position to position by the kernel.
    Copy { from: PathBuf, to: PathBuf, bytes: u64 },
    /// A name for another.
    Rename { from: PathBuf, to: PathBuf },
    /// A second name.
    Link { from: PathBuf, to: PathBuf },
    /// A file's name taken away.
    Unlink { path: PathBuf },
    /// A directory made.
    MakeDir { path: PathBuf },
    /// A directory taken away.
    RemoveDir { path: PathBuf },
    /// A file or directory synced, with what had been done before so many calls had returned.
    Sync { path: PathBuf, covers: usize },
    /// A sync that failed.
    FailedSync { path: PathBuf },
    /// Bytes for the outside: a socket.
    Say { bytes: Vec<u8> },
}

/// What a command did and how it ended.
#[derive(Debug)]
pub struct Recording {
    /// Calls in the order of their return.
    pub calls: Vec<Call>,
    /// Calls that the end of the process cut off: done or not.
    pub cut_off: Vec<Call>,
    /// Its end and its outputs.
    pub output: Output,
    /// The lines of strace, where calls were tampered with.
    pub injected: Vec<String>,
}

/// An option: the kernel stops at traced calls alone. Signals are not injected with it.
pub const ONLY_THESE: &str = "--seccomp-bpf";

/// A node's command under strace with these options; `log` gets the calls.
pub fn strace(node: &Node, args: &[&str], options: &[String], log: &Path) -> Command {
    let mut strace = process::command(&process::program("strace"), None, "KILL");
    strace.args(["-f", "-qq", "-y", "-xx", "-e", "signal=none", "-o"]).arg(log).args(options);
    strace.arg(node.product.path()).args(args).current_dir(&node.dir).env("NO_COLOR", "1");
    strace.envs(node.env.iter().map(|(k, v)| (k, v)));
    strace
}

/// Runs a command to its end, recorded; with these injections.
pub fn record(node: &Node, args: &[&str], injections: &[String]) -> Recording {
    let log = tempfile::NamedTempFile::new().unwrap();
    let output = strace(node, args, &recorded(injections), log.path()).output().unwrap();
    finish(&node.dir, log.path(), output)
}

/// Tells a service to end; under strace (this process) it is its child.
pub fn terminate(process: u32) {
    let child = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    let is_strace = std::fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|c| c.trim() == "strace");
    let traced = child.split_whitespace().next().filter(|_| is_strace).and_then(|c| c.parse().ok());
    let service = traced.unwrap_or_else(|| i32::try_from(process).unwrap());
    let _ = kill_process(Pid::from_raw(service).unwrap(), Signal::TERM);
}

/// The options of a recording.
pub fn recorded(injections: &[String]) -> Vec<String> {
    let injected = injections.iter().map(|i| i.split(':').next().unwrap_or_default());
    let traced = std::iter::once(CALLS).chain(injected).collect::<Vec<_>>().join(",");
    let mut options =
        vec![ONLY_THESE.to_owned(), "-s".into(), "67108864".into(), "-e".into(), format!("trace={traced}")];
    options.extend(injections.iter().flat_map(|i| ["-e".to_owned(), format!("inject={i}")]));
    options
}

/// Reads the log of a command that ran in `cwd`.
pub fn finish(cwd: &Path, log: &Path, output: Output) -> Recording {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("ptrace(") && !stderr.contains("strace: "), "strace cannot trace here: {stderr}");
    let text = std::fs::read_to_string(log).unwrap();
    let (calls, cut_off, injected) = parse(cwd, &text);
    Recording { calls, cut_off, output, injected }
}

/// The calls of a log, those that never returned, and the lines that were tampered with.
pub fn parse(cwd: &Path, log: &str) -> (Vec<Call>, Vec<Call>, Vec<String>) {
    let mut reader = Reader { cwd, calls: Vec::new(), cut_off: Vec::new(), open: BTreeMap::new() };
    let mut injected = Vec::new();
    for line in log.lines() {
        if let Some(whole) = reader.line(line)
            && whole.contains("(INJECTED)")
        {
            injected.push(whole);
        }
    }
    for (begun, _) in std::mem::take(&mut reader.open).into_values() {
        let call = reader.call(&format!("{begun}) = ?"), 0);
        reader.cut_off.extend(call);
    }
    (reader.calls, reader.cut_off, injected)
}

struct Reader<'a> {
    cwd: &'a Path,
    calls: Vec<Call>,
    cut_off: Vec<Call>,
    /// Calls that have begun, by thread: the line so far, and how many had returned.
    open: BTreeMap<String, (String, usize)>,
}

impl Reader<'_> {
    /// Takes a line; gives the whole call when it has returned.
    fn line(&mut self, line: &str) -> Option<String> {
        let (thread, rest) = line.split_once(' ')?;
        let rest = rest.trim_start();
        let (whole, began) = if let Some(begun) = rest.strip_suffix(" <unfinished ...>") {
            self.say(begun);
            self.open.insert(thread.into(), (begun.to_owned(), self.calls.len()));
            return None;
        } else if let Some(resumed) = rest.strip_prefix("<... ") {
            let (begun, began) = self.open.remove(thread)?;
            let (_, tail) = resumed.split_once(" resumed>")?;
            (begun + tail, began)
        } else {
            self.say(rest);
            (rest.to_owned(), self.calls.len())
        };
        let call = self.call(&whole, began);
        if whole.trim_end().ends_with("= ?") {
            self.cut_off.extend(call)
        } else {
            self.calls.extend(call)
        }
        Some(whole)
    }

    /// What goes to a socket counts from the beginning of its call.
    fn say(&mut self, begun: &str) {
        let Some((name, args)) = begun.split_once('(') else { return };
        if !["write", "writev", "sendto", "sendmsg"].contains(&name) {
            return;
        }
        let first = args.split(", ").next().unwrap_or_default();
        if fd_path(first).is_some_and(|p| p.to_string_lossy().starts_with("socket:")) {
            self.calls.push(Call::Say { bytes: strings(args).concat() });
        }
    }

    fn path(&self, text: &str) -> PathBuf {
        self.path_at(self.cwd, text)
    }

    fn path_at(&self, dir: &Path, text: &str) -> PathBuf {
        let bytes = strings(text).into_iter().next().unwrap_or_default();
        plain(&dir.join(String::from_utf8_lossy(&bytes).as_ref()))
    }

    /// A path given relative to a directory's descriptor.
    fn at(&self, dir: &str, text: &str) -> PathBuf {
        let base = fd_path(dir).unwrap_or_else(|| self.cwd.to_owned());
        self.path_at(&base, text)
    }

    fn call(&self, whole: &str, began: usize) -> Option<Call> {
        let (name, rest) = whole.split_once('(')?;
        // `)  = 3<…>` or `) = -1 EIO (Input/output error) (INJECTED)`.
        let ends = rest.rmatch_indices(')').map(|(i, _)| (i, rest[i + 1..].trim_start()));
        let (end, result) = ends.filter_map(|(i, tail)| Some((i, tail.strip_prefix("= ")?))).next()?;
        let args = split(&rest[..end]);
        let arg = |n: usize| args.get(n).copied().unwrap_or_default();
        let number = |n: usize| arg(n).parse::<u64>().ok();
        let cut_off = result.starts_with('?');
        if result.starts_with('-') || cut_off && name.ends_with("sync") {
            let failed = matches!(name, "fsync" | "fdatasync");
            return failed.then(|| fd_path(arg(0)).map(|path| Call::FailedSync { path })).flatten();
        }
        let returned = match cut_off {
            true => u64::MAX,
            false => result.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?,
        };
        let fd = || fd_path(arg(0)).filter(|p| p.is_absolute());
        let data = || {
            let mut bytes = strings(arg(1)).concat();
            bytes.truncate(usize::try_from(returned).unwrap_or(usize::MAX));
            bytes
        };
        let opened = |path: PathBuf, flags: &str| {
            Some(Call::Open { path, create: flags.contains("O_CREAT"), cut: flags.contains("O_TRUNC") })
        };
        match name {
            "open" => opened(self.path(arg(0)), arg(1)),
            "creat" => opened(self.path(arg(0)), "O_CREAT|O_TRUNC"),
            "openat" => opened(self.at(arg(0), arg(1)), arg(2)),
            "write" | "writev" => Some(Call::Write { path: fd()?, at: None, data: data() }),
            "pwrite64" | "pwritev" => Some(Call::Write { path: fd()?, at: number(3), data: data() }),
            "ftruncate" => Some(Call::Length { path: fd()?, to: number(1)? }),
            "truncate" => Some(Call::Length { path: self.path(arg(0)), to: number(1)? }),
            "fallocate" => Some(Call::Reserve { path: fd()?, to: number(2)? + number(3)? }),
            "lseek" => Some(Call::Seek { path: fd()?, to: returned }),
            "copy_file_range" => Some(Call::Copy { from: fd()?, to: fd_path(arg(2))?, bytes: returned }),
            "sendfile" => Some(Call::Copy { from: fd_path(arg(1))?, to: fd()?, bytes: returned }),
            "rename" => Some(Call::Rename { from: self.path(arg(0)), to: self.path(arg(1)) }),
            "renameat" | "renameat2" => {
                Some(Call::Rename { from: self.at(arg(0), arg(1)), to: self.at(arg(2), arg(3)) })
            }
            "link" => Some(Call::Link { from: self.path(arg(0)), to: self.path(arg(1)) }),
            "linkat" => Some(Call::Link { from: self.at(arg(0), arg(1)), to: self.at(arg(2), arg(3)) }),
            "unlink" => Some(Call::Unlink { path: self.path(arg(0)) }),
            "unlinkat" if arg(2).contains("AT_REMOVEDIR") => Some(Call::RemoveDir { path: self.at(arg(0), arg(1)) }),
            "unlinkat" => Some(Call::Unlink { path: self.at(arg(0), arg(1)) }),
            "rmdir" => Some(Call::RemoveDir { path: self.path(arg(0)) }),
            "mkdir" => Some(Call::MakeDir { path: self.path(arg(0)) }),
            "mkdirat" => Some(Call::MakeDir { path: self.at(arg(0), arg(1)) }),
            "fsync" | "fdatasync" => Some(Call::Sync { path: fd()?, covers: began }),
            _ => None,
        }
    }
}

/// The paths that a line of strace names.
pub fn paths(line: &str) -> Vec<PathBuf> {
    let fds = line.split('<').skip(1).filter_map(|t| t.split('>').next()).map(|t| unhex(t.as_bytes()));
    let named = fds.chain(strings(line)).map(|b| PathBuf::from(String::from_utf8_lossy(&b).as_ref()));
    named.collect()
}

/// `5</a/b>`: the path that a descriptor stands for.
fn fd_path(arg: &str) -> Option<PathBuf> {
    let inner = arg.split_once('<')?.1.split('>').next()?;
    let text = String::from_utf8_lossy(&unhex(inner.as_bytes())).into_owned();
    Some(PathBuf::from(text))
}

/// A path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for step in path.components() {
        match step {
            Component::CurDir => {}
            Component::ParentDir => drop(out.pop()),
            other => out.push(other),
        }
    }
    out
}

/// Arguments apart, where no bracket is open.
fn split(args: &str) -> Vec<&str> {
    let (mut found, mut depth, mut start, mut quoted) = (Vec::new(), 0, 0, false);
    for (i, c) in args.bytes().enumerate() {
        match c {
            b'"' => quoted = !quoted,
            b'[' | b'{' | b'<' if !quoted => depth += 1,
            b']' | b'}' | b'>' if !quoted => depth -= 1,
            b',' if depth == 0 && !quoted => {
                found.push(args[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    found.push(args[start..].trim());
    found
}

/// The bytes of every quoted string.
fn strings(text: &str) -> Vec<Vec<u8>> {
    text.split('"').skip(1).step_by(2).map(|t| unhex(t.as_bytes())).collect()
}

/// `\x61b` → `ab`.
fn unhex(text: &[u8]) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).unwrap_or(0) as u8;
    let (mut out, mut i) = (Vec::with_capacity(text.len() / 4), 0);
    while i < text.len() {
        if text[i..].starts_with(b"\\x") && i + 3 < text.len() {
            out.push(digit(text[i + 2]) << 4 | digit(text[i + 3]));
            i += 4;
        } else {
            out.push(text[i]);
            i += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_calls() {
        let log = r#"7 openat(AT_FDCWD<\x2f\x73>, "\x61", O_WRONLY|O_CREAT|O_EXCL, 0644) = 4<\x2f\x73\x2f\x61>
7 pwrite64(4<\x2f\x73\x2f\x61>, "\x68\x69\x22", 3, 4096 <unfinished ...>
8 fsync(5<\x2f\x73>)    = -1 EIO (Input/output error) (INJECTED)
9 fsync(4<\x2f\x73\x2f\x61> <unfinished ...>
7 <... pwrite64 resumed>)  = 2
9 <... fsync resumed>)   = 0
7 rename("./\x61", "\x2f\x73\x2f\x62") = 0
7 writev(9<\x73\x6f\x63\x6b\x65\x74\x3a\x5b\x31\x5d>, [{iov_base="\x6f", iov_len=1}, {iov_base="\x6b", iov_len=1}], 2) = 2
7 ftruncate(4<\x2f\x73\x2f\x62>, 7 <unfinished ...>
"#;
        let (a, b) = (PathBuf::from("/s/a"), PathBuf::from("/s/b"));
        let (calls, cut_off, injected) = parse(Path::new("/s"), log);
        assert_eq!(cut_off, [Call::Length { path: "/s/b".into(), to: 7 }]);
        let wanted = [
            Call::Open { path: a.clone(), create: true, cut: false },
            Call::FailedSync { path: "/s".into() },
            Call::Write { path: a.clone(), at: Some(4096), data: b"hi".to_vec() },
            // It began before the write had returned.
            Call::Sync { path: a.clone(), covers: 2 },
            Call::Rename { from: a, to: b },
            Call::Say { bytes: b"ok".to_vec() },
        ];
        assert_eq!(calls, wanted);
        assert_eq!(injected.len(), 1);
        assert!(paths(&injected[0]).contains(&PathBuf::from("/s")));
    }
}

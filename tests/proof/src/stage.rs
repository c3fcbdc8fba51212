//! A scene that is begun again and again, and something else done to it each time, by a few workers.

use crate::bench::Bench;
use crate::check::Owed;
use crate::disk::{Image, image_of};
use crate::powercut::{converges, directories};
use crate::scenes::{SCENES, Scene};
use crate::trace;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tillcast_tests::{Dice, process};

/// A run that hangs so long is broken.
const LONGEST: Duration = Duration::from_secs(270);
/// Whom a service serves comes so often once it has complained.
const SOME_TIMES: usize = 16;

/// A scene that can be begun again and again.
pub(crate) struct Stage {
    pub(crate) scene: Scene,
    pub(crate) before: Image,
    pub(crate) dirs: Vec<String>,
    pub(crate) owed: Owed,
    /// Whoever it serves, where it is a service.
    clients: Image,
    /// What a run that nothing disturbs complains of.
    usual: Option<BTreeSet<String>>,
    /// How long it takes.
    pub(crate) took: Duration,
    pub(crate) bench: Bench,
}

/// The scenes of these names, or all.
pub(crate) fn scenes(names: &[String]) -> Vec<usize> {
    let wanted = |name: &str| names.is_empty() || names.iter().any(|s| s == name);
    let found: Vec<usize> = (0..SCENES.len()).filter(|i| wanted(SCENES[*i].0)).collect();
    assert!(!found.is_empty(), "there is no such scene");
    found
}

/// Does something for each case on the stage of its scene. Each worker keeps the stages that it has met.
pub(crate) fn each<C: Sync>(
    (workers, seed): (usize, u64),
    cases: &[(usize, C)],
    act: impl Fn(usize, &mut Stage, &C, &mut Dice) + Sync,
) {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut stages: BTreeMap<usize, Stage> = BTreeMap::new();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some((scene, case)) = cases.get(n) else { break };
            let stage = stages.entry(*scene).or_insert_with(|| Stage::new(*scene));
            act(n, stage, case, &mut Dice::of(seed, n as u64));
        }
    };
    std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
}

impl Stage {
    pub(crate) fn new(scene: usize) -> Stage {
        let scene = SCENES[scene].1(true);
        let (before, dirs, mut bench) = (scene.image(), directories(&scene), Bench::default());
        let owed = scene.owed(&before, &mut bench);
        let clients = image_of(scene.site.dir(), &scene.clients);
        let start = Instant::now();
        let mut stage = Stage { before, dirs, owed, clients, usual: None, took: Duration::ZERO, bench, scene };
        let Ran { output: out, .. } = stage.run(stage.plain(), || false);
        stage.took = start.elapsed();
        assert_eq!(out.status.code(), Some(stage.scene.code), "{}: {out:?}", stage.scene.name);
        assert!(stage.scene.has_served(), "{}: who it serves has not what there is: {out:?}", stage.scene.name);
        stage.usual = Some(complaints(&String::from_utf8_lossy(&out.stderr)).collect());
        stage
    }

    /// Begins it again.
    pub(crate) fn restore(&self) {
        self.scene.restore(&self.before);
        self.scene.put_back(&self.scene.clients, &self.clients);
    }

    /// Whether a log says more than that of a run that nothing disturbs.
    pub(crate) fn complains(&self, stderr: &str) -> bool {
        self.usual.as_ref().is_some_and(|usual| complaints(stderr).any(|line| !usual.contains(&line)))
    }

    /// The numbers that calls on the site's files have in their threads.
    pub(crate) fn numbers(&self, calls: &[&str]) -> BTreeMap<String, BTreeSet<usize>> {
        let log = tempfile::NamedTempFile::new().unwrap();
        self.restore();
        let traced = format!("trace={}", calls.join(","));
        let options = [trace::ONLY_THESE, "-s", "0", "-e", &traced].map(str::to_owned);
        self.run_traced(&options, log.path());
        let text = std::fs::read_to_string(log.path()).unwrap();
        let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let mut numbers: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
        for line in text.lines().filter(|l| !l.contains("<... ")) {
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            let Some((call, _)) = rest.trim_start().split_once('(') else { continue };
            let n = counts.entry((thread, call)).or_default();
            *n += 1;
            if self.concerns(line) {
                numbers.entry(call.to_owned()).or_default().insert(*n);
            }
        }
        numbers
    }

    /// Whether a line of strace is about a file of the site.
    pub(crate) fn concerns(&self, line: &str) -> bool {
        let dirs: Vec<_> = self.scene.watched.iter().map(|w| self.scene.site.dir().join(w)).collect();
        let relative = |p: &std::path::PathBuf| p.is_relative() && !p.as_os_str().is_empty();
        trace::paths(line)
            .iter()
            .any(|p| dirs.iter().any(|d| p.starts_with(d)) || relative(p) && line.contains("AT_FDCWD"))
    }

    /// A few runs that nothing disturbs come to the good end.
    pub(crate) fn recovers(&mut self) -> Result<(), String> {
        let mut owed = self.owed.clone();
        self.scene.ended(&mut owed);
        converges(&self.scene, &owed, &mut self.bench)
    }
}

/// A run that has ended.
pub(crate) struct Ran {
    pub(crate) output: Output,
    /// It would not end by itself, though nothing says that it may.
    pub(crate) hung: bool,
}

impl Stage {
    /// Runs the command under strace to its end.
    pub(crate) fn run_traced(&self, options: &[String], log: &Path) -> Ran {
        let args: Vec<&str> = self.scene.args.iter().map(String::as_str).collect();
        let log = log.to_owned();
        self.run(trace::strace(self.scene.node(), &args, options, &log), move || {
            // A write that wakes another thread failed: it may sleep for ever, and that is not about files.
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            text.lines().any(|l| {
                l.contains("(INJECTED)") && trace::paths(l).iter().any(|p| p.starts_with("anon_inode:[eventfd]"))
            })
        })
    }

    /// The command as it is.
    pub(crate) fn plain(&self) -> Command {
        let node = self.scene.node();
        let mut command = process::command(&node.product.path(), None, "KILL");
        command.args(&self.scene.args).current_dir(&node.dir).env("NO_COLOR", "1");
        command.envs(node.env.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Runs to the end, a service while whoever it serves comes; what hangs is killed, sooner if it may.
    pub(crate) fn run(&self, mut command: Command, may_hang: impl Fn() -> bool) -> Ran {
        let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.stdout(Stdio::from(out.try_clone().unwrap())).stderr(Stdio::from(err.try_clone().unwrap()));
        let mut child = command.spawn().unwrap();
        let (process, ended) = (child.id(), AtomicBool::new(false));
        let (status, hung) = std::thread::scope(|scope| {
            if self.scene.is_service() {
                scope.spawn(|| {
                    self.serve(&ended, &err);
                    if !ended.load(Ordering::Relaxed) {
                        trace::terminate(process);
                    }
                });
            }
            let end = wait(&mut child, LONGEST, may_hang);
            ended.store(true, Ordering::Relaxed);
            end
        });
        Ran { output: Output { status, stdout: all(out), stderr: all(err) }, hung }
    }

    /// A service that complains may still get there, and need not.
    fn serve(&self, ended: &AtomicBool, log: &File) {
        let patience = AtomicUsize::new(SOME_TIMES);
        self.scene.serve(|| {
            let complains = || self.complains(&String::from_utf8_lossy(&so_far(log)));
            let tired = || patience.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err();
            ended.load(Ordering::Relaxed) || complains() && tired()
        });
    }
}

/// Waits for the end; what hangs is killed, sooner if it may. Whether it hung longer than that.
fn wait(child: &mut Child, longest: Duration, may_hang: impl Fn() -> bool) -> (ExitStatus, bool) {
    let (start, mut hung) = (Instant::now(), false);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return (status, hung);
        }
        let soon = start.elapsed() > longest / 6;
        let may = soon && may_hang();
        hung |= !may && start.elapsed() > longest;
        if hung || may {
            let children =
                std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap_or_default();
            for pid in children.split_whitespace().filter_map(|p| rustix::process::Pid::from_raw(p.parse().ok()?)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            if children.is_empty() {
                let _ = child.kill();
            }
        }
        std::thread::sleep(Duration::from_millis(if soon { 250 } else { 3 }));
    }
}

/// Warnings and errors in a log, without times and numbers.
pub(crate) fn complaints(stderr: &str) -> impl Iterator<Item = String> {
    let loud = |l: &&str| l.contains(" WARN ") || l.contains(" ERROR ") || l.contains("error") || l.contains("cannot");
    let plain = |l: &str| l.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
    stderr.lines().filter(loud).map(plain).collect::<Vec<_>>().into_iter()
}

/// What was written to a file that another process writes, whose place in it stays.
fn so_far(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    let read = file.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(read);
    bytes
}

fn all(mut file: File) -> Vec<u8> {
    use std::io::{Read as _, Seek as _};
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    /// How long it is waited for, and whether it may hang.
    fn ended(script: &str, longest: Duration, may_hang: bool) -> (Option<i32>, bool) {
        let mut child = process::command(&process::program("sh"), None, "KILL").args(["-c", script]).spawn().unwrap();
        let (status, hung) = wait(&mut child, longest, || may_hang);
        (status.signal(), hung)
    }

    #[test]
    fn who_was_ended_for_hanging_is_told_from_who_was_killed() {
        let (short, long) = (Duration::from_millis(20), Duration::from_secs(600));
        assert_eq!(ended("exit 3", long, false), (None, false));
        assert_eq!(ended("kill -9 $$", long, false), (Some(9), false));
        assert_eq!(ended("exec sleep 1000", short, false), (Some(9), true));
        assert_eq!(ended("exec sleep 1000", Duration::from_secs(1), true), (Some(9), false));
    }
}

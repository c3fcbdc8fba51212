//! Errors of system calls on the site's files: each call of each kind, once and for good; writes that end short, each of
//! them; and files that may not grow.
//! Whatever fails, nothing is damaged, nobody is told that it went well when it did not, and the next run that nothing
//! disturbs comes to a good end.

use crate::check::Owed;
use crate::disk::{Disk, Way};
use crate::powercut::quiet_panics;
use crate::scenes::SCENES;
use crate::stage::{self, Ran, Stage};
use crate::trace::{self, Call, Recording};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;
use tillcast_tests::{Dice, process};

/// What to explore.
#[derive(Debug, Clone)]
pub struct Options {
    /// Runs, drawn from all there are; 0: all.
    pub runs: usize,
    /// Whose throws are taken.
    pub seed: u64,
    /// The scenes; all where none is named.
    pub scenes: Vec<String>,
    /// Workers at once.
    pub workers: usize,
    /// Tell how far it is.
    pub verbose: bool,
    /// Only cases that begin like this, as a report names them; all that they say is shown.
    pub only: Option<String>,
}

/// How a run ended that something was done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// The call never came, or not on a file of the site.
    NotMet,
    /// It failed, and said so.
    Failed,
    /// It went well in the end, and said that something was wrong.
    Warned,
    /// It went well, all of it is there and durable: the error did not matter.
    Absorbed,
    /// A promise is broken.
    Broken,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases that there are.
    pub cases: usize,
    /// Runs by kind of fault and ending.
    pub endings: BTreeMap<(String, Ending), usize>,
    /// Runs by scene: all, and those in which the call came.
    pub scenes: BTreeMap<&'static str, (usize, usize)>,
    /// Runs that break a promise.
    pub violations: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

impl Report {
    /// What is too little to prove anything: calls that never came.
    pub fn shortfall(&self) -> Option<String> {
        let (runs, met) = self.scenes.values().fold((0, 0), |(a, b), (runs, met)| (a + runs, b + met));
        (met * 10 < runs * 9 || runs == 0).then(|| format!("only {met} of {runs} runs met their error"))
    }

    /// Runs with this ending.
    pub fn count(&self, ending: Ending) -> usize {
        self.endings.iter().filter(|((_, e), _)| *e == ending).map(|(_, n)| n).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ALL: [Ending; 5] = [Ending::Failed, Ending::Warned, Ending::Absorbed, Ending::NotMet, Ending::Broken];
        writeln!(f, "| fault | failed and said so | went well with a warning | did not matter | not met | broken |")?;
        writeln!(f, "| --- | --- | --- | --- | --- | --- |")?;
        let kinds: BTreeSet<&String> = self.endings.keys().map(|(kind, _)| kind).collect();
        for kind in kinds {
            let cells = ALL.map(|e| self.endings.get(&(kind.clone(), e)).copied().unwrap_or(0).to_string());
            writeln!(f, "| {kind} | {} |", cells.join(" | "))?;
        }
        let runs: usize = self.endings.values().sum();
        let all = ALL.map(|e| self.count(e).to_string()).join(" | ");
        writeln!(f, "| {runs} of {} cases | {all} |\n", self.cases)?;
        for (scene, (runs, met)) in &self.scenes {
            write!(f, "{scene} {met} of {runs}, ")?;
        }
        write!(f, "{:.0} s", self.seconds)
    }
}

/// What is done to a run.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    /// The n-th call of its kind in each thread, or that and all later ones.
    Call { call: String, error: &'static str, n: usize, sticky: bool },
    /// The n-th write to a file takes half of its bytes; and then, or not, the disk is full.
    Short { n: usize, full: bool },
    /// No file may be longer than this: writes end short there, then fail.
    Size(usize),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Call { call, error, n, sticky } => {
                write!(f, "{call}:{error}:when={n}{}", if *sticky { "+" } else { "" })
            }
            Fault::Short { n, full } => write!(f, "short:when={n}{}", if *full { "+" } else { "" }),
            Fault::Size(bytes) => write!(f, "fsize={bytes}"),
        }
    }
}

impl Fault {
    /// For the table.
    fn kind(&self) -> String {
        let (call, error, sticky) = match self {
            Fault::Call { call, error, sticky, .. } => (call, error, sticky),
            Fault::Short { full: false, .. } => return "short write once".into(),
            Fault::Short { .. } => return "short write, then ENOSPC for good".into(),
            Fault::Size(_) => return "short write, then EFBIG".into(),
        };
        let group = match call.as_str() {
            "fsync" | "fdatasync" => "sync",
            "write" | "pwrite64" | "copy_file_range" => "write",
            "read" | "pread64" => "read",
            "openat" => "open",
            "ftruncate" | "fallocate" => "truncate",
            "mkdir" => "mkdir",
            "unlink" | "unlinkat" | "rmdir" => "unlink",
            _ => "rename",
        };
        let error = error.strip_prefix("error=").unwrap_or("nothing written");
        format!("{group} {error} {}", if *sticky { "for good" } else { "once" })
    }
}

/// Calls that fail, and what they may fail with.
const CALLS: [(&str, &[&str]); 16] = [
    ("write", &["error=EIO", "error=ENOSPC", "retval=0"]),
    ("pwrite64", &["error=EIO", "error=ENOSPC", "retval=0"]),
    ("copy_file_range", &["error=EIO", "error=ENOSPC"]),
    ("fsync", &["error=EIO", "error=ENOSPC"]),
    ("fdatasync", &["error=EIO", "error=ENOSPC"]),
    ("ftruncate", &["error=EIO", "error=ENOSPC"]),
    ("fallocate", &["error=EIO", "error=ENOSPC"]),
    ("rename", &["error=EIO", "error=ENOSPC"]),
    ("renameat2", &["error=EIO", "error=ENOSPC"]),
    ("unlink", &["error=EIO"]),
    ("unlinkat", &["error=EIO"]),
    ("rmdir", &["error=EIO"]),
    ("mkdir", &["error=EIO", "error=ENOSPC"]),
    ("openat", &["error=EIO", "error=ENOSPC"]),
    ("read", &["error=EIO"]),
    ("pread64", &["error=EIO"]),
];

/// States drawn of what a failed sync left behind a good end.
const CUTS: usize = 60;

/// Plans and runs.
pub fn run(options: &Options) -> Report {
    let start = Instant::now();
    quiet_panics();
    let mut cases: Vec<(usize, Fault)> = Vec::new();
    for scene in stage::scenes(&options.scenes) {
        let faults = Stage::new(scene).plan(&mut Dice::of(options.seed, scene as u64));
        if options.verbose {
            eprintln!("{}: {} cases", SCENES[scene].0, faults.len());
        }
        cases.extend(faults.into_iter().map(|f| (scene, f)));
    }
    if let Some(only) = &options.only {
        cases.retain(|(_, fault)| fault.to_string().starts_with(only.as_str()));
    }
    Dice::of(options.seed, 99).shuffle(&mut cases);
    let all = cases.len();
    cases.truncate(if options.runs == 0 { all } else { options.runs });
    let report = Mutex::new(Report { cases: all, ..Report::default() });
    stage::each((options.workers, options.seed), &cases, |n, stage, fault, dice| {
        let (shown, ending) = stage.judge(fault, dice);
        if options.only.is_some() && options.verbose {
            eprintln!("{shown}");
        }
        let mut report = report.lock().unwrap();
        let name = stage.scene.name;
        let ending = ending.unwrap_or_else(|why| {
            let text = format!("{name} {fault}: {why}");
            eprintln!("BROKEN {text}");
            report.violations.push(text);
            Ending::Broken
        });
        *report.endings.entry((fault.kind(), ending)).or_default() += 1;
        let count = report.scenes.entry(name).or_default();
        *count = (count.0 + 1, count.1 + usize::from(ending != Ending::NotMet));
        if options.verbose && n.is_multiple_of(250) {
            eprintln!("{n} runs, {} broken", report.violations.len());
        }
    });
    let mut report = report.into_inner().unwrap();
    report.seconds = start.elapsed().as_secs_f64();
    report
}

impl Stage {
    /// Every call of each kind on the site's files, by its number in its thread.
    fn plan(&self, dice: &mut Dice) -> Vec<Fault> {
        let names: Vec<&str> = CALLS.iter().map(|(name, _)| *name).collect();
        let numbers = self.numbers(&names);
        let mut faults = Vec::new();
        for (call, errors) in CALLS {
            for n in numbers.get(call).into_iter().flatten() {
                for error in errors {
                    let fault = |sticky| Fault::Call { call: call.to_owned(), error, n: *n, sticky };
                    faults.extend([fault(false), fault(true)]);
                }
            }
        }
        faults.extend(self.writes().into_iter().flat_map(|n| [false, true].map(|full| Fault::Short { n, full })));
        let longest = self.scene.image().values().map(|b| b.bytes.len()).max().unwrap_or(0);
        faults.extend((0..80).map(|n| Fault::Size(if n < 8 { 1 << n } else { 1 + dice.index(longest) })));
        faults
    }

    /// One run with its fault: what it said, with the calls that failed, and what became of it.
    fn judge(&mut self, fault: &Fault, dice: &mut Dice) -> (String, Result<Ending, String>) {
        self.restore();
        let (recording, met) = match fault {
            Fault::Call { call, error, n, sticky } => {
                let injection = format!("{call}:{error}:when={n}{}", if *sticky { "+" } else { "" });
                let options = match call.as_str() {
                    // Whether it mattered can be told by what a power cut would leave.
                    "fsync" | "fdatasync" => trace::recorded(&[injection]),
                    // What it has told whoever it served must be kept.
                    _ if self.scene.is_service() => trace::recorded(&[injection]),
                    _ => {
                        let quiet = [trace::ONLY_THESE, "-s", "0", "-e"].map(str::to_owned);
                        [quiet.to_vec(), vec![format!("trace={call}"), "-e".into(), format!("inject={injection}")]]
                            .concat()
                    }
                };
                let log = tempfile::NamedTempFile::new().unwrap();
                let Ran { output, .. } = self.run_traced(&options, log.path());
                let recording = trace::finish(&self.scene.node().dir, log.path(), output);
                let met = recording.injected.iter().any(|l| self.concerns(l));
                (recording, met)
            }
            Fault::Short { n, full } => {
                let (output, ended_short) = self.run_short(Some((*n, *full)));
                let met = ended_short.lines().any(|l| self.is_of_site(l));
                (Recording { calls: Vec::new(), cut_off: Vec::new(), output, injected: Vec::new() }, met)
            }
            Fault::Size(bytes) => {
                let output = self.run_sized(*bytes);
                (Recording { calls: Vec::new(), cut_off: Vec::new(), output, injected: Vec::new() }, true)
            }
        };
        let mut shown = String::from_utf8_lossy(&recording.output.stderr).into_owned();
        for line in &recording.injected {
            let paths: Vec<_> = trace::paths(line).iter().map(|p| p.display().to_string()).collect();
            shown += &format!("{:.12} {}\n", line, paths.join(" "));
        }
        // A database that cannot be read at a second look is set aside; the second look may be another thread's.
        let lasts = !matches!(fault, Fault::Call { sticky: false, .. } | Fault::Short { full: false, .. });
        let again = lasts || recording.injected.iter().filter(|l| self.concerns(l)).count() > 1;
        let ending = self.ending(&recording, (met, again), dice);
        (shown, ending.and_then(|ending| self.recovers().map(|()| ending)))
    }

    /// The numbers of the writes to the site's files.
    fn writes(&self) -> Vec<usize> {
        self.restore();
        let (_, log) = self.run_short(None);
        let of_site = log.lines().filter(|l| self.is_of_site(l));
        of_site.map(|l| l.split_once(' ').unwrap().0.parse().unwrap()).collect()
    }

    /// Whether a line of `short.c` names a file of the site.
    fn is_of_site(&self, line: &str) -> bool {
        let path = Path::new(line.split_once(' ').map_or("", |(_, path)| path));
        self.scene.watched.iter().any(|w| path.starts_with(self.scene.site.dir().join(w)))
    }

    fn ending(&mut self, recording: &Recording, (met, again): (bool, bool), dice: &mut Dice) -> Result<Ending, String> {
        let stderr = String::from_utf8_lossy(&recording.output.stderr);
        let code = recording.output.status.code();
        // A thread's n-th call may have been on a pipe or the log: that may take the process down, as any kill.
        let elsewhere = recording.injected.iter().any(|l| !self.concerns(l));
        let tail = || stderr.lines().rev().take(4).collect::<Vec<_>>().join(" / ");
        if stderr.contains("panicked at") && !elsewhere {
            return Err(format!("it panicked: {}", tail()));
        }
        if code.is_none() && !elsewhere {
            return Err(format!("it was ended by {}: {}", recording.output.status, tail()));
        }
        let code = code.unwrap_or(-1);
        let complains = self.complains(&stderr);
        let mut owed = self.owed.clone();
        for call in &recording.calls {
            if let Call::Say { bytes } = call {
                owed.said(bytes, self.scene.product);
            }
        }
        let ended_well = code == self.scene.code && self.scene.has_served();
        if ended_well {
            self.scene.ended(&mut owed);
        }
        let image = self.scene.image();
        if again {
            let gone = image.keys().filter_map(|p| p.strip_suffix(".damaged")).map(str::to_owned);
            owed.set_aside = gone.collect();
        }
        self.scene.world.check(&image, &owed, &mut self.bench).map_err(|e| {
            let ended = if ended_well { "it ended well, but" } else { "it failed, and" };
            format!("{ended} {e} [{}]", tail())
        })?;
        if !ended_well {
            let speaks = stderr.lines().next().is_some() || !recording.output.stdout.is_empty();
            // What a service always says is no word about what it did not do.
            let said = complains || speaks && !(self.scene.is_service() && code == self.scene.code);
            return if said || elsewhere {
                Ok(Ending::Failed)
            } else {
                Err(format!("it ended with {code} without a word"))
            };
        }
        self.after_failed_syncs(recording, &owed, dice)
            .map_err(|e| format!("it ended well, but if the power goes now: {e} [{}]", tail()))?;
        Ok(if !met {
            Ending::NotMet
        } else if complains {
            Ending::Warned
        } else {
            Ending::Absorbed
        })
    }

    /// A sync that failed did nothing: is what is owed durable all the same?
    fn after_failed_syncs(&mut self, recording: &Recording, owed: &Owed, dice: &mut Dice) -> Result<(), String> {
        if !recording.calls.iter().any(|c| matches!(c, Call::FailedSync { .. })) {
            return Ok(());
        }
        let mut disk = Disk::new(self.scene.site.dir(), &self.before, &self.dirs);
        recording.calls.iter().for_each(|c| disk.take(c));
        let mut cuts = vec![disk.cut(Way::Lost, dice)];
        cuts.extend((0..CUTS).map(|_| disk.cut_anyhow(dice)));
        cuts.iter().try_for_each(|image| self.scene.world.check(image, owed, &mut self.bench))
    }

    /// Runs with a write that ends short, and what it names; or with none, and what names all writes.
    fn run_short(&self, write: Option<(usize, bool)>) -> (Output, String) {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = self.plain();
        command.env("LD_PRELOAD", &*SHORT).env("SHORT_LOG", log.path());
        if let Some((n, full)) = write {
            command.env("SHORT_AT", format!("{n}{}", if full { "+" } else { "" }));
        }
        let Ran { output, .. } = self.run(command, || false);
        (output, std::fs::read_to_string(log.path()).unwrap())
    }

    /// Runs with a bound on the length of files. The signal that comes with it is ignored: the call fails instead.
    fn run_sized(&self, bytes: usize) -> Output {
        let node = self.scene.node();
        let mut command = process::command(&process::program("sh"), None, "KILL");
        command.args(["-c", "trap '' XFSZ; exec prlimit --fsize=\"$0\" \"$@\"", &bytes.to_string()]);
        command.arg(node.product.path()).args(&self.scene.args).current_dir(&node.dir).env("NO_COLOR", "1");
        self.run(command, || false).output
    }
}

/// `short.c`, compiled beside the program that runs.
static SHORT: LazyLock<PathBuf> = LazyLock::new(|| {
    let beside = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/short.c");
    let (made, library) = (tempfile::NamedTempFile::new_in(&beside).unwrap(), beside.join("short.so"));
    let mut cc = Command::new(process::program("cc"));
    process::succeed(
        cc.args(["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]).args([made.path(), &source]),
    );
    made.persist(&library).unwrap();
    library
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_nobody_met_have_proved_nothing() {
        let told = |met| Report { scenes: [("export", (100, met))].into(), ..Report::default() }.shortfall();
        assert_eq!(told(0).unwrap(), "only 0 of 100 runs met their error");
        assert_eq!([told(89).is_some(), told(90).is_some()], [true, false]);
        assert!(Report::default().shortfall().is_some());
    }
}

//! SIGKILL at each system call of the real binaries on the site's files, alone and with a second one in the recovery,
//! and at any moment. Nothing that was there before is lost or damaged, and runs that nothing disturbs come to a good end.

use crate::powercut::quiet_panics;
use crate::stage::{self, Ran, Stage};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tillcast_tests::Dice;

/// What to explore.
#[derive(Debug, Clone)]
pub struct Options {
    /// Calls to die at, drawn from all there are; 0: all.
    pub runs: usize,
    /// Pairs of calls: the run dies at the first, the one that recovers at the second.
    pub pairs: usize,
    /// Runs that die at a moment of the clock.
    pub moments: usize,
    /// Whose throws are taken.
    pub seed: u64,
    /// The scenes; all where none is named.
    pub scenes: Vec<String>,
    /// Workers at once.
    pub workers: usize,
    /// Tell how far it is.
    pub verbose: bool,
}

/// Runs that were to die, and those of them that did; the rest were over before.
#[derive(Debug, Default, Clone, Copy)]
pub struct Count {
    /// All.
    pub runs: usize,
    /// Killed as often as they were to be.
    pub killed: usize,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// Calls at which something may die.
    pub points: usize,
    /// By scene, and by kind: one call, two calls, a moment.
    pub counts: BTreeMap<(&'static str, &'static str), Count>,
    /// Runs that break a promise.
    pub violations: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

impl Report {
    /// Of all scenes.
    pub fn of(&self, kind: &str) -> Count {
        let of_kind = self.counts.iter().filter(|((_, k), _)| *k == kind).map(|(_, c)| *c);
        of_kind.fold(Count::default(), |a, b| Count { runs: a.runs + b.runs, killed: a.killed + b.killed })
    }
}

impl Report {
    /// What is too little to prove anything. A thread may come to fewer calls than the one that was counted; most do not.
    pub fn shortfall(&self) -> Option<String> {
        let [single, pair, moment] = KINDS;
        [(single, 4, 5), (pair, 1, 4), (moment, 0, 1)].into_iter().find_map(|(kind, share, of)| {
            let Count { runs, killed } = self.of(kind);
            let too_few = runs > 0 && killed * of <= runs * share;
            too_few.then(|| format!("only {killed} of {runs} were killed {kind}"))
        })
    }
}

/// The kinds of a case.
pub const KINDS: [&str; 3] = ["at a call", "at two calls", "at a moment"];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| scene | killed {} |\n| --- | --- | --- | --- |", KINDS.join(" | "))?;
        let cell = |c: Count| if c.runs == 0 { "–".into() } else { format!("{} of {}", c.killed, c.runs) };
        let scenes: BTreeSet<&str> = self.counts.keys().map(|(scene, _)| *scene).collect();
        for scene in scenes {
            let cells = KINDS.map(|kind| cell(self.counts.get(&(scene, kind)).copied().unwrap_or_default()));
            writeln!(f, "| {scene} | {} |", cells.join(" | "))?;
        }
        writeln!(f, "| {} calls | {} |\n", self.points, KINDS.map(|kind| cell(self.of(kind))).join(" | "))?;
        write!(f, "{} broken, {:.0} s", self.violations.len(), self.seconds)
    }
}

/// When a run dies.
#[derive(Debug, Clone)]
enum Kill {
    /// At the n-th call of its kind in a thread, before the call is made.
    Call(String, usize),
    /// After so much of the time that a run takes.
    Moment(f64),
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kill::Call(call, n) => write!(f, "{call} {n}"),
            Kill::Moment(share) => write!(f, "{share:.3}"),
        }
    }
}

/// Runs one after the other that die.
type Case = Vec<Kill>;

fn kind(case: &Case) -> &'static str {
    KINDS[match case[..] {
        [Kill::Moment(_), ..] => 2,
        _ => case.len() - 1,
    }]
}

/// What changes something, or says it; reads are as good a place to die as the writes beside them.
const CALLS: [&str; 14] = [
    "write",
    "pwrite64",
    "copy_file_range",
    "fsync",
    "fdatasync",
    "ftruncate",
    "fallocate",
    "rename",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "openat",
];

/// Plans and runs.
pub fn run(options: &Options) -> Report {
    let start = Instant::now();
    quiet_panics();
    let mut points: Vec<(usize, Kill)> = Vec::new();
    for scene in stage::scenes(&options.scenes) {
        let numbers = Stage::new(scene).numbers(&CALLS);
        let of_scene = numbers.into_iter().flat_map(|(call, all)| all.into_iter().map(move |n| (call.clone(), n)));
        points.extend(of_scene.map(|(call, n)| (scene, Kill::Call(call, n))));
    }
    let cases = plan(options, &points, &mut Dice::of(options.seed, 98));
    let report = Mutex::new(Report { points: points.len(), ..Report::default() });
    stage::each((options.workers, options.seed), &cases, |n, stage, case, _| {
        let died = stage.dies_and_recovers(case);
        let mut report = report.lock().unwrap();
        let count = report.counts.entry((stage.scene.name, kind(case))).or_default();
        count.runs += 1;
        count.killed += usize::from(died.as_ref().is_ok_and(|times| *times == case.len()));
        if let Err(why) = died {
            let kills: Vec<String> = case.iter().map(ToString::to_string).collect();
            let text = format!("{} {}: {why}", stage.scene.name, kills.join(", then "));
            eprintln!("BROKEN {text}");
            report.violations.push(text);
        }
        if options.verbose && n.is_multiple_of(500) {
            eprintln!("{n} of {}, {} broken", cases.len(), report.violations.len());
        }
    });
    let mut report = report.into_inner().unwrap();
    report.seconds = start.elapsed().as_secs_f64();
    report
}

/// Cases in any order, so that a sample is one of all.
fn plan(options: &Options, points: &[(usize, Kill)], dice: &mut Dice) -> Vec<(usize, Case)> {
    let mut cases: Vec<(usize, Case)> = points.iter().map(|(scene, kill)| (*scene, vec![kill.clone()])).collect();
    dice.shuffle(&mut cases);
    cases.truncate(if options.runs == 0 { cases.len() } else { options.runs });
    let mut by_scene: BTreeMap<usize, Vec<&Kill>> = BTreeMap::new();
    points.iter().for_each(|(scene, kill)| by_scene.entry(*scene).or_default().push(kill));
    for _ in 0..options.pairs {
        let (scene, first) = &points[dice.index(points.len())];
        // A recovery is shorter than what it recovers from: most of its calls have small numbers.
        let others = &by_scene[scene];
        let second = others[dice.index(others.len()).min(dice.index(others.len()))];
        cases.push((*scene, vec![first.clone(), second.clone()]));
    }
    let scenes: Vec<usize> = by_scene.into_keys().collect();
    for _ in 0..options.moments {
        let kill = Kill::Moment(dice.index(1_100) as f64 / 1_000.0);
        cases.push((scenes[dice.index(scenes.len())], vec![kill]));
    }
    dice.shuffle(&mut cases);
    cases
}

impl Stage {
    /// Runs that die one after the other, and some that nothing disturbs; how many of the first did die.
    fn dies_and_recovers(&mut self, case: &Case) -> Result<usize, String> {
        self.restore();
        let mut owed = self.owed.clone();
        let mut died = 0;
        for kill in case {
            match self.run_to(kill)? {
                None => {
                    died += 1;
                    // One that follows a good end rotates again, and may have died where two keys are trusted.
                    owed.is_sole = false;
                }
                // A second good end says nothing new.
                Some(code) if code == self.scene.code && owed == self.owed && self.scene.has_served() => {
                    self.scene.ended(&mut owed);
                }
                Some(_) => {}
            }
            self.scene.world.check(&self.scene.image(), &owed, &mut self.bench)?;
        }
        self.recovers()?;
        Ok(died)
    }

    /// The exit code of a run; none where it died.
    fn run_to(&self, kill: &Kill) -> Result<Option<i32>, String> {
        match kill {
            Kill::Call(call, n) => {
                let inject = format!("inject={call}:signal=KILL:when={n}");
                let options = ["-s", "0", "-e", &format!("trace={call}"), "-e", &inject].map(str::to_owned);
                let Ran { output, hung } = self.run_traced(&options, Path::new("/dev/null"));
                if hung {
                    return Err(format!("it hangs: {}", String::from_utf8_lossy(&output.stderr)));
                }
                // strace may end as a shell does.
                Ok(output.status.code().filter(|code| *code != 128 + 9))
            }
            Kill::Moment(share) => {
                let mut command = self.plain();
                let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                std::thread::sleep(Duration::from_secs_f64(self.took.as_secs_f64() * share));
                child.kill().unwrap();
                Ok(child.wait().unwrap().code())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_killed_nobody_has_proved_nothing() {
        let told = |kind: usize, runs, killed| {
            let counts = [(("export", KINDS[kind]), Count { runs, killed })].into();
            Report { counts, ..Report::default() }.shortfall()
        };
        assert_eq!(told(0, 4000, 0).unwrap(), "only 0 of 4000 were killed at a call");
        assert_eq!([told(0, 100, 80).is_some(), told(0, 100, 81).is_some()], [true, false]);
        assert_eq!([told(1, 100, 25).is_some(), told(1, 100, 26).is_some()], [true, false]);
        assert_eq!([told(2, 100, 0).is_some(), told(2, 100, 1).is_some()], [true, false]);
        assert_eq!(told(2, 0, 0), None, "who asks for none gets none");
    }
}

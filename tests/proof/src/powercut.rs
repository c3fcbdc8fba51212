//! Explores what a power cut may leave: every prefix of the calls that a command made, in many ways of what was not
//! synced, judged against what had been told to somebody by then.

use crate::bench::Bench;
use crate::check::Owed;
use crate::disk::{Disk, Image, Way, fingerprint, image_of};
use crate::scenes::{End, SCENES, Scene};
use crate::trace::Call;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tillcast_tests::Dice;

/// What to explore.
#[derive(Debug, Clone)]
pub struct Options {
    /// Different states to check.
    pub states: usize,
    /// Whose throws are taken.
    pub seed: u64,
    /// The scenes; all where none is named.
    pub scenes: Vec<String>,
    /// Workers at once.
    pub workers: usize,
    /// States that the real binaries recover from.
    pub recover: usize,
    /// Tell how far it is.
    pub verbose: bool,
    /// Syncs that do nothing, to see that they are missed.
    pub deaf: Option<Deaf>,
}

/// A disk that lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deaf {
    /// About the data of files.
    Files,
    /// About the names in directories.
    Directories,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// By scene: calls recorded, prefixes at which something was not synced, different states.
    pub scenes: BTreeMap<&'static str, (usize, usize, usize)>,
    /// Different states checked.
    pub states: usize,
    /// States drawn, the same ones again included.
    pub drawn: usize,
    /// Databases opened by SQLite.
    pub opened: u64,
    /// States that the real binaries were run on.
    pub recovered: usize,
    /// What was told to somebody while it was recorded.
    pub told: usize,
    /// States that break a promise.
    pub violations: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

impl Report {
    /// What is too little to prove anything: it ran dry long before there were as many as were asked for.
    pub fn shortfall(&self, asked: usize) -> Option<String> {
        let found = self.states;
        (found < asked * 9 / 10).then(|| format!("only {found} different states were found, {asked} were asked for"))
    }
}

/// A recorded command.
#[derive(Debug)]
pub struct Take {
    scene: Scene,
    before: Image,
    dirs: Vec<String>,
    calls: Vec<Call>,
    /// What is owed at the beginning, and from which call on what is owed more.
    owed: Vec<(usize, Owed)>,
}

/// Draws a prefix a time.
const DRAWS: usize = 3;
/// A broken promise is told so often; then it is counted only.
const TOLD: usize = 20;

impl Take {
    /// Records a scene, and proves that the model has understood it: it ends with the files that are there.
    #[track_caller]
    pub fn record(mut scene: Scene) -> Take {
        let before = scene.image();
        let dirs = directories(&scene);
        let mut bench = Bench::default();
        let first = scene.owed(&before, &mut bench);
        let recording = scene.record();
        let mut take = Take { owed: Vec::new(), before, dirs, calls: recording.calls, scene };
        let real = image_of(take.scene.site.dir(), &take.scene.watched);
        let mut differ = take.differs(&real);
        if !differ.is_empty() {
            take.calls.extend(recording.cut_off);
            differ = take.differs(&real);
        }
        assert!(differ.is_empty(), "{}: the model has other files than the disk: {differ:?}", take.scene.name);
        take.owed = take.owe(first);
        take
    }

    /// Makes some syncs do nothing.
    fn deafen(&mut self, deaf: Deaf) {
        let mut disk = self.disk();
        for call in &mut self.calls {
            disk.take(call);
            if let Call::Sync { path, .. } = call
                && disk.live(path).is_some() == (deaf == Deaf::Files)
            {
                *call = Call::FailedSync { path: path.clone() };
            }
        }
    }

    /// The files that the model has otherwise than they are.
    fn differs(&self, real: &Image) -> BTreeSet<String> {
        let mut disk = self.disk();
        self.calls.iter().for_each(|c| disk.take(c));
        let model = disk.live_image();
        let other = |p: &&String| model.get(*p).map(|b| b.sha256()) != real.get(*p).map(|b| b.sha256());
        model.keys().chain(real.keys()).filter(other).cloned().collect()
    }

    fn disk(&self) -> Disk {
        Disk::new(self.scene.site.dir(), &self.before, &self.dirs)
    }

    /// What is owed, call by call.
    fn owe(&self, first: Owed) -> Vec<(usize, Owed)> {
        let mut disk = self.disk();
        let mut owed = first.clone();
        let mut all = vec![(0, first)];
        for (n, call) in self.calls.iter().enumerate() {
            disk.take(call);
            match call {
                Call::Rename { to, .. } | Call::Link { to, .. } => {
                    if let (Some(path), Some(bytes)) = (disk.inside(to), disk.live(to)) {
                        owed.shown(&self.scene.world, &path, &crate::disk::Blob::new(bytes.to_vec()));
                    }
                }
                Call::Say { bytes } => owed.said(bytes, self.scene.product),
                _ => continue,
            }
            if all.last().is_some_and(|(_, last)| *last != owed) {
                all.push((n + 1, owed.clone()));
            }
        }
        self.scene.ended(&mut owed);
        if self.scene.end == End::Carried {
            let carried = disk.live_image().into_iter().filter(|(path, _)| path.starts_with("stick/"));
            owed.files.extend(carried.map(|(path, blob)| (path, blob.sha256())));
        }
        all.push((self.calls.len(), owed));
        all
    }

    /// What is owed after so many calls.
    fn owed_at(&self, n: usize) -> &Owed {
        let known = self.owed.iter().rev().find(|(from, _)| *from <= n);
        &known.expect("something is owed from the beginning").1
    }
}

pub(crate) fn directories(scene: &Scene) -> Vec<String> {
    let mut found = scene.watched.clone();
    let mut at = 0;
    while at < found.len() {
        let dir = scene.site.dir().join(&found[at]);
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
            found.push(format!("{}/{}", found[at], entry.file_name().to_string_lossy()));
        }
        at += 1;
    }
    found
}

/// All that workers share.
struct Search<'a> {
    options: &'a Options,
    takes: &'a [Take],
    next: AtomicUsize,
    drawn: AtomicUsize,
    /// By recording and prefix: how many draws in a row brought nothing new.
    stale: Vec<Vec<AtomicUsize>>,
    found: Mutex<Found>,
}

#[derive(Default)]
struct Found {
    /// States, and how much had been told when they were checked.
    known: HashMap<u128, usize>,
    of_take: Vec<usize>,
    dirty: Vec<usize>,
    opened: u64,
    samples: Vec<(usize, usize, Image)>,
    violations: Vec<String>,
    /// Broken promises are expected.
    silent: bool,
    /// States that were new in each round.
    fresh: BTreeMap<usize, usize>,
}

/// Records and explores.
pub fn run(options: &Options) -> Report {
    let start = Instant::now();
    quiet_panics();
    let wanted = |name: &str| options.scenes.is_empty() || options.scenes.iter().any(|s| s == name);
    let makers: Vec<_> = SCENES.iter().filter(|(name, _)| wanted(name)).collect();
    assert!(!makers.is_empty(), "there is no such scene");
    let mut takes: Vec<Take> = makers.iter().map(|(_, make)| Take::record(make(false))).collect();
    if let Some(deaf) = options.deaf {
        takes.iter_mut().for_each(|t| t.deafen(deaf));
    }
    if options.verbose {
        eprintln!("{} commands recorded in {:.0} s", takes.len(), start.elapsed().as_secs_f64());
    }
    let found = Found {
        of_take: vec![0; takes.len()],
        dirty: vec![0; takes.len()],
        silent: options.deaf.is_some(),
        ..Found::default()
    };
    let stale = takes.iter().map(|t| (0..=t.calls.len()).map(|_| AtomicUsize::new(0)).collect()).collect();
    let search = Search {
        stale,
        options,
        takes: &takes,
        next: AtomicUsize::new(0),
        drawn: AtomicUsize::new(0),
        found: Mutex::new(found),
    };
    std::thread::scope(|scope| {
        for _ in 0..options.workers {
            scope.spawn(|| search.work());
        }
    });
    let (drawn, mut found) = (search.drawn.into_inner(), search.found.into_inner().unwrap());
    let recovered = recover(&takes, &found.samples, &mut found.violations);
    let told = takes.iter().map(|t| t.owed.last().map_or(0, |(_, o)| o.told)).sum();
    let scene = |(i, t): (usize, &Take)| (t.scene.name, (t.calls.len(), found.dirty[i], found.of_take[i]));
    Report {
        scenes: takes.iter().enumerate().map(scene).collect(),
        states: found.known.len(),
        drawn,
        opened: found.opened,
        recovered,
        told,
        violations: found.violations,
        seconds: start.elapsed().as_secs_f64(),
    }
}

/// Damaged rows make the digest panic; that is an answer here, not news.
pub(crate) fn quiet_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map_or("", |l| l.file());
        if !place.ends_with("src/digest.rs") && !place.ends_with("src/forge.rs") {
            usual(info);
        }
    }));
}

impl Search<'_> {
    /// Takes a recording a round, until there are states enough, or no new ones.
    fn work(&self) {
        let mut bench = Bench::default();
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let (round, take) = (n / self.takes.len(), n % self.takes.len());
            if self.is_enough(round) {
                break;
            }
            self.explore(round, take, &mut bench);
        }
        self.found.lock().unwrap().opened += bench.opened;
    }

    fn is_enough(&self, round: usize) -> bool {
        let found = self.found.lock().unwrap();
        let dry = round > 20 && (round - 12..round - 2).all(|r| found.fresh.get(&r).is_none_or(|new| *new == 0));
        found.known.len() >= self.options.states || dry
    }

    fn explore(&self, round: usize, number: usize, bench: &mut Bench) {
        let take = &self.takes[number];
        let mut dice = Dice::of(self.options.seed, (round * 1000 + number) as u64);
        let mut disk = take.disk();
        let mut dirty = 0;
        for n in 0..=take.calls.len() {
            let synced = disk.is_all_synced();
            dirty += usize::from(!synced);
            if round == 0 {
                self.judge((round, number, n), &disk.cut(Way::Lost, &mut dice), &mut dice, bench);
                self.judge((round, number, n), &disk.cut(Way::Kept, &mut dice), &mut dice, bench);
            }
            // Where little is open, soon all is seen.
            let seldom = self.stale[number][n].load(Ordering::Relaxed) > 12 && dice.index(10) > 0;
            for _ in 0..if synced || seldom { 0 } else { DRAWS } {
                self.judge((round, number, n), &disk.cut_anyhow(&mut dice), &mut dice, bench);
            }
            if let Some(call) = take.calls.get(n) {
                disk.take(call);
            }
        }
        let mut found = self.found.lock().unwrap();
        found.dirty[number] = dirty;
        if self.options.verbose && number == 0 && round.is_multiple_of(50) {
            eprintln!("round {round}: {} states, {} violations", found.known.len(), found.violations.len());
        }
    }

    /// Checks a state, unless it was checked when as much had been told.
    fn judge(&self, (round, number, n): (usize, usize, usize), image: &Image, dice: &mut Dice, bench: &mut Bench) {
        self.drawn.fetch_add(1, Ordering::Relaxed);
        let take = &self.takes[number];
        let owed = take.owed_at(n);
        let key = fingerprint(image) ^ number as u128;
        {
            let mut found = self.found.lock().unwrap();
            match found.known.get(&key).copied() {
                Some(told) if told > owed.told => {
                    self.stale[number][n].fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Some(_) => {}
                None if found.known.len() >= self.options.states => return,
                None => {
                    found.of_take[number] += 1;
                    *found.fresh.entry(round).or_default() += 1;
                }
            }
            self.stale[number][n].store(0, Ordering::Relaxed);
            found.known.insert(key, owed.told + 1);
            let share = (self.options.states / self.options.recover.max(1)).max(1);
            if found.samples.len() < self.options.recover && dice.index(share) == 0 {
                found.samples.push((number, n, image.clone()));
            }
        }
        if let Err(broken) = take.scene.world.check(image, owed, bench) {
            let call = n.checked_sub(1).and_then(|n| take.calls.get(n)).map_or("the beginning".into(), short);
            let text = format!("{} round {round} call {n} (after {call}): {broken}", take.scene.name);
            self.found.lock().unwrap().broken(text);
        }
    }
}

impl Found {
    fn broken(&mut self, text: String) {
        if self.violations.len() < TOLD && !self.silent {
            eprintln!("BROKEN {text}");
        }
        self.violations.push(text);
    }
}

/// A call without its bytes.
fn short(call: &Call) -> String {
    let text = match call {
        Call::Write { path, at, data } => format!("write of {} bytes at {at:?} to {}", data.len(), path.display()),
        Call::Say { bytes } => format!("{} bytes said", bytes.len()),
        other => format!("{other:?}"),
    };
    text.chars().take(300).collect()
}

/// Runs the real binaries on some of the states: they come to a good end, and to what the source has.
fn recover(takes: &[Take], samples: &[(usize, usize, Image)], violations: &mut Vec<String>) -> usize {
    let mut bench = Bench::default();
    for (number, n, image) in samples {
        let take = &takes[*number];
        take.scene.restore(image);
        let mut owed = take.owed_at(*n).clone();
        take.scene.ended(&mut owed);
        if let Err(broken) = converges(&take.scene, &owed, &mut bench) {
            let text = format!("{} recovered after call {n}: {broken}", take.scene.name);
            eprintln!("BROKEN {text}");
            violations.push(text);
        }
    }
    samples.len()
}

/// A few runs that nothing disturbs bring a scene to its good end.
pub(crate) fn converges(scene: &Scene, owed: &Owed, bench: &mut Bench) -> Result<(), String> {
    let mut last = None;
    for _ in 0..4 {
        let out = scene.again();
        if out.code == Some(scene.code) {
            // What was put since is not in the world's list; it is judged by what it holds.
            let owed = Owed { ledger: None, ..owed.clone() };
            return scene.world.check(&scene.image(), &owed, bench);
        }
        last = Some(out);
    }
    let out = last.map(|o| o.text()).unwrap_or_default();
    Err(format!("four runs did not end well; the last one said: {out:.600}"))
}

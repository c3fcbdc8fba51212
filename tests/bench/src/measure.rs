//! Times, their spread, and how they are told.

use std::fmt;
use std::time::{Duration, Instant};

/// What one run of something took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// By the clock on the wall.
    pub wall: Duration,
    /// On the processor, by this thread (and the processes it waited for).
    pub cpu: Duration,
}

/// Runs something and times it: this thread's processor time, and that of children that end meanwhile.
pub fn time<T>(f: impl FnOnce() -> T) -> (T, Took) {
    timed(cpu_of_thread, f)
}

/// As [`time`], with the processor time of all threads of this process (in steps of 10 ms).
pub fn time_all<T>(f: impl FnOnce() -> T) -> (T, Took) {
    timed(|| ticks("/proc/self/stat", 11, 4), f)
}

fn timed<T>(cpu_now: fn() -> Duration, f: impl FnOnce() -> T) -> (T, Took) {
    let (cpu, start) = (cpu_now(), Instant::now());
    let value = f();
    let wall = start.elapsed();
    (value, Took { wall, cpu: cpu_now().saturating_sub(cpu) })
}

fn cpu_of_thread() -> Duration {
    let own = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let own = own.split(' ').next().and_then(|n| n.parse().ok()).map_or(Duration::ZERO, Duration::from_nanos);
    own + ticks("/proc/self/stat", 13, 2)
}

/// Processor time of another process so far.
pub fn cpu_of(pid: u32) -> Duration {
    ticks(&format!("/proc/{pid}/stat"), 11, 2)
}

/// Neighbouring fields of a stat file, counted from the state (utime is 11), added up; a tick is 10 ms.
fn ticks(path: &str, field: usize, count: usize) -> Duration {
    let stat = std::fs::read_to_string(path).unwrap_or_default();
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap_or_default().split(' ').map(|f| f.parse().unwrap_or(0)).collect();
    Duration::from_millis(10 * fields.get(field + 1..field + 1 + count).map_or(0, |f| f.iter().sum()))
}

/// Minimum, median and maximum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The middle.
    pub median: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of these values; there must be one at least.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut v: Vec<f64> = values.into_iter().collect();
        v.sort_by(f64::total_cmp);
        Spread { min: v[0], median: v[v.len() / 2], max: v[v.len() - 1] }
    }
    /// Seconds on the wall.
    pub fn wall(runs: &[Took]) -> Spread {
        Spread::of(runs.iter().map(|t| t.wall.as_secs_f64()))
    }
    /// Seconds on the processor.
    pub fn cpu(runs: &[Took]) -> Spread {
        Spread::of(runs.iter().map(|t| t.cpu.as_secs_f64()))
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = f.precision().unwrap_or(2);
        write!(f, "{:.n$} / {:.n$} / {:.n$}", self.min, self.median, self.max)
    }
}

/// What is promised of a figure.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
    /// At most this, in the worst run too.
    WorstAtMost(f64),
    /// Nothing: told for the record.
    None,
}

/// What benches found: lines of one table, and tables of their own.
#[derive(Debug, Default)]
pub struct Results {
    /// The lines, each with its bench.
    pub lines: Vec<(&'static str, Line)>,
    /// Tables that do not fit the one.
    pub tables: Vec<String>,
    /// The bench that runs.
    pub bench: &'static str,
}

impl Results {
    /// Prints a line of the table.
    pub fn line(&mut self, line: Line) {
        println!("{line}");
        self.lines.push((self.bench, line));
    }
    /// The lines that miss their target.
    pub fn missed(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().map(|(_, l)| l).filter(|l| l.holds() == Some(false))
    }
    /// Keeps a table for the end.
    pub fn table(&mut self, table: String) {
        self.tables.push(table);
    }
}

/// One line of the results.
#[derive(Debug)]
pub struct Line {
    /// What was measured.
    pub what: String,
    /// What is promised.
    pub target: Target,
    /// The figure that is judged: its median.
    pub figure: Spread,
    /// The figure's unit; `×` for a ratio.
    pub unit: &'static str,
    /// What stands behind it.
    pub behind: String,
}

impl Line {
    /// A ratio of pairs of runs, taken turn by turn. Judged by time on the processor where `by_cpu`: other work on
    /// the machine does not count there.
    pub fn ratio(what: &str, target: Target, ours: &[Took], peer: &[Took]) -> Line {
        let pairs = |f: fn(&Took) -> f64| Spread::of(ours.iter().zip(peer).map(|(o, p)| f(o) / f(p)));
        let (wall, cpu) = (pairs(|t| t.wall.as_secs_f64()), pairs(|t| t.cpu.as_secs_f64()));
        let least = Spread::wall(ours).min / Spread::wall(peer).min;
        let behind = format!(
            "{:.3} s against {:.3} s; of the minima {least:.2} ×; processor {:.3} s against {:.3} s, {cpu} ×",
            Spread::wall(ours),
            Spread::wall(peer),
            Spread::cpu(ours),
            Spread::cpu(peer)
        );
        Line { what: what.into(), target, figure: wall, unit: "×", behind }
    }

    /// How far the figure is from what is promised of it, or from the peer where nothing is: below 1 is better. None
    /// for a figure that is told for the record.
    pub fn against_target(&self) -> Option<Spread> {
        let Spread { min, median, max } = self.figure;
        match self.target {
            Target::AtMost(t) | Target::WorstAtMost(t) if t > 0.0 => {
                Some(Spread { min: min / t, median: median / t, max: max / t })
            }
            Target::AtLeast(t) => Some(Spread { min: t / max, median: t / median, max: t / min }),
            Target::None if self.unit == "×" => Some(self.figure),
            _ => None,
        }
    }

    fn holds(&self) -> Option<bool> {
        match self.target {
            Target::AtMost(t) => Some(self.figure.median <= t),
            Target::AtLeast(t) => Some(self.figure.median >= t),
            Target::WorstAtMost(t) => Some(self.figure.max <= t),
            Target::None => None,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let target = match self.target {
            Target::AtMost(t) | Target::WorstAtMost(t) => format!("≤ {t} {}", self.unit),
            Target::AtLeast(t) => format!("≥ {t} {}", self.unit),
            Target::None => "–".into(),
        };
        let verdict = match self.holds() {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "",
        };
        let n = match self.figure.max {
            ..0.1 => 4,
            ..10.0 => 2,
            _ => 0,
        };
        write!(f, "| {} | {target} | {:.n$} {} | {verdict} | {} |", self.what, self.figure, self.unit, self.behind)
    }
}

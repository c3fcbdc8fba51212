//! What everything takes, sampled: resident memory and descriptors of each process, bytes and files of each directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// Resident memory, MiB.
    Memory,
    /// Open descriptors.
    Descriptors,
    /// Length of all files below a directory, MiB.
    Bytes,
    /// Files below a directory.
    Files,
}

impl Figure {
    /// All, in the order of the plot.
    pub const ALL: [Figure; 4] = [Figure::Memory, Figure::Descriptors, Figure::Bytes, Figure::Files];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Figure::Memory => "resident memory, MiB",
            Figure::Descriptors => "open descriptors",
            Figure::Bytes => "directories, MiB",
            Figure::Files => "files in directories",
        }
    }

    /// What may come on top of a quarter more: a page cache that fills, a pack more, a few sockets.
    fn slack(self) -> f64 {
        match self {
            Figure::Memory | Figure::Bytes => 6.0,
            Figure::Descriptors | Figure::Files => 16.0,
        }
    }
}

/// Samples of one figure of one process or directory: seconds since the start, value.
pub type Series = Vec<(f64, f64)>;

/// All series.
pub type Samples = BTreeMap<(Figure, String), Series>;

/// Takes samples in a thread until it is asked for them.
pub struct Watch {
    pids: Arc<Mutex<BTreeMap<String, u32>>>,
    samples: Arc<Mutex<Samples>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches directories by name; processes are told as they start.
    pub fn start(directories: Vec<(String, PathBuf)>, every: Duration) -> Watch {
        let (pids, samples) = (Arc::new(Mutex::new(BTreeMap::new())), Arc::new(Mutex::new(Samples::new())));
        let stop = Arc::new(AtomicBool::new(false));
        let (their_pids, their_samples, asked) = (pids.clone(), samples.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            while !asked.load(Ordering::Relaxed) {
                let known = their_pids.lock().unwrap().clone();
                let found = sample(&known, &directories);
                let (at, mut samples) = (start.elapsed().as_secs_f64(), their_samples.lock().unwrap());
                for (key, value) in found {
                    samples.entry(key).or_default().push((at, value));
                }
                drop(samples);
                std::thread::sleep(every);
            }
        });
        Watch { pids, samples, stop, thread: Some(thread) }
    }

    /// A process has started.
    pub fn runs(&self, name: &str, pid: u32) {
        self.pids.lock().unwrap().insert(name.to_owned(), pid);
    }

    /// A process was killed.
    pub fn is_gone(&self, name: &str) {
        self.pids.lock().unwrap().remove(name);
    }

    /// Ends the watch.
    pub fn samples(mut self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        std::mem::take(&mut self.samples.lock().unwrap())
    }
}

fn sample(pids: &BTreeMap<String, u32>, directories: &[(String, PathBuf)]) -> Vec<((Figure, String), f64)> {
    let mut found = Vec::new();
    for (name, pid) in pids {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib =
            status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
        // It may have been killed a moment ago.
        if let (Some(kib), Ok(descriptors)) = (kib, descriptors) {
            found.push(((Figure::Memory, name.clone()), kib / 1024.0));
            found.push(((Figure::Descriptors, name.clone()), descriptors as f64));
        }
    }
    for (name, dir) in directories {
        let (mut bytes, mut files) = (0, 0);
        measure(dir, &mut bytes, &mut files);
        found.push(((Figure::Bytes, name.clone()), bytes as f64 / f64::from(1 << 20)));
        found.push(((Figure::Files, name.clone()), files as f64));
    }
    found
}

fn measure(dir: &Path, bytes: &mut u64, files: &mut u64) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(m) if m.is_dir() => measure(&entry.path(), bytes, files),
            Ok(m) => (*bytes, *files) = (*bytes + m.len(), *files + 1),
            // Deleted meanwhile.
            Err(_) => {}
        }
    }
}

/// How a series went: the medians of its middle and its last third, and its greatest value.
#[derive(Debug, Clone, Copy)]
pub struct Course {
    /// The middle third's median.
    pub middle: f64,
    /// The last third's.
    pub last: f64,
    /// The greatest of all.
    pub most: f64,
}

impl Course {
    /// Of a series' values.
    pub fn of(series: &Series) -> Course {
        let median = |part: &[(f64, f64)]| {
            let mut values: Vec<f64> = part.iter().map(|s| s.1).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(0.0)
        };
        let third = series.len() / 3;
        Course {
            middle: median(&series[third..2 * third]),
            last: median(&series[2 * third..]),
            most: series.iter().map(|s| s.1).fold(0.0, f64::max),
        }
    }

    /// Whether it still grows when retention has long set in.
    pub fn grows(&self, figure: Figure) -> bool {
        self.last > self.middle * 1.25 + figure.slack()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_is_told_from_what_rests() {
        let series = |f: fn(f64) -> f64| -> Series { (0..90).map(|n| (f64::from(n), f(f64::from(n)))).collect() };
        assert!(Course::of(&series(|n| 20.0 + n)).grows(Figure::Memory));
        assert!(!Course::of(&series(|n| 50.0 + n % 9.0)).grows(Figure::Memory));
        assert!(!Course::of(&series(|n| n.min(25.0) * 4.0)).grows(Figure::Bytes));
        assert!(Course::of(&series(|n| n * n)).grows(Figure::Files));
    }
}

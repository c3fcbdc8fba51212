//! Named places at which a test makes the process kill itself, in the binaries that ship: what is proved
//! is what runs. In service a place costs one atomic load.
//!
//! A durable step is `NAME`, its points are `NAME.before`, `NAME.after`, and those that the rooms
//! below reach inside of it (`NAME.renamed`: renamed, the directory not yet synced). `failpoint.txt` is the
//! list of all. Armed by `cli`, from `TILLCAST_FAILPOINT` (`POINT` or `POINT#N`: the Nth time that this process
//! reaches it) and `TILLCAST_FAILPOINT_LOG` (a file that gets the name of every point reached). Must
//! never do anything else than that.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static ARMED: AtomicBool = AtomicBool::new(false);
static PLAN: OnceLock<Plan> = OnceLock::new();

thread_local! {
    /// The step that this thread is in.
    static STEP: Cell<Option<&'static str>> = const { Cell::new(None) };
}

#[derive(Debug)]
struct Plan {
    /// Where to die, and at which time of reaching it.
    point: Option<(String, u64)>,
    log: Option<PathBuf>,
    reached: AtomicU64,
}

/// Sets where to die and where to log; once a process, before any step. Nothing set: nothing ever happens.
pub fn arm(point: Option<String>, log: Option<PathBuf>) {
    if point.is_none() && log.is_none() {
        return;
    }
    let point = point.map(|text| match text.split_once('#') {
        Some((name, n)) => (name.to_owned(), n.parse().unwrap_or(1)),
        None => (text, 1),
    });
    if PLAN.set(Plan { point, log, reached: AtomicU64::new(0) }).is_ok() {
        ARMED.store(true, Ordering::Release);
    }
}

/// A durable step done by this thread.
pub fn step<T>(name: &'static str, work: impl FnOnce() -> T) -> T {
    if !ARMED.load(Ordering::Acquire) {
        return work();
    }
    reached(name, "before");
    let outer = STEP.replace(Some(name));
    let done = work();
    STEP.set(outer);
    reached(name, "after");
    done
}

/// A durable step that waits; it has no points inside.
pub async fn around<T>(name: &'static str, work: impl Future<Output = T>) -> T {
    if !ARMED.load(Ordering::Acquire) {
        return work.await;
    }
    reached(name, "before");
    let done = work.await;
    reached(name, "after");
    done
}

/// A step's name where it is chosen apart from the call, so that the list can be held against the sources.
pub const fn name(name: &'static str) -> &'static str {
    name
}

/// A point inside of the step that this thread is in, if it is in one.
pub fn inside(point: &'static str) {
    if ARMED.load(Ordering::Acquire)
        && let Some(step) = STEP.get()
    {
        reached(step, point);
    }
}

#[cold]
fn reached(step: &str, point: &str) {
    let Some(plan) = PLAN.get() else { return };
    let name = format!("{step}.{point}");
    let fatal =
        plan.point.as_ref().is_some_and(|(p, n)| *p == name && plan.reached.fetch_add(1, Ordering::Relaxed) + 1 == *n);
    if let Some(log) = &plan.log {
        // In one write, so that the lines of a parent and its child do not mix. A test notices what is missing.
        let line = format!("{name}{}\n", if fatal { " killed" } else { "" });
        let _ = OpenOptions::new().create(true).append(true).open(log).and_then(|mut f| f.write_all(line.as_bytes()));
    }
    if fatal {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // Nobody gets here, unless the system refuses a signal to oneself.
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;
    use std::path::Path;

    /// The names of steps that a source file gives to this room.
    fn steps_in(text: &str) -> impl Iterator<Item = String> {
        let calls = ["failpoint::step(\"", "failpoint::around(\"", "failpoint::name(\""];
        // However the call is broken over lines.
        let text: String = text.lines().map(str::trim).collect();
        calls.into_iter().flat_map(move |call| {
            text.match_indices(call)
                .map(|(at, _)| text[at + call.len()..].split('"').next().unwrap_or_default().to_owned())
                .collect::<Vec<_>>()
        })
    }

    fn sources(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            if entry.path().is_dir() {
                sources(&entry.path(), found);
            } else if entry.path().extension().is_some_and(|e| e == "rs") && entry.file_name() != "failpoint.rs" {
                found.extend(steps_in(&std::fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }

    #[test]
    fn the_list_and_the_sources_agree() {
        let mut found = BTreeSet::new();
        for part in ["proto", "hq-publisher", "store-relay", "pos-agent"] {
            sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(part).join("src"), &mut found);
        }
        let lines = include_str!("failpoint.txt").lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        let listed: Vec<&str> = lines.map(|l| l.split(':').next().unwrap_or_default().trim()).collect();
        let set: BTreeSet<String> = listed.iter().map(|s| (*s).to_owned()).collect();
        assert_eq!(set.len(), listed.len(), "a step is listed twice");
        assert_eq!(set, found, "failpoint.txt against the steps that the sources name");
    }
}

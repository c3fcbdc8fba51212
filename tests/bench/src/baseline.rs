//! Ratios of an earlier run, and which of this one are worse. Only ratios: they mean the same on another machine.

use crate::measure::{Results, Target};
use std::collections::BTreeMap;
use std::path::Path;

/// By how much a ratio may grow worse.
const SLACK: f64 = 1.10;

fn ratios(results: &Results) -> BTreeMap<&str, (f64, bool)> {
    let ratios = results.lines.iter().filter(|(_, l)| l.unit == "×");
    ratios.map(|(_, l)| (l.what.as_str(), (l.figure.median, matches!(l.target, Target::AtLeast(_))))).collect()
}

/// Writes the medians, merged into those of benches that did not run now.
pub fn save(file: &Path, results: &Results) {
    let mut all = read(file).unwrap_or_default();
    all.extend(ratios(results).into_iter().map(|(what, (median, _))| (what.to_owned(), median)));
    std::fs::write(file, format!("{}\n", serde_json::to_string_pretty(&all).unwrap())).unwrap();
}

fn read(file: &Path) -> Option<BTreeMap<String, f64>> {
    let text = std::fs::read_to_string(file).ok()?;
    Some(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
}

/// What is more than 10% worse, or was never measured before; with `all` also what was not measured this time.
pub fn worse(file: &Path, results: &Results, all: bool) -> Vec<String> {
    let before = read(file).unwrap_or_else(|| panic!("{} cannot be read: make it with --save", file.display()));
    let is_worse = |now: f64, then: f64, more_is_better: bool| {
        if more_is_better { now * SLACK < then } else { now > then * SLACK }
    };
    let judge = |(what, (now, more)): (&str, (f64, bool))| match before.get(what) {
        None => Some(format!("{what}: {now:.3} ×, and nothing to compare it with: --save it")),
        Some(then) => is_worse(now, *then, more).then(|| format!("{what}: {now:.3} ×, it was {then:.3} ×")),
    };
    let now = ratios(results);
    let gone = before.keys().filter(|what| all && !now.contains_key(what.as_str()));
    let gone: Vec<String> = gone.map(|what| format!("{what}: not measured any more")).collect();
    now.into_iter().filter_map(judge).chain(gone).collect()
}

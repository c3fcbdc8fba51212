//! Ratios of an earlier run, and which of this one are worse. Only ratios: they mean the same on another machine.

use crate::measure::{Line, Results, Target};
use std::collections::BTreeMap;
use std::path::Path;

/// By how much a ratio may grow worse.
const SLACK: f64 = 1.10;

/// Those of real data are told alone: not each machine has it.
fn ratios(results: &Results) -> BTreeMap<&str, &Line> {
    let ratios = results.lines.iter().filter(|(_, l)| l.unit == "×" && !l.what.ends_with(crate::real::PEER));
    ratios.map(|(_, l)| (l.what.as_str(), l)).collect()
}

/// Writes the medians, merged into those of benches that did not run now.
pub fn save(file: &Path, results: &Results) {
    let mut all = read(file).unwrap_or_default();
    all.extend(ratios(results).into_iter().map(|(what, line)| (what.to_owned(), line.figure.median)));
    std::fs::write(file, format!("{}\n", serde_json::to_string_pretty(&all).unwrap())).unwrap();
}

fn read(file: &Path) -> Option<BTreeMap<String, f64>> {
    let text = std::fs::read_to_string(file).ok()?;
    Some(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
}

/// What is more than 10% worse, or was never measured before; with `all` also what was not measured this time. The best
/// run of now is held against the median of then: what has grown worse is so in each run, and the runs of some ratios lie
/// further apart than 10%.
pub fn worse(file: &Path, results: &Results, all: bool) -> Vec<String> {
    let before = read(file).unwrap_or_else(|| panic!("{} cannot be read: make it with --save", file.display()));
    let is_worse = |now: &Line, then: f64| match now.target {
        Target::AtLeast(_) => now.figure.max * SLACK < then,
        _ => now.figure.min > then * SLACK,
    };
    let judge = |(what, now): (&str, &Line)| match before.get(what) {
        None => Some(format!("{what}: {:.3} ×, and nothing to compare it with: --save it", now.figure)),
        Some(then) => is_worse(now, *then).then(|| format!("{what}: {:.3} ×, it was {then:.3} ×", now.figure)),
    };
    let now = ratios(results);
    let gone = before.keys().filter(|what| all && !now.contains_key(what.as_str()));
    let gone: Vec<String> = gone.map(|what| format!("{what}: not measured any more")).collect();
    now.into_iter().filter_map(judge).chain(gone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Spread;

    const HERE: &str = env!("CARGO_MANIFEST_DIR");

    /// A ratio of a table in RESULTS.md: `| what | ≥ 0.9 × | 0.96 / 1.04 / 1.23 × | met | … |`.
    fn ratio(row: &str) -> Option<Line> {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, what, target, figure, _, behind, _] = cells[..] else { return None };
        let figure: Vec<f64> = figure.strip_suffix(" ×")?.split(" / ").map(|n| n.parse().unwrap()).collect();
        let [min, median, max] = figure[..] else { return None };
        let number = |sign: &str| target.strip_prefix(sign)?.strip_suffix(" ×")?.trim().parse::<f64>().ok();
        let target = match (number("≥"), number("≤")) {
            (Some(least), _) => Target::AtLeast(least),
            (_, Some(most)) => Target::AtMost(most),
            _ => Target::None,
        };
        let figure = Spread { min, median, max };
        Some(Line { what: what.into(), target, figure, unit: "×", behind: behind.into() })
    }

    fn of_lines(lines: Vec<Line>) -> Results {
        Results { lines: lines.into_iter().map(|l| ("", l)).collect(), ..Results::default() }
    }

    /// What `tests/bench/nightly` would say of the figures that are written down: both are kept by hand.
    #[test]
    fn the_results_that_are_written_down_are_no_worse_than_the_baseline() {
        let text = std::fs::read_to_string(format!("{HERE}/RESULTS.md")).unwrap();
        let results = of_lines(text.lines().filter_map(ratio).collect());
        assert!(results.lines.len() > 15, "{results:?}");
        assert_eq!(worse(&Path::new(HERE).join("baseline.json"), &results, true), Vec::<String>::new());
        assert!(results.missed().next().is_none(), "{results:?}");
    }

    #[test]
    fn noise_is_no_regression_and_what_no_run_reaches_is_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"less": 1.0, "more": 1.0}"#).unwrap();
        let line = |what: &str, target, min, max| Line {
            what: what.into(),
            target,
            figure: Spread::of([min, max]),
            unit: "×",
            behind: String::new(),
        };
        let judged = |less: (f64, f64), more: (f64, f64)| {
            let less = line("less", Target::AtMost(3.0), less.0, less.1);
            let more = line("more", Target::AtLeast(0.5), more.0, more.1);
            let worse = worse(file.path(), &of_lines(vec![less, more]), true);
            worse.iter().map(|w| w[..4].to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(judged((1.09, 1.5), (0.6, 0.92)), Vec::<String>::new());
        assert_eq!(judged((1.11, 1.2), (0.8, 0.9)), ["less", "more"]);
        let real = line(&format!("delta of a day, {}", crate::real::PEER), Target::None, 0.1, 0.1);
        assert_eq!(worse(file.path(), &of_lines(vec![real]), false), Vec::<String>::new());
    }
}

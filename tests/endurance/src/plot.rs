//! The samples as one SVG: a panel a figure, a line a process or directory, days along the bottom.

use crate::watch::{Figure, Samples, Series};
use std::fmt::Write as _;

const WIDTH: f64 = 900.0;
const PANEL: f64 = 200.0;
const LEFT: f64 = 50.0;
const RIGHT: f64 = 700.0;
const COLOURS: [&str; 8] = ["#1b6", "#c33", "#36c", "#d70", "#829", "#088", "#a52", "#555"];
/// Points of a line; more could not be told apart.
const POINTS: usize = 160;

/// Draws; `day` in seconds.
pub fn svg(samples: &Samples, day: f64) -> String {
    let height = PANEL * Figure::ALL.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let end = samples.values().flatten().map(|s| s.0).fold(day, f64::max);
    for (n, figure) in Figure::ALL.into_iter().enumerate() {
        let lines: Vec<(&str, &Series)> =
            samples.iter().filter(|((f, _), _)| *f == figure).map(|((_, name), s)| (name.as_str(), s)).collect();
        panel(&mut out, PANEL * n as f64, figure, &lines, end, day);
    }
    out.push_str("</svg>\n");
    out
}

fn panel(out: &mut String, top: f64, figure: Figure, lines: &[(&str, &Series)], end: f64, day: f64) {
    let most = lines.iter().flat_map(|(_, s)| s.iter()).map(|s| s.1).fold(1.0, f64::max);
    let (high, low) = (top + 24.0, top + PANEL - 24.0);
    let x = |t: f64| LEFT + (RIGHT - LEFT) * t / end;
    let y = |v: f64| low - (low - high) * v / most;
    writeln!(out, "<text x=\"{LEFT}\" y=\"{:.0}\" font-weight=\"bold\">{}</text>", top + 15.0, figure.title()).unwrap();
    for part in [0.0, 0.5, 1.0] {
        let (at, value) = (y(most * part), most * part);
        writeln!(out, "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>").unwrap();
        writeln!(out, "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{value:.0}</text>", LEFT - 6.0, at + 4.0)
            .unwrap();
    }
    let days = (end / day).floor() as u64;
    for n in (0..=days).step_by(usize::try_from(days / 12 + 1).unwrap()) {
        let at = x(n as f64 * day);
        writeln!(out, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{n} d</text>", low + 14.0).unwrap();
    }
    for (n, (name, series)) in lines.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let dash = if n < COLOURS.len() { "" } else { " stroke-dasharray=\"4 2\"" };
        let step = series.len().div_ceil(POINTS).max(1);
        let points: Vec<String> =
            series.iter().step_by(step).map(|(t, v)| format!("{:.1},{:.1}", x(*t), y(*v))).collect();
        writeln!(out, "<polyline fill=\"none\" stroke=\"{colour}\"{dash} points=\"{}\"/>", points.join(" ")).unwrap();
        let at = high + 13.0 * n as f64;
        writeln!(out, "<text x=\"{:.0}\" y=\"{at:.0}\" fill=\"{colour}\">{name}</text>", RIGHT + 14.0).unwrap();
    }
}

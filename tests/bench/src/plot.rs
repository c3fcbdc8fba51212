//! One SVG a bench: each figure's least, middle and greatest, as a multiple of what is promised (or of the peer).

use crate::measure::{Line, Results, Spread};
use std::fmt::Write as _;
use std::path::Path;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 430.0;
const ROW: f64 = 26.0;
/// The axis, in multiples of the target; logarithmic.
const FROM: f64 = 0.05;
const TO: f64 = 5.0;

/// Draws those benches that ran.
pub fn draw(dir: &Path, results: &Results) {
    std::fs::create_dir_all(dir).unwrap();
    let mut benches: Vec<&str> = results.lines.iter().map(|(bench, _)| *bench).collect();
    benches.dedup();
    for bench in benches {
        let lines = results.lines.iter().filter(|(b, _)| *b == bench);
        let rows: Vec<(&Line, Spread)> = lines.filter_map(|(_, l)| Some((l, l.against_target()?))).collect();
        if !rows.is_empty() {
            std::fs::write(dir.join(format!("{bench}.svg")), svg(&rows)).unwrap();
        }
    }
}

fn x(value: f64) -> f64 {
    let part = (value.clamp(FROM, TO) / FROM).ln() / (TO / FROM).ln();
    LEFT + part * (WIDTH - LEFT - 20.0)
}

fn svg(rows: &[(&Line, Spread)]) -> String {
    let height = 40.0 + ROW * rows.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for tick in [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0] {
        let (x, bottom) = (x(tick), height - 24.0);
        let colour = if tick == 1.0 { "#c33" } else { "#ddd" };
        writeln!(out, "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"8\" y2=\"{bottom}\" stroke=\"{colour}\"/>").unwrap();
        writeln!(out, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{tick} ×</text>", height - 8.0).unwrap();
    }
    for (n, (line, spread)) in rows.iter().enumerate() {
        let y = 22.0 + ROW * n as f64;
        let colour = if spread.median <= 1.0 { "#2a7" } else { "#d70" };
        let what: String = line.what.replace('&', "&amp;").replace('<', "&lt;").chars().take(76).collect();
        writeln!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{what}</text>", LEFT - 10.0, y + 4.0).unwrap();
        let (from, to) = (x(spread.min), x(spread.max));
        writeln!(
            out,
            "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"4\"/>"
        )
        .unwrap();
        let middle = x(spread.median);
        writeln!(out, "<circle cx=\"{middle:.1}\" cy=\"{y}\" r=\"5\" fill=\"{colour}\"/>").unwrap();
        // Beyond the axis it is the number that tells.
        if !(FROM..=TO).contains(&spread.median) {
            let (at, anchor) = if spread.median > TO { (middle - 9.0, "end") } else { (middle + 9.0, "start") };
            let digits = if spread.median < 0.01 { 4 } else { 2 };
            let number = format!("{:.digits$} ×", spread.median);
            writeln!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{number}</text>", y - 4.0).unwrap();
        }
    }
    out.push_str("</svg>\n");
    out
}

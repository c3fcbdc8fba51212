//! How far a publish is: a bar on a terminal, plain lines in a log.

use crate::publish::report::{InstanceReport, Outcome};
use crate::publish::{Phase, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use proto::ids::Instance;
use std::io::IsTerminal;

/// Shows a run on stderr.
#[derive(Debug)]
pub struct Shown {
    bar: Option<ProgressBar>,
    dry_run: bool,
}

impl Shown {
    /// A bar where stderr is a terminal. Of a dry run nothing is told as done.
    pub fn new(dry_run: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos}/{len} {wide_msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(std::time::Duration::from_millis(200));
            bar
        });
        Shown { bar, dry_run }
    }

    /// Takes the bar away, so that the report stands alone.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn doing(phase: Phase) -> &'static str {
    match phase {
        Phase::Reading => "reading",
        Phase::Comparing => "comparing",
        Phase::Packing => "packing",
        Phase::Applying => "validating",
        Phase::Putting => "putting",
    }
}

impl Progress for Shown {
    fn planned(&self, instances: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(instances as u64);
        }
    }

    fn phase(&self, instance: &Instance, phase: Phase) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{} {instance}", doing(phase))),
            None => tracing::debug!(%instance, "{}", doing(phase)),
        }
    }

    fn finished(&self, instance: &Instance, report: &InstanceReport) {
        match &self.bar {
            Some(bar) => bar.inc(1),
            // The refusal itself is logged where it is decided.
            None if report.outcome == Outcome::Refused => {}
            None => tracing::info!(%instance, "{}", report.outcome.word(self.dry_run)),
        }
    }

    fn signing(&self, versions: usize) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("signing and putting manifests for {versions} versions")),
            None => tracing::debug!("signing and putting manifests for {versions} versions"),
        }
    }
}

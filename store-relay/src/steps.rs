//! A hook around every durable step, so that a test can pull the plug between any two of them.
//! Does nothing in service. Each is a failpoint too, for tests of the whole program.

use proto::failpoint;
use std::fmt;
use std::sync::Arc;

/// Before or after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing of it is on disk yet.
    Before,
    /// All of it is.
    After,
}

type Hook = dyn Fn(&'static str, Moment) + Send + Sync;

/// Who hears of durable steps; nobody in service.
#[derive(Clone, Default)]
pub struct Steps(Option<Arc<Hook>>);

impl Steps {
    /// Calls `hook` before and after each step; it may panic, as a stand-in for a power cut.
    pub fn observed(hook: impl Fn(&'static str, Moment) + Send + Sync + 'static) -> Self {
        Steps(Some(Arc::new(hook)))
    }

    /// Runs a durable step.
    pub fn run<T>(&self, name: &'static str, step: impl FnOnce() -> T) -> T {
        if let Some(hook) = &self.0 {
            hook(name, Moment::Before);
        }
        let done = failpoint::step(name, step);
        if let Some(hook) = &self.0 {
            hook(name, Moment::After);
        }
        done
    }
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Steps(observed)" } else { "Steps" })
    }
}

//! The harness of the end-to-end tests: real servers on loopback, the product's binaries, breakable
//! networks, a whole installation in a temporary directory, and an independent check of its digests.
//!
//! All of it is synchronous: tests are plain `#[test]` functions. What needs async runs on a runtime of
//! the harness. Nothing waits by sleeping for a fixed time: [`until`] polls a condition to a deadline.
//! What is missing is a panic that says how to get it, never a skipped test; but real data, which is not ours to ship.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "test code: a failure here is a failed test, and files and clocks are the test's own"
)]

pub mod bins;
pub mod checker;
pub mod dice;
pub mod digest;
pub mod files;
pub mod flood;
pub mod forge;
pub mod http;
pub mod liar;
pub mod process;
pub mod proxy;
pub mod real_data;
pub mod servers;
pub mod site;
pub mod watch;

pub use bins::{Daemon, Output, Product};
pub use dice::Dice;
pub use liar::{Asked, Liar, Say};
pub use proxy::{Net, Proxy};
pub use servers::{MariaDb, Nginx, Postgres, S3, Smtp};
pub use site::Site;
pub use watch::Watch;

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// The runtime on which proxies, stand-ins and HTTP calls run.
pub(crate) static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().thread_name("harness").build().unwrap()
});

/// The usual bound of a wait, far above what anything takes on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Polls until the condition holds; panics with `what` after `deadline`.
#[track_caller]
pub fn until(deadline: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    until_some(deadline, what, || holds().then_some(()));
}

/// Polls until there is a value, and gives it back; panics with `what` after `deadline`.
#[track_caller]
pub fn until_some<T>(deadline: Duration, what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    match wait_for(deadline, &mut value) {
        Some(v) => v,
        None => panic!("not within {deadline:?}: {what}"),
    }
}

/// As [`until_some`], but None after the deadline: for callers that have more to say.
pub fn wait_for<T>(deadline: Duration, mut value: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(v) = value() {
            return Some(v);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Does so many parts of some work, as many at once as there are processors. Async work gets a runtime of its own.
pub fn in_parts<F: Future<Output = ()>>(parts: u64, part: impl Fn(u64) -> F + Sync) {
    let next = std::sync::atomic::AtomicU64::new(0);
    let worker = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        loop {
            let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if n >= parts {
                return;
            }
            runtime.block_on(part(n));
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(worker))));
}

/// A loopback port below those that the system hands out by itself, not given to anybody else of this program: for
/// who binds it later, and for addresses at which nobody shall be.
pub fn quiet_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Programs that run at once begin far from one another.
    let first = u16::try_from(u64::from(std::process::id()) * 7_919 % 20_000).unwrap();
    loop {
        let port = 12_000 + first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Where `tests/run` put what does not come by apt.
pub fn tools() -> PathBuf {
    let set = |k: &str| std::env::var_os(k).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("TILLCAST_TEST_TOOLS")
        .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("tillcast-tests")))
        .or_else(|| set("HOME").map(|d| d.join(".cache/tillcast-tests")))
        .expect("neither TILLCAST_TEST_TOOLS nor HOME is set")
}

/// The repository's root.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A temporary directory that other users may pass through (PostgreSQL and MariaDB drop root).
pub fn temp_dir(name: &str) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::Builder::new().prefix(&format!("tillcast-{name}-")).tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

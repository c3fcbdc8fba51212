//! The product's three binaries: run to the end, or kept running.

use crate::process::{self, Process};
use crate::{PATIENCE, http};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// One of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// `hq-publisher`.
    Hq,
    /// `store-relay`.
    Relay,
    /// `pos-agent`.
    Agent,
}

impl Product {
    /// The binary's name.
    pub fn name(self) -> &'static str {
        match self {
            Product::Hq => "hq-publisher",
            Product::Relay => "store-relay",
            Product::Agent => "pos-agent",
        }
    }

    /// The binary in the target directory that this test was built into.
    #[track_caller]
    pub fn path(self) -> PathBuf {
        // …/target/debug/deps/TEST → …/target/debug
        let test = std::env::current_exe().unwrap();
        let found = test.ancestors().skip(1).take(3).map(|dir| dir.join(self.name())).find(|p| p.is_file());
        found.unwrap_or_else(|| panic!("{} is not built: run cargo build --workspace first", self.name()))
    }

    /// Runs a command to its end (at most two minutes), in `dir`.
    #[track_caller]
    pub fn run(self, dir: &Path, args: &[&str]) -> Output {
        self.run_env(dir, args, &[])
    }

    /// As [`Product::run`], with environment variables.
    #[track_caller]
    pub fn run_env(self, dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Output {
        self.spawn_command(dir, args, env).finish(Duration::from_secs(120))
    }

    /// Starts a command and lets it run: to race two, or to kill one midway.
    #[track_caller]
    pub fn spawn_command(self, dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Running {
        let capture = tempfile::tempdir().unwrap();
        let (stdout, stderr) = (capture.path().join("stdout"), capture.path().join("stderr"));
        let mut command = process::powerless(Path::new("/bin/sh"), "KILL");
        // The shell becomes the binary: its outputs are taken apart, and kept in files that cannot fill up.
        command.args(["-c", "out=$1 err=$2; shift 2; exec \"$@\" >\"$out\" 2>\"$err\"", "sh"]);
        command.args([&stdout, &stderr]).arg(self.path()).args(args);
        set_up(&mut command, dir, env);
        let line = format!("{} {}", self.name(), args.join(" "));
        let process = Process::spawn(&line, command, &capture.path().join("sh.log"));
        Running { line, process, stdout, stderr, _capture: capture }
    }

    /// Starts a daemon (`args` names the command and `--config`); its output goes to `log`.
    #[track_caller]
    pub fn daemon(self, dir: &Path, args: &[&str], env: &[(&str, &str)], log: &Path) -> Daemon {
        let mut command = process::powerless(&self.path(), "KILL");
        command.args(args);
        set_up(&mut command, dir, env);
        Daemon { process: Process::spawn(self.name(), command, log) }
    }
}

/// The same surroundings for every command: nothing of the tester's own settings comes through.
fn set_up(command: &mut Command, dir: &Path, env: &[(&str, &str)]) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TILLCAST__") || name.to_string_lossy().starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
        command.env_remove(proxy);
    }
    command.env("NO_COLOR", "1").envs(env.iter().copied()).current_dir(dir);
}

/// A command that has not ended yet.
#[derive(Debug)]
pub struct Running {
    line: String,
    /// The process, to signal it.
    pub process: Process,
    stdout: PathBuf,
    stderr: PathBuf,
    _capture: tempfile::TempDir,
}

impl Running {
    /// Waits for the end; panics after the deadline.
    #[track_caller]
    pub fn finish(mut self, deadline: Duration) -> Output {
        let ended = crate::wait_for(deadline, || (!self.process.is_running()).then_some(()));
        let read = |p: &Path| String::from_utf8_lossy(&std::fs::read(p).unwrap_or_default()).into_owned();
        let (stdout, stderr) = (read(&self.stdout), read(&self.stderr));
        assert!(ended.is_some(), "`{}` does not end within {deadline:?}:\n{stdout}\n{stderr}", self.line);
        let status = self.process.wait(Duration::from_secs(1));
        Output { line: self.line, code: status.code(), stdout, stderr }
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }
}

/// What a command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command, for failure texts.
    pub line: String,
    /// The exit code; None when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Panics with both outputs unless the exit code is this one.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "`{}`\n--- stdout\n{}\n--- stderr\n{}", self.line, self.stdout, self.stderr);
        self
    }

    /// Panics unless the exit code is 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.code(0)
    }

    /// Standard output as one JSON value; panics if it is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| {
            panic!(
                "`{}` does not print JSON ({e})\n--- stdout\n{}\n--- stderr\n{}",
                self.line, self.stdout, self.stderr
            )
        })
    }

    /// Both outputs, to look for words in.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Panics unless each of these words is in one of the outputs.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        let text = self.text();
        for word in words {
            assert!(text.contains(word), "`{}` does not say {word:?}:\n{text}", self.line);
        }
        self
    }
}

/// A daemon of the product; killed on drop.
#[derive(Debug)]
pub struct Daemon {
    /// The process, to signal it or to read its log.
    pub process: Process,
}

impl Daemon {
    /// Waits until GET of `url` answers 200.
    #[track_caller]
    pub fn wait_http(&mut self, url: &str) {
        let what = format!("GET {url} does not answer 200");
        self.process.wait_until(PATIENCE, &what, || http::try_get(url).is_some_and(|r| r.status == 200));
    }

    /// Polls until the condition holds; panics with the log's end after [`PATIENCE`], or when the daemon ends.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, holds: impl FnMut() -> bool) {
        self.process.wait_until(PATIENCE, what, holds);
    }

    /// Kills it and its children at once (SIGKILL).
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// SIGTERM; panics unless it ends with 0 within thirty seconds.
    #[track_caller]
    pub fn term(mut self) {
        self.process.term(Duration::from_secs(30));
    }

    /// Peak resident memory so far, in KiB.
    pub fn peak_memory_kib(&self) -> u64 {
        self.kib("VmHWM:")
    }

    /// Its resident memory now, in KiB.
    pub fn memory_kib(&self) -> u64 {
        self.kib("VmRSS:")
    }

    fn kib(&self, what: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix(what));
        line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }
}

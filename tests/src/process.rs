//! Child processes that do not outlive the test: each is a process group, killed on drop, and dies with the
//! test program (also when that is killed, or leaves a server in a static).

use crate::wait_for;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::Duration;

/// The path of a program, also in the places that a user's PATH may leave out.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    find_program(name).unwrap_or_else(|| panic!("`{name}` is missing: run tests/run --setup once"))
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin"].map(PathBuf::from);
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).chain(usual).collect();
    // Debian keeps each PostgreSQL's own programs apart; the newest comes first.
    let mut postgres: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|dir| dir.flatten().map(|e| e.path().join("bin")).collect())
        .unwrap_or_default();
    postgres.sort_by_key(|p| std::cmp::Reverse(p.parent().and_then(|p| p.file_name()?.to_str()?.parse::<u32>().ok())));
    places.extend(postgres);
    places.iter().map(|dir| dir.join(name)).find(|p| p.is_file())
}

type Spawned = std::io::Result<Child>;
type Job = (Command, mpsc::Sender<Spawned>);

/// The kernel's death signal follows the *thread* that spawned: one thread spawns for all tests, and ends with the program.
static SPAWNER: LazyLock<Mutex<mpsc::Sender<Job>>> = LazyLock::new(|| {
    let (jobs, inbox) = mpsc::channel::<Job>();
    std::thread::Builder::new()
        .name("spawner".into())
        .spawn(move || inbox.into_iter().for_each(|(mut command, answer)| drop(answer.send(command.spawn()))))
        .unwrap();
    Mutex::new(jobs)
});

/// A command that drops root for that user (PostgreSQL and MariaDB refuse root), sends the child `death` when
/// the test program ends, and keeps no terminal.
pub fn command(program: &Path, user: Option<&str>, death: &str) -> Command {
    let mut c = Command::new(self::program("setpriv"));
    if let Some(user) = user.filter(|_| rustix::process::geteuid().is_root()) {
        c.args(["--reuid", user, "--regid", group_of(user), "--clear-groups"]);
    }
    c.args(["--pdeathsig", death, "--"]).arg(program).stdin(Stdio::null());
    c
}

/// As [`command`], but where the tester is root the program has none of root's powers: modes and owners of files
/// count for it as for any service.
pub fn powerless(program: &Path, death: &str) -> Command {
    let mut c = Command::new(self::program("setpriv"));
    if rustix::process::geteuid().is_root() {
        c.args(["--bounding-set", "-all", "--inh-caps", "-all"]);
    }
    c.args(["--pdeathsig", death, "--"]).arg(program).stdin(Stdio::null());
    c
}

/// Runs what is added to it where it may mount small disks: `unshare` with what this user needs; panics with the way
/// to mend it where neither works.
#[track_caller]
pub fn with_disks() -> Command {
    let ways = [&["-m", "--propagation", "private"][..], &["-Urm"][..]];
    let works = |args: &&&[&str]| {
        let mut probe = Command::new(program("unshare"));
        probe.args(**args).args(["mount", "-t", "tmpfs", "none", "/mnt"]);
        probe.output().is_ok_and(|o| o.status.success())
    };
    let args = ways.iter().find(works).unwrap_or_else(|| {
        panic!("this test mounts a small disk: run it as root (a container needs CAP_SYS_ADMIN), or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0)")
    });
    let mut command = Command::new(program("unshare"));
    command.args(*args);
    command
}

fn group_of(user: &str) -> &str {
    if user == "nobody" { "nogroup" } else { user }
}

/// Gives a path to that user, if the test runs as root.
pub fn give(path: &Path, user: &str) {
    if rustix::process::geteuid().is_root() {
        let status = Command::new("chown").arg(format!("{user}:{}", group_of(user))).arg(path).status().unwrap();
        assert!(status.success(), "chown {user} {}", path.display());
    }
}

/// Runs a helper program to its end; panics with its output unless it succeeds.
#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", out.status);
    stdout.into_owned()
}

/// The last `lines` lines of a file, for failure texts.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A running child with its group and its log.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// What the group gets on drop before SIGKILL; None: SIGKILL at once.
    gentle: Option<Signal>,
}

impl Process {
    /// Starts `command` (made by [`command`]); both its outputs are appended to `log`.
    #[track_caller]
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Process {
        let file = File::options().create(true).append(true).open(log).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file).process_group(0);
        let text = format!("{command:?}");
        let (answer, child) = mpsc::channel();
        SPAWNER.lock().unwrap().send((command, answer)).unwrap();
        let child = child.recv().unwrap().unwrap_or_else(|e| panic!("{name} does not start: {e}: {text}"));
        Process { name: name.into(), child, log: log.into(), gentle: None }
    }

    /// On drop, sends this first and waits up to 10 s (PostgreSQL leaves shared memory behind if killed).
    #[must_use]
    pub fn gentle(mut self, signal: Signal) -> Self {
        self.gentle = Some(signal);
        self
    }

    /// The process id, which is also its group's.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds what it printed.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// All that it printed.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Polls until the condition holds; panics with the log's end when the deadline passes or the process ends.
    #[track_caller]
    pub fn wait_until(&mut self, deadline: Duration, what: &str, mut holds: impl FnMut() -> bool) {
        let mut ended = None;
        let held = wait_for(deadline, || {
            if holds() {
                return Some(true);
            }
            ended = self.child.try_wait().unwrap();
            ended.map(|_| false)
        });
        if held != Some(true) {
            let why = ended.map_or(format!("not within {deadline:?}"), |s| format!("it ended by itself ({s})"));
            panic!("{}: {what}: {why}; its log ends:\n{}", self.name, tail(&self.log, 40));
        }
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        // An error means that it has ended already.
        let _ = kill_process(self.as_pid(), signal);
    }

    /// Stops it in its tracks, as a hung machine would be (SIGSTOP).
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on after [`Process::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills the whole group at once, as a power cut would (SIGKILL).
    pub fn kill9(&mut self) {
        let _ = kill_process_group(self.as_pid(), Signal::KILL);
        let _ = self.child.wait();
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        match wait_for(deadline, || self.child.try_wait().unwrap()) {
            Some(status) => status,
            None => panic!("{} does not end within {deadline:?}; its log ends:\n{}", self.name, tail(&self.log, 40)),
        }
    }

    /// SIGTERM, then waits; panics unless it ends by itself with exit code 0.
    #[track_caller]
    pub fn term(&mut self, deadline: Duration) {
        self.signal(Signal::TERM);
        let status = self.wait(deadline);
        let text = status.signal().map_or(format!("{status}"), |s| format!("killed by signal {s}"));
        assert!(status.success(), "{} ends with {text} on SIGTERM; its log ends:\n{}", self.name, tail(&self.log, 40));
    }

    fn as_pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(signal) = self.gentle
            && self.is_running()
        {
            self.signal(signal);
            wait_for(Duration::from_secs(10), || self.child.try_wait().ok().flatten());
        }
        self.kill9();
    }
}

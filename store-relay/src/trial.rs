//! Running packs on the shadow with the registers' own code, in a child process with limits, so that a
//! pack that crashes, eats memory or never ends takes nothing down but its own try.
//!
//! The child is this binary as `store-relay trial`: a job as one line of JSON on stdin; on stdout a line for each pack
//! that it begins, and one for its end. Only the child writes packs into the shadow. If the power goes, or the parent dies (the
//! kernel then kills the child), SQLite rolls back: the shadow is at the version before or after.

use proto::clock::Timestamp;
use proto::digest::StateDigest;
use proto::failpoint;
use proto::ids::{Instance, StreamName, TableName};
use proto::layout::PackName;
use proto::limits::Limits;
use proto::manifest::{Listed, PackEntry};
use proto::replica::sqlite::{self, SqliteError};
use proto::replica::{ApplyError, Job, PackFile, Replica, TableCheck, VerifyError};
use proto::retry::Verdict;
use proto::shelf;
use rustix::process::{Resource, Rlimit, Signal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Bytes of a job, or of all that is said of it: a chain of some hundred packs.
const MAX_LINE: u64 = 8 << 20;

/// The state digests of a stream's tables.
pub type Digests = BTreeMap<TableName, StateDigest>;

/// What a trial is to prove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aim {
    /// Bring the shadow to the end of the chain.
    Advance,
    /// Run the chain in a scratch database; it must end in these digests, which the shadow has.
    Scratch {
        /// The scratch file; made anew.
        file: PathBuf,
        /// The digests at the end.
        digests: Digests,
    },
}

/// A chain of packs to try.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trial {
    /// The process that must live as long as the trial.
    pub parent: i32,
    /// The shadow.
    pub shadow: PathBuf,
    /// What to prove.
    pub aim: Aim,
    /// Bytes of private memory.
    pub memory: u64,
    /// Bounds on packs.
    pub limits: Limits,
    /// The stream@audience.
    pub instance: Instance,
    /// The manifest's epoch.
    pub epoch: u64,
    /// This machine's clock.
    pub now: Timestamp,
    /// What the manifest lists.
    pub listed: Listed,
    /// The packs in order, and where each lies.
    pub packs: Vec<(PathBuf, PackEntry)>,
}

/// How a trial ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "lowercase")]
pub enum TrialEnd {
    /// All packs are proved.
    Done,
    /// A pack is bad; what came before it in the chain stands.
    Refused {
        /// Which; the first that is not held, if unsaid.
        pack: Option<PackName>,
        /// A stable name of the reason.
        code: String,
        /// The reason, for people.
        text: String,
    },
    /// A table is another stream's, which is to lose it first: the same again later.
    Waits {
        /// Which table, and whose.
        text: String,
    },
    /// A pack's file is not (any more) what was verified when it came: the disk's fault.
    Rotten {
        /// Which.
        pack: Option<PackName>,
        /// What was found.
        text: String,
    },
    /// The shadow's own rows are not those of its version.
    Drifted {
        /// Which tables.
        text: String,
    },
    /// Disk full, busy, too many files: the same again later.
    Surroundings {
        /// A stable name of the reason.
        code: String,
        /// The reason, for people.
        text: String,
        /// Whether room would help.
        disk_full: bool,
    },
    /// The shadow's file is damaged: it must be made anew.
    Unsound {
        /// What SQLite said.
        text: String,
    },
    /// A sync failed: nothing may be written any more.
    Halted {
        /// What failed.
        text: String,
    },
    /// The child's own death.
    Died {
        /// The pack that it had begun last, if any: others of its transaction leave no other trace.
        pack: Option<PackName>,
        /// A signal, an exit code, the time limit.
        how: String,
    },
    /// It was told to stop by us, or with us.
    Stopped,
}

impl TrialEnd {
    fn of_sqlite(e: &SqliteError) -> TrialEnd {
        let text = e.to_string();
        match e.verdict() {
            Verdict::Rebuild => TrialEnd::Unsound { text },
            Verdict::Halt => TrialEnd::Halted { text },
            Verdict::Quarantine => TrialEnd::Refused { pack: None, code: "SQLITE".into(), text },
            // Out of memory in a process whose memory is bounded: the pack's doing.
            Verdict::Retry if e.inner().sqlite_error_code() == Some(rusqlite::ErrorCode::OutOfMemory) => {
                TrialEnd::Died { pack: None, how: format!("out of memory (trial.memory): {text}") }
            }
            Verdict::Retry => TrialEnd::Surroundings { code: "SQLITE".into(), text, disk_full: e.is_disk_full() },
        }
    }
}

/// What the child says, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Said {
    /// It begins a pack.
    Begins { begins: PackName },
    /// How the trial ended.
    Ended(TrialEnd),
}

fn say(said: &Said) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(said).unwrap_or_default();
    line.push(b'\n');
    std::io::stdout().write_all(&line)
}

/// The command `store-relay trial`.
pub fn child_main() -> ExitCode {
    proto::cli::arm_failpoint();
    let mut line = String::new();
    let read = std::io::stdin().lock().take(MAX_LINE).read_line(&mut line);
    let trial: Trial = match read.map_err(serde_json::Error::io).and_then(|_| serde_json::from_str(&line)) {
        Ok(t) => t,
        Err(e) => {
            eprintln!("store-relay trial: no job on stdin ({e}); this command is the relay's own");
            return ExitCode::from(2);
        }
    };
    if let Err(e) = bind_to_parent(trial.parent).and_then(|()| bound_memory(trial.memory)) {
        eprintln!("store-relay trial: {e}");
        return ExitCode::from(1);
    }
    // Nobody reads what a relay that is gone was to hear.
    let end = run_and_tell(&trial, &mut |pack| drop(say(&Said::Begins { begins: pack.clone() })));
    match say(&Said::Ended(end)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(1),
    }
}

/// The kernel kills this process when its parent dies, so that no orphan writes the shadow.
fn bind_to_parent(parent: i32) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died just before.
    let now = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get());
    if now == parent { Ok(()) } else { Err(std::io::Error::other("the relay that started this trial is gone")) }
}

fn bound_memory(bytes: u64) -> std::io::Result<()> {
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    Ok(rustix::process::setrlimit(Resource::Data, limit)?)
}

/// Tries the packs; in the child, and in tests of other rooms.
pub fn run(trial: &Trial) -> TrialEnd {
    run_and_tell(trial, &mut |_| {})
}

/// The same; `tell` hears of each pack as it is begun.
pub fn run_and_tell(trial: &Trial, tell: &mut dyn FnMut(&PackName)) -> TrialEnd {
    let files: Vec<PackFile<'_>> = trial.packs.iter().map(|(path, entry)| PackFile { path, entry }).collect();
    match &trial.aim {
        Aim::Advance => advance(trial, &files, tell),
        Aim::Scratch { file, digests } => {
            let end = scratch(trial, &files, (file, digests), tell);
            failpoint::step("trial.scratch-gone", || remove_database(file)).err().map_or(end, |e| {
                TrialEnd::Surroundings { code: "SCRATCH".into(), text: e.to_string(), disk_full: false }
            })
        }
    }
}

fn advance(trial: &Trial, files: &[PackFile<'_>], tell: &mut dyn FnMut(&PackName)) -> TrialEnd {
    let mut shadow = match Replica::open(&trial.shadow, &trial.limits) {
        Ok(s) => s,
        Err(e) => return TrialEnd::of_sqlite(&e),
    };
    let job = Job { listed: Some(&trial.listed), ..job(trial, files, true) };
    failpoint::step("trial.apply", || apply(trial, &mut shadow, &job, tell)).err().unwrap_or(TrialEnd::Done)
}

/// Applies, and tells of each pack first; the error says whose fault it was.
fn apply(trial: &Trial, replica: &mut Replica, job: &Job<'_>, tell: &mut dyn FnMut(&PackName)) -> Result<(), TrialEnd> {
    let mut begun = None;
    let applied = replica.apply_and_tell(job, &mut |pack| tell(begun.insert(pack.name(&trial.instance))));
    applied.map(drop).map_err(|e| whose_fault(trial, replica, &e, begun.as_ref()))
}

fn job<'a>(trial: &'a Trial, packs: &'a [PackFile<'a>], prove: bool) -> Job<'a> {
    Job { instance: &trial.instance, epoch: trial.epoch, packs, now: trial.now, prove, listed: None }
}

/// A failure may be the pack's, the file's, the shadow's or the machine's.
fn whose_fault(trial: &Trial, shadow: &Replica, error: &ApplyError, begun: Option<&PackName>) -> TrialEnd {
    let from_delta = trial.packs.first().is_some_and(|(_, e)| e.base.is_some());
    // A table or column that is gone reads as a failure of the statement.
    let is_misfit = matches!(error, ApplyError::Sqlite(e) if sqlite::is_misfit(e.inner()));
    if let ApplyError::Sqlite(e) = error
        && e.verdict() != Verdict::Quarantine
        && !(is_misfit && from_delta)
    {
        return TrialEnd::of_sqlite(e);
    }
    let text = error.to_string();
    if error.waits() {
        return TrialEnd::Waits { text };
    }
    // The stream was let go after the plan was made, which says nothing of the pack: the next plan begins with a full.
    if matches!(error, ApplyError::WrongBase { .. })
        && from_delta
        && matches!(shadow.held(&trial.instance.stream), Ok(None))
    {
        return TrialEnd::Waits { text };
    }
    // 1. The file: what lies on the disk may have rotted since it was verified, or be there no more.
    let guilty = guilty_pack(trial, shadow, error, begun);
    if let Some((path, entry)) = &guilty {
        match crate::shelves::hash_if_readable(path) {
            Ok(hash) if hash == Some(entry.sha256) => {}
            Ok(_) => {
                let pack = Some(entry.name(&trial.instance));
                let text = format!("{} is not the file that was verified ({text})", path.display());
                return TrialEnd::Rotten { pack, text };
            }
            Err(_) => return TrialEnd::Surroundings { code: error.code().into(), text, disk_full: false },
        }
    }
    // 2. The shadow: a strict failure of a delta asks first whether the base is what it should be. Of a chain that begins
    // with a full the rows that are here are no part.
    let may_be_drift = error.may_be_drift() || is_misfit || matches!(error, ApplyError::Schema { .. });
    if may_be_drift && from_delta {
        match shadow.verify(&trial.instance.stream) {
            Ok(checks) => {
                if let Some(drift) = drift_text(&trial.instance.stream, &checks) {
                    return TrialEnd::Drifted { text: drift };
                }
            }
            Err(VerifyError::Sqlite(e)) => return TrialEnd::of_sqlite(&e),
            // The rows cannot be asked: the pack stays the suspect, until it is judged by other limits or another build.
            Err(VerifyError::Contract { .. }) => {}
        }
    }
    if error.verdict() == Verdict::Retry {
        return TrialEnd::Surroundings { code: error.code().into(), text, disk_full: false };
    }
    // 3. The pack.
    let pack = guilty.map(|(_, e)| e.name(&trial.instance));
    TrialEnd::Refused { pack, code: error.code().into(), text }
}

/// The tables whose rows are not those of the version; none if all are right.
pub fn drift_text(stream: &StreamName, checks: &[TableCheck]) -> Option<String> {
    let wrong: Vec<String> = checks
        .iter()
        .filter(|c| !c.is_right())
        .map(|c| {
            let found = c.found.map_or("it cannot be read".into(), |f| format!("its rows give {f}"));
            format!("table {} should have digest {}, {found}", c.table, c.stored)
        })
        .collect();
    (!wrong.is_empty()).then(|| format!("stream {stream}: {}", wrong.join("; ")))
}

/// The pack that an error names, or the one that was begun last; else the first whose version is not held.
fn guilty_pack(
    trial: &Trial,
    shadow: &Replica,
    error: &ApplyError,
    begun: Option<&PackName>,
) -> Option<(PathBuf, PackEntry)> {
    let named = match error {
        ApplyError::Pack { pack, .. }
        | ApplyError::Row { pack, .. }
        | ApplyError::Digest { pack, .. }
        | ApplyError::WrongBase { pack, .. }
        | ApplyError::Schema { pack, .. }
        | ApplyError::Elsewhere { pack, .. }
        | ApplyError::ForeignKey { pack, .. } => Some(pack.clone()),
        ApplyError::Sqlite(_) => begun.map(ToString::to_string),
    };
    if let Some(name) = named {
        return trial.packs.iter().find(|(_, e)| e.name(&trial.instance).to_string() == name).cloned();
    }
    let held = shadow.held(&trial.instance.stream).ok().flatten();
    let version = held.and_then(|h| h.version_of(&trial.instance, trial.epoch));
    trial.packs.iter().find(|(_, e)| version.is_none_or(|v| e.version > v)).cloned()
}

/// Proves packs at or below the shadow's version: run from nothing, they must end in its digests.
fn scratch(
    trial: &Trial,
    files: &[PackFile<'_>],
    (path, digests): (&Path, &Digests),
    tell: &mut dyn FnMut(&PackName),
) -> TrialEnd {
    if let Err(e) = remove_database(path) {
        return TrialEnd::Surroundings { code: "SCRATCH".into(), text: e.to_string(), disk_full: e.is_disk_full() };
    }
    let mut scratch = match Replica::open(path, &trial.limits) {
        Ok(s) => s,
        Err(e) => return TrialEnd::of_sqlite(&e),
    };
    let job = job(trial, files, false);
    if let Err(end) = failpoint::step("trial.scratch", || apply(trial, &mut scratch, &job, tell)) {
        return end;
    }
    let proved = || -> Result<bool, SqliteError> {
        let held = scratch.held(&trial.instance.stream)?;
        if held.is_none_or(|h| &h.digests != digests) {
            return Ok(false);
        }
        let shadow = Replica::open(&trial.shadow, &trial.limits)?;
        for (_, e) in &trial.packs {
            let proof = (e.version, e.kind, e.sha256);
            failpoint::step("trial.proof", || shadow.add_proof(&trial.instance, proof, trial.now))?;
        }
        Ok(true)
    };
    match proved() {
        Ok(true) => TrialEnd::Done,
        Ok(false) => TrialEnd::Refused {
            pack: trial.packs.first().map(|(_, e)| e.name(&trial.instance)),
            code: "DIGEST".into(),
            text: "the chain from this full does not end in the rows that the deltas gave".into(),
        },
        Err(e) => TrialEnd::of_sqlite(&e),
    }
}

/// Deletes a database with its WAL; none is fine.
pub fn remove_database(path: &Path) -> Result<(), shelf::ShelfError> {
    for suffix in ["-wal", "-shm", "-journal", ""] {
        let mut file = path.as_os_str().to_owned();
        file.push(suffix);
        shelf::remove(Path::new(&file))?;
    }
    Ok(())
}

/// Who runs trials.
#[derive(Debug, Clone)]
pub enum Runner {
    /// A child process of this binary.
    Child(PathBuf),
    /// This process, without limits; tests of other rooms and the simulation.
    Here,
}

impl Runner {
    /// This binary as the child: the very file that runs, even when a newer one has taken its name.
    pub fn this_binary() -> Runner {
        Runner::Child("/proc/self/exe".into())
    }

    /// Runs a trial to its end, at most so long, or until told to stop.
    pub async fn run(&self, trial: Trial, time: Duration, stop: &CancellationToken) -> TrialEnd {
        let program = match self {
            Runner::Child(program) => program.clone(),
            Runner::Here => {
                return tokio::task::spawn_blocking(move || run(&trial))
                    .await
                    .unwrap_or_else(|e| TrialEnd::Died { pack: None, how: e.to_string() });
            }
        };
        let child = Running::default();
        let killer = Killer(Arc::clone(&child));
        // The thread that starts the child must outlive it: the death signal is bound to it.
        let mut running = tokio::task::spawn_blocking(move || run_child(&program, &trial, &child));
        let ended = |r: Result<TrialEnd, tokio::task::JoinError>| {
            r.unwrap_or_else(|e| TrialEnd::Surroundings { code: "TRIAL".into(), text: e.to_string(), disk_full: false })
        };
        tokio::select! {
            end = &mut running => match ended(end) {
                TrialEnd::Stopped => by_whom(stop).await,
                end => end,
            },
            () = stop.cancelled() => {
                killer.kill();
                let _ = running.await;
                TrialEnd::Stopped
            }
            () = tokio::time::sleep(time) => {
                killer.kill();
                match ended(running.await) {
                    TrialEnd::Died { pack, .. } => {
                        let how = format!("it took longer than it was given ({time:?}, see trial.time)");
                        TrialEnd::Died { pack, how }
                    }
                    end => end,
                }
            }
        }
    }
}

/// How long an order to stop may reach us after the child.
const GRACE: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(2) };

/// The child was told to stop: with us, or alone, which would come again and again unseen.
async fn by_whom(stop: &CancellationToken) -> TrialEnd {
    tokio::select! {
        biased;
        () = stop.cancelled() => TrialEnd::Stopped,
        () = tokio::time::sleep(GRACE) => {
            let text = "the process that tried it was told to stop (SIGTERM, SIGINT or SIGHUP), and not by this relay";
            TrialEnd::Surroundings { code: "TRIAL".into(), text: text.into(), disk_full: false }
        }
    }
}

/// The child while it runs, and whether it is to die (perhaps before it was born).
#[derive(Default)]
struct Life {
    child: Option<Child>,
    doomed: bool,
}
type Running = Arc<Mutex<Life>>;

/// Kills the child when told, or when whoever waits for it is dropped.
struct Killer(Running);

impl Killer {
    fn kill(&self) {
        // Locked by the waiter only for a moment, or when the child has closed its stdout: it is ending.
        let mut life = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        life.doomed = true;
        let _ = life.child.as_mut().map(Child::kill);
    }
}
impl Drop for Killer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn run_child(program: &Path, trial: &Trial, running: &Running) -> TrialEnd {
    let failed = |e: std::io::Error| TrialEnd::Surroundings {
        code: "TRIAL".into(),
        text: format!("cannot run {} trial: {e}", program.display()),
        disk_full: shelf::is_disk_full(&e),
    };
    let mut line = serde_json::to_vec(trial).unwrap_or_default();
    line.push(b'\n');
    let spawned =
        Command::new(program).arg0("store-relay").arg("trial").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let (stdin, stdout) = match spawned {
        Ok(mut child) => {
            let pipes = (child.stdin.take(), child.stdout.take());
            let mut life = running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if life.doomed {
                let _ = child.kill();
            }
            life.child = Some(child);
            pipes
        }
        Err(e) => return failed(e),
    };
    // A child that died before it read its job is told by its exit.
    let _ = stdin.map(|mut s| s.write_all(&line));
    let mut answer = String::new();
    let _ = stdout.map(|s| s.take(MAX_LINE).read_to_string(&mut answer));
    let mut life = running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let status = match life.child.as_mut().map(Child::wait) {
        Some(Ok(status)) => status,
        Some(Err(e)) => return failed(e),
        None => return failed(std::io::Error::other("no child")),
    };
    let (mut begun, mut ended) = (None, None);
    for said in answer.lines().filter_map(|line| serde_json::from_str(line).ok()) {
        match said {
            Said::Begins { begins } => begun = Some(begins),
            Said::Ended(end) => ended = Some(end),
        }
    }
    let end = match ended {
        _ if !status.success() => of_death(status),
        Some(end) => end,
        None => TrialEnd::Died { pack: None, how: "no answer".into() },
    };
    match end {
        TrialEnd::Died { pack: None, how } => TrialEnd::Died { pack: begun, how },
        end => end,
    }
}

/// An order to stop is given to all processes of a service, or of a terminal, and may reach the child before us.
fn of_death(status: ExitStatus) -> TrialEnd {
    let orders = [Signal::TERM, Signal::INT, Signal::HUP];
    if orders.iter().any(|order| status.signal() == Some(order.as_raw())) {
        return TrialEnd::Stopped;
    }
    TrialEnd::Died { pack: None, how: status.to_string() }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    fn trial(dir: &Path) -> Trial {
        Trial {
            listed: Listed::new(),
            parent: std::process::id() as i32,
            shadow: dir.join("shadow.db"),
            aim: Aim::Advance,
            memory: 256 << 20,
            limits: Limits::default(),
            instance: "price@all".parse().unwrap(),
            epoch: 1,
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            packs: Vec::new(),
        }
    }

    async fn with_script(script: &str, time: Duration, stop: &CancellationToken) -> TrialEnd {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("child");
        tillcast_tests::files::script(&program, script);
        Runner::Child(program).run(trial(dir.path()), time, stop).await
    }

    #[tokio::test]
    async fn a_childs_own_death_is_told_from_being_stopped() {
        let (stop, long) = (CancellationToken::new(), Duration::from_secs(60));
        let died = |end: TrialEnd| match end {
            TrialEnd::Died { pack: None, how } => how,
            other => panic!("{other:?}"),
        };
        assert!(died(with_script("kill -9 $$", long, &stop).await).contains("signal: 9"));
        assert!(died(with_script("exit 3", long, &stop).await).contains("exit status: 3"));
        assert!(died(with_script("echo nonsense", long, &stop).await).contains("no answer"));
        let short = Duration::from_millis(50);
        assert!(died(with_script("exec sleep 60", short, &stop).await).contains("trial.time"));
        let end = with_script("read job; echo '{\"end\":\"done\"}'", long, &stop).await;
        assert_eq!(end, TrialEnd::Done);
        let begins: PackName = "price@all/0000000001.full.pack".parse().unwrap();
        let echo = |said| format!("echo '{}'", serde_json::to_string(&said).unwrap());
        let (begun, done) = (echo(Said::Begins { begins: begins.clone() }), echo(Said::Ended(TrialEnd::Done)));
        let end = with_script(&format!("{begun}; kill -9 $$"), long, &stop).await;
        assert!(matches!(&end, TrialEnd::Died { pack: Some(pack), .. } if *pack == begins), "{end:?}");
        assert_eq!(with_script(&format!("read job; {begun}; {done}"), long, &stop).await, TrialEnd::Done);
        // Stopped by others: the relay's turn may never come, or be yet to come.
        let end = with_script("kill -TERM $$", long, &stop).await;
        assert!(matches!(&end, TrialEnd::Surroundings { text, .. } if text.contains("not by this relay")), "{end:?}");
        let soon = CancellationToken::new();
        let (end, ()) = tokio::join!(by_whom(&soon), async { soon.cancel() });
        assert_eq!(end, TrialEnd::Stopped);
        for (signal, is_order) in [(1, true), (2, true), (6, false), (9, false), (11, false), (15, true)] {
            assert_eq!(of_death(ExitStatus::from_raw(signal)) == TrialEnd::Stopped, is_order, "{signal}");
        }
        stop.cancel();
        assert_eq!(with_script("exec sleep 60", long, &stop).await, TrialEnd::Stopped);
    }

    #[test]
    fn a_damaged_shadow_is_unsound_and_a_pack_that_is_lost_is_fetched_anew() {
        let dir = tempfile::tempdir().unwrap();
        let mut t = trial(dir.path());
        assert_eq!(run(&t), TrialEnd::Done);
        let entry = PackEntry {
            version: proto::ids::Version::FIRST,
            kind: proto::layout::PackKind::Full,
            base: None,
            bytes: 3,
            unpacked: 3,
            sha256: proto::digest::Sha256::of(b"abc"),
        };
        t.packs = vec![(dir.path().join("none.pack"), entry.clone())];
        assert!(matches!(run(&t), TrialEnd::Rotten { pack: Some(_), .. }), "{:?}", run(&t));
        std::fs::write(&t.packs[0].0, b"abd").unwrap();
        assert!(matches!(run(&t), TrialEnd::Rotten { .. }), "{:?}", run(&t));
        std::fs::write(&t.packs[0].0, b"abc").unwrap();
        assert!(matches!(run(&t), TrialEnd::Refused { .. }), "{:?}", run(&t));
        std::fs::write(&t.shadow, b"this is no database, but long enough to be read as one").unwrap();
        for suffix in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(dir.path().join(format!("shadow.db{suffix}")));
        }
        assert!(matches!(run(&t), TrialEnd::Unsound { .. }), "{:?}", run(&t));
    }
}

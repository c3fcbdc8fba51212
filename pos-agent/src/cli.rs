//! The command line: each command opens what it needs, and asks the running agent where one runs.

use crate::agent::{Agent, OpenError};
use crate::config::Config;
use crate::local_api::OnceAnswer;
use crate::{doctor, memory, report, run, status, upstream, verify};
use anyhow::Context as _;
use clap::{CommandFactory, Parser, Subcommand};
use proto::cli::{self, Common, Exit};
use proto::clock::{self, Clock, SystemClock};
use proto::config::{ConfigError, HumanDuration, environment};
use proto::device::Device;
use proto::fetch::{FetchErrorKind, Polled, Source, SourceOptions};
use proto::follow;
use proto::shelf;
use proto::trust::EnrolCode;
use proto::wire::Status;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// Brings a register's SQLite database up to date and reports.
#[derive(Debug, Parser)]
#[command(name = "pos-agent", version, about)]
struct Args {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take the identity that `hq-publisher enroll REGISTER` printed.
    Enroll {
        /// The code, or - to read it from standard input: it is a secret, and others see what a command is called with.
        code: String,
    },
    /// Follow headquarters until SIGTERM.
    Run,
    /// One cycle and one heartbeat, here or by the running agent, then exit: 3 when some streams could not go on.
    Once,
    /// Versions, network, faults; of the running agent, or from the files.
    Status,
    /// Recompute all digests from the rows; exits 1 on drift, or where the file is gone, which the next cycle heals.
    Verify,
    /// Check the settings; touches nothing.
    CheckConfig,
    /// Try what the agent needs, with remedies.
    Doctor,
    /// Write a shell's completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man page.
    Man,
}

/// The command; its exit code.
pub fn main() -> ExitCode {
    let args = Args::parse();
    cli::start(&args.common);
    match dispatch(&args) {
        Ok(exit) => exit.into(),
        Err(e) => {
            cli::failed(args.common.json, cli::with_causes(e.as_ref()), code_of(&e));
            exit_of(&e).into()
        }
    }
}

/// Mistakes of usage and set-up are 2, everything else 1.
pub(crate) fn exit_of(e: &anyhow::Error) -> Exit {
    let set_up = e.downcast_ref::<OpenError>().is_some_and(OpenError::is_set_up);
    if set_up || e.is::<ConfigError>() || e.is::<BadCode>() { Exit::Usage } else { Exit::Failed }
}

/// What went wrong, for programs: a name that stays when the text is bettered.
pub(crate) fn code_of(e: &anyhow::Error) -> &'static str {
    match e.downcast_ref::<OpenError>() {
        Some(OpenError::Device(e)) => e.code(),
        Some(OpenError::Lock(e)) => e.code(),
        Some(OpenError::Source(_)) => "CONFIG",
        Some(e) if e.is_disk_full() => "DISK_FULL",
        Some(_) => "MACHINE",
        None if e.is::<ConfigError>() => "CONFIG",
        None if e.is::<BadCode>() => "BAD_CODE",
        None => e.downcast_ref().map_or("FAILED", shelf::LockError::code),
    }
}

/// An enrolment code that cannot be used here.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadCode(String);

fn dispatch(args: &Args) -> anyhow::Result<Exit> {
    match &args.command {
        Command::Completions { shell } => cli::completions(Args::command(), *shell),
        Command::Man => cli::man(Args::command()),
        command => {
            let config = Config::load(args.common.config.as_deref(), environment())?;
            let file = config.file.as_ref().map_or("the environment".into(), |f| f.display().to_string());
            return with_config(command, config.value, &file, args.common.json);
        }
    }
    Ok(Exit::Done)
}

fn with_config(command: &Command, config: Config, file: &str, json: bool) -> anyhow::Result<Exit> {
    let clock = Arc::new(SystemClock::default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("starting the async runtime")?;
    let exit = match command {
        Command::Enroll { code } => enroll(&config, code, &*clock, json),
        Command::Run => runtime.block_on(serve(config, clock)),
        Command::Once => runtime.block_on(once(config, clock, json)),
        Command::Status => runtime.block_on(show_status(&config, &*clock, json)),
        Command::Verify => runtime.block_on(verify_rows(&config, &*clock, json)),
        Command::CheckConfig => runtime.block_on(async { check_config(&config, file, clock, json) }),
        Command::Doctor => runtime.block_on(examine(&config, &*clock, json)),
        Command::Completions { .. } | Command::Man => Ok(Exit::Done),
    };
    // A transaction that is running may end: it is whole or nothing anyway.
    runtime.shutdown_timeout(Duration::from_secs(10));
    exit
}

pub(crate) fn enroll(config: &Config, code: &str, clock: &dyn Clock, json: bool) -> anyhow::Result<Exit> {
    let code = cli::secret(code)?;
    let code = EnrolCode::from_text(&code, clock.now()).map_err(|e| BadCode(e.to_string()))?;
    if code.id != config.device() {
        return Err(BadCode(format!("the code is for {}, these settings are for {}", code.id, config.register)).into());
    }
    shelf::create_dir(&config.data_dir)?;
    let _lock = shelf::LockFile::acquire(&config.data_dir)?;
    Device::enrol(&config.data_dir, &code).map_err(OpenError::from)?;
    if json {
        cli::print_json(&serde_json::json!({ "id": code.id, "data_dir": config.data_dir }));
    } else {
        cli::print_line(format!("{} is enrolled in {}", code.id, config.data_dir.display()));
    }
    Ok(Exit::Done)
}

async fn serve(config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<Exit> {
    let mut shutdown = Box::pin(cli::shutdown_signal());
    let (agent, listener) = tokio::select! {
        begun = begin(config, clock) => begun?,
        () = &mut shutdown => return Ok(Exit::Done),
    };
    tracing::info!(register = %agent.config.register, data = %agent.config.data_dir.display(), api = %agent.config.local_listen, "running");
    let agent = Arc::new(agent);
    follow::lock(&agent.device).note_start(agent.clock.now(), &clock::boot_id());
    run::run(Arc::clone(&agent), listener, shutdown).await;
    follow::lock(&agent.device).note_end();
    Ok(Exit::Done)
}

/// The agent, and after it its API: a POS application that holds the database and asks for a hold would wait for an answer
/// that waits for it.
pub(crate) async fn begin(config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<(Agent, TcpListener)> {
    let agent = open_patiently(config, clock).await?;
    let address = agent.config.local_listen;
    let listener = proto::http::listen(address, &agent.config.http)
        .with_context(|| format!("local_listen = \"{address}\" cannot be used: is another agent running?"))?;
    Ok((agent, listener))
}

/// A command that looks in for a moment must not keep the service from starting, and a program that holds the database only
/// until it ends.
async fn open_patiently(config: Config, clock: Arc<dyn Clock>) -> Result<Agent, OpenError> {
    let (mut tries, mut is_told) = (20, false);
    loop {
        match Agent::open(config.clone(), clock.clone(), None) {
            Err(OpenError::Lock(_)) if tries > 0 => tries -= 1,
            Err(e) if e.is_busy() => {
                if !is_told {
                    tracing::error!("waiting: {e}");
                    cli::notify_status(&format!("waiting: {e}"));
                    // It lives, however long that takes.
                    cli::notify_ready();
                    is_told = true;
                }
                cli::notify_watchdog();
            }
            opened => {
                if is_told && opened.is_ok() {
                    tracing::info!("the database is free again");
                    cli::notify_status("");
                }
                return opened;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

pub(crate) async fn once(config: Config, clock: Arc<dyn Clock>, json: bool) -> anyhow::Result<Exit> {
    let agent = match Agent::open(config.clone(), clock, None) {
        Err(OpenError::Lock(held)) => {
            // The agent that runs here does it.
            let Some((api, _)) = running(&config).await else { return Err(OpenError::Lock(held).into()) };
            let done: OnceAnswer = handed_over(&api, "v1/once").await?;
            print_status(&done.status, json);
            let exits = [Exit::Done, Exit::Usage, Exit::Partly];
            return Ok(exits.into_iter().find(|e| e.code() == done.exit).unwrap_or(Exit::Failed));
        }
        opened => opened?,
    };
    let exit = run::once(&agent).await;
    let status = report::stand(&agent, agent.memory.look(|f| f.open()));
    print_status(&status, json);
    Ok(exit)
}

/// Has the running agent do something that takes as long as it takes. While it does the same of itself, it is asked again.
async fn handed_over<T: DeserializeOwned>(api: &Source, path: &str) -> anyhow::Result<T> {
    let mut tries = u32::try_from(BUSY_FOR.as_millis() / BUSY_AGAIN.as_millis()).unwrap_or(u32::MAX);
    let bytes = loop {
        match api.post(path, "application/json", Vec::new().into(), 1 << 20).await {
            Err(e) if matches!(e.kind, FetchErrorKind::Status { code: 429, .. }) && tries > 0 => tries -= 1,
            answered => break answered?,
        }
        tokio::time::sleep(BUSY_AGAIN).await;
    };
    serde_json::from_slice(&bytes).context("the running agent's answer")
}

/// The longest wait for a running agent's answer: reading all rows, or a large download.
const ANSWER: Duration = Duration::from_secs(86_400);
/// How long a running agent may be at it by itself, and when it is asked again.
const BUSY_FOR: Duration = Duration::from_secs(3600);
const BUSY_AGAIN: Duration = Duration::from_millis(500);

fn print_status(status: &Status, json: bool) {
    if json { cli::print_json(status) } else { cli::print_line(status::text(status)) }
}

/// The running agent's API, if it is this register's.
async fn running(config: &Config) -> Option<(Source, Status)> {
    let mut address = config.local_listen;
    if address.ip().is_unspecified() {
        address = SocketAddr::from(([127, 0, 0, 1], address.port()));
    }
    let url = format!("http://{address}");
    let api = Source::parse(&url, &SourceOptions::default()).ok()?;
    let Ok(Polled::Body { bytes, .. }) = api.long_poll("v1/status", &[], 0, None).await else { return None };
    let status: Status = serde_json::from_slice(&bytes).ok()?;
    // It is there; what it is asked for may take long.
    let patient = SourceOptions { read_timeout: HumanDuration(ANSWER), ..SourceOptions::default() };
    let api = Source::parse(&url, &patient).ok()?;
    (status.id == config.device()).then_some((api, status))
}

async fn show_status(config: &Config, clock: &dyn Clock, json: bool) -> anyhow::Result<Exit> {
    let status = match running(config).await {
        Some((_, status)) => status,
        None => {
            if !json {
                cli::print_line(
                    "no agent is running here (or its API cannot be reached); from the files, and nobody was asked:",
                );
            }
            status::from_files(config, clock)?
        }
    };
    print_status(&status, json);
    Ok(Exit::Done)
}

pub(crate) async fn verify_rows(config: &Config, clock: &dyn Clock, json: bool) -> anyhow::Result<Exit> {
    let found = match running(config).await {
        Some((api, _)) => handed_over(&api, "v1/verify").await?,
        None => verify_files(config, clock)?,
    };
    if json {
        cli::print_json(&found)
    } else {
        cli::print_line(found.text())
    }
    Ok(match found.drift {
        true => Exit::Failed,
        false if found.unread().next().is_some() => Exit::Partly,
        false => Exit::Done,
    })
}

/// Without a running agent: reads the files, and latches what was found for the next cycle.
fn verify_files(config: &Config, clock: &dyn Clock) -> anyhow::Result<verify::Report> {
    // Whose rows are these? A directory that is not this register's is no register without streams.
    let mut device = Device::open(&config.data_dir, &config.device(), &config.limits).map_err(OpenError::from)?;
    if let Some(gone) = verify::gone(&config.store_db(), &device) {
        return Ok(gone);
    }
    let found = verify::check(&config.store_db(), &config.limits)?;
    let drifted: BTreeMap<_, _> = found.drifted();
    if !drifted.is_empty() {
        let _lock = shelf::LockFile::acquire(&config.data_dir).context("drift was found, but it cannot be latched")?;
        memory::latch_offline(&mut device, &drifted, clock.now())?;
    }
    Ok(found)
}

fn check_config(config: &Config, file: &str, clock: Arc<dyn Clock>, json: bool) -> anyhow::Result<Exit> {
    upstream::Upstream::new(config, clock, upstream::RelayWord::default()).map_err(OpenError::from)?;
    if json {
        cli::print_json(&config.shown());
    } else {
        cli::print_line(format!("{file}: ok, register {} of store {}", config.register, config.register.store()));
    }
    Ok(Exit::Done)
}

async fn examine(config: &Config, clock: &dyn Clock, json: bool) -> anyhow::Result<Exit> {
    let checks = doctor::examine(config, clock).await;
    if json {
        cli::print_json(&checks);
    } else {
        for c in &checks {
            cli::print_line(c);
        }
    }
    let failed = checks.iter().any(|c| c.mark == doctor::Mark::Fail);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

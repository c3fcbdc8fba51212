//! The command line. Orders go to the relay that runs on the data directory; where none runs, this process
//! opens the directory itself, under its lock.

use crate::config::{self, Config};
use crate::control::{self, Answer, Order};
use crate::doctor;
use crate::relay::{Relay, RelayError, Tools};
use crate::run;
use crate::steps::Steps;
use crate::trial::{self, Runner};
use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use proto::cli::{self, Common, Exit};
use proto::clock::{self, Clock, SystemClock};
use proto::config::{ConfigError, Loaded};
use proto::device::{Device, DeviceError};
use proto::follow;
use proto::ids::DeviceId;
use proto::layout::PackName;
use proto::shelf::{self, LockError, LockFile};
use proto::trust::EnrolCode;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinError;

/// Mirrors headquarters' packs into a store, tries them on a shadow database, serves them on the LAN.
#[derive(Debug, Parser)]
#[command(name = "store-relay", version)]
pub struct Line {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make this machine the relay of its store, by a code from `hq-publisher enroll STORE`.
    Enroll {
        /// The code, or - to read it from standard input: it is a secret, and others see what a command is called with.
        code: String,
    },
    /// Run the service.
    Run,
    /// One cycle: manifest, packs, trial; then end.
    Once,
    /// How the store stands.
    Status,
    /// Recompute the shadow's digests from its rows, hash the served packs, and look at the trust files.
    Verify,
    /// Take in hand-carried objects from a folder, and answer with a signed receipt.
    Import {
        /// The folder, e.g. a stick's.
        dir: PathBuf,
    },
    /// Fetch and try a pack in error/ again.
    Retry {
        /// E.g. price@zone-east/0000000057.delta.pack
        #[arg(value_parser = control::pack_name)]
        pack: PackName,
    },
    /// Read the settings, say what they come to.
    CheckConfig,
    /// Look for what would keep the relay from working.
    Doctor,
    /// Write a shell's completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man page.
    Man,
    /// The process that runs packs on the shadow; the relay starts it itself.
    #[command(hide = true)]
    Trial,
}

/// The whole program.
pub fn main() -> ExitCode {
    let line = Line::parse();
    match &line.verb {
        // Before logs, TLS and threads: it must start fast and stay small.
        Verb::Trial => return trial::child_main(),
        Verb::Completions { shell } => {
            cli::completions(Line::command(), *shell);
            return ExitCode::SUCCESS;
        }
        Verb::Man => {
            cli::man(Line::command());
            return ExitCode::SUCCESS;
        }
        _ => cli::start(&line.common),
    }
    let json = line.common.json;
    let loaded = match config::load(line.common.config.as_deref(), proto::config::environment()) {
        Ok(loaded) => loaded,
        Err(e) => {
            cli::failed(json, e, "CONFIG");
            return Exit::Usage.into();
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            cli::failed(json, e, "FAILED");
            return Exit::Failed.into();
        }
    };
    let done = runtime.block_on(perform(line, loaded));
    runtime.shutdown_timeout(Duration::from_secs(1));
    match done {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            cli::failed(json, cli::with_causes(e.as_ref()), code_of(&e));
            if is_set_up(&e) { Exit::Usage.into() } else { Exit::Failed.into() }
        }
    }
}

/// Whether settings, enrolment or its code are to be mended by a person.
fn is_set_up(e: &anyhow::Error) -> bool {
    let device = match e.downcast_ref::<RelayError>() {
        Some(RelayError::Config(_)) => return true,
        Some(RelayError::Device(device)) => Some(device),
        _ => e.downcast_ref::<DeviceError>(),
    };
    let device = device.is_some_and(|d| {
        use DeviceError::{NotEnrolled, OtherDevice, Refused};
        matches!(d, NotEnrolled(_) | OtherDevice { .. } | Refused(_))
    });
    device || e.is::<ConfigError>()
}

/// What went wrong, for programs: a name that stays when the text is bettered.
fn code_of(e: &anyhow::Error) -> &'static str {
    match e.downcast_ref::<RelayError>() {
        Some(RelayError::Config(_)) => "CONFIG",
        Some(RelayError::Device(e)) => e.code(),
        Some(RelayError::Lock(e)) => e.code(),
        Some(e) if e.is_disk_full() => "DISK_FULL",
        Some(_) => "MACHINE",
        None if e.is::<ConfigError>() => "CONFIG",
        None => {
            let lock = e.downcast_ref().map(LockError::code);
            lock.or_else(|| e.downcast_ref().map(DeviceError::code)).unwrap_or("FAILED")
        }
    }
}

async fn perform(line: Line, loaded: Loaded<Config>) -> anyhow::Result<u8> {
    let json = line.common.json;
    match line.verb {
        Verb::Enroll { code } => enroll(&loaded.value, &code, json),
        Verb::Run => {
            let mut shutdown = Box::pin(cli::shutdown_signal());
            let opened = unless_stopped(move || open(loaded.value), &mut shutdown).await?;
            let Some(relay) = opened.transpose()?.map(Arc::new) else { return Ok(0) };
            let hall = Arc::clone(&relay.hall);
            follow::lock(&hall.device).note_start(hall.clock.now(), &clock::boot_id());
            run::serve(relay, shutdown).await?;
            follow::lock(&hall.device).note_end();
            Ok(0)
        }
        Verb::Once => order(loaded.value, Order::Once, json).await,
        Verb::Status => order(loaded.value, Order::Status, json).await,
        Verb::Verify => order(loaded.value, Order::Verify, json).await,
        Verb::Import { dir } => {
            let dir = std::fs::canonicalize(&dir).with_context(|| format!("{}", dir.display()))?;
            order(loaded.value, Order::Import { dir }, json).await
        }
        Verb::Retry { pack } => order(loaded.value, Order::Retry { pack }, json).await,
        Verb::CheckConfig => Ok(check_config(&loaded, json)),
        Verb::Doctor => doctor(&loaded.value, json).await,
        Verb::Completions { .. } | Verb::Man | Verb::Trial => Ok(0),
    }
}

/// What `open` gives, unless the order to stop comes first: all of `ok/` may have to be hashed. What it was at
/// ends with the process, as by a kill.
async fn unless_stopped<T: Send + 'static>(
    open: impl FnOnce() -> T + Send + 'static,
    stop: impl Future<Output = ()>,
) -> Result<Option<T>, JoinError> {
    let opening = tokio::task::spawn_blocking(open);
    tokio::select! {
        opened = opening => opened.map(Some),
        () = stop => Ok(None),
    }
}

fn open(config: Config) -> Result<Relay, RelayError> {
    let tools = Tools { runner: Runner::this_binary(), steps: Steps::default() };
    Relay::open(config, Arc::new(SystemClock::default()), tools)
}

/// Hands over to the running relay, or does it here.
async fn order(config: Config, order: Order, json: bool) -> anyhow::Result<u8> {
    let dir = config.data_dir.clone();
    let mut answer = control::ask(&dir, &order).await?;
    if answer.is_none() {
        answer = match open(config.clone()) {
            Ok(relay) => Some(control::obey(&relay, order).await),
            // A relay that starts at this moment opens its socket soon; a command that is at work never does.
            Err(RelayError::Lock(e @ LockError::Held { .. })) => match ask_soon(&dir, &order).await? {
                None if order == Order::Status => Some(control::status_of_files(&config, &SystemClock::default())?),
                answer => Some(answer.ok_or(e)?),
            },
            Err(e) => return Err(e.into()),
        };
    }
    let answer = answer.unwrap_or_else(|| Answer::failed("no answer"));
    match answer.failure() {
        Some((why, code)) => cli::failed(json, why, code),
        None if json => cli::print_json(&answer.report),
        None => answer.lines.iter().for_each(cli::print_line),
    }
    Ok(answer.exit)
}

async fn ask_soon(dir: &std::path::Path, order: &Order) -> std::io::Result<Option<Answer>> {
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        if let Some(answer) = control::ask(dir, order).await? {
            return Ok(Some(answer));
        }
    }
    Ok(None)
}

fn enroll(config: &Config, code: &str, json: bool) -> anyhow::Result<u8> {
    let now = SystemClock::default().now();
    let code = cli::secret(code)?;
    let code = EnrolCode::from_text(code.trim(), now).map_err(DeviceError::from)?;
    let wanted = DeviceId::Relay(config.store.clone());
    if code.id != wanted {
        let why = format!("the code is for {}, relay.toml says store = {}", code.id, config.store);
        return Err(ConfigError(why).into());
    }
    shelf::create_dir(&config.data_dir)?;
    let _lock = LockFile::acquire(&config.data_dir)?;
    Device::enrol(&config.data_dir, &code)?;
    if json {
        cli::print_json(&json!({ "id": code.id, "data_dir": config.data_dir }));
    } else {
        cli::print_line(format_args!("{} is enrolled; start `store-relay run`", code.id));
    }
    Ok(0)
}

fn check_config(loaded: &Loaded<Config>, json: bool) -> u8 {
    let config = loaded.value.shown();
    if json {
        cli::print_json(&config);
        return 0;
    }
    let file = loaded.file.as_ref().map_or("the environment".to_owned(), |f| f.display().to_string());
    cli::print_line(format_args!("{file} is valid: store {}, data in {}", config.store, config.data_dir.display()));
    for source in &config.sources {
        cli::print_line(format_args!("  source {source}"));
    }
    cli::print_line(format_args!("  headquarters {}", config.hq.as_deref().unwrap_or("none: sources are only polled")));
    cli::print_line(format_args!("  serves on {}", config.listen));
    0
}

async fn doctor(config: &Config, json: bool) -> anyhow::Result<u8> {
    let (running, findings) = doctor::examine(config).await?;
    let well = findings.iter().all(|f| f.well);
    if json {
        cli::print_json(&json!({ "well": well, "running": running, "findings": findings }));
    } else {
        findings.iter().for_each(cli::print_line);
    }
    Ok(u8::from(!well))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::shelf::{Action, ShelfError};
    use std::io;
    use std::sync::mpsc;

    #[tokio::test]
    async fn an_order_to_stop_does_not_wait_for_the_start() {
        let (go, wait) = mpsc::channel::<()>();
        let opened = unless_stopped(move || wait.recv(), std::future::ready(())).await.unwrap();
        assert!(opened.is_none());
        drop(go);
        assert_eq!(unless_stopped(|| 7, std::future::pending()).await.unwrap(), Some(7));
    }

    #[test]
    fn what_the_files_of_a_relay_refuse_has_its_own_code() {
        let code = |kind: io::ErrorKind, is_lock: bool| {
            let e = ShelfError { action: Action::Create, path: "data".into(), source: kind.into() };
            let e = if is_lock { RelayError::Lock(e.into()) } else { RelayError::Shelf(e) };
            code_of(&e.into())
        };
        assert_eq!(code(io::ErrorKind::StorageFull, false), "DISK_FULL");
        assert_eq!(code(io::ErrorKind::PermissionDenied, false), "MACHINE");
        assert_eq!(code(io::ErrorKind::PermissionDenied, true), "MACHINE", "no other command is at work");
        assert_eq!(code_of(&LockError::Held { dir: "data".into(), pid: None }.into()), "LOCKED");
    }
}

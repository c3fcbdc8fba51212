//! What the three commands share at their edge: exit codes, logs, printing, signals, systemd.

use clap::{Args, Command, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done, or nothing to do.
    Done,
    /// Failed: all refused, lease held, drift found.
    Failed,
    /// Usage or configuration.
    Usage,
    /// Done in part.
    Partly,
}

impl From<Exit> for ExitCode {
    fn from(e: Exit) -> ExitCode {
        ExitCode::from(match e {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Partly => 3,
        })
    }
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// Options of every command; flatten them.
#[derive(Debug, Clone, Default, Args)]
pub struct Common {
    /// The settings' file.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Report in JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// How logs are written.
    #[arg(long, global = true, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// error, warn, info, debug, trace, or a filter such as `info,proto=debug`.
    #[arg(long, global = true, value_name = "LEVEL", env = "TILLCAST_LOG")]
    pub log_level: Option<String>,
}

/// First line of every main: TLS provider and logs to stderr.
pub fn start(common: &Common) {
    let _ = common;
    todo!()
}
/// Prints a line on stdout; a closed pipe ends the process with 0.
pub fn print_line(line: impl std::fmt::Display) {
    let _ = line.to_string();
    todo!()
}
/// Prints a value as JSON, indented on a terminal, one line otherwise.
pub fn print_json(value: &impl Serialize) {
    let _ = value;
    todo!()
}
/// Writes the shell's completions to stdout.
pub fn completions(command: Command, shell: clap_complete::Shell) {
    let _ = (command, shell);
    todo!()
}
/// Writes the man page to stdout.
pub fn man(command: Command) {
    let _ = command;
    todo!()
}
/// Ready at SIGTERM or SIGINT. Signals are caught from the call on, not from the first poll.
pub fn shutdown_signal() -> impl Future<Output = ()> + Send + 'static {
    async { todo!() }
}
/// Tells systemd that the service is ready. Nothing without NOTIFY_SOCKET.
pub fn notify_ready() {
    todo!()
}
/// Tells systemd that the service stops.
pub fn notify_stopping() {
    todo!()
}
/// Tells systemd that the service lives.
pub fn notify_watchdog() {
    todo!()
}
/// How often `notify_watchdog` is wanted, halved for safety; none without a watchdog.
pub fn watchdog_interval() -> Option<std::time::Duration> {
    todo!()
}

//! What the three commands share at their edge: exit codes, logs, printing, signals, systemd.
//!
//! Owns stdout, stderr and the process's signals. Never decides anything of the business. Nothing
//! here outlives the power.

use clap::{Args, Command, ValueEnum};
use sd_notify::NotifyState;
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

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

impl Exit {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Partly => 3,
        }
    }
}
impl From<Exit> for ExitCode {
    fn from(e: Exit) -> ExitCode {
        ExitCode::from(e.code())
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
    #[arg(long, global = true, value_name = "LEVEL", env = "TILLCAST_LOG", default_value = "info")]
    pub log_level: String,
}

/// First thing in every main, once its arguments are read: TLS provider, logs to stderr.
pub fn start(common: &Common) {
    arm_failpoint();
    crate::fetch::install_tls();
    let (filter, bad) = match EnvFilter::try_new(&common.log_level) {
        Ok(filter) => (filter, None),
        Err(e) => (EnvFilter::new("info"), Some(e)),
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(Tidy::stderr);
    let set = match common.log_format {
        LogFormat::Text => logs.with_ansi(colour(&io::stderr())).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).with_ansi(false).try_init(),
    };
    if let Err(e) = set {
        complain(format_args!("logs stay as they were: {e}"));
    }
    if let Some(e) = bad {
        tracing::warn!(level = %common.log_level, "log level not understood, using info: {e}");
    }
}

/// Stderr, for whole events: text from outside (names, servers' answers, rows) begins no line that looks like
/// ours and steers no terminal.
struct Tidy {
    to: io::Stderr,
    colour: bool,
}

impl Tidy {
    fn stderr() -> Tidy {
        let to = io::stderr();
        Tidy { colour: colour(&to), to }
    }
}

impl Write for Tidy {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let (line, end) = text.strip_suffix('\n').map_or((&*text, ""), |line| (line, "\n"));
        self.to.write_all((tidy(line, "\n    ", self.colour) + end).as_bytes())?;
        Ok(event.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// A text with its control characters, and those that turn its direction, written as escapes; `newline` stands
/// for line ends, `colour` leaves our own colours in.
fn tidy(text: &str, newline: &str, colour: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str(newline),
            '\t' => out.push(c),
            '\u{1b}' if colour => out.push(c),
            '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(c.escape_unicode())
            }
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Lets a test kill this process at a named step; see `failpoint`.
pub fn arm_failpoint() {
    let variable = crate::config::variable;
    crate::failpoint::arm(variable("TILLCAST_FAILPOINT"), variable("TILLCAST_FAILPOINT_LOG").map(PathBuf::from));
}

fn colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && crate::config::variable("NO_COLOR").is_none()
}

/// An error with its causes; those that its text tells already are not told twice.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        at = cause.source();
    }
    text
}

/// Bytes of a secret on standard input: codes are some hundred.
const SECRET_BYTES: u64 = 64 << 10;

/// A secret given as an argument, or the first line of standard input where that is `-`: arguments stand in `ps` and in the
/// shell's history.
pub fn secret(argument: &str) -> io::Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    io::stdin().lock().take(SECRET_BYTES).read_line(&mut text)?;
    Ok(text)
}

/// Prints `error: …` on stderr.
pub fn complain(error: impl Display) {
    let _ = writeln!(Tidy::stderr(), "error: {error}");
}

/// Tells of a command that failed as a whole: on stderr, and for programs as `{"error","code"}` on stdout.
pub fn failed(json: bool, error: impl Display, code: &str) {
    let error = error.to_string();
    if json {
        print_json(&serde_json::json!({ "error": error, "code": code }));
    }
    complain(error);
}

/// Prints a line on stdout. A reader that closed the pipe (`| head`) ends the process with 0.
pub fn print_line(line: impl Display) {
    let line = line.to_string();
    to_stdout(|out| out.write_all(tidy(&line, "\n", false).as_bytes()).and_then(|()| out.write_all(b"\n")));
}

/// Prints a value as JSON: indented on a terminal, otherwise one line.
pub fn print_json(value: &impl Serialize) {
    let pretty = io::stdout().is_terminal();
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    match text {
        Ok(text) => print_line(text),
        Err(e) => complain(format_args!("the report cannot be written as JSON: {e}")),
    }
}

/// Writes a shell's completions to stdout.
pub fn completions(mut command: Command, shell: clap_complete::Shell) {
    let name = command.get_name().to_owned();
    // Into memory first: clap_complete panics on a closed pipe.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    to_stdout(|out| out.write_all(&text));
}

/// Writes the man page to stdout.
pub fn man(command: Command) {
    to_stdout(|out| clap_mangen::Man::new(command.clone()).render(out));
}

fn to_stdout(write: impl Fn(&mut dyn Write) -> io::Result<()>) {
    let mut out = io::stdout().lock();
    match write(&mut out).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            complain(format_args!("cannot write to stdout: {e}"));
            std::process::exit(i32::from(Exit::Failed.code()));
        }
    }
}

/// Ready at SIGTERM or SIGINT. Signals are caught from this call on, not from the first poll; it
/// must be made inside the runtime.
pub fn shutdown_signal() -> impl Future<Output = ()> + Send + 'static {
    let (mut term, mut int) = (caught(SignalKind::terminate()), caught(SignalKind::interrupt()));
    async move {
        tokio::select! {
            () = received(&mut term) => tracing::info!("SIGTERM: stopping"),
            () = received(&mut int) => tracing::info!("SIGINT: stopping"),
        }
    }
}

fn caught(kind: SignalKind) -> Option<Signal> {
    signal(kind).inspect_err(|e| tracing::warn!("a signal cannot be caught: {e}")).ok()
}

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(s) => {
            s.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Tells systemd that the service is ready. Nothing happens without NOTIFY_SOCKET, here and below.
pub fn notify_ready() {
    tell(NotifyState::Ready);
}

/// Tells systemd that the service is stopping.
pub fn notify_stopping() {
    tell(NotifyState::Stopping);
}

/// Tells systemd that the service lives; call it from the loop that does the work.
pub fn notify_watchdog() {
    tell(NotifyState::Watchdog);
}

/// Shows a line in `systemctl status`.
pub fn notify_status(line: &str) {
    tell(NotifyState::Status(line));
}

fn tell(state: NotifyState<'_>) {
    if let Err(e) = sd_notify::notify(&[state]) {
        tracing::debug!("systemd did not hear: {e}");
    }
}

/// How often to call `notify_watchdog`: half of what systemd allows; none without a watchdog.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|d| d / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    #[command(name = "store-relay", version)]
    struct Line {
        #[command(flatten)]
        common: Common,
        #[command(subcommand)]
        verb: Verb,
    }
    #[derive(Debug, clap::Subcommand)]
    enum Verb {
        /// Shows what is there.
        Status,
    }

    #[test]
    fn common_options_may_stand_after_the_verb() {
        let l = Line::parse_from(["x", "status", "--json", "--config", "a.toml", "--log-format", "json"]);
        assert!(l.common.json && l.common.log_format == LogFormat::Json && matches!(l.verb, Verb::Status));
        assert_eq!(l.common.config, Some("a.toml".into()));
        <Line as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn text_from_outside_begins_no_line_and_steers_no_terminal() {
        let evil = "a\u{1b}[2J\r\n2026-11-22T00:00:00Z INFO forged\u{7}\u{9b}31m\u{202e}\tb\0";
        let told = "a\\u{1b}[2J\\r\n    2026-11-22T00:00:00Z INFO forged\\u{7}\\u{9b}31m\\u{202e}\tb\\u{0}";
        assert_eq!(tidy(evil, "\n    ", false), told);
        assert_eq!(tidy("größe 7 ½ 東京", "\n", false), "größe 7 ½ 東京");
        assert_eq!(tidy("\u{1b}[1mours", "\n", true), "\u{1b}[1mours");
    }

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug, thiserror::Error)]
        enum Told {
            #[error("cannot listen on {address}: {source}")]
            Twice { address: &'static str, source: io::Error },
            #[error("cannot listen")]
            Once(#[source] io::Error),
        }
        let source = || io::Error::other("in use");
        let twice = with_causes(&Told::Twice { address: "127.0.0.1:1", source: source() });
        assert_eq!(twice, "cannot listen on 127.0.0.1:1: in use");
        assert_eq!(with_causes(&Told::Once(source())), "cannot listen: in use");
    }

    #[test]
    fn exit_codes_are_the_designs() {
        assert_eq!([Exit::Done, Exit::Failed, Exit::Usage, Exit::Partly].map(Exit::code), [0, 1, 2, 3]);
    }

    #[tokio::test]
    async fn a_signal_between_call_and_poll_is_not_lost() {
        let stop = shutdown_signal();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
        tokio::time::timeout(Duration::from_secs(5), stop).await.unwrap();
    }
}

//! What each command does, from settings to exit code. Reports go to stdout, everything else to stderr.

use crate::bucket::Buckets;
use crate::carry;
use crate::cli::{Cli, Command, Publish, TrustCommand};
use crate::code;
use crate::config::{self, Config};
use crate::doctor::{self, Verdict};
use crate::enrol::{Desk, EnrolError, TrustReport};
use crate::hooks::Post;
use crate::ledger::Ledger;
use crate::progress::Shown;
use crate::publish::{self, PublishOptions, Quiet, contracts};
use crate::status;
use crate::verify;
use crate::web;
use anyhow::Context as _;
use clap::CommandFactory;
use proto::cli::{Exit, print_json, print_line, shutdown_signal};
use proto::clock::{Clock, SystemClock};
use proto::config::{Loaded, environment};
use proto::ids::{DeviceId, StoreId};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Runs a command; how it ends.
pub async fn run(cli: &Cli) -> anyhow::Result<Exit> {
    match &cli.command {
        Command::Completions { shell } => {
            proto::cli::completions(Cli::command(), *shell);
            return Ok(Exit::Done);
        }
        Command::Man => {
            proto::cli::man(Cli::command());
            return Ok(Exit::Done);
        }
        Command::Init if write_settings(cli)? => return Ok(Exit::Done),
        _ => {}
    }
    let loaded = config::load(cli.common.config.as_deref(), environment())?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let shop = Shop { config: &loaded.value, clock, json: cli.common.json };
    match &cli.command {
        Command::Init => shop.init().await,
        Command::Publish(options) => shop.publish(options).await,
        Command::Serve => shop.serve().await,
        Command::Status => shop.status().await,
        Command::Verify { mend } => shop.verify(*mend).await,
        Command::Enroll { id, clock_is_right } => shop.enroll(id, *clock_is_right).await,
        Command::Revoke { id, clock_is_right } => shop.revoke(id, *clock_is_right).await,
        Command::Trust { command } => shop.trust(command).await,
        Command::Export { store, dir } => shop.export(store, dir).await,
        Command::Receipt { files } => shop.receipt(files).await,
        Command::CheckConfig => shop.check_config(&loaded),
        Command::Doctor => shop.doctor().await,
        Command::Completions { .. } | Command::Man => Ok(Exit::Done),
    }
}

/// How an error ends the process.
pub fn exit_of(e: &anyhow::Error) -> Exit {
    if code::of(e) == code::CONFIG { Exit::Usage } else { Exit::Failed }
}

/// `init` where no settings are: writes commented ones to edit. Whether it did.
fn write_settings(cli: &Cli) -> anyhow::Result<bool> {
    let explicit = cli.common.config.as_deref();
    let path = explicit.unwrap_or(Path::new(config::FILE));
    let elsewhere = explicit.is_none()
        && (Path::new("/etc/tillcast").join(config::FILE).exists()
            || environment().iter().any(|(name, _)| name.starts_with("TILLCAST__")));
    if path.exists() || elsewhere {
        return Ok(false);
    }
    let dir = path.parent().unwrap_or(Path::new(""));
    let schema = dir.join("schema");
    proto::shelf::create_dir(&schema)?;
    let contract = schema.join("price.sql");
    let _ = proto::shelf::write_new(&contract, include_bytes!("init/price.sql"))?;
    let _ = proto::shelf::write_new(path, include_bytes!("init/hq.toml"))?;
    let files = [path, contract.as_path()].map(|file| file.display().to_string());
    let next =
        "edit them to fit your database, try them with `hq-publisher check-config`, then run `hq-publisher init` again";
    if cli.common.json {
        print_json(&serde_json::json!({ "outcome": "settings written", "files": files, "next": next }));
    } else {
        print_line(format_args!("wrote {}", files.join(" and ")));
        print_line(next);
    }
    Ok(true)
}

/// What the commands share.
struct Shop<'a> {
    config: &'a Config,
    clock: Arc<dyn Clock>,
    json: bool,
}

impl Shop<'_> {
    async fn desk(&self, clock_is_right: bool) -> Result<Desk<'_>, EnrolError> {
        Desk::open(self.config, self.clock.as_ref(), clock_is_right).await
    }

    async fn ledger(&self) -> anyhow::Result<Ledger> {
        Ok(Ledger::open(self.config).await?)
    }

    async fn init(&self) -> anyhow::Result<Exit> {
        let report = self.desk(true).await?.init().await?;
        if self.json {
            print_json(&report);
            return Ok(Exit::Done);
        }
        let state = self.config.state.dir.display();
        match report.outcome {
            "found" => print_line(format_args!(
                "{state} is initialised: trust file {}, epoch {}",
                report.trust_version, report.epoch
            )),
            "taken over" => print_line(format_args!(
                "took trust file {} (epoch {}) over from the bucket; the next publish rebuilds the rest",
                report.trust_version, report.epoch
            )),
            _ => {
                print_line(format_args!("made {state} with keys and trust file 1"));
                report.root_keys.iter().map(|key| root_key_line(key)).for_each(print_line);
                for key in &report.publisher_keys {
                    print_line(format_args!(
                        "publisher key: {}\n  It signs every publish. Back it up with {state}.",
                        key.display()
                    ));
                }
                print_line("next: `hq-publisher publish`, and `hq-publisher enroll STORE` for each relay");
            }
        }
        Ok(Exit::Done)
    }

    async fn publish(&self, o: &Publish) -> anyhow::Result<Exit> {
        let options = PublishOptions {
            stream: o.stream.clone(),
            dry_run: o.dry_run,
            full: o.full,
            allow_shrink: o.allow_shrink.clone(),
            allow_rebuild: o.allow_rebuild,
            clock_is_right: o.clock_is_right,
        };
        let shown = Shown::new(o.dry_run);
        let outcome = publish::run(self.config, &options, &self.clock, &shown, &Quiet).await;
        shown.clear();
        if !o.dry_run {
            self.send_mails().await;
        }
        let report = outcome?;
        let exit = exit_by(report.exit_code());
        if self.json {
            print_json(&report.for_programs());
        } else {
            report.lines().iter().for_each(print_line);
        }
        Ok(exit)
    }

    /// Tries to send what is in the outbox, for `publish.mail_wait`; what is left is `serve`'s.
    async fn send_mails(&self) {
        let send = async {
            let ledger = Ledger::open(self.config).await?;
            anyhow::Ok(Post::new(self.config)?.deliver(&ledger, self.clock.as_ref()).await?)
        };
        match tokio::time::timeout(self.config.publish.mail_wait.0, send).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(down))) => tracing::warn!("mails wait in the outbox: {down}"),
            Ok(Err(e)) => tracing::warn!("mails wait in the outbox: {e:#}"),
            Err(_) => tracing::warn!("mails wait in the outbox: the server is too slow (publish.mail_wait)"),
        }
    }

    async fn serve(&self) -> anyhow::Result<Exit> {
        let shutdown = shutdown_signal();
        web::serve(self.config, Arc::clone(&self.clock), shutdown).await?;
        Ok(Exit::Done)
    }

    async fn status(&self) -> anyhow::Result<Exit> {
        let report = status::report(self.config, &self.ledger().await?, self.clock.as_ref()).await?;
        if self.json {
            print_json(&report);
        } else {
            report.lines().iter().for_each(print_line);
        }
        Ok(Exit::Done)
    }

    async fn verify(&self, mend: bool) -> anyhow::Result<Exit> {
        let ledger = self.ledger().await?;
        let buckets = Buckets::open(self.config, &ledger).await?;
        if mend {
            // A publish that signs meanwhile must not be overwritten by what was signed before.
            let lease = publish::Lease::acquire(self.config, &ledger, &self.clock).await?;
            let put = verify::put_back(self.config, &ledger, &buckets, self.clock.as_ref()).await;
            lease.release().await;
            tracing::info!(objects = put?, "put back");
        }
        let bar = std::io::stderr().is_terminal().then(|| indicatif::ProgressBar::new(0));
        let step = |done: usize, of: usize| {
            if let Some(bar) = &bar {
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            }
        };
        let report = verify::run(self.config, &ledger, &buckets, step).await?;
        if let Some(bar) = &bar {
            bar.finish_and_clear();
        }
        if self.json {
            print_json(&report);
        } else {
            report.lines().iter().for_each(print_line);
        }
        Ok(if report.is_right() { Exit::Done } else { Exit::Failed })
    }

    async fn enroll(&self, id: &DeviceId, clock_is_right: bool) -> anyhow::Result<Exit> {
        let code = self.desk(clock_is_right).await?.enroll(id).await?;
        if self.json {
            print_json(&code);
        } else {
            print_line(&code.code);
            // The code alone on stdout, so that a script can take it.
            let _ = writeln!(
                std::io::stderr(),
                "{id} is enrolled; give the code to `enroll` there, until {}. It is a secret.",
                code.expires_at
            );
            if let Some(at) = code.last_heard_at {
                let _ = writeln!(
                    std::io::stderr(),
                    "{id} was last heard at {at}. The key that it has counts no more: its heartbeats are refused until it is \
                     given this code."
                );
            }
        }
        Ok(Exit::Done)
    }

    async fn revoke(&self, id: &DeviceId, clock_is_right: bool) -> anyhow::Result<Exit> {
        let desk = self.desk(clock_is_right).await?;
        let was = desk.ledger.device(id).await?.is_some_and(|d| d.revoked_at.is_some());
        desk.revoke(id).await?;
        if self.json {
            print_json(&serde_json::json!({ "id": id, "revoked": true, "was_revoked": was }));
        } else {
            let already = if was { " already" } else { "" };
            print_line(format_args!(
                "{id} is revoked{already}: its heartbeats are refused, its store's manifest no longer names its key"
            ));
        }
        Ok(Exit::Done)
    }

    async fn trust(&self, command: &TrustCommand) -> anyhow::Result<Exit> {
        let report = match command {
            TrustCommand::Show => self.desk(false).await?.show().await?,
            TrustCommand::Rotate(o) => self.desk(o.clock_is_right).await?.rotate(o).await?,
            TrustCommand::Revoke(o) => self.desk(o.clock_is_right).await?.revoke_key(o).await?,
        };
        if self.json {
            print_json(&report);
        } else {
            trust_lines(&report).iter().for_each(print_line);
        }
        Ok(Exit::Done)
    }

    async fn export(&self, store: &StoreId, dir: &Path) -> anyhow::Result<Exit> {
        let ledger = self.ledger().await?;
        let buckets = Buckets::open(self.config, &ledger).await?;
        let bar = std::io::stderr().is_terminal().then(|| indicatif::ProgressBar::new(0));
        let step = |done: usize, of: usize| {
            if let Some(bar) = &bar {
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            }
        };
        let dir = if dir.is_absolute() { dir.to_owned() } else { Path::new(".").join(dir) };
        let done = carry::export(&ledger, &buckets, store, &dir, step).await?;
        if let Some(bar) = &bar {
            bar.finish_and_clear();
        }
        if self.json {
            print_json(&done);
        } else {
            print_line(format_args!(
                "store {}: manifest {} (until {}) and {} packs, {} bytes, in {} ({} were there)",
                done.store,
                done.serial,
                done.expires_at,
                done.packs,
                done.bytes,
                dir.display(),
                done.kept
            ));
            if done.left_out > 0 {
                print_line(format_args!(
                    "{} older packs are missing in the bucket or bent there, and left out: newer fulls go round them",
                    done.left_out
                ));
            }
        }
        Ok(Exit::Done)
    }

    async fn receipt(&self, files: &[PathBuf]) -> anyhow::Result<Exit> {
        let ledger = self.ledger().await?;
        let mut lines = Vec::new();
        for file in files {
            lines.push(carry::receipt(&ledger, file, &self.config.limits, self.clock.as_ref()).await?);
        }
        let bad = lines.iter().filter(|l| l.refused.is_some()).count();
        if self.json {
            print_json(&lines);
        } else {
            lines.iter().map(receipt_line).for_each(print_line);
        }
        Ok(match bad {
            0 => Exit::Done,
            n if n == lines.len() => Exit::Failed,
            _ => Exit::Partly,
        })
    }

    fn check_config(&self, loaded: &Loaded<Config>) -> anyhow::Result<Exit> {
        let contracts = contracts::check(self.config)?;
        Post::new(self.config)?;
        if self.json {
            print_json(self.config);
        } else {
            let file = loaded.file.as_ref().map_or_else(|| "the environment".to_owned(), |f| f.display().to_string());
            print_line(format_args!("{file} is fine: {} streams", contracts.streams.len()));
        }
        Ok(Exit::Done)
    }

    async fn doctor(&self) -> anyhow::Result<Exit> {
        let checks = doctor::run(self.config, self.clock.as_ref()).await;
        if self.json {
            print_json(&checks);
        } else {
            checks.iter().map(doctor::Check::line).for_each(print_line);
        }
        let failed = checks.iter().any(|c| c.verdict == Verdict::Fail);
        Ok(if failed { Exit::Failed } else { Exit::Done })
    }
}

fn exit_by(code: u8) -> Exit {
    [Exit::Done, Exit::Failed, Exit::Usage, Exit::Partly].into_iter().find(|e| e.code() == code).unwrap_or(Exit::Failed)
}

/// What becomes of a root key that was made.
fn root_key_line(key: &Path) -> String {
    format!(
        "root key: {}\n  It decides who may sign. Copy it to two places offline, then delete it here; `trust rotate` and \
         `trust revoke` ask for it by --root-key.",
        key.display()
    )
}

fn trust_lines(r: &TrustReport) -> Vec<String> {
    let mut out = vec![format!("trust file {}, epoch {}, of {}", r.version, r.epoch, r.created_at)];
    let file =
        |k: &crate::enrol::KeyLine| k.file.as_ref().map_or_else(|| "not here".into(), |f| f.display().to_string());
    out.extend(r.root.iter().map(|k| format!("root       {}  {}", k.id, file(k))));
    out.extend(r.publishers.iter().map(|k| {
        let until = k.expires_at.map(|t| format!("  until {t}")).unwrap_or_default();
        format!("publisher  {}  {}{until}", k.id, file(k))
    }));
    if !r.streams.is_empty() {
        let names: Vec<&str> = r.streams.iter().map(|s| s.as_str()).collect();
        out.push(format!("streams    {} (lists may have no others)", names.join(", ")));
    }
    if let Some(n) = r.manifests_signed {
        out.push(format!("{n} manifests signed anew"));
    }
    out.extend(r.new_root.as_deref().map(root_key_line));
    out.extend(r.new_publisher.as_deref().map(|key| {
        format!(
            "publisher key: {}\n  It signs every publish. No backup made so far has it: back state.dir up again.",
            key.display()
        )
    }));
    out.extend(r.next.map(|next| format!("next: {next}")));
    out
}

fn receipt_line(l: &carry::ReceiptLine) -> String {
    let file = l.file.display();
    let Some(r) = &l.receipt else { return format!("{file}: refused: {}", l.refused.as_deref().unwrap_or_default()) };
    let serial = r.serial.map_or_else(|| "none".into(), |s| s.to_string());
    let mut text = format!("{file}: store {}, {}, manifest {serial}, {} streams", r.store, r.time, r.versions.len());
    if l.behind.is_empty() {
        text.push_str(", up to date");
    }
    for (i, (theirs, ours)) in &l.behind {
        let theirs = theirs.map_or_else(|| "nothing".into(), |v| v.to_string());
        text.push_str(&format!("\n  {i}: has {theirs}, headquarters {ours}"));
    }
    for i in &l.differ {
        text.push_str(&format!("\n  {i}: OTHER DIGESTS than published"));
    }
    for refusal in &r.refusals {
        text.push_str(&format!("\n  refused there: {refusal}"));
    }
    text
}

/// The runtime, the command, the exit code.
pub fn main(cli: &Cli) -> Exit {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime");
    let done = runtime.and_then(|runtime| {
        let done = runtime.block_on(run(cli));
        // What is durable is so by now.
        runtime.shutdown_timeout(Duration::from_secs(10));
        done
    });
    match done {
        Ok(exit) => exit,
        Err(e) => {
            let text = proto::cli::with_causes(e.as_ref());
            proto::cli::failed(cli.common.json, text, code::of(&e));
            exit_of(&e)
        }
    }
}

//! How other commands hand over to a running relay: a Unix socket in the data directory, one line of JSON each way.
//! Only the directory's owner may use it. Nothing here outlives the power: orders are carried out by
//! rooms that are durable themselves.

use crate::config::Config;
use crate::hall::{self, State};
use crate::import::Imported;
use crate::relay::{Pace, Relay, RelayError, Round};
use crate::shadow::{self, ShadowError};
use crate::shelves::{Room, Shelves, is_exhausted};
use crate::spool::{Event, Spool};
use crate::stream::Outcome;
use crate::trial;
use proto::clock::Clock;
use proto::device::Device;
use proto::ids::{DeviceId, Instance};
use proto::layout::{ObjectName, PackName};
use proto::replica::{Replica, TableCheck, VerifyError};
use proto::shelf;
use proto::wire::{Network, Status, StreamState};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// The socket in the data directory.
pub const SOCKET: &str = "control.sock";
const MAX_LINE: u64 = 8 << 20;

/// What a relay can be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Order {
    /// How do you stand?
    Status,
    /// Recompute digests from the rows, hash the served packs, look at the trust files.
    Verify,
    /// One cycle.
    Once,
    /// Import a folder.
    Import {
        /// The folder, absolute.
        dir: PathBuf,
    },
    /// Try a pack in `error/` again.
    Retry {
        /// Which.
        pack: PackName,
    },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The command's exit code.
    pub exit: u8,
    /// For `--json`.
    pub report: Value,
    /// For people.
    pub lines: Vec<String>,
}

impl Answer {
    fn new(exit: u8, report: &impl Serialize, lines: Vec<String>) -> Answer {
        Answer { exit, report: serde_json::to_value(report).unwrap_or_default(), lines }
    }
    /// Nothing was done.
    pub fn failed(why: impl std::fmt::Display) -> Answer {
        Answer::failed_as("FAILED", why)
    }
    /// The same; programs are told why by a name that stays.
    fn failed_as(code: &str, why: impl std::fmt::Display) -> Answer {
        let why = why.to_string();
        Answer::new(1, &json!({ "error": why, "code": code }), Vec::new())
    }
    /// Why nothing was done, and the name of that.
    pub fn failure(&self) -> Option<(&str, &str)> {
        Some((self.report.get("error")?.as_str()?, self.report.get("code")?.as_str()?))
    }
}

/// Carries out an order.
pub async fn obey(relay: &Relay, order: Order) -> Answer {
    match order {
        Order::Status => status(&relay.hall.status(), &relay.hall.events()),
        Order::Verify => verify(relay).await,
        Order::Once => {
            let round = relay.mirror_once(Pace::Once).await;
            relay.report_now().await;
            once(&round, relay)
        }
        Order::Import { dir } => match relay.import(&dir).await {
            Ok(done) => imported(&done, &dir),
            Err(e) => Answer::failed_as(e.code(), e),
        },
        Order::Retry { pack } => retry(relay, &pack),
    }
}

/// The report of `status`; for `--json` with the newest entries of the event log.
fn status(status: &Status, events: &[Event]) -> Answer {
    let mut lines = vec![format!(
        "{}: manifest {}, network {}",
        status.id,
        status.serial.map_or("none".into(), |s| s.to_string()),
        serde_json::to_value(status.network).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default(),
    )];
    for (instance, report) in &status.streams {
        let version = report.version.map_or("none".into(), |v| v.to_string());
        let state = match report.state {
            StreamState::Ok => "ok",
            StreamState::Behind => "behind",
            StreamState::Error => "error",
            StreamState::Drift => "drift",
            StreamState::Waiting => "waiting",
            StreamState::Unknown => "unknown",
        };
        lines.push(format!("  {instance}: {version} ({state})"));
    }
    lines.extend(status.debts.iter().map(|d| format!("debt: {d}")));
    lines.extend(
        status.errors.iter().map(|e| {
            format!("{}: {}{}", e.code, e.object.as_ref().map(|o| format!("{o}: ")).unwrap_or_default(), e.text)
        }),
    );
    let mut answer = Answer::new(0, status, lines);
    answer.report["events"] = json!(events);
    answer
}

/// How a relay stands by its files alone: another command works on them, and answers nobody.
pub fn status_of_files(config: &Config, clock: &dyn Clock) -> Result<Answer, RelayError> {
    let dir = &config.data_dir;
    let device = Device::open(dir, &DeviceId::Relay(config.store.clone()), &config.limits)?;
    let spool = Spool::open_read_only(dir)?;
    let mut state = State {
        manifest: device.manifest().map(|m| Arc::new(m.get().clone())),
        attempts: spool.attempts()?,
        drifts: spool.drifts()?,
        faults: spool.refusals()?.into_iter().map(|(source, f)| ((f.code.clone(), source), f)).collect(),
        ok: Shelves::look_at_ok(dir)?.into_iter().map(|name| (name, None)).collect(),
        ..State::default()
    };
    let shadow = dir.join(shadow::FILE);
    if shadow.exists() {
        let held = Replica::open_read_only(&shadow, &config.limits).and_then(|r| r.all_held());
        state.held = held.map_err(ShadowError::from)?;
    }
    let report = Status {
        id: device.id().clone(),
        streams: state.streams(),
        serial: state.manifest.as_ref().map(|m| m.serial),
        // Nobody listens.
        network: Network::Offline,
        debts: state.debts(),
        errors: state.all_faults().into_iter().chain(device.starts().faults(clock.now())).collect(),
        disk: config.disk().space(),
        clock_skew_s: None,
        hq_seen_s: None,
    };
    Ok(status(&report, &hall::newest_last(&spool)))
}

/// Drift found here is latched, and healed by the next cycle.
async fn verify(relay: &Relay) -> Answer {
    let shadow = Arc::clone(&relay.shadow);
    let held = match tokio::task::spawn_blocking(move || shadow.streams()).await {
        Ok(Ok(held)) => held,
        Ok(Err(e)) => return Answer::failed(ShadowError::from(e)),
        Err(e) => return Answer::failed(e),
    };
    let (mut lines, mut streams, mut wrong) = (Vec::new(), BTreeMap::new(), false);
    let mut unread = BTreeMap::new();
    for stream in &held {
        let (shadow, asked) = (Arc::clone(&relay.shadow), stream.clone());
        let tables = match tokio::task::spawn_blocking(move || shadow.verify(&asked)).await {
            Ok(Ok(tables)) => tables,
            Ok(Err(VerifyError::Sqlite(e))) => return Answer::failed(ShadowError::from(e)),
            Ok(Err(e @ VerifyError::Contract { .. })) => {
                lines.push(e.to_string());
                unread.insert(stream.clone(), e.to_string());
                continue;
            }
            Err(e) => return Answer::failed(e),
        };
        let drift = trial::drift_text(stream, &tables);
        for t in &tables {
            lines.push(format!(
                "{stream}.{}: {} rows, {}",
                t.table,
                t.rows,
                if t.is_right() { "right" } else { "WRONG" }
            ));
        }
        if let Some(text) = drift {
            wrong = true;
            relay.latch_drift(stream, &text);
        }
        streams.insert(stream.clone(), tables.iter().map(check_json).collect::<Vec<_>>());
    }
    // Only what the shadow proved is served: it was lost, or damaged and begun anew.
    let lost: Vec<Instance> = {
        let state = relay.hall.state();
        state.versions().into_keys().filter(|i| !state.held.contains_key(&i.stream)).collect()
    };
    for instance in &lost {
        lines
            .push(format!("{instance}: served, and gone from {}: the next cycle makes it anew from ok/", shadow::FILE));
    }
    let packs = throw_rotten_away(relay).await;
    let trust = relay.verify_trust().await.unwrap_or_else(|e| {
        lines.push(e.to_string());
        wrong = true;
        Vec::new()
    });
    let rotten: Vec<String> =
        packs.iter().map(ToString::to_string).chain(trust.iter().map(ToString::to_string)).collect();
    lines.extend(rotten.iter().map(|name| format!("{name}: its bytes have changed on the disk; it comes anew")));
    wrong |= !rotten.is_empty() || !lost.is_empty();
    if wrong {
        relay.hall.wake.notify_one();
    }
    let report = json!({
        "streams": streams, "unread": unread, "lost": lost, "rotten": rotten, "right": !wrong && unread.is_empty(),
    });
    let exit = if wrong {
        1
    } else if !unread.is_empty() {
        3
    } else {
        0
    };
    Answer::new(exit, &report, lines)
}

fn check_json(t: &TableCheck) -> Value {
    json!({ "table": t.table, "stored": t.stored, "found": t.found, "rows": t.rows, "right": t.is_right() })
}

/// The packs in `ok/` whose bytes are not what was proved: they go as each is found, for minutes later another one may have
/// found it, and its next copy lie there.
async fn throw_rotten_away(relay: &Relay) -> Vec<PackName> {
    let known: Vec<_> = relay.hall.state().ok.iter().filter_map(|(n, h)| Some((n.clone(), (*h)?))).collect();
    let mut rotten = Vec::new();
    for (name, sha256) in known {
        let path = relay.hall.shelves.pack(Room::Ok, &name);
        let is_wrong = move || match shelf::hash_file(&path) {
            Ok(found) => found != sha256,
            Err(e) => !is_exhausted(&e.source),
        };
        let look = move || is_wrong() && is_wrong();
        let is_rotten = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        if is_rotten && relay.throw_away(&name, "found by verify") {
            rotten.push(name);
        }
    }
    rotten
}

fn once(round: &Round, relay: &Relay) -> Answer {
    let behind: Vec<String> = round
        .streams
        .iter()
        .filter(|(_, o)| **o != Outcome::AtHead)
        .map(|(s, o)| match o {
            Outcome::Again(_, why) | Outcome::NoWay(why) => format!("{s}: {why}"),
            other => format!("{s}: {other:?}"),
        })
        .collect();
    let configured = !relay.sources.is_empty();
    let no_list = relay.hall.state().manifest.is_none();
    let exit = if configured && (no_list || round.reached == 0) {
        1
    } else if !behind.is_empty() || !round.problems.is_empty() {
        3
    } else {
        0
    };
    let versions = relay.hall.state().versions();
    let mut lines: Vec<String> = versions.iter().map(|(i, v)| format!("{i}: {v}")).collect();
    lines.extend(behind.iter().cloned());
    lines.extend(round.problems.iter().cloned());
    let report = json!({
        "versions": versions, "behind": behind, "problems": round.problems, "reached": round.reached,
        "status": relay.hall.status(),
    });
    Answer::new(exit, &report, lines)
}

fn imported(done: &Imported, dir: &Path) -> Answer {
    let exit = if done.refused {
        1
    } else if !done.receipt.refusals.is_empty() || (!done.behind.is_empty() && !done.older) {
        3
    } else {
        0
    };
    let mut lines = Vec::new();
    if done.already_here {
        lines.push("already here".into());
    } else {
        lines.push(format!("{} objects taken", done.taken.len()));
    }
    lines.extend(done.receipt.refusals.iter().map(|r| format!("refused: {r}")));
    lines.extend(done.behind.iter().map(|(s, why)| format!("{s}: {why}")));
    lines.push(format!("receipt: {}", done.receipt_file.display()));
    if !done.receipt_file.starts_with(dir) {
        lines.push(format!(
            "nothing could be written to {}: bring the receipt to headquarters otherwise",
            dir.display()
        ));
    }
    Answer::new(exit, done, lines)
}

fn retry(relay: &Relay, pack: &PackName) -> Answer {
    if !relay.hall.state().attempts.contains_key(pack) {
        return Answer::failed(format!("{pack} has not failed here; see `store-relay status`"));
    }
    match relay.forgive(pack) {
        Ok(()) => {
            relay.hall.wake.notify_one();
            Answer::new(
                0,
                &json!({ "retried": pack }),
                vec![format!("{pack} is fetched and tried anew by the next cycle")],
            )
        }
        Err(e) => Answer::failed(e),
    }
}

/// A pack as people name it: with or without `packs/` in front.
pub fn pack_name(text: &str) -> Result<PackName, proto::ids::BadName> {
    match text.parse() {
        Ok(ObjectName::Pack(name)) => Ok(name),
        _ => text.parse(),
    }
}

/// The socket's address; a long path goes by way of its open directory, since addresses end at 108 bytes.
fn address(dir: &Path) -> io::Result<(PathBuf, Option<File>)> {
    let path = dir.join(SOCKET);
    if path.as_os_str().len() < 100 {
        return Ok((path, None));
    }
    let open = File::open(dir)?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", open.as_raw_fd())), Some(open)))
}

/// Opens the socket; only under the directory's lock.
pub fn listen(dir: &Path) -> io::Result<UnixListener> {
    shelf::remove(&dir.join(SOCKET)).map_err(|e| e.source)?;
    let (path, _open) = address(dir)?;
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Takes orders until the process ends.
pub async fn serve(relay: Arc<Relay>, listener: UnixListener) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let relay = Arc::clone(&relay);
                    tokio::spawn(async move {
                        if let Err(e) = converse(&relay, stream).await {
                            tracing::debug!(error = %e, "an order was not answered");
                        }
                    });
                }
                Err(e) => {
                    tracing::warn!(error = %e, "the control socket");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
            },
            () = relay.hall.stop.cancelled() => return,
        }
    }
}

async fn converse(relay: &Arc<Relay>, stream: UnixStream) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(MAX_LINE)).read_line(&mut line).await?;
    let answer = match serde_json::from_str(&line) {
        Ok(order) => {
            tracing::info!(?order, "order");
            let relay = Arc::clone(relay);
            // A folder is copied in one go: on a thread of its own, so that the LAN does not wait. An order that was taken is
            // carried out, though whoever gave it has gone.
            let handle = tokio::runtime::Handle::current();
            let done = tokio::task::spawn_blocking(move || handle.block_on(obey(&relay, order)));
            done.await.unwrap_or_else(Answer::failed)
        }
        Err(e) => Answer::failed(format!("not an order: {e}")),
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Asks the relay that runs on a data directory; `None` if none does.
pub async fn ask(dir: &Path, order: &Order) -> io::Result<Option<Answer>> {
    let Ok((path, _open)) = address(dir) else { return Ok(None) };
    let Ok(stream) = UnixStream::connect(&path).await else { return Ok(None) };
    let (read, mut write) = stream.into_split();
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    write.write_all(&line).await?;
    let mut answer = String::new();
    BufReader::new(read.take(MAX_LINE)).read_line(&mut answer).await?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the relay ended before it answered"));
    }
    Ok(Some(serde_json::from_str(&answer)?))
}

//! One installed program: its directory, its settings, its commands. Commands run in that directory, where the
//! settings file has its usual name.

use super::digests_of;
use crate::{Daemon, Output, Product, http};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Headquarters, a relay or a register.
#[derive(Debug)]
pub struct Node {
    /// Which program.
    pub product: Product,
    /// `hq`, `0421`, `0421-01`.
    pub id: String,
    /// Where its settings and data lie.
    pub dir: PathBuf,
    /// The port it listens on when it runs.
    pub port: u16,
    /// Environment of its commands.
    pub env: Vec<(String, String)>,
    settings: BTreeMap<String, String>,
    streams: String,
}

impl Node {
    /// A directory with a settings file that names a free port under `listen`.
    pub(super) fn new(product: Product, id: &str, dir: &Path, listen: &str) -> Node {
        std::fs::create_dir_all(dir).unwrap();
        let mut node = Node {
            product,
            id: id.into(),
            dir: dir.into(),
            port: crate::quiet_port(),
            env: Vec::new(),
            settings: BTreeMap::new(),
            streams: String::new(),
        };
        node.set_text(listen, &format!("127.0.0.1:{}", node.port));
        node
    }

    /// The settings file.
    pub fn config(&self) -> PathBuf {
        let name = match self.product {
            Product::Hq => "hq.toml",
            Product::Relay => "relay.toml",
            Product::Agent => "agent.toml",
        };
        self.dir.join(name)
    }

    /// Sets a key (dotted: `publish.deltas`) to a TOML value, and writes the file.
    pub fn set(&mut self, key: &str, value: &str) {
        self.settings.insert(key.into(), value.into());
        self.write();
    }

    /// Sets a key to a text.
    pub fn set_text(&mut self, key: &str, value: &str) {
        self.set(key, &toml_text(value));
    }

    /// Takes a key out.
    pub fn unset(&mut self, key: &str) {
        self.settings.remove(key);
        self.write();
    }

    /// The `[[stream]]` part of hq.toml.
    pub fn set_streams(&mut self, toml: &str) {
        self.streams = toml.into();
        self.write();
    }

    /// The `[[stream]]` part of hq.toml as it is, to change it.
    pub fn streams(&self) -> &str {
        &self.streams
    }

    /// The same node below another directory; `moves` are texts of its settings and what stands there now.
    pub(super) fn moved(&self, dir: &Path, port: u16, moves: &[(String, String)]) -> Node {
        let say = |v: &String| moves.iter().fold(v.clone(), |v, (from, to)| v.replace(from, to));
        let node = Node {
            product: self.product,
            id: self.id.clone(),
            dir: dir.into(),
            port,
            env: self.env.clone(),
            settings: self.settings.iter().map(|(k, v)| (k.clone(), say(v))).collect(),
            streams: self.streams.clone(),
        };
        node.write();
        node
    }

    fn write(&self) {
        let lines: String = self.settings.iter().map(|(k, v)| format!("{k} = {v}\n")).collect();
        std::fs::write(self.config(), format!("{lines}\n{}", self.streams)).unwrap();
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Runs a command with this node's settings.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Output {
        self.run_env(args, &[])
    }

    /// As [`Node::run`], with more environment.
    #[track_caller]
    pub fn run_env(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        self.product.run_env(&self.dir, args, &self.environment(env))
    }

    /// Starts a command and lets it run.
    #[track_caller]
    pub fn spawn(&self, args: &[&str], env: &[(&str, &str)]) -> crate::bins::Running {
        self.product.spawn_command(&self.dir, args, &self.environment(env))
    }

    /// Runs a command with `--json` and gives what it printed; panics unless it exits with 0.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        self.run(&args).ok().json()
    }

    /// `status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// The digests by table that `status --json` reports, of a relay or register.
    #[track_caller]
    pub fn digests(&self) -> BTreeMap<String, String> {
        let status = self.status();
        let streams = status["streams"].as_object().unwrap_or_else(|| panic!("no streams in {status:#}"));
        streams.values().flat_map(digests_of).collect()
    }

    /// The version of `price@zone-east` that `status --json` reports; None before the first.
    #[track_caller]
    pub fn version(&self, instance: &str) -> Option<u64> {
        self.status()["streams"][instance]["version"].as_u64()
    }

    /// Starts the daemon: `serve` at headquarters, else `run`.
    #[track_caller]
    pub fn start(&self) -> Daemon {
        self.start_env(&[])
    }

    /// As [`Node::start`], with more environment.
    #[track_caller]
    pub fn start_env(&self, env: &[(&str, &str)]) -> Daemon {
        let verb = if self.product == Product::Hq { "serve" } else { "run" };
        self.product.daemon(&self.dir, &[verb], &self.environment(env), &self.log())
    }

    /// Starts the daemon and waits until it answers HTTP.
    #[track_caller]
    pub fn start_ready(&self) -> Daemon {
        let mut daemon = self.start();
        let url = format!("{}/healthz", self.url());
        daemon.wait_until(&format!("GET {url} is not answered"), || http::try_get(&url).is_some());
        daemon
    }

    /// Whether a register that runs has checked all rows as it does at its start: damage that comes before is found then.
    pub fn has_checked_rows(&self) -> bool {
        let metrics = http::try_get(&format!("{}/metrics", self.url()));
        let count = |line: &str| line.strip_prefix("tillcast_agent_checks_total ")?.parse::<u64>().ok();
        metrics.is_some_and(|m| m.text().lines().filter_map(count).any(|n| n >= 1))
    }

    /// The log of this node's daemons.
    pub fn log(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    fn environment<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        self.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).chain(more.iter().copied()).collect()
    }
}

/// A TOML string: a literal where it can be, so that paths and queries stay readable.
fn toml_text(text: &str) -> String {
    if text.contains(['\'', '\n']) { serde_json::to_string(text).unwrap() } else { format!("'{text}'") }
}

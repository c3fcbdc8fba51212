//! The town: headquarters, two stores, four registers, all on this machine.

use anyhow::{Context, Result, bail};
use rusqlite::Connection;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::process::{Child, Command};

/// Stores and their registers.
pub const STORES: [(&str, [&str; 2]); 2] = [("0421", ["0421-01", "0421-02"]), ("0533", ["0533-01", "0533-02"])];

/// A program that runs.
#[derive(Debug)]
pub struct Running {
    /// Whose it is.
    pub id: String,
    /// Where it listens.
    pub url: String,
    child: Child,
}

impl Running {
    /// The process id.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }
    /// Ends it as a power cut would: no goodbye.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }
}

/// The whole installation in one directory.
#[derive(Debug)]
pub struct Town {
    /// Where everything lies.
    pub dir: PathBuf,
    /// The folder of the programs.
    pub programs: PathBuf,
    /// `hq-publisher serve`.
    pub hq: Option<Running>,
    /// The relays.
    pub relays: Vec<Running>,
    /// The registers' agents.
    pub agents: Vec<Running>,
    web: reqwest::Client,
}

/// A port that is free now.
fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Town {
    /// Lays out directories and headquarters' settings; nothing runs yet.
    pub fn build(dir: PathBuf, sample: &Path, smtp: u16) -> Result<Town> {
        let programs = std::env::current_exe()?.parent().context("no folder of programs")?.to_owned();
        let hq = dir.join("hq");
        for stream in ["catalog", "price", "promo"] {
            let file = format!("schema/{stream}.sql");
            let ddl = proto::shelf::read_bounded(&sample.join(&file), 1 << 20)?;
            proto::shelf::create_dir(&hq.join("schema"))?;
            proto::shelf::write_durable(&hq.join(&file), &ddl)?;
        }
        load_sample(&hq.join("hq.db"), sample)?;
        let port = free_port()?;
        proto::shelf::write_durable(&hq.join("hq.toml"), hq_toml(port, smtp).as_bytes())?;
        let web = reqwest::Client::builder().timeout(std::time::Duration::from_secs(5)).build()?;
        Ok(Town { dir, programs, hq: None, relays: Vec::new(), agents: Vec::new(), web })
    }

    /// The bucket.
    pub fn bucket(&self) -> PathBuf {
        self.dir.join("objects")
    }
    /// Headquarters' database.
    pub fn source(&self) -> Result<Connection> {
        Ok(Connection::open(self.dir.join("hq/hq.db"))?)
    }
    /// A register's database, as its POS application opens it.
    pub fn register_db(&self, id: &str) -> Result<Connection> {
        let file = self.dir.join(id).join("data/store.db");
        let db = Connection::open_with_flags(&file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
            .with_context(|| format!("opening {}", file.display()))?;
        db.busy_timeout(std::time::Duration::from_secs(5))?;
        Ok(db)
    }

    /// Runs one command of headquarters' and gives exit code and output.
    pub async fn hq(&self, arguments: &[&str]) -> Result<(i32, String)> {
        self.command("hq-publisher", &self.dir.join("hq"), arguments).await
    }

    async fn command(&self, program: &str, dir: &Path, arguments: &[&str]) -> Result<(i32, String)> {
        let out = Command::new(self.programs.join(program))
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::null())
            .output()
            .await
            .with_context(|| format!("running {program}"))?;
        let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        Ok((out.status.code().unwrap_or(-1), text))
    }

    /// The same, where anything but success is an error.
    async fn must(&self, program: &str, dir: &Path, arguments: &[&str]) -> Result<String> {
        let (code, text) = self.command(program, dir, arguments).await?;
        if code != 0 {
            bail!("{program} {} ended with {code}:\n{text}", arguments.join(" "));
        }
        Ok(text)
    }

    /// Keys at headquarters, and a code for every device.
    pub async fn enrol_all(&self, hq_url: &str) -> Result<Vec<(String, String)>> {
        let hq = self.dir.join("hq");
        self.must("hq-publisher", &hq, &["init"]).await?;
        let mut urls = Vec::new();
        for (store, registers) in STORES {
            let relay_url = format!("127.0.0.1:{}", free_port()?);
            let toml = format!(
                "store = \"{store}\"\ndata_dir = \"data\"\nsources = [\"file://{}\"]\nhq = \"{hq_url}\"\nlisten = \"{relay_url}\"\npoll = \"2s\"\nheartbeat = \"1s\"\nballast = \"0\"\n\n[tries]\nfirst_pause = \"100ms\"\nlater_pause = \"200ms\"\n",
                self.bucket().display()
            );
            self.enrol("store-relay", "relay.toml", store, &toml).await?;
            urls.push((store.to_owned(), relay_url.clone()));
            for id in registers {
                let local = format!("127.0.0.1:{}", free_port()?);
                let toml = format!(
                    "register = \"{id}\"\ndata_dir = \"data\"\nrelay = \"http://{relay_url}\"\nfallback = [\"file://{}\"]\nlocal_listen = \"{local}\"\nheartbeat = \"1s\"\nballast = \"0\"\n",
                    self.bucket().display()
                );
                self.enrol("pos-agent", "agent.toml", id, &toml).await?;
                urls.push((id.to_owned(), local));
            }
        }
        Ok(urls)
    }

    async fn enrol(&self, program: &str, file: &str, id: &str, toml: &str) -> Result<()> {
        let dir = self.dir.join(id);
        proto::shelf::create_dir(&dir)?;
        proto::shelf::write_durable(&dir.join(file), toml.as_bytes())?;
        let answer = self.must("hq-publisher", &self.dir.join("hq"), &["enroll", id, "--json"]).await?;
        let start = answer.find('{').context("enroll printed no JSON")?;
        let mut stream = serde_json::Deserializer::from_str(&answer[start..]).into_iter::<Value>();
        let answer = stream.next().context("enroll printed no JSON")??;
        let code = answer["code"].as_str().context("enroll printed no code")?;
        self.must(program, &dir, &["enroll", code]).await?;
        Ok(())
    }

    /// Starts a daemon; its log goes to a file beside its settings.
    pub async fn start(&self, program: &str, id: &str, verb: &str, url: &str) -> Result<Running> {
        let dir = self.dir.join(id);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log.txt"))?;
        let child = Command::new(self.programs.join(program))
            .arg(verb)
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        Ok(Running { id: id.to_owned(), url: format!("http://{url}"), child })
    }

    /// Whether something answers there.
    pub async fn is_up(&self, url: &str) -> bool {
        self.web.get(format!("{url}/healthz")).send().await.is_ok_and(|r| r.status().is_success())
    }
}

/// Fills headquarters' database from the sample's CSV files.
fn load_sample(file: &Path, sample: &Path) -> Result<()> {
    let mut db = Connection::open(file)?;
    db.execute_batch(
        "CREATE TABLE item (sku TEXT PRIMARY KEY, barcode TEXT, name TEXT, department TEXT, vat INTEGER);
         CREATE TABLE price (zone TEXT, sku TEXT, cents INTEGER, updated TEXT, PRIMARY KEY (zone, sku));
         CREATE TABLE promo (id INTEGER PRIMARY KEY, sku TEXT, percent INTEGER, starts TEXT, ends TEXT);
         CREATE TABLE store (id TEXT PRIMARY KEY, zone TEXT, region TEXT);",
    )?;
    let tx = db.transaction()?;
    for table in ["item", "price", "promo", "store"] {
        let mut reader = csv::Reader::from_path(sample.join(format!("{table}.csv")))?;
        let places = vec!["?"; reader.headers()?.len()].join(", ");
        let mut insert = tx.prepare(&format!("INSERT INTO {table} VALUES ({places})"))?;
        for row in reader.records() {
            insert.execute(rusqlite::params_from_iter(row?.iter()))?;
        }
    }
    tx.commit()?;
    Ok(())
}

fn hq_toml(port: u16, smtp: u16) -> String {
    format!(
        r#"# Headquarters of the demo.
[source]
url = "sqlite:hq.db"
[objects]
urls = ["file:../objects"]
[state]
dir = "state"
database = "sqlite:state/fleet.db"
[stores]
query = "SELECT id, zone, region FROM store"
[serve]
listen = "127.0.0.1:{port}"
[mail]
smtp = "smtp://127.0.0.1:{smtp}"
from = "tillcast@example.com"
to = ["it@example.com"]
[alerts]
# Minutes in a shop, seconds in a demo.
store_silent = "10s"
register_silent = "5s"
self_test = "0s"
disk_low_percent = 0

[[stream]]
name = "catalog"
audience = "all"
schema = "schema/catalog.sql"
[[stream.table]]
name = "item"
query = "SELECT sku, barcode, name, department, vat FROM item"

[[stream]]
name = "price"
audience = "zone"
schema = "schema/price.sql"
[[stream.table]]
name = "price"
query = "SELECT sku, cents, updated FROM price WHERE zone = :zone"

[[stream]]
name = "promo"
audience = "all"
schema = "schema/promo.sql"
[[stream.table]]
name = "promo"
query = "SELECT id, sku, percent, starts, ends FROM promo"
"#
    )
}

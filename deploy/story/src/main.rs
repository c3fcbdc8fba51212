//! The story that `deploy/demo` tells: a chain's main job, and what happens when things go wrong.
//! Every step is checked against what the registers' databases hold, not against what is logged.

mod post;
mod town;

use anyhow::{Context, Result, bail};
use clap::Parser;
use post::PostBox;
use proto::clock::{Clock, SystemClock};
use rusqlite::Connection;
use std::path::PathBuf;
use std::time::Duration;
use town::{Running, STORES, Town};

/// Headquarters, two stores and four registers on this machine.
#[derive(Debug, Parser)]
#[command(name = "tillcast-demo", version, about)]
struct Arguments {
    /// Tell the story, check each step, exit.
    #[arg(long)]
    once: bool,
    /// The sample's folder.
    #[arg(long, default_value = "deploy/sample")]
    sample: PathBuf,
    /// Where to lay everything out; a temporary directory if not given.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    proto::fetch::install_tls();
    match run(Arguments::parse()).await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nThe story ended badly: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    let temporary = tempfile::Builder::new().prefix("tillcast-demo-").tempdir()?;
    let dir = arguments.dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    proto::shelf::create_dir(&dir)?;
    let dir = dir.canonicalize()?;
    let (mails, smtp) = PostBox::open(dir.join("mail")).await?;
    let mut story = Story {
        town: Town::build(dir.clone(), &arguments.sample, smtp)?,
        mails,
        clock: SystemClock::default(),
        told: 0,
    };
    println!("\nEverything lies in {}\n", dir.display());
    // The seven programs end with this one, however it ends.
    let told = tokio::select! {
        told = story.tell() => told,
        () = proto::cli::shutdown_signal() => bail!("it was stopped"),
    };
    if let Err(e) = told {
        // The temporary directory holds the logs: keep it for whoever looks.
        let kept = temporary.keep();
        return Err(e.context(format!("logs are in {}", kept.display())));
    }
    println!("\n{} chapters, each as it should be.", story.told);
    if !arguments.once {
        story.show_addresses();
        proto::cli::shutdown_signal().await;
        println!();
    }
    Ok(())
}

struct Story {
    town: Town,
    mails: PostBox,
    clock: SystemClock,
    told: usize,
}

/// How long a step may take on a slow machine before the story gives up.
const PATIENCE: Duration = Duration::from_secs(60);

impl Story {
    async fn tell(&mut self) -> Result<()> {
        self.start_everything().await?;
        self.first_install().await?;
        self.a_price_changes().await?;
        self.a_poisoned_change().await?;
        self.a_corrupt_pack().await?;
        self.a_killed_register().await?;
        Ok(())
    }

    fn chapter(&mut self, title: &str) {
        self.told += 1;
        println!("{}. {title}", self.told);
    }

    fn say(&self, text: &str) {
        println!("   {text}");
    }

    /// Looks again and again until something holds.
    async fn wait<F: AsyncFnMut() -> Result<bool>>(&self, what: &str, mut holds: F) -> Result<Duration> {
        let start = self.clock.monotonic();
        loop {
            if holds().await? {
                return Ok(self.clock.monotonic() - start);
            }
            if self.clock.monotonic() - start > PATIENCE {
                bail!("{what}: not within {} s", PATIENCE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn mail(&self, about: &str, words: &[&str]) -> Result<()> {
        let has = |m: &post::Mail| words.iter().all(|w| m.subject.contains(w) || m.text.contains(w));
        let waited = self.wait(about, async || Ok(self.mails.all().iter().any(has))).await?;
        let mail = self.mails.all().into_iter().rev().find(has).context("the mail went missing")?;
        self.say(&format!("mail after {:.1} s: \"{}\"", waited.as_secs_f64(), mail.subject));
        Ok(())
    }

    async fn start_everything(&mut self) -> Result<()> {
        self.chapter("Headquarters makes its keys; two relays and four registers are enrolled and started");
        let toml = proto::shelf::read_bounded(&self.town.dir.join("hq/hq.toml"), 1 << 20)?;
        let toml = String::from_utf8(toml)?;
        let listen = toml.lines().find_map(|l| l.strip_prefix("listen = ")).context("hq.toml has no listen")?;
        let hq_address = listen.trim_matches('"').to_owned();
        let urls = self.town.enrol_all(&format!("http://{hq_address}")).await?;
        self.town.hq = Some(self.town.start("hq-publisher", "hq", "serve", &hq_address).await?);
        for (id, url) in urls {
            let is_relay = STORES.iter().any(|(s, _)| *s == id);
            let program = if is_relay { "store-relay" } else { "pos-agent" };
            let running = self.town.start(program, &id, "run", &url).await?;
            if is_relay { self.town.relays.push(running) } else { self.town.agents.push(running) }
        }
        let all: Vec<String> =
            self.town.hq.iter().chain(&self.town.relays).chain(&self.town.agents).map(|r| r.url.clone()).collect();
        for url in all {
            self.wait(&format!("{url} answers"), async || Ok(self.town.is_up(&url).await)).await?;
        }
        self.say("all seven answer");
        Ok(())
    }

    /// Waits until a query gives an answer on every register of a zone's store (or of all).
    async fn on_registers(&self, store: Option<&str>, what: &str, query: &str, wanted: &str) -> Result<Duration> {
        let ids: Vec<&str> =
            STORES.iter().filter(|(s, _)| store.is_none_or(|x| x == *s)).flat_map(|(_, r)| *r).collect();
        self.wait(what, async || Ok(ids.iter().all(|id| answers(self.town.register_db(id), query, wanted)))).await
    }

    async fn first_install(&mut self) -> Result<()> {
        self.chapter("The first publish: 3,000 items, prices of two zones, promotions");
        let start = self.clock.monotonic();
        self.publish(0).await?;
        let count = "SELECT (SELECT count(*) FROM item) + (SELECT count(*) FROM price) + (SELECT count(*) FROM promo)";
        self.on_registers(None, "every register holds the sample", count, "6180").await?;
        let took = self.clock.monotonic() - start;
        self.say(&format!(
            "four registers hold 6,180 rows each, {:.1} s after the publish was started",
            took.as_secs_f64()
        ));
        let digests: Vec<String> =
            ["0421-01", "0421-02"].iter().map(|id| digest(self.town.register_db(id))).collect::<Result<_>>()?;
        if digests[0] != digests[1] {
            bail!("two registers of one store differ: {digests:?}");
        }
        self.say(&format!("proof: the registers of store 0421 hold the same rows, catalog digest {}", digests[0]));
        Ok(())
    }

    async fn a_price_changes(&mut self) -> Result<()> {
        self.chapter("A price changes at headquarters, in zone east");
        let changed =
            "UPDATE price SET cents = 777, updated = '2026-01-06T08:00:00Z' WHERE zone = 'east' AND sku = '100042'";
        self.town.source()?.execute(changed, [])?;
        let start = self.clock.monotonic();
        self.publish(0).await?;
        self.on_registers(Some("0421"), "the new price", "SELECT cents FROM price WHERE sku = '100042'", "777").await?;
        let took = self.clock.monotonic() - start;
        self.say(&format!(
            "sku 100042 costs 7.77 on both registers of store 0421, {} ms after the commit at headquarters",
            took.as_millis()
        ));
        Ok(())
    }

    async fn a_poisoned_change(&mut self) -> Result<()> {
        self.chapter("Somebody writes a name of 101 characters, where the contract allows 100");
        let long = "x".repeat(101);
        let db = self.town.source()?;
        let name: String = db.query_row("SELECT name FROM item WHERE sku = '100007'", [], |r| r.get(0))?;
        db.execute("UPDATE item SET name = ?1 WHERE sku = '100007'", [&long])?;
        // 3: refused in part; the other streams had nothing to publish.
        let text = self.publish(3).await?;
        let line = text.lines().find(|l| l.contains("100007")).context("the publish did not name the row")?;
        self.say(&format!("refused: {}", line.trim()));
        self.mail("the mail about it", &["catalog", "100007"]).await?;
        db.execute("UPDATE item SET name = ?1 WHERE sku = '100007'", [&name])?;
        self.publish(0).await?;
        Ok(())
    }

    async fn a_corrupt_pack(&mut self) -> Result<()> {
        self.chapter("A pack in the bucket is damaged; prices go on");
        for relay in &self.town.relays {
            signal(relay, "STOP").await?;
        }
        let db = self.town.source()?;
        db.execute("UPDATE promo SET percent = 51 WHERE id = 1", [])?;
        db.execute("UPDATE price SET cents = 888 WHERE zone = 'east' AND sku = '100042'", [])?;
        self.publish(0).await?;
        let folder = self.town.bucket().join("packs/promo@all");
        let newest = proto::shelf::list(&folder)?
            .into_iter()
            .filter(|e| e.name.ends_with(".delta.pack"))
            .max_by_key(|e| e.name.clone());
        let newest = folder.join(newest.context("no promo delta in the bucket")?.name);
        let mut bytes = proto::shelf::read_bounded(&newest, 1 << 20)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        proto::shelf::write_durable(&newest, &bytes)?;
        self.say(&format!("one bit flipped in {}", newest.strip_prefix(&self.town.dir)?.display()));
        for relay in &self.town.relays {
            signal(relay, "CONT").await?;
        }
        self.on_registers(
            Some("0421"),
            "the price of the same publish",
            "SELECT cents FROM price WHERE sku = '100042'",
            "888",
        )
        .await?;
        self.say("the price of the same publish is on the registers");
        let errors = self.town.dir.join("0421/data/error");
        let reasons = || walk(&errors).into_iter().filter(|p| p.ends_with(".reason.json")).collect::<Vec<_>>();
        self.wait("the pack lies in error/", async || Ok(!reasons().is_empty())).await?;
        self.say(&format!("the pack lies in error/ of store 0421 with its reason: {}", reasons().join(", ")));
        self.mail("the mail about it", &["promo", "0421"]).await?;
        db.execute("UPDATE promo SET percent = 52 WHERE id = 1", [])?;
        self.publish(0).await?;
        self.on_registers(None, "the next publish goes round it", "SELECT percent FROM promo WHERE id = 1", "52")
            .await?;
        self.say("the next publish made a full too: every register went round the bad pack");
        Ok(())
    }

    async fn a_killed_register(&mut self) -> Result<()> {
        self.chapter("Register 0533-02 loses its power");
        let i = self.town.agents.iter().position(|a| a.id == "0533-02").context("no such register")?;
        self.town.agents[i].kill().await?;
        self.mail("the mail about it", &["0533-02", "silent"]).await?;
        let url = self.town.agents[i].url.trim_start_matches("http://").to_owned();
        self.town.agents[i] = self.town.start("pos-agent", "0533-02", "run", &url).await?;
        let before = self.mails.all().len();
        self.wait("the mail of its return", async || {
            Ok(self
                .mails
                .all()
                .iter()
                .skip(before.saturating_sub(1))
                .any(|m| m.subject.contains("0533-02") && m.subject.to_lowercase().contains("recovered")))
        })
        .await?;
        self.say("it is back; a second mail says so");
        Ok(())
    }

    /// Publishes; anything but the wanted exit code is an error that shows the output.
    async fn publish(&self, wanted: i32) -> Result<String> {
        let (code, text) = self.town.hq(&["publish"]).await?;
        if code != wanted {
            bail!("publish ended with {code}, not {wanted}:\n{text}");
        }
        Ok(text)
    }

    fn show_addresses(&self) {
        println!("\nLook around (Ctrl-C ends it):");
        if let Some(hq) = &self.town.hq {
            println!("  headquarters      {}/", hq.url);
        }
        for relay in &self.town.relays {
            println!("  store {}        {}/", relay.id, relay.url);
        }
        for agent in &self.town.agents {
            println!("  register {}  {}/v1/status", agent.id, agent.url);
        }
        println!("  mails             {}/mail/", self.town.dir.display());
        println!("  bucket            {}", self.town.bucket().display());
        println!(
            "\nTry: sqlite3 {0}/hq/hq.db \"UPDATE price SET cents = 99\"; cd {0}/hq && {1}/hq-publisher publish",
            self.town.dir.display(),
            self.town.programs.display()
        );
    }
}

/// Whether a register's database answers a query so; one that is not there yet does not.
fn answers(db: Result<Connection>, query: &str, wanted: &str) -> bool {
    let value = db.and_then(|db| Ok(db.query_row(query, [], |r| r.get::<_, i64>(0))?));
    value.is_ok_and(|v| v.to_string() == wanted)
}

fn digest(db: Result<Connection>) -> Result<String> {
    Ok(db?.query_row("SELECT digest FROM tillcast_table WHERE name = 'item'", [], |r| r.get(0))?)
}

/// The files below a directory, by path.
fn walk(dir: &std::path::Path) -> Vec<String> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { out.extend(walk(&path)) } else { out.push(path.display().to_string()) }
    }
    out
}

async fn signal(process: &Running, name: &str) -> Result<()> {
    let pid = process.pid().context("it has ended")?.to_string();
    let status = tokio::process::Command::new("kill").args([&format!("-{name}"), &pid]).status().await?;
    if !status.success() {
        bail!("kill -{name} {pid} failed");
    }
    Ok(())
}

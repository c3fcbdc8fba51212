//! One cell from its beginning to its end: damage, what the programs show, what must hold all the while, the healing.

use crate::places::{Digests, Kind, Prepared, RIGHTS, Stage, Target, beside, damaged_news, news};
use crate::table::{Cell, ITSELF};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};
use tillcast_tests::site::Node;
use tillcast_tests::{Daemon, Output, Site, digest, files, forge, http};

/// The cycles within which what heals by itself has healed.
const CYCLES: usize = 6;
/// The same where the programs run, for machines that are busy.
const WAIT: Duration = tillcast_tests::PATIENCE;

/// What one program showed.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    pub exit: Option<i32>,
    /// Codes of faults, with the reason's own code behind a `REFUSED` and the like.
    pub codes: BTreeSet<String>,
    /// All that it wrote.
    pub text: String,
}

/// What a cell came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub shown: BTreeMap<&'static str, Shown>,
    /// What healed it; none: nothing that was tried.
    pub healed: Option<String>,
    /// How things stood when the last remedy was given up.
    pub left: String,
}

/// A cell at work.
pub struct Work<'a> {
    cell: &'a Cell,
    target: &'a Target,
    prepared: &'a Prepared,
    site: Site,
    out: Outcome,
    relay: Option<Daemon>,
    register: Option<Daemon>,
    hq: Option<Daemon>,
    /// A person has done something: what is seen from now on is not the fault's.
    is_mended: bool,
    /// Tries whatever may heal; else only what the table says.
    explore: bool,
}

const REGISTER: &str = "0421-01";
/// The third version's: the first, and the two that a rotation makes.
const TRUST_FILES: u64 = 3;

/// Runs a cell; an error is an invariant that broke.
pub fn run(cell: &Cell, target: &Target, prepared: &Prepared, explore: bool) -> Result<Outcome, String> {
    let site = target.site(prepared);
    let out = Outcome::default();
    let mut work =
        Work { cell, target, prepared, site, out, relay: None, register: None, hq: None, is_mended: false, explore };
    match target.stage {
        Stage::Receipt => work.receipt()?,
        Stage::Headquarters => work.headquarters()?,
        _ if cell.running => work.while_running()?,
        _ => work.while_stopped()?,
    }
    work.rows_are_published()?;
    Ok(work.out)
}

impl Work<'_> {
    fn relay_node(&self) -> &Node {
        self.site.relay("0421")
    }
    fn register_node(&self) -> &Node {
        self.site.register(REGISTER)
    }

    fn while_stopped(&mut self) -> Result<(), String> {
        self.damage_and_news();
        let once = self.relay_node().run(&["once", "--json"]);
        self.note("relay", &once);
        self.start_relay();
        self.served_is_good()?;
        let once = self.register_node().run(&["once", "--json"]);
        self.note("register", &once);
        self.rows_are_published()?;
        self.note_status("relay");
        self.await_events();
        self.note_events();
        self.heal_stopped()
    }

    fn damage_and_news(&mut self) {
        let third = &self.prepared.third;
        match self.target.stage {
            Stage::Bucket => {
                let damage = |other: &Site| self.target.damage(other, self.prepared, self.cell);
                damaged_news(&self.site, third, damage);
            }
            Stage::Device | Stage::Left => {
                self.target.damage(&self.site, self.prepared, self.cell);
                news(&self.site, third);
            }
            _ => self.target.damage(&self.site, self.prepared, self.cell),
        }
    }

    fn heal_stopped(&mut self) -> Result<(), String> {
        for remedy in self.remedies() {
            if remedy != ITSELF {
                (self.relay, self.register) = (None, None);
                self.remedy(remedy);
                self.start_relay();
            }
            for _ in 0..CYCLES {
                if self.has_converged(&self.status_of()) {
                    self.out.healed = Some(remedy.to_owned());
                    return self.served_is_good();
                }
                if self.relay.is_none() {
                    self.start_relay();
                }
                self.relay_node().run(&["once"]);
                self.register_node().run(&["once"]);
                self.rows_are_published()?;
            }
        }
        self.out.left = format!("{:#?}", self.status_of());
        Ok(())
    }

    /// What is tried to heal it, in order.
    fn remedies(&self) -> Vec<&'static str> {
        if self.explore {
            [ITSELF].into_iter().chain(self.target.remedies.iter().copied()).collect()
        } else {
            vec![self.cell.healed]
        }
    }

    fn while_running(&mut self) -> Result<(), String> {
        self.start_relay();
        let daemon = self.register_node().start_ready();
        self.register = Some(daemon);
        // What is in the log yet is not damaged with the file.
        let log = self.site.store_db(REGISTER).with_extension("db-wal");
        let is_cut = || fs::metadata(&log).map_or(0, |m| m.len()) == 0;
        let ready = |w: &Self| {
            let status = w.status_of();
            // Its first look at its source is not in the midst of the damage; by sticks alone there is none.
            let has_looked = w.target.stage == Stage::Import || status["relay"]["network"] == "online";
            has_looked && w.settled(&status) && is_cut() && w.register_node().has_checked_rows()
        };
        if !self.wait(WAIT, ready)? {
            return Err(format!("it does not come up: {:#?}", self.status_of()));
        }
        self.out.shown.clear();
        self.damage_and_news();
        if self.target.stage == Stage::Import {
            let stick = self.prepared.third.bucket();
            let done = self.relay_node().run(&["import", stick.to_str().unwrap(), "--json"]);
            self.note("relay", &done);
        }
        for remedy in self.remedies() {
            if remedy != ITSELF {
                let seen = |w: &Self| w.has_shown_all();
                self.wait(if self.explore { Duration::ZERO } else { WAIT }, seen)?;
                self.note_logs();
                self.is_mended = true;
                (self.relay, self.register) = (None, None);
                self.remedy(remedy);
                self.start_relay();
                let started = self.start(self.register_node());
                self.register = started.0;
            }
            let converged = |w: &Self| w.has_converged(&w.status_of());
            let patience = if self.explore { Duration::from_secs(8) } else { WAIT };
            if self.wait(patience, converged)? {
                self.out.healed = Some(remedy.to_owned());
                break;
            }
        }
        if self.out.healed.is_none() {
            self.out.left = format!("{:#?}", self.status_of());
        }
        self.served_is_good()?;
        if !self.is_mended {
            // What the relay found as it answered just now is said a moment later.
            self.wait(if self.explore { Duration::ZERO } else { WAIT }, |w: &Self| w.has_shown_all())?;
            self.note_logs();
        }
        Ok(())
    }

    /// Looks on until it holds; takes down what the programs show meanwhile.
    fn wait(&mut self, patience: Duration, holds: impl Fn(&Self) -> bool) -> Result<bool, String> {
        let end = Instant::now() + patience;
        let mut looks = 0_u32;
        loop {
            for (who, status) in self.status_of() {
                self.note_faults(who, &status["errors"]);
                self.note_debts(who, &status["debts"]);
            }
            self.rows_are_published()?;
            // A dozen requests: not at each look.
            if looks.is_multiple_of(4) {
                self.served_is_good()?;
            }
            if holds(self) {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            looks += 1;
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    fn has_shown_all(&self) -> bool {
        self.is_all_in(logs(&self.site))
    }

    /// Whether all that the table wants is in these texts, the relay's events and what was taken down.
    fn is_all_in(&self, mut texts: BTreeMap<&'static str, String>) -> bool {
        for (who, shown) in &self.out.shown {
            let all: String = shown.codes.iter().cloned().collect::<Vec<_>>().join(" ");
            *texts.entry(*who).or_default() += &(all + &shown.text);
        }
        for (code, text) in self.relay_events() {
            *texts.entry("relay").or_default() += &format!("{code} {text}");
        }
        let said = |(who, e): (&str, crate::table::Expected)| {
            e.words.iter().all(|w| texts.get(who).is_some_and(|l| l.contains(w)))
        };
        self.cell.expected().into_iter().all(said)
    }

    /// The relay writes down a moment later what it found as it answered.
    fn await_events(&self) {
        let end = Instant::now() + if self.explore { Duration::ZERO } else { WAIT };
        while !self.is_all_in(BTreeMap::new()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    fn start_relay(&mut self) {
        let (daemon, exit) = self.start(self.relay_node());
        self.relay = daemon;
        if let Some(exit) = exit {
            let log = fs::read_to_string(self.relay_node().log()).unwrap_or_default();
            let shown = self.out.shown.entry("relay").or_default();
            shown.text += &log;
            shown.exit.get_or_insert(exit);
        }
    }

    /// A daemon that answers, or the code that it ended with.
    fn start(&self, node: &Node) -> (Option<Daemon>, Option<i32>) {
        let mut daemon = node.start();
        let url = format!("{}/healthz", node.url());
        let end = Instant::now() + WAIT;
        loop {
            if http::try_get(&url).is_some() {
                return (Some(daemon), None);
            }
            if !daemon.process.is_running() {
                return (None, daemon.process.wait(Duration::from_secs(1)).code());
            }
            assert!(Instant::now() < end, "{}: {url} does not answer", self.cell.name());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// `status --json` of relay and register, by their own API where they run.
    fn status_of(&self) -> BTreeMap<&'static str, Value> {
        let of = |node: &Node, runs: bool| {
            let by_api = || http::try_get(&format!("{}/v1/status", node.url())).filter(|r| r.status == 200);
            if runs && let Some(reply) = by_api() {
                return reply.json();
            }
            let out = node.run(&["status", "--json"]);
            if out.code == Some(0) { out.json() } else { Value::Null }
        };
        let relay = of(self.relay_node(), self.relay.is_some());
        let register = of(self.register_node(), self.register.is_some());
        BTreeMap::from([("relay", relay), ("register", register)])
    }

    fn settled(&self, status: &BTreeMap<&'static str, Value>) -> bool {
        let quiet = |s: &Value| s["errors"].as_array().is_some_and(Vec::is_empty);
        let here = |s: &Value| digests(s) == self.prepared.rows[1];
        let skip_errors = matches!(self.target.stage, Stage::Refused);
        let relay_well = self.target.stage == Stage::Left || quiet(&status["relay"]) || skip_errors;
        relay_well && status.values().all(here) && quiet(&status["register"])
    }

    /// Everybody at the third version, proved from the rows, and nobody complains.
    fn has_converged(&self, status: &BTreeMap<&'static str, Value>) -> bool {
        let goal = &self.goal();
        let quiet = |s: &Value| s["errors"].as_array().is_some_and(Vec::is_empty);
        status.values().all(|s| quiet(s) && &digests(s) == goal) && self.rows().as_ref() == Some(goal)
    }

    fn goal(&self) -> Digests {
        match self.target.stage {
            Stage::Headquarters => self.site.expected("0421"),
            _ => self.prepared.rows[2].clone(),
        }
    }

    /// The register's rows; none where there is no table to read.
    fn rows(&self) -> Option<Digests> {
        let path = self.site.store_db(REGISTER);
        let read = || Some(digest::of_database(&path)).filter(|d| !d.is_empty());
        // A file that SQLite cannot read makes the checker panic: that is the damage, not a wrong row.
        std::panic::catch_unwind(read).ok().flatten()
    }

    /// The register holds one published version. Where its own file was damaged, that is so once it was looked at.
    fn rows_are_published(&self) -> Result<(), String> {
        let own = self.target.name.starts_with("store.db") && self.out.healed.is_none();
        match self.rows() {
            _ if own => Ok(()),
            Some(rows) if self.prepared.rows.contains(&rows) || rows == self.goal() => Ok(()),
            rows => Err(format!("the register sells what was never published: {rows:#?}")),
        }
    }

    /// What the LAN is given under a listed pack's name is that pack; lists and trust files are headquarters' own.
    fn served_is_good(&self) -> Result<(), String> {
        if self.relay.is_none() {
            return Ok(());
        }
        let url = |name: &str| format!("{}/{name}", self.relay_node().url());
        let get = |name: &str| http::try_request("GET", &url(name), &[], b"").ok().filter(|r| r.status == 200);
        let root = self.prepared.second.signing_key("root");
        let versions = (1..=TRUST_FILES).map(|n| (format!("trust/{n:010}.json"), Some(n)));
        for (name, version) in versions.chain([("trust.json".to_owned(), None)]) {
            let Some(served) = get(&name) else { continue };
            let is_sealed = forge::is_sealed_by("trust", &served.body, &root);
            if !is_sealed || version.is_some_and(|v| forge::payload(&served.body)["version"] != v) {
                return Err(format!("the relay serves a damaged {name}"));
            }
        }
        let Some(manifest) = get("stores/0421/manifest.json") else { return Ok(()) };
        let keys = [&self.prepared.second, &self.prepared.third].map(|s| s.signing_key("publisher"));
        if !keys.iter().any(|key| forge::is_sealed_by("manifest", &manifest.body, key)) {
            return Err("the relay serves a damaged manifest".into());
        }
        let manifest = forge::payload(&manifest.body);
        for (stream, entry) in manifest["streams"].as_object().unwrap() {
            for pack in entry["packs"].as_array().unwrap() {
                let (version, kind) = (pack["version"].as_u64().unwrap(), pack["kind"].as_str().unwrap());
                let name = format!("packs/{stream}@{}/{version:010}.{kind}.pack", entry["audience"].as_str().unwrap());
                if get(&name).is_some_and(|p| forge::sha256(&p.body) != pack["sha256"].as_str().unwrap()) {
                    return Err(format!("the relay serves {name} damaged"));
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, who: &'static str, out: &Output) {
        let json: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
        let errors = if json["status"]["errors"].is_array() { &json["status"]["errors"] } else { &json["errors"] };
        self.note_faults(who, errors);
        let shown = self.out.shown.entry(who).or_default();
        shown.exit = shown.exit.or(out.code);
        shown.text += &out.text();
    }

    fn note_faults(&mut self, who: &'static str, errors: &Value) {
        if self.is_mended {
            return;
        }
        for e in errors.as_array().into_iter().flatten() {
            let text = e["text"].as_str().unwrap_or_default();
            let shown = self.out.shown.entry(who).or_default();
            shown.codes.extend(codes(e["code"].as_str().unwrap_or_default(), text));
            if !shown.text.contains(text) {
                shown.text += text;
            }
        }
    }

    fn note_debts(&mut self, who: &'static str, debts: &Value) {
        let text = debts.to_string();
        let shown = self.out.shown.entry(who).or_default();
        if !shown.text.contains(&text) {
            shown.text += &text;
        }
    }

    fn note_status(&mut self, who: &'static str) {
        let status = self.status_of().remove(who).unwrap_or_default();
        self.note_faults(who, &status["errors"]);
    }

    /// The relay's event log: what came and went between two looks.
    fn note_events(&mut self) {
        for (code, text) in self.relay_events() {
            let shown = self.out.shown.entry("relay").or_default();
            shown.codes.extend(codes(&code, &text));
            shown.text += &text;
        }
    }

    /// Those of its log that tell of something wrong.
    fn relay_events(&self) -> Vec<(String, String)> {
        let mut all = self.relay_log().unwrap_or_default();
        all.retain(|(code, _)| !["MENDED", "IMPORT", "HEALED", "STREAM_GONE"].contains(&code.as_str()));
        all
    }

    fn relay_log(&self) -> rusqlite::Result<Vec<(String, String)>> {
        let path = self.relay_node().dir.join("data/relay.db");
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let db = rusqlite::Connection::open_with_flags(path, flags)?;
        let mut list = db.prepare("SELECT code, text FROM event")?;
        list.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?.collect()
    }

    fn note_logs(&mut self) {
        for (who, text) in logs(&self.site) {
            self.out.shown.entry(who).or_default().text += &text;
        }
        self.note_events();
    }

    /// A receipt: read back at headquarters.
    fn receipt(&mut self) -> Result<(), String> {
        let stick = self.site.dir().join("stick");
        news(&self.site, &self.prepared.third);
        files::copy_all(&self.site.bucket(), &stick);
        if self.cell.running {
            self.start_relay();
        }
        let file = self.target.file(&self.site);
        let import = |w: &Self| {
            let done = w.relay_node().run(&["import", stick.to_str().unwrap(), "--json"]).ok().json();
            fs::rename(done["receipt_file"].as_str().unwrap(), &file).unwrap();
        };
        import(self);
        if self.cell.fault == "roll back" {
            // The receipt of an earlier journey.
            let old = self.prepared.second.copy();
            let earlier = old.relay("0421").run(&["import", old.bucket().to_str().unwrap(), "--json"]).ok().json();
            fs::copy(earlier["receipt_file"].as_str().unwrap(), &file).unwrap();
        } else {
            self.target.damage(&self.site, self.prepared, self.cell);
        }
        let read = self.site.hq.run(&["receipt", file.to_str().unwrap(), "--json"]);
        self.note("hq", &read);
        for remedy in self.remedies() {
            if remedy != ITSELF {
                let _ = fs::remove_file(&file);
                import(self);
            }
            let again = self.site.hq.run(&["receipt", file.to_str().unwrap(), "--json"]);
            let line = &again.json()[0];
            if again.code == Some(0) && line["behind"].is_null() && line["differ"].is_null() {
                self.out.healed = Some(remedy.to_owned());
                break;
            }
        }
        Ok(())
    }

    /// Headquarters' own files: it publishes all the same, or says why not.
    fn headquarters(&mut self) -> Result<(), String> {
        if self.cell.running {
            self.hq = Some(self.site.hq.start_ready());
            // What it writes at its start is over. A log that is not empty is another file's to whoever comes after.
            let ledger = self.site.hq.dir.join("state/fleet.db");
            tillcast_tests::until(WAIT, "headquarters rests", || {
                crate::places::settle(&ledger);
                std::thread::sleep(Duration::from_millis(300));
                fs::metadata(beside(&ledger, "-wal")).map_or(0, |m| m.len()) == 0
            });
        }
        self.target.damage(&self.site, self.prepared, self.cell);
        self.site.sql("UPDATE price SET price_cents = 4321 WHERE sku < 'SKU0000030'");
        let publish = self.site.hq.run(&["publish"]);
        self.note("hq", &publish);
        self.start_relay();
        for remedy in self.remedies() {
            if remedy != ITSELF {
                self.hq = None;
                self.remedy(remedy);
            }
            for _ in 0..CYCLES {
                let publish = self.site.hq.run(&["publish"]);
                self.relay_node().run(&["once"]);
                self.register_node().run(&["once"]);
                self.rows_are_published()?;
                self.served_is_good()?;
                let (verify, status) = (self.site.hq.run(&["verify"]), self.status_of());
                if publish.code == Some(0) && self.has_converged(&status) && verify.code == Some(0) {
                    self.out.healed = Some(remedy.to_owned());
                    return Ok(());
                }
                self.out.left = format!("{}\n{}\n{status:#?}", publish.text(), verify.text());
            }
        }
        Ok(())
    }

    /// A list that is not what was signed is told of first, and gone above when run again.
    fn publish_as_told(&self, args: &[&str]) {
        if self.site.hq.run(args).text().contains("signed by our key") {
            self.site.hq.run(args);
        }
    }

    /// What a person does.
    fn remedy(&mut self, remedy: &str) {
        let file = self.target.file(&self.site);
        let (relay, register) = (self.relay_node(), self.register_node());
        match remedy {
            "a restart" => {}
            "`publish`" => self.publish_as_told(&["publish"]),
            "`publish --full`" => self.publish_as_told(&["publish", "--full"]),
            "`store-relay verify`" => drop(relay.run(&["verify"])),
            "`pos-agent verify`" => drop(register.run(&["verify"])),
            "`store-relay import` again" => {
                let stick = self.prepared.third.bucket();
                drop(relay.run(&["import", stick.to_str().unwrap(), "--json"]));
            }
            "`verify --mend`" => drop(self.site.hq.run(&["verify", "--mend"])),
            "the next publish" => news(&self.site, &self.prepared.third),
            "owner and mode put right, a restart, and the next publish" => {
                self.remedy(RIGHTS);
                self.remedy("the next publish");
            }
            RIGHTS => {
                let mode = match self.target.kind {
                    Kind::Database | Kind::Log | Kind::Key => 0o600,
                    Kind::Directory => 0o755,
                    _ => 0o644,
                };
                // What SQLite made beside a database has its mode.
                for file in ["", "-wal", "-shm"].map(|end| beside(&file, end)).iter().filter(|f| f.exists()) {
                    if rustix::process::geteuid().is_root() {
                        std::os::unix::fs::chown(file, Some(0), Some(0)).unwrap();
                    }
                    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
                }
            }
            "the file moved away, and a restart" | "the file moved away, and `publish`" => {
                for end in ["-wal", "-shm", ""] {
                    let _ = fs::rename(beside(&file, end), beside(&file, &format!(".old{end}")));
                }
            }
            "the key file put back, and `publish`" => {
                fs::remove_file(&file).ok();
                fs::copy(self.target.file(&self.prepared.second), &file).unwrap();
            }
            "the relay enrolled anew" | "the register enrolled anew" => {
                for end in ["-wal", "-shm", ""] {
                    let _ = fs::remove_file(beside(&file, end));
                }
                let node = if self.target.is_registers() { register } else { relay };
                let code = self.site.hq.json(&["enroll", &node.id])["code"].as_str().unwrap().to_owned();
                node.run(&["enroll", &code]).ok();
            }
            other => panic!("{}: nobody knows how to do `{other}`", self.cell.name()),
        }
    }
}

/// What the daemons wrote so far.
fn logs(site: &Site) -> BTreeMap<&'static str, String> {
    let read = |n: &Node| String::from_utf8_lossy(&fs::read(n.log()).unwrap_or_default()).into_owned();
    BTreeMap::from([("relay", read(site.relay("0421"))), ("register", read(site.register(REGISTER)))])
}

/// The digests by table that a status reports.
fn digests(status: &Value) -> Digests {
    let streams = status["streams"].as_object().into_iter().flat_map(|s| s.values());
    let tables = streams.filter_map(|s| s["digests"].as_object()).flatten();
    tables.map(|(t, d)| (t.clone(), d.as_str().unwrap_or_default().to_owned())).collect()
}

/// A fault's code, and the reason's own where its text begins with one.
fn codes(code: &str, text: &str) -> Vec<String> {
    let own = text.split(':').next().filter(|c| c.len() > 3 && c.chars().all(|c| c.is_ascii_uppercase() || c == '_'));
    [code].into_iter().chain(own).map(str::to_owned).collect()
}

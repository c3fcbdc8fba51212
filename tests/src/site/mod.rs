//! A whole installation in a temporary directory: headquarters with a sample of two zones, stores, registers.
//! Steps are driven by hand (`publish`, `once`); daemons are started by whoever wants them.

mod node;
mod sample;

pub use node::Node;
pub use sample::{DDL, model_tables, sample_sql};

use crate::servers::{S3, StandIn};
use crate::{Output, Product, digest, forge, servers};
use ed25519_dalek::SigningKey;
use rusqlite::Connection;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// Where headquarters reads its rows.
#[derive(Debug, Clone, Default)]
pub enum Source {
    /// A SQLite file.
    #[default]
    Sqlite,
    /// A database of a PostgreSQL server; one is made for this site.
    Postgres(Arc<servers::Postgres>),
    /// The same in MariaDB.
    MariaDb(Arc<servers::MariaDb>),
    /// CSV drops; [`Site::drop_all`] makes them from the model.
    Inbox,
}

/// Where the objects lie.
#[derive(Debug, Clone, Default)]
pub enum Objects {
    /// A directory.
    #[default]
    Directory,
    /// A real S3 server.
    S3(Arc<S3>),
    /// The stand-in for OSS and other copies of S3.
    StandIn(Arc<StandIn>),
}

/// What a site shall be.
#[derive(Debug, Clone)]
pub struct Builder {
    stores: Vec<(String, String)>,
    registers: usize,
    items: usize,
    source: Source,
    objects: Objects,
    prefix: String,
    hq_service: bool,
    hq_settings: Vec<(String, String)>,
    relay_settings: Vec<(String, String)>,
    agent_settings: Vec<(String, String)>,
}

impl Builder {
    /// The stores as (id, zone). Default: `0421` in `east`, `0815` in `west`.
    #[must_use]
    pub fn stores(mut self, stores: &[(&str, &str)]) -> Self {
        self.stores = stores.iter().map(|(s, z)| ((*s).to_owned(), (*z).to_owned())).collect();
        self
    }
    /// Registers a store, `0421-01` and so on. Default: 2.
    #[must_use]
    pub fn registers(mut self, n: usize) -> Self {
        self.registers = n;
        self
    }
    /// Items in the catalog. Default: 200.
    #[must_use]
    pub fn items(mut self, n: usize) -> Self {
        self.items = n;
        self
    }
    /// Where headquarters reads. Default: SQLite.
    #[must_use]
    pub fn source(mut self, source: Source) -> Self {
        self.source = source;
        self
    }
    /// Where the objects lie. Default: a directory.
    #[must_use]
    pub fn objects(mut self, objects: Objects) -> Self {
        self.objects = objects;
        self
    }
    /// The prefix in an S3 bucket. Default: none.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = format!("/{prefix}");
        self
    }
    /// Relays know headquarters' service (which the test starts: `site.hq.start("serve")`). Default: they only poll.
    #[must_use]
    pub fn hq_service(mut self) -> Self {
        self.hq_service = true;
        self
    }
    /// A setting of hq.toml: a dotted key and a TOML value, `("publish.deltas", "3")`.
    #[must_use]
    pub fn hq(mut self, key: &str, value: &str) -> Self {
        self.hq_settings.push((key.into(), value.into()));
        self
    }
    /// Headquarters sends its mails there.
    #[must_use]
    pub fn mail(self, smtp: &servers::Smtp) -> Self {
        let site = self.hq("mail.smtp", &format!("'{}'", smtp.url()));
        site.hq("mail.from", "'tillcast@example.com'").hq("mail.to", "['it@example.com']")
    }
    /// A setting of every relay.toml.
    #[must_use]
    pub fn relay(mut self, key: &str, value: &str) -> Self {
        self.relay_settings.push((key.into(), value.into()));
        self
    }
    /// A setting of every agent.toml.
    #[must_use]
    pub fn agent(mut self, key: &str, value: &str) -> Self {
        self.agent_settings.push((key.into(), value.into()));
        self
    }

    /// Writes all files, runs `init` and enrols everybody. Publishes nothing, but from an inbox the sample:
    /// headquarters learns of its stores there.
    #[track_caller]
    pub fn build(self) -> Site {
        let mut site = self.prepare();
        site.hq.run(&["init"]).ok();
        if matches!(site.source, Source::Inbox) {
            site.drop_all();
            site.publish();
        }
        let (relays, registers): (Vec<String>, Vec<String>) =
            (site.relays.keys().cloned().collect(), site.registers.keys().cloned().collect());
        relays.iter().chain(&registers).for_each(|id| site.enroll(id));
        site
    }

    /// As [`Builder::build`], but nothing is run: no keys, nobody enrolled.
    #[track_caller]
    pub fn prepare(self) -> Site {
        let dir = crate::temp_dir("site");
        let mut site = Site {
            hq: self.hq_node(dir.path()),
            relays: BTreeMap::new(),
            registers: BTreeMap::new(),
            source: self.source.clone(),
            objects: self.objects.clone(),
            prefix: self.prefix.clone(),
            database: format!("site_{}", unique()),
            dir,
        };
        self.connect_source(&mut site);
        site.sql(&sample_sql(&self.stores, self.items));
        if matches!(self.source, Source::Inbox) {
            // An empty field of a CSV is NULL where the column may be: such a source cannot tell them apart.
            site.sql("UPDATE item SET note = NULL WHERE note = ''");
        }
        for (store, _) in &self.stores {
            let relay = self.relay_node(&site, store);
            for n in 1..=self.registers {
                let id = format!("{store}-{n:02}");
                let agent = self.agent_node(&site, &id, &relay.url());
                site.registers.insert(id, agent);
            }
            site.relays.insert(store.clone(), relay);
        }
        site
    }

    fn hq_node(&self, dir: &Path) -> Node {
        let mut hq = Node::new(Product::Hq, "hq", &dir.join("hq"), "serve.listen");
        std::fs::create_dir_all(hq.dir.join("schema")).unwrap();
        for (stream, ddl) in DDL {
            std::fs::write(hq.dir.join(format!("schema/{stream}.sql")), ddl).unwrap();
        }
        hq.set_text("source.url", "sqlite:source.db");
        hq.set_text("state.dir", "state");
        // A mail server that is gone refuses at once.
        hq.set("publish.mail_wait", "\"60s\"");
        if !matches!(self.source, Source::Inbox) {
            hq.set_text("stores.query", "SELECT id, zone, region FROM store ORDER BY id");
        }
        // What the machine that runs the tests has to say of itself.
        hq.set("alerts.disk_low_percent", "0");
        hq.set("alerts.self_test", "'0s'");
        hq.set_streams(&sample::streams(matches!(self.source, Source::Inbox)));
        self.objects_of(dir, &mut hq, "objects.urls", "objects.s3");
        self.hq_settings.iter().for_each(|(k, v)| hq.set(k, v));
        hq
    }

    /// The bucket's settings and keys, for whoever writes or reads it.
    fn objects_of(&self, dir: &Path, node: &mut Node, urls: &str, s3: &str) {
        let (endpoint, env) = match &self.objects {
            Objects::Directory => return node.set(urls, &format!("[\"file://{}\"]", dir.join("objects").display())),
            Objects::S3(s) => (s.endpoint(), s.env()),
            Objects::StandIn(s) => (s.endpoint(), s.env()),
        };
        node.set(urls, &format!("[\"s3://packs{}\"]", self.prefix));
        node.set_text(&format!("{s3}.endpoint"), &endpoint);
        node.set_text(&format!("{s3}.region"), "us-east-1");
        node.env.extend(env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    }

    fn connect_source(&self, site: &mut Site) {
        match &self.source {
            Source::Sqlite => {}
            Source::Postgres(pg) => site.hq.set_text("source.url", &pg.create_database(&site.database)),
            Source::MariaDb(db) => site.hq.set_text("source.url", &db.create_database(&site.database)),
            Source::Inbox => {
                std::fs::create_dir_all(site.inbox()).unwrap();
                site.hq.set_text("source.url", "inbox:inbox");
            }
        }
    }

    fn relay_node(&self, site: &Site, store: &str) -> Node {
        let mut relay = Node::new(Product::Relay, store, &site.dir.path().join(format!("relay-{store}")), "listen");
        relay.set_text("store", store);
        relay.set_text("data_dir", "data");
        self.objects_of(site.dir.path(), &mut relay, "sources", "source.s3");
        if self.hq_service {
            relay.set_text("hq", &site.hq.url());
        }
        for (key, value) in [
            ("poll", "\"1s\""),
            ("heartbeat", "\"1s\""),
            ("ballast", "0"),
            ("tries.first_pause", "\"10ms\""),
            ("tries.later_pause", "\"10ms\""),
            ("http.per_ip", "512"),
        ] {
            relay.set(key, value);
        }
        self.relay_settings.iter().for_each(|(k, v)| relay.set(k, v));
        relay
    }

    fn agent_node(&self, site: &Site, id: &str, relay: &str) -> Node {
        let mut agent = Node::new(Product::Agent, id, &site.dir.path().join(format!("register-{id}")), "local_listen");
        agent.set_text("register", id);
        agent.set_text("data_dir", "data");
        agent.set_text("relay", relay);
        self.objects_of(site.dir.path(), &mut agent, "fallback", "source_options.s3");
        for (key, value) in [
            ("poll", "\"1s\""),
            ("heartbeat", "\"1s\""),
            ("relay_silent", "\"2s\""),
            ("fallback_jitter", "\"0s\""),
            ("ballast", "0"),
        ] {
            agent.set(key, value);
        }
        self.agent_settings.iter().for_each(|(k, v)| agent.set(k, v));
        agent
    }
}

/// A number that no other site of this machine has.
fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The installation. Its directory goes on drop; daemons are the test's own and must go first.
#[derive(Debug)]
pub struct Site {
    /// Headquarters; its directory has `hq.toml`, `schema/`, `source.db` and `state/`.
    pub hq: Node,
    /// The relays by store.
    pub relays: BTreeMap<String, Node>,
    /// The registers by id, `0421-01`.
    pub registers: BTreeMap<String, Node>,
    source: Source,
    objects: Objects,
    prefix: String,
    database: String,
    dir: TempDir,
}

impl Site {
    /// Two stores in two zones, two registers each, 200 items, SQLite, a directory as bucket.
    pub fn builder() -> Builder {
        Builder {
            stores: vec![("0421".into(), "east".into()), ("0815".into(), "west".into())],
            registers: 2,
            items: 200,
            source: Source::Sqlite,
            objects: Objects::Directory,
            prefix: String::new(),
            hq_service: false,
            hq_settings: Vec::new(),
            relay_settings: Vec::new(),
            agent_settings: Vec::new(),
        }
    }

    /// [`Site::builder`] built as it is.
    #[track_caller]
    pub fn small() -> Site {
        Site::builder().build()
    }

    /// A copy of all files, with its own ports: what is done to it does not touch this one. Nothing may run here.
    /// It lies in memory, where there is a place for that: copies are many and short-lived.
    #[track_caller]
    pub fn copy(&self) -> Site {
        assert!(
            matches!((&self.source, &self.objects), (Source::Sqlite | Source::Inbox, Objects::Directory)),
            "files alone are copied"
        );
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("tillcast-copy-").tempdir_in(parent).unwrap();
        crate::files::copy_all(self.dir(), dir.path());
        // A publisher that died there died here too.
        let ledger = dir.path().join("hq/state/fleet.db");
        if ledger.exists() {
            let (from, to) = (self.dir().display().to_string(), dir.path().display().to_string());
            let db = Connection::open(ledger).unwrap();
            let tables =
                db.query_row("SELECT count(*) FROM sqlite_schema WHERE name = 'lease'", [], |r| r.get::<_, i64>(0));
            if tables.unwrap() == 1 {
                db.execute("UPDATE lease SET holder = replace(holder, ?1, ?2)", [&from, &to]).unwrap();
                let bucket = "UPDATE fact SET value = replace(value, ?1, ?2) WHERE name = 'bucket'";
                db.execute(bucket, [&from, &to]).unwrap();
            }
        }
        let nodes = || [&self.hq].into_iter().chain(self.relays.values()).chain(self.registers.values());
        let ports: BTreeMap<u16, u16> = nodes().map(|n| (n.port, crate::quiet_port())).collect();
        let path = |p: &Path| p.display().to_string();
        let mut moves = vec![(path(self.dir()), path(dir.path()))];
        moves.extend(ports.iter().map(|(from, to)| (format!("127.0.0.1:{from}"), format!("127.0.0.1:{to}"))));
        let moved =
            |n: &Node| n.moved(&dir.path().join(n.dir.strip_prefix(self.dir()).unwrap()), ports[&n.port], &moves);
        let all = |nodes: &BTreeMap<String, Node>| nodes.iter().map(|(id, n)| (id.clone(), moved(n))).collect();
        Site {
            hq: moved(&self.hq),
            relays: all(&self.relays),
            registers: all(&self.registers),
            source: self.source.clone(),
            objects: self.objects.clone(),
            prefix: self.prefix.clone(),
            database: self.database.clone(),
            dir,
        }
    }

    /// The site's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The bucket, where it is a directory.
    pub fn bucket(&self) -> PathBuf {
        match &self.objects {
            Objects::Directory => self.dir.path().join("objects"),
            Objects::StandIn(s) => s.root().join(self.prefix.trim_start_matches('/')),
            Objects::S3(_) => panic!("this bucket is no directory: use object() and put_object()"),
        }
    }

    /// The inbox of [`Source::Inbox`].
    pub fn inbox(&self) -> PathBuf {
        self.hq.dir.join("inbox")
    }

    /// The relay of a store.
    #[track_caller]
    pub fn relay(&self, store: &str) -> &Node {
        self.relays.get(store).unwrap_or_else(|| panic!("there is no store {store}"))
    }

    /// A register.
    #[track_caller]
    pub fn register(&self, id: &str) -> &Node {
        self.registers.get(id).unwrap_or_else(|| panic!("there is no register {id}"))
    }

    /// The source's database on its server.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// The database that a register's POS application reads.
    pub fn store_db(&self, register: &str) -> PathBuf {
        self.register(register).dir.join("data/store.db")
    }

    /// Enrols a store's relay or a register: a code from headquarters, used at the device.
    #[track_caller]
    pub fn enroll(&mut self, id: &str) {
        let code = self.hq.json(&["enroll", id])["code"].as_str().expect("enroll --json has a code").to_owned();
        let device = if id.contains('-') { self.register(id) } else { self.relay(id) };
        device.run(&["enroll", &code]).ok();
    }

    /// Changes the source's rows; the SQL must be read alike by SQLite and the source. (In an inbox it changes the
    /// model only: [`Site::drop_all`] brings it there.)
    #[track_caller]
    pub fn sql(&self, sql: &str) {
        self.model().execute_batch(&format!("BEGIN; {sql}; COMMIT;")).unwrap_or_else(|e| panic!("{e}: {sql:.500}"));
        match &self.source {
            Source::Sqlite | Source::Inbox => {}
            Source::Postgres(pg) => drop(pg.sql(&self.database, sql)),
            Source::MariaDb(db) => drop(db.sql(&self.database, &format!("START TRANSACTION; {sql}; COMMIT;"))),
        }
    }

    /// The model of the source: the SQLite source itself, or a copy beside another source.
    pub fn model(&self) -> Connection {
        let db = Connection::open(self.hq.dir.join("source.db")).unwrap();
        db.busy_timeout(crate::PATIENCE).unwrap();
        db
    }

    /// Drops the whole model into the inbox, a CSV file a table and audience, each with its `.ok`; and `stores.csv`.
    #[track_caller]
    pub fn drop_all(&self) {
        sample::drop_all(&self.model(), &self.inbox());
    }

    /// Publishes; panics unless it exits with 0.
    #[track_caller]
    pub fn publish(&self) -> Output {
        self.hq.run(&["publish"]).ok()
    }

    /// One cycle of every relay, then of every register; panics unless all exit with 0.
    #[track_caller]
    pub fn bring_down(&self) {
        for device in self.relays.values() {
            device.run(&["once"]).ok();
        }
        self.with_relays(|| {
            for register in self.registers.values() {
                register.run(&["once"]).ok();
            }
        });
    }

    /// Runs all relays as daemons while `f` runs, then ends them by SIGTERM.
    #[track_caller]
    pub fn with_relays<T>(&self, f: impl FnOnce() -> T) -> T {
        let daemons: Vec<_> = self.relays.values().map(Node::start_ready).collect();
        let result = f();
        daemons.into_iter().for_each(crate::Daemon::term);
        result
    }

    /// An object of the bucket, by its layout name.
    #[track_caller]
    pub fn object(&self, name: &str) -> Option<Vec<u8>> {
        match &self.objects {
            Objects::S3(s3) => s3.get(&self.key(name)),
            _ => std::fs::read(self.bucket().join(name)).ok(),
        }
    }

    /// Puts an object behind headquarters' back.
    #[track_caller]
    pub fn put_object(&self, name: &str, body: &[u8]) {
        match &self.objects {
            Objects::S3(s3) => s3.put(&self.key(name), body),
            _ => {
                let path = self.bucket().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, body).unwrap();
            }
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix).trim_start_matches('/').to_owned()
    }

    /// A store's manifest as it lies in the bucket, its signature unchecked.
    #[track_caller]
    pub fn manifest(&self, store: &str) -> Value {
        let bytes = self.object(&format!("stores/{store}/manifest.json"));
        forge::payload(&bytes.unwrap_or_else(|| panic!("{store} has no manifest")))
    }

    /// The newest file `KIND-N.key` of headquarters, `publisher` or `root`.
    #[track_caller]
    pub fn signing_key(&self, kind: &str) -> SigningKey {
        let number = |p: &Path| p.file_stem()?.to_str()?.strip_prefix(kind)?.strip_prefix('-')?.parse::<u32>().ok();
        let dir = self.hq.dir.join("state/keys");
        let files = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let newest = files.flatten().map(|e| e.path()).filter(|p| number(p).is_some()).max_by_key(|p| number(p));
        forge::key_file(&newest.unwrap_or_else(|| panic!("no {kind} key in {}", dir.display())))
    }

    /// Puts a changed manifest with the next serial, well signed: what a headquarters that errs would say.
    #[track_caller]
    pub fn resign(&self, store: &str, change: impl FnOnce(&mut Value)) {
        let mut manifest = self.manifest(store);
        manifest["serial"] = (manifest["serial"].as_u64().unwrap() + 1).into();
        change(&mut manifest);
        let envelope =
            forge::seal("manifest", &serde_json::to_vec(&manifest).unwrap(), &[&self.signing_key("publisher")]);
        self.put_object(&format!("stores/{store}/manifest.json"), &envelope);
    }

    /// Puts a pack that headquarters never made, and lists it in a well signed manifest of the store: at its version,
    /// as the head, with the digests of its trailer (if it has one).
    #[track_caller]
    pub fn publish_forged(&self, store: &str, stream: &str, pack: &[u8]) {
        let lines = forge::unpack(pack);
        self.list_pack(store, stream, pack, forge::entry(pack), lines.last().unwrap());
    }

    /// As [`Site::publish_forged`], but the manifest says `entry` of the pack, whatever it is, and takes the digests
    /// from this trailer.
    #[track_caller]
    pub fn list_pack(&self, store: &str, stream: &str, pack: &[u8], entry: Value, trailer: &str) {
        let trailer: Value = serde_json::from_str(trailer).unwrap_or_default();
        let (version, kind) = (entry["version"].as_u64().unwrap(), entry["kind"].as_str().unwrap().to_owned());
        let audience = self.manifest(store)["streams"][stream]["audience"].as_str().unwrap().to_owned();
        self.put_object(&format!("packs/{stream}@{audience}/{version:010}.{kind}.pack"), pack);
        self.resign(store, |manifest| {
            let stream = &mut manifest["streams"][stream];
            stream["version"] = version.into();
            stream["packs"].as_array_mut().unwrap().push(entry);
            if trailer["digests"].is_object() {
                stream["digests"] = trailer["digests"].clone();
            }
        });
    }

    /// The head pack of a stream of a store: its name and bytes (the delta, where there is one).
    #[track_caller]
    pub fn head_pack(&self, store: &str, stream: &str) -> (String, Vec<u8>) {
        let manifest = self.manifest(store);
        let entry = &manifest["streams"][stream];
        let pack = entry["packs"].as_array().unwrap().last().unwrap();
        let (version, kind) = (pack["version"].as_u64().unwrap(), pack["kind"].as_str().unwrap());
        let name = format!("packs/{stream}@{}/{version:010}.{kind}.pack", entry["audience"].as_str().unwrap());
        let bytes = self.object(&name).unwrap_or_else(|| panic!("{name} is not there"));
        (name, bytes)
    }

    /// The version of a stream in a store's manifest.
    #[track_caller]
    pub fn version(&self, store: &str, stream: &str) -> u64 {
        let manifest = self.manifest(store);
        manifest["streams"][stream]["version"]
            .as_u64()
            .unwrap_or_else(|| panic!("no version of {stream}: {manifest:#}"))
    }

    /// The digests by table that a store's manifest promises.
    #[track_caller]
    pub fn promised(&self, store: &str) -> BTreeMap<String, String> {
        let manifest = self.manifest(store);
        manifest["streams"].as_object().unwrap().values().flat_map(digests_of).collect()
    }

    /// The digests by table that a store should have, computed from the model without the product.
    #[track_caller]
    pub fn expected(&self, store: &str) -> BTreeMap<String, String> {
        let db = self.model();
        let zone: String = db.query_row("SELECT zone FROM store WHERE id = ?1", [store], |r| r.get(0)).unwrap();
        let bound = |sql: &str| sql.replace(":zone", &format!("'{zone}'")).replace(":store", &format!("'{store}'"));
        model_tables().map(|(table, sql)| (table.to_owned(), digest::of_query(&db, &bound(sql)))).collect()
    }

    /// Panics unless model, manifest, relay and every register of a store have the same digests. The registers' are
    /// computed from the rows in `store.db`, and compared with what the agents report.
    #[track_caller]
    pub fn assert_proven(&self, store: &str) {
        let expected = self.expected(store);
        assert_eq!(self.promised(store), expected, "the manifest of {store} against the source");
        assert_eq!(self.relay(store).digests(), expected, "the relay of {store} against the source");
        for (id, register) in self.registers_of(store) {
            assert_eq!(digest::of_database(&self.store_db(id)), expected, "the rows of {id} against the source");
            assert_eq!(register.digests(), expected, "the report of {id} against the source");
        }
    }

    /// [`Site::assert_proven`] of all stores.
    #[track_caller]
    pub fn assert_all_proven(&self) {
        self.relays.keys().for_each(|store| self.assert_proven(store));
    }

    /// The registers of a store.
    pub fn registers_of<'s>(&'s self, store: &str) -> impl Iterator<Item = (&'s str, &'s Node)> {
        let prefix = format!("{store}-");
        self.registers.iter().filter(move |(id, _)| id.starts_with(&prefix)).map(|(id, n)| (id.as_str(), n))
    }

    /// One value from a register's rows, as text; None when it is NULL or there is no row.
    #[track_caller]
    pub fn read(&self, register: &str, sql: &str) -> Option<String> {
        self.try_read(register, sql).unwrap_or_else(|e| panic!("{register}: {e}: {sql}"))
    }

    /// As [`Site::read`]; an error where [`Site::read`] panics, e.g. before the first install.
    pub fn try_read(&self, register: &str, sql: &str) -> rusqlite::Result<Option<String>> {
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let db = Connection::open_with_flags(self.store_db(register), flags)?;
        db.busy_timeout(crate::PATIENCE)?;
        db.query_row(&format!("SELECT CAST(({sql}) AS TEXT)"), [], |r| r.get(0))
    }
}

/// The digests by table in a stream of a manifest or of `status --json`.
/// The digests by table of a stream, as `status --json` and manifests have it.
pub fn digests_of(stream: &Value) -> Vec<(String, String)> {
    let digests = stream["digests"].as_object().unwrap_or_else(|| panic!("no digests in {stream:#}"));
    digests.iter().map(|(table, digest)| (table.clone(), digest.as_str().unwrap().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_reads_alike_in_all_sources() {
        let (pg, db) = (Arc::new(servers::Postgres::start()), Arc::new(servers::MariaDb::start()));
        let in_pg = Site::builder().source(Source::Postgres(pg.clone())).prepare();
        let in_db = Site::builder().source(Source::MariaDb(db.clone())).prepare();
        for (table, key) in [
            ("item", "sku"),
            ("barcode", "code"),
            ("price", "zone, sku"),
            ("promo", "zone, id"),
            ("staff", "store, id"),
        ] {
            let sql = format!("SELECT * FROM {table} ORDER BY {key}");
            let rows = pg.sql(&in_pg.database, &sql).replace('|', "\t");
            assert_eq!(rows, db.sql(&in_db.database, &sql.replace("SELECT *", mariadb_columns(table))), "{table}");
            let model: i64 =
                in_pg.model().query_row(&format!("SELECT count(*) FROM {table}"), [], |r| r.get(0)).unwrap();
            assert_eq!(rows.lines().count() as i64, model);
        }
        assert_eq!(in_pg.expected("0421"), in_db.expected("0421"));
        assert_ne!(in_pg.expected("0421")["price"], in_pg.expected("0815")["price"]);
    }

    /// psql prints NULL as nothing, mariadb as the word.
    fn mariadb_columns(table: &str) -> &str {
        if table == "item" {
            "SELECT sku, name, department, coalesce(weight, ''), coalesce(note, '')"
        } else {
            "SELECT *"
        }
    }

    #[test]
    fn an_inbox_gets_a_drop_for_each_table_and_audience() {
        let site = Site::builder().source(Source::Inbox).prepare();
        site.drop_all();
        let drops = std::fs::read_dir(site.inbox()).unwrap().count();
        // stores.csv; item and barcode for all, price and promo for two zones, staff for two stores, each with its .ok
        assert_eq!(drops, 1 + 2 * (2 + 4 + 2));
        let prices = std::fs::read_to_string(site.inbox().join("price.zone-east.price.csv")).unwrap();
        assert!(
            prices.starts_with("sku,price_cents,updated\r\nSKU0000000,99,2026-01-01T00:00:00Z\r\n"),
            "{prices:.200}"
        );
    }
}

//! An installation whose catalog is the benches' items: one store, one stream for all.

use crate::data::{COLUMNS, Catalog, Change, DDL, INDEX, update};
use crate::measure::{Took, time_all};
use rusqlite::Connection;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tillcast_tests::site::Builder;
use tillcast_tests::{Product, Site};

/// The only store.
pub const STORE: &str = "0421";

/// Gives a site another source and streams, and its devices the paces that are the programs' own (the test harness sets
/// faster ones). The source is filled by `sql`.
pub fn own_source(site: &mut Site, streams: &str, sql: &str) -> Connection {
    site.hq.set_text("source.url", "sqlite:goods.db");
    site.hq.set_streams(streams);
    let nodes = site.relays.values_mut().chain(site.registers.values_mut());
    nodes.for_each(|node| ["poll", "heartbeat"].iter().for_each(|key| node.unset(key)));
    let source = Connection::open(site.hq.dir.join("goods.db")).unwrap();
    let store = format!("INSERT INTO store VALUES ('{STORE}', 'east', 'north')");
    source.execute_batch(&format!("CREATE TABLE store (id TEXT, zone TEXT, region TEXT); {store}; {sql}")).unwrap();
    source
}

/// A site, its items, and the source's database.
#[derive(Debug)]
pub struct Stage {
    /// The installation.
    pub site: Site,
    /// What the source holds.
    pub catalog: Catalog,
    /// The source, as the ERP writes it.
    pub source: Connection,
}

impl Stage {
    /// Builds and enrols; publishes nothing.
    pub fn new(rows: u64, registers: usize, configure: impl FnOnce(Builder) -> Builder) -> Stage {
        let builder = Site::builder().stores(&[(STORE, "east")]).registers(registers).items(1);
        let mut site = configure(builder).build();
        std::fs::write(site.hq.dir.join("schema/catalog.sql"), format!("{DDL}{INDEX}")).unwrap();
        let stream = format!(
            "[[stream]]\nname = 'catalog'\naudience = 'all'\nschema = 'schema/catalog.sql'\n\
             [[stream.table]]\nname = 'item'\nquery = 'SELECT {COLUMNS} FROM item'\n"
        );
        let source = own_source(&mut site, &stream, &format!("{DDL} {INDEX}"));
        let catalog = Catalog::new(rows);
        catalog.fill(&source);
        Stage { site, catalog, source }
    }

    /// The bench's source file.
    pub fn source_path(&self) -> PathBuf {
        self.site.hq.dir.join("goods.db")
    }

    /// Changes rows in the source, committed.
    pub fn change(&mut self, rows: u64) -> Vec<Change> {
        let changes = self.catalog.change(rows);
        update(&self.source, &changes);
        changes
    }

    /// `hq-publisher publish …`, not started.
    pub fn publisher(&self, args: &[&str]) -> Command {
        let mut c = Command::new(Product::Hq.path());
        c.arg("publish").args(args).current_dir(&self.site.hq.dir).stdin(Stdio::null()).stdout(Stdio::null());
        c.stderr(std::fs::File::create(self.site.dir().join("publish.log")).unwrap());
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
            c.env_remove(proxy);
        }
        c
    }

    /// Publishes to the end; panics with what it said unless it exits with 0.
    pub fn publish(&self, args: &[&str]) -> Took {
        let (status, took) = time_all(|| self.publisher(args).status().unwrap());
        self.assert_published(status);
        took
    }

    /// Panics with what the publisher said unless this is success.
    pub fn assert_published(&self, status: std::process::ExitStatus) {
        let log = std::fs::read_to_string(self.site.dir().join("publish.log")).unwrap_or_default();
        assert!(status.success(), "publish: {status}\n{log}");
    }
}

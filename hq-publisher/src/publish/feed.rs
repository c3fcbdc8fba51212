//! Where a run's rows come from: one snapshot of a database, or the drops that are whole.

use super::contracts::Contracts;
use super::stage::Task;
use super::{PublishError, PublishOptions};
use crate::ahead;
use crate::config::{AudienceKind, Config, SourceKind};
use crate::inbox::{self, Blame, Drop, FileError, Inbox, What};
use crate::scratch::{Scratch, ScratchError};
use crate::source::{Faults, RowFault, SinkError, StoreRow};
use crate::source_db::{Database, Names, SourceError};
use proto::clock::Clock;
use proto::ids::{Audience, Instance, TableName};
use proto::replica::Replica;
use proto::schema::{Contract, Table};
use proto::shelf;
use std::collections::{BTreeMap, BTreeSet};

/// What a run reads from.
pub enum Feed {
    /// A snapshot.
    Database(Box<Database>),
    /// Drops by instance and table.
    Inbox(Box<Drops>),
}

/// The drops of one look at the inbox.
#[derive(Debug)]
pub struct Drops {
    /// The directory.
    pub inbox: Inbox,
    /// What is to be published.
    pub tables: BTreeMap<Instance, BTreeMap<TableName, Drop>>,
    /// `stores.csv`.
    pub stores: Option<Drop>,
    /// A `stores.csv` is there, or was, that this run does not take: who it names is not known yet.
    pub stores_wait: bool,
    /// Drops that cannot be: with the reason, and the instance where the name gives one.
    pub rejected: Vec<(Drop, String)>,
    /// Of which a table has two drops, whole or not, for people: which is the newer one only their sender knows, and
    /// none is taken while both are there.
    pub doubles: BTreeMap<Instance, String>,
    /// What lies there, may be taken for a drop and is none, for people, by its name: not taken while it is there.
    pub strays: BTreeMap<String, String>,
}

/// Reading one instance's rows went wrong.
#[derive(Debug)]
pub enum ReadError {
    /// The source: nothing of the stream is published.
    Source(&'static str, String),
    /// A drop that cannot be read.
    Drop(Box<Drop>, FileError),
    /// This machine.
    Scratch(ScratchError),
}

impl From<ScratchError> for ReadError {
    fn from(e: ScratchError) -> Self {
        match e {
            ScratchError::Sink(SinkError::TooMany(text)) => ReadError::Source("LIMITS", text),
            other => ReadError::Scratch(other),
        }
    }
}

/// The rows published before, for tables that no drop came for.
pub struct Kept<'a> {
    /// The replica.
    pub replica: &'a Replica,
    /// Its contract.
    pub contract: &'a Contract,
}

impl Feed {
    /// Begins the snapshot, or looks at the inbox until its files rest.
    pub async fn open(config: &Config, options: &PublishOptions, clock: &dyn Clock) -> Result<Feed, PublishError> {
        match config.source.kind()? {
            SourceKind::Inbox(dir) => {
                let inbox = Inbox::new(&dir);
                let look = inbox.settle(config.source.rest.0, clock).await?;
                Ok(Feed::Inbox(Box::new(Drops::sort(inbox, look, config, options))))
            }
            _ => Ok(Feed::Database(Box::new(Database::open(&config.source).await?))),
        }
    }

    /// What a pack's header says it was made from.
    pub fn name(&self, config: &Config) -> &'static str {
        match config.source.kind() {
            Ok(SourceKind::Sqlite(_)) => "sqlite",
            Ok(SourceKind::Postgres(_)) => "postgres",
            Ok(SourceKind::MySql(_)) => "mysql",
            _ => "inbox",
        }
    }

    /// The stores of a database.
    pub async fn stores(&mut self, contracts: &Contracts) -> Result<Option<Vec<StoreRow>>, SourceError> {
        match (self, &contracts.stores) {
            (Feed::Database(db), Some(query)) => db.stores(query).await.map(Some),
            _ => Ok(None),
        }
    }

    /// Ends the snapshot: the source is not held up by what follows.
    pub async fn close(self) -> Option<Drops> {
        match self {
            Feed::Database(db) => {
                db.close().await;
                None
            }
            Feed::Inbox(drops) => Some(*drops),
        }
    }

    /// The drops of an instance.
    pub fn drops_of(&self, instance: &Instance) -> Vec<Drop> {
        match self {
            Feed::Inbox(d) => d.tables.get(instance).into_iter().flat_map(|t| t.values().cloned()).collect(),
            Feed::Database(_) => Vec::new(),
        }
    }

    /// Reads all tables of an instance into the scratch database.
    pub async fn read(
        &mut self,
        config: &Config,
        task: &Task<'_>,
        kept: Option<Kept<'_>>,
        scratch: &Scratch,
        faults: &mut Faults,
    ) -> Result<(), ReadError> {
        let Task { stream, instance, zone, .. } = *task;
        if let Feed::Inbox(drops) = self
            && let Some(text) = drops.doubles.get(instance)
        {
            return Err(ReadError::Source("TWO_DROPS", text.clone()));
        }
        for table in &stream.contract.tables {
            match self {
                Feed::Database(db) => {
                    let mut loader = scratch.loader(table, &config.limits, faults)?;
                    let query = stream.queries.get(&table.name).ok_or_else(|| {
                        ReadError::Source("MISSING_TABLE", format!("table {} has no query", table.name))
                    })?;
                    let store = match &instance.audience {
                        Audience::Store(s) => Some(s),
                        _ => None,
                    };
                    let runtime = tokio::runtime::Handle::current();
                    let read = tokio::task::block_in_place(|| {
                        ahead::load(table.columns.len(), &mut loader, |sink| {
                            runtime.block_on(db.read(table, query, Names { store, zone }, sink))
                        })
                    });
                    read.map_err(ScratchError::from)?.map_err(|e| match e {
                        SourceError::Sink(e) => ScratchError::from(e).into(),
                        SourceError::Columns { .. } => ReadError::Source("COLUMNS", e.to_string()),
                        other => ReadError::Source("SOURCE", other.to_string()),
                    })?;
                }
                Feed::Inbox(drops) => {
                    let drop = drops.tables.get(instance).and_then(|t| t.get(&table.name));
                    tokio::task::block_in_place(|| match drop {
                        Some(drop) => read_drop(config, drop, table, scratch, faults),
                        None => keep(table, kept.as_ref(), scratch),
                    })?;
                }
            }
        }
        Ok(())
    }
}

fn read_drop(
    config: &Config,
    drop: &Drop,
    table: &Table,
    scratch: &Scratch,
    faults: &mut Faults,
) -> Result<(), ReadError> {
    let Ok(What::Table { format, .. }) = drop.what else { return Ok(()) };
    let file = shelf::open_regular(&drop.file.path).map_err(|e| ReadError::Source("DROP", e.to_string()))?;
    let mut loader = scratch.loader(table, &config.limits, faults)?;
    let read = inbox::read_table(&file, format, drop.file.marked, config.limits.line_bytes, table, &mut loader);
    match read {
        Err(FileError { blame: Blame::Sink(sink), .. }) => Err(ScratchError::from(sink).into()),
        // Before what was found in it: half of one text and half of another is nobody's fault.
        _ if !drop.is(&file) => {
            let reason = format!("{} changed while it was read; it is left for the next run", drop.file.name);
            Err(ReadError::Source("DROP_CHANGED", reason))
        }
        Err(e) if e.blame == Blame::Disk => Err(ReadError::Source("DROP", format!("{}: {e}", drop.file.name))),
        Err(e) => Err(ReadError::Drop(Box::new(drop.clone()), e)),
        Ok(()) => Ok(()),
    }
}

/// A table that no drop came for keeps what is published.
fn keep(table: &Table, kept: Option<&Kept<'_>>, scratch: &Scratch) -> Result<(), ReadError> {
    match kept {
        Some(k) => match k.contract.table(&table.name) {
            Some(had) => match scratch.copy(table, k.replica.connection(), had)? {
                Some(why) => Err(ReadError::Source(
                    "MISSING_TABLE",
                    format!(
                        "no drop has come for table {}, and its published rows do not fit the contract ({why}): drop that \
                         table too",
                        table.name
                    ),
                )),
                None => Ok(()),
            },
            None => Ok(()),
        },
        None => Err(ReadError::Source(
            "MISSING_TABLE",
            format!(
                "no drop has come for table {} since stores follow this: drop all tables of the stream",
                table.name
            ),
        )),
    }
}

impl Drops {
    /// Sorts what was found into what can be published, what cannot, and what must wait.
    fn sort(inbox: Inbox, look: inbox::Look, config: &Config, options: &PublishOptions) -> Drops {
        let mut out = Drops {
            inbox,
            tables: BTreeMap::new(),
            stores: None,
            stores_wait: false,
            rejected: Vec::new(),
            doubles: BTreeMap::new(),
            strays: BTreeMap::new(),
        };
        for (name, why) in look.strays {
            out.stores_wait |= inbox::is_list(&name);
            let text = format!("{name} in the inbox {why}");
            out.strays.insert(name, text);
        }
        let waiting: BTreeSet<String> = look.waiting.into_iter().collect();
        for name in &waiting {
            tracing::info!(%name, "still growing; left for the next run");
            out.stores_wait |= inbox::is_list(name);
        }
        for drop in look.ready {
            match drop.what.clone() {
                Err(reason) => {
                    out.stores_wait |= inbox::is_list(&drop.file.name);
                    out.rejected.push((drop, reason));
                }
                Ok(What::Stores) => out.stores = Some(drop),
                Ok(What::Table { instance, .. }) if options.stream.as_ref().is_some_and(|s| s != &instance.stream) => {}
                Ok(What::Table { instance, table, .. }) => match wrong_place(config, &instance) {
                    Some(reason) => out.rejected.push((drop, reason)),
                    None => out.take(instance, table, drop, &waiting),
                },
            }
        }
        out
    }

    fn take(&mut self, instance: Instance, table: TableName, drop: Drop, waiting: &BTreeSet<String>) {
        let tables = self.tables.entry(instance.clone()).or_default();
        let growing = inbox::other_way(&drop.file.name).filter(|name| waiting.contains(name));
        if let Some(other) = growing.or_else(|| tables.get(&table).map(|d| d.file.name.clone())) {
            let text = format!("{other} and {} are for one table: take one away", drop.file.name);
            self.doubles.entry(instance).or_insert(text);
        }
        tables.entry(table).or_insert(drop);
    }

    /// Rejects drops whose table or audience is not there: known only with contracts and stores. Those of an audience
    /// that a list which was not taken may name are left where they are; gives a line for each.
    pub fn check(&mut self, contracts: &Contracts, stores: &[StoreRow]) -> Vec<String> {
        let mut left = Vec::new();
        for stream in &contracts.streams {
            let there: Vec<Audience> =
                super::contracts::audiences(stream.audience, stores).into_iter().map(|(a, _)| a).collect();
            for (instance, tables) in self.tables.iter_mut().filter(|(i, _)| i.stream == stream.name) {
                let gone: Vec<TableName> = tables.keys().cloned().collect();
                for name in gone {
                    let is_table = stream.contract.table(&name).is_some();
                    if is_table && there.contains(&instance.audience) {
                        continue;
                    }
                    let Some(drop) = tables.remove(&name) else { continue };
                    let nobody = format!("no store has the audience {}", instance.audience);
                    if !is_table {
                        let reason = format!("table {name} is not in the contract of stream {}", stream.name);
                        self.rejected.push((drop, reason));
                    } else if self.stores_wait {
                        left.push(format!(
                            "{} is left for the next run: {nobody}, and stores.csv waits",
                            drop.file.name
                        ));
                    } else {
                        self.rejected.push((drop, nobody));
                    }
                }
            }
        }
        self.tables.retain(|_, t| !t.is_empty());
        left
    }
}

/// Why a drop's stream or kind of audience cannot be.
fn wrong_place(config: &Config, instance: &Instance) -> Option<String> {
    let Some(stream) = config.stream(&instance.stream) else {
        return Some(format!("stream {} is not in the settings", instance.stream));
    };
    let kind = match &instance.audience {
        Audience::All => AudienceKind::All,
        Audience::Zone(_) => AudienceKind::Zone,
        Audience::Store(_) => AudienceKind::Store,
    };
    let wanted = match stream.audience {
        AudienceKind::All => "all",
        AudienceKind::Zone => "zone-NAME",
        AudienceKind::Store => "store-ID",
    };
    (kind != stream.audience)
        .then(|| format!("stream {} is made for {wanted}, not for {}", stream.name, instance.audience))
}

/// The bad rows of one table, for the reason beside a rejected drop.
pub fn faults_text(instance: &Instance, faults: &Faults, table: &TableName) -> String {
    let lines: Vec<String> =
        faults.first.iter().filter(|f: &&RowFault| &f.table == table).map(|f| format!("{instance}: {f}")).collect();
    format!("{} bad rows in this version of {instance}; of this table:\n{}", faults.count, lines.join("\n"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;
    use proto::limits::Limits;
    use std::fs;

    const DDL: &str = "CREATE TABLE price (sku TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT;";

    fn config(dir: &std::path::Path) -> Config {
        let text = "[source]\nurl = \"inbox:inbox\"\n[objects]\nurls = [\"file:o\"]\n[state]\ndir = \"s\"\n\
                    [[stream]]\nname = \"price\"\naudience = \"zone\"\nschema = \"price.sql\"\n";
        fs::write(dir.join("hq.toml"), text).unwrap();
        fs::create_dir(dir.join("inbox")).unwrap();
        crate::config::load(Some(&dir.join("hq.toml")), []).unwrap().value
    }

    #[test]
    fn a_drop_that_changes_while_it_is_read_waits_whatever_was_read_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let path = dir.path().join("inbox/price.zone-east.price.csv");
        fs::write(&path, "sku,cents\na,100\n").unwrap();
        let file = Inbox::new(&dir.path().join("inbox")).look().unwrap().remove(0);
        let drop = Drop { what: inbox::parse_name(&file.name).unwrap(), file };
        let contract = Contract::parse(DDL, &Limits::default()).unwrap();
        for half in ["sku,cents\na,1", "", "sku,cents\na,\"1", "sku,cents\na,ones\n", "sku,cents\na,101\nb,2\n"] {
            fs::write(&path, half).unwrap();
            let scratch = Scratch::create(&dir.path().join("scratch.db"), &contract).unwrap();
            let read = read_drop(&config, &drop, &contract.tables[0], &scratch, &mut Faults::telling(9));
            let Err(ReadError::Source(code, reason)) = read else { panic!("{half:?}: {read:?}") };
            assert_eq!(code, "DROP_CHANGED", "{half:?}");
            assert!(reason.contains("left for the next run"), "{reason}");
        }
    }

    #[test]
    fn a_drop_that_cannot_be_read_is_not_a_wrong_one() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let contract = Contract::parse(DDL, &Limits::default()).unwrap();
        // Its first page is never there: reading it fails, whoever does.
        let path = std::path::PathBuf::from("/proc/self/mem");
        let meta = fs::metadata(&path).unwrap();
        let stamp = (meta.len(), shelf::modified_ns(&meta));
        let name = "price.zone-east.price.csv".to_owned();
        let what = inbox::parse_name(&name).unwrap();
        let drop = Drop { what, file: inbox::Seen { name, path, stamp, marked: true } };
        let scratch = Scratch::create(&dir.path().join("scratch.db"), &contract).unwrap();
        let read = read_drop(&config, &drop, &contract.tables[0], &scratch, &mut Faults::telling(9));
        let Err(ReadError::Source("DROP", reason)) = read else { panic!("{read:?}") };
        assert!(reason.starts_with("price.zone-east.price.csv: it cannot be read: "), "{reason}");
    }

    #[test]
    fn a_drop_that_still_grows_is_one_of_two_already() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        fs::write(dir.path().join("inbox/price.zone-east.price.csv"), "sku,cents\n").unwrap();
        let file = Inbox::new(&dir.path().join("inbox")).look().unwrap().remove(0);
        let ready = vec![Drop { what: inbox::parse_name(&file.name).unwrap(), file }];
        for (waiting, doubles) in [("price.zone-east.price.ndjson", 1), ("price.zone-west.price.ndjson", 0)] {
            let waiting = vec![waiting.to_owned()];
            let look = inbox::Look { ready: ready.clone(), waiting, ..inbox::Look::default() };
            let drops = Drops::sort(Inbox::new(dir.path()), look, &config, &PublishOptions::default());
            assert_eq!(drops.doubles.len(), doubles, "{drops:?}");
        }
    }

    #[test]
    fn a_list_that_still_grows_is_known_to_wait() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let look = |waiting: &[&str]| inbox::Look {
            waiting: waiting.iter().map(|n| (*n).to_owned()).collect(),
            ..inbox::Look::default()
        };
        let waits = |look| Drops::sort(Inbox::new(dir.path()), look, &config, &PublishOptions::default()).stores_wait;
        assert!(waits(look(&["price.zone-east.price.csv", "stores.csv"])));
        assert!(!waits(look(&["price.zone-east.price.csv"])));
    }
}

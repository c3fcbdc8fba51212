//! Streams as configured, with their contracts and queries understood: every mistake that can be
//! found without a connection is found here, before anything is touched.

use crate::bucket::Bucket;
use crate::config::{AudienceKind, Config, StreamConfig};
use crate::source_db::query::{Dialect, Query};
use crate::source_db::{self, parse_query};
use proto::config::ConfigError;
use proto::ids::{Audience, StreamName, TableName, Zone};
use proto::schema::{Contract, names_clash};
use proto::shelf;
use std::collections::{BTreeMap, BTreeSet};

/// A stream, ready to be published.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Its name.
    pub name: StreamName,
    /// For whom its instances are made.
    pub audience: AudienceKind,
    /// Its tables.
    pub contract: Contract,
    /// The query of each table; none with an inbox.
    pub queries: BTreeMap<TableName, Query>,
    /// The streams that its rows refer to.
    pub requires: BTreeSet<StreamName>,
}

/// All streams, and the stores' query.
#[derive(Debug, Clone)]
pub struct Contracts {
    /// In the order of the settings, but each after those that it requires.
    pub streams: Vec<Stream>,
    /// The stores' query; none with an inbox.
    pub stores: Option<Query>,
}

impl Contracts {
    /// The stream that has a table.
    pub fn stream_of(&self, table: &TableName) -> Option<&Stream> {
        self.streams.iter().find(|s| s.contract.tables.iter().any(|t| &t.name == table))
    }
}

/// Reads the contracts and parses the queries.
pub fn load(config: &Config) -> Result<Contracts, ConfigError> {
    if config.streams.is_empty() {
        return Err(ConfigError("there is no [[stream]]: nothing would be published".into()));
    }
    let dialect = source_db::dialect(&config.source.kind()?);
    let streams = config.streams.iter().map(|s| stream(config, s, dialect)).collect::<Result<Vec<_>, _>>()?;
    let streams = in_order(streams)?;
    let named: Vec<_> = streams.iter().map(|s| (&s.name, &s.contract)).collect();
    if let Some(clash) = names_clash(&named) {
        return Err(ConfigError(format!("{clash}; registers keep all streams in one file")));
    }
    let stores = match (dialect, &config.stores.query) {
        (Some(dialect), Some(text)) => {
            Some(parse_query(text, dialect, AudienceKind::All).map_err(|e| ConfigError(format!("stores.query: {e}")))?)
        }
        _ => None,
    };
    Ok(Contracts { streams, stores })
}

/// The same, where the URLs of the source and of the buckets can be read as well.
pub fn check(config: &Config) -> Result<Contracts, ConfigError> {
    let contracts = load(config)?;
    source_db::check_url(&config.source)?;
    for url in &config.objects.urls {
        Bucket::open(url, &config.objects).map_err(|e| ConfigError(e.to_string()))?;
    }
    Ok(contracts)
}

fn stream(config: &Config, s: &StreamConfig, dialect: Option<Dialect>) -> Result<Stream, ConfigError> {
    let bad = |text: String| ConfigError(format!("stream {}: {text}", s.name));
    let path = s.schema.display();
    let bytes = shelf::read_bounded(&s.schema, config.limits.ddl_bytes as u64).map_err(|e| bad(e.to_string()))?;
    let ddl = String::from_utf8(bytes).map_err(|_| bad(format!("{path} is not UTF-8")))?;
    let contract = Contract::parse_strict(&ddl, &config.limits).map_err(|e| bad(format!("{path}: {e}")))?;
    let mut queries = BTreeMap::new();
    for t in &s.tables {
        if contract.table(&t.name).is_none() {
            let what = if t.query.is_some() { "query" } else { "[[stream.table]]" };
            return Err(bad(format!("table {} has a {what} but is not in {path}", t.name)));
        }
        if let (Some(dialect), Some(query)) = (dialect, &t.query) {
            let query = parse_query(query, dialect, s.audience)
                .map_err(|e| bad(format!("the query of table {}: {e}", t.name)))?;
            queries.insert(t.name.clone(), query);
        }
    }
    if dialect.is_some()
        && let Some(t) = contract.tables.iter().find(|t| !queries.contains_key(&t.name))
    {
        return Err(bad(format!("table {} of {path} has no [[stream.table]] with a query", t.name)));
    }
    Ok(Stream { name: s.name.clone(), audience: s.audience, contract, queries, requires: s.requires.clone() })
}

/// Each after those that it requires.
fn in_order(streams: Vec<Stream>) -> Result<Vec<Stream>, ConfigError> {
    let names: BTreeSet<StreamName> = streams.iter().map(|s| s.name.clone()).collect();
    for s in &streams {
        if let Some(unknown) = s.requires.iter().find(|r| !names.contains(*r)) {
            return Err(ConfigError(format!("stream {}: requires = {unknown}: there is no such [[stream]]", s.name)));
        }
    }
    for s in streams.iter().filter(|s| s.audience != AudienceKind::Store) {
        let of_stores = |r: &&Stream| s.requires.contains(&r.name) && r.audience == AudienceKind::Store;
        if let Some(r) = streams.iter().find(of_stores) {
            let text =
                format!("stream {}: requires = {}: that one is made for each store, this one for many", s.name, r.name);
            return Err(ConfigError(text));
        }
    }
    let (mut left, mut ordered) = (streams, Vec::<Stream>::new());
    while !left.is_empty() {
        let is_there = |name: &StreamName| ordered.iter().any(|s| &s.name == name);
        let Some(next) = left.iter().position(|s| s.requires.iter().all(is_there)) else {
            let ring: Vec<&str> = left.iter().map(|s| s.name.as_str()).collect();
            return Err(ConfigError(format!(
                "streams {}: requires goes in a ring: none could come first",
                ring.join(", ")
            )));
        };
        ordered.push(left.remove(next));
    }
    Ok(ordered)
}

/// For whom instances of a stream are made, given the stores; with the zone that `:zone` means.
pub fn audiences(kind: AudienceKind, stores: &[crate::source::StoreRow]) -> Vec<(Audience, Option<Zone>)> {
    match kind {
        AudienceKind::All => vec![(Audience::All, None)],
        AudienceKind::Zone => {
            let zones: BTreeSet<&Zone> = stores.iter().filter_map(|s| s.zone.as_ref()).collect();
            zones.into_iter().map(|z| (Audience::Zone(z.clone()), Some(z.clone()))).collect()
        }
        AudienceKind::Store => stores.iter().map(|s| (Audience::Store(s.id.clone()), s.zone.clone())).collect(),
    }
}

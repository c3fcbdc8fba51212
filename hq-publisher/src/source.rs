//! What a source gives, whether it is a database or files: stores, rows, and rows that are bad.
//!
//! Owns the words that `source_db`, `inbox` and `scratch` share. Reads nothing, writes nothing.

use proto::ids::{ColumnName, StoreId, TableName, Zone, case_clash};
use proto::schema::Table;
use proto::value::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A store as the source lists it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoreRow {
    /// Its id.
    pub id: StoreId,
    /// Its price zone; a store without one follows no zone's instances.
    pub zone: Option<Zone>,
    /// Its region, for people.
    pub region: Option<String>,
}

/// One row that cannot be published, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFault {
    /// The table.
    pub table: TableName,
    /// The line in the file, counted from 1.
    pub line: Option<u64>,
    /// The row's key, e.g. `sku="123"`.
    pub key: String,
    /// The column to blame.
    pub column: Option<ColumnName>,
    /// What is wrong: value (cut), rule, limit.
    pub problem: String,
}

impl fmt::Display for RowFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}", self.table)?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ", key {}", self.key)?;
        }
        match &self.column {
            Some(c) => write!(f, ": column {c} {}", self.problem),
            None => write!(f, ": {}", self.problem),
        }
    }
}

/// All the bad rows of one instance: every one is counted, the first few are told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// How many there are.
    pub count: u64,
    /// The first of them.
    pub first: Vec<RowFault>,
    /// How many are told.
    most: usize,
}

impl Faults {
    /// None yet; at most `most` will be told.
    pub fn telling(most: usize) -> Self {
        Faults { count: 0, first: Vec::new(), most }
    }
    /// Counts one in.
    pub fn push(&mut self, fault: RowFault) {
        self.count += 1;
        if self.first.len() < self.most {
            self.first.push(fault);
        }
    }
    /// Whether every row was good.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// The number that are counted but not told.
    pub fn untold(&self) -> u64 {
        self.count.saturating_sub(self.first.len() as u64)
    }
}

/// A value that a column cannot take: what is wrong with it, to follow the words "column NAME".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem(pub String);

impl Problem {
    /// A problem told in these words.
    pub fn new(text: impl Into<String>) -> Self {
        Problem(text.into())
    }
}

/// Takes a table's rows one by one, good and bad.
pub trait RowSink {
    /// A row: all the table's columns in the contract's order. An error ends the reading.
    fn row(&mut self, row: &[Value<'_>], line: Option<u64>) -> Result<(), SinkError>;
    /// A row that could not even be read into the columns' types.
    fn fault(&mut self, fault: RowFault) -> Result<(), SinkError>;
}

/// The sink cannot go on, whatever rows come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The disk or the scratch database.
    #[error("{0}")]
    Failed(String),
    /// More rows came than readers take.
    #[error("{0}")]
    TooMany(String),
}

/// A row's key for people: `sku="123"`, `store="0421" sku="7"`. `get` gives a column's value.
pub fn key_for_people<'v>(table: &Table, get: impl Fn(usize) -> Option<Value<'v>>) -> String {
    let mut text = String::new();
    for &i in &table.key {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(table.columns[i].name.as_str());
        text.push('=');
        match get(i) {
            Some(v) => text.push_str(&v.for_people()),
            None => text.push('?'),
        }
    }
    text
}

/// The list of stores cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the list of stores: {0}")]
pub struct BadStores(pub String);

/// Builds and checks the list of stores from texts.
#[derive(Debug, Default)]
pub struct StoreList {
    rows: Vec<StoreRow>,
    ids: BTreeSet<StoreId>,
    problems: Vec<String>,
    bad: usize,
}

impl StoreList {
    const TOLD: usize = 20;

    fn bad(&mut self, text: String) {
        self.bad += 1;
        if self.problems.len() < Self::TOLD {
            self.problems.push(text);
        }
    }

    /// Takes a store. Empty zones and regions are none.
    pub fn push(&mut self, id: Option<&str>, zone: Option<&str>, region: Option<&str>) {
        let id = match id.unwrap_or("").parse::<StoreId>() {
            Ok(id) => id,
            Err(e) => return self.bad(e.to_string()),
        };
        let zone = match zone.filter(|z| !z.is_empty()).map(str::parse::<Zone>).transpose() {
            Ok(zone) => zone,
            Err(e) => return self.bad(format!("store {id}: {e}")),
        };
        if !self.ids.insert(id.clone()) {
            return self.bad(format!("store {id} is listed twice"));
        }
        let region =
            region.filter(|r| !r.is_empty()).map(|r| r.chars().filter(|c| !c.is_control()).take(200).collect());
        self.rows.push(StoreRow { id, zone, region });
    }

    /// A row that could not be read.
    pub fn unreadable(&mut self, text: String) {
        self.bad(text);
    }

    /// The stores by id, if all of them are good.
    pub fn finish(mut self) -> Result<Vec<StoreRow>, BadStores> {
        if let Some((a, b)) = case_clash(self.ids.iter().map(StoreId::as_str)) {
            self.bad(format!("stores {a} and {b} differ only in case"));
        }
        if self.bad > 0 {
            let more = self.bad - self.problems.len();
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            return Err(BadStores(format!("{}{more}", self.problems.join("; "))));
        }
        self.rows.sort();
        Ok(self.rows)
    }
}

/// Refuses a list with a new store whose id differs only in case from one that is known: both would have one name where
/// case does not count.
pub fn cases_agree(told: &[StoreRow], known: &[StoreId]) -> Result<(), BadStores> {
    let exact: BTreeSet<&StoreId> = known.iter().collect();
    let folded: BTreeMap<String, &StoreId> = known.iter().map(|k| (k.as_str().to_ascii_lowercase(), k)).collect();
    for id in told.iter().map(|s| &s.id).filter(|id| !exact.contains(id)) {
        if let Some(k) = folded.get(&id.as_str().to_ascii_lowercase()) {
            return Err(BadStores(format!("store {id} differs only in case from {k}, which is known: write it {k}")));
        }
    }
    Ok(())
}

/// Checks columns by name: each wanted one there once, and no other. Gives the place of each
/// wanted column among those found. `optional` ones may be missing.
pub fn match_columns(found: &[String], wanted: &[&str], optional: &[&str]) -> Result<Vec<Option<usize>>, String> {
    let mut problems = Vec::new();
    // The list of stores has no contract, but columns that may be missing.
    let none =
        if optional.is_empty() { "not in the contract".to_owned() } else { format!("none of {}", wanted.join(", ")) };
    for (i, name) in found.iter().enumerate() {
        if found[..i].contains(name) {
            problems.push(format!("column {} is there twice", shown(name)));
        } else if !wanted.contains(&name.as_str()) {
            problems.push(format!("column {} is {none}", shown(name)));
        }
    }
    let places: Vec<_> = wanted.iter().map(|w| found.iter().position(|f| f == w)).collect();
    for (w, place) in wanted.iter().zip(&places) {
        if place.is_none() && !optional.contains(w) {
            problems.push(format!("column {w} is missing"));
        }
    }
    if problems.is_empty() { Ok(places) } else { Err(problems.join("; ")) }
}

fn shown(name: &str) -> String {
    let cut: String = name.chars().take(60).flat_map(char::escape_debug).collect();
    format!("`{cut}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lists_of_stores_are_told_whole() {
        let mut l = StoreList::default();
        l.push(Some("0421"), Some("east"), Some("North"));
        l.push(Some("0421"), Some("east"), None);
        l.push(Some("../x"), None, None);
        l.push(Some("ab"), Some("East"), None);
        l.push(Some("aB"), None, None);
        l.push(Some("Ab"), None, None);
        l.push(None, None, None);
        let e = l.finish().unwrap_err().to_string();
        for part in ["0421 is listed twice", "../x", "store ab", "Ab and aB differ only in case"] {
            assert!(e.contains(part), "{part}: {e}");
        }
        let mut l = StoreList::default();
        l.push(Some("2"), Some(""), Some(""));
        l.push(Some("1"), Some("east"), None);
        let rows = l.finish().unwrap();
        assert_eq!(rows[0].id.as_str(), "1");
        assert_eq!(rows[1].zone, None);
    }

    #[test]
    fn a_store_keeps_the_case_that_it_is_known_by() {
        let rows = |ids: &[&str]| {
            let mut l = StoreList::default();
            ids.iter().for_each(|id| l.push(Some(id), None, None));
            l.finish().unwrap()
        };
        let known: Vec<StoreId> = ["ab", "CD", "cd"].map(|id| id.parse().unwrap()).into();
        cases_agree(&rows(&["ab", "cd", "ef"]), &known).unwrap();
        let e = cases_agree(&rows(&["AB", "ef"]), &known).unwrap_err().to_string();
        assert_eq!(e, "the list of stores: store AB differs only in case from ab, which is known: write it ab");
    }

    #[test]
    fn columns_are_matched_by_name() {
        let found = |s: &str| s.split(',').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(match_columns(&found("b,a"), &["a", "b"], &[]).unwrap(), [Some(1), Some(0)]);
        assert_eq!(match_columns(&found("a"), &["a", "b"], &["b"]).unwrap(), [Some(0), None]);
        let e = match_columns(&found("a,a,c"), &["a", "b"], &[]).unwrap_err();
        assert_eq!(e, "column `a` is there twice; column `c` is not in the contract; column b is missing");
        assert_eq!(match_columns(&found("a,c"), &["a", "b"], &["b"]).unwrap_err(), "column `c` is none of a, b");
    }
}

//! The shrink guard: a source that suddenly has far fewer rows is broken until somebody says that
//! it is not. Pure.

use crate::diff::TableChange;
use proto::ids::TableName;
use std::collections::BTreeMap;
use std::fmt;

/// When to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// More than this share of the rows (%) …
    pub percent: u64,
    /// … and more than this many.
    pub rows: u64,
}

/// One table (or the list of stores) that lost too much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shrunk {
    /// What it is.
    pub what: String,
    /// Rows before.
    pub before: u64,
    /// Rows that would go.
    pub gone: u64,
    /// Rows after.
    pub after: u64,
    /// The share (%) that may go.
    pub percent: u64,
}

impl fmt::Display for Shrunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shrunk { what, before, gone, after, .. } = self;
        if *after == 0 {
            return write!(f, "{what} would become empty (it has {before} rows)");
        }
        write!(f, "{gone} of {before} rows of {what} would go ({}%), {after} would stay", self.share())
    }
}

impl Shrunk {
    /// The share (%) that would go, with as many decimals as show that it is more than may.
    fn share(&self) -> String {
        let (gone, before) = (u128::from(self.gone), u128::from(self.before).max(1));
        let mut decimals = 0;
        loop {
            let unit = 10_u128.pow(decimals);
            let share = gone * 100 * unit / before;
            if share > u128::from(self.percent) * unit || decimals == 9 {
                let (whole, rest) = (share / unit, share % unit);
                let rest =
                    if decimals > 0 { format!(".{rest:0width$}", width = decimals as usize) } else { String::new() };
                return format!("{whole}{rest}");
            }
            decimals += 1;
        }
    }
}

/// Looks at one thing that has rows.
pub fn check(what: impl Into<String>, before: u64, gone: u64, after: u64, bounds: Bounds) -> Option<Shrunk> {
    let many = gone > bounds.rows && u128::from(gone) * 100 > u128::from(before) * u128::from(bounds.percent);
    let empty = before > 0 && after == 0;
    (many || empty).then(|| Shrunk { what: what.into(), before, gone, after, percent: bounds.percent })
}

/// Looks at all tables of an instance.
pub fn check_tables(tables: &BTreeMap<TableName, TableChange>, bounds: Bounds) -> Vec<Shrunk> {
    tables.iter().filter_map(|(name, t)| check(format!("table {name}"), t.before, t.gone, t.after, bounds)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bounds_must_be_passed_or_all_rows_gone() {
        let at =
            |before, gone, after| check("table t", before, gone, after, Bounds { percent: 20, rows: 100 }).is_some();
        assert!(!at(1000, 200, 800), "20% is not more than 20%");
        assert!(at(1000, 201, 800));
        assert!(!at(500, 100, 400), "100 rows are not more than 100");
        assert!(at(505, 102, 403));
        assert!(!at(1_000_000, 101, 999_899));
        assert!(at(1, 1, 0), "an emptied table");
        assert!(!at(0, 0, 0));
        assert!(at(300, 300, 500), "other rows instead of those are a loss too");
    }

    #[test]
    fn the_counts_are_told() {
        let bounds = Bounds { percent: 20, rows: 100 };
        let text = check("table item", 1000, 300, 700, bounds).unwrap().to_string();
        assert_eq!(text, "300 of 1000 rows of table item would go (30%), 700 would stay");
        for (before, gone, share) in [(800, 161, "20.1%"), (99_999, 20_000, "20.0002%"), (700, 142, "20.2%")] {
            let text = check("table item", before, gone, before - gone, bounds).unwrap().to_string();
            assert!(text.contains(&format!("would go ({share})")), "{text}");
        }
        assert!(check("table item", 5, 5, 0, bounds).unwrap().to_string().contains("become empty"));
    }
}

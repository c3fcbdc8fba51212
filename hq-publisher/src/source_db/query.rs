//! A query of the configuration: `:store` and `:zone` are found where SQL would read them, and
//! become the driver's placeholders. Names are bound as values; nothing is ever pasted.

use std::fmt::Write as _;

/// Which SQL a query is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// SQLite.
    Sqlite,
    /// PostgreSQL.
    Postgres,
    /// MySQL and MariaDB.
    MySql,
}

/// A value that a query may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Param {
    /// `:store`, the id of the store that the rows are for.
    Store,
    /// `:zone`, the zone that the rows are for.
    Zone,
}

/// A query ready for its driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The text with the driver's placeholders.
    pub sql: String,
    /// What to bind, in order.
    pub params: Vec<Param>,
}

/// A query that cannot be used as it is written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// `:name` that nothing is known of.
    #[error("`:{0}` is not known; there are :store and :zone")]
    UnknownName(String),
    /// A placeholder of the driver's own.
    #[error("`{0}` is a bare placeholder that nothing is bound to; write :store or :zone")]
    BarePlaceholder(String),
    /// A second statement.
    #[error("there is more than one statement (a `;` with text after it)")]
    SeveralStatements,
    /// A string or comment that does not end.
    #[error("a {0} is not closed")]
    NotClosed(&'static str),
    /// Nothing.
    #[error("it is empty")]
    Empty,
    /// A name that its audience gives no value for.
    #[error("`{name}` has no value in a stream whose audience is `{audience}`")]
    NoValue {
        /// `:store` or `:zone`.
        name: &'static str,
        /// The audience of the stream.
        audience: String,
    },
}

impl Query {
    /// Reads a query's text.
    pub fn parse(text: &str, dialect: Dialect) -> Result<Query, QueryError> {
        let text = text.trim();
        let mut scan = Scan { rest: text, dialect, out: Query { sql: String::new(), params: Vec::new() } };
        scan.run()?;
        if scan.out.sql.trim().is_empty() { Err(QueryError::Empty) } else { Ok(scan.out) }
    }

    /// Whether the query asks for a value.
    pub fn asks(&self, param: Param) -> bool {
        self.params.contains(&param)
    }

    /// Refuses names that the audience (`all`, `zone`, `store`) has no value for.
    pub fn check(&self, audience: &str) -> Result<(), QueryError> {
        let refused = match audience {
            "all" => [Some(Param::Store), Some(Param::Zone)],
            "zone" => [Some(Param::Store), None],
            _ => [None, None],
        };
        match refused.into_iter().flatten().find(|p| self.asks(*p)) {
            Some(p) => Err(QueryError::NoValue { name: p.name(), audience: audience.to_owned() }),
            None => Ok(()),
        }
    }
}

impl Param {
    fn name(self) -> &'static str {
        match self {
            Param::Store => ":store",
            Param::Zone => ":zone",
        }
    }
}

struct Scan<'t> {
    rest: &'t str,
    dialect: Dialect,
    out: Query,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

impl<'t> Scan<'t> {
    /// Copies the next `n` bytes as they are.
    fn copy(&mut self, n: usize) {
        self.out.sql.push_str(&self.rest[..n]);
        self.rest = &self.rest[n..];
    }

    /// The word (letters, digits, `_`) at byte `from`.
    fn word(&self, from: usize) -> &'t str {
        let rest = &self.rest[from..];
        &rest[..rest.find(|c| !is_word(c)).unwrap_or(rest.len())]
    }

    fn run(&mut self) -> Result<(), QueryError> {
        // Whether the byte before could end a word: `a1$x$` is a name, `e'…'` a string's mark.
        while let Some(c) = self.rest.chars().next() {
            if let Some(n) = self.comment()? {
                self.copy(n);
                continue;
            }
            match c {
                '\'' | '"' | '`' => self.quoted(c, self.dialect == Dialect::MySql && c != '`')?,
                '[' if self.dialect == Dialect::Sqlite => {
                    let n = self.rest.find(']').ok_or(QueryError::NotClosed("[name]"))?;
                    self.copy(n + 1);
                }
                '$' => self.dollar()?,
                ':' => self.colon()?,
                ';' => {
                    // Comments after it are no statement.
                    self.rest = &self.rest[1..];
                    return self.only_blank();
                }
                '?' if self.dialect != Dialect::Postgres => return Err(QueryError::BarePlaceholder("?".into())),
                '@' if self.dialect == Dialect::Sqlite => {
                    return Err(QueryError::BarePlaceholder(format!("@{}", self.word(1))));
                }
                _ if is_word(c) => {
                    let word = self.word(0);
                    self.copy(word.len());
                    // E'…' has backslash escapes.
                    let escapes = self.dialect == Dialect::Postgres && word.eq_ignore_ascii_case("e");
                    if escapes && self.rest.starts_with('\'') {
                        self.quoted('\'', true)?;
                    } else if self.rest.starts_with('$') && self.dialect != Dialect::Sqlite {
                        // A `$` inside a name.
                        self.copy(1);
                    }
                }
                _ => self.copy(c.len_utf8()),
            }
        }
        Ok(())
    }

    /// The length of the comment that begins here.
    fn comment(&self) -> Result<Option<usize>, QueryError> {
        let rest = self.rest;
        let to_line_end = rest.find('\n').unwrap_or(rest.len());
        let dashes = rest.starts_with("--")
            && (self.dialect != Dialect::MySql
                || rest[2..].chars().next().is_none_or(|c| c.is_whitespace() || c.is_control()));
        if dashes || (self.dialect == Dialect::MySql && rest.starts_with('#')) {
            return Ok(Some(to_line_end));
        }
        if !rest.starts_with("/*") {
            return Ok(None);
        }
        let (mut depth, mut at) = (1, 2);
        while depth > 0 {
            let close = rest[at..].find("*/").ok_or(QueryError::NotClosed("comment"))?;
            // PostgreSQL's comments nest.
            match rest[at..].find("/*") {
                Some(open) if open < close && self.dialect == Dialect::Postgres => {
                    (depth, at) = (depth + 1, at + open + 2)
                }
                _ => (depth, at) = (depth - 1, at + close + 2),
            }
        }
        Ok(Some(at))
    }

    /// A string or quoted name; the quote doubled stands for itself.
    fn quoted(&mut self, quote: char, backslash: bool) -> Result<(), QueryError> {
        let mut chars = self.rest.char_indices().skip(1).peekable();
        while let Some((at, c)) = chars.next() {
            if backslash && c == '\\' {
                chars.next();
            } else if c == quote {
                if chars.peek().is_some_and(|(_, next)| *next == quote) {
                    chars.next();
                } else {
                    self.copy(at + 1);
                    return Ok(());
                }
            }
        }
        Err(QueryError::NotClosed("string or quoted name"))
    }

    /// `$tag$ … $tag$`, or a placeholder.
    fn dollar(&mut self) -> Result<(), QueryError> {
        let word = self.word(1);
        match self.dialect {
            Dialect::MySql => self.copy(1),
            Dialect::Postgres if !word.starts_with(|c: char| c.is_ascii_digit()) => {
                let tag = word.len() + 2;
                if !self.rest[1 + word.len()..].starts_with('$') {
                    self.copy(1);
                    return Ok(());
                }
                let end = self.rest[tag..].find(&self.rest[..tag]).ok_or(QueryError::NotClosed("$string$"))?;
                self.copy(tag + end + tag);
            }
            _ => return Err(QueryError::BarePlaceholder(format!("${word}"))),
        }
        Ok(())
    }

    fn colon(&mut self) -> Result<(), QueryError> {
        if self.rest.starts_with("::") {
            self.copy(2);
            return Ok(());
        }
        let word = self.word(1);
        let param = match word {
            "store" => Param::Store,
            "zone" => Param::Zone,
            // `[1:2]`, `:=` and a lone colon are none of ours.
            _ if !word.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                self.copy(1);
                return Ok(());
            }
            _ => return Err(QueryError::UnknownName(word.to_owned())),
        };
        self.rest = &self.rest[1 + word.len()..];
        if self.dialect == Dialect::Postgres {
            let place = self.out.params.iter().position(|p| *p == param).unwrap_or_else(|| {
                self.out.params.push(param);
                self.out.params.len() - 1
            });
            let _ = write!(self.out.sql, "${}", place + 1);
        } else {
            self.out.params.push(param);
            self.out.sql.push('?');
        }
        Ok(())
    }

    /// After the `;`.
    fn only_blank(&mut self) -> Result<(), QueryError> {
        while let Some(c) = self.rest.chars().next() {
            let n = match self.comment()? {
                Some(n) => n,
                None if c.is_whitespace() || c == ';' => c.len_utf8(),
                None => return Err(QueryError::SeveralStatements),
            };
            self.rest = &self.rest[n..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Dialect::{MySql, Postgres, Sqlite};
    use super::*;

    fn sql(text: &str, dialect: Dialect) -> String {
        Query::parse(text, dialect).unwrap().sql
    }

    #[test]
    fn names_are_found_where_sql_reads_them_and_nowhere_else() {
        for (dialect, text, want) in [
            (Sqlite, "SELECT 1 WHERE z = :zone AND s=:store OR z=:zone", "SELECT 1 WHERE z = ? AND s=? OR z=?"),
            (Postgres, "SELECT 1 WHERE z = :zone AND s=:store OR z=:zone", "SELECT 1 WHERE z = $1 AND s=$2 OR z=$1"),
            (
                Postgres,
                "SELECT price::text, :zone::text, ':zone', \":zone\"",
                "SELECT price::text, $1::text, ':zone', \":zone\"",
            ),
            (Postgres, "SELECT $$:zone$$, $a$ :zone $$ $a$, :zone", "SELECT $$:zone$$, $a$ :zone $$ $a$, $1"),
            (Postgres, "SELECT E'it\\':zone', 'a\\', :zone", "SELECT E'it\\':zone', 'a\\', $1"),
            (
                Postgres,
                "SELECT a[1:2], b ? 'x', c$d$e /* :zone /* :a */ :b */ , :zone",
                "SELECT a[1:2], b ? 'x', c$d$e /* :zone /* :a */ :b */ , $1",
            ),
            (
                Sqlite,
                "SELECT ':a''b:zone', [:zone], `:zone` -- :zone\n, :zone",
                "SELECT ':a''b:zone', [:zone], `:zone` -- :zone\n, ?",
            ),
            (Sqlite, "SELECT 1 /* :zone ' */ ;  -- done", "SELECT 1 /* :zone ' */ "),
            (
                MySql,
                "SELECT 'a\\':zone', \"b\\\":zone\", 5--2, @x:=1 # :zone\n, :zone -- :zone",
                "SELECT 'a\\':zone', \"b\\\":zone\", 5--2, @x:=1 # :zone\n, ? -- :zone",
            ),
            (MySql, "SELECT `:zone`, 1 /* ' :zone */ WHERE a=:store", "SELECT `:zone`, 1 /* ' :zone */ WHERE a=?"),
            (Sqlite, "SELECT 'é:zone', é FROM t WHERE é=:zone", "SELECT 'é:zone', é FROM t WHERE é=?"),
        ] {
            assert_eq!(sql(text, dialect), want, "{dialect:?}");
        }
    }

    #[test]
    fn mistakes_are_told() {
        use QueryError::*;
        for (dialect, text, want) in [
            (Sqlite, "SELECT :zonen", UnknownName("zonen".into())),
            (Postgres, "SELECT :a", UnknownName("a".into())),
            (Sqlite, "SELECT ?1", BarePlaceholder("?".into())),
            (Sqlite, "SELECT @a", BarePlaceholder("@a".into())),
            (Sqlite, "SELECT $a", BarePlaceholder("$a".into())),
            (Postgres, "SELECT $1", BarePlaceholder("$1".into())),
            (Sqlite, "SELECT 1; DELETE FROM t", SeveralStatements),
            (Sqlite, "SELECT ':zone", NotClosed("string or quoted name")),
            (Postgres, "SELECT $a$ x", NotClosed("$string$")),
            (Sqlite, "SELECT 1 /* x", NotClosed("comment")),
            (Sqlite, "  ;", Empty),
        ] {
            assert_eq!(Query::parse(text, dialect).unwrap_err(), want, "{text}");
        }
    }

    #[test]
    fn names_need_an_audience_that_gives_them_a_value() {
        let q = Query::parse("SELECT :zone", Sqlite).unwrap();
        assert!(q.check("all").unwrap_err().to_string().contains(":zone"));
        q.check("zone").unwrap();
        q.check("store").unwrap();
        assert!(Query::parse("SELECT :store", Sqlite).unwrap().check("zone").is_err());
    }
}

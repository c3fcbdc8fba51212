//! Just enough of SQL's tokens to cut a CREATE TABLE into its definitions and to find
//! `length(column) <= N` in a CHECK. SQLite itself has accepted the text before it comes here.

/// A token: its text without surrounding blanks or comments, and whether it is a quoted name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token<'s> {
    /// The token as written.
    pub text: &'s str,
    /// Where it begins in the statement.
    pub start: usize,
}

impl Token<'_> {
    /// Whether the token is this keyword or name, in any case, quoted or not.
    pub fn is(&self, word: &str) -> bool {
        self.name().eq_ignore_ascii_case(word)
    }
    /// The name without its quotes.
    pub fn name(&self) -> &str {
        let t = self.text;
        match t.as_bytes().first() {
            Some(b'"' | b'`' | b'[' | b'\'') if t.len() >= 2 => &t[1..t.len() - 1],
            _ => t,
        }
    }
}

/// Cuts a statement into tokens; comments and blanks are dropped.
pub fn tokens(sql: &str) -> Vec<Token<'_>> {
    let b = sql.as_bytes();
    let mut out = Vec::new();
    let mut i = 0;
    while i < b.len() {
        let start = i;
        match b[i] {
            c if c.is_ascii_whitespace() => {
                i += 1;
                continue;
            }
            b'-' if b.get(i + 1) == Some(&b'-') => {
                i = sql[i..].find('\n').map_or(b.len(), |n| i + n);
                continue;
            }
            b'/' if b.get(i + 1) == Some(&b'*') => {
                i = sql[i + 2..].find("*/").map_or(b.len(), |n| i + n + 4);
                continue;
            }
            // SQLite takes a byte order mark for a blank, wherever a token could begin.
            0xEF if sql[i..].starts_with('\u{feff}') => {
                i += '\u{feff}'.len_utf8();
                continue;
            }
            quote @ (b'"' | b'\'' | b'`') => i = end_of_quoted(b, i, quote),
            b'[' => i = sql[i..].find(']').map_or(b.len(), |n| i + n + 1),
            // x'0102', a blob
            b'x' | b'X' if b.get(i + 1) == Some(&b'\'') => i = end_of_quoted(b, i + 1, b'\''),
            c if is_word(c) => {
                i = end_of_word(b, i);
                // 1e-5
                let is_number = c.is_ascii_digit() || c == b'.';
                let is_decimal = is_number && !sql[start..i].contains(['x', 'X']);
                let sign = matches!(b.get(i), Some(b'+' | b'-')) && b.get(i + 1).is_some_and(u8::is_ascii_digit);
                if is_decimal && sign && matches!(b[i - 1], b'e' | b'E') {
                    i = end_of_word(b, i + 1);
                }
            }
            // -> and ->>
            b'-' if b.get(i + 1) == Some(&b'>') => i += if b.get(i + 2) == Some(&b'>') { 3 } else { 2 },
            b'<' | b'>' | b'=' | b'!' | b'|' => {
                i += 1;
                if i < b.len() && matches!(b[i], b'<' | b'>' | b'=' | b'|') {
                    i += 1;
                }
            }
            _ => i += 1,
        }
        out.push(Token { text: &sql[start..i], start });
    }
    out
}

/// A statement without the blanks and comments behind it: what follows it would be read as part of them.
pub fn trimmed(sql: &str) -> &str {
    tokens(sql).last().map_or(sql, |last| &sql[..last.start + last.text.len()])
}

/// What a statement says, however it is spelt: its tokens without the `;` at the end and the words that change nothing (COLUMN
/// after ADD, IF NOT EXISTS), words in lower case, plain names without quotes, numbers by their value. Of any text.
pub fn meaning(statement: &str) -> Vec<String> {
    let written = tokens(statement);
    let mut out: Vec<String> = written.iter().map(|t| plain(t.text)).collect();
    while out.last().is_some_and(|t| t == ";") {
        out.pop();
    }
    let is_alter = out.first().is_some_and(|t| t == "alter");
    if is_alter && out.len() > 5 && written[4].text.eq_ignore_ascii_case("column") {
        out.remove(4);
    }
    if let Some(at) = out.windows(3).take(4).position(|w| w == ["if", "not", "exists"]) {
        out.drain(at..at + 3);
    }
    out
}

fn plain(token: &str) -> String {
    let quotes = [('"', '"'), ('`', '`'), ('[', ']')];
    let quoted = quotes.into_iter().find_map(|(open, close)| token.strip_prefix(open)?.strip_suffix(close));
    let is_plain = |n: &str| !n.is_empty() && n.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
    match quoted {
        Some(name) if is_plain(name) => name.to_ascii_lowercase(),
        Some(_) => token.to_owned(),
        None if token.starts_with('\'') => token.to_owned(),
        None => number(token).unwrap_or_else(|| token.to_ascii_lowercase()),
    }
}

/// A number as its value is spelt here; none where a token is none.
fn number(token: &str) -> Option<String> {
    if !token.strip_prefix('.').unwrap_or(token).starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let digits = token.replace('_', "").to_ascii_lowercase();
    match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok().map(|n| n.to_string()),
        // A real is no integer, whatever its value.
        None => {
            digits.parse().map(|n: u64| n.to_string()).or_else(|_| digits.parse().map(|x: f64| format!("{x:e}"))).ok()
        }
    }
}

/// Whether two statements differ in layout and comments only.
pub fn same(a: &str, b: &str) -> bool {
    tokens(a).iter().map(|t| t.text).eq(tokens(b).iter().map(|t| t.text))
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c == b'.' || c == b'$' || c >= 0x80
}

fn end_of_word(b: &[u8], start: usize) -> usize {
    b[start..].iter().position(|c| !is_word(*c)).map_or(b.len(), |n| start + n)
}

/// The index after the closing quote; a doubled quote stands for itself.
fn end_of_quoted(b: &[u8], start: usize, quote: u8) -> usize {
    let mut i = start + 1;
    while i < b.len() {
        if b[i] == quote {
            if b.get(i + 1) != Some(&quote) {
                return i + 1;
            }
            i += 1;
        }
        i += 1;
    }
    b.len()
}

/// The definitions between a CREATE TABLE's outer parentheses, and what follows them. Each is
/// spelt in one way (tokens joined by a blank), so that layout and comments do not count.
pub fn definitions(create: &str) -> (Vec<String>, String) {
    let tokens = tokens(create);
    let Some(open) = tokens.iter().position(|t| t.text == "(") else { return (Vec::new(), String::new()) };
    let mut depth = 0;
    let mut parts: Vec<Vec<&str>> = vec![Vec::new()];
    let mut rest = Vec::new();
    let mut closed = false;
    for t in &tokens[open..] {
        if closed {
            rest.push(t.text);
            continue;
        }
        match t.text {
            "(" => depth += 1,
            ")" => depth -= 1,
            _ => {}
        }
        match (depth, t.text) {
            (1, "(") => {}
            (0, ")") => closed = true,
            (1, ",") => parts.push(Vec::new()),
            _ => parts.last_mut().into_iter().for_each(|p| p.push(t.text)),
        }
    }
    (parts.iter().map(|p| p.join(" ")).collect(), rest.join(" "))
}

/// The collation of a column's definition, the default's name if it has none.
pub fn collation(definition: &str) -> &str {
    let (mut depth, mut found) = (0, "BINARY");
    let tokens = tokens(definition);
    for pair in tokens.windows(2) {
        match pair[0].text {
            "(" => depth += 1,
            ")" => depth -= 1,
            // Within a CHECK it is an expression's.
            word if depth == 0 && word.eq_ignore_ascii_case("COLLATE") => {
                found = pair[1].text.trim_matches(['"', '`', '\'', '[', ']']);
            }
            _ => {}
        }
    }
    found
}

/// The greatest N of `length(column) <= N`, `< N+1`, or `BETWEEN a AND N` in a CREATE TABLE.
pub fn length_limit(create: &str, column: &str) -> Option<u64> {
    let t = tokens(create);
    let number = |i: usize| t.get(i).and_then(|t| t.text.parse::<u64>().ok());
    (0..t.len()).find_map(|i| {
        let call =
            t[i].is("length") && t.get(i + 1)?.text == "(" && t.get(i + 2)?.is(column) && t.get(i + 3)?.text == ")";
        if !call {
            return None;
        }
        match t.get(i + 4)?.text {
            "<=" => number(i + 5),
            "<" => number(i + 5)?.checked_sub(1),
            w if w.eq_ignore_ascii_case("between") => number(i + 7),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_do_not_depend_on_layout() {
        let a = "CREATE TABLE t (sku TEXT PRIMARY KEY, -- a, comment\n n TEXT CHECK(length(n)<=5 AND n<>'a,b)'), /* ( */ UNIQUE(n, sku)) STRICT";
        let b =
            "CREATE TABLE t(sku TEXT PRIMARY KEY,n TEXT CHECK ( length(n) <= 5 AND n <> 'a,b)' ),UNIQUE(n,sku))STRICT";
        assert_eq!(definitions(a), definitions(b));
        assert_eq!(definitions(a).0.len(), 3);
        assert_eq!(definitions(a).1, "STRICT");
    }

    #[test]
    fn a_statement_means_the_same_however_it_is_spelt() {
        let alter = "ALTER TABLE \"price\" ADD COLUMN vat REAL NOT NULL DEFAULT - 1.5e-3 CHECK ( vat < 30 )";
        for same in [
            "ALTER TABLE price ADD COLUMN vat REAL NOT NULL DEFAULT -1.5e-3 CHECK(vat<30)",
            "alter table [Price] add vat real not null default -15E-4 check (`vat` < 0x1E);",
            "ALTER TABLE price -- a word\n ADD /* and more */ \"vat\" REAL NOT NULL DEFAULT -.0_015 CHECK (vat < 030) ; ;",
        ] {
            assert_eq!(meaning(same), meaning(alter), "{same}");
        }
        for other in [
            "ALTER TABLE prices ADD COLUMN vat REAL NOT NULL DEFAULT -1.5e-3 CHECK (vat < 30)",
            "ALTER TABLE price ADD COLUMN vat REAL NOT NULL DEFAULT 1.5e-3 CHECK (vat < 30)",
            "ALTER TABLE price ADD COLUMN vat REAL NOT NULL DEFAULT -1.5e-3 CHECK (vat < 30.0)",
            "ALTER TABLE price ADD COLUMN vat REAL NOT NULL DEFAULT -1.5e-3 CHECK (vat < 30); DROP TABLE price",
            "ALTER TABLE price RENAME COLUMN vat TO x",
        ] {
            assert_ne!(meaning(other), meaning(alter), "{other}");
        }
        let made = meaning("CREATE UNIQUE INDEX i ON t (a)");
        assert_eq!(meaning("create unique index if not exists \"i\" on t(a);"), made);
        assert_ne!(meaning("CREATE INDEX i ON t (a)"), made);
        // A text is itself, and a column may have a word's name.
        assert_ne!(meaning("ALTER TABLE t ADD a TEXT DEFAULT 'X'"), meaning("ALTER TABLE t ADD a TEXT DEFAULT 'x'"));
        assert_eq!(meaning("ALTER TABLE t ADD \"column\" TEXT"), meaning("ALTER TABLE t ADD COLUMN [column] TEXT"));
        // Whatever somebody wrote.
        for odd in ["", ";", "\"é", "[", "'", "x'", "0x", "1e", "ALTER TABLE t ADD COLUMN", "/*", "\u{feff}é\""] {
            meaning(odd);
        }
    }

    #[test]
    fn length_limits_are_found_in_their_spellings() {
        let t = "CREATE TABLE t (a TEXT CHECK (length(a) <= 100), b TEXT CHECK (LENGTH(\"b\")<21), c TEXT CHECK (length(c) BETWEEN 1 AND 7), d TEXT CHECK (length(trim(d)) <= 3))";
        assert_eq!(length_limit(t, "a"), Some(100));
        assert_eq!(length_limit(t, "b"), Some(20));
        assert_eq!(length_limit(t, "c"), Some(7));
        assert_eq!(length_limit(t, "d"), None);
    }
}

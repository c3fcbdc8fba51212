//! The settings as a tree that remembers where each value came from, and reads a variable's text
//! as the type that asks for it: `421` is a number for a port and a text for a store.

use serde::de::value::{MapAccessDeserializer, StringDeserializer};
use serde::de::{DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// Bytes of the file.
    Span(Range<usize>),
    /// An environment variable.
    Variable(String),
}

/// What is wrong, with which key, and where that was written.
#[derive(Debug)]
pub(super) struct Fault {
    what: String,
    path: Vec<String>,
    pub(super) place: Option<Place>,
}

impl Fault {
    fn new(what: impl fmt::Display) -> Self {
        Fault { what: what.to_string(), path: Vec::new(), place: None }
    }
    /// The innermost place wins.
    fn at(mut self, place: Option<&Place>) -> Self {
        self.place = self.place.or_else(|| place.cloned());
        self
    }
    fn under(mut self, key: &str) -> Self {
        self.path.push(key.to_owned());
        self
    }
    /// `serve.port: …`.
    pub(super) fn message(&self) -> String {
        let mut path = String::new();
        for step in self.path.iter().rev() {
            let dot = if path.is_empty() || step.starts_with('[') { "" } else { "." };
            path = format!("{path}{dot}{step}");
        }
        if path.is_empty() { self.what.clone() } else { format!("{path}: {}", self.what) }
    }
}
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())
    }
}
impl std::error::Error for Fault {}
impl Error for Fault {
    fn custom<T: fmt::Display>(what: T) -> Self {
        Fault::new(what)
    }
    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Fault::new(format!("unknown key `{field}`; {}", suggestion(field, expected)))
    }
    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Fault::new(format!("unknown value `{variant}`; {}", suggestion(variant, expected)))
    }
    fn missing_field(field: &'static str) -> Self {
        Fault::new(format!("missing key `{field}`"))
    }
}

fn suggestion(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "there are none here".to_owned(),
        None => format!("known are `{}`", known.join("`, `")),
    }
}

/// The known word that takes the fewest edits, if these are few for its length.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (edits, near) = known.iter().map(|k| (distance(word, k), *k)).min()?;
    (edits <= near.chars().count().max(word.chars().count()).div_ceil(3).max(1)).then_some(near)
}

/// Levenshtein's distance, with neighbours swapped as one edit.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    value: Value,
    place: Option<Place>,
}

#[derive(Debug, Clone)]
enum Value {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Tree>),
    /// With each key's place: that is where an unknown one is reported.
    Table(Vec<(String, Option<Place>, Tree)>),
    /// A variable's text, of no type yet.
    Loose(String),
}

impl Tree {
    /// Reads a TOML document.
    pub(super) fn parse(text: &str) -> Result<Tree, toml::de::Error> {
        let document = DeTable::parse(text)?;
        Ok(Tree { value: table(document.into_inner(), true)?, place: None })
    }

    /// Puts a variable's text where its name says.
    pub(super) fn set(&mut self, variable: &str, text: String) -> Result<(), String> {
        let path = variable.strip_prefix(super::PREFIX).unwrap_or(variable).to_ascii_lowercase();
        let place = Some(Place::Variable(variable.to_owned()));
        let mut at = self;
        let mut name = String::new();
        for key in path.split("__") {
            if key.is_empty() {
                return Err("it names no setting".to_owned());
            }
            if matches!(&at.value, Value::List(_)) {
                return Err("a list of tables can only be set in the file".to_owned());
            }
            let Value::Table(entries) = &mut at.value else { return Err(format!("`{name}` is not a section")) };
            let i = entries.iter().position(|(k, ..)| k == key).unwrap_or_else(|| {
                let empty = Tree { value: Value::Table(Vec::new()), place: place.clone() };
                entries.push((key.to_owned(), place.clone(), empty));
                entries.len() - 1
            });
            at = &mut entries[i].2;
            key.clone_into(&mut name);
        }
        match &at.value {
            Value::List(items) if items.iter().any(|i| matches!(i.value, Value::Table(_))) => {
                Err("a list of tables can only be set in the file".to_owned())
            }
            _ => {
                *at = Tree { value: Value::Loose(text), place };
                Ok(())
            }
        }
    }

    /// Reads the tree into a type.
    pub(super) fn read<T: serde::de::DeserializeOwned>(self) -> Result<T, Fault> {
        T::deserialize(self)
    }
}

fn table(t: DeTable<'_>, spans: bool) -> Result<Value, toml::de::Error> {
    let entries = t.into_iter().map(|(key, value)| {
        let place = spans.then(|| Place::Span(key.span()));
        Ok((key.into_inner().into_owned(), place, tree(value, spans)?))
    });
    entries.collect::<Result<_, _>>().map(Value::Table)
}

fn tree(v: Spanned<DeValue<'_>>, spans: bool) -> Result<Tree, toml::de::Error> {
    let place = spans.then(|| Place::Span(v.span()));
    let value = match v.into_inner() {
        DeValue::Boolean(b) => Value::Bool(b),
        DeValue::String(s) => Value::Text(s.into_owned()),
        DeValue::Datetime(d) => Value::Text(d.to_string()),
        DeValue::Integer(n) => match i64::from_str_radix(n.as_str(), n.radix()) {
            Ok(n) => Value::Int(n),
            Err(_) => return Err(toml::de::Error::custom(format!("the number {n} is too large"))),
        },
        DeValue::Float(x) => match x.as_str().parse() {
            Ok(x) => Value::Float(x),
            Err(_) => return Err(toml::de::Error::custom(format!("the number {x} cannot be read"))),
        },
        DeValue::Array(a) => Value::List(a.into_iter().map(|v| tree(v, spans)).collect::<Result<_, _>>()?),
        DeValue::Table(t) => table(t, spans)?,
    };
    Ok(Tree { value, place })
}

/// A variable's text as a TOML value, if it is one.
fn as_toml(text: &str) -> Option<Value> {
    DeValue::parse(text).ok().and_then(|v| tree(v, false).ok()).map(|t| t.value)
}

impl Tree {
    fn visit<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let place = self.place;
        let outcome = match self.value {
            Value::Bool(b) => visitor.visit_bool(b),
            Value::Int(n) => visitor.visit_i64(n),
            Value::Float(x) => visitor.visit_f64(x),
            Value::Text(s) | Value::Loose(s) => visitor.visit_string(s),
            Value::List(items) => visitor.visit_seq(Items { items: items.into_iter(), next: 0, place: place.clone() }),
            Value::Table(entries) => visitor.visit_map(Entries { entries: entries.into_iter(), value: None }),
        };
        outcome.map_err(|e| e.at(place.as_ref()))
    }

    /// What a variable's text becomes for a type that wants `read` of it.
    fn loose(self, read: impl Fn(&str) -> Result<Value, String>) -> Result<Tree, Fault> {
        match self.value {
            Value::Loose(text) => match read(text.trim()) {
                Ok(value) => Ok(Tree { value, place: self.place }),
                Err(what) => Err(Fault::new(what).at(self.place.as_ref())),
            },
            value => Ok(Tree { value, place: self.place }),
        }
    }
}

fn whole_number(text: &str) -> Result<Value, String> {
    text.parse().map(Value::Int).map_err(|_| format!("`{text}` is not a whole number"))
}
fn number(text: &str) -> Result<Value, String> {
    text.parse().map(Value::Float).map_err(|_| format!("`{text}` is not a number"))
}
fn truth(text: &str) -> Result<Value, String> {
    text.parse().map(Value::Bool).map_err(|_| format!("`{text}` is neither true nor false"))
}
fn list(text: &str) -> Result<Value, String> {
    match as_toml(text) {
        Some(Value::List(items)) if items.iter().any(|i| matches!(i.value, Value::Table(_))) => {
            Err("a list of tables can only be set in the file".to_owned())
        }
        Some(list @ Value::List(_)) => Ok(list),
        _ => Err(format!("`{text}` is not a list such as [\"a\", \"b\"]")),
    }
}

macro_rules! read_loosely {
    ($read:expr => $($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            self.loose($read)?.visit(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Tree {
    type Error = Fault;

    read_loosely!(|text| Ok(as_toml(text).unwrap_or_else(|| Value::Text(text.to_owned()))) => deserialize_any);
    read_loosely!(whole_number => deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128);
    read_loosely!(number => deserialize_f32 deserialize_f64);
    read_loosely!(truth => deserialize_bool);
    read_loosely!(list => deserialize_seq);

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }
    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Loose(text) if text.is_empty() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if let (Value::Loose(_), Some(Place::Variable(v))) = (&self.value, &self.place) {
            return Err(Fault::new(format!("it is a section; set {v}__KEY")).at(self.place.as_ref()));
        }
        self.visit(visitor)
    }
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.deserialize_map(visitor)
    }
    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let place = self.place;
        let outcome = match self.value {
            Value::Text(s) | Value::Loose(s) => visitor.visit_enum(IntoDeserializer::<Fault>::into_deserializer(s)),
            Value::Table(entries) => {
                visitor.visit_enum(MapAccessDeserializer::new(Entries { entries: entries.into_iter(), value: None }))
            }
            value => Tree { value, place: None }.visit(visitor),
        };
        outcome.map_err(|e| e.at(place.as_ref()))
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor)
    }
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }
}

struct Items {
    items: std::vec::IntoIter<Tree>,
    next: usize,
    /// A variable's list has no places of its own.
    place: Option<Place>,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Fault;
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let i = self.next;
        self.next += 1;
        seed.deserialize(item).map(Some).map_err(|e| e.at(self.place.as_ref()).under(&format!("[{i}]")))
    }
}

struct Entries {
    entries: std::vec::IntoIter<(String, Option<Place>, Tree)>,
    value: Option<(String, Tree)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Fault;
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, place, value)) = self.entries.next() else { return Ok(None) };
        self.value = Some((key.clone(), value));
        let text: StringDeserializer<Fault> = key.into_deserializer();
        seed.deserialize(text).map(Some).map_err(|e| e.at(place.as_ref()))
    }
    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some((key, value)) = self.value.take() else { return Err(Fault::new("a key without a value")) };
        let place = value.place.clone();
        seed.deserialize(value).map_err(|e| e.at(place.as_ref()).under(&key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted() {
        for (a, b, n) in [
            ("", "", 0),
            ("listn", "listen", 1),
            ("lsiten", "listen", 1),
            ("abc", "xyz", 3),
            ("", "ab", 2),
            ("ä", "a", 1),
        ] {
            assert_eq!(distance(a, b), n, "{a} {b}");
        }
        assert_eq!(nearest("heartbet", &["heartbeat", "poll"]), Some("heartbeat"));
        assert_eq!(nearest("qqq", &["heartbeat", "poll"]), None);
        assert_eq!(nearest("x", &[]), None);
    }
}

//! Walks a parsed TOML document with its positions, so that every complaint can name its line.
//!
//! Stands between the TOML parser and `config.rs`, which knows what the keys mean. A derived deserializer would stop at
//! its own errors and knows no nearest key; this one asks for each key by name and then checks that none is left over.

use super::error::{ConfigError, Problem};
use super::quantity::QuantityError;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Where a value stands: byte offset in the text.
pub(super) type At = usize;

/// The text and its name, for turning positions into lines.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) file: &'a Path,
    pub(super) text: &'a str,
}

impl Source<'_> {
    pub(super) fn error(&self, at: impl Into<Option<At>>, problem: Problem) -> ConfigError {
        let line = at.into().map(|at| {
            let end = at.min(self.text.len());
            1 + self.text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count()
        });
        ConfigError { file: self.file.to_owned(), line, problem: Box::new(problem) }
    }
}

/// One table of the document with the name people know it by.
pub(super) struct Table<'a> {
    source: Source<'a>,
    /// As in `[volumes.db]`, or "the top of the file".
    pub(super) name: String,
    at: At,
    entries: &'a DeTable<'a>,
}

impl<'a> Table<'a> {
    pub(super) fn new(source: Source<'a>, name: impl Into<String>, at: At, entries: &'a DeTable<'a>) -> Self {
        Self { source, name: name.into(), at, entries }
    }

    pub(super) fn at(&self) -> At {
        self.at
    }

    /// Refuses keys other than `known`, naming the nearest.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), ConfigError> {
        let unknown = self.entries.keys().filter(|key| !known.contains(&key.get_ref().as_ref()));
        let Some(key) = unknown.min_by_key(|key| key.span().start) else { return Ok(()) };
        let problem = Problem::UnknownKey {
            key: key.get_ref().clone().into_owned(),
            table: self.name.clone(),
            hint: nearest(key.get_ref(), known.iter().copied()),
        };
        Err(self.source.error(key.span().start, problem))
    }

    /// Refuses a name with dots that was not put in quotes: TOML has made tables within tables of it, and the table of
    /// `name`, in `group`, has none of its `known` keys.
    pub(super) fn undotted(&self, group: &str, name: &str, known: &[&str]) -> Result<(), ConfigError> {
        if self.entries.keys().any(|key| known.contains(&key.get_ref().as_ref())) {
            return Ok(());
        }
        let Some(dotted) = self.dotted(name, |value| !matches!(value, DeValue::Table(_))) else {
            return Ok(());
        };
        let (written, meant) = (format!("[{group}.{dotted}]"), format!("[{group}.\"{dotted}\"]"));
        Err(self.source.error(self.at, Problem::Dotted { written, meant }))
    }

    /// The names on the way from here, called `name`, into the first table that has a value for which `ends` holds, with
    /// dots between them; `None` where that is this table.
    fn dotted(&self, name: &str, ends: impl Fn(&DeValue<'_>) -> bool) -> Option<String> {
        let (mut names, mut table) = (name.to_owned(), self.entries);
        while !table.values().any(|value| ends(value.get_ref())) {
            let (key, inner) = table.iter().find_map(|(key, value)| match value.get_ref() {
                DeValue::Table(inner) => Some((key.get_ref(), inner)),
                _ => None,
            })?;
            names = format!("{names}.{key}");
            table = inner;
        }
        (names != name).then_some(names)
    }

    fn value(&self, key: &str) -> Option<(&'a DeValue<'a>, At)> {
        let (_, value) = self.entries.iter().find(|(name, _)| name.get_ref() == key)?;
        Some((value.get_ref(), value.span().start))
    }

    pub(super) fn missing(&self, key: &str, example: impl Into<String>) -> ConfigError {
        let problem =
            Problem::Missing { table: self.name.clone(), key: key.to_owned(), example: example.into() };
        self.source.error(self.at, problem)
    }

    fn wrong_type(&self, key: &str, at: At, value: &DeValue<'_>, expected: &'static str) -> ConfigError {
        let problem = Problem::Type {
            table: self.name.clone(),
            key: key.to_owned(),
            found: with_article(value),
            expected,
        };
        self.source.error(at, problem)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        let Some((value, at)) = self.value(key) else { return Ok(None) };
        match value {
            DeValue::Boolean(value) => Ok(Some(*value)),
            _ => Err(self.wrong_type(key, at, value, "true or false")),
        }
    }

    pub(super) fn string(
        &self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<(&'a str, At)>, ConfigError> {
        let Some((value, at)) = self.value(key) else { return Ok(None) };
        match value {
            DeValue::String(text) => Ok(Some((text.as_ref(), at))),
            _ => Err(self.wrong_type(key, at, value, expected)),
        }
    }

    /// A string, or an integer as its digits: sizes may be plain bytes.
    pub(super) fn string_or_integer(
        &self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<(String, At)>, ConfigError> {
        let Some((value, at)) = self.value(key) else { return Ok(None) };
        match value {
            DeValue::String(text) => Ok(Some((text.to_string(), at))),
            // `as_str` has TOML's underscores taken out already; hexadecimal has no place in a size.
            DeValue::Integer(number) if number.radix() == 10 => {
                Ok(Some((number.as_str().trim_start_matches('+').to_owned(), at)))
            }
            _ => Err(self.wrong_type(key, at, value, expected)),
        }
    }

    pub(super) fn strings(
        &self,
        key: &str,
        expected: &'static str,
    ) -> Result<Vec<(&'a str, At)>, ConfigError> {
        let Some((value, at)) = self.value(key) else { return Ok(Vec::new()) };
        let DeValue::Array(items) = value else { return Err(self.wrong_type(key, at, value, expected)) };
        let mut strings = Vec::with_capacity(items.len());
        for item in items {
            match item.get_ref() {
                DeValue::String(text) => strings.push((text.as_ref(), item.span().start)),
                other => return Err(self.wrong_type(key, item.span().start, other, expected)),
            }
        }
        Ok(strings)
    }

    /// The table under `key`, called `name` in messages.
    pub(super) fn table(
        &self,
        key: &str,
        name: String,
        expected: &'static str,
    ) -> Result<Option<Table<'a>>, ConfigError> {
        let Some((value, at)) = self.value(key) else { return Ok(None) };
        match value {
            DeValue::Table(entries) => Ok(Some(Table::new(self.source, name, at, entries))),
            _ => Err(self.wrong_type(key, at, value, expected)),
        }
    }

    /// All tables inside, in the order of the file, each with its key.
    pub(super) fn tables(&self, expected: &'static str) -> Result<Vec<(&'a str, Table<'a>)>, ConfigError> {
        let mut tables = Vec::with_capacity(self.entries.len());
        for (key, value) in self.entries {
            let name = format!("[{}.{}]", self.name, key.get_ref());
            match value.get_ref() {
                DeValue::Table(entries) => {
                    tables.push((
                        key.get_ref().as_ref(),
                        Table::new(self.source, name, key.span().start, entries),
                    ));
                }
                other => return Err(self.wrong_type(key.get_ref(), key.span().start, other, expected)),
            }
        }
        tables.sort_by_key(|(_, table)| table.at);
        Ok(tables)
    }

    /// All keys with string values, in the order of the file.
    pub(super) fn all_strings(
        &self,
        expected: &'static str,
    ) -> Result<Vec<(&'a str, &'a str, At)>, ConfigError> {
        let mut strings = Vec::with_capacity(self.entries.len());
        for (key, value) in self.entries {
            let at = key.span().start;
            match value.get_ref() {
                DeValue::String(text) => strings.push((key.get_ref().as_ref(), text.as_ref(), at)),
                DeValue::Table(inner) => return Err(self.dotted_string(key.get_ref(), at, inner)),
                other => return Err(self.wrong_type(key.get_ref(), at, other, expected)),
            }
        }
        strings.sort_by_key(|(_, _, at)| *at);
        Ok(strings)
    }

    /// A table where a string belongs: a name with dots, most likely.
    fn dotted_string(&self, key: &str, at: At, inner: &DeTable<'_>) -> ConfigError {
        let (mut name, mut table) = (key.to_owned(), inner);
        while let Some((key, value)) = table.iter().next() {
            name = format!("{name}.{}", key.get_ref());
            match value.get_ref() {
                DeValue::Table(inner) => table = inner,
                _ => break,
            }
        }
        let (written, meant) = (format!("{}: {name}", self.name), format!("\"{name}\""));
        self.source.error(at, Problem::Dotted { written, meant })
    }

    /// One of a few words, each with what it means, or `default` where the key is not there.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        words: &[(&str, T, &str)],
        default: T,
    ) -> Result<T, ConfigError> {
        let Some((found, at)) = self.string(key, "a word in quotes")? else { return Ok(default) };
        if let Some((_, value, _)) = words.iter().find(|(word, _, _)| *word == found) {
            return Ok(*value);
        }
        let meant = near(found, words.iter().map(|(word, _, _)| *word));
        let meant = meant.map_or_else(String::new, |word| format!("did you mean {word:?}? "));
        let meanings: Vec<_> =
            words.iter().map(|(word, _, meaning)| format!("{word:?} ({meaning})")).collect();
        let problem = Problem::Choice {
            table: self.name.clone(),
            key: key.to_owned(),
            found: found.to_owned(),
            hint: format!("{meant}there are {}", meanings.join(", ")),
        };
        Err(self.source.error(at, problem))
    }

    pub(super) fn quantity<T>(
        &self,
        key: &str,
        at: At,
        parsed: Result<T, QuantityError>,
    ) -> Result<T, ConfigError> {
        parsed.map_err(|source| {
            let problem = Problem::Quantity { table: self.name.clone(), key: key.to_owned(), source };
            self.source.error(at, problem)
        })
    }

    pub(super) fn bounds(&self, key: &str, at: At, found: &str, bounds: String) -> ConfigError {
        let problem = Problem::Bounds {
            table: self.name.clone(),
            key: key.to_owned(),
            found: found.to_owned(),
            bounds,
        };
        self.source.error(at, problem)
    }

    pub(super) fn place(&self, key: &str, at: At, found: &str, reason: &'static str) -> ConfigError {
        let problem =
            Problem::Place { table: self.name.clone(), key: key.to_owned(), found: found.to_owned(), reason };
        self.source.error(at, problem)
    }
}

/// The known word that `found` is a misspelling of, if it looks like one.
///
/// Never a word that `found` is with something in front, or the other way round: `sync` is no misspelling of `async`, nor
/// `secure` of `insecure`, nor `discontinue` of `continue`, but its opposite. In short words one letter is all that may differ: `udp`
/// is no misspelling of `tcp`.
fn near<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Damerau-Levenshtein is quadratic; nobody misspells a key of this length.
    if found.len() > 64 {
        return None;
    }
    let found = found.to_lowercase();
    let opposite = |word: &str| found != word && (found.ends_with(word) || word.ends_with(found.as_str()));
    let distance = |word: &str| strsim::damerau_levenshtein(&found, word);
    known
        .filter(|word| !opposite(&word.to_lowercase()))
        .map(|word| (distance(&word.to_lowercase()), word))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, word)| *distance < word.len().div_ceil(3).max(2))
        .map(|(_, word)| word)
}

/// "did you mean …?" where a known word is near, and the known words otherwise, or as many as fit a line.
pub(super) fn nearest<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<_> = known.collect();
    match (near(found, known.iter().copied()), known.len()) {
        (Some(word), _) => format!("did you mean {word:?}?"),
        (None, 0) => "there are none".to_owned(),
        (None, count) if count > WORDS_LISTED_MAX => {
            let (listed, more) = (known[..WORDS_LISTED_MAX].join(", "), count - WORDS_LISTED_MAX);
            format!("there are {listed} and {more} more")
        }
        (None, _) => format!("there are {}", known.join(", ")),
    }
}

/// Known words that one message names: more of them, as of a node with hundreds of volumes, would hide what it says.
const WORDS_LISTED_MAX: usize = 20;

fn with_article(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

//! `COSTANDBY_LOG` and `COSTANDBY_LOG_FORMAT`: which events become lines, and what a line looks like.
//!
//! Pure text in, a filter out. Set to nothing is as not set: environment files leave variables empty. A word that is not known is
//! refused with those that are; a filter that matches nothing would silence warnings, too.

use std::ffi::{OsStr, OsString};
use tracing_subscriber::filter::{LevelFilter, Targets};

/// Sets which events are logged.
pub(super) const FILTER_VARIABLE: &str = "COSTANDBY_LOG";

/// Sets what a line looks like.
pub(super) const FORMAT_VARIABLE: &str = "COSTANDBY_LOG_FORMAT";

const LEVELS: [(&str, LevelFilter); 5] = [
    ("error", LevelFilter::ERROR),
    ("warn", LevelFilter::WARN),
    ("info", LevelFilter::INFO),
    ("debug", LevelFilter::DEBUG),
    ("trace", LevelFilter::TRACE),
];

/// Crates that log. The libraries they use do not.
const CRATES: [&str; 2] = ["costandby_control", "costandby_datapath"];

/// What a line looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line, with at least `timestamp`, `level`, `target` and `fields`, of which `message` is one.
    Json,
}

/// How to log.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which events.
    pub(super) filter: Targets,
    /// As what.
    pub(super) format: Format,
}

/// A variable that nobody can follow: wrong usage.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SettingsError {
    /// `COSTANDBY_LOG`.
    #[error(
        "{FILTER_VARIABLE}={value:?}: {part:?} is {problem}{suggestion}; valid are error, warn, info, debug or trace, and for one \
         module with its name, such as costandby_datapath=debug; several with commas between them"
    )]
    Filter {
        /// All of it.
        value: String,
        /// The part that is wrong.
        part: String,
        /// In which way.
        problem: &'static str,
        /// Empty, or the word that was probably meant.
        suggestion: String,
    },
    /// `COSTANDBY_LOG_FORMAT`.
    #[error("{FORMAT_VARIABLE}={value:?} is no format: valid are text or json")]
    Format {
        /// As it was set.
        value: String,
    },
}

impl Settings {
    /// By the environment of this process.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn from_environment() -> Result<Self, SettingsError> {
        let get = |name| std::env::var_os(name).unwrap_or_default();
        Self::parse(&get(FILTER_VARIABLE), &get(FORMAT_VARIABLE))
    }

    /// By the values of both variables; empty is as not set.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn parse(filter: &OsStr, format: &OsStr) -> Result<Self, SettingsError> {
        Ok(Self { filter: parse_filter(filter)?, format: parse_format(format)? })
    }
}

fn parse_format(value: &OsStr) -> Result<Format, SettingsError> {
    match value.to_string_lossy().trim().to_ascii_lowercase().as_str() {
        "" | "text" => Ok(Format::Text),
        "json" => Ok(Format::Json),
        _ => Err(SettingsError::Format { value: OsString::from(value).to_string_lossy().into_owned() }),
    }
}

fn parse_filter(value: &OsStr) -> Result<Targets, SettingsError> {
    let value = value.to_string_lossy();
    // A level for one module leaves all others as they are without it.
    let mut filter = Targets::new().with_default(LevelFilter::INFO);
    for part in value.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let refuse = |problem, suggestion: Option<&str>| SettingsError::Filter {
            value: value.clone().into_owned(),
            part: part.to_owned(),
            problem,
            suggestion: suggestion.map(|word| format!(" (did you mean `{word}`?)")).unwrap_or_default(),
        };
        let known = LEVELS.map(|(word, _)| word);
        match part.split_once('=') {
            None => match level(part) {
                Some(level) => filter = filter.with_default(level),
                None if is_ours(part) => return Err(refuse("a module without a level", None)),
                None if is_silence(part) => {
                    return Err(refuse(
                        "no level: a daemon's errors are always logged, and `error` is the quietest",
                        None,
                    ));
                }
                None => return Err(refuse("no level", meant(part, &known))),
            },
            Some((target, word)) => {
                if !is_ours(target) {
                    let name = target.split("::").next().unwrap_or_default();
                    return Err(refuse("for no module that logs", meant(name, &CRATES)));
                }
                let level = level(word).ok_or_else(|| match is_silence(word) {
                    true => {
                        refuse("for no level: errors are always logged, and `error` is the quietest", None)
                    }
                    false => refuse("for no level", meant(word, &known)),
                })?;
                filter = filter.with_target(target, level);
            }
        }
    }
    Ok(filter)
}

fn level(word: &str) -> Option<LevelFilter> {
    LEVELS.iter().find(|(known, _)| known.eq_ignore_ascii_case(word)).map(|(_, level)| *level)
}

/// Whether `word` means no log at all where other programs have one.
fn is_silence(word: &str) -> bool {
    ["off", "none", "quiet", "silent"].iter().any(|known| known.eq_ignore_ascii_case(word))
}

/// Whether events come from `target`, as far as its crate tells.
fn is_ours(target: &str) -> bool {
    CRATES.contains(&target.split("::").next().unwrap_or_default())
}

/// The known word that `found` begins with, is the beginning of, or is near to.
fn meant<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    let found = found.to_ascii_lowercase();
    // Damerau-Levenshtein is quadratic; nobody misspells a word of this length.
    if found.len() < 2 || found.len() > 64 {
        return None;
    }
    let begins = |word: &&&str| found.starts_with(**word) || word.starts_with(&found);
    let near = |word: &&&str| strsim::damerau_levenshtein(&found, word) <= 1 + word.len() / 6;
    known.iter().find(begins).or_else(|| known.iter().find(near)).copied()
}

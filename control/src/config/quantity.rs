//! Sizes and durations as people write them: `"64GiB"`, `"512MiB"`, `"10GB"`, `4096`, `"500ms"`, `"30s"`.
//!
//! Used by the configuration and by the command line, so that both read and print the same words.
//!
//! Invariants: whole numbers only, nothing is rounded, overflow is an error. A bare `64G` is refused: it means 64 GB to
//! some tools and 64 GiB to others, and a volume made with the wrong one does not fit its peer.

use std::time::Duration;

const SIZE_UNITS: [(&str, u64); 13] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("PiB", 1 << 50),
    ("EiB", 1 << 60),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("PB", 1_000_000_000_000_000),
    ("EB", 1_000_000_000_000_000_000),
];

const DURATION_UNITS: [(&str, u64); 5] =
    [("us", 1), ("ms", 1_000), ("s", 1_000_000), ("m", 60_000_000), ("h", 3_600_000_000)];

/// Why a size or duration cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QuantityError {
    /// No digits in front.
    #[error("{text:?} is not a {what}: write a whole number and a unit, such as {example}")]
    Number {
        /// As written.
        text: String,
        /// `"size"` or `"duration"`.
        what: &'static str,
        /// A good one.
        example: &'static str,
    },
    /// A unit that is not one of ours.
    #[error("{text:?} needs one of the units {units}")]
    Unit {
        /// As written.
        text: String,
        /// All known units.
        units: &'static str,
    },
    /// `64G`.
    #[error(
        "{text:?} can mean two sizes: write {number}{letter}iB (powers of 1024) or {number}{letter}B (of 1000)"
    )]
    Ambiguous {
        /// As written.
        text: String,
        /// Its digits.
        number: String,
        /// Its letter.
        letter: char,
    },
    /// More than 2^64.
    #[error("{text:?} is too large")]
    Overflow {
        /// As written.
        text: String,
    },
}

/// Bytes of a size such as `"64GiB"`, `"10 GB"` or `"4096"`.
///
/// # Errors
/// [`QuantityError`], which says how to write it.
pub fn parse_size(text: &str) -> Result<u64, QuantityError> {
    const EXAMPLE: &str = "\"64GiB\"";
    let (number, digits, unit) = split(text, "size", EXAMPLE)?;
    let scale = if unit.is_empty() {
        1
    } else if let Some((_, scale)) = SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
        *scale
    } else {
        let mut letters = unit.chars().map(|letter| letter.to_ascii_uppercase());
        return Err(match (letters.next(), letters.next()) {
            (Some(letter @ ('K' | 'M' | 'G' | 'T' | 'P' | 'E')), None) => {
                QuantityError::Ambiguous { text: text.to_owned(), number: digits.to_owned(), letter }
            }
            _ => QuantityError::Unit {
                text: text.to_owned(),
                units: "B, KiB, MiB, GiB, TiB, PiB, EiB, kB, MB, GB, TB, PB, EB",
            },
        });
    };
    number.checked_mul(scale).ok_or_else(|| QuantityError::Overflow { text: text.to_owned() })
}

/// A duration such as `"500ms"` or `"30s"`. A unit is required: a bare number has no right reading.
///
/// # Errors
/// [`QuantityError`], which says how to write it.
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let (number, _, unit) = split(text, "duration", "\"500ms\" or \"30s\"")?;
    let (_, scale) = DURATION_UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(|| QuantityError::Unit { text: text.to_owned(), units: "us, ms, s, m, h" })?;
    number
        .checked_mul(*scale)
        .map(Duration::from_micros)
        .ok_or_else(|| QuantityError::Overflow { text: text.to_owned() })
}

/// A size for people: exact where it is a whole number of a unit, one decimal otherwise, always powers of 1024.
#[must_use]
pub fn display_size(bytes: u64) -> String {
    let (unit, scale) =
        SIZE_UNITS[..7].iter().rev().find(|(_, scale)| bytes >= *scale).copied().unwrap_or(("B", 1));
    if bytes.is_multiple_of(scale) {
        return format!("{} {unit}", bytes / scale);
    }
    // Truncated, so that something almost full or almost done never reads as full or done.
    let tenths = (bytes % scale) * 10 / scale.max(10);
    format!("{}.{} {unit}", bytes / scale, tenths.min(9))
}

fn split<'a>(
    text: &'a str,
    what: &'static str,
    example: &'static str,
) -> Result<(u64, &'a str, &'a str), QuantityError> {
    let trimmed = text.trim();
    let end = trimmed.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(trimmed.len());
    let (digits, unit) = trimmed.split_at(end);
    if digits.is_empty() || unit.starts_with(['.', ',', '_']) {
        return Err(QuantityError::Number { text: text.to_owned(), what, example });
    }
    let number = digits.parse().map_err(|_| QuantityError::Overflow { text: text.to_owned() })?;
    Ok((number, digits, unit.trim()))
}

//! The pair's key: 32 random bytes, and the text that holds them in a file.
//!
//! A key file has one key a line, at most two; empty lines and lines that begin with `#` are passed over. A key is
//! `costandby-key-1:` and 64 hexadecimal digits, a colon, and 8 more that are the CRC-32C of the bytes (big-endian), so
//! that a key that was copied by hand and not whole is told from another key.
//!
//! Invariants: a key's bytes are never printed by `Debug` and stand in no error. Survives any text.

use snow::params::HashChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use std::fmt;
use std::io;

/// Bytes of a key: what Noise takes as a pre-shared key.
pub const KEY_LEN: usize = 32;

/// Keys a file may hold: one, or two while one is replaced by the other.
pub const KEYS_MAX: usize = 2;

/// Bytes of a key file: two lines of 90 bytes and some words about them; anything longer is another file.
pub const KEY_FILE_LEN_MAX: u64 = 4096;

/// What a key's line begins with. The number is the format's version.
pub const PREFIX: &str = "costandby-key-1:";

/// Bytes of a hash, and of what [`derive`] gives.
pub(super) const HASH_LEN: usize = 32;

/// A key.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_LEN]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// What is wrong with a line that should be a key, ready to follow "line 3 ".
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LineError {
    /// Another text, or another version's.
    #[error("does not begin with {PREFIX:?}: is it a key of `costandby keygen`?")]
    Prefix,
    /// Not the right number of hexadecimal digits.
    #[error("is not {PREFIX} with 64 hexadecimal digits, a colon and 8 more: was it copied whole?")]
    Digits,
    /// The digits at the end are not those of the key.
    #[error("has check digits that do not fit its key: copy the line again, whole and unchanged")]
    Check,
    /// No key that was drawn at random.
    #[error("is a key of zeros, which everybody knows: make one with `costandby keygen`")]
    Zeros,
}

/// What is wrong with the text of a key file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TextError {
    /// One line.
    #[error("line {line} {problem}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: LineError,
    },
    /// No line is a key.
    #[error("it holds no key: make one with `costandby keygen FILE --force`, or copy the other node's file")]
    Empty,
    /// More than [`KEYS_MAX`].
    #[error(
        "it holds more than two keys: keep the one in use first and at most one other, the one it replaces or that replaces it"
    )]
    TooMany,
    /// The same line twice.
    #[error("both its keys are the same: keep one of them")]
    Twice,
}

impl Key {
    /// A new key of the system's randomness. Blocks only while the machine has none yet, early in its start.
    ///
    /// # Errors
    /// The system's.
    pub fn random() -> io::Result<Self> {
        let mut rng = DefaultResolver.resolve_rng().expect("built with `use-getrandom`");
        let mut bytes = [0; KEY_LEN];
        rng.try_fill_bytes(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self(bytes))
    }

    /// A key of these bytes; tests have their own.
    #[must_use]
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The line of a key file.
    #[must_use]
    pub fn to_line(&self) -> String {
        let digits = self.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("{PREFIX}{digits}:{:08x}", crc32c::crc32c(&self.0))
    }

    /// Reads a line of a key file; spaces around the key are passed over.
    ///
    /// # Errors
    /// [`LineError`].
    pub fn from_line(line: &str) -> Result<Self, LineError> {
        let digits = line.trim().strip_prefix(PREFIX).ok_or(LineError::Prefix)?;
        let (key, check) = digits.split_once(':').ok_or(LineError::Digits)?;
        let hexadecimal = |text: &str| text.bytes().all(|digit| digit.is_ascii_hexdigit());
        if key.len() != 2 * KEY_LEN || check.len() != 8 || !hexadecimal(key) || !hexadecimal(check) {
            return Err(LineError::Digits);
        }
        let mut bytes = [0; KEY_LEN];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&key[2 * at..2 * at + 2], 16).map_err(|_| LineError::Digits)?;
        }
        let check = u32::from_str_radix(check, 16).map_err(|_| LineError::Digits)?;
        if check != crc32c::crc32c(&bytes) {
            return Err(LineError::Check);
        }
        if bytes == [0; KEY_LEN] {
            return Err(LineError::Zeros);
        }
        Ok(Self(bytes))
    }

    /// Eight digits that are the same on both nodes where the key is, and that nobody gets the key from.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let hash = derive(&self.0, b"costandby key fingerprint");
        hash[..4].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The keys of a pair as one node has them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Keys {
    dial: Option<Key>,
    other: Option<Key>,
}

impl Keys {
    /// No key at all (`insecure = true`): everybody who reaches the port is let in.
    #[must_use]
    pub fn none() -> Self {
        Self { dial: None, other: None }
    }

    /// One key.
    #[must_use]
    pub fn one(key: Key) -> Self {
        Self { dial: Some(key), other: None }
    }

    /// Two: the first is used to dial, both are accepted.
    #[must_use]
    pub fn two(first: Key, second: Key) -> Self {
        Self { dial: Some(first), other: Some(second) }
    }

    /// The keys of a file with this text.
    ///
    /// # Errors
    /// [`TextError`].
    pub fn from_text(text: &str) -> Result<Self, TextError> {
        let mut keys = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line_text = line.trim();
            if line_text.is_empty() || line_text.starts_with('#') {
                continue;
            }
            if keys.len() == KEYS_MAX {
                return Err(TextError::TooMany);
            }
            keys.push(
                Key::from_line(line_text).map_err(|problem| TextError::Line { line: at + 1, problem })?,
            );
        }
        let mut keys = keys.into_iter();
        match (keys.next(), keys.next()) {
            (None, _) => Err(TextError::Empty),
            (Some(first), None) => Ok(Self::one(first)),
            (Some(first), Some(second)) if first == second => Err(TextError::Twice),
            (Some(first), Some(second)) => Ok(Self::two(first, second)),
        }
    }

    /// The text of a file with these keys.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::from(
            "# The key of a pair of costandby nodes: keep it secret, and the same on both nodes. The first key is used to\n\
             # dial, a second one is accepted too.\n",
        );
        for key in self.all() {
            text.push_str(&key.to_line());
            text.push('\n');
        }
        text
    }

    /// Whether there is a key.
    #[must_use]
    pub fn is_some(&self) -> bool {
        self.dial.is_some()
    }

    /// All keys, the one to dial with first.
    pub fn all(&self) -> impl Iterator<Item = &Key> {
        self.dial.iter().chain(&self.other)
    }

    /// The key that is used to dial.
    #[must_use]
    pub fn first(&self) -> Option<&Key> {
        self.dial.as_ref()
    }

    /// The one that is accepted besides.
    #[must_use]
    pub fn second(&self) -> Option<&Key> {
        self.other.as_ref()
    }
}

/// 32 bytes that follow from `secret` and `label`, and tell nothing of `secret`: HMAC-BLAKE2s as Noise has it.
pub(super) fn derive(secret: &[u8; HASH_LEN], label: &[u8]) -> [u8; HASH_LEN] {
    let mut hash = DefaultResolver.resolve_hash(&HashChoice::Blake2s).expect("built with `use-blake2`");
    let mut out = [0; HASH_LEN];
    hash.hmac(secret, label, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_comes_back_from_its_line() {
        let key = Key::random().expect("random bytes");
        assert_ne!(key, Key::random().expect("random bytes"));
        let line = key.to_line();
        assert_eq!(line.len(), PREFIX.len() + 64 + 1 + 8);
        assert_eq!(Key::from_line(&line), Ok(key.clone()));
        assert_eq!(Key::from_line(&format!("  {line} \r")), Ok(key.clone()));
        assert_eq!(format!("{key:?}"), "Key(..)");
        assert_eq!(format!("{:?}", Keys::one(key)).matches("..").count(), 1);
    }

    #[test]
    fn a_line_that_was_not_copied_whole_is_told_from_another_key() {
        let line = Key::from_bytes([0x5a; KEY_LEN]).to_line();
        for (text, expected) in [
            (line[..line.len() - 1].to_owned(), LineError::Digits),
            (line[1..].to_owned(), LineError::Prefix),
            (line.replacen("5a5a", "5a5b", 1), LineError::Check),
            (line.replacen("5a5a", "5é5", 1), LineError::Digits),
            (line.replace("key-1", "key-2"), LineError::Prefix),
            (Key::from_bytes([0; KEY_LEN]).to_line(), LineError::Zeros),
            (String::new(), LineError::Prefix),
        ] {
            assert_eq!(Key::from_line(&text), Err(expected), "{text}");
        }
    }

    #[test]
    fn a_file_holds_one_key_or_two() {
        let keys: Vec<_> = (1..=3).map(|byte| Key::from_bytes([byte; KEY_LEN])).collect();
        let lines: Vec<_> = keys.iter().map(Key::to_line).collect();
        let read = |text: &str| Keys::from_text(text);
        assert_eq!(read(&lines[0]), Ok(Keys::one(keys[0].clone())));
        let two = Keys::two(keys[0].clone(), keys[1].clone());
        assert_eq!(read(&format!("# new\n\n{}\r\n  {}  \n", lines[0], lines[1])), Ok(two.clone()));
        assert_eq!(read(&two.to_text()), Ok(two));
        assert_eq!(read(&lines.join("\n")), Err(TextError::TooMany));
        assert_eq!(read(&format!("{0}\n{0}\n", lines[0])), Err(TextError::Twice));
        assert_eq!(read("# nothing\n"), Err(TextError::Empty));
        let problem = LineError::Prefix;
        assert_eq!(read(&format!("{}\nsecret\n", lines[0])), Err(TextError::Line { line: 2, problem }));
    }

    #[test]
    fn what_is_derived_depends_on_secret_and_label_alone() {
        let [a, b] = [[1; HASH_LEN], [2; HASH_LEN]];
        assert_eq!(derive(&a, b"x"), derive(&a, b"x"));
        assert_ne!(derive(&a, b"x"), derive(&a, b"y"));
        assert_ne!(derive(&a, b"x"), derive(&b, b"x"));
        let fingerprint = Key::from_bytes(a).fingerprint();
        assert_eq!(fingerprint.len(), 8);
        assert!(!Key::from_bytes(a).to_line().contains(&fingerprint));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in any::<String>(), cut in 0..90_usize) {
            let _ = Keys::from_text(&text);
            let line = Key::from_bytes([7; KEY_LEN]).to_line();
            let _ = Key::from_line(&format!("{}{text}", &line[..cut.min(line.len())]));
        }
    }
}

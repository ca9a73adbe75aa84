//! The pair's key as its file has it: read at the start, and again whenever the file has changed, so that a key is
//! replaced without ending a daemon.
//!
//! Invariants: a file that others may read, or that another user owns, is never used. A change that cannot be used
//! (half copied, wrong mode) leaves the keys as they were, and is told once in the log.
//!
//! Survives: a file that is missing, unreadable, of any length or content.

use super::key::{KEY_FILE_LEN_MAX, Keys, TextError};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is none.
    #[error(
        "key file {path} is missing: `costandby keygen {path}` makes one, on one node only; the other node needs a copy of it"
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("key file {path} cannot be read: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// Others may read or change it.
    #[error(
        "key file {path} has mode {mode:04o}, so other users may read or change it: `chmod 600 {path}`; if others had access, make a new key"
    )]
    Mode {
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Its owner may change it.
    #[error(
        "key file {path} is owned by user {owner}, the daemon runs as user {user}: `chown {user} {path}`"
    )]
    Owner {
        /// Which.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who reads it.
        user: u32,
    },
    /// Not a file, or far too long for one.
    #[error("{path} is no key file: it is {what}")]
    NotOne {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Not what `costandby keygen` writes.
    #[error("key file {path}: {source}")]
    Text {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: TextError,
    },
}

/// Tells one state of a file from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    inode: u64,
    len: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            len: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// Reads a key file. Blocks.
///
/// # Errors
/// [`KeyError`].
pub fn read(path: &Path) -> Result<Keys, KeyError> {
    read_stamped(path).map(|(keys, _)| keys)
}

fn read_stamped(path: &Path) -> Result<(Keys, Stamp), KeyError> {
    let path_buf = || path.to_owned();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyError::Missing { path: path_buf() },
        _ => KeyError::Read { path: path_buf(), source },
    };
    // Looked at before it is opened: opening a pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(KeyError::NotOne { path: path_buf(), what: "not a regular file" });
    }
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Mode { path: path_buf(), mode });
    }
    let user = rustix::process::geteuid().as_raw();
    if metadata.uid() != user && metadata.uid() != 0 {
        return Err(KeyError::Owner { path: path_buf(), owner: metadata.uid(), user });
    }
    if metadata.len() > KEY_FILE_LEN_MAX {
        return Err(KeyError::NotOne { path: path_buf(), what: "longer than any" });
    }
    let mut text = Vec::new();
    file.take(KEY_FILE_LEN_MAX).read_to_end(&mut text).map_err(failed)?;
    let text =
        String::from_utf8(text).map_err(|_| KeyError::NotOne { path: path_buf(), what: "not text" })?;
    let keys = Keys::from_text(&text).map_err(|source| KeyError::Text { path: path_buf(), source })?;
    Ok((keys, Stamp::of(&metadata)))
}

/// The keys of a daemon.
#[derive(Debug)]
pub struct Keyring {
    /// `None`: there is no key (`insecure = true`).
    file: Option<PathBuf>,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    keys: Keys,
    /// Of the file when it was read last, whatever came of it.
    stamp: Option<Stamp>,
    /// Why the file as it is now is not used, as told in the log.
    told: Option<String>,
}

impl Keyring {
    /// The keys of a file, or none. Blocks.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(file: Option<&Path>) -> Result<Self, KeyError> {
        let (keys, stamp) = match file {
            Some(path) => read_stamped(path).map(|(keys, stamp)| (keys, Some(stamp)))?,
            None => (Keys::none(), None),
        };
        Ok(Self { file: file.map(Path::to_owned), held: Mutex::new(Held { keys, stamp, told: None }) })
    }

    /// These keys, of no file.
    #[must_use]
    pub fn fixed(keys: Keys) -> Self {
        Self { file: None, held: Mutex::new(Held { keys, stamp: None, told: None }) }
    }

    /// The keys as they are now. Blocks for a look at the file.
    ///
    /// # Panics
    /// When a thread panicked here before.
    #[must_use]
    pub fn keys(&self) -> Keys {
        let mut held = self.held.lock().expect("nobody panics with it");
        if let Some(path) = &self.file {
            held.refresh(path);
        }
        held.keys.clone()
    }
}

impl Held {
    fn refresh(&mut self, path: &Path) {
        let now = std::fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata));
        if now == self.stamp {
            return;
        }
        self.stamp = now;
        match read_stamped(path) {
            Ok((keys, stamp)) => {
                self.stamp = Some(stamp);
                self.told = None;
                if keys != self.keys {
                    let shown: Vec<_> = keys.all().map(super::key::Key::fingerprint).collect();
                    tracing::info!(
                        "key file {} has changed; its keys are now {}",
                        path.display(),
                        shown.join(" and ")
                    );
                    self.keys = keys;
                }
            }
            Err(error) => {
                let text = error.to_string();
                if self.told.as_ref() != Some(&text) {
                    tracing::warn!("{text}; this daemon goes on with the key it has, until its next start");
                    self.told = Some(text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::{KEY_LEN, Key};
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn keys(byte: u8) -> Keys {
        Keys::one(Key::from_bytes([byte; KEY_LEN]))
    }

    /// Replaces the file as `keygen` does.
    fn write(path: &Path, text: &str, mode: u32) {
        let new = path.with_extension("new");
        std::fs::write(&new, text).expect("written");
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode)).expect("a mode");
        std::fs::rename(&new, path).expect("renamed");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_with_the_command_that_mends_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pair.key");
        let complaint = || read(&path).expect_err("refused").to_string();
        assert!(complaint().contains("is missing") && complaint().contains("keygen"), "{}", complaint());
        for mode in [0o640, 0o604, 0o620, 0o602, 0o666, 0o610] {
            write(&path, &keys(1).to_text(), mode);
            let text = complaint();
            assert!(text.contains(&format!("chmod 600 {}", path.display())), "{text}");
            assert!(text.contains(&format!("{mode:04o}")), "{text}");
        }
        for mode in [0o600, 0o400] {
            write(&path, &keys(1).to_text(), mode);
            assert_eq!(read(&path).expect("good"), keys(1));
        }
        write(&path, "secret\n", 0o600);
        assert!(complaint().contains("line 1 does not begin with"), "{}", complaint());
        write(&path, &"#\n".repeat(4096), 0o600);
        assert!(complaint().contains("longer than any"), "{}", complaint());
        assert!(read(dir.path()).expect_err("a directory").to_string().contains("not a regular file"));
    }

    #[test]
    fn a_change_is_seen_and_a_bad_one_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pair.key");
        write(&path, &keys(1).to_text(), 0o600);
        let keyring = Keyring::open(Some(&path)).expect("good");
        assert_eq!(keyring.keys(), keys(1));
        write(&path, &keys(2).to_text(), 0o600);
        assert_eq!(keyring.keys(), keys(2));
        write(&path, "half a ke", 0o600);
        assert_eq!(keyring.keys(), keys(2));
        write(&path, &keys(3).to_text(), 0o644);
        assert_eq!(keyring.keys(), keys(2));
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(keyring.keys(), keys(2));
        write(&path, &keys(3).to_text(), 0o600);
        assert_eq!(keyring.keys(), keys(3));
        assert_eq!(Keyring::open(None).expect("none").keys(), Keys::none());
    }
}

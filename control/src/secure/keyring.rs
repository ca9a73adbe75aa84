//! The pair's key as its file has it: read at the start, and again whenever the file has changed, so that a key is
//! replaced without ending a daemon.
//!
//! Invariants: a file that others may read, or that another user owns, is never used. A change that cannot be used
//! (half copied, wrong mode) leaves the keys as they were, and is told once in the log.
//!
//! Survives: a file that is missing, unreadable, of any length or content.

use super::key::{KEY_FILE_LEN_MAX, Keys, TextError};
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
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
    #[error(
        "key file {path} cannot be read by user {user}: {source}; see to the owner and mode of the file and of its directories"
    )]
    Read {
        /// Which.
        path: PathBuf,
        /// Who reads it.
        user: u32,
        /// The operating system's words.
        source: io::Error,
    },
    /// It cannot be made.
    #[error("key file {path} cannot be written: {source}")]
    Write {
        /// Which.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// There is one already.
    #[error("key file {path} is there already, and was not touched")]
    Exists {
        /// Which.
        path: PathBuf,
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
    /// Something else than a key file.
    #[error(
        "{path} is no key file, but {found}, and was not touched: name another path for the key, or move that file away"
    )]
    Other {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: &'static str,
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

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn read_stamped(path: &Path) -> Result<(Keys, Stamp), KeyError> {
    let path_buf = || path.to_owned();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyError::Missing { path: path_buf() },
        _ => KeyError::Read { path: path_buf(), user: user(), source },
    };
    // Looked at before it is opened: opening a pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
        return Err(KeyError::NotOne { path: path_buf(), what });
    }
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Mode { path: path_buf(), mode });
    }
    if metadata.uid() != user() && metadata.uid() != 0 {
        return Err(KeyError::Owner { path: path_buf(), owner: metadata.uid(), user: user() });
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

/// Makes a key file, and its directory where that is missing. Blocks.
///
/// # Errors
/// [`KeyError::Exists`], [`KeyError::Write`].
pub fn create(path: &Path, keys: &Keys) -> Result<(), KeyError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyError::Exists { path: path.to_owned() },
        _ => KeyError::Write { path: path.to_owned(), source },
    };
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    write_new(path, keys).map_err(failed)
}

/// Whether what stands at `path` may be overwritten with a key: a key file, whole or damaged, whatever its mode and owner, or
/// an empty file. Blocks.
///
/// # Errors
/// [`KeyError::Other`] with what it is instead, [`KeyError::Read`].
pub fn is_key_file(path: &Path) -> Result<(), KeyError> {
    let failed = |source| KeyError::Read { path: path.to_owned(), user: user(), source };
    let other = |found| KeyError::Other { path: path.to_owned(), found };
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            return Err(other("a symbolic link to nothing"));
        }
        metadata => metadata.map_err(failed)?,
    };
    if metadata.is_dir() {
        return Err(other("a directory"));
    }
    if !metadata.is_file() {
        return Err(other("a device, a socket or a pipe"));
    }
    if metadata.len() > KEY_FILE_LEN_MAX {
        return Err(other("a file that is longer than any key file"));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(KEY_FILE_LEN_MAX).read_to_end(&mut bytes)).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|_| other("a file that holds no text"))?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    // Of any version, and however much of it was copied.
    let is_key = |line: &str| line.starts_with("costandby-key-") || "costandby-key-".starts_with(line);
    if lines.all(is_key) { Ok(()) } else { Err(other("a text of another kind")) }
}

/// Replaces a key file, or makes it: whoever reads it meanwhile reads the old one or the new one. Blocks.
///
/// # Errors
/// [`KeyError::Write`].
pub fn replace(path: &Path, keys: &Keys) -> Result<(), KeyError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".new.{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let replaced = write_new(&beside, keys).and_then(|()| std::fs::rename(&beside, path));
    replaced.map_err(|source| {
        // What cannot be removed is no key in use.
        let _ = std::fs::remove_file(&beside);
        KeyError::Write { path: path.to_owned(), source }
    })
}

/// For the owner alone from the first moment, and on stable storage afterwards.
fn write_new(path: &Path, keys: &Keys) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(keys.to_text().as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() {
        // A half-written key would be refused; the reason is the error's.
        let _ = std::fs::remove_file(path);
    }
    written
}

/// The keys of a daemon. The default is to have none.
#[derive(Debug, Default)]
pub struct Keyring {
    /// `None`: there is no key (`insecure = true`).
    file: Option<PathBuf>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
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

    /// These keys, of no file: for tests and tools.
    #[must_use]
    pub fn fixed(keys: Keys) -> Self {
        Self { file: None, held: Mutex::new(Held { keys, stamp: None, told: None }) }
    }

    /// The keys as the file had them when it was looked at last. Does not block.
    ///
    /// # Panics
    /// When a thread panicked here before.
    #[must_use]
    pub fn keys(&self) -> Keys {
        self.held.lock().expect("nobody panics with it").keys.clone()
    }

    /// Looks at the file, and takes its keys where it has changed. Blocks for as long as the file system does.
    ///
    /// # Panics
    /// When a thread panicked here before.
    pub fn refresh(&self) {
        let Some(path) = &self.file else { return };
        let now = std::fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata));
        if now == self.held.lock().expect("nobody panics with it").stamp {
            return;
        }
        let found = read_stamped(path);
        self.held.lock().expect("nobody panics with it").take(path, now, found);
    }
}

impl Held {
    fn take(&mut self, path: &Path, now: Option<Stamp>, found: Result<(Keys, Stamp), KeyError>) {
        self.stamp = now;
        match found {
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
        assert!(read(dir.path()).expect_err("a directory").to_string().contains("it is a directory"));
    }

    #[test]
    fn a_key_file_is_its_owners_from_the_first_moment_and_never_overwritten_unasked() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("etc/pair.key");
        create(&path, &keys(1)).expect("made");
        let mode = || std::fs::metadata(&path).expect("there").mode() & 0o7777;
        assert_eq!((mode(), read(&path).expect("good")), (0o600, keys(1)));
        assert!(matches!(create(&path, &keys(2)), Err(KeyError::Exists { .. })));
        assert_eq!(read(&path).expect("good"), keys(1), "untouched");
        replace(&path, &keys(2)).expect("replaced");
        assert_eq!((mode(), read(&path).expect("good")), (0o600, keys(2)));
        assert_eq!(std::fs::read_dir(dir.path().join("etc")).expect("there").count(), 1, "nothing is left");
        assert!(matches!(replace(&dir.path().join("no/pair.key"), &keys(1)), Err(KeyError::Write { .. })));
    }

    #[test]
    fn only_a_key_file_may_be_overwritten_by_a_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        for (text, mode) in [
            (keys(1).to_text(), 0o644),
            ("# a remark\n\n".to_owned(), 0o600),
            (String::new(), 0o600),
            (keys(1).to_text()[..30].to_owned(), 0o600),
            ("costandby-key-9:00\n".to_owned(), 0o600),
        ] {
            write(&path, &text, mode);
            is_key_file(&path).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        }
        let refused = |path: &Path| is_key_file(path).expect_err("another file").to_string();
        write(&path, "root:x:0:0:root:/root:/bin/sh\n", 0o600);
        assert!(refused(&path).contains("a text of another kind, and was not touched"), "{}", refused(&path));
        write(&path, &format!("{}password = 1\n", keys(1).to_text()), 0o600);
        assert!(refused(&path).contains("another kind"), "{}", refused(&path));
        write(&path, &"#\n".repeat(4096), 0o600);
        assert!(refused(&path).contains("longer than any"), "{}", refused(&path));
        std::fs::write(&path, [0xff; 40]).expect("written");
        assert!(refused(&path).contains("holds no text"), "{}", refused(&path));
        assert!(refused(dir.path()).contains("a directory"), "{}", refused(dir.path()));
        let dangling = dir.path().join("link");
        std::os::unix::fs::symlink("/nonexistent", &dangling).expect("a link");
        assert!(refused(&dangling).contains("a symbolic link to nothing"), "{}", refused(&dangling));
        assert!(refused(Path::new("/dev/null")).contains("a device"), "{}", refused(Path::new("/dev/null")));
    }

    #[test]
    fn a_change_is_seen_and_a_bad_one_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pair.key");
        write(&path, &keys(1).to_text(), 0o600);
        let keyring = Keyring::open(Some(&path)).expect("good");
        let now = || {
            keyring.refresh();
            keyring.keys()
        };
        assert_eq!(now(), keys(1));
        write(&path, &keys(2).to_text(), 0o600);
        assert_eq!(now(), keys(2));
        write(&path, "half a ke", 0o600);
        assert_eq!(now(), keys(2));
        write(&path, &keys(3).to_text(), 0o644);
        assert_eq!(now(), keys(2));
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(now(), keys(2));
        write(&path, &keys(3).to_text(), 0o600);
        assert_eq!(now(), keys(3));
        assert_eq!(Keyring::open(None).expect("none").keys(), Keys::none());
    }
}

//! `costandby keygen`: makes the pair's key, and replaces it step by step while the pair is in use.
//!
//! A file is made for its owner alone and is never overwritten without `--force`, and one that is no key file never. Of the key itself nothing is printed but its
//! fingerprint, which is the same on both nodes where the key is.
//!
//! Rotation: `--rotate add` puts a new key behind the one in use, `use` makes the new one first, `end` drops the old one. After
//! each step the file is copied to the other node before the next one. Both keys of a file are accepted and the first is used
//! to dial, so nodes that are one step apart let each other in.

use super::{CliError, KeygenArgs, Place, RotateArg, print_done};
use crate::config::Config;
use crate::secure::key::{Key, Keys};
use crate::secure::keyring::{self, KeyError};
use std::path::{Path, PathBuf};

/// For `--help`.
pub(super) const EXAMPLES: &str = "\
Examples:
  costandby keygen /etc/costandby/pair.key     on one node; then copy the file to the other node, and name it in both
                                               configurations: key = \"/etc/costandby/pair.key\"
  costandby keygen --rotate add                replace the key of a running pair: add, use, end, and after each step copy
                                               the file to the other node

The file is for its owner alone (mode 0600): whoever can read it can be a peer. Running daemons see a change within seconds;
sessions that are up go on.";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeygenError {
    /// No file named, and none in the configuration.
    #[error("{file} names no `key`: say where it shall be, as in `costandby keygen /etc/costandby/pair.key`")]
    Where {
        /// The configuration.
        file: PathBuf,
    },
    /// The file is there.
    #[error(
        "{path} is there already, and was not touched: `--rotate add` begins to replace it without a gap; `--force` replaces it \
         at once, and the two nodes then refuse each other's new connections until both have the new key"
    )]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// The step of a rotation does not fit the file.
    #[error("{path} holds {found}: {remedy}")]
    Step {
        /// Which.
        path: PathBuf,
        /// How many keys.
        found: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Reading or writing it.
    #[error(transparent)]
    File(#[from] KeyError),
    /// No randomness.
    #[error("the system gives no random bytes: {source}")]
    Random {
        /// Its words.
        source: std::io::Error,
    },
}

/// Makes or changes a key file and says what to do next.
///
/// # Errors
/// [`CliError::Keygen`], [`CliError::Config`].
pub(super) fn run(place: &Place, args: &KeygenArgs) -> Result<(), CliError> {
    let path = match &args.file {
        Some(path) => path.clone(),
        None => {
            let config = Config::load(&place.file)?;
            config.key.ok_or(KeygenError::Where { file: config.file })?
        }
    };
    let said = match args.rotate {
        Some(step) => rotate(&path, step)?,
        None => make(&path, args.force)?,
    };
    print_done(&said, "the key file is written")
}

fn random() -> Result<Key, KeygenError> {
    Key::random().map_err(|source| KeygenError::Random { source })
}

fn make(path: &Path, force: bool) -> Result<String, KeygenError> {
    let key = random()?;
    let (shown, fingerprint) = (path.display(), key.fingerprint());
    let keys = Keys::one(key);
    let made = keyring::create(path, &keys);
    if matches!(made, Err(KeyError::Exists { .. })) {
        // Whatever else it is must neither be lost nor be called a key.
        keyring::is_key_file(path)?;
    }
    match made {
        Ok(()) => Ok(format!(
            "{shown}: a new key, fingerprint {fingerprint}, for its owner alone. Copy it to the other node (`scp -p`), and name it \
             in both configurations: key = \"{shown}\"\n"
        )),
        Err(KeyError::Exists { .. }) if force => {
            keyring::replace(path, &keys)?;
            Ok(format!(
                "{shown}: replaced by a new key, fingerprint {fingerprint}. Copy it to the other node (`scp -p`) now: running \
                 daemons take it within seconds, a session that is up goes on, and one that breaks does not come back until both \
                 nodes have the new key\n"
            ))
        }
        Err(KeyError::Exists { path }) => Err(KeygenError::Exists { path }),
        Err(error) => Err(error.into()),
    }
}

fn rotate(path: &Path, step: RotateArg) -> Result<String, KeygenError> {
    let keys = keyring::read(path)?;
    let wrong = |found, remedy| KeygenError::Step { path: path.to_owned(), found, remedy };
    let first = keys.first().expect("a file has a key").clone();
    let (keys, next) = match (step, keys.second().cloned()) {
        (RotateArg::Add, None) => {
            let new = random()?;
            let said = format!(
                "a new key, fingerprint {}, is accepted besides {}",
                new.fingerprint(),
                first.fingerprint()
            );
            (
                Keys::two(first, new),
                format!("{said}. Copy the file to the other node (`scp -p`), then `--rotate use` here"),
            )
        }
        (RotateArg::Use, Some(new)) => {
            let said = format!(
                "{} is used from now on, {} is still accepted",
                new.fingerprint(),
                first.fingerprint()
            );
            (
                Keys::two(new, first),
                format!("{said}. Copy the file to the other node (`scp -p`), then `--rotate end` here"),
            )
        }
        (RotateArg::End, Some(old)) => {
            let said =
                format!("{} is the only key, {} is accepted no more", first.fingerprint(), old.fingerprint());
            (Keys::one(first), format!("{said}. Copy the file to the other node (`scp -p`)"))
        }
        (RotateArg::Add, Some(_)) => {
            return Err(wrong(
                "two keys",
                "a rotation is under way: go on with `--rotate use` or `--rotate end`",
            ));
        }
        (RotateArg::Use | RotateArg::End, None) => {
            return Err(wrong("one key", "there is no rotation under way: begin with `--rotate add`"));
        }
    };
    keyring::replace(path, &keys)?;
    Ok(format!("{}: {next}; running daemons see a change within seconds\n", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_replaced_at_a_word() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pair.key");
        let said = make(&path, false).expect("made");
        let first = keyring::read(&path).expect("good");
        let key = first.first().expect("one").clone();
        assert!(said.contains(&key.fingerprint()) && !said.contains(&key.to_line()), "{said}");
        let refused = make(&path, false).expect_err("there is one").to_string();
        assert!(refused.contains("was not touched") && refused.contains("--rotate add"), "{refused}");
        assert_eq!(keyring::read(&path).expect("good"), first);
        let said = make(&path, true).expect("replaced");
        assert!(said.contains("does not come back until both nodes have"), "{said}");
        assert_ne!(keyring::read(&path).expect("good"), first);
        std::fs::write(&path, "precious\n").expect("written");
        let refused = make(&path, true).expect_err("another file").to_string();
        assert!(refused.contains("no key file") && refused.contains("was not touched"), "{refused}");
        assert_eq!(std::fs::read_to_string(&path).expect("there"), "precious\n");
    }

    #[test]
    fn a_rotation_has_three_steps_in_their_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pair.key");
        assert!(rotate(&path, RotateArg::Add).expect_err("no file").to_string().contains("is missing"));
        make(&path, false).expect("made");
        let keys = || keyring::read(&path).expect("good");
        let old = keys();
        for step in [RotateArg::Use, RotateArg::End] {
            assert!(rotate(&path, step).expect_err("none under way").to_string().contains("one key"));
        }
        rotate(&path, RotateArg::Add).expect("added");
        assert_eq!(keys().first(), old.first());
        let new = keys().second().expect("added").clone();
        assert!(rotate(&path, RotateArg::Add).expect_err("under way").to_string().contains("two keys"));
        rotate(&path, RotateArg::Use).expect("used");
        assert_eq!((keys().first(), keys().second()), (Some(&new), old.first()));
        rotate(&path, RotateArg::End).expect("ended");
        assert_eq!(keys(), Keys::one(new));
    }
}

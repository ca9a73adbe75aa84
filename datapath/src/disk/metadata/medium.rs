//! The medium of metadata: a few calls that the rest of `metadata` is built on, so that tests can simulate a disk
//! that tears and loses writes.
//!
//! Invariants: a write may be read back at once, but only [`Medium::sync`] brings it to stable storage; until then any
//! subset of its 512-byte sectors may be there after a loss of power. A sync that failed says nothing about what is
//! stored: callers give the medium up. A file is its owner's alone (mode 0600) from its first byte on; one that an earlier
//! release made wider is narrowed when it is opened.
//!
//! Everything here blocks.

use crate::disk::superblock::{self, SuperblockError};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Mode of a metadata file, as of a disk that `create` makes: what it says is nobody else's business, and whoever could
/// write to it could make two different disks look equal.
const FILE_MODE: u32 = 0o600;

/// A file, a device, or a simulated one.
pub trait Medium: Send + Sync + std::fmt::Debug {
    /// What it is called in messages.
    fn path(&self) -> &Path;

    /// Bytes it has.
    ///
    /// # Errors
    /// The system's.
    fn len(&self) -> io::Result<u64>;

    /// Whether it has no byte.
    ///
    /// # Errors
    /// The system's.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Makes it at least `len` bytes long; new bytes read as zeros. A device that is shorter refuses.
    ///
    /// # Errors
    /// The system's.
    fn grow(&self, len: u64) -> io::Result<()>;

    /// Fills `bytes` from `at` on.
    ///
    /// # Errors
    /// The system's, and where it ends too early.
    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes `bytes` from `at` on.
    ///
    /// # Errors
    /// The system's.
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Brings every write so far to stable storage.
    ///
    /// # Errors
    /// The system's.
    fn sync(&self) -> io::Result<()>;
}

/// How a medium is opened to be made. A file has its mode from the moment it exists, whatever the umask.
fn making(device: bool, force: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(!device).create_new(!device && !force).mode(FILE_MODE);
    options
}

/// A file beside a disk, or a block device, locked against other daemons until it is dropped.
#[derive(Debug)]
pub struct FileMedium {
    file: File,
    path: PathBuf,
    device: bool,
}

impl FileMedium {
    /// Opens and locks what is there.
    ///
    /// # Errors
    /// [`SuperblockError::Missing`], [`SuperblockError::Locked`], [`SuperblockError::Io`].
    pub fn open(path: &Path) -> Result<Self, SuperblockError> {
        let medium = Self::from_options(OpenOptions::new().read(true).write(true), path)?;
        superblock::lock(&medium.file, path)?;
        medium.narrow();
        Ok(medium)
    }

    /// Opens what is there for looking at it only: nothing is locked and nothing can be written. Says also whether
    /// somebody else has it locked.
    ///
    /// # Errors
    /// [`SuperblockError::Missing`], [`SuperblockError::Io`].
    pub fn look(path: &Path) -> Result<(Self, bool), SuperblockError> {
        let medium = Self::from_options(OpenOptions::new().read(true), path)?;
        let operation = rustix::fs::FlockOperation::NonBlockingLockShared;
        let in_use = rustix::fs::flock(&medium.file, operation) == Err(rustix::io::Errno::WOULDBLOCK);
        if !in_use {
            // A look must not keep a daemon from starting.
            let _ = rustix::fs::flock(&medium.file, rustix::fs::FlockOperation::Unlock);
        }
        Ok((medium, in_use))
    }

    /// Makes a file that is not there yet (or, with `force`, may be), or opens a device, and locks it.
    ///
    /// # Errors
    /// [`SuperblockError::Exists`], [`SuperblockError::Locked`], [`SuperblockError::Io`].
    pub fn create(path: &Path, force: bool) -> Result<Self, SuperblockError> {
        let device = superblock::is_block_device(path);
        let medium = Self::from_options(&mut making(device, force), path)?;
        superblock::lock(&medium.file, path)?;
        medium.narrow();
        if !device {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))
                .and_then(|directory| directory.sync_all())
                .map_err(|source| SuperblockError::Io { doing: "creating", path: path.into(), source })?;
        }
        Ok(medium)
    }

    /// Opens a file or a block device and nothing else: opening a FIFO waits for a program at its other end.
    fn from_options(options: &mut OpenOptions, path: &Path) -> Result<Self, SuperblockError> {
        let io = |source| SuperblockError::Io { doing: "opening", path: path.into(), source };
        let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).expect("open flags fit an int");
        let file = options.custom_flags(nonblocking).open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SuperblockError::Missing { path: path.into() },
            io::ErrorKind::AlreadyExists => SuperblockError::Exists { path: path.into() },
            io::ErrorKind::IsADirectory => SuperblockError::WrongType { path: path.into() },
            // A socket, a FIFO that nobody reads, a device without a driver.
            _ if Errno::from_io_error(&source) == Some(Errno::NXIO) => {
                SuperblockError::WrongType { path: path.into() }
            }
            _ => io(source),
        })?;
        let kind = file.metadata().map_err(io)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(SuperblockError::WrongType { path: path.into() });
        }
        Ok(Self { file, path: path.into(), device: kind.is_block_device() })
    }

    /// Takes from a file that is there what others than its owner may do with it. A device's mode is its administrator's.
    fn narrow(&self) {
        let Ok(metadata) = self.file.metadata() else { return };
        let mode = metadata.permissions().mode() & 0o7777;
        if !metadata.is_file() || mode & !FILE_MODE == 0 {
            return;
        }
        let path = self.path.display();
        match self.file.set_permissions(std::fs::Permissions::from_mode(mode & FILE_MODE)) {
            Ok(()) => {
                tracing::info!("metadata {path} had mode {mode:04o}, and has {:04o} now", mode & FILE_MODE);
            }
            // It is another user's. The daemon works all the same.
            Err(error) => {
                tracing::warn!("metadata {path} has mode {mode:04o}, which should be 0600: {error}");
            }
        }
    }
}

impl Medium for FileMedium {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> io::Result<u64> {
        // Seeking gives a block device's size too, which its inode does not.
        Ok(rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        match self.len()? {
            found if self.device => {
                if found >= len {
                    Ok(())
                } else {
                    Err(io::ErrorKind::StorageFull.into())
                }
            }
            found => {
                // All its blocks, so that no store of a record ever meets a full file system.
                match rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, len) {
                    Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) if found < len => {
                        self.file.set_len(len)
                    }
                    Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_reserved_whole() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("meta");
        File::create(&path).expect("made").set_len(2 << 20).expect("sized");
        let medium = FileMedium::open(&path).expect("opens");
        // Longer than it is, and one that is sparse.
        for len in [1 << 20, 2 << 20, 3 << 20] {
            medium.grow(len).expect("room");
            let blocks = std::fs::metadata(&path).expect("there").blocks();
            assert!(blocks * 512 >= len, "{blocks} blocks of {len} bytes");
        }
        assert_eq!(medium.len().expect("known"), 3 << 20);
    }

    #[test]
    fn what_is_no_file_is_refused_by_name_and_never_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let [fifo, directory, socket, device] =
            ["fifo", "directory", "socket", "device"].map(|name| dir.path().join(name));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).expect("a FIFO");
        std::fs::create_dir(&directory).expect("a directory");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        std::os::unix::fs::symlink("/dev/zero", &device).expect("a link");
        for path in [fifo, directory, socket, device] {
            let (sender, ended) = std::sync::mpsc::channel();
            let opened = path.clone();
            std::thread::spawn(move || {
                let ends = [
                    FileMedium::look(&opened).map(|_| ()),
                    FileMedium::open(&opened).map(|_| ()),
                    FileMedium::create(&opened, true).map(|_| ()),
                ];
                // An error means that the test gave up.
                let _ = sender.send(ends);
            });
            let ends = ended.recv_timeout(std::time::Duration::from_secs(20)).expect("nothing is waited for");
            for end in ends {
                assert!(
                    matches!(&end, Err(SuperblockError::WrongType { path: named }) if *named == path),
                    "{}: {end:?}",
                    path.display()
                );
            }
        }
    }

    #[test]
    fn a_metadata_file_is_its_owners_alone_from_the_moment_it_exists() {
        let dir = tempfile::tempdir().expect("a directory");
        // The process's, so this is the file's only test.
        let before = rustix::process::umask(rustix::fs::Mode::empty());
        for force in [false, true] {
            let path = dir.path().join(format!("made-{force}"));
            let file = making(false, force).open(&path).expect("made");
            let mode = file.metadata().expect("there").permissions().mode() & 0o7777;
            assert_eq!(mode, FILE_MODE, "before anything narrows it");
        }
        rustix::process::umask(before);
    }
}

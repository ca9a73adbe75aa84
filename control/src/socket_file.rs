//! The file of a unix socket that this daemon listens on: what a killed daemon left there is removed before the bind, and the
//! daemon's own file is removed at the end.
//!
//! Called by the admin API and by the listeners for NBD clients. Invariants: a socket that a program holds is never removed; a
//! file that is no socket is never touched; asking who holds a socket does not wait for that program.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::path::{Path, PathBuf};

/// A socket's file, removed when this is dropped and only if the file still is this socket's.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// The file of a socket that was just bound.
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: identity(path) }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == identity(&self.path) {
            // Nothing is lost by a socket that stays: the next start replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Why no socket can be made at a path.
#[derive(Debug)]
pub(crate) enum InTheWay {
    /// A file that is no socket.
    NotASocket,
    /// A socket on which a program takes connections.
    Answers,
    /// A socket that a program holds without taking connections: as many wait there as the kernel keeps for that program.
    Stuck,
    /// The system refused.
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
}

/// Removes a socket that no program holds, which is what a killed daemon left behind. Waits for the file system at most.
///
/// # Errors
/// [`InTheWay`]; the file is as it was then.
pub(crate) fn remove_stale(path: &Path) -> Result<(), InTheWay> {
    use std::os::unix::fs::FileTypeExt;
    let io = |doing| move |source| InTheWay::Io { doing, source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("looking at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(InTheWay::NotASocket),
        Ok(_) => {}
    }
    match connect(path) {
        Ok(()) => Err(InTheWay::Answers),
        Err(Errno::AGAIN) => Err(InTheWay::Stuck),
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(io("removing the stale socket")),
        Err(error) => Err(io("asking who answers on")(error.into())),
    }
}

/// One attempt to connect, which does not wait where the kernel holds no further connection for the program.
fn connect(path: &Path) -> rustix::io::Result<()> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn what_is_in_the_way_is_told_apart_and_only_a_dead_socket_is_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        remove_stale(&path).expect("nothing is there");
        let listener = UnixListener::bind(&path).expect("bound");
        assert!(matches!(remove_stale(&path), Err(InTheWay::Answers)));
        drop(listener);
        remove_stale(&path).expect("nobody holds it");
        assert!(!path.exists());
        std::fs::write(&path, "kept").expect("written");
        assert!(matches!(remove_stale(&path), Err(InTheWay::NotASocket)));
        assert!(path.exists());
    }

    #[test]
    fn a_program_that_takes_no_connections_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let (_listener, _waiting) = stuck(&path);
        let (sender, told) = std::sync::mpsc::channel();
        let asked = path.clone();
        std::thread::spawn(move || {
            // An error means that the test gave up.
            let _ = sender.send(remove_stale(&asked));
        });
        let told = told.recv_timeout(std::time::Duration::from_secs(20)).expect("an answer");
        assert!(matches!(told, Err(InTheWay::Stuck)), "{told:?}");
        assert!(path.exists());
    }

    /// A listener that takes no connection, with as many waiting as the kernel holds for it.
    fn stuck(path: &Path) -> (std::os::fd::OwnedFd, UnixStream) {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .expect("a socket");
        rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("a path")).expect("bound");
        rustix::net::listen(&socket, 0).expect("listens");
        (socket, UnixStream::connect(path).expect("the one place"))
    }
}

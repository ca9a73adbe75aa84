//! A pair behind an address that moves, and a client that reconnects: qemu's NBD client with `reconnect-delay`.
//!
//! The path that qemu connects to leads to whoever serves, as a floating address does. Everybody else connects to qemu, as
//! the disk of a virtual machine would, and is to see a pause where the node behind changes.

use crate::pair::{ALPHA, Pair};
use crate::process::Guarded;
use crate::wait_for;
use costandby_control::nbd_client::{Endpoint, NbdClient, NbdError, NbdUri, Options};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Longest that qemu's pauses between two tries leave a request waiting: they double up to 16 s.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A pair with the volume `db`, qemu in front of it, and the path that leads to whoever serves.
pub struct Floating {
    /// The pair.
    pub pair: Pair,
    /// The node that the path leads to.
    pub serves: usize,
    path: PathBuf,
    front: PathBuf,
    _qemu: Guarded,
    _dir: tempfile::TempDir,
}

fn socket(pair: &Pair, node: usize) -> PathBuf {
    match pair.uri(node, "db").endpoint {
        Endpoint::Unix(path) => path,
        other => panic!("{other:?} is no unix socket"),
    }
}

impl Floating {
    /// Puts qemu in front of a pair whose volume `db` alpha serves.
    ///
    /// # Panics
    /// When qemu does not serve.
    #[must_use]
    pub fn before(pair: Pair) -> Self {
        let dir = tempfile::Builder::new().prefix("costandby-").tempdir().expect("a temporary directory");
        let (path, front) = (dir.path().join("floating"), dir.path().join("front"));
        std::os::unix::fs::symlink(socket(&pair, ALPHA), &path).expect("a link");
        let server = format!("server.type=unix,server.path={}", path.display());
        let qemu = qemu(&mut Command::new("qemu-storage-daemon"), &server, &front);
        let floating = Self { pair, path, front, serves: ALPHA, _qemu: qemu, _dir: dir };
        wait_for("qemu serves", PATIENCE, || connect(&floating.uri()).ok());
        floating
    }

    /// Where qemu serves the volume.
    #[must_use]
    pub fn uri(&self) -> NbdUri {
        front_uri(&self.front)
    }

    /// The address goes to the other node.
    ///
    /// # Panics
    /// When the link cannot be made.
    pub fn float(&mut self) {
        self.serves = 1 - self.serves;
        let next = self.path.with_extension("next");
        std::os::unix::fs::symlink(socket(&self.pair, self.serves), &next).expect("a link");
        std::fs::rename(&next, &self.path).expect("the link moves");
    }

    /// A planned handover: the one node is demoted, the other promoted, and the address follows.
    pub fn hand_over(&mut self) {
        self.pair.hand_over("db", self.serves);
        self.float();
    }
}

/// Starts qemu as a client of `db` at `server`, in qemu's words, that reconnects, and as the server of the same at `front`.
/// `command` begins qemu's command line.
pub fn qemu(command: &mut Command, server: &str, front: &Path) -> Guarded {
    command
        .arg("--blockdev")
        .arg(format!("driver=nbd,node-name=db,{server},export=db,reconnect-delay=60,open-timeout=60"));
    command
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={},max-connections=0", front.display()));
    command.args(["--export", "type=nbd,id=db,node-name=db,name=db,writable=on"]);
    Guarded::spawn(command.stdin(Stdio::null()))
}

/// The volume `db` at a unix socket.
#[must_use]
pub fn front_uri(front: &Path) -> NbdUri {
    NbdUri { endpoint: Endpoint::Unix(front.to_owned()), export: "db".to_owned() }
}

/// A client that waits as long as qemu does.
///
/// # Errors
/// When nobody serves there.
pub fn connect(uri: &NbdUri) -> Result<NbdClient, NbdError> {
    NbdClient::connect(uri, &Options { timeout: PATIENCE, ..Options::default() })
}

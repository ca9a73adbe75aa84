//! A pair of daemons on this machine, for the demo and the tests: real processes, real sockets, one directory.
//!
//! Stands outside the daemons, as an operator would: it writes their configuration, runs `costandby create` and
//! `costandby up`, asks over their admin sockets and ends them by process id. Everything blocks; every wait has a limit
//! and ends early once the caller's interrupt flag is set.
//!
//! Invariants: everything lies below the directory that was given; daemons listen on the address that was given and on
//! sockets in that directory only; a [`Pair`] that is dropped leaves no process behind.
//!
//! Survives: a daemon that does not start, dies or hangs (an error that names its log).

use crate::admin::{Command as AdminCommand, Status, VolumeStatus};
use crate::admin_client::{AdminClient, ClientError};
use crate::nbd_client::{Endpoint, NbdUri};
use crate::secure::key::{Key, Keys};
use crate::secure::keyring::{self, KeyError};
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at a daemon: short beside anything a person waits for, long beside what a look costs.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long a daemon may take to answer its first question: it opens its disks first. This and the limits below end what
/// hangs: on a slow machine things take several times as long as on a quiet one, and are right all the same.
pub const START_MAX: Duration = Duration::from_secs(60);

/// How long a daemon may take to end after SIGTERM. It gives its own tasks a few seconds and then ends by itself.
pub const STOP_MAX: Duration = Duration::from_secs(60);

/// How long a killed process may take to be gone: the kernel has its mappings to take down.
const GONE_MAX: Duration = Duration::from_secs(60);

/// How long one command may take. A promotion answers at once; only a demotion waits for disks.
const COMMAND_MAX: Duration = Duration::from_secs(30);

/// One of the two nodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// Node `alpha`.
    Alpha,
    /// Node `beta`.
    Beta,
}

impl Side {
    /// Both, in order.
    pub const BOTH: [Self; 2] = [Self::Alpha, Self::Beta];

    /// The node's name in the configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alpha => "alpha",
            Self::Beta => "beta",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Alpha => 0,
            Self::Beta => 1,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A volume of the pair.
#[derive(Clone, Debug)]
pub struct PairVolume {
    /// Its name.
    pub name: String,
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// Where it starts.
    pub primary: Side,
    /// `async`, `memory` or `durable`.
    pub ack: &'static str,
}

/// What is to be started.
#[derive(Clone, Debug)]
pub struct PairSpec {
    /// The `costandby` program.
    pub program: PathBuf,
    /// An existing directory of the pair's own. Short: socket paths have at most 107 bytes.
    pub dir: PathBuf,
    /// Where both nodes listen for each other.
    pub address: IpAddr,
    /// `rdma`, `tcp` or `auto`, for all volumes.
    pub link: &'static str,
    /// The volumes, each with a disk on both nodes.
    pub volumes: Vec<PairVolume>,
    /// Set by whoever wants all waits to end.
    pub interrupt: Arc<AtomicBool>,
}

/// What can go wrong with a pair.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The operating system refused.
    #[error("{doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Its words.
        source: io::Error,
    },
    /// A port on loopback, or the runtime, could not be had.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Its words.
        source: io::Error,
    },
    /// The key could not be made.
    #[error(transparent)]
    Key {
        /// Why.
        source: KeyError,
    },
    /// `costandby create` failed.
    #[error("creating the disks of {node}: {message}")]
    Create {
        /// Whose.
        node: Side,
        /// Its words.
        message: String,
    },
    /// A daemon ended by itself.
    #[error("the daemon of {node} ended by itself with {status}; its log is {log}")]
    Ended {
        /// Whose.
        node: Side,
        /// How.
        status: ExitStatus,
        /// Where it says why.
        log: PathBuf,
    },
    /// A daemon stopped with a failure.
    #[error("the daemon of {node} did not stop cleanly: {status}; its log is {log}")]
    Unclean {
        /// Whose.
        node: Side,
        /// How.
        status: ExitStatus,
        /// Where it says why.
        log: PathBuf,
    },
    /// A daemon said no, or nothing.
    #[error("node {node}: {source}")]
    Client {
        /// Which.
        node: Side,
        /// Its words.
        source: ClientError,
    },
    /// A daemon was to be used that does not run.
    #[error("the daemon of {node} does not run")]
    NotRunning {
        /// Which.
        node: Side,
    },
    /// The time is over.
    #[error("node {node} is not {what} after {after:?}{stood}; its log is {log}")]
    Timeout {
        /// Which.
        node: Side,
        /// What was waited for.
        what: &'static str,
        /// How long it had.
        after: Duration,
        /// Where it stood, beginning with a colon, or empty.
        stood: String,
        /// Where it says more.
        log: PathBuf,
    },
    /// The interrupt flag was set.
    #[error("interrupted")]
    Interrupted,
}

/// Two nodes, `alpha` and `beta`.
#[derive(Debug)]
pub struct Pair {
    spec: PairSpec,
    children: [Option<Child>; 2],
    runtime: tokio::runtime::Runtime,
}

impl Pair {
    /// Writes the key and the configuration, and makes the disks of both nodes, reserved where the file system can. Starts nothing.
    ///
    /// # Errors
    /// [`ClusterError::Io`], [`ClusterError::System`], or [`ClusterError::Create`] with what `costandby create` said.
    pub fn create(spec: PairSpec) -> Result<Self, ClusterError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| ClusterError::System { doing: "starting the runtime", source })?;
        let pair = Self { spec, children: [None, None], runtime };
        for side in Side::BOTH {
            let dir = pair.spec.dir.join(side.as_str());
            std::fs::create_dir_all(&dir).map_err(|source| ClusterError::Io {
                doing: "making",
                path: dir,
                source,
            })?;
        }
        let key = Key::random().map_err(|source| ClusterError::System { doing: "making a key", source })?;
        keyring::create(&pair.key(), &Keys::one(key)).map_err(|source| ClusterError::Key { source })?;
        let path = pair.config();
        std::fs::write(&path, pair.render_config(free_ports(pair.spec.address)?))
            .map_err(|source| ClusterError::Io { doing: "writing", path, source })?;
        for node in Side::BOTH {
            pair.make_disks(node)?;
        }
        Ok(pair)
    }

    /// The configuration both daemons run with.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.spec.dir.join("pair.toml")
    }

    /// The key of both nodes.
    fn key(&self) -> PathBuf {
        self.spec.dir.join("pair.key")
    }

    /// A node's log, over all its starts.
    #[must_use]
    pub fn log(&self, node: Side) -> PathBuf {
        self.spec.dir.join(format!("{node}.log"))
    }

    /// The file that is a volume's disk on a node.
    #[must_use]
    pub fn disk(&self, node: Side, volume: &str) -> PathBuf {
        self.spec.dir.join(node.as_str()).join(format!("{volume}.img"))
    }

    /// Where a node exports a volume.
    #[must_use]
    pub fn uri(&self, node: Side, volume: &str) -> NbdUri {
        NbdUri { endpoint: Endpoint::Unix(self.nbd_socket(node)), export: volume.to_owned() }
    }

    /// Starts a node's daemon and waits until it answers.
    ///
    /// # Errors
    /// [`ClusterError::Ended`] or [`ClusterError::Timeout`] where it does not come up.
    pub fn start(&mut self, node: Side) -> Result<(), ClusterError> {
        self.wait_gone(node)?;
        let path = self.log(node);
        let log = File::options().create(true).append(true).open(&path);
        let log = log.map_err(|source| ClusterError::Io { doing: "opening", path, source })?;
        let child = self
            .command_line(node)
            .arg("up")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // A Ctrl-C at the terminal is for the one who owns the pair; it decides in which order things end.
            .process_group(0)
            .spawn()
            .map_err(|source| self.program_error(source))?;
        self.children[node.index()] = Some(child);
        self.wait(node, "up", START_MAX, |_| true, |_| ())
    }

    /// Sends SIGKILL to a node's daemon and returns at once; see [`Self::wait_gone`].
    ///
    /// # Errors
    /// [`ClusterError::NotRunning`].
    pub fn kill(&mut self, node: Side) -> Result<(), ClusterError> {
        let child = self.children[node.index()].as_mut().ok_or(ClusterError::NotRunning { node })?;
        child.kill().map_err(|_| ClusterError::NotRunning { node })
    }

    /// Waits until a killed daemon is gone. Returns at once where none was started.
    ///
    /// # Errors
    /// [`ClusterError::Timeout`].
    pub fn wait_gone(&mut self, node: Side) -> Result<(), ClusterError> {
        self.reap(node, "gone", GONE_MAX).map(|_| ())
    }

    /// Ends the daemons of `nodes` with SIGTERM, all at once, and waits until they are gone.
    ///
    /// # Errors
    /// [`ClusterError::NotRunning`], [`ClusterError::Timeout`], or [`ClusterError::Unclean`] where one fails on its way out.
    pub fn stop(&mut self, nodes: &[Side]) -> Result<(), ClusterError> {
        for &node in nodes {
            let child = self.children[node.index()].as_ref().ok_or(ClusterError::NotRunning { node })?;
            rustix::process::kill_process(
                rustix::process::Pid::from_child(child),
                rustix::process::Signal::TERM,
            )
            .map_err(|_| ClusterError::NotRunning { node })?;
        }
        for &node in nodes {
            let status = self.reap(node, "stopped", STOP_MAX)?;
            if let Some(status) = status.filter(|status| !status.success()) {
                return Err(ClusterError::Unclean { node, status, log: self.log(node) });
            }
        }
        Ok(())
    }

    /// What a node says of its volumes.
    ///
    /// # Errors
    /// [`ClusterError::Client`].
    pub fn status(&self, node: Side) -> Result<Status, ClusterError> {
        let asked = self.runtime.block_on(self.client(node).status());
        asked.map_err(|source| ClusterError::Client { node, source })
    }

    /// Has a node carry out a command and returns its sentence.
    ///
    /// # Errors
    /// [`ClusterError::Client`] with the daemon's reason, [`ClusterError::Timeout`] where it says nothing.
    pub fn command(&self, node: Side, volume: &str, command: AdminCommand) -> Result<String, ClusterError> {
        let client = self.client(node);
        let asked = self
            .runtime
            .block_on(async { tokio::time::timeout(COMMAND_MAX, client.command(volume, command)).await });
        match asked {
            Ok(answer) => answer.map_err(|source| ClusterError::Client { node, source }),
            Err(_) => Err(self.timeout(node, "answering a command", COMMAND_MAX, String::new())),
        }
    }

    /// Waits until a node says that all its volumes are in sync; `seen` is shown every status on the way.
    ///
    /// # Errors
    /// [`ClusterError::Timeout`] saying where it stood, [`ClusterError::Ended`], [`ClusterError::Interrupted`].
    pub fn wait_in_sync(
        &mut self,
        node: Side,
        limit: Duration,
        seen: impl FnMut(&Status),
    ) -> Result<(), ClusterError> {
        self.wait(node, "in sync", limit, |status| status.volumes.iter().all(VolumeStatus::in_sync), seen)
    }

    /// Waits until `done` holds of a node's status.
    ///
    /// # Errors
    /// As [`Self::wait_in_sync`]; `what` names what was waited for.
    pub fn wait(
        &mut self,
        node: Side,
        what: &'static str,
        limit: Duration,
        done: impl Fn(&Status) -> bool,
        mut seen: impl FnMut(&Status),
    ) -> Result<(), ClusterError> {
        let started = Instant::now();
        let mut stood = String::new();
        loop {
            self.check_alive(node)?;
            match self.status(node) {
                Ok(status) => {
                    seen(&status);
                    if done(&status) {
                        return Ok(());
                    }
                    stood = describe(&status);
                }
                // It has not opened its socket yet, is still opening its disks, or is about to be seen dead.
                Err(ClusterError::Client {
                    source: ClientError::NoDaemon { .. } | ClientError::Timeout { .. },
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
            if started.elapsed() >= limit {
                return Err(self.timeout(node, what, limit, stood));
            }
            self.pause()?;
        }
    }

    /// Reserved disks lie in few pieces: on a sparse one each commit of the file system's journal waits for data that
    /// was just given a place, a promotion's record with it, and removing it takes minutes where removal discards.
    fn make_disks(&self, node: Side) -> Result<(), ClusterError> {
        let mut message = String::new();
        for sparse in [None, Some("--sparse")] {
            let made = self.command_line(node).arg("create").args(sparse).stdin(Stdio::null()).output();
            let made = made.map_err(|source| self.program_error(source))?;
            if made.status.success() {
                return Ok(());
            }
            message = String::from_utf8_lossy(&made.stderr).trim().to_owned();
        }
        Err(ClusterError::Create { node, message })
    }

    fn reap(
        &mut self,
        node: Side,
        what: &'static str,
        limit: Duration,
    ) -> Result<Option<ExitStatus>, ClusterError> {
        let started = Instant::now();
        while let Some(child) = &mut self.children[node.index()] {
            if let Ok(Some(status)) = child.try_wait() {
                self.children[node.index()] = None;
                return Ok(Some(status));
            }
            if started.elapsed() >= limit {
                return Err(self.timeout(node, what, limit, String::new()));
            }
            self.pause()?;
        }
        Ok(None)
    }

    fn check_alive(&mut self, node: Side) -> Result<(), ClusterError> {
        let child = self.children[node.index()].as_mut().ok_or(ClusterError::NotRunning { node })?;
        match child.try_wait() {
            Ok(Some(status)) => {
                self.children[node.index()] = None;
                Err(ClusterError::Ended { node, status, log: self.log(node) })
            }
            _ => Ok(()),
        }
    }

    fn pause(&self) -> Result<(), ClusterError> {
        if self.spec.interrupt.load(Ordering::Relaxed) {
            return Err(ClusterError::Interrupted);
        }
        std::thread::sleep(POLL_INTERVAL);
        Ok(())
    }

    fn client(&self, node: Side) -> AdminClient {
        AdminClient::new(&self.admin_socket(node), node.as_str())
    }

    fn admin_socket(&self, node: Side) -> PathBuf {
        self.spec.dir.join(format!("{node}.sock"))
    }

    fn nbd_socket(&self, node: Side) -> PathBuf {
        self.spec.dir.join(format!("{node}.nbd"))
    }

    fn command_line(&self, node: Side) -> Command {
        let mut command = Command::new(&self.spec.program);
        command.arg("--config").arg(self.config()).args(["--node", node.as_str()]);
        command
    }

    fn program_error(&self, source: io::Error) -> ClusterError {
        ClusterError::Io { doing: "running", path: self.spec.program.clone(), source }
    }

    fn timeout(&self, node: Side, what: &'static str, after: Duration, stood: String) -> ClusterError {
        ClusterError::Timeout { node, what, after, stood, log: self.log(node) }
    }

    fn render_config(&self, ports: [u16; 2]) -> String {
        let mut text = format!("key = {}\n", quoted(&self.key()));
        for (node, port) in Side::BOTH.into_iter().zip(ports) {
            let admin = quoted(&self.admin_socket(node));
            let nbd = quoted(Path::new(&format!("unix:{}", self.nbd_socket(node).display())));
            let _ = write!(
                text,
                "\n[nodes.{node}]\nlisten = \"{}\"\nadmin = {admin}\nnbd = [{nbd}]\n",
                SocketAddr::new(self.spec.address, port)
            );
        }
        for PairVolume { name, size, primary, ack } in &self.spec.volumes {
            let _ = write!(text, "\n[volumes.{name}]\nsize = {size}\nprimary = \"{primary}\"\n");
            let _ = write!(text, "link = \"{}\"\nack = \"{ack}\"\n", self.spec.link);
            for node in Side::BOTH {
                let _ = writeln!(text, "disk.{node} = {}", quoted(&self.disk(node, name)));
            }
        }
        text
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            // An error means that it is gone already; waiting for a killed process is short.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Two ports that are free now. Both are held until both are known, so they differ.
fn free_ports(address: IpAddr) -> Result<[u16; 2], ClusterError> {
    let bind = || TcpListener::bind((address, 0));
    let port = |listener: &TcpListener| listener.local_addr().map(|address| address.port());
    let find = || {
        let (first, second) = (bind()?, bind()?);
        Ok([port(&first)?, port(&second)?])
    };
    find().map_err(|source| ClusterError::System { doing: "finding two free ports", source })
}

/// A TOML string.
fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

fn describe(status: &Status) -> String {
    let mut text = String::from(": ");
    for volume in &status.volumes {
        let VolumeStatus { name, role, connection, disk_state, peer_state, resync_percent, .. } = volume;
        let _ = write!(
            text,
            "[{name}: {role}, {connection}, disk {disk_state}, peer {peer_state}, {resync_percent:.1}%]"
        );
    }
    text
}

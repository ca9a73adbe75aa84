//! The admin API: HTTP and JSON on a unix socket that only the daemon's user can open.
//!
//! Stands between the command line (or anything that speaks HTTP) and whoever implements [`AdminBackend`]; it decides
//! nothing. `GET /v1/status` answers a [`Status`]; `POST /v1/volumes/{volume}/{promote|demote|connect|disconnect|…}`
//! answers `{"message": …}`, or `{"error": …}` with 404 for an unknown volume and 409 for a refusal.
//!
//! A command that nobody waits for any more is not carried out ([`Asked`]).
//!
//! Every command leaves one line in the log: who gave it, what it was, what came of it.
//!
//! Invariants: the socket has mode 0600 from its first instant; a socket on which a daemon answers is never taken over;
//! a request body is bounded.
//!
//! Survives: a socket left by a killed daemon (replaced), malformed requests (400), clients that hang while the daemon
//! shuts down (they are cut off).

pub use crate::role::Command;
use crate::socket_file::{self, InTheWay, SocketFile};
pub use asked::{Asked, DEADLINE_HEADER, boot_clock};
use axum::Router;
use axum::body::Bytes;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::UCred;

mod asked;
#[cfg(test)]
mod tests;

/// Bytes of a request's body: the longest legitimate one is `{"force":false}`.
const BODY_LEN_MAX: usize = 4 << 10;

/// Connections the kernel holds for us: the command line and a monitoring agent or two.
const BACKLOG: i32 = 64;

/// How long a shutdown waits for requests that are being answered.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// What `status --json` prints.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The node that answers.
    pub node: String,
    /// Every volume with a disk on it, by name.
    pub volumes: Vec<VolumeStatus>,
    /// Lines of the daemon's log that could not be written since it began.
    #[serde(default)]
    pub log_lines_dropped: u64,
    /// Lines are still being dropped: the log cannot be written now, or not fast enough.
    #[serde(default)]
    pub log_dropping: bool,
    /// Addresses of its configuration that it cannot listen on, and tries again.
    #[serde(default)]
    pub not_listening: Vec<NotListening>,
}

/// An address that the daemon cannot listen on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NotListening {
    /// As the configuration has it: `tcp:` with address and port, or `unix:` with a path.
    pub address: String,
    /// Why, and what to do.
    pub reason: String,
}

/// One volume as its node sees it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// `primary` or `standby`.
    pub role: String,
    /// `UpToDate`, `Inconsistent`, `Outdated`, `Failed` or `Diskless`; [`ATTACHING`] while the daemon opens it.
    pub disk_state: String,
    /// The same words for the peer's disk, `Unknown` while it is not connected.
    pub peer_state: String,
    /// `tcp` or `rdma`: what carries the copies, or would.
    pub link: String,
    /// Why it is not RDMA although the configuration would have it, or why there is none at all.
    #[serde(default)]
    pub link_note: Option<String>,
    /// `async`, `memory` or `durable`.
    pub ack: String,
    /// Fencing number.
    pub epoch: u64,
    /// Data lineage in hexadecimal; a string, because JSON readers round numbers of this size.
    pub generation: String,
    /// Bytes of the volume.
    pub size: u64,
    /// Bytes that the standby lacks, or may lack.
    pub dirty_bytes: u64,
    /// How far the copy under way is, on either node. Without one, percent of the volume that is in sync, as this node
    /// counts: 100 × (`size` − `dirty_bytes`) ÷ `size`, or 0 while one of the two disks, as far as it is known, is not
    /// `UpToDate`.
    pub resync_percent: f64,
    /// Bytes a second that it copied lately; absent without a copy and in its first seconds.
    #[serde(default)]
    pub resync_rate: Option<u64>,
    /// Seconds until it is over, at that rate; absent where there is none or it stands still.
    #[serde(default)]
    pub resync_eta_s: Option<u64>,
    /// `connected`, or what stands in the way.
    pub connection: String,
    /// The other node.
    pub peer: String,
    /// There is no session, and none will be until an operator acts; `advice` says how.
    #[serde(default)]
    pub parted: bool,
    /// What to do, where something is to be done.
    pub advice: Option<String>,
    /// What else an operator should know or act on, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Changes on their way to the peer.
    pub in_flight: u64,
    /// The verification under way, or else the last one of this daemon.
    #[serde(default)]
    pub verify: Option<VerifyStatus>,
    /// Writes wait for the peer to return.
    pub frozen: bool,
    /// Links closed since the daemon began because the peer broke the protocol: a fault of its machine or of a release.
    #[serde(default)]
    pub violations: u64,
}

/// A comparison of the peer's disk with this node's.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// Counts them since the daemon started.
    pub id: u64,
    /// Under way; what is said of differences grows until it ends.
    pub running: bool,
    /// What differs is copied to the peer at once.
    pub repair: bool,
    /// How much of the disk is compared.
    pub percent: f64,
    /// Bytes in grains of the dirty bitmap that differ.
    pub differing_bytes: u64,
    /// How many ranges that is; known when it has ended.
    pub differing_ranges: u64,
    /// The first of those ranges, each its first byte and its length.
    pub ranges: Vec<[u64; 2]>,
    /// What differed was copied, and is durable on both nodes.
    pub repaired: bool,
    /// Why it ended before its end.
    pub unfinished: Option<String>,
}

/// [`VolumeStatus::connection`] while both nodes exchange changes.
pub const CONNECTED: &str = "connected";

/// [`VolumeStatus::connection`] while this node is copied from.
pub const SYNC_SOURCE: &str = "sync-source";

/// [`VolumeStatus::connection`] while this node is copied to.
pub const SYNC_TARGET: &str = "sync-target";

/// [`VolumeStatus::disk_state`] and [`VolumeStatus::peer_state`] of a complete, current disk.
pub const UP_TO_DATE: &str = "UpToDate";

/// [`VolumeStatus::disk_state`] of a disk that is being opened.
pub const ATTACHING: &str = "Attaching";

impl VolumeStatus {
    /// Whether the two disks hold the same, connected and complete.
    #[must_use]
    pub fn in_sync(&self) -> bool {
        self.connection == CONNECTED && self.disk_state == UP_TO_DATE && self.peer_state == UP_TO_DATE
    }
}

impl fmt::Display for Command {
    /// As an operator says it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Promote { force: true } => "promote --force",
            Self::Connect { discard_my_data: true } => "connect --discard-my-data",
            Self::Verify { repair: true } => "verify --repair",
            Self::StopVerify => "verify --stop",
            other => other.as_str(),
        })
    }
}

impl Command {
    /// Its last part of the URL, which is its subcommand too.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Promote { .. } => "promote",
            Self::Demote => "demote",
            Self::Connect { .. } => "connect",
            Self::Disconnect => "disconnect",
            Self::Invalidate => "invalidate",
            Self::Verify { .. } => "verify",
            Self::StopVerify => "stop-verify",
        }
    }
}

/// Why a command was not carried out. The texts reach the operator as they are.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no such volume on this node.
    #[error("node {node} has no volume {volume:?}: `status` shows those it has")]
    NoSuchVolume {
        /// Who answers.
        node: String,
        /// As asked.
        volume: String,
    },
    /// It must not be done now; the text says why and what to do instead.
    #[error("{0}")]
    Refused(String),
}

/// An answer in the making.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who knows the volumes: the daemon, or a fake in tests.
pub trait AdminBackend: Send + Sync + 'static {
    /// The state of everything, now.
    fn status(&self) -> Answer<'_, Status>;

    /// Carries out `command`, unless nobody waits for it any more when it is its turn, and answers when it is done, with a
    /// sentence for the operator.
    fn command(
        &self,
        volume: String,
        command: Command,
        asked: Asked,
    ) -> Answer<'_, Result<String, CommandError>>;
}

/// Why there is no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Somebody answers there.
    #[error(
        "a daemon already runs: it answers on {path}; stop it first, or give this node another `admin` path"
    )]
    AlreadyRuns {
        /// The socket.
        path: PathBuf,
    },
    /// A program holds the socket and takes no connections.
    #[error(
        "a program holds {path} and takes no connections, as a daemon that is stuck or stopped does: `ss -xlp` says which; end \
         it, or give this node another `admin` path"
    )]
    Stuck {
        /// The socket.
        path: PathBuf,
    },
    /// A file that is no socket stands in the way.
    #[error("{path} is not a socket: move it away, or give this node another `admin` path")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its words.
        source: io::Error,
    },
}

/// A bound admin socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    socket: SocketFile,
}

impl AdminServer {
    /// Makes the socket and its directory. Clients can connect from now on and are answered once [`AdminServer::serve`]
    /// runs. Blocks shortly.
    ///
    /// # Errors
    /// [`AdminError`].
    pub fn bind(path: &Path) -> Result<Self, AdminError> {
        let io = |doing| move |source| AdminError::Io { doing, path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|source| AdminError::Io {
                doing: "making the admin socket's directory",
                path: parent.to_owned(),
                source,
            })?;
        }
        remove_stale(path)?;
        let listener = listen(path).map_err(|source| match source.kind() {
            // Between our look and our bind another daemon was faster.
            io::ErrorKind::AddrInUse => AdminError::AlreadyRuns { path: path.to_owned() },
            _ => io("making the admin socket")(source),
        })?;
        let socket = SocketFile::at(path);
        listener.set_nonblocking(true).map_err(io("making the admin socket"))?;
        Ok(Self { listener, socket })
    }

    /// Answers requests until `shutdown` is done, then at most two seconds longer.
    ///
    /// # Errors
    /// [`AdminError::Io`] where the socket cannot be served at all. Errors of single clients are theirs.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O and time.
    pub async fn serve(
        self,
        backend: Arc<dyn AdminBackend>,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), AdminError> {
        let Self { listener, socket } = self;
        let io = |source| AdminError::Io {
            doing: "serving the admin socket",
            path: socket.path().to_owned(),
            source,
        };
        let listener = tokio::net::UnixListener::from_std(listener).map_err(io)?;
        let (stopping, stopped) = tokio::sync::oneshot::channel();
        let service = router(backend).into_make_service_with_connect_info::<Operator>();
        let served = axum::serve(listener, service).with_graceful_shutdown(async move {
            shutdown.await;
            let _ = stopping.send(());
        });
        let cut_off = async {
            // An error means that the sender is gone with the server, whose own result then counts.
            if stopped.await.is_ok() {
                tokio::time::sleep(SHUTDOWN_GRACE).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            result = served.into_future() => result.map_err(io),
            () = cut_off => Ok(()),
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), AdminError> {
    socket_file::remove_stale(path).map_err(|found| {
        let path = path.to_owned();
        match found {
            InTheWay::NotASocket => AdminError::NotASocket { path },
            InTheWay::Answers => AdminError::AlreadyRuns { path },
            InTheWay::Stuck => AdminError::Stuck { path },
            InTheWay::Io { doing, source } => AdminError::Io { doing, path, source },
        }
    })
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The mode of the socket before its bind is the mode of its file, so there is no instant with a wider one.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

type Backend = State<Arc<dyn AdminBackend>>;

/// Who asks, for the log: whoever may open the socket may do everything.
#[derive(Clone, Debug)]
struct Operator {
    who: Option<UCred>,
    connection: Option<Arc<OwnedFd>>,
}

impl Connected<IncomingStream<'_, tokio::net::UnixListener>> for Operator {
    fn connect_info(stream: IncomingStream<'_, tokio::net::UnixListener>) -> Self {
        let stream = stream.io();
        Self {
            who: stream.peer_cred().ok(),
            connection: stream.as_fd().try_clone_to_owned().ok().map(Arc::new),
        }
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(found) = self.who else { return f.write_str("somebody") };
        write!(f, "user {}", found.uid())?;
        found.pid().map_or(Ok(()), |pid| write!(f, " (process {pid})"))
    }
}

fn router(backend: Arc<dyn AdminBackend>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/volumes/{volume}/{command}", post(command))
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "no such path; see GET /v1/status") })
        .method_not_allowed_fallback(|| async {
            failure(StatusCode::METHOD_NOT_ALLOWED, "GET /v1/status, POST /v1/volumes/VOLUME/COMMAND")
        })
        .layer(DefaultBodyLimit::max(BODY_LEN_MAX))
        .with_state(backend)
}

async fn status(State(backend): Backend) -> Response {
    axum::Json(backend.status().await).into_response()
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PromoteBody {
    #[serde(default)]
    force: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectBody {
    #[serde(default)]
    discard_my_data: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct VerifyBody {
    #[serde(default)]
    repair: bool,
}

/// A command's options: the body as JSON, or none of them for an empty one. `shape` is for the one who got it wrong.
fn options<T: Default + for<'de> Deserialize<'de>>(body: &Bytes, shape: &str) -> Result<T, String> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| format!("the body of {shape} or empty: {error}"))
}

/// Until when the command is wanted, on the boot clock.
fn deadline(headers: &HeaderMap) -> Result<Option<Duration>, &'static str> {
    let Some(value) = headers.get(DEADLINE_HEADER) else { return Ok(None) };
    let millis = value.to_str().ok().and_then(|text| text.parse().ok());
    millis
        .map(|millis| Some(Duration::from_millis(millis)))
        .ok_or("costandby-deadline is a number of milliseconds on the boot clock")
}

async fn command(
    State(backend): Backend,
    ConnectInfo(operator): ConnectInfo<Operator>,
    UrlPath((volume, word)): UrlPath<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let until = match deadline(&headers) {
        Ok(until) => until,
        Err(text) => return failure(StatusCode::BAD_REQUEST, text),
    };
    let command = match word.as_str() {
        "promote" => options(&body, "promote is {\"force\": true|false}")
            .map(|PromoteBody { force }| Command::Promote { force }),
        "connect" => options(&body, "connect is {\"discard_my_data\": true|false}")
            .map(|ConnectBody { discard_my_data }| Command::Connect { discard_my_data }),
        "demote" => Ok(Command::Demote),
        "disconnect" => Ok(Command::Disconnect),
        "invalidate" => Ok(Command::Invalidate),
        "verify" => options(&body, "verify is {\"repair\": true|false}")
            .map(|VerifyBody { repair }| Command::Verify { repair }),
        "stop-verify" => Ok(Command::StopVerify),
        _ => {
            let text = format!(
                "no command {word:?}: there are promote, demote, connect, disconnect, invalidate, verify, stop-verify"
            );
            return failure(StatusCode::NOT_FOUND, &text);
        }
    };
    let command = match command {
        Ok(command) => command,
        Err(text) => return failure(StatusCode::BAD_REQUEST, &text),
    };
    let asked = Asked::new(until, operator.connection.clone());
    // In a task of its own: a command that was begun goes on when whoever gave it hangs up, and then its outcome is in the log
    // all the same.
    let outcome = tokio::spawn(async move {
        let outcome = backend.command(volume.clone(), command, asked).await;
        match &outcome {
            Ok(message) => tracing::info!(volume, "{operator} asked for {command}: {message}"),
            Err(error) => tracing::warn!(volume, "{operator} asked for {command}, which is refused: {error}"),
        }
        outcome
    });
    match outcome.await.expect("a panic has ended the process") {
        Ok(message) => axum::Json(serde_json::json!({ "message": message })).into_response(),
        Err(error @ CommandError::NoSuchVolume { .. }) => failure(StatusCode::NOT_FOUND, &error.to_string()),
        Err(error @ CommandError::Refused(_)) => failure(StatusCode::CONFLICT, &error.to_string()),
    }
}

fn failure(status: StatusCode, text: &str) -> Response {
    (status, axum::Json(serde_json::json!({ "error": text }))).into_response()
}

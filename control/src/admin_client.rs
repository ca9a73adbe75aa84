//! The other end of the admin socket: what `status`, `promote` and the rest use to talk to their node's daemon.
//!
//! One connection a request, on a tokio runtime of the caller. Every wait is bounded.

use crate::admin::{self, Command, Status};
use axum::http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Bytes of an answer: a thousand volumes take about 500 KiB.
const ANSWER_LEN_MAX: usize = 16 << 20;

/// The daemon answers a status from memory; longer than this and it hangs.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// A demotion waits for what is in flight to reach stable storage on both nodes.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers on {path}: start it with `costandby --node {node} up`")]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// Whose daemon it would be.
        node: String,
    },
    /// A file that is no socket is at the socket's path.
    #[error(
        "{path} is not a socket, so a running daemon cannot be reached: move that file away, and the daemon creates its socket \
         within seconds; or give this node another `admin` path"
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket is held by a program that takes no connections.
    #[error(
        "a program holds {path} and takes no connections: `ss -xlp` says which, as root; where that is the daemon, see its log"
    )]
    Stuck {
        /// The socket.
        path: PathBuf,
    },
    /// The socket is another user's.
    #[error("{path} may not be opened: run this as the user that runs the daemon (often root, through sudo)")]
    Forbidden {
        /// The socket.
        path: PathBuf,
    },
    /// The connection failed.
    #[error("asking the daemon on {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// HTTP failed: the daemon died in between, or something else listens there.
    #[error("the daemon on {path} broke off its answer: {source}")]
    Http {
        /// The socket.
        path: PathBuf,
        /// What was wrong.
        source: hyper::Error,
    },
    /// Too late.
    #[error("the daemon on {path} did not answer within {after:?}; see its log")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// Not JSON of the expected shape, or too long.
    #[error(
        "the daemon on {path} answered {status} and something this program cannot read: are both of the same release?"
    )]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// Its HTTP status.
        status: StatusCode,
    },
    /// The daemon says no; its own words.
    #[error("{message}")]
    Refused {
        /// Its words.
        message: String,
    },
}

/// Speaks to one node's daemon.
#[derive(Clone, Debug)]
pub struct AdminClient {
    path: PathBuf,
    node: String,
}

impl AdminClient {
    /// A client for the socket at `path`, of the node called `node`. Connects with each request only.
    #[must_use]
    pub fn new(path: &Path, node: &str) -> Self {
        Self { path: path.to_owned(), node: node.to_owned() }
    }

    /// The state of the daemon's volumes.
    ///
    /// # Errors
    /// [`ClientError`], [`ClientError::NoDaemon`] where none runs.
    pub async fn status(&self) -> Result<Status, ClientError> {
        let (status, body) = self.request(Method::GET, "/v1/status", Bytes::new(), STATUS_TIMEOUT).await?;
        if status != StatusCode::OK {
            return Err(self.refusal(status, &body));
        }
        serde_json::from_slice(&body).map_err(|_| self.garbled(status))
    }

    /// Has `command` carried out on `volume` and returns the daemon's sentence about it.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Refused`] carries the daemon's reason.
    pub async fn command(&self, volume: &str, command: Command) -> Result<String, ClientError> {
        #[derive(serde::Deserialize)]
        struct Done {
            message: String,
        }
        let target = format!("/v1/volumes/{volume}/{}", command.as_str());
        let body = match command {
            Command::Promote { force } => Bytes::from(format!("{{\"force\":{force}}}")),
            Command::Connect { discard_my_data } => {
                Bytes::from(format!("{{\"discard_my_data\":{discard_my_data}}}"))
            }
            Command::Verify { repair } => Bytes::from(format!("{{\"repair\":{repair}}}")),
            _ => Bytes::new(),
        };
        let (status, body) = self.request(Method::POST, &target, body, COMMAND_TIMEOUT).await?;
        if status != StatusCode::OK {
            return Err(self.refusal(status, &body));
        }
        let done: Done = serde_json::from_slice(&body).map_err(|_| self.garbled(status))?;
        Ok(done.message)
    }

    fn garbled(&self, status: StatusCode) -> ClientError {
        ClientError::Garbled { path: self.path.clone(), status }
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        #[derive(serde::Deserialize)]
        struct Refusal {
            error: String,
        }
        match serde_json::from_slice(body) {
            Ok(Refusal { error }) => ClientError::Refused { message: error },
            Err(_) => self.garbled(status),
        }
    }

    async fn request(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
        after: Duration,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        tokio::time::timeout(after, self.exchange(method, target, body, after))
            .await
            .unwrap_or_else(|_| Err(ClientError::Timeout { path: self.path.clone(), after }))
    }

    async fn exchange(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
        after: Duration,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let path = || self.path.clone();
        let http = |source| ClientError::Http { path: path(), source };
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            io::ErrorKind::ConnectionRefused if is_no_socket(&self.path) => {
                ClientError::NotASocket { path: path() }
            }
            io::ErrorKind::WouldBlock => ClientError::Stuck { path: path() },
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoDaemon { path: path(), node: self.node.clone() }
            }
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { path: path() },
            _ => ClientError::Io { path: path(), source },
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        // Without its connection being polled the request never leaves; its errors come out of the request as well.
        let connection = tokio::spawn(connection);
        let until = admin::boot_clock() + after;
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(admin::DEADLINE_HEADER, u64::try_from(until.as_millis()).unwrap_or(u64::MAX))
            .header(header::HOST, "costandby")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| ClientError::Io { path: path(), source: io::Error::other(error) })?;
        let answer = sender.send_request(request).await.map_err(http)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_LEN_MAX)
            .collect()
            .await
            .map_err(|_| self.garbled(status))?
            .to_bytes();
        connection.abort();
        Ok((status, body))
    }
}

/// Whether there is a file that nobody can listen on.
fn is_no_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket())
}

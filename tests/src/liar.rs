//! Whoever else may dial a node: strangers without the key, and a holder of the key who lies.
//!
//! Speaks the real protocol through the real handshake, one connection at a time, and says whatever a test gives it.

use costandby_control::generation::{Lineage, ServingRole, View};
use costandby_control::hello::{self, Hello, Message};
use costandby_control::secure::channel::Channel;
use costandby_control::secure::handshake::{self, SecureError};
use costandby_control::secure::key::Keys;
use costandby_datapath::disk::superblock::{DiskState, Generations};
use costandby_datapath::units::{Epoch, Generation};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a node may take for an answer, or for closing a connection.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Plays node `node` against the node at `target`.
#[derive(Debug)]
pub struct Liar {
    /// Whom it says to be.
    pub node: &'static str,
    /// Whom it dials.
    pub peer: &'static str,
    /// Where that one listens.
    pub target: SocketAddr,
    /// What it has for keys.
    pub keys: Keys,
}

/// What came of a lie.
#[derive(Debug)]
pub enum Answer {
    /// A message.
    Said(Box<Message>),
    /// The connection was closed, or what came was no message.
    Closed(String),
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

impl Liar {
    /// Dials, proves what there is to prove, and lets `talk` do the rest.
    ///
    /// # Errors
    /// Why there is no connection.
    pub fn talk<T>(&self, talk: impl AsyncFnOnce(&mut Channel) -> T) -> Result<T, SecureError> {
        runtime().block_on(async {
            let stream = TcpStream::connect(self.target).await?;
            let shake = Channel::dial(stream, &self.keys, self.node, self.peer);
            let late = || Err(io::Error::from(io::ErrorKind::TimedOut).into());
            let mut channel = tokio::time::timeout(ANSWER_MAX, shake).await.unwrap_or_else(|_| late())?;
            Ok(talk(&mut channel).await)
        })
    }

    /// Takes one connection in the peer's place, where the node dials; the rest as in [`Liar::talk`].
    ///
    /// # Errors
    /// Why there is no connection.
    pub fn answer<T>(
        &self,
        listener: &TcpListener,
        talk: impl AsyncFnOnce(&mut Channel) -> T,
    ) -> Result<T, SecureError> {
        listener.set_nonblocking(true)?;
        let began = Instant::now();
        let stream = loop {
            match listener.accept() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < ANSWER_MAX => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                accepted => break accepted?.0,
            }
        };
        stream.set_nonblocking(true)?;
        runtime().block_on(async {
            let shake = Channel::accept(TcpStream::from_std(stream)?, &self.keys, self.node);
            let late = || Err(io::Error::from(io::ErrorKind::TimedOut).into());
            let mut channel = tokio::time::timeout(ANSWER_MAX, shake).await.unwrap_or_else(|_| late())?;
            Ok(talk(&mut channel).await)
        })
    }

    /// A hello that a standby with a new disk of `size` bytes might say.
    #[must_use]
    pub fn fresh_hello(&self, volume: &str, size: u64) -> Hello {
        let view = View {
            volume_id: [0; 16],
            size,
            epoch: Epoch(0),
            generations: Generations::default(),
            disk_state: DiskState::UpToDate,
            zeroed: true,
            was_primary: false,
            was_primary_unclean: false,
            applying_unclean: false,
            lost_power: false,
            dirty: false,
            copying: Generation::ZERO,
            sessions_offered: 0,
            sessions_begun: 0,
            recall: None,
            role: ServingRole::Standby,
            configured_primary: false,
            proposed: Lineage { volume_id: [9; 16], generation: 9 },
        };
        Hello {
            node: self.node.to_owned(),
            volume: volume.to_owned(),
            ring_len: 128 << 20,
            links: vec!["tcp".to_owned()],
            nonce: 1,
            incarnation: 1,
            rdma: None,
            no_rdma: None,
            settings: Default::default(),
            view,
        }
    }
}

/// Says `bytes`, whatever they are, as one sealed message.
///
/// # Errors
/// The connection's.
pub async fn say(channel: &mut Channel, bytes: &[u8]) -> Result<(), SecureError> {
    channel.send(bytes).await
}

/// What the node says next.
pub async fn hear(channel: &mut Channel) -> Answer {
    let heard = tokio::time::timeout(ANSWER_MAX, async {
        let bytes = channel.receive().await?;
        hello::decode_whole(&bytes)
    });
    match heard.await {
        Ok(Ok(message)) => Answer::Said(Box::new(message)),
        Ok(Err(error)) => Answer::Closed(error.to_string()),
        Err(_) => Answer::Closed("nothing was said in time".to_owned()),
    }
}

/// Says nothing until the node closes the connection, and how long that took.
///
/// # Panics
/// When it is not closed in time.
pub async fn be_silent(channel: &mut Channel) -> Duration {
    let (began, mut heard) = (Instant::now(), [0; 4096]);
    let closed = async { while channel.stream().read(&mut heard).await.is_ok_and(|len| len > 0) {} };
    let in_time = tokio::time::timeout(2 * ANSWER_MAX, closed).await;
    assert!(in_time.is_ok(), "a silent peer's connection is kept open");
    began.elapsed()
}

/// An envelope around any JSON, with a good checksum.
#[must_use]
pub fn envelope(body: &str) -> Vec<u8> {
    let mut bytes = hello::MAGIC.to_vec();
    bytes.push(hello::VERSION);
    bytes.extend_from_slice(&u32::try_from(body.len()).expect("short").to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(body.as_bytes()).to_le_bytes());
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

/// Says `bytes` on a bare connection and gives all that comes back until it is closed.
///
/// # Panics
/// When it is not closed in time.
#[must_use]
pub fn say_bare(target: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    runtime().block_on(async {
        let mut stream = TcpStream::connect(target).await.expect("connected");
        // A node that has closed already has said enough.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let read = tokio::time::timeout(2 * ANSWER_MAX, stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "{target} keeps a stranger's connection open");
        answer
    })
}

/// An opening that was recorded on the wire between two nodes of the key, and nothing that its dialer alone could say.
#[must_use]
pub fn recorded_opening(keys: &Keys, from: &str, to: &str) -> Vec<u8> {
    handshake::open(keys, from, to).1
}

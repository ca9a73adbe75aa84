//! Connections between nodes before they become links: accepting, dialling, and carrying what is said on them.
//!
//! One TCP connection carries one volume. Its first message says which; from then on it belongs to that volume's task,
//! which holds at most one conversation at a time.

use super::Registry;
use super::negotiate::{self, Terms};
use super::volume::Input;
use crate::hello::{self, Hello, HelloError, Message, Refuse, RefuseCode, Upgrade};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};

/// How long a peer may take for each message of a conversation: covers a durable store of its metadata, and the wait for its
/// RDMA ring.
pub(super) const MESSAGE_MAX: Duration = Duration::from_secs(5);

/// How long a dial may take; the next one follows soon.
const DIAL_MAX: Duration = Duration::from_secs(1);

/// Connections that have not said yet which volume they are for: more than any cluster's, few enough to be harmless.
const STRANGERS_MAX: usize = 64;

/// How a conversation went on.
pub(super) type Heard = Result<Message, HelloError>;

/// Accepts connections from peers until aborted.
pub(super) async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    loop {
        let permit = Arc::clone(&strangers).acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, from)) => {
                let registry = Arc::clone(&registry);
                tokio::spawn(async move {
                    meet(stream, from, &registry).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: give way instead of spinning.
                tracing::warn!(%error, "cannot accept a peer's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a connection to our port begins with.
enum First {
    Hello(Box<Hello>),
    Upgrade(Upgrade),
}

async fn meet(mut stream: TcpStream, from: SocketAddr, registry: &Registry) {
    let (volume, from_node, first) = match listen(&mut stream).await {
        Ok(Message::Hello(hello)) => (hello.volume.clone(), hello.node.clone(), First::Hello(hello)),
        Ok(Message::Upgrade(upgrade)) => {
            (upgrade.volume.clone(), upgrade.node.clone(), First::Upgrade(upgrade))
        }
        Ok(_) => {
            tracing::warn!(%from, "a connection to the peers' port began with something else than a hello");
            return;
        }
        Err(error) => {
            tracing::warn!(%from, %error, "a connection to the peers' port was closed");
            return;
        }
    };
    let node = registry.node.as_str();
    let found = registry.volumes.iter().find(|v| v.config.name.as_str() == volume);
    let text = match found {
        Some(shared) if shared.peer.as_str() == from_node => {
            // A task that has ended drops the stream, which tells the peer enough.
            let _ = shared.inbox.send(match first {
                First::Hello(hello) => Input::Accepted { stream, hello },
                First::Upgrade(upgrade) => Input::UpgradeAsked { stream, upgrade },
            });
            return;
        }
        Some(shared) => format!(
            "volume {volume} is shared by {node} and {} here, not by {from_node}: use the same configuration on both \
             nodes",
            shared.peer
        ),
        None => format!("node {node} has no volume {volume}: use the same configuration on both nodes"),
    };
    tracing::warn!(%from, "refused a peer: {text}");
    say_and_close(stream, Message::Refuse(Refuse { code: RefuseCode::Configuration, text })).await;
}

/// Dials a peer and tells the volume's task.
pub(super) fn dial(address: SocketAddr, inbox: mpsc::UnboundedSender<Input>) {
    tokio::spawn(async move {
        let stream = connect_to(address).await.ok();
        let _ = inbox.send(Input::Dialled { stream });
    });
}

/// A connection to a peer's port.
pub(super) async fn connect_to(address: SocketAddr) -> std::io::Result<TcpStream> {
    let late = || std::io::ErrorKind::TimedOut.into();
    tokio::time::timeout(DIAL_MAX, TcpStream::connect(address)).await.unwrap_or_else(|_| Err(late()))
}

/// Asks the peer to take a session on to RDMA, and tells the volume's task what came of it.
pub(super) fn ask_upgrade(
    peer: SocketAddr,
    upgrade: Upgrade,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let (session, serial) = (upgrade.session, upgrade.serial);
        let upgraded = negotiate::ask_upgrade(peer, upgrade, &terms).await;
        let _ = inbox.send(Input::Upgraded { session, serial, upgraded });
    });
}

/// Makes the peer the offer that it asked for, and tells the volume's task what came of it.
pub(super) fn offer_upgrade(
    mut stream: TcpStream,
    upgrade: &Upgrade,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    let (session, serial) = (upgrade.session, upgrade.serial);
    tokio::spawn(async move {
        let upgraded = negotiate::offer_upgrade(&mut stream, &terms).await;
        let upgraded = upgraded.map(|prepared| (stream, prepared));
        let _ = inbox.send(Input::Upgraded { session, serial, upgraded });
    });
}

/// Says `ours`, listens for the answer, and gives both connection and answer to the volume's task.
pub(super) fn converse(
    serial: u64,
    mut stream: TcpStream,
    ours: Message,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let heard = match say(&mut stream, &ours).await {
            Ok(()) => listen(&mut stream).await,
            Err(error) => Err(error),
        };
        let _ = inbox.send(Input::Heard { serial, stream, heard });
    });
}

/// Begins a conversation, and tells the volume's task when both sides know what carries it.
pub(super) fn greet(
    serial: u64,
    mut stream: TcpStream,
    ours: Hello,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let met = negotiate::greet(&mut stream, ours, &terms).await;
        let _ = inbox.send(Input::Met { serial, stream, met });
    });
}

/// Answers a hello that was read already, and tells the volume's task when both sides know what carries the session.
pub(super) fn answer_hello(
    serial: u64,
    mut stream: TcpStream,
    ours: Hello,
    theirs: Box<Hello>,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let met = negotiate::answer(&mut stream, ours, theirs, &terms).await;
        let _ = inbox.send(Input::Met { serial, stream, met });
    });
}

/// Says a last word.
pub(super) fn part(stream: TcpStream, refuse: Refuse) {
    tokio::spawn(say_and_close(stream, Message::Refuse(refuse)));
}

async fn say_and_close(mut stream: TcpStream, message: Message) {
    // The peer is told if it still listens; the connection ends either way.
    let _ = say(&mut stream, &message).await;
    let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
}

pub(super) async fn say(stream: &mut TcpStream, message: &Message) -> Result<(), HelloError> {
    timed(MESSAGE_MAX, hello::write(stream, message)).await
}

pub(super) async fn listen(stream: &mut TcpStream) -> Heard {
    listen_for(stream, MESSAGE_MAX).await
}

/// The same, for a message that may take longer than most.
pub(super) async fn listen_for(stream: &mut TcpStream, limit: Duration) -> Heard {
    timed(limit, hello::read(stream)).await
}

async fn timed<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, HelloError>>,
) -> Result<T, HelloError> {
    let late = || HelloError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(late()))
}

//! Connections between nodes before they become links: accepting, dialling, and carrying what is said on them.
//!
//! One TCP connection carries one volume. Its first message says which; from then on it belongs to that volume's task,
//! which holds at most one conversation at a time.

use super::negotiate::{self, Terms};
use super::registry::Registry;
use super::volume::Input;
use crate::hello::{self, Hello, HelloError, Message, Refuse, RefuseCode, Upgrade};
use crate::role::{Obstacle, Reach};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
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

/// Refusals that are remembered as told, so that a peer that dials twice a second fills no log: more than a cluster has
/// volumes that only one of two nodes knows.
const TOLD_MAX: usize = 256;

/// What was refused before any volume was found, each told once.
#[derive(Default)]
pub(super) struct Refusals {
    told: Mutex<VecDeque<String>>,
}

impl Refusals {
    /// Whether it was not told lately.
    fn is_news(&self, text: &str) -> bool {
        let mut told = self.told.lock().expect("nobody panics with it");
        if told.iter().any(|before| before == text) {
            return false;
        }
        if told.len() == TOLD_MAX {
            told.pop_front();
        }
        told.push_back(text.to_owned());
        true
    }
}

/// How a conversation went on.
pub(super) type Heard = Result<Message, HelloError>;

/// Accepts connections from peers until aborted.
pub(super) async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    let refusals = Arc::new(Refusals::default());
    let mut refused = false;
    loop {
        let permit = Arc::clone(&strangers).acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, from)) => {
                if std::mem::take(&mut refused) {
                    tracing::info!("peers' connections are accepted again");
                }
                let (registry, refusals) = (Arc::clone(&registry), Arc::clone(&refusals));
                tokio::spawn(async move {
                    meet(stream, from, &registry, &refusals).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: give way instead of spinning, and say so once.
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept peers' connections, which is tried again until it can be done");
                }
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

async fn meet(mut stream: TcpStream, from: SocketAddr, registry: &Registry, refusals: &Refusals) {
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
    if refusals.is_news(&text) {
        tracing::warn!(%from, "refused a peer: {text}");
    }
    say_and_close(stream, Message::Refuse(Refuse { code: RefuseCode::Configuration, text })).await;
}

/// Dials a peer and tells the volume's task.
pub(super) fn dial(address: SocketAddr, inbox: mpsc::UnboundedSender<Input>) {
    tokio::spawn(async move {
        let stream = connect_to(address).await.map_err(|error| unreachable(address, &error));
        let _ = inbox.send(Input::Dialled { stream });
    });
}

/// Why there is no connection to a peer's address.
fn unreachable(address: SocketAddr, error: &std::io::Error) -> Obstacle {
    use std::io::ErrorKind;
    let (reach, text) = match error.kind() {
        ErrorKind::ConnectionRefused => {
            (Reach::Refused, format!("connection refused by {address}, so no daemon listens there"))
        }
        ErrorKind::TimedOut => (
            Reach::Silent,
            format!(
                "no answer from {address} within {} s: its machine is off or hangs, or the network drops packets",
                DIAL_MAX.as_secs()
            ),
        ),
        ErrorKind::HostUnreachable => (
            Reach::Silent,
            format!("no machine answers at {address} ({error}): it is off, or the network is cut"),
        ),
        ErrorKind::NetworkUnreachable => (
            Reach::NoRoute,
            format!("this machine has no route to {address} ({error}): see `ip route` and `ip link`"),
        ),
        _ => (Reach::Other, format!("connecting to {address}: {error}")),
    };
    Obstacle::Unreachable { reach, text }
}

/// Asks a peer that dials us whether it would have a session about a volume, and tells the volume's task.
///
/// The question is a wish to take a session on that there is not. Every release answers with a refusal: that there is no such
/// session, where it would have one, and else why not.
pub(super) fn probe(address: SocketAddr, node: String, volume: String, inbox: mpsc::UnboundedSender<Input>) {
    tokio::spawn(async move {
        let no_session = Upgrade { node, volume, session: [0; 2], serial: 0 };
        let asked = match connect_to(address).await {
            Ok(mut stream) => ask(&mut stream, no_session).await,
            Err(error) => Err(unreachable(address, &error)),
        };
        let _ = inbox.send(Input::Probed { asked });
    });
}

async fn ask(stream: &mut TcpStream, question: Upgrade) -> Result<(), Obstacle> {
    let answer = match say(stream, &Message::Upgrade(question)).await {
        Ok(()) => listen(stream).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(Message::Refuse(Refuse { code: RefuseCode::Busy, .. })) => Ok(()),
        Ok(Message::Refuse(refuse)) => Err(Obstacle::Refused(refuse)),
        Ok(other) => Err(Obstacle::Failed { text: negotiate::out_of_turn(other, "a refusal").to_string() }),
        Err(error) => Err(Obstacle::Failed { text: error.to_string() }),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_a_peer_away_is_said_with_its_address() {
        use std::io::ErrorKind::{self, *};
        let address = SocketAddr::from(([10, 9, 0, 2], 7790));
        let told = |kind: ErrorKind| match unreachable(address, &kind.into()) {
            Obstacle::Unreachable { reach, text } => {
                assert!(text.contains("10.9.0.2:7790"), "{text}");
                (reach, text)
            }
            other => panic!("{other:?}"),
        };
        assert!(told(ConnectionRefused).1.starts_with("connection refused by 10.9.0.2:7790"));
        assert!(told(TimedOut).1.starts_with("no answer from 10.9.0.2:7790 within 1 s"));
        assert_eq!(told(TimedOut).0, told(HostUnreachable).0, "both mean that nobody is there");
        assert_eq!(told(NetworkUnreachable).0, Reach::NoRoute);
        assert_eq!(told(PermissionDenied).0, Reach::Other);
    }

    #[test]
    fn a_refusal_is_told_once_and_what_is_remembered_is_bounded() {
        let refusals = Refusals::default();
        assert!(refusals.is_news("beta has no volume db") && !refusals.is_news("beta has no volume db"));
        for volume in 0..2 * TOLD_MAX {
            assert!(refusals.is_news(&format!("beta has no volume {volume}")));
        }
        assert_eq!(refusals.told.lock().expect("nobody panics with it").len(), TOLD_MAX);
        assert!(refusals.is_news("beta has no volume db"), "forgotten by then");
    }
}

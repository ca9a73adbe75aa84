//! Connections between nodes before they become links: accepting, dialling, and carrying what is said on them.
//!
//! One TCP connection carries one volume. It begins with the proof of the pair's key, on both sides ([`crate::secure`]); its
//! first message says which volume it is for. From then on it belongs to that volume's task, which holds at most one
//! conversation at a time.
//!
//! Invariant: nothing that comes over a connection reaches a volume's task before it was opened with the key, under a
//! handshake that both ends took part in just now. What comes before costs a place among [`super::strangers`] for a bounded
//! time, and the log a line now and then.

use super::negotiate::{self, Terms};
use super::rdma::Prepared;
use super::registry::Registry;
use super::strangers::{Refusals, Strangers};
use super::volume::Input;
use super::volume::relink::Next;
use crate::hello::{self, Ask, Hello, HelloError, Message, Refuse, RefuseCode};
use crate::role::{Obstacle, Reach};
use crate::secure::channel::Channel;
use crate::secure::handshake::SecureError;
use crate::secure::keyring::Keyring;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// How long a peer may take for each message of a conversation: covers a durable store of its metadata, and the wait for its
/// RDMA ring.
pub(super) const MESSAGE_MAX: Duration = Duration::from_secs(5);

/// How long a dial may take; the next one follows soon.
const DIAL_MAX: Duration = Duration::from_secs(1);

/// How long the handshake may take: two short messages, and less than a millisecond's work on each side.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// How a conversation went on.
pub(super) type Heard = Result<Message, HelloError>;

/// The way from this node to a peer.
#[derive(Clone)]
pub(super) struct Route {
    peer: String,
    address: SocketAddr,
    node: String,
    keys: Arc<Keyring>,
}

/// Why there is no connection to a peer.
#[derive(Debug)]
pub(super) enum Unreached {
    /// Nobody took it.
    Connect(io::Error),
    /// Whoever took it did not prove to be the peer, or would not have us.
    Handshake(SecureError),
}

impl From<Unreached> for HelloError {
    fn from(why: Unreached) -> Self {
        match why {
            Unreached::Connect(error) => error.into(),
            Unreached::Handshake(error) => error.into(),
        }
    }
}

impl Route {
    /// To `peer`, which listens at `address`, from `node`.
    pub(super) fn to(peer: &str, address: SocketAddr, node: &str, keys: Arc<Keyring>) -> Self {
        Self { peer: peer.to_owned(), address, node: node.to_owned(), keys }
    }

    /// A connection to the peer, which has proved to be it.
    pub(super) async fn connect(&self) -> Result<Channel, Unreached> {
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let stream = tokio::time::timeout(DIAL_MAX, TcpStream::connect(self.address)).await;
        let stream = stream.unwrap_or_else(|_| Err(late())).map_err(Unreached::Connect)?;
        let keys = self.keys.keys();
        let handshake = Channel::dial(stream, &keys, &self.node, &self.peer);
        let proved = tokio::time::timeout(HANDSHAKE_MAX, handshake).await;
        proved.unwrap_or_else(|_| Err(late().into())).map_err(Unreached::Handshake)
    }

    /// The same, with what stands in the way for an operator.
    async fn reach(&self) -> Result<Channel, Obstacle> {
        self.connect().await.map_err(|why| match why {
            Unreached::Connect(error) => unreachable(self.address, &error),
            Unreached::Handshake(error) => unproved(self.address, &error),
        })
    }
}

/// Connections that have proved nothing, and what they were refused for.
struct Door {
    began: Instant,
    strangers: Mutex<Strangers<AbortHandle>>,
    refusals: Mutex<Refusals>,
}

impl Door {
    fn refused(&self, from: IpAddr, text: &str) {
        let (now, text) = (self.began.elapsed(), plain(text));
        let line = self.refusals.lock().expect("nobody panics with it").note(now, from, &text);
        if let Some(line) = line {
            tracing::warn!("{line}");
        }
    }
}

/// A peer's words as they may be shown on a terminal: one line, without its escapes.
fn plain(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// Accepts connections from peers until aborted.
pub(super) async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let began = Instant::now();
    let door = Arc::new(Door { began, strangers: Mutex::default(), refusals: Mutex::default() });
    let mut refused = false;
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                if std::mem::take(&mut refused) {
                    tracing::info!("peers' connections are accepted again");
                }
                let (registry, there) = (Arc::clone(&registry), Arc::clone(&door));
                // Locked until it is entered, so that a task cannot leave before.
                let mut strangers = door.strangers.lock().expect("nobody panics with it");
                let number = strangers.next();
                let task = tokio::spawn(async move {
                    meet(stream, from.ip(), &registry, &there, number).await;
                });
                let gone = strangers.enter(from.ip(), task.abort_handle());
                drop(strangers);
                if let Some((ip, task)) = gone {
                    task.abort();
                    door.refused(
                        ip,
                        "too many connections without proof of the key; the oldest is closed for a new one",
                    );
                }
            }
            Err(error) => {
                // Out of descriptors, most likely: give way instead of spinning, and say so once.
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept connections from peers; trying again until that works");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a connection to our port begins with.
enum First {
    Hello(Box<Hello>),
    Ask(Ask),
}

/// Lets a connection in that proves the key, and hands it to the task of the volume it is for.
async fn meet(stream: TcpStream, from: IpAddr, registry: &Registry, door: &Door, number: u64) {
    let node = registry.node.as_str();
    let mut proved = None;
    let admitted = admit(stream, registry, &mut proved).await;
    door.strangers.lock().expect("nobody panics with it").leave(number);
    let (channel, message) = match admitted {
        Ok(admitted) => admitted,
        // A proof and nothing more: `doctor` on the other node compares the keys so.
        Err(HelloError::Secure(SecureError::Io { source }))
            if proved.is_some() && source.kind() == io::ErrorKind::UnexpectedEof =>
        {
            return;
        }
        Err(error) => {
            let unproved = proved.is_none();
            // What was unsealed came from a living holder of the key, and is worth a word in `status`.
            if let Some(proved) = proved.filter(|_| !matches!(error, HelloError::Secure(_))) {
                // For whichever volume that was.
                for shared in registry.volumes.iter().filter(|shared| shared.peer.as_str() == proved) {
                    let asked = Err(Obstacle::Failed { text: plain(&error.to_string()) });
                    let _ = shared.inbox.send(Input::Probed { asked });
                }
            }
            return match &error {
                HelloError::Secure(SecureError::Io { source })
                    if unproved && source.kind() == io::ErrorKind::TimedOut =>
                {
                    let text = format!(
                        "it began no handshake within {} s, like a program that waits for a greeting: is it an NBD client? Their \
                         addresses are those of `nbd`",
                        HANDSHAKE_MAX.as_secs()
                    );
                    door.refused(from, &text);
                }
                _ => door.refused(from, &error.to_string()),
            };
        }
    };
    let (volume, from_node, first) = match message {
        Message::Hello(hello) => (hello.volume.clone(), hello.node.clone(), First::Hello(hello)),
        Message::Ask(ask) => (ask.volume.clone(), ask.node.clone(), First::Ask(ask)),
        _ => {
            return door.refused(
                from,
                "protocol error: expected a hello first; do both nodes run the same release?",
            );
        }
    };
    let proved = channel.peer();
    let found = registry.volumes.iter().find(|v| v.config.name.as_str() == volume);
    let text = match found {
        _ if from_node != proved => format!("node {proved} speaks of itself as {from_node}"),
        Some(shared) if shared.peer.as_str() == from_node => {
            // A task that has ended drops the stream, which tells the peer enough.
            let _ = shared.inbox.send(match first {
                First::Hello(hello) => Input::Accepted { stream: channel, hello },
                First::Ask(ask) => Input::Asked { stream: channel, ask },
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
    door.refused(from, &text);
    say_and_close(channel, Message::Refuse(Refuse { code: RefuseCode::Configuration, text })).await;
}

/// The proof of the key, and the first message: only that shows that the dialer lives, and is no recording.
async fn admit(
    stream: TcpStream,
    registry: &Registry,
    proved: &mut Option<String>,
) -> Result<(Channel, Message), HelloError> {
    let keys = registry.keys.keys();
    let handshake = Channel::accept(stream, &keys, registry.node.as_str());
    let mut channel = timed(HANDSHAKE_MAX, async { Ok(handshake.await?) }).await?;
    *proved = Some(channel.peer().to_owned());
    let message = listen(&mut channel).await?;
    Ok((channel, message))
}

/// Dials a peer and tells the volume's task.
pub(super) fn dial(route: Route, inbox: mpsc::UnboundedSender<Input>) {
    tokio::spawn(async move {
        let _ = inbox.send(Input::Dialled { stream: route.reach().await });
    });
}

/// Why whoever answers at a peer's address is not the peer, or will not have us.
fn unproved(address: SocketAddr, error: &SecureError) -> Obstacle {
    match error {
        // For an operator to mend, as where the two configurations differ.
        SecureError::Rejected(rejection) => {
            Obstacle::Refused(Refuse { code: RefuseCode::Configuration, text: rejection.to_string() })
        }
        SecureError::Io { source } => Obstacle::Failed {
            text: format!(
                "{address} takes the connection and ends the handshake that proves the key: {source}"
            ),
        },
        error => Obstacle::Unreachable {
            reach: Reach::Other,
            text: format!("the program that answers at {address}: {error}"),
        },
    }
}

/// Why there is no connection to a peer's address.
fn unreachable(address: SocketAddr, error: &std::io::Error) -> Obstacle {
    use std::io::ErrorKind;
    let (reach, text) = match error.kind() {
        ErrorKind::ConnectionRefused => {
            (Reach::Refused, format!("connection refused by {address}: no daemon listens there"))
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
/// With `anew`, a peer that pauses between two dials does not. The answer is a refusal in any case: `busy` where it would have one, and else why not.
pub(super) fn probe(route: Route, volume: String, anew: bool, inbox: mpsc::UnboundedSender<Input>) {
    tokio::spawn(async move {
        let question = Ask { node: route.node.clone(), volume, rdma: false, anew };
        let asked = match route.reach().await {
            Ok(mut stream) => ask(&mut stream, question).await,
            Err(obstacle) => Err(obstacle),
        };
        let _ = inbox.send(Input::Probed { asked });
    });
}

async fn ask(stream: &mut Channel, question: Ask) -> Result<(), Obstacle> {
    let answer = match say(stream, &Message::Ask(question)).await {
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

/// Makes an RDMA connection to the peer for a session over TCP, and tells the volume's task what came of it.
pub(super) fn ask_for_rdma(
    serial: u64,
    route: Route,
    ask: Ask,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let made = negotiate::ask_rdma(&route, ask, &terms).await;
        let _ = inbox.send(Input::Made { serial, made });
    });
}

/// Makes the peer the offer that it asked for, and tells the volume's task what came of it.
pub(super) fn offer_rdma(
    serial: u64,
    mut stream: Channel,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let made = negotiate::offer_rdma(&mut stream, &terms).await;
        let made = made.map(|prepared| (stream, prepared));
        let _ = inbox.send(Input::Made { serial, made });
    });
}

/// Says that the RDMA connection is here, waits for the peer's hello, and tells the volume's task.
pub(super) fn await_hello(
    serial: u64,
    mut stream: Channel,
    prepared: Prepared,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let hello = negotiate::confirm(&mut stream).await;
        let next = hello.map(|hello| Next { stream, prepared, hello: Some(hello) });
        let _ = inbox.send(Input::CameOver { serial, next });
    });
}

/// Begins, or answers where `theirs` has come, a conversation that RDMA is there for already, and tells the volume's task.
pub(super) fn greet_over(
    serial: u64,
    mut stream: Channel,
    ours: Hello,
    theirs: Option<Box<Hello>>,
    prepared: Prepared,
    terms: Terms,
    inbox: mpsc::UnboundedSender<Input>,
) {
    tokio::spawn(async move {
        let met = negotiate::greet_over(&mut stream, ours, theirs, prepared, &terms).await;
        let _ = inbox.send(Input::Met { serial, stream, met });
    });
}

/// Says `ours`, listens for the answer, and gives both connection and answer to the volume's task.
pub(super) fn converse(serial: u64, mut stream: Channel, ours: Message, inbox: mpsc::UnboundedSender<Input>) {
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
    mut stream: Channel,
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
    mut stream: Channel,
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
pub(super) fn part(stream: Channel, refuse: Refuse) {
    tokio::spawn(say_and_close(stream, Message::Refuse(refuse)));
}

async fn say_and_close(mut stream: Channel, message: Message) {
    // The peer is told if it still listens; the connection ends either way.
    let _ = say(&mut stream, &message).await;
    stream.shut_down().await;
}

pub(super) async fn say(stream: &mut Channel, message: &Message) -> Result<(), HelloError> {
    timed(MESSAGE_MAX, async { Ok(stream.send(&hello::encode(message)).await?) }).await
}

pub(super) async fn listen(stream: &mut Channel) -> Heard {
    listen_for(stream, MESSAGE_MAX).await
}

/// The same, for a message that may take longer than most.
pub(super) async fn listen_for(stream: &mut Channel, limit: Duration) -> Heard {
    timed(limit, async { hello::decode_whole(&stream.receive().await?) }).await
}

async fn timed<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, HelloError>>,
) -> Result<T, HelloError> {
    let late = || HelloError::from(io::Error::from(io::ErrorKind::TimedOut));
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
}

//! Connections to a peer, and messages on connections: every wait has a limit.

use crate::hello::{self, HelloError, Message, Refuse, RefuseCode};
use crate::role::{Obstacle, Reach};
use crate::secure::channel::Channel;
use crate::secure::handshake::SecureError;
use crate::secure::keyring::Keyring;
use crate::task::Heard;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a peer may take for each message of a conversation: covers a durable store of its metadata, and the wait for its
/// RDMA ring.
pub(super) const MESSAGE_MAX: Duration = Duration::from_secs(5);

/// How long a dial may take; the next one follows soon.
const DIAL_MAX: Duration = Duration::from_secs(1);

/// How long the handshake may take: two short messages, and less than a millisecond's work on each side.
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// The way from this node to a peer.
#[derive(Clone)]
pub(super) struct Route {
    peer: String,
    address: SocketAddr,
    /// This node's name.
    pub(super) node: String,
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
    pub(super) async fn reach(&self) -> Result<Channel, Obstacle> {
        self.connect().await.map_err(|why| match why {
            Unreached::Connect(error) => unreachable(self.address, &error),
            Unreached::Handshake(error) => unproved(self.address, &error),
        })
    }
}

/// A peer's words as they may be shown on a terminal: one line, without its escapes.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
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
            text: format!("whoever answers at {address}: {error}"),
        },
    }
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

/// Says a last word.
pub(super) async fn part(mut stream: Channel, refuse: Refuse) {
    // The peer is told if it still listens; the connection ends either way.
    let _ = say(&mut stream, &Message::Refuse(refuse)).await;
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

pub(super) async fn timed<T>(
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

//! The handshake and its sealed messages over a TCP connection.
//!
//! Reads no byte past a message: the link's first frame may follow the last one. No time limits of its own; callers put
//! one around each call.

use super::handshake::{self, HEADER_LEN, Sealed, SecureError};
use super::key::Keys;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection whose other end has proved who it is. As acceptor, that it *lives* is proved by the first message that
/// [`Channel::receive`] gives.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    sealed: Sealed,
}

impl Channel {
    /// The dialer's part of the handshake.
    ///
    /// # Errors
    /// [`SecureError`].
    pub async fn dial(mut stream: TcpStream, keys: &Keys, me: &str, peer: &str) -> Result<Self, SecureError> {
        stream.set_nodelay(true)?;
        let (opened, opening) = handshake::open(keys, me, peer);
        stream.write_all(&opening).await?;
        let sealed = opened.finish(&read(&mut stream).await?)?;
        Ok(Self { stream, sealed })
    }

    /// The acceptor's part. Whoever is not let in is told why, where a peer of ours may be told.
    ///
    /// # Errors
    /// [`SecureError`].
    pub async fn accept(mut stream: TcpStream, keys: &Keys, me: &str) -> Result<Self, SecureError> {
        stream.set_nodelay(true)?;
        let accepted = match read(&mut stream).await {
            Ok(opening) => handshake::accept(keys, me, &opening),
            Err(error) => Err(error),
        };
        match accepted {
            Ok((answer, sealed)) => {
                stream.write_all(&answer).await?;
                Ok(Self { stream, sealed })
            }
            Err(error) => {
                if let Some(rejection) = handshake::rejection(&error) {
                    // Told if it still listens; the connection ends either way.
                    let _ = stream.write_all(&rejection).await;
                    let _ = stream.shutdown().await;
                }
                Err(error)
            }
        }
    }

    /// The node at the other end.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.sealed.peer()
    }

    /// A secret of this connection, see [`Sealed::secret`].
    #[must_use]
    pub fn secret(&self, label: &str) -> [u8; 16] {
        self.sealed.secret(label)
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`SecureError::Io`].
    pub async fn send(&mut self, message: &[u8]) -> Result<(), SecureError> {
        Ok(self.stream.write_all(&self.sealed.seal(message)).await?)
    }

    /// The next message.
    ///
    /// # Errors
    /// [`SecureError`]; the channel is of no use after one.
    pub async fn receive(&mut self) -> Result<Vec<u8>, SecureError> {
        let mut len = [0; 2];
        self.stream.read_exact(&mut len).await?;
        let mut sealed = vec![0; handshake::sealed_len(len)?];
        self.stream.read_exact(&mut sealed).await?;
        self.sealed.unseal(&sealed)
    }

    /// Says that nothing more will be sent.
    pub async fn shut_down(&mut self) {
        // Fails only where the connection is gone already.
        let _ = self.stream.shutdown().await;
    }

    /// The connection below, for whoever follows a conversation with frames and keeps the channel.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// The connection itself, for what follows the conversation: nothing that follows was read.
    #[must_use]
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }
}

/// One message of a handshake.
async fn read(stream: &mut TcpStream) -> Result<Vec<u8>, SecureError> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await?;
    let mut bytes = header.to_vec();
    bytes.resize(HEADER_LEN + handshake::body_len(&header)?, 0);
    stream.read_exact(&mut bytes[HEADER_LEN..]).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secure::handshake::Rejection;
    use crate::secure::key::{KEY_LEN, Key};
    use tokio::net::TcpListener;

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bound");
        let dialled = TcpStream::connect(listener.local_addr().expect("bound"));
        let (dialled, accepted) = tokio::join!(dialled, listener.accept());
        (dialled.expect("connected"), accepted.expect("accepted").0)
    }

    fn keys(byte: u8) -> Keys {
        Keys::one(Key::from_bytes([byte; KEY_LEN]))
    }

    #[tokio::test]
    async fn what_follows_the_conversation_is_left_in_the_stream() {
        let (dialled, accepted) = connection().await;
        let keys = keys(1);
        let (dialled, accepted) = tokio::join!(
            Channel::dial(dialled, &keys, "alpha", "beta"),
            Channel::accept(accepted, &keys, "beta")
        );
        let (mut dialled, mut accepted) = (dialled.expect("proved"), accepted.expect("proved"));
        assert_eq!((dialled.peer(), accepted.peer()), ("beta", "alpha"));
        assert_eq!(dialled.secret("x"), accepted.secret("x"));
        dialled.send(b"hello").await.expect("sent");
        dialled.stream.write_all(b"frame").await.expect("sent");
        dialled.shut_down().await;
        assert_eq!(accepted.receive().await.expect("received"), b"hello");
        let (mut stream, mut rest) = (accepted.into_stream(), Vec::new());
        stream.read_to_end(&mut rest).await.expect("read");
        assert_eq!(rest, b"frame");
    }

    #[tokio::test]
    async fn a_wrong_key_is_said_on_both_sides() {
        for (dialler, acceptor, told, found) in [
            (keys(1), keys(2), Rejection::OtherKey, "does not hold this node's key"),
            (keys(1), Keys::none(), Rejection::AcceptorHasNoKey, "this node has none"),
            (Keys::none(), keys(2), Rejection::DialerHasNoKey, "this node has one"),
        ] {
            let (dialled, accepted) = connection().await;
            let (dialled, accepted) = tokio::join!(
                Channel::dial(dialled, &dialler, "alpha", "beta"),
                Channel::accept(accepted, &acceptor, "beta")
            );
            assert!(matches!(dialled, Err(SecureError::Rejected(rejection)) if rejection == told));
            let accepted = accepted.expect_err("not proved").to_string();
            assert!(accepted.contains(found), "{accepted}");
        }
    }

    #[tokio::test]
    async fn a_release_before_this_one_is_told_apart() {
        let (mut dialled, accepted) = connection().await;
        // What release 2 begins with, and what it reads of an answer before it looks at its version.
        dialled.write_all(b"costandb\x02\x10\x00\x00\x00\x01\x02\x03\x04{}").await.expect("sent");
        let error = Channel::accept(accepted, &keys(1), "beta").await.expect_err("another release");
        assert!(matches!(error, SecureError::Version { found: 2 }), "{error}");
        let mut answer = [0; 17];
        dialled.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(answer[..9], *b"costandb\x03");
    }
}

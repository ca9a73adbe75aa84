//! Replies on their way to one NBD client.
//!
//! The connection puts replies here and has them sent as far as the socket takes them. A reply to a read is sent straight
//! from the mapping; while it is stuck half-way its range is pinned at the volume, which whoever put it here sees to, or the
//! rest of it is [copied](Outgoing::copy_out).
//!
//! Invariant: bytes leave in the order in which they were put here. Survives a medium that fails in mid-reply: the client never
//! gets a reply whose beginning promised success and whose rest is lost.

use super::end::ConnectionEnd;
use crate::units::Token;
use costandby_ffi::mapping::Span;
use costandby_ffi::net::{Piece, send_pieces};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Bytes of queued replies whose memory is kept for the next ones.
const QUEUE_LEN_KEPT: usize = 64 << 10;

/// A reply to a read that the socket took in part.
#[derive(Debug)]
struct Stuck {
    token: Token,
    rest: Rest,
    sent: usize,
}

/// What such a reply is made of.
#[derive(Debug)]
enum Rest {
    /// The mapping, whose range is pinned.
    Pinned(Span),
    /// A copy.
    Copied(Vec<u8>),
}

impl Stuck {
    fn len(&self) -> usize {
        match &self.rest {
            Rest::Pinned(span) => span.len(),
            Rest::Copied(bytes) => bytes.len(),
        }
    }

    fn is_sent(&self) -> bool {
        self.sent == self.len()
    }
}

/// A stuck reply that is sent, or given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unstuck {
    /// This token's range need not be pinned any more.
    Pinned(Token),
    /// So many copied bytes are gone.
    Copied(usize),
}

/// The replies that a connection has not sent yet.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Replies ahead of the stuck one.
    queue: Vec<u8>,
    queue_sent: usize,
    stuck: Option<Stuck>,
    /// Replies behind it.
    queue_after: Vec<u8>,
    /// Part of a reply was lost with the disk after its beginning had promised success: the client must not get it.
    torn: bool,
    /// The socket may take bytes.
    pub(super) writable: bool,
    /// Bytes sent so far.
    pub(super) sent: u64,
}

impl Outgoing {
    /// What is to be sent first.
    pub(super) fn new(queue: Vec<u8>) -> Self {
        Self {
            queue,
            queue_sent: 0,
            stuck: None,
            queue_after: Vec::new(),
            torn: false,
            writable: true,
            sent: 0,
        }
    }

    /// Whether anything is to be sent.
    pub(super) fn is_pending(&self) -> bool {
        self.queue_sent < self.queue.len() || self.stuck.is_some()
    }

    /// Whether a reply to a read is on its way.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.is_some()
    }

    /// Whether that one is a copy.
    pub(super) fn has_copy(&self) -> bool {
        matches!(&self.stuck, Some(Stuck { rest: Rest::Copied(_), .. }))
    }

    /// Bytes queued ahead of a stuck reply, sent ones included.
    pub(super) fn queue_len(&self) -> usize {
        self.queue.len()
    }

    /// For the handshake, which writes by itself.
    pub(super) fn queue_mut(&mut self) -> &mut Vec<u8> {
        &mut self.queue
    }

    /// Queues a reply.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        if self.stuck.is_some() { &mut self.queue_after } else { &mut self.queue }.extend_from_slice(bytes);
    }

    /// Queues the reply to a read: `header`, and the bytes of `span` as they stand there when they are sent.
    ///
    /// # Panics
    /// When there is one that is not sent.
    pub(super) fn put_read(&mut self, token: Token, header: &[u8], span: Span) {
        assert!(self.stuck.is_none(), "one reply at a time");
        self.queue.extend_from_slice(header);
        self.stuck = Some(Stuck { token, rest: Rest::Pinned(span), sent: 0 });
    }

    /// Sends what is queued. Returns whether any bytes went.
    ///
    /// # Errors
    /// [`ConnectionEnd`].
    pub(super) fn send(&mut self, socket: &OwnedFd) -> Result<bool, ConnectionEnd> {
        if self.torn {
            return Err(disk_failed_in_mid_reply());
        }
        let mut any = false;
        while self.writable && self.is_pending() {
            let queued = &self.queue[self.queue_sent..];
            let sent = match &self.stuck {
                Some(Stuck { rest: Rest::Pinned(span), sent, .. }) => {
                    let rest = span.sub(*sent, span.len() - sent);
                    send_pieces(socket.as_fd(), &[Piece::Bytes(queued), Piece::Span(&rest)])
                }
                Some(Stuck { rest: Rest::Copied(copy), sent, .. }) => {
                    send_pieces(socket.as_fd(), &[Piece::Bytes(queued), Piece::Bytes(&copy[*sent..])])
                }
                None => send_pieces(socket.as_fd(), &[Piece::Bytes(queued)]),
            };
            match sent {
                Ok(n) => {
                    any = true;
                    self.sent += n as u64;
                    let of_queued = n.min(self.queue.len() - self.queue_sent);
                    self.queue_sent += of_queued;
                    if let Some(stuck) = &mut self.stuck {
                        if matches!(&stuck.rest, Rest::Pinned(span) if span.is_lost()) {
                            return Err(disk_failed_in_mid_reply());
                        }
                        stuck.sent += n - of_queued;
                        if stuck.is_sent() {
                            // `take_sent` takes it off, and the volume hears of it.
                            break;
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ConnectionEnd::Io(e)),
            }
        }
        if self.queue_sent == self.queue.len() {
            self.queue.clear();
            self.queue.shrink_to(QUEUE_LEN_KEPT);
            self.queue_sent = 0;
        }
        Ok(any)
    }

    /// Takes the stuck reply off once all of it is sent.
    pub(super) fn take_sent(&mut self) -> Option<Unstuck> {
        let stuck = self.stuck.take_if(|stuck| stuck.is_sent())?;
        self.queue.append(&mut self.queue_after);
        Some(stuck.into())
    }

    /// The connection ends: takes the stuck reply off, if there is one.
    pub(super) fn give_up(&mut self) -> Option<Unstuck> {
        self.stuck.take().map(Unstuck::from)
    }

    /// Bytes of this token's stuck reply that would have to be copied, if it is made of the mapping.
    pub(super) fn pinned_len(&self, token: Token) -> Option<usize> {
        let stuck = self.stuck.as_ref().filter(|stuck| stuck.token == token)?;
        matches!(stuck.rest, Rest::Pinned(_)).then(|| stuck.len() - stuck.sent)
    }

    /// Copies the rest of a stuck reply out of the mapping, if it is made of that.
    pub(super) fn copy_out(&mut self) {
        if let Some(stuck) = &mut self.stuck
            && let Rest::Pinned(span) = &stuck.rest
        {
            let rest = span.sub(stuck.sent, span.len() - stuck.sent);
            let mut copy = vec![0; rest.len()];
            rest.read_into(&mut copy);
            self.torn |= rest.is_lost();
            (stuck.rest, stuck.sent) = (Rest::Copied(copy), 0);
        }
    }
}

impl From<Stuck> for Unstuck {
    fn from(stuck: Stuck) -> Self {
        match stuck.rest {
            Rest::Pinned(_) => Self::Pinned(stuck.token),
            Rest::Copied(copy) => Self::Copied(copy.len()),
        }
    }
}

/// A reply that promised success cannot be taken back.
fn disk_failed_in_mid_reply() -> ConnectionEnd {
    ConnectionEnd::Io(io::Error::other("the disk failed in the middle of a reply"))
}

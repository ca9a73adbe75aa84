//! The link: one-sided slot writes between two nodes, whatever carries them.
//!
//! Shaped on RDMA WRITE WITH IMMEDIATE: the sender claims space in the peer's ring (a [`Permit`]), posts a header and a
//! span of its mapped disk into it, and the peer finds the frame in its ring ([`LinkEvent::Arrived`]) until it releases
//! the slot. TCP imitates that, never the other way round. One link serves one volume; both directions are alike.
//!
//! Laws, held by one test suite for every transport:
//! - frames arrive in the order posted, messages in the order sent, and neither overtakes the other;
//! - [`LinkEvent::Sent`] says the local source may be reused as far as the *transport* is concerned: it is no ack;
//! - after [`LinkEvent::Down`] each outstanding token has been failed exactly once and nothing more is delivered;
//! - nothing is delivered twice;
//! - a peer that stops reading cannot grow our memory: `claim` returns `None`, `send` returns [`NoCredit`].
//!
//! No call here blocks.

use crate::units::Token;
use crate::wire::Header;
use costandby_ffi::mapping::Span;
use std::os::fd::BorrowedFd;

pub mod loopback;
pub mod tcp;

/// Space claimed in the peer's ring for one frame. Spent by [`Link::post`].
#[derive(Debug)]
#[must_use = "a permit that is dropped holds its ring space until the link closes"]
pub struct Permit {
    /// Bytes of ring space, header and padding included.
    pub(crate) frame_len: usize,
}

/// `send` found no credit: the peer has not read what was sent before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the peer has not read the messages sent before")]
pub struct NoCredit;

/// A place in our ring that a frame occupies until [`Link::release`].
#[derive(Debug)]
#[must_use = "a slot that is dropped holds its ring space until the link closes"]
pub struct Slot {
    /// The decoded header.
    pub header: Header,
    /// The payload in our ring; empty for frames that have none. The peer may write it again after release.
    pub payload: Span,
    /// Cumulative ring position just past this frame.
    pub(crate) ring_end: u64,
}

/// Why a link ended. A link ends once.
#[derive(Debug, thiserror::Error)]
pub enum DownReason {
    /// The peer closed the connection, or died and its kernel did.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing was heard from the peer within the peer timeout.
    #[error("nothing heard from the peer for {silent_ms} ms")]
    Silent {
        /// Milliseconds since the last byte.
        silent_ms: u64,
    },
    /// The operating system reported an error on the connection.
    #[error("connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer sent something that is not a frame.
    #[error("bad frame: {0}")]
    Frame(#[from] crate::wire::WireError),
    /// The peer broke the protocol with a well-formed frame.
    #[error("protocol violation: {0}")]
    Protocol(#[from] crate::error::Violation),
    /// We closed it.
    #[error("closed here: {0}")]
    Local(&'static str),
}

/// What a link has to tell.
#[derive(Debug)]
pub enum LinkEvent {
    /// The transport no longer reads the source posted under this token.
    Sent(Token),
    /// The source posted under this token may never have left; the link is going down.
    Failed(Token),
    /// A frame with a seq arrived and stands in our ring.
    Arrived(Slot),
    /// A frame without a payload and without a seq arrived: an ack, a flush request, a sign of life.
    Message(Header),
    /// The end. Nothing follows.
    Down(DownReason),
}

/// One end of a volume's link.
pub trait Link: Send {
    /// Claims space for a frame with `payload_len` bytes of payload, or `None` while the peer's ring has no room.
    fn claim(&mut self, payload_len: usize) -> Option<Permit>;

    /// Places a frame in the peer's ring. `span` is the payload ([`crate::wire::Kind::Write`]) and must not change until
    /// the peer has *acknowledged* it: a transport may read it again. The transport fills in `ring_returned`. Frames may
    /// wait until [`Link::kick`].
    ///
    /// # Panics
    /// When the permit is not for this payload's length.
    fn post(&mut self, permit: Permit, header: Header, span: Option<Span>, token: Token);

    /// Sends a header without payload, on credits of its own.
    ///
    /// # Errors
    /// [`NoCredit`] while the peer does not read; nothing was queued then.
    fn send(&mut self, message: Header) -> Result<(), NoCredit>;

    /// Rings the doorbell: everything posted or sent so far goes out as far as the peer can take it.
    fn kick(&mut self);

    /// Appends what happened, at most [`crate::limits::LINK_EVENTS_MAX`] events. Returns whether anything was appended.
    fn poll(&mut self, events: &mut Vec<LinkEvent>) -> bool;

    /// Gives a slot's space back to the peer. Slots must be released in order of arrival.
    fn release(&mut self, slot: Slot);

    /// What to sleep on, and whether to wait for room to send as well as for arrivals. `None` where the link wakes the
    /// reactor by other means (loopback: its waker).
    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)>;

    /// Ends the link: a later `poll` reports [`LinkEvent::Failed`] for outstanding tokens, then [`LinkEvent::Down`].
    fn close(&mut self, reason: DownReason);

    /// `"tcp"`, `"rdma"` or `"loopback"`: for status and logs.
    fn name(&self) -> &'static str;
}

/// Readiness a link waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interest {
    /// Also wake when the connection takes bytes again.
    pub writable: bool,
}

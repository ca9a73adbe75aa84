//! The link: one-sided writes into slots of the peer's ring, over any transport.
//!
//! Shaped on RDMA WRITE WITH IMMEDIATE: the sender claims space in the peer's ring (a [`Permit`]), posts a header and a
//! span of its mapped disk into it, and the peer finds the frame in its ring ([`LinkEvent::Arrived`]) until it releases
//! the slot. TCP imitates that, never the other way round. One link serves one volume; both directions are alike.
//!
//! Rules that every transport keeps; one conformance suite checks them:
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
use std::time::Duration;

mod credit;
pub mod loopback;
mod outbox;
pub mod rdma;
pub mod tcp;

pub use credit::{frame_len_max, ring_takes};

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
    /// Bytes of changes that had arrived with this frame: what `ring_returned` says once it is released.
    pub(crate) ring_end: u64,
    /// Place just past this frame in the transport's own numbering of the ring.
    pub(crate) stream_end: u64,
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
    /// The peer lives and answers nothing: see [`crate::limits::PEER_ANSWER_S_MAX`].
    #[error(
        "the peer has not acknowledged anything for {} s: does its disk hang?",
        crate::limits::PEER_ANSWER_S_MAX
    )]
    Unanswering,
    /// The operating system reported an error on the connection.
    #[error("connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer sent something that is not a frame.
    #[error("bad frame: {0}")]
    Frame(#[from] crate::wire::WireError),
    /// The peer broke the protocol with a well-formed frame.
    #[error("protocol violation: {0}")]
    Protocol(#[from] crate::error::Violation),
    /// The system could not read the source of a posted frame: the *local* disk fails, not the peer. The source's
    /// mapping is marked poisoned. The link ends because half of the frame may be out already.
    #[error("the local disk cannot be read while sending from it")]
    Medium,
    /// The RDMA connection or its device failed.
    #[error(transparent)]
    Rdma(rdma::endpoint::EndpointError),
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
    /// A change or a reply to a read ([`crate::wire::Kind::is_posted`]) arrived and stands in our ring. Its payload's checksum was not
    /// looked at yet.
    Arrived(Slot),
    /// A frame that changes nothing arrived: an ack, a flush request, a sign of life. It takes no ring space any more.
    Message(Header),
    /// The end. Nothing follows.
    Down(DownReason),
}

/// One end of a volume's link.
pub trait Link: Send {
    /// Claims space for a frame with `payload_len` bytes of payload, or `None` while the peer's ring has no room, too
    /// many frames are not reported sent yet, or the link is going down.
    ///
    /// # Panics
    /// When such a frame would never fit ([`ring_takes`]): the hello has to refuse such a ring.
    fn claim(&mut self, payload_len: usize) -> Option<Permit>;

    /// Places a frame in the peer's ring. `span` is the payload ([`crate::wire::Kind::has_payload`]) and must not change until
    /// the peer has *acknowledged* it: a transport may read it again. The transport fills in `ring_returned`. Frames may
    /// wait until [`Link::kick`].
    ///
    /// # Panics
    /// When the permit is not for this payload's length, when the header is not of a kind that is posted, or after
    /// [`LinkEvent::Down`].
    fn post(&mut self, permit: Permit, header: Header, span: Option<Span>, token: Token);

    /// Sends a header without payload, on credits of its own. While it waits to go out, a newer ack takes an older
    /// one's place, and a sign of life is dropped if anything else waits. May wait until [`Link::kick`].
    ///
    /// # Errors
    /// [`NoCredit`] while the peer does not read, or the link is going down; nothing was queued then.
    ///
    /// # Panics
    /// When the header is a change's: those are posted.
    fn send(&mut self, message: Header) -> Result<(), NoCredit>;

    /// Rings the doorbell: everything posted or sent so far goes out as far as the peer can take it.
    fn kick(&mut self);

    /// Appends what happened, at most [`crate::limits::LINK_EVENTS_MAX`] events. Returns whether anything was appended.
    /// Also sends on what an earlier `kick` could not.
    fn poll(&mut self, events: &mut Vec<LinkEvent>) -> bool;

    /// Whether `poll` has something to tell that no readiness of [`Link::arm`]'s descriptor will announce. Never sleep
    /// while it is true. Costs no system call.
    fn has_backlog(&self) -> bool;

    /// About to sleep on [`Link::arm`]'s descriptor: asks for it to become ready with the next thing to tell. False when
    /// there is something already: then poll, and do not sleep. To be called before each sleep on the descriptor, after
    /// everything else was looked at.
    fn prepare_sleep(&mut self) -> bool {
        true
    }

    /// Whether `poll` costs no system call when there is nothing. Then look each turn: the descriptor tells only what
    /// [`Link::prepare_sleep`] asked for, and a link without one tells nothing.
    fn polls_for_free(&self) -> bool {
        false
    }

    /// Bytes received since the link came up, to tell silence by: it grows with every sign of life, even while a frame
    /// is only partly here. Grows in `poll` only, so a reader that is held back by its own full ring hears nothing.
    fn received_bytes(&self) -> u64;

    /// How long the peer's *host* has been silent, as the transport itself can tell (TCP: the age of its kernel's last
    /// acknowledgement), or `None` where it cannot. A short one with a silent peer means a program that is held up, by
    /// its disk for one, and not a dead host. May cost a system call; asked only of a silent peer.
    fn host_silence(&self) -> Option<Duration> {
        None
    }

    /// Gives a slot's space back to the peer, which is told with the next header out, or soon by a sign of life of the
    /// transport's own. Costs no system call; `kick` (or a later `poll`) sends.
    ///
    /// # Panics
    /// Unless slots are released in order of arrival, each to the link it came from.
    fn release(&mut self, slot: Slot);

    /// What to sleep on (level-triggered), and for what. `None` where the link wakes the reactor by other means
    /// (loopback: its hook), and after [`LinkEvent::Down`].
    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)>;

    /// Ends the link at once, for the peer too: nothing that arrived and was not yet delivered will be. A later `poll`
    /// reports [`LinkEvent::Failed`] for outstanding tokens, then [`LinkEvent::Down`] with this reason, or with an
    /// earlier one if the link was going down already.
    fn close(&mut self, reason: DownReason);

    /// `"tcp"`, `"rdma"` or `"loopback"`: for status and logs.
    fn name(&self) -> &'static str;
}

/// Readiness a link waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interest {
    /// Wake when bytes arrive. False while the ring is full: waiting then would only spin.
    pub readable: bool,
    /// Also wake when the connection takes bytes again.
    pub writable: bool,
}

/// Checks what is posted, for every transport alike.
fn check_post(permit: &Permit, header: &Header, span: Option<&Span>) {
    assert!(header.kind.is_posted(), "only changes and replies to reads are posted");
    assert_eq!(permit.frame_len, header.frame_len(), "the permit is for another length");
    assert_eq!(
        span.map_or(0, Span::len),
        header.payload_len(),
        "the payload is not as long as the header says"
    );
}

/// How far a link is from its end. It only moves down this list.
#[derive(Debug)]
enum State {
    /// Both ways.
    Open,
    /// Nothing goes out any more; what the peer sent before is still read, at most `left` bytes.
    Draining { reason: DownReason, left: usize },
    /// Nothing comes in any more; `deliver`: whole frames that are in the ring are still told.
    Ending { reason: DownReason, deliver: bool },
    /// [`LinkEvent::Down`] was told.
    Ended,
}

impl State {
    fn is_open(&self) -> bool {
        matches!(self, Self::Open)
    }

    fn is_ended(&self) -> bool {
        matches!(self, Self::Ended)
    }

    fn receives(&self) -> bool {
        matches!(self, Self::Open | Self::Draining { .. })
    }

    fn delivers(&self) -> bool {
        matches!(self, Self::Open | Self::Draining { .. } | Self::Ending { deliver: true, .. })
    }

    /// To [`State::Ending`]. The first reason stands; delivery once stopped stays stopped.
    fn end(&mut self, reason: DownReason, deliver: bool) {
        *self = match std::mem::replace(self, Self::Ended) {
            Self::Open => Self::Ending { reason, deliver },
            Self::Draining { reason, .. } => Self::Ending { reason, deliver },
            Self::Ending { reason, deliver: before } => Self::Ending { reason, deliver: deliver && before },
            Self::Ended => Self::Ended,
        };
    }

    /// To [`State::Ended`], with the reason to tell, if the link is ending.
    fn finish(&mut self) -> Option<DownReason> {
        match std::mem::replace(self, Self::Ended) {
            Self::Ending { reason, .. } => Some(reason),
            other => {
                *self = other;
                None
            }
        }
    }
}

//! What the RDMA link asks of a queue pair: small enough that memory can play it in tests.
//!
//! An endpoint is one connected RC queue pair with what belongs to it: send and receive completions, receives that are
//! posted again as they are consumed, the registered ring the peer writes into, and the connection manager's events.
//! The real one is `verbs` beside this file; `testing::fake_rdma` plays the same rules in memory. The link is generic over
//! it, so the choice costs nothing per write.
//!
//! Memory: an endpoint keeps a clone of every [`Endpoint::Region`] that a work request names until that request is
//! complete or the queue pair is destroyed, so nothing a device may still read is ever unmapped or deregistered.

use costandby_ffi::mapping::Span;
use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

/// Bytes of a message, and of each receive buffer: one frame header.
pub(crate) use crate::wire::HEADER_LEN as MESSAGE_LEN;

/// Registers memory that writes are sent from. Cheap to clone; used from the registrar's thread.
pub trait Registrar: Clone + Send + 'static {
    /// Registered memory. Cloning shares the registration; the last clone ends it.
    type Region: Clone + Send + Debug + 'static;

    /// Registers the bytes of `span` to be sent from. Blocks: pages are brought in and pinned.
    ///
    /// # Errors
    /// `OutOfMemory` when a limit on locked memory or of the device is reached; `WouldBlock` while pages of the span are
    /// being dropped (a trim under way): try again later; others as the system says.
    fn register(&self, span: &Span) -> io::Result<Self::Region>;
}

/// Some bytes of a registered region, as the source of a write.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a, R> {
    /// Where.
    pub region: &'a R,
    /// First byte, counted from the region's beginning.
    pub offset: usize,
    /// How many.
    pub len: usize,
}

/// What a work request, or the peer's, came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// The signalled work request of this id is done, and so is every one posted before it.
    Done {
        /// As posted.
        id: u64,
    },
    /// The peer's write with this immediate stands in our ring, after everything it wrote before.
    Placed {
        /// As the peer sent it.
        immediate: u32,
    },
    /// A message arrived.
    Message {
        /// Its bytes.
        bytes: [u8; MESSAGE_LEN],
    },
    /// A message of a wrong length arrived.
    MessageLength {
        /// Bytes of it.
        found: u32,
    },
}

/// Why an endpoint is no good any more.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The peer ended the connection, or its kernel did for it.
    #[error("the peer closed the connection")]
    Closed,
    /// A work request failed.
    #[error("RDMA work request failed: {status} (status {code})")]
    WorkRequest {
        /// The standard's word for it.
        status: &'static str,
        /// `ibv_wc_status`.
        code: u32,
    },
    /// The device, its port or the queue pair reported an event that ends the connection.
    #[error("RDMA device: {0}")]
    Device(&'static str),
    /// A call failed.
    #[error("RDMA: {0}")]
    Io(#[from] io::Error),
}

/// One connected queue pair. Requests complete in the order posted. No call blocks.
pub trait Endpoint: Send {
    /// Registered memory to send from.
    type Region: Clone + Send + Debug + 'static;
    /// Registers such memory.
    type Registrar: Registrar<Region = Self::Region>;

    /// Work requests that may be posted and not done.
    fn send_len(&self) -> usize;

    /// Pieces a write may gather.
    fn pieces_max(&self) -> usize;

    /// Bytes one write may have.
    fn write_len_max(&self) -> usize;

    /// What registers memory for this endpoint.
    fn registrar(&self) -> Self::Registrar;

    /// Memory to send from that is registered and that nobody else uses, for the link's bounce buffer. Once an endpoint. It may
    /// have been another link's before, so what stands in it means nothing.
    ///
    /// # Errors
    /// Where it is made now: what the registrar or the system says.
    fn bounce(&self) -> io::Result<(Span, Self::Region)>;

    /// Queues an RDMA write of the pieces, one behind the other, to `ring_offset` in the peer's ring; with an
    /// `immediate` the peer is told ([`Completion::Placed`]). Goes out with [`Endpoint::ring_doorbell`] at the latest.
    /// Allocates nothing.
    ///
    /// # Panics
    /// When more than [`Endpoint::send_len`] requests are open or a limit above is passed: the link keeps them.
    fn write(
        &mut self,
        pieces: &[Piece<'_, Self::Region>],
        ring_offset: u64,
        immediate: Option<u32>,
        id: u64,
        signalled: bool,
    );

    /// Queues a message; its bytes are copied at once.
    ///
    /// # Panics
    /// As [`Endpoint::write`].
    fn send(&mut self, bytes: &[u8; MESSAGE_LEN], id: u64, signalled: bool);

    /// Hands all that is queued to the device.
    ///
    /// # Errors
    /// The endpoint is no good any more.
    fn ring_doorbell(&mut self) -> Result<(), EndpointError>;

    /// Takes completions, in order for each direction, and posts consumed receives again. Returns how many were taken.
    /// No system call, no allocation.
    ///
    /// # Errors
    /// The endpoint is no good any more. Of the direction that failed, everything that completed well before was returned by
    /// earlier calls; what the other one has is returned after [`Endpoint::cut`]. After that the error is the last word.
    fn poll(&mut self, completions: &mut [Completion]) -> Result<usize, EndpointError>;

    /// Looks for what no completion tells: the connection manager's and the device's events. Costs system calls; to be
    /// asked every few milliseconds and whenever [`Endpoint::descriptors`] are readable. Also takes a completion
    /// channel's event off its descriptor.
    ///
    /// # Errors
    /// The endpoint is no good any more.
    fn check(&mut self) -> Result<(), EndpointError>;

    /// Asks that a descriptor become readable with the next completion. Completions that are there already do not count:
    /// poll again after it.
    ///
    /// # Errors
    /// The endpoint is no good any more.
    fn notify(&mut self) -> Result<(), EndpointError>;

    /// What to sleep on: readable when a notified completion or an event is there. At most four.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;

    /// Cuts the connection: from the moment this returns nothing more of the peer's lands in our ring, which goes back to
    /// whom it came from, and nothing of ours leaves. Receives that completed before can still be polled, until `poll` returns an error. Idempotent.
    fn cut(&mut self);
}

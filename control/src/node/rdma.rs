//! What a conversation asks of RDMA: whether there is any, whether the volume's ring is ready, a place to be connected
//! at, a connection.
//!
//! Stands between the conversations ([`super::peers`]) and the datapath's verbs, so that choosing and falling back are
//! tested on machines without a device. The real one is [`real`], which is not in a build without the feature `rdma`;
//! then this node simply has none.
//!
//! Each volume has one of these, and with it one ring ([`RdmaSetup::ring`]), which is made in the background and then
//! serves one session after another. But for that every call blocks for a bounded time and is made from a thread that may;
//! no call makes a ring or waits until one is made. A connection is handed on as [`Prepared`],
//! to become the volume's link once both nodes are ready; one that is dropped before is closed.

#![cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "what only the real one makes"))]

use costandby_datapath::transport::Link;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What an RDMA connection has to show to be let in: a secret of the handshake of the connection on which it was offered.
/// Never shown in logs.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(pub(super) [u8; 16]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What takes the conversation's connection to a link that is all made but for it.
type Join = Box<dyn FnOnce(TcpStream) -> io::Result<Box<dyn Link>> + Send>;

/// A connected queue pair with all the memory its link needs. One that is dropped is closed, by a thread that may block:
/// taking it apart costs what making it did.
pub(super) struct Prepared(Option<Join>);

impl Prepared {
    /// All that can fail for want of anything but a descriptor has been done before.
    pub(super) fn new(join: impl FnOnce(TcpStream) -> io::Result<Box<dyn Link>> + Send + 'static) -> Self {
        Self(Some(Box::new(join)))
    }

    /// The link. `companion` is the TCP connection of the conversation, whose end is the fastest sign of a dead peer.
    /// Does not block.
    pub(super) fn into_link(mut self, companion: TcpStream) -> io::Result<Box<dyn Link>> {
        (self.0.take().expect("taken here only"))(companion)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let (Some(join), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn_blocking(move || drop(join));
        }
    }
}

/// How far a volume's ring is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RingState {
    /// It is registered, and no link uses it.
    Ready,
    /// Its memory is being brought in and registered.
    Making {
        /// How much of it is there.
        percent: u64,
    },
    /// By the link before, of which something is left.
    InUse,
}

impl std::fmt::Display for RingState {
    /// As the end of a sentence that says why there is no RDMA.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready => f.write_str("its ring is ready"),
            Self::Making { percent } => {
                write!(f, "its ring is still being made ({percent} %), and it is tried again")
            }
            Self::InUse => f.write_str("its ring is still in use by the link before, and it is tried again"),
        }
    }
}

/// Whether something that takes time is still wanted. Clones say the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    no_more: Arc<AtomicBool>,
}

impl Wanted {
    /// It is not wanted any more.
    pub(super) fn cancel(&self) {
        self.no_more.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub(super) fn still(&self) -> bool {
        !self.no_more.load(Ordering::Relaxed)
    }
}

/// RDMA on this node, for one volume. Errors are sentences for an operator: what was wrong, and what to do.
pub(super) trait RdmaSetup: Send + Sync {
    /// Whether connections from and to this address of the node are possible now.
    fn able(&self, local: IpAddr) -> Result<(), String>;

    /// How far the volume's ring is. Where there is none it begins to be made, in the background. Does not block. An error
    /// says why it could not be made, once; asked again, it is tried again.
    fn ring(&self, local: IpAddr) -> Result<RingState, String>;

    /// Begins to listen for one connection that shows `secret`.
    fn listen(&self, local: IpAddr, secret: &Secret) -> Result<Box<dyn RdmaListener>, String>;

    /// Connects to where a peer listens, showing `secret`, with the volume's ring; each step of it may take `step_max`.
    fn dial(
        &self,
        local: IpAddr,
        to: SocketAddr,
        secret: &Secret,
        step_max: Duration,
    ) -> Result<Prepared, String>;
}

/// A listener for one connection.
pub(super) trait RdmaListener: Send {
    /// Where it listens.
    fn address(&self) -> SocketAddr;

    /// The connection that showed the secret, with the volume's ring; any other is turned away. It may take `come_max` to
    /// come, and each step from there `step_max`. Ends soon after it is no longer `wanted`.
    fn accept(
        self: Box<Self>,
        come_max: Duration,
        step_max: Duration,
        wanted: &Wanted,
    ) -> Result<Prepared, String>;
}

/// Rings of a node that are made at the same time: bringing memory in keeps a processor busy, and with more at once the
/// first ones would only be ready later.
const RINGS_MADE_AT_ONCE: usize = 2;

/// What the volumes of a node share: the right to make rings.
#[derive(Clone)]
pub(super) struct Makers {
    places: Arc<tokio::sync::Semaphore>,
}

impl Default for Makers {
    fn default() -> Self {
        Self { places: Arc::new(tokio::sync::Semaphore::new(RINGS_MADE_AT_ONCE)) }
    }
}

/// This machine's RDMA for a volume, with so many bytes of its disk registered at most.
#[cfg(feature = "rdma")]
pub(super) fn setup(registered_bytes_max: u64, makers: &Makers) -> Arc<dyn RdmaSetup> {
    Arc::new(real::Verbs::new(registered_bytes_max, makers.clone()))
}

/// A build without it has none.
#[cfg(not(feature = "rdma"))]
pub(super) fn setup(_: u64, _: &Makers) -> Arc<dyn RdmaSetup> {
    Arc::new(NotBuiltIn)
}

/// A build without it.
#[cfg(not(feature = "rdma"))]
struct NotBuiltIn;

#[cfg(not(feature = "rdma"))]
impl NotBuiltIn {
    const WHY: &str = "this program was built without the feature `rdma`";
}

#[cfg(not(feature = "rdma"))]
impl RdmaSetup for NotBuiltIn {
    fn able(&self, _: IpAddr) -> Result<(), String> {
        Err(Self::WHY.to_owned())
    }

    fn ring(&self, _: IpAddr) -> Result<RingState, String> {
        Err(Self::WHY.to_owned())
    }

    fn listen(&self, _: IpAddr, _: &Secret) -> Result<Box<dyn RdmaListener>, String> {
        Err(Self::WHY.to_owned())
    }

    fn dial(&self, _: IpAddr, _: SocketAddr, _: &Secret, _: Duration) -> Result<Prepared, String> {
        Err(Self::WHY.to_owned())
    }
}

#[cfg(test)]
pub(super) mod fake;
#[cfg(feature = "rdma")]
mod real;

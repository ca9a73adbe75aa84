//! What a conversation asks of RDMA: whether there is any, a place to be connected at, a connection.
//!
//! Stands between the conversations ([`super::peers`]) and the datapath's verbs, so that choosing and falling back are
//! tested on machines without a device. The real one is [`real`], which is not in a build without the feature `rdma`;
//! then this node simply has none.
//!
//! Every call blocks for a bounded time and is made from a thread that may. A connection is handed on as [`Prepared`],
//! to become the volume's link once both nodes are ready; one that is dropped before is closed.

use costandby_datapath::transport::Link;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::hello::{RdmaOffer, Secret};

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

/// RDMA on this node. Errors are sentences for an operator: what was wrong, and what to do.
pub(super) trait RdmaSetup: Send + Sync {
    /// Whether connections from and to this address of the node are possible now.
    fn able(&self, local: IpAddr) -> Result<(), String>;

    /// Begins to listen for one connection that shows `secret`.
    fn listen(&self, local: IpAddr, secret: &Secret) -> Result<Box<dyn RdmaListener>, String>;

    /// Connects to a peer's offer within `limit`.
    fn dial(&self, local: IpAddr, offer: &RdmaOffer, limit: Duration) -> Result<Prepared, String>;
}

/// A listener for one connection.
pub(super) trait RdmaListener: Send {
    /// Where it listens.
    fn address(&self) -> SocketAddr;

    /// The connection that showed the secret; any other is turned away. Ends within `limit`.
    fn accept(self: Box<Self>, limit: Duration) -> Result<Prepared, String>;
}

/// This machine's RDMA, with so many bytes of a disk registered at most.
#[cfg(feature = "rdma")]
pub(super) fn setup(windows_limit_bytes: u64) -> Arc<dyn RdmaSetup> {
    Arc::new(real::Verbs { windows_limit_bytes })
}

/// A build without it has none.
#[cfg(not(feature = "rdma"))]
pub(super) fn setup(_: u64) -> Arc<dyn RdmaSetup> {
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

    fn listen(&self, _: IpAddr, _: &Secret) -> Result<Box<dyn RdmaListener>, String> {
        Err(Self::WHY.to_owned())
    }

    fn dial(&self, _: IpAddr, _: &RdmaOffer, _: Duration) -> Result<Prepared, String> {
        Err(Self::WHY.to_owned())
    }
}

#[cfg(test)]
pub(super) mod fake;
#[cfg(feature = "rdma")]
mod real;

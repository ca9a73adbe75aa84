//! RDMA as this machine has it: the datapath's verbs behind [`super::RdmaSetup`].

use super::{Prepared, RdmaListener, RdmaSetup};
use crate::hello::{RdmaOffer, Secret};
use costandby_datapath::limits::{PAYLOAD_LEN_MAX, RDMA_RING_LEN};
use costandby_datapath::transport::rdma::setup::{self, Connected, Listening};
use costandby_datapath::transport::rdma::{Joined, RdmaLink, private};
use costandby_datapath::transport::{Link, ring_takes};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// This machine's devices.
pub(super) struct Verbs {
    /// Bytes of a disk that a link may register.
    pub(super) windows_limit_bytes: u64,
}

fn ring_len() -> usize {
    usize::try_from(RDMA_RING_LEN).expect("64-bit")
}

fn secret(secret: &Secret) -> private::Secret {
    private::Secret(secret.0)
}

/// The link, but for its companion. Made while the peer can still be told that there will be none.
fn prepared(connected: Connected, windows_limit_bytes: u64) -> Result<Prepared, String> {
    let Connected { endpoint, ring, receives, peer_ring_len, peer_receives } = connected;
    if !ring_takes(peer_ring_len, PAYLOAD_LEN_MAX as usize) {
        return Err(format!("the peer announces a ring of {peer_ring_len} bytes, which cannot be used"));
    }
    let joined =
        Joined { ring, receives, peer_ring_len, peer_receives, companion: None, windows_limit_bytes };
    let mut link =
        RdmaLink::new(endpoint, joined).map_err(|error| format!("making the RDMA link: {error}"))?;
    Ok(Prepared::new(move |companion: TcpStream| -> io::Result<Box<dyn Link>> {
        link.accompany(companion)?;
        Ok(Box::new(link))
    }))
}

impl RdmaSetup for Verbs {
    fn able(&self, local: IpAddr) -> Result<(), String> {
        setup::able(local).map_err(|error| error.to_string())
    }

    fn listen(&self, local: IpAddr, shown: &Secret) -> Result<Box<dyn RdmaListener>, String> {
        let listening = Listening::bind(local, secret(shown)).map_err(|error| error.to_string())?;
        let windows_limit_bytes = self.windows_limit_bytes;
        Ok(Box::new(VerbsListener { listening, windows_limit_bytes }))
    }

    fn dial(&self, local: IpAddr, offer: &RdmaOffer, limit: Duration) -> Result<Prepared, String> {
        let deadline = Instant::now() + limit;
        let connected = setup::dial(local, offer.address, secret(&offer.secret), ring_len(), deadline);
        prepared(connected.map_err(|error| error.to_string())?, self.windows_limit_bytes)
    }
}

struct VerbsListener {
    listening: Listening,
    windows_limit_bytes: u64,
}

impl RdmaListener for VerbsListener {
    fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    fn accept(self: Box<Self>, limit: Duration) -> Result<Prepared, String> {
        let connected = self.listening.accept(ring_len(), Instant::now() + limit);
        prepared(connected.map_err(|error| error.to_string())?, self.windows_limit_bytes)
    }
}

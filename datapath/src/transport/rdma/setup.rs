//! Making the connection that a link over RDMA stands on.
//!
//! After the hellos: one node listens for one connection, on a port of the system's choice, and tells the peer where and
//! with which secret; the other dials. Each makes a ring and registers it before it introduces itself
//! ([`super::private`]), since address and key go along. What comes out is for [`super::RdmaLink`].
//!
//! Invariants: nobody is connected without the secret, and nothing is registered or opened for who does not show it; a
//! listener serves one connection; a connection that is not wanted after all is closed by dropping what was made.
//!
//! Failures survived: strangers on the port (turned away, counted), peers that say nonsense, that vanish half way, or
//! that never come (a deadline), a machine without RDMA (an error that says what is missing).
//!
//! Everything here blocks, until its deadline at most and for registering the ring (tens of milliseconds).

use super::private::{Introduction, PrivateError, Secret};
use super::verbs::VerbsEndpoint;
use crate::limits::{RDMA_ACK_TIMEOUT, RDMA_RECEIVES_LEN, RDMA_REFUSED_MAX, RDMA_SENDS_LEN};
use costandby_ffi::mapping::Mapping;
use costandby_ffi::verbs::{
    Domain, Established, Listener, Opened, Region, Resolved, Settings, Target, VerbsError,
};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// RDMA does not work here, or not to there.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// The peer accepted, and is not what it should be.
    #[error("{peer} accepted the RDMA connection, but: {source}")]
    Introduction {
        /// Who.
        peer: SocketAddr,
        /// What was wrong.
        source: PrivateError,
    },
    /// The peer accepted without showing the secret.
    #[error("{peer} accepted the RDMA connection without the secret agreed with it: is it another node?")]
    Secret {
        /// Who.
        peer: SocketAddr,
    },
    /// No peer came, or none with the secret.
    #[error("the peer did not connect by RDMA in time{}", Refused(*refused))]
    NobodyCame {
        /// Connections turned away meanwhile.
        refused: u32,
    },
    /// Too many came without it.
    #[error("gave up listening for the peer{}", Refused(*refused))]
    TooManyStrangers {
        /// Connections turned away.
        refused: u32,
    },
    /// There is no memory for a ring.
    #[error("no memory for a ring of {len} bytes: {source}")]
    Ring {
        /// Bytes of it.
        len: usize,
        /// What the system said.
        source: io::Error,
    },
}

/// The end of a sentence.
struct Refused(u32);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, "; {count} other connections were turned away, which did not show its secret"),
        }
    }
}

/// A connection, and what a link needs to know of it.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub endpoint: VerbsEndpoint,
    /// Our ring, registered for the peer.
    pub ring: Arc<Mapping>,
    /// Receives kept posted.
    pub receives: u32,
    /// Bytes of the peer's ring, one lap.
    pub peer_ring_len: usize,
    /// Receives the peer keeps posted.
    pub peer_receives: u32,
}

/// Whether connections from and to this address of the node are possible now.
///
/// # Errors
/// What is missing.
pub fn able(local: IpAddr) -> Result<(), SetupError> {
    Listener::bind(SocketAddr::new(local, 0))?;
    Ok(())
}

/// Sizes of a queue pair. Devices that offer less than we would like get what they offer.
fn settings(domain: &Domain) -> Result<Settings, VerbsError> {
    let limits = domain.limits()?;
    let sends = u32::try_from(RDMA_SENDS_LEN).unwrap_or(u32::MAX);
    Ok(Settings {
        send_len: sends.min(limits.work_requests).min(limits.completions / 2),
        receive_len: RDMA_RECEIVES_LEN.min(limits.work_requests).min(limits.completions / 2),
        ack_timeout: RDMA_ACK_TIMEOUT,
    })
}

/// This node's half: a ring, registered, and the words that tell of it.
struct Own {
    ring: Arc<Mapping>,
    region: Region,
    settings: Settings,
    secret: Secret,
}

impl Own {
    fn new(domain: &Domain, secret: Secret, ring_len: usize) -> Result<Self, SetupError> {
        let ring = Mapping::ring(ring_len).map_err(|source| SetupError::Ring { len: ring_len, source })?;
        let region = Region::ring(domain, &ring.span(0, ring.len()))?;
        Ok(Self { ring, region, settings: settings(domain)?, secret })
    }

    fn introduction(&self) -> Introduction {
        Introduction {
            secret: self.secret,
            ring_address: self.region.address(),
            ring_rkey: self.region.remote_key(),
            ring_len: (self.ring.len() / 2) as u64,
            receives: self.settings.receive_len,
        }
    }

    fn connected(self, established: Established, peer: &Introduction) -> Result<Connected, SetupError> {
        let peer_ring = Target { address: peer.ring_address, key: peer.ring_rkey };
        let endpoint = VerbsEndpoint::new(established.queue_pair, self.region, peer_ring)?;
        Ok(Connected {
            endpoint,
            ring: self.ring,
            receives: self.settings.receive_len,
            peer_ring_len: usize::try_from(peer.ring_len).expect("bounded by RDMA_RING_LEN_MAX"),
            peer_receives: peer.receives,
        })
    }
}

/// Connects to `peer`, from `local`, with a ring of `ring_len` bytes of our own.
///
/// # Errors
/// See [`SetupError`]; [`VerbsError::Rejected`] where the peer does not know the secret.
pub fn dial(
    local: IpAddr,
    peer: SocketAddr,
    secret: Secret,
    ring_len: usize,
    deadline: Instant,
) -> Result<Connected, SetupError> {
    let local = Some(local).filter(|local| !local.is_unspecified());
    let resolved = Resolved::new(local, peer, deadline)?;
    let own = Own::new(resolved.domain(), secret, ring_len)?;
    let established = resolved.connect(&own.settings, &own.introduction().encode(), deadline)?;
    let introduction = Introduction::decode(&established.private);
    let introduction = introduction.map_err(|source| SetupError::Introduction { peer, source })?;
    if !introduction.secret.matches(&secret) {
        return Err(SetupError::Secret { peer });
    }
    own.connected(established, &introduction)
}

/// Waits for one connection, from who shows the secret.
#[derive(Debug)]
pub struct Listening {
    listener: Listener,
    secret: Secret,
}

impl Listening {
    /// Listens on an address of this node's, on a port of the system's choice.
    ///
    /// # Errors
    /// What is missing: [`VerbsError::NoDeviceAt`] and the like.
    pub fn bind(local: IpAddr, secret: Secret) -> Result<Self, SetupError> {
        let listener = Listener::bind(SocketAddr::new(local, 0))?;
        Ok(Self { listener, secret })
    }

    /// Where.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.local_address()
    }

    /// Accepts who shows the secret, with a ring of `ring_len` bytes of our own, and turns all others away.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn accept(self, ring_len: usize, deadline: Instant) -> Result<Connected, SetupError> {
        for refused in 0..RDMA_REFUSED_MAX {
            let Some(request) = self.listener.request(deadline)? else {
                return Err(SetupError::NobodyCame { refused });
            };
            let why = match Introduction::decode(request.private()) {
                Ok(introduction) if introduction.secret.matches(&self.secret) => {
                    return self.welcome(request.open()?, &introduction, ring_len, deadline);
                }
                Ok(_) => "it does not show the secret".to_owned(),
                Err(error) => error.to_string(),
            };
            tracing::warn!(peer = %request.peer(), why, "RDMA connection turned away");
            request.reject();
        }
        Err(SetupError::TooManyStrangers { refused: RDMA_REFUSED_MAX })
    }

    fn welcome(
        &self,
        request: Opened,
        peer: &Introduction,
        ring_len: usize,
        deadline: Instant,
    ) -> Result<Connected, SetupError> {
        let own = Own::new(request.domain(), self.secret, ring_len)?;
        let established = request.accept(&own.settings, &own.introduction().encode(), deadline)?;
        own.connected(established, peer)
    }
}

#[cfg(test)]
mod tests;

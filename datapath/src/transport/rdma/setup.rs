//! Makes the RDMA connection for a link.
//!
//! After the hellos: one node listens for one connection, on a port of the system's choice, and tells the peer where and
//! with which secret; the other dials. Each brings a ring that is registered already ([`super::ring`]) and introduces
//! itself with its address and key ([`super::private_data`]). What comes out is for [`super::RdmaLink`].
//!
//! Invariants: nobody is connected without the secret, and nothing is opened for who does not show it; a listener serves
//! one connection; a connection that is not wanted after all is closed by dropping what was made, and its ring is given
//! back once its queue pair is gone.
//!
//! Failures survived: strangers on the port (turned away, counted), peers that say nonsense, that vanish half way, or
//! that never come (a deadline), a device that was replaced by another, a machine without RDMA (an error that says what is
//! missing).
//!
//! Everything here blocks, but each step only as long as its caller says: steps that are done are progress, and what
//! comes next has its time anew. Nothing here brings memory in or registers any.

use super::private_data::{Introduction, Secret};
use super::ring::{Ring, RingLease};
use super::verbs::VerbsEndpoint;
use crate::limits::{RDMA_ACK_TIMEOUT, RDMA_RECEIVES_LEN, RDMA_REFUSED_MAX, RDMA_SENDS_LEN};
use costandby_ffi::mapping::Mapping;
use costandby_ffi::verbs::{Domain, Established, Listener, Request, Resolved, Settings, Target, VerbsError};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) mod error;

pub use error::SetupError;

/// How often somebody who waits for a connection looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

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
    listener(local).map(drop)
}

/// The same, by a listener that also tells which device has the address ([`Ring::is_of`]).
///
/// # Errors
/// What is missing.
pub fn listener(local: IpAddr) -> Result<Listener, SetupError> {
    Ok(Listener::bind(SocketAddr::new(local, 0))?)
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

/// This node's half: a ring, and the words that tell of it.
struct Own {
    ring: RingLease,
    settings: Settings,
    secret: Secret,
}

impl Own {
    fn new(ring: RingLease, secret: Secret) -> Result<Self, SetupError> {
        let settings = settings(ring.ring().domain())?;
        Ok(Self { ring, settings, secret })
    }

    fn introduction(&self) -> Introduction {
        let region = self.ring.ring().region();
        Introduction {
            secret: self.secret,
            ring_address: region.address(),
            ring_rkey: region.remote_key(),
            ring_len: self.ring.ring().len() as u64,
            receives: self.settings.receive_len,
        }
    }

    fn connected(self, established: Established, peer: &Introduction) -> Result<Connected, SetupError> {
        let peer_ring = Target { address: peer.ring_address, key: peer.ring_rkey };
        let ring = Arc::clone(self.ring.ring().mapping());
        let endpoint = VerbsEndpoint::new(established.queue_pair, self.ring, peer_ring)?;
        Ok(Connected {
            endpoint,
            ring,
            receives: self.settings.receive_len,
            peer_ring_len: usize::try_from(peer.ring_len).expect("bounded by RDMA_RING_LEN_MAX"),
            peer_receives: peer.receives,
        })
    }

    /// Gives the ring up where it is of no use for the connection, and hands the error on.
    fn fail(self, error: VerbsError) -> SetupError {
        if matches!(error, VerbsError::OtherDevice { .. }) {
            self.ring.discard();
        }
        error.into()
    }
}

/// Connects to `peer`, from `local`, with this ring of our own. Finding the way and being accepted may take `step_max`
/// each.
///
/// # Errors
/// See [`SetupError`]; [`VerbsError::Rejected`] where the peer does not know the secret.
pub fn dial(
    local: IpAddr,
    peer: SocketAddr,
    secret: Secret,
    ring: RingLease,
    step_max: Duration,
) -> Result<Connected, SetupError> {
    let local = Some(local).filter(|local| !local.is_unspecified());
    let own = Own::new(ring, secret)?;
    let found = Resolved::within(own.ring.ring().domain(), local, peer, Instant::now() + step_max);
    let resolved = match found {
        Ok(resolved) => resolved,
        Err(error) => return Err(own.fail(error)),
    };
    let deadline = Instant::now() + step_max;
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
        Ok(Self { listener: listener(local)?, secret })
    }

    /// Where.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.local_address()
    }

    /// Waits for who shows the secret, turns all others away, and accepts it with the ring that `lend` gives then. It may
    /// take `come_max` to come, and accepting it `step_max`. Ends soon after `wanted` says no.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn accept(
        self,
        come_max: Duration,
        step_max: Duration,
        wanted: impl Fn() -> bool,
        lend: impl FnOnce() -> Option<RingLease>,
    ) -> Result<Connected, SetupError> {
        let until = Instant::now() + come_max;
        let mut refused = 0;
        while refused < RDMA_REFUSED_MAX {
            let Some(request) = self.listener.request(until.min(Instant::now() + LOOK))? else {
                match (wanted(), Instant::now() >= until) {
                    (false, _) => return Err(SetupError::GivenUp),
                    (true, true) => return Err(SetupError::NobodyCame { refused }),
                    (true, false) => continue,
                }
            };
            let why = match Introduction::decode(request.private()) {
                Ok(introduction) if introduction.secret.matches(&self.secret) => {
                    let ring = lend().ok_or(SetupError::RingInUse)?;
                    return self.welcome(request, &introduction, ring, Instant::now() + step_max);
                }
                Ok(_) => "it does not show the secret".to_owned(),
                Err(error) => error.to_string(),
            };
            tracing::warn!(peer = %request.peer(), why, "RDMA connection turned away");
            request.reject();
            refused += 1;
        }
        Err(SetupError::TooManyStrangers { refused })
    }

    fn welcome(
        &self,
        request: Request,
        peer: &Introduction,
        ring: RingLease,
        deadline: Instant,
    ) -> Result<Connected, SetupError> {
        let own = Own::new(ring, self.secret)?;
        let opened = match request.open_within(own.ring.ring().domain()) {
            Ok(opened) => opened,
            Err(error) => return Err(own.fail(error)),
        };
        let established = opened.accept(&own.settings, &own.introduction().encode(), deadline)?;
        own.connected(established, peer)
    }
}

/// Both ends of a connection of this process with itself, each with a ring of its own: for tests and measurements.
///
/// # Errors
/// See [`SetupError`].
///
/// # Panics
/// When the thread of one end does.
#[doc(hidden)]
pub fn both_ends(address: IpAddr, ring_len: usize, step_max: Duration) -> Result<[Connected; 2], SetupError> {
    let secret = Secret([0x5a; 16]);
    let ring = || Ring::new(address, ring_len, |_| true).map(RingLease::of);
    let (ours, theirs) = (ring()?, ring()?);
    let listening = Listening::bind(address, secret)?;
    let peer = listening.address();
    std::thread::scope(|scope| {
        let accept = || listening.accept(step_max, step_max, || true, || Some(theirs));
        let far = scope.spawn(accept);
        let near = dial(address, peer, secret, ours, step_max);
        Ok([near?, far.join().expect("it does not panic")?])
    })
}

#[cfg(test)]
mod tests;

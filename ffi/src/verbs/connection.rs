//! Making connections: who listens, who connects, and what they tell each other meanwhile.
//!
//! One end binds a [`Listener`], takes a [`Request`] and accepts or rejects it; the other resolves the way
//! ([`Resolved`]) and connects. Both have a ring registered in the connection's [`Domain`] before, since its address and
//! key travel in the private data: in one made for the connection, or in one of an earlier day that is free. Nothing here
//! is on the way of a write.
//!
//! Every step that waits has a deadline, and every way to fail an error of its own. The queue pair is created on a device
//! context of our own and not by the connection manager's library, which would put every connection of the process on
//! one; hence its states are changed here, with what the manager says they need.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use super::PRIVATE_LEN_MAX;
use super::channel::{Channel, Event, Identifier, no_device_at, to_storage};
use super::connected::Connection;
use super::context::{Context, Domain};
use super::error::VerbsError;
use super::queue_pair::{QueuePair, Settings};
use super::sys;

/// Requests that may wait to be taken by [`Listener::request`]: both nodes' volumes reconnecting at once.
const BACKLOG: i32 = 128;

/// Times a packet is sent again. One less than the field has room for: soft-RoCE takes 7 for "for ever", and a host that
/// lost its power would never be noticed.
const RETRIES: u8 = 6;

/// Times a packet is sent again that found no receive posted: credits see to it that one always is, so this only bounds
/// how long a peer that breaks the rules is humoured. 7 would be for ever.
const RECEIVER_NOT_READY_RETRIES: u8 = 6;

/// How long the sender waits then: 0.64 ms in the standard's table; 0 would be 655 ms.
const RECEIVER_NOT_READY_TIMER: u8 = 12;

/// `IB_CM_REJ_INVALID_SERVICE_ID`: nobody listens on that port.
const REJECT_NO_SERVICE: i32 = 8;

/// A connection and what the peer said when it was made.
#[derive(Debug)]
pub struct Established {
    /// Connected; receives are posted.
    pub queue_pair: QueuePair,
    /// The peer's private data, with what the connection manager pads them to.
    pub private: Vec<u8>,
}

/// Waits for connection requests on one address.
pub struct Listener {
    identifier: Identifier,
    address: SocketAddr,
}

impl Listener {
    /// Listens on `address`, which an RDMA device must have; port 0 lets the system choose.
    ///
    /// # Errors
    /// [`VerbsError::NoDeviceAt`], or what is missing on this machine.
    pub fn bind(address: SocketAddr) -> Result<Self, VerbsError> {
        let identifier = Identifier::new()?;
        let mut storage = to_storage(address);
        let manager = identifier.manager();
        // SAFETY: the identifier is alive; the call only reads the address.
        if unsafe { manager.rdma_bind_addr(identifier.as_ptr(), (&raw mut storage).cast()) } != 0 {
            return Err(no_device_at("rdma_bind_addr", address.ip()));
        }
        // SAFETY: the identifier is alive and bound.
        if unsafe { manager.rdma_listen(identifier.as_ptr(), BACKLOG) } != 0 {
            return Err(no_device_at("rdma_listen", address.ip()));
        }
        if !address.ip().is_unspecified() && identifier.device().is_none() {
            return Err(VerbsError::NoDeviceAt { address: address.ip() });
        }
        let address = identifier.local_address().unwrap_or(address);
        Ok(Self { identifier, address })
    }

    /// Whether its address is on the device of `domain`; of every address, all devices are.
    #[must_use]
    pub fn is_on(&self, domain: &Domain) -> bool {
        self.identifier.device().is_none_or(|device| domain.is_on(device))
    }

    /// Where it listens, port included.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// The next request; `None` when the deadline passes first. Blocks; with a deadline in the past it only looks.
    ///
    /// # Errors
    /// [`VerbsError::Removed`] with the device; otherwise what a call says. A peer cannot cause one.
    pub fn request(&self, deadline: Instant) -> Result<Option<Request>, VerbsError> {
        while let Some(event) = self.identifier.channel().wait(deadline)? {
            match event.kind {
                sys::RDMA_CM_EVENT_CONNECT_REQUEST => {
                    if let Some(request) = Request::new(event) {
                        return Ok(Some(request));
                    }
                }
                sys::RDMA_CM_EVENT_DEVICE_REMOVAL => return Err(VerbsError::Removed),
                _ => {}
            }
        }
        Ok(None)
    }
}

impl AsFd for Listener {
    /// Readable when a request is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.identifier.channel().events()
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Somebody wants to connect. Dropped, it is turned down. Costs no device anything until it is opened.
pub struct Request {
    private: Vec<u8>,
    peer: SocketAddr,
    /// `None` once opened.
    identifier: Option<Identifier>,
}

/// A request that is wanted: its device is open, memory can be registered. Dropped, it is turned down.
pub struct Opened {
    private: Vec<u8>,
    /// `None` once answered.
    half: Option<Half>,
}

/// A connection in the making: an identifier bound to a device, and a domain on it.
struct Half {
    connection: Connection,
    domain: Domain,
    peer: SocketAddr,
}

impl Half {
    /// `within`: a domain that is there already, or one for this connection alone.
    fn new(identifier: Identifier, peer: SocketAddr, within: Option<&Domain>) -> Result<Self, VerbsError> {
        let open = |device| match within {
            None => Domain::new(Context::open(device)?),
            Some(domain) if domain.is_on(device) => Ok(domain.clone()),
            Some(domain) => Err(VerbsError::OtherDevice { device: domain.device_name() }),
        };
        let domain = match identifier.device().ok_or(VerbsError::NoDevice).and_then(open) {
            Ok(domain) => domain,
            Err(error) => {
                identifier.reject();
                return Err(error);
            }
        };
        Ok(Self { connection: Connection::new(identifier), domain, peer })
    }

    fn raw(&self) -> *mut sys::rdma_cm_id {
        self.connection.identifier().as_ptr()
    }

    fn manager(&self) -> &'static sys::Manager {
        self.connection.identifier().manager()
    }

    fn channel(&self) -> &Channel {
        self.connection.identifier().channel()
    }

    /// A queue pair that may already be written to, as far as it goes before the peer's answer.
    fn queue_pair(&self, settings: &Settings) -> Result<QueuePair, VerbsError> {
        let mut queue_pair = QueuePair::new(&self.domain, settings, self.connection.identifier().port())?;
        self.change(&mut queue_pair, sys::IBV_QPS_INIT, settings)?;
        queue_pair.post_receives()?;
        Ok(queue_pair)
    }

    /// To ready, both ways.
    fn make_ready(&self, queue_pair: &mut QueuePair, settings: &Settings) -> Result<(), VerbsError> {
        // INIT once more: what the connection manager knew before the peer's word was provisional.
        for state in [sys::IBV_QPS_INIT, sys::IBV_QPS_RTR, sys::IBV_QPS_RTS] {
            self.change(queue_pair, state, settings)?;
        }
        Ok(())
    }

    /// One change of state, with the attributes that the connection manager has for it and those that are ours to say.
    fn change(&self, queue_pair: &mut QueuePair, to: u32, settings: &Settings) -> Result<(), VerbsError> {
        // SAFETY: zeroes are valid for this plain C structure.
        let mut attributes: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = to;
        let mut which = 0;
        let manager = self.manager();
        // SAFETY: the identifier is alive; the call writes the two structures it is given.
        if unsafe { manager.rdma_init_qp_attr(self.raw(), &raw mut attributes, &raw mut which) } != 0 {
            return Err(VerbsError::last("rdma_init_qp_attr"));
        }
        let has = |bit: u32| which.cast_unsigned() & bit != 0;
        if has(sys::IBV_QP_ACCESS_FLAGS) {
            attributes.qp_access_flags = sys::IBV_ACCESS_REMOTE_WRITE;
        }
        if has(sys::IBV_QP_MIN_RNR_TIMER) {
            attributes.min_rnr_timer = RECEIVER_NOT_READY_TIMER;
        }
        if has(sys::IBV_QP_TIMEOUT) {
            attributes.timeout = settings.ack_timeout;
        }
        if has(sys::IBV_QP_RETRY_CNT) {
            attributes.retry_cnt = RETRIES;
        }
        if has(sys::IBV_QP_RNR_RETRY) {
            attributes.rnr_retry = RECEIVER_NOT_READY_RETRIES;
        }
        // Old kernels report bits of their own here that the call below would refuse.
        queue_pair.modify(&mut attributes, which & !OLD_ROCE_BITS)
    }

    /// Waits for one of `kinds`; what ends the attempt instead is an error, and what does neither is passed over.
    fn wait(&self, kinds: &[u32], deadline: Instant, step: &'static str) -> Result<Event, VerbsError> {
        wait(self.channel(), kinds, self.peer, deadline, step)
    }
}

/// Bits 21 to 24 of the attribute mask, which kernels used among themselves for RoCE.
const OLD_ROCE_BITS: i32 = 0x1e0_0000;

fn wait(
    channel: &Channel,
    kinds: &[u32],
    peer: SocketAddr,
    deadline: Instant,
    step: &'static str,
) -> Result<Event, VerbsError> {
    loop {
        let Some(event) = channel.wait(deadline)? else { return Err(VerbsError::Timeout { step }) };
        if kinds.contains(&event.kind) && event.status == 0 {
            return Ok(event);
        }
        // The connection manager's own answers are negative error numbers; a peer's rejection is a positive reason.
        let cause = std::io::Error::from_raw_os_error(event.status.saturating_neg());
        match event.kind {
            sys::RDMA_CM_EVENT_REJECTED => {
                let nobody = [REJECT_NO_SERVICE, -libc::ECONNREFUSED].contains(&event.status);
                let rejected = VerbsError::Rejected { peer, reason: event.status };
                return Err(if nobody { VerbsError::Refused { peer } } else { rejected });
            }
            sys::RDMA_CM_EVENT_ADDR_ERROR
            | sys::RDMA_CM_EVENT_ROUTE_ERROR
            | sys::RDMA_CM_EVENT_CONNECT_ERROR
            | sys::RDMA_CM_EVENT_UNREACHABLE => {
                return Err(VerbsError::Unreachable { peer, step, cause });
            }
            sys::RDMA_CM_EVENT_DISCONNECTED => return Err(VerbsError::Closed { step }),
            sys::RDMA_CM_EVENT_DEVICE_REMOVAL => return Err(VerbsError::Removed),
            _ => {}
        }
    }
}

/// What both ends agree on; neither ever reads from the other.
fn parameters(queue_pair: &QueuePair, private: &[u8]) -> sys::rdma_conn_param {
    assert!(private.len() <= PRIVATE_LEN_MAX, "{} bytes of private data", private.len());
    sys::rdma_conn_param {
        private_data: private.as_ptr().cast(),
        private_data_len: u8::try_from(private.len()).expect("at most PRIVATE_LEN_MAX"),
        responder_resources: 0,
        initiator_depth: 0,
        flow_control: 0,
        retry_count: RETRIES,
        rnr_retry_count: RECEIVER_NOT_READY_RETRIES,
        srq: 0,
        qp_num: queue_pair.number(),
    }
}

impl Request {
    /// `None` when the peer has given up, or the system is out of descriptors: then it is told no.
    fn new(event: Event) -> Option<Self> {
        let identifier = Identifier::of_request(event.request).ok()?;
        let peer = identifier.peer_address()?;
        Some(Self { private: event.private, peer, identifier: Some(identifier) })
    }

    /// What the peer sent along, with what the connection manager pads it to.
    #[must_use]
    pub fn private(&self) -> &[u8] {
        &self.private
    }

    /// Who asks.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Turns it down; the peer sees [`VerbsError::Rejected`].
    pub fn reject(self) {
        drop(self);
    }

    /// Opens the device for it.
    ///
    /// # Errors
    /// The device cannot be opened; the peer is told no.
    pub fn open(self) -> Result<Opened, VerbsError> {
        self.opened(None)
    }

    /// The same with a domain that is there already.
    ///
    /// # Errors
    /// [`VerbsError::OtherDevice`]; the peer is told no.
    pub fn open_within(self, domain: &Domain) -> Result<Opened, VerbsError> {
        self.opened(Some(domain))
    }

    fn opened(mut self, within: Option<&Domain>) -> Result<Opened, VerbsError> {
        let identifier = self.identifier.take().expect("taken here only");
        let private = std::mem::take(&mut self.private);
        Ok(Opened { private, half: Some(Half::new(identifier, self.peer, within)?) })
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(identifier) = self.identifier.take() {
            identifier.reject();
        }
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Opened {
    fn half(&self) -> &Half {
        self.half.as_ref().expect("taken only with the answer")
    }

    /// Where to register what the peer shall write into.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.half().domain
    }

    /// Connects, and tells the peer `private`. Blocks until it is up.
    ///
    /// # Errors
    /// [`VerbsError::Timeout`], [`VerbsError::Closed`] if the peer gave up, [`VerbsError::Limit`], others as a call says.
    pub fn accept(
        mut self,
        settings: &Settings,
        private: &[u8],
        deadline: Instant,
    ) -> Result<Established, VerbsError> {
        let mut queue_pair = self.half().queue_pair(settings)?;
        self.half().make_ready(&mut queue_pair, settings)?;
        let mut parameters = parameters(&queue_pair, private);
        let half = self.half();
        // SAFETY: identifier and private data live through the call, which copies what it sends.
        if unsafe { half.manager().rdma_accept(half.raw(), &raw mut parameters) } != 0 {
            return Err(VerbsError::last("rdma_accept"));
        }
        // From here on it is the connection's end, not a rejection, that turns it down.
        let half = self.half.take().expect("not taken before");
        half.wait(&[sys::RDMA_CM_EVENT_ESTABLISHED], deadline, "accepting an RDMA connection")?;
        queue_pair.own(half.connection);
        Ok(Established { queue_pair, private: std::mem::take(&mut self.private) })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(half) = self.half.take() {
            half.connection.identifier().reject();
        }
    }
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened")
            .field("peer", &self.half.as_ref().map(|half| half.peer))
            .finish_non_exhaustive()
    }
}

/// A way to a peer was found, and the device that leads there.
pub struct Resolved {
    half: Half,
}

impl Resolved {
    /// Finds the way to `peer`, from `local` if given. Blocks.
    ///
    /// # Errors
    /// [`VerbsError::NoDeviceAt`] for a local address without RDMA, [`VerbsError::Unreachable`],
    /// [`VerbsError::Timeout`], or what is missing on this machine.
    pub fn new(local: Option<IpAddr>, peer: SocketAddr, deadline: Instant) -> Result<Self, VerbsError> {
        Self::find(local, peer, None, deadline)
    }

    /// The same with a domain that is there already. Blocks.
    ///
    /// # Errors
    /// As [`Resolved::new`], and [`VerbsError::OtherDevice`] where another device leads to the peer.
    pub fn within(
        domain: &Domain,
        local: Option<IpAddr>,
        peer: SocketAddr,
        deadline: Instant,
    ) -> Result<Self, VerbsError> {
        Self::find(local, peer, Some(domain), deadline)
    }

    fn find(
        local: Option<IpAddr>,
        peer: SocketAddr,
        within: Option<&Domain>,
        deadline: Instant,
    ) -> Result<Self, VerbsError> {
        const STEP: &str = "finding a way to the peer";
        let identifier = Identifier::new()?;
        let mut to = to_storage(peer);
        let mut from = local.map(|ip| to_storage(SocketAddr::new(ip, 0)));
        let from = from.as_mut().map_or(std::ptr::null_mut(), |storage| (&raw mut *storage).cast());
        let (manager, raw) = (identifier.manager(), identifier.as_ptr());
        // SAFETY: the identifier is alive; the call only reads the addresses, which live through it.
        let code =
            unsafe { manager.rdma_resolve_addr(raw, from, (&raw mut to).cast(), milliseconds_to(deadline)) };
        if code != 0 {
            return Err(unresolved(local, peer, STEP));
        }
        wait(identifier.channel(), &[sys::RDMA_CM_EVENT_ADDR_RESOLVED], peer, deadline, STEP)?;
        // SAFETY: the identifier is alive and bound to a device.
        if unsafe { manager.rdma_resolve_route(raw, milliseconds_to(deadline)) } != 0 {
            return Err(unresolved(local, peer, STEP));
        }
        wait(identifier.channel(), &[sys::RDMA_CM_EVENT_ROUTE_RESOLVED], peer, deadline, STEP)?;
        Ok(Self { half: Half::new(identifier, peer, within)? })
    }

    /// Where to register what the peer shall write into.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.half.domain
    }

    /// Connects, and tells the peer `private`. Blocks until it is up.
    ///
    /// # Errors
    /// [`VerbsError::Refused`] where nobody listens, [`VerbsError::Rejected`] by the peer's program,
    /// [`VerbsError::Unreachable`], [`VerbsError::Timeout`], [`VerbsError::Limit`], others as a call says.
    pub fn connect(
        self,
        settings: &Settings,
        private: &[u8],
        deadline: Instant,
    ) -> Result<Established, VerbsError> {
        const STEP: &str = "waiting for the peer to accept";
        let half = self.half;
        let mut queue_pair = half.queue_pair(settings)?;
        let mut parameters = parameters(&queue_pair, private);
        // SAFETY: identifier and private data live through the call, which copies what it sends.
        if unsafe { half.manager().rdma_connect(half.raw(), &raw mut parameters) } != 0 {
            return Err(VerbsError::last("rdma_connect"));
        }
        // InfiniBand and RoCE ask us to be ready and say so; with iWARP the kernel has done both.
        let kinds = [sys::RDMA_CM_EVENT_CONNECT_RESPONSE, sys::RDMA_CM_EVENT_ESTABLISHED];
        let event = half.wait(&kinds, deadline, STEP)?;
        if event.kind == sys::RDMA_CM_EVENT_CONNECT_RESPONSE {
            half.make_ready(&mut queue_pair, settings)?;
            // SAFETY: the identifier is alive and has no queue pair of its own.
            if unsafe { half.manager().rdma_establish(half.raw()) } != 0 {
                return Err(VerbsError::last("rdma_establish"));
            }
        }
        queue_pair.own(half.connection);
        Ok(Established { queue_pair, private: event.private })
    }
}

impl std::fmt::Debug for Resolved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolved").field("peer", &self.half.peer).finish_non_exhaustive()
    }
}

/// Why a call that looks for a way failed at once.
fn unresolved(local: Option<IpAddr>, peer: SocketAddr, step: &'static str) -> VerbsError {
    let cause = std::io::Error::last_os_error();
    match (local, cause.raw_os_error()) {
        (Some(address), Some(libc::ENODEV | libc::EADDRNOTAVAIL)) => VerbsError::NoDeviceAt { address },
        _ => VerbsError::Unreachable { peer, step, cause },
    }
}

fn milliseconds_to(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now());
    i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1)
}

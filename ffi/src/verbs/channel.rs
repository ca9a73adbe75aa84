//! One identifier of the connection manager on an event channel of its own.
//!
//! Invariants: every event is copied and acknowledged as soon as it is taken, so destroying an identifier never waits
//! for an acknowledgement; an identifier is destroyed before its channel.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::error::VerbsError;
use super::sys;

/// A channel that events arrive on.
pub(super) struct Channel {
    raw: *mut sys::rdma_event_channel,
    libraries: &'static sys::Libraries,
}

// SAFETY: the library allows any thread to use a channel; whoever takes events from it has it exclusively or by `&`,
// and the kernel serialises.
unsafe impl Send for Channel {}

/// What happened.
pub(super) struct Event {
    pub(super) kind: u32,
    pub(super) status: i32,
    pub(super) private: Vec<u8>,
    /// The identifier of a connection request; ours to destroy.
    pub(super) request: *mut sys::rdma_cm_id,
}

impl Channel {
    pub(super) fn new() -> Result<Self, VerbsError> {
        let libraries = sys::libraries()?;
        // SAFETY: no arguments; the result is owned by `Self`.
        let raw = unsafe { libraries.manager.rdma_create_event_channel() };
        if raw.is_null() {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO) => {
                    VerbsError::NoModule { missing: "/dev/infiniband/rdma_cm", modules: "rdma_ucm" }
                }
                Some(libc::ENODEV) => VerbsError::NoDevice,
                Some(libc::EACCES | libc::EPERM) => {
                    VerbsError::Permission { path: "/dev/infiniband/rdma_cm".to_owned() }
                }
                _ => VerbsError::of("rdma_create_event_channel", error),
            });
        }
        let channel = Self { raw, libraries };
        let flags =
            rustix::fs::fcntl_getfl(channel.events()).map_err(|e| VerbsError::of("fcntl", e.into()))?;
        rustix::fs::fcntl_setfl(channel.events(), flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| VerbsError::of("fcntl", e.into()))?;
        Ok(channel)
    }

    pub(super) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open until `drop`.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    /// The next event, if there is one. Does not block.
    pub(super) fn next(&self) -> Result<Option<Event>, VerbsError> {
        let manager = &self.libraries.manager;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the channel is open and does not block; `raw` is written on success.
        if unsafe { manager.rdma_get_cm_event(self.raw, &raw mut raw) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(VerbsError::of("rdma_get_cm_event", error)),
            };
        }
        // SAFETY: the event and what it points to are valid until it is acknowledged, which happens once and after
        // everything was copied. All our identifiers are of the connected kind, whose events have `conn`.
        let event = unsafe {
            let conn = &(*raw).conn;
            let private = if conn.private_data.is_null() {
                Vec::new()
            } else {
                std::slice::from_raw_parts(conn.private_data.cast::<u8>(), conn.private_data_len.into())
                    .to_vec()
            };
            let (kind, status) = ((*raw).event, (*raw).status);
            let is_request = kind == sys::RDMA_CM_EVENT_CONNECT_REQUEST;
            let request = if is_request { (*raw).id } else { std::ptr::null_mut() };
            manager.rdma_ack_cm_event(raw);
            Event { kind, status, private, request }
        };
        Ok(Some(event))
    }

    /// The next event; `None` when the deadline passes first. Blocks.
    pub(super) fn wait(&self, deadline: Instant) -> Result<Option<Event>, VerbsError> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(Some(event));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let left = rustix::time::Timespec::try_from(left).ok();
            let mut descriptors =
                [rustix::event::PollFd::from_borrowed_fd(self.events(), rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut descriptors, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(VerbsError::of("poll", errno.into())),
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; its identifiers are gone, as `Identifier` orders it.
        unsafe { self.libraries.manager.rdma_destroy_event_channel(self.raw) };
    }
}

/// An identifier: an end of a connection, or a listening one.
pub(super) struct Identifier {
    raw: *mut sys::rdma_cm_id,
    channel: Channel,
}

// SAFETY: the library allows any thread to use an identifier; only one has it at a time.
unsafe impl Send for Identifier {}

impl Identifier {
    pub(super) fn new() -> Result<Self, VerbsError> {
        let channel = Channel::new()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the channel is open and lives as long as the identifier; `raw` is written on success.
        let code = unsafe {
            let manager = &channel.libraries.manager;
            manager.rdma_create_id(channel.raw, &raw mut raw, std::ptr::null_mut(), sys::RDMA_PS_TCP)
        };
        if code != 0 {
            return Err(VerbsError::last("rdma_create_id"));
        }
        Ok(Self { raw, channel })
    }

    /// Takes over the identifier of a connection request and gives it a channel of its own.
    pub(super) fn of_request(raw: *mut sys::rdma_cm_id) -> Result<Self, VerbsError> {
        let manager = &sys::libraries()?.manager;
        let moved = Channel::new().and_then(|channel| {
            // SAFETY: the identifier is ours since its event; no event of it is unacknowledged, so this does not wait.
            match unsafe { manager.rdma_migrate_id(raw, channel.raw) } {
                0 => Ok(channel),
                _ => Err(VerbsError::last("rdma_migrate_id")),
            }
        });
        match moved {
            Ok(channel) => Ok(Self { raw, channel }),
            Err(error) => {
                // SAFETY: ours, not used after, and still on the listener's channel, which is open while it is served.
                unsafe { manager.rdma_destroy_id(raw) };
                Err(error)
            }
        }
    }

    pub(super) fn as_ptr(&self) -> *mut sys::rdma_cm_id {
        self.raw
    }

    /// The library's calls, which take [`Identifier::as_ptr`].
    pub(super) fn manager(&self) -> &'static sys::Manager {
        &self.channel.libraries.manager
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The device it is bound to, which its own open context keeps valid.
    pub(super) fn device(&self) -> Option<*mut sys::ibv_device> {
        // SAFETY: the identifier is alive; `verbs` is set, once and for all, when it is bound to a device.
        unsafe { (*self.raw).verbs.as_ref().map(|context| context.device) }
    }

    pub(super) fn port(&self) -> u8 {
        // SAFETY: the identifier is alive; the field is set when it is bound to a device.
        unsafe { (*self.raw).port_num }
    }

    /// Whether its port is known to be down.
    pub(super) fn port_is_down(&self) -> bool {
        let verbs = &self.channel.libraries.verbs;
        let mut attributes = MaybeUninit::<sys::ibv_port_attr>::zeroed();
        // SAFETY: the identifier is alive, and so is the context it is bound to, if it is to one; the call writes at
        // most the structure, for which zeroes are valid.
        unsafe {
            let (context, port) = ((*self.raw).verbs, (*self.raw).port_num);
            !context.is_null()
                && verbs.ibv_query_port(context, port, attributes.as_mut_ptr()) == 0
                && attributes.assume_init().state == sys::IBV_PORT_DOWN
        }
    }

    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        // SAFETY: the identifier is alive and nobody changes its addresses; the storage is large enough for every kind.
        unsafe { from_storage(&(*self.raw).src_storage) }
    }

    pub(super) fn peer_address(&self) -> Option<SocketAddr> {
        // SAFETY: as in `local_address`.
        unsafe { from_storage(&(*self.raw).dst_storage) }
    }

    /// Turns a connection request down. An identifier of no request answers with an error, which is as good.
    pub(super) fn reject(&self) {
        // SAFETY: the identifier is alive; no private data go along.
        unsafe { self.manager().rdma_reject(self.raw, std::ptr::null(), 0) };
    }

    /// Tells the peer. Its answer is not waited for.
    pub(super) fn disconnect(&self) {
        // SAFETY: the identifier is alive; it owns no queue pair (ours is created apart from it and is destroyed). One
        // that was never connected answers with an error, which is as good.
        unsafe { self.manager().rdma_disconnect(self.raw) };
    }
}

impl Drop for Identifier {
    fn drop(&mut self) {
        // SAFETY: destroyed once, before its channel (a field, dropped after this). All its events are acknowledged.
        unsafe { self.manager().rdma_destroy_id(self.raw) };
    }
}

fn family(number: i32) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).expect("address families are small")
}

/// `address` as the system has it.
pub(super) fn to_storage(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: zeroes are valid for this plain C structure.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    match address {
        SocketAddr::V4(v4) => {
            let plain = libc::sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is larger than, and aligned for, every address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(plain) };
        }
        SocketAddr::V6(v6) => {
            let plain = libc::sockaddr_in6 {
                sin6_family: family(libc::AF_INET6),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(plain) };
        }
    }
    storage
}

/// The address in `storage`, if it is an internet one.
pub(super) fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says what the storage holds; it is large enough and aligned for it.
            let plain = unsafe { (&raw const *storage).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(plain.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(plain.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let plain = unsafe { (&raw const *storage).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(plain.sin6_addr.s6_addr);
            let (flow, scope) = (plain.sin6_flowinfo, plain.sin6_scope_id);
            Some(SocketAddr::V6(SocketAddrV6::new(ip, u16::from_be(plain.sin6_port), flow, scope)))
        }
        _ => None,
    }
}

/// Why a call that binds to `address` failed.
pub(super) fn no_device_at(call: &'static str, address: IpAddr) -> VerbsError {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENODEV | libc::EADDRNOTAVAIL) => VerbsError::NoDeviceAt { address },
        _ => VerbsError::of(call, error),
    }
}

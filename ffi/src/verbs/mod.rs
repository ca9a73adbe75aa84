//! RDMA: a thin, safe layer over libibverbs and librdmacm, which are loaded when first used.
//!
//! Below the RDMA transport, which is its only user on the way of a write; `doctor` asks [`devices`]. Only what that
//! transport needs is here: reliable connections made by the connection manager, RDMA writes with an immediate, and
//! messages of [`MESSAGE_LEN`] bytes.
//!
//! # What keeps it sound
//! A device reads and writes memory on its own, long after the call that told it to. Safe code must not be able to free,
//! unmap or deregister what a device may still touch:
//! - Registered memory is a [`Mapping`](crate::mapping::Mapping) and nothing else, so no reference to its bytes exists,
//!   whoever writes them. A [`Region`] holds its mapping, and deregisters before it lets go of it. Deregistering returns
//!   when the device has stopped using the region; should it fail, the mapping is leaked.
//! - A [`QueuePair`] holds a clone of every region that a work request names until that request is complete or the queue
//!   pair is destroyed, whichever is first.
//! - Receives land in an arena of the queue pair's own, which is dropped after the queue pair is destroyed.
//! - Things are taken apart in this order: queue pair, completion queue, regions (last clone), mappings, domain, context.
//!   Each holds the ones after it.
//! - The peer can reach only what [`Region::ring`] registered in the same [`Domain`], and a domain has one queue pair at a
//!   time. [`QueuePair::cut`] destroys it, and from then on no key of the domain opens anything, whoever still holds the
//!   region. A domain that is [`Free`](DomainState::Free) may have another queue pair, with another number.
//! - Inline messages are copied by the device driver's library before the doorbell call returns.
//!
//! No fork duplicates a queue pair or region: child processes of this program are spawned, never forked off to run on.
//! All registered memory is shared memory, which a fork would not copy anyway.
//!
//! # What a program has to know
//! The kernel refuses RDMA descriptors to a thread whose user or capabilities changed after they were opened: whoever
//! gives up privileges does so before the first call here. The libraries keep each device open that was ever used, until
//! the process ends; a software device is only gone then, while a connection over it ends at once
//! ([`Failure::Device`]).

mod channel;
mod completion;
mod connected;
mod connection;
mod context;
mod device;
mod error;
mod queue_pair;
mod reaper;
mod receive;
mod region;
mod send;
mod sys;

pub use connection::{Established, Listener, Opened, Request, Resolved};
pub use context::{Domain, DomainState, Limits};
pub use device::{Device, Gid, GidKind, LinkLayer, Port, PortState, Transport, devices};
pub use error::{Failure, Memlock, VerbsError, memlock, status_text};
pub use queue_pair::{Completion, QueuePair, Settings};
pub use region::Region;
pub use send::{Piece, Target};

/// Bytes of a message, and of each receive buffer: a frame header. Devices take at least this much inline.
pub const MESSAGE_LEN: usize = 64;

/// Pieces one write may gather: a header, and a payload in three parts. Each further one makes every request larger in
/// the device's queue.
pub const PIECES_MAX: usize = 4;

/// [`MESSAGE_LEN`] and [`PIECES_MAX`] as devices count.
const MESSAGE_BYTES: u32 = 64;
const PIECES: u32 = 4;
const _: () = assert!(MESSAGE_BYTES as usize == MESSAGE_LEN && PIECES as usize == PIECES_MAX);

/// Bytes of private data a request carries at most: what InfiniBand leaves of a connection request.
pub const PRIVATE_LEN_MAX: usize = 56;

#[cfg(test)]
mod tests;

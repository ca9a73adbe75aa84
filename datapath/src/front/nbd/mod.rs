//! The Network Block Device protocol, server side: decisions only, no sockets.
//!
//! [`handshake`] takes a client from its first byte to an opened export, [`proto`] decodes and judges requests,
//! [`reply`] encodes the answers. All three are sans-IO: bytes in, bytes out, bounded memory, no panic whatever a
//! client sends. Names of constants are those of the protocol's document (`doc/proto.md` of NetworkBlockDevice/nbd), so
//! that they can be looked up there. All integers on the wire are big-endian.

pub mod connection;
pub mod end;
pub mod export;
pub mod handshake;
mod incoming;
pub mod linger;
pub mod memory;
mod option;
mod outgoing;
pub mod proto;
pub mod reply;
mod socket;
mod status;

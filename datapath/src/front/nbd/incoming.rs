//! A write whose payload is on its way from a client to the disk.
//!
//! The connection makes one of a write's header, lets it [collect](Incoming::collect) the payload, begins it at the volume once
//! the payload is whole, and has it [placed](Incoming::place) as soon as the range is locked. A payload is whole when all of
//! it stands in the socket's queue, from where one call receives it straight into the mapping, or in a buffer of ours.
//!
//! Invariants:
//! - Nothing of a payload reaches the disk before the range is locked, and the range is not asked for before the payload is
//!   whole: no lock is ever held while a client takes its time.
//! - What is begun can be carried out without the client. The one exception is a client that plays tricks with what its socket
//!   says is queued (urgent data, descriptors in mid-payload); a write that meets such a trick ends its connection.
//! - A disk that is exchanged for memory in between loses nothing: what was placed stands in the buffer as well, or is copied
//!   back into one.

use super::end::ConnectionEnd;
use super::memory::ClientMemory;
use super::socket::receive;
use crate::limits::RECEIVE_LEN_MAX;
use crate::units::Token;
use crate::volume::{NewRequest, Volume};
use costandby_ffi::net::recv_pieces;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// How far a write is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Its payload is not whole.
    Arriving,
    /// Its payload is whole, and the volume has no place for it yet.
    Whole,
    /// It waits for its range.
    Waits(Token),
    /// Its range is locked.
    Begun(Token),
}

#[derive(Debug)]
enum Bytes {
    /// All of them are still in the socket.
    InSocket,
    /// The first `received` of them are in a buffer of ours, which may be longer than the payload.
    Aside { buffer: Vec<u8>, received: usize },
}

/// Whose memory payloads take that cannot wait in their socket.
#[derive(Debug)]
pub(super) struct Room<'a> {
    pub(super) memory: &'a mut ClientMemory,
    pub(super) volume: usize,
    pub(super) serial: u32,
}

/// Where payloads come from.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub(super) socket: &'a OwnedFd,
    /// Bytes that are known to be in it.
    pub(super) queued: &'a mut usize,
    /// It may have bytes.
    pub(super) readable: &'a mut bool,
    /// It gets no more than it has.
    pub(super) half_closed: bool,
}

/// What [`Incoming::collect`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Collected {
    /// The payload is whole.
    Whole,
    /// There may be more in the socket.
    Some,
    /// There is nothing in the socket now, or no room for it.
    Nothing,
    /// The client sends no more.
    Ended,
}

/// What [`Incoming::place`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Placed {
    /// All of it is on the disk, and so many bytes behind it were received.
    Whole { ahead: usize },
    /// A piece of it: go on.
    Some,
    /// The disk has failed, and the volume goes on without: ask again.
    Later,
    /// The disk has failed for good; so many bytes of the payload are still in the socket.
    Failed { in_socket: usize },
}

/// Such a write.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) new: NewRequest,
    pub(super) cookie: u64,
    pub(super) stage: Stage,
    len: usize,
    bytes: Bytes,
    /// Bytes of the buffer that stand on the disk, as long as the disk is what it was then.
    placed: usize,
    placed_in_memory: bool,
    /// Whether any byte of it reached the disk.
    touched: bool,
    /// Since when it has a buffer.
    aside_since: Option<Instant>,
    /// It stands in the queue for one.
    waits_for_room: bool,
}

impl Incoming {
    pub(super) fn new(new: NewRequest, cookie: u64) -> Self {
        Self {
            new,
            cookie,
            stage: Stage::Arriving,
            len: usize::try_from(new.range.len).expect("64-bit"),
            bytes: Bytes::InSocket,
            placed: 0,
            placed_in_memory: false,
            touched: false,
            aside_since: None,
            waits_for_room: false,
        }
    }

    /// Bytes of the payload that are still in the socket, or have yet to come there.
    pub(super) fn in_socket(&self) -> usize {
        match self.bytes {
            Bytes::InSocket => self.len,
            Bytes::Aside { received, .. } => self.len - received,
        }
    }

    /// Since when it takes memory of ours, if it does.
    pub(super) fn aside_since(&self) -> Option<Instant> {
        self.aside_since
    }

    /// Whether any byte of it reached the disk.
    pub(super) fn is_touched(&self) -> bool {
        self.touched
    }

    /// Looks whether the payload is whole, and takes what there is of it aside if not.
    pub(super) fn collect(
        &mut self,
        input: &mut Source<'_>,
        room: &mut Room<'_>,
        now: Instant,
    ) -> Result<Collected, ConnectionEnd> {
        let Bytes::Aside { buffer, received } = &mut self.bytes else {
            return self.look(input, room, now);
        };
        let end = self.len.min(*received + RECEIVE_LEN_MAX);
        let n = match receive(input.socket, &mut buffer[*received..end], input.readable) {
            Err(ConnectionEnd::Gone) => return Ok(Collected::Ended),
            received => received?,
        };
        *input.queued = input.queued.saturating_sub(n);
        *received += n;
        Ok(match n {
            0 => Collected::Nothing,
            _ if *received == self.len => Collected::Whole,
            _ => Collected::Some,
        })
    }

    fn look(
        &mut self,
        input: &mut Source<'_>,
        room: &mut Room<'_>,
        now: Instant,
    ) -> Result<Collected, ConnectionEnd> {
        if *input.queued < self.len {
            *input.queued = queued_len(input.socket)?;
        }
        if *input.queued >= self.len && self.len <= RECEIVE_LEN_MAX {
            if std::mem::take(&mut self.waits_for_room) {
                room.memory.give_up(room.volume, room.serial);
            }
            return Ok(Collected::Whole);
        }
        if *input.queued == 0 {
            if input.half_closed {
                return Ok(Collected::Ended);
            }
            *input.readable = false;
            return Ok(Collected::Nothing);
        }
        // What is there of it must not stay: it can keep the buffer of 64 KiB that it came in, the TCP window closed, and
        // the rest away for good.
        let Some(buffer) = room.memory.take_payload(room.volume, room.serial, self.len) else {
            self.waits_for_room = true;
            return Ok(Collected::Nothing);
        };
        self.waits_for_room = false;
        self.bytes = Bytes::Aside { buffer, received: 0 };
        self.aside_since = Some(now);
        Ok(Collected::Some)
    }

    /// Puts the payload, or a piece of it, into its place on the disk, whose range is locked. Bytes of the socket behind it go
    /// to `ahead`, which may be empty.
    ///
    /// # Errors
    /// The socket does not give what it said it had.
    pub(super) fn place(
        &mut self,
        socket: &OwnedFd,
        ahead: &mut [u8],
        volume: &mut Volume,
    ) -> Result<Placed, ConnectionEnd> {
        if matches!(self.bytes, Bytes::InSocket) {
            return self.place_straight(socket, ahead, volume);
        }
        if volume.disk().is_failed() {
            return Ok(self.not_placed(volume));
        }
        self.receive_rest(socket)?;
        let Bytes::Aside { buffer, .. } = &self.bytes else { panic!("looked above") };
        let in_memory = volume.disk().is_detached();
        if self.placed_in_memory != in_memory {
            (self.placed, self.placed_in_memory) = (0, in_memory);
        }
        let end = self.len.min(self.placed + RECEIVE_LEN_MAX);
        let span = volume.disk().span(self.new.range);
        span.sub(self.placed, end - self.placed).write_from(&buffer[self.placed..end]);
        self.touched = true;
        if volume.disk().is_failed() {
            return Ok(self.not_placed(volume));
        }
        self.placed = end;
        Ok(if end == self.len { Placed::Whole { ahead: 0 } } else { Placed::Some })
    }

    fn place_straight(
        &mut self,
        socket: &OwnedFd,
        ahead: &mut [u8],
        volume: &mut Volume,
    ) -> Result<Placed, ConnectionEnd> {
        let span = volume.disk().span(self.new.range);
        let n = match recv_pieces(socket.as_fd(), &span, ahead) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Placed::Some),
            Err(e) if e.raw_os_error() == Some(Errno::FAULT.raw_os_error()) => {
                volume.disk().fail();
                return Ok(self.not_placed(volume));
            }
            Err(e) => return Err(ConnectionEnd::Io(e)),
        };
        if n >= self.len {
            return Ok(Placed::Whole { ahead: n - self.len });
        }
        // The disk failed in the middle, or the client's socket plays tricks: what came is only on the disk now.
        let mut buffer = vec![0; self.len];
        span.sub(0, n).read_into(&mut buffer[..n]);
        self.touched |= n > 0;
        let lost = span.sub(0, n).is_lost();
        self.bytes = Bytes::Aside { buffer, received: n };
        if lost {
            volume.disk().fail();
            let in_socket = self.in_socket();
            // The peer goes on; these bytes are nowhere.
            return Ok(Placed::Failed { in_socket });
        }
        Ok(Placed::Some)
    }

    /// What was whole in the socket, and did not come in one call.
    fn receive_rest(&mut self, socket: &OwnedFd) -> Result<(), ConnectionEnd> {
        let Bytes::Aside { buffer, received } = &mut self.bytes else { return Ok(()) };
        while *received < self.len {
            match receive(socket, &mut buffer[*received..self.len], &mut true)? {
                0 => {
                    let text = "the payload of a write was in the socket, and is not any more";
                    return Err(ConnectionEnd::Protocol(text.into()));
                }
                n => *received += n,
            }
        }
        Ok(())
    }

    fn not_placed(&self, volume: &mut Volume) -> Placed {
        if volume.outlives_failure() { Placed::Later } else { Placed::Failed { in_socket: self.in_socket() } }
    }

    /// Gives the memory back that it holds or waits for.
    pub(super) fn give_back(self, room: &mut Room<'_>) {
        match self.bytes {
            // One that came back from the disk was never counted.
            Bytes::Aside { buffer, .. } if self.aside_since.is_some() => {
                room.memory.give_payload(room.volume, self.len, buffer);
            }
            Bytes::InSocket if self.waits_for_room => room.memory.give_up(room.volume, room.serial),
            Bytes::Aside { .. } | Bytes::InSocket => {}
        }
    }
}

/// Bytes that the socket has for us.
fn queued_len(socket: &OwnedFd) -> Result<usize, ConnectionEnd> {
    let queued = rustix::io::ioctl_fionread(socket).map_err(|e| ConnectionEnd::Io(e.into()))?;
    Ok(usize::try_from(queued).expect("64-bit"))
}

//! One NBD client's connection: bytes between its socket and a volume. Never blocks.
//!
//! Payloads go straight from the socket into the mapped disk, and replies to reads straight from it. Rules that keep
//! that safe:
//! - A write's payload is received only once its range is locked; until then the connection is not read.
//! - Bytes reach the disk in whole sectors (of [`SECTOR_LEN`] bytes), so that a client that dies in mid-payload leaves
//!   no torn sector. The part it did send is mirrored like a write, unacknowledged. What is there of a sector whose
//!   rest is still on its way is taken aside: left in the socket, it can keep the buffer of 64 KiB that it came in, the
//!   TCP window closed, and the rest away for good.
//! - A node that stops serving answers what was admitted and nothing else, then closes ([`Connection::leave`]): to a file
//!   system an error is final, while a client that reconnects repeats what was not answered where it is served then.
//! - While output is stuck no further request is taken, so one client costs a bounded amount of memory. A reply stuck
//!   half-way pins its range; when a change wants it, the rest is copied out ([`Connection::unpin`]).
//!
//! Survives: any bytes, disconnection at any point, a medium that fails under a transfer (`EIO`, the stream stays in step).

use super::end::ConnectionEnd;
use super::handshake::{ExportDirectory, Handshake, Outcome};
use super::proto::{
    AfterRejection, NBD_STATE_HOLE, NBD_STATE_ZERO, NbdErrno, Negotiated, Operation, REQUEST_LEN, Request,
};
use super::reply::{BlockStatus, Finality, error_reply, read_header, simple_reply};
use super::socket::receive;
use crate::error::IoError;
use crate::limits::{
    CONNECTION_REQUESTS_MAX, HANDSHAKE_S_MAX, PAYLOAD_STALL_S_MAX, RECEIVE_LEN_MAX, TURN_MS_MAX,
};
use crate::units::{ByteRange, Token};
use crate::volume::{Begin, NewRequest, Op, Origin, Volume};
use crate::wire::Kind;
use costandby_ffi::mapping::Span;
use costandby_ffi::net::{Piece, recv_pieces, send_pieces};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Unit in which payloads are taken from the socket.
const SECTOR_LEN: usize = 512;

/// Requests one connection is served in a turn before the next one's.
const TURN_REQUESTS_MAX: usize = 64;

/// Bytes of queued replies beyond which the turn's end is not waited for.
const OUT_LEN_SOON: usize = 32 << 10;

/// What is to be read next.
#[derive(Debug)]
enum Input {
    Header,
    /// A write whose range is not ours yet.
    AwaitsLock {
        token: Token,
        cookie: u64,
        range: ByteRange,
    },
    Payload {
        token: Token,
        cookie: u64,
        range: ByteRange,
        span: Span,
        received: usize,
    },
    /// A refused write's payload.
    Drain {
        left: usize,
    },
    /// A request there was no room for.
    Refused {
        new: NewRequest,
        cookie: u64,
    },
    /// The client said goodbye, or the volume is not served here any more: answer what is open, then close.
    Ended,
}

#[derive(Clone, Copy, Debug)]
struct Read {
    token: Token,
    cookie: u64,
    range: ByteRange,
}

/// A reply to a read that the socket took in part.
#[derive(Debug)]
struct Stuck {
    token: Token,
    span: Span,
    sent: usize,
}

#[derive(Debug)]
enum State {
    Handshake(Handshake),
    Open { volume: usize, negotiated: Negotiated },
}

/// A connection. The reactor owns it.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    index: u32,
    serial: u32,
    state: State,
    input: Input,
    header: [u8; REQUEST_LEN],
    header_len: usize,
    /// The beginning of the payload's next sector.
    fragment: [u8; SECTOR_LEN],
    fragment_len: usize,
    /// Replies ahead of [`Self::stuck`].
    out: Vec<u8>,
    out_sent: usize,
    stuck: Option<Stuck>,
    /// Replies behind it.
    out_after: Vec<u8>,
    /// Part of a reply was lost with the disk after its beginning had promised success: the client must not get it.
    torn: bool,
    waiting_reads: Vec<Read>,
    ready_reads: VecDeque<Read>,
    open: usize,
    /// The socket may have bytes for us / may take bytes from us.
    readable: bool,
    writable: bool,
    /// The client has closed its side: what is in the socket is all there will be.
    hung_up: bool,
    /// When the client last sent something or was let go on; during the handshake, when it came.
    last_input: Instant,
}

type Outcomes = Result<bool, ConnectionEnd>;

impl Connection {
    /// Greets a new client. `socket` must be non-blocking.
    #[must_use]
    pub fn new(socket: OwnedFd, index: u32, serial: u32, now: Instant) -> Self {
        let mut out = Vec::with_capacity(4096);
        let handshake = Handshake::start(&mut out);
        Self {
            socket,
            index,
            serial,
            state: State::Handshake(handshake),
            input: Input::Header,
            header: [0; REQUEST_LEN],
            header_len: 0,
            fragment: [0; SECTOR_LEN],
            fragment_len: 0,
            out,
            out_sent: 0,
            torn: false,
            stuck: None,
            out_after: Vec::new(),
            waiting_reads: Vec::new(),
            ready_reads: VecDeque::new(),
            open: 0,
            readable: true,
            writable: true,
            hung_up: false,
            last_input: now,
        }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Tells this connection from an earlier one at the same index.
    #[must_use]
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// The volume it opened.
    #[must_use]
    pub fn volume(&self) -> Option<usize> {
        match self.state {
            State::Open { volume, .. } => Some(volume),
            State::Handshake(_) => None,
        }
    }

    /// Edges from the reactor's poller.
    pub fn ready(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        // On a dead connection the next send says so.
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
    }

    /// Whether [`Connection::service`] could do something.
    #[must_use]
    pub fn wants_service(&self) -> bool {
        let output = self.out_sent < self.out.len() || self.stuck.is_some();
        if output {
            return self.writable;
        }
        if !self.ready_reads.is_empty() {
            return true;
        }
        match self.input {
            Input::AwaitsLock { .. } => false,
            Input::Refused { .. } => true,
            Input::Ended => self.open == 0,
            // The request it belongs to was counted when it was taken.
            Input::Payload { .. } | Input::Drain { .. } => self.readable,
            Input::Header => self.readable && self.open < CONNECTION_REQUESTS_MAX,
        }
    }

    /// Whether the client has been silent too long in mid-handshake or in mid-payload.
    #[must_use]
    pub fn is_stalled(&self, now: Instant) -> bool {
        let limit_s = match (&self.state, &self.input) {
            (State::Handshake(_), _) => HANDSHAKE_S_MAX,
            (_, Input::Payload { .. }) => PAYLOAD_STALL_S_MAX,
            _ => return false,
        };
        now.duration_since(self.last_input) > Duration::from_secs(limit_s)
    }

    /// Whether it is receiving a payload into the disk, or waits to.
    #[must_use]
    pub fn in_payload(&self) -> bool {
        matches!(self.input, Input::Payload { .. } | Input::AwaitsLock { .. } | Input::Refused { .. })
    }

    /// Takes the handshake's next bytes. Returns the name of the export once one is open; the caller then gives its
    /// volume's index to [`Connection::open`].
    ///
    /// # Errors
    /// [`ConnectionEnd`].
    pub fn negotiate(
        &mut self,
        directory: &dyn ExportDirectory,
    ) -> Result<Option<(String, Negotiated)>, ConnectionEnd> {
        self.send_out()?;
        while self.readable {
            let State::Handshake(handshake) = &mut self.state else { return Ok(None) };
            // Only as much as surely belongs to the handshake is taken from the socket, the rest looked at: the first
            // request, and a payload behind it, must stay there.
            let mut peeked = [0; 4096];
            let n = match rustix::net::recv(
                &self.socket,
                &mut peeked[..],
                rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
            ) {
                Ok((_, 0)) => return Err(ConnectionEnd::Gone),
                Ok((_, n)) => n,
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(e) => return Err(ConnectionEnd::Io(e.into())),
            };
            let step = handshake
                .feed(&peeked[..n], &mut self.out, directory)
                .map_err(|e| ConnectionEnd::Protocol(e.to_string()));
            let consumed = step.as_ref().map_or(n, |s| s.consumed);
            rustix::net::recv(&self.socket, &mut peeked[..consumed], rustix::net::RecvFlags::DONTWAIT)
                .map_err(|e| ConnectionEnd::Io(e.into()))?;
            self.send_out()?;
            match step?.outcome {
                Outcome::NeedMore => {}
                Outcome::Transmission(opened) => return Ok(Some((opened.name, opened.negotiated))),
                Outcome::Close => return Err(ConnectionEnd::Gone),
            }
            if self.out_sent < self.out.len() {
                break;
            }
        }
        Ok(None)
    }

    /// The handshake is over; requests go to this volume.
    pub fn open(&mut self, volume: usize, negotiated: Negotiated) {
        self.state = State::Open { volume, negotiated };
    }

    /// Sends what waits and takes requests, as far as the socket, the volume and fairness allow. Returns whether
    /// anything happened.
    ///
    /// # Errors
    /// [`ConnectionEnd`].
    pub fn service(&mut self, volume: &mut Volume, now: Instant) -> Outcomes {
        let mut any = self.send_out()?;
        self.finish_stuck(volume);
        let mut budget = TURN_REQUESTS_MAX;
        while self.wants_service() && budget > 0 && now.elapsed() < Duration::from_millis(TURN_MS_MAX) {
            budget -= 1;
            if self.out.len() >= OUT_LEN_SOON {
                any |= self.send_out()?;
                self.finish_stuck(volume);
                continue;
            }
            if let Some(read) = self.ready_reads.pop_front() {
                self.answer_read(read, volume)?;
                any = true;
                continue;
            }
            if !self.take_input(volume, now)? {
                break;
            }
            any = true;
        }
        any |= self.send_out()?;
        self.finish_stuck(volume);
        if matches!(self.input, Input::Ended) && self.open == 0 && self.out.is_empty() && self.stuck.is_none()
        {
            return Err(ConnectionEnd::Gone);
        }
        Ok(any)
    }

    /// A request that waited may go on.
    pub fn granted(&mut self, token: Token, volume: &mut Volume) {
        if let Input::AwaitsLock { token: waits, cookie, range } = self.input
            && waits == token
        {
            let span = volume.disk().span(range);
            self.input = Input::Payload { token, cookie, range, span, received: 0 };
            // The time it was made to wait is not the client's.
            self.last_input = Instant::now();
        } else if let Some(at) = self.waiting_reads.iter().position(|read| read.token == token) {
            self.ready_reads.push_back(self.waiting_reads.swap_remove(at));
        }
    }

    /// A request ended.
    pub fn done(&mut self, cookie: u64, result: Result<(), IoError>) {
        // A refused write that still waits for its range, or is being received, is answered once; its payload drains.
        match &self.input {
            Input::AwaitsLock { cookie: waits, range, .. } if *waits == cookie && result.is_err() => {
                self.input = Input::Drain { left: usize::try_from(range.len).expect("64-bit") };
            }
            _ => {}
        }
        if let Some(at) = self.waiting_reads.iter().position(|read| read.cookie == cookie)
            && result.is_err()
        {
            self.waiting_reads.swap_remove(at);
        }
        self.open -= 1;
        match result {
            Ok(()) => self.reply_ok(cookie),
            // A write whose payload is still arriving holds its range: the close gives that back.
            Err(error) if error.ends_connection() && matches!(self.input, Input::Payload { .. }) => {}
            Err(error) if error.ends_connection() => self.input = Input::Ended,
            Err(error) => self.reply_error(cookie, error.into(), &error.to_string()),
        }
    }

    /// Takes no more requests: the volume stops being served here. What was admitted is answered as it ends, and then the
    /// connection is over. A write whose payload has not come whole is not answered; nor is anything behind it.
    pub fn leave(&mut self, volume: &mut Volume) {
        match std::mem::replace(&mut self.input, Input::Ended) {
            Input::Payload { token, .. } => {
                self.open -= 1;
                volume.landed_in_part(token);
            }
            Input::AwaitsLock { token, .. } => {
                self.open -= 1;
                volume.cancel_waiting(token);
            }
            Input::Header | Input::Drain { .. } | Input::Refused { .. } | Input::Ended => {}
        }
    }

    /// Copies the rest of a stuck reply out of the mapping, or puts a read that waits behind it back, so that a change may
    /// have the range.
    pub fn unpin(&mut self, token: Token, volume: &mut Volume) {
        if self.stuck.as_ref().is_none_or(|stuck| stuck.token != token) {
            let ready = self.ready_reads.iter().position(|read| read.token == token);
            if let Some(read) = ready.and_then(|at| self.ready_reads.remove(at)) {
                self.waiting_reads.push(read);
                volume.put_back(token);
            }
            return;
        }
        let stuck = self.stuck.take().expect("checked");
        let rest = stuck.span.sub(stuck.sent, stuck.span.len() - stuck.sent);
        let start = self.out.len();
        self.out.resize(start + rest.len(), 0);
        rest.read_into(&mut self.out[start..]);
        self.torn |= rest.is_lost();
        self.out.append(&mut self.out_after);
        volume.unpin(token);
        self.open -= 1;
    }

    /// Whether this token's reply is stuck here, or cannot be made because the client takes none. A read that is only
    /// about to be answered is not meant: it is done within the turn.
    #[must_use]
    pub fn pins(&self, token: Token) -> bool {
        self.stuck.as_ref().is_some_and(|stuck| stuck.token == token)
            || (!self.writable && self.ready_reads.iter().any(|read| read.token == token))
    }

    /// Gives back whatever the connection holds of its volume. What is left is the socket, for
    /// [`Lingering`](super::linger::Lingering).
    #[must_use]
    pub fn close(mut self, volume: Option<&mut Volume>) -> OwnedFd {
        let Some(volume) = volume else { return self.socket };
        match self.input {
            Input::Payload { token, .. } => volume.landed_in_part(token),
            Input::AwaitsLock { token, .. } => volume.cancel_waiting(token),
            Input::Header | Input::Drain { .. } | Input::Refused { .. } | Input::Ended => {}
        }
        for read in self.waiting_reads.drain(..) {
            volume.cancel_waiting(read.token);
        }
        for read in self.ready_reads.drain(..) {
            volume.read_done(read.token);
        }
        if let Some(stuck) = self.stuck {
            volume.unpin(stuck.token);
        }
        self.socket
    }

    fn structured(&self) -> bool {
        matches!(self.state, State::Open { negotiated: Negotiated { structured: true, .. }, .. })
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.stuck.is_some() { &mut self.out_after } else { &mut self.out }.extend_from_slice(bytes);
    }

    fn reply_ok(&mut self, cookie: u64) {
        // The protocol lets a server answer anything but a read by a simple reply, structured replies or not; but some
        // clients want a chunk for block status, which has its own.
        self.put(&simple_reply(cookie, None));
    }

    fn reply_error(&mut self, cookie: u64, errno: NbdErrno, message: &str) {
        let reply = error_reply(cookie, errno, message, self.structured());
        self.put(reply.as_bytes());
    }

    /// Sends queued output. Returns whether any bytes went.
    fn send_out(&mut self) -> Outcomes {
        if self.torn {
            return Err(disk_failed_in_mid_reply());
        }
        let mut any = false;
        while self.writable && (self.out_sent < self.out.len() || self.stuck.is_some()) {
            let queued = &self.out[self.out_sent..];
            let sent = match &self.stuck {
                Some(stuck) => {
                    let rest = stuck.span.sub(stuck.sent, stuck.span.len() - stuck.sent);
                    send_pieces(self.socket.as_fd(), &[Piece::Bytes(queued), Piece::Span(&rest)])
                }
                None => send_pieces(self.socket.as_fd(), &[Piece::Bytes(queued)]),
            };
            match sent {
                Ok(n) => {
                    any = true;
                    let of_queued = n.min(self.out.len() - self.out_sent);
                    self.out_sent += of_queued;
                    if let Some(stuck) = &mut self.stuck {
                        if stuck.span.is_lost() {
                            return Err(disk_failed_in_mid_reply());
                        }
                        stuck.sent += n - of_queued;
                        if stuck.sent == stuck.span.len() {
                            // `finish_stuck` takes it off and tells the volume.
                            break;
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ConnectionEnd::Io(e)),
            }
        }
        if self.out_sent == self.out.len() {
            self.out.clear();
            self.out_sent = 0;
        }
        Ok(any)
    }

    /// Takes a stuck reply off once all of it is sent.
    fn finish_stuck(&mut self, volume: &mut Volume) {
        let done = self.stuck.as_ref().is_some_and(|stuck| stuck.sent == stuck.span.len());
        if done {
            let stuck = self.stuck.take().expect("checked");
            volume.unpin(stuck.token);
            self.open -= 1;
            self.out.append(&mut self.out_after);
        }
    }

    /// One step of input. Returns whether there was any.
    fn take_input(&mut self, volume: &mut Volume, now: Instant) -> Outcomes {
        match &mut self.input {
            Input::Header => {
                let n = receive(&self.socket, &mut self.header[self.header_len..], &mut self.readable)?;
                if n == 0 {
                    return Ok(false);
                }
                self.last_input = now;
                self.header_len += n;
                if self.header_len == REQUEST_LEN {
                    self.header_len = 0;
                    self.request(volume)?;
                }
                Ok(true)
            }
            Input::Payload { .. } => self.take_payload(volume, now),
            Input::Drain { left } => {
                let mut scrap = [0; 16 << 10];
                let take = scrap.len().min(*left);
                let n = receive(&self.socket, &mut scrap[..take], &mut self.readable)?;
                *left -= n;
                self.last_input = now;
                if *left == 0 {
                    self.input = Input::Header;
                }
                Ok(n > 0)
            }
            Input::Refused { new, cookie } => {
                let (new, cookie) = (*new, *cookie);
                self.input = Input::Header;
                self.begin(new, cookie, volume)?;
                Ok(!matches!(self.input, Input::Refused { .. }))
            }
            Input::AwaitsLock { .. } | Input::Ended => Ok(false),
        }
    }

    fn take_payload(&mut self, volume: &mut Volume, now: Instant) -> Outcomes {
        let Input::Payload { token, cookie, range, ref span, received } = self.input else {
            panic!("only in mid-payload")
        };
        let left = span.len() - received;
        let available = rustix::io::ioctl_fionread(&self.socket).map_err(|e| ConnectionEnd::Io(e.into()))?;
        let available = available.min(RECEIVE_LEN_MAX as u64);
        let take = if available >= left as u64 {
            left
        } else {
            let position = range.start + received as u64;
            let sectors_end = (position + available) / SECTOR_LEN as u64 * SECTOR_LEN as u64;
            usize::try_from(sectors_end.saturating_sub(position)).expect("64-bit")
        };
        if self.fragment_len > 0 || (take == 0 && available > 0) {
            return self.take_fragment(volume, now);
        }
        if take == 0 {
            if self.hung_up {
                return Err(ConnectionEnd::Gone);
            }
            self.readable = false;
            return Ok(false);
        }
        let target = span.sub(received, take);
        let ahead = take == left && self.open < CONNECTION_REQUESTS_MAX;
        let next = if ahead { &mut self.header[..] } else { &mut [] };
        let n = match recv_pieces(self.socket.as_fd(), &target, next) {
            Ok(0) => return Err(ConnectionEnd::Gone),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(false);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(e) if e.raw_os_error() == Some(Errno::FAULT.raw_os_error()) => {
                volume.disk().fail();
                if volume.outlives_failure() {
                    // What the client sends waits in the socket until other memory is here.
                    return Ok(false);
                }
                self.input = Input::Drain { left };
                volume.landed(token);
                return Ok(true);
            }
            Err(e) => return Err(ConnectionEnd::Io(e)),
        };
        self.last_input = now;
        if n < left {
            let received = received + n.min(take);
            volume.received(token, received);
            self.input = Input::Payload { token, cookie, range, span: span.clone(), received };
            return Ok(true);
        }
        self.input = Input::Header;
        self.header_len = n - take;
        if ahead && self.header_len < REQUEST_LEN && !self.hung_up {
            // Less than was asked for: the socket is empty, and what comes next is a new edge.
            self.readable = false;
        }
        volume.landed(token);
        if self.header_len == REQUEST_LEN {
            self.header_len = 0;
            self.request(volume)?;
        }
        Ok(true)
    }

    /// Takes what is there of the next sector aside, and puts it in its place once all of it is there.
    fn take_fragment(&mut self, volume: &mut Volume, now: Instant) -> Outcomes {
        let Input::Payload { token, range, ref span, ref mut received, .. } = self.input else {
            panic!("only in mid-payload")
        };
        let left = span.len() - *received;
        let position = range.start + *received as u64;
        let to_boundary = SECTOR_LEN - usize::try_from(position % SECTOR_LEN as u64).expect("under a sector");
        let len = to_boundary.min(left);
        let n = receive(&self.socket, &mut self.fragment[self.fragment_len..len], &mut self.readable)?;
        if n == 0 {
            return Ok(false);
        }
        self.last_input = now;
        self.fragment_len += n;
        if self.fragment_len < len {
            return Ok(true);
        }
        self.fragment_len = 0;
        span.sub(*received, len).write_from(&self.fragment[..len]);
        *received += len;
        let in_place = *received;
        if len == left {
            self.input = Input::Header;
            volume.landed(token);
        } else if volume.disk().is_failed() && !volume.outlives_failure() {
            self.input = Input::Drain { left: left - len };
            volume.landed(token);
        } else {
            volume.received(token, in_place);
        }
        Ok(true)
    }

    /// A whole request header is in.
    fn request(&mut self, volume: &mut Volume) -> Result<(), ConnectionEnd> {
        let State::Open { negotiated, .. } = self.state else { panic!("requests come after the handshake") };
        if volume.refusal().is_some() {
            // Whatever it asks, and if it is no valid request: who serves the volume is to be asked.
            self.input = Input::Ended;
            return Ok(());
        }
        let request = Request::decode(&self.header).map_err(|e| ConnectionEnd::Protocol(e.to_string()))?;
        let checked = match request.check(&negotiated) {
            Ok(checked) => checked,
            Err(rejection) => {
                tracing::debug!(volume = volume.name(), %rejection, "request refused");
                self.reply_error(request.cookie, rejection.errno, rejection.reason);
                self.input = match rejection.after {
                    AfterRejection::Continue => Input::Header,
                    AfterRejection::Drain { len } => {
                        Input::Drain { left: usize::try_from(len).expect("64-bit") }
                    }
                    AfterRejection::Close => Input::Ended,
                };
                return Ok(());
            }
        };
        let cookie = checked.cookie;
        let origin = Origin::Nbd { connection: self.index, serial: self.serial, cookie };
        let (op, range, fua) = match checked.operation {
            Operation::Read { range } => (Op::Read, range, false),
            Operation::Write { range, fua } => (Op::Change(Kind::Write), range, fua),
            Operation::Trim { range, fua } => (Op::Change(Kind::Trim), range, fua),
            Operation::WriteZeroes { range, fua, no_hole: true } => {
                (Op::Change(Kind::WriteZeroes), range, fua)
            }
            Operation::WriteZeroes { range, fua, no_hole: false } => {
                let kind = if volume.disk().is_sparse() { Kind::Trim } else { Kind::WriteZeroes };
                (Op::Change(kind), range, fua)
            }
            Operation::Flush => (Op::Flush, ByteRange::new(0, 0), false),
            // The mapping is the page cache: whatever is read stays there as the kernel sees fit.
            Operation::Cache { .. } => {
                self.reply_ok(cookie);
                return Ok(());
            }
            Operation::BlockStatus { range, one } => {
                self.block_status(cookie, range, one, volume);
                return Ok(());
            }
            Operation::Disconnect => {
                self.input = Input::Ended;
                return Ok(());
            }
        };
        self.begin(NewRequest { origin, op, range, fua }, cookie, volume)
    }

    fn begin(&mut self, new: NewRequest, cookie: u64, volume: &mut Volume) -> Result<(), ConnectionEnd> {
        let range = new.range;
        let is_write = new.op == Op::Change(Kind::Write);
        match volume.begin(new) {
            Begin::Go(token) => {
                self.open += 1;
                if is_write {
                    let span = volume.disk().span(range);
                    self.input = Input::Payload { token, cookie, range, span, received: 0 };
                } else if new.op == Op::Read {
                    self.answer_read(Read { token, cookie, range }, volume)?;
                }
            }
            Begin::Waits(token) => {
                self.open += 1;
                if is_write {
                    self.input = Input::AwaitsLock { token, cookie, range };
                } else if new.op == Op::Read {
                    self.waiting_reads.push(Read { token, cookie, range });
                }
            }
            Begin::Full => self.input = Input::Refused { new, cookie },
            Begin::Failed(error) if error.ends_connection() => self.input = Input::Ended,
            Begin::Failed(error) => {
                self.reply_error(cookie, error.into(), &error.to_string());
                if is_write {
                    self.input = Input::Drain { left: usize::try_from(range.len).expect("64-bit") };
                }
            }
        }
        Ok(())
    }

    /// Answers a read whose range is free of changes in flight, in one call where the socket takes it.
    fn answer_read(&mut self, read: Read, volume: &mut Volume) -> Result<(), ConnectionEnd> {
        let span = volume.disk().span(read.range);
        // A medium that fails must show before the header promises success.
        touch_pages(&span);
        if volume.disk().is_failed() {
            if volume.read_lost(read.token) {
                self.waiting_reads.push(read);
                return Ok(());
            }
            volume.read_done(read.token);
            self.open -= 1;
            self.reply_error(read.cookie, NbdErrno::Io, "the disk failed");
            return Ok(());
        }
        let header = read_header(read.cookie, read.range, self.structured(), Finality::Done);
        self.out.extend_from_slice(header.as_bytes());
        self.stuck = Some(Stuck { token: read.token, span, sent: 0 });
        self.send_out()?;
        let stuck = self.stuck.as_ref().expect("just put there");
        if stuck.sent == stuck.span.len() {
            self.stuck = None;
            self.open -= 1;
            volume.read_done(read.token);
        } else {
            volume.pin(read.token);
        }
        Ok(())
    }

    fn block_status(&mut self, cookie: u64, range: ByteRange, one: bool, volume: &Volume) {
        let mut status = BlockStatus::new(range, one);
        let mut at = range.start;
        loop {
            let extent = volume.disk().extent_at(at, range.end());
            let flags = if extent.hole { NBD_STATE_HOLE | NBD_STATE_ZERO } else { 0 };
            at = extent.range.end();
            if !status.push(extent.range.len, flags) {
                break;
            }
        }
        self.put(status.encode(cookie).as_bytes());
    }
}

/// A reply that promised success cannot be taken back.
fn disk_failed_in_mid_reply() -> ConnectionEnd {
    ConnectionEnd::Io(io::Error::other("the disk failed in the middle of a reply"))
}

/// Loads a byte of every page, so that a page that cannot be had poisons the mapping now.
fn touch_pages(span: &Span) {
    const PAGE_LEN: usize = 4096;
    let mut byte = [0];
    let mut at = 0;
    while at < span.len() {
        span.sub(at, 1).read_into(&mut byte);
        at = (span.offset() + at + PAGE_LEN) / PAGE_LEN * PAGE_LEN - span.offset();
    }
}

#[cfg(test)]
mod tests;

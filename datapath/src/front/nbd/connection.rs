//! One NBD client's connection: bytes between its socket and a volume. Never blocks.
//!
//! Payloads go straight from the socket into the mapped disk, and replies to reads straight from it. Rules that keep
//! that safe:
//! - A write is begun, which asks for its range, only when its payload is whole: in the socket's queue, or aside in memory
//!   that is bounded ([`Incoming`], [`ClientMemory`]). So no lock is held while a client takes its time, and no sector is torn.
//! - What a connection has not begun when its client closes it is never begun: neither what stands in its socket, nor a change
//!   that waits for its range. What has begun is carried out.
//! - A client that only ends its own direction gets the replies it is owed. Nobody can tell that from a TCP client that has
//!   closed. So its requests may not be begun after another client's that came later: when another connection changes
//!   something, no more is read from this one ([`Connection::take_no_more`]), and when another client opens the volume, what
//!   has not begun is dropped as well ([`Connection::leave`]).
//! - A node that stops serving answers what was admitted and nothing else, then closes ([`Connection::leave`]): to a file
//!   system an error is final, while a client that reconnects repeats what was not answered where it is served then.
//! - While output is stuck no further request is taken, so one client costs a bounded amount of memory. A reply stuck
//!   half-way pins its range; when a change wants it, the rest is copied out ([`Connection::unpin`]), if there is room for it.
//!
//! Survives: any bytes, disconnection at any point, a medium that fails under a transfer (`EIO`, the stream stays in step).

use super::end::ConnectionEnd;
use super::export::ExportDirectory;
use super::handshake::{Handshake, Outcome};
use super::incoming::{Collected, Incoming, Placed, Room, Source, Stage};
use super::memory::ClientMemory;
use super::outgoing::{Outgoing, Unstuck};
use super::proto::{AfterRejection, NbdErrno, Negotiated, Operation, REQUEST_LEN, Request};
use super::reply::{Finality, error_reply, read_header, simple_reply};
use super::socket::{ended, receive};
use super::status::{block_status, touch_pages};
use crate::error::IoError;
use crate::limits::{CONNECTION_REQUESTS_MAX, HANDSHAKE_S_MAX, PAYLOAD_ASIDE_S_MAX, TURN_MS_MAX};
use crate::units::{ByteRange, Token};
use crate::volume::{Begin, NewRequest, Op, Origin, Volume};
use crate::wire::Kind;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Requests one connection is served in a turn before the next one's.
const TURN_REQUESTS_MAX: usize = 64;

/// Bytes of queued replies beyond which the turn's end is not waited for.
const OUT_LEN_SOON: usize = 32 << 10;

/// What is to be read next.
#[derive(Debug)]
enum Input {
    Header,
    Write(Incoming),
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
    /// Bytes that are known to be in the socket.
    queued: usize,
    out: Outgoing,
    waiting_reads: Vec<Read>,
    ready_reads: VecDeque<Read>,
    open: usize,
    /// The socket may have bytes for us.
    readable: bool,
    /// The client has ended its direction: what is in the socket is all there will be.
    half_closed: bool,
    /// The client is gone.
    closed: bool,
    /// The last turn left bytes in the socket.
    left_over: bool,
    /// No request is taken behind the present one.
    no_more: bool,
    /// Changes taken.
    changes: u64,
    /// When the client last sent something; during the handshake, when it came.
    last_input: Instant,
    /// When the client last took something.
    last_output: Instant,
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
            queued: 0,
            out: Outgoing::new(out),
            waiting_reads: Vec::new(),
            ready_reads: VecDeque::new(),
            open: 0,
            readable: true,
            half_closed: false,
            closed: false,
            left_over: false,
            no_more: false,
            changes: 0,
            last_input: now,
            last_output: now,
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
    pub fn ready(&mut self, readable: bool, writable: bool, half_closed: bool, closed: bool) {
        self.readable |= readable || half_closed || closed;
        // On a dead connection the next send says so.
        self.out.writable |= writable || closed;
        self.half_closed |= half_closed || closed;
        self.closed |= closed;
    }

    /// Whether the client has ended its direction, or is gone.
    #[must_use]
    pub fn is_half_closed(&self) -> bool {
        self.half_closed
    }

    /// Changes taken so far.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether [`Connection::service`] could do something.
    #[must_use]
    pub fn wants_service(&self) -> bool {
        // A range is locked, which no client that takes no replies may hold up.
        if self.closed || self.is_placing() {
            return true;
        }
        if self.out.is_pending() {
            return self.out.writable;
        }
        if !self.ready_reads.is_empty() {
            return true;
        }
        match &self.input {
            Input::Refused { .. } => true,
            Input::Ended => self.open == 0,
            Input::Write(write) => match write.stage {
                Stage::Arriving => self.readable,
                Stage::Whole | Stage::Begun(_) => true,
                Stage::Waits(_) => false,
            },
            Input::Drain { .. } => self.readable,
            Input::Header => self.readable && self.open < CONNECTION_REQUESTS_MAX,
        }
    }

    fn is_placing(&self) -> bool {
        matches!(&self.input, Input::Write(Incoming { stage: Stage::Begun(_), .. }))
    }

    /// Whether the client has taken too long over its handshake, or over a payload whose memory another one waits for
    /// (`is_contended`).
    #[must_use]
    pub fn is_stalled(&self, now: Instant, is_contended: bool) -> bool {
        let since = |since: Instant, limit_s| now.duration_since(since) > Duration::from_secs(limit_s);
        match (&self.state, &self.input) {
            (State::Handshake(_), _) => since(self.last_input, HANDSHAKE_S_MAX),
            (_, Input::Write(write)) if is_contended && write.stage == Stage::Arriving => {
                write.aside_since().is_some_and(|aside| since(aside, PAYLOAD_ASIDE_S_MAX))
            }
            _ => false,
        }
    }

    /// For how long the client has neither sent nor been owed anything.
    #[must_use]
    pub fn idle(&self, now: Instant) -> Option<Duration> {
        let idle = matches!(self.state, State::Open { .. }) && self.open == 0 && !self.out.is_pending();
        idle.then(|| now.duration_since(self.last_input))
    }

    /// Whether it has a write that is not begun, or a request that there was no room for.
    #[must_use]
    pub fn in_payload(&self) -> bool {
        matches!(self.input, Input::Write(_) | Input::Refused { .. })
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
        self.out.send(&self.socket)?;
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
                .feed(&peeked[..n], self.out.queue_mut(), directory)
                .map_err(|e| ConnectionEnd::Protocol(e.to_string()));
            let consumed = step.as_ref().map_or(n, |s| s.consumed);
            rustix::net::recv(&self.socket, &mut peeked[..consumed], rustix::net::RecvFlags::DONTWAIT)
                .map_err(|e| ConnectionEnd::Io(e.into()))?;
            self.out.send(&self.socket)?;
            match step?.outcome {
                Outcome::NeedMore => {}
                Outcome::Transmission(opened) => return Ok(Some((opened.name, opened.negotiated))),
                Outcome::Close => return Err(ConnectionEnd::Gone),
            }
            if self.out.is_pending() {
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
    pub fn service(&mut self, volume: &mut Volume, memory: &mut ClientMemory, now: Instant) -> Outcomes {
        if std::mem::take(&mut self.left_over) {
            // Others have been served since: what they sent after this client was gone comes before this client's.
            let (half_closed, closed) = ended(&self.socket)?;
            self.half_closed |= half_closed;
            self.closed |= closed;
        }
        if self.closed {
            return Err(ConnectionEnd::Gone);
        }
        let sent = self.out.sent;
        let mut any = self.out.send(&self.socket)?;
        self.finish_stuck(volume, memory);
        let mut budget = TURN_REQUESTS_MAX;
        while self.wants_service() && budget > 0 && now.elapsed() < Duration::from_millis(TURN_MS_MAX) {
            budget -= 1;
            if self.is_placing() {
                if !self.take_write(volume, memory, now)? {
                    break;
                }
                any = true;
                continue;
            }
            if self.out.queue_len() >= OUT_LEN_SOON || self.out.is_stuck() {
                any |= self.out.send(&self.socket)?;
                self.finish_stuck(volume, memory);
                continue;
            }
            if let Some(read) = self.ready_reads.pop_front() {
                self.answer_read(read, volume)?;
                any = true;
                continue;
            }
            if !self.take_input(volume, memory, now)? {
                break;
            }
            any = true;
        }
        any |= self.out.send(&self.socket)?;
        self.finish_stuck(volume, memory);
        if self.out.sent != sent {
            self.last_output = now;
        }
        if matches!(self.input, Input::Ended) && self.open == 0 && !self.out.is_pending() {
            return Err(ConnectionEnd::Gone);
        }
        self.left_over = self.readable && !matches!(self.input, Input::Ended);
        Ok(any)
    }

    /// A request that waited may go on.
    pub fn granted(&mut self, token: Token) {
        if let Input::Write(write) = &mut self.input
            && write.stage == Stage::Waits(token)
        {
            write.stage = Stage::Begun(token);
        } else if let Some(at) = self.waiting_reads.iter().position(|read| read.token == token) {
            self.ready_reads.push_back(self.waiting_reads.swap_remove(at));
        }
    }

    /// A request ended.
    pub fn done(&mut self, cookie: u64, result: Result<(), IoError>, memory: &mut ClientMemory) {
        // A refused write that still waits for its range is answered once; its payload drains.
        if let Input::Write(write) = &self.input
            && matches!(write.stage, Stage::Waits(_))
            && write.cookie == cookie
            && result.is_err()
        {
            self.end_write(write.in_socket(), memory);
        }
        if let Some(at) = self.waiting_reads.iter().position(|read| read.cookie == cookie)
            && result.is_err()
        {
            self.waiting_reads.swap_remove(at);
        }
        self.open -= 1;
        match result {
            Ok(()) => self.reply_ok(cookie),
            Err(error) if error.ends_connection() => self.take_no_more(memory),
            Err(error) => self.reply_error(cookie, error.into(), &error.to_string()),
        }
    }
    /// Takes no more requests: the volume stops being served here, or a client that closed this connection may have come
    /// back. What was admitted is answered as it ends, and then the connection is over. A write that is not begun is not
    /// answered; nor is anything behind it.
    pub fn leave(&mut self, volume: &mut Volume, memory: &mut ClientMemory) {
        if let Input::Write(Incoming { stage: Stage::Begun(token), .. }) = self.input {
            if !self.finish_write(token, volume) {
                self.open -= 1;
            }
        } else if let Input::Write(Incoming { stage: Stage::Waits(token), .. }) = self.input {
            self.open -= 1;
            volume.cancel_waiting(token);
        }
        self.open -= volume.cancel_changes_of(self.index, self.serial);
        self.end_input(memory);
    }

    /// Takes no more requests, but answers those that it took, those that wait included.
    pub fn take_no_more(&mut self, memory: &mut ClientMemory) {
        self.no_more = true;
        let taken = match &self.input {
            Input::Write(write) => matches!(write.stage, Stage::Waits(_) | Stage::Begun(_)),
            _ => false,
        };
        if !taken {
            self.end_input(memory);
        }
    }

    fn end_input(&mut self, memory: &mut ClientMemory) {
        if let Input::Write(write) = std::mem::replace(&mut self.input, Input::Ended) {
            write.give_back(&mut self.room(memory));
        }
    }

    fn room<'a>(&self, memory: &'a mut ClientMemory) -> Room<'a> {
        Room { memory, volume: self.volume().unwrap_or(0), serial: self.serial }
    }

    /// When its client last took something, if a copied reply is on its way to it.
    #[must_use]
    pub fn copy_stuck_since(&self) -> Option<Instant> {
        self.out.has_copy().then_some(self.last_output)
    }

    /// When its client last took something.
    #[must_use]
    pub fn last_output(&self) -> Instant {
        self.last_output
    }

    /// Copies the rest of a stuck reply out of the mapping, or puts a read that waits behind it back, so that a change may
    /// have the range. False when there is no room for the copy: close a connection of the volume that has one, or this one.
    #[must_use]
    pub fn unpin(&mut self, token: Token, volume: &mut Volume, memory: &mut ClientMemory) -> bool {
        let Some(len) = self.out.pinned_len(token) else {
            let ready = self.ready_reads.iter().position(|read| read.token == token);
            if let Some(read) = ready.and_then(|at| self.ready_reads.remove(at)) {
                self.waiting_reads.push(read);
                volume.put_back(token);
            }
            return true;
        };
        let room = self.room(memory);
        if !room.memory.take_reply(room.volume, len) {
            return false;
        }
        self.out.copy_out();
        volume.unpin(token);
        true
    }

    /// Whether this token's reply is stuck here, or cannot be made because the client takes none. A read that is only
    /// about to be answered is not meant: it is done within the turn.
    #[must_use]
    pub fn pins(&self, token: Token) -> bool {
        self.out.pinned_len(token).is_some()
            || (!self.out.writable && self.ready_reads.iter().any(|read| read.token == token))
    }

    /// Gives back whatever the connection holds of its volume and of its clients' memory. A write that has begun is carried
    /// out; one that waits for its range is not. What is left is the socket, for [`Lingering`](super::linger::Lingering).
    #[must_use]
    pub fn close(mut self, volume: Option<&mut Volume>, memory: &mut ClientMemory) -> OwnedFd {
        let Some(volume) = volume else { return self.socket };
        self.leave(volume, memory);
        for read in self.waiting_reads.drain(..) {
            volume.cancel_waiting(read.token);
        }
        for read in self.ready_reads.drain(..) {
            volume.read_done(read.token);
        }
        let unstuck = self.out.give_up();
        self.end_reply(unstuck, volume, memory);
        self.socket
    }

    fn structured(&self) -> bool {
        matches!(self.state, State::Open { negotiated: Negotiated { structured: true, .. }, .. })
    }

    fn reply_ok(&mut self, cookie: u64) {
        // The protocol lets a server answer anything but a read by a simple reply, structured replies or not; but some
        // clients want a chunk for block status, which has its own.
        self.out.put(&simple_reply(cookie, None));
    }

    fn reply_error(&mut self, cookie: u64, errno: NbdErrno, message: &str) {
        let reply = error_reply(cookie, errno, message, self.structured());
        self.out.put(reply.as_bytes());
    }

    /// Takes a stuck reply off once all of it is sent.
    fn finish_stuck(&mut self, volume: &mut Volume, memory: &mut ClientMemory) {
        let unstuck = self.out.take_sent();
        self.open -= usize::from(unstuck.is_some());
        self.end_reply(unstuck, volume, memory);
    }

    fn end_reply(&self, unstuck: Option<Unstuck>, volume: &mut Volume, memory: &mut ClientMemory) {
        match unstuck {
            Some(Unstuck::Pinned(token)) => volume.unpin(token),
            Some(Unstuck::Copied(len)) => {
                let room = self.room(memory);
                room.memory.give_reply(room.volume, len);
            }
            None => {}
        }
    }

    /// One step of input. Returns whether there was any.
    fn take_input(&mut self, volume: &mut Volume, memory: &mut ClientMemory, now: Instant) -> Outcomes {
        match &mut self.input {
            Input::Header => {
                let room = &mut self.header[self.header_len..];
                let n = match receive(&self.socket, room, &mut self.readable) {
                    Err(ConnectionEnd::Gone) => {
                        self.take_no_more(memory);
                        return Ok(true);
                    }
                    n => n?,
                };
                if n == 0 {
                    return Ok(false);
                }
                self.last_input = now;
                self.queued = self.queued.saturating_sub(n);
                self.header_len += n;
                if self.header_len == REQUEST_LEN {
                    self.header_len = 0;
                    self.request(volume)?;
                }
                Ok(true)
            }
            Input::Write(_) => self.take_write(volume, memory, now),
            Input::Drain { left } => {
                let mut scrap = [0; 16 << 10];
                let take = scrap.len().min(*left);
                let n = match receive(&self.socket, &mut scrap[..take], &mut self.readable) {
                    Err(ConnectionEnd::Gone) => {
                        self.take_no_more(memory);
                        return Ok(true);
                    }
                    n => n?,
                };
                *left -= n;
                self.queued = self.queued.saturating_sub(n);
                self.last_input = now;
                if *left == 0 {
                    self.input = self.next_input(0);
                }
                Ok(n > 0)
            }
            Input::Refused { new, cookie } => {
                let (new, cookie) = (*new, *cookie);
                self.input = Input::Header;
                self.begin(new, cookie, volume)?;
                Ok(!matches!(self.input, Input::Refused { .. }))
            }
            Input::Ended => Ok(false),
        }
    }

    /// What follows a write of which so many bytes are still in the socket.
    fn next_input(&self, in_socket: usize) -> Input {
        match in_socket {
            _ if self.no_more => Input::Ended,
            0 => Input::Header,
            left => Input::Drain { left },
        }
    }

    /// The write is over as far as its client's bytes are concerned, of which so many are still in the socket.
    fn end_write(&mut self, in_socket: usize, memory: &mut ClientMemory) {
        let next = self.next_input(in_socket);
        if let Input::Write(write) = std::mem::replace(&mut self.input, next) {
            write.give_back(&mut self.room(memory));
        }
    }

    /// One step of a write: towards a whole payload, its range, its place on the disk.
    fn take_write(&mut self, volume: &mut Volume, memory: &mut ClientMemory, now: Instant) -> Outcomes {
        let mut room = self.room(memory);
        let Input::Write(write) = &mut self.input else { panic!("only with a write") };
        if write.stage == Stage::Arriving {
            let mut source = Source {
                socket: &self.socket,
                queued: &mut self.queued,
                readable: &mut self.readable,
                half_closed: self.half_closed,
            };
            match write.collect(&mut source, &mut room, now)? {
                Collected::Whole => write.stage = Stage::Whole,
                Collected::Some => {
                    self.last_input = now;
                    return Ok(true);
                }
                Collected::Nothing => return Ok(false),
                Collected::Ended => {
                    self.take_no_more(memory);
                    return Ok(true);
                }
            }
            self.last_input = now;
        }
        if write.stage == Stage::Whole {
            match volume.begin(write.new) {
                Begin::Go(token) => write.stage = Stage::Begun(token),
                Begin::Waits(token) => {
                    write.stage = Stage::Waits(token);
                    self.open += 1;
                    return Ok(true);
                }
                Begin::Full => return Ok(false),
                Begin::Failed(error) => {
                    let (cookie, in_socket) = (write.cookie, write.in_socket());
                    if error.ends_connection() {
                        self.take_no_more(memory);
                    } else {
                        self.reply_error(cookie, error.into(), &error.to_string());
                        self.end_write(in_socket, memory);
                    }
                    return Ok(true);
                }
            }
            self.open += 1;
        }
        let Stage::Begun(token) = write.stage else { return Ok(false) };
        let ahead = !self.no_more && !self.out.is_pending() && self.open < CONNECTION_REQUESTS_MAX;
        let next = if ahead { &mut self.header[..] } else { &mut [] };
        match write.place(&self.socket, next, volume)? {
            Placed::Some => {}
            Placed::Later => return Ok(false),
            Placed::Failed { in_socket } => {
                self.queued = 0;
                self.end_write(in_socket, memory);
                volume.landed(token);
            }
            Placed::Whole { ahead: n } => {
                let straight = write.in_socket();
                self.queued = self.queued.saturating_sub(straight + n);
                if straight > 0 {
                    self.header_len = n;
                    if ahead && n < REQUEST_LEN && !self.half_closed {
                        // Less than was asked for: the socket is empty, and what comes next is a new edge.
                        self.readable = false;
                    }
                }
                self.end_write(0, memory);
                volume.landed(token);
                if self.header_len == REQUEST_LEN {
                    self.header_len = 0;
                    self.request(volume)?;
                }
            }
        }
        Ok(true)
    }

    /// Carries out what has begun of a write whose connection ends. False when it was taken back instead, which happens to one
    /// whose bytes cannot be had and of which none is on the disk.
    fn finish_write(&mut self, token: Token, volume: &mut Volume) -> bool {
        let Input::Write(write) = &mut self.input else { panic!("only with a write") };
        loop {
            match write.place(&self.socket, &mut [], volume) {
                Ok(Placed::Some) => {}
                Ok(Placed::Whole { .. } | Placed::Failed { .. }) => break,
                Ok(Placed::Later) | Err(_) if write.is_touched() => break,
                Ok(Placed::Later) | Err(_) => {
                    volume.cancel_waiting(token);
                    return false;
                }
            }
        }
        volume.landed(token);
        true
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
                self.out.put(block_status(volume.disk(), range, one).encode(cookie).as_bytes());
                return Ok(());
            }
            Operation::Disconnect => {
                self.input = Input::Ended;
                return Ok(());
            }
        };
        let new = NewRequest { origin, op, range, fua };
        self.changes += u64::from(matches!(op, Op::Change(_)));
        if op == Op::Change(Kind::Write) {
            self.input = Input::Write(Incoming::new(new, cookie));
            return Ok(());
        }
        self.begin(new, cookie, volume)
    }

    /// Begins any request but a write.
    fn begin(&mut self, new: NewRequest, cookie: u64, volume: &mut Volume) -> Result<(), ConnectionEnd> {
        let range = new.range;
        match volume.begin(new) {
            Begin::Go(token) => {
                self.open += 1;
                if new.op == Op::Read {
                    self.answer_read(Read { token, cookie, range }, volume)?;
                }
            }
            Begin::Waits(token) => {
                self.open += 1;
                if new.op == Op::Read {
                    self.waiting_reads.push(Read { token, cookie, range });
                }
            }
            Begin::Full => self.input = Input::Refused { new, cookie },
            Begin::Failed(error) if error.ends_connection() => self.input = Input::Ended,
            Begin::Failed(error) => self.reply_error(cookie, error.into(), &error.to_string()),
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
        self.out.put_read(read.token, header.as_bytes(), span);
        self.out.send(&self.socket)?;
        if self.out.take_sent().is_some() {
            self.open -= 1;
            volume.read_done(read.token);
        } else {
            volume.pin(read.token);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! The link over TCP: the byte stream *is* the ring.
//!
//! Each direction's stream is laid lap by lap into a ring of agreed length at its receiver. The ring is mapped twice
//! back to back, so a frame is always in one piece. One receive call takes as much as there is room for, straight into
//! the ring; frames are parsed where they lie, and a change's payload stays there until its slot is released. One
//! gather call sends headers and payloads of many frames straight from the mapped disk.
//!
//! Where it stands in the flow: the reactor calls it between the mirror pipeline (or the access side) and the socket.
//! The connection comes connected, authenticated and past its hello from `control`, with nothing read ahead.
//!
//! Invariants:
//! - `freed ≤ parsed ≤ received ≤ freed + ring length`, all counted in bytes of the stream; bytes between `freed` and
//!   `parsed` belong to slots the user holds, or to small frames between them;
//! - a frame whose first byte is out is sent with the bytes it began with, or the link ends;
//! - once all is released the ring starts over at its beginning, so that a link with little in flight stays in the
//!   same few pages (and in the processor's cache).
//!
//! Failures survived: a peer that sends garbage, overruns its permits or returns what it never used (named, link down);
//! one that stops reading (bounded queue) or that posts and is not released (bounded ring, TCP holds it back); a cut in
//! mid-frame (nothing partial is delivered); a disk that cannot be read while it is sent from
//! ([`DownReason::Medium`]). When sending fails, what the peer sent before it went is still read: there may be acks.

use super::credit::{OwnRing, PeerRing, no_receives};
use super::outbox::{Entry, Outbox};
use super::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot, State, check_post};
use crate::limits::{GATHER_PIECES_MAX, LINK_EVENTS_MAX, RING_LEN_MIN, WINDOW_LEN};
use crate::units::Token;
use crate::wire::{HEADER_LEN, Header};
use costandby_ffi::mapping::{Mapping, Span};
use costandby_ffi::net::{Piece, recv_pieces, send_pieces};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Pieces one frame takes in a gather call: header, payload, padding.
const FRAME_PIECES_MAX: usize = 3;

/// Source of the padding behind payloads.
static PADDING: [u8; HEADER_LEN] = [0; HEADER_LEN];

/// One end of a link over TCP. See the file's head.
#[derive(Debug)]
pub struct TcpLink {
    stream: TcpStream,
    state: State,
    outbox: Outbox,
    /// The socket took less than it was offered since the last poll: until then only poll tries again.
    full: bool,
    peer: PeerRing,
    /// Tokens of frames wholly out that were not reported yet.
    sent: VecDeque<Token>,
    own: OwnRing,
    /// Both laps of the ring.
    ring: Span,
    ring_len: usize,
    /// Stream position that lies at the ring's beginning.
    base: u64,
    received: u64,
    parsed: u64,
    freed: u64,
    /// The checked header of the frame that begins at `parsed`, once it is here.
    current: Option<Header>,
}

impl TcpLink {
    /// Makes a link of a connection whose hello is done and has agreed on both rings' lengths. The peer announced
    /// `peer_ring_len`; whether it takes the payloads this volume needs is the caller's to check with
    /// [`super::ring_takes`].
    ///
    /// # Errors
    /// `InvalidInput` when a ring is under [`RING_LEN_MIN`]; otherwise when the ring cannot be mapped or the socket
    /// refuses an option.
    pub fn new(stream: TcpStream, local_ring_len: usize, peer_ring_len: usize) -> io::Result<Self> {
        if local_ring_len.min(peer_ring_len) < RING_LEN_MIN {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "rings of {local_ring_len} and {peer_ring_len} bytes, each needs at least {RING_LEN_MIN}"
                ),
            ));
        }
        stream.set_nodelay(true)?;
        let ring = Mapping::ring(local_ring_len)?;
        Ok(Self {
            stream,
            state: State::Open,
            outbox: Outbox::new(),
            full: false,
            peer: PeerRing::new(peer_ring_len),
            sent: VecDeque::with_capacity(WINDOW_LEN),
            own: OwnRing::new(local_ring_len),
            ring: ring.span(0, ring.len()),
            ring_len: local_ring_len,
            base: 0,
            received: 0,
            parsed: 0,
            freed: 0,
            current: None,
        })
    }

    /// Bytes of the ring that the next receive call may fill.
    fn room(&self) -> usize {
        self.ring_len - distance(self.freed, self.received)
    }

    /// The `len` bytes of the stream from `position` on, in the ring.
    fn at(&self, position: u64, len: usize) -> Span {
        self.ring.sub(distance(self.base, position) % self.ring_len, len)
    }

    /// Nothing goes out any more; what is on its way in is still taken.
    fn drain(&mut self, reason: DownReason) {
        if self.state.is_open() {
            self.state = State::Draining { reason, left: self.ring_len };
        }
    }

    /// Ends both directions for the peer too.
    fn end(&mut self, reason: DownReason, deliver: bool) {
        self.state.end(reason, deliver);
        // Fails only when the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Tells of released ring space when it is due and nothing else that would tell is going out.
    fn tell(&mut self) {
        if self.state.is_open() && self.outbox.is_empty() && self.own.must_tell() {
            self.outbox.send_sign_of_life();
        }
    }

    /// Sends until all is out or the socket is full.
    fn flush(&mut self) {
        while self.state.is_open() && !self.full {
            self.tell();
            if self.outbox.is_empty() {
                return;
            }
            match self.send_once() {
                Ok(took_all) => self.full = !took_all,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.full = true,
                Err(error) if error.raw_os_error() == Some(Errno::FAULT.raw_os_error()) => {
                    if let Some(span) = self.outbox.first_span() {
                        span.mapping().poison();
                    }
                    self.drain(DownReason::Medium);
                }
                Err(error) => self.drain(reason_of(error)),
            }
        }
    }

    /// One gather call. Returns whether the socket took all it was offered.
    fn send_once(&mut self) -> io::Result<bool> {
        let payload_rest = self.outbox.payload_rest();
        let mut begun_at = self.outbox.progress();
        let telling = self.own.to_tell();
        let mut gather = Gather { pieces: [Piece::Bytes(&[]); GATHER_PIECES_MAX], used: 0, bytes: 0 };
        for entry in self.outbox.encoded(telling) {
            gather.frame(entry, std::mem::take(&mut begun_at), payload_rest.as_ref());
            if gather.used + FRAME_PIECES_MAX > GATHER_PIECES_MAX {
                break;
            }
        }
        let offered = gather.bytes;
        let taken = send_pieces(self.stream.as_fd(), &gather.pieces[..gather.used])?;
        let Self { outbox, peer, own, sent, .. } = self;
        outbox.advance(taken, |entry| {
            own.told(entry.header.ring_returned);
            if let Some(token) = entry.token {
                peer.sent(entry.header.frame_len());
                sent.push_back(token);
            }
        });
        Ok(taken == offered)
    }

    /// One receive call: whatever the socket has and the ring takes.
    fn receive(&mut self) {
        if self.freed == self.received {
            self.base = self.received;
        }
        let room = self.room();
        if room == 0 {
            if let State::Draining { .. } = self.state {
                self.end(DownReason::Closed, true);
            }
            return;
        }
        match recv_pieces(self.stream.as_fd(), &self.at(self.received, room), &mut []) {
            Ok(0) => self.end(DownReason::Closed, true),
            Ok(count) => {
                self.received += count as u64;
                if let State::Draining { left, .. } = &mut self.state {
                    *left = left.saturating_sub(count);
                    if *left == 0 {
                        self.end(DownReason::Closed, true);
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let State::Draining { .. } = self.state {
                    self.end(DownReason::Closed, true);
                }
            }
            Err(error) => self.end(reason_of(error), true),
        }
    }

    /// Tells the whole frames in the ring, while `events` has room up to `limit`.
    fn deliver(&mut self, events: &mut Vec<LinkEvent>, limit: usize) {
        while events.len() < limit && self.state.delivers() {
            match self.next_frame() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => return,
                Err(reason) => self.end(reason, false),
            }
        }
    }

    /// Takes the next whole frame out of the ring.
    fn next_frame(&mut self) -> Result<Option<LinkEvent>, DownReason> {
        let here = distance(self.parsed, self.received);
        let header = match self.current {
            Some(header) => header,
            None if here < HEADER_LEN => return Ok(None),
            None => self.next_header()?,
        };
        self.current = Some(header);
        let frame_len = header.frame_len();
        if here < frame_len {
            return Ok(None);
        }
        self.current = None;
        let payload = self.at(self.parsed + HEADER_LEN as u64, header.payload_len());
        self.parsed += frame_len as u64;
        if header.kind.is_posted() {
            let (ring_end, stream_end) = (self.own.arrive(frame_len), self.parsed);
            return Ok(Some(LinkEvent::Arrived(Slot { header, payload, ring_end, stream_end })));
        }
        if !self.own.holds_any() {
            self.freed = self.parsed;
        }
        Ok(Some(LinkEvent::Message(header)))
    }

    /// Reads the header at `parsed` and takes in what it says about rings, once a frame.
    fn next_header(&mut self) -> Result<Header, DownReason> {
        let mut bytes = [0; HEADER_LEN];
        self.at(self.parsed, HEADER_LEN).read_into(&mut bytes);
        let header = Header::decode(&bytes)?;
        self.peer.returned(header.ring_returned)?;
        no_receives(header.receives)?;
        if header.kind.is_posted() {
            self.own.admit(header.frame_len())?;
        }
        self.outbox.saw(header.epoch);
        Ok(header)
    }

    /// Whether a frame to deliver may be in the ring: false is certain.
    fn may_hold_frame(&self) -> bool {
        let wanted = self.current.map_or(HEADER_LEN, |header| header.frame_len());
        distance(self.parsed, self.received) >= wanted
    }

    /// Tells frames that are wholly out.
    fn report_sent(&mut self, events: &mut Vec<LinkEvent>, limit: usize) {
        while events.len() < limit {
            let Some(token) = self.sent.pop_front() else { return };
            self.peer.reported();
            events.push(LinkEvent::Sent(token));
        }
    }

    /// The link is ending and all that arrived was told: fails what is outstanding, then says so.
    fn wind_up(&mut self, events: &mut Vec<LinkEvent>, limit: usize) {
        let State::Ending { deliver, .. } = self.state else { return };
        if !self.sent.is_empty() || (deliver && self.may_hold_frame()) {
            return;
        }
        if self.outbox.fail(events, limit) && events.len() < limit {
            events.extend(self.state.finish().map(LinkEvent::Down));
        }
    }
}

impl Link for TcpLink {
    fn claim(&mut self, payload_len: usize) -> Option<Permit> {
        if self.state.is_open() { self.peer.claim(payload_len) } else { None }
    }

    fn post(&mut self, permit: Permit, header: Header, span: Option<Span>, token: Token) {
        check_post(&permit, &header, span.as_ref());
        assert!(!self.state.is_ended(), "posted on a link that told its end");
        self.outbox.post(header, span, token);
    }

    fn send(&mut self, message: Header) -> Result<(), NoCredit> {
        assert!(!message.kind.is_posted(), "changes are posted, not sent");
        if self.state.is_open() { self.outbox.send(message) } else { Err(NoCredit) }
    }

    fn kick(&mut self) {
        self.flush();
    }

    fn poll(&mut self, events: &mut Vec<LinkEvent>) -> bool {
        let before = events.len();
        let limit = before + LINK_EVENTS_MAX;
        self.full = false;
        if !self.outbox.is_empty() {
            self.flush();
        }
        self.report_sent(events, limit);
        self.deliver(events, limit);
        if events.len() < limit && self.state.receives() {
            self.receive();
            self.deliver(events, limit);
        }
        self.wind_up(events, limit);
        events.len() > before
    }

    fn has_backlog(&self) -> bool {
        match self.state {
            State::Open => !self.sent.is_empty() || self.may_hold_frame(),
            State::Draining { .. } | State::Ending { .. } => true,
            State::Ended => false,
        }
    }

    fn received_bytes(&self) -> u64 {
        self.received
    }

    fn host_silence(&self) -> Option<Duration> {
        let age_ms = costandby_ffi::net::ack_age_ms(self.stream.as_fd()).ok()?;
        Some(Duration::from_millis(age_ms.into()))
    }

    fn release(&mut self, slot: Slot) {
        self.own.release(slot.header.frame_len(), slot.ring_end);
        self.freed = if self.own.holds_any() { slot.stream_end } else { self.parsed };
        self.tell();
    }

    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)> {
        if self.state.is_ended() {
            return None;
        }
        let interest = Interest { readable: self.room() > 0, writable: !self.outbox.is_empty() };
        Some((self.stream.as_fd(), interest))
    }

    fn close(&mut self, reason: DownReason) {
        self.end(reason, false);
    }

    fn name(&self) -> &'static str {
        "tcp"
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        // Closing alone would not end the connection while a child process holds a copy of the descriptor.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// One gather call in the making.
struct Gather<'a> {
    pieces: [Piece<'a>; GATHER_PIECES_MAX],
    used: usize,
    bytes: usize,
}

impl<'a> Gather<'a> {
    fn push(&mut self, piece: Piece<'a>) {
        self.bytes += piece.len();
        self.pieces[self.used] = piece;
        self.used += 1;
    }

    /// Adds what is left of a frame of which `out` bytes are out; `payload_rest` is what is then left of its payload.
    fn frame(&mut self, entry: &'a Entry, out: usize, payload_rest: Option<&'a Span>) {
        let payload_end = HEADER_LEN + entry.header.payload_len();
        if out < HEADER_LEN {
            self.push(Piece::Bytes(&entry.wire[out..]));
        }
        let payload = if out > HEADER_LEN { payload_rest } else { entry.span.as_ref() };
        if let Some(span) = payload.filter(|span| !span.is_empty()) {
            self.push(Piece::Span(span));
        }
        let padding = entry.header.frame_len() - payload_end.max(out);
        if padding > 0 {
            self.push(Piece::Bytes(&PADDING[..padding]));
        }
    }
}

/// Bytes from one stream position to a later one, at most a few rings apart.
fn distance(from: u64, to: u64) -> usize {
    usize::try_from(to - from).expect("64-bit")
}

/// A connection that was reset has ended like one that was closed: the peer, or its kernel for it, let go.
fn reason_of(error: io::Error) -> DownReason {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => DownReason::Closed,
        _ => DownReason::Io(error),
    }
}

#[cfg(test)]
mod tests;

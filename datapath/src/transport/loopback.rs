//! The link without a network: two ends in one process, for tests and the simulator.
//!
//! It imitates one-sided slot writes rather than a byte stream: a post is copied straight into the peer's ring at the
//! place its permit stands for, and a completion with the header is queued for the peer, as RDMA WRITE WITH IMMEDIATE
//! does. Messages stand in the same queue, bounded by credits of their own. So the conformance suite, which it shares with
//! every transport, also shows that the trait does not lean on a stream.
//!
//! Invariants: nothing moves but in a call of one of its ends, so one thread can play both and every run is the same;
//! payloads and headers really pass through ring memory and the codec; a lane's queue is bounded by permits and by
//! [`MESSAGES_QUEUED_MAX`]. Each end may live on a thread of its own: the two lanes are behind a lock each.
//!
//! Failures it plays: either end closing or being dropped.

use super::credit::{OwnRing, PeerRing, no_receives};
use super::outbox::{Entry, Outbox};
use super::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot, State, check_post};
use crate::limits::{LINK_EVENTS_MAX, MESSAGES_QUEUED_MAX};
use crate::units::Token;
use crate::wire::{HEADER_LEN, Header};
use costandby_ffi::mapping::{Mapping, Span};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a lane's queue says has arrived.
#[derive(Debug)]
struct Completion {
    header: [u8; HEADER_LEN],
    /// Where the frame lies in the ring; `None` for messages, which take no room there.
    place: Option<usize>,
}

type Hook = Box<dyn Fn() + Send>;

/// One direction: the receiver's ring and what was put there.
struct Lane {
    /// Both laps of the receiver's ring.
    ring: Span,
    /// Bytes of changes placed since the link came up.
    placed: u64,
    completions: VecDeque<Completion>,
    /// Messages among the completions.
    messages: usize,
    /// Either end is gone: nothing more is placed.
    cut: bool,
    /// Wakes the receiver.
    hook: Option<Hook>,
}

impl Lane {
    fn new(ring_len: usize) -> io::Result<Arc<Mutex<Self>>> {
        let ring = Mapping::ring(ring_len)?;
        let ring = ring.span(0, ring.len());
        let completions = VecDeque::new();
        Ok(Arc::new(Mutex::new(Self { ring, placed: 0, completions, messages: 0, cut: false, hook: None })))
    }

    /// Copies a frame into the ring and queues its completion. False while the receiver has to read messages first.
    fn place(&mut self, entry: &Entry) -> bool {
        let place = if entry.token.is_some() {
            let lap = self.ring.len() / 2;
            let place = usize::try_from(self.placed).expect("64-bit") % lap;
            if let Some(source) = &entry.span {
                source.copy_to(&self.ring.sub(place + HEADER_LEN, source.len()));
            }
            self.placed += entry.header.frame_len() as u64;
            Some(place)
        } else {
            if self.messages == MESSAGES_QUEUED_MAX {
                return false;
            }
            self.messages += 1;
            None
        };
        self.completions.push_back(Completion { header: entry.wire, place });
        true
    }

    fn wake(&self) {
        if let Some(hook) = &self.hook {
            hook();
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("placed", &self.placed)
            .field("completions", &self.completions.len())
            .field("cut", &self.cut)
            .finish_non_exhaustive()
    }
}

/// One end of an in-process link. See the file's head.
#[derive(Debug)]
pub struct LoopbackLink {
    outgoing: Arc<Mutex<Lane>>,
    incoming: Arc<Mutex<Lane>>,
    state: State,
    outbox: Outbox,
    peer: PeerRing,
    sent: VecDeque<Token>,
    own: OwnRing,
    received: u64,
}

/// Two ends joined to each other, each with a ring of `ring_len` bytes.
///
/// # Errors
/// When the system gives no memory for the rings.
///
/// # Panics
/// When `ring_len` is under [`crate::limits::RING_LEN_MIN`] or no multiple of the page size.
pub fn pair(ring_len: usize) -> io::Result<(LoopbackLink, LoopbackLink)> {
    let (there, back) = (Lane::new(ring_len)?, Lane::new(ring_len)?);
    let end = |outgoing, incoming| LoopbackLink {
        outgoing,
        incoming,
        state: State::Open,
        outbox: Outbox::new(),
        peer: PeerRing::new(ring_len),
        sent: VecDeque::new(),
        own: OwnRing::new(ring_len),
        received: 0,
    };
    Ok((end(there.clone(), back.clone()), end(back, there)))
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    // A lane holds no broken state between statements, so a panic of the other end's thread does not spoil it.
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LoopbackLink {
    /// Calls `hook` whenever the peer's end put something here or went away: what [`Link::arm`] is elsewhere. It runs
    /// on the peer's thread and must not call this link.
    pub fn on_arrival(&mut self, hook: impl Fn() + Send + 'static) {
        lock(&self.incoming).hook = Some(Box::new(hook));
    }

    fn end(&mut self, reason: DownReason, deliver: bool) {
        self.state.end(reason, deliver);
        self.cut();
    }

    fn cut(&self) {
        for lane in [&self.outgoing, &self.incoming] {
            lock(lane).cut = true;
        }
        lock(&self.outgoing).wake();
    }

    fn flush(&mut self) {
        if !self.state.is_open() {
            return;
        }
        if self.outbox.is_empty() && self.own.must_tell() {
            self.outbox.send_sign_of_life();
        }
        if self.outbox.is_empty() {
            return;
        }
        let telling = self.own.to_tell();
        let mut lane = lock(&self.outgoing);
        // Placed on a lane that is cut, a frame would count as sent without ever arriving; that is what a wire does.
        let bytes: usize = self
            .outbox
            .encoded(telling)
            .take_while(|entry| lane.place(entry))
            .map(|entry| entry.header.frame_len())
            .sum();
        if bytes > 0 {
            lane.wake();
        }
        drop(lane);
        let Self { outbox, peer, own, sent, .. } = self;
        outbox.advance(bytes, |entry| {
            own.told(entry.header.ring_returned);
            if let Some(token) = entry.token {
                peer.sent(entry.header.frame_len());
                sent.push_back(token);
            }
        });
    }

    fn deliver(&mut self, events: &mut Vec<LinkEvent>, limit: usize) {
        while events.len() < limit && self.state.delivers() {
            let mut lane = lock(&self.incoming);
            let next = lane.completions.pop_front();
            if next.as_ref().is_some_and(|completion| completion.place.is_none()) {
                lane.messages -= 1;
            }
            let (cut, unblocked) = (lane.cut, lane.messages + 1 == MESSAGES_QUEUED_MAX);
            drop(lane);
            if unblocked {
                lock(&self.outgoing).wake();
            }
            match next.map(|completion| self.taken(&completion)) {
                Some(Ok(event)) => events.push(event),
                Some(Err(reason)) => self.end(reason, false),
                None if cut && self.state.is_open() => self.end(DownReason::Closed, true),
                None => return,
            }
        }
    }

    fn taken(&mut self, completion: &Completion) -> Result<LinkEvent, DownReason> {
        let header = Header::decode(&completion.header)?;
        self.peer.returned(header.ring_returned)?;
        no_receives(header.receives)?;
        self.outbox.saw(header.epoch);
        let frame_len = header.frame_len();
        self.received += frame_len as u64;
        let Some(place) = completion.place else { return Ok(LinkEvent::Message(header)) };
        self.own.admit(frame_len)?;
        let ring_end = self.own.arrive(frame_len);
        let payload = lock(&self.incoming).ring.sub(place + HEADER_LEN, header.payload_len());
        Ok(LinkEvent::Arrived(Slot { header, payload, ring_end, stream_end: ring_end }))
    }

    fn wind_up(&mut self, events: &mut Vec<LinkEvent>, limit: usize) {
        let State::Ending { deliver, .. } = self.state else { return };
        if !self.sent.is_empty() || (deliver && !lock(&self.incoming).completions.is_empty()) {
            return;
        }
        if self.outbox.fail(events, limit) && events.len() < limit {
            events.extend(self.state.finish().map(LinkEvent::Down));
        }
    }
}

impl Link for LoopbackLink {
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
        self.flush();
        while events.len() < limit {
            let Some(token) = self.sent.pop_front() else { break };
            self.peer.reported();
            events.push(LinkEvent::Sent(token));
        }
        self.deliver(events, limit);
        self.wind_up(events, limit);
        events.len() > before
    }

    fn has_backlog(&self) -> bool {
        match self.state {
            State::Open => {
                let lane = lock(&self.incoming);
                !self.sent.is_empty() || self.own.must_tell() || !lane.completions.is_empty() || lane.cut
            }
            State::Draining { .. } | State::Ending { .. } => true,
            State::Ended => false,
        }
    }

    fn polls_for_free(&self) -> bool {
        true
    }

    fn received_bytes(&self) -> u64 {
        self.received
    }

    fn release(&mut self, slot: Slot) {
        self.own.release(slot.header.frame_len(), slot.ring_end);
    }

    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)> {
        None
    }

    fn close(&mut self, reason: DownReason) {
        self.end(reason, false);
    }

    fn name(&self) -> &'static str {
        "loopback"
    }
}

impl Drop for LoopbackLink {
    fn drop(&mut self) {
        self.cut();
    }
}

#[cfg(test)]
mod tests {
    crate::link_conformance!(|ring_len| {
        let (here, there) = super::pair(ring_len).expect("ring memory");
        (Box::new(here), Box::new(there))
    });
}

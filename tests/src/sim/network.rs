//! The wire between the two nodes: links with delay, and streams for the talk before them.
//!
//! A [`SimLink`] carries what a [`LoopbackLink`] carries, so ring memory, credits and the codec are the production code's;
//! what arrives is held back here until the virtual clock has reached its time. Each direction is FIFO; two links, or a
//! link and a stream, may overtake each other.
//!
//! Faults: delay; a blocked path (frames wait, as TCP retransmits, until it heals or an end gives up); the end of a
//! process (what it had sent still arrives, then the end); a reset of the connection between two that live (some of what was
//! on the wire is lost, and an end may hear of that late or never); the loss of a host's power (some of what was on the wire is
//! lost, and no end is told until the host is back).

use super::clock::{Clock, Nanos, US};
use crate::Rng;
use costandby_datapath::transport::loopback::{LoopbackLink, pair};
use costandby_datapath::transport::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot};
use costandby_datapath::units::{ByteRange, Token};
use costandby_datapath::wire::{Header, Kind, flags};
use costandby_ffi::mapping::Span;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Of what waits behind a blocked path.
const NEVER: Nanos = u64::MAX;

/// Messages on the wire one way; beyond them the sender keeps its own.
const MESSAGES_ON_WIRE_MAX: usize = 64;

/// What all wires share.
#[derive(Debug)]
pub(super) struct Ether {
    pub(super) clock: Clock,
    pub(super) rng: Rng,
    /// Shortest way there.
    pub(super) delay: Nanos,
    /// What may come on top.
    pub(super) jitter: Nanos,
    /// Nothing passes, in the direction *to* this node.
    pub(super) blocked: [bool; 2],
    /// Nodes to be woken, and when.
    pub(super) wakes: Vec<(usize, Nanos)>,
    /// What background copies have posted, and which node did.
    pub(super) copied: Vec<(usize, ByteRange)>,
}

impl Ether {
    pub(super) fn transit(&mut self, to: usize) -> Nanos {
        if self.blocked[to] {
            return NEVER;
        }
        self.clock.now() + self.delay + self.rng.below(self.jitter.max(1))
    }
}

pub(super) type SharedEther = Arc<Mutex<Ether>>;

pub(super) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    // After a panic of the code under test the run is over, but still to be told.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has been sent to one end and not been taken there.
#[derive(Debug, Default)]
struct End {
    inner: Option<LoopbackLink>,
    pending: VecDeque<(Nanos, LinkEvent)>,
    last_due: Nanos,
    received: u64,
    /// The user of this end is gone.
    left: bool,
}

/// Both ends of a link.
#[derive(Debug)]
pub(super) struct Wire {
    ether: SharedEther,
    ends: [End; 2],
}

pub(super) type SharedWire = Arc<Mutex<Wire>>;

impl Wire {
    pub(super) fn new(ether: &SharedEther, ring_len: usize) -> SharedWire {
        let (here, there) = pair(ring_len).expect("memory for two rings");
        let end = |inner| End { inner: Some(inner), ..End::default() };
        Arc::new(Mutex::new(Self { ether: Arc::clone(ether), ends: [end(here), end(there)] }))
    }

    /// Takes what the production link holds for `at` and puts it on the wire.
    fn absorb(&mut self, at: usize) {
        let mut ether = lock(&self.ether);
        let end = &mut self.ends[at];
        let Some(inner) = &mut end.inner else { return };
        let mut events = Vec::new();
        while end.pending.len() < MESSAGES_ON_WIRE_MAX && inner.poll(&mut events) {
            for event in events.drain(..) {
                let due = match &event {
                    LinkEvent::Arrived(_) | LinkEvent::Message(_) | LinkEvent::Down(DownReason::Closed) => {
                        ether.transit(at).max(end.last_due)
                    }
                    // The end's own business.
                    _ => end.last_due.max(ether.clock.now()),
                };
                end.last_due = due;
                end.pending.push_back((due, event));
                if due != NEVER {
                    ether.wakes.push((at, due));
                }
            }
        }
    }

    /// The path to `at` carries again what waited.
    pub(super) fn heal(&mut self, at: usize) {
        let mut ether = lock(&self.ether);
        let end = &mut self.ends[at];
        let mut last = 0;
        for (due, _) in &mut end.pending {
            if *due == NEVER {
                *due = ether.transit(at).max(last);
                ether.wakes.push((at, *due));
            }
            last = *due;
        }
        if end.last_due == NEVER {
            end.last_due = last;
        }
        drop(ether);
        self.absorb(at);
    }

    /// The power of the host at `from` fails: a part of what it had sent never arrives.
    pub(super) fn lose_power(&mut self, from: usize) {
        let to = 1 - from;
        let mut ether = lock(&self.ether);
        let now = ether.clock.now();
        let on_wire = self.ends[to].pending.iter().filter(|(due, _)| *due > now).count();
        let lost = usize::try_from(ether.rng.below(on_wire as u64 + 1)).expect("few");
        let kept = self.ends[to].pending.len() - lost;
        let cut = self.ends[to].pending.split_off(kept);
        // An end that is to be told stays told.
        self.ends[to]
            .pending
            .extend(cut.into_iter().filter(|(_, event)| matches!(event, LinkEvent::Down(_))));
        self.ends[to].last_due = NEVER;
    }

    /// The connection is reset: a part of what was on its way never arrives. `told`: who hears of it, and how much later.
    pub(super) fn reset(&mut self, told: [Option<Nanos>; 2]) {
        for at in 0..2 {
            self.absorb(at);
        }
        let mut ether = lock(&self.ether);
        for end in &mut self.ends {
            let kept = usize::try_from(ether.rng.below(end.pending.len() as u64 + 1)).expect("few");
            let cut = end.pending.split_off(kept);
            end.pending.extend(cut.into_iter().filter(|(_, event)| matches!(event, LinkEvent::Down(_))));
        }
        let now = ether.clock.now();
        drop(ether);
        for (at, told) in told.into_iter().enumerate() {
            if told.is_some()
                && let Some(inner) = &mut self.ends[at].inner
            {
                inner.close(DownReason::Io(std::io::ErrorKind::ConnectionReset.into()));
            }
        }
        for (at, told) in told.into_iter().enumerate() {
            self.absorb(at);
            // One that hears nothing finds out by the silence, or by a newer connection.
            let at_last = told.map_or(NEVER, |late| now + US + late);
            let mut ether = lock(&self.ether);
            let end = &mut self.ends[at];
            for (due, event) in &mut end.pending {
                if matches!(event, LinkEvent::Down(_)) {
                    *due = at_last;
                }
            }
            end.last_due = NEVER;
            if told.is_some() {
                ether.wakes.push((at, at_last));
            }
        }
    }

    /// Nothing is on its way but keep-alives: one of them may be at any moment.
    pub(super) fn is_quiet(&self) -> bool {
        let is_keep_alive =
            |event: &LinkEvent| matches!(event, LinkEvent::Message(header) if header.kind == Kind::KeepAlive);
        self.ends.iter().all(|end| end.pending.iter().all(|(_, event)| is_keep_alive(event)))
    }

    fn leave(&mut self, at: usize) {
        let end = &mut self.ends[at];
        if !std::mem::replace(&mut end.left, true) {
            end.pending.clear();
            end.inner = None;
            self.absorb(1 - at);
        }
    }
}

/// One end of a [`Wire`], as the datapath holds it.
#[derive(Debug)]
pub(super) struct SimLink {
    wire: SharedWire,
    at: usize,
}

impl SimLink {
    pub(super) fn new(wire: SharedWire, at: usize) -> Self {
        Self { wire, at }
    }

    fn inner<T>(&self, act: impl FnOnce(&mut LoopbackLink) -> T) -> T {
        act(lock(&self.wire).ends[self.at].inner.as_mut().expect("until it is dropped"))
    }
}

impl Link for SimLink {
    fn claim(&mut self, payload_len: usize) -> Option<Permit> {
        self.inner(|link| link.claim(payload_len))
    }

    fn post(&mut self, permit: Permit, header: Header, span: Option<Span>, token: Token) {
        if header.flags & flags::RESYNC != 0 && header.kind != Kind::Verify {
            let wire = lock(&self.wire);
            lock(&wire.ether).copied.push((self.at, header.range));
        }
        self.inner(|link| link.post(permit, header, span, token));
    }

    fn send(&mut self, message: Header) -> Result<(), NoCredit> {
        self.inner(|link| link.send(message))
    }

    fn kick(&mut self) {
        self.inner(Link::kick);
        lock(&self.wire).absorb(1 - self.at);
    }

    fn poll(&mut self, events: &mut Vec<LinkEvent>) -> bool {
        let mut wire = lock(&self.wire);
        wire.absorb(self.at);
        wire.absorb(1 - self.at);
        let now = lock(&wire.ether).clock.now();
        let end = &mut wire.ends[self.at];
        let before = events.len();
        while events.len() - before < costandby_datapath::limits::LINK_EVENTS_MAX
            && end.pending.front().is_some_and(|(due, _)| *due <= now)
        {
            let (_, event) = end.pending.pop_front().expect("just seen");
            end.received += match &event {
                LinkEvent::Arrived(slot) => slot.header.frame_len() as u64,
                LinkEvent::Message(header) => header.frame_len() as u64,
                _ => 0,
            };
            events.push(event);
        }
        events.len() > before
    }

    fn has_backlog(&self) -> bool {
        let wire = lock(&self.wire);
        let now = lock(&wire.ether).clock.now();
        wire.ends[self.at].pending.front().is_some_and(|(due, _)| *due <= now)
    }

    fn received_bytes(&self) -> u64 {
        lock(&self.wire).ends[self.at].received
    }

    fn release(&mut self, slot: Slot) {
        self.inner(|link| link.release(slot));
    }

    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)> {
        None
    }

    fn close(&mut self, reason: DownReason) {
        self.inner(|link| link.close(reason));
        let mut wire = lock(&self.wire);
        let now = lock(&wire.ether).clock.now();
        let end = &mut wire.ends[self.at];
        end.pending.retain(|(_, event)| !matches!(event, LinkEvent::Arrived(_) | LinkEvent::Message(_)));
        for (due, _) in &mut end.pending {
            *due = now;
        }
        end.last_due = now;
        wire.absorb(self.at);
        wire.absorb(1 - self.at);
        let at = self.at;
        lock(&wire.ether).wakes.push((at, now + US));
    }

    fn name(&self) -> &'static str {
        "simulated"
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        lock(&self.wire).leave(self.at);
    }
}

//! A pair of RDMA endpoints in memory, for tests: it plays what a reliable connection promises, and nothing kinder.
//!
//! Strict where a device is: a request too many panics, a message or immediate that finds no receive posted ends the
//! connection (so do errors of credit accounting), a write that ends beyond the ring is refused. Sources are read when a
//! request is carried out, which by seeded dice is long after it was posted; completions come late, in heaps and
//! interleaved. What a peer or a device may do wrong is done by calls of the test: [`FakeEndpoint::fail_at`],
//! [`FakeEndpoint::fail_before_arrivals`], [`FakeEndpoint::device_event`], or simply by driving a bare end against a link.
//!
//! Invariants: requests are carried out in order, once, or never; nothing moves but in a call of one of the two ends.

use crate::testing::conformance::Dice;
use crate::transport::rdma::endpoint::{Completion, Endpoint, EndpointError, MESSAGE_LEN, Piece, Registrar};
use crate::transport::rdma::{Joined, RdmaLink, bounce};
use costandby_ffi::mapping::{Mapping, Span};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a whole message counts as.
const HEADER_BYTES: u32 = 64;
const _: () = assert!(HEADER_BYTES as usize == MESSAGE_LEN);

/// Pieces one write may have here.
const PIECES_MAX: usize = 4;

/// How a pair behaves.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Seed of delays; without one each request is carried out with its doorbell and completes at once.
    pub seed: Option<u64>,
    /// Work requests that may be open.
    pub send_len: usize,
    /// Bytes one write may have.
    pub write_len_max: usize,
    /// Receives each end keeps posted.
    pub receives: u32,
    /// Bytes that may be registered at a time, on either end, before registering fails.
    pub registered_max: u64,
    /// Bytes of the disk that a link is to register.
    pub registered_bytes_max: u64,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            seed: None,
            send_len: 512,
            write_len_max: 1 << 30,
            receives: 1024,
            registered_max: 1 << 40,
            registered_bytes_max: 1 << 40,
        }
    }
}

/// Registers memory by counting it.
#[derive(Clone, Debug)]
pub struct FakeRegistrar {
    bytes: Arc<AtomicU64>,
    max: u64,
}

impl FakeRegistrar {
    /// Bytes registered now.
    #[must_use]
    pub fn registered_bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
struct Registration {
    span: Span,
    bytes: Arc<AtomicU64>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.span.len() as u64, Ordering::SeqCst);
    }
}

/// Memory that counts as registered.
#[derive(Clone, Debug)]
pub struct FakeRegion(Arc<Registration>);

impl Registrar for FakeRegistrar {
    type Region = FakeRegion;

    fn register(&self, span: &Span) -> io::Result<FakeRegion> {
        let more = span.len() as u64;
        if self.bytes.fetch_add(more, Ordering::SeqCst) + more > self.max {
            self.bytes.fetch_sub(more, Ordering::SeqCst);
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (span, bytes) = (span.clone(), Arc::clone(&self.bytes));
        Ok(FakeRegion(Arc::new(Registration { span, bytes })))
    }
}

#[derive(Debug)]
enum Work {
    Write { pieces: [Option<(FakeRegion, usize, usize)>; PIECES_MAX], at: u64, immediate: Option<u32> },
    Send { bytes: [u8; MESSAGE_LEN], len: u32 },
}

#[derive(Debug)]
struct Request {
    work: Work,
    id: u64,
    signalled: bool,
}

/// One end, as the wire between them sees it.
#[derive(Debug)]
struct Side {
    /// What a peer can write: one lap, until the cut.
    ring: Option<Span>,
    /// Receives posted now.
    receives: u32,
    rung: VecDeque<Request>,
    /// Requests not completed, as the poster counts.
    open: usize,
    /// Completed, unsignalled ones among the open: their room comes back with the next signalled one.
    silent: usize,
    done: VecDeque<(Completion, usize)>,
    arrived: VecDeque<Completion>,
    notified: bool,
    bell: OwnedFd,
    /// Status all further polls end with, once what completed well was taken.
    failed: Option<(&'static str, u32)>,
    event: Option<&'static str>,
    closed: bool,
    /// Carried out so far, and the one that fails instead.
    carried_out: u64,
    fail_at: Option<u64>,
    /// A failure is told before what arrived earlier, which comes out with the cut.
    fails_first: bool,
}

impl Side {
    fn new(ring: &Arc<Mapping>, receives: u32) -> io::Result<Self> {
        Ok(Self {
            ring: Some(ring.span(0, ring.len() / 2)),
            receives,
            rung: VecDeque::with_capacity(1024),
            open: 0,
            silent: 0,
            done: VecDeque::with_capacity(1024),
            arrived: VecDeque::with_capacity(4096),
            notified: false,
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            failed: None,
            event: None,
            closed: false,
            carried_out: 0,
            fail_at: None,
            fails_first: false,
        })
    }

    fn ring_bell(&mut self) {
        self.notified = false;
        // Fails only when the bell is ringing already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn wake(&mut self) {
        if self.notified {
            self.ring_bell();
        }
    }

    fn fail(&mut self, status: &'static str, code: u32) {
        self.failed.get_or_insert((status, code));
        self.rung.clear();
        self.wake();
    }
}

#[derive(Debug)]
struct Wire {
    sides: [Side; 2],
    dice: Option<Dice>,
    cut: bool,
}

impl Wire {
    /// Carries out what is rung: all of it, or as much as the dice say.
    fn progress(&mut self) {
        for from in 0..2 {
            let count = self.dice.as_mut().map_or(usize::MAX, |dice| dice.below(6));
            for _ in 0..count {
                let Some(request) = self.sides[from].rung.pop_front() else { break };
                self.carry_out(from, &request);
            }
        }
    }

    fn carry_out(&mut self, from: usize, request: &Request) {
        if self.cut {
            // It is sent again and again, and nobody answers.
            return;
        }
        let [first, second] = &mut self.sides;
        let (sender, receiver) = if from == 0 { (first, second) } else { (second, first) };
        sender.carried_out += 1;
        if sender.fail_at == Some(sender.carried_out) {
            sender.fail("transport retry counter exceeded", 12);
            return;
        }
        match receive(receiver, &request.work) {
            Ok(()) if request.signalled => {
                let room = std::mem::take(&mut sender.silent) + 1;
                sender.done.push_back((Completion::Done { id: request.id }, room));
                sender.wake();
            }
            Ok(()) => sender.silent += 1,
            Err((status, code)) => {
                sender.fail(status, code);
                if code != RNR.1 {
                    receiver.fail("Work Request Flushed Error", 5);
                }
            }
        }
    }
}

const RNR: (&str, u32) = ("RNR retry counter exceeded", 13);

/// What a request does to its receiver.
fn receive(receiver: &mut Side, work: &Work) -> Result<(), (&'static str, u32)> {
    let completion = match work {
        Work::Send { bytes, len } if *len as usize == MESSAGE_LEN => {
            Some(Completion::Message { bytes: *bytes })
        }
        Work::Send { len, .. } => Some(Completion::MessageLength { found: *len }),
        Work::Write { pieces, at, immediate } => {
            let mut at = usize::try_from(*at).unwrap_or(usize::MAX);
            for (region, offset, len) in pieces.iter().flatten() {
                let room = receiver.ring.as_ref().filter(|ring| at.saturating_add(*len) <= ring.len());
                let ring = room.ok_or(("remote access error", 10))?;
                region.0.span.sub(*offset, *len).copy_to(&ring.sub(at, *len));
                at += len;
            }
            immediate.map(|immediate| Completion::Placed { immediate })
        }
    };
    if let Some(completion) = completion {
        receiver.receives = receiver.receives.checked_sub(1).ok_or(RNR)?;
        receiver.arrived.push_back(completion);
        receiver.wake();
    }
    Ok(())
}

/// One end. See the file's head.
#[derive(Debug)]
pub struct FakeEndpoint {
    wire: Arc<Mutex<Wire>>,
    me: usize,
    /// Posted, and not rung.
    posted: VecDeque<Request>,
    manner: Manner,
    registrar: FakeRegistrar,
    /// A clone of what the wire rings.
    bell: OwnedFd,
}

/// Two joined endpoints, each for the ring given.
///
/// # Errors
/// When the system gives no descriptors.
pub fn endpoints(rings: [&Arc<Mapping>; 2], manner: Manner) -> io::Result<[FakeEndpoint; 2]> {
    let sides = [Side::new(rings[0], manner.receives)?, Side::new(rings[1], manner.receives)?];
    let bells = [sides[0].bell.try_clone()?, sides[1].bell.try_clone()?];
    let wire = Arc::new(Mutex::new(Wire { sides, dice: manner.seed.map(Dice::new), cut: false }));
    let mut me = 0..2;
    Ok(bells.map(|bell| FakeEndpoint {
        wire: Arc::clone(&wire),
        me: me.next().expect("two"),
        posted: VecDeque::with_capacity(manner.send_len),
        manner,
        registrar: FakeRegistrar { bytes: Arc::default(), max: manner.registered_max },
        bell,
    }))
}

/// Two joined links, each with a ring of `ring_len` bytes.
///
/// # Errors
/// When the system gives no memory, descriptors or threads.
pub fn pair(ring_len: usize, manner: Manner) -> io::Result<(RdmaLink<FakeEndpoint>, RdmaLink<FakeEndpoint>)> {
    let rings = [Mapping::ring(ring_len)?, Mapping::ring(ring_len)?];
    let [first, second] = endpoints([&rings[0], &rings[1]], manner)?;
    let [first_ring, second_ring] = rings;
    Ok((link(first, first_ring, ring_len)?, link(second, second_ring, ring_len)?))
}

/// A link of an endpoint, whose peer's ring has `peer_ring_len` bytes.
///
/// # Errors
/// As [`RdmaLink::new`].
pub fn link(
    endpoint: FakeEndpoint,
    ring: Arc<Mapping>,
    peer_ring_len: usize,
) -> io::Result<RdmaLink<FakeEndpoint>> {
    let receives = endpoint.manner.receives;
    let registered_bytes_max = endpoint.manner.registered_bytes_max;
    RdmaLink::new(
        endpoint,
        Joined {
            ring,
            receives,
            peer_ring_len,
            peer_receives: receives,
            companion: None,
            registered_bytes_max,
        },
    )
}

impl FakeEndpoint {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        // A wire holds no broken state between statements, so a panic of the other end's thread does not spoil it.
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The so-manyth request of this end, from 1, fails instead of being carried out.
    pub fn fail_at(&mut self, number: u64) {
        let me = self.me;
        self.wire().sides[me].fail_at = Some(number);
    }

    /// A failure of this end's requests is told before what had arrived by then.
    pub fn fail_before_arrivals(&mut self) {
        let me = self.me;
        self.wire().sides[me].fails_first = true;
    }

    /// This end's device reports that it is no good any more.
    pub fn device_event(&mut self, what: &'static str) {
        let me = self.me;
        let mut wire = self.wire();
        wire.sides[me].event = Some(what);
        wire.sides[me].ring_bell();
    }

    /// Posts a message of any length up to a header's. Only a peer that breaks the protocol does.
    pub fn send_some(&mut self, bytes: &[u8; MESSAGE_LEN], len: u32, id: u64) {
        self.post(Work::Send { bytes: *bytes, len }, id, true);
    }

    /// Receives this end has posted now.
    #[must_use]
    pub fn receives_posted(&self) -> u32 {
        self.wire().sides[self.me].receives
    }

    fn post(&mut self, work: Work, id: u64, signalled: bool) {
        let me = self.me;
        let mut wire = self.wire();
        wire.sides[me].open += 1;
        let open = wire.sides[me].open;
        drop(wire);
        assert!(open <= self.manner.send_len, "the send queue overflows");
        self.posted.push_back(Request { work, id, signalled });
    }
}

impl Endpoint for FakeEndpoint {
    type Region = FakeRegion;
    type Registrar = FakeRegistrar;

    fn send_len(&self) -> usize {
        self.manner.send_len
    }

    fn pieces_max(&self) -> usize {
        PIECES_MAX
    }

    fn write_len_max(&self) -> usize {
        self.manner.write_len_max
    }

    fn registrar(&self) -> FakeRegistrar {
        self.registrar.clone()
    }

    fn bounce(&self) -> io::Result<(Span, FakeRegion)> {
        bounce::make(&self.registrar)
    }

    fn write(
        &mut self,
        pieces: &[Piece<'_, FakeRegion>],
        ring_offset: u64,
        immediate: Option<u32>,
        id: u64,
        signalled: bool,
    ) {
        assert!(pieces.len() <= PIECES_MAX, "{} pieces in one write", pieces.len());
        let len: usize = pieces.iter().map(|piece| piece.len).sum();
        assert!(len <= self.manner.write_len_max, "a write of {len} bytes");
        let mut kept = [const { None }; PIECES_MAX];
        for (kept, piece) in kept.iter_mut().zip(pieces) {
            assert!(piece.offset + piece.len <= piece.region.0.span.len(), "a piece outside of its region");
            *kept = Some((piece.region.clone(), piece.offset, piece.len));
        }
        self.post(Work::Write { pieces: kept, at: ring_offset, immediate }, id, signalled);
    }

    fn send(&mut self, bytes: &[u8; MESSAGE_LEN], id: u64, signalled: bool) {
        self.post(Work::Send { bytes: *bytes, len: HEADER_BYTES }, id, signalled);
    }

    fn ring_doorbell(&mut self) -> Result<(), EndpointError> {
        let (me, mut posted) = (self.me, std::mem::take(&mut self.posted));
        let mut wire = self.wire();
        if wire.sides[me].failed.is_none() {
            wire.sides[me].rung.append(&mut posted);
        }
        wire.progress();
        drop(wire);
        posted.clear();
        self.posted = posted;
        Ok(())
    }

    fn poll(&mut self, completions: &mut [Completion]) -> Result<usize, EndpointError> {
        let me = self.me;
        let mut wire = self.wire();
        wire.progress();
        let late = !wire.cut && wire.sides[me].failed.is_none();
        let mut count = 0;
        while count < completions.len() {
            let (skip, done_first) = match &mut wire.dice {
                Some(dice) => (late && dice.below(4) == 0, dice.below(2) == 0),
                None => (false, true),
            };
            let side = &mut wire.sides[me];
            let hidden = side.fails_first && side.failed.is_some() && side.ring.is_some();
            if hidden || skip || (side.done.is_empty() && side.arrived.is_empty()) {
                break;
            }
            completions[count] = if side.arrived.is_empty() || (done_first && !side.done.is_empty()) {
                let (done, room) = side.done.pop_front().expect("just seen");
                side.open -= room;
                done
            } else {
                side.receives += 1;
                side.arrived.pop_front().expect("just seen")
            };
            count += 1;
        }
        let side = &wire.sides[me];
        match side.failed {
            Some((status, code)) if count == 0 => Err(EndpointError::WorkRequest { status, code }),
            _ => Ok(count),
        }
    }

    fn check(&mut self) -> Result<(), EndpointError> {
        let me = self.me;
        let mut wire = self.wire();
        wire.progress();
        let side = &mut wire.sides[me];
        let mut counter = [0; 8];
        // Empty unless it was rung.
        let _ = rustix::io::read(&side.bell, &mut counter);
        if let Some(what) = side.event {
            return Err(EndpointError::Device(what));
        }
        if side.closed { Err(EndpointError::Closed) } else { Ok(()) }
    }

    fn notify(&mut self) -> Result<(), EndpointError> {
        let me = self.me;
        let mut wire = self.wire();
        let late = wire.dice.is_some();
        let side = &mut wire.sides[me];
        side.notified = true;
        // What the dice have not let out yet completes after this call, as far as the caller can tell.
        if late && !(side.done.is_empty() && side.arrived.is_empty()) {
            side.ring_bell();
        }
        Ok(())
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.bell.as_fd()]
    }

    fn cut(&mut self) {
        let me = self.me;
        let mut wire = self.wire();
        wire.cut = true;
        wire.sides[me].ring = None;
        wire.sides[me].fail("Work Request Flushed Error", 5);
        let peer = &mut wire.sides[1 - me];
        if !peer.closed {
            peer.closed = true;
            peer.ring_bell();
        }
    }
}

impl Drop for FakeEndpoint {
    fn drop(&mut self) {
        self.cut();
    }
}

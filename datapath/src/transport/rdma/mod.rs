//! The link over RDMA: one write with immediate a change, straight from the mapped disk into the peer's registered ring.
//!
//! The device gathers {64 bytes of header, a span of the disk} and lays both into the peer's ring at the place this end
//! counts to ([`placement`]); the immediate names the place. Messages are small sends that the device copies at once.
//! Payloads come from sections of the disk that are registered, or through a small bounce buffer while they are not
//! ([`registration`]). The connection is an [`Endpoint`]: the device's ([`verbs`](endpoint)), or one in memory that tests drive.
//!
//! Where it stands in the flow: as [`super::tcp`], between the mirror pipeline (or the access side) and the device. The
//! endpoint comes connected, with secrets exchanged, from `control`. So may the TCP connection the hellos were
//! exchanged on, as its *companion*: it says nothing more, and its end is the first sign of a dead peer.
//!
//! Invariants:
//! - a change goes out with a permit: ring space of the peer's, and one of its receives ([`super::credit`]); a message
//!   with one of its receives; so nothing of ours ever finds the peer without a receive posted;
//! - work requests are done in the order posted, and never more are open than the send queue takes; the rest waits in
//!   the outbox, where a frame's first byte is sent with the header it began with;
//! - the last request of a kick reports its completion, and so does each that the bounce buffer waits for;
//! - once [`Endpoint::cut`] was called, by closing, dropping or any failure, the peer reaches nothing here.
//!
//! While busy, nothing here allocates, locks, copies payload (registered sections) or calls the system for a write; a look
//! at the clock and at what no completion tells comes every few milliseconds.
//!
//! Failures survived: a peer that names places it may not, sends what is no header, mixes up changes and messages,
//! returns what it never used (each named, link down); a device, queue pair or connection that fails, and a peer that
//! goes (what had arrived is still told); a disk that cannot be read while it is copied to the bounce buffer ([`DownReason::Medium`]).

use self::endpoint::{Completion, Endpoint, EndpointError, Piece, Registrar};
use self::placement::{OwnPlaces, PeerPlaces};
use self::registration::{RegistrationCounters, Registrations, Source};
use super::credit::{OwnReceives, OwnRing, PeerReceives, PeerRing};
use super::outbox::Outbox;
use super::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot, State, check_post};
use crate::error::Violation;
use crate::limits::{
    LINK_EVENTS_MAX, POSTS_OPEN_MAX, RDMA_COMPLETIONS_MAX, RDMA_LOOK_MS, RDMA_POLLS_PER_LOOK,
    RDMA_RECEIVES_MIN, RDMA_SENDS_LEN, RDMA_SIGNAL_EVERY, RING_LEN_MIN,
};
use crate::units::Token;
use crate::wire::{HEADER_LEN, Header, flags};
use costandby_ffi::mapping::{Mapping, Span};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::RecvFlags;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) mod bounce;
pub mod endpoint;
pub mod keeper;
mod placement;
pub mod private_data;
pub mod registration;
#[cfg(feature = "rdma")]
pub mod ring;
#[cfg(feature = "rdma")]
pub mod setup;
#[cfg(feature = "rdma")]
pub mod verbs;

/// What a connection was made with, beside its endpoint.
#[derive(Debug)]
pub struct Joined {
    /// Our ring, mapped twice ([`Mapping::ring`]); its first lap is registered for the peer.
    pub ring: Arc<Mapping>,
    /// Receives the endpoint keeps posted, as the peer was told.
    pub receives: u32,
    /// Bytes of the peer's ring, one lap, as it announced.
    pub peer_ring_len: usize,
    /// Receives the peer keeps posted, as it announced.
    pub peer_receives: u32,
    /// The connection of the hellos, with nothing left to read on it.
    pub companion: Option<TcpStream>,
    /// Bytes of the disk that may be registered.
    pub registered_bytes_max: u64,
}

/// A frame whose work requests are all posted, and not all done.
#[derive(Debug)]
struct Flight {
    last_id: u64,
    /// `Some` for posts, `None` for messages.
    token: Option<Token>,
}

/// Work requests by number: the first is 1.
#[derive(Debug)]
struct Requests {
    posted: u64,
    done: u64,
    /// The last that reports its completion.
    signalled: u64,
    open_max: u64,
}

impl Requests {
    fn has_room(&self) -> bool {
        self.posted - self.done < self.open_max
    }

    /// The number of the next request, which was just posted.
    fn post(&mut self, signalled: bool) {
        self.posted += 1;
        if signalled {
            self.signalled = self.posted;
        }
    }

    /// Whether the next request has to report, whatever comes after it.
    fn signal_due(&self) -> bool {
        let last_room = self.posted + 1 - self.done == self.open_max;
        last_room || self.posted + 1 - self.signalled >= RDMA_SIGNAL_EVERY
    }
}

/// One end of a link over RDMA. See the file's head.
pub struct RdmaLink<E: Endpoint> {
    endpoint: E,
    state: State,
    outbox: Outbox,
    registrations: Registrations<E::Registrar>,
    /// Registered memory for headers: as many slots as work requests may be open, each taken by one frame.
    headers: Span,
    headers_region: E::Region,
    headers_used: u64,
    /// Where in the peer's ring the outbox's front frame stands, once it has begun to go out.
    place: u64,
    requests: Requests,
    flights: VecDeque<Flight>,
    peer: PeerRing,
    peer_places: PeerPlaces,
    peer_receives: PeerReceives,
    /// Tokens of frames that are done and were not reported yet.
    sent: VecDeque<Token>,
    /// Both laps of our ring.
    ring: Span,
    own: OwnRing,
    own_places: OwnPlaces,
    own_receives: OwnReceives,
    received: u64,
    completions: [Completion; RDMA_COMPLETIONS_MAX],
    /// How many of `completions` were taken before a sleep and not looked at yet.
    taken: usize,
    /// Ending: nothing of what had arrived is left in the device.
    drained: bool,
    companion: Option<TcpStream>,
    /// What to sleep on: all of the endpoint's descriptors and the companion.
    sleep_on: OwnedFd,
    /// The sleep was prepared for: whatever woke us is to be looked for now.
    slept: bool,
    polls: u32,
    last_look: Instant,
    /// A request was done since the last look.
    done_unseen: bool,
    last_done: Option<Instant>,
}

impl<E: Endpoint> RdmaLink<E> {
    /// Makes a link of a connected endpoint. Registers memory for headers, so blocks for a millisecond.
    /// Whether the peer's ring takes the payloads this volume needs is the caller's to check with [`super::ring_takes`].
    ///
    /// # Errors
    /// `InvalidInput` when a ring is under [`RING_LEN_MIN`] or there are fewer receives than [`RDMA_RECEIVES_MIN`];
    /// otherwise when memory cannot be registered or the system gives no descriptor or thread.
    pub fn new(endpoint: E, joined: Joined) -> io::Result<Self> {
        let Joined { ring, receives, peer_ring_len, peer_receives, companion, registered_bytes_max } = joined;
        let ring_len = ring.len() / 2;
        if ring_len.min(peer_ring_len) < RING_LEN_MIN || receives.min(peer_receives) < RDMA_RECEIVES_MIN {
            let text = format!(
                "rings of {ring_len} and {peer_ring_len} bytes and {receives} and {peer_receives} receives, each \
                 needs at least {RING_LEN_MIN} bytes and {RDMA_RECEIVES_MIN} receives"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let sends_len = endpoint.send_len().min(RDMA_SENDS_LEN);
        let registrar = endpoint.registrar();
        let headers = Mapping::anonymous(sends_len * HEADER_LEN)?.span(0, sends_len * HEADER_LEN);
        let headers_region = registrar.register(&headers)?;
        let registrations = Registrations::with_bounce(&registrar, endpoint.bounce()?, registered_bytes_max)?;
        let sleep_on = sleep_on(&endpoint, companion.as_ref())?;
        let nothing = Completion::Placed { immediate: 0 };
        Ok(Self {
            endpoint,
            state: State::Open,
            outbox: Outbox::new(),
            registrations,
            headers,
            headers_region,
            headers_used: 0,
            place: 0,
            requests: Requests { posted: 0, done: 0, signalled: 0, open_max: sends_len as u64 },
            flights: VecDeque::with_capacity(sends_len),
            peer: PeerRing::new(peer_ring_len),
            peer_places: PeerPlaces::new(peer_ring_len),
            peer_receives: PeerReceives::new(peer_receives),
            sent: VecDeque::with_capacity(POSTS_OPEN_MAX),
            ring: ring.span(0, ring.len()),
            own: OwnRing::new(ring_len),
            own_places: OwnPlaces::new(ring_len),
            own_receives: OwnReceives::new(receives),
            received: 0,
            completions: [nothing; RDMA_COMPLETIONS_MAX],
            taken: 0,
            drained: false,
            companion,
            sleep_on,
            slept: false,
            polls: 0,
            last_look: Instant::now(),
            done_unseen: false,
            last_done: None,
        })
    }

    /// Takes the connection of the hellos as the companion, where the link was made before it was free. Nothing may be
    /// left to read on it. Does not block.
    ///
    /// # Errors
    /// When it cannot be slept on.
    ///
    /// # Panics
    /// When the link has one.
    pub fn accompany(&mut self, companion: TcpStream) -> io::Result<()> {
        assert!(self.companion.is_none(), "a second companion");
        // The endpoint's descriptors have the numbers below.
        let number = self.endpoint.descriptors().len() as u64;
        watch(&self.sleep_on, companion.as_fd(), number)?;
        self.companion = Some(companion);
        Ok(())
    }

    /// What is registered, and what was copied for want of it.
    #[must_use]
    pub fn registration_counters(&self) -> RegistrationCounters {
        self.registrations.counters()
    }

    /// Ends the link: from here on the peer reaches nothing of ours. `deliver`: what had arrived is still told.
    fn end(&mut self, reason: DownReason, deliver: bool) {
        self.state.end(reason, deliver);
        if !deliver {
            self.taken = 0;
        }
        self.cut();
    }

    fn cut(&mut self) {
        self.endpoint.cut();
        if let Some(companion) = &self.companion {
            // Fails only when the connection is gone already.
            let _ = companion.shutdown(Shutdown::Both);
        }
    }

    /// The endpoint is no good any more. A failed request is often only how a peer's end shows: then that is told.
    fn fail(&mut self, error: EndpointError) {
        let closed = matches!(error, EndpointError::Closed)
            || matches!(self.endpoint.check(), Err(EndpointError::Closed))
            || matches!(self.look_at_companion(), Err(DownReason::Closed));
        self.end(if closed { DownReason::Closed } else { DownReason::Rdma(error) }, true);
    }

    /// Whether the peer still holds its companion connection.
    fn look_at_companion(&self) -> Result<(), DownReason> {
        let Some(companion) = &self.companion else { return Ok(()) };
        let mut byte = [0];
        match rustix::net::recv(companion, &mut byte, RecvFlags::DONTWAIT | RecvFlags::PEEK) {
            Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => {
                Err(DownReason::Closed)
            }
            Ok(_) => Err(Violation::Companion.into()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(DownReason::Io(error.into())),
        }
    }

    /// Looks, now and then or after a sleep, for what no completion tells.
    fn look_around(&mut self) {
        self.polls += 1;
        if !self.slept && self.polls < RDMA_POLLS_PER_LOOK {
            return;
        }
        self.polls = 0;
        let now = Instant::now();
        if std::mem::take(&mut self.done_unseen) {
            self.last_done = Some(now);
        }
        if !self.slept && now.duration_since(self.last_look) < Duration::from_millis(RDMA_LOOK_MS) {
            return;
        }
        self.slept = false;
        self.last_look = now;
        if let Err(error) = self.endpoint.check() {
            self.fail(error);
        } else if let Err(reason) = self.look_at_companion() {
            let deliver = !matches!(reason, DownReason::Protocol(_));
            self.end(reason, deliver);
        }
    }

    /// Sends until all is out or something is missing: room in the send queue or the bounce buffer, or a receive of the peer's.
    fn flush(&mut self) {
        if !self.state.is_open() || (self.outbox.is_empty() && !self.must_tell()) {
            return;
        }
        let before = self.requests.posted;
        let outcome = loop {
            match self.step() {
                Ok(true) => {}
                other => break other,
            }
        };
        // A header that has begun to go out tells less, and must not come after one that tells more.
        if self.must_tell() && self.outbox.progress() == 0 {
            self.tell();
        }
        if self.requests.posted > before
            && let Err(error) = self.endpoint.ring_doorbell()
        {
            self.fail(error);
        }
        if let Err(reason) = outcome {
            self.end(reason, true);
        }
    }

    fn must_tell(&self) -> bool {
        self.own.must_tell() || self.own_receives.must_tell()
    }

    /// Tells, past whatever waits in the outbox, what the peer has to know to go on.
    fn tell(&mut self) {
        if self.requests.has_room() && self.peer_receives.has_reserve() {
            let mut header = self.outbox.sign_of_life();
            header.ring_returned = self.own.to_tell();
            header.receives = self.own_receives.to_tell();
            self.post_message(&header.encode(), &header, true);
        }
    }

    /// Posts a message for which there is a receive.
    fn post_message(&mut self, bytes: &[u8; HEADER_LEN], header: &Header, signalled: bool) {
        self.endpoint.send(bytes, self.requests.posted + 1, signalled);
        self.requests.post(signalled);
        self.flights.push_back(Flight { last_id: self.requests.posted, token: None });
        self.own.told(header.ring_returned);
        self.own_receives.told(header.receives);
        self.peer_receives.sent();
    }

    /// Posts the next work request, if one can go.
    fn step(&mut self) -> Result<bool, DownReason> {
        if !self.requests.has_room() || !self.has_receive_for_front() {
            return Ok(false);
        }
        match self.outbox.is_post(0) {
            Some(true) => self.step_change(),
            Some(false) => {
                self.step_message();
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// A frame that has begun to go out has passed this.
    fn has_receive_for_front(&self) -> bool {
        self.outbox.progress() > 0 || self.peer_receives.has_room()
    }

    /// Whether, once the front frame is out, the next one goes with the same doorbell.
    fn more_follows(&self) -> bool {
        self.outbox.is_post(1).is_some() && self.peer_receives.has_room_for_two()
    }

    fn step_message(&mut self) {
        let signalled = self.requests.signal_due() || !self.more_follows();
        let (entry, _) =
            self.outbox.front(self.own.to_tell(), self.own_receives.to_tell()).expect("the caller saw it");
        let (wire, header) = (entry.wire, entry.header);
        self.post_message(&wire, &header, signalled);
        self.outbox.advance(HEADER_LEN, |_| ());
    }

    /// Posts the next work request of the front frame, a change: all that is left of it, or what is in one piece here
    /// and stands in one piece there.
    fn step_change(&mut self) -> Result<bool, DownReason> {
        let follows = self.more_follows();
        let Self { endpoint, outbox, registrations, requests, headers, headers_region, .. } = self;
        let front = outbox.front(self.own.to_tell(), self.own_receives.to_tell());
        let (entry, progress) = front.expect("the caller saw it");
        let (header, frame_len) = (&entry.header, entry.header.frame_len());
        let (id, out) = (requests.posted + 1, progress.saturating_sub(HEADER_LEN));
        if progress == 0 {
            self.place = self.peer_places.next(self.peer.is_empty());
        }
        // What crosses the end of the ring goes on at its beginning, by another request.
        let (at, room) = self.peer_places.part(self.place, progress);
        let len_max = endpoint.write_len_max().min(room);
        let mut bounced = false;
        let payload = match &entry.span {
            None => None,
            // A header alone takes all that is left of the ring.
            Some(_) if progress == 0 && len_max == HEADER_LEN => None,
            Some(span) => {
                let resync = header.flags & flags::RESYNC != 0;
                let len_max = if progress == 0 { len_max - HEADER_LEN } else { len_max };
                match registrations.source(span, out, len_max, resync, id) {
                    Source::Direct(piece) => Some(piece),
                    Source::Bounced(piece) => {
                        bounced = true;
                        Some(piece)
                    }
                    Source::Wait => return Ok(false),
                    Source::Medium => return Err(DownReason::Medium),
                }
            }
        };
        let payload_len = payload.as_ref().map_or(0, |piece| piece.len);
        let whole = out + payload_len == header.payload_len();
        let signalled = bounced || requests.signal_due() || (whole && !follows);
        let immediate = whole.then(|| PeerPlaces::immediate(self.place));
        let bytes = if progress == 0 {
            let slots = (headers.len() / HEADER_LEN) as u64;
            let slot = usize::try_from(self.headers_used % slots).expect("64-bit") * HEADER_LEN;
            self.headers_used += 1;
            headers.sub(slot, HEADER_LEN).write_from(&entry.wire);
            let header = Piece { region: &*headers_region, offset: slot, len: HEADER_LEN };
            self.peer_places.begin(self.place, frame_len);
            match payload {
                Some(payload) => endpoint.write(&[header, payload], at, immediate, id, signalled),
                None => endpoint.write(&[header], at, immediate, id, signalled),
            }
            HEADER_LEN + payload_len
        } else {
            let payload = payload.expect("a frame that is partly out has payload left");
            endpoint.write(&[payload], at, immediate, id, signalled);
            payload_len
        };
        requests.post(signalled);
        let Self { own, own_receives, peer, peer_receives, flights, .. } = self;
        let padding = if whole { frame_len - progress - bytes } else { 0 };
        outbox.advance(bytes + padding, |entry| {
            own.told(entry.header.ring_returned);
            own_receives.told(entry.header.receives);
            peer.sent(frame_len);
            peer_receives.posted();
            flights.push_back(Flight { last_id: id, token: entry.token });
        });
        Ok(true)
    }

    /// Every request up to `id` is done.
    fn done_up_to(&mut self, id: u64) {
        assert!(
            self.requests.done < id && id <= self.requests.posted,
            "the device completed request {id}, which is not open"
        );
        self.requests.done = id;
        self.done_unseen = true;
        self.registrations.done_up_to(id);
        while let Some(flight) = self.flights.front()
            && flight.last_id <= id
        {
            self.sent.extend(flight.token);
            self.flights.pop_front();
        }
    }

    /// Takes what the device has, while `events` has room up to `limit`.
    fn deliver(&mut self, events: &mut Vec<LinkEvent>, limit: usize) {
        let taken = std::mem::take(&mut self.taken);
        self.told(taken, events);
        while events.len() < limit && self.state.delivers() && !self.drained {
            let room = (limit - events.len()).min(RDMA_COMPLETIONS_MAX);
            let count = match self.endpoint.poll(&mut self.completions[..room]) {
                Ok(count) => count,
                // A send may have failed before something arrived that is still in the device: the cut brings it out.
                Err(error) if self.state.is_open() => {
                    self.fail(error);
                    continue;
                }
                Err(_) => {
                    self.drained = true;
                    return;
                }
            };
            self.told(count, events);
            if count < room {
                self.drained = !self.state.is_open();
                return;
            }
        }
    }

    /// Tells the first `count` completions.
    fn told(&mut self, count: usize, events: &mut Vec<LinkEvent>) {
        for at in 0..count {
            let event = match self.completions[at] {
                Completion::Done { id } => {
                    self.done_up_to(id);
                    continue;
                }
                Completion::Placed { immediate } => self.placed(immediate),
                Completion::Message { bytes } => self.message(&bytes),
                Completion::MessageLength { found } => Err(Violation::MessageLength { found }.into()),
            };
            match event {
                Ok(event) => events.push(event),
                Err(reason) => return self.end(reason, false),
            }
        }
    }

    /// A change stands in our ring, the peer says.
    fn placed(&mut self, immediate: u32) -> Result<LinkEvent, DownReason> {
        self.own_receives.consume();
        let place = self.own_places.locate(immediate, self.own.is_told_empty())?;
        let mut bytes = [0; HEADER_LEN];
        self.ring.sub(place, HEADER_LEN).read_into(&mut bytes);
        let header = self.header(&bytes, true)?;
        let frame_len = header.frame_len();
        self.own.admit(frame_len)?;
        self.own_places.arrive(place, frame_len);
        self.received += frame_len as u64;
        let ring_end = self.own.arrive(frame_len);
        let payload = self.ring.sub(place + HEADER_LEN, header.payload_len());
        Ok(LinkEvent::Arrived(Slot { header, payload, ring_end, stream_end: ring_end }))
    }

    fn message(&mut self, bytes: &[u8; HEADER_LEN]) -> Result<LinkEvent, DownReason> {
        self.own_receives.consume();
        let header = self.header(bytes, false)?;
        self.received += HEADER_LEN as u64;
        Ok(LinkEvent::Message(header))
    }

    /// Reads a header and takes in what it returns.
    fn header(&mut self, bytes: &[u8; HEADER_LEN], placed: bool) -> Result<Header, DownReason> {
        let header = Header::decode(bytes)?;
        if header.kind.is_posted() != placed {
            let how = if placed { "placed in the ring" } else { "as a message" };
            return Err(Violation::Carrier { kind: header.kind, how }.into());
        }
        self.peer.returned(header.ring_returned)?;
        self.peer_receives.returned(header.receives)?;
        self.outbox.saw(header.epoch);
        Ok(header)
    }

    /// Tells frames that are done.
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
        if !self.sent.is_empty() || (deliver && !self.drained) {
            return;
        }
        while events.len() < limit {
            let Some(flight) = self.flights.pop_front() else { break };
            events.extend(flight.token.map(LinkEvent::Failed));
        }
        if self.flights.is_empty() && self.outbox.fail(events, limit) && events.len() < limit {
            events.extend(self.state.finish().map(LinkEvent::Down));
        }
    }
}

impl<E: Endpoint> Link for RdmaLink<E> {
    fn claim(&mut self, payload_len: usize) -> Option<Permit> {
        if !self.state.is_open() || !self.peer_receives.may_claim() {
            return None;
        }
        let permit = self.peer.claim(payload_len)?;
        self.peer_receives.claim();
        Some(permit)
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
        if self.state.is_open() {
            self.look_around();
        }
        self.report_sent(events, limit);
        self.deliver(events, limit);
        self.report_sent(events, limit);
        self.flush();
        self.wind_up(events, limit);
        events.len() > before
    }

    fn has_backlog(&self) -> bool {
        match self.state {
            State::Open => self.taken > 0 || !self.sent.is_empty(),
            State::Draining { .. } | State::Ending { .. } => true,
            State::Ended => false,
        }
    }

    fn prepare_sleep(&mut self) -> bool {
        if self.has_backlog() {
            return false;
        }
        if self.state.is_ended() {
            return true;
        }
        self.slept = true;
        // What an end or an event made readable while we were awake is not announced again: look before sleeping.
        self.look_around();
        if !self.state.is_open() {
            return false;
        }
        self.slept = true;
        if let Err(error) = self.endpoint.notify() {
            self.fail(error);
            return false;
        }
        // What completed before that call would wake nobody.
        match self.endpoint.poll(&mut self.completions) {
            Ok(count) => self.taken = count,
            Err(error) => self.fail(error),
        }
        self.taken == 0 && self.state.is_open()
    }

    fn polls_for_free(&self) -> bool {
        true
    }

    fn received_bytes(&self) -> u64 {
        self.received
    }

    fn host_silence(&self) -> Option<Duration> {
        if self.done_unseen {
            return Some(Duration::ZERO);
        }
        self.last_done.map(|at| at.elapsed())
    }

    fn release(&mut self, slot: Slot) {
        self.own.release(slot.header.frame_len(), slot.ring_end);
    }

    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)> {
        if self.state.is_ended() {
            return None;
        }
        Some((self.sleep_on.as_fd(), Interest { readable: true, writable: false }))
    }

    fn close(&mut self, reason: DownReason) {
        self.end(reason, false);
    }

    fn name(&self) -> &'static str {
        "rdma"
    }
}

impl<E: Endpoint> Drop for RdmaLink<E> {
    fn drop(&mut self) {
        self.cut();
    }
}

impl<E: Endpoint> fmt::Debug for RdmaLink<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaLink")
            .field("state", &self.state)
            .field("requests", &self.requests)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

/// One descriptor that is readable when any of the link's is.
fn sleep_on<E: Endpoint>(endpoint: &E, companion: Option<&TcpStream>) -> io::Result<OwnedFd> {
    let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let companion = companion.map(AsFd::as_fd);
    for (number, fd) in (0..).zip(endpoint.descriptors().into_iter().chain(companion)) {
        watch(&all, fd, number)?;
    }
    Ok(all)
}

fn watch(all: &OwnedFd, fd: BorrowedFd<'_>, number: u64) -> io::Result<()> {
    Ok(epoll::add(all, fd, EventData::new_u64(number), EventFlags::IN | EventFlags::RDHUP)?)
}

#[cfg(test)]
mod tests;

//! The laws every transport keeps, as one test suite: give it a way to make two joined ends and it plays both.
//!
//! Hidden from the documentation because only tests call it: [`link_conformance!`](crate::link_conformance) makes one test of each
//! law. Each panics with the law that was broken. Sizes and orders are random from fixed seeds; every wait is bounded.
//!
//! The suite watches an end through [`End`], which checks at each poll what holds always: no more events than allowed,
//! payloads as announced, each token reported once, nothing after the end.

use crate::limits::{LINK_EVENTS_MAX, MESSAGES_QUEUED_MAX, PAYLOAD_LEN_MAX, POSTS_OPEN_MAX, RING_LEN_MIN};
use crate::transport::{DownReason, Link, LinkEvent, Slot};
use crate::units::{ByteRange, Epoch, Seq, Token};
use crate::wire::{Header, Kind};
use costandby_ffi::mapping::{Mapping, Span};
use rustix::event::epoll::{self, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Two joined ends.
pub type Ends = (Box<dyn Link>, Box<dyn Link>);

/// Makes two joined ends, each with a ring of so many bytes.
pub type Make<'a> = &'a dyn Fn(usize) -> Ends;

/// One test a law, for the transport whose ends the given closure makes.
#[doc(hidden)]
#[macro_export]
macro_rules! link_conformance {
    ($make:expr) => {
        $crate::link_conformance! { $make =>
            frames_and_messages_keep_one_order,
            the_ring_goes_round_at_any_size,
            the_largest_frame_passes,
            sent_is_not_an_ack,
            claim_waits_for_release,
            a_peer_that_does_not_read_cannot_grow_us,
            an_ack_that_waits_gives_way_to_the_next,
            a_poll_is_bounded_and_owns_up_to_the_rest,
            each_frame_wakes_who_sleeps,
            closing_here_fails_each_token_once,
            closing_there_comes_after_all_that_arrived,
            an_end_that_is_dropped_is_closed,
            nothing_is_delivered_after_closing_here,
        }
    };
    ($make:expr => $($law:ident),* $(,)?) => {
        $(
            #[test]
            fn $law() {
                $crate::testing::conformance::$law(&$make);
            }
        )*
    };
}

/// How long any step of a law may take; a healthy one takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Turns until `done`, at most for [`PATIENCE`].
///
/// # Panics
/// When it takes longer.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// Numbers that look random and are the same every time (a 64-bit linear congruential step, upper half).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall as `seed` says.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        usize::try_from((self.0 >> 32) % bound as u64).expect("below a usize")
    }
}

/// Memory that payloads are sent from: bytes at an offset never change, so a header says what to expect.
#[derive(Debug)]
pub struct Source {
    span: Span,
    bytes: Vec<u8>,
}

impl Source {
    /// `len` bytes that differ from place to place.
    ///
    /// # Panics
    /// When the system gives no memory.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let mut dice = Dice::new(len as u64);
        let bytes: Vec<u8> = (0..len).map(|_| dice.below(256).to_le_bytes()[0]).collect();
        let span = Mapping::anonymous(len).expect("memory").span(0, len);
        span.write_from(&bytes);
        Self { span, bytes }
    }

    /// The change that writes `len` of these bytes from `start` on, and its payload.
    #[must_use]
    pub fn write(&self, seq: u64, start: usize, len: usize) -> (Header, Span) {
        let span = self.span.sub(start, len);
        let header = Header {
            seq: Seq(seq),
            range: ByteRange::new(start as u64, len as u64),
            payload_crc: span.crc32c(),
            ..Header::new(Kind::Write, Epoch(1))
        };
        (header, span)
    }

    fn check(&self, slot: &Slot) {
        let start = usize::try_from(slot.header.range.start).expect("64-bit");
        let mut found = vec![0; slot.header.payload_len()];
        slot.payload.read_into(&mut found);
        assert!(
            found == self.bytes[start..start + found.len()],
            "payload of seq {} differs",
            slot.header.seq
        );
    }
}

/// A header-only frame of `kind` that can be told apart by `seq`.
#[must_use]
pub fn plain(kind: Kind, seq: u64) -> Header {
    let len = u64::from(kind.is_change() || kind == Kind::Read);
    Header { seq: Seq(seq), range: ByteRange::new(0, len), ..Header::new(kind, Epoch(1)) }
}

/// One end and all it told.
#[derive(Default)]
pub struct End {
    link: Option<Box<dyn Link>>,
    events: Vec<LinkEvent>,
    /// Changes that arrived and are not released.
    pub held: VecDeque<Slot>,
    /// Everything that arrived, in order, signs of life aside.
    pub heard: Vec<(Kind, u64)>,
    /// Tokens reported sent.
    pub sent: Vec<u64>,
    /// Tokens reported failed.
    pub failed: Vec<u64>,
    /// How it ended.
    pub down: Option<DownReason>,
    posted: u64,
}

impl End {
    /// Watches a link.
    #[must_use]
    pub fn new(link: Box<dyn Link>) -> Self {
        Self { link: Some(link), ..Self::default() }
    }

    /// The link.
    ///
    /// # Panics
    /// After [`End::drop_link`].
    pub fn link(&mut self) -> &mut dyn Link {
        self.link.as_deref_mut().expect("the link was not dropped")
    }

    /// Drops the link as a dying owner does.
    pub fn drop_link(&mut self) {
        self.link = None;
    }

    /// Posts a header-only change if there is room.
    pub fn post_plain(&mut self, seq: u64) -> bool {
        self.post(plain(Kind::Trim, seq), None)
    }

    /// Posts a change if there is room. Its token is the number of posts before it.
    pub fn post(&mut self, header: Header, span: Option<Span>) -> bool {
        let Some(permit) = self.link().claim(header.payload_len()) else { return false };
        let token = Token(self.posted);
        self.posted += 1;
        self.link().post(permit, header, span, token);
        true
    }

    /// One kick and one poll, checked and written down.
    ///
    /// # Panics
    /// When an ever-lasting law is broken.
    pub fn turn(&mut self, expected: &Source) {
        self.link().kick();
        self.listen(expected);
    }

    /// One poll without a kick, checked and written down.
    ///
    /// # Panics
    /// When an ever-lasting law is broken.
    pub fn listen(&mut self, expected: &Source) {
        let mut events = std::mem::take(&mut self.events);
        let told = self.link().poll(&mut events);
        assert_eq!(told, !events.is_empty(), "poll says whether it told anything");
        assert!(events.len() <= LINK_EVENTS_MAX, "{} events in one poll", events.len());
        for event in events.drain(..) {
            assert!(self.down.is_none(), "{event:?} after the end");
            self.note(event, expected);
        }
        self.events = events;
    }

    fn note(&mut self, event: LinkEvent, expected: &Source) {
        match event {
            LinkEvent::Sent(Token(token)) => self.sent.push(token),
            LinkEvent::Failed(Token(token)) => self.failed.push(token),
            LinkEvent::Arrived(slot) => {
                assert!(slot.header.kind.is_posted(), "{:?} took a slot", slot.header.kind);
                expected.check(&slot);
                self.heard.push((slot.header.kind, slot.header.seq.0));
                self.held.push_back(slot);
            }
            LinkEvent::Message(header) => {
                assert!(!header.kind.is_posted(), "{:?} came without a slot", header.kind);
                if header.kind != Kind::KeepAlive {
                    self.heard.push((header.kind, header.seq.0));
                }
            }
            LinkEvent::Down(reason) => self.down = Some(reason),
        }
    }

    /// Releases the oldest held change.
    pub fn release(&mut self, expected: &Source) {
        if let Some(slot) = self.held.pop_front() {
            // The peer must not have touched it while it was held.
            expected.check(&slot);
            self.link().release(slot);
        }
    }

    /// Asserts that each token was reported, once, and sent ones before failed ones.
    ///
    /// # Panics
    /// When not.
    pub fn assert_each_token_once(&self) {
        let told: Vec<u64> = self.sent.iter().chain(&self.failed).copied().collect();
        assert_eq!(told, (0..self.posted).collect::<Vec<_>>(), "each token once, in order");
    }
}

/// Two ends that are watched.
fn watched(make: Make<'_>, ring_len: usize) -> (End, End) {
    let (here, there) = make(ring_len);
    (End::new(here), End::new(there))
}

/// A ring small enough to fill in a test.
const RING: usize = 2 * RING_LEN_MIN;

/// Times that traffic goes round the ring at least.
const LAPS_MIN: u64 = 8;

struct Traffic {
    seed: u64,
    /// At least; more where a slow device has taken in too little by then.
    steps: u64,
    payload_max: usize,
    /// Whether the second end sends too.
    both_ways: bool,
}

/// Random posts, messages, turns and releases; then everything is let through and compared.
fn play(make: Make<'_>, ring_len: usize, traffic: &Traffic) {
    let source = Source::new(2 * traffic.payload_max);
    let mut dice = Dice::new(traffic.seed);
    let (first, second) = watched(make, ring_len);
    let mut ends = [first, second];
    let mut issued = [Vec::new(), Vec::new()];
    let begun = Instant::now();
    for seq in 1.. {
        if seq > traffic.steps && ends[1].link().received_bytes() / ring_len as u64 >= LAPS_MIN {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "too little is taken in within {PATIENCE:?}");
        let who = if traffic.both_ways { dice.below(2) } else { 0 };
        let end = &mut ends[who];
        let header = match dice.below(8) {
            0 => plain([Kind::Flush, Kind::Control, Kind::Read][dice.below(3)], seq),
            1 => plain([Kind::Trim, Kind::WriteZeroes][dice.below(2)], seq),
            _ => {
                let len = 1 + dice.below(traffic.payload_max);
                let (header, _) = source.write(seq, dice.below(traffic.payload_max), len);
                // Bytes that were asked for travel as those that are to be written do.
                Header { kind: [Kind::Write, Kind::ReadReply][dice.below(2)], ..header }
            }
        };
        let start = usize::try_from(header.range.start).expect("64-bit");
        let span = (header.payload_len() > 0).then(|| source.span.sub(start, header.payload_len()));
        let taken = match header.kind.is_posted() {
            true => end.post(header, span),
            false => end.link().send(header).is_ok(),
        };
        if taken {
            issued[who].push((header.kind, seq));
        }
        for _ in 0..dice.below(3) {
            ends[dice.below(2)].turn(&source);
        }
        if dice.below(3) == 0 || !taken {
            let end = &mut ends[dice.below(2)];
            (0..dice.below(8)).for_each(|_| end.release(&source));
        }
    }
    until("everything is through", || {
        for end in &mut ends {
            end.turn(&source);
            (0..16).for_each(|_| end.release(&source));
        }
        ends[1].heard.len() >= issued[0].len() && ends[0].heard.len() >= issued[1].len()
    });
    until("everything is reported", || {
        ends.iter_mut().for_each(|end| end.turn(&source));
        ends.iter().all(|end| end.sent.len() as u64 == end.posted)
    });
    assert!(ends[1].heard == issued[0], "what the first end issued arrives in order, once");
    assert!(ends[0].heard == issued[1], "what the second end issued arrives in order, once");
    ends.iter().for_each(End::assert_each_token_once);
}

/// Frames and messages, both ways at once, arrive in the order issued.
pub fn frames_and_messages_keep_one_order(make: Make<'_>) {
    for seed in [1, 2, 3] {
        play(make, RING, &Traffic { seed, steps: 4000, payload_max: 9000, both_ways: true });
    }
}

/// A one-way flow goes round the ring many times, with sizes from one byte to the largest that fits, although the
/// receiver itself never sends anything.
pub fn the_ring_goes_round_at_any_size(make: Make<'_>) {
    let payload_max = crate::transport::frame_len_max(RING) - 64;
    play(make, RING, &Traffic { seed: 4, steps: 1500, payload_max, both_ways: false });
    play(make, RING, &Traffic { seed: 5, steps: 30_000, payload_max: 700, both_ways: false });
}

/// One request of the largest size, twice.
pub fn the_largest_frame_passes(make: Make<'_>) {
    let len = PAYLOAD_LEN_MAX as usize;
    let source = Source::new(len);
    let (mut here, mut there) = watched(make, 2 * len);
    for seq in 1..=2 {
        let (header, span) = source.write(seq, 0, len);
        until("there is room", || {
            here.turn(&source);
            there.turn(&source);
            here.post(header, Some(span.clone()))
        });
        until("it is here", || {
            here.turn(&source);
            there.turn(&source);
            !there.held.is_empty()
        });
        there.release(&source);
    }
    assert_eq!(there.heard, [(Kind::Write, 1), (Kind::Write, 2)]);
}

/// A small frame is reported sent while the peer has not looked at it at all.
pub fn sent_is_not_an_ack(make: Make<'_>) {
    let source = Source::new(4096);
    let (mut here, mut there) = watched(make, RING);
    let (header, span) = source.write(1, 0, 4096);
    assert!(here.post(header, Some(span)));
    assert!(here.sent.is_empty());
    until("sent", || {
        here.turn(&source);
        !here.sent.is_empty()
    });
    assert!(there.heard.is_empty());
    until("arrived", || {
        there.turn(&source);
        !there.heard.is_empty()
    });
    here.assert_each_token_once();
}

/// A peer that reads but releases nothing makes `claim` say so, at the ring's size; releasing makes it go on.
pub fn claim_waits_for_release(make: Make<'_>) {
    let source = Source::new(8192);
    let (mut here, mut there) = watched(make, RING);
    let mut posted = 0;
    let mut idle_turns = 0;
    while idle_turns < 100 {
        let (header, span) = source.write(posted + 1, 0, 4000);
        let taken = here.post(header, Some(span));
        posted += u64::from(taken);
        idle_turns = if taken { 0 } else { idle_turns + 1 };
        here.turn(&source);
        there.turn(&source);
        assert!(posted * 4000 <= RING as u64, "more is out than the ring holds");
    }
    assert!(posted * 4000 > RING as u64 / 2, "half of the ring at least is of use");
    until("all posted arrived", || {
        here.turn(&source);
        there.turn(&source);
        there.heard.len() as u64 == posted
    });
    until("there is room again", || {
        there.release(&source);
        there.turn(&source);
        here.turn(&source);
        let (header, span) = source.write(posted + 1, 0, 4000);
        here.post(header, Some(span))
    });
}

/// Against a peer that reads nothing, `send` and `claim` refuse in the end; when it reads, all that was taken arrives.
pub fn a_peer_that_does_not_read_cannot_grow_us(make: Make<'_>) {
    let source = Source::new(64);
    let (mut here, mut there) = watched(make, RING_LEN_MIN);
    let mut issued = Vec::new();
    let mut posts = 0;
    while here.post_plain(posts) {
        issued.push((Kind::Trim, posts));
        posts += 1;
        assert!(posts <= POSTS_OPEN_MAX as u64, "permits are bounded");
    }
    let mut refused = 0;
    for seq in 0..20_000_000_u64 {
        match here.link().send(plain(Kind::Control, seq)) {
            Ok(()) => {
                issued.push((Kind::Control, seq));
                refused = 0;
            }
            Err(_) => refused += 1,
        }
        if refused > 2 * MESSAGES_QUEUED_MAX {
            break;
        }
        if seq % 128 == 0 || refused > 0 {
            here.turn(&source);
        }
    }
    assert!(refused > 0, "messages to a peer that does not read are refused in the end");
    until("all that was taken is through", || {
        here.turn(&source);
        there.turn(&source);
        while !there.held.is_empty() {
            there.release(&source);
        }
        there.heard.len() >= issued.len()
    });
    assert!(there.heard == issued, "in order, once");
    assert!(here.link().send(plain(Kind::Control, 0)).is_ok(), "and there is credit again");
}

/// Of acks that wait together only the last needs to arrive; none arrives after a later one.
pub fn an_ack_that_waits_gives_way_to_the_next(make: Make<'_>) {
    let source = Source::new(64);
    let (mut here, mut there) = watched(make, RING);
    let last = 4 * MESSAGES_QUEUED_MAX as u64;
    for seq in 1..=last {
        here.link().send(plain(Kind::Ack, seq)).expect("acks that wait take no credit");
    }
    until("the last ack", || {
        here.turn(&source);
        there.turn(&source);
        there.heard.last() == Some(&(Kind::Ack, last))
    });
    assert!(there.heard.is_sorted_by_key(|heard| heard.1));
    assert!(there.heard.len() < MESSAGES_QUEUED_MAX);
}

/// One poll tells at most so many events. Whoever sleeps only while there is neither a backlog nor readiness of the
/// descriptor misses nothing, and whoever looks at a backlog finds something.
pub fn a_poll_is_bounded_and_owns_up_to_the_rest(make: Make<'_>) {
    let source = Source::new(64);
    let (mut here, mut there) = watched(make, RING);
    let count = 4 * LINK_EVENTS_MAX + 1;
    for seq in 0..count as u64 {
        assert!(here.post_plain(seq));
    }
    until("all of them are out", || {
        here.turn(&source);
        here.sent.len() == count
    });
    assert!(!here.link().has_backlog(), "all is reported");
    until("the first of them", || {
        there.turn(&source);
        !there.heard.is_empty()
    });
    assert!(there.heard.len() < count);
    until("sleep", || {
        let before = there.heard.len();
        let backlog = there.link().has_backlog();
        if backlog || !there.link().prepare_sleep() || readable(there.link()) {
            there.turn(&source);
            assert!(
                !backlog || there.heard.len() > before,
                "a backlog that tells nothing would spin the reactor"
            );
            return false;
        }
        true
    });
    assert_eq!(there.heard.len(), count, "an end that sleeps has told everything");
}

/// Each single frame or message wakes who prepared its sleep and then watches the descriptor for *changes* only
/// (edge-triggered), as the reactor does, however often.
pub fn each_frame_wakes_who_sleeps(make: Make<'_>) {
    let source = Source::new(64);
    let (mut here, mut there) = watched(make, RING);
    let Some((fd, _)) = there.link().arm() else { return };
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
    let watch = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
    epoll::add(&poller, fd, epoll::EventData::new_u64(0), watch).expect("watched");
    for seq in 0..200 {
        // To sleep: nothing left to tell, and no wake-up left over from before.
        until("sleep", || {
            there.turn(&source);
            there.release(&source);
            !there.link().has_backlog() && there.link().prepare_sleep() && !wakes(&poller, Duration::ZERO)
        });
        let taken = match seq % 2 {
            0 => here.post_plain(seq),
            _ => here.link().send(plain(Kind::Flush, seq)).is_ok(),
        };
        if !taken {
            // Permits come back in the sleeper's next turns.
            here.turn(&source);
            continue;
        }
        let before = there.heard.len();
        // A slow device needs turns of its owner to get on with it, but none of the sleeper's.
        until("woken", || {
            here.turn(&source);
            wakes(&poller, Duration::from_millis(1))
        });
        until("heard", || {
            there.turn(&source);
            there.heard.len() > before
        });
    }
    assert!(there.heard.len() > 100, "permits were scarce");
    here.drop_link();
    until("woken by the end", || wakes(&poller, Duration::from_millis(1)));
    until("down", || {
        there.turn(&source);
        there.down.is_some()
    });
}

/// Whether the poller tells anything within `patience`.
fn wakes(poller: impl AsFd, patience: Duration) -> bool {
    let mut room = [const { MaybeUninit::<epoll::Event>::uninit() }; 4];
    let patience = Timespec::try_from(patience).expect("short");
    epoll::wait(poller, &mut room, Some(&patience)).is_ok_and(|(events, _)| !events.is_empty())
}

/// Whether the link's descriptor is ready to read, or becomes so in a moment.
fn readable(link: &mut dyn Link) -> bool {
    let Some((fd, interest)) = link.arm() else { return false };
    assert!(interest.readable, "the ring has room");
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let moment = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    poll(&mut fds, Some(&moment)).expect("poll") > 0
}

/// Posts until nothing more goes out, so that some frames are out and some are not.
fn fill(end: &mut End, source: &Source) {
    for seq in 0..POSTS_OPEN_MAX as u64 {
        let (header, span) = source.write(seq, 0, 4000);
        if !end.post(header, Some(span)) {
            break;
        }
        if seq < 4 {
            end.turn(source);
        }
    }
}

/// Closing reports each token once, as sent or failed, then the end with the reason given.
pub fn closing_here_fails_each_token_once(make: Make<'_>) {
    let source = Source::new(4096);
    let (mut here, mut there) = watched(make, RING);
    fill(&mut here, &source);
    here.link().close(DownReason::Local("a test"));
    until("down", || {
        here.turn(&source);
        here.down.is_some()
    });
    assert!(matches!(here.down, Some(DownReason::Local("a test"))), "{:?}", here.down);
    assert!(!here.failed.is_empty(), "what was not kicked cannot have been sent");
    here.assert_each_token_once();
    assert!(here.link().claim(0).is_none());
    assert!(here.link().send(plain(Kind::Ack, 1)).is_err());
    assert!(!here.link().has_backlog());
    assert!(here.link().arm().is_none());
    (0..10).for_each(|_| here.turn(&source));
    until("down there", || {
        there.turn(&source);
        there.down.is_some()
    });
    assert!(matches!(there.down, Some(DownReason::Closed)), "{:?}", there.down);
    assert!(
        there.heard.iter().map(|heard| heard.1).eq(0..there.heard.len() as u64),
        "a prefix of what was posted"
    );
}

/// The other end's close is told after the frames that arrived before it.
pub fn closing_there_comes_after_all_that_arrived(make: Make<'_>) {
    let source = Source::new(4096);
    let (mut here, mut there) = watched(make, RING);
    for seq in 0..20 {
        assert!(there.post_plain(seq));
    }
    until("out", || {
        there.turn(&source);
        there.sent.len() == 20
    });
    there.link().close(DownReason::Local("a test"));
    fill(&mut here, &source);
    until("down", || {
        here.turn(&source);
        here.down.is_some()
    });
    assert!(matches!(here.down, Some(DownReason::Closed)), "{:?}", here.down);
    assert_eq!(here.heard.len(), 20);
    here.assert_each_token_once();
    // Held slots are still memory, and giving them back hurts nobody.
    here.release(&source);
}

/// An end whose owner died looks closed to the other.
pub fn an_end_that_is_dropped_is_closed(make: Make<'_>) {
    let source = Source::new(64);
    let (mut here, mut there) = watched(make, RING);
    there.drop_link();
    until("down", || {
        here.turn(&source);
        here.down.is_some()
    });
    assert!(matches!(here.down, Some(DownReason::Closed)), "{:?}", here.down);
}

/// Once closed here, not even what had arrived is delivered: this is what fencing rests on.
pub fn nothing_is_delivered_after_closing_here(make: Make<'_>) {
    let source = Source::new(64);
    let (mut here, mut there) = watched(make, RING);
    let count = 3 * LINK_EVENTS_MAX;
    for seq in 0..count as u64 {
        assert!(there.post_plain(seq));
    }
    until("some arrived", || {
        there.turn(&source);
        here.turn(&source);
        !here.heard.is_empty()
    });
    let heard = here.heard.len();
    assert!(heard < count);
    here.link().close(DownReason::Local("fenced"));
    until("down", || {
        here.turn(&source);
        here.down.is_some()
    });
    assert_eq!(here.heard.len(), heard);
}

//! Two volumes joined by a loopback link in one thread: what clients are told, what both disks hold, and that nothing
//! is left behind. Random runs are in `tests/random.rs`.

use super::interface::{Before, Direction};
use super::*;
use crate::disk::pool::WorkerPool;
use crate::disk::record::Record;
use crate::limits::RING_LEN_MIN;
use crate::transport::loopback;
use crate::transport::{DownReason, Link, LinkEvent};
use crate::units::{AckLevel, ByteRange, Epoch, OnPeerLoss, Seq};
use crate::waker::Waker;
use crate::wire::Header;
use crossbeam_channel::Receiver;
use links::{Ends, Make};
use std::collections::HashMap;
use std::time::Duration;

mod delta;
mod diskless;
mod faults;
mod links;
mod parting;
mod random;
mod verify;

/// Not a whole number of grains, and room for the copy to have several steps.
const SIZE: u64 = 24 * crate::limits::DIRTY_GRAIN_LEN + 4096;
const RING_LEN: usize = 4 * RING_LEN_MIN;
/// Longest a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(120);

/// A volume with its worker threads, played by hand.
struct Node {
    volume: Volume,
    jobs: Receiver<JobDone>,
    /// Results told, by the slot of the request's origin.
    told: HashMap<u32, Vec<Result<(), IoError>>>,
    granted: Vec<(u32, Token)>,
    events: Vec<Event>,
}

impl Node {
    fn new(ack: AckLevel, on_peer_loss: OnPeerLoss) -> Self {
        Self::with_disk(DiskImage::memory("test", SIZE).expect("memory"), ack, on_peer_loss)
    }

    fn with_disk(disk: Arc<DiskImage>, ack: AckLevel, on_peer_loss: OnPeerLoss) -> Self {
        let record = Record::in_memory(disk.size());
        Self::with_record(disk, record, ack, on_peer_loss)
    }

    fn with_record(disk: Arc<DiskImage>, record: Record, ack: AckLevel, on_peer_loss: OnPeerLoss) -> Self {
        let (done, jobs) = crossbeam_channel::unbounded();
        let bell = Waker::new().expect("bell");
        let workers = DiskWorkers::in_pool(&WorkerPool::new(&done, &bell), 0, &disk, record.store());
        let spec = VolumeSpec { name: "v".into(), disk, ack, on_peer_loss, checksum_first: false, record };
        let volume = Volume::new(0, spec, workers, Instant::now());
        Self { volume, jobs, told: HashMap::new(), granted: Vec::new(), events: Vec::new() }
    }

    /// One turn of the loop, as the reactor makes it.
    fn turn(&mut self) {
        let now = Instant::now();
        self.volume.woke(now);
        while let Ok(done) = self.jobs.try_recv() {
            self.volume.job_done(done);
        }
        self.volume.poll(now);
        self.volume.pump(now);
        for notice in self.volume.notices.drain(..) {
            match notice {
                Notice::Granted { origin: Origin::Queue { slot, .. }, token } => {
                    self.granted.push((slot, token));
                }
                Notice::Done { origin: Origin::Queue { slot, .. }, result } => {
                    self.told.entry(slot).or_default().push(result);
                }
                // This front end answers a read as soon as it is granted, and its NBD clients are gone.
                Notice::Unpin { .. } | Notice::Done { origin: Origin::Nbd { .. }, .. } => {}
                other => panic!("a notice for nobody: {other:?}"),
            }
        }
        self.events.append(&mut self.volume.events);
    }

    fn begin(&mut self, slot: u32, op: Op, range: ByteRange, fua: bool) -> Begin {
        self.volume.begin(NewRequest { origin: Origin::Queue { queue: 0, slot }, op, range, fua })
    }

    /// Begins a write on a free range and lands it.
    fn write(&mut self, slot: u32, range: ByteRange, byte: u8) {
        let Begin::Go(token) = self.begin(slot, Op::Change(Kind::Write), range, false) else {
            panic!("{range} is not free")
        };
        self.fill(range, byte);
        self.volume.landed(token);
    }

    fn fill(&self, range: ByteRange, byte: u8) {
        let len = usize::try_from(range.len).expect("64-bit");
        self.volume.disk.span(range).write_from(&vec![byte; len]);
    }

    fn told(&self, slot: u32) -> &[Result<(), IoError>] {
        self.told.get(&slot).map_or(&[], Vec::as_slice)
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(SIZE).expect("64-bit")];
        self.volume.disk.span(ByteRange::new(0, SIZE)).read_into(&mut bytes);
        bytes
    }

    fn saw(&mut self, wanted: impl Fn(&Event) -> bool) -> bool {
        let before = self.events.len();
        self.events.retain(|event| !wanted(event));
        self.events.len() < before
    }

    fn assert_nothing_left(&self) {
        let v = &self.volume;
        v.requests.assert_nothing_left();
        v.session.assert_nothing_left();
        assert_eq!(v.pipeline.in_flight(), 0);
        assert_eq!(v.record.parked_len(), 0);
    }
}

/// Two nodes; `a` serves, `b` stands by.
struct Pair {
    a: Node,
    b: Node,
    epoch: Epoch,
}

impl Pair {
    fn new(ack: AckLevel, on_peer_loss: OnPeerLoss) -> Self {
        let mut a = Node::new(ack, on_peer_loss);
        a.volume.serve();
        Self { a, b: Node::new(ack, on_peer_loss), epoch: Epoch(1) }
    }

    /// With a session and equal disks.
    fn in_sync(ack: AckLevel) -> Self {
        let mut pair = Self::new(ack, OnPeerLoss::Continue);
        pair.connect(false);
        pair
    }

    /// With `resync` as control does it where the disks may differ anywhere.
    fn connect(&mut self, resync: bool) {
        if resync {
            self.a.volume.mark_all(Box::new(|result| result.expect("marked")));
        }
        self.join(resync);
    }

    /// A session; with `resync` a copy of what either has marked.
    fn join(&mut self, resync: bool) {
        self.join_after(Before::Unknown, resync);
    }

    /// The same where the source knows `before` of the target.
    fn join_after(&mut self, before: Before, resync: bool) {
        let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
        let now = Instant::now();
        self.a.volume.attach_after(before, Box::new(here), Direction::Source { resync }, self.epoch, now);
        self.b.volume.attach(Box::new(there), Direction::Target { resync }, self.epoch, now);
    }

    /// The source went on alone, and the target lives on.
    fn join_kept(&mut self) {
        let applied = self.b.volume.told_of_parting().expect("the target lives").applied;
        self.join_after(Before::Kept { applied }, true);
    }

    fn turn(&mut self) {
        self.a.turn();
        self.b.turn();
    }

    /// Turns until `done`; fails the test when that does not come.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !done(self) {
            self.turn();
            std::thread::yield_now();
            assert!(
                began.elapsed() < PATIENCE,
                "{what} never came; in flight {:?}; {:?} {:?}",
                self.a.volume.pipeline,
                self.a.events,
                self.b.events
            );
        }
    }

    fn until_told(&mut self, slot: u32) {
        self.until("an answer", |pair| !pair.a.told(slot).is_empty());
    }

    fn until_quiet(&mut self) {
        self.until("quiet", |pair| {
            let v = &pair.a.volume;
            v.requests.is_empty() && v.requests.locked_len() == 0
        });
    }

    /// Cuts the link and waits until both know. Returns what the source says of the peer's lag.
    fn cut(&mut self) -> bool {
        self.a.volume.close_link(DownReason::Local("cut by the test"));
        let (mut undurable, mut told) = (None, false);
        self.until("the end of the session", |pair| {
            let down = |e: &Event| matches!(e, Event::LinkDown { .. });
            if let Some(Event::LinkDown { undurable: lags, .. }) = pair.a.events.iter().find(|e| down(e)) {
                undurable = Some(*lags);
            }
            told |= pair.b.saw(down);
            undurable.is_some() && told
        });
        self.a.saw(|e| matches!(e, Event::LinkDown { .. }));
        undurable.expect("reported")
    }

    /// The session whose link was cut goes on over another.
    fn go_on(&mut self) {
        self.go_on_over(Make::Loopback.ends());
    }

    /// The same over this link.
    fn go_on_over(&mut self, (here, there): Ends) {
        let parted = self.b.volume.told_of_parting().expect("the target's session may go on");
        let map_told = self.a.volume.told_of_parting().expect("the source's too").map_told;
        let before = Before::GoesOn { applied: parted.applied, map_told };
        let resync = self.a.volume.background.is_copying();
        let now = Instant::now();
        let (source, target) = (Direction::Source { resync }, Direction::Target { resync });
        self.a.volume.attach_after(before, here, source, self.epoch, now);
        self.b.volume.attach_after(before, there, target, self.epoch, now);
    }

    fn assert_equal_and_clean(&self) {
        let (a, b) = (self.a.content(), self.b.content());
        if let Some(at) = (0..a.len()).find(|&at| a[at] != b[at]) {
            panic!("byte {at} is {} here and {} there", a[at], b[at]);
        }
        self.a.assert_nothing_left();
        self.b.assert_nothing_left();
    }
}

fn grains(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * crate::limits::DIRTY_GRAIN_LEN, count * crate::limits::DIRTY_GRAIN_LEN)
}

#[test]
fn a_write_is_answered_when_the_peer_holds_it() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let range = ByteRange::new(1000, 5000);
    pair.a.write(1, range, 7);
    pair.a.turn();
    pair.a.turn();
    assert_eq!(pair.a.told(1), [], "the peer has not moved yet");
    pair.until_told(1);
    assert_eq!(pair.a.told(1), [Ok(())]);
    let mut there = vec![0; 5000];
    pair.b.volume.disk.span(range).read_into(&mut there);
    assert!(there.iter().all(|b| *b == 7));
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn an_overlapping_request_waits_for_the_peers_word() {
    let mut pair = Pair::in_sync(AckLevel::Async);
    pair.a.write(1, ByteRange::new(0, 4096), 1);
    assert!(matches!(pair.a.begin(2, Op::Read, ByteRange::new(4000, 10), false), Begin::Waits(_)));
    assert!(matches!(
        pair.a.begin(3, Op::Change(Kind::Write), ByteRange::new(4000, 1000), false),
        Begin::Waits(_)
    ));
    pair.until("the read's turn", |pair| !pair.a.granted.is_empty());
    pair.turn();
    let (slot, read) = pair.a.granted[0];
    assert_eq!((slot, pair.a.granted.len()), (2, 1), "the change waits until the bytes are read");
    pair.a.volume.read_done(read);
    pair.until("the change's turn", |pair| pair.a.granted.len() == 2);
    let (slot, change) = pair.a.granted[1];
    assert_eq!(slot, 3);
    pair.a.fill(ByteRange::new(4000, 1000), 3);
    pair.a.volume.landed(change);
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn a_write_that_is_taken_back_before_it_is_placed_changes_nothing_and_frees_its_range() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let range = ByteRange::new(8192, 8192);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
    pair.a.begin(2, Op::Change(Kind::WriteZeroes), range, false);
    pair.a.volume.cancel_waiting(token);
    pair.until_told(2);
    pair.until_quiet();
    assert_eq!(pair.a.told(1), []);
    assert_eq!(pair.a.told(2), [Ok(())]);
    assert!(pair.a.volume.has_link(), "nobody is the worse for it");
    pair.assert_equal_and_clean();
    pair.a.assert_nothing_left();
}

#[test]
fn changes_of_a_client_that_is_gone_are_not_begun_and_those_that_have_begun_are_carried_out() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let range = ByteRange::new(8192, 8192);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
    let of = |connection, serial| Origin::Nbd { connection, serial, cookie: 0 };
    let zeroes = |origin, start| NewRequest {
        origin,
        op: Op::Change(Kind::Trim),
        range: ByteRange::new(start, 4096),
        fua: true,
    };
    pair.a.fill(range, 9);
    pair.a.fill(ByteRange::new(0, 4096), 9);
    assert!(matches!(pair.a.volume.begin(zeroes(of(3, 7), 8192)), Begin::Waits(_)));
    assert!(matches!(pair.a.volume.begin(zeroes(of(3, 8), 12288)), Begin::Waits(_)));
    assert!(matches!(pair.a.volume.begin(zeroes(of(3, 7), 0)), Begin::Go(_)));
    assert_eq!(pair.a.volume.cancel_changes_of(3, 7), 1, "the one that waits");
    pair.a.volume.landed(token);
    pair.until_quiet();
    pair.assert_equal_and_clean();
    let there = pair.b.content();
    assert_eq!((there[0], there[8192], there[12288]), (0, 9, 0));
    pair.a.assert_nothing_left();
}

#[test]
fn a_flush_and_zeroes_and_trims_of_any_length_reach_both_disks() {
    let mut pair = Pair::in_sync(AckLevel::Durable);
    pair.a.write(1, grains(0, 3), 1);
    pair.until_told(1);
    let small = ByteRange::new(100, 5000);
    pair.a.begin(2, Op::Change(Kind::WriteZeroes), small, false);
    pair.a.begin(3, Op::Change(Kind::WriteZeroes), grains(1, 2), true);
    pair.a.begin(4, Op::Change(Kind::Trim), grains(0, 2), false);
    pair.a.begin(5, Op::Flush, ByteRange::new(0, 0), false);
    for slot in 2..=5 {
        pair.until_told(slot);
        assert_eq!(pair.a.told(slot), [Ok(())]);
    }
    pair.until_quiet();
    pair.assert_equal_and_clean();
    assert!(pair.b.volume.disk.span(grains(0, 3)).is_zero());
}

#[test]
fn the_copy_makes_a_foreign_disk_equal_says_so_once_and_then_no_more() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Freeze);
    pair.a.fill(grains(5, 3), 5);
    pair.a.fill(ByteRange::new(SIZE - 10, 10), 6);
    pair.b.fill(ByteRange::new(0, SIZE), 0xEE);
    pair.connect(true);
    pair.a.write(1, grains(20, 1), 8);
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    assert_eq!(pair.a.told(1), [], "frozen until the peer is in sync on record");
    pair.a.volume.peer_in_sync();
    pair.until_told(1);
    pair.until_quiet();
    pair.assert_equal_and_clean();
    assert_eq!(pair.a.volume.record.dirty().dirty_bytes(), 0);
    assert!(!pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })), "once");
    pair.until("its last word as durable", |pair| {
        if !pair.a.volume.pipeline.peer_lags_durably() {
            return true;
        }
        let slot = u32::try_from(pair.a.told.len()).expect("few") + 100;
        pair.a.begin(slot, Op::Flush, ByteRange::new(0, 0), false);
        pair.until_told(slot);
        false
    });
    assert!(!pair.cut(), "a peer in sync and flushed is not behind");
}

#[test]
fn a_cut_copy_leaves_no_trace_and_does_not_vouch_for_the_next() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    pair.a.fill(ByteRange::new(0, SIZE), 3);
    pair.connect(true);
    // Up to the copy's last flush, which the peer never gets to answer.
    let mut turns = 0;
    while !pair.a.volume.requests.iter().any(|r| matches!(r.origin, Origin::ResyncFlush { .. })) {
        pair.turn();
        turns += 1;
        assert!(turns < 1_000_000, "the copy never ends");
    }
    pair.a.volume.close_link(DownReason::Local("cut by the test"));
    assert!(pair.cut(), "behind");
    pair.a.volume.go_alone();
    pair.until_quiet();
    pair.b.fill(ByteRange::new(0, SIZE), 0xEE);
    assert!(!pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })), "of a copy that was cut off");
    pair.connect(true);
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn a_hole_that_a_client_fills_while_the_copy_waits_for_it_is_not_punched_on_the_peer() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    // The whole disk is a hole; a client is about to write into it when the copy begins.
    let range = ByteRange::new(70_000, 5000);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
    pair.connect(true);
    pair.until("the copy's step over the hole", |pair| pair.a.volume.requests.waiting_len() == 1);
    pair.a.fill(range, 4);
    pair.a.volume.landed(token);
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    pair.until_quiet();
    assert_eq!(pair.a.told(1), [Ok(())]);
    pair.assert_equal_and_clean();
    assert_eq!(pair.b.content()[70_000], 4);
}

#[test]
fn a_flush_after_a_takeover_flushes_what_was_applied_as_standby() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    // `b` was primary once and flushed: no flush is due any more for what an earlier daemon may have left.
    pair.b.volume.serve();
    pair.b.volume.go_alone();
    pair.b.write(1, grains(0, 1), 2);
    pair.b.begin(2, Op::Flush, ByteRange::new(0, 0), false);
    pair.until("the first flush", |pair| !pair.b.told(2).is_empty());
    pair.b.volume.stop_serving();
    pair.connect(false);
    pair.a.write(1, grains(0, 1), 1);
    pair.until_told(1);
    pair.until_quiet();
    pair.cut();
    pair.until("the end of what was applied", |pair| pair.b.saw(|e| matches!(e, Event::Settled { .. })));
    let b = &mut pair.b.volume;
    let (by_hand, jobs) = DiskWorkers::by_hand();
    b.workers = by_hand;
    b.serve();
    b.go_alone();
    pair.b.begin(3, Op::Flush, ByteRange::new(0, 0), false);
    pair.b.turn();
    let is_flush = |job: &Job| matches!(job.kind, JobKind::Flush);
    assert_eq!(jobs.try_iter().filter(is_flush).count(), 1, "the flush is not one of nothing");
    assert_eq!(pair.b.told(3), [], "before it has ended");
}

#[test]
fn quiescing_waits_for_what_is_under_way_and_flushes() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let range = ByteRange::new(0, 4096);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
    pair.a.volume.quiesce();
    assert_eq!(pair.a.begin(2, Op::Read, range, false), Begin::Failed(IoError::NotPrimary));
    for _ in 0..10 {
        pair.turn();
    }
    assert!(!pair.a.saw(|e| matches!(e, Event::Quiesced { .. })), "a payload is still arriving");
    pair.a.fill(range, 2);
    pair.a.volume.landed(token);
    pair.until("the quiesce", |pair| pair.a.saw(|e| matches!(e, Event::Quiesced { .. })));
    assert_eq!(pair.a.told(1), [Ok(())]);
    assert!(!pair.a.volume.pipeline.peer_lags_durably());
    pair.assert_equal_and_clean();
}

#[test]
fn a_copy_does_not_hold_up_a_quiesce_and_goes_on_after_the_service_ended() {
    const LARGE: u64 = 32 << 20;
    let node = || {
        let disk = DiskImage::memory("test", LARGE).expect("memory");
        Node::with_disk(disk, AckLevel::Memory, OnPeerLoss::Continue)
    };
    let mut pair = Pair { a: node(), b: node(), epoch: Epoch(1) };
    pair.a.volume.serve();
    pair.a.fill(ByteRange::new(0, LARGE), 3);
    pair.connect(true);
    pair.turn();
    pair.a.volume.quiesce();
    pair.until("the quiesce", |pair| pair.a.saw(|e| matches!(e, Event::Quiesced { .. })));
    assert!(pair.a.volume.record.dirty().dirty_bytes() > 0, "the copy's end was waited for");
    for _ in 0..10 {
        pair.turn();
    }
    pair.a.volume.stop_serving();
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    assert!(!pair.a.saw(|e| matches!(e, Event::LinkDown { .. })));
    assert!(!pair.b.volume.disk.span(ByteRange::new(LARGE - 4096, 4096)).is_zero());
}

#[test]
fn a_quiesce_that_was_given_up_does_not_vouch_for_the_next() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    let is_quiesced = |e: &Event| matches!(e, Event::Quiesced { .. });
    pair.a.volume.quiesce();
    pair.turn();
    // Its flush waits for the peer, or for the record of its absence.
    pair.a.volume.serve();
    pair.a.volume.go_alone();
    pair.until_quiet();
    assert!(!pair.a.saw(is_quiesced));
    pair.a.volume.quiesce();
    pair.until("the quiesce", |pair| pair.a.saw(is_quiesced));
}

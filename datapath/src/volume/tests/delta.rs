//! Copies of what either disk has marked, changes that wait for the record, and peers that lie about marks.

use super::faults::{ack, is_link_down, turns_until, with_raw_peer};
use super::*;
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::metadata::layout::Geometry;
use crate::disk::metadata::{create, open};
use crate::disk::superblock::Superblock;
use crate::testing::simulated_medium::Simulated;
use crate::wire::flags;

/// A record on a medium of its own, with a log as small as can be.
pub(super) fn stored(size: u64) -> (Simulated, Record) {
    let medium = Simulated::default();
    let geometry = Geometry::new(size, crate::limits::DIRTY_GRAIN_LEN, 4 << 20, 64).expect("small");
    create(&medium, 0, &Superblock::fresh("v", "n", size, true), geometry, 3, false).expect("made");
    let opened = open(medium.clone(), 0, "v", "n", size).expect("readable");
    let record = Record::of(opened).0;
    (medium, record)
}

/// What a daemon that died at this moment would find marked.
pub(super) fn marked_after_a_crash(medium: &Simulated, size: u64) -> DirtyBitmap {
    open(medium.clone(), 0, "v", "n", size).expect("readable").dirty
}

fn large(size: u64, on_peer_loss: OnPeerLoss) -> Node {
    let disk = DiskImage::memory("test", size).expect("memory");
    Node::with_record(disk, stored(size).1, AckLevel::Memory, on_peer_loss)
}

fn large_pair(size: u64, on_peer_loss: OnPeerLoss) -> Pair {
    let mut pair = Pair { a: large(size, on_peer_loss), b: large(size, on_peer_loss), epoch: Epoch(1) };
    pair.a.volume.serve();
    pair
}

fn copied(node: &Node) -> u64 {
    node.volume.counters.resync_bytes_posted.load(Ordering::Relaxed)
}

fn done(pair: &mut Pair) {
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    pair.a.volume.peer_in_sync();
}

#[test]
fn a_copy_moves_what_either_side_has_marked_and_nothing_else() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    for node in [&mut pair.a, &mut pair.b] {
        node.fill(ByteRange::new(0, SIZE), 3);
    }
    // A page of one grain and the disk's odd end here; scattered ones and half of it there.
    pair.a.fill(ByteRange::new(grains(2, 1).start + 4096, 4096), 7);
    pair.a.fill(ByteRange::new(SIZE - 10, 10), 7);
    pair.a.volume.record.mark(ByteRange::new(grains(2, 1).start + 4096, 4096));
    pair.a.volume.record.mark(ByteRange::new(SIZE - 10, 10));
    for only_there in [grains(5, 1), grains(7, 1), grains(12, 3)] {
        pair.b.fill(only_there, 9);
        pair.b.volume.record.mark(only_there);
    }
    pair.join(true);
    done(&mut pair);
    pair.until_quiet();
    pair.assert_equal_and_clean();
    assert_eq!(pair.a.content()[0], 3);
    assert_eq!(copied(&pair.a), grains(0, 6).len + 4096);
    let maps = [&pair.a, &pair.b].map(|node| node.volume.record.is_dirty());
    assert_eq!(maps, [false, false]);
    let c = &pair.a.volume.counters;
    assert_eq!(c.resync_total_bytes.load(Ordering::Relaxed), c.resync_done_bytes.load(Ordering::Relaxed));
    assert_eq!(c.bytes_posted.load(Ordering::Relaxed), copied(&pair.a));
}

#[test]
fn a_copy_of_nothing_ends_at_once() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    pair.join(true);
    done(&mut pair);
    assert_eq!(copied(&pair.a), 0);
}

#[test]
fn a_copy_that_was_cut_off_goes_on_with_what_is_left() {
    let size = crate::limits::RESYNC_FLUSH_LEN * 2;
    let mut pair = large_pair(size, OnPeerLoss::Continue);
    pair.a.fill(ByteRange::new(0, size), 3);
    pair.connect(true);
    pair.until("a part", |pair| pair.a.volume.record.dirty().dirty_bytes() < size);
    pair.cut();
    let (first, left) = (copied(&pair.a), pair.a.volume.record.dirty().dirty_bytes());
    assert!(left > 0 && left < size, "{left}");
    // A write that only this side has, in what was copied already.
    pair.a.volume.go_alone();
    let slots = scatter(&mut pair, 1, 0..1);
    until_all_told(&mut pair, slots);
    let all = left + grains(0, 1).len;
    pair.join(true);
    done(&mut pair);
    pair.until_quiet();
    assert_eq!(copied(&pair.a) - first, all);
    assert!(copied(&pair.a) < 2 * size);
    let (mut here, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for start in (0..size).step_by(1 << 20) {
        pair.a.volume.disk.span(ByteRange::new(start, 1 << 20)).read_into(&mut here);
        pair.b.volume.disk.span(ByteRange::new(start, 1 << 20)).read_into(&mut there);
        assert!(here == there, "the MiB at {start}");
    }
}

#[test]
fn bits_are_cleared_by_the_peers_word_that_it_is_durable_and_by_no_other() {
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: true }, Epoch(1));
    node.fill(grains(3, 2), 5);
    node.volume.record.mark(grains(3, 2));
    node.turn();
    let mut events = Vec::new();
    raw.poll(&mut events);
    assert!(events.is_empty(), "before the peer has told its marks: {events:?}");
    raw.send(Header::new(Kind::DirtyEnd, Epoch(1))).expect("credit");
    raw.kick();
    turns_until(&mut node, "the steps", |node| node.volume.session.has_sent_all() && copied(node) > 0);
    raw.send(ack(1, 1, 0)).expect("credit");
    raw.kick();
    for _ in 0..50 {
        node.turn();
    }
    assert_eq!(node.volume.record.dirty().dirty_bytes(), grains(3, 2).len, "applied is not durable");
    assert!(!node.saw(|e| matches!(e, Event::ResyncDone { .. })));
    raw.send(ack(1, 1, 1)).expect("credit");
    raw.kick();
    turns_until(&mut node, "the end", |node| node.saw(|e| matches!(e, Event::ResyncDone { .. })));
    assert!(!node.volume.record.is_dirty());
    raw.poll(&mut events);
    let place = |kind| events.iter().position(|e| matches!(e, LinkEvent::Message(h) if h.kind == kind));
    assert!(place(Kind::DirtyKept) < place(Kind::Flush), "{events:?}");
}

#[test]
fn a_target_forgets_its_marks_only_when_they_are_on_the_sources_record() {
    let mut pair = large_pair(64 << 20, OnPeerLoss::Continue);
    pair.b.volume.record.mark(grains(3, 2));
    pair.join(true);
    pair.b.turn();
    // The source knows the marks, and has not heard yet that they are stored.
    for _ in 0..20 {
        pair.a.volume.poll(Instant::now());
        pair.a.volume.pump(Instant::now());
        pair.b.turn();
    }
    assert!(pair.a.volume.record.is_dirty());
    assert!(pair.b.volume.record.is_dirty());
    done(&mut pair);
    pair.until("the receipt", |pair| !pair.b.volume.record.is_dirty());
    assert!(!pair.a.volume.record.is_dirty());
}

#[test]
fn lies_about_marks_end_the_session_and_mark_nothing() {
    let message = |kind, start, len, mask| {
        let mut header = Header::new(kind, Epoch(1));
        (header.range, header.aux) = (ByteRange::new(start, len), mask);
        header
    };
    let g = crate::limits::DIRTY_GRAIN_LEN;
    let end = message(Kind::DirtyEnd, 0, 0, 0);
    let (copying, in_sync) = (Direction::Source { resync: true }, Direction::Source { resync: false });
    let lies: [(Direction, &[Header]); 10] = [
        (copying, &[message(Kind::Dirty, 24 * g, 2 * g, 0)]),
        (copying, &[message(Kind::Dirty, 24 * g, 64 * g, 2)]),
        (copying, &[message(Kind::Dirty, 100, g, 0)]),
        (copying, &[end, message(Kind::Dirty, 0, g, 0)]),
        (copying, &[end, end]),
        (copying, &[message(Kind::DirtyKept, 0, 0, 0)]),
        (in_sync, &[message(Kind::Dirty, 0, g, 0)]),
        (in_sync, &[end]),
        (Direction::Target { resync: false }, &[message(Kind::DirtyKept, 0, 0, 0)]),
        (Direction::Target { resync: true }, &[message(Kind::Dirty, 0, g, 0)]),
    ];
    for (direction, lie) in lies {
        let (mut node, mut raw) = with_raw_peer(direction, Epoch(1));
        for header in lie {
            raw.send(*header).expect("credit");
        }
        raw.kick();
        turns_until(&mut node, "the end", |node| node.saw(is_link_down));
        assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 1, "{lie:?}");
        assert!(!node.volume.record.is_dirty(), "{lie:?}");
        // The copy's flush may have been asked for by then; it ends like any other.
        node.volume.go_alone();
        turns_until(&mut node, "quiet", |node| node.volume.requests.is_empty());
        node.assert_nothing_left();
    }
    // One that goes on and on repeats itself sooner or later.
    let (mut node, mut raw) = with_raw_peer(copying, Epoch(1));
    for _ in 0..2 {
        raw.send(message(Kind::Dirty, 0, g, 0)).expect("credit");
    }
    raw.kick();
    turns_until(&mut node, "the end", |node| node.saw(is_link_down));
    assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 1);
    // Late words of before the roles changed are none.
    let (mut node, mut raw) = with_raw_peer(in_sync, Epoch(2));
    raw.send(message(Kind::Dirty, 0, g, 0)).expect("credit");
    raw.kick();
    for _ in 0..10 {
        node.turn();
    }
    assert!(node.volume.has_link() && !node.volume.record.is_dirty());
}

/// Writes a page to each of so many extents, all at once.
fn scatter(pair: &mut Pair, first_slot: u32, extents: std::ops::Range<u64>) -> std::ops::Range<u32> {
    let mut slot = first_slot;
    for extent in extents {
        let range = ByteRange::new(extent * (4 << 20), 4096);
        match pair.a.begin(slot, Op::Change(Kind::Write), range, false) {
            Begin::Go(token) => {
                pair.a.fill(range, 1);
                pair.a.volume.landed(token);
            }
            Begin::Waits(_) => {}
            other => panic!("{other:?}"),
        }
        slot += 1;
    }
    first_slot..slot
}

/// Brings the bytes of what was granted.
fn land_granted(pair: &mut Pair) {
    for (_, token) in std::mem::take(&mut pair.a.granted) {
        let range = pair.a.volume.requests.get(token).range;
        pair.a.fill(range, 1);
        pair.a.volume.landed(token);
    }
}

fn until_all_told(pair: &mut Pair, slots: std::ops::Range<u32>) {
    pair.until("all answers", |pair| {
        land_granted(pair);
        slots.clone().all(|slot| pair.a.told(slot) == [Ok(())])
    });
}

#[test]
fn more_places_than_the_log_holds_are_written_to_at_once() {
    let size = 1 << 30;
    let mut pair = large_pair(size, OnPeerLoss::Continue);
    pair.join(false);
    let slots = scatter(&mut pair, 0, 0..250);
    assert!(pair.a.volume.record.parked_len() >= 250 - 64, "cold places wait");
    until_all_told(&mut pair, slots);
    pair.until_quiet();
    pair.a.assert_nothing_left();
    // And without the peer: they are marked.
    pair.cut();
    pair.a.volume.go_alone();
    let slots = scatter(&mut pair, 1000, 0..250);
    until_all_told(&mut pair, slots);
    pair.until_quiet();
    assert!(pair.a.volume.record.dirty().dirty_grains() >= 250);
}

#[test]
fn a_full_log_does_not_stop_a_copy_that_a_frozen_primary_waits_for() {
    let size = 1 << 30;
    let mut pair = large_pair(size, OnPeerLoss::Freeze);
    pair.a.fill(grains(0, 40), 5);
    // Nobody is there: what the log has room for lands, and nothing is answered.
    let slots = scatter(&mut pair, 0, 0..200);
    for _ in 0..200 {
        pair.turn();
        land_granted(&mut pair);
        std::thread::sleep(Duration::from_micros(100));
    }
    let flush = 900;
    pair.a.begin(flush, Op::Flush, ByteRange::new(0, 0), false);
    assert!(slots.clone().all(|slot| pair.a.told(slot).is_empty()));
    assert!(pair.a.volume.record.parked_len() > 0);
    pair.connect(true);
    let mut copied = false;
    pair.until("the copy's end", |pair| {
        land_granted(pair);
        copied |= pair.a.saw(|e| matches!(e, Event::ResyncDone { .. }));
        copied
    });
    pair.a.volume.peer_in_sync();
    until_all_told(&mut pair, slots);
    pair.until_told(flush);
}

#[test]
fn a_trim_too_long_for_the_log_is_marked_before_and_cleared_after() {
    let size = 512 << 20;
    let mut pair = large_pair(size, OnPeerLoss::Continue);
    let range = ByteRange::new(4096, 300 << 20);
    for node in [&pair.a, &pair.b] {
        node.fill(ByteRange::new(0, 1 << 20), 5);
    }
    pair.join(false);
    assert!(matches!(pair.a.begin(1, Op::Change(Kind::Trim), range, false), Begin::Waits(_)));
    assert!(!pair.a.volume.disk.span(ByteRange::new(4096, 4096)).is_zero(), "not before it is on record");
    pair.until_told(1);
    assert!(pair.a.volume.record.dirty().dirty_bytes() > 300 << 20);
    pair.a.begin(2, Op::Flush, ByteRange::new(0, 0), false);
    pair.until_told(2);
    pair.until("the marks' end", |pair| !pair.a.volume.record.is_dirty());
    assert!(pair.b.volume.disk.span(range).is_zero());
}

#[test]
fn service_that_ends_answers_what_is_parked_once() {
    let mut pair = large_pair(1 << 30, OnPeerLoss::Continue);
    pair.join(false);
    let slots = scatter(&mut pair, 0, 0..100);
    pair.a.begin(200, Op::Change(Kind::Trim), ByteRange::new(0, 4096), false);
    pair.a.volume.stop_serving();
    for _ in 0..50 {
        pair.turn();
        std::thread::sleep(Duration::from_micros(100));
    }
    for slot in slots.chain([200]) {
        assert_eq!(pair.a.told(slot), [Err(IoError::NotPrimary)], "{slot}");
    }
    pair.a.assert_nothing_left();
    assert!(pair.a.granted.is_empty());
}

#[test]
fn a_client_that_leaves_takes_its_parked_write_along() {
    let mut pair = large_pair(64 << 20, OnPeerLoss::Continue);
    pair.join(false);
    let range = ByteRange::new(0, 4096);
    let Begin::Waits(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("cold") };
    pair.a.begin(2, Op::Change(Kind::WriteZeroes), range, false);
    pair.a.volume.cancel_waiting(token);
    pair.until_told(2);
    pair.until_quiet();
    pair.a.assert_nothing_left();
    assert_eq!(pair.a.told(1), []);
}

#[test]
fn a_quiesce_leaves_nothing_that_a_crash_would_copy() {
    let size = 64 << 20;
    let disk = DiskImage::memory("test", size).expect("memory");
    let (medium, record) = stored(size);
    let a = Node::with_record(disk, record, AckLevel::Memory, OnPeerLoss::Continue);
    let mut pair = Pair { a, b: large(size, OnPeerLoss::Continue), epoch: Epoch(1) };
    pair.a.volume.serve();
    pair.connect(true);
    done(&mut pair);
    let slots = scatter(&mut pair, 0, 0..10);
    until_all_told(&mut pair, slots);
    assert!(marked_after_a_crash(&medium, size).dirty_bytes() > 0);
    pair.a.volume.quiesce();
    pair.until("the quiesce", |pair| pair.a.saw(|e| matches!(e, Event::Quiesced { .. })));
    assert_eq!(marked_after_a_crash(&medium, size).dirty_bytes(), 0);
    pair.a.assert_nothing_left();
}

#[test]
fn everything_is_marked_before_that_is_said() {
    let (medium, record) = stored(64 << 20);
    let disk = DiskImage::memory("test", 64 << 20).expect("memory");
    let mut node = Node::with_record(disk, record, AckLevel::Memory, OnPeerLoss::Continue);
    let (say, hear) = crossbeam_channel::unbounded();
    node.volume.mark_all(Box::new(move |result| say.send(result).expect("heard")));
    assert!(hear.is_empty(), "nothing is stored yet");
    turns_until(&mut node, "the word", |_| !hear.is_empty());
    assert_eq!(hear.recv(), Ok(Ok(())));
    assert_eq!(marked_after_a_crash(&medium, 64 << 20).dirty_bytes(), 64 << 20);
}

#[test]
fn a_record_that_cannot_be_stored_is_a_failed_disk() {
    let (medium, record) = stored(64 << 20);
    let disk = DiskImage::memory("test", 64 << 20).expect("memory");
    let mut node = Node::with_record(disk, record, AckLevel::Memory, OnPeerLoss::Continue);
    node.volume.serve();
    node.volume.go_alone();
    medium.cut_after(0);
    assert!(matches!(node.begin(1, Op::Change(Kind::Trim), grains(0, 1), false), Begin::Waits(_)));
    turns_until(&mut node, "the failure", |node| node.told(1).len() == 1);
    assert_eq!(node.told(1), [Err(IoError::DiskFailed)]);
    assert!(node.saw(|e| matches!(e, Event::DiskFailed { .. })));
    let (say, hear) = crossbeam_channel::unbounded();
    node.volume.mark_all(Box::new(move |result| say.send(result).expect("heard")));
    assert!(hear.recv().expect("told").is_err());
    node.assert_nothing_left();
}

#[test]
fn steps_of_a_copy_are_told_from_clients_writes_in_the_figures() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(0, 1), 1);
    pair.until_told(1);
    let c = &pair.a.volume.counters;
    assert_eq!(c.bytes_posted.load(Ordering::Relaxed), grains(0, 1).len);
    assert_eq!(copied(&pair.a), 0);
    assert_eq!(flags::RESYNC & flags::FUA, 0);
}

#[test]
fn a_scattered_map_is_told_turn_by_turn_without_an_event() {
    let mut node = large(2 << 30, OnPeerLoss::Continue);
    let messages = 3 * crate::limits::DIRTY_TOLD_MAX as u64;
    for message in 0..messages {
        node.volume.record.mark(grains(2 * 64 * message, 1));
    }
    let (here, mut raw) = loopback::pair(RING_LEN).expect("ring memory");
    let now = Instant::now();
    node.volume.attach(Box::new(here), Direction::Target { resync: true }, Epoch(1), now);
    let (mut events, mut turns) = (Vec::new(), 0);
    while turns == 0 || node.volume.due().is_some() {
        node.turn();
        raw.poll(&mut events);
        turns += 1;
    }
    let told = events.iter().filter(|e| matches!(e, LinkEvent::Message(h) if h.kind == Kind::Dirty)).count();
    assert_eq!(told as u64, messages, "in {turns} turns");
    assert!(turns > 3);
}

//! Failing disks, lying peers, roles that change, and service that ends: each ends as told, once, with nothing left.

use super::*;
use crate::units::Seq;
use crate::wire::flags;
use std::fs::File;

fn posted(seq: u64, range: ByteRange, crc: u32) -> Header {
    let mut header = Header::new(Kind::Write, Epoch(1));
    (header.seq, header.range, header.payload_crc) = (Seq(seq), range, crc);
    header
}

fn trim(seq: u64, range: ByteRange) -> Header {
    let mut header = Header::new(Kind::Trim, Epoch(1));
    (header.seq, header.range) = (Seq(seq), range);
    header
}

pub(super) fn ack(epoch: u64, applied: u64, durable: u64) -> Header {
    let mut header = Header::new(Kind::Ack, Epoch(epoch));
    (header.seq, header.aux) = (Seq(applied), durable);
    header
}

/// A node whose peer is played by the test.
pub(super) fn with_raw_peer(direction: Direction, epoch: Epoch) -> (Node, loopback::LoopbackLink) {
    let mut node = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    node.volume.serve();
    let (here, raw) = loopback::pair(RING_LEN).expect("ring memory");
    node.volume.attach(Box::new(here), direction, epoch, Instant::now());
    (node, raw)
}

pub(super) fn turns_until(node: &mut Node, what: &str, mut done: impl FnMut(&mut Node) -> bool) {
    let began = Instant::now();
    while !done(node) {
        node.turn();
        std::thread::yield_now();
        assert!(began.elapsed() < PATIENCE, "{what} never came");
    }
}

pub(super) fn is_link_down(event: &Event) -> bool {
    matches!(event, Event::LinkDown { .. })
}

fn file_disk() -> (tempfile::NamedTempFile, Arc<DiskImage>) {
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(SIZE).expect("set_len");
    let disk = DiskImage::open(file.path(), SIZE).expect("opens");
    (file, disk)
}

fn truncate(file: &File) {
    file.set_len(0).expect("truncate");
}

#[test]
fn nothing_after_a_damaged_payload_is_applied_and_nobody_panics() {
    for trim_first in [false, true] {
        let (mut node, mut raw) = with_raw_peer(Direction::Target { resync: false }, Epoch(1));
        let source = DiskImage::memory("source", SIZE).expect("memory");
        let bytes = source.span(grains(0, 1));
        bytes.write_from(&[5; 65536]);
        let mut seq = 0;
        if trim_first {
            // What follows waits for a worker thread, and is looked at from another place.
            seq = 1;
            let permit = raw.claim(0).expect("room");
            raw.post(permit, trim(1, grains(8, 1)), None, Token(1));
        }
        for (n, crc) in [(1, !bytes.crc32c()), (2, bytes.crc32c()), (3, bytes.crc32c())] {
            let permit = raw.claim(65536).expect("room");
            raw.post(permit, posted(seq + n, grains(n, 1), crc), Some(bytes.clone()), Token(seq + n));
        }
        raw.kick();
        turns_until(&mut node, "the end", |node| node.saw(is_link_down));
        assert!(node.volume.disk.span(ByteRange::new(0, SIZE)).is_zero(), "something was applied");
        assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 1);
        node.assert_nothing_left();
    }
}

#[test]
fn lies_of_any_kind_close_the_link_and_hurt_nothing_else() {
    let mut far = posted(1, ByteRange::new(SIZE - 10, 100), 0);
    far.kind = Kind::WriteZeroes;
    let mut flush = Header::new(Kind::Flush, Epoch(1));
    flush.seq = Seq(1);
    type Lie = (Direction, Header);
    let lies: [Lie; 6] = [
        (Direction::Target { resync: false }, trim(2, grains(0, 1))),
        (Direction::Target { resync: false }, far),
        (Direction::Target { resync: false }, flush),
        (Direction::Source { resync: false }, flush),
        (Direction::Source { resync: false }, trim(1, grains(0, 1))),
        (Direction::Source { resync: false }, ack(1, 7, 0)),
    ];
    for (direction, lie) in lies {
        let (mut node, mut raw) = with_raw_peer(direction, Epoch(1));
        node.fill(ByteRange::new(0, SIZE), 1);
        let before = node.content();
        if lie.kind.is_change() {
            let permit = raw.claim(0).expect("room");
            raw.post(permit, lie, None, Token(1));
        } else {
            raw.send(lie).expect("credit");
        }
        raw.kick();
        turns_until(&mut node, "the end", |node| node.saw(is_link_down));
        assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 1, "{lie:?}");
        assert_eq!(node.content(), before);
        node.assert_nothing_left();
    }
}

#[test]
fn an_ack_of_another_epoch_completes_nothing() {
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: false }, Epoch(2));
    node.write(1, grains(0, 1), 1);
    node.turn();
    raw.send(ack(1, 1, 1)).expect("credit");
    raw.kick();
    for _ in 0..10 {
        node.turn();
    }
    assert_eq!(node.told(1), []);
    raw.send(ack(2, 1, 1)).expect("credit");
    raw.kick();
    turns_until(&mut node, "the answer", |node| node.told(1) == [Ok(())]);
}

#[test]
fn the_lost_link_is_told_before_the_wish_to_go_on_without_it() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(0, 1), 1);
    pair.a.volume.close_link(DownReason::Local("cut by the test"));
    pair.a.turn();
    let asked = |pair: &Pair| pair.a.events.iter().any(|e| matches!(e, Event::AskAlone { .. }));
    pair.a.volume.keep_alive(Instant::now(), Duration::from_secs(60));
    assert!(!asked(&pair), "the peer was heard a moment ago");
    pair.a.volume.session.end_patience();
    pair.a.volume.keep_alive(Instant::now(), Duration::from_secs(60));
    pair.a.turn();
    let place = |wanted: fn(&Event) -> bool| pair.a.events.iter().position(wanted).expect("told");
    assert!(place(is_link_down) < place(|e| matches!(e, Event::AskAlone { .. })));
}

#[test]
fn an_old_record_of_the_peers_absence_does_not_outlive_its_return_as_primary() {
    let mut node = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    node.volume.serve();
    node.volume.go_alone();
    node.volume.stop_serving();
    let (here, mut raw) = loopback::pair(RING_LEN).expect("ring memory");
    node.volume.attach(Box::new(here), Direction::Target { resync: false }, Epoch(2), Instant::now());
    raw.close(DownReason::Local("dies"));
    turns_until(&mut node, "the end", |node| node.saw(is_link_down));
    node.volume.serve();
    node.write(1, grains(0, 1), 1);
    node.turn();
    assert_eq!(node.told(1), [], "answered alone, and nobody wrote that down");
    assert!(node.saw(|e| matches!(e, Event::AskAlone { .. })));
    node.volume.go_alone();
    node.turn();
    assert_eq!(node.told(1), [Ok(())]);
    node.assert_nothing_left();
}

#[test]
fn roles_that_change_over_a_live_link_start_a_numbering_of_their_own() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(3, 1), 3);
    for direction in [Direction::Idle, Direction::Source { resync: true }, Direction::Source { resync: true }]
    {
        pair.epoch = pair.epoch.next();
        pair.a.volume.direct(direction, pair.epoch);
        pair.a.volume.pump(Instant::now());
    }
    pair.b.volume.direct(Direction::Target { resync: false }, pair.epoch);
    // What was posted under the older epochs is refused, and a new session brings all of it.
    pair.a.volume.close_link(DownReason::Local("start over"));
    pair.cut();
    pair.connect(true);
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    pair.until_quiet();
    assert_eq!(pair.a.told(1), [Ok(())]);
    pair.assert_equal_and_clean();
}

#[test]
fn posts_that_never_left_are_not_sent_under_a_later_epoch() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(3, 1), 3);
    pair.epoch = Epoch(2);
    pair.a.volume.direct(Direction::Source { resync: false }, pair.epoch);
    pair.b.volume.direct(Direction::Target { resync: false }, pair.epoch);
    pair.until_told(1);
    pair.until_quiet();
    assert_eq!(pair.b.volume.counters.violations.load(Ordering::Relaxed), 0);
    pair.assert_equal_and_clean();
}

#[test]
fn a_copy_cut_off_by_a_change_of_roles_leaves_nothing() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    pair.a.fill(ByteRange::new(0, SIZE), 3);
    pair.connect(true);
    pair.until("the copy's steps", |pair| pair.a.volume.requests.locked_len() > 0);
    pair.a.volume.direct(Direction::Idle, Epoch(2));
    pair.a.assert_nothing_left();
}

#[test]
fn roles_do_not_change_under_changes_that_are_still_being_applied() {
    let (mut node, mut raw) = with_raw_peer(Direction::Target { resync: false }, Epoch(1));
    node.fill(ByteRange::new(0, SIZE), 1);
    for seq in 1..=2 {
        let permit = raw.claim(0).expect("room");
        raw.post(permit, trim(seq, grains(seq, 1)), None, Token(seq));
    }
    raw.kick();
    node.volume.poll(Instant::now());
    assert!(node.volume.session.is_applying());
    node.volume.direct(Direction::Source { resync: false }, Epoch(2));
    turns_until(&mut node, "the end", |node| node.saw(is_link_down));
    node.assert_nothing_left();
    assert!(!node.volume.disk.span(grains(2, 1)).is_zero(), "applied in the wrong role");
}

#[test]
fn service_that_ends_answers_everyone_once() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let write = Op::Change(Kind::Write);
    pair.a.write(1, grains(0, 1), 1);
    let Begin::Go(receiving) = pair.a.begin(2, write, grains(1, 1), false) else { panic!("free") };
    assert!(matches!(pair.a.begin(3, write, grains(0, 2), true), Begin::Waits(_)));
    assert!(matches!(pair.a.begin(4, Op::Read, grains(1, 1), false), Begin::Waits(_)));
    pair.a.begin(5, Op::Change(Kind::Trim), grains(5, 4), false);
    pair.a.begin(6, Op::Flush, ByteRange::new(0, 0), false);
    pair.a.volume.stop_serving();
    pair.a.volume.stop_serving();
    pair.a.volume.landed(receiving);
    for slot in 1..=6 {
        pair.until_told(slot);
    }
    pair.until("the end of a session with gaps", |pair| {
        pair.a.saw(is_link_down) || !pair.a.volume.has_link()
    });
    for _ in 0..10 {
        pair.turn();
    }
    for slot in 1..=6 {
        assert_eq!(pair.a.told(slot), [Err(IoError::NotPrimary)], "request {slot}");
    }
    assert_eq!(pair.a.begin(7, Op::Read, grains(0, 1), false), Begin::Failed(IoError::NotPrimary));
    pair.a.assert_nothing_left();
    assert!(pair.a.volume.record.dirty().dirty_bytes() > 0, "what was given up may stand here and not there");
}

#[test]
fn a_failing_disk_fails_its_requests_once_and_says_so_once() {
    let (file, disk) = file_disk();
    let mut node = Node::with_disk(disk, AckLevel::Durable, OnPeerLoss::Continue);
    node.volume.serve();
    node.volume.go_alone();
    node.write(1, grains(0, 1), 1);
    turns_until(&mut node, "the answer", |node| node.told(1) == [Ok(())]);
    let Begin::Go(late) = node.begin(3, Op::Change(Kind::Write), grains(2, 1), false) else { panic!("free") };
    node.write(2, grains(1, 1), 1);
    truncate(file.as_file());
    turns_until(&mut node, "the failure", |node| node.told(2).len() == 1);
    node.volume.landed(late);
    for _ in 0..20 {
        node.turn();
    }
    assert_eq!(
        (node.told(2), node.told(3)),
        (&[Err(IoError::DiskFailed)][..], &[Err(IoError::DiskFailed)][..])
    );
    assert_eq!(node.begin(4, Op::Flush, ByteRange::new(0, 0), false), Begin::Failed(IoError::DiskFailed));
    assert!(node.saw(|e| matches!(e, Event::DiskFailed { .. })));
    assert_eq!(node.events.len(), 0, "{:?}", node.events);
    node.assert_nothing_left();
}

#[test]
fn a_page_lost_by_the_primary_does_not_reach_the_standby() {
    let (file, disk) = file_disk();
    let mut a = Node::with_disk(disk, AckLevel::Memory, OnPeerLoss::Continue);
    a.volume.serve();
    let mut pair = Pair { a, b: Node::new(AckLevel::Memory, OnPeerLoss::Continue), epoch: Epoch(1) };
    pair.b.fill(ByteRange::new(0, SIZE), 9);
    pair.connect(false);
    pair.a.write(1, grains(0, 1), 1);
    truncate(file.as_file());
    pair.until_told(1);
    assert_eq!(pair.a.told(1), [Err(IoError::DiskFailed)]);
    pair.until("the end", |pair| pair.b.saw(is_link_down));
    assert!(pair.b.content().iter().all(|byte| *byte == 9), "zeroes in place of a lost page were mirrored");
    pair.a.assert_nothing_left();
}

#[test]
fn a_standby_whose_disk_fails_leaves_and_never_acks() {
    for kind in [Kind::Write, Kind::Trim] {
        let (file, disk) = file_disk();
        let b = Node::with_disk(disk, AckLevel::Memory, OnPeerLoss::Continue);
        let mut a = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
        a.volume.serve();
        let mut pair = Pair { a, b, epoch: Epoch(1) };
        pair.connect(false);
        truncate(file.as_file());
        if kind == Kind::Write {
            pair.a.write(1, grains(0, 1), 1);
        } else {
            pair.a.begin(1, Op::Change(Kind::Trim), grains(0, 2), true);
        }
        pair.until("both ends", |pair| {
            let failed = pair.b.events.iter().any(|e| matches!(e, Event::DiskFailed { .. }));
            failed && pair.a.saw(is_link_down)
        });
        assert_eq!(pair.a.told(1), []);
        for _ in 0..20 {
            pair.turn();
        }
        assert_eq!(pair.b.events.iter().filter(|e| is_link_down(e)).count(), 1);
        pair.b.assert_nothing_left();
        pair.a.volume.go_alone();
        pair.until_told(1);
        assert_eq!(pair.a.told(1), [Ok(())]);
    }
}

#[test]
fn a_disk_that_failed_is_no_partys_copy() {
    for direction in [Direction::Source { resync: true }, Direction::Target { resync: false }] {
        let (file, disk) = file_disk();
        truncate(file.as_file());
        disk.flush().expect_err("truncated");
        let mut node = Node::with_disk(disk, AckLevel::Memory, OnPeerLoss::Continue);
        node.turn();
        let (here, mut raw) = loopback::pair(RING_LEN).expect("ring memory");
        node.volume.attach(Box::new(here), direction, Epoch(1), Instant::now());
        turns_until(&mut node, "the end", |node| node.saw(is_link_down));
        let mut events = Vec::new();
        raw.poll(&mut events);
        assert!(!events.iter().any(|e| matches!(e, LinkEvent::Arrived(_))), "{events:?}");
        node.assert_nothing_left();
    }
}

#[test]
fn an_fua_write_is_not_answered_by_a_peer_that_only_applied_it() {
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: false }, Epoch(1));
    let Begin::Go(token) = node.begin(1, Op::Change(Kind::Write), grains(0, 1), true) else { panic!("free") };
    node.fill(grains(0, 1), 1);
    node.volume.landed(token);
    node.turn();
    let mut events = Vec::new();
    raw.poll(&mut events);
    let asked =
        events.iter().any(|e| matches!(e, LinkEvent::Arrived(slot) if slot.header.flags & flags::FUA != 0));
    assert!(asked, "{events:?}");
    raw.send(ack(1, 1, 0)).expect("credit");
    raw.kick();
    for _ in 0..100 {
        node.turn();
        std::thread::sleep(Duration::from_micros(100));
    }
    assert_eq!(node.told(1), []);
    raw.send(ack(1, 1, 1)).expect("credit");
    raw.kick();
    turns_until(&mut node, "the answer", |node| node.told(1) == [Ok(())]);
}

/// Plays `seconds` of a peer that shows signs of life, with `word` after each; stops when the session ends.
fn seconds_of_life(
    node: &mut Node,
    raw: &mut loopback::LoopbackLink,
    seconds: u64,
    mut word: impl FnMut(u64) -> Option<Header>,
) -> u64 {
    let began = Instant::now();
    for second in 1..=seconds {
        let now = began + Duration::from_secs(second);
        raw.send(Header::new(Kind::KeepAlive, Epoch(1))).expect("credit");
        if let Some(header) = word(second) {
            raw.send(header).expect("credit");
        }
        raw.kick();
        raw.poll(&mut Vec::new());
        node.volume.poll(now);
        node.volume.keep_alive(now, Duration::from_secs(5));
        node.turn();
        if node.saw(is_link_down) {
            return second;
        }
    }
    seconds + 1
}

#[test]
fn a_peer_that_lives_but_answers_nothing_is_given_up() {
    let limit_s = crate::limits::PEER_ANSWER_S_MAX;
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: false }, Epoch(1));
    node.write(1, ByteRange::new(0, 512), 1);
    node.turn();
    let ended = seconds_of_life(&mut node, &mut raw, 2 * limit_s, |_| None);
    assert!((limit_s..limit_s + 3).contains(&ended), "after {ended} s");
}

#[test]
fn a_flush_that_hangs_is_noticed_under_writes_that_go_through() {
    let limit_s = crate::limits::PEER_ANSWER_S_MAX;
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: false }, Epoch(1));
    node.begin(1, Op::Flush, ByteRange::new(0, 0), false);
    node.write(2, ByteRange::new(0, 512), 1);
    node.begin(3, Op::Flush, ByteRange::new(0, 0), false);
    node.turn();
    let ended = seconds_of_life(&mut node, &mut raw, 2 * limit_s, |_| Some(ack(1, 1, 0)));
    assert!((limit_s..limit_s + 3).contains(&ended), "after {ended} s");
}

#[test]
fn an_idle_peer_owes_no_answer() {
    let limit_s = crate::limits::PEER_ANSWER_S_MAX;
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: false }, Epoch(1));
    assert_eq!(seconds_of_life(&mut node, &mut raw, 2 * limit_s, |_| None), 2 * limit_s + 1);
}

#[test]
fn a_silent_peer_is_given_up_but_not_by_a_node_that_was_held_up_itself() {
    let timeout = Duration::from_millis(400);
    let (mut node, _raw) = with_raw_peer(Direction::Target { resync: false }, Epoch(1));
    let began = Instant::now();
    // Four timeouts pass in one step: nobody looked, so nobody may judge.
    let back = began + timeout * 4;
    node.volume.keep_alive(back, timeout);
    node.volume.poll(back);
    assert!(node.volume.has_link());
    for quarter in 1..=4 {
        assert!(node.volume.has_link(), "after {quarter} quarters");
        node.volume.keep_alive(back + timeout / 4 * quarter, timeout);
        node.volume.poll(back);
    }
    assert!(!node.volume.has_link(), "a whole timeout of listening");
}

#[test]
fn a_peer_that_never_tells_its_marks_or_keeps_ours_is_given_up() {
    let limit_s = crate::limits::PEER_ANSWER_S_MAX;
    for direction in [Direction::Source { resync: true }, Direction::Target { resync: true }] {
        let (mut node, mut raw) = with_raw_peer(direction, Epoch(1));
        let ended = seconds_of_life(&mut node, &mut raw, 2 * limit_s, |_| None);
        assert!((limit_s..limit_s + 3).contains(&ended), "{direction:?}: after {ended} s");
    }
    let (mut node, mut raw) = with_raw_peer(Direction::Source { resync: true }, Epoch(1));
    let mark = |second: u64| {
        let mut header = Header::new(Kind::Dirty, Epoch(1));
        header.range = ByteRange::new(second / 10 * crate::limits::DIRTY_GRAIN_LEN, SIZE.min(65536));
        second.is_multiple_of(10).then_some(header)
    };
    let ended = seconds_of_life(&mut node, &mut raw, 2 * limit_s, mark);
    assert_eq!(ended, 2 * limit_s + 1, "it tells, if slowly");
}

#[test]
fn no_disk_is_a_target_while_its_own_clients_changes_are_still_being_made() {
    let mut node = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    node.volume.serve();
    let range = ByteRange::new(0, SIZE);
    assert!(matches!(node.begin(1, Op::Change(Kind::Trim), range, false), Begin::Go(_)));
    // A worker thread has it, and nobody has taken its result yet.
    node.volume.stop_serving();
    let attach = |node: &mut Node| {
        let (here, raw) = loopback::pair(RING_LEN).expect("ring memory");
        node.volume.attach(Box::new(here), Direction::Target { resync: false }, Epoch(1), Instant::now());
        raw
    };
    let _raw = attach(&mut node);
    assert!(!node.volume.session.is_target(), "the trim may fall upon what the peer sends");
    turns_until(&mut node, "the end", |node| node.saw(is_link_down));
    turns_until(&mut node, "the trim's end", |node| !node.volume.requests.is_making());
    let settled = |event: &Event| matches!(event, Event::Settled { .. });
    turns_until(&mut node, "rest, which control waits for", |node| node.saw(settled));
    assert_eq!(node.told(1), [Err(IoError::NotPrimary)]);
    let _raw = attach(&mut node);
    assert!(node.volume.session.is_target());
}

//! Verification and copies that compare first, between two volumes.

use super::*;
use crate::limits::DIRTY_GRAIN_LEN as G;

impl Pair {
    /// The findings and whether they were repaired, or why it was not finished.
    fn verified(&mut self) -> Result<Verified, String> {
        let mut outcome = None;
        self.until("the verification's end", |pair| {
            pair.a.events.retain(|event| match event {
                Event::Verified { outcome: told, .. } => {
                    assert!(outcome.replace(told.clone()).is_none(), "told once");
                    false
                }
                _ => true,
            });
            outcome.is_some()
        });
        let outcome = outcome.expect("told");
        let percent = self.a.volume.counters.verify_percent_x100.load(Ordering::Relaxed);
        assert_eq!(percent, outcome.findings.compared * 10_000 / SIZE, "shown when it has ended");
        assert!(outcome.unfinished.is_some() || percent == 10_000, "complete at {percent}");
        match &outcome.unfinished {
            Some(why) => Err(why.clone()),
            None => Ok(outcome),
        }
    }

    /// Nobody holds the copy back.
    fn be_idle(&mut self) {
        self.a.volume.background.be_idle();
    }

    fn flip(&self, at: u64) {
        let span = self.b.volume.disk.span(ByteRange::new(at, 1));
        let mut byte = [0];
        span.read_into(&mut byte);
        span.write_from(&[byte[0] ^ 0x10]);
    }
}

#[test]
fn equal_disks_verify_as_equal_while_clients_write() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.volume.verify(false);
    for slot in 0..200 {
        let at = u64::from(slot) * 37 % 24 * G;
        if let Begin::Go(token) = pair.a.begin(slot, Op::Change(Kind::Write), ByteRange::new(at, 4096), false)
        {
            pair.a.fill(ByteRange::new(at, 4096), u8::try_from(slot % 251).expect("small"));
            pair.turn();
            pair.a.volume.landed(token);
            pair.until_told(slot);
        } else {
            // A step holds the range: the write is granted in its turn.
            pair.until("the grant", |pair| pair.a.granted.iter().any(|(granted, _)| *granted == slot));
            let at = pair.a.granted.iter().position(|(granted, _)| *granted == slot).expect("looked");
            let (_, token) = pair.a.granted.remove(at);
            pair.a.volume.landed(token);
            pair.until_told(slot);
        }
    }
    let verified = pair.verified().expect("it ends");
    assert_eq!(verified.findings.compared, SIZE);
    assert_eq!((verified.findings.differing, verified.findings.ranges, verified.repaired), (0, 0, false));
    pair.until_quiet();
    pair.assert_equal_and_clean();
    assert_eq!(pair.a.volume.record.dirty().dirty_bytes(), 0);
}

#[test]
fn what_differs_is_found_marked_and_repaired() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, ByteRange::new(0, 3 * G), 7);
    pair.until_told(1);
    for at in [5, G + 1, 10 * G, SIZE - 1] {
        pair.flip(at);
    }
    pair.a.volume.verify(false);
    let found = pair.verified().expect("it ends").findings;
    assert_eq!((found.ranges, found.differing, found.compared), (3, 3 * G + 4096, SIZE));
    let expected = [ByteRange::new(0, 2 * G), ByteRange::new(10 * G, G), ByteRange::new(24 * G, 4096)];
    assert_eq!(found.listed, expected);
    assert_eq!(
        pair.a.volume.record.dirty().dirty_bytes(),
        3 * G + 4096,
        "marked, and left to the next session"
    );
    assert_ne!(pair.a.content(), pair.b.content(), "nothing was changed");
    pair.until_quiet();
    assert!(!pair.a.volume.pipeline.peer_lags_durably(), "comparisons leave no lag behind");
    let posted_before = pair.b.volume.counters.changes_applied.load(Ordering::Relaxed);
    pair.be_idle();
    pair.a.volume.verify(true);
    let verified = pair.verified().expect("it ends");
    assert!(verified.repaired);
    assert_eq!(verified.findings, found);
    pair.until_quiet();
    pair.assert_equal_and_clean();
    assert_eq!(pair.a.volume.record.dirty().dirty_bytes(), 0);
    let applied = pair.b.volume.counters.changes_applied.load(Ordering::Relaxed) - posted_before;
    assert!(applied <= 4, "{applied} writes for four grains");
    assert!(!pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })), "control did not ask for a copy");
    assert!(!pair.cut(), "the peer lacks nothing");
}

#[test]
fn a_verification_ends_with_its_session_and_tells_so_once() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let held = ByteRange::new(20 * G, 512);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), held, false) else { panic!("free") };
    pair.a.volume.verify(false);
    pair.a.volume.verify(true);
    assert!(pair.verified().expect_err("one at a time").contains("already"));
    let began = Instant::now();
    while pair.a.volume.pipeline.in_flight() == 0 {
        pair.a.turn();
        assert!(began.elapsed() < PATIENCE, "no step is ever under way");
    }
    pair.cut();
    assert_eq!(pair.a.volume.record.dirty().dirty_bytes(), 0, "to compare is not to change");
    pair.a.volume.landed(token);
    pair.a.volume.keep_alive(Instant::now(), Duration::ZERO);
    pair.until("the wish", |pair| pair.a.saw(|e| matches!(e, Event::AskAlone { .. })));
    pair.a.volume.go_alone();
    assert!(pair.verified().expect_err("given up").contains("session ended"));
    pair.until_quiet();
    pair.a.assert_nothing_left();
    pair.a.volume.verify(false);
    assert!(pair.verified().expect_err("nobody to compare with").contains("no session"));
    pair.connect(true);
    pair.a.volume.verify(false);
    assert!(pair.verified().expect_err("not in sync").contains("copied"));
}

#[test]
fn a_verification_goes_on_where_its_session_goes_on_and_takes_nothing_lost_for_a_difference() {
    for differing in [false, true] {
        let mut pair = Pair::in_sync(AckLevel::Memory);
        for grain in [0, 5, 24] {
            if differing {
                pair.flip(grain * G);
            }
        }
        pair.a.volume.verify(false);
        let mut breaks = 0;
        while pair.a.volume.background.is_verifying() {
            pair.turn();
            if breaks < 30 && pair.a.volume.pipeline.in_flight() > 0 {
                for _ in 0..breaks % 3 {
                    pair.b.turn();
                }
                pair.cut();
                pair.go_on();
                breaks += 1;
            }
        }
        assert!(breaks > 10, "{breaks}");
        let found = pair.verified().expect("it ends").findings;
        let expected = [ByteRange::new(0, G), ByteRange::new(5 * G, G), ByteRange::new(24 * G, 4096)];
        assert_eq!(found.listed, if differing { &expected[..] } else { &[] });
        assert_eq!(found.compared, SIZE);
        pair.until_quiet();
        pair.a.assert_nothing_left();
    }
}

#[test]
fn a_stopped_verification_tells_what_it_found() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.flip(0);
    let held = ByteRange::new(20 * G, 512);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), held, false) else { panic!("free") };
    pair.be_idle();
    pair.a.volume.verify(true);
    for _ in 0..50 {
        pair.turn();
    }
    pair.a.volume.stop_verify();
    let mut outcome = None;
    pair.until("the end", |pair| {
        outcome = pair.a.events.iter().find_map(|event| match event {
            Event::Verified { outcome, .. } => Some(outcome.clone()),
            _ => None,
        });
        outcome.is_some()
    });
    let outcome = outcome.expect("told");
    assert_eq!(outcome.findings.listed, [ByteRange::new(0, G)]);
    assert!(!outcome.repaired && outcome.unfinished.is_some());
    pair.a.volume.landed(token);
    pair.until_told(1);
    pair.until_quiet();
    pair.a.assert_nothing_left();
    pair.a.events.clear();
    pair.a.volume.verify(true);
    assert!(pair.verified().expect("it ends").repaired);
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn a_copy_that_compares_first_sends_only_what_differs() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.volume.background.compare_first();
    for (slot, grain) in (0..24).enumerate() {
        let slot = u32::try_from(slot).expect("small");
        pair.a.write(slot, ByteRange::new(grain * G, G), u8::try_from(grain + 1).expect("small"));
        pair.until_told(slot);
    }
    pair.cut();
    pair.flip(3 * G + 17);
    pair.flip(9 * G);
    let before = pair.b.volume.counters.changes_applied.load(Ordering::Relaxed);
    pair.be_idle();
    pair.connect(true);
    pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
    pair.a.volume.peer_in_sync();
    pair.until_quiet();
    pair.assert_equal_and_clean();
    let sent = pair.b.volume.counters.changes_applied.load(Ordering::Relaxed) - before;
    // The grain at the end was never written: a hole, told without bytes.
    assert_eq!(sent, 2 + 1, "two grains and a hole");
    assert_eq!(pair.a.volume.record.dirty().dirty_bytes(), 0);
}

#[test]
fn a_difference_nobody_asked_for_ends_the_link() {
    let (here, mut there) = loopback::pair(RING_LEN).expect("ring memory");
    let mut a = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    a.volume.serve();
    a.volume.attach(Box::new(here), Direction::Source { resync: false }, Epoch(1), Instant::now());
    a.write(1, ByteRange::new(0, 4096), 1);
    a.turn();
    let mut header = Header::new(Kind::Differs, Epoch(1));
    (header.seq, header.range) = (Seq(1), ByteRange::new(0, 4096));
    there.send(header).expect("room");
    there.kick();
    let began = Instant::now();
    let mut reason = None;
    while reason.is_none() {
        a.turn();
        reason = a.events.iter().find_map(|event| match event {
            Event::LinkDown { reason, .. } => Some(reason.clone()),
            _ => None,
        });
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(reason.expect("told").contains("no such comparison"));
}

#[test]
fn comparisons_given_up_mark_nothing() {
    let (here, _there) = loopback::pair(RING_LEN).expect("ring memory");
    let mut a = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    a.volume.serve();
    a.volume.attach(Box::new(here), Direction::Source { resync: false }, Epoch(1), Instant::now());
    a.volume.verify(false);
    a.turn();
    assert!(a.volume.pipeline.in_flight() > 0, "the peer answers nothing");
    a.volume.stop_serving();
    assert!(!a.volume.record.is_dirty(), "a comparison changes nothing");
}

#[test]
fn what_a_verification_found_before_it_was_stopped_is_on_record() {
    let (medium, record) = super::delta::stored(SIZE);
    let disk = DiskImage::memory("test", SIZE).expect("memory");
    let a = Node::with_record(disk, record, AckLevel::Memory, OnPeerLoss::Continue);
    let b = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    let mut pair = Pair { a, b, epoch: Epoch(1) };
    pair.a.volume.serve();
    pair.connect(false);
    pair.flip(0);
    // In idleness it would be stored in any case.
    pair.a.volume.background.be_busy(Instant::now());
    pair.a.volume.verify(false);
    pair.until("the finding", |pair| pair.a.volume.record.is_dirty());
    pair.a.volume.stop_verify();
    pair.until("the record", |_| super::delta::marked_after_a_crash(&medium, SIZE).dirty_bytes() > 0);
}

#[test]
fn a_repair_copies_what_an_earlier_verification_left_marked() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.volume.record.mark(ByteRange::new(3 * G, G));
    pair.a.volume.verify(true);
    pair.be_idle();
    let verified = pair.verified().expect("it ends");
    assert!(verified.repaired && verified.findings.differing == 0);
    assert!(!pair.a.volume.record.is_dirty());
}

#[test]
fn only_changes_that_a_peer_answers_tell_how_long_clients_wait() {
    let mut node = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    node.volume.serve();
    let waits = |node: &Node| node.volume.requests.iter().any(|request| request.landed_at.is_some());
    node.write(1, ByteRange::new(0, 4096), 1);
    assert!(!waits(&node), "nobody is there");
    let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
    node.volume.attach(Box::new(here), Direction::Source { resync: false }, Epoch(1), Instant::now());
    node.write(2, ByteRange::new(4096, 4096), 1);
    assert!(waits(&node));
    drop(there);
    let began = Instant::now();
    while !node.saw(|event| matches!(event, Event::LinkDown { .. })) {
        node.turn();
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(!waits(&node), "it waits for the operator now");
}

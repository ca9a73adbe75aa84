//! A served volume loses its disk: it is held, then goes on over the peer's, and no answer is wrong or comes too early.

use super::super::diskless::{Diskless, Fetch};
use super::*;
use crate::limits::{DETACH_S_MAX, DIRTY_GRAIN_LEN};

/// A pair in sync whose `a` has a file that can be cut, both filled alike.
fn pair_on_file(ack: AckLevel) -> (tempfile::NamedTempFile, Pair) {
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(SIZE).expect("set_len");
    let disk = DiskImage::open(file.path(), SIZE).expect("opens");
    let mut a = Node::with_disk(disk, ack, OnPeerLoss::Continue);
    a.volume.serve();
    let mut pair = Pair { a, b: Node::new(ack, OnPeerLoss::Continue), epoch: Epoch(1) };
    for n in 0..SIZE / 4096 {
        let byte = u8::try_from(n % 251).expect("small");
        pair.a.fill(ByteRange::new(n * 4096, 4096), byte);
        pair.b.fill(ByteRange::new(n * 4096, 4096), byte);
    }
    pair.connect(false);
    (file, pair)
}

fn is_failing(event: &Event) -> bool {
    matches!(event, Event::DiskFailing { .. })
}

fn is_failed(event: &Event) -> bool {
    matches!(event, Event::DiskFailed { .. })
}

impl Pair {
    /// Without a disk from here on.
    fn lose_disk(&mut self) {
        self.a.volume.disk.fail();
        self.until("the failure", |pair| pair.a.saw(is_failing));
        self.a.volume.detach();
        self.until("the end of the disk", |pair| pair.a.volume.disk.is_detached());
    }

    fn some_turns(&mut self) {
        for _ in 0..20 {
            self.turn();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for a read's turn and takes its bytes.
    fn take_read(&mut self, slot: u32, range: ByteRange) -> Vec<u8> {
        self.until("a read's turn", |pair| pair.a.granted.iter().any(|(s, _)| *s == slot));
        let at = self.a.granted.iter().position(|(s, _)| *s == slot).expect("just seen");
        let (_, token) = self.a.granted.remove(at);
        let mut bytes = vec![0; usize::try_from(range.len).expect("64-bit")];
        self.a.volume.disk.span(range).read_into(&mut bytes);
        self.a.volume.read_done(token);
        bytes
    }
}

#[test]
fn requests_are_held_until_the_peer_knows_and_then_go_on_over_its_disk() {
    for ack in [AckLevel::Async, AckLevel::Memory, AckLevel::Durable] {
        let (file, mut pair) = pair_on_file(ack);
        let early = ByteRange::new(0, 4096);
        pair.a.write(1, early, 1);
        pair.until_told(1);
        file.as_file().set_len(SIZE / 2).expect("cut");
        // A read meets it, as a front end does that touches the bytes before it promises them.
        let far = ByteRange::new(SIZE - 9000, 9000);
        let Begin::Go(token) = pair.a.begin(2, Op::Read, far, false) else { panic!("free") };
        pair.a.volume.disk.span(far).read_into(&mut [0; 9000]);
        assert!(pair.a.volume.disk.is_failed() && pair.a.volume.read_lost(token));
        // A write that was under way lands, and the peer applies it; its client is told nothing yet.
        assert!(matches!(
            pair.a.begin(3, Op::Change(Kind::Write), ByteRange::new(8192, 4096), false),
            Begin::Waits(_)
        ));
        pair.a.begin(4, Op::Flush, ByteRange::new(0, 0), false);
        pair.some_turns();
        assert!(pair.a.saw(is_failing) && !pair.a.saw(is_failed));
        assert_eq!((pair.a.told(3), pair.a.told(4)), (&[][..], &[][..]), "the peer has nothing on record");
        assert!(pair.a.granted.is_empty());

        pair.a.volume.detach();
        let bytes = pair.take_read(2, far);
        assert_eq!(bytes, pair.b.content()[usize::try_from(SIZE - 9000).expect("64-bit")..]);
        pair.until("the write's turn", |pair| pair.a.granted.iter().any(|(slot, _)| *slot == 3));
        let (_, token) = pair.a.granted.remove(0);
        pair.a.fill(ByteRange::new(8192, 4096), 3);
        pair.a.volume.landed(token);
        for slot in [3, 4] {
            pair.until_told(slot);
            assert_eq!(pair.a.told(slot), [Ok(())]);
        }
        // And from then on everything.
        pair.a.write(5, grains(3, 2), 5);
        let small = ByteRange::new(DIRTY_GRAIN_LEN, 300);
        pair.a.begin(6, Op::Change(Kind::WriteZeroes), small, true);
        pair.a.begin(7, Op::Change(Kind::Trim), grains(6, 3), false);
        pair.a.begin(8, Op::Change(Kind::WriteZeroes), grains(10, 3), false);
        pair.a.begin(9, Op::Flush, ByteRange::new(0, 0), false);
        for slot in 5..=9 {
            pair.until_told(slot);
            assert_eq!(pair.a.told(slot), [Ok(())], "{slot}");
        }
        let whole = ByteRange::new(0, SIZE);
        assert!(matches!(pair.a.begin(10, Op::Read, whole, false), Begin::Waits(_)));
        let bytes = pair.take_read(10, whole);
        assert!(bytes == pair.b.content(), "what is read is not the peer's");
        assert_eq!((bytes[8192], bytes[0]), (3, 1));
        assert!(pair.b.volume.disk.span(grains(6, 3)).is_zero() && pair.b.volume.disk.span(small).is_zero());
        assert_eq!(pair.a.volume.counters.reads_fetched.load(Ordering::Relaxed), 2);
        pair.until_quiet();
        pair.a.assert_nothing_left();
        pair.b.assert_nothing_left();
    }
}

#[test]
fn a_change_whose_bytes_are_lost_fails_and_leaves_the_peer_as_it_was() {
    let (file, mut pair) = pair_on_file(AckLevel::Memory);
    let before = pair.b.content();
    let (kept, lost, later) =
        (ByteRange::new(0, 4096), ByteRange::new(SIZE - 8192, 4096), ByteRange::new(4096, 512));
    let begin = |pair: &mut Pair, slot, range| {
        let Begin::Go(token) = pair.a.begin(slot, Op::Change(Kind::Write), range, false) else {
            panic!("free")
        };
        pair.a.fill(range, 0xAA);
        token
    };
    let tokens = [(1, kept), (2, lost), (3, later)].map(|(slot, range)| begin(&mut pair, slot, range));
    file.as_file().set_len(SIZE / 2).expect("cut");
    for token in tokens {
        pair.a.volume.landed(token);
    }
    pair.some_turns();
    assert!(pair.a.saw(is_failing));
    assert!(pair.a.told.is_empty(), "{:?}", pair.a.told);
    pair.a.volume.detach();
    for (slot, result) in [(1, Ok(())), (2, Err(IoError::DiskFailed)), (3, Ok(()))] {
        pair.until_told(slot);
        assert_eq!(pair.a.told(slot), [result], "{slot}");
    }
    let after = pair.b.content();
    assert_eq!(after[..4096], [0xAA; 4096]);
    assert_eq!(after[4096..4608], [0xAA; 512]);
    assert!(after[4608..] == before[4608..], "zeroes of a lost page reached the peer");
    pair.until_quiet();
    pair.a.assert_nothing_left();
}

#[test]
fn an_answer_given_by_async_for_bytes_that_are_lost_ends_the_service() {
    let (file, mut pair) = pair_on_file(AckLevel::Async);
    let range = ByteRange::new(SIZE - 4096, 4096);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
    pair.a.fill(range, 0xAA);
    file.as_file().set_len(SIZE / 2).expect("cut");
    pair.a.volume.landed(token);
    pair.until("the end", |pair| pair.a.saw(is_failed));
    assert_eq!(pair.a.told(1), [Ok(())], "that is what async means");
    assert!(matches!(pair.a.begin(2, Op::Read, range, false), Begin::Failed(IoError::DiskFailed)));
}

#[test]
fn writes_that_were_let_through_before_the_disk_failed_are_placed_in_memory() {
    let (file, mut pair) = pair_on_file(AckLevel::Memory);
    let (good, bad, fresh) = (ByteRange::new(100, 8000), ByteRange::new(SIZE - 8192, 8192), grains(20, 1));
    let tokens = [(1, good), (2, bad), (3, fresh)].map(|(slot, range)| {
        let Begin::Go(token) = pair.a.begin(slot, Op::Change(Kind::Write), range, false) else {
            panic!("free")
        };
        token
    });
    // What had been placed of them by then does not count.
    for range in [good, bad] {
        pair.a.fill(ByteRange::new(range.start, 3000), 7);
    }
    file.as_file().set_len(SIZE / 2).expect("cut");
    pair.lose_disk();
    for (token, range) in tokens.into_iter().zip([good, bad, fresh]) {
        pair.a.fill(range, 7);
        pair.a.volume.landed(token);
    }
    let there = |pair: &Pair, range: ByteRange| {
        let at = usize::try_from(range.start).expect("64-bit")..usize::try_from(range.end()).expect("64-bit");
        pair.b.content()[at].iter().all(|byte| *byte == 7)
    };
    for (slot, range) in [(1, good), (2, bad), (3, fresh)] {
        pair.until_told(slot);
        assert_eq!(pair.a.told(slot), [Ok(())], "{slot}");
        assert!(there(&pair, range), "{slot}");
    }
}

#[test]
fn a_write_that_is_taken_back_without_a_disk_leaves_the_peer_as_it_was() {
    for gone in [false, true] {
        let (_file, mut pair) = pair_on_file(AckLevel::Memory);
        let before = pair.b.content();
        let range = grains(3, 2);
        if gone {
            pair.lose_disk();
        }
        let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
        if !gone {
            pair.a.volume.disk.fail();
            pair.until("the failure", |pair| pair.a.saw(is_failing));
        }
        pair.a.volume.cancel_waiting(token);
        if !gone {
            pair.a.volume.detach();
            pair.until("the end of the disk", |pair| pair.a.volume.disk.is_detached());
        }
        // Whoever reads there gets what was there.
        pair.a.begin(2, Op::Read, range, false);
        let bytes = pair.take_read(2, range);
        let at = usize::try_from(range.start).expect("small")..usize::try_from(range.end()).expect("small");
        assert!(bytes == before[at], "gone: {gone}");
        assert!(pair.b.content() == before && pair.a.told(1).is_empty());
        pair.until_quiet();
        pair.a.assert_nothing_left();
    }
}

#[test]
fn a_write_taken_back_before_anybody_noticed_costs_no_stand_in() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    let range = grains(3, 1);
    let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), range, false) else { panic!("free") };
    pair.a.volume.disk.fail();
    pair.a.volume.cancel_waiting(token);
    pair.until("the failure", |pair| pair.a.saw(is_failing));
    pair.a.volume.detach();
    pair.until("the end of the disk", |pair| pair.a.volume.disk.is_detached());
    pair.a.begin(2, Op::Read, range, false);
    pair.take_read(2, range);
}

#[test]
fn bytes_that_are_lost_are_no_hole() {
    let (file, pair) = pair_on_file(AckLevel::Memory);
    let disk = &pair.a.volume.disk;
    file.as_file().set_len(SIZE / 2).expect("cut");
    assert!(!disk.extent_at(SIZE - 8192, SIZE).hole, "nobody has noticed yet");
    file.as_file().set_len(SIZE).expect("longer");
    assert!(disk.extent_at(SIZE - 8192, SIZE).hole);
    disk.fail();
    assert!(!disk.extent_at(SIZE - 8192, SIZE).hole);
}

#[test]
fn the_peer_is_asked_no_more_than_it_answers() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    let reads = u32::try_from(crate::limits::READS_OWED_MAX + 200).expect("small");
    let mut ready = Vec::new();
    for slot in 1..=reads {
        let Begin::Go(token) = pair.a.begin(slot, Op::Read, ByteRange::new(0, 4096), false) else {
            panic!("reads never wait for each other")
        };
        ready.push(token);
    }
    pair.a.volume.disk.fail();
    // Their clients take no replies: they are all put back, and all go on at once.
    assert!(ready.into_iter().all(|token| pair.a.volume.read_lost(token)));
    pair.until("the failure", |pair| pair.a.saw(is_failing));
    pair.a.volume.detach();
    pair.until("all of them", |pair| pair.a.granted.len() == reads as usize);
    assert_eq!(pair.b.volume.counters.violations.load(Ordering::Relaxed), 0);
    let oldest = Fetch { id: 7, token: Token(0), range: grains(0, 1), got: 0, asked: true };
    let mut diskless = Diskless::default();
    diskless.fetches.push_back(oldest);
    let most = crate::limits::FETCHES_MAX as u64;
    assert!(!diskless.is_asked_enough(6 + most) && diskless.is_asked_enough(7 + most));
}

#[test]
fn a_reply_that_is_half_out_keeps_the_disk_mapped_until_it_is_copied_aside() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    let range = ByteRange::new(4096, 4096);
    let Begin::Go(token) = pair.a.begin(1, Op::Read, range, false) else { panic!("free") };
    pair.a.volume.pin(token);
    pair.a.volume.disk.fail();
    pair.a.volume.pump(Instant::now());
    pair.a.volume.pump(Instant::now());
    assert!(pair.a.volume.notices.contains(&Notice::Unpin { token }));
    pair.a.volume.detach();
    pair.some_turns();
    assert!(!pair.a.volume.disk.is_detached());
    pair.a.volume.unpin(token);
    pair.until("the end of the disk", |pair| pair.a.volume.disk.is_detached());
}

#[test]
fn a_call_that_fails_on_the_disk_is_the_peers_to_do() {
    let (file, mut pair) = pair_on_file(AckLevel::Memory);
    file.as_file().set_len(0).expect("cut");
    let mut byte = [0];
    pair.a.volume.disk.span(ByteRange::new(SIZE - 1, 1)).read_into(&mut byte);
    // The volume has not looked yet; the worker meets the failure.
    pair.a.volume.workers.submit(Job { kind: JobKind::Flush, token: PIPELINE_FLUSH });
    let Begin::Waits(_) = pair.a.begin(1, Op::Change(Kind::Trim), grains(2, 2), false) else {
        panic!("held")
    };
    pair.some_turns();
    assert!(pair.a.saw(is_failing));
    pair.a.volume.detach();
    pair.until_told(1);
    assert_eq!(pair.a.told(1), [Ok(())]);
    assert!(pair.b.volume.disk.span(grains(2, 2)).is_zero());
}

#[test]
fn without_the_peer_too_everything_fails_and_control_hears_of_the_link_first() {
    for gone in [false, true] {
        let (_file, mut pair) = pair_on_file(AckLevel::Memory);
        let Begin::Go(token) = pair.a.begin(1, Op::Change(Kind::Write), grains(1, 1), false) else {
            panic!("free")
        };
        if gone {
            pair.lose_disk();
        } else {
            pair.a.volume.disk.fail();
            pair.until("the failure", |pair| pair.a.saw(is_failing));
        }
        pair.a.begin(2, Op::Read, grains(4, 1), false);
        pair.a.begin(3, Op::Change(Kind::Trim), grains(6, 1), false);
        pair.a.volume.close_link(DownReason::Local("cut by the test"));
        let down = |event: &Event| matches!(event, Event::LinkDown { .. });
        if gone {
            // The session may go on: what waits, waits, but not for ever.
            pair.some_turns();
            assert!(pair.a.events.iter().any(down) && !pair.a.events.iter().any(is_failed));
            assert!(pair.a.told(2).is_empty() && pair.a.told(3).is_empty());
            pair.a.volume.session.end_patience();
        }
        while !pair.a.events.iter().any(is_failed) {
            pair.a.turn();
        }
        let place = |wanted: fn(&Event) -> bool| pair.a.events.iter().position(wanted).expect("told");
        assert!(place(down) < place(is_failed));
        assert!(!pair.a.saw(|event| matches!(event, Event::AskAlone { .. })));
        assert_eq!(
            (pair.a.told(2), pair.a.told(3)),
            (&[Err(IoError::DiskFailed)][..], &[Err(IoError::DiskFailed)][..])
        );
        pair.a.volume.landed(token);
        pair.a.turn();
        assert_eq!(pair.a.told(1), [Err(IoError::DiskFailed)]);
        assert!(matches!(pair.a.begin(4, Op::Read, grains(4, 1), false), Begin::Failed(IoError::DiskFailed)));
        pair.a.assert_nothing_left();
    }
}

#[test]
fn without_a_disk_a_link_that_breaks_costs_a_pause() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    pair.lose_disk();
    pair.a.write(1, grains(3, 1), 3);
    pair.until_told(1);
    for round in 1..4 {
        let (read, written, late) = (10 * round, 10 * round + 1, 10 * round + 2);
        pair.a.begin(read, Op::Read, grains(3, 1), false);
        pair.a.write(written, grains(5, 1), 7);
        pair.a.turn();
        pair.cut();
        pair.a.begin(late, Op::Read, grains(3, 1), false);
        pair.some_turns();
        assert!(pair.a.told(written).is_empty() && pair.a.granted.is_empty(), "nobody has answered");
        pair.go_on();
        for slot in [read, late] {
            assert!(pair.take_read(slot, grains(3, 1)).iter().all(|byte| *byte == 3));
        }
        pair.until_told(written);
        assert_eq!(pair.a.told(written), [Ok(())]);
    }
    assert!(!pair.b.volume.disk.span(grains(5, 1)).is_zero());
    assert!(!pair.a.saw(is_failed));
}

#[test]
fn a_peer_that_never_puts_it_on_record_is_not_waited_for_for_good() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    pair.a.volume.disk.fail();
    pair.until("the failure", |pair| pair.a.saw(is_failing));
    pair.a.begin(1, Op::Read, grains(4, 1), false);
    pair.some_turns();
    assert_eq!(pair.a.told(1), []);
    pair.a.volume.pump(Instant::now() + Duration::from_secs(DETACH_S_MAX + 1));
    pair.until("the end", |pair| pair.a.saw(is_failed));
    assert_eq!(pair.a.told(1), [Err(IoError::DiskFailed)]);
    // What comes too late changes nothing.
    pair.a.volume.detach();
    pair.some_turns();
    assert!(!pair.a.volume.disk.is_detached());
}

#[test]
fn a_service_that_ends_without_a_disk_leaves_none() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    pair.lose_disk();
    pair.a.write(1, grains(3, 1), 3);
    pair.a.volume.quiesce();
    pair.until("the quiesce", |pair| pair.a.saw(|event| matches!(event, Event::Quiesced { .. })));
    assert_eq!(pair.a.told(1), [Ok(())]);
    pair.a.volume.stop_serving();
    pair.until("its end", |pair| pair.a.saw(is_failed));
    assert!(pair.a.volume.disk.is_failed(), "memory is no disk to apply a peer's changes to");
}

#[test]
fn only_a_served_volume_with_a_peer_in_sync_outlives_its_disk() {
    let cases: [fn(&mut Pair); 3] = [
        |pair| {
            pair.cut();
        },
        |pair| pair.a.volume.serving = false,
        |pair| pair.a.volume.quiesce(),
    ];
    for (n, spoil) in cases.into_iter().enumerate() {
        let (_file, mut pair) = pair_on_file(AckLevel::Memory);
        spoil(&mut pair);
        pair.a.volume.disk.fail();
        pair.a.turn();
        assert!(pair.a.saw(is_failed) && !pair.a.saw(is_failing), "case {n}");
    }
    // The target of a session has nobody to stand in for it.
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    pair.b.volume.disk.fail();
    pair.until("the failure", |pair| pair.b.saw(is_failed));
}

#[test]
fn lies_about_reads_close_the_link() {
    let read = |range| Header { range, ..Header::new(Kind::Read, Epoch(1)) };
    let target = Direction::Target { resync: false };
    let source = Direction::Source { resync: false };
    let mut old = read(grains(0, 1));
    old.epoch = Epoch(0);
    for (direction, lie) in
        [(source, read(grains(0, 1))), (target, read(ByteRange::new(SIZE - 1, 2))), (target, old)]
    {
        let mut node = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
        node.volume.serve();
        let (here, mut raw) = loopback::pair(RING_LEN).expect("ring memory");
        node.volume.attach(Box::new(here), direction, Epoch(1), Instant::now());
        raw.send(lie).expect("credit");
        raw.kick();
        let began = Instant::now();
        while !node.saw(|event| matches!(event, Event::LinkDown { .. })) {
            node.turn();
            assert!(began.elapsed() < PATIENCE, "{lie:?} was believed");
        }
        assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 1, "{lie:?}");
    }
}

#[test]
fn answers_that_are_not_due_close_the_link_and_reach_no_client() {
    for wrong in 0..5 {
        let (_file, mut pair) = pair_on_file(AckLevel::Memory);
        pair.lose_disk();
        let range = grains(4, if wrong == 4 { 1 } else { 2 });
        if wrong > 0 {
            pair.a.begin(1, Op::Read, range, false);
        }
        // What is not asked before the next turn is answered already.
        assert!(pair.a.volume.diskless.fetches.iter().all(|fetch| !fetch.asked));
        if (1..4).contains(&wrong) {
            pair.a.volume.pump(Instant::now());
        }
        let bytes = pair.b.volume.disk.span(grains(5, 1));
        let mut header = Header::new(Kind::ReadReply, Epoch(1));
        (header.aux, header.range, header.payload_crc) = (1, grains(4, 1), bytes.crc32c());
        match wrong {
            1 => header.range = grains(5, 1),
            2 => header.aux = 2,
            3 => header.payload_crc ^= 1,
            _ => {}
        }
        let link = pair.b.volume.session.link_mut();
        let permit = link.claim(header.payload_len()).expect("room");
        link.post(permit, header, Some(bytes), Token(u64::MAX));
        link.kick();
        pair.a.volume.poll(Instant::now());
        if wrong == 3 {
            // Damage on the way says nothing about the peer: the session could go on.
            pair.until("the link's end", |pair| pair.a.saw(|event| matches!(event, Event::LinkDown { .. })));
            assert!(!pair.a.saw(is_failed));
            pair.a.volume.session.end_patience();
        }
        pair.until("the end", |pair| pair.a.saw(is_failed));
        assert_eq!(pair.a.volume.counters.violations.load(Ordering::Relaxed), 1, "case {wrong}");
        assert!(pair.a.granted.is_empty());
    }
}

#[test]
fn a_client_that_leaves_in_mid_read_leaves_nothing_behind() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    pair.lose_disk();
    let Begin::Waits(token) = pair.a.begin(1, Op::Read, grains(4, 2), false) else { panic!("fetched") };
    pair.a.volume.cancel_waiting(token);
    assert!(
        matches!(pair.a.begin(2, Op::Change(Kind::Write), grains(5, 1), false), Begin::Waits(_)),
        "the answer is still to be put there"
    );
    pair.until("the write's turn", |pair| !pair.a.granted.is_empty());
    let (slot, token) = pair.a.granted.remove(0);
    assert_eq!(slot, 2);
    pair.a.fill(grains(5, 1), 9);
    pair.a.volume.landed(token);
    pair.until_told(2);
    pair.until_quiet();
    pair.a.assert_nothing_left();
}

/// Reads and writes, many at a time, while the disk fails; reads are compared with what was written before.
#[test]
fn under_load_every_read_is_right_before_and_after() {
    for seed in 1..=3_u64 {
        let (_file, mut pair) = pair_on_file(AckLevel::Memory);
        let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = move |below: u64| {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            (rng >> 20) % below
        };
        let mut model = pair.b.content();
        let mut open: HashMap<u32, (Op, ByteRange, u8)> = HashMap::new();
        let (mut reads, mut begun) = (0, 0_u32);
        while begun < 4000 || !open.is_empty() {
            if begun < 4000 && open.len() < 16 {
                begun += 1;
                if begun == 1000 {
                    pair.a.volume.disk.fail();
                }
                let start = random(SIZE - 1);
                let range = ByteRange::new(start, 1 + random((SIZE - start).min(100_000)));
                let op = if random(5) < 2 { Op::Read } else { Op::Change(Kind::Write) };
                let byte = u8::try_from(1 + random(255)).expect("small");
                open.insert(begun, (op, range, byte));
                match pair.a.begin(begun, op, range, random(20) == 0) {
                    Begin::Go(token) => pair.a.granted.push((begun, token)),
                    Begin::Waits(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            for (slot, token) in std::mem::take(&mut pair.a.granted) {
                let (op, range, byte) = open[&slot];
                let at = usize::try_from(range.start).expect("64-bit")
                    ..usize::try_from(range.end()).expect("64-bit");
                if op == Op::Read {
                    if pair.a.volume.disk.is_failed() && pair.a.volume.read_lost(token) {
                        continue;
                    }
                    let mut bytes = vec![0; at.len()];
                    pair.a.volume.disk.span(range).read_into(&mut bytes);
                    assert!(bytes == model[at], "seed {seed}: read {slot} of {range}");
                    pair.a.volume.read_done(token);
                    open.remove(&slot);
                    reads += 1;
                } else {
                    pair.a.fill(range, byte);
                    model[at].fill(byte);
                    pair.a.volume.landed(token);
                }
            }
            pair.turn();
            if pair.a.saw(is_failing) {
                pair.some_turns();
                assert!(open.keys().any(|slot| pair.a.told(*slot).is_empty()), "all was answered");
                pair.a.volume.detach();
            }
            let done: Vec<u32> = open.keys().copied().filter(|slot| !pair.a.told(*slot).is_empty()).collect();
            for slot in done {
                let (op, range, _) = open.remove(&slot).expect("open");
                assert_eq!(pair.a.told(slot), [Ok(())], "seed {seed}: {op:?} of {range}");
            }
        }
        assert!(pair.a.volume.disk.is_detached() && reads > 500);
        let there = pair.b.content();
        assert!(there == model, "seed {seed}");
        pair.a.assert_nothing_left();
        pair.b.assert_nothing_left();
    }
}

#[test]
fn what_passed_through_is_given_back() {
    let (_file, mut pair) = pair_on_file(AckLevel::Memory);
    pair.lose_disk();
    let volume = &mut pair.a.volume;
    let whole = ByteRange::new(0, SIZE);
    volume.disk.span(whole).write_from(&vec![1; usize::try_from(SIZE).expect("64-bit")]);
    let Begin::Go(token) = volume.begin(NewRequest {
        origin: Origin::Queue { queue: 0, slot: 1 },
        op: Op::Change(Kind::Write),
        range: ByteRange::new(5000, 10),
        fua: false,
    }) else {
        panic!("free")
    };
    for n in 0..4 * crate::limits::DISKLESS_RANGES_MAX as u64 {
        volume.passed_through(ByteRange::new(n * 3 * 4096 % SIZE, 4096));
    }
    assert!(volume.disk.span(ByteRange::new(8192, SIZE / 2)).is_zero(), "memory of before");
    let mut in_use = [0];
    volume.disk.span(ByteRange::new(5000, 1)).read_into(&mut in_use);
    assert_eq!(in_use, [1], "a payload is arriving there");
    volume.landed(token);
}

#[test]
fn a_verification_under_way_ends_with_the_disk_or_when_stopped_and_its_steps_with_their_acks() {
    for stopped in [false, true] {
        let (_file, mut pair) = pair_on_file(AckLevel::Memory);
        pair.a.volume.verify(true);
        let began = Instant::now();
        while pair.a.volume.pipeline.all_released() {
            pair.a.turn();
            assert!(began.elapsed() < PATIENCE, "no step was posted");
        }
        if stopped {
            pair.a.volume.stop_verify();
        } else {
            pair.lose_disk();
        }
        let ended = |e: &Event| matches!(e, Event::Verified { outcome, .. } if outcome.unfinished.is_some());
        pair.until("its end", |pair| pair.a.saw(ended));
        pair.until_quiet();
        if !stopped {
            pair.a.volume.verify(false);
            assert!(pair.a.volume.events.iter().any(ended), "there is nothing to compare");
        }
        pair.until_quiet();
        pair.a.assert_nothing_left();
    }
}

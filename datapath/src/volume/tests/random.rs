//! Random clients, cuts, sessions that go on and others, copies and links of other kinds: whatever happens, both disks end equal, everyone is answered once,
//! nothing is left, and at every moment what differs is what a crash of both nodes would leave marked.

use super::delta::{marked_after_a_crash, stored};
use super::links::Make;
use super::*;
use crate::testing::simulated_medium::Simulated;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    Change {
        kind: Kind,
        range: ByteRange,
        byte: u8,
        fua: bool,
        breaks_off: bool,
    },
    Read {
        range: ByteRange,
    },
    Flush,
    /// The payload of the so-manyth open write is in.
    Land(prop::sample::Index),
    Turns(u8),
    /// The link is lost; `recorded` says whether the primary goes on alone.
    Cut {
        recorded: bool,
        by_peer: bool,
    },
    /// A session goes on over a link of this kind.
    Connect {
        full: bool,
        make: Make,
    },
    /// A checkpoint, or, where that has nothing to do, an empty log.
    Settle,
    /// The peers' controllers say something.
    Say {
        source: bool,
    },
}

fn ranges() -> impl Strategy<Value = ByteRange> {
    let len = prop_oneof![4 => 1..20_000u64, 1 => 60_000..300_000u64];
    // A narrow disk, so that requests meet; its odd tail as well.
    (prop_oneof![3 => 0..200_000u64, 1 => 0..SIZE], len).prop_map(|(start, len)| {
        let start = start.min(SIZE - 1);
        ByteRange::new(start, len.min(SIZE - start))
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![3 => Just(Kind::Write), 1 => Just(Kind::WriteZeroes), 1 => Just(Kind::Trim)];
    let change = (kind, ranges(), 1..=255u8, prop::bool::weighted(0.2), prop::bool::weighted(0.1));
    let makes = prop::sample::select(vec![Make::Loopback, Make::Rdma, Make::Slow]);
    let step = prop_oneof![
        10 => change.prop_map(|(kind, range, byte, fua, breaks_off)| Step::Change { kind, range, byte, fua, breaks_off }),
        2 => ranges().prop_map(|range| Step::Read { range }),
        2 => Just(Step::Flush),
        8 => any::<prop::sample::Index>().prop_map(Step::Land),
        8 => (1..6u8).prop_map(Step::Turns),
        1 => any::<(bool, bool)>().prop_map(|(recorded, by_peer)| Step::Cut { recorded, by_peer }),
        2 => (prop::bool::weighted(0.2), makes).prop_map(|(full, make)| Step::Connect { full, make }),
        2 => Just(Step::Settle),
        2 => any::<bool>().prop_map(|source| Step::Say { source }),
    ];
    prop::collection::vec(step, 1..100)
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    op: Op,
    range: ByteRange,
    byte: u8,
    breaks_off: bool,
}

struct Run {
    pair: Pair,
    asked: Vec<Asked>,
    /// Writes whose payload is on its way.
    open: Vec<(u32, Token)>,
    /// A copy is under way that control waits for.
    copying: bool,
    media: [Simulated; 2],
    /// Messages said and heard in this session, by who hears them.
    said: [u64; 2],
    heard: [u64; 2],
}

impl Run {
    fn new(ack: AckLevel) -> Self {
        let mut media = Vec::new();
        let mut node = || {
            let (medium, record) = stored(SIZE);
            media.push(medium);
            let disk = DiskImage::memory("test", SIZE).expect("memory");
            Node::with_record(disk, record, ack, OnPeerLoss::Continue)
        };
        let mut pair = Pair { a: node(), b: node(), epoch: Epoch(1) };
        pair.a.volume.serve();
        pair.b.fill(grains(3, 9), 0xEE);
        // Each knows of a part of it.
        pair.a.volume.record.mark(grains(3, 5));
        pair.b.volume.record.mark(grains(7, 5));
        for node in [&mut pair.a, &mut pair.b] {
            let round = node.volume.record.ask_store();
            let began = Instant::now();
            while !node.volume.record.is_stored(round) {
                node.turn();
                assert!(began.elapsed() < PATIENCE);
            }
        }
        Self {
            pair,
            copying: false,
            media: media.try_into().expect("two"),
            asked: Vec::new(),
            open: Vec::new(),
            said: [0; 2],
            heard: [0; 2],
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Change { kind, range, byte, fua, breaks_off } => {
                self.ask(
                    Asked {
                        op: Op::Change(kind),
                        range,
                        byte,
                        breaks_off: breaks_off && kind == Kind::Write,
                    },
                    fua,
                );
            }
            Step::Read { range } => {
                self.ask(Asked { op: Op::Read, range, byte: 0, breaks_off: false }, false);
            }
            Step::Flush => {
                self.ask(
                    Asked { op: Op::Flush, range: ByteRange::new(0, 0), byte: 0, breaks_off: false },
                    false,
                );
            }
            Step::Land(_) if self.open.is_empty() => {}
            Step::Land(index) => self.land(index.index(self.open.len())),
            Step::Turns(count) => (0..count).for_each(|_| self.turn()),
            Step::Cut { recorded, by_peer } => self.cut(recorded, by_peer),
            Step::Connect { full, make } => self.connect(full, make),
            Step::Settle => self.settle(),
            Step::Say { source } => self.say(usize::from(!source)),
        }
    }

    fn node(&mut self, who: usize) -> &mut Node {
        if who == 0 { &mut self.pair.a } else { &mut self.pair.b }
    }

    fn say(&mut self, who: usize) {
        if self.node(who).volume.has_link() {
            self.said[1 - who] += 1;
            let arg = self.said[1 - who];
            self.node(who).volume.send_peer(1, arg);
        }
    }

    /// Messages come in order and none is missing.
    fn listen(&mut self) {
        for who in 0..2 {
            let messages = self.node(who).events.extract_if(.., |e| matches!(e, Event::PeerMessage { .. }));
            let args: Vec<u64> =
                messages.map(|e| if let Event::PeerMessage { arg, .. } = e { arg } else { 0 }).collect();
            for arg in args {
                self.heard[who] += 1;
                assert_eq!(arg, self.heard[who], "a message was lost, doubled or overtaken");
            }
        }
    }

    fn ask(&mut self, asked: Asked, fua: bool) {
        let slot = u32::try_from(self.asked.len()).expect("few");
        self.asked.push(asked);
        match self.pair.a.begin(slot, asked.op, asked.range, fua) {
            Begin::Go(token) => self.go(slot, token),
            Begin::Waits(_) => {}
            other => panic!("{other:?} while serving with room"),
        }
    }

    fn go(&mut self, slot: u32, token: Token) {
        match self.asked[slot as usize].op {
            Op::Read => self.pair.a.volume.read_done(token),
            Op::Change(Kind::Write) => self.open.push((slot, token)),
            Op::Change(_) | Op::Flush => {}
        }
    }

    fn land(&mut self, at: usize) {
        let (slot, token) = self.open.swap_remove(at);
        let Asked { range, byte, breaks_off, .. } = self.asked[slot as usize];
        if breaks_off {
            self.pair.a.volume.cancel_waiting(token);
        } else {
            self.pair.a.fill(range, byte);
            self.pair.a.volume.landed(token);
        }
    }

    fn turn(&mut self) {
        self.pair.turn();
        self.listen();
        for (slot, token) in std::mem::take(&mut self.pair.a.granted) {
            self.go(slot, token);
        }
        if self.pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })) {
            self.pair.a.volume.peer_in_sync();
            self.copying = false;
        }
    }

    fn settle(&mut self) {
        let volume = &mut self.pair.a.volume;
        if volume.record.can_checkpoint() {
            volume.begin_checkpoint();
        } else if volume.record.can_retire() {
            volume.record.settle();
        }
    }

    /// Whatever differs, in either's memory, is marked on a medium.
    fn assert_marked(&self) {
        let grain = usize::try_from(crate::limits::DIRTY_GRAIN_LEN).expect("small");
        let marked = self.media.each_ref().map(|medium| marked_after_a_crash(medium, SIZE));
        let (a, b) = (self.pair.a.content(), self.pair.b.content());
        for (at, (here, there)) in a.chunks(grain).zip(b.chunks(grain)).enumerate() {
            let is_marked = marked.iter().any(|map| map.window(grains(at as u64, 1).start) & 1 != 0);
            assert!(here == there || is_marked, "grain {at} differs and is not marked");
        }
    }

    fn cut(&mut self, recorded: bool, by_peer: bool) {
        if self.pair.a.volume.has_link() {
            if by_peer {
                self.pair.b.volume.close_link(DownReason::Local("cut by the test"));
            }
            self.pair.cut();
            self.listen();
        }
        if recorded {
            self.pair.a.volume.go_alone();
        }
    }

    fn connect(&mut self, full: bool, make: Make) {
        if self.pair.a.volume.has_link() || self.pair.b.volume.has_link() {
            return;
        }
        (self.said, self.heard) = ([0; 2], [0; 2]);
        let recalls = [&self.pair.a, &self.pair.b].map(|node| node.volume.told_of_parting().is_some());
        // Now and then one of the two was restarted, as far as the other knows.
        let restarted = self.asked.len() % 5 == 4;
        if full {
            self.pair.connect(true);
        } else if recalls == [true, true] && !restarted {
            self.pair.go_on_over(make.ends());
        } else if recalls[1] && !recalls[0] && !restarted && self.pair.a.volume.record.is_dirty() {
            self.pair.join_kept();
        } else {
            let dirty = [&self.pair.a, &self.pair.b].map(|node| node.volume.record.is_dirty());
            self.pair.join(dirty != [false, false]);
        }
        self.copying = self.pair.a.volume.background.is_copying();
    }

    fn finish(mut self) {
        self.connect(false, Make::Loopback);
        let began = Instant::now();
        loop {
            while !self.open.is_empty() {
                self.land(0);
            }
            self.turn();
            std::thread::yield_now();
            let v = &self.pair.a.volume;
            if !self.copying && v.has_link() && v.requests.is_empty() && self.said == self.heard {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "never quiet: {:?}", v.requests.iter().collect::<Vec<_>>());
        }
        self.pair.assert_equal_and_clean();
        for (slot, asked) in (0u32..).zip(&self.asked) {
            let silent = asked.op == Op::Read || asked.breaks_off;
            let wanted: &[_] = if silent { &[] } else { &[Ok(())] };
            assert_eq!(self.pair.a.told(slot), wanted, "{asked:?}");
        }
        assert_eq!(self.pair.a.volume.counters.violations.load(Ordering::Relaxed), 0);
        assert_eq!(self.pair.b.volume.counters.violations.load(Ordering::Relaxed), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn both_disks_end_equal_and_nothing_is_left(
        ack in prop_oneof![Just(AckLevel::Async), Just(AckLevel::Memory), Just(AckLevel::Durable)],
        steps in steps(),
    ) {
        let mut run = Run::new(ack);
        for (n, step) in steps.into_iter().enumerate() {
            run.step(step);
            if n % 4 == 0 {
                run.assert_marked();
            }
        }
        run.finish();
    }
}

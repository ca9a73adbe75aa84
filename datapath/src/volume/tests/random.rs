//! Random clients, cuts, copies and changes of link: whatever happens, both disks end equal, everyone is answered once, nothing is left.

use super::links::Make;
use super::*;
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
    Connect {
        resync: bool,
    },
    /// Another link is made; each end is told of it later.
    NewLink(Make),
    Tell {
        source: bool,
    },
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
    let step = prop_oneof![
        10 => change.prop_map(|(kind, range, byte, fua, breaks_off)| Step::Change { kind, range, byte, fua, breaks_off }),
        2 => ranges().prop_map(|range| Step::Read { range }),
        2 => Just(Step::Flush),
        8 => any::<prop::sample::Index>().prop_map(Step::Land),
        8 => (1..6u8).prop_map(Step::Turns),
        1 => any::<(bool, bool)>().prop_map(|(recorded, by_peer)| Step::Cut { recorded, by_peer }),
        2 => any::<bool>().prop_map(|resync| Step::Connect { resync }),
        1 => prop::sample::select(vec![Make::Loopback, Make::Rdma, Make::Slow]).prop_map(Step::NewLink),
        3 => any::<bool>().prop_map(|source| Step::Tell { source }),
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
    /// The peer lacks something that only a copy brings it.
    behind: bool,
    /// The ends of a new link that were not handed over yet, and its number.
    new_link: [Option<Box<dyn Link>>; 2],
    serial: u64,
    /// Messages said and heard in this session, by who hears them.
    said: [u64; 2],
    heard: [u64; 2],
}

impl Run {
    fn new(ack: AckLevel) -> Self {
        let pair = Pair::new(ack, OnPeerLoss::Continue);
        pair.b.fill(ByteRange::new(0, SIZE), 0xEE);
        Self {
            pair,
            asked: Vec::new(),
            open: Vec::new(),
            behind: true,
            new_link: [None, None],
            serial: 0,
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
            Step::Connect { resync } => self.connect(resync),
            Step::NewLink(make) => {
                let (here, there) = make.ends();
                self.new_link = [Some(here), Some(there)];
            }
            Step::Tell { source } => self.tell(usize::from(!source)),
            Step::Say { source } => self.say(usize::from(!source)),
        }
    }

    fn node(&mut self, who: usize) -> &mut Node {
        if who == 0 { &mut self.pair.a } else { &mut self.pair.b }
    }

    fn tell(&mut self, who: usize) {
        let Some(link) = self.new_link[who].take() else { return };
        if self.new_link[1 - who].is_some() {
            self.serial += 1;
        }
        let serial = self.serial;
        self.node(who).volume.switch_link(link, serial, Instant::now());
    }

    fn say(&mut self, who: usize) {
        if self.node(who).volume.has_link() {
            self.said[1 - who] += 1;
            let arg = self.said[1 - who];
            self.node(who).volume.send_peer(1, arg);
        }
    }

    /// Messages come in order and none is missing, whatever links they came over.
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
        let Asked { mut range, byte, breaks_off, .. } = self.asked[slot as usize];
        if breaks_off {
            range.len /= 2;
            self.pair.a.fill(range, byte);
            self.pair.a.volume.landed_in_part(token);
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
            self.behind = false;
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
            self.behind = true;
        }
    }

    fn connect(&mut self, resync: bool) {
        if self.pair.a.volume.has_link() || self.pair.b.volume.has_link() {
            return;
        }
        let resync = resync || self.behind;
        self.behind = resync;
        (self.said, self.heard) = ([0; 2], [0; 2]);
        self.pair.connect(resync);
    }

    fn finish(mut self) {
        self.connect(false);
        (0..2).for_each(|who| self.tell(who));
        let began = Instant::now();
        loop {
            while !self.open.is_empty() {
                self.land(0);
            }
            self.turn();
            std::thread::yield_now();
            let v = &self.pair.a.volume;
            if !self.behind && v.requests.iter().all(Option::is_none) && self.said == self.heard {
                break;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "never quiet: {:?}",
                v.requests.iter().flatten().collect::<Vec<_>>()
            );
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
        for step in steps {
            run.step(step);
        }
        run.finish();
    }
}

//! Every interleaving of two ends that change their link: told in any order or never, links lost at any point with or
//! without what is on its way, patience that ends. What holds at the end of [`Steps`]' file head is checked in each state.

use super::*;
use std::collections::{HashSet, VecDeque};

/// Changes each end sends; the two together fill every gap between steps.
const FRAMES: [u8; 2] = [3, 2];
const SERIAL: u64 = 9;

/// A frame on its way, by number: a step, or a change from 1 on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Frame {
    Step(Step),
    Change(u8),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Mode {
    /// Over the old link; `told`: of the change, which then came to nothing.
    Old {
        told: bool,
    },
    Changing(Steps),
    New,
    /// The session ended.
    Down,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct End {
    mode: Mode,
    sent: u8,
    delivered: u8,
    /// Kept back; `None` is the new link's end.
    held: VecDeque<Option<Frame>>,
    /// This end has let go of the link: what the peer sends there goes nowhere.
    left: [bool; 2],
    lost_seen: [bool; 2],
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    ends: [End; 2],
    /// `wire[side][to]`.
    wire: [[VecDeque<Frame>; 2]; 2],
    lost: [bool; 2],
    /// Deaths that came from outside: one is enough to see what it does.
    killed: bool,
    expired: bool,
    /// Something happened that may cost the session.
    harmed: bool,
}

/// Takes a move to make from the state at hand.
type Then<'a> = dyn FnMut(&dyn Fn(&mut World)) + 'a;

fn at(side: Side) -> usize {
    side as usize
}

impl World {
    fn new() -> Self {
        let end = || End {
            mode: Mode::Old { told: false },
            sent: 0,
            delivered: 0,
            held: VecDeque::new(),
            left: [false; 2],
            lost_seen: [false; 2],
        };
        Self {
            ends: [end(), end()],
            wire: Default::default(),
            lost: [false; 2],
            killed: false,
            expired: false,
            harmed: false,
        }
    }

    fn put(&mut self, from: usize, side: Side, frame: Frame) {
        if !self.lost[at(side)] {
            self.wire[at(side)][1 - from].push_back(frame);
        }
    }

    /// An end closes a link. What it sent before still arrives; what comes to it does not.
    fn leave(&mut self, who: usize, side: Side) {
        self.ends[who].left[at(side)] = true;
        self.wire[at(side)][who].clear();
        self.lost[at(side)] = true;
    }

    fn down(&mut self, who: usize) {
        self.ends[who].mode = Mode::Down;
        self.ends[who].held.clear();
        self.leave(who, Side::Old);
        self.leave(who, Side::New);
    }

    fn live(&mut self, who: usize, frame: Frame) {
        match frame {
            Frame::Change(number) => {
                assert_eq!(number, self.ends[who].delivered + 1, "lost, doubled or out of order: {self:?}");
                self.ends[who].delivered = number;
            }
            Frame::Step(_) => self.down(who),
        }
    }

    fn hear(&mut self, who: usize, side: Side, frame: Frame) {
        let Mode::Changing(steps) = &mut self.ends[who].mode else {
            assert_ne!((&self.ends[who].mode, side), (&Mode::New, Side::Old), "closed by this end");
            return self.live(who, frame);
        };
        let header = match frame {
            Frame::Step(step) => Steps::new(SERIAL).frame(step, Epoch(1)),
            Frame::Change(number) => Header { seq: Seq(number.into()), ..Header::new(Kind::Write, Epoch(1)) },
        };
        match steps.heard(side, &header) {
            Ok(Hearing::Live) => self.live(who, frame),
            Ok(Hearing::Hold) => self.ends[who].held.push_back(Some(frame)),
            Ok(Hearing::Taken) => {}
            Err(_) => self.down(who),
        }
    }

    fn lose(&mut self, who: usize, side: Side) {
        self.ends[who].lost_seen[at(side)] = true;
        let loss = match &self.ends[who].mode {
            Mode::Changing(steps) => steps.lost(side),
            Mode::Old { .. } if side == Side::New => Loss::Nothing,
            Mode::New if side == Side::Old => Loss::Nothing,
            Mode::Old { .. } | Mode::New | Mode::Down => Loss::Session,
        };
        match loss {
            Loss::Offer => self.give_up(who),
            Loss::InTurn => self.ends[who].held.push_back(None),
            Loss::Session => self.down(who),
            Loss::Nothing => {}
        }
    }

    fn give_up(&mut self, who: usize) {
        self.ends[who].mode = Mode::Old { told: true };
        self.ends[who].held.clear();
        self.leave(who, Side::New);
    }

    /// Every state one move away.
    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let mut then = |move_on: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            move_on(&mut world);
            next.push(world);
        };
        for who in 0..2 {
            let end = &self.ends[who];
            match &end.mode {
                Mode::Down => continue,
                Mode::Old { told: false } => {
                    then(&|world| world.ends[who].mode = Mode::Changing(Steps::new(SERIAL)));
                }
                Mode::Changing(steps) => {
                    let steps = *steps;
                    if let Some((side, step)) = steps.due() {
                        then(&|world| {
                            if let Mode::Changing(steps) = &mut world.ends[who].mode {
                                steps.said(step);
                            }
                            world.put(who, side, Frame::Step(step));
                        });
                    }
                    if steps.can_give_up() && !self.expired {
                        then(&|world| {
                            world.expired = true;
                            // An end that has not accepted leaves nothing behind that the peer could follow.
                            world.harmed |= steps.said >= Said::Accept;
                            world.give_up(who);
                        });
                    }
                    if steps.complete() && end.held.is_empty() {
                        then(&|world| {
                            let owed = &world.wire[at(Side::Old)];
                            assert!(
                                owed.iter().all(VecDeque::is_empty),
                                "closed with frames on it: {world:?}"
                            );
                            world.ends[who].mode = Mode::New;
                            world.leave(who, Side::Old);
                        });
                    }
                }
                Mode::Old { told: true } | Mode::New => {}
            }
            self.traffic(who, &mut then);
        }
        if !self.killed {
            self.deaths(&mut then);
        }
        next
    }

    /// Either link dies, with any part of what is on its way still arriving.
    fn deaths(&self, then: &mut Then<'_>) {
        let accepted = self.ends.iter().any(|end| match end.mode {
            Mode::Changing(steps) => steps.accept_heard,
            Mode::Old { .. } => false,
            Mode::New | Mode::Down => true,
        });
        for side in [Side::Old, Side::New] {
            let wire = &self.wire[at(side)];
            for (first, second) in (0..=wire[0].len()).flat_map(|a| (0..=wire[1].len()).map(move |b| (a, b)))
            {
                then(&|world| {
                    (world.killed, world.lost[at(side)]) = (true, true);
                    world.wire[at(side)][0].truncate(first);
                    world.wire[at(side)][1].truncate(second);
                    let arrives =
                        world.wire[at(side)].iter().flatten().any(|f| *f == Frame::Step(Step::Accept));
                    world.harmed |= side == Side::Old || arrives || accepted;
                });
            }
        }
    }

    fn traffic(&self, who: usize, then: &mut Then<'_>) {
        let end = &self.ends[who];
        let (sends_on, reads, crossed) = match &end.mode {
            Mode::Old { .. } => (Some(Side::Old), [true, false], false),
            Mode::New => (Some(Side::New), [false, true], true),
            Mode::Changing(steps) => (Some(steps.sends_on()), [true, true], steps.crossed()),
            Mode::Down => (None, [false, false], false),
        };
        if let Some(side) = sends_on
            && end.sent < FRAMES[who]
        {
            then(&|world| {
                world.ends[who].sent += 1;
                world.put(who, side, Frame::Change(world.ends[who].sent));
            });
        }
        if crossed && !end.held.is_empty() {
            then(&|world| match world.ends[who].held.pop_front().expect("just seen") {
                Some(frame) => world.hear(who, Side::New, frame),
                None => world.lose(who, Side::New),
            });
        }
        for side in [Side::Old, Side::New] {
            let held_first = side == Side::New && crossed && !end.held.is_empty();
            if !reads[at(side)] || end.left[at(side)] || held_first {
                continue;
            }
            if !self.wire[at(side)][who].is_empty() {
                then(&|world| {
                    let frame = world.wire[at(side)][who].pop_front().expect("just seen");
                    world.hear(who, side, frame);
                });
            } else if self.lost[at(side)] && !end.lost_seen[at(side)] {
                then(&|world| world.lose(who, side));
            }
        }
    }

    /// Nothing can happen any more: is it an end?
    fn assert_settled(&self) {
        let modes = [&self.ends[0].mode, &self.ends[1].mode];
        let all_there = (0..2).all(|who| self.ends[1 - who].delivered == FRAMES[who]);
        let fine = match modes {
            [Mode::New, Mode::New] | [Mode::Old { .. }, Mode::Old { .. }] => all_there,
            [Mode::Down, Mode::Down] => self.harmed,
            _ => false,
        };
        assert!(fine, "stuck: {self:?}");
    }
}

#[test]
fn every_interleaving_ends_with_both_on_one_link_and_everything_in_order() {
    let mut seen = HashSet::new();
    let mut open = vec![World::new()];
    let (mut changed, mut kept, mut down) = (0, 0, 0);
    while let Some(world) = open.pop() {
        let next = world.next();
        if next.is_empty() {
            world.assert_settled();
            match world.ends[0].mode {
                Mode::New => changed += 1,
                Mode::Old { .. } => kept += 1,
                _ => down += 1,
            }
        }
        open.extend(next.into_iter().filter(|world| seen.insert(world.clone())));
    }
    // The three outcomes all occur, or the test moved nothing.
    assert!(changed > 0 && kept > 0 && down > 0, "{changed} {kept} {down} of {}", seen.len());
    println!("{} states; ends: {changed} changed, {kept} kept, {down} down", seen.len());
}

fn step(step: Step) -> Header {
    Steps::new(SERIAL).frame(step, Epoch(1))
}

/// An end that has said its offer.
fn offered() -> Steps {
    let mut steps = Steps::new(SERIAL);
    steps.said(Step::Offer);
    steps
}

/// One that has accepted too.
fn accepted() -> Steps {
    let mut steps = offered();
    steps.heard(Side::New, &step(Step::Offer)).expect("in order");
    steps.said(Step::Accept);
    steps
}

#[test]
fn steps_out_of_order_twice_or_of_another_change_are_refused() {
    let other = Steps::new(SERIAL + 1);
    let change = Header::new(Kind::Trim, Epoch(1));
    let heard = |steps: Steps, lines: &[(Side, Header)]| {
        let mut steps = steps;
        let (last, before) = lines.split_last().expect("a lie");
        before.iter().for_each(|(side, header)| assert!(steps.heard(*side, header).is_ok(), "{header:?}"));
        steps.heard(last.0, &last.1)
    };
    let (offer, accept, last, done) =
        (step(Step::Offer), step(Step::Accept), step(Step::Last), step(Step::Done));
    let mut unknown = offer;
    unknown.seq = Seq(5);
    let lies: &[(Steps, &[(Side, Header)])] = &[
        (offered(), &[(Side::New, accept)]),
        (offered(), &[(Side::New, last)]),
        (offered(), &[(Side::New, done)]),
        (offered(), &[(Side::New, change)]),
        (offered(), &[(Side::New, unknown)]),
        (offered(), &[(Side::New, other.frame(Step::Offer, Epoch(1)))]),
        (offered(), &[(Side::New, offer), (Side::New, offer)]),
        (offered(), &[(Side::New, offer), (Side::New, change)]),
        (offered(), &[(Side::New, offer), (Side::New, other.frame(Step::Accept, Epoch(1)))]),
        (offered(), &[(Side::Old, last)]),
        (accepted(), &[(Side::Old, offer)]),
        (accepted(), &[(Side::Old, accept)]),
        (accepted(), &[(Side::Old, done)]),
        (accepted(), &[(Side::Old, unknown)]),
        (accepted(), &[(Side::Old, other.frame(Step::Last, Epoch(1)))]),
        (accepted(), &[(Side::Old, last), (Side::Old, last)]),
        (accepted(), &[(Side::Old, last), (Side::Old, change)]),
        (Steps::new(SERIAL), &[(Side::Old, last)]),
    ];
    for (steps, lines) in lies {
        assert!(heard(*steps, lines).is_err(), "{lines:?}");
    }
    let mut crossed = accepted();
    crossed.heard(Side::New, &accept).expect("in order");
    crossed.heard(Side::Old, &last).expect("in order");
    crossed.said(Step::Last);
    for lie in [offer, accept, last, unknown, other.frame(Step::Done, Epoch(1))] {
        assert!(heard(crossed, &[(Side::New, lie)]).is_err(), "{lie:?}");
    }
    assert!(heard(crossed, &[(Side::New, done), (Side::New, done)]).is_err());
    assert_eq!(heard(crossed, &[(Side::New, done), (Side::New, change)]), Ok(Hearing::Live));
    for side in [Side::Old, Side::New] {
        let sign = Header::new(Kind::KeepAlive, Epoch(1));
        assert_eq!(heard(crossed, &[(side, sign)]), Ok(Hearing::Taken), "signs of life are always welcome");
    }
}

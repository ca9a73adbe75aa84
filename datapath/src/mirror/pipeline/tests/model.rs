//! Random events against a model that knows only what the world has seen: what was posted and acked in which session,
//! what the local disk was asked to flush and when. It decides nothing; it says of each action whether it was allowed,
//! and at the end whether anything was forgotten.

use super::change;
use crate::mirror::pipeline::{Action, Change, Event, Pipeline};
use crate::units::{AckLevel, ByteRange, OnPeerLoss, Seq, Token};
use crate::wire::flags;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

/// One step of a run; those that make no sense where they come are left out.
#[derive(Clone, Copy, Debug)]
enum Step {
    Land {
        fua: bool,
        copy: bool,
    },
    Flush {
        copy: bool,
    },
    /// The peer says that it applied and made durable these shares (of 8) of what it lacks.
    Ack {
        applied: u64,
        durable: u64,
    },
    /// A lie, by this much.
    BadAck {
        off: u64,
    },
    FlushedLocal,
    SessionUp {
        in_sync: bool,
    },
    SessionDown,
    GoAlone,
    PeerInSync,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (prop::bool::weighted(0.3), prop::bool::weighted(0.25)).prop_map(|(fua, copy)| Step::Land { fua, copy }),
        3 => prop::bool::weighted(0.2).prop_map(|copy| Step::Flush { copy }),
        6 => (0..=8u64, 0..=8u64).prop_map(|(applied, durable)| Step::Ack { applied, durable }),
        1 => (1..4u64).prop_map(|off| Step::BadAck { off }),
        4 => Just(Step::FlushedLocal),
        2 => any::<bool>().prop_map(|in_sync| Step::SessionUp { in_sync }),
        1 => Just(Step::SessionDown),
        1 => Just(Step::GoAlone),
        1 => Just(Step::PeerInSync),
    ];
    prop::collection::vec(step, 1..150)
}

#[derive(Debug)]
struct Landed {
    change: Change,
    wants_durability: bool,
    /// Changes that landed up to and with this one.
    nth: u64,
    /// Number in the session that is up.
    posted: Option<u64>,
    /// The peer said, in whatever session, that it has it.
    peer_has: bool,
    released: u32,
    completed: u32,
}

impl Landed {
    fn is_copy(&self) -> bool {
        self.change.flags & flags::RESYNC != 0
    }
}

#[derive(Debug)]
struct Flush {
    /// Changes that had landed when it came.
    after: u64,
    /// Local flushes that had begun when it came.
    local_begun: u64,
    copy: bool,
    completed: u32,
}

struct World {
    level: AckLevel,
    on_loss: OnPeerLoss,
    pipeline: Pipeline,
    live: bool,
    on_record: bool,
    was_alone: bool,
    in_sync: bool,
    asked_alone: bool,
    changes: Vec<Landed>,
    by_token: HashMap<Token, usize>,
    flushes: HashMap<Token, Flush>,
    dirty: HashSet<ByteRange>,
    tokens: u64,
    /// Of the session that is up: numbers given out, acked as applied, acked as durable, asked to be durable.
    posted: u64,
    applied: u64,
    durable: u64,
    flush_asked: u64,
    /// Local flushes begun, and of the one under way, what had landed when it began.
    local_begun: u64,
    local_running: Option<u64>,
    /// What had landed, and how many flushes had begun, when the last successful flush began.
    local_covered: u64,
    local_done: u64,
}

impl World {
    fn new(level: AckLevel, on_loss: OnPeerLoss) -> Self {
        Self {
            level,
            on_loss,
            pipeline: Pipeline::new(level, on_loss),
            live: false,
            on_record: false,
            was_alone: false,
            in_sync: false,
            asked_alone: false,
            changes: Vec::new(),
            by_token: HashMap::new(),
            flushes: HashMap::new(),
            dirty: HashSet::new(),
            tokens: 0,
            posted: 0,
            applied: 0,
            durable: 0,
            flush_asked: 0,
            local_begun: 0,
            local_running: None,
            local_covered: 0,
            local_done: 0,
        }
    }

    fn token(&mut self) -> u64 {
        self.tokens += 1;
        self.tokens
    }

    fn run(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Land { copy: true, .. } if !self.live => Ok(()),
            Step::Land { fua, copy } => self.land(fua && !copy, copy),
            Step::Flush { copy: true } if !self.live => Ok(()),
            Step::Flush { copy } => self.flush(copy),
            Step::Ack { .. } | Step::BadAck { .. } | Step::PeerInSync if !self.live => Ok(()),
            Step::Ack { applied, durable } => {
                let applied = self.applied + (self.posted - self.applied) * applied / 8;
                let durable = self.durable + (applied - self.durable) * durable / 8;
                self.ack(applied, durable)
            }
            Step::BadAck { off } => self.bad_acks(off),
            Step::FlushedLocal => self.flushed_local(),
            Step::SessionUp { .. } if self.live => Ok(()),
            Step::SessionUp { in_sync } => self.session_up(in_sync),
            Step::SessionDown => self.session_down(),
            Step::GoAlone => self.go_alone(),
            Step::PeerInSync => {
                self.in_sync = true;
                self.event(Event::PeerInSync)
            }
        }
    }

    fn land(&mut self, fua: bool, copy: bool) -> Result<(), TestCaseError> {
        let token = self.token();
        let flags = if copy { flags::RESYNC } else { u8::from(fua) * flags::FUA };
        let change = change(token, flags);
        self.by_token.insert(change.token, self.changes.len());
        self.changes.push(Landed {
            change,
            wants_durability: fua || (self.level == AckLevel::Durable && !copy),
            nth: self.changes.len() as u64 + 1,
            posted: None,
            peer_has: false,
            released: 0,
            completed: 0,
        });
        self.event(Event::Landed(change))
    }

    fn flush(&mut self, copy: bool) -> Result<(), TestCaseError> {
        let token = Token(self.token());
        let (after, local_begun) = (self.changes.len() as u64, self.local_begun);
        self.flushes.insert(token, Flush { after, local_begun, copy, completed: 0 });
        self.event(if copy { Event::FlushBackground(token) } else { Event::Flush(token) })
    }

    fn ack(&mut self, applied: u64, durable: u64) -> Result<(), TestCaseError> {
        (self.applied, self.durable) = (applied, durable);
        for landed in &mut self.changes {
            landed.peer_has |= landed.posted.is_some_and(|seq| seq <= applied);
        }
        self.event(super::ack(applied, durable))
    }

    fn bad_acks(&mut self, off: u64) -> Result<(), TestCaseError> {
        let mut lies = vec![(self.posted + off, self.durable), (self.applied, self.applied + off)];
        if self.applied > off && self.applied - off >= self.durable {
            lies.push((self.applied - off, self.durable));
        }
        if self.durable >= off {
            lies.push((self.applied, self.durable - off));
        }
        for (applied, durable) in lies {
            let mut actions = Vec::new();
            let before = format!("{:?}", self.pipeline);
            prop_assert!(self.pipeline.handle(super::ack(applied, durable), &mut actions).is_err());
            prop_assert!(actions.is_empty());
            prop_assert_eq!(&before, &format!("{:?}", self.pipeline), "a lie moved something");
        }
        Ok(())
    }

    fn flushed_local(&mut self) -> Result<(), TestCaseError> {
        let Some(covered) = self.local_running.take() else { return Ok(()) };
        self.local_covered = covered;
        self.local_done = self.local_begun;
        self.event(Event::FlushedLocal)
    }

    fn session_up(&mut self, in_sync: bool) -> Result<(), TestCaseError> {
        self.was_alone = self.on_record && !in_sync;
        (self.live, self.on_record, self.in_sync, self.asked_alone) = (true, false, in_sync, false);
        (self.posted, self.applied, self.durable, self.flush_asked) = (0, 0, 0, 0);
        self.event(Event::SessionUp { in_sync })?;
        for landed in &self.changes {
            let posted = landed.posted.is_some();
            prop_assert_eq!(posted, landed.released == 0, "posted again are the unreleased: {:?}", landed);
        }
        Ok(())
    }

    fn session_down(&mut self) -> Result<(), TestCaseError> {
        let was_live = std::mem::take(&mut self.live);
        (self.in_sync, self.on_record, self.was_alone) = (false, false, false);
        for landed in &mut self.changes {
            landed.posted = None;
        }
        self.event(Event::SessionDown)?;
        if was_live {
            for landed in &self.changes {
                prop_assert!(
                    landed.released > 0 || !landed.is_copy(),
                    "a step outlived its session: {:?}",
                    landed
                );
                prop_assert!(
                    landed.released > 0 || self.dirty.contains(&landed.change.range),
                    "the peer may lack {:?}",
                    landed
                );
            }
        }
        Ok(())
    }

    fn go_alone(&mut self) -> Result<(), TestCaseError> {
        if !self.live {
            (self.on_record, self.asked_alone) = (true, false);
        }
        self.event(Event::GoAlone)
    }

    fn event(&mut self, event: Event) -> Result<(), TestCaseError> {
        let mut actions = Vec::new();
        self.pipeline.handle(event, &mut actions).expect("the model acks only what it may");
        for action in actions {
            self.check(event, action)?;
        }
        let waits = self.changes.iter().any(|l| l.completed == 0 && !(l.is_copy() && l.released > 0))
            || self.flushes.values().any(|f| f.completed == 0);
        let stuck = waits && !self.live && !self.on_record;
        prop_assert!(!stuck || self.asked_alone, "something waits for nobody, and nobody was asked");
        Ok(())
    }

    fn check(&mut self, event: Event, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::Post(seq, change) => self.check_post(seq, change),
            Action::FlushPeer(seq) => {
                prop_assert!(self.live && seq.0 <= self.posted && seq.0 > self.durable);
                self.flush_asked = self.flush_asked.max(seq.0);
                Ok(())
            }
            Action::FlushLocal => {
                prop_assert!(self.local_running.is_none(), "one flush at a time");
                self.local_begun += 1;
                self.local_running = Some(self.changes.len() as u64);
                Ok(())
            }
            Action::Release(change) => self.check_release(event, change),
            Action::Complete(token) => match self.by_token.get(&token) {
                Some(&at) => self.check_complete(at),
                None => self.check_flushed(token),
            },
            Action::MarkDirty(range) => {
                self.dirty.insert(range);
                Ok(())
            }
            Action::AskAlone => {
                prop_assert!(!self.live && !self.on_record && !self.asked_alone, "asked for nothing");
                self.asked_alone = true;
                Ok(())
            }
        }
    }

    fn check_post(&mut self, seq: Seq, change: Change) -> Result<(), TestCaseError> {
        self.posted += 1;
        prop_assert!(self.live);
        prop_assert_eq!(seq, Seq(self.posted), "numbers without gaps");
        let at = self.by_token[&change.token];
        let earlier = self.changes[..at].iter().filter(|l| l.released == 0).all(|l| l.posted.is_some());
        prop_assert!(earlier, "posted before one that landed before it");
        let landed = &mut self.changes[at];
        prop_assert!(landed.posted.is_none() && landed.released == 0);
        prop_assert_eq!((change.range, change.kind), (landed.change.range, landed.change.kind));
        prop_assert_eq!(change.flags & flags::FUA != 0, landed.wants_durability);
        landed.posted = Some(seq.0);
        if landed.wants_durability {
            self.flush_asked = seq.0;
        }
        Ok(())
    }

    fn check_release(&mut self, event: Event, change: Change) -> Result<(), TestCaseError> {
        let at = self.by_token[&change.token];
        let cut_off = event == Event::SessionDown && self.changes[at].is_copy();
        if !cut_off {
            prop_assert!(
                self.changes[..at].iter().all(|l| l.released == 1),
                "unlocked before one that landed earlier"
            );
        }
        let landed = &mut self.changes[at];
        prop_assert_eq!(change, landed.change);
        landed.released += 1;
        prop_assert_eq!(landed.released, 1, "unlocked twice");
        if !cut_off && !landed.peer_has {
            prop_assert!(self.on_record && !self.live, "unlocked without the peer");
            prop_assert!(self.dirty.contains(&change.range), "the peer lacks it and nobody noted it");
        }
        Ok(())
    }

    fn may_answer(&self, copy: bool) -> Result<(), TestCaseError> {
        prop_assert!(self.live || self.on_record, "answered while the peer is absent and not on record");
        let frozen =
            self.on_loss == OnPeerLoss::Freeze && !self.on_record && !self.in_sync && !self.was_alone;
        prop_assert!(!frozen || copy, "answered while frozen");
        Ok(())
    }

    fn check_complete(&mut self, at: usize) -> Result<(), TestCaseError> {
        self.may_answer(self.changes[at].is_copy())?;
        let landed = &mut self.changes[at];
        landed.completed += 1;
        prop_assert_eq!(landed.completed, 1, "answered twice");
        let alone = self.on_record && !self.live;
        if self.level != AckLevel::Async || landed.wants_durability {
            prop_assert!(
                landed.peer_has || landed.released == 1 || alone,
                "the peer has not got it: {:?}",
                landed
            );
        }
        if landed.wants_durability {
            prop_assert!(self.local_covered >= landed.nth, "not durable here");
            prop_assert!(
                !self.live || landed.posted.is_none_or(|seq| seq <= self.durable),
                "not durable there"
            );
        }
        Ok(())
    }

    fn check_flushed(&mut self, token: Token) -> Result<(), TestCaseError> {
        let flush = self.flushes.get_mut(&token).expect("a token that was given");
        flush.completed += 1;
        prop_assert_eq!(flush.completed, 1, "answered twice");
        let (after, copy) = (flush.after, flush.copy);
        prop_assert!(self.local_covered >= after, "not durable here");
        // With nothing landed before it, any flush will do that ended after it came.
        let begun = flush.local_begun;
        prop_assert!(after > 0 || self.local_done >= begun.max(1), "the local disk was not flushed at all");
        for landed in &self.changes {
            let there = landed.posted.is_none_or(|seq| seq <= self.durable);
            prop_assert!(!self.live || landed.nth > after || there, "not durable there: {:?}", landed);
        }
        self.may_answer(copy)
    }

    /// Lets everything come true that was asked for, and no more.
    fn wind_up(&mut self, with_peer: bool) -> Result<(), TestCaseError> {
        if with_peer && !self.live {
            self.session_up(true)?;
        } else if !with_peer {
            self.session_down()?;
            self.go_alone()?;
        }
        if self.live {
            self.in_sync = true;
            self.event(Event::PeerInSync)?;
            self.ack(self.posted, self.durable.max(self.flush_asked))?;
        }
        for _ in 0..3 {
            self.flushed_local()?;
        }
        prop_assert!(self.local_running.is_none(), "it flushes for ever");
        prop_assert_eq!(self.pipeline.in_flight(), 0, "forgotten: {:?}", self.pipeline);
        for landed in &self.changes {
            let cut_off = landed.is_copy() && !landed.peer_has;
            prop_assert_eq!(landed.released, 1, "{:?}", landed);
            let completed = landed.completed == 1 || (cut_off && landed.completed == 0);
            prop_assert!(completed, "never answered: {:?}", landed);
        }
        prop_assert!(self.flushes.values().all(|f| f.completed == 1), "a flush was never answered");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_answer_is_true_and_none_is_forgotten(
        level in prop_oneof![Just(AckLevel::Async), Just(AckLevel::Memory), Just(AckLevel::Durable)],
        freeze in any::<bool>(),
        steps in steps(),
        with_peer in any::<bool>(),
    ) {
        let mut world = World::new(level, if freeze { OnPeerLoss::Freeze } else { OnPeerLoss::Continue });
        for step in steps {
            world.run(step)?;
        }
        world.wind_up(with_peer)?;
    }
}

//! The two nodes, what lies between them, and the list of what happens next.
//!
//! A [`World`] is one run. It owns everything, and moves by taking the next event; whatever is random in it comes from one
//! generator, so a seed is a run. Processes come and go; disks, metadata and clocks are the node's and stay.

use super::checker::{Checker, NAMES, Verdict, Violation, broken};
use super::client::{Client, OpId, Requests};
use super::clock::{Agenda, Clock, MS, Nanos, S, Skew, US};
use super::datapath::Reactor;
use super::driver::{Driver, TICK};
use super::metadata::{Record, SimMeta, Start};
use super::metadata_calls::MetadataCalls;
use super::network::{Ether, SharedEther, SharedWire, lock};
use super::new_disks::NewDisks;
use super::operator::Operator;
use super::storage::SimDisk;
use super::story::Story;
use super::streams::{Said, Stream, StreamId};
use crate::Rng;
use costandby_control::role::{self, Connection, Role, VolumeController, VolumeSettings};
use costandby_datapath::disk::metadata::layout::Geometry;
use costandby_datapath::disk::superblock::{DiskState, Superblock};
use costandby_datapath::disk::worker::DiskWorkers;
use costandby_datapath::reactor::command::VolumeSpec;
use costandby_datapath::units::{AckLevel, OnPeerLoss};
use costandby_datapath::volume::Volume;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(super) use super::driver::{Input, Scope};

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    Turn { at: usize, life: u64 },
    TakeOver { at: usize },
    Control { at: usize, life: u64 },
    Work { at: usize, life: u64 },
    Tick { at: usize, life: u64 },
    Call { at: usize, life: u64, call: u64 },
    MetadataCall { at: usize, life: u64 },
    Land { at: usize, life: u64, op: OpId },
    DialDue { at: usize, life: u64 },
    Dialled { at: usize, life: u64, stream: Option<StreamId> },
    Spoken { stream: StreamId, to: usize, said: Said },
    Patience { stream: StreamId, at: usize, serial: u64 },
    Client(usize),
    Operator,
    Fault,
    Heal { to: usize },
    Reset { at: usize },
    Boot { at: usize },
    WriteBack { at: usize },
    Hush,
    Look,
}

/// What a seed decides about a whole run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) size: u64,
    pub(super) grain_len: u64,
    pub(super) extent_len: u64,
    pub(super) slots: u32,
    pub(super) ack: AckLevel,
    pub(super) on_loss: OnPeerLoss,
    /// Which nodes' disks begin as known zeros; the others hold data of their own.
    pub(super) zeroed: [bool; 2],
    pub(super) ring_len: usize,
    /// Longest time between a decision and its execution by the reactor, and back.
    pub(super) control_delay: Nanos,
    /// What a disk call takes, usually.
    pub(super) disk_call: Nanos,
    /// Mean time between faults.
    pub(super) fault_pause: Nanos,
}

/// One run of a daemon.
pub(super) struct Process {
    pub(super) reactor: Reactor,
    pub(super) driver: Driver,
    pub(super) metadata: MetadataCalls,
}

/// One machine.
pub(super) struct Node {
    pub(super) process: Option<Process>,
    /// Counts the beginnings and ends of its processes; events of an earlier one are void.
    pub(super) life: u64,
    pub(super) disk: SimDisk,
    pub(super) meta: SimMeta,
    /// Another after each loss of power.
    pub(super) boot_id: [u8; 16],
    pub(super) skew: Skew,
    /// Its power is out.
    pub(super) dark: bool,
    pub(super) slow_until: Nanos,
    pub(super) stores_slow_until: Nanos,
    /// The data's medium is busy and the metadata's is not.
    pub(super) flushes_slow_until: Nanos,
    pub(super) call_fails: bool,
    pub(super) store_fails: bool,
}

/// One run.
pub(super) struct World {
    pub(super) config: Config,
    pub(super) agenda: Agenda<Event>,
    pub(super) clock: Clock,
    pub(super) rng: Rng,
    pub(super) nodes: [Node; 2],
    pub(super) ether: SharedEther,
    /// The path to this node is cut.
    pub(super) cut: [bool; 2],
    pub(super) wires: Vec<SharedWire>,
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) streams_made: u64,
    pub(super) clients: Vec<Client>,
    pub(super) requests: Requests,
    pub(super) operator: Operator,
    pub(super) checker: Checker,
    pub(super) new_disks: NewDisks,
    pub(super) story: Story,
    /// Nothing goes wrong any more, and clients are silent.
    pub(super) calm: bool,
    pub(super) hush_until: Nanos,
    pub(super) sessions: u64,
    /// A session in sync began, and since then no process ended, nobody went alone and no operator did anything.
    pub(super) undisturbed: bool,
    /// The same since the first of the two nodes began the latest session.
    pub(super) beginning_undisturbed: bool,
    pub(super) faults: BTreeMap<&'static str, u64>,
    pub(super) seen: BTreeSet<&'static str>,
}

pub(super) fn random_id(rng: &mut Rng) -> [u8; 16] {
    (u128::from(rng.next_u64()) << 64 | u128::from(rng.next_u64())).to_le_bytes()
}

fn pick<T: Copy>(rng: &mut Rng, list: &[T]) -> T {
    list[usize::try_from(rng.below(list.len() as u64)).expect("small")]
}

impl Config {
    fn geometry(&self) -> Geometry {
        Geometry::new(self.size, self.grain_len, self.extent_len, self.slots).expect("a legal shape")
    }

    fn new(rng: &mut Rng) -> Self {
        use AckLevel::{Async, Durable, Memory};
        let size = pick(rng, &[64 << 10, 64 << 10, 132 << 10, 132 << 10, 260 << 10, 260 << 10, 1 << 20]);
        // A log as of a real volume, which holds all of this one, or one that has to let go of extents; a quarter of
        // it takes any write.
        let (grain_len, extent_len, slots) = pick(
            rng,
            &[
                (64 << 10, 4 << 20, 1024),
                (4 << 10, 1 << 20, 136),
                (4 << 10, 4 << 10, 72),
                (4 << 10, 16 << 10, 20),
                (16 << 10, 16 << 10, 20),
            ],
        );
        Self {
            size,
            grain_len,
            extent_len,
            slots,
            ack: pick(rng, &[Async, Memory, Memory, Memory, Durable]),
            on_loss: pick(rng, &[OnPeerLoss::Continue, OnPeerLoss::Continue, OnPeerLoss::Freeze]),
            zeroed: match rng.below(9) {
                0 => [false, false],
                3 => [true, false],
                6 => [false, true],
                _ => [true, true],
            },
            ring_len: pick(rng, &[512 << 10, 1 << 20, 4 << 20]),
            control_delay: pick(rng, &[20 * US, 200 * US, 3 * MS]),
            disk_call: pick(rng, &[50 * US, 500 * US, 5 * MS]),
            fault_pause: pick(rng, &[200 * MS, 600 * MS, 2 * S]),
        }
    }
}

impl World {
    fn make_node(config: &Config, at: usize, base: Instant, rng: &mut Rng, checker: &mut Checker) -> Node {
        let len = usize::try_from(config.size).expect("small");
        let content = if config.zeroed[at] {
            vec![0; len]
        } else {
            let id = checker.beginning(at, config.size);
            super::checker::payload(id, costandby_datapath::units::ByteRange::new(0, config.size))
        };
        let offset = Duration::from_millis(rng.below(1_000_000));
        Node {
            process: None,
            life: 0,
            disk: SimDisk::new(NAMES[at], &content),
            meta: {
                let fresh = Superblock::fresh("db", NAMES[at], config.size, config.zeroed[at]);
                SimMeta::new(&fresh, config.geometry(), rng.next_u64())
            },
            boot_id: random_id(rng),
            skew: Skew::new(base, offset, 950 + rng.below(101)),
            dark: false,
            slow_until: 0,
            stores_slow_until: 0,
            flushes_slow_until: 0,
            call_fails: false,
            store_fails: false,
        }
    }

    pub(super) fn new(seed: u64, told: bool) -> Self {
        let mut rng = Rng::new(seed);
        let config = Config::new(&mut rng);
        let clock = Clock::default();
        let ether = Ether {
            clock: clock.clone(),
            rng: Rng::new(rng.next_u64()),
            delay: pick(&mut rng, &[20 * US, 100 * US, MS]),
            jitter: pick(&mut rng, &[10 * US, 200 * US, 2 * MS]),
            blocked: [false; 2],
            wakes: Vec::new(),
            copied: Vec::new(),
        };
        let mut checker = Checker::new(config.size, config.ack, config.on_loss);
        let base = Instant::now();
        let nodes = [0, 1].map(|at| Self::make_node(&config, at, base, &mut rng, &mut checker));
        checker.related = config.zeroed == [true, true];
        let agenda = Agenda::new(clock.clone());
        let mut world = Self {
            config,
            agenda,
            clock,
            rng,
            nodes,
            ether: Arc::new(Mutex::new(ether)),
            cut: [false; 2],
            wires: Vec::new(),
            streams: BTreeMap::new(),
            streams_made: 0,
            clients: Vec::new(),
            requests: Requests::default(),
            operator: Operator::default(),
            checker,
            new_disks: NewDisks::new(config.zeroed),
            story: Story::new(told),
            calm: false,
            hush_until: 0,
            sessions: 0,
            undisturbed: false,
            beginning_undisturbed: false,
            faults: BTreeMap::new(),
            seen: BTreeSet::new(),
        };
        world.make_clients();
        for at in 0..2 {
            world.agenda.at(MS, Event::Boot { at });
            world.agenda.at(30 * MS, Event::WriteBack { at });
        }
        world.agenda.at(300 * MS, Event::Operator);
        world.agenda.at(S, Event::Fault);
        world.agenda.at(2 * S, Event::Hush);
        world
    }

    pub(super) fn now(&self) -> Nanos {
        self.clock.now()
    }

    pub(super) fn tell(&mut self, at: usize, text: std::fmt::Arguments<'_>) {
        self.story.tell(self.clock.now(), NAMES[at], text);
    }

    /// Takes the next event.
    pub(super) fn step(&mut self) -> Verdict {
        let event = self.agenda.next().expect("the operator never stops");
        self.story.mix(&[self.clock.now()]);
        let lives = [self.nodes[0].life, self.nodes[1].life];
        let outcome = match event {
            Event::Turn { at, life }
            | Event::Control { at, life }
            | Event::Work { at, life }
            | Event::Tick { at, life }
            | Event::Call { at, life, .. }
            | Event::DialDue { at, life }
            | Event::MetadataCall { at, life }
            | Event::Land { at, life, .. }
            | Event::Dialled { at, life, .. }
                if lives[at] != life =>
            {
                if let Event::Dialled { at, stream: Some(stream), .. } = event {
                    self.close_stream(at, stream);
                }
                Ok(())
            }
            Event::Turn { at, .. } => self.turn(at),
            Event::Control { at, .. } => self.control(at),
            Event::Work { at, .. } => self.resume(at),
            Event::Tick { at, life } => {
                self.post_input(at, Input::Tick { copying: None });
                self.agenda.at(self.now() + TICK, Event::Tick { at, life });
                Ok(())
            }
            Event::DialDue { at, .. } => self.dial_due(at),
            Event::Call { at, call, .. } => {
                self.call_ends(at, call);
                Ok(())
            }
            Event::MetadataCall { at, .. } => self.metadata_call_ends(at),
            Event::Land { at, op, .. } => {
                self.land(at, op);
                Ok(())
            }
            Event::Dialled { at, stream, .. } => {
                self.dialled(at, stream);
                Ok(())
            }
            other => self.step_outside(other),
        };
        self.deliver_wakes();
        outcome.and_then(|()| self.check_copied())
    }

    /// What background copies sent is what they need to.
    fn check_copied(&mut self) -> Verdict {
        let copied = std::mem::take(&mut lock(&self.ether).copied);
        copied.into_iter().try_for_each(|(from, range)| self.checker.copies_range(from, range))
    }

    /// What is no process's own.
    fn step_outside(&mut self, event: Event) -> Verdict {
        match event {
            Event::Spoken { stream, to, said } => self.spoken(stream, to, said),
            Event::Patience { stream, at, serial } => self.patience_ends(stream, at, serial),
            Event::Client(at) => self.client(at),
            Event::Operator => return self.operate(),
            Event::TakeOver { at } => self.take_over(at),
            Event::Reset { at } => {
                self.reset_again(at);
            }
            Event::Fault => return self.fault(),
            Event::Heal { to } => {
                self.cut[to] = false;
                self.heal();
            }
            Event::Boot { at } => return self.boot(at),
            Event::WriteBack { at } => {
                let mut rng = Rng::new(self.rng.next_u64());
                self.nodes[at].disk.write_back(&mut rng);
                let pause = self.rng.below(100 * MS);
                self.agenda.at(self.now() + pause, Event::WriteBack { at });
            }
            Event::Hush => {
                self.hush_until = self.now() + 150 * MS;
                self.agenda.at(self.hush_until - 1, Event::Look);
                let pause = S + self.rng.below(3 * S);
                self.agenda.at(self.now() + pause, Event::Hush);
            }
            Event::Look => {
                if self.is_quiet() {
                    self.seen.insert("a quiet moment");
                    return self.check_quiet();
                }
            }
            other => panic!("{other:?} belongs to a process"),
        }
        Ok(())
    }

    pub(super) fn boot(&mut self, at: usize) -> Verdict {
        if self.nodes[at].process.is_some() {
            return Ok(());
        }
        if std::mem::take(&mut self.nodes[at].dark) {
            self.heal();
        }
        let node = &mut self.nodes[at];
        node.life += 1;
        node.disk.reopen();
        node.store_fails = false;
        node.call_fails = false;
        let cut_after = (!self.calm && self.rng.below(8) == 0).then(|| self.rng.below(120));
        let opened = match node.meta.open(NAMES[at], self.config.size, cut_after) {
            Ok(Start::Open(opened)) => opened,
            Ok(Start::CutOff) => return self.start_cut_off(at),
            Err(error) => return broken("metadata", error),
        };
        let superblock = opened.superblock.clone();
        if !superblock.clean {
            // As a node does before it opens a volume: what a killed daemon left is in the cache alone.
            let begun = node.disk.begin_flush();
            node.disk.end_flush(&begun);
            self.checker.flushed_at_start(at);
        }
        let dirty = opened.dirty.dirty_grains() > 0;
        let (record, superblocks) = costandby_datapath::disk::record::Record::of(*opened);
        let metadata = MetadataCalls::new(record.store.clone());
        let settings = VolumeSettings {
            volume: "db".to_owned(),
            node: NAMES[at].to_owned(),
            peer: NAMES[1 - at].to_owned(),
            configured_primary: at == 0,
            on_peer_loss: self.config.on_loss,
            ack: self.config.ack,
        };
        let found = role::Found { superblock, dirty, boot: node.boot_id };
        let mut random = Rng::new(self.rng.next_u64());
        let random: role::Random = Box::new(move || random.next_u64());
        let controller = VolumeController::new(settings, found, random);
        let (workers, jobs) = DiskWorkers::by_hand();
        let spec = VolumeSpec {
            checksum_first: false,
            name: "db".to_owned(),
            disk: Arc::clone(&node.disk.image),
            ack: self.config.ack,
            on_peer_loss: self.config.on_loss,
            record,
        };
        let life = node.life;
        let now = self.clock.now();
        let volume = Volume::new(0, spec, workers, node.skew.instant(now));
        let reactor = Reactor::new(volume, jobs);
        let driver = Driver::new(self.task(at, controller), superblocks);
        self.nodes[at].process = Some(Process { reactor, driver, metadata });
        self.tell(at, format_args!("starts"));
        self.give(at, Input::Start)?;
        self.agenda.at(now + TICK, Event::Tick { at, life });
        self.wake(at, now);
        self.check_coverage("after a start")
    }

    /// Reading the metadata, or putting it in order, was cut off.
    fn start_cut_off(&mut self, at: usize) -> Verdict {
        *self.faults.entry("start cut off").or_default() += 1;
        self.tell(at, format_args!("is cut off as it starts"));
        let due = self.now() + 50 * MS + self.rng.below(S);
        self.agenda.at(due, Event::Boot { at });
        if self.rng.below(2) == 0 { self.lose_power(at) } else { Ok(()) }
    }

    /// A process ended, a node went alone, a disk was given up or an operator did something: the next copy has a reason.
    pub(super) fn disturb(&mut self) {
        self.undisturbed = false;
        self.beginning_undisturbed = false;
    }

    /// The process at `at` ends, by itself or by a signal.
    pub(super) fn end_process(&mut self, at: usize) {
        if self.nodes[at].process.is_none() {
            return;
        }
        self.disturb();
        self.tell(at, format_args!("ends"));
        self.nodes[at].life += 1;
        self.abandon_metadata_call(at);
        self.abandon_calls(at);
        self.end_requests(at);
        self.nodes[at].process = None;
        self.end_streams(at);
        self.deliver_wakes();
        if self.rng.below(4) > 0 {
            let due = self.now() + MS + self.rng.below(20 * MS);
            self.agenda.at(due, Event::TakeOver { at: 1 - at });
        }
    }

    /// The power of `at` fails.
    pub(super) fn lose_power(&mut self, at: usize) -> Verdict {
        self.tell(at, format_args!("loses power"));
        self.nodes[at].dark = true;
        self.block();
        for wire in &self.wires {
            lock(wire).lose_power(at);
        }
        self.end_process(at);
        let mut rng = Rng::new(self.rng.next_u64());
        let node = &mut self.nodes[at];
        node.meta.lose_power(&mut rng);
        node.disk.lose_power(&mut rng);
        node.boot_id = random_id(&mut rng);
        let (record, now) = (node.meta.durable(), self.clock.now());
        self.checker.lost_power(now, at, &self.nodes[at].disk, record)?;
        self.check_coverage("after a loss of power")
    }

    /// Sets which paths carry nothing.
    pub(super) fn block(&mut self) {
        let dark = self.nodes.iter().any(|node| node.dark);
        lock(&self.ether).blocked = self.cut.map(|cut| cut || dark);
    }

    pub(super) fn heal(&mut self) {
        self.block();
        self.wires.retain(|wire| Arc::strong_count(wire) > 1);
        let blocked = lock(&self.ether).blocked;
        for to in (0..2).filter(|to| !blocked[*to]) {
            for wire in &self.wires {
                lock(wire).heal(to);
            }
        }
        self.retransmit();
        self.deliver_wakes();
    }

    pub(super) fn disk_call_takes(&mut self, at: usize) -> Nanos {
        let usual = 10 * US + self.rng.below(2 * self.config.disk_call);
        if self.nodes[at].slow_until > self.now() { usual + self.rng.below(800 * MS) } else { usual }
    }

    pub(super) fn store_takes(&mut self, at: usize) -> Nanos {
        let slow = self.nodes[at].stores_slow_until > self.now();
        self.disk_call_takes(at) + if slow { self.rng.below(800 * MS) } else { 0 }
    }

    pub(super) fn record(&self, at: usize) -> Record {
        self.nodes[at].meta.durable()
    }

    /// A superblock has reached the medium.
    pub(super) fn stored(&mut self, at: usize, before: Record, superblock: &Superblock) -> Verdict {
        let now = self.now();
        if before.up_to_date && superblock.disk_state == DiskState::Inconsistent {
            self.seen.insert("a copy began");
            if self.driver(at).discards {
                self.seen.insert("data were discarded");
                self.checker.gave_up(now, at);
                return Ok(());
            }
            return self.checker.overwritten(now, at);
        }
        if !before.up_to_date && superblock.disk_state == DiskState::UpToDate && !superblock.primary {
            self.seen.insert("a copy ended");
            // The source may have gone on alone since, at an operator's word.
            if self.record(1 - at).generation == superblock.generations.current.0 {
                self.checker.in_sync();
            }
            return self.checker.copied(now, at, &self.nodes[at].disk);
        }
        Ok(())
    }

    /// What no record names is the same on both media.
    pub(super) fn check_coverage(&mut self, when: &str) -> Verdict {
        let now = self.now();
        let [one, other] = &self.nodes;
        self.checker.look_at_records(now, [one.meta.coverage(), other.meta.coverage()]);
        self.checker.uncovered(
            when,
            [&one.disk.shadow, &other.disk.shadow],
            [one.meta.coverage(), other.meta.coverage()],
        )
    }

    pub(super) fn check_equal(&mut self, when: &str) -> Verdict {
        self.checker.equal(when, [&self.nodes[0].disk, &self.nodes[1].disk])
    }

    /// In sync, and nothing under way.
    pub(super) fn check_quiet(&mut self) -> Verdict {
        for at in 0..2 {
            self.checker.whole(at, &self.nodes[at].disk)?;
        }
        self.check_equal("with nothing under way")
    }

    /// One run in four ends with a long silence.
    pub(super) fn seed_says_idle(&mut self) -> bool {
        self.rng.below(4) == 0
    }

    /// In sync and idle for long: no record names anything, and both media are equal.
    pub(super) fn check_idle(&mut self) -> Verdict {
        self.seen.insert("an idle end");
        let named = (0..2).find(|at| self.nodes[*at].meta.coverage().names_any());
        if let Some(at) = named {
            return broken(
                "idle",
                format!(
                    "long after the last request, {} still has something on record (hot: {:?})",
                    NAMES[at],
                    self.nodes[at].meta.coverage().hot
                ),
            );
        }
        self.check_coverage("after a long silence")
    }

    /// A session begins on both sides. Where it needs no copy, both disks are the same.
    pub(super) fn check_session(&mut self) -> Verdict {
        let scope = |node: &Node| node.process.as_ref().and_then(|process| process.driver.scope);
        let delta = self.nodes.iter().all(|node| scope(node).is_some_and(|scope| scope != Scope::Full));
        if delta {
            self.check_coverage("as a session begins that copies no more than what is on record")?;
            let [one, other] = &self.nodes;
            let contents = [one.disk.content(), other.disk.content()];
            self.checker.uncovered(
                "as a session begins that copies no more than what is on record",
                [&contents[0], &contents[1]],
                [one.meta.coverage(), other.meta.coverage()],
            )?;
        }
        let in_sync = |at: usize| {
            let process = self.nodes[at].process.as_ref();
            process.is_some_and(|p| p.driver.task.status().connection == Connection::Connected)
        };
        if self.config.ack == AckLevel::Async || !in_sync(0) || !in_sync(1) {
            return Ok(());
        }
        self.seen.insert("a session in sync");
        self.checker.in_session();
        self.check_equal("as a session begins")
    }

    /// A session in sync has ended at its target.
    pub(super) fn check_prefix(&mut self, at: usize) -> Verdict {
        let status = self.driver(at).task.status();
        if status.role == Role::Standby && status.peer_primary == Some(true) {
            return self.checker.prefix(at, &self.nodes[at].disk);
        }
        Ok(())
    }

    /// In sync on both sides, with nothing under way anywhere.
    pub(super) fn is_quiet(&self) -> bool {
        self.requests.open() == 0
            && self.wires.iter().all(|wire| lock(wire).is_quiet())
            && self.nodes.iter().all(|node| {
                node.process.as_ref().is_some_and(|p| {
                    p.driver.task.status().connection == Connection::Connected
                        && p.driver.is_idle()
                        && p.metadata.is_idle()
                        && p.reactor.is_idle()
                })
            })
    }

    /// All is as it should be: in sync, served, nothing under way.
    pub(super) fn is_well(&self) -> bool {
        (0..2).any(|at| self.role(at) == Some(Role::Primary)) && self.is_quiet()
    }

    fn role(&self, at: usize) -> Option<Role> {
        self.nodes[at].process.as_ref().map(|p| p.driver.task.status().role)
    }

    /// What a stuck run looks like.
    pub(super) fn portrait(&self) -> Violation {
        let node = |at: usize| {
            let status = self.nodes[at].process.as_ref().map(|p| p.driver.task.status());
            format!("{}: {status:?}", NAMES[at])
        };
        let text = format!(
            "not in sync long after the last fault, {} requests open (oldest change {:?}); {}; {}",
            self.requests.open(),
            self.checker.open(),
            node(0),
            node(1)
        );
        Violation { rule: "stuck", text }
    }
}

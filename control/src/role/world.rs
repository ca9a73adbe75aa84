//! Two controllers, two disks and a wire in virtual time: random writes, cuts, crashes and losses of power between any two
//! actions, restarts and operators, from a seed. A disk is a set of writes, each with a place of its own, so lost and
//! diverged data show; it has a part that is on stable storage, a map of what may differ, and a log of what is being
//! written. A copy moves what the maps have, and nothing else.
//!
//! The checks know nothing of generations: no two nodes serve over one link, a disk that clients read is whole, disks
//! that call themselves in sync are equal, and no acknowledged write is overwritten from a disk that lacks it, also where
//! one of the two nodes lost power.

use super::*;
use crate::hello::Hello;
use std::collections::{BTreeSet, VecDeque};

struct Node {
    controller: Option<VolumeController>,
    stored: Superblock,
    /// The writes the disk holds.
    content: BTreeSet<u32>,
    /// Those that a loss of power leaves.
    durable: BTreeSet<u32>,
    /// What may differ from the peer's disk, on record.
    map: BTreeSet<u32>,
    /// What was written since both disks were last known to be on stable storage, on record.
    hot: BTreeSet<u32>,
    boot: u8,
    /// The disk is a mixture, in truth, whatever its superblock says.
    mixture: bool,
    serving: bool,
    alone: bool,
    link: Option<u64>,
    side: Option<SessionSide>,
    inbox: VecDeque<(u64, u64)>,
    in_flight: Option<u32>,
    quiescing: bool,
    /// The source has the target's map on record.
    kept: bool,
    copied: bool,
    ready: Option<Ready>,
}

pub(super) struct World {
    nodes: [Node; 2],
    rng: u64,
    now: Duration,
    /// The link that carries, if any.
    live: Option<u64>,
    links: u64,
    acked: BTreeSet<u32>,
    writes: u32,
    freeze: bool,
    /// Nothing goes wrong by chance any more.
    calm: bool,
    forcing: bool,
    /// How often each thing happened, so that a test can ask whether it covered what it claims.
    pub(super) sessions: u32,
    pub(super) resyncs: u32,
    pub(super) promotions: u32,
    pub(super) alone_writes: u32,
    pub(super) given_up: u32,
    pub(super) resumed: u32,
}

#[derive(Debug, PartialEq)]
pub(super) enum Ending {
    InSync,
    Refused,
}

const NAMES: [&str; 2] = ["alpha", "beta"];

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut world = Self {
            nodes: NAMES.map(|name| Node {
                controller: None,
                stored: Superblock::fresh("db", name, 1 << 20, !seed.is_multiple_of(3)),
                content: BTreeSet::new(),
                durable: BTreeSet::new(),
                map: BTreeSet::new(),
                hot: BTreeSet::new(),
                boot: 1,
                mixture: false,
                serving: false,
                alone: false,
                link: None,
                side: None,
                inbox: VecDeque::new(),
                in_flight: None,
                quiescing: false,
                kept: false,
                copied: false,
                ready: None,
            }),
            rng: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now: Duration::ZERO,
            live: None,
            links: 0,
            acked: BTreeSet::new(),
            writes: 2,
            freeze: seed % 4 == 1,
            calm: false,
            forcing: false,
            sessions: 0,
            resyncs: 0,
            promotions: 0,
            alone_writes: 0,
            given_up: 0,
            resumed: 0,
        };
        if seed.is_multiple_of(3) {
            // Disks with content, each its own.
            world.nodes[0].content.insert(1);
            world.nodes[1].content.insert(2);
        }
        world.start(0);
        world.start(1);
        world
    }

    fn random(&mut self, below: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 20) % below
    }

    fn chance(&mut self, one_in: u64) -> bool {
        !self.calm && self.random(one_in) == 0
    }

    fn start(&mut self, at: usize) {
        if self.nodes[at].controller.is_some() {
            return;
        }
        let mut seed = self.rng ^ (at as u64 + 1) << 32;
        let random = Box::new(move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed
        });
        let settings = VolumeSettings {
            config: "pair.toml".to_owned(),
            volume: "db".to_owned(),
            node: NAMES[at].to_owned(),
            peer: NAMES[1 - at].to_owned(),
            configured_primary: at == 0,
            on_peer_loss: if self.freeze { OnPeerLoss::Freeze } else { OnPeerLoss::Continue },
            ack: AckLevel::Memory,
            peer_timeout: Duration::from_millis(500),
        };
        // A daemon flushes what the one before it left in the cache before it has a peer overwritten with it.
        self.flush(at);
        let node = &mut self.nodes[at];
        node.map.append(&mut node.hot);
        let dirty = !node.map.is_empty();
        let found = Found { superblock: node.stored.clone(), dirty, boot: [node.boot; 16] };
        self.nodes[at].controller = Some(VolumeController::new(settings, found, random));
        let _ = self.random(2);
        self.event(at, Event::Start);
    }

    /// The daemon ends, or the whole machine.
    fn crash(&mut self, at: usize) {
        let power = self.chance(3);
        let node = &mut self.nodes[at];
        node.controller = None;
        if power {
            node.boot = node.boot.wrapping_add(1);
            let volatile: Vec<u32> = node.content.symmetric_difference(&node.durable).copied().collect();
            let mut content = self.nodes[at].durable.clone();
            for write in volatile {
                if self.random(2) == 0 && !content.remove(&write) {
                    content.insert(write);
                }
            }
            self.nodes[at].content.clone_from(&content);
            self.nodes[at].durable = content;
        }
        self.at_rest(at);
        // What no whole disk holds any more is lost, and no rule could have kept it.
        let nodes = &self.nodes;
        let held = |at: usize, write: &u32| {
            let (node, other) = (&nodes[at], &nodes[1 - at].stored);
            let torn = node.controller.as_ref().map_or(node.stored.applying, VolumeController::is_torn);
            // Once the other took over, this one counts for nothing, whatever befalls the other.
            let behind = other.generations.descends_from(node.stored.generations.current);
            let whole = node.stored.disk_state == DiskState::UpToDate && !node.mixture && !torn;
            whole && !behind && node.content.contains(write)
        };
        self.acked.retain(|write| (0..2).any(|at| held(at, write)));
    }

    fn flush(&mut self, at: usize) {
        self.nodes[at].durable = self.nodes[at].content.clone();
    }

    /// Whether both ends are up and linked, so that this one can have the other flush.
    fn together(&self, at: usize) -> bool {
        self.alive(at) && self.alive(1 - at)
    }

    /// Makes the record of what is being written shorter.
    fn checkpoint(&mut self, at: usize) {
        let source = matches!(self.nodes[at].side, Some(SessionSide::Source { .. }));
        if source && self.together(at) && self.nodes[at].in_flight.is_none() {
            self.flush(at);
            self.flush(1 - at);
            self.nodes[at].hot.clear();
        } else if self.nodes[at].link.is_none() && self.nodes[at].in_flight.is_none() {
            self.flush(at);
            let node = &mut self.nodes[at];
            node.map.append(&mut node.hot);
        }
    }

    fn at_rest(&mut self, at: usize) {
        if self.nodes[at].link.is_some() && self.nodes[at].link == self.live {
            self.live = None;
        }
        let node = &mut self.nodes[at];
        (node.serving, node.alone, node.quiescing, node.copied, node.kept) =
            (false, false, false, false, false);
        (node.link, node.side, node.in_flight, node.ready) = (None, None, None, None);
        node.inbox.clear();
    }

    fn alive(&self, at: usize) -> bool {
        self.live.is_some() && self.nodes[at].link == self.live
    }

    fn event(&mut self, at: usize, event: Event) {
        let mut actions = Vec::new();
        let now = self.now;
        let Some(controller) = &mut self.nodes[at].controller else { return };
        controller.handle(now, event, &mut actions);
        let crash = if self.chance(60) { self.random(actions.len() as u64 + 1) } else { u64::MAX };
        for (step, action) in (0..).zip(actions) {
            if step == crash {
                return self.crash(at);
            }
            self.act(at, action);
        }
        self.check();
    }

    fn act(&mut self, at: usize, action: Action) {
        match action {
            Action::StoreMetadata(superblock) => {
                // The operator who forces a promotion declares the disk's content good.
                self.nodes[at].mixture &= !self.forcing;
                let before = std::mem::replace(&mut self.nodes[at].stored, *superblock);
                self.given_up(at, &before);
                if self.forcing && before.disk_state == DiskState::UpToDate {
                    // At the operator's word, too: the volume goes on from what this disk holds.
                    let content = &self.nodes[at].content;
                    self.acked.retain(|write| content.contains(write));
                }
            }
            Action::MarkAll => {
                assert!(self.nodes[at].link.is_none(), "everything is marked in mid-session");
                self.nodes[at].map = (1..=self.writes).collect();
            }
            Action::SendReady(ready) => self.nodes[at].ready = Some(ready),
            Action::StartSession { side, serve, .. } => self.start_session(at, side, serve),
            Action::Serve { .. } => {
                self.promotions += 1;
                let node = &mut self.nodes[at];
                node.serving = true;
                node.quiescing = false;
                if matches!(node.side, Some(SessionSide::Target { .. })) {
                    assert!(node.map.is_empty(), "in sync, with parts that may differ");
                    node.side = Some(SessionSide::Source { resync: false });
                }
            }
            Action::StopServing => {
                let node = &mut self.nodes[at];
                (node.serving, node.alone, node.quiescing) = (false, false, false);
                let copying = node.side == Some(SessionSide::Source { resync: true }) && !node.copied;
                if node.side.is_some() && !copying {
                    node.side = Some(SessionSide::Target { resync: false });
                }
            }
            Action::GoAlone => {
                let node = &mut self.nodes[at];
                node.alone = true;
                self.acked.extend(node.in_flight.take());
            }
            Action::CloseLink => {
                if self.alive(at) {
                    self.live = None;
                }
                self.nodes[at].ready = None;
            }
            Action::SendPeer { code, arg } if self.together(at) => {
                let unasked = |controller: &VolumeController| {
                    controller.promotion.as_ref().is_some_and(|promotion| promotion.id.is_none())
                };
                let resumes = code == code::PROMOTE_REQUEST;
                let resumes = resumes && self.nodes[at].controller.as_ref().is_some_and(unasked);
                self.resumed += u32::from(resumes);
                self.nodes[1 - at].inbox.push_back((code, arg));
            }
            Action::Quiesce => self.nodes[at].quiescing = true,
            Action::ShutdownComplete => self.crash(at),
            _ => {}
        }
    }

    /// At the operator's word what only this disk holds is not wanted any more.
    fn given_up(&mut self, at: usize, before: &Superblock) {
        let stored = &self.nodes[at].stored;
        let at_a_word = before.disk_state == DiskState::UpToDate
            && stored.disk_state == DiskState::Inconsistent
            && self.nodes[at].link.is_none()
            && self.nodes[at].controller.as_ref().is_some_and(|controller| controller.pending.is_none());
        if at_a_word {
            self.given_up += 1;
            let [mine, theirs] = [&self.nodes[at].content, &self.nodes[1 - at].content];
            self.acked.retain(|write| theirs.contains(write) || !mine.contains(write));
        }
    }

    fn start_session(&mut self, at: usize, side: SessionSide, serve: bool) {
        self.sessions += 1;
        let peer_content = self.nodes[1 - at].content.clone();
        let node = &mut self.nodes[at];
        node.side = Some(side);
        (node.serving, node.alone, node.copied, node.kept) = (serve, false, false, false);
        node.in_flight = None;
        node.inbox.clear();
        if side == (SessionSide::Source { resync: false }) {
            assert!(node.map.is_empty(), "in sync, with parts that may differ");
        }
        if matches!(side, SessionSide::Target { .. }) && node.stored.disk_state == DiskState::Inconsistent {
            for write in node.content.iter().filter(|write| self.acked.contains(write)) {
                assert!(
                    node.mixture || peer_content.contains(write),
                    "acknowledged write {write} is overwritten"
                );
            }
            node.mixture = true;
        }
    }

    fn check(&self) {
        let [first, second] = &self.nodes;
        for node in &self.nodes {
            if node.serving {
                assert!(!node.mixture, "a mixture is served");
                assert!(
                    node.stored.primary && !node.stored.clean,
                    "served without being on record as primary"
                );
                assert_eq!(node.stored.disk_state, DiskState::UpToDate);
            }
        }
        if first.serving && second.serving {
            assert!(self.live.is_none() || first.link != second.link, "both serve over one link");
            assert_ne!(
                first.stored.generations.current, second.stored.generations.current,
                "both serve one generation"
            );
        }
        if self.in_sync() {
            assert_eq!(first.content, second.content, "in sync, yet different");
            assert_eq!(first.stored.generations.current, second.stored.generations.current);
        }
    }

    fn in_sync(&self) -> bool {
        (0..2).all(|at| {
            let node = &self.nodes[at];
            let connected = node.controller.as_ref().is_some_and(|c| c.connection == Connection::Connected);
            connected && self.alive(at) && node.inbox.is_empty() && node.in_flight.is_none()
        })
    }

    fn shake_hands(&mut self) {
        let idle = |node: &Node| node.link.is_none() && node.controller.is_some();
        if !self.nodes.iter().all(idle) {
            return;
        }
        let mut hello = |at: usize| -> Hello {
            let controller: &mut VolumeController = self.nodes[at].controller.as_mut().expect("up");
            controller.hello(1 << 20, &["tcp"])
        };
        let hellos = [hello(0), hello(1)];
        if self.chance(4) {
            let at = usize::from(self.chance(2));
            if self.chance(2) { self.write(at) } else { self.command(at) }
        }
        self.nodes.iter_mut().for_each(|node| node.ready = None);
        let order = if self.chance(2) { [0, 1] } else { [1, 0] };
        for at in order {
            self.event(at, Event::HelloReceived(Box::new(hellos[1 - at].clone())));
        }
        if self.chance(6) {
            let at = usize::from(self.chance(2));
            if self.chance(2) { self.write(at) } else { self.command(at) }
        }
        self.links += 1;
        let cut = self.chance(10);
        self.live = (!cut).then_some(self.links);
        let readies = [self.nodes[0].ready, self.nodes[1].ready];
        for at in order {
            match (self.nodes[at].ready.take(), readies[1 - at]) {
                (Some(_), Some(theirs)) if !(cut && at == 1) => {
                    self.nodes[at].link = Some(self.links);
                    self.event(at, Event::SessionReady(theirs));
                    if self.nodes[at].side.is_none() {
                        self.nodes[at].link = None;
                    }
                }
                _ => {
                    self.live = None;
                    self.event(at, Event::SessionFailed { text: "cut".to_owned() });
                }
            }
        }
    }

    fn write(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if !node.serving || node.quiescing || node.in_flight.is_some() {
            return;
        }
        self.writes += 1;
        let write = self.writes;
        if node.link.is_some() {
            node.hot.insert(write);
            node.content.insert(write);
            node.in_flight = Some(write);
            return;
        }
        if !node.alone {
            self.event(at, Event::NeedAlone);
        }
        if self.nodes[at].alone && self.nodes[at].serving {
            let [mine, theirs] = [&self.nodes[at].stored, &self.nodes[1 - at].stored];
            let equal = mine.generations.current == theirs.generations.current;
            assert!(
                !equal || theirs.disk_state != DiskState::UpToDate,
                "acknowledged alone under the peer's generation"
            );
            self.alone_writes += 1;
            self.nodes[at].map.insert(write);
            self.nodes[at].content.insert(write);
            self.acked.insert(write);
        }
    }

    fn deliver_write(&mut self, at: usize) {
        if self.alive(at)
            && self.alive(1 - at)
            && let Some(write) = self.nodes[at].in_flight.take()
        {
            let target = matches!(self.nodes[1 - at].side, Some(SessionSide::Target { .. }));
            assert!(target, "a write arrives at a source");
            self.nodes[1 - at].content.insert(write);
            self.acked.insert(write);
        }
    }

    fn deliver_message(&mut self, at: usize) {
        // Messages travel behind the writes sent before them.
        self.deliver_write(1 - at);
        if self.alive(at)
            && let Some((code, arg)) = self.nodes[at].inbox.pop_front()
        {
            self.event(at, Event::PeerMessage { code, arg });
        }
    }

    fn finish_copy(&mut self, at: usize) {
        self.deliver_write(at);
        let copying = self.nodes[at].side == Some(SessionSide::Source { resync: true });
        if !copying || self.nodes[at].copied || !self.together(at) {
            return;
        }
        if !std::mem::replace(&mut self.nodes[at].kept, true) {
            let mut theirs = std::mem::take(&mut self.nodes[1 - at].map);
            self.nodes[at].map.append(&mut theirs);
            return;
        }
        let left: Vec<u32> = self.nodes[at].map.iter().copied().collect();
        let some = self.chance(2);
        for write in left {
            if some && self.random(2) == 0 {
                continue;
            }
            if self.nodes[at].content.contains(&write) {
                self.nodes[1 - at].content.insert(write);
            } else {
                self.nodes[1 - at].content.remove(&write);
            }
            self.nodes[at].map.remove(&write);
        }
        self.flush(at);
        self.flush(1 - at);
        if self.nodes[at].map.is_empty() {
            self.resyncs += 1;
            self.nodes[at].copied = true;
            assert_eq!(self.nodes[at].content, self.nodes[1 - at].content, "the maps did not have it all");
            self.nodes[1 - at].mixture = false;
            self.event(at, Event::ResyncDone);
        }
    }

    fn notice_loss(&mut self, at: usize) {
        if self.nodes[at].link.is_some() && !self.alive(at) {
            let node = &mut self.nodes[at];
            (node.link, node.side) = (None, None);
            node.inbox.clear();
            let undurable = !node.hot.is_empty();
            node.map.extend(node.hot.iter());
            let dirty = !node.map.is_empty();
            self.event(at, Event::LinkDown { reason: "cut".to_owned(), undurable, dirty, parted: None });
            if !self.chance(4) && self.nodes[at].controller.is_some() {
                self.flush(at);
                self.event(at, Event::Settled);
            }
        }
    }

    fn quiesce(&mut self, at: usize) {
        self.deliver_write(at);
        if self.nodes[at].quiescing && self.nodes[at].in_flight.is_none() {
            self.checkpoint(at);
            self.event(at, Event::Quiesced);
        }
    }

    fn command(&mut self, at: usize) {
        let command = match self.random(10) {
            0..4 => {
                self.forcing = self.chance(8);
                Command::Promote { force: self.forcing }
            }
            4..6 => Command::Demote,
            6 => Command::Connect { discard_my_data: false },
            7 => Command::Connect { discard_my_data: true },
            8 => Command::Invalidate,
            _ => Command::Disconnect,
        };
        self.event(at, Event::Operator { id: ReplyId(1), command });
        self.forcing = false;
    }

    /// One random thing happens.
    pub(super) fn step(&mut self) {
        let at = usize::from(self.chance(2));
        match self.random(42) {
            0..6 => self.shake_hands(),
            6..14 => self.write(at),
            14..18 => self.deliver_write(at),
            18..24 => self.deliver_message(at),
            24..27 => self.finish_copy(at),
            27..31 => self.notice_loss(at),
            31..33 => self.quiesce(at),
            33 => self.live = None,
            34..36 => self.command(at),
            36 => self.crash(at),
            37 => self.start(at),
            39 if self.chance(2) => self.checkpoint(at),
            38 => {
                self.now += Duration::from_secs(self.rng % 7);
                self.event(at, Event::Tick);
            }
            _ if self.chance(3) => self.event(at, Event::Shutdown),
            _ => {}
        }
    }

    /// Power comes back, operators say `connect`, and nothing more goes wrong: how does it end?
    pub(super) fn settle(&mut self) -> Ending {
        self.calm = true;
        for at in 0..2 {
            self.crash(at);
        }
        for _ in 0..400 {
            for at in 0..2 {
                self.start(at);
                self.notice_loss(at);
                self.deliver_message(at);
                self.finish_copy(at);
                self.quiesce(at);
            }
            self.shake_hands();
            if self.in_sync() {
                return Ending::InSync;
            }
        }
        for node in &self.nodes {
            let status = node.controller.as_ref().expect("up").status();
            assert!(status.advice.is_some(), "stuck without advice: {status:?}\n{:?}", node.stored);
            assert!(
                node.controller.as_ref().expect("up").refusal.is_some(),
                "stuck: {status:?}\n{:?}",
                node.stored
            );
        }
        Ending::Refused
    }
}

//! Control's part of a node: the production [`VolumeController`], and a driver for it in virtual time.
//!
//! Stands beside `VolumeTask` (control/src/node/volume.rs), which talks to tokio, the reactor's thread and real files; what
//! it decides itself (when to dial, when a conversation is over, what a failed store leaves undone) is repeated here in
//! the same order and under the same names. Keep the two comparable. A store suspends the list of actions until the
//! medium has it, and so may, at random, any other action: a process may die between two of them.

use super::checker::{NAMES, Verdict};
use super::clock::{MS, Nanos, US};
use super::metadata::{Record, SimMedium};
use super::metadata_calls::MetadataCall;
use super::network::{SimLink, lock};
use super::streams::StreamId;
use super::world::{Event, World};
use costandby_control::generation::{self, Verdict as Relation};
use costandby_control::hello::{Message, Ready};
use costandby_control::role::{self, Action, Connection, ReplyId, Role, SessionSide, VolumeController, code};
use costandby_datapath::disk::metadata::SuperblockStore;
use costandby_datapath::disk::superblock::{DiskState, Superblock};
use costandby_datapath::reactor::command::{Before, Command, Direction, Event as ReactorEvent};
use costandby_datapath::transport::Link;
use costandby_datapath::units::Epoch;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// As in `VolumeTask`.
pub(super) const TICK: Nanos = 100 * MS;
const DIAL_PAUSE_MAX: Nanos = 500 * MS;
const DIAL_PAUSE_FIRST: Nanos = 4 * MS;

/// What the task is told.
pub(super) enum Input {
    Reactor(ReactorEvent),
    Accepted { stream: StreamId, hello: Box<costandby_control::hello::Hello> },
    Dialled { stream: Option<StreamId> },
    Heard { serial: u64, stream: StreamId, heard: Result<Message, String> },
    Operator { id: ReplyId, command: role::Command },
    Shutdown,
    Tick,
}

struct Conversation {
    serial: u64,
    stream: Option<StreamId>,
}

/// Actions being carried out, and what comes after them.
struct Work {
    actions: VecDeque<Action>,
    before: Connection,
    failure: Option<String>,
    /// The event was said in a conversation.
    heard: bool,
    /// The list that follows a failed store.
    last_will: bool,
}

/// What came of marking everything.
type Marked = Result<(), String>;

/// What a session copies, as both nodes agreed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Scope {
    Nothing,
    Delta,
    Full,
}

/// The task of one process.
pub(super) struct Driver {
    pub(super) controller: VolumeController,
    pub(super) store: SuperblockStore<SimMedium>,
    pub(super) inbox: VecDeque<(Nanos, Input)>,
    work: Option<Work>,
    /// A superblock is being stored.
    storing: bool,
    /// The whole disk is being marked; the volume's answer comes here.
    marking: Option<Arc<Mutex<Option<Marked>>>>,
    conversation: Option<Conversation>,
    serial: u64,
    dials: bool,
    dial_under_way: bool,
    dial_pause: Nanos,
    next_dial: Nanos,
    link_up: bool,
    epoch: Epoch,
    refusal_told: String,
    pub(super) finished: bool,
    /// Of the last session that was agreed.
    pub(super) scope: Option<Scope>,
    /// The command being carried out gives up this disk's data.
    pub(super) discards: bool,
    /// `invalidate` was asked for and nothing has been marked for it yet.
    pub(super) invalidates: bool,
}

impl Driver {
    pub(super) fn new(controller: VolumeController, store: SuperblockStore<SimMedium>) -> Self {
        Self {
            controller,
            store,
            inbox: VecDeque::new(),
            work: None,
            storing: false,
            marking: None,
            conversation: None,
            serial: 0,
            dials: false,
            dial_under_way: false,
            dial_pause: TICK,
            next_dial: 0,
            link_up: false,
            epoch: Epoch::ZERO,
            refusal_told: String::new(),
            finished: false,
            scope: None,
            discards: false,
            invalidates: false,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.work.is_none() && self.inbox.is_empty()
    }
}

impl World {
    /// Puts something in the task's inbox, to be looked at a little later.
    pub(super) fn post_input(&mut self, at: usize, input: Input) {
        let due = self.now() + US + self.rng.below(self.config.control_delay);
        let Some(process) = &mut self.nodes[at].process else { return };
        let inbox = &mut process.driver.inbox;
        let due = inbox.back().map_or(due, |(last, _)| due.max(*last));
        inbox.push_back((due, input));
        let life = self.nodes[at].life;
        self.agenda.at(due, Event::Control { at, life });
    }

    /// Takes what is due from the inbox, unless a list of actions is still being carried out.
    pub(super) fn control(&mut self, at: usize) -> Verdict {
        let now = self.now();
        while self.nodes[at].process.is_some() && self.driver(at).work.is_none() {
            if self.driver(at).finished {
                self.end_process(at);
                return Ok(());
            }
            if self.driver(at).inbox.front().is_none_or(|(due, _)| *due > now) {
                return Ok(());
            }
            let (_, input) = self.driver(at).inbox.pop_front().expect("just seen");
            self.take(at, input)?;
        }
        Ok(())
    }

    fn take(&mut self, at: usize, input: Input) -> Verdict {
        match input {
            Input::Reactor(event) => self.take_reactor(at, event),
            Input::Accepted { stream, hello } => {
                if let Some(older) = self.driver(at).conversation.take() {
                    self.drop_conversation(at, &older);
                    let event = role::Event::SessionFailed { text: "it began anew".into() };
                    self.handle(at, event, false)?;
                    if self.driver(at).work.is_some() {
                        // It is handled to its end before the newer hello is looked at.
                        let now = self.now();
                        self.driver(at).inbox.push_front((now, Input::Accepted { stream, hello }));
                        return Ok(());
                    }
                }
                let ours = self.begin_conversation(at);
                let serial = self.driver(at).serial;
                self.say(at, stream, &ours);
                self.post_input(at, Input::Heard { serial, stream, heard: Ok(Message::Hello(hello)) });
                Ok(())
            }
            Input::Dialled { stream } => {
                self.driver(at).dial_under_way = false;
                self.dialled(at, stream);
                Ok(())
            }
            Input::Heard { serial, stream, heard } => {
                if self.driver(at).conversation.as_ref().is_some_and(|c| c.serial == serial) {
                    self.heard(at, stream, heard)
                } else {
                    self.close_stream(at, stream);
                    Ok(())
                }
            }
            Input::Operator { id, command } => {
                self.tell(at, format_args!("operator: {command:?}"));
                self.disturb();
                self.note_command(at, command);
                self.handle(at, role::Event::Operator { id, command }, false)
            }
            Input::Shutdown => self.handle(at, role::Event::Shutdown, false),
            Input::Tick => {
                self.handle(at, role::Event::Tick, false)?;
                if self.nodes[at].process.is_some() {
                    self.dial_if_due(at);
                }
                Ok(())
            }
        }
    }

    fn take_reactor(&mut self, at: usize, event: ReactorEvent) -> Verdict {
        let event = match event {
            ReactorEvent::LinkDown { reason, undurable, dirty, parted, .. } => {
                self.tell(at, format_args!("link down: {reason}; undurable: {undurable}; {parted:?}"));
                self.driver(at).link_up = false;
                self.pause_after_session(at);
                if self.driver(at).controller.status().connection == Connection::Connected {
                    self.check_prefix(at)?;
                }
                role::Event::LinkDown { reason, undurable, dirty, parted }
            }
            ReactorEvent::Settled { .. } => role::Event::Settled,
            ReactorEvent::AskAlone { .. } => role::Event::NeedAlone,
            ReactorEvent::ResyncDone { .. } => role::Event::ResyncDone,
            ReactorEvent::Verified { outcome, .. } => role::Event::Verified(Box::new(outcome)),
            ReactorEvent::FoundDifferent { .. } => role::Event::FoundDifferent,
            ReactorEvent::PeerMessage { code, arg, .. } => role::Event::PeerMessage { code, arg },
            ReactorEvent::DiskFailing { error, .. } => role::Event::DiskFailing { text: error },
            ReactorEvent::DiskFailed { error, .. } => role::Event::DiskFailed { text: error },
            ReactorEvent::Quiesced { .. } => role::Event::Quiesced,
            ReactorEvent::Stopped => return Ok(()),
        };
        self.handle(at, event, false)
    }

    fn begin_conversation(&mut self, at: usize) -> Message {
        let ring_len = self.config.ring_len as u64;
        let driver = self.driver(at);
        driver.serial += 1;
        driver.conversation = Some(Conversation { serial: driver.serial, stream: None });
        Message::Hello(Box::new(driver.controller.hello(ring_len, &["tcp"])))
    }

    fn dial_if_due(&mut self, at: usize) {
        let now = self.now();
        let driver = self.driver(at);
        let idle = driver.conversation.is_none() && !driver.link_up && !driver.dial_under_way;
        if driver.dials && idle && now >= driver.next_dial {
            driver.dial_under_way = true;
            self.dial(at);
        }
    }

    fn pause_dialling(&mut self, at: usize) {
        let now = self.now();
        let driver = self.driver(at);
        driver.dial_pause = (driver.dial_pause * 2).min(DIAL_PAUSE_MAX);
        driver.next_dial = now + driver.dial_pause;
        self.look_at_dialling(at);
    }

    fn pause_after_session(&mut self, at: usize) {
        let now = self.now();
        let driver = self.driver(at);
        driver.dial_pause = DIAL_PAUSE_FIRST / 2;
        driver.next_dial = now;
        self.look_at_dialling(at);
    }

    /// The task wakes when the next dial is due.
    fn look_at_dialling(&mut self, at: usize) {
        let (life, due) = (self.nodes[at].life, self.driver(at).next_dial);
        self.agenda.at(due.max(self.now() + US), Event::DialDue { at, life });
    }

    /// It is.
    pub(super) fn dial_due(&mut self, at: usize) {
        if self.driver(at).work.is_some() {
            // The task is busy, and looks again a little later.
            let (life, due) = (self.nodes[at].life, self.now() + MS);
            return self.agenda.at(due, Event::DialDue { at, life });
        }
        self.dial_if_due(at);
    }

    fn dialled(&mut self, at: usize, stream: Option<StreamId>) {
        let Some(stream) = stream else { return self.pause_dialling(at) };
        let driver = self.driver(at);
        if !driver.dials || driver.conversation.is_some() || driver.link_up {
            return self.close_stream(at, stream);
        }
        let ours = self.begin_conversation(at);
        let serial = self.driver(at).serial;
        self.converse(at, serial, stream, &ours);
    }

    fn heard(&mut self, at: usize, stream: StreamId, heard: Result<Message, String>) -> Verdict {
        let event = match heard {
            Ok(Message::Hello(hello)) => {
                self.driver(at).conversation.as_mut().expect("the caller looked").stream = Some(stream);
                role::Event::HelloReceived(hello)
            }
            Ok(Message::Ready(ready)) => {
                self.driver(at).conversation.as_mut().expect("the caller looked").stream = Some(stream);
                role::Event::SessionReady(ready)
            }
            Ok(Message::Refuse(refuse)) => {
                self.driver(at).conversation = None;
                self.close_stream(at, stream);
                role::Event::PeerRefused(refuse)
            }
            Ok(Message::Link(_) | Message::Ask(_) | Message::Offer(_)) => {
                panic!("the simulated nodes speak TCP only")
            }
            Err(text) => {
                self.driver(at).conversation = None;
                self.close_stream(at, stream);
                role::Event::SessionFailed { text }
            }
        };
        if matches!(event, role::Event::SessionFailed { .. } | role::Event::PeerRefused(_)) {
            self.pause_dialling(at);
        }
        self.handle(at, event, true)
    }

    /// Gives an event to the controller and begins to do what it says.
    pub(super) fn handle(&mut self, at: usize, event: role::Event, heard: bool) -> Verdict {
        let local = self.nodes[at].skew.duration(self.now());
        if !matches!(event, role::Event::Tick) {
            self.tell(at, format_args!("control hears {}", brief(&event)));
        }
        let driver = self.driver(at);
        let before = driver.controller.status().connection;
        let mut actions = Vec::new();
        driver.controller.handle(local, event, &mut actions);
        driver.work = Some(Work { actions: actions.into(), before, failure: None, heard, last_will: false });
        self.work(at)
    }

    /// Goes on with the list of actions, to its end or to the next pause.
    fn work(&mut self, at: usize) -> Verdict {
        loop {
            let Some(work) = &mut self.driver(at).work else { return Ok(()) };
            let Some(action) = work.actions.pop_front() else { break };
            match (work.failure.clone(), work.last_will) {
                (Some(error), false) => self.leave_undone(at, &action, &error),
                (_, true) if matches!(action, Action::StoreMetadata(_)) => {}
                _ => {
                    match action {
                        Action::StoreMetadata(superblock) => {
                            self.begin_store(at, superblock);
                            return Ok(());
                        }
                        Action::MarkAll => {
                            self.begin_marking(at);
                            return Ok(());
                        }
                        _ => {}
                    }
                    self.perform(at, action)?;
                    if self.rng.below(100) == 0 {
                        // Preempted.
                        let life = self.nodes[at].life;
                        let due = self.now() + self.rng.below(2 * MS);
                        self.agenda.at(due, Event::Work { at, life });
                        return Ok(());
                    }
                }
            }
        }
        self.finish_work(at)
    }

    /// The processor is ours again.
    pub(super) fn resume(&mut self, at: usize) -> Verdict {
        assert!(!self.driver(at).storing, "a store ends by itself");
        self.work(at)?;
        self.control(at)
    }

    fn begin_store(&mut self, at: usize, superblock: Box<Superblock>) {
        self.driver(at).storing = true;
        self.call_metadata(at, MetadataCall::Superblock(superblock));
    }

    fn begin_marking(&mut self, at: usize) {
        let marked = Arc::new(Mutex::new(None));
        let told = Arc::clone(&marked);
        let driver = self.driver(at);
        driver.marking = Some(marked);
        if std::mem::take(&mut driver.invalidates) {
            self.checker.invalidated(at);
        }
        let done = Box::new(move |result| *lock(&told) = Some(result));
        self.send(at, Command::MarkAll { volume: 0, done });
    }

    /// If the volume has answered that all is marked, control goes on.
    pub(super) fn marked(&mut self, at: usize) -> Verdict {
        let marking = self.nodes[at].process.as_ref().and_then(|process| process.driver.marking.clone());
        let Some(result) = marking.and_then(|marked| lock(&marked).take()) else { return Ok(()) };
        self.tell(at, format_args!("all is marked: {result:?}"));
        self.driver(at).marking = None;
        self.driver(at).work.as_mut().expect("it was suspended").failure = result.err();
        self.resume(at)
    }

    /// The medium has the superblock, or refused it.
    pub(super) fn superblock_stored(
        &mut self,
        at: usize,
        before: Record,
        superblock: &Superblock,
        failure: Option<String>,
    ) -> Verdict {
        self.driver(at).storing = false;
        match failure {
            None => self.stored(at, before, superblock)?,
            failure => self.driver(at).work.as_mut().expect("it was suspended").failure = failure,
        }
        self.resume(at)
    }

    fn finish_work(&mut self, at: usize) -> Verdict {
        let work = self.driver(at).work.take().expect("it was under way");
        self.driver(at).discards = false;
        let status = self.driver(at).controller.status();
        if work.before == Connection::SyncSource
            && status.connection == Connection::Connected
            && !work.last_will
        {
            self.send(at, Command::PeerInSync { volume: 0 });
        }
        self.tell_refusal(at, &status);
        if work.failure.is_some() && !work.last_will {
            // The record could not be made durable: nothing that rests on it was done, and nothing may be any more.
            self.send(at, Command::CloseLink { volume: 0, reason: "the metadata cannot be stored" });
            self.send(at, Command::StopServing { volume: 0 });
            let now = self.now();
            self.disturb();
            self.checker.gave_up(now, at);
            let local = self.nodes[at].skew.duration(now);
            let driver = self.driver(at);
            let mut actions = Vec::new();
            let text = work.failure.clone().expect("just seen");
            driver.controller.handle(local, role::Event::DiskFailed { text }, &mut actions);
            driver.work = Some(Work { actions: actions.into(), last_will: true, ..work });
            return self.work(at);
        }
        if work.heard && self.driver(at).conversation.as_ref().is_some_and(|c| c.stream.is_some()) {
            // A controller that neither answered nor made a session of it is done with the connection.
            let over = self.driver(at).conversation.take().expect("just seen");
            self.drop_conversation(at, &over);
            self.pause_dialling(at);
        }
        Ok(())
    }

    fn leave_undone(&mut self, at: usize, action: &Action, error: &str) {
        if let Action::StartSession { .. } = action {
            if let Some(over) = self.driver(at).conversation.take() {
                self.drop_conversation(at, &over);
            }
            let (volume, reason) = (0, error.to_owned());
            self.post_input(
                at,
                Input::Reactor(ReactorEvent::LinkDown {
                    volume,
                    reason,
                    undurable: true,
                    dirty: true,
                    moved: false,
                    parted: None,
                }),
            );
            self.post_input(at, Input::Reactor(ReactorEvent::Settled { volume }));
        }
    }

    fn tell_refusal(&mut self, at: usize, status: &role::Status) {
        if status.role == Role::Primary {
            return;
        }
        let text = format!("{:?}, {:?}", status.role, status.peer_primary);
        if text != self.driver(at).refusal_told {
            self.driver(at).refusal_told.clone_from(&text);
            self.send(at, Command::Refusal { volume: 0, text });
        }
    }

    /// Hands the reactor a command; it takes it up a little later.
    fn send(&mut self, at: usize, command: Command) {
        let due = self.now() + self.rng.below(self.config.control_delay);
        let commands = &mut self.live(at).commands;
        let due = commands.back().map_or(due, |(last, _)| due.max(*last));
        commands.push_back((due, command));
        self.wake(at, due);
    }

    fn perform(&mut self, at: usize, action: Action) -> Verdict {
        let volume = 0;
        match action {
            Action::StoreMetadata(_) | Action::MarkAll => panic!("suspends"),
            Action::TryStoreMetadata(_) | Action::Detach => panic!("disks of memory are not detached"),
            Action::Dial => {
                let now = self.now();
                self.driver(at).dials = true;
                self.driver(at).next_dial = now;
                self.dial_if_due(at);
            }
            Action::StopDialing => self.driver(at).dials = false,
            Action::SendReady(ready) => self.send_ready(at, ready),
            Action::Refuse(refuse) => {
                if let Some(Conversation { stream: Some(stream), .. }) = self.driver(at).conversation.take() {
                    self.say(at, stream, &Message::Refuse(refuse));
                    self.close_stream(at, stream);
                }
                self.pause_dialling(at);
            }
            Action::StartSession { side, before, serve, epoch } => {
                self.start_session(at, side, before, serve, epoch)?;
            }
            Action::AdoptEpoch(epoch) => {
                self.driver(at).epoch = epoch;
                let direction = self.as_target(at);
                self.send(at, Command::Direct { volume, direction, epoch });
            }
            Action::Serve { epoch } => {
                self.driver(at).epoch = epoch;
                if self.driver(at).link_up {
                    let resync = self.driver(at).controller.status().connection == Connection::SyncSource;
                    self.send(at, Command::Direct { volume, direction: Direction::Source { resync }, epoch });
                }
                self.send(at, Command::Serve { volume });
            }
            Action::StopServing => {
                self.send(at, Command::StopServing { volume });
                // A copy under way goes on without clients.
                if self.driver(at).link_up
                    && self.driver(at).controller.status().connection != Connection::SyncSource
                {
                    let epoch = self.driver(at).epoch;
                    let direction = self.as_target(at);
                    self.send(at, Command::Direct { volume, direction, epoch });
                }
            }
            Action::GoAlone => {
                self.disturb();
                self.send(at, Command::GoAlone { volume });
            }
            Action::CloseLink => {
                if let Some(over) = self.driver(at).conversation.take() {
                    self.drop_conversation(at, &over);
                }
                if self.driver(at).link_up {
                    self.send(at, Command::CloseLink { volume, reason: "by this node's decision" });
                }
            }
            Action::SendPeer { code, arg } => self.send_peer(at, code, arg),
            Action::Verify { repair } => self.send(at, Command::Verify { volume, repair }),
            Action::StopVerify => self.send(at, Command::StopVerify { volume }),
            Action::Quiesce => self.send(at, Command::Quiesce { volume }),
            Action::Reply { id, result } => self.replied(at, id, &result),
            Action::Log { text, .. } => self.tell(at, format_args!("log: {text}")),
            Action::ShutdownComplete => self.driver(at).finished = true,
        }
        Ok(())
    }

    fn as_target(&mut self, at: usize) -> Direction {
        let resync = self.driver(at).controller.status().connection == Connection::SyncTarget;
        Direction::Target { resync }
    }

    fn send_peer(&mut self, at: usize, code: u64, arg: u64) {
        let name = match code {
            code::PROMOTE_REQUEST => "may I become primary",
            code::PROMOTE_GRANT => "you may",
            code::PROMOTE_DENY => "you may not",
            code::DEMOTED => "I am standby",
            code::RESYNC_FINISH => "you hold this generation",
            code::RESYNC_FINISHED => "on record",
            code::RESYNC_PROGRESS => "so far",
            _ => "?",
        };
        self.tell(at, format_args!("says: {name} ({arg:x})"));
        // A peer that is gone by now may have lost what it was vouched for, and never hears of it.
        if code == code::RESYNC_FINISH && self.nodes[1 - at].process.is_some() {
            self.checker.vouched(at);
        }
        self.send(at, Command::SendPeer { volume: 0, code, arg });
    }

    fn send_ready(&mut self, at: usize, ready: Ready) {
        let serial = self.driver(at).serial;
        let stream = self.driver(at).conversation.as_mut().and_then(|c| c.stream.take());
        if let Some(stream) = stream {
            self.tell(at, format_args!("ready: {:?}", ready.agreement));
            self.driver(at).scope = Some(match ready.agreement.verdict {
                Relation::Resync { scope: generation::Scope::Full, .. } => Scope::Full,
                Relation::Resync { .. } => Scope::Delta,
                _ => Scope::Nothing,
            });
            self.converse(at, serial, stream, &Message::Ready(ready));
        }
    }

    fn start_session(
        &mut self,
        at: usize,
        side: SessionSide,
        before: Before,
        serve: bool,
        epoch: Epoch,
    ) -> Verdict {
        let conversation = self.driver(at).conversation.take();
        self.driver(at).epoch = epoch;
        self.driver(at).link_up = true;
        let volume = 0;
        if let Some(stream) = conversation.and_then(|c| c.stream) {
            let (wire, both) = self.take_wire(at, stream);
            let link: Box<dyn Link> = Box::new(SimLink::new(wire, at));
            if side == (SessionSide::Source { resync: true }) {
                let target = self.record(1 - at);
                self.checker.copies(at, target)?;
                self.new_disks.copied_from(at)?;
                let delta = self.driver(at).scope == Some(Scope::Delta);
                self.seen.insert(if delta { "a copy of what differs" } else { "a copy of everything" });
                let now = self.now();
                let coverages = [self.nodes[0].meta.coverage(), self.nodes[1].meta.coverage()];
                self.checker.begin_copy(now, at, delta, coverages);
            }
            let direction = match side {
                SessionSide::Source { resync } => Direction::Source { resync },
                SessionSide::Target { resync } => Direction::Target { resync },
            };
            self.sessions += 1;
            match before {
                Before::Unknown => {}
                Before::Kept { .. } => drop(self.seen.insert("a copy of what was written alone")),
                Before::GoesOn { .. } if side == (SessionSide::Source { resync: true }) => {
                    self.seen.insert("a copy went on over another link");
                }
                Before::GoesOn { .. } => drop(self.seen.insert("a session went on over another link")),
            }
            match side {
                SessionSide::Source { resync: true } => self.checker.copies_after(self.undisturbed)?,
                SessionSide::Source { resync: false } | SessionSide::Target { resync: false } if both => {
                    self.undisturbed = self.beginning_undisturbed;
                }
                _ => {}
            }
            if !both {
                self.beginning_undisturbed = true;
            }
            if both {
                self.check_session()?;
            }
            self.send(at, Command::Session { volume, before, link, direction, epoch });
        } else {
            let reason = "the connection is gone".to_owned();
            self.post_input(
                at,
                Input::Reactor(ReactorEvent::LinkDown {
                    volume,
                    reason,
                    undurable: true,
                    dirty: true,
                    moved: false,
                    parted: None,
                }),
            );
        }
        if serve {
            self.send(at, Command::Serve { volume });
        }
        Ok(())
    }

    fn drop_conversation(&mut self, at: usize, over: &Conversation) {
        if let Some(stream) = over.stream {
            self.close_stream(at, stream);
        } else {
            self.stop_listening(at, over.serial);
        }
    }

    pub(super) fn driver(&mut self, at: usize) -> &mut Driver {
        let process = self.nodes[at].process.as_mut();
        &mut process.unwrap_or_else(|| panic!("{} is up", NAMES[at])).driver
    }
}

pub(super) fn named(superblock: &Superblock) -> String {
    let state = match superblock.disk_state {
        DiskState::UpToDate => "",
        other => other.as_str(),
    };
    let flags = [
        (superblock.primary, "primary"),
        (superblock.clean, "clean"),
        (superblock.applying, "applying"),
        (superblock.peer_has_current, "peer has it"),
    ];
    let flags: Vec<&str> = flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect();
    let generation = superblock.generations.current.0 >> 48;
    format!("generation {generation:04x}…, epoch {}, {state} [{}]", superblock.epoch.0, flags.join(", "))
}

fn brief(event: &role::Event) -> String {
    match event {
        role::Event::HelloReceived(hello) => format!("hello from {}", hello.node),
        role::Event::SessionReady(_) => "ready".to_owned(),
        other => format!("{other:?}"),
    }
}

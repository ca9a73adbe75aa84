//! Control's part of a node: the production [`Task`] with its controller, driven in virtual time.
//!
//! Stands in the place of `node/volume.rs`, and decides as little: an event goes in, the actions that come out are carried out
//! in order. A store suspends the list until the medium has what is stored, and so may, at random, any other action: a process
//! may die between two of them. The checker looks on as events and actions pass.

use super::checker::{NAMES, Verdict};
use super::clock::{MS, Nanos, US};
use super::metadata::{Record, SimMedium};
use super::metadata_calls::MetadataCall;
use super::network::{SimLink, lock};
use super::streams::StreamId;
use super::world::{Event, World};
use costandby_control::config::LinkKind;
use costandby_control::generation::{self, Verdict as Relation};
use costandby_control::hello::{Hello, HelloError, Message, Ready};
use costandby_control::link::Voice;
use costandby_control::progress::Sample;
use costandby_control::role::{Connection, Obstacle, Reach, VolumeController, code};
use costandby_control::task::{self, Action, Carrier, Met, Setup, Task, out_of_turn};
use costandby_datapath::disk::metadata::SuperblockStore;
use costandby_datapath::disk::superblock::{DiskState, Superblock};
use costandby_datapath::reactor::command::{Before, Command, Direction, Event as ReactorEvent};
use costandby_datapath::transport::Link;
use costandby_datapath::units::Epoch;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// How often the task is told that time passed.
pub(super) const TICK: Nanos = 100 * MS;

/// What the task is told.
pub(super) type Input = task::Event<StreamId, Infallible>;

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
    pub(super) task: Task<StreamId, Infallible>,
    pub(super) store: SuperblockStore<SimMedium>,
    pub(super) inbox: VecDeque<(Nanos, Input)>,
    /// Still to be carried out.
    actions: VecDeque<Action<StreamId, Infallible>>,
    /// Until a store has ended, or the processor is free again.
    suspended: bool,
    /// The whole disk is being marked; the volume's answer comes here.
    marking: Option<Arc<Mutex<Option<Marked>>>>,
    /// The conversation in which the peer's hello is awaited.
    greeting: Option<u64>,
    /// When the task is woken.
    wakes_at: Option<Nanos>,
    pub(super) finished: bool,
    /// Of the last session that was agreed.
    pub(super) scope: Option<Scope>,
    /// The command being carried out gives up this disk's data.
    pub(super) discards: bool,
    /// `invalidate` was asked for and nothing has been marked for it yet.
    pub(super) invalidates: bool,
}

impl Driver {
    pub(super) fn new(task: Task<StreamId, Infallible>, store: SuperblockStore<SimMedium>) -> Self {
        Self {
            task,
            store,
            inbox: VecDeque::new(),
            actions: VecDeque::new(),
            suspended: false,
            marking: None,
            greeting: None,
            wakes_at: None,
            finished: false,
            scope: None,
            discards: false,
            invalidates: false,
        }
    }

    fn is_busy(&self) -> bool {
        self.suspended || !self.actions.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.is_busy() && self.inbox.is_empty()
    }
}

impl World {
    /// The task of a process that starts.
    pub(super) fn task(&self, at: usize, controller: VolumeController) -> Task<StreamId, Infallible> {
        let setup = Setup {
            volume: 0,
            name: "db".to_owned(),
            node: NAMES[at].to_owned(),
            peer: NAMES[1 - at].to_owned(),
            wanted: LinkKind::Tcp,
            rdma: Ok(()),
            ring_len: self.config.ring_len as u64,
            payload_len_max: 1 << 16,
            settings: costandby_control::compared::Settings::new(),
        };
        Task::new(self.nodes[at].skew.duration(self.now()), setup, controller)
    }

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
        while self.nodes[at].process.is_some() && !self.driver(at).is_busy() {
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
        match &input {
            Input::Reactor(event) => {
                self.tell(at, format_args!("control hears {event:?}"));
                let connected = self.driver(at).task.status().connection == Connection::Connected;
                if matches!(event, ReactorEvent::LinkDown { .. }) && connected {
                    self.check_prefix(at)?;
                }
            }
            Input::Operator { command, .. } => {
                self.tell(at, format_args!("operator: {command:?}"));
                self.disturb();
                self.note_command(at, *command);
            }
            _ => {}
        }
        let input = match input {
            Input::Tick { .. } => Input::Tick { copying: self.copying(at) },
            other => other,
        };
        self.give(at, input)
    }

    /// The copy under way, as its source's counters have it.
    fn copying(&mut self, at: usize) -> Option<Sample> {
        let counters = self.volume(at).counters();
        let total = counters.resync_total_bytes.load(Ordering::Relaxed);
        counters.resyncing.load(Ordering::Relaxed).then(|| Sample {
            percent_x100: counters.resync_percent_x100.load(Ordering::Relaxed),
            left_bytes: total.saturating_sub(counters.resync_done_bytes.load(Ordering::Relaxed)),
        })
    }

    /// Gives an event to the task and begins to do what the task says.
    pub(super) fn give(&mut self, at: usize, event: Input) -> Verdict {
        let local = self.nodes[at].skew.duration(self.now());
        let mut actions = Vec::new();
        let driver = self.driver(at);
        driver.task.handle(local, event, &mut actions);
        driver.actions.extend(actions);
        self.work(at)
    }

    /// Goes on with the list of actions, to its end or to the next pause.
    fn work(&mut self, at: usize) -> Verdict {
        while let Some(action) = self.driver(at).actions.pop_front() {
            match action {
                Action::StoreMetadata(superblock) => {
                    self.driver(at).suspended = true;
                    self.call_metadata(at, MetadataCall::Superblock(superblock));
                    return Ok(());
                }
                Action::MarkAll => {
                    self.driver(at).suspended = true;
                    self.begin_marking(at);
                    return Ok(());
                }
                action => self.perform(at, action)?,
            }
            if self.rng.below(100) == 0 {
                // Preempted.
                self.driver(at).suspended = true;
                let life = self.nodes[at].life;
                let due = self.now() + self.rng.below(2 * MS);
                self.agenda.at(due, Event::Work { at, life });
                return Ok(());
            }
        }
        self.driver(at).discards = false;
        self.set_alarm(at);
        Ok(())
    }

    /// The processor is ours again.
    pub(super) fn resume(&mut self, at: usize) -> Verdict {
        self.driver(at).suspended = false;
        self.work(at)?;
        self.control(at)
    }

    /// A store has ended.
    fn end_store(&mut self, at: usize, result: Result<(), String>) -> Verdict {
        if result.is_err() {
            let now = self.now();
            self.disturb();
            self.checker.gave_up(now, at);
        }
        self.driver(at).suspended = false;
        self.give(at, Input::Stored(result))?;
        self.control(at)
    }

    /// Has the task woken when it wants to be.
    fn set_alarm(&mut self, at: usize) {
        let Some(due) = self.driver(at).task.due() else { return };
        let due = self.nodes[at].skew.when_shows(due).max(self.now() + US);
        if self.driver(at).wakes_at.is_none_or(|earlier| due < earlier) {
            self.driver(at).wakes_at = Some(due);
            let life = self.nodes[at].life;
            self.agenda.at(due, Event::DialDue { at, life });
        }
    }

    /// The task is woken. One that is busy looks again when it has done its work.
    pub(super) fn dial_due(&mut self, at: usize) -> Verdict {
        self.driver(at).wakes_at = None;
        if self.driver(at).is_busy() { Ok(()) } else { self.give(at, Input::Due) }
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
        self.end_store(at, result)
    }

    /// The medium has the superblock, or refused it.
    pub(super) fn superblock_stored(
        &mut self,
        at: usize,
        before: Record,
        superblock: &Superblock,
        failure: Option<String>,
    ) -> Verdict {
        if failure.is_none() {
            self.stored(at, before, superblock)?;
        }
        self.end_store(at, failure.map_or(Ok(()), Err))
    }

    /// Hands the reactor a command; it takes it up a little later.
    fn send(&mut self, at: usize, command: Command) {
        let due = self.now() + self.rng.below(self.config.control_delay);
        let commands = &mut self.live(at).commands;
        let due = commands.back().map_or(due, |(last, _)| due.max(*last));
        commands.push_back((due, command));
        self.wake(at, due);
    }

    fn perform(&mut self, at: usize, action: Action<StreamId, Infallible>) -> Verdict {
        match action {
            Action::StoreMetadata(_) | Action::MarkAll => panic!("suspends"),
            Action::TryStoreMetadata(_) => panic!("disks of memory are not detached"),
            Action::Command(command) => {
                match command {
                    Command::GoAlone { .. } => self.disturb(),
                    Command::SendPeer { code, arg, .. } => self.note_message(at, code, arg),
                    _ => {}
                }
                self.send(at, command);
            }
            Action::Dial => self.dial(at),
            Action::Probe => self.probe(at),
            Action::Greet { serial, stream, hello, .. } => {
                self.driver(at).greeting = Some(serial);
                self.converse(at, serial, stream, &spoken(hello));
            }
            Action::Answer { serial, stream, hello, theirs, .. } => {
                self.say(at, stream, &spoken(hello));
                self.post_input(at, Input::Met { serial, stream, met: Ok(met(theirs)) });
            }
            Action::SendReady { serial, stream, ready } => self.send_ready(at, serial, stream, ready),
            Action::Refuse { stream, refuse } => {
                self.say(at, stream, &Message::Refuse(refuse));
                self.close_stream(at, stream);
            }
            Action::Close(stream) => self.close_stream(at, stream),
            Action::StartSession { stream, before, direction, epoch, .. } => {
                return self.start_session(at, stream, before, direction, epoch);
            }
            Action::Reply { id, result } => self.replied(at, id, &result),
            Action::Log { text, .. } => self.tell(at, format_args!("log: {text}")),
            Action::Publish(_) | Action::PublishLink(_) | Action::PublishProgress(_) => {}
            Action::PeersDiskHangs(_) | Action::Differences(_) => {}
            Action::ShutdownComplete => self.driver(at).finished = true,
            Action::GreetOver { .. }
            | Action::AskForRdma { .. }
            | Action::OfferRdma { .. }
            | Action::AwaitHello { .. } => panic!("the simulated nodes speak TCP only"),
        }
        Ok(())
    }

    /// Asks the peer whether it would have a session. What it answers is for people, so nothing is sent.
    fn probe(&mut self, at: usize) {
        let blocked = lock(&self.ether).blocked.contains(&true);
        let there = !blocked && self.nodes[1 - at].process.is_some();
        self.post_input(at, Input::Probed(if there { Ok(()) } else { Err(unreachable()) }));
    }

    /// A dial ended.
    pub(super) fn dialled(&mut self, at: usize, stream: Option<StreamId>) {
        self.post_input(at, Input::Dialled(stream.ok_or_else(unreachable)));
    }

    /// The peer said something in the conversation of this serial, or the connection broke.
    pub(super) fn heard(
        &mut self,
        at: usize,
        serial: u64,
        stream: StreamId,
        heard: Result<Message, HelloError>,
    ) {
        let greeting = self.driver(at).greeting.take_if(|greeting| *greeting == serial).is_some();
        let input = match heard {
            Ok(Message::Hello(hello)) if greeting => Input::Met { serial, stream, met: Ok(met(hello)) },
            Ok(other) if greeting => Input::Met { serial, stream, met: Err(out_of_turn(other, "its hello")) },
            Err(error) if greeting => Input::Met { serial, stream, met: Err(error.into()) },
            heard => Input::Heard { serial, stream, heard },
        };
        self.post_input(at, input);
    }

    fn note_message(&mut self, at: usize, code: u64, arg: u64) {
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
    }

    fn send_ready(&mut self, at: usize, serial: u64, stream: StreamId, ready: Ready) {
        self.tell(at, format_args!("ready: {:?}", ready.agreement));
        self.driver(at).scope = Some(match ready.agreement.verdict {
            Relation::Resync { scope: generation::Scope::Full, .. } => Scope::Full,
            Relation::Resync { .. } => Scope::Delta,
            _ => Scope::Nothing,
        });
        self.converse(at, serial, stream, &Message::Ready(ready));
    }

    fn start_session(
        &mut self,
        at: usize,
        stream: StreamId,
        before: Before,
        direction: Direction,
        epoch: Epoch,
    ) -> Verdict {
        let (wire, both) = self.take_wire(at, stream);
        let link: Box<dyn Link> = Box::new(SimLink::new(wire, at));
        if direction == (Direction::Source { resync: true }) {
            let target = self.record(1 - at);
            self.checker.copies(at, target)?;
            self.new_disks.copied_from(at)?;
            let delta = self.driver(at).scope == Some(Scope::Delta);
            self.seen.insert(if delta { "a copy of what differs" } else { "a copy of everything" });
            let now = self.now();
            let coverages = [self.nodes[0].meta.coverage(), self.nodes[1].meta.coverage()];
            self.checker.begin_copy(now, at, delta, coverages);
        }
        self.sessions += 1;
        match before {
            Before::Unknown => {}
            Before::Kept { .. } => drop(self.seen.insert("a copy of what was written alone")),
            Before::GoesOn { .. } if direction == (Direction::Source { resync: true }) => {
                self.seen.insert("a copy went on over another link");
            }
            Before::GoesOn { .. } => drop(self.seen.insert("a session went on over another link")),
        }
        match direction {
            Direction::Source { resync: true } => self.checker.copies_after(self.undisturbed)?,
            Direction::Source { resync: false } | Direction::Target { resync: false } if both => {
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
        self.send(at, Command::Session { volume: 0, before, link, direction, epoch });
        Ok(())
    }

    pub(super) fn driver(&mut self, at: usize) -> &mut Driver {
        let process = self.nodes[at].process.as_mut();
        &mut process.unwrap_or_else(|| panic!("{} is up", NAMES[at])).driver
    }
}

/// A hello with what it says about links.
fn spoken(mut hello: Box<Hello>) -> Message {
    hello.set_voice(Voice::new(LinkKind::Tcp, Ok(())));
    Message::Hello(hello)
}

fn met(hello: Box<Hello>) -> Met<Infallible> {
    Met { hello, carrier: Carrier::Tcp { why: None, tried: false } }
}

fn unreachable() -> Obstacle {
    Obstacle::Unreachable { reach: Reach::Silent, text: "no answer".to_owned() }
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

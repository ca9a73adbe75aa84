//! The task of one volume: between the volume's controller and everything that the controller has done. Sans-IO: events and the
//! time come in, one ordered list of actions goes out, and nothing else.
//!
//! Two drivers carry the actions out: `node/volume.rs` with tokio and real files, and the simulator in virtual time. A driver
//! decides nothing. It gives an [`Event`], carries out every [`Action`] of the list in order, and gives each result back as the
//! event that the action names.
//!
//! ```text
//! peers, reactor, operator ──Event──▶ Task ──role::Event──▶ VolumeController
//!            ▲                         │  ◀──role::Action──
//!            └──────────── driver ◀──Action
//! ```
//!
//! An action that stores something ([`Action::StoreMetadata`], [`Action::TryStoreMetadata`], [`Action::MarkAll`]) ends its list.
//! The driver gives no event but [`Event::Stored`] until the store has ended; what waits behind the store stays in the task. So
//! a store is durable before the next action begins, which is what the controller's promises rest on.
//!
//! When a store fails:
//! - What stood behind the store is not done. A command gets the error as its answer, a session that was to begin ends at
//!   once ([`ReactorEvent::LinkDown`], then [`ReactorEvent::Settled`], as of any session), a shutdown is complete.
//! - The reactor closes the link and stops serving, and the controller hears that the disk failed. What the controller wants
//!   stored after that is left out.
//!
//! Also decided here: when to dial, when a conversation is over, what becomes of a connection, when the session changes its
//! link ([`relink`]), when a peer is asked why it does not dial ([`probe`]), what clients are told who are refused.
//!
//! Invariants: at most one conversation at a time, and one event at a time; every connection that came in an event leaves in an
//! action.

use crate::compared::differences;
use crate::config::LinkKind;
use crate::hello::{Ask, Hello, Message, Refuse, RefuseCode};
use crate::link::Kind;
use crate::progress::{Progress, Sample};
use crate::role::{self, Connection, Level, Obstacle, SessionSide, VolumeController, code};
use costandby_datapath::reactor::command::{Before, Command, Direction, Event as ReactorEvent};
use costandby_datapath::transport::ring_takes;
use costandby_datapath::units::Epoch;
use dialler::Dialler;
use link::LinkKeeper;
use probe::Prober;
use refusal::refusal;
use relink::Relink;
use std::collections::VecDeque;
use std::time::Duration;

mod dialler;
mod link;
mod messages;
mod probe;
mod redial;
mod refusal;
mod relink;

pub use messages::{Action, Carrier, Event, Heard, LinkStatus, Met, Next, NoLink, Setup, out_of_turn};

/// How often a driver gives [`Event::Tick`].
pub const TICK: Duration = Duration::from_millis(100);

/// Largest ring a peer may announce: more than any release of ours offers; it only bounds what we keep in flight.
const RING_LEN_ANNOUNCED_MAX: u64 = 16 << 30;

/// Why a session's link is closed when it changes, for the peer's log where it did not expect that.
const CHANGE_REASON: &str = "the session goes on over RDMA";

/// The peer of a conversation whose link is settled.
struct PeerEnd<P> {
    ring_len: u64,
    /// It takes RDMA when it can.
    wants_rdma: bool,
    carrier: Carrier<P>,
}

/// A connection that is not a link yet. `stream` is with the driver while a message is awaited on it.
struct Conversation<C, P> {
    serial: u64,
    /// We dialled.
    dialled: bool,
    stream: Option<C>,
    /// What its hello came to.
    peer: Option<PeerEnd<P>>,
}

/// A session as far as its link may change.
struct SessionState {
    /// We dialled, and ask for changes.
    dialled: bool,
    /// What carries it.
    kind: Kind,
}

/// The controller's actions that are being carried out.
struct Work {
    rest: VecDeque<role::Action>,
    before: Connection,
    failure: Option<String>,
    /// The list that follows a failed store.
    after_failure: bool,
}

/// What is to be done once the controller's present list is carried out.
enum Step<C> {
    /// The controller hears of this.
    Tell(role::Event),
    /// A peer that connected is answered.
    Answer { stream: C, hello: Box<Hello> },
    /// A connection to the peer is used.
    Greet { stream: C },
    /// A controller that neither answered nor made a session of a conversation is done with it.
    Conversed,
    /// The session's link is gone: the session goes over to the new one, if that is why.
    LeftLink,
    /// A session never came to be.
    NotBegun { reason: String },
    /// What is looked at now and then.
    Chores { copying: Option<Sample> },
}

type List<C, P> = Vec<Action<C, P>>;

/// The task. See the module's doc.
pub struct Task<C, P> {
    setup: Setup,
    controller: VolumeController,
    work: Option<Work>,
    /// Something is being stored.
    storing: bool,
    steps: VecDeque<Step<C>>,
    link: LinkKeeper,
    /// From the making of its link to its end.
    session: Option<SessionState>,
    conversation: Option<Conversation<C, P>>,
    serial: u64,
    dialler: Dialler,
    prober: Prober,
    relink: Relink<C, P>,
    /// From the handing over of a link to its end.
    link_up: bool,
    epoch: Epoch,
    progress: Progress,
    refusal_told: String,
}

impl<C, P> Task<C, P> {
    /// The task of a volume that comes into service. Nothing happens before [`Event::Start`].
    #[must_use]
    pub fn new(now: Duration, setup: Setup, controller: VolumeController) -> Self {
        let link = LinkKeeper::new(setup.wanted, setup.rdma.clone());
        Self {
            setup,
            controller,
            work: None,
            storing: false,
            steps: VecDeque::new(),
            link,
            session: None,
            conversation: None,
            serial: 0,
            dialler: Dialler::new(now),
            prober: Prober::new(now),
            relink: Relink::default(),
            link_up: false,
            epoch: Epoch::ZERO,
            progress: Progress::default(),
            refusal_told: String::new(),
        }
    }

    /// The controller's state.
    #[must_use]
    pub fn status(&self) -> role::Status {
        self.controller.status()
    }

    /// When to give [`Event::Due`]; `None` while there is no need, and while something is being stored.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        self.dialler.due().filter(|_| self.may_dial() && !self.storing)
    }

    /// Takes one event and appends what is to be done. `now` counts from any fixed moment and never goes back.
    ///
    /// # Panics
    /// On [`Event::Stored`] where nothing is being stored, and on any other event where something is.
    pub fn handle(&mut self, now: Duration, event: Event<C, P>, actions: &mut List<C, P>) {
        assert_eq!(self.storing, matches!(event, Event::Stored(_)), "events wait for the end of a store");
        self.take(now, event, actions);
        while !self.storing {
            if let Some(work) = &mut self.work {
                match work.rest.pop_front() {
                    Some(action) => self.carry_on(now, action, actions),
                    None => self.finish(now, actions),
                }
            } else if let Some(step) = self.steps.pop_front() {
                self.step(now, step, actions);
            } else {
                return;
            }
        }
    }

    fn take(&mut self, now: Duration, event: Event<C, P>, actions: &mut List<C, P>) {
        match event {
            Event::Start => {
                self.publish_link(actions);
                self.tell(role::Event::Start);
            }
            Event::Stored(result) => {
                self.storing = false;
                let work = self.work.as_mut().expect("its list waits");
                if !work.after_failure {
                    work.failure = result.err();
                }
            }
            Event::Reactor(event) => self.take_reactor(now, event, actions),
            Event::NotBegun { reason } => self.steps.push_back(Step::NotBegun { reason }),
            Event::Accepted { stream, hello } => {
                // The peer dials as if there were no change of link.
                actions.extend(self.relink.end().map(Action::Close));
                self.tell(role::Event::LinkChanges(false));
                if self.drop_conversation(actions) {
                    // Only the peer dials us, so it has given up the older one.
                    self.tell(role::Event::SessionFailed { text: "it began anew".into() });
                }
                self.steps.push_back(Step::Answer { stream, hello });
            }
            Event::Dialled(dialled) => {
                self.dialler.ended();
                match dialled {
                    Ok(stream) => {
                        self.tell(role::Event::Contact { willing: false });
                        self.steps.push_back(Step::Greet { stream });
                    }
                    Err(obstacle) => {
                        self.dialler.pause(now);
                        self.tell(role::Event::NoContact(obstacle));
                    }
                }
            }
            Event::Probed(asked) => self.probed(now, asked),
            Event::Met { serial, stream, met } if self.is_current(serial) => {
                self.met(now, stream, met, actions);
            }
            Event::Heard { serial, stream, heard } if self.is_current(serial) => {
                self.heard(now, stream, heard, actions);
            }
            Event::Met { stream, .. } | Event::Heard { stream, .. } => actions.push(Action::Close(stream)),
            Event::Asked { stream, ask } => self.asked(now, stream, &ask, actions),
            Event::Made { serial, made } => self.made(serial, made, actions),
            Event::CameOver { serial, next } => self.came_over(now, serial, next, actions),
            Event::Operator { id, command } => self.tell(role::Event::Operator { id, command }),
            Event::Shutdown => self.tell(role::Event::Shutdown),
            Event::Due => self.dial_if_due(now, actions),
            Event::Tick { copying } => {
                self.tell(role::Event::Tick);
                self.steps.push_back(Step::Chores { copying });
            }
        }
    }

    fn tell(&mut self, event: role::Event) {
        self.steps.push_back(Step::Tell(event));
    }

    fn step(&mut self, now: Duration, step: Step<C>, actions: &mut List<C, P>) {
        match step {
            Step::Tell(event) => self.ask_controller(now, event, false),
            Step::Answer { stream, hello } => {
                let ours = Box::new(self.begin_conversation(false));
                let (serial, paused) = (self.serial, self.paused(now));
                actions.push(Action::Answer { serial, stream, hello: ours, theirs: hello, paused });
            }
            Step::Greet { stream } => {
                if !self.dialler.is_on() || self.conversation.is_some() || self.link_up {
                    return actions.push(Action::Close(stream));
                }
                let hello = Box::new(self.begin_conversation(true));
                let (serial, paused) = (self.serial, self.paused(now));
                actions.push(Action::Greet { serial, stream, hello, paused });
            }
            Step::Conversed => {
                if self.conversation.as_ref().is_some_and(|c| c.stream.is_some()) {
                    self.drop_conversation(actions);
                    self.dialler.pause(now);
                }
            }
            Step::LeftLink => {
                if let Some(next) = self.relink.left() {
                    self.go_over(now, next, actions);
                }
            }
            Step::NotBegun { reason } => {
                // The controller hears of it as of any link that ends: nothing was applied that could be torn.
                let (volume, undurable, dirty) = (self.setup.volume, true, true);
                let down =
                    ReactorEvent::LinkDown { volume, reason, undurable, dirty, moved: false, parted: None };
                self.take_reactor(now, down, actions);
                self.take_reactor(now, ReactorEvent::Settled { volume }, actions);
            }
            Step::Chores { copying } => {
                self.dial_if_due(now, actions);
                self.probe_if_due(now, actions);
                self.ask_for_rdma_if_due(now, actions);
                self.note_progress(now, copying, actions);
            }
        }
    }

    fn take_reactor(&mut self, now: Duration, event: ReactorEvent, actions: &mut List<C, P>) {
        let event = match event {
            ReactorEvent::LinkDown { reason, undurable, dirty, moved, parted, .. } => {
                self.link_up = false;
                actions.push(Action::PeersDiskHangs(None));
                self.session = None;
                self.link.ended(now, &reason);
                self.publish_link(actions);
                if self.relink.is_on_purpose() {
                    self.dialler.link_left(now);
                    self.tell(role::Event::LinkChanges(true));
                } else {
                    let text = self.dialler.session_ended(now, moved, &self.setup.peer);
                    actions.extend(text.map(|text| Action::Log { level: Level::Warn, text }));
                }
                self.tell(role::Event::LinkDown { reason, undurable, dirty, parted });
                return self.steps.push_back(Step::LeftLink);
            }
            ReactorEvent::Settled { .. } => role::Event::Settled,
            ReactorEvent::AskAlone { .. } => role::Event::NeedAlone,
            ReactorEvent::ResyncDone { .. } => role::Event::ResyncDone,
            ReactorEvent::Verified { outcome, .. } => role::Event::Verified(Box::new(outcome)),
            ReactorEvent::FoundDifferent { .. } => role::Event::FoundDifferent,
            ReactorEvent::PeerMessage { code: code::RESYNC_PROGRESS, arg, .. } => {
                let is_target = self.controller.status().connection == Connection::SyncTarget;
                if let Some(sample) = Sample::from_message(arg).filter(|_| is_target) {
                    self.progress.note(now, sample);
                    actions.push(Action::PublishProgress(self.progress.clone()));
                }
                return;
            }
            ReactorEvent::PeerMessage { code: code::DISK_HANGS, arg, .. } => {
                return actions.push(Action::PeersDiskHangs((arg > 0).then_some(arg)));
            }
            ReactorEvent::PeerMessage { code, arg, .. } => role::Event::PeerMessage { code, arg },
            ReactorEvent::DiskFailing { error, .. } => role::Event::DiskFailing { text: error },
            ReactorEvent::DiskFailed { error, .. } => role::Event::DiskFailed { text: error },
            ReactorEvent::Quiesced { .. } => role::Event::Quiesced,
            ReactorEvent::Stopped => return,
        };
        self.tell(event);
    }

    fn ask_controller(&mut self, now: Duration, event: role::Event, after_failure: bool) {
        let before = self.controller.status().connection;
        let mut list = Vec::new();
        self.controller.handle(now, event, &mut list);
        self.work = Some(Work { rest: list.into(), before, failure: None, after_failure });
    }

    /// The next action of the controller's list.
    fn carry_on(&mut self, now: Duration, action: role::Action, actions: &mut List<C, P>) {
        let work = self.work.as_ref().expect("the caller looked");
        if let Some(error) = &work.failure {
            let error = not_stored(error);
            return self.leave_undone(action, error, actions);
        }
        if work.after_failure && matches!(action, role::Action::StoreMetadata(_)) {
            return;
        }
        self.perform(now, action, actions);
    }

    /// The controller's list is carried out.
    fn finish(&mut self, now: Duration, actions: &mut List<C, P>) {
        let work = self.work.take().expect("the caller looked");
        let (status, volume) = (self.controller.status(), self.setup.volume);
        if !work.after_failure {
            if work.before == Connection::SyncSource && status.connection == Connection::Connected {
                actions.push(Action::Command(Command::PeerInSync { volume }));
            }
            self.tell_refusal(&status, actions);
        }
        actions.push(Action::Publish(Box::new(status)));
        if let Some(text) = work.failure.filter(|_| !work.after_failure) {
            // The record could not be made durable: nothing that rests on it was done, and nothing may be any more.
            let reason = "the metadata cannot be stored";
            actions.push(Action::Command(Command::CloseLink { volume, reason }));
            actions.push(Action::Command(Command::StopServing { volume }));
            self.ask_controller(now, role::Event::DiskFailed { text }, true);
        }
    }

    /// An action that stood behind a store that failed: whoever waits for its outcome hears of it all the same.
    fn leave_undone(&mut self, action: role::Action, error: String, actions: &mut List<C, P>) {
        match action {
            role::Action::Reply { id, .. } => actions.push(Action::Reply { id, result: Err(error) }),
            role::Action::StartSession { .. } => {
                // The controller believes in a session that never was; the connection ends with its conversation.
                self.drop_conversation(actions);
                self.steps.push_back(Step::NotBegun { reason: error });
            }
            role::Action::ShutdownComplete => actions.push(Action::ShutdownComplete),
            _ => {}
        }
    }

    fn perform(&mut self, now: Duration, action: role::Action, actions: &mut List<C, P>) {
        let volume = self.setup.volume;
        let command = match action {
            role::Action::StoreMetadata(superblock) => {
                self.storing = true;
                return actions.push(Action::StoreMetadata(superblock));
            }
            role::Action::TryStoreMetadata(superblock) => {
                self.storing = true;
                return actions.push(Action::TryStoreMetadata(superblock));
            }
            role::Action::MarkAll => {
                self.storing = true;
                return actions.push(Action::MarkAll);
            }
            role::Action::Dial => {
                self.dialler.start(now);
                return self.dial_if_due(now, actions);
            }
            role::Action::StopDialing => {
                return self.dialler.stop();
            }
            role::Action::SendReady(ready) => {
                let stream = self.conversation.as_mut().and_then(|c| c.stream.take());
                let serial = self.serial;
                return actions.extend(stream.map(|stream| Action::SendReady { serial, stream, ready }));
            }
            role::Action::Refuse(refuse) => {
                let stream = self.conversation.take().and_then(|c| c.stream);
                actions.extend(stream.map(|stream| Action::Refuse { stream, refuse }));
                return self.dialler.pause(now);
            }
            role::Action::StartSession { side, before, serve, epoch } => {
                self.start_session(now, side, before, epoch, actions);
                if !serve {
                    return;
                }
                Command::Serve { volume }
            }
            role::Action::AdoptEpoch(epoch) => {
                self.epoch = epoch;
                Command::Direct { volume, direction: self.as_target(), epoch }
            }
            role::Action::Serve { epoch } => {
                self.epoch = epoch;
                if self.link_up {
                    let resync = self.controller.status().connection == Connection::SyncSource;
                    let direction = Direction::Source { resync };
                    actions.push(Action::Command(Command::Direct { volume, direction, epoch }));
                }
                Command::Serve { volume }
            }
            role::Action::StopServing => {
                actions.push(Action::Command(Command::StopServing { volume }));
                // A copy under way goes on without clients.
                if !self.link_up || self.controller.status().connection == Connection::SyncSource {
                    return;
                }
                Command::Direct { volume, direction: self.as_target(), epoch: self.epoch }
            }
            role::Action::CloseLink => {
                self.drop_conversation(actions);
                if !self.link_up {
                    return;
                }
                Command::CloseLink { volume, reason: "by this node's decision" }
            }
            role::Action::Detach => Command::Detach { volume },
            role::Action::GoAlone => Command::GoAlone { volume },
            role::Action::SendPeer { code, arg } => Command::SendPeer { volume, code, arg },
            role::Action::Verify { repair } => Command::Verify { volume, repair },
            role::Action::StopVerify => Command::StopVerify { volume },
            role::Action::Quiesce => Command::Quiesce { volume },
            role::Action::Reply { id, result } => return actions.push(Action::Reply { id, result }),
            role::Action::Log { level, text } => return actions.push(Action::Log { level, text }),
            role::Action::ShutdownComplete => return actions.push(Action::ShutdownComplete),
        };
        actions.push(Action::Command(command));
    }

    fn as_target(&self) -> Direction {
        Direction::Target { resync: self.controller.status().connection == Connection::SyncTarget }
    }

    fn tell_refusal(&mut self, status: &role::Status, actions: &mut List<C, P>) {
        let Setup { volume, name, peer, .. } = &self.setup;
        let Some(text) = refusal(name, peer, status).filter(|text| *text != self.refusal_told) else {
            return;
        };
        self.refusal_told.clone_from(&text);
        actions.push(Action::Command(Command::Refusal { volume: *volume, text }));
    }

    /// As source of a copy: sees how far it is, and tells the target.
    fn note_progress(&mut self, now: Duration, copying: Option<Sample>, actions: &mut List<C, P>) {
        let connection = self.controller.status().connection;
        if !matches!(connection, Connection::SyncSource | Connection::SyncTarget) {
            if self.progress.percent_x100().is_some() {
                self.progress.clear();
                actions.push(Action::PublishProgress(self.progress.clone()));
            }
            return;
        }
        let copying = copying.filter(|_| connection == Connection::SyncSource && self.progress.is_due(now));
        let Some(sample) = copying else { return };
        self.progress.note(now, sample);
        actions.push(Action::PublishProgress(self.progress.clone()));
        let (volume, code, arg) = (self.setup.volume, code::RESYNC_PROGRESS, sample.to_message());
        actions.push(Action::Command(Command::SendPeer { volume, code, arg }));
    }
}

/// Conversations: dialling, hellos, and the session that comes of them.
impl<C, P> Task<C, P> {
    fn is_current(&self, serial: u64) -> bool {
        self.conversation.as_ref().is_some_and(|c| c.serial == serial)
    }

    fn paused(&self, now: Duration) -> Option<String> {
        self.link.paused(now).map(str::to_owned)
    }

    fn begin_conversation(&mut self, dialled: bool) -> Hello {
        self.serial += 1;
        // What it says about links is settled by the conversation.
        let mut ours = self.controller.hello(self.setup.ring_len, &[]);
        ours.settings = self.setup.settings.clone();
        self.conversation = Some(Conversation { serial: self.serial, dialled, stream: None, peer: None });
        ours
    }

    /// Ends the conversation, if there is one. A connection that is with the driver is closed when it comes back.
    fn drop_conversation(&mut self, actions: &mut List<C, P>) -> bool {
        let Some(over) = self.conversation.take() else { return false };
        actions.extend(over.stream.map(Action::Close));
        true
    }

    fn may_dial(&self) -> bool {
        self.conversation.is_none() && !self.link_up && !self.relink.is_leaving()
    }

    fn dial_if_due(&mut self, now: Duration, actions: &mut List<C, P>) {
        if self.may_dial() && self.dialler.begin(now) {
            actions.push(Action::Dial);
        }
    }

    fn probe_if_due(&mut self, now: Duration, actions: &mut List<C, P>) {
        let waits = self.setup.peer < self.setup.node
            && !self.link_up
            && self.conversation.is_none()
            && self.controller.status().connection == Connection::Connecting;
        if self.prober.is_due(now, waits) {
            actions.push(Action::Probe);
        }
    }

    fn probed(&mut self, now: Duration, asked: Result<(), Obstacle>) {
        self.prober.answered(now);
        self.tell(match asked {
            Ok(()) => role::Event::Contact { willing: true },
            Err(obstacle) => role::Event::NoContact(obstacle),
        });
    }

    /// It is settled what carries the session, or that nothing does.
    fn met(&mut self, now: Duration, stream: C, met: Result<Met<P>, NoLink>, actions: &mut List<C, P>) {
        let event = match met {
            Ok(Met { hello, carrier }) => {
                if let Carrier::Tcp { why: Some(why), tried: true } = &carrier {
                    self.link.rdma_failed(now, why);
                }
                let Setup { node, peer, settings, .. } = &self.setup;
                actions.push(Action::Differences(differences((node, settings), (peer, &hello.settings))));
                let ring_len = hello.ring_len;
                let fits = usize::try_from(ring_len)
                    .is_ok_and(|len| ring_takes(len, self.setup.payload_len_max as usize))
                    && ring_len <= RING_LEN_ANNOUNCED_MAX;
                if fits {
                    let wants_rdma = hello.voice().wants_rdma();
                    let conversation = self.conversation.as_mut().expect("the caller looked");
                    conversation.stream = Some(stream);
                    conversation.peer = Some(PeerEnd { ring_len, wants_rdma, carrier });
                    role::Event::HelloReceived(hello)
                } else {
                    self.conversation = None;
                    actions.push(Action::Close(stream));
                    let text = format!("it announces a ring of {ring_len} bytes, which cannot be used");
                    role::Event::SessionFailed { text }
                }
            }
            Err(error) => {
                // Remembers why there is no link where that is about links; the controller tells of the rest.
                match &error {
                    NoLink::Rdma(why) => self.link.rdma_failed(now, why),
                    NoLink::NothingInCommon(text) => self.link.tell(text),
                    NoLink::Refused(refuse) if refuse.code == RefuseCode::Link => {
                        self.link.tell(&refuse.text);
                    }
                    NoLink::Refused(_) | NoLink::Hello(_) | NoLink::OutOfTurn { .. } => {}
                }
                actions.push(Action::Close(stream));
                self.conversation_failed(error)
            }
        };
        self.publish_link(actions);
        self.converse(now, event);
    }

    fn heard(&mut self, now: Duration, stream: C, heard: Heard, actions: &mut List<C, P>) {
        let error = match heard {
            Ok(Message::Ready(ready)) => {
                self.conversation.as_mut().expect("the caller looked").stream = Some(stream);
                return self.converse(now, role::Event::SessionReady(ready));
            }
            Ok(other) => out_of_turn(other, "that it is ready"),
            Err(error) => error.into(),
        };
        actions.push(Action::Close(stream));
        let event = self.conversation_failed(error);
        self.converse(now, event);
    }

    fn conversation_failed(&mut self, error: NoLink) -> role::Event {
        self.conversation = None;
        match error {
            NoLink::Refused(refuse) => role::Event::PeerRefused(refuse),
            other => role::Event::SessionFailed { text: other.to_string() },
        }
    }

    /// Tells the controller what came of a conversation.
    fn converse(&mut self, now: Duration, event: role::Event) {
        if matches!(event, role::Event::SessionFailed { .. } | role::Event::PeerRefused(_)) {
            self.dialler.pause(now);
            self.tell(role::Event::LinkChanges(false));
        }
        self.tell(event);
        self.steps.push_back(Step::Conversed);
    }

    fn start_session(
        &mut self,
        now: Duration,
        side: SessionSide,
        before: Before,
        epoch: Epoch,
        actions: &mut List<C, P>,
    ) {
        self.dialler.session_began(now);
        self.epoch = epoch;
        self.link_up = true;
        let Some(Conversation { dialled, stream: Some(stream), peer: Some(peer), .. }) =
            self.conversation.take()
        else {
            let reason = "the connection is gone".to_owned();
            return self.steps.push_back(Step::NotBegun { reason });
        };
        let PeerEnd { ring_len, wants_rdma, carrier } = peer;
        let (kind, why) = match &carrier {
            Carrier::Rdma(_) => (Kind::Rdma, None),
            Carrier::Tcp { why, .. } => (Kind::Tcp, why.clone()),
        };
        self.session = Some(SessionState { dialled, kind });
        self.link.began(now, kind, why, wants_rdma);
        self.publish_link(actions);
        let direction = match side {
            SessionSide::Source { resync } => Direction::Source { resync },
            SessionSide::Target { resync } => Direction::Target { resync },
        };
        actions.push(Action::StartSession { stream, carrier, ring_len, before, direction, epoch });
    }

    /// Makes public what there is to say about the link, and logs what is new: in a few words, `doctor` has the rest.
    fn publish_link(&mut self, actions: &mut List<C, P>) {
        actions.push(Action::PublishLink(self.link.status()));
        let line = self.link.news(self.session.is_some());
        actions.extend(line.map(|(level, text)| Action::Log { level, text }));
    }
}

/// The change of a session's link. See [`relink`].
impl<C, P> Task<C, P> {
    /// Asks the peer to take the session on to RDMA, when it is time for that.
    fn ask_for_rdma_if_due(&mut self, now: Duration, actions: &mut List<C, P>) {
        let may = self.relink.is_idle()
            && self.session.as_ref().is_some_and(|session| session.dialled)
            && self.controller.may_change_link();
        if !may || !self.link.probe_due(now) {
            return;
        }
        let serial = self.relink.begin();
        let ask = Ask { node: self.setup.node.clone(), volume: self.setup.name.clone(), rdma: true };
        actions.push(Action::AskForRdma { serial, ask, paused: self.paused(now) });
    }

    /// The peer asks whether there would be a session, or for RDMA to take one on to.
    fn asked(&mut self, now: Duration, stream: C, ask: &Ask, actions: &mut List<C, P>) {
        let over_tcp = self.session.as_ref().is_some_and(|s| !s.dialled && s.kind == Kind::Tcp);
        let auto = self.setup.wanted == LinkKind::Auto;
        let may = ask.rdma && auto && over_tcp && !self.relink.is_leaving();
        if !may || !self.controller.may_change_link() {
            let text = "no session over TCP can change its link here at this moment".to_owned();
            let refuse = self.controller.will_refuse().unwrap_or(Refuse { code: RefuseCode::Busy, text });
            return actions.push(Action::Refuse { stream, refuse });
        }
        let serial = self.relink.begin();
        actions.push(Action::OfferRdma { serial, stream, paused: self.paused(now) });
    }

    /// Both connections of a change of link are there, or not.
    fn made(&mut self, serial: u64, made: Result<(C, P), NoLink>, actions: &mut List<C, P>) {
        let current = self.relink.connected(serial);
        let (stream, prepared) = match made {
            Ok(made) => made,
            // Not now, for a reason that is no fault.
            Err(NoLink::Refused(Refuse { code: RefuseCode::Busy, .. })) => return,
            Err(error) if current => {
                self.link.tell(&error.note());
                return self.publish_link(actions);
            }
            Err(_) => return,
        };
        let session = self.session.as_ref().filter(|_| current && self.controller.may_change_link());
        match session.map(|session| session.dialled) {
            // The peer finds the connection closed, and the session as it was.
            None => actions.push(Action::Close(stream)),
            Some(true) => self.leave_for(Next { stream, prepared, hello: None }, actions),
            Some(false) => {
                self.relink.wait();
                actions.push(Action::AwaitHello { serial, stream, prepared });
            }
        }
    }

    /// As acceptor: the peer has left the session's link and says hello over the new connection, or it does not.
    fn came_over(
        &mut self,
        now: Duration,
        serial: u64,
        next: Result<Next<C, P>, NoLink>,
        actions: &mut List<C, P>,
    ) {
        let current = self.relink.came_over(serial);
        match next {
            Ok(next) if !current => actions.push(Action::Close(next.stream)),
            Ok(next) if self.link_up => self.leave_for(next, actions),
            Ok(next) => self.go_over(now, next, actions),
            Err(_) if current => self.tell(role::Event::LinkChanges(false)),
            Err(_) => {}
        }
    }

    fn leave_for(&mut self, next: Next<C, P>, actions: &mut List<C, P>) {
        self.relink.leave_for(next);
        let volume = self.setup.volume;
        actions.push(Action::Command(Command::CloseLink { volume, reason: CHANGE_REASON }));
    }

    fn go_over(&mut self, now: Duration, next: Next<C, P>, actions: &mut List<C, P>) {
        let dialled = next.hello.is_none();
        let busy = self.conversation.is_some() || self.link_up;
        if busy || (dialled && !self.dialler.is_on()) {
            actions.push(Action::Close(next.stream));
            return self.steps.push_front(Step::Tell(role::Event::LinkChanges(false)));
        }
        let hello = Box::new(self.begin_conversation(dialled));
        let (serial, paused) = (self.serial, self.paused(now));
        actions.push(Action::GreetOver { serial, hello, next, paused });
    }
}

fn not_stored(error: &str) -> String {
    format!("not done, because the metadata cannot be stored: {error}")
}

#[cfg(test)]
mod tests;

//! One volume's task: feeds events to the volume's controller and carries out the actions that the controller
//! returns.
//!
//! Actions are carried out strictly in order, and a store is durable before the next action begins; that is what the
//! controller's promises rest on. While a store is under way other events wait in the inbox.

use super::Replies;
use super::blocking::blocking;
use super::link::LinkKeeper;
use super::negotiate::{LISTENERS_MAX, Met, NoLink, out_of_turn};
use super::peers::{self, Heard, Route};
use super::rdma::{Prepared, RdmaSetup};
use super::registry::{Shared, Source};
use super::watch::hangs_text;
use crate::admin;
use crate::compared::Settings;
use crate::hello::{Ask, Hello, Message, Refuse, RefuseCode};
use crate::progress::Sample;
use crate::role::{self, Action, Connection, Event, Level, Obstacle, ReplyId, Role, VolumeController, code};
use crate::secure::channel::Channel;
use costandby_datapath::disk::metadata::SuperblockStore;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::limits::RING_LEN;
use costandby_datapath::reactor::ReactorHandle;
use costandby_datapath::reactor::command::{Command, Direction, Event as ReactorEvent};
use costandby_datapath::units::Epoch;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};

mod carry;
mod probe;
mod redial;
pub(super) mod relink;

use carry::{PeerEnd, SessionState};
use probe::Prober;
use redial::{Moved, Redial};
use relink::{Next, Relink};

/// How often the controller hears that time passed, and a failed dial may be followed by another.
const TICK: Duration = Duration::from_millis(100);

/// How long anything waits for a store on a medium that is given up.
const TRY_STORE_MAX: Duration = Duration::from_secs(2);

/// Longest pause between two dials: what a standby's return may take longer than it must.
const DIAL_PAUSE_MAX: Duration = Duration::from_millis(500);

/// The first pause between two dials after a session, when the first dial found the peer busy with the end of it. It doubles.
const DIAL_PAUSE_FIRST: Duration = Duration::from_millis(4);

/// What the task is told.
pub(super) enum Input {
    /// By the reactor.
    Reactor(ReactorEvent),
    /// A peer connected and said this.
    Accepted { stream: Channel, hello: Box<Hello> },
    /// A dial ended.
    Dialled { stream: Result<Channel, Obstacle> },
    /// The peer, which dials us, was asked whether it would have a session.
    Probed { asked: Result<(), Obstacle> },
    /// It is settled what carries the conversation of this serial, or that nothing does.
    Met { serial: u64, stream: Channel, met: Result<Met, NoLink> },
    /// A peer connected and asks this.
    Asked { stream: Channel, ask: Ask },
    /// The connections for the change of link of this serial are there, or not.
    Made { serial: u64, made: Result<(Channel, Prepared), NoLink> },
    /// In that change the peer said hello over the new connection, or it did not.
    CameOver { serial: u64, next: Result<Next, NoLink> },
    /// The peer said something in the conversation of this serial.
    Heard { serial: u64, stream: Channel, heard: Heard },
    /// An operator's command.
    Admin { command: admin::Command, asked: admin::Asked, reply: oneshot::Sender<Result<String, String>> },
    /// The daemon ends.
    Shutdown,
}

/// A connection that is not a link yet. `stream` is elsewhere while a message is awaited on it.
struct Conversation {
    serial: u64,
    /// We dialled.
    dialled: bool,
    stream: Option<Channel>,
    /// What its hello came to.
    peer: Option<PeerEnd>,
}

impl Conversation {
    fn new(serial: u64, dialled: bool) -> Self {
        Self { serial, dialled, stream: None, peer: None }
    }
}

/// The task.
pub(super) struct VolumeTask {
    index: usize,
    shared: Arc<Shared>,
    controller: VolumeController,
    store: Option<Arc<Mutex<SuperblockStore<FileMedium>>>>,
    reactor: ReactorHandle,
    queue: mpsc::UnboundedReceiver<Input>,
    surroundings: Surroundings,
    link: LinkKeeper,
    /// What the log last said of it.
    link_logged: Option<String>,
    /// Room for RDMA listeners.
    listeners: Arc<Semaphore>,
    /// From the making of its link to its end.
    session: Option<SessionState>,
    began: Instant,
    conversation: Option<Conversation>,
    serial: u64,
    dials: bool,
    dial_under_way: bool,
    dial_pause: Duration,
    next_dial: Instant,
    redial: Redial,
    prober: Prober,
    relink: Relink,
    /// From the handing over of a link to its end.
    link_up: bool,
    /// Since when.
    session_began: Option<Instant>,
    epoch: Epoch,
    replies: Replies,
    next_reply: u64,
    refusal_told: String,
    finished: bool,
}

/// Where a volume's task lives.
pub(super) struct Surroundings {
    /// The way to its peer.
    pub(super) route: Route,
    /// This node's name.
    pub(super) node: String,
    /// This node's address towards its peers.
    pub(super) local: IpAddr,
    /// This node's RDMA.
    pub(super) rdma: Arc<dyn RdmaSetup>,
    /// What the peer's configuration must agree with.
    pub(super) settings: Settings,
}

impl VolumeTask {
    pub(super) fn new(
        index: usize,
        shared: Arc<Shared>,
        controller: VolumeController,
        store: Option<SuperblockStore<FileMedium>>,
        reactor: ReactorHandle,
        queue: mpsc::UnboundedReceiver<Input>,
        surroundings: Surroundings,
    ) -> Self {
        let now = Instant::now();
        let link = LinkKeeper::new(shared.config.link, surroundings.able(shared.config.link));
        Self {
            index,
            shared,
            controller,
            store: store.map(|store| Arc::new(Mutex::new(store))),
            reactor,
            queue,
            surroundings,
            link,
            link_logged: None,
            listeners: Arc::new(Semaphore::new(LISTENERS_MAX)),
            session: None,
            began: now,
            conversation: None,
            serial: 0,
            dials: false,
            dial_under_way: false,
            dial_pause: TICK,
            next_dial: now,
            redial: Redial::default(),
            prober: Prober::new(now),
            relink: Relink::default(),
            link_up: false,
            session_began: None,
            epoch: Epoch::ZERO,
            replies: Replies::new(),
            next_reply: 0,
            refusal_told: String::new(),
            finished: false,
        }
    }

    /// Runs until the volume is at rest after [`Input::Shutdown`].
    pub(super) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.publish_link();
        self.handle(Event::Start).await;
        while !self.finished {
            tokio::select! {
                input = self.queue.recv() => match input {
                    Some(input) => self.take(input).await,
                    None => return,
                },
                () = tokio::time::sleep_until(self.next_dial.into()), if self.wants_to_dial() => self.dial_if_due(),
                _ = tick.tick() => {
                    self.handle(Event::Tick).await;
                    self.dial_if_due();
                    self.probe_if_due();
                    self.ask_for_rdma_if_due();
                    self.note_progress();
                }
            }
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Reactor(event) => self.take_reactor(event).await,
            Input::Accepted { stream, hello } => {
                self.end_change().await;
                self.redial.handshake_ended(self.began.elapsed());
                if self.conversation.take().is_some() {
                    // Only the peer dials us, so it has given up the older one.
                    self.handle(Event::SessionFailed { text: "it began anew".into() }).await;
                }
                if !self.redial.answers(self.began.elapsed()) {
                    let text = "its last sessions came to nothing, so the next one waits a little".to_owned();
                    return peers::part(stream, Refuse { code: RefuseCode::Busy, text });
                }
                let ours = self.begin_conversation(false);
                let inbox = self.shared.inbox.clone();
                peers::answer_hello(self.serial, stream, ours, hello, self.terms(), inbox);
            }
            Input::Dialled { stream } => {
                self.dial_under_way = false;
                self.dialled(stream).await;
            }
            Input::Probed { asked } => self.probed(asked).await,
            Input::Met { serial, stream, met } => {
                if self.conversation.as_ref().is_some_and(|c| c.serial == serial) {
                    self.met(stream, met).await;
                }
            }
            Input::Asked { stream, ask } => self.asked(stream, &ask),
            Input::Made { serial, made } => self.made(serial, made),
            Input::CameOver { serial, next } => self.came_over(serial, next).await,
            Input::Heard { serial, stream, heard } => {
                if self.conversation.as_ref().is_some_and(|c| c.serial == serial) {
                    self.heard(stream, heard).await;
                }
            }
            Input::Admin { command, asked, reply } => {
                if let Some(why) = asked.void() {
                    // Whoever gave it may have gone on to the other node since.
                    let text = format!("volume {}: not carried out: {why}", self.shared.config.name);
                    let _ = reply.send(Err(text));
                    return;
                }
                if matches!(command, role::Command::Connect { .. }) {
                    self.redial = Redial::default();
                    self.prober.ask_anew();
                }
                self.next_reply += 1;
                let id = self.next_reply;
                self.replies.insert(id, reply);
                self.handle(Event::Operator { id: ReplyId(id), command }).await;
            }
            Input::Shutdown => self.handle(Event::Shutdown).await,
        }
    }

    async fn take_reactor(&mut self, event: ReactorEvent) {
        let event = match event {
            ReactorEvent::LinkDown { reason, undurable, dirty, moved, heard, parted, .. } => {
                self.link_up = false;
                self.shared.warn(Source::PeersCalls, &[]);
                self.link_ended(&reason);
                if self.relink.is_on_purpose() {
                    self.no_pause_after_session();
                    self.handle(Event::LinkChanges(true)).await;
                } else {
                    let moved = Moved::of(moved, parted.as_ref(), self.controller.is_diskless());
                    self.pause_after_session(moved, heard);
                }
                self.handle(Event::LinkDown { reason, undurable, dirty, parted }).await;
                return self.left_link().await;
            }
            ReactorEvent::Settled { .. } => Event::Settled,
            ReactorEvent::AskAlone { .. } => Event::NeedAlone,
            ReactorEvent::ResyncDone { .. } => Event::ResyncDone,
            ReactorEvent::Verified { outcome, .. } => Event::Verified(Box::new(outcome)),
            ReactorEvent::FoundDifferent { .. } => Event::FoundDifferent,
            ReactorEvent::PeerMessage { code: code::RESYNC_PROGRESS, arg, .. } => {
                return self.told_progress(arg);
            }
            ReactorEvent::PeerMessage { code: code::DISK_HANGS, arg, .. } => {
                let disk = format!("the disk of {}", self.shared.peer);
                let text = (arg > 0).then(|| hangs_text(&disk, arg));
                self.shared.warn(Source::PeersCalls, text.as_slice());
                return;
            }
            ReactorEvent::PeerMessage { code, arg, .. } => Event::PeerMessage { code, arg },
            ReactorEvent::DiskFailing { error, .. } => Event::DiskFailing { text: error },
            ReactorEvent::DiskFailed { error, .. } => Event::DiskFailed { text: error },
            ReactorEvent::Quiesced { .. } => Event::Quiesced,
            ReactorEvent::Stopped => return,
        };
        self.handle(event).await;
    }

    fn begin_conversation(&mut self, dialled: bool) -> Hello {
        self.serial += 1;
        // What it says about links is settled by the conversation.
        let mut ours = self.controller.hello(RING_LEN, &[]);
        ours.settings = self.surroundings.settings.clone();
        self.conversation = Some(Conversation::new(self.serial, dialled));
        ours
    }

    fn wants_to_dial(&self) -> bool {
        let idle = self.conversation.is_none() && !self.link_up && !self.dial_under_way;
        self.dials && idle && !self.relink.is_leaving()
    }

    fn dial_if_due(&mut self) {
        if self.wants_to_dial() && Instant::now() >= self.next_dial {
            self.dial_under_way = true;
            peers::dial(self.surroundings.route.clone(), self.shared.inbox.clone());
        }
    }

    /// A dial, or the talk after it, came to nothing.
    fn pause_dialling(&mut self) {
        self.redial.handshake_ended(self.began.elapsed());
        self.dial_pause = (self.dial_pause * 2).min(DIAL_PAUSE_MAX);
        self.next_dial = Instant::now() + self.dial_pause.max(self.redial.after_handshake());
    }

    /// A session's link broke: its peer most likely lives, and is dialled again at once. Not where session after session ends
    /// without a single change that got through.
    fn pause_after_session(&mut self, moved: Moved, heard: bool) {
        let lived = self.session_began.take().map_or(Duration::ZERO, |began| began.elapsed());
        let now = self.began.elapsed();
        let (pause, text) = self.redial.session_ended(now, lived, moved, self.shared.peer.as_str());
        if heard {
            self.redial.session_was_heard();
        }
        // Whoever does not dial does not pause.
        if let Some(text) = text.filter(|_| self.dials) {
            tracing::warn!(volume = self.shared.config.name.as_str(), "{text}");
        }
        self.dial_pause = DIAL_PAUSE_FIRST / 2;
        self.next_dial = Instant::now() + pause;
    }

    /// The pause that is under way is over: there is a reason to think that the next session fares better.
    fn dial_anew(&mut self) {
        self.redial = Redial::default();
        self.next_dial = Instant::now();
        self.dial_if_due();
    }

    async fn dialled(&mut self, stream: Result<Channel, Obstacle>) {
        let stream = match stream {
            Ok(stream) => stream,
            Err(obstacle) => {
                self.pause_dialling();
                return self.handle(Event::NoContact(obstacle)).await;
            }
        };
        self.handle(Event::Contact { willing: false }).await;
        if !self.dials || self.conversation.is_some() || self.link_up {
            return;
        }
        let ours = self.begin_conversation(true);
        peers::greet(self.serial, stream, ours, self.terms(), self.shared.inbox.clone());
    }

    async fn heard(&mut self, stream: Channel, heard: Heard) {
        let event = match heard {
            Ok(Message::Ready(ready)) => {
                self.conversation.as_mut().expect("the caller looked").stream = Some(stream);
                Event::SessionReady(ready)
            }
            Ok(other) => self.conversation_failed(out_of_turn(other, "that it is ready")),
            Err(error) => self.conversation_failed(error.into()),
        };
        self.converse(event).await;
    }

    fn conversation_failed(&mut self, error: NoLink) -> Event {
        self.conversation = None;
        match error {
            NoLink::Refused(refuse) => Event::PeerRefused(refuse),
            other => Event::SessionFailed { text: other.to_string() },
        }
    }

    /// Tells the controller what came of a conversation.
    async fn converse(&mut self, event: Event) {
        if matches!(event, Event::SessionFailed { .. } | Event::PeerRefused(_)) {
            self.pause_dialling();
            self.handle(Event::LinkChanges(false)).await;
        }
        self.handle(event).await;
        // A controller that neither answered nor made a session of it is done with the connection.
        if self.conversation.as_ref().is_some_and(|c| c.stream.is_some()) {
            self.conversation = None;
            self.pause_dialling();
        }
    }

    /// Gives an event to the controller, does what it says, and publishes the outcome.
    async fn handle(&mut self, event: Event) {
        let before = self.controller.status().connection;
        let mut actions = Vec::new();
        self.controller.handle(self.began.elapsed(), event, &mut actions);
        let mut failure: Option<String> = None;
        for action in actions {
            match &failure {
                None => failure = self.perform(action).await.err(),
                Some(error) => self.leave_undone(&action, error),
            }
        }
        let status = self.controller.status();
        if before == Connection::SyncSource && status.connection == Connection::Connected {
            self.send(Command::PeerInSync { volume: self.index });
        }
        self.tell_refusal(&status);
        *self.shared.status.lock().expect("nobody panics with it") = status;
        if let Some(text) = failure {
            // The record could not be made durable: nothing that rests on it was done, and nothing may be any more.
            self.send(Command::CloseLink { volume: self.index, reason: "the metadata cannot be stored" });
            self.send(Command::StopServing { volume: self.index });
            let mut actions = Vec::new();
            self.controller.handle(self.began.elapsed(), Event::DiskFailed { text }, &mut actions);
            for action in actions {
                if !matches!(action, Action::StoreMetadata(_)) {
                    let _ = self.perform(action).await;
                }
            }
            *self.shared.status.lock().expect("nobody panics with it") = self.controller.status();
        }
    }

    /// An action that stood behind a store that failed: whoever waits for its outcome hears of it all the same.
    fn leave_undone(&mut self, action: &Action, error: &str) {
        match action {
            Action::Reply { id, .. } => answer(&mut self.replies, *id, Err(not_stored(error))),
            Action::StartSession { .. } => {
                // The controller believes in a session that never was; the connection ends with its conversation.
                self.conversation = None;
                let (volume, reason) = (self.index, not_stored(error));
                for event in [
                    ReactorEvent::LinkDown {
                        volume,
                        reason,
                        undurable: true,
                        dirty: true,
                        moved: false,
                        heard: false,
                        parted: None,
                    },
                    ReactorEvent::Settled { volume },
                ] {
                    let _ = self.shared.inbox.send(Input::Reactor(event));
                }
            }
            Action::ShutdownComplete => self.finished = true,
            _ => {}
        }
    }

    fn tell_refusal(&mut self, status: &role::Status) {
        let (volume, peer) = (&self.shared.config.name, &self.shared.peer);
        let text = match (status.role, status.peer_primary) {
            (Role::Primary, _) => return,
            (Role::Demoting, _) => format!("volume {volume} is being handed over: try {peer} in a moment"),
            (_, Some(true)) => {
                format!("volume {volume} is served by {peer}: this node is its standby, connect there")
            }
            (_, _) => format!(
                "volume {volume} is not served by this node, its standby; if {peer} does not serve it either, promote it on the node \
                 that shall: {}, or {}",
                self.controller.commands().here("promote"),
                self.controller.commands().there("promote")
            ),
        };
        if text != self.refusal_told {
            self.refusal_told.clone_from(&text);
            self.send(Command::Refusal { volume: self.index, text });
        }
    }

    fn send(&self, command: Command) {
        self.reactor.send(command);
    }

    async fn perform(&mut self, action: Action) -> Result<(), String> {
        let volume = self.index;
        match action {
            Action::StoreMetadata(superblock) => self.store_metadata(*superblock).await?,
            Action::TryStoreMetadata(superblock) => {
                // Logged where it fails; the disk is given up already, and may hang.
                let storing = self.store_metadata(*superblock);
                let _ = tokio::time::timeout(TRY_STORE_MAX, storing).await;
            }
            Action::Detach => self.send(Command::Detach { volume }),
            Action::MarkAll => self.mark_all().await?,
            Action::Dial => {
                self.dials = true;
                self.dial_anew();
            }
            Action::StopDialing => self.dials = false,
            Action::SendReady(ready) => {
                self.redial.ready_said(self.began.elapsed());
                if let Some(stream) = self.conversation.as_mut().and_then(|c| c.stream.take()) {
                    peers::converse(self.serial, stream, Message::Ready(ready), self.shared.inbox.clone());
                }
            }
            Action::Refuse(refuse) => {
                if let Some(stream) = self.conversation.take().and_then(|c| c.stream) {
                    peers::part(stream, refuse);
                }
                self.pause_dialling();
            }
            Action::StartSession { side, before, serve, epoch } => {
                self.start_session(side, before, serve, epoch);
            }
            Action::AdoptEpoch(epoch) => {
                self.epoch = epoch;
                self.send(Command::Direct { volume, direction: self.as_target(), epoch });
            }
            Action::Serve { epoch } => {
                self.epoch = epoch;
                if self.link_up {
                    let resync = self.controller.status().connection == Connection::SyncSource;
                    self.send(Command::Direct { volume, direction: Direction::Source { resync }, epoch });
                }
                self.send(Command::Serve { volume });
            }
            Action::StopServing => {
                self.send(Command::StopServing { volume });
                // A copy under way goes on without clients.
                if self.link_up && self.controller.status().connection != Connection::SyncSource {
                    let direction = self.as_target();
                    self.send(Command::Direct { volume, direction, epoch: self.epoch });
                }
            }
            Action::GoAlone => self.send(Command::GoAlone { volume }),
            Action::CloseLink => {
                self.conversation = None;
                self.redial.handshake_ended(self.began.elapsed());
                if self.link_up {
                    self.send(Command::CloseLink { volume, reason: "by this node's decision" });
                }
            }
            Action::SendPeer { code, arg } => self.send(Command::SendPeer { volume, code, arg }),
            Action::Verify { repair } => self.send(Command::Verify { volume, repair }),
            Action::StopVerify => self.send(Command::StopVerify { volume }),
            Action::Quiesce => self.send(Command::Quiesce { volume }),
            Action::Reply { id, result } => answer(&mut self.replies, id, result),
            Action::Log { level, text } => self.log(level, &text),
            Action::ShutdownComplete => self.finished = true,
        }
        Ok(())
    }

    fn log(&self, level: Level, text: &str) {
        let volume = self.shared.config.name.as_str();
        match level {
            Level::Info => tracing::info!(volume, "{text}"),
            Level::Warn => tracing::warn!(volume, "{text}"),
            Level::Error => tracing::error!(volume, "{text}"),
        }
    }

    /// As source of a copy: sees how far it is, and tells the target.
    fn note_progress(&mut self) {
        let connection = self.controller.status().connection;
        let mut progress = self.shared.progress.lock().expect("nobody panics with it");
        if !matches!(connection, Connection::SyncSource | Connection::SyncTarget) {
            return progress.clear();
        }
        let (now, counters) = (self.began.elapsed(), self.reactor.counters(self.index));
        let copies = connection == Connection::SyncSource && counters.resyncing.load(Ordering::Relaxed);
        if !copies || !progress.is_due(now) {
            return;
        }
        let total = counters.resync_total_bytes.load(Ordering::Relaxed);
        let sample = Sample {
            percent_x100: counters.resync_percent_x100.load(Ordering::Relaxed),
            left_bytes: total.saturating_sub(counters.resync_done_bytes.load(Ordering::Relaxed)),
        };
        progress.note(now, sample);
        drop(progress);
        let (code, arg) = (code::RESYNC_PROGRESS, sample.to_message());
        self.send(Command::SendPeer { volume: self.index, code, arg });
    }

    /// As its target: hears of it.
    fn told_progress(&self, arg: u64) {
        let is_target = self.controller.status().connection == Connection::SyncTarget;
        if let Some(sample) = Sample::from_message(arg).filter(|_| is_target) {
            self.shared.progress.lock().expect("nobody panics with it").note(self.began.elapsed(), sample);
        }
    }

    fn as_target(&self) -> Direction {
        Direction::Target { resync: self.controller.status().connection == Connection::SyncTarget }
    }

    async fn mark_all(&mut self) -> Result<(), String> {
        let (tell, told) = oneshot::channel();
        let done = Box::new(move |result| {
            // A task that ended with its daemon needs no answer.
            let _ = tell.send(result);
        });
        self.send(Command::MarkAll { volume: self.index, done });
        told.await.unwrap_or_else(|_| Err("the datapath ended".to_owned())).inspect_err(|error| {
            let volume = self.shared.config.name.as_str();
            tracing::error!(volume, error, "the list of what must be copied cannot be stored");
        })
    }

    async fn store_metadata(&mut self, superblock: Superblock) -> Result<(), String> {
        // A memory disk's metadata lives and dies with the daemon.
        let Some(store) = self.store.clone() else { return Ok(()) };
        // One that nobody waits for any more ends before this one begins.
        let mut store = store.lock_owned().await;
        blocking(move || store.store(&superblock)).await.map_err(|error| {
            tracing::error!(volume = self.shared.config.name.as_str(), %error, "the metadata cannot be stored");
            error.to_string()
        })
    }
}

fn answer(replies: &mut Replies, id: ReplyId, result: Result<String, String>) {
    if let Some(reply) = replies.remove(&id.0) {
        // An operator who hung up does not need the answer.
        let _ = reply.send(result);
    }
}

fn not_stored(error: &str) -> String {
    format!("not done, because the metadata cannot be stored: {error}")
}

#[cfg(test)]
mod tests;

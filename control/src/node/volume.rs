//! One volume's task: what happens goes into its controller, what the controller decides is carried out here.
//!
//! Actions are carried out strictly in order, and a store is durable before the next action begins; that is what the
//! controller's promises rest on. While a store is under way other events wait in the inbox.

use super::peers::{self, Heard};
use super::{Replies, Shared};
use crate::admin;
use crate::hello::{Hello, Message};
use crate::role::{self, Action, Connection, Event, Level, ReplyId, Role, SessionSide, VolumeController};
use costandby_datapath::disk::superblock::{MetaStore, Superblock};
use costandby_datapath::limits::{PAYLOAD_LEN_MAX, RING_LEN};
use costandby_datapath::reactor::ReactorHandle;
use costandby_datapath::reactor::command::{Command, Direction, Event as ReactorEvent};
use costandby_datapath::transport::ring_takes;
use costandby_datapath::transport::tcp::TcpLink;
use costandby_datapath::units::Epoch;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

/// How often the controller hears that time passed, and a failed dial may be followed by another.
const TICK: Duration = Duration::from_millis(100);

/// Longest pause between two dials: what a standby's return may take longer than it must.
const DIAL_PAUSE_MAX: Duration = Duration::from_millis(500);

/// What the task is told.
pub(super) enum Input {
    /// By the reactor.
    Reactor(ReactorEvent),
    /// A peer connected and said this.
    Accepted { stream: TcpStream, hello: Box<Hello> },
    /// A dial ended.
    Dialled { stream: Option<TcpStream> },
    /// The peer said something in the conversation of this serial.
    Heard { serial: u64, stream: TcpStream, heard: Heard },
    /// An operator's command.
    Admin { command: admin::Command, reply: oneshot::Sender<Result<String, String>> },
    /// The daemon ends.
    Shutdown,
}

/// A connection that is not a link yet. `stream` is elsewhere while a message is awaited on it.
struct Conversation {
    serial: u64,
    stream: Option<TcpStream>,
    peer_ring_len: u64,
}

/// The task.
pub(super) struct VolumeTask {
    index: usize,
    shared: Arc<Shared>,
    controller: VolumeController,
    store: Option<MetaStore>,
    reactor: ReactorHandle,
    queue: mpsc::UnboundedReceiver<Input>,
    peer_address: SocketAddr,
    began: Instant,
    conversation: Option<Conversation>,
    serial: u64,
    dials: bool,
    dial_under_way: bool,
    dial_pause: Duration,
    next_dial: Instant,
    /// From the handing over of a link to its end.
    link_up: bool,
    epoch: Epoch,
    replies: Replies,
    next_reply: u64,
    refusal_told: String,
    finished: bool,
}

impl VolumeTask {
    pub(super) fn new(
        index: usize,
        shared: Arc<Shared>,
        controller: VolumeController,
        store: Option<MetaStore>,
        reactor: ReactorHandle,
        queue: mpsc::UnboundedReceiver<Input>,
        peer_address: SocketAddr,
    ) -> Self {
        let now = Instant::now();
        Self {
            index,
            shared,
            controller,
            store,
            reactor,
            queue,
            peer_address,
            began: now,
            conversation: None,
            serial: 0,
            dials: false,
            dial_under_way: false,
            dial_pause: TICK,
            next_dial: now,
            link_up: false,
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
        self.handle(Event::Start).await;
        while !self.finished {
            tokio::select! {
                input = self.queue.recv() => match input {
                    Some(input) => self.take(input).await,
                    None => return,
                },
                _ = tick.tick() => {
                    self.handle(Event::Tick).await;
                    self.dial_if_due();
                }
            }
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Reactor(event) => self.take_reactor(event).await,
            Input::Accepted { stream, hello } => {
                if self.conversation.take().is_some() {
                    // Only the peer dials us, so it has given up the older one.
                    self.handle(Event::SessionFailed { text: "it began anew".into() }).await;
                }
                let ours = self.begin_conversation();
                peers::answer_hello(self.serial, stream, ours, hello, self.shared.inbox.clone());
            }
            Input::Dialled { stream } => {
                self.dial_under_way = false;
                self.dialled(stream);
            }
            Input::Heard { serial, stream, heard } => {
                if self.conversation.as_ref().is_some_and(|c| c.serial == serial) {
                    self.heard(stream, heard).await;
                }
            }
            Input::Admin { command, reply } => {
                self.next_reply += 1;
                let id = self.next_reply;
                self.replies.insert(id, reply);
                let command = match command {
                    admin::Command::Promote { force } => role::Command::Promote { force },
                    admin::Command::Demote => role::Command::Demote,
                    admin::Command::Connect => role::Command::Connect,
                    admin::Command::Disconnect => role::Command::Disconnect,
                };
                self.handle(Event::Operator { id: ReplyId(id), command }).await;
            }
            Input::Shutdown => self.handle(Event::Shutdown).await,
        }
    }

    async fn take_reactor(&mut self, event: ReactorEvent) {
        let event = match event {
            ReactorEvent::LinkDown { reason, undurable, .. } => {
                self.link_up = false;
                self.pause_dialling(false);
                Event::LinkDown { reason, undurable }
            }
            ReactorEvent::Settled { .. } => Event::Settled,
            ReactorEvent::AskAlone { .. } => Event::NeedAlone,
            ReactorEvent::ResyncDone { .. } => Event::ResyncDone,
            ReactorEvent::PeerMessage { code, arg, .. } => Event::PeerMessage { code, arg },
            ReactorEvent::DiskFailed { error, .. } => Event::DiskFailed { text: error },
            ReactorEvent::Quiesced { .. } => Event::Quiesced,
            // Nobody asks for another link yet.
            ReactorEvent::LinkSwitched { .. } | ReactorEvent::SwitchFailed { .. } | ReactorEvent::Stopped => {
                return;
            }
        };
        self.handle(event).await;
    }

    fn begin_conversation(&mut self) -> Hello {
        self.serial += 1;
        self.conversation = Some(Conversation { serial: self.serial, stream: None, peer_ring_len: 0 });
        self.controller.hello(RING_LEN, &[LINK_TCP])
    }

    fn dial_if_due(&mut self) {
        let idle = self.conversation.is_none() && !self.link_up && !self.dial_under_way;
        if self.dials && idle && Instant::now() >= self.next_dial {
            self.dial_under_way = true;
            peers::dial(self.peer_address, self.shared.inbox.clone());
        }
    }

    fn pause_dialling(&mut self, longer: bool) {
        self.dial_pause = if longer { (self.dial_pause * 2).min(DIAL_PAUSE_MAX) } else { TICK };
        self.next_dial = Instant::now() + self.dial_pause;
    }

    fn dialled(&mut self, stream: Option<TcpStream>) {
        let Some(stream) = stream else {
            self.pause_dialling(true);
            return;
        };
        if !self.dials || self.conversation.is_some() || self.link_up {
            return;
        }
        let ours = Message::Hello(Box::new(self.begin_conversation()));
        peers::converse(self.serial, stream, ours, self.shared.inbox.clone());
    }

    async fn heard(&mut self, stream: TcpStream, heard: Heard) {
        let event = match heard {
            Ok(Message::Hello(hello)) => {
                let fits = usize::try_from(hello.ring_len)
                    .is_ok_and(|len| ring_takes(len, PAYLOAD_LEN_MAX as usize))
                    && hello.ring_len <= RING_LEN_ANNOUNCED_MAX;
                if !hello.links.iter().any(|link| link == LINK_TCP) {
                    self.conversation = None;
                    let text = format!("it offers the links {:?}, this release has {LINK_TCP}", hello.links);
                    Event::SessionFailed { text }
                } else if fits {
                    let conversation = self.conversation.as_mut().expect("the caller looked");
                    conversation.stream = Some(stream);
                    conversation.peer_ring_len = hello.ring_len;
                    Event::HelloReceived(hello)
                } else {
                    self.conversation = None;
                    let text =
                        format!("it announces a ring of {} bytes, which cannot be used", hello.ring_len);
                    Event::SessionFailed { text }
                }
            }
            Ok(Message::Ready(ready)) => {
                self.conversation.as_mut().expect("the caller looked").stream = Some(stream);
                Event::SessionReady(ready)
            }
            Ok(Message::Refuse(refuse)) => {
                self.conversation = None;
                Event::SessionFailed { text: refuse.text }
            }
            Err(error) => {
                self.conversation = None;
                Event::SessionFailed { text: error.to_string() }
            }
        };
        if matches!(event, Event::SessionFailed { .. }) {
            self.pause_dialling(true);
        }
        self.handle(event).await;
        // A controller that neither answered nor made a session of it is done with the connection.
        if self.conversation.as_ref().is_some_and(|c| c.stream.is_some()) {
            self.conversation = None;
            self.pause_dialling(true);
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
                    ReactorEvent::LinkDown { volume, reason, undurable: true },
                    ReactorEvent::Settled { volume },
                ] {
                    let _ = self.shared.inbox.send(Input::Reactor(event));
                }
            }
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
                "volume {volume} is not served by this node, its standby; if {peer} does not serve it either, run \
                 `costandby promote {volume}` on the node that shall"
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
            Action::Dial => {
                self.dials = true;
                self.next_dial = Instant::now();
                self.dial_if_due();
            }
            Action::StopDialing => self.dials = false,
            Action::SendReady(ready) => {
                if let Some(stream) = self.conversation.as_mut().and_then(|c| c.stream.take()) {
                    peers::converse(self.serial, stream, Message::Ready(ready), self.shared.inbox.clone());
                }
            }
            Action::Refuse(refuse) => {
                if let Some(stream) = self.conversation.take().and_then(|c| c.stream) {
                    peers::part(stream, refuse);
                }
                self.pause_dialling(true);
            }
            Action::StartSession { side, serve, epoch } => self.start_session(side, serve, epoch),
            Action::AdoptEpoch(epoch) => {
                self.epoch = epoch;
                self.send(Command::Direct { volume, direction: Direction::Target, epoch });
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
                    self.send(Command::Direct { volume, direction: Direction::Target, epoch: self.epoch });
                }
            }
            Action::GoAlone => self.send(Command::GoAlone { volume }),
            Action::CloseLink => {
                self.conversation = None;
                if self.link_up {
                    self.send(Command::CloseLink { volume, reason: "by this node's decision" });
                }
            }
            Action::SendPeer { code, arg } => self.send(Command::SendPeer { volume, code, arg }),
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

    async fn store_metadata(&mut self, superblock: Superblock) -> Result<(), String> {
        // A memory disk's metadata lives and dies with the daemon.
        let Some(mut store) = self.store.take() else { return Ok(()) };
        let stored = tokio::task::spawn_blocking(move || {
            let result = store.store(&superblock);
            (store, result)
        });
        let (store, result) = stored.await.expect("a panic has ended the process");
        self.store = Some(store);
        result.map_err(|error| {
            tracing::error!(volume = self.shared.config.name.as_str(), %error, "the metadata cannot be stored");
            error.to_string()
        })
    }

    fn start_session(&mut self, side: SessionSide, serve: bool, epoch: Epoch) {
        let conversation = self.conversation.take();
        self.epoch = epoch;
        self.link_up = true;
        let volume = self.index;
        let linked = conversation
            .and_then(|c| c.stream.map(|stream| (stream, c.peer_ring_len)))
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
            .and_then(|(stream, peer_ring_len)| make_link(stream, peer_ring_len));
        match linked {
            Ok(link) => {
                let direction = match side {
                    SessionSide::Source { resync } => Direction::Source { resync },
                    SessionSide::Target => Direction::Target,
                };
                self.send(Command::Session { volume, link: Box::new(link), direction, epoch });
            }
            Err(error) => {
                // The controller hears of it as of any link that ends.
                let event = ReactorEvent::LinkDown { volume, reason: error.to_string(), undurable: true };
                let _ = self.shared.inbox.send(Input::Reactor(event));
            }
        }
        if serve {
            self.send(Command::Serve { volume });
        }
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

/// The one link this release has, as a hello names it.
const LINK_TCP: &str = "tcp";

/// Largest ring a peer may announce: more than any release of ours offers; it only bounds what we keep in flight.
const RING_LEN_ANNOUNCED_MAX: u64 = 16 << 30;

fn make_link(stream: TcpStream, peer_ring_len: u64) -> io::Result<TcpLink> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(true)?;
    let len = |n: u64| usize::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    TcpLink::new(stream, len(RING_LEN)?, len(peer_ring_len)?)
}

#[cfg(test)]
mod tests;

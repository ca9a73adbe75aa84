//! One volume's task as tokio runs it: what happens goes into [`Task`], and what the task wants done is carried out here.
//!
//! Nothing is decided here. Actions are carried out strictly in order, and a store is durable before the next action begins.
//! While a store is under way other events wait in the inbox.

use super::blocking::blocking;
use super::connection::{Route, part};
use super::conversation;
use super::inbox::{Input, Reply, TaskAction, TaskCarrier, TaskEvent};
use super::negotiate::{LISTENERS_MAX, Terms};
use super::rdma::{Prepared, RdmaSetup};
use super::registry::{Shared, Source};
use super::watch::hangs_text;
use crate::compared::Settings;
use crate::config::LinkKind;
use crate::hello::Message;
use crate::progress::Sample;
use crate::role::{Level, ReplyId, VolumeController};
use crate::secure::channel::Channel;
use crate::task::{Action, Carrier, Event, Setup, TICK, Task};
use costandby_datapath::disk::metadata::SuperblockStore;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::limits::{PAYLOAD_LEN_MAX, RING_LEN};
use costandby_datapath::reactor::ReactorHandle;
use costandby_datapath::reactor::command::Command;
use costandby_datapath::transport::Link;
use costandby_datapath::transport::tcp::TcpLink;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};

/// How long anything waits for a store on a medium that is given up.
const TRY_STORE_MAX: Duration = Duration::from_secs(2);

/// The task.
pub(super) struct VolumeTask {
    index: usize,
    shared: Arc<Shared>,
    task: Task<Channel, Prepared>,
    began: Instant,
    store: Option<Arc<Mutex<SuperblockStore<FileMedium>>>>,
    reactor: ReactorHandle,
    queue: mpsc::UnboundedReceiver<Input>,
    surroundings: Surroundings,
    /// Room for RDMA listeners.
    listeners: Arc<Semaphore>,
    /// Answers owed to operators, by the id the controller knows them by.
    replies: HashMap<u64, Reply>,
    next_reply: u64,
    finished: bool,
}

/// Where a volume's task lives.
pub(super) struct Surroundings {
    /// The way to its peer.
    pub(super) route: Route,
    /// This node's name.
    pub(super) node: String,
    /// How a command line begins that means this daemon's configuration and node.
    pub(super) command_line: String,
    /// This node's address towards its peers.
    pub(super) local: IpAddr,
    /// This node's RDMA.
    pub(super) rdma: Arc<dyn RdmaSetup>,
    /// What the peer's configuration must agree with.
    pub(super) settings: Settings,
}

impl Surroundings {
    /// Whether RDMA is possible here, for a volume that would have it; then its ring begins to be made. Blocks briefly.
    fn able(&self, wanted: LinkKind) -> Result<(), String> {
        if wanted == LinkKind::Tcp {
            return Ok(());
        }
        let able = self.rdma.able(self.local).and_then(|()| self.rdma.ring(self.local));
        able.map(drop).map_err(|why| format!("{} has no RDMA: {why}", self.node))
    }
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
        let setup = Setup {
            volume: index,
            name: shared.config.name.as_str().to_owned(),
            node: surroundings.node.clone(),
            peer: shared.peer.as_str().to_owned(),
            wanted: shared.config.link,
            rdma: surroundings.able(shared.config.link),
            ring_len: RING_LEN,
            payload_len_max: PAYLOAD_LEN_MAX,
            settings: surroundings.settings.clone(),
        };
        Self {
            index,
            shared,
            task: Task::new(Duration::ZERO, setup, controller),
            began: Instant::now(),
            store: store.map(|store| Arc::new(Mutex::new(store))),
            reactor,
            queue,
            surroundings,
            listeners: Arc::new(Semaphore::new(LISTENERS_MAX)),
            replies: HashMap::new(),
            next_reply: 0,
            finished: false,
        }
    }

    /// Runs until the volume is at rest after [`Event::Shutdown`].
    pub(super) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.handle(Event::Start).await;
        while !self.finished {
            let due = self.task.due().map(|due| self.began + due);
            tokio::select! {
                input = self.queue.recv() => match input {
                    Some(input) => self.take(input).await,
                    None => return,
                },
                () = tokio::time::sleep_until(due.unwrap_or(self.began).into()), if due.is_some() => {
                    self.handle(Event::Due).await;
                }
                _ = tick.tick() => {
                    let copying = self.copying();
                    self.handle(Event::Tick { copying }).await;
                }
            }
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Event(event) => self.handle(event).await,
            Input::Admin { command, asked, reply } => {
                if let Some(why) = asked.void() {
                    // Whoever gave it may have gone on to the other node since.
                    let text = format!("volume {}: not carried out: {why}", self.shared.config.name);
                    let _ = reply.send(Err(text));
                    return;
                }
                self.next_reply += 1;
                self.replies.insert(self.next_reply, reply);
                let id = ReplyId(self.next_reply);
                self.handle(Event::Operator { id, command }).await;
            }
        }
    }

    /// Gives an event to the task and does what it says, until nothing is left to do.
    async fn handle(&mut self, event: TaskEvent) {
        let mut event = Some(event);
        while let Some(next) = event.take() {
            let mut actions = Vec::new();
            self.task.handle(self.began.elapsed(), next, &mut actions);
            for action in actions {
                assert!(event.is_none(), "a store ends its list");
                event = self.perform(action).await.map(Event::Stored);
            }
        }
    }

    /// Carries an action out. Gives the outcome of a store.
    async fn perform(&mut self, action: TaskAction) -> Option<Result<(), String>> {
        let inbox = self.shared.inbox.clone();
        match action {
            Action::StoreMetadata(superblock) => return Some(self.store_metadata(*superblock).await),
            Action::TryStoreMetadata(superblock) => {
                // Logged where it fails; the disk is given up already, and may hang.
                let storing = self.store_metadata(*superblock);
                let _ = tokio::time::timeout(TRY_STORE_MAX, storing).await;
                return Some(Ok(()));
            }
            Action::MarkAll => return Some(self.mark_all().await),
            Action::Command(command) => self.reactor.send(command),
            Action::Dial => conversation::dial(self.surroundings.route.clone(), inbox),
            Action::Probe => {
                let volume = self.shared.config.name.as_str().to_owned();
                conversation::probe(self.surroundings.route.clone(), volume, inbox);
            }
            Action::Greet { serial, stream, hello, paused } => {
                conversation::greet(serial, stream, *hello, self.terms(paused), inbox);
            }
            Action::Answer { serial, stream, hello, theirs, paused } => {
                conversation::answer_hello(serial, stream, *hello, theirs, self.terms(paused), inbox);
            }
            Action::GreetOver { serial, hello, next, paused } => {
                conversation::greet_over(serial, *hello, next, self.terms(paused), inbox);
            }
            Action::SendReady { serial, stream, ready } => {
                conversation::converse(serial, stream, Message::Ready(ready), inbox);
            }
            Action::Refuse { stream, refuse } => drop(tokio::spawn(part(stream, refuse))),
            Action::Close(stream) => drop(stream),
            Action::StartSession { stream, carrier, ring_len, before, direction, epoch } => {
                let volume = self.index;
                match make_link(stream, carrier, ring_len) {
                    Ok(link) => {
                        self.reactor.send(Command::Session { volume, before, link, direction, epoch })
                    }
                    Err(error) => {
                        let _ = inbox.send(Input::Event(Event::NotBegun { reason: error.to_string() }));
                    }
                }
            }
            Action::AskForRdma { serial, ask, paused } => {
                let route = self.surroundings.route.clone();
                conversation::ask_for_rdma(serial, route, ask, self.terms(paused), inbox);
            }
            Action::OfferRdma { serial, stream, paused } => {
                conversation::offer_rdma(serial, stream, self.terms(paused), inbox);
            }
            Action::AwaitHello { serial, stream, prepared } => {
                conversation::await_hello(serial, stream, prepared, inbox);
            }
            other => self.tell(other),
        }
        None
    }

    /// Carries out what is for people.
    fn tell(&mut self, action: TaskAction) {
        let volume = self.shared.config.name.as_str();
        match action {
            Action::Reply { id, result } => {
                if let Some(reply) = self.replies.remove(&id.0) {
                    // An operator who hung up does not need the answer.
                    let _ = reply.send(result);
                }
            }
            Action::Log { level, text } => match level {
                Level::Info => tracing::info!(volume, "{text}"),
                Level::Warn => tracing::warn!(volume, "{text}"),
                Level::Error => tracing::error!(volume, "{text}"),
            },
            Action::Publish(status) => {
                *self.shared.status.lock().expect("nobody panics with it") = *status;
            }
            Action::PublishLink(status) => {
                *self.shared.link.lock().expect("nobody panics with it") = Some(status);
            }
            Action::PublishProgress(progress) => {
                *self.shared.progress.lock().expect("nobody panics with it") = progress;
            }
            Action::PeersDiskHangs(seconds) => {
                let disk = format!("the disk of {}", self.shared.peer);
                let text = seconds.map(|seconds| hangs_text(&disk, seconds));
                self.shared.warn(Source::PeersCalls, text.as_slice());
            }
            Action::Differences(found) => {
                // Shown until a hello says that nothing differs.
                if self.shared.warn(Source::Configuration, &found) {
                    for text in found {
                        tracing::warn!(volume, "{text}");
                    }
                }
            }
            Action::ShutdownComplete => self.finished = true,
            _ => unreachable!("the caller carries these out"),
        }
    }

    /// What this volume brings to a conversation.
    fn terms(&self, paused: Option<String>) -> Terms {
        Terms {
            wanted: self.shared.config.link,
            paused,
            local: self.surroundings.local,
            node: self.surroundings.node.clone(),
            peer: self.shared.peer.as_str().to_owned(),
            rdma: self.surroundings.rdma.clone(),
            listeners: self.listeners.clone(),
        }
    }

    /// The copy under way, as its source's counters have it.
    fn copying(&self) -> Option<Sample> {
        let counters = self.reactor.counters(self.index);
        let total = counters.resync_total_bytes.load(Ordering::Relaxed);
        counters.resyncing.load(Ordering::Relaxed).then(|| Sample {
            percent_x100: counters.resync_percent_x100.load(Ordering::Relaxed),
            left_bytes: total.saturating_sub(counters.resync_done_bytes.load(Ordering::Relaxed)),
        })
    }

    async fn mark_all(&mut self) -> Result<(), String> {
        let (tell, told) = oneshot::channel();
        let done = Box::new(move |result| {
            // A task that ended with its daemon needs no answer.
            let _ = tell.send(result);
        });
        self.reactor.send(Command::MarkAll { volume: self.index, done });
        told.await.unwrap_or_else(|_| Err("the datapath ended".to_owned())).inspect_err(|error| {
            let volume = self.shared.config.name.as_str();
            tracing::error!(volume, error, "what has to be copied cannot be put on record");
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

/// Makes a link of a conversation's connection, or of the RDMA connection beside it.
fn make_link(stream: Channel, carrier: TaskCarrier, ring_len: u64) -> io::Result<Box<dyn Link>> {
    let stream = stream.into_stream().into_std()?;
    stream.set_nonblocking(true)?;
    let len = |n: u64| usize::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    match carrier {
        Carrier::Rdma(prepared) => prepared.into_link(stream),
        Carrier::Tcp { .. } => Ok(Box::new(TcpLink::new(stream, len(RING_LEN)?, len(ring_len)?)?)),
    }
}

#[cfg(test)]
mod tests;

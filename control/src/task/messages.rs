//! What a volume's task is told, and what it has done: the two ends of [`Task::handle`](super::Task::handle).
//!
//! `C` is a connection to the peer, `P` an RDMA connection that is ready to become a link and closes itself when dropped. The
//! task moves both about and looks into neither.

use crate::compared::Settings;
use crate::config::LinkKind;
use crate::hello::{Ask, Hello, HelloError, Message, Ready, Refuse};
use crate::link::Kind;
use crate::progress::{Progress, Sample};
use crate::role::{self, Level, Obstacle, ReplyId};
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::reactor::command::{Before, Command, Direction, Event as ReactorEvent};
use costandby_datapath::units::Epoch;

/// What does not change while a volume is in service.
pub struct Setup {
    /// The volume's index in the reactor.
    pub volume: usize,
    /// Its name.
    pub name: String,
    /// This node's name.
    pub node: String,
    /// The peer's.
    pub peer: String,
    /// The volume's `link`.
    pub wanted: LinkKind,
    /// Whether this node has RDMA for it, or why not.
    pub rdma: Result<(), String>,
    /// This node's ring.
    pub ring_len: u64,
    /// What the peer's ring has to take.
    pub payload_len_max: u32,
    /// What the peer's configuration must agree with.
    pub settings: Settings,
}

/// What will carry a session.
pub enum Carrier<P> {
    /// The conversation's own connection.
    Tcp {
        /// Why not RDMA, where this node would have taken it.
        why: Option<String>,
        /// RDMA was tried and failed.
        tried: bool,
    },
    /// An RDMA connection; the conversation's becomes its companion.
    Rdma(P),
}

/// Why there is nothing to carry a session.
#[derive(Debug, thiserror::Error)]
pub enum NoLink {
    /// What was read was no message, or nothing was.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The peer refused.
    #[error("{}", .0.text)]
    Refused(Refuse),
    /// The peer said something that does not belong there.
    #[error("it said {said} where {wanted} belongs: run the same release on both nodes")]
    OutOfTurn {
        /// What it said.
        said: &'static str,
        /// What belongs there.
        wanted: &'static str,
    },
    /// The two configurations and abilities leave nothing.
    #[error("{0}")]
    NothingInCommon(String),
    /// RDMA failed where there is nothing else, or after the peer had it.
    #[error("{0}")]
    Rdma(String),
}

impl NoLink {
    /// Why there is no RDMA, as a note on the volume's link: a sentence that names its node.
    #[must_use]
    pub fn note(&self) -> String {
        match self {
            Self::Rdma(why) => why.clone(),
            other => other.to_string(),
        }
    }
}

/// What a message is called in an error.
fn name(message: &Message) -> &'static str {
    match message {
        Message::Hello(_) => "a hello",
        Message::Link(_) => "what became of an offer",
        Message::Ask(_) => "a question",
        Message::Offer(_) => "an offer",
        Message::Ready(_) => "that it is ready",
        Message::Refuse(_) => "no",
    }
}

/// A message of another kind than was waited for, as an error.
#[must_use]
pub fn out_of_turn(message: Message, wanted: &'static str) -> NoLink {
    match message {
        Message::Refuse(refuse) => NoLink::Refused(refuse),
        other => NoLink::OutOfTurn { said: name(&other), wanted },
    }
}

/// A conversation whose link is settled.
pub struct Met<P> {
    /// What the peer said.
    pub hello: Box<Hello>,
    /// What carries the session.
    pub carrier: Carrier<P>,
}

/// A connection on which a session is to go on, RDMA beside it, and the hello that came on it where the peer dialled.
pub struct Next<C, P> {
    /// The connection.
    pub stream: C,
    /// The RDMA connection.
    pub prepared: P,
    /// The peer's.
    pub hello: Option<Box<Hello>>,
}

/// How a conversation went on.
pub type Heard = Result<Message, HelloError>;

/// What `status` shows of a volume's link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LinkStatus {
    /// What carries the copies, or did last, or would.
    pub kind: Kind,
    /// Why not RDMA, where the configuration would have it.
    pub note: Option<String>,
}

/// What happened. `serial` is that of the [`Action`] that asked for it.
pub enum Event<C, P> {
    /// The disk is open. Once, first.
    Start,
    /// The outcome of [`Action::StoreMetadata`], [`Action::TryStoreMetadata`] or [`Action::MarkAll`].
    Stored(Result<(), String>),
    /// The reactor says so.
    Reactor(ReactorEvent),
    /// [`Action::StartSession`] could not make a link, so the reactor has none.
    NotBegun {
        /// Why.
        reason: String,
    },
    /// A peer connected and said this.
    Accepted {
        /// The connection.
        stream: C,
        /// What it said.
        hello: Box<Hello>,
    },
    /// [`Action::Dial`] ended so.
    Dialled(Result<C, Obstacle>),
    /// [`Action::Probe`] ended so.
    Probed(Result<(), Obstacle>),
    /// What carries the conversation's session is settled, or that nothing does.
    Met {
        /// The conversation's.
        serial: u64,
        /// Its connection.
        stream: C,
        /// What came of it.
        met: Result<Met<P>, NoLink>,
    },
    /// The peer answered [`Action::SendReady`], or the connection broke.
    Heard {
        /// The conversation's.
        serial: u64,
        /// Its connection.
        stream: C,
        /// What it said.
        heard: Heard,
    },
    /// A peer connected and asks this.
    Asked {
        /// The connection.
        stream: C,
        /// The question.
        ask: Ask,
    },
    /// The connections that [`Action::AskForRdma`] or [`Action::OfferRdma`] was to make are there, or not.
    Made {
        /// The change's.
        serial: u64,
        /// The connections.
        made: Result<(C, P), NoLink>,
    },
    /// The peer said hello over the new connection that [`Action::AwaitHello`] listens on, or it did not.
    CameOver {
        /// The change's.
        serial: u64,
        /// The connections and the hello.
        next: Result<Next<C, P>, NoLink>,
    },
    /// An operator's command.
    Operator {
        /// Given back with the reply.
        id: ReplyId,
        /// Which.
        command: role::Command,
    },
    /// The daemon is to end.
    Shutdown,
    /// The time that [`Task::due`](super::Task::due) gave has come. Harmless at any other.
    Due,
    /// Time passed: about ten times a second.
    Tick {
        /// The copy under way, as its source's counters have it.
        copying: Option<Sample>,
    },
}

/// What the driver has to do, in order, each finished before the next begins, except that what ends in an event goes on by itself.
pub enum Action<C, P> {
    /// Make this the stored superblock, durably, then give [`Event::Stored`]. The last of its list.
    StoreMetadata(Box<Superblock>),
    /// The same for a disk that has failed: it may be given up after a while, and counts as stored in any case.
    TryStoreMetadata(Box<Superblock>),
    /// Have the reactor mark the whole disk as differing, durably, then give [`Event::Stored`]. The last of its list.
    MarkAll,
    /// Give this to the reactor.
    Command(Command),
    /// Connect to the peer, then [`Event::Dialled`].
    Dial,
    /// Connect to the peer and ask whether it would have a session, then [`Event::Probed`].
    Probe,
    /// Begin a conversation: send `hello`, hear the peer's, settle what carries the session, then [`Event::Met`].
    Greet {
        /// The conversation's.
        serial: u64,
        /// Its connection.
        stream: C,
        /// This node's.
        hello: Box<Hello>,
        /// Why RDMA is left alone for now.
        paused: Option<String>,
    },
    /// The same where the peer's hello has come.
    Answer {
        /// The conversation's.
        serial: u64,
        /// Its connection.
        stream: C,
        /// This node's.
        hello: Box<Hello>,
        /// The peer's.
        theirs: Box<Hello>,
        /// Why RDMA is left alone for now.
        paused: Option<String>,
    },
    /// The same over a connection beside which both nodes have RDMA.
    GreetOver {
        /// The conversation's.
        serial: u64,
        /// This node's hello.
        hello: Box<Hello>,
        /// The connections, and the peer's hello where it has come.
        next: Next<C, P>,
        /// Why RDMA is left alone for now.
        paused: Option<String>,
    },
    /// Send this, hear the peer's answer, then [`Event::Heard`].
    SendReady {
        /// The conversation's.
        serial: u64,
        /// Its connection.
        stream: C,
        /// What to send.
        ready: Ready,
    },
    /// Send this and close the connection.
    Refuse {
        /// The connection.
        stream: C,
        /// What to send.
        refuse: Refuse,
    },
    /// Close the connection.
    Close(C),
    /// Make a link of the connection and hand it to the reactor, or give [`Event::NotBegun`].
    StartSession {
        /// The conversation's connection.
        stream: C,
        /// What carries the session.
        carrier: Carrier<P>,
        /// The peer's ring.
        ring_len: u64,
        /// How it stands to the session before.
        before: Before,
        /// Which way.
        direction: Direction,
        /// Fencing number of the session's frames.
        epoch: Epoch,
    },
    /// Make a second connection to the peer and RDMA beside it, then [`Event::Made`].
    AskForRdma {
        /// The change's.
        serial: u64,
        /// The question.
        ask: Ask,
        /// Why RDMA is left alone for now.
        paused: Option<String>,
    },
    /// Offer the peer RDMA on the connection that asked for it, then [`Event::Made`].
    OfferRdma {
        /// The change's.
        serial: u64,
        /// The connection.
        stream: C,
        /// Why RDMA is left alone for now.
        paused: Option<String>,
    },
    /// Say that the RDMA connection is here too and wait for the peer's hello, then [`Event::CameOver`].
    AwaitHello {
        /// The change's.
        serial: u64,
        /// The connection.
        stream: C,
        /// RDMA beside it.
        prepared: P,
    },
    /// Answer a command.
    Reply {
        /// The command's.
        id: ReplyId,
        /// What was done, or why not.
        result: Result<String, String>,
    },
    /// Write to the log.
    Log {
        /// How loud.
        level: Level,
        /// What.
        text: String,
    },
    /// `status` shows this from now on.
    Publish(Box<role::Status>),
    /// `status` shows this of the link from now on.
    PublishLink(LinkStatus),
    /// `status` shows this of the copy from now on.
    PublishProgress(Progress),
    /// `status` warns from now on that the peer's disk has not answered for so many seconds, or no longer.
    PeersDiskHangs(Option<u64>),
    /// `status` warns from now on of these differences between the two configurations; the log tells what is new.
    Differences(Vec<String>),
    /// The volume is at rest: the task may end.
    ShutdownComplete,
}

//! The controller of one volume on one node: who serves, with whom, on which generation of the data. Sans-IO.
//!
//! The node's driver feeds [`Event`]s and carries out [`Action`]s *in order*, each finished before the next begins:
//! [`Action::StoreMetadata`] blocks until the superblock is on stable storage, [`Action::StopServing`] until no request
//! can be acknowledged any more. When a store fails the driver drops the rest of the list and reports
//! [`Event::DiskFailed`]. So the order of a list is a promise: what must be on record stands before what relies on it.
//!
//! ```text
//! Connecting ─hello─▶ Handshaking ─ready─▶ Connected ◀── resync finished ── SyncSource / SyncTarget
//!     ▲  └──refused / disconnect──▶ Standalone          └──────── link down ────────▶ Connecting
//! Standby ─promote─▶ (Promoting: peer asked) ─▶ Primary ─demote─▶ (Demoting: quiescing) ─▶ Standby
//! ```
//!
//! Invariants:
//! - A node serves only as [`Role::Primary`], and becomes that only from a usable disk (or by an operator's force), with
//!   the peer's durable consent while it is connected, under a new generation while it is not.
//! - No write is acknowledged alone before a generation that the peer does not have is on record.
//! - A disk is marked inconsistent before the peer may send the first byte of a resync, and up to date only after the
//!   source recorded that the peer has its generation. What there is to copy is on record before: in either node's map,
//!   or as all of the source's ([`Action::MarkAll`]), and only then does the target store whom it copies.
//! - A primary that lost power may lack what it had acknowledged: it is copied to by the peer, which has that, before it
//!   serves again, and then resumes by itself.
//! - A session begins only when both sides hold mirror-image agreements over the views they sent each other.
//!
//! A session's side: a node that serves or copies is its source. Two standbys without a copy are both targets;
//! [`Action::Serve`] makes one a source, [`Action::StopServing`] makes it a target again, unless it copies.
//!
//! Survives: a crash between any two actions, a link lost at any time, two operators promoting at once, and a peer that
//! says anything at all (answered by a refusal or a closed link, never by a panic).

use crate::command_line::Commands;
use crate::compared::Settings;
use crate::generation::{Agreement, Lineage, Recall, ServingRole, View};
use crate::hello::{Hello, Ready, Refuse, RefuseCode};
use costandby_datapath::disk::superblock::{DiskState, Superblock};
use costandby_datapath::reactor::command::{Before, Parted};
use costandby_datapath::units::{AckLevel, Epoch, Generation, OnPeerLoss};
use costandby_datapath::volume::Verified;
use std::time::Duration;

mod apart;
mod diskless;
mod explain;
mod operator;
mod session;
mod status;
#[cfg(test)]
mod tests;
mod verify;
#[cfg(test)]
mod world;

pub use apart::{Obstacle, Reach};
pub use status::Status;
pub use verify::Verification;

/// How long a peer may take to consent to a promotion: far over a durable store on a slow disk, short enough that an
/// operator still waits for the answer.
pub const GRANT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the requests in flight may take to finish before a demotion is given up: over the slowest disk's timeout.
pub const QUIESCE_TIMEOUT: Duration = Duration::from_secs(30);

/// The same for the end of a daemon whose writes wait for the peer under `freeze`, and will until the peer is in sync: enough
/// for everything else in flight, and for the flush where none waits.
pub const FROZEN_QUIESCE_TIMEOUT: Duration = Duration::from_secs(1);

/// Numbers of the messages between two controllers, in the frame's `aux`.
pub mod code {
    /// May I become primary under this epoch?
    pub const PROMOTE_REQUEST: u64 = 1;
    /// You may; this epoch is on record here.
    pub const PROMOTE_GRANT: u64 = 2;
    /// You may not; this is the epoch here.
    pub const PROMOTE_DENY: u64 = 3;
    /// I do not serve any more, and all I served is on stable storage on both.
    pub const DEMOTED: u64 = 4;
    /// That is known here, and a promotion here need not wait for it.
    pub const DEMOTED_NOTED: u64 = 9;
    /// Every block was copied and is durable: you hold this generation now.
    pub const RESYNC_FINISH: u64 = 5;
    /// This generation is on record here.
    pub const RESYNC_FINISHED: u64 = 6;
    /// How far the copy is, about once a second: a [`Sample`](crate::progress::Sample). Changes nothing.
    pub const RESYNC_PROGRESS: u64 = 7;
    /// What you found to differ in a verification is on my record: the next copy covers it.
    pub const DIFFERENCES_NOTED: u64 = 10;
    /// Your disk and mine were compared and are equal now, durably on both.
    pub const DIFFERENCES_REPAIRED: u64 = 11;
    /// My disk has not answered a request for so many seconds; 0: it does again. Changes nothing.
    pub const DISK_HANGS: u64 = 12;
    /// My disk failed while I serve this generation: will yours stand in for it?
    pub const DISK_FAILED: u64 = 20;
    /// It does, and it is on record here that yours is behind this generation.
    pub const DISK_FAILED_NOTED: u64 = 21;
}

/// Whether this node serves the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Does not serve.
    Standby,
    /// Does not serve yet: the connected peer was asked.
    Promoting,
    /// Serves.
    Primary,
    /// Still finishes what was asked before; admits nothing new.
    Demoting,
}

/// How this node stands to its peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Connection {
    /// By an operator's word, or because the disks do not allow a session; until an operator says `connect`.
    Standalone,
    /// Dialling, or waiting to be dialled.
    Connecting,
    /// Agreed, and waiting for the peer to be ready too.
    Handshaking,
    /// In a session, both disks equal but for what is in flight.
    Connected,
    /// In a session, copying this disk to the peer.
    SyncSource,
    /// In a session, being overwritten by the peer.
    SyncTarget,
}

const ROLE_EDGES: [(Role, Role); 8] = [
    (Role::Standby, Role::Promoting),
    (Role::Standby, Role::Primary),
    (Role::Promoting, Role::Primary),
    (Role::Promoting, Role::Standby),
    (Role::Primary, Role::Demoting),
    (Role::Primary, Role::Standby),
    (Role::Demoting, Role::Standby),
    (Role::Demoting, Role::Primary),
];

const CONNECTION_EDGES: [(Connection, Connection); 16] = [
    (Connection::Standalone, Connection::Connecting),
    (Connection::Connecting, Connection::Standalone),
    (Connection::Connecting, Connection::Handshaking),
    (Connection::Handshaking, Connection::Connecting),
    (Connection::Handshaking, Connection::Standalone),
    (Connection::Handshaking, Connection::Connected),
    (Connection::Handshaking, Connection::SyncSource),
    (Connection::Handshaking, Connection::SyncTarget),
    (Connection::SyncSource, Connection::Connected),
    (Connection::SyncTarget, Connection::Connected),
    (Connection::Connected, Connection::Connecting),
    (Connection::SyncSource, Connection::Connecting),
    (Connection::SyncTarget, Connection::Connecting),
    (Connection::Connected, Connection::Standalone),
    (Connection::SyncSource, Connection::Standalone),
    (Connection::SyncTarget, Connection::Standalone),
];

/// Names one operator command until its [`Action::Reply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ReplyId(pub u64);

/// What an operator (or Pacemaker) asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Serve here.
    Promote {
        /// Even from a disk that is not up to date.
        force: bool,
    },
    /// Stop serving here.
    Demote,
    /// Look for the peer again.
    Connect {
        /// Give up what this node's disk holds, to be overwritten by the peer: the way out of a split brain.
        discard_my_data: bool,
    },
    /// Close the link and stay apart.
    Disconnect,
    /// Give up what this node's disk holds and have the connected peer copy everything anew.
    Invalidate,
    /// Compare the connected peer's disk with this one.
    Verify {
        /// Copy what differs to the peer at once.
        repair: bool,
    },
    /// End the verification under way.
    StopVerify,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The daemon is up and its disk is open. Once, first.
    Start,
    /// The peer's hello was read on a new connection, on which [`VolumeController::hello`]'s was sent before.
    HelloReceived(Box<Hello>),
    /// The peer's `Ready` was read on the connection that carried ours. Without an [`Action::StartSession`] in answer the
    /// connection is closed.
    SessionReady(Ready),
    /// A connection ended before it became a session: timed out, broken. Not reported, like anything else of that
    /// connection, after [`Action::Refuse`] or [`Action::CloseLink`] ended it here.
    SessionFailed {
        /// Why, for the operator.
        text: String,
    },
    /// The same, by the peer's refusal.
    PeerRefused(Refuse),
    /// Outside of any conversation: an attempt to reach the peer, or a question whether it would have a session, ended so.
    NoContact(Obstacle),
    /// An attempt to reach the peer succeeded.
    Contact {
        /// It was asked, and would have a session.
        willing: bool,
    },
    /// The session's link is gone, once for each [`Action::StartSession`], also after [`Action::CloseLink`]. On a target:
    /// everything that arrived whole has been applied; [`Event::Settled`] follows.
    LinkDown {
        /// Why, for the operator.
        reason: String,
        /// Some write is in flight, or not confirmed durable by the peer.
        undurable: bool,
        /// The dirty bitmap is not empty.
        dirty: bool,
        /// What this end knows of the session, where it may go on over another link.
        parted: Option<Parted>,
    },
    /// From here on this node leaves the session's link for another one on purpose, or no longer does. Both nodes have the
    /// new connection already; the session goes on over it, and there is nothing to tell an operator.
    LinkChanges(bool),
    /// What a target had applied when its session ended is on stable storage. It may take as long as a flush does, and
    /// a promotion does not wait for it: until then the disk is a clean prefix unless this node loses power.
    Settled,
    /// A write came, there is no peer, and we have not gone alone on record.
    NeedAlone,
    /// As source: every block was copied and the target confirmed it durable.
    ResyncDone,
    /// A verification ended, or could not begin. What it found and did not repair is marked in the dirty bitmap.
    Verified(Box<Verified>),
    /// As target: bytes that the source announced are others here. Also during a copy, where that is nothing special.
    FoundDifferent,
    /// A control frame from the peer; all changes that it sent before are applied, and flushed where it said so.
    PeerMessage {
        /// One of [`code`].
        code: u64,
        /// What it says.
        arg: u64,
    },
    /// A command.
    Operator {
        /// To be given back with the reply.
        id: ReplyId,
        /// Which.
        command: Command,
    },
    /// What [`Action::Quiesce`] asked for is done: nothing is in flight and both sides flushed.
    Quiesced,
    /// The local disk failed while this node serves from it and the peer is in sync; clients are held until
    /// [`Action::Detach`]. [`Event::DiskFailed`] follows if that comes too late.
    DiskFailing {
        /// What it said.
        text: String,
    },
    /// The local disk, or its metadata, reported an error; nothing is served from it any more. Also after
    /// [`Action::Detach`], when the session has ended.
    DiskFailed {
        /// What it said.
        text: String,
    },
    /// The daemon wants to end; see [`Action::ShutdownComplete`].
    Shutdown,
    /// Time passed. At least once a second while anything waits.
    Tick,
}

/// This node's part in a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionSide {
    /// Sends changes.
    Source {
        /// Copy in the background what either map has.
        resync: bool,
    },
    /// Applies changes.
    Target {
        /// Tell the source what our map has, and forget it once that is on record there.
        resync: bool,
    },
}

/// How loud a log line is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// For the record.
    Info,
    /// Wants an operator's eye.
    Warn,
    /// Something is lost or refused until an operator acts.
    Error,
}

/// What the driver has to do, in order.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Make this the stored superblock, durably, before the next action.
    StoreMetadata(Box<Superblock>),
    /// The same for a disk that has failed, whose metadata may have failed with it: nothing rests on it.
    TryStoreMetadata(Box<Superblock>),
    /// Go on serving without the disk, over the peer's.
    Detach,
    /// Mark the whole disk as differing from the peer's, durably, before the next action. Never during a session. A
    /// failure is one of a store.
    MarkAll,
    /// Dial the peer now, and from here on again and again while there is no session, until [`Action::StopDialing`].
    Dial,
    /// Stop that.
    StopDialing,
    /// Answer on the connection of the last hello; it becomes the link once the peer says the same.
    SendReady(Ready),
    /// Answer on the connection of the last hello, and close it.
    Refuse(Refuse),
    /// Hand the connection to the datapath. A node that serves already goes on serving over it.
    StartSession {
        /// This node's part.
        side: SessionSide,
        /// How it stands to the session before.
        before: Before,
        /// Serve clients (from now on, or still).
        serve: bool,
        /// Fencing number of the session's frames.
        epoch: Epoch,
    },
    /// As target: accept frames of this epoch and refuse those of an older one from now on.
    AdoptEpoch(Epoch),
    /// Admit clients; in a session, become its source.
    Serve {
        /// Fencing number of what is served.
        epoch: Epoch,
    },
    /// Fail what clients still ask and admit nothing; in a session, become its target unless a copy is under way
    /// ([`Event::ResyncDone`] not reported yet). Comes again, to one that does not serve, when its copy has ended.
    StopServing,
    /// Writes may be acknowledged without the peer, from the one that waits for it on.
    GoAlone,
    /// Close the session's link, or the connection that waits for its `Ready`.
    CloseLink,
    /// Send a control frame.
    SendPeer {
        /// One of [`code`].
        code: u64,
        /// What it says.
        arg: u64,
    },
    /// Compare the peer's disk with this one, then report [`Event::Verified`].
    Verify {
        /// Copy what differs.
        repair: bool,
    },
    /// Let that end early.
    StopVerify,
    /// Admit nothing new, finish what is in flight, flush both sides, then report [`Event::Quiesced`].
    Quiesce,
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
    /// The volume is at rest and its metadata says so as far as it is true.
    ShutdownComplete,
}

/// What the configuration says about the volume on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSettings {
    /// The configuration file, as the texts name it that suggest a command.
    pub config: String,
    /// The volume's name.
    pub volume: String,
    /// This node's name.
    pub node: String,
    /// The other node's name.
    pub peer: String,
    /// Whether the volume starts here.
    pub configured_primary: bool,
    /// What to do with writes when the peer is gone.
    pub on_peer_loss: OnPeerLoss,
    /// What an acknowledged write promises.
    pub ack: AckLevel,
    /// How long a peer may be silent before clients are served without it.
    pub peer_timeout: Duration,
}

impl VolumeSettings {
    /// How a text names a command about the volume.
    #[must_use]
    pub fn commands(&self) -> Commands<'_> {
        let Self { config, volume, node, peer, .. } = self;
        Commands { config, volume, node, peer }
    }
}

/// What was found when the disk was opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// What its metadata says.
    pub superblock: Superblock,
    /// Its dirty bitmap is not empty, what a crash left in the activity log included.
    pub dirty: bool,
    /// The kernel's boot, see [`Superblock::boot`].
    pub boot: [u8; 16],
}

/// A giver of random numbers, so that tests repeat.
pub type Random = Box<dyn FnMut() -> u64 + Send>;

struct Promotion {
    /// `None` where nobody asked for it: a node that was primary resumes.
    id: Option<ReplyId>,
    epoch: Epoch,
    deadline: Duration,
}

struct Demotion {
    id: ReplyId,
    deadline: Duration,
}

/// An agreement that waits for the peer's `Ready`.
struct Pending {
    ready: Ready,
    peer: View,
    /// Names the session: the nonces of both hellos, the smaller name's first.
    session: [u64; 2],
    /// The peer's.
    incarnation: u64,
}

/// The peer, during a session.
struct Peer {
    view: View,
    primary: bool,
    /// It serves from this node's disk, its own having failed.
    diskless: bool,
}

/// The controller. See the module's doc.
pub struct VolumeController {
    settings: VolumeSettings,
    superblock: Superblock,
    /// The kernel's boot.
    boot: [u8; 16],
    /// The dirty bitmap may not be empty.
    dirty: bool,
    /// The disk lost what the daemon before this one had not flushed, and nothing made up for it yet.
    lost_power: bool,
    random: Random,
    proposed: Lineage,
    role: Role,
    connection: Connection,
    /// The view our last hello carried: what a peer's decision rests on.
    offered: Option<View>,
    /// That hello's nonce.
    nonce: u64,
    /// Random, for this daemon's life.
    incarnation: u64,
    /// The peer's, as of the last session.
    peer_incarnation: Option<u64>,
    /// The present session or the last one, and the generation it is about.
    session: Option<([u64; 2], Generation)>,
    /// The session whose link broke, as long as nothing has undone what is known of it.
    recall: Option<Recall>,
    pending: Option<Pending>,
    /// From `StartSession` to `LinkDown`; it may outlast the connection's states while a link is closing.
    peer: Option<Peer>,
    /// This daemon has been primary, so the stored `primary` flag is its own and not a crashed one's.
    served: bool,
    /// Writes may be acknowledged without the peer.
    alone: bool,
    /// A frozen primary's disk holds writes the peer may lack.
    undurable: bool,
    /// A target's session ended, and what it had applied is being flushed.
    settling: bool,
    /// The link is being left for another one that is there already.
    link_changes: bool,
    /// A write waits to go alone until the handshake under way has ended.
    need_alone: Option<Duration>,
    /// The map has everything, on record, and no session took anything off it since.
    all_marked: bool,
    /// When to ask for promotion next: this node was primary and has what it lacked.
    resume_at: Option<Duration>,
    /// The session ends so that the disk can be given up; who waits for that.
    invalidating: Option<ReplyId>,
    promotion: Option<Promotion>,
    demotion: Option<Demotion>,
    /// A demotion that is done, and whose news is on its way to the peer.
    demoted: Option<Demotion>,
    shutdown_deadline: Option<Duration>,
    /// Why there is no session although the peer is there, by this node's own judgement.
    refusal: Option<String>,
    /// Why there is none although this node looks for the peer.
    obstacle: Option<Obstacle>,
    /// The last hello showed a split brain, or a peer that serves although this node went on without it: giving up this
    /// disk's data leads to a session.
    split_brain: bool,
    /// By the last hello the peer went on without this node, which serves: an operator's `demote` makes room for its data.
    overtaken: bool,
    /// The disk or its metadata failed since this daemon opened them; only the next start opens them anew.
    medium_failed: bool,
    /// The disk failed while this node served, and the peer's stands in for it.
    diskless: diskless::Diskless,
    verification: Verification,
    /// In this session something was found to differ, and is marked.
    unrepaired: bool,
}

impl VolumeController {
    /// The controller of a volume whose disk is as `found`. Nothing happens before [`Event::Start`].
    #[must_use]
    pub fn new(settings: VolumeSettings, found: Found, mut random: Random) -> Self {
        let Found { superblock, dirty, boot } = found;
        let proposed = propose(&mut random);
        let incarnation = random();
        // What was not flushed when the machine went down is lost; the end of a process alone loses nothing.
        let in_use = (superblock.primary || superblock.applying) && !superblock.clean;
        let lost_power = in_use && superblock.boot != boot;
        Self {
            settings,
            superblock,
            boot,
            dirty,
            lost_power,
            random,
            proposed,
            role: Role::Standby,
            connection: Connection::Connecting,
            offered: None,
            nonce: 0,
            incarnation,
            peer_incarnation: None,
            session: None,
            recall: None,
            pending: None,
            peer: None,
            served: false,
            alone: false,
            undurable: false,
            settling: false,
            need_alone: None,
            all_marked: false,
            resume_at: None,
            invalidating: None,
            promotion: None,
            demotion: None,
            demoted: None,
            shutdown_deadline: None,
            refusal: None,
            obstacle: None,
            split_brain: false,
            overtaken: false,
            medium_failed: false,
            diskless: diskless::Diskless::default(),
            verification: Verification::default(),
            link_changes: false,
            unrepaired: false,
        }
    }

    /// What to say first on a new connection. The peer decides on it, so a later change here makes this node refuse
    /// that connection's hello; one hello at a time.
    pub fn hello(&mut self, ring_len: u64, links: &[&str]) -> Hello {
        let view = self.view();
        self.offered = Some(view);
        self.nonce = (self.random)();
        Hello {
            node: self.settings.node.clone(),
            volume: self.settings.volume.clone(),
            ring_len,
            links: links.iter().map(|&link| link.to_owned()).collect(),
            nonce: self.nonce,
            incarnation: self.incarnation,
            rdma: None,
            no_rdma: None,
            settings: Settings::new(),
            view,
        }
    }

    /// Whether the session would go on unharmed over another link: nothing is under way that a broken link ends.
    #[must_use]
    pub fn may_change_link(&self) -> bool {
        self.in_session()
            && matches!(self.role, Role::Primary | Role::Standby)
            && self.pending.is_none()
            && self.promotion.is_none()
            && self.demoted.is_none()
            && self.invalidating.is_none()
            && self.shutdown_deadline.is_none()
            && !self.verification.running
            && !self.unrepaired
            && (self.diskless.text().is_none() || self.diskless.is_gone())
    }

    /// Whether this node serves from its peer's disk.
    #[must_use]
    pub fn is_diskless(&self) -> bool {
        self.diskless.text().is_some()
    }

    /// Takes one event and appends what is to be done. `now` counts from any fixed moment and never goes back.
    pub fn handle(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Start => self.dial(actions),
            Event::HelloReceived(hello) => self.on_hello(&hello, actions),
            Event::SessionReady(ready) => self.on_ready(ready, actions),
            Event::SessionFailed { text } => self.on_session_failed(Obstacle::Failed { text }, actions),
            Event::PeerRefused(refuse) => self.on_session_failed(Obstacle::Refused(refuse), actions),
            Event::NoContact(obstacle) => self.on_obstacle(obstacle, actions),
            Event::Contact { willing } => self.on_contact(willing, actions),
            Event::LinkDown { reason, undurable, dirty, parted } => {
                self.on_link_down(&reason, undurable, dirty, parted, actions);
            }
            Event::LinkChanges(on_purpose) => self.link_changes = on_purpose,
            Event::Settled => self.on_settled(actions),
            Event::NeedAlone => self.on_need_alone(now, actions),
            Event::ResyncDone => self.on_resync_done(actions),
            Event::Verified(outcome) => self.on_verified(*outcome, actions),
            Event::FoundDifferent => self.on_found_different(actions),
            Event::PeerMessage { code, arg } => self.on_peer_message(now, code, arg, actions),
            Event::Operator { id, command } => self.on_command(now, id, command, actions),
            Event::Quiesced => self.on_quiesced(now, actions),
            Event::DiskFailing { text } => self.on_disk_failing(text, actions),
            Event::DiskFailed { text } => self.on_disk_failed(&text, actions),
            Event::Shutdown => self.on_shutdown(now, actions),
            Event::Tick => self.on_tick(now, actions),
        }
    }

    /// The superblock as last handed to [`Action::StoreMetadata`].
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    fn view(&self) -> View {
        let superblock = &self.superblock;
        let serves = matches!(self.role, Role::Primary | Role::Demoting);
        View {
            volume_id: superblock.volume_id,
            size: superblock.size,
            epoch: superblock.epoch,
            generations: superblock.generations,
            disk_state: superblock.disk_state,
            zeroed: superblock.zeroed,
            was_primary: superblock.primary,
            // A primary flag without a serving role is left from the daemon before this one.
            was_primary_unclean: self.undurable || (superblock.primary && !superblock.clean && !serves),
            applying_unclean: self.is_torn(),
            lost_power: self.lost_power && self.settings.ack != AckLevel::Async,
            dirty: self.dirty,
            copying: superblock.copying,
            sessions_offered: superblock.sessions_offered,
            sessions_begun: superblock.sessions_begun,
            role: if serves { ServingRole::Primary } else { ServingRole::Standby },
            configured_primary: self.settings.configured_primary,
            proposed: self.proposed,
            recall: self.recall,
        }
    }

    /// The daemon before this one stopped while applying, or before what it had applied was durable.
    fn is_torn(&self) -> bool {
        self.superblock.applying && self.peer.is_none() && !self.settling
    }

    fn is_usable(&self) -> bool {
        self.superblock.disk_state == DiskState::UpToDate
            && !self.superblock.is_fresh()
            && !self.is_torn()
            && !self.may_lack_writes()
    }

    /// The machine lost power while this node was primary, and the peer may have acknowledged writes that were not
    /// flushed here.
    fn may_lack_writes(&self) -> bool {
        let superblock = &self.superblock;
        self.view().lost_power && superblock.primary && superblock.peer_has_current && self.peer.is_none()
    }

    fn set_role(&mut self, to: Role) {
        assert!(ROLE_EDGES.contains(&(self.role, to)), "role from {:?} to {to:?}", self.role);
        self.role = to;
        self.served |= to == Role::Primary;
    }

    fn set_connection(&mut self, to: Connection) {
        let from = self.connection;
        assert!(CONNECTION_EDGES.contains(&(from, to)), "connection from {from:?} to {to:?}");
        self.connection = to;
    }

    fn store(&mut self, actions: &mut Vec<Action>) {
        // What an earlier boot lost stays on record until it is made up for.
        if (self.superblock.primary || self.superblock.applying) && !self.lost_power {
            self.superblock.boot = self.boot;
        }
        let superblock = Box::new(self.superblock.clone());
        actions.push(if self.diskless.text().is_some() {
            Action::TryStoreMetadata(superblock)
        } else {
            Action::StoreMetadata(superblock)
        });
    }

    /// Starts a generation that no peer has. The caller stores it.
    fn advance_generation(&mut self) {
        let next = loop {
            let next = Generation((self.random)());
            if next != Generation::ZERO && next != self.superblock.generations.current {
                break next;
            }
        };
        let peer_has_current = std::mem::take(&mut self.superblock.peer_has_current);
        self.superblock.generations.advance(next, peer_has_current);
    }

    fn dial(&self, actions: &mut Vec<Action>) {
        // One dials and the other accepts, so that two connections never cross.
        if self.settings.node < self.settings.peer {
            actions.push(Action::Dial);
        }
    }

    fn log(&self, level: Level, text: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Log { level, text: format!("volume {}: {text}", self.settings.volume) });
    }

    /// How a text names a command about the volume.
    #[must_use]
    pub fn commands(&self) -> Commands<'_> {
        self.settings.commands()
    }

    fn here(&self, command: &str) -> String {
        self.commands().here(command)
    }

    fn there(&self, command: &str) -> String {
        self.commands().there(command)
    }

    fn reply(&self, id: ReplyId, result: Result<String, String>, actions: &mut Vec<Action>) {
        let name = |text: String| format!("volume {}: {text}", self.settings.volume);
        actions.push(Action::Reply { id, result: result.map(name).map_err(name) });
    }

    fn refuse(&self, code: RefuseCode, text: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Refuse(Refuse { code, text: text.to_owned() }));
    }
}

fn propose(random: &mut Random) -> Lineage {
    let mut volume_id = [0; 16];
    volume_id[..8].copy_from_slice(&random().to_le_bytes());
    volume_id[8..].copy_from_slice(&random().to_le_bytes());
    // The one value that means "none" is as likely as a hit by lightning; the bit keeps even a broken giver from it.
    volume_id[6] |= 0x40;
    Lineage { volume_id, generation: random().max(1) }
}

/// The lineage both nodes hold, or will hold, after `agreement`.
fn lineage_of(agreement: &Agreement, mine: &View, theirs: &View) -> Lineage {
    use crate::generation::{Side, Verdict, Why};
    if let (Some(_), Some(recall)) = (agreement.goes_on, mine.recall) {
        return Lineage { volume_id: mine.volume_id, generation: recall.generation };
    }
    let source = match agreement.verdict {
        Verdict::InSync { adopt: Some(lineage) } => return lineage,
        Verdict::Resync { source: Side::Theirs, .. } => theirs,
        _ => mine,
    };
    match agreement.verdict {
        Verdict::Resync { why: Why::BothFresh, .. } => source.proposed,
        _ => Lineage { volume_id: source.volume_id, generation: source.generations.current.0 },
    }
}

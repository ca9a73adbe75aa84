//! Commands from control to the reactor, and events from the reactor to control.
//!
//! Commands come by channel with a ring of the reactor's bell; events go back by channel. A volume is named by its index:
//! those the reactor was made with come first, then those added since, in that order.

use crate::disk::image::DiskImage;
use crate::disk::record::Record;
use crate::front::queue::QueueServer;
use crate::transport::Link;
use crate::units::{AckLevel, Epoch, OnPeerLoss, Seq};
use crate::volume::Verified;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A volume as the reactor is given it. It serves nobody until told to.
#[derive(Debug)]
pub struct VolumeSpec {
    /// Export name.
    pub name: String,
    /// The open disk.
    pub disk: Arc<DiskImage>,
    /// What an acknowledgement promises.
    pub ack: AckLevel,
    /// What to do without the standby.
    pub on_peer_loss: OnPeerLoss,
    /// A background copy asks the peer first whether its bytes are others, and sends only those.
    pub checksum_first: bool,
    /// The disk's activity log and dirty bitmap.
    pub record: Record,
}

/// Which way changes go over a volume's session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From us: the peer applies what we post. With `resync` what either dirty bitmap has is copied in the background.
    Source {
        /// The peer is not UpToDate.
        resync: bool,
    },
    /// To us.
    Target {
        /// We are not UpToDate: the source is told our dirty bitmap first, and we forget it once the source has it on record.
        resync: bool,
    },
    /// Neither yet: both are standby.
    Idle,
}

/// What both nodes still know, when a session begins, of the one before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// Nothing that counts: whatever is on record as possibly different may differ.
    Unknown,
    /// The peer has what it had applied in it, as no daemon ended since; but changes were made without it. Only a source
    /// is told so.
    Kept {
        /// The target had applied up to here, and nothing else.
        applied: Seq,
    },
    /// All: the session goes on over this link.
    GoesOn {
        /// The target has applied up to here, and nothing else.
        applied: Seq,
        /// The source has heard all of the target's map, where that is told.
        map_told: bool,
    },
}

/// What one end of a session knows when its link broke and it may go on over another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parted {
    /// This node is the source.
    pub source: bool,
    /// The session's epoch.
    pub epoch: Epoch,
    /// Source: the target has acknowledged that it applied up to here. Target: it has applied up to here.
    pub applied: Seq,
    /// Source: the last change that the target may have. Target: the same as `applied`.
    pub numbered: Seq,
    /// Source: the target has told all of its map.
    pub map_told: bool,
}

/// What control tells the reactor.
pub enum Command {
    /// One more volume, whose index is the next one. From [`ReactorHandle::add_volume`](super::ReactorHandle::add_volume)
    /// only, which counts them.
    AddVolume {
        /// What it is.
        spec: Box<VolumeSpec>,
        /// What control reads of it.
        counters: Arc<VolumeCounters>,
    },
    /// What NBD clients are told who ask for an export that is none of the reactor's volumes. A volume of that name that is
    /// added takes its place.
    Absent {
        /// The export.
        name: String,
        /// Why it is not served.
        text: String,
    },
    /// One more socket on which NBD clients come: bound, listening, non-blocking. It stays for good.
    Listen {
        /// The socket.
        listener: OwnedFd,
    },
    /// A session is agreed; the link is handed over.
    Session {
        /// Index of the volume.
        volume: usize,
        /// How it stands to the session before.
        before: Before,
        /// The link, connected.
        link: Box<dyn Link>,
        /// Which way.
        direction: Direction,
        /// The epoch both agreed on.
        epoch: Epoch,
    },
    /// The roles changed over a live session.
    Direct {
        /// Index of the volume.
        volume: usize,
        /// Which way from now on.
        direction: Direction,
        /// The epoch both agreed on.
        epoch: Epoch,
    },
    /// End the session; an [`Event::LinkDown`] follows if there was one.
    CloseLink {
        /// Index of the volume.
        volume: usize,
        /// For the log.
        reason: &'static str,
    },
    /// Serve clients.
    Serve {
        /// Index of the volume.
        volume: usize,
    },
    /// Stop serving at once: what is under way fails, clients are disconnected.
    StopServing {
        /// Index of the volume.
        volume: usize,
    },
    /// What clients are told while the volume is not served.
    Refusal {
        /// Index of the volume.
        volume: usize,
        /// Why it is not served here, and where it is.
        text: String,
    },
    /// The peer's absence is on durable record.
    GoAlone {
        /// Index of the volume.
        volume: usize,
    },
    /// The peer is UpToDate, on record.
    PeerInSync {
        /// Index of the volume.
        volume: usize,
    },
    /// Mark the whole disk dirty, on record. No session may be up.
    MarkAll {
        /// Index of the volume.
        volume: usize,
        /// Called on the reactor's thread when it is on stable storage, or with why it is not.
        done: Box<dyn FnOnce(Result<(), String>) + Send>,
    },
    /// The peer has on record that this node's disk is behind: go on without it, over the peer's. In answer to
    /// [`Event::DiskFailing`].
    Detach {
        /// Index of the volume.
        volume: usize,
    },
    /// Compare the peer's disk with this one; [`Event::Verified`] follows.
    Verify {
        /// Index of the volume.
        volume: usize,
        /// Copy what differs.
        repair: bool,
    },
    /// End the verification under way, if one is.
    StopVerify {
        /// Index of the volume.
        volume: usize,
    },
    /// A message to the peer's control.
    SendPeer {
        /// Index of the volume.
        volume: usize,
        /// What it is.
        code: u64,
        /// Its argument.
        arg: u64,
    },
    /// Admit nothing more, finish what is under way, flush both sides; [`Event::Quiesced`] follows.
    Quiesce {
        /// Index of the volume.
        volume: usize,
    },
    /// A new in-process client of a volume.
    Attach {
        /// Index of the volume.
        volume: usize,
        /// The reactor's end of its queues.
        queue: QueueServer,
    },
    /// End the loop.
    Shutdown,
}

/// What the reactor tells control.
#[derive(Debug)]
pub enum Event {
    /// The session ended. Whatever it had delivered whole is applied; nothing more will be.
    LinkDown {
        /// Index of the volume.
        volume: usize,
        /// Why.
        reason: String,
        /// We were the source, and the peer had not confirmed everything as durable.
        undurable: bool,
        /// The dirty bitmap is not empty.
        dirty: bool,
        /// Some change got through over its link.
        moved: bool,
        /// Anything at all came from the peer over it.
        heard: bool,
        /// What is known of it, if it may go on over another link.
        parted: Option<Parted>,
    },
    /// What was applied in a target's session that has ended is on stable storage.
    Settled {
        /// Index of the volume.
        volume: usize,
    },
    /// A change waits and there is no peer.
    AskAlone {
        /// Index of the volume.
        volume: usize,
    },
    /// The background copy is applied and durable on the peer.
    ResyncDone {
        /// Index of the volume.
        volume: usize,
    },
    /// A verification ended, or could not begin. What differs and was not repaired is marked in the dirty bitmap.
    Verified {
        /// Index of the volume.
        volume: usize,
        /// What came of it, or why nothing did.
        outcome: Verified,
    },
    /// As target: bytes that the source announced are others here, on a disk that may be in sync. Comes for each step.
    FoundDifferent {
        /// Index of the volume.
        volume: usize,
    },
    /// The peer's control says something.
    PeerMessage {
        /// Index of the volume.
        volume: usize,
        /// What it is.
        code: u64,
        /// Its argument.
        arg: u64,
    },
    /// The disk of a volume that is served failed, while the peer is in sync. Requests are held until
    /// [`Command::Detach`]; [`Event::DiskFailed`] follows if that does not come in time, or the session ends, also after
    /// it.
    DiskFailing {
        /// Index of the volume.
        volume: usize,
        /// How.
        error: String,
    },
    /// The local disk failed; every request on it fails from now on.
    DiskFailed {
        /// Index of the volume.
        volume: usize,
        /// How.
        error: String,
    },
    /// Nothing is under way and both sides are flushed.
    Quiesced {
        /// Index of the volume.
        volume: usize,
    },
    /// The loop ended.
    Stopped,
}

/// What control may read of a volume at any time, without asking the reactor.
#[derive(Debug, Default)]
pub struct VolumeCounters {
    /// Bytes the peer may lack.
    pub dirty_bytes: AtomicU64,
    /// Changes and flushes under way.
    pub in_flight: AtomicU64,
    /// Percent of the background copy times 100; meaningless without one.
    pub resync_percent_x100: AtomicU64,
    /// A background copy is under way.
    pub resyncing: AtomicBool,
    /// A verification is under way.
    pub verifying: AtomicBool,
    /// Percent of the disk that it, or the last one, has compared, times 100.
    pub verify_percent_x100: AtomicU64,
    /// Bytes that it, or the last one, found to differ.
    pub verify_differing_bytes: AtomicU64,
    /// Completions wait for an absent peer.
    pub frozen: AtomicBool,
    /// Changes completed towards clients.
    pub changes_done: AtomicU64,
    /// Reads answered by the peer's disk.
    pub reads_fetched: AtomicU64,
    /// Changes applied for the peer.
    pub changes_applied: AtomicU64,
    /// Links closed because the peer broke the protocol.
    pub violations: AtomicU64,
    /// Bytes that the background copy under way, or the last one, set out to copy.
    pub resync_total_bytes: AtomicU64,
    /// Bytes of them that the peer has applied.
    pub resync_done_bytes: AtomicU64,
    /// Bytes of payload posted to the peer, the background copy's included.
    pub bytes_posted: AtomicU64,
    /// Bytes of payload that the background copy posted.
    pub resync_bytes_posted: AtomicU64,
}

impl VolumeCounters {
    /// Payload went to the peer.
    pub(crate) fn posted(&self, bytes: u64, by_copy: bool) {
        self.bytes_posted.fetch_add(bytes, Ordering::Relaxed);
        if by_copy {
            self.resync_bytes_posted.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

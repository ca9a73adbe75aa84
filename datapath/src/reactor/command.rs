//! What control tells the reactor. What the reactor tells control stands in [`crate::volume::interface`], and is exported again
//! here.
//!
//! Commands come by channel with a ring of the reactor's bell; events go back by channel. A volume is named by its index:
//! those the reactor was made with come first, then those added since, in that order.

use crate::front::queue::QueueServer;
use crate::transport::Link;
use crate::units::Epoch;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use crate::volume::interface::{Before, Direction, Event, Parted, VolumeCounters, VolumeSpec};

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

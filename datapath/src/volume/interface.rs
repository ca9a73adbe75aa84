//! What a volume takes and tells: its specification, the requests of front ends and the notices they get, the sessions that
//! control hands over and the events it hears, and the counters it reads.
//!
//! The reactor, the front ends and [`Volume`] all import these types; this file imports none of them.

use crate::disk::image::DiskImage;
use crate::disk::record::Record;
use crate::error::IoError;
use crate::mirror::verify::Findings;
use crate::units::{AckLevel, ByteRange, Epoch, OnPeerLoss, Seq, Token};
use crate::wire::Kind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(doc)]
use super::Volume;

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

/// Who made a request, and so who hears of its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// An NBD connection of the reactor (index and serial) and its cookie.
    Nbd {
        /// Index of the connection.
        connection: u32,
        /// Tells it from an earlier one at the same index.
        serial: u32,
        /// The client's handle.
        cookie: u64,
    },
    /// An in-process queue of the reactor.
    Queue {
        /// Index of the queue.
        queue: u32,
        /// Place of the operation in the queue's table.
        slot: u32,
    },
    /// A step of the background copy number `serial`.
    Resync {
        /// Tells its steps from an earlier copy's.
        serial: u64,
    },
    /// A flush for the background copy number `serial`.
    ResyncFlush {
        /// Tells it from an earlier copy's, which must not vouch for this one.
        serial: u64,
    },
    /// A step of the verification number `serial`.
    Verify {
        /// Tells its steps from an earlier one's.
        serial: u64,
    },
    /// The flush of the checkpoint number `serial`.
    Checkpoint {
        /// As the record numbered it.
        serial: u64,
    },
    /// The flush that ends a quiesce.
    Quiesce,
    /// A client that is gone.
    Nobody,
}

impl Origin {
    /// A step that no client asked for.
    pub(super) fn is_background(self) -> bool {
        matches!(self, Self::Resync { .. } | Self::Verify { .. })
    }
}

/// What a front end gets to hear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// A request that waited may go on, as after [`Begin::Go`].
    Granted {
        /// Whose.
        origin: Origin,
        /// Its token.
        token: Token,
    },
    /// A request ended. Its token is void.
    Done {
        /// Whose.
        origin: Origin,
        /// How.
        result: Result<(), IoError>,
    },
    /// A slow reader's reply stands in the way of a change: copy the rest of it out and unpin.
    Unpin {
        /// The token that pins.
        token: Token,
    },
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Look at the range.
    Read,
    /// Change it: `Write`, `WriteZeroes` or `Trim`.
    Change(Kind),
    /// Everything acknowledged before is to be on stable storage.
    Flush,
}

/// A checked request of a front end: its range fits the volume and is not empty (but for a flush).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewRequest {
    /// Who hears of it.
    pub origin: Origin,
    /// What.
    pub op: Op,
    /// Where.
    pub range: ByteRange,
    /// Complete only when durable on every in-sync replica.
    pub fua: bool,
}

/// Answer to [`Volume::begin`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Begin {
    /// Read: the range may be read now; end with [`Volume::read_done`]. Write: put the payload into the range, then
    /// call [`Volume::landed`]. Other: nothing to do but wait for the notice.
    Go(Token),
    /// A [`Notice::Granted`] follows, to be treated as `Go`.
    Waits(Token),
    /// No room; try again after the next completion and take no further requests until then.
    Full,
    /// Refused at once; no notice follows.
    Failed(IoError),
}

/// What became of a verification.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    /// What it compared, and what differed.
    pub findings: Findings,
    /// What differed is equal now, and durable on both nodes.
    pub repaired: bool,
    /// Why it did not come to its end, or could not begin.
    pub unfinished: Option<String>,
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
    /// [`Volume::detach`]; [`Event::DiskFailed`] follows if that does not come in time, or the session ends, also after
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
    /// A verification of a disk of `size` bytes has come so far.
    pub(super) fn compared(&self, findings: &Findings, size: u64) {
        let percent = u128::from(findings.compared) * 10_000 / u128::from(size);
        let percent = u64::try_from(percent).expect("10,000 at most");
        self.verify_percent_x100.store(percent, Ordering::Relaxed);
        self.verify_differing_bytes.store(findings.differing, Ordering::Relaxed);
    }

    /// Payload went to the peer.
    pub(crate) fn posted(&self, bytes: u64, by_copy: bool) {
        self.bytes_posted.fetch_add(bytes, Ordering::Relaxed);
        if by_copy {
            self.resync_bytes_posted.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

//! What can go wrong in the datapath, by kind.

use crate::units::{ByteRange, Epoch, Seq};

/// A well-formed frame that breaks the protocol. It closes its link and is counted; nothing else is hurt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// The sender was fenced, or we were.
    #[error("frame of epoch {found}, ours is {ours}: the sender is not this volume's primary any more")]
    Epoch {
        /// As sent.
        found: Epoch,
        /// What this node holds.
        ours: Epoch,
    },
    /// A change out of order.
    #[error("change with seq {found} where {expected} was due")]
    SeqOrder {
        /// As sent.
        found: Seq,
        /// The one that was due.
        expected: Seq,
    },
    /// An ack of something never sent.
    #[error("ack up to seq {found}, but only {sent} was sent")]
    AckFromTheFuture {
        /// As sent.
        found: Seq,
        /// The last one sent.
        sent: Seq,
    },
    /// An ack that takes back an earlier one, or is durable past what is applied.
    #[error("ack went back to seq {found} after {before}")]
    AckWentBack {
        /// As sent.
        found: Seq,
        /// Acked before.
        before: Seq,
    },
    /// A range outside the volume.
    #[error("change of bytes {range}, the volume has {size}")]
    OutOfVolume {
        /// As sent.
        range: ByteRange,
        /// Bytes of the volume.
        size: u64,
    },
    /// The payload does not match its checksum.
    #[error(
        "payload of seq {seq} has checksum {computed:#010x}, the header says {announced:#010x}: damaged in transit"
    )]
    PayloadChecksum {
        /// Of the frame.
        seq: Seq,
        /// By the header.
        announced: u32,
        /// Over the bytes that arrived.
        computed: u32,
    },
    /// A frame that only the other role sends.
    #[error("{what} from a peer that is not {role} of this volume")]
    Role {
        /// The frame.
        what: &'static str,
        /// Who may send it.
        role: &'static str,
    },
    /// More reads asked for than a peer without a disk has under way.
    #[error(
        "{} reads asked for and not answered yet: no peer has more under way",
        crate::limits::READS_OWED_MAX
    )]
    TooManyReads,
    /// An answer to a read that was not asked for, or not in its turn.
    #[error("bytes {range} in answer to read number {id}, which is not the one that is due")]
    Reply {
        /// The read's number, as sent.
        id: u64,
        /// As sent.
        range: ByteRange,
    },
    /// More ring space returned than was ever used, or less than before.
    #[error(
        "peer returned {found} bytes of ring space in all, {sent} were used and {before} returned before"
    )]
    RingReturned {
        /// As sent.
        found: u64,
        /// Used so far.
        sent: u64,
        /// Returned before.
        before: u64,
    },
    /// A frame larger than the ring has room for: the peer ignored its permits.
    #[error("frame of {frame_len} bytes overruns the ring: the peer posts without permits")]
    RingOverrun {
        /// Bytes of the frame.
        frame_len: usize,
    },
    /// A piece of a dirty bitmap that cannot be one, or that nobody asked for.
    #[error("{what} (bytes {range}): the nodes do not agree on what may differ between their disks")]
    DirtyBitmap {
        /// What was wrong.
        what: &'static str,
        /// As sent.
        range: ByteRange,
    },
    /// More receives returned than were ever used, or less than before: the count goes round, so the two look alike.
    #[error(
        "peer returned {found} receives in all (modulo 2^32), {used} were used and {before} returned before"
    )]
    ReceivesReturned {
        /// As sent, modulo 2^32.
        found: u32,
        /// Used so far.
        used: u64,
        /// Returned before.
        before: u64,
    },
    /// A change somewhere else in the ring than where the last one ended.
    #[error("change at byte {found} of the ring where {expected} was due: repeated, lost or misplaced")]
    Place {
        /// What the peer's number stands for.
        found: u64,
        /// The place that was due.
        expected: u64,
    },
    /// A change that came as a message, or a message that came as a change.
    #[error("{kind:?} came {how}: the peer mixes up changes and messages")]
    Carrier {
        /// Kind of the frame.
        kind: crate::wire::Kind,
        /// How it came.
        how: &'static str,
    },
    /// A message that is no header.
    #[error("message of {found} bytes, each has {}", crate::wire::HEADER_LEN)]
    MessageLength {
        /// Bytes of it.
        found: u32,
    },
    /// A difference in what was not to be compared, or no longer.
    #[error("the peer reports that bytes {range} differ, for seq {seq}: no such comparison is under way")]
    Differs {
        /// As sent.
        seq: Seq,
        /// As sent.
        range: ByteRange,
    },
    /// The connection that only stands for the peer's life was used to say something.
    #[error("the peer sent bytes on a connection on which nothing may be sent after the hello")]
    Companion,
}

impl Violation {
    /// Bytes were damaged on their way, which says nothing about the peer.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::PayloadChecksum { .. })
    }
}

/// Why a request of a front end failed. Front ends translate it (NBD: `EIO`, `ESHUTDOWN`, `EINVAL`, `ENOSPC`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IoError {
    /// This node does not (or no longer) serve the volume.
    #[error("this node is not the volume's primary")]
    NotPrimary,
    /// The local disk failed.
    #[error("the disk failed")]
    DiskFailed,
    /// The request does not fit the volume or a limit.
    #[error("request out of range or over a limit")]
    Invalid,
    /// The disk is full.
    #[error("no space left on the disk")]
    NoSpace,
}

impl IoError {
    /// Whether the client's connection is to end instead of an answer: nothing is wrong with the request or the disk, only the
    /// place, so a client that reconnects repeats the request where the volume is served. To a file system an error is final.
    #[must_use]
    pub fn ends_connection(self) -> bool {
        matches!(self, Self::NotPrimary)
    }
}

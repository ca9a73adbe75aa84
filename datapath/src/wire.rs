//! The frame: what two nodes say to each other once a volume's link is up.
//!
//! A frame is a 64-byte header, then for [`Kind::Write`] and [`Kind::ReadReply`] a payload, padded to a multiple of 64
//! bytes so that every header in the ring is aligned. Everything is little-endian, versioned and checksummed;
//! `docs/PROTOCOL.md` shows the
//! dialogue. Decoding never panics and never trusts a field: it says which one was wrong.

use crate::limits::{PAYLOAD_LEN_MAX, VERIFY_LEN_MAX};
use crate::units::{ByteRange, Epoch, Seq};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use crate::limits::HEADER_LEN;

/// First bytes of every frame.
pub const MAGIC: [u8; 2] = *b"cS";

/// Version of the frame format; a peer of another version is refused at the hello.
pub const VERSION: u8 = 1;

/// What a frame asks or tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Put the payload at `range`. Data: takes ring space and has a seq.
    Write = 1,
    /// Make `range` read as zeros and keep it allocated. Has a seq, no payload.
    WriteZeroes = 2,
    /// Make `range` read as zeros and release its blocks. Has a seq, no payload.
    Trim = 3,
    /// Bring everything up to `seq` to stable storage and say so with an [`Kind::Ack`].
    Flush = 4,
    /// Cumulative: applied up to `seq`, durable up to `aux`.
    Ack = 5,
    /// Nothing but a sign of life (and ring space returned).
    KeepAlive = 6,
    /// A message between the two controllers: `aux` names it, `seq` is its argument. See `control`.
    Control = 7,
    /// Target to source, before a copy: `range` may differ. With `aux` not 0, `range` is 64 grains of the target's and bit
    /// n of `aux` (from the lowest) says that of grain n; the last ones may lie behind the disk's end, with their bits 0.
    Dirty = 9,
    /// That was all of it.
    DirtyEnd = 10,
    /// Source to target: all of it is on the source's record, and the target may forget it.
    DirtyKept = 11,
    /// Compare `range`: the sender's digest of it is `aux` and `payload_crc`, see [`crate::disk::digest`]. It takes its
    /// turn among the changes, changes nothing, and has no payload.
    Verify = 12,
    /// The bytes of `range` that the [`Kind::Verify`] numbered `seq` named are others here. Sent before the ack that
    /// covers it.
    Differs = 13,
    /// Send me the bytes of `range`: the sender serves without a disk of its own. `aux` numbers the question; the answer
    /// is one or more [`Kind::ReadReply`] in order.
    Read = 14,
    /// The payload is what stands at `range`, which continues the answer to the question `aux`. Takes ring space like a
    /// change, but has no seq and changes nothing.
    ReadReply = 15,
}

impl Kind {
    fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Write,
            2 => Self::WriteZeroes,
            3 => Self::Trim,
            4 => Self::Flush,
            5 => Self::Ack,
            6 => Self::KeepAlive,
            7 => Self::Control,
            9 => Self::Dirty,
            10 => Self::DirtyEnd,
            11 => Self::DirtyKept,
            12 => Self::Verify,
            13 => Self::Differs,
            14 => Self::Read,
            15 => Self::ReadReply,
            _ => return None,
        })
    }

    /// Whether the frame changes the disk, or looks at it in its turn among the changes: it then has a seq of its own and
    /// is applied in seq order.
    #[must_use]
    pub fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::WriteZeroes | Self::Trim | Self::Verify)
    }

    /// Whether the frame takes ring space, and so a permit.
    #[must_use]
    pub fn is_posted(self) -> bool {
        self.is_change() || self == Self::ReadReply
    }

    /// Whether `range.len` bytes of payload follow the header.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, Self::Write | Self::ReadReply)
    }
}

/// The flag bits of a header.
pub mod flags {
    /// The change must be durable on the peer before the request completes; the peer flushes unasked.
    pub const FUA: u8 = 1;
    /// The change is a step of the background copy, not a client's write.
    pub const RESYNC: u8 = 2;
    /// The change takes its place in the order and changes nothing: its bytes were lost with the sender's disk.
    pub const VOID: u8 = 4;
    /// All the bits that mean something.
    pub const ALL: u8 = FUA | RESYNC | VOID;
}

/// A decoded frame header. `payload_len` is `range.len` for [`Kind::Write`] and [`Kind::ReadReply`] and 0 for every other kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Fencing number the sender believes in.
    pub epoch: Epoch,
    /// Place in the write order, or what [`Kind`] says.
    pub seq: Seq,
    /// The bytes of the disk concerned; 0+0 where there are none.
    pub range: ByteRange,
    /// What [`Kind`] says.
    pub aux: u64,
    /// CRC-32C of the payload, or of what is to be compared; 0 where there is neither.
    pub payload_crc: u32,
    /// Filled in by the transport: bytes of the *receiver's peer's* ring released since the link came up.
    pub ring_returned: u64,
    /// Filled in by a transport that posts receives (RDMA), 0 on every other: receives consumed since the link came up,
    /// modulo 2^32.
    pub receives: u32,
}

impl Header {
    /// A header of `kind` with everything else zero.
    #[must_use]
    pub fn new(kind: Kind, epoch: Epoch) -> Self {
        Self {
            kind,
            flags: 0,
            epoch,
            seq: Seq::ZERO,
            range: ByteRange::new(0, 0),
            aux: 0,
            payload_crc: 0,
            ring_returned: 0,
            receives: 0,
        }
    }

    /// Bytes of payload that follow the header.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        if self.kind.has_payload() { usize::try_from(self.range.len).expect("64-bit") } else { 0 }
    }

    /// Bytes the whole frame takes in the ring: header, payload, padding.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        frame_len(self.payload_len())
    }

    /// The header as it goes on the wire, checksummed.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION,
            kind: self.kind as u8,
            flags: self.flags,
            reserved: [0; 3],
            epoch: self.epoch.0.into(),
            seq: self.seq.0.into(),
            start: self.range.start.into(),
            len: u32::try_from(self.range.len).expect("a frame's range is under 4 GiB").into(),
            payload_crc: self.payload_crc.into(),
            aux: self.aux.into(),
            ring_returned: self.ring_returned.into(),
            receives: self.receives.into(),
            header_crc: 0.into(),
        };
        raw.header_crc = crc32c::crc32c(&raw.as_bytes()[..CHECKED_LEN]).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Names the first field that is wrong. The checksum is looked at right after the magic number, so every later
    /// error is a peer that *means* something we do not accept.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(WireError::Magic { found: raw.magic });
        }
        let computed = crc32c::crc32c(&bytes[..CHECKED_LEN]);
        if raw.header_crc.get() != computed {
            return Err(WireError::HeaderChecksum { found: raw.header_crc.get(), computed });
        }
        if raw.version != VERSION {
            return Err(WireError::Version { found: raw.version });
        }
        let kind = Kind::from_wire(raw.kind).ok_or(WireError::Kind { found: raw.kind })?;
        if raw.flags & !flags::ALL != 0 || raw.reserved != [0; 3] {
            return Err(WireError::Flags { found: raw.flags });
        }
        let range = ByteRange::new(raw.start.get(), raw.len.get().into());
        let concerns_bytes = kind.is_posted() || matches!(kind, Kind::Read | Kind::Dirty);
        if concerns_bytes && (range.len == 0 || !range.fits(crate::limits::VOLUME_LEN_MAX)) {
            return Err(WireError::Range { range });
        }
        if (kind.has_payload() || kind == Kind::Read) && range.len > PAYLOAD_LEN_MAX.into() {
            return Err(WireError::Length { found: raw.len.get() });
        }
        if kind == Kind::Verify && range.len > VERIFY_LEN_MAX {
            return Err(WireError::VerifyLength { found: raw.len.get() });
        }
        Ok(Self {
            kind,
            flags: raw.flags,
            epoch: Epoch(raw.epoch.get()),
            seq: Seq(raw.seq.get()),
            range,
            aux: raw.aux.get(),
            payload_crc: raw.payload_crc.get(),
            ring_returned: raw.ring_returned.get(),
            receives: raw.receives.get(),
        })
    }
}

/// Bytes that a frame with `payload_len` bytes of payload takes in the ring.
#[must_use]
pub const fn frame_len(payload_len: usize) -> usize {
    HEADER_LEN + payload_len.next_multiple_of(HEADER_LEN)
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 2],
    version: u8,
    kind: u8,
    flags: u8,
    reserved: [u8; 3],
    epoch: U64,
    seq: U64,
    start: U64,
    len: U32,
    payload_crc: U32,
    aux: U64,
    ring_returned: U64,
    receives: U32,
    header_crc: U32,
}

const CHECKED_LEN: usize = HEADER_LEN - 4;
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// What was wrong with a frame header. The link it came over is closed: after one bad header nothing that follows can
/// be trusted to start where we think.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// Not a frame at all.
    #[error(
        "frame starts with {found:02x?}, not with costandby's {MAGIC:02x?}: is the peer's port another program's?"
    )]
    Magic {
        /// The bytes where the magic number belongs.
        found: [u8; 2],
    },
    /// Damaged on the way, or by a bug.
    #[error("frame header checksum is {found:#010x}, computed {computed:#010x}: damaged in transit")]
    HeaderChecksum {
        /// As sent.
        found: u32,
        /// As computed here.
        computed: u32,
    },
    /// A format we do not speak.
    #[error("frame version {found}, this program speaks {VERSION}: run the same release on both nodes")]
    Version {
        /// As sent.
        found: u8,
    },
    /// A kind we do not know.
    #[error("frame of unknown kind {found}: run the same release on both nodes")]
    Kind {
        /// As sent.
        found: u8,
    },
    /// Bits set that mean nothing in this version.
    #[error(
        "frame has unknown flags {found:#04x} or non-zero reserved bytes: run the same release on both nodes"
    )]
    Flags {
        /// As sent.
        found: u8,
    },
    /// An empty or impossible byte range.
    #[error("frame's byte range {range} is empty or beyond the largest volume")]
    Range {
        /// As sent.
        range: ByteRange,
    },
    /// A payload over the limit.
    #[error("frame announces {found} bytes of payload, the limit is {PAYLOAD_LEN_MAX}")]
    Length {
        /// As sent.
        found: u32,
    },
    /// More bytes to compare at once than one may ask for.
    #[error("frame asks for {found} bytes to be compared, the limit is {VERIFY_LEN_MAX}")]
    VerifyLength {
        /// As sent.
        found: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_header() -> impl Strategy<Value = Header> {
        let kind = prop_oneof![
            Just(Kind::Write),
            Just(Kind::WriteZeroes),
            Just(Kind::Trim),
            Just(Kind::Flush),
            Just(Kind::Ack),
            Just(Kind::KeepAlive),
            Just(Kind::Control),
            Just(Kind::Dirty),
            Just(Kind::DirtyEnd),
            Just(Kind::DirtyKept),
            Just(Kind::Verify),
            Just(Kind::Differs),
            Just(Kind::Read),
            Just(Kind::ReadReply)
        ];
        let numbers = (any::<u64>(), any::<u64>(), 0..1u64 << 62, 1..=u64::from(PAYLOAD_LEN_MAX));
        (kind, 0..=flags::ALL, numbers, any::<u64>(), any::<[u32; 2]>(), any::<u64>()).prop_map(
            |(kind, flags, (epoch, seq, start, len), aux, [payload_crc, receives], ring_returned)| Header {
                kind,
                flags,
                epoch: Epoch(epoch),
                seq: Seq(seq),
                range: ByteRange::new(
                    start,
                    if kind == Kind::Verify { len.min(VERIFY_LEN_MAX) } else { len },
                ),
                aux,
                payload_crc,
                ring_returned,
                receives,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(header in any_header()) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn any_flipped_bit_is_refused(header in any_header(), bit in 0..HEADER_LEN * 8) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in any::<[u8; 32]>().prop_map(|half| [half, half].concat()), fix in any::<bool>()) {
            if fix {
                bytes[..2].copy_from_slice(&MAGIC);
                let crc = crc32c::crc32c(&bytes[..CHECKED_LEN]);
                bytes[CHECKED_LEN..].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = Header::decode(bytes.as_slice().try_into().expect("64 bytes"));
        }
    }
}

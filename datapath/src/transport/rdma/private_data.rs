//! What the two ends of an RDMA connection tell each other while it is made: the connection manager's private data.
//!
//! The hellos are exchanged over TCP first; one end then listens on a port of the system's choice, and the other
//! connects to it. Request and reply each carry one [`Introduction`]: the secret agreed in the hello, and where the
//! sender's ring is. Sans-IO: bytes in, bytes out.
//!
//! Invariants:
//! - 52 bytes, because a connection request has room for 56. The connection manager hands on more than was given to it
//!   (56 bytes of a request, 196 of a reply), so the data say their own length, and what follows is not looked at.
//! - An introduction that was decoded names a ring that a largest frame fits in, whose places an immediate can name,
//!   and which does not wrap around the address space. It may still be a lie: a wrong address or key is refused by the
//!   sender's *own* device, and ends the connection.
//! - Secrets are compared in constant time and never printed.
//!
//! Failures survived: any bytes at all, from anyone who finds the port.

use crate::limits::{PAYLOAD_LEN_MAX, RDMA_RECEIVES_MAX, RDMA_RECEIVES_MIN, RDMA_RING_LEN_MAX};
use crate::transport::ring_takes;
use crate::wire::HEADER_LEN;
use std::fmt;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of the private data.
pub const MAGIC: [u8; 4] = *b"cSrd";

/// Version of the format; changes of frames and of their order on the wire raise it too.
pub const VERSION: u8 = 2;

/// Bytes of an [`Introduction`].
pub const LEN: usize = 52;

/// Bytes of a secret.
pub const SECRET_LEN: usize = 16;

/// What both ends of one connection know, from the hello, and nobody else does.
#[derive(Clone, Copy)]
pub struct Secret(pub [u8; SECRET_LEN]);

impl Secret {
    /// Whether the two are the same. Takes as long for every pair, so that it cannot be found out byte by byte.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        let difference =
            self.0.iter().zip(&other.0).fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// One end's part of an RDMA connection.
#[derive(Clone, Copy, Debug)]
pub struct Introduction {
    /// From the hello.
    pub secret: Secret,
    /// Where the sender's ring begins, as its device counts.
    pub ring_address: u64,
    /// The key to it.
    pub ring_rkey: u32,
    /// Bytes of the ring, one lap.
    pub ring_len: u64,
    /// Receives the sender keeps posted: changes and messages that may be under way to it.
    pub receives: u32,
}

/// Why private data are no introduction. The connection is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PrivateDataError {
    /// Too few bytes for any version.
    #[error("RDMA private data end after {found} bytes: is the peer another program?")]
    Short {
        /// Bytes there are.
        found: usize,
    },
    /// Not ours.
    #[error(
        "RDMA private data start with {found:02x?}, not with costandby's {MAGIC:02x?}: is the peer another program?"
    )]
    Magic {
        /// The bytes where the magic number belongs.
        found: [u8; 4],
    },
    /// A length that cannot be: more than arrived, or less than any version has.
    #[error("RDMA private data announce {announced} bytes, {found} are there")]
    Length {
        /// As sent.
        announced: u8,
        /// Bytes that arrived, padding included.
        found: usize,
    },
    /// Damaged, or made by hand.
    #[error("RDMA private data's checksum is {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// As sent.
        found: u32,
        /// As computed here.
        computed: u32,
    },
    /// A format we do not speak.
    #[error(
        "RDMA private data of version {found}, this program speaks {VERSION}: run the same release on both nodes"
    )]
    Version {
        /// As sent.
        found: u8,
    },
    /// Bytes set that mean nothing in this version.
    #[error("RDMA private data have non-zero reserved bytes: run the same release on both nodes")]
    Reserved,
    /// A ring no frame fits in, or an absurdly large one.
    #[error(
        "peer announces an RDMA ring of {found} bytes: it must be a multiple of {HEADER_LEN}, hold a frame of {PAYLOAD_LEN_MAX} bytes and have at most {RDMA_RING_LEN_MAX}"
    )]
    RingLength {
        /// As sent.
        found: u64,
    },
    /// An address where no ring can be.
    #[error(
        "peer announces an RDMA ring of {len} bytes at {address:#x}, which is not aligned or ends beyond all memory"
    )]
    RingAddress {
        /// As sent.
        address: u64,
        /// Its length.
        len: u64,
    },
    /// The key of memory that was registered for nobody else.
    #[error("peer announces an RDMA ring with key 0, which opens nothing")]
    RingKey,
    /// A depth nobody works with.
    #[error("peer announces {found} RDMA receives, it must be {RDMA_RECEIVES_MIN} to {RDMA_RECEIVES_MAX}")]
    Receives {
        /// As sent.
        found: u32,
    },
}

impl Introduction {
    /// The private data.
    #[must_use]
    pub fn encode(&self) -> [u8; LEN] {
        let mut raw = RawIntroduction {
            magic: MAGIC,
            version: VERSION,
            len: LEN_ON_WIRE,
            reserved: [0; 2],
            secret: self.secret.0,
            ring_address: self.ring_address.into(),
            ring_len: self.ring_len.into(),
            ring_rkey: self.ring_rkey.into(),
            receives: self.receives.into(),
            crc: 0.into(),
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[..LEN - CRC_LEN]).into();
        zerocopy::transmute!(raw)
    }

    /// Reads private data; whatever follows them is padding.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, PrivateDataError> {
        let found = bytes.len();
        let Some((prefix, _)) = bytes.split_first_chunk::<PREFIX_LEN>() else {
            return Err(PrivateDataError::Short { found });
        };
        let [m0, m1, m2, m3, version, announced, ..] = *prefix;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(PrivateDataError::Magic { found: [m0, m1, m2, m3] });
        }
        // The checksum stands at the end in every version: a release to come is told from damage.
        let length_error = PrivateDataError::Length { announced, found };
        let all = bytes.get(..usize::from(announced)).ok_or(length_error)?;
        let (checked, crc) = all.split_last_chunk::<CRC_LEN>().ok_or(length_error)?;
        let (found, computed) = (u32::from_le_bytes(*crc), crc32c::crc32c(checked));
        if found != computed {
            return Err(PrivateDataError::Checksum { found, computed });
        }
        if version != VERSION {
            return Err(PrivateDataError::Version { found: version });
        }
        let raw = <[u8; LEN]>::try_from(all).map_err(|_| length_error)?;
        let raw: RawIntroduction = zerocopy::transmute!(raw);
        raw.check()
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawIntroduction {
    magic: [u8; 4],
    version: u8,
    len: u8,
    reserved: [u8; 2],
    secret: [u8; SECRET_LEN],
    ring_address: U64,
    ring_len: U64,
    ring_rkey: U32,
    receives: U32,
    crc: U32,
}

const PREFIX_LEN: usize = 8;
const CRC_LEN: usize = 4;
const LEN_ON_WIRE: u8 = 52;
const _: () = assert!(size_of::<RawIntroduction>() == LEN && LEN_ON_WIRE as usize == LEN);

impl RawIntroduction {
    fn check(&self) -> Result<Introduction, PrivateDataError> {
        if self.reserved != [0; 2] {
            return Err(PrivateDataError::Reserved);
        }
        let (address, len) = (self.ring_address.get(), self.ring_len.get());
        let holds = |len| usize::try_from(len).is_ok_and(|len| ring_takes(len, PAYLOAD_LEN_MAX as usize));
        if len > RDMA_RING_LEN_MAX || !len.is_multiple_of(HEADER_LEN as u64) || !holds(len) {
            return Err(PrivateDataError::RingLength { found: len });
        }
        if !address.is_multiple_of(HEADER_LEN as u64) || address.checked_add(len).is_none() {
            return Err(PrivateDataError::RingAddress { address, len });
        }
        let (ring_rkey, receives) = (self.ring_rkey.get(), self.receives.get());
        if ring_rkey == 0 {
            return Err(PrivateDataError::RingKey);
        }
        if !(RDMA_RECEIVES_MIN..=RDMA_RECEIVES_MAX).contains(&receives) {
            return Err(PrivateDataError::Receives { found: receives });
        }
        let secret = Secret(self.secret);
        Ok(Introduction { secret, ring_address: address, ring_rkey, ring_len: len, receives })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RING_LEN: u64 = 64 << 20;

    fn introduction() -> Introduction {
        let (ring_address, ring_rkey, receives) = (0x7f00_0000_0000, 0x1234, 256);
        Introduction {
            secret: Secret([7; SECRET_LEN]),
            ring_address,
            ring_rkey,
            ring_len: RING_LEN,
            receives,
        }
    }

    fn any_introduction() -> impl Strategy<Value = Introduction> {
        let ring = (0..1_u64 << 50, RING_LEN / 64..=RDMA_RING_LEN_MAX / 64, 1..=u32::MAX);
        (any::<[u8; SECRET_LEN]>(), ring, RDMA_RECEIVES_MIN..=RDMA_RECEIVES_MAX).prop_map(
            |(secret, (address, len, ring_rkey), receives)| Introduction {
                secret: Secret(secret),
                ring_address: address * 64,
                ring_rkey,
                ring_len: len * 64,
                receives,
            },
        )
    }

    fn fields(of: &Introduction) -> ([u8; SECRET_LEN], u64, u32, u64, u32) {
        (of.secret.0, of.ring_address, of.ring_rkey, of.ring_len, of.receives)
    }

    fn with_crc(mut bytes: [u8; LEN]) -> [u8; LEN] {
        let crc = crc32c::crc32c(&bytes[..LEN - CRC_LEN]);
        bytes[LEN - CRC_LEN..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn refusal(of: &Introduction) -> PrivateDataError {
        Introduction::decode(&of.encode()).expect_err("absurd")
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(sent in any_introduction(), padding in prop::collection::vec(any::<u8>(), 0..150)) {
            let bytes = [&sent.encode()[..], &padding].concat();
            let got = Introduction::decode(&bytes).expect("good");
            prop_assert_eq!(fields(&got), fields(&sent));
        }

        #[test]
        fn any_flipped_bit_is_refused(sent in any_introduction(), bit in 0..LEN * 8, padding in 0..4_usize) {
            let mut bytes = [&sent.encode()[..], &[0; 4][..padding]].concat();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Introduction::decode(&bytes).is_err());
        }

        #[test]
        fn a_part_is_refused(sent in any_introduction(), len in 0..LEN) {
            let short = matches!(
                Introduction::decode(&sent.encode()[..len]),
                Err(PrivateDataError::Short { .. } | PrivateDataError::Length { .. })
            );
            prop_assert!(short);
        }

        /// What the decoder accepts keeps the promises above, whatever the bytes.
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), fix in any::<bool>()) {
            if fix && bytes.len() >= LEN {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..8].copy_from_slice(&[VERSION, LEN_ON_WIRE, 0, 0]);
                let fixed = with_crc(bytes[..LEN].try_into().expect("as long"));
                bytes[..LEN].copy_from_slice(&fixed);
            }
            if let Ok(got) = Introduction::decode(&bytes) {
                prop_assert!(got.ring_len <= RDMA_RING_LEN_MAX && got.ring_rkey != 0);
                prop_assert_eq!(&got.encode()[..], &bytes[..LEN]);
            }
        }

        #[test]
        fn secrets_match_only_themselves(secret in any::<[u8; SECRET_LEN]>(), bit in 0..SECRET_LEN * 8) {
            let mut other = secret;
            prop_assert!(Secret(secret).matches(&Secret(other)));
            other[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!Secret(secret).matches(&Secret(other)));
        }
    }

    #[test]
    fn what_is_absurd_is_refused_by_name() {
        let good = introduction();
        for len in [0, 4096, 32 << 20, RING_LEN + 8, RDMA_RING_LEN_MAX + 64, u64::MAX - 63] {
            let refused = refusal(&Introduction { ring_len: len, ..good });
            assert_eq!(refused, PrivateDataError::RingLength { found: len });
            assert!(refused.to_string().contains(&len.to_string()), "{refused}");
        }
        for address in [1, u64::MAX - 63, 0_u64.wrapping_sub(RING_LEN - 64)] {
            let refused = refusal(&Introduction { ring_address: address, ..good });
            assert_eq!(refused, PrivateDataError::RingAddress { address, len: RING_LEN });
        }
        assert_eq!(refusal(&Introduction { ring_rkey: 0, ..good }), PrivateDataError::RingKey);
        for receives in [0, RDMA_RECEIVES_MIN - 1, RDMA_RECEIVES_MAX + 1, u32::MAX] {
            let refused = refusal(&Introduction { receives, ..good });
            assert_eq!(refused, PrivateDataError::Receives { found: receives });
        }
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        let good = introduction().encode();
        let changed = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Introduction::decode(&with_crc(bytes)).expect_err("of another format")
        };
        assert_eq!(changed(0, b'x'), PrivateDataError::Magic { found: *b"xSrd" });
        for version in [1, VERSION + 1] {
            assert_eq!(changed(4, version), PrivateDataError::Version { found: version });
        }
        assert_eq!(changed(6, 1), PrivateDataError::Reserved);
        assert_eq!(changed(5, 3), PrivateDataError::Length { announced: 3, found: LEN });
        assert_eq!(changed(5, 53), PrivateDataError::Length { announced: 53, found: LEN });
        // A longer version of a later release, as long as it says: it is the version that is named.
        let mut later = [&good[..LEN - CRC_LEN], &[9; 4]].concat();
        (later[4], later[5]) = (VERSION + 1, LEN_ON_WIRE + 4);
        let crc = crc32c::crc32c(&later);
        later.extend_from_slice(&crc.to_le_bytes());
        let refused = PrivateDataError::Version { found: VERSION + 1 };
        assert_eq!(Introduction::decode(&later).expect_err("later"), refused);
        // Our version at another length.
        later[4] = VERSION;
        let crc = crc32c::crc32c(&later[..LEN]);
        later[LEN..].copy_from_slice(&crc.to_le_bytes());
        let refused = PrivateDataError::Length { announced: LEN_ON_WIRE + 4, found: LEN + 4 };
        assert_eq!(Introduction::decode(&later).expect_err("too long"), refused);
    }

    #[test]
    fn a_secret_is_not_printed() {
        assert_eq!(format!("{:?}", Secret([0x41; SECRET_LEN])), "Secret(…)");
    }
}

//! The self-checking sector: what the activity log and the dirty bitmap are stored in.
//!
//! A disk writes 512 bytes whole or not at all; more than that may be torn by a loss of power. So each sector of a block
//! carries its own proof, and a reader can tell three things apart that look alike in a block with one checksum: a
//! sector that was never written, one that was written whole (in this store or in an earlier one), and one that is
//! *damaged*. A torn block is a mixture of whole sectors; damage is none.
//!
//! ```text
//! 0      4      8        16      24        32                                512
//! │ crc  │ kind │ area   │ index │ counter │ payload                          │
//! ```
//!
//! Invariants: the CRC-32C covers all behind it; `area` is the random number of the metadata area, so that what another
//! disk's metadata, or an earlier life of this one, left behind is foreign; `index` is the sector's place in its part of
//! the area, so that a misdirected write is found. All zeros is a sector that was never written.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes a disk writes whole or not at all.
pub const SECTOR_LEN: usize = 512;

/// Bytes of one read or write: eight sectors, a page.
pub const BLOCK_LEN: usize = 4096;

/// Sectors of a block.
pub const SECTORS_PER_BLOCK: usize = BLOCK_LEN / SECTOR_LEN;

/// Bytes of payload in a sector.
pub const PAYLOAD_LEN: usize = SECTOR_LEN - 32;

/// What a sector belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SectorKind {
    /// A transaction of the activity log.
    Activity,
    /// The dirty bitmap.
    Dirty,
}

impl SectorKind {
    fn mark(self) -> [u8; 4] {
        match self {
            Self::Activity => *b"cs-A",
            Self::Dirty => *b"cs-D",
        }
    }
}

/// What is wrong with a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SectorFault {
    /// Its checksum does not hold.
    #[error("damaged (checksum)")]
    Checksum,
    /// Whole, but of another metadata area or part.
    #[error("of another disk's metadata, or of another part of this one's")]
    Foreign,
    /// Whole, but it belongs elsewhere.
    #[error("misplaced: it belongs at sector {index}")]
    Misplaced {
        /// Where it belongs.
        index: u64,
    },
    /// Whole, ours and in place, but it says what cannot be.
    #[error("whole, but its content means nothing")]
    Content,
}

/// A sector as it was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sector<'a> {
    /// Never written.
    Blank,
    /// Whole, ours, in place.
    Good {
        /// Its store's number.
        counter: u64,
        /// What it says.
        payload: &'a [u8; PAYLOAD_LEN],
    },
    /// Not to be believed.
    Bad(SectorFault),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSector {
    crc: U32,
    kind: [u8; 4],
    area: U64,
    index: U64,
    counter: U64,
    payload: [u8; PAYLOAD_LEN],
}

const _: () = assert!(size_of::<RawSector>() == SECTOR_LEN);

/// Where a sector belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Which part.
    pub kind: SectorKind,
    /// The area's random number.
    pub area: u64,
    /// Its place in that part.
    pub index: u64,
}

impl Place {
    /// The sector as it is stored here.
    #[must_use]
    pub fn seal(self, counter: u64, payload: &[u8; PAYLOAD_LEN]) -> [u8; SECTOR_LEN] {
        let mut raw = RawSector {
            crc: 0.into(),
            kind: self.kind.mark(),
            area: self.area.into(),
            index: self.index.into(),
            counter: counter.into(),
            payload: *payload,
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[4..]).into();
        zerocopy::transmute!(raw)
    }

    /// What is found here.
    ///
    /// # Panics
    /// When `bytes` is not a sector long.
    #[must_use]
    pub fn read(self, bytes: &[u8]) -> Sector<'_> {
        const BLANK: [u8; SECTOR_LEN] = [0; SECTOR_LEN];
        if *bytes == BLANK {
            return Sector::Blank;
        }
        let raw = RawSector::ref_from_bytes(bytes).expect("callers cut sectors to size");
        if raw.crc.get() != crc32c::crc32c(&bytes[4..]) {
            return Sector::Bad(SectorFault::Checksum);
        }
        if raw.area.get() != self.area || raw.kind != self.kind.mark() {
            return Sector::Bad(SectorFault::Foreign);
        }
        let index = raw.index.get();
        if index != self.index {
            return Sector::Bad(SectorFault::Misplaced { index });
        }
        Sector::Good { counter: raw.counter.get(), payload: &raw.payload }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HERE: Place = Place { kind: SectorKind::Dirty, area: 7, index: 3 };

    #[test]
    fn a_sector_is_believed_only_where_it_belongs() {
        let payload = [9; PAYLOAD_LEN];
        let bytes = HERE.seal(5, &payload);
        assert_eq!(HERE.read(&bytes), Sector::Good { counter: 5, payload: &payload });
        assert_eq!(HERE.read(&[0; SECTOR_LEN]), Sector::Blank);
        let other = |place: Place| place.read(&bytes);
        assert_eq!(other(Place { area: 8, ..HERE }), Sector::Bad(SectorFault::Foreign));
        assert_eq!(other(Place { kind: SectorKind::Activity, ..HERE }), Sector::Bad(SectorFault::Foreign));
        assert_eq!(other(Place { index: 4, ..HERE }), Sector::Bad(SectorFault::Misplaced { index: 3 }));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(bit in 0..SECTOR_LEN * 8, fill in any::<u8>()) {
            let mut bytes = HERE.seal(1, &[fill; PAYLOAD_LEN]);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(HERE.read(&bytes), Sector::Bad(SectorFault::Checksum));
        }
    }
}

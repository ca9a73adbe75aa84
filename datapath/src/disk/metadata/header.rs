//! The stored form of the superblock: the fields of [`Superblock`], then the geometry and random number of the
//! area, the copy in progress and the kernel's boot id.
//!
//! Either copy can be read without knowing anything else. Any other format than 2 is refused: there is no release that wrote one.

use super::MetadataError;
use super::layout::{Geometry, Layout};
use super::medium::Medium;
use crate::disk::activity_log::ring::NUMBER_END;
use crate::disk::superblock::{COPIES, CopyError, RESERVED_AT, SUPERBLOCK_LEN, Superblock, SuperblockError};
use crate::units::Generation;
use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Highest number of a session: no pair reaches it, and counting on from it cannot overflow.
pub const SESSIONS_MAX: u64 = 1 << 62;

/// The format written and read here.
pub const FORMAT: u32 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtension {
    area: U64,
    grain_len: U64,
    extent_len: U64,
    slots: U32,
    dirty_at: I64,
    activity_known: U64,
    copying: U64,
    boot: [u8; 16],
    sessions_offered: U64,
    sessions_begun: U64,
}

const _: () = assert!(size_of::<RawExtension>() == 84);

/// What the area behind the superblocks is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Random number of this area, in every sector of it.
    pub area: u64,
    /// Grain, extents, slots; the size is the superblock's.
    pub geometry: Geometry,
    /// First byte of the bitmap, from the superblocks' start on; negative where it stands in front of them.
    pub dirty_at: i64,
    /// Number of an activity log transaction that was on stable storage when this was stored.
    pub activity_known: u64,
}

/// One copy, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the disk says of itself.
    pub superblock: Superblock,
    /// The shape of its area.
    pub shape: Shape,
}

/// One copy: what it says and its sequence number, or what is wrong with it.
pub type Copy = Result<(Header, u64), CopyError>;

impl Shape {
    /// Where the parts stand around superblocks at `offset`.
    ///
    /// # Errors
    /// [`MetadataError::Geometry`] where they cannot stand there; `path` is for the message.
    pub(super) fn layout(&self, path: &std::path::Path, offset: u64) -> Result<Layout, MetadataError> {
        let layout = Layout::new(self.geometry, offset)
            .map_err(|source| MetadataError::Geometry { path: path.into(), source })?;
        if offset.checked_add_signed(self.dirty_at) == Some(layout.dirty_at) {
            return Ok(layout);
        }
        // Whole and ours, but of a device that was resized or copied to one of another size.
        Err(MetadataError::Moved { path: path.into() })
    }
}

impl Header {
    /// The block as it is stored.
    #[must_use]
    pub fn encode(superblock: &Superblock, shape: &Shape, sequence: u64) -> [u8; SUPERBLOCK_LEN] {
        let raw = RawExtension {
            area: shape.area.into(),
            grain_len: shape.geometry.grain_len().into(),
            extent_len: shape.geometry.extent_len().into(),
            slots: shape.geometry.slots().into(),
            dirty_at: shape.dirty_at.into(),
            activity_known: shape.activity_known.into(),
            copying: superblock.copying.0.into(),
            boot: superblock.boot,
            sessions_offered: superblock.sessions_offered.into(),
            sessions_begun: superblock.sessions_begun.into(),
        };
        superblock.encode_as(FORMAT, sequence, raw.as_bytes())
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Copy {
        let (mut superblock, sequence) = Superblock::decode_as(FORMAT, bytes)?;
        if sequence >= NUMBER_END {
            return Err(CopyError::Field { field: "sequence" });
        }
        let raw = RawExtension::ref_from_prefix(&bytes[RESERVED_AT..]).map(|(raw, _)| raw);
        let raw = raw.expect("the reserved bytes are long enough");
        let field = |field| CopyError::Field { field };
        let geometry =
            Geometry::new(superblock.size, raw.grain_len.get(), raw.extent_len.get(), raw.slots.get())
                .map_err(|_| field("shape of the metadata"))?;
        if raw.activity_known.get() >= NUMBER_END {
            return Err(field("activity log's transaction"));
        }
        superblock.copying = Generation(raw.copying.get());
        superblock.boot = raw.boot;
        superblock.sessions_offered = raw.sessions_offered.get();
        superblock.sessions_begun = raw.sessions_begun.get();
        if superblock.sessions_begun > superblock.sessions_offered
            || superblock.sessions_offered > SESSIONS_MAX
        {
            return Err(field("number of the last session"));
        }
        let shape = Shape {
            area: raw.area.get(),
            geometry,
            dirty_at: raw.dirty_at.get(),
            activity_known: raw.activity_known.get(),
        };
        Ok((Self { superblock, shape }, sequence))
    }
}

/// Both copies as they are read.
pub(super) type Blocks = [[u8; SUPERBLOCK_LEN]; 2];

/// Reads both copies.
///
/// # Errors
/// [`SuperblockError::Truncated`], [`SuperblockError::Io`].
pub(super) fn read_blocks(medium: &dyn Medium, offset: u64) -> Result<Blocks, SuperblockError> {
    let io = |source| SuperblockError::Io { doing: "reading", path: medium.path().into(), source };
    let found = medium.len().map_err(io)?.saturating_sub(offset);
    if found < crate::disk::superblock::AREA_LEN {
        return Err(SuperblockError::Truncated { path: medium.path().into(), found });
    }
    let mut blocks = [[0; SUPERBLOCK_LEN]; 2];
    for (block, at) in blocks.iter_mut().zip(COPIES) {
        medium.read(offset + at, block).map_err(io)?;
    }
    Ok(blocks)
}

/// What both copies say.
pub(super) fn decode_both(blocks: &Blocks) -> [Copy; 2] {
    blocks.each_ref().map(|block| Header::decode(block))
}

/// Which copy is the newest good one, what it says, its sequence number, and what is wrong with the other.
pub(super) type Newest<T> = (usize, T, u64, Option<(usize, CopyError)>);

/// The newest good copy.
///
/// # Errors
/// [`SuperblockError::Format`], [`SuperblockError::Unreadable`].
pub(super) fn newest(copies: [Copy; 2], medium: &dyn Medium) -> Result<Newest<Header>, SuperblockError> {
    let path = medium.path();
    // A whole copy of another format means that another release ran here: the other copy may be an older state, and
    // falling back to it would undo promotions and resyncs.
    for copy in &copies {
        if let Err(CopyError::Version { found, known }) = copy {
            return Err(SuperblockError::Format { path: path.into(), found: *found, known: *known });
        }
    }
    match copies {
        [Ok(first), Ok(second)] if second.1 > first.1 => Ok((1, second.0, second.1, None)),
        [Ok(first), Ok(_)] => Ok((0, first.0, first.1, None)),
        [Ok(first), Err(error)] => Ok((0, first.0, first.1, Some((1, error)))),
        [Err(error), Ok(second)] => Ok((1, second.0, second.1, Some((0, error)))),
        [Err(first), Err(second)] => Err(SuperblockError::Unreadable { path: path.into(), first, second }),
    }
}

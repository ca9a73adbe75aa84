//! The position of each part of a metadata area, computed from the volume's size, the grain and the activity log's
//! size.
//!
//! ```text
//! beside a file      0 superblocks │ 64 KiB activity log (128 KiB) │ 192 KiB dirty bitmap …
//! at a device's end  … volume … │ [dirty bitmap, where it does not fit below] │ last MiB: superblocks │ log │ bitmap
//! ```
//!
//! Invariants: the superblocks are found without knowing the geometry, by the file's start or the device's last MiB, so
//! that a program that knows nothing else can say what it has before it; a geometry that is accepted bounds every
//! allocation and every offset made from it.

use super::sector::{BLOCK_LEN, PAYLOAD_LEN, SECTORS_PER_BLOCK};
use crate::disk::superblock::{AREA_LEN, DEVICE_METADATA_LEN};
use crate::limits::{
    ACTIVITY_EXTENT_LEN, ACTIVITY_EXTENT_LEN_MAX, ACTIVITY_EXTENT_LEN_MIN, ACTIVITY_RING_LEN, ACTIVITY_SLOTS,
    ACTIVITY_SLOTS_MAX, ACTIVITY_SLOTS_MIN, DIRTY_BITMAP_LEN_MAX, DIRTY_BITMAP_LEN_WANTED, DIRTY_GRAIN_LEN,
    DIRTY_GRAIN_LEN_MAX, DIRTY_GRAIN_LEN_MIN, PAYLOAD_LEN_MAX, VOLUME_LEN_MAX,
};

/// Entries of a sector of the activity log.
pub(crate) const ENTRIES_PER_SECTOR: usize = PAYLOAD_LEN / 8 - 1;

/// Entries of a transaction of the activity log.
pub(crate) const ENTRIES: usize = ENTRIES_PER_SECTOR * SECTORS_PER_BLOCK;

/// Slots of the activity log's table that each transaction tells besides those that changed.
pub const CONTEXT_LEN: u32 = 256;

/// Slots that may change in one transaction.
pub const UPDATES_MAX: usize = ENTRIES - CONTEXT_LEN as usize;

/// Bits of the dirty bitmap in a sector.
pub const SECTOR_BITS: u64 = PAYLOAD_LEN as u64 * 8;

/// Words of the dirty bitmap in a sector.
pub const SECTOR_WORDS: usize = PAYLOAD_LEN / 8;

/// Words of the dirty bitmap in a block.
pub const BLOCK_WORDS: usize = SECTOR_WORDS * SECTORS_PER_BLOCK;

/// Where the activity log starts in the area.
pub const ACTIVITY_AT: u64 = AREA_LEN;

/// Bytes of the activity log.
pub const ACTIVITY_LEN: u64 = ACTIVITY_RING_LEN * BLOCK_LEN as u64;

/// Where the dirty bitmap starts in the area, where it stands behind the log.
const DIRTY_AT: u64 = ACTIVITY_AT + ACTIVITY_LEN;

/// Why a volume cannot have metadata of this shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GeometryError {
    /// No disk is so large, or it has no byte.
    #[error("a volume of {size} bytes cannot have metadata")]
    Size {
        /// Bytes of the volume.
        size: u64,
    },
    /// Not a power of two in bounds.
    #[error("a bitmap grain of {grain_len} bytes: it must be a power of two from 4 KiB to 1 MiB")]
    Grain {
        /// Bytes of a grain.
        grain_len: u64,
    },
    /// Too many bits.
    #[error("a bitmap grain of {grain_len} bytes is too fine for {size} bytes: choose a larger one")]
    TooFine {
        /// Bytes of a grain.
        grain_len: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// Not a power of two in bounds.
    #[error(
        "activity log extents of {extent_len} bytes: they must be a power of two from 4 KiB to 16 MiB and hold a grain"
    )]
    Extent {
        /// Bytes of an extent.
        extent_len: u64,
    },
    /// Too many, too few, or too few for one large write.
    #[error(
        "{slots} hot extents of {extent_len} bytes: from 16 to 4096 are allowed, and a quarter of them must hold a \
         write of 32 MiB, or a sixteenth of a small volume"
    )]
    Slots {
        /// Hot extents.
        slots: u32,
        /// Bytes of each.
        extent_len: u64,
    },
    /// A device that ends too early.
    #[error("the device has {found} bytes in front of its last MiB; the volume and its bitmap need {needed}")]
    DeviceTooSmall {
        /// Bytes in front of the superblocks.
        found: u64,
        /// Bytes needed there.
        needed: u64,
    },
}

/// The shape of a volume's metadata, fixed when it is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    size: u64,
    grain_len: u64,
    extent_len: u64,
    slots: u32,
}

impl Geometry {
    /// Checks a shape.
    ///
    /// # Errors
    /// [`GeometryError`].
    pub fn new(size: u64, grain_len: u64, extent_len: u64, slots: u32) -> Result<Self, GeometryError> {
        if size == 0 || size > VOLUME_LEN_MAX {
            return Err(GeometryError::Size { size });
        }
        let bounds = DIRTY_GRAIN_LEN_MIN..=DIRTY_GRAIN_LEN_MAX;
        if !grain_len.is_power_of_two() || !bounds.contains(&grain_len) {
            return Err(GeometryError::Grain { grain_len });
        }
        let bounds = ACTIVITY_EXTENT_LEN_MIN..=ACTIVITY_EXTENT_LEN_MAX;
        if !extent_len.is_power_of_two() || !bounds.contains(&extent_len) || extent_len < grain_len {
            return Err(GeometryError::Extent { extent_len });
        }
        let geometry = Self { size, grain_len, extent_len, slots };
        let bounds = ACTIVITY_SLOTS_MIN..=ACTIVITY_SLOTS_MAX;
        let largest = u64::from(PAYLOAD_LEN_MAX).min(size / 16);
        if !bounds.contains(&slots) || geometry.touch_len_max() < largest {
            return Err(GeometryError::Slots { slots, extent_len });
        }
        if geometry.map_len() > DIRTY_BITMAP_LEN_MAX {
            return Err(GeometryError::TooFine { grain_len, size });
        }
        Ok(geometry)
    }

    /// The usual shape: 1024 extents of 4 MiB, and a grain of 64 KiB or, on very large volumes, more.
    ///
    /// # Errors
    /// [`GeometryError`] on a volume that not even the largest grain suits.
    pub fn for_volume(size: u64) -> Result<Self, GeometryError> {
        let mut grain_len = DIRTY_GRAIN_LEN;
        while grain_len < DIRTY_GRAIN_LEN_MAX && size.div_ceil(grain_len) / 8 > DIRTY_BITMAP_LEN_WANTED {
            grain_len *= 2;
        }
        Self::new(size, grain_len, ACTIVITY_EXTENT_LEN, ACTIVITY_SLOTS)
    }

    /// Bytes of the volume.
    #[must_use]
    pub fn size(self) -> u64 {
        self.size
    }

    /// Bytes of the volume that a bit stands for.
    #[must_use]
    pub fn grain_len(self) -> u64 {
        self.grain_len
    }

    /// Bytes of the volume that an activity log slot stands for.
    #[must_use]
    pub fn extent_len(self) -> u64 {
        self.extent_len
    }

    /// Extents that may be hot at once.
    #[must_use]
    pub fn slots(self) -> u32 {
        self.slots
    }

    /// Grains of the volume; the last may be cut off by its end.
    #[must_use]
    pub fn grains(self) -> u64 {
        self.size.div_ceil(self.grain_len)
    }

    /// Extents of the volume.
    #[must_use]
    pub fn extents(self) -> u64 {
        self.size.div_ceil(self.extent_len)
    }

    /// Blocks of the dirty bitmap.
    #[must_use]
    pub fn dirty_blocks(self) -> u64 {
        self.grains().div_ceil(SECTOR_BITS * SECTORS_PER_BLOCK as u64)
    }

    /// Bytes of the dirty bitmap as it is stored.
    #[must_use]
    pub fn dirty_len(self) -> u64 {
        self.dirty_blocks() * BLOCK_LEN as u64
    }

    /// Bytes of memory the bits take.
    #[must_use]
    pub fn map_len(self) -> u64 {
        self.dirty_blocks() * BLOCK_WORDS as u64 * 8
    }

    /// Longest change that one touch of the activity log can cover: a quarter of the slots, so that one request does
    /// not wait for all others to end. Longer ones go in pieces.
    #[must_use]
    pub fn touch_len_max(self) -> u64 {
        let extents = u64::from(self.slots / 4).min(UPDATES_MAX as u64);
        (extents - 1) * self.extent_len
    }
}

/// Where the parts of an area stand in its file or device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// First byte of the activity log.
    pub activity_at: u64,
    /// First byte of the dirty bitmap.
    pub dirty_at: u64,
    /// One past the area's last byte.
    pub end: u64,
}

impl Layout {
    /// For superblocks at `offset`: 0 in a file of its own, anything else is in a device's last MiB.
    ///
    /// # Errors
    /// [`GeometryError::DeviceTooSmall`].
    pub fn new(geometry: Geometry, offset: u64) -> Result<Self, GeometryError> {
        let activity_at = offset.saturating_add(ACTIVITY_AT);
        let behind_at = offset.saturating_add(DIRTY_AT);
        let behind_end = behind_at.saturating_add(geometry.dirty_len());
        if offset == 0 {
            return Ok(Self { activity_at, dirty_at: behind_at, end: behind_end });
        }
        let fits = DIRTY_AT + geometry.dirty_len() <= DEVICE_METADATA_LEN;
        let before_len = if fits { 0 } else { geometry.dirty_len() };
        let needed = geometry.size.saturating_add(before_len);
        if needed > offset {
            return Err(GeometryError::DeviceTooSmall { found: offset, needed });
        }
        let dirty_at = if fits { behind_at } else { offset - before_len };
        Ok(Self { activity_at, dirty_at, end: offset.saturating_add(DEVICE_METADATA_LEN) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const TIB: u64 = 1 << 40;

    #[test]
    fn sizes_are_what_the_documents_say() {
        let of = |size: u64| {
            let geometry = Geometry::for_volume(size).expect("usual");
            let layout = Layout::new(geometry, 0).expect("a file");
            (geometry.grain_len() >> 10, geometry.dirty_blocks(), layout.end, geometry.map_len())
        };
        assert_eq!(of(GIB), (64, 1, 196_608 + 4096, 3840));
        assert_eq!(of(TIB), (64, 547, 196_608 + 2_240_512, 2_100_480));
        assert_eq!(of(16 * TIB), (64, 8739, 196_608 + 35_794_944, 33_557_760));
        assert_eq!(of(64 * TIB).0, 256);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let new = |size, grain, extent, slots| Geometry::new(size, grain, extent, slots).err();
        assert_eq!(new(GIB, 4096, 4 << 20, 1024), None);
        assert!(matches!(new(0, 65536, 4 << 20, 1024), Some(GeometryError::Size { .. })));
        assert!(matches!(new(u64::MAX, 65536, 4 << 20, 1024), Some(GeometryError::Size { .. })));
        assert!(matches!(new(GIB, 65537, 4 << 20, 1024), Some(GeometryError::Grain { .. })));
        assert!(matches!(new(GIB, 2 << 20, 4 << 20, 1024), Some(GeometryError::Grain { .. })));
        assert!(matches!(new(64 * TIB, 4096, 4 << 20, 1024), Some(GeometryError::TooFine { .. })));
        assert!(matches!(new(GIB, 65536, 32 << 20, 1024), Some(GeometryError::Extent { .. })));
        assert!(matches!(new(GIB, 65536, 4 << 20, 8192), Some(GeometryError::Slots { .. })));
        assert!(matches!(new(GIB, 65536, 1 << 20, 64), Some(GeometryError::Slots { .. })), "32 MiB");
        assert_eq!(new(1 << 20, 4096, 16 << 10, 20), None, "a sixteenth is enough on a small one");
        assert!(
            matches!(new(GIB, 65536, 32 << 10, 1024), Some(GeometryError::Extent { .. })),
            "less than a grain"
        );
    }

    #[test]
    fn a_device_holds_its_bitmap_in_the_last_mebibyte_or_in_front_of_it() {
        let offset = 16 * TIB + 100 * GIB;
        let small = Geometry::for_volume(100 * GIB).expect("usual");
        let layout = Layout::new(small, offset).expect("fits");
        assert_eq!((layout.dirty_at, layout.end), (offset + DIRTY_AT, offset + DEVICE_METADATA_LEN));
        let large = Geometry::for_volume(16 * TIB).expect("usual");
        let layout = Layout::new(large, offset).expect("fits");
        assert_eq!(layout.dirty_at + large.dirty_len(), offset);
        let error = Layout::new(large, 16 * TIB + 4096).expect_err("the bitmap would stand in the volume");
        assert_eq!(
            error,
            GeometryError::DeviceTooSmall { found: 16 * TIB + 4096, needed: 16 * TIB + large.dirty_len() }
        );
        assert!(Layout::new(small, 99 * GIB).is_err(), "nor the superblocks");
    }
}

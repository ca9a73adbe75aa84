//! Reads a metadata area without changing it: the content of each part, or why the part is invalid. For `costandby
//! dump-metadata`.
//!
//! For `costandby dump-metadata`. Nothing is locked, repaired or refused for being another volume's. While a
//! daemon has the area, what is read may be in the middle of being written.

use super::header::{self, Copy, Shape};
use super::layout::Layout;
use super::medium::Medium;
use super::{DirtyDamage, MetadataError, read_area};
use crate::disk::activity_log::{extent_range, ring};
use crate::disk::superblock::{Superblock, SuperblockError};
use crate::units::ByteRange;

/// What the area behind the superblocks says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Area {
    /// Its shape.
    pub shape: Shape,
    /// Where its parts stand.
    pub layout: Layout,
    /// Bytes that the stored bitmap marks, damaged parts of it included.
    pub bitmap_dirty_bytes: u64,
    /// Bytes that a start would take as dirty: bitmap and hot extents.
    pub dirty_bytes: u64,
    /// The first runs of them.
    pub dirty_first: Vec<ByteRange>,
    /// Damaged parts of the bitmap.
    pub dirty_damage: DirtyDamage,
    /// Extents that are hot.
    pub hot_extents: Vec<ByteRange>,
    /// Number of the last whole transaction.
    pub last_transaction: u64,
    /// The transaction after it was torn.
    pub torn_transaction: bool,
    /// Why the log is not known.
    pub activity_damage: Option<ring::Damage>,
}

/// What a metadata area says.
#[derive(Debug)]
pub struct Inspection {
    /// Both superblock copies.
    pub copies: [Copy; 2],
    /// Which copy a start would take and what it says, or why it would take none.
    pub newest: Result<(usize, Superblock), SuperblockError>,
    /// What stands behind them; none where no copy is good.
    pub area: Option<Result<Area, MetadataError>>,
}

/// Looks at the area on `medium` with its superblocks at `offset`; names at most `runs_max` dirty runs.
///
/// # Errors
/// [`SuperblockError::Truncated`] where there is no room for superblocks, [`SuperblockError::Io`].
pub fn inspect<M: Medium>(medium: &M, offset: u64, runs_max: usize) -> Result<Inspection, SuperblockError> {
    let copies = header::decode_both(&header::read_blocks(medium, offset)?);
    let newest = header::newest(copies.clone(), medium);
    let area = match &newest {
        Ok((_, header, ..)) => Some(look(medium, offset, header.shape, runs_max)),
        Err(_) => None,
    };
    let newest = newest.map(|(copy, header, ..)| (copy, header.superblock));
    Ok(Inspection { copies, newest, area })
}

fn look<M: Medium>(medium: &M, offset: u64, shape: Shape, runs_max: usize) -> Result<Area, MetadataError> {
    let layout = shape.layout(medium.path(), offset)?;
    let io = |source| SuperblockError::Io { doing: "reading", path: medium.path().into(), source };
    let found = medium.len().map_err(io)?;
    if found < layout.end {
        return Err(MetadataError::Truncated { path: medium.path().into(), found, needed: layout.end });
    }
    let mut read = read_area(medium, layout, &shape).map_err(io)?;
    let bitmap_dirty_bytes = read.dirty.dirty_bytes();
    let extents = read.replayed.table.iter().flatten();
    let hot_extents: Vec<_> = extents.map(|&extent| extent_range(shape.geometry, extent)).collect();
    if read.replayed.damage.is_some() {
        let _ = read.dirty.set_all();
    }
    for &extent in &hot_extents {
        let _ = read.dirty.set(extent);
    }
    let mut dirty_first = Vec::new();
    let mut from = 0;
    while dirty_first.len() < runs_max
        && let Some(run) = read.dirty.next_dirty(from, u64::MAX)
    {
        from = run.end();
        dirty_first.push(run);
        if from >= shape.geometry.size() {
            break;
        }
    }
    Ok(Area {
        shape,
        layout,
        bitmap_dirty_bytes,
        dirty_bytes: read.dirty.dirty_bytes(),
        dirty_first,
        dirty_damage: read.damage,
        hot_extents,
        last_transaction: read.replayed.last,
        torn_transaction: read.replayed.torn,
        activity_damage: read.replayed.damage,
    })
}

//! Where a disk's metadata is: beside a file, in the last MiB of a block device, or, on a device that has grown
//! since its metadata was made, where the last MiB was then.
//!
//! Called before metadata is opened, by the daemon and by every command that looks at it. Metadata that is found away from
//! the device's end is used where it stands and is never moved: nothing else is ever stored behind the volume's bytes, and a
//! move would have a moment in which a loss of power leaves two places that contradict each other.
//!
//! Invariants: nothing is written or locked; what stands at the device's end goes first, and the rest is searched only where
//! no copy there has our mark; a place inside the volume's own bytes is named only so that a caller can refuse it by size.
//!
//! Survives: a device that grew, one that shrank (found nowhere, and said so: never taken for damage), one copy overwritten.
//!
//! Everything here blocks.

use crate::disk::superblock::{
    Location, MAGIC, SUPERBLOCK_LEN, Superblock, SuperblockError, is_block_device,
};
use crate::limits::{METADATA_SEARCH_FINE_LEN, METADATA_SEARCH_STEP_LEN, METADATA_SEARCH_STEPS_MAX};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: u64 = SUPERBLOCK_LEN as u64;

/// Where the metadata of `disk`, of a volume of `size` bytes, stands. A file's is beside the file, whether there is one or
/// not.
///
/// # Errors
/// [`SuperblockError::Truncated`] where the device has no room for any, [`SuperblockError::Absent`] where none is found on it,
/// [`SuperblockError::Io`].
pub fn find(disk: &Path, size: u64) -> Result<Location, SuperblockError> {
    if !is_block_device(disk) {
        return Ok(Location::beside(disk));
    }
    let io = |doing| move |source| SuperblockError::Io { doing, path: disk.into(), source };
    let device = File::open(disk).map_err(io("opening"))?;
    let len = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| io("measuring")(errno.into()))?;
    let at_end =
        Location::at_end_of(disk, len).ok_or(SuperblockError::Truncated { path: disk.into(), found: len })?;
    match find_in(&device, size, at_end.offset).map_err(io("searching"))? {
        Some(offset) => Ok(Location { offset, ..at_end }),
        None => Err(SuperblockError::Absent { path: disk.into(), device_len: len, volume_len: size }),
    }
}

/// The offset of metadata on a device whose last MiB begins at `end`: there, or between the volume's bytes and there, or,
/// where the configured `size` is larger than it was, inside of them.
///
/// # Errors
/// The system's.
pub fn find_in(device: &File, size: u64, end: u64) -> io::Result<Option<u64>> {
    let fine_from = size.next_multiple_of(BLOCK).min(end);
    let fine_to = fine_from.saturating_add(METADATA_SEARCH_FINE_LEN).min(end);
    let step = METADATA_SEARCH_STEP_LEN;
    let steps_max = usize::try_from(METADATA_SEARCH_STEPS_MAX).expect("64-bit");
    let fine = (fine_from..fine_to).step_by(SUPERBLOCK_LEN);
    let coarse =
        (fine_to.next_multiple_of(step)..end).step_by(usize::try_from(step).expect("64-bit")).take(steps_max);
    let inside = (0..fine_from / step).rev().map(|index| index * step).take(steps_max / 16);
    if either_marked(device, end)? {
        return Ok(Some(end));
    }
    for at in fine {
        if marked(device, at)? {
            // The first block that has the mark may be the second copy, where the first one lost its own: metadata stands at
            // a multiple of a MiB wherever the device's length was one.
            let second_alone = at % step == BLOCK && !marked(device, at + BLOCK)?;
            return Ok(Some(if second_alone { at - BLOCK } else { at }));
        }
    }
    for at in coarse.chain(inside) {
        if either_marked(device, at)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

fn either_marked(device: &File, at: u64) -> io::Result<bool> {
    Ok(marked(device, at)? || marked(device, at + BLOCK)?)
}

fn marked(device: &File, at: u64) -> io::Result<bool> {
    let mut start = [0; MAGIC.len()];
    match device.read_exact_at(&mut start, at) {
        Ok(()) => Ok(start == MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the newest good copy at `location` says; nothing where there is none.
#[must_use]
pub fn says(location: &Location) -> Option<Superblock> {
    let (medium, _) = super::medium::FileMedium::look(&location.path).ok()?;
    let (_, superblock) = super::inspect::inspect(&medium, location.offset, 0).ok()?.newest.ok()?;
    Some(superblock)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn device(len: u64, copies: &[u64]) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(len).expect("sized");
        for &at in copies {
            file.write_all_at(&MAGIC, at).expect("written");
        }
        file
    }

    fn found(len: u64, size: u64, copies: &[u64]) -> Option<u64> {
        find_in(&device(len, copies), size, len - MIB).expect("readable")
    }

    #[test]
    fn metadata_is_found_at_the_end_and_where_the_end_was() {
        assert_eq!(found(9 * MIB, 4 * MIB, &[8 * MIB, 8 * MIB + BLOCK]), Some(8 * MIB), "at the end");
        assert_eq!(found(9 * MIB, 4 * MIB, &[8 * MIB + BLOCK]), Some(8 * MIB), "one copy there");
        assert_eq!(found(9 * MIB, 4 * MIB, &[4 * MIB, 4 * MIB + BLOCK]), Some(4 * MIB), "grown");
        let odd = 4 * MIB + 5 * BLOCK;
        assert_eq!(found(9 * MIB, 4 * MIB, &[odd, odd + BLOCK]), Some(odd), "grown from an odd length");
        assert_eq!(found(9 * MIB, 4 * MIB, &[5 * MIB + BLOCK]), Some(5 * MIB), "its second copy alone");
        assert_eq!(found(9 * MIB, 4 * MIB, &[5 * MIB]), Some(5 * MIB), "its first copy alone");
        let far = 4 * MIB + METADATA_SEARCH_FINE_LEN + 7 * MIB;
        assert_eq!(found(far + 90 * MIB, 4 * MIB, &[far, far + BLOCK]), Some(far), "far grown");
    }

    #[test]
    fn the_end_goes_first_and_nothing_is_nothing() {
        assert_eq!(found(9 * MIB, 4 * MIB, &[4 * MIB, 4 * MIB + BLOCK, 8 * MIB]), Some(8 * MIB));
        assert_eq!(found(9 * MIB, 4 * MIB, &[]), None);
        assert_eq!(found(9 * MIB, 4 * MIB, &[4 * MIB + 8]), None, "no block begins there");
    }

    #[test]
    fn where_the_configured_size_is_larger_than_it_was_it_is_found_to_be_refused() {
        assert_eq!(found(9 * MIB, 8 * MIB, &[4 * MIB, 4 * MIB + BLOCK]), Some(4 * MIB));
    }
}

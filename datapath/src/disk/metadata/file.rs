//! Metadata areas in files and on devices: [`create`](super::create) and [`open`](super::open) at a [`Location`].
//!
//! What `costandby create` and the daemon call; a simulator brings a medium of its own. Invariants and failures are the
//! module's above.
//!
//! Everything here blocks.

use super::layout::Geometry;
use super::medium::FileMedium;
use super::{MetadataError, Opened};
use crate::disk::superblock::{Location, Superblock};

/// Makes the metadata of a new disk at `location`, in the usual geometry, and unlocks it. `area` is a random number.
///
/// # Errors
/// As [`FileMedium::create`] and [`create`](super::create). A file that is there stays as it is without `force`.
pub fn create_at(
    location: &Location,
    superblock: &Superblock,
    area: u64,
    force: bool,
) -> Result<(), MetadataError> {
    let path = &location.path;
    let geometry = Geometry::for_volume(superblock.size)
        .map_err(|source| MetadataError::Geometry { path: path.clone(), source })?;
    let medium = FileMedium::create(path, force)?;
    super::create(&medium, location.offset, superblock, geometry, area, force)
}

/// Locks and opens the metadata at `location`.
///
/// # Errors
/// As [`FileMedium::open`] and [`open`](super::open).
pub fn open_at(
    location: &Location,
    volume: &str,
    node: &str,
    size: u64,
) -> Result<Opened<FileMedium>, MetadataError> {
    super::open(FileMedium::open(&location.path)?, location.offset, volume, node, size)
}

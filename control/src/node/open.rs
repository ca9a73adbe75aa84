//! Opens one volume's disk and metadata, and gets both ready to be served. Blocks; once for each volume and try, beside the
//! others.
//!
//! Before anything is served: what a crash left in the activity log goes on record, and what a killed daemon left in the
//! system's cache is flushed. Nothing is left open or locked by a try that fails, so that it can be made again.
//!
//! Survives: every way in which a disk or its metadata can be missing, damaged, another one's or unreadable, as an
//! [`OpenError`]; [`super::advice`] says what an operator can do about each.

use crate::config::quantity::display_size;
use crate::config::{Disk, Volume};
use crate::kernel::random_number;
use costandby_datapath::disk::image::{Backing, DiskError, DiskImage};
use costandby_datapath::disk::metadata::file::open_at;
use costandby_datapath::disk::metadata::inspect::inspect;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::{MetadataError, Report, SuperblockStore};
use costandby_datapath::disk::record::Record;
use costandby_datapath::disk::superblock::{DiskState, Location, Superblock, SuperblockError};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A volume that can be served.
pub(super) struct OpenVolume {
    pub(super) disk: Arc<DiskImage>,
    pub(super) superblock: Superblock,
    /// The map of what may differ was not empty.
    pub(super) dirty: bool,
    /// `None`: the disk is in memory, and so is what is on record about it.
    pub(super) store: Option<SuperblockStore<FileMedium>>,
    pub(super) record: Record,
}

/// Why a volume cannot be served.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// Its disk cannot be opened or mapped.
    #[error(transparent)]
    Disk(DiskError),
    /// Its metadata cannot be read, is not this disk's, or cannot be brought up to date.
    #[error(transparent)]
    Metadata(MetadataError),
    /// What the daemon before this one had written is not on stable storage, and cannot be brought there.
    #[error("what was written before this start cannot be brought to stable storage: {source}")]
    Unflushed {
        /// What the disk said.
        source: DiskError,
        /// The metadata says now that the disk failed.
        on_record: bool,
    },
    /// The system refuses something basic.
    #[error("{doing}: {source}")]
    System {
        /// What.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
}

impl From<MetadataError> for OpenError {
    fn from(error: MetadataError) -> Self {
        Self::Metadata(error)
    }
}

impl From<SuperblockError> for OpenError {
    fn from(error: SuperblockError) -> Self {
        Self::Metadata(error.into())
    }
}

/// Opens a volume on `node`. With `distrusted` its disk counts as failed whatever its metadata says: an earlier try lost
/// writes and could not put that on record.
///
/// # Errors
/// [`OpenError`].
pub(super) fn open_volume(
    volume: &Volume,
    disk: &Disk,
    node: &str,
    distrusted: bool,
) -> Result<OpenVolume, OpenError> {
    let name = volume.name.as_str();
    let Disk::Path(path) = disk else {
        let disk = DiskImage::memory(name, volume.size).map_err(OpenError::Disk)?;
        let record = Record::in_memory(volume.size);
        let superblock = Superblock::fresh(name, node, volume.size, true);
        return Ok(OpenVolume { disk, superblock, dirty: false, store: None, record });
    };
    let disk = DiskImage::open(path, volume.size).map_err(OpenError::Disk)?;
    let location = metadata_location(path, &disk)?;
    let area = random_number().map_err(|source| OpenError::System { doing: "/dev/urandom", source })?;
    let mut opened = open_at(&location, name, node, volume.size, area)?;
    tell_report(name, &opened.report);
    // What a crash left in the log must be in the map, on record.
    opened.recover()?;
    let dirty = opened.dirty.dirty_bytes();
    if dirty > 0 {
        tracing::info!(volume = name, "{} may differ from the peer's disk", display_size(dirty));
    }
    let mut superblock = opened.superblock.clone();
    if distrusted {
        mark_failed(&mut superblock);
        opened.superblocks.store(&superblock)?;
    }
    if !superblock.clean {
        // A daemon that was killed left writes in the system's cache alone. The peer has them, too, until it is
        // overwritten with this disk; from then on a loss of power here must not take them.
        tracing::info!(volume = name, "flushing what the daemon before this one left; it answers after that");
        if let Err(source) = disk.flush() {
            // The system tells of lost writes once: the next flush may succeed, and means nothing. So it goes on record.
            mark_failed(&mut superblock);
            let on_record = opened.superblocks.store(&superblock).is_ok();
            return Err(OpenError::Unflushed { source, on_record });
        }
    }
    let (record, store) = Record::of(opened);
    Ok(OpenVolume { disk, superblock, dirty: dirty > 0, store: Some(store), record })
}

/// As a controller does with a disk that fails under it.
fn mark_failed(superblock: &mut Superblock) {
    superblock.disk_state = DiskState::Failed;
    superblock.primary = false;
}

/// What a disk's metadata says, where anything can be read of it and it is this volume's on this node; nothing is locked or
/// changed. Blocks.
pub(super) fn look(volume: &Volume, disk: &Disk, node: &str) -> Option<Superblock> {
    let Disk::Path(path) = disk else { return None };
    let location = location_of(path)?;
    let (medium, _) = FileMedium::look(&location.path).ok()?;
    let (_, superblock) = inspect(&medium, location.offset, 0).ok()?.newest.ok()?;
    let belongs = superblock.check_belongs(path, volume.name.as_str(), node, superblock.size);
    belongs.ok().map(|()| superblock)
}

/// Where a disk's metadata is, also where the disk itself is missing.
fn location_of(path: &Path) -> Option<Location> {
    use std::os::unix::fs::FileTypeExt;
    if !std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Some(Location::beside(path));
    }
    let device = std::fs::File::open(path).ok()?;
    let len = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0)).ok()?;
    Location::at_end_of(path, len)
}

/// What an operator may want to know of how metadata was found.
fn tell_report(volume: &str, report: &Report) {
    let Report { damaged_copy, upgraded, hot_extents, torn_transaction, activity_damage, dirty_damage } =
        report;
    if let Some((copy, error)) = damaged_copy {
        tracing::warn!(volume, copy, %error, "one copy of the metadata was damaged; the other serves");
    }
    if *upgraded {
        tracing::info!(volume, "the metadata is of format 2 now; earlier releases refuse it");
    }
    if *hot_extents > 0 || *torn_transaction {
        tracing::info!(
            volume,
            hot_extents,
            torn_transaction,
            "the daemon before this one ended while it served"
        );
    }
    if let Some(error) = activity_damage {
        tracing::error!(volume, %error, "the activity log is damaged: the whole disk counts as differing");
    }
    if dirty_damage.sectors > 0 {
        tracing::error!(
            volume,
            sectors = dirty_damage.sectors,
            "the dirty bitmap is damaged in places, which count as differing: check the medium"
        );
        for (range, fault) in &dirty_damage.first {
            tracing::error!(volume, "bytes {range}: {fault}");
        }
    }
}

/// Where a disk's metadata is: beside a file, at the end of a device.
fn metadata_location(path: &Path, disk: &DiskImage) -> Result<Location, SuperblockError> {
    if disk.backing() != Backing::BlockDevice {
        return Ok(Location::beside(path));
    }
    let io = |source| SuperblockError::Io { doing: "measuring", path: path.into(), source };
    let device = std::fs::File::open(path).map_err(io)?;
    let len = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0)).map_err(|e| io(e.into()))?;
    Location::at_end_of(path, len)
        .filter(|location| location.offset >= disk.size())
        .ok_or(SuperblockError::Truncated { path: path.into(), found: 0 })
}

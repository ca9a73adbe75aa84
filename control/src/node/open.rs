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
use crate::users;
use costandby_datapath::disk::image::{DiskError, DiskImage};
use costandby_datapath::disk::metadata::file::open_at;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::place;
use costandby_datapath::disk::metadata::{MetadataError, Report, SuperblockStore};
use costandby_datapath::disk::record::Record;
use costandby_datapath::disk::superblock::{DiskState, Superblock, SuperblockError};
use std::io;
use std::path::{Path, PathBuf};
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
    /// The disk is somebody else's at the moment, or another volume's.
    #[error("disk {path} is {by}", path = .path.display())]
    Taken {
        /// The disk.
        path: PathBuf,
        /// What has it, in words that follow "is".
        by: String,
        /// What an operator can do.
        step: &'static str,
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
/// writes and could not put that on record. `others`: the node's other volumes and their disks' paths.
///
/// # Errors
/// [`OpenError`].
pub(super) fn open_volume(
    volume: &Volume,
    disk: &Disk,
    node: &str,
    distrusted: bool,
    others: &[(String, PathBuf)],
) -> Result<OpenVolume, OpenError> {
    let name = volume.name.as_str();
    let Disk::Path(path) = disk else {
        let disk = DiskImage::memory(name, volume.size).map_err(OpenError::Disk)?;
        let record = Record::in_memory(volume.size);
        let superblock = Superblock::fresh(name, node, volume.size, true);
        return Ok(OpenVolume { disk, superblock, dirty: false, store: None, record });
    };
    check_unused(path, others)?;
    let disk = DiskImage::open(path, volume.size).map_err(|error| in_use(path, error))?;
    let location = place::find(path, volume.size)?;
    let mut opened = open_at(&location, name, node, volume.size)?;
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
        tracing::info!(
            volume = name,
            "unclean shutdown detected: flushing the disk before accepting clients"
        );
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

/// Refuses a disk that another volume of this node has under whatever name, and a file that the kernel uses otherwise.
fn check_unused(path: &Path, others: &[(String, PathBuf)]) -> Result<(), OpenError> {
    let taken = |by, step| OpenError::Taken { path: path.into(), by, step };
    let Some(own) = users::identity(path) else { return Ok(()) };
    if let Some((other, _)) = others.iter().find(|(_, other)| users::identity(other) == Some(own)) {
        let step = "give each of the two a disk of its own in the configuration and restart the daemon";
        return Err(taken(format!("the disk of volume {other} as well"), step));
    }
    match (own, users::named(&users::users_of(path))) {
        // Whether a device is free the kernel says when the device is opened.
        (users::Identity::File { .. }, Some(by)) => Err(taken(by, "detach or switch off what uses the file")),
        _ => Ok(()),
    }
}

/// Why a disk could not be opened, with who has it where the kernel says that somebody has.
fn in_use(path: &Path, error: DiskError) -> OpenError {
    match &error {
        DiskError::Open { source, .. } if source.kind() == io::ErrorKind::ResourceBusy => {
            let by = users::named(&users::users_of(path));
            let by = by.unwrap_or_else(|| "in use by a program that is not seen from here".to_owned());
            let step =
                "unmount it, take it out of its array or volume group, or stop the program that has it";
            OpenError::Taken { path: path.into(), by, step }
        }
        _ => OpenError::Disk(error),
    }
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
    let superblock = place::says(&place::find(path, volume.size).ok()?)?;
    let belongs = superblock.check_belongs(path, volume.name.as_str(), node, superblock.size);
    belongs.ok().map(|()| superblock)
}

/// What an operator may want to know of how metadata was found.
fn tell_report(volume: &str, report: &Report) {
    let Report { damaged_copy, hot_extents, torn_transaction, activity_damage, dirty_damage } = report;
    if let Some((copy, error)) = damaged_copy {
        tracing::warn!(volume, copy, %error, "one copy of the metadata was damaged; the other copy is used");
    }
    if *hot_extents > 0 || *torn_transaction {
        tracing::info!(
            volume,
            hot_extents,
            torn_transaction,
            "unclean shutdown detected: the daemon before this one ended while it was primary"
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

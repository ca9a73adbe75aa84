//! The superblock: the state of a disk that survives a crash, in one block of 4096 bytes.
//!
//! It stands in two copies at the beginning of the metadata area, beside the disk (`<disk>.meta`) or in the last MiB of a
//! block device. Here is the block, encoded and decoded but for what the [`metadata`](super::metadata) module adds to it, which
//! stores it.
//!
//! ```text
//! 0        4096     8192                65536
//! │ copy 0 │ copy 1 │ reserved, zeros   │ activity log, dirty bitmap …
//! ```
//!
//! Invariants: every copy carries a sequence number and a CRC-32C in its last four bytes, whatever its version; a name is
//! at most [`NAME_LEN_MAX`] bytes of UTF-8; a value that means nothing is refused, never guessed.
//!
//! Survives: damage, garbage, another volume's block, another release's format, each as an error of its own.
//!
//! Also here: where metadata stands ([`Location`]), the exclusive lock on it, and why it
//! cannot be read ([`SuperblockError`]).

use crate::limits::GENERATION_HISTORY_LEN;
use crate::units::{Epoch, Generation};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[cfg(test)]
mod tests;

/// Bytes of one superblock copy: the smallest unit that any current disk writes at once.
pub const SUPERBLOCK_LEN: usize = 4096;

/// Bytes of the metadata area that belong to the superblock copies and what may join them.
pub const AREA_LEN: u64 = 64 << 10;

/// Bytes at the end of a block device that belong to metadata, beyond the volume's own.
pub const DEVICE_METADATA_LEN: u64 = 1 << 20;

/// First bytes of every superblock copy.
pub const MAGIC: [u8; 8] = *b"costndSB";

/// Bytes of a volume's or node's name: what a file name may have on any common file system.
pub const NAME_LEN_MAX: usize = 255;

/// In [`Superblock::copying`]: everything is to be copied, and nothing that is on record says less. No real generation: the
/// odds of drawing it are those of drawing any other one twice.
pub const COPYING_WHOLE: Generation = Generation(u64::MAX);

/// Where the copies stand in the area.
pub(super) const COPIES: [u64; 2] = [0, SUPERBLOCK_LEN as u64];
pub(super) const CHECKED_LEN: usize = SUPERBLOCK_LEN - 4;

/// What the disk's content is worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskState {
    /// A complete, point-in-time consistent copy of its generation. On a fresh disk: content is whatever it is.
    UpToDate,
    /// In the middle of being overwritten by a resync: a mixture that must never serve.
    Inconsistent,
    /// Complete, but known to be behind the peer.
    Outdated,
    /// The medium reported an error.
    Failed,
    /// There is no disk. Never stored.
    Diskless,
}

impl DiskState {
    /// DRBD's word for it, as `status` prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UpToDate => "UpToDate",
            Self::Inconsistent => "Inconsistent",
            Self::Outdated => "Outdated",
            Self::Failed => "Failed",
            Self::Diskless => "Diskless",
        }
    }

    fn to_stored(self) -> u8 {
        match self {
            Self::UpToDate => 1,
            Self::Inconsistent => 2,
            Self::Outdated => 3,
            Self::Failed => 4,
            Self::Diskless => panic!("Diskless is the absence of a disk and never stored on one"),
        }
    }

    fn from_stored(value: u8) -> Option<Self> {
        [Self::UpToDate, Self::Inconsistent, Self::Outdated, Self::Failed]
            .into_iter()
            .find(|state| state.to_stored() == value)
    }
}

/// The data lineage of a disk; modelled on DRBD's current / bitmap / history identifiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Generations {
    /// Names the data on this disk. 0: fresh, never was in contact with a peer nor promoted.
    pub current: Generation,
    /// What the peer had when this disk went on without it. 0: the peer is not behind.
    pub base: Generation,
    /// Earlier generations, newest first, 0 where there are none.
    pub history: [Generation; GENERATION_HISTORY_LEN],
}

impl Generations {
    /// Starts a new generation; the one before becomes history and, when `peer_has_current`, the peer's base.
    ///
    /// # Panics
    /// When `next` is 0 or the current one: the giver of random numbers is broken.
    pub fn advance(&mut self, next: Generation, peer_has_current: bool) {
        assert!(next != Generation::ZERO && next != self.current, "a new generation must be new");
        if self.current != Generation::ZERO {
            self.history.copy_within(..GENERATION_HISTORY_LEN - 1, 1);
            self.history[0] = self.current;
            if peer_has_current {
                self.base = self.current;
            }
        }
        self.current = next;
    }

    /// Whether `generation` is one this disk's data descends from.
    #[must_use]
    pub fn descends_from(&self, generation: Generation) -> bool {
        generation != Generation::ZERO && (self.base == generation || self.history.contains(&generation))
    }
}

/// Everything a superblock says, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The volume's identity, picked at its first handshake; zeros: not known yet.
    pub volume_id: [u8; 16],
    /// The volume's name in the configuration; at most [`NAME_LEN_MAX`] bytes.
    pub volume: String,
    /// The node this disk belongs to; at most [`NAME_LEN_MAX`] bytes.
    pub node: String,
    /// Bytes of the volume.
    pub size: u64,
    /// The highest fencing number this node has agreed to.
    pub epoch: Epoch,
    /// The data lineage.
    pub generations: Generations,
    /// What the content is worth. Never [`DiskState::Diskless`].
    pub disk_state: DiskState,
    /// Created by us as all zeros and not written since: two such disks are equal without a copy.
    pub zeroed: bool,
    /// This node was primary. Cleared durably on demotion.
    pub primary: bool,
    /// Nothing is in flight: shut down cleanly, quiesced, or never served. Cleared durably before serving starts.
    pub clean: bool,
    /// A standby whose primary may be in mid-write. Cleared once all that arrived is applied and flushed.
    pub applying: bool,
    /// The peer may hold the current generation as `UpToDate`, so going on without it needs a new one.
    pub peer_has_current: bool,
    /// On an `Inconsistent` disk: the generation that it is being overwritten with, once the source's map of
    /// what is left to copy is on record there; [`COPYING_WHOLE`] from the agreement to copy everything until then; 0 where
    /// only maps that are on record say what of `generations` it may lack.
    pub copying: Generation,
    /// Number of the newest session that this node was ready for, counted by both nodes together.
    pub sessions_offered: u64,
    /// Number of the newest session that began here. The peer had it in `sessions_offered` before.
    pub sessions_begun: u64,
    /// The kernel's boot that `primary` or `applying` was stored in; zeros: not known.
    pub boot: [u8; 16],
}

impl Superblock {
    /// The superblock of a disk just made, which has met no peer.
    #[must_use]
    pub fn fresh(volume: &str, node: &str, size: u64, zeroed: bool) -> Self {
        Self {
            volume_id: [0; 16],
            volume: volume.to_owned(),
            node: node.to_owned(),
            size,
            epoch: Epoch::ZERO,
            generations: Generations::default(),
            disk_state: DiskState::UpToDate,
            zeroed,
            primary: false,
            clean: true,
            applying: false,
            peer_has_current: false,
            copying: Generation::ZERO,
            sessions_offered: 0,
            sessions_begun: 0,
            boot: [0; 16],
        }
    }

    /// Refuses the superblock of another volume, node or size; `path` is where it was read.
    ///
    /// # Errors
    /// [`SuperblockError::Foreign`].
    pub fn check_belongs(
        &self,
        path: &Path,
        volume: &str,
        node: &str,
        size: u64,
    ) -> Result<(), SuperblockError> {
        let (what, found, expected) = if self.volume != volume {
            ("volume", self.volume.clone(), volume.to_owned())
        } else if self.node != node {
            ("node", self.node.clone(), node.to_owned())
        } else if self.size != size {
            ("a volume of size", self.size.to_string(), size.to_string())
        } else {
            return Ok(());
        };
        Err(SuperblockError::Foreign { path: path.to_owned(), what, found, expected })
    }

    /// Whether the disk never was in contact with a peer nor promoted.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.generations.current == Generation::ZERO
    }

    /// The block under `sequence`, in a format `version` that keeps `extension` in front of the reserved bytes.
    ///
    /// # Panics
    /// When a name is longer than [`NAME_LEN_MAX`] or the disk state is `Diskless`.
    pub(super) fn encode_as(&self, version: u32, sequence: u64, extension: &[u8]) -> [u8; SUPERBLOCK_LEN] {
        let flags = [
            (self.primary, flag::PRIMARY),
            (self.clean, flag::CLEAN),
            (self.applying, flag::APPLYING),
            (self.peer_has_current, flag::PEER_HAS_CURRENT),
            (self.zeroed, flag::ZEROED),
        ];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, bit)| flags | bit);
        let (volume_len, volume) = stored_name(&self.volume);
        let (node_len, node) = stored_name(&self.node);
        let mut reserved = [0; RESERVED_LEN];
        reserved[..extension.len()].copy_from_slice(extension);
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: version.into(),
            flags: flags.into(),
            sequence: sequence.into(),
            volume_id: self.volume_id,
            size: self.size.into(),
            epoch: self.epoch.0.into(),
            current: self.generations.current.0.into(),
            base: self.generations.base.0.into(),
            history: self.generations.history.map(|generation| generation.0.into()),
            disk_state: self.disk_state.to_stored(),
            volume_len,
            node_len,
            volume,
            node,
            reserved,
            crc: 0.into(),
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[..CHECKED_LEN]).into();
        zerocopy::transmute!(raw)
    }

    /// Reads one copy of format `version` and its sequence number, without what that format has behind.
    ///
    /// # Errors
    /// Names what is wrong with the copy. The checksum comes before the version, so another format is told from damage.
    pub(super) fn decode_as(version: u32, bytes: &[u8]) -> Result<(Self, u64), CopyError> {
        let raw =
            RawSuperblock::read_from_bytes(bytes).map_err(|_| CopyError::Length { found: bytes.len() })?;
        if raw.magic != MAGIC {
            return Err(CopyError::Magic { found: raw.magic });
        }
        let computed = crc32c::crc32c(&bytes[..CHECKED_LEN]);
        if raw.crc.get() != computed {
            return Err(CopyError::Checksum { found: raw.crc.get(), computed });
        }
        if raw.version.get() != version {
            return Err(CopyError::Version { found: raw.version.get(), known: version });
        }
        let flags = raw.flags.get();
        if flags & !flag::ALL != 0 {
            return Err(CopyError::Field { field: "flags" });
        }
        let superblock = Self {
            volume_id: raw.volume_id,
            volume: loaded_name(raw.volume_len, &raw.volume)
                .ok_or(CopyError::Field { field: "volume name" })?,
            node: loaded_name(raw.node_len, &raw.node).ok_or(CopyError::Field { field: "node name" })?,
            size: raw.size.get(),
            epoch: Epoch(raw.epoch.get()),
            generations: Generations {
                current: Generation(raw.current.get()),
                base: Generation(raw.base.get()),
                history: raw.history.map(|generation| Generation(generation.get())),
            },
            disk_state: DiskState::from_stored(raw.disk_state)
                .ok_or(CopyError::Field { field: "disk state" })?,
            zeroed: flags & flag::ZEROED != 0,
            primary: flags & flag::PRIMARY != 0,
            clean: flags & flag::CLEAN != 0,
            applying: flags & flag::APPLYING != 0,
            peer_has_current: flags & flag::PEER_HAS_CURRENT != 0,
            copying: Generation::ZERO,
            sessions_offered: 0,
            sessions_begun: 0,
            boot: [0; 16],
        };
        Ok((superblock, raw.sequence.get()))
    }
}

mod flag {
    pub(super) const PRIMARY: u32 = 1;
    pub(super) const CLEAN: u32 = 2;
    pub(super) const APPLYING: u32 = 4;
    pub(super) const PEER_HAS_CURRENT: u32 = 8;
    pub(super) const ZEROED: u32 = 16;
    pub(super) const ALL: u32 = 31;
}

const NAME_FIELD_LEN: usize = NAME_LEN_MAX + 1;
const FIXED_LEN: usize =
    8 + 4 + 4 + 8 + 16 + 8 + 8 + 8 + 8 + 8 * GENERATION_HISTORY_LEN + 3 + 2 * NAME_FIELD_LEN + 4;
/// Where a copy's reserved bytes begin: the metadata module keeps there what it adds.
pub(super) const RESERVED_AT: usize = FIXED_LEN - 4;
const RESERVED_LEN: usize = SUPERBLOCK_LEN - FIXED_LEN;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    sequence: U64,
    volume_id: [u8; 16],
    size: U64,
    epoch: U64,
    current: U64,
    base: U64,
    history: [U64; GENERATION_HISTORY_LEN],
    disk_state: u8,
    volume_len: u8,
    node_len: u8,
    volume: [u8; NAME_FIELD_LEN],
    node: [u8; NAME_FIELD_LEN],
    reserved: [u8; RESERVED_LEN],
    crc: U32,
}

const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_LEN);

fn stored_name(name: &str) -> (u8, [u8; NAME_FIELD_LEN]) {
    let mut field = [0; NAME_FIELD_LEN];
    let len = u8::try_from(name.len()).expect("the configuration bounds names to 255 bytes");
    field[..name.len()].copy_from_slice(name.as_bytes());
    (len, field)
}

fn loaded_name(len: u8, field: &[u8; NAME_FIELD_LEN]) -> Option<String> {
    let name = &field[..usize::from(len)];
    std::str::from_utf8(name).ok().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// What is wrong with one copy of a superblock.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CopyError {
    /// Not a whole block.
    #[error("{found} bytes long instead of {SUPERBLOCK_LEN}")]
    Length {
        /// Bytes given.
        found: usize,
    },
    /// Not a superblock.
    #[error("starts with {found:02x?} instead of costandby's mark")]
    Magic {
        /// As stored.
        found: [u8; 8],
    },
    /// Damaged, or torn by a power loss.
    #[error("checksum is {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// As stored.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// Whole, but of another format.
    #[error("format version {found}, this program reads version {known}")]
    Version {
        /// As stored.
        found: u32,
        /// The one that the reader knows.
        known: u32,
    },
    /// Whole, of our version, but with a value that means nothing.
    #[error("unknown value in field {field}")]
    Field {
        /// Which.
        field: &'static str,
    },
}

/// What new metadata costs. Said wherever it is named as a way out: what this disk holds may be the newest data.
pub(super) const GIVE_UP: &str = "`costandby create --force VOLUME` makes new metadata and gives up what the disk holds, to \
     be overwritten from the peer: do that only if the peer has all of the data, and save the disk first where that is not known";

/// Why metadata cannot be created, read or stored.
#[derive(Debug, thiserror::Error)]
pub enum SuperblockError {
    /// The operating system refused.
    #[error("{doing} metadata {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// Its words.
        source: io::Error,
    },
    /// A directory, a FIFO, a socket or another device.
    #[error(
        "metadata {path} is neither a file nor a block device: move it away, and put the disk's metadata back"
    )]
    WrongType {
        /// What is there instead.
        path: PathBuf,
    },
    /// There is no such file.
    #[error(
        "no metadata at {path}: a new disk gets it from `costandby create`; if this disk had some, it is lost, and \
         {GIVE_UP}"
    )]
    Missing {
        /// Which file.
        path: PathBuf,
    },
    /// A device without any.
    #[error(
        "no metadata of costandby on device {path}, neither in its last MiB (it has {device_len} bytes) nor behind the {volume_len} bytes \
         of the volume: correct the disk's path if that is another device; give the device its size back if it was made \
         smaller; a new disk gets metadata from `costandby create`; if this disk had some, it is lost, and {GIVE_UP}"
    )]
    Absent {
        /// Which device.
        path: PathBuf,
        /// Bytes it has.
        device_len: u64,
        /// Bytes of the volume.
        volume_len: u64,
    },
    /// `create` over something that is there.
    #[error("metadata {path} is already there: leave it, for the disk is made; {GIVE_UP}")]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// Another process has it open.
    #[error("metadata {path} is in use: another costandby runs with this disk; stop it first")]
    Locked {
        /// Which file.
        path: PathBuf,
    },
    /// Shorter than any metadata we ever wrote.
    #[error(
        "metadata {path} is truncated: {found} bytes instead of {AREA_LEN}; never put an older copy of it there; {GIVE_UP}"
    )]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Bytes from the area's start to the end of file or device.
        found: u64,
    },
    /// Neither copy is good.
    #[error(
        "metadata {path} is unreadable: copy 0 {first}; copy 1 {second}; never put an older copy of it there; {GIVE_UP}"
    )]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Of the first copy.
        first: CopyError,
        /// Of the second copy.
        second: CopyError,
    },
    /// Written by a release with another format.
    #[error(
        "metadata {path} has format version {found}, this program reads version {known}: run the release that wrote it"
    )]
    Format {
        /// Which file.
        path: PathBuf,
        /// As stored.
        found: u32,
        /// The one that this program knows.
        known: u32,
    },
    /// The disk of another volume, node or size than configured.
    #[error(
        "metadata {path} belongs to {what} {found}, the configuration says {expected}: correct the disk's path or the \
         configuration; the disk at this path belongs to another volume or node, so do not make new metadata for it"
    )]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// `"volume"`, `"node"` or `"a volume of size"`.
        what: &'static str,
        /// As stored.
        found: String,
        /// As configured.
        expected: String,
    },
    /// An earlier store failed; what is on the medium is not known any more.
    #[error("metadata {path} failed to be stored before: check the medium, then restart the daemon")]
    FailedBefore {
        /// Which file.
        path: PathBuf,
    },
}

/// Where a disk's metadata lives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Location {
    /// The file or block device.
    pub path: PathBuf,
    /// Where the metadata area starts in it.
    pub offset: u64,
}

impl Location {
    /// `<disk>.meta`, for a disk that is a file.
    #[must_use]
    pub fn beside(disk: &Path) -> Self {
        let mut name = disk.as_os_str().to_owned();
        name.push(".meta");
        Self { path: name.into(), offset: 0 }
    }

    /// The last [`DEVICE_METADATA_LEN`] bytes of a block device of `device_len` bytes, or `None` where it is smaller.
    #[must_use]
    pub fn at_end_of(device: &Path, device_len: u64) -> Option<Self> {
        let offset = device_len.checked_sub(DEVICE_METADATA_LEN)? & !(SUPERBLOCK_LEN as u64 - 1);
        Some(Self { path: device.to_owned(), offset })
    }
}

/// Whether `path` leads to a block device.
#[must_use]
pub fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

pub(super) fn lock(file: &File, path: &Path) -> Result<(), SuperblockError> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
        if errno == rustix::io::Errno::WOULDBLOCK {
            SuperblockError::Locked { path: path.to_owned() }
        } else {
            SuperblockError::Io { doing: "locking", path: path.to_owned(), source: errno.into() }
        }
    })
}

//! `costandby create`: makes this node's disks and their metadata.
//!
//! Runs before the daemon ever does; the daemon opens what this made and makes nothing itself.
//!
//! Invariants: nothing that holds anything is touched without `--force`: a file that is there, metadata, a device with a
//! known format or a byte that is not zero on either end ([`contents`]); the refusal names what was found and what would be
//! lost. Even then the volume's content stays: only its metadata starts anew, not marked as zeros, so the first handshake
//! copies it whole. What is mounted, locked or held by another program is refused, `--force` or not. Metadata is written
//! last, so a disk with metadata is a complete one. Everything is on stable storage before its line is printed.
//!
//! Survives: a full file system (looked at first; a file that could not be completed is removed), a daemon that has
//! the disk open (refused), being run twice (refused, says so), a device that has grown (its metadata is found where its
//! end was).

use super::{CliError, CreateArgs, colours_wanted, print_done};
use crate::config::quantity::display_size;
use crate::config::{Config, ConfigError, Disk, Name, Volume};
use crate::contents;
use crate::kernel::random_number;
use crate::users;
use crate::worth::worth;
use costandby_datapath::disk::image::{DiskError, lock};
use costandby_datapath::disk::metadata::MetadataError;
use costandby_datapath::disk::metadata::file::create_at;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::place;
use costandby_datapath::disk::superblock::{
    DEVICE_METADATA_LEN, Location, SUPERBLOCK_LEN, Superblock, SuperblockError,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::fs::{FallocateFlags, OFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Text under `create --help`.
pub(super) const EXAMPLES: &str = "\
Examples:
  costandby --node alpha create                make all disks of alpha
  costandby --node alpha create db --sparse    make db's, without reserving space
  costandby --node alpha create db --force     take over a disk that is there
  costandby --node alpha create db --zero      take a new device, and fill it with zeros first

A file is made whole and reserved; a block device must be at least 1 MiB larger than the volume and keeps its content, but
for its last MiB. Refused where something is already there (a file, metadata, a file system, any byte on the device's ends),
unless --force: that makes a new disk of it, which a peer's disk with the volume's data overwrites as soon as the two meet.
Refused either way where it is in use.";

/// What `--force` costs.
const FORCED: &str = "its content stays, but counts as a new disk's: a peer's disk that has the volume's data overwrites it as \
     soon as the two meet, and it overwrites a peer's that is new and empty";

/// Bytes reserved between two moves of the progress bar.
const STEP_LEN: u64 = 256 << 20;

/// Bytes of zeros written at a time where the system cannot do it by itself.
const ZERO_LEN: usize = 1 << 20;

/// Why a disk was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A volume that is not in the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A volume of other nodes.
    #[error("volume {volume} has no disk on node {node}: its disks are on {nodes}")]
    NotHere {
        /// Which volume.
        volume: Name,
        /// This node.
        node: Name,
        /// Its nodes.
        nodes: String,
    },
    /// There is something already.
    #[error("volume {volume}: {path} is already there, {detail}: {FORCED}")]
    Exists {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// What is known about it, up to what `--force` would do.
        detail: String,
    },
    /// A device with metadata.
    #[error(
        "volume {volume}: {path} has metadata already, {detail}; --force gives it new metadata: {FORCED}"
    )]
    HasMetadata {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// Where, whose, and what it is worth.
        detail: String,
    },
    /// A device with something else.
    #[error(
        "volume {volume}: {path} is not blank, it holds {found}: correct the disk's path if that is another one's; if nothing \
         there is needed but what the volume is to begin with, --force takes it over and overwrites its last MiB with metadata: {FORCED}"
    )]
    NotBlank {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// What, and where.
        found: String,
    },
    /// Another volume's.
    #[error(
        "volume {volume}: {path} is the disk of volume {other} as well: give each volume a disk of its own"
    )]
    Shared {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// The other one.
        other: Name,
    },
    /// There is metadata, and the disk is gone.
    #[error(
        "volume {volume}: {path} is already there, metadata without its disk {disk}: mount the disk's file system, or put \
         the disk back; if it is lost, --force makes an empty one, to be copied from the peer ({worth})"
    )]
    DiskGone {
        /// Which volume.
        volume: Name,
        /// What the lost disk held.
        worth: String,
        /// Its metadata.
        path: PathBuf,
        /// Its disk.
        disk: PathBuf,
    },
    /// Neither a file nor a block device.
    #[error(
        "volume {volume}: {path} is neither a file nor a block device: correct the disk's path in the configuration"
    )]
    Kind {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
    },
    /// The directory is missing, perhaps because a file system is not mounted.
    #[error("volume {volume}: there is no directory {path}: make it, or mount what belongs there")]
    NoDirectory {
        /// Which volume.
        volume: Name,
        /// The directory.
        path: PathBuf,
    },
    /// More than is free.
    #[error(
        "volume {volume}: no space for {path}: {needed} wanted, {free} free; free some, make the volume smaller, or use --sparse"
    )]
    NoSpace {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// Size of the volume, for people.
        needed: String,
        /// What is free, for people.
        free: String,
    },
    /// A file system without `fallocate`.
    #[error("volume {volume}: the file system of {path} cannot reserve space: use --sparse, or another one")]
    CannotReserve {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
    },
    /// A block device smaller than the volume and its metadata.
    #[error(
        "volume {volume}: {path} has {found} bytes, at least {needed} are needed: the volume and 1 MiB of metadata at the end"
    )]
    DeviceTooSmall {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it needs.
        needed: u64,
    },
    /// A file that would lose its end.
    #[error(
        "volume {volume}: {path} has {found} bytes, more than the volume's {size}: correct the size in the configuration"
    )]
    FileTooLarge {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// Mounted, or part of something.
    #[error(
        "volume {volume}: {path} is in use, {by}: stop the daemon or program that has it, unmount it, or take it out of its array \
         or volume group"
    )]
    Busy {
        /// Which volume.
        volume: Name,
        /// Its disk.
        path: PathBuf,
        /// By what.
        by: String,
    },
    /// The metadata could not be made.
    #[error("volume {volume}: {source}")]
    Metadata {
        /// Which volume.
        volume: Name,
        /// Why.
        source: Box<MetadataError>,
    },
    /// The operating system refused.
    #[error("volume {volume}: {doing} {path}: {source}")]
    Io {
        /// Which volume.
        volume: Name,
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Its words.
        source: io::Error,
    },
}

/// Makes the disks of `args`, one line on stdout each. Stops at the first that cannot be made; those before it stay.
///
/// # Errors
/// [`CliError::Create`]; [`CliError::Untold`] where all were made and stdout took no more.
pub fn run(config: &Config, node: &Name, args: &CreateArgs) -> Result<(), CliError> {
    let mut told = Ok(());
    for (volume, disk) in selected(config, node, &args.volumes)? {
        let line = match disk {
            Disk::Memory => "in memory, nothing to make; its content is lost when the daemon ends".to_owned(),
            Disk::Path(path) => {
                check_own(config, node, volume, path)?;
                Maker { volume, node, path, args }.make()?
            }
        };
        // What cannot be printed must not leave the rest of the disks unmade.
        let printed = print_done(&format!("{}: {line}\n", volume.name), "the disks were made");
        told = told.and(printed);
    }
    told
}

fn selected<'a>(
    config: &'a Config,
    node: &'a Name,
    names: &[Name],
) -> Result<Vec<(&'a Volume, &'a Disk)>, CreateError> {
    if names.is_empty() {
        return Ok(config.volumes_of(node.as_str()).collect());
    }
    let mut selected = Vec::with_capacity(names.len());
    for name in names {
        let volume = config.volume(name.as_str())?;
        let disk = volume.disks.get(node).ok_or_else(|| CreateError::NotHere {
            volume: name.clone(),
            node: node.clone(),
            nodes: volume.disks.keys().map(Name::as_str).collect::<Vec<_>>().join(" and "),
        })?;
        if !selected.iter().any(|(other, _): &(&Volume, &Disk)| other.name == *name) {
            selected.push((volume, disk));
        }
    }
    Ok(selected)
}

/// Refuses a disk that another volume has under whatever name.
fn check_own(config: &Config, node: &Name, volume: &Volume, path: &Path) -> Result<(), CreateError> {
    let Some(own) = users::identity(path) else { return Ok(()) };
    let other = config.volumes_of(node.as_str()).find(|(other, disk)| {
        let same = |path: &PathBuf| users::identity(path) == Some(own);
        other.name != volume.name && matches!(disk, Disk::Path(path) if same(path))
    });
    other.map_or(Ok(()), |(other, _)| {
        Err(CreateError::Shared { volume: volume.name.clone(), path: path.into(), other: other.name.clone() })
    })
}

/// One disk in the making.
struct Maker<'a> {
    volume: &'a Volume,
    node: &'a Name,
    path: &'a Path,
    args: &'a CreateArgs,
}

impl Maker<'_> {
    fn make(&self) -> Result<String, CreateError> {
        match std::fs::metadata(self.path) {
            Ok(metadata) if metadata.file_type().is_block_device() => self.device(),
            Ok(metadata) if metadata.is_file() => self.existing_file(metadata.len()),
            Ok(_) => Err(CreateError::Kind { volume: self.name(), path: self.path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.new_file(),
            Err(error) => Err(self.io("looking at")(error)),
        }
    }

    fn name(&self) -> Name {
        self.volume.name.clone()
    }

    fn io(&self, doing: &'static str) -> impl Fn(io::Error) -> CreateError {
        move |source| CreateError::Io { volume: self.name(), doing, path: self.path.to_owned(), source }
    }

    fn device(&self) -> Result<String, CreateError> {
        // On a block device O_EXCL without O_CREAT asks the kernel whether anything else has it, and keeps others from it.
        let exclusive = i32::try_from(OFlags::EXCL.bits()).expect("open flags fit an int");
        let device =
            OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(self.path).map_err(
                |error| {
                    if error.kind() == io::ErrorKind::ResourceBusy {
                        self.busy()
                    } else {
                        self.io("opening")(error)
                    }
                },
            )?;
        let found = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0))
            .map_err(|errno| self.io("measuring")(errno.into()))?;
        let needed = self.volume.size.saturating_add(DEVICE_METADATA_LEN);
        let location = Location::at_end_of(self.path, found)
            .filter(|location| location.offset >= self.volume.size)
            .ok_or_else(|| CreateError::DeviceTooSmall {
                volume: self.name(),
                path: self.path.to_owned(),
                found,
                needed,
            })?;
        let earlier =
            place::find_in(&device, self.volume.size, location.offset).map_err(self.io("reading"))?;
        if !self.args.force {
            self.refuse_what_is_there(&device, found, &location, earlier)?;
        }
        if let Some(at) = earlier.filter(|at| (self.volume.size..location.offset).contains(at)) {
            // Where the device's end was once; a daemon must never find it again.
            let blank = [0; 2 * SUPERBLOCK_LEN];
            device
                .write_all_at(&blank, at)
                .and_then(|()| device.sync_data())
                .map_err(self.io("clearing old metadata on"))?;
        }
        if self.args.zero {
            self.zero(&device)?;
        }
        self.metadata(&location, self.args.zero)?;
        drop(device);
        let (size, content) = (display_size(self.volume.size), self.content());
        Ok(format!("took {} ({size} of it, {content}), metadata at its end", self.path.display()))
    }

    /// Without `--force` only a device that holds nothing is taken.
    fn refuse_what_is_there(
        &self,
        device: &File,
        len: u64,
        at_end: &Location,
        earlier: Option<u64>,
    ) -> Result<(), CreateError> {
        let (volume, path) = (self.name(), self.path.to_owned());
        if let Some(offset) = earlier {
            let place = if offset == at_end.offset {
                "at its end".to_owned()
            } else {
                format!("at byte {offset}, where its end was before it grew")
            };
            let location = Location { offset, ..at_end.clone() };
            let detail = match place::says(&location) {
                Some(superblock) => format!(
                    "{place}: of volume {} on node {}, so the disk is made and the daemon can use it ({})",
                    superblock.volume,
                    superblock.node,
                    worth(&self.peer(), Some(&superblock))
                ),
                None => format!("{place}, which cannot be read ({})", worth(&self.peer(), None)),
            };
            return Err(CreateError::HasMetadata { volume, path, detail });
        }
        let found = contents::look(device, len).map_err(self.io("reading"))?;
        if found.is_empty() {
            return Ok(());
        }
        Err(CreateError::NotBlank { volume, path, found: contents::named(&found) })
    }

    /// The other node's name.
    fn peer(&self) -> String {
        let peer = self.volume.disks.keys().find(|node| *node != self.node);
        peer.map_or("the peer", Name::as_str).to_owned()
    }

    fn busy(&self) -> CreateError {
        let by = users::named(&users::users_of(self.path)).unwrap_or_else(|| {
            "by a costandby daemon or another program that is not seen from here".to_owned()
        });
        CreateError::Busy { volume: self.name(), path: self.path.to_owned(), by }
    }

    fn existing_file(&self, found: u64) -> Result<String, CreateError> {
        let location = Location::beside(self.path);
        let file = OpenOptions::new().read(true).write(true).open(self.path).map_err(self.io("opening"))?;
        if !self.args.force {
            return Err(self.file_is_there(&file, found, &location));
        }
        if let Err(DiskError::Locked { .. }) = lock(&file, self.path) {
            return Err(self.busy());
        }
        if !users::users_of(self.path).is_empty() {
            return Err(self.busy());
        }
        if found > self.volume.size {
            return Err(CreateError::FileTooLarge {
                volume: self.name(),
                path: self.path.to_owned(),
                found,
                size: self.volume.size,
            });
        }
        // Held until the disk has its size, so that no daemon starts on it in between.
        let held = match FileMedium::open(&location.path) {
            Err(source @ SuperblockError::Locked { .. }) => return Err(self.metadata_error(source.into())),
            other => other,
        };
        if found < self.volume.size {
            self.fill(&file, found)?;
            file.sync_all().map_err(self.io("flushing"))?;
        }
        if self.args.zero {
            self.zero(&file)?;
        }
        drop(held);
        self.metadata(&location, self.args.zero)?;
        drop(file);
        let (size, content) = (display_size(self.volume.size), self.content());
        Ok(format!("took over {} ({size}, {content}), new metadata", self.path.display()))
    }

    fn file_is_there(&self, file: &File, len: u64, location: &Location) -> CreateError {
        let detail = if location.path.exists() {
            let worth = worth(&self.peer(), place::says(location).as_ref());
            format!("with its metadata, so the disk is made; --force gives it new metadata ({worth})")
        } else {
            let holds = match contents::look(file, len) {
                Ok(found) if found.is_empty() => String::new(),
                Ok(found) => format!(" and with {}", contents::named(&found)),
                Err(error) => format!(" and not readable ({error})"),
            };
            format!("without metadata{holds}; --force takes it over")
        };
        CreateError::Exists { volume: self.name(), path: self.path.to_owned(), detail }
    }

    fn new_file(&self) -> Result<String, CreateError> {
        let location = Location::beside(self.path);
        if !self.args.force && location.path.exists() {
            let worth = worth(&self.peer(), place::says(&location).as_ref());
            let (path, disk) = (location.path, self.path.to_owned());
            return Err(CreateError::DiskGone { volume: self.name(), worth, path, disk });
        }
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        if !directory.is_dir() {
            return Err(CreateError::NoDirectory { volume: self.name(), path: directory.to_owned() });
        }
        if !self.args.sparse {
            let free = self.free_bytes(directory)?;
            if free < self.volume.size {
                return Err(self.no_space(free));
            }
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path)
            .map_err(self.io("making"))?;
        let made = self
            .fill(&file, 0)
            .and_then(|()| file.sync_all().map_err(self.io("flushing")))
            .and_then(|()| {
                File::open(directory).and_then(|directory| directory.sync_all()).map_err(self.io("making"))
            })
            .and_then(|()| self.metadata(&location, true));
        if let Err(error) = made {
            // The first error says more than one about cleaning up after it.
            let _ = std::fs::remove_file(self.path);
            return Err(error);
        }
        let kind = if self.args.sparse { ", sparse" } else { "" };
        let size = display_size(self.volume.size);
        Ok(format!("made {} ({size}{kind}) and its metadata", self.path.display()))
    }

    fn metadata(&self, location: &Location, zeroed: bool) -> Result<(), CreateError> {
        let (volume, node) = (self.volume.name.as_str(), self.node.as_str());
        let fresh = Superblock::fresh(volume, node, self.volume.size, zeroed);
        let area = random_number().map_err(self.io("drawing a random number for"))?;
        create_at(location, &fresh, area, self.args.force).map_err(|source| self.metadata_error(source))
    }

    fn metadata_error(&self, source: MetadataError) -> CreateError {
        CreateError::Metadata { volume: self.name(), source: source.into() }
    }

    /// Gives `file`, of `from` bytes, the volume's size.
    fn fill(&self, file: &File, from: u64) -> Result<(), CreateError> {
        let size = self.volume.size;
        if self.args.sparse {
            return file.set_len(size).map_err(|error| self.full(error, "sizing"));
        }
        let bar = progress(&self.volume.name, size);
        let mut at = from;
        while at < size {
            let len = STEP_LEN.min(size - at);
            match rustix::fs::fallocate(file, FallocateFlags::empty(), at, len) {
                Ok(()) => at += len,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => {
                    bar.finish_and_clear();
                    return Err(self.full(errno.into(), "reserving space in"));
                }
            }
            bar.set_position(at);
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn content(&self) -> &'static str {
        if self.args.zero { "zeros now" } else { "content as it is" }
    }

    /// Makes the volume's bytes zeros, on stable storage.
    fn zero(&self, disk: &File) -> Result<(), CreateError> {
        let size = self.volume.size;
        let zeros = vec![0; ZERO_LEN];
        let bar = progress(&self.volume.name, size);
        let mut at = 0;
        while at < size {
            let len = STEP_LEN.min(size - at);
            match rustix::fs::fallocate(disk, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, len)
            {
                Ok(()) => {}
                Err(rustix::io::Errno::INTR) => continue,
                // Not every device and file system can, nor every alignment.
                Err(_) => {
                    for from in (at..at + len).step_by(ZERO_LEN) {
                        let piece =
                            usize::try_from(at + len - from).map_or(ZERO_LEN, |left| left.min(ZERO_LEN));
                        disk.write_all_at(&zeros[..piece], from).map_err(self.io("filling with zeros"))?;
                    }
                }
            }
            at += len;
            bar.set_position(at);
        }
        bar.finish_and_clear();
        disk.sync_data().map_err(self.io("flushing"))
    }

    fn full(&self, error: io::Error, doing: &'static str) -> CreateError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                let directory = self.path.parent().unwrap_or(Path::new("/"));
                self.no_space(self.free_bytes(directory).unwrap_or(0))
            }
            io::ErrorKind::Unsupported => {
                CreateError::CannotReserve { volume: self.name(), path: self.path.to_owned() }
            }
            _ => self.io(doing)(error),
        }
    }

    fn no_space(&self, free: u64) -> CreateError {
        CreateError::NoSpace {
            volume: self.name(),
            path: self.path.to_owned(),
            needed: display_size(self.volume.size),
            free: display_size(free),
        }
    }

    fn free_bytes(&self, directory: &Path) -> Result<u64, CreateError> {
        let found = rustix::fs::statvfs(directory).map_err(|errno| self.io("measuring")(errno.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

fn progress(volume: &Name, size: u64) -> ProgressBar {
    let bar = ProgressBar::new(size);
    let terminal = io::stderr().is_terminal();
    if !terminal {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let template = if colours_wanted(terminal) {
        "{prefix} [{wide_bar:.green}] {bytes} of {total_bytes}, {eta} left"
    } else {
        "{prefix} [{wide_bar}] {bytes} of {total_bytes}, {eta} left"
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    bar.set_style(style);
    bar.set_prefix(volume.to_string());
    bar
}

//! The text for a disk that cannot be opened: what is wrong and what an operator can do, for `status`, the log,
//! clients and the peer. Decides nothing and changes nothing.
//!
//! Invariants: a text names what is wrong and where, and a next step. Where that step gives up what the disk holds, the
//! text says so, and says what the disk's own metadata tells of the peer: whether it has that data.

use super::open::OpenError;
use crate::command_line::Commands;
use crate::config::Disk;
use crate::config::quantity::display_size;
use crate::worth::worth;
use costandby_datapath::disk::image::DiskError;
use costandby_datapath::disk::metadata::MetadataError;
use costandby_datapath::disk::superblock::{AREA_LEN, Location, Superblock, SuperblockError};
use rustix::io::Errno;
use std::io;
use std::path::Path;

/// A volume that could not be opened.
pub(super) struct Case<'a> {
    pub(super) commands: Commands<'a>,
    pub(super) size: u64,
    pub(super) disk: &'a Disk,
    pub(super) error: &'a OpenError,
    /// What its metadata says, where it can be read all the same.
    pub(super) found: Option<&'a Superblock>,
}

impl Case<'_> {
    /// What is wrong.
    pub(super) fn problem(&self) -> String {
        self.explained().0
    }

    fn explained(&self) -> (String, String) {
        match self.error {
            OpenError::Disk(error) => self.disk(error),
            OpenError::Metadata(error) => self.metadata(error),
            OpenError::Unflushed { source, on_record } => self.unflushed(source, *on_record),
            OpenError::Taken { step, .. } => (self.error.to_string(), self.again(step)),
        }
    }

    /// What is wrong and what to do.
    pub(super) fn text(&self) -> String {
        let (problem, remedy) = self.explained();
        let meanwhile = self.meanwhile().map(|text| format!("; {text}"));
        format!("{problem}; {remedy}{}", meanwhile.unwrap_or_default())
    }

    fn disk(&self, error: &DiskError) -> (String, String) {
        match error {
            DiskError::Open { source, .. } | DiskError::Map { source, .. } if *self.disk == Disk::Memory => (
                format!("the system gives no {} of memory for it: {source}", display_size(self.size)),
                self.again("free some, or raise the limit (MemoryMax= of the unit, ulimit -v)"),
            ),
            DiskError::Open { path, source } => self.not_opened("disk", path, source),
            DiskError::Map { .. } => {
                let step = "free some memory, or raise the limit (ulimit -v; the sysctl vm.max_map_count)";
                (error.to_string(), self.again(step))
            }
            DiskError::TooSmall { path, found, needed } => (
                format!("disk {} has {found} bytes, its volume needs {needed}", path.display()),
                format!(
                    "if `size` in the configuration is wrong, correct it on both nodes and restart their daemons; if the \
                     disk was cut short, its end is lost, and must not be filled up with zeros, which would count as data: \
                     {}",
                    self.give_up()
                ),
            ),
            DiskError::Locked { path } => (
                format!("disk {} is in use: another program has it locked", path.display()),
                self.again("stop that program (another costandby, QEMU), for no two may write to one disk"),
            ),
            DiskError::WrongType { .. } => (error.to_string(), self.wrong_path()),
            other => (other.to_string(), self.medium()),
        }
    }

    /// The disk, or its metadata, cannot even be opened.
    fn not_opened(&self, what: &str, path: &Path, source: &io::Error) -> (String, String) {
        let shown = path.display();
        let errno = Errno::from_io_error(source);
        match (source.kind(), errno) {
            (io::ErrorKind::NotFound, _) => {
                let metadata = Location::beside(path).path;
                if metadata.exists() {
                    return (
                        format!("disk {shown} is missing, its metadata is there"),
                        format!(
                            "{}; if the disk is lost, {}",
                            self.again("mount its file system, or put the file back"),
                            self.give_up()
                        ),
                    );
                }
                (
                    format!("disk {shown} is missing, and so is its metadata"),
                    self.again(&format!(
                        "mount its file system; if this disk was never made, {}",
                        self.commands.here("create")
                    )),
                )
            }
            (_, Some(Errno::PERM)) => (
                format!("{what} {shown} may not be written: {source}"),
                self.again(
                    "take the attribute away that forbids it (`lsattr` shows `i`, immutable, and `a`, append only; `chattr -i -a` \
                     as root); where neither is set, let the security module or the unit's sandbox allow it",
                ),
            ),
            (_, Some(Errno::ISDIR | Errno::LOOP | Errno::NXIO | Errno::NOTDIR | Errno::NAMETOOLONG | Errno::NODEV)) => (
                format!("{what} {shown} is {}: {source}", wrong_kind(errno, path)),
                self.wrong_path(),
            ),
            (io::ErrorKind::PermissionDenied, _) => (
                format!("{what} {shown} may not be opened by the daemon's user: {source}"),
                self.again(&format!(
                    "let user {} read and write it (owner and mode of the file and of its directories, rules of a \
                     security module)",
                    rustix::process::geteuid().as_raw()
                )),
            ),
            (_, Some(Errno::ROFS)) => (
                format!("{what} {shown} is on a file system that is mounted read-only"),
                self.again(
                    "look into the kernel's log, for a file system becomes that after an error, and mount it for writing",
                ),
            ),
            (_, Some(Errno::MFILE | Errno::NFILE)) => (
                format!("{what} {shown} cannot be opened: {source}"),
                self.again(
                    "close some of the daemon's clients, or raise LimitNOFILE= of the unit (ulimit -n) and restart the daemon",
                ),
            ),
            (_, Some(Errno::BUSY)) => (
                format!("{what} {shown} is in use by something else: {source}"),
                self.again("unmount it, or take it out of its array or volume group"),
            ),
            _ => (format!("{what} {shown} cannot be opened: {source}"), self.medium()),
        }
    }

    fn metadata(&self, error: &MetadataError) -> (String, String) {
        let unusable = |path: &Path, how: &str| {
            (
                format!("metadata {} {how}", path.display()),
                format!(
                    "what the disk itself holds is as it was, but nothing says what it is worth: {}",
                    self.give_up()
                ),
            )
        };
        match error {
            MetadataError::Superblock(error) => match error {
                SuperblockError::Absent { path, device_len, volume_len } => (
                    format!(
                        "there is no metadata on device {}, neither in its last MiB (it has {device_len} bytes) nor behind the \
                         {volume_len} bytes of the volume",
                        path.display()
                    ),
                    format!(
                        "if that is another device, correct the disk's path and restart the daemon; {}; if this disk never had \
                         metadata, or lost it: {}",
                        self.again("if the device was made smaller, give it its size back"),
                        self.give_up()
                    ),
                ),
                SuperblockError::Missing { path } => unusable(path, "is missing"),
                SuperblockError::Truncated { path, found } => {
                    unusable(path, &format!("is truncated: {found} bytes instead of {AREA_LEN}"))
                }
                SuperblockError::Unreadable { path, first, second } => {
                    unusable(path, &format!("is unreadable: copy 0 {first}; copy 1 {second}"))
                }
                SuperblockError::Format { .. } => {
                    (error.to_string(), "then start the daemon of that release".to_owned())
                }
                SuperblockError::WrongType { path } => (
                    format!("metadata {} is neither a file nor a block device", path.display()),
                    self.again("move it away, and put the disk's metadata back"),
                ),
                SuperblockError::Foreign { path, what, found, expected } => (
                    format!(
                        "metadata {} belongs to {what} {found}, the configuration says {expected}",
                        path.display()
                    ),
                    format!(
                        "put the right disk there, and {}; or correct the configuration and restart the daemon. The disk at \
                         this path belongs to another volume or node, so do not make new metadata for it",
                        self.opens_it()
                    ),
                ),
                SuperblockError::Locked { path } => (
                    format!("metadata {} is in use: another costandby runs with this disk", path.display()),
                    self.again("stop that one"),
                ),
                SuperblockError::Io { doing: "opening", path, source } => {
                    self.not_opened("metadata", path, source)
                }
                other => (other.to_string(), self.medium()),
            },
            MetadataError::Truncated { path, found, needed } => {
                unusable(path, &format!("is truncated: {found} bytes instead of {needed}"))
            }
            MetadataError::Moved { path } => (
                format!("metadata {} was made on a device of another size", path.display()),
                format!(
                    "{}; where that cannot be, {}",
                    self.again("give the device its size back"),
                    self.give_up()
                ),
            ),
            MetadataError::Geometry { .. } => (error.to_string(), self.give_up()),
        }
    }

    fn unflushed(&self, source: &DiskError, on_record: bool) -> (String, String) {
        let problem =
            format!("what was written before this start cannot be brought to stable storage: {source}");
        let record = if on_record {
            "the disk is on record as failed now, and will be copied from"
        } else {
            "that could not be put on record either, so do not restart the daemon before the disk is replaced: it would \
             take the disk for a good one. It has to be copied from"
        };
        let remedy = format!(
            "it may lack writes: {record} {}. Mend or replace the medium, make room where it is full, and {}",
            self.commands.peer,
            self.opens_it()
        );
        (problem, remedy)
    }

    /// The medium, or what it is reached by, does not answer as it should.
    fn medium(&self) -> String {
        format!(
            "{}; if the disk is lost, replace it, and {}",
            self.again("look into the kernel's log, and mend what it is reached by"),
            self.give_up()
        )
    }

    /// Something else than a disk is where the configuration has it.
    fn wrong_path(&self) -> String {
        format!(
            "correct its path in the configuration and restart the daemon; or put the disk where the path says, and {}",
            self.opens_it()
        )
    }

    fn opens_it(&self) -> String {
        format!("{} opens it without a restart", self.commands.here("connect"))
    }

    fn again(&self, step: &str) -> String {
        format!("{step}; then {}", self.opens_it())
    }

    /// The way that gives up what the disk holds, and what is known of that.
    fn give_up(&self) -> String {
        let peer = self.commands.peer;
        let worth = worth(peer, self.found);
        format!(
            "{} gives up what this disk holds, to be copied from {peer} ({worth}); then {}",
            self.commands.here("create --force"),
            self.opens_it()
        )
    }

    /// Who can serve until then, where this node's disk was the one that served.
    fn meanwhile(&self) -> Option<String> {
        let peer = self.commands.peer;
        let found = self.found.filter(|found| found.primary && !found.is_fresh())?;
        Some(if found.peer_has_current {
            format!(
                "until then {} on {peer}, which has the data by this disk's metadata, serves it",
                self.commands.there("promote")
            )
        } else {
            format!(
                "this node was primary without {peer}: {} would serve without what was written meanwhile",
                self.commands.there("promote")
            )
        })
    }
}

/// What stands where a disk should be, by the system's refusal to open it.
fn wrong_kind(errno: Option<Errno>, path: &Path) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match errno {
        Some(Errno::ISDIR) => "a directory, not a disk",
        Some(Errno::LOOP) => "a symbolic link that leads back to itself",
        Some(Errno::NOTDIR) => "below something that is no directory",
        Some(Errno::NAMETOOLONG) => "a path that is too long",
        _ if std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) => {
            "a socket, not a disk"
        }
        _ => "a device file without a device",
    }
}

#[cfg(test)]
mod tests;

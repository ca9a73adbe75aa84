//! The emulated disk's backing: a file, a block device or a memory file, mapped shared and read-write.
//!
//! Payloads are received into the mapping and replies are sent from it. This file opens the disk and makes the
//! calls that need the file itself: flush, holes, extents. A medium that fails (truncated file, EIO, full file
//! system) poisons the mapping instead of killing the daemon (`ffi::mapping`); from then on [`DiskImage::failure`]
//! says so and every flush fails.
//!
//! [`DiskImage::flush`], [`DiskImage::punch`] and [`DiskImage::zero`] block: call them on the disk's worker
//! threads.
//!
//! Pages that are registered with an RDMA device must not be replaced: punching a hole, and on most file systems
//! zeroing, puts other pages in their place, and the device would keep sending the old pages. Registered parts of a
//! range are zeroed in place and keep their blocks ([`Mapping::hold_unpinned`]).
//!
//! A failed disk may be detached ([`DiskImage::detach`]): memory takes its place at the same addresses, through which
//! requests then pass on their way to and from the peer.

use crate::units::ByteRange;
use costandby_ffi::mapping::{Mapping, Span};
use rustix::fs::{Advice, FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// What backs a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
    /// Anonymous memory: gone when the daemon ends.
    Memory,
}

/// Why a disk could not be opened, or stopped working.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open disk {path}: {source}")]
    Open {
        /// The disk.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// Another program has it.
    #[error(
        "disk {path} is in use: another costandby, QEMU or another program has it locked; stop that one, and let no two programs write to \
         one disk"
    )]
    Locked {
        /// The disk.
        path: PathBuf,
    },
    /// Neither a file nor a block device.
    #[error("disk {path} is neither a regular file nor a block device")]
    WrongType {
        /// The disk.
        path: PathBuf,
    },
    /// The file is shorter than the volume.
    #[error(
        "disk {path} has {found} bytes, its volume needs {needed}: was it truncated, or is `size` in the configuration wrong?"
    )]
    TooSmall {
        /// The disk.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it must have.
        needed: u64,
    },
    /// The kernel refuses the mapping.
    #[error("cannot map {len} bytes of disk {path}: {source}")]
    Map {
        /// The disk.
        path: PathBuf,
        /// Bytes asked for.
        len: u64,
        /// The system's word.
        source: std::io::Error,
    },
    /// A page could not be read or written.
    #[error(
        "disk {path} failed: a page of it could not be read or written (truncated file, I/O error or full file system)"
    )]
    Poisoned {
        /// The disk.
        path: PathBuf,
    },
    /// A system call on the file failed.
    #[error("disk {path} failed: {call}: {source}")]
    Call {
        /// The disk.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
    /// What is on record about the disk could not be stored.
    #[error(transparent)]
    Record(#[from] super::superblock::SuperblockError),
}

/// An open disk. Shared between the reactor (memory access) and the worker threads (file calls).
#[derive(Debug)]
pub struct DiskImage {
    path: PathBuf,
    file: OwnedFd,
    mapping: Arc<Mapping>,
    size: u64,
    backing: Backing,
    failed: AtomicBool,
    /// Held while a flush is under way. The system reports a failed write-back to one caller only: of two flushes at
    /// once, the other would succeed although some of what it was to cover is lost.
    flushing: Mutex<()>,
    /// Once detached: what the mapping is of.
    memory: OnceLock<OwnedFd>,
    /// When each call under way on the disk or its record began.
    calls: Mutex<Vec<Instant>>,
}

/// A call under way on a disk, until it is dropped.
#[derive(Debug)]
pub struct CallUnderWay<'a> {
    disk: &'a DiskImage,
    began: Instant,
}

impl Drop for CallUnderWay<'_> {
    fn drop(&mut self) {
        let mut calls = self.disk.calls.lock().expect("nobody panics with it");
        if let Some(at) = calls.iter().position(|began| *began == self.began) {
            calls.swap_remove(at);
        }
    }
}

/// A run of bytes that are either all backed by blocks or all a hole that reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where.
    pub range: ByteRange,
    /// Nothing is allocated here and it reads as zeros.
    pub hole: bool,
}

impl DiskImage {
    /// Opens and maps the first `size` bytes of the file or block device at `path`, and takes it for this process alone until
    /// the image and its mapping are dropped: a device as the kernel's only user of it (`O_EXCL`: no mount, no volume
    /// manager, no second daemon), a file by a lock that other daemons and QEMU respect. A file system without locks gives
    /// none, which is logged.
    ///
    /// # Errors
    /// [`DiskError`]: missing, of the wrong type, in use (`EBUSY` in [`DiskError::Open`], [`DiskError::Locked`]), too small,
    /// not mappable.
    pub fn open(path: &Path, size: u64) -> Result<Arc<Self>, DiskError> {
        let open_error = |source| DiskError::Open { path: path.into(), source };
        let mut options = File::options();
        if super::superblock::is_block_device(path) {
            options.custom_flags(i32::try_from(OFlags::EXCL.bits()).expect("open flags fit an int"));
        }
        let file = options.read(true).write(true).open(path).map_err(open_error)?;
        let stat = rustix::fs::fstat(&file).map_err(|e| open_error(e.into()))?;
        let (backing, found) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => (Backing::File, u64::try_from(stat.st_size).unwrap_or(0)),
            FileType::BlockDevice => (
                Backing::BlockDevice,
                rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| open_error(e.into()))?,
            ),
            _ => return Err(DiskError::WrongType { path: path.into() }),
        };
        if backing == Backing::File {
            lock(&file, path)?;
        }
        if found < size {
            return Err(DiskError::TooSmall { path: path.into(), found, needed: size });
        }
        Self::map(path.into(), file.into(), size, backing)
    }

    /// A disk in memory, all zeros.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn memory(name: &str, size: u64) -> Result<Arc<Self>, DiskError> {
        let path = PathBuf::from(format!("memory:{name}"));
        let create = || -> rustix::io::Result<OwnedFd> {
            let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
            rustix::fs::ftruncate(&file, size)?;
            Ok(file)
        };
        let file = create().map_err(|e| DiskError::Open { path: path.clone(), source: e.into() })?;
        Self::map(path, file, size, Backing::Memory)
    }

    fn map(path: PathBuf, file: OwnedFd, size: u64, backing: Backing) -> Result<Arc<Self>, DiskError> {
        let len = usize::try_from(size).expect("64-bit");
        let mapping = Mapping::map_file(&file, 0, len).map_err(|source| DiskError::Map {
            path: path.clone(),
            len: size,
            source,
        })?;
        Ok(Arc::new(Self {
            path,
            file,
            mapping,
            size,
            backing,
            failed: AtomicBool::new(false),
            flushing: Mutex::new(()),
            memory: OnceLock::new(),
            calls: Mutex::default(),
        }))
    }

    /// Bytes of the volume.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What backs it.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The mapped bytes of `range`.
    ///
    /// # Panics
    /// When the range leaves the disk: requests are checked before they get here.
    #[must_use]
    pub fn span(&self, range: ByteRange) -> Span {
        let index = |n: u64| usize::try_from(n).expect("64-bit");
        self.mapping.span(index(range.start), index(range.len))
    }

    /// All of its memory: what a device may be given to send from.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// What the mapping is of now.
    fn file(&self) -> BorrowedFd<'_> {
        self.memory.get().map_or(self.file.as_fd(), AsFd::as_fd)
    }

    /// Whether the volume can do without it once it failed: memory has nothing that memory could take the place of.
    #[must_use]
    pub fn is_detachable(&self) -> bool {
        self.backing != Backing::Memory && !self.is_detached()
    }

    /// Whether [`DiskImage::detach`] was called: the mapping is memory then, and holds only what passes through.
    #[must_use]
    pub fn is_detached(&self) -> bool {
        self.memory.get().is_some()
    }

    /// Gives the failed medium up for good: empty memory takes its place in the mapping, with the bytes of `keep` carried
    /// over. It has not failed any more then. Returns for each of `keep` whether its bytes were lost with the medium.
    ///
    /// The caller sees to it that nobody else uses the mapping meanwhile ([`Mapping::replace`]): no worker thread has
    /// a job of this disk.
    ///
    /// # Errors
    /// When the system has no memory for it; nothing has changed then.
    ///
    /// # Panics
    /// The second time, and when part of `keep` is not on the disk.
    pub fn detach(&self, keep: &[ByteRange]) -> Result<Vec<bool>, DiskError> {
        let index = |n: u64| usize::try_from(n).expect("64-bit");
        let keep: Vec<_> = keep.iter().map(|range| (index(range.start), index(range.len))).collect();
        let (memory, lost) = self.mapping.replace(&keep).map_err(|source| DiskError::Map {
            path: self.path.clone(),
            len: self.size,
            source,
        })?;
        self.memory.set(memory).expect("a disk is detached once");
        self.failed.store(false, Ordering::Relaxed);
        Ok(lost)
    }

    /// Of a detached disk: gives the memory of whole pages around `range` back; they read as zeroes then. A few
    /// microseconds, and no more for each MiB.
    pub fn give_back(&self, range: ByteRange) {
        let page = self.mapping.page_len() as u64;
        let start = range.start / page * page;
        let len = range.end().next_multiple_of(page) - start;
        if let Some(memory) = self.memory.get() {
            // Where that fails the memory stays: nothing is wrong but its amount.
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = rustix::fs::fallocate(memory, flags, start, len);
        }
    }

    /// Whether the medium failed; it stays so until the daemon opens it anew, or detaches it.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || self.mapping.is_poisoned()
    }

    /// The failure as an error, if there is one.
    ///
    /// # Errors
    /// [`DiskError::Poisoned`].
    pub fn failure(&self) -> Result<(), DiskError> {
        if self.is_failed() { Err(DiskError::Poisoned { path: self.path.clone() }) } else { Ok(()) }
    }

    /// Declares the medium failed (a system call on the mapping said `EFAULT`).
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Counts a call on the disk or its record, which may hang, from now on until what it returns is dropped.
    ///
    /// # Panics
    /// Never: who holds the lock does not panic.
    #[must_use]
    pub fn begin_call(&self) -> CallUnderWay<'_> {
        let began = Instant::now();
        self.calls.lock().expect("nobody panics with it").push(began);
        CallUnderWay { disk: self, began }
    }

    /// How long the oldest call under way has taken so far. A disk that was detached has none that matters.
    ///
    /// # Panics
    /// Never: who holds the lock does not panic.
    #[must_use]
    pub fn oldest_call(&self) -> Option<Duration> {
        let calls = self.calls.lock().expect("nobody panics with it");
        calls.iter().min().filter(|_| !self.is_detached()).map(Instant::elapsed)
    }

    /// Brings every byte written before the call to stable storage. Blocks.
    ///
    /// # Errors
    /// The system's error, or [`DiskError::TooSmall`] / [`DiskError::Poisoned`] where the file was cut under us: its
    /// pages are then gone although `fdatasync` itself succeeds. Any error declares the disk failed. A flush that waits
    /// for another one fails where that one failed.
    ///
    /// # Panics
    /// Where a flush panicked before, which has ended the process.
    pub fn flush(&self) -> Result<(), DiskError> {
        let _one_at_a_time = self.flushing.lock().expect("a panic has ended the process");
        self.failure()?;
        let result = self.flush_file();
        if result.is_err() {
            self.fail();
        }
        result
    }

    fn flush_file(&self) -> Result<(), DiskError> {
        if self.is_detached() {
            // There is nothing here to be made durable; who wants it durable asks the peer.
            return self.failure();
        }
        if self.backing != Backing::Memory {
            rustix::fs::fdatasync(&self.file).map_err(|e| self.call_error("fdatasync", e))?;
        }
        if self.backing == Backing::File {
            let stat = rustix::fs::fstat(&self.file).map_err(|e| self.call_error("fstat", e))?;
            let found = u64::try_from(stat.st_size).unwrap_or(0);
            if found < self.size {
                return Err(DiskError::TooSmall { path: self.path.clone(), found, needed: self.size });
            }
        }
        self.failure()
    }

    /// Makes `range` read as zeros and gives its blocks back, but for those under pages that a device has. Blocks.
    ///
    /// # Errors
    /// The system's; the disk is then failed.
    pub fn punch(&self, range: ByteRange) -> Result<(), DiskError> {
        self.clear(range, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
    }

    /// Makes `range` read as zeros and keeps its blocks. Blocks.
    ///
    /// # Errors
    /// The system's; the disk is then failed.
    pub fn zero(&self, range: ByteRange) -> Result<(), DiskError> {
        self.clear(range, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE)
    }

    fn clear(&self, range: ByteRange, flags: FallocateFlags) -> Result<(), DiskError> {
        self.failure()?;
        let span = self.span(range);
        let held = self.mapping.hold_unpinned(span.offset(), span.len());
        for (offset, len) in held.free() {
            self.fallocate_or_fill(&self.mapping.span(offset, len), flags)?;
        }
        let pinned: Vec<_> = held.pinned().collect();
        // Zeroing in place needs no hold, and who waits to register need not wait for it.
        drop(held);
        for (offset, len) in pinned {
            self.mapping.span(offset, len).fill_zero();
        }
        self.failure()
    }

    fn fallocate_or_fill(&self, part: &Span, flags: FallocateFlags) -> Result<(), DiskError> {
        // The mapping begins where the file does.
        match rustix::fs::fallocate(self.file(), flags, part.offset() as u64, part.len() as u64) {
            Ok(()) => Ok(()),
            // Not every file system and device can (EOPNOTSUPP; EINVAL from devices for odd alignments).
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                part.fill_zero();
                Ok(())
            }
            Err(e) => {
                self.fail();
                Err(self.call_error("fallocate", e))
            }
        }
    }

    /// Asks the kernel to read `range` into memory in the background. Does not wait for it.
    pub fn read_ahead(&self, range: ByteRange) {
        // Advice only: where it is not taken, the pages are read when they are touched.
        if let Some(len) = NonZeroU64::new(range.end().min(self.size).saturating_sub(range.start)) {
            let _ = rustix::fs::fadvise(&self.file, range.start, Some(len), Advice::WillNeed);
        }
    }

    /// Whether the backing has holes: fewer blocks than bytes.
    #[must_use]
    pub fn is_sparse(&self) -> bool {
        const STAT_BLOCK_LEN: u64 = 512;
        !self.is_detached()
            && self.backing != Backing::BlockDevice
            && rustix::fs::fstat(&self.file)
                .is_ok_and(|stat| u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK_LEN < self.size)
    }

    /// Whether `range` is known to have no blocks at all: then it reads as zeroes, and reading it could give it some. Cheap;
    /// says no where that takes a walk through the file (space that is reserved and was never written).
    #[must_use]
    pub fn is_hole(&self, range: ByteRange) -> bool {
        self.is_sparse()
            && self.is_whole()
            && match rustix::fs::seek(&self.file, SeekFrom::Data(range.start)) {
                Ok(data) => data >= range.end(),
                Err(error) => error == Errno::NXIO,
            }
    }

    /// The extent at `from`, cut at `end`. Where the backing cannot tell, everything is allocated; so it is where the disk
    /// failed or the file was cut short, as what is lost is no zeroes.
    #[must_use]
    pub fn extent_at(&self, from: u64, end: u64) -> Extent {
        let end = end.min(self.size);
        let allocated = |to: u64| Extent { range: ByteRange::new(from, to.min(end) - from), hole: false };
        if self.backing == Backing::BlockDevice || self.is_detached() || !self.is_whole() {
            return allocated(end);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(data) if data > from => {
                Extent { range: ByteRange::new(from, data.min(end) - from), hole: true }
            }
            Ok(_) => allocated(
                rustix::fs::seek(&self.file, SeekFrom::Hole(from)).map_or(end, |hole| hole.max(from + 1)),
            ),
            // ENXIO: no data from here to the end of the file.
            Err(Errno::NXIO) => Extent { range: ByteRange::new(from, end - from), hole: true },
            Err(_) => allocated(end),
        }
    }

    /// Whether the disk works and its file still has all of it.
    fn is_whole(&self) -> bool {
        !self.is_failed()
            && (self.backing != Backing::File
                || rustix::fs::fstat(&self.file)
                    .is_ok_and(|stat| u64::try_from(stat.st_size).unwrap_or(0) >= self.size))
    }

    fn call_error(&self, call: &'static str, source: Errno) -> DiskError {
        DiskError::Call { path: self.path.clone(), call, source: source.into() }
    }
}

/// Takes a disk's file for this process, as [`DiskImage::open`] does and `costandby create` before it touches one.
///
/// # Errors
/// [`DiskError::Locked`].
pub fn lock(file: &File, path: &Path) -> Result<(), DiskError> {
    match costandby_ffi::lock::lock_whole(file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(DiskError::Locked { path: path.into() }),
        Err(error) => {
            tracing::warn!(
                "disk {} cannot be locked: {error}; make sure that nothing else uses the file",
                path.display()
            );
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;

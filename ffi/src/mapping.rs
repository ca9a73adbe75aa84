//! Shared memory: disks, memory disks and rings, and the one handle on their bytes.
//!
//! Payloads land in a [`Mapping`] and leave from it; everything above this crate sees [`Span`]s of it and never a
//! slice, because a client's socket, the peer, a device or another process may write the bytes at any instant.
//!
//! Invariants:
//! - A span lies inside its mapping, and keeps it mapped. That is checked where a span is made, and nowhere later.
//! - No `&[u8]` or `&mut [u8]` over a mapping ever exists; bytes are reached by raw pointers, in `copy` and `crc` here
//!   and in the system calls of [`net`](crate::net).
//! - Every mapping is guarded for as long as it is mapped (`guard`): a page that cannot be had reads as zeroes
//!   and the mapping is poisoned for good. Ask [`Mapping::is_poisoned`] *after* an access and before its result is used.
//! - Pages that a device has are pinned ([`Mapping::pin`]), and whoever drops pages asks first
//!   ([`Mapping::hold_unpinned`]).
//!
//! Failures survived: a file truncated underneath, EIO of the medium, a full file system under a sparse file.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, FsWord, MemfdFlags};

use crate::guard::Guard;
use crate::{copy, crc};

mod pins;
mod replace;

use pins::Pins;
pub use pins::{PARTS_MAX, PINS_MAX, Pin, PinBusy, Unpinned};

/// `f_type` of hugetlbfs (statfs(2)), whose pages can only be replaced whole.
const HUGETLBFS: FsWord = 0x9584_58f6;

/// Memory shared with the kernel and with others, mapped readable and writable until dropped.
pub struct Mapping {
    /// Before `memory`: fields drop in this order, and a range is withdrawn from the guard before it is unmapped.
    guard: Guard,
    memory: MmapRaw,
    pins: Pins,
    /// Memory of its own has taken the file's place ([`Mapping::replace`]).
    replaced: AtomicBool,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `file_offset` on, shared and writable. Does not block on the medium.
    ///
    /// Bytes past the file's end are mapped too, and poison the mapping when touched: size the file first.
    /// No advice on access is given: the kernel's own read-around serves sequential clients and the background copy,
    /// and it stops reading around by itself once a mapping keeps missing; fixed "random" would cost the first a fault
    /// a page, fixed "sequential" would drop pages behind. Pages are kept out of core dumps, being clients' data.
    ///
    /// # Errors
    /// `InvalidInput` for an empty range or, on hugetlbfs, one that is not whole huge pages; otherwise what mmap(2) says.
    pub fn map_file(file: impl AsFd, file_offset: u64, len: usize) -> io::Result<Arc<Self>> {
        let file = file.as_fd();
        let page_len = page_len_of(file)?;
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping of no bytes"));
        }
        let huge = page_len > rustix::param::page_size();
        if huge && !(file_offset.is_multiple_of(page_len as u64) && len.is_multiple_of(page_len)) {
            let text = format!("{len} bytes from {file_offset} are not whole huge pages of {page_len} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let memory = MmapOptions::new().offset(file_offset).len(len).map_raw(file.as_raw_fd())?;
        Self::guarded(memory, page_len)
    }

    /// `len` bytes of zeroed memory, shareable and backed by memory alone: memory disks and tests.
    ///
    /// # Errors
    /// As [`Mapping::map_file`].
    pub fn anonymous(len: usize) -> io::Result<Arc<Self>> {
        let memory_file = rustix::fs::memfd_create("costandby", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory_file, len as u64)?;
        Self::map_file(memory_file, 0, len)
    }

    /// `len` bytes of zeroed memory mapped twice, back to back: bytes `i` and `i + len` are the same memory, so that
    /// whatever starts below `len` and is no longer than `len` is contiguous. [`Mapping::len`] is `2 * len`.
    ///
    /// Where the machine has free huge pages and `len` is whole ones, it consists of them ([`Mapping::page_len`]): a
    /// device then has a few dozen addresses to look up instead of thousands. They are taken at once, so none is missing
    /// later.
    ///
    /// # Errors
    /// `InvalidInput` unless `len` is a positive multiple of the page size; otherwise what mmap(2) says.
    pub fn ring(len: usize) -> io::Result<Arc<Self>> {
        let page_len = rustix::param::page_size();
        let both = len.checked_mul(2).filter(|both| *both > 0 && len.is_multiple_of(page_len));
        let Some(both) = both else {
            let text = format!("a ring of {len} bytes: it must be a positive multiple of {page_len}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        if let Some(ring) = Self::huge_ring(len, both) {
            return Ok(ring);
        }
        let memory_file = rustix::fs::memfd_create("costandby-ring", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory_file, len as u64)?;
        let room = MmapOptions::new().len(both).map_anon()?;
        Self::twice(room.into(), memory_file.as_fd(), len, page_len)
    }

    /// A ring of huge pages, if they can be had: of whatever size is the system's default.
    fn huge_ring(len: usize, both: usize) -> Option<Arc<Self>> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB;
        let memory_file = rustix::fs::memfd_create("costandby-ring", flags).ok()?;
        let page_len = page_len_of(memory_file.as_fd()).ok()?;
        if !len.is_multiple_of(page_len) {
            return None;
        }
        rustix::fs::ftruncate(&memory_file, len as u64).ok()?;
        rustix::fs::fallocate(&memory_file, FallocateFlags::empty(), 0, len as u64).ok()?;
        // Room for huge pages, so that it starts where one may; no page of its own is set aside for it.
        let bits = u8::try_from(page_len.ilog2()).ok()?;
        let room = MmapOptions::new().len(both).huge(Some(bits)).no_reserve_swap().map_anon().ok()?;
        Self::twice(room.into(), memory_file.as_fd(), len, page_len).ok()
    }

    /// Puts the file's first `len` bytes into both halves of `room`.
    fn twice(room: MmapRaw, file: BorrowedFd<'_>, len: usize, page_len: usize) -> io::Result<Arc<Self>> {
        assert_eq!(room.len(), 2 * len, "room for two");
        for copy in 0..2 {
            // SAFETY: `room` reserves twice `len` bytes that nothing refers to yet, and MAP_FIXED replaces exactly one
            // half of them. `room` unmaps the whole range when dropped, also if this fails half way. No device knows
            // of the range before it is handed out.
            let mapped = unsafe {
                libc::mmap(
                    room.as_mut_ptr().add(copy * len).cast(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    file.as_raw_fd(),
                    0,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Self::guarded(room, page_len)
    }

    fn guarded(memory: MmapRaw, page_len: usize) -> io::Result<Arc<Self>> {
        // A kernel that does not know the advice dumps more than it should, and nothing worse.
        let _ = memory.advise(Advice::DontDump);
        let start = memory.as_ptr().addr();
        // A file offset inside a page makes the mapping start inside a page.
        let base = start & !(page_len - 1);
        let end = (start + memory.len()).next_multiple_of(page_len);
        let guard = Guard::new(base, end - base, page_len)?;
        let pins = Pins::new(start - base, page_len);
        Ok(Arc::new(Self { guard, memory, pins, replaced: AtomicBool::new(false) }))
    }

    /// Bytes mapped; for a ring twice its memory.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Never: an empty mapping cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its pages: what the machine has, or huge ones.
    #[must_use]
    pub fn page_len(&self) -> usize {
        self.pins.page_len()
    }

    /// Whether a page could not be read or written since the mapping was made, and zeroes stand in its place, or
    /// [`Mapping::poison`] was called. Then no byte of it is to be trusted, stored or sent, but for those that
    /// [`Span::is_lost`] clears. Goes back by [`Mapping::replace`] alone.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.guard.is_poisoned()
    }

    /// Marks the mapping as failed: for who learns it from a system call (`EFAULT`) instead of an access.
    pub fn poison(&self) {
        self.guard.poison();
    }

    /// The bytes `offset..offset + len`.
    ///
    /// # Panics
    /// When they are not all inside the mapping.
    #[must_use]
    pub fn span(self: &Arc<Self>, offset: usize, len: usize) -> Span {
        check(offset, len, self.len());
        Span { mapping: Arc::clone(self), offset, len }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("len", &self.len()).field("poisoned", &self.is_poisoned()).finish()
    }
}

/// Bytes of the pages behind `file`: huge on hugetlbfs, the machine's elsewhere.
fn page_len_of(file: BorrowedFd<'_>) -> io::Result<usize> {
    let system = rustix::fs::fstatfs(file)?;
    if system.f_type != HUGETLBFS {
        return Ok(rustix::param::page_size());
    }
    usize::try_from(system.f_bsize).map_err(io::Error::other)
}

fn check(offset: usize, len: usize, bound: usize) {
    let inside = offset.checked_add(len).is_some_and(|end| end <= bound);
    assert!(inside, "bytes {offset}+{len} of {bound}");
}

/// A range of a mapping's bytes, which it keeps mapped. Cheap to clone. Whoever holds one may read and write the bytes
/// whatever others do; that nobody else does where it matters is the business of the datapath's range locks.
#[derive(Clone, Debug)]
pub struct Span {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl Span {
    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts in its mapping.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// What it is a part of.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Its bytes `start..start + len`.
    ///
    /// # Panics
    /// When they are not all inside the span.
    #[must_use]
    pub fn sub(&self, start: usize, len: usize) -> Self {
        check(start, len, self.len);
        Self { mapping: Arc::clone(&self.mapping), offset: self.offset + start, len }
    }

    /// Whether zeroes stand in for a page of it. To be asked *after* its bytes were looked at, like
    /// [`Mapping::is_poisoned`], of which it is the finer answer: a page that was not needed since it was lost is not
    /// known to be.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_poisoned() && self.mapping.guard.is_lost(self.as_ptr().addr(), self.len)
    }

    /// First byte. Valid for `len` bytes of reads and writes while `self` lives; never to become a reference.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `offset + len` is within the mapping (checked by `Mapping::span` and `sub`).
        unsafe { self.mapping.memory.as_mut_ptr().add(self.offset) }
    }

    /// CRC-32C of the bytes. A writer at the same time makes it the sum of some mixture.
    #[must_use]
    pub fn crc32c(&self) -> u32 {
        // SAFETY: `self` keeps its bytes mapped; concurrent writers and devices are allowed by `crc`.
        unsafe { crc::crc32c(self.as_ptr(), self.len) }
    }

    /// Copies the bytes to `dst`. If the two overlap, `dst` holds a mixture afterwards.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy_to(&self, dst: &Self) {
        assert_eq!(self.len, dst.len, "copy between spans of different lengths");
        // SAFETY: both spans keep their bytes mapped and no reference to them exists; concurrent accesses of others,
        // devices among them, are allowed by `copy`.
        unsafe { copy::copy(self.as_ptr(), dst.as_ptr(), self.len) }
    }

    /// Copies the bytes out.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn read_into(&self, bytes: &mut [u8]) {
        assert_eq!(self.len, bytes.len(), "read of a span into a buffer of another length");
        // SAFETY: the span keeps its bytes mapped; `bytes` is borrowed exclusively and is not mapped memory.
        unsafe { copy::copy(self.as_ptr(), bytes.as_mut_ptr(), self.len) }
    }

    /// Copies `bytes` in.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn write_from(&self, bytes: &[u8]) {
        assert_eq!(self.len, bytes.len(), "write to a span from a buffer of another length");
        // SAFETY: as in `read_into`, the other way; nothing refers to the span's bytes.
        unsafe { copy::copy(bytes.as_ptr(), self.as_ptr(), self.len) }
    }

    /// Brings its pages into memory and into the process's table of pages, writable; bytes that are there stay as they
    /// are. Blocks for as long as that takes: the pages of a memory file are cleared.
    ///
    /// # Errors
    /// `OutOfMemory` and whatever else madvise(2) says. A kernel that does not know how (before 5.14) does nothing, and
    /// pages come when they are first touched.
    pub fn make_resident(&self) -> io::Result<()> {
        let page_len = self.mapping.page_len();
        let start = self.as_ptr().map_addr(|address| address & !(page_len - 1));
        let len = self.as_ptr().addr() + self.len - start.addr();
        // SAFETY: the pages are mapped for as long as `self` lives. The advice changes no byte of them.
        let code = unsafe { libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE) };
        match (code, io::Error::last_os_error()) {
            (0, _) => Ok(()),
            (_, error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            (_, error) => Err(error),
        }
    }

    /// Writes zeroes. Pages stay allocated: a registered range must not lose its pages.
    pub fn fill_zero(&self) {
        // SAFETY: the span keeps its bytes mapped and no reference to them exists.
        unsafe { copy::zero(self.as_ptr(), self.len) }
    }

    /// Whether every byte was zero when it was looked at.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        // SAFETY: the span keeps its bytes mapped.
        unsafe { copy::is_zero(self.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests;

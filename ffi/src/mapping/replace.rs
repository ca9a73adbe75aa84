//! Replaces a failed file's mapping by memory at the same addresses.
//!
//! A volume outlives its disk: spans, links and connections hold addresses of the mapping, and all of them stay valid when
//! fresh memory takes the place of the file's pages. What stands in it is worth nothing, but for the ranges that are
//! carried over, which requests still need.
//!
//! Not for mappings of which a device holds pages: it would go on with the old ones. Who registers memory asks
//! [`Mapping::is_replaced`] and ends what it registered before.

use super::Mapping;
use crate::copy;
use memmap2::MmapOptions;
use rustix::fs::MemfdFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;

impl Mapping {
    /// Puts zeroed memory in the place of what is mapped, carries the bytes of `keep` (offset and length) over, and takes
    /// the poison back. Returns the memory file, in which byte `i` is byte `i` of the mapping, and for each of `keep`
    /// whether it was [lost](super::Span::is_lost) before it could be carried over. On error nothing has changed.
    ///
    /// While it runs nobody else may read or write the mapping's bytes: what is written meanwhile may be gone, and a fault
    /// meanwhile would be taken for one of the new memory. Nothing worse comes of it. A ring stops being one.
    ///
    /// # Errors
    /// `InvalidInput` for a mapping that begins inside a page; what memfd_create(2) and mmap(2) say.
    ///
    /// # Panics
    /// When one of `keep` leaves the mapping.
    pub fn replace(&self, keep: &[(usize, usize)]) -> io::Result<(OwnedFd, Vec<bool>)> {
        let page_len = self.page_len();
        if !self.memory.as_ptr().addr().is_multiple_of(page_len) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping that begins inside a page"));
        }
        // What mmap(2) rounds up to, so that no page of before is left at the end.
        let len = self.len().next_multiple_of(page_len);
        let file = rustix::fs::memfd_create("costandby-diskless", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, len as u64)?;
        let aside = MmapOptions::new().len(len).map_raw(file.as_fd().as_raw_fd())?;
        let mut lost = Vec::with_capacity(keep.len());
        for &(offset, len) in keep {
            super::check(offset, len, self.len());
            // SAFETY: both ranges were checked against mappings of that length, which live to the end of this function;
            // no reference to either's bytes exists, and others' accesses at the same time are allowed by `copy`.
            unsafe { copy::copy(self.memory.as_ptr().add(offset), aside.as_mut_ptr().add(offset), len) };
            lost.push(self.is_poisoned() && self.guard.is_lost(self.memory.as_ptr().addr() + offset, len));
        }
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: MAP_FIXED replaces exactly the pages of this mapping, which owns them until it is dropped and then
        // unmaps them all the same. Spans hold addresses only, never references, and expect their bytes to change at any
        // time; the kernel swaps the pages in one step, so an access at the same time finds the old or the new ones.
        // A device that registered old pages keeps those, and does not touch these.
        let mapped = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(self.memory.as_mut_ptr().cast(), len, prot, flags, file.as_fd().as_raw_fd(), 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let _ = self.memory.advise(memmap2::Advice::DontDump);
        self.replaced.store(true, SeqCst);
        self.guard.forget_losses();
        Ok((file, lost))
    }

    /// Whether [`Mapping::replace`] was called. Pages of such a mapping come and go: registering them is no use, and what
    /// was registered before is of other pages.
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.replaced.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::sync::Arc;

    const PAGE: usize = 4096;

    fn mapped(pages: usize) -> (tempfile::TempDir, File, Arc<Mapping>) {
        let dir = tempfile::tempdir().expect("a directory");
        let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("disk"));
        let file = file.expect("a file");
        file.set_len((pages * PAGE) as u64).expect("its length");
        let mapping = Mapping::map_file(&file, 0, pages * PAGE).expect("mapped");
        (dir, file, mapping)
    }

    #[test]
    fn spans_stay_valid_over_fresh_memory_that_keeps_what_is_asked_for() {
        let (_dir, file, mapping) = mapped(8);
        let whole = mapping.span(0, 8 * PAGE);
        whole.write_from(&[7; 8 * PAGE]);
        file.set_len(4 * PAGE as u64).expect("cut short");
        assert!(!whole.is_lost(), "nothing was needed yet");
        let mut byte = [1];
        mapping.span(6 * PAGE + 5, 1).read_into(&mut byte);
        assert_eq!(byte, [0]);
        assert!(mapping.is_poisoned() && whole.is_lost());
        assert!(mapping.span(7 * PAGE - 1, 1).is_lost() && mapping.span(6 * PAGE, 1).is_lost());
        assert!(!mapping.span(0, 6 * PAGE).is_lost() && !mapping.span(7 * PAGE, PAGE).is_lost());

        let (memory, lost) = mapping.replace(&[(PAGE, 100), (5 * PAGE - 10, 20)]).expect("memory");
        assert_eq!(lost, [false, true], "the second page was met on the way");
        assert!(mapping.is_replaced() && !mapping.is_poisoned() && !whole.is_lost());
        let mut bytes = [9; 100];
        mapping.span(PAGE, 100).read_into(&mut bytes);
        assert_eq!(bytes, [7; 100]);
        assert!(mapping.span(PAGE + 100, 100).is_zero(), "what is not kept is gone");
        // Through the old span into the new memory, and nowhere else.
        whole.write_from(&[3; 8 * PAGE]);
        let mut there = [0; 10];
        rustix::io::pread(&memory, &mut there, 7 * PAGE as u64).expect("read");
        assert_eq!(there, [3; 10]);
        let mut old = [0; 10];
        rustix::io::pread(&file, &mut old, 0).expect("read");
        assert_eq!(old, [7; 10]);
        assert!(!mapping.is_poisoned());
    }

    #[test]
    fn more_losses_than_can_be_remembered_lose_everything() {
        let (_dir, file, mapping) = mapped(64);
        file.set_len(PAGE as u64).expect("cut short");
        let mut byte = [1];
        for page in 1..=16 {
            mapping.span(page * PAGE, 1).read_into(&mut byte);
        }
        assert!(!mapping.span(0, PAGE).is_lost());
        mapping.span(17 * PAGE, 1).read_into(&mut byte);
        assert!(mapping.span(0, PAGE).is_lost());
    }
}

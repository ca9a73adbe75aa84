//! Disks that forget: what of a disk is on stable storage, and what only in memory.
//!
//! A [`SimDisk`] is a production [`DiskImage`] in memory, which stands for the page cache, and a shadow of what the medium
//! holds. A flush brings to the shadow what stood in the cache when it began; pages may go there by themselves at any
//! time. When power fails, of each page that differs the medium has the old, the new, or some sectors of each. The end of
//! a process alone loses nothing. `metadata.rs` does the same for the metadata.

use crate::Rng;
use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::units::ByteRange;
use std::sync::Arc;

/// What a medium writes whole, whatever happens.
pub(super) const SECTOR_LEN: usize = 512;
const PAGE_LEN: usize = 4096;

/// The bytes that change `id` leaves in `sector`.
pub(super) fn pattern(id: u64, sector: usize) -> [u8; SECTOR_LEN] {
    let mut bytes = [0; SECTOR_LEN];
    for (at, pair) in bytes.chunks_mut(16).enumerate() {
        pair[..8].copy_from_slice(&id.to_le_bytes());
        pair[8..].copy_from_slice(&((sector as u64) << 8 | at as u64).to_le_bytes());
    }
    bytes
}

/// What stood in the cache when a flush began.
#[derive(Debug)]
pub(super) struct FlushBegun {
    content: Vec<u8>,
    serial: u64,
}

/// A disk and its medium.
#[derive(Debug)]
pub(super) struct SimDisk {
    name: String,
    pub(super) image: Arc<DiskImage>,
    /// What is on the medium.
    pub(super) shadow: Vec<u8>,
    /// How old what the medium has of each page is, so that a flush that began before does not take it back.
    written: Vec<u64>,
    serial: u64,
}

fn filled(name: &str, content: &[u8]) -> Arc<DiskImage> {
    let image = DiskImage::memory(name, content.len() as u64).expect("memory for a disk");
    for (at, page) in content.chunks(PAGE_LEN).enumerate() {
        if page.iter().any(|&byte| byte != 0) {
            image.span(ByteRange::new((at * PAGE_LEN) as u64, page.len() as u64)).write_from(page);
        }
    }
    image
}

impl SimDisk {
    pub(super) fn new(name: &str, content: &[u8]) -> Self {
        let written = vec![0; content.len().div_ceil(PAGE_LEN)];
        Self {
            name: name.to_owned(),
            image: filled(name, content),
            shadow: content.to_vec(),
            written,
            serial: 0,
        }
    }

    pub(super) fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.shadow.len()];
        self.image.span(ByteRange::new(0, self.image.size())).read_into(&mut content);
        content
    }

    pub(super) fn read(&self, range: ByteRange) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.len).expect("small")];
        self.image.span(range).read_into(&mut bytes);
        bytes
    }

    pub(super) fn begin_flush(&mut self) -> FlushBegun {
        self.serial += 1;
        FlushBegun { content: self.content(), serial: self.serial }
    }

    pub(super) fn end_flush(&mut self, begun: &FlushBegun) {
        for (at, page) in begun.content.chunks(PAGE_LEN).enumerate() {
            if self.written[at] <= begun.serial {
                self.shadow[at * PAGE_LEN..][..page.len()].copy_from_slice(page);
                self.written[at] = begun.serial;
            }
        }
    }

    /// The kernel writes some pages back unasked.
    pub(super) fn write_back(&mut self, rng: &mut Rng) {
        self.serial += 1;
        for _ in 0..=rng.below(8) {
            let at = usize::try_from(rng.below(self.written.len() as u64)).expect("small");
            let start = at * PAGE_LEN;
            let len = PAGE_LEN.min(self.shadow.len() - start);
            let page = self.read(ByteRange::new(start as u64, len as u64));
            self.shadow[start..start + len].copy_from_slice(&page);
            self.written[at] = self.serial;
        }
    }

    /// Opened anew by the next process: what the cache holds is kept.
    pub(super) fn reopen(&mut self) {
        if self.image.is_failed() {
            self.image = filled(&self.name, &self.content());
        }
    }

    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        let cache = self.content();
        for (at, page) in cache.chunks(PAGE_LEN).enumerate() {
            let stored = &mut self.shadow[at * PAGE_LEN..][..page.len()];
            if stored == page {
                continue;
            }
            let fate = rng.below(4);
            for (new, old) in page.chunks(SECTOR_LEN).zip(stored.chunks_mut(SECTOR_LEN)) {
                if fate == 0 || (fate == 1 && rng.below(2) == 0) {
                    old.copy_from_slice(new);
                }
            }
        }
        self.image = filled(&self.name, &self.shadow);
    }
}

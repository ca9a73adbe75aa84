//! Disks that forget: what of a disk or of its metadata is on stable storage, and what only in memory.
//!
//! A [`SimDisk`] is a production [`DiskImage`] in memory, which stands for the page cache, and a shadow of what the medium
//! holds. A flush brings to the shadow what stood in the cache when it began; pages may go there by themselves at any
//! time. When power fails, of each page that differs the medium has the old, the new, or some sectors of each. The
//! metadata is the production [`MetaStore`] on a memory file, with a shadow alike. The end of a process alone loses
//! neither.

use crate::Rng;
use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::disk::superblock::{
    AREA_LEN, DiskState, Location, MetaStore, Opened, SUPERBLOCK_LEN, Superblock,
};
use costandby_datapath::units::ByteRange;
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

/// What a medium writes whole, whatever happens.
pub(super) const SECTOR_LEN: usize = 512;
const PAGE_LEN: usize = 4096;

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

/// A disk's metadata and its medium.
#[derive(Debug)]
pub(super) struct SimMeta {
    file: File,
    shadow: Vec<u8>,
    record: Record,
}

impl SimMeta {
    pub(super) fn new(superblock: &Superblock) -> Self {
        let file = rustix::fs::memfd_create("sim-meta", MemfdFlags::CLOEXEC).expect("a memory file");
        let file = File::from(file);
        file.set_len(AREA_LEN).expect("memory");
        let shadow = vec![0; usize::try_from(AREA_LEN).expect("small")];
        let mut meta = Self { file, shadow, record: Record::default() };
        meta.recreate(superblock);
        meta
    }

    /// As `costandby create --force` does.
    pub(super) fn recreate(&mut self, superblock: &Superblock) {
        for (sequence, at) in [(1, 0), (2, SUPERBLOCK_LEN as u64)] {
            self.file.write_all_at(&superblock.encode(sequence), at).expect("memory holds it");
        }
        self.settle();
    }

    fn location(&self) -> Location {
        Location { path: PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd())), offset: 0 }
    }

    /// As a daemon opens it, which begins by syncing what the one before may have left in the cache.
    pub(super) fn open(&mut self, node: &str, size: u64) -> Result<Opened, String> {
        let opened = MetaStore::open_for(&self.location(), "db", node, size);
        self.settle();
        opened.map_err(|error| error.to_string())
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.shadow.len()];
        self.file.read_exact_at(&mut content, 0).expect("as long as it was made");
        content
    }

    /// What was written has reached the medium.
    pub(super) fn settle(&mut self) {
        self.shadow = self.content();
        self.record = Record::newest(&self.shadow);
    }

    /// What was written last never reached the cache: the process ended before.
    pub(super) fn take_back(&mut self) {
        self.file.write_all_at(&self.shadow, 0).expect("memory");
    }

    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        let cache = self.content();
        for (new, old) in cache.chunks(SECTOR_LEN).zip(self.shadow.chunks_mut(SECTOR_LEN)) {
            if new != old && rng.below(2) == 0 {
                old.copy_from_slice(new);
            }
        }
        self.take_back();
        self.record = Record::newest(&self.shadow);
    }

    /// What the newest good copy on the medium says.
    pub(super) fn durable(&self) -> Record {
        self.record
    }
}

/// What rules need to know of a superblock.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Record {
    pub(super) epoch: u64,
    pub(super) generation: u64,
    pub(super) primary: bool,
    pub(super) applying: bool,
    /// Going on alone is not on record: the peer counts as equal.
    pub(super) peer_has_current: bool,
    /// The content is one state of the volume, not a mixture.
    pub(super) up_to_date: bool,
}

impl Record {
    fn newest(area: &[u8]) -> Self {
        let copies = [0, SUPERBLOCK_LEN].map(|at| Superblock::decode(&area[at..at + SUPERBLOCK_LEN]).ok());
        let newest = copies.into_iter().flatten().max_by_key(|(_, sequence)| *sequence);
        let (superblock, _) = newest.expect("one of two copies is good");
        Self {
            epoch: superblock.epoch.0,
            generation: superblock.generations.current.0,
            primary: superblock.primary,
            applying: superblock.applying,
            peer_has_current: superblock.peer_has_current,
            up_to_date: superblock.disk_state == DiskState::UpToDate,
        }
    }
}

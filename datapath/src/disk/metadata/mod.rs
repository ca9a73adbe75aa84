//! The metadata area of a disk: superblocks, activity log and dirty bitmap on stable storage (format 2).
//!
//! [`create`] makes an area, [`open`] reads one and hands out its two halves: the
//! [`SuperblockStore`] for control, whose stores are rare and ordered, and the [`AreaStore`] for the disk's worker
//! threads, which store the transactions and blocks that the sans-IO [`ActivityLog`] and [`DirtyBitmap`] give them. Both
//! write through one [`Medium`]. `docs/METADATA.md` is the format.
//!
//! **After a crash** [`open`] gives the dirty bitmap with every hot extent marked in it; [`Opened::recover`] puts that on
//! record and then empties the log. It must end before anything is served. Doing it twice does the same as once.
//!
//! Invariants: a call that stores returns only when it is on stable storage; the newest good superblock is never at
//! risk; what cannot be read counts as dirty, never as clean; one open area holds an exclusive lock.
//!
//! Survives: power loss during any store, one damaged superblock copy, damage anywhere in the bitmap (those grains are
//! dirty) or the log (everything is dirty), another disk's metadata, truncation, a newer format. After a store that
//! failed nothing more is stored by either half: a second `fdatasync` may claim success for what the first one lost. A
//! daemon that starts after that, without a boot in between, writes all it finds anew before it trusts it.
//!
//! Everything here blocks; never call it from the reactor's thread.

use super::activity_log::{ActivityLog, Transaction, ring};
use super::dirty_bitmap::{DirtyBitmap, DirtyBlock};
use super::superblock::{COPIES, CopyError, GIVE_UP, SUPERBLOCK_LEN, Superblock, SuperblockError};
use crate::limits::{DAMAGE_LISTED_MAX, DIRTY_STORE_BLOCKS_MAX};
use crate::units::ByteRange;
use header::{Header, Newest, Shape};
use layout::{ACTIVITY_LEN, BLOCK_WORDS, Geometry, GeometryError, Layout, SECTOR_BITS, SECTOR_WORDS};
use medium::Medium;
use sector::{BLOCK_LEN, PAYLOAD_LEN, Place, SECTOR_LEN, SECTORS_PER_BLOCK, Sector, SectorFault, SectorKind};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub mod file;
pub mod header;
pub mod inspect;
pub mod layout;
pub mod medium;
pub mod place;
pub mod sector;
#[cfg(test)]
mod tests;

/// Blocks read or zeroed in one call: 256 KiB.
const STRIDE_BLOCKS: usize = 64;

/// Why metadata cannot be made, read or stored.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The superblocks cannot be made, read or stored, or any part cannot be reached.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The area does not fit, or no area of this shape can be.
    #[error("metadata {path}: {source}")]
    Geometry {
        /// Which file or device.
        path: PathBuf,
        /// Why.
        source: GeometryError,
    },
    /// Shorter than its superblock says.
    #[error(
        "metadata {path} is truncated: {found} bytes instead of {needed}; never put an older copy of it there; {GIVE_UP}"
    )]
    Truncated {
        /// Which file or device.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it had.
        needed: u64,
    },
    /// The bitmap is not where a device of this size has it.
    #[error(
        "metadata {path} was made on a device of another size: give the device its former size back; if that is impossible, {GIVE_UP}"
    )]
    Moved {
        /// Which device.
        path: PathBuf,
    },
}

/// What was wrong with the bitmap as it was read; those grains are dirty now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DirtyDamage {
    /// Sectors that could not be believed.
    pub sectors: u64,
    /// The first few: which bytes of the volume they stood for, and what was wrong.
    pub first: Vec<(ByteRange, SectorFault)>,
}

/// What [`open`] found that somebody may want to know.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Which superblock copy was damaged and how; the next store replaces it.
    pub damaged_copy: Option<(usize, CopyError)>,
    /// Extents that were hot.
    pub hot_extents: usize,
    /// A transaction was under way when the daemon before this one stopped.
    pub torn_transaction: bool,
    /// The activity log is damaged: everything is dirty.
    pub activity_damage: Option<ring::Damage>,
    /// The bitmap is damaged in places: those are dirty.
    pub dirty_damage: DirtyDamage,
}

/// What both halves share.
#[derive(Debug)]
struct Shared<M> {
    medium: M,
    offset: u64,
    layout: Layout,
    shape: Shape,
    /// Whether a store failed. Held during a store: the system reports a lost write to one sync only, which must be that
    /// of whoever wrote it.
    failed: Mutex<bool>,
    /// Number of a transaction on stable storage.
    activity_known: AtomicU64,
}

impl<M: Medium> Shared<M> {
    fn io(&self, doing: &'static str) -> impl Fn(io::Error) -> SuperblockError {
        let path = self.medium.path().to_owned();
        move |source| SuperblockError::Io { doing, path: path.clone(), source }
    }

    /// Writes and syncs; after a failure never again.
    fn store(&self, doing: &'static str, pieces: &[(u64, &[u8])]) -> Result<(), SuperblockError> {
        let mut failed = self.failed.lock().expect("nobody panics with it");
        if *failed {
            return Err(SuperblockError::FailedBefore { path: self.medium.path().into() });
        }
        let write = |&(at, bytes): &(u64, &[u8])| self.medium.write(at, bytes);
        pieces.iter().try_for_each(write).and_then(|()| self.medium.sync()).map_err(|error| {
            *failed = true;
            self.io(doing)(error)
        })
    }
}

/// Control's half: stores superblocks. Blocking.
#[derive(Debug)]
pub struct SuperblockStore<M> {
    shared: Arc<Shared<M>>,
    newest: usize,
    sequence: u64,
}

impl<M: Medium> SuperblockStore<M> {
    /// Replaces the older copy and then, once that is on stable storage, the other one: a bit that turns later in either
    /// must not bring back the state before, which may deny that this node went on alone. When this returns `Ok`,
    /// `superblock` is on stable storage twice and is what a restart reads.
    ///
    /// # Errors
    /// [`SuperblockError::Io`] once, then [`SuperblockError::FailedBefore`]: the disk must be taken as failed.
    pub fn store(&mut self, superblock: &Superblock) -> Result<(), SuperblockError> {
        let shared = &self.shared;
        let shape = Shape { activity_known: shared.activity_known.load(Ordering::SeqCst), ..shared.shape };
        for copy in [1 - self.newest, self.newest] {
            let block = Header::encode(superblock, &shape, self.sequence + 1);
            shared.store("storing", &[(shared.offset + COPIES[copy], &block)])?;
            self.newest = copy;
            self.sequence += 1;
        }
        Ok(())
    }
}

/// The disk workers' half: stores transactions and bitmap blocks. Blocking; may be shared by threads.
#[derive(Debug)]
pub struct AreaStore<M> {
    shared: Arc<Shared<M>>,
    /// Number of the next store of bitmap blocks; only for people who look at the sectors.
    counter: AtomicU64,
}

impl<M: Medium> AreaStore<M> {
    /// Stores a transaction of the activity log. When this returns `Ok`, tell [`ActivityLog::committed`].
    ///
    /// # Errors
    /// As [`SuperblockStore::store`].
    pub fn commit(&self, transaction: &Transaction) -> Result<(), SuperblockError> {
        let at = self.shared.layout.activity_at + transaction.at;
        self.shared.store("writing the activity log of", &[(at, transaction.block.as_slice())])?;
        self.shared.activity_known.fetch_max(transaction.ticket.0, Ordering::SeqCst);
        Ok(())
    }

    /// Stores blocks of the bitmap with one sync. When this returns `Ok`, tell [`DirtyBitmap::stored`] of each.
    ///
    /// # Errors
    /// As [`SuperblockStore::store`].
    pub fn store_dirty(&self, blocks: &[DirtyBlock]) -> Result<(), SuperblockError> {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        let sealed: Vec<_> = blocks.iter().map(|block| self.seal(block, counter)).collect();
        let pieces: Vec<_> = sealed.iter().map(|(at, bytes)| (*at, bytes.as_slice())).collect();
        self.shared.store("writing the dirty bitmap of", &pieces)
    }

    fn seal(&self, block: &DirtyBlock, counter: u64) -> (u64, Box<[u8; BLOCK_LEN]>) {
        let mut bytes = Box::new([0; BLOCK_LEN]);
        let first = block.index * SECTORS_PER_BLOCK;
        let sectors = bytes.chunks_exact_mut(SECTOR_LEN).zip(block.words.chunks_exact(SECTOR_WORDS));
        for (index, (sector, words)) in (first as u64..).zip(sectors) {
            let mut payload = [0; PAYLOAD_LEN];
            for (bytes, word) in payload.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            sector.copy_from_slice(&dirty_place(self.shared.shape.area, index).seal(counter, &payload));
        }
        (self.shared.layout.dirty_at + (block.index * BLOCK_LEN) as u64, bytes)
    }

    /// Stores everything that `dirty` has unsaved.
    ///
    /// # Errors
    /// As [`SuperblockStore::store`]; what was not stored stays unsaved.
    pub fn store_unsaved(&self, dirty: &mut DirtyBitmap) -> Result<(), SuperblockError> {
        loop {
            let blocks = dirty.take_unsaved(DIRTY_STORE_BLOCKS_MAX);
            if blocks.is_empty() {
                return Ok(());
            }
            let result = self.store_dirty(&blocks);
            for block in &blocks {
                match &result {
                    Ok(()) => dirty.stored(block.index),
                    Err(_) => dirty.not_stored(block.index),
                }
            }
            result?;
        }
    }
}

fn dirty_place(area: u64, index: u64) -> Place {
    Place { kind: SectorKind::Dirty, area, index }
}

/// An open, locked metadata area.
#[derive(Debug)]
pub struct Opened<M> {
    /// Control's half.
    pub superblocks: SuperblockStore<M>,
    /// The disk workers' half.
    pub area: AreaStore<M>,
    /// The newest good superblock.
    pub superblock: Superblock,
    /// What the peer may lack, hot extents included.
    pub dirty: DirtyBitmap,
    /// The log as it was found.
    pub activity: ActivityLog,
    /// What was found on the way.
    pub report: Report,
}

impl<M: Medium> Opened<M> {
    /// Puts what the crash left dirty on record, and empties the log. Before anything is served; a crash in the middle
    /// of it loses nothing, and it can be done again.
    ///
    /// # Errors
    /// As [`SuperblockStore::store`].
    pub fn recover(&mut self) -> Result<(), SuperblockError> {
        self.area.store_unsaved(&mut self.dirty)?;
        if self.report.activity_damage.is_some() {
            // All is dirty and on record, so the order of these does not matter.
            let before = self.activity.durable().0;
            for transaction in ring::blank_ring(self.area.shared.shape.area, before) {
                self.area.commit(&transaction)?;
                self.activity = ActivityLog::new(
                    self.activity.geometry(),
                    self.area.shared.shape.area,
                    transaction.ticket.0,
                );
            }
            return Ok(());
        }
        if self.report.hot_extents == 0 && !self.report.torn_transaction {
            return Ok(());
        }
        self.activity.begin_checkpoint();
        self.activity.end_checkpoint();
        self.activity.retire_idle();
        while let Some(transaction) = self.activity.next_transaction() {
            self.area.commit(&transaction)?;
            self.activity.committed(transaction.ticket);
        }
        Ok(())
    }
}

/// Makes the metadata of a new disk on `medium`, the superblocks at `offset` (0 in a file of its own). `area` is a random
/// number. Everything is on stable storage when this returns; the superblocks are written last.
///
/// # Errors
/// [`SuperblockError::Exists`] where there is a superblock and not `force`; [`MetadataError`].
pub fn create<M: Medium>(
    medium: &M,
    offset: u64,
    superblock: &Superblock,
    geometry: Geometry,
    area: u64,
    force: bool,
) -> Result<(), MetadataError> {
    let path = medium.path();
    let io = |doing| move |source| SuperblockError::Io { doing, path: path.to_owned(), source };
    assert_eq!(superblock.size, geometry.size(), "the geometry is made for this volume");
    let layout = Layout::new(geometry, offset)
        .map_err(|source| MetadataError::Geometry { path: path.into(), source })?;
    if !force && medium.len().map_err(io("reading"))? >= layout.end {
        for at in COPIES {
            let mut copy = [0; SUPERBLOCK_LEN];
            medium.read(offset + at, &mut copy).map_err(io("reading"))?;
            if copy.starts_with(&super::superblock::MAGIC) {
                return Err(SuperblockError::Exists { path: path.into() }.into());
            }
        }
    }
    medium.grow(layout.end).map_err(io("creating"))?;
    let shape = shape_at(area, geometry, layout, offset);
    let sync = || medium.sync().map_err(io("flushing"));
    // An old superblock must not vouch for a new bitmap, so the old ones go first.
    for at in COPIES {
        medium.write(offset + at, &[0; SUPERBLOCK_LEN]).map_err(io("writing"))?;
    }
    sync()?;
    blank(medium, layout, geometry).map_err(io("writing"))?;
    sync()?;
    for (sequence, at) in (1..).zip(COPIES) {
        medium.write(offset + at, &Header::encode(superblock, &shape, sequence)).map_err(io("writing"))?;
    }
    Ok(sync()?)
}

fn shape_at(area: u64, geometry: Geometry, layout: Layout, offset: u64) -> Shape {
    let dirty_at = i64::try_from(layout.dirty_at)
        .ok()
        .zip(i64::try_from(offset).ok())
        .map(|(dirty_at, offset)| dirty_at - offset);
    let dirty_at = dirty_at.expect("the largest volume leaves room below 2^63");
    Shape { area, geometry, dirty_at, activity_known: 0 }
}

/// Makes log and bitmap read as never written. What reads so already stays a hole.
fn blank<M: Medium>(medium: &M, layout: Layout, geometry: Geometry) -> io::Result<()> {
    for_used_blocks(medium, layout, geometry, |at, _| medium.write(at, &[0; BLOCK_LEN]))
}

/// Gives `each` the place and the bytes of every block of log and bitmap that does not read as zeros.
fn for_used_blocks<M: Medium>(
    medium: &M,
    layout: Layout,
    geometry: Geometry,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut bytes = vec![0; STRIDE_BLOCKS * BLOCK_LEN];
    for (start, len) in [(layout.activity_at, ACTIVITY_LEN), (layout.dirty_at, geometry.dirty_len())] {
        for at in (start..start + len).step_by(bytes.len()) {
            let step = usize::try_from(start + len - at).map_or(bytes.len(), |left| left.min(bytes.len()));
            medium.read(at, &mut bytes[..step])?;
            for (at, block) in (at..).step_by(BLOCK_LEN).zip(bytes[..step].chunks_exact(BLOCK_LEN)) {
                if block.iter().any(|byte| *byte != 0) {
                    each(at, block)?;
                }
            }
        }
    }
    Ok(())
}

/// Writes both copies as they were read, and syncs each before the other is touched. The newest goes first, for it is the
/// one that the medium may lack. A damaged one is left to the next store.
fn write_copies_anew<M: Medium>(
    medium: &M,
    offset: u64,
    blocks: &header::Blocks,
    newest: usize,
    damaged: Option<usize>,
) -> io::Result<()> {
    for copy in [newest, 1 - newest] {
        if damaged != Some(copy) {
            medium.write(offset + COPIES[copy], &blocks[copy])?;
            medium.sync()?;
        }
    }
    Ok(())
}

/// Writes log and bitmap as they are read, and syncs them. What is read for use is read after that: until it is synced, the
/// system may drop what the medium lacks from memory.
fn write_area_anew<M: Medium>(medium: &M, layout: Layout, geometry: Geometry) -> io::Result<()> {
    for_used_blocks(medium, layout, geometry, |at, block| medium.write(at, block))?;
    medium.sync()
}

/// Reads the metadata on `medium` with its superblocks at `offset`, and refuses that of another volume, node or size.
///
/// What an earlier daemon only wrote is brought to stable storage first: it is about to be trusted, and the next store
/// writes over the other copy. A sync alone would not do it. Where writing back failed, Linux tells one sync, takes the pages
/// for clean and still gives what was to be written; so whatever is found is written anew, the very bytes. Where the
/// medium has them already, no tear changes anything; what it lacks is part of one store, the last before that daemon gave
/// up, and a store may be torn at any time.
///
/// # Errors
/// [`MetadataError`].
pub fn open<M: Medium>(
    medium: M,
    offset: u64,
    volume: &str,
    node: &str,
    size: u64,
) -> Result<Opened<M>, MetadataError> {
    medium.sync().map_err(|source| SuperblockError::Io {
        doing: "flushing",
        path: medium.path().into(),
        source,
    })?;
    let io = |doing| {
        let path = medium.path();
        move |source| SuperblockError::Io { doing, path: path.into(), source }
    };
    let blocks = header::read_blocks(&medium, offset)?;
    let (newest, header, sequence, damaged_copy) = header::newest(header::decode_both(&blocks), &medium)?;
    let Header { superblock, shape } = header;
    superblock.check_belongs(medium.path(), volume, node, size)?;
    let damaged = damaged_copy.as_ref().map(|(copy, _)| *copy);
    write_copies_anew(&medium, offset, &blocks, newest, damaged).map_err(io("rewriting"))?;
    let layout = shape.layout(medium.path(), offset)?;
    let found = medium.len().map_err(io("reading"))?;
    if found < layout.end {
        let path = medium.path().into();
        return Err(MetadataError::Truncated { path, found, needed: layout.end });
    }
    write_area_anew(&medium, layout, shape.geometry).map_err(io("rewriting"))?;
    let read = read_area(&medium, layout, &shape).map_err(io("reading"))?;
    Ok(assemble(medium, offset, layout, shape, (newest, superblock, sequence, damaged_copy), read))
}

/// What stands in the log and the bitmap.
pub(crate) struct AreaRead {
    pub(crate) dirty: DirtyBitmap,
    pub(crate) damage: DirtyDamage,
    pub(crate) replayed: ring::Replayed,
    /// Highest number of a store of bitmap blocks.
    pub(crate) counter: u64,
}

fn assemble<M: Medium>(
    medium: M,
    offset: u64,
    layout: Layout,
    shape: Shape,
    (newest, superblock, sequence, damaged_copy): Newest<Superblock>,
    read: AreaRead,
) -> Opened<M> {
    let AreaRead { mut dirty, damage, replayed, counter } = read;
    let (geometry, area) = (shape.geometry, shape.area);
    let activity = ActivityLog::resume(geometry, area, replayed.last, &replayed.table);
    let mut report = Report {
        damaged_copy,
        torn_transaction: replayed.torn,
        activity_damage: replayed.damage,
        dirty_damage: damage,
        ..Report::default()
    };
    // Whether that is on record already shows when it is stored.
    if replayed.damage.is_some() {
        let _ = dirty.set_all();
    }
    for extent in activity.hot_extents() {
        report.hot_extents += 1;
        let _ = dirty.set(extent);
    }
    let activity_known = AtomicU64::new(shape.activity_known);
    let shared =
        Arc::new(Shared { medium, offset, layout, shape, failed: Mutex::new(false), activity_known });
    Opened {
        superblocks: SuperblockStore { shared: Arc::clone(&shared), newest, sequence },
        area: AreaStore { shared, counter: AtomicU64::new(counter + 1) },
        superblock,
        dirty,
        activity,
        report,
    }
}

pub(crate) fn read_area<M: Medium>(medium: &M, layout: Layout, shape: &Shape) -> io::Result<AreaRead> {
    let geometry = shape.geometry;
    let mut ring_bytes = vec![0; usize::try_from(ACTIVITY_LEN).expect("128 KiB")];
    medium.read(layout.activity_at, &mut ring_bytes)?;
    let replayed = ring::replay(geometry, shape.area, shape.activity_known, &ring_bytes);
    let mut read =
        AreaRead { dirty: DirtyBitmap::new(geometry), damage: DirtyDamage::default(), replayed, counter: 0 };
    let blocks = usize::try_from(geometry.dirty_blocks()).expect("the geometry bounds it");
    let mut bytes = vec![0; STRIDE_BLOCKS * BLOCK_LEN];
    let zeros = bytes.clone();
    for first in (0..blocks).step_by(STRIDE_BLOCKS) {
        let len = (blocks - first).min(STRIDE_BLOCKS) * BLOCK_LEN;
        medium.read(layout.dirty_at + (first * BLOCK_LEN) as u64, &mut bytes[..len])?;
        if bytes[..len] == zeros[..len] {
            continue;
        }
        for (sector, bytes) in (first * SECTORS_PER_BLOCK..).zip(bytes[..len].chunks_exact(SECTOR_LEN)) {
            read_dirty_sector(shape, sector, bytes, &mut read);
        }
    }
    Ok(read)
}

fn read_dirty_sector(shape: &Shape, sector: usize, bytes: &[u8], read: &mut AreaRead) {
    match dirty_place(shape.area, sector as u64).read(bytes) {
        Sector::Blank => {}
        Sector::Good { counter, payload } => {
            read.counter = read.counter.max(counter.min(ring::NUMBER_END));
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            read.dirty.load(sector * SECTOR_WORDS, payload.chunks_exact(8).map(word));
        }
        Sector::Bad(fault) => {
            let geometry = shape.geometry;
            let len = SECTOR_BITS * geometry.grain_len();
            let start = sector as u64 * len;
            if start >= geometry.size() {
                return;
            }
            let range = ByteRange::new(start, len.min(geometry.size() - start));
            let _ = read.dirty.set(range);
            read.damage.sectors += 1;
            if read.damage.first.len() < DAMAGE_LISTED_MAX {
                read.damage.first.push((range, fault));
            }
        }
    }
}

const _: () = assert!(BLOCK_WORDS * 8 == PAYLOAD_LEN * SECTORS_PER_BLOCK);

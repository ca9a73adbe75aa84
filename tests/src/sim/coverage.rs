//! What of a volume is on record as possibly different from the peer: read from a medium's bytes as `docs/METADATA.md`
//! describes them, without the code that wrote them.
//!
//! The rule that rests on it, `uncovered`: of two disks that are of one lineage, every grain that neither side's stable
//! record names (bitmap or hot extent) is the same on both media and in both memories. It holds at every moment: the log
//! names an extent before its first byte changes, and lets go of it only when both media have the same or the bitmap has
//! its bit; a bit is cleared only when both media have the same. So it is looked at whenever a record changes, whenever a
//! copy ends, and whenever a session begins that will copy nothing, or only what is on record.

use costandby_datapath::disk::metadata::header::Header;
use costandby_datapath::disk::superblock::SUPERBLOCK_LEN;

use super::storage::SECTOR_LEN;

const LOG_AT: usize = 65_536;
const LOG_BLOCKS: usize = 32;
const BITMAP_AT: usize = 196_608;
const BLOCK_LEN: usize = 4096;
const HEAD_LEN: usize = 32;
const NO_ENTRY: u64 = u64::MAX;
const NO_EXTENT: u64 = (1 << 48) - 1;

/// Sectors of the volume that a stable record names.
#[derive(Clone, Debug, Default)]
pub(super) struct Coverage {
    /// One a sector of the volume.
    named: Vec<bool>,
    /// Bytes a bit stands for.
    pub(super) grain_len: u64,
    /// Extents that are hot.
    pub(super) hot: Vec<u64>,
    /// What the medium held when it was last looked at.
    seen: Vec<u8>,
}

/// A sector of log or bitmap: its number and payload, nothing where it was never written, or damage.
enum Found<'a> {
    Blank,
    Good { counter: u64, payload: &'a [u8] },
    Bad,
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

fn sector<'a>(bytes: &'a [u8], kind: &[u8; 4], area: u64, index: usize) -> Found<'a> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Found::Blank;
    }
    let sound = bytes[..4] == crc32c::crc32c(&bytes[4..]).to_le_bytes()
        && bytes[4..8] == *kind
        && word(&bytes[8..16]) == area
        && word(&bytes[16..24]) == index as u64;
    if !sound {
        return Found::Bad;
    }
    Found::Good { counter: word(&bytes[24..32]), payload: &bytes[HEAD_LEN..] }
}

impl Coverage {
    /// Whether a sector of the volume is named.
    pub(super) fn names(&self, sector: usize) -> bool {
        // Without metadata nothing is known.
        self.named.get(sector).copied().unwrap_or(true)
    }

    /// Whether anything is named.
    pub(super) fn names_any(&self) -> bool {
        self.named.contains(&true)
    }

    /// Looks at a medium.
    pub(super) fn look(&mut self, medium: &[u8], size: u64) {
        if self.seen == medium {
            return;
        }
        self.seen.clear();
        self.seen.extend_from_slice(medium);
        self.named.clear();
        self.named.resize(usize::try_from(size).expect("small") / SECTOR_LEN, true);
        let copies = [0, SUPERBLOCK_LEN].map(|at| Header::decode(&medium[at..at + SUPERBLOCK_LEN]).ok());
        let newest = copies.into_iter().flatten().max_by_key(|(_, sequence)| *sequence);
        let Some(shape) = newest.map(|(header, _)| header.shape) else { return };
        let geometry = shape.geometry;
        self.grain_len = geometry.grain_len();
        let Some(hot) = hot_extents(medium, shape.area, geometry.slots() as usize) else { return };
        self.named.fill(false);
        self.hot.clone_from(&hot);
        for extent in hot {
            self.name(extent * geometry.extent_len(), geometry.extent_len());
        }
        let sectors = medium[BITMAP_AT..].chunks_exact(SECTOR_LEN).enumerate();
        let bits_per_sector = (SECTOR_LEN - HEAD_LEN) as u64 * 8;
        for (index, bytes) in sectors {
            let first = index as u64 * bits_per_sector;
            match sector(bytes, b"cs-D", shape.area, index) {
                Found::Blank => {}
                Found::Bad => self.name(first * self.grain_len, bits_per_sector * self.grain_len),
                Found::Good { payload, .. } => {
                    for bit in 0..bits_per_sector {
                        let at = usize::try_from(bit).expect("small");
                        if payload[at / 8] & (1 << (at % 8)) != 0 {
                            self.name((first + bit) * self.grain_len, self.grain_len);
                        }
                    }
                }
            }
        }
    }

    fn name(&mut self, start: u64, len: u64) {
        let index = |at: u64| usize::try_from(at).expect("small") / SECTOR_LEN;
        let end = index(start.saturating_add(len)).min(self.named.len());
        if index(start) < end {
            self.named[index(start)..end].fill(true);
        }
    }
}

/// The extents that the newest whole transaction and those before it leave hot; nothing where that is not known.
fn hot_extents(medium: &[u8], area: u64, slots: usize) -> Option<Vec<u64>> {
    let mut whole: Vec<Option<(u64, Vec<u64>)>> = Vec::new();
    let mut highest = 0;
    for block in 0..LOG_BLOCKS {
        let bytes = &medium[LOG_AT + block * BLOCK_LEN..][..BLOCK_LEN];
        let mut entries = Vec::new();
        let mut marks = Vec::new();
        for (part, bytes) in bytes.chunks_exact(SECTOR_LEN).enumerate() {
            match sector(bytes, b"cs-A", area, block * BLOCK_LEN / SECTOR_LEN + part) {
                Found::Blank => marks.push(None),
                // The simulated media tear; they do not damage.
                Found::Bad => return None,
                Found::Good { counter, payload } => {
                    marks.push(Some((counter, payload[..4].to_vec())));
                    entries.extend(payload[8..].chunks_exact(8).map(word));
                }
            }
        }
        let sum = entries.iter().fold(0, |sum, entry| crc32c::crc32c_append(sum, &entry.to_le_bytes()));
        let same = marks.windows(2).all(|pair| pair[0] == pair[1]);
        whole.push(match marks.swap_remove(0) {
            Some((number, announced)) if same && announced == sum.to_le_bytes() => {
                highest = highest.max(number);
                Some((number, entries))
            }
            _ => None,
        });
    }
    let cycle = slots.div_ceil(256) as u64;
    let mut table = vec![None; slots];
    for number in highest.saturating_sub(cycle - 1).max(1)..=highest {
        let place = usize::try_from(number % LOG_BLOCKS as u64).expect("small");
        let (found, entries) = whole[place].as_ref()?;
        if *found != number {
            return None;
        }
        for entry in entries.iter().filter(|&&entry| entry != NO_ENTRY) {
            let (slot, extent) = (usize::try_from(entry >> 48).expect("16 bits"), entry & NO_EXTENT);
            *table.get_mut(slot)? = (extent != NO_EXTENT).then_some(extent);
        }
    }
    Some(table.into_iter().flatten().collect())
}

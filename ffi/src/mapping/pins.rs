//! Records which pages of a mapping are registered with a device, so that they are not dropped.
//!
//! A registered range is a set of *pages*: punching a hole in the file underneath takes them out of the file and puts
//! others in their place, while the device goes on with the old ones. Between two who do not know each other stands this
//! table: whoever registers memory takes a [`Pin`] on its range first and keeps it until the registration has ended;
//! whoever drops pages takes an [`Unpinned`] first, drops only the parts it names, and zeroes the others in place.
//!
//! Invariants:
//! - Whole pages count, on both sides: a pin covers each page that it touches a byte of.
//! - While an [`Unpinned`] lives, no pin comes to the parts it names. So no page is dropped between the moment a pin is
//!   granted and the moment it ends.
//! - The table is locked for a look at it, never while somebody registers, drops or zeroes.
//!
//! Not guarded against: others who change the file behind our back. That is a failed disk, as it is without a device.

use super::Mapping;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Pins of one mapping at a time: windows of 16 MiB over 16 TiB.
pub const PINS_MAX: usize = 1 << 20;

/// Parts that one [`Unpinned`] names; what lies behind the last counts as pinned, which is always safe.
pub const PARTS_MAX: usize = 1024;

/// Why a range cannot be pinned now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PinBusy {
    /// Its pages are being dropped: try again later.
    #[error("pages of bytes {offset}+{len} of the mapping are being dropped: try again later")]
    Dropping {
        /// Where the range starts.
        offset: usize,
        /// Its bytes.
        len: usize,
    },
    /// Too many are pinned.
    #[error("{PINS_MAX} ranges of the mapping are pinned already")]
    Full,
}

impl From<PinBusy> for io::Error {
    /// `WouldBlock` while pages are being dropped, `OutOfMemory` when the table is full.
    fn from(busy: PinBusy) -> Self {
        let kind = match busy {
            PinBusy::Dropping { .. } => io::ErrorKind::WouldBlock,
            PinBusy::Full => io::ErrorKind::OutOfMemory,
        };
        Self::new(kind, busy)
    }
}

/// The table of one mapping.
pub(super) struct Pins {
    /// Bytes of the mapping's first page that lie before it.
    skew: usize,
    page_len: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    /// Pinned, by first byte and number, to one past the last. Whole pages; they may overlap.
    pins: BTreeMap<(usize, u64), usize>,
    /// Being dropped, by number.
    holds: BTreeMap<u64, Vec<Range<usize>>>,
}

impl Pins {
    pub(super) fn new(skew: usize, page_len: usize) -> Self {
        Self { skew, page_len, table: Mutex::default() }
    }

    pub(super) fn page_len(&self) -> usize {
        self.page_len
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nobody panics with the table in hand")
    }

    /// The pages that `offset..offset + len` touches, as bytes of the mapping counted from its first page's beginning.
    fn pages(&self, offset: usize, len: usize) -> Range<usize> {
        let start = (offset + self.skew) & !(self.page_len - 1);
        start..(offset + self.skew + len).next_multiple_of(self.page_len)
    }
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The parts of `wanted` that no pin covers, in order, at most [`PARTS_MAX`].
    fn unpinned(&self, wanted: &Range<usize>) -> Vec<Range<usize>> {
        let mut parts = Vec::new();
        let mut at = wanted.start;
        for ((start, _), end) in self.pins.range(..(wanted.end, 0)) {
            if *start > at {
                parts.push(at..*start);
                if parts.len() == PARTS_MAX {
                    return parts;
                }
            }
            at = at.max(*end);
        }
        if at < wanted.end {
            parts.push(at..wanted.end);
        }
        parts
    }

    fn is_held(&self, range: &Range<usize>) -> bool {
        let meets = |held: &Range<usize>| held.start < range.end && range.start < held.end;
        self.holds.values().flatten().any(meets)
    }
}

/// Keeps the pages of a range from being dropped, until it is dropped itself. Keeps them mapped too.
pub struct Pin {
    mapping: Arc<Mapping>,
    key: (usize, u64),
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("start", &self.key.0).finish_non_exhaustive()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let pinned = self.mapping.pins.table().pins.remove(&self.key);
        assert!(pinned.is_some(), "a pin ends once");
    }
}

/// The parts of a range that no pin covers, and that none comes to while this lives.
pub struct Unpinned {
    mapping: Arc<Mapping>,
    number: u64,
    range: Range<usize>,
    parts: Vec<Range<usize>>,
}

impl Unpinned {
    /// The parts whose pages may be dropped, in order, as offset and length. They begin and end with the range asked for
    /// or between pages.
    pub fn free(&self) -> impl Iterator<Item = (usize, usize)> {
        self.parts.iter().map(|part| (part.start, part.len()))
    }

    /// The parts whose pages must stay, in order, as offset and length: what [`Unpinned::free`] leaves of the range.
    pub fn pinned(&self) -> impl Iterator<Item = (usize, usize)> {
        let starts = std::iter::once(self.range.start).chain(self.parts.iter().map(|part| part.end));
        let ends = self.parts.iter().map(|part| part.start).chain(std::iter::once(self.range.end));
        starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| (start, end - start))
    }
}

impl fmt::Debug for Unpinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpinned")
            .field("range", &self.range)
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

impl Drop for Unpinned {
    fn drop(&mut self) {
        let held = self.mapping.pins.table().holds.remove(&self.number);
        assert!(held.is_some(), "a hold ends once");
    }
}

impl Mapping {
    /// Pins the pages of `offset..offset + len`: they are not dropped while the pin lives. Ranges may overlap. For who
    /// registers memory with a device: *before* the registration, until after its end.
    ///
    /// # Errors
    /// [`PinBusy`].
    ///
    /// # Panics
    /// When the range is empty or leaves the mapping.
    pub fn pin(self: &Arc<Self>, offset: usize, len: usize) -> Result<Pin, PinBusy> {
        assert!(len > 0, "a pin on nothing");
        super::check(offset, len, self.len());
        let pages = self.pins.pages(offset, len);
        let mut table = self.pins.table();
        if table.is_held(&pages) {
            return Err(PinBusy::Dropping { offset, len });
        }
        if table.pins.len() >= PINS_MAX {
            return Err(PinBusy::Full);
        }
        let key = (pages.start, table.number());
        table.pins.insert(key, pages.end);
        Ok(Pin { mapping: Arc::clone(self), key })
    }

    /// The parts of `offset..offset + len` that no pin covers, held against new ones. For who drops pages.
    ///
    /// # Panics
    /// When the range leaves the mapping.
    #[must_use]
    pub fn hold_unpinned(self: &Arc<Self>, offset: usize, len: usize) -> Unpinned {
        super::check(offset, len, self.len());
        let skew = self.pins.skew;
        let mut table = self.pins.table();
        let held = table.unpinned(&(offset + skew..offset + skew + len));
        let parts = held.iter().map(|part| part.start - skew..part.end - skew).collect();
        let number = table.number();
        table.holds.insert(number, held);
        drop(table);
        Unpinned { mapping: Arc::clone(self), number, range: offset..offset + len, parts }
    }

    /// Ranges pinned now.
    #[must_use]
    pub fn pins_len(&self) -> usize {
        self.pins.table().pins.len()
    }
}

#[cfg(test)]
mod tests;

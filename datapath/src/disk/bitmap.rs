//! The dirty bitmap: which parts of the disk the peer may lack.
//!
//! One bit stands for [`DIRTY_GRAIN_LEN`] bytes. It lives in memory for now: whatever ends a daemon while bits are set
//! also leaves a superblock that says the peer is behind, and the copy then starts from a full bitmap.

use crate::limits::DIRTY_GRAIN_LEN;
use crate::units::ByteRange;

/// The dirty bits of one disk.
#[derive(Debug)]
pub struct Bitmap {
    words: Vec<u64>,
    size: u64,
    dirty_count: u64,
}

impl Bitmap {
    /// All clean, for a disk of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let words = bits_of(size).div_ceil(64);
        Self { words: vec![0; usize::try_from(words).expect("fits memory")], size, dirty_count: 0 }
    }

    /// Marks every grain that `range` touches.
    pub fn set(&mut self, range: ByteRange) {
        if range.len == 0 {
            return;
        }
        for bit in range.start / DIRTY_GRAIN_LEN..=(range.end() - 1) / DIRTY_GRAIN_LEN {
            let (word, mask) = place(bit);
            self.dirty_count += u64::from(self.words[word] & mask == 0);
            self.words[word] |= mask;
        }
    }

    /// Marks the whole disk.
    pub fn set_all(&mut self) {
        let bits = bits_of(self.size);
        self.words.fill(u64::MAX);
        let tail = bits % 64;
        if tail != 0
            && let Some(last) = self.words.last_mut()
        {
            *last = (1 << tail) - 1;
        }
        self.dirty_count = bits;
    }

    /// Clears the grains that lie wholly inside `range` (or end the disk inside it).
    pub fn clear(&mut self, range: ByteRange) {
        let first = range.start.div_ceil(DIRTY_GRAIN_LEN);
        let end = if range.end() >= self.size { bits_of(self.size) } else { range.end() / DIRTY_GRAIN_LEN };
        for bit in first..end {
            let (word, mask) = place(bit);
            self.dirty_count -= u64::from(self.words[word] & mask != 0);
            self.words[word] &= !mask;
        }
    }

    /// The first run of dirty grains at or after byte `from`, cut to `len_max` bytes and the disk's end.
    #[must_use]
    pub fn next_dirty(&self, from: u64, len_max: u64) -> Option<ByteRange> {
        let bits = bits_of(self.size);
        let mut bit = from / DIRTY_GRAIN_LEN;
        while bit < bits {
            let (word, mask) = place(bit);
            let rest = self.words[word] & !(mask - 1);
            if rest == 0 {
                bit = (bit / 64 + 1) * 64;
                continue;
            }
            bit = bit / 64 * 64 + u64::from(rest.trailing_zeros());
            let start = bit * DIRTY_GRAIN_LEN;
            let mut end = start;
            while bit < bits && end - start < len_max && self.is_set(bit) {
                bit += 1;
                end = bit * DIRTY_GRAIN_LEN;
            }
            return Some(ByteRange::new(start, end.min(self.size) - start));
        }
        None
    }

    /// Bytes marked, at the bitmap's grain and never more than the disk has.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        (self.dirty_count * DIRTY_GRAIN_LEN).min(self.size)
    }

    fn is_set(&self, bit: u64) -> bool {
        let (word, mask) = place(bit);
        self.words[word] & mask != 0
    }
}

fn bits_of(size: u64) -> u64 {
    size.div_ceil(DIRTY_GRAIN_LEN)
}

fn place(bit: u64) -> (usize, u64) {
    (usize::try_from(bit / 64).expect("fits memory"), 1 << (bit % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: u64 = DIRTY_GRAIN_LEN;

    #[test]
    fn a_disk_that_ends_inside_a_grain_is_covered_and_cleared() {
        let mut map = Bitmap::new(3 * G + 100);
        map.set_all();
        assert_eq!(map.dirty_bytes(), 3 * G + 100);
        assert_eq!(map.next_dirty(0, u64::MAX), Some(ByteRange::new(0, 3 * G + 100)));
        assert_eq!(map.next_dirty(3 * G, G), Some(ByteRange::new(3 * G, 100)));
        map.clear(ByteRange::new(0, 3 * G + 100));
        assert_eq!((map.dirty_bytes(), map.next_dirty(0, G)), (0, None));
    }

    #[test]
    fn half_a_grain_is_marked_whole_and_not_cleared_by_a_half() {
        let mut map = Bitmap::new(200 * G);
        map.set(ByteRange::new(130 * G + 5, 1));
        map.clear(ByteRange::new(130 * G, G - 1));
        assert_eq!(map.next_dirty(0, 10 * G), Some(ByteRange::new(130 * G, G)));
        map.clear(ByteRange::new(130 * G, G));
        assert_eq!(map.dirty_bytes(), 0);
    }

    proptest! {
        #[test]
        fn it_marks_and_finds_what_a_plain_set_does(ops in proptest::collection::vec((0..200 * G, 1..5 * G, any::<bool>()), 1..40)) {
            let size = 200 * G - 7;
            let mut map = Bitmap::new(size);
            let mut model = std::collections::BTreeSet::new();
            for (start, len, set) in ops {
                let start = start.min(size - 1);
                let range = ByteRange::new(start, len.min(size - start));
                if set {
                    map.set(range);
                    model.extend(range.start / G..=(range.end() - 1) / G);
                } else {
                    map.clear(range);
                    model.retain(|g| !(g * G >= range.start && ((g + 1) * G).min(size) <= range.end()));
                }
            }
            let mut found = std::collections::BTreeSet::new();
            let mut from = 0;
            while let Some(run) = map.next_dirty(from, 3 * G) {
                found.extend(run.start / G..=(run.end() - 1) / G);
                from = run.end().next_multiple_of(G);
            }
            prop_assert_eq!(&found, &model);
            prop_assert_eq!(map.dirty_bytes(), (model.len() as u64 * G).min(size));
        }
    }
}

//! A set of byte ranges: what the copy's steps have covered, whatever their order and size. Sans-IO.
//!
//! Steps may be shorter than the dirty bitmap's grain, come twice, and end in another order than they began; only what is
//! covered without a gap may be cleared.

use crate::units::ByteRange;

/// Ranges in order, disjoint, with gaps between them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ranges {
    list: Vec<ByteRange>,
}

impl Ranges {
    /// Adds the bytes of `range`.
    pub fn insert(&mut self, range: ByteRange) {
        if range.len == 0 {
            return;
        }
        // Those that touch it, which are neighbours of each other.
        let first = self.list.partition_point(|held| held.end() < range.start);
        let end = self.list.partition_point(|held| held.start <= range.end());
        let start =
            self.list.get(first..end).and_then(|touched| touched.first()).map_or(range.start, |r| r.start);
        let start = start.min(range.start);
        let last = self.list[first..end].last().map_or(range.end(), |held| held.end().max(range.end()));
        self.list.splice(first..end, [ByteRange::new(start, last - start)]);
    }

    /// Takes out the grains of a disk of `size` bytes that are covered whole, as ranges; what covers a grain in part stays.
    pub fn take_whole(&mut self, grain: u64, size: u64) -> Vec<ByteRange> {
        let mut whole = Vec::new();
        let mut rest = Vec::new();
        for held in self.list.drain(..) {
            let start = held.start.next_multiple_of(grain);
            let end = if held.end() >= size { held.end() } else { held.end() / grain * grain };
            if start >= end {
                rest.push(held);
                continue;
            }
            whole.push(ByteRange::new(start, end - start));
            let parts =
                [ByteRange::new(held.start, start - held.start), ByteRange::new(end, held.end() - end)];
            rest.extend(parts.into_iter().filter(|part| part.len > 0));
        }
        self.list = rest;
        whole
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.list.iter().copied()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Bytes of all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.list.iter().map(|range| range.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_set_of_bytes_inserted(
            ranges in prop::collection::vec((0..200_u64, 0..30_u64), 0..60),
            grain_log in 0..5_u32,
            takes in prop::collection::vec(any::<bool>(), 60),
        ) {
            const SIZE: u64 = 230;
            let grain = 1 << grain_log;
            let mut set = Ranges::default();
            let mut model = [false; 230];
            for ((start, len), take) in ranges.into_iter().zip(takes) {
                set.insert(ByteRange::new(start, len));
                for byte in start..start + len {
                    model[usize::try_from(byte).expect("small")] = true;
                }
                if take {
                    for whole in set.take_whole(grain, SIZE) {
                        prop_assert!(whole.start.is_multiple_of(grain));
                        prop_assert!(whole.end().is_multiple_of(grain) || whole.end() == SIZE);
                        for byte in whole.start..whole.end() {
                            let held = std::mem::take(&mut model[usize::try_from(byte).expect("small")]);
                            prop_assert!(held, "byte {} was never covered", byte);
                        }
                    }
                    for start in (0..SIZE).step_by(usize::try_from(grain).expect("small")) {
                        let end = (start + grain).min(SIZE);
                        let all = (start..end).all(|byte| model[usize::try_from(byte).expect("small")]);
                        prop_assert!(!all, "the grain at {} stayed", start);
                    }
                }
                let expected = model.iter().filter(|held| **held).count() as u64;
                prop_assert_eq!(set.bytes(), expected);
                prop_assert!(set.list.windows(2).all(|two| two[0].end() < two[1].start));
            }
        }
    }
}

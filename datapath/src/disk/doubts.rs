//! A set of grains that are marked as dirty although they are equal on both disks for as long as both daemons live.
//! Sans-IO.
//!
//! In memory only, on purpose: a daemon that starts knows of none, and everything that is marked counts.

use crate::mirror::ranges::Ranges;
use crate::units::{ByteRange, Seq};

/// The set. Allocates as far as its highest member.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Doubts {
    words: Vec<u64>,
    /// Steps of a copy that the peer had not acknowledged when its session was given up, in order. A step of which the peer
    /// says later that it had applied it was equal as well.
    unsure: Vec<(Seq, ByteRange)>,
}

impl Doubts {
    /// Adds the grains that `range` touches.
    pub fn insert(&mut self, range: ByteRange, grain_len: u64) {
        for grain in grains(range, grain_len) {
            let (word, bit) = place(grain);
            if word >= self.words.len() {
                self.words.resize(word + 1, 0);
            }
            self.words[word] |= bit;
        }
    }

    /// The peer may have applied the step `seq` over `range`, or not.
    pub fn unsure(&mut self, seq: Seq, range: ByteRange) {
        self.unsure.push((seq, range));
    }

    /// The peer had applied everything up to `applied`, and nothing else. Gives back which grains, of a disk of `size` bytes,
    /// the steps that were unsure cover whole.
    pub fn resolve(&mut self, applied: Seq, grain_len: u64, size: u64) -> Vec<ByteRange> {
        let mut covered = Ranges::default();
        for (_, range) in self.unsure.drain(..).filter(|(seq, _)| *seq <= applied) {
            covered.insert(range);
        }
        covered.take_whole(grain_len, size)
    }

    /// Takes out the grains that `range` touches.
    pub fn remove(&mut self, range: ByteRange, grain_len: u64) {
        if !self.unsure.is_empty() {
            self.remove_unsure(range, grain_len);
        }
        let held = self.words.len() as u64 * 64;
        for grain in grains(range, grain_len).take_while(|grain| *grain < held) {
            let (word, bit) = place(grain);
            self.words[word] &= !bit;
        }
    }

    fn remove_unsure(&mut self, range: ByteRange, grain_len: u64) {
        let (from, to) = (range.start / grain_len * grain_len, range.end().next_multiple_of(grain_len));
        let mut behind = Vec::new();
        self.unsure.retain_mut(|(seq, step)| {
            if step.end() > to && step.start < to {
                let start = step.start.max(to);
                behind.push((*seq, ByteRange::new(start, step.end() - start)));
            }
            if step.start < to && step.end() > from {
                step.len = from.saturating_sub(step.start);
            }
            step.len > 0
        });
        self.unsure.append(&mut behind);
    }

    /// The members as runs, in order, of a disk of `size` bytes.
    #[must_use]
    pub fn ranges(&self, grain_len: u64, size: u64) -> Vec<ByteRange> {
        let mut runs: Vec<ByteRange> = Vec::new();
        for (word, bits) in (0..).zip(&self.words).filter(|(_, bits)| **bits != 0) {
            for bit in (0..64).filter(|bit| bits & (1 << bit) != 0) {
                let start = (word * 64 + bit) * grain_len;
                let len = grain_len.min(size.saturating_sub(start));
                match runs.last_mut() {
                    Some(run) if run.end() == start => run.len += len,
                    _ => runs.push(ByteRange::new(start, len)),
                }
            }
        }
        runs.retain(|run| run.len > 0);
        runs
    }
}

fn grains(range: ByteRange, grain_len: u64) -> std::ops::Range<u64> {
    range.start / grain_len..range.end().div_ceil(grain_len)
}

fn place(grain: u64) -> (usize, u64) {
    (usize::try_from(grain / 64).expect("a map of the disk is held in memory"), 1 << (grain % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set_of_grains(
            steps in prop::collection::vec((any::<bool>(), 0..300_u64, 1..40_u64), 0..50),
            grain_len in prop::sample::select(vec![1_u64, 4, 16]),
        ) {
            const SIZE: u64 = 333;
            let (mut set, mut model) = (Doubts::default(), BTreeSet::new());
            for (insert, start, len) in steps {
                let range = ByteRange::new(start, len.min(SIZE - start));
                for grain in grains(range, grain_len) {
                    if insert { model.insert(grain); } else { model.remove(&grain); }
                }
                if insert { set.insert(range, grain_len) } else { set.remove(range, grain_len) }
            }
            let runs = set.ranges(grain_len, SIZE);
            prop_assert!(runs.windows(2).all(|two| two[0].end() < two[1].start));
            prop_assert!(runs.iter().all(|run| run.end() <= SIZE));
            let held: BTreeSet<u64> = runs.iter().flat_map(|run| grains(*run, grain_len)).collect();
            prop_assert_eq!(held, model);
        }
    }
}

//! The dirty bitmap against a plain set, and what it calls durable against a stored bitmap that a test keeps.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const G: u64 = 4096;
/// Three blocks and a bit, cut off inside a grain.
const SIZE: u64 = 3 * BLOCK_WORDS as u64 * 64 * G + 70 * G + 100;

fn map() -> DirtyBitmap {
    DirtyBitmap::new(Geometry::new(SIZE, G, 4 << 20, 1024).expect("legal"))
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len)
}

#[test]
fn a_disk_that_ends_inside_a_grain_is_covered_and_cleared() {
    let mut map = map();
    assert_eq!(map.set_all(), Marked::Unsaved);
    assert_eq!((map.dirty_bytes(), map.dirty_grains()), (SIZE, SIZE.div_ceil(G)));
    assert_eq!(map.next_dirty(0, u64::MAX), Some(range(0, SIZE)));
    assert_eq!(map.next_dirty(SIZE - 50, G), Some(range(SIZE - 100, 100)));
    map.clear(range(0, SIZE));
    assert_eq!((map.dirty_bytes(), map.next_dirty(0, G)), (0, None));
}

#[test]
fn half_a_grain_is_marked_whole_and_not_cleared_by_a_half() {
    let mut map = map();
    let _ = map.set(range(130 * G + 5, 1));
    map.clear(range(130 * G, G - 1));
    assert_eq!(map.next_dirty(0, 10 * G), Some(range(130 * G, G)));
    map.clear(range(130 * G, G));
    assert_eq!(map.dirty_bytes(), 0);
    map.clear(range(5, 0));
    assert_eq!(map.set(range(5, 0)), Marked::Durable, "nothing is marked by nothing");
}

#[test]
fn a_bit_is_durable_only_by_a_store_taken_after_it_was_set() {
    let mut map = map();
    assert_eq!(map.set(range(0, G)), Marked::Unsaved);
    let taken = map.take_unsaved(9);
    assert_eq!(taken.iter().map(|block| block.index).collect::<Vec<_>>(), [0]);
    assert!(!map.is_durable(range(0, G)), "not before it is stored");
    assert_eq!(map.set(range(G, G)), Marked::Unsaved);
    assert!(map.take_unsaved(9).is_empty(), "one writer at a time");
    map.stored(0);
    assert!(!map.is_durable(range(G, G)), "set after the store was taken");
    let second = map.take_unsaved(9);
    assert_eq!(second[0].words[0], 0b11);
    map.stored(0);
    assert!(map.is_durable(range(0, 2 * G)) && !map.has_unsaved());
    assert_eq!(map.set(range(0, 2 * G)), Marked::Durable);
    assert!(!map.is_durable(range(0, 3 * G)), "the third is not even set");
}

#[test]
fn clears_are_stored_when_asked_for_and_a_failed_store_comes_again() {
    let mut map = map();
    let _ = map.set_all();
    let blocks: Vec<_> = map.take_unsaved(2).iter().map(|block| block.index).collect();
    assert_eq!(blocks, [0, 1]);
    map.stored(0);
    map.not_stored(1);
    assert!(map.is_durable(range(0, G)));
    let blocks: Vec<_> = map.take_unsaved(9).iter().map(|block| block.index).collect();
    assert_eq!(blocks, [1, 2, 3]);
    blocks.into_iter().for_each(|block| map.stored(block));
    map.clear(range(0, G));
    assert!(!map.has_unsaved());
    assert_eq!(map.lagging_len(), 1);
    let taken = map.take_lagging(9);
    assert_eq!((taken.len(), taken[0].words[0]), (1, u64::MAX - 1));
    map.clear(range(G, G));
    map.stored(0);
    assert_eq!(map.lagging_len(), 1, "cleared after the store was taken");
}

#[test]
#[should_panic(expected = "was not being stored")]
fn a_store_that_was_never_taken_is_a_bug() {
    map().stored(0);
}

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Clear(u64, u64),
    TakeUnsaved,
    TakeLagging,
    Stored(bool),
}

fn any_op() -> impl Strategy<Value = Op> {
    let start = || prop_oneof![0..SIZE, 0..200 * G, SIZE - 100 * G..SIZE];
    let len = || prop_oneof![1..3 * G, 1..200 * G, 1..SIZE];
    prop_oneof![
        4 => (start(), len()).prop_map(|(start, len)| Op::Set(start, len.min(SIZE - start))),
        3 => (start(), len()).prop_map(|(start, len)| Op::Clear(start, len.min(SIZE - start))),
        2 => Just(Op::TakeUnsaved),
        1 => Just(Op::TakeLagging),
        3 => any::<bool>().prop_map(Op::Stored),
    ]
}

proptest! {
    #[test]
    fn it_marks_and_finds_what_a_plain_set_does_and_never_calls_durable_what_is_not(
        ops in proptest::collection::vec(any_op(), 1..60),
    ) {
        let grains = |r: ByteRange| r.start / G..r.end().div_ceil(G);
        let mut map = map();
        let mut model = BTreeSet::new();
        let mut disk = vec![0; map.words.len()];
        let mut taken: Vec<DirtyBlock> = Vec::new();
        for op in ops {
            match op {
                Op::Set(start, len) => {
                    let _ = map.set(range(start, len));
                    model.extend(grains(range(start, len)));
                }
                Op::Clear(start, len) => {
                    map.clear(range(start, len));
                    let end = start + len;
                    let cut = |g: u64| ((g + 1) * G).min(SIZE);
                    let inside: Vec<_> = model.range(start / G..).copied().take_while(|g| g * G < end).collect();
                    for g in inside.into_iter().filter(|&g| g * G >= start && cut(g) <= end) {
                        model.remove(&g);
                    }
                }
                Op::TakeUnsaved => taken.extend(map.take_unsaved(1)),
                Op::TakeLagging => taken.extend(map.take_lagging(1)),
                Op::Stored(ok) => if let Some(block) = taken.pop() {
                    if ok {
                        disk[block.index * BLOCK_WORDS..][..BLOCK_WORDS].copy_from_slice(&*block.words);
                        map.stored(block.index);
                    } else {
                        map.not_stored(block.index);
                    }
                },
            }
            // What is called durable stands in the stored bitmap.
            for at in [0, 63 * G, 199 * G, SIZE / 2, SIZE - 1] {
                if map.is_durable(range(at, 1)) {
                    let (word, mask) = place(at / G);
                    prop_assert!(disk[word] & mask != 0, "{at} is not stored");
                }
            }
        }
        let mut found = BTreeSet::new();
        let mut from = 0;
        while let Some(run) = map.next_dirty(from, 300 * G) {
            found.extend(grains(run));
            from = run.end().next_multiple_of(G);
        }
        prop_assert_eq!(&found, &model);
        prop_assert_eq!(map.dirty_grains(), model.len() as u64);
        prop_assert_eq!(map.dirty_bytes(), model.iter().map(|g| G.min(SIZE - g * G)).sum::<u64>());
        // With everything stored, the stored bitmap is the map.
        for block in taken.drain(..) {
            map.not_stored(block.index);
        }
        let mut rest = map.take_unsaved(9);
        rest.extend(map.take_lagging(9));
        for block in rest {
            disk[block.index * BLOCK_WORDS..][..BLOCK_WORDS].copy_from_slice(&*block.words);
            map.stored(block.index);
        }
        prop_assert!(!map.has_unsaved() && map.lagging_len() == 0);
        prop_assert_eq!(&disk, &map.words);
        let mut again = DirtyBitmap::new(map.geometry());
        again.load(0, disk.iter().copied());
        prop_assert_eq!(again.dirty_grains(), map.dirty_grains());
    }

    #[test]
    fn bits_behind_the_end_are_dropped_when_read(words in proptest::collection::vec(any::<u64>(), 4)) {
        let mut map = map();
        let last = index(SIZE.div_ceil(G)) / 64;
        map.load(last - 1, words.into_iter());
        prop_assert!(map.next_dirty(0, u64::MAX).is_none_or(|run| run.end() <= SIZE));
        let mut grains = 0;
        let mut from = 0;
        while let Some(run) = map.next_dirty(from, G) {
            grains += 1;
            from = run.end().next_multiple_of(G);
        }
        prop_assert_eq!(map.dirty_grains(), grains);
    }
}

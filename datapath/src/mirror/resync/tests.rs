//! The copy's order, bounds and arithmetic, against bitmaps and a peer made up here.

use super::*;
use crate::limits::{RESYNC_CHUNK_LEN, RESYNC_CHUNKS_IN_FLIGHT};
use proptest::prelude::*;

const G: u64 = DIRTY_GRAIN_LEN;

#[test]
fn a_stretch_of_data_is_asked_for_once_and_anew_after_a_step_back() {
    let size = 8 * RESYNC_CHUNK_LEN;
    let mut bitmap = Bitmap::new(size);
    bitmap.set_all();
    let mut resync = Resync::new(&bitmap, size, false);
    let dirty = resync.next(&bitmap).expect("all of it").range;
    assert_eq!(resync.known_data(dirty), None, "not asked yet");
    resync.found_data(ByteRange::new(0, 3 * RESYNC_CHUNK_LEN));
    let first = ByteRange::new(0, RESYNC_CHUNK_LEN);
    resync.took(first);
    let rest = resync.next(&bitmap).expect("more").range;
    assert_eq!(resync.known_data(rest), Some(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN)));
    resync.took(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN));
    let beyond = resync.next(&bitmap).expect("more").range;
    assert_eq!(resync.known_data(beyond), None, "the end of what was found");
    resync.found_data(beyond);
    resync.untake(first, false);
    assert_eq!(resync.known_data(dirty), None, "there may be a hole in front");
    assert_eq!(resync.next(&bitmap), Some(Wanted { range: first, differs: false }), "it comes again");
}

#[test]
fn a_grain_is_cleared_when_its_last_step_is_applied() {
    let mut bitmap = Bitmap::new(2 * G);
    bitmap.set_all();
    let mut resync = Resync::new(&bitmap, 2 * G, false);
    for start in [0, G / 2, G] {
        resync.took(ByteRange::new(start, G / 2));
    }
    resync.applied(ByteRange::new(G / 2, G / 2), &mut bitmap);
    resync.applied(ByteRange::new(G, G / 2), &mut bitmap);
    assert_eq!(bitmap.dirty_bytes(), 2 * G, "no grain is whole yet");
    resync.applied(ByteRange::new(0, G / 2), &mut bitmap);
    assert_eq!(bitmap.dirty_bytes(), G);
    assert!(!resync.take_flush(&bitmap), "half a grain is left to begin");
}

proptest! {
    /// Whatever the steps' lengths, however many fail to start, and whatever the peer holds: all that differs is sent,
    /// nothing is sent that need not be, and it ends with one flush.
    #[test]
    fn it_sends_what_differs_and_ends(
        grains in 1..40_u64,
        tail in prop_oneof![Just(0), 1..G],
        dirty in prop::collection::btree_set(0..40_u64, 0..30),
        differing in prop::collection::btree_set(0..40_u64, 0..30),
        compares in any::<bool>(),
        lens in prop::collection::vec((1..9_u64, 0..8_u8, any::<bool>()), 40),
    ) {
        let size = grains * G + tail;
        let last = size.div_ceil(G);
        let dirty: Vec<u64> = dirty.into_iter().filter(|grain| *grain < last).collect();
        // Only what is marked may differ.
        let differing: Vec<u64> = differing.into_iter().filter(|grain| dirty.contains(grain)).collect();
        let mut bitmap = Bitmap::new(size);
        for grain in &dirty {
            bitmap.set(ByteRange::new(grain * G, 1));
        }
        let total = bitmap.dirty_bytes();
        let mut resync = Resync::new(&bitmap, size, compares);
        let mut under_way = VecDeque::new();
        let mut sent = Ranges::default();
        let mut sent_bytes = 0;
        let mut at = 0;
        while !resync.take_flush(&bitmap) {
            let (eighths, refuse, drain) = lens[at % lens.len()];
            at += 1;
            prop_assert!(at < 100_000, "it never ends");
            if let Some(wanted) = resync.next(&bitmap).filter(|_| under_way.len() < RESYNC_CHUNKS_IN_FLIGHT) {
                let asks = resync.compares(wanted);
                let len = if asks { (eighths * G).min(wanted.range.len) } else { (eighths * G / 8).min(wanted.range.len) };
                let range = ByteRange::new(wanted.range.start, len);
                resync.took(range);
                if refuse == 0 {
                    resync.untake(range, wanted.differs);
                } else {
                    under_way.push_back((range, asks));
                }
            }
            if (drain || resync.next(&bitmap).is_none() || under_way.len() == RESYNC_CHUNKS_IN_FLIGHT)
                && let Some((range, asks)) = under_way.pop_front()
            {
                let differs = (range.start / G..range.end().div_ceil(G)).any(|grain| differing.contains(&grain));
                if asks && differs {
                    resync.differs(range);
                } else {
                    resync.applied(range, &mut bitmap);
                }
                if !asks {
                    sent.insert(range);
                    sent_bytes += range.len;
                }
            }
        }
        prop_assert_eq!((bitmap.dirty_bytes(), under_way.len()), (0, 0));
        prop_assert!((resync.percent(&bitmap) - 100.0).abs() < 1e-9);
        prop_assert!(!resync.take_flush(&bitmap), "once");
        let expected: u64 = if compares {
            differing.iter().map(|grain| G.min(size - grain * G)).sum()
        } else {
            dirty.iter().map(|grain| G.min(size - grain * G)).sum()
        };
        prop_assert_eq!(sent_bytes, expected);
        prop_assert_eq!(sent.bytes(), expected, "nothing twice");
        prop_assert!(total >= expected);
    }
}

//! The copy's order, bounds and arithmetic, against dirty bitmaps and a peer made up here.

use super::*;
use crate::disk::metadata::layout::Geometry;
use crate::limits::{DIRTY_GRAIN_LEN as G, RESYNC_CHUNK_LEN, RESYNC_CHUNKS_IN_FLIGHT};
use proptest::prelude::*;

fn map(size: u64, marks: impl IntoIterator<Item = ByteRange>) -> DirtyBitmap {
    let mut dirty = DirtyBitmap::new(Geometry::for_volume(size).expect("usual"));
    for mark in marks {
        let _ = dirty.set(mark);
    }
    dirty
}

fn full(size: u64) -> DirtyBitmap {
    map(size, [ByteRange::new(0, size)])
}

fn begun(dirty: &DirtyBitmap, size: u64, compares: bool) -> Resync {
    let mut resync = Resync::new(G, size, compares);
    assert_eq!(resync.next(dirty), None, "the peer has not told yet");
    assert!(resync.told_all(dirty, Vec::new()) && !resync.told_all(dirty, Vec::new()));
    resync
}

#[test]
fn a_stretch_of_data_is_asked_for_once_and_anew_after_a_step_back() {
    let size = 8 * RESYNC_CHUNK_LEN;
    let dirty = full(size);
    let mut resync = begun(&dirty, size, false);
    let all = resync.next(&dirty).expect("all of it").range;
    assert_eq!(resync.known_data(all), None, "not asked yet");
    resync.found_data(ByteRange::new(0, 3 * RESYNC_CHUNK_LEN));
    let first = ByteRange::new(0, RESYNC_CHUNK_LEN);
    resync.took(first);
    let rest = resync.next(&dirty).expect("more").range;
    assert_eq!(resync.known_data(rest), Some(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN)));
    resync.took(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN));
    let beyond = resync.next(&dirty).expect("more").range;
    assert_eq!(resync.known_data(beyond), None, "the end of what was found");
    resync.found_data(beyond);
    resync.untake(first, false);
    assert_eq!(resync.known_data(all), None, "there may be a hole in front");
    assert_eq!(resync.next(&dirty), Some(Wanted { range: first, differs: false }), "it comes again");
}

#[test]
fn a_grain_is_cleared_when_all_of_it_was_applied_before_the_flush() {
    let (dirty, now) = (full(2 * G), Instant::now());
    let mut resync = begun(&dirty, 2 * G, false);
    let half = |n: u64| ByteRange::new(n * G / 2, G / 2);
    for n in 0..4 {
        resync.took(half(n));
    }
    resync.applied(half(1));
    resync.applied(half(2));
    let later = now + Duration::from_millis(RESYNC_FLUSH_MS);
    assert!(!resync.take_flush(&dirty, now) && resync.take_flush(&dirty, later));
    resync.applied(half(0));
    assert_eq!(resync.flushed(), (vec![], false), "no grain was whole");
    resync.applied(half(3));
    resync.kept();
    assert!(resync.take_flush(&dirty, later));
    assert_eq!(resync.flushed(), (vec![ByteRange::new(0, 2 * G)], true));
}

#[test]
fn a_flush_covers_what_was_applied_before_it_and_comes_by_bytes_or_by_time() {
    let size = 3 * RESYNC_FLUSH_LEN;
    let dirty = full(size);
    let (mut resync, now) = (begun(&dirty, size, false), Instant::now());
    let step = |n: u64| ByteRange::new(n * RESYNC_CHUNK_LEN, RESYNC_CHUNK_LEN);
    for n in [0, 1, 3] {
        resync.took(step(n));
    }
    resync.applied(step(0));
    assert!(!resync.take_flush(&dirty, now), "too little");
    resync.applied(step(1));
    let later = now + Duration::from_millis(RESYNC_FLUSH_MS);
    assert!(resync.take_flush(&dirty, later), "time is up");
    resync.applied(step(3));
    assert!(!resync.take_flush(&dirty, later + Duration::from_secs(9)), "one at a time");
    assert_eq!(resync.flushed(), (vec![ByteRange::new(0, 2 * RESYNC_CHUNK_LEN)], false));
    let large = ByteRange::new(4 * RESYNC_CHUNK_LEN, RESYNC_FLUSH_LEN);
    resync.took(large);
    resync.applied(large);
    assert!(resync.take_flush(&dirty, later), "enough");
    let all = ByteRange::new(3 * RESYNC_CHUNK_LEN, RESYNC_CHUNK_LEN + RESYNC_FLUSH_LEN);
    assert_eq!(resync.flushed(), (vec![all], false));
}

#[test]
fn a_map_is_told_forwards_and_once() {
    let mut resync = Resync::new(G, 8 * G, false);
    assert!(resync.told(ByteRange::new(G, G)) && resync.told(ByteRange::new(2 * G, G)));
    assert!(!resync.told(ByteRange::new(2 * G, G)), "goes back");
    assert!(resync.told_all(&full(8 * G), Vec::new()));
    assert!(!resync.told(ByteRange::new(5 * G, G)), "after its end");
}

#[derive(Debug, Clone)]
struct Play {
    size: u64,
    marked: Vec<u64>,
    differing: Vec<u64>,
    compares: bool,
    /// Length of a step in eighths, whether it cannot start at 0, whether an answer comes first.
    dice: Vec<(u64, u8, bool)>,
}

fn plays() -> impl Strategy<Value = Play> {
    let grains = || prop::collection::btree_set(0..40_u64, 0..30);
    let dice = prop::collection::vec((1..9_u64, 0..8_u8, any::<bool>()), 40);
    (1..40_u64, prop_oneof![Just(0), 1..G], grains(), grains(), any::<bool>(), dice).prop_map(
        |(whole, tail, marked, differing, compares, dice)| {
            let size = whole * G + tail;
            let marked: Vec<u64> = marked.into_iter().filter(|grain| *grain < size.div_ceil(G)).collect();
            // Only what is marked may differ.
            let differing = differing.into_iter().filter(|grain| marked.contains(grain)).collect();
            Play { size, marked, differing, compares, dice }
        },
    )
}

/// Plays it, and gives back what was sent: its extent and its bytes, and the ranges cleared.
fn play(play: &Play) -> (u64, u64, Vec<ByteRange>) {
    let Play { size, marked, differing, compares, dice } = play;
    let dirty = map(*size, marked.iter().map(|grain| ByteRange::new(grain * G, 1)));
    let mut resync = begun(&dirty, *size, *compares);
    resync.kept();
    let now = Instant::now();
    let (mut under_way, mut sent, mut sent_bytes) = (VecDeque::new(), Ranges::default(), 0);
    let mut rolls = dice.iter().cycle();
    while !resync.take_flush(&dirty, now) {
        let (eighths, refuse, drain) = rolls.next().expect("endless");
        if let Some(wanted) = resync.next(&dirty).filter(|_| under_way.len() < RESYNC_CHUNKS_IN_FLIGHT) {
            let asks = resync.compares(wanted);
            let len = if asks { eighths * G } else { eighths * G / 8 };
            let range = ByteRange::new(wanted.range.start, len.min(wanted.range.len));
            resync.took(range);
            if *refuse == 0 {
                resync.untake(range, wanted.differs);
            } else {
                under_way.push_back((range, asks));
            }
        }
        let full = resync.next(&dirty).is_none() || under_way.len() == RESYNC_CHUNKS_IN_FLIGHT;
        if (*drain || full)
            && let Some((range, asks)) = under_way.pop_front()
        {
            let differs = (range.start / G..range.end().div_ceil(G)).any(|grain| differing.contains(&grain));
            if asks && differs {
                resync.differs(range);
            } else {
                resync.applied(range);
            }
            if !asks {
                sent.insert(range);
                sent_bytes += range.len;
            }
        }
    }
    assert!(under_way.is_empty(), "the last flush comes behind the last step");
    assert!(!resync.take_flush(&dirty, now), "once");
    let (total, done) = resync.progress();
    assert!(done <= total && total < done + G, "the last grain may be short: {done} of {total}");
    let (cleared, ended) = resync.flushed();
    assert!(ended);
    (sent.bytes(), sent_bytes, cleared)
}

proptest! {
    /// Whatever the steps' lengths, however many fail to start, and whatever the peer holds: all that differs is sent,
    /// nothing that need not be and nothing twice, and in the end all that was marked is cleared.
    #[test]
    fn it_sends_what_differs_and_ends(game in plays()) {
        let (extent, bytes, cleared) = play(&game);
        let bytes_of = |grains: &[u64]| grains.iter().map(|grain| G.min(game.size - grain * G)).sum::<u64>();
        let expected = if game.compares { bytes_of(&game.differing) } else { bytes_of(&game.marked) };
        prop_assert_eq!((extent, bytes), (expected, expected));
        let mut left = map(game.size, game.marked.iter().map(|grain| ByteRange::new(grain * G, 1)));
        for range in cleared {
            left.clear(range);
        }
        prop_assert_eq!(left.dirty_bytes(), 0);
    }
}

//! The background alone: no link, no request, no pipeline.

use super::*;
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::image::DiskImage;
use crate::disk::metadata::layout::Geometry;
use crate::limits::{DIRTY_GRAIN_LEN as G, RESYNC_CHUNKS_IN_FLIGHT};
use std::sync::Arc;

const SIZE: u64 = 64 * G;

/// A disk full of data, and a map with these grains marked.
fn world(marked: &[u64]) -> (Arc<DiskImage>, DirtyBitmap) {
    let disk = DiskImage::memory("test", SIZE).expect("memory");
    disk.span(ByteRange::new(0, SIZE)).write_from(&vec![7; usize::try_from(SIZE).expect("64-bit")]);
    let mut dirty = DirtyBitmap::new(Geometry::for_volume(SIZE).expect("usual"));
    for grain in marked {
        let _ = dirty.set(ByteRange::new(grain * G, G));
    }
    (disk, dirty)
}

/// A background whose copy has heard all of the peer's marks.
fn copying(dirty: &DirtyBitmap) -> Background {
    let mut background = Background::new(false);
    background.begin_copy(dirty);
    let copy = background.copy_mut().expect("begun");
    assert!(copy.told_all(dirty, Vec::new()));
    copy.kept();
    background
}

fn copy_steps(background: &mut Background, now: Instant, dirty: &DirtyBitmap, disk: &DiskImage) -> Vec<Step> {
    std::iter::from_fn(|| background.next_copy_step(now, false, dirty, disk)).collect()
}

fn serial(step: &Step) -> u64 {
    let (Origin::Resync { serial } | Origin::Verify { serial }) = step.origin else { panic!("{step:?}") };
    serial
}

#[test]
fn a_copy_sends_what_is_marked_and_ends_behind_its_flush() {
    let (disk, dirty) = world(&[3, 4, 40]);
    let mut background = copying(&dirty);
    let now = Instant::now();
    background.turn(now);
    let steps = copy_steps(&mut background, now, &dirty, &disk);
    let sent: u64 = steps.iter().map(|step| step.range.len).sum();
    assert_eq!(sent, 3 * G);
    assert!(steps.iter().all(|step| step.kind == Kind::Write));
    assert_eq!(background.copy_flush_due(now, false, &dirty), None, "nothing is applied yet");
    for step in &steps {
        background.copy_step_released(serial(step), step.kind, step.range, false);
    }
    let Some(Origin::ResyncFlush { serial }) = background.copy_flush_due(now, false, &dirty) else {
        panic!("a flush is due behind the last step")
    };
    assert_eq!(background.copy_flushed(serial + 1), None, "the flush of another copy");
    assert!(!background.copy_is_done());
    let (equal, done) = background.copy_flushed(serial).expect("ours");
    assert_eq!((equal.iter().map(|range| range.len).sum::<u64>(), done), (3 * G, true));
    assert!(background.copy_is_done());
}

#[test]
fn a_step_of_a_copy_that_has_ended_counts_for_no_other() {
    let (disk, dirty) = world(&[1]);
    let mut background = copying(&dirty);
    let now = Instant::now();
    let old = background.next_copy_step(now, false, &dirty, &disk).expect("a step");
    background.end_copy();
    assert!(!background.copy_step_holds(serial(&old), old.kind, old.range, &disk));
    background.begin_copy(&dirty);
    assert!(!background.copy_step_holds(serial(&old), old.kind, old.range, &disk));
    let copy = background.copy_mut().expect("begun");
    assert!(copy.told_all(&dirty, Vec::new()));
    copy.kept();
    background.copy_step_released(serial(&old), old.kind, old.range, false);
    let again = background.next_copy_step(now, false, &dirty, &disk).expect("nothing of it was applied");
    assert_eq!((again.range, serial(&again)), (old.range, serial(&old) + 1));
}

#[test]
fn a_step_without_room_comes_again() {
    let (disk, dirty) = world(&[1]);
    let mut background = copying(&dirty);
    let now = Instant::now();
    let step = background.next_copy_step(now, false, &dirty, &disk).expect("a step");
    assert_eq!(background.next_copy_step(now, false, &dirty, &disk), None);
    background.untake(step);
    assert_eq!(background.next_copy_step(now, false, &dirty, &disk), Some(step));
}

#[test]
fn a_hole_that_was_filled_while_its_step_waited_is_planned_anew() {
    let disk = DiskImage::memory("test", SIZE).expect("memory");
    let (_, dirty) = world(&[2, 3]);
    let mut background = copying(&dirty);
    let now = Instant::now();
    let step = background.next_copy_step(now, false, &dirty, &disk).expect("a step");
    assert_ne!(step.kind, Kind::Write, "the disk is a hole");
    assert!(background.copy_step_holds(serial(&step), step.kind, step.range, &disk));
    disk.span(ByteRange::new(2 * G, 10)).write_from(&[1; 10]);
    assert!(!background.copy_step_holds(serial(&step), step.kind, step.range, &disk));
    let anew = background.next_copy_step(now, false, &dirty, &disk).expect("a step");
    assert_eq!((anew.kind, anew.range.start), (Kind::Write, 2 * G));
}

#[test]
fn a_paused_background_begins_nothing_unless_clients_wait_for_the_copy() {
    let (disk, dirty) = world(&[1]);
    let mut background = copying(&dirty);
    background.begin_verify(SIZE, G, false);
    let now = Instant::now();
    background.pause();
    assert_eq!(background.next_copy_step(now, false, &dirty, &disk), None);
    assert_eq!(background.next_verify_step(now, &disk), None);
    let step = background.next_copy_step(now, true, &dirty, &disk).expect("clients wait");
    background.untake(step);
    background.resume();
    assert!(background.next_copy_step(now, false, &dirty, &disk).is_some());
    assert!(background.next_verify_step(now, &disk).is_some());
}

#[test]
fn beside_clients_steps_are_paced_and_the_moment_of_the_next_is_known() {
    let all: Vec<_> = (0..64).collect();
    let (disk, dirty) = world(&all);
    let now = Instant::now();
    let mut idle = copying(&dirty);
    idle.turn(now);
    let alone = copy_steps(&mut idle, now, &dirty, &disk);
    assert!(
        alone.len() == RESYNC_CHUNKS_IN_FLIGHT
            || alone.iter().map(|step| step.range.len).sum::<u64>() == SIZE
    );
    assert_eq!(idle.due(), None);
    let mut busy = copying(&dirty);
    busy.client_came();
    busy.turn(now);
    assert!(!busy.is_idle_for(now, Duration::from_millis(1)) && idle.is_idle_for(now, Duration::MAX));
    let beside = copy_steps(&mut busy, now, &dirty, &disk);
    assert!(beside.len() < alone.len(), "{} and {}", beside.len(), alone.len());
    let later = now + Duration::from_millis(CLIENTS_BUSY_MS);
    for step in &beside {
        busy.copy_step_released(serial(step), step.kind, step.range, false);
    }
    busy.turn(later);
    assert!(copy_steps(&mut busy, later, &dirty, &disk).len() >= beside.len(), "the clients are gone");
}

#[test]
fn a_verification_compares_all_once_and_says_what_differs() {
    let (disk, mut dirty) = world(&[]);
    let mut background = Background::new(true);
    background.begin_verify(SIZE, G, true);
    let now = Instant::now();
    let (mut compared, mut rounds) = (0, 0);
    while background.compared().is_none() {
        let step = background.next_verify_step(now, &disk).expect("one at a time");
        let differs = step.range.start <= 5 * G && step.range.end() > 5 * G;
        // What was lost with a link is asked again.
        let told = (rounds != 3).then_some(!differs);
        rounds += 1;
        if background.step_compared(serial(&step), step.range, told) {
            let _ = dirty.set(step.range);
        }
        compared += step.range.len;
        assert!(!background.step_compared(serial(&step) + 1, step.range, Some(false)), "of another");
    }
    assert!(compared > SIZE, "a stretch that differs is taken apart");
    assert_eq!(background.compared(), Some(Compared::All { repair: true }));
    assert_eq!(dirty.dirty_bytes(), G);
    background.repair(&dirty);
    assert!(background.repairs() && background.is_copying() && background.compared().is_none());
    let step = background.next_copy_step(now, false, &dirty, &disk).expect("without a word of the peer");
    assert_eq!((step.kind, step.range.start), (Kind::Write, 5 * G), "sent, not asked");
    let findings = background.finish_verify().expect("under way");
    assert_eq!((findings.compared, findings.listed), (SIZE, vec![ByteRange::new(5 * G, G)]));
    assert!(background.finish_verify().is_none() && background.cut_verify().is_none());
}

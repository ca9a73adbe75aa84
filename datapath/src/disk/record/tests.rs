//! The record over a medium that tears and loses what was not synced: waits, checkpoints, long changes, and crashes at
//! any step.

use super::*;
use crate::disk::metadata::{create, open};
use crate::disk::superblock::Superblock;
use crate::testing::simulated_medium::{Dice, Simulated};
use std::collections::VecDeque;

const G: u64 = crate::limits::DIRTY_GRAIN_LEN;
const EXTENT: u64 = 4 << 20;
const SLOTS: u64 = 64;
const SIZE: u64 = 1 << 30;
/// Longer than what one touch of a log of 64 slots covers.
const LONG: u64 = 100 << 20;

fn geometry() -> Geometry {
    Geometry::new(SIZE, G, EXTENT, 64).expect("small")
}

fn fresh() -> (Simulated, Record) {
    let medium = Simulated::default();
    create(&medium, 0, &Superblock::fresh("v", "alpha", SIZE, true), geometry(), 7, false).expect("made");
    let record = reopen(&medium);
    (medium, record)
}

/// As a daemon does at its start.
fn reopen(medium: &Simulated) -> Record {
    let mut opened = open(medium.clone(), 0, "v", "alpha", SIZE).expect("readable");
    opened.recover().expect("stored");
    Record::of(opened).0
}

/// What a crash leaves marked.
fn after_crash(medium: &Simulated) -> DirtyBitmap {
    medium.restart(true, &mut Dice::new(5));
    open(medium.clone(), 0, "v", "alpha", SIZE).expect("readable").dirty
}

/// Carries the next job out. Returns whether there was one.
fn carry_out(record: &mut Record, now: Instant) -> bool {
    let Some(kind) = record.next_job(now) else { return false };
    store(record, &kind);
    record.job_done(&kind, false);
    true
}

fn store(record: &Record, kind: &JobKind) {
    let store = record.store.as_ref().expect("it has one");
    match kind {
        JobKind::Commit(transaction) => store.commit(transaction).expect("stored"),
        JobKind::StoreDirty(blocks) => store.store_dirty(blocks).expect("stored"),
        other => panic!("{other:?}"),
    }
}

fn all_jobs(record: &mut Record) {
    while carry_out(record, Instant::now()) {}
}

/// A change that is let through, whatever that takes.
fn change(record: &mut Record, token: u64, range: ByteRange) -> Touched {
    match record.touch(Token(token), range) {
        Admit::Go(touched) => touched,
        Admit::Parked => {
            all_jobs(record);
            let (ready, touched) = record.next_ready().expect("on record by now");
            assert_eq!(ready, Token(token));
            touched
        }
    }
}

fn written(record: &mut Record, token: u64, range: ByteRange) {
    let touched = change(record, token, range);
    record.written(Token(token), range, touched);
}

fn extent(n: u64) -> ByteRange {
    ByteRange::new(n * EXTENT, 4096)
}

fn is_dirty(map: &DirtyBitmap, range: ByteRange) -> bool {
    map.next_dirty(range.start, u64::MAX).is_some_and(|run| run.start < range.end())
}

#[test]
fn a_change_to_a_cold_place_waits_until_a_crash_would_find_it() {
    let (medium, mut record) = fresh();
    assert_eq!(record.touch(Token(1), extent(3)), Admit::Parked);
    let kind = record.next_job(Instant::now()).expect("a transaction");
    assert!(record.next_ready().is_none() && record.next_job(Instant::now()).is_none());
    store(&record, &kind);
    record.job_done(&kind, false);
    assert_eq!(record.next_ready(), Some((Token(1), Touched::Log)));
    assert_eq!(record.touch(Token(2), extent(3)), Admit::Go(Touched::Log), "hot now");
    assert!(is_dirty(&after_crash(&medium), extent(3)));
}

#[test]
fn whoever_marks_all_or_tells_its_marks_hears_of_it_once_they_are_stored_and_only_once() {
    use std::sync::mpsc;
    let (_medium, mut record) = fresh();
    let (told, heard) = mpsc::channel();
    let again = told.clone();
    record.mark_all(Box::new(move |result| told.send(result).expect("the test listens")));
    record.peer_told_all();
    record.tell_marked_all();
    assert!(heard.try_recv().is_err() && !record.take_told_stored(), "nothing is stored yet");
    all_jobs(&mut record);
    record.tell_marked_all();
    record.tell_marked_all();
    assert_eq!((heard.try_recv(), heard.try_recv().is_err()), (Ok(Ok(())), true), "once");
    assert!(record.take_told_stored() && !record.take_told_stored(), "once");
    record.clear_all();
    record.mark_all(Box::new(move |result| again.send(result).expect("the test listens")));
    record.fail_marked_all("the disk failed");
    all_jobs(&mut record);
    record.tell_marked_all();
    assert_eq!((heard.try_recv(), heard.try_recv().is_err()), (Ok(Err("the disk failed".into())), true));
    let _ = record.dirty.set(extent(1));
    record.peer_told_all();
    record.session_ended(true);
    all_jobs(&mut record);
    assert!(!record.take_told_stored(), "of a session that has ended");
}

#[test]
fn a_checkpoint_ends_with_the_flush_that_it_rides_on_and_with_no_other() {
    let (_medium, mut record) = fresh();
    record.session_began();
    written(&mut record, 1, extent(1));
    record.ride_on(Token(7));
    assert!(record.in_checkpoint());
    record.ride_on(Token(8));
    record.flush_ended(Token(8));
    assert!(record.in_checkpoint(), "one that began after it");
    record.flush_ended(Token(7));
    assert!(!record.in_checkpoint());
    written(&mut record, 2, extent(1));
    record.ride_on(Token(9));
    record.session_ended(true);
    record.session_began();
    written(&mut record, 3, extent(1));
    let serial = record.begin_checkpoint();
    assert!(serial.is_some());
    record.flush_ended(Token(9));
    assert!(record.in_checkpoint(), "one of the session before");
}

#[test]
fn a_full_log_is_waited_for_in_order_and_a_checkpoint_makes_room() {
    let (_medium, mut record) = fresh();
    record.session_began();
    for n in 0..SLOTS {
        written(&mut record, n, extent(n));
    }
    assert_eq!(record.touch(Token(100), extent(200)), Admit::Parked);
    assert_eq!(record.touch(Token(101), extent(1)), Admit::Parked, "hot, but not first");
    all_jobs(&mut record);
    assert_eq!(record.next_ready(), None);
    assert!(record.checkpoint_is_due(Instant::now()), "at once: somebody waits");
    let serial = record.begin_checkpoint().expect("with a peer: a flush");
    all_jobs(&mut record);
    assert!(record.next_ready().is_none() && record.in_checkpoint());
    record.flushed(serial + 1);
    assert!(record.in_checkpoint(), "another's flush");
    record.flushed(serial);
    assert!(!record.in_checkpoint());
    assert_eq!(record.next_ready(), Some((Token(101), Touched::Log)));
    all_jobs(&mut record);
    assert_eq!(record.next_ready(), Some((Token(100), Touched::Log)));
    assert_eq!(record.parked_len(), 0);
}

#[test]
fn what_is_parked_can_be_taken_back_wherever_it_stands() {
    let (_medium, mut record) = fresh();
    for n in 0..SLOTS {
        assert_eq!(record.touch(Token(n), extent(n)), Admit::Parked);
    }
    assert_eq!(record.touch(Token(99), extent(99)), Admit::Parked, "no room");
    assert_eq!(record.touch(Token(98), ByteRange::new(0, LONG)), Admit::Parked, "too long");
    assert!(record.give_up(Token(99)) && record.give_up(Token(98)) && record.give_up(Token(7)));
    assert!(!record.give_up(Token(99)));
    all_jobs(&mut record);
    let mut parked = record.parked();
    parked.sort_by_key(|token| token.0);
    assert_eq!(parked.len() as u64, SLOTS - 1);
    for token in parked {
        assert!(record.give_up(token), "about to be told");
    }
    assert_eq!((record.parked_len(), record.next_ready()), (0, None));
    record.settle();
    all_jobs(&mut record);
    assert_eq!(record.activity.hot_extents().count(), 0, "nothing holds an extent any more");
}

#[test]
fn a_lost_session_marks_what_was_written_unless_both_disks_have_it() {
    for durable in [false, true] {
        let (medium, mut record) = fresh();
        record.session_began();
        written(&mut record, 1, extent(5));
        let serial = record.begin_checkpoint().expect("a flush");
        written(&mut record, 2, extent(6));
        record.session_ended(durable);
        record.flushed(serial);
        assert_eq!(record.is_dirty(), !durable);
        assert_eq!(record.in_checkpoint(), !durable, "until the marks are stored");
        all_jobs(&mut record);
        assert!(!record.in_checkpoint() && !record.activity.has_unconfirmed());
        assert_eq!(record.dirty.dirty_grains(), if durable { 0 } else { 2 });
        record.settle();
        all_jobs(&mut record);
        let left = after_crash(&medium);
        assert_eq!(left.dirty_grains(), if durable { 0 } else { 2 });
    }
}

#[test]
fn a_long_change_rests_on_its_bits_until_a_checkpoint_with_the_peer() {
    let (medium, mut record) = fresh();
    record.session_began();
    let range = ByteRange::new(512, LONG);
    assert_eq!(record.touch(Token(1), range), Admit::Parked);
    assert_eq!(record.next_ready(), None);
    all_jobs(&mut record);
    assert_eq!(record.next_ready(), Some((Token(1), Touched::Long)));
    let grains = LONG / G + 1;
    assert_eq!(after_crash(&medium).dirty_grains(), grains);
    // Both of its halves again, while it is being settled.
    record.written(Token(1), range, Touched::Long);
    let serial = record.begin_checkpoint().expect("a flush");
    assert_eq!(record.touch(Token(2), range), Admit::Go(Touched::Long), "its bits are stored");
    record.flushed(serial);
    assert_eq!(record.dirty.dirty_grains(), grains, "the second rests on the same bits");
    record.clear(&[ByteRange::new(0, 4 * LONG)]);
    assert_eq!(record.dirty.dirty_grains(), grains, "a copy's end does not take them away either");
    record.written(Token(2), range, Touched::Long);
    let serial = record.begin_checkpoint().expect("a flush");
    record.flushed(serial);
    assert_eq!(record.dirty.dirty_grains(), 0, "those at its ends included");
}

#[test]
fn a_long_change_of_a_session_that_ended_stays_marked() {
    let (_medium, mut record) = fresh();
    record.session_began();
    let range = ByteRange::new(512, LONG);
    let touched = change(&mut record, 1, range);
    record.session_ended(false);
    record.written(Token(1), range, touched);
    record.session_began();
    written(&mut record, 2, extent(200));
    let serial = record.begin_checkpoint().expect("a flush");
    record.flushed(serial);
    assert_eq!(record.dirty.dirty_grains(), LONG / G + 1);
}

#[test]
fn what_a_copy_clears_under_a_long_change_goes_with_that_change() {
    let (_medium, mut record) = fresh();
    let copied = ByteRange::new(0, G);
    record.mark(copied);
    record.session_began();
    let range = ByteRange::new(512, LONG);
    let touched = change(&mut record, 1, range);
    record.clear(&[copied]);
    assert!(is_dirty(&record.dirty, copied), "the change rests on it");
    // A checkpoint that the change does not end before covers nothing of it.
    let serial = record.begin_checkpoint().expect("a flush");
    record.written(Token(1), range, touched);
    record.flushed(serial);
    assert!(is_dirty(&record.dirty, copied));
    let serial = record.begin_checkpoint().expect("a flush");
    record.flushed(serial);
    assert_eq!(record.dirty.dirty_grains(), 0, "its first grain was marked before it came, and not by it");
}

#[test]
fn what_a_copy_clears_beside_a_long_change_does_not_wait_for_it() {
    let (_medium, mut record) = fresh();
    let copied = ByteRange::new(0, 2 * LONG);
    record.mark(copied);
    record.session_began();
    let range = ByteRange::new(LONG / 2 / G * G + 512, LONG);
    let touched = change(&mut record, 1, range);
    record.clear(&[copied]);
    let rests_on = LONG / G + 1;
    assert_eq!(record.dirty.dirty_grains(), rests_on, "what the change touches stays, and no more");
    record.written(Token(1), range, touched);
    for _ in 0..2 {
        if record.dirty.dirty_grains() > 0 {
            let serial = record.begin_checkpoint().expect("a flush");
            record.flushed(serial);
        }
    }
    assert_eq!(record.dirty.dirty_grains(), 0, "no grain stays marked");
}

#[test]
fn marks_of_a_long_change_that_is_taken_back_go_unless_another_rests_on_them() {
    let (_medium, mut record) = fresh();
    record.session_began();
    let range = ByteRange::new(512, LONG);
    assert_eq!(record.touch(Token(1), range), Admit::Parked);
    assert!(record.give_up(Token(1)));
    let touched = change(&mut record, 2, range);
    let serial = record.begin_checkpoint().expect("a flush");
    // Something else marked there, and the second change's bits are not its own any more.
    record.forget_long();
    assert!(record.touch(Token(3), ByteRange::new(G, LONG)) == Admit::Go(Touched::Long));
    record.written(Token(2), range, touched);
    record.flushed(serial);
    assert_eq!(record.dirty.dirty_grains(), LONG / G + 1, "neither is covered");
    // Without any other, they go with the next checkpoint.
    let (_medium, mut record) = fresh();
    record.session_began();
    assert_eq!(record.touch(Token(1), range), Admit::Parked);
    assert!(record.give_up(Token(1)));
    all_jobs(&mut record);
    let serial = record.begin_checkpoint().expect("a flush");
    record.flushed(serial);
    assert_eq!(record.dirty.dirty_grains(), 0);
}

#[test]
fn a_round_ends_though_marks_keep_coming() {
    let (_medium, mut record) = fresh();
    let _ = record.dirty.set(extent(1));
    let first = record.ask_store();
    let kind = record.next_job(Instant::now()).expect("a store");
    let _ = record.dirty.set(extent(2));
    let second = record.ask_store();
    assert!(second > first && !record.is_stored(first));
    store(&record, &kind);
    record.job_done(&kind, false);
    assert!(record.is_stored(first) && !record.is_stored(second));
    let kind = record.next_job(Instant::now()).expect("another");
    let _ = record.dirty.set(extent(3));
    store(&record, &kind);
    record.job_done(&kind, false);
    assert!(record.is_stored(second) && record.dirty.has_unsaved());
}

#[test]
fn a_record_that_is_stored_nowhere_keeps_nobody_waiting() {
    let mut record = Record::new(DirtyBitmap::new(geometry()), ActivityLog::new(geometry(), 0, 0), None);
    record.session_began();
    for n in 0..SLOTS {
        assert_eq!(record.touch(Token(n), extent(n)), Admit::Go(Touched::Log));
        record.written(Token(n), extent(n), Touched::Log);
    }
    assert_eq!(record.touch(Token(99), ByteRange::new(0, LONG)), Admit::Go(Touched::Long));
    assert!(record.next_job(Instant::now()).is_none());
    record.session_ended(false);
    assert!(!record.in_checkpoint());
    assert_eq!(record.dirty.dirty_grains(), LONG / G + SLOTS - LONG / EXTENT);
}

/// One primary, its peer's disk, and power that fails: each grain's content is the number of the change that wrote it,
/// in memory and on stable storage of both.
struct Model {
    dice: Dice,
    medium: Simulated,
    record: Record,
    job: Option<JobKind>,
    now: Instant,
    /// Ours and the peer's, as seen and as surely kept.
    seen: [Vec<u64>; 2],
    kept: [Vec<u64>; 2],
    live: bool,
    changes: u64,
    parked: Vec<(Token, ByteRange)>,
    landed: VecDeque<(Token, ByteRange, Touched)>,
    /// A flush of both for a checkpoint, and what both had when it began.
    flush: Option<(u64, [Vec<u64>; 2])>,
}

impl Model {
    fn new(seed: u64) -> Self {
        let (medium, record) = fresh();
        let grains = usize::try_from(SIZE / G).expect("small");
        let blank = || [vec![0; grains], vec![0; grains]];
        Self {
            dice: Dice::new(seed),
            medium,
            record,
            job: None,
            now: Instant::now(),
            seen: blank(),
            kept: blank(),
            live: false,
            changes: 0,
            parked: Vec::new(),
            landed: VecDeque::new(),
            flush: None,
        }
    }

    fn range(&mut self) -> ByteRange {
        let len = match self.dice.below(30) {
            0 => LONG,
            1..6 => 1 + self.dice.below(3 * EXTENT),
            _ => 512,
        };
        // A few hot places and many cold ones.
        let start = if self.dice.below(2) == 0 { self.dice.below(8 * EXTENT) } else { self.dice.below(SIZE) };
        let start = start.min(SIZE - 1);
        ByteRange::new(start, len.min(SIZE - start))
    }

    fn grains(range: ByteRange) -> std::ops::RangeInclusive<usize> {
        let at = |byte: u64| usize::try_from(byte / G).expect("small");
        at(range.start)..=at(range.end() - 1)
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.dice.below(400));
        match self.dice.below(14) {
            0..4 => self.begin(),
            4..6 => self.start_job(),
            6..9 => self.end_job(),
            9..11 => self.land(),
            11 => self.tend(),
            12 => self.flush_ends(),
            _ if self.dice.below(4) > 0 => {}
            _ if self.live => self.cut(),
            _ => self.connect(),
        }
        while let Some((token, touched)) = self.record.next_ready() {
            let at = self.parked.iter().position(|(other, _)| *other == token).expect("it was parked");
            let (_, range) = self.parked.swap_remove(at);
            self.make(token, range, touched);
        }
    }

    fn begin(&mut self) {
        let range = self.range();
        let mut open = self.parked.iter().map(|p| p.1).chain(self.landed.iter().map(|l| l.1));
        if open.any(|other| other.overlaps(range)) {
            return;
        }
        self.changes += 1;
        let token = Token(self.changes);
        match self.record.touch(token, range) {
            Admit::Go(touched) => self.make(token, range, touched),
            Admit::Parked => self.parked.push((token, range)),
        }
    }

    fn make(&mut self, token: Token, range: ByteRange, touched: Touched) {
        for grain in Self::grains(range) {
            self.seen[0][grain] = self.seen[0][grain].max(token.0);
        }
        self.landed.push_back((token, range, touched));
    }

    /// The oldest change reaches the peer, or is answered without it.
    fn land(&mut self) {
        let Some((token, range, touched)) = self.landed.pop_front() else { return };
        if self.live {
            for grain in Self::grains(range) {
                self.seen[1][grain] = self.seen[1][grain].max(token.0);
            }
        } else {
            self.record.mark(range);
        }
        self.record.written(token, range, touched);
    }

    fn start_job(&mut self) {
        if self.job.is_none() {
            self.job = self.record.next_job(self.now);
        }
    }

    fn end_job(&mut self) {
        if let Some(kind) = self.job.take() {
            store(&self.record, &kind);
            self.record.job_done(&kind, false);
        }
    }

    fn tend(&mut self) {
        if self.record.checkpoint_is_due(self.now)
            && let Some(serial) = self.record.begin_checkpoint()
        {
            self.flush = Some((serial, self.seen.clone()));
        } else if self.record.can_retire() {
            self.record.settle();
        }
    }

    fn flush_ends(&mut self) {
        if let Some((serial, seen)) = self.flush.take() {
            self.kept = seen;
            self.record.flushed(serial);
        }
    }

    fn cut(&mut self) {
        let durable = self.landed.is_empty() && self.seen == self.kept;
        for (_, range, _) in &self.landed {
            self.record.mark(*range);
        }
        self.record.session_ended(durable);
        // What it covered of ours it still covers; of the peer nothing is known.
        self.flush = None;
        self.live = false;
    }

    /// A session, and a copy of what is marked, flushed on both.
    fn connect(&mut self) {
        if !self.landed.is_empty() {
            return;
        }
        self.record.session_began();
        self.live = true;
        let (mut from, mut copied) = (0, Vec::new());
        while let Some(run) = self.record.dirty.next_dirty(from, 64 * G) {
            for grain in Self::grains(run) {
                self.seen[1][grain] = self.seen[0][grain];
            }
            copied.push(run);
            from = run.end();
            if from == SIZE || self.dice.below(50) == 0 {
                break;
            }
        }
        for run in &copied {
            for grain in Self::grains(*run) {
                for who in 0..2 {
                    self.kept[who][grain] = self.seen[who][grain];
                }
            }
        }
        self.record.clear(&copied);
    }

    /// Whatever differs in any way that a loss of power could bring out must be marked afterwards.
    fn crash(&mut self, power_lost: bool) {
        self.job = None;
        self.flush = None;
        self.medium.restart(power_lost, &mut self.dice);
        let marked = open(self.medium.clone(), 0, "v", "alpha", SIZE).expect("readable").dirty;
        for grain in 0..self.seen[0].len() {
            let versions = [&self.seen[0], &self.seen[1], &self.kept[0], &self.kept[1]];
            let differs = versions.iter().any(|disk| disk[grain] != self.seen[0][grain]);
            let start = grain as u64 * G;
            assert!(
                !differs || is_dirty(&marked, ByteRange::new(start, G)),
                "grain {grain} may differ and is not marked: {:?}",
                versions.map(|disk| disk[grain])
            );
        }
        self.record = reopen(&self.medium);
        self.live = false;
        self.parked.clear();
        self.landed.clear();
        if power_lost {
            for grain in 0..self.seen[0].len() {
                if self.dice.below(2) == 0 {
                    self.seen[0][grain] = self.kept[0][grain];
                }
            }
        }
    }
}

#[test]
fn whatever_a_crash_at_any_step_leaves_different_is_marked() {
    let mut crashes = 0;
    for seed in 1..=30 {
        let mut model = Model::new(seed * 7919);
        for _ in 0..6 {
            for _ in 0..model.dice.below(400) {
                model.step();
            }
            let power_lost = model.dice.below(2) == 0;
            model.crash(power_lost);
            crashes += 1;
        }
    }
    assert_eq!(crashes, 180);
}

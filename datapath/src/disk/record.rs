//! The write-intent state of a disk: the activity log and the dirty bitmap, and when they are stored.
//!
//! A [`Record`] goes into the reactor with its volume (`VolumeSpec`); what it wants stored
//! ([`Record::next_job`]) is carried out on a thread of its own through a [`RecordStore`]. Sans-IO but for that name.
//!
//! ```text
//! touch ─▶ Go ──────────────────────────────▶ change, mirror ─▶ written ─▶ checkpoint
//!       └▶ Parked ─▶ job, job_done ─▶ next_ready ─▶ change …
//! ```
//!
//! Invariants: at any crash the stored log and bitmap together name everything that may differ from the peer's disk; a
//! checkpoint ends only when both disks were flushed (or what it is about is marked) *and* all that was marked at its
//! beginning is stored; parked changes go on in the order in which room comes, and those that found none in the order of
//! arrival.
//!
//! A change too long for the log (a huge trim) rests on its bits alone, stored before it begins. With a live peer they
//! are cleared by the first checkpoint that covers it, unless another such change is under way by then.
//!
//! Survives: a crash at any point, a session that ends in mid-checkpoint, a store that fails (the disk has failed then).

use super::activity_log::{ActivityLog, Ticket, Touch};
use super::dirty_bitmap::DirtyBitmap;
use super::doubts::Doubts;
use super::job::JobKind;
use super::metadata::layout::Geometry;
use super::metadata::medium::Medium;
use super::metadata::{Opened, SuperblockStore};
use super::record_store::RecordStore;
use crate::limits::{CHECKPOINT_MS, DIRTY_STORE_BLOCKS_MAX, LAGGING_STORE_MS, WINDOW_LEN};
use crate::units::{ByteRange, Seq, Token};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A disk's activity log and dirty bitmap, recovered, and the rules that tie them together.
#[derive(Debug)]
pub struct Record {
    /// What the peer may lack.
    dirty: DirtyBitmap,
    /// Grains that are marked only because the session before ended: the peer had applied what was written there, and
    /// may not have brought it to its stable storage. A peer that lives on has it still. All of them are dirty.
    doubts: Doubts,
    /// What is being written.
    activity: ActivityLog,
    /// Where they are stored; `None`: nowhere, and nothing waits for it (a memory disk, which is new at each start).
    store: Option<Arc<dyn RecordStore>>,
    /// A peer applies what we write.
    live: bool,
    /// Touched, and waiting for their transaction.
    waits: Vec<(Ticket, Token, ByteRange)>,
    /// Waiting for room in the log, in order.
    full: VecDeque<(Token, ByteRange)>,
    long: Vec<LongChange>,
    /// May go on.
    ready: VecDeque<(Token, ByteRange, Touched)>,
    /// Ends of long changes since the last checkpoint began, and before: what they marked.
    long_written: Vec<ByteRange>,
    long_settling: Vec<ByteRange>,
    /// A long change ended since the last checkpoint began, so that its flush need not cover that one.
    long_ended: bool,
    checkpoint: Option<Checkpoint>,
    checkpoint_serial: u64,
    /// The flush that a checkpoint rides on, and the checkpoint's number.
    riding: Option<(Token, u64)>,
    /// The store of the marks that the target of a copy has told.
    told: Option<Round>,
    marked_all: MarkedAllWaits,
    unconfirmed_since: Option<Instant>,
    rounds_over: u64,
    rounds_wanted: u64,
    round_open: bool,
    committing: Option<Ticket>,
    storing: Vec<usize>,
    lagging_stored: Option<Instant>,
    /// What was only cleared is to be stored without delay.
    hurry: bool,
    /// The log was emptied, and nothing got into it since.
    retired: bool,
    failed: bool,
}

/// How a change was let through; it ends the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touched {
    /// Its extents are hot.
    Log,
    /// Its bits are in the stored bitmap: it is too long for the log.
    Long,
}

/// Answer to [`Record::touch`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "the disk may be written to only when that is on record"]
pub enum Admit {
    /// The change may be made.
    Go(Touched),
    /// [`Record::next_ready`] will name it.
    Parked,
}

/// A number of stores: what was marked when it was asked for is stored once [`Record::is_stored`] says so.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Round(u64);

/// Hears the end of a [`Record::mark_all`].
pub type MarkedAll = Box<dyn FnOnce(Result<(), String>) + Send>;

/// Who waits for the store of a whole disk's marks.
#[derive(Default)]
struct MarkedAllWaits(Vec<(Round, MarkedAll)>);

impl std::fmt::Debug for MarkedAllWaits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(round, _)| round)).finish()
    }
}

#[derive(Clone, Copy, Debug)]
struct LongChange {
    token: Token,
    range: ByteRange,
    /// What to clear when it is on stable storage on both disks, if that is ours to clear.
    marked: Option<ByteRange>,
    /// It waits until its bits are stored.
    waits: Option<Round>,
}

#[derive(Clone, Copy, Debug)]
struct Checkpoint {
    serial: u64,
    live: bool,
    flushed: bool,
    round: Round,
}

impl Record {
    /// Of a disk of `size` bytes whose content does not outlive the daemon. All clean.
    ///
    /// # Panics
    /// When no volume can have that size.
    #[must_use]
    pub fn in_memory(size: u64) -> Self {
        let geometry = Geometry::for_volume(size).expect("the configuration bounds a volume's size");
        Self::new(DirtyBitmap::new(geometry), ActivityLog::new(geometry, 0, 0), None)
    }

    /// Of an area that was opened and recovered; gives back control's half.
    #[must_use]
    pub fn of<M: Medium + 'static>(opened: Opened<M>) -> (Self, SuperblockStore<M>) {
        let Opened { superblocks, area, dirty, activity, .. } = opened;
        (Self::new(dirty, activity, Some(Arc::new(area))), superblocks)
    }

    /// Of its parts.
    #[must_use]
    pub fn new(dirty: DirtyBitmap, activity: ActivityLog, store: Option<Arc<dyn RecordStore>>) -> Self {
        let retired = activity.hot_extents().next().is_none();
        Self {
            doubts: Doubts::default(),
            dirty,
            activity,
            store,
            live: false,
            waits: Vec::with_capacity(WINDOW_LEN),
            full: VecDeque::with_capacity(WINDOW_LEN),
            long: Vec::new(),
            ready: VecDeque::with_capacity(WINDOW_LEN),
            long_written: Vec::new(),
            long_settling: Vec::new(),
            long_ended: false,
            checkpoint: None,
            checkpoint_serial: 0,
            riding: None,
            told: None,
            marked_all: MarkedAllWaits::default(),
            unconfirmed_since: None,
            rounds_over: 0,
            rounds_wanted: 0,
            round_open: false,
            committing: None,
            storing: Vec::new(),
            lagging_stored: None,
            hurry: false,
            retired,
            failed: false,
        }
    }

    /// What the peer may lack.
    #[must_use]
    pub fn dirty(&self) -> &DirtyBitmap {
        &self.dirty
    }

    /// Where log and map are stored.
    #[must_use]
    pub fn store(&self) -> Option<&Arc<dyn RecordStore>> {
        self.store.as_ref()
    }

    /// Says that `token` is about to change `range`. Once it is let through, exactly one [`Record::written`] must follow;
    /// while it is parked, [`Record::give_up`] may take it back.
    pub fn touch(&mut self, token: Token, range: ByteRange) -> Admit {
        if range.len > self.activity.geometry().touch_len_max() {
            return self.touch_long(token, range);
        }
        // In order, so that a change that needs many extents is not passed by small ones for ever.
        if self.full.is_empty() {
            match self.try_touch(token, range) {
                Some(admit) => return admit,
                None => self.full.push_back((token, range)),
            }
        } else {
            self.full.push_back((token, range));
        }
        Admit::Parked
    }

    /// `None`: there is no room in the log.
    fn try_touch(&mut self, token: Token, range: ByteRange) -> Option<Admit> {
        match self.activity.touch(range) {
            Touch::Hot => Some(Admit::Go(Touched::Log)),
            Touch::Wait(ticket) => {
                self.retired = false;
                if self.store.is_none() {
                    self.activity.commit_nowhere();
                    return Some(Admit::Go(Touched::Log));
                }
                self.waits.push((ticket, token, range));
                Some(Admit::Parked)
            }
            Touch::Full => None,
            Touch::TooLong => panic!("long changes go another way"),
        }
    }

    fn touch_long(&mut self, token: Token, range: ByteRange) -> Admit {
        let grain_len = self.dirty.geometry().grain_len();
        let is_marked = |at: u64| self.dirty.window(at) & 1 != 0;
        // Whole grains are ours to clear later, and those at its ends if it is we who mark them.
        let (mut start, mut end) = (range.start, range.end());
        if !is_marked(start) {
            start = start / grain_len * grain_len;
        }
        if !is_marked(end - 1) {
            end = end.next_multiple_of(grain_len).min(self.dirty.geometry().size());
        }
        let marked = self.live.then(|| ByteRange::new(start, end - start));
        let _ = self.dirty.set(range);
        self.doubts.remove(range, grain_len);
        let durable = self.store.is_none() || self.dirty.is_durable(range);
        let waits = if durable { None } else { Some(self.ask_store()) };
        self.long.push(LongChange { token, range, marked, waits });
        if durable { Admit::Go(Touched::Long) } else { Admit::Parked }
    }

    /// Takes a parked change back; false when it is not parked.
    pub fn give_up(&mut self, token: Token) -> bool {
        if let Some(at) = self.full.iter().position(|(other, _)| *other == token) {
            self.full.remove(at);
            return true;
        }
        if let Some(at) = self.waits.iter().position(|(_, other, _)| *other == token) {
            let (_, _, range) = self.waits.swap_remove(at);
            self.activity.untouch(range);
            return true;
        }
        let ready = self.ready.iter().position(|(other, ..)| *other == token);
        if let Some((_, range, Touched::Log)) = ready.and_then(|at| self.ready.remove(at)) {
            self.activity.untouch(range);
            return true;
        }
        let long = |long: &LongChange| long.token == token && (long.waits.is_some() || ready.is_some());
        let Some(at) = self.long.iter().position(long) else { return false };
        // Others may rest on its bits by now.
        self.long_written.extend(self.long.swap_remove(at).marked);
        true
    }

    /// Everything that is parked.
    #[must_use]
    pub fn parked(&self) -> Vec<Token> {
        let long = self.long.iter().filter(|long| long.waits.is_some()).map(|long| long.token);
        let (full, waits) = (self.full.iter().map(|wait| wait.0), self.waits.iter().map(|wait| wait.1));
        full.chain(waits).chain(self.ready.iter().map(|ready| ready.0)).chain(long).collect()
    }

    /// Changes that are parked, or about to be named by [`Record::next_ready`].
    #[must_use]
    pub fn parked_len(&self) -> usize {
        let long = self.long.iter().filter(|long| long.waits.is_some()).count();
        self.full.len() + self.waits.len() + self.ready.len() + long
    }

    /// A parked change that may be made now.
    pub fn next_ready(&mut self) -> Option<(Token, Touched)> {
        while let Some(&(token, range)) = self.full.front() {
            let Some(admit) = self.try_touch(token, range) else { break };
            self.full.pop_front();
            if let Admit::Go(touched) = admit {
                self.ready.push_back((token, range, touched));
            }
        }
        self.ready.pop_front().map(|(token, _, touched)| (token, touched))
    }

    /// A change that was let through stands here, and on the peer or in the dirty bitmap. For one that was given up as
    /// well, as some of its bytes may have changed; it must be marked then.
    ///
    /// # Panics
    /// When it was not let through.
    pub fn written(&mut self, token: Token, range: ByteRange, touched: Touched) {
        match touched {
            Touched::Log => {
                self.activity.written(range);
                // Its extents stayed hot if the log was emptied meanwhile.
                self.retired = false;
            }
            Touched::Long => {
                let at = self.long.iter().position(|long| long.token == token);
                let long = self.long.swap_remove(at.unwrap_or_else(|| panic!("{range} was not touched")));
                self.long_written.extend(long.marked);
                self.long_ended = true;
            }
        }
    }

    /// The peer may lack this, for whatever reason.
    pub fn mark(&mut self, range: ByteRange) {
        let _ = self.dirty.set(range);
        self.doubts.remove(range, self.dirty.geometry().grain_len());
        self.forget_long();
    }

    /// The peer has applied these marked bytes, whole grains, and has not said that they are on its stable storage.
    pub fn doubt(&mut self, range: ByteRange) {
        let grain_len = self.dirty.geometry().grain_len();
        let mut at = range.start;
        while let Some(run) =
            self.dirty.next_dirty(at, range.end() - at).filter(|run| run.start < range.end())
        {
            let end = run.end().min(range.end());
            self.doubts.insert(ByteRange::new(run.start, end - run.start), grain_len);
            at = end.next_multiple_of(grain_len);
            if at >= range.end() {
                break;
            }
        }
    }

    /// The peer may lack anything. `done` hears when that is on stable storage, from [`Record::tell_marked_all`].
    pub fn mark_all(&mut self, done: MarkedAll) {
        let _ = self.dirty.set_all();
        self.forget_doubts();
        let round = self.ask_store();
        self.marked_all.0.push((round, done));
    }

    /// Calls those whose [`Record::mark_all`] is on stable storage.
    pub fn tell_marked_all(&mut self) {
        let over = self.rounds_over;
        for (_, done) in self.marked_all.0.extract_if(.., |(round, _)| round.0 <= over) {
            done(Ok(()));
        }
    }

    /// Calls those whose [`Record::mark_all`] never will be.
    pub fn fail_marked_all(&mut self, error: &str) {
        for (_, done) in self.marked_all.0.drain(..) {
            done(Err(error.to_owned()));
        }
    }

    /// The target of a copy has told all of its marks: they are to be stored. [`Record::take_told_stored`] says when.
    pub fn peer_told_all(&mut self) {
        self.told = Some(self.ask_store());
    }

    /// Whether all that the target has told is on stable storage. Says so once.
    pub fn take_told_stored(&mut self) -> bool {
        let over = self.rounds_over;
        self.told.take_if(|round| round.0 <= over).is_some()
    }

    /// The target that has told its marks is gone.
    pub fn forget_told(&mut self) {
        self.told = None;
    }

    /// The peer may have applied this step of a copy over marked bytes, or not: [`Record::resolve`] follows once it is known.
    pub fn unsure(&mut self, seq: Seq, range: ByteRange) {
        self.doubts.unsure(seq, range);
    }

    /// The peer, which lives on, had applied the session that was given up last up to here.
    pub fn resolve(&mut self, applied: Seq) {
        let geometry = self.dirty.geometry();
        for range in self.doubts.resolve(applied, geometry.grain_len(), geometry.size()) {
            self.doubt(range);
        }
    }

    /// The peer may have lost what it had applied: whatever is marked may differ.
    pub fn forget_doubts(&mut self) {
        self.doubts = Doubts::default();
    }

    /// What is marked and equal, as long as the peer lives on: whole grains, in order, cut at the disk's end.
    #[must_use]
    pub fn doubts(&self) -> Vec<ByteRange> {
        let geometry = self.dirty.geometry();
        self.doubts.ranges(geometry.grain_len(), geometry.size())
    }

    fn wipe(&mut self, range: ByteRange) {
        self.dirty.clear(range);
        self.doubts.remove(range, self.dirty.geometry().grain_len());
    }

    /// Marks of long changes are not theirs alone any more: none of them is cleared with its change.
    fn forget_long(&mut self) {
        self.long_written.clear();
        self.long_settling.clear();
        self.long.iter_mut().for_each(|long| long.marked = None);
    }

    /// These bytes are equal and on stable storage on both disks.
    pub fn clear(&mut self, ranges: &[ByteRange]) {
        let grain_len = self.dirty.geometry().grain_len();
        for range in ranges {
            let mut at = range.start;
            while at < range.end() {
                let left = ByteRange::new(at, range.end() - at);
                let under_way = self.long.iter().map(|long| long.range);
                let unsettled = under_way.chain(self.long_written.iter().chain(&self.long_settling).copied());
                let next = unsettled.filter(|long| long.overlaps(left)).min_by_key(|long| long.start);
                // A long change has no record but its bits. They go with it; what is beside it is cleared.
                let kept_from = next.map_or(left.end(), |long| (long.start / grain_len * grain_len).max(at));
                if kept_from > at {
                    self.wipe(ByteRange::new(at, kept_from - at));
                }
                let Some(long) = next else { break };
                at = long.end().next_multiple_of(grain_len).min(range.end());
                self.long_written.push(ByteRange::new(kept_from, at - kept_from));
            }
        }
    }

    /// The source of our copy has all our bits on record.
    pub fn clear_all(&mut self) {
        self.wipe(ByteRange::new(0, self.dirty.geometry().size()));
    }

    /// A peer applies what we write from now on.
    pub fn session_began(&mut self) {
        self.live = true;
    }

    /// The peer of [`Record::session_began`] is gone, or we begin to apply its changes. Unless everything that was
    /// written is on stable storage on both disks, all of it that no checkpoint has covered is marked; changes that are
    /// still in flight are the caller's to mark. Does nothing twice.
    pub fn session_ended(&mut self, durable: bool) {
        self.live = false;
        self.riding = None;
        self.told = None;
        self.forget_long();
        self.checkpoint = None;
        self.activity.abort_checkpoint();
        if self.activity.has_unconfirmed() {
            if !durable {
                self.mark_unconfirmed();
            }
            self.begin(true);
        }
    }

    fn mark_unconfirmed(&mut self) {
        let (dirty, doubts) = (&mut self.dirty, &mut self.doubts);
        let grain_len = dirty.geometry().grain_len();
        self.activity.for_each_unconfirmed(|range| {
            // What is marked already may differ for another reason.
            let mut at = range.start;
            while at < range.end() {
                let end = (at + grain_len).min(range.end());
                let grain = ByteRange::new(at, end - at);
                if dirty.window(at) & 1 == 0 {
                    let _ = dirty.set(grain);
                    doubts.insert(grain, grain_len);
                }
                at = end;
            }
        });
    }

    /// Whether a checkpoint could begin and would change anything.
    #[must_use]
    pub fn can_checkpoint(&self) -> bool {
        self.checkpoint.is_none() && (self.activity.has_unconfirmed() || !self.long_written.is_empty())
    }

    /// Whether one should begin by now.
    pub fn checkpoint_is_due(&mut self, now: Instant) -> bool {
        if !self.can_checkpoint() {
            self.unconfirmed_since = None;
            return false;
        }
        let since = *self.unconfirmed_since.get_or_insert(now);
        self.activity.wants_checkpoint() || now.duration_since(since) >= Duration::from_millis(CHECKPOINT_MS)
    }

    /// Begins a checkpoint. With a live peer it must be followed by a flush of both disks, at whose end
    /// [`Record::flushed`] takes the number returned; without one the record does all that is needed.
    ///
    /// # Panics
    /// When one is under way.
    pub fn begin_checkpoint(&mut self) -> Option<u64> {
        if !self.live {
            self.mark_unconfirmed();
        }
        self.begin(!self.live);
        self.live.then_some(self.checkpoint_serial)
    }

    /// A flush of both disks is about to be asked for: a checkpoint rides on it, if one can begin.
    pub fn ride_on(&mut self, flush: Token) {
        if self.can_checkpoint() {
            self.riding = self.begin_checkpoint().map(|serial| (flush, serial));
        }
    }

    /// The flush has ended well, with the checkpoint that may ride on it.
    pub fn flush_ended(&mut self, flush: Token) {
        if let Some((_, serial)) = self.riding.take_if(|(ridden, _)| *ridden == flush) {
            self.flushed(serial);
        }
    }

    fn begin(&mut self, flushed: bool) {
        self.unconfirmed_since = None;
        self.activity.begin_checkpoint();
        self.long_settling.append(&mut self.long_written);
        self.long_ended = false;
        self.checkpoint_serial += 1;
        let round = self.ask_store();
        let (serial, live) = (self.checkpoint_serial, self.live);
        self.checkpoint = Some(Checkpoint { serial, live, flushed, round });
        self.end_checkpoint();
    }

    /// Both disks were flushed, each after the checkpoint `serial` began. One that came to nothing is known.
    pub fn flushed(&mut self, serial: u64) {
        if let Some(checkpoint) = self.checkpoint.as_mut().filter(|checkpoint| checkpoint.serial == serial) {
            checkpoint.flushed = true;
            self.end_checkpoint();
        }
    }

    /// Whether a checkpoint is under way.
    #[must_use]
    pub fn in_checkpoint(&self) -> bool {
        self.checkpoint.is_some()
    }

    fn end_checkpoint(&mut self) {
        let Some(checkpoint) = self.checkpoint.filter(|c| c.flushed && self.is_stored(c.round)) else {
            return;
        };
        self.checkpoint = None;
        self.activity.end_checkpoint();
        // A later long change may rest on the same grains.
        if checkpoint.live && self.long.is_empty() && !self.long_ended {
            for range in std::mem::take(&mut self.long_settling) {
                self.wipe(range);
            }
        } else {
            self.long_written.append(&mut self.long_settling);
        }
    }

    /// Asks for everything that is marked now to be stored.
    pub fn ask_store(&mut self) -> Round {
        if self.store.is_none() || !self.dirty.has_unsaved() {
            return Round(self.rounds_over);
        }
        let wanted = self.rounds_over + if self.round_open { 2 } else { 1 };
        self.rounds_wanted = self.rounds_wanted.max(wanted);
        self.open_round();
        Round(wanted)
    }

    /// Whether what was asked for is on stable storage.
    #[must_use]
    pub fn is_stored(&self, round: Round) -> bool {
        round.0 <= self.rounds_over
    }

    fn open_round(&mut self) {
        if !self.round_open && self.rounds_wanted > self.rounds_over {
            self.dirty.begin_round();
            self.round_open = true;
        }
    }

    /// The next store to carry out, if one is due: one transaction and one store of blocks at a time.
    pub fn next_job(&mut self, now: Instant) -> Option<JobKind> {
        if self.failed || self.store.is_none() {
            return None;
        }
        if self.committing.is_none()
            && let Some(transaction) = self.activity.next_transaction()
        {
            self.committing = Some(transaction.ticket);
            return Some(JobKind::Commit(transaction));
        }
        if !self.storing.is_empty() {
            return None;
        }
        let mut blocks = Vec::new();
        if self.round_open {
            blocks = self.dirty.take_round(DIRTY_STORE_BLOCKS_MAX);
        } else if self.dirty.lagging_len() > 0 {
            let pause = Duration::from_millis(LAGGING_STORE_MS);
            let due = self.lagging_stored.is_none_or(|at| now.duration_since(at) >= pause);
            if due || self.hurry {
                self.lagging_stored = Some(now);
                blocks = self.dirty.take_lagging(DIRTY_STORE_BLOCKS_MAX);
            }
        }
        if blocks.is_empty() {
            return None;
        }
        self.storing.extend(blocks.iter().map(|block| block.index));
        Some(JobKind::StoreDirty(blocks))
    }

    /// A job of [`Record::next_job`] ended. After a failure the disk is to be taken as failed, and there are no more.
    ///
    /// # Panics
    /// On a job that was not given out.
    pub fn job_done(&mut self, kind: &JobKind, failed: bool) {
        self.failed |= failed;
        match kind {
            JobKind::Commit(_) if failed => {}
            JobKind::Commit(_) => {
                let ticket = self.committing.take().expect("a transaction was under way");
                self.activity.committed(ticket);
                let (activity, ready) = (&self.activity, &mut self.ready);
                self.waits.retain(|(ticket, token, range)| {
                    let waits = !activity.is_committed(*ticket);
                    if !waits {
                        ready.push_back((*token, *range, Touched::Log));
                    }
                    waits
                });
            }
            JobKind::StoreDirty(_) => {
                for block in std::mem::take(&mut self.storing) {
                    if failed { self.dirty.not_stored(block) } else { self.dirty.stored(block) }
                }
                self.end_round();
            }
            other => panic!("{other:?} is not the record's"),
        }
    }

    fn end_round(&mut self) {
        while self.round_open && self.dirty.round_is_over() {
            self.round_open = false;
            self.rounds_over += 1;
            self.open_round();
        }
        let over = self.rounds_over;
        for long in &mut self.long {
            if long.waits.take_if(|round| round.0 <= over).is_some() {
                self.ready.push_back((long.token, long.range, Touched::Long));
            }
        }
        self.end_checkpoint();
    }

    /// Lets go of every extent that nothing rests on, and stores what lags behind, without delay: for a clean end and for
    /// idle moments. [`Record::is_settled`] says when that is done.
    pub fn settle(&mut self) {
        if self.store.is_none() {
            return;
        }
        self.hurry = true;
        let _ = self.ask_store();
        if !std::mem::replace(&mut self.retired, true) {
            self.activity.retire_idle();
        }
    }

    /// Whether the log still names extents that [`Record::settle`] could let go of.
    #[must_use]
    pub fn can_retire(&self) -> bool {
        !self.retired && self.store.is_some() && !self.in_checkpoint() && !self.activity.has_unconfirmed()
    }

    /// Whether nothing is left to store.
    pub fn is_settled(&mut self) -> bool {
        let settled = self.store.is_none()
            || (self.committing.is_none()
                && !self.activity.has_transaction()
                && self.storing.is_empty()
                && !self.round_open
                && self.checkpoint.is_none()
                && !self.dirty.has_unsaved()
                && self.dirty.lagging_len() == 0);
        self.hurry &= !settled;
        settled
    }

    /// Whether there are dirty grains.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty.dirty_grains() > 0
    }
}

#[cfg(test)]
mod tests;

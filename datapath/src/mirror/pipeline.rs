//! Order, acknowledgement and flush of one volume's changes on the side that serves them. Sans-IO.
//!
//! A change enters when its bytes stand in the mapped disk ([`Event::Landed`]) and leaves when two things have happened:
//! it was *released* (the peer has applied it, or we are alone on record: its range unlocks) and *completed* (what the
//! ack level promises is true: the client is told). Changes are released in the order they landed.
//!
//! Invariants:
//! - Without a session nothing completes until [`Event::GoAlone`], which the caller gives only after the peer's absence
//!   is on durable record (promise 5). With `freeze`, nothing completes while the peer is not in sync, but where an
//!   operator had us go alone: then its return does not stop us again.
//! - A flush completes only when all that landed before it is durable here and, while a session is up, there.
//! - From the failure of the local disk to the peer's record of it nothing completes: a failover in between must find
//!   that record, or would take this disk for as good as the peer's (promise 5, the other way round).
//! - A session numbers its changes from 1, over as many links as it takes. When a link breaks the session is *parted*:
//!   nothing completes, but flushes of what the peer has said to be durable there, and nothing is forgotten. Over the next link it goes on ([`Event::SessionGoesOn`]): what the peer
//!   says it had applied is released, the rest is posted again under the numbers it has, so that nothing is applied twice.
//! - What a session that was given up left unreleased is posted again in the next one under new numbers: its range is
//!   still locked, so its bytes are the same.

use crate::error::Violation;
use crate::limits::WINDOW_LEN;
use crate::units::{AckLevel, ByteRange, OnPeerLoss, Seq, Token};
use crate::wire::{Kind, flags};
use std::collections::VecDeque;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A change stands in the mapped disk. Its range stays locked until [`Action::Release`].
    Landed(Change),
    /// A client wants everything acknowledged so far on stable storage.
    Flush(Token),
    /// The same for the background copy's end: not held back by `freeze`, which waits for that very end.
    FlushBackground(Token),
    /// The peer's cumulative word.
    Ack {
        /// Applied up to here.
        applied: Seq,
        /// On stable storage up to here.
        durable: Seq,
    },
    /// The local flush asked for by [`Action::FlushLocal`] succeeded.
    FlushedLocal,
    /// A session to the peer is up; `in_sync` says whether the peer's disk equals ours but for what is in flight.
    SessionUp {
        /// The peer is UpToDate.
        in_sync: bool,
    },
    /// The session ended; whatever the peer has not acknowledged, it may lack. A record of its absence is void as well.
    SessionDown,
    /// The session's link broke, and the session may go on over another.
    SessionParted,
    /// It does: the peer has applied everything up to here, and nothing else.
    SessionGoesOn {
        /// Within [`Pipeline::unsure`].
        applied: Seq,
    },
    /// A parted session does not go on. The same as [`Event::SessionDown`], but nobody is asked for a record of the peer's
    /// absence: the caller has decided what comes instead.
    SessionGivenUp {
        /// The peer may lack what it has not acknowledged. False where everything that was posted is on stable storage
        /// there, so that only what landed since is to be posted.
        lacking: bool,
    },
    /// The peer's absence is on durable record: complete without it.
    GoAlone,
    /// The background copy is done and on record: the peer is UpToDate.
    PeerInSync,
    /// The local disk failed while the peer is in sync: nothing completes until [`Event::LocalGone`].
    LocalFailing,
    /// The local disk was given up, which is on durable record at the peer: what is durable there is durable.
    LocalGone,
}

/// What the local disk is to the pipeline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Local {
    Sound,
    /// Nothing completes.
    Failing,
    /// It is not asked any more.
    Gone,
}

/// A change of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Whose it is.
    pub token: Token,
    /// `Write`, `WriteZeroes`, `Trim` or `Verify`, which changes nothing.
    pub kind: Kind,
    /// Where.
    pub range: ByteRange,
    /// Bits of [`flags`].
    pub flags: u8,
}

/// What to do, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Post this change under this number.
    Post(Seq, Change),
    /// Ask the peer to make everything up to here durable.
    FlushPeer(Seq),
    /// Start flushing the local disk; at most one is under way.
    FlushLocal,
    /// Unlock the change's range.
    Release(Change),
    /// Tell the client that its change or flush is done.
    Complete(Token),
    /// The peer lacks this.
    MarkDirty(ByteRange),
    /// A change waits and there is no peer: get its absence on record, then say [`Event::GoAlone`]. Said once.
    AskAlone,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    change: Change,
    /// Number in the present session; zero where the peer was never asked to apply it.
    seq: Seq,
    /// Count of changes of the local disk, this one included, over the pipeline's life.
    landing: u64,
    completed: bool,
}

#[derive(Clone, Copy, Debug)]
struct PendingFlush {
    token: Token,
    landing: u64,
    seq: Seq,
    background: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Peer {
    /// No session, and not on record.
    Absent,
    /// No session, on record.
    Alone,
    /// Session up.
    Live,
    /// The session's link broke, and it may go on.
    Parted,
}

/// The pipeline of one volume.
#[derive(Debug)]
pub struct Pipeline {
    ack: AckLevel,
    on_loss: OnPeerLoss,
    peer: Peer,
    peer_in_sync: bool,
    /// The session began while we answered alone: `freeze` does not take that back until the peer is in sync.
    was_alone: bool,
    alone_asked: bool,
    /// Not released yet, in landing order.
    window: VecDeque<Entry>,
    /// Released and not completed, in landing order: they wait for durability or for the end of a freeze. Apart from
    /// the window, so that one slow flush does not make every ack walk over all that was answered since.
    waiting: Vec<Entry>,
    flushes: Vec<PendingFlush>,
    /// Changes of the local disk: those that landed here, and those that this node applied as standby.
    landings: u64,
    next_seq: Seq,
    peer_applied: Seq,
    peer_durable: Seq,
    peer_flush_asked: Seq,
    local_durable: u64,
    local_flush: Option<u64>,
    local_flush_wanted: u64,
    local: Local,
}

impl Pipeline {
    /// A pipeline without a session, not on record as alone. Allocates its window once.
    #[must_use]
    pub fn new(ack: AckLevel, on_loss: OnPeerLoss) -> Self {
        Self {
            ack,
            on_loss,
            peer: Peer::Absent,
            peer_in_sync: false,
            was_alone: false,
            alone_asked: false,
            window: VecDeque::with_capacity(WINDOW_LEN),
            waiting: Vec::with_capacity(WINDOW_LEN),
            flushes: Vec::with_capacity(64),
            landings: 0,
            next_seq: Seq(1),
            peer_applied: Seq::ZERO,
            peer_durable: Seq::ZERO,
            peer_flush_asked: Seq::ZERO,
            local_durable: 0,
            local_flush: None,
            local_flush_wanted: 0,
            local: Local::Sound,
        }
    }

    /// Takes an event and appends what follows from it.
    ///
    /// # Errors
    /// A peer's ack that cannot be true; the caller closes the link. Only [`Event::Ack`] errs, and then changes nothing.
    pub fn handle(&mut self, event: Event, actions: &mut Vec<Action>) -> Result<(), Violation> {
        match event {
            Event::Landed(change) => self.landed(change, actions),
            Event::Flush(token) => self.flush(token, false, actions),
            Event::FlushBackground(token) => self.flush(token, true, actions),
            Event::Ack { applied, durable } => self.acked(applied, durable, actions)?,
            Event::FlushedLocal => self.flushed_local(actions),
            Event::SessionUp { in_sync } => self.session_up(in_sync, actions),
            Event::SessionDown => {
                if self.session_down(true, actions) {
                    self.alone_asked = true;
                    actions.push(Action::AskAlone);
                }
            }
            Event::SessionParted => {
                assert!(self.peer == Peer::Live, "only a session that is up is parted");
                self.peer = Peer::Parted;
                // Two memories had it; now this disk alone may have to keep it.
                if self.landings > self.local_durable {
                    self.want_local_flush(self.landings, actions);
                }
            }
            Event::SessionGoesOn { applied } => self.session_goes_on(applied, actions),
            Event::SessionGivenUp { lacking } => {
                self.session_down(lacking, actions);
            }
            Event::GoAlone => self.go_alone(actions),
            Event::PeerInSync => {
                self.peer_in_sync = true;
                self.was_alone = false;
                self.complete_async(actions);
                self.settle(actions);
            }
            Event::LocalFailing => self.local = Local::Failing,
            Event::LocalGone => {
                self.local = Local::Gone;
                self.local_flush = None;
                self.complete_async(actions);
                self.settle(actions);
            }
        }
        Ok(())
    }

    /// This node applied a change as standby: a flush after a takeover has to cover that change as well.
    pub fn applied_as_standby(&mut self) {
        self.landings += 1;
    }

    /// Changes not yet both released and completed, plus flushes under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.window.len() + self.waiting.len() + self.flushes.len()
    }

    /// Whether a client's change or flush is held back until the background copy has ended.
    #[must_use]
    pub fn waits_for_copy(&self) -> bool {
        let foreground = |entry: &Entry| entry.change.flags & flags::RESYNC == 0;
        self.is_held()
            && (self.window.iter().any(foreground)
                || self.waiting.iter().any(foreground)
                || self.flushes.iter().any(|flush| !flush.background))
    }

    /// Whether completions wait for a peer that is away or not in sync.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        matches!(self.peer, Peer::Absent | Peer::Parted) || self.is_held()
    }

    /// Whether a client waits for a peer whose link broke. The background copy may wait for as long as it takes.
    #[must_use]
    pub fn waits_for_parted(&self) -> bool {
        let foreground = |entry: &Entry| entry.change.flags & flags::RESYNC == 0;
        self.peer == Peer::Parted
            && (self.flushes.iter().any(|flush| !flush.background)
                || self.waiting.iter().any(foreground)
                || self.window.iter().any(|entry| !entry.completed && foreground(entry)))
    }

    /// What the peer has acknowledged as applied, and the last change that has a number: in between nothing is known.
    #[must_use]
    pub fn unsure(&self) -> (Seq, Seq) {
        (self.peer_applied, Seq(self.next_seq.0 - 1))
    }

    /// Comparisons numbered up to `applied` whose outcome the peer has not told.
    pub fn comparisons_upto(&self, applied: Seq) -> impl Iterator<Item = Token> + '_ {
        let open = self.window.iter().take_while(move |entry| entry.seq <= applied);
        open.filter(|entry| entry.change.kind == Kind::Verify).map(|entry| entry.change.token)
    }

    /// Steps of a copy that the peer has not acknowledged, which it may have applied.
    pub fn unsure_steps(&self) -> impl Iterator<Item = (Seq, ByteRange)> + '_ {
        let step = |change: &Change| change.flags & flags::RESYNC != 0 && change.kind != Kind::Verify;
        let steps = self.window.iter().filter(move |entry| step(&entry.change) && entry.seq > Seq::ZERO);
        steps.map(|entry| (entry.seq, entry.change.range))
    }

    /// Whether the peer holds what this node holds, but for what is in flight.
    #[must_use]
    pub fn peer_in_sync(&self) -> bool {
        self.peer == Peer::Live && self.peer_in_sync
    }

    /// Whether every change that was posted is applied at the peer.
    #[must_use]
    pub fn all_released(&self) -> bool {
        self.window.is_empty()
    }

    /// Whether something waits for the peer's word.
    #[must_use]
    pub fn awaits_peer(&self) -> bool {
        self.peer == Peer::Live && (!self.window.is_empty() || self.awaits_durability())
    }

    /// Whether something waits for the peer to make it durable, applied or not.
    #[must_use]
    pub fn awaits_durability(&self) -> bool {
        let undurable = |entry: &Entry| self.wants_durability(entry.change) && entry.seq > self.peer_durable;
        self.peer == Peer::Live
            && (self.flushes.iter().any(|flush| flush.seq > self.peer_durable)
                || self.waiting.iter().any(undurable))
    }

    /// What the peer has said in this session: applied and durable.
    #[must_use]
    pub fn peer_word(&self) -> (Seq, Seq) {
        (self.peer_applied, self.peer_durable)
    }

    /// The comparison that was posted under `seq`, if it was of `range` and is not answered yet.
    #[must_use]
    pub fn comparison(&self, seq: Seq, range: ByteRange) -> Option<Token> {
        let at = self.window.partition_point(|entry| entry.seq < seq);
        let entry = self.window.get(at).filter(|entry| self.peer == Peer::Live && entry.seq == seq)?;
        let Change { token, kind, range: asked, .. } = entry.change;
        (kind == Kind::Verify && asked == range).then_some(token)
    }

    /// Whether the peer has not confirmed everything posted to it as durable.
    #[must_use]
    pub fn peer_lags_durably(&self) -> bool {
        Seq(self.next_seq.0 - 1) > self.peer_durable
    }

    /// Whether everything that landed is on stable storage here and on the peer of the present session.
    #[must_use]
    pub fn is_durable_on_both(&self) -> bool {
        matches!(self.peer, Peer::Live | Peer::Parted)
            && self.window.is_empty()
            && self.local_durable >= self.landings
            && !self.peer_lags_durably()
    }

    /// Every change whose range is still locked; comparisons change nothing.
    pub fn for_each_unreleased(&self, tell: impl FnMut(ByteRange)) {
        let changes =
            self.window.iter().map(|entry| entry.change).filter(|change| change.kind != Kind::Verify);
        changes.map(|change| change.range).for_each(tell);
    }

    fn is_held(&self) -> bool {
        self.on_loss == OnPeerLoss::Freeze
            && self.peer != Peer::Alone
            && !self.peer_in_sync
            && !self.was_alone
    }

    fn landed(&mut self, change: Change, actions: &mut Vec<Action>) {
        self.landings += 1;
        let mut entry = Entry { change, seq: Seq::ZERO, landing: self.landings, completed: false };
        match self.peer {
            Peer::Live => entry.seq = self.post(change, actions),
            // It is posted when the session goes on.
            Peer::Parted => entry.seq = self.number(),
            Peer::Alone => {}
            Peer::Absent if self.alone_asked => {}
            Peer::Absent => {
                self.alone_asked = true;
                actions.push(Action::AskAlone);
            }
        }
        if self.may_complete_async(&entry) {
            entry.completed = true;
            actions.push(Action::Complete(change.token));
        }
        self.window.push_back(entry);
        if self.wants_durability(change) {
            self.want_local_flush(self.landings, actions);
        }
        if self.peer == Peer::Alone {
            self.release_all(actions);
            self.settle(actions);
        }
    }

    fn number(&mut self) -> Seq {
        let seq = self.next_seq;
        self.next_seq = seq.next();
        seq
    }

    fn post(&mut self, change: Change, actions: &mut Vec<Action>) -> Seq {
        let seq = self.number();
        self.post_as(seq, change, actions);
        seq
    }

    fn post_as(&mut self, seq: Seq, mut change: Change, actions: &mut Vec<Action>) {
        if self.wants_durability(change) {
            change.flags |= flags::FUA;
            self.peer_flush_asked = seq;
        }
        actions.push(Action::Post(seq, change));
    }

    fn wants_durability(&self, change: Change) -> bool {
        let background = change.flags & flags::RESYNC != 0;
        change.flags & flags::FUA != 0 || (self.ack == AckLevel::Durable && !background)
    }

    fn flush(&mut self, token: Token, background: bool, actions: &mut Vec<Action>) {
        let session = matches!(self.peer, Peer::Live | Peer::Parted);
        let seq = if session { Seq(self.next_seq.0 - 1) } else { Seq::ZERO };
        self.flushes.push(PendingFlush { token, landing: self.landings, seq, background });
        if self.peer == Peer::Absent && !self.alone_asked {
            self.alone_asked = true;
            actions.push(Action::AskAlone);
        }
        self.want_local_flush(self.landings, actions);
        self.want_peer_flush(seq, actions);
        self.settle(actions);
    }

    /// A flush is asked for even when nothing landed since the last: the medium may still hold back what the daemon
    /// before us wrote.
    fn want_local_flush(&mut self, landing: u64, actions: &mut Vec<Action>) {
        self.local_flush_wanted = self.local_flush_wanted.max(landing);
        if self.local == Local::Sound
            && self.local_flush.is_none()
            && (self.local_durable < landing || self.local_durable == 0)
        {
            self.local_flush = Some(self.landings);
            actions.push(Action::FlushLocal);
        }
    }

    fn want_peer_flush(&mut self, seq: Seq, actions: &mut Vec<Action>) {
        if self.peer == Peer::Live && seq > self.peer_durable && seq > self.peer_flush_asked {
            self.peer_flush_asked = seq;
            actions.push(Action::FlushPeer(seq));
        }
    }

    fn flushed_local(&mut self, actions: &mut Vec<Action>) {
        let upto = self.local_flush.take().expect("a flush was under way");
        self.local_durable = self.local_durable.max(upto);
        if self.local == Local::Sound && self.local_flush_wanted > self.local_durable {
            self.local_flush = Some(self.landings);
            actions.push(Action::FlushLocal);
        }
        self.settle(actions);
    }

    fn acked(&mut self, applied: Seq, durable: Seq, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let sent = Seq(self.next_seq.0 - 1);
        if applied > sent {
            return Err(Violation::AckFromTheFuture { found: applied, sent });
        }
        if durable > applied {
            return Err(Violation::AckFromTheFuture { found: durable, sent: applied });
        }
        if applied < self.peer_applied || durable < self.peer_durable {
            let (found, before) = if applied < self.peer_applied {
                (applied, self.peer_applied)
            } else {
                (durable, self.peer_durable)
            };
            return Err(Violation::AckWentBack { found, before });
        }
        self.peer_durable = durable;
        self.release_upto(applied, actions);
        self.settle(actions);
        Ok(())
    }

    /// The peer has applied everything up to here.
    fn release_upto(&mut self, applied: Seq, actions: &mut Vec<Action>) {
        self.peer_applied = applied;
        while let Some(&entry) = self.window.front().filter(|entry| entry.seq <= applied) {
            self.window.pop_front();
            actions.push(Action::Release(entry.change));
            if !entry.completed {
                self.waiting.push(entry);
            }
        }
    }

    fn session_goes_on(&mut self, applied: Seq, actions: &mut Vec<Action>) {
        let (acknowledged, numbered) = self.unsure();
        assert!(self.peer == Peer::Parted, "only a parted session goes on");
        assert!(
            acknowledged <= applied && applied <= numbered,
            "the caller has compared the two ends' words"
        );
        self.peer = Peer::Live;
        // What was asked of the link that broke may never have arrived.
        self.peer_flush_asked = self.peer_durable;
        self.release_upto(applied, actions);
        for at in 0..self.window.len() {
            let Entry { change, seq, .. } = self.window[at];
            self.post_as(seq, change, actions);
        }
        // Before that no flush of this session's may be asked for: the peer refuses one of changes it has not seen.
        if !self.flushes.is_empty() || self.awaits_durability() {
            self.want_peer_flush(numbered, actions);
        }
        self.complete_async(actions);
        self.settle(actions);
    }

    fn session_up(&mut self, in_sync: bool, actions: &mut Vec<Action>) {
        assert!(!matches!(self.peer, Peer::Live | Peer::Parted), "a session begins after the last one ended");
        self.was_alone = self.peer == Peer::Alone && !in_sync;
        self.peer = Peer::Live;
        self.peer_in_sync = in_sync;
        self.alone_asked = false;
        self.next_seq = Seq(1);
        self.peer_applied = Seq::ZERO;
        self.peer_durable = Seq::ZERO;
        self.peer_flush_asked = Seq::ZERO;
        for at in 0..self.window.len() {
            let change = self.window[at].change;
            self.window[at].seq = self.post(change, actions);
        }
        let last = Seq(self.next_seq.0 - 1);
        for flush in &mut self.flushes {
            flush.seq = last;
        }
        if !self.flushes.is_empty() {
            self.want_peer_flush(last, actions);
        }
        self.complete_async(actions);
        self.settle(actions);
    }

    /// Forgets everything under way: the volume stops serving or its disk failed. Gives back the requests that were
    /// never completed and the ranges that are still locked. The session, if one is up, must end as well.
    pub fn abandon(&mut self, uncompleted: &mut Vec<Token>, locked: &mut Vec<Change>) {
        let uncompleted_here = self.waiting.iter().chain(self.window.iter().filter(|e| !e.completed));
        uncompleted.extend(uncompleted_here.map(|e| e.change.token));
        uncompleted.extend(self.flushes.iter().map(|flush| flush.token));
        locked.extend(self.window.iter().map(|e| e.change));
        self.window.clear();
        self.waiting.clear();
        self.flushes.clear();
    }

    /// Returns whether anybody waits for what comes instead.
    fn session_down(&mut self, lacking: bool, actions: &mut Vec<Action>) -> bool {
        if self.peer == Peer::Absent {
            return false;
        }
        if matches!(self.peer, Peer::Live | Peer::Parted) && self.landings > self.local_durable {
            // Two memories had it; now this disk alone can keep it.
            self.want_local_flush(self.landings, actions);
        }
        self.peer = Peer::Absent;
        self.peer_in_sync = false;
        for flush in &mut self.flushes {
            flush.seq = Seq::ZERO;
        }
        let mut waits = !self.flushes.is_empty() || !self.waiting.is_empty();
        // Steps of the background copy end with their session: the next copy sends them anew.
        self.window.retain(|entry| {
            let dropped = entry.change.flags & flags::RESYNC != 0;
            if dropped {
                actions.push(Action::Release(entry.change));
            }
            !dropped
        });
        for entry in &mut self.window {
            // A peer that is gone makes nothing durable: what it had applied, the record of its absence covers.
            entry.seq = Seq::ZERO;
            waits |= !entry.completed;
            if lacking {
                actions.push(Action::MarkDirty(entry.change.range));
            }
        }
        for entry in &mut self.waiting {
            entry.seq = Seq::ZERO;
        }
        waits
    }

    fn go_alone(&mut self, actions: &mut Vec<Action>) {
        if self.peer == Peer::Live {
            // A new session came up while the record was written; its completions carry on from there.
            return;
        }
        self.peer = Peer::Alone;
        self.alone_asked = false;
        self.release_all(actions);
        self.settle(actions);
    }

    fn release_all(&mut self, actions: &mut Vec<Action>) {
        for entry in self.window.drain(..) {
            actions.push(Action::MarkDirty(entry.change.range));
            actions.push(Action::Release(entry.change));
            if !entry.completed {
                self.waiting.push(entry);
            }
        }
    }

    /// With `async` a change need not wait for its release.
    fn may_complete_async(&self, entry: &Entry) -> bool {
        let background = entry.change.flags & flags::RESYNC != 0;
        self.ack == AckLevel::Async
            && self.peer == Peer::Live
            && self.local != Local::Failing
            && (background || !self.is_held())
            && !self.wants_durability(entry.change)
    }

    /// Completes what `async` held back while the peer was absent or not in sync.
    fn complete_async(&mut self, actions: &mut Vec<Action>) {
        for at in 0..self.window.len() {
            let entry = self.window[at];
            if !entry.completed && self.may_complete_async(&entry) {
                self.window[at].completed = true;
                actions.push(Action::Complete(entry.change.token));
            }
        }
    }

    /// Completes whatever may complete by now, and forgets it.
    fn settle(&mut self, actions: &mut Vec<Action>) {
        if self.peer == Peer::Absent || self.local == Local::Failing {
            return;
        }
        let held = self.is_held();
        if self.peer == Peer::Parted {
            return self.settle_flushes(held, actions);
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|entry| {
            let background = entry.change.flags & flags::RESYNC != 0;
            let done = (background || !held) && self.may_complete(entry);
            if done {
                actions.push(Action::Complete(entry.change.token));
            }
            !done
        });
        self.waiting = waiting;
        self.settle_flushes(held, actions);
    }

    /// Of a released change.
    fn may_complete(&self, entry: &Entry) -> bool {
        !self.wants_durability(entry.change)
            || ((self.local == Local::Gone || self.local_durable >= entry.landing)
                && (self.peer != Peer::Live || self.peer_durable >= entry.seq))
    }

    fn settle_flushes(&mut self, held: bool, actions: &mut Vec<Action>) {
        let (local, peer, live) = (self.local_durable, self.peer_durable, self.peer != Peer::Alone);
        let running_clean = self.local_flush.is_none();
        let gone = self.local == Local::Gone;
        self.flushes.retain(|flush| {
            // Before the first landing `local` cannot tell a flush from none: the one under way must end, or a later
            // one have covered a landing.
            let here = gone || (local >= flush.landing && (local > 0 || running_clean));
            let done = here && (!held || flush.background) && (!live || peer >= flush.seq);
            if done {
                actions.push(Action::Complete(flush.token));
            }
            !done
        });
    }
}

#[cfg(test)]
mod tests;

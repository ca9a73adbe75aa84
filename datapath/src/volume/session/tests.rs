//! A session alone, over the loopback link: no disk but the one that frames are made of, no pipeline, no control.

use super::*;
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::image::DiskImage;
use crate::disk::metadata::layout::Geometry;
use crate::limits::RING_LEN_MIN;
use crate::transport::loopback;
use crate::units::Token;
use crate::volume::background::Background;
use crate::volume::diskless::Diskless;
use crate::volume::interface::{Op, Origin, VolumeCounters};
use crate::volume::request_table::{Request, RequestTable};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_millis(400);

/// A session with what its frames are made of.
struct End {
    session: Session,
    disk: Arc<DiskImage>,
    requests: RequestTable,
    diskless: Diskless,
    background: Background,
    dirty: DirtyBitmap,
    counters: VolumeCounters,
}

impl End {
    fn new(now: Instant) -> Self {
        Self {
            session: Session::new(now),
            disk: DiskImage::memory("test", SIZE).expect("memory"),
            requests: RequestTable::new(),
            diskless: Diskless::default(),
            background: Background::new(false),
            dirty: DirtyBitmap::new(Geometry::for_volume(SIZE).expect("usual")),
            counters: VolumeCounters::default(),
        }
    }

    fn send(&mut self, now: Instant) {
        let sources = Sources {
            disk: &self.disk,
            requests: &mut self.requests,
            diskless: &mut self.diskless,
            outlives_disk: false,
            background: &mut self.background,
            dirty: &self.dirty,
            counters: &self.counters,
        };
        assert!(!self.session.send(now, sources));
    }

    /// Posts a change of the whole disk's first page under `seq`.
    fn post(&mut self, seq: u64) {
        let (range, kind) = (ByteRange::new(0, 4096), Kind::Write);
        let token = self.requests.add(Request::of(Origin::Nobody, Op::Change(kind), range, 0));
        self.session.queue_post(Seq(seq), Change { token, kind, range, flags: 0 });
    }

    /// What arrives, but for keep-alives.
    fn take(&mut self, now: Instant) -> Vec<LinkEvent> {
        let Some((mut events, _)) = self.session.poll(now) else { return Vec::new() };
        let taken = events.drain(..).filter(|event| self.session.believes(event)).collect();
        self.session.polled(events);
        taken
    }

    fn take_slot(&mut self, now: Instant) -> Slot {
        for event in self.take(now) {
            if let LinkEvent::Arrived(slot) = event {
                return slot;
            }
        }
        panic!("nothing arrived")
    }
}

/// A source and a target.
fn pair(now: Instant) -> (End, End) {
    let (here, there) = loopback::pair(4 * RING_LEN_MIN).expect("ring memory");
    let (mut source, mut target) = (End::new(now), End::new(now));
    source.session.attach(Box::new(here), false, now);
    target.session.attach(Box::new(there), false, now);
    assert!(!source.session.end_roles(Epoch(1)) && !target.session.end_roles(Epoch(1)));
    source.session.be_source();
    target.session.be_target(SIZE, false);
    (source, target)
}

#[test]
fn a_change_goes_over_is_applied_and_acknowledged() {
    let now = Instant::now();
    let (mut source, mut target) = pair(now);
    source.post(1);
    assert!(source.session.has_posts());
    source.send(now);
    assert!(!source.session.has_posts());
    let slot = target.take_slot(now);
    target.session.admit(slot).expect("in order");
    let slot = target.session.next_to_apply().expect("admitted");
    assert!(target.session.next_to_apply().is_none());
    assert!(target.session.applied(&slot.header));
    target.session.release(slot);
    target.send(now);
    let acks = source.take(now);
    assert!(
        acks.iter().any(|event| matches!(event, LinkEvent::Message(header)
            if header.kind == Kind::Ack && header.seq == Seq(1) && source.session.is_source_of(header))),
        "{acks:?}"
    );
}

#[test]
fn what_waits_behind_a_worker_is_not_applied_before_it_and_goes_with_the_role() {
    let now = Instant::now();
    let (mut source, mut target) = pair(now);
    for seq in 1..=2 {
        source.post(seq);
        source.send(now);
        let slot = target.take_slot(now);
        target.session.admit(slot).expect("in order");
    }
    let first = target.session.next_to_apply().expect("the first");
    target.session.applies(first);
    assert!(target.session.next_to_apply().is_none(), "the worker has the first");
    assert!(target.session.drop_arrived());
    let first = target.session.take_applying();
    target.session.applied(&first.header);
    assert!(target.session.next_to_apply().is_none() && !target.session.drop_arrived());
}

#[test]
fn a_flush_of_an_earlier_session_is_none_of_this_one() {
    let now = Instant::now();
    let (mut source, mut target) = pair(now);
    source.session.queue_flush(Seq(0));
    source.post(1);
    source.send(now);
    let slot = target.take_slot(now);
    let header = slot.header;
    target.session.admit(slot).expect("in order");
    let slot = target.session.next_to_apply().expect("admitted");
    target.session.applied(&slot.header);
    let mut flush = Header::new(Kind::Flush, Epoch(1));
    flush.seq = header.seq;
    target.session.flush_asked(&flush).expect("of what was sent");
    let token = target.session.take_flush().expect("due");
    assert_eq!(target.session.take_flush(), None);
    target.session.flushed(Token(token.0 - 1));
    target.send(now);
    let durable = |end: &mut End| {
        let events = end.take(now);
        events.iter().any(|event| {
            matches!(event, LinkEvent::Message(header)
            if header.kind == Kind::Ack && header.aux == 1)
        })
    };
    assert!(!durable(&mut source), "the flush of another session");
    target.session.flushed(token);
    target.send(now);
    assert!(durable(&mut source));
}

#[test]
fn silence_ends_the_link_and_a_word_in_time_does_not() {
    let began = Instant::now();
    let (mut source, mut target) = pair(began);
    let mut now = began;
    while now < began + 4 * TIMEOUT {
        now += TIMEOUT / 8;
        assert!(source.session.keep_alive(now, TIMEOUT, false).is_some_and(|next| next > now));
        target.session.keep_alive(now, TIMEOUT, false);
        assert!(source.take(now).iter().all(|event| !matches!(event, LinkEvent::Down(_))));
        target.take(now);
    }
    let heard = now;
    while source.session.keep_alive(now, TIMEOUT, false).is_some_and(|next| next > now) {
        now += TIMEOUT / 8;
        assert!(now <= heard + (STALLED_PEER_TIMEOUTS + 1) * TIMEOUT, "never given up");
    }
    assert!(now >= heard + TIMEOUT);
    let events = source.take(now);
    assert!(
        events.iter().any(|event| matches!(event, LinkEvent::Down(DownReason::Silent { .. }))),
        "{events:?}"
    );
}

#[test]
fn after_a_violation_nothing_is_believed_but_the_end() {
    let now = Instant::now();
    let (mut source, mut target) = pair(now);
    assert!(source.session.is_trusted());
    target.session.queue_control(1, 2);
    target.send(now);
    source.session.distrust(Violation::TooManyReads);
    assert!(!source.session.is_trusted());
    let events = source.take(now);
    assert!(events.iter().all(|event| matches!(event, LinkEvent::Down(_))), "{events:?}");
}

#[test]
fn a_parted_session_goes_on_only_as_both_know_it_and_one_that_was_ended_here_not_at_all() {
    let now = Instant::now();
    let (mut source, mut target) = pair(now);
    source.post(1);
    source.send(now);
    let slot = target.take_slot(now);
    target.session.admit(slot).expect("in order");
    let slot = target.session.next_to_apply().expect("admitted");
    target.session.applied(&slot.header);
    let broken = DownReason::Local("cut by the test");
    for end in [&mut source, &mut target] {
        assert!(end.session.may_part(&broken));
        end.session.link_gone(&broken, false);
        end.session.part(true);
        assert!(end.session.is_parted() && !end.session.has_link());
    }
    assert!(target.session.take_end().is_some_and(|end| end.was_target && end.moved));
    assert!(source.session.take_end().is_some_and(|end| !end.was_target));
    let unsure = (Seq(0), Seq(1));
    let told = target.session.told_of_parting((Seq(0), Seq(0)), false).expect("parted");
    assert_eq!((told.source, told.applied), (false, Seq(1)));
    let (to, from) = (Direction::Target { resync: false }, Direction::Source { resync: false });
    assert!(target.session.can_go_on(Seq(1), to, Epoch(1), unsure, false));
    assert!(!target.session.can_go_on(Seq(0), to, Epoch(1), unsure, false));
    assert!(!target.session.can_go_on(Seq(1), from, Epoch(1), unsure, false), "another role");
    assert!(source.session.can_go_on(Seq(1), from, Epoch(1), unsure, false));
    assert!(!source.session.can_go_on(Seq(2), from, Epoch(1), unsure, false), "more than was posted");
    assert!(!source.session.can_go_on(Seq(1), from, Epoch(2), unsure, false));
    assert!(source.session.patience_ends(TIMEOUT).is_some_and(|due| due <= now + TIMEOUT));
    let late = now + 2 * TIMEOUT;
    assert!(!source.session.is_out_of_patience(late, false), "nobody waits");
    assert!(source.session.is_out_of_patience(late, true) && !source.session.is_out_of_patience(late, true));
    assert!(source.session.go_on(false) && !target.session.go_on(false));
    assert!(target.session.is_target() && !source.session.is_parted());

    let (mut source, _target) = pair(now);
    source.session.end("broken by this node");
    assert!(!source.session.may_part(&broken));
}

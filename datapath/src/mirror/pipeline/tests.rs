//! What the pipeline promises, rule by rule, then against an independent model (`model`) under random events.

use super::*;

mod model;

/// A pipeline and everything it asked for so far.
struct Rig {
    pipeline: Pipeline,
    actions: Vec<Action>,
}

impl Rig {
    fn new(ack: AckLevel, on_loss: OnPeerLoss) -> Self {
        Self { pipeline: Pipeline::new(ack, on_loss), actions: Vec::new() }
    }

    /// With a session to a peer that is in sync.
    fn live(ack: AckLevel) -> Self {
        let mut rig = Self::new(ack, OnPeerLoss::Continue);
        rig.on(Event::SessionUp { in_sync: true });
        rig
    }

    /// What follows from `event` alone.
    fn on(&mut self, event: Event) -> Vec<Action> {
        self.actions.clear();
        self.pipeline.handle(event, &mut self.actions).expect("no bad ack");
        self.actions.clone()
    }

    fn land(&mut self, token: u64) -> Vec<Action> {
        self.on(Event::Landed(change(token, 0)))
    }

    fn ack(&mut self, applied: u64, durable: u64) -> Vec<Action> {
        self.on(ack(applied, durable))
    }

    fn refused(&mut self, event: Event) -> Violation {
        self.actions.clear();
        let violation = self.pipeline.handle(event, &mut self.actions).expect_err("a bad ack");
        assert!(self.actions.is_empty(), "a bad ack moves nothing: {:?}", self.actions);
        violation
    }
}

fn range(token: u64) -> ByteRange {
    ByteRange::new(token * 4096, 4096)
}

fn change(token: u64, flags: u8) -> Change {
    Change { token: Token(token), kind: Kind::Write, range: range(token), flags }
}

fn ack(applied: u64, durable: u64) -> Event {
    Event::Ack { applied: Seq(applied), durable: Seq(durable) }
}

fn post(seq: u64, token: u64, flags: u8) -> Action {
    Action::Post(Seq(seq), change(token, flags))
}

fn release(token: u64) -> Action {
    Action::Release(change(token, 0))
}

fn complete(token: u64) -> Action {
    Action::Complete(Token(token))
}

#[test]
fn memory_completes_at_the_peers_word_and_in_landing_order() {
    let mut rig = Rig::live(AckLevel::Memory);
    assert_eq!(rig.land(1), [post(1, 1, 0)]);
    assert_eq!(rig.land(2), [post(2, 2, 0)]);
    assert_eq!(rig.land(3), [post(3, 3, 0)]);
    assert_eq!(rig.ack(0, 0), []);
    let two = rig.ack(2, 0);
    assert_eq!(
        two.iter().filter(|a| matches!(a, Action::Release(_))).copied().collect::<Vec<_>>(),
        [release(1), release(2)]
    );
    assert_eq!(
        two.iter().filter(|a| matches!(a, Action::Complete(_))).copied().collect::<Vec<_>>(),
        [complete(1), complete(2)]
    );
    assert_eq!(rig.pipeline.in_flight(), 1);
    assert_eq!(rig.ack(3, 0), [release(3), complete(3)]);
    assert_eq!(rig.pipeline.in_flight(), 0);
    assert!(rig.pipeline.peer_lags_durably(), "applied is not durable");
    rig.ack(3, 3);
    assert!(!rig.pipeline.peer_lags_durably());
}

#[test]
fn async_completes_at_once_but_unlocks_at_the_peers_word() {
    let mut rig = Rig::live(AckLevel::Async);
    assert_eq!(rig.land(1), [post(1, 1, 0), complete(1)]);
    assert_eq!(rig.pipeline.in_flight(), 1);
    assert_eq!(rig.ack(1, 0), [release(1)]);
    assert_eq!(rig.pipeline.in_flight(), 0);
}

#[test]
fn durable_needs_both_disks() {
    for local_first in [true, false] {
        let mut rig = Rig::live(AckLevel::Durable);
        assert_eq!(rig.land(1), [post(1, 1, flags::FUA), Action::FlushLocal]);
        assert_eq!(rig.ack(1, 0), [release(1)]);
        if local_first {
            assert_eq!(rig.on(Event::FlushedLocal), []);
            assert_eq!(rig.ack(1, 1), [complete(1)]);
        } else {
            assert_eq!(rig.ack(1, 1), []);
            assert_eq!(rig.on(Event::FlushedLocal), [complete(1)]);
        }
        assert_eq!(rig.pipeline.in_flight(), 0);
    }
}

#[test]
fn fua_makes_one_write_durable_and_holds_up_no_other() {
    for ack_level in [AckLevel::Async, AckLevel::Memory] {
        let mut rig = Rig::live(ack_level);
        assert_eq!(
            rig.on(Event::Landed(change(1, flags::FUA))),
            [post(1, 1, flags::FUA), Action::FlushLocal]
        );
        rig.land(2);
        let applied = rig.ack(2, 0);
        assert!(!applied.contains(&complete(1)), "neither disk has it: {applied:?}");
        assert_eq!(applied.contains(&complete(2)), ack_level == AckLevel::Memory, "async told before");
        assert_eq!(rig.ack(2, 1), []);
        assert_eq!(rig.on(Event::FlushedLocal), [complete(1)]);
        assert_eq!(rig.pipeline.in_flight(), 0);
    }
}

#[test]
fn what_was_answered_behind_a_slow_flush_is_forgotten_at_once() {
    for ack_level in [AckLevel::Async, AckLevel::Memory] {
        let mut rig = Rig::live(ack_level);
        rig.on(Event::Landed(change(1, flags::FUA)));
        for token in 2..=5000 {
            rig.land(token);
            rig.ack(token, 0);
            assert_eq!(rig.pipeline.in_flight(), 1, "only the write that waits for the disk");
        }
        rig.ack(5000, 1);
        assert_eq!(rig.on(Event::FlushedLocal), [complete(1)]);
    }
}

#[test]
fn a_local_flush_that_began_before_a_write_does_not_cover_it() {
    let mut rig = Rig::live(AckLevel::Memory);
    rig.on(Event::Landed(change(1, flags::FUA)));
    assert_eq!(rig.on(Event::Landed(change(2, flags::FUA))), [post(2, 2, flags::FUA)], "one flush at a time");
    rig.ack(2, 2);
    assert_eq!(rig.on(Event::FlushedLocal), [Action::FlushLocal, complete(1)]);
    assert_eq!(rig.on(Event::FlushedLocal), [complete(2)]);
}

#[test]
fn a_flush_covers_what_landed_before_it_on_both_sides() {
    let mut rig = Rig::live(AckLevel::Memory);
    rig.land(1);
    assert_eq!(rig.on(Event::Flush(Token(9))), [Action::FlushLocal, Action::FlushPeer(Seq(1))]);
    rig.land(2);
    assert_eq!(rig.ack(1, 0), [release(1), complete(1)]);
    assert_eq!(rig.on(Event::FlushedLocal), []);
    assert_eq!(rig.ack(1, 1), [complete(9)], "the write after it is not waited for");
    assert_eq!(rig.pipeline.in_flight(), 1);
}

#[test]
fn a_flush_waits_for_a_write_that_landed_even_if_the_peer_has_flushed_earlier_ones() {
    let mut rig = Rig::live(AckLevel::Async);
    rig.land(1);
    rig.on(Event::Flush(Token(8)));
    rig.land(2);
    assert_eq!(rig.on(Event::Flush(Token(9))), [Action::FlushPeer(Seq(2))]);
    assert_eq!(rig.ack(2, 1), [release(1), release(2)]);
    assert_eq!(rig.on(Event::FlushedLocal), [Action::FlushLocal, complete(8)]);
    assert_eq!(rig.on(Event::FlushedLocal), []);
    assert_eq!(rig.ack(2, 2), [complete(9)]);
}

#[test]
fn a_flush_of_nothing_still_flushes_the_local_disk() {
    let mut rig = Rig::live(AckLevel::Memory);
    assert_eq!(
        rig.on(Event::Flush(Token(9))),
        [Action::FlushLocal],
        "an earlier daemon's writes may be in the cache"
    );
    assert_eq!(rig.on(Event::FlushedLocal), [complete(9)]);
}

#[test]
fn a_flush_covers_what_this_node_applied_as_standby() {
    let mut rig = Rig::live(AckLevel::Memory);
    rig.land(1);
    rig.ack(1, 0);
    rig.on(Event::Flush(Token(8)));
    rig.on(Event::FlushedLocal);
    assert_eq!(rig.ack(1, 1), [complete(8)]);
    rig.on(Event::SessionDown);
    // It steps down, applies what the peer sends, and takes over again.
    rig.pipeline.applied_as_standby();
    rig.on(Event::GoAlone);
    assert_eq!(rig.on(Event::Flush(Token(9))), [Action::FlushLocal], "nothing has flushed what was applied");
    assert_eq!(rig.on(Event::FlushedLocal), [complete(9)]);
    assert_eq!(rig.on(Event::Flush(Token(10))), [complete(10)], "and nothing has changed since");
}

#[test]
fn a_first_flush_is_not_starved_by_writes_that_keep_the_disk_flushing() {
    let mut rig = Rig::live(AckLevel::Durable);
    rig.on(Event::Flush(Token(99)));
    let mut told = Vec::new();
    for token in 1..=3 {
        rig.land(token);
        told.extend(rig.on(Event::FlushedLocal));
    }
    assert!(told.contains(&complete(99)), "two local flushes began and ended after it: {told:?}");
}

#[test]
fn without_a_session_nothing_completes_before_the_record() {
    for ack_level in [AckLevel::Async, AckLevel::Memory, AckLevel::Durable] {
        let mut rig = Rig::new(ack_level, OnPeerLoss::Continue);
        assert!(rig.land(1).contains(&Action::AskAlone));
        assert!(!rig.land(2).contains(&Action::AskAlone), "asked once");
        assert!(!rig.on(Event::Flush(Token(9))).contains(&Action::AskAlone), "asked once");
        assert_eq!(
            rig.on(Event::FlushedLocal).iter().filter(|a| matches!(a, Action::Complete(_))).count(),
            0
        );
        assert!(rig.pipeline.is_frozen());
        let alone = rig.on(Event::GoAlone);
        for token in 1..=2 {
            let dirty = alone.iter().position(|a| *a == Action::MarkDirty(range(token))).expect("counted");
            let unlocked = alone.iter().position(|a| *a == release(token)).expect("unlocked");
            assert!(dirty < unlocked, "what the peer lacks is marked before the range is free again");
        }
        while rig.pipeline.local_flush.is_some() {
            rig.on(Event::FlushedLocal);
        }
        assert_eq!(rig.pipeline.in_flight(), 0, "{ack_level:?}");
        assert!(!rig.pipeline.is_frozen());
    }
}

#[test]
fn alone_every_write_is_marked_and_completes_at_once() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Continue);
    assert_eq!(rig.on(Event::GoAlone), []);
    assert_eq!(rig.land(1), [Action::MarkDirty(range(1)), release(1), complete(1)]);
    assert_eq!(rig.on(Event::Flush(Token(9))), [Action::FlushLocal], "nobody to ask");
    assert_eq!(rig.on(Event::FlushedLocal), [complete(9)]);
}

#[test]
fn a_flush_that_finds_no_peer_asks_for_the_record_too() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Continue);
    assert_eq!(rig.on(Event::Flush(Token(9))), [Action::AskAlone, Action::FlushLocal]);
    assert_eq!(rig.on(Event::FlushedLocal), []);
    assert_eq!(rig.on(Event::GoAlone), [complete(9)]);
}

#[test]
fn frozen_nothing_completes_until_the_peer_is_in_sync() {
    for ack_level in [AckLevel::Async, AckLevel::Memory, AckLevel::Durable] {
        let mut rig = Rig::new(ack_level, OnPeerLoss::Freeze);
        rig.on(Event::SessionUp { in_sync: false });
        rig.land(1);
        rig.on(Event::Flush(Token(8)));
        let mut told = rig.ack(1, 1);
        told.extend(rig.on(Event::FlushedLocal));
        assert!(told.contains(&release(1)), "order goes on");
        assert!(!told.iter().any(|a| matches!(a, Action::Complete(_))), "{told:?}");
        assert!(rig.pipeline.is_frozen());
        let mut told = rig.on(Event::Landed(change(2, flags::RESYNC)));
        told.extend(rig.on(Event::FlushBackground(Token(9))));
        told.extend(rig.ack(2, 2));
        told.extend(rig.on(Event::FlushedLocal));
        assert!(
            told.contains(&complete(2)) && told.contains(&complete(9)),
            "the copy ends the freeze: {told:?}"
        );
        assert!(!told.contains(&complete(1)) && !told.contains(&complete(8)), "{told:?}");
        assert_eq!(rig.on(Event::PeerInSync), [complete(1), complete(8)]);
        assert!(!rig.pipeline.is_frozen());
    }
}

#[test]
fn the_copys_own_flush_passes_the_freeze() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Freeze);
    rig.on(Event::SessionUp { in_sync: false });
    rig.on(Event::Landed(change(1, flags::RESYNC)));
    rig.ack(1, 0);
    assert_eq!(rig.on(Event::FlushBackground(Token(9))), [Action::FlushLocal, Action::FlushPeer(Seq(1))]);
    assert_eq!(rig.on(Event::FlushedLocal), []);
    assert_eq!(rig.ack(1, 1), [complete(9)]);
}

#[test]
fn with_continue_a_peer_that_is_being_copied_to_holds_nothing_up_but_order() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Continue);
    rig.on(Event::SessionUp { in_sync: false });
    rig.land(1);
    assert_eq!(rig.ack(1, 0), [release(1), complete(1)]);
}

#[test]
fn a_lost_session_asks_once_and_marks_what_was_on_its_way() {
    let mut rig = Rig::live(AckLevel::Memory);
    rig.land(1);
    rig.land(2);
    rig.ack(1, 0);
    let flush = Action::FlushLocal;
    assert_eq!(rig.on(Event::SessionDown), [flush, Action::MarkDirty(range(2)), Action::AskAlone]);
    assert_eq!(rig.on(Event::SessionDown), [], "it ended once");
    assert_eq!(rig.land(3), []);
    assert!(rig.pipeline.is_frozen());
    let alone = rig.on(Event::GoAlone);
    assert_eq!(
        alone.iter().filter(|a| matches!(a, Action::Complete(_))).copied().collect::<Vec<_>>(),
        [complete(2), complete(3)]
    );
    assert_eq!(rig.pipeline.in_flight(), 0);
}

#[test]
fn a_record_of_the_peers_absence_is_void_once_a_session_without_us_as_source_ended() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Continue);
    rig.on(Event::GoAlone);
    assert_eq!(rig.on(Event::SessionDown), []);
    assert_eq!(rig.land(1), [Action::AskAlone]);
}

#[test]
fn a_session_lost_while_idle_asks_nothing_until_something_waits() {
    let mut rig = Rig::live(AckLevel::Memory);
    assert_eq!(rig.on(Event::SessionDown), []);
    assert_eq!(rig.land(1), [Action::AskAlone]);
}

#[test]
fn the_next_session_gets_what_the_last_one_lost_under_new_numbers() {
    let mut rig = Rig::live(AckLevel::Memory);
    for token in 1..=3 {
        rig.land(token);
    }
    rig.ack(1, 0);
    rig.on(Event::Flush(Token(9)));
    rig.on(Event::SessionDown);
    rig.land(4);
    assert_eq!(
        rig.on(Event::SessionUp { in_sync: true }),
        [post(1, 2, 0), post(2, 3, 0), post(3, 4, 0), Action::FlushPeer(Seq(3))],
        "the flush that waits is asked for again"
    );
    assert_eq!(rig.refused(ack(4, 0)), Violation::AckFromTheFuture { found: Seq(4), sent: Seq(3) });
    rig.on(Event::FlushedLocal);
    let all = rig.ack(3, 3);
    assert_eq!(all.iter().filter(|a| matches!(a, Action::Complete(_))).count(), 4, "{all:?}");
    assert_eq!(rig.pipeline.in_flight(), 0);
}

#[test]
fn what_one_session_applied_is_not_posted_in_the_next() {
    let mut rig = Rig::live(AckLevel::Durable);
    rig.land(1);
    assert_eq!(rig.ack(1, 0), [release(1)]);
    rig.on(Event::SessionDown);
    assert_eq!(rig.on(Event::SessionUp { in_sync: true }), []);
    assert_eq!(rig.on(Event::FlushedLocal), [complete(1)], "its old number means nothing to the new session");
}

#[test]
fn a_late_go_ahead_does_not_end_a_new_session() {
    let mut rig = Rig::live(AckLevel::Memory);
    rig.land(1);
    rig.on(Event::SessionDown);
    rig.on(Event::SessionUp { in_sync: true });
    assert_eq!(rig.on(Event::GoAlone), []);
    assert_eq!(rig.ack(1, 0), [release(1), complete(1)]);
}

#[test]
fn steps_of_the_copy_end_with_their_session() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Continue);
    rig.on(Event::SessionUp { in_sync: false });
    let step = change(1, flags::RESYNC);
    rig.on(Event::Landed(step));
    rig.land(2);
    let down = rig.on(Event::SessionDown);
    assert!(down.contains(&Action::Release(step)), "its range is free for the next copy: {down:?}");
    assert!(!down.contains(&complete(1)));
    assert_eq!(
        rig.on(Event::SessionUp { in_sync: false }),
        [post(1, 2, 0)],
        "only the client's write comes again"
    );
    assert_eq!(rig.ack(1, 0), [release(2), complete(2)]);
    assert_eq!(rig.pipeline.in_flight(), 0);
}

#[test]
fn impossible_acks_are_refused_and_change_nothing() {
    let mut rig = Rig::live(AckLevel::Memory);
    for token in 1..=3 {
        rig.land(token);
    }
    rig.ack(2, 1);
    assert_eq!(rig.refused(ack(4, 0)), Violation::AckFromTheFuture { found: Seq(4), sent: Seq(3) });
    assert_eq!(
        rig.refused(ack(u64::MAX, u64::MAX)),
        Violation::AckFromTheFuture { found: Seq(u64::MAX), sent: Seq(3) }
    );
    assert_eq!(rig.refused(ack(2, 3)), Violation::AckFromTheFuture { found: Seq(3), sent: Seq(2) });
    assert_eq!(rig.refused(ack(1, 1)), Violation::AckWentBack { found: Seq(1), before: Seq(2) });
    assert_eq!(rig.refused(ack(3, 0)), Violation::AckWentBack { found: Seq(0), before: Seq(1) });
    assert_eq!(rig.ack(3, 3), [release(3), complete(3)], "and the truth is still welcome");
}

#[test]
fn abandoning_hands_back_each_request_once_and_every_lock() {
    let mut rig = Rig::live(AckLevel::Async);
    rig.land(1);
    rig.on(Event::Landed(change(2, flags::FUA)));
    rig.on(Event::Flush(Token(9)));
    let (mut uncompleted, mut locked) = (Vec::new(), Vec::new());
    rig.pipeline.abandon(&mut uncompleted, &mut locked);
    assert_eq!(uncompleted, [Token(2), Token(9)], "1 was told before");
    assert_eq!(locked, [change(1, 0), change(2, flags::FUA)]);
    assert_eq!(rig.pipeline.in_flight(), 0);
    assert_eq!(rig.on(Event::FlushedLocal), [], "the flush under way ends into the void");
    assert_eq!(rig.on(Event::SessionDown), []);
}

#[test]
fn parted_nothing_completes_and_the_window_is_posted_again_behind_the_peers_word() {
    for ack_level in [AckLevel::Async, AckLevel::Memory, AckLevel::Durable] {
        let mut rig = Rig::live(ack_level);
        for token in 1..=4 {
            rig.land(token);
        }
        rig.ack(1, 0);
        rig.on(Event::Flush(Token(9)));
        let parted = rig.on(Event::SessionParted);
        assert!(parted.iter().all(|action| *action == Action::FlushLocal), "{parted:?}");
        let five = rig.land(5);
        assert!(five.iter().all(|action| *action == Action::FlushLocal), "{ack_level:?}: {five:?}");
        while rig.pipeline.local_flush.is_some() {
            assert!(!rig.on(Event::FlushedLocal).iter().any(|action| matches!(action, Action::Complete(_))));
        }
        assert!(rig.pipeline.is_frozen() && rig.pipeline.waits_for_parted());
        assert_eq!(rig.pipeline.unsure(), (Seq(1), Seq(5)));
        // The peer had applied one more than it could say.
        let on = rig.on(Event::SessionGoesOn { applied: Seq(2) });
        let fua = if ack_level == AckLevel::Durable { flags::FUA } else { 0 };
        let posts: Vec<_> = on.iter().filter(|action| matches!(action, Action::Post(..))).copied().collect();
        assert_eq!(
            posts,
            [post(3, 3, fua), post(4, 4, fua), post(5, 5, fua)],
            "each once, as it was numbered"
        );
        let released: Vec<_> =
            on.iter().filter(|action| matches!(action, Action::Release(_))).copied().collect();
        assert_eq!(released, [release(2)]);
        if ack_level != AckLevel::Durable {
            let flush = on.iter().position(|action| *action == Action::FlushPeer(Seq(5)));
            assert!(
                flush > on.iter().position(|action| *action == posts[2]),
                "asked again, behind them: {on:?}"
            );
        }
        let last = rig.ack(5, 5);
        assert!(last.contains(&complete(9)), "{ack_level:?}: {last:?}");
        assert_eq!(rig.pipeline.in_flight(), 0);
    }
}

#[test]
fn parted_a_flush_of_what_both_have_durable_needs_no_peer() {
    let mut rig = Rig::live(AckLevel::Memory);
    rig.land(1);
    rig.on(Event::Flush(Token(8)));
    rig.on(Event::FlushedLocal);
    assert!(rig.ack(1, 1).contains(&complete(8)));
    rig.on(Event::SessionParted);
    assert_eq!(rig.on(Event::Flush(Token(9))), [complete(9)]);
    assert!(!rig.pipeline.waits_for_parted());
    rig.land(2);
    let flush = rig.on(Event::Flush(Token(10)));
    assert!(!flush.contains(&complete(10)) && !rig.on(Event::FlushedLocal).contains(&complete(10)));
    assert!(rig.pipeline.waits_for_parted());
}

#[test]
fn a_parted_copy_is_nobody_who_waits() {
    let mut rig = Rig::new(AckLevel::Memory, OnPeerLoss::Continue);
    rig.on(Event::SessionUp { in_sync: false });
    rig.on(Event::Landed(change(1, flags::RESYNC)));
    rig.on(Event::FlushBackground(Token(2)));
    rig.on(Event::SessionParted);
    assert!(!rig.pipeline.waits_for_parted());
    rig.land(3);
    assert!(rig.pipeline.waits_for_parted());
}

#[test]
fn a_parted_session_that_is_given_up_leaves_nothing_unmarked_and_asks_nobody() {
    let mut rig = Rig::live(AckLevel::Memory);
    for token in 1..=3 {
        rig.land(token);
    }
    rig.ack(1, 1);
    rig.on(Event::SessionParted);
    rig.land(4);
    let given_up = rig.on(Event::SessionGivenUp { lacking: true });
    let marked: Vec<_> = given_up.iter().filter(|a| matches!(a, Action::MarkDirty(_))).copied().collect();
    assert_eq!(marked, [2, 3, 4].map(|token| Action::MarkDirty(range(token))));
    assert!(!given_up.iter().any(|a| matches!(a, Action::AskAlone | Action::Complete(_))), "{given_up:?}");
    let alone = rig.on(Event::GoAlone);
    assert!([2, 3, 4].iter().all(|token| alone.contains(&complete(*token))), "{alone:?}");
}

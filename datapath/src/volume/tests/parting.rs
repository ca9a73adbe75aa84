//! A session whose link breaks again and again, and goes on.

use super::*;
use crate::limits::DIRTY_GRAIN_LEN as G;

/// Cuts the link, and lets the session go on.
fn break_link(pair: &mut Pair) {
    pair.cut();
    pair.go_on();
}

fn applied(pair: &Pair) -> u64 {
    pair.b.volume.counters.changes_applied.load(Ordering::Relaxed)
}

#[test]
fn a_link_that_breaks_at_any_moment_costs_no_mark_and_applies_nothing_twice() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let mut slot = 0;
    for round in 0..60 {
        for _ in 0..4 {
            let range = grains(u64::from(slot) % 20, 1);
            if let Begin::Go(token) = pair.a.begin(slot, Op::Change(Kind::Write), range, slot % 7 == 0) {
                pair.a.fill(range, u8::try_from(slot % 251).expect("small"));
                pair.a.volume.landed(token);
            } else {
                panic!("{range} is not free")
            }
            slot += 1;
        }
        pair.a.begin(slot, Op::Flush, ByteRange::new(0, 0), false);
        slot += 1;
        for _ in 0..round % 4 {
            pair.a.turn();
        }
        for _ in 0..round % 3 {
            pair.b.turn();
        }
        break_link(&mut pair);
        for slot in slot - 5..slot {
            pair.until_told(slot);
            assert_eq!(pair.a.told(slot), [Ok(())], "once, and well");
        }
    }
    assert_eq!(applied(&pair), pair.a.volume.pipeline.unsure().1.0, "each change once");
    assert!(!pair.a.volume.record.is_dirty() && !pair.b.volume.record.is_dirty());
    assert!(!pair.a.saw(|event| matches!(event, Event::AskAlone { .. })));
    pair.assert_equal_and_clean();
}

#[test]
fn a_copy_whose_link_breaks_goes_on_at_the_step_where_it_was() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    pair.a.fill(ByteRange::new(0, SIZE), 5);
    pair.b.volume.record.mark(grains(3, 2));
    pair.connect(true);
    let mut breaks = 0;
    while !pair.a.saw(|event| matches!(event, Event::ResyncDone { .. })) {
        for _ in 0..1 + breaks % 3 {
            pair.turn();
        }
        if breaks < 40 {
            break_link(&mut pair);
            breaks += 1;
        }
    }
    assert_eq!(applied(&pair), pair.a.volume.pipeline.unsure().1.0, "no step came twice");
    let (total, done) = pair.a.volume.background.copy_mut().expect("until control knows").progress();
    assert_eq!((total, done), (SIZE, SIZE));
    pair.a.volume.peer_in_sync();
    pair.until("the last receipt", |pair| pair.a.volume.session.has_sent_all());
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn what_was_written_alone_is_copied_and_what_was_mirrored_before_only_waits_for_a_flush() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    for grain in 0..20 {
        pair.a.write(grain, grains(grain.into(), 1), 1);
        pair.until_told(grain);
    }
    pair.cut();
    pair.a.write(30, grains(4, 1), 2);
    pair.a.volume.go_alone();
    pair.until_told(30);
    assert_eq!(pair.a.volume.record.dirty().dirty_bytes(), 20 * G, "on record all of it may differ");
    assert_eq!(pair.a.volume.record.doubts(), [grains(0, 4), grains(5, 15)]);
    let sent = |pair: &Pair| pair.a.volume.counters.resync_bytes_posted.load(Ordering::Relaxed);
    let before = sent(&pair);
    pair.join_kept();
    pair.until("the end of the copy", |pair| pair.a.saw(|event| matches!(event, Event::ResyncDone { .. })));
    assert_eq!(sent(&pair) - before, G, "one grain was sent");
    assert!(!pair.a.volume.record.is_dirty() && pair.a.volume.record.doubts().is_empty());
    pair.a.volume.peer_in_sync();
    pair.until_quiet();
    pair.assert_equal_and_clean();
    // A target that was restarted may have lost the rest.
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(0, 1), 1);
    pair.until_told(1);
    pair.cut();
    pair.a.volume.go_alone();
    pair.b.fill(grains(0, 1), 9);
    pair.join(true);
    pair.until("the end of the copy", |pair| pair.a.saw(|event| matches!(event, Event::ResyncDone { .. })));
    pair.a.volume.peer_in_sync();
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn a_session_that_was_given_up_here_does_not_go_on() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(0, 1), 1);
    pair.cut();
    let parted = pair.b.volume.told_of_parting().expect("known there");
    pair.a.volume.go_alone();
    assert!(pair.a.volume.told_of_parting().is_none());
    let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
    let before = Before::GoesOn { applied: parted.applied, map_told: true };
    let now = Instant::now();
    let side = Direction::Source { resync: false };
    pair.a.volume.attach_after(before, Box::new(here), side, pair.epoch, now);
    let side = Direction::Target { resync: false };
    pair.b.volume.attach_after(before, Box::new(there), side, pair.epoch, now);
    pair.until("the end", |pair| {
        pair.a.saw(|event| matches!(event, Event::LinkDown { undurable: true, parted: None, .. }))
    });
    assert!(pair.a.volume.record.is_dirty());
}

#[test]
fn clients_wait_once_where_links_come_and_go_and_nothing_gets_through() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(0, 1), 1);
    pair.cut();
    let since = pair.a.volume.session.stalled_since().expect("a client waits");
    let timeout = Duration::from_millis(20);
    std::thread::sleep(timeout);
    pair.go_on();
    pair.cut();
    assert_eq!(pair.a.volume.session.stalled_since(), Some(since));
    pair.a.volume.keep_alive(Instant::now(), timeout);
    pair.a.turn();
    assert!(pair.a.saw(|event| matches!(event, Event::AskAlone { .. })), "its time is up");

    // What gets through begins it anew.
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(0, 1), 1);
    pair.cut();
    pair.go_on();
    pair.until_told(1);
    pair.a.write(2, grains(1, 1), 2);
    pair.cut();
    let since = pair.a.volume.session.stalled_since().expect("a client waits");
    assert_eq!(since, pair.a.volume.session.last_heard());
}

/// Turns by hand until the copy has a step that the target applied and the source has not heard of, and cuts there.
fn cut_before_the_ack(pair: &mut Pair) {
    let before = applied(pair);
    pair.until("a step that was applied and not acknowledged", |pair| {
        let ended = pair.a.events.iter().any(|event| matches!(event, Event::ResyncDone { .. }));
        (applied(pair) > before && pair.a.volume.pipeline.unsure_steps().next().is_some()) || ended
    });
    // Nothing of what the link holds is heard any more.
    pair.a.volume.session.distrust_all();
    pair.cut();
}

#[test]
fn a_copy_whose_source_went_alone_sends_no_grain_again_that_was_applied() {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    pair.a.fill(ByteRange::new(0, SIZE), 5);
    pair.connect(true);
    let (mut breaks, mut unheard) = (0, 0);
    while !pair.a.saw(|event| matches!(event, Event::ResyncDone { .. })) {
        if breaks == 8 {
            pair.turn();
            continue;
        }
        cut_before_the_ack(&mut pair);
        breaks += 1;
        pair.a.volume.go_alone();
        let heard = pair.a.volume.record.doubts().iter().map(|range| range.len).sum::<u64>();
        if breaks == 3 {
            // Over what the target has.
            pair.a.write(1, grains(0, 1), 7);
            pair.until_told(1);
        }
        pair.join_kept();
        let (here, there) = (pair.a.content(), pair.b.content());
        let (record, grain) = (&pair.a.volume.record, usize::try_from(G).expect("small"));
        let doubts = record.doubts();
        for (at, (here, there)) in (0..).zip(here.chunks(grain).zip(there.chunks(grain))) {
            let start = grains(at, 1).start;
            if record.dirty().window(start) & 1 != 0 {
                let known = doubts.iter().any(|range| (range.start..range.end()).contains(&start));
                assert_eq!(known, here == there, "grain {at} after break {breaks}");
            }
        }
        unheard += doubts.iter().map(|range| range.len).sum::<u64>().saturating_sub(heard);
    }
    assert!(unheard > 0, "steps that were applied and not acknowledged");
    pair.a.volume.peer_in_sync();
    pair.until_quiet();
    pair.assert_equal_and_clean();
}

#[test]
fn what_was_applied_before_is_flushed_behind_the_first_step_and_nothing_is_cleared_without_the_target() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    for grain in 0..20 {
        pair.a.write(grain, grains(grain.into(), 1), 1);
        pair.until_told(grain);
    }
    pair.cut();
    pair.a.volume.go_alone();
    pair.until("quiet at the target", |pair| pair.b.saw(|event| matches!(event, Event::Settled { .. })));
    assert_eq!(pair.a.volume.record.doubts(), [grains(0, 20)]);
    let (by_hand, jobs) = DiskWorkers::by_hand();
    pair.b.volume.workers = by_hand;
    pair.join_kept();
    let began = Instant::now();
    let flush = loop {
        pair.turn();
        if let Some(job) = jobs.try_iter().find(|job| matches!(job.kind, JobKind::Flush)) {
            break job;
        }
        assert!(began.elapsed() < PATIENCE, "the target is never asked for a flush");
    };
    for _ in 0..200 {
        pair.turn();
    }
    assert!(
        pair.a.volume.record.dirty().dirty_bytes() == 20 * G,
        "cleared before the target's flush has ended"
    );
    let mut flushes = vec![flush];
    pair.until("the end of the copy", |pair| {
        for Job { token, kind } in flushes.drain(..) {
            pair.b.volume.job_done(JobDone { volume: 0, token, kind, result: Ok(()) });
        }
        flushes.extend(jobs.try_iter());
        pair.a.saw(|event| matches!(event, Event::ResyncDone { .. }))
    });
    assert!(!pair.a.volume.record.is_dirty());
    let sent = pair.a.volume.counters.resync_bytes_posted.load(Ordering::Relaxed);
    assert!(sent <= G, "{sent} bytes for a flush to stand behind");
}

#[test]
fn the_flush_that_ends_a_quiesce_waits_for_a_parted_peer_no_longer_than_clients_do() {
    let mut pair = Pair::in_sync(AckLevel::Memory);
    pair.a.write(1, grains(1, 1), 7);
    pair.until_told(1);
    pair.cut();
    let asks = |event: &Event| matches!(event, Event::AskAlone { .. });
    let quiesced = |event: &Event| matches!(event, Event::Quiesced { .. });
    pair.a.volume.session.end_patience();
    for _ in 0..10 {
        pair.a.turn();
    }
    assert!(!pair.a.saw(asks), "nobody waits: what is acknowledged is in the peer's memory");
    pair.a.volume.quiesce();
    pair.until("it asks", |pair| pair.a.saw(asks));
    assert!(!pair.a.saw(quiesced), "the peer may not have it durable");
    pair.a.volume.go_alone();
    pair.until("the end of the quiesce", |pair| pair.a.saw(quiesced));
    assert!(pair.a.volume.record.is_dirty(), "what the peer may lack is on record");
}

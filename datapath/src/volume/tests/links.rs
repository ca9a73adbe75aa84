//! Volumes over each transport while frames are lost, doubled, damaged, late or cut off: what was acknowledged is there,
//! the standby holds a prefix, the fault is named, and a copy makes both equal again.

use super::*;
use crate::transport::Link;
use crate::transport::fault::{FaultLink, Plan};
use crate::transport::rdma::fake::{self, Manner};

type Ends = (Box<dyn Link>, Box<dyn Link>);

/// The primary's end and the standby's, each with its plan.
fn over_loopback(plans: [Plan; 2]) -> Ends {
    let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
    (Box::new(FaultLink::new(here, plans[0])), Box::new(FaultLink::new(there, plans[1])))
}

fn over_rdma(plans: [Plan; 2]) -> Ends {
    let manner = Manner { seed: Some(9), ..Manner::default() };
    let (here, there) = fake::pair(RING_LEN, manner).expect("memory");
    (Box::new(FaultLink::new(here, plans[0])), Box::new(FaultLink::new(there, plans[1])))
}

fn over_bare_rdma(_: [Plan; 2]) -> Ends {
    let (here, there) = fake::pair(RING_LEN, Manner { seed: Some(13), ..Manner::default() }).expect("memory");
    (Box::new(here), Box::new(there))
}

const WRITES: u32 = 12;

/// A grain of its own for each write.
fn place(slot: u32) -> ByteRange {
    ByteRange::new(u64::from(slot) * crate::limits::DIRTY_GRAIN_LEN, 4096)
}

fn byte(slot: u32) -> u8 {
    u8::try_from(slot + 1).expect("few")
}

/// Which writes the node's disk holds, whole.
fn holds(node: &Node) -> Vec<bool> {
    (0..WRITES)
        .map(|slot| {
            let mut bytes = [0; 4096];
            node.volume.disk.span(place(slot)).read_into(&mut bytes);
            assert!(bytes.iter().all(|b| *b == bytes[0]), "half a write");
            assert!([0, byte(slot)].contains(&bytes[0]), "a write of nobody's");
            bytes[0] != 0
        })
        .collect()
}

/// Plays all writes at once over the link, until they are answered or the link is down. Returns the violations that the
/// standby counted, and whether the link lasted.
fn play(make: fn([Plan; 2]) -> Ends, plans: [Plan; 2]) -> (u64, bool) {
    let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
    let (here, there) = make(plans);
    let now = Instant::now();
    pair.a.volume.attach(here, Direction::Source { resync: false }, pair.epoch, now);
    pair.b.volume.attach(there, Direction::Target, pair.epoch, now);
    for slot in 0..WRITES {
        pair.a.write(slot, place(slot), byte(slot));
        pair.a.turn();
    }
    let down = |event: &Event| matches!(event, Event::LinkDown { .. });
    let mut lasted = true;
    pair.until("an answer to all, or the end of the link", |pair| {
        lasted &= !pair.a.saw(down);
        !lasted || (0..WRITES).all(|slot| !pair.a.told(slot).is_empty())
    });
    let there = holds(&pair.b);
    assert!(there.is_sorted_by(|first, then| first >= then), "no prefix: {there:?}");
    for slot in 0..WRITES {
        let acknowledged = pair.a.told(slot).contains(&Ok(()));
        assert!(!acknowledged || there[slot as usize], "write {slot} was acknowledged and is not there");
    }
    let violations = pair.b.volume.counters.violations.load(Ordering::Relaxed);
    if lasted {
        pair.until_quiet();
    } else {
        pair.until("the end there", |pair| !pair.b.volume.has_link());
        pair.a.volume.go_alone();
        pair.until_quiet();
        pair.connect(true);
        pair.until("the copy's end", |pair| pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
        pair.a.volume.peer_in_sync();
        pair.until_quiet();
    }
    assert_eq!(holds(&pair.b), [true; WRITES as usize]);
    pair.assert_equal_and_clean();
    (violations, lasted)
}

#[test]
fn writes_go_through_over_rdma() {
    assert_eq!(play(over_bare_rdma, [Plan::default(); 2]), (0, true));
}

#[test]
fn delays_hurt_nothing() {
    for make in [over_loopback, over_rdma] {
        for seed in 0..4 {
            let plan = Plan { delay: Some(seed), poll_every: Some(3), ..Plan::default() };
            assert_eq!(play(make, [plan; 2]), (0, true));
        }
    }
}

#[test]
fn a_frame_lost_doubled_or_damaged_is_named_and_costs_only_the_link() {
    for make in [over_loopback, over_rdma] {
        for number in 1..u64::from(WRITES) {
            let lose = Plan { lose_frame: Some(number), ..Plan::default() };
            let double = Plan { double_frame: Some(number), ..Plan::default() };
            let damage = Plan { damage_write: Some(number), ..Plan::default() };
            for plans in [[lose, Plan::default()], [double, Plan::default()], [Plan::default(), damage]] {
                assert_eq!(play(make, plans), (1, false), "{plans:?}");
            }
        }
    }
}

#[test]
fn a_link_cut_anywhere_loses_nothing_acknowledged() {
    for make in [over_loopback, over_rdma] {
        for number in 1..=u64::from(WRITES) {
            for delay in [None, Some(number)] {
                let arrivals = Plan { cut_after_arrivals: Some(number), delay, ..Plan::default() };
                let frames = Plan { cut_after_frames: Some(number), delay, ..Plan::default() };
                assert_eq!(play(make, [Plan::default(), arrivals]), (0, false));
                assert_eq!(play(make, [frames, Plan::default()]), (0, false));
            }
        }
    }
}

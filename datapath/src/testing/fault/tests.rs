//! Every transport keeps the laws while it is held up, and a fault is exactly the one that was planned.

use super::*;
use crate::limits::RING_LEN_MIN;
use crate::testing::conformance::{End, Ends, Source, plain, until};
use crate::testing::fake_rdma::{self, Manner};
use crate::transport::loopback;
use crate::transport::tcp::TcpLink;
use crate::wire::Kind;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

/// A plan for both ends of each transport.
fn over_loopback(ring_len: usize, plan: Plan) -> Ends {
    let (here, there) = loopback::pair(ring_len).expect("ring memory");
    (Box::new(FaultLink::new(here, plan)), Box::new(FaultLink::new(there, plan)))
}

fn over_tcp(ring_len: usize, plan: Plan) -> Ends {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let here = TcpStream::connect(listener.local_addr().unwrap()).expect("connect");
    let (there, _) = listener.accept().expect("accept");
    let [here, there] = [here, there].map(|stream| TcpLink::new(stream, ring_len, ring_len).expect("link"));
    (Box::new(FaultLink::new(here, plan)), Box::new(FaultLink::new(there, plan)))
}

fn over_rdma(ring_len: usize, plan: Plan) -> Ends {
    let manner = Manner { seed: Some(11), ..Manner::default() };
    let (here, there) = fake_rdma::pair(ring_len, manner).expect("memory");
    (Box::new(FaultLink::new(here, plan)), Box::new(FaultLink::new(there, plan)))
}

const TRANSPORTS: [fn(usize, Plan) -> Ends; 3] = [over_loopback, over_tcp, over_rdma];

/// Makes a link whose ends keep to the plan.
type Make<'a> = &'a dyn Fn(usize, Plan) -> Ends;

mod without_a_plan {
    crate::link_conformance!(|ring_len| super::over_loopback(ring_len, super::Plan::default()));
}

mod in_heaps {
    crate::link_conformance! {
        |ring_len| super::over_loopback(ring_len, super::Plan { poll_every: Some(3), ..Default::default() }) =>
            frames_and_messages_keep_one_order,
            claim_waits_for_release,
            closing_here_fails_each_token_once,
            nothing_is_delivered_after_closing_here,
    }
}

mod late_over_loopback {
    crate::link_conformance!(|ring_len| {
        super::over_loopback(ring_len, super::Plan { delay: Some(1), ..Default::default() })
    });
}

mod late_over_tcp {
    crate::link_conformance!(|ring_len| super::over_tcp(
        ring_len,
        super::Plan { delay: Some(2), ..Default::default() }
    ));
}

mod late_over_rdma {
    crate::link_conformance!(|ring_len| super::over_rdma(
        ring_len,
        super::Plan { delay: Some(3), ..Default::default() }
    ));
}

/// Sends each kind of frame under the plan, and returns what arrives of them.
fn heard_under(make: Make<'_>, plan: Plan) -> Vec<(Kind, u64)> {
    let source = Source::new(4096);
    let (here, there) = make(RING_LEN_MIN, plan);
    let (mut here, mut there) = (End::new(here), End::new(there));
    for seq in 1..=8 {
        let taken = match seq % 4 {
            0 => here.link().send(plain(Kind::Control, seq)).is_ok(),
            1 => here.post_plain(seq),
            2 => here.link().send(plain(Kind::Flush, seq)).is_ok(),
            _ => {
                let (header, span) = source.write(seq, 100, 3000);
                here.post(header, Some(span))
            }
        };
        assert!(taken, "room for a few");
        if seq % 3 == 0 {
            here.turn(&source);
            there.turn(&source);
        }
    }
    // The last one is out of the plan's reach.
    assert!(here.post_plain(9));
    until("the last one", || {
        here.turn(&source);
        there.turn(&source);
        there.heard.last() == Some(&(Kind::Trim, 9)) && here.sent.len() == 5
    });
    here.assert_each_token_once();
    assert!(here.down.is_none() && there.down.is_none());
    there.heard
}

#[test]
fn a_lost_or_doubled_frame_is_the_planned_one_and_changes_nothing_else() {
    for make in TRANSPORTS {
        loses_and_doubles_as_planned(&make);
    }
}

pub(crate) fn loses_and_doubles_as_planned(make: Make<'_>) {
    let all = heard_under(make, Plan::default());
    assert!(all.iter().map(|heard| heard.1).eq(1..=9));
    for delay in [None, Some(5)] {
        for number in 1..=8_u64 {
            let place = usize::try_from(number).unwrap() - 1;
            let lost = heard_under(make, Plan { lose_frame: Some(number), delay, ..Plan::default() });
            let mut expected = all.clone();
            expected.remove(place);
            assert_eq!(lost, expected);
            let doubled = heard_under(make, Plan { double_frame: Some(number), delay, ..Plan::default() });
            let mut expected = all.clone();
            expected.insert(place, all[place]);
            assert_eq!(doubled, expected);
        }
    }
}

/// Whatever is lost before the end, each token is told once and in order.
#[test]
fn a_frame_lost_on_a_link_that_ends_is_reported_with_its_neighbours() {
    let source = Source::new(64);
    for make in TRANSPORTS {
        for number in 1..=8 {
            let (here, mut there) = make(RING_LEN_MIN, Plan { lose_frame: Some(number), ..Plan::default() });
            let mut here = End::new(here);
            (0..8).for_each(|seq| assert!(here.post_plain(seq)));
            there.close(DownReason::Local("a test"));
            until("down", || {
                here.turn(&source);
                here.down.is_some()
            });
            here.assert_each_token_once();
        }
    }
}

fn ends(plan: Plan) -> (End, End) {
    let (here, there) = loopback::pair(RING_LEN_MIN).expect("ring memory");
    (End::new(Box::new(here)), End::new(Box::new(FaultLink::new(there, plan))))
}

fn until_down(source: &Source, end: &mut End) -> String {
    until("down", || {
        end.turn(source);
        end.down.is_some()
    });
    format!("{:?}", end.down)
}

#[test]
fn a_cut_after_arrivals_lets_exactly_those_through() {
    let source = Source::new(64);
    let (mut here, mut there) = ends(Plan { cut_after_arrivals: Some(3), ..Plan::default() });
    (1..=8).for_each(|seq| assert!(here.post_plain(seq)));
    here.turn(&source);
    assert_eq!(until_down(&source, &mut there), "Some(Closed)");
    assert_eq!(there.heard, [(Kind::Trim, 1), (Kind::Trim, 2), (Kind::Trim, 3)]);
    assert_eq!(until_down(&source, &mut here), "Some(Closed)");
    here.assert_each_token_once();
}

#[test]
fn a_cut_after_frames_fails_what_was_not_kicked() {
    let source = Source::new(64);
    let (mut here, mut there) = ends(Plan { cut_after_frames: Some(2), ..Plan::default() });
    assert!(there.post_plain(1));
    there.turn(&source);
    assert!(there.post_plain(2));
    assert_eq!(until_down(&source, &mut there), "Some(Closed)");
    assert_eq!((there.sent.as_slice(), there.failed.as_slice()), ([0].as_slice(), [1].as_slice()));
    assert_eq!(until_down(&source, &mut here), "Some(Closed)");
    assert_eq!(here.heard, [(Kind::Trim, 1)]);
}

#[test]
fn damage_is_for_the_checksum_to_find() {
    for make in TRANSPORTS {
        damages_as_planned(&make);
    }
}

pub(crate) fn damages_as_planned(make: Make<'_>) {
    let source = Source::new(4096);
    let (mut here, mut there) = make(RING_LEN_MIN, Plan { damage_write: Some(2), ..Plan::default() });
    for seq in 1..=3 {
        let (header, span) = source.write(seq, 0, 4096);
        let permit = here.claim(4096).expect("room");
        here.post(permit, header, Some(span), Token(seq));
    }
    assert!(here.send(plain(Kind::Flush, 3)).is_ok());
    here.kick();
    let mut events = Vec::new();
    until("all of it", || {
        here.poll(&mut Vec::new());
        there.poll(&mut events);
        matches!(events.last(), Some(LinkEvent::Message(_)))
    });
    let whole: Vec<bool> = events
        .iter()
        .filter_map(|event| match event {
            LinkEvent::Arrived(slot) => Some(slot.payload.crc32c() == slot.header.payload_crc),
            _ => None,
        })
        .collect();
    assert_eq!(whole, [true, false, true]);
}

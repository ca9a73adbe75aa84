//! The conformance suite over endpoints in memory, and what peers and devices can do to a link.

use super::endpoint::{Completion, Endpoint, EndpointError, MESSAGE_LEN, Piece, Registrar};
use super::{DownReason, Joined, RdmaLink};
use crate::error::Violation;
use crate::limits::{LINK_EVENTS_MAX, RING_LEN_MIN, RING_SLACK};
use crate::testing::conformance::{Dice, End, Source, plain, until};
use crate::testing::fake_rdma::{self, FakeEndpoint, FakeRegion, Manner};
use crate::transport::{Link, LinkEvent};
use crate::units::{ByteRange, Token};
use crate::wire::{HEADER_LEN, Header, Kind, WireError};
use costandby_ffi::mapping::{Mapping, Span};
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;

mod at_once {
    use super::{Manner, fake_rdma};
    crate::link_conformance!(|ring_len| {
        let (here, there) = fake_rdma::pair(ring_len, Manner::default()).expect("memory");
        (Box::new(here), Box::new(there))
    });
}

mod late_and_in_heaps {
    use super::{Manner, fake_rdma};
    crate::link_conformance!(|ring_len| {
        let (here, there) =
            fake_rdma::pair(ring_len, Manner { seed: Some(7), ..Manner::default() }).expect("memory");
        (Box::new(here), Box::new(there))
    });
}

/// The narrowest device: frames go in many requests, and everything runs out all the time.
mod narrow {
    use super::{Manner, fake_rdma};
    crate::link_conformance! {
        |ring_len| {
            let manner = Manner { seed: Some(3), send_len: 5, write_len_max: 1024, receives: 16, ..Manner::default() };
            let (here, there) = fake_rdma::pair(ring_len, manner).expect("memory");
            (Box::new(here), Box::new(there))
        } =>
            frames_and_messages_keep_one_order,
            an_ack_that_waits_gives_way_to_the_next,
            each_frame_wakes_who_sleeps,
            closing_here_fails_each_token_once,
            an_end_that_is_dropped_is_closed,
    }
}

/// Nothing of the disk may be registered: all goes through the bounce buffer.
mod bounced {
    use super::{Manner, fake_rdma};
    crate::link_conformance!(|ring_len| {
        let manner = Manner { seed: Some(5), registered_bytes_max: 0, ..Manner::default() };
        let (here, there) = fake_rdma::pair(ring_len, manner).expect("memory");
        (Box::new(here), Box::new(there))
    });
}

/// A link, and the bare endpoint of a peer that may do as it likes.
struct Hostile {
    end: End,
    peer: FakeEndpoint,
    /// Memory the peer sends from.
    memory: Span,
    region: FakeRegion,
    /// The link's own ring.
    ring: Arc<Mapping>,
    id: u64,
}

impl Hostile {
    fn new() -> Self {
        Self::with(Manner::default(), None)
    }

    fn with(manner: Manner, companion: Option<TcpStream>) -> Self {
        let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
        let [endpoint, peer] = fake_rdma::endpoints([&rings[0], &rings[1]], manner).expect("descriptors");
        let memory = Mapping::anonymous(RING_LEN_MIN).expect("memory").span(0, RING_LEN_MIN);
        let region = peer.registrar().register(&memory).expect("no limit");
        let [ring, _] = rings;
        let joined = Joined {
            ring: Arc::clone(&ring),
            receives: manner.receives,
            peer_ring_len: RING_LEN_MIN,
            peer_receives: manner.receives,
            companion,
            registered_bytes_max: 1 << 30,
        };
        let link = RdmaLink::new(endpoint, joined).expect("link");
        Self { end: End::new(Box::new(link)), peer, memory, region, ring, id: 0 }
    }

    fn id(&mut self) -> u64 {
        self.id += 1;
        self.id
    }

    /// Writes bytes somewhere in the link's ring and says so.
    fn place(&mut self, bytes: &[u8], at: u64, immediate: u32) {
        self.memory.sub(0, bytes.len()).write_from(bytes);
        let id = self.id();
        let piece = Piece { region: &self.region, offset: 0, len: bytes.len() };
        self.peer.write(&[piece], at, Some(immediate), id, true);
        self.peer.ring_doorbell().expect("as ever");
    }

    fn place_header(&mut self, header: &Header, place: u64) {
        self.place(&header.encode(), place, u32::try_from(place / 64).expect("small"));
    }

    fn send(&mut self, header: &Header) {
        let id = self.id();
        self.peer.send(&header.encode(), id, true);
        self.peer.ring_doorbell().expect("as ever");
    }

    /// How the link ends.
    fn end(&mut self) -> DownReason {
        let source = Source::new(64);
        until("down", || {
            self.end.turn(&source);
            self.end.down.is_some()
        });
        self.end.assert_each_token_once();
        self.end.down.take().expect("just seen")
    }

    fn turn(&mut self) {
        self.end.turn(&Source::new(64));
        // Only makes room for more.
        let _ = self.peer.poll(&mut [Completion::Done { id: 0 }; 32]);
    }

    #[track_caller]
    fn ends_by(&mut self, expected: Violation) {
        let reason = self.end();
        assert!(matches!(&reason, DownReason::Protocol(found) if *found == expected), "{reason}");
    }
}

#[test]
fn numbers_that_name_no_place_or_another_are_refused() {
    let ring_grains = u32::try_from(RING_LEN_MIN / 64).unwrap();
    for immediate in [1, 2, ring_grains, 2 * ring_grains, u32::MAX] {
        let mut hostile = Hostile::new();
        hostile.place(&plain(Kind::Trim, 1).encode(), 0, immediate);
        hostile.ends_by(Violation::Place { found: u64::from(immediate) * 64, expected: 0 });
        assert!(hostile.end.heard.is_empty());
    }
}

#[test]
fn a_change_past_its_place_ends_the_link_after_what_came_before() {
    let mut hostile = Hostile::new();
    hostile.place_header(&plain(Kind::Trim, 1), 0);
    hostile.place_header(&plain(Kind::Trim, 2), 128);
    hostile.place_header(&plain(Kind::Trim, 3), 64);
    hostile.ends_by(Violation::Place { found: 128, expected: 64 });
    assert_eq!(hostile.end.heard, [(Kind::Trim, 1)]);
}

#[test]
fn a_change_told_twice_is_refused_while_held_and_until_the_release_was_told() {
    for release in [false, true] {
        let mut hostile = Hostile::new();
        hostile.place_header(&plain(Kind::Trim, 1), 0);
        hostile.turn();
        if release {
            hostile.end.release(&Source::new(64));
        }
        hostile.place_header(&plain(Kind::Trim, 1), 0);
        hostile.ends_by(Violation::Place { found: 0, expected: 64 });
        assert_eq!(hostile.end.heard, [(Kind::Trim, 1)]);
    }
}

#[test]
fn what_is_no_header_is_named() {
    let mut damaged = plain(Kind::Trim, 1).encode();
    damaged[20] ^= 1;
    let mut hostile = Hostile::new();
    hostile.place(&damaged, 0, 0);
    let reason = hostile.end();
    assert!(matches!(reason, DownReason::Frame(WireError::HeaderChecksum { .. })), "{reason}");
    let mut hostile = Hostile::new();
    hostile.place(&[b'G'; 200], 0, 0);
    let reason = hostile.end();
    assert!(matches!(reason, DownReason::Frame(WireError::Magic { .. })), "{reason}");
    let mut hostile = Hostile::new();
    let id = hostile.id();
    hostile.peer.send(&damaged, id, true);
    hostile.peer.ring_doorbell().expect("as ever");
    let reason = hostile.end();
    assert!(matches!(reason, DownReason::Frame(WireError::HeaderChecksum { .. })), "{reason}");
}

#[test]
fn an_immediate_without_a_write_finds_no_header() {
    let mut hostile = Hostile::new();
    let id = hostile.id();
    hostile.peer.write(&[], 0, Some(0), id, true);
    hostile.peer.ring_doorbell().expect("as ever");
    let reason = hostile.end();
    assert!(matches!(reason, DownReason::Frame(WireError::Magic { found: [0, 0] })), "{reason}");
}

#[test]
fn a_change_larger_than_the_ring_is_refused_by_its_header() {
    let len = RING_LEN_MIN - RING_SLACK;
    let mut hostile = Hostile::new();
    let header = Header { range: ByteRange::new(0, len as u64), ..plain(Kind::Write, 1) };
    hostile.place_header(&header, 0);
    hostile.ends_by(Violation::RingOverrun { frame_len: len + HEADER_LEN });
}

#[test]
fn changes_without_permits_are_refused() {
    let room = (RING_LEN_MIN - RING_SLACK) / HEADER_LEN;
    let mut hostile = Hostile::new();
    for seq in 0..=room as u64 {
        hostile.place_header(&plain(Kind::Trim, seq), seq * 64);
        hostile.turn();
        if hostile.end.down.is_some() {
            break;
        }
    }
    hostile.ends_by(Violation::RingOverrun { frame_len: HEADER_LEN });
    assert_eq!(hostile.end.heard.len(), room, "those with permits arrive");
}

#[test]
fn messages_of_a_wrong_length_and_mixed_up_carriers_are_named() {
    let mut hostile = Hostile::new();
    let id = hostile.id();
    hostile.peer.send_some(&[0; MESSAGE_LEN], 20, id);
    hostile.peer.ring_doorbell().expect("as ever");
    hostile.ends_by(Violation::MessageLength { found: 20 });

    let mut hostile = Hostile::new();
    hostile.send(&plain(Kind::Trim, 1));
    hostile.ends_by(Violation::Carrier { kind: Kind::Trim, how: "as a message" });

    let mut hostile = Hostile::new();
    hostile.place_header(&plain(Kind::Ack, 1), 0);
    hostile.ends_by(Violation::Carrier { kind: Kind::Ack, how: "placed in the ring" });
}

#[test]
fn what_was_never_used_cannot_be_returned() {
    let mut hostile = Hostile::new();
    hostile.send(&Header { ring_returned: 64, ..plain(Kind::KeepAlive, 0) });
    hostile.ends_by(Violation::RingReturned { found: 64, sent: 0, before: 0 });

    let mut hostile = Hostile::new();
    assert!(hostile.end.post_plain(1));
    hostile.turn();
    hostile.send(&Header { receives: 2, ..plain(Kind::KeepAlive, 0) });
    hostile.ends_by(Violation::ReceivesReturned { found: 2, used: 1, before: 0 });

    let mut hostile = Hostile::new();
    assert!(hostile.end.post_plain(1));
    hostile.turn();
    for receives in [1, 0] {
        hostile.send(&Header { receives, ..plain(Kind::KeepAlive, 0) });
    }
    hostile.ends_by(Violation::ReceivesReturned { found: 0, used: 1, before: 1 });
}

#[test]
fn a_peer_that_sends_more_than_there_are_receives_ends_only_itself() {
    let mut hostile = Hostile::with(Manner { receives: 16, ..Manner::default() }, None);
    for seq in 0..17 {
        hostile.send(&plain(Kind::Flush, seq));
    }
    let mut completions = [Completion::Done { id: 0 }; 32];
    while let Ok(1..) = hostile.peer.poll(&mut completions) {}
    let failed = hostile.peer.poll(&mut completions).expect_err("its queue pair is broken");
    assert!(matches!(failed, EndpointError::WorkRequest { code: 13, .. }), "{failed}");
    hostile.turn();
    assert_eq!(hostile.end.heard.len(), 16);
    assert!(hostile.end.down.is_none());
    hostile.peer.cut();
    assert!(matches!(hostile.end(), DownReason::Closed));
}

#[test]
fn a_write_outside_of_the_ring_is_refused_by_the_device() {
    for at in [2 * RING_LEN_MIN as u64 - 32, u64::MAX - 10] {
        let mut hostile = Hostile::new();
        hostile.place(&[7; 64], at, 0);
        let reason = hostile.end();
        assert!(matches!(reason, DownReason::Rdma(EndpointError::WorkRequest { .. })), "{reason}");
        assert!(hostile.ring.span(0, RING_LEN_MIN).is_zero());
    }
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let here = TcpStream::connect(listener.local_addr().unwrap()).expect("connect");
    let (there, _) = listener.accept().expect("accept");
    (here, there)
}

#[test]
fn the_companions_end_is_the_peers_after_all_that_arrived() {
    let (companion, theirs) = sockets();
    let mut hostile = Hostile::with(Manner::default(), Some(companion));
    hostile.turn();
    hostile.send(&plain(Kind::Flush, 1));
    drop(theirs);
    assert!(matches!(hostile.end(), DownReason::Closed));
    assert_eq!(hostile.end.heard, [(Kind::Flush, 1)]);
}

#[test]
fn nobody_falls_asleep_over_an_end_that_came_while_awake() {
    let (companion, theirs) = sockets();
    let mut hostile = Hostile::with(Manner::default(), Some(companion));
    hostile.turn();
    assert!(hostile.end.link().prepare_sleep(), "nothing is there");
    hostile.turn();
    drop(theirs);
    until("the end is noticed", || !hostile.end.link().prepare_sleep());
    assert!(matches!(hostile.end(), DownReason::Closed));
}

#[test]
fn nothing_may_be_said_on_the_companion() {
    let (companion, mut theirs) = sockets();
    let mut hostile = Hostile::with(Manner::default(), Some(companion));
    hostile.turn();
    theirs.write_all(b"?").unwrap();
    hostile.ends_by(Violation::Companion);
}

#[test]
fn a_closed_link_lets_go_of_its_companion() {
    let (companion, theirs) = sockets();
    let mut hostile = Hostile::with(Manner::default(), Some(companion));
    hostile.end.link().close(DownReason::Local("a test"));
    let mut byte = [0];
    let read = std::io::Read::read(&mut &theirs, &mut byte);
    assert_eq!(read.expect("its end"), 0);
}

#[test]
fn a_devices_event_ends_the_link() {
    let mut hostile = Hostile::new();
    let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
    let [mut endpoint, _peer] = fake_rdma::endpoints([&rings[0], &rings[1]], Manner::default()).expect("fds");
    endpoint.device_event("port down");
    let [ring, _] = rings;
    hostile.end = End::new(Box::new(fake_rdma::link(endpoint, ring, RING_LEN_MIN).expect("link")));
    let reason = hostile.end();
    assert!(matches!(reason, DownReason::Rdma(EndpointError::Device("port down"))), "{reason}");
}

/// Whichever request fails: what was done before is sent, the rest failed, and the peer heard a prefix.
#[test]
fn a_request_that_fails_ends_the_link_once() {
    let source = Source::new(4096);
    for number in 1..=20 {
        let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
        let manner = Manner { seed: Some(number), write_len_max: 1000, ..Manner::default() };
        let [mut first, second] = fake_rdma::endpoints([&rings[0], &rings[1]], manner).expect("descriptors");
        first.fail_at(number);
        let [here, there] = rings;
        let mut here = End::new(Box::new(fake_rdma::link(first, here, RING_LEN_MIN).expect("link")));
        let mut there = End::new(Box::new(fake_rdma::link(second, there, RING_LEN_MIN).expect("link")));
        for seq in 0..10 {
            let (header, span) = source.write(seq, 0, 1 + usize::try_from(seq).unwrap() * 400);
            assert!(here.post(header, Some(span)));
        }
        until("down", || {
            here.turn(&source);
            there.turn(&source);
            here.down.is_some() && there.down.is_some()
        });
        let reason = here.down.take().expect("just seen");
        assert!(matches!(reason, DownReason::Rdma(EndpointError::WorkRequest { code: 12, .. })), "{reason}");
        assert!(matches!(there.down, Some(DownReason::Closed)), "{:?}", there.down);
        here.assert_each_token_once();
        assert!(there.heard.len() >= here.sent.len(), "what is reported sent has arrived");
        assert!(there.heard.iter().map(|heard| heard.1).eq(0..there.heard.len() as u64), "a prefix");
    }
}

#[test]
fn once_closed_the_ring_is_out_of_reach() {
    let mut hostile = Hostile::new();
    hostile.place_header(&plain(Kind::Trim, 1), 0);
    hostile.turn();
    hostile.end.link().close(DownReason::Local("fenced"));
    hostile.place(&[7; 128], 64, 1);
    assert!(hostile.ring.span(64, RING_LEN_MIN - 64).is_zero(), "a stale primary's write arrived");
    let mut hostile = Hostile::new();
    hostile.end.drop_link();
    hostile.place(&[7; 128], 0, 0);
    assert!(hostile.ring.span(0, RING_LEN_MIN).is_zero(), "a stale primary's write arrived");
}

#[test]
fn nothing_stays_registered_when_a_link_is_gone() {
    let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
    let [first, second] =
        fake_rdma::endpoints([&rings[0], &rings[1]], Manner::default()).expect("descriptors");
    let registrar = first.registrar();
    let [here, there] = rings;
    let mut here = fake_rdma::link(first, here, RING_LEN_MIN).expect("link");
    let there = fake_rdma::link(second, there, RING_LEN_MIN).expect("link");
    let source = Source::new(4096);
    for token in 0..8 {
        let (header, span) = source.write(token, 0, 4000);
        let permit = here.claim(4000).expect("room");
        here.post(permit, header, Some(span), Token(token));
    }
    here.kick();
    assert!(registrar.registered_bytes() > 0);
    drop(here);
    until("deregistered", || registrar.registered_bytes() == 0);
    drop(there);
}

/// Where a failed send is told before changes that had arrived, these are told all the same.
#[test]
fn what_arrived_behind_a_failure_is_told() {
    let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
    let [mut first, second] =
        fake_rdma::endpoints([&rings[0], &rings[1]], Manner::default()).expect("descriptors");
    first.fail_at(1);
    first.fail_before_arrivals();
    let [here, there] = rings;
    let mut here = End::new(Box::new(fake_rdma::link(first, here, RING_LEN_MIN).expect("link")));
    let mut there = End::new(Box::new(fake_rdma::link(second, there, RING_LEN_MIN).expect("link")));
    let source = Source::new(4096);
    for seq in 0..3 {
        let (header, span) = source.write(seq, 0, 500);
        assert!(there.post(header, Some(span)));
    }
    there.link().kick();
    let (header, span) = source.write(0, 0, 500);
    assert!(here.post(header, Some(span)));
    here.link().kick();
    until("down", || {
        here.turn(&source);
        here.down.is_some()
    });
    assert!(matches!(here.down, Some(DownReason::Rdma(EndpointError::WorkRequest { code: 12, .. }))));
    assert!(here.heard.iter().map(|heard| heard.1).eq(0..3), "{:?}", here.heard);
    here.assert_each_token_once();
}

/// Every place of a small ring, with frames of every length round its end: none is written beyond it, and each arrives
/// whole. (The endpoint refuses a write that ends beyond the ring.)
#[test]
fn what_crosses_the_ring_s_end_goes_in_two_parts() {
    for seed in [None, Some(1), Some(2)] {
        let manner = Manner { seed, registered_bytes_max: 0, ..Manner::default() };
        let (here, there) = fake_rdma::pair(RING_LEN_MIN, manner).expect("memory");
        let (mut here, mut there) = (End::new(Box::new(here)), End::new(Box::new(there)));
        let source = Source::new(8192);
        let mut seq = 0;
        let mut dice = Dice::new(seed.unwrap_or(7));
        // Two dozen laps, with something left in the ring each time, so that its sender never starts over.
        for _ in 0..24 * RING_LEN_MIN / 4096 {
            let (header, span) = source.write(seq, 0, 1 + dice.below(8191));
            until("room", || {
                here.turn(&source);
                there.turn(&source);
                while there.held.len() > 1 {
                    there.release(&source);
                }
                here.post(header, Some(span.clone()))
            });
            seq += 1;
        }
        until("all is through", || {
            here.turn(&source);
            there.turn(&source);
            there.heard.len() as u64 == seq
        });
        assert!(here.down.is_none() && there.down.is_none(), "{:?} {:?}", here.down, there.down);
    }
}

#[test]
fn a_companion_may_come_later() {
    let (ours, theirs) = sockets();
    let mut hostile = Hostile::new();
    let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
    let [endpoint, _peer] = fake_rdma::endpoints([&rings[0], &rings[1]], Manner::default()).expect("fds");
    let [ring, _] = rings;
    let mut link = fake_rdma::link(endpoint, ring, RING_LEN_MIN).expect("link");
    link.accompany(ours).expect("slept on");
    assert!(link.prepare_sleep());
    drop(theirs);
    let (fd, _) = link.arm().expect("open");
    let mut ready = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
    let second = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut ready, Some(&second)).expect("polled"), 1, "its end wakes a sleeper");
    hostile.end = End::new(Box::new(link));
    let reason = hostile.end();
    assert!(matches!(reason, DownReason::Closed), "{reason}");
}

#[test]
fn a_host_is_heard_by_what_it_acknowledges() {
    let mut hostile = Hostile::new();
    hostile.turn();
    assert!(hostile.end.link().host_silence().is_none());
    assert!(hostile.end.post_plain(1));
    hostile.turn();
    hostile.turn();
    assert!(hostile.end.link().host_silence().expect("it answered").as_secs() < 1);
}

#[test]
fn a_disk_that_cannot_be_read_ends_the_link_as_the_disks_fault() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(64 << 10).unwrap();
    let disk = Mapping::map_file(&file, 0, 64 << 10).expect("mapped");
    let mut hostile = Hostile::new();
    let header = Header { range: ByteRange::new(0, 4096), ..plain(Kind::Write, 1) };
    file.set_len(0).unwrap();
    assert!(hostile.end.post(header, Some(disk.span(0, 4096))));
    assert!(matches!(hostile.end(), DownReason::Medium));
    assert!(disk.is_poisoned());
}

#[test]
fn too_small_a_ring_or_too_few_receives_make_no_link() {
    let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
    let [first, second] =
        fake_rdma::endpoints([&rings[0], &rings[1]], Manner::default()).expect("descriptors");
    let [ring, small] = rings;
    let error = fake_rdma::link(first, Arc::clone(&ring), RING_LEN_MIN - 64).expect_err("too small");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    let joined = Joined {
        ring: small,
        receives: 1024,
        peer_ring_len: RING_LEN_MIN,
        peer_receives: 3,
        companion: None,
        registered_bytes_max: 0,
    };
    let error = RdmaLink::new(second, joined).expect_err("too few");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}

/// Neither end reads until it can send nothing more; both then wait with full queues, and only what is reserved gets out.
#[test]
fn two_ends_that_used_up_each_others_receives_get_out_of_it() {
    let (here, there) =
        fake_rdma::pair(RING_LEN_MIN, Manner { receives: 16, ..Manner::default() }).expect("memory");
    let source = Source::new(64);
    let mut ends = [End::new(Box::new(here)), End::new(Box::new(there))];
    let mut issued = [0, 0];
    for (end, issued) in ends.iter_mut().zip(&mut issued) {
        while end.link().send(plain(Kind::Flush, *issued)).is_ok() {
            *issued += 1;
        }
        end.link().kick();
    }
    until("all is through", || {
        ends.iter_mut().for_each(|end| end.turn(&source));
        ends[0].heard.len() as u64 == issued[1] && ends[1].heard.len() as u64 == issued[0]
    });
}

/// A frame that waits half way, for room in the bounce buffer, began with counts that nothing newer may overtake.
#[test]
fn no_sign_of_life_overtakes_a_frame_that_has_begun() {
    const MIB: usize = 1 << 20;
    let (here, there) =
        fake_rdma::pair(32 * MIB, Manner { registered_bytes_max: 0, ..Manner::default() }).expect("memory");
    let source = Source::new(9 * MIB);
    let (mut here, mut there) = (End::new(Box::new(here)), End::new(Box::new(there)));
    for seq in 0..3 {
        let (header, span) = source.write(seq, 0, 9 * MIB);
        assert!(there.post(header, Some(span)));
    }
    until("three that fill the ring", || {
        there.turn(&source);
        here.turn(&source);
        here.held.len() == 3
    });
    let (header, span) = source.write(0, 0, 6 * MIB);
    assert!(here.post(header, Some(span)));
    for _ in 0..2 {
        here.release(&source);
        here.link().kick();
    }
    until("the frame", || {
        here.turn(&source);
        there.turn(&source);
        assert!(there.down.is_none(), "{:?}", there.down);
        !there.held.is_empty()
    });
}

#[test]
fn all_that_had_arrived_is_told_before_the_end_however_much() {
    let mut hostile = Hostile::new();
    let count = 3 * LINK_EVENTS_MAX as u64;
    for seq in 0..count {
        hostile.send(&plain(Kind::Flush, seq));
    }
    hostile.peer.cut();
    assert!(!hostile.end.link().prepare_sleep());
    assert!(matches!(hostile.end(), DownReason::Closed));
    assert_eq!(hostile.end.heard.len() as u64, count);
}

#[test]
fn a_poll_after_a_sleep_that_was_called_off_tells_what_was_taken() {
    let mut hostile = Hostile::new();
    for seq in 0..2 * LINK_EVENTS_MAX as u64 {
        hostile.send(&plain(Kind::Flush, seq));
    }
    assert!(!hostile.end.link().prepare_sleep());
    assert!(!hostile.end.link().prepare_sleep(), "and it stays so until it was polled");
    let mut events = Vec::new();
    while hostile.end.link().poll(&mut events) {}
    let seqs = events.iter().map(|event| match event {
        LinkEvent::Message(header) => header.seq.0,
        other => panic!("{other:?}"),
    });
    assert!(seqs.eq(0..2 * LINK_EVENTS_MAX as u64));
    assert!(hostile.end.link().prepare_sleep());
}

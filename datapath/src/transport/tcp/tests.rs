//! The conformance suite over real sockets, and what only a byte stream can do to us.

use super::{Gather, TcpLink};
use crate::error::Violation;
use crate::limits::{GATHER_PIECES_MAX, RING_LEN_MIN, RING_SLACK};
use crate::testing::conformance::{End, Source, plain, until};
use crate::transport::DownReason;
use crate::transport::outbox::Outbox;
use crate::units::{ByteRange, Seq, Token};
use crate::wire::{HEADER_LEN, Header, Kind, WireError};
use costandby_ffi::mapping::Mapping;
use costandby_ffi::net::Piece;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let here = TcpStream::connect(listener.local_addr().unwrap()).expect("connect");
    let (there, _) = listener.accept().expect("accept");
    (here, there)
}

crate::link_conformance!(|ring_len| {
    let (here, there) = sockets();
    let link = |stream| Box::new(TcpLink::new(stream, ring_len, ring_len).expect("link"));
    (link(here), link(there))
});

/// A link and the bare socket of a peer that may do as it likes.
fn link_and_socket() -> (End, TcpStream) {
    let (here, there) = sockets();
    let link = TcpLink::new(here, RING_LEN_MIN, RING_LEN_MIN).expect("link");
    (End::new(Box::new(link)), there)
}

/// What the link says once the peer has written `bytes`.
fn answer_to(bytes: &[u8]) -> (DownReason, End) {
    let (mut end, mut peer) = link_and_socket();
    let source = Source::new(4096);
    peer.write_all(bytes).expect("room in the socket");
    until("down", || {
        end.turn(&source);
        end.down.is_some()
    });
    (end.down.take().expect("just seen"), end)
}

/// A whole frame as it goes over the wire.
fn frame(header: &Header, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(HEADER_LEN), 0);
    bytes
}

#[test]
fn garbage_is_named() {
    let (reason, end) = answer_to(&[b'G'; 200]);
    assert!(matches!(reason, DownReason::Frame(WireError::Magic { .. })), "{reason}");
    assert!(end.heard.is_empty());
}

#[test]
fn a_damaged_header_ends_the_link_after_what_came_before_it() {
    let mut bytes = frame(&plain(Kind::Flush, 1), &[]);
    let mut damaged = frame(&plain(Kind::Flush, 2), &[]);
    damaged[20] ^= 1;
    bytes.extend_from_slice(&damaged);
    bytes.extend_from_slice(&frame(&plain(Kind::Flush, 3), &[]));
    let (reason, end) = answer_to(&bytes);
    assert!(matches!(reason, DownReason::Frame(WireError::HeaderChecksum { .. })), "{reason}");
    assert_eq!(end.heard, [(Kind::Flush, 1)]);
}

#[test]
fn a_frame_larger_than_the_ring_is_refused_by_its_header() {
    let len = RING_LEN_MIN as u64;
    let header = Header { range: ByteRange::new(0, len), ..plain(Kind::Write, 1) };
    let (reason, _) = answer_to(&header.encode());
    let frame_len = RING_LEN_MIN + HEADER_LEN;
    assert!(
        matches!(reason, DownReason::Protocol(Violation::RingOverrun { frame_len: found }) if found == frame_len),
        "{reason}"
    );
}

#[test]
fn posting_without_permits_is_refused() {
    let room = RING_LEN_MIN - RING_SLACK;
    let bytes: Vec<u8> =
        (0..=(room / HEADER_LEN) as u64).flat_map(|seq| frame(&plain(Kind::Trim, seq), &[])).collect();
    let (reason, end) = answer_to(&bytes);
    assert!(matches!(reason, DownReason::Protocol(Violation::RingOverrun { .. })), "{reason}");
    assert_eq!(end.heard.len(), room / HEADER_LEN, "those with permits arrive");
}

#[test]
fn returning_what_was_never_sent_is_refused() {
    let lie = Header { ring_returned: 64, ..plain(Kind::KeepAlive, 0) };
    let (reason, _) = answer_to(&lie.encode());
    let expected = Violation::RingReturned { found: 64, sent: 0, before: 0 };
    assert!(matches!(reason, DownReason::Protocol(found) if found == expected), "{reason}");
}

#[test]
fn taking_back_what_was_returned_is_refused() {
    let (mut end, mut peer) = link_and_socket();
    let source = Source::new(64);
    assert!(end.post_plain(1));
    let mut header = [0; HEADER_LEN];
    end.turn(&source);
    peer.read_exact(&mut header).expect("the posted frame");
    for returned in [64, 0] {
        peer.write_all(&Header { ring_returned: returned, ..plain(Kind::KeepAlive, 0) }.encode()).unwrap();
    }
    until("down", || {
        end.turn(&source);
        end.down.is_some()
    });
    let expected = Violation::RingReturned { found: 0, sent: 64, before: 64 };
    assert!(matches!(end.down, Some(DownReason::Protocol(found)) if found == expected), "{:?}", end.down);
    end.assert_each_token_once();
}

#[test]
fn half_a_frame_leaves_no_trace_wherever_it_is_cut() {
    let source = Source::new(4096);
    let (header, span) = source.write(2, 0, 1000);
    let mut payload = vec![0; 1000];
    span.read_into(&mut payload);
    let mut bytes = frame(&plain(Kind::Flush, 1), &[]);
    let first = bytes.len();
    bytes.extend_from_slice(&frame(&header, &payload));
    for cut in [0, 1, 63, 64, 65, 127, 128, 129, 1127, 1128, bytes.len() - 1, bytes.len()] {
        let (mut end, mut peer) = link_and_socket();
        peer.write_all(&bytes[..cut]).unwrap();
        drop(peer);
        until("down", || {
            end.turn(&source);
            end.down.is_some()
        });
        let whole = usize::from(cut >= first) + usize::from(cut == bytes.len());
        assert_eq!(end.heard.len(), whole, "cut after {cut} bytes");
        assert!(matches!(end.down, Some(DownReason::Closed)), "{:?}", end.down);
    }
}

#[test]
fn a_stream_that_drips_byte_by_byte_says_the_same() {
    let (mut end, mut peer) = link_and_socket();
    peer.set_nodelay(true).unwrap();
    let source = Source::new(4096);
    let (header, span) = source.write(2, 100, 300);
    let mut payload = vec![0; 300];
    span.read_into(&mut payload);
    let mut bytes = frame(&plain(Kind::Flush, 1), &[]);
    bytes.extend_from_slice(&frame(&header, &payload));
    bytes.extend_from_slice(&frame(&plain(Kind::Control, 3), &[]));
    for (count, byte) in bytes.iter().enumerate() {
        peer.write_all(&[*byte]).unwrap();
        until("the byte", || {
            end.turn(&source);
            end.link().received_bytes() > count as u64
        });
    }
    assert_eq!(end.heard, [(Kind::Flush, 1), (Kind::Write, 2), (Kind::Control, 3)]);
}

#[test]
fn a_peer_that_never_reads_gets_whole_frames_when_it_does() {
    // Larger than the socket's buffers, so that calls end inside headers, payloads and padding.
    let (here, mut peer) = sockets();
    let ring_len = 64 << 20;
    let mut end = End::new(Box::new(TcpLink::new(here, RING_LEN_MIN, ring_len).expect("link")));
    let source = Source::new(100_000);
    let mut expected = Vec::new();
    for seq in 0..400 {
        let (header, span) = source.write(seq, usize::try_from(seq).unwrap(), 40_001);
        let mut payload = vec![0; 40_001];
        span.read_into(&mut payload);
        expected.extend_from_slice(&frame(&header, &payload));
        assert!(end.post(header, Some(span)));
    }
    let mut found = vec![0; expected.len()];
    let mut at = 0;
    end.turn(&source);
    assert!(end.sent.len() < 400, "the socket's buffers are larger than this test thinks");
    assert!(end.link().arm().expect("open").1.writable);
    // An odd step, so that the socket never frees just a frame.
    for step in expected.chunks(33_333) {
        until("more bytes", || {
            end.turn(&source);
            peer.set_nonblocking(true).unwrap();
            at += peer.read(&mut found[at..(at + step.len()).min(expected.len())]).unwrap_or(0);
            at >= expected.len().min(step.as_ptr() as usize - expected.as_ptr() as usize + step.len())
        });
    }
    assert!(found == expected, "the stream is the frames, byte for byte");
    until("reported", || {
        end.turn(&source);
        end.sent.len() == 400
    });
    assert!(!end.link().arm().expect("open").1.writable);
}

#[test]
fn messages_behind_a_held_change_fill_the_ring_and_go_on_after_release() {
    let (here, there) = sockets();
    let link = |stream| End::new(Box::new(TcpLink::new(stream, RING_LEN_MIN, RING_LEN_MIN).expect("link")));
    let (mut here, mut there) = (link(here), link(there));
    let source = Source::new(64);
    assert!(here.post_plain(0));
    let mut issued = 1;
    until("the ring is full", || {
        issued += usize::from(here.link().send(plain(Kind::Control, issued as u64)).is_ok());
        here.turn(&source);
        there.turn(&source);
        !there.link().arm().expect("open").1.readable
    });
    assert_eq!(there.heard.len(), RING_LEN_MIN / HEADER_LEN);
    there.release(&source);
    assert!(there.link().arm().expect("open").1.readable);
    until("all of them", || {
        here.turn(&source);
        there.turn(&source);
        there.heard.len() == issued
    });
    assert!(there.heard.iter().map(|heard| heard.1).eq(0..issued as u64));
}

#[test]
fn a_change_behind_many_messages_gets_their_room_once_the_held_one_is_released() {
    let (mut end, mut peer) = link_and_socket();
    let source = Source::new(40_000);
    let (header, span) = source.write(2, 0, 40_000);
    let mut payload = vec![0; 40_000];
    span.read_into(&mut payload);
    let messages = (RING_LEN_MIN - 20_000) / HEADER_LEN;
    let mut bytes = frame(&plain(Kind::Trim, 1), &[]);
    (0..messages as u64).for_each(|seq| bytes.extend_from_slice(&plain(Kind::Control, seq).encode()));
    bytes.extend_from_slice(&frame(&header, &payload));
    peer.set_nonblocking(true).unwrap();
    let mut written = 0;
    until("the ring is full", || {
        written += peer.write(&bytes[written..]).unwrap_or(0);
        end.turn(&source);
        end.link().received_bytes() == RING_LEN_MIN as u64
    });
    end.release(&source);
    until("the change", || {
        written += peer.write(&bytes[written..]).unwrap_or(0);
        end.turn(&source);
        end.heard.last() == Some(&(Kind::Write, 2))
    });
    assert_eq!(end.heard.len(), messages + 2);
}

#[test]
fn what_is_left_of_a_frame_is_its_tail_wherever_it_was_broken_off() {
    let source = Source::new(4096);
    let (header, span) = source.write(1, 7, 200);
    let mut payload = vec![0; 200];
    span.read_into(&mut payload);
    let whole = frame(&header, &payload);
    for out in 0..whole.len() {
        let mut outbox = Outbox::new();
        outbox.post(header, Some(span.clone()), Token(1));
        let _ = outbox.encoded(0).count();
        outbox.advance(out, |_| panic!("not wholly out"));
        let rest = outbox.payload_rest();
        let begun_at = outbox.progress();
        let mut gather = Gather { pieces: [Piece::Bytes(&[]); GATHER_PIECES_MAX], used: 0, bytes: 0 };
        gather.frame(outbox.encoded(0).next().expect("queued"), begun_at, rest.as_ref());
        let mut found = Vec::new();
        for piece in &gather.pieces[..gather.used] {
            let mut bytes = vec![0; piece.len()];
            match piece {
                Piece::Bytes(own) => bytes.copy_from_slice(own),
                Piece::Span(span) => span.read_into(&mut bytes),
            }
            found.extend_from_slice(&bytes);
        }
        assert!(found == whole[out..], "broken off after {out} bytes");
        assert_eq!(gather.bytes, found.len());
    }
}

#[test]
fn an_ack_sent_before_the_peer_went_is_still_read() {
    let (mut end, mut peer) = link_and_socket();
    let source = Source::new(64);
    peer.write_all(&plain(Kind::Ack, 7).encode()).unwrap();
    drop(peer);
    // The first send provokes a reset, a later one fails.
    for seq in 0..100 {
        let _ = end.link().send(plain(Kind::Flush, seq));
        end.link().kick();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    until("down", || {
        end.turn(&source);
        end.down.is_some()
    });
    assert!(matches!(end.down, Some(DownReason::Closed)), "{:?}", end.down);
    assert_eq!(end.heard, [(Kind::Ack, 7)]);
}

#[test]
fn a_source_that_cannot_be_read_is_the_disks_fault() {
    let (mut end, _peer) = link_and_socket();
    let source = Source::new(64);
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    let disk = Mapping::map_file(&file, 0, 8192).unwrap();
    file.set_len(0).unwrap();
    let header = Header { range: ByteRange::new(0, 4096), seq: Seq(1), ..plain(Kind::Write, 1) };
    assert!(end.post(header, Some(disk.span(0, 4096))));
    until("down", || {
        end.turn(&source);
        end.down.is_some()
    });
    assert!(matches!(end.down, Some(DownReason::Medium)), "{:?}", end.down);
    assert!(disk.is_poisoned());
    assert_eq!(end.failed, [0]);
}

#[test]
fn a_ring_too_small_is_refused() {
    let (here, _there) = sockets();
    let error = TcpLink::new(here, RING_LEN_MIN, RING_LEN_MIN - 1).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}

//! Gather and scatter over socket pairs, and media that fail under them.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::mapping::Mapping;

const PAGE: usize = 4096;

fn counting(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).expect("small")).collect()
}

fn tcp_pair() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let near = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let far = listener.accept().expect("accept").0;
    (near.into(), far.into())
}

fn pairs() -> [(OwnedFd, OwnedFd); 2] {
    let (near, far) = UnixStream::pair().expect("socket pair");
    [(near.into(), far.into()), tcp_pair()]
}

/// The call again until it neither blocks nor 5 s have passed.
fn within<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..5000 {
        let done = call();
        if !matches!(&done, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            return done;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::other("blocked for 5 s"))
}

#[test]
fn pieces_arrive_in_order_and_spill_over() {
    for (near, far) in pairs() {
        let source = Mapping::anonymous(PAGE).expect("memory");
        source.span(0, PAGE).write_from(&counting(PAGE));
        let span = source.span(7, 1000);
        let pieces = [Piece::Bytes(b"head"), Piece::Span(&span), Piece::Bytes(b""), Piece::Bytes(b"tail")];
        assert_eq!(pieces.iter().map(Piece::len).sum::<usize>(), 1008);
        assert_eq!(send_pieces(near.as_fd(), &pieces).expect("sent"), 1008);

        let target = Mapping::anonymous(PAGE).expect("memory");
        let mut then = [0; 64];
        // TCP on loopback delivers one send of this size whole; the unix socket may stop at a piece.
        let mut got =
            within(|| recv_pieces(far.as_fd(), &target.span(0, 1000), &mut then)).expect("received");
        while got < 1008 {
            let over = got - 1000;
            got +=
                within(|| recv_pieces(far.as_fd(), &target.span(0, 0), &mut then[over..])).expect("received");
        }
        let mut read = [0; 1000];
        target.span(0, 1000).read_into(&mut read);
        assert_eq!(read[..4], *b"head");
        assert_eq!(read[4..], counting(PAGE)[7..1003]);
        assert_eq!(then[..4], counting(PAGE)[1003..1007]);
        assert_eq!(then[4..8], *b"tail");
    }
}

#[test]
fn neither_call_blocks_or_raises() {
    // SAFETY: the default action, which kills, replaces the standard library's, which ignores.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    for (near, far) in pairs() {
        let mapping = Mapping::anonymous(256 * PAGE).expect("memory");
        let span = mapping.span(0, 256 * PAGE);
        let blocked = recv_pieces(far.as_fd(), &span, &mut []).expect_err("nothing was sent");
        assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
        let full = (0..1000).find_map(|_| send_pieces(near.as_fd(), &[Piece::Span(&span)]).err());
        assert_eq!(full.expect("the buffer is full").kind(), io::ErrorKind::WouldBlock);
        drop(far);
        let broken = (0..10).find_map(|_| send_pieces(near.as_fd(), &[Piece::Span(&span)]).err());
        let kind = broken.expect("nobody reads").kind();
        assert!(matches!(kind, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{kind}");
    }
}

#[test]
fn the_end_of_the_stream_is_no_bytes() {
    for (near, far) in pairs() {
        drop(near);
        let mapping = Mapping::anonymous(PAGE).expect("memory");
        assert_eq!(within(|| recv_pieces(far.as_fd(), &mapping.span(0, 10), &mut [])).expect("the end"), 0);
    }
}

#[test]
fn a_failed_medium_is_an_error_and_loses_nothing() {
    for (near, far) in pairs() {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(2 * PAGE as u64).expect("sized");
        let mapping = Mapping::map_file(&file, 0, 2 * PAGE).expect("mapped");
        let gone = mapping.span(PAGE, PAGE);
        file.set_len(PAGE as u64).expect("truncated");

        let error = send_pieces(near.as_fd(), &[Piece::Span(&gone)]).expect_err("no page to send from");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert_eq!(send_pieces(near.as_fd(), &[Piece::Bytes(b"payload")]).expect("sent"), 7);
        let error = within(|| recv_pieces(far.as_fd(), &gone, &mut [])).expect_err("no page to receive into");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert!(!mapping.is_poisoned(), "the kernel tells the caller, not the guard");
        mapping.poison();
        assert!(mapping.is_poisoned());

        let elsewhere = Mapping::anonymous(PAGE).expect("memory");
        assert_eq!(recv_pieces(far.as_fd(), &elsewhere.span(0, PAGE), &mut []).expect("still there"), 7);
        let mut read = [0; 7];
        elsewhere.span(0, 7).read_into(&mut read);
        assert_eq!(read, *b"payload");
    }
}

#[test]
#[should_panic(expected = "129 pieces")]
fn too_many_pieces() {
    let (near, _far) = UnixStream::pair().expect("socket pair");
    let _ = send_pieces(near.as_fd(), &[Piece::Bytes(b""); PIECES_MAX + 1]);
}

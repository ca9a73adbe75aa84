//! Replies, byte by byte.

use super::*;
use crate::front::nbd::proto::{NBD_STATE_HOLE, NBD_STATE_ZERO};

const COOKIE: u64 = 0x0102_0304_0506_0708;
const COOKIE_BYTES: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn simple_replies() {
    assert_eq!(
        simple_reply(COOKIE, None)[..],
        joined(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], &COOKIE_BYTES])
    );
    assert_eq!(
        simple_reply(COOKIE, Some(NbdErrno::NoSpace))[..],
        joined(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28], &COOKIE_BYTES])
    );
}

#[test]
fn read_headers() {
    let range = ByteRange::new(0x1000, 0x200);
    let plain = read_header(COOKIE, range, false, Finality::MoreFollows);
    assert_eq!(plain.as_bytes(), simple_reply(COOKIE, None));
    let expected = |flags: u8| {
        joined(&[
            &[0x66, 0x8e, 0x33, 0xef, 0, flags, 0, 1],
            &COOKIE_BYTES,
            &[0, 0, 2, 8],
            &[0, 0, 0, 0, 0, 0, 0x10, 0],
        ])
    };
    assert_eq!(read_header(COOKIE, range, true, Finality::Done).as_bytes(), expected(1));
    assert_eq!(read_header(COOKIE, range, true, Finality::MoreFollows).as_bytes(), expected(0));
    assert_eq!(
        done_chunk(COOKIE)[..],
        joined(&[&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0], &COOKIE_BYTES, &[0; 4]])
    );
}

#[test]
fn errors_carry_their_message_where_they_can() {
    assert_eq!(
        error_reply(COOKIE, NbdErrno::Io, "disk", false).as_bytes(),
        simple_reply(COOKIE, Some(NbdErrno::Io))
    );
    assert_eq!(
        error_reply(COOKIE, NbdErrno::Io, "disk", true).as_bytes(),
        joined(&[
            &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1],
            &COOKIE_BYTES,
            &[0, 0, 0, 10, 0, 0, 0, 5, 0, 4],
            b"disk"
        ])
    );
}

#[test]
fn long_messages_are_cut_between_characters() {
    let long = format!("{}é", "x".repeat(ERROR_MESSAGE_LEN_MAX - 1));
    let reply = error_reply(COOKIE, NbdErrno::Io, &long, true);
    let message = &reply.as_bytes()[CHUNK_HEADER_LEN + 6..];
    assert_eq!(message.len(), ERROR_MESSAGE_LEN_MAX - 1);
    assert!(message.iter().all(|byte| *byte == b'x'));
}

fn extents(status: &BlockStatus) -> Vec<(u32, u32)> {
    let encoded = status.encode(COOKIE);
    let bytes = encoded.as_bytes();
    let payload_len = u32::from_be_bytes(bytes[16..20].try_into().unwrap());
    assert_eq!(payload_len as usize, bytes.len() - CHUNK_HEADER_LEN);
    assert_eq!(bytes[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5]);
    assert_eq!(bytes[20..24], BASE_ALLOCATION_ID.to_be_bytes());
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    bytes[24..].chunks_exact(8).map(|extent| (word(&extent[..4]), word(&extent[4..]))).collect()
}

#[test]
fn extents_merge_and_are_cut_to_the_request() {
    let mut status = BlockStatus::new(ByteRange::new(0, 100), false);
    assert!(status.push(10, 0));
    assert!(status.push(10, 0));
    assert!(status.push(0, 9));
    assert!(status.push(30, NBD_STATE_HOLE | NBD_STATE_ZERO));
    assert!(!status.push(u64::MAX, 0));
    assert_eq!(extents(&status), [(20, 0), (30, 3), (50, 0)]);
}

#[test]
fn one_extent_means_one() {
    let mut status = BlockStatus::new(ByteRange::new(4096, 100), true);
    assert!(status.push(10, 3));
    assert!(status.push(10, 3));
    assert!(!status.push(10, 0));
    assert!(!status.push(10, 3), "what follows a gap must not be added");
    assert_eq!(extents(&status), [(20, 3)]);
}

#[test]
fn a_reply_holds_so_many_extents() {
    let mut status = BlockStatus::new(ByteRange::new(0, u64::from(u32::MAX)), false);
    let pushed = (0..1000).take_while(|index| status.push(1, index % 2)).count();
    assert_eq!(pushed, EXTENTS_MAX);
    assert_eq!(extents(&status).len(), EXTENTS_MAX);
}

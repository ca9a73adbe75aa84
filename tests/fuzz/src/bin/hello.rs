//! Fuzzes the hello: the first bytes of whoever dials a node's port.
//!
//! What must hold: no input panics the decoder; what it accepts is the same after being encoded again; and a message cut short
//! is waited for, not misread. An input is tried as it is, and as the body of a well-formed envelope, for the search would
//! hardly ever guess a checksum.
#![no_main]

use costandby_control::hello::{ENVELOPE_LEN, MAGIC, VERSION, decode, encode};
use libfuzzer_sys::fuzz_target;

fn check(bytes: &[u8]) {
    let Ok(Some((message, used))) = decode(bytes) else { return };
    let again = encode(&message);
    let (same, len) = decode(&again).expect("our own encoding").expect("is whole");
    assert_eq!((&same, len), (&message, again.len()), "changed by being sent");
    for short in [0, ENVELOPE_LEN - 1, ENVELOPE_LEN.min(used - 1), used - 1] {
        assert!(
            matches!(decode(&bytes[..short]), Ok(None)),
            "the first {short} of {used} bytes were taken for all"
        );
    }
}

fuzz_target!(|data: &[u8]| {
    check(data);
    let Ok(len) = u32::try_from(data.len()) else { return };
    let mut envelope = Vec::with_capacity(ENVELOPE_LEN + data.len());
    envelope.extend_from_slice(&MAGIC);
    envelope.push(VERSION);
    envelope.extend_from_slice(&len.to_le_bytes());
    envelope.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
    envelope.extend_from_slice(data);
    check(&envelope);
});

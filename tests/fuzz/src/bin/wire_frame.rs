//! Fuzzes the frame header: the first thing a node reads from its peer.
//!
//! What must hold: no input panics the decoder, and a header that is accepted says exactly what its bytes say, so
//! encoding it again gives the same bytes. Random bytes almost never carry a right checksum, so a checksum of 0 in an
//! input stands for the right one: that lets the search reach the checks behind it.
#![no_main]

use costandby_datapath::wire::{HEADER_LEN, Header};
use libfuzzer_sys::fuzz_target;

const CHECKSUM_LEN: usize = 4;

fuzz_target!(|data: &[u8]| {
    let Some(mut bytes) = data.first_chunk::<HEADER_LEN>().copied() else { return };
    let (checked, checksum) = bytes.split_at_mut(HEADER_LEN - CHECKSUM_LEN);
    if checksum == [0; CHECKSUM_LEN] {
        checksum.copy_from_slice(&crc32c::crc32c(checked).to_le_bytes());
    }
    if let Ok(header) = Header::decode(&bytes) {
        assert_eq!(header.encode(), bytes, "an accepted header lost something");
        assert!(
            header.frame_len() >= HEADER_LEN + header.payload_len(),
            "the frame does not fit its own length"
        );
    }
});

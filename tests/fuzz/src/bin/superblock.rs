//! Fuzzes the superblock: what a disk says about itself when the daemon starts, damaged, foreign or from the future.
//!
//! What must hold: no input panics the decoder, and what it accepts is the same again after being stored. An input that is
//! not a whole block is filled up with zeros and given its right checksum, so that the search reaches the checks behind.
#![no_main]

use costandby_datapath::disk::metadata::header::Header;
use costandby_datapath::disk::superblock::SUPERBLOCK_LEN;
use libfuzzer_sys::fuzz_target;

const CHECKSUM_LEN: usize = 4;

fn decode(bytes: &[u8]) {
    if let Ok((header, sequence)) = Header::decode(bytes) {
        let again = Header::decode(&Header::encode(&header.superblock, &header.shape, sequence));
        assert_eq!(again.as_ref(), Ok(&(header, sequence)), "changed by being stored");
    }
}

fuzz_target!(|data: &[u8]| {
    decode(data);
    if data.len() <= SUPERBLOCK_LEN - CHECKSUM_LEN {
        let mut block = [0; SUPERBLOCK_LEN];
        block[..data.len()].copy_from_slice(data);
        let (checked, checksum) = block.split_at_mut(SUPERBLOCK_LEN - CHECKSUM_LEN);
        checksum.copy_from_slice(&crc32c::crc32c(checked).to_le_bytes());
        decode(&block);
    }
});

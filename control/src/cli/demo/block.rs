//! A block that says what it is: the demo's writer makes them, its check reads them back.
//!
//! 4096 bytes: a header (which run, which volume, which block, the how-manieth write), a filling that depends on all of
//! these, and a CRC-32C over everything before it. Halves of two blocks, or a block at another's place, do not pass.
//!
//! Invariant: [`Block::decode`] accepts exactly what [`Block::encode`] makes. Survives any bytes.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a block.
pub(super) const BLOCK_LEN: usize = 4096;

/// The same, as an offset.
pub(super) const BLOCK_LEN_U64: u64 = 4096;

const MAGIC: [u8; 8] = *b"CSBYDEMO";
const VERSION: u32 = 1;
const CHECKSUM_AT: usize = BLOCK_LEN - 4;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    volume: U32,
    nonce: U64,
    block: U64,
    number: U64,
}

const HEADER_LEN: usize = size_of::<Header>();
const _: () = assert!(HEADER_LEN == 40);

/// Whose write a block holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Block {
    /// One random number a run: an earlier run's blocks are not this one's.
    pub nonce: u64,
    /// Index of the volume.
    pub volume: u32,
    /// Place on the volume, in blocks.
    pub block: u64,
    /// Number of the write, counted from 1 over the whole volume.
    pub number: u64,
}

impl Block {
    /// Makes the block's bytes.
    pub(super) fn encode(&self, bytes: &mut [u8; BLOCK_LEN]) {
        let header = Header {
            magic: MAGIC,
            version: U32::new(VERSION),
            volume: U32::new(self.volume),
            nonce: U64::new(self.nonce),
            block: U64::new(self.block),
            number: U64::new(self.number),
        };
        bytes[..HEADER_LEN].copy_from_slice(header.as_bytes());
        let mut filling = Random(self.nonce ^ self.block.rotate_left(32) ^ self.number.rotate_left(7));
        for word in bytes[HEADER_LEN..CHECKSUM_AT].chunks_mut(8) {
            let len = word.len();
            word.copy_from_slice(&filling.draw().to_le_bytes()[..len]);
        }
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Reads a block; `None` where the bytes are not exactly one whole write.
    pub(super) fn decode(bytes: &[u8; BLOCK_LEN]) -> Option<Self> {
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        let (header, _) = Header::read_from_prefix(bytes).ok()?;
        let whole = bytes[CHECKSUM_AT..] == checksum.to_le_bytes()
            && header.magic == MAGIC
            && header.version.get() == VERSION;
        whole.then_some(Self {
            nonce: header.nonce.get(),
            volume: header.volume.get(),
            block: header.block.get(),
            number: header.number.get(),
        })
    }
}

/// Numbers without a pattern that a compressing or deduplicating disk could use; the splitmix64 sequence.
#[derive(Debug)]
pub(super) struct Random(pub u64);

impl Random {
    /// The next one.
    pub(super) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: Block = Block { nonce: 7, volume: 1, block: 300, number: 12 };

    fn bytes_of(block: Block) -> [u8; BLOCK_LEN] {
        let mut bytes = [0; BLOCK_LEN];
        block.encode(&mut bytes);
        bytes
    }

    #[test]
    fn a_block_reads_back_as_it_was_written() {
        assert_eq!(Block::decode(&bytes_of(BLOCK)), Some(BLOCK));
    }

    #[test]
    fn one_changed_bit_anywhere_is_seen() {
        let good = bytes_of(BLOCK);
        for at in 0..BLOCK_LEN {
            let mut bad = good;
            bad[at] ^= 1 << (at % 8);
            assert_eq!(Block::decode(&bad), None, "byte {at}");
        }
    }

    #[test]
    fn halves_of_two_writes_are_no_block_wherever_they_meet() {
        let (old, new) = (bytes_of(BLOCK), bytes_of(Block { number: 13, ..BLOCK }));
        for cut in (512..BLOCK_LEN).step_by(512) {
            let mut mixed = new;
            mixed[cut..].copy_from_slice(&old[cut..]);
            assert_eq!(Block::decode(&mixed), None, "cut at {cut}");
        }
    }

    #[test]
    fn zeros_are_no_block() {
        assert_eq!(Block::decode(&[0; BLOCK_LEN]), None);
    }
}

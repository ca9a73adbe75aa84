//! The digest of a byte range of the disk. Two nodes compare digests instead of bytes.
//!
//! Two unrelated functions over the same bytes: CRC-32C detects every change within 32 consecutive bits; XXH3-64
//! misses another difference once in 2^64. Both detect accidents, not attacks: somebody who may write to the volume
//! can produce two contents with equal digests, and damages only their own data.
//!
//! XXH3-64 is taken block by block with the sum so far as its seed: memory that others may write never becomes a slice,
//! so each block is copied out first, and the result depends on the bytes alone, not on how they were handed over.

use super::image::DiskImage;
use crate::units::ByteRange;
use costandby_ffi::mapping::Span;
use twox_hash::XxHash3_64;

/// Bytes that one round of the sum takes: part of the protocol, as both ends must cut alike.
const BLOCK_LEN: usize = 4096;

/// What two equal stretches have in common, and two different ones do not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Digest {
    /// XXH3-64, chained over blocks of 4096 bytes; the first one's seed is 0.
    pub hash: u64,
    /// CRC-32C of all bytes.
    pub crc: u32,
}

impl Digest {
    /// Of the bytes of `span`. A writer at the same time makes it that of some mixture.
    #[must_use]
    pub fn of_span(span: &Span) -> Self {
        let mut block = [0; BLOCK_LEN];
        let (mut hash, mut crc, mut at) = (0, 0, 0);
        while at < span.len() {
            let bytes = &mut block[..BLOCK_LEN.min(span.len() - at)];
            span.sub(at, bytes.len()).read_into(bytes);
            hash = XxHash3_64::oneshot_with_seed(hash, bytes);
            crc = crc32c::crc32c_append(crc, bytes);
            at += bytes.len();
        }
        Self { hash, crc }
    }

    /// Of `len` zeroes.
    #[must_use]
    pub fn of_zeroes(len: u64) -> Self {
        let block = [0; BLOCK_LEN];
        let (mut hash, mut crc, mut left) = (0, 0, len);
        while left > 0 {
            let taken = left.min(BLOCK_LEN as u64);
            let bytes = &block[..usize::try_from(taken).expect("a block at most")];
            hash = XxHash3_64::oneshot_with_seed(hash, bytes);
            crc = crc32c::crc32c_append(crc, bytes);
            left -= taken;
        }
        Self { hash, crc }
    }

    /// Of `range` of `disk`. A hole is not read, which could give it pages. Blocks for as long as reading takes; where
    /// that fails the disk is marked as failed and the digest is worth nothing.
    #[must_use]
    pub fn of_disk(disk: &DiskImage, range: ByteRange) -> Self {
        if disk.is_hole(range) {
            return Self::of_zeroes(range.len);
        }
        Self::of_span(&disk.span(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use costandby_ffi::mapping::Mapping;
    use proptest::prelude::*;

    fn mapped(bytes: &[u8]) -> Span {
        let mapping = Mapping::anonymous(bytes.len().next_multiple_of(4096).max(4096)).expect("memory");
        let span = mapping.span(0, bytes.len());
        span.write_from(bytes);
        span
    }

    #[test]
    fn known_answers() {
        let empty = Digest::of_zeroes(0);
        assert_eq!(empty, Digest { hash: 0, crc: 0 });
        // One block is plain XXH3-64 with seed 0; "a" is among the published vectors of the reference implementation.
        let a = Digest::of_span(&mapped(b"a"));
        assert_eq!((a.hash, a.crc), (0xe6c6_32b6_1e96_4e1f, 0xc1d0_4330));
    }

    #[test]
    fn a_hole_is_not_given_pages_by_being_looked_at() {
        let disk = DiskImage::memory("test", 1 << 20).expect("memory");
        let range = ByteRange::new(4096, 65536);
        assert!(disk.is_hole(range));
        assert_eq!(Digest::of_disk(&disk, range), Digest::of_zeroes(65536));
        assert!(disk.is_hole(range), "still");
        disk.span(ByteRange::new(69631, 1)).write_from(&[7]);
        assert!(!disk.is_hole(range) && disk.is_hole(ByteRange::new(69632, 4096)));
        assert_ne!(Digest::of_disk(&disk, range), Digest::of_zeroes(65536));
    }

    proptest! {
        #[test]
        fn equals_the_crates_over_slices_and_notices_every_flip(
            bytes in prop::collection::vec(any::<u8>(), 1..20_000),
            at in any::<prop::sample::Index>(),
            bit in 0..8_u32,
        ) {
            let digest = Digest::of_span(&mapped(&bytes));
            let hash = bytes.chunks(4096).fold(0, XxHash3_64::oneshot_with_seed);
            prop_assert_eq!(digest, Digest { hash, crc: crc32c::crc32c(&bytes) });
            let mut flipped = bytes.clone();
            flipped[at.index(bytes.len())] ^= 1 << bit;
            let other = Digest::of_span(&mapped(&flipped));
            prop_assert_ne!(other.hash, digest.hash);
            prop_assert_ne!(other.crc, digest.crc);
        }

        #[test]
        fn zeroes_need_no_memory(len in 0_usize..20_000) {
            let zeroes = Digest::of_zeroes(len as u64);
            prop_assert_eq!(zeroes, Digest::of_span(&mapped(&vec![0; len])));
        }
    }
}

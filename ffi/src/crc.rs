//! CRC-32C (Castagnoli, RFC 3720) over memory that others may write at the same time.
//!
//! Stands beside `copy`, under [`mapping`](crate::mapping). The `crc32c` crate takes `&[u8]`, which such memory must never
//! be; so the kernel here reads by raw pointers, volatile. On x86-64 the CPU's own instruction has a latency of three
//! cycles and a throughput of one, so three stretches run side by side and are joined by polynomial multiplication.
//! Elsewhere the bytes go through a small buffer to the crate.
//!
//! Joining: with `c` the remainder of one stretch, appending `n` zero bytes gives `c * x^(8n) mod P`. A carry-less
//! product of two bit-reflected 32-bit values is short of its place by one power of x, and the CRC instruction over
//! the 64-bit product multiplies by x^32 while it reduces; so the constant is `x^(8n - 33) mod P`.

use crate::copy;

/// CRC-32C of `len` bytes at `src`.
///
/// # Safety
/// `src..src + len` is mapped for reading throughout. Others may write it meanwhile: then the result is that of some
/// mixture of before and after.
pub(crate) unsafe fn crc32c(src: *const u8, len: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("sse4.2") && std::is_x86_feature_detected!("pclmulqdq") {
        // SAFETY: the CPU has both features; the memory is the caller's promise.
        return unsafe { x86::crc32c(src, len) };
    }
    // SAFETY: the caller's promise.
    unsafe { buffered(src, len) }
}

/// Through a buffer of our own, for CPUs without the instruction.
///
/// # Safety
/// As [`crc32c()`].
unsafe fn buffered(src: *const u8, len: usize) -> u32 {
    let mut buffer = [0_u8; 1024];
    let mut crc = 0;
    let mut at = 0;
    while at < len {
        let step = (len - at).min(buffer.len());
        // SAFETY: `at + step <= len`, and the buffer is ours and holds `step` bytes.
        unsafe { copy::copy(src.add(at), buffer.as_mut_ptr(), step) };
        crc = crc32c::crc32c_append(crc, &buffer[..step]);
        at += step;
    }
    crc
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{
        _mm_clmulepi64_si128, _mm_crc32_u8, _mm_crc32_u64, _mm_cvtsi64_si128, _mm_cvtsi128_si64,
    };

    /// The Castagnoli polynomial, bit-reflected.
    const POLYNOMIAL: u32 = 0x82f6_3b78;

    /// Words of a long stretch: three of them are 4080 bytes, so that a 4 KiB block is one round and two words.
    const LONG: usize = 170;
    /// Words of a short stretch: three of them are 384 bytes, so that less than 48 words go one after the other.
    const SHORT: usize = 16;

    /// `x^n mod P`, bit-reflected.
    const fn x_to_the(n: usize) -> u32 {
        let mut value = 1 << 31;
        let mut i = 0;
        while i < n {
            value = (value >> 1) ^ (POLYNOMIAL * (value & 1));
            i += 1;
        }
        value
    }

    /// # Safety
    /// As [`super::crc32c`], on a CPU with the features named.
    #[target_feature(enable = "sse4.2,pclmulqdq")]
    pub(super) unsafe fn crc32c(src: *const u8, len: usize) -> u32 {
        let mut at = src.align_offset(8).min(len);
        let mut crc = !0_u32;
        for i in 0..at {
            // SAFETY: `i < len`.
            crc = _mm_crc32_u8(crc, unsafe { src.add(i).read_volatile() });
        }
        let mut crc = u64::from(crc);
        while len - at >= 24 * LONG {
            // SAFETY: three times LONG words remain from `at`, which is aligned to 8 here and in all that follows.
            crc = unsafe { round::<LONG>(crc, src.add(at).cast()) };
            at += 24 * LONG;
        }
        while len - at >= 24 * SHORT {
            // SAFETY: the same with SHORT.
            crc = unsafe { round::<SHORT>(crc, src.add(at).cast()) };
            at += 24 * SHORT;
        }
        while len - at >= 8 {
            // SAFETY: a whole word remains.
            crc = _mm_crc32_u64(crc, unsafe { src.add(at).cast::<u64>().read_volatile() });
            at += 8;
        }
        let mut crc = low_half(crc);
        while at < len {
            // SAFETY: `at < len`.
            crc = _mm_crc32_u8(crc, unsafe { src.add(at).read_volatile() });
            at += 1;
        }
        !crc
    }

    /// Takes three stretches of `WORDS` words into `crc`.
    ///
    /// # Safety
    /// `src` is aligned and `3 * WORDS` words from it are mapped for reading.
    #[target_feature(enable = "sse4.2,pclmulqdq")]
    unsafe fn round<const WORDS: usize>(crc: u64, src: *const u64) -> u64 {
        let (mut a, mut b, mut c) = (crc, 0, 0);
        for i in 0..WORDS {
            // SAFETY: `i < WORDS`, so the furthest is word `3 * WORDS - 1`.
            unsafe {
                a = _mm_crc32_u64(a, src.add(i).read_volatile());
                b = _mm_crc32_u64(b, src.add(WORDS + i).read_volatile());
                c = _mm_crc32_u64(c, src.add(2 * WORDS + i).read_volatile());
            }
        }
        let joined = product(a, const { x_to_the(128 * WORDS - 33) })
            ^ product(b, const { x_to_the(64 * WORDS - 33) });
        _mm_crc32_u64(0, joined) ^ c
    }

    /// The carry-less product.
    #[target_feature(enable = "sse4.2,pclmulqdq")]
    fn product(crc: u64, constant: u32) -> u64 {
        let product = _mm_clmulepi64_si128::<0>(
            _mm_cvtsi64_si128(crc.cast_signed()),
            _mm_cvtsi64_si128(i64::from(constant)),
        );
        _mm_cvtsi128_si64(product).cast_unsigned()
    }

    /// The CRC instruction leaves the upper half zero.
    fn low_half(crc: u64) -> u32 {
        u32::try_from(crc).expect("the CRC instruction zeroes the upper half")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_answers() {
        // RFC 3720, B.4: 32 bytes of zeroes, of ones, and counting up; and the check value of the polynomial.
        let counting: Vec<u8> = (0..32).collect();
        let cases: [(&[u8], u32); 5] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&counting, 0x46dd_794e),
            (b"123456789", 0xe306_9283),
            (b"", 0),
        ];
        for (bytes, expected) in cases {
            // SAFETY: live slices.
            let (fast, slow) =
                unsafe { (crc32c(bytes.as_ptr(), bytes.len()), buffered(bytes.as_ptr(), bytes.len())) };
            assert_eq!(fast, expected, "{bytes:x?}");
            assert_eq!(slow, expected, "{bytes:x?}");
        }
    }

    proptest! {
        #[test]
        fn equals_the_crate(bytes in prop::collection::vec(any::<u8>(), 0..20_000), skew in 0usize..64) {
            let tail = &bytes[skew.min(bytes.len())..];
            let expected = ::crc32c::crc32c(tail);
            // SAFETY: a live slice.
            let (fast, slow) = unsafe { (crc32c(tail.as_ptr(), tail.len()), buffered(tail.as_ptr(), tail.len())) };
            prop_assert_eq!(fast, expected);
            prop_assert_eq!(slow, expected);
        }
    }
}

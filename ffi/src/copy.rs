//! Copying, clearing and looking at memory that others may write at the same time.
//!
//! Stands between [`mapping`](crate::mapping) and the CPU. `memcpy` on such memory is a data race in the language's eyes,
//! and the compiler may merge, repeat or drop its accesses. Instead the copy is an instruction the compiler cannot
//! look into (asm), and single loads are volatile: it may assume nothing about the bytes, neither before nor after.
//! What a concurrent writer leaves in the result is bytes of before or after, in any mixture; the callers' checksums
//! decide whether that is acceptable.
//!
//! A fault half way (see [`guard`](crate::guard)) is retried at the instruction that raised it, with all registers as they
//! were; `rep` instructions keep their progress in registers and go on where they stopped.

/// Copies `len` bytes from `src` to `dst`. Overlapping ranges leave unspecified bytes in `dst`, nothing worse.
///
/// # Safety
/// `src..src + len` is mapped for reading and `dst..dst + len` for writing throughout, and no Rust reference to
/// `dst`'s bytes is live other than the one `dst` was made from.
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise covers every byte touched; `x86` was asked for a length it takes.
    unsafe {
        if x86::VECTOR_LENS.contains(&len) && std::is_x86_feature_detected!("avx") {
            x86::copy_vectors(src, dst, len);
        } else {
            x86::copy_string(src, dst, len);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise is the same.
    unsafe {
        copy_words(src, dst, len);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::asm;
    use std::ops::RangeInclusive;

    const STEP: usize = 128;

    /// Lengths at which vectors beat the string instruction, whose start costs more than it saves there: 512 B in 7
    /// against 12 ns, 4 KiB in 30 against 40 ns, while 32 KiB took 363 against 306 ns (AMD Zen 5; `memcpy` 5, 43 and 298).
    pub(super) const VECTOR_LENS: RangeInclusive<usize> = STEP..=16 << 10;

    /// By `rep movsb`: `memcpy`'s speed from a few KiB up, 1 MiB at 58 against its 49 GB/s.
    ///
    /// # Safety
    /// As [`super::copy`].
    pub(super) unsafe fn copy_string(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: touches exactly the caller's ranges; the direction flag is clear on entry by the ABI. The compiler
        // takes the asm for one that may access any memory, so no access moves across it.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") len => _,
                inout("rsi") src => _,
                inout("rdi") dst => _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// By 32-byte vectors, the last step ending at the range's end and so overlapping the one before.
    ///
    /// # Safety
    /// As [`super::copy`], on a CPU with AVX; `len` is at least [`STEP`].
    pub(super) unsafe fn copy_vectors(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the loop runs while more than a step remains, then one step more ends at the last byte: nothing
        // outside of the caller's ranges. All vector registers are given up, as `vzeroupper` spoils the upper half
        // of each; without it, SSE code that follows would be slow.
        unsafe {
            asm!(
                "2:",
                "vmovdqu ymm0, [rsi]",
                "vmovdqu ymm1, [rsi + 32]",
                "vmovdqu ymm2, [rsi + 64]",
                "vmovdqu ymm3, [rsi + 96]",
                "vmovdqu [rdi], ymm0",
                "vmovdqu [rdi + 32], ymm1",
                "vmovdqu [rdi + 64], ymm2",
                "vmovdqu [rdi + 96], ymm3",
                "add rsi, {step}",
                "add rdi, {step}",
                "sub rcx, {step}",
                "cmp rcx, {step}",
                "ja 2b",
                "vmovdqu ymm0, [rsi + rcx - 128]",
                "vmovdqu ymm1, [rsi + rcx - 96]",
                "vmovdqu ymm2, [rsi + rcx - 64]",
                "vmovdqu ymm3, [rsi + rcx - 32]",
                "vmovdqu [rdi + rcx - 128], ymm0",
                "vmovdqu [rdi + rcx - 96], ymm1",
                "vmovdqu [rdi + rcx - 64], ymm2",
                "vmovdqu [rdi + rcx - 32], ymm3",
                "vzeroupper",
                step = const STEP,
                inout("rcx") len => _,
                inout("rsi") src => _,
                inout("rdi") dst => _,
                clobber_abi("C"),
                options(nostack)
            );
        }
    }
}

/// The same by volatile words, for machines without a copying instruction.
///
/// # Safety
/// As [`copy`].
#[cfg(any(not(target_arch = "x86_64"), test))]
unsafe fn copy_words(src: *const u8, dst: *mut u8, len: usize) {
    let mut at = 0;
    let head = if src.align_offset(8) == dst.align_offset(8) { src.align_offset(8).min(len) } else { len };
    // SAFETY: `at < len` in every step, so each access is inside the caller's ranges; words only where both sides
    // are aligned to 8.
    unsafe {
        while at < head {
            dst.add(at).write_volatile(src.add(at).read_volatile());
            at += 1;
        }
        while len - at >= 8 {
            let word = src.add(at).cast::<u64>().read_volatile();
            dst.add(at).cast::<u64>().write_volatile(word);
            at += 8;
        }
        while at < len {
            dst.add(at).write_volatile(src.add(at).read_volatile());
            at += 1;
        }
    }
}

/// Writes `len` zero bytes at `dst`.
///
/// # Safety
/// `dst..dst + len` is mapped for writing throughout and no Rust reference to it is live.
pub(crate) unsafe fn zero(dst: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: writes exactly the caller's range; the direction flag is clear on entry by the ABI.
    unsafe {
        core::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") dst => _,
            in("al") 0_u8,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise is the same.
    unsafe {
        zero_words(dst, len);
    }
}

/// The same by volatile words, for machines without a filling instruction.
///
/// # Safety
/// As [`zero`].
#[cfg(any(not(target_arch = "x86_64"), test))]
unsafe fn zero_words(dst: *mut u8, len: usize) {
    let mut at = 0;
    // SAFETY: every access ends at or before `len`; words are written only where aligned to 8.
    unsafe {
        while at < len {
            if len - at >= 8 && dst.add(at).addr().is_multiple_of(8) {
                dst.add(at).cast::<u64>().write_volatile(0);
                at += 8;
            } else {
                dst.add(at).write_volatile(0);
                at += 1;
            }
        }
    }
}

/// Whether `src..src + len` held only zeroes when it was looked at. Stops at the first stretch that does not.
///
/// # Safety
/// `src..src + len` is mapped for reading throughout.
pub(crate) unsafe fn is_zero(src: *const u8, len: usize) -> bool {
    const STRETCH: usize = 64;
    let mut at = src.align_offset(8).min(len);
    // SAFETY: every access ends at or before `len`; words are read only at multiples of 8, which `at` keeps after the
    // head.
    unsafe {
        if (0..at).any(|i| src.add(i).read_volatile() != 0) {
            return false;
        }
        while len - at >= STRETCH {
            let words = src.add(at).cast::<u64>();
            let mut any = 0;
            for i in 0..STRETCH / 8 {
                any |= words.add(i).read_volatile();
            }
            if any != 0 {
                return false;
            }
            at += STRETCH;
        }
        !(at..len).any(|i| src.add(i).read_volatile() != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Copy = unsafe fn(*const u8, *mut u8, usize);
    type Zero = unsafe fn(*mut u8, usize);

    proptest! {
        #[test]
        fn copies_equal_the_slice_copy(
            bytes in prop::collection::vec(any::<u8>(), 0..20_000),
            from in 0_usize..64,
            to in 0_usize..64,
        ) {
            let src = &bytes[from.min(bytes.len())..];
            for by in [copy as Copy, copy_words] {
                let mut dst = vec![0xa5_u8; to + src.len() + 200];
                // SAFETY: both ranges are inside live vectors that nobody else uses.
                unsafe { by(src.as_ptr(), dst.as_mut_ptr().add(to), src.len()) };
                prop_assert_eq!(&dst[to..to + src.len()], src);
                let beside = dst[..to].iter().chain(&dst[to + src.len()..]).all(|b| *b == 0xa5);
                prop_assert!(beside, "bytes beside the target were written");
            }
        }

        #[test]
        fn zeroes_are_written_and_found(len in 0_usize..600, skew in 0_usize..16, odd in 0_usize..600) {
            for by in [zero as Zero, zero_words] {
                let mut bytes = vec![0xa5_u8; skew + len + 9];
                // SAFETY: inside a live vector that nobody else uses.
                let found = unsafe {
                    by(bytes.as_mut_ptr().add(skew), len);
                    is_zero(bytes.as_ptr().add(skew), len)
                };
                prop_assert!(found);
                prop_assert!(bytes[skew..skew + len].iter().all(|b| *b == 0));
                prop_assert!(bytes[..skew].iter().chain(&bytes[skew + len..]).all(|b| *b == 0xa5));
                if odd < len {
                    bytes[skew + odd] = 1;
                    // SAFETY: as above.
                    let found = unsafe { is_zero(bytes.as_ptr().add(skew), len) };
                    prop_assert!(!found, "byte {} is 1", odd);
                }
            }
        }
    }

    #[test]
    fn every_length_around_a_vector_step() {
        let src: Vec<u8> = (0..1024).map(|i| u8::try_from(i % 251).expect("small")).collect();
        for len in 0..1024 {
            let mut dst = vec![0xa5_u8; 1200];
            // SAFETY: both ranges are inside live vectors that nobody else uses.
            unsafe { copy(src.as_ptr(), dst.as_mut_ptr(), len) };
            assert_eq!(dst[..len], src[..len]);
            assert!(dst[len..].iter().all(|b| *b == 0xa5), "{len}");
        }
    }
}

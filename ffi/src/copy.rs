//! Copying, clearing and looking at memory that others may write at the same time.
//!
//! Stands between [`mapping`](crate::mapping) and the CPU. `memcpy` on such memory is a data race in the language's eyes,
//! and the compiler may merge, repeat or drop its accesses. Instead the copy is an instruction the compiler cannot
//! look into, and single loads are volatile: it may assume nothing about the bytes, neither before nor after.
//! What a concurrent writer leaves in the result is bytes of before or after, in any mixture; the callers' checksums
//! decide whether that is acceptable.
//!
//! A fault half way (see [`guard`](crate::guard)) is retried at the instruction that raised it; `rep` instructions keep their
//! progress in registers and go on where they stopped.

/// Copies `len` bytes from `src` to `dst`. Overlapping ranges leave unspecified bytes in `dst`, nothing worse.
///
/// # Safety
/// `src..src + len` is mapped for reading and `dst..dst + len` for writing throughout, and no Rust reference to
/// `dst`'s bytes is live other than the one `dst` was made from.
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise covers every byte touched; the direction flag is clear on entry by the ABI. The
    // asm may read and write memory as far as the compiler knows, so no access moves across it.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") src => _,
            inout("rdi") dst => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise is the same.
    unsafe {
        copy_words(src, dst, len);
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
    // SAFETY: as in `copy`.
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
    // SAFETY: the source is a constant page, each step stays inside the caller's range.
    unsafe {
        static ZEROES: [u64; 512] = [0; 512];
        let mut at = 0;
        while at < len {
            let step = (len - at).min(4096 - dst.add(at).addr() % 8);
            let skew = dst.add(at).addr() % 8;
            copy_words(ZEROES.as_ptr().cast::<u8>().add(skew), dst.add(at), step.min(4096 - skew));
            at += step.min(4096 - skew);
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

    proptest! {
        #[test]
        fn copies_equal_the_slice_copy(bytes in prop::collection::vec(any::<u8>(), 0..600), from in 0usize..16, to in 0usize..16) {
            let len = bytes.len().saturating_sub(from);
            let src = &bytes[bytes.len() - len..];
            for by_words in [false, true] {
                let mut dst = vec![0xa5_u8; to + len + 9];
                // SAFETY: both ranges are inside live vectors that nobody else uses.
                unsafe {
                    let target = dst.as_mut_ptr().add(to);
                    if by_words { copy_words(src.as_ptr(), target, len) } else { copy(src.as_ptr(), target, len) }
                }
                prop_assert_eq!(&dst[to..to + len], src);
                prop_assert!(dst[..to].iter().chain(&dst[to + len..]).all(|b| *b == 0xa5), "nothing beside it");
            }
        }

        #[test]
        fn zeroes_are_written_and_found(len in 0usize..600, skew in 0usize..16, odd in 0usize..600) {
            let mut bytes = vec![0xa5_u8; skew + len + 9];
            // SAFETY: inside a live vector that nobody else uses.
            unsafe { zero(bytes.as_mut_ptr().add(skew), len) };
            prop_assert!(bytes[skew..skew + len].iter().all(|b| *b == 0));
            prop_assert!(bytes[..skew].iter().chain(&bytes[skew + len..]).all(|b| *b == 0xa5));
            // SAFETY: as above.
            let found = unsafe { is_zero(bytes.as_ptr().add(skew), len) };
            prop_assert!(found);
            if odd < len {
                bytes[skew + odd] = 1;
                // SAFETY: as above.
                let found = unsafe { is_zero(bytes.as_ptr().add(skew), len) };
                prop_assert!(!found, "byte {odd} is 1");
            }
        }
    }
}

//! An allocator that counts, for tests that a code path allocates nothing.
//!
//! A test program makes it its `#[global_allocator]` and asks for the count of its own thread before and after: what
//! other threads allocate meanwhile does not matter. It stands here because an allocator cannot be written without
//! `unsafe`; no program but tests has it (feature `testing`).
//!
//! Invariant: memory comes from, and goes back to, the system's allocator, unchanged.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Made at compile time and never destroyed, so that counting itself allocates nothing.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Allocations of the calling thread so far, each reallocation among them.
#[must_use]
pub fn allocations() -> u64 {
    COUNT.with(Cell::get)
}

fn count() {
    COUNT.with(|count| count.set(count.get() + 1));
}

/// The system's allocator, counted. See the file's head.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counting;

// SAFETY: every call goes to `System` with the arguments as they came, so what the caller promised `Counting` is what
// `System` asks for, and what `System` promises is what the caller gets. Counting neither allocates nor panics. Devices
// know nothing of this memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised; the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promised; the memory came from `System`.
        unsafe { System.realloc(memory, layout, len) }
    }
}

//! Turns SIGBUS on a guarded mapping into a failed disk instead of a dead daemon.
//!
//! Loads and stores on a mapping raise SIGBUS when the page behind them cannot be had: the file was truncated, the
//! disk says EIO, a sparse file meets a full file system, memory is damaged. This file stands below
//! [`mapping`](crate::mapping): each mapping takes a [`Guard`] for its address range, and a process-wide handler turns a
//! fault in a guarded range into a flag and a page of zeroes, after which the access is retried and succeeds.
//!
//! Invariants:
//! - A range is published after it was mapped and withdrawn before it is unmapped, so published ranges never overlap.
//! - The handler takes no lock, allocates nothing and leaves `errno` alone. It reads the table under a version
//!   count, so a slot in the middle of a change is passed over; the slot of the faulting access cannot be changing,
//!   since whoever accesses the memory keeps its mapping alive.
//! - The flag is set before the zeroes appear: who reads zeroes in place of data and then asks, is told.
//!
//! Failures survived: all of the above, on any thread that does not block SIGBUS (a blocked one the kernel kills).
//! A fault outside of every guarded range goes to whatever action stood before, as if we had never been here.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// Mappings guarded at a time: two a volume and two a link would allow a thousand volumes; the table is 160 KiB of
/// zeroes that cost no memory until used, and is scanned only when a mapping is made or a medium fails.
pub(crate) const GUARDED_MAX: usize = 4096;

/// Pages replaced one by one, in the whole process, after which ranges are replaced whole: by then it is not a bad sector
/// but a medium that is gone. A sixty-fourth of the kernel's usual `vm.max_map_count`, as each may cost two mappings
/// and other parts of the process need theirs.
const SCATTERED_MAX: usize = 1024;

/// Replaced pages of one range that are remembered one by one; after more all of the range counts as lost. A bad sector
/// takes a page or a few, and the list is looked through for every request while a disk is being given up.
const LOST_MAX: usize = 16;

static SCATTERED: AtomicUsize = AtomicUsize::new(0);
static TABLE: [Slot; GUARDED_MAX] = [const { Slot::free() }; GUARDED_MAX];
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// One row of the table. Only the holder of `claimed` writes the range.
struct Slot {
    claimed: AtomicBool,
    poisoned: AtomicBool,
    /// Odd while the range is being changed.
    version: AtomicUsize,
    base: AtomicUsize,
    len: AtomicUsize,
    page_len: AtomicUsize,
    /// Pages that zeroes stand in for, or more than can be remembered ([`LOST_MAX`], or all at once).
    lost_len: AtomicUsize,
    lost: [AtomicUsize; LOST_MAX],
}

/// A consistent copy of a slot's range.
#[derive(Clone, Copy)]
struct Range {
    base: usize,
    len: usize,
    page_len: usize,
}

impl Slot {
    const fn free() -> Self {
        Self {
            claimed: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            version: AtomicUsize::new(0),
            base: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page_len: AtomicUsize::new(0),
            lost_len: AtomicUsize::new(0),
            lost: [const { AtomicUsize::new(0) }; LOST_MAX],
        }
    }

    fn publish(&self, range: Range) {
        self.version.fetch_add(1, SeqCst);
        self.base.store(range.base, SeqCst);
        self.len.store(range.len, SeqCst);
        self.page_len.store(range.page_len, SeqCst);
        self.version.fetch_add(1, SeqCst);
    }

    /// Zeroes are about to stand in for `page`. A page that is noted twice does no harm.
    fn note_lost(&self, page: usize) {
        let at = self.lost_len.fetch_add(1, SeqCst);
        if let Some(lost) = self.lost.get(at) {
            lost.store(page, SeqCst);
        }
    }

    fn note_all_lost(&self) {
        self.lost_len.fetch_add(LOST_MAX + 1, SeqCst);
    }

    fn forget_losses(&self) {
        self.lost_len.store(0, SeqCst);
        self.poisoned.store(false, SeqCst);
    }

    /// The range if it was stable for as long as it took to read.
    fn range(&self) -> Option<Range> {
        let before = self.version.load(SeqCst);
        let range = Range {
            base: self.base.load(SeqCst),
            len: self.len.load(SeqCst),
            page_len: self.page_len.load(SeqCst),
        };
        let stable = before.is_multiple_of(2) && self.version.load(SeqCst) == before;
        stable.then_some(range)
    }
}

/// Keeps one address range guarded; ends with its drop, which must come before the range is unmapped.
#[derive(Debug)]
pub(crate) struct Guard {
    slot: usize,
}

impl Guard {
    /// Guards `base..base + len`, which is mapped already, in pages of `page_len` bytes.
    ///
    /// # Errors
    /// When the table is full, or the handler could not be installed.
    pub(crate) fn new(base: usize, len: usize, page_len: usize) -> io::Result<Self> {
        assert!(page_len.is_power_of_two(), "page of {page_len} bytes");
        assert!(
            base.is_multiple_of(page_len) && len.is_multiple_of(page_len),
            "guarded range is whole pages"
        );
        install()?;
        let free = |slot: &Slot| slot.claimed.compare_exchange(false, true, SeqCst, SeqCst).is_ok();
        let Some(slot) = TABLE.iter().position(free) else {
            return Err(io::Error::other(format!(
                "{GUARDED_MAX} memory mappings are in use, no more can be guarded"
            )));
        };
        TABLE[slot].forget_losses();
        TABLE[slot].publish(Range { base, len, page_len });
        Ok(Self { slot })
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        TABLE[self.slot].poisoned.load(SeqCst)
    }

    pub(crate) fn poison(&self) {
        TABLE[self.slot].poisoned.store(true, SeqCst);
    }

    /// Whether zeroes stand in for a page that holds a byte of `start..start + len`, addresses of the range. Says yes too
    /// often rather than too rarely.
    pub(crate) fn is_lost(&self, start: usize, len: usize) -> bool {
        let slot = &TABLE[self.slot];
        let lost_len = slot.lost_len.load(SeqCst);
        if lost_len > LOST_MAX {
            return true;
        }
        let page_len = slot.page_len.load(SeqCst);
        let meets = |page: usize| page < start + len && start < page + page_len;
        // A row that the handler is about to fill still says 0, or a page of before: then its access has not been
        // retried, and nobody has what it reads.
        slot.lost[..lost_len].iter().any(|page| meets(page.load(SeqCst)))
    }

    /// The range has other memory behind it now, of pages of the same length or shorter, and nothing is lost of that.
    pub(crate) fn forget_losses(&self) {
        TABLE[self.slot].forget_losses();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &TABLE[self.slot];
        slot.publish(Range { base: 0, len: 0, page_len: 0 });
        slot.claimed.store(false, SeqCst);
    }
}

/// Installs the handler, once a process.
fn install() -> io::Result<()> {
    let done =
        INSTALLED.get_or_init(|| install_handler().map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL)));
    done.map_err(io::Error::from_raw_os_error)
}

fn install_handler() -> io::Result<()> {
    // SAFETY: `sigaction` is a plain C struct for which all zeroes is a valid value (default action, empty mask).
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only reads the present one into `previous`, which is ours and live.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Kept before the handler can run, so that the handler always finds it.
    PREVIOUS.get_or_init(|| previous);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    // Not SA_NODEFER: the handler touches nothing that can fault, and a fault there should kill rather than recurse.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `action` is fully set; the handler has the three-argument form that SA_SIGINFO asks for and is
    // async-signal-safe (atomics and system calls only).
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: `errno` of this thread is always there. The interrupted code may be between a system call and its look at
    // `errno`, so it is put back below.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid siginfo for the duration of a SA_SIGINFO handler.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Codes up to 0 come from kill(2) and the like and carry no address.
    let from_memory = code > 0;
    if !(from_memory && cover(address)) {
        step_aside(from_memory);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// If `address` is guarded: marks the mapping and puts zeroes where the page was. Async-signal-safe.
fn cover(address: usize) -> bool {
    for slot in &TABLE {
        let Some(range) = slot.range() else { continue };
        if address.wrapping_sub(range.base) >= range.len {
            continue;
        }
        slot.poisoned.store(true, SeqCst);
        let page = address & !(range.page_len - 1);
        // One page hides least. But each scattered page is a mapping of its own, of which the kernel has a limited
        // number, and at the limit some kernels (6.1) refuse even one that would replace thousands. So long before, the
        // whole range goes in one piece.
        let scattered = SCATTERED.fetch_add(1, SeqCst);
        slot.note_lost(page);
        if scattered < SCATTERED_MAX && map_zeroes(page, range.page_len) {
            return true;
        }
        slot.note_all_lost();
        return map_zeroes(range.base, range.len);
    }
    false
}

fn map_zeroes(base: usize, len: usize) -> bool {
    let flags = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: `base..base + len` lies inside a guarded range, which its mapping owns and keeps mapped while guarded, so
    // MAP_FIXED replaces only memory of that mapping. The kernel swaps the pages in one step. Spans reach the memory
    // by raw pointers only and expect it to change at any time. A device holding a registration of the old page goes
    // on using that page, not this one; the poisoned flag tells the owner to drop the registration.
    let mapped = unsafe {
        let address = std::ptr::without_provenance_mut(base);
        libc::mmap(address, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    mapped != libc::MAP_FAILED
}

/// Hands SIGBUS back to whatever action stood before, for good: that action is expected to end the process. A fault happens again by itself when the access is retried; a
/// sent signal has to be sent again.
fn step_aside(from_memory: bool) {
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: `previous` was filled by the kernel and is never written again.
        unsafe { libc::sigaction(libc::SIGBUS, previous, std::ptr::null_mut()) };
    }
    if !from_memory {
        // SAFETY: sends a signal to this thread; it stays pending until this handler has returned.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

#[cfg(test)]
mod tests;

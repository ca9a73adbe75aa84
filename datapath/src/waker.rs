//! The doorbell that ends the reactor's sleep.
//!
//! A bell that is rung while the reactor is awake costs one atomic exchange and no system call. The reactor goes to
//! sleep in two steps: it announces it ([`Waker::prepare_sleep`]), looks at its queues once more, then sleeps on the
//! descriptor; whoever rings after the announcement writes to it. So no ring is lost.

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

#[derive(Debug)]
struct Shared {
    event: OwnedFd,
    sleeping: AtomicBool,
}

/// A handle to a reactor's doorbell; clones ring the same bell.
#[derive(Clone, Debug)]
pub struct Waker {
    shared: Arc<Shared>,
}

impl Waker {
    /// A new bell.
    ///
    /// # Errors
    /// When the system gives no descriptor.
    pub fn new() -> std::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { shared: Arc::new(Shared { event, sleeping: AtomicBool::new(false) }) })
    }

    /// Rings. Queue what you want seen *before* you ring. Never blocks.
    pub fn wake(&self) {
        // Pairs with the fence in `prepare_sleep`: either we see `sleeping`, or the sleeper sees what we queued.
        fence(Ordering::SeqCst);
        if self.shared.sleeping.load(Ordering::Relaxed) && self.shared.sleeping.swap(false, Ordering::AcqRel)
        {
            // It can only fail when the counter is full, and then the bell is already ringing.
            let _ = rustix::io::write(&self.shared.event, &1u64.to_ne_bytes());
        }
    }

    /// Announces sleep. The sleeper must look at its queues once more after this, before it sleeps.
    pub fn prepare_sleep(&self) {
        self.shared.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// After sleep (or a change of mind): silences the bell.
    pub fn awake(&self) {
        if !self.shared.sleeping.swap(false, Ordering::AcqRel) {
            let mut counter = [0; 8];
            // EAGAIN when the ringer has not written yet: the next sleep then ends at once, which is harmless.
            let _ = rustix::io::read(&self.shared.event, &mut counter);
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

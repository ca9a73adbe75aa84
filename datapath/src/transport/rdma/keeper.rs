//! Ownership of a volume's ring: the keeper owns the ring and lends it to one link at a time.
//!
//! A ring is made once and outlives the links that use it, because making one takes as long as bringing its pages into
//! memory does. Between links it lies here. Sans-IO: making it is somebody else's work ([`Keeper::begin`]), and what a
//! ring is this file does not know ([`Reusable`]).
//!
//! Invariants:
//! - There is one ring or none, and it is in one place: being made, kept, or lent by a [`Lease`], which nobody can clone.
//! - A ring is lent only while it is [`Use::Free`]: no queue pair exists that a peer could write to it by, and nobody
//!   reads what a former peer wrote there. So no ring is in use by two links, in whatever order a link is taken apart.
//! - One that is [`Use::Lost`] is dropped, and another can be made.
//!
//! Failures survived: a maker that fails or panics; a lease that outlives its keeper.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether a ring can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// By the next link.
    Free,
    /// Not now: a link has it still, or somebody reads what arrived by one.
    Taken,
    /// Never again.
    Lost,
}

/// Something that is made once and used by one after another.
pub trait Reusable: Send + 'static {
    /// Whether it can be used. Does not block.
    fn usable(&self) -> Use;
}

/// Where the ring is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whereabouts {
    /// There is none.
    Nowhere,
    /// It is being made.
    Making {
        /// Bytes of it that are ready.
        done_bytes: u64,
    },
    /// Here, and free.
    Here,
    /// Lent, or not free yet.
    InUse,
}

enum Slot<R> {
    Empty,
    Making { done_bytes: u64 },
    Kept(R),
    Lent,
}

/// Keeps one ring. Cheap to clone: the clones are one keeper.
pub struct Keeper<R: Reusable> {
    slot: Arc<Mutex<Slot<R>>>,
}

impl<R: Reusable> Clone for Keeper<R> {
    fn clone(&self) -> Self {
        Self { slot: Arc::clone(&self.slot) }
    }
}

impl<R: Reusable> Default for Keeper<R> {
    fn default() -> Self {
        Self { slot: Arc::new(Mutex::new(Slot::Empty)) }
    }
}

/// No statement leaves a slot half changed, so a panic elsewhere does not spoil it.
fn locked<R>(slot: &Mutex<Slot<R>>) -> MutexGuard<'_, Slot<R>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<R: Reusable> Keeper<R> {
    /// Where the ring is. Drops one that is lost, which may take as long as deregistering it.
    #[must_use]
    pub fn look(&self) -> Whereabouts {
        self.settle(|_| true).1
    }

    /// Drops the ring unless it is wanted, if it is here and free: it belongs to a device that was replaced, for one.
    pub fn forget_unless(&self, wanted: impl FnOnce(&R) -> bool) {
        drop(self.settle(wanted));
    }

    /// Where the ring is, and the one that was given up, if it was.
    fn settle(&self, wanted: impl FnOnce(&R) -> bool) -> (Option<R>, Whereabouts) {
        let mut slot = locked(&self.slot);
        let found = match &*slot {
            Slot::Empty => Whereabouts::Nowhere,
            Slot::Making { done_bytes } => Whereabouts::Making { done_bytes: *done_bytes },
            Slot::Lent => Whereabouts::InUse,
            Slot::Kept(ring) => match ring.usable() {
                Use::Taken => Whereabouts::InUse,
                Use::Free if wanted(ring) => Whereabouts::Here,
                Use::Free | Use::Lost => Whereabouts::Nowhere,
            },
        };
        let given_up = match (found, &*slot) {
            (Whereabouts::Nowhere, Slot::Kept(_)) => std::mem::replace(&mut *slot, Slot::Empty),
            _ => Slot::Empty,
        };
        // Dropped by the caller, who has not got the lock.
        (if let Slot::Kept(ring) = given_up { Some(ring) } else { None }, found)
    }

    /// The right, and the duty, to make the ring; `None` unless there is none and nobody makes one.
    #[must_use]
    pub fn begin(&self) -> Option<Making<R>> {
        let mut slot = locked(&self.slot);
        if !matches!(*slot, Slot::Empty) {
            return None;
        }
        *slot = Slot::Making { done_bytes: 0 };
        Some(Making { slot: Arc::clone(&self.slot), done: false })
    }

    /// The ring, if it is here and free.
    #[must_use]
    pub fn lend(&self) -> Option<Lease<R>> {
        let mut slot = locked(&self.slot);
        match &*slot {
            Slot::Kept(ring) if ring.usable() == Use::Free => {}
            _ => return None,
        }
        let Slot::Kept(ring) = std::mem::replace(&mut *slot, Slot::Lent) else { unreachable!("just seen") };
        Some(Lease { ring: Some(ring), slot: Arc::clone(&self.slot) })
    }
}

/// A ring in the making. Dropped before it is done, there is none again.
#[must_use]
pub struct Making<R: Reusable> {
    slot: Arc<Mutex<Slot<R>>>,
    done: bool,
}

impl<R: Reusable> Making<R> {
    /// So many bytes of it are ready.
    pub fn progress(&self, done_bytes: u64) {
        *locked(&self.slot) = Slot::Making { done_bytes };
    }

    /// Here it is.
    pub fn done(mut self, ring: R) {
        *locked(&self.slot) = Slot::Kept(ring);
        self.done = true;
    }

    /// Whether nobody is left who wants it: its keeper is gone.
    #[must_use]
    pub fn is_in_vain(&self) -> bool {
        Arc::strong_count(&self.slot) == 1
    }
}

impl<R: Reusable> Drop for Making<R> {
    fn drop(&mut self) {
        if !self.done {
            *locked(&self.slot) = Slot::Empty;
        }
    }
}

/// The ring, for one link. Goes back to its keeper when it is dropped; a lost one is dropped with it.
pub struct Lease<R: Reusable> {
    /// `None` only while it is given back.
    ring: Option<R>,
    slot: Arc<Mutex<Slot<R>>>,
}

impl<R: Reusable> Lease<R> {
    /// A ring that nobody keeps: it ends with its link.
    #[must_use]
    pub fn of(ring: R) -> Self {
        Self { ring: Some(ring), slot: Arc::new(Mutex::new(Slot::Lent)) }
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &R {
        self.ring.as_ref().expect("until it is dropped")
    }

    /// Gives the ring up instead of giving it back.
    pub fn discard(mut self) {
        *locked(&self.slot) = Slot::Empty;
        // Outside of the lock: it may take long.
        drop(self.ring.take());
    }
}

impl<R: Reusable> Drop for Lease<R> {
    fn drop(&mut self) {
        let Some(ring) = self.ring.take() else { return };
        if ring.usable() == Use::Lost {
            *locked(&self.slot) = Slot::Empty;
            drop(ring);
        } else {
            *locked(&self.slot) = Slot::Kept(ring);
        }
    }
}

impl<R: Reusable> fmt::Debug for Keeper<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keeper").field(&self.look()).finish()
    }
}

impl<R: Reusable> fmt::Debug for Lease<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A ring whose state the test sets.
    #[derive(Clone)]
    struct Ring(Arc<Mutex<Use>>, Arc<AtomicU32>);

    impl Ring {
        fn new() -> Self {
            Self(Arc::new(Mutex::new(Use::Free)), Arc::default())
        }

        fn set(&self, to: Use) {
            *self.0.lock().expect("no panics") = to;
        }
    }

    impl Reusable for Ring {
        fn usable(&self) -> Use {
            self.1.fetch_add(1, Ordering::Relaxed);
            *self.0.lock().expect("no panics")
        }
    }

    fn kept() -> (Keeper<Ring>, Ring) {
        let (keeper, ring) = (Keeper::default(), Ring::new());
        keeper.begin().expect("there is none").done(ring.clone());
        (keeper, ring)
    }

    #[test]
    fn a_ring_is_made_once_and_by_one() {
        let keeper = Keeper::default();
        assert_eq!((keeper.look(), keeper.lend().is_some()), (Whereabouts::Nowhere, false));
        let making = keeper.begin().expect("there is none");
        assert!(keeper.begin().is_none(), "somebody makes it");
        assert_eq!((keeper.look(), keeper.lend().is_some()), (Whereabouts::Making { done_bytes: 0 }, false));
        making.progress(5);
        assert_eq!(keeper.look(), Whereabouts::Making { done_bytes: 5 });
        drop(making);
        assert_eq!(keeper.look(), Whereabouts::Nowhere, "it failed");
        keeper.begin().expect("there is none").done(Ring::new());
        assert_eq!(keeper.look(), Whereabouts::Here);
        assert!(keeper.begin().is_none(), "it is there");
    }

    #[test]
    fn it_is_lent_to_one_link_at_a_time_and_comes_back() {
        let (keeper, ring) = kept();
        for _ in 0..3 {
            let lease = keeper.lend().expect("free");
            assert!(keeper.lend().is_none() && keeper.begin().is_none(), "a link has it");
            assert_eq!(keeper.look(), Whereabouts::InUse);
            drop(lease);
            assert_eq!(keeper.look(), Whereabouts::Here);
        }
        assert!(Arc::ptr_eq(&keeper.lend().expect("free").ring().0, &ring.0), "the same");
    }

    #[test]
    fn one_that_somebody_still_writes_to_or_reads_is_not_lent() {
        let (keeper, ring) = kept();
        let lease = keeper.lend().expect("free");
        // Its link is taken apart in the wrong order: the lease first.
        ring.set(Use::Taken);
        drop(lease);
        assert!(keeper.lend().is_none());
        assert_eq!(keeper.look(), Whereabouts::InUse);
        ring.set(Use::Free);
        assert!(keeper.lend().is_some());
    }

    #[test]
    fn a_lost_one_is_dropped_and_made_anew() {
        for lent in [true, false] {
            let (keeper, ring) = kept();
            let lease = lent.then(|| keeper.lend().expect("free"));
            ring.set(Use::Lost);
            drop(lease);
            assert!(keeper.lend().is_none());
            assert_eq!(keeper.look(), Whereabouts::Nowhere);
            assert_eq!(Arc::strong_count(&ring.0), 1, "nobody has it");
            assert!(keeper.begin().is_some());
        }
        let (keeper, ring) = kept();
        keeper.lend().expect("free").discard();
        assert_eq!((keeper.look(), Arc::strong_count(&ring.0)), (Whereabouts::Nowhere, 1));
        let (keeper, ring) = kept();
        keeper.forget_unless(|_| true);
        assert_eq!(keeper.look(), Whereabouts::Here);
        keeper.forget_unless(|_| false);
        assert_eq!((keeper.look(), Arc::strong_count(&ring.0)), (Whereabouts::Nowhere, 1));
    }

    #[test]
    fn what_outlives_its_keeper_is_dropped() {
        let (keeper, ring) = kept();
        let lease = keeper.lend().expect("free");
        drop(keeper);
        drop(lease);
        assert_eq!(Arc::strong_count(&ring.0), 1);
        drop(Lease::of(ring.clone()));
        assert_eq!(Arc::strong_count(&ring.0), 1);
        let keeper = Keeper::<Ring>::default();
        let making = keeper.begin().expect("there is none");
        assert!(!making.is_in_vain());
        drop(keeper);
        assert!(making.is_in_vain());
    }
}

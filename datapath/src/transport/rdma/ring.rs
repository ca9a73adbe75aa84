//! A ring that peers write into by RDMA: memory, resident and registered in a domain of its own. With it goes the memory of
//! the bounce buffer that its link sends from, for the same reasons.
//!
//! Made by [`super::setup`]'s callers ahead of any connection, kept by a [`Keeper`], and lent to one connection after
//! another. Nearly all of the time that making one takes is bringing its pages into memory (5 to 10 ms a MiB in an emulated
//! machine, where registering resident pages takes a tenth of one), so that is done first and piece by piece.
//!
//! Invariants:
//! - A domain holds one ring and at most one queue pair; what its peer can reach is this ring.
//! - The ring is mapped twice, back to back, for who reads it, and registered once: a sender takes apart what crosses its
//!   end.
//! - It is free only when its domain has no queue pair and no span of its memory, nor of its bounce buffer's, is left from a
//!   former link.

use super::keeper::{Keeper, Lease, Making, Reusable, Use};
use super::setup::error::SetupError;
use crate::limits::{RDMA_BOUNCE_LEN, RDMA_RING_STEP_LEN};
use costandby_ffi::mapping::{Mapping, Span};
use costandby_ffi::verbs::{Domain, DomainState, Listener, Region, VerbsError};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// Keeps a volume's ring.
pub type RingKeeper = Keeper<Ring>;

/// A volume's ring, for one link.
pub type RingLease = Lease<Ring>;

/// A registered ring.
#[derive(Debug)]
pub struct Ring {
    memory: Registered,
    bounce: Registered,
    domain: Domain,
}

/// Memory, registered.
#[derive(Debug)]
struct Registered {
    mapping: Arc<Mapping>,
    region: Region,
    /// Who holds the mapping when no link does: the fields above.
    holders: usize,
}

impl Registered {
    /// Registers the first `len` bytes of memory that nobody else holds.
    fn new(
        mapping: Arc<Mapping>,
        len: usize,
        register: impl FnOnce(&Span) -> Result<Region, VerbsError>,
    ) -> Result<Self, VerbsError> {
        assert_eq!(Arc::strong_count(&mapping), 1, "the memory is new");
        let region = register(&mapping.span(0, len))?;
        let holders = Arc::strong_count(&mapping);
        Ok(Self { mapping, region, holders })
    }

    fn is_held(&self) -> bool {
        Arc::strong_count(&self.mapping) > self.holders
    }
}

impl Ring {
    /// Makes one of `len` bytes on the device that has the address `local`. Blocks for as long as its pages take to come
    /// into memory; says meanwhile how many bytes have (`progress`), and gives up when that returns `false`.
    ///
    /// # Errors
    /// See [`SetupError`]; [`SetupError::GivenUp`] is the caller's own.
    pub fn new(local: IpAddr, len: usize, mut progress: impl FnMut(u64) -> bool) -> Result<Self, SetupError> {
        let no_memory = |source| SetupError::Ring { len, source };
        // First, for it fails at once where there is no device.
        let domain = Domain::at(local)?;
        let (ring, bounce) = (Mapping::ring(len), Mapping::anonymous(RDMA_BOUNCE_LEN));
        let (ring, bounce) = (ring.map_err(no_memory)?, bounce.map_err(no_memory)?);
        let mut done_bytes = 0;
        for (mapping, len) in [(&ring, len), (&bounce, RDMA_BOUNCE_LEN)] {
            for start in (0..len).step_by(RDMA_RING_STEP_LEN) {
                if !progress(done_bytes) {
                    return Err(SetupError::GivenUp);
                }
                let step_len = RDMA_RING_STEP_LEN.min(len - start);
                mapping.span(start, step_len).make_resident().map_err(no_memory)?;
                done_bytes += step_len as u64;
            }
        }
        let memory = Registered::new(ring, len, |span| Region::ring(&domain, span))?;
        let bounce = Registered::new(bounce, RDMA_BOUNCE_LEN, |span| Region::source(&domain, span))?;
        Ok(Self { memory, bounce, domain })
    }

    /// Makes it for a keeper.
    ///
    /// # Errors
    /// As [`Ring::new`]. [`SetupError::GivenUp`] when the keeper is gone.
    pub fn make(making: Making<Self>, local: IpAddr, len: usize) -> Result<(), SetupError> {
        let ring = Self::new(local, len, |done_bytes| {
            making.progress(done_bytes);
            !making.is_in_vain()
        })?;
        making.done(ring);
        Ok(())
    }

    /// Its memory, mapped twice.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.memory.mapping
    }

    /// Bytes of it: one lap.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.mapping.len() / 2
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is registered with the device that listens there.
    #[must_use]
    pub fn is_of(&self, listener: &Listener) -> bool {
        listener.is_on(&self.domain)
    }

    /// Where peers write, and by which key.
    pub(super) fn region(&self) -> &Region {
        &self.memory.region
    }

    /// Memory for its link's bounce buffer.
    pub(super) fn bounce(&self) -> (Span, Region) {
        (self.bounce.mapping.span(0, self.bounce.mapping.len()), self.bounce.region.clone())
    }

    /// What its queue pair has to be of.
    pub(super) fn domain(&self) -> &Domain {
        &self.domain
    }
}

impl Reusable for Ring {
    fn usable(&self) -> Use {
        match self.domain.state() {
            DomainState::Lost => Use::Lost,
            DomainState::Taken => Use::Taken,
            DomainState::Free if self.memory.is_held() || self.bounce.is_held() => Use::Taken,
            DomainState::Free => {
                // What the last reader of the memory did with it comes before what the next peer writes there.
                fence(Ordering::Acquire);
                Use::Free
            }
        }
    }
}

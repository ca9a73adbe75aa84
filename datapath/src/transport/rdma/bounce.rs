//! The bounce buffer: registered memory that bytes of the disk are copied through while their own place is not registered.
//!
//! Stands beside the registrations ([`super::registration`]), which decide what goes through here. A ring of its own, on our side:
//! pieces are taken in order, each contiguous, and given back in order when the work request that names them is done.
//!
//! Invariants:
//! - Pieces that are not given back never overlap: the device may send them again until it reports completion.
//! - Whatever is asked for, an empty bounce buffer takes a piece of it; so who waits is served as soon as all is done.
//! - No call allocates after [`BounceBuffer::new`].

use super::endpoint::{Piece, Registrar};
use crate::limits::{RDMA_BOUNCE_LEN, RDMA_BOUNCE_PIECE_LEN_MAX, RDMA_BOUNCE_PIECES_MAX};
use crate::wire::HEADER_LEN;
use costandby_ffi::mapping::{Mapping, Span};
use std::collections::VecDeque;
use std::io;

/// Pieces start at multiples of this: a cache line, and the alignment frames have anyway.
const ALIGN: usize = HEADER_LEN;

/// Where pieces stand, without the memory.
#[derive(Debug)]
struct Places {
    len: usize,
    /// Bytes given out since the beginning, skipped ends included; modulo `len` where the next piece starts.
    taken: u64,
    /// Bytes given back.
    returned: u64,
    /// For each piece the work request that names it, and `taken` after it.
    open: VecDeque<(u64, u64)>,
}

impl Places {
    fn new(len: usize) -> Self {
        Self { len, taken: 0, returned: 0, open: VecDeque::with_capacity(RDMA_BOUNCE_PIECES_MAX) }
    }

    fn at(&self, position: u64) -> usize {
        usize::try_from(position % self.len as u64).expect("less than a length")
    }

    /// A place for `len` bytes.
    fn take(&mut self, len: usize, id: u64) -> Option<usize> {
        assert!(len <= self.len / 4, "a piece of {len} bytes in a bounce buffer of {}", self.len);
        let space = len.next_multiple_of(ALIGN);
        if self.open.len() == RDMA_BOUNCE_PIECES_MAX {
            return None;
        }
        if self.open.is_empty() {
            // Nothing to go round: the memory used last is the warmest.
            (self.taken, self.returned) = (0, 0);
        }
        let tail = self.len - self.at(self.taken);
        let skipped = if space <= tail { 0 } else { tail };
        let end = self.taken + (skipped + space) as u64;
        if end - self.returned > self.len as u64 {
            return None;
        }
        let place = self.at(self.taken + skipped as u64);
        self.taken = end;
        self.open.push_back((id, end));
        Some(place)
    }

    fn done_up_to(&mut self, id: u64) {
        while let Some((piece, end)) = self.open.front().copied() {
            if piece > id {
                return;
            }
            self.returned = end;
            self.open.pop_front();
        }
    }
}

/// The bounce buffer of one link.
#[derive(Debug)]
pub(super) struct BounceBuffer<Region> {
    span: Span,
    region: Region,
    places: Places,
    bounced_bytes: u64,
}

/// Makes and registers the memory of a bounce buffer. Blocks while it is brought in.
///
/// # Errors
/// What the registrar or the system says.
pub(crate) fn make<R: Registrar>(registrar: &R) -> io::Result<(Span, R::Region)> {
    let span = Mapping::anonymous(RDMA_BOUNCE_LEN)?.span(0, RDMA_BOUNCE_LEN);
    let region = registrar.register(&span)?;
    Ok((span, region))
}

impl<Region> BounceBuffer<Region> {
    /// A bounce buffer in memory that is registered already and that nobody else uses: a link's before it may have.
    pub(super) fn new((span, region): (Span, Region)) -> Self {
        let places = Places::new(span.len());
        Self { span, region, places, bounced_bytes: 0 }
    }

    /// Copies the beginning of `source`, as much as one piece takes, for work request `id`. `None` while the bounce buffer has
    /// no room for it.
    ///
    /// # Panics
    /// When `source` is empty or ids go backwards.
    pub(super) fn copy(&mut self, source: &Span, id: u64) -> Option<Piece<'_, Region>> {
        assert!(!source.is_empty(), "nothing to copy");
        assert!(
            self.places.open.back().is_none_or(|(last, _)| *last <= id),
            "work request {id} goes backwards"
        );
        let len = source.len().min(RDMA_BOUNCE_PIECE_LEN_MAX);
        let offset = self.places.take(len, id)?;
        source.sub(0, len).copy_to(&self.span.sub(offset, len));
        self.bounced_bytes += len as u64;
        Some(Piece { region: &self.region, offset, len })
    }

    /// Takes back every piece of the work requests up to `id`, which are done.
    pub(super) fn done_up_to(&mut self, id: u64) {
        self.places.done_up_to(id);
    }

    /// Bytes copied since the beginning.
    pub(super) fn bounced_bytes(&self) -> u64 {
        self.bounced_bytes
    }
}

//! The endpoint over a real device: [`Endpoint`] in terms of the verbs of `ffi`.
//!
//! Nothing is decided here. What a write reads from is held by the queue pair until it is done. The ring is given back
//! after the cut, in which the queue pair is destroyed: that is what keeps the peer out of it from then on.

use super::endpoint::{Completion, Endpoint, EndpointError, MESSAGE_LEN, Piece, Registrar};
use super::ring::RingLease;
use crate::limits::RDMA_COMPLETIONS_MAX;
use costandby_ffi::mapping::Span;
use costandby_ffi::verbs::{self, Domain, Failure, QueuePair, Region, Target, VerbsError};
use std::io;
use std::os::fd::BorrowedFd;

const _: () = assert!(verbs::MESSAGE_LEN == MESSAGE_LEN);

/// Registers memory in one connection's domain.
#[derive(Clone, Debug)]
pub struct VerbsRegistrar {
    domain: Domain,
}

impl Registrar for VerbsRegistrar {
    type Region = Region;

    fn register(&self, span: &Span) -> io::Result<Region> {
        Region::source(&self.domain, span).map_err(io::Error::from)
    }
}

/// A connected queue pair, the ring the peer writes into, and where the peer's ring is.
pub struct VerbsEndpoint {
    /// Before the ring, as fields are dropped in this order.
    queue_pair: QueuePair,
    /// Until the cut.
    ring: Option<RingLease>,
    peer_ring: Target,
    write_len_max: usize,
    /// Room for completions, so that polling clears none.
    room: [verbs::Completion; RDMA_COMPLETIONS_MAX],
}

impl VerbsEndpoint {
    /// Of a connection just made. `ring` is what the peer was told to write into, `peer_ring` where it told us to.
    ///
    /// # Errors
    /// The device does not answer.
    pub(super) fn new(queue_pair: QueuePair, ring: RingLease, peer_ring: Target) -> Result<Self, VerbsError> {
        let room = [verbs::Completion::Done { id: 0 }; RDMA_COMPLETIONS_MAX];
        let mut endpoint = Self { queue_pair, ring: Some(ring), peer_ring, write_len_max: 0, room };
        endpoint.write_len_max = endpoint.queue_pair.write_len_max()?;
        Ok(endpoint)
    }
}

impl std::fmt::Debug for VerbsEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsEndpoint").field("queue_pair", &self.queue_pair).finish_non_exhaustive()
    }
}

impl From<Failure> for EndpointError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Closed => Self::Closed,
            Failure::WorkRequest { status } => {
                Self::WorkRequest { status: verbs::status_text(status), code: status }
            }
            Failure::Device(what) => Self::Device(what),
            Failure::Call { call, errno } => {
                let source = io::Error::from_raw_os_error(errno);
                Self::Io(io::Error::new(source.kind(), format!("{call}: {source}")))
            }
        }
    }
}

impl Endpoint for VerbsEndpoint {
    type Region = Region;
    type Registrar = VerbsRegistrar;

    fn send_len(&self) -> usize {
        self.queue_pair.send_len()
    }

    fn pieces_max(&self) -> usize {
        verbs::PIECES_MAX
    }

    fn write_len_max(&self) -> usize {
        self.write_len_max
    }

    fn registrar(&self) -> VerbsRegistrar {
        VerbsRegistrar { domain: self.queue_pair.domain().clone() }
    }

    fn bounce(&self) -> io::Result<(Span, Region)> {
        // Kept with the ring: bringing its pages in would take as long as those of a tenth of the ring.
        Ok(self.ring.as_ref().ok_or(io::ErrorKind::NotConnected)?.ring().bounce())
    }

    fn write(
        &mut self,
        pieces: &[Piece<'_, Region>],
        ring_offset: u64,
        immediate: Option<u32>,
        id: u64,
        signalled: bool,
    ) {
        assert!((1..=verbs::PIECES_MAX).contains(&pieces.len()), "a write of {} pieces", pieces.len());
        let one = |piece: &Piece<'_, _>| (piece.offset, piece.len);
        let (offset, len) = one(&pieces[0]);
        let mut gathered = [verbs::Piece { region: pieces[0].region, offset, len }; verbs::PIECES_MAX];
        for (to, from) in gathered.iter_mut().zip(pieces).skip(1) {
            let (offset, len) = one(from);
            *to = verbs::Piece { region: from.region, offset, len };
        }
        // Wrapping: where the peer's ring is, is the peer's word, and it was checked when it was given.
        let address = self.peer_ring.address.wrapping_add(ring_offset);
        let target = Target { address, key: self.peer_ring.key };
        self.queue_pair.write(&gathered[..pieces.len()], target, immediate, id, signalled);
    }

    fn send(&mut self, bytes: &[u8; MESSAGE_LEN], id: u64, signalled: bool) {
        self.queue_pair.send(bytes, id, signalled);
    }

    fn ring_doorbell(&mut self) -> Result<(), EndpointError> {
        self.queue_pair.ring_doorbell().map_err(EndpointError::from)
    }

    fn poll(&mut self, completions: &mut [Completion]) -> Result<usize, EndpointError> {
        let wanted = completions.len().min(self.room.len());
        let taken = self.queue_pair.poll(&mut self.room[..wanted])?;
        for (to, from) in completions.iter_mut().zip(&self.room[..taken]) {
            *to = match *from {
                verbs::Completion::Done { id } => Completion::Done { id },
                verbs::Completion::Placed { immediate } => Completion::Placed { immediate },
                verbs::Completion::Message { bytes } => Completion::Message { bytes },
                verbs::Completion::Short { len } => Completion::MessageLength { found: len },
            };
        }
        Ok(taken)
    }

    fn check(&mut self) -> Result<(), EndpointError> {
        self.queue_pair.check().map_err(EndpointError::from)
    }

    fn notify(&mut self) -> Result<(), EndpointError> {
        self.queue_pair.notify().map_err(EndpointError::from)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.queue_pair.descriptors()
    }

    fn cut(&mut self) {
        // The queue pair first: from then on the key opens nothing. Should the device not let go of it, the ring is lost,
        // and deregistered at once, whatever that takes.
        self.queue_pair.cut();
        self.ring = None;
    }
}

#[cfg(test)]
mod tests;

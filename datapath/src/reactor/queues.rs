//! The reactor's end of the in-process queues: takes operations, starts them in the volume, returns completions.

use crate::error::IoError;
use crate::front::queue::{Operation, OperationKind, QueueServer};
use crate::units::{ByteRange, Token};
use crate::volume::{Begin, NewRequest, Op, Origin, Volume};
use crate::wire::Kind;

/// One attached queue.
pub(super) struct Queue {
    index: u32,
    volume: usize,
    server: QueueServer,
    open: Vec<Option<Operation>>,
    free: Vec<u32>,
    /// An operation the volume had no room for.
    refused: Option<Operation>,
}

impl Queue {
    pub(super) fn new(index: u32, volume: usize, server: QueueServer) -> Self {
        let depth = server.operations.capacity();
        let slots = u32::try_from(depth).expect("a queue's depth is small");
        Self {
            index,
            volume,
            server,
            open: (0..depth).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            refused: None,
        }
    }

    pub(super) fn has_operations(&self) -> bool {
        !self.server.operations.is_empty()
    }

    /// Whether [`Queue::serve`] could do something.
    pub(super) fn wants_service(&self) -> bool {
        self.refused.is_some() || self.has_operations()
    }

    pub(super) fn volume(&self) -> usize {
        self.volume
    }

    pub(super) fn serve(&mut self, volumes: &mut [Volume]) -> bool {
        let mut any = false;
        while let Some(operation) = self.refused.take().or_else(|| self.server.operations.pop()) {
            if !self.begin(operation, &mut volumes[self.volume]) {
                break;
            }
            any = true;
        }
        any
    }

    fn begin(&mut self, operation: Operation, volume: &mut Volume) -> bool {
        let range = ByteRange::new(operation.offset, operation.len);
        let needs_buffer = matches!(operation.kind, OperationKind::Read | OperationKind::Write);
        let well_formed = operation.kind == OperationKind::Flush
            || (range.len > 0
                && range.fits(volume.disk().size())
                && range.len <= u64::from(u32::MAX)
                && (!needs_buffer || (operation.buffer.len() as u64 == range.len)))
                && (!needs_buffer || range.len <= u64::from(crate::limits::PAYLOAD_LEN_MAX));
        if !well_formed {
            self.server.complete(operation, Err(IoError::Invalid));
            return true;
        }
        let op = match operation.kind {
            OperationKind::Read => Op::Read,
            OperationKind::Write => Op::Change(Kind::Write),
            OperationKind::Flush => Op::Flush,
            OperationKind::Trim => Op::Change(Kind::Trim),
            OperationKind::WriteZeroes => Op::Change(Kind::WriteZeroes),
        };
        let slot = self.free.pop().expect("no more are open than the queue is deep");
        let origin = Origin::Queue { queue: self.index, slot };
        let fua = operation.fua;
        self.open[slot as usize] = Some(operation);
        match volume.begin(NewRequest { origin, op, range, fua }) {
            Begin::Go(token) => self.go(slot, op, token, volume),
            Begin::Waits(_) => {}
            Begin::Full => {
                self.refused = self.open[slot as usize].take();
                self.free.push(slot);
                return false;
            }
            Begin::Failed(error) => self.done(slot, Err(error)),
        }
        true
    }

    pub(super) fn granted(&mut self, slot: u32, token: Token, volume: &mut Volume) {
        let op = match self.open[slot as usize].as_ref().expect("an open operation").kind {
            OperationKind::Read => Op::Read,
            _ => Op::Change(Kind::Write),
        };
        self.go(slot, op, token, volume);
    }

    /// The range is ours: move the bytes.
    fn go(&mut self, slot: u32, op: Op, token: Token, volume: &mut Volume) {
        let operation = self.open[slot as usize].as_mut().expect("an open operation");
        let span = |volume: &Volume| volume.disk().span(ByteRange::new(operation.offset, operation.len));
        match op {
            Op::Read => {
                span(volume).read_into(&mut operation.buffer);
                let failed = volume.disk().is_failed();
                if failed && volume.read_lost(token) {
                    return;
                }
                volume.read_done(token);
                self.done(slot, if failed { Err(IoError::DiskFailed) } else { Ok(()) });
            }
            Op::Change(Kind::Write) => {
                span(volume).write_from(&operation.buffer);
                volume.landed(token);
            }
            Op::Change(_) | Op::Flush => {}
        }
    }

    pub(super) fn done(&mut self, slot: u32, result: Result<(), IoError>) {
        let operation = self.open[slot as usize].take().expect("an open operation");
        self.free.push(slot);
        self.server.complete(operation, result);
    }
}

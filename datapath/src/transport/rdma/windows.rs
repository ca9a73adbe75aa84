//! Where the bytes of a write are sent from: registered windows of the disk, or the stage.
//!
//! Skeleton: everything goes through the stage.

use super::endpoint::{Piece, Registrar};
use super::stage::Stage;
use costandby_ffi::mapping::Span;
use std::io;

/// The next bytes of a change, ready to be named by a work request.
#[derive(Debug)]
pub enum Source<'a, Region> {
    /// Where they are: in a registered window of the disk.
    Direct(Piece<'a, Region>),
    /// A copy, in the stage.
    Staged(Piece<'a, Region>),
    /// Neither now: ask again after [`Windows::done_up_to`] was told of more. The work requests under way must have
    /// been signalled up to the last for that to come.
    Wait,
    /// The disk could not be read: its mapping is poisoned. Nothing of it may be sent.
    Medium,
}

/// What status and doctor show.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WindowCounters {
    /// Windows registered now.
    pub windows: u64,
    /// Bytes of the disk registered now.
    pub registered_bytes: u64,
    /// Bytes that may be registered: the configured limit, or less where the system refused more.
    pub limit_bytes: u64,
    /// Bytes that were copied through the stage.
    pub staged_bytes: u64,
    /// Windows given up for others.
    pub evictions: u64,
    /// Registrations that failed.
    pub failures: u64,
}

/// The windows of one link, and its stage.
#[derive(Debug)]
pub struct Windows<R: Registrar> {
    stage: Stage<R::Region>,
    limit_bytes: u64,
}

impl<R: Registrar> Windows<R> {
    /// Registers the stage, and starts the thread that registers windows: at most `limit_bytes` of the disk. Blocks for
    /// a few milliseconds.
    ///
    /// # Errors
    /// When the stage cannot be registered, or the system gives no thread.
    pub fn new(registrar: &R, limit_bytes: u64) -> io::Result<Self> {
        Ok(Self { stage: Stage::new(registrar)?, limit_bytes })
    }

    /// Where to send `span`'s bytes from `from` on, at most `len_max` of them and perhaps fewer, with the work request
    /// `id` that is posted next. `resync`: a step of the background copy, which has nothing registered.
    ///
    /// # Panics
    /// When nothing is left of the span or `len_max` is 0, or when ids go backwards.
    pub fn source(
        &mut self,
        span: &Span,
        from: usize,
        len_max: usize,
        resync: bool,
        id: u64,
    ) -> Source<'_, R::Region> {
        let _ = resync;
        let rest = span.sub(from, (span.len() - from).min(len_max));
        match self.stage.copy(&rest, id) {
            Some(_) if span.mapping().is_poisoned() => Source::Medium,
            Some(piece) => Source::Staged(piece),
            None => Source::Wait,
        }
    }

    /// The work requests up to `id` are done: what they named may be used again.
    pub fn done_up_to(&mut self, id: u64) {
        self.stage.done_up_to(id);
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> WindowCounters {
        WindowCounters {
            staged_bytes: self.stage.staged_bytes(),
            limit_bytes: self.limit_bytes,
            ..WindowCounters::default()
        }
    }
}

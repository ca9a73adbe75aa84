//! Submits one disk's blocking calls to the worker threads ([`super::pool`]).
//!
//! Results come back by channel and ring the reactor's doorbell. Stores of the activity log and dirty bitmap have
//! their own share of threads: a write to a cold extent waits for such a store, which must not wait behind a slow
//! flush of data.
//!
//! The queues are bounded: the reactor keeps at most one flush a volume under way (later ones merge into the next), a
//! punch or zeroing for each request in flight, one transaction and one store of bitmap blocks.

use super::image::{DiskError, DiskImage};
use super::pool::{Calls, WorkerPool};
use super::record_store::RecordStore;
use crossbeam_channel::{Receiver, Sender};
use std::cell::Cell;
use std::sync::Arc;

pub use super::job::{Job, JobDone, JobKind};

/// One disk's way to the threads that make its calls. Dropping this waits until the queued jobs are done.
#[derive(Debug)]
pub struct DiskWorkers {
    to: To,
    /// Submitted and not yet reported ended.
    open: Cell<usize>,
}

/// Where jobs go.
#[derive(Debug)]
enum To {
    /// To the pool, as this disk's.
    Pool(WorkerPool, usize),
    /// To whoever holds the receiver.
    Hand(Sender<Job>),
}

/// A disk and what is on record about it.
#[derive(Debug)]
struct DiskCalls {
    disk: Arc<DiskImage>,
    store: Option<Arc<dyn RecordStore>>,
}

impl Calls for DiskCalls {
    fn carry_out(&self, kind: &JobKind) -> Result<(), DiskError> {
        let _call = self.disk.begin_call();
        kind.carry_out(&self.disk, self.store.as_deref())
    }
}

impl DiskWorkers {
    /// Of a disk whose calls the threads of `pool` make; its results name `volume`.
    #[must_use]
    pub fn in_pool(
        pool: &WorkerPool,
        volume: usize,
        disk: &Arc<DiskImage>,
        store: Option<&Arc<dyn RecordStore>>,
    ) -> Self {
        let calls = DiskCalls { disk: Arc::clone(disk), store: store.cloned() };
        let to = To::Pool(pool.clone(), pool.add(volume, Arc::new(calls)));
        Self { to, open: Cell::new(0) }
    }

    /// No threads: whoever holds the receiver makes the calls, when and in what order it likes, and hands the results to
    /// the volume itself. For simulations, where a thread would spoil that a run repeats. Stores of the record are among
    /// them.
    #[doc(hidden)]
    #[must_use]
    pub fn by_hand() -> (Self, Receiver<Job>) {
        let (jobs, queue) = crossbeam_channel::unbounded();
        (Self { to: To::Hand(jobs), open: Cell::new(0) }, queue)
    }

    /// The result of a job was taken.
    pub fn ended(&self) {
        self.open.set(self.open.get().saturating_sub(1));
    }

    /// Whether a job is under way, or its result not taken yet.
    #[must_use]
    pub fn are_busy(&self) -> bool {
        self.open.get() > 0
    }

    /// Queues a job. Does not block.
    ///
    /// # Panics
    /// When nobody holds the receiver of [`DiskWorkers::by_hand`] any more.
    pub fn submit(&self, job: Job) {
        self.open.set(self.open.get() + 1);
        match &self.to {
            To::Pool(pool, disk) => pool.submit(*disk, job),
            To::Hand(jobs) => jobs.send(job).expect("whoever plays the threads lives as long as this"),
        }
    }
}

impl Drop for DiskWorkers {
    fn drop(&mut self) {
        if let To::Pool(pool, disk) = &self.to {
            pool.remove(*disk);
        }
    }
}

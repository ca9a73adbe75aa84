//! The threads that make a disk's blocking calls, so that the reactor never waits for a medium.
//!
//! Jobs and their results cross by channel; a result rings the reactor's doorbell. What is on record about the disk is
//! stored by a thread of its own: a write to a cold place waits for that, and must not stand behind a slow flush of data.
//!
//! The queues are bounded: the reactor keeps at most one flush a volume under way (later ones merge into the next), a
//! punch or zeroing for each request in flight, one transaction and one store of bitmap blocks.

use super::activity_log::Transaction;
use super::dirty_map::DirtyBlock;
use super::image::{DiskError, DiskImage};
use super::record::RecordStore;
use crate::limits::DISK_WORKERS;
use crate::units::{ByteRange, Token};
use crate::waker::Waker;
use crossbeam_channel::{Receiver, Sender};
use std::cell::Cell;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A blocking call to make.
#[derive(Clone)]
pub enum JobKind {
    /// [`DiskImage::flush`].
    Flush,
    /// [`DiskImage::punch`].
    Punch(ByteRange),
    /// [`DiskImage::zero`].
    Zero(ByteRange),
    /// [`RecordStore::commit`].
    Commit(Transaction),
    /// [`RecordStore::store_dirty`].
    StoreDirty(Vec<DirtyBlock>),
}

impl JobKind {
    /// Whether it goes to the record's store and not to the disk.
    #[must_use]
    pub fn is_of_record(&self) -> bool {
        matches!(self, Self::Commit(_) | Self::StoreDirty(_))
    }

    /// Makes the call. Blocks.
    ///
    /// # Errors
    /// The disk, or its record, is to be taken as failed.
    ///
    /// # Panics
    /// On a job for a store where there is none.
    pub fn carry_out(&self, disk: &DiskImage, store: Option<&dyn RecordStore>) -> Result<(), DiskError> {
        let stored = || store.expect("a record that is stored nowhere asks for no stores");
        match self {
            Self::Flush => disk.flush(),
            Self::Punch(range) => disk.punch(*range),
            Self::Zero(range) => disk.zero(*range),
            Self::Commit(transaction) => Ok(stored().commit(transaction)?),
            Self::StoreDirty(blocks) => Ok(stored().store_dirty(blocks)?),
        }
    }
}

impl std::fmt::Debug for JobKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flush => write!(f, "Flush"),
            Self::Punch(range) => write!(f, "Punch({range})"),
            Self::Zero(range) => write!(f, "Zero({range})"),
            Self::Commit(transaction) => write!(f, "Commit({})", transaction.ticket.0),
            Self::StoreDirty(blocks) => {
                f.write_str("StoreDirty")?;
                f.debug_list().entries(blocks.iter().map(|block| block.index)).finish()
            }
        }
    }
}

/// A call and who wants to know.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub kind: JobKind,
    /// Handed back with the result.
    pub token: Token,
}

/// The result of a job.
#[derive(Debug)]
pub struct JobDone {
    /// Of which volume of the reactor.
    pub volume: usize,
    /// What was done.
    pub kind: JobKind,
    /// As given.
    pub token: Token,
    /// How it ended.
    pub result: Result<(), DiskError>,
}

/// The worker threads of one disk. Dropping this ends them once the queued jobs are done.
#[derive(Debug)]
pub struct DiskWorkers {
    jobs: Option<[Sender<Job>; 2]>,
    threads: Vec<JoinHandle<()>>,
    /// Submitted and not yet reported ended.
    open: Cell<usize>,
}

/// What a worker thread works with.
struct Bench {
    volume: usize,
    disk: Arc<DiskImage>,
    store: Option<Arc<dyn RecordStore>>,
    queue: Receiver<Job>,
    done: Sender<JobDone>,
    waker: Waker,
}

impl DiskWorkers {
    /// Starts the threads. Results go to `done`, after which `waker` rings.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        volume: usize,
        disk: &Arc<DiskImage>,
        store: Option<&Arc<dyn RecordStore>>,
        done: &Sender<JobDone>,
        waker: &Waker,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = crossbeam_channel::unbounded();
        let (stores, store_queue) = crossbeam_channel::unbounded();
        let named = |n: usize| (format!("disk-{volume}.{n}"), &queue);
        let of_record = store.map(|_| (format!("record-{volume}"), &store_queue));
        let mut threads = Vec::new();
        for (name, queue) in (0..DISK_WORKERS).map(named).chain(of_record) {
            let bench = Bench {
                volume,
                disk: Arc::clone(disk),
                store: store.cloned(),
                queue: queue.clone(),
                done: done.clone(),
                waker: waker.clone(),
            };
            threads.push(std::thread::Builder::new().name(name).spawn(move || bench.work())?);
        }
        Ok(Self { jobs: Some([jobs, stores]), threads, open: Cell::new(0) })
    }

    /// No threads: whoever holds the receiver makes the calls, when and in what order it likes, and hands the results to
    /// the volume itself. For simulations, where a thread would spoil that a run repeats. Stores of the record are among
    /// them.
    #[doc(hidden)]
    #[must_use]
    pub fn by_hand() -> (Self, Receiver<Job>) {
        let (jobs, queue) = crossbeam_channel::unbounded();
        (Self { jobs: Some([jobs.clone(), jobs]), threads: Vec::new(), open: Cell::new(0) }, queue)
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
    /// When the workers are gone, which they are only after drop.
    pub fn submit(&self, job: Job) {
        self.open.set(self.open.get() + 1);
        let [of_disk, of_record] = self.jobs.as_ref().expect("until drop");
        let queue = if job.kind.is_of_record() { of_record } else { of_disk };
        queue.send(job).expect("the workers live as long as this");
    }
}

impl Drop for DiskWorkers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A worker that panicked has already said so; the disk is closing either way.
            let _ = thread.join();
        }
    }
}

impl Bench {
    fn work(self) {
        for Job { kind, token } in &self.queue {
            let result = kind.carry_out(&self.disk, self.store.as_deref());
            if self.done.send(JobDone { volume: self.volume, kind, token, result }).is_err() {
                return;
            }
            self.waker.wake();
        }
    }
}

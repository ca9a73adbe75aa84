//! The threads that make a disk's blocking calls, so that the reactor never waits for a medium.
//!
//! Jobs and their results cross by channel; a result rings the reactor's doorbell. The reactor keeps at most one flush a
//! volume under way (later ones merge into the next), so the queue is bounded by the requests in flight.

use super::image::{DiskError, DiskImage};
use crate::limits::DISK_WORKERS;
use crate::units::{ByteRange, Token};
use crate::waker::Waker;
use crossbeam_channel::{Receiver, Sender};
use std::cell::Cell;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A blocking call to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobKind {
    /// [`DiskImage::flush`].
    Flush,
    /// [`DiskImage::punch`].
    Punch(ByteRange),
    /// [`DiskImage::zero`].
    Zero(ByteRange),
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

/// The worker threads of one disk. Dropping it lets the jobs under way finish and joins the threads.
#[derive(Debug)]
pub struct DiskWorkers {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    /// Submitted and not yet reported ended.
    open: Cell<usize>,
}

impl DiskWorkers {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        volume: usize,
        disk: &Arc<DiskImage>,
        done: &Sender<JobDone>,
        waker: &Waker,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = crossbeam_channel::unbounded();
        let mut threads = Vec::new();
        for n in 0..DISK_WORKERS {
            let (disk, queue, done, waker) = (Arc::clone(disk), queue.clone(), done.clone(), waker.clone());
            let name = format!("disk-{volume}.{n}");
            threads.push(
                std::thread::Builder::new()
                    .name(name)
                    .spawn(move || work(volume, &disk, &queue, &done, &waker))?,
            );
        }
        Ok(Self { jobs: Some(jobs), threads, open: Cell::new(0) })
    }

    /// No threads: whoever holds the receiver makes the calls, when and in what order it likes, and hands the results to
    /// the volume itself. For simulations, where a thread would spoil that a run repeats.
    #[doc(hidden)]
    #[must_use]
    pub fn by_hand() -> (Self, Receiver<Job>) {
        let (jobs, queue) = crossbeam_channel::unbounded();
        (Self { jobs: Some(jobs), threads: Vec::new(), open: Cell::new(0) }, queue)
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
        self.jobs.as_ref().expect("until drop").send(job).expect("the workers live as long as this");
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

fn work(volume: usize, disk: &DiskImage, queue: &Receiver<Job>, done: &Sender<JobDone>, waker: &Waker) {
    for job in queue {
        let result = match job.kind {
            JobKind::Flush => disk.flush(),
            JobKind::Punch(range) => disk.punch(range),
            JobKind::Zero(range) => disk.zero(range),
        };
        if done.send(JobDone { volume, kind: job.kind, token: job.token, result }).is_err() {
            return;
        }
        waker.wake();
    }
}

//! The worker threads of a node: one elastic pool for the blocking calls of all its disks.
//!
//! A thread starts when a job waits and no thread is free, and ends when it had nothing to do for a while; one stays. Each
//! disk has a share of [`DISK_WORKERS`] calls on its data and one on its record at a time, and the pool may have as many
//! threads as all shares together: a disk that hangs keeps its own share of threads and never another disk's.
//!
//! Invariants:
//! - the stores of one disk's record are made one after the other, in the order of their submission; calls on its data
//!   begin in that order;
//! - a store of a record never waits behind calls on data, of its own disk or of another;
//! - a submitting thread starts only the first worker; the worker that takes the last free place starts the next
//!   one;
//! - once a disk's handle is dropped, its jobs are done and the pool has let go of the disk.
//!
//! Survives: disks that hang; a system that refuses more threads (jobs then wait for a thread to finish its call).

use super::image::DiskError;
use super::job::{Job, JobDone, JobKind};
use crate::limits::{DISK_WORKER_IDLE_S, DISK_WORKERS};
use crate::waker::Waker;
use crossbeam_channel::Sender;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Kinds of calls, by which a disk's share is counted; also places in [`Bench::lanes`] and [`State::ready`].
const RECORD: usize = 0;
const DATA: usize = 1;

/// Who makes one disk's calls, on a thread of the pool. Blocking.
pub trait Calls: Send + Sync + std::fmt::Debug {
    /// Makes one.
    ///
    /// # Errors
    /// The disk, or its record, is to be taken as failed.
    fn carry_out(&self, kind: &JobKind) -> Result<(), DiskError>;
}

/// The pool. Clones are the same pool, and each of its disks has one; its threads end when the last of them is gone.
#[derive(Clone, Debug)]
pub struct WorkerPool {
    open: Arc<Open>,
}

/// Ends the threads with the last handle.
#[derive(Debug)]
struct Open {
    shared: Arc<Shared>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// A job may begin, or the pool closes.
    work: Condvar,
    /// A disk has no job left.
    drained: Condvar,
    done: Sender<JobDone>,
    waker: Waker,
    /// How long a thread that is not the only free one waits for a job.
    idle: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// By a disk's number in the pool.
    benches: Vec<Option<Bench>>,
    /// Numbers of disks, once for each job that may begin.
    ready: [VecDeque<usize>; 2],
    threads: usize,
    /// Threads that wait for a job, and those that were started and have not looked for one yet.
    free: usize,
    /// The system gave no thread; said once.
    refused: bool,
    closing: bool,
}

/// One disk's jobs.
#[derive(Debug)]
struct Bench {
    volume: usize,
    calls: Arc<dyn Calls>,
    lanes: [Lane; 2],
}

/// Jobs of one kind on one disk.
#[derive(Debug)]
struct Lane {
    queue: VecDeque<Job>,
    /// Under way, or announced as ready.
    begun: usize,
    /// Announced as ready, and still in `queue`.
    announced: usize,
    share: usize,
}

impl Lane {
    fn new(share: usize) -> Self {
        Self { queue: VecDeque::new(), begun: 0, announced: 0, share }
    }

    /// Whether one more job may be announced.
    fn may_announce(&mut self) -> bool {
        let may = self.queue.len() > self.announced && self.begun < self.share;
        if may {
            self.begun += 1;
            self.announced += 1;
        }
        may
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.begun == 0
    }
}

/// A job that a thread has taken.
struct Taken {
    bench: usize,
    kind: usize,
    job: Job,
    volume: usize,
    calls: Arc<dyn Calls>,
}

impl State {
    fn bench(&mut self, at: usize) -> &mut Bench {
        self.benches[at].as_mut().expect("a disk stays until its last job ended")
    }

    /// Announces what may begin. Returns how many jobs that are.
    fn announce(&mut self, at: usize, kind: usize) -> usize {
        let mut count = 0;
        while self.bench(at).lanes[kind].may_announce() {
            self.ready[kind].push_back(at);
            count += 1;
        }
        count
    }

    fn take(&mut self) -> Option<Taken> {
        let kind = [RECORD, DATA].into_iter().find(|&kind| !self.ready[kind].is_empty())?;
        let at = self.ready[kind].pop_front()?;
        let bench = self.bench(at);
        let lane = &mut bench.lanes[kind];
        lane.announced -= 1;
        let job = lane.queue.pop_front().expect("it was announced");
        Some(Taken { bench: at, kind, job, volume: bench.volume, calls: Arc::clone(&bench.calls) })
    }

    /// Most threads: every disk's share, and one that is free.
    fn threads_max(&self) -> usize {
        self.benches.iter().flatten().count() * (DISK_WORKERS + 1) + 1
    }

    /// Counts one more thread, which the caller starts, where none is free.
    fn wants_thread(&mut self) -> bool {
        let wants = self.free == 0 && self.threads < self.threads_max();
        if wants {
            self.threads += 1;
            self.free += 1;
        }
        wants
    }
}

impl WorkerPool {
    /// A pool without threads yet. Results go to `done`, after which `waker` rings.
    #[must_use]
    pub fn new(done: &Sender<JobDone>, waker: &Waker) -> Self {
        Self::with_idle(done, waker, Duration::from_secs(DISK_WORKER_IDLE_S))
    }

    fn with_idle(done: &Sender<JobDone>, waker: &Waker, idle: Duration) -> Self {
        let shared = Shared {
            idle,
            state: Mutex::default(),
            work: Condvar::new(),
            drained: Condvar::new(),
            done: done.clone(),
            waker: waker.clone(),
        };
        Self { open: Arc::new(Open { shared: Arc::new(shared) }) }
    }

    /// Threads there are.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.open.shared.lock().threads
    }

    /// Takes a disk in; `volume` is what its results are named by.
    pub(super) fn add(&self, volume: usize, calls: Arc<dyn Calls>) -> usize {
        let bench = Bench { volume, calls, lanes: [Lane::new(1), Lane::new(DISK_WORKERS)] };
        let mut state = self.open.shared.lock();
        let at = state.benches.iter().position(Option::is_none).unwrap_or_else(|| {
            state.benches.push(None);
            state.benches.len() - 1
        });
        state.benches[at] = Some(bench);
        at
    }

    /// Queues a job of the disk that [`WorkerPool::add`] gave this number.
    pub(super) fn submit(&self, at: usize, job: Job) {
        let kind = if job.kind.is_of_record() { RECORD } else { DATA };
        let shared = &self.open.shared;
        let mut state = shared.lock();
        state.bench(at).lanes[kind].queue.push_back(job);
        let announced = state.announce(at, kind);
        // Only the first job of all finds none, or one after the system gave no thread.
        let start = announced > 0 && state.wants_thread();
        drop(state);
        if start {
            Shared::start_thread(shared);
        }
        if announced > 0 {
            shared.work.notify_one();
        }
    }

    /// Waits until the disk's jobs are done, and forgets it. Blocks.
    pub(super) fn remove(&self, at: usize) {
        let shared = &self.open.shared;
        let mut state = shared.lock();
        while !state.bench(at).lanes.iter().all(Lane::is_empty) {
            state = shared.drained.wait(state).expect("nobody panics with it");
        }
        let bench = state.benches[at].take();
        drop(state);
        // Closing a disk is no work to be done under the lock.
        drop(bench);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    /// Starts the thread that [`State::wants_thread`] counted.
    fn start_thread(shared: &Arc<Self>) {
        let own = Arc::clone(shared);
        let started = std::thread::Builder::new().name("disk".into()).spawn(move || Self::work(&own));
        if let Err(error) = started {
            let mut state = shared.lock();
            state.threads -= 1;
            state.free -= 1;
            if !std::mem::replace(&mut state.refused, true) {
                let threads = state.threads;
                tracing::warn!(
                    %error,
                    threads,
                    "the system refuses more threads, so calls on disks wait for each other: raise TasksMax= of \
                     the unit, or ulimit -u"
                );
            }
        }
    }

    fn work(shared: &Arc<Self>) {
        while let Some(taken) = Self::next(shared) {
            // Ends the job also where it panics, so that nobody waits for it for ever.
            let ended = Ended { shared, bench: taken.bench, kind: taken.kind };
            let Taken { job: Job { kind, token }, volume, calls, .. } = taken;
            let result = calls.carry_out(&kind);
            drop(calls);
            // Whoever asked may be gone; the disk's handle waits for the end of the job alone.
            let _ = shared.done.send(JobDone { volume, kind, token, result });
            drop(ended);
            shared.waker.wake();
        }
    }

    /// Waits for a job; `None`: this thread is not needed any more, and is not counted any more.
    fn next(shared: &Arc<Self>) -> Option<Taken> {
        let mut state = shared.lock();
        loop {
            if let Some(taken) = state.take() {
                state.free -= 1;
                let start = state.wants_thread();
                drop(state);
                if start {
                    Self::start_thread(shared);
                }
                return Some(taken);
            }
            let (locked, waited) =
                shared.work.wait_timeout(state, shared.idle).expect("nobody panics with it");
            state = locked;
            let idle = state.ready.iter().all(VecDeque::is_empty);
            if idle && (state.closing || (waited.timed_out() && state.free > 1)) {
                state.free -= 1;
                state.threads -= 1;
                return None;
            }
        }
    }
}

/// A job that ends with this.
struct Ended<'a> {
    shared: &'a Arc<Shared>,
    bench: usize,
    kind: usize,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let Self { shared, bench, kind } = *self;
        let mut state = shared.lock();
        state.bench(bench).lanes[kind].begun -= 1;
        // This thread takes it itself.
        let _ = state.announce(bench, kind);
        if std::thread::panicking() {
            state.threads -= 1;
        } else {
            state.free += 1;
        }
        let drained = state.bench(bench).lanes.iter().all(Lane::is_empty);
        drop(state);
        if drained {
            shared.drained.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;

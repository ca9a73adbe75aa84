//! The thread that registers and deregisters, which takes milliseconds a section: pages are read, brought in and pinned.
//!
//! One a link, and it ends with the link: as soon as the call it is in returns, nobody waits for it. What it still has
//! to deregister is kept alive by the regions themselves.
//!
//! One registration is under way at a time, so neither side ever waits for a place in the other's queue.

use crate::transport::rdma::endpoint::Registrar;
use costandby_ffi::mapping::Span;
use crossbeam_channel::{Receiver, Sender, TryRecvError};
use std::io;

/// Jobs queued: a registration, and the last.
const QUEUE_LEN: usize = 2;

/// What is done in one go: first the ends, then the registration.
struct Job<Region> {
    end: Vec<Region>,
    register: Option<Span>,
}

/// Our end of the thread.
#[derive(Debug)]
pub(super) struct Registry<Region> {
    jobs: Sender<Job<Region>>,
    results: Receiver<io::Result<Region>>,
}

impl<Region: Send + 'static> Registry<Region> {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives none.
    pub(super) fn start<R: Registrar<Region = Region>>(registrar: R) -> io::Result<Self> {
        let (jobs, queue) = crossbeam_channel::bounded::<Job<Region>>(QUEUE_LEN);
        let (done, results) = crossbeam_channel::bounded(QUEUE_LEN);
        let work = move || {
            for job in queue {
                drop(job.end);
                let Some(span) = job.register else { continue };
                if done.send(registrar.register(&span)).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("rdma-registrar".to_owned()).spawn(work)?;
        Ok(Self { jobs, results })
    }

    /// Ends these registrations, then makes one of `span`. Only after the result of the one before was taken.
    pub(super) fn register(&self, end: Vec<Region>, span: Span) {
        let sent = self.jobs.try_send(Job { end, register: Some(span) });
        assert!(sent.is_ok(), "the registrar has one job at a time, until the link ends");
    }

    /// Ends these registrations. The last job.
    pub(super) fn end(&self, end: Vec<Region>) {
        // A thread that is gone ended them by dropping them.
        let _ = self.jobs.try_send(Job { end, register: None });
    }

    /// The result, if it is there. Does not block, takes no lock.
    pub(super) fn poll(&self) -> Option<io::Result<Region>> {
        match self.results.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("the registrar's thread lives as long as its link"),
        }
    }

    /// The result, waited for.
    #[cfg(test)]
    pub(super) fn wait(&self) -> io::Result<Region> {
        self.results.recv().expect("the registrar's thread lives as long as its link")
    }
}
